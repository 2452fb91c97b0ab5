"""`ublk-ubi spdk`: what is printed for SPDK, attached to it, found there, and taken away again."""

from __future__ import annotations

import json
import os
import signal
import socket
from typing import TYPE_CHECKING, Any

from spdk.rpc import config as spdk_config
from spdk.rpc.client import JSONRPCClient
from unit.cli.kit import inline, is_one_line
from unit.serve.kit import GIB, until

from ublk_ubi import links, runtime
from ublk_ubi import spdk as under_spdk
from ublk_ubi.errors import Exit, UbiError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest
    from spdkpeer import Spdk

    from ublk_ubi.runtime import Device

    Add = Callable[..., Device]


def refused(*words: str, code: int = Exit.FAILED) -> str:
    found = inline(*words)
    assert (found.code, found.out) == (code, ""), found
    assert is_one_line(found.err), found
    return found.err


def attach(spdk: Spdk, *words: str) -> str:
    found = inline("spdk", "attach", *words, "--socket", spdk.socket)
    assert (found.code, found.err) == (0, ""), found
    return found.out.strip()


def connect(path: str) -> socket.socket:
    """A VMM that connects to a controller."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    return sock


# config --------------------------------------------------------------------------------------


def test_config(add: Add) -> None:
    add("vm1")
    found = inline("spdk", "config", "vm1", "--vhost", "vhost.0", "--cpumask", "0x1")
    assert (found.code, found.err) == (0, "")
    assert json.loads(found.out) == {"subsystems": [
        {"subsystem": "bdev", "config": [{"method": "bdev_uring_create", "params": {
            "name": "vm1", "filename": links.link_path("vm1")}}]},
        {"subsystem": "vhost_blk", "config": [{"method": "vhost_create_blk_controller", "params": {
            "ctrlr": "vhost.0", "dev_name": "vm1", "cpumask": "0x1"}}]},
    ]}


def test_config_is_what_spdk_loads(add: Add, spdk: Spdk, tmp_path: Path) -> None:
    add("vm1")
    add("vm2", cache="unsafe")
    add("vm3", cache="writeback")
    words = inline("spdk", "config", "vm1", "vm2", "--vhost", "vhost.1", "--vhost", "vhost.2").out
    (tmp_path / "one.json").write_text(words)
    (tmp_path / "two.json").write_text(inline("spdk", "config", "vm3", "--bdev", "aio",
                                              "--fallocate").out)
    with JSONRPCClient(spdk.socket) as client:
        for name in ("one.json", "two.json"):
            spdk_config.load_config(client, str(tmp_path / name))
    assert set(spdk.bdevs()) == {"vm1", "vm2", "vm3"}
    assert spdk.bdevs()["vm3"]["driver_specific"]["aio"]["fallocate"] is True
    assert {name: one["backend_specific"]["block"]["bdev"]
            for name, one in spdk.controllers().items()} == {"vhost.1": "vm1", "vhost.2": "vm2"}
    # … and what SPDK says of it fits what `attach` would have made.
    assert attach(spdk, "vm1", "--vhost", "vhost.1") == spdk.controllers()["vhost.1"]["socket"]


def test_a_uring_bdev_must_not_be_on_a_writeback_disk(add: Add) -> None:
    add(cache="writeback")
    for words in ("config vm1", "attach vm1 --socket /nope"):
        reason = refused("spdk", *words.split())
        assert "vm1 is a writeback disk, and SPDK's uring bdev never passes a flush" in reason
        assert "use --bdev aio, which does, or add the disk with --cache writethrough" in reason


WRONG = (
    ("config", "missing argument 'NAME...'"),
    ("config nope", "no device 'nope'"),
    ("config vm1 vm1 --vhost a", "1 --vhost for 2 disks: give one for each, or none"),
    ("config vm1 vm1 --vhost a --vhost a", "the same --vhost twice"),
    ("config vm1 --bdev nvme", "'nvme' is not one of 'uring', 'aio'"),
    ("config vm1 --fallocate", "--fallocate is of SPDK's aio bdev"),
    ("config vm1 --cpumask 0x1", "--cpumask is of a controller: give --vhost"),
    ("config vm1 --vhost a --cpumask x", "--cpumask 'x': write it like 0x3 or [0,1]"),
    ("config vm1 --vhost a/b", "--vhost 'a/b' is not a name"),
    ("attach vm1 --vhost ../x", "--vhost '../x' is not a name"),
    ("attach", "missing argument 'NAME'"),
    ("detach vm1 --timeout 0", "0 is out of range: 0.1 to 3600 seconds"),
)


def test_wrong_usage(add: Add) -> None:
    add()
    for words, reason in WRONG:
        code = Exit.NO_DEVICE if "nope" in words else Exit.USAGE
        assert reason in refused("spdk", *words.split(), code=code), words


# attach, status, detach ----------------------------------------------------------------------


def test_attach_status_detach(add: Add, spdk: Spdk) -> None:
    device = add()
    path = attach(spdk, "vm1", "--vhost", "vhost.0", "--cpumask", "0x1")
    assert path == spdk.controllers()["vhost.0"]["socket"]
    bdev = spdk.bdevs()["vm1"]
    assert bdev["driver_specific"]["uring"]["filename"] == links.link_path("vm1")
    assert bdev["num_blocks"] * bdev["block_size"] == 5 * GIB
    # Said again it changes nothing, whatever is left out.
    again = inline("spdk", "attach", "vm1", "--json")
    assert json.loads(again.out) == {
        "schema": 1, "name": "vm1", "socket": spdk.socket, "bdev": "vm1", "kind": "uring",
        "vhost": "vhost.0", "vhost_socket": path, "made": False,
    }
    rows = [line.split() for line in inline("spdk", "status").out.splitlines()]
    assert rows[1] == ["vm1", "uring", "vm1", "vhost.0", path, "0", "ok"]
    found = inline("spdk", "status", "vm1", "--json")
    assert (found.code, json.loads(found.out)["sessions"]) == (0, 0)
    assert inline("spdk", "detach", "vm1").out == "vm1 detached\n"
    assert (spdk.bdevs(), spdk.controllers()) == ({}, {})
    assert under_spdk.attachment_of(device) is None
    assert "vm1 is not attached to SPDK" in refused("spdk", "detach", "vm1")
    assert "vm1 is not attached" in refused("spdk", "status", "vm1")
    assert inline("spdk", "status").out.startswith("no disk is attached")


def test_attach_again_after_spdk_restarted(add: Add, spdk: Spdk) -> None:
    add()
    before = attach(spdk, "vm1", "--vhost", "vhost.0")
    spdk.kill()
    found = inline("spdk", "status", "vm1", "--json")
    assert found.code == Exit.DEGRADED
    assert "SPDK does not answer" in json.loads(found.out)["problem"]
    spdk.start()
    found = inline("spdk", "status")
    assert (found.code, "missing" in found.out) == (Exit.DEGRADED, True)
    assert "SPDK has no bdev vm1: `ublk-ubi spdk attach vm1` makes it anew" in found.err
    assert inline("spdk", "attach", "vm1").out.strip() == before
    assert inline("spdk", "status").code == 0
    # A controller whose bdev went is made anew as well.
    spdk.call("bdev_uring_delete", name="vm1")
    assert inline("spdk", "status").code == Exit.DEGRADED
    assert inline("spdk", "attach", "vm1").out.strip() == before
    assert spdk.controllers()["vhost.0"]["backend_specific"]["block"]["bdev"] == "vm1"


def test_a_connected_vm_keeps_its_disk(add: Add, spdk: Spdk) -> None:
    add()
    path = attach(spdk, "vm1", "--vhost", "vhost.0")
    with connect(path):
        until(lambda: spdk.controllers()["vhost.0"]["sessions"], "it is connected")
        assert json.loads(inline("spdk", "status", "vm1", "--json").out)["sessions"] == 1
        words = refused("spdk", "detach", "vm1", code=Exit.BUSY)
        assert f"a VM is connected to vhost.0 ({path}): end it first, or" in words
        assert set(spdk.bdevs()) == {"vm1"}
        assert inline("spdk", "detach", "vm1", "--force").code == 0
        assert spdk.bdevs() == {}
        # SPDK keeps the controller for the VM, and would keep who asks to delete it waiting.
        words = refused("spdk", "attach", "vm1", "--socket", spdk.socket, "--vhost", "vhost.0",
                        code=Exit.BUSY)
        assert f"a VM whose disk was taken away is still connected to vhost.0 ({path})" in words
        assert spdk.bdevs() == {}
    until(lambda: not spdk.controllers()["vhost.0"]["sessions"], "it has left")
    assert attach(spdk, "vm1", "--vhost", "vhost.0") == path
    # So does one whose controller is another's doing.
    assert inline("spdk", "detach", "vm1").code == 0
    attach(spdk, "vm1")
    spdk.call("vhost_create_blk_controller", ctrlr="theirs", dev_name="vm1")
    path = spdk.controllers()["theirs"]["socket"]
    with connect(path):
        until(lambda: spdk.controllers()["theirs"]["sessions"], "it is connected")
        rows = [line.split() for line in inline("spdk", "status").out.splitlines()]
        assert rows[1] == ["vm1", "uring", "vm1", "theirs", path, "1", "ok"]
        words = refused("spdk", "detach", "vm1", code=Exit.BUSY)
        assert f"a VM is connected to theirs ({path})" in words
    until(lambda: not spdk.controllers()["theirs"]["sessions"], "it has left")
    assert inline("spdk", "detach", "vm1").code == 0
    assert set(spdk.controllers()) == {"theirs"}


def test_what_is_in_the_way(add: Add, spdk: Spdk, tmp_path: Path) -> None:
    device = add("vm1")
    with open(tmp_path / "other", "wb") as file:
        file.truncate(GIB)
    spdk.call("bdev_aio_create", name="vm1", filename=str(tmp_path / "other"), block_size=512)
    words = refused("spdk", "attach", "vm1", "--socket", spdk.socket, code=Exit.BUSY)
    assert "has a bdev vm1 of another kind, not a uring bdev of" in words
    spdk.call("bdev_aio_delete", name="vm1")
    spdk.call("bdev_aio_create", name="other", filename=str(tmp_path / "other"), block_size=512)
    spdk.call("vhost_create_blk_controller", ctrlr="vhost.0", dev_name="other")
    words = refused("spdk", "attach", "vm1", "--socket", spdk.socket, "--vhost", "vhost.0",
                    code=Exit.BUSY)
    assert "has a controller vhost.0 of other, not of vm1: give another --vhost" in words
    # Nothing half-made: neither there nor here.
    assert set(spdk.bdevs()) == {"other"}
    assert under_spdk.attachment_of(device) is None
    # Attached one way, it is not attached another way on top.
    attach(spdk, "vm1")
    words = refused("spdk", "attach", "vm1", "--bdev", "aio", code=Exit.BUSY)
    assert "vm1 is attached otherwise (uring bdev vm1 of" in words
    # Its bdev's name went to another one.
    spdk.call("bdev_uring_delete", name="vm1")
    spdk.call("bdev_uring_create", name="vm1", filename=str(tmp_path / "other"),
              block_size=512)
    found = inline("spdk", "status")
    assert (found.code, "missing" in found.out) == (Exit.DEGRADED, True)
    assert f"has a bdev vm1 of {tmp_path / 'other'}, not a uring bdev of" in found.err


def test_what_has_taken_its_name_stays(add: Add, spdk: Spdk, tmp_path: Path) -> None:
    """After SPDK restarted, bdev and controller of these names are another disk's."""
    with open(tmp_path / "other", "wb") as file:
        file.truncate(GIB)
    device = add()
    attach(spdk, "vm1", "--vhost", "vhost.0")
    spdk.kill()
    spdk.start()
    for name in ("vm1", "other"):
        spdk.call("bdev_uring_create", name=name, filename=str(tmp_path / "other"), block_size=512)
    spdk.call("vhost_create_blk_controller", ctrlr="vhost.0", dev_name="other")
    assert inline("spdk", "detach", "vm1").code == 0
    assert set(spdk.bdevs()) == {"vm1", "other"}
    assert set(spdk.controllers()) == {"vhost.0"}
    assert under_spdk.attachment_of(device) is None


