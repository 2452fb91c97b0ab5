"""systemd, where it is in charge: whose unit a daemon is, and what is asked of it.

A disk that is configured in /etc/ublk-ubi/NAME.json is served by the service ublk-ubi@NAME, which
systemd starts again when its daemon dies. A disk that `add` made is served by a daemon in a scope
of its own: no service or session takes it along when it ends, and `watch` brings it back.
"""

from __future__ import annotations

import functools
import os
import re
import time
from typing import TYPE_CHECKING

from ublk_ubi import runtime
from ublk_ubi.errors import Exit, UbiError

if TYPE_CHECKING:
    from ublk_ubi.options import DeviceOptions
    from ublk_ubi.runtime import Device

BOOTED = "/run/systemd/system"
CONFIG_FOLDER = "/etc/ublk-ubi"
MOST_DEATHS = 5
NOT_RESTARTED = ("2", "3")
"""Exit codes after which the unit is not started again (RestartPreventExitStatus=)."""

TIMEOUT_S = 150.0
"""More than a unit may take to stop: ublk-ubi@.service has 120 s."""

ASK_TIMEOUT_S = 5.0
_UNIT = r"ublk-ubi@([A-Za-z0-9][A-Za-z0-9_.-]{0,63})\.service"
_SCOPE_SETTINGS = (
    # What uses the disk goes first: SIGPWR lets the daemon wait for that (signals.py).
    "KillSignal=SIGPWR",
    "TimeoutStopSec=120",
    "Before=ublk-ubi.target libvirtd.service virtqemud.service libvirt-guests.service",
)


def is_in_charge() -> bool:
    """Tell whether systemd is this host's process 1, and we may ask it.

    Of tests' disks (UBLK_UBI_RUN) it shall hear nothing.
    """
    return os.path.isdir(BOOTED) and os.geteuid() == 0 and not os.environ.get("UBLK_UBI_RUN")


def unit_of(name: str) -> str:
    """Give the service of a configured disk."""
    return f"ublk-ubi@{name}.service"


@functools.cache
def own_unit() -> str | None:
    """Name the ublk-ubi@NAME.service that this process is of; None if it is of none."""
    try:
        with open("/proc/self/cgroup") as file:
            return unit_in(file.read())
    except OSError:
        return None


def unit_in(cgroups: str) -> str | None:
    """Find our unit in the text of /proc/PID/cgroup."""
    for line in cgroups.splitlines():
        _, _, path = line.split(":", 2)
        for part in reversed(path.split("/")):
            if part.startswith("ublk-ubi@") and re.fullmatch(_UNIT, part):
                return part
    return None


# ---- a unit of its own ------------------------------------------------------------------------


def scope(what: str, options: DeviceOptions | None = None) -> list[str]:
    """Give the words before a command that put it into a unit of its own; none where it has one."""
    if not is_in_charge() or own_unit() is not None:
        return []
    import shutil  # which has compressors come along

    program = shutil.which("systemd-run")
    if program is None:
        return []
    settings = list(_SCOPE_SETTINGS)
    settings.extend(
        f'RequiresMountsFor="{os.path.abspath(path)}"'
        for path in ((options.base, options.image) if options is not None else ())
        if path is not None and not re.search(r"[^ -~]|[\"\\%]", path)
    )
    return [
        program, "--scope", "--quiet", "--collect", "--slice=system.slice",
        f"--description=ublk-ubi: {what}", f"--unit=ublk-ubi-{what}-{os.urandom(4).hex()}",
        *(f"--property={setting}" for setting in settings), "--",
    ]


# ---- asking and telling -----------------------------------------------------------------------


def start(device: Device) -> None:
    """Have the unit of a dead device start, however often it has died. Raises UbiError."""
    unit = _required(device)
    _systemctl("reset-failed", unit, check=False)
    _systemctl("start", unit)


def reload(device: Device) -> None:
    """Have the unit of a live device go over to the installed version. Raises UbiError."""
    _systemctl("reload", _required(device))


