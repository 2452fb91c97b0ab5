"""A daemon is shut in: it keeps nothing of the host but what its disk needs, and can do no more."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import shlex
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.device import CHECKOUT, RUN_ROOT
from support.guest import BLOCK, flush, read, write
from support.ondisk import DATA_OFFSET
from support.shell import run, until
from support.variant import Variant

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.device import Ubi
    from support.images import Image
    from support.stores import Stores
    from support.undo import Undo

pytestmark = pytest.mark.cpus(2)

MIB = 1 << 20
STRIPE = 64 << 10
SIZE = 8 * MIB
DAC_OVERRIDE, SYS_PTRACE, SYS_ADMIN = 1 << 1, 1 << 19, 1 << 21


@pytest.fixture
def image(make_image: Callable[..., Image]) -> Image:
    return make_image(SIZE)


def facts(status: Path) -> dict[str, int]:
    """The numbers of a task's status in /proc; sets of capabilities are hexadecimal."""
    pairs = re.findall(r"^(\w+):\t([0-9a-f]+)$", status.read_text(), re.MULTILINE)
    return {name: int(value, 16 if name.startswith("Cap") else 10) for name, value in pairs
            if name.startswith("Cap") or value.isdigit()}


def tasks(pid: int) -> dict[str, list[dict[str, int]]]:
    """The facts of a process's threads, by their names."""
    found: dict[str, list[dict[str, int]]] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):      # it may end meanwhile
            name = (task / "comm").read_text().strip()
            found.setdefault(name, []).append(facts(task / "status"))
    return found


def helpers(pid: int) -> list[int]:
    """The processes in a daemon's mount namespace, but itself."""
    own = os.stat(f"/proc/{pid}/ns/mnt").st_ino
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and os.stat(entry / "ns/mnt").st_ino == own:
                found.append(int(entry.name))
    return sorted(set(found) - {pid})


