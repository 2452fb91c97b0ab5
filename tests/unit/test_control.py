"""The control API against helpers that play a driver, get stuck, die or lie.

The real agent runs here too, on /dev/null, which takes an io_uring command and answers 0 (Linux
6.2 and later) or EOPNOTSUPP.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ublk_ubi import abi, agent_process, control, control_agent
from ublk_ubi.abi import Command, DevState, Feature
from ublk_ubi.agent_process import AgentProcess, default_command
from ublk_ubi.control import Control, ControlError, ControlTimeout
from ublk_ubi.device_params import AddParams, DeviceParams, DevNumbers
from ublk_ubi.errors import Exit, UbiError

PACKAGE_PARENT = str(Path(control.__file__).resolve().parents[1])

# What every fake agent begins with: the protocol by hand, not by our own code.
PREAMBLE = """
import json, os, struct, sys, time
def send(kind, value, data=b""):
    os.write(0, struct.pack("=Ii", kind, value) + data)
def receive():
    packet = os.read(0, 65536)
    if not packet:
        os._exit(0)
    operation, = struct.unpack_from("=I", packet)
    fields = struct.unpack_from("=IHHQQHHI", packet, 4)
    return operation, fields, packet[36:]
"""


def fake_agent(body, *arguments):
    code = PREAMBLE + textwrap.dedent(body)
    return [sys.executable, "-I", "-S", "-c", code, *(str(a) for a in arguments)]


PLAYER = """
answers, log = json.loads(sys.argv[1]), open(sys.argv[2], "a")
send(1, 3)
while True:
    operation, fields, buffer = receive()
    print(json.dumps([operation, fields, buffer.hex()]), file=log, flush=True)
    result, data = answers.get(str(operation), [0, ""])
    send(2, result, bytes.fromhex(data) or buffer)
"""
STUCK = "send(1, 3); receive(); time.sleep(60)"
SILENT = "time.sleep(60)"
DIES_IN_A_COMMAND = "send(1, 3); receive(); os._exit(3)"
DIES_AT_ONCE = "os._exit(4)"
DIES_THE_FIRST_TIME = """
send(1, 3)
receive()
with open(sys.argv[1], "a+") as file:
    file.write("!")
    if file.tell() == 1:
        file.flush()
        os._exit(3)
send(2, int(sys.argv[2]))
"""
OF_ANOTHER_VERSION = "send(1, 99); receive()"
CANNOT_WORK = """send(3, 2, "io_uring is forbidden here".encode()); os._exit(0)"""
TALKS_NONSENSE = "send(1, 3); receive(); send(2, 0, b'more than was asked for')"


class Driver:
    """A Control whose agent plays given answers; `seen()` tells the last request."""

    def __init__(self, tmp_path, answers):
        self.log = tmp_path / "requests"
        table = {str(int(op)): [result, data.hex()] for op, (result, data) in answers.items()}
        self.control = Control(agent_command=fake_agent(PLAYER, json.dumps(table), self.log))

    def seen(self):
        operation, fields, buffer = json.loads(self.log.read_text().splitlines()[-1])
        names = ("dev_id", "queue_id", "len", "addr", "data", "dev_path_len", "pad", "reserved")
        return Command(operation), dict(zip(names, fields, strict=True)), bytes.fromhex(buffer)


@pytest.fixture
def play(tmp_path):
    with contextlib.ExitStack() as stack:

        def make(answers=None):
            driver = Driver(tmp_path, answers or {})
            stack.enter_context(driver.control)
            return driver

        yield make


@pytest.fixture(autouse=True)
def nothing_left():
    """No thread, no child process, alive or zombie, outlives a test."""
    yield
    wait_until(lambda: threading.active_count() == 1)
    wait_until(lambda: not children())


def children():
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def wait_until(condition, limit_s=3.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.005)


def gone(pid):
    """Whether a process has ended and was collected."""
    return not Path(f"/proc/{pid}").exists()


def ended(pid):
    """Whether a process has ended, collected by whoever is its parent or not yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter amid reading
        return True


