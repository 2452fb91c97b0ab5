"""A host with a real systemd as process 1, in namespaces of the guest: booted, asked, shut down.

It has a /run of its own at every boot, an /etc that stays, and no more units than these tests need.
What runs in it sees its processes alone, so all that uses a disk has to run in it, too.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.device import CHECKOUT, Outcome
from support.shell import until

if TYPE_CHECKING:
    from support.undo import Undo

SYSTEMD = "/lib/systemd/systemd"
LIBRARY = Path("/lib/systemd/system")
UNITS = ("shutdown.target", "umount.target", "final.target", "poweroff.target",
         "systemd-poweroff.service", "modprobe@.service")
STUBS = ("sysinit.target", "basic.target", "multi-user.target", "local-fs-pre.target",
         "local-fs.target")
LIMIT_S = 120.0
# $1: the folder that stays. Its `base` is to be mounted by a unit, as a host's disks are.
BOOT = """set -e
mount --make-rprivate /
mount -t tmpfs -o mode=755 run /run
mount -t overlay -o lowerdir=/etc,upperdir="$1/etc",workdir="$1/work" none /etc
mount --bind "$1/units" /etc/systemd/system
mount --bind "$1/console" /dev/console
export container=lab SYSTEMD_GENERATOR_PATH=/etc/systemd/system-generators
export SYSTEMD_UNIT_PATH=/etc/systemd/system:/run/systemd/generator:/run/systemd/transient
exec /lib/systemd/systemd --unit=multi-user.target --show-status=0 --log-target=console
"""


class Host:
    """The host. `folder` is where its files are, from inside and outside."""

    def __init__(self, folder: Path, undo: Undo) -> None:
        self.folder = folder
        self._undo = undo
        self._first: subprocess.Popen[bytes] | None = None
        self._pid = -1
        for name in ("etc", "work", "units", "stored", "base"):
            (folder / name).mkdir()
        self.log = folder / "console"
        self.log.touch()
        for name in UNITS:
            shutil.copy(LIBRARY / name, folder / "units")
        for name in STUBS:
            (folder / "units" / name).write_text(f"[Unit]\nDescription={name}\n")
        self.base_unit = str(folder / "base").strip("/").replace("-", r"\x2d").replace("/", "-")
        self.base_unit += ".mount"
        (folder / "units" / self.base_unit).write_text(
            f"[Mount]\nWhat={folder}/stored\nWhere={folder}/base\nType=none\nOptions=bind\n",
        )

    def boot(self) -> None:
        """Start process 1 and wait until it has started all."""
        self._first = subprocess.Popen(
            ["unshare", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child",
             "bash", "-c", BOOT, "boot", str(self.folder)],
            stdin=subprocess.DEVNULL,
        )
        self._undo.callback(self.cut_off)
        until(self._is_up, "a boot", LIMIT_S)

    def _is_up(self) -> bool:
        assert self._first is not None
        assert self._first.poll() is None, self.console()
        path = Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children")
        children = path.read_text().split()
        if not children or Path(f"/proc/{children[0]}/comm").read_text() != "systemd\n":
            return False
        self._pid = int(children[0])
        return self.run("systemctl", "is-system-running").stdout.strip() in ("running", "degraded")

    def shut_down(self) -> None:
        """Have it go down in order, and wait for its end."""
        assert self._first is not None
        self.run("systemctl", "--no-block", "poweroff")
        self._first.wait(LIMIT_S)

    def cut_off(self) -> None:
        """End it as it stands."""
        if self._first is not None and self._first.poll() is None:
            self._first.kill()
            self._first.wait(LIMIT_S)

    def console(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    # -- in it --

    def start(self, *words: object, **more: Any) -> subprocess.Popen[str]:
        """Start a program."""
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(CHECKOUT)}
        return subprocess.Popen(
            ["nsenter", f"--target={self._pid}", "--pid", "--mount", *map(str, words)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment, **more,
        )

    def run(self, *words: object) -> Outcome:
        """Run a program to its end; look at its code."""
        process = self.start(*words)
        try:
            stdout, stderr = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"{words}: no end; {self.console()}") from None
        return Outcome(process.returncode, stdout, stderr)

    def do(self, *words: object) -> str:
        """Run a program that must succeed."""
        outcome = self.run(*words)
        assert outcome.code == 0, f"{words}: {outcome}; {self.console()}"
        return outcome.stdout

    def ubi(self, *words: object) -> Outcome:
        """Any `ublk-ubi` command; look at its code."""
        return self.run(sys.executable, "-m", "ublk_ubi", *words)

    def facts(self, unit: str) -> dict[str, str]:
        """What systemd knows of a unit."""
        text = self.do("systemctl", "show", unit)
        return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)

    def status(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.ubi("status", name, "--json").stdout)
        return found