def forbid_restart(device: Device) -> None:
    """Keep systemd from starting a device's daemon again, which is about to be killed."""
    if is_restarted(device):
        _systemctl("--no-block", "stop", _required(device), check=False)


def forget(device: Device) -> None:
    """End the unit of a dead device, also one that is about to start anew."""
    if is_restarted(device):
        _systemctl("stop", _required(device), check=False)
        _systemctl("reset-failed", _required(device), check=False)


def is_restarted(device: Device) -> bool:
    """Tell whether systemd, not `watch`, brings a device back."""
    return device.state is not None and device.state.unit is not None and is_in_charge()


def how_it_ended(device: Device) -> str:
    """Tell what becomes of a disk whose unit has no daemon."""
    unit = _required(device)
    wanted = ("SubState", "Result", "ExecMainStatus", "NRestarts")
    shown = _systemctl(
        "show", *(f"--property={key}" for key in wanted), unit, check=False,
        timeout_s=ASK_TIMEOUT_S,
    )
    facts = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    who = f"its daemon (process {device.pid})"
    if _was_given_up(facts):
        return (
            f"its daemon died {MOST_DEATHS} times within 60 s, the last time saying: "
            f"{last_words(unit)}; its requests wait until `ublk-ubi recover {device.name}` or "
            f"`ublk-ubi del --force {device.name}`"
        )
    if facts.get("SubState") in ("auto-restart", "auto-restart-queued", "start", "stop-sigterm",
                                 "stop-post", "final-sigterm"):
        return f"{who} died; systemd is bringing it back ({unit})"
    if device.state is not None and device.state.left:
        return f"{who} left; its requests wait: `systemctl start {unit}`"
    state = facts.get("SubState", "not known")
    return f"{who} died, {unit} is {state}; its requests wait: `ublk-ubi recover {device.name}`"


def _was_given_up(facts: dict[str, str]) -> bool:
    """Tell whether a unit hit its start limit: `Result` keeps what came before, as a rule."""
    if facts.get("SubState") != "failed":
        return False
    if facts.get("Result") == "exit-code" and facts.get("ExecMainStatus") in NOT_RESTARTED:
        return False
    restarts = facts.get("NRestarts", "")
    enough = restarts.isdigit() and int(restarts) >= MOST_DEATHS - 1
    return enough or facts.get("Result") == "start-limit-hit"


def last_words(unit: str) -> str:
    """Quote the last line that a unit's processes wrote to the journal."""
    import subprocess

    try:
        done = subprocess.run(
            ["journalctl", "--quiet", "--no-pager", "--lines=1", "--output=cat",
             f"_SYSTEMD_UNIT={unit}"],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=ASK_TIMEOUT_S, check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "nothing"
    return done.stdout.decode(errors="replace").strip()[-400:] or "nothing"


def _required(device: Device) -> str:
    assert device.state is not None
    assert device.state.unit is not None
    return device.state.unit


def _systemctl(*words: str, check: bool = True, timeout_s: float = TIMEOUT_S) -> str:
    """Run systemctl; returns what it printed. Raises UbiError, with `check`."""
    import subprocess

    started_at = time.time()
    shown = " ".join(["systemctl", *words])
    try:
        done = subprocess.run(
            ["systemctl", "--no-ask-password", *words], stdin=subprocess.DEVNULL,
            capture_output=True, timeout=timeout_s, check=False,
        )
    except OSError as error:
        raise UbiError(f"cannot run systemctl: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise UbiError(f"`{shown}` took more than {timeout_s:g} s", Exit.TIMED_OUT) from None
    if check and done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines()[:1] or ["no reason"]
        unit = words[-1]
        raise UbiError(
            f"`{shown}` failed: {reason[0]} (the last line of its log: {last_words(unit)}; see "
            f"`journalctl -u {unit} --since @{started_at:.0f}`)",
        )
    return done.stdout.decode(errors="replace")


def refresh(device: Device) -> Device:
    """Look at a device that systemd has started. Raises UbiError when it is not live."""
    now = runtime.refresh(device)
    if now is None or not now.alive or now.starting:
        raise UbiError(f"{device.name}: {_required(device)} is started, and the disk is not live")
    return now
