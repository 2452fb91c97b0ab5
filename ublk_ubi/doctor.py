"""Can ublk-ubi work on this machine, how well, and what to do about it.

Every check takes what it judges as arguments and changes nothing; `run_checks` gathers the facts.
"warn" means that it works at a cost that `advice` names, "fail" that it does not work or must not.
"""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path
from typing import Final, Literal

import msgspec

from ublk_ubi import liburing
from ublk_ubi.abi import ZERO_COPY, Feature
from ublk_ubi.agent_process import CONTROL_PATH
from ublk_ubi.control import CAP_SYS_ADMIN, Control, effective_capabilities
from ublk_ubi.errors import UbiError

FEATURES_TIMEOUT_S = 5.0
RUN_FOLDER = "/run/ublk-ubi"
MIN_KERNEL = (6, 5)
ZERO_COPY_KERNEL = (6, 16)
PRIVATE_LIMIT_KERNEL = (6, 15)
"""From here on ublks_max counts unprivileged devices only."""

MIN_MEMLOCK_BYTES = 64 << 20
MIN_NOFILE = 1024
MIN_RUN_BYTES = 16 << 20
TABLE_BYTES = 2 << 20
"""A device's table at most: a byte a stripe."""

_CAP_IPC_LOCK = 14
_CAP_SYS_RESOURCE = 24

Status = Literal["ok", "warn", "fail"]


class Check(msgspec.Struct, frozen=True):
    """One thing that was looked at; `advice` is empty when there is nothing to do."""

    name: str
    status: Status
    found: str
    advice: str = ""


# What a missing feature costs, and since when kernels have it. The path that a device takes
# follows from what ADD_DEV grants; this says it beforehand.
_FEATURE_COSTS: Final[dict[Feature, tuple[Status, str]]] = {
    Feature.CMD_IOCTL_ENCODE: ("fail", "no control command is understood; use Linux 6.5 or later"),
    Feature.USER_RECOVERY: (
        "warn", "a daemon's end, by an upgrade too, is its disk's; Linux 6.1 has it",
    ),
    Feature.USER_RECOVERY_REISSUE: (
        "warn", "a daemon's end, by an upgrade too, is its disk's; Linux 6.1 has it",
    ),
    Feature.USER_COPY: ("warn", "no zero copy, every byte is copied once more; Linux 6.5 has it"),
    Feature.SUPPORT_ZERO_COPY: (
        "warn", "no zero copy, every byte is copied once more; Linux 6.16 has it",
    ),
    Feature.AUTO_BUF_REG: (
        "warn", "no zero copy, every byte is copied once more; Linux 6.16 has it",
    ),
    Feature.UPDATE_SIZE: ("warn", "a running disk cannot be resized; Linux 6.16 has it"),
    Feature.SAFE_STOP_DEV: (
        "warn", "a disk that is opened in the moment of `del` is taken away; Linux 7.0 has it",
    ),
    Feature.NO_AUTO_PART_SCAN: (
        "warn", "this host reads the guest's partition table at every start; Linux 7.0 has it",
    ),
}


class KnownTrouble(msgspec.Struct, frozen=True):
    """Kernels from `first` to `last` (inclusive), of all builders or of the one named."""

    first: tuple[int, int, int]
    last: tuple[int, int, int]
    builder: str | None
    status: Status
    found: str
    advice: str


_LAST_PATCH = 1 << 16
_KNOWN_TROUBLE: Final = (
    KnownTrouble(
        (6, 18, 4), (6, 18, 5), None, "fail",
        "ADD_DEV crashes in the kernel and blocks ublk until a reboot",
        "boot 6.18.6 or later",
    ),
    KnownTrouble(
        (6, 17, 0), (6, 17, _LAST_PATCH), "Ubuntu", "fail",
        "builds of Ubuntu's 6.17 (6.17.0-1015-azure and others) crash in ADD_DEV and block ublk "
        "until a reboot (Launchpad 2154635)",
        "boot another kernel: 6.14 or earlier, or 6.18.6 or later",
    ),
    KnownTrouble(
        (6, 18, 0), (6, 18, _LAST_PATCH), None, "warn",
        "START_DEV has hung when many devices came and went at once",
        "if `add` times out, reboot into another kernel; 7.1 and later are not known for it",
    ),
    KnownTrouble(
        (7, 0, 0), (7, 0, _LAST_PATCH), None, "warn",
        "START_DEV has hung when many devices came and went at once",
        "if `add` times out, reboot into another kernel; 7.1 and later are not known for it",
    ),
)


