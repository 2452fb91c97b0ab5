"""The user-mode kernel and the guest's init: found in the user's cache, or built into it.

    CACHE/kernel-VERSION-HASH/linux                     the kernel: an ordinary program
    CACHE/kernel-VERSION-HASH/config                    its .config
    CACHE/kernel-VERSION-HASH/include/linux/ublk_cmd.h  its ublk ABI, as user programs include it
    CACHE/kernel-VERSION-HASH/version                   its release and Debian's version
    CACHE/init-HASH                                     init.c, compiled
    CACHE/lock                                          held while building

HASH covers what we put in (configuration, edits of the source, recipe). A folder gets its name by
one rename when all of it is there, so what has the name is whole. A later call asks no network
whether something newer has come out: remove the folder to have the newest built.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import debian
from .errors import LabError

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "kernel.config"
INIT_SOURCE = HERE / "init.c"
RECIPE = b"1"  # raise it when the way of building changes what comes out

# Edits of the source: file, what stands there once, what is to stand there. A processor is a thread
# of this machine's, which may have fewer: one that spins keeps another from letting the lock go.
EDITS = (
    ("arch/x86/um/Kconfig", "\tselect ARCH_SUPPORTS_ATOMIC_RMW\n", ""),  # mutexes: SPIN_ON_OWNER
    (
        "arch/x86/um/asm/processor.h",
        '\t__asm__ __volatile__("pause": : :"memory");\n',
        "\textern int sched_yield(void);\n\n\tsched_yield();\n",
    ),
)

ESSENTIAL = ("BLK_DEV_UBLK", "BLK_DEV_UBD", "IO_URING", "HOSTFS", "SMP", "DEVTMPFS", "SSL", "TMPFS")
BUILD_BYTES = 3 << 30  # the unpacked source and what is compiled from it, for a while
INIT_FLAGS = ("-std=gnu11", "-Os", "-static", "-s", "-Wall", "-Wextra", "-Werror")

Report = Callable[[str], None]


class Stopped(BaseException):
    """A signal that ends the lab came in."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


@dataclass(frozen=True)
class Kernel:
    """A built kernel in the cache."""

    folder: Path

    @property
    def program(self) -> Path:
        """The kernel, an ordinary program."""
        return self.folder / "linux"

    @property
    def config(self) -> Path:
        """Its .config."""
        return self.folder / "config"

    @property
    def headers(self) -> Path:
        """What a compiler's -I needs for `#include <linux/ublk_cmd.h>`."""
        return self.folder / "include"

    @property
    def version(self) -> str:
        """Its release, and Debian's version of the source."""
        return (self.folder / "version").read_text().strip()


def cache_folder() -> Path:
    """Tell where built kernels are kept."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # XDG: a relative path is to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "ublk-ubi"


def configuration_hash() -> str:
    """Hash all that we put into a kernel."""
    what = RECIPE + repr(EDITS).encode() + CONFIG.read_bytes()
    return hashlib.sha256(what).hexdigest()[:12]


def find(cache: Path) -> Kernel | None:
    """Return the newest kernel in the cache that has our configuration."""
    found = list(cache.glob(f"kernel-*-{configuration_hash()}"))
    return Kernel(max(found, key=lambda path: _order(path.name))) if found else None


def _order(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def find_or_build(report: Report) -> Kernel:
    """Return the lab's kernel; of many callers that find none, one builds it."""
    cache = cache_folder()
    if kernel := find(cache):
        return kernel
    with building(cache, report):
        return find(cache) or _build(cache, report)


def find_or_build_init(report: Report) -> Path:
    """Return the guest's first process, compiled."""
    cache = cache_folder()
    stamp = hashlib.sha256(" ".join(INIT_FLAGS).encode() + INIT_SOURCE.read_bytes()).hexdigest()[
        :12
    ]
    program = cache / f"init-{stamp}"
    if program.exists():
        return program
    with building(cache, report):
        if not program.exists():
            _compile_init(cache, program, report)
    return program


