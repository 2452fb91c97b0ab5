"""Tells of a disk's errors as they come and go: of each kind the first at once, then a count.

Requests that fail do so by the thousand. An episode begins with an error, ends when there was none
for a while, and takes two lines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

QUIET_S = 10.0


class Faults:
    """Compares counters, as `status` has them; `report` gets the lines."""

    def __init__(self, report: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._report = report
        self._clock = clock
        self._seen: dict[str, int] = {}
        self._episodes: dict[str, tuple[int, float]] = {}  # errors before it; when the last came
        self._degraded: str | None = None

    def look(self, counters: dict[str, int], degraded: str | None) -> None:
        """See what has failed since the last look; `degraded` is why the disk is, if it is."""
        now = self._clock()
        if degraded != self._degraded:
            self._degraded = degraded
            if degraded is not None:
                self._report(f"degraded: {degraded}")
        for kind, errors in counters.items():
            before = self._seen.get(kind, 0)
            if errors > before:
                begun, _ = self._episodes.get(kind, (before, now))
                if kind not in self._episodes:
                    self._report(f"{kind} fail")
                self._episodes[kind] = (begun, now)
            elif kind in self._episodes and now - self._episodes[kind][1] >= QUIET_S:
                begun, last = self._episodes.pop(kind)
                self._report(
                    f"{kind} have not failed for {now - last:.0f} s; {errors - begun} did",
                )
            self._seen[kind] = errors


def errors_of(io: dict[str, Any], counters: dict[str, Any]) -> dict[str, int]:
    """Return the errors in what the data plane counts, by what to call them."""
    found = {f"{kind.replace('_', ' ')} requests": int(row["errors"]) for kind, row in io.items()}
    found["copies of stripes to the base"] = int(counters["hydration"]["errors"])
    found["commits to the base"] = int(counters["commit"]["errors"])
    return found
