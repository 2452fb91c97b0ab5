"""Background hydration: order, pace, passes, end; stripes of zeros; an image that is lost."""

from __future__ import annotations

import errno
import itertools
import random

import pytest
from enginekit.actions import act, done, fetch, grant, store, store_zeros, sync
from enginekit.hydration import STRIPE, Bench

from ublk_ubi import _testing as t

EIO, ENOSPC = errno.EIO, errno.ENOSPC
S = 1
MUCH = 1 << 40                     # stripes


def running(**options) -> Bench:
    """Give a hydrator that copies in the background as fast as it can."""
    b = Bench(**options)
    assert b.budget(MUCH) == []
    b.background()
    return b


def begun(actions: list[t.Act]) -> list[int]:
    """Give the stripes whose copy was begun."""
    return [action.stripe for action in actions if action.kind == t.ACT_READ_IMAGE]


def fetched(b: Bench) -> list[int]:
    return sorted(stripe for stripe, _ in b.e.fetches())


def copy(b: Bench, stripe: int) -> list[int]:
    """Copy a stripe that is under way to its end; give the stripes that were begun then."""
    b.done(b.buffer_of(stripe))
    return begun(b.done(b.buffer_of(stripe)))


def fail_all(b: Bench, error: int = EIO) -> None:
    """Fail every copy that is under way or follows."""
    while b.in_flight:
        b.done(next(iter(b.in_flight)), -error)


# -- which stripe is next, and how many at once ---------------------------------------------------


@pytest.mark.parametrize(("buffers", "most"), [(2, 1), (3, 1), (4, 2), (5, 2), (8, 4), (32, 16)])
def test_at_most_half_of_the_buffers(buffers: int, most: int) -> None:
    b = running(buffers=buffers, stripes=64)
    assert fetched(b) == list(range(most))
    for stripe in range(40):
        assert copy(b, stripe) == [stripe + most]
        assert len(fetched(b)) == most


def test_the_image_is_copied_in_its_order_and_what_the_base_has_is_passed_over() -> None:
    b = running(start=False, buffers=2, stripes=8, present=(1,), durable=(0, 4, 5))
    assert b.step(t.EVENT_START) == [sync(b.sync_token)]
    b.done(b.sync_token)
    b.done(b.page_token())
    assert begun(b.done(b.sync_token)) == [2]
    assert [copy(b, stripe) for stripe in (2, 3, 6, 7)] == [[3], [6], [7], []]


def test_demand_goes_before_copy_on_read_before_the_background() -> None:
    """8 buffers: the background has 4 at most, 2 are left to demand alone."""
    b = Bench(buffers=8, stripes=64, wanted=32)
    for stripe in range(20, 26):
        assert begun(b.want(stripe)) == [stripe]
    assert begun(b.want(26)) == []
    for tag, stripe in enumerate((30, 31)):
        assert begun(b.hydrate(tag, stripe)) == [stripe]
    assert begun(b.hydrate(2, 32)) == []
    assert begun(b.budget(MUCH)) == []
    assert begun(b.background()) == []
    # Everybody waits now: 32 on demand, 26 was read, the background wants the first.
    assert copy(b, 20) == [32]
    assert copy(b, 30) == []
    assert copy(b, 31) == []           # two are free, and stay so
    assert copy(b, 32) == [26]
    assert copy(b, 21) == [0]
    assert copy(b, 22) == [1]
    assert begun(b.want(27)) == []
    assert copy(b, 23) == [27]


def test_demand_finds_a_buffer_however_busy_the_others_are() -> None:
    b = running(buffers=4, stripes=64, wanted=32)
    for stripe in range(40, 50):
        b.want(stripe)
    assert len(fetched(b)) == 3
    assert b.hydrate(0, 60) == [fetch(3, 60, STRIPE)]


def test_a_stripe_under_way_that_somebody_waits_for_is_copied_once() -> None:
    b = running(buffers=4)
    assert b.hydrate(0, 0) == []
    assert b.claim(1, 0) == []
    b.done(0)
    assert b.done(0)[:2] == [grant(0, 0), grant(1, 0)]


def test_who_waits_for_a_copy_that_fails_is_told() -> None:
    b = running(buffers=4)
    b.hydrate(0, 0)
    assert b.done(0, -errno.ENODATA)[0] == grant(0, 0, -errno.ENODATA)