@contextlib.contextmanager
def building(
    cache: Path, report: Report, name: str = "lock", stale: str = "build-*"
) -> Iterator[None]:
    """Hold the cache's lock, and clear away what a killed build has left."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = os.open(cache / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise LabError(
            f"cannot write the cache folder {cache}: {error.strerror}; set XDG_CACHE_HOME"
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("another call is building it: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in cache.glob(stale):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        os.close(lock)


def run_step(what: str, command: list[str], log: Path, cwd: Path) -> None:
    """Run one step of the build with nothing of the caller's environment that could bend it."""
    environment = {
        "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
        "HOME": "/nonexistent",
        "LC_ALL": "C",
        "KBUILD_BUILD_USER": "lab",
        "KBUILD_BUILD_HOST": "lab",
        "KBUILD_BUILD_VERSION": "1",
    }
    with log.open("ab") as output:
        output.write(f"$ {' '.join(command)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    try:
        process.wait()
    except BaseException:  # a signal to us ends the compilers, too
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if process.returncode:
        kept = log.parent.parent / "build.log"
        shutil.copyfile(log, kept)
        raise LabError(f"{what} failed: {_first_error(log)}; the whole log: {kept}")


def _first_error(log: Path) -> str:
    for line in log.read_text(errors="replace").splitlines():
        if re.search(r"error:|Error \d|undefined reference|No space left", line):
            return line.strip()
    return debian.last_line(log)


def _require_tools(log: Path, report: Report) -> None:
    if missing := debian.missing_packages():
        report(f"installing {' '.join(missing)}")
        debian.install(missing, log)
        if still := debian.missing_packages():
            names = " ".join(still)
            raise LabError(f"still missing after apt-get install: {names}; install them")


def _build(cache: Path, report: Report) -> Kernel:
    """Build into a temporary folder of the cache; only the finished whole gets its name."""
    if platform.machine() != "x86_64":
        raise LabError(f"the lab's kernel is for x86_64, this is {platform.machine()}: use another")
    if shutil.disk_usage(cache).free < BUILD_BYTES:
        raise LabError(f"building needs {BUILD_BYTES >> 30}G free in {cache}: set XDG_CACHE_HOME")
    started = time.monotonic()

    def phase(text: str) -> None:
        report(f"kernel, {time.monotonic() - started:3.0f} s: {text}")

    work = Path(tempfile.mkdtemp(prefix="build-", dir=cache))
    try:
        log = work / "log"
        log.touch()
        _require_tools(log, phase)
        phase(f"looking for the newest source in Debian's {debian.BACKPORTS}")
        archive = debian.Archive(work / "apt", log)
        package, version = archive.newest_kernel_source()
        phase(f"downloading and unpacking {package} {version}")
        source = archive.unpack_source(package, version, work / "source")
        phase("configuring")
        _edit(source, phase)
        _configure(source, log, phase)
        jobs = len(os.sched_getaffinity(0))
        phase(f"compiling with {jobs} jobs (some 8 minutes of processor time)")
        make = ["make", "ARCH=um", f"-j{jobs}"]
        run_step("building the kernel", [*make, "linux", "scripts_unifdef"], log, source)
        result = _collect(source, work / "result", version, log)
        folder = cache / f"kernel-{version}-{configuration_hash()}"
        result.rename(folder)
        (cache / "build.log").unlink(missing_ok=True)
        phase(f"done: {folder}")
        return Kernel(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _edit(source: Path, phase: Report) -> None:
    """Make the edits; a kernel that does not have what they replace is as good, but slow."""
    for name, old, new in EDITS:
        path = source / name
        text = path.read_text() if path.exists() else ""
        if text.count(old) == 1:
            path.write_text(text.replace(old, new))
        else:
            phase(f"note: {name} is not as expected: guests of several processors will be slow")


def _configure(source: Path, log: Path, phase: Report) -> None:
    """Write .config: nothing but what kernel.config asks for and what that needs."""
    make = ["make", "ARCH=um", f"KCONFIG_ALLCONFIG={CONFIG}", "allnoconfig"]
    run_step("configuring the kernel", make, log, source)
    have = set((source / ".config").read_text().splitlines())
    want = [line for line in CONFIG.read_text().splitlines() if line.startswith("CONFIG_")]
    missing = [line.partition("=")[0] for line in want if line not in have]
    if lost := sorted({f"CONFIG_{name}" for name in ESSENTIAL} & set(missing)):
        raise LabError(f"this kernel does not offer {' '.join(lost)}: see {CONFIG}")
    if missing:
        phase(f"note: this kernel does not offer {' '.join(missing)}")


def _collect(source: Path, result: Path, version: str, log: Path) -> Path:
    include = result / "include" / "linux"
    include.mkdir(parents=True)
    header = "include/uapi/linux/ublk_cmd.h"
    target = str(include / "ublk_cmd.h")
    run_step("installing ublk_cmd.h", ["scripts/headers_install.sh", header, target], log, source)
    run_step("stripping the kernel", ["strip", "-o", str(result / "linux"), "linux"], log, source)
    shutil.copyfile(source / ".config", result / "config")
    release = (source / "include/config/kernel.release").read_text().strip()
    (result / "version").write_text(f"{release} (Debian {version})\n")
    return result


def _compile_init(cache: Path, program: Path, report: Report) -> None:
    work = Path(tempfile.mkdtemp(prefix="build-", dir=cache))
    try:
        log = work / "log"
        log.touch()
        _require_tools(log, report)
        built = work / "init"
        command = ["gcc", *INIT_FLAGS, "-o", str(built), str(INIT_SOURCE)]
        run_step("compiling the guest's init", command, log, work)
        built.rename(program)
    finally:
        shutil.rmtree(work, ignore_errors=True)
