"""Rows as people read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .cases import WHAT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .rows import Row

HEAD = ("case", "subject", "value", "unit", "peer", "its value", "ratio", "goal", "")
RIGHT = (2, 5, 6, 7)
NOT_HAD = "not had"


def lines(rows: Sequence[Row]) -> list[str]:
    """Lay the rows out in columns; a case's name stands once."""
    cells: list[tuple[str, ...]] = [HEAD]
    before = ("", "")
    for row in rows:
        subject = (row.case, row.subject)
        shown = ("", "", "", "") if subject == before else _own(row)
        before = subject
        cells.append((*shown, *_beside(row)))
    widths = [max(len(line[at]) for line in cells) for at in range(len(HEAD))]
    return ["  ".join(_cell(text, width, at) for at, (text, width)
                      in enumerate(zip(line, widths, strict=True))).rstrip()
            for line in cells]  # fmt: skip


def _own(row: Row) -> tuple[str, str, str, str]:
    return row.case, row.subject, number(row.value), row.unit


def _beside(row: Row) -> tuple[str, ...]:
    verdict = {True: "met", False: "SHORT", None: ""}[row.met]
    if row.goal is not None and row.met is None:
        verdict = "open"
    ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
    goal = "" if row.goal is None else f"{row.goal:.2f}"
    return row.peer, number(row.peer_value), ratio, goal, verdict


def number(value: float | None) -> str:
    """Write a figure with the digits that are known."""
    if value is None:
        return NOT_HAD
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _cell(text: str, width: int, at: int) -> str:
    return text.rjust(width) if at in RIGHT else text.ljust(width)


def legend(rows: Iterable[Row]) -> list[str]:
    """Say what the subjects are."""
    names = dict.fromkeys(name for row in rows for name in (row.subject, row.peer))
    return [f"{name}: {WHAT[name]}" for name in names if name in WHAT]


def troubles(missing: Mapping[str, str], failed: Mapping[str, str]) -> list[str]:
    """Name what could not be had, and what failed."""
    told = [f"not had: {name}: {reason}" for name, reason in missing.items()]
    return told + [f"FAILED: {name}: {reason}" for name, reason in failed.items()]
