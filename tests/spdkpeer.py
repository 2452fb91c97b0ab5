"""A peer that speaks SPDK's JSON-RPC, for tests of those who talk to SPDK; run, or imported.

It knows what is used of SPDK: uring and aio bdevs, vhost-user-blk controllers. It opens the files
of its bdevs and listens on its controllers' sockets, as SPDK does, and moves no data. What it takes
for parameters is checked against SPDK's own command line, its answers by SPDK's own client
(tests/unit/vhost/test_peer.py); with UBLK_UBI_SPDK=<SPDK's build/bin> the same tests run against
SPDK's `vhost` instead.

Nothing of this project's protocol code is in it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

REFUSED = -32603  # "internal error": what SPDK says of parameters that a bdev module cannot decode
BAD = -32602
NO_METHOD = -32601

# name: required parameters, others
METHODS: dict[str, tuple[set[str], set[str]]] = {
    "spdk_get_version": (set(), set()),
    "rpc_get_methods": (set(), {"current", "include_aliases"}),
    "bdev_get_bdevs": (set(), {"name", "timeout"}),
    "bdev_uring_create": ({"filename", "name"}, {"block_size", "uuid"}),
    "bdev_uring_rescan": ({"name"}, set()),
    "bdev_uring_delete": ({"name"}, set()),
    "bdev_aio_create": (
        {"filename", "name"}, {"block_size", "readonly", "fallocate", "uuid", "nowait"},
    ),
    "bdev_aio_rescan": ({"name"}, set()),
    "bdev_aio_delete": ({"name"}, set()),
    "vhost_create_blk_controller": (
        {"ctrlr", "dev_name"}, {"readonly", "packed_ring", "cpumask", "transport"},
    ),
    "vhost_get_controllers": (set(), {"name"}),
    "vhost_delete_controller": ({"ctrlr"}, set()),
}


class RefusedError(Exception):
    """An answer that is an error."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class Bdev:
    name: str
    kind: str
    filename: str
    fd: int
    block_size: int
    blocks: int
    claimed: bool = False
    fallocate: bool = False
    uuid: str = field(default_factory=lambda: str(uuid.uuid4()))

    def describe(self) -> dict[str, Any]:
        specific: dict[str, Any] = {"filename": self.filename}
        if self.kind == "aio":
            specific |= {"block_size_override": False, "readonly": False,
                         "fallocate": self.fallocate, "nowait": False}
        passes = {"uring": ("read", "write"), "aio": ("read", "write", "flush", "reset")}[self.kind]
        return {
            "name": self.name, "aliases": [self.uuid],
            "product_name": {"uring": "URING bdev", "aio": "AIO disk"}[self.kind],
            "block_size": self.block_size, "num_blocks": self.blocks, "uuid": self.uuid,
            "claimed": self.claimed,
            "supported_io_types": {io: io in passes for io in ("read", "write", "flush", "unmap")},
            "driver_specific": {self.kind: specific},
        }


@dataclass
class Controller:
    name: str
    bdev: str | None
    cpumask: str
    path: str
    sock: socket.socket
    sessions: list[socket.socket] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        return {
            "ctrlr": self.name, "cpumask": self.cpumask,
            "delay_base_us": 0, "iops_threshold": 60000,
            "socket": self.path, "sessions": [{"vid": n} for n, _ in enumerate(self.sessions)],
            "backend_specific": {
                "block": {"readonly": False, "bdev": self.bdev, "transport": "vhost_user_blk"},
            },
        }


