"""The ring: what an action asks of the kernel, and what becomes of the kernel's answers.

SQEs are looked at before they are submitted, answers are made up where the kernel would not give
them; then the same on real files.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import struct
import threading
import time
from typing import TYPE_CHECKING

import pytest
from enginekit.forked import broken_invariant
from enginekit.rings import STRIPE, files, ring, settle, user_data

from ublk_ubi import _testing as t

if TYPE_CHECKING:
    from pathlib import Path

KIB = 1 << 10
EIO = errno.EIO
MAX_RETRIES = 100
# From the kernel's io_uring.h and fs.h.
IORING_OP_FSYNC, IORING_OP_READ, IORING_OP_WRITE = 3, 22, 23
IORING_OP_MSG_RING, IORING_OP_URING_CMD = 40, 46
IOSQE_FIXED_FILE, IOSQE_CQE_SKIP_SUCCESS = 1, 64
IORING_FSYNC_DATASYNC, RWF_DSYNC = 1, 2
SYS_IO_URING_REGISTER, IORING_REGISTER_IOWQ_MAX_WORKERS = 427, 19
FILES = 4
KINDS = {"image": t.ACT_READ_IMAGE, "base": t.ACT_READ_BASE, "write": t.ACT_WRITE_BASE,
         "sync": t.ACT_SYNC_BASE}


@pytest.fixture(autouse=True)
def _io_uring() -> None:
    try:
        ring()
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EPERM):
            pytest.skip("io_uring is not allowed here: run it in tools/lab")
        raise


# -- what is asked of the kernel ------------------------------------------------------------------


@pytest.mark.parametrize("ops", [4, 133])
def test_a_stuck_image_leaves_a_worker_to_the_base(ops: int) -> None:
    """Blocked reads take a worker each: there is one more than all of them take."""
    r = ring(ops=ops)
    workers = (ctypes.c_uint32 * 2)()      # 0, 0: leave them, and tell what they are
    status = ctypes.CDLL(None, use_errno=True).syscall(
        SYS_IO_URING_REGISTER, r.fd, IORING_REGISTER_IOWQ_MAX_WORKERS, workers, len(workers),
    )
    assert status == 0, os.strerror(ctypes.get_errno())
    # Of files, and of what cannot be polled.
    assert list(workers) == [ops + 1, ops + 1]


def test_the_sqe_of_every_action() -> None:
    r = ring()
    offset = 8 * KIB
    common = {"memory": t.MEM_STRIPE, "index": 1, "offset": offset, "length": STRIPE}
    r.action(t.ACT_READ_IMAGE, token=0, **common)
    r.action(t.ACT_READ_BASE, token=1, **(common | {"memory": t.MEM_REQUEST, "length": 512}))
    r.action(t.ACT_WRITE_BASE, token=2, **(common | {"memory": t.MEM_PAGE, "index": 0}))
    r.action(t.ACT_SYNC_BASE, token=3)
    at = {memory: memory * r.area for memory in (t.MEM_REQUEST, t.MEM_STRIPE, t.MEM_PAGE)}
    assert r.pending() == [
        t.Sqe(IORING_OP_READ, IOSQE_FIXED_FILE, t.FILE_IMAGE, offset, at[t.MEM_STRIPE] + STRIPE,
              STRIPE, 0, user_data(t.CQE_OP, 0)),
        t.Sqe(IORING_OP_READ, IOSQE_FIXED_FILE, t.FILE_BASE, offset, at[t.MEM_REQUEST] + STRIPE,
              512, 0, user_data(t.CQE_OP, 1)),
        t.Sqe(IORING_OP_WRITE, IOSQE_FIXED_FILE, t.FILE_BASE, offset, at[t.MEM_PAGE], STRIPE, 0,
              user_data(t.CQE_OP, 2)),
        t.Sqe(IORING_OP_FSYNC, IOSQE_FIXED_FILE, t.FILE_SYNC, 0, None, 0, IORING_FSYNC_DATASYNC,
              user_data(t.CQE_OP, 3)),
    ]


def test_only_a_write_that_asks_for_it_is_dsync() -> None:
    r = ring()
    r.action(t.ACT_WRITE_BASE, token=0, memory=t.MEM_REQUEST, length=512, dsync=1)
    r.action(t.ACT_WRITE_BASE, token=1, memory=t.MEM_REQUEST, length=512)
    # It is asked for again with every piece that follows.
    assert r.op_done(0, 0) == -EIO
    r.action(t.ACT_WRITE_BASE, token=0, memory=t.MEM_REQUEST, length=1024, dsync=1)
    assert r.op_done(0, 512) is None
    assert [sqe.rw_flags for sqe in r.pending()] == [RWF_DSYNC, 0, RWF_DSYNC, RWF_DSYNC]


def test_offsets_beyond_four_gigabytes() -> None:
    r = ring()
    far = (1 << 42) + 512
    r.action(t.ACT_WRITE_BASE, token=0, memory=t.MEM_REQUEST, offset=far, length=1024)
    r.op_done(0, 512)
    assert [sqe.offset for sqe in r.pending()] == [far, far + 512]


@pytest.mark.parametrize(("minimum", "asked"), [
    (1, 4096), (512, 4096), (4095, 4096), (4096, 4096), (4097, 8192), (STRIPE - 512, STRIPE),
    (STRIPE - 4096, STRIPE - 4096), (STRIPE, STRIPE),
])
def test_what_is_read_of_a_partial_stripe_is_what_direct_io_takes(minimum, asked) -> None:
    r = ring()
    r.action(t.ACT_READ_IMAGE, token=0, memory=t.MEM_STRIPE, length=STRIPE, minimum=minimum)
    assert [sqe.length for sqe in r.pending()] == [asked]


def test_the_sqes_of_ublk_and_of_doorbells() -> None:
    r = ring()
    r.ublk(0xC0107520, 3, 7, -5, 0x1234_5678_9ABC, 0x1_0007)
    r.doorbell(11)
    r.arm_wake(12)
    command, bell, wake = r.pending()
    assert (command.opcode, command.flags, command.fd, command.user_data) == (
        IORING_OP_URING_CMD, IOSQE_FIXED_FILE, t.FILE_UBLKC, user_data(t.CQE_UBLK, 7))
    assert (command.offset, command.address) == (0xC0107520, 0x1_0007)
    # The SQEs were full of ones: what an earlier use has left there is no part of this one.
    assert (command.length, command.rw_flags, command.buffer) == (0, 0, 0)
    # struct ublksrv_io_cmd: q_id, tag, result, addr
    assert struct.unpack("<HHiQ", r.pending_commands()[0]) == (3, 7, -5, 0x1234_5678_9ABC)
    # The target gets the doorbell, this ring hears only of its failure.
    assert (bell.opcode, bell.flags, bell.fd, bell.offset, bell.user_data) == (
        IORING_OP_MSG_RING, IOSQE_CQE_SKIP_SUCCESS, 11, user_data(t.CQE_DOORBELL),
        user_data(t.CQE_DOORBELL_FAILED))
    assert (wake.opcode, wake.flags, wake.fd, wake.length, wake.user_data) == (
        IORING_OP_READ, 0, 12, 8, user_data(t.CQE_WAKE))


# -- what becomes of the kernel's answers ---------------------------------------------------------


def started(kind: str = "write", length: int = STRIPE, **options) -> t.RingBench:
    r = ring()
    r.action(KINDS[kind], token=0, memory=t.MEM_STRIPE, offset=4096, length=length, **options)
    return r


@pytest.mark.parametrize("kind", ["image", "base", "write"])
def test_a_whole_transfer_is_its_length(kind: str) -> None:
    assert started(kind).op_done(0, STRIPE) == STRIPE


def test_a_sync_is_zero() -> None:
    assert started("sync", 0).op_done(0, 0) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EBADF, errno.EOPNOTSUPP,
                                   errno.ECANCELED, errno.ENODATA])
def test_errors_pass_through_at_once(kind: str, error: int) -> None:
    r = started(kind)
    assert r.op_done(0, -error) == -error
    assert len(r.pending()) == 1


@pytest.mark.parametrize("kind", ["image", "base", "write"])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_an_error_behind_a_part_is_the_event(kind: str, error: int) -> None:
    r = started(kind)
    assert r.op_done(0, 4096) is None
    assert r.op_done(0, -error) == -error
    assert len(r.pending()) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [errno.EINTR, errno.EAGAIN])
def test_interruptions_are_retried_a_bounded_number_of_times(kind: str, error: int) -> None:
    r = t.RingBench(area=4 * STRIPE, stride=STRIPE, entries=256)
    r.action(KINDS[kind], token=0, memory=t.MEM_STRIPE, offset=4096, length=STRIPE)
    for _ in range(MAX_RETRIES):
        assert r.op_done(0, -error) is None
    assert r.op_done(0, -error) == -EIO
    sqes = r.pending()
    assert len(sqes) == 1 + MAX_RETRIES
    assert len(set(sqes)) == 1


@pytest.mark.parametrize("kind", ["image", "base", "write"])
def test_short_transfers_go_on_where_they_stopped(kind: str) -> None:
    r = started(kind)
    assert r.op_done(0, 512) is None
    assert r.op_done(0, 4096) is None
    assert r.op_done(0, -errno.EINTR) is None
    assert r.op_done(0, STRIPE - 512 - 4096) == STRIPE
    first, *rest = r.pending()
    moved = [(sqe.offset - first.offset, sqe.address - first.address, first.length - sqe.length)
             for sqe in rest]
    assert moved == [(512, 512, 512), (4608, 4608, 4608), (4608, 4608, 4608)]
    assert {(sqe.opcode, sqe.fd, sqe.flags, sqe.user_data) for sqe in rest} == {
        (first.opcode, first.fd, first.flags, first.user_data)}


@pytest.mark.parametrize("kind", ["image", "base", "write"])
def test_a_transfer_that_stops_inside_a_sector_goes_on_at_the_sector(kind: str) -> None:
    """Direct I/O begins at sectors only; a few bytes are moved twice."""
    r = started(kind)
    assert r.op_done(0, 1000) is None
    assert r.op_done(0, 700) is None
    assert [sqe.offset - 4096 for sqe in r.pending()] == [0, 512, 1024]


@pytest.mark.parametrize("kind", ["image", "base", "write"])
@pytest.mark.parametrize("res", [0, 1, 511])
@pytest.mark.parametrize("before", [0, 512, 4096])
def test_a_transfer_that_does_not_move_by_a_sector_is_an_error(kind, res, before) -> None:
    """The image was cut, the base is full: it would never end."""
    r = started(kind)
    if before:
        assert r.op_done(0, before) is None
    assert r.op_done(0, res) == -EIO


def test_retries_and_progress_by_turns_end() -> None:
    r = t.RingBench(area=4 * STRIPE, stride=STRIPE, entries=512)
    r.action(t.ACT_WRITE_BASE, token=0, memory=t.MEM_STRIPE, length=STRIPE)
    steps = 0
    while (result := r.op_done(0, -errno.EAGAIN if steps % 2 else 512)) is None:
        steps += 1
    assert result in (STRIPE, -EIO)
    assert steps <= 2 * (STRIPE // 512 + MAX_RETRIES)


@pytest.mark.parametrize("minimum", [1, 100, 512, 4095, 4096, 4097, STRIPE - 1])
@pytest.mark.parametrize("extra", [0, 1])
def test_behind_the_images_end_the_buffer_is_zero(minimum: int, extra: int) -> None:
    """Whatever was there, and whatever a direct read brought of the image's last block."""
    r = ring()
    start = t.MEM_STRIPE * r.area
    r.memory[start : start + 2 * STRIPE] = b"\xee" * 2 * STRIPE
    r.action(t.ACT_READ_IMAGE, token=0, memory=t.MEM_STRIPE, length=STRIPE, minimum=minimum)
    assert r.op_done(0, min(STRIPE, minimum + extra)) == STRIPE
    assert r.memory[start : start + minimum] == b"\xee" * minimum
    assert r.memory[start + minimum : start + STRIPE] == bytes(STRIPE - minimum)
    assert r.memory[start + STRIPE : start + 2 * STRIPE] == b"\xee" * STRIPE