def idle_pids(opened):
    return [agent.pid for agent in opened._idle]


# ---- what each method asks for ----------------------------------------------------------------

@pytest.mark.parametrize(
    ("method", "arguments", "command", "data"),
    [
        ("start_dev", (7, 4321), Command.START_DEV, 4321),
        ("stop_dev", (7,), Command.STOP_DEV, 0),
        ("try_stop_dev", (7,), Command.TRY_STOP_DEV, 0),
        ("del_dev", (7,), Command.DEL_DEV, 0),
        ("del_dev_async", (7,), Command.DEL_DEV_ASYNC, 0),
        ("start_user_recovery", (7,), Command.START_USER_RECOVERY, 0),
        ("end_user_recovery", (7, 99), Command.END_USER_RECOVERY, 99),
    ],
)
def test_commands_without_a_buffer(play, method, arguments, command, data):
    driver = play()
    assert getattr(driver.control, method)(*arguments) is None
    assert driver.seen() == (
        command,
        {"dev_id": 7, "queue_id": 0xFFFF, "len": 0, "addr": 0, "data": data,
         "dev_path_len": 0, "pad": 0, "reserved": 0},
        b"",
    )


def test_quiesce_takes_milliseconds_and_never_for_ever(play):
    driver = play()
    driver.control.quiesce_dev(1, drain_ms=1500)
    command, fields, _ = driver.seen()
    assert (command, fields["data"]) == (Command.QUIESCE_DEV, 1500)
    with pytest.raises(ValueError, match="0"):
        driver.control.quiesce_dev(1, drain_ms=0)


def test_features(play):
    driver = play({Command.GET_FEATURES: (0, (0x1FE).to_bytes(8, "little"))})
    features = driver.control.get_features()
    assert Feature.USER_COPY in features
    assert Feature.SUPPORT_ZERO_COPY not in features
    command, fields, buffer = driver.seen()
    assert (command, fields["len"], len(buffer)) == (Command.GET_FEATURES, 8, 8)


def test_features_of_a_newer_kernel_are_kept(play):
    value = 1 << 40 | int(Feature.USER_RECOVERY)
    driver = play({Command.GET_FEATURES: (0, value.to_bytes(8, "little"))})
    assert int(driver.control.get_features()) == value


def test_add_tells_what_was_granted(play):
    granted = abi.CtrlDevInfo(
        nr_hw_queues=2, queue_depth=64, max_io_buf_bytes=1 << 20, dev_id=5, ublksrv_pid=-1,
        flags=int(Feature.USER_COPY | Feature.CMD_IOCTL_ENCODE), ublksrv_flags=77,
        owner_uid=1, owner_gid=2,
    )
    driver = play({Command.ADD_DEV: (0, bytes(granted))})
    info = driver.control.add_dev(
        AddParams(queues=8, depth=64, flags=Feature.USER_COPY | Feature.AUTO_BUF_REG),
    )
    assert (info.id, info.queues, info.depth, info.state) == (5, 2, 64, DevState.DEAD)
    assert (info.pid, info.server_flags, info.owner_uid, info.owner_gid) == (None, 77, 1, 2)
    assert Feature.AUTO_BUF_REG not in info.flags
    assert (info.char_path, info.disk_path) == ("/dev/ublkc5", "/dev/ublkb5")
    command, fields, buffer = driver.seen()
    asked = abi.CtrlDevInfo.from_buffer_copy(buffer)
    assert (command, fields["dev_id"], fields["len"]) == (Command.ADD_DEV, 0xFFFF_FFFF, 64)
    assert (asked.dev_id, asked.nr_hw_queues, asked.queue_depth) == (0xFFFF_FFFF, 8, 64)
    assert asked.flags == int(Feature.USER_COPY | Feature.AUTO_BUF_REG)


def test_add_with_an_id_says_it_twice(play):
    driver = play()
    driver.control.add_dev(AddParams(id=3))
    _, fields, buffer = driver.seen()
    assert fields["dev_id"] == abi.CtrlDevInfo.from_buffer_copy(buffer).dev_id == 3


