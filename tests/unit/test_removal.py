"""Taking devices away: live, busy, stuck and dead ones, and only what is ours."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest

from ublk_ubi import agent_process, control, launch, links, removal, runtime
from ublk_ubi.abi import Command, DevState, Feature
from ublk_ubi.control import ControlError, ControlTimeout
from ublk_ubi.device_params import DevInfo
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.options import DeviceOptions
from ublk_ubi.topology import User

FAKE = Path(__file__).with_name("fake_daemon.py")


class FakeControl:
    """The kernel's devices, by id: (server_flags, pid)."""

    devices: ClassVar[dict[int, tuple[int, int | None]]] = {}
    deleted: ClassVar[list[int]] = []

    @classmethod
    def open(cls) -> FakeControl:
        return cls()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def get_dev_info(self, dev_id: int) -> DevInfo:
        if dev_id not in self.devices:
            raise ControlError(
                "no such device", code=Exit.NO_DEVICE, errno_=errno.ENODEV,
                command=Command.GET_DEV_INFO, device_id=dev_id,
            )
        flags, pid = self.devices[dev_id]
        return DevInfo(
            id=dev_id, state=DevState.DEAD, queues=1, depth=1, max_io_bytes=1, flags=Feature(0),
            server_flags=flags, pid=pid, owner_uid=0, owner_gid=0,
        )

    def del_dev(self, dev_id: int, *, timeout_s: float) -> None:
        assert timeout_s >= 1
        self.deleted.append(dev_id)
        del self.devices[dev_id]


