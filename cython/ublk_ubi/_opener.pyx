"""Runs the lifecycle engine: its I/O on a ring, its host calls on a Python object.

The host (ublk_ubi.table.TableHost and the daemon) keeps tables and whatever is no I/O on the base.
"""

from libc.errno cimport EIO
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

import errno
import os
import threading

from ublk_ubi._atomic cimport ensure, load_u32, set_once_u32
from ublk_ubi._core cimport (
    ACT_HOST, ACT_SYNC_BASE, EVENT_DONE, EVENT_GROW, EVENT_START, EVENT_STOP, MEM_PAGE, MEM_SCRATCH,
    PAGE, Action, Actions, Event,
)
from ublk_ubi._lifecycle cimport (
    HOST_BEFORE_WRITE, HOST_CREATED, HOST_DROP_TABLE, HOST_FIND_TABLE, HOST_LATCH_TABLE,
    HOST_MAKE_TABLE, HOST_MAP_TABLE, HOST_PUBLISH_TABLE, HOST_UNLINK_TABLE, HOST_ZERO_TAIL,
    PHASE_CLOSED, PHASE_FAILED, PHASE_OPEN, PHASE_PUBLISH, SCRATCH_BYTES, TABLE_DAMAGED,
    TABLE_FOUND, TABLE_LIVE, TABLE_NONE, LifecycleOptions, TableIdentity, lifecycle_init,
    lifecycle_step,
)
from ublk_ubi._memory cimport map_memory, munmap
from ublk_ubi._ring cimport (
    CQE_OP, FILE_COUNT, Op, Ring, cqe_index, cqe_kind, ring_action, ring_drop_files,
    ring_enter, ring_exit, ring_init, ring_op_done,
)
from ublk_ubi._uring cimport cqe_at, io_uring_cq_advance, io_uring_cq_ready, io_uring_cqe

from ublk_ubi.table import Identity, TableState

cdef enum:
    MAX_PAGES = 1025               # 14 + 2 × 2,097,152 bytes

BEGIN_S = 1.0                      # within this a growth that has begun has opened its ring

# By Refusal, as _lifecycle.pxd numbers them.
REFUSALS = (
    "nothing", "io", "foreign", "version", "damaged", "newer", "adopt", "stripe_unknown",
    "stripe_size", "stripe_range", "too_many_stripes", "too_small", "image_size", "fingerprint",
    "live", "copy", "stale", "latched", "foreign_writer", "needs_image",
)


class Refused(Exception):
    """The base cannot be opened so; `reason` is one of REFUSALS, `opener` tells what was found."""

    def __init__(self, reason, opener):
        super().__init__(reason)
        self.reason = reason
        self.opener = opener


cdef object identity_of(const TableIdentity* identity):
    return Identity(
        uuid=identity.uuid[:16],
        fingerprint=identity.fingerprint[:32],
        generation=identity.generation,
        device=identity.device,
        inode=identity.inode,
        image_bytes=identity.image_bytes,
        stripe_bytes=identity.stripe_bytes,
        image_stripes=identity.image_stripes,
    )


cdef uint8_t take_found(object found, TableIdentity* into) except? 255:
    """What the host found, into the engine's words; a TableState."""
    memset(into, 0, sizeof(TableIdentity))
    if found.state is TableState.FOUND:
        identity = found.identity
        memcpy(into.uuid, <const uint8_t*><bytes>identity.uuid, 16)
        memcpy(into.fingerprint, <const uint8_t*><bytes>identity.fingerprint, 32)
        into.generation = identity.generation
        into.device = identity.device
        into.inode = identity.inode
        into.image_bytes = identity.image_bytes
        into.stripe_bytes = identity.stripe_bytes
        into.image_stripes = identity.image_stripes
        into.latch = found.latch
        return TABLE_FOUND
    if found.state is TableState.LIVE:
        return TABLE_LIVE
    return TABLE_NONE if found.state is TableState.NONE else TABLE_DAMAGED


