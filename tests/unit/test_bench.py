"""tools/bench: figures into rows, rows into table and JSON, the gate; and the gate itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from benchkit import boot, cases, gate, loads, main, rows, servers, special, table
from benchkit.cases import Case, Figure
from labkit import machine
from labkit.kernel import cache_folder

ROOT = Path(__file__).resolve().parents[2]
MAIN = ROOT / "tools/benchkit/main.py"
GATE_S = 900

OURS, PEER = Figure("ubi-zero-copy", "randread-32"), Figure("kublk-loop", "randread-32")
ADD = Figure("ubi-add", "add-1g")
KERNEL = "7.3.4-amd64"
MADE = machine.find(cache_folder(), "newest") is not None


def measured(**values: float) -> boot.Measured:
    """Have figures, named with __ for the slash and _ for dashes."""
    found = boot.Measured(kernel=KERNEL)
    for name, value in values.items():
        figure = name.replace("__", "/").replace("_", "-")
        unit = loads.INSTRUCTIONS if figure.startswith("ubi-add") else loads.RATE
        found.take({"figure": figure, "value": value, "unit": unit})
    return found


# -- cases ----------------------------------------------------------------------------------------


def test_every_figure_can_be_measured() -> None:
    for figure in [*cases.figures(list(cases.ALL)), *gate.figures()]:
        by_fio = figure.load in loads.BY_NAME and figure.subject in servers.SUBJECTS
        assert by_fio != (tuple(figure) in special.SPECIAL), figure
        assert figure.subject in cases.WHAT, figure


def test_every_row_of_the_goals_is_there() -> None:
    """What the project promises of its speed: (case, peer) and the least ratio."""
    goals = {(case.name, case.peer.subject if case.peer else ""): case.goal for case in cases.ALL}
    for name in ("hot-randread-32", "hot-randwrite-32", "hot-randread-1"):
        assert goals[name, "kublk-loop"] == 1.0
        assert goals[name, "qsd"] == goals[name, "nbdkit"] == 3.0
    assert goals["plain-randread-32", "kublk-loop-plain"] == 1.0
    assert goals["plain-randwrite-32", "kublk-loop-plain"] == 1.0
    assert goals["writethrough-randwrite-32", "ubi-zero-copy"] == 0.75
    assert goals["read-1m", "kublk-loop"] == 0.97
    assert goals["cold-randread-32", "ubi-zero-copy"] == 0.97
    assert (goals["cold-read-1m", "dd"], goals["cold-read-1m", "qsd-cold"]) == (0.60, 3.0)
    assert (goals["hydration", "dd"], goals["hydration", "dm-clone-cold-1m"]) == (0.95, 1.0)
    assert goals["first-touch-64k", "dm-clone-cold-64k"] == 1.0
    assert goals["first-touch-1m", "dm-clone-cold-1m"] == 1.0
    assert goals["write-fsync-1", "kublk-loop"] == 0.9
    assert goals["hot-while-hydrating", "ubi-zero-copy"] == 0.70
    assert goals["hydration-under-load", "ubi-cold-1m"] == 0.20
    limits = {case.name: case.limit for case in cases.ALL if case.limit is not None}
    assert limits == {"fsync-16-cold": 250.0, "longest-wait-hydrating": 2.0, "add": 0.5}


def test_cases_are_selected_by_name() -> None:
    names = {case.name for case in cases.select(["hot-randread-*", "add"])}
    assert names == {"hot-randread-32", "hot-randread-1", "add"}
    own = cases.select(["hot-randread-32"], peers=False)
    assert [case.peer for case in own] == [Figure("raw", "randread-32")]
    with pytest.raises(ValueError, match="cold-cuts"):
        cases.select(["hot-*", "cold-cuts"])


# -- rows -----------------------------------------------------------------------------------------


def test_a_ratio_is_how_many_times_as_good() -> None:
    assert rows.ratio_of(200, 100, loads.RATE) == 2
    assert rows.ratio_of(200, 100, loads.DELAY) == 0.5
    assert rows.ratio_of(None, 100, loads.RATE) is None
    assert rows.ratio_of(100, None, loads.INSTRUCTIONS) is None
    assert rows.ratio_of(100, 0, loads.RATE) is None


def test_a_goal_is_a_least_ratio() -> None:
    case = Case("hot", OURS, PEER, goal=1.0)
    found = measured(ubi_zero_copy__randread_32=54072.4, kublk_loop__randread_32=54072.0)
    (row,) = rows.make([case], found)
    assert (row.value, row.peer_value, row.ratio, row.met) == (54072, 54072, 1.0, True)
    (row,) = rows.make([replace(case, goal=1.05)], found)
    assert row.met is False
    (row,) = rows.make([replace(case, goal=None)], found)
    assert row.met is None


def test_a_limit_is_a_peer_that_less_is_better_than() -> None:
    case = Case("add", ADD, limit=0.5, goal=1.0)
    (row,) = rows.make([case], measured(ubi_add__add_1g=0.4))
    assert (row.peer, row.ratio, row.met) == ("limit", 1.25, True)
    (row,) = rows.make([case], measured(ubi_add__add_1g=0.6))
    assert (row.ratio, row.met) == (0.833, False)


def test_the_document_has_the_fields_that_were_agreed_on() -> None:
    found = measured(ubi_zero_copy__randread_32=60000)
    document = rows.document(KERNEL, rows.make([Case("hot", OURS, PEER, goal=1.0)], found))
    assert json.loads(json.dumps(document)) == {"kernel": KERNEL, "rows": [{
        "case": "hot", "subject": "ubi-zero-copy", "value": 60000, "unit": "IO/s",
        "peer": "kublk-loop", "peer_value": None, "ratio": None, "goal": 1.0, "met": None,
    }]}


# -- table ----------------------------------------------------------------------------------------


def test_a_peer_that_cannot_be_had_is_named() -> None:
    found = measured(ubi_zero_copy__randread_32=60000)
    found.take({"figure": PEER.name, "missing": "not built"})
    made = rows.make([Case("hot", OURS, PEER, goal=1.0), Case("hot", OURS, None, limit=1)], found)
    head, first, second = table.lines(made)
    assert head.split()[:3] == ["case", "subject", "value"]
    assert first.split() == [
        "hot", "ubi-zero-copy", "60,000", "IO/s", "kublk-loop", "not", "had", "1.00", "open",
    ]
    assert second.split()[0] == "limit"
    assert table.troubles(found.missing, {"a/b": "exit 1"}) == [
        "not had: kublk-loop/randread-32: not built", "FAILED: a/b: exit 1",
    ]
    assert "kublk-loop: kublk loop, AUTO_BUF_REG" in table.legend(made)


# -- the gate -------------------------------------------------------------------------------------

KEPT = {KERNEL: {OURS.name: 50000.0, "raw/randread-32": 110000.0, ADD.name: 0.4}}


def verdict(found: boot.Measured, figure: Figure, kept: gate.Kept = KEPT) -> gate.Verdict:
    return next(one for one in gate.judge(found, kept) if one.figure == figure.name)


@pytest.mark.parametrize(("value", "fails"), [(48600, False), (48400, True), (60000, False)])
def test_a_loss_of_more_than_three_per_cent_fails(value: float, fails: bool) -> None:
    found = measured(ubi_zero_copy__randread_32=value, raw__randread_32=1)
    assert verdict(found, OURS).fails is fails


@pytest.mark.parametrize(("value", "fails"), [(0.41, False), (0.42, True), (0.3, False)])
def test_more_instructions_are_a_loss(value: float, fails: bool) -> None:
    assert verdict(measured(ubi_add__add_1g=value), ADD).fails is fails


@pytest.mark.parametrize(("raw", "fails"), [(110000, True), (88000, False)])
def test_another_kernel_is_compared_by_the_ratio_to_the_ram_disk(raw: float, fails: bool) -> None:
    found = measured(ubi_zero_copy__randread_32=40000, raw__randread_32=raw, ubi_add__add_1g=9)
    found.kernel = "8.0"
    assert verdict(found, OURS).fails is fails
    assert not verdict(found, ADD).fails
    assert "another kernel" in verdict(found, ADD).told


def test_the_better_of_two_counts() -> None:
    found = measured(ubi_zero_copy__randread_32=48400, raw__randread_32=1, ubi_add__add_1g=0.42)
    assert gate.lost(gate.judge(found, KEPT)) == [OURS, ADD]
    gate.take_better(found, measured(ubi_zero_copy__randread_32=48000, ubi_add__add_1g=0.41))
    assert (found.values[OURS.name], found.values[ADD.name]) == (48400, 0.41)
    assert gate.lost(gate.judge(found, KEPT)) == [OURS]
    gate.take_better(found, measured(ubi_zero_copy__randread_32=48600))
    assert gate.lost(gate.judge(found, KEPT)) == []


def test_what_was_not_measured_fails() -> None:
    found = measured()
    found.take({"figure": OURS.name, "failed": "add: exit 1"})
    assert verdict(found, OURS).fails
    assert "add: exit 1" in verdict(found, OURS).told


def test_figures_are_recorded_by_kernel(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    for kernel, value in (("7.3", 1.0), ("7.4", 2.0), ("7.3", 3.0)):
        found = measured(ubi_add__add_1g=value)
        found.kernel = kernel
        gate.record(found, path)
    assert gate.read(path) == {"7.4": {ADD.name: 2.0}, "7.3": {ADD.name: 3.0}}
    assert list(gate.read(path)) == ["7.4", "7.3"]


def test_the_repository_has_every_figure_that_is_watched() -> None:
    kept = gate.read()
    assert kept
    for figures in kept.values():
        assert set(figures) == {figure.name for figure in gate.figures()}


# -- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "reason"), [
    (["--cases", "cold-cuts"], "cold-cuts"),
    (["--record"], "--gate"),
    (["--gate", "--quick"], "--quick"),
    (["--gate", "--cases", "add"], "--cases"),
    (["--json", "/nowhere/rows.json"], "/nowhere/rows.json"),
    (["--fast"], "--fast"),
])
def test_refusals(words: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(words)
    told = capsys.readouterr()
    assert (ended.value.code, told.out) == (2, "")
    assert told.err.count("\n") == 1
    assert reason in told.err


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--list", "--cases", "plain-*"]) == 0
    assert capsys.readouterr().out.splitlines() == ["plain-randread-32", "plain-randwrite-32"]


@pytest.mark.uses_lab
@pytest.mark.skipif(os.environ.get("LAB") == "1", reason="a lab in the lab")
@pytest.mark.skipif(not MADE and os.geteuid() != 0,
                    reason="no Debian machine: run tools/lab --print machine as root")
def test_no_figure_has_lost_more_than_three_per_cent() -> None:
    done = subprocess.run([sys.executable, "-B", MAIN, "--gate"], cwd=ROOT, timeout=GATE_S,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    print(done.stderr)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("\nok ") == len(gate.WATCHED)
