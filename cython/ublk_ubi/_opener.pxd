"""Opening and closing a base, for the control plane: the lifecycle engine on its own ring."""

from libc.stdint cimport uint8_t, uint64_t

from ublk_ubi._lifecycle cimport Lifecycle

cdef class Opener:
    cdef Lifecycle lifecycle
    cdef uint8_t* pages            # the shadow header pages; the hydrator's while the device runs
    cdef uint8_t* scratch
    cdef size_t pages_length
    cdef object table              # what the host mapped; keeps lifecycle.table alive
    cdef readonly int base_fd
    cdef readonly int sync_fd
    cdef object lock
    cdef bint ended
    cdef run(self, object host, int event_kind, uint64_t device_bytes=*)
    cdef void call_host(self, object host, int call) except *