@pytest.mark.parametrize("state", ["wanted", "queued", "claimed"])
def test_what_others_have_asked_for(state: str) -> None:
    b = Bench(buffers=2, stripes=4)
    b.want(3)
    b.hydrate(0, 2)                    # both buffers are in use
    if state == "wanted":
        b.want(0)
    elif state == "queued":
        b.hydrate(1, 0)
    else:
        b.claim(1, 0)
    b.budget(MUCH)
    b.background()
    copies = []
    while not copies:
        copies = begun(b.done(next(iter(b.in_flight))))
    assert copies == ([1] if state == "claimed" else [0])
    b.finish()
    assert b.e.hydrator_stats["stripes"] == (3 if state == "claimed" else 4)


def test_a_claim_that_fails_behind_the_cursor_is_copied_in_the_next_pass() -> None:
    b = Bench(buffers=2, stripes=4)
    b.claim(0, 0)
    b.budget(MUCH)
    b.background()
    b.finish()
    assert b.written_by(0, 0, -EIO) == [done(0, 0, -EIO)]
    assert begun(b.tick()) == [0]


# -- pace -----------------------------------------------------------------------------------------


def test_nothing_is_copied_without_a_budget_or_without_being_asked_for() -> None:
    b = Bench()
    assert b.background() == []
    assert b.step(t.EVENT_BUDGET, offset=STRIPE - 1) == []
    assert begun(b.budget(1)) == [0]
    b = Bench()
    assert b.budget(MUCH) == []
    assert begun(b.background()) == [0, 1]


def test_the_budget_is_what_was_told_last_less_what_was_begun() -> None:
    b = Bench(buffers=8, stripes=32)
    b.background()
    assert begun(b.step(t.EVENT_BUDGET, offset=3 * STRIPE + 5)) == [0, 1, 2]
    b.finish()
    assert b.e.hydrator_stats["stripes"] == 3
    assert begun(b.step(t.EVENT_BUDGET, offset=STRIPE - 1)) == []
    assert begun(b.budget(2)) == [3, 4]
    assert begun(b.budget(0)) == []
    b.finish()
    assert b.e.hydrator_stats["stripes"] == 5


def test_what_was_asked_for_costs_nothing() -> None:
    b = Bench(buffers=8, stripes=32)
    b.background()
    b.hydrate(0, 10)
    b.want(11)
    b.finish()
    assert begun(b.budget(1)) == [0]


def test_stripes_of_zeros_cost_no_budget() -> None:
    """They cost no bandwidth of the base; the next may begin at once."""
    b = Bench(buffers=2, stripes=8)
    b.background()
    b.budget(1)
    for stripe in range(3):
        b.done(0, zeros=True)
        assert begun(b.done(0)) == [stripe + 1]
    b.finish()
    assert b.e.hydrator_stats["stripes"] == 4
    assert b.e.hydrator_stats["zeros"] == 3
    # A zero stripe on demand adds nothing.
    b.hydrate(0, 6)
    b.done(0, zeros=True)
    assert begun(b.done(0)) == []


@pytest.mark.parametrize("offset", [(1 << 64) - 1, (1 << 64) - STRIPE, 1 << 63])
def test_an_endless_budget_does_not_begin_again_at_zero(offset: int) -> None:
    b = Bench(buffers=2, stripes=8)
    b.background()
    b.step(t.EVENT_BUDGET, offset=offset)
    b.step(t.EVENT_BUDGET, offset=offset)
    for stripe in range(7):
        b.done(0, zeros=True)
        assert begun(b.done(0)) == [stripe + 1]


# -- pausing --------------------------------------------------------------------------------------


def test_a_pause_lets_end_what_is_under_way_and_begins_nothing() -> None:
    b = running(buffers=4, stripes=8)
    assert b.background(False) == []
    b.finish()
    for _ in range(5):
        assert begun(b.tick()) == []
        b.finish()
    assert b.budget(MUCH) == []
    assert b.e.hydrator_stats["stripes"] == 2
    # Others go on.
    assert begun(b.want(5)) == [5]
    assert begun(b.hydrate(0, 6)) == [6]
    assert begun(b.background()) == [2]
    b.finish()
    assert b.e.state_bytes.count(t.ABSENT) == 0


