"""What the guest runs, in one archive: our package as it is installed, and kublk.

The guest unpacks it into memory. What it read from the host's folders instead would cost it as many
instructions as its clock runs on while it waits.
"""

from __future__ import annotations

import io
import re
import sys
import tarfile
import tomllib
from importlib.metadata import distribution
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
PLACE = "/tmp/bench"               # as servers.py knows it
VERSION = f"python{sys.version_info[0]}.{sys.version_info[1]}"
SITE = f"lib/{VERSION}/site-packages"
COMMAND = f"#!{PLACE}/bin/python\nfrom ublk_ubi.cli import main\nmain()\n"


def pack(archive: Path, kublk: Path | None) -> None:
    """Write the archive: what a user's venv has, and kublk where it could be had.

    The guest makes a venv of it: with its own Python, if that is of this version.
    """
    with tarfile.open(archive, "w") as tar:
        _text(tar, "bin/ublk-ubi", COMMAND, 0o755)
        tar.add(ROOT / "ublk_ubi", f"{SITE}/ublk_ubi", filter=_ours)
        for name in _dependencies():
            _distribution(tar, name)
        if kublk is not None:
            tar.add(kublk, "kublk")


def _text(tar: tarfile.TarFile, name: str, text: str, mode: int) -> None:
    data = text.encode()
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), mode
    tar.addfile(entry, io.BytesIO(data))


def _ours(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Leave out what only tests have."""
    return None if PurePosixPath(entry.name).name.startswith("_testing") else entry


def _dependencies() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [re.split(r"[^\w-]", needed, maxsplit=1)[0] for needed in project["dependencies"]]


def _distribution(tar: tarfile.TarFile, name: str) -> None:
    for file in distribution(name).files or ():
        path = Path(str(file.locate()))
        if ".." not in file.parts and path.exists():
            tar.add(path, f"{SITE}/{file}")
