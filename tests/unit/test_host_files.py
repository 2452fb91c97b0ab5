"""The files for systemd and udev: written, kept up to date, removed; what systemd says of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from ublk_ubi import host_files, runtime, systemd
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.host import generator
from ublk_ubi.host_files import FILES, MARK, Change

if TYPE_CHECKING:
    from pathlib import Path

UNIT = "etc/systemd/system/ublk-ubi@.service"
GENERATOR = "etc/systemd/system-generators/ublk-ubi-generator"
RULES = "etc/udev/rules.d/59-ublk-ubi.rules"
MODPROBE = "etc/modprobe.d/ublk-ubi.conf"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def installed(root: Path) -> Path:
    host_files.install(str(root))
    return root


def all_files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())


# -- install ---------------------------------------------------------------------------------------


def test_install_writes_all_and_says_so(root: Path) -> None:
    changes = host_files.install(str(root))
    assert changes == [Change(str(root / file.path), "written") for file in FILES]
    assert all_files(root) == sorted(file.path for file in FILES)
    for file in FILES:
        assert MARK in (root / file.path).read_text()
        assert (root / file.path).stat().st_mode & 0o777 == file.mode
        assert not re.search(r"@[A-Z]+@", (root / file.path).read_text())
    assert (root / "etc/ublk-ubi").is_dir()


def test_install_again_changes_nothing(installed: Path) -> None:
    before = {path: (installed / path).stat().st_ino for path in all_files(installed)}
    changes = host_files.install(str(installed))
    assert {change.action for change in changes} == {"unchanged"}
    assert before == {path: (installed / path).stat().st_ino for path in all_files(installed)}


def test_install_brings_up_to_date(installed: Path) -> None:
    (installed / UNIT).write_text(f"# {MARK}`, long ago\n")
    (installed / GENERATOR).chmod(0o644)
    (installed / RULES).unlink()
    actions = {change.path.removeprefix(f"{installed}/"): change.action
               for change in host_files.install(str(installed))}
    assert actions[UNIT] == "updated"
    assert actions[GENERATOR] == "updated"
    assert actions[RULES] == "written"
    assert os.access(installed / GENERATOR, os.X_OK)


def test_the_drivers_limit_is_written_when_asked_for(root: Path) -> None:
    host_files.install(str(root), max_disks=500)
    assert (root / MODPROBE).read_text().splitlines()[-1] == "options ublk_drv ublks_max=500"
    host_files.install(str(root))
    assert (root / MODPROBE).exists()
    host_files.uninstall(str(root))
    assert not (root / MODPROBE).exists()


def test_a_file_of_somebody_elses_stays_and_nothing_is_written(root: Path) -> None:
    (root / "etc/udev/rules.d").mkdir(parents=True)
    (root / RULES).write_text("# mine\n")
    with pytest.raises(UbiError, match=r"59-ublk-ubi\.rules is not of .* move it away first"):
        host_files.install(str(root))
    assert all_files(root) == [RULES]
    assert host_files.uninstall(str(root)) == []
    assert all_files(root) == [RULES]


def test_a_folder_that_is_not_there_and_one_in_the_way(root: Path) -> None:
    with pytest.raises(UbiError, match="--root /nonexistent-root: there is no such folder"):
        host_files.install("/nonexistent-root")
    (root / "etc/systemd").mkdir(parents=True)
    (root / "etc/systemd/system").write_text("")
    with pytest.raises(UbiError, match=r"etc/systemd/system: File exists"):
        host_files.install(str(root))


def test_nothing_is_reloaded_for_another_root(
    root: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host_files, "reload", lambda: pytest.fail("reloaded"))
    host_files.install(str(root))
    host_files.uninstall(str(root))


def test_a_reload_that_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, status in (("systemctl", 0), ("udevadm", 1)):
        (tmp_path / name).write_text(
            f"#!/bin/sh\necho {name} $* >>{tmp_path}/calls\necho oh >&2\nexit {status}\n",
        )
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(systemd, "is_in_charge", lambda: True)
    monkeypatch.setattr(host_files, "UDEV_CONTROL", str(tmp_path))
    with pytest.raises(UbiError, match="`udevadm control --reload` failed: oh"):
        host_files.reload()
    assert (tmp_path / "calls").read_text() == "systemctl daemon-reload\nudevadm control --reload\n"


# -- uninstall -------------------------------------------------------------------------------------


def test_uninstall_takes_all_and_leaves_what_an_operator_wrote(installed: Path) -> None:
    wants = installed / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir()
    (wants / "ublk-ubi@vm1.service").symlink_to("../ublk-ubi@.service")
    (wants / "cron.service").symlink_to("/lib/systemd/system/cron.service")
    (installed / "etc/ublk-ubi/vm1.json").write_text("{}")
    changes = host_files.uninstall(str(installed))
    assert {change.action for change in changes} == {"removed"}
    assert str(wants / "ublk-ubi@vm1.service") in [change.path for change in changes]
    assert all_files(installed) == [
        "etc/systemd/system/multi-user.target.wants/cron.service", "etc/ublk-ubi/vm1.json",
    ]
    assert host_files.uninstall(str(installed)) == []


def test_uninstall_is_refused_while_there_are_disks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("UBLK_UBI_RUN", str(tmp_path / "run"))
    monkeypatch.setattr(host_files, "_read", pytest.fail)
    live = runtime.claim("vm1")
    left = runtime.claim("vm2")
    left.write_state(runtime.State(image=None, base="/b", id=3, recoverable=True))
    left.abandon()
    over = runtime.claim("vm3")  # what is left of it needs nobody
    over.write_state(runtime.State(image=None, base="/b", id=4))
    over.abandon()
    with pytest.raises(UbiError, match=r": vm1, vm2: `ublk-ubi del` them first") as error:
        host_files.uninstall()
    assert error.value.code == Exit.BUSY
    live.release()


# -- what is in them -------------------------------------------------------------------------------


def setting(text: str, key: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(f"{key}=")]
    return line.partition("=")[2]


def test_the_unit_runs_this_installation(installed: Path) -> None:
    text = (installed / UNIT).read_text()
    assert setting(text, "ExecStart") == f"{sys.executable} -P -m ublk_ubi.unit %i"
    assert sys.prefix in setting(text, "RequiresMountsFor").split()
    assert "RuntimeDirectory" not in text  # /run/ublk-ubi outlives every daemon


def test_the_unit_counts_deaths_as_the_watch_does(installed: Path) -> None:
    from ublk_ubi import watch

    text = (installed / UNIT).read_text()
    assert int(setting(text, "StartLimitBurst")) == watch.MOST_DEATHS == systemd.MOST_DEATHS
    assert int(setting(text, "StartLimitIntervalSec")) == watch.WINDOW_S


def test_the_unit_is_not_started_again_after_these(installed: Path) -> None:
    codes = setting((installed / UNIT).read_text(), "RestartPreventExitStatus").split()
    assert tuple(codes) == systemd.NOT_RESTARTED == (f"{Exit.USAGE:d}", f"{Exit.DEGRADED:d}")


def test_the_unit_is_patient_enough(installed: Path) -> None:
    from ublk_ubi import daemon

    text = (installed / UNIT).read_text()
    assert daemon.PATIENCE_S < int(setting(text, "TimeoutStopSec")) < systemd.TIMEOUT_S


@pytest.mark.parametrize("place", ["/opt/ublk-ubi", "/srv/a b%c$d"])
def test_words_are_quoted(
    root: Path, monkeypatch: pytest.MonkeyPatch, place: str,
) -> None:
    monkeypatch.setattr(sys, "prefix", place)
    host_files.install(str(root))
    text = setting((root / UNIT).read_text(), "RequiresMountsFor")
    assert (place in text) == (" " not in place)
    assert ('"/srv/a b%%c$$d"' in text) == (" " in place)


def verify(*paths: Path) -> str:
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *paths], capture_output=True, text=True,
        timeout=120, check=False,
    )
    return done.stderr + f"exit {done.returncode}" * bool(done.returncode)


def test_systemd_finds_nothing_wrong(installed: Path) -> None:
    units = installed / "etc/systemd/system"
    instance = units / "ublk-ubi@vm-1.a.service"
    shutil.copy(units / "ublk-ubi@.service", instance)
    assert verify(instance, units / "ublk-ubi.target", units / "ublk-ubi-serve.service") == ""


def test_systemd_would_find_it(installed: Path) -> None:
    unit = installed / UNIT
    unit.write_text(unit.read_text().replace("KillMode=mixed", "KillMode=some"))
    assert "kill mode" in verify(unit)


def test_udev_reads_the_rules_without_complaint(installed: Path) -> None:
    """In a namespace of its own, where they lie as on a host: not every udevadm has `verify`."""
    rules = installed / "etc/udev/rules.d"

    def complaints() -> list[str]:
        script = (
            f"mkdir -p /etc/udev/rules.d; mount --bind {rules} /etc/udev/rules.d && "
            "udevadm test /sys/class/mem/null"
        )
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True,
            timeout=120, check=False,
        )
        text = done.stdout + done.stderr
        assert "59-ublk-ubi.rules" in text, text
        return [line for line in text.splitlines()
                if "ublk-ubi.rules:" in line or ("ublk-ubi.rules" in line and "nvalid" in line)]

    assert complaints() == []
    (rules / "59-ublk-ubi.rules").write_text('SUBSYSTEM=="block", OPTIONS:="nowotch"\nFOO="1"\n')
    assert complaints() != []


# -- the generator ---------------------------------------------------------------------------------


def drop_ins(folder: Path) -> dict[str, list[str]]:
    """What is in each drop-in after `[Unit]`, by its unit."""
    return {
        path.parent.name.removesuffix(".d"): path.read_text().splitlines()[2:]
        for path in folder.rglob("50-ublk-ubi.conf")
    }


@pytest.mark.parametrize(("config", "settings"), [
    ('{"base": "/srv/vm1.base"}', ['RequiresMountsFor="/srv/vm1.base"']),
    ('{"base": "a b.base", "image": "../img/%.raw"}',
     ['RequiresMountsFor="ETC/a b.base"', 'RequiresMountsFor="IMG/%%.raw"']),
    ('{"base": "/dev/vg/vm-1", "image": "/dev/vg/golden"}',
     [r"Requires=dev-vg-vm\x2d1.device", r"After=dev-vg-vm\x2d1.device",
      "Wants=dev-vg-golden.device", "After=dev-vg-golden.device"]),
    ('{"base": "/b", "image": "/dev/ublk-ubi/golden"}',
     ['RequiresMountsFor="/b"', "Wants=ublk-ubi@golden.service", "After=ublk-ubi@golden.service"]),
])
def test_a_disk_stands_on_its_base_and_image(
    tmp_path: Path, config: str, settings: list[str],
) -> None:
    etc = tmp_path / "etc"
    etc.mkdir()
    (etc / "vm1.json").write_text(config)
    assert generator.generate(str(tmp_path / "out"), str(etc), "/nonexistent") == 0
    wanted = [
        word.replace("ETC", str(etc)).replace("IMG", str(tmp_path / "img")) for word in settings
    ]
    assert drop_ins(tmp_path / "out") == {"ublk-ubi@vm1.service": wanted}


def test_what_cannot_be_read_costs_the_others_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str],
) -> None:
    for name, text in (("bad.json", "["), ("list.json", "[]"), ("path.json", '{"base": 1}'),
                       ("line.json", '{"base": "/a\\nb"}'), ("vm1.json", '{"base": "/b"}'),
                       ("notes.txt", ""), ("-x.json", "{}"), ("deep.json", "[" * 100_000)):
        (tmp_path / name).write_text(text)
    assert generator.generate(str(tmp_path / "out"), str(tmp_path), "/nonexistent") == 1
    assert list(drop_ins(tmp_path / "out")) == ["ublk-ubi@vm1.service"]
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(": ")[1].rpartition("/")[2] for line in lines] == [
        "bad.json", "deep.json", "line.json", "list.json", "path.json",
    ]


def test_what_is_mounted_from_a_disk_goes_before_it(tmp_path: Path) -> None:
    (tmp_path / "vm1.json").write_text('{"base": "/b"}')
    (tmp_path / "fstab").write_text(
        "# /dev/ublk-ubi/vm1 /no ext4\n"
        "/dev/ublk-ubi/vm1 /mnt/a\\040b-c ext4 defaults 0 0\n"
        "/dev/ublk-ubi/vm1 none swap sw\n"
        "/dev/ublk-ubi/vm2 /vm2 ext4 defaults\n"
        "/dev/sda1 / ext4 defaults\nshort\n",
    )
    assert generator.generate(str(tmp_path), str(tmp_path), str(tmp_path / "fstab")) == 0
    found = drop_ins(tmp_path)
    del found["ublk-ubi@vm1.service"]
    words = ["Wants=ublk-ubi@vm1.service", "After=ublk-ubi@vm1.service"]
    assert found == {
        r"mnt-a\x20b\x2dc.mount": words, r"dev-ublk\x2dubi-vm1.swap": words,
    }


@pytest.mark.parametrize("path", ["/", "/a b/ä-.c", "//x//.hidden/", "/dev/disk/by-id/x:1@2"])
def test_names_of_units_are_systemds(path: str) -> None:
    done = subprocess.run(
        ["systemd-escape", "--path", path], capture_output=True, text=True, check=True,
    )
    assert generator.escape(path) == done.stdout.strip()


def test_the_generator_needs_nothing_of_ours(installed: Path, tmp_path: Path) -> None:
    """As systemd calls it at boot; what it says is systemd's to read."""
    done = subprocess.run(
        [installed / GENERATOR, tmp_path / "a", tmp_path / "b", tmp_path / "c"], env={},
        capture_output=True, text=True, check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")
    (tmp_path / "vm1.json").write_text('{"base": "/srv/a b/vm1.base", "image": "/dev/vg/i"}')
    generator.generate(str(tmp_path / "units"), str(tmp_path), "/nonexistent")
    unit = tmp_path / "units/ublk-ubi@vm1.service"
    shutil.copy(installed / UNIT, unit)
    assert verify(unit) == ""
