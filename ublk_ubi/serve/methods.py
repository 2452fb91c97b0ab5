"""The calls: their names, their parameters, and what does them.

Names and parameters are SPDK's and bdev_ubi's where those have them, so that their clients, scripts
and configuration work as they are; what they do not have is called bdev_ubi_*.
"""

from __future__ import annotations

import contextlib
import errno
import re
import time
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import msgspec

from ublk_ubi import __version__
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.options import MAX_RATE, MIN_RATE
from ublk_ubi.rpc import RpcError
from ublk_ubi.rpc_server import INVALID_PARAMS, Deferred, NoParams
from ublk_ubi.serve import bdevs
from ublk_ubi.serve.book import UbiParams, refuse
from ublk_ubi.serve.disks import MAKING, AioParams, Disks, UringParams, coded

if TYPE_CHECKING:
    from collections.abc import Callable

    from ublk_ubi.serve.jobs import Jobs

VHOST = re.compile(r"vhost_[a-z0-9_]{1,60}")
VHOST_METHODS = (
    "vhost_create_blk_controller", "vhost_create_scsi_controller", "vhost_start_scsi_controller",
    "vhost_scsi_controller_add_target", "vhost_scsi_controller_remove_target",
    "vhost_get_controllers", "vhost_delete_controller", "vhost_controller_set_coalescing",
)
BASES: dict[str, type[AioParams | UringParams]] = {
    "bdev_aio_create": AioParams, "bdev_uring_create": UringParams,
}
MAX_TIMEOUT_MS = 86_400_000
POLL_S = 0.05
MOST_AWAITED = 128

# Of SPDK's own methods that a configuration may have: nothing of what they set is here.
IGNORED = re.compile(r"[a-z0-9_]*_set_options|bdev_examine|bdev_wait_for_examine|"
                     r"bdev_set_qos_limit|framework_set_scheduler|virtio_blk_create_transport")


