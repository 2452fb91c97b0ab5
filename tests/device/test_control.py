"""Control commands on a real driver, with a server of one tag that holds or serves requests.

Every device made here is removed again, also by a test that fails: its server is killed first, as
a device whose server holds a request cannot be stopped.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from ublk_ubi import control as control_module
from ublk_ubi.abi import DevState, Feature
from ublk_ubi.control import Control, ControlError, ControlTimeout
from ublk_ubi.device_params import AddParams, DeviceParams, DiscardLimits
from ublk_ubi.errors import Exit

pytestmark = pytest.mark.cpus(2)

PACKAGE_PARENT = str(Path(control_module.__file__).resolve().parents[1])
RECOVERABLE = Feature.USER_RECOVERY | Feature.USER_RECOVERY_REISSUE
DISK = DeviceParams(dev_sectors=16384, max_sectors=256, chunk_sectors=128)

# One queue, one tag, plain copy. Says "fetched", then "held" (and stops) or serves zeros; ABORT
# ends it. It uses our ring for its FETCH: with one tag, one command is in flight at a time.
SERVER = """
import ctypes, mmap, os, select, struct, sys, time
from ublk_ubi.liburing import CommandRing
FETCH, COMMIT = 0xC0107520, 0xC0107521
path, hold = sys.argv[1], sys.argv[2] == "hold"
for _ in range(1000):
    try:
        fd = os.open(path, os.O_RDWR)
        break
    except OSError:
        time.sleep(0.005)
descriptor = mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ, offset=0)
buffer = mmap.mmap(-1, 1 << 20)
address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
ring = CommandRing()
poll = select.poll()
poll.register(ring.fileno(), select.POLLIN)
def wait():
    while (result := ring.result()) is None:
        poll.poll()
    return result
ring.submit(fd, FETCH, struct.pack("=HHiQ", 0, 0, 0, address))
print("fetched", flush=True)
while wait() == 0:
    if hold:
        print("held", flush=True)
        time.sleep(3600)
    flags, sectors = struct.unpack_from("=II", descriptor)
    buffer[:] = bytes(1 << 20)
    ring.submit(fd, COMMIT, struct.pack("=HHiQ", 0, 0, sectors << 9, address))
os._exit(0)
"""


class Server:
    """A server process for one device."""

    def __init__(self, info, mode):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, info.char_path, mode],
            stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": PACKAGE_PARENT},
        )
        self.pid = self.process.pid

    def says(self, word):
        assert self.process.stdout.readline() == f"{word}\n"

    def end(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


class Lab:
    """Makes devices and servers, and takes them away again."""

    def __init__(self, opened):
        self.control = opened
        self.ids = []
        self.servers = []

    def add(self, **params):
        info = self.control.add_dev(AddParams(**{"depth": 1, "max_io_bytes": 1 << 20, **params}))
        self.ids.append(info.id)
        return info

    def serve(self, info, mode="serve"):
        server = Server(info, mode)
        self.servers.append(server)
        server.says("fetched")
        return server

    def live(self, mode="serve", flags=0):
        """Start a device whose one tag is idle: the kernel's own partition scan is left out."""
        info = self.add(flags=flags | Feature.NO_AUTO_PART_SCAN)
        assert flags | Feature.NO_AUTO_PART_SCAN in info.flags
        self.control.set_params(info.id, DISK)
        server = self.serve(info, mode)
        self.control.start_dev(info.id, server.pid)
        return info, server

    def clean(self):
        for server in self.servers:
            server.end()
        for device_id in self.ids:
            with contextlib.suppress(ControlError):
                self.control.del_dev(device_id)


@pytest.fixture
def opened():
    with Control.open() as opened:
        yield opened


@pytest.fixture
def lab(opened):
    lab = Lab(opened)
    try:
        yield lab
    finally:
        lab.clean()
        left = [device_id for device_id in lab.ids if Path(f"/dev/ublkc{device_id}").exists()]
        assert not left


def fails(code):
    return pytest.raises(ControlError, check=lambda error: error.errno == code)


def wait_until(condition, limit_s=10.0):
    deadline = time.monotonic() + limit_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)
    return value


def queue_limit(info, name):
    return Path(f"/sys/block/ublkb{info.id}/queue/{name}").read_text().strip()


def sectors_of(info):
    return int(Path(f"/sys/block/ublkb{info.id}/size").read_text())


def read_disk(info, length=4096):
    fd = os.open(info.disk_path, os.O_RDONLY)
    try:
        return os.pread(fd, length, 0)
    finally:
        os.close(fd)


