"""Names and folders: real processes that race, die and leave things behind; hostile contents."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ublk_ubi import runtime
from ublk_ubi.errors import Exit, UbiError
from ublk_ubi.options import DeviceOptions
from ublk_ubi.runtime import State

CHECKOUT = Path(__file__).resolve().parents[2]
RACERS = 50

# Claims a name, says which, and holds it until its standard input ends.
HOLDER = """
import sys
from ublk_ubi import runtime
from ublk_ubi.errors import UbiError
name, state = (sys.argv[1] or None), sys.argv[2:]
try:
    claim = runtime.claim(name)
except UbiError as error:
    print("refused", int(error.code), error.message, flush=True)
    sys.exit()
if state:
    claim.write_state(runtime.State(image="/i", base=state[0], id=int(state[1])))
print(claim.name, flush=True)
ending = sys.stdin.read()
if ending.strip() == "release":
    claim.release()
"""


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "run"
    monkeypatch.setenv("UBLK_UBI_RUN", str(path))
    monkeypatch.setenv("UBLK_UBI_DEV", str(tmp_path / "dev"))
    (tmp_path / "dev").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    return path


class Holder:
    """A process that holds a claim."""

    def __init__(self, name: str | None = None, *state: str, wait: bool = True) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, name or "", *state],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        self.said = self.listen() if wait else ""

    def listen(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self, word: str = "") -> None:
        self.process.communicate(word)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def holders():
    made: list[Holder] = []

    def make(*args: str | None, **kwargs: bool) -> Holder:
        made.append(Holder(*args, **kwargs))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for holder in made:
        holder.kill()


# names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "0", "ubi0", "vm-1.disk_2", "A" * 64, "ublkb0"])
def test_names_that_can_be(name: str) -> None:
    assert runtime.check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "-a", "_a", "a/b", "a b", "a\n", "ä", "A" * 65, "a\0", "²"],
)
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(UbiError, match="cannot be a name") as caught:
        runtime.claim(name)
    assert caught.value.code == Exit.USAGE


# claiming ------------------------------------------------------------------------------------


def test_fifty_processes_get_fifty_names(holders) -> None:
    racing = [holders(wait=False) for _ in range(RACERS)]
    names = {holder.listen() for holder in racing}
    assert names == {f"ubi{number}" for number in range(RACERS)}
    assert len(runtime.all_devices()) == RACERS


def test_fifty_processes_want_one_name(holders) -> None:
    racing = [holders("vm", wait=False) for _ in range(RACERS)]
    said = sorted(holder.listen() for holder in racing)
    assert said.count("vm") == 1
    refused = [line for line in said if line != "vm"]
    assert len(refused) == RACERS - 1
    assert all(line.startswith(f"refused {int(Exit.BUSY)} the name 'vm' is in") for line in refused)


def test_claim_and_release_race_over_one_name(root: Path) -> None:
    """Folder and lock come and go under the claimers' hands; two never have the name at once."""
    code = """
import os, sys, time
from ublk_ubi import runtime
from ublk_ubi.errors import UbiError
wins = 0
flag = os.environ["UBLK_UBI_RUN"] + ".held"
end = time.monotonic() + 1.0
while time.monotonic() < end:
    try:
        claim = runtime.claim("vm")
    except UbiError:
        continue
    os.close(os.open(flag, os.O_CREAT | os.O_EXCL))  # fails if another is in here
    wins += 1
    os.unlink(flag)
    claim.release()
print(wins)
"""
    racing = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    wins = [int(process.communicate()[0]) for process in racing]
    assert [process.returncode for process in racing] == [0] * 8
    assert sum(wins) > 8
    assert not (root / "vm").exists()


def test_asking_never_disturbs_claiming(holders) -> None:
    """`list` in a loop must not make a name look taken."""
    looking = subprocess.Popen(
        [sys.executable, "-c", "from ublk_ubi import runtime\nwhile 1: runtime.all_devices()"],
    )
    try:
        time.sleep(0.2)
        for _ in range(200):
            claim = runtime.claim("vm")
            claim.abandon()
    finally:
        looking.kill()
        looking.wait()


def test_lowest_free_number() -> None:
    claims = [runtime.claim() for _ in range(3)]
    assert [claim.name for claim in claims] == ["ubi0", "ubi1", "ubi2"]
    claims[1].release()
    again = runtime.claim()
    assert again.name == "ubi1"


def test_release_leaves_nothing(root: Path) -> None:
    claim = runtime.claim("vm")
    claim.write_state(State(image="/i", base="/b", id=3))
    claim.write_options(DeviceOptions(image="/i", base="/b"))
    assert json.loads((root / "vm/options.json").read_text()) == {"image": "/i", "base": "/b"}
    assert (root / "vm").stat().st_mode & 0o777 == 0o700
    for file in (root / "vm").iterdir():
        assert file.stat().st_mode & 0o777 == 0o600, file
    claim.release()
    assert list(root.iterdir()) == []
    assert runtime.claim("vm").previous is None