def kernel_version(release: str) -> tuple[int, int, int]:
    """Return 6.12.95 of "6.12.95+deb13-amd64"; (0, 0, 0) of what is no version."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", release)
    return (int(found[1]), int(found[2]), int(found[3] or 0)) if found else (0, 0, 0)


def check_kernel(release: str) -> Check:
    """Judge the version alone: too old, old enough to copy, or new enough for zero copy."""
    version = kernel_version(release)
    if version < MIN_KERNEL:
        return Check(
            "kernel", "fail", release,
            "boot Linux 6.5 or later (Debian 13 has 6.12; Debian 12: linux-image-amd64 from "
            "bookworm-backports)",
        )
    if version < ZERO_COPY_KERNEL:
        return Check("kernel", "ok", f"{release} (without zero copy, which came with 6.16)")
    return Check("kernel", "ok", release)


def check_known_trouble(release: str, proc_version: str) -> list[Check]:
    """Name what is known to be wrong with this kernel's ublk; `proc_version` tells its builder."""
    version = kernel_version(release)
    checks = [
        Check("known kernel trouble", trouble.status, f"{release}: {trouble.found}", trouble.advice)
        for trouble in _KNOWN_TROUBLE
        if trouble.first <= version <= trouble.last
        and (trouble.builder is None or trouble.builder in proc_version)
    ]
    return checks or [Check("known kernel trouble", "ok", "none")]


def check_capabilities(effective: int) -> Check:
    """Judge the effective capabilities (CapEff of /proc/self/status)."""
    if not effective >> CAP_SYS_ADMIN & 1:
        return Check("root", "fail", "CAP_SYS_ADMIN is missing", "run it as root: sudo ublk-ubi …")
    if not effective >> _CAP_SYS_RESOURCE & 1:
        return Check(
            "root", "warn", "CAP_SYS_RESOURCE is missing",
            "a daemon short of memory may wait for its own disk (PR_SET_IO_FLUSHER): grant it",
        )
    return Check("root", "ok", "CAP_SYS_ADMIN, CAP_SYS_RESOURCE")


def check_driver(root: Path, release: str, control_path: str = CONTROL_PATH) -> Check:
    """Look for the driver: loaded, or at least to be had as a module. `root` is /."""
    name = "ublk driver"
    if (root / control_path.lstrip("/")).exists():
        return Check(name, "ok", control_path)
    if (root / "sys/class/misc/ublk-control").exists():
        return Check(
            name, "fail", f"loaded, but {control_path} is missing",
            "in a container pass that device in; else mount devtmpfs on /dev",
        )
    modules = root / "lib/modules" / release
    if "/ublk_drv.ko" in (_read(modules / "modules.dep") or ""):
        return Check(name, "warn", "a module, not loaded", "`add` loads it; or: modprobe ublk_drv")
    return Check(
        name, "fail", f"not in this kernel ({release})",
        "boot a kernel with CONFIG_BLK_DEV_UBLK (Debian 13 has it; Debian 12: from backports), or "
        "install the package that has its extra modules (Ubuntu: linux-modules-extra-…)",
    )


def check_features(features: Feature) -> list[Check]:
    """Tell each feature that ublk-ubi uses, by name, and what a missing one costs."""
    return [
        Check(f"feature {feature.name}", "ok", "present")
        if feature in features
        else Check(f"feature {feature.name}", status, "absent", cost)
        for feature, (status, cost) in _FEATURE_COSTS.items()
    ]


