"""Devices as their user has them: made by the command, asked through the socket, taken away."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from support.direct import DirectFile
from support.shell import until
from ublk_ubi.errors import UbiError
from ublk_ubi.links import resolve
from ublk_ubi.removal import DEFAULT_TIMEOUT_S, FORCED_TIMEOUT_S, remove_device
from ublk_ubi.runtime import all_devices
from ublk_ubi.structs import make_ready

if TYPE_CHECKING:
    from support.undo import Undo
    from ublk_ubi import runtime

RUN_ROOT = Path("/run/ublk-ubi")
CHECKOUT = Path(__file__).resolve().parents[3]
COMMAND_TIMEOUT_S = 90.0
# DeviceOptions that go in by a config file; the others are words of the command line.
_CONFIGURED = ("cache", "data_path", "cpus", "hydrator_cpus", "hydrate", "rate", "min_free")
# DeviceOptions that are flags of `add`, and what they are called when true and when false.
_FLAGS = {
    "copy_on_read": ("--copy-on-read", "--no-copy-on-read"),
    "recovery": ("--recovery", "--no-recovery"),
    "format": ("--format", ""),
}

_numbers = itertools.count()
make_ready()                       # tests may take devices away in several threads


class CommandError(AssertionError):
    """A command ended with another exit code than 0."""

    def __init__(self, words: list[str], code: int, stderr: str) -> None:
        super().__init__(f"ublk-ubi {' '.join(words)}: exit {code}: {stderr.strip()}")
        self.code = code
        self.stderr = stderr


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    def json(self) -> Any:
        return json.loads(self.stdout)


class Running:
    """A command that is under way. `config` is what its config file holds, if it has one."""

    def __init__(
        self, words: list[str], *, config: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.words = words
        self.started_at = time.monotonic()
        with contextlib.ExitStack() as stack:
            fds: list[int] = []
            if config:
                fds.append(os.memfd_create("config"))
                stack.callback(os.close, fds[0])
                os.write(fds[0], json.dumps(config).encode())
                self.words = [*words, "--config", f"/proc/self/fd/{fds[0]}"]
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ublk_ubi", *self.words], pass_fds=fds,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env=os.environ | {"PYTHONPATH": str(CHECKOUT)} | (environment or {}),
            )

    @property
    def done(self) -> bool:
        return self.process.poll() is not None

    def outcome(self, timeout_s: float = COMMAND_TIMEOUT_S) -> Outcome:
        """Wait for its end."""
        try:
            stdout, stderr = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            stdout, stderr = self.process.communicate()
            message = f"no end within {timeout_s:g} s; {stdout} {stderr}"
            raise CommandError(self.words, -1, message) from None
        return Outcome(self.process.returncode, stdout, stderr)

    def checked(self, timeout_s: float = COMMAND_TIMEOUT_S) -> Outcome:
        """Wait for its end, which must be a success."""
        outcome = self.outcome(timeout_s)
        if outcome.code != 0:
            raise CommandError(self.words, outcome.code, outcome.stderr)
        return outcome


@dataclass
class Device:
    """A device by its name. It keeps its name and options through stop(), kill() and start()."""

    name: str
    options: dict[str, Any]
    _undo: Undo = field(repr=False)
    environment: dict[str, str] = field(default_factory=dict)      # more than the tests' own
    node: str = ""                     # /dev/ublkbN
    path: str = ""                     # /dev/ublk-ubi/NAME
    id: int = -1
    pid: int = -1
    size: int = 0
    warnings: list[str] = field(default_factory=list)
    live: bool = False                 # as far as the test's own doings go

    # -- up and down --

    def start(self, **changes: object) -> Device:
        """`add` with the options of before and these changes; returns itself."""
        self.begin_start(**changes)
        return self.finish_start()

    def begin_start(self, **changes: object) -> Running:
        """Start `add` and do not wait for it; `finish_start` does."""
        self.options |= changes
        said = {key: value for key, value in self.options.items() if value is not None}
        config = {key: value for key, value in said.items() if key in _CONFIGURED}
        words = arguments(self.name, {k: v for k, v in said.items() if k not in config})
        self._starting = Running(
            ["add", "--json", *words], config=config, environment=self.environment,
        )
        self._undo.callback(self._end_starting, self._starting)
        return self._starting

    def finish_start(self, timeout_s: float = COMMAND_TIMEOUT_S) -> Device:
        """Wait for the `add` that begin_start began."""
        answer = self._starting.checked(timeout_s).json()
        self.node, self.path, self.id = answer["device"], answer["link"], answer["id"]
        self.pid, self.size, self.warnings = answer["pid"], answer["size"], answer["warnings"]
        self.live = True
        # What makes a disk anew was meant for the first time.
        self.options = {k: v for k, v in self.options.items() if k not in ("format", "adopt")}
        return self

    def stop(self, *, force: bool = False) -> None:
        """A clean stop, as `del` does it; CommandError when it is refused."""
        try:
            take_away(resolve(self.name), force=force)
        except UbiError as error:
            raise CommandError(["del", self.name], error.code, error.message) from error
        self.live = False

    def kill(self) -> None:
        """SIGKILL the daemon and wait until it has ended; the kernel's device may be left."""
        pidfd = os.pidfd_open(self.pid)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            ready, _, _ = select.select([pidfd], [], [], 30.0)
            assert ready, f"daemon {self.pid} has not ended 30 s after SIGKILL"
        finally:
            os.close(pidfd)
        self.live = False

    def is_dead(self) -> bool:
        """Whether the daemon has ended by itself, with its last thread."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            pass
        else:
            ready, _, _ = select.select([pidfd], [], [], 0)
            os.close(pidfd)
            if not ready:
                return False
        self.live = False
        return True

    def recover(self) -> None:
        """`recover`: a new daemon takes over from one that died, or left."""
        [served] = self._command("recover", "--json").json()["recovered"]
        self.pid, self.live = served["pid"], True

    def upgrade(self) -> float:
        """`upgrade`; how long its requests waited, in seconds."""
        [served] = self._command("upgrade", "--json").json()["upgraded"]
        self.pid = served["pid"]
        pause_s: float = served["pause_s"]
        return pause_s

    def _command(self, word: str, *options: str) -> Outcome:
        """A command on this device, which must succeed; its daemons get their environment."""
        return Running([word, self.name, *options], environment=self.environment).checked()

    def reopen(self, **changes: object) -> Device:
        """Stop cleanly, then start with the options of before and these changes."""
        self.stop()
        return self.start(**changes)

    def _end_starting(self, running: Running) -> None:
        if not running.done:
            self._undo.heal()
            running.process.kill()
            running.outcome()

    # -- asking --

    def status(self) -> dict[str, Any]:
        """What the daemon says of itself."""
        answer: dict[str, Any] = self.call("status")
        return answer

    def stripes(self) -> dict[str, int]:
        """{"total", "hydrated", "committed"}"""
        counts: dict[str, int] = self.status()["stripes"]
        return counts

    def _connects(self, sock: socket.socket) -> bool:
        """Whether there is room for one more (else EAGAIN, unix(7))."""
        try:
            sock.connect(str(RUN_ROOT / self.name / "control.sock"))
        except BlockingIOError:
            return False
        return True

    def call(self, method: str, params: object = None, timeout_s: float = 10.0) -> Any:
        """One request on the control socket; its result."""
        request = {"jsonrpc": "2.0", "id": 1, "method": method}
        if params is not None:
            request["params"] = params
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(timeout_s)
            until(lambda: self._connects(sock), "room in the control socket's queue", timeout_s)
            sock.sendall(json.dumps(request).encode() + b"\n")
            answer = json.loads(_one_object(sock))
        assert "result" in answer, f"{method}: {answer}"
        return answer["result"]

    @property
    def running(self) -> bool:
        """Whether the daemon's process is there."""
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):  # the latter amid reading
            return False
        return state != "Z"

    def hydrate(
        self, *, run: bool | None = None, rate: int | Literal["max"] | None = None,
    ) -> dict[str, Any]:
        """Start or pause background hydration, or set its rate; the status after it."""
        said = {"run": run, "rate": rate}
        params = {key: value for key, value in said.items() if value is not None}
        answer: dict[str, Any] = self.call("hydrate", params)
        return answer

    def wait_until_independent(self, timeout_s: float = 30.0) -> dict[str, Any]:
        """Wait until the image is needed no more; return the status."""
        return until(
            lambda: status if (status := self.status())["independent"] else {},
            f"{self.name}: independent of its image", timeout_s,
        )

    def wait_until_committed(self, timeout_s: float = 15.0) -> dict[str, int]:
        """Wait for the ticks to make all durable that the base has; return the counts."""
        def committed() -> dict[str, int] | None:
            counts = self.stripes()
            return counts if counts["committed"] == counts["hydrated"] else None

        return until(committed, f"{self.name}: all committed", timeout_s) or {}

    def open(self, flags: int = os.O_RDWR) -> DirectFile:
        """Open the disk for direct I/O; flags may be O_RDONLY, O_RDWR | O_DSYNC, …"""
        return DirectFile(self.node, flags)

    # -- the end --

    def remove(self) -> None:
        """Take away what is left of it, whatever has happened; tell of a daemon that fell over."""
        if self.pid < 0:
            return
        fell = self.live and not self.running
        log = self.log()
        self._undo.heal()
        with contextlib.suppress(ConnectionError, FileNotFoundError, AssertionError, TimeoutError):
            if self.live and not fell:
                print(f"{self.name} at the end: {json.dumps(self.status())}")
        print(f"{self.name}, its log:\n{log}")
        table = self.table()
        for device in all_devices():
            if device.name == self.name:
                take_away(device, force=True)
        if table is not None and not self.live:
            # Of a daemon that a test has killed: it is kept, for writes that nobody wants any more.
            table.unlink(missing_ok=True)
        assert not fell, f"the daemon of {self.name} ended by itself: {log[-2000:]}"

    def table(self) -> Path | None:
        """The file that tells, until the disk is opened again, what the base has."""
        try:
            state = json.loads((RUN_ROOT / self.name / "state.json").read_bytes())
        except (OSError, ValueError):
            return None
        return Path(state["table"]) if state.get("table") else None

    def log(self) -> str:
        """The daemon's log as far as there is one."""
        try:
            return (RUN_ROOT / self.name / "log").read_text(errors="replace")
        except OSError:
            return ""

    def describe_threads(self) -> str:
        """Where the daemon's threads are in the kernel."""
        rows = []
        for task in sorted(Path(f"/proc/{self.pid}/task").glob("*")):
            with contextlib.suppress(OSError):
                words = (task / "comm").read_text().strip()
                rows.append(f"{task.name} {words}: {(task / 'wchan').read_text()}")
                rows.append((task / "stack").read_text())
        return "\n".join(rows)


