"""The ring: registered requests, zeroing, discarding, short transfers, letting go of the image."""

from __future__ import annotations

import errno
import itertools
import os
import random
import time
from typing import TYPE_CHECKING

import pytest
from enginekit.rings import STRIPE, files, ring, settle, user_data

from ublk_ubi import _testing as t

if TYPE_CHECKING:
    from pathlib import Path

EIO = errno.EIO
MAX_RETRIES = 100
OFFSET = (1 << 42) + 4096
# From the kernel's io_uring.h, falloc.h and blkdev.h.
OP_READ_FIXED, OP_WRITE_FIXED, OP_FALLOCATE, OP_READ, OP_WRITE, OP_URING_CMD = 4, 5, 17, 22, 23, 46
FIXED_FILE, RWF_DSYNC = 1, 2
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
BLOCK_URING_CMD_DISCARD = 0x1200
# Where the benches' zeros are: their own memory, which nobody writes here.
ZEROS_AT = 0


@pytest.fixture(autouse=True)
def _io_uring() -> None:
    try:
        ring()
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EPERM):
            pytest.skip("io_uring is not allowed here: run it in tools/lab")
        raise


def base_ring(*, is_block: bool = False, block: int = 512, zeros_bytes: int = STRIPE,
              only_writes: bool = False, **options) -> t.RingBench:
    r = ring(**options)
    r.describe_base(is_block=is_block, block=block, zeros_at=ZEROS_AT, zeros_bytes=zeros_bytes,
                    only_writes=only_writes)
    return r


def fallocated(sqe: t.Sqe) -> tuple[int, int, int]:
    """Take a fallocate apart: mode, offset, length."""
    assert (sqe.opcode, sqe.flags, sqe.fd) == (OP_FALLOCATE, FIXED_FILE, t.FILE_BASE)
    return sqe.length, sqe.offset, sqe.address


# -- registered requests --------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "opcode", "file"), [
    (t.ACT_READ_IMAGE, OP_READ_FIXED, t.FILE_IMAGE), (t.ACT_READ_BASE, OP_READ_FIXED, t.FILE_BASE),
    (t.ACT_WRITE_BASE, OP_WRITE_FIXED, t.FILE_BASE),
])
def test_a_registered_requests_pages_are_addressed_from_zero(kind, opcode, file) -> None:
    """The kernel has put them into the slot of the tag; they have no address of ours."""
    r = ring()
    assert r.register_requests(bytes([0, 0, 1])) == 0
    r.action(kind, token=1, memory=t.MEM_REQUEST, index=2, offset=OFFSET, length=STRIPE)
    assert r.op_done(1, 4096) is None
    assert r.op_done(1, 1024 + 100) is None
    assert r.op_done(1, STRIPE - 4096 - 1024) == STRIPE
    assert r.pending() == [
        t.Sqe(opcode, FIXED_FILE, file, OFFSET + done, done or None, STRIPE - done, 0,
              user_data(t.CQE_OP, 1), buffer=2)
        for done in (0, 4096, 4096 + 1024)
    ]


def test_what_the_kernel_did_not_register_goes_through_the_tags_buffer() -> None:
    r = ring()
    r.register_requests(bytes([1, 0]))
    for index, kind in itertools.product((0, 1), (t.ACT_READ_IMAGE, t.ACT_WRITE_BASE)):
        r.action(kind, token=index, memory=t.MEM_REQUEST, index=index, length=512)
        r.op_done(index, 512)
    at = t.MEM_REQUEST * r.area + STRIPE
    assert [(sqe.opcode, sqe.address) for sqe in r.pending()] == [
        (OP_READ_FIXED, None), (OP_WRITE_FIXED, None), (OP_READ, at), (OP_WRITE, at)]


@pytest.mark.parametrize("memory", [t.MEM_STRIPE, t.MEM_PAGE, t.MEM_SCRATCH])
def test_only_requests_are_registered(memory: int) -> None:
    r = ring()
    r.register_requests(bytes([1, 1]))
    r.action(t.ACT_READ_BASE, token=0, memory=memory, index=1, length=512)
    (sqe,) = r.pending()
    assert (sqe.opcode, sqe.address) == (OP_READ, memory * r.area + STRIPE)


