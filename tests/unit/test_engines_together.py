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


class Device(RuleBasedStateMachine):
    """Whatever a guest, a kernel and two disks may do to one another."""

    LIE = ""

    @initialize(copy_on_read=st.booleans())
    def start(self, copy_on_read: bool) -> None:
        self.world = World(queues=QUEUES, depth=DEPTH, copy_on_read=copy_on_read, lie=self.LIE)

    def idle(self) -> list[tuple[int, int]]:
        return [(queue, tag) for queue in range(QUEUES) for tag in range(DEPTH)
                if (queue, tag) not in self.world.requests]

    @precondition(lambda self: self.idle())
    @rule(pick=NUMBERS, op=st.sampled_from([READ, WRITE, WRITE, WRITE, FLUSH]), fua=st.booleans(),
          block=st.integers(0, BLOCKS - 1), whole=st.booleans())
    def submit(self, pick: int, op: int, fua: bool, block: int, whole: bool) -> None:
        idle = self.idle()
        queue, tag = idle[pick % len(idle)]
        if whole:
            block -= block % 2
        self.world.submit(queue, tag, op, block, 2 if whole else 1, fua=fua and op == WRITE)

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

    @rule()
    def tick(self) -> None:
        self.world.tick()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.stop()


HEALTH = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
Device.TestCase.settings = settings(
    max_examples=150, stateful_step_count=60, suppress_health_check=HEALTH)
TestDevice = Device.TestCase


@pytest.mark.parametrize("lie", ["fdatasync", "header bits", "table"])
def test_a_world_that_lies_is_found_out(lie: str) -> None:
    """An fdatasync that saves nothing, header bits too early, a table that is lost."""
    machine = type(Device)(f"Lying about {lie}", (Device,), {"LIE": lie})
    with pytest.raises(AssertionError, match=r"after a (power loss|kill) block \d+ is"):
        run_state_machine_as_test(machine, settings=settings(
            max_examples=300, stateful_step_count=60, suppress_health_check=HEALTH,
            phases=[Phase.generate], derandomize=True, database=None))