def check_data_path(features: Feature) -> Check:
    """Say which way a disk's data goes with `add --data-path auto`."""
    name = "data path"
    missing = [feature.name or "" for feature in ZERO_COPY if feature not in features]
    if not missing:
        return Check(name, "ok", "zero copy: image and base read and write the requests' own pages")
    return Check(
        name, "warn", f"plain copy, through buffers: the driver has no {', '.join(missing)}",
        f"for zero copy boot Linux {ZERO_COPY_KERNEL[0]}.{ZERO_COPY_KERNEL[1]} or later",
    )


def check_device_limit(release: str, ublks_max: str | None, devices: int) -> Check:
    """Judge ublks_max (None: the driver is not loaded) against the devices that exist."""
    name = "ublks_max"
    if ublks_max is None or not ublks_max.isdigit():
        return Check(name, "ok", "not known until the driver is loaded")
    if kernel_version(release) >= PRIVATE_LIMIT_KERNEL:
        return Check(name, "ok", "does not limit root's devices on this kernel")
    limit = int(ublks_max)
    left = limit - devices
    found = f"{limit} devices at most, {devices} exist"
    if left > limit // 4:
        return Check(name, "ok", found)
    advice = (
        "echo 1024 > /sys/module/ublk_drv/parameters/ublks_max, and for the next boot "
        "`options ublk_drv ublks_max=1024` in /etc/modprobe.d/ublk.conf"
    )
    return Check(name, "warn" if left > 0 else "fail", found, advice)


def check_liburing() -> Check:
    """Load the library as the control commands do."""
    try:
        major, minor = liburing.version(liburing.load())
    except UbiError as error:
        return Check("liburing", "fail", "missing or too old", error.message)
    return Check("liburing", "ok", f"{major}.{minor}")


def check_io_uring(disabled: str | None, setup_error: str | None) -> Check:
    """Judge the sysctl io_uring_disabled (None: older than 6.6) and what making a ring said."""
    name = "io_uring"
    meaning = {None: "allowed", "0": "allowed", "1": "for root only", "2": "disabled"}
    found = meaning.get(disabled, f"io_uring_disabled = {disabled}")
    if disabled == "2":
        return Check(name, "fail", found, "sysctl -w kernel.io_uring_disabled=0")
    if setup_error is not None:
        return Check(name, "fail", found, setup_error)
    return Check(name, "ok", found)


def check_limits(memlock_bytes: int, nofile: int, effective: int) -> list[Check]:
    """Judge RLIMIT_MEMLOCK and RLIMIT_NOFILE (soft; -1: none)."""
    unlimited = memlock_bytes == resource.RLIM_INFINITY
    found = "unlimited" if unlimited else f"{memlock_bytes >> 10} KiB"
    if effective >> _CAP_IPC_LOCK & 1:
        memlock = Check("memlock limit", "ok", f"{found}, which does not bind root")
    elif unlimited or memlock_bytes >= MIN_MEMLOCK_BYTES:
        memlock = Check("memlock limit", "ok", found)
    else:
        memlock = Check(
            "memlock limit", "warn", found,
            f"raise it to {MIN_MEMLOCK_BYTES >> 20} MiB (ulimit -l; LimitMEMLOCK= of systemd), or "
            "a device's table cannot be locked, nor its buffers be registered, in memory",
        )
    many = nofile == resource.RLIM_INFINITY or nofile >= MIN_NOFILE
    files = Check(
        "open files limit", "ok" if many else "warn",
        "unlimited" if nofile == resource.RLIM_INFINITY else str(nofile),
        "" if many else f"raise it to {MIN_NOFILE} (ulimit -n; LimitNOFILE= of systemd)",
    )
    return [memlock, files]


