"""A process that runs seeds in one build: jobs in (a JSON line each), findings out.

    {"seeds": [first, end], "plan": {...}, "variations": null, "stop": true}
    → "seed N {changes}" before each run, then {"findings": [...], "ran": n, ...}

With variations (changes of the plan that make the nth I/O of a kind fail) each seed runs under each
of them with nth = 1, 2, … until a run does not reach it.

At the end of its input it says what it saw: {"pairs": [...], "counts": {...}, "media": "base64", ...}.
An engine that breaks an invariant of its own ends the process: the last line names the run.
"""  # noqa: E501

from __future__ import annotations

import base64
import json
import mmap
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sim.plans import Plan

NTH_MAX = 2000


class Runner:
    """One simulator, and what its last job found."""

    def __init__(self, trace: str | None) -> None:
        """`trace` names a file of some size."""
        from ubi_sim._simulate import Simulator

        self.simulator = Simulator(seen_bits=20)
        self.memory: mmap.mmap | None = None
        if trace:
            with open(trace, "r+b") as file:
                self.memory = mmap.mmap(file.fileno(), 0)

    def runs(self, seed: int, plan: Plan, variations: list[dict[str, Any]] | None,
             ) -> Iterator[tuple[dict[str, Any], Any]]:
        """Run a seed, in all variations: (changes, finding or None)."""
        for variation in [{}] if variations is None else variations:
            for nth in range(1, NTH_MAX):
                changes = {**variation, "nth": nth} if variation else {}
                print(f"seed {seed} {json.dumps(changes)}", flush=True)
                if self.memory is not None:
                    self.simulator.trace_into(self.memory)
                yield changes, self.simulator.run(seed, plan.but(**changes))
                if not changes or self.simulator.nth_seen < nth:
                    break

    def job(self, job: dict[str, Any]) -> dict[str, Any]:
        """Do one."""
        from sim.plans import Plan

        plan = Plan(**job["plan"])
        findings: list[dict[str, Any]] = []
        ran = 0
        for seed in range(*job["seeds"]):
            for changes, finding in self.runs(seed, plan, job["variations"]):
                ran += 1
                if finding is not None:
                    findings.append({"seed": seed, "changes": changes, **finding})
                    break
            if findings and job["stop"]:
                break
        return {"findings": findings, "ran": ran, "features": self.simulator.features}


def main() -> None:
    """Do jobs until the input ends; the first argument may name a file for traces."""
    runner = Runner(sys.argv[1] if len(sys.argv) > 1 else None)
    for line in sys.stdin:
        print(json.dumps(runner.job(json.loads(line))), flush=True)
    simulator = runner.simulator
    print(json.dumps({
        "pairs": simulator.pairs,
        "counts": simulator.counts,
        "media": base64.b64encode(simulator.media()).decode(),
        "processes": base64.b64encode(simulator.processes()).decode(),
    }), flush=True)


if __name__ == "__main__":
    main()
