"""One seed looked at closely: its trace, and a smaller case that shows the same."""

from __future__ import annotations

import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sim.campaign import Finding, Worker
from sim.plans import Feature, Plan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sim.builder import Build

TRACE_BYTES = 16 << 20
TRIES = 400


@dataclass(frozen=True)
class Replay:
    """What a seed did under a plan."""

    finding: Finding | None
    trace: list[str]


def replay(build: Build, seed: int, plan: Plan, bytes_: int = TRACE_BYTES) -> Replay:
    """Run one seed with a trace; it is there even if an engine ended the process."""
    with tempfile.NamedTemporaryFile(prefix="simulate-") as file:
        file.truncate(bytes_)
        with Worker(build, Path(file.name)) as worker:
            findings = worker.run((seed, seed + 1), plan)
            worker.end()
        (length,) = struct.unpack("<Q", file.read(8))
        lines = file.read(length).decode(errors="replace").splitlines()
    return Replay(findings[0] if findings else None, lines)


class Shrinker:
    """Makes a failing case smaller as long as it fails in the same way."""

    def __init__(self, build: Build, finding: Finding, tries_max: int = TRIES) -> None:
        self.build = build
        self.finding = finding
        self.tries = 0
        self.tries_max = tries_max
        self._worker: Worker | None = None

    def shrink(self) -> Finding:
        """Return the smallest that was found."""
        before = None
        try:
            while before != self.finding and self.tries < self.tries_max:
                before = self.finding
                for candidate in self._candidates():
                    if self.tries >= self.tries_max:
                        break
                    self._try(candidate)
        finally:
            if self._worker is not None:
                self._worker.__exit__()
        return self.finding

    def _candidates(self) -> Iterator[Plan]:
        """Plans that are simpler than the present one; each is made from what holds by then."""
        # No crash at all, or one that is not followed by others.
        if self.finding.boundary >= 0:
            yield self._plan.but(crash_one_in=0)
        for feature in Feature:
            if self.finding.features & feature:
                yield self._plan.but(without=self._plan.without | feature)
        for fewer in self._fewer():
            yield self._plan.but(requests=fewer)
        for bit in range(min(self._plan.requests, 64)):
            if not self._plan.skipped >> bit & 1:
                yield self._plan.but(skipped=self._plan.skipped | 1 << bit)

    @property
    def _plan(self) -> Plan:
        return self.finding.plan

    def _fewer(self) -> Iterator[int]:
        """Numbers of requests: half as many, three quarters, one less."""
        now = self._plan.requests
        yield from sorted({now // 2, now * 3 // 4, max(now - 1, 0)} - {now})

    def _try(self, plan: Plan) -> None:
        """Keep it if it fails in the same way; at whatever boundary."""
        self.tries += 1
        if self._worker is None or not self._worker.alive:
            self._worker = Worker(self.build)
        findings = self._worker.run((self.finding.seed, self.finding.seed + 1), plan)
        if findings and findings[0].violation == self.finding.violation:
            self.finding = findings[0]
