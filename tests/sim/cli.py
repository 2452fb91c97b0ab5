"""The command line of tools/simulate."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import fields
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Sequence

from sim import pairs, sweeps
from sim.builder import Build, Variant, build
from sim.campaign import Campaign, Finding, Seen
from sim.hunt import Verdict, hunt
from sim.lines import Lines, counting
from sim.mutants import MUTANTS, Mutant
from sim.output import Output, Progress, of_finding
from sim.plans import EVERYDAY, Plan
from sim.replay import Shrinker, replay

USAGE = 2
BROKEN = 3
SEEDS = 1000
MUTANT_SEEDS = 300
# What a thousand seeds must show.
STATES_MIN = 200_000
LINES_MIN_PERCENT = 95

EPILOG = """\
A seed is a world: a disk with a volatile cache, guests, two hosts, faults. It is run to its end,
and at every boundary between two actions it is crashed in several ways, opened again, and read.
What is read is checked by an oracle that knows requests and crashes alone (docs/simulation.md).

examples:
  tools/simulate --seeds 1000             0 violations; crash states, lines and pairs that were seen
  tools/simulate --seed 17                one seed; a violation is shrunk, and traced
  tools/simulate --seed 17 --trace        its trace, whatever it does
  tools/simulate --faults 5               the 1st, 2nd, ... I/O of each kind fails, in five worlds
  tools/simulate --small 20               small worlds: every subset of the pending writes
  tools/simulate --mutants                planted bugs: which seed kills each
  tools/simulate --mutants --only latch   those with "latch" in their name
  tools/simulate --seed 3 --mutant "FUA as plain"   how it looks when one is killed

