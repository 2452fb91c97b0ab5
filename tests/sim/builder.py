"""Builds the engines and the simulator into a folder of their own, as they are or changed.

A planted bug is a replacement of text in an engine's source: the product carries no hook for it.
A build is keyed by everything that goes into it and made once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENGINE_SOURCES = ROOT / "cython" / "ublk_ubi"
SIM_SOURCES = ROOT / "tests" / "sim" / "ubi_sim"
ENGINES = ("_format", "_hydrator", "_lifecycle", "_queue")
SIMULATOR = ("_disk", "_oracle", "_machine", "_world", "_simulate")
DIRECTIVES = ["language_level=3", "boundscheck=False", "wraparound=False", "cdivision=True",
              "initializedcheck=False"]


@dataclass(frozen=True)
class Change:
    """One planted bug's text: `old` stands exactly once in `file`."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Variant:
    """What to build: changes to the engines, and flags of the C compiler."""

    changes: tuple[Change, ...] = ()
    flags: tuple[str, ...] = ("-O2",)


def folder_of_builds() -> Path:
    """Return where builds are kept: below the checkout, or where it cannot be written, beside it."""
    return Path(os.environ.get("UBLK_UBI_SIM_BUILDS") or ROOT / "build" / "sim")


def build(variant: Variant = Variant(), builds: Path | None = None) -> Path:  # noqa: B008
    """Return the folder of a variant's build, to be put first on PYTHONPATH."""
    builds = builds or folder_of_builds()
    sources = _sources(variant)
    key = hashlib.sha256(repr((variant.flags, sys.version, sorted(sources.items()))).encode())
    final = builds / key.hexdigest()[:16]
    if final.is_dir():
        return final
    work = builds / f".{key.hexdigest()[:16]}.{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)
    for name, text in sources.items():
        path = work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    names = [f"ublk_ubi/{name}" for name in ENGINES] + [f"ubi_sim/{name}" for name in SIMULATOR]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda name: _compile(work, name, variant.flags), names))
    try:
        work.rename(final)
    except OSError:
        shutil.rmtree(work)  # another process was faster
    return final


def _sources(variant: Variant) -> dict[str, str]:
    """Every source by its relative path, changed as the variant says."""
    sources = {"ublk_ubi/__init__.py": ""}
    for folder, package in ((ENGINE_SOURCES, "ublk_ubi"), (SIM_SOURCES, "ubi_sim")):
        for path in sorted(folder.iterdir()):
            if path.suffix in (".pyx", ".pxd", ".py", ".h") and not path.name.startswith("_testing"):
                sources[f"{package}/{path.name}"] = path.read_text()
    for change in variant.changes:
        name = f"ublk_ubi/{change.file}"
        if sources[name].count(change.old) != 1:
            raise ValueError(f"{change.file}: {sources[name].count(change.old)} times: {change.old!r}")
        sources[name] = sources[name].replace(change.old, change.new)
    return sources


def _compile(work: Path, name: str, flags: tuple[str, ...]) -> None:
    import sysconfig

    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    _run([sys.executable, "-m", "cython", *(f"-X{item}" for item in DIRECTIVES), "-3",
          "-I", ".", "--module-name", name.replace("/", "."), f"{name}.pyx"], work)
    _run([os.environ.get("CC", "gcc"), "-shared", "-fPIC", "-g", *flags, "-fno-strict-aliasing",
          f"-I{sysconfig.get_paths()['include']}", "-Iublk_ubi", f"{name}.c",
          "-o", f"{name}{suffix}"], work)


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    print(build())