def test_an_unknown_state_is_explained(play):
    driver = play({Command.GET_DEV_INFO: (0, bytes(abi.CtrlDevInfo(dev_id=1, state=9)))})
    with pytest.raises(UbiError, match=r"unknown state 9.*upgrade"):
        driver.control.get_dev_info(1)


def test_params_go_out_and_come_back(play):
    params = DeviceParams(dev_sectors=1 << 20, max_sectors=2048, chunk_sectors=2048)
    answer = abi.Params.from_buffer_copy(params.pack())
    answer.types |= int(abi.ParamType.DEVT)
    answer.devt = abi.ParamDevt(char_major=240, char_minor=3, disk_major=259, disk_minor=7)
    driver = play({Command.GET_PARAMS: (0, bytes(answer))})
    driver.control.set_params(3, params)
    command, fields, buffer = driver.seen()
    assert (command, fields["dev_id"], fields["len"]) == (Command.SET_PARAMS, 3, 152)
    assert buffer == params.pack()
    got = driver.control.get_params(3)
    assert (got.dev_sectors, got.chunk_sectors) == (1 << 20, 2048)
    _, _, asked = driver.seen()
    assert abi.Params.from_buffer_copy(asked).len == 152
    assert driver.control.get_dev_numbers(3) == DevNumbers((240, 3), (259, 7))


def test_a_disk_that_is_not_started_has_no_numbers(play):
    answer = abi.Params(len=152, devt=abi.ParamDevt(char_major=240, char_minor=0))
    driver = play({Command.GET_PARAMS: (0, bytes(answer))})
    assert driver.control.get_dev_numbers(0).disk is None


def test_queue_affinity(play):
    mask = bytearray(2048)
    mask[0], mask[8] = 0b101, 0b1
    driver = play({Command.GET_QUEUE_AFFINITY: (0, bytes(mask))})
    assert driver.control.get_queue_affinity(2, 1) == {0, 2, 64}
    _, fields, _ = driver.seen()
    assert (fields["data"], fields["len"] % 8) == (1, 0)


def test_update_size_looks_at_the_state_first(play):
    """On a device without a disk kernels before 7.0 crash."""
    live = abi.CtrlDevInfo(dev_id=4, state=int(DevState.LIVE))
    driver = play({Command.GET_DEV_INFO: (0, bytes(live))})
    driver.control.update_size(4, 4096)
    command, fields, _ = driver.seen()
    assert (command, fields["data"]) == (Command.UPDATE_SIZE, 4096)


def test_update_size_of_a_device_without_a_disk_is_never_sent(play):
    driver = play({Command.GET_DEV_INFO: (0, bytes(abi.CtrlDevInfo(dev_id=4)))})
    with pytest.raises(ControlError) as caught:
        driver.control.update_size(4, 4096)
    assert caught.value.errno == errno.ENODEV
    assert driver.seen()[0] is Command.GET_DEV_INFO


# ---- errors ----------------------------------------------------------------------------------

@pytest.mark.parametrize(
    ("call", "code", "exit_code", "says"),
    [
        (lambda c: c.del_dev(9), errno.ENODEV, Exit.NO_DEVICE, "DEL_DEV of ublk device 9"),
        (lambda c: c.try_stop_dev(9), errno.EBUSY, Exit.BUSY, "the device is open"),
        (lambda c: c.add_dev(AddParams(id=9)), errno.EEXIST, Exit.FAILED, "the id is taken"),
        (lambda c: c.add_dev(AddParams()), errno.EACCES, Exit.FAILED, "ublks_max"),
        (lambda c: c.get_features(), errno.EINVAL, Exit.FAILED, "Linux 6.5"),
        (lambda c: c.start_dev(9, 1), errno.EINVAL, Exit.FAILED, "Invalid argument"),
        (lambda c: c.start_user_recovery(9), errno.EBUSY, Exit.BUSY, "has not ended"),
    ],
    ids=["del", "try_stop", "add-id", "add-limit", "features", "start", "recovery"],
)
def test_errors_are_one_line_that_names_command_device_and_errno(
    play, call, code, exit_code, says,
):
    driver = play(dict.fromkeys(Command, (-code, b"")))
    with pytest.raises(ControlError) as caught:
        call(driver.control)
    error = caught.value
    assert (error.errno, error.code) == (code, exit_code)
    assert says in error.message
    assert errno.errorcode[code] in error.message
    assert "\n" not in error.message


