"""What is compared with what, and what is to be reached.

A figure is what one subject does under one load; a case sets one figure beside another, or beside a
limit. A ratio says how many times as good as its peer a subject is, whether more is better
(requests a second) or less (instructions, waits): so a goal is always a least ratio.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import NamedTuple


class Figure(NamedTuple):
    """What is measured once, whatever it is compared with."""

    subject: str
    load: str

    @property
    def name(self) -> str:
        """Return its name in the protocol and in figures.json."""
        return f"{self.subject}/{self.load}"


@dataclass(frozen=True)
class Case:
    """One row of the table. `limit` stands in for a peer."""

    name: str
    figure: Figure
    peer: Figure | None = None
    goal: float | None = None
    limit: float | None = None

    @property
    def figures(self) -> list[Figure]:
        """List what has to be measured for it."""
        return [self.figure] + ([self.peer] if self.peer else [])


OURS = ("ubi-zero-copy", "ubi-plain", "ubi-writethrough", "ubi-cold")
WHAT = {
    "raw": "the ram disk itself",
    "dd": "dd, direct, 1 MiB at a time",
    "ubi-zero-copy": "ublk-ubi, hydrated, zero copy",
    "ubi-plain": "ublk-ubi, hydrated, plain copy",
    "ubi-writethrough": "ublk-ubi, hydrated, zero copy, writethrough",
    "ubi-cold-fixed": "ublk-ubi, nothing hydrated, no copy-on-read",
    "ubi-cold-64k": "ublk-ubi, nothing hydrated, stripes of 64 KiB",
    "ubi-cold-1m": "ublk-ubi, nothing hydrated, stripes of 1 MiB",
    "ubi-hydrating": "ublk-ubi, hot reads while the rest is hydrated",
    "ubi-add": "ublk-ubi add, to live",
    "kublk-loop": "kublk loop, AUTO_BUF_REG",
    "kublk-loop-none": "kublk loop, AUTO_BUF_REG, without the I/O scheduler that it is given",
    "kublk-null": "kublk null, AUTO_BUF_REG",
    "kublk-loop-plain": "kublk loop, plain copy",
    "kublk-null-plain": "kublk null, plain copy",
    "dm-clone": "dm-clone, hydrated, regions of 1 MiB",
    "dm-clone-cold-64k": "dm-clone, nothing hydrated, regions of 64 KiB",
    "dm-clone-cold-1m": "dm-clone, nothing hydrated, regions of 1 MiB",
    "dm-clone-hydrating": "dm-clone, reads while it hydrates, regions of 1 MiB",
    "qsd": "qemu-storage-daemon, copy-on-read, NBD, hydrated",
    "qsd-cold": "qemu-storage-daemon, copy-on-read, NBD",
    "nbdkit": "nbdkit cow-on-read, NBD, hydrated",
    "nbdkit-cold": "nbdkit cow-on-read, NBD",
}


def _cases() -> list[Case]:
    made: list[Case] = []

    def row(name: str, subject: str, load: str, peer: str = "", goal: float | None = None, *,
            peer_load: str = "", limit: float | None = None) -> None:  # fmt: skip
        other = Figure(peer, peer_load or load) if peer else None
        made.append(Case(name, Figure(subject, load), other, goal, limit))

    zero = "ubi-zero-copy"
    for load in ("randread-32", "randwrite-32", "randread-1"):
        name = f"hot-{load}"
        row(name, zero, load, "kublk-loop", 1.0)
        row(name, zero, load, "kublk-loop-none")
        row(name, zero, load, "raw")
        row(name, zero, load, "kublk-null")
        row(name, zero, load, "dm-clone")
        row(name, zero, load, "qsd", 3.0)
        row(name, zero, load, "nbdkit", 3.0)
    for load in ("randread-32", "randwrite-32"):
        row(f"plain-{load}", "ubi-plain", load, "kublk-loop-plain", 1.0)
        row(f"plain-{load}", "ubi-plain", load, "kublk-null-plain")
    row("writethrough-randwrite-32", "ubi-writethrough", "randwrite-32", zero, 0.75)
    for peer, goal in (("kublk-loop", 0.97), ("raw", None), ("kublk-null", None),
                       ("dm-clone", None), ("qsd", None), ("nbdkit", None)):  # fmt: skip
        row("read-1m", zero, "read-1m", peer, goal)
    row("cold-randread-32", "ubi-cold-fixed", "randread-32", zero, 0.97)
    row("cold-randread-32", "ubi-cold-fixed", "randread-32", "dm-clone-cold-1m")
    row("cold-randread-copying", "ubi-cold-64k", "cold-randread-32", "qsd-cold", 3.0)
    row("cold-randread-copying", "ubi-cold-64k", "cold-randread-32", "nbdkit-cold", 3.0)
    copied = "cold-read-copied"
    row("cold-read-1m", "ubi-cold-1m", copied, "dd", 0.60, peer_load="copy")
    row("cold-read-1m", "ubi-cold-1m", copied, "qsd-cold", 3.0, peer_load="cold-read-1m")
    row("hydration", "ubi-cold-1m", "hydration", "dd", 0.95, peer_load="copy")
    row("hydration", "ubi-cold-1m", "hydration", "dm-clone-cold-1m", 1.0)
    row("hydration-64k", "ubi-cold-64k", "hydration", "dm-clone-cold-64k")
    for size in ("64k", "1m"):
        load = f"first-touch-{size}"
        row(load, f"ubi-cold-{size}", load, f"dm-clone-cold-{size}", 1.0)
    row("first-touch-64k", "ubi-cold-64k", "first-touch-64k", "qsd-cold", 3.0)
    row("first-touch-64k", "ubi-cold-64k", "first-touch-64k", "nbdkit-cold", 3.0)
    for peer, goal in (("kublk-loop", 0.9), ("raw", None), ("dm-clone", None), ("qsd", 3.0),
                       ("nbdkit", 3.0)):  # fmt: skip
        row("write-fsync-1", zero, "write-fsync-1", peer, goal)
    row("fsync-16-cold", "ubi-cold-64k", "fsyncs-16", limit=250.0, goal=1.0)
    row("hot-while-hydrating", "ubi-hydrating", "reads", zero, 0.70, peer_load="randread-32")
    row("hot-while-hydrating", "ubi-hydrating", "reads", "dm-clone-hydrating")
    row("longest-wait-hydrating", "ubi-hydrating", "longest", limit=2.0, goal=1.0)
    row("hydration-under-load", "ubi-hydrating", "hydration", "ubi-cold-1m", 0.20)
    row("add", "ubi-add", "add-1g", limit=0.5, goal=1.0)
    row("add-1t", "ubi-add", "add-1t", "ubi-add", round(1 / 1.05, 3), peer_load="add-1g")
    return made


ALL = tuple(_cases())


def select(patterns: list[str], *, peers: bool = True) -> list[Case]:
    """Pick cases by name, in the table's order. Raises ValueError: a pattern that fits none."""
    names = list(dict.fromkeys(case.name for case in ALL))
    chosen: set[str] = set()
    for pattern in patterns or ["*"]:
        fitting = fnmatch.filter(names, pattern)
        if not fitting:
            raise ValueError(pattern)
        chosen.update(fitting)
    return [case for case in ALL if case.name in chosen and (peers or not is_foreign(case))]


def is_foreign(case: Case) -> bool:
    """Tell whether its peer is a server that is not ours."""
    return case.peer is not None and case.peer.subject.startswith(("kublk", "dm-", "qsd", "nbdkit"))


def figures(cases: list[Case]) -> list[Figure]:
    """List what the cases need, each once."""
    return list(dict.fromkeys(figure for case in cases for figure in case.figures))
