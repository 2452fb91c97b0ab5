"""The model disk; see _disk.pxd."""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from ublk_ubi._atomic cimport ensure
from ubi_sim._model cimport (
    CHUNKS, HOT_CELLS, LOG_CHUNK, LOG_DATA, LOG_FREE, LOG_META, MAX_LOG, MAX_META_LOG, META_BYTES,
    META_SECTORS, NO_PAYLOAD, SYNC_FILES, Disk, LogEntry, World, next_random,
)


cdef int disk_write(World* world, uint8_t kind, uint32_t first, uint32_t count,
                    const uint32_t* values, const uint8_t* payload) noexcept nogil:
    cdef Disk* disk = &world.disk
    cdef LogEntry* entry
    cdef int i, slot = -1
    for i in range(MAX_LOG):
        if disk.log[i].kind == LOG_FREE:
            slot = i
            break
    ensure(slot >= 0, b"the log has room for every write of a world")
    entry = &disk.log[slot]
    memset(entry, 0, sizeof(LogEntry))
    entry.kind = kind
    entry.first = <uint16_t>first
    entry.count = <uint16_t>count
    entry.payload = NO_PAYLOAD
    if kind == LOG_DATA:
        memcpy(entry.values, values, count * sizeof(uint32_t))
    elif kind == LOG_META:
        for i in range(MAX_META_LOG):
            if not disk.meta_log_used[i]:
                entry.payload = <uint8_t>i
                disk.meta_log_used[i] = 1
                break
        ensure(entry.payload != NO_PAYLOAD, b"the log has room for every metadata write")
        memcpy(disk.meta_log[entry.payload], payload, count * 512)
    return slot


cdef void disk_forget(World* world, int index) noexcept nogil:
    cdef LogEntry* entry = &world.disk.log[index]
    if entry.payload != NO_PAYLOAD:
        world.disk.meta_log_used[entry.payload] = 0
    entry.kind = LOG_FREE


cdef void apply(Disk* disk, LogEntry* entry, uint8_t mask, uint32_t* data, uint8_t* meta,
                uint8_t* chunks) noexcept nogil:
    """Put the parts in `mask` of an entry on a cache or a medium."""
    cdef int i
    if entry.kind == LOG_CHUNK:
        # In part: the MiB still holds something.
        if mask == 0xff:
            chunks[entry.first] = 0
            zero_chunk(entry.first, meta)
        return
    for i in range(entry.count):
        if not (mask >> i) & 1:
            continue
        if entry.kind == LOG_DATA:
            data[entry.first + i] = entry.values[i]
        else:
            memcpy(meta + (entry.first + i) * 512, &disk.meta_log[entry.payload][i * 512], 512)


