"""The ring's conformance test finds what is planted in the ring, and minds nothing else."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from unit.ring import build, judge
from unit.ring.mutants import MUTANTS

TESTS_FAILED = 1
NUMBERS = range(len(MUTANTS) + 1)      # 0: nothing is planted
JOBS = 2

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[int, str]]:
    """By number: the conformance test's status and words."""
    folder = build.build(tmp_path_factory.mktemp("ring"), MUTANTS)

    def judged(numbers: range) -> list[list]:
        done = subprocess.run(
            [sys.executable, "-P", judge.__file__, str(folder), *map(str, numbers)],
            capture_output=True, text=True, check=False,
        )
        assert done.returncode == 0, done.stderr
        return list(map(json.loads, done.stdout.splitlines()))

    with ThreadPoolExecutor(JOBS) as pool:
        found = pool.map(judged, [NUMBERS[first::JOBS] for first in range(JOBS)])
        return {number: (status, words) for some in found for number, status, words in some}


def test_nothing_planted_is_nothing_found(verdicts: dict[int, tuple[int, str]]) -> None:
    status, words = verdicts[0]
    assert status == 0, words
    assert re.search(r"^\d+ passed in ", words, re.MULTILINE), words


@pytest.mark.parametrize("number", NUMBERS[1:], ids=[mutant.name for mutant in MUTANTS])
def test_what_is_planted_is_found(number: int, verdicts: dict[int, tuple[int, str]]) -> None:
    """A test fails, or an invariant ends it; an error of the harness's own is neither."""
    status, words = verdicts[number]
    if MUTANTS[number - 1].survives:
        assert status == 0, words
    elif status == -signal.SIGABRT:
        assert "ublk-ubi: broken invariant:" in words
    else:
        assert status == TESTS_FAILED, words
        assert re.search(r"^FAILED tests/unit/test_ring\w*.py::\w+", words, re.MULTILINE), words
