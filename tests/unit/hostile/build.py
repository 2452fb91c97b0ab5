"""The extension modules that hostile bytes reach, built with sanitizers by setup.py's own switch.

A build is a copy of what setup.py needs, so that neither the modules in the checkout nor the C
files beside their sources are touched. What has changed is compiled anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[3]
BUILDS = ROOT / "build" / "sanitized"
# The wrappers are full of Python's own calls, which UBSan takes very long to compile, and all of it
# is sooner compiled than it is fast. Sanitizers miss nothing for that.
COMPILER = '#!/bin/bash\nexec gcc "${@/#-O2/-O0}"\n'
GROUPS = {
    "engines": ("address,undefined", ("_format", "_hydrator", "_lifecycle", "_queue", "_ring")),
    "wrappers": ("address", ("_opener", "_testing")),
}
MAX_REPORT = 8000
SANITIZER_STATUS = 99


@dataclass(frozen=True)
class Change:
    """A planted bug: `old` stands exactly once in `file`."""

    file: str
    old: str
    new: str


def build(change: Change | None = None, folder: Path = BUILDS / "plain") -> Path:
    """Return a folder to be first on PYTHONPATH: the sources as they are, or with a planted bug.

    A planted bug is put into a folder of its user's: who comes next plants another.
    """
    with _locked():
        package = folder / "ublk_ubi"
        package.mkdir(parents=True, exist_ok=True)
        for name, (sanitizers, modules) in GROUPS.items():
            for path in _made(name, sanitizers, modules):
                _copy(path, package / path.name)
        if change is not None:
            module = change.file.partition(".")[0]
            name = next(name for name, (_, modules) in GROUPS.items() if module in modules)
            for path in _made(f"{name}-planted", GROUPS[name][0], (module,), change):
                _copy(path, package / path.name)
        for path in (ROOT / "ublk_ubi").glob("*.py"):
            _copy(path, package / path.name)
    return package.parent


def run(folder: Path, program: str, *words: str, timeout_s: float = 120.0) -> tuple[int, str]:
    """Run a check_* program against a build; return its status and all that it printed."""
    runtime = subprocess.run(
        ["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True,
    ).stdout.strip()
    environment = os.environ | {
        "LD_PRELOAD": runtime,
        # An arena of Python's own would hide what lies beside an object.
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": f"{folder}:{ROOT / 'tests'}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "ASAN_OPTIONS": f"detect_leaks=0:exitcode={SANITIZER_STATUS}:quarantine_size_mb=32",
        "UBSAN_OPTIONS": f"halt_on_error=1:print_stacktrace=1:exitcode={SANITIZER_STATUS}",
    }
    path = Path(__file__).parent / f"{program}.py"
    done = subprocess.run(
        # Where addresses are very random, AddressSanitizer finds no place for its shadow.
        ["setarch", "--addr-no-randomize", sys.executable, str(path), *words],
        env=environment, capture_output=True, text=True, errors="replace", timeout=timeout_s,
        check=False, cwd=folder,
    )
    return done.returncode, (done.stdout + done.stderr)[-MAX_REPORT:]


def _made(
    name: str, sanitizers: str, modules: tuple[str, ...], change: Change | None = None,
) -> list[Path]:
    """Run setup.py in a copy of what it needs; it compiles what has changed."""
    folder = BUILDS / name
    sources = _sources(modules)
    if change is not None:
        changed = f"cython/ublk_ubi/{change.file}"
        assert sources[changed].count(change.old) == 1, f"{change.file}: {change.old!r}"
        sources[changed] = sources[changed].replace(change.old, change.new)
    recipe = repr((sys.version, sanitizers, sources["setup.py"], COMPILER))
    if not _holds(folder / "recipe", recipe):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "cc").write_text(COMPILER)
        (folder / "cc").chmod(0o755)
    for path, text in sources.items():
        if not _holds(folder / path, text):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
    (folder / "ublk_ubi").mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "-j", str(os.cpu_count())],
        cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | {
            "CC": str(folder / "cc"), "UBLK_UBI_SANITIZE": sanitizers, "UBLK_UBI_TEST": "1",
        },
    )
    assert done.returncode == 0, f"no {name}:\n{(done.stdout + done.stderr)[-MAX_REPORT:]}"
    (folder / "recipe").write_text(recipe)
    return [next((folder / "ublk_ubi").glob(f"{module}.*.so")) for module in modules]


def _sources(modules: tuple[str, ...]) -> dict[str, str]:
    """What a build is made of, by path from the checkout."""
    paths = [ROOT / "setup.py", ROOT / "pyproject.toml"]
    paths += [
        path for path in sorted((ROOT / "cython" / "ublk_ubi").iterdir())
        if path.suffix in (".pxd", ".h") or (path.suffix == ".pyx" and path.stem in modules)
    ]
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths}


def _holds(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text


def _copy(source: Path, target: Path) -> None:
    """Copy what differs; a file in use keeps its content."""
    if not target.exists() or target.read_bytes() != source.read_bytes():
        new = target.with_suffix(".new")
        shutil.copyfile(source, new)
        new.rename(target)


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    BUILDS.mkdir(parents=True, exist_ok=True)
    with open(BUILDS / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
