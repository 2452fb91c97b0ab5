"""Runs of a world: a random guest, every completion in any order, crashes at every boundary.

A run opens a base (or creates it), serves requests, stops, and looks again after each crash:

    boundary   before every event and between the actions of opening and stopping: the world is
               copied away, crashed, opened anew, read in full, maybe run on and crashed again,
               and copied back
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from ubi_sim._model cimport World

cdef enum:
    MAX_NESTING = 3

cdef struct Plan:
    uint32_t requests              # the guest sends
    uint32_t crash_one_in          # boundaries that are crashed at (0: none)
    uint32_t subsets               # power losses tried at one boundary, at most
    uint32_t chain_one_in          # crashes after which it runs on and crashes again
    uint32_t fault_one_in
    uint32_t nth
    uint32_t steps                 # bound of a run
    uint8_t nth_kind
    uint8_t nth_for_good
    uint8_t syncs_fail
    uint8_t crash_opening          # crash between the actions of the first opening too
    uint8_t small                  # a world for exhaustive subsets
    uint8_t trace
    uint8_t bug
    int32_t nth_errno

cdef struct Explorer:
    Plan plan
    World* world
    World* saved                   # [MAX_NESTING]
    uint8_t* scratch               # [MAX_NESTING + 1] × SCRATCH_BYTES
    uint64_t* seen                 # hash set of durable states
    uint64_t seen_mask
    uint64_t seen_count
    uint64_t boundaries
    uint64_t crashes
    uint64_t events
    uint32_t nesting
    uint32_t nth_seen              # I/Os of the plan's kind that the last run had

cdef void run_seed(Explorer* explorer, uint64_t seed) noexcept nogil
