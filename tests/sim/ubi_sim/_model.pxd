"""The simulated world, in one flat struct: copying it away and back is going back in time.

Data is modelled in **cells**, eight a stripe: a cell is what a sector is to the engines, the unit
that is written whole or not at all. Its content is a number that says where it came from:

    0                       zeros
    IMAGE_VALUE | cell      the image's
    STALE_VALUE | cell      what was on the base, or in a buffer, before
    else                    a guest's write: its serial number × 8 + the cell within the stripe

so stale memory and another stripe's bytes show as what they are. Metadata is modelled as its real
bytes, torn at 512. Only HOT stripes are ever touched; a map leads from stripes to them, so that
worlds whose headers fill two pages stay small.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from ublk_ubi._core cimport Action, Actions, Shared
from ublk_ubi._hydrator cimport Fetch, Hydrator, Waiter, WaiterList
from ublk_ubi._lifecycle cimport Lifecycle, TableIdentity
from ublk_ubi._queue cimport Queue, Request

cdef enum:
    CELLS = 8                      # a stripe
    STRIPE_BYTES = 65536
    CELL_BYTES = 8192
    HOT = 8                        # stripes that are touched
    HOT_CELLS = 64                 # HOT × CELLS
    MAX_IMAGE_STRIPES = 2056       # headers of two pages
    MAX_QUEUES = 2
    MAX_DEPTH = 4
    MAX_TAGS = 8
    MAX_BUFFERS = 3
    MAX_PAGES = 2
    META_PAGES = 4                 # header pages, then the two slots
    META_BYTES = 16384
    META_SECTORS = 32
    CHUNKS = 8                     # MiB of the metadata region
    MAX_LOG = 64                   # writes that are not durable yet
    MAX_META_LOG = 16              # … of them those to metadata
    MAX_IO = 40
    MAX_MAIL = 32
    MAX_HISTORY = 12
    MAX_CANDIDATES = 14
    MAX_ACTIONS = 64
    SYNC_FILES = 4                 # open files that fdatasync: queues, hydrator, lifecycle

    NO_PAYLOAD = 255
    IMAGE_VALUE = 0x80000000
    STALE_VALUE = 0x40000000

# What can be wrong with the world; `violation` holds the first.
cdef enum Violation:
    FINE = 0
    WRONG_DATA = 1                 # a read returned what was never legally there
    WRONG_ERROR = 2                # a request failed without a fault
    LATCH_BROKEN = 3               # a flush or FUA write succeeded after a failed fdatasync
    HANG = 4                       # requests left, nothing to wait for
    LEAK = 5                       # buffers, waiters, mail left when all is done
    REFUSED = 6                    # a base of ours could not be opened
    NOT_REFUSED = 7                # a base was opened that must not be
    COUNTS = 8                     # undurable, table, states do not agree
    NOT_STARTED = 9
    BAD_ACTION = 10                # an action outside image, base or buffers

cdef enum Crash:
    CRASH_PROCESS = 1
    CRASH_POWER = 2

# Deliberate faults of the world around the engines (the ones in the engines are other builds).
cdef enum WorldBug:
    BUG_NONE = 0
    BUG_NO_FENCE = 1               # a new daemon does not wait for the old one's writes
    BUG_LOST_DOORBELL = 2          # mail is read when the doorbell rings, never on a tick
    BUG_TABLE_FORGOTTEN = 3        # a killed daemon's table is not found
    BUG_LATCH_FORGOTTEN = 4        # … is found without its latch

cdef struct LogEntry:
    uint64_t order                 # of landing; 0: in flight
    uint32_t values[CELLS]         # data: what is written
    uint16_t first                 # hot cell, metadata sector, or chunk
    uint16_t count
    uint8_t kind                   # LogKind; 0: free
    uint8_t payload                # metadata: index into meta_log
    uint8_t mask                   # cells or sectors that landed (a failed write lands in part)
    uint8_t lost                   # dropped by a failed fdatasync

cdef enum LogKind:
    LOG_FREE = 0
    LOG_DATA = 1
    LOG_META = 2
    LOG_CHUNK = 3                  # a MiB of zeros over the metadata region

cdef struct Disk:
    uint32_t cache[HOT_CELLS]      # what a read sees
    uint32_t durable[HOT_CELLS]
    uint8_t meta_cache[META_BYTES]
    uint8_t meta_durable[META_BYTES]
    uint8_t chunk_cache[CHUNKS]    # 1: something is in that MiB besides what meta_* holds
    uint8_t chunk_durable[CHUNKS]
    LogEntry log[MAX_LOG]
    uint8_t meta_log[MAX_META_LOG][4096]
    uint8_t meta_log_used[MAX_META_LOG]
    uint64_t landed                # writes so far
    uint8_t error_pending[SYNC_FILES]  # a failed writeback that this open file was not told yet

cdef struct Io:
    Action action
    uint64_t sync_order            # fdatasync: what landed up to here becomes durable
    uint32_t values[CELLS]         # a read's content, if it was taken early
    uint8_t owner                  # queue number, or OWNER_HYDRATOR, OWNER_LIFECYCLE
    uint8_t busy
    uint8_t early
    uint8_t log                    # a write's entry

cdef enum:
    OWNER_HYDRATOR = 2
    OWNER_LIFECYCLE = 3
    OWNER_NOBODY = 4               # a write that a killed daemon left in flight

cdef struct Mail:
    uint8_t kind
    uint16_t tag
    uint32_t stripe
    int32_t result

cdef struct Mailbox:
    Mail items[MAX_MAIL]
    uint32_t head
    uint32_t tail
    uint32_t rung                  # mail whose doorbell was not lost

cdef struct GuestRequest:
    uint64_t flush_start           # oracle's clock when it was sent
    uint32_t serial
    uint16_t first                 # hot cell
    uint16_t count
    uint8_t op
    uint8_t fua
    uint8_t busy
    # What a read may return, by cell: filled as it starts and as writes come by.
    uint8_t legal_count[CELLS]
    uint32_t legal[CELLS][MAX_CANDIDATES]

# A cell's past: the last entry is what reads see, earlier ones may come back after a power loss.
cdef struct Version:
    uint32_t candidates[MAX_CANDIDATES]
    uint64_t completed             # oracle's clock
    uint8_t count

cdef struct CellHistory:
    Version versions[MAX_HISTORY]
    uint8_t count
    uint8_t writing                # a write is in flight
    uint32_t writing_value

cdef struct Oracle:
    CellHistory cells[HOT_CELLS]
    uint64_t clock
    uint32_t serial
    uint8_t sync_failed            # the kernel dropped dirty data: reads may change under us
    uint8_t fault_seen             # an error was injected since the last opening

cdef struct Table:
    TableIdentity identity
    uint8_t rows[MAX_IMAGE_STRIPES]
    uint8_t there
    uint32_t latch

cdef struct Engines:
    Shared shared
    Queue queues[MAX_QUEUES]
    Request requests[MAX_QUEUES][MAX_DEPTH]
    Hydrator hydrator
    Lifecycle lifecycle
    uint8_t state[MAX_IMAGE_STRIPES]
    uint8_t pages[MAX_PAGES * 4096]
    Fetch fetches[MAX_BUFFERS]
    uint32_t free_buffers[MAX_BUFFERS]
    Waiter waiters[MAX_TAGS]
    WaiterList buckets[8]
    uint32_t demand[16]
    uint32_t wanted[8]
    uint16_t page_present[MAX_PAGES]
    uint16_t page_round[MAX_PAGES]
    uint8_t started
    uint8_t stopped
    int32_t stop_result

cdef struct Geometry:
    uint32_t image_stripes
    uint32_t device_stripes
    uint64_t image_bytes
    uint32_t hot[HOT]              # stripe numbers, ascending
    uint16_t hot_count
    uint16_t queues
    uint16_t depth
    uint16_t buffers
    uint8_t copy_on_read
    uint8_t stale_base             # the base held something before (opened with format)

cdef struct Faults:
    uint32_t one_in                # an I/O in so many fails (0: none)
    uint32_t nth                   # the nth I/O of `nth_kind` fails (0: none)
    uint32_t nth_seen
    uint8_t nth_kind               # ActionKind
    uint8_t nth_for_good
    int32_t nth_errno
    uint8_t syncs                  # may fdatasync fail?

cdef struct World:
    uint64_t random
    Geometry geometry
    Faults faults
    Disk disk
    Oracle oracle
    Engines engines
    Table table
    Table temporary
    Io io[MAX_IO]
    Mailbox to_hydrator[MAX_QUEUES]
    Mailbox to_queue[MAX_QUEUES]
    GuestRequest guests[MAX_QUEUES][MAX_DEPTH]
    uint32_t request_data[MAX_QUEUES][MAX_DEPTH][CELLS]
    uint32_t stripe_data[MAX_BUFFERS][CELLS]
    uint32_t requests_left
    uint32_t steps
    uint32_t boot
    uint8_t reopened               # times
    uint8_t bug                    # WorldBug
    uint8_t violation
    uint8_t quiet                  # no faults any more
    uint32_t detail[4]             # of the violation
    uint8_t* scratch               # outside: lifecycle's, one a nesting level
    uint64_t* coverage             # outside: state × event pairs seen


cdef inline uint64_t next_random(World* world) noexcept nogil:
    """splitmix64 (Steele, Lea, Flood 2014)."""
    cdef uint64_t z
    world.random += <uint64_t>0x9e3779b97f4a7c15
    z = world.random
    z = (z ^ (z >> 30)) * <uint64_t>0xbf58476d1ce4e5b9
    z = (z ^ (z >> 27)) * <uint64_t>0x94d049bb133111eb
    return z ^ (z >> 31)


cdef inline uint32_t below(World* world, uint32_t bound) noexcept nogil:
    """A number in [0, bound)."""
    return <uint32_t>(next_random(world) % bound)


cdef inline bint one_in(World* world, uint32_t bound) noexcept nogil:
    return next_random(world) % bound == 0


cdef inline void violate(World* world, uint8_t violation, uint32_t a, uint32_t b, uint32_t c,
                         uint32_t d) noexcept nogil:
    """The first violation counts."""
    if world.violation == FINE:
        world.violation = violation
        world.detail[0] = a
        world.detail[1] = b
        world.detail[2] = c
        world.detail[3] = d


cdef inline int hot_index(World* world, uint32_t stripe) noexcept nogil:
    """Which hot stripe it is, or −1."""
    cdef uint16_t i
    for i in range(world.geometry.hot_count):
        if world.geometry.hot[i] == stripe:
            return i
    return -1
