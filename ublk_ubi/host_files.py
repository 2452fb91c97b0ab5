"""The files by which systemd and udev know of us: `systemd install` and `uninstall`.

Each is a template in `ublk_ubi/host`, says in its head that it is ours, and is replaced and removed
only then. What an operator wrote, configurations and drop-ins, stays.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from importlib import resources
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

from ublk_ubi import runtime, systemd
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.launch import environment

if TYPE_CHECKING:
    from collections.abc import Iterator

MARK = "Written by `ublk-ubi systemd install"
UDEV_CONTROL = "/run/udev/control"
MAX_DISKS = 1 << 20
UNITS = "etc/systemd/system"
_WANTS = re.compile(r"ublk-ubi(@.*|-serve)\.service")
_RELOAD_TIMEOUT_S = 60.0


class HostFile(NamedTuple):
    """A template's name and its place below the root."""

    template: str
    path: str
    mode: int = 0o644


FILES = (
    HostFile("ublk-ubi@.service", f"{UNITS}/ublk-ubi@.service"),
    HostFile("ublk-ubi.target", f"{UNITS}/ublk-ubi.target"),
    HostFile("ublk-ubi-serve.service", f"{UNITS}/ublk-ubi-serve.service"),
    HostFile("generator.py", "etc/systemd/system-generators/ublk-ubi-generator", 0o755),
    HostFile("59-ublk-ubi.rules", "etc/udev/rules.d/59-ublk-ubi.rules"),
    HostFile("99-ublk-ubi.rules", "etc/udev/rules.d/99-ublk-ubi.rules"),
    HostFile("modules-load.conf", "etc/modules-load.d/ublk-ubi.conf"),
)
MODPROBE = HostFile("modprobe.conf", "etc/modprobe.d/ublk-ubi.conf")


class Change(msgspec.Struct, frozen=True):
    """What became of a file."""

    path: str
    action: Literal["written", "updated", "unchanged", "removed"]


def install(root: str = "/", *, max_disks: int | None = None) -> list[Change]:
    """Write all files below `root`, each whole or not at all, and have them read where that is /.

    Raises UbiError; a file that is not ours is named before any is written.
    """
    _check_root(root)
    wanted = [*FILES, *([MODPROBE] if max_disks is not None else [])]
    texts = [_fill(file, max_disks) for file in wanted]
    found = [_read(os.path.join(root, file.path)) for file in wanted]
    for file, text in zip(wanted, found, strict=True):
        if text is not None and MARK not in text:
            raise UbiError(
                f"{os.path.join(root, file.path)} is not of `ublk-ubi systemd install`: move it "
                "away first",
            )
    changes = []
    for file, text, old in zip(wanted, texts, found, strict=True):
        path = os.path.join(root, file.path)
        if old == text and os.stat(path).st_mode & 0o777 == file.mode:
            changes.append(Change(path, "unchanged"))
            continue
        _write(path, text, file.mode)
        changes.append(Change(path, "written" if old is None else "updated"))
    with _explained(os.path.join(root, systemd.CONFIG_FOLDER[1:])):
        os.makedirs(os.path.join(root, systemd.CONFIG_FOLDER[1:]), 0o755, exist_ok=True)
    if _is_host(root):
        reload()
    return changes


def uninstall(root: str = "/") -> list[Change]:
    """Remove all that `install` wrote, and the links by which disks start with the host.

    Raises UbiError: busy while there are disks on this host, which are named.
    """
    _check_root(root)
    if _is_host(root):
        _refuse_disks()
    changes = [Change(path, "removed") for path in _enabled(root)]
    for file in (*FILES, MODPROBE):
        path = os.path.join(root, file.path)
        text = _read(path)
        if text is not None and MARK in text:
            changes.append(Change(path, "removed"))
    for change in changes:
        with _explained(change.path):
            os.unlink(change.path)
    with contextlib.suppress(OSError):  # configurations stay
        os.rmdir(os.path.join(root, systemd.CONFIG_FOLDER[1:]))
    if _is_host(root):
        reload()
    return changes


