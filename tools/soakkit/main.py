"""The soak on the host: reads the command line, finds a kernel with ublk, has it done there."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from demokit.main import loads_driver  # noqa: E402

BROKEN, USAGE, UNABLE, INTERRUPTED = 1, 2, 3, 130
MAX_DISKS = 16
MAX_MINUTES = 7 * 24 * 60
DISK_BYTES = 4 << 30               # of the lab's
GRACE_S = 600                      # for setting up, and for the last look at everything

EPILOG = """\
Each disk has writers that know of every sector what they wrote last, while its image is hydrated.
By lot its daemon is killed (also amid recovery), told to end, recovered, upgraded; the disk grows;
hydration is paused and goes on at other rates; the disk is deleted and added, its base checked, a
new one begun. No request may fail, no sector may hold anything but what was written last.

The lot of each disk follows from the seed, which is printed: the same seed, the same events.

examples:
  tools/soak --minutes 20
  tools/soak --minutes 0.5 --disks 1 --seed 17
  tools/soak --minutes 600 --json >soak.json

exit status: 0 when all held; 1 at a mismatch, a request that failed or a command that did; 2 for a
wrong call; 3 when it cannot be run; 130 when interrupted and all had held until then.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Refuse in one line."""
        print(f"soak: {message} (see tools/soak --help)", file=sys.stderr)
        sys.exit(USAGE)


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= MAX_MINUTES:
        raise argparse.ArgumentTypeError(f"{text!r}: give minutes, more than 0 and up to a week")
    return value


def _disks(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_DISKS:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number from 1 to {MAX_DISKS}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: give a number")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    made = _Parser(
        prog="tools/soak", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Have disks live a hard life, and see that nothing of it shows.",
    )
    made.add_argument("--minutes", type=_minutes, required=True, metavar="N", help="how long")
    made.add_argument("--disks", type=_disks, default=2, metavar="N",
                      help="how many at a time (default 2)")
    made.add_argument("--seed", type=_seed, metavar="N", help="repeat a run (default: by lot)")
    made.add_argument("--json", action="store_true", help="print the result as JSON")
    return made


def main() -> int:
    """Entry point of `tools/soak`."""
    options = parser().parse_args()
    if os.geteuid() != 0:
        print("soak: block devices are made by root: run it with sudo", file=sys.stderr)
        return UNABLE
    seed = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    command = [sys.executable, "-P", "-B", str(ROOT / "tools/soakkit/soak.py"),
               str(options.minutes * 60), str(options.disks), str(seed), str(int(options.json))]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT / 'tools'}:{ROOT / 'tests/device'}:{ROOT}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    if Path("/dev/ublk-control").exists() or loads_driver():
        with tempfile.TemporaryDirectory(prefix="ublk-ubi-soak-", dir="/var/tmp") as work:
            return wait([*command, work], environment)
    if not options.json:
        print("This machine's kernel has no ublk; in the lab, a user-mode kernel that has:",
              flush=True)
    inside = (
        "mkfs.ext4 -q -E nodiscard /dev/ubda && mkdir -p /mnt/soak && mount /dev/ubda /mnt/soak "
        '&& exec "$@"'
    )
    limit = int(options.minutes * 60) + GRACE_S
    code = wait(
        [str(ROOT / "tools/lab"), "--disk", str(DISK_BYTES), "--timeout", str(limit), "--",
         "sh", "-c", inside, "sh", *command, "/mnt/soak"],
        environment,
    )
    return code if code in (0, BROKEN, INTERRUPTED) else UNABLE


def wait(command: list[str], environment: dict[str, str]) -> int:
    """Run a command to its end; a Ctrl-C is its own business."""
    with subprocess.Popen(command, env=environment, cwd=ROOT) as process:
        while True:
            with contextlib.suppress(KeyboardInterrupt):
                return process.wait()


if __name__ == "__main__":
    sys.exit(main())
