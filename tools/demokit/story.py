"""The demo itself, run where ublk is: add, compare, write, del, add again, compare."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from demokit.image import walk

NAME = "demo"
LINK = f"/dev/ublk-ubi/{NAME}"
CLI = [sys.executable, "-m", "ublk_ubi"]
COLOUR = sys.stdout.isatty()


class Broken(Exception):  # noqa: N818 - a finding
    """Something does not hold."""


def say(text: str, detail: str = "") -> None:
    """Tell one thing that holds."""
    mark = "\033[32m✓\033[0m" if COLOUR else "ok"
    print(f"  {mark} {text:<52} {detail}", flush=True)


def run(*command: str) -> str:
    """Run a command; what it prints on failure is the reason."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Broken(f"`{' '.join(command)}` failed ({done.returncode}): "
                     f"{(done.stderr or done.stdout).strip()}")
    return done.stdout


def ubi(*arguments: str) -> str:
    """Run ublk-ubi as a user does."""
    return run(*CLI, *arguments)


def digest(path: Path) -> str:
    """SHA-256 of a file, or of where a link points."""
    if path.is_symlink():
        return "→ " + os.readlink(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def compare(mounted: Path, staging: Path, expected: int) -> int:
    """Every file of the mounted disk against its source; returns the bytes read."""
    seen = total = 0
    for path in walk(mounted):
        relative = path.relative_to(mounted)
        if digest(path) != digest(staging / relative):
            raise Broken(f"/{relative} differs from its source")
        seen += 1
        total += path.lstat().st_size
    if seen != expected:
        raise Broken(f"the disk holds {seen} files, its source {expected}")
    return total


def add(image: Path, base: Path, *more: str) -> float:
    """Add the device; returns the seconds that it took."""
    started = time.monotonic()
    link = ubi("add", "--image", str(image), "--base", str(base), "--name", NAME, *more).split()[0]
    took = time.monotonic() - started
    if link != LINK:
        raise Broken(f"`add` printed {link}, not {LINK}")
    return took


def status() -> dict:
    """Return the device's status."""
    return json.loads(ubi("status", NAME, "--json"))


def tell(image: Path, staging: Path, files: int, work: Path) -> None:
    """Tell the whole story; raises Broken at the first thing that does not hold."""
    base, copy, mounted = work / "base", work / "copy", work / "mounted"
    mounted.mkdir()
    before = digest(image)
    started = time.monotonic()
    run("dd", f"if={image}", f"of={copy}", "bs=1M", "conv=fsync", "status=none")
    copying = time.monotonic() - started
    copy.unlink()

    took = add(image, base)
    say("add: the disk is there", f"{took:.2f} s; copying the image takes {copying:.2f} s")
    run("mount", LINK, str(mounted))
    say("mount: it is an ordinary disk", LINK)
    total = compare(mounted, staging, files)
    say(f"{files} files equal their source", f"{total >> 20} MiB read and hashed")
    stripes = status()["stripes"]
    say("the stripes that were read live on the base now",
        f"{stripes['hydrated']} of {stripes['total']}")

    note = f"written at {time.ctime()}\n" * 1000
    victim = next(path for path in walk(mounted) if path.is_file() and not path.is_symlink())
    gone = victim.relative_to(mounted)
    (mounted / "note").write_text(note)
    (mounted / "random").write_bytes(os.urandom(64 << 20))
    random = digest(mounted / "random")
    victim.unlink()
    run("umount", str(mounted))
    run("e2fsck", "-fn", LINK)
    say("write, delete, unmount: the filesystem is clean", "64 MiB written")
    ubi("del", NAME)
    if Path(LINK).exists():
        raise Broken(f"{LINK} is still there after `del`")
    say("del: nothing is left but the base", f"{base.stat().st_blocks * 512 >> 20} MiB on disk")

    took = add(image, base)
    run("mount", LINK, str(mounted))
    if (mounted / "note").read_text() != note or digest(mounted / "random") != random:
        raise Broken("what was written is not there after `del` and `add`")
    if (mounted / gone).exists():
        raise Broken(f"{gone} was deleted and is back")
    say("add again: every write is there", f"{took:.2f} s")
    run("umount", str(mounted))
    ubi("del", NAME)
    if digest(image) != before:
        raise Broken("the image file has changed")
    say("the image file is bit for bit untouched", before[:16] + "…")


def main() -> int:
    """Entry point: image, staging folder, number of files, folder to work in."""
    image, staging, files, work = sys.argv[1:]
    try:
        tell(Path(image), Path(staging), int(files), Path(work))
    except Broken as broken:
        print(f"demo: {broken}", file=sys.stderr)
        subprocess.run([*CLI, "del", NAME, "--force", "--if-exists"], capture_output=True,
                       check=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
