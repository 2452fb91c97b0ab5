"""The calls, by SPDK's own client and command line; bdev_ubi's request and configuration."""

from __future__ import annotations

import json
import os
import re
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from unit.serve.bdev_ubi import CONFIGURATION, REQUEST
from unit.serve.kit import GIB, answer, raw, until

from ublk_ubi import runtime

if TYPE_CHECKING:
    from pathlib import Path

    from unit.serve.kit import Served

@pytest.fixture
def seed(tmp_path: Path) -> str:
    """bdev_ubi's configuration in its folder, with what it names; the file's path."""
    (tmp_path / "write-space").touch()
    os.truncate(tmp_path / "write-space", 5 * GIB)
    (tmp_path / "spdk_conf.json").write_text(json.dumps(CONFIGURATION))
    return str(tmp_path / "spdk_conf.json")


# what bdev_ubi's users have ------------------------------------------------------------------


def test_the_request_of_the_readme(served: Served) -> None:
    served.start()
    served.call("bdev_aio_create", name="aio0", filename=served.base("vm"), block_size=512)
    found = answer(raw(served.path, REQUEST.encode()))
    assert found == {"jsonrpc": "2.0", "id": 1, "result": "ubi0"}
    assert served.options("ubi0") == {
        "name": "ubi0", "base": served.base("vm"), "image": "/opt/images/large-image.raw",
        "stripe_size": 1 << 20, "block_size": 512, "cache": "writethrough",
    }


def test_the_configuration_of_the_examples(served: Served, seed: str) -> None:
    served.start("--json", seed)
    aio0, ubi0 = json.loads(served.rpc_py("bdev_get_bdevs"))
    assert (aio0["name"], aio0["product_name"], aio0["claimed"]) == ("aio0", "AIO disk", True)
    assert (ubi0["name"], ubi0["product_name"]) == ("ubi0", "Ubi disk")
    assert ubi0["num_blocks"] * ubi0["block_size"] == 5 * GIB
    assert ubi0["driver_specific"]["ubi"]["link"] == str(served.folder / "dev/ublk-ubi/ubi0")
    options = served.options("ubi0")
    assert options["image"] == str(served.folder / "jammy.raw")
    assert options["copy_on_read"] is False
    assert "vhost_create_blk_controller is SPDK's to do" in served.log


def test_what_is_saved_can_be_loaded(served: Served, seed: str) -> None:
    served.start("--json", seed)
    served.call("bdev_ubi_create", **served.disk(name="vm1", no_sync=True, hydrate=True, depth=8))
    saved = served.rpc_py("save_config")
    assert json.loads(saved)["subsystems"][0] == served.call("save_config")["subsystems"][0]
    before = served.call("bdev_get_bdevs")
    for name in ("ubi0", "vm1"):
        served.call("bdev_ubi_delete", name=name)
    for name in ("aio0", "on-vm1"):
        served.call("bdev_aio_delete", name=name)
    assert served.names() == []
    assert served.stop() == 0
    saved_path = served.folder / "elsewhere" / "saved.json"
    saved_path.parent.mkdir()
    saved_path.write_text(saved)
    served.start("--json", str(saved_path))
    assert [bdev["name"] for bdev in served.call("bdev_get_bdevs")] == [b["name"] for b in before]
    assert served.rpc_py("save_config") == saved
    # SPDK's own way to load it: by calls.
    for name in ("on-vm1", "aio0"):
        served.call("bdev_aio_delete", name=name)
    served.rpc_py("load_config", "-j", saved)
    assert json.loads(served.rpc_py("save_config")) == json.loads(saved)


# SPDK's client -------------------------------------------------------------------------------


