"""The gate: figures of ours against those that the repository keeps, figures.json.

    {"KERNEL": {"FIGURE": VALUE, …}, …}

On a kernel that is recorded, a figure is compared with its own of before. On another one it is its
ratio to the bare ram disk's that is compared, with the last kernel recorded: what a release of the
kernel makes of all requests alike is no loss of ours. Figures that have no such peer are left out
then, and named.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .cases import Figure
from .rows import ratio_of
from .table import number

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .boot import Measured

FILE = Path(__file__).with_name("figures.json")
LOSS = 0.03                        # more of it fails
DIVISOR = 4

# What is steady, and short, and shows a loss in each part: the queue on either data path, its
# durable writes, the hydrator, the command.
WATCHED = {
    Figure("ubi-zero-copy", "randread-32"): Figure("raw", "randread-32"),
    Figure("ubi-zero-copy", "randwrite-32"): Figure("raw", "randwrite-32"),
    Figure("ubi-zero-copy", "randread-1"): Figure("raw", "randread-32"),
    Figure("ubi-zero-copy", "write-fsync-1"): Figure("raw", "randwrite-32"),
    Figure("ubi-plain", "randread-32"): Figure("raw", "randread-32"),
    Figure("ubi-cold-64k", "first-touch-64k"): Figure("raw", "randwrite-32"),
    Figure("ubi-add", "add-1g"): None,
}


def figures() -> list[Figure]:
    """List what has to be measured."""
    peers = [peer for peer in WATCHED.values() if peer is not None]
    return list(dict.fromkeys([*WATCHED, *peers]))


@dataclass(frozen=True)
class Verdict:
    """How one figure stands against its own of before; above 1 it is better."""

    figure: str
    value: float | None
    before: float | None
    ratio: float | None
    told: str = ""

    @property
    def fails(self) -> bool:
        """Tell whether more is lost than may be, or nothing is known."""
        return self.value is None or (self.ratio is not None and self.ratio < 1 - LOSS)


Kept = dict[str, dict[str, float]]


def read(path: Path = FILE) -> Kept:
    """Return what is kept, by kernel."""
    kept: Kept = json.loads(path.read_text()) if path.exists() else {}
    return kept


def record(measured: Measured, path: Path = FILE) -> None:
    """Keep these figures: the last of the file, as they are the newest."""
    kept = read(path)
    kept.pop(measured.kernel, None)
    kept[measured.kernel] = {name: round(value, 4) for name, value in measured.values.items()}
    path.write_text(json.dumps(kept, indent=1) + "\n")


def judge(measured: Measured, kept: Kept) -> list[Verdict]:
    """Compare each figure that is watched."""
    own = kept.get(measured.kernel)
    return [_judge(figure, peer, measured, own or _last(kept), relative=own is None)
            for figure, peer in WATCHED.items()]  # fmt: skip


def lost(verdicts: list[Verdict]) -> list[Figure]:
    """List what was measured and has lost too much."""
    names = {verdict.figure for verdict in verdicts if verdict.fails and verdict.ratio is not None}
    return [figure for figure in WATCHED if figure.name in names]


def take_better(measured: Measured, again: Measured) -> None:
    """Take over what was better the second time: a guest's other work only makes a figure worse."""
    for name, value in again.values.items():
        if (ratio_of(value, measured.values[name], again.units[name]) or 0) > 1:
            measured.values[name] = value


def _last(kept: Kept) -> dict[str, float]:
    return list(kept.values())[-1] if kept else {}


def _judge(
    figure: Figure, peer: Figure | None, measured: Measured, before: Mapping[str, float], *,
    relative: bool,
) -> Verdict:
    name = figure.name
    value, old = measured.values.get(name), before.get(name)
    if value is None:
        reason = measured.failed.get(name) or measured.missing.get(name, "not measured")
        return Verdict(name, None, old, None, reason)
    if old is None:
        return Verdict(name, value, None, None, "not recorded: --record does that")
    unit = measured.units.get(name, "")
    if not relative:
        return Verdict(name, value, old, ratio_of(value, old, unit))
    if peer is None or not measured.values.get(peer.name) or not before.get(peer.name):
        return Verdict(name, value, old, None, "not compared: another kernel")
    now, then = value / measured.values[peer.name], old / before[peer.name]
    return Verdict(name, value, old, ratio_of(now, then, unit), f"relative to {peer.name}")


def lines(verdicts: list[Verdict]) -> list[str]:
    """Lay the verdicts out."""
    told = []
    for one in verdicts:
        ratio = "" if one.ratio is None else f"{one.ratio:.3f}"
        word = "LOST" if one.fails else "ok"
        numbers = f"{number(one.value):>10} {number(one.before):>10}  {ratio:>6}"
        told.append(f"{word:4}  {one.figure:30} {numbers}  {one.told}".rstrip())
    return told
