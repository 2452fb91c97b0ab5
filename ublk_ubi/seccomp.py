"""The system calls that a daemon, and its helpers, may make once a disk is live.

A filter answers by the call's number, the frequent ones first; on kernels from 5.11 a call that it
always allows is looked up in a bitmap and the filter not run at all.

    allowed     what serving, status, hydration, resize, leaving and coming back need
    killed      what none of that ever does and an intruder would: the process ends. That costs
                nothing: its disk waits, and is brought back (docs/durability.md)
    EPERM       every other call: a library that tries one goes on, where SIGSYS would end a disk
                over and over after an update of libc
    ENOSYS      clone3, which hides its flags from filters, and calls newer than this list:
                libraries fall back to what they did before

New processes are refused (clone without CLONE_THREAD; a helper may fork), as are sockets other than
AF_UNIX. What io_uring does is not seen by any filter; the minimal root and the missing capabilities
bind that as well.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from ublk_ubi import kernel_calls
from ublk_ubi.syscalls import AGENT, DAEMON, KILLED, NEWEST, NUMBERS

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000

_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_JUMP_EQUAL, _JUMP_GREATER, _JUMP_GREATER_EQUAL, _JUMP_ANY_BIT = 0x15, 0x25, 0x35, 0x45
_RETURN = 0x06
_NUMBER, _ARCH, _ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; an argument's low half

ALLOW = 0x7FFF0000
KILL_PROCESS = 0x80000000
_ERRNO = 0x00050000
EPERM, ENOSYS = 1, 38
CLONE_THREAD = 0x00010000
CLONE_NEW_ANY = 0x7E020000  # namespaces
AF_UNIX = 1

_FLAG_TSYNC = 1
_FLAG_LOG = 2
# Without it, kernels before 5.16 pay for every filter with slower speculation.
_FLAG_SPEC_ALLOW = 4

_INSTRUCTION = struct.Struct("=HBBI")


class _Rule(NamedTuple):
    """A call that depends on its first argument's low half: `jump` with `value` decides."""

    jump: int
    value: int
    allows: bool = True


_LOCAL_SOCKETS = {name: _Rule(_JUMP_EQUAL, AF_UNIX) for name in ("socket", "socketpair")}
_DAEMON_RULES = _LOCAL_SOCKETS | {"clone": _Rule(_JUMP_ANY_BIT, CLONE_THREAD)}
_HELPER_RULES = {"clone": _Rule(_JUMP_ANY_BIT, CLONE_NEW_ANY, allows=False)}


def program(machine: str, *, helper: bool = False, killed: int = KILL_PROCESS) -> bytes:
    """Assemble the filter of a daemon, or of its helpers, as packed struct sock_filter.

    `killed` is the answer to what must never happen (tests). Raises KeyError for a machine whose
    numbers are not known.
    """
    numbers = NUMBERS[machine]
    code = [_jump(_JUMP_EQUAL, _AUDIT_ARCH[machine], 1, 0, load=_ARCH)]
    code.append(_answer(killed))
    code.append(_INSTRUCTION.pack(_LOAD, 0, 0, _NUMBER))
    if machine == "x86_64":
        code += _if(_JUMP_GREATER_EQUAL, _X32_BIT, killed)
    allowed = AGENT if helper else DAEMON
    rules = _HELPER_RULES if helper else _DAEMON_RULES
    for name in allowed:
        if name in numbers and name not in rules:
            code += _if(_JUMP_EQUAL, numbers[name], ALLOW)
    for name in KILLED:
        if name in numbers:
            code += _if(_JUMP_EQUAL, numbers[name], killed)
    for name, rule in rules.items():
        if name in allowed and name in numbers:
            code += _ruled(numbers[name], rule)
    code += _if(_JUMP_EQUAL, numbers["clone3"], _ERRNO | ENOSYS)
    code += _if(_JUMP_GREATER, NEWEST, _ERRNO | ENOSYS)
    code.append(_answer(_ERRNO | EPERM))
    return b"".join(code)


def install(*, helper: bool = False) -> None:
    """Filter the calls of all threads of this process from now on. Raises OSError.

    It needs no_new_privs, or CAP_SYS_ADMIN.
    """
    machine = kernel_calls.machine()
    if machine not in NUMBERS:
        raise OSError(ENOSYS, f"seccomp: the numbers of {machine} are not known")
    flags = _FLAG_TSYNC | _FLAG_LOG | _FLAG_SPEC_ALLOW
    refused = kernel_calls.set_filter(program(machine, helper=helper), flags)
    if refused:
        raise OSError(EPERM, f"seccomp: thread {refused} has a filter of its own")


def _answer(value: int) -> bytes:
    return _INSTRUCTION.pack(_RETURN, 0, 0, value)


def _jump(kind: int, value: int, then: int, otherwise: int, *, load: int) -> bytes:
    return _INSTRUCTION.pack(_LOAD, 0, 0, load) + _INSTRUCTION.pack(kind, then, otherwise, value)


def _if(kind: int, value: int, answer: int) -> list[bytes]:
    """Answer so if the number, which is loaded, compares so."""
    return [_INSTRUCTION.pack(kind, 0, 1, value), _answer(answer)]


def _ruled(number: int, rule: _Rule) -> list[bytes]:
    """Judge one call by its first argument. Behind it the number is loaded, or all has ended."""
    refused = _ERRNO | EPERM
    return [
        _INSTRUCTION.pack(_JUMP_EQUAL, 0, 4, number),
        _INSTRUCTION.pack(_LOAD, 0, 0, _ARGUMENT),
        _INSTRUCTION.pack(rule.jump, 0, 1, rule.value),
        _answer(ALLOW if rule.allows else refused),
        _answer(refused if rule.allows else ALLOW),
    ]
