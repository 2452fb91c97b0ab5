"""A small dose of tools/simulate: worlds without violations, and what was seen in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sim import pairs, sweeps
from sim.builder import Build, build
from sim.campaign import Campaign
from sim.lines import counting
from sim.plans import EVERYDAY

if TYPE_CHECKING:
    from sim.campaign import Seen

SEEDS = range(60)
# Of what `tools/simulate --seeds 1000` must show, so many seeds show this much.
STATES_MIN = 20_000
LINES_MIN_PERCENT = 95
PAIRS_MISSING_MAX = 30


@pytest.fixture(scope="module")
def plain() -> Build:
    return build()


def no_violation(seen: Seen) -> None:
    assert not seen.findings, "\n".join(f"{finding}\n  {finding.command}"
                                        for finding in seen.findings)


def test_every_crash_point_of_some_worlds() -> None:
    with counting() as counter:
        seen = Campaign(counter.build, SEEDS, EVERYDAY, environment=counter.environment).run()
        no_violation(seen)
        assert seen.seeds == len(SEEDS)
        assert len(seen.media | seen.processes) >= STATES_MIN
        assert not pairs.illegal(seen.pairs)
        assert len(pairs.missing(seen.pairs)) <= PAIRS_MISSING_MAX, pairs.missing(seen.pairs)
        lines = counter.lines()
        assert lines.percent >= LINES_MIN_PERCENT, "\n".join(map(str, lines.missing()))


def test_every_nth_fault_of_every_kind_in_a_world(plain: Build) -> None:
    seen = sweeps.nth_faults(plain, range(2))
    no_violation(seen)
    # Each variation ends with a run that does not reach its fault.
    assert seen.runs > 2 * 2 * len(sweeps.variations())


def test_every_subset_of_pending_writes_in_small_worlds(plain: Build) -> None:
    seen = sweeps.small_worlds(plain, range(8))
    no_violation(seen)
    assert len(seen.media) > 1000
