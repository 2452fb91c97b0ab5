"""Mistakes; see _mistakes.pxd."""

from libc.stdint cimport uint16_t, uint32_t, uint64_t, uint8_t
from libc.string cimport memcmp, memcpy

from ublk_ubi._format cimport FLAG_OPEN, Slot, slot_seal
from ublk_ubi._lifecycle cimport (
    PHASE_FAILED, PHASE_OPEN, REFUSE_ADOPT, REFUSE_COPY, REFUSE_DAMAGED, REFUSE_FINGERPRINT,
    REFUSE_FOREIGN, REFUSE_FOREIGN_WRITER, REFUSE_IMAGE_SIZE, REFUSE_LIVE, REFUSE_NEEDS_IMAGE,
    REFUSE_NEWER, REFUSE_NOTHING, REFUSE_STALE, REFUSE_STRIPE_RANGE, REFUSE_STRIPE_SIZE,
    REFUSE_STRIPE_UNKNOWN, REFUSE_TOO_MANY_STRIPES, REFUSE_TOO_SMALL, REFUSE_VERSION, SCRATCH_BYTES,
    TABLE_DAMAGED, TABLE_FOUND, TABLE_LIVE, TABLE_NONE, LifecycleOptions,
)
from ubi_sim._daemon cimport daemon_open
from ubi_sim._host cimport (
    current_slot, expected_refusal, has_magic, host_options, is_of, slots_zero,
)
from ubi_sim._model cimport (
    NOT_KEPT, NOT_REFUSED, REFUSED, SLOT_SECTOR, WITH_STALE_BASE, Host, Table, World, below, has,
    here, next_random, one_in, violate,
)
from ubi_sim._trace cimport trace_number


# -- by what is there ----------------------------------------------------------------------------

cdef uint8_t mistake_about_size(World* world, LifecycleOptions* options) noexcept nogil:
    """An image or a base that cannot go together, on a base that is to be made."""
    cdef uint32_t choice = below(world, 4)
    if choice == 3:
        options.no_image = True
        return REFUSE_NEEDS_IMAGE
    if choice == 0:
        options.base_bytes = (8 << 20) + 512
        return REFUSE_TOO_SMALL
    if choice == 1:
        options.image_bytes = <uint64_t>1 << 41
        return REFUSE_TOO_MANY_STRIPES
    options.stripe_bytes = 0x18000 if next_random(world) & 1 else 0x8000
    return REFUSE_STRIPE_RANGE


cdef uint8_t mistake_on_blank(World* world, LifecycleOptions* options) noexcept nogil:
    """No magic: ours to be, or somebody else's."""
    if has(world, WITH_STALE_BASE):
        if not world.disk.chunk_cache[7] or current_slot(world) != NULL:
            return mistake_about_size(world, options)
        options.format = False
        return REFUSE_FOREIGN
    if not slots_zero(world) or next_random(world) & 1:
        return mistake_about_size(world, options)
    if next_random(world) & 1:
        world.disk.chunk_cache[1 + below(world, 7)] = 1
    else:
        world.disk.meta_cache[600] = 1
    return REFUSE_FOREIGN


cdef uint8_t mistake_on_version(World* world) noexcept nogil:
    if next_random(world) & 1:
        world.disk.meta_cache[10] = 1
    else:
        world.disk.meta_cache[11] = 3 if next_random(world) & 1 else 0
    return REFUSE_VERSION


cdef uint8_t mistake_on_adoptable(World* world, LifecycleOptions* options) noexcept nogil:
    """A disk of bdev_ubi's."""
    cdef uint32_t choice = below(world, 6)
    if choice == 0:
        options.adopt = False
        return REFUSE_ADOPT
    if choice == 5:
        options.no_image = True
        return REFUSE_NEEDS_IMAGE
    if choice == 1:
        world.disk.meta_cache[13] = 0
        return REFUSE_STRIPE_UNKNOWN
    if choice == 2:
        options.stripe_bytes = 128 << 10
        return REFUSE_STRIPE_SIZE
    if choice == 3:
        options.base_bytes = (8 << 20) + 512
        return REFUSE_TOO_SMALL
    return mistake_on_version(world)