class Peer:
    """The state of it, and the loop."""

    def __init__(self, path: str, folder: str) -> None:
        self.folder = folder
        self.bdevs: dict[str, Bdev] = {}
        self.controllers: dict[str, Controller] = {}
        self.clients: dict[socket.socket, str] = {}
        self.owed: list[tuple[socket.socket, dict[str, Any]]] = []
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(64)

    def serve(self) -> None:
        while True:
            sockets: list[socket.socket] = [self.listener, *self.clients]
            for controller in self.controllers.values():
                sockets += [controller.sock, *controller.sessions]
            for sock in select.select(sockets, [], [], 0.05)[0]:
                self.on_ready(sock)
            self.pay()

    def on_ready(self, sock: socket.socket) -> None:
        if sock is self.listener:
            self.clients[sock.accept()[0]] = ""
            return
        if sock in self.clients:
            self.on_client(sock)
            return
        for controller in self.controllers.values():
            if sock is controller.sock:
                controller.sessions.append(sock.accept()[0])
            elif sock in controller.sessions and not sock.recv(4096):
                controller.sessions.remove(sock)
                sock.close()

    def on_client(self, sock: socket.socket) -> None:
        try:
            data = sock.recv(1 << 16)
        except ConnectionError:
            data = b""
        if not data:
            del self.clients[sock]
            sock.close()
            return
        text = self.clients[sock] + data.decode()
        while text := text.lstrip():
            try:
                request, end = json.JSONDecoder().raw_decode(text)
            except ValueError:
                break
            text = text[end:]
            self.answer(sock, request)
        if sock in self.clients:
            self.clients[sock] = text

    def answer(self, sock: socket.socket, request: dict[str, Any]) -> None:
        reply: dict[str, Any] = {"jsonrpc": "2.0", "id": request.get("id")}
        try:
            result = self.call(request["method"], request.get("params") or {})
        except RefusedError as error:
            reply["error"] = {"code": error.code, "message": str(error)}
        else:
            if result is None:
                self.owed.append((sock, request))  # until no VM is connected any more
                return
            reply["result"] = result
        with contextlib.suppress(OSError):
            sock.sendall(json.dumps(reply).encode() + b"\n")

    def pay(self) -> None:
        owed, self.owed = self.owed, []
        for sock, request in owed:
            if sock in self.clients:
                self.answer(sock, request)

    def call(self, method: str, params: dict[str, Any]) -> Any:
        if method not in METHODS:
            raise RefusedError(NO_METHOD, "Method not found")
        required, others = METHODS[method]
        if not required <= set(params) or not set(params) <= required | others:
            if method.startswith("vhost"):
                raise RefusedError(BAD, "Invalid argument")
            raise RefusedError(REFUSED, "spdk_json_decode_object failed")
        return getattr(self, method)(**params)

    # the methods ---------------------------------------------------------------------------

    def spdk_get_version(self) -> Any:
        return {"version": "a peer of SPDK's kind", "fields": {"major": 0, "minor": 0, "patch": 0}}

    def rpc_get_methods(self, **_asked: bool) -> Any:
        return list(METHODS)

    def bdev_get_bdevs(self, name: str | None = None, timeout: int = 0) -> Any:
        del timeout
        if name is None:
            return [bdev.describe() for bdev in self.bdevs.values()]
        return [self.find(name).describe()]

    def find(self, name: str, kind: str | None = None) -> Bdev:
        bdev = self.bdevs.get(name)
        if bdev is None or kind not in (None, bdev.kind):
            raise RefusedError(-19, "No such device")
        return bdev

    def bdev_uring_create(self, **params: Any) -> Any:
        try:
            return self.create("uring", **params)
        except (RefusedError, OSError):
            raise RefusedError(REFUSED, "Unable to create URING bdev.") from None

    def bdev_aio_create(self, **params: Any) -> Any:
        try:
            return self.create("aio", **params)
        except OSError as error:
            raise RefusedError(-(error.errno or 5), str(error.strerror)) from None

    def create(self, kind: str, name: str, filename: str, block_size: int = 0, **more: Any) -> Any:
        if name in self.bdevs:
            raise RefusedError(-17, "File exists")
        fd = os.open(filename, os.O_RDWR | os.O_CLOEXEC)
        size = os.lseek(fd, 0, os.SEEK_END)
        if size == 0:
            os.close(fd)
            raise RefusedError(-22, "Invalid argument")
        block = block_size or 512
        self.bdevs[name] = Bdev(name, kind, filename, fd, block, size // block,
                                fallocate=bool(more.get("fallocate")))
        return name

    def rescan(self, name: str, kind: str) -> Any:
        bdev = self.find(name, kind)
        bdev.blocks = os.lseek(bdev.fd, 0, os.SEEK_END) // bdev.block_size
        return True

    def delete(self, name: str, kind: str) -> Any:
        bdev = self.find(name, kind)
        for controller in self.controllers.values():
            if controller.bdev == name:
                controller.bdev = None  # hot removal
        os.close(bdev.fd)
        del self.bdevs[name]
        return True

    def bdev_uring_rescan(self, name: str) -> Any:
        return self.rescan(name, "uring")

    def bdev_aio_rescan(self, name: str) -> Any:
        return self.rescan(name, "aio")

    def bdev_uring_delete(self, name: str) -> Any:
        return self.delete(name, "uring")

    def bdev_aio_delete(self, name: str) -> Any:
        return self.delete(name, "aio")

    def vhost_create_blk_controller(
        self, ctrlr: str, dev_name: str, cpumask: str = "0x1", **_more: Any,
    ) -> Any:
        if ctrlr in self.controllers:
            raise RefusedError(BAD, "File exists")
        if dev_name not in self.bdevs:
            raise RefusedError(BAD, "No such device")
        if self.bdevs[dev_name].claimed:
            raise RefusedError(BAD, "Operation not permitted")
        path = os.path.join(self.folder, ctrlr)
        sock = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        sock.bind(path)
        sock.listen()
        self.controllers[ctrlr] = Controller(ctrlr, dev_name, cpumask, path, sock)
        return True

    def vhost_get_controllers(self, name: str | None = None) -> Any:
        if name is None:
            return [controller.describe() for controller in self.controllers.values()]
        if name not in self.controllers:
            raise RefusedError(REFUSED, "No such device")
        return [self.controllers[name].describe()]

    def vhost_delete_controller(self, ctrlr: str) -> Any:
        if ctrlr not in self.controllers:
            raise RefusedError(BAD, "No such device")
        if self.controllers[ctrlr].sessions:
            return None
        controller = self.controllers.pop(ctrlr)
        controller.sock.close()
        os.unlink(controller.path)
        return True


