"""A running device, for the control plane: memory, threads, counters. No I/O passes here."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from ublk_ubi._opener cimport Opener
from ublk_ubi._threads cimport Device, HydratorThread, QueueThread, ThreadBase

cdef struct Block:
    void* address
    size_t length

cdef class DataPlane:
    cdef Device device
    cdef HydratorThread hydrator
    cdef QueueThread* queues       # [device.shared.queues]
    cdef Opener opener             # owns pages and table
    cdef Block* blocks             # what __dealloc__ unmaps
    cdef uint32_t block_count
    cdef uint32_t block_capacity
    cdef size_t descriptors_length  # bytes that each queue maps of ublkc
    cdef bint zero_copy
    cdef list threads
    cdef readonly int notify_fd
    cdef void* take(self, size_t length) except NULL
    cdef void init_mailboxes(self) except *
    cdef void init_base(self, ThreadBase* base, uint32_t op_count, uint32_t action_count) except *
    cdef void init_hydrator(self, uint32_t buffers) except *
    cdef void init_queue(self, uint32_t index) except *