def test_an_attachment_that_cannot_be_noted_is_none(
    add: Add, spdk: Spdk, monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object) -> None:
        raise UbiError("no room")

    add()
    monkeypatch.setattr(under_spdk, "_remember", fails)
    assert "no room" in refused("spdk", "attach", "vm1", "--socket", spdk.socket, "--vhost", "v")
    assert (spdk.bdevs(), spdk.controllers()) == ({}, {})


def test_whose_socket_it_is(spdk: Spdk, tmp_path: Path) -> None:
    assert spdk.process is not None
    assert under_spdk.process_of(spdk.socket) == spdk.process.pid
    assert under_spdk.process_of(str(tmp_path / "nope")) is None


def test_no_spdk(add: Add, tmp_path: Path, spdk: Spdk) -> None:
    device = add()
    words = refused("spdk", "attach", "vm1", "--socket", str(tmp_path / "nope"))
    assert "no daemon listens there; is it running, with -r" in words
    assert under_spdk.attachment_of(device) is None
    assert spdk.process is not None
    spdk.process.send_signal(signal.SIGSTOP)
    words = refused("spdk", "attach", "vm1", "--socket", spdk.socket, "--timeout", "0.3",
                    code=Exit.TIMED_OUT)
    assert "no answer to 'bdev_get_bdevs' within 0.3 s" in words
    spdk.process.send_signal(signal.SIGCONT)
    # One that ended took its bdevs along: there is nothing to take away.
    attach(spdk, "vm1")
    spdk.kill()
    assert inline("spdk", "detach", "vm1").out == "vm1 detached\n"


