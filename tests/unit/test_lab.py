"""tools/lab: what it promises, seen from outside.

Each test calls the program as a user would and judges by what is on this machine afterwards. The
guest needs no ublk here: these are tests of the lab, not in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pty
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from labkit.kernel import cache_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ROOT = Path(__file__).resolve().parents[2]
LAB = (sys.executable, str(ROOT / "tools" / "lab"))
SECONDS = 60  # far more than any of these calls takes

pytestmark = pytest.mark.skipif(os.environ.get("LAB") == "1", reason="a lab in the lab")


def lab(
    *arguments: str | bytes | Path,
    env: Mapping[str, str] | Mapping[bytes, bytes] | None = None,
    cwd: Path | None = None,
    program: Sequence[str] = LAB,
) -> subprocess.CompletedProcess[bytes]:
    """Call tools/lab and catch its output; `env` comes on top of this process's."""
    more = {os.fsencode(name): os.fsencode(value) for name, value in (env or {}).items()}
    return subprocess.run(
        [*program, *arguments],
        env={**os.environb, **more},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=SECONDS,
        check=False,
    )


def start(
    *arguments: str | Path, env: Mapping[str, str] | None = None, stderr: int | None = None
) -> subprocess.Popen[bytes]:
    """Start tools/lab with a pipe for its stdout."""
    return subprocess.Popen(
        [*LAB, *arguments],
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
    )