def test_a_pause_between_passes_counts_no_ticks_and_going_on_waits_for_none() -> None:
    b = running(buffers=2, stripes=2)
    fail_all(b)
    b.background(False)
    for _ in range(100):
        assert b.tick() == []
    assert begun(b.background()) == [0]


# -- passes ---------------------------------------------------------------------------------------


def pause_between_passes(b: Bench) -> int:
    """Give the ticks until the next pass, of which one copy is failed."""
    for ticks in range(1, 1000):
        if begun(b.tick()):
            return ticks
    raise AssertionError("no pass begins any more")


@pytest.mark.parametrize(("stripes", "buffers"), [(1, 2), (1, 8), (5, 2), (5, 8), (16, 8)])
def test_passes_that_fail_are_further_and_further_apart(stripes: int, buffers: int) -> None:
    """1, 2, 4 … 64 ticks, however many copies were under way when the last one was begun."""
    b = running(buffers=buffers, stripes=stripes)
    apart = []
    for turn in range(9):
        fail_all(b)
        assert b.e.hydrator_stats["passes"] == turn + 1
        assert b.e.hydrator_stats["failed"] == stripes * (turn + 1)
        apart.append(pause_between_passes(b))
    assert apart == [1, 2, 4, 8, 16, 32, 64, 64, 64]
    assert b.e.hydrator_stats["last_error"] == -EIO


def test_only_what_failed_is_copied_in_the_next_pass() -> None:
    b = running(buffers=2, stripes=6)
    while b.in_flight:
        (token,) = b.in_flight
        b.done(token, -EIO if b.in_flight[token].stripe in (1, 4) else None)
    assert b.e.hydrator_stats["stripes"] == 4
    copies = begun(b.tick())
    while b.in_flight:
        copies += begun(b.done(next(iter(b.in_flight))))
    assert copies == [1, 4]
    assert b.e.hydrator_stats["failed"] == 2


def test_being_told_again_tries_at_once_what_failed_and_forgets_the_backoff() -> None:
    b = running(buffers=2, stripes=1)
    for _ in range(5):
        fail_all(b)
        pause_between_passes(b)
    fail_all(b)
    assert begun(b.background()) == [0]
    fail_all(b)
    assert pause_between_passes(b) == 1
    fail_all(b)
    assert pause_between_passes(b) == 2


def test_being_told_again_in_the_middle_of_a_pass_begins_anew() -> None:
    b = running(buffers=2, stripes=6)
    b.done(0, -EIO)
    assert fetched(b) == [1]
    b.background()
    assert copy(b, 1) == [0]
    assert copy(b, 0) == [2]


def test_a_pass_does_not_end_before_its_last_copy() -> None:
    b = running(buffers=8, stripes=4)
    for stripe in (0, 1, 2):
        copy(b, stripe)
    for _ in range(10):
        b.tick()
        for token in [token for token in b.in_flight if token >= b.buffers]:
            b.done(token)
    assert b.e.hydrator_stats["passes"] == 0
    b.done(b.buffer_of(3), -EIO)
    assert b.e.hydrator_stats["passes"] == 1
    assert pause_between_passes(b) == 1


def test_a_full_base_ends_a_pass_at_once() -> None:
    b = running(buffers=8, stripes=32)
    b.done(0)
    assert begun(b.done(0, -ENOSPC)) == []
    assert b.e.hydrator_stats["passes"] == 1
    # What was under way ends, well or not, and begins nothing.
    for stripe in (1, 2):
        b.done(b.buffer_of(stripe))
        assert begun(b.done(b.buffer_of(stripe), -ENOSPC)) == []
    assert copy(b, 3) == []
    assert b.e.hydrator_stats["passes"] == 1
    assert begun(b.tick()) == [0, 1, 2, 4]
    b.done(b.buffer_of(0))
    assert begun(b.done(b.buffer_of(0), -ENOSPC)) == []
    b.finish()
    assert pause_between_passes(b) == 2
    b.finish()
    b.tick()
    b.finish()
    assert b.hydrated == 1


def test_a_full_base_fails_demand_and_demand_ends_no_pass() -> None:
    b = running(buffers=4, stripes=32)
    b.hydrate(0, 20)
    b.done(b.buffer_of(20))
    assert b.done(b.buffer_of(20), -ENOSPC) == [grant(0, 20, -ENOSPC)]
    assert b.e.hydrator_stats["passes"] == 0
    assert b.e.hydrator_stats["failed"] == 0
    assert copy(b, 0) == [2]


