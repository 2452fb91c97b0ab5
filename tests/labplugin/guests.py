"""The guests of a session: what each is started with, and the driver that runs them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

    import pytest

    from labplugin.shards import Shard

DRIVER = Path(__file__).with_name("driver.py")
GIB = 1 << 30
MEMORY = 3 * GIB
# The first carries ext4, the second XFS and partitions; both are sparse.
DISKS = ("4G", "4G")
BACKSTOP_S = 3600  # of tools/lab's own; the plugin's limit is on silence
END_S = 30.0
TURN_S = 0.02

# Options that shape what the guest's pytest reports: (its name, the words for it).
PASSED_ON = (
    ("tbstyle", "--tb={}"), ("showlocals", "--showlocals"), ("runxfail", "--runxfail"),
    ("capture", "--capture={}"),
)


class Guests:
    """The driver, in a process of its own; ends it, and the guests with it, when left.

    The driver is no child of this process, for a test here may look at the children that there are.
    While it lives, it holds a lock on the plan.
    """

    def __init__(self, config: pytest.Config, shards: list[Shard]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ublk-ubi-test-"))
        self.events = self.folder / "events"
        self.events.touch()
        plan = {
            "events": str(self.events),
            "jobs": config.getoption("lab_jobs"),
            "silence_s": config.getoption("lab_silence"),
            "lab": [sys.executable, config.getoption("lab_program")],
            "show_output": config.getoption("capture") == "no",
            "guests": [self._guest(config, shard) for shard in shards],
        }
        self.plan = self.folder / "plan.json"
        self.plan.write_text(json.dumps(plan))
        self.log = self.folder / "driver.log"
        theirs, self.ours = os.pipe()
        with self.log.open("wb") as log:
            output = None if plan["show_output"] else log
            # In a process group of its own: Ctrl-C is for this session to hear.
            subprocess.run([sys.executable, DRIVER, self.plan], stdin=theirs, stdout=output,
                           stderr=output, env=_environment(), process_group=0, check=True)
        os.close(theirs)

    def one_more(self) -> None:
        """Let one guest more run at a time, from now on."""
        with contextlib.suppress(BrokenPipeError):  # the driver has died, as will be noticed
            os.write(self.ours, b"+")

    def driver_lives(self) -> bool:
        """Whether the driver is there."""
        with self.plan.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def _guest(self, config: pytest.Config, shard: Shard) -> dict[str, object]:
        folder = self.folder / f"guest{shard.number}"
        scratch = folder / "scratch"
        scratch.mkdir(parents=True)
        plan = scratch / "plan.json"
        records = scratch / "records"
        nodeids = [item.nodeid for item in shard.items]
        plan.write_text(json.dumps({"records": str(records), "nodeids": nodeids}))
        options = ["--cpus", str(shard.cpus), "--mem", str(_memory())]
        options += ["--timeout", str(BACKSTOP_S)]
        options += [word for size in DISKS for word in ("--disk", size)]
        options += ["--scratch", str(scratch), "--show", str(config.rootpath)]
        return {
            "number": shard.number,
            "records": str(records),
            "dmesg": str(scratch / "dmesg"),
            "output": str(folder / "output"),
            "words": [*options, "--", *_pytest_words(config, plan), *shard.arguments],
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self.ours)
        deadline = time.monotonic() + END_S
        while self.driver_lives() and time.monotonic() < deadline:
            time.sleep(TURN_S)
        shutil.rmtree(self.folder, ignore_errors=True)


def _pytest_words(config: pytest.Config, plan: Path) -> list[str]:
    silence = config.getoption("lab_silence")
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--lab-plan={plan}"]
    words.append(f"--rootdir={config.rootpath}")
    if config.inipath:
        words += ["-c", str(config.inipath)]
    # Before the guest is ended for its silence, it shows where it hangs.
    words += ["-o", f"faulthandler_timeout={silence * 0.8:g}"]
    words += ["-v"] * config.option.verbose
    for name, form in PASSED_ON:
        if value := config.getoption(name, None):
            words.append(form.format(value))
    for setting in config.option.override_ini or []:
        words += ["-o", setting]
    return words


def _environment() -> dict[str, str]:
    """For the driver and the guests, whose machine files are read-only."""
    ours = ("PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return kept | {
        "PYTHONDONTWRITEBYTECODE": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/hypothesis",
    }


def _memory() -> int:
    """Bytes for a guest: 3 GiB, or less on a small machine."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(MEMORY, there * 2 // 5 >> 20 << 20)
