"""A daemon's log: bounded, with repeats counted, and the journal's way where that reads it."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import pytest

from ublk_ubi import log
from ublk_ubi.log import LIMIT_BYTES, WARNING, Log

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TIME = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")


class File:
    """A log in a file, and the clock that it goes by."""

    def __init__(self, path: Path, *, own: bool = True) -> None:
        self.now = 0.0
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self.log = Log(self.fd, own=own, clock=lambda: self.now)

    def lines(self) -> list[str]:
        lines = self.path.read_text().splitlines()
        assert all(TIME.match(line) or line.startswith(("(", "<")) for line in lines)
        return [TIME.sub("", line) for line in lines]


@pytest.fixture
def file(tmp_path: Path) -> Iterator[File]:
    made = File(tmp_path / "log")
    yield made
    os.close(made.fd)


def test_repeats_are_counted(file: File) -> None:
    for message in ["a", "b", *["c"] * 5, "d", "d", "e"]:
        file.log.write(message)
    assert file.lines() == [
        "a", "b", "c", "repeated 4 times more: c", "d", "repeated once more: d", "e",
    ]


def test_what_goes_on_is_told_once_a_minute(file: File) -> None:
    for second in range(150):
        file.now = second
        file.log.write("it fails")
    assert file.lines() == [
        "it fails", "repeated 60 times more: it fails", "repeated 60 times more: it fails",
    ]


def test_it_never_exceeds_its_limit_and_keeps_the_newest(file: File) -> None:
    for number in range(40_000):
        file.log.write(f"line {number:06} " + "x" * 40)
        if number % 1000 == 0:
            assert os.fstat(file.fd).st_size <= LIMIT_BYTES
    assert os.fstat(file.fd).st_size <= LIMIT_BYTES
    lines = file.lines()
    assert lines[0] == "(older lines were dropped)"
    numbers = [int(line.split()[1]) for line in lines[1:]]
    assert numbers == list(range(numbers[0], 40_000)), "whole lines, none missing in between"
    assert len(lines) > 5000


def test_another_ones_file_is_not_cut(tmp_path: Path) -> None:
    """Where somebody sent the output of `add --foreground`."""
    file = File(tmp_path / "log", own=False)
    os.write(file.fd, b"(theirs)\n" * (LIMIT_BYTES // 9))
    file.log.write("ours")
    assert os.fstat(file.fd).st_size > LIMIT_BYTES - 9
    file.log.keep_bounded()
    file.log.write("ours")
    file.log.write("now")
    assert os.fstat(file.fd).st_size < LIMIT_BYTES
    os.close(file.fd)


def test_the_journal_gets_priorities_and_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "stream"
    path.touch()
    status = path.stat()
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    file = File(path, own=False)
    file.log.write("live")
    file.log.write("degraded", WARNING)
    assert path.read_text() == "<6>live\n<4>degraded\n"
    os.close(file.fd)


def test_another_file_is_not_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that came along from a service's environment."""
    monkeypatch.setenv("JOURNAL_STREAM", "8:12345")
    file = File(tmp_path / "log")
    file.log.write("x")
    assert file.lines() == ["x"]
    os.close(file.fd)


def test_a_log_without_room_is_no_error() -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    Log(fd).write("x")
    os.close(fd)
    Log(fd).write("its descriptor is closed")


def test_the_process_has_one(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(log, "_standard", None)
    log.log("told")
    log.warn("warned")
    lines = capfd.readouterr().err.splitlines()
    assert [TIME.sub("", line) for line in lines] == ["told", "warned"]