@pytest.mark.parametrize(("minimum", "results"), [
    (4097, [4096, 1]), (5000, [4096, 904]), (5000, [4500, 904]), (600, [512, 88]),
])
def test_the_images_last_bytes_may_come_by_themselves(minimum: int, results: list) -> None:
    r = ring()
    r.action(t.ACT_READ_IMAGE, token=0, memory=t.MEM_STRIPE, length=STRIPE, minimum=minimum)
    for res in results[:-1]:
        assert r.op_done(0, res) is None
    assert r.op_done(0, results[-1]) == STRIPE


@pytest.mark.parametrize("minimum", [513, 4096, 5000])
def test_an_image_that_is_shorter_than_it_was_is_an_error(minimum: int) -> None:
    r = ring()
    r.action(t.ACT_READ_IMAGE, token=0, memory=t.MEM_STRIPE, length=STRIPE, minimum=minimum)
    assert r.op_done(0, 512) is None
    assert r.op_done(0, 0) == -EIO


def test_a_token_is_free_again_once_its_event_is_made() -> None:
    """Nothing of its last use is left: neither how far it got, nor how often it was tried."""
    r = ring(entries=512)
    r.action(t.ACT_WRITE_BASE, token=0, memory=t.MEM_STRIPE, offset=4096, length=STRIPE, dsync=1)
    assert r.op_done(0, 1024) is None
    for _ in range(MAX_RETRIES):
        assert r.op_done(0, -errno.EAGAIN) is None
    assert r.op_done(0, -EIO) == -EIO
    r.action(t.ACT_WRITE_BASE, token=0, memory=t.MEM_REQUEST, length=2048)
    assert r.op_done(0, -errno.EAGAIN) is None
    assert r.op_done(0, 2048) == 2048
    r.action(t.ACT_SYNC_BASE, token=0)
    assert r.op_done(0, 0) == 0
    *_, first, again, sync = r.pending()
    assert first == again
    assert (first.offset, first.length, first.rw_flags) == (0, 2048, 0)
    assert (sync.opcode, sync.address, sync.length) == (IORING_OP_FSYNC, None, 0)


