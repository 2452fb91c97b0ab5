"""The loops of the queue threads and of the hydrator thread; see _threads.pxd."""

from libc.errno cimport EIO
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from ublk_ubi._abi cimport (
    UBI_SECTOR_SHIFT, UBI_U_IO_COMMIT_AND_FETCH_REQ, UBI_U_IO_FETCH_REQ,
    UBI_UBLK_AUTO_BUF_REG_FALLBACK, UBI_UBLK_IO_F_FUA, UBI_UBLK_IO_F_NEED_REG_BUF,
    UBI_UBLK_IO_F_NOUNMAP, UBI_UBLK_IO_RES_OK, ubi_ublk_auto_buf_reg_addr, ubi_ublk_io_desc,
    ubi_ublk_io_op, ubi_ublk_user_copy_pos,
)
from ublk_ubi._atomic cimport ensure, load_u32, load_u64, peek_u32, store_u32
from ublk_ubi._core cimport (
    ACT_COMPLETE, ACT_HYDRATED, ACT_SEND, ACT_STARTED, ACT_STOPPED, EVENT_BUDGET, EVENT_DONE,
    EVENT_HYDRATE, EVENT_MESSAGE, EVENT_REQUEST, EVENT_ROUND, EVENT_START, EVENT_STOP, EVENT_TICK,
    MEM_PAGE, MEM_REQUEST, MEM_STRIPE, MSG_WANT, OP_READ, OP_WRITE, PAGE, Action, Actions, Event,
)
from ublk_ubi._format cimport all_zero
from ublk_ubi._histogram cimport histogram_add
from ublk_ubi._hydrator cimport FETCH_READ, ROUND_IDLE, Hydrator, hydrator_step, round_due
from ublk_ubi._mailbox cimport (
    Doorbell, Mailbox, Message, doorbell_arm, doorbell_disarm, doorbell_needed, mailbox_empty,
    mailbox_put, mailbox_room, mailbox_take,
)
from ublk_ubi._queue cimport queue_step, request_kind
from ublk_ubi._ring cimport (
    CQE_DOORBELL, CQE_DOORBELL_FAILED, CQE_OP, CQE_UBLK, CQE_WAKE, FILE_UBLKC, cqe_index, cqe_kind,
    ring_action, ring_arm_wake, ring_doorbell, ring_drop_image, ring_enter, ring_exit, ring_init,
    ring_op_done, ring_register_requests, ring_ublk,
)
from ublk_ubi._uring cimport (
    PR_SET_IO_FLUSHER, PR_SET_NAME, cqe_at, drop_capabilities, io_uring_cq_advance,
    io_uring_cq_ready, io_uring_cqe, now_ns, prctl, pread, pwrite,
)

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd_write(int fd, uint64_t value) noexcept


cdef enum:
    MAX_PACE_US = 1000000000       # with options.MAX_RATE no product leaves 64 bits


# -- what both kinds of thread do ----------------------------------------------------------------

cdef void tell(ThreadBase* base, uint32_t state, int32_t status) noexcept nogil:
    """Say how far this thread is."""
    base.status = status
    store_u32(&base.state, state)
    eventfd_write(base.device.notify_fd, 1)


cdef bint set_up(ThreadBase* base, Doorbell* bell, uint32_t entries) noexcept nogil:
    """The ring, made by the thread that submits. False, and told, when it cannot be had.

    A ring may be for the privileged (io_uring_disabled = 1); most of what is done with it is not.
    """
    cdef int status
    # Memory that this thread allocates in the kernel must not wait for I/O through its own disk.
    prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0)
    prctl(PR_SET_NAME, <unsigned long>base.name, 0, 0, 0)
    status = ring_init(&base.ring, entries, base.ops, base.op_count, base.files)
    if status < 0:
        tell(base, THREAD_FAILED, status)
        return False
    base.ring.base_is_block = base.device.base_is_block
    base.ring.block = base.device.block
    base.ring.zeros = base.device.zeros
    base.ring.zeros_bytes = base.device.shared.stripe_bytes
    bell.ring_fd = base.ring.uring.ring_fd
    ring_arm_wake(&base.ring, base.wake_fd)
    return True