def test_an_error_of_a_command_does_not_cost_the_agent(play):
    driver = play({Command.STOP_DEV: (-errno.ENODEV, b"")})
    before = idle_pids(driver.control)
    with pytest.raises(ControlError):
        driver.control.stop_dev(1)
    assert idle_pids(driver.control) == before


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (DIES_IN_A_COMMAND, r"ended in a command \(exit status 3\)"),
        (DIES_AT_ONCE, r"ended before it was ready \(exit status 4\)"),
        (OF_ANOTHER_VERSION, r"protocol 99, not 3: .* upgraded .* restart"),
        (CANNOT_WORK, r"^io_uring is forbidden here$"),
        (TALKS_NONSENSE, r"cannot be read"),
    ],
    ids=["dies in a command", "dies at once", "another version", "cannot work", "nonsense"],
)
def test_an_agent_that_fails_is_explained_in_one_line(monkeypatch, body, says):
    monkeypatch.setattr(agent_process, "_CLOSE_WAIT_S", 20)  # for its exit status
    with Control(agent_command=fake_agent(body)) as opened:
        with pytest.raises(UbiError, match=says) as caught:
            opened.stop_dev(1)
        assert "\n" not in caught.value.message
        assert not opened._idle


@pytest.mark.parametrize(
    ("call", "result"),
    [
        (lambda c: c.del_dev(1), 0),
        (lambda c: c.del_dev(1), -errno.ENODEV),       # the one that died had done it
        (lambda c: c.try_stop_dev(1), -errno.ENODEV),
        (lambda c: c.stop_dev(1), -errno.ENODEV),
        (lambda c: c.start_user_recovery(1), 0),
    ],
)
def test_a_command_whose_agent_died_is_given_again(tmp_path, call, result):
    agent = fake_agent(DIES_THE_FIRST_TIME, tmp_path / "died", result)
    with Control(agent_command=agent) as opened:
        call(opened)


@pytest.mark.parametrize(
    ("call", "result"),
    [
        (lambda c: c.add_dev(AddParams()), 0),
        (lambda c: c.start_dev(1, 1), 0),
        (lambda c: c.end_user_recovery(1, 1), 0),
        (lambda c: c.start_user_recovery(1), -errno.ENODEV),
    ],
)
def test_what_cannot_be_given_twice_is_not(tmp_path, call, result):
    agent = fake_agent(DIES_THE_FIRST_TIME, tmp_path / "died", result)
    with Control(agent_command=agent) as opened, pytest.raises(UbiError):
        call(opened)


def test_an_agent_that_cannot_be_started(tmp_path):
    with pytest.raises(UbiError, match=r"cannot start the ublk control helper .*/absent: No such"):
        Control(agent_command=[str(tmp_path / "absent")])


def test_a_closed_control_refuses(play):
    driver = play()
    driver.control.close()
    driver.control.close()
    with pytest.raises(UbiError, match="closed"):
        driver.control.get_features()


# ---- time limits -------------------------------------------------------------------------------

def test_a_helper_that_is_never_ready_is_abandoned(monkeypatch):
    """The kernel has no part in that, and is not blamed for it."""
    monkeypatch.setattr(control, "READY_TIMEOUT_S", 0.3)
    with Control(agent_command=fake_agent(SILENT)) as opened:
        (pid,) = idle_pids(opened)
        with pytest.raises(UbiError, match=rf"process {pid}\) is not ready yet") as caught:
            opened.stop_dev(3, timeout_s=20)
        assert caught.value.code == Exit.TIMED_OUT
        wait_until(lambda: gone(pid))


