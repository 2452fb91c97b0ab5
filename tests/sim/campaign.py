"""Running many seeds: worker processes, what they found and what they saw."""

from __future__ import annotations

import array
import base64
import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sim.builder import Build  # noqa: TC002
from sim.plans import Plan  # noqa: TC002

TESTS = Path(__file__).resolve().parents[1]
BROKEN = re.compile(r"broken invariant: (.*) \(")
CHUNK = 20


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: a violation, or an invariant that an engine found broken."""

    seed: int
    violation: str
    detail: tuple[int, ...] = ()
    boundary: int = -1
    branch: int = -1
    drawn: int = 0
    features: int = 0

    def __str__(self) -> str:
        """Return a line for people."""
        crash = f", crash {self.boundary}:{self.branch}" if self.boundary >= 0 else ""
        detail = " ".join(f"{number:#x}" for number in self.detail)
        return f"seed {self.seed}: {self.violation}{f' ({detail})' if detail else ''}{crash}"


@dataclass
class Seen:
    """What workers saw, added up."""

    seeds: int = 0
    crashes: int = 0
    events: int = 0
    media: set[int] = field(default_factory=set)
    processes: set[int] = field(default_factory=set)
    pairs: list[int] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def add(self, summary: dict[str, Any]) -> None:
        """Add a worker's last words."""
        self.crashes += summary["counts"]["crashes"]
        self.events += summary["counts"]["events"]
        self.media.update(_numbers(summary["media"]))
        self.processes.update(_numbers(summary["processes"]))
        self.pairs = [a + b for a, b in zip(self.pairs or [0] * len(summary["pairs"]),
                                            summary["pairs"], strict=True)]

    def merge(self, other: Seen) -> None:
        """Add what others saw."""
        self.seeds += other.seeds
        self.crashes += other.crashes
        self.events += other.events
        self.media |= other.media
        self.processes |= other.processes
        self.pairs = [a + b for a, b in zip(self.pairs or [0] * len(other.pairs),
                                            other.pairs or [0] * len(self.pairs), strict=True)]
        self.findings += other.findings


def _numbers(text: str) -> array.array[int]:
    numbers = array.array("Q")
    numbers.frombytes(base64.b64decode(text))
    return numbers


class Worker:
    """A worker process. When it dies of a broken invariant, that is the finding."""

    def __init__(self, build: Build, trace: Path | None = None,
                 environment: dict[str, str] | None = None) -> None:
        """Start it; `trace` names a file of some size that traces are written into."""
        paths = os.pathsep.join([str(build.folder), str(TESTS)])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "sim.worker", *([str(trace)] if trace else [])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **(environment or {}), "PYTHONPATH": paths,
                 "PYTHONDONTWRITEBYTECODE": "1"},
        )
        self._seed = -1
        self.alive = True
        self.last: dict[str, Any] = {}

    def run(self, seeds: tuple[int, int], plan: Plan, *, stop: bool = True) -> list[Finding]:
        """Run seeds in [first, end). Raises RuntimeError when the worker itself fails."""
        assert self._process.stdin is not None
        job = {"seeds": seeds, "plan": asdict(plan), "stop": stop}
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return [self._death()]
        answer = self._answer()
        if answer is None:
            return [self._death()]
        self.last = answer
        return [Finding(**{**finding, "detail": tuple(finding["detail"])})
                for finding in answer["findings"]]

    def end(self) -> dict[str, Any] | None:
        """Let it end; return what it saw."""
        if not self.alive:
            return None
        assert self._process.stdin is not None
        self._process.stdin.close()
        answer = self._answer()
        self._close()
        return answer

    def _answer(self) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("seed "):
                self._seed = int(line[5:])
            else:
                return json.loads(line)
        return None

    def _death(self) -> Finding:
        assert self._process.stderr is not None
        errors = self._process.stderr.read()
        status = self._process.wait()
        self._close()
        if status != -signal.SIGABRT:
            raise RuntimeError(f"a worker ended with {status} in seed {self._seed}:\n{errors}")
        broken = BROKEN.search(errors)
        return Finding(self._seed, f"invariant: {broken[1] if broken else errors.strip()}")

    def _close(self) -> None:
        self.alive = False
        for file in (self._process.stdin, self._process.stdout, self._process.stderr):
            if file is not None:
                try:
                    file.close()
                except BrokenPipeError:
                    continue
        self._process.wait()

    def __enter__(self) -> Worker:  # noqa: PYI034
        """Return it; `with` ends it."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process, whatever it does."""
        if self.alive:
            self._process.kill()
            self._close()


def run_seeds(build: Build, seeds: range, plan: Plan, *, jobs: int = 0,
              environment: dict[str, str] | None = None, most: int = 10) -> Seen:
    """Run seeds in parallel; after `most` findings no more are begun."""
    jobs = jobs or os.cpu_count() or 1
    chunks = [(first, min(first + CHUNK, seeds.stop))
              for first in range(seeds.start, seeds.stop, CHUNK)]
    chunks.reverse()
    seen = Seen()

    def work(_: int) -> Seen:
        own = Seen()
        while chunks and len(seen.findings) + len(own.findings) < most:
            with Worker(build, environment=environment) as worker:
                _run_chunks(worker, chunks, plan, own, most)
        return own

    with ThreadPoolExecutor(jobs) as pool:
        for own in pool.map(work, range(jobs)):
            seen.merge(own)
    seen.findings.sort(key=lambda finding: finding.seed)
    return seen


def _run_chunks(worker: Worker, chunks: list[tuple[int, int]], plan: Plan, own: Seen,
                most: int) -> None:
    """Take chunks until there are none, or the worker dies; what is left of one goes back."""
    while len(own.findings) < most:
        try:
            first, end = chunks.pop()
        except IndexError:
            break
        findings = worker.run((first, end), plan, stop=False)
        own.findings += findings
        if not worker.alive:
            died_at = findings[-1].seed
            own.seeds += died_at + 1 - first
            if died_at + 1 < end:
                chunks.append((died_at + 1, end))
            return
        own.seeds += end - first
    summary = worker.end()
    if summary is not None:
        own.add(summary)


def first_finding(build: Build, seeds: range, plan: Plan) -> Finding | None:
    """Run seeds one after the other until something is wrong."""
    with Worker(build) as worker:
        for first in range(seeds.start, seeds.stop, CHUNK):
            findings = worker.run((first, min(first + CHUNK, seeds.stop)), plan)
            if findings:
                return findings[0]
    return None
