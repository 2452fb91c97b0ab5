"""The queue engine; its states and invariants are in _queue.pxd."""

from libc.errno cimport EINVAL, EIO, EOPNOTSUPP
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from ublk_ubi._atomic cimport ensure, load_i64, load_u32, load_u64, set_once_u32, store_u32
from ublk_ubi._core cimport (
    ACT_COMPLETE, ACT_DISCARD_BASE, ACT_READ_BASE, ACT_READ_IMAGE, ACT_SEND, ACT_SYNC_BASE,
    ACT_WRITE_BASE, ACT_ZERO_BASE, BASE_CHANGED, BASE_SYNCED, CACHE_UNSAFE, CACHE_WRITETHROUGH,
    CLAIMED, DATA_OFFSET, DURABLE, EVENT_DONE, EVENT_MESSAGE, EVENT_REQUEST, MEM_REQUEST, MSG_CLAIM,
    MSG_DONE, MSG_GRANT, MSG_HYDRATE, MSG_JOIN, MSG_WANT, MSG_WRITTEN, NONE16, OP_DISCARD, OP_FLUSH,
    OP_READ, OP_WRITE, OP_WRITE_ZEROES, PRESENT, Action, Actions, Event, Shared, emit, image_lost,
    stripe_at, stripe_state,
)


cdef void queue_init(Queue* queue, Shared* shared, uint16_t index,
                     Request* requests) noexcept nogil:
    """`requests` has room for shared.depth; the queue keeps the pointer."""
    memset(queue, 0, sizeof(Queue))
    memset(requests, 0, shared.depth * sizeof(Request))
    queue.shared = shared
    queue.requests = requests
    queue.index = index
    queue.depth = shared.depth
    queue.sync_running = NONE16
    queue.sync_next = NONE16


# -- ending requests -----------------------------------------------------------------------------

cdef void complete(Queue* queue, uint16_t tag, int32_t result, Actions* actions) noexcept nogil:
    """End a request: all of its bytes, or -errno. Never a part: the kernel's way with short results
    differs by version (drivers/block/ublk_drv.c, __ublk_complete_rq)."""
    cdef Request* request = &queue.requests[tag]
    cdef Action* action
    cdef int kind = request_kind(request.op)
    ensure(request.state != IDLE, b"a request completes once")
    request.state = IDLE
    queue.active -= 1
    if kind >= 0:
        queue.stats.count[kind] += 1
        if result < 0:
            queue.stats.errors[kind] += 1
        else:
            queue.stats.bytes[kind] += request.length
    action = emit(actions, ACT_COMPLETE)
    action.tag = tag
    action.result = result if result < 0 else <int32_t>request.length


cdef inline bint latched(Queue* queue) noexcept nogil:
    return load_u32(queue.shared.latch) != 0


# -- talking to the hydrator ---------------------------------------------------------------------

cdef void send(Queue* queue, uint16_t tag, uint8_t message, int32_t result,
               Actions* actions) noexcept nogil:
    cdef Action* action = emit(actions, ACT_SEND)
    action.message = message
    action.queue = queue.index
    action.tag = tag
    action.stripe = queue.requests[tag].stripe
    action.result = result


cdef void ask(Queue* queue, uint16_t tag, uint8_t state, uint8_t message, int32_t result,
              Actions* actions) noexcept nogil:
    """Send a message that will be answered, and wait in `state`."""
    queue.requests[tag].state = state
    queue.awaiting += 1
    send(queue, tag, message, result, actions)


# -- starting I/O --------------------------------------------------------------------------------

cdef void start_io(Queue* queue, uint16_t tag, uint8_t state, uint8_t kind, bint dsync,
                   Actions* actions) noexcept nogil:
    cdef Request* request = &queue.requests[tag]
    cdef Action* action = emit(actions, kind)
    request.state = state
    action.memory = MEM_REQUEST
    action.index = tag
    action.token = tag
    action.tag = tag
    action.length = request.length
    action.minimum = request.length
    action.dsync = dsync
    action.unmap = request.unmap
    action.offset = request.offset
    if kind != ACT_READ_IMAGE:
        action.offset += DATA_OFFSET


cdef inline uint8_t write_kind(const Request* request) noexcept nogil:
    return ACT_WRITE_BASE if request.op == OP_WRITE else ACT_ZERO_BASE