exit status: 0 when all is as it must be; 1 when there is a violation, a planted bug survives, or
something was not covered; 2 for a wrong call; 3 when something cannot be built or run.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Refuse in one line."""
        print(f"simulate: {message} (see tools/simulate --help)", file=sys.stderr)
        sys.exit(USAGE)


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: give a number")
    return int(text)


def _plan(text: str) -> Plan:
    try:
        changes = json.loads(text)
        return Plan(**changes)
    except (ValueError, TypeError):
        names = ", ".join(item.name for item in fields(Plan))
        raise argparse.ArgumentTypeError(
            f"{text!r}: give a JSON object, as a violation prints it; of {names}") from None


def _mutant(text: str) -> Mutant:
    for mutant in MUTANTS:
        if mutant.name == text:
            return mutant
    raise argparse.ArgumentTypeError(f"there is no planted bug {text!r}: --mutants --list has them")


def parser() -> argparse.ArgumentParser:
    """Return what understands the command line."""
    words = _Parser(prog="tools/simulate", epilog=EPILOG,
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    description="Drives the compiled engines through every crash point.")
    what = words.add_mutually_exclusive_group()
    what.add_argument("--seeds", type=_number, metavar="N", help=f"run N seeds (default: {SEEDS})")
    what.add_argument("--seed", type=_number, metavar="S", help="run one seed; replay a violation")
    what.add_argument("--faults", type=_number, metavar="N",
                      help="N seeds in which the 1st, 2nd, ... I/O of each kind fails")
    what.add_argument("--small", type=_number, metavar="N",
                      help="N small worlds, with every subset of their pending writes")
    what.add_argument("--mutants", action="store_true", help="planted bugs must be killed")
    words.add_argument("--first", type=_number, default=0, metavar="S", help="the first seed: 0")
    words.add_argument("--plan", type=_plan, default=EVERYDAY, metavar="JSON",
                       help="what a run is besides its seed, as a violation prints it")
    words.add_argument("--mutant", type=_mutant, metavar="NAME", help="with a bug planted")
    words.add_argument("--only", default="", metavar="TEXT",
                       help="planted bugs with TEXT in their name")
    words.add_argument("--limit", type=_number, default=MUTANT_SEEDS, metavar="N",
                       help=f"seeds that a planted bug is given: {MUTANT_SEEDS}")
    words.add_argument("--list", action="store_true", help="list the planted bugs")
    words.add_argument("--trace", action="store_true", help="print the trace of a clean seed, too")
    words.add_argument("--no-shrink", action="store_true", help="leave a violation as it is")
    words.add_argument("--jobs", type=_number, default=0, metavar="N", help="processes: one a CPU")
    words.add_argument("--json", action="store_true", help="one JSON object")
    return words


# -- what was seen -------------------------------------------------------------------------------

def _tell_findings(output: Output, findings: list[Finding]) -> None:
    for finding in findings:
        output.line(f"   {finding}")
        output.line(f"      {finding.command}")
    output.put(violations=[of_finding(finding) for finding in findings])


def _tell_seen(output: Output, seen: Seen, began: float) -> None:
    took = time.monotonic() - began
    output.check(f"{len(seen.findings)} violations in {seen.seeds} seeds", good=not seen.findings)
    _tell_findings(output, seen.findings)
    output.line(f"   {seen.crashes:,} crashes, {seen.events:,} events, {seen.runs:,} runs,"
                f" {took:.1f} s")
    output.line(f"   {len(seen.media):,} distinct crash states on the medium (power loss),"
                f" {len(seen.processes):,} of medium, cache and table (killed process)")
    output.put(seeds=seen.seeds, runs=seen.runs, crashes=seen.crashes, events=seen.events,
               crash_states=len(seen.media) + len(seen.processes),
               power_loss_states=len(seen.media), process_crash_states=len(seen.processes),
               seconds=round(took, 2))


def _tell_coverage(output: Output, seen: Seen, lines: Lines, *, enough: bool) -> None:
    """What must have been seen is asked of a thousand seeds; of fewer it is told."""
    states = len(seen.media) + len(seen.processes)
    output.check(f"{states:,} distinct crash states", good=not enough or states >= STATES_MIN)
    output.check(f"engine lines covered: {lines.covered} of {lines.total}, {lines.percent:.1f} %",
                 good=not enough or lines.percent >= LINES_MIN_PERCENT)
    for name, number, text in lines.missing():
        output.line(f"      {name}:{number}: {text}")
    missing, illegal = pairs.missing(seen.pairs), pairs.illegal(seen.pairs)
    output.check(f"state x event pairs covered: {len(pairs.LEGAL) - len(missing)} of"
                 f" {len(pairs.LEGAL)}", good=not illegal and not (enough and missing))
    for name in missing:
        output.line(f"      not seen: {name}")
    for index in illegal:
        output.line(f"      seen, and not legal: {index} (tests/sim/ubi_sim/_coverage.pxd)")
    output.put(lines_covered=lines.covered, lines=lines.total, pairs=len(pairs.LEGAL),
               pairs_missing=missing, lines_missing=[f"{name}:{number}" for name, number, _ in
                                                     lines.missing()])


def run_seeds(output: Output, words: argparse.Namespace) -> None:
    """--seeds: one in ten of them in the build that counts lines."""
    count = SEEDS if words.seeds is None else words.seeds
    seeds = range(words.first, words.first + count)
    counted = range(seeds.start, seeds.start + count // 10)
    progress = Progress("seeds", count)
    with counting() as counter:
        made = _built(words)
        began = time.monotonic()
        seen = Campaign(counter.build, counted, _planned(words), jobs=words.jobs,
                        environment=counter.environment).run()
        seen.merge(Campaign(made, range(counted.stop, seeds.stop), _planned(words),
                            jobs=words.jobs, progress=progress).run())
        calm = sweeps.calm_worlds(made, seeds, _planned(words))
        crashed = seen.seeds
        seen.merge(calm)
        output.line(f"   {crashed:,} worlds crashed at every boundary, {calm.seeds:,} not crashed")
        _tell_seen(output, seen, began)
        _tell_coverage(output, seen, counter.lines(), enough=crashed >= SEEDS)


def run_sweep(output: Output, words: argparse.Namespace) -> None:
    """--faults, --small."""
    made = _built(words)
    count = words.small if words.faults is None else words.faults
    seeds = range(words.first, words.first + count)
    sweep = sweeps.small_worlds if words.faults is None else sweeps.nth_faults
    began = time.monotonic()
    _tell_seen(output, sweep(made, seeds, Progress("seeds", count)), began)


# -- one seed ------------------------------------------------------------------------------------

def _planned(words: argparse.Namespace) -> Plan:
    plan: Plan = words.plan
    return plan.but(bug=words.mutant.bug) if words.mutant else plan


def _built(words: argparse.Namespace) -> Build:
    return build(words.mutant.variant if words.mutant else Variant())


def run_seed(output: Output, words: argparse.Namespace) -> None:
    """--seed."""
    made = _built(words)
    result = replay(made, words.seed, _planned(words))
    finding = result.finding
    if finding is not None:
        output.check(str(finding), good=False)
        if not words.no_shrink:
            finding = Shrinker(made, finding).shrink()
            requests = finding.plan.requests - finding.plan.skipped.bit_count()
            output.line(f"   shrunk to {requests} requests: {finding}")
            result = replay(made, words.seed, finding.case)
        output.line(f"      {finding.command}")
        output.put(violations=[of_finding(finding)])
    else:
        output.line(f"   seed {words.seed}: no violation")
        output.put(violations=[])
    if finding is not None or words.trace:
        lines = result.trace
        output.put(trace=lines)
        for line in lines:
            output.line(line)


# -- planted bugs --------------------------------------------------------------------------------

def _tell_verdict(output: Output, verdict: Verdict) -> None:
    mutant = verdict.mutant
    if mutant.survives:
        outcome = "survives, as it must" if verdict.finding is None else f"NO: {verdict.finding}"
    elif verdict.finding is None:
        outcome = f"SURVIVES {verdict.seeds} seeds"
    else:
        outcome = str(verdict.finding)
    output.check(f"{mutant.name}: {outcome}", good=verdict.good)


def run_mutants(output: Output, words: argparse.Namespace) -> None:
    """--mutants."""
    mutants = [mutant for mutant in MUTANTS if words.only.lower() in mutant.name.lower()]
    if words.list:
        for mutant in mutants:
            output.line(f"{mutant.name}: {mutant.why}")
        output.put(mutants=[mutant.name for mutant in mutants])
        return
    began = time.monotonic()
    seeds = range(words.first, words.first + words.limit)
    verdicts = []
    for verdict in hunt(mutants, seeds, jobs=words.jobs):
        _tell_verdict(output, verdict)
        verdicts.append(verdict)
    bugs = [verdict for verdict in verdicts if not verdict.mutant.survives]
    killed = sum(verdict.finding is not None for verdict in bugs)
    harmless = [verdict for verdict in verdicts if verdict.mutant.survives]
    output.check(f"planted {len(bugs)}, killed {killed}", good=killed == len(bugs))
    output.line(f"   {sum(verdict.good for verdict in harmless)} of {len(harmless)} harmless"
                f" changes survive")
    last = max((verdict.finding.seed for verdict in bugs if verdict.finding), default=0)
    clean = Campaign(build(), seeds, EVERYDAY.but(blind=True), jobs=words.jobs).run()
    output.check(f"without them the same {len(seeds)} seeds have {len(clean.findings)} violations"
                 f" (the last that killed was {last}; {time.monotonic() - began:.0f} s)",
                 good=not clean.findings)
    _tell_findings(output, clean.findings)
    output.put(planted=len(bugs), killed=killed, mutants=[
        {"name": verdict.mutant.name, "survives": verdict.mutant.survives, "good": verdict.good,
         "finding": of_finding(verdict.finding) if verdict.finding else None}
        for verdict in verdicts])


def main(words: Sequence[str] | None = None) -> int:
    """Return the exit status."""
    chosen = parser().parse_args(words)
    output = Output(chosen.json)
    try:
        if chosen.mutants or chosen.list:
            run_mutants(output, chosen)
        elif chosen.seed is not None:
            run_seed(output, chosen)
        elif chosen.faults is not None or chosen.small is not None:
            run_sweep(output, chosen)
        else:
            run_seeds(output, chosen)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"simulate: {error}", file=sys.stderr)
        return BROKEN
    return output.end()


if __name__ == "__main__":
    sys.exit(main())