# ---- without a server ------------------------------------------------------------------------

def test_features(opened):
    features = opened.get_features()
    assert Feature.CMD_IOCTL_ENCODE | Feature.USER_COPY | RECOVERABLE in features


def test_a_device_is_made_described_and_removed(lab):
    info = lab.add(depth=64, server_flags=0x1234_5678_9ABC)
    assert (info.state, info.depth, info.queues, info.pid) == (DevState.DEAD, 64, 1, None)
    wait_until(lambda: os.path.exists(info.char_path))
    assert lab.control.get_dev_info(info.id) == info
    assert info.server_flags == 0x1234_5678_9ABC

    params = DeviceParams(
        dev_sectors=1 << 21, max_sectors=2048, chunk_sectors=2048, logical_block_size=4096,
        physical_block_size=4096, io_min=4096, io_opt=1 << 20, volatile_cache=True, fua=True,
        dma_alignment=4096,
        discard=DiscardLimits(
            granularity=1 << 20, max_discard_sectors=1 << 20, max_write_zeroes_sectors=2048,
        ),
    )
    lab.control.set_params(info.id, params)
    assert lab.control.get_params(info.id) == params

    numbers = lab.control.get_dev_numbers(info.id)
    node = os.stat(info.char_path).st_rdev
    assert numbers.char == (os.major(node), os.minor(node))
    assert numbers.disk is None

    lab.control.del_dev(info.id)
    with fails(errno.ENODEV):
        lab.control.get_dev_info(info.id)
    assert not os.path.exists(info.char_path)


def test_granted_flags_are_those_asked_for_and_known(lab):
    features = lab.control.get_features()
    unknown = Feature(1 << 50)
    asked = RECOVERABLE | Feature.USER_COPY | unknown
    info = lab.add(flags=asked)
    assert RECOVERABLE | Feature.USER_COPY in info.flags
    assert unknown not in info.flags
    assert int(info.flags) & ~int(features) == 0
    assert Feature.SUPPORT_ZERO_COPY not in info.flags
    assert lab.control.get_dev_info(info.id).flags == info.flags


def test_queues_are_capped_to_the_processors(lab):
    info = lab.add(queues=64)
    possible = Path("/sys/devices/system/cpu/possible").read_text().strip()
    assert info.queues == int(possible.rsplit("-", maxsplit=1)[-1]) + 1
    cpus = [lab.control.get_queue_affinity(info.id, queue) for queue in range(info.queues)]
    assert frozenset.union(*cpus) == frozenset(range(info.queues))
    assert sum(map(len, cpus)) == info.queues
    with fails(errno.EINVAL):
        lab.control.get_queue_affinity(info.id, info.queues)


def test_an_id_that_is_taken(lab):
    info = lab.add()
    with fails(errno.EEXIST) as caught:
        lab.add(id=info.id)
    assert "the id is taken" in caught.value.message
    lab.control.del_dev(info.id)
    assert lab.add(id=info.id).id == info.id


@pytest.mark.parametrize(
    "call",
    [
        lambda c, i: c.del_dev(i),
        lambda c, i: c.stop_dev(i),
        lambda c, i: c.get_dev_info(i),
        lambda c, i: c.get_params(i),
        lambda c, i: c.set_params(i, DISK),
        lambda c, i: c.start_dev(i, os.getpid()),
        lambda c, i: c.start_user_recovery(i),
    ],
    ids=["del", "stop", "info", "params", "set_params", "start", "recovery"],
)
def test_an_id_that_is_not_there(lab, call):
    free = lab.add().id
    lab.control.del_dev(free)
    with fails(errno.ENODEV) as caught:
        call(lab.control, free)
    assert caught.value.code is Exit.NO_DEVICE
    assert f"ublk device {free}" in caught.value.message


@pytest.mark.parametrize(
    "params",
    [
        {"depth": 4097},
        {"depth": 0},
        {"queues": 0},
        {"flags": Feature.USER_RECOVERY_REISSUE},
        {"flags": RECOVERABLE | Feature.USER_RECOVERY_FAIL_IO},
    ],
    ids=["depth-4097", "depth-0", "queues-0", "reissue-alone", "reissue-and-fail"],
)
def test_what_add_refuses(lab, params):
    with fails(errno.EINVAL):
        lab.add(**params)


def test_parameters_that_the_driver_refuses(lab):
    info = lab.add(max_io_bytes=64 << 10)
    with fails(errno.EINVAL) as caught:
        lab.control.set_params(info.id, DeviceParams(dev_sectors=8, max_sectors=2048))
    assert "refuses these parameters" in caught.value.message


