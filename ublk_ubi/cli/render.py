"""Draws a device's status for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ublk_ubi.cli.common import one_line, print_table, say
from ublk_ubi.sizes import format_size, human_size

if TYPE_CHECKING:
    from ublk_ubi.status import IoCounters, Status

_COLOURS = {"live": "green", "starting": "yellow", "stopping": "yellow", "dead": "red"}
_LABEL = 10  # columns


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
        kinds = (("read", status.io.read), ("write", status.io.write), ("flush", status.io.flush))
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
            parts.append(f"data path {status.data_path}")
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
        share = hydrated(status)
        _line("hydrated", f"{share}, {stripes.hydrated:,} of {stripes.total:,} stripes{committed}")
    if status.hydration is not None:
        fetched = status.hydration
        parts = [
            f"{_count(fetched.stripes, 'stripe')} ({human_size(fetched.bytes)})",
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
    if status.uptime_s is not None:
        _line("up", _uptime(status.uptime_s))


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


def _uptime(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
