"""Work that waits, on threads: lanes of a bounded number each. Outcomes come back on the loop.

Lanes do not get in each other's way: a hundred creates hold up no status. In a lane clients take
turns, so that one with hundreds of requests holds up nobody else's; too many of one client's are
refused (busy). What was only asked for is not done for a client that has left.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import threading
from collections import deque
from typing import TYPE_CHECKING

from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.rpc_server import Deferred

if TYPE_CHECKING:
    from collections.abc import Callable

LANES = {"look": 2, "ask": 8, "steer": 4, "make": 8, "wait": 32}
ASKING = ("look", "ask", "wait")
MOST_WORK = 256  # of one client in one lane


class _Lane:
    """Threads, and a queue for each client that has work to be done."""

    def __init__(self, name: str, threads: int) -> None:
        self._name = name
        self._most = threads
        self._threads = 0
        self._changed = threading.Condition()
        self._queues: dict[object, deque[Callable[[], None]]] = {}
        self._turns: deque[object] = deque()
        self.work = 0

    def put(self, who: object, work: Callable[[], None]) -> None:
        """Have a thread do it; raises UbiError (busy)."""
        with self._changed:
            queue = self._queues.setdefault(who, deque())
            if len(queue) >= MOST_WORK:
                raise UbiError("too many requests are under way: try again later", Exit.BUSY)
            if not queue:
                self._turns.append(who)
            queue.append(work)
            self.work += 1
            if self._threads < min(self._most, self.work):
                self._threads += 1
                threading.Thread(target=self._serve, name=self._name, daemon=True).start()
            self._changed.notify()

    def _serve(self) -> None:
        while True:
            work = self._take()
            try:
                work()
            finally:
                with self._changed:
                    self.work -= 1

    def _take(self) -> Callable[[], None]:
        with self._changed:
            while not self._turns:
                self._changed.wait()
            who = self._turns.popleft()
            work = self._queues[who].popleft()
            if self._queues[who]:
                self._turns.append(who)
            else:
                del self._queues[who]
            return work


class Jobs:
    """The lanes. `interrupt_fd` becomes readable when all is to end: see `start_daemon`."""

    def __init__(self, selector: selectors.BaseSelector, report: Callable[[str], None]) -> None:
        self._report = report
        self._lanes = {name: _Lane(name, threads) for name, threads in LANES.items()}
        self._outcomes: deque[Callable[[], None]] = deque()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.interrupt_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._interrupted = False
        self.who: Callable[[], object] = lambda: None
        """Names the client that is being served."""

        selector.register(self._wake, selectors.EVENT_READ, self._on_wake)

    def run(
        self, lane: str, work: Callable[[], object], answer: Deferred | None = None,
    ) -> Deferred:
        """Do `work` on a thread; its result or UbiError becomes the answer's. Raises UbiError."""
        owed = answer or Deferred()
        asked = lane in ASKING
        self.put(
            lane, work,
            lambda result, error: self.later(
                lambda: owed.resolve(result) if error is None else owed.fail(error),
            ),
            wanted=lambda: owed.wanted or not asked,
            who=self.who(),
        )
        return owed

    def put(
        self, lane: str, work: Callable[[], object],
        done: Callable[[object, UbiError | None], None],
        wanted: Callable[[], bool] = lambda: True,
        who: object = None,
    ) -> None:
        """Do `work` on a thread, then `done` there, with its result or its error.

        What is not `wanted` any more when its turn comes is left out. `who` is whose turn it is.
        """
        def whole() -> None:
            result, problem = None, None
            if not wanted():
                return
            try:
                if self._interrupted:
                    raise UbiError("serve is ending", Exit.BUSY)  # noqa: TRY301 - as of the work
                result = work()
            except UbiError as error:
                problem = error
            except Exception as error:
                self._report(f"internal error: {error!r}")
                problem = UbiError(f"internal error: {error!r}")
            done(result, problem)

        self._lanes[lane].put(who, whole)

    def later(self, action: Callable[[], None]) -> None:
        """Do something on the loop's thread; any thread may say so."""
        self._outcomes.append(action)
        os.eventfd_write(self._wake, 1)

    def interrupt(self) -> None:
        """Have the starts that are under way come to nothing, and begin no more."""
        self._interrupted = True
        os.eventfd_write(self.interrupt_fd, 1)

    @property
    def ending(self) -> bool:
        """Whether `interrupt` has been called."""
        return self._interrupted

    @property
    def making(self) -> int:
        """Count what is under way, or about to be, that makes or ends disks."""
        return self._lanes["make"].work

    def _on_wake(self, _mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while self._outcomes:
            self._outcomes.popleft()()
