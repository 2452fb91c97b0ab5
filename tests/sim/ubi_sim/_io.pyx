"""I/O on the model world; see _io.pxd."""

from libc.errno cimport EAGAIN, EBADF, EIO, ENOSPC
from libc.stdint cimport int32_t, uint16_t, uint32_t, uint64_t, uint8_t
from libc.string cimport memcpy, memset

from ublk_ubi._atomic cimport ensure
from ublk_ubi._core cimport (
    ACT_DISCARD_BASE, ACT_HOST, ACT_READ_BASE, ACT_READ_IMAGE, ACT_SYNC_BASE, ACT_WRITE_BASE,
    ACT_ZERO_BASE, DATA_OFFSET, MEM_PAGE, MEM_REQUEST, MEM_SCRATCH, MEM_STRIPE, OP_WRITE, PAGE,
    Action,
)
from ublk_ubi._format cimport SLOT_OFFSET, all_zero
from ublk_ubi._hydrator cimport ROUND_IDLE, ROUND_WRITE_PAGES
from ublk_ubi._lifecycle cimport PHASE_GROW_FIRST_SYNC, PHASE_GROW_SYNC, SCRATCH_BYTES
from ubi_sim._disk cimport (
    disk_dsync, disk_forget, disk_has_room, disk_land, disk_land_part, disk_sync_failed,
    disk_synced, disk_write,
)
from ubi_sim._model cimport (
    BAD_ACTION, CELLS, CELL_BYTES, CHANGED_VALUE, LOG_CHUNK, LOG_DATA, LOG_META, MAX_IO, MAX_QUEUES,
    MAX_RETRIES, META_BYTES, OWNER_HYDRATOR, OWNER_LIFECYCLE, OWNER_NOBODY, STRIPE_BYTES, WHOLE,
    WITH_FAULTS, WITH_SYNC_FAULTS, Faults, GuestRequest, Io, World, below, cell_bits, cell_count,
    has, hot_index, image_value, next_random, one_in, violate,
)
from ubi_sim._oracle cimport oracle_fault, oracle_sync_failed, written_value
from ubi_sim._trace cimport trace_io, trace_io_end


# -- where an I/O goes ---------------------------------------------------------------------------

