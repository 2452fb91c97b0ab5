"""Metadata, tables and messages that nobody of us has written, for code under sanitizers."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
from unit.hostile import build

if TYPE_CHECKING:
    from pathlib import Path

# A read of one byte behind a table: by the loop that looks for a foreign writer's header bits.
OUT_OF_BOUNDS = build.Change(
    "_lifecycle.pyx",
    "        if header_bit(lifecycle, stripe) and lifecycle.table[stripe] == 0:\n",
    "        if lifecycle.table[stripe + 1] == 2 or (\n"
    "                header_bit(lifecycle, stripe) and lifecycle.table[stripe] == 0):\n",
)
SHIFT_TOO_FAR = build.Change(
    "_format.pyx",
    "    if slot.version != SLOT_VERSION or",
    "    if slot.sequence << (slot.generation | 64) == 0 or slot.version != SLOT_VERSION or",
)

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")


def check(program: str, folder: Path, change: build.Change | None = None) -> tuple[int, str]:
    """Run a program; its status, and what it printed."""
    last = folder / "last-case"
    last.touch()
    built = build.build(change, folder / "planted") if change else build.build()
    status, output = build.run(built, program, str(last), str(folder))
    if status and not change:
        output += f"\n\nthe case under way: {last.read_text(errors='replace')[:4000]}"
    return status, output


@pytest.mark.parametrize("program", ["check_metadata", "check_files", "check_messages"])
def test_whatever_the_bytes(program: str, tmp_path: Path) -> None:
    status, output = check(program, tmp_path)
    print(output)
    assert status == 0, output


@pytest.mark.parametrize(
    ("change", "words"),
    [(OUT_OF_BOUNDS, "AddressSanitizer: heap-buffer-overflow"),
     (SHIFT_TOO_FAR, "runtime error: shift exponent")],
    ids=["out-of-bounds", "undefined"],
)
def test_the_sanitizers_are_on(change: build.Change, words: str, tmp_path: Path) -> None:
    status, output = check("check_metadata", tmp_path, change)
    assert status == build.SANITIZER_STATUS, output
    assert words in output
