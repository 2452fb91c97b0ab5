"""The queue engine: DISCARD over any number of stripes, WRITE_ZEROES, and an image that is lost."""

from __future__ import annotations

import errno
import itertools
import random

import pytest
from enginekit.actions import ask, complete, discard_base, read_base, read_image, zero_base
from enginekit.guest import (
    DEPTH,
    DEVICE_BYTES,
    DISCARD,
    EIO,
    HAS_DATA,
    PART,
    READ,
    STRIPE,
    STRIPES,
    TAG,
    WRITE,
    ZEROES,
    ended,
    engine,
    submit,
    told,
)

from ublk_ubi import _testing as t

COLD_STATES = (t.ABSENT, t.FETCHING, t.OVERWRITING)
FLAGS = (0, t.WANTED, t.QUEUED, t.IN_ROUND)


def over(*states: int, **options) -> t.Engines:
    """One queue over stripes in these states."""
    e = t.Engines(stripes=len(states), depth=DEPTH, stripe_bytes=STRIPE, **options)
    for stripe, state in enumerate(states):
        e.set_state(stripe, state)
    return e


def rows(e: t.Engines, offset: int, length: int) -> list[tuple[int, int]]:
    """Discard a range to its end; give what the base was told, in bytes of the device."""
    (action,) = e.queue_step(0, t.EVENT_REQUEST, op=DISCARD, tag=TAG, offset=offset, length=length)
    found = []
    while action.kind == t.ACT_DISCARD_BASE:
        found.append((action.offset - t.DATA_OFFSET, action.length))
        assert action == discard_base(TAG, *found[-1])
        assert e.request_state(0, TAG) == t.DISCARDING
        (action,) = ended(e, 0)
    assert action == complete(TAG, length)
    return found


# -- DISCARD --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("state", "flags"), list(itertools.product(COLD_STATES, FLAGS)))
def test_a_discard_of_cold_stripes_asks_nothing_of_anybody(state: int, flags: int) -> None:
    """fstrim hydrates nothing."""
    e = over(*[state | flags] * 8)
    for offset, length in ((0, 8 * STRIPE), (512, STRIPE), (STRIPE, STRIPE), (0, 512)):
        assert rows(e, offset, length) == []
    assert e.state_bytes == bytes([state | flags]) * 8


@pytest.mark.parametrize("states", list(itertools.product(
    (t.ABSENT, t.PRESENT, t.DURABLE), repeat=4)))
def test_each_row_of_stripes_that_the_base_has_is_one_discard(states: tuple) -> None:
    e = over(*states, device_bytes=4 * STRIPE)
    has = [state >= t.PRESENT for state in states]
    expected = []
    for there, row in itertools.groupby(range(4), key=lambda stripe: has[stripe]):
        stripes = list(row)
        if there:
            expected.append((stripes[0] * STRIPE, len(stripes) * STRIPE))
    assert rows(e, 0, 4 * STRIPE) == expected
    assert bytes(states) == e.state_bytes