def test_what_the_client_asks_of_any_spdk(served: Served) -> None:
    served.start()
    methods = json.loads(served.rpc_py("rpc_get_methods"))
    assert {"bdev_ubi_create", "bdev_ubi_delete", "bdev_aio_create", "bdev_uring_create",
            "bdev_get_bdevs", "save_config", "bdev_ubi_status"} <= set(methods)
    assert not any(method.startswith("vhost_") for method in methods)
    served.rpc_py("rpc_get_methods", "--current", "--include-aliases")
    assert json.loads(served.rpc_py("spdk_get_version"))["version"] == "ublk-ubi v0.1.0"
    served.rpc_py("framework_wait_init")
    assert [s["subsystem"] for s in json.loads(served.rpc_py("framework_get_subsystems"))] == [
        "bdev", "vhost_blk"]
    assert json.loads(served.rpc_py("framework_get_config", "bdev")) == []
    path = served.base("a")
    assert served.rpc_py("bdev_aio_create", path, "aio0", "4096").strip() == "aio0"
    assert served.rpc_py("bdev_uring_create", served.base("b"), "uring0").strip() == "uring0"
    (found,) = json.loads(served.rpc_py("bdev_get_bdevs", "-b", "aio0"))
    assert (found["block_size"], found["num_blocks"]) == (4096, 5 * GIB // 4096)
    served.rpc_py("bdev_aio_delete", "aio0")
    served.rpc_py("bdev_uring_delete", "uring0")
    assert json.loads(served.rpc_py("bdev_get_bdevs")) == []
    served.rpc_py("spdk_kill_instance", "SIGTERM")
    assert served.outcome()[0] == 0


def test_batches(served: Served) -> None:
    served.start()
    disks = [served.disk(name=f"vm{number}") for number in range(3)]
    with served.client(batch_mode=True) as client:
        for disk in disks:
            client.bdev_ubi_create(**disk)
        client.bdev_get_bdevs(name="nope")
        client.send_batch()
        results, errors = client.handle_batch_response(client.recv())
    assert sorted(results) == ["vm0", "vm1", "vm2"]
    assert [error["code"] for error in errors] == [-19]
    assert answer(raw(served.path, b"[]"))["error"]["code"] == -32600
    many = b"[" + b",".join([b'{"method":"save_config","id":1}'] * 300) + b"]"
    assert "1 to 256 requests, not 300" in answer(raw(served.path, many))["error"]["message"]
    # Notifications get no answer, not even an empty one.
    silent = b'[{"method":"save_config"}]' + b'{"method":"spdk_get_version","id":7}'
    assert answer(raw(served.path, silent))["id"] == 7


def test_a_bdev_that_is_waited_for(served: Served) -> None:
    served.start()
    with served.client() as client:
        client.send("bdev_get_bdevs", {"name": "ubi0", "timeout": 30_000})
        served.call("bdev_ubi_create", **served.disk())
        assert [bdev["name"] for bdev in client.recv()["result"]] == ["ubi0"]
    assert served.refused("bdev_get_bdevs", name="nope", timeout=50)[0] == -19
    # One who waits and leaves is not waited for, and one who waits at the end is told.
    with served.client() as client:
        client.send("bdev_get_bdevs", {"name": "nope", "timeout": 86_400_000})
    with served.client() as client:
        client.send("bdev_get_bdevs", {"name": "nope", "timeout": 86_400_000})
        client.send("spdk_get_version")    # once it is answered, what came before has been read
        assert "version" in client.recv()["result"]
        client.recv_after_end = served.stop()
        assert client.recv()["error"]["message"] == "serve is ending"


# errors --------------------------------------------------------------------------------------


def test_refusals_have_spdk_s_codes(served: Served) -> None:
    served.start()
    served.call("bdev_ubi_create", **served.disk(name="vm1"))
    good = served.disk()
    base = served.base("vm1")
    for code, words, method, params in (
        (-32601, "unknown method 'bdev_malloc_create'", "bdev_malloc_create", {}),
        (-32601, "unknown method 'vhost_get_controllers'", "vhost_get_controllers", {}),
        (-32602, "missing required field `name`", "bdev_ubi_create", {}),
        (-32602, "unknown field `colour`", "bdev_ubi_create", good | {"colour": "red"}),
        (-32602, "Expected `bool`, got `str`", "bdev_ubi_create", good | {"no_sync": "yes"}),
        (-32602, "give one of stripe_size_kb and stripe_size_mb", "bdev_ubi_create",
         good | {"stripe_size_mb": 1}),
        (-32602, "no_sync contradicts cache 'writeback'", "bdev_ubi_create",
         good | {"no_sync": True, "cache": "writeback"}),
        (-32602, "Subsystem 'nvmf' not found", "framework_get_config", {"name": "nvmf"}),
        (-32602, "unknown field `x`", "spdk_get_version", {"x": 1}),
        (-17, "bdev vm1 exists already", "bdev_ubi_create", good | {"name": "vm1"}),
        (-17, "bdev on-vm1 exists already", "bdev_ubi_create", good | {"name": "on-vm1"}),
        (-17, "bdev vm1 exists already", "bdev_aio_create", {"name": "vm1", "filename": base}),
        (-17, "bdev on-vm1 exists", "bdev_uring_create", {"name": "on-vm1", "filename": base}),
        (-19, "no bdev 'nope'", "bdev_ubi_create", good | {"base_bdev": "nope"}),
        (-1, "bdev on-vm1 is claimed by vm1", "bdev_ubi_create", good | {"base_bdev": "on-vm1"}),
        (-22, "use 64K, 128K", "bdev_ubi_create", good | {"stripe_size_kb": 1}),
        (-22, "use 64K, 128K", "bdev_ubi_create", good | {"stripe_size_kb": 215}),
        (-22, "cannot be a name", "bdev_ubi_create", good | {"name": "../x"}),
        (-22, "is empty", "bdev_ubi_create", good | {"image_path": "/refuses"}),
        (-2, "No such file", "bdev_aio_create", {"name": "a", "filename": "/nope/x"}),
        (-22, "neither a file nor a block device", "bdev_aio_create",
         {"name": "a", "filename": "/tmp"}),
        (-22, "block_size 1024 cannot be had", "bdev_aio_create",
         {"name": "a", "filename": base, "block_size": 1024}),
        (-19, "no disk 'nope'", "bdev_ubi_delete", {"name": "nope"}),
        (-19, "no disk 'on-vm1'", "bdev_ubi_delete", {"name": "on-vm1"}),
        (-19, "no bdev 'nope'", "bdev_aio_delete", {"name": "nope"}),
        (-19, "not of bdev_uring_create", "bdev_uring_delete", {"name": "on-vm1"}),
        (-19, "No such device", "bdev_get_bdevs", {"name": "nope"}),
        (-19, "no device 'nope'", "bdev_ubi_status", {"name": "nope"}),
        (-16, "served by process", "bdev_ubi_recover", {"name": "vm1"}),
    ):
        found = served.refused(method, **params)
        assert found[0] == code, (method, params, found)
        assert words in found[1], (method, params, found)
    assert served.names() == ["on-vm1", "on-ubi0", "vm1"]
    # What failed has left nothing: the same can be had now.
    assert served.call("bdev_ubi_create", **good) == "ubi0"


def test_a_disk_that_is_in_use_stays(served: Served) -> None:
    served.start()
    served.call("bdev_ubi_create", **served.disk("busy"))
    assert served.refused("bdev_ubi_delete", name="ubi0") == (-16, "ubi0 is in use: close it first")
    assert served.refused("bdev_aio_delete", name="on-ubi0")[0] == -16
    assert served.names() == ["on-ubi0", "ubi0"]


def test_a_read_only_base(served: Served) -> None:
    served.start()
    served.call("bdev_aio_create", name="aio0", filename=served.base("vm"), readonly=True)
    refused = served.refused("bdev_ubi_create", name="ubi0", base_bdev="aio0", image_path="/i",
                             stripe_size_kb=64)
    assert refused == (-22, "bdev aio0 is read-only: a base is written to")


# what disks are made with --------------------------------------------------------------------


def test_options(served: Served) -> None:
    served.start()
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {"cache": "writethrough", "copy_on_read": None, "image_cache": None}),
        ({"no_sync": True}, {"cache": "unsafe"}),
        ({"cache": "writeback"}, {"cache": None}),  # the default of a disk
        ({"copy_on_read": False, "directio": False},
         {"copy_on_read": False, "image_cache": "page"}),
        ({"hydrate": True, "rate": 1 << 20, "stripe_size_kb": 64, "queues": 2, "depth": 16},
         {"hydrate": True, "rate": 1 << 20, "stripe_size": 65536, "queues": 2, "depth": 16}),
    ]
    for number, (given, expected) in enumerate(cases):
        served.call("bdev_ubi_create", **served.disk(name=f"vm{number}", **given))
        options = served.options(f"vm{number}")
        assert {key: options.get(key) for key in expected} == expected, given


