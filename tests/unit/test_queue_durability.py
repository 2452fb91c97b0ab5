"""The queue engine: FUA, flushes, cache modes and the latch."""

from __future__ import annotations

import errno

import pytest
from enginekit.actions import ask, complete, read_base, sync, write_base, zero_base
from enginekit.guest import (
    COLD,
    COMMITTED,
    DISCARD,
    EIO,
    FLUSH,
    HAS_DATA,
    PART,
    READ,
    STRIPE,
    STRIPES,
    SYNC_TOKEN,
    TAG,
    UNALIGNED,
    WRITE,
    ZEROES,
    ended,
    engine,
    submit,
    told,
)

from ublk_ubi import _testing as t

# -- FUA ------------------------------------------------------------------------------------------


def test_fua_on_an_absent_stripe_joins_a_round_after_its_write() -> None:
    e = engine()
    assert submit(e, WRITE, COLD, UNALIGNED, fua=True) == [ask(t.MSG_HYDRATE, TAG, COLD)]
    e.set_state(COLD, t.PRESENT)
    assert told(e, t.MSG_GRANT) == [write_base(TAG, UNALIGNED, PART)]
    assert ended(e, PART) == [ask(t.MSG_JOIN, TAG, COLD)]
    assert told(e, t.MSG_DONE) == [complete(TAG, PART)]


def test_fua_on_a_whole_absent_stripe_joins_a_round_once_it_is_present() -> None:
    e = engine()
    submit(e, WRITE, COLD, 0, STRIPE, fua=True)
    e.set_state(COLD, t.OVERWRITING)
    told(e, t.MSG_GRANT, t.CLAIMED)
    ended(e, STRIPE)
    e.set_state(COLD, t.PRESENT)
    assert told(e, t.MSG_DONE) == [ask(t.MSG_JOIN, TAG, COLD)]
    assert told(e, t.MSG_DONE, -EIO) == [complete(TAG, -EIO)]


def test_fua_on_a_present_stripe_joins_a_round() -> None:
    e = engine()
    assert submit(e, WRITE, HAS_DATA, fua=True) == [write_base(TAG, HAS_DATA * STRIPE, PART)]
    assert ended(e, PART) == [ask(t.MSG_JOIN, TAG, HAS_DATA)]


def test_fua_on_a_stripe_in_a_round_that_ends_meanwhile_joins_the_next() -> None:
    """DURABLE by now says nothing about data that was written without DSYNC."""
    e = engine()
    e.set_state(HAS_DATA, t.PRESENT | t.IN_ROUND)
    assert submit(e, WRITE, HAS_DATA, fua=True) == [write_base(TAG, HAS_DATA * STRIPE, PART)]
    e.set_state(HAS_DATA, t.DURABLE)
    assert ended(e, PART) == [ask(t.MSG_JOIN, TAG, HAS_DATA)]


def test_fua_that_waited_for_a_stripe_which_is_durable_by_its_grant_is_dsync() -> None:
    e = engine()
    submit(e, WRITE, COLD, UNALIGNED, fua=True)
    e.set_state(COLD, t.DURABLE)
    assert told(e, t.MSG_GRANT) == [write_base(TAG, UNALIGNED, PART, dsync=True)]
    assert ended(e, PART) == [complete(TAG, PART)]


def test_fua_on_a_durable_stripe_is_dsync() -> None:
    e = engine()
    assert submit(e, WRITE, COMMITTED, fua=True) == [
        write_base(TAG, COMMITTED * STRIPE, PART, dsync=True)]
    assert ended(e, PART) == [complete(TAG, PART)]


def test_a_write_without_fua_is_never_dsync_and_never_joins() -> None:
    e = engine()
    for stripe in (HAS_DATA, COMMITTED, STRIPES):
        (write,) = submit(e, WRITE, stripe)
        assert not write.dsync
        assert ended(e, PART) == [complete(TAG, PART)]


def test_a_tag_forgets_the_fua_of_its_last_request() -> None:
    e = engine()
    submit(e, WRITE, HAS_DATA, fua=True)
    ended(e, PART)
    told(e, t.MSG_DONE)
    submit(e, WRITE, HAS_DATA)
    assert ended(e, PART) == [complete(TAG, PART)]


# -- flushes --------------------------------------------------------------------------------------


def test_flush_is_one_fdatasync_only_if_nothing_is_undurable() -> None:
    e = engine()
    assert submit(e, FLUSH, tag=0) == [ask(t.MSG_JOIN, 0)]
    e.set_state(HAS_DATA, t.DURABLE)
    assert e.undurable == 0
    assert submit(e, FLUSH) == [sync(SYNC_TOKEN)]