class Strict(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Parameters with no others beside them."""


class ByName(Strict):
    """One bdev."""

    name: str


class GetBdevs(Strict):
    """Parameters of `bdev_get_bdevs`; `timeout` is milliseconds to wait for `name`."""

    name: str | None = None
    timeout: Annotated[int, msgspec.Meta(ge=0, le=MAX_TIMEOUT_MS)] = 0


class GetMethods(Strict):
    """Parameters of `rpc_get_methods`: all are callable at any time, and none has an alias."""

    current: bool = False
    include_aliases: bool = False


class GetConfig(Strict):
    """Parameters of `framework_get_config`."""

    name: str
    with_batches: bool = False


class Kill(Strict):
    """Parameters of `spdk_kill_instance`."""

    sig_name: Literal["SIGINT", "SIGTERM", "SIGQUIT", "SIGHUP", "SIGKILL"]


class StatusParams(Strict):
    """Parameters of `bdev_ubi_status`: all disks without `name`."""

    name: str | None = None


class HydrateParams(Strict):
    """Parameters of `bdev_ubi_hydrate`; `rate` is bytes a second."""

    name: str
    run: bool = True
    rate: Annotated[int, msgspec.Meta(ge=MIN_RATE, le=MAX_RATE)] | Literal["max"] | None = None


class WaitParams(Strict):
    """Parameters of `bdev_ubi_wait`; without `timeout_s` as long as it takes."""

    name: str
    timeout_s: Annotated[float, msgspec.Meta(ge=0, le=1e9)] | None = None


class ResizeParams(Strict):
    """Parameters of `bdev_ubi_resize`; `size` is bytes, without it all that the base has."""

    name: str
    size: Annotated[int, msgspec.Meta(gt=0, le=(1 << 63) - 1)] | None = None
    keep_old_data: bool = False


class _Awaited(NamedTuple):
    name: str
    deadline: float
    answer: Deferred


class Methods:
    """The table. `loaded` is set once the configuration has been; `end` ends the process."""

    def __init__(self, disks: Disks, jobs: Jobs, end: Callable[[], None]) -> None:
        self._disks = disks
        self._jobs = jobs
        self._end = end
        self._awaited: list[_Awaited] = []
        self._uninitialized: list[Deferred] = []
        self.loaded = False
        self.table: dict[str, tuple[Any, Callable[[Any], object]]] = {
            "rpc_get_methods": (GetMethods, self._get_methods),
            "spdk_get_version": (NoParams, self._get_version),
            "spdk_kill_instance": (Kill, self._kill),
            "framework_wait_init": (NoParams, self._wait_init),
            "framework_get_subsystems": (NoParams, lambda _params: bdevs.SUBSYSTEMS),
            "framework_get_config": (GetConfig, self._on("look", self._get_config)),
            "save_config": (NoParams, self._on(
                "look", lambda _params: bdevs.configuration(disks.book),
            )),
            "bdev_get_bdevs": (GetBdevs, self._get_bdevs),
            "bdev_wait_for_examine": (NoParams, lambda _params: True),
            "bdev_aio_create": (AioParams, self._on("steer", disks.create_base)),
            "bdev_aio_delete": (ByName, self._on(
                "make", lambda params: disks.delete_base(params.name, "aio"),
            )),
            "bdev_uring_create": (UringParams, self._on("steer", disks.create_base)),
            "bdev_uring_delete": (ByName, self._on(
                "make", lambda params: disks.delete_base(params.name, "uring"),
            )),
            "bdev_ubi_create": (UbiParams, self._create),
            "bdev_ubi_delete": (ByName, self._on(
                "make", lambda params: disks.delete(params.name),
            )),
            "bdev_ubi_status": (StatusParams, self._on(
                "ask", lambda params: disks.status(params.name),
            )),
            "bdev_ubi_hydrate": (HydrateParams, self._on(
                "steer",
                lambda params: disks.hydrate(params.name, run=params.run, rate=params.rate),
            )),
            "bdev_ubi_wait": (WaitParams, self._wait),
            "bdev_ubi_recover": (ByName, self._on(
                "make", lambda params: disks.recover(params.name),
            )),
            "bdev_ubi_upgrade": (ByName, self._on(
                "make", lambda params: disks.upgrade(params.name),
            )),
            "bdev_ubi_resize": (ResizeParams, self._on("make", lambda params: disks.resize(
                params.name, params.size, keep_old_data=params.keep_old_data,
            ))),
        }

    def other(self, name: str) -> tuple[Any, Callable[[Any], object]] | None:
        """Pass vhost calls on to SPDK, where there is one."""
        if self._disks.spdk_socket is None or not VHOST.fullmatch(name):
            return None
        return dict[str, Any], self._on("steer", lambda params: self._disks.forward(name, params))

    # what a configuration may call, on the caller's thread: see loading.py ---------------------

    def configure(self, name: str, params: object) -> tuple[str, Callable[[], object]] | None:
        """Do a call of a configuration; what is there already will do. Raises UbiError.

        Returns the name of what was made, and what takes it back; None if nothing was.
        """
        disks = self._disks
        try:
            if name == "bdev_ubi_create":
                disk = msgspec.convert(params, UbiParams)
                was_there = disks.has(disk.name)
                disks.create(disk)
                return None if was_there else (disk.name, lambda: disks.delete(disk.name))
            if name in BASES:
                base = msgspec.convert(params, BASES[name])
                was_there = disks.has(base.name)
                disks.create_base(base, found_ok=True)
                return None if was_there else (base.name, lambda: disks.book.drop_base(base.name))
            given = msgspec.convert(params, dict[str, Any])
            ctrlr = str(given.get("ctrlr"))
            was_there = name not in MAKING or disks.has_controller(ctrlr)
            disks.forward(name, given, found_ok=True)
            return None if was_there else (ctrlr, lambda: disks.take_controller(ctrlr))
        except msgspec.ValidationError as error:
            raise UbiError(f"{name}: {error}", Exit.USAGE) from None

    # the loop's part ---------------------------------------------------------------------------

    def tick(self) -> float | None:
        """Answer those who waited for a bdev; the seconds until the next look, if any."""
        now = time.monotonic()
        names = {awaited.name for awaited in self._awaited}
        looks = {name: bdevs.one_bdev(self._disks.book, name) for name in names}
        for awaited in self._awaited[:]:
            found = looks[awaited.name]
            if found is not None:
                awaited.answer.resolve([found])
            elif now >= awaited.deadline:
                awaited.answer.fail(_no_bdev(awaited.name))
            elif awaited.answer.wanted:
                continue
            self._awaited.remove(awaited)
        return POLL_S if self._awaited else None

    def initialized(self) -> None:
        """Tell those who wait that the configuration has been loaded."""
        self.loaded = True
        for answer in self._uninitialized:
            answer.resolve(True)
        self._uninitialized.clear()

    def end(self) -> None:
        """Tell those who wait for what will not come any more."""
        error = refuse(errno.ESHUTDOWN, "serve is ending", Exit.BUSY)
        for answer in [*self._uninitialized, *(awaited.answer for awaited in self._awaited)]:
            answer.fail(error)
        self._uninitialized.clear()
        self._awaited.clear()

    # the calls ---------------------------------------------------------------------------------

    def _on(self, lane: str, work: Callable[[Any], object]) -> Callable[[Any], object]:
        """Do it on a thread, with errors as SPDK has them."""
        def handler(params: Any) -> Deferred:
            try:
                return self._jobs.run(lane, lambda: _with_codes(work, params))
            except UbiError as error:
                raise coded(error) from None

        return handler

    def _get_methods(self, _params: GetMethods) -> list[str]:
        return [*self.table, *(VHOST_METHODS if self._disks.spdk_socket is not None else ())]

    def _get_version(self, _params: NoParams) -> dict[str, Any]:
        major, minor, patch = (int(part) for part in __version__.split(".")[:3])
        fields = {"major": major, "minor": minor, "patch": patch, "suffix": ""}
        return {"version": f"ublk-ubi v{__version__}", "fields": fields}

    def _kill(self, _params: Kill) -> bool:
        self._end()
        return True

    def _wait_init(self, _params: NoParams) -> object:
        if self.loaded:
            return True
        self._uninitialized.append(Deferred())
        return self._uninitialized[-1]

    def _get_config(self, params: GetConfig) -> object:
        found = bdevs.subsystem_config(self._disks.book, params.name)
        if found is None:
            raise RpcError(f"Subsystem '{params.name[:64]}' not found", INVALID_PARAMS)
        return found

    def _get_bdevs(self, params: GetBdevs) -> object:
        if params.name is None or not params.timeout:
            return self._on("look", self._look)(params)
        if len(self._awaited) >= MOST_AWAITED:
            raise refuse(errno.EBUSY, "too many wait for bdevs already: try again later", Exit.BUSY)
        deadline = time.monotonic() + params.timeout / 1000
        self._awaited.append(_Awaited(params.name, deadline, Deferred()))
        return self._awaited[-1].answer

    def _create(self, params: UbiParams) -> Deferred:
        """Take name and base at once: who asks for the same next is told so at once, too."""
        try:
            base = self._disks.begin(params)
        except UbiError as error:
            raise coded(error) from None
        try:
            return self._jobs.run("make", lambda: self._disks.make(params, base))
        except UbiError as error:
            self._disks.book.end(params.name, made=False)
            raise coded(error) from None

    def _look(self, params: GetBdevs) -> object:
        if params.name is None:
            return bdevs.all_bdevs(self._disks.book)
        found = bdevs.one_bdev(self._disks.book, params.name)
        if found is None:
            raise _no_bdev(params.name)
        return [found]

    def _wait(self, params: WaitParams) -> Deferred:
        answer = Deferred()
        with contextlib.suppress(RpcError):
            return self._jobs.run("wait", lambda: _with_codes(
                lambda given: self._disks.wait(given.name, given.timeout_s, lambda: answer.wanted),
                params,
            ), answer)
        raise refuse(errno.EBUSY, "too many wait already: try again later", Exit.BUSY)


def _with_codes(work: Callable[[Any], object], params: Any) -> object:
    try:
        return work(params)
    except UbiError as error:
        raise coded(error) from None


def _no_bdev(name: str) -> RpcError:
    return refuse(errno.ENODEV, f"No such device: bdev {name[:64]!r}", Exit.NO_DEVICE)
