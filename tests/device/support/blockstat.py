"""What the kernel counts of a disk's requests (Documentation/block/stat.rst)."""

from __future__ import annotations

import os
from pathlib import Path

_FLUSHES = 15                      # field 16


def flushes_of(node: str) -> int:
    """How many flushes a disk has done; of a partition: the whole disk's."""
    folder = Path("/sys/class/block", os.path.basename(os.path.realpath(node))).resolve()
    if (folder / "partition").exists():
        folder = folder.parent
    return int((folder / "stat").read_text().split()[_FLUSHES])
