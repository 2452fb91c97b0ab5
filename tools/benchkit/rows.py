"""Figures into rows: the ratio to the peer, the goal, whether it is met. And rows as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .loads import LESS_IS_BETTER

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .boot import Measured
    from .cases import Case


@dataclass(frozen=True)
class Row:
    """One line of the table; the fields are those of the JSON, in its order."""

    case: str
    subject: str
    value: float | None
    unit: str
    peer: str
    peer_value: float | None
    ratio: float | None
    goal: float | None
    met: bool | None


def make(cases: Iterable[Case], measured: Measured) -> list[Row]:
    """Set each case's figure beside its peer's, or its limit."""
    return [_row(case, measured) for case in cases]


def _row(case: Case, measured: Measured) -> Row:
    value = measured.values.get(case.figure.name)
    unit = measured.units.get(case.figure.name, "")
    peer, peer_value = "limit", case.limit
    if case.peer is not None:
        peer, peer_value = case.peer.subject, measured.values.get(case.peer.name)
    ratio = ratio_of(value, peer_value, unit)
    met = None if case.goal is None or ratio is None else ratio >= case.goal
    return Row(case.name, case.figure.subject, _rounded(value), unit, peer, _rounded(peer_value),
               None if ratio is None else round(ratio, 3), case.goal, met)  # fmt: skip


def ratio_of(value: float | None, peer_value: float | None, unit: str) -> float | None:
    """Tell how many times as good as its peer a value is, whether more is better or less."""
    if unit in LESS_IS_BETTER:
        value, peer_value = peer_value, value
    if value is None or not peer_value:
        return None
    return value / peer_value


def _rounded(value: float | None) -> float | None:
    """Keep as many digits as are known."""
    if value is None:
        return None
    return round(value) if value >= 1000 else round(value, 3 if value < 10 else 1)


def document(kernel: str, rows: Iterable[Row]) -> dict[str, Any]:
    """Return what --json writes."""
    return {"kernel": kernel, "rows": [asdict(row) for row in rows]}
