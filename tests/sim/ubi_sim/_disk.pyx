"""The model disk; see _disk.pxd."""

from libc.stdint cimport uint16_t, uint32_t, uint64_t, uint8_t
from libc.string cimport memcpy, memmove, memset

from ublk_ubi._atomic cimport ensure
from ubi_sim._model cimport (
    CHUNKS, LOG_CHUNK, LOG_DATA, LOG_FREE, LOG_META, MAX_LOG, MAX_META_LOG, META_BYTES, NO_PAYLOAD,
    SLOT_SECTOR, SYNC_FILES, WHOLE, WITH_TORN_SLOTS, Disk, LogEntry, World, below, has, next_random,
    one_in,
)


# -- the log -------------------------------------------------------------------------------------

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
    elif kind == LOG_META and payload != NULL:
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


cdef void apply(Disk* disk, LogEntry* entry, uint16_t mask, uint32_t* data, uint8_t* meta,
                uint8_t* chunks) noexcept nogil:
    """Put the parts in `mask` of an entry on a cache or a medium."""
    cdef int i
    if entry.kind == LOG_CHUNK:
        # In part: the MiB still holds something.
        if mask == WHOLE:
            chunks[entry.first] = 0
            zero_chunk(entry.first, meta)
        return
    for i in range(entry.count):
        if not (mask >> i) & 1:
            continue
        if entry.kind == LOG_DATA:
            data[entry.first + i] = entry.values[i]
        elif entry.payload == NO_PAYLOAD:
            memset(meta + (entry.first + i) * 512, 0, 512)
        else:
            memcpy(meta + (entry.first + i) * 512, &disk.meta_log[entry.payload][i * 512], 512)