def test_a_write_from_registered_pages_may_be_durable() -> None:
    r = ring()
    r.register_requests(bytes([1]))
    r.action(t.ACT_WRITE_BASE, token=0, memory=t.MEM_REQUEST, length=1024, dsync=1)
    r.op_done(0, 512)
    assert [(sqe.opcode, sqe.rw_flags) for sqe in r.pending()] == [(OP_WRITE_FIXED, RWF_DSYNC)] * 2


def test_a_slot_without_pages_is_an_error_and_its_neighbour_works(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(STRIPE)
    with files(tmp_path, image=data, base_bytes=STRIPE) as fds:
        r = ring(**fds)
        assert r.register_requests(bytes([1, 0])) == 0
        r.action(t.ACT_READ_IMAGE, token=0, memory=t.MEM_REQUEST, index=0, length=STRIPE)
        r.action(t.ACT_READ_IMAGE, token=1, memory=t.MEM_REQUEST, index=1, length=STRIPE)
        assert settle(r, 0, 1) == {0: -errno.EFAULT, 1: STRIPE}
        at = t.MEM_REQUEST * r.area + STRIPE
        assert r.memory[at : at + STRIPE] == data


# -- short transfers ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [t.ACT_READ_IMAGE, t.ACT_READ_BASE, t.ACT_WRITE_BASE])
@pytest.mark.parametrize("registered", [False, True])
def test_short_transfers_go_on_at_a_block_of_the_base(kind: int, registered: bool) -> None:
    """4Kn: direct I/O begins at 4 KiB only."""
    r = base_ring(block=4096)
    if registered:
        r.register_requests(bytes([1]))
    r.action(kind, token=0, memory=t.MEM_REQUEST, offset=OFFSET, length=STRIPE)
    assert r.op_done(0, 4096 + 512) is None
    assert r.op_done(0, 8191) is None
    first, *rest = r.pending()
    assert [(sqe.offset, sqe.length, (sqe.address or 0) - (first.address or 0))
            for sqe in rest] == [
        (OFFSET + 4096, STRIPE - 4096, 4096), (OFFSET + 8192, STRIPE - 8192, 8192)]
    assert r.op_done(0, 4095) == -EIO


# -- zeroing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("is_block", "unmap", "mode"), [
    (False, True, PUNCH_HOLE), (False, False, ZERO_RANGE), (True, True, ZERO_RANGE),
    (True, False, ZERO_RANGE),
])
@pytest.mark.parametrize("memory", [t.MEM_REQUEST, t.MEM_STRIPE])
def test_how_a_range_is_zeroed(is_block: bool, unmap: bool, mode: int, memory: int) -> None:
    """Only a file gives up space; a block device could answer a discard with anything."""
    r = base_ring(is_block=is_block)
    r.register_requests(bytes([1]))
    r.action(t.ACT_ZERO_BASE, token=3, memory=memory, offset=OFFSET, length=STRIPE, unmap=unmap)
    (sqe,) = r.pending()
    assert fallocated(sqe) == (mode | KEEP_SIZE, OFFSET, STRIPE)
    assert sqe.user_data == user_data(t.CQE_OP, 3)
    assert r.op_done(3, 0) == 0


def test_what_a_base_cannot_do_is_learned() -> None:
    r = base_ring()
    zero = {"offset": OFFSET, "length": STRIPE, "memory": t.MEM_REQUEST}
    r.action(t.ACT_ZERO_BASE, token=0, unmap=1, **zero)
    r.action(t.ACT_ZERO_BASE, token=1, unmap=1, **zero)
    assert r.op_done(0, -errno.EOPNOTSUPP) is None
    assert r.op_done(1, -errno.EOPNOTSUPP) is None   # was under way, too
    assert r.op_done(0, 0) == 0
    r.action(t.ACT_ZERO_BASE, token=2, unmap=1, **zero)
    modes = [fallocated(sqe)[0] for sqe in r.pending()]
    assert modes == [PUNCH_HOLE | KEEP_SIZE] * 2 + [ZERO_RANGE | KEEP_SIZE] * 3
    assert r.op_done(1, -errno.EOPNOTSUPP) is None
    r.action(t.ACT_ZERO_BASE, token=3, unmap=0, **zero)
    *_, written, next_one = r.pending()
    assert [(sqe.opcode, sqe.fd, sqe.offset, sqe.address, sqe.length)
            for sqe in (written, next_one)] == [(OP_WRITE, t.FILE_BASE, OFFSET, ZEROS_AT or 0,
                                                 STRIPE)] * 2
    # There is no other way then.
    assert r.op_done(1, -errno.EOPNOTSUPP) == -errno.EOPNOTSUPP
    assert r.op_done(3, STRIPE) == STRIPE


