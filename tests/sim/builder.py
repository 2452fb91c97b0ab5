"""Builds the engines and the simulator into a folder of their own, as they are or changed.

A planted bug is a replacement of text in an engine's source: the product carries no hook for it.
Each module is built once for everything that goes into it and kept; a variant is a folder of links.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENGINE_SOURCES = ROOT / "cython" / "ublk_ubi"
SIM_SOURCES = ROOT / "tests" / "sim" / "ubi_sim"
ENGINES = ("_format", "_hydrator", "_lifecycle", "_queue")
SIMULATOR = (
    "_disk", "_oracle", "_trace", "_coverage", "_io", "_machine", "_host", "_events", "_daemon",
    "_mistakes", "_world", "_explore", "_simulate",
)
MODULES = tuple(f"ublk_ubi/{name}" for name in ENGINES) + tuple(
    f"ubi_sim/{name}" for name in SIMULATOR
)
RECIPE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
DIRECTIVES = ("language_level=3", "boundscheck=False", "wraparound=False", "cdivision=True",
              "initializedcheck=False")


@dataclass(frozen=True)
class Change:
    """One planted bug's text: `old` stands exactly once in `file`, an engine's .pyx."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Variant:
    """What to build: changes to the engines; with `lines`, so that gcov counts the engines' lines."""  # noqa: E501

    changes: tuple[Change, ...] = ()
    lines: bool = False


@dataclass(frozen=True)
class Build:
    """A variant's folder, to be put first on PYTHONPATH, and where each module was made."""

    folder: Path
    modules: dict[str, Path]


def folder_of_builds() -> Path:
    """Return where builds are kept: below the checkout, unless the environment says otherwise."""
    return Path(os.environ.get("UBLK_UBI_SIM_BUILDS") or ROOT / "build" / "sim")


def build(variant: Variant = Variant(), builds: Path | None = None) -> Build:  # noqa: B008, RUF100
    """Build what is not there yet. Raises ValueError for a change that fits nowhere."""
    builds = builds or folder_of_builds()
    shared = _shared_sources()
    texts = {name: _module_text(name, variant.changes) for name in MODULES}
    _check_used(variant.changes)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = dict(zip(MODULES, pool.map(
            lambda name: _module(name, texts[name], shared, lines=variant.lines, builds=builds),
            MODULES,
        ), strict=True))
    folder = builds / "variants" / _key(sorted(made.items()))
    if not folder.is_dir():
        _link(folder, made)
    return Build(folder, made)


def _key(what: object) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def _shared_sources() -> dict[str, str]:
    """What any module may include, by relative path."""
    sources = {}
    for folder, package in ((ENGINE_SOURCES, "ublk_ubi"), (SIM_SOURCES, "ubi_sim")):
        for path in sorted(folder.iterdir()):
            if path.suffix in (".pxd", ".h") and not path.name.startswith("_testing"):
                sources[f"{package}/{path.name}"] = path.read_text()
    return sources


def _module_text(name: str, changes: tuple[Change, ...]) -> str:
    """Return a module's source, changed."""
    package, _, module = name.partition("/")
    folder = ENGINE_SOURCES if package == "ublk_ubi" else SIM_SOURCES
    text = (folder / f"{module}.pyx").read_text()
    for change in changes:
        if package == "ublk_ubi" and change.file == f"{module}.pyx":
            if text.count(change.old) != 1:
                raise ValueError(f"{change.file}: {text.count(change.old)} times: {change.old!r}")
            text = text.replace(change.old, change.new)
    return text


def _check_used(changes: tuple[Change, ...]) -> None:
    for change in changes:
        if change.file.removesuffix(".pyx") not in ENGINES:
            raise ValueError(f"{change.file} is no engine")


def _module(name: str, text: str, shared: dict[str, str], *, lines: bool, builds: Path) -> Path:
    """Build one module; return its folder."""
    # An engine's module sees nothing of the simulator.
    package = name.partition("/")[0]
    needed = {path: source for path, source in shared.items()
              if package == "ubi_sim" or path.startswith("ublk_ubi/")}
    flags = ("-O0", "--coverage") if lines and package == "ublk_ubi" else ("-O1",)
    final = builds / "modules" / _key((name, text, flags, RECIPE, sys.version,
                                       sorted(needed.items())))
    if final.is_dir():
        return final
    work = _work_folder(final)
    for path, source in (*needed.items(), (f"{name}.pyx", text)):
        (work / path).parent.mkdir(parents=True, exist_ok=True)
        (work / path).write_text(source)
    _compile(work, name, flags)
    _put_in_place(work, final)
    return final


def _work_folder(final: Path) -> Path:
    """Make a folder of our own beside `final`."""
    final.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=".", dir=final.parent))


def _put_in_place(work: Path, final: Path) -> None:
    try:
        work.rename(final)
    except OSError:
        shutil.rmtree(work)  # another was faster


def _compile(work: Path, name: str, flags: tuple[str, ...]) -> None:
    """Make `name`.so, and beside it what gcov needs."""
    _run([sys.executable, "-m", "cython", *(f"-X{item}" for item in DIRECTIVES), "-3", "-I", ".",
          "--module-name", name.replace("/", "."), f"{name}.pyx"], work)
    include = sysconfig.get_paths()["include"]
    compiler = os.environ.get("CC", "gcc")
    _run([compiler, "-c", "-fPIC", *flags, "-fno-strict-aliasing", f"-I{include}",
          "-Iublk_ubi", f"{name}.c", "-o", f"{name}.o"], work)
    _run([compiler, "-shared", *flags, f"{name}.o", "-o", f"{name}.so"], work)


def _link(folder: Path, made: dict[str, Path]) -> None:
    """Make a variant's folder: packages of links to the modules."""
    work = _work_folder(folder)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for name, module in made.items():
        link = work / f"{name}{suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        (link.parent / "__init__.py").touch()
        link.symlink_to(module / f"{name}.so")
    _put_in_place(work, folder)


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    print(build().folder)
