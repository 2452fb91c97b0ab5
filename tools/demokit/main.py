"""The demo on the host: makes the image, finds a kernel with ublk, has the story told there."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from demokit import image as maker  # noqa: E402

WORK = ROOT / "build" / "demo"
SPARE = 512 << 20


def main() -> int:
    """Entry point of `tools/demo`."""
    parser = argparse.ArgumentParser(prog="tools/demo")
    parser.add_argument("--keep", action="store_true")
    keep = parser.parse_args().keep
    if os.geteuid() != 0:
        print("demo: block devices are made by root: run it with sudo", file=sys.stderr)
        return 1
    image, staging = WORK / "rootfs.ext4", WORK / "staging"
    try:
        files = make_image(image, staging)
        return tell(image, staging, files)
    finally:
        if not keep:
            shutil.rmtree(WORK, ignore_errors=True)


def make_image(image: Path, staging: Path) -> int:
    """Make image and staging folder, unless they were kept; returns the number of files."""
    count = WORK / "files"
    if count.exists() and image.exists():
        return int(count.read_text())
    shutil.rmtree(WORK, ignore_errors=True)
    staging.mkdir(parents=True)
    started = time.monotonic()
    files = maker.build(image, Path("/"), staging)
    count.write_text(str(files))
    print(f"A root filesystem image: ext4, {image.stat().st_size >> 20} MiB, {files} files of this "
          f"system, made in {time.monotonic() - started:.0f} s.", flush=True)
    return files


def tell(image: Path, staging: Path, files: int) -> int:
    """Run the story natively if this kernel has ublk, else in the lab."""
    story = [sys.executable, "-P", str(ROOT / "tools/demokit/story.py"), str(image), str(staging),
             str(files)]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT / 'tools'}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1",
    }
    if Path("/dev/ublk-control").exists() or loads_driver():
        print(f"On this machine's kernel, {os.uname().release}:", flush=True)
        with tempfile.TemporaryDirectory(prefix="ublk-ubi-demo-", dir="/var/tmp") as work:
            return subprocess.run([*story, work], env=environment, check=False).returncode
    print("This machine's kernel has no ublk; in the lab, a user-mode kernel that has:", flush=True)
    disk = 2 * image.stat().st_size + SPARE
    inside = (
        "mkfs.ext4 -q /dev/ubda && mkdir -p /mnt/demo && mount /dev/ubda /mnt/demo && "
        'exec "$@"'
    )
    return subprocess.run(
        [str(ROOT / "tools/lab"), "--disk", str(disk), "--timeout", "900", "--",
         "sh", "-c", inside, "sh", *story, "/mnt/demo"],
        env=environment, cwd=ROOT, check=False,
    ).returncode


def loads_driver() -> bool:
    """Try to load ublk_drv."""
    if shutil.which("modprobe") is None:
        return False
    done = subprocess.run(["modprobe", "-q", "ublk_drv"], check=False)
    return done.returncode == 0 and Path("/dev/ublk-control").exists()


if __name__ == "__main__":
    sys.exit(main())
