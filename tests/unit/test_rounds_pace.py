"""How long the hydrator's thread holds back a round that is due (_threads.pxd), clock in hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from unit.threads import build
from unit.threads.build import Change

if TYPE_CHECKING:
    from pathlib import Path

END = "min(HOLD_ROUNDS * thread.round_ns, <uint64_t>MAX_HOLD_NS)"
PLANTED = {
    "a lone writer is held back": Change(
        "_threads.pyx", "        if hydrator.arriving > 0 and now < hold_end(thread):\n",
        "        if now < hold_end(thread):\n"),
    "a round is held back as long as": Change(
        "_threads.pyx", "        if hydrator.arriving > 0 and now < hold_end(thread):\n",
        "        if False:\n"),
    "a round is held back too long": Change(
        "_threads.pyx", END, "HOLD_ROUNDS * thread.round_ns"),
}


def test_a_round_is_held_back_for_others_and_not_for_long() -> None:
    assert build.run(build.plain("pace")) == (0, "")


@pytest.mark.parametrize("says", PLANTED)
def test_what_is_planted_is_found(tmp_path: Path, says: str) -> None:
    code, told = build.run(build.planted("pace", tmp_path, PLANTED[says]))
    assert code == 3, told
    assert says in told
