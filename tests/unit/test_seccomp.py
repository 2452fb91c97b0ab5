"""The filter of system calls: its numbers, what it answers, and what the kernel makes of it."""

from __future__ import annotations

import errno
import re
import signal
import struct
import subprocess
import sys
import textwrap

import pytest

from ublk_ubi import seccomp, syscalls

ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
HEADERS = {
    "x86_64": "#include <asm/unistd_64.h>\n",
    "aarch64": "#define __BITS_PER_LONG 64\n#define __ARCH_WANT_RENAMEAT\n"
               "#define __ARCH_WANT_NEW_STAT\n#define __ARCH_WANT_SET_GET_RLIMIT\n"
               "#define __ARCH_WANT_SYS_CLONE3\n#include <asm-generic/unistd.h>\n",
}
ALLOW, KILL = 0x7FFF0000, 0x80000000
EPERM, ENOSYS = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
CLONE_THREAD, CLONE_NEWUSER = 0x00010000, 0x10000000
MACHINES = pytest.mark.parametrize("machine", ["x86_64", "aarch64"])


def numbers_of(machine: str) -> dict[str, int]:
    """What the C headers say."""
    done = subprocess.run(
        ["gcc", "-E", "-dM", "-"], input=HEADERS[machine], capture_output=True, text=True,
        check=True,
    )
    raw = dict(re.findall(r"#define (__NR\w*) (\S+)\n", done.stdout))
    found = {}
    for name, text in raw.items():
        number = raw.get(text, text)               # one name for another, at most
        if name.startswith("__NR_") and number.isdigit():
            found[name.removeprefix("__NR_")] = int(number)
    return found


@MACHINES
def test_the_numbers_are_those_of_the_headers(machine: str) -> None:
    known = numbers_of(machine)
    ours = syscalls.NUMBERS[machine]
    assert {name: number for name, number in ours.items() if known.get(name) != number} == {}
    wanted = {*syscalls.DAEMON, *syscalls.AGENT, *syscalls.KILLED}
    assert sorted((wanted & set(known)) - set(ours)) == []
    assert max(ours.values()) <= syscalls.NEWEST


def answer(program: bytes, number: int, *arguments: int, arch: int) -> int:
    """What a filter says to a call: the interpreter of Linux's classic BPF, as far as needed."""
    data = struct.pack("=iIQ6Q", number, arch, 0, *arguments, *[0] * (6 - len(arguments)))
    code = list(struct.iter_unpack("=HBBI", program))
    accumulator = position = 0
    while True:
        operation, then, otherwise, value = code[position]
        position += 1
        if operation == 0x20:
            accumulator = int.from_bytes(data[value : value + 4], sys.byteorder)
        elif operation == 0x06:
            return int(value)
        else:
            holds = {
                0x15: accumulator == value, 0x25: accumulator > value,
                0x35: accumulator >= value, 0x45: accumulator & value != 0,
            }[operation]
            position += then if holds else otherwise


@MACHINES
@pytest.mark.parametrize("helper", [False, True])
def test_what_the_filter_answers(machine: str, helper: bool) -> None:
    program = seccomp.program(machine, helper=helper)
    numbers = syscalls.NUMBERS[machine]

    def says(name: str, *arguments: int) -> int:
        return answer(program, numbers[name], *arguments, arch=ARCH[machine])

    ruled = {"clone"} if helper else {"clone", "socket", "socketpair"}
    allowed = set(syscalls.AGENT if helper else syscalls.DAEMON)
    for name in allowed - ruled & set(numbers):
        if name in numbers:
            assert says(name) == ALLOW, name
    for name in set(syscalls.KILLED) - allowed & set(numbers):
        if name in numbers:
            assert says(name) == KILL, name
    assert says("clone3") == ENOSYS
    assert says("clone", CLONE_THREAD) == ALLOW
    assert says("clone", signal.SIGCHLD) == (ALLOW if helper else EPERM)
    assert says("clone", signal.SIGCHLD | CLONE_NEWUSER) == EPERM
    if not helper:
        assert [says("socket", family) for family in (1, 2, 10, 16)] == [ALLOW, EPERM, EPERM, EPERM]
    else:
        assert says("socket", 1) == EPERM
    # A call that nobody has thought of, one that is newer than the list, another machine's.
    assert answer(program, syscalls.NEWEST - 5, arch=ARCH[machine]) == EPERM
    assert answer(program, syscalls.NEWEST + 1, arch=ARCH[machine]) == ENOSYS
    assert answer(program, numbers["read"], arch=0x40000003) == KILL
    if machine == "x86_64":
        assert answer(program, 0x40000000 | numbers["read"], arch=ARCH[machine]) == KILL


@MACHINES
def test_what_comes_with_every_request_comes_first(machine: str) -> None:
    """Kernels before 5.11 run the filter from its start each time."""
    code = list(struct.iter_unpack("=HBBI", seccomp.program(machine)))
    numbers = [value for operation, _, _, value in code if operation == 0x15]
    assert numbers[1] == syscalls.NUMBERS[machine]["io_uring_enter"]
    assert len(code) < 400


def confined(body: str) -> subprocess.CompletedProcess[str]:
    """Run a program under the filter of a daemon."""
    program = f"""
import errno, os, socket, threading
from ublk_ubi import kernel_calls, seccomp
kernel_calls.prctl(kernel_calls.PR_SET_NO_NEW_PRIVS, 1)
seccomp.install()
{textwrap.dedent(body)}
"""
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False,
    )


def test_a_confined_process_works() -> None:
    done = confined("""
        ran = []
        threads = [threading.Thread(target=ran.append, args=(n,)) for n in range(3)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        ours, theirs = socket.socketpair()
        ours.send(b"x")
        print(sorted(ran), theirs.recv(1))
    """)
    assert (done.returncode, done.stdout) == (0, "[0, 1, 2] b'x'\n"), done.stderr


def test_what_a_confined_process_is_refused() -> None:
    done = confined("""
        for call in (os.fork, lambda: socket.socket(socket.AF_INET), lambda: os.setuid(0),
                     lambda: os.sync()):
            try:
                call()
                print("done")
            except OSError as error:
                print(errno.errorcode[error.errno])
    """)
    assert done.returncode == 0, done.stderr
    # sync(2) has no error to give: that it came back is all that can be seen.
    assert done.stdout.split() == ["EPERM", "EPERM", "EPERM", "done"]


@pytest.mark.parametrize(
    "call", ["os.execv('/bin/true', ['true'])", "kernel_calls.unshare(0)"],
)
def test_what_ends_a_confined_process(call: str) -> None:
    assert confined(call).returncode == -signal.SIGSYS


def test_a_thread_that_was_there_is_confined_as_well() -> None:
    program = """
import os, socket, threading
from ublk_ubi import kernel_calls, seccomp
go, found = threading.Event(), []
def work():
    go.wait()
    try:
        socket.socket(socket.AF_INET)
    except PermissionError:
        found.append("refused")
thread = threading.Thread(target=work)
thread.start()
kernel_calls.prctl(kernel_calls.PR_SET_NO_NEW_PRIVS, 1)
seccomp.install()
go.set()
thread.join()
print(found)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
    )
    assert done.stdout == "['refused']\n"


def test_a_machine_that_is_not_known_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp.kernel_calls, "machine", lambda: "vax")
    with pytest.raises(OSError, match="vax"):
        seccomp.install()
