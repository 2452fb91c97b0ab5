"""The command, as people and scripts have it: help, usage, output, exit codes, errors."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from unit.cli.kit import (
    FAKE,
    REAL,
    WITH_FAKES,
    Result,
    inline,
    is_one_line,
    kill,
    on_terminal,
    pid_of,
    run,
)

from ublk_ubi import cli, runtime
from ublk_ubi.cli import common, render
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.status import Status, Stripes

COMMANDS = tuple(cli.COMMANDS)
OF_SPDK = ("config", "attach", "detach", "status")


# help and usage ------------------------------------------------------------------------------


SUBCOMMANDS = ("systemd install", "systemd uninstall", *(f"spdk {word}" for word in OF_SPDK))


@pytest.mark.parametrize("command", ["", *COMMANDS, *SUBCOMMANDS])
def test_help_has_examples_that_parse(command: str) -> None:
    found = run(*command.split(), "--help")
    assert (found.code, found.err) == (0, "")
    _, _, examples = found.out.partition("\nExamples:\n")
    lines = [line.strip() for line in examples.splitlines()]
    assert lines
    assert all(line.startswith("ublk-ubi ") for line in lines)
    assert all(len(line) <= 100 for line in found.out.splitlines())
    for line in lines:
        words = re.split(r" {2,}| [|>] | \|\| ", line)[0].split()[1:]
        asked = inline(*words, "--help")
        assert asked.code == 0, line
    for line in found.out.splitlines():
        assert line == line.rstrip()


def test_list_of_commands_is_that_of_the_modules() -> None:
    context = cli.cli.make_context("ublk-ubi", [], resilient_parsing=True)
    assert tuple(cli.cli.list_commands(context)) == COMMANDS
    for name in COMMANDS:
        command = cli.cli.get_command(context, name)
        assert command is not None
        assert command.help
        parts = getattr(command, "commands", {name: command})
        for word, part in parts.items():
            options = {option for param in part.params for option in param.opts}
            # The output of these is JSON, or nobody's.
            assert "--json" in options or word in ("completion", "watch", "config")
    group = cli.cli.get_command(context, "spdk")
    assert set(getattr(group, "commands", {})) == set(OF_SPDK)
    assert cli.cli.get_command(context, "__init__") is None


def test_no_arguments_are_a_call_for_help() -> None:
    assert run() == run("--help")


def test_version() -> None:
    assert run("--version") == Result(0, "ublk-ubi 0.1.0\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("frob", "no such command 'frob'"),
        ("--frob", "no such option"),
        ("add", "--image and --base are missing"),
        ("add --base b", "--image is missing"),
        ("add --image i", "--base is missing"),
        ("add --image i --base b extra", "unexpected extra argument"),
        ("add --image i --base b --frob", "no such option"),
        ("add --image", "requires an argument"),
        ("add --image i --base b --size 5GB", "write 5G for 5 GiB"),
        ("add --image i --base b --size -5G", "is negative"),
        ("add --image i --base b --size 0", "--size 0"),
        ("add --image i --base b --size 1.3K", "write 1331 or 1332"),
        ("add --image i --base b --stripe-size 3M", "use 64K, 128K, 256K, 512K or 1M"),
        ("add --image i --base b --stripe-size 32K", "use 64K, 128K, 256K, 512K or 1M"),
        ("add --image i --base b -q 0", "--queues 0 is out of range: 1 to 64"),
        ("add --image i --base b -q two", "is not a valid integer"),
        ("add --image i --base b -d 5000", "--depth 5000 is out of range: 1 to 4096"),
        ("add --image i --base b -n -1", "--id -1 is out of range"),
        ("add --image i --base b --cache none", "is not one of 'writeback', 'writethrough', 'uns"),
        ("add --image i --base b --data-path fast", "is not one of 'auto', 'zero-copy', 'copy'"),
        ("add --image i --base b --rate 200MB", "write 200M for 200 MiB"),
        ("add --image i --base b --rate 0", "'--rate': 0 is out of range: 64K to 16G"),
        ("add --image i --base b --rate 17G", "'--rate': 17G is out of range: 64K to 16G"),
        ("add --image i --base b --min-free 5", "5 would be bytes: write 5% for a share"),
        ("add --image i --base b --min-free 101%", "--min-free '101%' is no share"),
        ("add --image i --base b --cpus 3-1", "--cpus '3-1' is not a list of CPUs"),
        ("add --image i --base b --hydrator-cpus x", "--hydrator-cpus 'x' is not a list of CPUs"),
        ("add --image i --base b --mode 888", "not three octal digits"),
        ("add --image i --base b --owner nobody-of-that-name", "there is no user"),
        ("add --image i --base b --name ../x", "cannot be a name"),
        ("add --image i --base b --name", "requires an argument"),
        ("add --image i --base b --block-size 1024", "is not one of '512', '4096'"),
        ("add --image i --base b -f qcow2", "'qcow2' is not"),
        ("add --image i --base b --format --adopt", "exclude one another"),
        ("add --image i --base b --zero --keep-old-data", "exclude one another"),
        ("add --image i --base b --fence-timeout -1", "--fence-timeout -1"),
        ("add --config nope.json", "config nope.json: No such file"),
        ("del", "give NAMEs, or -a for all"),
        ("del -a x", "give NAMEs, or -a for all"),
        ("del x --timeout 0", "0 is out of range: 0.1 to 86400 seconds"),
        ("status x -a", "give a NAME, or -a for all"),
        ("hydrate", "missing argument 'NAME'"),
        ("hydrate x --pause --wait", "--pause and --wait exclude one another"),
        ("hydrate x --rate 5", "'--rate': 5 is out of range"),
        ("wait", "missing argument 'NAME'"),
        ("wait x --timeout -1", "-1 is out of range: 0 to 1000000000 seconds"),
        ("wait x --timeout 5s", "'5s' is no number of seconds: write it like 30 or 0.5"),
        ("wait x --timeout", "requires an argument; see `ublk-ubi wait --help`"),
        ("wait x --timeout nan", "nan is out of range"),
        ("status x --timeout nan", "nan is out of range"),
        ("list x", "unexpected extra argument"),
        ("inspect", "missing argument 'BASE'"),
        ("doctor x", "unexpected extra argument"),
        ("completion", "missing argument"),
        ("completion tcsh", "'tcsh' is not one of"),
        ("serve x", "unexpected extra argument"),
        ("serve --json nope.json", "--json nope.json: No such file"),
        ("spdk frob", "no such command 'frob'"),
    ],
)
def test_wrong_usage_is_one_line_and_2(words: str, message: str) -> None:
    found = inline(*words.split())
    assert found.code == Exit.USAGE
    assert found.out == ""
    assert is_one_line(found.err)
    assert message in found.err


def test_wrong_usage_of_the_real_command(roots: Path) -> None:
    found = run("add", "--size", "5GB")
    assert (found.code, found.out) == (2, "")
    assert is_one_line(found.err)
    assert "see `ublk-ubi add --help`" in found.err
    assert not (roots / "run").exists()


def test_bad_configs(roots: Path) -> None:
    for text, words in (
        ("[]", "is not a JSON object"),
        ('{"imag": "/i"}', "unknown key 'imag'; the keys are base, image"),
        ('{"image": "/i", "base": "/b", "size": "5GB"}', "size: '5GB' can be read two ways"),
        ('{"image": "/i", "base": "/b", "queues": "two"}', "queues: expected `int`, got `str`"),
        ('{"image": "/i"}', "--base is missing"),
    ):
        (roots / "vm.json").write_text(text)
        found = inline("add", "--config", "vm.json")
        assert found.code == Exit.USAGE
        assert is_one_line(found.err)
        assert words in found.err


# errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["status", "del", "hydrate", "wait"])
@pytest.mark.parametrize("target", ["x", "/dev/null", "/dev/ublkb99", "\n"])
def test_no_such_device(command: str, target: str) -> None:
    found = run(command, target)
    assert (found.code, found.out) == (Exit.NO_DEVICE, "")
    assert is_one_line(found.err)
    assert "no device" in found.err


def test_messages_stay_one_line_whatever_is_in_them() -> None:
    evil = "a\nb\x1b[31m\u2028c\udcffd\u202e"
    assert common.one_line(evil) == r"a\nb\x1b[31m\u2028c\udcffd\u202e"
    found = inline("inspect", "/no\nsuch\x1bfile")
    assert is_one_line(found.err)
    assert "\x1b" not in found.err


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (UbiError("in use", Exit.BUSY), 5, "in use"),
        (KeyboardInterrupt(), 1, "interrupted"),
        (PermissionError(13, "Permission denied", "/x"), 1, "/x: Permission denied"),
        (ZeroDivisionError("oops"), 1, "internal error, please report it: ZeroDivisionError: "),
    ],
)
def test_whatever_is_raised(monkeypatch, raised: BaseException, code: int, message: str) -> None:
    def fail() -> None:
        raise raised

    monkeypatch.setattr(runtime, "all_devices", fail)
    found = inline("list")
    assert (found.code, found.out) == (code, "")
    assert is_one_line(found.err)
    assert message in found.err


def test_debugging_shows_more() -> None:
    code = "from ublk_ubi import cli, runtime; runtime.all_devices = None; cli.main(['list'])"
    for debug, tracebacks in (("", 0), ("1", 1)):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False,
            env={**os.environ, "UBLK_UBI_DEBUG": debug},
        )
        assert done.returncode == 1
        assert done.stderr.count("Traceback") == tracebacks


def test_a_reader_that_leaves(roots: Path) -> None:
    for _ in range(20):
        runtime.claim().abandon()
    read, write = os.pipe()
    os.close(read)
    process = subprocess.Popen([*REAL, "list", "--json"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert process.communicate()[1] == b""
    assert process.returncode == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("words", ["list", "add --image /i --base /b", "status x", "del -a"])
def test_without_root(roots: Path, words: str) -> None:
    (roots / "run").mkdir(mode=0o700)
    # All is imported first: the checkout may be closed to others.
    code = """