cdef inline void put(Mailbox* box, const Action* action) noexcept nogil:
    cdef Message message
    message.kind = action.message
    message.tag = action.tag
    message.stripe = action.stripe
    message.result = action.result
    mailbox_put(box, &message)


cdef inline void ring_bell(ThreadBase* base, Mailbox* box, Doorbell* bell) noexcept nogil:
    """Wake the receiver of what lies in `box` if it sleeps. Nothing there, nobody woken: two that
    woke each other on every turn would never sleep again."""
    if not mailbox_empty(box) and doorbell_needed(bell):
        base.doorbells += 1
        ring_doorbell(&base.ring, bell.ring_fd)


cdef inline void message_event(Event* event, uint16_t queue,
                               const Message* message) noexcept nogil:
    memset(event, 0, sizeof(Event))
    event.kind = EVENT_MESSAGE
    event.op = message.kind
    event.queue = queue
    event.tag = message.tag
    event.stripe = message.stripe
    event.result = message.result


cdef inline bint op_event(ThreadBase* base, const io_uring_cqe* cqe, Event* event) noexcept nogil:
    """False while the operation goes on."""
    cdef int32_t result
    if not ring_op_done(&base.ring, cqe_index(cqe.user_data), cqe.res, &result):
        return False
    memset(event, 0, sizeof(Event))
    event.kind = EVENT_DONE
    event.token = cqe_index(cqe.user_data)
    event.result = result
    return True


cdef inline void other_cqe(ThreadBase* base, uint8_t kind) noexcept nogil:
    """Doorbells, and the control thread's call: the turn itself is the answer."""
    if kind == CQE_WAKE:
        ring_arm_wake(&base.ring, base.wake_fd)
    elif kind == CQE_DOORBELL_FAILED:
        base.doorbells_failed += 1
    else:
        ensure(kind == CQE_DOORBELL, b"a CQE is of a kind that was submitted")


cdef inline void look_around(ThreadBase* base) noexcept nogil:
    """What the control thread asks of any thread."""
    if load_u32(&base.drop_image) and not peek_u32(&base.image_dropped):
        ring_drop_image(&base.ring)
        store_u32(&base.image_dropped, 1)
        eventfd_write(base.device.notify_fd, 1)


# -- queue thread --------------------------------------------------------------------------------

cdef inline uint8_t* request_buffer(QueueThread* thread, uint16_t tag) noexcept nogil:
    return thread.buffers + tag * thread.buffer_stride


cdef inline void tell_ublk(QueueThread* thread, uint32_t command, uint16_t tag,
                           int32_t result) noexcept nogil:
    """FETCH or COMMIT, with where the next request's data shall go."""
    if thread.registered == NULL:
        ring_ublk(&thread.base.ring, command, thread.queue.index, tag, result,
                  <uint64_t>request_buffer(thread, tag), 0)
    else:
        ring_ublk(&thread.base.ring, command, thread.queue.index, tag, result, 0,
                  ubi_ublk_auto_buf_reg_addr(tag, UBI_UBLK_AUTO_BUF_REG_FALLBACK))


cdef bint copy_in(QueueThread* thread, uint16_t tag,
                  const ubi_ublk_io_desc* descriptor) noexcept nogil:
    """Zero copy: a request whose pages are not in its slot goes through the tag's buffer. False
    when a WRITE's data cannot be had."""
    cdef uint8_t op = ubi_ublk_io_op(descriptor)
    cdef uint32_t length = descriptor.nr_sectors << UBI_SECTOR_SHIFT
    if op != OP_READ and op != OP_WRITE:
        return True
    thread.registered[tag] = (descriptor.op_flags & UBI_UBLK_IO_F_NEED_REG_BUF) == 0
    if thread.registered[tag]:
        return True
    thread.fallbacks += 1
    return op == OP_READ or pread(
        thread.base.files[<int>FILE_UBLKC], request_buffer(thread, tag), length,
        ubi_ublk_user_copy_pos(thread.queue.index, tag, 0)) == <long>length


