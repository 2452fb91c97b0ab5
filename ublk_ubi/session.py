"""One device from its files to a live disk and back: the order of things, and how to undo them.

    up      claim name → image → base (the fence) → fingerprint → metadata read and judged
            → ADD_DEV → metadata written → hydrator: last stripe, commit → queues → START_DEV → link
    again   the same, but START_USER_RECOVERY for ADD_DEV and END_USER_RECOVERY for START_DEV
    down    STOP_DEV → queues end → hydrator commits → base closed → DEL_DEV → link and name go
    leave   requests under way end → threads end → all files closed; disk, link and name stay

Before threads start and once the disk is live the process shuts itself in (sandbox.py): then no
file of the host can be opened any more. One that takes back what it has left (`before`) reaches
image and base by what it kept of them.

Invariants
- What can be refused is refused before the first write to the base.
- Whatever fails on the way up is undone, in reverse: no device, no link, no name, no new file left.
  A disk that was to be taken over stays as it was found, for the next to try.
- The base is closed only after the hydrator says that all is committed; else its table stays.
- Queue threads and hydrator have image, base and ublkc registered in their rings (the fence).
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import time
import uuid
from typing import TYPE_CHECKING

import msgspec

from ublk_ubi import geometry, growth, links, new_base, runtime, udev
from ublk_ubi._device import DataPlane
from ublk_ubi._opener import Opener, Refused
from ublk_ubi.base import Base, open_base
from ublk_ubi.bounds import block_size
from ublk_ubi.config import with_owner_by_number
from ublk_ubi.control import Control, ControlError, ControlTimeout
from ublk_ubi.cpus import usable_cpus
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.faults import Faults, errors_of
from ublk_ubi.files import direct_alignment, shown, size_text
from ublk_ubi.hydration import Hydration, as_told
from ublk_ubi.image import FINGERPRINT_SIZE, Image, fingerprint, open_image
from ublk_ubi.kernel_device import SECTOR, START_TIMEOUT_S, KernelDevice
from ublk_ubi.log import warn
from ublk_ubi.options import MAX_STRIPE_SIZE, METADATA_SIZE, places_of
from ublk_ubi.refusals import explain, not_yet_forced
from ublk_ubi.removal import delete_kernel_device, find_kernel_device, user_of
from ublk_ubi.sandbox import Sandbox, reachable
from ublk_ubi.signals import signals_wait
from ublk_ubi.systemd import own_unit
from ublk_ubi.table import TableHost, boot_id
from ublk_ubi.upkeep import Upkeep

if TYPE_CHECKING:
    from collections.abc import Callable

    from ublk_ubi.device_params import DevInfo
    from ublk_ubi.options import DeviceOptions
    from ublk_ubi.runtime import Claim

DEFAULT_STRIPE_SIZE = 1 << 20
LET_GO_TIMEOUT_S = 2.0
DRAIN_S = 0.3


class Session(TableHost):
    """A device being brought up, live, or being taken down. Not thread-safe: one caller at a time.

    `notice` gets lines that are worth telling on the way up. `control` is there already, or opened.
    `before` is the session of this process that left the disk.
    """

    def __init__(
        self, options: DeviceOptions, notice: Callable[[str], None], control: Control | None = None,
        before: Session | None = None,
    ) -> None:
        super().__init__(runtime.tables_dir())
        self.options = options
        self.warnings: list[str] = []
        self.started_at = time.monotonic()
        self.claim: Claim
        self.image: Image | None = None
        self._last: runtime.State | None = None  # of the daemon from which this one takes over
        self.base: Base
        self.opener: Opener
        self.plane: DataPlane
        self.hydration: Hydration
        self.upkeep: Upkeep
        self.device: KernelDevice
        self.link = ""
        self.block_size, self.size, self.recorded_size = SECTOR, 0, 0
        self.is_live = self._was_seen = False
        self._notice = notice
        self._control = control
        self._undo = contextlib.ExitStack()
        self._ublkc = -1
        self._missing: UbiError | None = None
        self._before = before
        self.sandbox: Sandbox = before.sandbox if before else Sandbox(notice)
        self.reach: dict[str, str] = before.reach if before else {}
        self.places: dict[str, str] = before.places if before else places_of(options)
        self._cpus: list[int] = []
        self._hydrator_cpus: list[int] = []

    # ---- up ---------------------------------------------------------------------------------

    @property
    def info(self) -> DevInfo:
        """What the kernel has granted."""
        return self.device.info

    def start(self, *, recover: bool = False) -> None:
        """Bring the device up; `recover`: the one that a dead daemon left.

        Raises UbiError; then all is undone.
        """
        try:
            self._start(recover=recover)
        except BaseException:
            self._undo.close()
            raise

    def _start(self, *, recover: bool) -> None:
        options = self.options
        told = self.warnings if recover else None  # requests wait: they are served anywhere
        self._cpus = usable_cpus("--cpus", options.cpus, told=told)
        self._hydrator_cpus = usable_cpus("--hydrator-cpus", options.hydrator_cpus, told=told)
        control = self._undo.enter_context(self._control or Control.open(fork=True))
        self.device = KernelDevice(control, options)
        # Who takes the disk over may not know the name.
        options = self.options = with_owner_by_number(options, self.device.owner)
        self.claim = runtime.claim(options.name, base=self.places["base"])
        try:
            self._meet_previous(recover=recover)
        except BaseException:
            self.claim.give_up()  # what could not be cleared stays listed, as a dead device
            raise
        taken_over = self.device.recovered
        self._last = self.claim.previous if taken_over else None
        if recover:  # while this daemon loaded, the one before may have been told otherwise
            options = self.options = as_told(options, self.claim.read("options.json"))
        self._undo.callback(self.claim.abandon if taken_over else self.claim.release)
        self._open_files()
        if taken_over:
            self.size, self.block_size = self.device.geometry(
                self.claim.name, self.size, self.block_size, options.fence_timeout_s,
            )
        self._open_base()
        control.spare()
        self.sandbox.enter()
        self._start_threads()
        self._go_live()
        if taken_over:  # by now it is this daemon's
            try:
                growth.record(self, self.recorded_size)
            except UbiError as error:
                self.warnings.append(error.message)
        self.sandbox.close(self.device.control, self.info)
        self.upkeep.start()
        self._undo.callback(self.upkeep.stop)
        if options.hydrate:
            self.upkeep.look_at_space()
            self.hydration.start()
        self.claim.write_options(options)
        self.base.keep()
        self.is_live = True
        self._undo.pop_all()

    def _meet_previous(self, *, recover: bool) -> None:
        """Take over what a dead daemon left under this name: told to, or because somebody uses it.

        Otherwise remove it, once its last writes have landed.
        """
        previous = find_kernel_device(self.claim.previous)
        if previous is None or previous.id is None:
            if recover:
                raise UbiError(f"{self.claim.name}: there is no disk to recover", Exit.NO_DEVICE)
            return
        if recover or self._is_needed(previous):
            self.device.find(previous)
            return
        dead = runtime.Device(
            name=self.claim.name, folder=self.claim.folder, alive=False, state=previous,
        )
        delete_kernel_device(
            dead, previous, force=False, timeout_s=self.options.fence_timeout_s,
        )
        links.remove_link(self.claim.name, previous.id)

    def _is_needed(self, previous: runtime.State) -> bool:
        """Tell whether the disk waits for a daemon, and somebody for the disk."""
        if previous.base != self.places["base"]:
            return False
        try:
            self.device.find(previous)
        except UbiError:
            return False
        self.device.recovered = False
        return user_of(self.info.disk_path) is not None

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
            holder=self._other_holder,
            notice=self._notice,
            reach=self.reach.get("base"),
            anew=options.format,
        )
        self._undo.callback(self.base.discard_if_created)
        self.block_size = block_size(options.block_size, self.image, self.base)
        self.size = (self.base.size - METADATA_SIZE) // self.block_size * self.block_size
        self.warnings += self.image.warnings if self.image else []
        self.warnings += self.base.warnings

    def _other_holder(self, identity: tuple[bool, int, int]) -> str | None:
        """Name the live device that has a base: not this one, whose last daemon may not be gone."""
        holder = runtime.holder_of(identity)
        return holder if holder != self.claim.name else None

    def _open_image(self) -> None:
        """Open the image. A base that has all of it needs none: its metadata will tell."""
        options = self.options
        if options.image is None or (self._before and "image" not in self.reach):
            return
        if self._last and (self._last.independent or self._last.image_problem):
            return  # there may be another one by now, which nobody needs; lost is lost
        try:
            self.image = open_image(
                options.image, image_format=options.image_format, cache=options.image_cache,
                reach=self.reach.get("image"),
            )
        except UbiError as error:
            if os.path.lexists(options.image) or not os.path.exists(options.base):
                raise
            self._missing = error
        else:
            self._undo.callback(self.image.close)

    def _open_base(self) -> None:
        """Judge the metadata; make a ublk device, or take it over; write."""
        sync_fd = self.base.reopen_for_sync(1)[0]
        image_fingerprint = (fingerprint(self.image.fd, self.image.size) if self.image
                             else bytes(FINGERPRINT_SIZE))
        self.opener = Opener(
            base_fd=self.base.fd,
            sync_fd=sync_fd,
            base_bytes=self.base.size,
            image_bytes=self.image.size if self.image else 0,
            identity=(self.base.identity.device, self.base.identity.number),
            fingerprint=image_fingerprint,
            new_uuid=uuid.uuid4().bytes,
            boot_id=boot_id(),
            stripe_bytes=self.options.stripe_size or 0,
            default_stripe_bytes=DEFAULT_STRIPE_SIZE,
            block_bytes=self.block_size,
            format=self.options.format,
            adopt=self.options.adopt,
            force=self.options.force,
            force_stale=self.options.force_stale,
            no_image=self.image is None,
            image_lost=bool(self._last and self._last.image_problem),
            device_bytes=self.size,
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
        if not self.device.recovered:
            growth.record(self, self.recorded_size)
        if self.opener.going_on and self.image and self.opener.fingerprint != image_fingerprint:
            self.warnings.append(not_yet_forced(self.base))
        if self._missing is not None:
            self.warnings.append(
                f"image {shown(self.options.image or '')} is not there, and not needed: the base "
                "has all of it",
            )

    def _start_threads(self) -> None:
        """Hydrator first: it commits what was found before anybody is served."""
        info = self.info
        self._ublkc = self.device.open_char()
        self._undo.callback(self._close_ublkc)
        try:
            self.plane = DataPlane(
                self.opener,
                queues=info.queues,
                depth=info.depth,
                copy_on_read=self.options.copy_on_read,
                device_bytes=self.recorded_size,
                cache=self.options.cache,
                zero_copy=self.device.zero_copy,
                base_is_block=self.base.is_block,
                dsync_alignment=direct_alignment(self.base.fd) if self.base.direct else 0,
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
        faults = Faults(warn, time.monotonic)
        self.upkeep = Upkeep(
            self.plane, self.hydration, self.image, self.base, warn,
            faults=lambda: faults.look(
                errors_of(self.plane.io(), self.plane.counters()), self.degraded(),
            ),
        )
        if self._last and self._last.image_problem and not self._last.independent:
            self.upkeep.lose_image(self._last.image_problem)

    def _go_live(self) -> None:
        self._was_seen = True
        udev.announce(self.claim.name, self.info.id, self.device.owner, self.options.mode)
        if not self.device.recovered:
            self._undo.callback(links.remove_link, self.claim.name, self.info.id)
        self.device.start()
        if not self.device.recovered:
            self._undo.callback(self.device.stop_quietly)
        self.link = links.publish_link(self.claim.name, self.info.id)
        self.claim.write_state(self._state(live=True))

    def _state(self, *, live: bool = False, known: bool = True) -> runtime.State:
        """Tell what is `known` of the device so far: nothing but its cookie before ADD_DEV."""
        base = self.places["base"]
        if not known:
            return runtime.State(image=self.image_path, base=base, cookie=self.device.cookie)
        return runtime.State(
            image=self.image_path,
            base=base,
            id=self.info.id,
            device=self.info.disk_path,
            link=self.link if live else None,
            size=self.size,
            table=self.path,
            base_identity=self.base.identity,
            cookie=self.device.cookie,
            recoverable=self.device.recoverable,
            unit=own_unit(),
            image_problem=self.upkeep.image_problem if live else None,
            independent=live and (self.independent or bool(self._last and self._last.independent)),
        )

    @property
    def image_path(self) -> str | None:
        """Where the image is, or was."""
        return self.places.get("image")

    # ---- what the lifecycle engine asks for -------------------------------------------------

    def before_write(self, opener: Opener) -> None:
        """Everything is checked; take the device id, the last thing that can be refused."""
        if opener.creating:
            new_base.check_tail(self.base, opener, self.options)
        geometry.settle(self, opener)
        if self.device.recovered:
            self.device.take_over(self.options.fence_timeout_s, self._notice)
            return
        # Should this process die amid ADD_DEV, the cookie tells whose device the kernel has made.
        self.claim.write_state(self._state(known=False))
        with signals_wait():  # an id that the kernel gave out is taken back by nobody else
            self.device.make(opener.stripe_bytes)
            self._undo.callback(self.device.delete_quietly)
        self.warnings += self.device.warnings
        self.claim.write_state(self._state())
        self.device.describe(
            size=self.size,
            block_size=self.block_size,
            stripe_bytes=opener.stripe_bytes,
            alignment=max(self.base.alignment, self.image.alignment if self.image else 1),
        )

    def zero_tail(self, opener: Opener) -> None:
        """Nobody may read through a new disk what was on this base before."""
        new_base.zero_tail(self.base, opener, self.options)

    def created(self) -> None:
        """Make the name of a new base last. What knows of the disk that was here before goes."""
        self.base.sync_folder()
        self.drop_tables_of(self.base.identity.device, self.base.identity.number)

    def record_state(self) -> None:
        """Tell the world what the device is by now."""
        self.claim.write_state(self._state(live=True))

    # ---- down -------------------------------------------------------------------------------

    def stop_disk(self, *, force: bool) -> None:
        """Take the disk away from its users; refused (busy) while it is open, but with `force`.

        Raises UbiError; TIMED_OUT when a request that the image or base does not answer holds it.
        """
        self.device.stop(self.claim.name, force=force)

    def take_back(self) -> None:
        """Take down a live device that nobody was told of: it cannot be served after all.

        One that was taken over stays, for the next to try.
        """
        if self.device.recovered:
            self.leave(on_purpose=False)
            return
        with contextlib.suppress(UbiError):
            self.stop_disk(force=True)
            self.finish()

    def keep_hydration(self) -> None:
        """Have the next daemon hydrate as this one is told to."""
        self.options = msgspec.structs.replace(
            self.options, hydrate=self.hydration.wanted, rate=self.hydration.rate,
        )
        self.claim.write_options(self.options)

    def leave(self, *, on_purpose: bool) -> None:
        """Let go of everything, and leave the disk to the next daemon: its requests wait for that.

        What is under way ends first, for a moment: a disk that does not answer holds nobody up. All
        else is as if this process were killed, which costs nothing (docs/durability.md).
        """
        self.upkeep.stop()
        self.claim.write_state(self._state(live=True), left=on_purpose)
        self.plane.leave()
        deadline = time.monotonic() + DRAIN_S
        while not self._queues_stopped() and time.monotonic() < deadline:
            time.sleep(0.002)
        self._quit_threads()
        self._close_ublkc()
        self._keep_within_reach()
        self._close_files()
        self.claim.abandon()

    def _keep_within_reach(self) -> None:
        """Keep image and base so that they can be opened again; neither lock nor claim stays."""
        files = {"base": self.base.fd, "image": self.image.fd if self.image else -1}
        self.reach = {what: reachable(fd) for what, fd in files.items() if fd >= 0}

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
        self._close_files()
        try:
            self.device.control.del_dev(self.info.id, timeout_s=LET_GO_TIMEOUT_S)
        except UbiError as error:
            # Our own I/O is over. Who has the dead disk open or mounted keeps its id, no more.
            gone = isinstance(error, ControlError) and error.errno == errno.ENODEV
            if not gone and not isinstance(error, ControlTimeout):
                self.claim.abandon()
                return problem or error
        finally:
            self.device.control.close()
        self.claim.release()
        return problem

    def _close_files(self) -> None:
        self.opener.let_go()
        if self.table is not None:
            self.table.close()
        self.base.close()
        if self.image is not None:
            self.image.close()

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

    def _close_ublkc(self) -> None:
        if self._ublkc >= 0:
            os.close(self._ublkc)
            self._ublkc = -1

    def _quit_threads(self) -> None:
        self.plane.quit()
        if self.plane.join(START_TIMEOUT_S):
            self.plane.release()

    def _close_base_quietly(self) -> None:
        """Close a base that served nobody: a table that was made for nothing goes.

        One that may know of stripes that are not committed stays: it was found, or the disk was
        there for a moment; but not if the base goes as well.
        """
        goes = not self._was_seen or self.base.folder_fd is not None
        if not self.opener.going_on and goes:
            with contextlib.suppress(OSError, Refused):
                self.opener.close(self)
        if self.table is not None:
            self.table.close()

    # ---- waiting ----------------------------------------------------------------------------

    def _hydrator_is(self, wanted: str) -> bool:
        state, status = self.plane.hydrator_state()
        if state == "failed":
            image = shown(self.image_path or "no image")
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
            return (
                f"image {shown(self.image_path or '')} {self.upkeep.image_problem}; what needs it "
                "fails until the device is added anew, with the image as it was"
            )
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
        with contextlib.suppress(UbiError):  # no room in /run
            self.record_state()
        return True
