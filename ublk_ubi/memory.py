"""How much memory this process has for itself."""

from __future__ import annotations


def own_bytes() -> int | None:
    """Return the bytes of private and of locked pages mapped here, each counted once.

    Of locked files (programs, libraries) it is this process's share: the kernel divides a page's
    size among those who map it. Other pages of files can be dropped and read again. None where
    /proc does not tell (proc(5), smaps).
    """
    total_kib = 0
    try:
        with open("/proc/self/smaps", "rb") as file:
            text = file.read()
        # Some twenty lines a mapping, hundreds of mappings: no look at each of them.
        for mapping in text.split(b"\nAnonymous:")[1:]:
            anonymous, _, more = mapping.partition(b" kB")
            locked = more.partition(b"\nLocked:")[2].partition(b" kB")[0]
            total_kib += max(int(anonymous), int(locked))
    except (OSError, ValueError):
        return None
    return total_kib << 10 or None