def test_no_pass_begins_once_the_base_has_all() -> None:
    b = running(buffers=2, stripes=4)
    b.finish()
    passes = b.e.hydrator_stats["passes"]
    for _ in range(10):
        b.tick()
        b.finish()
    assert b.e.hydrator_stats["passes"] == passes


# -- starting, stopping, the latch ----------------------------------------------------------------


def test_what_is_asked_for_before_the_device_is_live_begins_when_it_is() -> None:
    """No other event comes: nobody reads or writes yet, and the budget is told once."""
    b = Bench(start=False, stripes=8, present=(1,), image_bytes=7 * STRIPE + 512)
    assert begun(b.step(t.EVENT_START)) == [7]
    assert b.background() == []
    assert b.budget(MUCH) == []
    b.done(0)
    b.done(0)
    b.done(b.sync_token)
    b.done(b.page_token())
    started, *copies = b.done(b.sync_token)
    assert started == act(t.ACT_STARTED)
    assert begun(copies) == [0, 2]


def test_a_stop_lets_end_what_is_under_way() -> None:
    b = running(buffers=4, stripes=32)
    assert b.step(t.EVENT_STOP) == []
    assert begun(b.done(0)) == []
    assert begun(b.done(0)) == []
    assert b.budget(MUCH) == []
    assert b.background() == []
    assert b.tick() == []
    b.done(1)
    assert b.done(1) == [sync(b.sync_token)]
    b.finish()
    assert b.e.life == t.LIFE_STOPPED
    assert b.e.state_bytes.count(t.DURABLE) == 2


def test_once_latched_nothing_is_copied_in_the_background() -> None:
    b = running(buffers=2, stripes=8)
    b.e.latch = EIO
    b.finish()
    assert b.e.hydrator_stats["stripes"] == 1
    assert b.background() == []
    assert b.tick() == []
    assert begun(b.hydrate(0, 5)) == [5]


# -- the end --------------------------------------------------------------------------------------


def test_hydrated_is_said_when_the_last_stripe_is_durable_and_once() -> None:
    b = running(buffers=2, stripes=4)
    b.finish()
    assert b.e.state_bytes == bytes([t.PRESENT]) * 4
    assert b.hydrated == 0
    assert b.tick() == [sync(b.sync_token)]
    b.done(b.sync_token)
    b.done(b.page_token())
    assert b.done(b.sync_token) == [act(t.ACT_HYDRATED)]
    # A guest's writes, joins, ticks and whatever is asked change nothing.
    b.hydrate(0, S)
    b.join(1)
    b.finish()
    b.background()
    b.background(False)
    b.tick()
    assert b.hydrated == 1


def test_a_round_that_fails_has_hydrated_nothing() -> None:
    b = running(buffers=2, stripes=4)
    b.finish()
    b.tick()
    b.done(b.sync_token)
    b.done(b.page_token(), -EIO)
    assert b.hydrated == 0
    b.tick()
    b.finish()
    assert b.hydrated == 1


def test_guests_that_write_everything_have_hydrated_it_too() -> None:
    b = Bench(stripes=4)
    b.make_present(0, 1, 2, 3)
    b.commit(0)
    b.done(b.sync_token)
    b.done(b.page_token())
    assert b.done(b.sync_token) == [done(0), act(t.ACT_HYDRATED)]


@pytest.mark.parametrize("present", [(), (3,)])
def test_a_base_that_has_all_says_so_once_it_is_live(present: tuple) -> None:
    durable = tuple(stripe for stripe in range(4) if stripe not in present)
    b = Bench(start=False, stripes=4, present=present, durable=durable)
    actions = b.step(t.EVENT_START)
    while b.in_flight:
        actions = b.done(next(iter(b.in_flight)))
    assert actions == [act(t.ACT_STARTED), act(t.ACT_HYDRATED)]


def test_a_stop_that_commits_the_last_stripe_says_only_that_it_has_stopped() -> None:
    b = Bench(stripes=4)
    b.make_present(0, 1, 2, 3)
    b.step(t.EVENT_STOP)
    b.done(b.sync_token)
    b.done(b.page_token())
    assert b.done(b.sync_token) == [act(t.ACT_STOPPED)]


