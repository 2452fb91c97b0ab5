"""Images with content that is known and seeded, and tells one place from another."""

from __future__ import annotations

import os
import random
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from support.direct import assert_same

if TYPE_CHECKING:
    from pathlib import Path

EXTENT = 64 << 10                  # what is data or hole, as a whole
SECTOR = 512
POOL_SIZE = 1 << 20                # random bytes; extents are cut from it at any sector


@dataclass(frozen=True)
class Image:
    """An image and what it holds."""

    path: str
    content: bytes

    @property
    def size(self) -> int:
        return len(self.content)

    @property
    def is_block(self) -> bool:
        return stat.S_ISBLK(os.stat(self.path).st_mode)

    def as_disk(self, size: int) -> bytes:
        """What a new device of `size` bytes shows of it: the image, and zeros behind."""
        assert size >= self.size
        return self.content + bytes(size - self.size)

    def assert_untouched(self) -> None:
        """Every bit of it is as it was made."""
        with open(self.path, "rb") as file:
            found = file.read(len(self.content) + 1)
        if not self.is_block:
            assert len(found) == self.size, f"the image has {len(found)} bytes, not {self.size}"
        assert_same(found[: self.size], self.content, 0, "the image")


def random_content(size: int, seed: int, *, holes: float = 0.0) -> bytes:
    """`size` bytes; of every extent the share `holes`, at random, is zeros."""
    rng = random.Random(seed)
    pool = rng.randbytes(POOL_SIZE)
    places = range(0, POOL_SIZE - EXTENT + 1, SECTOR)
    pieces = []
    for start in range(0, size, EXTENT):
        length = min(EXTENT, size - start)
        place = rng.choice(places)
        pieces.append(bytes(length) if rng.random() < holes else pool[place : place + length])
    return b"".join(pieces)


def write_file(path: Path, content: bytes) -> Image:
    """A file with this content, real holes where it is zero; durable."""
    with open(path, "wb", buffering=0) as file:
        file.truncate(len(content))
        _write_data(file.fileno(), content)
        os.fsync(file.fileno())
    return Image(str(path), content)


def write_block(device: str, content: bytes) -> Image:
    """Fill a block device that reads as zeros."""
    with open(device, "r+b", buffering=0) as file:
        _write_data(file.fileno(), content)
        os.fsync(file.fileno())
    return Image(device, content)


def _write_data(fd: int, content: bytes) -> None:
    zeros = bytes(EXTENT)
    for start in range(0, len(content), EXTENT):
        piece = content[start : start + EXTENT]
        if piece != zeros[: len(piece)]:
            assert os.pwrite(fd, piece, start) == len(piece)