cdef inline int32_t copy_out(QueueThread* thread, const Action* action) noexcept nogil:
    """… and a READ's data, from there. The request's result."""
    if (thread.registered == NULL or thread.registered[action.tag] or action.result <= 0
            or thread.queue.requests[action.tag].op != OP_READ):
        return action.result
    if pwrite(thread.base.files[<int>FILE_UBLKC], request_buffer(thread, action.tag),
              <size_t>action.result,
              ubi_ublk_user_copy_pos(thread.queue.index, action.tag, 0)) != action.result:
        return -EIO
    return action.result


cdef void finish_request(QueueThread* thread, const Action* action) noexcept nogil:
    cdef int kind = request_kind(thread.queue.requests[action.tag].op)
    if kind >= 0:
        histogram_add(&thread.latency[kind], thread.now - thread.started[action.tag])
    tell_ublk(thread, UBI_U_IO_COMMIT_AND_FETCH_REQ, action.tag, copy_out(thread, action))


cdef void send_to_hydrator(QueueThread* thread, const Action* action) noexcept nogil:
    cdef Mailbox* box = &thread.base.device.to_hydrator[thread.queue.index]
    # A hint may be dropped, a request may not: hints leave a slot for every tag.
    if action.message == MSG_WANT and mailbox_room(box) <= thread.queue.depth:
        return
    put(box, action)


cdef void queue_event(QueueThread* thread, const Event* event) noexcept nogil:
    cdef Actions* actions = &thread.base.actions
    cdef const Action* action
    cdef uint32_t i
    actions.count = 0
    queue_step(&thread.queue, event, actions)
    for i in range(actions.count):
        action = &actions.items[i]
        if action.kind == ACT_COMPLETE:
            finish_request(thread, action)
        elif action.kind == ACT_SEND:
            send_to_hydrator(thread, action)
        else:
            ring_action(&thread.base.ring, action)


cdef void on_ublk(QueueThread* thread, uint16_t tag, int32_t res) noexcept nogil:
    """FETCH or COMMIT ended: a new request, or the tag is taken back."""
    cdef const ubi_ublk_io_desc* descriptor = &thread.descriptors[tag]
    cdef Event event
    if res != UBI_UBLK_IO_RES_OK:
        # -ENODEV: the device is stopping. Anything else leaves a tag that the kernel never fills
        # again; STOP_DEV and the process's end both cope with that.
        thread.tags_gone += 1
        return
    if load_u32(&thread.base.leave):
        return  # the kernel sends it again, to the next daemon
    if thread.registered != NULL and not copy_in(thread, tag, descriptor):
        tell_ublk(thread, UBI_U_IO_COMMIT_AND_FETCH_REQ, tag, -EIO)
        return
    memset(&event, 0, sizeof(event))
    event.kind = EVENT_REQUEST
    event.op = ubi_ublk_io_op(descriptor)
    event.fua = (descriptor.op_flags & UBI_UBLK_IO_F_FUA) != 0
    event.unmap = (descriptor.op_flags & UBI_UBLK_IO_F_NOUNMAP) == 0
    event.tag = tag
    event.offset = descriptor.start_sector << UBI_SECTOR_SHIFT
    event.length = descriptor.nr_sectors << UBI_SECTOR_SHIFT
    thread.started[tag] = thread.now
    queue_event(thread, &event)


cdef void queue_completions(QueueThread* thread) noexcept nogil:
    cdef const io_uring_cqe* cqe
    cdef unsigned count = io_uring_cq_ready(&thread.base.ring.uring)
    cdef unsigned i
    cdef uint8_t kind
    cdef Event event
    for i in range(count):
        cqe = cqe_at(&thread.base.ring.uring, i)
        kind = cqe_kind(cqe.user_data)
        if kind == CQE_OP:
            if op_event(&thread.base, cqe, &event):
                queue_event(thread, &event)
        elif kind == CQE_UBLK:
            on_ublk(thread, <uint16_t>cqe_index(cqe.user_data), cqe.res)
        else:
            other_cqe(&thread.base, kind)
    io_uring_cq_advance(&thread.base.ring.uring, count)


cdef void queue_messages(QueueThread* thread) noexcept nogil:
    cdef Message message
    cdef Event event
    while mailbox_take(&thread.base.device.to_queue[thread.queue.index], &message):
        message_event(&event, thread.queue.index, &message)
        queue_event(thread, &event)


