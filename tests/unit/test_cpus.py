"""CPU lists: what is read, what is refused, what is to be had here."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ublk_ubi.cpus import format_cpus, parse_cpus, usable_cpus
from ublk_ubi.errors import Exit, UbiError


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("0", [0]), ("0-3", [0, 1, 2, 3]), ("0-1,8", [0, 1, 8]), ("5-5", [5]), (" 1, 2 ", [1, 2]),
        ("3,1", [3, 1]), ("1,0-2,1", [1, 0, 2]), ("8191", [8191]),
    ],
)
def test_lists(text: str, cpus: list[int]) -> None:
    assert parse_cpus("--cpus", text) == cpus


@pytest.mark.parametrize(
    "text",
    ["", ",", "0,", "-1", "1-", "3-1", "0-8192", "8192", "a", "0x1", "1.5", "1--2", "1-2-3", "²",
     "٣", "1" * 5000, "1 2", "+1"],
)
def test_what_is_no_list(text: str) -> None:
    with pytest.raises(UbiError) as caught:
        parse_cpus("--hydrator-cpus", text)
    assert caught.value.code == Exit.USAGE
    assert caught.value.message.startswith("--hydrator-cpus ")
    assert "write it like 0-3,8" in caught.value.message


@given(st.sets(st.integers(0, 300), min_size=1))
def test_what_is_written_is_read_again(cpus: set[int]) -> None:
    assert parse_cpus("--cpus", format_cpus(sorted(cpus))) == sorted(cpus)


def test_writing() -> None:
    assert format_cpus([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"


def test_what_is_to_be_had_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 6})
    assert usable_cpus("--cpus", None) == []
    assert usable_cpus("--cpus", "6,0-1") == [6, 0, 1]
    with pytest.raises(UbiError) as caught:
        usable_cpus("--cpus", "1-3")
    assert caught.value.code == Exit.USAGE
    assert caught.value.message == (
        "--cpus 1-3: CPU 3 cannot be used here: name some of 0-2,6"
    )


@pytest.mark.parametrize(("text", "cpus", "goes_on_with"), [
    ("1,6", [1, 6], None), ("1-3", [1, 2], "1-2"), ("4,3", [], "0-2,6"),
])
def test_what_a_disk_that_waits_makes_do_with(
    monkeypatch: pytest.MonkeyPatch, text: str, cpus: list[int], goes_on_with: str | None,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 6})
    told: list[str] = []
    assert usable_cpus("--cpus", text, told=told) == cpus
    assert [line.partition("the disk goes on with ")[2] for line in told] == (
        [goes_on_with] if goes_on_with else [])
