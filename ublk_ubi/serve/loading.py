"""--json: a configuration as SPDK's and bdev_ubi's are, read whole, checked, then done.

    {"subsystems": [{"subsystem": "bdev", "config": [{"method": …, "params": {…}}, …]}, …]}

Calls are done in order, bdev_ubi_create's side by side where they follow one another. The first
that fails ends it, and what was made for it is taken away again: a configuration is there, or not.
When the server is asked to end meanwhile, what is there stays: the next one goes on with it.
"""

from __future__ import annotations

import os
import stat
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.serve.methods import IGNORED, VHOST

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ublk_ubi.serve.jobs import Jobs
    from ublk_ubi.serve.methods import Methods

MAX_FILE = 16 << 20
MAX_AT_ONCE = 256
CREATES = ("bdev_aio_create", "bdev_uring_create", "bdev_ubi_create")


class Call(NamedTuple):
    """One call; `where` names it in messages."""

    method: str
    params: Any
    where: str


class _Entry(msgspec.Struct):
    method: str
    params: Any = None


class _Subsystem(msgspec.Struct):
    subsystem: str
    config: list[_Entry | list[_Entry]] | None = None


class _File(msgspec.Struct):
    subsystems: list[_Subsystem]


def read(path: str, *, with_spdk: bool, report: Callable[[str], None]) -> list[Call]:
    """Read a configuration; tell what is left out. Raises UbiError (usage)."""
    try:
        file = msgspec.json.decode(_read(path), type=_File)
    except OSError as error:
        raise UbiError(f"--json {path}: {error.strerror}", Exit.USAGE) from None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise UbiError(
            f"--json {path} is no configuration of SPDK's form: {error}", Exit.USAGE,
        ) from None
    calls = []
    for call in _calls(path, file):
        if call.method == CREATES[-1] and isinstance(call.params, dict) and (
            call.params.get("format")
        ):
            raise UbiError(
                f"{call.where}: format would make the disk anew at every boot: give it once, by a "
                "call to the socket", Exit.USAGE,
            )
        if call.method in CREATES or (with_spdk and VHOST.fullmatch(call.method)):
            calls.append(call)
        elif VHOST.fullmatch(call.method):
            report(f"{call.where}: {call.method} is SPDK's to do, and is left out: --spdk SOCKET "
                   "has it done")
        elif IGNORED.fullmatch(call.method):
            report(f"{call.where}: {call.method} sets what is not here, and is left out")
        else:
            known = ", ".join(CREATES)
            raise UbiError(
                f"{call.where}: unknown method {call.method[:64]!r}: use {known} and vhost_*",
                Exit.USAGE,
            )
    return calls


def _calls(path: str, file: _File) -> Iterator[Call]:
    for subsystem in file.subsystems:
        entries: list[_Entry] = []
        for entry in subsystem.config or ():
            entries += entry if isinstance(entry, list) else [entry]
        for number, one in enumerate(entries, 1):
            where = f"--json {path}: {subsystem.subsystem[:64]} call {number}"
            yield Call(one.method, {} if one.params is None else one.params, where)


def _read(path: str) -> bytes:
    # Non-blocking, so that a FIFO by mistake does not hang.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UbiError(f"--json {path} is not a regular file", Exit.USAGE)
        data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise UbiError(f"--json {path} is larger than 16 MiB", Exit.USAGE)
    return data


class Loader:
    """Does the calls, on a thread of its own; `done` hears there how it went."""

    def __init__(
        self, calls: list[Call], methods: Methods, jobs: Jobs,
        done: Callable[[UbiError | None], None],
    ) -> None:
        self._calls = calls
        self._methods = methods
        self._jobs = jobs
        self._done = done
        self._lock = threading.Lock()
        self._failed: UbiError | None = None
        self._made: list[tuple[str, Callable[[], object]]] = []
        self.busy = False
        """Begun, and not done; what it has made may be being taken back."""

    def start(self) -> None:
        """Begin."""
        self.busy = True
        threading.Thread(target=self._run, name="load", daemon=True).start()

    def _run(self) -> None:
        for group in _groups(self._calls):
            self._do_at_once(group)
            if self._failed is not None:
                if not self._jobs.ending:
                    self._take_back()
                break
        self._done(self._failed)
        self.busy = False

    def _do_at_once(self, calls: list[Call]) -> None:
        """Do calls side by side, as far as there are threads; return when all are done."""
        places = threading.Semaphore(0)
        for call in calls:
            def done(_result: object, error: UbiError | None, call: Call = call) -> None:
                with self._lock:
                    if error is not None and self._failed is None:
                        self._failed = UbiError(f"{call.where}: {error.message}", error.code)
                places.release()

            try:
                self._jobs.put("make", lambda call=call: self._do(call), done)  # type: ignore[misc]
            except UbiError as error:
                done(None, error)
        for _ in calls:
            places.acquire()

    def _do(self, call: Call) -> None:
        if self._failed is not None:
            return
        made = self._methods.configure(call.method, call.params)
        if made is not None:
            with self._lock:
                self._made.append(made)

    def _take_back(self) -> None:
        for name, take_back in reversed(self._made):
            try:
                take_back()
            except UbiError as error:
                assert self._failed is not None
                self._failed = UbiError(
                    f"{self._failed.message}; and {name} stays: {error.message}", self._failed.code,
                )


def _groups(calls: list[Call]) -> Iterator[list[Call]]:
    """Cut into calls that may be done side by side: disks that follow one another."""
    group: list[Call] = []
    for call in calls:
        alike = group and call.method == group[0].method == "bdev_ubi_create"
        if group and (not alike or len(group) == MAX_AT_ONCE):
            yield group
            group = []
        group.append(call)
    if group:
        yield group