# -- stripes of zeros -----------------------------------------------------------------------------


def test_a_stripe_of_zeros_is_zeroed_on_the_base_before_it_is_there() -> None:
    """Whatever a discard, an old disk or a copy cut short has left there."""
    b = Bench()
    b.hydrate(0, S)
    assert b.done(0, zeros=True) == [store_zeros(0, S, STRIPE)]
    assert b.e.state(S) == t.FETCHING
    assert b.e.table[S] == 0
    assert b.done(0, 0) == [grant(0, S)]
    assert b.e.state(S) == t.PRESENT
    assert b.e.hydrator_stats["zeros"] == 1
    assert b.e.hydrator_stats["stripes"] == 1


def test_zeroing_that_fails_is_a_copy_that_failed() -> None:
    b = Bench()
    b.hydrate(0, S)
    b.claim(1, S)
    b.done(0, zeros=True)
    assert b.done(0, -EIO) == [grant(0, S, -EIO), grant(1, S, t.CLAIMED)]
    assert b.e.table[S] == 0
    b = Bench()
    b.want(S)
    b.done(0, zeros=True)
    b.done(0, -EIO)
    assert b.e.state(S) == t.ABSENT


def test_what_a_buffer_held_before_says_nothing_of_its_next_stripe() -> None:
    b = Bench(buffers=2)
    b.hydrate(0, S)
    b.done(0, zeros=True)
    b.done(0)
    b.hydrate(0, 2)
    assert b.done(0) == [store(0, 2, STRIPE)]


def test_the_last_stripe_of_an_image_may_be_zeros() -> None:
    b = Bench(start=False, image_bytes=7 * STRIPE + 512)
    b.step(t.EVENT_START)
    assert b.done(0, zeros=True) == [store_zeros(0, 7, STRIPE)]


# -- the image is lost ----------------------------------------------------------------------------


def test_a_lost_image_is_read_no_more_and_demand_is_told() -> None:
    b = Bench(buffers=2)
    b.lose_image()
    assert b.hydrate(0, S) == [grant(0, S, -EIO)]
    assert (b.e.state(S), b.e.flags(S)) == (t.ABSENT, 0)
    assert b.want(2) == []
    assert b.background() == []
    assert b.budget(MUCH) == []
    assert b.tick() == []
    assert b.hydrate(0, S) == [grant(0, S, -EIO)]
    assert b.e.hydrator_stats["errors"] == 2


def test_what_was_read_of_it_is_not_stored_and_what_is_being_stored_is() -> None:
    b = Bench(buffers=4)
    b.hydrate(0, S)
    b.hydrate(1, 2)
    b.hydrate(2, 3)
    b.done(b.buffer_of(3))
    b.lose_image()
    assert b.done(b.buffer_of(S)) == [grant(0, S, -EIO)]
    assert b.done(b.buffer_of(2), -errno.EBADF) == [grant(1, 2, -errno.EBADF)]
    assert b.done(b.buffer_of(3)) == [grant(2, 3)]
    assert [b.e.state(stripe) for stripe in (S, 2, 3)] == [t.ABSENT, t.ABSENT, t.PRESENT]


def test_demand_that_waits_for_a_buffer_is_told_too() -> None:
    b = Bench(buffers=2)
    b.hydrate(0, 4)
    b.hydrate(1, 5)
    for tag, stripe in ((2, S), (3, S), (4, 2)):
        b.hydrate(tag, stripe)
    b.lose_image()
    assert b.done(0) == [grant(0, 4, -EIO), grant(2, S, -EIO), grant(3, S, -EIO),
                         grant(4, 2, -EIO)]
    assert b.done(1) == [grant(1, 5, -EIO)]


def test_claims_go_on_without_an_image() -> None:
    b = Bench(buffers=2)
    b.hydrate(0, 4)
    b.hydrate(1, 5)
    b.hydrate(2, S)
    b.claim(3, S)                      # behind a demand that waits
    b.claim(4, S)
    b.claim(5, 4)                      # behind a copy
    b.lose_image()
    assert b.claim(6, 7) == [grant(6, 7, t.CLAIMED), grant(2, S, -EIO), grant(3, S, t.CLAIMED)]
    assert b.done(0) == [grant(0, 4, -EIO), grant(5, 4, t.CLAIMED)]
    assert b.written_by(6, 7) == [done(6, 7)]
    # One that fails serves the next of them; who needs the image is told.
    b.hydrate(2, S)
    assert b.written_by(3, S, -ENOSPC) == [done(3, S, -ENOSPC), grant(4, S, t.CLAIMED),
                                           grant(2, S, -EIO)]
    assert b.written_by(4, S) == [done(4, S)]
    assert b.claim(0, 0) == [grant(0, 0, t.CLAIMED)]


