"""The lifecycle engine; its order of writes and its rules of ownership are in _lifecycle.pxd."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from ublk_ubi._atomic cimport ensure
from ublk_ubi._core cimport (
    ACT_HOST, ACT_READ_BASE, ACT_SYNC_BASE, ACT_WRITE_BASE, DATA_OFFSET, DURABLE, EVENT_DONE,
    EVENT_GROW, EVENT_START, EVENT_STOP, MAX_STRIPES, MEM_PAGE, MEM_SCRATCH, PAGE, PRESENT, Action,
    Actions, Event, Shared, emit,
)
from ublk_ubi._format cimport (
    COUNTER_BITS, FLAG_OPEN, SLOT_BYTES, SLOT_DAMAGED, SLOT_NEWER, SLOT_OFFSET, SLOT_VALID,
    SLOT_ZERO, VERSION_CLOSED, VERSION_OPEN, Slot, all_zero, head_has_magic, head_major, head_minor,
    head_write, slot_check, slot_seal,
)
from ublk_ubi._hydrator cimport header_offset, header_page


cdef void lifecycle_init(Lifecycle* lifecycle, const LifecycleOptions* options, uint8_t* pages,
                         uint8_t* scratch) noexcept nogil:
    """The caller owns the memory; pages are for the hydrator, scratch may go once it is open."""
    memset(lifecycle, 0, sizeof(Lifecycle))
    lifecycle.options = options[0]
    lifecycle.pages = pages
    lifecycle.scratch = scratch


# -- actions -------------------------------------------------------------------------------------

cdef void sync(Lifecycle* lifecycle, uint8_t phase, Actions* actions) noexcept nogil:
    lifecycle.phase = phase
    emit(actions, ACT_SYNC_BASE)


cdef void transfer(Lifecycle* lifecycle, uint8_t phase, uint8_t kind, uint8_t memory,
                   uint32_t index, uint64_t offset, uint32_t length,
                   Actions* actions) noexcept nogil:
    cdef Action* action = emit(actions, kind)
    lifecycle.phase = phase
    action.memory = memory
    action.index = index
    action.offset = offset
    action.length = length
    action.minimum = length


cdef void host(Lifecycle* lifecycle, uint8_t phase, uint8_t call, Actions* actions) noexcept nogil:
    lifecycle.phase = phase
    emit(actions, ACT_HOST).message = call


cdef void refuse(Lifecycle* lifecycle, uint8_t refusal) noexcept nogil:
    lifecycle.phase = PHASE_FAILED
    lifecycle.refusal = refusal


cdef void write_slot(Lifecycle* lifecycle, uint8_t phase, Actions* actions) noexcept nogil:
    """Write `slot` where its predecessor is not: a torn write leaves that one."""
    lifecycle.slot_index ^= 1
    lifecycle.slot.sequence += 1
    slot_seal(&lifecycle.slot)
    memset(lifecycle.scratch, 0, PAGE)
    memcpy(lifecycle.scratch, &lifecycle.slot, SLOT_BYTES)
    transfer(lifecycle, phase, ACT_WRITE_BASE, MEM_SCRATCH, 0,
             SLOT_OFFSET + lifecycle.slot_index * PAGE, PAGE, actions)


cdef void write_head(Lifecycle* lifecycle, uint8_t phase, uint16_t minor,
                     Actions* actions) noexcept nogil:
    head_write(lifecycle.pages, lifecycle.stripe_bytes, minor)
    transfer(lifecycle, phase, ACT_WRITE_BASE, MEM_PAGE, 0, 0, PAGE, actions)


# -- what is there? ------------------------------------------------------------------------------

cdef bint set_geometry(Lifecycle* lifecycle, uint32_t stripe_bytes) noexcept nogil:
    """False, and refused, if the disk cannot have this stripe size."""
    cdef uint64_t image = lifecycle.options.image_bytes
    cdef uint64_t stripes
    lifecycle.stripe_bytes = stripe_bytes
    if stripe_bytes < 64 << 10 or stripe_bytes > 1 << 20 or stripe_bytes & (stripe_bytes - 1):
        refuse(lifecycle, REFUSE_STRIPE_RANGE)
        return False
    # Without an image its size is what a slot says, which may be anything.
    stripes = image // stripe_bytes + (image % stripe_bytes != 0)
    if stripes > MAX_STRIPES:
        refuse(lifecycle, REFUSE_TOO_MANY_STRIPES)
        return False
    if lifecycle.options.base_bytes < DATA_OFFSET + stripes * stripe_bytes:
        refuse(lifecycle, REFUSE_TOO_SMALL)
        return False
    ensure(stripes > 0, b"an image is not empty")
    lifecycle.image_stripes = <uint32_t>stripes
    lifecycle.page_count = header_page(lifecycle.image_stripes - 1) + 1
    return True


cdef void plan_new(Lifecycle* lifecycle, uint32_t stripe_bytes) noexcept nogil:
    """The slot of a disk that is made or adopted now."""
    memset(&lifecycle.slot, 0, sizeof(Slot))
    lifecycle.slot.stripe_bytes = stripe_bytes
    lifecycle.slot.block_bytes = lifecycle.options.block_bytes
    lifecycle.slot.device_bytes = lifecycle.options.device_bytes
    lifecycle.slot.image_bytes = lifecycle.options.image_bytes
    memcpy(lifecycle.slot.fingerprint, lifecycle.options.fingerprint, 32)
    memcpy(lifecycle.slot.uuid, lifecycle.options.new_uuid, 16)
    lifecycle.slot_index = 1


cdef void create(Lifecycle* lifecycle, Actions* actions) noexcept nogil:
    cdef uint32_t stripe_bytes = lifecycle.options.stripe_bytes
    if lifecycle.errno_ != 0:
        refuse(lifecycle, REFUSE_IO)
        return
    if lifecycle.options.no_image:
        refuse(lifecycle, REFUSE_NEEDS_IMAGE)
        return
    if stripe_bytes == 0:
        stripe_bytes = lifecycle.options.default_stripe_bytes
    if not set_geometry(lifecycle, stripe_bytes):
        return
    plan_new(lifecycle, stripe_bytes)
    memset(lifecycle.pages, 0, <uint64_t>lifecycle.page_count * PAGE)
    lifecycle.creating = True
    host(lifecycle, PHASE_BEFORE_WRITE, HOST_BEFORE_WRITE, actions)


cdef void adopt(Lifecycle* lifecycle, Actions* actions) noexcept nogil:
    """A disk of bdev_ubi's: what the byte at 13 says is the stripe size's low 8 bits in KiB."""
    cdef uint32_t recorded = <uint32_t>lifecycle.pages[13] << 10
    cdef uint32_t asked = lifecycle.options.stripe_bytes
    lifecycle.stripe_bytes = recorded
    if not lifecycle.options.adopt:
        refuse(lifecycle, REFUSE_ADOPT)
    elif lifecycle.options.no_image:
        refuse(lifecycle, REFUSE_NEEDS_IMAGE)
    elif recorded == 0 and asked == 0:
        refuse(lifecycle, REFUSE_STRIPE_UNKNOWN)
    elif asked != 0 and ((asked >> 10) & 0xff) << 10 != recorded:
        refuse(lifecycle, REFUSE_STRIPE_SIZE)
    elif set_geometry(lifecycle, asked if asked != 0 else recorded):
        plan_new(lifecycle, lifecycle.stripe_bytes)
        lifecycle.adopting = True
        read_pages(lifecycle, actions)


cdef uint8_t choose_slot(Lifecycle* lifecycle) noexcept nogil:
    """Copy the slot that counts to `slot`; a SlotCondition."""
    cdef const Slot* slots[2]
    cdef uint8_t condition[2]
    cdef int i, best = -1
    for i in range(2):
        slots[i] = <const Slot*>(lifecycle.scratch + i * PAGE)
        condition[i] = slot_check(slots[i])
        if condition[i] == SLOT_NEWER:
            return SLOT_NEWER
        if condition[i] == SLOT_VALID and (best < 0 or slots[i].sequence > slots[best].sequence):
            best = i
    if best >= 0:
        memcpy(&lifecycle.slot, slots[best], sizeof(Slot))
        lifecycle.slot_index = <uint8_t>best
        return SLOT_VALID
    if condition[0] == SLOT_ZERO and condition[1] == SLOT_ZERO:
        return SLOT_ZERO
    return SLOT_DAMAGED


cdef void classify(Lifecycle* lifecycle, Actions* actions) noexcept nogil:
    """Page 0 is in `pages`, the slots are in `scratch`: whose disk is it?"""
    cdef uint8_t condition = choose_slot(lifecycle)
    cdef bint magic = head_has_magic(lifecycle.pages)
    cdef uint16_t minor = head_minor(lifecycle.pages)
    if lifecycle.options.format:
        create(lifecycle, actions)
    elif not magic:
        lifecycle.position = 0
        scan(lifecycle, actions)
    elif head_major(lifecycle.pages) != 0 or minor < VERSION_CLOSED or minor > VERSION_OPEN:
        refuse(lifecycle, REFUSE_VERSION)
    elif condition == SLOT_NEWER:
        refuse(lifecycle, REFUSE_NEWER)
    elif condition == SLOT_DAMAGED:
        refuse(lifecycle, REFUSE_DAMAGED)
    elif condition == SLOT_ZERO:
        # With minor 2, an adoption that was cut short before its first slot: adopt it again.
        adopt(lifecycle, actions)
    elif (lifecycle.slot.sequence | lifecycle.slot.generation) >> COUNTER_BITS:
        # Nobody has written so often. Before they begin again at 0, it is refused.
        refuse(lifecycle, REFUSE_DAMAGED)
    elif lifecycle.pages[13] != <uint8_t>(lifecycle.slot.stripe_bytes >> 10):
        # Another program made a disk of its own here, and kept our slots.
        refuse(lifecycle, REFUSE_DAMAGED)
    else:
        check_recorded(lifecycle, actions)


cdef void scan(Lifecycle* lifecycle, Actions* actions) noexcept nogil:
    """No magic: only 8 MiB of zeros are an empty base (ext4, LVM and swap begin with zeros too)."""
    if lifecycle.position == DATA_OFFSET:
        create(lifecycle, actions)
    else:
        transfer(lifecycle, PHASE_SCAN, ACT_READ_BASE, MEM_SCRATCH, 0, lifecycle.position,
                 SCRATCH_BYTES, actions)


cdef void check_recorded(Lifecycle* lifecycle, Actions* actions) noexcept nogil:
    """A disk of ours: what it records governs."""
    cdef LifecycleOptions* options = &lifecycle.options
    lifecycle.stripe_bytes = lifecycle.slot.stripe_bytes
    if lifecycle.errno_ != 0:
        # It will not be opened (decide); whatever was asked for, its table must learn why.
        options.stripe_bytes = 0
    if options.no_image or lifecycle.errno_ != 0:
        options.image_bytes = lifecycle.slot.image_bytes
        memcpy(options.fingerprint, lifecycle.slot.fingerprint, 32)
    if lifecycle.slot.image_bytes == 0:
        refuse(lifecycle, REFUSE_DAMAGED)
    elif options.stripe_bytes != 0 and options.stripe_bytes != lifecycle.slot.stripe_bytes:
        refuse(lifecycle, REFUSE_STRIPE_SIZE)
    elif options.image_bytes != lifecycle.slot.image_bytes:
        refuse(lifecycle, REFUSE_IMAGE_SIZE)
    elif (memcmp(options.fingerprint, lifecycle.slot.fingerprint, 32) != 0
            and not options.force):
        refuse(lifecycle, REFUSE_FINGERPRINT)
    elif set_geometry(lifecycle, lifecycle.slot.stripe_bytes):
        if (lifecycle.slot.device_bytes != 0 and lifecycle.slot.device_bytes
                < <uint64_t>lifecycle.image_stripes * lifecycle.stripe_bytes):
            refuse(lifecycle, REFUSE_DAMAGED)
        else:
            read_pages(lifecycle, actions)


cdef void read_pages(Lifecycle* lifecycle, Actions* actions) noexcept nogil:
    """The header pages, SCRATCH_BYTES at a time."""
    cdef uint64_t end = <uint64_t>lifecycle.page_count * PAGE
    cdef uint64_t left
    if lifecycle.phase != PHASE_READ_PAGES:
        lifecycle.position = 0
    if lifecycle.position == end:
        if (lifecycle.options.no_image and not lifecycle.options.image_lost
                and not is_full(lifecycle) and lifecycle.errno_ == 0):
            refuse(lifecycle, REFUSE_NEEDS_IMAGE)
        else:
            host(lifecycle, PHASE_FIND_TABLE, HOST_FIND_TABLE, actions)
        return
    left = end - lifecycle.position
    transfer(lifecycle, PHASE_READ_PAGES, ACT_READ_BASE, MEM_PAGE,
             <uint32_t>(lifecycle.position // PAGE), lifecycle.position,
             SCRATCH_BYTES if left > SCRATCH_BYTES else <uint32_t>left, actions)


# -- whose table is it? --------------------------------------------------------------------------

cdef void describe(Lifecycle* lifecycle, TableIdentity* identity) noexcept nogil:
    """The identity that a table of the slot's generation must have."""
    memset(identity, 0, sizeof(TableIdentity))
    memcpy(identity.uuid, lifecycle.slot.uuid, 16)
    memcpy(identity.fingerprint, lifecycle.slot.fingerprint, 32)
    identity.generation = lifecycle.slot.generation
    identity.device = lifecycle.options.device
    identity.inode = lifecycle.options.inode
    identity.image_bytes = lifecycle.slot.image_bytes
    identity.stripe_bytes = lifecycle.stripe_bytes
    identity.image_stripes = lifecycle.image_stripes


