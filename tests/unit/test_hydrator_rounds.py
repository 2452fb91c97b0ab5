"""Commit rounds: their order, who joins, what is in the pages, and what a failure leaves."""

from __future__ import annotations

import errno

import pytest
from enginekit.actions import done, grant, sync, write_page
from enginekit.hydration import Bench
from enginekit.invariants import in_round

from ublk_ubi import _testing as t

EIO = errno.EIO
S = 1


def test_the_order_of_a_round() -> None:
    b = Bench()
    b.make_present(S, 3)
    assert b.join(0) == []
    assert b.begin_round() == [sync(b.sync_token)]
    assert b.synced_now() == [write_page(b.page_token(), 0)]
    assert b.written == [(0, {S, 3})]
    assert b.done(b.page_token()) == [sync(b.sync_token)]
    assert b.e.undurable == 2
    assert b.synced_now() == [done(0)]
    assert (b.e.undurable, b.e.state(S), b.e.state(3)) == (0, t.DURABLE, t.DURABLE)
    assert b.e.hydrator_stats["rounds"] == 1
    assert b.e.hydrator_stats["pages"] == 1
    assert b.e.hydrator_stats["joined"] == 1


@pytest.mark.parametrize("phase", ["data", "pages", "pages' sync"])
@pytest.mark.parametrize("changes", [False, True])
def test_the_base_is_synced_by_an_fdatasync_that_began_after_its_last_change(
        phase: str, changes: bool) -> None:
    b = Bench()
    b.make_present(S)
    b.e.base = t.BASE_CHANGED
    b.commit(0)
    for at, end in (("data", b.synced_now), ("pages", lambda: b.done(b.page_token())),
                    ("pages' sync", b.synced_now)):
        if at != "pages":
            assert b.e.base == t.BASE_SYNCING
        elif changes and phase == "data":
            assert b.e.base == t.BASE_CHANGED
        else:
            assert b.e.base == t.BASE_SYNCED
        if changes and at == phase:
            b.e.base = t.BASE_CHANGED
        end()
    late = changes and phase == "pages' sync"
    assert b.e.base == (t.BASE_CHANGED if late else t.BASE_SYNCED)


@pytest.mark.parametrize("latched", [False, True])
def test_an_fdatasync_that_fails_has_synced_nothing(latched: bool) -> None:
    b = Bench()
    b.commit(0)
    b.e.latch = EIO if latched else 0
    b.synced_now(0 if latched else -EIO)
    assert b.e.base == t.BASE_SYNCING


def test_a_round_without_stripes_is_one_fdatasync() -> None:
    b = Bench()
    assert b.commit(0) == [sync(b.sync_token)]
    assert b.synced_now() == [done(0)]
    assert b.written == []


@pytest.mark.parametrize("phase", ["data", "pages", "pages' sync"])
def test_who_joins_while_a_round_runs_is_served_by_the_next(phase: str) -> None:
    b = Bench()
    b.make_present(S)
    b.commit(0)
    if phase != "data":
        b.synced_now()
    if phase == "pages' sync":
        b.done(b.page_token())
    assert b.join(1) == []
    assert b.join(2) == []
    b.make_present(3)
    answers = []
    while not answers:
        answers = [a for a in b.done(next(iter(b.in_flight))) if a.kind == t.ACT_SEND]
    assert answers == [done(0)]
    assert b.e.round == t.ROUND_IDLE
    assert b.begin_round() == [sync(b.sync_token)]
    assert in_round(b.e) == {3}
    b.finish()
    assert b.e.state(3) == t.DURABLE
    assert b.e.hydrator_stats["rounds"] == 2
    assert b.e.hydrator_stats["joined"] == 3


def test_joiners_are_answered_in_the_order_they_came() -> None:
    b = Bench()
    b.commit(5, 1)
    for tag in (3, 0, 4):
        b.join(tag)
    assert b.synced_now() == [done(5), done(1)]
    b.begin_round()
    assert b.synced_now() == [done(3), done(0), done(4)]


def test_who_joins_before_the_round_begins_shares_it_with_what_is_present_by_then() -> None:
    b = Bench()
    b.make_present(S)
    b.join(0)
    b.make_present(3)
    b.join(1)
    b.begin_round()
    assert in_round(b.e) == {S, 3}
    b.finish()
    assert b.e.hydrator_stats["rounds"] == 1
    assert b.e.hydrator_stats["joined"] == 2


@pytest.mark.parametrize("stripes", [(), (S,)])
def test_a_tick_begins_the_round_that_is_due(stripes: tuple[int, ...]) -> None:
    b = Bench()
    b.make_present(*stripes)
    b.join(0)
    assert b.tick() == [sync(b.sync_token)]
    b.finish()
    assert b.e.hydrator_stats["joined"] == 1


