"""Queues and hydrator together, in any order of events, with any errors: hypothesis decides."""

from __future__ import annotations

import errno

import pytest
from enginekit.world import BLOCKS, World
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ublk_ubi import _testing as t

QUEUES, DEPTH = 2, 3
NUMBERS = st.integers(0, 999)
ERRORS = st.sampled_from([errno.EIO, errno.ENOSPC, errno.ENODATA])
READ, WRITE, FLUSH = t.OP_READ, t.OP_WRITE, t.OP_FLUSH
DISCARD, ZEROES = t.OP_DISCARD, t.OP_WRITE_ZEROES
MODES = [t.CACHE_WRITEBACK, t.CACHE_WRITETHROUGH, t.CACHE_UNSAFE]


class Device(RuleBasedStateMachine):
    """Whatever a guest, a kernel and two disks may do to one another."""

    LIE = ""

    @initialize(copy_on_read=st.booleans(), cache=st.sampled_from(MODES), hydrate=st.booleans())
    def start(self, copy_on_read: bool, cache: int, hydrate: bool) -> None:
        self.world = World(queues=QUEUES, depth=DEPTH, copy_on_read=copy_on_read, cache=cache,
                           lie=self.LIE)
        if hydrate:
            self.world.budget(1 << 20)
            self.world.hydrate(True)

    def idle(self) -> list[tuple[int, int]]:
        return [(queue, tag) for queue in range(QUEUES) for tag in range(DEPTH)
                if (queue, tag) not in self.world.requests]

    @precondition(lambda self: self.idle())
    @rule(pick=NUMBERS, op=st.sampled_from([READ, WRITE, WRITE, WRITE, ZEROES, FLUSH]),
          fua=st.booleans(), block=st.integers(0, BLOCKS - 1), whole=st.booleans(),
          unmap=st.booleans())
    def submit(self, pick: int, op: int, fua: bool, block: int, whole: bool, unmap: bool) -> None:
        idle = self.idle()
        queue, tag = idle[pick % len(idle)]
        if whole:
            block -= block % 2
        self.world.submit(queue, tag, op, block, 2 if whole else 1,
                          fua=fua and op in (WRITE, ZEROES), unmap=unmap)

    @precondition(lambda self: self.idle())
    @rule(pick=NUMBERS, block=st.integers(0, BLOCKS - 1), count=st.integers(1, BLOCKS))
    def discard(self, pick: int, block: int, count: int) -> None:
        idle = self.idle()
        queue, tag = idle[pick % len(idle)]
        self.world.submit(queue, tag, DISCARD, block, min(count, BLOCKS - block))

    @precondition(lambda self: any(self.world.to_hydrator))
    @rule(pick=NUMBERS)
    def hydrator_gets_mail(self, pick: int) -> None:
        boxes = [queue for queue, box in enumerate(self.world.to_hydrator) if box]
        self.world.deliver_to_hydrator(boxes[pick % len(boxes)])

    @precondition(lambda self: any(self.world.to_queue))
    @rule(pick=NUMBERS)
    def queue_gets_mail(self, pick: int) -> None:
        boxes = [queue for queue, box in enumerate(self.world.to_queue) if box]
        self.world.deliver_to_queue(boxes[pick % len(boxes)])

    def pick_operation(self, pick: int) -> tuple[int, int]:
        operations = list(self.world.operations)
        return operations[pick % len(operations)]

    @precondition(lambda self: self.world.operations)
    @rule(pick=NUMBERS, choice=NUMBERS)
    def operation_ends(self, pick: int, choice: int) -> None:
        self.world.end(self.pick_operation(pick), choice=choice)

    @precondition(lambda self: self.world.operations)
    @rule(pick=NUMBERS, choice=NUMBERS)
    def another_operation_ends(self, pick: int, choice: int) -> None:
        """The same, so that it is chosen as often as what begins operations."""
        self.world.end(self.pick_operation(pick), choice=choice)

    @precondition(lambda self: self.world.operations)
    @rule(pick=NUMBERS, choice=NUMBERS, error=ERRORS,
          even_sync=st.sampled_from([False, False, False, False, True]))
    def operation_fails(self, pick: int, choice: int, error: int, even_sync: bool) -> None:
        """A failed fdatasync ends all that is interesting, so it is rare."""
        key = self.pick_operation(pick)
        syncs = self.world.operations[key].action.kind == t.ACT_SYNC_BASE
        self.world.end(key, choice=choice, error=0 if syncs and not even_sync else error)

    @precondition(lambda self: self.world.e.round_due)
    @rule()
    def round_begins(self) -> None:
        self.world.begin_round()

    @rule()
    def tick(self) -> None:
        self.world.tick()

    @rule(on=st.booleans())
    def hydrate(self, on: bool) -> None:
        self.world.hydrate(on)

    @rule(stripes=st.sampled_from([0, 1, 2, 1 << 20]))
    def budget(self, stripes: int) -> None:
        self.world.budget(stripes)

    @precondition(lambda self: not self.world.lost)
    @rule(lot=st.integers(0, 15))
    def image_is_lost(self, lot: int) -> None:
        """Rarely: it ends much of what is interesting."""
        if lot == 15:
            self.world.lose_image()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.stop()


HEALTH = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
Device.TestCase.settings = settings(
    max_examples=150, stateful_step_count=60, suppress_health_check=HEALTH)
TestDevice = Device.TestCase


@pytest.mark.parametrize("lie", ["fdatasync", "header bits", "table", "zeroing"])
def test_a_world_that_lies_is_found_out(lie: str) -> None:
    """An fdatasync that saves nothing, header bits too early, a lost table, zeros that are none."""
    machine = type(Device)(f"Lying about {lie}", (Device,), {"LIE": lie})
    with pytest.raises(AssertionError, match=r"after a (power loss|kill) block \d+ is"):
        run_state_machine_as_test(machine, settings=settings(
            max_examples=300, stateful_step_count=60, suppress_health_check=HEALTH,
            phases=[Phase.generate], derandomize=True, database=None))


@pytest.mark.parametrize("cache", MODES)
def test_a_world_is_hydrated_with_a_read_of_the_image_under_way(cache: int) -> None:
    """HYDRATED lets go of the image: a read of it may fail, and finds the stripe on the base."""
    world = World(queues=QUEUES, depth=DEPTH, copy_on_read=False, cache=cache)
    world.submit(0, 0, READ, 0, 1)
    (read,) = world.operations
    world.budget(1 << 20)
    world.hydrate(True)
    while not world.hydrated:
        others = [key for key in world.operations if key != read]
        if others:
            world.end(others[0])
        elif world.e.round_due:
            world.begin_round()
        else:
            world.tick()
    assert world.e.hydrator_stats["zeros"] == 1
    world.end(read, choice=1)
    (again,) = world.operations
    assert world.operations[again].action.kind == t.ACT_READ_BASE
    world.stop()
