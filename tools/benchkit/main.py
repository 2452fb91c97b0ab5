"""The command line of tools/bench."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from labkit.errors import LabError  # noqa: E402

from benchkit import boot, cases, gate, kublk, rows, table  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Sequence

OK, SHORT, USAGE, UNABLE, INTERRUPTED = 0, 1, 2, 3, 130
QUICK_DIVISOR = 4
LIMIT_S = 3600.0

EPILOG = """\
All that is compared runs in one guest of tools/lab: Debian's newest kernel, one processor, and a
clock that counts instructions, so that a figure depends neither on this machine nor on what else
it does. Speed is what the whole system spends on a request: fio, kernel, server.

A ratio says how many times as good as its peer a subject is, also where less is better.

examples:
  tools/bench                          everything
  tools/bench --quick                  smaller doses: below 5 minutes
  tools/bench --cases hot-randread-32  one row and its peers
  tools/bench --cases 'hot-*,plain-*' --no-peers --json figures.json
  tools/bench --list                   the cases' names
  tools/bench --gate                   a few figures of ours against tools/benchkit/figures.json
  tools/bench --gate --record          keep them, as this change is meant to move them

exit status: 0 when every goal that could be looked at is met; 1 when one is not, a figure of ours
failed or, with --gate, one has lost more than 3 % twice; 2 for a wrong call; 3 when it cannot be
run; 130 when interrupted.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Refuse in one line."""
        print(f"bench: {message} (see tools/bench --help)", file=sys.stderr)
        sys.exit(USAGE)


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    made = _Parser(
        prog="tools/bench", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measure what a request costs, exactly, beside the peers.", allow_abbrev=False,
    )  # fmt: skip
    add = made.add_argument
    add("--cases", metavar="GLOB,…", action="append", default=[], help="only these")
    add("--list", action="store_true", help="print the cases' names")
    add("--quick", action="store_true", help="a quarter of the requests")
    add("--no-peers", dest="peers", action="store_false", help="leave out the servers of others")
    add("--json", metavar="FILE", type=Path, help="write the rows there, too")
    add("--gate", action="store_true", help="compare a few figures with those in the repository")
    add("--record", action="store_true", help="with --gate: keep them in the repository")
    return made


def note(text: str) -> None:
    """Say one line that is no figure."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> int:
    """Entry point of `tools/bench`."""
    made = parser()
    options = made.parse_args(arguments)
    patterns = [word for words in options.cases for word in words.split(",") if word]
    try:
        chosen = cases.select(patterns, peers=options.peers)
    except ValueError as error:
        made.error(f"--cases {error}: no case has that name; --list shows them")
    if options.gate and (patterns or options.json or options.quick):
        made.error("--gate has its own figures: leave --cases, --quick and --json out")
    if options.record and not options.gate:
        made.error("--record keeps what --gate measures: add --gate")
    if options.list:
        print(*dict.fromkeys(case.name for case in chosen), sep="\n")
        return OK
    if options.json is not None and not os.access(options.json.absolute().parent, os.W_OK):
        made.error(f"--json {options.json}: its folder is not there or not writable: name another")
    signal.signal(signal.SIGTERM, _stop)
    try:
        return _gate(record=options.record) if options.gate else _measure(chosen, options)
    except (boot.BenchError, LabError) as error:
        note(str(error))
        return UNABLE
    except KeyboardInterrupt:
        return INTERRUPTED


def _stop(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)


def _measure(chosen: list[cases.Case], options: argparse.Namespace) -> int:
    figures = cases.figures(chosen)
    divisor = QUICK_DIVISOR if options.quick else 1
    measured = boot.measure(figures, divisor, _kublk(figures), LIMIT_S, _Progress(len(figures)))
    made = rows.make(chosen, measured)
    print(f"kernel {measured.kernel}, {boot.CLOCK}\n", *table.lines(made), "", sep="\n")
    print(*table.legend(made), *table.troubles(measured.missing, measured.failed), sep="\n")
    if options.json is not None:
        options.json.write_text(json.dumps(rows.document(measured.kernel, made), indent=1) + "\n")
    ours_failed = any(name.startswith("ubi") for name in measured.failed)
    return SHORT if ours_failed or any(row.met is False for row in made) else OK


def _gate(*, record: bool) -> int:
    figures = gate.figures()
    measured = boot.measure(figures, gate.DIVISOR, None, LIMIT_S, _Progress(len(figures)))
    if record:
        if len(measured.values) < len(figures):
            raise boot.BenchError("; ".join(table.troubles(measured.missing, measured.failed)))
        gate.record(measured)
    verdicts = gate.judge(measured, gate.read())
    if figures := gate.lost(verdicts):
        note("what has lost is measured once more")
        again = boot.measure(figures, gate.DIVISOR, None, LIMIT_S, _Progress(len(figures)))
        gate.take_better(measured, again)
        verdicts = gate.judge(measured, gate.read())
    print(f"kernel {measured.kernel}: figure, value, value recorded, ratio")
    print(*gate.lines(verdicts), sep="\n")
    return SHORT if any(verdict.fails for verdict in verdicts) else OK


def _kublk(figures: list[cases.Figure]) -> Path | None:
    """Have kublk if it is needed; without it, the table names what it lacks."""
    if not any(figure.subject.startswith("kublk") for figure in figures):
        return None
    try:
        return kublk.find_or_build(note)
    except LabError as error:
        note(f"kublk cannot be had: {error}")
        return None


class _Progress:
    """A line for each figure, as it comes."""

    def __init__(self, count: int) -> None:
        self._count, self._done = count, 0
        self._started = time.monotonic()

    def __call__(self, told: dict[str, Any]) -> None:
        if "figure" not in told:
            return
        self._done += 1
        value = told.get("value")
        text = table.NOT_HAD if value is None else f"{table.number(value)} {told['unit']}"
        took = time.monotonic() - self._started
        note(f"{self._done}/{self._count}, {took:.0f} s: {told['figure']}: {text}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