def test_a_disk_of_bdev_ubi_s_is_adopted(served: Served) -> None:
    served.start()
    disk = served.disk()
    with open(served.base("ubi0"), "r+b") as file:
        file.write(b"BDEV_UBI\0" + bytes([0, 0, 1, 0, 0]))
    served.call("bdev_ubi_create", **disk)
    assert served.options("ubi0")["adopt"] is True
    assert "ubi0: adopted a disk of bdev_ubi's" in served.log


def test_asking_and_steering(served: Served) -> None:
    served.start()
    served.call("bdev_ubi_create", **served.disk("copies"))
    found = served.call("bdev_ubi_status", name="ubi0")
    assert (found["schema"], found["state"], found["stripes"]["hydrated"]) == (1, "live", 1000)
    assert [one["name"] for one in served.call("bdev_ubi_status")] == ["ubi0"]
    code, words = served.refused("bdev_ubi_wait", name="ubi0", timeout_s=10)
    assert (code, "background hydration is off" in words) == (-5, True)
    steered = served.call("bdev_ubi_hydrate", name="ubi0", rate=1 << 20)
    assert (steered["hydration"]["state"], steered["hydration"]["rate"]) == ("running", 1 << 20)
    assert served.call("bdev_ubi_wait", name="ubi0")["independent"] is True
    served.call("bdev_ubi_create", **served.disk("halts", name="vm2"))
    assert served.refused("bdev_ubi_wait", name="vm2", timeout_s=0.1)[0] == -110