cdef bint same_table(const TableIdentity* a, const TableIdentity* b) noexcept nogil:
    return (memcmp(a.uuid, b.uuid, 16) == 0
            and memcmp(a.fingerprint, b.fingerprint, 32) == 0
            and a.generation == b.generation
            and a.image_bytes == b.image_bytes
            and a.stripe_bytes == b.stripe_bytes
            and a.image_stripes == b.image_stripes
            and a.device == b.device
            and a.inode == b.inode)


cdef bint is_anothers(Lifecycle* lifecycle) noexcept nogil:
    """The table that was found is of a base in another place: this one is a copy, or moved."""
    return lifecycle.found_state == TABLE_FOUND and (
        lifecycle.found.device != lifecycle.options.device
        or lifecycle.found.inode != lifecycle.options.inode)


cdef void decide(Lifecycle* lifecycle, Actions* actions) noexcept nogil:
    """The list in _lifecycle.pxd."""
    cdef TableIdentity expected
    cdef bint here = memcmp(lifecycle.slot.boot_id, lifecycle.options.boot_id, 16) == 0
    cdef bint is_open = (lifecycle.slot.flags & FLAG_OPEN) != 0
    cdef uint8_t refusal = REFUSE_NOTHING
    cdef bint matches, never_live
    describe(lifecycle, &expected)
    matches = lifecycle.found_state == TABLE_FOUND and same_table(&lifecycle.found, &expected)
    never_live = (lifecycle.temporary_state == TABLE_FOUND
                  and same_table(&lifecycle.temporary, &expected))
    if lifecycle.found_state == TABLE_LIVE or lifecycle.temporary_state == TABLE_LIVE:
        refuse(lifecycle, REFUSE_LIVE)
        return
    if lifecycle.errno_ != 0:
        # The first fdatasync failed: of what this table says that the base has, some is lost.
        if matches and is_open and here:
            host(lifecycle, PHASE_LATCH_TABLE, HOST_LATCH_TABLE, actions)
        else:
            refuse(lifecycle, REFUSE_IO)
        return
    if not is_open:
        if lifecycle.found_state != TABLE_NONE and not matches:
            refusal = REFUSE_COPY
    elif here:
        if matches:
            refusal = REFUSE_LATCHED if lifecycle.found.latch != 0 else REFUSE_NOTHING
            lifecycle.going_on = refusal == REFUSE_NOTHING
        elif not never_live or lifecycle.found_state != TABLE_NONE:
            refusal = REFUSE_STALE
    elif lifecycle.found_state != TABLE_NONE:
        refusal = REFUSE_COPY
    if refusal != REFUSE_NOTHING and not lifecycle.options.force_stale:
        refuse(lifecycle, refusal)
        return
    if refusal != REFUSE_NOTHING and is_anothers(lifecycle):
        memcpy(lifecycle.slot.uuid, lifecycle.options.new_uuid, 16)
        lifecycle.found_state = TABLE_NONE
        lifecycle.temporary_state = TABLE_NONE
    host(lifecycle, PHASE_BEFORE_WRITE, HOST_BEFORE_WRITE, actions)


