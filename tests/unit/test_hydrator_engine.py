"""The hydrator engine: every stripe state × every message, fetches, buffers, bounds.

Commit rounds are in test_hydrator_rounds.py, start and stop in test_hydrator_life.py.
"""

from __future__ import annotations

import errno
import itertools

import pytest
from enginekit.actions import done, fetch, grant, store, sync
from enginekit.forked import broken_invariant
from enginekit.hydration import STRIPE, TAGS, Bench

from ublk_ubi import _testing as t

EIO = errno.EIO
S = 1                              # the stripe that the matrix looks at
OTHER, THIRD = 4, 5                # cold stripes that keep buffers busy


# -- a stripe's state × every message -------------------------------------------------------------


def absent(_b):
    pass


def wanted(b):
    b.want(OTHER)  # takes the one buffer that the reserve leaves
    b.want(S)


def queued(b):
    b.hydrate(4, OTHER)
    b.hydrate(5, THIRD)
    b.hydrate(2, S)


def fetching(b):
    b.hydrate(2, S)


def storing(b):
    b.hydrate(2, S)
    b.done(b.buffer_of(S))


def overwriting(b):
    b.claim(2, S)


def present(b):
    b.make_present(S)


def committing(b):
    b.make_present(S)
    b.tick()


def committed(b):
    committing(b)
    b.finish()


REACHED = {
    "ABSENT": (absent, t.ABSENT, 0),
    "ABSENT, wanted": (wanted, t.ABSENT, t.WANTED),
    "ABSENT, queued": (queued, t.ABSENT, t.QUEUED),
    "FETCHING, reading": (fetching, t.FETCHING, 0),
    "FETCHING, writing": (storing, t.FETCHING, 0),
    "OVERWRITING": (overwriting, t.OVERWRITING, 0),
    "PRESENT": (present, t.PRESENT, 0),
    "PRESENT, in round": (committing, t.PRESENT, t.IN_ROUND),
    "DURABLE": (committed, t.DURABLE, 0),
}
MESSAGES = {
    "want": lambda b: b.want(S),
    "hydrate": lambda b: b.hydrate(0, S),
    "claim": lambda b: b.claim(0, S),
    "written": lambda b: b.written_by(0, S),
    "written, failed": lambda b: b.written_by(0, S, -EIO),
    "join": lambda b: b.join(0),
    "join, then the round": lambda b: b.commit(0),
}
# With two buffers, stacked: the first that is taken is number 0.
MATRIX = {
    ("ABSENT", "want"): ([fetch(0, S, STRIPE)], t.FETCHING, 0),
    ("ABSENT", "hydrate"): ([fetch(0, S, STRIPE)], t.FETCHING, 0),
    ("ABSENT", "claim"): ([grant(0, S, t.CLAIMED)], t.OVERWRITING, 0),
    ("ABSENT", "join"): ([], t.ABSENT, 0),
    ("ABSENT", "join, then the round"): ([sync(2 + t.PAGE_WINDOW)], t.ABSENT, 0),
    ("ABSENT, wanted", "want"): ([], t.ABSENT, t.WANTED),
    ("ABSENT, wanted", "hydrate"): ([fetch(1, S, STRIPE)], t.FETCHING, 0),
    ("ABSENT, wanted", "claim"): ([grant(0, S, t.CLAIMED)], t.OVERWRITING, 0),
    ("ABSENT, queued", "want"): ([], t.ABSENT, t.QUEUED),
    ("ABSENT, queued", "hydrate"): ([], t.ABSENT, t.QUEUED),
    # Somebody waits for a fetch: it is not taken from him.
    ("ABSENT, queued", "claim"): ([], t.ABSENT, t.QUEUED),
    ("FETCHING, reading", "want"): ([], t.FETCHING, 0),
    ("FETCHING, reading", "hydrate"): ([], t.FETCHING, 0),
    ("FETCHING, reading", "claim"): ([], t.FETCHING, 0),
    ("FETCHING, writing", "want"): ([], t.FETCHING, 0),
    ("FETCHING, writing", "hydrate"): ([], t.FETCHING, 0),
    ("FETCHING, writing", "claim"): ([], t.FETCHING, 0),
    ("OVERWRITING", "want"): ([], t.OVERWRITING, 0),
    ("OVERWRITING", "hydrate"): ([], t.OVERWRITING, 0),
    ("OVERWRITING", "claim"): ([], t.OVERWRITING, 0),
    ("OVERWRITING", "written"): ([done(0, S)], t.PRESENT, 0),
    ("OVERWRITING", "written, failed"): ([done(0, S, -EIO)], t.ABSENT, 0),
    ("PRESENT", "want"): ([], t.PRESENT, 0),
    ("PRESENT", "hydrate"): ([grant(0, S)], t.PRESENT, 0),
    ("PRESENT", "claim"): ([grant(0, S)], t.PRESENT, 0),
    ("PRESENT", "join"): ([], t.PRESENT, 0),
    ("PRESENT", "join, then the round"): ([sync(2 + t.PAGE_WINDOW)], t.PRESENT, t.IN_ROUND),
    ("PRESENT, in round", "want"): ([], t.PRESENT, t.IN_ROUND),
    ("PRESENT, in round", "hydrate"): ([grant(0, S)], t.PRESENT, t.IN_ROUND),
    ("PRESENT, in round", "claim"): ([grant(0, S)], t.PRESENT, t.IN_ROUND),
    ("PRESENT, in round", "join"): ([], t.PRESENT, t.IN_ROUND),
    ("DURABLE", "want"): ([], t.DURABLE, 0),
    ("DURABLE", "hydrate"): ([grant(0, S)], t.DURABLE, 0),
    ("DURABLE", "claim"): ([grant(0, S)], t.DURABLE, 0),
    ("DURABLE", "join"): ([], t.DURABLE, 0),
    ("DURABLE", "join, then the round"): ([sync(2 + t.PAGE_WINDOW)], t.DURABLE, 0),
}
for cold in ("ABSENT, wanted", "ABSENT, queued", "FETCHING, reading", "FETCHING, writing",
             "OVERWRITING"):
    MATRIX[cold, "join"] = ([], *REACHED[cold][1:])
    MATRIX[cold, "join, then the round"] = ([sync(2 + t.PAGE_WINDOW)], *REACHED[cold][1:])


