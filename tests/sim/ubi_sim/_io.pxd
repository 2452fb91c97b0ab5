"""The engines' I/O on the model world: image, base, and the memory between.

- An I/O in flight may land (be seen, survive the process) before it ends, and ends in any order.
- A read shows, cell by cell, what was there when it began or when it ended.
- A write lands with what its memory holds when it lands. If it fails, any part of it has landed.
- EAGAIN is tried again, a short transfer continued, one of no bytes is EIO: as _ring does it, whose
  conformance is tested in tests/unit/test_ring.py. In between it may be crashed.
- An action outside image, base or the memory that it names is a violation.
"""

from libc.stdint cimport int32_t, uint8_t

from ublk_ubi._core cimport Action
from ubi_sim._model cimport World

# Ways to fail besides -errno.
cdef enum Fault:
    FAULT_SHORT = 1000
    FAULT_NOTHING = 1001

# Start it; its slot in world.io.
cdef int io_submit(World* world, uint8_t owner, const Action* action) noexcept nogil
# A write in flight reaches the cache; its end comes later.
cdef void io_land(World* world, int index) noexcept nogil
# Of a discard that is asked for any part happens.
cdef void io_land_discard(World* world, const Action* action) noexcept nogil
# It ends, well or not: True, and what its owner is to be told. Or it goes on: False.
cdef bint io_attempt(World* world, int index, int32_t* result) noexcept nogil
# -errno if a host call is to fail, or 0.
cdef int32_t host_fault(World* world) noexcept nogil