cdef void queue_wait(QueueThread* thread, Doorbell* bell) noexcept nogil:
    """Submit, and sleep unless a message is there. Only who awaits a message needs the tick."""
    cdef uint64_t timeout = <uint64_t>-1
    doorbell_arm(bell)
    if not mailbox_empty(&thread.base.device.to_queue[thread.queue.index]):
        timeout = 0
    elif thread.queue.awaiting > 0:
        timeout = TICK_NS
    ring_enter(&thread.base.ring, timeout)
    doorbell_disarm(bell)


cdef void run_queue(QueueThread* thread) noexcept nogil:
    """Serve one hardware queue until the kernel has taken back every tag."""
    cdef ThreadBase* base = &thread.base
    cdef Doorbell* own = &base.device.bells[thread.queue.index]
    cdef Doorbell* hydrator = &base.device.bells[base.device.shared.queues]
    cdef uint16_t tag
    cdef int status
    if not set_up(base, own, 2 * <uint32_t>thread.queue.depth + 8):
        return
    base.ring.memory[<int>MEM_REQUEST].start = thread.buffers
    base.ring.memory[<int>MEM_REQUEST].stride = thread.buffer_stride
    if thread.registered != NULL:
        status = ring_register_requests(&base.ring, thread.queue.depth)
        if status < 0:
            ring_exit(&base.ring)
            tell(base, THREAD_FAILED, status)
            return
        base.ring.registered = thread.registered
    for tag in range(thread.queue.depth):
        tell_ublk(thread, UBI_U_IO_FETCH_REQ, tag, 0)
    ring_enter(&base.ring, 0)
    # Who fetches without them is not trusted with partitions: START_DEV would look for none.
    drop_capabilities()
    tell(base, THREAD_RUNNING, 0)
    while thread.tags_gone < thread.queue.depth or thread.queue.active > 0:
        queue_wait(thread, own)
        if load_u32(&base.quit) or (load_u32(&base.leave) and thread.queue.active == 0):
            # What the last turn committed leaves with this; nobody awaits its CQE.
            ring_enter(&base.ring, 0)
            break
        base.turns += 1
        thread.now = now_ns()
        queue_completions(thread)
        queue_messages(thread)
        ring_bell(base, &base.device.to_hydrator[thread.queue.index], hydrator)
        look_around(base)
    if load_u32(&base.leave) or load_u32(&base.quit):
        # Its tags are taken back once this thread has ended: Linux 6.12 may forget a request for
        # ever that comes while they are taken back from a thread that goes on, and waits for it.
        thread.ring_is_left = True
    else:
        ring_exit(&base.ring)
    tell(base, THREAD_STOPPED, 0)


# -- hydrator thread -----------------------------------------------------------------------------

cdef void hydrator_event(HydratorThread* thread, const Event* event) noexcept nogil:
    cdef Actions* actions = &thread.base.actions
    cdef const Action* action
    cdef uint32_t i
    actions.count = 0
    hydrator_step(&thread.hydrator, event, actions)
    for i in range(actions.count):
        action = &actions.items[i]
        if action.kind == ACT_SEND:
            put(&thread.base.device.to_queue[action.queue], action)
        elif action.kind == ACT_STARTED:
            tell(&thread.base, THREAD_LIVE if action.result >= 0 else THREAD_FAILED, action.result)
        elif action.kind == ACT_HYDRATED:
            store_u32(&thread.hydrated, 1)
            eventfd_write(thread.base.device.notify_fd, 1)
        elif action.kind == ACT_STOPPED:
            tell(&thread.base, THREAD_STOPPED, action.result)
        else:
            ring_action(&thread.base.ring, action)


cdef void hydrator_simple_event(HydratorThread* thread, uint8_t kind, uint8_t op,
                                uint64_t offset) noexcept nogil:
    cdef Event event
    memset(&event, 0, sizeof(event))
    event.kind = kind
    event.op = op
    event.offset = offset
    hydrator_event(thread, &event)


