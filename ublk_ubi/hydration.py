"""Background hydration as the daemon steers it: whether, how fast, and when there is no room.

The hydrator thread does the copying and paces itself (`_threads.pyx`); here stands what an operator
asked for, and the free space that is left alone. Nobody counts the room between two looks at it, a
second apart: so the pace is half of the room a second at the most, and nears `min_free` slowly.

    off         never asked for
    paused      an operator paused it
    low-space   the base's filesystem has less free than `min_free`; goes on by itself
    no-image    the image has changed or is gone
    waiting     stripes have failed; the next pass begins by itself
    running
    done        every stripe is durable on the base
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.options import MAX_RATE, MIN_RATE, DeviceOptions
from ublk_ubi.sizes import parse_size

if TYPE_CHECKING:
    from ublk_ubi._device import DataPlane

State = Literal["off", "paused", "low-space", "no-image", "waiting", "running", "done"]


class MinFree(NamedTuple):
    """What of a filesystem is left alone: so many bytes, and so large a share of it."""

    size: int
    share: float

    def of(self, total: int) -> int:
        """Return the bytes to be left alone of a filesystem of `total` bytes."""
        return max(self.size, int(self.share * total))


def parse_min_free(text: str) -> MinFree:
    """Read `5%` or a size such as `10G`; 0 leaves nothing alone. Raises UbiError (usage)."""
    number, percent, rest = text.strip().partition("%")
    if not percent:
        try:
            return MinFree(parse_size(text), 0.0)
        except UbiError as error:
            raise UbiError(f"--min-free: {error.message}, or a share: 5%", Exit.USAGE) from None
    try:
        share = float(number) if not rest else -1.0
    except ValueError:
        share = -1.0
    if not 0 <= share < 100:
        raise UbiError(
            f"--min-free {text!r} is no share of a filesystem: write it like 5% or 10G", Exit.USAGE,
        )
    return MinFree(0, share / 100)


def as_told(options: DeviceOptions, recorded: bytes) -> DeviceOptions:
    """Return `options` with what a daemon has been told of hydration, as it `recorded` that."""
    try:
        last = msgspec.json.decode(recorded, type=DeviceOptions)
    except (msgspec.MsgspecError, UnicodeError):
        return options
    return msgspec.structs.replace(options, hydrate=last.hydrate, rate=last.rate)


class Hydration:
    """Steers one device's background hydration. Its methods may be called by any thread."""

    def __init__(self, plane: DataPlane, *, rate: int | None, min_free: str) -> None:
        self.rate = rate
        self.min_free = min_free
        self._least = parse_min_free(min_free)
        self._plane = plane
        self._asked = False
        self._wanted = False
        self._low_space = False
        self._room_rate: int | None = None
        self._pace: int | None = rate
        self._no_image = False
        self._lock = threading.Lock()
        plane.set_rate(rate)

    def start(self) -> None:
        """Begin or go on; what has failed is tried at once."""
        with self._lock:
            self._asked = self._wanted = True
            self._apply()

    def pause(self) -> None:
        """Copy nothing more in the background; what is under way ends."""
        with self._lock:
            self._wanted = False
            self._apply()

    def set_rate(self, rate: int | None) -> None:
        """Limit it to bytes a second; None: as fast as can be."""
        with self._lock:
            self.rate = rate
            self._keep_pace()

    @property
    def wanted(self) -> bool:
        """Whether an operator wants it to go on."""
        return self._wanted

    def see_space(self, free: int, total: int) -> None:
        """Learn how much of the base's filesystem is free, in bytes."""
        with self._lock:
            least = self._least.of(total)
            pace = max((free - least) // 2, MIN_RATE)
            self._room_rate = pace if least and pace < MAX_RATE else None
            self._keep_pace()
            low = free < least
            if low != self._low_space:
                self._low_space = low
                self._apply()

    def lose_image(self) -> None:
        """There is nothing to copy any more."""
        with self._lock:
            self._no_image = True
            self._apply()

    def _keep_pace(self) -> None:
        """Go at the operator's rate, or at what the room allows."""
        limits = [limit for limit in (self.rate, self._room_rate) if limit is not None]
        pace = min(limits, default=None)
        if pace != self._pace:
            self._pace = pace
            self._plane.set_rate(pace)

    def _apply(self) -> None:
        self._plane.hydrate(self._wanted and not self._low_space and not self._no_image)

    def state(self, retry_in_s: int) -> State:
        """Tell how it is doing; `retry_in_s` is the hydrator's wait for the next pass."""
        if self._plane.hydrated:
            return "done"
        if not self._wanted:
            return "paused" if self._asked else "off"
        if self._no_image:
            return "no-image"
        if self._low_space:
            return "low-space"
        return "waiting" if retry_in_s else "running"

    def describe(self, counters: dict[str, Any]) -> dict[str, Any]:
        """Return the hydrator's counters and what is asked of it, as `status --json` has them."""
        return {
            **counters,
            "state": self.state(counters["retry_in_s"]),
            "rate": self.rate,
            "min_free": self.min_free,
        }