def reload() -> None:
    """Have systemd and udev read their files, where they run. Raises UbiError."""
    commands = []
    if systemd.is_in_charge():
        commands.append(["systemctl", "daemon-reload"])
    if os.path.exists(UDEV_CONTROL):
        commands.append(["udevadm", "control", "--reload"])
    for command in commands:
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                timeout=_RELOAD_TIMEOUT_S, check=False,
            )
            problem = done.stderr.strip().splitlines()[-1:] if done.returncode else None
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = [str(error)]
        if problem is not None:
            words = " ".join(command)
            raise UbiError(
                f"the files are in place, but `{words}` failed: {''.join(problem)}; call it "
                "yourself",
            )


def _fill(file: HostFile, max_disks: int | None) -> str:
    """Make a file of its template, for this very installation."""
    text = resources.files("ublk_ubi").joinpath("host", file.template).read_text("utf-8")
    parent = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    folders = dict.fromkeys((systemd.CONFIG_FOLDER, sys.prefix, parent))
    path = environment().get("PYTHONPATH", "").split(":")[0]
    values = {
        "PYTHON": _quoted(sys.executable),
        "FOLDERS": " ".join(_quoted(folder) for folder in folders),
        # From a checkout, which is in no folder where Python looks by itself.
        "ENVIRONMENT": f"Environment={_quoted(f'PYTHONPATH={parent}')}\n" if path == parent else "",
        "MAX": str(max_disks),
    }
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    if file.template == "generator.py":
        # The interpreter itself: at boot, what a virtual environment lies on may not be mounted.
        text = f"#!{os.path.realpath(sys.executable)} -IS\n{text}"
    return text


def _quoted(text: str) -> str:
    """Write a word of a unit's setting."""
    if re.fullmatch(r"[A-Za-z0-9/_.+=@:-]+", text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'


def _enabled(root: str) -> list[str]:
    """List the links by which instances of our unit are started."""
    folder = os.path.join(root, UNITS)
    found = []
    with contextlib.suppress(OSError):
        for entry in sorted(os.listdir(folder)):
            if not entry.endswith((".wants", ".requires")):
                continue
            with contextlib.suppress(OSError):
                found += [
                    os.path.join(folder, entry, link)
                    for link in sorted(os.listdir(os.path.join(folder, entry)))
                    if _WANTS.fullmatch(link)
                ]
    return found


def _refuse_disks() -> None:
    devices = [
        device.name for device in runtime.all_devices()
        if device.alive or (device.state is not None and device.state.recoverable)
    ]
    if devices:
        shown = ", ".join(devices[:10]) + (", …" if len(devices) > 10 else "")
        raise UbiError(
            f"there are disks that would lose what keeps them alive: {shown}: `ublk-ubi del` them "
            "first",
            Exit.BUSY,
        )


def _check_root(root: str) -> None:
    if not os.path.isdir(root):
        raise UbiError(f"--root {root}: there is no such folder", Exit.USAGE)


def _is_host(root: str) -> bool:
    return os.path.realpath(root) == "/"


def _read(path: str) -> str | None:
    """Read a file of ours, or what stands in its place; None: nothing does."""
    with _explained(path):
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                return file.read(1 << 20)
        except (FileNotFoundError, NotADirectoryError):
            return None


def _write(path: str, text: str, mode: int) -> None:
    """Write a file whole or not at all. Raises UbiError."""
    temporary = f"{path}.{os.getpid()}"
    with _explained(path):
        os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
        try:
            with open(temporary, "x", encoding="utf-8") as file:
                os.fchmod(file.fileno(), mode)
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except PermissionError:
        raise UbiError(f"{path}: permission denied: run this as root") from None
    except OSError as error:
        raise UbiError(f"{error.filename or path}: {error.strerror}") from None
