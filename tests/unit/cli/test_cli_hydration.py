"""`hydrate`, `wait`, and what `status` says of background hydration."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from unit.cli.kit import (
    REAL,
    Result,
    is_one_line,
    kill,
    on_terminal,
    pid_of,
    run,
)

from ublk_ubi import runtime
from ublk_ubi.errors import Exit

if TYPE_CHECKING:
    from pathlib import Path


# However little time is left to wait, the daemon gets enough to answer on a busy machine.
PATIENT = [sys.executable, "-c", """
from ublk_ubi import background, cli
background.DEFAULT_TIMEOUT_S = background._LEAST_ASK_S = 20
cli.main()
"""]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("normal", "  background  running, at full speed, 1.2 GiB to go\n"),
        ("fails", "  background  retries in 12 s: Input/output error (3 failures), 1.2 GiB to go"),
        ("full", "  background  no room: 1 MiB free, --min-free is 5%, 1.2 GiB to go\n"),
        ("done", "  hydrated    100 %, 2,252 of 2,252 stripes: independent of its image\n"),
    ],
)
def test_status_of_background_hydration(add, kind: str, words: str) -> None:
    add(kind)
    run("hydrate", "vm")
    found = run("status", "vm")
    assert found.code == 0
    assert words in found.out
    assert ("only 1 MiB free" in found.out) == (kind == "full")
    assert ("  background  " in found.out) == (kind != "done")


def test_a_locale_that_has_few_letters(add) -> None:
    add()
    few = {"env": {**os.environ, "PYTHONIOENCODING": "latin-1"}, "encoding": "latin-1"}
    found = run("status", "vm", **few)
    assert (found.code, found.err) == (0, "")
    assert "\\u2192 " in found.out
    assert json.loads(run("status", "vm", "--json", **few).out)["name"] == "vm"


# hydrate and wait ----------------------------------------------------------------------------


def test_hydrate(add) -> None:
    add()
    assert run("hydrate", "vm") == Result(
        0, "vm: background hydration: running, at full speed, 1.2 GiB to go\n", "",
    )
    assert run("hydrate", "vm", "--rate", "200M").out == (
        "vm: background hydration: running, 200 MiB/s at most, 1.2 GiB to go\n"
    )
    assert run("hydrate", "vm", "--pause").out == (
        "vm: background hydration: paused, 1.2 GiB to go\n"
    )
    found = run("hydrate", "vm", "--rate", "max", "--json")
    assert (found.code, found.err) == (0, "")
    answer = json.loads(found.out)
    assert set(answer) == {
        "schema", "name", "state", "degraded", "independent", "stripes", "space", "hydration",
    }
    assert (answer["schema"], answer["name"], answer["independent"]) == (1, "vm", False)
    assert (answer["hydration"]["state"], answer["hydration"]["rate"]) == ("running", None)


def test_hydrate_of_one_that_is_done(add) -> None:
    add("done")
    assert run("hydrate", "vm") == Result(0, "vm is independent of its image\n", "")
    assert run("wait", "vm") == Result(0, "vm is independent of its image\n", "")


@pytest.mark.parametrize("command", ["hydrate", "wait"])
def test_hydrate_and_wait_of_the_degraded(add, command: str) -> None:
    add("lost")
    run("hydrate", "vm")
    found = run(command, "vm")
    assert (found.code, found.err) == (3, "ublk-ubi: device vm: its image has changed\n")
    kill("vm")
    found = run(command, "vm")
    assert found.code == Exit.DEGRADED
    assert is_one_line(found.err)
    assert "died" in found.err


@pytest.mark.parametrize("command", ["hydrate", "wait"])
def test_hydrate_and_wait_of_one_that_starts(command: str) -> None:
    claim = runtime.claim("vm")
    found = run(command, "vm", *(["--timeout", "0.3"] if command == "wait" else []))
    claim.release()
    assert found.code == (Exit.FAILED if command == "hydrate" else Exit.TIMED_OUT)
    assert is_one_line(found.err)


def test_a_daemon_that_does_not_know_how(add) -> None:
    add("other")
    found = run("hydrate", "vm")
    assert found.code == Exit.FAILED
    assert "its daemon is of another version" in found.err


def test_wait_until_independent(add) -> None:
    add("copies")
    found = run("hydrate", "vm", "--wait", "--rate", "max")
    assert (found.code, found.err) == (0, "")
    lines = found.out.splitlines()
    assert lines[0].startswith("vm: 62.2 %, 1.4 GiB of 2.2 GiB")
    assert lines[-1] == "vm is independent of its image"
    assert "\r" not in found.out
    found = run("wait", "vm", "--json")
    assert (found.code, found.err) == (0, "")
    answer = json.loads(found.out)
    assert (answer["independent"], answer["hydration"]["state"]) == (True, "done")


def test_wait_draws_a_bar_on_a_terminal(add) -> None:
    add("copies")
    run("hydrate", "vm")
    shown, code = on_terminal([*REAL, "wait", "vm"], COLUMNS="")
    assert code == 0
    drawn = shown.split("\r")
    assert any(re.fullmatch(r"vm  \[#+·+\]  [0-9.]+ %  .* of 2.2 GiB.*", line) for line in drawn)
    assert any(re.search(r"  [0-9.]+ [KMG]iB/s  [0-9]+ s left", line) for line in drawn)
    assert shown.endswith("\r\nvm is independent of its image\r\n")
    shown, code = on_terminal([*REAL, "wait", "vm", "--json"])
    assert code == 0
    assert json.loads(shown[shown.index("{"):])["independent"] is True
    assert "\r\n" in on_terminal([*REAL, "wait", "vm"], TERM="dumb")[0]
    assert "[" not in on_terminal([*REAL, "wait", "vm"], TERM="dumb")[0]


def test_wait_in_time(add) -> None:
    add("halts")
    started = time.monotonic()
    found = run("wait", "vm", "--timeout", "0.3", command=PATIENT)
    assert time.monotonic() - started < 20
    assert found.code == Exit.TIMED_OUT
    assert found.out == "vm: 44.4 %, 1000 MiB of 2.2 GiB\n"
    assert found.err == (
        "ublk-ubi: device vm still needs its image after 0.3 s: `ublk-ubi status vm` shows how far "
        "it is\n"
    )
    found = run("wait", "vm", "--timeout", "0", "--json", command=PATIENT)
    assert found.code == Exit.TIMED_OUT
    assert json.loads(found.out)["independent"] is False


def test_wait_of_a_mute_one(add) -> None:
    add("mute")
    assert run("wait", "vm", "--timeout", "0.3").code == Exit.TIMED_OUT


@pytest.mark.parametrize("kind", ["full", "fails"])
def test_wait_says_what_it_waits_for(add, kind: str) -> None:
    add(kind)
    run("hydrate", "vm")
    found = run("wait", "vm", "--timeout", "0.3", command=PATIENT)
    assert found.code == Exit.TIMED_OUT
    assert ("no room: 1 MiB free" if kind == "full" else "retries in 12 s") in found.out


def test_wait_for_what_nobody_does(add) -> None:
    add()
    found = run("wait", "vm")
    assert found.code == Exit.FAILED
    assert found.err == (
        "ublk-ubi: device vm needs its image, and background hydration is off: "
        "`ublk-ubi hydrate vm` starts it\n"
    )
    run("hydrate", "vm")
    run("hydrate", "vm", "--pause")
    found = run("wait", "vm", "--json")
    assert found.code == Exit.FAILED
    assert "is paused: `ublk-ubi hydrate vm` resumes it" in found.err
    assert json.loads(found.out)["hydration"]["state"] == "paused"


def test_wait_for_one_that_is_deleted(add) -> None:
    add("halts")
    process = subprocess.Popen(
        [*REAL, "wait", "vm"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    assert process.stdout
    assert process.stdout.readline().startswith("vm: ")
    assert run("del", "vm").code == 0
    _, err = process.communicate(timeout=20)
    assert process.returncode == Exit.NO_DEVICE
    assert err == "ublk-ubi: device vm was deleted before it was independent of its image\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_ctrl_c_ends_the_waiting_alone(add, terminal: bool) -> None:
    add("halts")
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*REAL, "wait", "vm"], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        stdout=slave if terminal else subprocess.PIPE, env={**os.environ, "TERM": "xterm"},
    )
    os.close(slave)
    reader = master if terminal else process.stdout.fileno()  # type: ignore[union-attr]
    assert select.select([reader], [], [], 20)[0]
    shown = os.read(reader, 1 << 16)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    if terminal:
        with contextlib.suppress(OSError):
            while piece := os.read(master, 1 << 16):
                shown += piece
    os.close(master)
    assert (process.returncode, err) == (1, "ublk-ubi: interrupted; vm goes on all the same\n")
    assert shown.endswith(b"\n")
    assert run("status", "vm").code == 0


def test_wait_outlasts_an_upgrade(add, roots: Path) -> None:
    """Another daemon takes the disk over: nobody answers for a moment, here for as long as the
    next one takes to start on a busy machine."""
    add("halts")
    patient = ("from ublk_ubi import background, cli\n"
               "background._TAKE_OVER_S = 15\ncli.main()\n")
    process = subprocess.Popen(
        [sys.executable, "-c", patient, "wait", "vm"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    assert process.stdout
    assert process.stdout.readline().startswith("vm: ")
    dead = pid_of("vm")
    os.kill(dead, signal.SIGKILL)
    while runtime.process_start(dead) is not None:
        time.sleep(0.01)
    add("done")
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "vm is independent of its image\n", "")
