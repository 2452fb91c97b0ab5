"""The folder of each device, /run/ublk-ubi/NAME: who has which name, and what it left behind.

A device's life, as the file system tells it:

    folder      lock     state.json    meaning
    absent                             the name is free
    present     held     absent        a daemon is starting (or is about to leave)
    present     held     present       a daemon serves the device
    present     free     present       its daemon died: the kernel's device may be left
    present     free     absent        a daemon died before it had a device

The lock is what counts: the kernel drops it with the daemon's last breath, however that ends. It
is an open-file-description lock and not a flock, because that kind can be *asked about* without
being taken: `list` must not make a concurrent `add` believe that a name is in use. It lives as
long as any process holds a copy of `Claim.lock_fd`, so helper processes must not inherit it.

Everything is reached through directory descriptors with O_NOFOLLOW: no name is looked up twice.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import struct
import time
from typing import TYPE_CHECKING

import msgspec

from ublk_ubi.errors import Exit, UbiError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ublk_ubi.options import DeviceOptions

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", re.ASCII)
NAME_RULE = "1 to 64 of letters, digits, '_', '.' and '-', the first a letter or digit"

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FLOCK = "hhqqi4x"  # struct flock of a 64-bit kernel: type, whence, start, length, pid
_MAX_FILE = (1 << 20) + 4096  # bytes; more than that in a folder of ours was not written by us
_MAX_NAMES = 1 << 16


class State(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What a daemon tells the world about itself: state.json. Unknown keys are skipped."""

    image: str | None
    base: str
    name: str = ""
    pid: int = 0
    pid_start: int = 0  # clock ticks after boot: tells a process from a later one with its pid
    id: int | None = None
    recoverable: bool = False  # the disk stays when its daemon dies, and waits for the next
    left: bool = False  # … and it has left on purpose: nobody is to bring it back unasked
    left_at: float | None = None  # when it began to leave, in seconds of the monotonic clock
    waited_s: float | None = None  # how long requests waited since then, for this daemon
    unit: str | None = None  # systemd's service that starts its daemon again, if it is of one
    cookie: int | None = None  # ADD_DEV's server_flags, random: proves that a device `id` is ours
    device: str | None = None
    link: str | None = None
    size: int | None = None  # bytes
    table: str | None = None
    base_identity: tuple[bool, int, int] | None = None  # is a block device, device, inode or seq
    image_problem: str | None = None  # the image is lost, to every daemon that takes the disk over
    independent: bool = False  # the base has all of the image, durably: nobody opens that again


class Device(msgspec.Struct, kw_only=True, frozen=True):
    """One folder under /run/ublk-ubi as it was found; `problem` says why `state` is missing.

    `pid` is who claimed the name last; while `alive`, that is its holder.
    """

    name: str
    folder: str
    alive: bool
    pid: int | None = None
    state: State | None = None
    problem: str | None = None
    trouble: str | None = None  # why nobody brings it back any more

    @property
    def socket(self) -> str:
        """The path of its control socket."""
        return os.path.join(self.folder, "control.sock")

    @property
    def starting(self) -> bool:
        """Whether a daemon has the name and no device yet; a `state` is then a dead one's."""
        return self.alive and (self.state is None or self.state.pid != self.pid)