def test_what_must_not_happen_ends_the_process() -> None:
    again = started()
    assert broken_invariant(lambda: again.action(t.ACT_SYNC_BASE, token=0)) == (
        "one operation a token is in flight")
    assert broken_invariant(lambda: again.op_done(1, 0)) == "a CQE is of an operation in flight"
    assert broken_invariant(lambda: again.op_done(4, 0)) == (
        "a token is below the number of operations")
    assert broken_invariant(lambda: again.action(t.ACT_SYNC_BASE, token=4)) == (
        "a token is below the number of operations")
    assert broken_invariant(lambda: again.action(t.ACT_SEND, token=1)) == (
        "an operation is I/O on image or base")
    assert broken_invariant(
        lambda: again.action(t.ACT_READ_IMAGE, token=1, length=512, minimum=100),
    ) == "a stripe is a multiple of the alignment"


# -- on real files --------------------------------------------------------------------------------


def test_reads_and_writes_where_the_action_says(tmp_path: Path) -> None:
    source = random.Random(1)
    image, data = source.randbytes(3 * STRIPE), source.randbytes(STRIPE)
    with files(tmp_path, image=image, base_bytes=4 * STRIPE) as fds:
        r = ring(**fds)
        r.action(t.ACT_READ_IMAGE, token=0, memory=t.MEM_STRIPE, index=1, offset=STRIPE + 512,
                 length=STRIPE)
        assert settle(r, 0) == {0: STRIPE}
        at = t.MEM_STRIPE * r.area + STRIPE
        assert r.memory[at : at + STRIPE] == image[STRIPE + 512 : 2 * STRIPE + 512]
        r.memory[t.MEM_REQUEST * r.area : t.MEM_REQUEST * r.area + STRIPE] = data
        r.action(t.ACT_WRITE_BASE, token=0, memory=t.MEM_REQUEST, offset=STRIPE, length=4096)
        r.action(t.ACT_WRITE_BASE, token=1, memory=t.MEM_REQUEST, offset=3 * STRIPE, length=512,
                 dsync=1)
        assert settle(r, 0, 1) == {0: 4096, 1: 512}
        r.action(t.ACT_SYNC_BASE, token=3)
        r.action(t.ACT_READ_BASE, token=2, memory=t.MEM_PAGE, offset=STRIPE, length=8192)
        assert settle(r, 2, 3) == {2: 8192, 3: 0}
        at = t.MEM_PAGE * r.area
        assert r.memory[at : at + 8192] == data[:4096] + bytes(4096)
    base = (tmp_path / "base").read_bytes()
    assert base[STRIPE : STRIPE + 4096] == data[:4096]
    assert base[3 * STRIPE : 3 * STRIPE + 512] == data[:512]
    assert base.count(0) >= len(base) - 4096 - 512
    assert (tmp_path / "image").read_bytes() == image


