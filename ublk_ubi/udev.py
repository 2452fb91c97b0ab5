"""What the host's udev is told of a disk: that it is ours, and whose its node is.

`/run/ublk-ubi/.udev/ublkbN` is there from before the disk appears until after it is gone, so that
no event of the disk finds it missing; the rule 59-ublk-ubi.rules (`ublk_ubi/host`) imports it, and
keeps everything away that would look at a guest's content. The file belongs to the disk of the name
in it: an id may be another daemon's by the time that the last one's file is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING

from ublk_ubi import runtime
from ublk_ubi.errors import UbiError

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = ".udev"


def announce(name: str, dev_id: int, owner: tuple[int, int], mode: int) -> None:
    """Tell of the disk `dev_id`, which is about to appear as `name`'s. Raises UbiError.

    `owner` is uid and gid, -1 for udev's own choice. By number: names are not known any more.
    """
    values = {"NAME": name, "MODE": f"{mode:04o}"}
    ids = zip(("UID", "GID"), owner, strict=True)
    values |= {key: str(number) for key, number in ids if number >= 0}
    text = "".join(f"UBLK_UBI_{key}={value}\n" for key, value in values.items())
    path = os.path.join(runtime.run_root(), FOLDER, f"ublkb{dev_id}")
    try:
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        with _locked() as folder_fd:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            temporary = f".{dev_id}"
            with open(os.open(temporary, flags, 0o600, dir_fd=folder_fd), "w") as file:
                file.write(text)
            os.rename(temporary, f"ublkb{dev_id}", src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
    except OSError as error:
        raise UbiError(f"{path} cannot be written: {error.strerror}") from None


def withdraw(name: str, dev_id: int) -> None:
    """Take back what was told, if it is still about `name`'s disk."""
    with contextlib.suppress(OSError), _locked() as folder_fd:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with open(os.open(f"ublkb{dev_id}", flags, dir_fd=folder_fd)) as file:
            lines = file.read(4096).splitlines()
        if f"UBLK_UBI_NAME={name}" in lines:
            os.unlink(f"ublkb{dev_id}", dir_fd=folder_fd)


@contextlib.contextmanager
def _locked() -> Iterator[int]:
    """Open the folder, and have it for oneself."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    folder_fd = os.open(os.path.join(runtime.run_root(), FOLDER), flags)
    try:
        fcntl.flock(folder_fd, fcntl.LOCK_EX)
        yield folder_fd
    finally:
        os.close(folder_fd)
