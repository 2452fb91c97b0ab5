"""The guest's side in a Debian machine: does plan.json, runs COMMAND, tells its end, powers off.

Started by /usr/lib/lab/init, as a service of systemd's or as the first process. Serial ports:
ttyS0 COMMAND's stdout, ttyS1 its stderr, ttyS2 control ("boot", then "exit N" or "fail TEXT"). The
last word is said when all output has left. A restarted guest runs COMMAND again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import threading
import tty
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CHUNK = 4096
MODULES = ("loop", "brd", "ublk_drv")
MOUNTS = (
    ("debugfs", "/sys/kernel/debug"),
    ("tmpfs", "/dev/shm"),
    ("tmpfs", "/tmp"),
    ("devpts", "/dev/pts"),
)


def line(number: int) -> int:
    """Open a serial port, made to pass every byte."""
    fd = os.open(f"/dev/ttyS{number}", os.O_RDWR | os.O_NOCTTY)
    tty.setraw(fd)
    return fd


def mount(*words: str) -> None:
    """Mount, or say why not."""
    result = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    if result.returncode:
        raise OSError(f"mount {' '.join(words)}: {result.stderr.strip()}")


def make_machine(plan: dict[str, Any]) -> None:
    """Mount what COMMAND is to see; as the first process, also what systemd would have."""
    if os.getpid() == 1:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
        for kind, folder in MOUNTS:
            os.makedirs(folder, exist_ok=True)
            if not os.path.ismount(folder):
                mount("-t", kind, kind, folder)
        subprocess.run(["ip", "link", "set", "lo", "up"], check=False)
        os.sethostname("lab") if hasattr(os, "sethostname") else None
    for module in MODULES:
        extra = ["rd_nr=8", "rd_size=4194304"] if module == "brd" else []
        subprocess.run(["modprobe", module, *extra], check=False)
    options = "trans=virtio,version=9p2000.L,msize=512000,cache=loose"
    for share in plan["shares"]:
        os.makedirs(share["path"], exist_ok=True)
        mode = "rw,cache=none" if share["writable"] else "ro"
        mount("-t", "9p", "-o", f"{options},{mode}", share["tag"], share["path"])


def pump(source: int, sink: int) -> None:
    """Carry bytes until all writers are gone."""
    while data := os.read(source, CHUNK):
        view = memoryview(data)
        while view:
            view = view[os.write(sink, view) :]


def rest(source: int, sink: int) -> None:
    """Carry what is there; a daemon that COMMAND left behind may hold the pipe open for ever."""
    fcntl.fcntl(source, fcntl.F_SETFL, os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        pump(source, sink)
    termios.tcdrain(sink)


def run(plan: dict[str, Any], sinks: list[int]) -> int:
    """Run COMMAND; return the exit status as a shell would."""
    pipes = [os.pipe() for _ in sinks]
    try:
        process = subprocess.Popen(
            plan["command"],
            stdin=subprocess.DEVNULL,
            stdout=pipes[0][1],
            stderr=pipes[1][1],
            cwd=plan["cwd"],
            env=plan["environment"],
            start_new_session=True,
        )
    except OSError as error:
        os.write(sinks[1], f"lab: cannot run {error.filename}: {error.strerror}\n".encode())
        return 127 if isinstance(error, FileNotFoundError) else 126
    for _, end in pipes:
        os.close(end)
    for (source, _), sink in zip(pipes, sinks, strict=True):
        threading.Thread(target=pump, args=(source, sink), daemon=True).start()
    if os.getpid() == 1:  # bury whoever is left to the first process
        while (gone := os.waitpid(-1, 0))[0] != process.pid:
            pass
        status = os.waitstatus_to_exitcode(gone[1])
    else:
        status = process.wait()
    for (source, _), sink in zip(pipes, sinks, strict=True):
        rest(source, sink)
    return status if status >= 0 else 128 - status


def main() -> None:
    """Do the plan; the guest's end is the end of this."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    control = line(2)

    def tell(text: str) -> None:
        os.write(control, f"{text}\n".replace("\r", " ").encode())
        termios.tcdrain(control)

    tell("boot")
    try:
        plan = json.loads((HERE / "plan.json").read_text())
        make_machine(plan)
        status = run(plan, [line(0), line(1)])
        subprocess.run(["sync", "-f", os.environ.get("LAB_SCRATCH", "/")], check=False)
        tell(f"exit {status}")
    except OSError as error:
        tell(f"fail {error}")
    sys.stdout.flush()
    subprocess.run(["systemctl", "poweroff", "-ff"], check=False)


if __name__ == "__main__":
    main()
