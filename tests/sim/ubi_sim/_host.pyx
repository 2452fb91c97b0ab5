"""Hosts and operators; see _host.pxd."""

from libc.errno cimport EEXIST
from libc.stdint cimport int32_t, uint16_t, uint32_t, uint64_t, uint8_t
from libc.string cimport memcmp, memset

from ublk_ubi._atomic cimport ensure
from ublk_ubi._core cimport DATA_OFFSET
from ublk_ubi._format cimport FLAG_OPEN, SLOT_VALID, SLOT_ZERO, Slot, slot_check
from ublk_ubi._lifecycle cimport (
    HOST_BEFORE_WRITE, HOST_CREATED, HOST_DROP_TABLE, HOST_FIND_TABLE, HOST_LATCH_TABLE,
    HOST_MAKE_TABLE, HOST_MAP_TABLE, HOST_PUBLISH_TABLE, HOST_UNLINK_TABLE, HOST_ZERO_TAIL,
    REFUSE_COPY, REFUSE_DAMAGED, REFUSE_FOREIGN, REFUSE_LATCHED, REFUSE_NOTHING, REFUSE_STALE,
    TABLE_FOUND, TABLE_NONE, Lifecycle, LifecycleOptions,
)
from ubi_sim._disk cimport disk_land, disk_write
from ubi_sim._model cimport (
    BUG_LATCH_FORGOTTEN, BUG_TABLE_FORGOTTEN, CELLS, CELL_BYTES, LOG_DATA, NOT_KEPT, SLOT_SECTOR,
    STRIPE_BYTES, WHOLE, WITH_ADOPTION, WITH_STALE_BASE, Host, Table, World, has, here, violate,
)


# -- what is on the base -------------------------------------------------------------------------

cdef bint has_magic(const World* world) noexcept nogil:
    return memcmp(world.disk.meta_cache, b"BDEV_UBI\0", 9) == 0


cdef Slot* slot_at(const World* world, int index) noexcept nogil:
    return <Slot*>(world.disk.meta_cache + (SLOT_SECTOR + 8 * index) * 512)


# A checksum costs more than the rest of a crash: what was checked lately is remembered. No part of
# the world: the same bytes give the same answer.
cdef Slot[16] checked
cdef uint8_t[16] conditions
cdef uint32_t next_checked = 0


cdef uint8_t condition(const World* world, int index) noexcept nogil:
    """SlotCondition of one of the two slots."""
    global next_checked
    cdef const Slot* slot = slot_at(world, index)
    cdef uint32_t i
    for i in range(16):
        if memcmp(slot, &checked[i], sizeof(Slot)) == 0:
            return conditions[i]
    i = next_checked % 16
    next_checked += 1
    checked[i] = slot[0]
    conditions[i] = slot_check(slot)
    return conditions[i]


cdef Slot* current_slot(const World* world) noexcept nogil:
    cdef Slot* best = NULL
    cdef int i
    for i in range(2):
        if condition(world, i) == SLOT_VALID and (
                best == NULL or slot_at(world, i).sequence > best.sequence):
            best = slot_at(world, i)
    return best


cdef bint slots_zero(const World* world) noexcept nogil:
    return condition(world, 0) == SLOT_ZERO and condition(world, 1) == SLOT_ZERO


cdef bint is_of(const Table* table, const Slot* slot) noexcept nogil:
    return table.there and memcmp(table.identity.uuid, slot.uuid, 16) == 0


cdef uint8_t expected_refusal(World* world) noexcept nogil:
    cdef const Slot* slot = current_slot(world)
    cdef const Table* table = &here(world).table
    cdef bint is_open, booted_here
    if slot == NULL:
        # Its first slot was torn inside, before it ever served: nothing is lost by a refusal.
        if slots_zero(world) or world.served or not world.disk.torn_inside or (
                has(world, WITH_STALE_BASE) and not has_magic(world)):
            return REFUSE_NOTHING
        return REFUSE_DAMAGED if has_magic(world) else REFUSE_FOREIGN
    if not has_magic(world):
        return REFUSE_NOTHING
    is_open = (slot.flags & FLAG_OPEN) != 0
    booted_here = slot.boot_id[0] == here(world).boot
    # The other host has had the base since this table was its.
    if is_of(table, slot) and (not booted_here if is_open
                               else table.identity.generation != slot.generation):
        return REFUSE_COPY
    if is_open and is_of(table, slot) and table.latch and (
            table.identity.generation == slot.generation):
        return REFUSE_LATCHED
    if is_open and booted_here and here(world).wiped and not is_of(table, slot) and not (
            is_of(&here(world).temporary, slot)
            and here(world).temporary.identity.generation == slot.generation):
        return REFUSE_STALE
    return REFUSE_NOTHING


# -- what an operator asks for -------------------------------------------------------------------