@pytest.mark.parametrize(("name", "message"), list(itertools.product(REACHED, MESSAGES)))
def test_every_message_in_every_state(name: str, message: str) -> None:
    b = Bench(buffers=2)
    reach, state, flags = REACHED[name]
    reach(b)
    assert (b.e.state(S), b.e.flags(S)) == (state, flags)
    if (name, message) not in MATRIX:
        assert broken_invariant(lambda: MESSAGES[message](b)) == (
            ONCE_DUE if message == "join, then the round"
            else "only a claimed stripe is reported written")
        return
    actions, state, flags = MATRIX[name, message]
    assert MESSAGES[message](b) == actions
    assert (b.e.state(S), b.e.flags(S)) == (state, flags)


# -- a fetch's phases × its completions -----------------------------------------------------------


def test_fetch_reads_the_image_then_writes_the_base_then_answers() -> None:
    b = Bench()
    assert b.hydrate(0, 3) == [fetch(0, 3, STRIPE)]
    assert b.done(0) == [store(0, 3, STRIPE)]
    assert b.e.state(3) == t.FETCHING
    assert b.done(0) == [grant(0, 3)]
    assert b.e.state(3) == t.PRESENT
    assert b.e.hydrator_stats["stripes"] == 1
    assert b.e.hydrator_stats["bytes"] == STRIPE


@pytest.mark.parametrize("writing", [False, True], ids=["read", "write"])
def test_failed_fetch_fails_those_who_waited_and_the_next_tries_again(writing: bool) -> None:
    b = Bench()
    b.hydrate(2, S)
    b.hydrate(0, S)
    b.hydrate(3, OTHER)
    b.hydrate(1, S)
    if writing:
        b.done(0)
    assert b.done(0, -errno.ENODATA) == [grant(tag, S, -errno.ENODATA) for tag in (2, 0, 1)]
    assert b.e.state(S) == t.ABSENT
    assert b.e.hydrator_stats["errors"] == 1
    assert b.e.undurable == 0
    assert b.hydrate(0, S) == [fetch(0, S, STRIPE)]
    assert b.done(0) == [store(0, S, STRIPE)]
    assert b.done(0) == [grant(0, S)]
    # Who waits for another stripe has noticed nothing.
    b.done(1)
    assert b.done(1) == [grant(3, OTHER)]


def test_whole_stripe_writes_survive_a_failed_fetch_they_waited_for() -> None:
    """They need nothing of the image: the first gets the stripe, the others wait for him."""
    b = Bench()
    b.want(S)
    for tag in (0, 3):
        assert b.claim(tag, S) == []
    assert b.hydrate(1, S) == []
    assert b.claim(2, S) == []
    assert b.done(0, -EIO) == [grant(0, S, t.CLAIMED), grant(1, S, -EIO)]
    assert b.e.state(S) == t.OVERWRITING
    assert b.written_by(0, S) == [done(0, S), grant(3, S), grant(2, S)]


