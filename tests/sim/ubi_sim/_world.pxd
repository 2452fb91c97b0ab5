"""Making a world from a seed: its features, its geometry, what is on its base."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from ubi_sim._model cimport World

# What a run is, besides its seed.
cdef struct Plan:
    uint32_t requests              # the guests send
    uint64_t skipped               # bit n: all but the nth, …
    uint32_t without               # features that the seed may not have
    uint32_t crash_one_in          # boundaries that are crashed at (0: none)
    uint32_t subsets               # power losses tried at one boundary
    int64_t only_boundary          # crash there alone, or −1
    int64_t only_branch            # … in this way alone, or −1
    uint32_t budget                # events until it is a hang
    uint32_t nth                   # the nth I/O of `nth_kind` fails (0: none)
    uint8_t nth_kind               # ActionKind
    uint8_t nth_for_good
    uint8_t small                  # ≤ 3 stripes; all subsets of ≤ 10 pending writes
    uint8_t blind                  # look from outside alone, not at the engines' counts
    uint8_t bug                    # WorldBug
    int32_t nth_errno              # or a Fault of _io.pxd

cdef void make_world(World* world, const Plan* plan, uint64_t seed) noexcept nogil