import difflib, os, sys
from ublk_ubi import cli, config, launch, links, removal, runtime, status
from ublk_ubi.cli import add, delete, listing, render, status
os.chdir(sys.argv.pop(1))
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
os.environ["UBLK_UBI_RUN"] = "run"
cli.main()
"""
    found = run(*words.split(), command=[sys.executable, "-c", code, str(roots)])
    assert (found.code, found.out) == (Exit.FAILED, "")
    assert is_one_line(found.err)
    assert "permission denied: run this as root" in found.err


# add -----------------------------------------------------------------------------------------


def test_add_prints_the_stable_link(add, roots: Path) -> None:
    assert add() == Result(0, f"{roots}/dev/ublk-ubi/vm\n", "")
    assert json.loads((roots / "run/vm/options.json").read_text()) == {
        "image": "/normal", "base": "/vm.base", "name": "vm",
    }
    assert (roots / "run/vm/log").exists()


def test_add_as_json(add, roots: Path) -> None:
    found = json.loads(add("normal", "vm", "--json", "-n", "3").out)
    pid = found.pop("pid")
    assert runtime.process_start(pid)
    assert found == {
        "schema": 1, "name": "vm", "device": f"{roots}/dev/ublkb3", "id": 3,
        "link": f"{roots}/dev/ublk-ubi/vm", "size": 5 << 30, "warnings": [],
    }


def test_warnings_go_to_standard_error(add, roots: Path) -> None:
    found = add("warns")
    assert found.out == f"{roots}/dev/ublk-ubi/vm\n"
    assert found.err == "ublk-ubi: warning: it goes on\\nbuffered\n"


EVERY_OPTION = [
    "--size", "5G", "--stripe-size", "64K", "-f", "raw", "-q", "2", "-d", "64", "--id", "7",
    "--no-copy-on-read", "--image-cache", "page", "--block-size", "4096", "--format", "--yes",
    "--force", "--force-stale", "--zero", "--partscan", "--owner", "0:0", "--mode", "600",
    "--fence-timeout", "1.5", "--cache", "writethrough", "--data-path", "copy", "--cpus", "0-1",
    "--hydrator-cpus", "1", "--hydrate", "--rate", "200M", "--min-free", "10%",
]


def test_every_option_arrives(add, roots: Path) -> None:
    add("normal", "vm", *EVERY_OPTION)
    assert json.loads((roots / "run/vm/options.json").read_text()) == {
        "image": "/normal", "base": "/vm.base", "name": "vm", "size": 5 << 30,
        "stripe_size": 64 << 10, "image_format": "raw", "queues": 2, "depth": 64, "id": 7,
        "copy_on_read": False, "image_cache": "page", "block_size": 4096, "format": True,
        "force": True, "force_stale": True, "zero": True, "partscan": True, "owner": "0:0",
        "mode": 0o600, "fence_timeout_s": 1.5, "cache": "writethrough", "data_path": "copy",
        "cpus": "0-1", "hydrator_cpus": "1", "hydrate": True, "rate": 200 << 20, "min_free": "10%",
    }


def test_the_command_line_wins_over_the_config(add, roots: Path) -> None:
    (roots / "vm.json").write_text(json.dumps({
        "image": "normal", "base": "of-config", "queues": 2, "copy_on_read": False, "depth": 32,
        "zero": True, "size": "1G", "rate": "100M", "hydrate": True,
    }))
    found = run(
        "add", "--config", "vm.json", "--base", "of-line", "-q", "3", "--copy-on-read",
        "--rate", "max",
        command=WITH_FAKES,
    )
    assert found.code == 0, found
    kept = json.loads((roots / "run/ubi0/options.json").read_text())
    assert kept == {
        "image": f"{roots}/normal", "base": f"{roots}/of-line", "queues": 3, "depth": 32,
        "zero": True, "size": 1 << 30, "hydrate": True,
    }


def test_add_without_an_image(add, roots: Path) -> None:
    found = run("add", "--base", f"{roots}/base", command=WITH_FAKES)
    assert (found.code, found.out) == (Exit.USAGE, "")
    assert "--image is missing" in found.err
    (roots / "base").touch()
    assert run("add", "--base", "base", "--name", "vm", command=WITH_FAKES).code == 0
    assert json.loads((roots / "run/vm/options.json").read_text()) == {
        "base": f"{roots}/base", "name": "vm",
    }
    assert "image  " not in run("status", "vm").out


def test_the_daemons_refusal_is_adds(roots: Path) -> None:
    found = run("add", "--image", "/refuses", "--base", "/b", command=WITH_FAKES)
    assert found == Result(1, "", "ublk-ubi: image /refuses is empty\n")
    assert os.listdir(roots / "run") == []


def test_a_name_that_is_taken(add) -> None:
    add()
    found = run(
        "add", "--image", "/normal", "--base", "/b", "--name", "vm", command=WITH_FAKES,
    )
    assert (found.code, found.out) == (Exit.BUSY, "")
    assert "the name 'vm' is in use by a running device" in found.err


def test_format_asks_what_it_destroys(roots: Path) -> None:
    base = roots / "base"
    base.write_bytes(b"XFSB" + bytes(8 << 20))
    words = ["add", "--image", "/refuses", "--base", str(base), "--format"]
    found = run(*words, command=WITH_FAKES)
    assert found.code == Exit.USAGE
    assert is_one_line(found.err)
    assert f"would destroy what is on {base} (an XFS filesystem)" in found.err
    # /refuses: the question was passed
    assert run(*words, "--yes", command=WITH_FAKES).code == Exit.FAILED
    for answer, code, said in (("n\n", 1, "was left alone"), ("y\n", 1, "/refuses is empty")):
        shown, status = on_terminal([*WITH_FAKES, *words], answer)
        assert status == code
        assert f"{base} holds an XFS filesystem. Destroy it? [y/N]" in shown
        assert said in shown
    base.write_bytes(bytes(8 << 20))
    assert "/refuses is empty" in run(*words, command=WITH_FAKES).err
    base.unlink()
    assert "/refuses is empty" in run(*words, command=WITH_FAKES).err


FOREGROUND = """
import sys, types
daemon = types.ModuleType("ublk_ubi.daemon")
def run(options, ready):
    ready({answer})
    print("served", flush=True)
    return {code}