class Claim:
    """The exclusive right to a name, held by its daemon until it ends.

    `previous` is the state that a dead daemon left under this name, or None. It stays on disk
    until `write_state` replaces it, so dying half-way loses nothing.
    """

    def __init__(self, root_fd: int, dir_fd: int, lock_fd: int, name: str) -> None:
        self.name = name
        self.folder = os.path.join(run_root(), name)
        self.socket = os.path.join(self.folder, "control.sock")
        self.dir_fd = dir_fd
        self.lock_fd = lock_fd
        self._root_fd = root_fd
        self._waited_s: float | None = None
        self.previous: State | None = None
        with contextlib.suppress(UbiError):
            self.previous = _read_state(dir_fd, self.folder)

    def write_state(self, state: State, *, left: bool | None = None) -> State:
        """Replace state.json in one step, with this process's name and pid filled in.

        `left`: the daemon leaves the disk from now on, on purpose or not.
        """
        pid, now = os.getpid(), time.monotonic()
        before = self.previous
        if self._waited_s is None and before is not None and before.left_at is not None:
            self._waited_s = now - before.left_at if before.cookie == state.cookie else None
        full = msgspec.structs.replace(
            state, name=self.name, pid=pid, pid_start=process_start(pid) or 0,
            left=state.left if left is None else left, left_at=None if left is None else now,
            waited_s=self._waited_s,
        )
        self._record("state.json", msgspec.json.encode(full) + b"\n")
        return full

    def write_options(self, options: DeviceOptions) -> None:
        """Keep what the device was made of in options.json."""
        self._record("options.json", msgspec.json.encode(options) + b"\n")

    def read(self, name: str) -> bytes:
        """Read a file of the folder's; nothing where it cannot be read."""
        with contextlib.suppress(OSError):
            return _read_file(self.dir_fd, name)
        return b""

    def adopt_log(self, fd: int) -> None:
        """Give the file from `open_log`, open at `fd`, its place in the folder: NAME/log."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink("log", dir_fd=self.dir_fd)
        path = f"/proc/self/fd/{fd}"
        if os.fstat(fd).st_nlink == 0:
            os.link(path, "log", dst_dir_fd=self.dir_fd, follow_symlinks=True)
        else:
            os.rename(os.readlink(path), "log", dst_dir_fd=self.dir_fd)

    def release(self) -> None:
        """Give the name back and leave nothing: for a device that is gone from the kernel."""
        # The lock goes last: until then no one else can claim the name.
        entries = [entry for entry in os.listdir(self.dir_fd) if entry != "lock"]
        for entry in [*entries, "lock"]:
            with contextlib.suppress(OSError):
                os.unlink(entry, dir_fd=self.dir_fd)
        with contextlib.suppress(OSError):
            os.rmdir(self.name, dir_fd=self._root_fd)
        self.abandon()

    def give_up(self) -> None:
        """Leave the folder as it was found: with what a dead daemon left there, or not at all."""
        if _exists(self.dir_fd, "state.json"):
            self.abandon()
        else:
            self.release()

    def abandon(self) -> None:
        """Drop the lock and leave the folder as it is: the device shows as dead."""
        for fd in (self.lock_fd, self.dir_fd, self._root_fd):
            if fd >= 0:
                os.close(fd)
        self.lock_fd = self.dir_fd = self._root_fd = -1

    def _record(self, name: str, data: bytes) -> None:
        """Write a file whole or not at all. Raises UbiError."""
        try:
            self._write(name, data)
        except OSError as error:
            raise _no_room(os.path.join(self.folder, name), error) from None

    def _write(self, name: str, data: bytes) -> None:
        """Write a file whole or not at all; only the holder of the lock writes here."""
        temporary = f".{name}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(temporary, flags, 0o600, dir_fd=self.dir_fd)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
        finally:
            os.close(fd)
        os.rename(temporary, name, src_dir_fd=self.dir_fd, dst_dir_fd=self.dir_fd)


def run_root() -> str:
    """Give the folder of folders; UBLK_UBI_RUN moves it, for tests."""
    return os.environ.get("UBLK_UBI_RUN") or "/run/ublk-ubi"


def tables_dir() -> str:
    """Give the folder of the table files, made if need be (mode 0700); no name collides with it."""
    return _own_folder(".tables")


def mount_point() -> str:
    """Give an empty folder that daemons mount their own root on, each in a namespace of its own."""
    return _own_folder(".root")


def _own_folder(name: str) -> str:
    root_fd = _open_root(create=True)
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=root_fd)
        path = os.path.join(run_root(), name)
        os.close(_open_folder(root_fd, name, path))
    finally:
        os.close(root_fd)
    return path


def check_name(name: str) -> str:
    """Return `name`; raise UbiError (usage) if no device can be called so."""
    if not NAME_PATTERN.fullmatch(name):
        raise UbiError(f"{name!r} cannot be a name: {NAME_RULE}", Exit.USAGE)
    return name


def claim(name: str | None = None, *, base: str | None = None) -> Claim:
    """Take `name`, or the lowest free ubiN, for this process.

    A dead daemon's folder is reused for its own name; the default skips it, for its name still
    stands for that disk, unless its base is the very path given as `base`.
    Raises UbiError: busy if a live process has the name, failed if the folder cannot be used.
    """
    root_fd = _open_root(create=True)
    try:
        if name is not None:
            found = _try_claim(root_fd, check_name(name))
            if found is None:
                raise UbiError(
                    f"the name {name!r} is in use by a running device: choose another --name, "
                    f"or end that one with `ublk-ubi del {name}`",
                    Exit.BUSY,
                )
            return found
        for candidate in _candidates(root_fd, base):
            with contextlib.suppress(UbiError):  # a folder that cannot be used: the next one can
                found = _try_claim(root_fd, candidate)
                if found is not None and not _is_anothers(found, base):
                    return found
                if found is not None:
                    found.abandon()
    except OSError as error:
        raise _no_room(run_root(), error) from None
    finally:
        os.close(root_fd)
    raise UbiError(f"no free name among ubi0 … ubi{_MAX_NAMES - 1}: give one with --name")


def open_log() -> int:
    """Make a log file without a name, for a daemon that has none yet; returns its descriptor."""
    root_fd = _open_root(create=True)
    try:
        flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC
        try:
            return os.open(".", flags | os.O_TMPFILE, 0o600, dir_fd=root_fd)
        except OSError:  # a file system without O_TMPFILE
            name = f".log-{os.getpid()}-{os.urandom(4).hex()}"
            return os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=root_fd)
    finally:
        os.close(root_fd)


def discard_log(fd: int) -> None:
    """Close a log; remove it if no daemon adopted it and the file system needed a name for it."""
    with contextlib.suppress(OSError):
        path = os.readlink(f"/proc/self/fd/{fd}")
        if os.path.basename(path).startswith(".log-") and os.fstat(fd).st_nlink:
            os.unlink(path)
    os.close(fd)


def all_devices() -> list[Device]:
    """List every device, live and dead, by name (ubi2 before ubi10); a bad one has a `problem`."""
    try:
        root_fd = _open_root(create=False)
    except FileNotFoundError:
        return []
    try:
        names = [name for name in os.listdir(root_fd) if NAME_PATTERN.fullmatch(name)]
        found = [_look(root_fd, name) for name in sorted(names, key=_natural)]
    finally:
        os.close(root_fd)
    return [device for device in found if device is not None]


def holder_of(base_identity: tuple[bool, int, int]) -> str | None:
    """Name the live device that has this base."""
    for device in all_devices():
        if device.alive and device.state and device.state.base_identity == base_identity:
            return device.name
    return None


def write_trouble(device: Device, reason: str) -> None:
    """Note at a dead device why it is not brought back."""
    with contextlib.suppress(OSError):
        dir_fd = os.open(device.folder, _DIRECTORY)
        try:
            fd = os.open("trouble", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
                         | os.O_CLOEXEC, 0o600, dir_fd=dir_fd)
            with open(fd, "w", encoding="utf-8") as file:
                file.write(reason + "\n")
        finally:
            os.close(dir_fd)


def read_of(device: Device, name: str) -> bytes:
    """Read a file in a device's folder. Raises OSError; UbiError for a folder that is not ours."""
    root_fd = _open_root(create=False)
    try:
        dir_fd = _open_folder(root_fd, device.name, device.folder)
    finally:
        os.close(root_fd)
    try:
        return _read_file(dir_fd, name)
    finally:
        os.close(dir_fd)


