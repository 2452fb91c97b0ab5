"""The checkout's style as a test: what a reader may rely on, and what no file may have."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINES_MAX = 650
LINES_MAX_TESTS = 800              # lists of cases: longer, but nothing to keep in mind
TEXT = (".py", ".pyi", ".pyx", ".pxd", ".c", ".h", ".sh", ".toml", ".md", ".config", ".in", "",
        ".service", ".target", ".rules", ".conf", ".json")
CODE = (".py", ".pyi", ".pyx", ".pxd", ".c", ".h", ".sh", "")

# What would tie the project to the machine that it was written on, or to one package registry.
# (Written so that the patterns do not find themselves.)
MACHINE = re.compile(r"(?<![\w.})])/(work|root)\b|\bshared/[a-z]+\.md|pypi\.(org|io)|[p]ythonhost")
UNDONE = re.compile(r"\b(TO[D]O|FIX[M]E|XX[X])\b")


def git(*words: str) -> list[str]:
    command = ["git", "-c", "safe.directory=*", *words]  # whoever owns the checkout
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"git {words[0]}: {done.stderr} (this test needs a git checkout)")
    return done.stdout.split("\0")[:-1]


def files() -> list[str]:
    """All files of the project, also those that are not in git yet."""
    names = git("ls-files", "-z", "--cached", "--others", "--exclude-standard")
    return [name for name in names if (ROOT / name).is_file()]


def text_of(name: str) -> str:
    return (ROOT / name).read_text()


ALL = files()
TEXTS = [name for name in ALL if Path(name).suffix in TEXT and not Path(name).is_symlink()]


def test_there_are_files() -> None:
    assert len(TEXTS) > 50
    assert {"setup.py", "tools/lab", "tests/conftest.py"} <= set(TEXTS)


def test_every_pyx_has_its_pxd() -> None:
    modules = sorted((ROOT / "cython" / "ublk_ubi").glob("*.pyx"))
    assert modules
    assert [path.name for path in modules if not path.with_suffix(".pxd").exists()] == []


def test_every_file_says_what_it_is_for() -> None:
    """A docstring, or a comment, comes first."""
    first = {}
    for name in TEXTS:
        if Path(name).suffix in CODE and (text := text_of(name)):
            lines = [line for line in text.splitlines() if not line.startswith("#!")]
            first[name] = lines[0]
    says = ('"""', 'r"""', "#", "/*", "//")
    ignored = (".gitignore", "LICENSE")
    silent = [name for name, line in first.items() if not line.startswith(says)]
    assert [name for name in silent if Path(name).name not in ignored] == []


def test_no_file_is_too_long_to_be_read() -> None:
    long = {}
    for name in TEXTS:
        lines = text_of(name).count("\n")
        of_tests = name.startswith("tests/") or "/_testing" in name
        if lines > (LINES_MAX_TESTS if of_tests else LINES_MAX):
            long[name] = lines
    assert long == {}


@pytest.mark.parametrize("pattern", [MACHINE, UNDONE], ids=["of a machine", "left undone"])
def test_no_file_has_words(pattern: re.Pattern[str]) -> None:
    found = [f"{name}:{number}: {line.strip()}" for name in TEXTS
             for number, line in enumerate(text_of(name).splitlines(), 1) if pattern.search(line)]
    assert found == []


def test_all_text_is_in_files_that_are_looked_at() -> None:
    assert [name for name in ALL if name not in TEXTS and (ROOT / name).stat().st_size] == []


def programs() -> list[str]:
    """What a person runs."""
    return [name for name in ALL if name.startswith("tools/") and name.count("/") == 1
            and "." not in name]


def test_there_are_programs() -> None:
    assert {"tools/lab", "tools/test"} <= set(programs())


@pytest.mark.parametrize("name", programs())
def test_a_program_explains_itself(name: str) -> None:
    assert os.stat(ROOT / name).st_mode & stat.S_IXUSR
    done = subprocess.run([ROOT / name, "--help"], cwd="/", capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(name).name in done.stdout
    assert "usage" in done.stdout.lower()


def test_only_programs_are_executable() -> None:
    expected = {*programs(), ".ci/run"}
    assert {name for name in ALL if os.stat(ROOT / name).st_mode & stat.S_IXUSR} == expected


def test_continuous_integration_runs_everything() -> None:
    lines = [line for line in text_of(".ci/run").splitlines() if not line.startswith("#")]
    assert len(lines) == 1
    assert "tools/test" in lines[0]
    assert "--no-skips" in lines[0]
    assert re.search(r" -[km]\b|--deselect|--ignore| tests/", lines[0]) is None


def test_tests_of_devices_run_in_the_lab(pytestconfig: pytest.Config) -> None:
    """The plugin is there, and guards what is collected."""
    folders = pytestconfig.getini("lab_folders")
    assert [str(path.relative_to(ROOT)) for path in folders] == ["tests/device", "tests/e2e"]
    assert pytestconfig.pluginmanager.has_plugin("lab-guard")