def test_a_file_that_cannot_punch_may_do_so_with_a_discard() -> None:
    """What was learned of zeroing is not asked of discards, which succeed in any case."""
    r = base_ring()
    r.action(t.ACT_ZERO_BASE, token=0, length=STRIPE, unmap=1)
    r.op_done(0, -errno.EOPNOTSUPP)
    r.action(t.ACT_DISCARD_BASE, token=1, length=STRIPE)
    assert fallocated(r.pending()[-1])[0] == PUNCH_HOLE | KEEP_SIZE


def writing_zeros(length: int, *, block: int = 512, zeros_bytes: int = STRIPE) -> t.RingBench:
    r = base_ring(block=block, zeros_bytes=zeros_bytes, entries=64)
    r.action(t.ACT_ZERO_BASE, token=0, offset=OFFSET, length=length)
    assert r.op_done(0, -errno.EOPNOTSUPP) is None
    return r


def pieces(r: t.RingBench) -> list[tuple[int, int]]:
    """Give offset and length of the writes of zeros; all are from the same zeros."""
    _, *writes = r.pending()
    assert {(sqe.opcode, sqe.fd, sqe.flags, sqe.address, sqe.rw_flags) for sqe in writes} == {
        (OP_WRITE, t.FILE_BASE, FIXED_FILE, ZEROS_AT, 0)}
    return [(sqe.offset - OFFSET, sqe.length) for sqe in writes]


def test_zeros_are_written_in_pieces() -> None:
    r = writing_zeros(2 * STRIPE + 1024)
    assert r.op_done(0, STRIPE) is None
    assert r.op_done(0, STRIPE) is None
    assert r.op_done(0, 1024) == 2 * STRIPE + 1024
    assert pieces(r) == [(0, STRIPE), (STRIPE, STRIPE), (2 * STRIPE, 1024)]


@pytest.mark.parametrize("block", [512, 4096])
def test_zeros_that_were_written_in_part_go_on_at_a_block(block: int) -> None:
    r = writing_zeros(STRIPE, block=block, zeros_bytes=8192)
    assert r.op_done(0, 5000) is None
    assert r.op_done(0, -errno.EINTR) is None
    assert r.op_done(0, block) is None
    at = 5000 - 5000 % block
    assert pieces(r) == [(0, 8192), (at, 8192), (at, 8192), (at + block, 8192)]
    assert r.op_done(0, block - 1) == -EIO


def test_zeros_that_do_not_move_are_an_error() -> None:
    assert writing_zeros(STRIPE).op_done(0, 0) == -EIO
    assert writing_zeros(STRIPE).op_done(0, -errno.ENOSPC) == -errno.ENOSPC


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EINVAL, errno.EBADF,
                                   errno.ENOSYS, errno.EPERM, errno.ENODEV])
@pytest.mark.parametrize("unmap", [0, 1])
def test_other_errors_of_zeroing_are_told(error: int, unmap: int) -> None:
    """Also those that a discard would shrug at: the range may hold anything."""
    r = base_ring()
    r.action(t.ACT_ZERO_BASE, token=0, length=STRIPE, unmap=unmap)
    assert r.op_done(0, -error) == -error
    assert len(r.pending()) == 1


# -- discarding -----------------------------------------------------------------------------------


def test_a_discard_of_a_file_is_a_hole() -> None:
    r = base_ring()
    length = (1 << 31) - 512
    r.action(t.ACT_DISCARD_BASE, token=2, offset=OFFSET, length=length)
    (sqe,) = r.pending()
    assert fallocated(sqe) == (PUNCH_HOLE | KEEP_SIZE, OFFSET, length)
    assert sqe.user_data == user_data(t.CQE_OP, 2)
    assert r.op_done(2, 0) == 0