def test_waits_that_nobody_waits_for_end(served: Served) -> None:
    served.start()
    served.call("bdev_ubi_create", **served.disk("halts"))
    threads = f"/proc/{served.pid}/task"
    clients = [served.client() for _ in range(40)]  # more than there are places
    for client in clients:
        client.send("bdev_ubi_wait", {"name": "ubi0"})
    until(lambda: len(os.listdir(threads)) > 32, "they wait")
    for client in clients:
        client.close()
    assert served.refused("bdev_ubi_wait", name="ubi0", timeout_s=0)[0] == -110


def test_disks_that_were_added_otherwise(served: Served) -> None:
    """They are listed and served, and are nobody's configuration."""
    served.start()
    image, base = served.folder / "normal", served.base("other")
    command = [*served.command, "add", "--image", image, "--base", base, "--name", "other"]
    assert subprocess.run(command, check=False, timeout=60).returncode == 0
    assert served.names() == ["other"]
    assert served.call("save_config") == {"subsystems": []}
    assert served.refused("bdev_ubi_create", **served.disk(name="other"))[0] == -17
    assert served.call("bdev_ubi_status", name="other")["state"] == "live"
    assert served.call("bdev_ubi_delete", name="other") is True
    assert runtime.all_devices() == []


def test_the_parameters_that_spdk_s_command_line_knows(served: Served) -> None:
    """What SPDK's own command line may send for a bdev of ours is taken."""
    from spdk.spdk_rpc import create_parser

    _, commands = create_parser()
    served.start()
    for method in ("bdev_aio_create", "bdev_uring_create", "bdev_get_bdevs", "rpc_get_methods",
                   "framework_get_config", "bdev_aio_delete", "bdev_uring_delete"):
        known = {action.dest for action in commands.choices[method]._actions} - {"help"}
        for name in known:
            code, words = served.refused(method, **{name: {"no": "such value"}})
            assert code == -32602
            assert "unknown field" not in words, (method, name)
            assert re.search(r"missing required field|Expected|Invalid", words), words
