"""An SPDK, disks whose daemons are fakes, and `serve`."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from spdkpeer import Spdk
from unit.serve.conftest import served  # noqa: F401 - a fixture
from unit.serve.kit import CHECKOUT, WITH_FAKES, end_all
from unit.vhost.files import with_block_size

from ublk_ubi import spdk as under_spdk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from ublk_ubi.runtime import Device


@pytest.fixture
def spdk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Spdk]:
    """SPDK, started."""
    found = Spdk(tmp_path).start()
    if found.real:
        monkeypatch.setattr(under_spdk, "bdev_call", with_block_size)
    yield found
    found.kill()


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Device]]:
    """Add a disk by the real command."""
    from ublk_ubi import runtime

    for variable, folder in (("UBLK_UBI_RUN", "run"), ("UBLK_UBI_DEV", "dev")):
        monkeypatch.setenv(variable, str(tmp_path / folder))
        (tmp_path / folder).mkdir(0o700, exist_ok=True)
    monkeypatch.setenv("PYTHONPATH", f"{CHECKOUT}:{CHECKOUT / 'tests'}")

    def make(name: str = "vm1", *words: str, cache: str = "writethrough") -> Device:
        subprocess.run(
            [sys.executable, "-c", WITH_FAKES, "add", "--image", "/normal", "--base",
             str(tmp_path / f"{name}.base"), "--name", name, "--cache", cache, *words],
            check=True, timeout=60, env=os.environ,
        )
        found = runtime.find(name)
        assert found is not None
        return found

    yield make
    end_all()