def test_whole_stripe_writes_that_fail_one_by_one_are_all_answered() -> None:
    b = Bench()
    b.want(S)
    for tag in range(3):
        assert b.claim(tag, S) == []
    for tag in range(3):
        assert b.done(0, -EIO) == [grant(tag, S, t.CLAIMED)]
        again = [fetch(0, S, STRIPE)] if tag < 2 else []
        assert b.written_by(tag, S, -EIO) == [done(tag, S, -EIO), *again]
    assert b.e.state(S) == t.ABSENT


def test_waiters_are_answered_in_the_order_they_came() -> None:
    """Also when stripes share a hash bucket: with 8 tags, stripes that are 8 apart do."""
    b = Bench(stripes=24)
    orders = {1: [], 9: [], 17: []}
    for tag, stripe in enumerate([9, 1, 17, 1, 9, 1, 17, 9]):
        orders[stripe].append(tag)
        b.hydrate(tag, stripe)
    for stripe in (1, 17, 9):
        b.done(b.buffer_of(stripe))
        assert b.done(b.buffer_of(stripe)) == [grant(tag, stripe) for tag in orders[stripe]]


def test_failed_overwrite_is_told_and_those_who_waited_are_fetched_for() -> None:
    b = Bench()
    b.claim(0, S)
    b.hydrate(1, S)
    b.claim(2, S)
    assert b.written_by(0, S, -errno.ENOSPC) == [done(0, S, -errno.ENOSPC), fetch(0, S, STRIPE)]
    b.done(0)
    assert b.done(0) == [grant(1, S), grant(2, S)]


def test_overwrite_lets_those_who_waited_go_on() -> None:
    b = Bench()
    b.claim(0, S)
    b.hydrate(1, S)
    assert b.written_by(0, S) == [done(0, S), grant(1, S)]
    assert b.e.hydrator_stats["whole_stripe_writes"] == 1
    assert b.e.hydrator_stats["stripes"] == 0


def test_a_claim_takes_a_wanted_stripe_and_its_hint_is_void() -> None:
    b = Bench(buffers=2)
    wanted(b)
    assert b.claim(0, S) == [grant(0, S, t.CLAIMED)]
    b.done(0)
    assert b.done(0) == []  # OTHER is done; S is not fetched, though it is in the queue
    assert b.written_by(0, S, -EIO) == [done(0, S, -EIO)]
    assert b.want(S) == [fetch(0, S, STRIPE)]


def test_the_queues_number_is_kept() -> None:
    b = Bench(queues=3, depth=4)
    b.tell(t.MSG_HYDRATE, tag=2, stripe=S, queue=2)
    b.tell(t.MSG_HYDRATE, tag=2, stripe=S, queue=1)
    b.tell(t.MSG_JOIN, tag=3, queue=2)
    b.begin_round()
    assert b.synced_now() == [done(3, queue=2)]
    b.done(0)
    assert b.done(0) == [grant(2, S, queue=2), grant(2, S, queue=1)]


# -- buffers --------------------------------------------------------------------------------------


def test_demand_goes_before_copy_on_read_and_finds_a_reserve() -> None:
    b = Bench(buffers=4, stripes=16)
    for stripe in range(4):
        b.want(stripe)
    assert [stripe for stripe, _ in b.e.fetches()] == [0, 1, 2]  # one of four is kept
    assert b.hydrate(0, 10) == [fetch(3, 10, STRIPE)]
    assert b.hydrate(1, 11) == []
    assert b.want(5) == []
    b.done(1)
    assert b.done(1) == [fetch(1, 11, STRIPE)]
    b.done(2)
    assert b.done(2) == []  # the last free one is the reserve again
    b.done(0)
    assert b.done(0) == [fetch(0, 3, STRIPE)]


@pytest.mark.parametrize(("buffers", "usable"), [(2, 1), (3, 2), (4, 3), (8, 6), (32, 24)])
def test_copy_on_read_leaves_a_quarter_of_the_buffers_and_one_at_least(buffers, usable) -> None:
    b = Bench(buffers=buffers, stripes=64, wanted=64)
    for stripe in range(64):
        b.want(stripe)
    assert len(b.e.fetches()) == usable
    b.finish()
    assert b.e.state_bytes == bytes([t.PRESENT]) * 64


@pytest.mark.parametrize("result", [None, -EIO])
def test_no_buffer_is_lost_whatever_happens(result: int | None) -> None:
    b = Bench(buffers=3, stripes=32, depth=16)
    for stripe in range(12):
        b.hydrate(stripe, stripe)
        b.want(stripe + 16)
    while b.in_flight:
        token = next(iter(b.in_flight))
        failing = result if b.in_flight[token].stripe % 3 else None
        b.done(token, failing)
    assert b.e.free_buffers == 3
    assert t.FETCHING not in b.e.state_bytes


