"""How much memory this process has for itself."""

from __future__ import annotations


def private_bytes() -> int | None:
    """Return the bytes of anonymous and shared-memory pages mapped here, locked ones among them.

    The rest of a process's resident set is files (programs, libraries) that the kernel can drop
    and read again. None where /proc does not tell (proc(5), RssAnon and RssShmem).
    """
    total = 0
    try:
        with open("/proc/self/status", "rb") as file:
            for line in file:
                if line.startswith((b"RssAnon:", b"RssShmem:")):
                    total += int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        return None
    return total or None