cdef void plan_generation(Lifecycle* lifecycle, Actions* actions) noexcept nogil:
    """A new table, and a slot that names it."""
    memcpy(lifecycle.slot.fingerprint, lifecycle.options.fingerprint, 32)
    memcpy(lifecycle.slot.boot_id, lifecycle.options.boot_id, 16)
    if lifecycle.slot.block_bytes == 0:
        lifecycle.slot.block_bytes = lifecycle.options.block_bytes
    if lifecycle.options.device_bytes != 0:
        lifecycle.slot.device_bytes = lifecycle.options.device_bytes
    lifecycle.slot.generation += 1
    lifecycle.slot.flags |= FLAG_OPEN
    describe(lifecycle, &lifecycle.identity)
    host(lifecycle, PHASE_MAKE_TABLE, HOST_MAKE_TABLE, actions)


cdef inline bint header_bit(Lifecycle* lifecycle, uint32_t stripe) noexcept nogil:
    return lifecycle.pages[header_offset(stripe)] != 0


cdef uint32_t next_noted(Lifecycle* lifecycle, uint32_t stripe) noexcept nogil:
    """`stripe`, or a later one: those between have neither header nor row. A large cold disk has
    millions of them, eight a look."""
    cdef uint64_t headers[2]
    cdef uint64_t rows
    while not stripe & 7 and stripe + 8 <= lifecycle.image_stripes:
        memcpy(headers, lifecycle.pages + header_offset(stripe), 16)
        memcpy(&rows, lifecycle.table + stripe, 8)
        if headers[0] | headers[1] | rows:
            break
        stripe += 8
    return stripe


