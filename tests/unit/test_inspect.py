"""Reading a base without a daemon: every kind of thing that may lie there.

The bytes are put together by `handmade`, which shares no code with what reads them.
"""

from __future__ import annotations

import json
import os
import uuid
from typing import TYPE_CHECKING

import pytest
from handmade import HERE, MIB, SLOT_0, SLOT_1, UUID, crc, disk, slot
from hypothesis import given, settings
from hypothesis import strategies as st

from ublk_ubi import content, metadata
from ublk_ubi.errors import UbiError
from ublk_ubi.inspect import inspect_base

if TYPE_CHECKING:
    from pathlib import Path

    from ublk_ubi.inspect import Inspection


@pytest.fixture
def look(tmp_path: Path):
    """Write bytes to a base, look at it, and see that nothing was changed."""

    def see(data: bytes, size: int | None = None) -> Inspection:
        path = tmp_path / "vm.base"
        path.write_bytes(data)
        if size is not None:
            os.truncate(path, size)
        os.chmod(path, 0o400)
        before = path.stat()
        found = inspect_base(str(path))
        after = path.stat()
        assert (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size)
        assert "\n" not in found.description + found.advice
        json.dumps(found.as_dict())
        path.unlink()
        return found

    return see


def test_crc32c_vector() -> None:
    assert metadata.crc32c(b"123456789") == crc(b"123456789") == 0xE3069283
    assert metadata.crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4


# our disks -----------------------------------------------------------------------------------


def test_closed(look) -> None:
    data = disk(slot(sequence=8), slot(sequence=7), hydrated=(2, 5, 10, 11, 2_097_151))
    found = look(data, 50 * MIB)
    assert found.kind == "ublk-ubi"
    assert found.description == "a ublk-ubi disk, closed cleanly"
    assert (found.size, found.data_offset, found.data_size) == (50 * MIB, 8 * MIB, 42 * MIB)
    assert (found.version, found.stripe_size, found.open) == ("0.1", MIB, False)
    assert (found.image_size, found.image_stripes) == (10 * MIB + 512, 11)
    assert (found.hydrated, found.hydrated_past_image) == (3, 2)
    assert (found.first_hydrated_stripe, found.first_hydrated_offset) == (2, 10 * MIB)
    assert found.uuid == str(UUID)
    assert (found.generation, found.boot_id, found.this_boot) == (3, str(HERE), True)
    assert found.image_fingerprint == bytes(range(32)).hex()
    assert [(s.offset, s.valid, s.sequence) for s in found.slots] == [
        (SLOT_0, True, 8), (SLOT_1, True, 7),
    ]


@pytest.mark.parametrize(
    ("boot", "words"),
    [(HERE, "open since this boot"), (uuid.uuid4(), "open when its machine went down")],
)
def test_open(look, boot: uuid.UUID, words: str) -> None:
    found = look(disk(bytes(512), slot(flags=1, boot_id=boot.bytes), minor=2))
    assert found.kind == "ublk-ubi"
    assert words in found.description
    assert found.open
    assert found.slots[0].problem == "never written"


def test_one_that_has_all_of_its_image(look) -> None:
    most = look(disk(slot(), hydrated=tuple(range(10))), 50 * MIB)
    assert "`ublk-ubi add --image IMAGE --base " in most.advice
    full = look(disk(slot(), hydrated=tuple(range(11))), 50 * MIB)
    assert "--image" not in full.advice
    assert full.advice.endswith("opens it, independent of its image")


def test_the_higher_sequence_counts(look) -> None:
    newer = slot(sequence=9, generation=9)
    assert look(disk(newer, slot(sequence=8))).generation == 9
    assert look(disk(slot(), newer)).generation == 9


@pytest.mark.parametrize("size", [64 << 10, 128 << 10, 256 << 10, 512 << 10, MIB])
def test_every_stripe_size(look, size: int) -> None:
    found = look(disk(slot(stripe_size=size), stripe_byte=size >> 10 & 0xFF, hydrated=(3,)))
    assert (found.kind, found.stripe_size) == ("ublk-ubi", size)
    assert found.first_hydrated_offset == 8 * MIB + 3 * size


TORN = {
    "checksum": slot(crc=1),
    "magic": slot(magic=b"UBLKUBIY"),
    "stripe size": slot(stripe_size=3 << 16),
    "stripe size 0": slot(stripe_size=0),
    "stripe size small": slot(stripe_size=32 << 10),
    "image": slot(image_size=1 << 63),
    "sequence": slot(sequence=1 << 63),
    "generation": slot(generation=(1 << 64) - 1),
    "noise": bytes(range(256)) * 2,
}


@pytest.mark.parametrize("kind", TORN)
def test_a_torn_slot_leaves_the_other(look, kind: str) -> None:
    for slots in ((TORN[kind], slot()), (slot(), TORN[kind])):
        found = look(disk(*slots))
        assert found.kind == "ublk-ubi"
        assert sum(s.valid for s in found.slots) == 1
        assert any((s.problem or "").startswith("damaged: ") for s in found.slots)
    found = look(disk(TORN[kind], TORN[kind]))
    assert (found.kind, found.generation) == ("damaged", None)
    assert look(disk(TORN[kind])).kind == "damaged"


def test_every_flipped_bit_is_seen() -> None:
    good = slot()
    assert metadata.parse_slot(good).extension is not None
    for bit in range(0, 512 * 8, 7):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        assert metadata.parse_slot(bytes(bad)).extension is None, bit