cdef uint8_t without_image(World* world, LifecycleOptions* options) noexcept nogil:
    """It is needed, unless the headers have every stripe."""
    cdef uint32_t stripe
    options.no_image = True
    for stripe in range(world.geometry.image_stripes):
        if not world.disk.meta_cache[14 + 2 * stripe]:
            return REFUSE_NEEDS_IMAGE
    return REFUSE_NOTHING


cdef uint8_t mistake_on_record(World* world, LifecycleOptions* options) noexcept nogil:
    """A disk of ours: what its slot says does not fit."""
    cdef Slot* slot = current_slot(world)
    cdef uint32_t choice = below(world, 10)
    if choice == 9:
        return without_image(world, options)
    if choice == 0:
        options.image_bytes += 512
        return REFUSE_IMAGE_SIZE
    if choice == 1:
        options.fingerprint[below(world, 32)] ^= 1
        return REFUSE_FINGERPRINT
    if choice == 2:
        options.stripe_bytes = 128 << 10
        return REFUSE_STRIPE_SIZE
    if choice == 3:
        options.base_bytes = (8 << 20) + 512
        return REFUSE_TOO_SMALL
    if choice == 4:
        return mistake_on_version(world)
    if choice == 5:
        world.disk.meta_cache[SLOT_SECTOR * 512 + below(world, 512)] ^= 0x80
        world.disk.meta_cache[(SLOT_SECTOR + 8) * 512 + below(world, 512)] ^= 0x80
        return REFUSE_DAMAGED
    if choice == 6:
        slot.feature_incompat = 1
        slot_seal(slot)
        return REFUSE_NEWER
    if choice == 7:
        # The same low byte as page 0 says, or not: then somebody else made a disk here.
        slot.stripe_bytes = (64 + 256) << 10 if next_random(world) & 1 else 128 << 10
        slot_seal(slot)
        return REFUSE_STRIPE_RANGE if slot.stripe_bytes != 128 << 10 else REFUSE_DAMAGED
    slot.image_bytes = options.image_bytes = <uint64_t>1 << 41
    slot_seal(slot)
    return REFUSE_TOO_MANY_STRIPES


# -- tables --------------------------------------------------------------------------------------

cdef void spoil_identity(World* world, Table* table) noexcept nogil:
    """It is the table of another opening, image, or layout."""
    cdef uint32_t choice = below(world, 5)
    if choice == 0:
        table.identity.fingerprint[below(world, 32)] ^= 1
    elif choice == 1:
        table.identity.image_bytes += 512
    elif choice == 2:
        table.identity.stripe_bytes *= 2
    elif choice == 3:
        table.identity.image_stripes += 1
    else:
        table.identity.generation += 7


cdef uint8_t write_foreign_bit(World* world) noexcept nogil:
    """Somebody else hydrates a stripe behind the table's back."""
    cdef uint16_t i
    cdef uint32_t stripe
    for i in range(world.geometry.hot_count):
        stripe = world.geometry.hot[i]
        if stripe < world.geometry.image_stripes and not here(world).table.rows[stripe]:
            world.disk.meta_cache[14 + 2 * stripe] = 1
            return REFUSE_FOREIGN_WRITER
    return REFUSE_NOTHING


cdef uint8_t mistake_on_open(World* world, LifecycleOptions* options) noexcept nogil:
    """The base is open on this very boot: nothing but its own table will do."""
    cdef Table* table = &here(world).table
    cdef bint there = is_of(table, current_slot(world))
    cdef uint32_t choice = below(world, 7)
    if is_of(&here(world).temporary, current_slot(world)) and one_in(world, 3):
        here(world).temporary.there = TABLE_LIVE
        return REFUSE_LIVE
    if choice == 0:
        options.inode = 3
    elif choice == 1 or not there:
        # Without a table a temporary one must be the right one.
        table.there = TABLE_NONE
        if next_random(world) & 1:
            here(world).temporary.there = TABLE_NONE
        else:
            here(world).temporary.identity.generation += 7
    elif choice == 2:
        table.there = TABLE_LIVE
        return REFUSE_LIVE
    elif choice == 3:
        table.there = TABLE_DAMAGED
    elif choice == 4:
        memcpy(options.boot_id, b"another boot's..", 16)
        return REFUSE_COPY
    elif choice == 5 and expected_refusal(world) == REFUSE_NOTHING:
        return write_foreign_bit(world)
    else:
        spoil_identity(world, table)
    return REFUSE_STALE


