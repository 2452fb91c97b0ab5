"""`serve` as a process of its own, and SPDK's own client for it."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spdk.rpc.client import JSONRPCClient, JSONRPCException
from spdk.spdk_rpc import call_rpc_func, create_parser

from ublk_ubi import runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CHECKOUT = Path(__file__).resolve().parents[3]
FAKE = CHECKOUT / "tests/unit/fake_daemon.py"
WITH_FAKES = f"""
import sys
from ublk_ubi import launch
from ublk_ubi.cli import main
launch.daemon_command = lambda: [sys.executable, {str(FAKE)!r}]
if {bool(os.environ.get("UBLK_UBI_SPDK"))}:
    from unit.vhost.files import with_block_size
    from ublk_ubi import spdk
    spdk.bdev_call = with_block_size
main()
"""
GIB = 1 << 30


@functools.cache
def spdk_parser() -> Any:
    """What reads SPDK's command line."""
    return create_parser()[0]


def until(condition: Callable[[], Any], what: str, timeout_s: float = 120.0) -> Any:
    """Wait for what comes by itself."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:g} s"
        time.sleep(0.01)
    return found


class Served:
    """The server of one test. `log` is what it has said so far."""

    def __init__(
        self, folder: Path, path: str | None = None,
        command: tuple[str, ...] = (sys.executable, "-c", WITH_FAKES),
    ) -> None:
        self.folder = folder
        self.path = path or str(folder / "run/rpc.sock")
        self.command = command
        self._log = folder / "serve.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._from = 0

    def begin(self, *arguments: str, **environment: str) -> None:
        """Start it, without waiting for anything."""
        assert self.process is None
        self._from = self._log.stat().st_size if self._log.exists() else 0
        with open(self._log, "ab") as log:
            self.process = subprocess.Popen(
                [*self.command, "serve", *arguments],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder,
                env=os.environ | environment,
            )

    def start(self, *arguments: str, **environment: str) -> Served:
        """Start it, and wait until it is ready."""
        self.begin(*arguments, **environment)
        until(lambda: self.ready or self.ended, "serve is ready")
        assert not self.ended, f"exit code {self.process and self.process.returncode}: {self.log}"
        return self

    @property
    def log(self) -> str:
        """What it has said since it was started."""
        return self._log.read_text()[self._from :] if self._log.exists() else ""

    @property
    def ready(self) -> bool:
        """Whether its configuration has been loaded."""
        return " ready\n" in self.log

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def ended(self) -> bool:
        assert self.process is not None
        return self.process.poll() is not None

    def outcome(self) -> tuple[int, str]:
        """Wait for its end; its exit code and the last line that it said."""
        assert self.process is not None
        code = self.process.wait(120)
        self.process = None
        return code, self.log.splitlines()[-1]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it; the exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.outcome()[0]

    def kill(self) -> None:
        self.stop(signal.SIGKILL)

    def client(self, **options: Any) -> JSONRPCClient:
        """SPDK's own client, for a `with`."""
        return JSONRPCClient(self.path, **options)

    def call(self, method: str, **params: Any) -> Any:
        """One call by SPDK's own client."""
        with self.client(timeout=300.0) as client:
            return client.call(method, params)

    def refused(self, method: str, **params: Any) -> tuple[int, str]:
        """The code and the message of the error that a call must end with."""
        try:
            result = self.call(method, **params)
        except JSONRPCException as error:
            answer = json.loads(error.message.rpartition("response:\n")[2])
            assert "\n" not in answer["message"]
            return answer["code"], answer["message"]
        raise AssertionError(f"{method} {params}: {result}")

    def rpc_py(self, *words: str) -> str:
        """SPDK's own command line, in this process; what it prints."""
        arguments = spdk_parser().parse_args(["-s", self.path, *words])
        printed = io.StringIO()
        with self.client() as client, contextlib.redirect_stdout(printed):
            arguments.client = client
            call_rpc_func(arguments)
        return printed.getvalue()

    def names(self) -> list[str]:
        return [bdev["name"] for bdev in self.call("bdev_get_bdevs")]

    def disk(self, kind: str = "normal", name: str = "ubi0", **more: Any) -> dict[str, Any]:
        """The parameters of a disk on a base of its own, which is made here; so is its name."""
        self.call("bdev_aio_create", name=f"on-{name}", filename=self.base(name))
        image = str(self.folder / kind)
        return {"name": name, "base_bdev": f"on-{name}", "image_path": image,
                "stripe_size_kb": 1024} | more

    def base(self, name: str) -> str:
        path = self.folder / f"{name}.base"
        with open(path, "ab") as file:
            file.truncate(5 * GIB)
        return str(path)

    def options(self, name: str) -> dict[str, Any]:
        """What the daemon of a disk was started with."""
        return dict(json.loads((self.folder / f"run/{name}/options.json").read_bytes()))


def raw(path: str, data: bytes) -> socket.socket:
    """A connection on which something was sent."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(120)
    sock.connect(path)
    sock.sendall(data)
    return sock


def answer(sock: socket.socket) -> Any:
    """Read one answer, and close."""
    text = b""
    with sock:
        while not text.endswith(b"\n"):
            piece = sock.recv(1 << 16)
            if not piece:
                break
            text += piece
    return json.loads(text)


def children_of(pid: int) -> Iterator[tuple[int, str]]:
    """The processes whose parent is `pid`, and their states."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                text = (folder / "stat").read_text()
            except OSError:
                continue
            found = re.match(r"(\d+) .*\) (\w) (\d+) ", text)
            if found and int(found[3]) == pid:
                yield int(found[1]), found[2]


def end_all() -> None:
    """Kill what daemons a test has left."""
    for device in runtime.all_devices():
        if device.alive and device.pid:
            with contextlib.suppress(ProcessLookupError):  # it has ended since that look
                os.kill(device.pid, signal.SIGKILL)
