"""A real root filesystem image: ext4, made of files of the running system."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MIN_FILES = 10_000
MIN_BYTES = 500 << 20
MAX_BYTES = 1 << 30
SOURCES = ("usr/bin", "usr/sbin", "etc", "usr/share", "usr/include", "usr/lib", "usr/local", "opt")
SKIPPED = {"proc", "sys", "dev", "run", "tmp"}


def choose(root: Path) -> list[Path]:
    """Return regular files and links below `root`, relative to it, until they are enough."""
    chosen: list[Path] = []
    total = files = 0
    for source in SOURCES:
        for path in walk(root / source):
            status = path.lstat()
            if total + status.st_size > MAX_BYTES:
                continue
            chosen.append(path.relative_to(root))
            total += status.st_size
            files += path.is_file()
            # Room for more of either kind, until both are there.
            if files >= 2 * MIN_FILES and total >= MIN_BYTES * 1.1:
                return chosen
    if files < MIN_FILES or total < MIN_BYTES:
        raise SystemExit(
            f"demo: this system has only {files} files ({total >> 20} MiB) below /usr, /etc and "
            f"/opt; the demo wants {MIN_FILES} and {MIN_BYTES >> 20} MiB",
        )
    return chosen


def walk(folder: Path) -> Iterator[Path]:
    """Yield readable regular files and symbolic links below `folder`, in a fixed order."""
    for base, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - SKIPPED)
        for name in sorted(names):
            path = Path(base, name)
            if path.is_symlink() or (path.is_file() and os.access(path, os.R_OK)):
                yield path


def build(image: Path, root: Path, staging: Path) -> int:
    """Make the image of what `choose` chose; returns its number of files."""
    chosen = choose(root)
    size = 0
    for relative in chosen:
        target = staging / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        source = root / relative
        shutil.copy2(source, target, follow_symlinks=False)
        size += (source.lstat().st_size + 4095) // 4096 * 4096
    # Metadata of ext4, and room to write.
    mebibytes = (size >> 20) * 11 // 10 + 256
    subprocess.run(
        ["mke2fs", "-q", "-F", "-t", "ext4", "-d", str(staging), "-E", "root_owner=0:0",
         str(image), f"{mebibytes}M"],
        check=True, stdout=subprocess.DEVNULL,
    )
    return len(chosen)
