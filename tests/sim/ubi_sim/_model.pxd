"""The simulated world, in one flat struct: copying it away and back is going back in time.

Data is modelled in **cells**, eight a stripe: a cell is what a sector is to the engines, the unit
that is written whole or not at all. Its content is a number that says where it came from:

    0                       zeros
    IMAGE_VALUE | cell      the image's
    CHANGED_VALUE | cell    … once somebody has changed it under the daemon
    ADOPTED_VALUE | cell    what bdev_ubi had hydrated on a disk that is adopted
    STALE_VALUE | cell      what was on the base, or in a buffer, before
    else                    a guest's write: its serial number × 8 + the cell within the stripe

so stale memory and another stripe's bytes show as what they are. Metadata is modelled as its real
bytes, torn at 512. Only HOT stripes are ever touched; a map leads from stripes to them, so that
worlds whose headers fill two pages stay small.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from ublk_ubi._core cimport Action, Shared
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
    META_BYTES = 16384             # two header pages, then the two slots' pages
    META_SECTORS = 32
    SLOT_SECTOR = 16               # the first slot's, among them; the second is 8 further
    CHUNKS = 8                     # MiB of the metadata region
    MAX_LOG = 64                   # writes that are not durable yet
    MAX_META_LOG = 12              # … of them those to metadata
    MAX_IO = 40
    MAX_MAIL = 32
    MAX_RETRIES = 3                # of an I/O that is told EAGAIN
    MAX_HISTORY = 8
    MAX_CANDIDATES = 18
    MAX_OVERLAP = 2                # writes to one cell at once, and in a row of such
    MAX_ACTIONS = 64
    BUCKETS = 4
    SYNC_FILES = 4                 # open files that fdatasync: queues, hydrator, lifecycle
    HOSTS = 2

    NO_PAYLOAD = 255
    WHOLE = 0xffff                 # mask of a write that landed
    IMAGE_VALUE = 0x80000000
    STALE_VALUE = 0x40000000
    ADOPTED_VALUE = 0x20000000
    CHANGED_VALUE = 0x10000000
    ADOPTED_BYTE = 0xa5            # byte 1 of every header of an adopted disk

# What can be wrong with the world; `violation` holds the first.
cdef enum Violation:
    FINE = 0
    WRONG_DATA = 1                 # a read returned what was never legally there
    WRONG_ERROR = 2                # a request failed without a fault
    LATCH_BROKEN = 3               # a flush or FUA write succeeded after a failed fdatasync
    HANG = 4                       # requests left, nothing to wait for
    LEAK = 5                       # buffers, waiters, mail left when all is done
    REFUSED = 6                    # a base of ours could not be opened
    NOT_REFUSED = 7                # a base was opened that must not be, or for the wrong reason
    COUNTS = 8                     # undurable, table, states do not agree
    NOT_STARTED = 9
    BAD_ACTION = 10                # an action outside image, base or buffers
    NOT_KEPT = 11                  # a refusal wrote; a byte that is not ours changed
    IMAGE_NEEDED = 12              # it was let go of, and the medium does not have all of it
    SPACE_KEPT = 13                # a discard succeeded, and the base was not told of all of it

# What happens in a world; its seed draws them, Plan.without takes them away.
cdef enum Feature:
    WITH_FAULTS = 1 << 0           # I/O fails
    WITH_SYNC_FAULTS = 1 << 1      # fdatasync fails
    WITH_CHAINS = 1 << 2           # crashes follow on crashes
    WITH_MISTAKES = 1 << 3         # openings that must be refused
    WITH_MOVES = 1 << 4            # the base goes to another host, and back
    WITH_OPENING = 1 << 5          # crashes in the first opening
    WITH_TORN_SLOTS = 1 << 6       # a slot's sector may be torn inside
    WITH_ZEROING = 1 << 7          # DISCARD, WRITE_ZEROES
    WITH_REISSUE = 1 << 8          # the kernel sends again what a killed daemon left
    WITH_STALE_BASE = 1 << 9       # the base held something before (opened with --format)
    WITH_ADOPTION = 1 << 10        # … bdev_ubi's
    WITH_COPY_ON_READ = 1 << 11
    WITH_TWO_PAGES = 1 << 12       # headers on two pages
    WITH_TWO_QUEUES = 1 << 13
    WITH_PARTIAL_IMAGE = 1 << 14   # the image ends inside its last stripe
    WITH_TAIL = 1 << 15            # the device goes on behind the image
    WITH_OVERLAPS = 1 << 16        # guests write a cell while they write it
    WITH_HOLES = 1 << 17           # stripes of the image are zeros
    WITH_WRITETHROUGH = 1 << 18
    WITH_UNSAFE = 1 << 19
    WITH_HYDRATION = 1 << 20       # in the background, on and off
    WITH_IMAGE_LOST = 1 << 21      # the image changes under a daemon; the next finds it as it was
    WITH_GROWTH = 1 << 22          # of the disk, while requests are under way
    ALL_FEATURES = (1 << 23) - 1

cdef enum Crash:
    CRASH_PROCESS = 1
    CRASH_POWER = 2
    CRASH_MOVE = 3                 # the daemon is killed, the base attached to the other host
    CRASH_RUN_LOST = 4             # the daemon is killed, and /run is wiped

# Deliberate faults of the world around the engines (the ones in the engines are other builds).
cdef enum WorldBug:
    BUG_NONE = 0
    # A new daemon does not wait for the old one's …
    BUG_NO_FENCE_STRIPE = 1        # … stripe writes
    BUG_NO_FENCE_GUEST = 2         # … guests' writes
    BUG_NO_FENCE_PAGE = 3          # … header pages
    BUG_LOST_DOORBELL = 4          # mail is read when the doorbell rings, never on a tick
    BUG_TABLE_FORGOTTEN = 5        # a killed daemon's table is not found
    BUG_LATCH_FORGOTTEN = 6        # … is found without its latch
    BUG_CLOSE_EARLY = 7            # a stop closes the base before the hydrator has committed

cdef enum LogKind:
    LOG_FREE = 0
    LOG_DATA = 1
    LOG_META = 2
    LOG_CHUNK = 3                  # a MiB of zeros over the metadata region

cdef struct LogEntry:
    uint64_t order                 # of landing; 0: in flight
    uint32_t values[CELLS]         # data: what is written
    uint16_t first                 # hot cell, metadata sector, or chunk
    uint16_t count
    uint8_t kind                   # LogKind
    uint8_t payload                # metadata: index into meta_log; NO_PAYLOAD: zeros
    uint16_t mask                  # cells or sectors that landed (a failed write lands in part)

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
    uint8_t torn_inside            # a power loss has torn a slot's sector

cdef struct Io:
    Action action
    uint64_t sync_order            # fdatasync: what landed up to here becomes durable
    uint32_t values[CELLS]         # a read's content when it began
    uint8_t owner                  # queue number, or OWNER_*
    uint8_t busy
    uint8_t landed                 # a write that is on the cache and has not ended
    uint8_t log                    # a write's entry
    uint8_t closed                 # the image was let go of before it was asked for this
    uint8_t done                   # cells or sectors that a short transfer has moved
    uint8_t retries

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
    uint32_t rung                  # its doorbell was not lost

cdef struct GuestRequest:
    uint64_t sent                  # oracle's clock
    uint64_t on_base               # bit n: the base had hot cell n when the daemon was asked
    uint64_t discarded             # … its discard, for this request, has ended well
    uint32_t serial
    uint16_t first                 # hot cell
    uint16_t count
    uint8_t op
    uint8_t fua
    uint8_t unmap
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
    uint8_t writing                # writes in flight: nobody orders them
    uint8_t ended                  # … and those that have ended while another was
    uint32_t in_flight[MAX_OVERLAP]
    uint32_t recent[MAX_OVERLAP]

cdef struct Oracle:
    CellHistory cells[HOT_CELLS]
    uint64_t clock
    uint64_t fault_clock           # of the last error that was injected; 0: none
    uint32_t serial
    uint64_t sync_failed           # when the kernel dropped dirty data: reads may change under us

cdef struct Table:
    TableIdentity identity
    uint8_t rows[MAX_IMAGE_STRIPES]
    uint8_t there                  # TableState
    uint32_t latch

# A host's /run: it is gone when the host loses power.
cdef struct Host:
    Table table
    Table temporary
    uint8_t boot
    uint8_t wiped                  # since it booted: a killed daemon's table was removed

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
    WaiterList buckets[BUCKETS]
    uint32_t demand[16]
    uint32_t wanted[4]
    uint16_t page_present[MAX_PAGES]
    uint16_t page_round[MAX_PAGES]
    uint8_t live                   # ACT_STARTED has come, …
    int32_t start_result           # … with this
    uint8_t stopped
    int32_t stop_result
    uint8_t hydrated               # ACT_HYDRATED has come: the image is let go of

cdef struct Geometry:
    uint32_t image_stripes
    uint32_t device_stripes
    uint64_t image_bytes
    uint32_t hot[HOT]              # stripe numbers, ascending
    uint16_t hot_count
    uint16_t queues
    uint16_t depth
    uint16_t buffers
    uint8_t last_cells             # of the device's last stripe

# How this world likes to order things.
cdef struct Pace:
    uint8_t request                # weights
    uint8_t mail
    uint8_t io
    uint8_t slow                   # an ActionKind that is mostly passed over
    uint8_t stalls                 # at times no I/O ends while anything else can happen
    uint8_t focus                  # the hot stripe that half of the requests go to

cdef struct Faults:
    uint32_t one_in                # an I/O in so many fails (0: none)
    uint32_t nth                   # the nth I/O of `nth_kind` fails (0: none)
    uint32_t nth_seen
    uint8_t nth_kind               # ActionKind
    uint8_t nth_for_good
    int32_t nth_errno

cdef struct Trace:
    char* text                     # outside
    uint64_t* length               # outside
    uint64_t capacity

ctypedef void (*Hook)(void* argument) noexcept nogil

cdef struct World:
    uint64_t random
    uint32_t features
    Geometry geometry
    Pace pace
    Faults faults
    Disk disk
    Oracle oracle
    Engines engines
    Host hosts[HOSTS]
    Io io[MAX_IO]
    Mailbox to_hydrator[MAX_QUEUES]
    Mailbox to_queue[MAX_QUEUES]
    GuestRequest guests[MAX_QUEUES][MAX_DEPTH]
    uint32_t request_data[MAX_QUEUES][MAX_DEPTH][CELLS]
    uint32_t stripe_data[MAX_BUFFERS][CELLS]
    uint64_t skipped               # bit n: the nth request of the run is not sent
    uint32_t requests_left
    uint32_t requests_drawn
    uint32_t budget                # events until it is a hang
    uint32_t steps
    uint64_t grown                 # size of the disk that was promised to be kept, bytes
    uint64_t grown_at_most         # … that was asked for
    uint8_t host                   # index of the one that has the base
    uint8_t boots
    uint8_t uuids                  # given out to new disks
    uint8_t served                 # a device has been live on this base
    uint8_t image_changed          # under the daemon that runs, which is told at once
    uint8_t accepted               # the operator was told of a failed fdatasync, and goes on
    uint8_t bug                    # WorldBug
    uint8_t blind                  # the engines' own counts are not looked at
    uint8_t violation
    uint8_t stalled                # events for which the disk stands still
    uint8_t quiet                  # no faults any more
    uint8_t cut                    # a crash is due: unwind
    uint8_t over                   # nothing more can be done with this base
    uint32_t detail[4]             # of the violation
    # Outside, not part of what a copy goes back to:
    uint8_t* scratch               # lifecycle's, one a nesting level
    uint32_t* coverage             # state × event pairs seen, or NULL
    Trace* trace                   # or NULL
    Hook hook                      # called where a crash may come
    void* hook_argument


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


cdef inline bint has(const World* world, uint32_t feature) noexcept nogil:
    return (world.features & feature) != 0


cdef inline bint halted(const World* world) noexcept nogil:
    """Something is wrong, a crash is due, or it is over: leave all loops."""
    return world.violation != FINE or world.cut or world.over


cdef inline void boundary(World* world) noexcept nogil:
    """A crash may come here."""
    if world.hook != NULL:
        world.hook(world.hook_argument)


cdef inline void cover(World* world, uint32_t pair) noexcept nogil:
    if world.coverage != NULL:
        world.coverage[pair] += 1


cdef inline void violate(World* world, uint8_t violation, uint32_t a, uint32_t b, uint32_t c,
                         uint32_t d) noexcept nogil:
    """The first violation counts."""
    if world.violation == FINE:
        world.violation = violation
        world.detail[0] = a
        world.detail[1] = b
        world.detail[2] = c
        world.detail[3] = d


cdef inline Host* here(World* world) noexcept nogil:
    return &world.hosts[world.host]


cdef inline int hot_index(World* world, uint32_t stripe) noexcept nogil:
    """Which hot stripe it is, or −1."""
    cdef uint16_t i
    for i in range(world.geometry.hot_count):
        if world.geometry.hot[i] == stripe:
            return i
    return -1


cdef inline bint is_hole(const World* world, uint32_t stripe) noexcept nogil:
    """The image has zeros there."""
    return has(world, WITH_HOLES) and stripe % 3 == 1


cdef inline uint32_t image_value(const World* world, uint32_t cell) noexcept nogil:
    """What the image holds; behind its end nobody asks."""
    return 0 if is_hole(world, world.geometry.hot[cell // CELLS]) else IMAGE_VALUE | cell


cdef inline uint64_t cell_bits(uint32_t first, uint32_t count) noexcept nogil:
    """Hot cells as bits."""
    return (<uint64_t>-1 >> (HOT_CELLS - count)) << first


cdef inline uint32_t cell_count(const World* world) noexcept nogil:
    """Cells of the device among the hot ones: its last stripe may be short."""
    return (world.geometry.hot_count - 1) * CELLS + world.geometry.last_cells
