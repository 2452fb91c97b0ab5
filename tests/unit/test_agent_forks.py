"""Agents that are forked: by a daemon, and by another agent once it can run no program any more.

The real agent, on /dev/null: it takes io_uring commands, and knows none.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ublk_ubi import agent_process, control_agent
from ublk_ubi.agent_process import (
    AgentGoneError,
    AgentProcess,
    default_command,
    forked_agent,
)
from ublk_ubi.control import Control, ControlError
from ublk_ubi.errors import UbiError

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMIT_S = 20.0
LOWERED = 512                      # a limit of descriptors, of which one is beyond it


def soon() -> float:
    return time.monotonic() + LIMIT_S


def wait_until_ended(pid: int) -> None:
    """An orphan may be collected late: a zombie has ended."""
    deadline = soon()
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):  # the latter amid reading
            return
        if state == "Z":
            return
        time.sleep(0.01)
    raise AssertionError(f"process {pid} has not ended")


def facts(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def test_a_fork_of_ours_has_nothing_of_ours(tmp_path: Path) -> None:
    """It answers as one that is run, and has nothing else: no file, folder, session, terminal."""
    inherited = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(inherited, True)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    run = AgentProcess(default_command("/dev/null"))
    beyond = fcntl.fcntl(inherited, fcntl.F_DUPFD, LOWERED)
    resource.setrlimit(resource.RLIMIT_NOFILE, (LOWERED, hard))
    try:
        forked = forked_agent("/dev/null")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(beyond)
    try:
        for agent in (run, forked):
            agent.call(0xC0207504, bytes(32), b"buffer", soon())
        assert sorted(forked.descriptors()) == sorted(run.descriptors())
        kinds = [
            sorted(path.split("[")[0].split(":")[0] for path in agent.descriptors().values())
            for agent in (run, forked)
        ]
        assert kinds[0] == kinds[1]
        assert os.readlink(f"/proc/{forked.pid}/cwd") == "/"
        assert os.getsid(forked.pid) == forked.pid
        assert facts(forked.pid)["SigIgn"] == facts(run.pid)["SigIgn"]
    finally:
        for agent in (run, forked):
            agent.close()
        os.close(inherited)


def test_a_fork_of_ours_ends_with_us_and_is_collected() -> None:
    agent = forked_agent("/dev/null")
    agent.wait_ready(soon())
    agent._socket.close()
    assert agent._process.wait(LIMIT_S) == 0
    with pytest.raises(ChildProcessError):
        os.waitpid(agent.pid, os.WNOHANG)


def test_a_fork_of_ours_that_is_killed_before_it_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_agent, "serve", lambda _control_fd: signal.pause())
    monkeypatch.setattr(agent_process, "_CLOSE_WAIT_S", LIMIT_S)  # for its exit status
    killed = forked_agent("/dev/null")
    os.kill(killed.pid, signal.SIGKILL)
    try:
        with pytest.raises(UbiError, match=r"helper ended before it was ready \(signal 9\)"):
            killed.wait_ready(soon())
    finally:
        killed.abandon()


def test_a_fork_of_ours_tells_what_it_lacks(tmp_path: Path) -> None:
    agent = forked_agent(str(tmp_path / "control"))
    with pytest.raises(UbiError, match="control: No such file or directory"):
        agent.wait_ready(soon())
    agent.close()


@pytest.mark.parametrize("threads", [0, 1])
def test_the_first_agent_is_forked_where_nothing_else_runs(threads: int) -> None:
    deadline = soon()
    while threading.active_count() > 1:  # an agent of the last test's may be collected still
        assert time.monotonic() < deadline
        time.sleep(0.01)
    over = threading.Event()
    others = [threading.Thread(target=over.wait) for _ in range(threads)]
    for other in others:
        other.start()
    try:
        with Control("/dev/null", fork=True) as opened:
            asks(opened)
            [first] = opened._idle or []
            words = Path(f"/proc/{first.pid}/cmdline").read_bytes()
            assert (b"control_agent" in words) == bool(threads)
            os.kill(first.pid, signal.SIGKILL)  # another one takes its place
            wait_until_ended(first.pid)
            asks(opened)
    finally:
        over.set()
        for other in others:
            other.join()


@pytest.fixture
def mother() -> Iterator[AgentProcess]:
    agent = AgentProcess(default_command("/dev/null"))
    yield agent
    agent.close()


def test_a_fork_answers_and_ends(mother: AgentProcess) -> None:
    forks = [mother.fork(soon()) for _ in range(3)]
    assert len({mother.pid, *(fork.pid for fork in forks)}) == 4
    for fork in forks:
        # What /dev/null says differs between kernels; that it is asked is what counts.
        result, data = fork.call(0xC0207504, bytes(32), b"buffer", soon())
        assert result in (0, -errno.EOPNOTSUPP, -errno.EINVAL)
        assert data == b"buffer"
        fork.close()
        wait_until_ended(fork.pid)


def test_a_fork_has_nothing_of_its_mothers(mother: AgentProcess) -> None:
    """No socket, through which it would hear her commands; a ring of its own."""
    fork = mother.fork(soon())
    fork.call(0xC0207504, bytes(32), b"", soon())
    held, hers = (
        sorted(os.readlink(fd) for fd in Path(f"/proc/{agent.pid}/fd").iterdir())
        for agent in (fork, mother)
    )
    assert len(held) == len(hers)
    assert {path for path in held if path.startswith("socket:")}.isdisjoint(hers)
    fork.close()


def test_a_fork_ends_with_who_holds_it_and_not_with_its_mother(mother: AgentProcess) -> None:
    fork = mother.fork(soon())
    mother.close()
    fork.call(0xC0207504, bytes(32), b"", soon())
    fork._socket.close()
    wait_until_ended(fork.pid)


def test_a_fork_that_is_abandoned_leaves_no_zombie_for_long(mother: AgentProcess) -> None:
    fork = mother.fork(soon())
    fork.abandon()
    wait_until_ended(fork.pid)
    last = mother.fork(soon())
    deadline = soon()
    while Path(f"/proc/{fork.pid}").exists():
        assert time.monotonic() < deadline
        mother.fork(soon()).close()
    last.close()


def test_a_mother_that_is_gone_is_told(mother: AgentProcess) -> None:
    mother.fork(soon()).close()
    os.kill(mother.pid, signal.SIGKILL)
    wait_until_ended(mother.pid)
    with pytest.raises((AgentGoneError, UbiError)):
        mother.fork(soon())


def asks(opened: Control) -> None:
    """A command; what comes of it is no matter."""
    with contextlib.suppress(ControlError):
        opened.stop_dev(1)


def test_a_control_that_is_confined_forks() -> None:
    """… for each command that has no idle agent; one that dies of two costs nothing."""
    with Control(agent_command=default_command("/dev/null")) as opened:
        with contextlib.suppress(OSError):  # what a sandbox of this test's own refuses
            opened.confine(join=False)
        for victim in ("idle", "mother", "idle", "mother"):
            assert opened._mother is not None
            if not opened._idle:
                asks(opened)
            [idle] = opened._idle or []
            ended = idle if victim == "idle" else opened._mother
            os.kill(ended.pid, signal.SIGKILL)
            wait_until_ended(ended.pid)
            asks(opened)
            assert opened._mother.pid != ended.pid
        asks(opened)
        pids = [opened._mother.pid, *(agent.pid for agent in opened._idle or [])]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            wait_until_ended(pid)
        with pytest.raises(UbiError, match=r"helper \(process \d+\) has ended"):
            opened.stop_dev(1)


def test_one_that_is_killed_while_it_is_shut_in_costs_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    confine, killed = AgentProcess.confine, []

    def die_first(agent: AgentProcess, namespace_fd: int, deadline: float) -> None:
        if not killed:
            killed.append(agent.pid)
            os.kill(agent.pid, signal.SIGKILL)
            wait_until_ended(agent.pid)
        confine(agent, namespace_fd, deadline)

    monkeypatch.setattr(AgentProcess, "confine", die_first)
    with Control(agent_command=default_command("/dev/null")) as opened:
        try:
            opened.confine(join=False)
        except OSError as error:
            assert error.errno != errno.EIO, error  # it may be what is not permitted here
        assert killed
        assert opened._mother is not None
        assert opened._mother.pid not in killed
        assert len(opened._idle or []) == 1
        asks(opened)


def test_a_signal_while_it_is_shut_in_goes_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def interrupted(agent: AgentProcess, namespace_fd: int, deadline: float) -> None:
        calls.append((agent.pid, namespace_fd, deadline))
        raise KeyboardInterrupt

    monkeypatch.setattr(AgentProcess, "confine", interrupted)
    with Control(agent_command=default_command("/dev/null")) as opened:
        with pytest.raises(KeyboardInterrupt):
            opened.confine(join=False)
        assert len(calls) == 1
        asks(opened)


def test_its_own_requests_are_no_commands_of_the_drivers() -> None:
    assert max(control_agent.CONFINE, control_agent.FORK, control_agent.OPENERS) < 1 << 8
