"""Builds the data plane (cython/ublk_ubi/*.pyx) against the system's liburing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup

HERE = Path(__file__).resolve().parent
SOURCES = Path("cython/ublk_ubi")
# Modules that only tests need are built on request, and where no installation looks.
TESTING = bool(os.environ.get("UBLK_UBI_TEST"))
TESTING_PREFIX = "_testing"
# gcov shall count lines of the .pyx: such C has #line in it, and lies elsewhere than other builds'.
COVERAGE = bool(os.environ.get("UBLK_UBI_COVERAGE"))

# What a missing header means in Debian's words; those that others include come first.
NEEDED_HEADERS = {
    "stdio.h": "libc6-dev",
    "linux/fs.h": "linux-libc-dev",
    "Python.h": "python3-dev",
    "liburing.h": "liburing-dev (2.3 or later)",
}


def fail(message: str) -> None:
    """End the build with one line."""
    sys.exit(f"ublk-ubi: {message}")


def check_toolchain() -> None:
    """Name the package to install when the compiler, a header or the library is missing."""
    import sysconfig

    compiler = os.environ.get("CC", "gcc").split()
    if shutil.which(compiler[0]) is None:
        fail(f"no C compiler ({compiler[0]}): install the package gcc, or set CC")
    include = f"-I{sysconfig.get_paths()['include']}"
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.c")
        for header, package in NEEDED_HEADERS.items():
            probe.write_text(f"#include <{header}>\n")
            command = [*compiler, include, "-fsyntax-only", str(probe)]
            if subprocess.run(command, capture_output=True, check=False).returncode:
                fail(f"the C header <{header}> is missing: install the package {package}")
        # io_uring_get_events and IORING_SETUP_DEFER_TASKRUN came with 2.3
        probe.write_text(
            "#include <liburing.h>\n"
            "int main(void){struct io_uring r;\n"
            "return IORING_SETUP_DEFER_TASKRUN == 0 || io_uring_get_events(&r);}\n",
        )
        command = [*compiler, str(probe), "-luring", "-o", str(Path(folder, "probe"))]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            fail("liburing is older than 2.3 or not linkable: install liburing-dev 2.3 or later")


def extensions() -> list[Extension]:
    """One extension module a .pyx; all share the flags below."""
    flags = ["-O2", "-g", "-std=gnu11", "-Wall", "-Wextra", "-Wno-unused-parameter",
             "-Wno-cast-function-type", "-Wno-missing-field-initializers", "-fno-strict-aliasing"]
    if (HERE / ".git").exists():
        flags.append("-Werror")
    link: list[str] = []
    macros: list[tuple[str, str | None]] = []
    if sanitizer := os.environ.get("UBLK_UBI_SANITIZE"):
        flags += [f"-fsanitize={sanitizer}", "-fno-omit-frame-pointer"]
        link += [f"-fsanitize={sanitizer}"]
    if COVERAGE:
        flags += ["--coverage", "-O0"]
        link += ["--coverage"]
    return [
        Extension(
            f"ublk_ubi.{source.stem}",
            [str(SOURCES / source.name)],
            include_dirs=[str(SOURCES)],
            libraries=["uring"],
            extra_compile_args=flags,
            extra_link_args=link,
            define_macros=macros,
        )
        for source in sorted((HERE / SOURCES).glob("*.pyx"))
        if TESTING or not source.stem.startswith(TESTING_PREFIX)
    ]


check_toolchain()
try:
    from Cython.Build import cythonize
except ImportError:
    fail("Cython is missing: build with `pip install .`, which fetches the pinned version")

setup(
    options={"build": {"build_base": "build/testing"}} if TESTING else {},
    packages=["ublk_ubi", "ublk_ubi.cli", "ublk_ubi.serve"],
    package_data={"ublk_ubi": ["py.typed", "*.pyi", "host/*"]},
    exclude_package_data={"ublk_ubi": [f"{TESTING_PREFIX}*"]},
    ext_modules=cythonize(
        extensions(),
        include_path=["cython"],
        annotate=bool(os.environ.get("UBLK_UBI_ANNOTATE")) and not COVERAGE,
        emit_linenums=COVERAGE,
        build_dir="build/coverage" if COVERAGE else None,
        compiler_directives={
            "language_level": "3",
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
            "embedsignature": False,
        },
    ),
)
