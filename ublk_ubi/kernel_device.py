"""The kernel's side of a device: made or taken over, started, stopped, deleted.

    made         ADD_DEV → SET_PARAMS → (ublkc opened, every tag fetched) → START_DEV
    taken over   START_USER_RECOVERY → (the same) → END_USER_RECOVERY

A device is ours when its `server_flags` hold the random number that its daemon chose, the cookie:
the kernel gives an id to the next who asks. What was granted when it was made (queues, depth, data
path) stays with it through every recovery.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import time
from typing import TYPE_CHECKING

from ublk_ubi import node
from ublk_ubi.abi import ZERO_COPY, DevState, Feature
from ublk_ubi.config import resolve_owner
from ublk_ubi.control import DEFAULT_TIMEOUT_S, Control, ControlError
from ublk_ubi.device_params import AddParams, DeviceParams, DiscardLimits
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.options import COPY_BUFFERS, DEFAULT_DEPTH

if TYPE_CHECKING:
    from collections.abc import Callable

    from ublk_ubi.device_params import DevInfo
    from ublk_ubi.options import DeviceOptions
    from ublk_ubi.runtime import State

SECTOR = 512
START_TIMEOUT_S = 60.0
MAX_DISCARD = 1 << 30
RECOVERY = Feature.USER_RECOVERY | Feature.USER_RECOVERY_REISSUE
_OPEN_RETRY_S = 5.0
_RETRY_S = 0.01


class KernelDevice:
    """One device of the ublk driver's, while this process serves it. `info` is there once it is."""

    def __init__(self, control: Control, options: DeviceOptions) -> None:
        self.control = control
        self.features = control.get_features()
        self.cookie = int.from_bytes(os.urandom(8), "little")
        self._kept: DeviceParams | None = None  # of a disk that is taken over
        self.recovered = False
        self.info: DevInfo
        self._options = options
        self._gone = False
        # While names of users, and udev, are within reach (sandbox.py).
        self.owner = resolve_owner(options.owner) if options.owner is not None else (-1, -1)
        self._udev: node.Udev
        if options.data_path == "zero-copy" and ZERO_COPY not in self.features:
            raise UbiError(
                "--data-path zero-copy: this kernel's ublk driver has none (Linux 6.16 has): drop "
                "--data-path",
            )

    @property
    def zero_copy(self) -> bool:
        """Whether image and base read and write the requests' own pages."""
        return ZERO_COPY in self.info.flags

    @property
    def recoverable(self) -> bool:
        """Whether the disk stays when its daemon dies, and its requests wait for the next one."""
        return RECOVERY in self.info.flags

    @property
    def warnings(self) -> list[str]:
        """What was not granted as it was asked for."""
        asked, found = self._options.queues, self.info.queues
        if found >= asked:
            return []
        return [f"--queues {asked}: {self.info.disk_path} has {found}, as many as there are CPUs"]

    # ---- making -----------------------------------------------------------------------------

    def make(self, stripe_bytes: int) -> None:
        """ADD_DEV, on the data path wanted and granted. Raises UbiError; nothing is left then.

        A helper that died, or is late, may have made a device and not have told of it.
        """
        self._udev = node.Udev()
        try:
            self._make(stripe_bytes)
        except UbiError:
            self._delete_unheard()
            raise

    def _make(self, stripe_bytes: int) -> None:
        zero_copy = self._options.data_path != "copy" and ZERO_COPY in self.features
        self.info = self._add(stripe_bytes, zero_copy=zero_copy)
        if zero_copy and not self.zero_copy:
            self.control.del_dev(self.info.id)
            if self._options.data_path == "zero-copy":
                raise UbiError(
                    "--data-path zero-copy: the ublk driver did not grant it: drop --data-path",
                )
            self.info = self._add(stripe_bytes, zero_copy=False)

    def _delete_unheard(self) -> None:
        with contextlib.suppress(UbiError):
            found = self.control.find_dev(self.cookie)
            if found is not None:
                self.control.del_dev(found)

    def _add(self, stripe_bytes: int, *, zero_copy: bool) -> DevInfo:
        options = self._options
        wanted = Feature.CMD_IOCTL_ENCODE | Feature.UPDATE_SIZE
        if not options.partscan:
            wanted |= Feature.NO_AUTO_PART_SCAN
        if options.recovery:
            wanted |= RECOVERY
        if zero_copy:
            wanted |= ZERO_COPY
        in_copy = min(DEFAULT_DEPTH, COPY_BUFFERS // stripe_bytes)
        try:
            return self.control.add_dev(AddParams(
                queues=options.queues,
                depth=options.depth or (DEFAULT_DEPTH if zero_copy else in_copy),
                max_io_bytes=stripe_bytes,
                flags=wanted & self.features,
                id=options.id,
                server_flags=self.cookie,
            ))
        except ControlError as error:
            if error.errno == errno.EEXIST:
                raise UbiError(
                    f"the id {options.id} is taken (/dev/ublkb{options.id}): give another --id, "
                    "or none",
                    Exit.BUSY,
                ) from None
            raise

    def describe(self, *, size: int, block_size: int, stripe_bytes: int, alignment: int) -> None:
        """SET_PARAMS; sizes are bytes, `alignment` is what direct I/O on image and base takes."""
        cached = self._options.cache != "writethrough"
        self.control.set_params(self.info.id, DeviceParams(
            dev_sectors=size // SECTOR,
            max_sectors=stripe_bytes // SECTOR,
            chunk_sectors=stripe_bytes // SECTOR,
            logical_block_size=block_size,
            physical_block_size=max(4096, block_size),
            io_min=4096,
            io_opt=stripe_bytes,
            volatile_cache=cached,
            fua=cached,
            discard=DiscardLimits(
                granularity=4096,
                max_discard_sectors=MAX_DISCARD // SECTOR,
                max_write_zeroes_sectors=stripe_bytes // SECTOR,
            ),
            # Else a stripe in scattered pages comes as two requests, and is hydrated for nothing.
            max_segments=stripe_bytes // mmap.PAGESIZE + 1,
            # Zero copy: image and base get the guest's own pages.
            dma_alignment=max(SECTOR, alignment) if self.zero_copy else None,
        ))

    # ---- taking over ------------------------------------------------------------------------

    def find(self, state: State) -> None:
        """Look at the device that a dead daemon left. Raises UbiError when it is not there."""
        assert state.id is not None
        try:
            self.info = self.control.get_dev_info(state.id)
        except ControlError as error:
            if error.errno != errno.ENODEV:
                raise
            raise self._lost(state) from None
        if state.cookie is None or self.info.server_flags != state.cookie:
            raise self._lost(state)
        if not self.recoverable:
            raise UbiError(
                f"{state.name} ({self.info.disk_path}) was made with --no-recovery: add it anew",
            )
        self.cookie = state.cookie
        self.recovered = True

    def take_over(self, timeout_s: float, notice: Callable[[str], None]) -> None:
        """START_USER_RECOVERY: when it returns, every write of the dead daemon has landed."""
        params = self._kept or self._read_params(timeout_s)
        if self._options.cache != "writethrough" and not params.volatile_cache:
            raise UbiError(
                f"{self.info.disk_path} was made with --cache writethrough, and its users send no "
                f"flush: it goes on with that, not with --cache {self._options.cache}",
            )
        deadline = time.monotonic() + timeout_s
        told = False
        while True:
            try:
                left_s = max(deadline - time.monotonic(), DEFAULT_TIMEOUT_S)
                self.control.start_user_recovery(self.info.id, timeout_s=left_s)
            except ControlError as error:
                if error.errno != errno.EBUSY:
                    raise
                if time.monotonic() > deadline:
                    raise UbiError(
                        f"{self.info.disk_path}: its dead daemon's last requests have not ended "
                        f"within {timeout_s:g} s: look at the disks under image and base, and try "
                        "again",
                        Exit.TIMED_OUT,
                    ) from None
                if not told and time.monotonic() > deadline - timeout_s + 1:
                    told = True
                    notice(f"waiting for the dead daemon's last requests to {self.info.disk_path}")
                time.sleep(_RETRY_S)
            else:
                return

    def _read_params(self, timeout_s: float) -> DeviceParams:
        """Read the parameters of a disk whose daemon has died.

        Linux 6.12 holds the device while it waits for the requests that the daemon had.
        """
        self._kept = self.control.get_params(
            self.info.id, timeout_s=max(timeout_s, DEFAULT_TIMEOUT_S),
        )
        return self._kept

    def geometry(
        self, name: str, size: int, block_size: int, timeout_s: float,
    ) -> tuple[int, int]:
        """Give the size and the blocks of a disk that is taken over: what the kernel has of them.

        Raises UbiError where image and base, with their `size` and `block_size`, cannot have that.
        """
        params = self._read_params(timeout_s)
        kept = params.dev_sectors * SECTOR
        if kept > size or params.logical_block_size < block_size:
            raise UbiError(
                f"{name}: {self.info.disk_path} has {kept} bytes in blocks of "
                f"{params.logical_block_size}, image and base now have {size} in blocks of "
                f"{block_size}: give them back what they had, or end the disk with `ublk-ubi "
                f"del --force {name}`",
            )
        return kept, params.logical_block_size

    @staticmethod
    def _lost(state: State) -> UbiError:
        return UbiError(
            f"{state.name}: its disk /dev/ublkb{state.id} is gone: add it anew", Exit.NO_DEVICE,
        )

    # ---- serving ----------------------------------------------------------------------------

    def open_char(self) -> int:
        """Open ublkcN read-write; udev may hold it for a moment. Raises UbiError."""
        path = self.info.char_path
        deadline = time.monotonic() + _OPEN_RETRY_S
        while True:
            try:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except OSError as error:
                if error.errno not in (errno.EBUSY, errno.ENOENT) or time.monotonic() > deadline:
                    raise UbiError(f"{path} cannot be opened: {error.strerror}") from None
                time.sleep(_RETRY_S)
            else:
                fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
                return fd

    def start(self) -> None:
        """Have the kernel send requests, and give the node to its owner. Raises UbiError.

        Every tag is fetched, or about to be. A disk that is taken over is as its users have it.
        """
        if self.recovered:
            self.control.end_user_recovery(self.info.id, os.getpid(), timeout_s=START_TIMEOUT_S)
            return
        with self._udev as udev:
            self.control.start_dev(self.info.id, os.getpid(), timeout_s=START_TIMEOUT_S)
            with contextlib.suppress(UbiError):  # slower with one, and no failure
                self.control.unschedule(self.info.id)
            try:
                node.give(self.info.disk_path, self.owner, self._options.mode, udev)
            except BaseException:
                self.stop_quietly()
                raise

    def resize(self, size: int) -> None:
        """Give the disk another size, in bytes. Raises UbiError where the driver cannot."""
        if Feature.UPDATE_SIZE not in self.info.flags:
            raise UbiError(
                f"{self.info.disk_path} cannot grow while it is in use on this kernel (Linux 6.16 "
                "can): it has the new size when it is added next",
            )
        self.control.update_size(self.info.id, size // SECTOR)

    def size_by_now(self) -> int:
        """Return the bytes of the kernel's disk; 0 where they cannot change. Raises UbiError."""
        if Feature.UPDATE_SIZE not in self.info.flags:
            return 0
        return self.control.get_params(self.info.id).dev_sectors * SECTOR

    # ---- ending -----------------------------------------------------------------------------

    def stop(self, name: str, *, force: bool) -> None:
        """Take the disk away from its users; refused (busy) while it is open, but with `force`.

        Raises UbiError; TIMED_OUT when a request that the image or base does not answer holds it.
        """
        if self._gone:
            return
        if not force:
            self._refuse_if_open(name)
        if not self._gone:
            self.control.stop_dev(self.info.id)
            self._gone = True

    def in_use(self, patience_s: float) -> bool:
        """Whether somebody has the disk open or mounted, and not for a moment only, as udev does.

        What cannot be told is taken for it.
        """
        deadline = time.monotonic() + patience_s
        try:
            device = os.stat(self.info.disk_path).st_rdev
            while not self.claimed() and self.control.openers(device):
                if time.monotonic() >= deadline:
                    return True
                time.sleep(_RETRY_S)
            return self.claimed()
        except (OSError, UbiError):
            return True

    def claimed(self) -> bool:
        """Whether somebody has the disk for himself: mounted, or opened exclusively."""
        try:
            os.close(os.open(self.info.disk_path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
        except OSError as error:
            return error.errno == errno.EBUSY
        return False

    def _refuse_if_open(self, name: str) -> None:
        busy = UbiError(
            f"{name} ({self.info.disk_path}) is in use: unmount or close it first, or take it away "
            "with --force",
            Exit.BUSY,
        )
        if Feature.SAFE_STOP_DEV in self.features:
            try:
                self.control.try_stop_dev(self.info.id)
            except ControlError as error:
                if error.errno == errno.EBUSY:
                    raise busy from None
                raise
            self._gone = True
        elif self.claimed():
            raise busy

    def stop_quietly(self) -> None:
        """Undo `start`; whatever happens, go on undoing."""
        with contextlib.suppress(UbiError):
            self.control.stop_dev(self.info.id)

    def delete_quietly(self) -> None:
        """Undo `make`. A device that was taken over stays, for the next daemon."""
        with contextlib.suppress(UbiError):
            self.control.del_dev(self.info.id)


def is_waiting(info: DevInfo) -> bool:
    """Whether a device waits for a new daemon."""
    return info.state is DevState.QUIESCED