def open_in_root(name: str, flags: int) -> int:
    """Open or make a file (mode 0600) beside the devices' folders. Raises OSError, UbiError."""
    root_fd = _open_root(create=True)
    try:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=root_fd)
    finally:
        os.close(root_fd)


def clear_trouble(device: Device) -> None:
    """Let it be brought back again."""
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(device.folder, "trouble"))


def find(name: str) -> Device | None:
    """Look for the device of a name; None if there is none."""
    check_name(name)
    return refresh(Device(name=name, folder=os.path.join(run_root(), name), alive=False))


def refresh(device: Device) -> Device | None:
    """Look at the device's folder again; None when it is gone."""
    try:
        root_fd = _open_root(create=False)
    except FileNotFoundError:
        return None
    try:
        return _look(root_fd, device.name)
    finally:
        os.close(root_fd)


def process_start(pid: int) -> int | None:
    """Give a process's start time in clock ticks after boot; None if it is gone or a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    if len(fields) < 20 or fields[0] in (b"Z", b"X"):
        return None
    return int(fields[19])


def _open_root(*, create: bool) -> int:
    """Open the root folder; raises FileNotFoundError only when `create` is false."""
    root = run_root()
    try:
        if create:
            with contextlib.suppress(FileExistsError):
                os.mkdir(root, 0o700)
        fd = os.open(root, _DIRECTORY)
    except FileNotFoundError:
        if create:
            raise UbiError(f"{root} cannot be made: its parent folder does not exist") from None
        raise
    except OSError as error:
        raise _explain(root, error) from None
    return _checked(fd, root)


def _open_folder(root_fd: int, name: str, path: str) -> int:
    """Open a folder of ours by name; UbiError if it is something else or another user's."""
    try:
        fd = os.open(name, _DIRECTORY, dir_fd=root_fd)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _explain(path, error) from None
    return _checked(fd, path)