def test_a_slow_start_does_not_count_as_the_commands_time():
    body = """
    time.sleep(3)
    send(1, 3)
    while True:
        receive()
        send(2, 0)
    """
    with Control(agent_command=fake_agent(body)) as opened:
        opened.stop_dev(3, timeout_s=2)


def test_a_late_command_is_abandoned():
    with Control(agent_command=fake_agent(STUCK)) as opened:
        (pid,) = idle_pids(opened)
        started = time.monotonic()
        with pytest.raises(ControlTimeout) as caught:
            opened.stop_dev(3, timeout_s=0.3)
        assert 0.3 <= time.monotonic() - started < 10
        error = caught.value
        assert (error.code, error.errno) == (Exit.TIMED_OUT, errno.ETIMEDOUT)
        assert re.search(
            rf"^STOP_DEV of ublk device 3 .*0\.3 s.*process {pid}.*del --force", error.message,
        )
        wait_until(lambda: gone(pid))


def test_after_an_abandoned_command_the_next_one_has_a_new_agent(tmp_path):
    mark = tmp_path / "first"
    body = """
    first = not os.path.exists(sys.argv[1])
    open(sys.argv[1], "w").close()
    send(1, 3)
    while True:
        receive()
        if first:
            time.sleep(60)
        send(2, 0)
    """
    with Control(agent_command=fake_agent(body, mark)) as opened:
        with pytest.raises(ControlTimeout):
            opened.stop_dev(1, timeout_s=0.5)
        opened.stop_dev(1, timeout_s=5)


def test_one_agent_serves_many_commands(play):
    driver = play()
    before = idle_pids(driver.control)
    for _ in range(50):
        driver.control.stop_dev(1)
    assert idle_pids(driver.control) == before


def test_an_exception_in_the_middle_of_a_command_abandons_it(play):
    """A Ctrl-C, say: the answer that comes later must not become the next command's."""

    class Interrupted(BaseException):
        pass

    def interrupt(*_):
        raise Interrupted

    with Control(agent_command=fake_agent(STUCK)) as opened:
        (pid,) = idle_pids(opened)
        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        try:
            with pytest.raises(Interrupted):
                opened.stop_dev(1, timeout_s=20)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert not opened._idle
        wait_until(lambda: gone(pid))


def test_an_agent_killed_while_idle_is_replaced(play):
    driver = play()
    driver.control.stop_dev(1)
    (pid,) = idle_pids(driver.control)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: ended(pid))
    driver.control.stop_dev(1)
    assert idle_pids(driver.control) != [pid]


def test_threads_do_not_wait_for_one_another(tmp_path):
    """No command is answered before all twelve have come."""
    body = """
    send(1, 3)
    while True:
        receive()
        open(os.path.join(sys.argv[1], str(os.getpid())), "w").close()
        while len(os.listdir(sys.argv[1])) < 12:
            time.sleep(0.02)
        send(2, 0)
    """
    with Control(agent_command=fake_agent(body, tmp_path)) as opened:
        with ThreadPoolExecutor(12) as pool:
            assert list(pool.map(opened.stop_dev, range(12))) == [None] * 12
        assert len(opened._idle) <= control.MAX_IDLE_AGENTS


def test_closing_while_a_command_runs_ends_its_agent_after_it():
    body = "send(1, 3)\nwhile True:\n    receive(); time.sleep(0.4); send(2, 0)"
    opened = Control(agent_command=fake_agent(body))
    (pid,) = idle_pids(opened)
    thread = threading.Thread(target=opened.stop_dev, args=(1,))
    thread.start()
    wait_until(lambda: not opened._idle)
    opened.close()
    thread.join()
    wait_until(lambda: gone(pid))


def run_python(code, *arguments, **options):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True, text=True, check=False, timeout=20,
        env={**os.environ, "PYTHONPATH": PACKAGE_PARENT}, **options,
    )


