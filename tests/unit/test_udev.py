"""What udev is told of a disk: from before it appears until after it is gone, and by its owner."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

import pytest

from ublk_ubi import udev
from ublk_ubi.errors import UbiError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UBLK_UBI_RUN", str(tmp_path / "run"))
    (tmp_path / "run").mkdir(mode=0o700)
    return tmp_path / "run" / ".udev"


@pytest.mark.parametrize(("owner", "mode", "lines"), [
    ((-1, -1), 0o660, ["UBLK_UBI_NAME=vm1", "UBLK_UBI_MODE=0660"]),
    ((-1, -1), 0o4, ["UBLK_UBI_NAME=vm1", "UBLK_UBI_MODE=0004"]),
    ((12, 34), 0o660,
     ["UBLK_UBI_NAME=vm1", "UBLK_UBI_MODE=0660", "UBLK_UBI_UID=12", "UBLK_UBI_GID=34"]),
    ((12, -1), 0o660, ["UBLK_UBI_NAME=vm1", "UBLK_UBI_MODE=0660", "UBLK_UBI_UID=12"]),
    ((-1, 0), 0o660, ["UBLK_UBI_NAME=vm1", "UBLK_UBI_MODE=0660", "UBLK_UBI_GID=0"]),
])
def test_what_is_told(
    folder: Path, owner: tuple[int, int], mode: int, lines: list[str],
) -> None:
    udev.announce("vm1", 7, owner, mode)
    assert (folder / "ublkb7").read_text().splitlines() == lines
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [path.name for path in folder.iterdir()] == ["ublkb7"]


def test_only_what_is_about_the_name_is_taken_back(folder: Path) -> None:
    udev.withdraw("vm1", 7)  # nothing is there
    udev.announce("vm1", 7, (-1, -1), 0o660)
    udev.announce("vm", 7, (-1, -1), 0o660)  # the id is another's by now
    udev.withdraw("vm1", 7)
    assert (folder / "ublkb7").exists()
    udev.withdraw("vm", 7)
    assert not (folder / "ublkb7").exists()


def test_no_room_is_said(folder: Path) -> None:
    folder.parent.joinpath(".udev").write_text("")
    with pytest.raises(UbiError, match=r"\.udev/ublkb7 cannot be written"):
        udev.announce("vm1", 7, (-1, -1), 0o660)
