"""Zero copy with fewer slots for requests' pages than there are tags.

The kernel cannot register the pages of a request whose slot, the number of its tag, lies past the
table of slots: it falls back (UBLK_AUTO_BUF_REG_FALLBACK). A library, preloaded, makes the table
that the product asks liburing for smaller than it believes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from support.shell import run

if TYPE_CHECKING:
    from pathlib import Path

_SOURCE = """
#include <dlfcn.h>
#include <stdlib.h>

struct io_uring;

int io_uring_register_buffers_sparse(struct io_uring *ring, unsigned count)
{
    /* No RTLD_NEXT: liburing comes with a module of Python's, and is not in the global scope. */
    int (*real)(struct io_uring *, unsigned) = (int (*)(struct io_uring *, unsigned))
        dlsym(dlopen("liburing.so.2", RTLD_NOW), __func__);
    unsigned most = (unsigned)atoi(getenv("TEST_SLOTS"));

    return most == 0 ? 0 : real(ring, count < most ? count : most);
}
"""


def build(folder: Path) -> Path:
    """Compile the library."""
    source, library = folder / "slots.c", folder / "slots.so"
    source.write_text(_SOURCE)
    run("cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, source, "-ldl")
    return library


def environment(library: Path, count: int) -> dict[str, str]:
    """For a command whose daemon shall have so many slots a queue."""
    return {"LD_PRELOAD": str(library), "TEST_SLOTS": str(count)}
