"""A disk with a volatile cache: base (an image has no state). Reads see the cache, power loss not.

A write is in the log from its submission until an fdatasync that began after it landed has ended,
or (dsync) until it has ended itself. At a power loss any subset of the log is on the medium, cell
by cell and sector by sector; a slot's sector, which has a checksum, may be torn inside.
A failed fdatasync drops some of what it should have written: reads still show it until it is
evicted, and every other open file is told of it once, or none.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from ubi_sim._model cimport World

# The log entry of a write, by index; data from `values`, metadata from `payload` (count sectors;
# NULL: zeros).
cdef int disk_write(World* world, uint8_t kind, uint32_t first, uint32_t count,
                    const uint32_t* values, const uint8_t* payload) noexcept nogil
# It lands: as a whole, or (mask) in part.
cdef void disk_land(World* world, int index, uint16_t mask) noexcept nogil
# The first `count` of a write that is in flight land alone; the rest is still in flight.
cdef void disk_land_part(World* world, int index, uint32_t count, bint dsync) noexcept nogil
# There is room in the log for some writes that land in parts.
cdef bint disk_has_room(const World* world) noexcept nogil
cdef void disk_forget(World* world, int index) noexcept nogil
# A landed data write is durable by itself (RWF_DSYNC).
cdef void disk_dsync(World* world, int index) noexcept nogil
# An fdatasync that began when `order` writes had landed ends well.
cdef void disk_synced(World* world, uint64_t order) noexcept nogil
# … or fails, seen by open file `reporter`.
cdef void disk_sync_failed(World* world, uint64_t order, int reporter) noexcept nogil
# Dropped pages leave the cache: reads show what is on the medium.
cdef void disk_evict(World* world) noexcept nogil
# Bit n of `subset`: the nth write of the log is on the medium; `torn`: of each write any part.
cdef void disk_power_loss(World* world, uint64_t subset, bint torn) noexcept nogil
# Writes that a power loss may take or leave.
cdef int disk_pending(World* world) noexcept nogil
# What survives a power loss, and what survives the process, as numbers.
cdef uint64_t disk_hash(World* world) noexcept nogil
cdef uint64_t disk_cache_hash(World* world) noexcept nogil