cdef int data_cell(World* world, uint64_t offset) noexcept nogil:
    """The hot cell of a byte of the device, or −1."""
    cdef int hot = hot_index(world, <uint32_t>(offset // STRIPE_BYTES))
    if hot < 0:
        return -1
    return hot * CELLS + <int>(offset % STRIPE_BYTES // CELL_BYTES)


cdef int meta_sector(uint64_t offset) noexcept nogil:
    """The metadata sector of a byte of the base: two header pages, then the slots' two; or −1."""
    if offset < META_BYTES // 2:
        return <int>(offset // 512)
    if SLOT_OFFSET <= offset < SLOT_OFFSET + META_BYTES // 2:
        return <int>((META_BYTES // 2 + offset - SLOT_OFFSET) // 512)
    return -1


cdef uint32_t* data_memory(World* world, uint8_t owner, const Action* action) noexcept nogil:
    if action.memory == MEM_REQUEST:
        return world.request_data[owner][action.index]
    ensure(action.memory == MEM_STRIPE, b"data is in a request or in a stripe buffer")
    return world.stripe_data[action.index]


cdef uint8_t* meta_memory(World* world, const Action* action) noexcept nogil:
    if action.memory == MEM_PAGE:
        return world.engines.pages + action.index * PAGE
    ensure(action.memory == MEM_SCRATCH, b"metadata is in a page or in scratch memory")
    return world.scratch + action.index


cdef bint discard_in_bounds(World* world, uint64_t offset, uint32_t length) noexcept nogil:
    """Whole cells of stripes that follow one another."""
    cdef int first = data_cell(world, offset)
    cdef uint32_t count = length // CELL_BYTES
    return (count > 0 and first >= 0 and first + count <= cell_count(world)
            and data_cell(world, offset + length - CELL_BYTES) == <int>(first + count - 1))


cdef bint in_bounds(World* world, uint8_t owner, const Action* action) noexcept nogil:
    """Inside image or base, and inside the memory that it names."""
    cdef uint64_t offset = action.offset
    if action.kind == ACT_SYNC_BASE:
        return True
    if action.kind != ACT_READ_IMAGE:
        if offset < DATA_OFFSET:
            return owner >= OWNER_HYDRATOR and (
                action.length == SCRATCH_BYTES or meta_sector(offset) >= 0)
        offset -= DATA_OFFSET
        if action.kind == ACT_DISCARD_BASE:
            return discard_in_bounds(world, offset, action.length)
    elif offset + action.minimum > world.geometry.image_bytes:
        return False
    if action.memory == MEM_STRIPE and (owner != OWNER_HYDRATOR
                                        or action.index >= world.geometry.buffers):
        return False
    if action.memory == MEM_REQUEST and (owner >= world.geometry.queues
                                         or action.index >= world.geometry.depth):
        return False
    return (data_cell(world, offset) >= 0
            and offset % STRIPE_BYTES + action.length <= STRIPE_BYTES)


# -- submission ----------------------------------------------------------------------------------

cdef void fill_request(World* world, uint8_t owner, uint32_t tag) noexcept nogil:
    """A guest's data to write: its serial number in every cell."""
    cdef const GuestRequest* guest = &world.guests[owner][tag]
    cdef uint32_t i
    for i in range(guest.count):
        world.request_data[owner][tag][i] = (
            written_value(guest.serial, guest.first + i) if guest.op == OP_WRITE else 0)


cdef int submit_write(World* world, uint8_t owner, const Action* action) noexcept nogil:
    """The write's log entry."""
    cdef uint32_t zeros[CELLS]
    if action.kind == ACT_ZERO_BASE:
        memset(zeros, 0, sizeof(zeros))
        return disk_write(world, LOG_DATA, data_cell(world, action.offset - DATA_OFFSET),
                          action.length // CELL_BYTES, zeros, NULL)
    if action.offset >= DATA_OFFSET:
        if action.memory == MEM_REQUEST:
            fill_request(world, owner, action.index)
        return disk_write(world, LOG_DATA, data_cell(world, action.offset - DATA_OFFSET),
                          action.length // CELL_BYTES, data_memory(world, owner, action), NULL)
    if action.length == SCRATCH_BYTES:
        return disk_write(world, LOG_CHUNK, <uint32_t>(action.offset // SCRATCH_BYTES), 1, NULL,
                          NULL)
    # More than a page is the erasure of both slots.
    ensure(action.length <= PAGE or (action.memory == MEM_SCRATCH and all_zero(
        meta_memory(world, action), action.length)), b"metadata is written page by page")
    return disk_write(world, LOG_META, meta_sector(action.offset), action.length // 512, NULL,
                      meta_memory(world, action) if action.length <= PAGE else NULL)


cdef int io_submit(World* world, uint8_t owner, const Action* action) noexcept nogil:
    cdef int i, index = -1
    cdef Io* io
    for i in range(MAX_IO):
        if world.io[i].busy and world.io[i].owner == owner:
            ensure(world.io[i].action.token != action.token, b"one action a token is in flight")
        if not world.io[i].busy and index < 0:
            index = i
    ensure(index >= 0, b"a world has few I/Os in flight")
    if world.trace != NULL:
        trace_io(world, owner, action)
    io = &world.io[index]
    memset(io, 0, sizeof(Io))
    io.action = action[0]
    io.owner = owner
    if not in_bounds(world, owner, action):
        violate(world, BAD_ACTION, action.kind, <uint32_t>(action.offset >> 9), action.length,
                owner)
        return index
    io.busy = 1
    io.closed = action.kind == ACT_READ_IMAGE and world.engines.hydrated
    if action.kind == ACT_WRITE_BASE or action.kind == ACT_ZERO_BASE:
        io.log = <uint8_t>submit_write(world, owner, action)
    elif action.kind == ACT_DISCARD_BASE:
        pass
    elif action.kind == ACT_SYNC_BASE:
        io.sync_order = world.disk.landed
    elif action.offset >= DATA_OFFSET or action.kind == ACT_READ_IMAGE:
        read_data(world, io, io.values)
    return index


# -- completion ----------------------------------------------------------------------------------

cdef void read_data(World* world, Io* io, uint32_t* into) noexcept nogil:
    """A read's content as it is now: `length` bytes in cells."""
    cdef const Action* action = &io.action
    cdef bint image = action.kind == ACT_READ_IMAGE
    cdef uint64_t offset = action.offset if image else action.offset - DATA_OFFSET
    cdef int cell = data_cell(world, offset)
    cdef uint32_t i
    for i in range(action.length // CELL_BYTES):
        if not image:
            into[i] = world.disk.cache[cell + i]
        elif i * CELL_BYTES >= action.minimum:
            into[i] = 0
        elif world.image_changed:
            into[i] = CHANGED_VALUE | (cell + i)
        else:
            into[i] = image_value(world, cell + i)


cdef void read_meta(World* world, const Action* action) noexcept nogil:
    cdef uint8_t* into = meta_memory(world, action)
    cdef uint32_t chunk = <uint32_t>(action.offset // SCRATCH_BYTES)
    if action.memory == MEM_SCRATCH and action.length == SCRATCH_BYTES:
        memset(into, 0, SCRATCH_BYTES)
        if chunk == 0:
            memcpy(into, world.disk.meta_cache, META_BYTES // 2)
        elif chunk == 5:
            memcpy(into, world.disk.meta_cache + META_BYTES // 2, META_BYTES // 2)
        if world.disk.chunk_cache[chunk]:
            into[100000] = 0xaa
        return
    memcpy(into, world.disk.meta_cache + meta_sector(action.offset) * 512, action.length)


cdef int32_t end_read(World* world, Io* io, int32_t fault) noexcept nogil:
    """Each cell as it was at the beginning, or as it is now."""
    cdef const Action* action = &io.action
    cdef uint32_t now[CELLS]
    cdef uint64_t early
    cdef uint32_t* into
    cdef uint32_t i
    if fault < 0:
        return fault
    if action.kind == ACT_READ_BASE and action.offset < DATA_OFFSET:
        read_meta(world, action)
        return <int32_t>action.length
    into = data_memory(world, io.owner, action)
    read_data(world, io, now)
    early = next_random(world)
    if early & 0x300:
        # All of one kind more often than not.
        early = 0xff if early & 0x100 else 0
    for i in range(io.done, action.length // CELL_BYTES):
        into[i] = io.values[i] if (early >> i) & 1 else now[i]
    return <int32_t>action.length


cdef void refresh(World* world, Io* io) noexcept nogil:
    """A write lands with what its memory holds then: a buffer must not change under its I/O."""
    cdef const Action* action = &io.action
    if io.owner == OWNER_NOBODY or action.kind == ACT_ZERO_BASE:
        return
    if action.memory == MEM_STRIPE:
        memcpy(world.disk.log[io.log].values, data_memory(world, io.owner, action) + io.done,
               (action.length // CELL_BYTES - io.done) * 4)
    elif action.memory == MEM_PAGE:
        memcpy(world.disk.meta_log[world.disk.log[io.log].payload],
               meta_memory(world, action) + io.done * 512, PAGE - io.done * 512)


cdef void io_land_discard(World* world, const Action* action) noexcept nogil:
    """Any of its cells become zeros; the others stay."""
    cdef uint32_t zeros[CELLS]
    cdef uint32_t first = data_cell(world, action.offset - DATA_OFFSET)
    cdef uint32_t end = first + action.length // CELL_BYTES
    cdef uint32_t count
    cdef uint16_t mask
    memset(zeros, 0, sizeof(zeros))
    while first < end and disk_has_room(world):
        count = CELLS - first % CELLS
        if count > end - first:
            count = end - first
        mask = WHOLE if one_in(world, 2) else <uint16_t>next_random(world)
        disk_land(world, disk_write(world, LOG_DATA, first, count, zeros, NULL), mask)
        first += count


cdef void io_land(World* world, int index) noexcept nogil:
    cdef Io* io = &world.io[index]
    # A DSYNC write's end is what makes it durable: that is one moment here.
    if io.landed or io.action.dsync:
        return
    if io.action.kind == ACT_DISCARD_BASE:
        io_land_discard(world, &io.action)
    elif io.action.kind == ACT_WRITE_BASE or io.action.kind == ACT_ZERO_BASE:
        refresh(world, io)
        disk_land(world, io.log, WHOLE)
    else:
        return
    io.landed = 1
    if world.trace != NULL:
        trace_io_end(world, io.owner, &io.action, 0, b"lands")


cdef int32_t end_write(World* world, Io* io, int32_t fault) noexcept nogil:
    """A write that fails may have reached the disk, or any part of it."""
    cdef const Action* action = &io.action
    cdef uint16_t mask
    if not io.landed:
        refresh(world, io)
        if fault == 0:
            disk_land(world, io.log, WHOLE)
            if action.dsync:
                disk_dsync(world, io.log)
        else:
            mask = <uint16_t>next_random(world) if one_in(world, 2) else 0
            if mask:
                disk_land(world, io.log, mask)
            else:
                disk_forget(world, io.log)
    return fault if fault < 0 else <int32_t>action.length


cdef void end_discard(World* world, const Io* io, int32_t fault) noexcept nogil:
    if not io.landed:
        io_land_discard(world, &io.action)
    if fault == 0 and io.owner < MAX_QUEUES:
        world.guests[io.owner][io.action.tag].discarded |= cell_bits(
            data_cell(world, io.action.offset - DATA_OFFSET), io.action.length // CELL_BYTES)


cdef int32_t end_sync(World* world, Io* io, int32_t fault) noexcept nogil:
    cdef int file_ = io.owner
    cdef uint8_t phase = world.engines.lifecycle.phase
    if world.disk.error_pending[file_]:
        world.disk.error_pending[file_] = 0
        return -EIO
    if fault == 0:
        disk_synced(world, io.sync_order)
        return 0
    disk_sync_failed(world, io.sync_order, file_)
    if file_ == OWNER_LIFECYCLE:
        # Who opens or closes is told, and it is for him to go on. Where a disk grows, the latch
        # comes next.
        world.accepted = 1
    if file_ != OWNER_LIFECYCLE or phase == PHASE_GROW_FIRST_SYNC or phase == PHASE_GROW_SYNC:
        oracle_sync_failed(world)
    return fault


cdef int32_t io_end(World* world, int index, int32_t fault) noexcept nogil:
    cdef Io* io = &world.io[index]
    cdef int32_t result
    ensure(io.busy, b"an I/O ends once")
    if fault < 0:
        oracle_fault(world)
    if io.action.kind == ACT_WRITE_BASE or io.action.kind == ACT_ZERO_BASE:
        result = end_write(world, io, fault)
    elif io.action.kind == ACT_DISCARD_BASE:
        end_discard(world, io, fault)
        result = fault
    elif io.action.kind == ACT_SYNC_BASE:
        result = end_sync(world, io, fault)
    else:
        result = end_read(world, io, fault)
    io.busy = 0
    if world.trace != NULL:
        trace_io_end(world, io.owner, &io.action, result, b"done")
    return result


# -- errors --------------------------------------------------------------------------------------

cdef int32_t random_fault(World* world) noexcept nogil:
    cdef uint32_t choice = below(world, 8)
    if choice == 0:
        return -EAGAIN
    if choice < 3:
        return FAULT_SHORT
    if choice == 3:
        return FAULT_NOTHING
    return -EIO if choice & 1 else -ENOSPC


cdef int32_t io_fault(World* world, uint8_t kind) noexcept nogil:
    """How an I/O (or host call) of this ActionKind is to fail: -errno or a Fault; 0: not at all."""
    cdef Faults* faults = &world.faults
    # After a failed fdatasync of an opening a second error keeps it from telling the table: as when
    # it dies there (docs/durability.md, the end).
    if world.quiet or world.accepted:
        return 0
    if kind == faults.nth_kind and faults.nth:
        faults.nth_seen += 1
        if faults.nth_seen == faults.nth or (
                faults.nth_for_good and faults.nth_seen > faults.nth):
            return faults.nth_errno if faults.nth_errno >= FAULT_SHORT else -faults.nth_errno
    if kind == ACT_SYNC_BASE:
        return -EIO if has(world, WITH_SYNC_FAULTS) and one_in(
            world, 6 if world.pace.slow == 0 else 3) else 0
    if has(world, WITH_FAULTS) and one_in(world, faults.one_in):
        return random_fault(world)
    return 0


cdef int32_t host_fault(World* world) noexcept nogil:
    cdef int32_t fault = io_fault(world, ACT_HOST)
    return -EIO if fault >= FAULT_SHORT or fault == -EAGAIN else fault


cdef void move_part(World* world, Io* io) noexcept nogil:
    """Some of it is moved, and the rest is asked for again."""
    cdef const Action* action = &io.action
    cdef bint data = action.kind == ACT_READ_IMAGE or action.offset >= DATA_OFFSET
    cdef uint32_t count = action.length // (CELL_BYTES if data else 512) - io.done
    cdef uint32_t now[CELLS]
    cdef uint32_t i
    if action.length > PAGE and not data or count < 2 or io.landed:
        return
    if action.kind == ACT_ZERO_BASE or action.kind == ACT_DISCARD_BASE:
        return
    count = 1 + below(world, count - 1)
    if action.kind == ACT_WRITE_BASE:
        refresh(world, io)
        if disk_has_room(world):
            disk_land_part(world, io.log, count, action.dsync)
            io.done += <uint8_t>count
    elif data:
        read_data(world, io, now)
        for i in range(count):
            data_memory(world, io.owner, action)[io.done + i] = now[io.done + i]
        io.done += <uint8_t>count
        memcpy(io.values, now, sizeof(now))


cdef bint goes_on(World* world, Io* io, int32_t fault) noexcept nogil:
    """As _ring does: EAGAIN is tried again for a while, a short transfer is continued."""
    if fault == -EAGAIN:
        if io.retries == MAX_RETRIES:
            return False
        io.retries += 1
        io.sync_order = world.disk.landed
    elif fault == FAULT_SHORT:
        if io.retries == MAX_RETRIES or io.action.kind == ACT_SYNC_BASE:
            return False
        io.retries += 1
        move_part(world, io)
    else:
        return False
    if world.trace != NULL:
        trace_io_end(world, io.owner, &io.action, io.done, b"goes on")
    return True


cdef bint meets_round(const World* world, const Io* io) noexcept nogil:
    """A queue's fdatasync while a round runs, where such fail: the most is to go wrong then."""
    return (io.action.kind == ACT_SYNC_BASE and io.owner < MAX_QUEUES
            and has(world, WITH_SYNC_FAULTS) and not world.quiet and not world.accepted
            and world.engines.hydrator.round != ROUND_IDLE)


cdef bint io_attempt(World* world, int index, int32_t* result) noexcept nogil:
    cdef Io* io = &world.io[index]
    cdef int32_t fault = 0
    if io.closed:
        io.busy = 0
        result[0] = -EBADF
        return True
    if io.action.kind == ACT_READ_IMAGE and world.image_changed and one_in(world, 3):
        # What it was to read has been cut off.
        io.busy = 0
        result[0] = -EIO
        return True
    if io.owner != OWNER_NOBODY:
        fault = io_fault(world, io.action.kind)
        if fault == 0 and meets_round(world, io) and (
                world.engines.hydrator.round == ROUND_WRITE_PAGES or one_in(world, 2)):
            fault = -EIO
    if goes_on(world, io, fault):
        return False
    if fault == FAULT_SHORT:
        # Short as it is, it has moved all by now.
        fault = 0
    elif fault == FAULT_NOTHING or fault == -EAGAIN:
        fault = -EIO
    result[0] = io_end(world, index, fault)
    return True