@pytest.mark.parametrize("base", [t.BASE_SYNCING, t.BASE_CHANGED, t.BASE_SYNCED])
@pytest.mark.parametrize("cache", [t.CACHE_WRITEBACK, t.CACHE_WRITETHROUGH])
def test_flush_with_nothing_written_since_a_round_needs_no_fdatasync(base: int, cache: int) -> None:
    e = engine(clean=True, cache=cache)
    e.base = base
    synced = base == t.BASE_SYNCED
    assert submit(e, FLUSH) == [complete(TAG, 0) if synced else sync(SYNC_TOKEN)]


@pytest.mark.parametrize("result", [PART, -EIO])
@pytest.mark.parametrize("base", [t.BASE_SYNCING, t.BASE_SYNCED])
@pytest.mark.parametrize("op", [WRITE, ZEROES, DISCARD])
def test_what_changes_the_base_says_so_when_it_ends(op: int, base: int, result: int) -> None:
    e = engine(clean=True)
    e.base = base
    submit(e, op, COMMITTED)
    assert e.base == base
    ended(e, result)
    assert e.base == t.BASE_CHANGED
    assert submit(e, FLUSH) == [sync(SYNC_TOKEN)]


def test_a_synced_base_needs_a_round_for_what_is_undurable_and_fails_once_latched() -> None:
    e = engine()
    e.base = t.BASE_SYNCED
    assert submit(e, FLUSH, tag=0) == [ask(t.MSG_JOIN, 0)]
    e.set_state(HAS_DATA, t.DURABLE)
    e.latch = EIO
    assert submit(e, FLUSH) == [complete(TAG, -EIO)]


def test_flushes_that_come_while_an_fdatasync_runs_share_the_next_one() -> None:
    e = engine(clean=True)
    assert submit(e, FLUSH, tag=0) == [sync(SYNC_TOKEN)]
    assert submit(e, FLUSH, tag=1) == []
    assert submit(e, FLUSH, tag=2) == []
    assert ended(e, 0, SYNC_TOKEN) == [complete(0, 0), sync(SYNC_TOKEN)]
    assert submit(e, FLUSH, tag=3) == []
    *completed, again = ended(e, 0, SYNC_TOKEN)
    assert sorted(completed) == [complete(1, 0), complete(2, 0)]
    assert again == sync(SYNC_TOKEN)
    assert ended(e, 0, SYNC_TOKEN) == [complete(3, 0)]
    assert e.queue_stats(0)["syncs"] == 3
    assert e.queue_counts(0) == (0, 0)


def test_failed_fdatasync_is_latched_and_fails_its_flushes_and_all_that_follow() -> None:
    e = engine(clean=True)
    submit(e, FLUSH, tag=0)
    submit(e, FLUSH, tag=1)
    assert ended(e, -errno.ENOSPC, SYNC_TOKEN) == [complete(0, -errno.ENOSPC), sync(SYNC_TOKEN)]
    assert e.latch == errno.ENOSPC
    # This one works, but what the first has lost stays lost.
    assert ended(e, 0, SYNC_TOKEN) == [complete(1, -EIO)]
    for _ in range(3):
        assert submit(e, FLUSH) == [complete(TAG, -EIO)]
    assert e.latch == errno.ENOSPC


def test_latch_that_another_thread_set_while_the_fdatasync_ran() -> None:
    e = engine(clean=True)
    submit(e, FLUSH)
    e.latch = errno.ENOSPC
    assert ended(e, 0, SYNC_TOKEN) == [complete(TAG, -EIO)]


def test_the_first_failure_stays_in_the_latch() -> None:
    e = engine(clean=True)
    submit(e, FLUSH)
    e.latch = errno.ENOSPC
    ended(e, -EIO, SYNC_TOKEN)
    assert e.latch == errno.ENOSPC


def test_once_latched_flush_and_fua_fail_and_nothing_is_written_for_them() -> None:
    e = engine()
    e.latch = EIO
    assert submit(e, FLUSH) == [complete(TAG, -EIO)]
    for stripe in (COLD, HAS_DATA, COMMITTED, STRIPES):
        assert submit(e, WRITE, stripe, fua=True) == [complete(TAG, -EIO)]
        assert submit(e, WRITE, stripe, length=STRIPE, fua=True) == [complete(TAG, -EIO)]


def test_once_latched_reads_and_plain_writes_go_on() -> None:
    e = engine()
    e.latch = EIO
    assert submit(e, READ, COMMITTED) == [read_base(TAG, COMMITTED * STRIPE, PART)]
    assert ended(e, PART) == [complete(TAG, PART)]
    assert submit(e, WRITE, COMMITTED) == [write_base(TAG, COMMITTED * STRIPE, PART)]
    assert ended(e, PART) == [complete(TAG, PART)]


def test_dsync_write_that_ends_after_the_latch_fails() -> None:
    e = engine()
    submit(e, WRITE, COMMITTED, fua=True)
    e.latch = EIO
    assert ended(e, PART) == [complete(TAG, -EIO)]