@pytest.mark.parametrize(
    "data",
    [
        disk(slot(version=2), slot()),
        disk(slot(), slot(incompat=4, sequence=1)),
        disk(slot(), slot(), minor=3),
        disk(slot(), slot(), major=1),
    ],
)
def test_newer(look, data: bytearray) -> None:
    found = look(data)
    assert found.kind == "newer"
    assert "upgrade" in found.advice


def test_unknown_compatible_features_are_no_matter(look) -> None:
    assert look(disk(slot(compat=0xFF))).kind == "ublk-ubi"


def test_contradiction(look) -> None:
    found = look(disk(slot(stripe_size=64 << 10), stripe_byte=0x80))
    assert found.kind == "damaged"
    assert "contradicts" in found.description


def test_creation_cut_short(look) -> None:
    data = disk(slot(sequence=1), magic=b"", minor=0)
    assert look(data).kind == "empty"
    for spoiled in (
        disk(slot(sequence=2), magic=b"", minor=0),
        disk(slot(sequence=1), slot(sequence=1), magic=b"", minor=0),
        disk(slot(sequence=1), magic=b"", minor=0, hydrated=(5,)),
        disk(bytes(512), slot(sequence=1), magic=b"", minor=0),
    ):
        assert look(spoiled).kind == "damaged"


# bdev_ubi's ----------------------------------------------------------------------------------


def test_bdev_ubi(look) -> None:
    found = look(disk(stripe_byte=0x40, hydrated=(0, 9)))
    assert (found.kind, found.stripe_size, found.hydrated) == ("bdev_ubi", 64 << 10, 2)
    assert "--adopt" in found.advice
    assert "--stripe-size" not in found.advice
    assert found.image_size is None
    found = look(disk(stripe_byte=0, hydrated=(4,)))
    assert found.kind == "bdev_ubi"
    assert found.stripe_size is None
    assert found.possible_stripe_sizes == (256 << 10, 512 << 10, MIB)
    assert "--stripe-size, which it does not tell: 256K, 512K, 1M" in found.advice
    assert (found.first_hydrated_stripe, found.first_hydrated_offset) == (4, None)
    assert look(disk(stripe_byte=3)).kind == "damaged"


# other things --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "too small"), (8 * MIB - 1, "too small"), (8 * MIB, "are zero"), (1 << 40, "are zero")],
)
def test_empty(look, size: int, words: str) -> None:
    found = look(b"", size)
    assert found.kind == "empty"
    assert words in found.description


FOREIGN = {
    "an ext2, ext3 or ext4 filesystem": (1080, b"\x53\xef"),
    "an XFS filesystem": (0, b"XFSB"),
    "a btrfs filesystem": (65600, b"_BHRfS_M"),
    "a LUKS-encrypted disk": (0, b"LUKS\xba\xbe\0\2"),
    "an LVM physical volume": (512, b"LABELONE"),
    "swap space": (4086, b"SWAPSPACE2"),
    "a GPT partition table": (512, b"EFI PART"),
    "an MBR partition table or boot sector": (510, b"\x55\xaa"),
    "a qcow2 image": (0, b"QFI\xfb"),
    "a member of an md RAID": (4096, b"\xfc\x4e\x2b\xa9"),
    "an ISO 9660 filesystem": (32769, b"CD001"),
}


@pytest.mark.parametrize("words", FOREIGN)
def test_foreign(look, words: str) -> None:
    offset, mark = FOREIGN[words]
    data = bytearray(8 * MIB)
    data[offset : offset + len(mark)] = mark
    found = look(data)
    assert (found.kind, found.description) == ("foreign", words)
    assert "--format" in found.advice


def test_noise(look) -> None:
    found = look(os.urandom(8 * MIB))
    assert found.kind == "foreign"
    assert "unknown kind" in found.description


def test_one_byte_far_in_is_not_empty(look) -> None:
    data = bytearray(8 * MIB)
    data[-1] = 1
    assert look(data).kind == "foreign"


def test_marks_that_lie_beyond_the_probe() -> None:
    assert max(mark.offset + len(mark.magic) for mark in content._MARKS) <= content.PROBE_SIZE
    assert content.describe(b"") is None


@given(st.binary(max_size=2048), st.sampled_from([b"", b"BDEV_UBI\0", b"BDEV_UBI\0\0\0\1\0"]))
@settings(deadline=None, max_examples=30)
def test_any_bytes_can_be_taken_apart(tail: bytes, head: bytes) -> None:
    found = metadata.parse(head + tail)
    assert found.magic == (head + tail).startswith(b"BDEV_UBI\0")
    assert found.hydrated() >= 0
    data = bytearray(8 * MIB)
    data[SLOT_0 : SLOT_0 + 512] = tail[:512].ljust(512, b"\0")
    metadata.parse(bytes(data))


# what is no base -----------------------------------------------------------------------------


def test_what_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to("/nowhere")
    for path, words in (
        (tmp_path / "nope", "does not exist"),
        (tmp_path / "dangling", "does not exist"),
        (tmp_path, "is a folder"),
        (tmp_path / "fifo", "neither a file nor a block device"),
        ("/dev/null", "neither a file nor a block device"),
        ("", "not a path"),
        ("a\0b", "not a path"),
    ):
        with pytest.raises(UbiError, match=words) as caught:
            inspect_base(str(path))
        assert "\n" not in caught.value.message


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(disk(slot()))
    (tmp_path / "link").symlink_to("base")
    assert inspect_base(str(tmp_path / "link")).kind == "ublk-ubi"
