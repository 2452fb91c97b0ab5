"""Options of `add` that show on the device or on its daemon alone."""

from __future__ import annotations

import fcntl
import os
import pwd
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.direct import assert_content, read_direct
from support.shell import run, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.device import Device, Ubi
    from support.images import Image
    from support.stores import Stores

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
STRIPE = 256 * KIB
SIZE = 8 * MIB
IMAGE_SIZE = 3 * MIB + 1
BLKRRPART = 0x125F  # linux/fs.h
SECRET = b"what was there before, of 32 B.\n"


# -- what was on a block device before -----------------------------------------------------------

def test_old_data_is_shown_behind_the_image_when_told(
    ubi: Ubi, make_image: Callable[..., Image], stores: Stores,
) -> None:
    """Stripes that the image has a part of are the image's; the rest is as it was, and stays."""
    image = make_image(IMAGE_SIZE)
    base = stores.block("ubd", 8 * MIB + SIZE)
    old = SECRET * (SIZE // len(SECRET))
    with open(base, "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), old, 8 * MIB)
        os.fsync(file.fileno())
    device = ubi.add(image, base, stripe_size=STRIPE, keep_old_data=True)
    end = -(-IMAGE_SIZE // STRIPE) * STRIPE
    expected = bytearray(image.as_disk(end) + old[end:])
    assert_content(device.node, expected, "the disk")
    with device.open() as disk:
        for at in (end - 512, end, SIZE - 512):
            disk.pwrite(b"\x5a" * 512, at)
            expected[at : at + 512] = b"\x5a" * 512
    assert_content(device.node, expected, "the disk, written")
    device.reopen(keep_old_data=None)
    assert_content(device.node, expected, "the disk, reopened")


# -- the device node -----------------------------------------------------------------------------

def is_nobodys(device: Device, mode: int) -> bool:
    """Whether the node has the owner that was asked for, and the mode."""
    node = os.stat(device.node)
    nobody = pwd.getpwnam("nobody")
    return ((node.st_uid, node.st_gid, stat.S_IMODE(node.st_mode))
            == (nobody.pw_uid, nobody.pw_gid, mode))


def test_owner_and_mode(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str],
) -> None:
    image = make_image(MIB)
    default = ubi.add(image, make_base(0))
    node = os.stat(default.node)
    assert (node.st_uid, node.st_gid) == (0, 0)
    assert not node.st_mode & 0o007, "a tenant's disk is not everybody's"
    group = pwd.getpwnam("nobody").pw_gid
    device = ubi.add(image, make_base(0), owner=f"nobody:{group}", mode=0o640)
    assert is_nobodys(device, 0o640)
    device.reopen(mode=0o600)
    assert is_nobodys(device, 0o600)
    reader = ("import os, sys; os.setgroups([]); os.setgid(%d); os.setuid(%d);"
              "os.read(os.open(sys.argv[1], os.O_RDWR), 1)")
    nobody = pwd.getpwnam("nobody")
    run("python3", "-c", reader % (nobody.pw_gid, nobody.pw_uid), device.node)
    assert not stat.S_IMODE(os.stat(default.node).st_mode) & 0o007


@pytest.mark.parametrize("partscan", [True, False])
def test_the_host_looks_for_partitions_when_told(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str], *, partscan: bool,
) -> None:
    image = make_image(SIZE)
    run("sfdisk", "-q", image.path, stdin="label: dos\nstart=2048, size=4096, type=83\n")
    device = ubi.add(image, make_base(0), partscan=partscan or None)
    name = os.path.basename(device.node)
    partition = Path("/sys/block", name, f"{name}p1")
    if partscan:  # the kernel looks behind START_DEV's back
        until(partition.exists, "the partition that the image has")
        disk = Path(image.path).read_bytes()
        found = read_direct(f"{device.node}p1", 0, 2 * MIB)
        assert found == disk[MIB : 3 * MIB]
        device.reopen()
        until(partition.exists, "the partition, once more")
    else:
        device.reopen()
        assert not partition.exists()
        assert device.status()["io"]["read"]["count"] == 0  # nor has anybody looked
        with open(device.node, "rb") as disk_file:
            fcntl.ioctl(disk_file, BLKRRPART)
        assert partition.exists()  # there was something to be found


# -- the price of a large image ------------------------------------------------------------------

def effort(device: Device) -> dict[str, int]:
    """What a daemon has done to come up: calls of read and write, bytes of all I/O, its rings' too.
    Its memory grows with the disk, as test_footprint bounds it."""
    lines = Path(f"/proc/{device.pid}/io").read_text().splitlines()
    found = {name: int(value) for name, value in (line.split(": ") for line in lines)}
    return {
        "calls": found["syscr"] + found["syscw"],
        "bytes": found["read_bytes"] + found["write_bytes"],
    }


def test_a_disk_of_a_huge_image_is_made_with_as_little(ubi: Ubi, stores: Stores) -> None:
    """1 TiB against 1 GiB: at most a fifth more of anything that can be counted."""
    folder = stores.folder("ext4")
    spent = {}
    for size in (GIB, TIB):
        image = folder / f"image{size}"
        image.touch()
        os.truncate(image, size)
        device = ubi.add(image, folder / f"base{size}")
        assert device.size == size
        spent[size] = effort(device)
        print(f"{size // GIB} GiB: {spent[size]}")
        device.stop()
    for what, least in spent[GIB].items():
        assert spent[TIB][what] <= 1.2 * least, what
