"""CPU lists as the kernel writes them: `0-3,8`."""

from __future__ import annotations

import os

from ublk_ubi.errors import Exit, UbiError

_MOST = 8192


def parse_cpus(option: str, text: str) -> list[int]:
    """Return the CPUs of a list, each once, in order. Raises UbiError (usage), naming `option`."""
    found: dict[int, None] = {}
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isascii() and first.isdigit() and len(first) < 6) or (
            dash and not (last.isascii() and last.isdigit() and len(last) < 6)
        ):
            raise _wrong(option, text)
        low, high = int(first), int(last) if dash else int(first)
        if not low <= high < _MOST:
            raise _wrong(option, text)
        found.update(dict.fromkeys(range(low, high + 1)))
    return list(found)


def usable_cpus(option: str, text: str | None, *, told: list[str] | None = None) -> list[int]:
    """Return the CPUs of a list, or none for None: anywhere.

    Raises UbiError for one not to be had here, or goes on without it and adds a warning to `told`.
    """
    if text is None:
        return []
    cpus = parse_cpus(option, text)
    allowed = os.sched_getaffinity(0)
    missing = [cpu for cpu in cpus if cpu not in allowed]
    if missing and told is None:
        raise UbiError(
            f"{option} {text}: CPU {missing[0]} cannot be used here: name some of "
            f"{format_cpus(sorted(allowed))}",
            Exit.USAGE,
        )
    if missing and told is not None:
        told.append(
            f"{option} {text}: CPU {missing[0]} cannot be used here: the disk goes on with "
            f"{format_cpus(sorted(set(cpus) & allowed)) or format_cpus(sorted(allowed))}",
        )
    return [cpu for cpu in cpus if cpu in allowed]


def format_cpus(cpus: list[int]) -> str:
    """Write ascending CPUs as a list."""
    parts: list[list[int]] = []
    for cpu in cpus:
        if parts and cpu == parts[-1][1] + 1:
            parts[-1][1] = cpu
        else:
            parts.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _wrong(option: str, text: str) -> UbiError:
    return UbiError(f"{option} {text!r} is not a list of CPUs: write it like 0-3,8", Exit.USAGE)
