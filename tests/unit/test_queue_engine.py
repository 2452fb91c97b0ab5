"""The queue engine: every state of a request × every event, and the promises of _queue.pxd."""

from __future__ import annotations

import errno
import itertools

import pytest
from enginekit.actions import (
    ask,
    complete,
    discard_base,
    read_base,
    read_image,
    sync,
    write_base,
    zero_base,
)
from enginekit.forked import broken_invariant
from enginekit.guest import (
    COLD,
    COMMITTED,
    DEPTH,
    DEVICE_BYTES,
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

# -- every state × every event --------------------------------------------------------------------


def reading_image(e):
    submit(e, READ, COLD)


def reading_base(e):
    submit(e, READ, COMMITTED)


def writing(e):
    submit(e, WRITE, HAS_DATA, UNALIGNED)


def writing_fua_to_present(e):
    submit(e, WRITE, HAS_DATA, UNALIGNED, fua=True)


def writing_fua_to_durable(e):
    submit(e, WRITE, COMMITTED, UNALIGNED, fua=True)


def zeroing(e):
    submit(e, ZEROES, HAS_DATA, UNALIGNED)


def zeroing_fua_to_present(e):
    submit(e, ZEROES, HAS_DATA, UNALIGNED, fua=True)


def zeroing_fua_to_durable(e):
    submit(e, ZEROES, COMMITTED, UNALIGNED, fua=True)


def zeroed_fua_to_durable(e):
    zeroing_fua_to_durable(e)
    ended(e, 0)


def discarding(e):
    submit(e, DISCARD, HAS_DATA, UNALIGNED, STRIPE)


def discarding_the_first_of_two(e):
    """PRESENT and DURABLE, a cold one, and what lies behind the image."""
    submit(e, DISCARD, HAS_DATA, UNALIGNED, 4 * STRIPE)


def awaiting_stripe(e):
    submit(e, WRITE, COLD, UNALIGNED)


def awaiting_stripe_that_came(e):
    awaiting_stripe(e)
    e.set_state(COLD, t.PRESENT)


def awaiting_claim(e):
    submit(e, WRITE, COLD, 0, STRIPE)


def overwriting(e):
    awaiting_claim(e)
    e.set_state(COLD, t.OVERWRITING)
    told(e, t.MSG_GRANT, t.CLAIMED)


def awaiting_claim_to_zero(e):
    submit(e, ZEROES, COLD, 0, STRIPE, unmap=True)


def overwriting_with_zeros(e):
    awaiting_claim_to_zero(e)
    e.set_state(COLD, t.OVERWRITING)
    told(e, t.MSG_GRANT, t.CLAIMED)


def overwritten(e):
    overwriting(e)
    ended(e, STRIPE)
    e.set_state(COLD, t.PRESENT)


def overwritten_fua(e):
    submit(e, WRITE, COLD, 0, STRIPE, fua=True)
    e.set_state(COLD, t.OVERWRITING)
    told(e, t.MSG_GRANT, t.CLAIMED)
    ended(e, STRIPE)
    e.set_state(COLD, t.PRESENT)


def overwrite_failed(e):
    overwriting(e)
    ended(e, -errno.ENOSPC)
    e.set_state(COLD, t.ABSENT)


def awaiting_round(e):
    submit(e, FLUSH)


def awaiting_sync(e):
    e.set_state(HAS_DATA, t.DURABLE)
    submit(e, FLUSH)


REACHED = {
    "IDLE": (lambda _e: None, t.IDLE),
    "READING_IMAGE": (reading_image, t.READING_IMAGE),
    "READING_BASE": (reading_base, t.READING_BASE),
    "WRITING": (writing, t.WRITING),
    "WRITING, FUA to PRESENT": (writing_fua_to_present, t.WRITING),
    "WRITING, FUA to DURABLE": (writing_fua_to_durable, t.WRITING),
    "WRITING, zeros": (zeroing, t.WRITING),
    "WRITING, zeros, FUA to PRESENT": (zeroing_fua_to_present, t.WRITING),
    "WRITING, zeros, FUA to DURABLE": (zeroing_fua_to_durable, t.WRITING),
    "DISCARDING": (discarding, t.DISCARDING),
    "DISCARDING, more follows": (discarding_the_first_of_two, t.DISCARDING),
    "AWAITING_STRIPE": (awaiting_stripe, t.AWAITING_STRIPE),
    "AWAITING_STRIPE, PRESENT": (awaiting_stripe_that_came, t.AWAITING_STRIPE),
    "AWAITING_CLAIM": (awaiting_claim, t.AWAITING_CLAIM),
    "AWAITING_CLAIM, zeros": (awaiting_claim_to_zero, t.AWAITING_CLAIM),
    "OVERWRITE": (overwriting, t.OVERWRITE),
    "OVERWRITE, zeros": (overwriting_with_zeros, t.OVERWRITE),
    "AWAITING_PRESENT": (overwritten, t.AWAITING_PRESENT),
    "AWAITING_PRESENT, FUA": (overwritten_fua, t.AWAITING_PRESENT),
    "AWAITING_PRESENT, failed": (overwrite_failed, t.AWAITING_PRESENT),
    "AWAITING_ROUND": (awaiting_round, t.AWAITING_ROUND),
    "AWAITING_SYNC": (awaiting_sync, t.AWAITING_SYNC),
    "AWAITING_SYNC, zeroed": (zeroed_fua_to_durable, t.AWAITING_SYNC),
}

# Each acts on the request of TAG; `done` has the length of what these tests write and read.
EVENTS = {
    "read": lambda e: submit(e, READ, COMMITTED),
    "write": lambda e: submit(e, WRITE, HAS_DATA),
    "flush": lambda e: submit(e, FLUSH),
    "discard": lambda e: submit(e, DISCARD, HAS_DATA),
    "discard of what is cold": lambda e: submit(e, DISCARD, COLD),
    "write zeroes": lambda e: submit(e, ZEROES, HAS_DATA),
    "no operation": lambda e: submit(e, 4),
    "done": lambda e: ended(e, PART),
    "done, failed": lambda e: ended(e, -EIO),
    "sync done": lambda e: ended(e, 0, SYNC_TOKEN),
    "sync failed": lambda e: ended(e, -EIO, SYNC_TOKEN),
    "grant": lambda e: told(e, t.MSG_GRANT),
    "grant CLAIMED": lambda e: told(e, t.MSG_GRANT, t.CLAIMED),
    "grant failed": lambda e: told(e, t.MSG_GRANT, -EIO),
    "answer": lambda e: told(e, t.MSG_DONE),
    "answer failed": lambda e: told(e, t.MSG_DONE, -EIO),
    "message to the hydrator": lambda e: told(e, t.MSG_JOIN),
    "no message": lambda e: told(e, 0),
    "tick": lambda e: e.queue_step(0, t.EVENT_TICK),
    "start": lambda e: e.queue_step(0, t.EVENT_START),
    "stop": lambda e: e.queue_step(0, t.EVENT_STOP),
    "no event": lambda e: e.queue_step(0, 0),
    "tag too high": lambda e: submit(e, READ, tag=DEPTH),
    "message's tag too high": lambda e: told(e, t.MSG_DONE, tag=DEPTH),
    "token too high": lambda e: ended(e, 0, SYNC_TOKEN + 1),
}

# What the event does to the request: its actions and its next state.
LEGAL = {
    ("IDLE", "read"): ([read_base(TAG, COMMITTED * STRIPE, PART)], t.READING_BASE),
    ("IDLE", "write"): ([write_base(TAG, HAS_DATA * STRIPE, PART)], t.WRITING),
    ("IDLE", "flush"): ([ask(t.MSG_JOIN, TAG)], t.AWAITING_ROUND),
    ("IDLE", "discard"): ([discard_base(TAG, HAS_DATA * STRIPE, PART)], t.DISCARDING),
    ("IDLE", "discard of what is cold"): ([complete(TAG, PART)], t.IDLE),
    ("IDLE", "write zeroes"):
        ([zero_base(TAG, HAS_DATA * STRIPE, PART, unmap=False)], t.WRITING),
    ("IDLE", "no operation"): ([complete(TAG, -errno.EOPNOTSUPP)], t.IDLE),
    ("READING_IMAGE", "done"): ([complete(TAG, PART)], t.IDLE),
    ("READING_IMAGE", "done, failed"): ([complete(TAG, -EIO)], t.IDLE),
    ("READING_BASE", "done"): ([complete(TAG, PART)], t.IDLE),
    ("READING_BASE", "done, failed"): ([complete(TAG, -EIO)], t.IDLE),
    ("WRITING", "done"): ([complete(TAG, PART)], t.IDLE),
    ("WRITING", "done, failed"): ([complete(TAG, -EIO)], t.IDLE),
    ("WRITING, FUA to PRESENT", "done"): ([ask(t.MSG_JOIN, TAG, HAS_DATA)], t.AWAITING_ROUND),
    ("WRITING, FUA to PRESENT", "done, failed"): ([complete(TAG, -EIO)], t.IDLE),
    ("WRITING, FUA to DURABLE", "done"): ([complete(TAG, PART)], t.IDLE),
    ("WRITING, FUA to DURABLE", "done, failed"): ([complete(TAG, -EIO)], t.IDLE),
    ("WRITING, zeros", "done"): ([complete(TAG, PART)], t.IDLE),
    ("WRITING, zeros", "done, failed"): ([complete(TAG, -EIO)], t.IDLE),
    ("WRITING, zeros, FUA to PRESENT", "done"):
        ([ask(t.MSG_JOIN, TAG, HAS_DATA)], t.AWAITING_ROUND),
    ("WRITING, zeros, FUA to PRESENT", "done, failed"): ([complete(TAG, -EIO)], t.IDLE),
    ("WRITING, zeros, FUA to DURABLE", "done"): ([sync(SYNC_TOKEN)], t.AWAITING_SYNC),
    ("WRITING, zeros, FUA to DURABLE", "done, failed"): ([complete(TAG, -EIO)], t.IDLE),
    ("DISCARDING", "done"): ([complete(TAG, STRIPE)], t.IDLE),
    ("DISCARDING", "done, failed"): ([complete(TAG, -EIO)], t.IDLE),
    ("DISCARDING, more follows", "done"):
        ([discard_base(TAG, STRIPES * STRIPE, STRIPE + UNALIGNED)], t.DISCARDING),
    ("DISCARDING, more follows", "done, failed"): ([complete(TAG, -EIO)], t.IDLE),
    ("AWAITING_STRIPE", "grant failed"): ([complete(TAG, -EIO)], t.IDLE),
    ("AWAITING_STRIPE, PRESENT", "grant"):
        ([write_base(TAG, UNALIGNED, PART)], t.WRITING),
    ("AWAITING_STRIPE, PRESENT", "grant failed"): ([complete(TAG, -EIO)], t.IDLE),
    ("AWAITING_CLAIM", "grant CLAIMED"): ([write_base(TAG, 0, STRIPE)], t.OVERWRITE),
    ("AWAITING_CLAIM", "grant failed"): ([complete(TAG, -EIO)], t.IDLE),
    ("AWAITING_CLAIM, zeros", "grant CLAIMED"): ([zero_base(TAG, 0, STRIPE)], t.OVERWRITE),
    ("AWAITING_CLAIM, zeros", "grant failed"): ([complete(TAG, -EIO)], t.IDLE),
    ("OVERWRITE, zeros", "done"):
        ([ask(t.MSG_WRITTEN, TAG, COLD, result=PART)], t.AWAITING_PRESENT),
    ("OVERWRITE, zeros", "done, failed"):
        ([ask(t.MSG_WRITTEN, TAG, COLD, result=-EIO)], t.AWAITING_PRESENT),
    ("OVERWRITE", "done"): ([ask(t.MSG_WRITTEN, TAG, COLD, result=PART)], t.AWAITING_PRESENT),
    ("OVERWRITE", "done, failed"):
        ([ask(t.MSG_WRITTEN, TAG, COLD, result=-EIO)], t.AWAITING_PRESENT),
    ("AWAITING_PRESENT", "answer"): ([complete(TAG, STRIPE)], t.IDLE),
    ("AWAITING_PRESENT", "answer failed"): ([complete(TAG, -EIO)], t.IDLE),
    ("AWAITING_PRESENT, FUA", "answer"): ([ask(t.MSG_JOIN, TAG, COLD)], t.AWAITING_ROUND),
    ("AWAITING_PRESENT, FUA", "answer failed"): ([complete(TAG, -EIO)], t.IDLE),
    # The write's own errno is the one that is told.
    ("AWAITING_PRESENT, failed", "answer"): ([complete(TAG, -errno.ENOSPC)], t.IDLE),
    ("AWAITING_PRESENT, failed", "answer failed"): ([complete(TAG, -errno.ENOSPC)], t.IDLE),
    ("AWAITING_ROUND", "answer"): ([complete(TAG, 0)], t.IDLE),
    ("AWAITING_ROUND", "answer failed"): ([complete(TAG, -EIO)], t.IDLE),
    ("AWAITING_SYNC", "sync done"): ([complete(TAG, 0)], t.IDLE),
    ("AWAITING_SYNC", "sync failed"): ([complete(TAG, -EIO)], t.IDLE),
    ("AWAITING_SYNC, zeroed", "sync done"): ([complete(TAG, PART)], t.IDLE),
    ("AWAITING_SYNC, zeroed", "sync failed"): ([complete(TAG, -EIO)], t.IDLE),
}

# Why every other pair ends the process.
ILLEGAL = {
    "read": "a tag carries one request at a time",
    "write": "a tag carries one request at a time",
    "flush": "a tag carries one request at a time",
    "discard": "a tag carries one request at a time",
    "discard of what is cold": "a tag carries one request at a time",
    "write zeroes": "a tag carries one request at a time",
    "no operation": "a tag carries one request at a time",
    "done": "I/O ends only for a request that has I/O in flight",
    "done, failed": "I/O ends only for a request that has I/O in flight",
    "sync done": "an fdatasync ends once",
    "sync failed": "an fdatasync ends once",
    "grant": "a grant is for a request that asked",
    "grant CLAIMED": "a grant is for a request that asked",
    "grant failed": "a grant is for a request that asked",
    "answer": "an answer is for a request that asked",
    "answer failed": "an answer is for a request that asked",
    "message to the hydrator": "the hydrator sends GRANT and DONE",
    "no message": "the hydrator sends GRANT and DONE",
    "tick": "a queue knows requests, completions and messages",
    "start": "a queue knows requests, completions and messages",
    "stop": "a queue knows requests, completions and messages",
    "no event": "a queue knows requests, completions and messages",
    "tag too high": "a tag is below the queue's depth",
    "message's tag too high": "a message is for a tag of this queue",
    "token too high": "a token is a tag or the queue's fdatasync",
}
ILLEGAL_HERE = {
    ("AWAITING_STRIPE", "grant"): "a guest's write goes only to a stripe that the base has",
    ("AWAITING_CLAIM", "grant"): "a guest's write goes only to a stripe that the base has",
    ("AWAITING_CLAIM, zeros", "grant"): "a guest's write goes only to a stripe that the base has",
    ("AWAITING_STRIPE", "grant CLAIMED"): "only a claim is answered CLAIMED",
    ("AWAITING_STRIPE, PRESENT", "grant CLAIMED"): "only a claim is answered CLAIMED",
}
ALL_PAIRS = list(itertools.product(REACHED, EVENTS))


def test_the_matrix_names_states_and_events_that_are_there() -> None:
    states = {state for _, state in REACHED.values()}
    assert states == set(range(t.IDLE, t.DISCARDING + 1))
    assert set(ILLEGAL) == set(EVENTS)
    assert set(LEGAL) | set(ILLEGAL_HERE) <= set(ALL_PAIRS)
    assert not set(LEGAL) & set(ILLEGAL_HERE)


@pytest.mark.parametrize("name", REACHED)
def test_every_state_is_reached(name: str) -> None:
    e = engine()
    reach, state = REACHED[name]
    reach(e)
    assert e.request_state(0, TAG) == state
    assert e.queue_counts(0)[0] == (state != t.IDLE)


@pytest.mark.parametrize(("name", "event"), LEGAL)
def test_legal_event(name: str, event: str) -> None:
    e = engine()
    REACHED[name][0](e)
    actions, state = LEGAL[name, event]
    assert EVENTS[event](e) == actions
    assert e.request_state(0, TAG) == state
    awaits_message = state in (t.AWAITING_STRIPE, t.AWAITING_CLAIM, t.AWAITING_PRESENT,
                               t.AWAITING_ROUND)
    assert e.queue_counts(0) == (int(state != t.IDLE), int(awaits_message))


@pytest.mark.parametrize("name", REACHED)
def test_every_other_event_ends_the_process(name: str) -> None:
    e = engine()
    REACHED[name][0](e)
    said = {
        event: broken_invariant(lambda step=step: step(e))
        for event, step in EVENTS.items()
        if (name, event) not in LEGAL
    }
    assert said == {event: ILLEGAL_HERE.get((name, event), ILLEGAL[event]) for event in said}


# -- which way a request takes --------------------------------------------------------------------


@pytest.mark.parametrize("state", [t.ABSENT, t.FETCHING, t.OVERWRITING, t.PRESENT, t.DURABLE])
@pytest.mark.parametrize("flags", [0, t.WANTED, t.QUEUED, t.IN_ROUND])
def test_reads_and_writes_look_at_the_state_without_the_hydrators_flags(state, flags) -> None:
    there = state >= t.PRESENT
    e = engine()
    e.set_state(COLD, state | flags)
    expected = [read_base(TAG, 512, 512)] if there else [
        read_image(TAG, 512, 512), ask(t.MSG_WANT, TAG, COLD)]
    assert submit(e, READ, COLD, 512, 512) == expected
    assert submit(e, WRITE, COLD, 512, 512, tag=2) == (
        [write_base(2, 512, 512)] if there else [ask(t.MSG_HYDRATE, 2, COLD)])
    assert submit(e, WRITE, COLD, 0, STRIPE, tag=3) == (
        [write_base(3, 0, STRIPE)] if there else [ask(t.MSG_CLAIM, 3, COLD)])
    assert e.queue_stats(0)["cold_reads"] == (not there)


def test_without_copy_on_read_a_cold_read_asks_for_nothing() -> None:
    e = engine(copy_on_read=False)
    assert submit(e, READ, COLD) == [read_image(TAG, 0, PART)]


@pytest.mark.parametrize(("at", "length"), [
    (0, STRIPE - 512), (512, STRIPE - 512), (0, 512), (STRIPE - 512, 512),
])
def test_a_write_that_leaves_out_a_sector_is_no_claim(at: int, length: int) -> None:
    assert submit(engine(), WRITE, COLD, at, length) == [ask(t.MSG_HYDRATE, TAG, COLD)]


def test_whole_stripe_write_to_a_stripe_that_came_meanwhile() -> None:
    """The claim was too late, and the grant says that the stripe is PRESENT."""
    e = engine()
    awaiting_claim(e)
    e.set_state(COLD, t.PRESENT)
    assert told(e, t.MSG_GRANT) == [write_base(TAG, 0, STRIPE)]
    assert ended(e, STRIPE) == [complete(TAG, STRIPE)]


def test_behind_the_image_the_base_has_everything() -> None:
    e = engine()
    behind = STRIPES * STRIPE
    assert submit(e, READ, STRIPES) == [read_base(TAG, behind, PART)]
    assert submit(e, WRITE, STRIPES, tag=2) == [write_base(2, behind, PART)]
    # There is no header bit to wait for: FUA is DSYNC.
    assert submit(e, WRITE, STRIPES + 1, fua=True, tag=3) == [
        write_base(3, behind + STRIPE, PART, dsync=True)]
    assert ended(e, PART, token=3) == [complete(3, PART)]


def test_stripe_numbers_do_not_wrap_on_a_huge_device() -> None:
    """2^32 stripes behind a cold one lies no cold one."""
    e = t.Engines(stripes=STRIPES, depth=DEPTH, stripe_bytes=STRIPE, device_bytes=1 << 62)
    for far in (1 << 32, (1 << 32) + 1, 3 << 32, (1 << 46) - 1):
        assert submit(e, READ, far) == [read_base(TAG, far * STRIPE, PART)]
        ended(e, PART)
        assert submit(e, WRITE, far, length=STRIPE) == [write_base(TAG, far * STRIPE, STRIPE)]
        ended(e, STRIPE)


def test_failed_image_read_of_a_stripe_that_came_meanwhile_is_read_from_the_base() -> None:
    """The image may have been closed under the read, once nothing needs it."""
    for state in (t.PRESENT, t.DURABLE):
        e = engine()
        submit(e, READ, COLD, 512, 1024)
        e.set_state(COLD, state)
        assert ended(e, -errno.EBADF) == [read_base(TAG, 512, 1024)]
        assert e.request_state(0, TAG) == t.READING_BASE
        assert ended(e, -EIO) == [complete(TAG, -EIO)]


@pytest.mark.parametrize("state", [t.ABSENT, t.FETCHING, t.OVERWRITING])
def test_failed_image_read_of_a_cold_stripe_fails_the_request(state: int) -> None:
    e = engine()
    submit(e, READ, COLD)
    e.set_state(COLD, state)
    assert ended(e, -EIO) == [complete(TAG, -EIO)]


def test_image_read_that_worked_counts_though_the_stripe_came_meanwhile() -> None:
    e = engine()
    submit(e, READ, COLD)
    e.set_state(COLD, t.PRESENT)
    assert ended(e, PART) == [complete(TAG, PART)]


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [READ, WRITE, ZEROES])
@pytest.mark.parametrize(("offset", "length"), [
    (0, 0),
    (DEVICE_BYTES, 512),
    (DEVICE_BYTES - 512, 1024),
    (DEVICE_BYTES, 0),
    ((1 << 64) - 512, 512),
    ((1 << 64) - 512, 1024),
    (STRIPE - 512, 1024),
    (512, STRIPE),
    (0, STRIPE + 512),
    (0, (1 << 32) - 512),
    (STRIPES * STRIPE - 512, 1024),
])
def test_a_range_out_of_the_device_or_over_a_stripes_end_is_refused(op, offset, length) -> None:
    e = engine()
    assert e.queue_step(0, t.EVENT_REQUEST, op=op, tag=TAG, offset=offset, length=length) == [
        complete(TAG, -errno.EINVAL)]
    assert e.queue_counts(0) == (0, 0)


