"""The simulator for Python: plans in, findings out."""

from libc.stdint cimport uint32_t, uint64_t, uint8_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from ublk_ubi._lifecycle cimport SCRATCH_BYTES
from ubi_sim._coverage cimport PAIRS
from ubi_sim._explore cimport Explorer, Seen, explore_seed
from ubi_sim._model cimport FINE, Trace, World
from ubi_sim._trace cimport trace_violation
from ubi_sim._world cimport Plan

VIOLATIONS = (
    "fine", "wrong data", "error without a fault", "flush succeeded after a failed fdatasync",
    "hang", "leak", "base refused", "base not refused", "counts differ", "not started",
    "action out of bounds", "not kept", "image still needed",
    "space not given back",
)


cdef class Simulator:
    """Runs seeds under plans; counts what it saw."""

    cdef Explorer explorer
    cdef Trace trace
    cdef uint32_t[PAIRS] counted
    cdef object trace_memory       # keeps the memory that the trace points into

    def __cinit__(self, *, uint32_t seen_bits=20):
        cdef Explorer* explorer = &self.explorer
        explorer.world = <World*>calloc(1, sizeof(World))
        explorer.saved = <World*>calloc(1, sizeof(World))
        explorer.spare = <World*>calloc(1, sizeof(World))
        explorer.media.hashes = <uint64_t*>calloc(1 << seen_bits, 8)
        explorer.processes.hashes = <uint64_t*>calloc(1 << seen_bits, 8)
        explorer.media.mask = explorer.processes.mask = (1 << seen_bits) - 1
        if (explorer.world == NULL or explorer.saved == NULL or explorer.spare == NULL
                or explorer.media.hashes == NULL or explorer.processes.hashes == NULL):
            raise MemoryError
        # One for the run, one for a crash's aftermath, one for a mistake in it.
        explorer.world.scratch = <uint8_t*>calloc(3, SCRATCH_BYTES)
        if explorer.world.scratch == NULL:
            raise MemoryError
        explorer.world.coverage = self.counted

    def __dealloc__(self):
        if self.explorer.world != NULL:
            free(self.explorer.world.scratch)
        free(self.explorer.world)
        free(self.explorer.saved)
        free(self.explorer.spare)
        free(self.explorer.media.hashes)
        free(self.explorer.processes.hashes)

    def trace_into(self, memory):
        """Write traces into this writable buffer: 8 bytes for the length, then text; None: off."""
        cdef uint8_t[::1] view
        self.trace_memory = memory
        self.explorer.world.trace = NULL
        if memory is None:
            return
        view = memory
        self.trace.length = <uint64_t*>&view[0]
        self.trace.length[0] = 0
        self.trace.text = <char*>&view[8]
        self.trace.capacity = view.shape[0] - 8
        self.explorer.world.trace = &self.trace

    def run(self, uint64_t seed, plan):
        """Run one seed under a plan (plans.Plan); None, or what went wrong."""
        cdef Plan* into = &self.explorer.plan
        cdef World* world = self.explorer.world
        cdef uint8_t* scratch = world.scratch
        memset(into, 0, sizeof(Plan))
        into.requests = plan.requests
        into.skipped = plan.skipped
        into.without = plan.without
        into.crash_one_in = plan.crash_one_in
        into.subsets = plan.subsets
        into.only_boundary = plan.only_boundary
        into.only_branch = plan.only_branch
        into.budget = plan.budget
        into.nth = plan.nth
        into.nth_kind = plan.nth_kind
        into.nth_for_good = plan.nth_for_good
        into.nth_errno = plan.nth_errno
        into.small = plan.small
        into.bug = plan.bug
        into.blind = plan.blind
        with nogil:
            explore_seed(&self.explorer, seed)
        world.scratch = scratch
        if world.violation == FINE:
            return None
        if world.trace != NULL:
            trace_violation(world, VIOLATIONS[world.violation].encode())
        return {
            "violation": VIOLATIONS[world.violation], "detail": list(world.detail),
            "boundary": self.explorer.boundaries - 1 if self.explorer.inside else -1,
            "branch": self.explorer.branch, "drawn": world.requests_drawn,
            "features": world.features,
        }

    @property
    def features(self):
        """Of the last run."""
        return self.explorer.world.features

    @property
    def nth_seen(self):
        """I/Os of the plan's kind that the last run had, in its main path."""
        return self.explorer.world.faults.nth_seen

    @property
    def counts(self):
        return {"crashes": self.explorer.crashes, "events": self.explorer.events}

    @property
    def pairs(self):
        """How often each pair of _coverage.pxd was seen."""
        return list(self.counted)

    def media(self):
        """Hashes of the media that power losses left, as little-endian 64-bit numbers."""
        return hashes(&self.explorer.media)

    def processes(self):
        """… of the states that killed processes left."""
        return hashes(&self.explorer.processes)


cdef bytes hashes(Seen* seen):
    cdef uint64_t i
    cdef bytearray out = bytearray()
    for i in range(seen.mask + 1):
        if seen.hashes[i] != 0:
            out += (<uint8_t*>&seen.hashes[i])[:8]
    return bytes(out)
