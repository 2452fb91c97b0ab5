# cython: wraparound=True, boundscheck=True
"""The engines for tests: events as keyword arguments, actions as named tuples; see _testing.pxd.

Constants of _core, _queue, _hydrator, _lifecycle, _format and _ring are here under their names.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

import mmap
from array import array
from collections import namedtuple

from ublk_ubi cimport _core, _format, _hydrator, _lifecycle, _queue, _ring
from ublk_ubi._core cimport Action, Actions, Event, STATE_MASK
from ublk_ubi._format cimport Slot, crc32c, head_write, slot_check
from ublk_ubi._hydrator cimport (
    Fetch, HydratorMemory, Waiter, WaiterList, header_offset, header_page, hydrator_init,
    hydrator_step, page_first_stripe, round_due,
)
from ublk_ubi._lifecycle cimport (
    SCRATCH_BYTES, LifecycleOptions, TableIdentity, lifecycle_init, lifecycle_states,
    lifecycle_step,
)
from ublk_ubi._mailbox cimport (
    Message, doorbell_arm, doorbell_disarm, doorbell_needed, mailbox_empty, mailbox_put,
    mailbox_room, mailbox_take,
)
from ublk_ubi._queue cimport Request, queue_init, queue_step
from ublk_ubi._ring cimport (
    Op, cqe_index, cqe_kind, ring_action, ring_arm_wake, ring_doorbell, ring_enter, ring_exit,
    ring_drop_image, ring_init, ring_op_done, ring_register_requests, ring_ublk,
)
from ublk_ubi._uring cimport (
    cqe_at, io_uring, io_uring_cq_advance, io_uring_cq_ready, io_uring_cqe, io_uring_sqe, now_ns,
)

cdef extern from *:
    """
    #include <poll.h>
    #include <sched.h>
    #include <sys/eventfd.h>
    /* SQEs that are prepared and not submitted yet. */
    static inline unsigned ubi_pending(struct io_uring *ring)
    {
        return ring->sq.sqe_tail - ring->sq.sqe_head;
    }
    static inline struct io_uring_sqe *ubi_pending_sqe(struct io_uring *ring, unsigned i)
    {
        return &ring->sq.sqes[(ring->sq.sqe_head + i) & ring->sq.ring_mask];
    }
    /* What any earlier use may have left in SQEs. */
    static inline void ubi_soil(struct io_uring *r)
    { memset(r->sq.sqes, 0xff, r->sq.ring_entries * sizeof(*r->sq.sqes)); }
    static inline uint32_t ubi_sqe_rw_flags(const struct io_uring_sqe *s) { return s->rw_flags; }
    static inline uint64_t ubi_sqe_addr3(const struct io_uring_sqe *sqe)
    {
        uint64_t value;
        memcpy(&value, sqe->cmd, sizeof(value));
        return value;
    }
    /* Waits for an eventfd and clears it; 0, or -1 after the time. */
    static inline int ubi_await(int fd, int timeout_ms)
    {
        struct pollfd p = { .fd = fd, .events = POLLIN };
        eventfd_t value;
        return poll(&p, 1, timeout_ms) == 1 ? eventfd_read(fd, &value) : -1;
    }
    """
    unsigned ubi_pending(io_uring* ring) noexcept nogil
    io_uring_sqe* ubi_pending_sqe(io_uring* ring, unsigned i) noexcept nogil
    int ubi_await(int fd, int timeout_ms) noexcept nogil
    int eventfd_write(int fd, uint64_t value) noexcept nogil
    int sched_yield() noexcept nogil
    uint32_t ubi_sqe_rw_flags(const io_uring_sqe* sqe) noexcept nogil
    void ubi_soil(io_uring* ring) noexcept nogil
    uint64_t ubi_sqe_addr3(const io_uring_sqe* sqe) noexcept nogil

cdef dict NAMES = {
    # stripe states and flags
    "ABSENT": _core.ABSENT, "FETCHING": _core.FETCHING, "OVERWRITING": _core.OVERWRITING,
    "PRESENT": _core.PRESENT, "DURABLE": _core.DURABLE, "IN_ROUND": _core.IN_ROUND,
    "WANTED": _core.WANTED, "QUEUED": _core.QUEUED, "STATE_MASK": _core.STATE_MASK,
    # events
    "EVENT_REQUEST": _core.EVENT_REQUEST, "EVENT_DONE": _core.EVENT_DONE,
    "EVENT_MESSAGE": _core.EVENT_MESSAGE, "EVENT_TICK": _core.EVENT_TICK,
    "EVENT_START": _core.EVENT_START, "EVENT_STOP": _core.EVENT_STOP,
    "EVENT_HYDRATE": _core.EVENT_HYDRATE, "EVENT_BUDGET": _core.EVENT_BUDGET,
    "EVENT_ROUND": _core.EVENT_ROUND, "EVENT_GROW": _core.EVENT_GROW,
    "BASE_SYNCING": _core.BASE_SYNCING, "BASE_CHANGED": _core.BASE_CHANGED,
    "BASE_SYNCED": _core.BASE_SYNCED,
    # operations
    "OP_READ": _core.OP_READ, "OP_WRITE": _core.OP_WRITE, "OP_FLUSH": _core.OP_FLUSH,
    "OP_DISCARD": _core.OP_DISCARD, "OP_WRITE_ZEROES": _core.OP_WRITE_ZEROES,
    # messages
    "MSG_WANT": _core.MSG_WANT, "MSG_HYDRATE": _core.MSG_HYDRATE, "MSG_CLAIM": _core.MSG_CLAIM,
    "MSG_WRITTEN": _core.MSG_WRITTEN, "MSG_JOIN": _core.MSG_JOIN, "MSG_GRANT": _core.MSG_GRANT,
    "MSG_DONE": _core.MSG_DONE, "CLAIMED": _core.CLAIMED,
    # actions
    "ACT_READ_IMAGE": _core.ACT_READ_IMAGE, "ACT_READ_BASE": _core.ACT_READ_BASE,
    "ACT_WRITE_BASE": _core.ACT_WRITE_BASE, "ACT_SYNC_BASE": _core.ACT_SYNC_BASE,
    "ACT_SEND": _core.ACT_SEND, "ACT_COMPLETE": _core.ACT_COMPLETE,
    "ACT_STARTED": _core.ACT_STARTED, "ACT_STOPPED": _core.ACT_STOPPED,
    "ACT_HOST": _core.ACT_HOST, "ACT_ZERO_BASE": _core.ACT_ZERO_BASE,
    "ACT_DISCARD_BASE": _core.ACT_DISCARD_BASE, "ACT_HYDRATED": _core.ACT_HYDRATED,
    "CACHE_WRITEBACK": _core.CACHE_WRITEBACK, "CACHE_WRITETHROUGH": _core.CACHE_WRITETHROUGH,
    "CACHE_UNSAFE": _core.CACHE_UNSAFE,
    "MEM_REQUEST": _core.MEM_REQUEST, "MEM_STRIPE": _core.MEM_STRIPE, "MEM_PAGE": _core.MEM_PAGE,
    "MEM_SCRATCH": _core.MEM_SCRATCH,
    "DATA_OFFSET": _core.DATA_OFFSET, "PAGE": _core.PAGE, "PAGE_WINDOW": _hydrator.PAGE_WINDOW,
    # a request's states
    "IDLE": _queue.IDLE, "READING_IMAGE": _queue.READING_IMAGE,
    "READING_BASE": _queue.READING_BASE, "WRITING": _queue.WRITING,
    "AWAITING_STRIPE": _queue.AWAITING_STRIPE, "AWAITING_CLAIM": _queue.AWAITING_CLAIM,
    "OVERWRITE": _queue.OVERWRITE, "AWAITING_PRESENT": _queue.AWAITING_PRESENT,
    "AWAITING_ROUND": _queue.AWAITING_ROUND, "AWAITING_SYNC": _queue.AWAITING_SYNC,
    "DISCARDING": _queue.DISCARDING, "MAX_BACKOFF": _hydrator.MAX_BACKOFF,
    # rounds and lives
    "ROUND_IDLE": _hydrator.ROUND_IDLE, "ROUND_SYNC_DATA": _hydrator.ROUND_SYNC_DATA,
    "ROUND_WRITE_PAGES": _hydrator.ROUND_WRITE_PAGES,
    "ROUND_SYNC_PAGES": _hydrator.ROUND_SYNC_PAGES,
    "LIFE_NEW": _hydrator.LIFE_NEW, "LIFE_STARTING": _hydrator.LIFE_STARTING,
    "LIFE_RUNNING": _hydrator.LIFE_RUNNING, "LIFE_STOPPING": _hydrator.LIFE_STOPPING,
    "LIFE_STOPPED": _hydrator.LIFE_STOPPED,
    # lifecycle
    "PHASE_NEW": _lifecycle.PHASE_NEW, "PHASE_OPEN": _lifecycle.PHASE_OPEN,
    "PHASE_CLOSED": _lifecycle.PHASE_CLOSED, "PHASE_FAILED": _lifecycle.PHASE_FAILED,
    "HOST_FIND_TABLE": _lifecycle.HOST_FIND_TABLE,
    "HOST_BEFORE_WRITE": _lifecycle.HOST_BEFORE_WRITE,
    "HOST_ZERO_TAIL": _lifecycle.HOST_ZERO_TAIL, "HOST_CREATED": _lifecycle.HOST_CREATED,
    "HOST_DROP_TABLE": _lifecycle.HOST_DROP_TABLE, "HOST_MAKE_TABLE": _lifecycle.HOST_MAKE_TABLE,
    "HOST_MAP_TABLE": _lifecycle.HOST_MAP_TABLE,
    "HOST_LATCH_TABLE": _lifecycle.HOST_LATCH_TABLE,
    "HOST_PUBLISH_TABLE": _lifecycle.HOST_PUBLISH_TABLE,
    "HOST_UNLINK_TABLE": _lifecycle.HOST_UNLINK_TABLE,
    "TABLE_NONE": _lifecycle.TABLE_NONE, "TABLE_FOUND": _lifecycle.TABLE_FOUND,
    "TABLE_LIVE": _lifecycle.TABLE_LIVE, "TABLE_DAMAGED": _lifecycle.TABLE_DAMAGED,
    "REFUSE_NOTHING": _lifecycle.REFUSE_NOTHING, "REFUSE_IO": _lifecycle.REFUSE_IO,
    "REFUSE_FOREIGN": _lifecycle.REFUSE_FOREIGN, "REFUSE_VERSION": _lifecycle.REFUSE_VERSION,
    "REFUSE_DAMAGED": _lifecycle.REFUSE_DAMAGED, "REFUSE_NEWER": _lifecycle.REFUSE_NEWER,
    "REFUSE_ADOPT": _lifecycle.REFUSE_ADOPT,
    "REFUSE_STRIPE_UNKNOWN": _lifecycle.REFUSE_STRIPE_UNKNOWN,
    "REFUSE_STRIPE_SIZE": _lifecycle.REFUSE_STRIPE_SIZE,
    "REFUSE_STRIPE_RANGE": _lifecycle.REFUSE_STRIPE_RANGE,
    "REFUSE_TOO_MANY_STRIPES": _lifecycle.REFUSE_TOO_MANY_STRIPES,
    "REFUSE_TOO_SMALL": _lifecycle.REFUSE_TOO_SMALL,
    "REFUSE_IMAGE_SIZE": _lifecycle.REFUSE_IMAGE_SIZE,
    "REFUSE_FINGERPRINT": _lifecycle.REFUSE_FINGERPRINT, "REFUSE_LIVE": _lifecycle.REFUSE_LIVE,
    "REFUSE_COPY": _lifecycle.REFUSE_COPY, "REFUSE_STALE": _lifecycle.REFUSE_STALE,
    "REFUSE_LATCHED": _lifecycle.REFUSE_LATCHED,
    "REFUSE_FOREIGN_WRITER": _lifecycle.REFUSE_FOREIGN_WRITER,
    "REFUSE_NEEDS_IMAGE": _lifecycle.REFUSE_NEEDS_IMAGE,
    # format
    "SLOT_ZERO": _format.SLOT_ZERO, "SLOT_VALID": _format.SLOT_VALID,
    "SLOT_DAMAGED": _format.SLOT_DAMAGED, "SLOT_NEWER": _format.SLOT_NEWER,
    "SLOT_OFFSET": _format.SLOT_OFFSET, "MAX_STRIPES": _core.MAX_STRIPES,
    # ring
    "FILE_IMAGE": _ring.FILE_IMAGE, "FILE_BASE": _ring.FILE_BASE, "FILE_SYNC": _ring.FILE_SYNC,
    "FILE_UBLKC": _ring.FILE_UBLKC, "CQE_OP": _ring.CQE_OP, "CQE_UBLK": _ring.CQE_UBLK,
    "CQE_DOORBELL": _ring.CQE_DOORBELL, "CQE_DOORBELL_FAILED": _ring.CQE_DOORBELL_FAILED,
    "CQE_WAKE": _ring.CQE_WAKE,
}
globals().update(NAMES)

Act = namedtuple("Act", "kind offset length minimum index token stripe result queue tag memory "
                        "message dsync unmap")


cdef void fill_event(Event* event, int kind, dict fields) except *:
    memset(event, 0, sizeof(Event))
    event.kind = kind
    event.offset = fields.pop("offset", 0)
    event.length = fields.pop("length", 0)
    event.token = fields.pop("token", 0)
    event.stripe = fields.pop("stripe", 0)
    event.result = fields.pop("result", 0)
    event.queue = fields.pop("queue", 0)
    event.tag = fields.pop("tag", 0)
    event.op = fields.pop("op", 0)
    event.fua = fields.pop("fua", 0)
    event.unmap = fields.pop("unmap", 0)
    event.zeros = fields.pop("zeros", 0)
    if fields:
        raise TypeError(f"an event has no {sorted(fields)}")


cdef void fill_action(Action* action, int kind, dict fields) except *:
    memset(action, 0, sizeof(Action))
    action.kind = kind
    action.offset = fields.pop("offset", 0)
    action.length = fields.pop("length", 0)
    action.minimum = fields.pop("minimum", action.length)
    action.index = fields.pop("index", 0)
    action.token = fields.pop("token", 0)
    action.memory = fields.pop("memory", 0)
    action.dsync = fields.pop("dsync", 0)
    action.unmap = fields.pop("unmap", 0)
    if fields:
        raise TypeError(f"an action has no {sorted(fields)}")


cdef list acts_of(const Actions* actions):
    cdef uint32_t i
    cdef const Action* a
    found = []
    for i in range(actions.count):
        a = &actions.items[i]
        found.append(Act(a.kind, a.offset, a.length, a.minimum, a.index, a.token, a.stripe,
                         a.result, a.queue, a.tag, a.memory, a.message, a.dsync,
                         a.unmap))
    return found


cdef class Engines:
    """The queues and the hydrator of a device, around one shared state.

    A broken invariant ends the process (SIGABRT), as in the daemon: test those in a child.
    """

    def __cinit__(self, *, uint32_t stripes=8, int queues=1, int depth=4,
                  uint32_t stripe_bytes=65536, image_bytes=None, device_bytes=None,
                  bint copy_on_read=True, uint32_t buffers=4, uint32_t wanted=8, present=(),
                  durable=(), int cache=_core.CACHE_WRITEBACK, uint32_t dsync_mask=0):
        cdef int index
        self.memory = []
        whole = stripes * stripe_bytes
        self.shared.image_bytes = whole if image_bytes is None else image_bytes
        self.shared.device_bytes = 2 * whole if device_bytes is None else device_bytes
        self.shared.stripe_bytes = stripe_bytes
        self.shared.stripe_shift = stripe_bytes.bit_length() - 1
        self.shared.image_stripes = stripes
        self.shared.queues, self.shared.depth = queues, depth
        self.shared.copy_on_read = copy_on_read
        self.shared.dsync_mask = dsync_mask
        self.shared.cache = cache
        self.shared.state = <uint8_t*>self.take(stripes)
        self.state_memory = self.memory[-1]
        self.shared.table = <uint8_t*>self.take(stripes)
        self.table_bytes = self.memory[-1]
        self.shared.latch = &self.latch_word
        for stripe in present:
            self.state_memory[stripe] = _core.PRESENT
            self.table_bytes[stripe] = 1
            self.shared.undurable += 1
        self.page_bytes = bytearray((header_page(stripes - 1) + 1) * _core.PAGE)
        head_write(<uint8_t*><bytearray>self.page_bytes, stripe_bytes, 2)
        for stripe in durable:
            self.state_memory[stripe] = _core.DURABLE
            self.table_bytes[stripe] = 1
            self.page_bytes[header_offset(stripe)] = 1
        self.init_hydrator(buffers, wanted)
        self.queues = <Queue*>self.take(queues * sizeof(Queue))
        for index in range(queues):
            queue_init(&self.queues[index], &self.shared, <uint16_t>index,
                       <Request*>self.take(depth * sizeof(Request)))
        self.queue_actions.capacity = depth + 2
        self.queue_actions.items = <Action*>self.take((depth + 2) * sizeof(Action))

    cdef void init_hydrator(self, uint32_t buffers, uint32_t wanted) except *:
        cdef HydratorMemory memory
        cdef uint32_t tags = <uint32_t>self.shared.queues * self.shared.depth
        memory.buffers = buffers
        memory.page_count = header_page(self.shared.image_stripes - 1) + 1
        memory.pages = <uint8_t*><bytearray>self.page_bytes
        memory.bucket_count = 1 << max(0, (int(tags) - 1).bit_length())
        memory.demand_capacity = 1 << int(tags).bit_length()
        memory.wanted_capacity = wanted
        memory.fetches = <Fetch*>self.take(buffers * sizeof(Fetch))
        memory.free_buffers = <uint32_t*>self.take(buffers * 4)
        memory.waiters = <Waiter*>self.take(tags * sizeof(Waiter))
        memory.buckets = <WaiterList*>self.take(memory.bucket_count * sizeof(WaiterList))
        memory.demand = <uint32_t*>self.take(memory.demand_capacity * 4)
        memory.wanted = <uint32_t*>self.take(memory.wanted_capacity * 4)
        memory.page_present = <uint16_t*>self.take(memory.page_count * 2)
        memory.page_round = <uint16_t*>self.take(memory.page_count * 2)
        hydrator_init(&self.hydrator, &self.shared, &memory)
        self.hydrator_actions.capacity = tags + buffers + _hydrator.PAGE_WINDOW + 3
        self.hydrator_actions.items = <Action*>self.take(
            self.hydrator_actions.capacity * sizeof(Action))

    cdef void* take(self, size_t length) except NULL:
        memory = bytearray(length)
        self.memory.append(memory)
        return <void*><uint8_t*>memory

    def queue_step(self, int queue, int kind, **fields):
        """One step of a queue; returns the actions."""
        cdef Event event
        fill_event(&event, kind, fields)
        self.queue_actions.count = 0
        queue_step(&self.queues[queue], &event, &self.queue_actions)
        self.most_queue_actions = max(self.most_queue_actions, self.queue_actions.count)
        return acts_of(&self.queue_actions)

    def hydrator_step(self, int kind, **fields):
        """One step of the hydrator; returns the actions."""
        cdef Event event
        fill_event(&event, kind, fields)
        self.hydrator_actions.count = 0
        hydrator_step(&self.hydrator, &event, &self.hydrator_actions)
        self.most_hydrator_actions = max(self.most_hydrator_actions, self.hydrator_actions.count)
        return acts_of(&self.hydrator_actions)

    def state(self, int stripe):
        """A stripe's state without the hydrator's flags."""
        return self.state_memory[stripe] & STATE_MASK

    def flags(self, int stripe):
        """The hydrator's flags of a stripe."""
        return self.state_memory[stripe] & ~STATE_MASK

    def request_state(self, int queue, int tag):
        """A request's state."""
        return self.queues[queue].requests[tag].state

    def set_state(self, int stripe, int value):
        """What a hydrator would do to a stripe, for tests of a queue alone."""
        self.shared.undurable += (value == _core.PRESENT) - (
            self.state_memory[stripe] == _core.PRESENT)
        self.state_memory[stripe] = value

    def set_page_byte(self, int offset, int value):
        """What is found on the base at a byte of the header pages."""
        self.page_bytes[offset] = value

    def fetches(self):
        """(stripe, phase) of every buffer in use."""
        cdef uint32_t i
        return [(self.hydrator.fetches[i].stripe, self.hydrator.fetches[i].phase)
                for i in range(self.hydrator.buffers)
                if self.hydrator.fetches[i].phase != _hydrator.FETCH_FREE]

    def queue_stats(self, int queue):
        """A queue's counters."""
        return self.queues[queue].stats

    @property
    def state_bytes(self):
        """The states with the hydrator's flags."""
        return bytes(self.state_memory)

    @property
    def table(self):
        return bytes(self.table_bytes)

    @property
    def pages(self):
        return bytes(self.page_bytes)

    @property
    def latch(self):
        return self.latch_word

    @latch.setter
    def latch(self, uint32_t value):
        self.latch_word = value

    def lose_image(self):
        """What the control thread does once the image is not what it was."""
        self.shared.image_lost = 1

    @property
    def base(self):
        return self.shared.base

    @base.setter
    def base(self, uint32_t value):
        self.shared.base = value

    @property
    def undurable(self):
        return self.shared.undurable

    @property
    def present_count(self):
        return self.hydrator.present_count

    @property
    def round_count(self):
        return self.hydrator.round_count

    @property
    def round(self):
        return self.hydrator.round

    @property
    def round_due(self):
        return round_due(&self.hydrator)

    @property
    def arriving(self):
        return self.hydrator.arriving

    @property
    def stripe_waiters(self):
        """Requests in the buckets' lists."""
        cdef uint32_t i, node, count = 0
        for i in range(self.hydrator.bucket_mask + 1):
            node = self.hydrator.buckets[i].first
            while node != _core.NONE32:
                count += 1
                node = self.hydrator.waiters[node].next
        return count

    @property
    def life(self):
        return self.hydrator.life

    @property
    def free_buffers(self):
        return self.hydrator.free_count

    @property
    def hydrator_stats(self):
        return self.hydrator.stats

    def queue_counts(self, int queue):
        """(active, awaiting) requests of a queue."""
        return self.queues[queue].active, self.queues[queue].awaiting


