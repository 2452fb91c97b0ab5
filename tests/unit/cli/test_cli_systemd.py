"""`ublk-ubi systemd` as it is typed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from unit.cli.kit import run

from ublk_ubi import runtime

if TYPE_CHECKING:
    from pathlib import Path


def test_install_and_uninstall_say_what_they_do(roots: Path) -> None:
    (roots / "host").mkdir()
    place = ("--root", str(roots / "host"))
    found = run("systemd", "install", *place)
    assert (found.code, found.err) == (0, "")
    unit = f"{roots}/host/etc/systemd/system/ublk-ubi@.service"
    assert found.out.splitlines()[0] == f"written   {unit}"
    again = json.loads(run("systemd", "install", *place, "--json").out)
    assert again["schema"] == 1
    assert again["files"][0] == {"path": unit, "action": "unchanged"}
    removed = run("systemd", "uninstall", *place)
    assert removed.out.splitlines()[0] == f"removed   {unit}"
    assert run("systemd", "uninstall", *place).out == "nothing to remove\n"


def test_errors_are_one_line(roots: Path) -> None:
    found = run("systemd", "install", "--root", f"{roots}/none")
    assert (found.code, found.out) == (2, "")
    assert found.err == f"ublk-ubi: --root {roots}/none: there is no such folder\n"
    assert run("systemd", "install", "--max-disks", "0").code == 2
    assert run("systemd", "remove").code == 2


def test_uninstall_is_refused_while_there_are_disks(roots: Path) -> None:
    claim = runtime.claim("vm1")
    found = run("systemd", "uninstall")
    claim.release()
    assert found.code == 5
    assert "vm1" in found.err
    assert found.err.count("\n") == 1
