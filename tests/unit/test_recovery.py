"""What is known of a disk whose daemon died, and when nobody is started for it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec
import pytest

from ublk_ubi import recovery, runtime
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.options import DeviceOptions, continued

if TYPE_CHECKING:
    from pathlib import Path

    from ublk_ubi.runtime import Claim, Device

OPTIONS = DeviceOptions(
    base="/b", image="/i", size=1 << 30, queues=2, cache="writethrough", hydrate=True,
    format=True, adopt=True, zero=True, keep_old_data=True, force_stale=True,
)


@pytest.fixture(autouse=True)
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "run"
    monkeypatch.setenv("UBLK_UBI_RUN", str(folder))
    return folder


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[DeviceOptions]:
    """The options with which daemons would have been started."""
    begun: list[DeviceOptions] = []
    monkeypatch.setattr(
        recovery, "start_daemon", lambda options, *_, **__: begun.append(options),
    )
    return begun


def died(name: str = "vm", *, options: DeviceOptions | None = OPTIONS, id_: int | None = 3,
         live: bool = False) -> tuple[Device, Claim]:
    """A device whose daemon was this process; it is alive as long as its claim is."""
    claim = runtime.claim(name)
    claim.write_state(runtime.State(image="/i", base="/b", id=id_, recoverable=True))
    if options is not None:
        claim.write_options(options)
    if not live:
        claim.abandon()
    [device] = [device for device in runtime.all_devices() if device.name == name]
    return device, claim


def test_what_was_done_once_is_not_done_again() -> None:
    """A base that was formatted at first must not be when its daemon dies."""
    found = continued(OPTIONS, "vm")
    assert found == DeviceOptions(
        name="vm", base="/b", image="/i", queues=2, cache="writethrough", hydrate=True,
    )


def test_a_disk_is_brought_back_as_it_was(started: list[DeviceOptions]) -> None:
    device, _ = died()
    runtime.write_trouble(device, "it died too often")
    recovery.recover(device)
    assert started == [continued(OPTIONS, "vm")]
    [now] = runtime.all_devices()
    assert now.trouble is None, "an operator has asked for it: it counts anew"


def test_one_that_is_served_is_left_alone(started: list[DeviceOptions]) -> None:
    device, claim = died(live=True)
    with pytest.raises(UbiError, match=f"served by process {os.getpid()}: nothing to do") as caught:
        recovery.recover(device)
    claim.abandon()
    assert caught.value.code == Exit.BUSY
    assert started == []


@pytest.mark.parametrize("what", ["no id", "no options"])
def test_one_that_was_never_live_is_none(started: list[DeviceOptions], what: str) -> None:
    device, _ = died(id_=None if what == "no id" else 3,
                     options=None if what == "no options" else OPTIONS)
    with pytest.raises(UbiError, match="was never live: clear it up with `ublk-ubi del vm`"):
        recovery.recover(device)
    assert started == []


@pytest.mark.parametrize(
    "text", [b"{", b"\xff", b'{"base":"/b","warp":9}', b'{"base":7}', b'"options"'],
)
def test_options_of_another_version_are_told(
    started: list[DeviceOptions], run_folder: Path, text: bytes,
) -> None:
    device, _ = died()
    (run_folder / "vm/options.json").write_bytes(text)
    with pytest.raises(UbiError, match="of another version of ublk-ubi"):
        recovery.recover(device)
    assert started == []
    assert runtime.all_devices()[0].state is not None, "nothing is lost"


def test_options_are_no_link(run_folder: Path, tmp_path: Path) -> None:
    """Nobody's file elsewhere is taken for them."""
    device, _ = died()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(msgspec.json.encode(OPTIONS))
    (run_folder / "vm/options.json").unlink()
    (run_folder / "vm/options.json").symlink_to(elsewhere)
    with pytest.raises(UbiError, match=r"options\.json: Too many levels of symbolic links"):
        recovery.options_of(device)


def test_an_upgrade_of_a_dead_one_says_how_to_bring_it_back() -> None:
    device, _ = died()
    with pytest.raises(UbiError, match="bring it back with `ublk-ubi recover vm`"):
        recovery.upgrade(device)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ({"table_version": 99, "recoverable": True}, "a table of version 99"),
        ({"recoverable": False}, "--no-recovery"),
    ],
)
def test_an_upgrade_that_cannot_go_on_touches_nothing(
    monkeypatch: pytest.MonkeyPatch, started: list[DeviceOptions], status: dict[str, object],
    words: str,
) -> None:
    asked: list[str] = []

    def call(_path: str, method: str, *_: object) -> dict[str, object]:
        asked.append(method)
        return status

    device, claim = died(live=True)
    monkeypatch.setattr(recovery.rpc, "call", call)
    with pytest.raises(UbiError, match=words):
        recovery.upgrade(device)
    claim.abandon()
    assert (asked, started) == (["status"], [])