cdef bint is_full(Lifecycle* lifecycle) noexcept nogil:
    """The base has every stripe of the image, for certain."""
    cdef uint32_t stripe
    for stripe in range(lifecycle.image_stripes):
        if not header_bit(lifecycle, stripe):
            return False
    return True


cdef void fill_table(Lifecycle* lifecycle) noexcept nogil:
    """Rows of a table that is new: all are 0."""
    cdef uint32_t stripe = next_noted(lifecycle, 0)
    while stripe < lifecycle.image_stripes:
        lifecycle.table[stripe] = header_bit(lifecycle, stripe)
        stripe = next_noted(lifecycle, stripe + 1)


cdef bint has_foreign_bit(Lifecycle* lifecycle) noexcept nogil:
    """A header bit that the table does not have: somebody else wrote to this base."""
    cdef uint32_t stripe = next_noted(lifecycle, 0)
    while stripe < lifecycle.image_stripes:
        if header_bit(lifecycle, stripe) and lifecycle.table[stripe] == 0:
            return True
        stripe = next_noted(lifecycle, stripe + 1)
    return False


cdef void lifecycle_states(Lifecycle* lifecycle, Shared* shared) noexcept nogil:
    """shared.state has image_stripes, all ABSENT; what the table alone knows becomes PRESENT."""
    cdef uint32_t stripe = next_noted(lifecycle, 0)
    ensure(lifecycle.phase == PHASE_OPEN, b"states are known once the base is open")
    shared.undurable = 0
    while stripe < lifecycle.image_stripes:
        if header_bit(lifecycle, stripe):
            shared.state[stripe] = DURABLE
        elif lifecycle.table[stripe] != 0:
            shared.state[stripe] = PRESENT
            shared.undurable += 1
        stripe = next_noted(lifecycle, stripe + 1)


