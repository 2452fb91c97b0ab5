"""A small dose of tools/simulate --mutants; every planted bug still has its place."""

from __future__ import annotations

import pytest
from sim.builder import ENGINE_SOURCES
from sim.hunt import judge
from sim.mutants import MUTANTS, Mutant

# Of each kind one: rounds, stripes, requests, the image, opening, the world around; and what must
# survive.
SOME = (
    "shadow page rebuilt from PRESENT",
    "failed stripe write marked PRESENT",
    "multi-stripe discard touches the first stripe only",
    "a read of a changed image is served",
    "older table accepted",
    "no fence: late header page",
    "lost doorbell never noticed",
    "table unlinked before the last commit",
)
SURVIVOR = "every FUA write joins a round"
# Those above are found in the first few; what must survive is given all.
SEEDS = range(30)


def named(name: str) -> Mutant:
    return next(mutant for mutant in MUTANTS if mutant.name == name)


@pytest.mark.parametrize("name", SOME)
def test_a_planted_bug_is_killed(name: str) -> None:
    verdict = judge(named(name), SEEDS)
    assert verdict.finding is not None
    assert "invariant" not in verdict.finding.violation, "seen from outside, not by an ensure"


def test_a_change_that_breaks_no_promise_survives() -> None:
    verdict = judge(named(SURVIVOR), SEEDS)
    assert verdict.finding is None, verdict.finding


@pytest.mark.parametrize("mutant", [mutant for mutant in MUTANTS if mutant.changes],
                         ids=lambda mutant: mutant.name)
def test_every_bug_has_its_place_in_the_engines(mutant: Mutant) -> None:
    texts = {change.file: (ENGINE_SOURCES / change.file).read_text() for change in mutant.changes}
    for change in mutant.changes:
        assert texts[change.file].count(change.old) == 1, change.old
        texts[change.file] = texts[change.file].replace(change.old, change.new)


def test_names_are_unique() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
