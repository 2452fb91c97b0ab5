"""Carries what passes between the caller and the running guest, and watches the clock.

One loop over poll(2): bytes from the guest to the caller's stdout and stderr, keys and window size
from the caller's terminal to the guest, control lines from the guest's init, signals, the time
limit. Buffers are bounded: a caller that does not read makes COMMAND wait, as a pipe would.
"""

from __future__ import annotations

import contextlib
import enum
import os
import select
import signal
import stat
import termios
import time
import tty
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BUFFER_BYTES = 1 << 18
CHUNK_BYTES = 1 << 16
POWER_OFF_SECONDS = 10.0  # what a guest that has ended its work may take to go
DRAIN_SECONDS = 1.0  # what the caller may take to read the last of a guest that was ended
ESCAPE_KEY = 0x1D  # Ctrl-]
ESCAPE_TIMES = 3


def ending_signals() -> list[signal.Signals]:
    """List the signals that end the lab; under nohup, a hangup does not."""
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, *hangup]


class End(enum.Enum):
    """Why the guest's run is over."""

    EXITED = "COMMAND ended"
    FAILED = "the guest's init failed"
    DIED = "the guest went without a word"
    TIMED_OUT = "the time limit"
    SIGNALLED = "a signal to the lab"
    ESCAPED = "the escape key"


@dataclass
class Outcome:
    """How the guest's run was over."""

    end: End
    status: int = 0  # EXITED: COMMAND's
    signal: int = 0  # SIGNALLED: which
    reason: str = ""  # FAILED: the init's words


@dataclass
class Ports:
    """The host's ends of the guest's lines."""

    out: int
    err: int
    control_in: int
    control_out: int
    keys: int  # to the guest's terminal
    screen: int  # from it


class Stream:
    """Bytes from a descriptor of the guest's to one of the caller's."""

    def __init__(self, source: int, sink: int) -> None:
        self.source = source
        self.sink = sink
        self.ended = False
        self._buffer = bytearray()
        os.set_blocking(source, False)
        regular = stat.S_ISREG(os.fstat(sink).st_mode)
        self._chunk = CHUNK_BYTES if regular else select.PIPE_BUF

    @property
    def idle(self) -> bool:
        """Nothing to write now."""
        return not self._buffer

    @property
    def wants_input(self) -> bool:
        """There is more to come, and room for it."""
        return not self.ended and len(self._buffer) < BUFFER_BYTES

    def take(self) -> None:
        """Read what the guest has written."""
        try:
            data = os.read(self.source, CHUNK_BYTES)
        except BlockingIOError:
            return
        if not data:
            self.ended = True
        else:
            self._buffer += data

    def give(self) -> None:
        """Write as much as a descriptor that polled as writable takes without waiting."""
        try:
            written = os.write(self.sink, self._buffer[: self._chunk])
        except BlockingIOError:
            return
        del self._buffer[:written]


