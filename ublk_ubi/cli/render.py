"""Draws a device's status for people."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from ublk_ubi.cli.common import one_line, print_table, say
from ublk_ubi.sizes import format_size, human_size

if TYPE_CHECKING:
    from ublk_ubi.status import Confinement, IoCounters, Space, Status

_COLOURS = {"live": "green", "starting": "yellow", "stopping": "yellow", "dead": "red"}
_LABEL = 12  # columns


def state_word(status: Status) -> str:
    """Give the state in its colour; a degraded device says so instead of "live"."""
    if status.degraded and status.state != "dead":
        return click.style("degraded", fg="red", bold=True)
    return click.style(status.state, fg=_COLOURS[status.state])


def hydrated(status: Status) -> str:
    """Give the share of the image that is on the base."""
    if status.stripes is None or status.stripes.total == 0:
        return "-"
    share = 100 * status.stripes.hydrated / status.stripes.total
    # Not all is never 100 %, something never 0 %.
    if status.stripes.hydrated < status.stripes.total:
        share = min(share, 99.9)
    if status.stripes.hydrated:
        share = max(share, 0.1)
    return f"{share:.3g} %"


def background(status: Status, *, to_go: bool = True) -> str:
    """Say what background hydration does, or what it waits for, and what is left `to_go`."""
    hydration, space = status.hydration, status.space
    if hydration is None or space is None:
        return "not known"
    if hydration.state == "done":
        return "done"
    if not space.needed:
        words = "all is copied, and not committed yet"
    elif hydration.state == "low-space":
        free = f"{human_size(space.free)} free, " if space.free is not None else ""
        words = f"no room: {free}--min-free is {hydration.min_free}"
    elif hydration.state == "no-image":
        words = "has ended: the image is not what it was"
    elif hydration.state == "waiting" and hydration.last_error:
        reason = os.strerror(hydration.last_error)
        words = f"retries in {span(hydration.retry_in_s)}: {reason}"
        if to_go:
            words += f" ({_count(hydration.failed, 'failure')})"
    elif hydration.state in ("off", "paused"):
        words = hydration.state
    else:
        rate = f"{human_size(hydration.rate)}/s at most" if hydration.rate else "at full speed"
        words = f"running, {rate}"
    return f"{words}, {human_size(space.needed)} to go" if to_go and space.needed else words


def is_short(space: Space) -> bool:
    """Tell whether the base's filesystem has less room than the image may still need."""
    return space.free is not None and space.free < space.needed


def needed(status: Status) -> str:
    """Give the bytes that the image may still need, and what is free where that is less."""
    space = status.space
    if space is None:
        return "-"
    text = human_size(space.needed)
    if not is_short(space):
        return text
    assert space.free is not None
    return click.style(f"{text} ({human_size(space.free)} free)", fg="red")


def duration(microseconds: float) -> str:
    """Write a latency with three digits."""
    if microseconds < 1000:
        return f"{microseconds:.0f} µs"
    if microseconds < 1e6:
        return f"{microseconds / 1e3:.3g} ms"
    return f"{microseconds / 1e6:.3g} s"


def render_status(status: Status) -> None:
    """Print one device; lines for what is not known are left out."""
    title = click.style(status.name, bold=True)
    where = status.link or status.device or ""
    target = f" → {status.device}" if status.link and status.device else ""
    process = f"  process {status.pid}" if status.pid else ""
    say(f"{title}  {state_word(status)}  {where}{target}{process}".rstrip())
    if status.degraded:
        _line("degraded", click.style(one_line(status.degraded), fg="red"))
    _render_parts(status)
    _render_progress(status)
    if status.io is not None:
        say("")
        head = ["", "requests", "bytes", "errors", "p50", "p90", "p99", "p99.9", "max"]
        io = status.io
        kinds = [("read", io.read), ("write", io.write), ("flush", io.flush)]
        rare = [("discard", io.discard), ("write-zeroes", io.write_zeroes)]
        kinds += [(kind, counters) for kind, counters in rare if counters.count]
        rows = [head, *(_io_row(kind, counters) for kind, counters in kinds)]
        print_table([[f"  {row[0]}", *row[1:]] for row in rows], right=frozenset(range(1, 9)))


