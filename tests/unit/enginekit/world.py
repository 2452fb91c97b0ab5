"""A device in miniature: queues and hydrator joined by mailboxes, on an image and a base of blocks.

Whoever drives it decides the order of everything and what fails. After every step it is checked
what the guest could find if the daemon were killed now, or the power lost: not one guess, but
every block's every possible content. A small cousin of the simulator in tests/sim.
"""

from __future__ import annotations

import errno
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from enginekit.invariants import header_bits, problems
from ublk_ubi import _testing as t

if TYPE_CHECKING:
    from collections.abc import Iterable

STRIPE = 64 << 10
BLOCK = STRIPE // 2                # the unit of content
IMAGE_BYTES = 5 * STRIPE + BLOCK   # the last stripe is half the image's
ZERO_STRIPE = 3                    # all zeros in the image
STRIPES = 6                        # of the image; two more are the device's alone
BLOCKS = 2 * (STRIPES + 2)
BUFFERS = 2
NEVER = 1 << 60
HYDRATOR = -1
CHANGES_BASE = (t.ACT_WRITE_BASE, t.ACT_ZERO_BASE, t.ACT_DISCARD_BASE)
NO_BYTES = (t.ACT_SYNC_BASE, t.ACT_ZERO_BASE, t.ACT_DISCARD_BASE)   # their result counts none
GARBAGE, ZERO = "garbage", "zero"  # what a base holds that nobody wrote
CHANGED = "changed"                # what an image holds that is lost


def image_content(block: int) -> str:
    """Give what a block is before anybody writes it."""
    if block // 2 == ZERO_STRIPE or block * BLOCK >= IMAGE_BYTES:
        return ZERO
    return f"image {block}"


# -- what may be found --------------------------------------------------------------------------


@dataclass(eq=False)
class Written:
    """A guest's write of one block."""

    value: object
    issued: int
    ended: int = NEVER             # a write that failed may still take effect
    promised: bool = False         # it was said to be durable
    hint: bool = False             # a discard: from then on zeros may be found, or what was there


class History:
    """All writes of a block, and which of them a reader may find."""

    def __init__(self, initial: object) -> None:
        self.writes = [Written(initial, -1, -1)]

    def may_read(self, value: object, start: int) -> bool:
        """Whether a read that began at `start` may return `value`."""
        return any(
            not any(later.issued > write.ended and later.ended < start
                    for later in self.writes if not later.hint)
            for write in self.writes if write.value == value
        )

    def may_survive(self, value: object, *, power_loss: bool) -> bool:
        """Whether `value` may be there after a crash."""
        kept = [write for write in self.writes if not write.hint
                and (write.promised if power_loss else write.ended < NEVER)]
        return any(
            not any(later.issued > write.ended for later in kept)
            for write in self.writes if write.value == value
        )


class Cell:
    """A block of the base: what has been written to it, and from where on it may be lost."""

    def __init__(self, initial: object) -> None:
        self.values = [initial]
        self.durable = 0           # index: this one is safe
        self.spoilt = -1           # index: no fdatasync can make these safe any more

    def synced(self, index: int) -> None:
        """Take note of an fdatasync that began when `index` was the last."""
        if index > self.spoilt:
            self.durable = max(self.durable, index)


# -- what is under way --------------------------------------------------------------------------


@dataclass(eq=False)
class Request:
    """A guest's request; `blocks` of the device."""

    op: int
    issued: int
    blocks: list[int]
    durable: bool                  # is to be when it completes
    latched: bool                  # was the latch set when it came?
    writes: list[Written] = field(default_factory=list)
    found: list[object] | None = None


@dataclass(eq=False)
class Operation:
    """An action that the world has not ended yet."""

    action: t.Act
    places: list[object]           # keys of cells
    values: list[object]           # that are being written
    before: dict[object, int]      # the cells' last indices when it began