cdef void fill_identity(TableIdentity* into, dict fields) except *:
    memset(into, 0, sizeof(TableIdentity))
    memcpy(into.uuid, <const uint8_t*><bytes>fields["uuid"], 16)
    memcpy(into.fingerprint, <const uint8_t*><bytes>fields["fingerprint"], 32)
    into.generation = fields["generation"]
    into.device = fields["device"]
    into.inode = fields["inode"]
    into.image_bytes = fields["image_bytes"]
    into.stripe_bytes = fields["stripe_bytes"]
    into.image_stripes = fields["image_stripes"]
    into.latch = fields["latch"]


cdef class LifecycleSteps:
    """The lifecycle engine; `pages` and `scratch` are its memory, to be filled by reads."""

    def __cinit__(self, *, uint64_t base_bytes, uint64_t image_bytes, uint64_t device=1,
                  uint64_t inode=2, bytes fingerprint=b"f" * 32, bytes new_uuid=b"u" * 16,
                  bytes boot_id=b"b" * 16, uint32_t stripe_bytes=0,
                  uint32_t default_stripe_bytes=1048576, uint32_t block_bytes=0,
                  bint format=False, bint adopt=False, bint force=False, bint force_stale=False,
                  bint no_image=False, bint image_lost=False, uint64_t device_bytes=0):
        cdef LifecycleOptions options
        memset(&options, 0, sizeof(options))
        options.base_bytes, options.image_bytes = base_bytes, image_bytes
        options.device, options.inode = device, inode
        memcpy(options.fingerprint, <const uint8_t*>fingerprint, 32)
        memcpy(options.new_uuid, <const uint8_t*>new_uuid, 16)
        memcpy(options.boot_id, <const uint8_t*>boot_id, 16)
        options.stripe_bytes = stripe_bytes
        options.default_stripe_bytes = default_stripe_bytes
        options.block_bytes, options.device_bytes = block_bytes, device_bytes
        options.format = format
        options.adopt = adopt
        options.force = force
        options.force_stale = force_stale
        options.no_image, options.image_lost = no_image, image_lost
        self.pages = bytearray(1025 * _core.PAGE)
        self.scratch = bytearray(SCRATCH_BYTES)
        lifecycle_init(&self.lifecycle, &options, <uint8_t*><bytearray>self.pages,
                       <uint8_t*><bytearray>self.scratch)

    def step(self, int kind, int result=0, uint64_t offset=0):
        """One step; returns the one action, or None at the end."""
        cdef Event event
        cdef Action action
        cdef Actions actions
        memset(&event, 0, sizeof(event))
        event.kind = kind
        event.result = result
        event.offset = offset
        actions.items = &action
        actions.count = 0
        actions.capacity = 1
        lifecycle_step(&self.lifecycle, &event, &actions)
        return acts_of(&actions)[0] if actions.count else None

    def set_table(self, uint8_t[::1] rows):
        """What MAKE_TABLE and MAP_TABLE must do. A bytearray has a byte more than its length."""
        self.table_bytes = rows
        self.lifecycle.table = &rows[0]

    def set_found(self, int state, dict found=None, int temporary_state=0, dict temporary=None):
        """What FIND_TABLE must do; identities as dicts of `identity`'s keys, and "latch"."""
        self.lifecycle.found_state = state
        self.lifecycle.temporary_state = temporary_state
        if found is not None:
            fill_identity(&self.lifecycle.found, found)
        if temporary is not None:
            fill_identity(&self.lifecycle.temporary, temporary)

    def states(self):
        """State bytes and the count of undurable stripes, once it is open."""
        cdef _core.Shared shared
        cdef uint32_t count = self.lifecycle.image_stripes
        cdef uint8_t[::1] states = array("B", bytes(max(1, count)))[:]
        memset(&shared, 0, sizeof(shared))
        shared.state = &states[0]
        lifecycle_states(&self.lifecycle, &shared)
        return bytes(states[:count]), shared.undurable

    @property
    def identity(self):
        """The identity of the table in use, as set_found takes it."""
        cdef const TableIdentity* identity = &self.lifecycle.identity
        return {
            "uuid": identity.uuid[:16], "fingerprint": identity.fingerprint[:32],
            "generation": identity.generation, "device": identity.device,
            "inode": identity.inode, "image_bytes": identity.image_bytes,
            "stripe_bytes": identity.stripe_bytes, "image_stripes": identity.image_stripes,
            "latch": identity.latch,
        }

    @property
    def phase(self):
        return self.lifecycle.phase

    @property
    def refusal(self):
        return self.lifecycle.refusal

    @property
    def errno_(self):
        return self.lifecycle.errno_

    @property
    def image_stripes(self):
        return self.lifecycle.image_stripes

    @property
    def stripe_bytes(self):
        return self.lifecycle.stripe_bytes

    @property
    def page_count(self):
        return self.lifecycle.page_count

    @property
    def slot(self):
        """The 512 bytes of the slot that counts."""
        return (<const uint8_t*>&self.lifecycle.slot)[:sizeof(Slot)]

    @property
    def slot_index(self):
        return self.lifecycle.slot_index

    @property
    def creating(self):
        return bool(self.lifecycle.creating)

    @property
    def adopting(self):
        return bool(self.lifecycle.adopting)

    @property
    def going_on(self):
        return bool(self.lifecycle.going_on)


