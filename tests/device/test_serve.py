"""`ublk-ubi serve` with real disks: bdev_ubi's configuration, its death under load, SPDK's side."""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from spdkpeer import Spdk
from support.background import Background
from support.device import CHECKOUT, RUN_ROOT
from support.direct import DirectFile, assert_same, block_size, read_direct
from support.images import random_content, write_file
from support.ondisk import read_metadata
from support.shell import until
from unit.serve.bdev_ubi import CONFIGURATION
from unit.serve.kit import GIB, Served

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.device import Ubi
    from support.images import Image
    from support.stores import Stores
    from support.undo import Undo

MIB = 1 << 20
STRIPE = 64 << 10
LINK = "/dev/ublk-ubi"
CREATES = int(os.environ.get("UBLK_UBI_CREATES", "6"))

pytestmark = [pytest.mark.usefixtures("no_watch"), pytest.mark.limit(300)]


@pytest.fixture
def served(ubi: Ubi, stores: Stores, undo: Undo, monkeypatch: pytest.MonkeyPatch) -> Served:
    """A server that is not started yet; its folder is on ext4."""
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    command = (sys.executable, "-m", "ublk_ubi")
    found = Served(stores.folder(), str(RUN_ROOT / "rpc.sock"), command)

    def end() -> None:
        print(found.log)
        if found.process is not None:
            found.kill()
        if any(RUN_ROOT.glob("*/lock")):
            ubi.command("del", "-a", "--force")
        for name in ("rpc.sock", ".serve.json", ".serve.lock"):
            (RUN_ROOT / name).unlink(missing_ok=True)

    undo.callback(end)
    return found


@pytest.fixture
def spdk(tmp_path: Path) -> Iterator[Spdk]:
    found = Spdk(tmp_path).start()
    yield found
    found.kill()


def disk(served: Served, image: Image, name: str, **more: Any) -> dict[str, Any]:
    """Parameters of a disk on a sparse file that is made here."""
    base = served.folder / f"{name}.base"
    base.touch()
    os.truncate(base, 8 * MIB + 2 * MIB)
    served.call("bdev_uring_create", name=f"on-{name}", filename=str(base))
    return {"name": name, "base_bdev": f"on-{name}", "image_path": image.path,
            "stripe_size_kb": STRIPE >> 10} | more


class Load:
    """Writes blocks and reads them back, until told to end; `count` grows."""

    def __init__(self, path: str, start: int, length: int) -> None:
        self.count = 0
        self._end = threading.Event()
        self._range = (start, length)
        self._path = path
        self._done = Background(self._run)

    def _run(self) -> None:
        start, length = self._range
        with DirectFile(self._path) as file:
            while not self._end.is_set():
                at = start + self.count * 4096 % length
                block = self.count.to_bytes(8, "little") * 512
                file.pwrite(block, at)
                assert file.pread(at, 4096) == block
                self.count += 1

    def goes_on(self) -> None:
        before = self.count
        until(lambda: self.count > before + 20, "the load goes on", 60.0)

    def end(self) -> None:
        self._end.set()
        self._done.result(60.0)


def test_bdev_ubi_s_configuration(served: Served, seed: int) -> None:
    """Unedited; its disk serves on while the server is killed and comes again."""
    image = write_file(served.folder / "jammy.raw", random_content(5 * MIB + 512, seed))
    (served.folder / "write-space").touch()
    os.truncate(served.folder / "write-space", 5 * GIB)
    (served.folder / "spdk_conf.json").write_text(json.dumps(CONFIGURATION))
    served.start("--json", "spdk_conf.json")
    assert served.names() == ["aio0", "ubi0"]
    (ubi0,) = served.call("bdev_get_bdevs", name="ubi0")
    assert ubi0["num_blocks"] * ubi0["block_size"] == 5 * GIB - 8 * MIB
    assert block_size(f"{LINK}/ubi0") == 5 * GIB - 8 * MIB
    assert ubi0["uuid"] == served.call("bdev_ubi_status", name="ubi0")["uuid"]
    cache = f"/sys/block/{os.path.basename(os.path.realpath(f'{LINK}/ubi0'))}/queue/write_cache"
    with open(cache) as file:
        assert file.read() == "write through\n"
    # Behind the second MiB all is the image's still.
    load = Load(f"{LINK}/ubi0", 0, 2 * MIB)
    load.goes_on()
    assert served.refused("bdev_ubi_delete", name="ubi0")[0] == -16
    served.kill()
    load.goes_on()
    served.start("--json", "spdk_conf.json")
    load.goes_on()
    assert "ubi0: runs already" in served.log
    assert served.call("bdev_get_bdevs", name="ubi0") == [ubi0]
    load.end()
    rest = read_direct(f"{LINK}/ubi0", 2 * MIB, 4 * MIB)
    assert_same(rest, image.as_disk(6 * MIB)[2 * MIB :], 2 * MIB, "ubi0")
    assert served.call("bdev_ubi_delete", name="ubi0") is True
    assert not os.path.lexists(f"{LINK}/ubi0")
    found = read_metadata(str(served.folder / "write-space"))
    assert (found.minor, found.extension.is_open) == (1, False)


