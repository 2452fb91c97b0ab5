"""The vocabulary of the data plane: what engines are told (events) and what they ask for (actions).

An engine is a pure state machine, `step(engine, event, actions)`: no system call, no clock, no
allocation, no randomness. `_ring` turns actions into SQEs and CQEs into events; the simulator in
tests/sim does the same with a model of the world. There are three engines:

    _queue      one a hardware queue: requests of the guest
    _hydrator   one a device: every stripe transition, every commit round
    _lifecycle  creating, opening and closing the base's metadata

Stripe states. The hydrator alone writes them; queues read them with acquire.

    ABSENT       the image has it
    FETCHING     the hydrator copies it; the image has it
    OVERWRITING  a guest writes the whole of it; the image has it for everybody else
    PRESENT      the base has it; the table says so; its header bit is not durable yet
    DURABLE      the base has it and its header bit is durable

A state only ever moves down this list, but FETCHING and OVERWRITING fall back to ABSENT on error.
Stripes behind the image's end are DURABLE from the start: there is nothing to copy.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from ublk_ubi._atomic cimport ensure, load_u32, load_u8

cdef enum:
    DATA_OFFSET = 8 << 20          # bytes: device byte x lives at base byte DATA_OFFSET + x
    PAGE = 4096                    # bytes of a header page, the unit of metadata writes
    MAX_STRIPES = 2097152
    NONE16 = 0xffff
    NONE32 = 0xffffffff

cdef enum StripeState:
    ABSENT = 0
    FETCHING = 1
    OVERWRITING = 2
    PRESENT = 3
    DURABLE = 4

cdef enum:
    STATE_MASK = 0x07
    # Private to the hydrator, in the same byte.
    IN_ROUND = 0x08                # its bit is being committed by the running round
    WANTED = 0x10                  # copy-on-read asked for it
    QUEUED = 0x20                  # in the demand queue

cdef enum EventKind:
    EVENT_REQUEST = 1              # queue: op, fua, tag, offset, length
    EVENT_DONE = 2                 # an action ended: token, result (bytes or 0, or -errno)
    EVENT_MESSAGE = 3              # op is a MessageKind; queue, tag, stripe, result
    EVENT_TICK = 4                 # about once a second
    EVENT_START = 5
    EVENT_STOP = 6
    EVENT_HYDRATE = 7              # hydrator: op 1: copy all of the image, 0: pause
    EVENT_BUDGET = 8               # hydrator: offset: bytes that it may still copy unasked
    EVENT_ROUND = 9                # hydrator: the round that is due may begin
    EVENT_GROW = 10                # lifecycle: offset: the disk's new size, bytes

cdef enum Operation:               # as ublk numbers them
    OP_READ = 0
    OP_WRITE = 1
    OP_FLUSH = 2
    OP_DISCARD = 3
    OP_WRITE_ZEROES = 5

cdef enum MessageKind:
    # queue → hydrator
    MSG_WANT = 1                   # hint: stripe was read cold; no answer
    MSG_HYDRATE = 2                # make stripe PRESENT; answered by GRANT
    MSG_CLAIM = 3                  # may I overwrite all of stripe?; answered by GRANT
    MSG_WRITTEN = 4                # the claimed stripe is written (result); answered by DONE
    MSG_JOIN = 5                   # make durable all that is complete; answered by DONE
    # hydrator → queue
    MSG_GRANT = 16                 # result: 0 stripe is PRESENT, CLAIMED it is yours, or -errno
    MSG_DONE = 17                  # result: 0 or -errno

cdef enum:
    CLAIMED = 1

cdef enum CacheMode:
    CACHE_WRITEBACK = 0            # a flush makes durable
    CACHE_WRITETHROUGH = 1         # every write is durable before it completes
    CACHE_UNSAFE = 2               # a flush is answered at once; the mapping stays consistent

cdef enum ActionKind:
    ACT_READ_IMAGE = 1             # image → memory
    ACT_READ_BASE = 2              # base → memory
    ACT_WRITE_BASE = 3             # memory → base; dsync: durable when done
    ACT_SYNC_BASE = 4              # fdatasync
    ACT_SEND = 5                   # message to the other side
    ACT_COMPLETE = 6               # end request `tag` with `result`
    ACT_STARTED = 7                # hydrator: the device may go live, or -errno
    ACT_STOPPED = 8                # hydrator: all is committed, or -errno
    ACT_HOST = 9                   # lifecycle: `message` is a HostCall, done by the caller
    ACT_ZERO_BASE = 10             # base range reads zeros; unmap: its space may be given back
    ACT_DISCARD_BASE = 11          # base range need not be kept
    ACT_HYDRATED = 12              # hydrator: every stripe is DURABLE, nobody needs the image

# What the base holds that no fdatasync may have made durable: what guests change of stripes that
# it has.
cdef enum BaseState:
    BASE_SYNCING = 0               # nothing since the hydrator began its last fdatasync
    BASE_CHANGED = 1               # a write or a discard has ended since
    BASE_SYNCED = 2                # nothing since, and the fdatasync has ended well

cdef enum Memory:
    MEM_REQUEST = 1                # the data of request `index`
    MEM_STRIPE = 2                 # stripe buffer `index`
    MEM_PAGE = 3                   # header page `index` of the shadow copy
    MEM_SCRATCH = 4                # lifecycle's scratch memory, byte `index`

cdef struct Event:
    uint64_t offset                # bytes in the device
    uint32_t length                # bytes
    uint32_t token
    uint32_t stripe
    int32_t result
    uint16_t queue
    uint16_t tag
    uint8_t kind
    uint8_t op
    uint8_t fua
    uint8_t unmap                  # WRITE_ZEROES: the space may be given back
    uint8_t zeros                  # the stripe that was read is all zeros

cdef struct Action:
    uint64_t offset                # bytes in image or base
    uint32_t length                # bytes; what `minimum` leaves of them is filled with zeros
    uint32_t minimum               # ACT_READ_IMAGE: bytes that must be there
    uint32_t index                 # which buffer of `memory`
    uint32_t token                 # comes back in EVENT_DONE; one action a token in flight
    uint32_t stripe
    int32_t result
    uint16_t queue
    uint16_t tag
    uint8_t kind
    uint8_t memory
    uint8_t message
    uint8_t dsync
    uint8_t unmap

cdef struct Actions:
    Action* items
    uint32_t count
    uint32_t capacity

# What the threads of one device share. Constant once the device runs, but for the states (one
# writer, the hydrator), `undurable` (the same), `base` (the hydrator syncs, queues change it), the
# latch (set once by whoever sees it first),
# `image_lost` (set once by the control thread: the image is not what it was) and `device_bytes`
# (grown by the control thread, before the kernel sends requests behind the old end).
cdef struct Shared:
    uint64_t device_bytes
    uint64_t image_bytes
    uint32_t stripe_bytes
    uint32_t stripe_shift          # log2 of stripe_bytes
    uint32_t image_stripes         # stripes that the image covers, the last one maybe in part
    uint16_t queues
    uint16_t depth
    bint copy_on_read
    uint32_t dsync_mask            # bits of offset and length: a write with any goes without DSYNC
    uint8_t cache                  # CacheMode
    uint32_t image_lost
    uint8_t* state                 # [image_stripes] StripeState and the hydrator's flags
    uint8_t* table                 # [image_stripes] 1: the base has it; outlives the process
    uint32_t* latch                # in the table: errno of the first failed fdatasync, or 0
    uint32_t base                  # BaseState
    int64_t undurable              # stripes PRESENT and not yet DURABLE, the running round's too


cdef inline uint8_t stripe_state(Shared* shared, uint32_t stripe) noexcept nogil:
    """The state of any stripe of the device."""
    if stripe >= shared.image_stripes:
        return DURABLE
    return load_u8(&shared.state[stripe]) & STATE_MASK


cdef inline uint32_t next_known(Shared* shared, uint32_t stripe) noexcept nogil:
    """`stripe` of the image, or a later one: those between are ABSENT. Eight are seen in a look."""
    cdef uint64_t eight
    while not stripe & 7 and stripe + 8 <= shared.image_stripes:
        memcpy(&eight, shared.state + stripe, sizeof(eight))
        if eight != 0:
            break
        stripe += 8
    return stripe


cdef inline uint32_t stripe_at(Shared* shared, uint64_t offset) noexcept nogil:
    """The stripe of a byte. All stripes behind the image are alike, and count as the one behind its
    last: a huge device has more of them than 32 bits count."""
    cdef uint64_t stripe = offset >> shared.stripe_shift
    return <uint32_t>stripe if stripe < shared.image_stripes else shared.image_stripes


cdef inline bint image_lost(Shared* shared) noexcept nogil:
    """The image has changed under us: nothing of it is served or copied any more."""
    return load_u32(&shared.image_lost) != 0


cdef inline uint64_t stripe_offset(Shared* shared, uint32_t stripe) noexcept nogil:
    """Byte offset of a stripe in the device and in the image."""
    return <uint64_t>stripe << shared.stripe_shift


cdef inline Action* emit(Actions* actions, uint8_t kind) noexcept nogil:
    """A new action, all zero but its kind. The caller's array holds a step's worst case."""
    cdef Action* action
    ensure(actions.count < actions.capacity, b"a step emits no more actions than there is room for")
    action = &actions.items[actions.count]
    actions.count += 1
    memset(action, 0, sizeof(Action))
    action.kind = kind
    return action
