"""What a disk is made of again: its blocks and its size."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.geometry import keep_blocks, keep_size, settle
from ublk_ubi.options import METADATA_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KIB, MIB = 1 << 10, 1 << 20
OLD, NEW = 1 * MIB, 2 * MIB        # sizes of disks
FILE: Any = SimpleNamespace(path="/srv/base", is_block=False, fd=-1)
VOLUME: Any = SimpleNamespace(path="/dev/vg/base", is_block=True, fd=-1)


@pytest.fixture(params=["a hole", "data at its end"])
def grown(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Any, bool]]:
    """A file that has room for NEW, and whether what it has behind OLD is a hole."""
    hole = request.param == "a hole"
    with open(tmp_path / "base", "w+b") as file:
        file.truncate(METADATA_SIZE + NEW)
        os.pwrite(file.fileno(), b"m" * 4 * KIB, METADATA_SIZE + OLD - 4 * KIB)
        if not hole:
            os.pwrite(file.fileno(), b"o" * 4 * KIB, METADATA_SIZE + NEW - 4 * KIB)
        yield SimpleNamespace(path=file.name, is_block=False, fd=file.fileno()), hole


@pytest.mark.parametrize(("recorded", "needed", "asked", "blocks"), [
    (0, 512, None, 512),
    (4096, 4096, None, 4096),
    (4096, 512, None, 4096),
    (4096, 512, 512, 512),
    (512, 4096, 4096, 4096),
])
def test_blocks(recorded: int, needed: int, asked: int | None, blocks: int) -> None:
    assert keep_blocks(FILE, recorded, needed, asked) == blocks


@pytest.mark.parametrize(("recorded", "needed", "way_out"), [
    (512, 4096, "put it where it was, or give --block-size 4096"),
    (1024, 512, "upgrade ublk-ubi"),
])
def test_blocks_that_cannot_be_had(recorded: int, needed: int, way_out: str) -> None:
    with pytest.raises(UbiError, match=way_out):
        keep_blocks(FILE, recorded, needed, None)


@pytest.mark.parametrize("base", [FILE, VOLUME])
@pytest.mark.parametrize(("recorded", "room", "asked", "size"), [
    (0, NEW, None, NEW),               # of before sizes were recorded
    (0, NEW, NEW, NEW),
    (NEW, NEW, None, NEW),
    (NEW, NEW, NEW, NEW),
    (NEW, OLD, OLD, OLD),              # somebody has said so
])
def test_size(base: Any, recorded: int, room: int, asked: int | None, size: int) -> None:
    assert keep_size(base, recorded, room, asked) == (size, None)


def test_a_file_that_has_grown_by_a_hole_has_a_larger_disk(grown: tuple[Any, bool]) -> None:
    """One that was copied from a volume holds in its new part what that held."""
    base, hole = grown
    size, warning = keep_size(base, OLD, NEW, None)
    assert size == (NEW if hole else OLD)
    assert (warning is None) == hole
    assert keep_size(base, OLD, NEW, OLD) == (OLD, None)
    if hole:
        assert keep_size(base, OLD, NEW, NEW) == (NEW, None)
    else:
        with pytest.raises(UbiError, match="--size asks for"):
            keep_size(base, OLD, NEW, NEW)


def test_a_volume_that_has_grown_shows_nothing_that_was_there_before() -> None:
    size, warning = keep_size(VOLUME, OLD, NEW, None)
    assert size == OLD
    assert warning is not None
    assert f"keeps its {OLD} bytes" in warning
    assert "until `ublk-ubi resize`" in warning
    assert "--keep-old-data" in warning
    assert keep_size(VOLUME, OLD, NEW, OLD) == (OLD, None)


@pytest.mark.parametrize("asked", [NEW, OLD + 512, 512])
def test_no_other_size_can_be_asked_for(asked: int) -> None:
    with pytest.raises(UbiError, match=f"a disk of {OLD} .* --size asks for {asked} ") as error:
        keep_size(VOLUME, OLD, NEW, asked)
    assert error.value.code == Exit.USAGE


@pytest.mark.parametrize("asked", [None, NEW, OLD - 512])
@pytest.mark.parametrize("base", [FILE, VOLUME])
def test_a_base_that_has_shrunk(base: Any, asked: int | None) -> None:
    with pytest.raises(UbiError, match=f"as it was, or add it once with --size {OLD} to do"):
        keep_size(base, NEW, OLD, asked)


@pytest.mark.parametrize("rest", [b"", b"o"], ids=["zeros", "data"])
def test_a_disk_may_end_inside_a_block_of_the_filesystem(tmp_path: Path, rest: bytes) -> None:
    """A filesystem has holes of whole blocks."""
    size = OLD + 512
    with open(tmp_path / "base", "w+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"m" * size, METADATA_SIZE)
        os.pwrite(file.fileno(), rest, METADATA_SIZE + size + 3 * KIB)
        file.truncate(METADATA_SIZE + NEW)
        base: Any = SimpleNamespace(path=file.name, is_block=False, fd=file.fileno())
        assert keep_size(base, size, NEW, None)[0] == (size if rest else NEW)


@pytest.mark.parametrize(("found", "recorded"), [
    (0, OLD),                          # of before sizes were recorded
    (OLD, OLD),
    (OLD - 512, OLD),
    (NEW, NEW),                        # its daemon died while the kernel was told to let it grow
    (NEW + 512, OLD),                  # which the base has no room for
    ((1 << 64) - 1, OLD),
])
def test_a_disk_that_is_taken_over_has_the_kernels_size(found: int, recorded: int) -> None:
    session, opener = settled(found, size=OLD, recovered=True)
    assert (session.size, session.block_size) == (OLD, 512)
    assert session.recorded_size == opener.told == recorded


@pytest.mark.parametrize(("found", "size", "recorded"), [
    (0, NEW, NEW),
    (NEW + 512, NEW, NEW + 512),       # in larger blocks its end cannot be reached, and stays its
    (NEW, NEW, NEW),
])
def test_what_larger_blocks_cannot_reach_stays_recorded(
    found: int, size: int, recorded: int,
) -> None:
    session, opener = settled(found, size=NEW + 512, blocks=4096)
    assert (session.size, session.block_size, session.warnings) == (size, 4096, [])
    assert session.recorded_size == opener.told == recorded


def settled(found: int, *, size: int, blocks: int = 512, recovered: bool = False) -> Any:
    """A session with room for `size` once its base has said `found`, and what it then says."""
    opener = SimpleNamespace(recorded_device_bytes=found, block_bytes=blocks, told=0)
    opener.set_device_bytes = lambda told: vars(opener).update(told=told)
    base = SimpleNamespace(path="/dev/vg/base", is_block=True, fd=-1, data_size=NEW)
    session = SimpleNamespace(
        base=base, options=SimpleNamespace(size=None, block_size=None), block_size=blocks,
        device=SimpleNamespace(recovered=recovered), size=size, recorded_size=0, warnings=[],
    )
    settle(session, opener)  # type: ignore[arg-type]
    return session, opener
