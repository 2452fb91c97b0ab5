"""A hydrator's start and stop: what is committed before it goes live, and before it ends."""

from __future__ import annotations

import errno

import pytest
from enginekit.actions import act, done, fetch, store, sync, write_page
from enginekit.hydration import STRIPE, Bench
from enginekit.invariants import header_bits

from ublk_ubi import _testing as t

EIO = errno.EIO
S = 1
OTHER = 4
STARTED, STOPPED = t.ACT_STARTED, t.ACT_STOPPED


# -- starting -------------------------------------------------------------------------------------


def test_start_with_nothing_to_do() -> None:
    b = Bench(start=False)
    assert b.step(t.EVENT_START) == [act(STARTED)]
    assert b.e.life == t.LIFE_RUNNING


@pytest.mark.parametrize("rest", [1, 511, 512, 4096, STRIPE - 512, STRIPE - 1])
def test_start_hydrates_and_commits_a_partial_last_stripe(rest: int) -> None:
    b = Bench(start=False, image_bytes=7 * STRIPE + rest)
    assert b.step(t.EVENT_START) == [fetch(0, 7, STRIPE, minimum=rest)]
    assert b.done(0) == [store(0, 7, STRIPE)]
    assert b.done(0) == [sync(b.sync_token)]
    assert b.synced_now() == [write_page(b.page_token(), 0)]
    assert b.done(b.page_token()) == [sync(b.sync_token)]
    assert b.e.life == t.LIFE_STARTING
    assert b.synced_now() == [act(STARTED)]
    assert b.e.state(7) == t.DURABLE


@pytest.mark.parametrize("where", ["present", "durable"])
def test_start_finds_the_partial_last_stripe_on_the_base(where: str) -> None:
    b = Bench(start=False, image_bytes=7 * STRIPE + 512, **{where: (7,)})
    expected = [act(STARTED)] if where == "durable" else [sync(b.sync_token)]
    assert b.step(t.EVENT_START) == expected
    b.finish()
    assert b.e.life == t.LIFE_RUNNING
    assert b.e.state(7) == t.DURABLE


def test_start_commits_what_the_last_daemon_left() -> None:
    b = Bench(start=False, stripes=5000, present=(0, 17, 4999), durable=(1, 2))
    assert b.step(t.EVENT_START) == [sync(b.sync_token)]
    b.finish()
    assert b.e.life == t.LIFE_RUNNING
    assert b.e.undurable == 0
    assert header_bits(b.e) == {0, 1, 2, 17, 4999}


def test_start_commits_both_what_was_left_and_the_last_stripe_in_one_round() -> None:
    b = Bench(start=False, image_bytes=7 * STRIPE + 512, present=(0,))
    assert b.step(t.EVENT_START) == [fetch(0, 7, STRIPE, minimum=512)]
    b.finish()
    assert b.e.life == t.LIFE_RUNNING
    assert b.e.hydrator_stats["rounds"] == 1
    assert b.written == [(0, {0, 7})]


@pytest.mark.parametrize("failing", range(5))
def test_start_that_fails_says_so_once(failing: int) -> None:
    b = Bench(start=False, image_bytes=7 * STRIPE + 512)
    actions = b.step(t.EVENT_START)
    for _ in range(failing):
        actions = b.done(next(iter(b.in_flight)))
    assert len(actions) == 1
    assert b.done(actions[0].token, -errno.ENOSPC) == [act(STARTED, result=-errno.ENOSPC)]
    assert b.e.life == t.LIFE_STOPPED
    assert b.tick() == []
    assert b.in_flight == {}
    assert b.e.latch == (errno.ENOSPC if actions[0].kind == t.ACT_SYNC_BASE else 0)


def test_start_with_a_latch_fails() -> None:
    b = Bench(start=False, present=(S,))
    b.e.latch = EIO
    assert b.step(t.EVENT_START) == [act(STARTED, result=-EIO)]


def test_start_while_hints_wait_fetches_them_once_it_runs() -> None:
    b = Bench(start=False, present=(0,))
    b.step(t.EVENT_START)
    assert b.want(S) == []
    b.done(b.sync_token)
    b.done(b.page_token())
    assert b.synced_now() == [act(STARTED), fetch(0, S, STRIPE)]
    assert b.want(2) == [fetch(1, 2, STRIPE)]


# -- stopping -------------------------------------------------------------------------------------


@pytest.mark.parametrize("present", [(), (S,)])
def test_stop_answers_those_that_have_joined(present: tuple[int, ...]) -> None:
    b = Bench()
    b.make_present(*present)
    b.join(0)
    assert b.step(t.EVENT_STOP) == [sync(b.sync_token)]
    actions: list[t.Act] = []
    while b.in_flight:
        actions += b.done(next(iter(b.in_flight)))
    assert actions[-2:] == [done(0), act(STOPPED)]