def test_any_range_over_any_states() -> None:
    """Against a model of sectors: what is discarded is what lies in the range and on the base."""
    source = random.Random(4)
    stripes, device = 12, 20
    for _ in range(300):
        states = [source.choice([*COLD_STATES, t.PRESENT, t.DURABLE, t.DURABLE]) for _ in
                  range(stripes)]
        e = over(*states, device_bytes=device * STRIPE)
        end = source.randrange(1, device * STRIPE // 512 + 1)
        start = source.randrange(end)
        found = rows(e, start * 512, (end - start) * 512)
        told_of = {sector for offset, length in found
                   for sector in range(offset // 512, (offset + length) // 512)}
        per = STRIPE // 512
        assert told_of == {sector for sector in range(start, end)
                           if sector // per >= stripes or states[sector // per] >= t.PRESENT}
        # As few as can be: no two of them meet.
        assert all(a[0] + a[1] < b[0] for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("change", [t.PRESENT, t.ABSENT])
def test_states_are_looked_at_when_a_row_is_begun(change: int) -> None:
    """Not when the request came: a stripe may have come meanwhile, none can have gone."""
    e = over(t.DURABLE, t.ABSENT, change, t.ABSENT)
    (first,) = submit(e, DISCARD, 0, 0, 4 * STRIPE)
    assert first == discard_base(TAG, 0, STRIPE)
    e.set_state(2, t.PRESENT)
    assert ended(e, 0) == [discard_base(TAG, 2 * STRIPE, STRIPE)]
    e.set_state(0, t.DURABLE)
    e.set_state(1, t.PRESENT)  # passed by: a discard is a hint
    assert ended(e, 0) == [complete(TAG, 4 * STRIPE)]


def test_a_discard_that_fails_ends_there_with_its_errno() -> None:
    e = over(t.PRESENT, t.ABSENT, t.PRESENT)
    submit(e, DISCARD, 0, 0, 3 * STRIPE)
    assert ended(e, -errno.EREMOTEIO) == [complete(TAG, -errno.EREMOTEIO)]
    assert e.queue_counts(0) == (0, 0)


def test_the_longest_discard_of_a_huge_device() -> None:
    """2 GiB less a sector, behind an image and far beyond 2^32 stripes: one action."""
    longest = (1 << 31) - 512
    e = over(t.ABSENT, t.PRESENT, device_bytes=1 << 62)
    assert rows(e, 0, longest) == [(STRIPE, longest - STRIPE)]
    for far in (STRIPE << 32, (STRIPE << 32) + 512, (1 << 62) - longest):
        assert rows(e, far, longest) == [(far, longest)]


@pytest.mark.parametrize("length", [1 << 31, (1 << 31) + 512, (1 << 32) - 512])
def test_a_discard_whose_bytes_a_result_cannot_count_is_refused(length: int) -> None:
    """The kernel is told to send no longer ones than 1 GiB."""
    e = over(t.ABSENT, t.DURABLE, device_bytes=1 << 62)
    assert submit(e, DISCARD, 1, 0, length) == [complete(TAG, -errno.EINVAL)]


@pytest.mark.parametrize(("offset", "length"), [
    (0, 0), (DEVICE_BYTES, 512), (DEVICE_BYTES - 512, 1024), (0, DEVICE_BYTES + 512),
    ((1 << 64) - 512, 512), ((1 << 64) - 512, 1024), (512, DEVICE_BYTES),
])
def test_a_discard_out_of_the_device_is_refused(offset: int, length: int) -> None:
    e = engine()
    assert e.queue_step(0, t.EVENT_REQUEST, op=DISCARD, tag=TAG, offset=offset, length=length) == [
        complete(TAG, -errno.EINVAL)]


def test_the_whole_device_may_be_discarded() -> None:
    assert rows(engine(), 0, DEVICE_BYTES) == [
        (HAS_DATA * STRIPE, 2 * STRIPE), (STRIPES * STRIPE, DEVICE_BYTES - STRIPES * STRIPE)]


def test_a_tags_last_request_leaves_nothing_to_a_discard() -> None:
    e = over(t.PRESENT, t.ABSENT, t.PRESENT, t.ABSENT)
    assert rows(e, 0, 3 * STRIPE) == [(0, STRIPE), (2 * STRIPE, STRIPE)]
    assert rows(e, 512, STRIPE) == [(512, STRIPE - 512)]
    submit(e, WRITE, 0, fua=True)
    ended(e, PART)
    told(e, t.MSG_DONE)
    assert rows(e, 0, STRIPE) == [(0, STRIPE)]


# -- WRITE_ZEROES ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("state", "flags"), list(itertools.product(
    (*COLD_STATES, t.PRESENT, t.DURABLE), FLAGS)))
@pytest.mark.parametrize("unmap", [False, True])
def test_zeros_go_the_way_of_writes(state: int, flags: int, unmap: bool) -> None:
    e = over(state | flags)
    there = state >= t.PRESENT
    assert submit(e, ZEROES, 0, 512, 512, unmap=unmap) == (
        [zero_base(TAG, 512, 512, unmap=unmap)] if there else [ask(t.MSG_HYDRATE, TAG, 0)])
    assert submit(e, ZEROES, 0, 0, STRIPE, tag=2, unmap=unmap) == (
        [zero_base(2, 0, STRIPE, unmap=unmap)] if there else [ask(t.MSG_CLAIM, 2, 0)])


@pytest.mark.parametrize("unmap", [False, True])
def test_nounmap_is_kept_until_the_stripe_is_there(unmap: bool) -> None:
    e = over(t.ABSENT, t.ABSENT)
    submit(e, ZEROES, 0, 512, 512, unmap=unmap)
    submit(e, ZEROES, 1, 0, STRIPE, unmap=unmap, tag=2)
    e.set_state(0, t.PRESENT)
    assert told(e, t.MSG_GRANT) == [zero_base(TAG, 512, 512, unmap=unmap)]
    assert told(e, t.MSG_GRANT, t.CLAIMED, tag=2) == [zero_base(2, STRIPE, STRIPE, unmap=unmap)]
    assert ended(e, 0, token=2) == [ask(t.MSG_WRITTEN, 2, 1, result=0)]
    e.set_state(1, t.PRESENT)
    assert told(e, t.MSG_DONE, tag=2) == [complete(2, STRIPE)]
    assert ended(e, 0) == [complete(TAG, 512)]


def test_zeros_whose_claim_came_too_late_are_zeroed_all_the_same() -> None:
    e = over(t.ABSENT)
    submit(e, ZEROES, 0, 0, STRIPE)
    e.set_state(0, t.PRESENT)
    assert told(e, t.MSG_GRANT) == [zero_base(TAG, 0, STRIPE, unmap=False)]


def test_zeros_behind_the_image() -> None:
    e = engine()
    (action,) = submit(e, ZEROES, 2 * STRIPES - 1, 0, STRIPE, unmap=True)
    assert action == zero_base(TAG, (2 * STRIPES - 1) * STRIPE, STRIPE)


# -- the image is lost ----------------------------------------------------------------------------


@pytest.mark.parametrize(("state", "copy_on_read"), list(itertools.product(
    COLD_STATES, (False, True))))
def test_nothing_of_a_lost_image_is_served(state: int, copy_on_read: bool) -> None:
    e = over(state, t.PRESENT, copy_on_read=copy_on_read)
    e.lose_image()
    assert submit(e, READ, 0) == [complete(TAG, -EIO)]
    assert e.queue_stats(0)["cold_reads"] == 0
    assert submit(e, READ, 1) == [read_base(TAG, STRIPE, PART)]
    assert ended(e, PART) == [complete(TAG, PART)]


@pytest.mark.parametrize("result", [PART, -EIO])
def test_what_was_read_of_an_image_that_is_lost_meanwhile_is_not_served(result: int) -> None:
    e = over(t.ABSENT, copy_on_read=False)
    assert submit(e, READ, 0) == [read_image(TAG, 0, PART)]
    e.lose_image()
    assert ended(e, result) == [complete(TAG, -EIO)]


@pytest.mark.parametrize("result", [PART, -errno.EBADF])
def test_a_read_that_loses_the_image_finds_a_stripe_that_came_meanwhile(result: int) -> None:
    e = over(t.ABSENT)
    submit(e, READ, 0)
    e.set_state(0, t.PRESENT)
    e.lose_image()
    assert ended(e, result) == [read_base(TAG, 0, PART)]
    assert ended(e, PART) == [complete(TAG, PART)]


def test_writes_go_on_without_an_image() -> None:
    """A part of a cold stripe asks, and is told; a whole one needs no image."""
    e = over(t.ABSENT, t.ABSENT, t.DURABLE)
    e.lose_image()
    for op, done in ((WRITE, PART), (ZEROES, 0)):
        assert submit(e, op, 0) == [ask(t.MSG_HYDRATE, TAG, 0)]
        assert told(e, t.MSG_GRANT, -EIO) == [complete(TAG, -EIO)]
        assert submit(e, op, 1, 0, STRIPE) == [ask(t.MSG_CLAIM, TAG, 1)]
        told(e, t.MSG_GRANT, t.CLAIMED)
        ended(e, STRIPE)
        assert told(e, t.MSG_DONE) == [complete(TAG, STRIPE)]
        submit(e, op, 2)
        assert ended(e, done) == [complete(TAG, PART)]
    assert rows(e, 0, 3 * STRIPE) == [(2 * STRIPE, STRIPE)]