# -- the way in ----------------------------------------------------------------------------------

cdef void after_read(Lifecycle* lifecycle, Actions* actions) noexcept nogil:
    cdef uint8_t phase = lifecycle.phase
    if phase == PHASE_READ_HEAD:
        transfer(lifecycle, PHASE_READ_SLOTS, ACT_READ_BASE, MEM_SCRATCH, 0, SLOT_OFFSET, 2 * PAGE,
                 actions)
    elif phase == PHASE_READ_SLOTS:
        classify(lifecycle, actions)
    elif phase == PHASE_SCAN:
        if (lifecycle.position == SLOT_OFFSET and lifecycle.slot.sequence == 1
                and lifecycle.slot_index == 0):
            # Creation was cut short between its slot and its magic: all the rest is zero.
            memset(lifecycle.scratch, 0, SLOT_BYTES)
        if all_zero(lifecycle.scratch, SCRATCH_BYTES):
            lifecycle.position += SCRATCH_BYTES
            scan(lifecycle, actions)
        else:
            refuse(lifecycle, REFUSE_FOREIGN)
    else:
        ensure(phase == PHASE_READ_PAGES, b"a phase of reading")
        lifecycle.position += SCRATCH_BYTES
        if lifecycle.position > <uint64_t>lifecycle.page_count * PAGE:
            lifecycle.position = <uint64_t>lifecycle.page_count * PAGE
        read_pages(lifecycle, actions)


