"""Counting pairs; see _coverage.pxd."""

from libc.stdint cimport uint16_t, uint32_t, uint8_t
from libc.string cimport memcmp

from ublk_ubi._core cimport (
    BASE_SYNCED, CACHE_UNSAFE, CACHE_WRITETHROUGH, CLAIMED, EVENT_DONE, EVENT_MESSAGE,
    EVENT_REQUEST, EVENT_ROUND, EVENT_STOP, EVENT_TICK, IN_ROUND, MSG_CLAIM, MSG_GRANT, MSG_HYDRATE,
    MSG_JOIN, MSG_WANT, MSG_WRITTEN, OP_DISCARD, OP_FLUSH, OP_READ, OP_WRITE, OP_WRITE_ZEROES,
    OVERWRITING, PRESENT, QUEUED, STATE_MASK, WANTED, Event, Shared, stripe_state,
)
from ublk_ubi._format cimport FLAG_OPEN
from ublk_ubi._hydrator cimport FETCH_READ, PAGE_WINDOW, Hydrator
from ublk_ubi._lifecycle cimport (
    PHASE_FAILED, PHASE_FIND_TABLE, TABLE_DAMAGED, TABLE_FOUND, TABLE_LIVE, TABLE_NONE, Lifecycle,
    TableIdentity,
)
from ublk_ubi._queue cimport AWAITING_SYNC, FOLLOWS_ROUND, READING_IMAGE, Request
from ubi_sim._model cimport STRIPE_BYTES, World, cover


# -- queue ---------------------------------------------------------------------------------------

cdef uint32_t request_row(const Event* event, bint durable) noexcept nogil:
    cdef bint whole = event.length == STRIPE_BYTES
    if event.op == OP_READ:
        return READ_ROW
    if event.op == OP_DISCARD:
        return DISCARD_ROW
    if event.op == OP_WRITE_ZEROES:
        return ZERO_WHOLE_ROW if whole else ZERO_PART_ROW
    if durable:
        return DURABLE_WHOLE_ROW if whole else DURABLE_PART_ROW
    return WHOLE_ROW if whole else PART_ROW