def test_the_caller_ends_although_the_helper_does_not(tmp_path):
    """A helper in D state outlives SIGKILL: it must not hold up our exit, nor who reads our output.

    A child of the helper plays that part: it keeps what the helper has open and is not killed.
    """
    survivor = tmp_path / "survivor"
    body = f"""
    if os.fork() == 0:
        with open({str(survivor)!r} + ".new", "w") as file:
            file.write(str(os.getpid()))
        os.rename(file.name, {str(survivor)!r})
        time.sleep(30)
    while not os.path.exists({str(survivor)!r}):
        time.sleep(0.01)
    send(1, 3); receive(); time.sleep(30)
    """
    code = """
    import json, sys
    from ublk_ubi.control import Control, ControlTimeout
    with Control(agent_command=json.loads(sys.argv[1])) as control:
        try:
            control.stop_dev(1, timeout_s=0.3)
        except ControlTimeout as error:
            print("timed out")
    """
    started = time.monotonic()
    run = run_python(code, json.dumps(fake_agent(body)))
    took_s = time.monotonic() - started
    pid = int(survivor.read_text())
    try:
        assert Path(f"/proc/{pid}").exists()
        assert (run.returncode, run.stdout, run.stderr) == (0, "timed out\n", "")
        assert took_s < 15
    finally:
        os.kill(pid, signal.SIGKILL)


def test_the_agent_ends_with_its_parent():
    """Also in a command: a START_DEV left behind would keep the device from being deleted."""
    code = """
    import os, signal
    from ublk_ubi.control import Control
    control = Control("/dev/null")
    try:
        control.get_features()
    except Exception:
        pass
    print(control._idle[0].pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    """
    run = run_python(code)
    assert run.returncode == -signal.SIGKILL
    wait_until(lambda: ended(int(run.stdout)))


# ---- the real agent -----------------------------------------------------------------------------

@pytest.fixture
def real():
    with Control("/dev/null") as opened:
        yield opened


def ask_null(opened):
    try:
        assert opened.get_features() == Feature(0)
    except ControlError as error:
        assert error.errno == errno.EOPNOTSUPP


def test_the_real_agent_carries_commands(real):
    for _ in range(20):
        ask_null(real)


def test_the_real_agent_inherits_nothing(real, tmp_path):
    """Not even a descriptor that is inheritable: ublkc or a base held by it would break the fence.
    """
    with open(tmp_path / "base", "w+b") as base:
        os.set_inheritable(base.fileno(), True)
        with Control("/dev/null") as opened:
            ask_null(opened)
            (agent,) = opened._idle
            targets = sorted(agent.descriptors().values())
            assert [re.sub(r"\d+", "N", name) for name in targets] == [
                "/dev/null", "/dev/null", "/dev/null", "anon_inode:[io_uring]", "socket:[N]",
            ]
            assert os.readlink(f"/proc/{agent.pid}/cwd") == "/"
            assert os.getsid(agent.pid) == agent.pid


def test_the_real_agent_outlives_polite_signals(real):
    ask_null(real)
    (pid,) = idle_pids(real)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(pid, number)
    ask_null(real)
    assert idle_pids(real) == [pid]


def test_the_real_agent_tells_why_it_cannot_work():
    with Control("/dev/absent") as opened, pytest.raises(
        UbiError, match=r"^/dev/absent: No such file or directory$",
    ):
        opened.get_features()


