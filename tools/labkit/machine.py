"""The Debian machine that QEMU boots: found in the user's cache, or made of Debian's packages.

    CACHE/machine-RELEASES-HASH/root.img       its disk: ext4 without a partition table, sparse
    CACHE/machine-RELEASES-HASH/WHICH/vmlinuz  Debian's packaged kernel, WHICH is stable or newest
    CACHE/machine-RELEASES-HASH/WHICH/initrd   that finds the disk, by Debian's initramfs-tools

Its programs are those of this machine's release of Debian, so that what is built here runs there;
its kernels are stable's (Linux 6.12) and the newest of backports. Made as root only.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from . import debian
from .errors import LabError
from .kernel import Report, building, cache_folder, run_step

SUITES = {"stable": debian.STABLE, "newest": debian.BACKPORTS}
ARCHITECTURE = "amd64"
BUILD_PREFIX = "machine-build-"
IMAGE_BYTES = 4 << 30
FREE_BYTES = 3 << 30

# What the machine is to have beside the minimal base.
PACKAGES = (
    *("systemd-sysv", "udev", "kmod", "initramfs-tools", "iproute2", "procps", "zstd"),
    *("python3", "liburing2", "fio", "e2fsprogs", "xfsprogs", "fdisk", "dmsetup", "strace"),
    *("lvm2", "mdadm"),  # as on hosts: they look at every new disk
    *("qemu-system-common", "nbdkit", "nbd-client"),  # peers to measure against
)
TOOLS = {
    "debootstrap": "debootstrap",
    "qemu-system-x86_64": "qemu-system-x86",
    "mkfs.ext4": "e2fsprogs",
    "depmod": "kmod",
}

INIT = """\
#!/bin/sh
# Hands over to the lab's side in the guest (labkit/inside.py on the host).
mkdir -p /run/lab
mount -t 9p -o trans=virtio,version=9p2000.L,ro lab /run/lab
exec python3 -B /run/lab/inside.py
"""
SERVICE = """\
[Unit]
Description=The lab's command
After=multi-user.target systemd-udevd.service
[Service]
ExecStart=/usr/lib/lab/init
KillMode=process
OOMScoreAdjust=-1000
LimitMEMLOCK=infinity
TasksMax=infinity
[Install]
WantedBy=multi-user.target
"""
# The root's drivers, for an initrd without a guess at this machine's.
INITRD_MODULES = "virtio_pci\nvirtio_blk\next4\n9p\n9pnet_virtio\n"
MASKED = (
    *("getty@tty1.service", "serial-getty@ttyS3.service", "systemd-timesyncd.service"),
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "fstrim.timer"),
    *("e2scrub_all.timer", "e2scrub_reap.service", "systemd-random-seed.service"),
)


@dataclass(frozen=True)
class DebianMachine:
    """A machine in the cache, with one of its kernels."""

    folder: Path
    which: str

    @property
    def root(self) -> Path:
        """Its disk, never written to."""
        return self.folder / "root.img"

    @property
    def kernel(self) -> Path:
        """Its kernel."""
        return self.folder / self.which / "vmlinuz"

    @property
    def initrd(self) -> Path:
        """What finds the disk."""
        return self.folder / self.which / "initrd"


def recipe_hash() -> str:
    """Hash all that decides what comes out, but for what the archive has today."""
    recipe = (SUITES, PACKAGES, INIT, SERVICE, INITRD_MODULES, MASKED, IMAGE_BYTES)
    return hashlib.sha256(repr((recipe, debian.codename())).encode()).hexdigest()[:12]


def find(cache: Path, which: str) -> DebianMachine | None:
    """Return the machine in the cache, whatever the archive may have that is newer."""
    found = sorted(cache.glob(f"machine-*-{recipe_hash()}"), key=lambda path: path.stat().st_mtime)
    return DebianMachine(found[-1], which) if found else None


def is_being_made(cache: Path) -> bool:
    """Tell whether a call is at it, as far as its folder shows."""
    return any(cache.glob(f"{BUILD_PREFIX}*"))


def find_or_make(which: str, report: Report) -> DebianMachine:
    """Return the machine; of many callers that find none, one makes it."""
    cache = cache_folder()
    if machine := find(cache, which):
        return machine
    with building(cache, report, "machine.lock", f"{BUILD_PREFIX}*"):
        return find(cache, which) or DebianMachine(_make(cache, report), which)


def _make(cache: Path, report: Report) -> Path:
    if os.geteuid():
        raise LabError("making the Debian machine needs root (debootstrap): run this as root once")
    if shutil.disk_usage(cache).free < FREE_BYTES:
        raise LabError(f"making it needs {FREE_BYTES >> 30}G free in {cache}: set XDG_CACHE_HOME")
    started = time.monotonic()

    def phase(text: str) -> None:
        report(f"machine, {time.monotonic() - started:3.0f} s: {text}")

    work = Path(tempfile.mkdtemp(prefix=BUILD_PREFIX, dir=cache))
    try:
        log = work / "log"
        log.touch()
        if missing := [package for tool, package in TOOLS.items() if shutil.which(tool) is None]:
            phase(f"installing {' '.join(missing)}")
            debian.install(missing, log)
        root, result = work / "root", work / "result"
        phase(f"making a root filesystem of Debian {debian.codename()}'s packages")
        _make_root(root, log)
        _configure(root)
        releases = []
        for which, suite in SUITES.items():
            phase(f"downloading and installing {suite}'s kernel")
            archive = debian.Archive(work / f"apt-{which}", log, suite)
            release, packages = archive.newest_kernel(ARCHITECTURE)
            archive.unpack(packages, work / which)
            (result / which).mkdir(parents=True)
            _install_kernel(work / which, root, release, result / which, log)
            releases.append(release.removesuffix(f"-{ARCHITECTURE}"))
        phase("writing the disk")
        _write_image(root, result / "root.img", log)
        folder = cache / f"machine-{'-'.join(releases)}-{recipe_hash()}"
        result.rename(folder)
        phase(f"done: {folder}")
    except subprocess.CalledProcessError as error:
        raise LabError(f"{error.cmd[0]} failed: {debian.last_line(log)}") from error
    else:
        return folder
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _make_root(root: Path, log: Path) -> None:
    entry = debian.debian_entry(debian.system_entries(), debian.codename())
    command = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}"]
    if dict(entry.options).get("trusted") == "yes":
        command.append("--no-check-gpg")
    command += [debian.codename(), str(root), entry.uri]

    def bootstrap() -> None:
        shutil.rmtree(root, ignore_errors=True)  # what a try before has left
        run_step("making the root filesystem", command, log, root.parent)

    debian.patiently(bootstrap)
    shutil.rmtree(root / "var/cache/apt", ignore_errors=True)
    shutil.rmtree(root / "var/lib/apt/lists", ignore_errors=True)


def _install_kernel(unpacked: Path, root: Path, release: str, result: Path, log: Path) -> None:
    modules = next(path for path in (unpacked / "usr/lib/modules", unpacked / "lib/modules")
                   if path.is_dir()) / release  # fmt: skip
    images = (modules / "vmlinuz", unpacked / f"boot/vmlinuz-{release}")
    shutil.copyfile(next(path for path in images if path.exists()), result / "vmlinuz")
    shutil.copytree(modules, root / "usr/lib/modules" / release, symlinks=True)
    configs = (modules / "config", unpacked / f"boot/config-{release}")
    config = next(path for path in configs if path.exists())
    shutil.copyfile(config, root / f"boot/config-{release}")  # mkinitramfs asks it
    settings = root / "etc/initramfs-tools"
    (settings / "modules").write_text(INITRD_MODULES)
    (settings / "conf.d/lab").write_text("MODULES=list\nCOMPRESS=zstd\nFSTYPE=ext4\n")
    run_step("listing modules", ["depmod", "-b", str(root), release], log, root.parent)
    make = ["chroot", str(root), "mkinitramfs", "-o", "/boot/initrd", release]
    run_step("making the initrd", make, log, root.parent)
    shutil.move(root / "boot/initrd", result / "initrd")


def _configure(root: Path) -> None:
    folder = root / "usr/lib/lab"
    folder.mkdir()
    (folder / "init").write_text(INIT)
    (folder / "init").chmod(0o755)
    units = root / "etc/systemd/system"
    (units / "lab.service").write_text(SERVICE)
    wants = units / "multi-user.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / "lab.service").symlink_to("../lab.service")
    for unit in MASKED:
        (units / unit).unlink(missing_ok=True)
        (units / unit).symlink_to("/dev/null")
    (root / "etc/hostname").write_text("lab\n")
    (root / "etc/fstab").write_text("")


def _write_image(root: Path, image: Path, log: Path) -> None:
    with image.open("xb") as file:
        file.truncate(IMAGE_BYTES)
    command = ["mkfs.ext4", "-q", "-J", "size=16", "-m", "0", "-d", str(root), str(image)]
    run_step("writing the disk", command, log, root.parent)
