"""Bounded mailboxes between a queue and the hydrator: one producer, one consumer, no lock.

The bound is a matter of protocol: a tag has at most one request on its way that awaits an answer,
so `capacity >= depth` never overflows. Hints (MSG_WANT) take only room beyond that.

A doorbell (IORING_OP_MSG_RING) is rung only for a receiver that says it is about to sleep, so that
at most one is on its way. It may be lost: the receiver's tick drains the mailbox all the same.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t

from ublk_ubi._atomic cimport (
    ensure, exchange_u32, full_fence, load_u32, peek_u32, store_u32,
)

cdef struct Message:
    uint32_t stripe
    int32_t result
    uint16_t tag
    uint8_t kind

cdef struct Mailbox:
    uint32_t head                  # next to take; the consumer's
    uint32_t consumer_line[15]     # keeps the two ends on cache lines of their own
    uint32_t tail                  # next to fill; the producer's
    uint32_t producer_line[15]
    uint32_t mask                  # capacity − 1, a power of two less one
    Message* slots

cdef struct Doorbell:
    uint32_t armed                 # 1: the receiver is about to sleep
    int32_t ring_fd
    uint32_t line[14]


cdef inline uint32_t mailbox_room(Mailbox* box) noexcept nogil:
    """Free slots, seen by the producer; there may be more by the time it looks again."""
    return box.mask + 1 - (box.tail - load_u32(&box.head))


cdef inline void mailbox_put(Mailbox* box, Message* message) noexcept nogil:
    cdef uint32_t tail = box.tail
    ensure(mailbox_room(box) > 0, b"a mailbox has room for one message a tag")
    box.slots[tail & box.mask] = message[0]
    store_u32(&box.tail, tail + 1)


cdef inline bint mailbox_take(Mailbox* box, Message* message) noexcept nogil:
    """The oldest message, or False."""
    cdef uint32_t head = box.head
    if head == load_u32(&box.tail):
        return False
    message[0] = box.slots[head & box.mask]
    store_u32(&box.head, head + 1)
    return True


cdef inline bint mailbox_empty(Mailbox* box) noexcept nogil:
    return peek_u32(&box.head) == load_u32(&box.tail)


cdef inline bint doorbell_needed(Doorbell* bell) noexcept nogil:
    """After putting messages: does their receiver sleep, and has nobody rung for it yet?"""
    full_fence()
    return peek_u32(&bell.armed) != 0 and exchange_u32(&bell.armed, 0) != 0


cdef inline void doorbell_arm(Doorbell* bell) noexcept nogil:
    """Before sleeping; the receiver must look into its mailboxes once more after this."""
    exchange_u32(&bell.armed, 1)
    full_fence()


cdef inline void doorbell_disarm(Doorbell* bell) noexcept nogil:
    store_u32(&bell.armed, 0)