cdef uint8_t mistake_on_table(World* world, LifecycleOptions* options) noexcept nogil:
    cdef const Slot* slot = current_slot(world)
    cdef Host* host = here(world)
    cdef bint booted_here = slot.boot_id[0] == host.boot
    cdef uint32_t spoil
    if slot.flags & FLAG_OPEN and booted_here:
        return mistake_on_open(world, options)
    if is_of(&host.temporary, slot) and one_in(world, 3):
        host.temporary.there = TABLE_LIVE
        return REFUSE_LIVE
    if not is_of(&host.table, slot):
        return REFUSE_NOTHING
    spoil = below(world, 4)
    if spoil == 3:
        host.table.there = TABLE_LIVE
        return REFUSE_LIVE
    if spoil == 0:
        host.table.there = TABLE_DAMAGED
    elif spoil == 1:
        options.device = 7
    else:
        spoil_identity(world, &host.table)
    return REFUSE_COPY


# -- made and taken back -------------------------------------------------------------------------

cdef uint8_t choose(World* world, LifecycleOptions* options) noexcept nogil:
    """Change world or options; the Refusal that must follow, or none if nothing was changed."""
    if not has_magic(world):
        if expected_refusal(world) != REFUSE_NOTHING:
            # Torn as it was made: it is foreign before its size is looked at.
            return REFUSE_NOTHING
        return mistake_on_blank(world, options)
    if slots_zero(world):
        return mistake_on_adoptable(world, options)
    if current_slot(world) == NULL:
        return REFUSE_NOTHING
    if next_random(world) & 1:
        return mistake_on_record(world, options)
    return mistake_on_table(world, options)


cdef bint force(World* world, uint8_t refusal, LifecycleOptions* options) noexcept nogil:
    """Ask for it all the same, where that is meant to help."""
    if refusal == REFUSE_FINGERPRINT and expected_refusal(world) == REFUSE_NOTHING:
        options.force = True
    elif (refusal == REFUSE_COPY or refusal == REFUSE_STALE
            or refusal == REFUSE_FOREIGN_WRITER):
        options.force_stale = True
    else:
        return False
    return True


cdef void check_refused(World* world, uint8_t refusal, LifecycleOptions* options) noexcept nogil:
    cdef Host before = here(world)[0]
    cdef uint64_t landed = world.disk.landed
    daemon_open(world, options)
    if world.engines.lifecycle.phase != PHASE_FAILED:
        violate(world, NOT_REFUSED, refusal, world.engines.lifecycle.phase, 1, 0)
    elif world.engines.lifecycle.refusal != refusal:
        violate(world, REFUSED, world.engines.lifecycle.refusal, refusal, 1, 0)
    elif world.disk.landed != landed or memcmp(&before, here(world), sizeof(Host)) != 0:
        violate(world, NOT_KEPT, refusal, 1, 0, 0)


cdef void check_forced(World* world, uint8_t refusal, LifecycleOptions* options) noexcept nogil:
    daemon_open(world, options)
    if (world.engines.lifecycle.phase != PHASE_OPEN
            or here(world).table.there != TABLE_FOUND):
        violate(world, REFUSED, world.engines.lifecycle.refusal, refusal, 2, 0)


cdef void make_mistake(World* world, World* saved) noexcept nogil:
    cdef LifecycleOptions options
    cdef uint8_t refusal
    memcpy(saved, world, sizeof(World))
    world.hook = NULL
    world.quiet = 1
    world.scratch += SCRATCH_BYTES
    host_options(world, &options)
    refusal = choose(world, &options)
    if refusal != REFUSE_NOTHING:
        if world.trace != NULL:
            trace_number(world, b"an opening that must be refused (%llu)", refusal)
        if one_in(world, 3) and force(world, refusal, &options):
            check_forced(world, refusal, &options)
        else:
            check_refused(world, refusal, &options)
    if world.violation == 0:
        memcpy(world, saved, sizeof(World))