class Spdk:
    """SPDK for a test: its `vhost` where UBLK_UBI_SPDK names it, else the peer above."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = str(folder / "spdk.sock")
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def real(self) -> bool:
        return bool(os.environ.get("UBLK_UBI_SPDK"))

    def start(self) -> Spdk:
        words = [sys.executable, __file__, "-r", self.socket, "-S", str(self.folder)]
        if binaries := os.environ.get("UBLK_UBI_SPDK"):
            # It polls: whoever else wants the processor goes first.
            words = ["nice", "-n", "19", os.path.join(binaries, "vhost"), "-r", self.socket,
                     "-S", str(self.folder), "--no-huge", "-s", "512", "-u", "-m", "0x1"]
        with open(self.folder / "spdk.log", "ab") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=log, cwd=self.folder,
                                            stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while True:
            with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
                probe.connect(self.socket)
                return self
            assert self.process.poll() is None, (self.folder / "spdk.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(30)
            self.process = None

    def call(self, method: str, **params: Any) -> Any:
        """One call, by SPDK's own client."""
        from spdk.rpc.client import JSONRPCClient

        with JSONRPCClient(self.socket, conn_retries=10) as client:
            return client.call(method, params)

    def bdevs(self) -> dict[str, Any]:
        return {bdev["name"]: bdev for bdev in self.call("bdev_get_bdevs")}

    def controllers(self) -> dict[str, Any]:
        return {one["ctrlr"]: one for one in self.call("vhost_get_controllers")}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-r", dest="path")
    parser.add_argument("-S", dest="folder")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    Peer(arguments.path, arguments.folder).serve()


if __name__ == "__main__":
    main()