def _checked(fd: int, path: str) -> int:
    """Return `fd` if no one else can have put things into this folder; else close it and raise."""
    status = os.fstat(fd)
    problem = None
    if status.st_uid != os.geteuid():
        problem = f"{path} belongs to uid {status.st_uid}, not to uid {os.geteuid()}"
    elif status.st_mode & 0o022:
        problem = f"{path} can be written by others (mode {stat.S_IMODE(status.st_mode):04o})"
    if problem is None:
        return fd
    os.close(fd)
    hint = "run this as its owner" if os.geteuid() else "set that right, or remove it"
    raise UbiError(f"{problem}: {hint}")


def _explain(path: str, error: OSError) -> UbiError:
    """Put an errno into words with a way out."""
    if isinstance(error, PermissionError):
        return UbiError(f"{path}: permission denied: run this as root")
    return UbiError(f"{path}: {error.strerror}: it is not a folder of ours; remove it")


def _no_room(path: str, error: OSError) -> UbiError:
    return UbiError(
        f"{path} cannot be written: {error.strerror}; make room there (see `df {run_root()}`)",
    )


def _try_claim(root_fd: int, name: str) -> Claim | None:
    """Lock the folder of `name`, made if need be; None if another process holds it."""
    path = os.path.join(run_root(), name)
    while True:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=root_fd)
        try:
            dir_fd = _open_folder(root_fd, name, path)
        except FileNotFoundError:
            continue  # its last holder removed it between our two calls
        lock_fd = -1
        try:
            try:
                lock_fd = _open_lock(dir_fd, path, os.O_RDWR | os.O_CREAT)
            except FileNotFoundError:
                continue  # the folder was removed after we opened it
            if not _lock(lock_fd):
                return None
            if not _is_current(root_fd, name, dir_fd, lock_fd):
                continue  # we locked what its last holder had just removed
            found = Claim(os.dup(root_fd), dir_fd, lock_fd, name)
            dir_fd = lock_fd = -1
        finally:
            for fd in (lock_fd, dir_fd):
                if fd >= 0:
                    os.close(fd)
        try:
            found._write("pid", f"{os.getpid()}\n".encode())
        except OSError:
            found.give_up()
            raise
        return found