cdef void start_write(Queue* queue, uint16_t tag, Actions* actions) noexcept nogil:
    """Write to a stripe that the base has. What must follow is settled here, before the write is
    issued: a later DURABLE says nothing about this write's data."""
    cdef Request* request = &queue.requests[tag]
    cdef uint8_t state = stripe_state(queue.shared, request.stripe)
    cdef uint8_t kind = write_kind(request)
    cdef bint dsync = False
    ensure(state >= PRESENT, b"a guest's write goes only to a stripe that the base has")
    if request.durable:
        if state != DURABLE:
            request.follows = FOLLOWS_ROUND
        elif (kind == ACT_WRITE_BASE
                and not (request.offset | request.length) & queue.shared.dsync_mask):
            dsync = True
        else:
            request.follows = FOLLOWS_SYNC
    start_io(queue, tag, WRITING, kind, dsync, actions)


cdef void start_sync(Queue* queue, Actions* actions) noexcept nogil:
    """fdatasync for all who wait; those that come later wait for the next one."""
    cdef Action* action
    ensure(not queue.syncing, b"a queue runs one fdatasync at a time")
    queue.sync_running = queue.sync_next
    queue.sync_next = NONE16
    queue.syncing = True
    queue.stats.syncs += 1
    action = emit(actions, ACT_SYNC_BASE)
    action.token = queue.depth


cdef void await_sync(Queue* queue, uint16_t tag, Actions* actions) noexcept nogil:
    queue.requests[tag].state = AWAITING_SYNC
    queue.requests[tag].next = queue.sync_next
    queue.sync_next = tag
    if not queue.syncing:
        start_sync(queue, actions)


# -- events --------------------------------------------------------------------------------------

cdef void on_flush(Queue* queue, uint16_t tag, Actions* actions) noexcept nogil:
    if latched(queue):
        complete(queue, tag, -EIO, actions)
    elif queue.shared.cache == CACHE_UNSAFE:
        complete(queue, tag, 0, actions)
    elif load_i64(&queue.shared.undurable) != 0:
        ask(queue, tag, AWAITING_ROUND, MSG_JOIN, 0, actions)
    elif load_u32(&queue.shared.base) == BASE_SYNCED:
        complete(queue, tag, 0, actions)
    else:
        await_sync(queue, tag, actions)


cdef void on_read(Queue* queue, uint16_t tag, Actions* actions) noexcept nogil:
    cdef Request* request = &queue.requests[tag]
    if stripe_state(queue.shared, request.stripe) >= PRESENT:
        start_io(queue, tag, READING_BASE, ACT_READ_BASE, False, actions)
        return
    if image_lost(queue.shared):
        complete(queue, tag, -EIO, actions)
        return
    queue.stats.cold_reads += 1
    start_io(queue, tag, READING_IMAGE, ACT_READ_IMAGE, False, actions)
    if queue.shared.copy_on_read:
        send(queue, tag, MSG_WANT, 0, actions)


cdef void on_write(Queue* queue, uint16_t tag, Actions* actions) noexcept nogil:
    cdef Request* request = &queue.requests[tag]
    if request.durable and latched(queue):
        complete(queue, tag, -EIO, actions)
    elif stripe_state(queue.shared, request.stripe) >= PRESENT:
        start_write(queue, tag, actions)
    elif request.length == queue.shared.stripe_bytes:
        ask(queue, tag, AWAITING_CLAIM, MSG_CLAIM, 0, actions)
    else:
        ask(queue, tag, AWAITING_STRIPE, MSG_HYDRATE, 0, actions)


cdef void discard_more(Queue* queue, uint16_t tag, Actions* actions) noexcept nogil:
    """Discard the next row of stripes that the base has, in one piece. A stripe that the base comes
    to have meanwhile may be passed over: a discard is a hint."""
    cdef Request* request = &queue.requests[tag]
    cdef Shared* shared = queue.shared
    cdef uint64_t end = request.offset + request.length
    cdef uint64_t start = request.position
    cdef uint64_t stop
    cdef Action* action
    while start < end and stripe_state(shared, stripe_at(shared, start)) < PRESENT:
        start = next_stripe(shared, start)
    if start >= end:
        complete(queue, tag, 0, actions)
        return
    stop = start
    while stop < end and stripe_state(shared, stripe_at(shared, stop)) >= PRESENT:
        stop = end if stripe_at(shared, stop) == shared.image_stripes else next_stripe(shared, stop)
    request.position = end if stop > end else stop
    request.state = DISCARDING
    action = emit(actions, ACT_DISCARD_BASE)
    action.token = tag
    action.tag = tag
    action.offset = DATA_OFFSET + start
    action.length = <uint32_t>(request.position - start)


