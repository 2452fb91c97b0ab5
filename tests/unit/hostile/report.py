"""How a check_* program says what it has done, also when compiled code ends it."""

from __future__ import annotations

import os
import sys
from collections import Counter
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Callable

MORE = float(os.environ.get("UBLK_UBI_EXAMPLES", "1"))

counts: Counter[str] = Counter()


def profile(examples: int) -> Callable[..., object]:
    """The same examples in every run; UBLK_UBI_EXAMPLES=20 makes twenty times as many."""
    return settings(
        max_examples=int(examples * MORE), derandomize=True, database=None, deadline=None,
        report_multiple_bugs=False, suppress_health_check=list(HealthCheck),
    )


class Last:
    """The case under way, for who is left when the process is not."""

    def __init__(self) -> None:
        self._fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)

    def note(self, what: object) -> None:
        text = repr(what).encode()
        os.pwrite(self._fd, text, 0)
        os.ftruncate(self._fd, len(text))


def finish(needed: set[str]) -> None:
    """Print what was met; what was never met was never checked."""
    print(", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    missing = needed - set(counts)
    assert not missing, f"never met: {sorted(missing)}"