def test_a_discard_of_a_block_device_is_its_own_command() -> None:
    """block/ioctl.c, blkdev_uring_cmd: start in addr, length in addr3, all else zero."""
    r = base_ring(is_block=True)
    length = (1 << 31) - 512
    r.action(t.ACT_DISCARD_BASE, token=2, offset=OFFSET, length=length)
    assert r.pending() == [
        t.Sqe(OP_URING_CMD, FIXED_FILE, t.FILE_BASE, BLOCK_URING_CMD_DISCARD, OFFSET, 0, 0,
              user_data(t.CQE_OP, 2), addr3=length)]
    assert r.op_done(2, 0) == 0


@pytest.mark.parametrize("is_block", [False, True])
@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.ENOSYS])
def test_a_discard_that_the_base_cannot_do_has_succeeded(is_block: bool, error: int) -> None:
    r = base_ring(is_block=is_block)
    for _ in range(2):
        r.action(t.ACT_DISCARD_BASE, token=0, length=STRIPE)
        assert r.op_done(0, -error) == 0
    assert len(r.pending()) == 2


@pytest.mark.parametrize("is_block", [False, True])
def test_a_discard_that_fails_is_told(is_block: bool) -> None:
    for error in (errno.EIO, errno.ENOSPC, errno.EBADF, errno.EREMOTEIO):
        r = base_ring(is_block=is_block)
        r.action(t.ACT_DISCARD_BASE, token=0, length=STRIPE)
        assert r.op_done(0, -error) == -error


@pytest.mark.parametrize("kind", [t.ACT_DISCARD_BASE, t.ACT_ZERO_BASE])
@pytest.mark.parametrize("error", [errno.EINTR, errno.EAGAIN])
def test_interruptions_are_retried_a_bounded_number_of_times(kind: int, error: int) -> None:
    r = base_ring(entries=256)
    r.action(kind, token=0, offset=OFFSET, length=STRIPE)
    for _ in range(MAX_RETRIES):
        assert r.op_done(0, -error) is None
    assert r.op_done(0, -error) == -EIO
    assert len(r.pending()) == 1 + MAX_RETRIES
    assert len(set(r.pending())) == 1


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.ENOSYS])
def test_nothing_else_that_cannot_be_done_has_succeeded(error: int) -> None:
    for kind in (t.ACT_READ_IMAGE, t.ACT_READ_BASE, t.ACT_WRITE_BASE, t.ACT_SYNC_BASE):
        r = base_ring()
        r.action(kind, token=0, memory=t.MEM_STRIPE, length=STRIPE)
        assert r.op_done(0, -error) == -error


# -- on real files --------------------------------------------------------------------------------


@pytest.mark.parametrize("unmap", [0, 1])
@pytest.mark.parametrize("lacking", [False, True])
def test_a_real_file_is_zeroed_and_nothing_beside(tmp_path: Path, unmap: int, lacking) -> None:
    data = random.Random(unmap).randbytes(4 * STRIPE)
    with files(tmp_path, base_bytes=0) as fds:
        os.pwrite(fds["base"], data, 0)
        os.fsync(fds["base"])
        before = os.fstat(fds["base"]).st_blocks
        r = base_ring(zeros_bytes=8192, only_writes=lacking, **fds)
        r.action(t.ACT_ZERO_BASE, token=0, offset=STRIPE, length=2 * STRIPE, unmap=unmap)
        (result,) = settle(r, 0).values()
        assert result == 2 * STRIPE or (result == 0 and not lacking)
        os.fsync(fds["base"])
        after = os.fstat(fds["base"])
    assert (tmp_path / "base").read_bytes() == data[:STRIPE] + bytes(2 * STRIPE) + data[3 * STRIPE:]
    assert after.st_size == 4 * STRIPE
    if not lacking and unmap:
        assert after.st_blocks <= before - 2 * STRIPE // 512