def test_a_damaged_record_is_named(add: Add) -> None:
    device = add()
    with open(os.path.join(device.folder, "spdk.json"), "w") as file:
        file.write("{")
    assert "spdk.json is damaged" in refused("spdk", "detach", "vm1")


def test_a_new_size_is_told(add: Add, spdk: Spdk) -> None:
    device = add()
    assert under_spdk.rescan(device) is False
    attach(spdk, "vm1")
    os.truncate(links.link_path("vm1"), 6 * GIB)
    assert under_spdk.rescan(device) is True
    bdev = spdk.bdevs()["vm1"]
    assert bdev["num_blocks"] * bdev["block_size"] == 6 * GIB


def test_a_disk_that_is_taken_away_by_force_is_taken_from_spdk(add: Add, spdk: Spdk) -> None:
    add()
    attach(spdk, "vm1")
    assert inline("del", "vm1", "--force").code == 0
    assert spdk.bdevs() == {}
    assert runtime.all_devices() == []


# serve --spdk --------------------------------------------------------------------------------


def configuration(served: Any) -> str:
    config = {"subsystems": [
        {"subsystem": "bdev", "config": [
            {"method": "bdev_aio_create", "params": {
                "name": "aio0", "block_size": 512, "filename": served.base("vm")}},
            {"method": "bdev_ubi_create", "params": {
                "name": "ubi0", "base_bdev": "aio0", "image_path": f"{served.folder}/normal",
                "stripe_size_kb": 1024}},
        ]},
        {"subsystem": "vhost_blk", "config": [
            {"method": "vhost_create_blk_controller", "params": {
                "ctrlr": "vhost.0", "dev_name": "ubi0", "cpumask": "1", "readonly": False,
                "transport": "vhost_user_blk"}},
        ]},
    ]}
    (served.folder / "spdk_conf.json").write_text(json.dumps(config))
    return "spdk_conf.json"


