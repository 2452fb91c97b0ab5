"""What a process that serves disks sets right about itself. Each test has a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

from ublk_ubi import hygiene

if TYPE_CHECKING:
    import pytest


def run(body: str, **options: object) -> str:
    program = "import os, resource\nfrom ublk_ubi import hygiene\n" + textwrap.dedent(body)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        **options,  # type: ignore[call-overload]
    )
    return str(done.stdout)


def test_inherited_descriptors_are_closed() -> None:
    """… but those that are meant; and none of its own."""
    kept, lost = os.pipe()
    out = run(f"""
        own = os.open("/dev/null", os.O_RDONLY)
        hygiene.close_inherited([{kept}])
        print(sorted(set(map(int, os.listdir("/proc/self/fd"))) & {{0, 1, 2, {kept}, {lost}, own}})
              == sorted([0, 1, 2, {kept}, own]))
    """, pass_fds=(kept, lost))
    os.close(kept)
    os.close(lost)
    assert out == "True\n"


def test_what_is_set() -> None:
    """As far as this machine permits; what it does not, it says in a line each."""
    out = run("""
        notices = []
        hygiene.settle(notices.append, files=777)
        umask = os.umask(0)
        print(resource.getrlimit(resource.RLIMIT_NOFILE), oct(umask))
        print(open("/proc/self/oom_score_adj").read().strip())
        print(len(notices), *notices, sep="\\n")
    """)
    first, score, count, *notices = out.splitlines()
    assert first == "(777, 777) 0o77"
    assert len(notices) == int(count)
    refused = any("kill this process" in notice for notice in notices)
    assert score == ("0" if refused else "-1000") or (refused and int(score) > -1000)
    assert all(notice.startswith("not permitted here: ") for notice in notices)


def test_what_is_refused_is_told_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise PermissionError(1, "Operation not permitted")

    for name in ("_never_kill", "_flush_io", "_lock_limit"):
        monkeypatch.setattr(hygiene, name, refuse)
    monkeypatch.setattr(hygiene, "_files_limit", lambda _files: refuse())
    before = os.umask(0o077)
    notices: list[str] = []
    hygiene.settle(notices.append)
    os.umask(before)
    assert len(notices) == 4
    assert len({notice.split(":")[1] for notice in notices}) == 4


def test_what_is_locked_of_programs() -> None:
    maps = textwrap.dedent("""\
        00400000-00420000 r--p 00000000 08:01 11                    /usr/bin/python3.11
        00420000-006b4000 r-xp 00020000 08:01 11                    /usr/bin/python3.11
        008f0000-00a62000 rw-p 004ef000 08:01 11                    /usr/bin/python3.11
        01d9d000-01e6c000 rw-p 00000000 00:00 0                     [heap]
        7f0000000000-7f0000200000 r--s 00000000 08:01 12            /usr/lib/locale/locale-archive
        7f0000300000-7f0000301000 r--p 00000000 08:01 13            /usr/lib/with a space.so
        7f0000301000-7f0000302000 r-xp 00001000 08:01 13            /usr/lib/with a space.so
        7ffd8a1f0000-7ffd8a1f2000 r-xp 00000000 00:00 0             [vdso]
    """)
    assert hygiene._text(maps) == [
        (0x00400000, 0x20000), (0x00420000, 0x294000),
        (0x7F0000300000, 0x1000), (0x7F0000301000, 0x1000),
    ]


def test_memory_is_locked_and_costs_what_is_touched() -> None:
    """A buffer that is never used must not be had: a disk reserves 128 MiB of them."""
    out = run("""
        import mmap
        hygiene.settle(lambda _: None)
        big = mmap.mmap(-1, 256 << 20)
        hygiene.lock_memory()
        more = mmap.mmap(-1, 256 << 20)
        print(open("/proc/self/status").read())
    """)
    sizes = {name: int(kb) for name, kb in re.findall(r"^(\w+):\s+(\d+) kB$", out, re.MULTILINE)}
    assert sizes["VmLck"] > 512 << 10
    assert sizes["VmRSS"] < 64 << 10
