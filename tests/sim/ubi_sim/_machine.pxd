"""The machine around the engines: their memory, events, actions and mail.

- A step's actions are carried out one after the other; a crash may come between any two of them.
- A doorbell may be lost; the tick drains the mail all the same.
- After every step the hydrator's counts, the states and the table agree; when all is answered,
  nothing is left of it.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t

from ublk_ubi._core cimport Event
from ubi_sim._model cimport World

# Memory of a fresh daemon process: engines, buffers, mail. Base, table and guests are kept.
cdef void machine_boot(World* world) noexcept nogil
# After the base is open: queues and hydrator on what was found.
cdef void machine_start_engines(World* world) noexcept nogil
cdef void machine_queue_event(World* world, uint16_t queue, const Event* event) noexcept nogil
# START, STOP or TICK.
cdef void machine_hydrator_event(World* world, uint8_t kind) noexcept nogil
# Background hydration begins, or pauses; it may copy so many stripes.
cdef void machine_hydration(World* world, bint on, uint32_t stripes) noexcept nogil
# The image is changed from now on, and the engines know.
cdef void machine_lose_image(World* world) noexcept nogil
# An I/O ends, well or not, and its owner is told; or it goes on.
cdef void machine_complete(World* world, int index) noexcept nogil
# Send world.guests[queue][tag] to its queue.
cdef void machine_request(World* world, uint16_t queue, uint16_t tag) noexcept nogil
# One message of box 0, 1 (to the hydrator) or 2, 3 (to a queue) whose bell rang.
cdef bint machine_take_mail(World* world, int box_index) noexcept nogil
# All requests are answered and nothing goes on: what must hold then.
cdef void machine_check_idle(World* world) noexcept nogil
