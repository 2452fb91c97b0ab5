"""Running many seeds: worker processes, what they found and what they saw."""

from __future__ import annotations

import array
import base64
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sim.plans import EVERYDAY, Plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from sim.builder import Build

TESTS = Path(__file__).resolve().parents[1]
BROKEN = re.compile(r"broken invariant: (.*) \(")
CHUNK = 20
Variations = list[dict[str, int]]


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
    plan: Plan = EVERYDAY

    @property
    def case(self) -> Plan:
        """The plan that leads to it and nowhere else: one boundary, one branch."""
        if self.boundary < 0:
            return self.plan
        return self.plan.but(only_boundary=self.boundary, only_branch=self.branch)

    @property
    def command(self) -> str:
        """What replays it."""
        plan = shlex.quote(json.dumps(self.case.differences, separators=(",", ":")))
        return f"tools/simulate --seed {self.seed}" + (f" --plan {plan}" if plan != "'{}'" else "")

    def __str__(self) -> str:
        """Return a line for people."""
        crash = f", crash {self.boundary}:{self.branch}" if self.boundary >= 0 else ""
        detail = " ".join(f"{number:#x}" for number in self.detail)
        return f"seed {self.seed}: {self.violation}{f' ({detail})' if detail else ''}{crash}"


@dataclass
class Seen:
    """What workers saw, added up."""

    seeds: int = 0
    runs: int = 0
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
        self.runs += other.runs
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
        self._plan = EVERYDAY
        self.alive = True
        self.last: dict[str, Any] = {}

    def run(self, seeds: tuple[int, int], plan: Plan, *, stop: bool = True,
            variations: Variations | None = None) -> list[Finding]:
        """Run seeds in [first, end). Raises RuntimeError when the worker itself fails."""
        assert self._process.stdin is not None
        job = {"seeds": seeds, "plan": asdict(plan), "stop": stop, "variations": variations}
        self._plan = plan
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return [self._death()]
        answer = self._answer()
        if answer is None:
            return [self._death()]
        self.last = answer
        return [Finding(plan=plan.but(**finding.pop("changes")), detail=tuple(
            finding.pop("detail")), **finding) for finding in answer["findings"]]

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
        before = self._plan
        for line in self._process.stdout:
            if line.startswith("seed "):
                _, seed, changes = line.split(" ", 2)
                self._seed = int(seed)
                self._plan = before.but(**json.loads(changes))
            else:
                answer: dict[str, Any] = json.loads(line)
                return answer
        return None

    def _death(self) -> Finding:
        assert self._process.stderr is not None
        errors = self._process.stderr.read()
        status = self._process.wait()
        self._close()
        if status != -signal.SIGABRT:
            raise RuntimeError(f"a worker ended with {status} in seed {self._seed}:\n{errors}")
        broken = BROKEN.search(errors)
        return Finding(self._seed, f"invariant: {broken[1] if broken else errors.strip()}",
                       plan=self._plan)

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


@dataclass
class Campaign:
    """Seeds to run, by several workers at once."""

    build: Build
    seeds: range
    plan: Plan
    variations: Variations | None = None
    jobs: int = 0
    environment: dict[str, str] | None = None
    most: int = 10                 # findings after which no more seeds are begun
    chunk: int = CHUNK
    progress: Callable[[int], None] = field(default=lambda _: None)

    def run(self) -> Seen:
        """Run them all."""
        jobs = self.jobs or os.cpu_count() or 1
        self._chunks = [(first, min(first + self.chunk, self.seeds.stop))
                        for first in range(self.seeds.start, self.seeds.stop, self.chunk)]
        self._chunks.reverse()
        self._done = self._found = 0
        seen = Seen()
        with ThreadPoolExecutor(jobs) as pool:
            for own in pool.map(lambda _: self._work(), range(jobs)):
                seen.merge(own)
        seen.findings.sort(key=lambda finding: finding.seed)
        return seen

    def _work(self) -> Seen:
        own = Seen()
        while self._chunks and self._found < self.most:
            with Worker(self.build, environment=self.environment) as worker:
                self._run_chunks(worker, own)
        return own

    def _run_chunks(self, worker: Worker, own: Seen) -> None:
        """Take chunks until there are none, or the worker dies; what is left of one goes back."""
        while self._found < self.most:
            try:
                first, end = self._chunks.pop()
            except IndexError:
                break
            findings = worker.run((first, end), self.plan, stop=False, variations=self.variations)
            own.findings += findings
            self._found += len(findings)
            if not worker.alive:
                died_at = findings[-1].seed
                self._count(own, died_at + 1 - first)
                if died_at + 1 < end:
                    self._chunks.append((died_at + 1, end))
                return
            own.runs += worker.last["ran"]
            self._count(own, end - first)
        summary = worker.end()
        if summary is not None:
            own.add(summary)

    def _count(self, own: Seen, seeds: int) -> None:
        own.seeds += seeds
        self._done += seeds
        self.progress(self._done)


def first_finding(build: Build, seeds: range, plan: Plan, *, chunk: int = CHUNK,
                  variations: Variations | None = None) -> Finding | None:
    """Run seeds one after the other until something is wrong."""
    with Worker(build) as worker:
        for first in range(seeds.start, seeds.stop, chunk):
            findings = worker.run((first, min(first + chunk, seeds.stop)), plan,
                                  variations=variations)
            if findings:
                return findings[0]
    return None
