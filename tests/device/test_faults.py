"""What is wrong below a disk comes, goes and is told; what heals heals by itself."""

from __future__ import annotations

import errno
import os
import random
import re
from typing import TYPE_CHECKING

import pytest
from support.device import RUN_ROOT
from support.guest import BLOCK, fails, flush, read, write
from support.ondisk import DATA_OFFSET, read_metadata
from support.served import FLUSH, serve
from support.shell import run, until
from support.variant import Variant

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.device import Device, Ubi
    from support.images import Image
    from support.mapper import Mapped, Mapper
    from support.undo import Undo

MIB = 1 << 20
STRIPE = 64 << 10
SIZE = 4 * MIB
BLOCKS = SIZE // BLOCK
ROUNDS = int(os.environ.get("UBLK_UBI_FAULT_ROUNDS", "3"))
PER_ROUND = 60


class Record:
    """What each block may hold: one value, or the old and the new where a write has failed."""

    def __init__(self, device: Device, content: bytes, seed: int) -> None:
        self._device = device
        self._rng = random.Random(seed)
        self._may = [{content[at : at + BLOCK]} for at in range(0, SIZE, BLOCK)]
        self.failed = {"read": 0, "write": 0}

    def do_something(self) -> None:
        """One request anywhere; it may fail, and must not lie."""
        block = self._rng.randrange(BLOCKS)
        if self._rng.random() < 0.5:
            try:
                found = read(self._device, block * BLOCK)
            except OSError as error:
                assert error.errno == errno.EIO
                self.failed["read"] += 1
            else:
                assert found in self._may[block], f"block {block}"
                self._may[block] = {found}
            return
        data = self._rng.randbytes(16) * (BLOCK // 16)
        try:
            write(self._device, block * BLOCK, data)
        except OSError as error:
            assert error.errno == errno.EIO
            self.failed["write"] += 1
            self._may[block].add(data)
        else:
            self._may[block] = {data}

    def check(self) -> None:
        """Everything can be read, and is what was written."""
        with self._device.open(os.O_RDONLY) as disk:
            for block, may in enumerate(self._may):
                assert disk.pread(block * BLOCK, BLOCK) in may, f"block {block}"


@pytest.fixture
def image(make_image: Callable[..., Image]) -> Image:
    return make_image(SIZE, on="loop")


@pytest.mark.data_paths("zero-copy", "copy")
@pytest.mark.cpus(2)
def test_what_comes_and_goes_heals(
    ubi: Ubi, image: Image, mapper: Mapper, make_base: Callable[..., str], seed: int,
) -> None:
    """The image dies and comes back, as does a part of the base, while stripes are copied."""
    images, base = mapper.map(image.path), mapper.map(make_base(SIZE, on="loop"))
    device = ubi.add(images.path, base.path, stripe_size=STRIPE, queues=2)
    record = Record(device, image.content, seed)
    rng = random.Random(seed)

    def break_some(disk: Mapped) -> None:
        """Never the metadata: what cannot be made durable there is for test_fdatasync."""
        if disk is images:
            rng.choice([images.error, lambda: images.flakey("error_reads")])()
        else:
            base.error(DATA_OFFSET + rng.randrange(0, SIZE // STRIPE // 2) * STRIPE, SIZE // 4)

    device.hydrate(run=True, rate=MIB)
    for _ in range(ROUNDS):
        for broken in (images, base):
            break_some(broken)
            for _ in range(PER_ROUND):
                record.do_something()
            broken.linear()
            for _ in range(PER_ROUND // 2):
                record.do_something()
    flush(device)
    status = device.status()
    assert (status["state"], status["degraded"]) == ("live", None)
    assert record.failed["read"] > 0
    assert record.failed["write"] > 0
    assert status["io"]["read"]["errors"] == record.failed["read"]
    assert status["io"]["write"]["errors"] == record.failed["write"]
    # Nobody has to do anything for the rest of it.
    device.hydrate(rate="max")
    device.wait_until_independent(60.0)
    record.check()
    assert ubi.command("status", device.name).code == 0
    device.reopen()
    record.check()


def test_bad_sectors_of_the_base(
    ubi: Ubi, image: Image, mapper: Mapper, make_base: Callable[..., str],
) -> None:
    """What the base has and cannot read any more is gone, and only that."""
    base = mapper.map(make_base(SIZE, on="loop"))
    device = ubi.add(image, base.path, stripe_size=STRIPE)
    for stripe in (2, 3):
        write(device, stripe * STRIPE, bytes([stripe]) * STRIPE)
    flush(device)
    base.table(f"0 {base.sectors} dust {base.below} 0 {BLOCK}")
    bad = DATA_OFFSET + 2 * STRIPE + BLOCK
    base.message("addbadblock", bad // BLOCK)
    base.message("enable")
    assert fails(read, device, 2 * STRIPE + BLOCK)
    assert read(device, 2 * STRIPE) == bytes([2]) * BLOCK
    assert read(device, 3 * STRIPE, STRIPE) == bytes([3]) * STRIPE
    flush(device)
    assert device.status()["degraded"] is None
    # A write makes such a sector anew (dm-dust does as disks do).
    write(device, 2 * STRIPE + BLOCK, b"n" * BLOCK)
    assert read(device, 2 * STRIPE + BLOCK) == b"n" * BLOCK
    flush(device)
    assert read_metadata(base.path).hydrated >= {2, 3}


def test_check_counts_what_cannot_be_read(
    ubi: Ubi, image: Image, mapper: Mapper, make_base: Callable[..., str],
) -> None:
    """On the base and on the image; and of a disk that is in use it says so."""
    images, base = mapper.map(image.path), mapper.map(make_base(SIZE, on="loop"))
    device = ubi.add(images.path, base.path, stripe_size=STRIPE)
    device.hydrate(run=True)
    device.wait_until_independent()
    write(device, 5 * STRIPE, b"w" * BLOCK)
    flush(device)
    live = ubi.command("check", base.path, "--image", images.path, "--json")
    assert live.code == 0, live
    assert any("uses it now" in note for note in live.json()["notes"])
    device.stop()

    total = SIZE // STRIPE
    base.error(DATA_OFFSET + 7 * STRIPE, 2 * STRIPE)
    images.table(f"0 {images.sectors} dust {images.below} 0 512")
    images.message("addbadblock", (20 * STRIPE + 512) // 512)
    images.message("enable")
    found = ubi.command("check", base.path, "--image", images.path, "--json")
    assert found.code == 4, found
    counts = found.json()["against_image"]
    assert counts == {"equal": total - 4, "differ": 1, "zeros": 0, "errors": 3}
    assert found.json()["problems"] == ["3 stripes cannot be read"]
    base.error(0, MIB)
    unreadable = ubi.command("check", base.path)
    assert (unreadable.code, unreadable.stderr.count("\n")) == (8, 1), unreadable
    base.linear()
    images.linear()
    assert ubi.command("check", base.path, "--image", images.path).code == 0


# -- what is told ---------------------------------------------------------------------------------

def test_errors_are_told_once_and_counted(
    ubi: Ubi, image: Image, mapper: Mapper, make_base: Callable[..., str], tmp_path: Path,
) -> None:
    variant = Variant(tmp_path / "variant")
    variant.replace("faults.py", "QUIET_S = 10.0", "QUIET_S = 5.0")
    images = mapper.map(image.path)
    with variant.in_use():
        device = ubi.add(images.path, make_base(SIZE), size=SIZE, stripe_size=STRIPE)
    images.error()
    failed = sum(fails(read, device, block * BLOCK) for block in range(200, 260))
    assert failed == 60
    until(lambda: "read requests fail" in device.log(), "it is told")
    images.linear()
    until(lambda: "read requests have not failed for" in device.log(), "it has healed")
    lines = [line.split(" ", 2)[2] for line in device.log().splitlines() if "read req" in line]
    assert lines[0] == "read requests fail"
    [healed] = lines[1:]
    quiet = re.fullmatch(r"read requests have not failed for (\d+) s; 60 did", healed)
    assert quiet, healed
    assert int(quiet[1]) >= 5
    assert ubi.command("status", device.name).code == 0


def test_a_failed_fdatasync_is_in_the_log(
    ubi: Ubi, undo: Undo, make_image: Callable[..., Image],
) -> None:
    base = serve(undo, DATA_OFFSET + SIZE)
    device = ubi.add(make_image(SIZE), base.path, stripe_size=STRIPE, copy_on_read=False)
    base.fail(lambda request: request.kind == FLUSH)
    write(device, 0, b"l" * BLOCK)
    assert fails(flush, device)
    until(lambda: "degraded: " in device.log(), "it is told")
    base.heal()
    [line] = [line for line in device.log().splitlines() if "degraded: " in line]
    assert base.path in line
    assert os.strerror(errno.EIO) in line
    assert ubi.command("status", device.name).code == 3
    assert ubi.command("del", device.name).code == 3
    device.live = False
    device.start(force_stale=True).stop()


# -- no room in /run ------------------------------------------------------------------------------

@pytest.mark.usefixtures("no_watch")
def test_a_full_run_folder_harms_no_disk(
    ubi: Ubi, make_image: Callable[..., Image], make_base: Callable[..., str], undo: Undo,
) -> None:
    """What is new is refused in one line; what is there goes on, and comes back when it died."""
    image = make_image(SIZE)
    device = ubi.add(image, make_base(SIZE), stripe_size=STRIPE, recovery=True)
    write(device, 0, b"w" * BLOCK)
    used = os.statvfs("/run")
    size = (used.f_blocks - used.f_bfree) * used.f_frsize + MIB
    run("mount", "-o", f"remount,size={size}", "/run")
    undo.callback(run, "mount", "-o", "remount,size=50%", "/run")
    filler = RUN_ROOT.parent / "filler"
    undo.callback(filler.unlink, missing_ok=True)
    with filler.open("wb") as file:
        while True:
            try:
                os.write(file.fileno(), bytes(4096))
            except OSError as error:
                assert error.errno == errno.ENOSPC
                break

    refused = ubi.refused(image, make_base(SIZE), code=1)
    assert "/run" in refused
    assert os.strerror(errno.ENOSPC) in refused
    write(device, STRIPE, b"x" * BLOCK)
    flush(device)
    assert ubi.command("status", device.name).code == 0
    device.kill()
    lost = ubi.command("recover", device.name)
    assert (lost.code, lost.stderr.count("\n")) == (1, 1), lost
    filler.unlink()
    back = ubi.command("recover", device.name, "--json")
    assert back.code == 0, back
    device.pid, device.live = back.json()["recovered"][0]["pid"], True
    assert read(device, 0) == b"w" * BLOCK
    assert read(device, STRIPE) == b"x" * BLOCK