def test_rounds_go_on_without_an_image() -> None:
    b = Bench(stripes=4)
    b.lose_image()
    b.make_present(0, 1, 2, 3)
    assert b.tick() == [sync(b.sync_token)]
    b.finish()
    assert b.hydrated == 1


@pytest.mark.parametrize("when", ["before", "read"])
def test_a_start_that_needs_a_lost_image_fails(when: str) -> None:
    b = Bench(start=False, image_bytes=7 * STRIPE + 512)
    if when == "before":
        b.lose_image()
        assert b.step(t.EVENT_START) == [act(t.ACT_STARTED, result=-EIO)]
    else:
        b.step(t.EVENT_START)
        b.lose_image()
        assert b.done(0) == [act(t.ACT_STARTED, result=-EIO)]
    assert b.e.life == t.LIFE_STOPPED
    assert b.tick() == []


def test_a_start_that_does_not_need_it_goes_on() -> None:
    b = Bench(start=False)
    b.lose_image()
    assert b.step(t.EVENT_START) == [act(t.ACT_STARTED)]


# -- whatever happens -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_it_is_hydrated_once_disks_are_sound(seed: int) -> None:
    """Every step is checked; then no event but ticks and completions is needed to end it."""
    source = random.Random(seed)
    stripes = source.choice([1, 2, 7, 40])
    b = Bench(buffers=source.choice([2, 3, 4, 8]), stripes=stripes, start=False,
              image_bytes=stripes * STRIPE - source.choice([0, 512]))
    b.step(t.EVENT_START)
    while b.e.life == t.LIFE_STARTING:
        b.done(next(iter(b.in_flight)))
    asking: dict[int, int] = {}        # tags that wait for a stripe
    claims: dict[int, int] = {}        # tags that have one to write

    def take(actions: list[t.Act]) -> None:
        for action in actions:
            if action.kind == t.ACT_SEND:
                stripe = asking.pop(action.tag)
                if action.message == t.MSG_GRANT and action.result == t.CLAIMED:
                    claims[action.tag] = stripe

    def end_one(*, sound: bool) -> None:
        token = source.choice(list(b.in_flight))
        error = source.choice([EIO, ENOSPC]) if not sound and source.random() < 0.3 else 0
        if token >= b.buffers:
            error = 0
        take(b.done(token, -error if error else None, zeros=source.random() < 0.3))

    def write_claim(tag: int, result: int) -> None:
        stripe = asking[tag] = claims.pop(tag)
        take(b.written_by(tag, stripe, result))

    for _ in range(150):
        lot = source.random()
        tag, stripe = source.randrange(6), source.randrange(stripes)
        if lot < 0.4 and b.in_flight:
            end_one(sound=False)
        elif lot < 0.5:
            b.want(stripe)
        elif lot < 0.65 and tag not in asking and tag not in claims:
            asking[tag] = stripe
            take((b.hydrate if lot < 0.6 else b.claim)(tag, stripe))
        elif lot < 0.75 and claims:
            write_claim(next(iter(claims)), source.choice([STRIPE, -EIO]))
        elif lot < 0.85:
            take(b.tick())
        elif lot < 0.95:
            take(b.budget(source.choice([0, 1, 3, MUCH])))
        else:
            take(b.background(source.random() < 0.7))
    take(b.budget(MUCH))
    take(b.background())
    for _ in itertools.count():
        if claims:
            write_claim(next(iter(claims)), STRIPE)
        elif b.in_flight:
            end_one(sound=True)
        elif b.hydrated:
            break
        else:
            rounds = b.e.hydrator_stats["rounds"]
            take(b.tick())
            assert b.in_flight or b.e.hydrator_stats["rounds"] > rounds or b.hydrated or (
                b.e.state_bytes.count(t.ABSENT))
        assert _ < 5000, "it does not get on"
    assert asking == {}
    assert b.e.hydrator_stats["durable"] == stripes