def take_away(device: runtime.Device, *, force: bool) -> None:
    """What `del` does, without the time that it takes to start it: a third of a small test's."""
    timeout_s = FORCED_TIMEOUT_S if force else DEFAULT_TIMEOUT_S
    remove_device(device, force=force, timeout_s=timeout_s)


class Ubi:
    """Makes devices with the run's own prefix. Every one of them is gone at the test's end."""

    def __init__(
        self, undo: Undo, prefix: str, limit_s: float, *, data_path: str = "auto",
        environment: dict[str, str] | None = None,
    ) -> None:
        self._undo = undo
        self._prefix = prefix
        self._data_path = data_path
        self._environment = environment or {}
        self.devices: list[Device] = []
        self._rescue = threading.Timer(limit_s, self.rescue)
        self._rescue.daemon = True
        self._rescue.start()
        self.rescued = False
        undo.callback(self._rescue.cancel)

    def add(self, image: object, base: object, **options: object) -> Device:
        """A live device. `image` (None: none) and `base` are paths, or an Image; options are
        DeviceOptions."""
        return self.new(image, base, **options).start()

    def new(self, image: object, base: object, **options: object) -> Device:
        """A device that is not started yet."""
        cpus = len(os.sched_getaffinity(0))
        assert min(2, int(str(options.get("queues", 1)))) <= cpus, "mark the test with cpus(2)"
        name = str(options.pop("name", f"{self._prefix}-{next(_numbers)}"))
        paths = {"base": str(base)}
        if image is not None:
            paths["image"] = str(getattr(image, "path", image))
        # A killed daemon's disk fails its requests, and its tests see that; those of recovery ask.
        options = {"recovery": False} | options
        if self._data_path != "auto":
            options = {"data_path": self._data_path} | options
        device = Device(name, paths | options, self._undo, self._environment)
        self.devices.append(device)
        self._undo.callback(device.remove)
        return device

    def refused(self, image: object, base: object, *, code: int, **options: object) -> str:
        """An `add` that must fail with this exit code; its one line of error."""
        device = self.new(image, base, **options)
        outcome = device.begin_start().outcome()
        assert outcome.code == code, f"exit {outcome.code}: {outcome.stdout}{outcome.stderr}"
        assert len(outcome.stderr.splitlines()) == 1, outcome.stderr
        assert outcome.stdout == ""
        return outcome.stderr.strip()

    def command(self, *words: object, environment: dict[str, str] | None = None) -> Outcome:
        """Any `ublk-ubi` command; look at its code."""
        return Running([str(word) for word in words], environment=environment).outcome()

    def rescue(self) -> None:
        """A test that hangs: say where, then let go whatever holds it. The test fails then."""
        self.rescued = True
        for device in self.devices:
            if device.live and device.running:
                print(f"{device.name} hangs; its threads:\n{device.describe_threads()}")
        with contextlib.suppress(OSError):
            Path("/proc/sysrq-trigger").write_text("w")
        self._undo.heal()
        for device in self.devices:
            if device.live:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(device.pid, signal.SIGKILL)


def arguments(name: str, options: dict[str, Any]) -> list[str]:
    """The words of `add` for DeviceOptions: {"stripe_size": 65536} → ["--stripe-size", "65536"]."""
    words = ["--name", name]
    for key, value in options.items():
        option = f"--{key.removesuffix('_s').replace('_', '-')}"
        if value is None:
            continue
        if isinstance(value, bool):
            yes, no = _FLAGS.get(key, (option, ""))
            words += [word for word in [yes if value else no] if word]
            if key == "format" and value:
                words.append("--yes")
        elif key == "mode":
            words += [option, f"{value:04o}"]
        else:
            words += [option, str(value)]
    return words


def _one_object(sock: socket.socket) -> bytes:
    """Read one JSON object off a stream."""
    text = b""
    for piece in iter(functools.partial(sock.recv, 1 << 16), b""):
        text += piece
        with contextlib.suppress(json.JSONDecodeError):
            json.loads(text)
            return text
    raise AssertionError(f"the daemon closed the connection after {text!r}")