@pytest.mark.parametrize("rest", [1, 511, 512, 4096, 5000, STRIPE - 1])
def test_the_last_stripe_of_a_real_image(tmp_path: Path, rest: int) -> None:
    image = random.Random(rest).randbytes(STRIPE + rest)
    with files(tmp_path, image=image) as fds:
        r = ring(**fds)
        at = t.MEM_STRIPE * r.area
        r.memory[at : at + STRIPE] = b"\xee" * STRIPE
        r.action(t.ACT_READ_IMAGE, token=0, memory=t.MEM_STRIPE, offset=STRIPE, length=STRIPE,
                 minimum=rest)
        assert settle(r, 0) == {0: STRIPE}
        assert r.memory[at : at + STRIPE] == image[STRIPE:].ljust(STRIPE, b"\0")


def test_errors_of_real_files(tmp_path: Path) -> None:
    with files(tmp_path, image=bytes(STRIPE), base_bytes=STRIPE) as fds:
        os.close(fds.pop("base"))
        fds["base"] = os.open(tmp_path / "base", os.O_RDONLY)
        r = ring(**fds)
        r.action(t.ACT_WRITE_BASE, token=0, memory=t.MEM_STRIPE, length=STRIPE)
        # Behind the end there is nothing to read.
        r.action(t.ACT_READ_IMAGE, token=1, memory=t.MEM_STRIPE, offset=STRIPE, length=STRIPE)
        r.action(t.ACT_READ_BASE, token=2, memory=t.MEM_PAGE, offset=STRIPE - 512, length=1024)
        assert settle(r, 0, 1, 2) == {0: -errno.EBADF, 1: -EIO, 2: -EIO}


