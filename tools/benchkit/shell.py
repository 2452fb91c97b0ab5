"""Commands in the guest, and its clocks. The guest's monotonic clock counts instructions."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WAIT_S = 60.0                      # of the guest's time
FEATURES = "/sys/kernel/debug/sched/features"


class MissingError(Exception):
    """A peer cannot be had here, and why."""


class FailedError(Exception):
    """A command that must not fail did."""


def run(*words: str) -> str:
    """Run a command; return its stdout."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        told = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise FailedError(f"{' '.join(words)}: exit {done.returncode}: {told[-1]}")
    return done.stdout


@contextlib.contextmanager
def running(*words: str) -> Iterator[subprocess.Popen[str]]:
    """Have a process run meanwhile."""
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def until(done: Callable[[], bool], what: str, step_s: float = 0.01) -> None:
    """Wait for something that can only be looked at."""
    deadline = time.monotonic() + WAIT_S
    while not done():
        if time.monotonic() > deadline:
            raise FailedError(f"{what}: not within {WAIT_S:g} s")
        time.sleep(step_s)


@contextlib.contextmanager
def each_until_it_waits() -> Iterator[None]:
    """Have nobody who is woken take the processor from who has it.

    Whether a server that is woken does so is the scheduler's lot on one processor. It decides how
    many requests the server finds, and moves one and the same figure by a tenth from run to run.
    """
    _set_feature("NO_WAKEUP_PREEMPTION")
    try:
        yield
    finally:
        _set_feature("WAKEUP_PREEMPTION")


def _set_feature(name: str) -> None:
    with open(FEATURES, "w") as file:
        file.write(name)


def fio_report(text: str) -> dict[str, Any]:
    """Read fio's JSON, which may stand behind notes of its own."""
    at = text.find("{")
    if at < 0:
        raise FailedError(f"fio: {text.strip() or 'no output'}")
    job: dict[str, Any] = json.loads(text[at:])["jobs"][0]
    if job["error"]:
        raise FailedError(f"fio: error {job['error']} of its job")
    return job


def busy_ns() -> int:
    """Tell how long the processor has run tasks: the instructions of all but the idle task."""
    with open("/proc/schedstat") as file:
        return sum(int(line.split()[7]) for line in file if line.startswith("cpu"))


def cost_ns(work: Callable[[], object]) -> int:
    """Tell the instructions of all tasks but this one, which may look on, while it works."""
    def others() -> int:
        with open("/proc/self/schedstat") as file:
            return busy_ns() - int(file.read().split()[0])

    before = others()
    work()
    return others() - before


def await_copy(copied: Callable[[], int], before: int, size: int) -> None:
    """Await a copy in the background: look the more often the nearer its end.

    To look may cost a process, so there are some ten looks.
    """
    started = time.monotonic_ns()
    while (done := copied() - before) < size:
        spent = (time.monotonic_ns() - started) / 1e9
        if spent > WAIT_S:
            raise FailedError(f"copied {done} of {size} bytes in {WAIT_S:g} s")
        left = spent * (size - done) / done if done else 0.05
        time.sleep(max(min(left / 2, 0.2), 0.001))


def bytes_of(pid: int, what: str) -> int:
    """Tell how many bytes a process has had read from, or written to, storage."""
    with open(f"/proc/{pid}/io") as file:
        fields = dict(line.split(": ") for line in file)
    return int(fields[f"{what}_bytes"])