def test_serve_for_spdk(served: Any, spdk: Spdk) -> None:
    served.start("--json", configuration(served), "--spdk", spdk.socket)
    link = str(served.folder / "dev/ublk-ubi/ubi0")
    assert spdk.bdevs()["ubi0"]["driver_specific"]["uring"]["filename"] == link
    (controller,) = served.call("vhost_get_controllers")
    assert controller == spdk.controllers()["vhost.0"]
    assert controller["backend_specific"]["block"]["bdev"] == "ubi0"
    assert "vhost_create_blk_controller" in served.call("rpc_get_methods")
    found = json.loads(inline("spdk", "status", "ubi0", "--json").out)
    assert (found["vhost"], found["vhost_socket"]) == ("vhost.0", controller["socket"])
    # SPDK's errors come as they are.
    code, words = served.refused("vhost_create_blk_controller", ctrlr="v", dev_name="nope")
    assert (code, "No such device" in words) == (-32602, True)
    saved = served.call("save_config")
    assert [entry["subsystem"] for entry in saved["subsystems"]] == ["bdev", "vhost_blk"]
    # A disk that flushes gets a bdev that does.
    served.call("bdev_ubi_create", **served.disk(name="vm2", cache="writeback"))
    assert spdk.bdevs()["vm2"]["driver_specific"]["aio"]["filename"].endswith("/vm2")
    # SPDK restarts, and has it all again.
    spdk.kill()
    until(lambda: "has ended" in served.log, "that SPDK has ended is seen")
    spdk.start()
    until(lambda: "SPDK has this controller again" in served.log, "SPDK has it again")
    assert set(spdk.bdevs()) == {"ubi0", "vm2"}
    assert set(spdk.controllers()) == {"vhost.0"}
    # So it is after both have.
    served.kill()
    spdk.kill()
    spdk.start()
    served.start("--spdk", spdk.socket)
    until(lambda: set(spdk.controllers()) == {"vhost.0"}, "SPDK has it again")
    assert served.call("save_config") == saved | {"subsystems": [
        served.call("save_config")["subsystems"][0], saved["subsystems"][1]]}
    assert served.call("vhost_delete_controller", ctrlr="vhost.0") is True
    # One that is left behind by its disk serves nothing, and is not saved.
    served.call("vhost_create_blk_controller", ctrlr="vhost.2", dev_name="vm2")
    for name in ("ubi0", "vm2"):
        assert served.call("bdev_ubi_delete", name=name) is True
    assert [entry["subsystem"] for entry in served.call("save_config")["subsystems"]] == ["bdev"]
    assert served.call("vhost_delete_controller", ctrlr="vhost.2") is True
    assert (spdk.bdevs(), spdk.controllers()) == ({}, {})
    assert runtime.all_devices() == []


