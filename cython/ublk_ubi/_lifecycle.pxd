"""The lifecycle engine: opening, creating and closing a base, one action at a time.

    opening    fdatasync → read page 0, slots, (all 8 MiB if there is no magic), headers, table
               → decide; every refusal is before the first write
    creating   zero the slots → fdatasync → zero the tail → zero 8 MiB → fdatasync → slot
               → fdatasync → page 0 → fdatasync
    going on   (valid table) nothing is written: same generation
    dropping   (a table that is not gone on with) slot (not open) → fdatasync → remove the table
    new        table under a temporary name → page 0 (minor 2) and slot (open, generation + 1)
               → fdatasync → rename the table
    growing    fdatasync → slot (the new size) → fdatasync
    closing    slot (not open) → fdatasync → page 0 (minor 1) → fdatasync → unlink the table

Invariants
- No header bit is trusted before an fdatasync: what was read may be in a cache alone. If that one
  fails, what a killed daemon had written is lost: its table is latched, and not gone on with,
  also where the opening would be refused for another image or stripe size: it is told once.
- Page 0, the magic, is the last thing that creation writes: without it nothing is a disk of ours.
- Formatting takes the slots of an old disk away first: cut short, it leaves no old disk that opens
  and has lost some of its headers or of its data.
- A table is published (renamed) after the base names its generation, and unlinked after the base
  says that it is closed. A table under its temporary name has never served a request.
- Whoever finds the base open in this boot without its very table refuses: acknowledged writes may
  be known to that table alone.
- Without an image only a base opens whose headers say that it has every stripe.
- A slot names no size before what the disk has grown by is durable as it shall be read. A size that
  could not be made durable is not the disk's; a failed fdatasync is final here, too.

Who opens, what is found

    slot         table                            do
    closed       none                             new
    closed       this generation's, ours          drop it, new (it was closed before the unlink)
    closed       else                             refuse: a copy of that disk, or an older one
    open, here   valid                            go on
    open, here   temporary, this generation's     drop it, new (it never went live)
    open, here   else                             refuse: stale
    open, else   none                             new (power was lost)
    open, else   any                              refuse: a copy
    any          somebody holds it                refuse: live
`force_stale` turns all refusals of this list but the last into: drop it, new. A table of a base in
another place is not dropped: that may be the original of a copy. The copy gets a UUID of its own.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from ublk_ubi._core cimport Actions, Event, Shared
from ublk_ubi._format cimport Slot

cdef enum:
    SCRATCH_BYTES = 1 << 20

cdef enum Phase:
    PHASE_NEW = 0
    PHASE_FIRST_SYNC
    PHASE_READ_HEAD
    PHASE_READ_SLOTS
    PHASE_SCAN
    PHASE_READ_PAGES
    PHASE_FIND_TABLE
    PHASE_LATCH_TABLE
    PHASE_BEFORE_WRITE
    PHASE_ERASE
    PHASE_ERASE_SYNC
    PHASE_ZERO_TAIL
    PHASE_ZERO
    PHASE_ZERO_SYNC
    PHASE_FIRST_SLOT
    PHASE_FIRST_SLOT_SYNC
    PHASE_FIRST_HEAD
    PHASE_FIRST_HEAD_SYNC
    PHASE_CREATED
    PHASE_RETIRE
    PHASE_RETIRE_SYNC
    PHASE_DROP_TABLE
    PHASE_MAKE_TABLE
    PHASE_MAP_TABLE
    PHASE_OPEN_HEAD
    PHASE_OPEN_SLOT
    PHASE_OPEN_SYNC
    PHASE_PUBLISH
    PHASE_OPEN
    PHASE_GROW_FIRST_SYNC
    PHASE_GROW_SLOT
    PHASE_GROW_SYNC
    PHASE_GROW_LATCH
    PHASE_CLOSE_SLOT
    PHASE_CLOSE_SLOT_SYNC
    PHASE_CLOSE_HEAD
    PHASE_CLOSE_HEAD_SYNC
    PHASE_UNLINK
    PHASE_CLOSED
    PHASE_FAILED

# Done by the caller; it answers with EVENT_DONE, 0 or -errno.
cdef enum HostCall:
    HOST_FIND_TABLE = 1            # fill `found`, `found_state`, `temporary`, `temporary_state`
    HOST_BEFORE_WRITE = 2          # all is checked: take what may still be refused (a device id)
    HOST_ZERO_TAIL = 3             # a new base: no old data behind the image
    HOST_CREATED = 4               # fsync the folder of a new file
    HOST_DROP_TABLE = 5            # remove what HOST_FIND_TABLE found
    HOST_MAKE_TABLE = 6            # make `identity` under a temporary name; set `table`
    HOST_MAP_TABLE = 7             # take over the table found; set `table`
    HOST_PUBLISH_TABLE = 8         # rename it
    HOST_UNLINK_TABLE = 9          # the base is closed
    HOST_LATCH_TABLE = 10          # `errno_` into the table's latch, unless it has one

cdef enum TableState:
    TABLE_NONE = 0
    TABLE_FOUND = 1
    TABLE_LIVE = 2                 # somebody holds its lock
    TABLE_DAMAGED = 3

cdef enum Refusal:
    REFUSE_NOTHING = 0
    REFUSE_IO = 1                  # `errno_` says which
    REFUSE_FOREIGN = 2             # neither ours nor empty
    REFUSE_VERSION = 3
    REFUSE_DAMAGED = 4             # both slots
    REFUSE_NEWER = 5
    REFUSE_ADOPT = 6               # a disk of bdev_ubi's, not asked to adopt
    REFUSE_STRIPE_UNKNOWN = 7      # … whose stripe size its byte cannot tell
    REFUSE_STRIPE_SIZE = 8
    REFUSE_STRIPE_RANGE = 9
    REFUSE_TOO_MANY_STRIPES = 10
    REFUSE_TOO_SMALL = 11
    REFUSE_IMAGE_SIZE = 12
    REFUSE_FINGERPRINT = 13
    REFUSE_LIVE = 14
    REFUSE_COPY = 15
    REFUSE_STALE = 16
    REFUSE_LATCHED = 17
    REFUSE_FOREIGN_WRITER = 18
    REFUSE_NEEDS_IMAGE = 19        # no image was given, and the base does not have all of it

# Whose table it is: all of it must match.
cdef struct TableIdentity:
    uint8_t uuid[16]
    uint8_t fingerprint[32]
    uint64_t generation
    uint64_t device                # st_dev of a file, rdev of a block device
    uint64_t inode                 # st_ino of a file, disk sequence of a block device
    uint64_t image_bytes
    uint32_t stripe_bytes
    uint32_t image_stripes
    uint32_t latch                 # errno of a failed fdatasync; not part of the identity

cdef struct LifecycleOptions:
    uint64_t base_bytes
    uint64_t image_bytes
    uint64_t device
    uint64_t inode
    uint8_t fingerprint[32]
    uint8_t new_uuid[16]           # for a base that is created or adopted
    uint8_t boot_id[16]
    uint32_t stripe_bytes          # 0: as recorded, or the default
    uint32_t default_stripe_bytes
    uint32_t block_bytes           # recorded where none is yet; the caller judges the recorded one
    uint64_t device_bytes          # recorded, if not 0; the caller may change it until BEFORE_WRITE
    bint format
    bint adopt
    bint force
    bint force_stale
    bint no_image                  # what is recorded stands for size and fingerprint
    bint image_lost                # … even if the base lacks stripes: nobody will get at them

cdef struct Lifecycle:
    LifecycleOptions options
    Slot slot                      # what counts, as found or as written last
    TableIdentity identity         # of the table to make
    TableIdentity found
    TableIdentity temporary
    uint8_t found_state
    uint8_t temporary_state
    uint8_t* pages                 # [MAX_PAGES × PAGE], the shadow of the header pages
    uint8_t* scratch               # [SCRATCH_BYTES]
    uint8_t* table                 # [image_stripes], set by the caller
    uint32_t stripe_bytes
    uint32_t image_stripes
    uint32_t page_count            # pages that hold headers of the image's stripes
    uint64_t position              # of a scan, in bytes
    uint64_t grown_from            # bytes
    uint8_t slot_index             # where `slot` was found or written; the other is next
    uint8_t phase
    uint8_t refusal
    bint creating
    bint adopting
    bint going_on
    int32_t errno_

cdef void lifecycle_init(Lifecycle* lifecycle, const LifecycleOptions* options, uint8_t* pages,
                         uint8_t* scratch) noexcept nogil
# EVENT_START opens, EVENT_STOP closes, EVENT_GROW records another size, EVENT_DONE goes on. Emits
# one action, or none at the end: the phase is then OPEN, CLOSED or FAILED. After EVENT_GROW it is
# OPEN, and `errno_` tells why the disk has not grown, if so.
cdef void lifecycle_step(Lifecycle* lifecycle, const Event* event, Actions* actions) noexcept nogil
# After OPEN: state bytes and the count of undurable stripes, from header bits and table.
cdef void lifecycle_states(Lifecycle* lifecycle, Shared* shared) noexcept nogil
