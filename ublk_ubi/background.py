"""Background hydration from the outside: start it, pause it, wait until it is done.

`hydration.py` is the daemon's side.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

import msgspec

from ublk_ubi import rpc, runtime
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.status import DEFAULT_TIMEOUT_S, Status, status_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ublk_ubi.runtime import Device

_LEAST_ASK_S = 0.2
_TAKE_OVER_S = 3.0
"""How long a disk may be without a daemon before that is told: an upgrade takes less."""


def steer(
    device: Device, *, run: bool, rate: int | Literal["max"] | None = None,
) -> Status:
    """Have a daemon start or pause, at another rate if one is given; returns its status after that.

    Raises UbiError: degraded, when its daemon died.
    """
    if not device.alive:
        raise UbiError(f"device {device.name}: {status_of(device).degraded}", Exit.DEGRADED)
    if device.starting:
        raise UbiError(f"device {device.name} is not live yet: try again")
    params = {"run": run} if rate is None else {"run": run, "rate": rate}
    answer = rpc.call(device.socket, "hydrate", params)
    try:
        return msgspec.convert(answer, Status)
    except msgspec.ValidationError as error:
        raise UbiError(
            f"device {device.name}: its daemon is of another version: {error}",
        ) from None


def watch(device: Device, *, timeout_s: float | None, interval_s: float) -> Iterator[Status]:
    """Yield the device's status every `interval_s`; the last is that of an independent one.

    Raises UbiError for a device that will not become independent by waiting: degraded, deleted (no
    device), off or paused (failed); or timed out after `timeout_s` seconds.
    """
    deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
    heard_at = time.monotonic()
    while True:
        left = deadline - time.monotonic()
        status = _look(device, min(DEFAULT_TIMEOUT_S, max(_LEAST_ASK_S, left)))
        now = time.monotonic()
        if status.hydration is not None or status.state == "starting":
            heard_at = now
        left = deadline - now
        if heard_at == now or now - heard_at > _TAKE_OVER_S:
            yield status
            if status.independent:
                return
            _refuse_hopeless(status)
        if left <= 0 and status.state == "dead":
            _refuse_hopeless(status)
        if left <= 0:
            raise UbiError(
                f"device {device.name} still needs its image after {timeout_s:g} s: "
                f"`ublk-ubi status {device.name}` shows how far it is",
                Exit.TIMED_OUT,
            )
        time.sleep(min(interval_s, left))


def _look(device: Device, timeout_s: float) -> Status:
    """Ask the daemon. Raises UbiError once there is no such device any more."""
    status = None
    # One that goes away while it is asked is not degraded, but gone: look once more.
    while (now := runtime.refresh(device)) is not None:
        if status is not None and (now.alive or status.state == "dead"):
            return status
        status = status_of(now, timeout_s)
        if status.hydration is not None:
            return status
    raise UbiError(
        f"device {device.name} was deleted before it was independent of its image", Exit.NO_DEVICE,
    )


def _refuse_hopeless(status: Status) -> None:
    if status.degraded:
        raise UbiError(f"device {status.name}: {status.degraded}", Exit.DEGRADED)
    hydration, stripes = status.hydration, status.stripes
    if hydration is None or stripes is None or stripes.hydrated == stripes.total:
        return  # what is missing is a commit, which comes by itself
    if hydration.state in ("off", "paused"):
        way_out = "resumes" if hydration.state == "paused" else "starts"
        raise UbiError(
            f"device {status.name} needs its image, and background hydration is "
            f"{hydration.state}: `ublk-ubi hydrate {status.name}` {way_out} it",
        )
