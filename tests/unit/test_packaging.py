"""`pip install .` from nothing gives the command; what is missing is named in one line."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = Path("cython/ublk_ubi")
LIMIT_S = 300


def run(*words: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("UBLK_UBI_", "PYTHON"))}
    return subprocess.run(words, cwd=cwd, env=kept | variables, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=LIMIT_S, check=False)


def setup_py(*words: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "setup.py", "--quiet", *words, cwd=cwd, **variables)


def product_files(folder: Path) -> set[str]:
    """The files that the product is built from, as a checkout has them."""
    found = {"setup.py", "pyproject.toml", "README.md", "LICENSE"}
    for pattern in (f"{SOURCES}/*.p[yx][xd]", f"{SOURCES}/*.h", "ublk_ubi/**/*.py*"):
        found |= {str(path.relative_to(folder)) for path in folder.glob(pattern)}
    return {name for name in found if "__pycache__" not in name}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout's files, with what building leaves between them."""
    folder = tmp_path_factory.mktemp("checkout")
    left_out = shutil.ignore_patterns("__pycache__", ".*", "build", "tests", "tools")
    shutil.copytree(ROOT, folder, ignore=left_out, dirs_exist_ok=True)
    (folder / SOURCES / "_queue.html").touch()
    return folder


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    done = setup_py("sdist", "--dist-dir", folder, cwd=checkout)
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    assert run("tar", "-xzf", archive, cwd=folder).returncode == 0
    return next(path for path in folder.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def installed(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh venv with the product, built from the distribution; a test build was there before."""
    for name in ("ublk_ubi/_testing.pyi", "ublk_ubi/_testing.so", "build/testing/lib/_testing.so"):
        (sdist / name).parent.mkdir(parents=True, exist_ok=True)
        (sdist / name).touch()
    venv = tmp_path_factory.mktemp("installed") / "venv"
    done = run(sys.executable, "-m", "venv", venv, cwd=Path("/"))
    assert done.returncode == 0, done.stderr
    # What the compiler makes of it is not looked at here, and takes long.
    compiler = venv / "quick-cc"
    compiler.write_text('#!/bin/bash\nexec gcc "${@/#-O2/-O0}"\n')
    compiler.chmod(0o755)
    # What it is built with is what the checkout is built with, not what has come out since.
    versions = venv / "versions"
    versions.write_text("".join(
        f"{found.name}=={found.version}\n" for found in importlib.metadata.distributions()
        if found.name in ("click", "msgspec", "setuptools")
    ))
    for left in (2, 1, 0):  # the index may be out of reach for a moment
        done = run(venv / "bin/pip", "install", "--quiet", ".", cwd=sdist, CC=str(compiler),
                   PIP_CONSTRAINT=str(versions))
        assert done.returncode == 0 or left, done.stdout + done.stderr
        if done.returncode == 0:
            break
    return venv


# -- what is there ---------------------------------------------------------------------------------


def test_the_source_distribution_has_what_it_takes_to_build(checkout: Path, sdist: Path) -> None:
    assert {name for name in product_files(checkout) if not (sdist / name).exists()} == set()
    assert len(list(sdist.glob(f"{SOURCES}/*.pyx"))) >= 8


def test_the_source_distribution_has_nothing_that_was_built(sdist: Path) -> None:
    built = re.compile(r"\.(c|html|o|pyc)$")
    names = [str(path.relative_to(sdist)) for path in sdist.rglob("*")]
    assert [name for name in names if built.search(name)] == []


def test_the_command(installed: Path) -> None:
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    done = run(installed / "bin/ublk-ubi", "--version", cwd=Path("/"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"ublk-ubi {version[1]}\n"


def test_every_module_is_there_but_the_tests_own(installed: Path) -> None:
    modules = {path.stem for path in (ROOT / SOURCES).glob("*.pyx")}
    modules = {f"ublk_ubi.{name}" for name in modules if not name.startswith("_testing")}
    modules |= {"ublk_ubi.cli", "ublk_ubi.daemon"}
    show = "import importlib as i, sys; [print(i.import_module(n).__file__) for n in sys.argv[1:]]"
    done = run(installed / "bin/python", "-I", "-c", show, *modules, cwd=Path("/"))
    assert done.returncode == 0, done.stderr
    (package,) = installed.glob("lib/python*/site-packages/ublk_ubi")
    for file in done.stdout.splitlines():
        assert Path(file).is_relative_to(package), file
    assert sum(file.endswith(".so") for file in done.stdout.splitlines()) == len(modules) - 2
    assert [path.name for path in package.rglob("*_testing*")] == []
    assert (package / "py.typed").exists()


def test_the_tests_own_module_is_built_apart(tmp_path: Path) -> None:
    """It must not lie where an installation builds: all that is there gets installed."""
    product = product_files(ROOT)
    for name in product:
        if name.endswith((".pxd", ".h", "_format.pyx")) or not name.startswith("cython"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / SOURCES / "_testing.pyx").write_text("")
    (tmp_path / SOURCES / "_testing.pxd").unlink(missing_ok=True)
    for variables in ({"UBLK_UBI_TEST": "1"}, {}):
        done = setup_py("build_ext", "--inplace", cwd=tmp_path, **variables)
        assert done.returncode == 0, done.stderr
    built = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.so")}
    built = {re.sub(r"/lib[^/]*|\.cpython[^/]*", "", name) for name in built}
    assert built == {"ublk_ubi/_format", "ublk_ubi/_testing", "build/ublk_ubi/_format",
                     "build/testing/ublk_ubi/_format", "build/testing/ublk_ubi/_testing"}


# -- what is missing -------------------------------------------------------------------------------


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_no_compiler(checkout: Path) -> None:
    assert one_line(setup_py("build", cwd=checkout, CC="/nonexistent/cc")) == (
        "ublk-ubi: no C compiler (/nonexistent/cc): install the package gcc, or set CC\n"
    )


@pytest.mark.parametrize(("header", "package"), [
    ("stdio.h", "libc6-dev"),
    ("Python.h", "python3-dev"),
    ("liburing.h", "liburing-dev (2.3 or later)"),
    ("linux/fs.h", "linux-libc-dev"),
])
def test_no_header(checkout: Path, tmp_path: Path, header: str, package: str) -> None:
    broken = tmp_path / header
    broken.parent.mkdir(exist_ok=True)
    broken.write_text("#error not there\n")
    assert one_line(setup_py("build", cwd=checkout, CC=f"gcc -I{tmp_path}")) == (
        f"ublk-ubi: the C header <{header}> is missing: install the package {package}\n"
    )


def test_an_old_liburing(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "liburing.h").write_text("struct io_uring { int fd; };\n")
    line = one_line(setup_py("build", cwd=checkout, CC=f"gcc -I{tmp_path}"))
    assert "older than 2.3" in line
    assert "liburing-dev" in line


def test_pip_shows_the_line(checkout: Path) -> None:
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps")
    done = run(*pip, "--target", "nowhere", ".", cwd=checkout, CC="/nonexistent/cc")
    assert done.returncode != 0
    assert "ublk-ubi: no C compiler (/nonexistent/cc): install the package gcc" in done.stderr
