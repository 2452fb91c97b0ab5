"""The engines' I/O on the model world: image, base, and the memory between.

- An I/O in flight may land (be seen, survive the process) before it ends, and ends in any order.
- A read shows, cell by cell, what was there when it began or when it ended.
- A write lands with what its memory holds when it lands. If it fails, any part of it has landed.
- An action outside image, base or the memory that it names is a violation.
"""

from libc.stdint cimport int32_t, uint8_t

from ublk_ubi._core cimport Action
from ubi_sim._model cimport World

# Start it; its slot in world.io.
cdef int io_submit(World* world, uint8_t owner, const Action* action) noexcept nogil
# A write in flight reaches the cache; its end comes later.
cdef void io_land(World* world, int index) noexcept nogil
# End it (fault: -errno, or 0); what its owner is to be told.
cdef int32_t io_end(World* world, int index, int32_t fault) noexcept nogil
# -errno if an I/O of this ActionKind is to fail, or 0.
cdef int32_t io_fault(World* world, uint8_t kind) noexcept nogil