cdef inline uint64_t next_stripe(Shared* shared, uint64_t offset) noexcept nogil:
    """The first byte of the stripe behind that of `offset`."""
    return ((offset >> shared.stripe_shift) + 1) << shared.stripe_shift


cdef inline bint is_valid(Shared* shared, const Event* event) noexcept nogil:
    """What the kernel sends: chunk_sectors keeps all but a DISCARD inside a stripe, and a result
    counts a DISCARD's bytes in 31 bits."""
    cdef uint64_t device_bytes = load_u64(&shared.device_bytes)
    if (event.length == 0 or event.length >> 31 or event.offset >= device_bytes
            or event.length > device_bytes - event.offset):
        return False
    return (event.op == OP_DISCARD
            or (event.offset & (shared.stripe_bytes - 1)) + event.length <= shared.stripe_bytes)


cdef inline bint is_durable(Shared* shared, const Event* event) noexcept nogil:
    """Whether a write must be durable when it completes."""
    return (shared.cache != CACHE_UNSAFE and (event.fua or shared.cache == CACHE_WRITETHROUGH)
            and (event.op == OP_WRITE or event.op == OP_WRITE_ZEROES))


cdef void on_request(Queue* queue, const Event* event, Actions* actions) noexcept nogil:
    cdef uint16_t tag = event.tag
    cdef Request* request
    ensure(tag < queue.depth, b"a tag is below the queue's depth")
    request = &queue.requests[tag]
    ensure(request.state == IDLE, b"a tag carries one request at a time")
    memset(request, 0, sizeof(Request))
    request.op = event.op
    request.durable = is_durable(queue.shared, event)
    request.unmap = event.unmap
    request.state = WRITING
    queue.active += 1
    if event.op == OP_FLUSH:
        # A flush's start sector is 2^64 − 1: no stripe is derived from it.
        on_flush(queue, tag, actions)
        return
    request.offset = event.offset
    request.length = event.length
    if event.op > OP_DISCARD and event.op != OP_WRITE_ZEROES:
        complete(queue, tag, -EOPNOTSUPP, actions)
        return
    if not is_valid(queue.shared, event):
        complete(queue, tag, -EINVAL, actions)
        return
    request.stripe = stripe_at(queue.shared, event.offset)
    if event.op == OP_READ:
        on_read(queue, tag, actions)
    elif event.op == OP_DISCARD:
        request.position = event.offset
        discard_more(queue, tag, actions)
    else:
        on_write(queue, tag, actions)


cdef inline void base_changed(Queue* queue) noexcept nogil:
    """Before the write completes: a flush that its guest sends then must find it so."""
    if load_u32(&queue.shared.base) != BASE_CHANGED:
        store_u32(&queue.shared.base, BASE_CHANGED)


cdef void on_write_done(Queue* queue, uint16_t tag, int32_t result,
                        Actions* actions) noexcept nogil:
    cdef Request* request = &queue.requests[tag]
    base_changed(queue)
    if result < 0:
        complete(queue, tag, result, actions)
    elif request.follows == FOLLOWS_ROUND:
        ask(queue, tag, AWAITING_ROUND, MSG_JOIN, 0, actions)
    elif request.durable and latched(queue):
        complete(queue, tag, -EIO, actions)
    elif request.follows == FOLLOWS_SYNC:
        await_sync(queue, tag, actions)
    else:
        complete(queue, tag, 0, actions)


cdef void on_image_read(Queue* queue, uint16_t tag, int32_t result,
                        Actions* actions) noexcept nogil:
    cdef Request* request = &queue.requests[tag]
    if image_lost(queue.shared):
        # Read before that or after: nobody can tell.
        result = -EIO
    if result < 0 and stripe_state(queue.shared, request.stripe) >= PRESENT:
        start_io(queue, tag, READING_BASE, ACT_READ_BASE, False, actions)
    else:
        complete(queue, tag, result, actions)


