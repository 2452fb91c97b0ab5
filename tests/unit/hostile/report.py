"""How a check_* program says what it has done, also when compiled code ends it."""

from __future__ import annotations

import os
import sys
from collections import Counter
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, seed, settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# A half is what continuous integration has time for; what was then never met, `rounds` goes for.
MORE = float(os.environ.get("UBLK_UBI_EXAMPLES", "0.5"))
MAX_ROUNDS = 12

counts: Counter[str] = Counter()


def profile(examples: int, number: int = 0) -> Callable[..., object]:
    """The same examples in every run; UBLK_UBI_EXAMPLES=20 makes twenty times as many."""
    same = settings(
        max_examples=max(1, int(examples * MORE)), database=None, deadline=None,
        report_multiple_bugs=False, suppress_health_check=list(HealthCheck),
    )
    return lambda test: same(seed(number)(test))


def rounds(needed: set[str]) -> Iterator[int]:
    """Numbers for `profile`: one, and more while something was never met, so never checked."""
    for number in range(MAX_ROUNDS):
        yield number
        missing = sorted(needed - set(counts))
        if not missing:
            return
        counts[f"once more for {missing}"] += 1
    raise AssertionError(f"never met: {missing}")


class Last:
    """The case under way, for who is left when the process is not."""

    def __init__(self) -> None:
        self._fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)

    def note(self, what: object) -> None:
        text = repr(what).encode()
        os.pwrite(self._fd, text, 0)
        os.ftruncate(self._fd, len(text))


def finish() -> None:
    """Print what was met."""
    print(", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