def test_a_device_that_was_never_started_can_be_stopped(lab):
    info = lab.add()
    lab.control.stop_dev(info.id)
    assert lab.control.get_dev_info(info.id).state is DevState.DEAD


def test_try_stop_without_a_disk(lab):
    info = lab.add()
    assert Feature.SAFE_STOP_DEV in info.flags
    with fails(errno.ENODEV):
        lab.control.try_stop_dev(info.id)


def test_start_without_parameters(lab):
    info = lab.add()
    with fails(errno.EINVAL):
        lab.control.start_dev(info.id, os.getpid())


def test_update_size_without_a_disk(lab):
    info = lab.add()
    with fails(errno.ENODEV):
        lab.control.update_size(info.id, 8192)


def test_a_start_that_nobody_answers_ends_at_the_limit_and_keeps_nothing(lab):
    """The abandoned agent dies of SIGKILL: its START would keep the device from going away."""
    info = lab.add()
    lab.control.set_params(info.id, DISK)
    started = time.monotonic()
    with pytest.raises(ControlTimeout) as caught:
        lab.control.start_dev(info.id, os.getpid(), timeout_s=2)
    assert time.monotonic() - started < 20
    assert caught.value.code is Exit.TIMED_OUT
    lab.control.del_dev(info.id, timeout_s=5)


def test_a_start_ends_with_the_process_that_asked_for_it(lab):
    """A daemon killed in START_DEV leaves no agent behind that would hold the device."""
    info = lab.add()
    lab.control.set_params(info.id, DISK)
    code = f"""
    import os, threading, time
    from ublk_ubi.control import Control
    control = Control()
    control.get_features()
    print(control._idle[0].pid, flush=True)
    control.start_dev({info.id}, os.getpid(), timeout_s=60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": PACKAGE_PARENT},
    )
    agent = int(process.stdout.readline())
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.kill()
    process.wait()
    process.stdout.close()
    wait_until(lambda: has_ended(agent))
    lab.control.del_dev(info.id, timeout_s=5)


def has_ended(pid):
    """It is gone, or waits for nothing but its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter amid reading
        return True


# ---- with a server ---------------------------------------------------------------------------

def test_a_whole_life(lab):
    info, server = lab.live()
    now = lab.control.get_dev_info(info.id)
    assert (now.state, now.pid) == (DevState.LIVE, server.pid)
    node = os.stat(info.disk_path).st_rdev
    assert lab.control.get_dev_numbers(info.id).disk == (os.major(node), os.minor(node))
    assert sectors_of(info) == DISK.dev_sectors
    assert queue_limit(info, "chunk_sectors") == str(DISK.chunk_sectors)
    assert queue_limit(info, "write_cache") == "write through"
    assert read_disk(info) == bytes(4096)

    with fails(errno.EEXIST):
        lab.control.start_dev(info.id, server.pid)
    with fails(errno.EACCES) as caught:
        lab.control.set_params(info.id, DISK)
    assert "started already" in caught.value.message

    fd = os.open(info.disk_path, os.O_RDONLY)
    try:
        with fails(errno.EBUSY) as caught:
            lab.control.try_stop_dev(info.id)
        assert caught.value.code is Exit.BUSY
    finally:
        os.close(fd)
    lab.control.try_stop_dev(info.id)
    wait_until(lambda: not os.path.exists(info.disk_path))
    assert lab.control.get_dev_info(info.id).state is DevState.DEAD
    lab.control.del_dev(info.id)


def test_start_with_another_processs_id(lab):
    info = lab.add()
    lab.control.set_params(info.id, DISK)
    lab.serve(info)
    with fails(errno.EINVAL):
        lab.control.start_dev(info.id, os.getpid())


def test_cache_attributes_reach_the_disk(lab):
    info = lab.add()
    params = DeviceParams(
        dev_sectors=16384, max_sectors=256, volatile_cache=True, fua=True, io_opt=1 << 20,
        discard=DiscardLimits(
            granularity=1 << 20, max_discard_sectors=1 << 20, max_write_zeroes_sectors=2048,
        ),
    )
    lab.control.set_params(info.id, params)
    server = lab.serve(info)
    lab.control.start_dev(info.id, server.pid)
    assert queue_limit(info, "write_cache") == "write back"
    assert queue_limit(info, "fua") == "1"
    assert queue_limit(info, "rotational") == "0"
    assert queue_limit(info, "optimal_io_size") == str(1 << 20)
    assert queue_limit(info, "discard_granularity") == str(1 << 20)
    assert queue_limit(info, "discard_max_bytes") == str(512 << 20)
    assert queue_limit(info, "write_zeroes_max_bytes") == str(1 << 20)


