"""One build of the ring with all planted bugs in it, of which a number chooses one or none."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from unit.ring.mutants import Mutant

ROOT = Path(__file__).resolve().parents[3]
SOURCES = ROOT / "cython" / "ublk_ubi"
DIRECTIVES = ("boundscheck=False", "wraparound=False", "cdivision=True", "initializedcheck=False")
FIRST_FUNCTION = "\ncdef int ring_init("
CHOICE = """
cdef int planted = 0
"""
CHOOSE = """

def plant(int number):
    global planted
    planted = number
"""


def build(folder: Path, mutants: Sequence[Mutant]) -> Path:
    """Return a folder to be first on sys.path: the checkout's package with another ring."""
    package = folder / "ublk_ubi"
    sources = folder / "sources" / "ublk_ubi"
    package.mkdir()
    sources.mkdir(parents=True)
    for path in SOURCES.iterdir():
        if path.suffix in (".pxd", ".h"):
            (sources / path.name).symlink_to(path)
    (sources / "__init__.py").touch()
    (sources / "_ring.pyx").write_text(planted((SOURCES / "_ring.pyx").read_text(), mutants))
    for path in (ROOT / "ublk_ubi").iterdir():
        if path.suffix in (".py", ".so") and not path.name.startswith("_ring."):
            (package / path.name).symlink_to(path)
    module = package / f"_ring{sysconfig.get_config_var('EXT_SUFFIX')}"
    _run([sys.executable, "-m", "cython", "-3", *(f"-X{item}" for item in DIRECTIVES), "-I", ".",
          "--module-name", "ublk_ubi._ring", "ublk_ubi/_ring.pyx"], sources.parent)
    _run(["gcc", "-g", "-O1", "-w", "-shared", "-fPIC", "-std=gnu11", "-fno-strict-aliasing",
          f"-I{sysconfig.get_paths()['include']}", "-Iublk_ubi", "ublk_ubi/_ring.c", "-luring",
          "-o", str(module)], sources.parent)
    return folder


def planted(text: str, mutants: Sequence[Mutant]) -> str:
    """The source in which the variable `planted` chooses a mutant by its place, from 1."""
    head, start, body = text.partition(FIRST_FUNCTION)
    assert start, "the ring's source begins with ring_init"
    groups: dict[str, dict[int, str]] = {}
    for number, mutant in enumerate(mutants, 1):
        groups.setdefault(mutant.old, {})[number] = mutant.new
    missing = [old for old in groups if old not in body]
    assert not missing, f"not in _ring.pyx any more, change its mutants, too: {missing}"
    # Whole lines before the expressions in them.
    for old, new in sorted(groups.items(), key=lambda item: -len(item[0])):
        body = _choices(body, old, new)
    return head + CHOICE + start + body + CHOOSE


def _choices(text: str, old: str, new: dict[int, str]) -> str:
    """Replace a line as a statement or a condition, anything else as an expression."""
    lines = []
    for line in text.splitlines():
        margin = line[: len(line) - len(line.lstrip())]
        if line.strip() != old:
            lines.append(line.replace(old, _expression(old, new)))
        elif old.startswith("if ") and old.endswith(":"):
            chosen = [f"planted == {number} and ({other[3:-1]})" for number, other in new.items()]
            none = " and ".join(f"planted != {number}" for number in new)
            lines.append(f"{margin}if {' or '.join(chosen)} or {none} and ({old[3:-1]}):")
        else:
            word = "if"
            for number, other in new.items():
                lines += [f"{margin}{word} planted == {number}:", f"{margin}    {other}"]
                word = "elif"
            lines += [f"{margin}else:", f"{margin}    {old}"]
    return "\n".join(lines) + "\n"


def _expression(old: str, new: dict[int, str]) -> str:
    chain = "".join(f"({other}) if planted == {number} else " for number, other in new.items())
    return f"({chain}({old}))"


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}:\n{(done.stdout + done.stderr)[-4000:]}"
