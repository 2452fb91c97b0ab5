"""Which state may meet which event: the tables of ubi_sim/_coverage.pxd, with names.

A pair that is not named legal cannot come about between the threads that drive the engines
(cython/ublk_ubi/_threads.pyx), or ends the process by an `ensure`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@dataclass(frozen=True)
class Grid:
    """Rows × columns of counters, from `start` on; what is legal by row."""

    name: str
    start: int
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    legal: dict[str, str]

    def pairs(self) -> Iterator[tuple[int, str]]:
        """Legal ones: index, name."""
        assert set(self.legal) <= set(self.rows), self.name
        for row, columns in self.legal.items():
            wanted = self.columns if columns == "*" else _words(columns)
            for column in wanted:
                index = (self.start + self.rows.index(row) * len(self.columns)
                         + self.columns.index(column))
                yield index, f"{self.name}: {row} × {column}"


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def _every(rows: tuple[str, ...]) -> dict[str, str]:
    return dict.fromkeys(rows, "*")


STRIPE_STATES = ("ABSENT", "FETCHING", "OVERWRITING", "PRESENT", "DURABLE")
REQUESTS = ("READ", "WRITE of a part", "WRITE of all", "durable WRITE of a part",
            "durable WRITE of all", "ZEROES in a part", "ZEROES in all", "DISCARD")
LOST = ("READ", "write of a part", "write of all")
PHASES = (
    "NEW", "FIRST_SYNC", "READ_HEAD", "READ_SLOTS", "SCAN", "READ_PAGES", "FIND_TABLE",
    "LATCH_TABLE", "BEFORE_WRITE", "ERASE", "ERASE_SYNC", "ZERO_TAIL", "ZERO", "ZERO_SYNC",
    "FIRST_SLOT", "FIRST_SLOT_SYNC", "FIRST_HEAD", "FIRST_HEAD_SYNC", "CREATED", "RETIRE",
    "RETIRE_SYNC", "DROP_TABLE", "MAKE_TABLE", "MAP_TABLE", "OPEN_HEAD", "OPEN_SLOT", "OPEN_SYNC",
    "PUBLISH", "OPEN", "GROW_FIRST_SYNC", "GROW_SLOT", "GROW_SYNC", "GROW_LATCH", "CLOSE_SLOT",
    "CLOSE_SLOT_SYNC", "CLOSE_HEAD", "CLOSE_HEAD_SYNC", "UNLINK", "CLOSED", "FAILED",
)
BASES = ("closed", "open here", "open elsewhere")
REFUSALS = (
    "nothing", "I/O error", "foreign", "version", "damaged", "newer", "adopt", "stripe unknown",
    "stripe size", "stripe range", "too many stripes", "too small", "image size", "fingerprint",
    "live", "copy", "stale", "latched", "foreign writer", "needs its image",
)
ASKED = "WANT, HYDRATE, CLAIM"

GRIDS = (
    Grid("a request comes", 0, REQUESTS, STRIPE_STATES, _every(REQUESTS)),
    Grid("a flush comes", 40, ("FLUSH",),
         ("all durable", "an fdatasync runs", "not all durable", "latched", "unsafe",
          "all durable and synced"),
         {"FLUSH": "*"}),
    Grid("the queue refuses", 46, ("request",), ("durable once latched",), {"request": "*"}),
    Grid("a request comes once the image is lost", 460, LOST, STRIPE_STATES, _every(LOST)),
    Grid("a request waits", 48, (
        "IDLE", "READING_IMAGE", "READING_BASE", "WRITING", "AWAITING_STRIPE", "AWAITING_CLAIM",
        "OVERWRITE", "AWAITING_PRESENT", "AWAITING_ROUND", "AWAITING_SYNC", "DISCARDING",
    ), (
        "done", "failed", "failed but PRESENT", "PRESENT", "CLAIMED", "grant failed", "answered",
        "answered with an error", "done but latched",
    ), {
        "READING_IMAGE": "done, failed, failed but PRESENT",
        "READING_BASE": "done, failed",
        "WRITING": "done, failed, done but latched",
        "AWAITING_STRIPE": "PRESENT, grant failed",
        # Of those that wait for a failed fetch the first claim is granted: none fails.
        "AWAITING_CLAIM": "PRESENT, CLAIMED",
        "OVERWRITE": "done, failed, done but latched",
        "AWAITING_PRESENT": "answered, answered with an error",
        "AWAITING_ROUND": "answered, answered with an error",
        "AWAITING_SYNC": "done, failed, done but latched",
        "DISCARDING": "done, failed",
    }),
    Grid("a stripe", 152, (
        "ABSENT", "WANTED", "QUEUED", "FETCHING", "OVERWRITING", "PRESENT", "IN_ROUND", "DURABLE",
    ), (
        "WANT", "HYDRATE", "CLAIM", "WRITTEN", "WRITTEN failed", "read", "read failed", "written",
        "write failed",
    ), {
        "ABSENT": ASKED, "WANTED": ASKED, "QUEUED": ASKED,
        "FETCHING": f"{ASKED}, read, read failed, written, write failed",
        "OVERWRITING": f"{ASKED}, WRITTEN, WRITTEN failed",
        "PRESENT": ASKED, "IN_ROUND": ASKED, "DURABLE": ASKED,
    }),
    Grid("a round", 232, ("IDLE", "SYNC_DATA", "WRITE_PAGES", "SYNC_PAGES"), (
        "JOIN", "JOIN once latched", "tick", "tick once latched", "stop", "synced", "sync failed",
        "page", "page failed", "synced but latched", "round", "round once latched",
    ), {
        "IDLE": "JOIN, JOIN once latched, tick, tick once latched, stop, round,"
                " round once latched",
        "SYNC_DATA": "JOIN, JOIN once latched, tick, tick once latched, stop, synced, sync failed,"
                     " synced but latched",
        "WRITE_PAGES": "JOIN, JOIN once latched, tick, tick once latched, stop, page, page failed",
        "SYNC_PAGES": "JOIN, JOIN once latched, tick, tick once latched, stop, synced, sync failed,"
                      " synced but latched",
    }),
    # Queues run from when it is live until before it is stopped; a hint may still lie in its mail.
    Grid("the hydrator", 480, ("NEW", "STARTING", "RUNNING", "STOPPING", "STOPPED"),
         ("-", "request", "done", "message", "tick", "start", "stop", "hydrate", "budget",
          "round", "grow"), {
             "NEW": "start", "STARTING": "done, tick",
             "RUNNING": "done, message, tick, stop, hydrate, budget, round",
             "STOPPING": "done, message, tick, hydrate, budget",
         }),
    Grid("the lifecycle", 320, PHASES, ("well", "failed"), {
        # An error after a failed first fdatasync: docs/durability.md, what is not promised.
        phase: "well" if phase in ("NEW", "OPEN", "LATCH_TABLE", "GROW_LATCH") else "*"
        for phase in PHASES[:-2]
    }),
    Grid("an opening", 400, BASES,
         ("none", "valid", "latched", "of another opening", "of another base", "damaged", "live"),
         _every(BASES)),
    Grid("an opening, temporary table", 424, BASES,
         ("none", "of this generation", "of another", "live"), _every(BASES)),
    Grid("a refusal", 440, ("opening",), REFUSALS, {"opening": ", ".join(REFUSALS[1:])}),
)
LEGAL = dict(pair for grid in GRIDS for pair in grid.pairs())


def missing(counts: Sequence[int]) -> list[str]:
    """Legal pairs that were not seen."""
    return [name for index, name in LEGAL.items() if not counts[index]]


def illegal(counts: Sequence[int]) -> list[int]:
    """Indices that were seen and are not in the tables of what is legal: these are wrong, then."""
    return [index for index, count in enumerate(counts) if count and index not in LEGAL]