@pytest.mark.parametrize("event", ["round", "tick", "stop"])
def test_latch_that_a_queue_sets_before_the_round_begins_fails_the_joiners(event: str) -> None:
    b = Bench()
    b.make_present(S)
    b.join(0)
    b.join(1)
    b.e.latch = EIO
    step = {"round": b.begin_round, "tick": b.tick, "stop": lambda: b.step(t.EVENT_STOP)}[event]
    assert step()[:2] == [done(0, result=-EIO), done(1, result=-EIO)]
    assert not b.e.round_due
    assert b.in_flight == {}


@pytest.mark.parametrize("phase", ["data", "pages", "pages' sync"])
def test_a_stripe_that_becomes_present_during_a_round_is_not_in_its_pages(phase: str) -> None:
    b = Bench(stripes=5000)
    b.make_present(S, 3000)
    b.tick()
    if phase == "data":
        b.make_present(2)
    b.synced_now()
    if phase == "pages":
        b.make_present(2)
    b.done(b.page_token(0))
    b.done(b.page_token(1))
    if phase == "pages' sync":
        b.make_present(2)
    assert b.written == [(0, {S, 3000}), (1, {S, 3000})]
    b.synced_now()
    assert (b.e.state(S), b.e.state(2), b.e.undurable) == (t.DURABLE, t.PRESENT, 1)
    b.tick()
    b.finish()
    assert b.written[2:] == [(0, {S, 2, 3000})]
    assert b.e.undurable == 0


def test_a_stripe_hydrated_by_a_fetch_that_ends_during_a_round_waits_for_the_next() -> None:
    b = Bench()
    b.make_present(S)
    b.hydrate(0, 2)
    b.tick()
    b.done(0)
    b.done(0)
    assert b.e.state(2) == t.PRESENT
    b.synced_now()
    assert b.written == [(0, {S})]
    b.done(b.page_token())
    b.synced_now()
    assert b.e.state(2) == t.PRESENT
    assert b.e.undurable == 1


@pytest.mark.parametrize("joiners", [0, 2])
def test_failed_page_write_fails_the_joiners_and_the_stripes_are_present_again(joiners) -> None:
    b = Bench()
    b.make_present(S)
    b.tick() if not joiners else b.commit(0)
    answers = [done(0, result=-errno.ENOSPC)] if joiners else []
    b.synced_now()
    assert b.done(b.page_token(), -errno.ENOSPC) == answers
    assert (b.e.state(S), b.e.flags(S), b.e.undurable) == (t.PRESENT, 0, 1)
    assert b.e.latch == 0
    assert b.e.hydrator_stats["round_errors"] == 1
    assert b.tick() == [sync(b.sync_token)]
    assert b.synced_now() == [write_page(b.page_token(), 0)]
    b.done(b.page_token())
    assert b.synced_now() == []
    assert (b.e.state(S), b.e.undurable) == (t.DURABLE, 0)


def test_failed_page_write_stops_the_round_and_waits_for_its_other_pages() -> None:
    stripes = 40 * 2048
    b = Bench(stripes=stripes)
    b.make_present(*range(0, stripes, 2048))
    b.commit(0)
    b.synced_now()
    first, *others = list(b.in_flight)
    assert len(others) == t.PAGE_WINDOW - 1
    assert b.done(first, -EIO) == []
    for token in others[:-1]:
        assert b.done(token) == []
    assert b.done(others[-1], -errno.ENOSPC) == [done(0, result=-errno.ENOSPC)]
    assert len(b.written) == t.PAGE_WINDOW
    assert b.e.undurable == 40
    assert b.e.state_bytes.count(t.DURABLE) == 0
    b.tick()
    b.finish()
    assert b.e.undurable == 0
    assert len(b.written) == t.PAGE_WINDOW + 40


@pytest.mark.parametrize("phase", ["data", "pages"])
def test_failed_fdatasync_is_latched_and_nothing_is_committed_any_more(phase: str) -> None:
    b = Bench()
    b.make_present(S)
    b.commit(0)
    b.join(1)
    if phase == "pages":
        b.synced_now()
        b.done(b.page_token())
    pages = len(b.written)
    assert b.synced_now(-errno.ENOSPC) == [done(0, result=-errno.ENOSPC), done(1, result=-EIO)]
    assert b.e.latch == errno.ENOSPC
    assert b.e.undurable == 1
    assert b.e.state(S) == t.PRESENT
    assert b.tick() == []
    for tag in range(3):
        assert b.join(tag) == [done(tag, result=-EIO)]
    b.make_present(2, 3)
    b.hydrate(0, 5)
    b.finish()
    assert b.tick() == []
    assert b.e.state_bytes.count(t.PRESENT) == 4
    assert b.e.undurable == 4
    assert len(b.written) == pages


