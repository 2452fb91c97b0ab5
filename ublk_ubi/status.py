"""What is known of a device at a moment: the answer of `status`, and the schema of its --json.

The daemon fills a `Status` and answers with it; a command decodes the same. What cannot be known,
of a device whose daemon died or does not answer, is null. New keys may come, none goes or changes
its meaning without another `schema`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

import msgspec

from ublk_ubi import rpc, systemd
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.hydration import State  # noqa: TC001 - msgspec looks at it

if TYPE_CHECKING:
    from ublk_ubi.runtime import Device

DEFAULT_TIMEOUT_S = 5.0
_LEAST_TIMEOUT_S = 0.2


class Latency(msgspec.Struct):
    """Microseconds from the kernel's handing over of a request to its completion."""

    p50: float = 0
    p90: float = 0
    p99: float = 0
    p999: float = 0
    max: float = 0


class IoCounters(msgspec.Struct):
    """Requests completed since the daemon started; `errors` of them with an errno."""

    count: int = 0
    bytes: int = 0
    errors: int = 0
    latency_us: Latency = msgspec.field(default_factory=Latency)


class Io(msgspec.Struct):
    """The device's requests, by kind."""

    read: IoCounters = msgspec.field(default_factory=IoCounters)
    write: IoCounters = msgspec.field(default_factory=IoCounters)
    flush: IoCounters = msgspec.field(default_factory=IoCounters)
    discard: IoCounters = msgspec.field(default_factory=IoCounters)
    write_zeroes: IoCounters = msgspec.field(default_factory=IoCounters)


class Stripes(msgspec.Struct):
    """The image's stripes; `hydrated` of them are on the base, `committed` of those durably."""

    total: int
    hydrated: int
    committed: int


class Hydration(msgspec.Struct):
    """Stripes that this daemon brought to the base, and background hydration.

    `zeros` of `stripes` were zeroed, not written; `whole_stripe_writes` needed no fetch. `passes`
    and `failed` count in the background, where `last_error` is an errno. `rate` is bytes a second,
    null as fast as can be; `state` is explained in hydration.py.
    """

    stripes: int = 0
    bytes: int = 0
    errors: int = 0
    zeros: int = 0
    whole_stripe_writes: int = 0
    state: State = "off"
    rate: int | None = None
    min_free: str | None = None
    passes: int = 0
    failed: int = 0
    last_error: int = 0
    retry_in_s: int = 0


class Space(msgspec.Struct):
    """Bytes of storage.

    `allocated` is what the base takes, `free` what its filesystem has left (null on a block
    device), `hydrated` what the base has of the image, `needed` what may still come.
    """

    allocated: int | None = None
    free: int | None = None
    hydrated: int = 0
    needed: int = 0


class Commit(msgspec.Struct):
    """Commit rounds of this daemon, those that failed, and the header pages they wrote."""

    rounds: int = 0
    errors: int = 0
    pages: int = 0


class Confinement(msgspec.Struct):
    """How far a daemon is shut in (sandbox.py); what a kernel did not grant is false.

    `root`: in a minimal one. `capabilities`: what its main thread keeps, null for all that it was
    started with. `helper`: the process that talks to the ublk driver is shut in as well.
    """

    root: bool = False
    capabilities: list[str] | None = None
    seccomp: bool = False
    helper: bool = False
    memory_locked: bool = False
    oom_score_adj: int | None = None


class Status(msgspec.Struct, kw_only=True):
    """A device. Sizes are bytes; `degraded` is the reason, null for a sound one."""

    schema: int = 1
    name: str
    device: str | None = None
    link: str | None = None
    id: int | None = None
    pid: int | None = None
    state: Literal["starting", "live", "stopping", "dead"]
    degraded: str | None = None
    image: str | None = None
    image_size: int | None = None
    base: str | None = None
    size: int | None = None
    stripe_size: int | None = None
    block_size: int | None = None
    queues: int | None = None
    depth: int | None = None
    copy_on_read: bool | None = None
    image_cache: str | None = None
    image_direct: bool | None = None
    base_direct: bool | None = None
    data_path: str | None = None
    cache: str | None = None
    uuid: str | None = None
    generation: int | None = None
    independent: bool | None = None
    stripes: Stripes | None = None
    space: Space | None = None
    memory: int | None = None
    sandbox: Confinement | None = None
    io: Io | None = None
    cold_reads: int | None = None
    fallbacks: int | None = None
    hydration: Hydration | None = None
    commit: Commit | None = None
    uptime_s: float | None = None


def status_of(device: Device, timeout_s: float = DEFAULT_TIMEOUT_S) -> Status:
    """Ask the daemon; tell of a dead or mute one what its folder tells. Never raises for it."""
    if not device.alive:
        reason = device.problem or device.trouble or _how_it_ended(device)
        return _from_folder(device, "dead", reason)
    try:
        answer = rpc.call(device.socket, "status", timeout_s=timeout_s)
        return msgspec.convert(answer, Status)
    except msgspec.ValidationError as error:
        return _from_folder(device, "live", f"its daemon is of another version: {error}")
    except UbiError as error:
        if device.starting:
            return _from_folder(device, "starting", None)
        if error.code == Exit.TIMED_OUT:
            mute = f"its daemon (process {device.pid}) does not answer"
            return _from_folder(device, "live", mute)
        return _from_folder(device, "live", error.message)


def _how_it_ended(device: Device) -> str:
    """Tell of a device without a daemon what became of it, and what to do."""
    who = f"its daemon (process {device.pid})" if device.pid else "its daemon"
    if device.state is None or not device.state.recoverable:
        return f"{who} died"
    if systemd.is_restarted(device):
        return systemd.how_it_ended(device)
    how = "left" if device.state.left else "died"
    return f"{who} {how}; its requests wait: `ublk-ubi recover {device.name}`"


def status_of_all(devices: list[Device], timeout_s: float = DEFAULT_TIMEOUT_S) -> list[Status]:
    """Ask one after the other, within `timeout_s` in all; a mute one takes nobody's turn away."""
    deadline = time.monotonic() + timeout_s
    return [
        status_of(device, max(_LEAST_TIMEOUT_S, deadline - time.monotonic()))
        for device in devices
    ]


def _from_folder(
    device: Device, state: Literal["starting", "live", "dead"], degraded: str | None,
) -> Status:
    status = Status(name=device.name, state=state, degraded=degraded)
    if device.alive:
        status.pid = device.pid
    if device.state is not None and not device.starting:
        for key in ("device", "link", "id", "image", "base", "size"):
            setattr(status, key, getattr(device.state, key))
    return status
