"""The kernel selftests' own server, kublk: found in the user's cache, or built for measuring.

    CACHE/kublk-VERSION     the program; VERSION is Debian's of the kernel source

Its source is GPL code of the kernel's, which is fetched from Debian's archive as the lab's kernel
is, and never gets near this repository. It needs newer headers than a release may have: those of
the same kernel, and liburing's of Debian stable, which is linked in, as the guest has an older one.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from labkit import debian
from labkit.errors import LabError
from labkit.kernel import building, cache_folder, run_step

if TYPE_CHECKING:
    from labkit.kernel import Report

FOLDER = "tools/testing/selftests/ublk"
PREFIX = "kublk-"
BUILD_PREFIX = "bench-build-"
FLAGS = ("-D_GNU_SOURCE", "-O3", "-Wl,-no-as-needed", "-pthread")  # as its own Makefile has them
APART = "metadata_size.c"          # another program


def find(cache: Path) -> Path | None:
    """Return the newest in the cache."""
    found = sorted(cache.glob(f"{PREFIX}*"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def find_or_build(report: Report) -> Path:
    """Return the program. Raises LabError: it cannot be had, and why."""
    cache = cache_folder()
    if program := find(cache):
        return program
    with building(cache, report, "kublk.lock", f"{BUILD_PREFIX}*"):
        return find(cache) or _build(cache, report)


def _build(cache: Path, report: Report) -> Path:
    work = Path(tempfile.mkdtemp(prefix=BUILD_PREFIX, dir=cache))
    try:
        log = work / "log"
        log.touch()
        report("kublk: fetching its source and headers")
        newest = debian.Archive(work / "newest", log, debian.BACKPORTS)
        package, version = newest.newest_kernel_source()
        source = newest.unpack_source(package, version, work / "source", only=f"*/{FOLDER}/*")
        newest.unpack(["linux-libc-dev"], work / "headers")
        stable = debian.Archive(work / "stable", log, debian.STABLE)
        stable.update()
        stable.unpack(["liburing-dev"], work / "uring")
        report("kublk: compiling")
        _compile(source / FOLDER, work, log)
        program = cache / f"{PREFIX}{version}"
        (work / "kublk").rename(program)
    except subprocess.CalledProcessError as error:
        raise LabError(f"{error.cmd[0]} failed: {debian.last_line(log)}") from error
    else:
        return program
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _compile(source: Path, work: Path, log: Path) -> None:
    include, uring = work / "headers/usr/include", work / "uring/usr"
    library = next(uring.rglob("liburing.a"))
    triplet = library.parent.name
    files = sorted(str(path) for path in source.glob("*.c") if path.name != APART)
    command = ["gcc", *FLAGS, "-I", str(include), "-I", str(include / triplet),
               "-I", str(uring / "include"), "-o", str(work / "kublk"), *files, str(library),
               "-lm"]  # fmt: skip
    run_step("compiling kublk", command, log, work)
