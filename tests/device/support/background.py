"""Things that go on while the test looks at something else."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class Background(Generic[T]):
    """A call on a thread of its own."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._value: T
        self._error: BaseException | None = None
        self.started_at = time.monotonic()
        self.ended_at = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error
        self.ended_at = time.monotonic()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    @property
    def seconds(self) -> float:
        """How long it took."""
        assert self.done
        return self.ended_at - self.started_at

    def wait(self, timeout_s: float) -> bool:
        """Give it so much time to end; whether it has."""
        self._thread.join(timeout_s)
        return self.done

    def join(self, timeout_s: float = 30.0) -> None:
        """Wait for its end, whatever that is."""
        self._thread.join(timeout_s)
        assert self.done, f"not done within {timeout_s:g} s"

    def result(self, timeout_s: float = 30.0) -> T:
        """Wait for its end; its value, or what it raised."""
        self.join(timeout_s)
        if self._error is not None:
            raise self._error
        return self._value

    def errno(self, timeout_s: float = 30.0) -> int | None:
        """Wait for its end; the errno it failed with, None if it did not."""
        try:
            self.result(timeout_s)
        except OSError as error:
            return error.errno
        return None
