"""Engines in the model world; see _machine.pxd."""

from libc.errno cimport EIO
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from ublk_ubi._atomic cimport ensure
from ublk_ubi._core cimport (
    ACT_COMPLETE, ACT_READ_BASE, ACT_READ_IMAGE, ACT_SEND, ACT_STARTED, ACT_STOPPED, ACT_SYNC_BASE,
    ACT_WRITE_BASE, DATA_OFFSET, EVENT_DONE, EVENT_MESSAGE, EVENT_REQUEST, MEM_PAGE, MEM_REQUEST,
    MEM_SCRATCH, MEM_STRIPE, MSG_WANT, OP_FLUSH, OP_READ, PRESENT, STATE_MASK, Action, Actions,
    Event, Shared,
)
from ublk_ubi._format cimport SLOT_OFFSET
from ublk_ubi._hydrator cimport HydratorMemory, hydrator_init, hydrator_step
from ublk_ubi._lifecycle cimport SCRATCH_BYTES, lifecycle_states
from ublk_ubi._queue cimport queue_init, queue_step
from ubi_sim._disk cimport (
    disk_forget, disk_land, disk_sync_failed, disk_synced, disk_write,
)
from ubi_sim._model cimport (
    BAD_ACTION, CELL_BYTES, CELLS, CHUNKS, COUNTS, IMAGE_VALUE, LEAK, LOG_CHUNK, LOG_DATA,
    LOG_META, MAX_ACTIONS, MAX_IO, MAX_MAIL, META_BYTES, OWNER_HYDRATOR, OWNER_LIFECYCLE,
    OWNER_NOBODY, STALE_VALUE, STRIPE_BYTES, Engines, GuestRequest, Io, Mail, Mailbox, World,
    below, hot_index, next_random, one_in, violate,
)
from ubi_sim._oracle cimport oracle_completed, oracle_sent, oracle_sync_failed, written_value


# -- a daemon's memory ---------------------------------------------------------------------------

