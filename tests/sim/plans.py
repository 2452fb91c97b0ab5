"""Plans: what a run is besides its seed, in the terms of ubi_sim/_world.pxd."""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass, replace


class Feature(enum.IntFlag):
    """What happens in a world; its seed draws them (_model.pxd, Feature)."""

    FAULTS = 1 << 0
    SYNC_FAULTS = 1 << 1
    CHAINS = 1 << 2
    MISTAKES = 1 << 3
    MOVES = 1 << 4
    OPENING = 1 << 5
    TORN_SLOTS = 1 << 6
    ZEROING = 1 << 7
    REISSUE = 1 << 8
    STALE_BASE = 1 << 9
    ADOPTION = 1 << 10
    COPY_ON_READ = 1 << 11
    TWO_PAGES = 1 << 12
    TWO_QUEUES = 1 << 13
    PARTIAL_IMAGE = 1 << 14
    TAIL = 1 << 15
    OVERLAPS = 1 << 16
    HOLES = 1 << 17
    WRITETHROUGH = 1 << 18
    UNSAFE = 1 << 19
    HYDRATION = 1 << 20
    IMAGE_LOST = 1 << 21


class Bug(enum.IntEnum):
    """Planted bugs of the world around the engines (_model.pxd, WorldBug)."""

    NONE = 0
    NO_FENCE_STRIPE = 1
    NO_FENCE_GUEST = 2
    NO_FENCE_PAGE = 3
    LOST_DOORBELL = 4
    TABLE_FORGOTTEN = 5
    LATCH_FORGOTTEN = 6
    CLOSE_EARLY = 7


class Kind(enum.IntEnum):
    """I/O that can be made to fail (_core.pxd, ActionKind)."""

    READ_IMAGE = 1
    READ_BASE = 2
    WRITE_BASE = 3
    SYNC_BASE = 4
    HOST = 9


@dataclass(frozen=True)
class Plan:
    """A run of the simulator; the defaults are those of `tools/simulate --seeds`."""

    requests: int = 22
    skipped: int = 0
    without: int = 0
    crash_one_in: int = 1
    subsets: int = 5
    only_boundary: int = -1
    only_branch: int = -1
    budget: int = 4000
    nth: int = 0
    nth_kind: int = 0
    nth_for_good: bool = False
    nth_errno: int = 5
    small: bool = False
    blind: bool = False
    bug: int = 0

    def but(self, **changes: int) -> Plan:
        """Return a plan that differs."""
        return replace(self, **changes)

    @property
    def differences(self) -> dict[str, int]:
        """What is not as by default."""
        default = Plan()
        return {name: value for name, value in asdict(self).items()
                if value != getattr(default, name)}


EVERYDAY = Plan()
SMALL = Plan(requests=8, small=True)
# One fault a run; power is lost now and then.
FAULTY = Plan(requests=12, crash_one_in=16, subsets=2, without=Feature.FAULTS | Feature.SYNC_FAULTS)