def test_a_flush_descriptor_has_a_start_sector_that_is_no_sector() -> None:
    for offset, length in ((((1 << 64) - 1) << 9, 0), ((1 << 64) - 1, 0), (0, 0), (1, 7)):
        e = engine(clean=True)
        assert e.queue_step(0, t.EVENT_REQUEST, op=FLUSH, tag=TAG, length=length,
                            offset=offset & ((1 << 64) - 1)) == [sync(SYNC_TOKEN)]
        assert ended(e, 0, SYNC_TOKEN) == [complete(TAG, 0)]


# -- cache modes: the whole way of a write, by operation, stripe and mode -------------------------

MODES = {"writeback": t.CACHE_WRITEBACK, "writethrough": t.CACHE_WRITETHROUGH,
         "unsafe": t.CACHE_UNSAFE}
BEHIND = STRIPES
# Stripe and length → the way of a write that need not be durable.
WAYS = {
    "PRESENT": (HAS_DATA, PART, ["write"]),
    "PRESENT, whole": (HAS_DATA, STRIPE, ["write"]),
    "DURABLE": (COMMITTED, PART, ["write"]),
    "behind the image": (BEHIND, PART, ["write"]),
    "ABSENT": (COLD, PART, ["hydrate", "write"]),
    "ABSENT, whole": (COLD, STRIPE, ["claim", "write", "written"]),
}


def is_to_be_durable(mode: str, fua: bool) -> bool:
    return mode == "writethrough" or (fua and mode == "writeback")


def way_of(op: int, way: str, durable: bool, buffered: bool) -> list[str]:
    """A buffered base tells an open file of a lost write once, whoever has written it: no write
    there can answer for itself."""
    stripe, _, plain = WAYS[way]
    if not durable:
        return plain
    if stripe in (COMMITTED, BEHIND):
        return ["write", "fdatasync"] if op == ZEROES or buffered else ["write, durable"]
    return [*plain, "join"]


class Way:
    """Takes one write to its end, answering all that it asks for."""

    def __init__(self, e: t.Engines, op: int, way: str, *, fua: bool) -> None:
        self.e, self.op = e, op
        self.stripe, self.length, _ = WAYS[way]
        self.steps: list[str] = []
        self.result: int | None = None
        self.follow(submit(e, op, self.stripe, 0, self.length, fua=fua,
                           unmap=op == ZEROES))

    def follow(self, actions: list[t.Act]) -> None:
        (self.action,) = actions
        if self.action.kind == t.ACT_COMPLETE:
            self.result = self.action.result
        else:
            self.steps.append(self.name())

    def name(self) -> str:
        action = self.action
        if action.kind == t.ACT_SEND:
            return {t.MSG_HYDRATE: "hydrate", t.MSG_CLAIM: "claim", t.MSG_WRITTEN: "written",
                    t.MSG_JOIN: "join"}[action.message]
        if action.kind == t.ACT_SYNC_BASE:
            return "fdatasync"
        offset = self.stripe * STRIPE
        expected = (write_base(TAG, offset, self.length, dsync=bool(action.dsync))
                    if self.op == WRITE else zero_base(TAG, offset, self.length))
        assert action == expected
        return "write, durable" if action.dsync else "write"

    def step(self) -> None:
        """Let go well what it waits for; rounds fail once the latch is set, as they do."""
        step = self.steps[-1]
        if step == "hydrate":
            self.e.set_state(COLD, t.PRESENT)
            self.follow(told(self.e, t.MSG_GRANT))
        elif step == "claim":
            self.e.set_state(COLD, t.OVERWRITING)
            self.follow(told(self.e, t.MSG_GRANT, t.CLAIMED))
        elif step == "written":
            self.e.set_state(COLD, t.PRESENT)
            self.follow(told(self.e, t.MSG_DONE))
        elif step == "join":
            self.follow(told(self.e, t.MSG_DONE, -EIO if self.e.latch else 0))
        elif step == "fdatasync":
            self.follow(ended(self.e, 0, SYNC_TOKEN))
        else:
            self.follow(ended(self.e, self.length if self.op == WRITE else 0))


ALL_WAYS = [(mode, op, way, fua) for mode in MODES for op in (WRITE, ZEROES) for way in WAYS
            for fua in (False, True)]
BUFFERED = (1 << 32) - 1             # the mask of a base whose writes go through the page cache
on_each_base = pytest.mark.parametrize("buffered", [False, True], ids=["direct", "buffered"])


@on_each_base
@pytest.mark.parametrize(("mode", "op", "way", "fua"), ALL_WAYS)
def test_the_way_of_a_write(mode: str, op: int, way: str, fua: bool, buffered: bool) -> None:
    write = Way(engine(cache=MODES[mode], dsync_mask=BUFFERED * buffered), op, way, fua=fua)
    while write.result is None:
        write.step()
    assert write.steps == way_of(op, way, is_to_be_durable(mode, fua), buffered)
    assert write.result == write.length