def test_many_creates_at_once(served: Served, make_image: Callable[..., Image]) -> None:
    served.start()
    image = make_image(MIB)
    clients = [served.client(timeout=300.0) for _ in range(CREATES)]
    for number, client in enumerate(clients):
        client.send("bdev_ubi_create", disk(served, image, f"vm{number}"))
    for number, client in enumerate(clients):
        with client:
            assert client.recv()["result"] == f"vm{number}"
    paths = [os.path.realpath(f"{LINK}/vm{number}") for number in range(CREATES)]
    assert len(set(paths)) == CREATES
    for path in paths:
        assert_same(read_direct(path, 0, MIB), image.content, 0, path)
    with served.client(batch_mode=True) as client:
        for number in range(CREATES):
            client.bdev_ubi_delete(name=f"vm{number}")
        client.send_batch()
        assert client.handle_batch_response(client.recv()) == ([True] * CREATES, [])
    assert len(served.names()) == CREATES


def test_for_spdk(
    ubi: Ubi, served: Served, spdk: Spdk, make_image: Callable[..., Image],
) -> None:
    """SPDK has the disk open all the while: killed, recovered, upgraded, grown, taken away."""
    image = make_image(MIB)
    served.start("--spdk", spdk.socket)
    served.call("bdev_ubi_create", **disk(served, image, "vm1"))
    served.call("vhost_create_blk_controller", ctrlr="vhost.0", dev_name="vm1")
    node = os.path.realpath(f"{LINK}/vm1")

    def size_in_spdk() -> int:
        bdev = spdk.bdevs()["vm1"]
        return int(bdev["num_blocks"] * bdev["block_size"])

    assert size_in_spdk() == 2 * MIB
    refused = ubi.command("del", "vm1")
    assert (refused.code, "`ublk-ubi spdk detach vm1` first" in refused.stderr) == (5, True)
    # Refused, it was not even taken away from SPDK for a moment.
    before = spdk.bdevs()["vm1"]["uuid"]
    with open(node, "rb"):
        assert served.refused("bdev_ubi_delete", name="vm1")[0] == -16
    assert spdk.bdevs()["vm1"]["uuid"] == before
    old = served.call("bdev_ubi_status", name="vm1")["pid"]
    os.kill(old, 9)
    until(lambda: not os.path.exists(f"/proc/{old}"), "it is dead and buried", 60.0)
    assert served.call("bdev_ubi_status", name="vm1")["state"] == "dead"
    new = served.call("bdev_ubi_recover", name="vm1")
    assert new["name"] == "vm1"
    assert served.call("bdev_ubi_upgrade", name="vm1")["pid"] not in (old, new["pid"])
    assert_same(read_direct(node, 0, MIB), image.content, 0, "vm1, after all that")
    grown = served.call("bdev_ubi_resize", name="vm1", size=4 * MIB)
    assert grown == {"name": "vm1", "size": 4 * MIB, "rescanned": True}
    assert size_in_spdk() == 4 * MIB
    found = ubi.command("resize", "vm1", "5M")
    assert (found.code, found.stderr) == (0, "")
    assert size_in_spdk() == 5 * MIB
    assert ubi.command("spdk", "status", "vm1", "--json").json()["problem"] is None
    assert served.call("vhost_delete_controller", ctrlr="vhost.0") is True
    assert served.call("bdev_ubi_delete", name="vm1") is True
    assert spdk.bdevs() == {}
    assert not os.path.exists(node)