def test_hints_beyond_the_queue_are_dropped_and_may_come_again() -> None:
    b = Bench(buffers=2, stripes=32, wanted=4)
    for stripe in range(8):
        b.want(stripe)
    assert b.e.hydrator_stats["hints_dropped"] == 3  # one is being fetched, four wait
    b.finish()
    assert b.e.state_bytes.count(t.PRESENT) == 5
    assert b.want(7) == [fetch(0, 7, STRIPE)]


def test_hints_for_what_is_under_way_are_no_work() -> None:
    b = Bench(buffers=2)
    for _ in range(3):
        b.want(S)
        b.want(OTHER)
    assert b.e.hydrator_stats["hints_dropped"] == 0
    assert len(b.in_flight) == 1
    b.finish()
    assert b.e.hydrator_stats["stripes"] == 2


def test_a_demanded_stripe_that_was_wanted_is_fetched_once() -> None:
    b = Bench(buffers=2)
    wanted(b)
    b.hydrate(0, S)
    b.finish()
    assert b.e.hydrator_stats["stripes"] == 2
    assert b.in_flight == {}


# -- what must not happen -------------------------------------------------------------------------


def event(kind: int, **fields: int):
    return lambda b: b.step(kind, **fields)


def message(op: int, **fields: int):
    return event(t.EVENT_MESSAGE, op=op, **fields)


SYNC, PAGE_0 = 4 + t.PAGE_WINDOW, 4
ONE_ASK = "a tag asks once, and then awaits the answer"
IN_PHASE = "pages are written in their phase of a round only"
ONCE_DUE = "a round begins once it is due"
SYNCED_ONCE = "an fdatasync ends once"
KNOWN = "an event is one that the hydrator knows"
SENT = "a queue sends WANT, HYDRATE, CLAIM, WRITTEN and JOIN"


def idle(_b):
    pass


def syncing(b):
    b.make_present(S)
    b.tick()


def writing_pages(b):
    syncing(b)
    b.synced_now()


def syncing_pages(b):
    writing_pages(b)
    b.done(b.page_token())