cdef void cover_lost(World* world, const Event* event) noexcept nogil:
    cdef uint32_t row = 2 if event.length == STRIPE_BYTES else 1
    if event.op == OP_FLUSH or event.op == OP_DISCARD:
        return
    if event.op == OP_READ:
        row = 0
    cover(world, AT_LOST + row * 5 + stripe_state(&world.engines.shared,
                                                  <uint32_t>(event.offset // STRIPE_BYTES)))


cdef void cover_request(World* world, uint16_t queue, const Event* event) noexcept nogil:
    cdef Shared* shared = &world.engines.shared
    cdef bint latched = shared.latch[0] != 0
    cdef bint durable = (shared.cache != CACHE_UNSAFE
                         and (event.fua or shared.cache == CACHE_WRITETHROUGH))
    if event.op == OP_FLUSH:
        if latched:
            cover(world, AT_FLUSH + 3)
        elif shared.cache == CACHE_UNSAFE:
            cover(world, AT_FLUSH + 4)
        elif shared.undurable != 0:
            cover(world, AT_FLUSH + 2)
        elif shared.base == BASE_SYNCED:
            cover(world, AT_FLUSH + 5)
        else:
            cover(world, AT_FLUSH + (1 if world.engines.queues[queue].syncing else 0))
    elif durable and latched and (event.op == OP_WRITE or event.op == OP_WRITE_ZEROES):
        cover(world, AT_REFUSED)
    else:
        cover(world, AT_STRIPE + request_row(event, durable) * 5
              + stripe_state(shared, <uint32_t>(event.offset // STRIPE_BYTES)))


cdef void cover_queue(World* world, uint16_t queue, const Event* event) noexcept nogil:
    cdef const Request* request
    cdef uint32_t state, column
    if world.coverage == NULL:
        return
    if event.kind == EVENT_REQUEST:
        cover_request(world, queue, event)
        if world.image_changed:
            cover_lost(world, event)
        return
    if event.kind == EVENT_DONE and event.token == world.geometry.depth:
        state = AWAITING_SYNC
        column = DONE_OK if event.result >= 0 else DONE_FAILED
        if column == DONE_OK and world.engines.shared.latch[0] != 0:
            column = DONE_LATCHED
        cover(world, AT_WAIT + state * 9 + column)
        return
    request = &world.engines.requests[queue][event.token if event.kind == EVENT_DONE
                                             else event.tag]
    state = request.state
    if event.kind == EVENT_DONE:
        column = DONE_OK if event.result >= 0 else DONE_FAILED
        if column == DONE_FAILED and state == READING_IMAGE and stripe_state(
                &world.engines.shared, request.stripe) >= PRESENT:
            column = DONE_FAILED_PRESENT
        if (column == DONE_OK and request.durable and request.follows != FOLLOWS_ROUND
                and world.engines.shared.latch[0] != 0):
            column = DONE_LATCHED
    elif event.op == MSG_GRANT:
        column = GRANT_FAILED
        if event.result >= 0:
            column = GRANT_CLAIMED if event.result == CLAIMED else GRANT_PRESENT
    else:
        column = ANSWER_OK if event.result >= 0 else ANSWER_FAILED
    cover(world, AT_WAIT + state * 9 + column)


# -- hydrator ------------------------------------------------------------------------------------

cdef uint32_t stripe_row(World* world, uint32_t stripe) noexcept nogil:
    """A stripe's state and flags, as a row."""
    cdef uint8_t value = world.engines.state[stripe]
    cdef uint8_t state = value & STATE_MASK
    if state > PRESENT:
        return ROW_DURABLE
    if state == PRESENT:
        return ROW_IN_ROUND if value & IN_ROUND else ROW_PRESENT
    if state != 0:
        return ROW_OVERWRITING if state == OVERWRITING else ROW_FETCHING
    if value & QUEUED:
        return ROW_QUEUED
    return ROW_WANTED if value & WANTED else ROW_ABSENT


cdef void cover_message(World* world, const Event* event, bint latched) noexcept nogil:
    cdef uint32_t column
    if event.op == MSG_JOIN:
        cover(world, AT_ROUND + world.engines.hydrator.round * 12
              + (ON_JOIN_LATCHED if latched else ON_JOIN))
        return
    if event.op == MSG_WANT:
        column = ON_WANT
    elif event.op == MSG_HYDRATE:
        column = ON_HYDRATE
    elif event.op == MSG_CLAIM:
        column = ON_CLAIM
    elif event.op == MSG_WRITTEN:
        column = ON_WRITTEN if event.result >= 0 else ON_WRITTEN_FAILED
    else:
        return
    cover(world, AT_HYDRATOR + stripe_row(world, event.stripe) * 9 + column)


cdef void cover_done(World* world, const Event* event, bint latched) noexcept nogil:
    cdef Hydrator* hydrator = &world.engines.hydrator
    cdef bint failed = event.result < 0
    cdef uint32_t column
    if event.token < hydrator.buffers:
        if world.engines.fetches[event.token].phase == FETCH_READ:
            column = ON_READ_FAILED if failed else ON_READ
        else:
            column = ON_WRITE_FAILED if failed else ON_WRITE
        cover(world, AT_HYDRATOR + column
              + stripe_row(world, world.engines.fetches[event.token].stripe) * 9)
        return
    if event.token < hydrator.buffers + PAGE_WINDOW:
        column = ON_PAGE_FAILED if failed else ON_PAGE
    elif failed:
        column = ON_SYNC_FAILED
    else:
        column = ON_SYNC_LATCHED if latched else ON_SYNC
    cover(world, AT_ROUND + hydrator.round * 12 + column)


cdef void cover_hydrator(World* world, const Event* event) noexcept nogil:
    cdef Hydrator* hydrator = &world.engines.hydrator
    cdef bint latched
    if world.coverage == NULL:
        return
    latched = world.engines.shared.latch[0] != 0
    cover(world, AT_LIFE + hydrator.life * 11 + event.kind)
    if event.kind == EVENT_MESSAGE:
        cover_message(world, event, latched)
    elif event.kind == EVENT_DONE:
        cover_done(world, event, latched)
    elif event.kind == EVENT_TICK:
        cover(world, AT_ROUND + hydrator.round * 12 + (ON_TICK_LATCHED if latched else ON_TICK))
    elif event.kind == EVENT_STOP:
        cover(world, AT_ROUND + hydrator.round * 12 + ON_STOP)
    elif event.kind == EVENT_ROUND:
        cover(world, AT_ROUND + hydrator.round * 12 + (ON_ROUND_LATCHED if latched else ON_ROUND))


# -- lifecycle -----------------------------------------------------------------------------------

cdef bint of_generation(Lifecycle* lifecycle, const TableIdentity* table) noexcept nogil:
    """A table of the opening that the slot names, in all that the identity has."""
    return (memcmp(table.uuid, lifecycle.slot.uuid, 16) == 0
            and memcmp(table.fingerprint, lifecycle.slot.fingerprint, 32) == 0
            and table.generation == lifecycle.slot.generation
            and table.image_bytes == lifecycle.slot.image_bytes
            and table.stripe_bytes == lifecycle.slot.stripe_bytes)


cdef bint of_base(Lifecycle* lifecycle, const TableIdentity* table) noexcept nogil:
    return (table.device == lifecycle.options.device and table.inode == lifecycle.options.inode)


cdef void cover_found(World* world) noexcept nogil:
    cdef Lifecycle* lifecycle = &world.engines.lifecycle
    cdef uint32_t row, column
    if not lifecycle.slot.flags & FLAG_OPEN:
        row = 0
    else:
        row = 1 if memcmp(lifecycle.slot.boot_id, lifecycle.options.boot_id, 16) == 0 else 2
    if lifecycle.found_state == TABLE_NONE:
        column = FOUND_NONE
    elif lifecycle.found_state == TABLE_LIVE:
        column = FOUND_LIVE
    elif lifecycle.found_state == TABLE_DAMAGED:
        column = FOUND_DAMAGED
    elif not of_base(lifecycle, &lifecycle.found):
        column = FOUND_COPY
    elif not of_generation(lifecycle, &lifecycle.found):
        column = FOUND_OTHER
    else:
        column = FOUND_LATCHED if lifecycle.found.latch != 0 else FOUND_VALID
    cover(world, AT_TABLE + row * 7 + column)
    column = 0
    if lifecycle.temporary_state == TABLE_FOUND:
        column = 1 if of_generation(lifecycle, &lifecycle.temporary) else 2
    elif lifecycle.temporary_state == TABLE_LIVE:
        column = 3
    cover(world, AT_TEMPORARY + row * 4 + column)


cdef void cover_lifecycle(World* world, const Event* event) noexcept nogil:
    cdef Lifecycle* lifecycle = &world.engines.lifecycle
    if world.coverage == NULL:
        return
    if event == NULL:
        if lifecycle.phase == PHASE_FAILED:
            cover(world, AT_REFUSAL + lifecycle.refusal)
        return
    cover(world, AT_PHASE + lifecycle.phase * 2 + (0 if event.result >= 0 else 1))
    if event.kind == EVENT_DONE and lifecycle.phase == PHASE_FIND_TABLE and event.result >= 0:
        cover_found(world)
