"""The figure that `status` gives for a daemon's memory, of a process that we know."""

from __future__ import annotations

import builtins
import ctypes
import mmap
from typing import Any

import pytest

from ublk_ubi.kernel_calls import mlock
from ublk_ubi.memory import own_bytes

SIZE = 32 << 20


def touched() -> mmap.mmap:
    area = mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for offset in range(0, SIZE, mmap.PAGESIZE):
        area[offset] = 1
    return area


def test_private_memory_counts() -> None:
    before = own_bytes()
    area = touched()
    after = own_bytes()
    area.close()
    assert before is not None
    assert after is not None
    assert SIZE - (1 << 20) <= after - before <= SIZE + (4 << 20)


def test_what_is_not_touched_does_not(tmp_path: Any) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    before = own_bytes()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[offset] for offset in range(0, SIZE, mmap.PAGESIZE)) == 0
        with mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS):
            after = own_bytes()
    assert before is not None
    assert after is not None
    assert after - before < 4 << 20


def test_what_is_private_and_locked_counts_once() -> None:
    before = own_bytes()
    area = touched()
    locked = ctypes.addressof(ctypes.c_char.from_buffer(area))
    mlock(locked, SIZE)
    after = own_bytes()
    assert before is not None
    assert after is not None
    assert SIZE - (1 << 20) <= after - before <= SIZE + (4 << 20)


def test_a_locked_file_counts(tmp_path: Any) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        before = own_bytes()
        mlock(ctypes.addressof(ctypes.c_char.from_buffer(mapped)), SIZE)
        after = own_bytes()
    assert before is not None
    assert after is not None
    assert SIZE - (1 << 20) <= after - before <= SIZE + (4 << 20)


@pytest.mark.parametrize("text", [
    b"", b"Anonymous:\tmuch kB\nVmFlags: rd\n", b"Anonymous:\nVmFlags: rd\n", b"VmFlags: rd\n",
])
def test_where_proc_does_not_tell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, text: bytes,
) -> None:
    (tmp_path / "smaps").write_bytes(text)
    real = builtins.open
    monkeypatch.setattr(builtins, "open", lambda _path, mode: real(tmp_path / "smaps", mode))
    assert own_bytes() is None


def test_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_args: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory", "/proc/self/smaps")

    monkeypatch.setattr(builtins, "open", missing)
    assert own_bytes() is None