def check_sandbox(actions: str | None, mountinfo: str, *, namespaces: bool) -> Check:
    """Judge whether daemons can shut themselves in: seccomp's `actions`, a root to turn away from.

    `mountinfo` is /proc/self/mountinfo, `namespaces` whether there are mount namespaces.
    """
    missing = []
    if "errno" not in (actions or "").split():
        missing.append("seccomp filters")
    roots = [line.split() for line in mountinfo.splitlines() if line.split()[4:5] == ["/"]]
    if not namespaces or not roots or roots[-1][0] == roots[-1][1]:
        missing.append("a root of their own (pivot_root)")
    if missing:
        return Check(
            "sandbox", "warn", f"daemons go on without {' and '.join(missing)}",
            "boot a kernel with CONFIG_SECCOMP_FILTER and CONFIG_NAMESPACES, from a disk or with "
            "switch_root, and start daemons outside of a chroot",
        )
    return Check("sandbox", "ok", "seccomp, a root of their own")


def mount_type(mountinfo: str, path: str) -> str | None:
    """Return the file system type that `path` lies on, by /proc/self/mountinfo (proc(5))."""
    best, kind = "", None
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields = left.split()
        if len(fields) < 5 or not right:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[4])
        covers = path == point or path.startswith(point.rstrip("/") + "/")
        if covers and len(point) >= len(best):  # the later of two on one place hides the other
            best, kind = point, right.split()[0]
    return kind


def check_run(mountinfo: str, free_bytes: int) -> Check:
    """Judge where tables lie: they must die with the kernel, and find room."""
    name = RUN_FOLDER
    kind = mount_type(mountinfo, RUN_FOLDER)
    if kind not in {"tmpfs", "ramfs"}:
        return Check(
            name, "warn", f"on {kind or 'nothing'}",
            "mount a tmpfs on /run: writing a device's table to a disk may hold up its requests",
        )
    found = f"{kind}, {free_bytes >> 20} MiB free"
    if free_bytes < MIN_RUN_BYTES:
        return Check(
            name, "warn", found,
            f"free some: a device needs up to {TABLE_BYTES >> 20} MiB (mount -o remount,size=… "
            "/run)",
        )
    return Check(name, "ok", found)


def run_checks(root: Path = Path("/"), control_path: str = CONTROL_PATH) -> list[Check]:
    """Look at everything that `add` depends on; changes nothing, loads nothing, never raises.

    Files are looked for beneath `root` (tests); the driver is asked over `control_path` itself.
    """
    release = os.uname().release
    effective = effective_capabilities(_read(root / "proc/self/status") or "")
    driver = check_driver(root, release, control_path)
    checks = [
        check_capabilities(effective),
        check_kernel(release),
        *check_known_trouble(release, _read(root / "proc/version") or ""),
        driver,
    ]
    if driver.status == "ok":
        checks += _features(control_path)
    else:
        checks.append(Check("features", "warn", "not known", "load the driver and ask again"))
    parameter = root / "sys/module/ublk_drv/parameters/ublks_max"
    checks += [
        check_device_limit(release, _read(parameter), _count(root / "sys/class/ublk-char")),
        check_liburing(),
        check_io_uring(_read(root / "proc/sys/kernel/io_uring_disabled"), _ring_error()),
        *check_limits(
            resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
            resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            effective,
        ),
        check_run(_read(root / "proc/self/mountinfo") or "", _free_bytes(root / "run")),
        check_sandbox(
            _read(root / "proc/sys/kernel/seccomp/actions_avail"),
            _read(root / "proc/self/mountinfo") or "",
            namespaces=os.path.lexists(root / "proc/self/ns/mnt"),
        ),
    ]
    return checks


def _features(control_path: str) -> list[Check]:
    try:
        with Control(control_path) as control:
            features = control.get_features(timeout_s=FEATURES_TIMEOUT_S)
            return [*check_features(features), check_data_path(features)]
    except UbiError as error:
        return [Check("features", "fail", "the driver does not tell", error.message)]


def _ring_error() -> str | None:
    try:
        liburing.CommandRing().close()
    except UbiError as error:
        return error.message
    return None


def _read(path: Path) -> str | None:
    """Return a file's text without white space around it, None when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _count(folder: Path) -> int:
    try:
        return sum(1 for _ in folder.iterdir())
    except OSError:
        return 0


def _free_bytes(folder: Path) -> int:
    try:
        found = os.statvfs(folder)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize
