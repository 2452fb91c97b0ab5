"""Starting a daemon: what it says, how it dies, and what is left of it. The daemons are fakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from ublk_ubi import launch
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.options import DeviceOptions

CHECKOUT = Path(__file__).resolve().parents[2]
PROLOGUE = """
import json, os, signal, sys, time
task = json.load(os.fdopen(int(sys.argv[1])))
options, ready_fd = task["options"], task["ready_fd"]
def ready(**answer):
    os.write(ready_fd, json.dumps(answer).encode() + b"\\n")
"""
LIVE = 'ready(ok=True, name="vm", link="/l", device="/d", id=3, pid=os.getpid(), size=5)'
OPTIONS = DeviceOptions(image="/ä", base="/b", queues=2)


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put a fake in the daemon's place."""
    monkeypatch.setenv("UBLK_UBI_RUN", str(tmp_path / "run"))

    def make(code: str) -> None:
        script = tmp_path / "fake.py"
        script.write_text(PROLOGUE + textwrap.dedent(code))
        monkeypatch.setattr(launch, "daemon_command", lambda: [sys.executable, str(script)])

    yield make
    assert os.listdir(tmp_path / "run") == []


def failing(words: str, code: Exit = Exit.FAILED) -> None:
    with pytest.raises(UbiError, match=words) as caught:
        launch.start_daemon(OPTIONS)
    assert caught.value.code == code
    assert "\n" not in caught.value.message


def test_live(daemon) -> None:
    daemon(LIVE)
    ready = launch.start_daemon(OPTIONS)
    assert (ready.name, ready.link, ready.device, ready.id, ready.size) == ("vm", "/l", "/d", 3, 5)


def test_what_the_daemon_gets(daemon, tmp_path: Path) -> None:
    daemon(f"""
        ready(ok=True, warnings=[
            json.dumps(options), os.getcwd(), os.readlink("/proc/self/fd/0"),
            str(os.getsid(0) == os.getpid()), str(sorted(os.listdir("/proc/self/fd"))),
        ])
        print("on stdout", flush=True)
        open({str(tmp_path / "log")!r}, "w").write(os.pread(1, 100, 0).decode())
        os.rename({str(tmp_path / "log")!r}, {str(tmp_path / "log.done")!r})
    """)
    inheritable, other = os.pipe()
    os.set_inheritable(inheritable, True)
    options, cwd, stdin, leader, descriptors = launch.start_daemon(OPTIONS).warnings
    os.close(inheritable)
    os.close(other)
    assert json.loads(options) == {"image": "/ä", "base": "/b", "queues": 2}
    assert (cwd, stdin, leader) == ("/", "/dev/null", "True")
    # 0-2, the ready pipe and what listdir itself has; the options are closed by then
    assert len(json.loads(descriptors.replace("'", '"'))) == 5
    while not (tmp_path / "log.done").exists():
        time.sleep(0.01)
    assert (tmp_path / "log.done").read_text() == "on stdout\n"


def test_what_it_waits_for_is_told_when_that_takes_long(
    daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "_PATIENCE_MS", 50)
    heard = tmp_path / "heard"
    daemon(f"""
        print("2026-01-02 03:04:05 waiting for base /b\\n\\nmore", flush=True)
        for _ in range(3000):
            if os.path.exists({str(heard)!r}):
                break
            time.sleep(0.01)
        print("half a line", end="", flush=True)
        time.sleep(0.2)
        ready(ok=True, name="vm")
    """)
    told: list[str] = []

    def notice(line: str) -> None:
        told.append(line)
        if line == "more":
            heard.touch()

    assert launch.start_daemon(OPTIONS, notice).name == "vm"
    assert told == ["waiting for base /b", "more"]


def test_refusal_with_its_exit_code(daemon) -> None:
    daemon('ready(ok=False, error="base /b is too small", exit=5); sys.exit(5)')
    failing("^base /b is too small$", Exit.BUSY)


def test_refusal_with_an_unknown_exit_code(daemon) -> None:
    daemon('ready(ok=False, error="no", exit=99)')
    failing("^no$")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL before its device"),
        ("os.abort()", "was killed by SIGABRT"),
        ("sys.exit(7)", "ended with status 7 before its device was live"),
        ("sys.exit(0)", "ended with status 0"),
        ("print('a\\n  the last word\\n\\n', flush=True); os._exit(1)", ": the last word$"),
        ("1 / 0", "ZeroDivisionError: division by zero$"),
        ("os.write(ready_fd, b'{\"ok\":tr'); os._exit(1)", "ended with status 1"),
        ("os.write(ready_fd, b'garbage\\n'); time.sleep(60)", "makes no sense"),
        ("os.write(ready_fd, b'[]\\n')", "makes no sense"),
        ("os.write(ready_fd, b'{\"ok\":1}\\n')", "makes no sense"),
        ("os.write(ready_fd, b'x' * 100_000); time.sleep(60)", "killed"),
        ("os.close(ready_fd); time.sleep(60)", "closed its end without a word, and was killed"),
    ],
)
def test_deaths(daemon, monkeypatch: pytest.MonkeyPatch, code: str, words: str) -> None:
    monkeypatch.setattr(launch, "_END_WAIT_S", 0.5)
    daemon(code)
    failing(words)


def test_no_interpreter(daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "daemon_command", lambda: ["/nonexistent/python"])
    monkeypatch.setattr(launch.sys, "executable", "/nonexistent/python")
    failing("cannot start the daemon /nonexistent/python: No such file")


def test_nothing_is_leaked(daemon) -> None:
    daemon('ready(ok=False, error="no", exit=1)')
    failing("no")
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        failing("no")
    assert sorted(os.listdir("/proc/self/fd")) == before


INTERRUPTED = """
import os, signal, sys
from ublk_ubi import launch
from ublk_ubi.errors import UbiError
from ublk_ubi.options import DeviceOptions
launch.daemon_command = lambda: [sys.executable, sys.argv[1]]
launch.STOP_WAIT_S = float(sys.argv[2])
try:
    launch.start_daemon(DeviceOptions(image="/i", base="/b"))
except UbiError as error:
    print(int(error.code), error.message, flush=True)
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_wait_ends_the_daemon(daemon, tmp_path: Path, number: signal.Signals) -> None:
    daemon(f"""
        open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
        os.rename({str(tmp_path / "pid")!r}, {str(tmp_path / "up")!r})
        time.sleep(60)
    """)
    process = _interrupt(tmp_path, number)
    out = process.communicate()[0].splitlines()
    assert out == [f"1 interrupted by {number.name}: the daemon was ended, no device was added",
                   "True"]
    pid = int((tmp_path / "up").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_interrupted_wait_for_a_daemon_that_will_not_end(daemon, tmp_path: Path) -> None:
    daemon(f"""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
        os.rename({str(tmp_path / "pid")!r}, {str(tmp_path / "up")!r})
        time.sleep(60)
    """)
    process = _interrupt(tmp_path, signal.SIGINT, stop_wait_s=0.5)
    pid = int((tmp_path / "up").read_text())
    out = process.communicate()[0].splitlines()
    os.kill(pid, signal.SIGKILL)
    assert out[0].startswith(f"6 interrupted, but the daemon (process {pid}) has not ended 0.5 s")


def _interrupt(
    tmp_path: Path, number: signal.Signals, stop_wait_s: float = 60.0,
) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path / "fake.py"), str(stop_wait_s)],
        stdout=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
    )
    while not (tmp_path / "up").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    return process


def test_the_real_command_finds_this_package() -> None:
    """From /, with nothing of the folder it runs in."""
    run = subprocess.run(
        [*launch.daemon_command()[:2], "-c", "import ublk_ubi; print(ublk_ubi.__file__)"],
        cwd="/", env=launch.environment(), capture_output=True, text=True, check=True,
    )
    expected = os.path.join(os.path.dirname(launch.__file__), "__init__.py")
    assert run.stdout.strip() == expected


def test_interrupted_on_another_thread(daemon) -> None:
    """Threads get no signals: they give a descriptor, which stays as it is for others."""
    daemon("time.sleep(60)")
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    caught: list[UbiError] = []

    def start() -> None:
        try:
            launch.start_daemon(OPTIONS, interrupt_fd=fd)
        except UbiError as error:
            caught.append(error)

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    os.eventfd_write(fd, 1)
    for thread in threads:
        thread.join(30)
    assert [error.message for error in caught] == [
        "interrupted: the daemon was ended, no device was added"] * 2
    assert os.eventfd_read(fd) == 1
    os.close(fd)


def test_ended_daemons_are_buried_when_asked_to(daemon) -> None:
    daemon(LIVE.replace("size=5)", "size=5); time.sleep(60)"))
    ready = launch.start_daemon(OPTIONS)
    launch.reap()
    os.kill(ready.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while os.path.exists(f"/proc/{ready.pid}"):
        assert time.monotonic() < deadline
        launch.reap()
        time.sleep(0.01)