cdef void drop_table(Lifecycle* lifecycle, Actions* actions) noexcept nogil:
    """A base that says it is open must not be without its table, should this opening die, too."""
    if lifecycle.slot.flags & FLAG_OPEN:
        lifecycle.slot.flags &= ~<uint32_t>FLAG_OPEN
        write_slot(lifecycle, PHASE_RETIRE, actions)
    else:
        host(lifecycle, PHASE_DROP_TABLE, HOST_DROP_TABLE, actions)


cdef void start_writing(Lifecycle* lifecycle, Actions* actions) noexcept nogil:
    if lifecycle.creating:
        memset(lifecycle.scratch, 0, SCRATCH_BYTES)
        transfer(lifecycle, PHASE_ERASE, ACT_WRITE_BASE, MEM_SCRATCH, 0, SLOT_OFFSET, 2 * PAGE,
                 actions)
    elif lifecycle.going_on:
        host(lifecycle, PHASE_MAP_TABLE, HOST_MAP_TABLE, actions)
    elif lifecycle.found_state != TABLE_NONE or lifecycle.temporary_state != TABLE_NONE:
        drop_table(lifecycle, actions)
    else:
        plan_generation(lifecycle, actions)


cdef void zero_next(Lifecycle* lifecycle, Actions* actions) noexcept nogil:
    if lifecycle.position == DATA_OFFSET:
        sync(lifecycle, PHASE_ZERO_SYNC, actions)
    else:
        transfer(lifecycle, PHASE_ZERO, ACT_WRITE_BASE, MEM_SCRATCH, 0, lifecycle.position,
                 SCRATCH_BYTES, actions)
        lifecycle.position += SCRATCH_BYTES


