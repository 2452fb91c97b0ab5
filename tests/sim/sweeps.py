"""Campaigns besides the everyday one: the nth fault of each kind, and small worlds in full."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from sim.campaign import Campaign, Seen, Variations
from sim.plans import FAULTY, SMALL, Kind, Plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from sim.builder import Build

CALM = 30
# How an I/O goes wrong (plans.Plan.nth_errno): -errno, or as _io.pxd says.
SHORT = 1000
NOTHING = 1001
TRANSFERS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EAGAIN": errno.EAGAIN, "short": SHORT,
             "zero length": NOTHING}
# An fdatasync and a host call have no length; a host call is not tried again.
FAULTS: dict[Kind, dict[str, int]] = {
    Kind.READ_IMAGE: TRANSFERS,
    Kind.READ_BASE: TRANSFERS,
    Kind.WRITE_BASE: TRANSFERS,
    Kind.SYNC_BASE: {name: TRANSFERS[name] for name in ("EIO", "ENOSPC", "EAGAIN")},
    Kind.HOST: {name: TRANSFERS[name] for name in ("EIO", "ENOSPC")},
}


def variations() -> Variations:
    """Every kind of I/O × every fault × once or from then on."""
    return [{"nth_kind": int(kind), "nth_errno": number, "nth_for_good": int(for_good)}
            for kind, faults in FAULTS.items()
            for number in faults.values()
            for for_good in (False, True)]


def calm_worlds(build: Build, seeds: range, plan: Plan) -> Seen:
    """No crashes, but CALM worlds a seed: what is rare comes about by many orders of events."""
    return Campaign(build, range(seeds.start * CALM, seeds.stop * CALM), plan.but(crash_one_in=0),
                    chunk=500).run()


def nth_faults(build: Build, seeds: range, progress: Callable[[int], None] = lambda _: None,
               plan: Plan = FAULTY) -> Seen:
    """Each seed × each variation × n = 1, 2, … until a run does not reach the nth I/O."""
    return Campaign(build, seeds, plan, variations=variations(), chunk=1, progress=progress).run()


def small_worlds(build: Build, seeds: range,
                 progress: Callable[[int], None] = lambda _: None) -> Seen:
    """At most 3 stripes and 8 requests; of at most 10 pending writes every subset is tried."""
    return Campaign(build, seeds, SMALL, chunk=4, progress=progress).run()
