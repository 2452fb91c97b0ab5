"""The simulator for Python: plans in, findings out."""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from ublk_ubi._lifecycle cimport SCRATCH_BYTES
from ubi_sim._model cimport FINE, World
from ubi_sim._world cimport MAX_NESTING, Explorer, Plan, run_seed

VIOLATIONS = (
    "fine", "wrong data", "error without a fault", "flush succeeded after a failed fdatasync",
    "hang", "leak", "base refused", "base not refused", "counts differ", "not started",
    "action out of bounds",
)


cdef class Simulator:
    """Runs seeds under one plan; counts what it saw."""

    cdef Explorer explorer

    def __cinit__(self, *, uint32_t seen_bits=20):
        self.explorer.world = <World*>calloc(1, sizeof(World))
        self.explorer.saved = <World*>calloc(MAX_NESTING, sizeof(World))
        self.explorer.scratch = <uint8_t*>calloc(MAX_NESTING + 2, SCRATCH_BYTES)
        self.explorer.seen = <uint64_t*>calloc(1 << seen_bits, 8)
        self.explorer.seen_mask = (1 << seen_bits) - 1
        if (self.explorer.world == NULL or self.explorer.saved == NULL
                or self.explorer.scratch == NULL or self.explorer.seen == NULL):
            raise MemoryError

    def __dealloc__(self):
        free(self.explorer.world)
        free(self.explorer.saved)
        free(self.explorer.scratch)
        free(self.explorer.seen)

    def run(self, uint64_t seed, *, uint32_t requests=12, uint32_t crash_one_in=1,
            uint32_t subsets=2, uint32_t chain_one_in=4, uint32_t fault_one_in=0, uint32_t nth=0,
            uint8_t nth_kind=0, bint nth_for_good=False, int32_t nth_errno=5,
            bint syncs_fail=False, bint crash_opening=False, bint small=False,
            uint32_t steps=5000, uint8_t bug=0):
        """Run one seed; None, or (violation, details, steps)."""
        cdef Plan* plan = &self.explorer.plan
        memset(plan, 0, sizeof(Plan))
        plan.requests = requests
        plan.crash_one_in = crash_one_in
        plan.subsets = subsets
        plan.chain_one_in = chain_one_in
        plan.fault_one_in = fault_one_in
        plan.nth = nth
        plan.nth_kind = nth_kind
        plan.nth_for_good = nth_for_good
        plan.nth_errno = nth_errno
        plan.syncs_fail = syncs_fail
        plan.crash_opening = crash_opening
        plan.small = small
        plan.steps = steps
        plan.bug = bug
        with nogil:
            run_seed(&self.explorer, seed)
        if self.explorer.world.violation == FINE:
            return None
        return (VIOLATIONS[self.explorer.world.violation], tuple(self.explorer.world.detail),
                self.explorer.world.steps)

    @property
    def counts(self):
        return {
            "states": self.explorer.seen_count, "boundaries": self.explorer.boundaries,
            "crashes": self.explorer.crashes, "events": self.explorer.events,
        }

    @property
    def nth_seen(self):
        return self.explorer.nth_seen

    @property
    def world_bytes(self):
        return sizeof(World)
