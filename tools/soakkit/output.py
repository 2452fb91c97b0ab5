"""What is told of a soak: a line that moves on a terminal, a line a minute elsewhere, the end."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

PERIOD_S = 60.0                    # between two lines where there is no terminal


@dataclass
class Tally:
    """What has happened, by all disks, each on a thread of its own."""

    seed: int
    seconds: float
    started_at: float = field(default_factory=time.monotonic)
    events: Counter[str] = field(default_factory=Counter)
    writes: int = 0
    sectors: int = 0               # compared with the record
    mismatches: int = 0
    longest_pause_s: float = 0.0   # of an upgrade
    problems: list[str] = field(default_factory=list)
    interrupted: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, event: str) -> None:
        """Count one of the events of a disk's lot."""
        with self.lock:
            self.events[event] += 1

    def add(self, *, writes: int = 0, sectors: int = 0, mismatches: int = 0) -> None:
        """Count what was written and compared."""
        with self.lock:
            self.writes += writes
            self.sectors += sectors
            self.mismatches += mismatches

    def note_pause(self, seconds: float) -> None:
        """Keep the longest pause."""
        with self.lock:
            self.longest_pause_s = max(self.longest_pause_s, seconds)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started_at

    @property
    def over(self) -> bool:
        """Whether to come to an end: the time is up, something does not hold, somebody says so."""
        return bool(self.problems) or self.interrupted or self.elapsed_s >= self.seconds

    def words(self) -> str:
        """Say it in a line."""
        with self.lock:
            events = ", ".join(f"{count} {name}" for name, count in sorted(self.events.items()))
        return (
            f"{self.writes} writes, {self.sectors} sectors compared, {self.mismatches} mismatches; "
            f"{events or 'nothing yet'}"
        )


class Output:
    """Prints a tally; nothing but the end with `as_json`."""

    def __init__(self, tally: Tally, *, as_json: bool) -> None:
        self._tally = tally
        self._json = as_json
        self._moves = sys.stdout.isatty() and not as_json
        self._told_at = time.monotonic()
        if not as_json:
            print(f"seed {tally.seed}: `tools/soak --seed {tally.seed} …` repeats it", flush=True)

    def tell(self) -> None:
        """Say how far it is, if it is time to."""
        if self._json:
            return
        tally = self._tally
        how_far = f"{tally.elapsed_s / 60:.1f} of {tally.seconds / 60:g} min: {tally.words()}"
        if self._moves:
            columns = shutil.get_terminal_size().columns - 1
            print(f"\r\033[K{how_far[:columns]}", end="", flush=True)
        elif time.monotonic() - self._told_at >= PERIOD_S:
            self._told_at = time.monotonic()
            print(how_far, flush=True)

    def end(self) -> None:
        """Say how it went."""
        tally = self._tally
        if self._json:
            print(json.dumps({
                "schema": 1, "seed": tally.seed, "seconds": round(tally.elapsed_s, 1),
                "writes": tally.writes, "sectors_compared": tally.sectors,
                "mismatches": tally.mismatches, "events": dict(sorted(tally.events.items())),
                "longest_upgrade_pause_s": round(tally.longest_pause_s, 3),
                "problems": tally.problems,
            }, indent=2))
            return
        print("\r\033[K" if self._moves else "", end="")
        for problem in tally.problems:
            print(f"soak: {problem}", file=sys.stderr)
        pause = f"; an upgrade took {tally.longest_pause_s:.2f} s at most"
        print(f"{tally.elapsed_s / 60:.1f} min: {tally.words()}"
              f"{pause if tally.longest_pause_s else ''}", flush=True)