ILLEGAL = {
    "START twice": (idle, event(t.EVENT_START), "a hydrator starts once"),
    "a request": (idle, event(t.EVENT_REQUEST), KNOWN),
    "no event": (idle, event(0), KNOWN),
    "GRANT": (idle, message(t.MSG_GRANT), SENT),
    "DONE": (idle, message(t.MSG_DONE), SENT),
    "queue too high": (idle, message(t.MSG_JOIN, queue=1), "a message comes from a tag of a queue"),
    "tag too high": (idle, message(t.MSG_JOIN, tag=TAGS), "a message comes from a tag of a queue"),
    **{
        f"stripe too high {op}": (idle, message(op, stripe=8),
                                  "only stripes of the image are hydrated")
        for op in (t.MSG_WANT, t.MSG_HYDRATE, t.MSG_CLAIM, t.MSG_WRITTEN)
    },
    **{
        f"a tag that waits for a {waits} asks for {op}": (
            reach, message(op, tag=2, stripe=S), ONE_ASK)
        for waits, reach in (("stripe", fetching), ("round", lambda b: b.join(2)))
        for op in (t.MSG_HYDRATE, t.MSG_CLAIM, t.MSG_JOIN, t.MSG_WRITTEN)
    },
    "I/O of a free buffer": (idle, event(t.EVENT_DONE, token=1, result=STRIPE),
                             "I/O ends only for a buffer in use"),
    "I/O of a free buffer, failed": (idle, event(t.EVENT_DONE, token=1, result=-EIO),
                                     "I/O ends only for a buffer in use"),
    "token too high": (idle, event(t.EVENT_DONE, token=SYNC + 1),
                       "a token is one that was given out"),
    "a round that nobody has joined": (idle, event(t.EVENT_ROUND), ONCE_DUE),
    "a round while one runs": (lambda b: (b.commit(0), b.join(1)), event(t.EVENT_ROUND), ONCE_DUE),
    "sync without a round": (idle, event(t.EVENT_DONE, token=SYNC), SYNCED_ONCE),
    "sync while pages are written": (writing_pages, event(t.EVENT_DONE, token=SYNC), SYNCED_ONCE),
    "page without a round": (idle, event(t.EVENT_DONE, token=PAGE_0), IN_PHASE),
    "page while data is synced": (syncing, event(t.EVENT_DONE, token=PAGE_0), IN_PHASE),
    "page while pages are synced": (syncing_pages, event(t.EVENT_DONE, token=PAGE_0), IN_PHASE),
    "another page than is written": (writing_pages, event(t.EVENT_DONE, token=PAGE_0 + 1),
                                     "a page write ends once"),
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_what_must_not_happen_ends_the_process(name: str) -> None:
    reach, step, invariant = ILLEGAL[name]
    b = Bench()
    reach(b)
    assert broken_invariant(lambda: step(b)) == invariant


def test_stop_before_start_ends_the_process() -> None:
    b = Bench(start=False)
    assert broken_invariant(lambda: b.step(t.EVENT_STOP)) == "a hydrator starts before it stops"


def test_states_that_a_device_cannot_open_with_end_the_process() -> None:
    said = broken_invariant(lambda: t.Engines(buffers=1))
    assert said == "demand and copy-on-read both need a stripe buffer"
    said = broken_invariant(lambda: t.Engines(wanted=3))
    assert said == "a fifo's capacity is a power of two"


# -- bounds ---------------------------------------------------------------------------------------


def test_no_step_emits_more_than_its_documented_maximum() -> None:
    """queues × depth + buffers + PAGE_WINDOW + 3: the engine's array has just that room, and
    `emit` aborts beyond. The worst steps there are, each driven to its maximum."""
    queues, depth, buffers = 2, 8, 32
    tags = queues * depth
    b = Bench(queues=queues, depth=depth, buffers=buffers, stripes=100_000, wanted=64)
    everyone = [(queue, tag) for queue in range(queues) for tag in range(depth)]
    # All tags wait for one stripe.
    for queue, tag in everyone:
        b.tell(t.MSG_HYDRATE, tag, S, queue=queue)
    b.done(0)
    assert len(b.done(0)) == tags
    # All tags have joined, and the latch is set before their round begins.
    for queue, tag in everyone:
        b.tell(t.MSG_JOIN, tag, queue=queue)
    b.e.latch = EIO
    assert len(b.begin_round()) == tags
    b.e.latch = 0
    # All tags but one wait in a list of joiners, the other's round ends.
    b.tell(t.MSG_JOIN, 0)
    b.begin_round()
    for queue, tag in everyone[1:]:
        b.tell(t.MSG_JOIN, tag, queue=queue)
    b.synced_now()
    b.done(b.page_token())
    assert len(b.synced_now()) == 1
    b.begin_round()
    assert len(b.synced_now()) == tags - 1
    # … and fails, so that all are answered at once.
    b.make_present(2)
    for queue, tag in everyone:
        b.tell(t.MSG_JOIN, tag, queue=queue)
    b.begin_round()
    assert len(b.synced_now(-EIO)) == tags
    # As many pages at once as the window has.
    b.e.latch = 0
    b.make_present(*range(3, 100_000, 2048))
    b.tick()
    assert len(b.synced_now()) == t.PAGE_WINDOW
    b.finish()
    # Start with a queue full of hints: as many fetches at once as copy-on-read may have.
    c = Bench(start=False, buffers=buffers, stripes=64, wanted=64, present=(63,))
    c.step(t.EVENT_START)
    for stripe in range(40):
        c.want(stripe)
    c.synced_now()
    c.done(c.page_token())
    assert len(c.synced_now()) == 1 + buffers - buffers // 4
    # As many as background hydration may have, all at once; and as many demands as it ever takes.
    d = Bench(queues=queues, depth=depth, buffers=buffers, stripes=64, wanted=64)
    d.budget(64)
    assert len(d.background()) == buffers // 2
    # A lost image fails all that wait, in one step.
    f = Bench(queues=queues, depth=depth, buffers=2, stripes=64)
    for at, (queue, tag) in enumerate(everyone):
        f.tell(t.MSG_HYDRATE, tag, at, queue=queue)
    f.lose_image()
    assert len(f.done(0)) == tags - 1
    # The last of all stripes becomes durable: every joiner, and HYDRATED.
    g = Bench(queues=queues, depth=depth, stripes=1)
    g.tell(t.MSG_JOIN, 0)
    g.begin_round()
    g.make_present(0)
    for queue, tag in everyone[1:]:
        g.tell(t.MSG_JOIN, tag, queue=queue)
    g.synced_now()
    g.begin_round()
    g.synced_now()
    g.done(g.page_token())
    assert len(g.synced_now()) == tags - 1 + 1
    most = max(bench.e.most_hydrator_actions for bench in (b, c, d, f, g))
    assert most <= tags + buffers + t.PAGE_WINDOW + 3
