"""The queue engine: one hardware queue's requests, from arrival to completion.

    request                         way through the states
    ------------------------------- -------------------------------------------------------------
    READ   base has the stripe      READING_BASE
    READ   cold                     READING_IMAGE (MSG_WANT if copy_on_read)
                                      └ failed, but PRESENT by now → READING_BASE
    WRITE  base has the stripe      WRITING                        ┐
    WRITE  cold, part of a stripe   AWAITING_STRIPE → WRITING      ├ to be durable:
    WRITE  cold, a whole stripe     AWAITING_CLAIM → OVERWRITE     │   → AWAITING_ROUND or _SYNC
                                      → AWAITING_PRESENT           ┘
    FLUSH  every stripe DURABLE     AWAITING_SYNC; done, if nothing was written since a sync began
    FLUSH  else                     AWAITING_ROUND
    DISCARD                         DISCARDING, once for each row of stripes that the base has

WRITE_ZEROES goes the way of WRITE. READ, WRITE and WRITE_ZEROES lie inside a stripe
(chunk_sectors), a DISCARD covers any number of them; cold ones have nothing to give back, and stay
cold.

To be durable when it completes is a FUA write, and in writethrough every write; unsafe knows none.

Invariants
- A queue never writes a stripe state: what needs a transition is asked of the hydrator.
- A guest's write reaches the base only when its stripe is PRESENT, or claimed as a whole.
- A write to be durable on a DURABLE stripe is written with DSYNC; zeroing has none, an fdatasync
  follows it, as it does where a write may go through the page cache (`dsync_mask`): all writes
  share an open file there, and the page cache tells it once of what was lost, whoever asks. On a
  stripe that was not DURABLE *when the write was issued* it joins a round afterwards, whatever the
  stripe has become meanwhile.
- One fdatasync at a time; who comes while it runs waits for the next.
- A FLUSH needs no fdatasync when one of the hydrator's began after the last write had ended, and
  has ended well.
- The latch is set before any request is failed for a failed fdatasync, and looked at after every
  one that succeeds: once it is set, no FLUSH and no write to be durable succeeds.
- Once the image is lost no byte of it is served.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from ublk_ubi._core cimport OP_DISCARD, OP_WRITE_ZEROES, Actions, Event, Shared

cdef enum RequestState:
    IDLE = 0
    READING_IMAGE = 1
    READING_BASE = 2
    WRITING = 3
    AWAITING_STRIPE = 4
    AWAITING_CLAIM = 5
    OVERWRITE = 6
    AWAITING_PRESENT = 7
    AWAITING_ROUND = 8
    AWAITING_SYNC = 9
    DISCARDING = 10

# What a base write that has ended well needs before it completes.
cdef enum Follows:
    FOLLOWS_NOTHING = 0
    FOLLOWS_ROUND = 1
    FOLLOWS_SYNC = 2

cdef enum:
    KINDS = 5                      # of requests that are counted: see request_kind

cdef struct Request:
    uint64_t offset                # bytes in the device
    uint64_t position              # DISCARD: what lies before it is dealt with
    uint32_t length                # bytes
    uint32_t stripe
    int32_t result                 # of the base write that awaits PRESENT
    uint16_t next                  # in a list of those that wait for an fdatasync
    uint8_t op
    uint8_t durable                # when it completes
    uint8_t unmap
    uint8_t state
    uint8_t follows                # Follows

cdef struct QueueStats:
    uint64_t count[KINDS]
    uint64_t bytes[KINDS]
    uint64_t errors[KINDS]
    uint64_t cold_reads
    uint64_t syncs

cdef struct Queue:
    Shared* shared
    Request* requests              # [depth], by tag
    uint16_t index
    uint16_t depth
    uint16_t active                # requests that are not IDLE
    uint16_t awaiting              # … of them those that a message will move
    uint16_t sync_running          # whom the running fdatasync serves: a list of tags
    uint16_t sync_next             # whom the next one will serve
    bint syncing
    QueueStats stats

cdef void queue_init(Queue* queue, Shared* shared, uint16_t index, Request* requests) noexcept nogil
# Emits at most depth + 2 actions.
cdef void queue_step(Queue* queue, const Event* event, Actions* actions) noexcept nogil


cdef inline int request_kind(uint8_t op) noexcept nogil:
    """READ 0, WRITE 1, FLUSH 2, DISCARD 3, WRITE_ZEROES 4; −1 for what is not counted."""
    if op <= OP_DISCARD:
        return op
    return 4 if op == OP_WRITE_ZEROES else -1