@pytest.mark.parametrize("op", [READ, WRITE])
def test_the_last_sector_of_the_image_and_of_the_device(op: int) -> None:
    e = engine()
    assert submit(e, op, STRIPES - 1, STRIPE - 512, 512)[0].kind == (
        t.ACT_READ_IMAGE if op == READ else t.ACT_SEND)
    (action,) = submit(e, op, 2 * STRIPES - 1, STRIPE - 512, 512, tag=2)
    assert action.offset == t.DATA_OFFSET + DEVICE_BYTES - 512


@pytest.mark.parametrize("op", [4, 6, 7, 16, 255])
def test_operations_that_are_not_advertised(op: int) -> None:
    e = engine()
    for length in (0, 512, 8 * STRIPE):
        assert submit(e, op, COLD, 0, length) == [complete(TAG, -errno.EOPNOTSUPP)]
    assert e.queue_counts(0) == (0, 0)


# -- counters, bounds -----------------------------------------------------------------------------


def test_counters() -> None:
    e = engine()
    submit(e, READ, COMMITTED)
    ended(e, PART)
    submit(e, READ, COLD, length=512)
    ended(e, -EIO)
    submit(e, WRITE, HAS_DATA)
    ended(e, PART)
    submit(e, FLUSH)
    told(e, t.MSG_DONE, -EIO)
    submit(e, DISCARD, STRIPES, 0, 3 * STRIPE)
    ended(e, 0)
    submit(e, DISCARD, STRIPES, 0, 3 * STRIPE)
    ended(e, -EIO)
    submit(e, ZEROES, HAS_DATA, length=512)
    ended(e, 0)
    submit(e, 4)
    submit(e, ZEROES, HAS_DATA, length=STRIPE + 512)
    stats = e.queue_stats(0)
    assert stats["count"] == [2, 1, 1, 2, 2]
    assert stats["bytes"] == [PART, PART, 0, 3 * STRIPE, 512]
    assert stats["errors"] == [1, 0, 1, 1, 1]
    assert (stats["cold_reads"], stats["syncs"]) == (1, 0)


@pytest.mark.parametrize("depth", [1, 2, 3, 64])
def test_no_step_emits_more_than_depth_and_two_actions(depth: int) -> None:
    """The engine's array has just that room, and `emit` aborts beyond. The two worst steps: an
    fdatasync that ends all flushes but one and starts the next, and a cold read."""
    e = t.Engines(stripes=STRIPES, depth=depth, stripe_bytes=STRIPE)
    assert len(submit(e, READ, COLD, tag=0)) == 2
    ended(e, PART, 0)
    for tag in range(depth):
        submit(e, FLUSH, tag=tag)
    most = len(ended(e, 0, depth))
    if depth > 1:
        most = max(most, len(ended(e, 0, depth)))
    assert most <= depth
    assert e.most_queue_actions == max(2, most)