def is_free(node: str) -> bool:
    """Whether nothing has a block device: no filesystem in any namespace, no daemon."""
    try:
        os.close(os.open(node, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        assert error.errno == errno.EBUSY, error
        return False
    return True


# -- what it has -------------------------------------------------------------------------------

def test_what_a_daemon_can_do(ubi: Ubi, image: Image, make_base: Callable[..., str]) -> None:
    device = ubi.add(image, make_base(SIZE), stripe_size=STRIPE, queues=2)
    threads = tasks(device.pid)
    for name, found in threads.items():
        if name.startswith("iou-wrk"):
            continue                            # the kernel's own, with what its thread has
        for task in found:
            mine = 0 if name.startswith("ubi-") else DAC_OVERRIDE
            assert task["CapEff"] == task["CapPrm"] == mine, name
            assert (task["CapInh"], task["CapAmb"]) == (0, 0), name
            assert (task["NoNewPrivs"], task["Seccomp"]) == (1, 2), name
    assert {"ubi-hydrator", "ubi-queue-0", "ubi-queue-1"} <= set(threads)
    main = facts(Path(f"/proc/{device.pid}/status"))
    assert main["CapBnd"] == DAC_OVERRIDE
    # glibc would look for it at a thread's end, where no library is to be found any more.
    assert "/libgcc_s.so" in Path(f"/proc/{device.pid}/maps").read_text()
    assert len(helpers(device.pid)) == 2
    for helper in helpers(device.pid):
        found = facts(Path(f"/proc/{helper}/status"))
        assert found["CapEff"] == found["CapPrm"] == found["CapBnd"] == SYS_ADMIN | SYS_PTRACE
        assert (found["NoNewPrivs"], found["Seccomp"]) == (1, 2)

    assert Path(f"/proc/{device.pid}/oom_score_adj").read_text() == "-1000\n"
    assert resource.prlimit(device.pid, resource.RLIMIT_NOFILE) == (1024, 1024)
    sizes = dict(re.findall(r"^(Vm\w+):\s+(\d+) kB$",
                            Path(f"/proc/{device.pid}/status").read_text(), re.MULTILINE))
    assert int(sizes["VmLck"]) > int(sizes["VmRSS"]) // 2

    assert device.status()["sandbox"] == {
        "root": True, "capabilities": ["CAP_DAC_OVERRIDE"], "seccomp": True, "helper": True,
        "memory_locked": True, "oom_score_adj": -1000,
    }
    shown = ubi.command("status", device.name)
    assert (shown.code, "sandbox" in shown.stdout) == (0, False)
    assert "goes on without" not in device.log()


def test_what_a_daemon_sees_and_holds(
    ubi: Ubi, image: Image, make_base: Callable[..., str],
) -> None:
    """Its root has no program and no file of the host; nothing came along from who started it."""
    lost, unmeant = os.pipe()
    os.set_inheritable(unmeant, True)
    device = ubi.add(image, make_base(SIZE), stripe_size=STRIPE)
    os.close(lost)
    os.close(unmeant)
    root = Path(f"/proc/{device.pid}/root")
    assert {entry.name for entry in root.iterdir()} == {"dev", "new", "proc", "run"}
    assert {entry.name for entry in (root / "dev").iterdir()} == {
        f"ublkb{device.id}", f"ublkc{device.id}", "ublk-ubi",
    }
    assert [entry.name for entry in (root / "run").iterdir()] == ["ublk-ubi"]
    assert not (root / "proc/sys").exists()
    mounts = Path(f"/proc/{device.pid}/mountinfo").read_text().splitlines()
    assert len(mounts) == 7, mounts
    assert not any(" shared:" in line for line in mounts), "nothing goes back to the host"
    with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
        (root / "file").touch()

    kinds = (
        r"/dev/null$", r"(/dev)?/ublkc\d+$", r"socket:", r"pipe:",
        r"anon_inode:\[(io_uring|event|pidfd)",
        rf"{re.escape(str(RUN_ROOT))}(/|$)", re.escape(image.path),
        # The base got its name late.
        rf"{re.escape(os.path.dirname(device.options['base']))}/(base$|#\d+ \(deleted\)$)",
    )
    held = []
    for fd in Path(f"/proc/{device.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a request's, which has ended
            held.append(os.readlink(fd))
    assert [path for path in held if not re.match("|".join(kinds), path)] == []
    assert len(held) < 40

    modes = {}
    for entry in (RUN_ROOT, *RUN_ROOT.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # one that is about to be renamed
            modes[entry] = stat.S_IMODE(entry.lstat().st_mode)
    assert {path: oct(mode) for path, mode in modes.items()
            if mode != (0o700 if path.is_dir() else 0o600)} == {}
    assert stat.S_IMODE(os.stat("/dev/ublk-ubi").st_mode) == 0o755


def test_it_goes_on_with_what_a_kernel_grants(
    ubi: Ubi, image: Image, make_base: Callable[..., str], tmp_path: Path,
) -> None:
    """Refused all of it: each is told once, and the disk is as good as any."""
    variant = Variant(tmp_path / "variant")
    refuse = "raise OSError(1, 'Operation not permitted')"
    for file, text in (
        ("minimal_root.py", "calls.unshare(calls.CLONE_NEWNS)"),
        ("hygiene.py", "calls.mlockall(calls.MCL_CURRENT"),
        ("capabilities.py", "calls.prctl(calls.PR_SET_NO_NEW_PRIVS, 1)"),
        ("seccomp.py", "refused = kernel_calls.set_filter("),
    ):
        variant.replace(file, text, f"{refuse}\n    {text}" if file != "minimal_root.py"
                        else f"{refuse}\n        {text}")
    with variant.in_use():
        device = ubi.add(image, make_base(SIZE), stripe_size=STRIPE)
        write(device, 0, b"w" * BLOCK)
        flush(device)
        assert device.status()["sandbox"] == {
            "root": False, "capabilities": None, "seccomp": False, "helper": False,
            "memory_locked": False, "oom_score_adj": -1000,
        }
        shown = ubi.command("status", device.name)
        assert (shown.code, "without a minimal root" in shown.stdout) == (0, True)
        lines = [line for line in device.log().splitlines() if "goes on without" in line]
        assert len(lines) == len(set(lines)) == 5
        device.reopen()
        assert read(device, 0) == b"w" * BLOCK


# -- what it lets go ------------------------------------------------------------------------------

def mounted(undo: Undo, node: str, point: Path) -> Path:
    """A filesystem of its own on a block device."""
    run("mkfs.ext4", "-q", "-F", node)
    point.mkdir()
    run("mount", node, point)
    undo.callback(lambda: run("umount", point) if os.path.ismount(point) else None)
    return point


def test_filesystems_can_be_unmounted(
    ubi: Ubi, stores: Stores, make_base: Callable[..., str], undo: Undo, tmp_path: Path, seed: int,
) -> None:
    """One that has nothing to do with the disk, and the image's when the base has all of it."""
    other_node, image_node = (stores.block("ram", 32 * MIB) for _ in range(2))
    other = mounted(undo, other_node, tmp_path / "other")
    images = mounted(undo, image_node, tmp_path / "images")
    content = os.urandom(4 * MIB)
    (images / "image").write_bytes(content)
    device = ubi.add(images / "image", make_base(SIZE), size=SIZE, stripe_size=STRIPE)
    write(device, 0, b"w" * BLOCK)

    run("umount", other)
    assert is_free(other_node), "it is unmounted, and not only out of sight"

    # What it still needs cannot be taken away by mistake.
    for point in (images, Path(device.options["base"]).parent):
        busy = subprocess.run(["umount", str(point)], capture_output=True, check=False)
        assert busy.returncode != 0, point
    device.hydrate(run=True)
    device.wait_until_independent()
    run("umount", images)
    assert is_free(image_node)
    assert read(device, BLOCK, 4 * MIB - BLOCK) == content[BLOCK:]


def test_the_namespace_it_was_started_in_ends(
    ubi: Ubi, image: Image, stores: Stores, make_base: Callable[..., str], tmp_path: Path,
) -> None:
    """… and with it what was mounted there, also the disk itself. Its user has gone."""
    node = stores.block("ram", 32 * MIB)
    run("mkfs.ext4", "-q", "-F", node)
    point = tmp_path / "point"
    point.mkdir()
    device = ubi.new(image, make_base(SIZE), size=64 * MIB)
    command = [
        sys.executable, "-m", "ublk_ubi", "add", "--name", device.name, "--image", image.path,
        "--size", str(64 * MIB), "--base", device.options["base"], "--no-recovery",
    ]
    link = f"/dev/ublk-ubi/{device.name}"
    script = f"""
        mount {node} {point}
        {shlex.join(command)}
        mkfs.ext4 -q -F {link}
        mkdir {point}/in
        mount {link} {point}/in
    """
    with contextlib.chdir(CHECKOUT):
        run("unshare", "--mount", "--propagation", "private", "sh", "-ec", script)
    state = (RUN_ROOT / device.name / "state.json").read_text()
    device.pid = int(re.search(r'"pid":(\d+)', state)[1])  # type: ignore[index]
    disk = re.search(r'"device":"([^"]+)"', state)[1]  # type: ignore[index]
    device.live = True
    until(lambda: is_free(node), "the namespace's own mounts are gone")
    until(lambda: is_free(disk), "the disk is mounted nowhere")
    gone = ubi.command("del", device.name)
    device.live = False
    assert gone.code == 0, gone


# -- what it must still do ------------------------------------------------------------------------

def test_it_takes_its_disk_back_from_within(
    ubi: Ubi, image: Image, stores: Stores, tmp_path: Path,
) -> None:
    """An upgrade has failed. Image and base are another user's, the base was made anew."""
    base = stores.folder("ext4") / "other's base"
    base.write_bytes(b"x" * BLOCK)
    os.truncate(base, DATA_OFFSET + SIZE)
    for path in (str(base), image.path):
        os.chown(path, 65534, 65534)
        os.chmod(path, 0o600)
    device = ubi.add(image, base, stripe_size=STRIPE, recovery=True, format=True)
    write(device, 3 * STRIPE, b"w" * BLOCK)
    pid = device.pid
    variant = Variant(tmp_path / "variant")
    variant.replace("session.py", "        self._ublkc = self.device.open_char()\n",
                    '        raise UbiError("planted")\n')
    for _ in range(2):
        with variant.in_use():
            outcome = ubi.command("upgrade", device.name)
        assert (outcome.code, "the old one goes on" in outcome.stderr) == (1, True), outcome
        until(lambda: ubi.command("status", device.name).code == 0, "the old daemon serves")
        assert device.status()["pid"] == pid
        assert read(device, 3 * STRIPE) == b"w" * BLOCK
        assert read(device, 0) == image.content[:BLOCK]
    assert device.status()["sandbox"]["seccomp"] is True
    grown = ubi.command("resize", device.name, 2 * SIZE)
    assert grown.code == 0, grown
    assert helpers(pid)
    device.options |= {"size": None, "format": False}
    device.reopen()
    assert read(device, 3 * STRIPE) == b"w" * BLOCK


def test_its_helpers_can_die(
    ubi: Ubi, image: Image, make_base: Callable[..., str],
) -> None:
    """One of two costs nothing, whichever it is: no program is there that could be run."""
    device = ubi.add(image, make_base(SIZE), stripe_size=STRIPE)
    for times, which in ((2, 0), (3, 1)):
        victim = helpers(device.pid)[which]
        os.kill(victim, signal.SIGKILL)
        until(lambda gone=victim: gone not in helpers(device.pid), "it has gone")
        grown = ubi.command("resize", device.name, times * SIZE)
        assert grown.code == 0, grown
        assert helpers(device.pid)
    for pid in helpers(device.pid):
        os.kill(pid, signal.SIGKILL)
    until(lambda: not helpers(device.pid), "they are gone")
    lost = ubi.command("resize", device.name, 4 * SIZE)
    assert (lost.code, "helper" in lost.stderr, lost.stderr.count("\n")) == (1, True, 1)
    write(device, 0, b"s" * BLOCK)
    assert read(device, 0) == b"s" * BLOCK
    # What it cannot do any more is done by who ends it.
    device.kill()


def test_who_has_it_open_is_seen_from_within(
    ubi: Ubi, image: Image, make_base: Callable[..., str],
) -> None:
    """Told to end, it leaves a disk that another process has open, and not exclusively."""
    device = ubi.add(image, make_base(SIZE), stripe_size=STRIPE, recovery=True)
    holder = subprocess.Popen(
        ["sh", "-c", f"exec 3<{device.node}; echo open; exec sleep 60"], stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        os.kill(device.pid, signal.SIGTERM)
        until(lambda: not device.running, "the daemon's end")
        device.live = False
        assert ubi.command("recover", device.name).code == 0
        device.pid = int((RUN_ROOT / device.name / "pid").read_text())
        device.live = True
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    os.kill(device.pid, signal.SIGTERM)
    until(lambda: not (RUN_ROOT / device.name).exists(), "nobody has it open: it is gone")
    device.live = False


def test_the_watch_is_not_to_be_killed_either(
    ubi: Ubi, image: Image, make_base: Callable[..., str],
) -> None:
    device = ubi.add(image, make_base(SIZE), recovery=True)

    def watch() -> int | None:
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and b"ublk_ubi.watch" in (entry / "cmdline").read_bytes():
                    return int(entry.name)
        return None

    pid = until(watch, "a watch")
    until(lambda: Path(f"/proc/{pid}/oom_score_adj").read_text() == "-1000\n", "it is protected")
    device.stop()
    assert (RUN_ROOT / ".watch.log").stat().st_mode & 0o777 == 0o600