@pytest.mark.parametrize("state", [b"", b"{"], ids=["none", "some"])
def test_who_gives_up_leaves_what_a_dead_daemon_left(root: Path, state: bytes) -> None:
    """… whatever that is."""
    runtime.claim("vm").abandon()
    if state:
        (root / "vm" / "state.json").write_bytes(state)
    runtime.claim("vm").give_up()
    assert (root / "vm").exists() == bool(state)
    assert not state or (root / "vm" / "state.json").read_bytes() == state
    runtime.claim("vm").release()


def test_killed_holder_frees_the_name_and_leaves_its_state(holders) -> None:
    holder = holders("vm", "/b", "7")
    device = runtime.all_devices()[0]
    assert (device.alive, device.starting, device.pid) == (True, False, holder.process.pid)
    with pytest.raises(UbiError, match="in use by a running device"):
        runtime.claim("vm")
    holder.kill()
    device = runtime.all_devices()[0]
    assert not device.alive
    assert device.state is not None
    assert device.state.id == 7
    claim = runtime.claim("vm")
    assert claim.previous is not None
    assert (claim.previous.id, claim.previous.base) == (7, "/b")
    assert claim.previous.pid == holder.process.pid
    assert runtime.all_devices()[0].starting  # the state there is a dead one's
    claim.abandon()
    again = runtime.claim("vm")  # dying before the first state loses nothing
    assert again.previous == claim.previous


def test_a_dead_devices_name_is_not_given_to_another(holders) -> None:
    holders(None, "/b0", "0").kill()
    holders(None).kill()  # died before it had a device: its name is free
    assert runtime.claim().name == "ubi1"
    assert runtime.claim(base="/other").name == "ubi2"
    assert runtime.claim(base="/b0").name == "ubi0"


def test_a_stopped_holder_is_alive(holders) -> None:
    holder = holders("vm", "/b", "0")
    holder.process.send_signal(signal.SIGSTOP)
    assert runtime.all_devices()[0].alive
    holder.process.send_signal(signal.SIGCONT)


def test_holder_of_a_base(holders) -> None:
    claim = runtime.claim("vm")
    claim.write_state(State(image="/i", base="/b", base_identity=(True, 5, 9)))
    assert runtime.holder_of((True, 5, 9)) == "vm"
    assert runtime.holder_of((True, 5, 8)) is None
    claim.abandon()
    assert runtime.holder_of((True, 5, 9)) is None


def test_state_is_never_seen_half_written() -> None:
    claim = runtime.claim("vm")
    claim.write_state(State(image="/i", base="/b", id=0))
    code = """
from ublk_ubi import runtime
import sys
for _ in range(2000):
    device = runtime.all_devices()[0]
    assert device.state is not None and device.problem is None, device
"""
    reader = subprocess.Popen([sys.executable, "-c", code])
    while reader.poll() is None:
        claim.write_state(State(image="/i" * 200, base="/b" * 300, id=1))
    assert reader.returncode == 0