def test_stop_that_could_not_commit_tries_again_for_those_that_have_joined() -> None:
    b = Bench()
    b.make_present(S)
    b.commit(0)
    b.synced_now()
    b.join(1)
    b.step(t.EVENT_STOP)
    assert b.done(b.page_token(), -EIO) == [done(0, result=-EIO), sync(b.sync_token)]
    b.synced_now()
    b.done(b.page_token())
    assert b.synced_now() == [done(1), act(STOPPED)]


def test_stop_with_nothing_to_do() -> None:
    b = Bench()
    assert b.step(t.EVENT_STOP) == [act(STOPPED)]
    assert b.tick() == []


def test_stop_commits() -> None:
    b = Bench()
    b.make_present(S)
    assert b.step(t.EVENT_STOP) == [sync(b.sync_token)]
    b.synced_now()
    b.done(b.page_token())
    assert b.synced_now() == [act(STOPPED)]
    assert b.e.state(S) == t.DURABLE


def test_stop_lets_a_running_round_end_and_commits_the_rest() -> None:
    b = Bench()
    b.make_present(S)
    b.tick()
    b.make_present(2)
    assert b.step(t.EVENT_STOP) == []
    b.synced_now()
    b.done(b.page_token())
    assert b.synced_now() == [sync(b.sync_token)]
    b.synced_now()
    b.done(b.page_token())
    assert b.synced_now() == [act(STOPPED)]
    assert b.e.undurable == 0


def test_stop_waits_for_fetches_starts_no_copy_on_read_and_commits_what_they_brought() -> None:
    b = Bench(buffers=2)
    b.want(S)
    b.want(OTHER)  # waits for a buffer, and is not fetched any more
    assert b.step(t.EVENT_STOP) == []
    assert b.done(0) == [store(0, S, STRIPE)]
    assert b.done(0) == [sync(b.sync_token)]
    b.synced_now()
    b.done(b.page_token())
    assert b.synced_now() == [act(STOPPED)]
    assert (b.e.state(S), b.e.state(OTHER)) == (t.DURABLE, t.ABSENT)


def test_stop_does_not_mind_a_fetch_that_fails() -> None:
    b = Bench()
    b.want(S)
    b.step(t.EVENT_STOP)
    assert b.done(0, -EIO) == [act(STOPPED)]


@pytest.mark.parametrize("failing", ["data", "page", "pages' sync"])
def test_stop_that_cannot_commit_says_why(failing: str) -> None:
    b = Bench()
    b.make_present(S)
    b.step(t.EVENT_STOP)
    if failing != "data":
        b.synced_now()
    if failing == "pages' sync":
        b.done(b.page_token())
    assert b.done(next(iter(b.in_flight)), -errno.ENOSPC) == [act(STOPPED, result=-errno.ENOSPC)]
    assert b.e.undurable == 1
    assert b.tick() == []


@pytest.mark.parametrize("failing", ["data", "page"])
def test_stop_that_cannot_commit_waits_for_fetches_all_the_same(failing: str) -> None:
    """STOPPED promises that nothing is in flight (checked in every step of these tests)."""
    b = Bench()
    b.make_present(S)
    b.tick()
    b.want(OTHER)
    b.step(t.EVENT_STOP)
    if failing == "page":
        b.synced_now()
        assert b.done(b.page_token(), -errno.ENOSPC) == []
    else:
        assert b.synced_now(-errno.ENOSPC) == []
    b.done(0)
    assert b.done(0) == [act(STOPPED, result=-errno.ENOSPC)]


def test_stop_tries_again_what_a_tick_could_not_commit() -> None:
    b = Bench()
    b.make_present(S)
    b.tick()
    b.synced_now()
    b.done(b.page_token(), -EIO)
    assert b.step(t.EVENT_STOP) == [sync(b.sync_token)]
    b.synced_now()
    b.done(b.page_token())
    assert b.synced_now() == [act(STOPPED)]


@pytest.mark.parametrize("committed", [False, True])
def test_stop_with_a_latch_is_an_error_even_if_all_is_committed(committed: bool) -> None:
    b = Bench()
    if not committed:
        b.make_present(S)
    b.e.latch = EIO
    assert b.step(t.EVENT_STOP) == [act(STOPPED, result=-EIO)]
    assert b.written == []


def test_stop_while_starting_stops_after_the_commit() -> None:
    b = Bench(start=False, present=(S,))
    b.step(t.EVENT_START)
    assert b.step(t.EVENT_STOP) == []
    b.synced_now()
    b.done(b.page_token())
    assert b.synced_now() == [act(STOPPED)]


def test_stop_after_a_failed_start_is_nothing() -> None:
    b = Bench(start=False, present=(S,))
    b.step(t.EVENT_START)
    b.synced_now(-EIO)
    assert b.step(t.EVENT_STOP) == []