def test_the_real_agent_needs_nothing_of_the_environment(tmp_path, monkeypatch):
    """A hostile folder or variable changes nothing of what a root process imports."""
    (tmp_path / "ctypes.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Control("/dev/null") as opened:
        ask_null(opened)


def test_the_real_agent_imports_little():
    """Every command-line call waits for it: enum or site alone would add a fifth."""
    code = (
        f"import sys; sys.path.append({PACKAGE_PARENT!r}); import ublk_ubi.control_agent; "
        "print(*sorted(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True,
    )
    loaded = set(run.stdout.split())
    assert not loaded & {"enum", "re", "site", "runpy", "msgspec", "subprocess", "socket", "signal"}
    ours = {name for name in loaded if name.startswith("ublk_ubi")}
    assert ours == {"ublk_ubi", "ublk_ubi.control_agent", "ublk_ubi.liburing"}


def test_the_agents_default_command_is_isolated():
    command = default_command()
    assert command[:4] == [sys.executable, "-I", "-S", "-B"]
    assert command[-1] == "/dev/ublk-control"


def test_the_protocols_layout_is_fixed():
    """An older process may talk to newer files: a change must change PROTOCOL, and this test."""
    assert control_agent.PROTOCOL == 3
    assert (control_agent.REQUEST.format, control_agent.REQUEST.size) == ("=I32s", 36)
    assert (control_agent.REPLY.format, control_agent.REPLY.size) == ("=Ii", 8)
    assert (control_agent.READY, control_agent.RESULT, control_agent.FAILED) == (1, 2, 3)
    assert abi.CtrlCmd.addr.offset == control_agent.ADDR_OFFSET


def test_a_buffer_that_no_packet_holds_is_refused():
    agent = AgentProcess(fake_agent(STUCK))
    with pytest.raises(ValueError, match=str(64 << 10)):
        agent.call(1, bytes(32), bytes(64 << 10), time.monotonic() + 1)
    agent.close()


# ---- open(): is there a ublk at all? -------------------------------------------------------------

@pytest.fixture
def as_root(monkeypatch, tmp_path):
    monkeypatch.setattr(control, "has_capability", lambda _: True)
    monkeypatch.setattr(control, "MISC_SYSFS", str(tmp_path / "misc"))


def script(tmp_path, text):
    path = tmp_path / "modprobe"
    path.write_text(f"#!/bin/sh\necho ran >>{tmp_path}/calls\n{text}\n")
    path.chmod(0o755)
    return [str(path), "ublk_drv"]


def test_open_without_root(monkeypatch):
    monkeypatch.setattr(control, "has_capability", lambda _: False)
    with pytest.raises(UbiError, match=r"root.*sudo"):
        Control.open()


def test_open_loads_the_driver_once(tmp_path, as_root):
    node = tmp_path / "ublk-control"
    modprobe = script(tmp_path, f"ln -s /dev/null {node}")
    with Control.open(str(node), modprobe) as opened:
        ask_null(opened)
    Control.open(str(node), modprobe).close()
    assert (tmp_path / "calls").read_text() == "ran\n"


def test_open_without_a_driver(tmp_path, as_root):
    modprobe = script(tmp_path, "echo warning >&2; echo 'FATAL: Module ublk_drv not found.' >&2")
    with pytest.raises(UbiError) as caught:
        Control.open(str(tmp_path / "node"), modprobe)
    message = caught.value.message
    assert os.uname().release in message
    assert "CONFIG_BLK_DEV_UBLK" in message
    assert message.endswith("(FATAL: Module ublk_drv not found.)")
    assert (tmp_path / "calls").read_text() == "ran\n"


def test_open_without_modprobe(tmp_path, as_root):
    with pytest.raises(UbiError, match=r"no ublk driver.*/absent: No such file"):
        Control.open(str(tmp_path / "node"), [str(tmp_path / "absent"), "ublk_drv"])


def test_open_with_a_modprobe_that_hangs(tmp_path, as_root, monkeypatch):
    monkeypatch.setattr(control, "MODPROBE_TIMEOUT_S", 0.2)
    with pytest.raises(UbiError, match=r"did not end within 0\.2 s"):
        Control.open(str(tmp_path / "node"), script(tmp_path, "exec sleep 10"))


def test_open_in_a_container_without_the_node(tmp_path, as_root, monkeypatch):
    monkeypatch.setattr(control, "NODE_WAIT_S", 0.1)
    (tmp_path / "misc").mkdir()
    with pytest.raises(UbiError, match="container"):
        Control.open(str(tmp_path / "node"), script(tmp_path, "exit 0"))


def test_capabilities_are_read_from_the_kernel():
    found = re.search(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())[1]
    for number in (0, control.CAP_SYS_ADMIN, 24):
        assert control.has_capability(number) == bool(int(found, 16) >> number & 1)