daemon.run = run
import ublk_ubi
sys.modules["ublk_ubi.daemon"] = ublk_ubi.daemon = daemon
from ublk_ubi.cli import main
main()
"""


@pytest.mark.parametrize(
    ("answer", "code", "expected"),
    [
        ({"ok": True, "link": "/l", "warnings": ["w"]}, 0,
         Result(0, "/l\nserved\n", "ublk-ubi: warning: w\n")),
        ({"ok": True, "link": "/l"}, 3, Result(3, "/l\nserved\n", "")),
        ({"ok": False, "error": "no", "exit": 5}, 5, Result(5, "served\n", "ublk-ubi: no\n")),
    ],
)
def test_foreground(answer: dict[str, Any], code: int, expected: Result) -> None:
    script = FOREGROUND.format(answer=answer, code=code)
    words = ["add", "--image", "/i", "--base", "/b", "--foreground"]
    assert run(*words, command=[sys.executable, "-c", script]) == expected


def test_ctrl_c_while_waiting(roots: Path) -> None:
    """SIGINT to the whole foreground group, as a terminal does it."""
    code = WITH_FAKES[2].replace(repr(str(FAKE)), "'-c', 'import time; time.sleep(60)'")
    process = subprocess.Popen(
        [sys.executable, "-c", code, "add", "--image", "/i", "--base", "/b"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 10
    while not (daemons := children.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (1, "")
    assert err == (
        "ublk-ubi: interrupted by SIGINT: the daemon was ended, no device was added\n"
    )
    assert runtime.process_start(int(daemons[0])) is None


# list and status -----------------------------------------------------------------------------


def test_nothing_there() -> None:
    assert run("list").out == "no disks; `ublk-ubi add` makes one\n"
    assert json.loads(run("list", "--json").out) == {"schema": 1, "devices": []}
    assert json.loads(run("status", "--json").out) == {"schema": 1, "devices": []}
    assert run("status", "-a").code == 0
    assert run("del", "-a") == Result(0, "", "")


def test_list(add, roots: Path) -> None:
    add("normal", "vm10")
    add("degraded", "vm2", "-n", "1")
    add("normal", "dead", "-n", "2")
    add("full", "vm3", "-n", "3")
    add("done", "vm4", "-n", "4")
    kill("dead")
    claim = runtime.claim("new")
    found = run("list")
    claim.release()
    assert (found.code, found.err) == (0, "")
    lines = [line.split() for line in found.out.splitlines()]
    assert lines[0] == [
        "NAME", "DEVICE", "STATE", "SIZE", "ALLOCATED", "HYDRATED", "NEEDED", "IMAGE", "BASE",
    ]
    assert [line[0] for line in lines[1:]] == ["dead", "new", "vm2", "vm3", "vm4", "vm10"]
    assert lines[1][2:5] == ["dead", "5", "GiB"]
    assert lines[2][1:] == ["-", "starting", *"-------"]
    assert " ".join(lines[3][1:]) == (
        f"{roots}/dev/ublkb1 degraded 5 GiB 1010 MiB 1000 MiB 44.4 % 1.2 GiB /degraded /vm2.base"
    )
    assert " ".join(lines[4][3:]) == (
        "5 GiB 1010 MiB 1000 MiB 44.4 % 1.2 GiB (1 MiB free) /full /vm3.base"
    )
    assert " ".join(lines[5][3:]) == "5 GiB 1010 MiB 2.2 GiB 100 % 0 B /done /vm4.base"
    assert "\x1b" not in found.out
    devices = json.loads(run("list", "--json").out)["devices"]
    assert [(d["name"], d["state"], d["degraded"]) for d in devices] == [
        ("dead", "dead", f"its daemon (process {runtime.all_devices()[0].pid}) died"),
        ("vm2", "live", "an fdatasync failed"),
        ("vm3", "live", None),
        ("vm4", "live", None),
        ("vm10", "live", None),
    ]
    assert devices[2]["space"] == {
        "allocated": 1010 << 20, "free": 1 << 20, "hydrated": 1000 << 20, "needed": 1252 << 20,
    }
    assert [device["independent"] for device in devices] == [None, False, False, True, False]
    assert devices[2]["hydration"]["state"] == "off"
    assert devices[1]["stripes"] == {"total": 2252, "hydrated": 1000, "committed": 990}


STATUS_KEYS = [
    "schema", "name", "device", "link", "id", "pid", "state", "degraded", "image", "image_size",
    "base", "size", "stripe_size", "block_size", "queues", "depth", "copy_on_read", "image_cache",
    "base_direct", "data_path", "cache", "independent", "stripes", "space", "memory", "io",
    "cold_reads", "fallbacks", "hydration", "commit", "uptime_s",
]


def test_status_as_json(add) -> None:
    add()
    found = run("status", "vm", "--json")
    assert (found.code, found.err) == (0, "")
    status = json.loads(found.out)
    assert set(STATUS_KEYS) <= set(status)
    assert (status["schema"], status["name"], status["state"]) == (1, "vm", "live")
    assert status["io"]["read"] == {
        "count": 1234567, "bytes": 5 << 30, "errors": 2,
        "latency_us": {"p50": 85, "p90": 990, "p99": 1200, "p999": 65000, "max": 2500000},
    }
    assert set(status["io"]) == {"read", "write", "flush", "discard", "write_zeroes"}
    both = json.loads(run("status", "-a", "--json").out)
    assert both["schema"] == 1
    assert [device["name"] for device in both["devices"]] == ["vm"]
    assert set(both["devices"][0]) == set(status)


def test_status_for_people(add, roots: Path) -> None:
    add()
    found = run("status", f"{roots}/dev/ublkb0")
    assert found.code == 0
    expected = f"""\
