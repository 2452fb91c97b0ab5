"""Cython's C of the data plane's threads, as it is or with a planted bug, linked with a harness."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent
SOURCES = ROOT / "cython" / "ublk_ubi"
BUILDS = ROOT / "build" / "threads"
DIRECTIVES = ("language_level=3", "boundscheck=False", "wraparound=False", "cdivision=True",
              "initializedcheck=False")
# What a program is made of: files here, and the module whose C each of them includes.
PROGRAMS = {
    "world": {"world.c": "_threads", "queue.c": "_queue", "hydrator.c": "_hydrator",
              "format.c": "_format"},
    "order": {"order.c": "_threads"},
    "pace": {"pace.c": "_threads"},
}
# Sections that nobody needs are dropped, and with them all that calls Python.
FLAGS = {
    "world": ["-O1", "-fsanitize=thread", "-Wno-tsan"],
    "order": ["-O2"],
    "pace": ["-O1"],
}
COMMON = ["-g1", "-std=gnu11", "-w", "-fno-strict-aliasing", "-ffunction-sections",
          "-fdata-sections", "-fno-pie"]


@dataclass(frozen=True)
class Change:
    """A planted bug: `old` stands exactly once in `file`."""

    file: str
    old: str
    new: str


def plain(program: str) -> Path:
    """The program of the sources as they are, kept between runs."""
    BUILDS.mkdir(parents=True, exist_ok=True)
    with open(BUILDS / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return _build(program, BUILDS / "plain", _sources(None))


def planted(program: str, folder: Path, change: Change) -> Path:
    """The program with a planted bug, in `folder`."""
    generated = plain(program).parent / "ublk_ubi"
    (folder / "ublk_ubi").mkdir(parents=True)
    for module in PROGRAMS[program].values():
        if change.file.endswith(".pyx") and change.file != f"{module}.pyx":
            shutil.copyfile(generated / f"{module}.c", folder / "ublk_ubi" / f"{module}.c")
    if change.file.endswith(".pyx"):
        # What includes no C of that module is as it was.
        for name, module in PROGRAMS[program].items():
            if change.file != f"{module}.pyx":
                shutil.copyfile(generated.parent / f"{program}-{name}.o",
                                folder / f"{program}-{name}.o")
    return _build(program, folder, _sources(change))


def _build(program: str, folder: Path, sources: dict[str, str]) -> Path:
    """Generate what C is not there, compile, link; or find that all is as it was."""
    package = folder / "ublk_ubi"
    target = folder / program
    package.mkdir(parents=True, exist_ok=True)
    harness = [path.read_text() for path in sorted(HERE.iterdir()) if path.suffix in (".c", ".h")]
    recipe = repr((sys.version, COMMON, FLAGS, sources))
    old = (folder / "recipe").exists()
    if _put(folder / "recipe", recipe) and old:
        for path in package.glob("*.c"):
            path.unlink()
    for name, text in sources.items():
        _put(package / name, text)
    known = (folder / f"{program}.recipe").exists()
    if not _put(folder / f"{program}.recipe", repr((recipe, harness))) and target.exists():
        return target
    target.unlink(missing_ok=True)
    for path in folder.glob(f"{program}-*.o") if known else ():
        path.unlink()
    parts = PROGRAMS[program]
    for module in parts.values():
        if not (package / f"{module}.c").exists():
            _run([sys.executable, "-m", "cython", *(f"-X{item}" for item in DIRECTIVES), "-3",
                  "-I", ".", "--module-name", f"ublk_ubi.{module}", f"ublk_ubi/{module}.pyx"],
                 folder)
    include = sysconfig.get_paths()["include"]
    objects = {name: folder / f"{program}-{name}.o" for name in parts}
    for name, path in objects.items():
        if not path.exists():
            _run(["gcc", "-c", *COMMON, *FLAGS[program], f"-I{include}", f"-I{package}",
                  f"-I{HERE}", str(HERE / name), "-o", str(path)], folder)
    _run(["gcc", *COMMON, *FLAGS[program], *map(str, objects.values()), "-Wl,--gc-sections",
          "-no-pie", "-luring", "-lpthread", "-o", str(target)], folder)
    return target


def run(path: Path, *words: str, timeout_s: float = 120.0) -> tuple[int, str]:
    """Run a program; its status, and what it printed."""
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1:exitcode=66:report_thread_leaks=0"}
    # Where addresses are very random, ThreadSanitizer finds no place for its shadow.
    done = subprocess.run(
        ["setarch", "--addr-no-randomize", str(path), *words], env=environment,
        capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False,
    )
    return done.returncode, done.stdout + done.stderr[:20000]


def _sources(change: Change | None) -> dict[str, str]:
    """What Cython reads, with the bug in it."""
    sources = {path.name: path.read_text() for path in sorted(SOURCES.iterdir())
               if path.suffix in (".pyx", ".pxd", ".h")}
    if change is not None:
        count = sources[change.file].count(change.old)
        assert count == 1, f"{change.file}: {count} × {change.old!r}"
        sources[change.file] = sources[change.file].replace(change.old, change.new)
    return sources | {"__init__.py": ""}


def _put(path: Path, text: str) -> bool:
    """Write what differs; tell whether it did."""
    if path.exists() and path.read_text() == text:
        return False
    path.write_text(text)
    return True


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}:\n{(done.stdout + done.stderr)[-6000:]}"
