"""What systemd is asked, and what its answers mean: with a systemctl of the test's own."""

from __future__ import annotations

import os
import re
import shutil
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from ublk_ubi import launch, recovery, removal, runtime, systemd
from ublk_ubi.errors import UbiError
from ublk_ubi.options import DeviceOptions
from ublk_ubi.status import status_of
from ublk_ubi.systemd import is_in_charge
from ublk_ubi.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

UNIT = "ublk-ubi@vm1.service"
JOURNAL = '#!/bin/sh\necho "no room on /srv"\n'


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host where systemd is in charge, and answers with what is in the file `answer`."""
    programs = tmp_path / "bin"
    programs.mkdir()
    systemctl = f"""#!/bin/sh
        echo "$@" >>{tmp_path}/calls
        cat {tmp_path}/answer
        test ! -e {tmp_path}/fails || {{ echo "Job for it failed." >&2; exit 1; }}
    """
    for name, text in (("systemctl", systemctl), ("journalctl", JOURNAL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / "answer").touch()
    (tmp_path / "calls").touch()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("UBLK_UBI_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("UBLK_UBI_DEV", str(tmp_path / "dev"))
    monkeypatch.setattr(systemd, "is_in_charge", lambda: True)
    return tmp_path


@pytest.fixture
def calls(host: Path) -> Callable[[], list[str]]:
    def read() -> list[str]:
        lines = (host / "calls").read_text().splitlines()
        return [line.removeprefix("--no-ask-password ") for line in lines]

    return read


def dead(*, left: bool = False, unit: str | None = UNIT, name: str = "vm1") -> runtime.Device:
    claim = runtime.claim(name)
    claim.write_state(runtime.State(
        image=None, base="/b", id=3, recoverable=True, left=left, unit=unit,
    ))
    claim.write_options(DeviceOptions(base="/b", name=name))
    claim.abandon()
    (device,) = [device for device in runtime.all_devices() if device.name == name]
    return device


# -- whose unit ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "unit"), [
    ("0::/system.slice/system-ublk\\x2dubi.slice/ublk-ubi@v-1.a.service\n",
     "ublk-ubi@v-1.a.service"),
    ("0::/system.slice/ublk-ubi@vm1.service/sub\n", UNIT),
    ("12:pids:/system.slice/x.service\n1:name=systemd:/system.slice/ublk-ubi@vm1.service\n", UNIT),
    ("0::/system.slice/ublk-ubi-vm1-0a1b2c3d.scope\n", None),
    ("0::/user.slice/user-0.slice/session-1.scope\n", None),
    ("0::/system.slice/my-ublk-ubi@vm1.service\n", None),
    ("0::/\n", None),
    ("", None),
])
def test_the_unit_of_a_process(text: str, unit: str | None) -> None:
    assert systemd.unit_in(text) == unit


def test_this_process_is_of_none() -> None:
    assert systemd.own_unit() is None


# -- a unit of its own -----------------------------------------------------------------------------


@pytest.fixture
def _runner(host: Path) -> None:
    (host / "bin/systemd-run").write_text(
        '#!/bin/sh\nwhile test "$1" != --; do shift; done\nshift\nexec "$@"\n',
    )
    (host / "bin/systemd-run").chmod(0o755)


@pytest.mark.usefixtures("_runner")
def test_a_daemon_gets_a_scope_that_its_files_outlive() -> None:
    words = systemd.scope("vm1", DeviceOptions(base="/srv/a b", image='/odd"name'))
    assert words[-1] == "--"
    assert {"--scope", "--collect", "--slice=system.slice", "--property=KillSignal=SIGPWR",
            '--property=RequiresMountsFor="/srv/a b"'} <= set(words)
    assert not any("odd" in word for word in words)
    (unit,) = [word for word in words if word.startswith("--unit=")]
    assert re.fullmatch(r"--unit=ublk-ubi-vm1-[0-9a-f]{8}", unit)
    assert systemd.scope("vm1") != systemd.scope("vm1")


@pytest.mark.usefixtures("_runner")
def test_tests_disks_are_no_matter_of_the_host_s(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:
    monkeypatch.setattr(systemd, "BOOTED", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.delenv("UBLK_UBI_RUN")
    assert is_in_charge()
    monkeypatch.setenv("UBLK_UBI_RUN", str(tmp_path))
    assert not is_in_charge()


def test_where_it_gets_none(monkeypatch: pytest.MonkeyPatch, host: Path) -> None:
    monkeypatch.setattr(systemd, "own_unit", lambda: UNIT)
    assert systemd.scope("vm1") == []
    monkeypatch.setattr(systemd, "own_unit", lambda: None)
    assert systemd.scope("vm1") != []
    monkeypatch.setattr(systemd, "is_in_charge", lambda: False)
    assert systemd.scope("vm1") == []
    monkeypatch.setattr(systemd, "is_in_charge", lambda: True)
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    assert systemd.scope("vm1") == []


@pytest.mark.usefixtures("_runner")
def test_a_daemon_is_started_through_it(monkeypatch: pytest.MonkeyPatch, host: Path) -> None:
    """And its process is the one that we wait for."""
    answer = """
