"""The peer takes what SPDK's own command line sends, and no more: else it would prove nothing."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from spdk.rpc.client import JSONRPCClient, JSONRPCException
from spdk.spdk_rpc import call_rpc_func
from spdkpeer import METHODS
from unit.serve.kit import GIB, spdk_parser

if TYPE_CHECKING:
    from pathlib import Path

    from spdkpeer import Spdk

COMMANDS = spdk_parser()._subparsers._group_actions[0].choices


def rpc_py(spdk: Spdk, *words: str) -> None:
    arguments = spdk_parser().parse_args(list(words))
    with JSONRPCClient(spdk.socket) as client:
        arguments.client = client
        call_rpc_func(arguments)


def test_parameters() -> None:
    for method, (required, others) in METHODS.items():
        actions = [action for action in COMMANDS[method]._actions if action.dest != "help"]
        assert {action.dest for action in actions} == required | others, method
        assert {action.dest for action in actions if action.required} == required, method


def test_spdk_s_command_line(spdk: Spdk, tmp_path: Path) -> None:
    path = str(tmp_path / "disk")
    with open(path, "wb") as file:
        file.truncate(GIB)
    rpc_py(spdk, "bdev_uring_create", path, "one", "512")
    rpc_py(spdk, "bdev_aio_create", path, "two", "4096", "--fallocate")
    rpc_py(spdk, "vhost_create_blk_controller", "vhost.0", "one", "--cpumask", "0x1")
    found = spdk.bdevs()
    assert found["one"]["num_blocks"] == GIB // 512
    assert found["one"]["driver_specific"]["uring"]["filename"] == path
    assert found["two"]["driver_specific"]["aio"] | {"fallocate": True} == (
        found["two"]["driver_specific"]["aio"])
    assert found["two"]["supported_io_types"]["flush"] is True
    assert found["one"]["supported_io_types"]["flush"] is False
    controller = spdk.controllers()["vhost.0"]
    assert controller["backend_specific"]["block"]["bdev"] == "one"
    assert controller["sessions"] == []
    assert os.path.exists(controller["socket"])
    os.truncate(path, 2 * GIB)
    rpc_py(spdk, "bdev_uring_rescan", "one")
    assert spdk.bdevs()["one"]["num_blocks"] == 2 * GIB // 512
    rpc_py(spdk, "bdev_uring_delete", "one")
    assert spdk.controllers()["vhost.0"]["backend_specific"]["block"]["bdev"] is None
    rpc_py(spdk, "vhost_delete_controller", "vhost.0")
    rpc_py(spdk, "bdev_aio_delete", "two")
    assert (spdk.bdevs(), spdk.controllers()) == ({}, {})


@pytest.mark.parametrize(("method", "params", "code"), [
    ("nope", {}, -32601),
    ("bdev_get_bdevs", {"name": "nope"}, -19),
    ("bdev_uring_create", {"name": "x"}, -32603),
    ("bdev_uring_create", {"name": "x", "filename": "/nope/x"}, -32603),
    ("bdev_aio_create", {"name": "x", "filename": "/nope/x"}, -2),
    ("bdev_aio_create", {"name": "x", "filename": "/nope/x", "colour": 1}, -32603),
    ("bdev_uring_delete", {"name": "nope"}, -19),
    ("bdev_aio_delete", {"name": "nope"}, -19),
    ("bdev_uring_rescan", {"name": "nope"}, -19),
    ("vhost_get_controllers", {"name": "nope"}, -32603),
    ("vhost_create_blk_controller", {"ctrlr": "v", "dev_name": "nope"}, -32602),
    ("vhost_delete_controller", {"ctrlr": "nope"}, -32602),
])
def test_refusals(spdk: Spdk, method: str, params: dict[str, object], code: int) -> None:
    with pytest.raises(JSONRPCException) as caught:
        spdk.call(method, **params)
    assert f'"code": {code},' in caught.value.message
