"""The mailbox between queue and hydrator: order, bound, wrap-around, two threads, doorbell."""

from __future__ import annotations

import os
import threading

import pytest
from enginekit.forked import broken_invariant
from ublk_ubi._testing import Mail, MailboxBench

# Counters that wrap while the test runs: they are 32 bits wide.
STARTS = [0, 1, (1 << 31) - 3, (1 << 32) - 1, (1 << 32) - 3]


@pytest.mark.parametrize("start", STARTS)
def test_messages_come_whole_and_in_their_order(start: int) -> None:
    box = MailboxBench(8, start)
    assert box.empty
    assert box.take() is None
    sent = [Mail(kind=16 + i, tag=65535 - i, stripe=(1 << 32) - 1 - i, result=-i) for i in range(8)]
    for mail in sent:
        box.put(*mail)
        assert not box.empty
    assert [box.take() for _ in range(8)] == sent
    assert box.take() is None
    assert box.empty


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("capacity", [1, 2, 8])
def test_its_capacity_is_its_bound(start: int, capacity: int) -> None:
    box = MailboxBench(capacity, start)
    for turn in range(5):
        for i in range(capacity):
            assert box.room == capacity - i
            box.put(stripe=turn * capacity + i)
        assert box.room == 0
        if turn in (0, 4):
            assert broken_invariant(box.put) == "a mailbox has room for one message a tag"
        for i in range(capacity):
            assert box.take().stripe == turn * capacity + i
            assert box.room == i + 1


@pytest.mark.parametrize("start", STARTS)
def test_it_wraps_around_half_full(start: int) -> None:
    box = MailboxBench(4, start)
    box.put(stripe=0)
    for i in range(1, 50):
        box.put(stripe=i)
        assert box.room == 2
        assert box.take().stripe == i - 1


def race(box: MailboxBench, count: int, *bell: int) -> tuple[int, int]:
    """Send from one thread to another, neither under the interpreter's lock."""
    results = {}
    threads = [
        threading.Thread(target=lambda: results.update(taken=box.consume(count, *bell))),
        threading.Thread(target=lambda: results.update(rung=box.produce(count, *bell))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results["taken"], results["rung"]


@pytest.mark.parametrize("capacity", [1, 4, 1024])
def test_two_threads_pass_a_million_messages(capacity: int) -> None:
    count = 1_000_000 if capacity == 1024 else 20_000
    box = MailboxBench(capacity, (1 << 32) - count // 2)
    assert race(box, count)[0] == count
    assert box.empty


def test_a_sleeping_receiver_misses_no_message() -> None:
    """A lost wake-up would leave it asleep for ten seconds, and fail."""
    bell = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        for capacity in (1, 256):
            box = MailboxBench(capacity)
            taken, rung = race(box, 30_000, bell)
            assert taken == 30_000
            assert rung <= 30_000
    finally:
        os.close(bell)


def test_the_doorbell_is_rung_once_for_a_receiver_that_sleeps() -> None:
    box = MailboxBench(8)
    assert not box.needs_ringing()
    box.arm()
    box.put()
    assert box.needs_ringing()
    box.put()
    assert not box.needs_ringing()
    box.disarm()
    assert not box.needs_ringing()
    box.arm()
    box.disarm()
    assert not box.needs_ringing()
