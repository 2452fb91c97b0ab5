"""What a completed flush or FUA write promises, read off the base while the device runs."""

from __future__ import annotations

import os
import threading

import pytest
from support import ondisk
from support.blockstat import flushes_of
from support.direct import DirectFile, assert_content
from support.shell import until

KIB, MIB = 1 << 10, 1 << 20
STRIPE = 64 * KIB
DURABLE = os.O_RDWR | os.O_DSYNC


@pytest.fixture
def cold(ubi, make_image, make_base):
    """(device, base, image): 4 MiB of cold stripes."""
    image = make_image(4 * MIB)
    base = make_base(0)
    return ubi.add(image, base, stripe_size=STRIPE, copy_on_read=False), base, image


def test_a_flush_of_nothing(cold):
    device, _, _ = cold
    with device.open() as disk:
        for _ in range(5):
            disk.fsync()
    status = device.status()
    assert status["io"]["flush"]["count"] == 5
    assert status["io"]["flush"]["errors"] == 0
    assert status["queue_syncs"] == 5, "each is one fdatasync of the base"
    assert status["commit"]["rounds"] == 0, "and no round: there is nothing to commit"


@pytest.mark.data_paths("zero-copy", "copy")
def test_flushes_reach_the_disk_under_the_base(ubi, make_image, make_base):
    image = make_image(2 * MIB)
    base = make_base(2 * MIB, on="ubd")
    device = ubi.add(image, base, stripe_size=STRIPE, copy_on_read=False)
    with device.open() as disk, device.open(DURABLE) as durable:
        before = flushes_of(base)
        disk.fsync()
        assert flushes_of(base) >= before + 1

        before = flushes_of(base)
        durable.pwrite(b"\1" * 512, 0)
        assert flushes_of(base) >= before + 2, "data, then header bit"

        before = flushes_of(base)
        durable.pwrite(b"\2" * 512, 0)
        assert flushes_of(base) >= before + 1, "the stripe is durable: its data alone"


@pytest.mark.data_paths("zero-copy", "copy")
def test_after_fsync_the_bits_are_set(cold):
    """Stripe by stripe, so fast that no tick could have done it."""
    device, base, _ = cold
    with device.open() as disk:
        for count, stripe in enumerate(range(0, 64, 4), start=1):
            disk.pwrite(bytes([count]) * 512, stripe * STRIPE + 1024)
            disk.fsync()
            bits = ondisk.read_bits(base, 64)
            assert bits == set(range(0, stripe + 1, 4))
    status = device.status()
    assert status["stripes"]["committed"] == 16
    assert status["io"]["flush"]["count"] == 16


@pytest.mark.data_paths("zero-copy", "copy")
@pytest.mark.parametrize("length", [512, STRIPE, 3 * STRIPE])
def test_after_a_durable_write_the_bits_are_set(cold, length):
    device, base, _ = cold
    wide = length // STRIPE or 1
    written: set[int] = set()
    with device.open(DURABLE) as disk:
        for stripe in range(0, 60, 2 * wide):
            disk.pwrite(bytes([stripe + 1]) * length, stripe * STRIPE)
            written |= set(range(stripe, stripe + wide))
            assert ondisk.read_bits(base, 64) == written
            assert device.stripes()["committed"] == len(written)
    status = device.status()
    assert status["commit"]["joined"] > 0
    assert status["commit"]["errors"] == 0
    assert status["hydration"]["whole_stripe_writes"] == (len(written) if length >= STRIPE else 0)


@pytest.mark.data_paths("zero-copy", "copy")
def test_a_durable_write_where_all_is_durable_needs_no_round(cold):
    device, _, _ = cold
    with device.open(DURABLE) as disk:
        disk.pwrite(b"\1" * 512, 0)
        before = device.status()
        for number in range(10):
            disk.pwrite(bytes([number]) * 512, 512 * number)
    after = device.status()
    assert after["commit"]["rounds"] == before["commit"]["rounds"]
    assert after["io"]["write"]["count"] == before["io"]["write"]["count"] + 10


def test_without_a_flush_the_tick_commits(cold):
    device, base, _ = cold
    with device.open() as disk:
        disk.pwrite(b"\1" * STRIPE, 0)
        disk.pwrite(b"\2" * 512, 7 * STRIPE)
        until(lambda: ondisk.read_bits(base, 64) == {0, 7}, "the tick commits", timeout_s=5.0)
    until(lambda: device.stripes()["committed"] == 2, "the daemon knows it")
    assert device.status()["io"]["flush"]["count"] == 0


@pytest.mark.data_paths("zero-copy", "copy")
@pytest.mark.parametrize("queues", [1, 2])
def test_a_flush_covers_what_was_complete_before_it(ubi, make_image, make_base, queues):
    """Writers go through cold stripes while flushes come one after the other, and while others
    write with O_DSYNC: at each return the base must have the bits of all that it covers."""
    stripes, writers = 240, 6
    image = make_image(stripes * STRIPE, holes=0.9)
    base = make_base(0)
    device = ubi.add(image, base, stripe_size=STRIPE, copy_on_read=False, queues=queues)
    complete: set[int] = set()
    failures: list[str] = []
    ended = threading.Event()

    def write(number: int) -> None:
        durable = number % 3 == 0
        with device.open(DURABLE if durable else os.O_RDWR) as disk, base_file() as metadata:
            for stripe in range(number, stripes, writers):
                length = STRIPE if stripe % 5 == 0 else 512
                disk.pwrite(bytes([stripe % 251 + 1]) * length, stripe * STRIPE)
                complete.add(stripe)
                if durable and stripe not in ondisk.bits_of(metadata, stripes):
                    failures.append(f"O_DSYNC write of stripe {stripe} returned without its bit")

    def flush() -> None:
        with device.open() as disk, base_file() as metadata:
            while not ended.is_set():
                covered = set(complete)
                disk.fsync()
                missing = covered - ondisk.bits_of(metadata, stripes)
                if missing:
                    failures.append(f"a flush returned without the bits of {sorted(missing)}")

    def base_file() -> DirectFile:
        return DirectFile(base, os.O_RDONLY)

    flushers = [threading.Thread(target=flush) for _ in range(2)]
    tasks = [threading.Thread(target=write, args=(number,)) for number in range(writers)]
    for thread in (*flushers, *tasks):
        thread.start()
    for thread in tasks:
        thread.join()
    ended.set()
    for thread in flushers:
        thread.join()

    assert not failures, failures[:5]
    assert complete == set(range(stripes)), "a writer failed"
    status = device.status()
    assert status["stripes"]["hydrated"] == stripes
    assert status["io"]["flush"]["errors"] == status["io"]["write"]["errors"] == 0
    expected = bytearray(image.content)
    for stripe in range(stripes):
        length = STRIPE if stripe % 5 == 0 else 512
        expected[stripe * STRIPE : stripe * STRIPE + length] = bytes([stripe % 251 + 1]) * length
    assert_content(device.node, expected, "the disk")
