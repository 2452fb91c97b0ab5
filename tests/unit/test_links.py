"""Stable links, and finding a device by whatever a user calls it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from ublk_ubi import links, runtime
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.runtime import State

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def dev(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UBLK_UBI_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("UBLK_UBI_DEV", str(tmp_path / "dev"))
    (tmp_path / "dev").mkdir()
    return tmp_path / "dev"


@pytest.fixture
def device(dev: Path):
    """Make a claimed device with an id and its link."""

    def make(name: str, dev_id: int) -> runtime.Claim:
        claim = runtime.claim(name)
        (dev / f"ublkb{dev_id}").touch()
        link = links.publish_link(name, dev_id)
        claim.write_state(State(image="/i", base="/b", id=dev_id, link=link))
        return claim

    return make


# links ---------------------------------------------------------------------------------------


def test_publish_replace_remove(dev: Path) -> None:
    link = links.publish_link("vm", 3)
    assert link == str(dev / "ublk-ubi/vm")
    assert os.readlink(link) == str(dev / "ublkb3")
    links.publish_link("vm", 4)
    assert os.readlink(link) == str(dev / "ublkb4")
    assert not links.remove_link("vm", 3)
    assert os.path.islink(link)
    assert links.remove_link("vm", 4)
    assert not links.remove_link("vm", 4)
    assert os.listdir(dev / "ublk-ubi") == []
    assert (dev / "ublk-ubi").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("next_step", ["publish", "remove"])
def test_what_a_daemon_left_that_died_on_the_way_goes(
    dev: Path, monkeypatch: pytest.MonkeyPatch, next_step: str,
) -> None:
    def die(*_names: str, **_folders: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            links.publish_link("vm", 3)
    assert os.listdir(dev / "ublk-ubi") != []
    if next_step == "publish":
        links.publish_link("vm", 4)
        assert os.listdir(dev / "ublk-ubi") == ["vm"]
    else:
        assert not links.remove_link("vm", 3)
        assert os.listdir(dev / "ublk-ubi") == []


@pytest.mark.parametrize(
    "make",
    [
        lambda p: p.write_text(""),
        lambda p: p.mkdir(),
        lambda p: p.symlink_to("/dev/sda"),
        lambda p: p.symlink_to("ublkb3x"),
        os.mkfifo,
    ],
)
def test_what_is_not_ours_stays(dev: Path, make) -> None:
    (dev / "ublk-ubi").mkdir()
    path = dev / "ublk-ubi/vm"
    make(path)
    before = path.lstat()
    with pytest.raises(UbiError, match="is in the way"):
        links.publish_link("vm", 3)
    assert not links.remove_link("vm", 3)
    assert path.lstat() == before


def test_a_link_in_the_folders_place_is_not_followed(dev: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (dev / "ublk-ubi").symlink_to(tmp_path / "other")
    with pytest.raises(UbiError, match="is in the way"):
        links.publish_link("vm", 3)
    assert not links.remove_link("vm", 3)
    assert os.listdir(tmp_path / "other") == []


# resolving -----------------------------------------------------------------------------------


def test_by_each_of_its_names(device, dev: Path, tmp_path: Path, monkeypatch) -> None:
    device("vm", 3)
    device("vm2", 0)
    elsewhere = tmp_path / "disk"
    elsewhere.symlink_to(dev / "ublk-ubi/vm")
    monkeypatch.chdir(dev)
    for target in ("vm", dev / "ublkb3", dev / "ublk-ubi/vm", elsewhere, "./ublkb3",
                   f"{dev}//ublk-ubi/../ublk-ubi/vm"):
        assert links.resolve(str(target)).name == "vm"


def test_the_link_of_a_dead_device_leads_to_it(device, dev: Path) -> None:
    device("vm", 3).abandon()
    (dev / "ublkb3").unlink()
    assert links.resolve(str(dev / "ublk-ubi/vm")).name == "vm"
    assert links.resolve(str(dev / "ublkb3")).name == "vm"
    (dev / "ublk-ubi/vm").unlink()
    assert links.resolve(str(dev / "ublk-ubi/vm")).name == "vm"


def test_a_reused_id_belongs_to_the_living(device, dev: Path) -> None:
    device("old", 3).abandon()
    device("older", 3).abandon()
    with pytest.raises(UbiError, match="was the device of each of old, older"):
        links.resolve(str(dev / "ublkb3"))
    device("new", 3)
    assert links.resolve(str(dev / "ublkb3")).name == "new"


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("nope", "no device 'nope': there is vm, vm2"),
        ("", "no device ''"),
        ("vm/", "no device 'vm/'"),
        ("/dev/null", "no device '/dev/null'"),
        ("{dev}/ublkb4", "no device"),
        ("{dev}/ublkb3p1", "is a partition: name its disk"),
        ("{dev}/ublk-ubi/nope", "no device"),
        ("{dev}/ublk-ubi", "no device"),
        ("vm\0", "no device"),
        ("/\0", "no device"),
        ("/" + "a" * 5000, "no device"),
    ],
)
def test_what_is_no_device(device, dev: Path, target: str, words: str) -> None:
    device("vm", 3)
    device("vm2", 0)
    (dev / "ublkb3p1").touch()
    with pytest.raises(UbiError) as caught:
        links.resolve(target.replace("{dev}", str(dev)))
    assert words in caught.value.message
    assert caught.value.code == Exit.NO_DEVICE


def test_loops_of_links_are_no_device(dev: Path) -> None:
    (dev / "a").symlink_to(dev / "b")
    (dev / "b").symlink_to(dev / "a")
    with pytest.raises(UbiError, match="there are none"):
        links.resolve(str(dev / "a"))


def test_a_long_list_is_cut() -> None:
    for number in range(30):
        runtime.claim(f"d{number}").abandon()
    with pytest.raises(UbiError, match=r"d9 and 20 more") as caught:
        links.resolve("x")
    assert len(caught.value.message) < 120