def crc(bytes data):
    """CRC-32C as the slots use it."""
    return crc32c(<const uint8_t*>data, <uint32_t>len(data))


def slot_condition(bytes sector):
    """What a reader makes of a slot's 512 bytes."""
    if len(sector) != sizeof(Slot):
        raise ValueError("a slot is one sector")
    return slot_check(<const Slot*><const uint8_t*>sector)


def header_place(uint32_t stripe):
    """(offset in bytes, page) of a stripe's header."""
    return header_offset(stripe), header_page(stripe)


def first_stripe_of_page(uint32_t page):
    """The first stripe whose header lies in a page."""
    return page_first_stripe(page)


# -- mailbox --------------------------------------------------------------------------------------

Mail = namedtuple("Mail", "kind tag stripe result")

cdef enum:
    SPIN_LIMIT_NS = 20000000000    # a race that lasts longer has lost a message or a wake-up


cdef class MailboxBench:
    """One mailbox and its receiver's doorbell; `start` is where its counters begin."""

    def __cinit__(self, uint32_t capacity, uint32_t start=0):
        self.slots = bytearray(capacity * sizeof(Message))
        self.box.slots = <Message*><uint8_t*><bytearray>self.slots
        self.box.mask = capacity - 1
        self.box.head = start
        self.box.tail = start

    def put(self, int kind=1, int tag=0, uint32_t stripe=0, int32_t result=0):
        """Put one message; a full mailbox ends the process."""
        cdef Message message
        message.kind = kind
        message.tag = tag
        message.stripe = stripe
        message.result = result
        mailbox_put(&self.box, &message)

    def take(self):
        """The oldest message, or None."""
        cdef Message message
        if not mailbox_take(&self.box, &message):
            return None
        return Mail(message.kind, message.tag, message.stripe, message.result)

    @property
    def room(self):
        return mailbox_room(&self.box)

    @property
    def empty(self):
        return bool(mailbox_empty(&self.box))

    def arm(self):
        """The receiver is about to sleep."""
        doorbell_arm(&self.bell)

    def disarm(self):
        """The receiver is awake."""
        doorbell_disarm(&self.bell)

    def needs_ringing(self):
        """The sender has put something: must it ring?"""
        return bool(doorbell_needed(&self.bell))

    def produce(self, uint32_t count, int bell_fd=-1):
        """Send `count` numbered messages, ringing `bell_fd` as needed; tell how often."""
        cdef uint64_t deadline = now_ns() + SPIN_LIMIT_NS
        cdef uint32_t i
        cdef int rung = 0
        cdef Message message
        with nogil:
            for i in range(count):
                while mailbox_room(&self.box) == 0:
                    sched_yield()
                    if now_ns() > deadline:
                        with gil:
                            raise TimeoutError(f"nobody takes message {i}")
                message.kind = <uint8_t>(i % 251)
                message.tag = <uint16_t>i
                message.stripe = i
                message.result = -<int32_t>i
                mailbox_put(&self.box, &message)
                if bell_fd >= 0 and doorbell_needed(&self.bell):
                    rung += 1
                    eventfd_write(bell_fd, 1)
        return rung

    def consume(self, uint32_t count, int bell_fd=-1):
        """Take `count` messages, whole and in order; sleeps on `bell_fd` when there is none."""
        cdef uint64_t deadline = now_ns() + SPIN_LIMIT_NS
        cdef uint32_t taken = 0
        cdef Message message
        cdef bint good = True
        with nogil:
            while taken < count and good and now_ns() < deadline:
                if mailbox_take(&self.box, &message):
                    good = (message.stripe == taken and message.result == -<int32_t>taken
                            and message.tag == <uint16_t>taken
                            and message.kind == <uint8_t>(taken % 251))
                    taken += 1
                elif bell_fd < 0:
                    sched_yield()
                else:
                    doorbell_arm(&self.bell)
                    if mailbox_empty(&self.box) and ubi_await(bell_fd, 10000) != 0:
                        good = False
                    doorbell_disarm(&self.bell)
        return taken if good else -1