def test_a_real_files_hole_is_not_filled_by_zeroing_it_with_unmap(tmp_path: Path) -> None:
    """Image holes cost no space on the base."""
    with files(tmp_path, base_bytes=4 * STRIPE) as fds:
        r = base_ring(**fds)
        r.action(t.ACT_ZERO_BASE, token=0, length=4 * STRIPE, unmap=1)
        assert settle(r, 0) == {0: 0}
        assert os.fstat(fds["base"]).st_blocks == 0


def test_a_real_file_is_discarded(tmp_path: Path) -> None:
    with files(tmp_path) as fds:
        os.pwrite(fds["base"], b"x" * 4 * STRIPE, 0)
        os.fsync(fds["base"])
        before = os.fstat(fds["base"]).st_blocks
        r = base_ring(**fds)
        r.action(t.ACT_DISCARD_BASE, token=0, offset=STRIPE, length=STRIPE)
        assert settle(r, 0) == {0: 0}
        assert os.fstat(fds["base"]).st_blocks <= before - STRIPE // 512
        assert os.fstat(fds["base"]).st_size == 4 * STRIPE
        assert os.pread(fds["base"], STRIPE, 0) == b"x" * STRIPE
        assert os.pread(fds["base"], STRIPE, 2 * STRIPE) == b"x" * STRIPE


def test_a_discard_of_a_file_that_is_none_has_succeeded(tmp_path: Path) -> None:
    """A character device knows neither holes nor the block device's command."""
    with files(tmp_path) as fds:
        os.close(fds["base"])
        fds["base"] = os.open("/dev/zero", os.O_RDWR)
        for is_block in (False, True):
            r = base_ring(is_block=is_block, **fds)
            r.action(t.ACT_DISCARD_BASE, token=0, length=STRIPE)
            result = settle(r, 0)[0]
            assert result == 0 or (not is_block and result == -errno.ENODEV)


# -- letting go of the image ----------------------------------------------------------------------


def test_an_image_that_was_dropped_cannot_be_read_and_the_base_can(tmp_path: Path) -> None:
    with files(tmp_path, image=b"i" * STRIPE, base_bytes=STRIPE) as fds:
        r = ring(**fds)
        r.action(t.ACT_READ_IMAGE, token=0, memory=t.MEM_REQUEST, length=STRIPE)
        assert settle(r, 0) == {0: STRIPE}
        r.drop_image()
        r.action(t.ACT_READ_IMAGE, token=0, memory=t.MEM_REQUEST, length=STRIPE)
        r.action(t.ACT_READ_BASE, token=1, memory=t.MEM_STRIPE, length=STRIPE)
        r.action(t.ACT_WRITE_BASE, token=2, memory=t.MEM_STRIPE, index=1, length=STRIPE)
        r.action(t.ACT_SYNC_BASE, token=3)
        assert settle(r, 0, 1, 2, 3) == {0: -errno.EBADF, 1: STRIPE, 2: STRIPE, 3: 0}


def test_nobody_holds_an_image_that_was_dropped(tmp_path: Path) -> None:
    """It may be deleted, and its filesystem unmounted."""
    reading, writing = os.pipe()
    with files(tmp_path) as fds:
        os.close(fds["image"])
        fds["image"] = os.dup(reading)
        r = ring(**fds)
        os.close(reading)
        os.close(fds.pop("image"))
        os.write(writing, b"somebody has the other end")
        r.drop_image()
        deadline = time.monotonic() + 10
        with pytest.raises(BrokenPipeError):
            while time.monotonic() < deadline:
                os.write(writing, b"x")
                time.sleep(0.01)
        os.close(writing)


def test_a_read_under_way_ends_though_the_image_was_dropped(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with files(tmp_path) as fds:
        os.close(fds["image"])
        fds["image"] = reading
        r = ring(**fds)
        r.action(t.ACT_READ_IMAGE, token=0, memory=t.MEM_REQUEST, length=4096)
        r.enter()
        assert r.cqes() == []
        r.drop_image()
        r.enter()
        assert r.cqes() == []
        os.write(writing, b"i" * 4096)
        assert settle(r, 0) == {0: 4096}
        assert r.memory[t.MEM_REQUEST * r.area :][:4096] == b"i" * 4096
        os.close(writing)
