"""A disk with a volatile cache: base (image has no state). Reads see the cache; power loss does not.

A write is in the log from its submission until an fdatasync that began after it landed has ended. At
a power loss any subset of the log is on the medium, cell by cell and sector by sector.
A failed fdatasync drops some of what it should have written: reads still show it until it is
evicted, and every other open file is told of it once.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from ubi_sim._model cimport World

# The log entry of a write, by index; data from `values`, metadata from `payload` (count sectors).
cdef int disk_write(World* world, uint8_t kind, uint32_t first, uint32_t count,
                    const uint32_t* values, const uint8_t* payload) noexcept nogil
# It lands: as a whole, or (mask) in part.
cdef void disk_land(World* world, int entry, uint8_t mask) noexcept nogil
cdef void disk_forget(World* world, int entry) noexcept nogil
# An fdatasync that began when `order` writes had landed ends well.
cdef void disk_synced(World* world, uint64_t order) noexcept nogil
# … or fails, seen by open file `reporter`.
cdef void disk_sync_failed(World* world, uint64_t order, int reporter) noexcept nogil
# Dropped pages leave the cache: reads show what is on the medium.
cdef void disk_evict(World* world) noexcept nogil
cdef void disk_power_loss(World* world, uint64_t subset, bint torn) noexcept nogil
cdef int disk_pending(World* world) noexcept nogil
cdef uint64_t disk_hash(World* world) noexcept nogil
