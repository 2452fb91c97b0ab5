"""One device from its files to a live disk and back: the order of things, and how to undo them.

    up      claim name → image → base (the fence) → fingerprint → metadata read and judged
            → ADD_DEV → metadata written → hydrator: last stripe, commit → queues → START_DEV → link
    down    STOP_DEV → queues end → hydrator commits → base closed → DEL_DEV → link and name go

Invariants
- What can be refused is refused before the first write to the base.
- Whatever fails on the way up is undone, in reverse: no device, no link, no name, no new file left.
- The base is closed only after the hydrator says that all is committed; else its table stays.
- Queue threads and hydrator have image, base and ublkc registered in their rings (the fence).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import time
import uuid
from typing import TYPE_CHECKING, Any

from ublk_ubi import links, runtime, zeroing
from ublk_ubi._device import DataPlane
from ublk_ubi._opener import Opener, Refused
from ublk_ubi.abi import Feature
from ublk_ubi.base import Base, open_base
from ublk_ubi.bounds import required_block_size
from ublk_ubi.config import resolve_owner
from ublk_ubi.control import Control, ControlError, ControlTimeout
from ublk_ubi.cpus import usable_cpus
from ublk_ubi.device_params import AddParams, DeviceParams, DiscardLimits
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.files import shown, size_text
from ublk_ubi.hydration import Hydration
from ublk_ubi.image import FINGERPRINT_SIZE, Image, fingerprint, open_image
from ublk_ubi.memory import private_bytes
from ublk_ubi.options import COPY_BUFFERS, DEFAULT_DEPTH, MAX_STRIPE_SIZE, METADATA_SIZE
from ublk_ubi.refusals import explain
from ublk_ubi.removal import delete_kernel_device
from ublk_ubi.table import TableHost, boot_id
from ublk_ubi.upkeep import Upkeep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ublk_ubi.device_params import DevInfo
    from ublk_ubi.options import DeviceOptions
    from ublk_ubi.runtime import Claim

SECTOR = 512
DEFAULT_STRIPE_SIZE = 1 << 20
START_TIMEOUT_S = 60.0
LET_GO_TIMEOUT_S = 2.0
OPEN_RETRY_S = 5.0
MAX_DISCARD = 1 << 30
ZERO_COPY = Feature.SUPPORT_ZERO_COPY | Feature.USER_COPY | Feature.AUTO_BUF_REG


class Session(TableHost):
    """A device being brought up, live, or being taken down. Not thread-safe: one caller at a time.

    `notice` gets lines that are worth telling on the way up.
    """

    def __init__(self, options: DeviceOptions, notice: Callable[[str], None]) -> None:
        super().__init__(runtime.tables_dir())
        self.options = options
        self.warnings: list[str] = []
        self.started_at = time.monotonic()
        self.claim: Claim
        self.image: Image | None = None
        self.base: Base
        self.opener: Opener
        self.plane: DataPlane
        self.hydration: Hydration
        self.upkeep: Upkeep
        self.info: DevInfo
        self.link = ""
        self.block_size = SECTOR
        self.size = 0
        self.is_live = False
        self._notice = notice
        self._control: Control
        self._undo = contextlib.ExitStack()
        self._cookie = int.from_bytes(os.urandom(8), "little")
        self._ublkc = -1
        self._stopped_disk = False
        self._missing: UbiError | None = None
        self._cpus: list[int] = []
        self._hydrator_cpus: list[int] = []

    # ---- up ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Bring the device up. Raises UbiError; then all is undone."""
        try:
            self._start()
        except BaseException:
            self._undo.close()
            raise

    def _start(self) -> None:
        options = self.options
        self._cpus = usable_cpus("--cpus", options.cpus)
        self._hydrator_cpus = usable_cpus("--hydrator-cpus", options.hydrator_cpus)
        control = self._undo.enter_context(Control.open())
        self._control = control
        features = control.get_features()
        if options.data_path == "zero-copy" and ZERO_COPY not in features:
            raise UbiError(
                "--data-path zero-copy: this kernel's ublk driver has none (Linux 6.16 has): drop "
                "--data-path",
            )
        self.claim = runtime.claim(options.name, base=os.path.realpath(options.base))
        try:
            self._clear_previous()
        except BaseException:
            self.claim.abandon()  # what could not be cleared stays listed, as a dead device
            raise
        self._undo.callback(self.claim.release)
        self._open_files()
        self._open_base(features)
        self._start_threads()
        self._go_live()
        self.upkeep.start()
        self._undo.callback(self.upkeep.stop)
        if options.hydrate:
            self.hydration.start()
        self.claim.write_options(options)
        self.base.keep()
        self.is_live = True
        self._undo.pop_all()

    def _clear_previous(self) -> None:
        """Remove what a dead daemon left under this name, once its last writes have landed."""
        previous = self.claim.previous
        if previous is not None and previous.id is not None:
            dead = runtime.Device(
                name=self.claim.name, folder=self.claim.folder, alive=False, state=previous,
            )
            delete_kernel_device(
                dead, previous, force=False, timeout_s=self.options.fence_timeout_s,
            )
            links.remove_link(self.claim.name, previous.id)

    def _open_files(self) -> None:
        """Image and base, opened and locked; nothing of them is changed."""
        options = self.options
        self._open_image()
        stripe = options.stripe_size or MAX_STRIPE_SIZE
        self.base = open_base(
            options.base,
            image=self.image,
            size=options.size,
            create_data_size=-(-self.image.size // stripe) * stripe if self.image else 0,
            fence_timeout_s=options.fence_timeout_s,
            holder=runtime.holder_of,
            notice=self._notice,
        )
        self._undo.callback(self.base.discard_if_created)
        needed = required_block_size(self.image, self.base)
        if options.block_size is not None and options.block_size < needed:
            raise UbiError(
                f"--block-size {options.block_size} is smaller than the {needed} bytes that image "
                "or base need: drop --block-size",
            )
        self.block_size = options.block_size or needed
        self.size = (self.base.size - METADATA_SIZE) // self.block_size * self.block_size
        self.warnings += self.image.warnings if self.image else []
        self.warnings += self.base.warnings

    def _open_image(self) -> None:
        """Open the image. A base that has all of it needs none: its metadata will tell."""
        options = self.options
        if options.image is None:
            return
        try:
            self.image = open_image(
                options.image, image_format=options.image_format, cache=options.image_cache,
            )
        except UbiError as error:
            if os.path.lexists(options.image) or not os.path.exists(options.base):
                raise
            self._missing = error
        else:
            self._undo.callback(self.image.close)

    def _open_base(self, features: Feature) -> None:
        """Judge the metadata; make a ublk device; write."""
        self._features = features
        sync_fd = self.base.reopen_for_sync(1)[0]
        self.opener = Opener(
            base_fd=self.base.fd,
            sync_fd=sync_fd,
            base_bytes=self.base.size,
            image_bytes=self.image.size if self.image else 0,
            identity=(self.base.identity.device, self.base.identity.number),
            fingerprint=fingerprint(self.image.fd, self.image.size) if self.image
            else bytes(FINGERPRINT_SIZE),
            new_uuid=uuid.uuid4().bytes,
            boot_id=boot_id(),
            stripe_bytes=self.options.stripe_size or 0,
            default_stripe_bytes=DEFAULT_STRIPE_SIZE,
            format=self.options.format,
            adopt=self.options.adopt,
            force=self.options.force,
            force_stale=self.options.force_stale,
            no_image=self.image is None,
        )
        try:
            self.opener.open(self)
        except Refused as refused:
            raise self._missing or explain(
                refused.reason, self.opener, self.options, self.image, self.base,
            ) from None
        except OSError as error:
            raise UbiError(
                f"base {shown(self.base.path)}: its metadata cannot be read or written: "
                f"{error.strerror}; check its disk (see `dmesg`)",
            ) from None
        self._undo.callback(self._close_base_quietly)
        if self._missing is not None:
            self.warnings.append(
                f"image {shown(self.options.image or '')} is not there, and not needed: the base "
                "has all of it",
            )

    def _start_threads(self) -> None:
        """Hydrator first: it commits what was found before anybody is served."""
        info = self.info
        self._ublkc = open_patiently(f"/dev/ublkc{info.id}")
        self._undo.callback(self._close_ublkc)
        try:
            self.plane = DataPlane(
                self.opener,
                queues=info.queues,
                depth=info.depth,
                copy_on_read=self.options.copy_on_read,
                device_bytes=self.size,
                cache=self.options.cache,
                zero_copy=ZERO_COPY in info.flags,
                base_is_block=self.base.is_block,
                block_bytes=self.block_size,
            )
        except MemoryError:
            memory = info.queues * info.depth * self.opener.stripe_bytes
            raise UbiError(
                f"--queues {info.queues} and --depth {info.depth} with stripes of "
                f"{size_text(self.opener.stripe_bytes)} want up to {size_text(memory)} of memory, "
                "more than there is: use a smaller --depth",
            ) from None
        self._undo.callback(self._quit_threads)
        sync_fds = self.base.reopen_for_sync(info.queues + 1)
        image_fd = self.image.fd if self.image else -1
        self.plane.start_hydrator(
            image_fd, self.base.fd, sync_fds[-1], self._ublkc, set(self._hydrator_cpus) or None,
        )
        self._await(lambda: self._hydrator_is("live"), START_TIMEOUT_S, "hydrate its last stripe")
        for index in range(info.queues):
            cpus = {self._cpus[index % len(self._cpus)]} if self._cpus else None
            self.plane.start_queue(
                index, image_fd, self.base.fd, sync_fds[index], self._ublkc, cpus,
            )
        self._await(self._queues_run, START_TIMEOUT_S, "start its queues")
        self.hydration = Hydration(
            self.plane, rate=self.options.rate, min_free=self.options.min_free,
        )
        self.upkeep = Upkeep(self.plane, self.hydration, self.image, self.base, self._notice)

    def _go_live(self) -> None:
        control, info = self._control, self.info
        control.start_dev(info.id, os.getpid(), timeout_s=START_TIMEOUT_S)
        self._undo.callback(self._stop_disk)
        self._set_owner(info.disk_path)
        self.link = links.publish_link(self.claim.name, info.id)
        self._undo.callback(links.remove_link, self.claim.name, info.id)
        self.claim.write_state(self._state(live=True))

    def _set_owner(self, path: str) -> None:
        try:
            if self.options.owner is not None:
                os.chown(path, *resolve_owner(self.options.owner))
            os.chmod(path, self.options.mode)
        except OSError as error:
            raise UbiError(f"{path}: its owner or mode cannot be set: {error.strerror}") from None

    def _state(self, *, live: bool = False) -> runtime.State:
        return runtime.State(
            image=self._image_path,
            base=os.path.realpath(self.base.path),
            id=self.info.id,
            device=self.info.disk_path,
            link=self.link if live else None,
            size=self.size,
            table=self.path,
            base_identity=self.base.identity,
            cookie=self._cookie,
        )

    @property
    def _image_path(self) -> str | None:
        image = self.options.image
        return os.path.realpath(image) if image is not None else None

    # ---- what the lifecycle engine asks for -------------------------------------------------

    def before_write(self, opener: Opener) -> None:
        """Everything is checked; take the device id, the last thing that can be refused."""
        if opener.creating:
            self._check_tail()
        stripe = opener.stripe_bytes
        zero_copy = self.options.data_path != "copy" and ZERO_COPY in self._features
        with _signals_wait():  # an id that the kernel gave out is taken back by nobody else
            self.info = self._add_device(stripe, zero_copy=zero_copy)
            if zero_copy and ZERO_COPY not in self.info.flags:
                self._control.del_dev(self.info.id)
                if self.options.data_path == "zero-copy":
                    raise UbiError(
                        "--data-path zero-copy: the ublk driver did not grant it: drop --data-path",
                    )
                self.info = self._add_device(stripe, zero_copy=False)
            self._undo.callback(self._delete_device)
        self.claim.write_state(self._state())
        self._control.set_params(self.info.id, self._params(stripe))

    def _add_device(self, stripe: int, *, zero_copy: bool) -> DevInfo:
        """ADD_DEV, on one data path or the other."""
        options = self.options
        wanted = Feature.CMD_IOCTL_ENCODE
        if not options.partscan:
            wanted |= Feature.NO_AUTO_PART_SCAN
        if zero_copy:
            wanted |= ZERO_COPY
        default_depth = DEFAULT_DEPTH if zero_copy else min(DEFAULT_DEPTH, COPY_BUFFERS // stripe)
        try:
            return self._control.add_dev(AddParams(
                queues=options.queues,
                depth=options.depth or default_depth,
                max_io_bytes=stripe,
                flags=wanted & self._features,
                id=options.id,
                server_flags=self._cookie,
            ))
        except ControlError as error:
            if error.errno == errno.EEXIST:
                raise UbiError(
                    f"the id {options.id} is taken (/dev/ublkb{options.id}): give another --id, "
                    "or none",
                    Exit.BUSY,
                ) from None
            raise

    def _params(self, stripe: int) -> DeviceParams:
        """Describe the disk to the kernel."""
        cached = self.options.cache != "writethrough"
        alignment = max(self.base.alignment, self.image.alignment if self.image else 1)
        return DeviceParams(
            dev_sectors=self.size // SECTOR,
            max_sectors=stripe // SECTOR,
            chunk_sectors=stripe // SECTOR,
            logical_block_size=self.block_size,
            physical_block_size=max(4096, self.block_size),
            io_min=4096,
            io_opt=stripe,
            volatile_cache=cached,
            fua=cached,
            discard=DiscardLimits(
                granularity=4096,
                max_discard_sectors=MAX_DISCARD // SECTOR,
                max_write_zeroes_sectors=stripe // SECTOR,
            ),
            # Zero copy: image and base get the guest's own pages.
            dma_alignment=max(SECTOR, alignment) if ZERO_COPY in self.info.flags else None,
        )

    def zero_tail(self, opener: Opener) -> None:
        """Nobody may read through a new disk what was on this base before."""
        start, length = self._tail(opener)
        if length <= 0 or self.base.created or self.options.keep_old_data:
            return
        try:
            zeroing.zero(self.base.fd, start, length, is_block=self.base.is_block)
        except OSError as error:
            raise UbiError(
                f"base {shown(self.base.path)}: the {size_text(length)} behind its image cannot be "
                f"zeroed: {error.strerror}; --keep-old-data leaves them as they are",
            ) from None

    def created(self) -> None:
        """Make the name of a new base last."""
        self.base.sync_folder()

    def _tail(self, opener: Opener) -> tuple[int, int]:
        start = METADATA_SIZE + opener.image_stripes * opener.stripe_bytes
        return start, self.base.size // SECTOR * SECTOR - start

    def _check_tail(self) -> None:
        """Zeroing a large disk without help of the disk takes hours: only when told."""
        options, base = self.options, self.base
        _, length = self._tail(self.opener)
        if not base.is_block or length <= 0 or options.zero or options.keep_old_data:
            return
        if not zeroing.offloaded(base.fd):
            raise UbiError(
                f"base {shown(base.path)} is {size_text(length)} larger than its image, and what "
                "was written there before would be readable: --zero overwrites it (this may take "
                "long), --keep-old-data leaves it",
            )

    # ---- down -------------------------------------------------------------------------------

    def stop_disk(self, *, force: bool) -> None:
        """Take the disk away from its users; refused (busy) while it is open, but with `force`.

        Raises UbiError; TIMED_OUT when a request that the image or base does not answer holds it.
        """
        if self._stopped_disk:
            return
        if not force:
            self._refuse_if_open()
        if not self._stopped_disk:
            self._control.stop_dev(self.info.id)
            self._stopped_disk = True

    def take_back(self) -> None:
        """Take down a live device that nobody was told of: it cannot be served after all."""
        with contextlib.suppress(UbiError):
            self.stop_disk(force=True)
            self.finish()

    def _refuse_if_open(self) -> None:
        busy = UbiError(
            f"{self.claim.name} ({self.info.disk_path}) is in use: unmount or close it first, or "
            "take it away with --force",
            Exit.BUSY,
        )
        if Feature.SAFE_STOP_DEV in self._features:
            try:
                self._control.try_stop_dev(self.info.id)
            except ControlError as error:
                if error.errno == errno.EBUSY:
                    raise busy from None
                raise
            self._stopped_disk = True
            return
        try:
            os.close(os.open(self.info.disk_path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise busy from None

    def finish(self) -> UbiError | None:
        """After the disk is gone: commit, close the base, remove every trace.

        Returns what could not be made durable, or not be removed, as an error to show: the table
        then stays, or the name, as a dead device's that `del` clears up.
        """
        self.upkeep.stop()
        problem = self._commit()
        self._quit_threads()
        if problem is None:
            problem = self._close_base()
        self._close_ublkc()
        links.remove_link(self.claim.name, self.info.id)
        if self.table is not None:
            self.table.close()
        self.base.close()
        if self.image is not None:
            self.image.close()
        try:
            self._control.del_dev(self.info.id, timeout_s=LET_GO_TIMEOUT_S)
        except ControlError as error:
            # Our own I/O is over. Who has the dead disk open or mounted keeps its id, no more.
            if not isinstance(error, ControlTimeout) and error.errno != errno.ENODEV:
                self.claim.abandon()
                return problem or error
        finally:
            self._control.close()
        self.claim.release()
        return problem

    def _commit(self) -> UbiError | None:
        """Queues end by themselves once the disk is gone; then the hydrator commits."""
        self._await(self._queues_stopped, START_TIMEOUT_S, "end its queues")
        self.plane.stop_hydrator()
        self._await(lambda: self._hydrator_is("stopped"), None, "commit")
        _, status = self.plane.hydrator_state()
        if status < 0:
            return UbiError(
                f"{self.claim.name}: its last writes could not be made durable on "
                f"{shown(self.base.path)}: {os.strerror(-status)}; the disk is gone, its record "
                "of writes is kept until this host restarts",
                Exit.DEGRADED,
            )
        return None

    def _close_base(self) -> UbiError | None:
        try:
            self.opener.close(self)
        except OSError as error:
            return UbiError(
                f"base {shown(self.base.path)} cannot be marked closed: {error.strerror}; its "
                "record of writes is kept until this host restarts",
                Exit.DEGRADED,
            )
        return None

    # ---- undoing; each of these may come after a failure of any step ------------------------

    def _stop_disk(self) -> None:
        with contextlib.suppress(UbiError):
            self._control.stop_dev(self.info.id)

    def _delete_device(self) -> None:
        with contextlib.suppress(ControlError):
            self._control.del_dev(self.info.id)

    def _close_ublkc(self) -> None:
        if self._ublkc >= 0:
            os.close(self._ublkc)
            self._ublkc = -1

    def _quit_threads(self) -> None:
        self.plane.quit()
        if self.plane.join(START_TIMEOUT_S):
            self.plane.release()

    def _close_base_quietly(self) -> None:
        """On the way up nothing was acknowledged: a table that was made for nothing goes. One that
        was found may know of stripes that are not committed: it stays."""  # noqa: D205, D209
        if not self.opener.going_on:
            with contextlib.suppress(OSError, Refused):
                self.opener.close(self)
        if self.table is not None:
            self.table.close()

    # ---- waiting ----------------------------------------------------------------------------

    def _hydrator_is(self, wanted: str) -> bool:
        state, status = self.plane.hydrator_state()
        if state == "failed":
            image = shown(self._image_path or "no image")
            raise UbiError(
                f"{image} → {shown(self.base.path)}: the last stripe of the image cannot be copied "
                f"and committed: {os.strerror(-status)}; check both disks (see `dmesg`)",
            )
        return state == wanted

    def _queues_run(self) -> bool:
        states = [self.plane.queue_state(index) for index in range(self.info.queues)]
        for state, status in states:
            if state == "failed":
                raise UbiError(
                    f"no io_uring for a queue: {os.strerror(-status)}; see `ublk-ubi doctor`",
                )
        return all(state == "running" for state, _ in states)

    def _queues_stopped(self) -> bool:
        return all(
            self.plane.queue_state(index)[0] == "stopped" for index in range(self.info.queues)
        )

    def serves(self) -> bool:
        """Tell whether all queues run; if not, somebody else took the disk away."""
        return not any(
            self.plane.queue_state(index)[0] in ("stopped", "failed")
            for index in range(self.info.queues)
        )

    def _await(self, done: Callable[[], bool], timeout_s: float | None, what: str) -> None:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not done():
            left = 1.0 if deadline is None else min(1.0, deadline - time.monotonic())
            if left <= 0:
                raise UbiError(
                    f"{self.claim.name} did not {what} within {timeout_s:g} s: image or base does "
                    "not answer",
                    Exit.TIMED_OUT,
                )
            select.select([self.plane.notify_fd], [], [], left)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.plane.notify_fd)

    # ---- what it looks like -----------------------------------------------------------------

    def degraded(self) -> str | None:
        """Tell why the device is not what it should be, if so."""
        base = shown(self.base.path)
        if self.plane.latch:
            return (
                f"an fdatasync of {base} failed ({os.strerror(self.plane.latch)}): no flush "
                "succeeds until the device is added anew"
            )
        if self.upkeep.image_problem is not None:
            return f"image {shown(self._image_path or '')} {self.upkeep.image_problem}"
        return None

    @property
    def independent(self) -> bool:
        """The base has all of the image, durably, and no thread holds the image open."""
        return self.plane.hydrated and (self.image is None or self.image.fd < 0)

    def release_image(self) -> bool:
        """Let go of the image once nobody needs it; True when that has just happened."""
        if self.image is None or self.image.fd < 0 or not self.plane.hydrated:
            return False
        self.upkeep.forget_image()
        if not self.plane.image_dropped:
            self.plane.drop_image()
            return False
        self.image.close()
        return True

    def status(self, state: str) -> dict[str, Any]:
        """Return the status as JSON has it (docs: README, `status --json`)."""
        stripes = self.plane.stripes()
        counters = self.plane.counters()
        counters["hydration"] = self.hydration.describe(counters["hydration"])
        stripe = self.opener.stripe_bytes
        return {
            "schema": 1,
            "name": self.claim.name,
            "device": self.info.disk_path,
            "link": self.link,
            "id": self.info.id,
            "pid": os.getpid(),
            "state": state,
            "degraded": self.degraded(),
            "image": self._image_path,
            "image_size": self.opener.recorded_image_bytes,
            "independent": self.independent,
            "base": os.path.realpath(self.base.path),
            "size": self.size,
            "stripe_size": self.opener.stripe_bytes,
            "block_size": self.block_size,
            "queues": self.info.queues,
            "depth": self.info.depth,
            "copy_on_read": self.options.copy_on_read,
            "image_cache": self.options.image_cache,
            "image_direct": self.image.direct if self.image is not None else None,
            "base_direct": self.base.direct,
            "data_path": "zero-copy" if ZERO_COPY in self.info.flags else "copy",
            "cache": self.options.cache,
            "uuid": str(uuid.UUID(bytes=self.opener.uuid)),
            "generation": self.opener.generation,
            "stripes": stripes,
            "space": {
                "allocated": self.upkeep.allocated,
                "hydrated": stripes["hydrated"] * stripe,
                "needed": (stripes["total"] - stripes["hydrated"]) * stripe,
            },
            "memory": private_bytes(),
            "io": self.plane.io(),
            **counters,
            "uptime_s": round(time.monotonic() - self.started_at, 3),
        }


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Have the signals that end a daemon come after what is done here, not amid it."""
    before = signal.pthread_sigmask(
        signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP),
    )
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def open_patiently(path: str) -> int:
    """Open ublkcN read-write; udev may hold it for a moment. Raises UbiError."""
    deadline = time.monotonic() + OPEN_RETRY_S
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOENT) or time.monotonic() > deadline:
                raise UbiError(f"{path} cannot be opened: {error.strerror}") from None
            time.sleep(0.01)
        else:
            fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
            return fd
