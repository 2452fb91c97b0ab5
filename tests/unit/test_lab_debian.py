"""tools/lab --debian: a Debian machine in QEMU; and the device on the kernel of Debian stable."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from labkit import machine
from labkit.kernel import cache_folder

ROOT = Path(__file__).resolve().parents[2]
LAB = ROOT / "tools" / "lab"
SECONDS = 600

MADE = machine.find(cache_folder(), "stable") is not None

pytestmark = [
    pytest.mark.uses_lab,
    pytest.mark.skipif(os.environ.get("LAB") == "1", reason="a lab in the lab"),
    pytest.mark.skipif(not MADE and os.geteuid() != 0,
                       reason="no Debian machine: run tools/lab --print machine as root"),
]  # fmt: skip

# What a machine is, as its COMMAND sees it; then the device, as its own tests see it.
FACTS = r"""
echo "kernel $(uname -r)"
echo "first $(cat /proc/1/comm)"
echo "udev $(test -S /run/udev/control && echo there)"
echo "disk $(blockdev --getsize64 $LAB_DISKS)"
echo "root $(touch /new && test ! -e /old && touch /old && echo writable)"
touch "$LAB_SCRATCH/seen" && test -e "$0" && echo "paths seen"
touch tools/lab 2>/dev/null || echo "checkout read-only"
echo "to stderr" >&2
exit 7
"""
# The device's own tests would take an hour there: its life in one story, lab_story.py.
STORY = f"""
set -e
echo "$(uname -r) $(cat /proc/1/comm)"
mkfs.ext4 -q $LAB_DISKS
mount $LAB_DISKS /mnt
cd {ROOT}
{sys.executable} tests/unit/lab_story.py /mnt
"""


def lab(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, LAB, *words], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=SECONDS, check=False,
    )


@pytest.mark.parametrize(("words", "reason"), [
    (["--icount", "--cpus", "1"], "add --debian"),
    (["--no-systemd"], "add --debian"),
    (["--debian", "newest", "--icount"], "add --cpus 1"),
    (["--debian", "oldest"], "oldest"),
])
def test_refusals(words: list[str], reason: str) -> None:
    done = lab(*words, "--", "true")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert reason in done.stderr


def test_a_machine_without_systemd(tmp_path: Path) -> None:
    script = ROOT / "build" / "facts.sh"
    script.parent.mkdir(exist_ok=True)
    script.write_text(FACTS)
    options = ("--disk", "64M", "--scratch", tmp_path, "--timeout", "300")
    done = lab("--debian", "newest", "--no-systemd", *options, "--", "sh", script)
    facts = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert re.match(r"\d+\.\d+", facts.pop("kernel"))
    assert facts == {
        "first": "python3", "udev": "there", "disk": str(64 << 20), "root": "writable",
        "paths": "seen", "checkout": "read-only",
    }
    assert (done.stderr, done.returncode) == ("to stderr\n", 7)
    assert (tmp_path / "seen").exists()


def test_the_device_on_the_kernel_of_debian_stable() -> None:
    """Linux 6.12 has no zero copy, and recovery all the same."""
    done = lab("--debian", "stable", "--disk", "1G", "--timeout", "550", "--", "sh", "-c", STORY)
    print(done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    machine_is, story = done.stdout.splitlines()
    assert re.fullmatch(r"6\.12\.\S+ systemd", machine_is)
    assert json.loads(story) == {
        "data_path": "copy", "came back": True, "recovered": True, "upgraded": True, "fio": 0,
        "rest is the image's": True, "left": [], "fio, reopened": 0,
    }
