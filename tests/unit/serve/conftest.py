"""A server of its own for every test that wants one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from unit.serve.kit import CHECKOUT, Served, end_all

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A server that is not started yet."""
    monkeypatch.setenv("UBLK_UBI_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("UBLK_UBI_DEV", str(tmp_path / "dev"))
    monkeypatch.setenv("PYTHONPATH", f"{CHECKOUT}:{CHECKOUT / 'tests'}")
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    (tmp_path / "dev").mkdir()
    (tmp_path / "run").mkdir(0o700)
    found = Served(tmp_path)
    yield found
    print(found.log)
    if found.process is not None:
        found.kill()
    end_all()
    assert "Traceback" not in found.log
    assert "internal error" not in found.log
