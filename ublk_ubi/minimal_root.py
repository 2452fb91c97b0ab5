"""A root of its own for a daemon: what it still needs of the file system, and nothing else.

    /proc               of processes alone, read-only: /proc/self/fd
    /run/ublk-ubi       the host's
    /dev                the host's while a disk is made (`enter`); then its two nodes, and the
                        folder of links (`narrow`)

Image and base stay open: they were opened on the host's own mounts, which are in use as long as
that is so. Every other mount of the host, and the whole mount namespace that the daemon was started
in, is let go: it can be unmounted, and ends with its own users.

`enter` comes while there is one thread: what does not work then is taken back. Mounts propagate
from the host, never to it.
"""

from __future__ import annotations

import contextlib
import os

from ublk_ubi import kernel_calls as calls

_SAFE = calls.MS_NOSUID | calls.MS_NODEV | calls.MS_NOEXEC
_PROC_OPTIONS = ("subset=pid,hidepid=ptraceable", None)  # the better ones since Linux 5.8


def enter(point: str, run_folder: str, dev_folder: str) -> None:
    """Make the minimal root the root of this process; `point` is an empty folder to mount it on.

    Raises OSError; then nothing has changed.
    """
    before = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        calls.unshare(calls.CLONE_NEWNS)
        try:
            calls.mount(None, "/", None, calls.MS_REC | calls.MS_SLAVE)
            _build(point, run_folder, dev_folder)
            _turn(point)
        except BaseException:
            calls.setns(before, calls.CLONE_NEWNS)
            raise
    finally:
        os.close(before)


def narrow(dev_folder: str, nodes: list[str]) -> None:
    """Leave of the host's /dev these nodes and the folder ublk-ubi. Raises OSError."""
    # Beneath /proc nothing can be made: the one other folder is the root itself.
    fresh = "/new"
    calls.mount("tmpfs", fresh, "tmpfs", calls.MS_NOSUID | calls.MS_NOEXEC, "mode=0755,size=64k")
    for node in nodes:
        place = os.path.join(fresh, os.path.basename(node))
        os.close(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        calls.mount(node, place, None, calls.MS_BIND)
    links = os.path.join(fresh, "ublk-ubi")
    os.mkdir(links)
    calls.mount(os.path.join(dev_folder, "ublk-ubi"), links, None, calls.MS_BIND)
    read_only = calls.MS_REMOUNT | calls.MS_BIND | calls.MS_RDONLY | calls.MS_NOSUID
    calls.mount(None, fresh, None, read_only | calls.MS_NOEXEC)
    calls.detach(dev_folder)
    calls.mount(fresh, dev_folder, None, calls.MS_MOVE)


def _build(point: str, run_folder: str, dev_folder: str) -> None:
    """Mount the new root at `point`, with all that it has."""
    calls.mount("tmpfs", point, "tmpfs", _SAFE, "mode=0755,size=64k")
    for folder in ("/proc", "/new", run_folder, dev_folder):
        os.makedirs(point + folder)
    for options in _PROC_OPTIONS:
        try:
            calls.mount("proc", f"{point}/proc", "proc", _SAFE | calls.MS_RDONLY, options)
            break
        except OSError:
            if options is None:
                raise
    for folder in (run_folder, dev_folder):
        calls.mount(folder, point + folder, None, calls.MS_BIND)


def _turn(point: str) -> None:
    """Make the mount at `point` the root, read-only, and let go of the one before."""
    cwd = os.open(".", os.O_PATH | os.O_CLOEXEC)
    try:
        os.chdir(point)
        try:
            calls.pivot_root(".", ".")
        except OSError:
            os.fchdir(cwd)
            raise
    finally:
        os.close(cwd)
    calls.detach(".")  # the old root, which lies on the new one
    os.chdir("/")
    with contextlib.suppress(OSError):
        remount = calls.MS_REMOUNT | calls.MS_BIND | calls.MS_RDONLY
        calls.mount(None, "/", None, remount | _SAFE)