cdef inline bint is_zeros(HydratorThread* thread, const Event* event) noexcept nogil:
    """Whether what ended is the read of a stripe that is all zeros."""
    cdef uint32_t length = thread.base.device.shared.stripe_bytes
    return (event.token < thread.hydrator.buffers and event.result >= 0
            and thread.hydrator.fetches[event.token].phase == FETCH_READ
            and all_zero(thread.stripes + <uint64_t>event.token * length, length))


cdef void hydrator_completions(HydratorThread* thread) noexcept nogil:
    cdef const io_uring_cqe* cqe
    cdef unsigned count = io_uring_cq_ready(&thread.base.ring.uring)
    cdef unsigned i
    cdef uint8_t kind
    cdef Event event
    for i in range(count):
        cqe = cqe_at(&thread.base.ring.uring, i)
        kind = cqe_kind(cqe.user_data)
        if kind != CQE_OP:
            other_cqe(&thread.base, kind)
        elif op_event(&thread.base, cqe, &event):
            event.zeros = is_zeros(thread, &event)
            hydrator_event(thread, &event)
    io_uring_cq_advance(&thread.base.ring.uring, count)


cdef void hydrator_messages(HydratorThread* thread) noexcept nogil:
    """All queues' mail, one message a queue in turn: no queue starves another."""
    cdef Device* device = thread.base.device
    cdef Message message
    cdef Event event
    cdef uint16_t queue
    cdef bint more = True
    while more:
        more = False
        for queue in range(device.shared.queues):
            if mailbox_take(&device.to_hydrator[queue], &message):
                message_event(&event, queue, &message)
                hydrator_event(thread, &event)
                more = True


cdef bint hydrator_has_mail(HydratorThread* thread) noexcept nogil:
    cdef Device* device = thread.base.device
    cdef uint16_t queue
    for queue in range(device.shared.queues):
        if not mailbox_empty(&device.to_hydrator[queue]):
            return True
    return False


# -- background hydration's pace --

cdef inline uint64_t burst(HydratorThread* thread, uint64_t rate) noexcept nogil:
    """The most that is begun at once, bytes."""
    cdef uint64_t least = thread.base.device.shared.stripe_bytes
    return rate // 8 if rate // 8 > least else least


cdef void pace(HydratorThread* thread, uint64_t now) noexcept nogil:
    """Tell the engine what the control thread wants, and what it may copy until the next turn."""
    cdef uint32_t wanted = load_u32(&thread.hydrate)
    cdef uint32_t kicks = load_u32(&thread.kicks)
    cdef uint64_t rate = load_u64(&thread.rate)
    cdef uint64_t budget = thread.hydrator.budget
    cdef uint64_t most, elapsed_us
    if wanted != thread.hydrate_seen or kicks != thread.kicks_seen:
        thread.hydrate_seen = wanted
        thread.kicks_seen = kicks
        hydrator_simple_event(thread, EVENT_HYDRATE, wanted, 0)
    if not wanted:
        return
    if rate == 0:
        if budget < <uint64_t>1 << 62:
            hydrator_simple_event(thread, EVENT_BUDGET, 0, <uint64_t>1 << 63)
        return
    most = burst(thread, rate)
    if budget > most:
        # There was no limit until now.
        thread.paced_at = now
        hydrator_simple_event(thread, EVENT_BUDGET, 0, 0)
    elif budget < thread.base.device.shared.stripe_bytes:
        elapsed_us = (now - thread.paced_at) // 1000
        if elapsed_us > MAX_PACE_US:
            elapsed_us = MAX_PACE_US
        budget += elapsed_us * rate // 1000000
        if budget >= thread.base.device.shared.stripe_bytes:
            thread.paced_at = now
            hydrator_simple_event(thread, EVENT_BUDGET, 0, budget if budget < most else most)


cdef inline uint64_t pace_wait(HydratorThread* thread, uint64_t now) noexcept nogil:
    """ns until the next stripe may be copied; 2^64 − 1: nothing waits for that."""
    cdef uint64_t rate = load_u64(&thread.rate)
    cdef uint64_t missing = thread.base.device.shared.stripe_bytes
    cdef uint64_t due
    if (not thread.hydrate_seen or rate == 0 or thread.hydrator.retry_ticks > 0
            or peek_u32(&thread.hydrated) or thread.hydrator.budget >= missing):
        return <uint64_t>-1
    due = thread.paced_at + (missing - thread.hydrator.budget) * 1000000000 // rate
    return due - now if due > now else 0


