"""The machine around the engines: their memory, their I/O on the model disk, their mail."""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from ublk_ubi._core cimport Action, Event
from ubi_sim._model cimport World

# Memory of a fresh daemon process: engines, buffers, mail. Base, table and guests are kept.
cdef void machine_boot(World* world) noexcept nogil
# After the base is open: queues and hydrator on what was found.
cdef void machine_start_engines(World* world) noexcept nogil
cdef void machine_queue_event(World* world, uint16_t queue, const Event* event) noexcept nogil
cdef void machine_hydrator_event(World* world, const Event* event) noexcept nogil
# A lifecycle's action that is I/O; returns its slot in world.io.
cdef int machine_submit(World* world, uint8_t owner, const Action* action) noexcept nogil
# End an I/O (fault: -errno, or 0) and tell its owner; for the lifecycle: returns the result.
cdef int32_t machine_complete(World* world, int index, int32_t fault) noexcept nogil
cdef void machine_request(World* world, uint16_t queue, uint16_t tag) noexcept nogil
cdef bint machine_take_mail(World* world, int box) noexcept nogil
cdef void machine_check_counts(World* world) noexcept nogil
cdef void machine_check_idle(World* world) noexcept nogil