@dataclass
class Relay:
    """The loop. `run` returns when the guest is gone and its output is with the caller."""

    ports: Ports
    kill: Callable[[], None]  # ends the guest, whatever it does
    terminal: int | None  # the caller's, when COMMAND has one
    _streams: list[Stream] = field(default_factory=list)
    _control: bytearray = field(default_factory=bytearray)
    _escapes: int = 0

    def run(self, seconds: float) -> Outcome:
        """Relay until the end; `seconds` is the time limit."""
        self._streams = [Stream(self.ports.out, 1), Stream(self.ports.err, 2)]
        if self.terminal is not None:
            self._streams.append(Stream(self.ports.screen, 1))
        os.set_blocking(self.ports.control_in, False)
        with _signals() as signals, _raw(self.terminal):
            try:
                outcome = self._serve(signals, time.monotonic() + seconds)
                return self._finish(signals, outcome)
            except BrokenPipeError:
                return Outcome(End.SIGNALLED, signal=signal.SIGPIPE)

    def _serve(self, signals: int, deadline: float) -> Outcome:
        """Until the guest says its last word, or must be ended."""
        while (left := deadline - time.monotonic()) > 0:
            ready = self._poll(signals, left, serving=True)
            if outcome := self._heed(signals, ready):
                return outcome
            self._carry(ready)
            if self.terminal in ready and self._carry_keys():
                return Outcome(End.ESCAPED)
            if self.ports.control_in in ready and (outcome := self._read_control()):
                return outcome
        return Outcome(End.TIMED_OUT)

    def _finish(self, signals: int, outcome: Outcome) -> Outcome:
        """Until what the guest has written is with the caller. A guest that lingers is ended."""
        powering_off = outcome.end is End.EXITED
        if not powering_off:
            self.kill()
        patience = POWER_OFF_SECONDS if powering_off else DRAIN_SECONDS
        limit = time.monotonic() + patience
        while not all(stream.ended and stream.idle for stream in self._streams):
            left = limit - time.monotonic()
            guest_is_there = not all(stream.ended for stream in self._streams)
            if left <= 0 and powering_off and guest_is_there:
                self.kill()
                powering_off = False
            elif left <= 0 and outcome.end is not End.EXITED:
                break  # the caller does not read
            ready = self._poll(signals, left if left > 0 else DRAIN_SECONDS, serving=False)
            if ended := self._heed(signals, ready):
                return ended
            self._carry(ready)
        return outcome

    def _heed(self, signals: int, ready: set[int]) -> Outcome | None:
        for number in os.read(signals, 64) if signals in ready else b"":
            if number == signal.SIGWINCH:
                self._send_size()
            else:
                return Outcome(End.SIGNALLED, signal=number)
        return None

    def _carry(self, ready: set[int]) -> None:
        for stream in self._streams:
            if stream.source in ready:
                stream.take()
            if stream.sink in ready and not stream.idle:
                stream.give()

    def _poll(self, signals: int, seconds: float, serving: bool) -> set[int]:
        poll = select.poll()
        poll.register(signals, select.POLLIN)
        if serving:
            poll.register(self.ports.control_in, select.POLLIN)
            if self.terminal is not None:
                poll.register(self.terminal, select.POLLIN)
        for stream in self._streams:
            if stream.wants_input:
                poll.register(stream.source, select.POLLIN)
        for sink in {stream.sink for stream in self._streams if not stream.idle}:
            poll.register(sink, select.POLLOUT)
        return {fd for fd, _ in poll.poll(seconds * 1000)}

    def _read_control(self) -> Outcome | None:
        try:
            data = os.read(self.ports.control_in, CHUNK_BYTES)
        except BlockingIOError:
            return None
        if not data:
            return Outcome(End.DIED)
        self._control += data
        while (at := self._control.find(b"\n")) >= 0:
            word, _, rest = self._control[:at].decode(errors="replace").partition(" ")
            del self._control[: at + 1]
            if word == "exit":
                return Outcome(End.EXITED, status=int(rest))
            if word == "fail":
                return Outcome(End.FAILED, reason=rest)
        return None

    def _carry_keys(self) -> bool:
        """Pass keys on; True when the escape key came three times in a row."""
        assert self.terminal is not None
        keys = os.read(self.terminal, 4096)
        for key in keys:
            self._escapes = self._escapes + 1 if key == ESCAPE_KEY else 0
            if self._escapes >= ESCAPE_TIMES:
                return True
        with contextlib.suppress(BlockingIOError):  # the guest does not read: keys are lost
            os.write(self.ports.keys, keys)
        return False

    def _send_size(self) -> None:
        if self.terminal is not None:
            size = os.get_terminal_size(self.terminal)
            with contextlib.suppress(BlockingIOError):
                os.write(self.ports.control_out, b"size %d %d\n" % (size.lines, size.columns))


@contextlib.contextmanager
def _signals() -> Iterator[int]:
    """Signals as bytes on a descriptor, so that they come in turn with everything else."""
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def note(*_: object) -> None:
        """Do nothing: the byte is what counts."""

    heeded = [*ending_signals(), signal.SIGWINCH]
    before = {number: signal.signal(number, note) for number in heeded}
    old = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        yield read
    finally:
        signal.set_wakeup_fd(old)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(read)
        os.close(write)


@contextlib.contextmanager
def _raw(terminal: int | None) -> Iterator[None]:
    """Have the terminal pass every key on; leave it as it was."""
    if terminal is None:
        yield
        return
    before = termios.tcgetattr(terminal)
    tty.setraw(terminal, termios.TCSADRAIN)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