# -- the rounds' pace --

cdef inline uint64_t hold_end(const HydratorThread* thread) noexcept nogil:
    """ns: when a round that is due is held back no longer; 2^64 − 1: none is."""
    if thread.due_since == 0:
        return <uint64_t>-1
    return thread.due_since + min(HOLD_ROUNDS * thread.round_ns, <uint64_t>MAX_HOLD_NS)


cdef void pace_rounds(HydratorThread* thread, uint64_t now) noexcept nogil:
    """Begin the round that is due, unless stripes are on their way that would need the next. A
    flush stands for all that the kernel keeps behind it: it may wait for more than one round."""
    cdef Hydrator* hydrator = &thread.hydrator
    if thread.round_began != 0 and hydrator.round == ROUND_IDLE:
        thread.round_ns = (3 * thread.round_ns + now - thread.round_began) // 4
        thread.round_began = 0
    if round_due(hydrator):
        if thread.due_since == 0:
            thread.due_since = now
        if hydrator.arriving > 0 and now < hold_end(thread):
            return
        hydrator_simple_event(thread, EVENT_ROUND, 0, 0)
    thread.due_since = 0
    if thread.round_began == 0 and hydrator.round != ROUND_IDLE:
        thread.round_began = now


cdef void hydrator_wait(HydratorThread* thread, Doorbell* bell) noexcept nogil:
    cdef uint64_t now = now_ns()
    cdef uint64_t timeout = 0
    doorbell_arm(bell)
    if not hydrator_has_mail(thread) and now < thread.next_tick:
        timeout = min(thread.next_tick - now, pace_wait(thread, now))
        if hold_end(thread) < now + timeout:
            timeout = hold_end(thread) - now if hold_end(thread) > now else 0
    ring_enter(&thread.base.ring, timeout)
    doorbell_disarm(bell)


cdef inline bint ended(ThreadBase* base) noexcept nogil:
    return load_u32(&base.state) >= THREAD_STOPPED


cdef void run_hydrator(HydratorThread* thread) noexcept nogil:
    """Serve all queues until told to stop and all is committed, or to quit."""
    cdef ThreadBase* base = &thread.base
    cdef Device* device = base.device
    cdef Doorbell* own = &device.bells[device.shared.queues]
    cdef uint16_t queue
    cdef bint stopping = False
    cdef uint64_t now
    if not set_up(base, own, 2 * base.op_count + 8):
        return
    drop_capabilities()
    base.ring.memory[<int>MEM_STRIPE].start = thread.stripes
    base.ring.memory[<int>MEM_STRIPE].stride = device.shared.stripe_bytes
    base.ring.memory[<int>MEM_PAGE].start = thread.pages
    base.ring.memory[<int>MEM_PAGE].stride = PAGE
    tell(base, THREAD_RUNNING, 0)
    hydrator_simple_event(thread, EVENT_START, 0, 0)
    thread.next_tick = now_ns() + TICK_NS
    while not ended(base):
        hydrator_wait(thread, own)
        if load_u32(&base.quit):
            tell(base, THREAD_STOPPED, 0)
            break
        base.turns += 1
        hydrator_completions(thread)
        hydrator_messages(thread)
        if load_u32(&base.stop) and not stopping:
            stopping = True
            hydrator_simple_event(thread, EVENT_STOP, 0, 0)
        now = now_ns()
        if now >= thread.next_tick and not ended(base):
            thread.next_tick = now + TICK_NS
            hydrator_simple_event(thread, EVENT_TICK, 0, 0)
        if not ended(base):
            pace(thread, now)
            pace_rounds(thread, now)
        look_around(base)
        for queue in range(device.shared.queues):
            ring_bell(base, &device.to_queue[queue], &device.bells[queue])
    # The last answers' doorbells leave with this; the queues' ticks would find them otherwise.
    ring_enter(&base.ring, 0)
    ring_exit(&base.ring)
