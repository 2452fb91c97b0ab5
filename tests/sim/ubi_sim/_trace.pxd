"""What happens, a readable line each. Callers look whether world.trace is there: off costs a test.

A line is the step's number, who, and what: cells count in the device (8 a stripe, hot or not).
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from ublk_ubi._core cimport Action
from ubi_sim._model cimport Mail, World

cdef void trace_text(World* world, const char* text) noexcept nogil
cdef void trace_number(World* world, const char* format_, uint64_t number) noexcept nogil
cdef void trace_world(World* world) noexcept nogil
cdef void trace_request(World* world, uint16_t queue, uint16_t tag) noexcept nogil
cdef void trace_end(World* world, uint16_t queue, uint16_t tag, int32_t result) noexcept nogil
cdef void trace_io(World* world, uint8_t owner, const Action* action) noexcept nogil
cdef void trace_io_end(World* world, uint8_t owner, const Action* action, int32_t result,
                       const char* how) noexcept nogil
cdef void trace_sent(World* world, uint8_t owner, const Action* action, bint lost) noexcept nogil
cdef void trace_taken(World* world, uint16_t queue, bint up, const Mail* mail) noexcept nogil
cdef void trace_host(World* world, uint8_t call) noexcept nogil
cdef void trace_violation(World* world, const char* name) noexcept nogil