def test_a_disk_that_spdk_does_not_take_is_not_made(served: Any, spdk: Spdk) -> None:
    served.start("--spdk", spdk.socket)
    with open(served.folder / "other", "wb") as file:
        file.truncate(GIB)
    spdk.call("bdev_aio_create", name="ubi0", filename=str(served.folder / "other"),
              block_size=512)
    disk = served.disk()
    code, words = served.refused("bdev_ubi_create", **disk)
    assert (code, "has a bdev ubi0 of another kind" in words) == (-16, True)
    assert runtime.all_devices() == []
    spdk.call("bdev_aio_delete", name="ubi0")
    spdk.kill()
    assert "SPDK does not answer" in served.refused("bdev_ubi_create", **disk)[1]
    assert runtime.all_devices() == []
    spdk.start()
    assert served.call("bdev_ubi_create", **disk) == "ubi0"


def test_a_disk_grows_while_spdk_is_away(served: Any, spdk: Spdk) -> None:
    served.start("--spdk", spdk.socket)
    assert served.call("bdev_ubi_create", **served.disk()) == "ubi0"
    spdk.kill()
    grown = served.call("bdev_ubi_resize", name="ubi0", size=6 * GIB)
    assert grown == {"name": "ubi0", "size": 6 * GIB, "rescanned": False}
    assert "ubi0: has grown, and SPDK does not know: SPDK does not answer" in served.log
    spdk.start()
    until(lambda: "SPDK has its bdev again" in served.log, "SPDK has it again")
    bdev = spdk.bdevs()["ubi0"]
    assert bdev["num_blocks"] * bdev["block_size"] == 6 * GIB


