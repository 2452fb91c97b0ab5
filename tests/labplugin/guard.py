"""No test file goes uncollected unnoticed: not by its name, its folder, a conftest or a skip.

And, with --no-skips, no test is skipped.
"""

from __future__ import annotations

import fnmatch
import re
from typing import TYPE_CHECKING

import pytest

from labplugin.failure import Failure

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TEST_IN_TEXT = re.compile(rb"^(?:async )?def test_|^class Test", re.MULTILINE)


class Guard:
    """Compares the test files on disk with those that tests were collected from."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.broken: set[Path] = set()
        self.skipped: dict[Path, str] = {}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note files that could not be collected: pytest tells of them by itself."""
        path = self.config.rootpath / report.nodeid.partition("::")[0]
        if report.failed:
            self.broken.add(path)
        elif report.skipped and isinstance(report.longrepr, tuple):
            self.skipped[path] = report.longrepr[2]

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """End the session with a word for each file that has gone missing."""
        if self._has_been_asked_to_leave_files_out():
            return
        collected = {item.path for item in items} | self.broken
        lost = [path for path in sorted(set(self._test_files())) if path not in collected]
        if lost:
            words = [self._describe(path) for path in lost]
            raise pytest.UsageError("\n".join(words))

    def _has_been_asked_to_leave_files_out(self) -> bool:
        names = ("lf", "ignore", "ignore_glob", "pyargs")
        return any(self.config.getoption(name, None) for name in names)

    def _test_files(self) -> Iterator[Path]:
        """Every file that is named like a test or holds one, beneath the folders to collect."""
        patterns = self.config.getini("python_files")
        for argument in self.config.args:
            folder = self.config.invocation_params.dir / argument
            if not folder.is_dir():
                continue
            for path in folder.resolve().rglob("*.py"):
                named = any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)
                if named or TEST_IN_TEXT.search(path.read_bytes()):
                    yield path

    def _describe(self, path: Path) -> str:
        why = self.skipped.get(path)
        hint = f"skipped as a whole: {why}" if why else "is its name or its folder's left out?"
        return f"{path}: no test was collected from this file ({hint})"


class NoSkips:
    """Makes a failure of every test that is skipped."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Change the report before anybody else sees it."""
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            path, line, _ = report.location
            report.outcome = "failed"
            words = f"skipped: {reason} (--no-skips)"
            report.longrepr = Failure(path, (line or 0) + 1, words)  # type: ignore[assignment]