def test_resize(lab):
    info, _ = lab.live(flags=Feature.UPDATE_SIZE)
    lab.control.update_size(info.id, 2 * DISK.dev_sectors)
    assert sectors_of(info) == 2 * DISK.dev_sectors
    assert lab.control.get_params(info.id).dev_sectors == 2 * DISK.dev_sectors


def test_a_stop_that_hangs_is_left_behind_and_ends_with_the_server(lab):
    """STOP_DEV waits for a request that its server holds, unkillable, until the server dies."""
    info, server = lab.live("hold")
    reader = subprocess.Popen(
        ["dd", f"if={info.disk_path}", "of=/dev/null", "bs=4096", "count=1", "iflag=direct"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    try:
        server.says("held")
        started = time.monotonic()
        with pytest.raises(ControlTimeout) as caught:
            lab.control.stop_dev(info.id, timeout_s=2)
        assert time.monotonic() - started < 20
        agent = int(caught.value.message.partition("process ")[2].partition(")")[0])
        time.sleep(0.3)
        assert os.path.exists(f"/proc/{agent}"), "it did not hang: this test shows nothing"
        assert lab.control.get_features(), "another agent does its work"
        server.end()
        wait_until(lambda: not os.path.exists(f"/proc/{agent}"))
        lab.control.del_dev(info.id)
    finally:
        server.end()
        reader.wait()


def recover(lab, info):
    def took_over():
        try:
            lab.control.start_user_recovery(info.id)
        except ControlError as error:
            assert error.errno == errno.EBUSY
            return False
        return True

    wait_until(took_over)
    server = lab.serve(info)
    lab.control.end_user_recovery(info.id, server.pid)
    return server


def test_recovery(lab):
    info, server = lab.live(flags=RECOVERABLE)
    with fails(errno.EBUSY):
        lab.control.start_user_recovery(info.id)
    server.end()
    wait_until(lambda: lab.control.get_dev_info(info.id).state is DevState.QUIESCED)
    assert lab.control.get_dev_info(info.id).pid is None

    result = []
    reader = threading.Thread(target=lambda: result.append(read_disk(info)))
    reader.start()
    second = recover(lab, info)
    reader.join(10)
    assert result == [bytes(4096)]
    now = lab.control.get_dev_info(info.id)
    assert (now.state, now.pid) == (DevState.LIVE, second.pid)


def test_recovery_of_what_is_not_recoverable(lab):
    info, _ = lab.live()
    with fails(errno.EINVAL):
        lab.control.start_user_recovery(info.id)


def test_quiesce(lab):
    info, server = lab.live(flags=RECOVERABLE | Feature.QUIESCE)
    lab.control.quiesce_dev(info.id)
    assert server.process.wait(5) == 0
    wait_until(lambda: lab.control.get_dev_info(info.id).state is DevState.QUIESCED)
    recover(lab, info)
    assert read_disk(info) == bytes(4096)


def test_quiesce_is_not_granted_unasked(lab):
    info, _ = lab.live(flags=RECOVERABLE)
    assert Feature.QUIESCE not in info.flags
    with fails(errno.EOPNOTSUPP):
        lab.control.quiesce_dev(info.id)


def test_sixteen_at_once(lab):
    """Each command has an agent to itself: sixteen threads make, start and remove a device each."""
    failures = []

    def life():
        try:
            info, _ = lab.live()
            assert read_disk(info) == bytes(4096)
            lab.control.del_dev(info.id)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=life) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_signal_to_the_agent_does_not_break_a_command(lab):
    """DEL_DEV would end with EINTR: systemd's SIGTERM to a whole service must not cause that."""
    info = lab.add()
    fd = os.open(info.char_path, os.O_RDWR)
    (agent,) = lab.control._idle
    failures = []

    def delete():
        try:
            lab.control.del_dev(info.id)
        except ControlError as error:
            failures.append(error)

    thread = threading.Thread(target=delete)
    try:
        thread.start()
        wait_until(lambda: not lab.control._idle)
        time.sleep(0.2)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(agent.pid, number)
        time.sleep(0.2)
        assert thread.is_alive(), "DEL_DEV waits for who has ublkc open"
    finally:
        os.close(fd)
        thread.join()
    assert failures == []