@pytest.mark.parametrize(("at", "length", "alone"), [
    (0, 4096, True), (4096, 2 * 4096, True), (512, 4096, False), (4096, 512, False),
])
def test_a_part_of_a_filesystems_block_may_be_written_through_its_cache(
    at: int, length: int, alone: bool,
) -> None:
    e = engine(cache=t.CACHE_WRITETHROUGH, dsync_mask=4095)
    (action,) = submit(e, WRITE, COMMITTED, at, length)
    assert action == write_base(TAG, COMMITTED * STRIPE + at, length, dsync=alone)
    (action,) = ended(e, length)
    assert action.kind == (t.ACT_COMPLETE if alone else t.ACT_SYNC_BASE)


@on_each_base
@pytest.mark.parametrize(("mode", "op", "way", "fua"), ALL_WAYS)
def test_the_latch_at_any_point_of_a_writes_way(
    mode: str, op: int, way: str, fua: bool, buffered: bool,
) -> None:
    """Whenever it is set: a write to be durable fails, and any other goes on."""
    durable = is_to_be_durable(mode, fua)
    steps = way_of(op, way, durable, buffered)
    for at in range(len(steps) + 1):
        e = engine(cache=MODES[mode], dsync_mask=BUFFERED * buffered)
        if at == 0:
            e.latch = errno.ENOSPC
        write = Way(e, op, way, fua=fua)
        done = 0
        while write.result is None:
            done += 1
            if done == at:
                e.latch = errno.ENOSPC
            write.step()
        assert write.result == (-EIO if durable else write.length)
        # What cannot be made durable any more is not even begun.
        assert write.steps == ([] if durable and at == 0 else steps[: len(write.steps)])
        assert e.queue_counts(0) == (0, 0)


@pytest.mark.parametrize("result", [-EIO, -errno.ENOSPC])
def test_zeros_whose_fdatasync_fails_are_told_and_latched(result: int) -> None:
    e = engine(cache=t.CACHE_WRITETHROUGH)
    write = Way(e, ZEROES, "DURABLE", fua=False)
    write.step()
    assert ended(e, result, SYNC_TOKEN) == [complete(TAG, result)]
    assert e.latch == -result
    for way in WAYS:
        assert Way(e, ZEROES, way, fua=False).result == -EIO


def test_zeros_on_a_stripe_that_becomes_durable_meanwhile_join_a_round() -> None:
    """As with writes: DURABLE by now says nothing of what was zeroed before."""
    e = engine()
    submit(e, ZEROES, HAS_DATA, fua=True)
    e.set_state(HAS_DATA, t.DURABLE)
    assert ended(e, 0) == [ask(t.MSG_JOIN, TAG, HAS_DATA)]


def test_zeros_and_flushes_share_fdatasyncs_that_began_after_them() -> None:
    e = engine(clean=True)
    assert submit(e, FLUSH, tag=0) == [sync(SYNC_TOKEN)]
    submit(e, ZEROES, COMMITTED, fua=True, tag=1)
    # The running one began before the zeros were there.
    assert ended(e, 0, token=1) == []
    assert submit(e, FLUSH, tag=2) == []
    assert ended(e, 0, SYNC_TOKEN) == [complete(0, 0), sync(SYNC_TOKEN)]
    assert sorted(ended(e, 0, SYNC_TOKEN)) == [complete(2, 0), complete(1, PART)]


@pytest.mark.parametrize("clean", [False, True])
def test_unsafe_answers_a_flush_at_once_until_it_is_latched(clean: bool) -> None:
    e = engine(cache=t.CACHE_UNSAFE, clean=clean)
    assert submit(e, FLUSH) == [complete(TAG, 0)]
    assert e.queue_stats(0)["syncs"] == 0
    e.latch = EIO
    assert submit(e, FLUSH) == [complete(TAG, -EIO)]


@pytest.mark.parametrize("mode", MODES)
def test_reads_and_discards_are_never_made_durable(mode: str) -> None:
    for op, kind in ((READ, t.ACT_READ_BASE), (DISCARD, t.ACT_DISCARD_BASE)):
        e = engine(cache=MODES[mode])
        (action,) = submit(e, op, COMMITTED, fua=True)
        assert (action.kind, action.dsync) == (kind, 0)
        e.latch = EIO
        assert ended(e, PART) == [complete(TAG, PART)]


def test_a_flush_in_writethrough_is_a_flush() -> None:
    """Nobody sends one, but who does gets what it promises."""
    e = engine(cache=t.CACHE_WRITETHROUGH)
    assert submit(e, FLUSH) == [ask(t.MSG_JOIN, TAG)]