# -- ring -----------------------------------------------------------------------------------------

Sqe = namedtuple("Sqe", "opcode flags fd offset address length rw_flags user_data buffer addr3",
                 defaults=(0, 0))


cdef class RingBench:
    """A ring on real descriptors. Memory `kind` starts at byte kind × `area` of `memory`, and its
    buffers are `stride` bytes apart."""

    def __cinit__(self, *, image=-1, base=-1, sync=-1, ublkc=-1, uint32_t ops=4,
                  uint32_t entries=8, uint64_t area=2097152, uint64_t stride=65536):
        cdef int files[4]
        cdef uint8_t[::1] view
        cdef int kind, status
        files[:] = [image, base, sync, ublkc]
        self.ops = bytearray(ops * sizeof(Op))
        self.area = area
        self.memory = mmap.mmap(-1, 5 * area)
        view = self.memory
        self.address = <uint64_t>&view[0]
        status = ring_init(&self.ring, entries, <Op*><uint8_t*><bytearray>self.ops, ops, files)
        if status < 0:
            raise OSError(-status, "no io_uring")
        self.there = True
        ubi_soil(&self.ring.uring)
        for kind in range(5):
            self.ring.memory[kind].start = &view[kind * area]
            self.ring.memory[kind].stride = stride

    def __dealloc__(self):
        if self.there:
            ring_exit(&self.ring)

    @property
    def fd(self):
        return self.ring.uring.ring_fd

    def action(self, int kind, **fields):
        """Start an action."""
        cdef Action action
        fill_action(&action, kind, fields)
        ring_action(&self.ring, &action)

    def pending(self):
        """The SQEs that are not submitted yet; an address within `memory` counts from its start."""
        cdef const io_uring_sqe* sqe
        cdef unsigned i
        found = []
        for i in range(ubi_pending(&self.ring.uring)):
            sqe = ubi_pending_sqe(&self.ring.uring, i)
            address = sqe.addr if sqe.addr else None
            if self.address <= sqe.addr < self.address + 5 * self.area:
                address -= self.address
            found.append(Sqe(sqe.opcode, sqe.flags, sqe.fd, sqe.off, address, sqe.len,
                             ubi_sqe_rw_flags(sqe), sqe.user_data, sqe.buf_index,
                             ubi_sqe_addr3(sqe)))
        return found

    def pending_commands(self):
        """The 16 bytes of each of their commands to ublk."""
        cdef unsigned i
        return [(<uint8_t*>&ubi_pending_sqe(&self.ring.uring, i).cmd)[:16]
                for i in range(ubi_pending(&self.ring.uring))]

    def enter(self, uint64_t timeout_ns=0):
        """Submit, and wait."""
        with nogil:
            ring_enter(&self.ring, timeout_ns)

    def cqes(self):
        """(kind, index, res) of every CQE that is there."""
        cdef io_uring_cqe* cqe
        found = []
        while io_uring_cq_ready(&self.ring.uring) > 0:
            cqe = cqe_at(&self.ring.uring, 0)
            found.append((cqe_kind(cqe.user_data), cqe_index(cqe.user_data), cqe.res))
            io_uring_cq_advance(&self.ring.uring, 1)
        return found

    def op_done(self, uint32_t token, int32_t res):
        """A CQE of an operation; its result, or None while it goes on."""
        cdef int32_t result = 0
        return result if ring_op_done(&self.ring, token, res, &result) else None

    def ublk(self, uint32_t command, int queue, int tag, int32_t result, uint64_t address,
             uint64_t auto_buffer=0):
        """FETCH or COMMIT."""
        ring_ublk(&self.ring, command, queue, tag, result, address, auto_buffer)

    def register_requests(self, bytes registered):
        """Zero copy: slots for requests' pages; `registered`: a byte a slot, 1: they are there."""
        self.registered = bytearray(registered)
        self.ring.registered = <const uint8_t*><bytearray>self.registered
        return ring_register_requests(&self.ring, len(registered))

    def describe_base(self, *, bint is_block=False, uint32_t block=512, uint64_t zeros_at=0,
                      uint32_t zeros_bytes=0, bint only_writes=False):
        """What the base is; `zeros_at` is the byte of `memory` that zeros are written from;
        `only_writes`: it has said that it can neither punch nor zero a range."""
        self.ring.lacks_punch = only_writes
        self.ring.lacks_range = only_writes
        self.ring.base_is_block = is_block
        self.ring.block = block
        self.ring.zeros = <const uint8_t*>(self.address + zeros_at)
        self.ring.zeros_bytes = zeros_bytes

    def drop_image(self):
        ring_drop_image(&self.ring)

    def doorbell(self, int target):
        """Wake the ring `target`."""
        ring_doorbell(&self.ring, target)

    def arm_wake(self, int event_fd):
        """A CQE once `event_fd` is written."""
        ring_arm_wake(&self.ring, event_fd)
