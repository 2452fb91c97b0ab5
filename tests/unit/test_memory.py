"""The figure that `status` gives for a daemon's memory, of a process that we know."""

from __future__ import annotations

import builtins
import mmap
from typing import Any

import pytest

from ublk_ubi.memory import private_bytes

SIZE = 32 << 20


def touched(flags: int) -> mmap.mmap:
    area = mmap.mmap(-1, SIZE, flags)
    for offset in range(0, SIZE, mmap.PAGESIZE):
        area[offset] = 1
    return area


@pytest.mark.parametrize("flags", [mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
                                   mmap.MAP_SHARED | mmap.MAP_ANONYMOUS])
def test_private_and_shared_memory_count(flags: int) -> None:
    before = private_bytes()
    area = touched(flags)
    after = private_bytes()
    area.close()
    assert before is not None
    assert after is not None
    assert SIZE - (1 << 20) <= after - before <= SIZE + (4 << 20)


def test_what_is_not_touched_does_not(tmp_path: Any) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    before = private_bytes()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[offset] for offset in range(0, SIZE, mmap.PAGESIZE)) == 0
        with mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS):
            after = private_bytes()
    assert before is not None
    assert after is not None
    assert after - before < 4 << 20


@pytest.mark.parametrize("text", [b"", b"RssAnon:\tmuch kB\n", b"RssAnon:\n", b"Name:\tx\n"])
def test_where_proc_does_not_tell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, text: bytes,
) -> None:
    (tmp_path / "status").write_bytes(text)
    real = builtins.open
    monkeypatch.setattr(builtins, "open", lambda _path, mode: real(tmp_path / "status", mode))
    assert private_bytes() is None


def test_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_args: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory", "/proc/self/status")

    monkeypatch.setattr(builtins, "open", missing)
    assert private_bytes() is None
