"""A process that runs seeds in one build: jobs in (a JSON line each), findings out.

    {"seeds": [first, end], "plan": {...}, "stop": true}
    → "seed N" before each, then {"findings": [...], "ran": n}

At the end of its input it says what it saw: {"pairs": [...], "counts": {...}, "media": "base64", ...}.
An engine that breaks an invariant of its own ends the process: the last line names the seed.
"""  # noqa: E501

from __future__ import annotations

import base64
import json
import mmap
import sys


def main() -> None:
    """Read jobs until the input ends; the first argument may name a file for traces."""
    from ubi_sim._simulate import Simulator  # noqa: I001

    from sim.plans import Plan

    simulator = Simulator(seen_bits=20)
    if len(sys.argv) > 1:
        with open(sys.argv[1], "r+b") as file:
            trace = mmap.mmap(file.fileno(), 0)
        simulator.trace_into(trace)
    for line in sys.stdin:
        job = json.loads(line)
        plan = Plan(**job["plan"])
        findings = []
        ran = 0
        for seed in range(*job["seeds"]):
            print(f"seed {seed}", flush=True)
            finding = simulator.run(seed, plan)
            ran += 1
            if finding is not None:
                findings.append({"seed": seed, **finding})
                if job["stop"]:
                    break
        print(json.dumps({"findings": findings, "ran": ran, "nth_seen": simulator.nth_seen,
                          "features": simulator.features}), flush=True)
        if len(sys.argv) > 1:
            simulator.trace_into(trace)
    print(json.dumps({
        "pairs": simulator.pairs,
        "counts": simulator.counts,
        "media": base64.b64encode(simulator.media()).decode(),
        "processes": base64.b64encode(simulator.processes()).decode(),
    }), flush=True)


if __name__ == "__main__":
    main()
