"""The unit's main process: its configuration, and whether a disk is added or taken over."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from ublk_ubi import daemon, runtime, unit
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.options import DeviceOptions

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UBLK_UBI_RUN", str(tmp_path / "run"))
    (tmp_path / "vm1.base").touch()
    return tmp_path


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[DeviceOptions, bool]]:
    """How the daemon was called."""
    calls: list[tuple[DeviceOptions, bool]] = []

    def run(options: DeviceOptions, _ready: object, *, recover: bool = False) -> int:
        calls.append((options, recover))
        if recover and options.id == 99:
            raise UbiError("its disk is gone", Exit.NO_DEVICE)
        if recover and options.id == 98:
            raise UbiError("its base is busy", Exit.BUSY)
        return 0

    monkeypatch.setattr(daemon, "run", run)
    return calls


def configure(etc: Path, **values: Any) -> None:
    (etc / "vm1.json").write_text(json.dumps({"base": "vm1.base"} | values))


def leave(base: Path | str, *, recoverable: bool = True, name: str = "vm1", **more: Any) -> None:
    """A disk whose daemon has gone."""
    claim = runtime.claim(name)
    claim.write_state(runtime.State(
        image=None, base=str(base), id=3, recoverable=recoverable, unit="ublk-ubi@vm1.service",
    ))
    claim.write_options(DeviceOptions(base=str(base), name=name, hydrate=True, **more))
    claim.abandon()


def refused(etc: Path, name: str = "vm1") -> str:
    with pytest.raises(UbiError) as error:
        unit.options_for(name, str(etc))
    assert error.value.code == Exit.USAGE
    return error.value.message


def test_the_keys_are_those_of_add(etc: Path) -> None:
    configure(etc, cache="writethrough", rate="200M", mode="0600")
    options = unit.options_for("vm1", str(etc))
    assert options == DeviceOptions(
        base=str(etc / "vm1.base"), name="vm1", cache="writethrough", rate=200 << 20, mode=0o600,
    )


@pytest.mark.parametrize(("values", "message"), [
    ({"name": "vm2"}, "the name is 'vm2' there"),
    ({"chache": "writeback"}, "unknown key 'chache'"),
    ({"cache": "none"}, "use writeback, writethrough or unsafe"),
    ({"depth": 0}, "--depth 0 is out of range"),
    ({"format": True, "image": "i"}, "would destroy"),
])
def test_what_add_refuses_is_refused(etc: Path, values: dict[str, Any], message: str) -> None:
    configure(etc, **values)
    assert message in (found := refused(etc))
    assert f"config {etc}/vm1.json" in found


def test_no_configuration(etc: Path) -> None:
    assert refused(etc) == f"config {etc}/vm1.json: No such file or directory"
    assert "cannot be a name" in refused(etc, "../vm1")


def test_a_disk_is_added(etc: Path, runs: list[tuple[DeviceOptions, bool]]) -> None:
    configure(etc)
    leave(etc / "other.base", name="vm2")
    assert unit.serve("vm1", str(etc)) == 0
    assert [(options.name, recover) for options, recover in runs] == [("vm1", False)]


@pytest.mark.parametrize(("content", "counts"), [(b"", 4096), (b"BDEV_UBI\0 and more", None)])
def test_the_size_counts_when_the_disk_is_made(
    etc: Path, runs: list[tuple[DeviceOptions, bool]], content: bytes, counts: int | None,
) -> None:
    """One that has grown since then is back after a reboot."""
    configure(etc, size=4096)
    (etc / "vm1.base").write_bytes(content)
    assert unit.serve("vm1", str(etc)) == 0
    assert [options.size for options, _ in runs] == [counts]


def test_one_that_waits_is_taken_over_as_it_was_made(
    etc: Path, runs: list[tuple[DeviceOptions, bool]],
) -> None:
    configure(etc, cache="unsafe")
    leave(etc / "vm1.base", cache="writethrough", force_stale=True)
    assert unit.serve("vm1", str(etc)) == 0
    assert runs == [(DeviceOptions(
        base=str(etc / "vm1.base"), name="vm1", cache="writethrough", hydrate=True,
    ), True)]


def test_one_that_does_not_wait_is_added_anew(
    etc: Path, runs: list[tuple[DeviceOptions, bool]],
) -> None:
    configure(etc)
    leave(etc / "vm1.base", recoverable=False)
    assert unit.serve("vm1", str(etc)) == 0
    assert [recover for _, recover in runs] == [False]


def test_one_that_is_gone_from_the_kernel_is_added_anew(
    etc: Path, runs: list[tuple[DeviceOptions, bool]], capfd: pytest.CaptureFixture[str],
) -> None:
    configure(etc)
    leave(etc / "vm1.base", id=99)
    assert unit.serve("vm1", str(etc)) == 0
    assert [recover for _, recover in runs] == [True, False]
    assert "its disk is gone" in capfd.readouterr().err


def test_one_that_cannot_be_taken_over_yet_is_not_touched(
    etc: Path, runs: list[tuple[DeviceOptions, bool]],
) -> None:
    configure(etc)
    leave(etc / "vm1.base", id=98)
    with pytest.raises(UbiError, match="its base is busy"):
        unit.serve("vm1", str(etc))
    assert [recover for _, recover in runs] == [True]


def test_one_on_another_base_is_not_this_one(
    etc: Path, runs: list[tuple[DeviceOptions, bool]],
) -> None:
    configure(etc)
    leave(etc / "other.base")
    with pytest.raises(UbiError, match=r"a disk on .*/other\.base waits under this name") as error:
        unit.serve("vm1", str(etc))
    assert error.value.code == Exit.BUSY
    assert runs == []


def test_the_process(
    etc: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(unit, "CONFIG_FOLDER", str(etc))
    monkeypatch.setattr(unit.serve, "__defaults__", (str(etc),))
    assert unit.main([]) == Exit.USAGE
    assert unit.main(["vm1"]) == Exit.USAGE
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[1].endswith(f"config {etc}/vm1.json: No such file or directory")


def test_a_state_tells_its_unit(etc: Path) -> None:
    leave(etc / "vm1.base")
    (device,) = runtime.all_devices()
    assert device.state is not None
    assert device.state.unit == "ublk-ubi@vm1.service"
    assert msgspec.json.decode(
        (etc / "run/vm1/state.json").read_bytes(),
    )["unit"] == "ublk-ubi@vm1.service"
