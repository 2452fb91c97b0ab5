"""What is around a base besides its disk: two hosts' tables, boots, and what an operator asks for.

The host calls do what ublk_ubi.table.TableHost and the daemon do. What an opening must come to is
told from the base's slots and the tables, by rules of its own: the engine is compared with it.
"""

from libc.stdint cimport int32_t, uint8_t

from ublk_ubi._format cimport Slot
from ublk_ubi._lifecycle cimport LifecycleOptions
from ubi_sim._model cimport Table, World

# The magic is there: creation or adoption has come that far, or bdev_ubi made the disk.
cdef bint has_magic(const World* world) noexcept nogil
# The slot that counts, or NULL.
cdef Slot* current_slot(const World* world) noexcept nogil
cdef bint slots_zero(const World* world) noexcept nogil
# The table is there, under this disk's UUID.
cdef bint is_of(const Table* table, const Slot* slot) noexcept nogil
# 0 or -errno.
cdef int32_t host_call(World* world, uint8_t call) noexcept nogil
# What an operator asks for who wants this base up, and knows what it is.
cdef void host_options(World* world, LifecycleOptions* options) noexcept nogil
# A Refusal: what such an opening must come to.
cdef uint8_t expected_refusal(World* world) noexcept nogil
# This host boots: its /run is empty.
cdef void host_boot(World* world) noexcept nogil
