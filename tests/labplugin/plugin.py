"""The hooks of a pytest session: gives the tests of the lab to guests, runs the others itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from labplugin.guard import Guard, NoSkips
from labplugin.guests import Guests
from labplugin.guestside import GuestSide
from labplugin.replay import Replay
from labplugin.shards import make_shards

if TYPE_CHECKING:
    from collections.abc import Generator

LAB = Path(__file__).resolve().parents[2] / "tools" / "lab"
SILENCE_S = 300.0
SECONDS_KEY = "lab/seconds"

_lab_folders = pytest.StashKey[list[Path]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options."""
    group = parser.getgroup("lab", "tests that need a kernel with ublk")
    group.addoption("--native", action="store_true",
                    help="run them on this machine's own kernel, not in guests of tools/lab")
    group.addoption("--no-skips", action="store_true", help="a test that is skipped has failed")
    group.addoption("--lab-jobs", type=_count, default=2, metavar="N",
                    help="how many guests run at a time (default 2); from 2 on one more, once "
                         "what runs here has ended")
    group.addoption("--lab-silence", type=float, default=SILENCE_S, metavar="SECONDS",
                    help="end a guest that reports nothing for so long (default %(default)g)")
    group.addoption("--lab-program", default=str(LAB), metavar="PROGRAM",
                    help="what runs a guest (default: tools/lab)")
    group.addoption("--lab-plan", metavar="FILE", help="given by the plugin to a guest's pytest")
    parser.addini("lab_folders", "folders whose tests run in the lab", type="paths", default=[])


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        message = f"{text!r}: give a number, 1 or more"
        raise pytest.UsageError(message)
    return int(text)


def pytest_configure(config: pytest.Config) -> None:
    """Decide what this session is: a guest's, a native one, or one that has guests."""
    config.addinivalue_line("markers", "device: needs a kernel with ublk; runs in the lab")
    config.addinivalue_line("markers", "cpus(N): a guest for it has N processors (else 1)")
    config.addinivalue_line("markers", "uses_lab: runs guests of its own; is run last")
    config.stash[_lab_folders] = config.getini("lab_folders")
    config.pluginmanager.register(Guard(config), "lab-guard")
    if config.getoption("no_skips"):
        config.pluginmanager.register(NoSkips(), "lab-no-skips")
    if plan := config.getoption("lab_plan"):
        config.pluginmanager.register(GuestSide(plan), "lab-guestside")
    elif os.environ.get("LAB") != "1" and not config.getoption("native"):
        config.pluginmanager.register(LabSession(config), "lab-session")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the tests of the lab."""
    if any(item.path.is_relative_to(folder) for folder in item.config.stash[_lab_folders]):
        item.add_marker("device")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests that have guests of their own last: the others need not wait for the kernel."""
    items.sort(key=lambda item: item.get_closest_marker("uses_lab") is not None)


class LabSession:
    """A session that has guests."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.known: dict[Path, list[str]] = {}  # all node ids of a file, before any deselection
        self.replay: Replay | None = None
        self.path: Path | None = None  # of the last test that ran here

    def pytest_report_header(self) -> str:
        """Say what is going to happen."""
        return f"lab: {self.config.getoption('lab_jobs')} guests at a time (--native: none)"

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Note what there is."""
        for item in items:
            self.known.setdefault(item.path, []).append(item.nodeid)

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        """Let the guests run beside the tests that run here; then wait for them."""
        given = [item for item in session.items if item.get_closest_marker("device")]
        option = self.config.option
        broken = session.testsfailed and not option.continue_on_collection_errors
        if not given or broken or option.collectonly:
            return (yield)
        if option.usepdb or option.trace:
            message = "--pdb, --trace: go into the lab: tools/lab -- python -m pytest --pdb ..."
            raise pytest.UsageError(message)
        everything = session.items
        session.items = [item for item in everything if not item.get_closest_marker("device")]
        seconds = self._seconds()
        shards = make_shards(self.config, given, self.known, seconds)
        with Guests(self.config, shards) as guests:
            self.replay = Replay(session, shards, guests)
            try:
                result = yield
                if self.config.getoption("lab_jobs") > 1:
                    guests.one_more()  # the CPU that this session had
                self.replay.wait()
            finally:
                session.items = everything
        self._remember_seconds(seconds | self.replay.seconds)
        return result

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Replay what has come in, between two files of tests that run here."""
        if self.replay and self.path not in (None, item.path):
            self.replay.catch_up()
            if self.replay.stopping:
                return True  # not run: the session ends
        self.path = item.path
        return None

    def _seconds(self) -> dict[str, float]:
        cache = getattr(self.config, "cache", None)
        return dict(cache.get(SECONDS_KEY, {})) if cache else {}

    def _remember_seconds(self, seconds: dict[str, float]) -> None:
        cache = getattr(self.config, "cache", None)
        if cache:
            cache.set(SECONDS_KEY, seconds)
