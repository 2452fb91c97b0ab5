"""A disk's life on the kernel that runs it, in one go: add, verify, kill, recover, upgrade, del.

Run as root in a guest: `python lab_story.py FOLDER`, on a filesystem with direct I/O. Prints a JSON
object of what it saw; ends with 1 and a line when something is not as it should be.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

MIB = 1 << 20
SIZE = 12 * MIB
IN_USE = 5                         # exit code
WRITTEN = 3 * MIB                  # by fio, from the start, again and again
STATE = Path("/run/ublk-ubi/story/state.json")
UBI = (sys.executable, "-m", "ublk_ubi")
FIO = (
    "fio", "--name=verify", "--ioengine=io_uring", "--iodepth=16", "--direct=1", "--rw=randwrite",
    "--bs=16k", f"--size={WRITTEN}", "--verify=crc32c", "--verify_fatal=1", "--fsync=64",
    "--verify_state_save=0", "--randseed=7",
)


def ubi(*words: str) -> Any:
    done = subprocess.run([*UBI, *words, "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)}: exit {done.returncode}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def delete() -> None:
    """Once nobody has it open: where a processor is emulated, udev looks at it for seconds."""
    deadline = time.monotonic() + 60
    while (done := subprocess.run([*UBI, "del", "story"], capture_output=True, text=True,
                                  check=False)).returncode == IN_USE:  # fmt: skip
        if time.monotonic() > deadline:
            break
    if done.returncode:
        sys.exit(f"del: exit {done.returncode}: {done.stderr.strip()}")


def read(path: str, start: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(SIZE - start)


class Fio:
    """Writes and verifies until it is told to end."""

    def __init__(self, node: str, folder: Path) -> None:
        self._words = [*FIO, f"--filename={node}"]
        self._folder = folder
        self._told = threading.Event()
        self.codes: list[int] = []
        self._stat = Path("/sys/block", os.path.basename(node), "stat")
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def once(self, *more: str) -> int:
        """Run it; return its exit code."""
        done = subprocess.run([*self._words, *more], stdout=subprocess.DEVNULL, cwd=self._folder,
                              check=False)  # fmt: skip
        return done.returncode

    def _work(self) -> None:
        while not self._told.is_set() and not any(self.codes):
            self.codes.append(self.once())

    def go_on(self, more: int = 100) -> None:
        """Wait until `more` further writes have reached the disk."""
        goal = int(self._stat.read_text().split()[4]) + more
        deadline = time.monotonic() + 120
        while int(self._stat.read_text().split()[4]) < goal:
            if any(self.codes) or time.monotonic() > deadline:
                sys.exit(f"fio writes no more; its exit codes: {self.codes}")
            time.sleep(0.02)

    def end(self) -> int:
        """Let it end what it is at; return the worst exit code."""
        self._told.set()
        self._thread.join()
        return max(self.codes)


def end(pid: int, number: signal.Signals) -> None:
    """Send a daemon a signal that ends it; wait until it has."""
    pidfd = os.pidfd_open(pid)
    signal.pidfd_send_signal(pidfd, number)
    if not select.select([pidfd], [], [], 60)[0]:
        sys.exit(f"daemon {pid} does not end after {number.name}")


def another_pid(dead: int) -> int:
    """Wait for a daemon that has taken the place of `dead`; return its pid."""
    # Of the file: where a processor is emulated, the command takes seconds to say it.
    deadline = time.monotonic() + 120
    while (pid := int(json.loads(STATE.read_bytes())["pid"])) == dead:
        if time.monotonic() > deadline:
            sys.exit(f"no daemon for {dead}, which was killed")
        time.sleep(0.1)
    return pid


def main(folder: Path) -> None:
    content = random.Random(1).randbytes(SIZE)
    image, base = folder / "image", folder / "base"
    image.write_bytes(content)
    added = ubi("add", "--image", str(image), "--base", str(base), "--name", "story")
    node, pid = added["device"], added["pid"]
    saw: dict[str, Any] = {}
    user = os.open(node, os.O_RDONLY)          # between two runs of fio, too, it is in use
    fio = Fio(node, folder)
    fio.go_on()
    end(pid, signal.SIGKILL)                   # it is brought back by itself
    pid = another_pid(pid)
    saw["came back"] = True
    fio.go_on()
    end(pid, signal.SIGTERM)                   # it leaves a disk in use, until it is told
    pid = ubi("recover", "story")["recovered"][0]["pid"]
    saw["recovered"] = True
    fio.go_on()
    ubi("upgrade", "story")
    status = ubi("status", "story")
    saw["data_path"] = status["data_path"]
    saw["upgraded"] = status["pid"] != pid
    fio.go_on()
    saw["fio"] = fio.end()
    saw["rest is the image's"] = read(node, WRITTEN) == content[WRITTEN:]
    os.close(user)
    delete()
    saw["left"] = sorted(path.name for path in Path("/run/ublk-ubi").glob("story*"))
    ubi("add", "--image", str(image), "--base", str(base), "--name", "story")
    saw["fio, reopened"] = fio.once("--verify_only")
    delete()
    print(json.dumps(saw))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