cdef void machine_boot(World* world) noexcept nogil:
    cdef uint32_t* words
    cdef uint32_t i
    memset(&world.engines, 0, sizeof(Engines))
    memset(world.to_hydrator, 0, sizeof(world.to_hydrator))
    memset(world.to_queue, 0, sizeof(world.to_queue))
    for i in range(MAX_IO):
        if world.io[i].owner != OWNER_NOBODY:
            world.io[i].busy = 0
    # Whatever a buffer held before must never get anywhere.
    words = &world.stripe_data[0][0]
    for i in range(sizeof(world.stripe_data) // 4):
        words[i] = STALE_VALUE | (0x10000 + i)
    words = &world.request_data[0][0][0]
    for i in range(sizeof(world.request_data) // 4):
        words[i] = STALE_VALUE | (0x20000 + i)


cdef void machine_start_engines(World* world) noexcept nogil:
    cdef Engines* engines = &world.engines
    cdef Shared* shared = &engines.shared
    cdef HydratorMemory memory
    cdef uint16_t queue
    shared.device_bytes = <uint64_t>world.geometry.device_stripes * STRIPE_BYTES
    shared.image_bytes = world.geometry.image_bytes
    shared.stripe_bytes = STRIPE_BYTES
    shared.stripe_shift = 16
    shared.image_stripes = world.geometry.image_stripes
    shared.queues = world.geometry.queues
    shared.depth = world.geometry.depth
    shared.copy_on_read = world.geometry.copy_on_read
    shared.state = engines.state
    shared.table = world.table.rows
    shared.latch = &world.table.latch
    lifecycle_states(&engines.lifecycle, shared)
    memory.fetches = engines.fetches
    memory.free_buffers = engines.free_buffers
    memory.waiters = engines.waiters
    memory.buckets = engines.buckets
    memory.demand = engines.demand
    memory.wanted = engines.wanted
    memory.page_present = engines.page_present
    memory.page_round = engines.page_round
    memory.pages = engines.pages
    memory.buffers = world.geometry.buffers
    memory.bucket_count = 4
    memory.demand_capacity = 16
    memory.wanted_capacity = 4
    memory.page_count = engines.lifecycle.page_count
    hydrator_init(&engines.hydrator, shared, &memory)
    for queue in range(world.geometry.queues):
        queue_init(&engines.queues[queue], shared, queue, engines.requests[queue])


# -- actions -------------------------------------------------------------------------------------

cdef void send(World* world, Mailbox* box, const Action* action) noexcept nogil:
    cdef Mail* mail
    # As the thread does: a hint is dropped when it would take a request's place.
    if action.message == MSG_WANT and MAX_MAIL - (box.tail - box.head) <= world.geometry.depth:
        return
    ensure(box.tail - box.head < MAX_MAIL, b"a mailbox has room for one message a tag")
    mail = &box.items[box.tail % MAX_MAIL]
    mail.kind = action.message
    mail.tag = action.tag
    mail.stripe = action.stripe
    mail.result = action.result
    box.tail += 1
    # A doorbell may get lost.
    if not one_in(world, 12):
        box.rung = 1


cdef void run_actions(World* world, uint8_t owner, const Actions* actions) noexcept nogil:
    cdef const Action* action
    cdef uint32_t i
    for i in range(actions.count):
        action = &actions.items[i]
        if action.kind == ACT_SEND and owner == OWNER_HYDRATOR:
            send(world, &world.to_queue[action.queue], action)
        elif action.kind == ACT_SEND:
            send(world, &world.to_hydrator[owner], action)
        elif action.kind == ACT_COMPLETE:
            oracle_completed(world, &world.guests[owner][action.tag], action.result,
                             world.request_data[owner][action.tag])
        elif action.kind == ACT_STARTED:
            world.engines.started = 1
            world.engines.stop_result = action.result
        elif action.kind == ACT_STOPPED:
            world.engines.stopped = 1
            world.engines.stop_result = action.result
        else:
            machine_submit(world, owner, action)


cdef void machine_queue_event(World* world, uint16_t queue, const Event* event) noexcept nogil:
    cdef Action items[MAX_ACTIONS]
    cdef Actions actions
    actions.items = items
    actions.count = 0
    # The bound that _queue.pxd promises.
    actions.capacity = world.geometry.depth + 2
    queue_step(&world.engines.queues[queue], event, &actions)
    run_actions(world, <uint8_t>queue, &actions)


cdef void machine_hydrator_event(World* world, const Event* event) noexcept nogil:
    cdef Action items[MAX_ACTIONS]
    cdef Actions actions
    actions.items = items
    actions.count = 0
    actions.capacity = world.geometry.queues * world.geometry.depth + world.geometry.buffers + 18
    hydrator_step(&world.engines.hydrator, event, &actions)
    run_actions(world, OWNER_HYDRATOR, &actions)
    machine_check_counts(world)


# -- I/O -----------------------------------------------------------------------------------------

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
        return world.engines.pages + action.index * 4096
    ensure(action.memory == MEM_SCRATCH, b"metadata is in a page or in scratch memory")
    return world.scratch + action.index


cdef int submit_write(World* world, uint8_t owner, const Action* action) noexcept nogil:
    """The write's log entry."""
    cdef int cell
    if action.offset >= DATA_OFFSET:
        cell = data_cell(world, action.offset - DATA_OFFSET)
        if cell < 0 or action.length > STRIPE_BYTES:
            violate(world, BAD_ACTION, action.kind, <uint32_t>(action.offset >> 16), 0, 0)
            return disk_write(world, LOG_CHUNK, 7, 1, NULL, NULL)
        return disk_write(world, LOG_DATA, cell, action.length // CELL_BYTES,
                          data_memory(world, owner, action), NULL)
    if action.length == SCRATCH_BYTES:
        return disk_write(world, LOG_CHUNK, <uint32_t>(action.offset // SCRATCH_BYTES), 1, NULL, NULL)
    return disk_write(world, LOG_META, meta_sector(action.offset), action.length // 512, NULL,
                      meta_memory(world, action))


cdef int machine_submit(World* world, uint8_t owner, const Action* action) noexcept nogil:
    cdef int i, index = -1
    cdef Io* io
    cdef GuestRequest* guest
    for i in range(MAX_IO):
        if world.io[i].busy and world.io[i].owner == owner:
            ensure(world.io[i].action.token != action.token, b"one action a token is in flight")
        if not world.io[i].busy and index < 0:
            index = i
    ensure(index >= 0, b"a world has few I/Os in flight")
    io = &world.io[index]
    memset(io, 0, sizeof(Io))
    io.action = action[0]
    io.owner = owner
    io.busy = 1
    if action.kind == ACT_WRITE_BASE:
        if action.memory == MEM_REQUEST:
            guest = &world.guests[owner][action.index]
            for i in range(guest.count):
                world.request_data[owner][action.index][i] = written_value(
                    guest.serial, guest.first + i)
        io.log = <uint8_t>submit_write(world, owner, action)
    elif action.kind == ACT_SYNC_BASE:
        io.sync_order = world.disk.landed
    elif action.offset >= DATA_OFFSET or action.kind == ACT_READ_IMAGE:
        io.early = next_random(world) & 1
        if io.early:
            read_data(world, io, io.values)
    return index


cdef void read_data(World* world, Io* io, uint32_t* into) noexcept nogil:
    """A read's content as it is now: `length` bytes in cells."""
    cdef const Action* action = &io.action
    cdef bint image = action.kind == ACT_READ_IMAGE
    cdef uint64_t offset = action.offset if image else action.offset - DATA_OFFSET
    cdef int cell = data_cell(world, offset)
    cdef uint32_t i
    if cell < 0:
        violate(world, BAD_ACTION, action.kind, <uint32_t>(offset >> 16), 0, 0)
        return
    for i in range(action.length // CELL_BYTES):
        if not image:
            into[i] = world.disk.cache[cell + i]
        elif i * CELL_BYTES < action.minimum:
            into[i] = IMAGE_VALUE | (cell + i)
        else:
            into[i] = 0


cdef void read_meta(World* world, const Action* action) noexcept nogil:
    cdef uint8_t* into = meta_memory(world, action)
    cdef uint32_t chunk = <uint32_t>(action.offset // SCRATCH_BYTES)
    cdef int sector = meta_sector(action.offset)
    if action.memory == MEM_SCRATCH and action.length == SCRATCH_BYTES:
        memset(into, 0, SCRATCH_BYTES)
        if chunk == 0:
            memcpy(into, world.disk.meta_cache, META_BYTES // 2)
        elif chunk == 5:
            memcpy(into, world.disk.meta_cache + META_BYTES // 2, META_BYTES // 2)
        if world.disk.chunk_cache[chunk]:
            into[100000] = 0xaa
        return
    ensure(sector >= 0, b"metadata is read where it is")
    memcpy(into, world.disk.meta_cache + sector * 512, action.length)


cdef int32_t end_read(World* world, Io* io, int32_t fault) noexcept nogil:
    cdef const Action* action = &io.action
    cdef uint32_t* into
    if fault < 0:
        return fault
    if action.kind == ACT_READ_BASE and action.offset < DATA_OFFSET:
        read_meta(world, action)
        return <int32_t>action.length
    if action.kind == ACT_READ_IMAGE and (
            action.offset + action.minimum > world.geometry.image_bytes):
        return -EIO
    into = data_memory(world, io.owner, action)
    if io.early:
        memcpy(into, io.values, action.length // CELL_BYTES * 4)
    else:
        read_data(world, io, into)
    return <int32_t>action.length


cdef int32_t end_write(World* world, Io* io, int32_t fault) noexcept nogil:
    """It lands with what its memory holds now: a buffer must not change under its I/O."""
    cdef const Action* action = &io.action
    cdef uint8_t mask
    if io.owner != OWNER_NOBODY and action.offset >= DATA_OFFSET and action.memory == MEM_STRIPE:
        memcpy(world.disk.log[io.log].values, data_memory(world, io.owner, action),
               action.length // CELL_BYTES * 4)
    elif io.owner != OWNER_NOBODY and action.memory == MEM_PAGE:
        memcpy(world.disk.meta_log[world.disk.log[io.log].payload], meta_memory(world, action), 4096)
    if fault == 0:
        disk_land(world, io.log, 0xff)
        # Durable when done, with all that landed on these very cells before.
        if action.dsync:
            durable_cells(world, io.log)
        return <int32_t>action.length
    mask = <uint8_t>next_random(world) if one_in(world, 2) else 0
    if mask:
        disk_land(world, io.log, mask)
    else:
        disk_forget(world, io.log)
    return fault


cdef void durable_cells(World* world, int index) noexcept nogil:
    """RWF_DSYNC: these cells are on the medium. Older writes to them cannot come back."""
    cdef uint32_t i, k
    cdef uint32_t first = world.disk.log[index].first
    for i in range(world.disk.log[index].count):
        world.disk.durable[first + i] = world.disk.log[index].values[i]
        for k in range(64):
            drop_cell(world, <int>k, first + i, index)


cdef void drop_cell(World* world, int entry, uint32_t cell, int but) noexcept nogil:
    """Take a cell out of an older landed entry."""
    cdef uint32_t first = world.disk.log[entry].first
    if (entry == but or world.disk.log[entry].kind != LOG_DATA or world.disk.log[entry].order == 0
            or world.disk.log[entry].order > world.disk.log[but].order):
        return
    if first <= cell < first + world.disk.log[entry].count:
        world.disk.log[entry].mask &= <uint8_t>~(1 << (cell - first))


cdef int32_t end_sync(World* world, Io* io, int32_t fault) noexcept nogil:
    cdef int file_ = io.owner
    if world.disk.error_pending[file_]:
        world.disk.error_pending[file_] = 0
        return -EIO
    if fault == 0:
        disk_synced(world, io.sync_order)
        return 0
    disk_sync_failed(world, io.sync_order, file_)
    oracle_sync_failed(world)
    return fault


cdef int32_t machine_complete(World* world, int index, int32_t fault) noexcept nogil:
    cdef Io* io = &world.io[index]
    cdef Event event
    cdef int32_t result
    cdef uint8_t owner = io.owner
    ensure(io.busy, b"an I/O ends once")
    if fault < 0:
        world.oracle.fault_seen = 1
    if io.action.kind == ACT_WRITE_BASE:
        result = end_write(world, io, fault)
    elif io.action.kind == ACT_SYNC_BASE:
        result = end_sync(world, io, fault)
    else:
        result = end_read(world, io, fault)
    io.busy = 0
    if owner == OWNER_LIFECYCLE or owner == OWNER_NOBODY:
        return result
    memset(&event, 0, sizeof(event))
    event.kind = EVENT_DONE
    event.token = io.action.token
    event.result = result
    if owner == OWNER_HYDRATOR:
        machine_hydrator_event(world, &event)
    else:
        machine_queue_event(world, owner, &event)
    return result


# -- requests, mail ------------------------------------------------------------------------------

cdef void machine_request(World* world, uint16_t queue, uint16_t tag) noexcept nogil:
    """Send world.guests[queue][tag] to its queue."""
    cdef GuestRequest* guest = &world.guests[queue][tag]
    cdef Event event
    memset(&event, 0, sizeof(event))
    event.kind = EVENT_REQUEST
    event.tag = tag
    event.op = guest.op
    event.fua = guest.fua
    if guest.op == OP_FLUSH:
        event.offset = <uint64_t>-512
    else:
        event.offset = (<uint64_t>world.geometry.hot[guest.first // CELLS] * STRIPE_BYTES
                        + guest.first % CELLS * CELL_BYTES)
        event.length = guest.count * CELL_BYTES
    machine_queue_event(world, queue, &event)


cdef bint machine_take_mail(World* world, int box_index) noexcept nogil:
    """Deliver one message of box 0, 1 (to the hydrator) or 2, 3 (to a queue) whose bell rang."""
    cdef uint16_t queue = <uint16_t>(box_index & 1)
    cdef bint up = box_index < 2
    cdef Mailbox* box = &world.to_hydrator[queue] if up else &world.to_queue[queue]
    cdef const Mail* mail
    cdef Event event
    if box.head == box.tail or not box.rung:
        return False
    mail = &box.items[box.head % MAX_MAIL]
    memset(&event, 0, sizeof(event))
    event.kind = EVENT_MESSAGE
    event.op = mail.kind
    event.queue = queue
    event.tag = mail.tag
    event.stripe = mail.stripe
    event.result = mail.result
    box.head += 1
    if box.head == box.tail:
        box.rung = 0
    if up:
        machine_hydrator_event(world, &event)
    else:
        machine_queue_event(world, queue, &event)
    return True


# -- what must hold after every step -------------------------------------------------------------

cdef void machine_check_counts(World* world) noexcept nogil:
    """`undurable` counts the PRESENT stripes; the table has just what the base has."""
    cdef Engines* engines = &world.engines
    cdef int64_t present = 0
    cdef uint32_t stripe
    cdef uint8_t state
    cdef uint16_t i
    for i in range(world.geometry.hot_count):
        stripe = world.geometry.hot[i]
        if stripe >= world.geometry.image_stripes:
            continue
        state = engines.state[stripe] & STATE_MASK
        present += state == PRESENT
        if (state >= PRESENT) != (world.table.rows[stripe] != 0):
            violate(world, COUNTS, 1, stripe, state, world.table.rows[stripe])
    if present != engines.shared.undurable:
        violate(world, COUNTS, 2, <uint32_t>present, <uint32_t>engines.shared.undurable, 0)


cdef void machine_check_idle(World* world) noexcept nogil:
    """All requests are answered: nothing is left of them."""
    cdef Engines* engines = &world.engines
    cdef uint16_t queue
    cdef uint32_t i
    for queue in range(world.geometry.queues):
        if engines.queues[queue].active or engines.queues[queue].awaiting:
            violate(world, LEAK, 1, queue, engines.queues[queue].active,
                    engines.queues[queue].awaiting)
    if engines.hydrator.free_count != engines.hydrator.buffers:
        violate(world, LEAK, 2, engines.hydrator.free_count, 0, 0)
    for i in range(4):
        if engines.buckets[i].first != <uint32_t>-1:
            violate(world, LEAK, 3, i, engines.buckets[i].first, 0)
    if engines.hydrator.joining.first != <uint32_t>-1:
        violate(world, LEAK, 4, 0, 0, 0)
