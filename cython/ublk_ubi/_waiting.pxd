"""Who waits for what, in which order: the hydrator's queues of stripes, and its lists of requests.

A request waits in one list at a time: its stripe's hash bucket's, or a round's. First come, first
served.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t

from ublk_ubi._atomic cimport ensure
from ublk_ubi._core cimport ACT_SEND, MSG_DONE, NONE32, Action, Actions, emit
from ublk_ubi._hydrator cimport Fifo, Hydrator, HydratorMemory, WaiterList


# -- stripes to be copied ------------------------------------------------------------------------

cdef inline void fifo_init(Fifo* fifo, uint32_t* items, uint32_t capacity) noexcept nogil:
    ensure(capacity != 0 and (capacity & (capacity - 1)) == 0,
           b"a fifo's capacity is a power of two")
    fifo.items = items
    fifo.mask = capacity - 1
    fifo.head = 0
    fifo.tail = 0


cdef inline bint fifo_push(Fifo* fifo, uint32_t item) noexcept nogil:
    """False if it is full."""
    if fifo.tail - fifo.head > fifo.mask:
        return False
    fifo.items[fifo.tail & fifo.mask] = item
    fifo.tail += 1
    return True


cdef inline uint32_t fifo_pop(Fifo* fifo) noexcept nogil:
    """The oldest item, or NONE32."""
    cdef uint32_t item
    if fifo.head == fifo.tail:
        return NONE32
    item = fifo.items[fifo.head & fifo.mask]
    fifo.head += 1
    return item


# -- requests that wait --------------------------------------------------------------------------

cdef inline uint32_t waiter_id(Hydrator* hydrator, uint16_t queue, uint16_t tag) noexcept nogil:
    return <uint32_t>queue * hydrator.shared.depth + tag


cdef inline WaiterList* bucket(Hydrator* hydrator, uint32_t stripe) noexcept nogil:
    return &hydrator.buckets[stripe & hydrator.bucket_mask]


cdef inline void list_append(Hydrator* hydrator, WaiterList* waiting, uint32_t node) noexcept nogil:
    ensure(hydrator.waiters[node].asked != 0, b"only who asked waits")
    hydrator.waiters[node].next = NONE32
    if waiting.first == NONE32:
        waiting.first = node
    else:
        hydrator.waiters[waiting.last].next = node
    waiting.last = node


cdef inline void answer(Hydrator* hydrator, uint32_t node, uint8_t message, int32_t result,
                        Actions* actions) noexcept nogil:
    cdef Action* action = emit(actions, ACT_SEND)
    action.message = message
    action.queue = <uint16_t>(node // hydrator.shared.depth)
    action.tag = <uint16_t>(node % hydrator.shared.depth)
    action.stripe = hydrator.waiters[node].stripe
    action.result = result
    hydrator.waiters[node].asked = 0


cdef inline uint32_t answer_all(Hydrator* hydrator, WaiterList* waiting, int32_t result,
                                Actions* actions) noexcept nogil:
    """DONE to all of a list of joiners; how many they were."""
    cdef uint32_t count = 0
    cdef uint32_t node
    while waiting.first != NONE32:
        node = waiting.first
        waiting.first = hydrator.waiters[node].next
        answer(hydrator, node, MSG_DONE, result, actions)
        count += 1
    return count


cdef inline bint has_waiter(Hydrator* hydrator, uint32_t stripe) noexcept nogil:
    cdef uint32_t node = bucket(hydrator, stripe).first
    while node != NONE32:
        if hydrator.waiters[node].stripe == stripe:
            return True
        node = hydrator.waiters[node].next
    return False


# -- memory --------------------------------------------------------------------------------------

cdef inline void waiting_init(Hydrator* hydrator, const HydratorMemory* memory) noexcept nogil:
    """Nobody waits. Capacities are checked here: they bound everything above."""
    cdef uint32_t tags = <uint32_t>hydrator.shared.queues * hydrator.shared.depth
    cdef uint32_t i
    hydrator.waiters = memory.waiters
    for i in range(tags):
        memory.waiters[i].asked = 0
    hydrator.buckets = memory.buckets
    ensure(memory.bucket_count != 0 and (memory.bucket_count & (memory.bucket_count - 1)) == 0,
           b"the number of buckets is a power of two")
    hydrator.bucket_mask = memory.bucket_count - 1
    for i in range(memory.bucket_count):
        memory.buckets[i].first = NONE32
    ensure(memory.demand_capacity > tags,
           b"the demand queue has room for a stripe a tag, and the image's last")
    fifo_init(&hydrator.demand, memory.demand, memory.demand_capacity)
    fifo_init(&hydrator.wanted, memory.wanted, memory.wanted_capacity)
    hydrator.joining.first = NONE32
    hydrator.joined.first = NONE32