@pytest.fixture(autouse=True)
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[FakeControl]:
    monkeypatch.setenv("UBLK_UBI_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("UBLK_UBI_DEV", str(tmp_path / "dev"))
    (tmp_path / "dev").mkdir()
    (tmp_path / "ublk-control").touch()
    monkeypatch.setattr(agent_process, "CONTROL_PATH", str(tmp_path / "ublk-control"))
    monkeypatch.setattr(control, "Control", FakeControl)
    monkeypatch.setattr(launch, "daemon_command", lambda: [sys.executable, str(FAKE)])
    FakeControl.devices = {}
    FakeControl.deleted = []
    return FakeControl


@pytest.fixture
def add():
    """Start a fake daemon and give its device."""
    pids: list[int] = []

    def make(kind: str = "normal", name: str = "vm", **options: Any) -> runtime.Device:
        ready = launch.start_daemon(
            DeviceOptions(image=f"/{kind}", name=name, **{"base": f"/{name}.base", **options}),
        )
        pids.append(ready.pid)
        return links.resolve(name)

    yield make
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def gone(tmp_path: Path) -> bool:
    return os.listdir(tmp_path / "run") == [] and os.listdir(tmp_path / "dev/ublk-ubi") == []


def remove(device: runtime.Device, *, force: bool = False, timeout_s: float = 10) -> None:
    removal.remove_device(device, force=force, timeout_s=timeout_s)


def kill(device: runtime.Device) -> runtime.Device:
    assert device.pid is not None
    os.kill(device.pid, signal.SIGKILL)
    while links.resolve(device.name).alive:
        time.sleep(0.005)
    return links.resolve(device.name)


# live ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normal", "slow"])
def test_live(add, tmp_path: Path, kind: str) -> None:
    remove(add(kind))
    assert gone(tmp_path)


def test_two_at_once_remove_one(add, tmp_path: Path) -> None:
    add("slow")
    code = (
        "from ublk_ubi import links, removal\n"
        "removal.remove_device(links.resolve('vm'), force=False, timeout_s=10)"
    )
    env = {**os.environ, "PYTHONPATH": str(FAKE.parents[2])}
    both = [subprocess.Popen([sys.executable, "-c", code], env=env) for _ in range(2)]
    assert 0 in [process.wait() for process in both]
    assert gone(tmp_path)


def test_busy_is_the_daemons_word_when_we_see_nobody(add) -> None:
    device = add("busy")
    with pytest.raises(UbiError, match="vm is in use: close it first") as caught:
        remove(device)
    assert caught.value.code == Exit.BUSY
    assert links.resolve("vm").alive


def test_busy_and_forced(add, tmp_path: Path) -> None:
    remove(add("busy"), force=True)
    assert gone(tmp_path)


@pytest.mark.parametrize("kind", ["mute", "stuck"])
def test_one_that_does_not_stop(add, tmp_path: Path, kind: str) -> None:
    device = add(kind)
    started = time.monotonic()
    with pytest.raises(UbiError, match="--force") as caught:
        remove(device, timeout_s=0.5)
    assert time.monotonic() - started < 10
    assert caught.value.code == Exit.TIMED_OUT
    assert links.resolve("vm").alive
    FakeControl.devices[0] = (12345, None)
    remove(links.resolve("vm"), force=True, timeout_s=0.5)
    assert gone(tmp_path)
    assert FakeControl.deleted == [0]


def test_one_that_dies_of_it_is_cleared_up(add, tmp_path: Path) -> None:
    FakeControl.devices[0] = (12345, None)
    remove(add("dies"))
    assert gone(tmp_path)
    assert FakeControl.deleted == [0]


def test_one_that_is_starting(tmp_path: Path) -> None:
    claim = runtime.claim("vm")
    device = links.resolve("vm")
    assert device.starting
    with pytest.raises(UbiError, match="does not answer"):
        remove(device, timeout_s=0.3)
    claim.release()


# dead ----------------------------------------------------------------------------------------


def test_dead(add, tmp_path: Path) -> None:
    FakeControl.devices[0] = (12345, None)
    remove(kill(add()))
    assert gone(tmp_path)
    assert FakeControl.deleted == [0]


@pytest.mark.parametrize(
    "there",
    [{}, {0: (999, None)}, {0: (0, None)}, {0: (999, 1)}, {1: (12345, None)}],
    ids=["gone", "another's cookie", "no cookie", "another's, live", "another id"],
)
def test_what_is_not_verifiably_ours_stays(add, tmp_path: Path, there) -> None:
    FakeControl.devices = dict(there)
    remove(kill(add()), force=True)
    assert FakeControl.deleted == []
    assert FakeControl.devices == there
    assert gone(tmp_path)


def test_ours_but_taken_over(add) -> None:
    device = kill(add())
    FakeControl.devices[0] = (12345, os.getpid())
    with pytest.raises(UbiError, match=f"is served by process {os.getpid()}"):
        remove(device, force=True)
    assert links.resolve("vm").state is not None


def test_without_a_driver_there_is_no_device(add, tmp_path: Path) -> None:
    device = kill(add())
    (tmp_path / "ublk-control").unlink()
    remove(device)
    assert gone(tmp_path)


def hang(_self: FakeControl, dev_id: int, **_: float) -> None:
    raise ControlTimeout(
        "DEL_DEV of ublk device 0 did not end", code=Exit.TIMED_OUT, errno_=errno.ETIMEDOUT,
        command=Command.DEL_DEV, device_id=dev_id,
    )


def test_while_writes_are_on_their_way_everything_stays(
    add, monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = kill(add())
    FakeControl.devices[0] = (12345, None)
    monkeypatch.setattr(FakeControl, "del_dev", hang)
    with pytest.raises(UbiError, match=r"its last writes to /vm\.base may be on their") as caught:
        remove(device)
    assert caught.value.code == Exit.TIMED_OUT
    left = links.resolve("vm")
    assert not left.alive
    assert left.state is not None
    assert os.path.islink(links.link_path("vm"))


def test_who_has_a_dead_disk_open_keeps_its_id_and_no_more(
    add, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody holds the base's lock, so no write is on its way: the name is free."""
    (tmp_path / "base").touch()
    device = kill(add(base=str(tmp_path / "base")))
    FakeControl.devices[0] = (12345, None)
    monkeypatch.setattr(FakeControl, "del_dev", hang)
    remove(device, force=True)
    assert gone(tmp_path)


def test_a_dead_ones_reused_id_is_anothers(add, tmp_path: Path) -> None:
    dead = kill(add(name="old"))
    FakeControl.devices[0] = (999, os.getpid())
    add(name="new", id=0)
    remove(dead)
    assert links.resolve("new").alive
    assert os.listdir(tmp_path / "run") == ["new"]
    assert os.listdir(tmp_path / "dev/ublk-ubi") == ["new"]


def test_garbage_state_is_cleared_up(add, tmp_path: Path) -> None:
    device = kill(add())
    (tmp_path / "run/vm/state.json").write_text("garbage")
    remove(device)
    assert os.listdir(tmp_path / "run") == []


def test_a_name_that_came_to_life_again_is_left(add) -> None:
    dead = kill(add())
    add()
    with pytest.raises(UbiError, match="in use by a running device"):
        removal.clear_dead(dead, force=True, timeout_s=1)
    assert links.resolve("vm").alive


def test_never_kills_a_stranger(add) -> None:
    """The pid in the folder is another process's, and nobody holds the lock."""
    device = add()
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        kill(device)
        Path(device.folder, "pid").write_text(f"{stranger.pid}\n")
        removal._kill(links.resolve("vm"))
        remove(links.resolve("vm"), force=True)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


# who uses it ---------------------------------------------------------------------------------


class FakeTopology:
    user: User | None = None
    people: ClassVar[list[list[str]]] = []

    def user_of(self, _node: object) -> User | None:
        return self.user

    def openers(self, _device: int, but: int | None = None) -> list[str]:
        found = self.people.pop(0) if len(self.people) > 1 else self.people[0]
        return [one for one in found if not one.startswith(f"process {but} ")]


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> type[FakeTopology]:
    monkeypatch.setattr(removal, "Topology", FakeTopology)
    monkeypatch.setattr(removal, "_OPENER_PATIENCE_S", 0.2)
    monkeypatch.setattr(removal.stat, "S_ISBLK", lambda _mode: True)
    FakeTopology.user, FakeTopology.people = None, [[]]
    return FakeTopology


def test_mounted(add, used) -> None:
    used.user = User("/dev/ublkb0 is mounted on /mnt", "`umount /mnt` first")
    with pytest.raises(UbiError) as caught:
        remove(add())
    assert caught.value.code == Exit.BUSY
    assert caught.value.message == (
        "device vm is in use: /dev/ublkb0 is mounted on /mnt: `umount /mnt` first, or take the "
        "disk away with --force"
    )
    remove(links.resolve("vm"), force=True)


def test_open(add, used) -> None:
    used.people = [[f"process {n} (qemu)" for n in range(8)]]
    with pytest.raises(UbiError) as caught:
        remove(add())
    assert "open in process 0 (qemu), process 1 (qemu)" in caught.value.message
    assert "3 more" in caught.value.message


def test_open_for_a_moment_is_no_use(
    add, used, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(removal, "_OPENER_PATIENCE_S", 60.0)
    used.people = [["process 1 (blkid)"], ["process 1 (blkid)"], []]
    remove(add())
    assert gone(tmp_path)


def test_dead_and_mounted(add, used) -> None:
    used.user = User("/dev/ublkb0 is mounted on /mnt", "`umount /mnt` first")
    FakeControl.devices[0] = (12345, None)
    device = kill(add())
    with pytest.raises(UbiError, match="is mounted on /mnt"):
        remove(device)
    assert FakeControl.deleted == []
    remove(links.resolve("vm"), force=True)
    assert FakeControl.deleted == [0]


def test_a_process_that_may_use_it(add, used) -> None:
    device = add()
    used.people = [["process 7 (vhost)"]]
    removal.refuse_if_used(device, but=7)
    used.people = [["process 7 (vhost)", "process 8 (dd)"]]
    with pytest.raises(UbiError, match=r"open in process 8 \(dd\): close it first"):
        removal.refuse_if_used(device, but=7)
    # Where that is not the one which has it, who is left may be: nobody can tell.
    used.people = [["process 8 (vhost)"]]
    removal.refuse_if_used(device, but=7)


def test_users_of_what_is_no_block_device() -> None:
    assert removal.user_of("/dev/null") is None
    assert removal.user_of("/nowhere") is None
