"""How much memory this process has for itself."""

from __future__ import annotations

COUNTED = (b"Anonymous:", b"Locked:")


def own_bytes() -> int | None:
    """Return the bytes of private and of locked pages mapped here, each counted once.

    Of locked files (programs, libraries) it is this process's share: the kernel divides a page's
    size among those who map it. Other pages of files can be dropped and read again. None where
    /proc does not tell (proc(5), smaps).
    """
    total_kib = 0
    of_mapping = dict.fromkeys(COUNTED, 0)
    try:
        with open("/proc/self/smaps", "rb") as file:
            for line in file:
                key, *values = line.split(maxsplit=2)
                if key in of_mapping:
                    of_mapping[key] = int(values[0])
                elif key == b"VmFlags:":  # a mapping's last line
                    total_kib += max(of_mapping.values())
    except (OSError, ValueError, IndexError):
        return None
    return total_kib << 10 or None
