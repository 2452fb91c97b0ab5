"""What tools/simulate prints: for people on stdout, or one JSON document."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from sim.campaign import Finding  # noqa: TC002

PAUSE_S = 0.5


@dataclass
class Output:
    """Collects what there is to say; with `as_json` it is said at the end, as one object."""

    as_json: bool
    values: dict[str, Any] = field(default_factory=lambda: {"schema": 1})
    wrong: bool = False

    def line(self, text: str = "") -> None:
        """Say something to people."""
        if not self.as_json:
            print(text, flush=True)

    def put(self, **values: Any) -> None:
        """Say something to programs."""
        self.values.update(values)

    def check(self, text: str, *, good: bool) -> None:
        """Something that must hold."""
        self.line(f"{'  ' if good else 'NO'} {text}")
        self.wrong = self.wrong or not good

    def end(self) -> int:
        """Return the exit status."""
        self.put(ok=not self.wrong)
        if self.as_json:
            print(json.dumps(self.values))
        return 1 if self.wrong else 0


def of_finding(finding: Finding) -> dict[str, Any]:
    """Return it for programs."""
    return {"seed": finding.seed, "violation": finding.violation, "detail": finding.detail,
            "boundary": finding.boundary, "branch": finding.branch,
            "plan": finding.case.differences, "replay": finding.command}


class Progress:
    """How far it is, on a terminal."""

    def __init__(self, what: str, total: int) -> None:
        self._what = what
        self._total = total
        self._last = 0.0
        self._on = sys.stderr.isatty()

    def __call__(self, done: int) -> None:
        """Show it, now and then."""
        now = time.monotonic()
        if self._on and (now - self._last > PAUSE_S or done >= self._total):
            self._last = now
            end = "\n" if done >= self._total else ""
            print(f"\r{self._what} {done}/{self._total}", end=end, file=sys.stderr, flush=True)
