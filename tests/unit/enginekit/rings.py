"""Rings on real files or none, and their operations' ends."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ublk_ubi import _testing as t

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STRIPE = 64 << 10


def ring(**options) -> t.RingBench:
    """Make a ring whose buffers are stripes."""
    return t.RingBench(area=4 * STRIPE, stride=STRIPE, **options)


def user_data(kind: int, index: int = 0) -> int:
    """Give what a CQE brings back."""
    return kind << 56 | index


@contextmanager
def files(folder: Path, *, image: bytes = b"", base_bytes: int = 0) -> Iterator[dict[str, int]]:
    """Open an image and a base, the latter twice, as the data plane does."""
    (folder / "image").write_bytes(image)
    (folder / "base").touch()
    os.truncate(folder / "base", base_bytes)
    fds = {
        "image": os.open(folder / "image", os.O_RDONLY),
        "base": os.open(folder / "base", os.O_RDWR),
        "sync": os.open(folder / "base", os.O_RDWR),
    }
    try:
        yield fds
    finally:
        for fd in fds.values():
            os.close(fd)


def settle(r: t.RingBench, *tokens: int) -> dict[int, int]:
    """Run until these operations have ended; return their results."""
    results: dict[int, int] = {}
    while set(results) != set(tokens):
        r.enter(5_000_000_000)
        found = r.cqes()
        assert found, "no answer within five seconds"
        for kind, token, res in found:
            assert kind == t.CQE_OP
            if (result := r.op_done(token, res)) is not None:
                results[token] = result
    return results