cdef void host_options(World* world, LifecycleOptions* options) noexcept nogil:
    memset(options, 0, sizeof(LifecycleOptions))
    options.base_bytes = ((8 << 20) + CELL_BYTES * world.geometry.last_cells
                          + <uint64_t>(world.geometry.device_stripes - 1) * STRIPE_BYTES)
    options.image_bytes = world.geometry.image_bytes
    options.device = 1
    options.inode = 2
    world.uuids += 1
    memset(options.fingerprint, 0xf1, 32)
    memset(options.new_uuid, world.uuids, 16)
    memset(options.boot_id, here(world).boot, 16)
    options.default_stripe_bytes = STRIPE_BYTES
    options.device_bytes = options.base_bytes - DATA_OFFSET
    options.format = has(world, WITH_STALE_BASE) and not has_magic(world)
    options.adopt = has(world, WITH_ADOPTION)


cdef void host_boot(World* world) noexcept nogil:
    world.boots += 1
    here(world).boot = world.boots
    here(world).table.there = 0
    here(world).temporary.there = 0
    here(world).wiped = 0


# -- host calls ----------------------------------------------------------------------------------

cdef bint same_uuid(const Table* table, const uint8_t* uuid) noexcept nogil:
    return table.there and memcmp(table.identity.uuid, uuid, 16) == 0


cdef void find_table(World* world, Lifecycle* lifecycle) noexcept nogil:
    cdef Host* host = here(world)
    lifecycle.found_state = TABLE_NONE
    lifecycle.temporary_state = TABLE_NONE
    if same_uuid(&host.table, lifecycle.slot.uuid) and world.bug != BUG_TABLE_FORGOTTEN:
        if world.bug == BUG_LATCH_FORGOTTEN:
            host.table.latch = 0
        lifecycle.found_state = host.table.there
        lifecycle.found = host.table.identity
        lifecycle.found.latch = host.table.latch
    if same_uuid(&host.temporary, lifecycle.slot.uuid):
        lifecycle.temporary_state = host.temporary.there
        lifecycle.temporary = host.temporary.identity


cdef void drop_table(World* world, const uint8_t* uuid) noexcept nogil:
    cdef Host* host = here(world)
    if same_uuid(&host.table, uuid):
        host.table.there = 0
    if same_uuid(&host.temporary, uuid):
        host.temporary.there = 0


cdef int32_t make_table(World* world, Lifecycle* lifecycle) noexcept nogil:
    cdef Host* host = here(world)
    if same_uuid(&host.temporary, lifecycle.identity.uuid):
        return -EEXIST
    memset(&host.temporary, 0, sizeof(Table))
    host.temporary.there = TABLE_FOUND
    host.temporary.identity = lifecycle.identity
    lifecycle.table = host.temporary.rows
    return 0


cdef int32_t publish_table(World* world, Lifecycle* lifecycle) noexcept nogil:
    cdef Host* host = here(world)
    if same_uuid(&host.table, lifecycle.identity.uuid):
        return -EEXIST
    host.table = host.temporary
    host.temporary.there = 0
    lifecycle.table = host.table.rows
    return 0


cdef void zero_tail(World* world) noexcept nogil:
    """Zeros behind the image, in the cache as any write."""
    cdef uint32_t zeros[CELLS]
    cdef uint16_t i
    memset(zeros, 0, sizeof(zeros))
    for i in range(world.geometry.hot_count):
        if world.geometry.hot[i] >= world.geometry.image_stripes:
            disk_land(world, disk_write(world, LOG_DATA, i * CELLS, CELLS, zeros, NULL),
                      WHOLE)


cdef void keep_size(World* world, Lifecycle* lifecycle) noexcept nogil:
    """A disk has the size that it had: what was promised, or what was asked for since."""
    cdef uint64_t found = lifecycle.slot.device_bytes
    if lifecycle.creating or lifecycle.adopting:
        world.grown = found
        world.grown_at_most = found
    elif not world.grown <= found <= world.grown_at_most:
        violate(world, NOT_KEPT, <uint32_t>world.grown, <uint32_t>found,
                <uint32_t>world.grown_at_most, 0)
    else:
        world.grown = found
    lifecycle.options.device_bytes = found


cdef int32_t host_call(World* world, uint8_t call) noexcept nogil:
    cdef Lifecycle* lifecycle = &world.engines.lifecycle
    if call == HOST_FIND_TABLE:
        find_table(world, lifecycle)
    elif call == HOST_DROP_TABLE:
        drop_table(world, lifecycle.slot.uuid)
    elif call == HOST_UNLINK_TABLE:
        drop_table(world, lifecycle.identity.uuid)
    elif call == HOST_MAKE_TABLE:
        return make_table(world, lifecycle)
    elif call == HOST_MAP_TABLE:
        lifecycle.table = here(world).table.rows
    elif call == HOST_PUBLISH_TABLE:
        return publish_table(world, lifecycle)
    elif call == HOST_LATCH_TABLE:
        here(world).table.latch = <uint32_t>lifecycle.errno_
    elif call == HOST_ZERO_TAIL:
        zero_tail(world)
    elif call == HOST_BEFORE_WRITE:
        keep_size(world, lifecycle)
    else:
        ensure(call == HOST_CREATED, b"a host call is one of HostCall")
    return 0
