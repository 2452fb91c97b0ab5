"""The engines, one step at a time, the mailbox and the ring, for tests written in Python.

Not part of the package.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from ublk_ubi._core cimport Actions, Event, Shared
from ublk_ubi._hydrator cimport Hydrator
from ublk_ubi._lifecycle cimport Lifecycle
from ublk_ubi._mailbox cimport Doorbell, Mailbox
from ublk_ubi._queue cimport Queue
from ublk_ubi._ring cimport Op, Ring

cdef class Engines:
    cdef Shared shared
    cdef Hydrator hydrator
    cdef Queue* queues
    cdef uint32_t latch_word
    cdef list memory               # bytearrays that the engines point into
    cdef object state_memory
    cdef object table_bytes
    cdef object page_bytes
    cdef Actions queue_actions     # each has room for the documented maximum and no more
    cdef Actions hydrator_actions
    cdef readonly uint32_t most_queue_actions
    cdef readonly uint32_t most_hydrator_actions
    cdef void* take(self, size_t length) except NULL
    cdef void init_hydrator(self, uint32_t buffers, uint32_t wanted) except *

cdef class LifecycleSteps:
    cdef Lifecycle lifecycle
    cdef readonly object pages
    cdef readonly object scratch
    cdef object table_bytes

cdef class MailboxBench:
    cdef Mailbox box
    cdef Doorbell bell
    cdef object slots

cdef class RingBench:
    cdef Ring ring
    cdef bint there
    cdef object ops
    cdef object registered
    cdef readonly object memory    # an area of `area` bytes for each kind of Memory
    cdef uint64_t address
    cdef readonly uint64_t area
