"""Guests' events as reports of this session.

    test of a guest     is reported when
    ------------------- ---------------------------------------------------------------------
    finished            its file's turn has come, or it has failed
    running, guest gone at once, as failed: what it had reported so far, then why the guest is gone
    never started       at once, as failed: not run, or not collected in the guest

Where the terminal shows a row of dots a file, one file at a time has its turn, so that rows stay
whole; a failure does not wait for it. With -v there are no rows, and nothing waits.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from labplugin.driver import Follower
from labplugin.failure import Failure

if TYPE_CHECKING:
    from labplugin.guests import Guests
    from labplugin.shards import Shard

TURN_S = 0.05
NAMES_SHOWN = 5
PYTEST_STATUSES = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)


@dataclass
class Finished:
    """A test and its reports, as pytest serialised them."""

    item: pytest.Item
    reports: list[dict[str, Any]]


@dataclass
class Progress:
    """How far a guest is."""

    shard: Shard
    left: dict[str, pytest.Item]  # not finished, in order
    held: list[Finished] = field(default_factory=list)  # until it is the file's turn
    running: str = ""
    reports: list[dict[str, Any]] = field(default_factory=list)  # of the running test
    absent: frozenset[str] = frozenset()  # not collected in the guest
    notes: list[str] = field(default_factory=list)
    status: int | None = None  # of the guest's pytest, once it has come to its end
    gone: bool = False


class Replay:
    """The events of all guests of a session."""

    def __init__(self, session: pytest.Session, shards: list[Shard], guests: Guests) -> None:
        self.session = session
        self.guests = guests
        self.follower = Follower(str(guests.events))
        self.all = {
            shard.number: Progress(shard, {item.nodeid: item for item in shard.items})
            for shard in shards
        }
        self.turn: Progress | None = None
        self.rows = session.config.option.verbose <= 0
        self.seconds: dict[str, float] = {}
        self.building = False

    # -- from the hooks -------------------------------------------------------------------------

    def catch_up(self) -> bool:
        """Replay what has come in; say whether there was anything."""
        lines = self.follower.lines()
        for line in lines:
            if self.stopping:
                break
            self.take(json.loads(line))
        return bool(lines)

    @property
    def stopping(self) -> bool:
        """Whether -x, --maxfail or the like has ended the session."""
        return bool(self.session.shouldfail or self.session.shouldstop)

    def wait(self) -> None:
        """Replay until every test of every guest is reported."""
        while True:
            # Looked at first: what the driver has written before its end is then read below.
            over = not self.guests.driver_lives()
            some = self.catch_up()
            if self.session.shouldfail:
                raise self.session.Failed(self.session.shouldfail)
            if self.session.shouldstop:
                raise self.session.Interrupted(self.session.shouldstop)
            if all(progress.gone for progress in self.all.values()):
                return
            if over and not some:
                self._driver_is_lost()
            elif not some:
                if self.building:
                    self._say("waiting for the lab's kernel, which is being built")
                    self.building = False
                time.sleep(TURN_S)

    def _driver_is_lost(self) -> None:
        for progress in self.all.values():
            if not progress.gone:
                output = self.guests.log.read_text(errors="replace")
                self._gone(progress, {"status": 0, "output": output, "dmesg": "",
                                      "reason": "the guest's driver died"})

    def _say(self, words: str) -> None:
        terminal = self.session.config.pluginmanager.get_plugin("terminalreporter")
        if terminal:
            terminal.ensure_newline()
            terminal.write_line(words)

    # -- events ---------------------------------------------------------------------------------

    def take(self, event: dict[str, Any]) -> None:
        """Act on an event of the driver's."""
        kind = event["kind"]
        if kind == "building":
            self.building = True
            return
        progress = self.all[event["guest"]]
        if kind == "begin":
            self.building = False
        elif kind == "gone":
            self._gone(progress, event)
        else:
            assert kind == "record", kind
            self._record(progress, event["record"])

    def _record(self, progress: Progress, record: dict[str, Any]) -> None:
        kind = record["kind"]
        if kind == "collected":
            self._collected(progress, set(record["nodeids"]), record["errors"])
        elif kind == "start":
            progress.running, progress.reports = record["nodeid"], []
        elif kind == "report":
            progress.reports.append(record["data"])
        elif kind == "finish":
            item = progress.left.pop(record["nodeid"])
            progress.running = ""
            taken = sum(data["duration"] for data in progress.reports)
            self.seconds[item.nodeid] = round(taken, 1)
            self._finished(progress, Finished(item, progress.reports))
        elif kind == "internal":
            progress.notes.append(record["text"])
        else:
            assert kind == "end", kind
            progress.status = record["status"]

    def _collected(self, progress: Progress, there: set[str], errors: list[str]) -> None:
        progress.notes += errors
        progress.absent = frozenset(progress.left) - there
        known = progress.shard.known
        if known is None or known == there:
            return
        for what, names in (("only in the guest", there - known), ("only here", known - there)):
            if names:
                some = sorted(names)[:NAMES_SHOWN] + ["..."] * (len(names) > NAMES_SHOWN)
                progress.notes.append(f"{len(names)} tests are collected {what}: {', '.join(some)}")
        if there - known:
            self._complain(progress, "the guest collects other tests than this machine", {})

    # -- the end of a guest ---------------------------------------------------------------------

    def _gone(self, progress: Progress, event: dict[str, Any]) -> None:
        """Report what is left; nothing of a guest's is lost, and nothing passes by default."""
        why = _why_gone(progress, event)
        sections = {"dmesg": event["dmesg"], "output of the guest": event["output"],
                    "notes": "\n".join(progress.notes)}
        if progress.running:
            item = progress.left.pop(progress.running)
            self._play(Finished(item, [data for data in progress.reports if data["when"] == "setup"
                                       or data["outcome"] == "failed"]))
            self._fail(item, f"{why}, while this test ran", sections)
            sections = {}  # told once
        elif event["dmesg"] and not progress.left:
            self._complain(progress, "the guest's kernel complained", sections)
        elif not progress.left and why:
            self._complain(progress, why, sections)
        for nodeid, item in progress.left.items():
            what = "not collected in the guest" if nodeid in progress.absent else "not run"
            self._fail(item, f"{what}: {why}", sections)
            sections = {}  # told once
        progress.left.clear()
        progress.gone = True
        if self.turn in (None, progress):
            self._next_turn(progress)

    def _fail(self, item: pytest.Item, words: str, sections: dict[str, str]) -> None:
        path, line, _ = item.location
        self._report(item.nodeid, item.location, "call",
                     Failure(path, (line or 0) + 1, words), sections)

    def _complain(self, progress: Progress, words: str, sections: dict[str, str]) -> None:
        """Report an error that is of the file as a whole."""
        path = progress.shard.path
        sections = sections or {"notes": "\n".join(progress.notes)}
        failure = Failure(path, 1, words)
        self._report(f"{path}::lab", (path, 0, "lab"), "teardown", failure, sections)

    def _report(
        self, nodeid: str, location: tuple[str, int | None, str], when: str, failure: Failure,
        sections: dict[str, str],
    ) -> None:
        report = pytest.TestReport(
            nodeid, location, {}, "failed", failure, when,  # type: ignore[arg-type]
            sections=[(name, text) for name, text in sections.items() if text],
        )
        hook = self.session.config.hook
        hook.pytest_runtest_logstart(nodeid=nodeid, location=location)
        hook.pytest_runtest_logreport(report=report)
        hook.pytest_runtest_logfinish(nodeid=nodeid, location=location)

    # -- whose turn it is -----------------------------------------------------------------------

    def _finished(self, progress: Progress, test: Finished) -> None:
        failed = any(data["outcome"] == "failed" for data in test.reports)
        progress.held.append(test)
        if self.turn is None:
            self.turn = progress
        if self.turn is progress or failed or not self.rows:
            self._let_go(progress)

    def _let_go(self, progress: Progress) -> None:
        held, progress.held = progress.held, []
        for test in held:
            self._play(test)

    def _next_turn(self, progress: Progress) -> None:
        """Let all finished files go, then the one that has the most to tell."""
        self._let_go(progress)
        for other in self.all.values():
            if other.gone:
                self._let_go(other)
        self.turn = max(self.all.values(), key=lambda other: len(other.held))
        if not self.turn.held:
            self.turn = None
        else:
            self._let_go(self.turn)

    def _play(self, test: Finished) -> None:
        """One test, as if it had been run here."""
        hook, item = test.item.ihook, test.item
        hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for data in test.reports:
            report = hook.pytest_report_from_serializable(config=item.config, data=data)
            # What JSON has made of tuples.
            report.location = tuple(report.location)
            if isinstance(report.longrepr, list):
                report.longrepr = tuple(report.longrepr)
            hook.pytest_runtest_logreport(report=report)
        hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)


def _why_gone(progress: Progress, event: dict[str, Any]) -> str:
    """A phrase for what became of the guest; "" if it came to a good end."""
    status = event["status"]
    if event["reason"]:
        return str(event["reason"])
    if event["dmesg"]:
        return f"the guest's kernel complained (status {status})"
    if progress.status is None:
        return f"the guest died (status {status})"
    if progress.left or status not in PYTEST_STATUSES:
        return f"the guest's pytest has ended (status {progress.status}, the guest's {status})"
    return ""