cdef void zero_chunk(uint32_t chunk, uint8_t* meta) noexcept nogil:
    """The header pages are in the first MiB, the slots in the sixth."""
    if chunk == 0:
        memset(meta, 0, META_BYTES // 2)
    elif chunk == 5:
        memset(meta + META_BYTES // 2, 0, META_BYTES // 2)


cdef inline void to_medium(Disk* disk, LogEntry* entry, uint16_t mask) noexcept nogil:
    apply(disk, entry, mask, disk.durable, disk.meta_durable, disk.chunk_durable)


cdef inline void to_cache(Disk* disk, LogEntry* entry, uint16_t mask) noexcept nogil:
    apply(disk, entry, mask, disk.cache, disk.meta_cache, disk.chunk_cache)


cdef void reload_cache(Disk* disk) noexcept nogil:
    memcpy(disk.cache, disk.durable, sizeof(disk.cache))
    memcpy(disk.meta_cache, disk.meta_durable, META_BYTES)
    memcpy(disk.chunk_cache, disk.chunk_durable, CHUNKS)


cdef void disk_land(World* world, int index, uint16_t mask) noexcept nogil:
    cdef Disk* disk = &world.disk
    cdef LogEntry* entry = &disk.log[index]
    ensure(entry.kind != LOG_FREE and entry.order == 0, b"a write lands once")
    disk.landed += 1
    entry.order = disk.landed
    entry.mask = mask
    to_cache(disk, entry, mask)


cdef void disk_land_part(World* world, int index, uint32_t count, bint dsync) noexcept nogil:
    cdef Disk* disk = &world.disk
    cdef LogEntry* entry = &disk.log[index]
    cdef uint8_t* payload = NULL
    cdef int part
    ensure(entry.kind == LOG_DATA or entry.kind == LOG_META, b"only these have parts")
    ensure(entry.order == 0 and count < entry.count, b"a part lands of what is in flight")
    if entry.payload != NO_PAYLOAD:
        payload = disk.meta_log[entry.payload]
    part = disk_write(world, entry.kind, entry.first, count, entry.values, payload)
    disk_land(world, part, WHOLE)
    if dsync:
        disk_dsync(world, part)
    entry.first += <uint16_t>count
    entry.count -= <uint16_t>count
    if entry.kind == LOG_DATA:
        memmove(entry.values, &entry.values[count], entry.count * sizeof(uint32_t))
    elif payload != NULL:
        memmove(payload, payload + count * 512, entry.count * 512)


cdef bint disk_has_room(const World* world) noexcept nogil:
    cdef int i, used = 0, meta_used = 0
    for i in range(MAX_LOG):
        used += world.disk.log[i].kind != LOG_FREE
    for i in range(MAX_META_LOG):
        meta_used += world.disk.meta_log_used[i]
    return used < MAX_LOG // 2 and meta_used < MAX_META_LOG // 2


cdef LogEntry* oldest(Disk* disk, uint64_t above, uint64_t up_to) noexcept nogil:
    """The landed entry with the lowest order in (above, up_to]."""
    cdef LogEntry* found = NULL
    cdef LogEntry* entry
    cdef int i
    for i in range(MAX_LOG):
        entry = &disk.log[i]
        if entry.kind == LOG_FREE or entry.order <= above or entry.order > up_to:
            continue
        if found == NULL or entry.order < found.order:
            found = entry
    return found


# -- durability ----------------------------------------------------------------------------------

cdef void disk_synced(World* world, uint64_t order) noexcept nogil:
    cdef Disk* disk = &world.disk
    cdef LogEntry* entry = oldest(disk, 0, order)
    while entry != NULL:
        to_medium(disk, entry, entry.mask)
        disk_forget(world, <int>(entry - disk.log))
        entry = oldest(disk, 0, order)


cdef void disk_dsync(World* world, int index) noexcept nogil:
    """Older writes to these cells cannot come back: their parts leave the log."""
    cdef Disk* disk = &world.disk
    cdef LogEntry* entry = &disk.log[index]
    cdef LogEntry* older
    cdef uint32_t cell
    cdef int i
    to_medium(disk, entry, entry.mask)
    for i in range(MAX_LOG):
        older = &disk.log[i]
        if older.kind != LOG_DATA or older.order == 0 or older.order >= entry.order:
            continue
        for cell in range(entry.first, <uint32_t>(entry.first + entry.count)):
            if older.first <= cell < <uint32_t>(older.first + older.count):
                older.mask &= <uint16_t>~(1 << (cell - older.first))
    disk_forget(world, index)


cdef void disk_sync_failed(World* world, uint64_t order, int reporter) noexcept nogil:
    """Half of it is dropped: some parts reached the medium, the rest is in the cache alone."""
    cdef Disk* disk = &world.disk
    cdef uint64_t above = 0
    cdef LogEntry* entry = oldest(disk, above, order)
    cdef int i
    while entry != NULL:
        above = entry.order
        if next_random(world) & 1:
            to_medium(disk, entry, entry.mask & <uint16_t>next_random(world))
            disk_forget(world, <int>(entry - disk.log))
        entry = oldest(disk, above, order)
    # A lost page is told to every open file once; a flush that the disk failed, to who asked.
    if not one_in(world, 3):
        for i in range(SYNC_FILES):
            if i != reporter:
                disk.error_pending[i] = 1


cdef void disk_evict(World* world) noexcept nogil:
    cdef Disk* disk = &world.disk
    cdef uint64_t order = 0
    cdef LogEntry* entry
    reload_cache(disk)
    entry = oldest(disk, order, disk.landed)
    while entry != NULL:
        to_cache(disk, entry, entry.mask)
        order = entry.order
        entry = oldest(disk, order, disk.landed)


# -- power loss ----------------------------------------------------------------------------------

cdef void tear_slot(World* world, LogEntry* entry) noexcept nogil:
    """Half a sector of the new slot, half of the old."""
    cdef uint32_t cut = 8 * (1 + below(world, 62))
    cdef uint8_t* sector = world.disk.meta_durable + entry.first * 512
    if entry.payload == NO_PAYLOAD:
        memset(sector, 0, cut)
    else:
        memcpy(sector, world.disk.meta_log[entry.payload], cut)
    world.disk.torn_inside = 1


cdef void take_part(World* world, LogEntry* entry) noexcept nogil:
    """None of it, all of it, or any part of it."""
    cdef uint32_t choice = below(world, 4)
    if choice == 0:
        return
    if choice == 1:
        to_medium(&world.disk, entry, entry.mask)
    elif (choice == 2 and entry.kind == LOG_META and entry.first >= SLOT_SECTOR
            and has(world, WITH_TORN_SLOTS)):
        tear_slot(world, entry)
    else:
        to_medium(&world.disk, entry, entry.mask & <uint16_t>next_random(world))


cdef void disk_power_loss(World* world, uint64_t subset, bint torn) noexcept nogil:
    cdef Disk* disk = &world.disk
    cdef LogEntry* entry
    cdef uint64_t order = 0
    cdef int i, n = 0
    # What was in flight lands after the rest; no two writes in flight overlap.
    for i in range(MAX_LOG):
        if disk.log[i].kind != LOG_FREE and disk.log[i].order == 0:
            disk.landed += 1
            disk.log[i].order = disk.landed
            disk.log[i].mask = WHOLE
    entry = oldest(disk, order, disk.landed)
    while entry != NULL:
        order = entry.order
        if torn:
            take_part(world, entry)
        elif (subset >> n) & 1:
            to_medium(disk, entry, entry.mask)
        n += 1
        entry = oldest(disk, order, disk.landed)
    for i in range(MAX_LOG):
        if disk.log[i].kind != LOG_FREE:
            disk_forget(world, i)
    reload_cache(disk)
    memset(disk.error_pending, 0, SYNC_FILES)


cdef int disk_pending(World* world) noexcept nogil:
    cdef int i, count = 0
    for i in range(MAX_LOG):
        if world.disk.log[i].kind != LOG_FREE:
            count += 1
    return count


# -- what a state is known by --------------------------------------------------------------------

cdef uint64_t mix(uint64_t hash_, const uint8_t* data, uint32_t length) noexcept nogil:
    """FNV-1a over 8 bytes at a time; `length` is a multiple of 8."""
    cdef const uint64_t* words = <const uint64_t*>data
    cdef uint32_t i
    for i in range(length // 8):
        hash_ = (hash_ ^ words[i]) * <uint64_t>0x100000001b3
        hash_ ^= hash_ >> 29
    return hash_


cdef uint64_t disk_hash(World* world) noexcept nogil:
    cdef Disk* disk = &world.disk
    cdef uint64_t hash_ = <uint64_t>0xcbf29ce484222325
    hash_ = mix(hash_, <const uint8_t*>disk.durable, sizeof(disk.durable))
    hash_ = mix(hash_, disk.meta_durable, META_BYTES)
    return mix(hash_, disk.chunk_durable, CHUNKS)


cdef uint64_t disk_cache_hash(World* world) noexcept nogil:
    cdef Disk* disk = &world.disk
    cdef uint64_t hash_ = disk_hash(world)
    hash_ = mix(hash_, <const uint8_t*>disk.cache, sizeof(disk.cache))
    hash_ = mix(hash_, disk.meta_cache, META_BYTES)
    return mix(hash_, disk.chunk_cache, CHUNKS)