def test_of_a_device_that_dies_while_it_is_looked_at_the_last_word_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It wrote that it leaves on purpose, and died, between our look at its state and its lock."""
    claim = runtime.claim("vm1", base="/b")
    claim.write_state(State(image="/i", base="/b", id=0, recoverable=True))
    is_locked = runtime._is_locked

    def die_first(fd: int) -> bool:
        claim.write_state(State(image="/i", base="/b", id=0, recoverable=True, left=True))
        claim.abandon()
        return is_locked(fd)

    monkeypatch.setattr(runtime, "_is_locked", die_first)
    device = runtime.all_devices()[0]
    assert not device.alive
    assert device.state is not None
    assert device.state.left


def test_names_are_sorted_as_people_count() -> None:
    for name in ("ubi10", "ubi2", "a", "10", "9"):
        runtime.claim(name)
    assert [d.name for d in runtime.all_devices()] == ["9", "10", "a", "ubi2", "ubi10"]


# logs and tables -----------------------------------------------------------------------------


def test_log_without_a_name_gets_its_place(root: Path) -> None:
    log = runtime.open_log()
    os.write(log, b"early\n")
    assert list(root.iterdir()) == []
    claim = runtime.claim("vm")
    (root / "vm/log").write_text("of a dead daemon")
    claim.adopt_log(log)
    assert (root / "vm/log").read_text() == "early\n"
    runtime.discard_log(log)
    assert (root / "vm/log").exists()


def test_log_where_files_need_names(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY | os.O_EXCL)  # opens no file
    log = runtime.open_log()
    assert [path.name[:5] for path in root.iterdir()] == [".log-"]
    claim = runtime.claim("vm")
    claim.adopt_log(log)
    assert (root / "vm/log").exists()
    runtime.discard_log(log)
    assert [path.name for path in root.iterdir()] == ["vm"]
    runtime.discard_log(runtime.open_log())
    assert [path.name for path in root.iterdir()] == ["vm"]


def test_tables_folder_is_no_device(root: Path) -> None:
    assert runtime.tables_dir() == str(root / ".tables")
    assert (root / ".tables").stat().st_mode & 0o777 == 0o700
    assert runtime.tables_dir() == str(root / ".tables")
    assert runtime.all_devices() == []


# hostile contents ----------------------------------------------------------------------------


HOSTILE = {
    "garbage": lambda f: (f / "state.json").write_bytes(b"\xff\0{{{"),
    "empty": lambda f: (f / "state.json").touch(),
    "other json": lambda f: (f / "state.json").write_text("[1,2]"),
    "wrong types": lambda f: (f / "state.json").write_text('{"image":1,"base":[]}'),
    "deep": lambda f: (f / "state.json").write_text("[" * 100_000),
    "dangling link": lambda f: (f / "state.json").symlink_to("/nowhere"),
    "link": lambda f: (f / "state.json").symlink_to("/etc/passwd"),
    "fifo": lambda f: os.mkfifo(f / "state.json"),
    "folder": lambda f: (f / "state.json").mkdir(),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_state_is_a_problem_and_no_more(root: Path, kind: str) -> None:
    runtime.claim("vm").abandon()
    HOSTILE[kind](root / "vm")
    (device,) = runtime.all_devices()
    assert device.state is None
    assert device.problem
    assert "state.json" in device.problem
    assert "\n" not in device.problem
    assert not device.alive
    claim = runtime.claim("vm")
    assert claim.previous is None
    if kind != "folder":
        claim.write_state(State(image="/i", base="/b"))
        assert runtime.all_devices()[0].state is not None
    claim.abandon()


def test_default_name_passes_over_what_cannot_be_used(root: Path) -> None:
    root.mkdir(mode=0o700)
    (root / "ubi0").write_text("a file")
    (root / "ubi1").symlink_to("/etc")
    (root / "ubi2").mkdir(mode=0o700)
    (root / "ubi2/lock").symlink_to("/etc/passwd")
    (root / "ubi3").mkdir(mode=0o700)
    os.mkfifo(root / "ubi3/lock")
    (root / "ubi4").mkdir(mode=0o777)
    (root / "ubi4").chmod(0o777)
    (root / "ubi5").mkdir(mode=0o700)
    (root / "ubi5/state.json").write_text("garbage of a dead daemon")
    before = Path("/etc/passwd").read_bytes()
    assert runtime.claim().name == "ubi6"
    assert Path("/etc/passwd").read_bytes() == before


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: p.write_text(""), "not a folder of ours"),
        (lambda p: p.symlink_to("/etc"), "not a folder of ours"),
        (lambda p: p.symlink_to("/nowhere"), "not a folder of ours"),
        (lambda p: (p.mkdir(), (p / "lock").mkdir()), "lock"),
        (lambda p: (p.mkdir(), os.mkfifo(p / "lock")), "not a regular file"),
        (lambda p: (p.mkdir(), p.chmod(0o770)), "can be written by others"),
    ],
)
def test_a_name_that_cannot_be_used_is_one_line(root: Path, make, words: str) -> None:
    root.mkdir(mode=0o700)
    make(root / "vm")
    with pytest.raises(UbiError, match=words) as caught:
        runtime.claim("vm")
    assert "\n" not in caught.value.message
    runtime.all_devices()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
@pytest.mark.parametrize("name", ["vm", None])
def test_no_room_is_said_of_the_folder_that_has_none(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str | None,
) -> None:
    """A default name is not looked for 65,536 times."""
    held = runtime.claim("held")
    fds = os.listdir("/proc/self/fd")

    def full(_fd: int, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UbiError, match=f"{root} cannot be written: No space left.*df {root}`"):
        runtime.claim(name)
    with pytest.raises(UbiError, match=f"{root}/held/state.json cannot be written: No space"):
        held.write_state(State(image="/i", base="/b"))
    assert os.listdir("/proc/self/fd") == fds
    held.release()
    assert len(os.listdir(root)) <= 1


def test_another_users_folders(root: Path) -> None:
    runtime.claim("vm").abandon()
    os.chown(root / "vm", 65534, 65534)
    (device,) = runtime.all_devices()
    assert device.problem
    assert "belongs to uid 65534" in device.problem
    with pytest.raises(UbiError, match="belongs to uid 65534"):
        runtime.claim("vm")
    os.chown(root, 65534, 65534)
    for function in (runtime.all_devices, runtime.claim, runtime.tables_dir, runtime.open_log):
        with pytest.raises(UbiError, match="belongs to uid 65534, not to uid 0"):
            function()


def test_root_that_cannot_be(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime.all_devices() == []
    monkeypatch.setenv("UBLK_UBI_RUN", str(root / "a/b"))
    with pytest.raises(UbiError, match="parent folder does not exist"):
        runtime.claim()
    root.write_text("")
    monkeypatch.setenv("UBLK_UBI_RUN", str(root))
    with pytest.raises(UbiError, match="not a folder of ours"):
        runtime.all_devices()


def test_start_of_processes() -> None:
    start = runtime.process_start(os.getpid())
    assert start is not None
    assert start > 0
    gone = subprocess.Popen(["true"])
    while (after := runtime.process_start(gone.pid)) is not None:
        assert after >= start
    gone.wait()  # it was a zombie all the while
    assert runtime.process_start(gone.pid) is None