import json, os, sys
task = json.load(open(int(sys.argv[1])))
answer = json.dumps({"ok": True, "name": "x", "pid": os.getpid()})
os.write(task["ready_fd"], answer.encode() + b"\\n")
"""
    monkeypatch.setattr(launch, "daemon_command", lambda: [sys.executable, "-c", answer])
    ready = launch.start_daemon(DeviceOptions(base="/b", image="/i"))
    assert ready.name == "x"
    assert ready.pid > 0


def test_the_notify_socket_is_for_units_of_ours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    assert "NOTIFY_SOCKET" not in launch.environment()
    monkeypatch.setattr(launch, "own_unit", lambda: UNIT)
    assert launch.environment()["NOTIFY_SOCKET"] == "/run/systemd/notify"


# -- a unit whose daemon is gone -------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "left", "words"), [
    ("SubState=auto-restart\nResult=signal\n", False, ["systemd is bringing it back", UNIT]),
    ("SubState=failed\nResult=start-limit-hit\n", False, [
        "died 5 times within 60 s", "no room on /srv", "`ublk-ubi recover vm1`",
        "`ublk-ubi del --force vm1`",
    ]),
    ("SubState=failed\nResult=signal\nExecMainStatus=9\nNRestarts=5\n", False, ["died 5 times"]),
    ("SubState=failed\nResult=exit-code\nExecMainStatus=2\nNRestarts=7\n", False, [
        f"{UNIT} is failed",
    ]),
    ("SubState=failed\nResult=timeout\nExecMainStatus=9\nNRestarts=0\n", False, [
        f"{UNIT} is failed",
    ]),
    ("SubState=dead\nResult=success\n", True, ["left", f"`systemctl start {UNIT}`"]),
    ("SubState=failed\nResult=exit-code\n", False, [f"{UNIT} is failed", "`ublk-ubi recover vm1`"]),
    ("", False, [f"{UNIT} is not known"]),
])
def test_status_says_what_becomes_of_it(
    host: Path, answer: str, left: bool, words: list[str],
) -> None:
    (host / "answer").write_text(answer)
    status = status_of(dead(left=left))
    assert status.state == "dead"
    for word in words:
        assert word in (status.degraded or "")


def test_status_does_not_ask_for_others(calls: Callable[[], list[str]]) -> None:
    assert "`ublk-ubi recover vm1`" in (status_of(dead(unit=None)).degraded or "")
    assert calls() == []


def test_recover_starts_the_unit_however_often_it_died(
    calls: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recovery, "start_daemon", lambda *_a, **_k: pytest.fail("no unit"))
    device = dead()
    with pytest.raises(UbiError, match="is started, and the disk is not live"):
        recovery.recover(device)
    assert calls() == [f"reset-failed {UNIT}", f"start {UNIT}"]


@pytest.mark.parametrize("tells", [True, False])
def test_an_upgrade_by_its_unit_says_how_long_requests_waited(
    monkeypatch: pytest.MonkeyPatch, tells: bool,
) -> None:
    """If the daemon before said when it left."""
    clock = [100.0]
    monkeypatch.setattr(runtime, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    state = runtime.State(image=None, base="/b", id=3, cookie=7, recoverable=True, unit=UNIT)
    claims = [runtime.claim("vm1")]
    claims[0].write_state(state)
    claims[0].write_options(DeviceOptions(base="/b", name="vm1"))

    def reload(_device: object) -> None:
        if tells:
            claims[0].write_state(state, left=False)
        claims[0].abandon()
        clock[0] += 0.25
        claims.append(runtime.claim("vm1"))
        claims[1].write_state(state)

    monkeypatch.setattr(recovery.rpc, "call", lambda *_: {"recoverable": True})
    monkeypatch.setattr(systemd, "reload", reload)
    (device,) = runtime.all_devices()
    _, pause_s = recovery.upgrade(device)
    assert pause_s == (0.25 if tells else None)
    clock[0] += 1
    written = claims[1].write_state(state)
    claims[1].abandon()
    assert (written.waited_s, written.left_at, written.left) == (pause_s, None, False)


def test_a_unit_that_does_not_start_says_why(host: Path) -> None:
    (host / "fails").touch()
    with pytest.raises(UbiError) as error:
        recovery.recover(dead())
    assert error.value.message.startswith(
        f"`systemctl start {UNIT}` failed: Job for it failed. (the last line of its log: no room",
    )


def test_the_watch_leaves_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    dead()
    watch = Watch(lambda _line: None)
    monkeypatch.setattr(watch, "_bring_back", lambda device: pytest.fail(device.name))
    assert not watch.look()
    dead(unit=None, name="vm2")
    brought: list[str] = []
    monkeypatch.setattr(watch, "_bring_back", lambda device: brought.append(device.name))
    assert watch.look()
    assert brought == ["vm2"]


def test_del_ends_the_unit_first(
    calls: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else it would come back while it is cleared up."""
    seen: list[list[str]] = []
    monkeypatch.setattr(removal, "clear_dead", lambda *_a, **_k: seen.append(calls()))
    removal.remove_device(dead(), force=True, timeout_s=1)
    assert seen == [[f"stop {UNIT}", f"reset-failed {UNIT}"]]


def test_del_that_is_refused_ends_no_unit(
    calls: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch,
) -> None:
    def busy(_device: object) -> None:
        raise UbiError("in use")

    monkeypatch.setattr(removal, "refuse_if_used", busy)
    with pytest.raises(UbiError, match="in use"):
        removal.remove_device(dead(), force=False, timeout_s=1)
    assert calls() == []
