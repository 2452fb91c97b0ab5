"""The names that users have for a device: NAME, /dev/ublkbN and the stable link /dev/ublk-ubi/NAME.

Ids are reused by the kernel, names are not: a VM's configuration holds the link.
"""

from __future__ import annotations

import contextlib
import os
import re

from ublk_ubi import runtime, udev
from ublk_ubi.errors import Exit, UbiError

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_DEVICE = r"ublkb([0-9]+)"
_PARTITION = r"(ublkb[0-9]+)p[0-9]+"
_SHOWN = 10  # names in an error message


def device_root() -> str:
    """Give the folder of device nodes; UBLK_UBI_DEV moves it, for tests."""
    return os.environ.get("UBLK_UBI_DEV") or "/dev"


def device_path(dev_id: int) -> str:
    """Give the block device node of a ublk id."""
    return os.path.join(device_root(), f"ublkb{dev_id}")


def link_path(name: str) -> str:
    """Give the stable link of a name."""
    return os.path.join(device_root(), "ublk-ubi", name)


def publish_link(name: str, dev_id: int) -> str:
    """Point /dev/ublk-ubi/NAME at the device in one step; returns the link's path.

    The holder of the claim on `name` calls this: a stale link of that name is its to replace.
    Raises UbiError if something that we did not make is in the way.
    """
    folder = os.path.join(device_root(), "ublk-ubi")
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o755)
        os.chmod(folder, 0o755)  # whatever this process's umask is: links are for everybody
    try:
        folder_fd = os.open(folder, _FOLDER)
    except OSError as error:
        message = f"{folder} is in the way: it is no folder ({error.strerror})"
        raise UbiError(message) from None
    try:
        found = _link_target(folder_fd, name)
        if found is not None and not re.fullmatch(_DEVICE, os.path.basename(found)):
            raise UbiError(f"{link_path(name)} is in the way: it is not a link to a ublk device")
        _remove_unfinished(folder_fd, name)
        os.symlink(device_path(dev_id), _unfinished(name), dir_fd=folder_fd)
        os.rename(_unfinished(name), name, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
    finally:
        os.close(folder_fd)
    return link_path(name)


def _unfinished(name: str) -> str:
    """Name a link that is not published yet: no disk's name, and known to who comes next."""
    return f".{name}"


def _remove_unfinished(folder_fd: int, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(_unfinished(name), dir_fd=folder_fd)


def remove_link(name: str, dev_id: int) -> bool:
    """Remove /dev/ublk-ubi/NAME if it is the link to this id; returns whether it was.

    And what udev was told of the disk, which is gone.
    """
    udev.withdraw(name, dev_id)
    try:
        folder_fd = os.open(os.path.join(device_root(), "ublk-ubi"), _FOLDER)
    except OSError:
        return False
    try:
        _remove_unfinished(folder_fd, name)
        if _link_target(folder_fd, name) != device_path(dev_id):
            return False
        os.unlink(name, dir_fd=folder_fd)
    except OSError:
        return False
    finally:
        os.close(folder_fd)
    return True


def resolve(target: str) -> runtime.Device:
    """Find the device that NAME, /dev/ublkbN or /dev/ublk-ubi/NAME (or a link to one) stands for.

    Raises UbiError (no such device) that lists what exists.
    """
    devices = runtime.all_devices()
    if "/" in target and "\0" not in target:
        return _resolve_path(target, devices)
    for device in devices:
        if device.name == target:
            return device
    raise _no_device(target, devices)


def _resolve_path(target: str, devices: list[runtime.Device]) -> runtime.Device:
    """Find a device by a path: the stable link (dangling or not), the node, or a link to either."""
    path = os.path.normpath(os.path.abspath(target))
    if os.path.dirname(path) == os.path.dirname(link_path("x")):
        for device in devices:
            if device.name == os.path.basename(path):
                return device
    real = os.path.realpath(path)
    if os.path.dirname(real) == os.path.realpath(device_root()):
        base = os.path.basename(real)
        if part := re.fullmatch(_PARTITION, base):
            raise UbiError(
                f"{target!r} is a partition: name its disk, {device_root()}/{part[1]}",
                Exit.NO_DEVICE,
            )
        if match := re.fullmatch(_DEVICE, base):
            return _by_id(int(match[1]), target, devices)
    raise _no_device(target, devices)


def _by_id(dev_id: int, target: str, devices: list[runtime.Device]) -> runtime.Device:
    """Pick the device that has this id; ids are reused, so a live one has it before the dead."""
    having = [d for d in devices if d.state is not None and d.state.id == dev_id]
    having = [d for d in having if d.alive] or having
    if len(having) > 1:
        names = ", ".join(d.name for d in having)
        raise UbiError(f"{target!r} was the device of each of {names}: say which", Exit.NO_DEVICE)
    if not having:
        raise _no_device(target, devices)
    return having[0]


def _no_device(target: str, devices: list[runtime.Device]) -> UbiError:
    if not devices:
        there = "there are none; `ublk-ubi add` makes one"
    else:
        shown = [device.name for device in devices[:_SHOWN]]
        more = f" and {len(devices) - _SHOWN} more" if len(devices) > _SHOWN else ""
        there = "there is " + ", ".join(shown) + more
    return UbiError(f"no device {target!r}: {there}", Exit.NO_DEVICE)


def _link_target(folder_fd: int, name: str) -> str | None:
    """Read a link: None if there is nothing, "" if what is there is no link."""
    try:
        return os.readlink(name, dir_fd=folder_fd)
    except FileNotFoundError:
        return None
    except OSError:
        return ""
