"""Many devices at once, and taking one away from under its users."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
from typing import TYPE_CHECKING

import pytest
from support.background import Background
from support.direct import assert_content
from support.guest import BLOCK, flush, write
from support.load import Record, Writers
from support.ondisk import read_metadata
from support.shell import run, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.device import Device, Outcome, Ubi
    from support.images import Image
    from support.stores import Stores
    from support.undo import Undo

pytestmark = pytest.mark.cpus(2)

MIB = 1 << 20
STRIPE = 64 << 10
SIZE = MIB
MANY = 16


def test_many_at_once(
    ubi: Ubi, make_image: Callable[..., Image], stores: Stores,
) -> None:
    """Two images, sixteen bases, all added together, used together and deleted together."""
    images = [make_image(SIZE), make_image(SIZE - 3 * STRIPE - 512)]
    folder = stores.folder()
    devices = [
        ubi.new(image, folder / f"base{number}", size=SIZE, stripe_size=STRIPE, depth=16)
        for number, image in zip(range(MANY), itertools.cycle(images), strict=False)
    ]
    for device in devices:
        device.begin_start()
    for device in devices:
        device.finish_start()
    assert len({device.node for device in devices}) == MANY
    assert len({device.pid for device in devices}) == MANY
    assert len({os.stat(device.path).st_rdev for device in devices}) == MANY
    listed = ubi.command("list", "--json").json()["devices"]
    assert {entry["name"] for entry in listed} >= {device.name for device in devices}

    def use(number: int) -> None:
        device, mark = devices[number], bytes([number + 1])
        whole, part = number * STRIPE, (number + 7) % MANY * STRIPE + BLOCK
        write(device, whole, mark * STRIPE)
        write(device, part, mark * BLOCK)
        flush(device)
        content = bytearray(images[number % 2].as_disk(SIZE))
        content[whole : whole + STRIPE] = mark * STRIPE
        content[part : part + BLOCK] = mark * BLOCK
        assert_content(device.node, content, device.name)

    for done in [Background(lambda number=number: use(number)) for number in range(MANY)]:
        done.result(60.0)

    def delete(device: Device) -> Outcome:
        return ubi.command("del", device.name)

    halves = devices[: MANY // 2], devices[MANY // 2 :]
    deleting = [Background(lambda device=device: delete(device)) for device in halves[0]]
    assert [deleted.result(60.0).code for deleted in deleting] == [0] * len(halves[0])
    # The rest with one command.
    everything = ubi.command("del", "-a")
    assert everything.code == 0, everything
    assert set(everything.stdout.splitlines()) >= {f"{one.name} deleted" for one in halves[1]}
    for device in devices:
        device.live = False
        assert not os.path.exists(device.path)
        found = read_metadata(device.options["base"])
        assert (found.minor, found.extension.is_open) == (1, False)
    for image in images:
        image.assert_untouched()


def test_names_are_given_once(
    ubi: Ubi, undo: Undo, make_image: Callable[..., Image], stores: Stores,
) -> None:
    """Without --name, all at once: each gets the lowest that is free, none the same."""
    image, folder = make_image(SIZE), stores.folder()
    words = [
        ["add", "--json", "--image", image.path, "--base", folder / f"base{number}"]
        for number in range(4)
    ]
    adding = [Background(lambda words=words: ubi.command(*words)) for words in words]
    answers = [added.result(60.0).json() for added in adding]
    names = [answer["name"] for answer in answers]
    undo.callback(ubi.command, "del", *names, "--force", "--if-exists")
    assert sorted(names) == ["ubi0", "ubi1", "ubi2", "ubi3"]
    assert len({answer["device"] for answer in answers}) == 4
    assert ubi.command("del", names[1]).code == 0
    assert ubi.command(*words[1]).json()["name"] == names[1]
    assert ubi.command("del", *names).code == 0


@pytest.fixture
def fio(undo: Undo) -> Callable[..., subprocess.Popen[str]]:
    """Give a function that starts fio on a device, writing at random for a minute."""

    def start(device: Device) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            ["fio", "--name=load", f"--filename={device.node}", "--rw=randrw", "--bs=4k",
             "--direct=1", "--ioengine=io_uring", "--iodepth=16", "--time_based", "--runtime=60",
             "--norandommap", "--output-format=json", "--fsync=64"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/tmp",
        )
        undo.callback(end, process)
        until(lambda: device.status()["io"]["write"]["count"] > 50, "fio is under way")
        return process

    def end(process: subprocess.Popen[str]) -> None:
        process.kill()
        process.communicate()

    return start


def test_del_under_fio(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str],
    fio: Callable[..., subprocess.Popen[str]],
) -> None:
    device = ubi.add(
        make_image(SIZE), make_base(SIZE), size=SIZE, stripe_size=STRIPE, queues=2,
    )
    process = fio(device)
    refused = ubi.command("del", device.name)
    assert (refused.code, refused.stdout) == (5, "")
    assert refused.stderr.count("\n") == 1
    assert device.name in refused.stderr
    assert "fio" in refused.stderr
    assert "--force" in refused.stderr
    assert process.poll() is None
    assert device.status()["state"] == "live"

    device.stop(force=True)
    stdout, _ = process.communicate(timeout=30.0)
    job = json.loads(stdout[stdout.index("{") :])["jobs"][0]
    assert job["error"] != 0, "the disk was taken away under its user, who is told"
    found = read_metadata(device.options["base"])
    assert (found.minor, found.extension.is_open) == (1, False)
    device.start()
    assert device.status()["stripes"]["committed"] == len(found.hydrated)


def test_forced_del_keeps_what_was_completed(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str], seed: int,
) -> None:
    image = make_image(SIZE)
    device = ubi.add(image, make_base(SIZE), size=SIZE, stripe_size=STRIPE)
    record = Record(image.content, SIZE, STRIPE)
    number = 1
    for turn in range(2):
        writers = Writers(device, record, threads=3, seed=seed + 10 * turn, first=number)
        writers.wait_for(random.Random(seed + turn).randrange(50, 300))
        device.stop(force=True)
        writers.join()
        number = writers.next_number
        assert not read_metadata(device.options["base"]).extension.is_open
        device.start()
        record.check(device)


@pytest.fixture
def mounted(
    ubi: Ubi, undo: Undo, make_image: Callable[..., Image], make_base: Callable[..., str],
    stores: Stores,
) -> tuple[Device, str]:
    """A device with a filesystem, and where it is mounted."""
    device = ubi.add(make_image(SIZE), make_base(16 * MIB), size=16 * MIB)
    run("mkfs.ext4", "-q", "-F", device.node)
    point = stores.folder("tmpfs") / "point"
    point.mkdir()
    run("mount", device.node, point)
    undo.callback(lambda: os.path.ismount(point) and run("umount", "-l", point))
    return device, str(point)


def test_del_of_a_mounted_disk(ubi: Ubi, mounted: tuple[Device, str]) -> None:
    device, point = mounted
    with open(f"{point}/file", "w") as file:
        file.write("kept\n")
        file.flush()
        os.fsync(file.fileno())
    refused = ubi.command("del", device.name)
    assert (refused.code, refused.stdout) == (5, "")
    assert point in refused.stderr
    assert "umount" in refused.stderr
    assert "--force" in refused.stderr

    device.stop(force=True)
    assert not os.path.exists(device.node)
    with pytest.raises(OSError, match="error"), open(f"{point}/other", "w"):
        pass
    run("umount", point)
    assert not read_metadata(device.options["base"]).extension.is_open
    device.start()
    run("mount", device.node, point)

    # A dead daemon's disk goes by itself; that it is mounted still is in nobody's way.
    device.kill()
    until(lambda: not os.path.exists(device.node), "the kernel has taken the disk away")
    assert ubi.command("del", device.name).code == 0
    device.start()
    run("umount", point)
    run("mount", device.node, point)
    with open(f"{point}/file") as found:
        assert found.read() == "kept\n"
    run("umount", point)
