"""Engines in the model world; see _machine.pxd."""

from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t, uint8_t
from libc.string cimport memset

from ublk_ubi._atomic cimport ensure
from ublk_ubi._core cimport (
    ACT_COMPLETE, ACT_HYDRATED, ACT_READ_IMAGE, ACT_SEND, ACT_STARTED, ACT_STOPPED, CACHE_UNSAFE,
    CACHE_WRITETHROUGH, EVENT_BUDGET, EVENT_DONE, EVENT_HYDRATE, EVENT_MESSAGE, EVENT_REQUEST,
    MSG_WANT, NONE32, OP_FLUSH, PRESENT, STATE_MASK, WANTED, Action, Actions, Event, Shared,
)
from ublk_ubi._hydrator cimport ROUND_IDLE, Hydrator, HydratorMemory, hydrator_init, hydrator_step
from ublk_ubi._lifecycle cimport lifecycle_states
from ublk_ubi._queue cimport queue_init, queue_step
from ubi_sim._coverage cimport cover_hydrator, cover_queue
from ubi_sim._io cimport io_attempt, io_submit
from ubi_sim._model cimport (
    BUCKETS, CELLS, CELL_BYTES, COUNTS, IMAGE_NEEDED, LEAK, MAX_ACTIONS, MAX_IO, MAX_MAIL,
    MAX_QUEUES, OWNER_HYDRATOR, OWNER_NOBODY, STALE_VALUE, STRIPE_BYTES, WITH_COPY_ON_READ,
    WITH_UNSAFE, WITH_WRITETHROUGH, Engines, GuestRequest, Io, Mail, Mailbox, World, boundary,
    cell_bits, halted, has, here, one_in, violate,
)
from ubi_sim._oracle cimport oracle_completed
from ubi_sim._trace cimport trace_end, trace_request, trace_sent, trace_taken


# -- a daemon's memory ---------------------------------------------------------------------------

cdef void machine_boot(World* world) noexcept nogil:
    cdef uint32_t* words
    cdef uint32_t i
    memset(&world.engines, 0, sizeof(Engines))
    memset(world.to_hydrator, 0, sizeof(world.to_hydrator))
    memset(world.to_queue, 0, sizeof(world.to_queue))
    # Its open files are new ones: what failed before was told to somebody.
    memset(world.disk.error_pending, 0, sizeof(world.disk.error_pending))
    # It would be refused with another image (_mistakes): it has the right one.
    world.image_changed = 0
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
    shared.device_bytes = (<uint64_t>(world.geometry.device_stripes - 1) * STRIPE_BYTES
                           + world.geometry.last_cells * CELL_BYTES)
    shared.image_bytes = world.geometry.image_bytes
    shared.stripe_bytes = STRIPE_BYTES
    shared.stripe_shift = 16
    shared.image_stripes = world.geometry.image_stripes
    shared.queues = world.geometry.queues
    shared.depth = world.geometry.depth
    if has(world, WITH_UNSAFE):
        shared.cache = CACHE_UNSAFE
    elif has(world, WITH_WRITETHROUGH):
        shared.cache = CACHE_WRITETHROUGH
    shared.copy_on_read = has(world, WITH_COPY_ON_READ)
    shared.state = engines.state
    shared.table = here(world).table.rows
    shared.latch = &here(world).table.latch
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
    memory.bucket_count = BUCKETS
    memory.demand_capacity = 16
    memory.wanted_capacity = 4
    memory.page_count = engines.lifecycle.page_count
    hydrator_init(&engines.hydrator, shared, &memory)
    for queue in range(world.geometry.queues):
        queue_init(&engines.queues[queue], shared, queue, engines.requests[queue])


cdef void check_hydrated(World* world) noexcept nogil:
    """The image may be deleted now: no power loss makes anybody need it."""
    cdef uint32_t stripe
    for stripe in range(world.geometry.image_stripes):
        if not world.disk.meta_durable[14 + 2 * stripe]:
            violate(world, IMAGE_NEEDED, stripe, world.engines.state[stripe], 0, 0)


cdef void close_image(World* world) noexcept nogil:
    """Reads that a queue has asked for and not yet submitted find it closed."""
    cdef Io* io
    cdef int i
    for i in range(MAX_IO):
        io = &world.io[i]
        if io.busy and io.action.kind == ACT_READ_IMAGE and io.owner < MAX_QUEUES:
            io.closed = one_in(world, 2)


# -- actions -------------------------------------------------------------------------------------