def _exists(dir_fd: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _is_current(root_fd: int, name: str, dir_fd: int, lock_fd: int) -> bool:
    """Tell whether the folder and lock that we hold are those that a newcomer would find."""
    try:
        folder = os.stat(name, dir_fd=root_fd, follow_symlinks=False)
        lock = os.stat("lock", dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(folder, os.fstat(dir_fd)) and os.path.samestat(lock, os.fstat(lock_fd))


def _open_lock(dir_fd: int, path: str, flags: int) -> int:
    """Open NAME/lock; UbiError if it is no regular file."""
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open("lock", flags, 0o600, dir_fd=dir_fd)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _explain(os.path.join(path, "lock"), error) from None
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise UbiError(f"{path}/lock is not a regular file: remove the folder {path}")


def _lock(fd: int) -> bool:
    """Take the lock if it is free."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except (BlockingIOError, PermissionError):
        return False
    return True


def _is_locked(fd: int) -> bool:
    """Ask whether some process holds the lock, without touching it."""
    query = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    answer = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_OFD_GETLK, query))
    return bool(answer[0] != fcntl.F_UNLCK)


def _candidates(root_fd: int, base: str | None) -> Iterator[str]:
    """Name what `claim` may try, best first, without taking any lock."""
    held = set()
    for name in sorted(os.listdir(root_fd), key=_natural):
        if not NAME_PATTERN.fullmatch(name):
            continue
        device = _look(root_fd, name)
        if device is None or not (device.alive or device.state or device.problem):
            continue  # empty: as good as free
        held.add(name)
        if base is not None and not device.alive and device.state and device.state.base == base:
            yield name
    for number in range(_MAX_NAMES):
        if (name := f"ubi{number}") not in held:
            yield name


def _is_anothers(found: Claim, base: str | None) -> bool:
    """Tell whether a dead daemon's device, and not the one for `base`, goes by this name."""
    try:
        os.stat("state.json", dir_fd=found.dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return found.previous is None or found.previous.base != base


def _look(root_fd: int, name: str) -> Device | None:
    """Describe one folder; None if there is none of that name (a file is none of ours)."""
    path = os.path.join(run_root(), name)
    state, problem, alive, pid, trouble = None, None, False, None, None
    try:
        if not stat.S_ISDIR(os.stat(name, dir_fd=root_fd, follow_symlinks=False).st_mode):
            return None
        dir_fd = _open_folder(root_fd, name, path)
    except FileNotFoundError:
        return None
    except UbiError as error:
        return Device(name=name, folder=path, alive=False, problem=error.message)
    try:
        # The lock last: if its holder lives now, it lived when its pid and state were read.
        pid = _read_pid(dir_fd)
        with contextlib.suppress(OSError):
            trouble = _read_file(dir_fd, "trouble").decode(errors="replace").strip()
        try:
            state = _read_state(dir_fd, path)
        except UbiError as error:
            problem = error.message
        lock_fd = _open_lock(dir_fd, path, os.O_RDONLY)
        try:
            alive = _is_locked(lock_fd)
        finally:
            os.close(lock_fd)
        if not alive and problem is None:
            # What the dead wrote last, as that it leaves on purpose, may have come after our look.
            state = _read_state(dir_fd, path)
    except FileNotFoundError:
        pass
    except UbiError as error:
        problem = error.message
    finally:
        os.close(dir_fd)
    return Device(name=name, folder=path, alive=alive, pid=pid, state=state, problem=problem,
                  trouble=trouble)


def _read_state(dir_fd: int, path: str) -> State | None:
    """Read state.json: None if absent, UbiError if it is nothing that we wrote."""
    where = os.path.join(path, "state.json")
    try:
        return msgspec.json.decode(_read_file(dir_fd, "state.json"), type=State)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UbiError(f"{where}: {error.strerror}") from None
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise UbiError(f"{where} is damaged: {error}") from None


def _read_pid(dir_fd: int) -> int | None:
    """Read who claimed the name; None if that is not there or no number."""
    with contextlib.suppress(OSError):
        text = _read_file(dir_fd, "pid").strip()
        if text.isdigit() and len(text) < 10:
            return int(text)
    return None


def _read_file(dir_fd: int, name: str) -> bytes:
    """Read a small regular file. Raises OSError; never hangs, whatever lies there."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(name, flags, dir_fd=dir_fd)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return os.read(fd, _MAX_FILE)
    finally:
        os.close(fd)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts ubi2 before ubi10."""
    pieces = re.split(r"([0-9]+)", name)
    return [(int(p), "") if p.isdigit() else (-1, p) for p in pieces]
