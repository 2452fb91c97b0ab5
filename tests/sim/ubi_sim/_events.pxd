"""What happens next in a world: requests, completions, mail and ticks in random order.

Every event is preceded by a boundary. A world that has had more events than its budget hangs.
"""

from ubi_sim._model cimport World

# One thing happens; False if halted, or if nothing could happen any more.
cdef bint any_event(World* world, bint requests) noexcept nogil
# Guests send what is left of their requests.
cdef void serve(World* world) noexcept nogil
# No more requests: all are answered, while errors go on as they do.
cdef void answer_all(World* world) noexcept nogil
# … and then, without errors, until nothing goes on; nothing is left of it.
cdef void settle(World* world) noexcept nogil
# Every hot stripe, through the engine; twice, as the first pass may hydrate it.
cdef void read_all(World* world) noexcept nogil
# A cell of every hot stripe.
cdef void write_all(World* world) noexcept nogil
# The kernel sends what was in flight again: same tags, same sectors.
cdef void reissue_all(World* world) noexcept nogil