cdef void send(World* world, uint8_t owner, const Action* action) noexcept nogil:
    cdef Mailbox* box
    cdef Mail* mail
    if owner == OWNER_HYDRATOR:
        box = &world.to_queue[action.queue]
    else:
        box = &world.to_hydrator[owner]
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
    if not one_in(world, 12):
        box.rung = 1
    if world.trace != NULL:
        trace_sent(world, owner, action, not box.rung)


cdef void run_actions(World* world, uint8_t owner, const Actions* actions) noexcept nogil:
    cdef const Action* action
    cdef uint32_t i
    for i in range(actions.count):
        if i > 0:
            boundary(world)
            if halted(world):
                return
        action = &actions.items[i]
        if action.kind == ACT_SEND:
            send(world, owner, action)
        elif action.kind == ACT_COMPLETE:
            if world.trace != NULL:
                trace_end(world, owner, action.tag, action.result)
            oracle_completed(world, &world.guests[owner][action.tag], action.result,
                             world.request_data[owner][action.tag])
        elif action.kind == ACT_STARTED:
            ensure(not world.engines.live, b"a hydrator starts once")
            world.engines.live = 1
            world.engines.start_result = action.result
        elif action.kind == ACT_STOPPED:
            ensure(not world.engines.stopped, b"a hydrator stops once")
            world.engines.stopped = 1
            world.engines.stop_result = action.result
        elif action.kind == ACT_HYDRATED:
            ensure(not world.engines.hydrated, b"the image is let go of once")
            check_hydrated(world)
            close_image(world)
            world.engines.hydrated = 1
        else:
            io_submit(world, owner, action)


cdef void machine_queue_event(World* world, uint16_t queue, const Event* event) noexcept nogil:
    cdef Action items[MAX_ACTIONS]
    cdef Actions actions
    actions.items = items
    actions.count = 0
    # The bound that _queue.pxd promises.
    actions.capacity = world.geometry.depth + 2
    cover_queue(world, queue, event)
    queue_step(&world.engines.queues[queue], event, &actions)
    run_actions(world, <uint8_t>queue, &actions)


cdef void hydrator_event(World* world, const Event* event) noexcept nogil:
    cdef Action items[MAX_ACTIONS]
    cdef Actions actions
    actions.items = items
    actions.count = 0
    # The bound that _hydrator.pxd promises.
    actions.capacity = world.geometry.queues * world.geometry.depth + world.geometry.buffers + 19
    cover_hydrator(world, event)
    hydrator_step(&world.engines.hydrator, event, &actions)
    if not world.blind:
        check_counts(world)
    run_actions(world, OWNER_HYDRATOR, &actions)


cdef void machine_hydrator_event(World* world, uint8_t kind) noexcept nogil:
    cdef Event event
    memset(&event, 0, sizeof(event))
    event.kind = kind
    hydrator_event(world, &event)


cdef void machine_hydration(World* world, bint on, uint32_t stripes) noexcept nogil:
    cdef Event event
    memset(&event, 0, sizeof(event))
    event.kind = EVENT_HYDRATE
    event.op = on
    hydrator_event(world, &event)
    event.kind = EVENT_BUDGET
    event.offset = <uint64_t>stripes * STRIPE_BYTES
    if not halted(world):
        hydrator_event(world, &event)


cdef bint is_zeros(World* world, uint32_t buffer) noexcept nogil:
    cdef uint32_t i
    for i in range(CELLS):
        if world.stripe_data[buffer][i] != 0:
            return False
    return True


cdef void machine_complete(World* world, int index) noexcept nogil:
    cdef const Io* io = &world.io[index]
    cdef uint8_t owner = io.owner
    cdef Event event
    memset(&event, 0, sizeof(event))
    event.kind = EVENT_DONE
    event.token = io.action.token
    if not io_attempt(world, index, &event.result):
        return
    if owner == OWNER_HYDRATOR:
        if io.action.kind == ACT_READ_IMAGE and event.result >= 0:
            event.zeros = is_zeros(world, io.action.index)
        hydrator_event(world, &event)
    elif owner < MAX_QUEUES:
        machine_queue_event(world, owner, &event)


cdef void machine_lose_image(World* world) noexcept nogil:
    world.image_changed = 1
    world.engines.shared.image_lost = 1


# -- requests, mail ------------------------------------------------------------------------------

