"""The queue engine: one hardware queue's requests, from arrival to completion.

    request                         way through the states
    ------------------------------- -------------------------------------------------------------
    READ   base has the stripe      READING_BASE
    READ   cold                     READING_IMAGE (MSG_WANT if copy_on_read)
                                      └ failed, but PRESENT by now → READING_BASE
    WRITE  base has the stripe      WRITING                        ┐
    WRITE  cold, part of a stripe   AWAITING_STRIPE → WRITING      ├ FUA: → AWAITING_ROUND
    WRITE  cold, a whole stripe     AWAITING_CLAIM → OVERWRITE     │
                                      → AWAITING_PRESENT           ┘
    FLUSH  every stripe DURABLE     AWAITING_SYNC
    FLUSH  else                     AWAITING_ROUND

Invariants
- A queue never writes a stripe state: what needs a transition is asked of the hydrator.
- A guest's write reaches the base only when its stripe is PRESENT, or claimed as a whole.
- A FUA write on a DURABLE stripe is written with DSYNC. On a stripe that was not DURABLE *when the
  write was issued* it joins a round afterwards, whatever the stripe has become meanwhile.
- One fdatasync at a time; a flush that comes while it runs waits for the next.
- The latch is set before any request is failed for a failed fdatasync, and looked at after every
  one that succeeds: once it is set, no FLUSH and no FUA succeeds.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from ublk_ubi._core cimport Actions, Event, Shared

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

cdef struct Request:
    uint64_t offset                # bytes in the device
    uint32_t length                # bytes
    uint32_t stripe
    int32_t result                 # of the base write that awaits PRESENT
    uint16_t next                  # in a list of flushes
    uint8_t op
    uint8_t fua
    uint8_t state
    uint8_t joins                  # the write needs a round before it completes

cdef struct QueueStats:
    uint64_t count[3]              # READ, WRITE, FLUSH as the operations are numbered
    uint64_t bytes[3]
    uint64_t errors[3]
    uint64_t cold_reads
    uint64_t syncs

cdef struct Queue:
    Shared* shared
    Request* requests              # [depth], by tag
    uint16_t index
    uint16_t depth
    uint16_t active                # requests that are not IDLE
    uint16_t awaiting              # … of them those that a message will move
    uint16_t sync_running          # flushes that the running fdatasync serves: a list of tags
    uint16_t sync_next             # flushes that the next one will serve
    bint syncing
    QueueStats stats

cdef void queue_init(Queue* queue, Shared* shared, uint16_t index, Request* requests) noexcept nogil
# Emits at most depth + 2 actions.
cdef void queue_step(Queue* queue, const Event* event, Actions* actions) noexcept nogil
