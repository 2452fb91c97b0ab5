"""Runs guests, some at a time, and follows what they write: a program of its own, `driver.py PLAN`.

What it learns goes to the plan's `events` file, one JSON object a line:

    building    the lab's kernel is not there yet
    begin       guest
    record      guest, record: what the guest's end wrote (guestside.py)
    gone        guest, status: tools/lab's, reason: why the driver has ended it (or ""),
                output: the last lines that the guest and the lab printed,
                dmesg: the kernel's messages, if it complained

One guest more may run once a byte has come in on its standard input: the caller has a CPU to spare.
It ends, and ends the guests, when all of them are gone or when its standard input ends. The program
returns at once: what does all this is a process of its own, which holds a lock on PLAN while it is
there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TURN_S = 0.05
TERMINATE_S = 15.0
BUILDING_AFTER_S = 3.0
TAIL_BYTES = 6000
DMESG_BYTES = 12000


class Follower:
    """Reads the complete new lines of a file that another process writes."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.position = 0

    def lines(self) -> list[bytes]:
        """What has come since the last call."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.position)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self.position += len(whole)
        return whole.splitlines()


class Guest:
    """One guest, from its start to its end."""

    def __init__(self, what: dict[str, Any], command: list[str], *, show_output: bool) -> None:
        self.what = what
        self.number: int = what["number"]
        self.follower = Follower(what["records"])
        self.reason = ""
        self.heard = time.monotonic()
        output = None if show_output else open(what["output"], "wb")  # noqa: SIM115 (closed below)
        self.process = subprocess.Popen(
            [*command, *what["words"]],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )
        if output:
            output.close()

    def end(self, reason: str) -> None:
        """End it, for a reason."""
        self.reason = reason
        self.process.terminate()
        try:
            self.process.wait(TERMINATE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def gone(self) -> dict[str, object]:
        """Say what became of it."""
        return {
            "status": self.process.returncode,
            "reason": self.reason,
            "output": tail(self.what["output"], TAIL_BYTES),
            "dmesg": tail(self.what["dmesg"], DMESG_BYTES),
        }


def tail(path: str, size: int) -> str:
    """Return the last bytes of a file, from the start of a line; "" if there is none."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        return ""
    cut = data[-size:]
    return (cut if len(data) <= size else cut.partition(b"\n")[2]).decode(errors="replace")


class Driver:
    """All guests of a session."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.events = open(plan["events"], "a", buffering=1)  # noqa: SIM115 (as long as we live)
        self.waiting: list[dict[str, Any]] = list(plan["guests"])
        self.running: list[Guest] = []

    def tell(self, kind: str, **fields: object) -> None:
        """Write one event."""
        self.events.write(json.dumps({"kind": kind, **fields}) + "\n")

    def run(self) -> None:
        """Run all guests."""
        if not self.build():
            return
        while self.waiting or self.running:
            while self.waiting and len(self.running) < self.plan["jobs"]:
                self.start(self.waiting.pop(0))
            if self.caller_has_gone():
                for guest in self.running:
                    guest.process.terminate()
                for guest in self.running:
                    guest.end("")
                return
            for guest in list(self.running):
                self.follow(guest)

    def build(self) -> bool:
        """Have the kernel built before any guest's clock runs; say whether it is there."""
        log = Path(self.plan["events"]).with_name("kernel.log")
        began = time.monotonic()
        told = False
        with log.open("wb") as output:
            process = subprocess.Popen([*self.plan["lab"], "--print", "kernel"],
                                       stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            while process.poll() is None:
                if self.caller_has_gone():
                    process.terminate()
                    process.wait()
                    return False
                if not told and time.monotonic() - began > BUILDING_AFTER_S:
                    told = True
                    self.tell("building")
        if not process.returncode:
            return True
        reason = "the lab could not build its kernel"
        for what in self.waiting:
            self.tell("gone", guest=what["number"], status=process.returncode, reason=reason,
                      output=tail(str(log), TAIL_BYTES), dmesg="")
        return False

    def start(self, what: dict[str, Any]) -> None:
        """Start one more guest."""
        self.tell("begin", guest=what["number"])
        self.running.append(Guest(what, self.plan["lab"], show_output=self.plan["show_output"]))

    def caller_has_gone(self) -> bool:
        """Wait for a moment; say whether standard input has ended. A byte is one guest more."""
        ready, _, _ = select.select([0], [], [], TURN_S)
        if not ready:
            return False
        more = len(os.read(0, 1))
        self.plan["jobs"] += more
        return not more

    def follow(self, guest: Guest) -> None:
        """Pass on what the guest has written; notice its end, and its silence."""
        ended = guest.process.poll() is not None  # before the last look at its records
        if not ended and time.monotonic() - guest.heard > self.plan["silence_s"]:
            silence = f"{self.plan['silence_s']:g} s"
            guest.end(f"the guest was ended: it reported nothing for {silence}")
            ended = True
        for line in guest.follower.lines():
            guest.heard = time.monotonic()
            with contextlib.suppress(ValueError):  # a line that a dying guest has left torn
                self.tell("record", guest=guest.number, record=json.loads(line))
        if ended:
            self.running.remove(guest)
            self.tell("gone", guest=guest.number, **guest.gone())


def main(path: str) -> None:
    """Do the work in a process that is nobody's child."""
    plan = open(path)  # noqa: SIM115 (its lock is held as long as we live)
    fcntl.flock(plan, fcntl.LOCK_EX)
    if os.fork() == 0:
        Driver(json.load(plan)).run()


if __name__ == "__main__":
    main(sys.argv[1])
