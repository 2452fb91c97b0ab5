"""Hunting planted bugs: each is built, and given the same seeds as all others."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sim.builder import build
from sim.campaign import first_finding
from sim.plans import EVERYDAY

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sim.campaign import Finding
    from sim.mutants import Mutant

CHUNK = 10


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant in so many seeds."""

    mutant: Mutant
    seeds: int
    finding: Finding | None

    @property
    def good(self) -> bool:
        """Killed, or, where no promise is broken, not."""
        return (self.finding is None) == self.mutant.survives


def judge(mutant: Mutant, seeds: range) -> Verdict:
    """Build and run one, from outside alone: the engines' own counts are not looked at."""
    plan = EVERYDAY.but(bug=mutant.bug, blind=True)
    return Verdict(mutant, len(seeds), first_finding(build(mutant.variant), seeds, plan,
                                                     chunk=CHUNK))


def hunt(mutants: Sequence[Mutant], seeds: range, jobs: int = 0) -> Iterator[Verdict]:
    """Judge them side by side; in their order."""
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        yield from pool.map(lambda mutant: judge(mutant, seeds), mutants)
