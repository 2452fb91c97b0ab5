"""Sizes as people write and read them: binary only, exact going in, short coming out."""

from __future__ import annotations

import re

from ublk_ubi.errors import Exit, UbiError

MAX_SIZE = (1 << 63) - 1

_SHIFTS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}
_NUMBER = r"([+-]?)([0-9]+)(?:\.([0-9]+))? ?([A-Za-z]*)"
_MAX_LENGTH = 40  # characters; nothing that long can be a size, and int() on it would take its time


def parse_size(text: str) -> int:
    """Give the bytes that `text` means: `512`, `64K`, `5G` (5 GiB), `5GiB`, `1.5T` if exact.

    Decimal units (`5GB`) are refused: half the world means 1000 by them and half 1024.
    Raises UbiError (usage) with the value and what to write instead.
    """
    match = re.fullmatch(_NUMBER, text.strip()) if len(text) <= _MAX_LENGTH else None
    if match is None:
        shown = text if len(text) <= _MAX_LENGTH else text[:_MAX_LENGTH] + "…"
        raise _refusal(f"{shown!r} is not a size: write bytes, or a number and K, M, G or T: 5G")
    sign, whole, fraction, suffix = match.groups(default="")
    if sign == "-":
        raise _refusal(f"{text!r} is negative: a size is 0 or more")
    shift = _shift_of(suffix, text, whole + ("." + fraction if fraction else ""))
    scale = int("1" + "0" * len(fraction))
    scaled = int(whole + fraction) << shift
    size, rest = divmod(scaled, scale)
    if size > MAX_SIZE:
        raise _refusal(f"{text!r} is too large: at most {MAX_SIZE} bytes (8E less one)")
    if rest:
        raise _refusal(f"{text!r} is not a whole number of bytes: write {size} or {size + 1}")
    return size


def format_size(size: int) -> str:
    """Write `size` bytes exactly, in the largest unit that divides it: for `parse_size`."""
    for unit, shift in reversed(_SHIFTS.items()):
        if size and size % (1 << shift) == 0:
            return f"{size >> shift}{unit}"
    return "0"


def human_size(size: int) -> str:
    """Write `size` bytes for the eye, three digits and a unit: `1.4 GiB`; not exact."""
    amount, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if amount < 1023.5 or unit == "EiB":
            break
        amount /= 1024
    digits = 1 if amount < 99.95 else 0
    return f"{amount:.{digits}f}".removesuffix(".0") + f" {unit}"


def _shift_of(suffix: str, text: str, number: str) -> int:
    """Find the unit's power of two; refuse decimal and unknown units by name."""
    unit = suffix.upper()
    if unit == "B":
        return 0
    if unit.endswith("IB") and unit[:-2] in _SHIFTS and len(unit) == 3:
        return _SHIFTS[unit[0]]
    if len(unit) == 2 and unit[1] == "I" and unit[0] in _SHIFTS:
        return _SHIFTS[unit[0]]
    if len(unit) == 2 and unit[1] == "B" and unit[0] in _SHIFTS:
        raise _refusal(
            f"{text!r} can be read two ways: write {number}{unit[0]} for {number} {unit[0]}iB "
            "(powers of 1024), or the number of bytes",
        )
    if unit in _SHIFTS:
        return _SHIFTS[unit]
    raise _refusal(f"{text!r} has an unknown unit {suffix!r}: use K, M, G, T, P or E")


def _refusal(message: str) -> UbiError:
    return UbiError(message, Exit.USAGE)
