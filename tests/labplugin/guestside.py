"""The guest's end: runs exactly the tests of its plan and writes down, line by line, what happens.

The plan (JSON): `records`, the file to write to, and `nodeids`, the tests in order. Each record is
a JSON object on a line of its own, with a `kind`:

    collected   nodeids: all there are in the files, errors: of the collection
    start       nodeid
    report      nodeid, data: a report as pytest serialises it
    finish      nodeid
    internal    text: of pytest's own failure
    end         status: pytest's
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest


class GuestSide:
    """A session in a guest."""

    def __init__(self, plan_path: str) -> None:
        plan = json.loads(Path(plan_path).read_text())
        self.wanted: list[str] = plan["nodeids"]
        self.records = open(plan["records"], "a", buffering=1)  # noqa: SIM115 (as long as we live)
        self.errors: list[str] = []
        self.config: pytest.Config | None = None

    def write(self, kind: str, **fields: object) -> None:
        """Write one record; the host sees it at once."""
        self.records.write(json.dumps({"kind": kind, **fields}, default=str) + "\n")

    def pytest_configure(self, config: pytest.Config) -> None:
        """Remember the session's configuration."""
        self.config = config

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Keep why a file could not be collected."""
        if not report.passed:
            self.errors.append(f"{report.nodeid}: {report.longreprtext}")

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Tell what there is, and keep what is to be run."""
        by_id = {item.nodeid: item for item in items}
        self.write("collected", nodeids=list(by_id), errors=self.errors)
        items[:] = [by_id[nodeid] for nodeid in self.wanted if nodeid in by_id]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Tell which test is being run: should the guest die now, it was this one."""
        self.write("start", nodeid=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Tell the outcome of one phase of a test."""
        assert self.config is not None
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.write("report", nodeid=report.nodeid, data=data)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Tell that all of the test is reported."""
        self.write("finish", nodeid=nodeid)

    def pytest_internalerror(self, excrepr: object) -> None:
        """Tell of a failure that is not a test's."""
        self.write("internal", text=str(excrepr))

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Tell that this is all."""
        self.write("end", status=int(exitstatus))