vm  live  {roots}/dev/ublk-ubi/vm → {roots}/dev/ublkb0  process {pid_of("vm")}
  disk        5 GiB, stripes of 1M, blocks of 512, 1 queue of 128, writeback cache, data path copy
  image       /normal (2.2 GiB)
  base        /vm.base, buffered: no O_DIRECT there
  hydrated    44.4 %, 1,000 of 2,252 stripes, 10 not committed yet
  background  off, 1.2 GiB to go
  fetched     10 stripes (10 MiB), 2 written whole, 1 cold read, 3 errors
  commits     5 rounds, 7 pages, 1 error
  space       1010 MiB allocated, 1000 MiB hydrated, 1.2 GiB may still be needed
  memory      17 MiB
  up          1 d 2 h

          requests  bytes  errors    p50     p90     p99  p99.9    max
  read   1,234,567  5 GiB       2  85 µs  990 µs  1.2 ms  65 ms  2.5 s
  write          0      -       0      -       -       -      -      -
  flush          0      -       0      -       -       -      -      -
"""
    assert found.out == expected


def test_status_degraded_is_3(add) -> None:
    add("degraded")
    found = run("status", "vm")
    assert found.code == Exit.DEGRADED
    assert found.err == ""
    assert "  degraded    an fdatasync failed\n" in found.out
    add("normal", "other", "-n", "1")
    assert run("status", "-a").code == Exit.DEGRADED
    assert run("status", "other").code == 0


def test_status_of_a_dead_one(add, roots: Path) -> None:
    add()
    kill("vm")
    found = run("status", f"{roots}/dev/ublk-ubi/vm", "--json")
    assert found.code == Exit.DEGRADED
    status = json.loads(found.out)
    assert (status["state"], status["pid"], status["io"]) == ("dead", None, None)
    assert (status["image"], status["base"], status["size"]) == ("/normal", "/vm.base", 5 << 30)
    assert "died" in status["degraded"]
    assert run("status", "vm").out.startswith("vm  dead  ")
    (roots / "run/vm/state.json").write_text("{garbage")
    found = run("status", "vm")
    assert found.code == Exit.DEGRADED
    assert "state.json is damaged" in found.out


# The one that answers is given a hundred times as long, as the machine may be busy; no time at all
# stays none.
PATIENT = """
from ublk_ubi import cli, status
status_of = status.status_of
def patient(device, timeout_s):
    assert timeout_s <= 0.5
    return status_of(device, 100 * timeout_s if device.name == "b" else timeout_s)
