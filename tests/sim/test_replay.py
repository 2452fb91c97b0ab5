"""Replaying: a seed is the same each time, a violation is found again and made smaller."""

from __future__ import annotations

import json

import pytest
from sim import cli
from sim.builder import build
from sim.campaign import first_finding
from sim.mutants import MUTANTS
from sim.plans import EVERYDAY
from sim.replay import Shrinker, replay

PLANTED = next(mutant for mutant in MUTANTS if mutant.name == "no fence: late header page")


def test_a_seed_does_the_same_each_time() -> None:
    first, second = (replay(build(), 3, EVERYDAY.but(crash_one_in=0)) for _ in range(2))
    assert first.trace == second.trace
    assert len(first.trace) > 50


def test_a_violation_is_replayed_and_shrunk() -> None:
    plan = EVERYDAY.but(bug=PLANTED.bug)
    found = first_finding(build(), range(20), plan)
    assert found is not None
    again = replay(build(), found.seed, found.case)
    assert again.finding is not None
    assert (again.finding.violation, again.finding.detail) == (found.violation, found.detail)
    assert "VIOLATION" in again.trace[-1]
    small = Shrinker(build(), found, tries_max=40).shrink()
    assert small.violation == found.violation
    assert small.plan.requests - small.plan.skipped.bit_count() < found.plan.requests
    assert replay(build(), small.seed, small.case).finding is not None


def test_exit_status_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--seed", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["violations"] == []
    assert cli.main(["--seed", "0", "--mutant", PLANTED.name, "--no-shrink", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is False
    assert answer["violations"][0]["replay"].startswith("tools/simulate --seed 0")
    assert any("VIOLATION" in line for line in answer["trace"])


@pytest.mark.parametrize("words", [["--seed", "x"], ["--plan", '{"no": 1}'], ["--mutant", "no"],
                                   ["--seeds", "1", "--mutants"]])
def test_wrong_calls(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == cli.USAGE
    assert len(capsys.readouterr().err.splitlines()) == 1
