"""Tells what a disk holds, in plain words, by the marks that formats leave.

For people who are about to give a disk away: what is not known here is "data of an unknown kind",
never "nothing".
"""

from __future__ import annotations

from typing import NamedTuple

PROBE_SIZE = 128 << 10  # bytes from the start that `describe` looks at


class _Mark(NamedTuple):
    offset: int
    magic: bytes
    words: str


# Most telling first: a LUKS or LVM disk may hold an older file system's remains further in.
_MARKS = (
    _Mark(0, b"LUKS\xba\xbe", "a LUKS-encrypted disk"),
    *(_Mark(sector * 512, b"LABELONE", "an LVM physical volume") for sector in range(4)),
    _Mark(4096, b"\xfc\x4e\x2b\xa9", "a member of an md RAID"),
    _Mark(0, b"\xfc\x4e\x2b\xa9", "a member of an md RAID"),
    _Mark(0, b"XFSB", "an XFS filesystem"),
    _Mark(65600, b"_BHRfS_M", "a btrfs filesystem"),
    _Mark(1080, b"\x53\xef", "an ext2, ext3 or ext4 filesystem"),
    _Mark(1024, b"\x10\x20\xf5\xf2", "an F2FS filesystem"),
    _Mark(4096, b"\xc6\x85\x73\xf6", "a bcache device"),
    _Mark(4120, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca", "a bcache or bcachefs device"),
    _Mark(4086, b"SWAPSPACE2", "swap space"),
    _Mark(4086, b"SWAP-SPACE", "swap space"),
    _Mark(0, b"hsqs", "a squashfs filesystem"),
    _Mark(1024, b"\xe2\xe1\xf5\xe0", "an EROFS filesystem"),
    _Mark(32769, b"CD001", "an ISO 9660 filesystem"),
    _Mark(3, b"NTFS    ", "an NTFS filesystem"),
    _Mark(3, b"EXFAT   ", "an exFAT filesystem"),
    _Mark(82, b"FAT32   ", "a FAT filesystem"),
    _Mark(54, b"FAT1", "a FAT filesystem"),
    _Mark(0, b"QFI\xfb", "a qcow2 image"),
    _Mark(0, b"QED\0", "a QED image"),
    _Mark(0, b"KDMV", "a VMDK image"),
    _Mark(0, b"vhdxfile", "a VHDX image"),
    _Mark(0, b"conectix", "a VHD image"),
    _Mark(64, b"\x7f\x10\xda\xbe", "a VDI image"),
    _Mark(0, b"\x1f\x8b\x08", "gzip-compressed data"),
    _Mark(0, b"\xfd7zXZ\0", "xz-compressed data"),
    _Mark(0, b"\x28\xb5\x2f\xfd", "zstd-compressed data"),
    _Mark(0, b"BZh", "bzip2-compressed data"),
    _Mark(512, b"EFI PART", "a GPT partition table"),
    _Mark(4096, b"EFI PART", "a GPT partition table"),
    _Mark(510, b"\x55\xaa", "an MBR partition table or boot sector"),
)


def describe(start: bytes) -> str | None:
    """Say what begins with these bytes (give PROBE_SIZE of them); None if no mark is known."""
    for mark in _MARKS:
        if start[mark.offset : mark.offset + len(mark.magic)] == mark.magic:
            return mark.words
    return None