class World:
    """The device. `lie` makes it break one promise, to see that this is noticed."""

    def __init__(self, *, queues: int = 2, depth: int = 3, copy_on_read: bool = True,
                 cache: int = t.CACHE_WRITEBACK, lie: str = "") -> None:
        self.depth, self.cache, self.lie = depth, cache, lie
        # One stripe is PRESENT, as a killed daemon leaves it, and one DURABLE.
        self.e = t.Engines(
            stripes=STRIPES, queues=queues, depth=depth, stripe_bytes=STRIPE, buffers=BUFFERS,
            image_bytes=IMAGE_BYTES, device_bytes=BLOCKS * BLOCK, copy_on_read=copy_on_read,
            cache=cache, present=(1,), durable=(2,),
        )
        self.now = 0
        self.cells: dict[object, Cell] = {}
        for block in range(BLOCKS):
            stripe = block // 2
            self.cells[block] = cell = Cell(ZERO if stripe >= STRIPES else GARBAGE)
            if stripe in (1, 2):
                cell.values.append(image_content(block))
                cell.durable = stripe - 1
        self.cells["page"] = Cell(frozenset({2}))
        self.history = [History(image_content(block)) for block in range(BLOCKS)]
        self.to_hydrator = [deque() for _ in range(queues)]
        self.to_queue = [deque() for _ in range(queues)]
        self.requests: dict[tuple[int, int], Request] = {}
        self.operations: dict[tuple[int, int], Operation] = {}
        self.buffers: dict[int, list[object]] = {}
        self.started: int | None = None
        self.stopped: int | None = None
        self.faults = 0
        self.lost = False              # the image is not what it was
        self.hydrated = False          # the image may have been closed
        self._hydrator(t.EVENT_START)
        self.drain()
        assert self.started == 0

    # -- events; each may be chosen at any time --

    def submit(self, queue: int, tag: int, op: int, block: int, count: int, *,
               fua: bool = False, unmap: bool = False) -> None:
        """Send a request, of blocks that lie in one stripe unless it is a discard."""
        assert (queue, tag) not in self.requests
        blocks = [] if op == t.OP_FLUSH else list(range(block, block + count))
        changes = op in (t.OP_WRITE, t.OP_WRITE_ZEROES, t.OP_DISCARD)
        durable = (changes and op != t.OP_DISCARD and self.cache != t.CACHE_UNSAFE
                   and (fua or self.cache == t.CACHE_WRITETHROUGH))
        request = Request(op, self.now, blocks, durable, self.e.latch != 0)
        if changes:
            request.writes = [
                Written((self.now, block) if op == t.OP_WRITE else ZERO, self.now,
                        hint=op == t.OP_DISCARD) for block in blocks]
            for block_number, write in zip(blocks, request.writes, strict=True):
                self.history[block_number].writes.append(write)
        self.requests[queue, tag] = request
        self._queue(queue, t.EVENT_REQUEST, op=op, tag=tag, fua=int(fua), unmap=int(unmap),
                    offset=block * BLOCK, length=len(blocks) * BLOCK)

    def deliver_to_hydrator(self, queue: int) -> None:
        """Let the hydrator take a queue's oldest message."""
        message, tag, stripe, result = self.to_hydrator[queue].popleft()
        self._hydrator(t.EVENT_MESSAGE, op=message, queue=queue, tag=tag, stripe=stripe,
                       result=result)

    def deliver_to_queue(self, queue: int) -> None:
        """Let a queue take its oldest message."""
        message, tag, stripe, result = self.to_queue[queue].popleft()
        self._queue(queue, t.EVENT_MESSAGE, op=message, tag=tag, stripe=stripe, result=result)

    def end(self, key: tuple[int, int], *, error: int = 0, choice: int = 0) -> None:
        """End an operation; `choice` decides whatever is left open."""
        operation = self.operations.pop(key)
        kind = operation.action.kind
        if self.hydrated and kind == t.ACT_READ_IMAGE and choice % 2:
            error = errno.EBADF        # closed under it, and nobody's fault
        elif error:
            self.faults += 1
        if error:
            self._failed(operation, choice)
        else:
            self._done(key, operation, choice)
        owner, token = key
        result = -error or (0 if kind in NO_BYTES else operation.action.length)
        if owner == HYDRATOR:
            zeros = kind == t.ACT_READ_IMAGE and set(self.buffers.get(token, ())) == {ZERO}
            self._hydrator(t.EVENT_DONE, token=token, result=result, zeros=int(zeros))
        else:
            self._queue(owner, t.EVENT_DONE, token=token, result=result)

    def tick(self) -> None:
        """Let about a second pass."""
        self._hydrator(t.EVENT_TICK)

    def begin_round(self) -> None:
        """Let the round begin that is due."""
        self._hydrator(t.EVENT_ROUND)

    def hydrate(self, on: bool) -> None:
        """Begin to copy all of the image, or pause."""
        self._hydrator(t.EVENT_HYDRATE, op=int(on))

    def budget(self, stripes: int) -> None:
        """Let so many stripes be copied unasked."""
        self._hydrator(t.EVENT_BUDGET, offset=stripes * STRIPE)

    def lose_image(self) -> None:
        """Find that the image is another; it has been for a while."""
        self.lost = True
        self.e.lose_image()

    # -- to the end --

    def drain(self) -> None:
        """End and deliver everything, well, in some order."""
        for _ in range(2000):
            queues = range(len(self.to_queue))
            for queue in queues:
                if self.to_hydrator[queue]:
                    self.deliver_to_hydrator(queue)
                if self.to_queue[queue]:
                    self.deliver_to_queue(queue)
            if self.operations:
                self.end(next(iter(self.operations)))
            elif self.e.round_due:
                self.begin_round()
            elif not any(self.to_hydrator) and not any(self.to_queue):
                return
        raise AssertionError("it never comes to rest")

    def stop(self) -> None:
        """Stop, once all requests are answered; nothing may be left over."""
        self.drain()
        assert self.requests == {}
        for queue in range(len(self.to_queue)):
            assert self.e.queue_counts(queue) == (0, 0)
        self._hydrator(t.EVENT_STOP)
        self.drain()
        assert self.e.free_buffers == BUFFERS
        assert self.e.arriving == 0
        if self.e.latch:
            assert self.stopped is not None
            assert self.stopped < 0
        else:
            assert self.stopped == 0
            assert self.e.undurable == 0
            assert header_bits(self.e) == {at for at, row in enumerate(self.e.table) if row}

    # -- steps --

    def _queue(self, queue: int, kind: int, **fields: int) -> None:
        for action in self.e.queue_step(queue, kind, **fields):
            if action.kind == t.ACT_COMPLETE:
                self._complete(queue, action.tag, action.result)
            elif action.kind == t.ACT_SEND:
                # As the queue's thread does: hints leave a slot for every tag.
                box = self.to_hydrator[queue]
                if action.message != t.MSG_WANT or len(box) < self.depth:
                    box.append((action.message, action.tag, action.stripe, action.result))
            else:
                self._start(queue, action)
        self._check()

    def _hydrator(self, kind: int, **fields: int) -> None:
        for action in self.e.hydrator_step(kind, **fields):
            if action.kind == t.ACT_SEND:
                self.to_queue[action.queue].append(
                    (action.message, action.tag, action.stripe, action.result))
            elif action.kind == t.ACT_STARTED:
                self.started = action.result
            elif action.kind == t.ACT_STOPPED:
                assert not self.operations
                self.stopped = action.result
            elif action.kind == t.ACT_HYDRATED:
                assert not self.hydrated
                assert set(self.e.state_bytes) == {t.DURABLE}
                self.hydrated = True
            else:
                self._start(HYDRATOR, action)
        self._check()

    # -- operations --

    def _start(self, owner: int, action: t.Act) -> None:
        assert (owner, action.token) not in self.operations
        if action.kind == t.ACT_READ_IMAGE:
            assert not self.lost
            assert not self.hydrated
        places: list[object] = []
        values: list[object] = []
        if action.memory == t.MEM_PAGE:
            places, values = ["page"], [self._page()]
        elif action.kind != t.ACT_SYNC_BASE:
            image = action.kind == t.ACT_READ_IMAGE
            first, odd = divmod(action.offset - (0 if image else t.DATA_OFFSET), BLOCK)
            assert odd == 0
            places = list(range(first, first + action.length // BLOCK))
            if action.kind == t.ACT_DISCARD_BASE:
                assert all(block >= 2 * STRIPES or self.e.table[block // 2] for block in places)
            if action.kind in (t.ACT_ZERO_BASE, t.ACT_DISCARD_BASE):
                values = [ZERO] * len(places)
            elif action.kind == t.ACT_WRITE_BASE:
                values = (self.buffers[action.index] if action.memory == t.MEM_STRIPE
                          else [write.value for write in self.requests[owner, action.tag].writes])
                assert len(values) == len(places)
        before = {place: len(cell.values) - 1 for place, cell in self.cells.items()}
        self.operations[owner, action.token] = Operation(action, places, values, before)

    def _done(self, key: tuple[int, int], operation: Operation, choice: int) -> None:
        action = operation.action
        if action.kind == t.ACT_SYNC_BASE:
            if self.lie != "fdatasync":
                for place, index in operation.before.items():
                    self.cells[place].synced(index)
        elif action.kind == t.ACT_WRITE_BASE:
            if action.memory == t.MEM_PAGE and not self.lie:
                assert operation.values == [self._page()], "a page changed while it was written"
            for place, value in zip(operation.places, operation.values, strict=True):
                self.cells[place].values.append(value)
                if action.dsync:
                    self.cells[place].synced(len(self.cells[place].values) - 1)
        elif action.kind == t.ACT_ZERO_BASE:
            if self.lie != "zeroing":
                self._land(operation, -1)
        elif action.kind == t.ACT_DISCARD_BASE:
            self._land(operation, choice)
        elif action.kind == t.ACT_READ_IMAGE:
            self._deliver(key, action, [
                CHANGED if self.lost else image_content(block) for block in operation.places])
        else:
            self._deliver(key, action, [
                self._one_of(operation, block, choice >> at)
                for at, block in enumerate(operation.places)])

    def _one_of(self, operation: Operation, block: int, choice: int) -> object:
        """Give what a read of the base may find: old, new, or a write that is under way."""
        cell = self.cells[block]
        found = [*cell.values[operation.before[block] :], *self._under_way(block)]
        return found[choice % len(found)]

    def _deliver(self, key: tuple[int, int], action: t.Act, content: list[object]) -> None:
        if action.memory == t.MEM_STRIPE:
            self.buffers[action.index] = content
        else:
            self.requests[key[0], action.tag].found = content

    def _failed(self, operation: Operation, choice: int) -> None:
        """A failed write may have landed in part; a failed fdatasync saves nothing ever."""
        if operation.action.kind == t.ACT_SYNC_BASE:
            for cell in self.cells.values():
                cell.spoilt = len(cell.values) - 1
        elif operation.action.kind in CHANGES_BASE:
            self._land(operation, choice)

    def _land(self, operation: Operation, choice: int) -> None:
        """Let what is written come to the base, in the places whose bits are set in `choice`."""
        for at, (place, value) in enumerate(zip(operation.places, operation.values, strict=True)):
            if choice >> at & 1:
                self.cells[place].values.append(value)

    def _page(self) -> frozenset[int]:
        bits = header_bits(self.e)
        if self.lie == "header bits":
            bits |= {stripe for stripe, row in enumerate(self.e.table) if row}
        return frozenset(bits)

    def _under_way(self, place: object) -> Iterable[object]:
        """Give what is being written to a cell."""
        for operation in self.operations.values():
            if operation.action.kind in CHANGES_BASE and place in operation.places:
                yield operation.values[operation.places.index(place)]

    # -- answers --

    def _complete(self, queue: int, tag: int, result: int) -> None:
        request = self.requests.pop((queue, tag))
        good = result >= 0
        assert result == len(request.blocks) * BLOCK or result < 0
        assert good or self.faults or self.lost, "an error that nobody caused"
        if request.latched and (request.op == t.OP_FLUSH or request.durable):
            assert result == -errno.EIO
        if not good:
            return
        if request.op == t.OP_READ:
            assert request.found is not None
            for block, value in zip(request.blocks, request.found, strict=True):
                assert self.history[block].may_read(value, request.issued), (
                    f"block {block} reads {value!r}")
        elif request.op != t.OP_FLUSH:
            for write in request.writes:
                write.ended = self.now
                write.promised = request.durable
        elif self.cache != t.CACHE_UNSAFE:
            for history in self.history:
                for write in history.writes:
                    write.promised |= write.ended < request.issued

    # -- what holds after every step --

    def _check(self) -> None:
        self.now += 1
        assert problems(self.e, BUFFERS) == []
        bits = self.cells["page"].values[self.cells["page"].durable :]
        bits += self._under_way("page")
        table = self.e.table if self.lie != "table" else bytes(STRIPES)
        for block, cell in self.cells.items():
            if block == "page":
                continue
            stripe = block // 2
            behind = stripe >= STRIPES
            landing = list(self._under_way(block))
            # The daemon is killed: the table tells, and what is under way may still land.
            found = ([cell.values[-1], *landing] if behind or table[stripe]
                     else [image_content(block)])
            self._judge(block, found, power_loss=False)
            # The power is lost: a header bit that may be there tells.
            found = []
            if behind or any(stripe in page for page in bits):
                found += [*cell.values[cell.durable :], *landing]
            if not behind and not all(stripe in page for page in bits):
                found.append(image_content(block))
            self._judge(block, found, power_loss=True)

    def _judge(self, block: int, found: list[object], *, power_loss: bool) -> None:
        for value in found:
            assert self.history[block].may_survive(value, power_loss=power_loss), (
                f"after a {'power loss' if power_loss else 'kill'} block {block} is {value!r}")