cdef void after_create(Lifecycle* lifecycle, Actions* actions) noexcept nogil:
    cdef uint8_t phase = lifecycle.phase
    if phase == PHASE_ERASE:
        sync(lifecycle, PHASE_ERASE_SYNC, actions)
    elif phase == PHASE_ERASE_SYNC:
        host(lifecycle, PHASE_ZERO_TAIL, HOST_ZERO_TAIL, actions)
    elif phase == PHASE_ZERO_TAIL:
        lifecycle.position = 0
        zero_next(lifecycle, actions)
    elif phase == PHASE_ZERO:
        zero_next(lifecycle, actions)
    elif phase == PHASE_ZERO_SYNC:
        write_slot(lifecycle, PHASE_FIRST_SLOT, actions)
    elif phase == PHASE_FIRST_SLOT:
        sync(lifecycle, PHASE_FIRST_SLOT_SYNC, actions)
    elif phase == PHASE_FIRST_SLOT_SYNC:
        write_head(lifecycle, PHASE_FIRST_HEAD, VERSION_CLOSED, actions)
    elif phase == PHASE_FIRST_HEAD:
        sync(lifecycle, PHASE_FIRST_HEAD_SYNC, actions)
    elif phase == PHASE_FIRST_HEAD_SYNC:
        host(lifecycle, PHASE_CREATED, HOST_CREATED, actions)
    else:
        ensure(phase == PHASE_CREATED, b"a phase of creating")
        plan_generation(lifecycle, actions)


cdef void after_open(Lifecycle* lifecycle, Actions* actions) noexcept nogil:
    cdef uint8_t phase = lifecycle.phase
    if phase == PHASE_RETIRE:
        sync(lifecycle, PHASE_RETIRE_SYNC, actions)
    elif phase == PHASE_RETIRE_SYNC:
        host(lifecycle, PHASE_DROP_TABLE, HOST_DROP_TABLE, actions)
    elif phase == PHASE_DROP_TABLE:
        plan_generation(lifecycle, actions)
    elif phase == PHASE_MAKE_TABLE:
        fill_table(lifecycle)
        write_head(lifecycle, PHASE_OPEN_HEAD, VERSION_OPEN, actions)
    elif phase == PHASE_OPEN_HEAD:
        write_slot(lifecycle, PHASE_OPEN_SLOT, actions)
    elif phase == PHASE_OPEN_SLOT:
        sync(lifecycle, PHASE_OPEN_SYNC, actions)
    elif phase == PHASE_OPEN_SYNC:
        host(lifecycle, PHASE_PUBLISH, HOST_PUBLISH_TABLE, actions)
    elif phase == PHASE_PUBLISH:
        lifecycle.phase = PHASE_OPEN
    else:
        ensure(phase == PHASE_MAP_TABLE, b"a phase of opening")
        if has_foreign_bit(lifecycle):
            if lifecycle.options.force_stale:
                lifecycle.going_on = False
                drop_table(lifecycle, actions)
            else:
                refuse(lifecycle, REFUSE_FOREIGN_WRITER)
        else:
            lifecycle.identity = lifecycle.found
            lifecycle.phase = PHASE_OPEN


cdef void after_grow(Lifecycle* lifecycle, int32_t result, Actions* actions) noexcept nogil:
    """A step that fails leaves the slot before, or the new one: the base fits both."""
    cdef uint8_t phase = lifecycle.phase
    if phase == PHASE_GROW_LATCH:
        lifecycle.phase = PHASE_OPEN
    elif result < 0:
        if phase != PHASE_GROW_FIRST_SYNC:
            lifecycle.slot_index ^= 1
            lifecycle.slot.sequence -= 1
        lifecycle.slot.device_bytes = lifecycle.grown_from
        if phase == PHASE_GROW_SLOT:
            lifecycle.phase = PHASE_OPEN
        else:
            host(lifecycle, PHASE_GROW_LATCH, HOST_LATCH_TABLE, actions)
    elif phase == PHASE_GROW_FIRST_SYNC:
        write_slot(lifecycle, PHASE_GROW_SLOT, actions)
    elif phase == PHASE_GROW_SLOT:
        sync(lifecycle, PHASE_GROW_SYNC, actions)
    else:
        ensure(phase == PHASE_GROW_SYNC, b"a phase of growing")
        lifecycle.phase = PHASE_OPEN


