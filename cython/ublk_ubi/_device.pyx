"""Allocates what a device works on, starts its threads, reads its counters; see _device.pxd.

All memory is had here, once. The threads get the GIL's blessing to go (`nogil`) and never take it
back before they end.
"""

from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free
from libc.string cimport memset

import os
import threading
import time

from ublk_ubi._abi cimport ubi_ublk_desc_map_len, ubi_ublk_desc_map_offset, ubi_ublk_io_desc
from ublk_ubi._atomic cimport load_u32, store_u32, store_u64
from ublk_ubi._core cimport Action
from ublk_ubi._histogram cimport BUCKETS, Histogram, histogram_value
from ublk_ubi._hydrator cimport (
    PAGE_WINDOW, Fetch, HydratorMemory, Waiter, WaiterList, hydrator_init,
)
from ublk_ubi._lifecycle cimport lifecycle_states
from ublk_ubi._mailbox cimport Doorbell, Mailbox, Message
from ublk_ubi._memory cimport PROT_READ, map_memory, map_shared, munmap
from ublk_ubi._opener cimport Opener
from ublk_ubi._queue cimport Request, queue_init
from ublk_ubi._ring cimport Op, ring_exit
from ublk_ubi._threads cimport QueueThread, ThreadBase, run_hydrator, run_queue

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int initial, int flags) noexcept
    int eventfd_write(int fd, uint64_t value) noexcept
    enum:
        EFD_CLOEXEC
        EFD_NONBLOCK

cdef enum:
    WANTED_CAPACITY = 8192         # stripes that copy-on-read may have asked for

STATES = ("new", "running", "live", "stopped", "failed")
OPERATIONS = ("read", "write", "flush", "discard", "write_zeroes")   # by request_kind
CACHE_MODES = ("writeback", "writethrough", "unsafe")                # by CacheMode


cdef uint32_t power_of_two(uint32_t least) noexcept nogil:
    """The lowest power of two that is not below `least`."""
    cdef uint32_t value = 1
    while value < least:
        value *= 2
    return value