def _render_parts(status: Status) -> None:
    """Print what the device is made of."""
    if status.size is not None:
        parts = [human_size(status.size)]
        if status.stripe_size is not None:
            parts.append(f"stripes of {format_size(status.stripe_size)}")
        if status.block_size is not None:
            parts.append(f"blocks of {status.block_size}")
        if status.queues is not None:
            parts.append(f"{_count(status.queues, 'queue')} of {status.depth}")
        if status.cache is not None:
            parts.append(f"{status.cache} cache")
        if status.data_path is not None:
            copied = f" ({status.fallbacks:,} requests copied)" if status.fallbacks else ""
            parts.append(f"data path {status.data_path}{copied}")
        _line("disk", ", ".join(parts))
    if status.image is not None:
        size = f" ({human_size(status.image_size)})" if status.image_size is not None else ""
        cache = ", through the page cache" if status.image_cache == "page" else ""
        _line("image", f"{one_line(status.image)}{size}{cache}")
    if status.base is not None:
        buffered = ", buffered: no O_DIRECT there" if status.base_direct is False else ""
        _line("base", f"{one_line(status.base)}{buffered}")


def _render_progress(status: Status) -> None:
    """Print how far it has come."""
    stripes = status.stripes
    if stripes is not None:
        waiting = stripes.hydrated - stripes.committed
        committed = f", {waiting:,} not committed yet" if waiting else ""
        alone = ": independent of its image" if status.independent else ""
        share = hydrated(status)
        _line(
            "hydrated",
            f"{share}, {stripes.hydrated:,} of {stripes.total:,} stripes{committed}{alone}",
        )
    if status.hydration is not None:
        fetched = status.hydration
        if not status.independent:
            _line("background", background(status))
        zeros = f", {fetched.zeros:,} of zeros" if fetched.zeros else ""
        parts = [
            f"{_count(fetched.stripes, 'stripe')} ({human_size(fetched.bytes)}{zeros})",
            f"{fetched.whole_stripe_writes:,} written whole",
        ]
        if status.cold_reads is not None:
            parts.append(_count(status.cold_reads, "cold read"))
        if fetched.errors:
            parts.append(click.style(_count(fetched.errors, "error"), fg="red"))
        if status.copy_on_read is False:
            parts.append("no copy on read")
        _line("fetched", ", ".join(parts))
    if status.commit is not None:
        rounds = f"{_count(status.commit.rounds, 'round')}, {_count(status.commit.pages, 'page')}"
        if status.commit.errors:
            rounds += ", " + click.style(_count(status.commit.errors, "error"), fg="red")
        _line("commits", rounds)
    _render_costs(status)
    if status.uptime_s is not None:
        _line("up", span(status.uptime_s))


def _missing(sandbox: Confinement) -> list[str]:
    """Name what the kernel did not grant of a daemon's sandbox."""
    parts = [
        (sandbox.root, "a minimal root"),
        (sandbox.capabilities is not None, "fewer capabilities"),
        (sandbox.seccomp, "seccomp"),
        (sandbox.helper, "a confined helper"),
        (sandbox.memory_locked, "locked memory"),
        ((sandbox.oom_score_adj or 0) < 0, "protection from the OOM killer"),
    ]
    return [what for granted, what in parts if not granted]


def _render_costs(status: Status) -> None:
    """Print what it takes of the host."""
    if status.sandbox is not None and (missing := _missing(status.sandbox)):
        _line("sandbox", click.style(f"without {', '.join(missing)}", fg="yellow"))
    space = status.space
    if space is not None:
        parts = [f"{human_size(space.allocated)} allocated"] if space.allocated is not None else []
        parts.append(f"{human_size(space.hydrated)} hydrated")
        if space.needed:
            parts.append(f"{human_size(space.needed)} may still be needed")
        if is_short(space):
            assert space.free is not None
            left = f"only {human_size(space.free)} free" if space.free else "nothing free"
            parts.append(click.style(left, fg="red"))
        _line("space", ", ".join(parts))
    if status.memory is not None:
        _line("memory", human_size(status.memory))


def _line(label: str, text: str) -> None:
    say(f"  {label:<{_LABEL}}{text}")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _io_row(kind: str, counters: IoCounters) -> list[str]:
    latency = counters.latency_us
    errors = f"{counters.errors:,}"
    times = (latency.p50, latency.p90, latency.p99, latency.p999, latency.max)
    return [
        kind,
        f"{counters.count:,}",
        human_size(counters.bytes) if counters.bytes else "-",
        click.style(errors, fg="red") if counters.errors else errors,
        *(duration(time) if counters.count else "-" for time in times),
    ]


def span(seconds: float) -> str:
    """Write a length of time in its two largest units."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