status.status_of = patient
cli.main()
"""


def test_a_mute_one_holds_nobody_up(add) -> None:
    add("mute", "a")
    add("normal", "b", "-n", "1")
    started = time.monotonic()
    command = [sys.executable, "-c", PATIENT]
    found = run("status", "-a", "--timeout", "0.5", "--json", command=command)
    assert time.monotonic() - started < 20
    assert found.code == Exit.DEGRADED
    mute, sound = json.loads(found.out)["devices"]
    assert "does not answer" in mute["degraded"]
    assert mute["image"] == "/mute"
    assert sound["degraded"] is None


def test_a_daemon_of_another_version(add) -> None:
    add("other")
    found = run("status", "vm")
    assert found.code == Exit.DEGRADED
    assert "of another version" in found.out


def test_one_that_starts_is_not_degraded() -> None:
    claim = runtime.claim("vm")
    found = run("status", "vm", "--json")
    claim.release()
    assert (found.code, json.loads(found.out)["state"]) == (0, "starting")


def test_colours_only_on_a_terminal(add) -> None:
    add()
    assert "\x1b[" not in run("list").out
    assert "\x1b[32mlive" in on_terminal([*REAL, "list"])[0]
    assert "\x1b[" not in on_terminal([*REAL, "list"], NO_COLOR="1")[0]
    assert "\x1b[" not in on_terminal([*REAL, "list", "--json"])[0]


# del -----------------------------------------------------------------------------------------


def test_del(add, roots: Path) -> None:
    add()
    assert run("del", "vm") == Result(0, "vm deleted\n", "")
    assert run("del", "vm").code == Exit.NO_DEVICE
    assert run("del", "vm", "--if-exists") == Result(0, "", "")
    assert os.listdir(roots / "run") == []
    add("normal", "a")
    add("slow", "b", "-n", "1")
    found = run("del", f"{roots}/dev/ublk-ubi/a", f"{roots}/dev/ublkb1", "a", "--json")
    assert found.code == 0
    assert json.loads(found.out) == {"schema": 1, "deleted": ["a", "b"]}


def test_del_goes_on_after_an_error(add) -> None:
    add("busy", "a")
    add("normal", "b", "-n", "1")
    found = run("del", "a", "nope", "b")
    assert found.code == Exit.NO_DEVICE
    assert found.out == "b deleted\n"
    assert len(found.err.splitlines()) == 2
    assert all(line.startswith("ublk-ubi: ") for line in found.err.splitlines())
    assert run("del", "-a").code == Exit.BUSY
    assert run("del", "-a", "--force").out == "a deleted\n"


def test_del_in_time(add) -> None:
    add("stuck")
    found = run("del", "vm", "--timeout", "0.3")
    assert found.code == Exit.TIMED_OUT
    assert is_one_line(found.err)
    assert "--force" in found.err
    assert run("del", "vm", "--timeout", "0.3", "--force").out == "vm deleted\n"


# inspect, doctor, completion -----------------------------------------------------------------


def test_inspect(roots: Path) -> None:
    base = roots / "base"
    base.write_bytes(b"BDEV_UBI\0\0\0\1\0\x40" + b"\1\0" * 5 + bytes(8 << 20))
    found = run("inspect", str(base))
    assert (found.code, found.err) == (0, "")
    assert "a bdev_ubi disk" in found.out
    assert "--adopt" in found.out
    assert "stripe size     64K" in found.out
    assert "from byte 8388608 on; the first hydrated stripe is 0, at byte 8388608" in found.out
    as_json = json.loads(run("inspect", str(base), "--json").out)
    assert (as_json["schema"], as_json["kind"], as_json["hydrated"]) == (1, "bdev_ubi", 5)
    assert run("inspect", str(roots / "nope")).code == Exit.FAILED


def test_doctor_says_what_to_do() -> None:
    found = run("doctor")
    as_json = json.loads(run("doctor", "--json").out)
    assert found.code == (0 if as_json["ok"] else 1)
    assert as_json["schema"] == 1
    for check in as_json["checks"]:
        assert set(check) == {"name", "status", "found", "advice"}
        assert check["status"] == "ok" or check["advice"]
        assert check["name"] in found.out
    assert found.err == ""


@pytest.mark.parametrize("command", ["status", "hydrate", "wait"])
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, command: str, add) -> None:
    found = run("completion", shell)
    assert (found.code, found.err) == (0, "")
    assert "_UBLK_UBI_COMPLETE" in found.out
    add("normal", "vm1")
    add("normal", "other", "-n", "1")
    done = subprocess.run(
        REAL, capture_output=True, text=True, check=True,
        env={**os.environ, "_UBLK_UBI_COMPLETE": f"{shell}_complete",
             "COMP_WORDS": f"ublk-ubi {command} v", "COMP_CWORD": "2" if shell != "fish" else "v"},
    )
    assert "vm1" in done.stdout
    assert "other" not in done.stdout


# start-up ------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["--help", "--version", "add --help", "list", "status"])
def test_nothing_is_imported_in_vain(words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "ublk_ubi", *words.split()],
        capture_output=True, text=True, check=True,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    heavy = {"rich", "asyncio", "ssl", "http", "email", "subprocess", "ctypes", "pathlib"}
    assert not imported & heavy
    if "help" in words or "version" in words:
        assert "msgspec" not in imported
        assert "ublk_ubi.runtime" not in imported


# What msgspec would take, and a user need not have, is not counted.
ADD_IMPORTS = """
import sys
sys.modules["typing_extensions"] = None
from ublk_ubi.cli import main
from ublk_ubi import launch
launch.daemon_command = lambda: [sys.executable, {fake!r}]
main(["add", "--image", "/normal", "--base", "/vm.base"])
"""
DAEMON_IMPORTS = """
import sys
sys.modules["typing_extensions"] = None
import ublk_ubi.daemon
"""
# Each takes several of the hundred million instructions that an import of all takes.
IN_VAIN = {
    "asyncio", "ast", "dis", "email", "hashlib", "http", "inspect", "linecache", "logging",
    "pathlib", "platform", "random", "rich", "shutil", "ssl", "tempfile", "textwrap", "tokenize",
    "traceback", "urllib.parse",
}


@pytest.mark.parametrize(
    ("code", "in_vain"),
    [(ADD_IMPORTS.format(fake=str(FAKE)), IN_VAIN | {"ctypes", "socket", "ublk_ubi.daemon"}),
     (DAEMON_IMPORTS, IN_VAIN | {"click", "gettext", "locale", "subprocess"})],
    ids=["add", "daemon"],
)
def test_add_and_its_daemon_import_little(code: str, in_vain: set[str], roots: Path) -> None:
    (roots / "run").mkdir(mode=0o700)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code],
        capture_output=True, text=True, check=True,
    )
    for device in runtime.all_devices():
        assert device.pid is not None
        os.kill(device.pid, signal.SIGKILL)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "msgspec" in imported
    assert sorted(imported & in_vain) == []


# parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 µs"), (999, "999 µs"), (1000, "1 ms"), (1234, "1.23 ms"), (99_999, "100 ms"),
     (2_500_000, "2.5 s"), (123_456_789, "123 s")],
)
def test_durations(number: float, text: str) -> None:
    assert render.duration(number) == text


@pytest.mark.parametrize(
    ("hydrated", "total", "text"),
    [(0, 1000, "0 %"), (1, 10**6, "0.1 %"), (1, 3, "33.3 %"), (10**6 - 1, 10**6, "99.9 %"),
     (7, 7, "100 %"), (0, 0, "-")],
)
def test_shares(hydrated: int, total: int, text: str) -> None:
    status = Status(name="x", state="live", stripes=Stripes(total, hydrated, 0))
    assert render.hydrated(status) == text


def test_status_schema_is_complete() -> None:
    assert set(STATUS_KEYS) <= {field.encode_name for field in msgspec.structs.fields(Status)}


def test_output_that_nobody_wants_is_no_error() -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *REAL, "--help"], stderr=subprocess.PIPE, text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
