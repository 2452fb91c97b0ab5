"""The daemon of a configured disk, as ublk-ubi@NAME.service runs it.

    python -m ublk_ubi.unit NAME

serves the disk that /etc/ublk-ubi/NAME.json describes, in this process. One that waits under this
name for a daemon is taken over, as it was made: so a restart of the unit is a recovery or an
upgrade, and its users notice nothing. What the file says counts when the disk is made.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import msgspec

from ublk_ubi import daemon, hygiene, recovery
from ublk_ubi.config import build_options, load_config
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.log import log
from ublk_ubi.metadata import MAGIC
from ublk_ubi.runtime import check_name
from ublk_ubi.systemd import CONFIG_FOLDER

if TYPE_CHECKING:
    from ublk_ubi.options import DeviceOptions


def options_for(name: str, folder: str = CONFIG_FOLDER) -> DeviceOptions:
    """Read and check a disk's configuration. Raises UbiError (usage)."""
    path = os.path.join(folder, f"{check_name(name)}.json")
    values = load_config(path)
    if values.setdefault("name", name) != name:
        raise UbiError(
            f"config {path}: the name is {values['name']!r} there: the file's own name counts, "
            "drop the key",
            Exit.USAGE,
        )
    try:
        options = build_options(values)
    except UbiError as error:
        raise UbiError(f"config {path}: {error.message}", error.code) from None
    if options.format and os.path.exists(options.base):
        raise UbiError(
            f"config {path}: `format` would destroy {options.base} at every start: make the disk "
            f"once with `ublk-ubi add --config {path} --yes`, and drop the key",
            Exit.USAGE,
        )
    return options


def serve(name: str, folder: str = CONFIG_FOLDER) -> int:
    """Serve a disk to its end; returns the exit code. Raises UbiError."""
    options = options_for(name, folder)
    left = recovery.waiting(name, options.base)
    if left is not None:
        try:
            return daemon.run(left, _announce, recover=True)
        except UbiError as error:
            if error.code != Exit.NO_DEVICE:
                raise
            log(error.message)
    if _is_made(options.base):  # it has the size that it has by now (`resize`)
        options = msgspec.structs.replace(options, size=None)
    return daemon.run(options, _announce)


def _is_made(base: str) -> bool:
    """Tell whether a base holds a disk already."""
    try:
        fd = os.open(base, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False  # whoever opens it for good says what is wrong
    try:
        return os.pread(fd, len(MAGIC), 0) == MAGIC
    except OSError:
        return False
    finally:
        os.close(fd)


def _announce(_answer: dict[str, Any]) -> None:
    """Systemd is told by the daemon itself."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of the unit's main process."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        log("usage: python -m ublk_ubi.unit NAME")
        return Exit.USAGE
    try:
        return serve(arguments[0])
    except UbiError as error:
        log(error.message)
        return error.code


if __name__ == "__main__":
    hygiene.close_inherited()
    hygiene.settle()
    sys.exit(main())