def test_files_that_were_not_given_are_errors() -> None:
    r = ring()
    for token, kind in enumerate(KINDS.values()):
        r.action(kind, token=token, memory=t.MEM_STRIPE, length=STRIPE)
    assert set(settle(r, 0, 1, 2, 3).values()) == {-errno.EBADF}


def test_more_actions_than_the_submission_queue_has_entries(tmp_path: Path) -> None:
    image = random.Random(3).randbytes(4 * STRIPE)
    with files(tmp_path, image=image) as fds:
        r = t.RingBench(area=64 * 4096, stride=4096, ops=64, entries=4, **fds)
        for token in range(64):
            r.action(t.ACT_READ_IMAGE, token=token, memory=t.MEM_STRIPE, index=token,
                     offset=token * 4096, length=4096)
        assert set(settle(r, *range(64)).values()) == {4096}
        at = t.MEM_STRIPE * r.area
        assert r.memory[at : at + 64 * 4096] == image[: 64 * 4096]


def test_the_base_is_held_by_the_ring_that_writes_it(tmp_path: Path) -> None:
    """The fence: the lock goes with the last reference to its description, the ring's too."""
    import fcntl

    with files(tmp_path, base_bytes=STRIPE) as fds:
        fcntl.flock(fds["base"], fcntl.LOCK_EX)
        r = ring(**fds)
        os.close(fds.pop("base"))
        with open(tmp_path / "base", "rb") as other:
            with pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            del r
            deadline = time.monotonic() + 5
            while True:
                try:
                    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)


def test_a_doorbell_wakes_the_ring_it_is_for() -> None:
    sender, receiver = ring(), ring()
    waiting = time.monotonic()
    sender.doorbell(receiver.fd)
    sender.enter()
    receiver.enter(5_000_000_000)
    assert receiver.cqes() == [(t.CQE_DOORBELL, 0, 0)]
    assert sender.cqes() == []
    assert time.monotonic() - waiting < 5


def test_a_doorbell_that_cannot_be_rung_is_told() -> None:
    sender = ring()
    reading, writing = os.pipe()
    sender.doorbell(reading)
    sender.enter()
    assert [(kind, res < 0) for kind, _, res in sender.cqes()] == [(t.CQE_DOORBELL_FAILED, True)]
    os.close(reading)
    os.close(writing)


def test_the_control_threads_wake_and_the_time_limit_end_the_waiting() -> None:
    r = ring()
    wake = os.eventfd(0, os.EFD_CLOEXEC)
    r.arm_wake(wake)
    in_time = threading.Event()

    def end_it() -> None:
        """Two seconds and forty turns later: a machine that stalls the ring stalls this, too."""
        if not any(in_time.wait(0.05) for _ in range(40)):
            os.eventfd_write(wake, 1)

    too_late = threading.Thread(target=end_it)
    too_late.start()
    # The first one submits something, the second does not: the kernel's answers differ.
    for _ in range(2):
        before = time.monotonic()
        r.enter(30_000_000)
        assert time.monotonic() - before > 0.02
        assert r.cqes() == []
    in_time.set()
    too_late.join()
    caller = threading.Timer(0.02, os.eventfd_write, (wake, 1))
    caller.start()
    r.enter((1 << 64) - 1)
    assert r.cqes() == [(t.CQE_WAKE, 0, 8)]
    caller.join()
    os.close(wake)