def sh(
    script: str,
    *options: str | Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run a shell script in the lab."""
    return lab(*options, "--", "sh", "-c", script, env=env, cwd=cwd)


def out(result: subprocess.CompletedProcess[bytes]) -> str:
    """Return stdout of a call that went well and had nothing to say on stderr."""
    assert (result.returncode, result.stderr) == (0, b"")
    return result.stdout.decode()


@pytest.fixture(scope="session", autouse=True)
def built() -> None:
    """Build kernel and init, if there are none, outside of any test's time limit and output."""
    subprocess.run([*LAB, "--", "true"], stdin=subprocess.DEVNULL, check=True)


@pytest.fixture
def temporary(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Make the lab put its temporary folders where they can be counted; none may be left."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    yield {"TMPDIR": str(folder)}
    assert list(folder.iterdir()) == []


def processes(marker: str) -> list[str]:
    """List the command lines on this machine that have the marker."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if marker in line and path.parent.name != str(os.getpid()):
                found.append(line)
    return found


def await_no_processes(marker: str) -> None:
    """Fail if processes with the marker are still there after a moment."""
    deadline = time.monotonic() + 5
    while left := processes(marker):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


# -- what passes through ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 0", 0), ("exit 7", 7), ("exit 255", 255), ("kill -9 $$", 137), ("kill -TERM $$", 143)],
)
def test_exit_status(script: str, status: int, temporary: dict[str, str]) -> None:
    result = sh(script, env=temporary)
    assert (result.returncode, result.stdout, result.stderr) == (status, b"", b"")


def test_a_cached_call_is_quick(temporary: dict[str, str]) -> None:
    took = []
    for _ in range(3):  # other work on this machine may slow one down
        started = time.monotonic()
        assert out(lab("--", "true", env=temporary)) == ""
        took.append(time.monotonic() - started)
        if took[-1] < 5:
            return
    pytest.fail(f"took {took}")


@pytest.mark.parametrize(("command", "status"), [("nosuch-command", 127), ("/etc/passwd", 126)])
def test_what_cannot_be_run(command: str, status: int) -> None:
    result = lab("--", command)
    assert (result.returncode, result.stdout) == (status, b"")
    assert result.stderr.startswith(b"lab: cannot run %s: " % command.encode())
    assert result.stderr.count(b"\n") == 1


def test_stdout_and_stderr_are_apart_and_binary_clean(tmp_path: Path) -> None:
    every = bytes(range(256)) * 600 + b"\r\n\n\r\x04\x00\xff no end of line"
    (tmp_path / "every").write_bytes(every)
    result = sh("cat every; cat every every >&2", cwd=tmp_path)
    assert result.returncode == 0
    assert result.stdout == every
    assert result.stderr == every * 2


def test_a_large_output_arrives_whole(tmp_path: Path) -> None:
    megabytes = 24
    script = f"head -c {megabytes}M /dev/urandom >/tmp/x; sha256sum </tmp/x >&2; cat /tmp/x"
    with (tmp_path / "out").open("wb") as target:
        result = subprocess.run(
            [*LAB, "--", "sh", "-c", script],
            stdout=target,
            stderr=subprocess.PIPE,
            timeout=SECONDS,
            check=True,
        )
    data = (tmp_path / "out").read_bytes()
    assert len(data) == megabytes << 20
    assert hashlib.sha256(data).hexdigest().encode() == result.stderr.split()[0]


def test_a_slow_reader_loses_nothing() -> None:
    script = "seq 200000; echo done >&2"
    with start("--", "sh", "-c", script, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        time.sleep(1.5)
        lines = process.stdout.read().split()
        assert process.stderr.read() == b"done\n"
    assert process.returncode == 0
    assert lines == [b"%d" % n for n in range(1, 200001)]


def test_what_is_under_way_when_the_command_ends_arrives() -> None:
    """So much that every pipe on the way is full, and COMMAND has gone before it can be read."""
    script = "head -c 500000 /dev/zero; head -c 500000 /dev/zero >&2"
    with start("--", "sh", "-c", script, stderr=subprocess.PIPE) as process:
        time.sleep(1.2)
        assert [len(data) for data in process.communicate()] == [500000, 500000]
    assert process.returncode == 0


def test_output_streams_while_the_command_runs(tmp_path: Path) -> None:
    script = "echo first; until [ -e $LAB_SCRATCH/go ]; do sleep 0.05; done; echo second"
    options = ("--timeout", str(SECONDS), "--scratch", tmp_path)
    with start(*options, "--", "sh", "-c", script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"first\n"
        (tmp_path / "go").touch()
        assert process.stdout.readline() == b"second\n"
    assert process.returncode == 0


def test_a_daemon_left_behind_holds_nothing_up() -> None:
    started = time.monotonic()
    assert out(sh("sleep 500 & echo gone")) == "gone\n"
    assert time.monotonic() - started < SECONDS / 2


def test_arguments_and_environment_survive() -> None:
    rng = random.Random(7)
    odd = [
        "",
        " ",
        "a b",
        "'",
        '"',
        "$HOME `x` \\",
        "\n\n",
        "*",
        "--",
        "-- x",
        "ä€😀",
        "\x01\x7f\t",
    ]
    odd += ["".join(chr(rng.randrange(1, 128)) for _ in range(50)) for _ in range(20)]
    words = [word.encode() for word in odd] + [bytes(range(1, 256))]
    values = {f"ODD_{n}".encode(): word for n, word in enumerate(words)}
    values |= {b"ODD.name-with%s": b"x", b"EMPTY_ODD_": b""}
    script = """
import os, sys
odd = [name + b"=" + value for name, value in os.environb.items() if b"ODD" in name]
for part in (map(os.fsencode, sys.argv[1:]), [b"", b""], sorted(odd)):
    for word in part:
        sys.stdout.buffer.write(word + bytes(1))
"""
    result = lab("--", sys.executable, "-c", script, *words, env=values)
    assert result.returncode == 0, result.stderr
    arguments, _, environment = result.stdout.partition(b"\0\0\0")
    assert arguments == b"\0".join(words)
    expected = sorted(key + b"=" + value for key, value in values.items())
    assert environment.rstrip(b"\0").split(b"\0") == expected


def test_a_terminal_is_one_in_the_guest_too() -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [*LAB, "--", "sh", "-c", TERMINAL_SCRIPT])
    seen = b""
    with contextlib.suppress(OSError):  # EIO: the end
        while select.select([terminal], [], [], SECONDS)[0]:
            seen += os.read(terminal, 4096)
            if b"ready" in seen and b"got" not in seen and b"typed" not in seen:
                os.write(terminal, b"typed\n")
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
    assert b"ready\r\n" in seen
    assert b"got typed\r\n" in seen


TERMINAL_SCRIPT = (
    "test -t 0 && test -t 1 && test -t 2 && echo ready && read x && echo got $x; exit 5"
)


# -- the machine that the command sees ------------------------------------------------------------


def test_the_guest_is_what_was_asked_for(temporary: dict[str, str]) -> None:
    script = """
        id -u; nproc; hostname; pwd; echo $LAB $DM_DISABLE_UDEV "$LAB_DISKS"; ulimit -c
        for d in $LAB_DISKS; do cat /sys/block/${d##*/}/size; done
        awk '$1 == "MemTotal:" {print ($2 > 900000 && $2 < 1048576)}' /proc/meminfo
        cat /sys/class/net/lo/operstate; test -c /dev/ublk-control && echo ublk
        for m in /proc /sys /dev /dev/pts /dev/shm /sys/kernel/debug /sys/kernel/config \
            /sys/fs/cgroup /run /tmp /var/tmp /mnt; do mountpoint -q $m || echo no $m; done
        for d in $LAB_DISKS; do od -An -N8 -td8 $d | tr -d ' '; echo written >$d; done
        head -c 8 /dev/ubdb; readlink /proc/self/fd/0
    """
    options = ("--cpus", "3", "--mem", "1G", "--disk", "8M", "--disk", "3G", "--disk", "512")
    lines = out(sh(script, *options, env=temporary, cwd=Path("/usr/bin"))).splitlines()
    assert lines == [
        *("0", "3", "lab", "/usr/bin", "1 1 /dev/ubda /dev/ubdb /dev/ubdc", "0"),
        *("16384", "6291456", "1", "1", "unknown", "ublk", "0", "0", "0"),
        *("written", "/dev/null"),
    ]


# Root in the guest tries all it can. Arguments: the files to harm.
ATTACK = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
RDONLY, REMOUNT, BIND = 1, 32, 4096

def mount(source, target, kind, flags, data):
    os.makedirs(target, exist_ok=True)
    done = libc.mount(source.encode(), target.encode(), kind.encode(), flags, data.encode()) == 0
    print("mount", source, target, flags, data, done)

def attempt(harm, *arguments):
    try:
        harm(*arguments)
    except OSError as error:
        refusals.add(error.strerror)
    else:
        print("DONE", harm, arguments)

def write(path, flags):
    os.write(os.open(path, flags, 0o644), b"bad")

def attack(root):
    for path in [root + path for path in sys.argv[1:]]:
        for flags in (os.O_WRONLY, os.O_RDWR | os.O_CREAT, os.O_WRONLY | os.O_TRUNC):
            attempt(write, path, flags)
        attempt(os.truncate, path, 0)
        attempt(os.chmod, path, 0o777)
        attempt(os.utime, path, (1, 1))
        attempt(os.rename, path, path + ".moved")
        attempt(os.link, path, path + ".linked")
        attempt(os.symlink, "x", path + ".link")
        attempt(os.mkdir, path + ".folder")
        attempt(os.mknod, path + ".fifo")
        attempt(os.unlink, path)

refusals = set()
attack("")
mount("", "/", "", REMOUNT, "")
attack("")
mount("", "/", "", REMOUNT | BIND, "")
attack("")
mount("/", "/tmp/bind", "", BIND, "")
mount("", "/tmp/bind", "", REMOUNT | BIND, "")
attack("/tmp/bind")
first = "/proc/1/"
for n, host in enumerate(("/", first + "root" + "/", first + "cwd/../..", "/proc/self/cwd/", "..")):
    mount("none", f"/tmp/{n}", "hostfs", 0, host)
    mount("", f"/tmp/{n}", "", REMOUNT, "")
    attack(f"/tmp/{n}")
attempt(write, "/tmp/0/proc/sys/kernel/domainname", os.O_WRONLY)
attempt(write, "/tmp/0/dev/shm/written-by-the-lab", os.O_WRONLY | os.O_CREAT)
print(sorted(refusals))
"""


def test_the_machines_files_are_read_only(tmp_path: Path, temporary: dict[str, str]) -> None:
    """The judge is the host's own disk."""
    victims = [ROOT / "written-by-the-lab", Path("/etc/written-by-the-lab"), tmp_path / "victim"]
    (tmp_path / "victim").write_bytes(b"as it was")
    before = (tmp_path / "victim").stat()
    domain = Path("/proc/sys/kernel/domainname").read_text()
    text = out(lab("--show", tmp_path, "--", sys.executable, "-c", ATTACK, *victims, env=temporary))
    # The guest did get its mounts: what stopped it was not the lack of them.
    assert "mount none /tmp/0 0 / True" in text
    assert "mount  / 32  True" in text
    assert "DONE" not in text
    assert "Read-only file system" in text.splitlines()[-1]
    assert (tmp_path / "victim").read_bytes() == b"as it was"
    after = (tmp_path / "victim").stat()
    assert (before.st_mode, before.st_mtime_ns) == (after.st_mode, after.st_mtime_ns)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["temporary", "victim"]
    for folder in (ROOT, Path("/etc"), Path("/dev/shm")):
        assert [path for path in folder.iterdir() if "written-by-the-lab" in path.name] == []
    assert Path("/proc/sys/kernel/domainname").read_text() == domain


def test_scratch_is_the_hosts_own_folder(tmp_path: Path, temporary: dict[str, str]) -> None:
    scratch = tmp_path / "the scratch, of 'mine'"
    scratch.mkdir()
    (scratch / "before").write_text("from the host")
    script = """
        cat "$LAB_SCRATCH/before"; cd "$LAB_SCRATCH" && mkdir sub && ln -s before sub/link &&
        head -c 3M /dev/zero >sub/big && echo from the guest >sub/file && chmod 640 sub/file && pwd
    """
    assert out(sh(script, "--scratch", scratch, env=temporary)) == f"from the host{scratch}\n"
    assert (scratch / "sub/file").read_text() == "from the guest\n"
    assert (scratch / "sub/file").stat().st_mode & 0o777 == 0o640
    assert (scratch / "sub/big").read_bytes() == bytes(3 << 20)
    assert os.readlink(scratch / "sub/link") == "before"


def test_keep_keeps_scratch_disks_and_console(tmp_path: Path) -> None:
    script = "echo kept >$LAB_SCRATCH/file; echo on-disk >/dev/ubda; sync; echo hey >/dev/kmsg"
    result = sh(script, "--keep", "--disk", "1M", env={"TMPDIR": str(tmp_path)})
    assert result.returncode == 0
    (folder,) = tmp_path.iterdir()
    assert result.stderr.decode() == f"lab: kept: {folder}\n"
    assert (folder / "scratch/file").read_text() == "kept\n"
    assert (folder / "disks/disk0").read_bytes()[:8] == b"on-disk\n"
    assert "] hey" in (folder / "console.log").read_text()
    assert (folder / "console.log").read_bytes() == (folder / "scratch/dmesg").read_bytes()


def test_a_checkout_and_a_current_folder_beneath_tmp(tmp_path: Path) -> None:
    """A fresh clone in /tmp is tried out there: tmpfs on /tmp must not hide it."""
    clone = tmp_path / "real" / "clone, fresh"
    shutil.copytree(ROOT / "tools", clone / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    (clone / "file").write_text("in the clone")
    here = tmp_path / "elsewhere" / "here"
    here.mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "other").touch()
    seen = tmp_path / "link" / clone.name
    venv = seen / "venv"
    venv.mkdir()
    script = f"""
        cat "{clone}/file"; pwd; ls -a
        cat "{seen}/file"; test -d "$VIRTUAL_ENV" || echo no venv
        touch here; echo bad >"{clone}/file"
        echo x >"$LAB_SCRATCH/x"; echo rw >/tmp/rw; cat /tmp/rw; ls "{tmp_path}"
    """
    program = (sys.executable, str(seen / "tools" / "lab"))
    command = ("--", "sh", "-c", script)
    result = lab(*command, cwd=here, env={"VIRTUAL_ENV": str(venv)}, program=program)
    assert result.returncode == 0
    lines = result.stdout.decode().splitlines()
    assert lines[0] == f"in the clone{here}"
    assert lines[1:] == [".", "..", "in the clonerw", "elsewhere", "link", "real"]
    assert result.stderr.count(b"Read-only file system") == 2
    assert (clone / "file").read_text() == "in the clone"
    assert list(here.iterdir()) == []


def test_two_guests_at_once(tmp_path: Path, temporary: dict[str, str]) -> None:
    """Each waits until the other has shown up on the host, so both run at the same time."""
    script = """
        echo $1 >/dev/ubda; echo $1 >/tmp/mine; echo $1 >"$LAB_SCRATCH/here"
        until [ -e $2/go ]; do sleep 0.05; done
        head -c 4 /dev/ubda; cat /tmp/mine "$LAB_SCRATCH/here"; ls "$LAB_SCRATCH"
    """
    running = []
    for name in ("one", "two"):
        other = tmp_path / name
        other.mkdir()
        options = ("--mem", "512M", "--disk", "1M", "--scratch", other)
        running.append(start(*options, "--", "sh", "-c", script, "sh", name, other, env=temporary))
    deadline = time.monotonic() + SECONDS
    while not all((tmp_path / name / "here").exists() for name in ("one", "two")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for name in ("one", "two"):
        (tmp_path / name / "go").touch()
    results = [process.communicate(timeout=SECONDS)[0].split() for process in running]
    assert results == [[n, n, n, b"go", b"here"] for n in (b"one", b"two")]


# -- how it ends -----------------------------------------------------------------------------------


def test_the_time_limit(temporary: dict[str, str]) -> None:
    for limit in (4.5, 30):  # on a busy machine the start alone takes the first
        started = time.monotonic()
        result = sh("echo so far; exec sleep 1234", "--timeout", str(limit), env=temporary)
        assert limit <= time.monotonic() - started < limit + 15.5
        assert result.returncode == 124
        told = f"lab: ended after {limit:g} s, the time limit (--timeout)\n"
        assert result.stderr.decode() == told
        await_no_processes(temporary["TMPDIR"])
        if result.stdout:
            break
    assert result.stdout == b"so far\n"


def test_the_time_limit_with_a_caller_that_does_not_read(temporary: dict[str, str]) -> None:
    with start("--timeout", "1", "--", "yes", env=temporary) as process:
        assert process.wait(SECONDS) == 124


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_all(number: signal.Signals, tmp_path: Path) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    script = "echo up; exec sleep 1234"
    with start("--", "sh", "-c", script, env={"TMPDIR": str(folder)}) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        assert processes(str(folder)) != []
        process.send_signal(number)
        assert process.wait(SECONDS) == -number
    await_no_processes(str(folder))
    # SIGKILL gives no time to clear up files; even then nothing runs on, and no memory is held.
    assert number == signal.SIGKILL or list(folder.iterdir()) == []


def test_a_reader_that_goes_away_ends_all(temporary: dict[str, str]) -> None:
    with start("--", "yes", env=temporary) as process:
        assert process.stdout is not None
        assert process.stdout.read(4) == b"y\ny\n"
        process.stdout.close()
        assert process.wait(SECONDS) == -signal.SIGPIPE
    await_no_processes(temporary["TMPDIR"])


def test_a_panic_is_told_with_the_console(temporary: dict[str, str]) -> None:
    result = sh(
        "echo before; sleep 0.5; echo PANIC >/sys/kernel/debug/provoke-crash/DIRECT", env=temporary
    )
    assert (result.returncode, result.stdout) == (125, b"before\n")
    first, *rest = result.stderr.decode().splitlines()
    assert first.startswith("lab: the guest's kernel complained: ")
    assert "Kernel panic - not syncing: dumptest" in first
    assert rest[0] == "lab: the guest ended before COMMAND did; its last console lines:"
    assert any("Kernel panic - not syncing: dumptest" in line for line in rest[1:])
    await_no_processes(temporary["TMPDIR"])


def test_a_guest_that_powers_off_by_itself(temporary: dict[str, str]) -> None:
    script = "import ctypes; ctypes.CDLL(None).reboot({})"
    for what in (0x4321FEDC, 0x01234567):  # power off, restart
        result = lab("--", sys.executable, "-c", script.format(what), env=temporary)
        assert result.returncode == 125
        assert result.stderr.startswith(b"lab: the guest ended before COMMAND did")


def test_a_kernel_warning_is_pointed_out(tmp_path: Path, temporary: dict[str, str]) -> None:
    script = "echo WARNING >/sys/kernel/debug/provoke-crash/DIRECT; exit 3"
    result = sh(script, "--scratch", tmp_path / "scratch", env=temporary)
    assert result.returncode == 3
    (line,) = result.stderr.decode().splitlines()
    assert line.startswith("lab: the guest's kernel complained: ")
    assert "WARNING: " in line
    assert line.endswith(f"(all kernel messages: {tmp_path}/scratch/dmesg)")
    assert "lkdtm" in (tmp_path / "scratch/dmesg").read_text()


# -- other calls -----------------------------------------------------------------------------------


REFUSED = [
    (["true"], "'true' is no option; COMMAND comes after --"),
    ([], "no COMMAND: give it after --"),
    (["--"], "no COMMAND: give it after --"),
    (["--", ""], "no COMMAND: give it after --"),
    (["--cpus", "0", "--", "true"], "argument --cpus: '0': give a number from 1 to 8"),
    (["--cpus", "two", "--", "true"], "argument --cpus: 'two': give a number from 1 to 8"),
    (["--mem", "5GB", "--", "true"], "argument --mem: size '5GB': give a number with K, M, G or T"),
    (["--mem", "1M", "--", "true"], "argument --mem: size '1M': at least 128M"),
    (["--mem", "900T", "--", "true"], "--mem 943718400M is more than this machine has"),
    (["--disk", "0", "--", "true"], "argument --disk: size '0': a multiple of 512 bytes"),
    (["--disk", "1000", "--", "true"], "argument --disk: size '1000': a multiple of 512 bytes"),
    (["--disk", "-1", "--", "true"], "argument --disk: size '-1': give a number with K, M, G or T"),
    (["--disk", "1M"] * 17 + ["--", "true"], "--disk 17 times: at most 16 disks"),
    (["--timeout", "0", "--", "true"], "argument --timeout: '0': give a number of seconds"),
    (["--timeout", "nan", "--", "true"], "argument --timeout: 'nan': give a number of seconds"),
    (["--scratch", "/", "--", "true"], "argument --scratch: '/' would make all files writable"),
    (["--scratch", "/dev/null/x", "--", "true"], "argument --scratch: '/dev/null/x': Not a dir"),
    (["--show", "/nosuch", "--", "true"], "argument --show: '/nosuch' is not there"),
    (["--print", "all"], "argument --print: invalid choice: 'all'"),
    (["--keeps", "--", "true"], "'--keeps' is no option"),
    (
        ["--native", "--disk", "1M", "--", "true"],
        "--disk with --native: this machine gets no disks",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_bad_input(arguments: list[str], message: str, temporary: dict[str, str]) -> None:
    result = lab(*arguments, env=temporary)
    assert (result.returncode, result.stdout) == (2, b"")
    assert result.stderr.decode().startswith(f"lab: {message}")
    assert result.stderr.count(b"\n") == 1


def test_no_lab_in_the_lab() -> None:
    result = lab("--", *LAB, "--", "true")
    assert result.returncode == 2
    assert result.stderr == b"lab: LAB=1: this is the lab already; run COMMAND itself\n"


def test_what_is_cached_is_there_wherever_it_lies(tmp_path: Path) -> None:
    (tmp_path / "ublk-ubi").symlink_to(cache_folder())
    found = out(sh(f"ls {tmp_path}/ublk-ubi/", env={"XDG_CACHE_HOME": str(tmp_path)}))
    assert any(name.startswith("kernel-") for name in found.split())


def test_native_runs_on_this_kernel(temporary: dict[str, str]) -> None:
    result = sh(
        'cat /proc/version; echo ${LAB-none}; test -d "$LAB_SCRATCH"; exit 9',
        "--native",
        env=temporary,
    )
    assert result.returncode == 9
    assert result.stdout.decode() == Path("/proc/version").read_text() + "none\n"
    result = sh("echo $$; sleep 1234", "--native", "--timeout", "3", env=temporary)
    assert result.returncode == 124
    assert not Path(f"/proc/{int(result.stdout)}").exists()


def test_print_tells_where_the_kernel_is(tmp_path: Path) -> None:
    paths = {what: out(lab("--print", what)).strip() for what in ("kernel", "headers", "config")}
    assert os.access(paths["kernel"], os.X_OK)
    assert "CONFIG_BLK_DEV_UBLK=y" in Path(paths["config"]).read_text().splitlines()
    release = out(sh("uname -r; zcat /proc/config.gz | md5sum")).split()
    assert out(lab("--print", "version")).split()[0] == release[0]
    assert hashlib.md5(Path(paths["config"]).read_bytes()).hexdigest() == release[1]
    source = tmp_path / "abi.c"
    source.write_text(
        "#include <linux/ublk_cmd.h>\nint x[sizeof(struct ublksrv_ctrl_dev_info) == 64 ? 1 : -1];\n"
    )
    subprocess.run(["gcc", "-Werror", "-fsyntax-only", "-I", paths["headers"], source], check=True)


def test_help_has_examples() -> None:
    text = out(lab("--help"))
    assert "tools/lab -- uname -r" in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_processors_that_wait_for_each_other_do_not_spin() -> None:
    """Or guests of two cost a third more: what waits for a mutex sleeps, for a lock yields."""
    config, kernel = (out(lab("--print", what)).strip() for what in ("config", "kernel"))
    assert "SPIN_ON_OWNER=y" not in Path(config).read_text()
    assert b"\0sched_yield\0" in Path(kernel).read_bytes()


# -- building, with a kernel source that is a toy -------------------------------------------------

TOY_MAKEFILE = """
allnoconfig:
\tcp $(KCONFIG_ALLCONFIG) .config
linux:
\techo built >>$(COUNTER)
\ttest $$(wc -l <$(COUNTER)) != 1 || for n in $$(seq 600); do test -e $(GO) || sleep 0.1; done
\tcp /bin/true linux
\tmkdir -p include/config
\techo 7.9.1 >include/config/kernel.release
scripts_unifdef:
.PHONY: allnoconfig linux scripts_unifdef
"""


@pytest.fixture
def toy(tmp_path: Path) -> dict[str, str]:
    """Put programs before the real ones that offer a kernel; its first build waits for `go`."""
    source = tmp_path / "linux-source-7.9"
    (source / "scripts").mkdir(parents=True)
    places = f"COUNTER = {tmp_path}/counter\nGO = {tmp_path}/go\n"
    (source / "Makefile").write_text(places + TOY_MAKEFILE)
    (source / "scripts/headers_install.sh").write_text('#!/bin/sh\necho "// $1" >"$2"\n')
    (source / "scripts/headers_install.sh").chmod(0o755)
    packed = tmp_path / "usr/src/linux-source-7.9.tar.xz"
    packed.parent.mkdir(parents=True)
    subprocess.run(["tar", "-cJf", packed, "-C", tmp_path, source.name], check=True)
    subprocess.run(["tar", "-cf", "deb", "./usr"], cwd=tmp_path, check=True)
    offered = "linux-source-7.10 - no\nlinux-source-7.9 - yes\nlinux-source - meta"
    stubs = {
        "apt-get": 'case "$*" in *download*) touch linux-source-7.10_1_all.deb ;; esac',
        "apt-cache": f'case "$*" in *search*) echo "{offered}" ;; *) echo Version: 7.10.1-1; esac',
        "dpkg-deb": f"cat {tmp_path}/deb",
    }
    (tmp_path / "bin").mkdir()
    for name, script in stubs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }


def in_cache(toy: dict[str, str]) -> list[str]:
    return sorted(path.name for path in Path(toy["XDG_CACHE_HOME"], "ublk-ubi").iterdir())


def test_callers_at_once_build_one_kernel(toy: dict[str, str], tmp_path: Path) -> None:
    said = [tmp_path / f"said{number}" for number in range(3)]
    callers = []
    for path in said:
        with path.open("wb") as file:
            callers.append(start("--print", "kernel", env=toy, stderr=file.fileno()))
    deadline = time.monotonic() + SECONDS
    while sum("waiting for it" in path.read_text() for path in said) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (tmp_path / "go").touch()
    (path,) = {caller.communicate(timeout=SECONDS)[0] for caller in callers}
    assert [caller.returncode for caller in callers] == [0, 0, 0]
    assert (tmp_path / "counter").read_text() == "built\n"
    words = [path.read_text() for path in said]
    assert sorted("waiting for it" in text for text in words) == [False, True, True]
    assert any("downloading and unpacking linux-source-7.10" in text for text in words)
    (folder,) = [name for name in in_cache(toy) if name != "lock"]
    assert path.decode() == f"{toy['XDG_CACHE_HOME']}/ublk-ubi/{folder}/linux\n"
    assert folder.startswith("kernel-7.10.1-1-")
    # From now on nothing of the outside is asked.
    for stub in (tmp_path / "bin").iterdir():
        stub.write_text(f"#!/bin/sh\necho $0 >>{tmp_path}/called\nexit 1\n")
    assert out(lab("--print", "version", env=toy)) == "7.9.1 (Debian 7.10.1-1)\n"
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_half_a_build_is_never_used(
    number: signal.Signals, toy: dict[str, str], tmp_path: Path
) -> None:
    with start("--print", "kernel", env=toy, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + SECONDS
        while not (tmp_path / "counter").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(SECONDS) == -number
    if number == signal.SIGTERM:
        assert in_cache(toy) == ["lock"]
    assert not any(name.startswith("kernel-") for name in in_cache(toy))
    result = lab("--print", "kernel", env=toy)
    assert result.returncode == 0
    assert (tmp_path / "counter").read_text() == "built\n" * 2
    assert len(in_cache(toy)) == 2
    (tmp_path / "go").touch()  # what SIGKILL has left of the first build ends, too


def test_an_archive_that_answers_at_the_third_time(toy: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    stub = tmp_path / "bin/apt-get"
    stub.rename(tmp_path / "answers")
    stub.write_text(f"#!/bin/sh\necho >>{tmp_path}/asked\n"
                    f'test $(wc -l <{tmp_path}/asked) -ge 3 && exec {tmp_path}/answers "$@"\n')
    stub.chmod(0o755)
    result = lab("--print", "kernel", env=toy)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "asked").read_text() == "\n" * 4  # the lists, and the package


def test_an_archive_that_never_answers(toy: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bin/apt-get").write_text("#!/bin/sh\necho 'E: no route' >&2\nexit 100\n")
    result = lab("--print", "kernel", env=toy)
    assert (result.returncode, result.stdout) == (125, b"")
    last = result.stderr.decode().splitlines()[-1]
    assert "E: no route (is the archive within reach?)" in last
    assert in_cache(toy) == ["lock"]


def test_a_build_that_fails_says_why(toy: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bin/dpkg-deb").write_text("#!/bin/sh\necho dpkg-deb: broken >&2\nexit 1\n")
    result = lab("--print", "kernel", env=toy)
    assert (result.returncode, result.stdout) == (125, b"")
    last = result.stderr.decode().splitlines()[-1]
    assert last.startswith("lab: cannot unpack linux-source-7.10_1_all.deb: ")
    assert in_cache(toy) == ["lock"]
