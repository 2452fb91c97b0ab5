"""The hydrator engine: every stripe transition and every commit round of one device.

Transitions (state[] is written in `set_state` alone)

    ABSENT       → FETCHING       a buffer is free: demand before copy-on-read before background
    FETCHING     → PRESENT        image read, base written (zeroed, if the stripe is all zeros)
    FETCHING     → ABSENT         either failed: who needed it gets its errno, the next may try
    FETCHING     → OVERWRITING    either failed, and a whole-stripe write waited: it needs no image
    ABSENT       → OVERWRITING    a whole-stripe write claimed it
    OVERWRITING  → PRESENT        its base write succeeded
    OVERWRITING  → ABSENT         it failed; those that waited are served by a fetch
    PRESENT      → DURABLE        a round that took it in has ended well

Commit round, one at a time

    IDLE → SYNC_DATA → WRITE_PAGES → SYNC_PAGES → IDLE

    the joiners' list is closed → D = PRESENT stripes → fdatasync → D's bits into the shadow pages,
    pages written → fdatasync → D is DURABLE, the joiners are answered

A round is due while somebody waits for one and none runs. When it begins is its owner's to say
(EVENT_ROUND): who joins until then shares it. A tick, and starting and stopping, begin rounds of
their own accord.

Background hydration goes through the image in passes, as fast as EVENT_BUDGET allows, with at most
half of the buffers. A pass ends with the last of its copies; stripes that fail are passed over, and
the next pass begins after 1, 2, 4 … 64 ticks. A base that is full ends a pass at once. There are no
more passes once the base has all.

Invariants
- A header bit is written only after an fdatasync that began after its stripe's data was complete.
- Shadow pages hold bits of DURABLE stripes and of D only; other bytes stay as found on the base.
- D is taken after the joiners are closed: what was PRESENT when a joiner came is in D or DURABLE.
- A joiner is answered by a round that begins after it has come, or with EIO once latched. Who
  waits for a round that nobody has begun yet makes it due.
- `undurable` counts a stripe before it is seen PRESENT and until its round has ended well.
- After a failed fdatasync (the latch) no bit is written and every joiner gets EIO.
- Demand always has a stripe buffer: others leave `reserve` of them alone.
- Once the image is lost nothing of it is copied, what was read of it and not written included.
- HYDRATED is said once, when every stripe is DURABLE: from then on nobody needs the image.
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from ublk_ubi._core cimport NONE32, STATE_MASK, Actions, Event, Shared

cdef enum:
    # Page writes in flight at once.
    PAGE_WINDOW = 16
    # Ticks between the passes of background hydration, at the most.
    MAX_BACKOFF = 64

cdef enum FetchPhase:
    FETCH_FREE = 0
    FETCH_READ = 1
    FETCH_WRITE = 2

cdef enum RoundPhase:
    ROUND_IDLE = 0
    ROUND_SYNC_DATA = 1
    ROUND_WRITE_PAGES = 2
    ROUND_SYNC_PAGES = 3

cdef enum Life:
    LIFE_NEW = 0
    LIFE_STARTING = 1
    LIFE_RUNNING = 2
    LIFE_STOPPING = 3
    LIFE_STOPPED = 4

# A stripe buffer and what it is used for.
cdef struct Fetch:
    uint32_t stripe
    uint8_t phase
    uint8_t background             # nobody asked for it

# What a request waits for: one node a tag of every queue, in a list of its stripe's hash bucket or
# in a list of joiners. Lists are first come, first served.
cdef struct Waiter:
    uint32_t stripe
    uint32_t next
    uint8_t asked                  # MessageKind, 0 when it waits for nothing

cdef struct WaiterList:
    uint32_t first
    uint32_t last

cdef struct Fifo:
    uint32_t* items
    uint32_t mask
    uint32_t head
    uint32_t tail

cdef struct HydratorStats:
    uint64_t stripes               # hydrated from the image
    uint64_t bytes
    uint64_t errors                # fetches that failed
    uint64_t zeros                 # … of `stripes` those that were all zeros
    uint64_t whole_stripe_writes
    uint64_t rounds
    uint64_t round_errors
    uint64_t pages                 # header pages written
    uint64_t joined                # requests that a round answered
    uint64_t hints_dropped
    uint64_t present               # stripes that the base has, DURABLE ones included
    uint64_t durable
    uint64_t passes                # of background hydration, ended
    uint64_t failed                # stripes that background hydration could not copy, all in all
    int32_t last_error             # -errno of the last of them

cdef struct Hydrator:
    Shared* shared
    Fetch* fetches                 # [buffers]
    uint32_t* free_buffers         # [buffers], a stack
    uint32_t buffers
    uint32_t reserve               # buffers that copy-on-read leaves to demand
    uint32_t free_count
    Waiter* waiters                # [queues × depth]
    WaiterList* buckets            # [bucket_mask + 1]
    uint32_t bucket_mask
    Fifo demand
    Fifo wanted
    uint32_t arriving              # requests that wait for a stripe, or overwrite one as a whole
    WaiterList joining             # will be served by the next round
    WaiterList joined              # are served by the running one
    uint8_t* pages                 # shadow of the header pages
    uint16_t* page_present         # a page's stripes that are PRESENT and in no round
    uint16_t* page_round           # a page's stripes in D
    uint32_t page_count
    uint32_t present_count         # sum of page_present
    uint32_t round_count           # stripes in D
    uint32_t next_page
    uint32_t pages_in_flight
    uint32_t free_page_tokens      # a bit a token
    int32_t round_result           # of the running round's page writes
    int32_t stop_result            # of the last round, once stopping
    uint8_t round
    uint8_t life
    uint8_t hydrated               # HYDRATED was said
    uint8_t background             # on
    uint32_t cursor                # the next stripe that background hydration looks at
    uint32_t background_fetches    # in flight
    uint32_t background_most
    uint32_t pass_failed           # stripes that failed in this pass
    uint32_t retry_ticks           # until the next pass begins
    uint32_t backoff_ticks
    uint64_t budget                # bytes that background hydration may still begin to copy
    HydratorStats stats

# Everything the engine works on, allocated by its owner and zeroed.
cdef struct HydratorMemory:
    Fetch* fetches                 # buffers
    uint32_t* free_buffers         # buffers
    Waiter* waiters                # queues × depth
    WaiterList* buckets            # bucket_count, a power of two
    uint32_t* demand               # demand_capacity, a power of two > queues × depth
    uint32_t* wanted               # wanted_capacity, a power of two
    uint16_t* page_present         # page_count
    uint16_t* page_round           # page_count
    uint8_t* pages                 # page_count × PAGE
    uint32_t buffers
    uint32_t bucket_count
    uint32_t demand_capacity
    uint32_t wanted_capacity
    uint32_t page_count

cdef void hydrator_init(Hydrator* hydrator, Shared* shared,
                        const HydratorMemory* memory) noexcept nogil
# Emits at most queues × depth + buffers + PAGE_WINDOW + 3 actions.
cdef void hydrator_step(Hydrator* hydrator, const Event* event, Actions* actions) noexcept nogil


# Where the header bytes of a stripe are: the first 14 bytes of the metadata are magic and version.
cdef inline uint32_t header_offset(uint32_t stripe) noexcept nogil:
    return 14 + 2 * stripe


cdef inline uint32_t header_page(uint32_t stripe) noexcept nogil:
    return (14 + 2 * stripe) >> 12


cdef inline uint32_t page_first_stripe(uint32_t page) noexcept nogil:
    """The first stripe whose header lies in `page`."""
    return 0 if page == 0 else page * 2048 - 7


cdef inline uint32_t page_end_stripe(Hydrator* hydrator, uint32_t page) noexcept nogil:
    """The stripe behind the last whose header lies in `page`."""
    cdef uint32_t end = page_first_stripe(page + 1)
    return end if end < hydrator.shared.image_stripes else hydrator.shared.image_stripes


cdef inline bint round_due(const Hydrator* hydrator) noexcept nogil:
    """Somebody has joined, and no round runs: EVENT_ROUND is waited for."""
    return hydrator.joining.first != NONE32 and hydrator.round == ROUND_IDLE


cdef inline uint8_t state_of(Hydrator* hydrator, uint32_t stripe) noexcept nogil:
    return hydrator.shared.state[stripe] & STATE_MASK


cdef inline bint flagged(Hydrator* hydrator, uint32_t stripe, uint8_t flag) noexcept nogil:
    return (hydrator.shared.state[stripe] & flag) != 0