cdef void note_base(World* world, GuestRequest* guest) noexcept nogil:
    """What the base has as the request comes: what the table would tell the next daemon."""
    cdef uint32_t stripe, cell
    guest.on_base = 0
    guest.discarded = 0
    for cell in range(guest.first, <uint32_t>(guest.first + guest.count)):
        stripe = world.geometry.hot[cell // CELLS]
        if stripe >= world.geometry.image_stripes or here(world).table.rows[stripe]:
            guest.on_base |= cell_bits(cell, 1)


cdef void machine_request(World* world, uint16_t queue, uint16_t tag) noexcept nogil:
    cdef GuestRequest* guest = &world.guests[queue][tag]
    cdef Event event
    memset(&event, 0, sizeof(event))
    event.kind = EVENT_REQUEST
    event.tag = tag
    event.op = guest.op
    event.fua = guest.fua
    event.unmap = guest.unmap
    if guest.op == OP_FLUSH:
        event.offset = <uint64_t>-512
    else:
        event.offset = (<uint64_t>world.geometry.hot[guest.first // CELLS] * STRIPE_BYTES
                        + guest.first % CELLS * CELL_BYTES)
        event.length = guest.count * CELL_BYTES
    note_base(world, guest)
    if world.trace != NULL:
        trace_request(world, queue, tag)
    machine_queue_event(world, queue, &event)


cdef bint machine_take_mail(World* world, int box_index) noexcept nogil:
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
    if world.trace != NULL:
        trace_taken(world, queue, up, mail)
    box.head += 1
    if box.head == box.tail:
        box.rung = 0
    if up:
        hydrator_event(world, &event)
    else:
        machine_queue_event(world, queue, &event)
    return True


# -- what must hold ------------------------------------------------------------------------------

cdef void check_counts(World* world) noexcept nogil:
    """After every step: `undurable` counts the PRESENT stripes; the table has what the base has."""
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
        if (state >= PRESENT) != (here(world).table.rows[stripe] != 0):
            violate(world, COUNTS, 1, stripe, state, here(world).table.rows[stripe])
    if present != engines.shared.undurable:
        violate(world, COUNTS, 2, <uint32_t>present, <uint32_t>engines.shared.undurable, 0)


cdef void machine_check_idle(World* world) noexcept nogil:
    cdef Engines* engines = &world.engines
    cdef Hydrator* hydrator = &engines.hydrator
    cdef uint16_t queue
    cdef uint32_t i
    if world.blind:
        return
    for queue in range(world.geometry.queues):
        if engines.queues[queue].active or engines.queues[queue].awaiting:
            violate(world, LEAK, 1, queue, engines.queues[queue].active,
                    engines.queues[queue].awaiting)
        if (world.to_queue[queue].head != world.to_queue[queue].tail
                or world.to_hydrator[queue].head != world.to_hydrator[queue].tail):
            violate(world, LEAK, 2, queue, 0, 0)
    if (hydrator.free_count != hydrator.buffers or hydrator.round != ROUND_IDLE
            or hydrator.arriving != 0):
        violate(world, LEAK, 3, hydrator.free_count, hydrator.round, hydrator.arriving)
    for i in range(BUCKETS):
        if engines.buckets[i].first != NONE32:
            violate(world, LEAK, 4, i, engines.buckets[i].first, 0)
    if hydrator.joining.first != NONE32 or hydrator.joined.first != NONE32:
        violate(world, LEAK, 5, 0, 0, 0)
    if hydrator.demand.head != hydrator.demand.tail or (
            hydrator.wanted.head != hydrator.wanted.tail and not world.image_changed):
        violate(world, LEAK, 6, hydrator.wanted.tail - hydrator.wanted.head, 0, 0)
    for i in range(<uint32_t>world.geometry.hot_count):
        if world.geometry.hot[i] < world.geometry.image_stripes:
            check_stripe_idle(world, world.geometry.hot[i])


cdef void check_stripe_idle(World* world, uint32_t stripe) noexcept nogil:
    """ABSENT, or the base has it; and then, unless an fdatasync has failed, durably."""
    cdef uint8_t value = world.engines.state[stripe]
    cdef uint8_t state = value & STATE_MASK
    if world.image_changed:
        # Hints for what can no longer be copied lie where they are.
        value &= <uint8_t>~WANTED
    if value != state or (state != 0 and state < PRESENT):
        violate(world, LEAK, 7, stripe, value, 0)
    elif state == PRESENT and not here(world).table.latch:
        violate(world, LEAK, 8, stripe, value, 0)
