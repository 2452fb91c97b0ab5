"""What a root process may do, and how it gives that up (capabilities(7))."""

from __future__ import annotations

import contextlib

from ublk_ubi import kernel_calls as calls

NUMBERS = {
    "CAP_DAC_OVERRIDE": 1,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
}
_MOST = 64


def reduce(names: tuple[str, ...]) -> None:
    """Keep these capabilities at most, for this thread and what it will start. Raises OSError.

    Bounding and ambient set come along, and no_new_privs: nothing that is run gives more.
    """
    calls.prctl(calls.PR_SET_NO_NEW_PRIVS, 1)
    kept = {NUMBERS[name] for name in names}
    with contextlib.suppress(OSError):
        calls.prctl(calls.PR_CAP_AMBIENT, calls.PR_CAP_AMBIENT_CLEAR_ALL)
    for number in range(_MOST):
        try:
            bounded = calls.prctl(calls.PR_CAPBSET_READ, number)
        except OSError:
            break  # the kernel knows no more of them
        if bounded and number not in kept:
            calls.prctl(calls.PR_CAPBSET_DROP, number)
    calls.set_capabilities(sum(1 << number for number in kept) & _permitted())


def _permitted() -> int:
    with open("/proc/self/status", "rb") as file:
        for line in file:
            if line.startswith(b"CapPrm:"):
                return int(line.split()[1], 16)
    return 0