cdef class Opener:
    """One base, from open() to close().

    `base_fd` carries the lock and is what is written; `sync_fd` is another description of the same
    file. Sizes are bytes. The descriptors stay the caller's. grow(), close() and let_go() may be
    called by any thread: they wait for each other.
    """

    def __cinit__(self):
        self.pages_length = MAX_PAGES * PAGE
        self.pages = <uint8_t*>map_memory(self.pages_length)
        self.scratch = <uint8_t*>map_memory(SCRATCH_BYTES)
        if self.pages == NULL or self.scratch == NULL:
            raise MemoryError("no memory for the header pages")

    def __dealloc__(self):
        if self.pages != NULL:
            munmap(self.pages, self.pages_length)
        if self.scratch != NULL:
            munmap(self.scratch, SCRATCH_BYTES)

    def __init__(self, *, int base_fd, int sync_fd, uint64_t base_bytes, uint64_t image_bytes,
                 identity, bytes fingerprint, bytes new_uuid, bytes boot_id, uint32_t stripe_bytes,
                 uint32_t default_stripe_bytes, uint32_t block_bytes, bint format, bint adopt,
                 bint force, bint force_stale, bint no_image, bint image_lost=False,
                 uint64_t device_bytes=0):
        cdef LifecycleOptions options
        if len(fingerprint) != 32 or len(new_uuid) != 16 or len(boot_id) != 16:
            raise ValueError("fingerprint has 32 bytes, UUID and boot id have 16")
        memset(&options, 0, sizeof(options))
        self.lock = threading.Lock()
        self.ended = False
        self.base_fd = base_fd
        self.sync_fd = sync_fd
        options.base_bytes = base_bytes
        options.image_bytes = image_bytes
        options.device, options.inode = identity
        memcpy(options.fingerprint, <const uint8_t*>fingerprint, 32)
        memcpy(options.new_uuid, <const uint8_t*>new_uuid, 16)
        memcpy(options.boot_id, <const uint8_t*>boot_id, 16)
        options.stripe_bytes = stripe_bytes
        options.default_stripe_bytes = default_stripe_bytes
        options.block_bytes = block_bytes
        options.device_bytes = device_bytes
        options.format = format
        options.adopt = adopt
        options.force = force
        options.force_stale = force_stale
        options.no_image = no_image
        options.image_lost = image_lost
        lifecycle_init(&self.lifecycle, &options, self.pages, self.scratch)

    def open(self, host):
        """Open or create the base; the host is called as the engine asks.

        Raises Refused, and OSError with the errno of an I/O that failed. What the host raises
        passes through. After any of these the base is as the engine left it, and unusable here;
        but where the table alone got no name, because another has it, the base is closed again.
        """
        try:
            self.run(host, EVENT_START)
        except BaseException:
            if self.lifecycle.phase == PHASE_PUBLISH:
                self.withdraw(host)
            raise
        if self.lifecycle.phase != PHASE_OPEN:
            self.fail()

    def withdraw(self, host):
        """Close what nobody has used yet. A base that cannot be closed keeps its table."""
        self.lifecycle.phase = PHASE_OPEN
        try:
            self.close(host)
        except (OSError, Refused):
            pass

    def close(self, host):
        """Mark the base closed. All must be committed. Raises OSError; the table then stays."""
        with self.lock:
            self.check_open()
            self.run(host, EVENT_STOP)
        if self.lifecycle.phase != PHASE_CLOSED:
            self.fail()

    def grow(self, host, uint64_t device_bytes):
        """Record the disk's new size, once all that was written of the base is durable.

        Raises OSError; the size is then as it was. ESHUTDOWN: the base is open here no more.
        """
        with self.lock:
            self.check_open()
            self.run(host, EVENT_GROW, device_bytes)
            if self.lifecycle.errno_ != 0:
                raise OSError(self.lifecycle.errno_, os.strerror(self.lifecycle.errno_))

    def check_open(self):
        if self.ended or self.lifecycle.phase != PHASE_OPEN:
            raise OSError(errno.ESHUTDOWN, os.strerror(errno.ESHUTDOWN))

    def let_go(self):
        """Begin nothing more: the descriptors are about to be closed. The base stays marked open.

        A growth that waits for the disk is not waited for: its ring holds the fence.
        """
        self.ended = True
        if self.lock.acquire(timeout=BEGIN_S):
            self.lock.release()

    def fail(self):
        """Raise what ended the engine."""
        if self.lifecycle.phase == PHASE_FAILED and self.lifecycle.errno_ != 0:
            raise OSError(self.lifecycle.errno_, os.strerror(self.lifecycle.errno_))
        raise Refused(REFUSALS[self.lifecycle.refusal], self)

    cdef run(self, object host, int event_kind, uint64_t device_bytes=0):
        """Step until the engine asks for nothing more."""
        cdef Ring ring
        cdef Op op
        cdef int files[FILE_COUNT]
        cdef int status
        cdef uint32_t* latch = NULL
        cdef Action action
        cdef Actions actions
        cdef Event event
        files[0] = -1
        files[1] = self.base_fd
        files[2] = self.sync_fd
        files[3] = -1
        if event_kind == EVENT_GROW:
            latch = <uint32_t*><size_t>self.table.latch_address
        with nogil:
            status = ring_init(&ring, 4, &op, 1, files)
        if status < 0:
            raise OSError(-status, f"no io_uring: {os.strerror(-status)}")
        try:
            ring.memory[<int>MEM_PAGE].start = self.pages
            ring.memory[<int>MEM_PAGE].stride = PAGE
            ring.memory[<int>MEM_SCRATCH].start = self.scratch
            ring.memory[<int>MEM_SCRATCH].stride = 1
            actions.items = &action
            actions.capacity = 1
            memset(&event, 0, sizeof(event))
            event.kind = event_kind
            event.offset = device_bytes
            while True:
                actions.count = 0
                lifecycle_step(&self.lifecycle, &event, &actions)
                if actions.count == 0:
                    return
                memset(&event, 0, sizeof(event))
                event.kind = EVENT_DONE
                if action.kind == ACT_HOST:
                    self.call_host(host, action.message)
                else:
                    with nogil:
                        event.result = run_action(&ring, &action)
                        if latch != NULL and action.kind == ACT_SYNC_BASE:
                            event.result = one_verdict(latch, event.result)
        finally:
            with nogil:
                ring_drop_files(&ring)
                ring_exit(&ring)

    cdef void call_host(self, object host, int call) except *:
        cdef uint8_t[::1] rows
        cdef Lifecycle* lifecycle = &self.lifecycle
        if call == HOST_FIND_TABLE:
            found, temporary = host.find_table(self.uuid)
            lifecycle.found_state = take_found(found, &lifecycle.found)
            lifecycle.temporary_state = take_found(temporary, &lifecycle.temporary)
        elif call == HOST_BEFORE_WRITE:
            host.before_write(self)
        elif call == HOST_ZERO_TAIL:
            host.zero_tail(self)
        elif call == HOST_CREATED:
            host.created()
        elif call == HOST_DROP_TABLE:
            host.drop_table(self.uuid)
        elif call == HOST_PUBLISH_TABLE:
            host.publish_table()
        elif call == HOST_LATCH_TABLE:
            host.latch_table(self.uuid, lifecycle.errno_)
        elif call == HOST_UNLINK_TABLE:
            host.unlink_table()
        else:
            if call == HOST_MAKE_TABLE:
                self.table = host.make_table(identity_of(&lifecycle.identity))
            else:
                ensure(call == HOST_MAP_TABLE, b"a host call is one of HostCall")
                self.table = host.map_table(identity_of(&lifecycle.found))
            rows = self.table.rows
            ensure(rows.shape[0] == lifecycle.image_stripes, b"a table has a byte a stripe")
            lifecycle.table = &rows[0]

    # -- what was found, and what the device is made of --

    @property
    def uuid(self):
        return self.lifecycle.slot.uuid[:16]

    @property
    def generation(self):
        return self.lifecycle.slot.generation

    @property
    def sequence(self):
        return self.lifecycle.slot.sequence

    @property
    def fingerprint(self):
        return self.lifecycle.slot.fingerprint[:32]

    @property
    def recorded_image_bytes(self):
        return self.lifecycle.slot.image_bytes

    @property
    def block_bytes(self):
        return self.lifecycle.slot.block_bytes

    @property
    def recorded_device_bytes(self):
        """The disk's size as found, or as written last; 0: not recorded."""
        return self.lifecycle.slot.device_bytes

    def set_device_bytes(self, uint64_t device_bytes):
        """Have this size recorded, if a slot is written; in before_write() at the latest."""
        self.lifecycle.options.device_bytes = device_bytes

    @property
    def stripe_bytes(self):
        return self.lifecycle.stripe_bytes

    @property
    def image_stripes(self):
        return self.lifecycle.image_stripes

    @property
    def creating(self):
        return bool(self.lifecycle.creating)

    @property
    def adopting(self):
        return bool(self.lifecycle.adopting)

    @property
    def going_on(self):
        return bool(self.lifecycle.going_on)

    @property
    def latch(self):
        """errno of the failed fdatasync that a found table remembers, or 0."""
        return self.lifecycle.found.latch


cdef int32_t one_verdict(uint32_t* latch, int32_t result) noexcept nogil:
    """An fdatasync beside others: its failure is everybody's at once, and theirs is its own."""
    if result < 0:
        set_once_u32(latch, <uint32_t>-result)
    return -EIO if result >= 0 and load_u32(latch) != 0 else result


cdef int32_t run_action(Ring* ring, Action* action) noexcept nogil:
    """One action, waited for."""
    cdef io_uring_cqe* cqe
    cdef int32_t result = -EIO
    cdef bint ended = False
    action.token = 0
    ring_action(ring, action)
    while not ended:
        ring_enter(ring, <uint64_t>-1)
        while not ended and io_uring_cq_ready(&ring.uring) > 0:
            cqe = cqe_at(&ring.uring, 0)
            ensure(cqe_kind(cqe.user_data) == CQE_OP, b"an opener's ring does I/O only")
            ended = ring_op_done(ring, cqe_index(cqe.user_data), cqe.res, &result)
            io_uring_cq_advance(&ring.uring, 1)
    return result