cdef void zero_chunk(uint32_t chunk, uint8_t* meta) noexcept nogil:
    """The header pages are in the first MiB, the slots in the sixth."""
    if chunk == 0:
        memset(meta, 0, META_BYTES // 2)
    elif chunk == 5:
        memset(meta + META_BYTES // 2, 0, META_BYTES // 2)


cdef void disk_land(World* world, int index, uint8_t mask) noexcept nogil:
    cdef Disk* disk = &world.disk
    cdef LogEntry* entry = &disk.log[index]
    ensure(entry.kind != LOG_FREE and entry.order == 0, b"a write lands once")
    disk.landed += 1
    entry.order = disk.landed
    entry.mask = mask
    apply(disk, entry, mask, disk.cache, disk.meta_cache, disk.chunk_cache)


cdef LogEntry* oldest(Disk* disk, uint64_t above, uint64_t up_to, bint with_lost) noexcept nogil:
    """The landed entry with the lowest order in (above, up_to]."""
    cdef LogEntry* found = NULL
    cdef LogEntry* entry
    cdef int i
    for i in range(MAX_LOG):
        entry = &disk.log[i]
        if entry.kind == LOG_FREE or entry.order == 0 or entry.order > up_to:
            continue
        if entry.order <= above or (entry.lost and not with_lost):
            continue
        if found == NULL or entry.order < found.order:
            found = entry
    return found


cdef void disk_synced(World* world, uint64_t order) noexcept nogil:
    cdef Disk* disk = &world.disk
    cdef LogEntry* entry = oldest(disk, 0, order, False)
    while entry != NULL:
        apply(disk, entry, entry.mask, disk.durable, disk.meta_durable, disk.chunk_durable)
        disk_forget(world, <int>(entry - disk.log))
        entry = oldest(disk, 0, order, False)


cdef void disk_sync_failed(World* world, uint64_t order, int reporter) noexcept nogil:
    cdef Disk* disk = &world.disk
    cdef LogEntry* entry
    cdef int i
    for i in range(MAX_LOG):
        entry = &disk.log[i]
        if entry.kind != LOG_FREE and entry.order != 0 and entry.order <= order:
            if next_random(world) & 1:
                entry.lost = 1
    for i in range(SYNC_FILES):
        if i != reporter:
            disk.error_pending[i] = 1


cdef void disk_evict(World* world) noexcept nogil:
    cdef Disk* disk = &world.disk
    cdef LogEntry* entry
    cdef uint64_t order = 0
    cdef int i
    memcpy(disk.cache, disk.durable, sizeof(disk.cache))
    memcpy(disk.meta_cache, disk.meta_durable, META_BYTES)
    memcpy(disk.chunk_cache, disk.chunk_durable, CHUNKS)
    for i in range(MAX_LOG):
        if disk.log[i].lost:
            disk.log[i].lost = 0
            disk_forget(world, i)
    entry = oldest(disk, order, disk.landed, False)
    while entry != NULL:
        apply(disk, entry, entry.mask, disk.cache, disk.meta_cache, disk.chunk_cache)
        order = entry.order
        entry = oldest(disk, order, disk.landed, False)


cdef void disk_power_loss(World* world, uint64_t subset, bint torn) noexcept nogil:
    """Bit n of `subset`: the n-th write of the log is on the medium; torn: some of its parts are."""
    cdef Disk* disk = &world.disk
    cdef LogEntry* entry
    cdef uint64_t order = 0
    cdef int i, n = 0
    # What was in flight lands in any order after the rest.
    for i in range(MAX_LOG):
        if disk.log[i].kind != LOG_FREE and disk.log[i].order == 0:
            disk.landed += 1
            disk.log[i].order = disk.landed
            disk.log[i].mask = 0xff
    entry = oldest(disk, order, disk.landed, True)
    while entry != NULL:
        order = entry.order
        if torn:
            apply(disk, entry, entry.mask & <uint8_t>next_random(world), disk.durable,
                  disk.meta_durable, disk.chunk_durable)
        elif (subset >> n) & 1:
            apply(disk, entry, entry.mask, disk.durable, disk.meta_durable, disk.chunk_durable)
        n += 1
        entry = oldest(disk, order, disk.landed, True)
    for i in range(MAX_LOG):
        if disk.log[i].kind != LOG_FREE:
            disk_forget(world, i)
    memcpy(disk.cache, disk.durable, sizeof(disk.cache))
    memcpy(disk.meta_cache, disk.meta_durable, META_BYTES)
    memcpy(disk.chunk_cache, disk.chunk_durable, CHUNKS)
    memset(disk.error_pending, 0, SYNC_FILES)


cdef int disk_pending(World* world) noexcept nogil:
    """Writes that a power loss may take or leave."""
    cdef int i, count = 0
    for i in range(MAX_LOG):
        if world.disk.log[i].kind != LOG_FREE:
            count += 1
    return count


cdef uint64_t mix(uint64_t hash_, const uint8_t* data, uint32_t length) noexcept nogil:
    """FNV-1a over 8 bytes at a time; `length` is a multiple of 8."""
    cdef const uint64_t* words = <const uint64_t*>data
    cdef uint32_t i
    for i in range(length // 8):
        hash_ = (hash_ ^ words[i]) * <uint64_t>0x100000001b3
        hash_ ^= hash_ >> 29
    return hash_


cdef uint64_t disk_hash(World* world) noexcept nogil:
    """What is durable, as a number."""
    cdef Disk* disk = &world.disk
    cdef uint64_t hash_ = <uint64_t>0xcbf29ce484222325
    hash_ = mix(hash_, <const uint8_t*>disk.durable, sizeof(disk.durable))
    hash_ = mix(hash_, disk.meta_durable, META_BYTES)
    return mix(hash_, disk.chunk_durable, CHUNKS)
