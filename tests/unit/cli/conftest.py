"""What every test of the command has: folders of its own, and devices with fake daemons."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

import pytest
from unit.cli.kit import CHECKOUT, WITH_FAKES, Result, run

from ublk_ubi import runtime

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UBLK_UBI_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("UBLK_UBI_DEV", str(tmp_path / "dev"))
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    monkeypatch.delenv("UBLK_UBI_DEBUG", raising=False)
    (tmp_path / "dev").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def add():
    """Add a fake device by the real command."""
    def make(kind: str = "normal", name: str = "vm", *more: str) -> Result:
        found = run(
            "add", "--image", f"/{kind}", "--base", f"/{name}.base", "--name", name, *more,
            command=WITH_FAKES,
        )
        assert found.code == 0, found
        return found

    yield make
    for device in runtime.all_devices():
        if device.alive and device.pid:
            with contextlib.suppress(ProcessLookupError):  # it has ended since that look
                os.kill(device.pid, signal.SIGKILL)
