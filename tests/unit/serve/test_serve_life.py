"""Its life: killed and started again, many creates, slow ones, hostile clients, the end."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from unit.serve.kit import Served, answer, children_of, raw, until

from ublk_ubi import runtime
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.serve import loading

if TYPE_CHECKING:
    from pathlib import Path

MANY = 100


def daemons() -> dict[str, int | None]:
    """Who serves which disk."""
    return {device.name: device.pid for device in runtime.all_devices() if device.alive}


def dead_children(pid: int) -> list[int]:
    return [child for child, state in children_of(pid) if state == "Z"]


# many, and slow ones -------------------------------------------------------------------------


def test_a_hundred_creates_at_once(served: Served) -> None:
    """From half as many clients, one after the other on none of them."""
    served.start()
    disks = [served.disk(name=f"vm{number}") for number in range(MANY)]
    clients = [served.client(timeout=300.0) for _ in range(MANY // 2)]
    longest = 0.0
    with contextlib.ExitStack() as stack:
        for number, disk in enumerate(disks):
            clients[number % len(clients)].send("bdev_ubi_create", disk)
        for client in clients:
            stack.enter_context(client)
        while len(daemons()) < MANY:
            began = time.monotonic()
            served.call("bdev_get_bdevs", name="on-vm0")
            longest = max(longest, time.monotonic() - began)
            time.sleep(0.05)
        results = [client.recv()["result"] for client in clients for _ in range(2)]
    assert sorted(results) == sorted(disk["name"] for disk in disks)
    assert longest < 5.0  # this machine's processors are busy starting daemons
    assert len(served.names()) == 2 * MANY
    with served.client(batch_mode=True) as client:
        for disk in disks:
            client.bdev_ubi_delete(name=disk["name"])
        client.send_batch()
        assert client.handle_batch_response(client.recv()) == ([True] * MANY, [])
    assert daemons() == {}
    until(lambda: not dead_children(served.pid), "ended daemons are buried")


def test_slow_creates_hold_up_nobody(served: Served) -> None:
    served.start()
    slow = [served.disk("late", name=f"slow{number}") for number in range(12)]
    served.call("bdev_ubi_create", **served.disk(name="vm1"))
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(served.client()) for _ in slow]
        for client, disk in zip(clients, slow, strict=True):
            client.send("bdev_ubi_create", disk)
        until(lambda: len(list(children_of(served.pid))) > 8, "as many as may be are under way")
        began = time.monotonic()
        assert len(served.names()) == len(slow) + 2
        assert served.call("bdev_ubi_status", name="vm1")["state"] == "live"
        served.call("bdev_aio_create", name="more", filename=served.base("more"))
        assert time.monotonic() - began < 5.0
        # Its name and its base are taken while it is under way.
        assert served.refused("bdev_ubi_create", **slow[0])[0] == -17
        assert served.refused("bdev_ubi_create", **slow[0] | {"name": "other"})[0] == -1
        for disk in slow:
            (served.folder / f"{disk['name']}.base.go").touch()
        assert [client.recv()["result"] for client in clients] == [d["name"] for d in slow]


# killed, and started again -------------------------------------------------------------------


def test_killed_and_started_again(served: Served) -> None:
    served.start()
    for name in ("ubi0", "vm1"):
        served.call("bdev_ubi_create", **served.disk(name=name, no_sync=True))
    before, saved, alive = served.call("bdev_get_bdevs"), served.rpc_py("save_config"), daemons()
    served.kill()
    assert daemons() == alive
    served.start()
    assert daemons() == alive
    assert served.call("bdev_get_bdevs") == before
    assert served.rpc_py("save_config") == saved
    assert served.refused("bdev_ubi_create", **served.disk(name="ubi1") | {"name": "vm1"})[0] == -17
    # With the configuration that they came from, too.
    (served.folder / "saved.json").write_text(saved)
    assert served.stop() == 0
    served.start("--json", "saved.json")
    assert daemons() == alive
    assert "vm1: runs already" in served.log
    assert served.call("bdev_ubi_delete", name="vm1") is True
    served.kill()
    served.start()
    assert "vm1" not in served.names()
    assert served.rpc_py("save_config").count("bdev_ubi_create") == 1


def test_killed_amid_a_create(served: Served) -> None:
    """The daemon comes up all the same, and is known afterwards."""
    served.start()
    disk = served.disk("late")
    with served.client() as client:
        client.send("bdev_ubi_create", disk)
        until(lambda: list(children_of(served.pid)), "it is under way")
        served.kill()
    served.start()
    assert served.names() == ["on-ubi0"]
    (served.folder / "ubi0.base.go").touch()
    found = served.call("bdev_get_bdevs", name="ubi0", timeout=30_000)
    assert found[0]["driver_specific"]["ubi"]["base_bdev"] == "on-ubi0"
    assert served.rpc_py("save_config").count("bdev_ubi_create") == 1


def test_a_daemon_that_is_starting_is_waited_for(served: Served) -> None:
    """Of a server that was killed amid the same configuration."""
    config = subsystems(
        call("bdev_aio_create", name="aio0", filename=served.base("vm")),
        call("bdev_ubi_create", name="vm", base_bdev="aio0", stripe_size_kb=64,
             image_path=f"{served.folder}/normal"),
    )
    (served.folder / "conf.json").write_text(json.dumps(config))
    claim = runtime.claim("vm")
    served.begin("--json", "conf.json")
    until(lambda: "vm: its daemon is starting: waiting for it" in served.log or served.ended,
          "it waits")
    claim.release()
    until(lambda: served.ready or served.ended, "it is ready")
    assert served.names() == ["aio0", "vm"]


def test_a_disk_that_was_deleted_by_hand_is_forgotten(served: Served) -> None:
    served.start()
    served.call("bdev_ubi_create", **served.disk())
    subprocess.run([sys.executable, "-m", "ublk_ubi", "del", "ubi0"], check=True)
    assert served.names() == ["on-ubi0"]
    assert served.rpc_py("save_config").count("bdev_ubi_create") == 0
    served.call("bdev_ubi_create", **served.disk(name="vm1") | {"base_bdev": "on-ubi0"})


def test_a_damaged_record_is_named(served: Served) -> None:
    (served.folder / "run/.serve.json").write_text("{")
    served.begin()
    code, words = served.outcome()
    assert (code, words.count(".serve.json is damaged")) == (1, 1)
    assert "remove it; disks stay" in words


# --json --------------------------------------------------------------------------------------


def subsystems(*calls: Any, subsystem: str = "bdev") -> dict[str, Any]:
    return {"subsystems": [{"subsystem": subsystem, "config": list(calls)}]}


def call(method: str, **params: Any) -> dict[str, Any]:
    return {"method": method, "params": params}


def test_a_configuration_that_fails_leaves_nothing(served: Served) -> None:
    bases = [call("bdev_aio_create", name=f"aio{n}", filename=served.base(f"vm{n}"))
             for n in range(3)]
    kinds = ("normal", "refuses", "normal")
    disks = [call("bdev_ubi_create", name=f"vm{n}", base_bdev=f"aio{n}", image_path=f"/{kind}",
                  stripe_size_kb=64) for n, kind in enumerate(kinds)]
    path = served.folder / "conf.json"
    path.write_text(json.dumps(subsystems(*bases, *disks)))
    served.begin("--json", "conf.json")
    code, words = served.outcome()
    assert code == 1
    assert "--json conf.json: bdev call 5: image /refuses is empty" in words
    assert runtime.all_devices() == []
    assert served.start().names() == []


@pytest.mark.parametrize(("content", "words"), [
    ("", "is no configuration of SPDK's form"),
    ("[]", "is no configuration of SPDK's form: Expected `object`, got `array`"),
    ('{"subsystems": [{"subsystem": "bdev", "config": [{}]}]}', "missing required field `method`"),
    (json.dumps(subsystems(call("bdev_ubi_creat"))),
     "bdev call 1: unknown method 'bdev_ubi_creat': use bdev_aio_create"),
    (json.dumps(subsystems(call("bdev_ubi_create", name="x", format=True))),
     "bdev call 1: format would make the disk anew at every boot"),
    (None, "No such file"),
])
def test_files_that_are_no_configuration(tmp_path: Path, content: str | None, words: str) -> None:
    path = str(tmp_path / "conf.json")
    if content is not None:
        (tmp_path / "conf.json").write_text(content)
    with pytest.raises(UbiError) as caught:
        loading.read(path, with_spdk=False, report=print)
    assert caught.value.code == Exit.USAGE
    assert caught.value.message.startswith(f"--json {path}")
    assert words in caught.value.message
    assert "\n" not in caught.value.message


def test_a_folder_or_a_pipe_is_no_configuration(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(UbiError, match=r"directory|is not a regular file"):
            loading.read(str(path), with_spdk=False, report=print)


@pytest.mark.parametrize(("bad", "words"), [
    (call("bdev_ubi_create", name="x"), "bdev call 1: bdev_ubi_create: Object missing"),
    ({"method": "bdev_aio_create", "params": 5}, "bdev_aio_create: Expected `object`, got `int`"),
    (call("bdev_aio_create", name="a", filename="/nope/x"), "/nope/x: No such file"),
], ids=["missing", "number", "path"])
def test_calls_that_cannot_be_done(served: Served, bad: dict[str, Any], words: str) -> None:
    (served.folder / "conf.json").write_text(json.dumps(subsystems(bad)))
    served.begin("--json", "conf.json")
    code, last = served.outcome()
    assert (code, last.startswith("ublk-ubi: --json conf.json: "), words in last) == (
        1 if "nope" in words else 2, True, True), last


def test_what_spdk_s_own_configurations_have_besides(served: Served) -> None:
    aio = call("bdev_aio_create", name="aio0", filename=served.base("vm"))
    settings = [call("bdev_set_options", bdev_io_pool_size=65535),
                {"method": "bdev_wait_for_examine"}]
    config = subsystems(*settings, [aio])  # a batch, as SPDK writes them
    config["subsystems"] += [{"subsystem": "iobuf", "config": None},
                             {"subsystem": "sock", "config": [call("sock_impl_set_options")]}]
    (served.folder / "conf.json").write_text(json.dumps(config))
    served.start("--json", "conf.json")
    assert served.names() == ["aio0"]
    assert served.log.count("sets what is not here") == 3


# hostile clients -----------------------------------------------------------------------------


def descriptors(served: Served) -> int:
    return len(os.listdir(f"/proc/{served.pid}/fd"))


def memory_kib(served: Served) -> int:
    with open(f"/proc/{served.pid}/status") as file:
        return int(next(line for line in file if line.startswith("VmRSS")).split()[1])


KINDS = (
    b"garbage", b"[" * 100, b'{"jsonrpc":', b"{" + b" " * (300 << 10), b"\0" * 1000,
    b'{"method":"bdev_get_bdevs","id":1}' * 2000,  # and never reads
    b'{"method":"bdev_get_bdevs","id":1,"params":{"name":"nope","timeout":86400000}}' * 300,
    b"[" + b",".join([b'{"method":"bdev_ubi_status","id":1}'] * 256) + b"]",
    b'{"method":"bdev_ubi_create","id":1,"params":{"name":' + b'{"a":' * 40,
    b'{"method":"bdev_ubi_delete","params":{"name":"../../etc/passwd"}}' * 100,
)


def crowd(
    served: Served, count: int, kinds: tuple[bytes, ...] = KINDS,
) -> list[socket.socket]:
    """Clients of every kind, none of which reads."""
    found = []
    for number in range(count):
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.connect(served.path)
            sock.send(kinds[number % len(kinds)])
        found.append(sock)
    return found


def test_hostile_clients(served: Served) -> None:
    """Two hundred at a time, three times over, while an honest one does its work."""
    served.start()
    served.call("bdev_ubi_create", **served.disk())
    before = descriptors(served)
    for name in ("a", "b", "c"):
        hostile = crowd(served, 200)
        served.call("bdev_ubi_create", **served.disk(name=name))
        assert name in served.names()
        for sock in hostile:
            sock.close()
        until(lambda: descriptors(served) <= before, "what they held is given back")
    assert served.call("bdev_ubi_delete", name="a") is True


def test_what_clients_sent_goes_with_them(served: Served) -> None:
    served.start()
    before, held = descriptors(served), []
    for _ in range(3):
        hostile = crowd(served, 200, (b"{" + b" " * (160 << 10),))
        until(lambda crowd=hostile: not any(map(not_read, crowd)), "all of it is there")
        for sock in hostile:
            sock.close()
        until(lambda: descriptors(served) <= before, "they are gone")
        held.append(memory_kib(served))
    assert held[-1] < held[0] + (16 << 10), held  # each crowd sends 31 MiB


def not_read(sock: socket.socket) -> int:
    """The bytes that the other end has not read yet (unix(7), SIOCOUTQ)."""
    (count,) = struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))
    return int(count)


# beginning and end ---------------------------------------------------------------------------


def test_the_socket(served: Served, tmp_path: Path) -> None:
    served.path = str(tmp_path / "other.sock")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(served.path)
    served.start("-r", "other.sock")
    assert os.stat(served.path).st_mode & 0o777 == 0o600
    second = Served(tmp_path)
    second._log = tmp_path / "second.log"
    second.begin()
    assert second.outcome() == (5, "ublk-ubi: another `ublk-ubi serve` runs already: end it first")
    assert served.stop() == 0
    assert not os.path.exists(served.path)
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(served.path)
        taken.listen()
        served.begin("-r", "other.sock")
        code, words = served.outcome()
        assert (code, "another program listens there: give another -r" in words) == (5, True)
    assert os.path.exists(served.path)


def test_readiness_is_told(served: Served, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(30)
        served.begin(NOTIFY_SOCKET=str(tmp_path / "notify"))
        words = [manager.recv(1000)]  # more time first, and more of it on a slow machine
        while b"READY=1" not in words[-1]:
            assert words[-1].startswith(b"EXTEND_TIMEOUT_USEC=")
            words.append(manager.recv(1000))
        assert served.names() == []
        served.stop()
        assert b"STOPPING=1" in manager.recv(1000)


def test_initialized_once_the_configuration_is_there(served: Served) -> None:
    config = subsystems(
        call("bdev_aio_create", name="aio0", filename=served.base("vm")),
        call("bdev_ubi_create", name="vm", base_bdev="aio0", image_path=f"{served.folder}/late",
             stripe_size_kb=64),
    )
    (served.folder / "conf.json").write_text(json.dumps(config))
    served.begin("--json", "conf.json")
    until(lambda: "listening on " in served.log, "it listens")
    until(lambda: served.names() == ["aio0"], "it has begun")
    with served.client() as client:
        client.send("framework_wait_init")
        (served.folder / "vm.base.go").touch()
        assert client.recv()["result"] is True
    assert served.names() == ["aio0", "vm"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_end_amid_a_create(served: Served, number: int) -> None:
    """It ends soon, tells its clients, and leaves nothing half-made; disks go on."""
    served.start()
    served.call("bdev_ubi_create", **served.disk(name="stays"))
    disk = served.disk("late")
    sock = raw(served.path, json.dumps({"id": 1, "method": "bdev_ubi_create",
                                        "params": disk}).encode())
    until(lambda: len(list(children_of(served.pid))) > 1, "it is under way")
    began = time.monotonic()
    assert served.stop(number) == 0
    assert time.monotonic() - began < 10
    assert "interrupted: the daemon was ended" in answer(sock)["error"]["message"]
    assert list(daemons()) == ["stays"]
    (served.folder / "ubi0.base.go").touch()
    assert served.start().call("bdev_ubi_create", **disk) == "ubi0"


def test_asked_to_end_amid_a_configuration(served: Served) -> None:
    """What it has made stays, and the next one goes on with that."""
    disks = [call("bdev_ubi_create", name=name, base_bdev=f"on-{name}", stripe_size_kb=64,
                  image_path=f"{served.folder}/{kind}")
             for name, kind in (("vm0", "normal"), ("vm1", "late"))]
    bases = [call("bdev_aio_create", name=f"on-{name}", filename=served.base(name))
             for name in ("vm0", "vm1")]
    (served.folder / "conf.json").write_text(json.dumps(subsystems(*bases, *disks)))
    served.begin("--json", "conf.json")
    until(lambda: "vm0: created" in served.log, "the first is there")
    before = daemons()["vm0"]
    assert served.stop() == 0
    assert daemons() == {"vm0": before}
    (served.folder / "vm1.base.go").touch()
    served.start("--json", "conf.json")
    assert daemons()["vm0"] == before
    assert served.names() == ["on-vm0", "on-vm1", "vm0", "vm1"]


def test_what_failed_is_in_nobody_s_way(served: Served) -> None:
    served.start()
    disk = served.disk()
    # Its record cannot be written.
    (served.folder / "run/.serve.json.tmp").mkdir()
    assert "cannot be written" in served.refused("bdev_ubi_create", **disk)[1]
    assert "cannot be written" in served.refused("bdev_aio_create", name="more",
                                                 filename=served.base("more"))[1]
    (served.folder / "run/.serve.json.tmp").rmdir()
    assert served.names() == ["on-ubi0"]
    # A daemon died before it had a disk.
    (served.folder / "run/ubi0").mkdir(0o700)
    assert served.call("bdev_ubi_create", **disk) == "ubi0"


def test_daemons_that_end_are_buried(served: Served) -> None:
    served.start()
    served.call("bdev_ubi_create", **served.disk())
    os.kill(daemons()["ubi0"] or 0, signal.SIGKILL)
    until(lambda: "ubi0" not in daemons(), "it is dead")
    until(lambda: not list(children_of(served.pid)), "it is buried")
    (found,) = served.call("bdev_get_bdevs", name="ubi0")
    assert found["driver_specific"]["ubi"]["alive"] is False


def test_one_client_for_each_thread(served: Served) -> None:
    """As a control plane has it: threads that create, look and delete, each on its own."""
    served.start()
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            disk = served.disk(name=f"vm{number}")
            with served.client() as client:
                assert client.bdev_ubi_create(**disk) == disk["name"]
                assert client.bdev_get_bdevs(name=disk["name"])[0]["name"] == disk["name"]
                assert client.bdev_ubi_delete(name=disk["name"]) is True
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert daemons() == {}