cdef void on_discard_done(Queue* queue, uint16_t tag, int32_t result,
                          Actions* actions) noexcept nogil:
    base_changed(queue)
    if result < 0:
        complete(queue, tag, result, actions)
    else:
        discard_more(queue, tag, actions)


cdef void on_sync_done(Queue* queue, int32_t result, Actions* actions) noexcept nogil:
    cdef uint16_t tag = queue.sync_running
    cdef uint16_t following
    ensure(queue.syncing, b"an fdatasync ends once")
    if result < 0:
        set_once_u32(queue.shared.latch, <uint32_t>-result)
    elif latched(queue):
        result = -EIO
    queue.syncing = False
    queue.sync_running = NONE16
    while tag != NONE16:
        following = queue.requests[tag].next
        complete(queue, tag, result, actions)
        tag = following
    if queue.sync_next != NONE16:
        start_sync(queue, actions)


cdef void on_done(Queue* queue, const Event* event, Actions* actions) noexcept nogil:
    cdef uint16_t tag = <uint16_t>event.token
    cdef Request* request
    if event.token == queue.depth:
        on_sync_done(queue, event.result, actions)
        return
    ensure(event.token < queue.depth, b"a token is a tag or the queue's fdatasync")
    request = &queue.requests[tag]
    if request.state == READING_BASE:
        complete(queue, tag, event.result, actions)
    elif request.state == READING_IMAGE:
        on_image_read(queue, tag, event.result, actions)
    elif request.state == WRITING:
        on_write_done(queue, tag, event.result, actions)
    elif request.state == DISCARDING:
        on_discard_done(queue, tag, event.result, actions)
    elif request.state == OVERWRITE:
        request.result = event.result
        ask(queue, tag, AWAITING_PRESENT, MSG_WRITTEN, event.result, actions)
    else:
        ensure(False, b"I/O ends only for a request that has I/O in flight")


cdef void on_grant(Queue* queue, uint16_t tag, int32_t result, Actions* actions) noexcept nogil:
    cdef Request* request = &queue.requests[tag]
    if result < 0:
        complete(queue, tag, result, actions)
    elif result == CLAIMED:
        ensure(request.state == AWAITING_CLAIM, b"only a claim is answered CLAIMED")
        start_io(queue, tag, OVERWRITE, write_kind(request), False, actions)
    else:
        start_write(queue, tag, actions)


cdef void on_answer(Queue* queue, uint16_t tag, int32_t result, Actions* actions) noexcept nogil:
    """DONE: the stripe that this request overwrote is PRESENT, or the round is over."""
    cdef Request* request = &queue.requests[tag]
    if (request.state == AWAITING_PRESENT and request.result >= 0 and result >= 0
            and request.durable):
        ask(queue, tag, AWAITING_ROUND, MSG_JOIN, 0, actions)
    elif request.state == AWAITING_PRESENT and request.result < 0:
        complete(queue, tag, request.result, actions)
    else:
        complete(queue, tag, result, actions)


cdef void on_message(Queue* queue, const Event* event, Actions* actions) noexcept nogil:
    cdef uint16_t tag = event.tag
    cdef uint8_t state
    ensure(tag < queue.depth, b"a message is for a tag of this queue")
    state = queue.requests[tag].state
    queue.awaiting -= 1
    if event.op == MSG_GRANT:
        ensure(state == AWAITING_STRIPE or state == AWAITING_CLAIM,
               b"a grant is for a request that asked")
        on_grant(queue, tag, event.result, actions)
    else:
        ensure(event.op == MSG_DONE, b"the hydrator sends GRANT and DONE")
        ensure(state == AWAITING_PRESENT or state == AWAITING_ROUND,
               b"an answer is for a request that asked")
        on_answer(queue, tag, event.result, actions)


cdef void queue_step(Queue* queue, const Event* event, Actions* actions) noexcept nogil:
    """The only way in. Order of events is the caller's; every order that the kernel and the
    hydrator can produce is legal."""
    if event.kind == EVENT_REQUEST:
        on_request(queue, event, actions)
    elif event.kind == EVENT_DONE:
        on_done(queue, event, actions)
    elif event.kind == EVENT_MESSAGE:
        on_message(queue, event, actions)
    else:
        ensure(False, b"a queue knows requests, completions and messages")
