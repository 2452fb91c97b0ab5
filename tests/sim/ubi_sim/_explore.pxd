"""Runs of a world, with crashes at every boundary.

A run opens a base (or creates or adopts it), serves requests, stops, and opens again. At a boundary
(before every event, between a step's actions, around every action of an opening or a stop) the
world is copied away, crashed, and what an operator does then is done: open, look at every cell,
maybe go on, and maybe be crashed again at any boundary of that; then it is copied back.

    branch 0     process crash
    branch 1     the base goes to another host, where the world has one; else as below
    branch 2 …   power loss: any subset of the pending writes, parts of them; in a small world with
                 few pending writes every subset
"""

from libc.stdint cimport int64_t, uint8_t, uint64_t

from ubi_sim._model cimport World
from ubi_sim._world cimport Plan

# Hashes of states that were seen; full, it counts no more.
cdef struct Seen:
    uint64_t* hashes
    uint64_t mask
    uint64_t count

cdef struct Explorer:
    Plan plan
    World* world
    World* saved                   # as it was at the boundary
    World* spare                   # for mistakes
    uint64_t seed
    Seen media                     # after a power loss
    Seen processes                 # after a process crash: medium, cache, table
    uint64_t boundaries            # so far in this run
    uint64_t crashes               # in all runs
    uint64_t events
    int64_t fuse                   # boundaries until the next crash of a chain; 0: none
    uint8_t inside                 # a crash's aftermath
    uint8_t exploring              # boundaries are crashed at
    int64_t branch                 # the one that is looked at, or −1

cdef void explore_seed(Explorer* explorer, uint64_t seed) noexcept nogil