def test_a_configuration_is_loaded_again(served: Any, spdk: Spdk) -> None:
    """By a server that ended, or had no SPDK; what SPDK has kept of a disk that went is no bar."""
    config = configuration(served)
    served.start("--json", config)
    assert spdk.bdevs() == {}
    assert served.stop() == 0
    served.start("--json", config, "--spdk", spdk.socket)
    assert "ubi0: runs already" in served.log
    assert spdk.controllers()["vhost.0"]["backend_specific"]["block"]["bdev"] == "ubi0"
    assert served.call("bdev_ubi_delete", name="ubi0") is True
    assert spdk.controllers()["vhost.0"]["backend_specific"]["block"]["bdev"] is None
    assert served.stop() == 0
    served.start("--json", config, "--spdk", spdk.socket)
    assert spdk.controllers()["vhost.0"]["backend_specific"]["block"]["bdev"] == "ubi0"


def test_a_configuration_that_fails_leaves_nothing_in_spdk(served: Any, spdk: Spdk) -> None:
    with open(served.folder / "other", "wb") as file:
        file.truncate(GIB)
    spdk.call("bdev_aio_create", name="theirs", filename=str(served.folder / "other"),
              block_size=512)
    spdk.call("vhost_create_blk_controller", ctrlr="vhost.1", dev_name="theirs")
    config = json.loads((served.folder / configuration(served)).read_text())
    config["subsystems"][1]["config"].append(
        {"method": "vhost_create_blk_controller", "params": {"ctrlr": "vhost.1",
                                                             "dev_name": "ubi0"}})
    (served.folder / "spdk_conf.json").write_text(json.dumps(config))
    served.begin("--json", "spdk_conf.json", "--spdk", spdk.socket)
    code, words = served.outcome()
    assert (code, "SPDK has a controller vhost.1 of theirs, not of ubi0" in words) == (5, True)
    assert (set(spdk.bdevs()), set(spdk.controllers())) == ({"theirs"}, {"vhost.1"})
    assert runtime.all_devices() == []


def test_a_disk_that_is_refused_to_be_deleted_stays_in_spdk(served: Any, spdk: Spdk) -> None:
    served.start("--spdk", spdk.socket)
    served.call("bdev_ubi_create", **served.disk("busy"))
    served.call("vhost_create_blk_controller", ctrlr="vhost.0", dev_name="ubi0")
    assert served.refused("bdev_ubi_delete", name="ubi0")[0] == -16
    assert set(spdk.bdevs()) == {"ubi0"}
    assert spdk.controllers()["vhost.0"]["backend_specific"]["block"]["bdev"] == "ubi0"
    assert inline("spdk", "status", "ubi0").code == 0


def test_a_dead_disk_is_given_to_spdk_when_it_lives(served: Any, spdk: Spdk) -> None:
    served.start("--spdk", spdk.socket)
    served.call("bdev_ubi_create", **served.disk())
    served.call("vhost_create_blk_controller", ctrlr="vhost.0", dev_name="ubi0")
    spdk.kill()
    until(lambda: "has ended" in served.log, "that SPDK has ended is seen")
    device = runtime.find("ubi0")
    assert device is not None and device.pid is not None
    os.kill(device.pid, signal.SIGKILL)
    spdk.start()
    until(lambda: "ubi0: is not live" in served.log, "that it cannot be had is told")
    served.call("bdev_ubi_recover", name="ubi0")
    until(lambda: "SPDK has this controller again" in served.log, "SPDK has it again")
    assert spdk.controllers()["vhost.0"]["backend_specific"]["block"]["bdev"] == "ubi0"
    assert served.log.count("is not live") == 1


def test_spdk_may_come_later(served: Any, spdk: Spdk) -> None:
    spdk.kill()
    served.begin("--json", configuration(served), "--spdk", spdk.socket)
    until(lambda: "is not there: waiting for it" in served.log, "it waits")
    spdk.start()
    until(lambda: served.ready, "it is ready")
    assert set(spdk.controllers()) == {"vhost.0"}
