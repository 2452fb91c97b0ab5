"""Bad input, end to end: one line that names the thing, the value and the way out; nothing else.

Each case is a function that sets the scene and returns what is typed and what is to be said. All of
them are judged alike: exit code, one line, no trace, and no change of any disk.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support import device, ondisk, watch
from support.device import Outcome
from support.images import random_content, write_file
from support.shell import run
from support.traces import assert_unchanged, seal_slot

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.device import Ubi
    from support.images import Image
    from support.mapper import Mapper
    from support.stores import Stores
    from support.undo import Undo

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SIZE = MIB
FORMAT = "--format"
EMPTY_DEV = (
    "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && "
    'mknod -m 666 /dev/urandom c 1 9 && exec "$@"'
)

_template: list[bytes] = []        # a closed base of ours, made once


@dataclass
class Scene:
    """What a case may use: an image, a folder, and what makes disks."""

    ubi: Ubi
    undo: Undo
    stores: Stores
    mapper: Mapper
    image: Image
    folder: Path

    @property
    def base(self) -> str:
        """Where no base is yet."""
        return str(self.folder / "base")

    def our_base(self) -> str:
        """A closed base that was made of the image, with stripes of 64K."""
        if not _template:
            made = self.ubi.add(self.image, self.base, size=SIZE, stripe_size=64 * KIB)
            made.stop()
            _template.append(Path(self.base).read_bytes())
        Path(self.base).write_bytes(_template[0])
        return self.base

    def file(self, name: str, content: bytes = b"", *, size: int | None = None) -> str:
        path = self.folder / name
        path.write_bytes(content)
        if size is not None:
            os.truncate(path, size)
        return str(path)

    def add(self, *words: object, image: object = None, base: object = None) -> list[str]:
        """The words of an `add`."""
        return [str(word) for word in (
            "add", "--image", image or self.image.path, "--base", base or self.base, *words,
        )]


@dataclass
class Case:
    """What is typed, and what must come of it. `absent`: paths that may not be there afterwards."""

    words: list[str]
    says: list[str]
    code: int = 1
    unchanged: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    prefix: list[str] = field(default_factory=list)


CASES: dict[str, Callable[[Scene], Case]] = {}


def case(function: Callable[[Scene], Case]) -> Callable[[Scene], Case]:
    CASES[function.__name__.replace("_", "-")] = function
    return function


@pytest.fixture
def scene(ubi: Ubi, undo: Undo, stores: Stores, mapper: Mapper) -> Scene:
    # The same in each test: one base of ours is made of it for all.
    image = write_file(stores.folder() / "image", random_content(SIZE, 1))
    return Scene(ubi, undo, stores, mapper, image, stores.folder())


def command(prefix: list[str], words: list[str]) -> Outcome:
    """A command of ours, started through another program."""
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "ublk_ubi", *words],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60.0, check=False,
        env=os.environ | {"PYTHONPATH": str(device.CHECKOUT)},
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


# -- this machine ---------------------------------------------------------------------------------

@case
def no_root(scene: Scene) -> Case:
    prefix = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
              "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    return Case(scene.add(), ["/run/ublk-ubi"], prefix=prefix, absent=[scene.base])


@case
def no_capability(scene: Scene) -> Case:
    prefix = ["setpriv", "--bounding-set=-sys_admin"]
    return Case(
        scene.add(), ["CAP_SYS_ADMIN", "sudo"], prefix=prefix, absent=[scene.base],
    )


@case
def no_ublk_in_the_kernel(scene: Scene) -> Case:
    hide = f"mount -t tmpfs none /sys/class/misc && {EMPTY_DEV}"
    return Case(
        scene.add(), [os.uname().release, "no ublk driver"], absent=[scene.base],
        prefix=["unshare", "--mount", "sh", "-c", hide, "sh"],
    )


@case
def no_node_of_the_driver(scene: Scene) -> Case:
    return Case(
        scene.add(), ["/dev/ublk-control is missing", "container"], absent=[scene.base],
        prefix=["unshare", "--mount", "sh", "-c", EMPTY_DEV, "sh"],
    )


# -- the image ------------------------------------------------------------------------------------

def _bad_image(scene: Scene, image: str, *says: str) -> Case:
    return Case(scene.add(image=image), [image, *says], absent=[scene.base])


@case
def image_missing(scene: Scene) -> Case:
    return _bad_image(scene, str(scene.folder / "none"), "does not exist", "check the path")


@case
def image_a_dangling_link(scene: Scene) -> Case:
    link = scene.folder / "link"
    link.symlink_to(scene.folder / "none")
    return _bad_image(scene, str(link), "which does not exist")


@case
def image_empty(scene: Scene) -> Case:
    return _bad_image(scene, scene.file("empty"), "is empty (0 bytes)")


@case
def image_a_folder(scene: Scene) -> Case:
    return _bad_image(scene, str(scene.folder), "is a folder")


@case
def image_a_fifo(scene: Scene) -> Case:
    os.mkfifo(scene.folder / "fifo")
    return _bad_image(scene, str(scene.folder / "fifo"), "is a FIFO")


@case
def image_a_character_device(scene: Scene) -> Case:
    return _bad_image(scene, "/dev/zero", "is a character device")


@case
def image_unreadable(scene: Scene) -> Case:
    disk = scene.mapper.map(scene.stores.block("ram", SIZE))
    disk.error()
    return _bad_image(scene, disk.path, "cannot be read", "dmesg")


@case
def image_qcow2(scene: Scene) -> Case:
    path = scene.file("disk.qcow2", b"QFI\xfb\0\0\0\3", size=SIZE)
    return _bad_image(scene, path, "qcow2", "qemu-img convert", "disk.raw", "-f raw")


@case
def image_vmdk(scene: Scene) -> Case:
    return _bad_image(scene, scene.file("a", b"KDMV\1", size=SIZE), "VMDK", "qemu-img", "-f raw")


@case
def image_vhdx(scene: Scene) -> Case:
    return _bad_image(scene, scene.file("a", b"vhdxfile", size=SIZE), "VHDX", "qemu-img", "-f raw")


@case
def image_gzip(scene: Scene) -> Case:
    return _bad_image(scene, scene.file("a.gz", b"\x1f\x8b\x08", size=SIZE), "gzip", "-f raw")


@case
def image_with_too_many_stripes(scene: Scene) -> Case:
    """129 GiB of nothing in stripes of 64K."""
    image = scene.file("large", size=129 * GIB)
    return Case(
        scene.add("--stripe-size", "64K", image=image), [image, "2097152", "--stripe-size"],
        absent=[scene.base],
    )


# -- image and base -------------------------------------------------------------------------------

@case
def image_is_base(scene: Scene) -> Case:
    return Case(
        scene.add(base=scene.image.path), [scene.image.path, "is the image"],
        unchanged=[scene.image.path],
    )


@case
def image_is_base_by_links(scene: Scene) -> Case:
    hard, soft = scene.folder / "hard", scene.folder / "soft"
    os.link(scene.image.path, hard)
    soft.symlink_to(hard)
    scene.undo.callback(os.unlink, hard)
    return Case(scene.add(base=soft), [str(soft), "is the image"], unchanged=[scene.image.path])


@case
def image_is_a_partition_of_base(scene: Scene) -> Case:
    disk = scene.stores.loop_over(scene.file("disk", size=16 * MIB))
    run("addpart", disk, 1, 2048, 2048)
    scene.undo.callback(run, "delpart", disk, 1)
    return Case(
        scene.add(FORMAT, "--yes", image=f"{disk}p1", base=disk), [disk, f"{disk}p1"],
        unchanged=[disk],
    )


@case
def image_lies_on_base(scene: Scene) -> Case:
    path = scene.file("disk", size=16 * MIB)
    return Case(
        scene.add(FORMAT, "--yes", image=scene.stores.loop_over(path), base=path), [path],
        unchanged=[path],
    )


# -- the base as a file or device -----------------------------------------------------------------

@case
def base_too_small(scene: Scene) -> Case:
    base = scene.file("base", size=8 * MIB + SIZE - 512)
    return Case(scene.add(), [base, str(8 * MIB + SIZE)], unchanged=[base])


@case
def base_of_another_size(scene: Scene) -> Case:
    base = scene.our_base()
    return Case(scene.add("--size", "2M"), [base, "--size"], unchanged=[base])


@case
def base_of_a_larger_disk(scene: Scene) -> Case:
    base = scene.our_base()
    return Case(scene.add("--size", SIZE - 4096), [base, f"--size asks for {SIZE - 4096}"], code=2,
                unchanged=[base])


@case
def new_base_that_is_larger_than_asked(scene: Scene) -> Case:
    disk = scene.stores.block("ram", 16 * MIB)
    return Case(scene.add("--zero", "--size", SIZE, base=disk),
                [disk, f"makes a disk of {8 * MIB}", f"--size asks for {SIZE}"], code=2,
                unchanged=[disk])


@case
def base_in_no_folder(scene: Scene) -> Case:
    base = str(scene.folder / "none" / "base")
    return Case(scene.add(base=base), [base, "folder"], absent=[os.path.dirname(base)])


@case
def base_a_folder(scene: Scene) -> Case:
    return Case(scene.add(base=scene.folder), [str(scene.folder), "is a folder"])


@case
def base_a_device_that_is_not_there(scene: Scene) -> Case:
    base = "/dev/nvme77n1"
    return Case(scene.add(base=base), [base, "/dev", "lsblk"], absent=[base])


@case
def base_mounted(scene: Scene) -> Case:
    disk = scene.stores.loop_over(scene.file("disk", size=16 * MIB))
    run("mkfs.ext4", "-q", disk)
    point = scene.folder / "point"
    point.mkdir()
    run("mount", "-o", "ro,noload", disk, point)
    scene.undo.callback(run, "umount", point)
    return Case(
        scene.add(FORMAT, "--yes", base=disk), [disk, "mounted", str(point), "umount"],
        code=5, unchanged=[disk],
    )


@case
def base_on_a_read_only_filesystem(scene: Scene) -> Case:
    point = scene.folder / "point"
    point.mkdir()
    base = scene.our_base()
    run("mount", "--bind", scene.folder, point)
    scene.undo.callback(run, "umount", point)
    run("mount", "-o", "remount,bind,ro", point)
    seen = str(point / "base")
    return Case(scene.add(base=seen), [seen, "read-only", "remount"], unchanged=[base])


@case
def base_to_be_made_on_a_read_only_filesystem(scene: Scene) -> Case:
    point = scene.folder / "point"
    point.mkdir()
    run("mount", "--bind", scene.folder, point)
    scene.undo.callback(run, "umount", point)
    run("mount", "-o", "remount,bind,ro", point)
    return Case(
        scene.add(base=point / "base"), [str(point / "base"), "read-only"], absent=[scene.base],
    )


@case
def base_a_read_only_device(scene: Scene) -> Case:
    disk = scene.stores.loop_over(scene.file("disk", size=16 * MIB))
    run("blockdev", "--setro", disk)
    return Case(scene.add(base=disk), [disk, "read-only", "blockdev --setrw"], unchanged=[disk])


@case
def base_larger_than_image_and_old_data_behind(scene: Scene) -> Case:
    disk = scene.stores.block("ram", 16 * MIB)
    return Case(scene.add(base=disk), [disk, "--zero", "--keep-old-data"], unchanged=[disk])


# -- what the base holds --------------------------------------------------------------------------

@case
def base_with_a_filesystem(scene: Scene) -> Case:
    base = scene.file("base", size=16 * MIB)
    run("mkfs.ext4", "-q", "-F", base)
    return Case(scene.add(), [base, "inspect", FORMAT], unchanged=[base])


@case
def base_with_something_far_in(scene: Scene) -> Case:
    """Zeros where a magic would be: ext4, LVM and swap begin with zeros, too."""
    base = scene.file("base", bytes(8 * MIB - 1) + b"x", size=9 * MIB)
    return Case(scene.add(), [base, FORMAT], unchanged=[base])


@case
def format_without_yes(scene: Scene) -> Case:
    base = scene.file("base", size=16 * MIB)
    run("mkfs.ext4", "-q", "-F", base)
    return Case(scene.add(FORMAT), [base, "ext4", "--yes"], code=2, unchanged=[base])


@case
def base_damaged(scene: Scene) -> Case:
    base = scene.our_base()
    with open(base, "r+b") as file:
        for offset in (5 * MIB, 5 * MIB + 4096):
            (byte,) = os.pread(file.fileno(), 1, offset + 100)
            os.pwrite(file.fileno(), bytes([byte ^ 1]), offset + 100)
    return Case(scene.add(), [base, "damaged", "inspect"], unchanged=[base])


@case
def base_of_a_newer_version(scene: Scene) -> Case:
    base = scene.our_base()
    seal_slot(base, version=2)
    return Case(scene.add(), [base, "newer", "upgrade"], unchanged=[base])


@case
def base_with_an_unknown_feature(scene: Scene) -> Case:
    base = scene.our_base()
    seal_slot(base, incompat=1 << 40)
    return Case(scene.add(), [base, "newer", "upgrade"], unchanged=[base])


@case
def base_of_an_unknown_format(scene: Scene) -> Case:
    base = scene.our_base()
    with open(base, "r+b") as file:
        os.pwrite(file.fileno(), struct.pack("<H", 7), 9)
    return Case(scene.add(), [base, "version"], unchanged=[base])


@case
def base_of_bdev_ubi(scene: Scene) -> Case:
    base = scene.file("base", b"BDEV_UBI\0" + struct.pack("<HHB", 0, 1, 64), size=9 * MIB)
    return Case(scene.add(), [base, "bdev_ubi", "--adopt"], unchanged=[base])


@case
def base_of_bdev_ubi_without_its_stripe_size(scene: Scene) -> Case:
    base = scene.file("base", b"BDEV_UBI\0" + struct.pack("<HHB", 0, 1, 0), size=9 * MIB)
    return Case(scene.add("--adopt"), [base, "--stripe-size"], unchanged=[base])


@case
def another_stripe_size(scene: Scene) -> Case:
    base = scene.our_base()
    return Case(
        scene.add("--stripe-size", "128K"), [base, "64 KiB", "128 KiB", "--stripe-size"],
        unchanged=[base],
    )


@case
def another_image(scene: Scene) -> Case:
    base = scene.our_base()
    other = scene.file("other", b"o" * SIZE)
    return Case(scene.add(image=other), [base, other, "--force"], unchanged=[base])


@case
def another_image_size(scene: Scene) -> Case:
    base = scene.our_base()
    other = scene.file("other", b"o" * (SIZE - 512))
    return Case(
        scene.add("--force", image=other), [base, other, str(SIZE), str(SIZE - 512)],
        unchanged=[base],
    )


# -- names, ids and numbers -----------------------------------------------------------------------

@case
def name_taken(scene: Scene) -> Case:
    live = scene.ubi.add(scene.image, scene.base, size=SIZE)
    other = str(scene.folder / "other")
    return Case(
        scene.add("--name", live.name, base=other), [live.name, "--name", "del"],
        code=5, absent=[other],
    )


@case
def id_taken(scene: Scene) -> Case:
    live = scene.ubi.add(scene.image, scene.base, size=SIZE)
    other = str(scene.folder / "other")
    return Case(
        scene.add("--id", live.id, base=other), [str(live.id), "--id"], code=5, absent=[other],
    )


@case
def id_taken_and_a_base_of_before(scene: Scene) -> Case:
    live = scene.ubi.add(scene.image, scene.folder / "other", size=SIZE)
    base = scene.our_base()
    return Case(scene.add("--id", live.id), [str(live.id), "--id"], code=5, unchanged=[base])


def _usage(scene: Scene, *words: object, says: str) -> Case:
    return Case(scene.add(*words), [says], code=2, absent=[scene.base])


@case
def name_impossible(scene: Scene) -> Case:
    return _usage(scene, "--name", "../x", says="'../x'")


@case
def stripe_size_too_small(scene: Scene) -> Case:
    return _usage(scene, "--stripe-size", "32K", says="32K")


@case
def stripe_size_too_large(scene: Scene) -> Case:
    return _usage(scene, "--stripe-size", "2M", says="2M")


@case
def stripe_size_no_power_of_two(scene: Scene) -> Case:
    return _usage(scene, "--stripe-size", "96K", says="96K")


@case
def size_in_decimal(scene: Scene) -> Case:
    return _usage(scene, "--size", "5GB", says="5GB")


@case
def size_of_no_whole_sectors(scene: Scene) -> Case:
    return _usage(scene, "--size", 2 * MIB + 100, says=str(2 * MIB + 100))


@case
def size_too_small(scene: Scene) -> Case:
    return Case(scene.add("--size", "512K"), [scene.base, "--size"], absent=[scene.base])


@case
def block_size_too_small(scene: Scene) -> Case:
    disk = scene.stores.block("ram", 9 * MIB, sector_size=4096)
    return Case(
        scene.add("--block-size", 512, base=disk), ["--block-size 512", "4096"], unchanged=[disk],
    )


@case
def depth_that_memory_does_not_hold(scene: Scene) -> Case:
    """4 GiB of request buffers where the process may have 3 in all."""
    config = scene.file("config", b'{"data_path": "copy"}')
    return Case(
        scene.add("--depth", 4096, "--stripe-size", "1M", "--config", config),
        ["--depth 4096", "4 GiB", "smaller"],
        prefix=["prlimit", f"--as={3 * GIB}"], absent=[scene.base],
    )


@case
def owner_unknown(scene: Scene) -> Case:
    return _usage(scene, "--owner", "nosuchuser", says="'nosuchuser'")


@case
def no_image(scene: Scene) -> Case:
    return Case(["add", "--base", scene.base], ["--image"], code=2, absent=[scene.base])


@case
def config_with_an_unknown_key(scene: Scene) -> Case:
    path = scene.file("config", b'{"imgae": "x"}')
    return Case(["add", "--config", path], [path, "'imgae'"], code=2)


# -- other commands -------------------------------------------------------------------------------

@case
def del_of_nothing(scene: Scene) -> Case:
    return Case(["del", "nosuchdisk"], ["'nosuchdisk'"], code=4)


@case
def status_of_nothing(scene: Scene) -> Case:
    return Case(["status", "/dev/ublkb77"], ["/dev/ublkb77"], code=4)


@case
def inspect_of_nothing(scene: Scene) -> Case:
    return Case(["inspect", scene.base], [scene.base])


# -- the judge ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", CASES)
def test_refused(scene: Scene, name: str) -> None:
    case = CASES[name](scene)
    before = watch.inventory()
    with assert_unchanged(*case.unchanged):
        outcome = command(case.prefix, case.words)
    assert outcome.code == case.code, outcome
    assert outcome.stdout == ""
    lines = outcome.stderr.splitlines()
    assert len(lines) == 1, outcome.stderr
    assert lines[0].startswith("ublk-ubi: ")
    assert not [word for word in case.says if word not in lines[0]], lines[0]
    assert "Error:" not in lines[0]
    assert "internal" not in lines[0]
    assert not [path for path in case.absent if os.path.lexists(path)]
    assert not watch.leaks(before, set())


def test_what_is_refused_for_its_looks_can_be_insisted_on(scene: Scene) -> None:
    path = scene.file("disk.qcow2", b"QFI\xfb" + os.urandom(SIZE - 4))
    made = scene.ubi.add(path, scene.base, size=SIZE, image_format="raw")
    with made.open(os.O_RDONLY) as disk:
        assert disk.pread(0, SIZE) == Path(path).read_bytes()


def test_force_takes_another_image_of_the_same_size(scene: Scene) -> None:
    base = scene.our_base()
    other = scene.file("other", b"o" * SIZE)
    made = scene.ubi.add(other, base, force=True)
    with made.open(os.O_RDONLY) as disk:
        assert disk.pread(0, 4096) == b"o" * 4096
    made.stop()
    assert ondisk.read_metadata(base).extension.generation == 2