def stripe_buffers(uint32_t stripe_bytes):
    """How many stripes are hydrated at once: 8 MiB of buffers, but 4 at least and 32 at most."""
    return max(4, min(32, (8 << 20) // stripe_bytes))


def thread_is_there(thread):
    """Whether the kernel still has this thread: its end, too, takes a while."""
    if thread.is_alive():
        return True
    try:
        os.sched_getaffinity(thread.native_id)
    except ProcessLookupError:
        return False
    return True


cdef class DataPlane:
    """One device's queue threads and hydrator, on a base that `opener` has opened.

    Descriptors stay the caller's and must outlive stop(). `notify_fd` is an eventfd that becomes
    readable when a thread's state changes. `block_bytes` is what direct I/O on image and base
    takes; `zero_copy` is what the kernel has granted.
    """

    def __cinit__(self, Opener opener, *, int queues, int depth, bint copy_on_read,
                  uint64_t device_bytes, str cache, bint zero_copy, bint base_is_block,
                  uint32_t dsync_alignment, uint32_t block_bytes):
        cdef uint32_t index
        self.notify_fd = -1
        self.threads = []
        self.opener = opener
        self.block_capacity = 64 + 16 * queues
        self.blocks = <Block*>calloc(self.block_capacity, sizeof(Block))
        if self.blocks == NULL:
            raise MemoryError("no memory for a device")
        self.notify_fd = self.device.notify_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.notify_fd < 0:
            raise OSError(errno, os.strerror(errno))
        self.device.shared.device_bytes = device_bytes
        self.device.shared.image_bytes = opener.lifecycle.options.image_bytes
        self.device.shared.stripe_bytes = opener.stripe_bytes
        self.device.shared.stripe_shift = opener.stripe_bytes.bit_length() - 1
        self.device.shared.image_stripes = opener.image_stripes
        self.device.shared.queues = queues
        self.device.shared.depth = depth
        self.device.shared.copy_on_read = copy_on_read
        self.device.shared.dsync_mask = dsync_alignment - 1
        self.device.shared.cache = CACHE_MODES.index(cache)
        self.device.zeros = <const uint8_t*>self.take(opener.stripe_bytes)
        self.device.block = block_bytes
        self.device.base_is_block = base_is_block
        self.zero_copy = zero_copy
        self.device.shared.state = <uint8_t*>self.take(opener.image_stripes)
        self.device.shared.table = opener.lifecycle.table
        self.device.shared.latch = <uint32_t*><uintptr_t>opener.table.latch_address
        lifecycle_states(&opener.lifecycle, &self.device.shared)
        self.init_mailboxes()
        self.init_hydrator(stripe_buffers(opener.stripe_bytes))
        self.queues = <QueueThread*>self.take(queues * sizeof(QueueThread))
        for index in range(<uint32_t>queues):
            self.queues[index].base.wake_fd = -1
        for index in range(<uint32_t>queues):
            self.init_queue(index)

    def __dealloc__(self):
        cdef uint32_t index
        if self.queues != NULL:
            for index in range(self.device.shared.queues):
                if self.queues[index].base.wake_fd >= 0:
                    os.close(self.queues[index].base.wake_fd)
        if self.hydrator.base.device != NULL and self.hydrator.base.wake_fd >= 0:
            os.close(self.hydrator.base.wake_fd)
        if self.notify_fd >= 0:
            os.close(self.notify_fd)
        for index in range(self.block_count):
            munmap(self.blocks[index].address, self.blocks[index].length)
        free(self.blocks)

    # -- memory --

    cdef void* take(self, size_t length) except NULL:
        """Zeroed pages, unmapped with the object."""
        cdef void* address = map_memory(length)
        if address == NULL:
            raise MemoryError(f"no memory for a device: {length} bytes")
        self.blocks[self.block_count].address = address
        self.blocks[self.block_count].length = length
        self.block_count += 1
        return address

    cdef void init_mailboxes(self) except *:
        cdef uint32_t queues = self.device.shared.queues
        # A request a tag, and as many hints again and more.
        cdef uint32_t capacity = power_of_two(4 * self.device.shared.depth)
        cdef Message* slots = <Message*>self.take(2 * queues * capacity * sizeof(Message))
        cdef uint32_t index
        self.device.to_hydrator = <Mailbox*>self.take(queues * sizeof(Mailbox))
        self.device.to_queue = <Mailbox*>self.take(queues * sizeof(Mailbox))
        self.device.bells = <Doorbell*>self.take((queues + 1) * sizeof(Doorbell))
        for index in range(queues):
            self.device.to_hydrator[index].mask = capacity - 1
            self.device.to_hydrator[index].slots = slots + 2 * index * capacity
            self.device.to_queue[index].mask = capacity - 1
            self.device.to_queue[index].slots = slots + (2 * index + 1) * capacity

    cdef void init_base(self, ThreadBase* base, uint32_t op_count, uint32_t action_count) except *:
        base.device = &self.device
        base.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if base.wake_fd < 0:
            raise OSError(errno, os.strerror(errno))
        base.ops = <Op*>self.take(op_count * sizeof(Op))
        base.op_count = op_count
        base.actions.items = <Action*>self.take(action_count * sizeof(Action))
        base.actions.capacity = action_count

    cdef void init_hydrator(self, uint32_t buffers) except *:
        cdef HydratorMemory memory
        cdef uint32_t tags = <uint32_t>self.device.shared.queues * self.device.shared.depth
        memory.buffers = buffers
        memory.bucket_count = power_of_two(tags)
        memory.demand_capacity = power_of_two(tags + 1)
        memory.wanted_capacity = WANTED_CAPACITY
        memory.page_count = self.opener.lifecycle.page_count
        memory.fetches = <Fetch*>self.take(buffers * sizeof(Fetch))
        memory.free_buffers = <uint32_t*>self.take(buffers * 4)
        memory.waiters = <Waiter*>self.take(tags * sizeof(Waiter))
        memory.buckets = <WaiterList*>self.take(memory.bucket_count * sizeof(WaiterList))
        memory.demand = <uint32_t*>self.take(memory.demand_capacity * 4)
        memory.wanted = <uint32_t*>self.take(memory.wanted_capacity * 4)
        memory.page_present = <uint16_t*>self.take(memory.page_count * 2)
        memory.page_round = <uint16_t*>self.take(memory.page_count * 2)
        memory.pages = self.opener.pages
        hydrator_init(&self.hydrator.hydrator, &self.device.shared, &memory)
        self.init_base(&self.hydrator.base, buffers + PAGE_WINDOW + 1,
                       tags + buffers + PAGE_WINDOW + 3)
        snprintf(self.hydrator.base.name, 16, b"ubi-hydrator")

    cdef void init_queue(self, uint32_t index) except *:
        cdef QueueThread* thread = &self.queues[index]
        cdef uint32_t depth = self.device.shared.depth
        cdef Request* requests = <Request*>self.take(depth * sizeof(Request))
        queue_init(&thread.queue, &self.device.shared, <uint16_t>index, requests)
        thread.started = <uint64_t*>self.take(depth * sizeof(uint64_t))
        thread.buffer_stride = self.device.shared.stripe_bytes
        thread.buffers = <uint8_t*>self.take(depth * thread.buffer_stride)
        if self.zero_copy:
            thread.registered = <uint8_t*>self.take(depth)
        self.init_base(&thread.base, depth + 1, depth + 2)
        snprintf(thread.base.name, 16, b"ubi-queue-%u", index)

    # -- threads --

    def start_hydrator(self, int image_fd, int base_fd, int sync_fd, int ublkc_fd, cpus):
        """Start the hydrator thread; it is "live" once the device may serve.

        `image_fd` is -1 for a base that is independent of its image; `cpus` is where the thread
        may run, None for anywhere.
        """
        cdef uint32_t buffers = self.hydrator.hydrator.buffers
        cdef int[4] files = [image_fd, base_fd, sync_fd, ublkc_fd]
        self.hydrator.base.files = files
        self.hydrator.stripes = <uint8_t*>self.take(buffers * self.device.shared.stripe_bytes)
        self.hydrator.pages = self.opener.pages
        self.spawn(self.run_hydrator, (cpus,))

    def start_queue(self, int index, int image_fd, int base_fd, int sync_fd, int ublkc_fd, cpus):
        """Map the queue's descriptors and start its thread, which fetches every tag."""
        cdef QueueThread* thread = &self.queues[index]
        cdef int[4] files = [image_fd, base_fd, sync_fd, ublkc_fd]
        cdef size_t page_size = os.sysconf("SC_PAGESIZE")
        cdef void* address
        self.descriptors_length = ubi_ublk_desc_map_len(self.device.shared.depth, page_size)
        address = map_shared(ublkc_fd, self.descriptors_length, PROT_READ,
                             ubi_ublk_desc_map_offset(<uint16_t>index, page_size))
        if address == NULL:
            raise OSError(errno, f"cannot map the descriptors of queue {index}: "
                                 f"{os.strerror(errno)}")
        thread.descriptors = <const ubi_ublk_io_desc*>address
        thread.base.files = files
        self.spawn(self.run_queue, (index, cpus))

    def spawn(self, target, args):
        """A thread that the interpreter's end does not wait for."""
        thread = threading.Thread(target=target, args=args, daemon=True)
        self.threads.append(thread)
        thread.start()

    def run_hydrator(self, cpus):
        """The hydrator thread's body."""
        if cpus:
            os.sched_setaffinity(0, cpus)
        with nogil:
            run_hydrator(&self.hydrator)

    def run_queue(self, int index, cpus):
        """A queue thread's body. Where it runs is settled before it touches its memory."""
        if cpus:
            os.sched_setaffinity(0, cpus)
        with nogil:
            run_queue(&self.queues[index])

    def stop_hydrator(self):
        """Once every queue has stopped: finish, commit, stop. Ends in "stopped", with a status."""
        store_u32(&self.hydrator.base.stop, 1)
        eventfd_write(self.hydrator.base.wake_fd, 1)

    def leave(self):
        """Have the queues end what is under way and leave; the kernel keeps all else for later."""
        cdef uint32_t index
        for index in range(self.device.shared.queues):
            store_u32(&self.queues[index].base.leave, 1)
            eventfd_write(self.queues[index].base.wake_fd, 1)

    def quit(self):
        """Leave at once, serving nobody: for a device that never went live."""
        cdef uint32_t index
        for index in range(self.device.shared.queues):
            store_u32(&self.queues[index].base.quit, 1)
            eventfd_write(self.queues[index].base.wake_fd, 1)
        store_u32(&self.hydrator.base.quit, 1)
        eventfd_write(self.hydrator.base.wake_fd, 1)

    def join(self, timeout_s):
        """True once all threads have ended, for the kernel too: it has let go of their I/O."""
        deadline = time.monotonic() + timeout_s
        for thread in self.threads:
            thread.join(max(deadline - time.monotonic(), 0))
        while any(thread_is_there(thread) for thread in self.threads):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.0005)
        return True

    def release(self):
        """Once all threads have ended: close their rings, and unmap what of ublkc is mapped, as
        DEL_DEV waits for it."""
        cdef uint32_t index
        for index in range(self.device.shared.queues):
            if self.queues[index].ring_is_left:
                ring_exit(&self.queues[index].base.ring)
                self.queues[index].ring_is_left = False
            if self.queues[index].descriptors != NULL:
                munmap(<void*>self.queues[index].descriptors, self.descriptors_length)
                self.queues[index].descriptors = NULL

    def hydrator_state(self):
        """(state, status): one of STATES, and 0 or -errno."""
        return STATES[load_u32(&self.hydrator.base.state)], self.hydrator.base.status

    def queue_state(self, int index):
        """(state, status) of a queue thread."""
        return STATES[load_u32(&self.queues[index].base.state)], self.queues[index].base.status

    # -- hydration and the image --

    def hydrate(self, bint on):
        """Copy all of the image in the background, what failed before at once; or pause that."""
        store_u32(&self.hydrator.hydrate, on)
        store_u32(&self.hydrator.kicks, self.hydrator.kicks + 1)
        eventfd_write(self.hydrator.base.wake_fd, 1)

    def set_rate(self, rate):
        """Limit background hydration to so many bytes a second, at most options.MAX_RATE; None: as
        fast as can be."""
        store_u64(&self.hydrator.rate, 0 if rate is None else rate)
        eventfd_write(self.hydrator.base.wake_fd, 1)

    @property
    def hydrated(self):
        """Every stripe of the image is on the base, durably: nobody needs the image."""
        return load_u32(&self.hydrator.hydrated) != 0

    def grow(self, uint64_t device_bytes):
        """Take requests up to this size, at least, from now on.

        What was allowed once stays: the kernel may have grown the disk though it did not answer.
        """
        if device_bytes > self.device.shared.device_bytes:
            store_u64(&self.device.shared.device_bytes, device_bytes)

    def lose_image(self):
        """The image is not what it was: from now on nothing of it is served or copied."""
        store_u32(&self.device.shared.image_lost, 1)

    def drop_image(self):
        """Have every thread let go of the image; see image_dropped."""
        cdef uint32_t index
        store_u32(&self.hydrator.base.drop_image, 1)
        eventfd_write(self.hydrator.base.wake_fd, 1)
        for index in range(self.device.shared.queues):
            store_u32(&self.queues[index].base.drop_image, 1)
            eventfd_write(self.queues[index].base.wake_fd, 1)

    @property
    def image_dropped(self):
        """All threads have let go of it."""
        cdef uint32_t index
        for index in range(self.device.shared.queues):
            if not load_u32(&self.queues[index].base.image_dropped):
                return False
        return load_u32(&self.hydrator.base.image_dropped) != 0

    @property
    def latch(self):
        """errno of the first failed fdatasync, or 0."""
        return load_u32(self.device.shared.latch)

    # -- counters: read while the threads count on; a sum may be of two moments --

    def stripes(self):
        """Stripes of the image: how many there are, how many the base has, how many for certain."""
        return {
            "total": self.device.shared.image_stripes,
            "hydrated": self.hydrator.hydrator.stats.present,
            "committed": self.hydrator.hydrator.stats.durable,
        }

    def io(self):
        """By operation: count, bytes, errors, and latency percentiles in µs over all queues."""
        return {name: self.operation(op) for op, name in enumerate(OPERATIONS)}

    def operation(self, int op):
        """Counters of one operation."""
        cdef Histogram total
        cdef uint64_t count = 0, volume = 0, errors = 0
        cdef uint32_t index
        cdef int i
        memset(&total, 0, sizeof(total))
        for index in range(self.device.shared.queues):
            count += self.queues[index].queue.stats.count[op]
            volume += self.queues[index].queue.stats.bytes[op]
            errors += self.queues[index].queue.stats.errors[op]
            for i in range(BUCKETS):
                total.counts[i] += self.queues[index].latency[op].counts[i]
            total.maximum = max(total.maximum, self.queues[index].latency[op].maximum)
        return {"count": count, "bytes": volume, "errors": errors,
                "latency_us": percentiles(&total)}

    def counters(self):
        """Everything else that is counted."""
        cdef uint32_t index
        stats = self.hydrator.hydrator.stats
        queues = [self.queues[index].queue.stats for index in range(self.device.shared.queues)]
        return {
            "cold_reads": sum(queue["cold_reads"] for queue in queues),
            "queue_syncs": sum(queue["syncs"] for queue in queues),
            "fallbacks": sum(self.queues[index].fallbacks
                             for index in range(self.device.shared.queues)),
            "hydration": {
                "stripes": stats.stripes, "bytes": stats.bytes, "errors": stats.errors,
                "zeros": stats.zeros, "passes": stats.passes, "failed": stats.failed,
                "last_error": -stats.last_error,
                "retry_in_s": self.hydrator.hydrator.retry_ticks,
                "whole_stripe_writes": stats.whole_stripe_writes,
                "hints_dropped": stats.hints_dropped,
            },
            "commit": {"rounds": stats.rounds, "errors": stats.round_errors, "pages": stats.pages,
                       "joined": stats.joined},
        }

    def doorbells(self):
        """Turns, doorbells rung and doorbells lost, by thread: for tests and for tuning."""
        cdef uint32_t index
        names = [f"queue-{index}" for index in range(self.device.shared.queues)]
        rows = {name: (self.queues[index].base.turns, self.queues[index].base.doorbells,
                       self.queues[index].base.doorbells_failed)
                for index, name in enumerate(names)}
        rows["hydrator"] = (self.hydrator.base.turns, self.hydrator.base.doorbells,
                            self.hydrator.base.doorbells_failed)
        return rows


cdef object percentiles(const Histogram* histogram):
    """p50, p90, p99, p999 and the maximum, in µs."""
    cdef uint64_t total = 0, seen = 0
    cdef int i
    names = [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999)]
    values = dict.fromkeys((name for name, _ in names), 0.0)
    for i in range(BUCKETS):
        total += histogram.counts[i]
    for i in range(BUCKETS):
        seen += histogram.counts[i]
        while names and total and seen >= names[0][1] * total:
            values[names.pop(0)[0]] = histogram_value(i) / 1000
    values["max"] = histogram.maximum / 1000
    return values