cdef void after_close(Lifecycle* lifecycle, Actions* actions) noexcept nogil:
    cdef uint8_t phase = lifecycle.phase
    if phase == PHASE_CLOSE_SLOT:
        sync(lifecycle, PHASE_CLOSE_SLOT_SYNC, actions)
    elif phase == PHASE_CLOSE_SLOT_SYNC:
        write_head(lifecycle, PHASE_CLOSE_HEAD, VERSION_CLOSED, actions)
    elif phase == PHASE_CLOSE_HEAD:
        sync(lifecycle, PHASE_CLOSE_HEAD_SYNC, actions)
    elif phase == PHASE_CLOSE_HEAD_SYNC:
        host(lifecycle, PHASE_UNLINK, HOST_UNLINK_TABLE, actions)
    else:
        ensure(phase == PHASE_UNLINK, b"a phase of closing")
        lifecycle.phase = PHASE_CLOSED


cdef void on_done(Lifecycle* lifecycle, const Event* event, Actions* actions) noexcept nogil:
    cdef uint8_t phase = lifecycle.phase
    ensure(PHASE_NEW < phase < PHASE_OPEN or PHASE_OPEN < phase < PHASE_CLOSED,
           b"an action ends only while it runs")
    if event.result < 0:
        lifecycle.errno_ = -event.result
    if PHASE_GROW_FIRST_SYNC <= phase <= PHASE_GROW_LATCH:
        after_grow(lifecycle, event.result, actions)
    elif event.result < 0 and phase != PHASE_FIRST_SYNC:
        refuse(lifecycle, REFUSE_IO)
    elif phase == PHASE_FIRST_SYNC:
        # Failed or not: if it failed, the table must learn of it (decide).
        transfer(lifecycle, PHASE_READ_HEAD, ACT_READ_BASE, MEM_PAGE, 0, 0, PAGE, actions)
    elif PHASE_READ_HEAD <= phase <= PHASE_READ_PAGES:
        after_read(lifecycle, actions)
    elif phase == PHASE_FIND_TABLE:
        decide(lifecycle, actions)
    elif phase == PHASE_LATCH_TABLE:
        refuse(lifecycle, REFUSE_IO)
    elif phase == PHASE_BEFORE_WRITE:
        start_writing(lifecycle, actions)
    elif PHASE_ERASE <= phase <= PHASE_CREATED:
        after_create(lifecycle, actions)
    elif PHASE_RETIRE <= phase <= PHASE_PUBLISH:
        after_open(lifecycle, actions)
    else:
        after_close(lifecycle, actions)


cdef void lifecycle_step(Lifecycle* lifecycle, const Event* event, Actions* actions) noexcept nogil:
    """The only way in."""
    if event.kind == EVENT_START:
        ensure(lifecycle.phase == PHASE_NEW, b"a base is opened once")
        sync(lifecycle, PHASE_FIRST_SYNC, actions)
    elif event.kind == EVENT_STOP:
        ensure(lifecycle.phase == PHASE_OPEN, b"only an open base is closed")
        lifecycle.slot.flags &= ~<uint32_t>FLAG_OPEN
        write_slot(lifecycle, PHASE_CLOSE_SLOT, actions)
    elif event.kind == EVENT_GROW:
        ensure(lifecycle.phase == PHASE_OPEN, b"only an open base grows")
        lifecycle.errno_ = 0
        lifecycle.grown_from = lifecycle.slot.device_bytes
        lifecycle.slot.device_bytes = event.offset
        sync(lifecycle, PHASE_GROW_FIRST_SYNC, actions)
    else:
        ensure(event.kind == EVENT_DONE, b"a lifecycle knows START, STOP, GROW and completions")
        on_done(lifecycle, event, actions)
