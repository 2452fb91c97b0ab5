"""Shows how far background hydration is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, TextIO

from ublk_ubi.background import watch
from ublk_ubi.cli.render import background, hydrated, span
from ublk_ubi.errors import UbiError
from ublk_ubi.sizes import human_size

if TYPE_CHECKING:
    from ublk_ubi.runtime import Device
    from ublk_ubi.status import Status

BAR_S = 0.25
LINE_S = 10.0
_POLL_S = 1.0  # where nobody looks on
_WINDOW_S = 5.0
_MOST_BAR = 40  # columns
_LEAST_BAR = 10


class Speed:
    """Bytes a second over the last few seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def add(self, now_s: float, done: int) -> None:
        """Learn how many bytes were done at `now_s`."""
        self._seen.append((now_s, done))
        while len(self._seen) > 2 and now_s - self._seen[1][0] >= _WINDOW_S:
            self._seen.popleft()

    @property
    def rate(self) -> float | None:
        """Bytes a second; None before there are two looks."""
        if len(self._seen) < 2:
            return None
        (began, first), (ended, last) = self._seen[0], self._seen[-1]
        return (last - first) / (ended - began) if ended > began else None


def facts(status: Status, speed: Speed) -> list[str]:
    """Say in a few words how far it is, how fast, how long it will take, and what it waits for."""
    if status.hydration is None or status.space is None:
        return [status.state]
    space = status.space
    total = space.hydrated + space.needed
    words = [hydrated(status), f"{human_size(space.hydrated)} of {human_size(total)}"]
    hydration = status.hydration
    if not space.needed:
        return words if status.independent else [*words, "commits"]
    if hydration.state == "low-space" or (hydration.state == "waiting" and hydration.last_error):
        return [*words, background(status, to_go=False)]
    rate = speed.rate
    if rate is not None:
        words.append(f"{human_size(int(rate))}/s")
    if rate:
        words.append(f"{span(space.needed / rate)} left")
    return words


def bar_line(status: Status, speed: Speed, columns: int) -> str:
    """Draw a line of less than `columns` columns; the bar goes first where there is no room."""
    words = "  ".join([status.name, *facts(status, speed)])
    stripes = status.stripes
    width = min(_MOST_BAR, columns - len(words) - len("  []") - 1)
    if stripes is None or not stripes.total or width < _LEAST_BAR:
        return words[: columns - 1]
    full = "#" * (width * stripes.hydrated // stripes.total)
    return f"{words[:len(status.name)]}  [{full:·<{width}}]{words[len(status.name):]}"


class Bar:
    """One line that is drawn over and over."""

    interval_s = BAR_S

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._drawn = 0

    def show(self, status: Status, speed: Speed) -> None:
        """Draw."""
        line = bar_line(status, speed, self._columns())
        drawn, self._drawn = self._drawn, len(line)  # first: a Ctrl-C may come at any moment
        self._stream.write(f"\r{line:<{drawn}}")
        self._stream.flush()

    def end(self) -> None:
        """Leave the line as it is; what follows goes below."""
        if self._drawn:
            self._stream.write("\n")
            self._stream.flush()

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except OSError:
            return 80


class Lines:
    """A line at first, when what it does changes, and every LINE_S seconds."""

    interval_s = _POLL_S

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._told: str | None = None
        self._told_at = 0.0

    def show(self, status: Status, speed: Speed) -> None:
        """Print a line if there is news; that it is done is not ours to say."""
        if status.independent:
            return
        now = time.monotonic()
        doing = status.hydration.state if status.hydration is not None else status.state
        if doing != self._told or now - self._told_at >= LINE_S:
            self._told, self._told_at = doing, now
            self._stream.write(f"{status.name}: {', '.join(facts(status, speed))}\n")
            self._stream.flush()

    def end(self) -> None:
        """Nothing is left to be done."""


class Silent:
    """Shows nothing."""

    interval_s = _POLL_S

    def show(self, status: Status, speed: Speed) -> None:
        """Show nothing."""

    def end(self) -> None:
        """Nothing is left to be done."""


def follow(
    device: Device, *, timeout_s: float | None, as_json: bool,
) -> tuple[Status | None, UbiError | None]:
    """Wait until a device is independent of its image, and show how far it is.

    Returns its last status, None if there was none, and why it is not independent, if so. On a
    Ctrl-C hydration goes on: it is the daemon's.
    """
    display = _display(as_json=as_json)
    speed = Speed()
    status: Status | None = None
    try:
        for status in watch(device, timeout_s=timeout_s, interval_s=display.interval_s):
            if status.space is not None:
                speed.add(time.monotonic(), status.space.hydrated)
            display.show(status, speed)
    except UbiError as error:
        return status, error
    except KeyboardInterrupt:
        return status, UbiError(f"interrupted; {device.name} goes on all the same")
    finally:
        display.end()
    return status, None


def _display(*, as_json: bool) -> Bar | Lines | Silent:
    """With --json standard output is for the result alone."""
    stream = sys.stderr if as_json else sys.stdout
    if stream.isatty() and os.environ.get("TERM") != "dumb":
        return Bar(stream)
    return Silent() if as_json else Lines(stream)