@pytest.mark.parametrize("phase", ["data", "pages", "pages' sync"])
def test_latch_that_a_queue_sets_during_a_round_ends_it(phase: str) -> None:
    stripes = 40 * 2048
    b = Bench(stripes=stripes)
    b.make_present(*range(0, stripes, 2048))
    b.commit(0, 1)
    if phase != "data":
        b.synced_now()
    if phase == "pages' sync":
        while any(action.memory == t.MEM_PAGE for action in b.in_flight.values()):
            b.done(next(iter(b.in_flight)))
    b.e.latch = EIO
    pages, answers = len(b.written), []
    while b.in_flight:
        answers += b.done(next(iter(b.in_flight)))
    assert answers == [done(0, result=-EIO), done(1, result=-EIO)]
    assert len(b.written) == pages
    assert b.e.undurable == 40


def test_page_window_is_kept_with_many_dirty_pages() -> None:
    stripes = 45_000
    b = Bench(stripes=stripes)
    dirty = list(range(0, stripes, 1500))
    b.make_present(*dirty)
    b.commit(0)
    b.synced_now()
    pages = {t.header_place(stripe)[1] for stripe in dirty}
    assert len(pages) > t.PAGE_WINDOW
    most = 0
    while any(action.memory == t.MEM_PAGE for action in b.in_flight.values()):
        most = max(most, len(b.in_flight))
        b.done(list(b.in_flight)[len(b.in_flight) // 2])  # not in their order
    assert most == t.PAGE_WINDOW
    assert sorted(page for page, _ in b.written) == sorted(pages)
    assert all(bits == set(dirty) for _, bits in b.written)
    assert b.synced_now() == [done(0)]
    assert b.e.state_bytes.count(t.DURABLE) == len(dirty)
    # Next time only what is new is written.
    b.make_present(1, 2, 44_999)
    b.tick()
    b.finish()
    assert [page for page, _ in b.written[len(pages):]] == [0, 21]


@pytest.mark.parametrize("stripe", [0, 2040, 2041, 4088, 4089, 6136])
def test_headers_are_in_the_page_that_is_written(stripe: int) -> None:
    b = Bench(stripes=6137)
    b.make_present(stripe)
    b.tick()
    (page,) = b.synced_now()
    at = 14 + 2 * stripe
    assert page.index == at // 4096
    assert page.offset <= at < page.offset + page.length
    assert b.e.pages[at] == 1


def test_foreign_bytes_of_the_pages_are_kept() -> None:
    stripes = 100
    b = Bench(stripes=stripes, durable=(3,))
    headers = range(14, 14 + 2 * stripes, 2)
    for at in headers:
        b.e.set_page_byte(at + 1, 0xC0 | at & 0xF)
    for at in range(14 + 2 * stripes, 4096):
        b.e.set_page_byte(at, at * 7 & 0xFF)
    b.e.set_page_byte(14 + 2 * 3, 0x80)  # ≠ 0 is hydrated, whatever it is
    found = bytearray(b.e.pages)
    b.make_present(0, 50, 99)
    b.tick()
    b.finish()
    for stripe in (0, 50, 99):
        found[14 + 2 * stripe] = 1
    assert b.e.pages == bytes(found)
    assert b.e.state(50) == t.DURABLE


def test_ticks_commit_once_there_is_something_and_one_round_at_a_time() -> None:
    b = Bench()
    assert b.tick() == []
    b.make_present(S)
    assert b.tick() == [sync(b.sync_token)]
    b.make_present(2)
    assert b.tick() == []
    b.finish()
    assert b.e.undurable == 1
    assert b.tick() == [sync(b.sync_token)]
    b.finish()
    assert b.tick() == []


def test_a_guests_write_to_a_present_stripe_does_not_disturb_its_round() -> None:
    """Whoever may write asks for nothing; the bit says where the data is, not what it is."""
    b = Bench()
    b.make_present(S)
    b.tick()
    assert b.hydrate(0, S) == [grant(0, S)]
    b.finish()
    assert b.e.state(S) == t.DURABLE


def test_no_page_token_is_lost_however_rounds_end() -> None:
    b = Bench(stripes=20 * 2048)
    for turn in range(12):
        b.make_present(*range(turn, 20 * 2048, 2048))
        b.tick()
        b.synced_now()
        while any(action.memory == t.MEM_PAGE for action in b.in_flight.values()):
            b.done(next(iter(b.in_flight)), -EIO if turn % 3 == 0 else None)
        b.finish()
    assert len(b.written) > 20 * 7
