"""Every number of the ioctls and of statx against the C headers; the rest on real devices, in
tests/device."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from ublk_ubi import blockdev, files

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = r"""
#define _GNU_SOURCE
#include <stddef.h>
#include <stdio.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <linux/fs.h>
#include <linux/loop.h>
#include <linux/stat.h>
#ifndef BLKGETDISKSEQ
#define BLKGETDISKSEQ _IOR(0x12, 128, __u64)
#endif
#define SHOW(name) printf(#name " %lu\n", (unsigned long)(name))
int main(void)
{
    SHOW(BLKROGET); SHOW(BLKSSZGET); SHOW(BLKPBSZGET); SHOW(BLKZEROOUT); SHOW(BLKGETSIZE64);
    SHOW(BLKGETDISKSEQ); SHOW(FS_IOC_GETFLAGS); SHOW(FS_IMMUTABLE_FL); SHOW(FS_APPEND_FL);
    SHOW(LOOP_GET_STATUS64); SHOW(AT_EMPTY_PATH);
    printf("LOOP_INFO64_SIZE %zu\n", sizeof(struct loop_info64));
    printf("LOOP_INFO64_DEVICE %zu\n", offsetof(struct loop_info64, lo_device));
    printf("LOOP_INFO64_INODE %zu\n", offsetof(struct loop_info64, lo_inode));
    printf("LOOP_INFO64_RDEVICE %zu\n", offsetof(struct loop_info64, lo_rdevice));
    printf("STATX_SIZE %zu\n", sizeof(struct statx));
#ifdef STATX_DIOALIGN
    SHOW(STATX_DIOALIGN);
    printf("STATX_MASK %zu\n", offsetof(struct statx, stx_mask));
    printf("STATX_DIO_MEM_ALIGN_OFFSET %zu\n", offsetof(struct statx, stx_dio_mem_align));
    printf("STATX_DIO_OFFSET_ALIGN_OFFSET %zu\n", offsetof(struct statx, stx_dio_offset_align));
#endif
#ifdef STATX_DIO_READ_ALIGN
    SHOW(STATX_DIO_READ_ALIGN);
    printf("STATX_DIO_READ_OFFSET_ALIGN_OFFSET %zu\n",
           offsetof(struct statx, stx_dio_read_offset_align));
#endif
    return 0;
}
"""


def test_numbers_and_layouts_are_the_headers(tmp_path: Path):
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler, "the project does not build without a C compiler either"
    (tmp_path / "p.c").write_text(PROGRAM)
    subprocess.run([compiler, "-o", tmp_path / "p", tmp_path / "p.c"], check=True)
    lines = subprocess.run([tmp_path / "p"], check=True, stdout=subprocess.PIPE, text=True).stdout
    expected = {name: int(number) for name, number in map(str.split, lines.splitlines())}
    # fields that the product reads at these places by their order
    assert expected.pop("LOOP_INFO64_DEVICE") == 0
    assert expected.pop("LOOP_INFO64_INODE") == 8
    assert expected.pop("LOOP_INFO64_RDEVICE") == 16
    assert expected.pop("STATX_MASK", 0) == 0
    assert len(expected) >= 13
    for name, number in expected.items():
        found = getattr(blockdev, name, None) or getattr(files, name)
        assert found == number, name


def test_the_kernels_device_numbers_are_decoded():
    for major, minor in ((8, 1), (259, 70000), (7, 255), (252, 256), (0, 37), (4095, 0xFFFFF)):
        encoded = (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)  # huge_encode_dev()
        found = blockdev._decode_dev(encoded)
        assert (os.major(found), os.minor(found)) == (major, minor)


def test_a_file_is_no_block_device(tmp_path: Path):
    (tmp_path / "f").write_bytes(b"x")
    with open(tmp_path / "f", "rb") as file:
        for question in (blockdev.size, blockdev.logical_block_size, blockdev.is_read_only,
                         blockdev.physical_block_size, blockdev.loop_backing):
            with pytest.raises(OSError, match="Inappropriate ioctl"):
                question(file.fileno())
        assert blockdev.disk_sequence(file.fileno()) == 0
        assert blockdev.inode_flags(file.fileno()) & (
            blockdev.FS_IMMUTABLE_FL | blockdev.FS_APPEND_FL) == 0
