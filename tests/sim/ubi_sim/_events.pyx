"""Events in random order; see _events.pxd."""

from libc.stdint cimport uint16_t, uint32_t, uint8_t
from libc.string cimport memset

from ublk_ubi._core cimport (
    EVENT_ROUND, EVENT_TICK, OP_DISCARD, OP_FLUSH, OP_READ, OP_WRITE, OP_WRITE_ZEROES,
)
from ublk_ubi._hydrator cimport ROUND_IDLE, round_due
from ubi_sim._disk cimport disk_evict
from ubi_sim._io cimport io_land
from ubi_sim._machine cimport (
    machine_check_idle, machine_complete, machine_hydration, machine_hydrator_event,
    machine_lose_image, machine_request, machine_take_mail,
)
from ubi_sim._model cimport (
    BUG_LOST_DOORBELL, CELLS, HANG, MAX_DEPTH, MAX_IMAGE_STRIPES, MAX_IO, MAX_QUEUES, OWNER_NOBODY,
    WITH_HYDRATION, WITH_IMAGE_LOST, WITH_SYNC_FAULTS, WITH_WRITETHROUGH, WITH_ZEROING,
    GuestRequest, Mailbox, World, below, boundary, halted, has, here, one_in, violate,
)
from ubi_sim._oracle cimport oracle_may_write, oracle_sent
from ubi_sim._trace cimport trace_number, trace_text


# -- requests ------------------------------------------------------------------------------------

cdef uint32_t cells_of(const World* world, uint32_t hot) noexcept nogil:
    """Cells of a hot stripe: the device may end inside its last."""
    return world.geometry.last_cells if hot + 1 == world.geometry.hot_count else CELLS


cdef void stretch(World* world, GuestRequest* guest, uint32_t stripe) noexcept nogil:
    """From inside a stripe over those that follow it on the device, into the last of them."""
    cdef const uint32_t* hot = world.geometry.hot
    cdef uint32_t last = stripe
    guest.first += <uint16_t>below(world, guest.count)
    while (last + 1 < world.geometry.hot_count and hot[last + 1] == hot[last] + 1
            and not one_in(world, 4)):
        last += 1
    guest.count = <uint16_t>(last * CELLS + 1 + below(world, cells_of(world, last)))
    if guest.count <= guest.first:
        guest.count = <uint16_t>(guest.first + 1)
    guest.count -= guest.first


cdef void draw_request(World* world, GuestRequest* guest) noexcept nogil:
    """READ, WRITE, FLUSH and, where the world has them, DISCARD and WRITE_ZEROES."""
    cdef uint32_t choice = below(world, 16)
    cdef uint32_t zeroing = below(world, 12)
    cdef uint32_t stripe = below(world, world.geometry.hot_count)
    cdef uint32_t cells, shape
    memset(guest, 0, sizeof(GuestRequest))
    if choice < 3 or (choice < 7 and has(world, WITH_SYNC_FAULTS)):
        guest.op = OP_FLUSH
        return
    guest.op = OP_READ if choice < 8 else OP_WRITE
    if zeroing < 4 and has(world, WITH_ZEROING):
        guest.op = OP_DISCARD if zeroing & 1 else OP_WRITE_ZEROES
    guest.fua = ((guest.op == OP_WRITE or guest.op == OP_WRITE_ZEROES) and one_in(world, 4)
                 and not has(world, WITH_WRITETHROUGH))
    if one_in(world, 2):
        stripe = world.pace.focus
    cells = cells_of(world, stripe)
    shape = below(world, 6)
    guest.first = <uint16_t>(stripe * CELLS)
    guest.count = <uint16_t>cells
    guest.unmap = one_in(world, 2)
    if guest.op == OP_DISCARD and one_in(world, 2):
        stretch(world, guest, stripe)
        return
    if shape < 2:
        return
    # Ends of stripes more often than not.
    guest.count = <uint16_t>(1 + below(world, 3))
    if guest.count > cells:
        guest.count = <uint16_t>cells
    if shape == 2:
        guest.first += <uint16_t>below(world, cells - guest.count + 1)
    elif shape > 3:
        guest.first += <uint16_t>(cells - guest.count)


cdef bint send_request(World* world) noexcept nogil:
    """A request on a free tag, aimed at few cells; False when there is no tag or no legal one."""
    cdef uint16_t queue = <uint16_t>below(world, world.geometry.queues)
    cdef uint16_t tag = <uint16_t>below(world, world.geometry.depth)
    cdef GuestRequest* guest = &world.guests[queue][tag]
    cdef bint skipped
    if guest.busy:
        return False
    draw_request(world, guest)
    if (guest.op != OP_READ and guest.op != OP_FLUSH
            and not oracle_may_write(world, guest.first, guest.count)):
        return False
    skipped = world.requests_drawn < 64 and (world.skipped >> world.requests_drawn) & 1
    world.requests_drawn += 1
    world.requests_left -= 1
    if not skipped:
        oracle_sent(world, guest)
        machine_request(world, queue, tag)
    return True


cdef void reissue_all(World* world) noexcept nogil:
    cdef uint16_t queue, tag
    for queue in range(MAX_QUEUES):
        for tag in range(MAX_DEPTH):
            if world.guests[queue][tag].busy and not halted(world):
                if world.trace != NULL:
                    trace_text(world, b"the kernel sends again:")
                machine_request(world, queue, tag)


# -- completions, mail, time ---------------------------------------------------------------------

cdef int pick_io(World* world) noexcept nogil:
    """A random I/O in flight, or −1."""
    cdef int chosen = -1
    cdef int i, seen = 0
    for i in range(MAX_IO):
        if world.io[i].busy:
            seen += 1
            if one_in(world, seen):
                chosen = i
    return chosen


cdef bint complete_some(World* world) noexcept nogil:
    """End a random I/O in flight, or let it land."""
    cdef int chosen = pick_io(world)
    cdef int _attempt
    for _attempt in range(3):
        if chosen >= 0 and (world.io[chosen].action.kind == world.pace.slow
                            or world.io[chosen].owner == OWNER_NOBODY):
            chosen = pick_io(world)
    if chosen < 0:
        return False
    if one_in(world, 6):
        io_land(world, chosen)
    else:
        machine_complete(world, chosen)
    return True


cdef bint take_some_mail(World* world) noexcept nogil:
    cdef int start = <int>below(world, 4)
    cdef int i
    for i in range(4):
        if machine_take_mail(world, (start + i) & 3):
            return True
    return False


cdef bint begin_round(World* world) noexcept nogil:
    """The round that is due, if one is: its thread may wait for more joiners, but not for ever."""
    if not round_due(&world.engines.hydrator):
        return False
    if world.trace != NULL:
        trace_text(world, b"the round that is due may begin")
    machine_hydrator_event(world, EVENT_ROUND)
    return True


cdef inline void look(Mailbox* box) noexcept nogil:
    box.rung = box.head != box.tail


cdef void tick(World* world) noexcept nogil:
    """The hydrator's second passes; whoever waits looks into its mailbox."""
    cdef int queue
    if world.trace != NULL:
        trace_text(world, b"a second passes")
    machine_hydrator_event(world, EVENT_TICK)
    if world.bug == BUG_LOST_DOORBELL or halted(world):
        return
    for queue in range(MAX_QUEUES):
        look(&world.to_hydrator[queue])
        look(&world.to_queue[queue])


# -- one after the other -------------------------------------------------------------------------

cdef bint time_passes(World* world) noexcept nogil:
    """Mail whose doorbell was lost, the tick's commit: is there still something to come?"""
    cdef int _attempt
    for _attempt in range(2):
        tick(world)
        if halted(world):
            return False
        if complete_some(world) or take_some_mail(world):
            return True
    return False


cdef bint send_some(World* world) noexcept nogil:
    cdef int _attempt
    for _attempt in range(16):
        if send_request(world):
            return True
    return False


cdef inline bint may_lose_image(World* world) noexcept nogil:
    """As long as the daemon has it open."""
    return (has(world, WITH_IMAGE_LOST) and not world.quiet and not world.image_changed
            and not world.engines.hydrated)


cdef bint rare_event(World* world) noexcept nogil:
    if one_in(world, 2):
        tick(world)
        return True
    if may_lose_image(world) and one_in(world, 3):
        if world.trace != NULL:
            trace_text(world, b"the image changes")
        machine_lose_image(world)
        return True
    if has(world, WITH_HYDRATION) and not world.quiet and world.engines.live:
        if world.trace != NULL:
            trace_text(world, b"background hydration is told to go on, or to pause")
        machine_hydration(world, not one_in(world, 4), below(world, 4))
        return True
    if not world.oracle.sync_failed:
        return False
    if world.trace != NULL:
        trace_text(world, b"dropped pages leave the cache")
    disk_evict(world)
    return True


cdef bint stands_still(World* world) noexcept nogil:
    if world.stalled > 0:
        world.stalled -= 1
        return True
    if world.pace.stalls and one_in(world, 24):
        world.stalled = <uint8_t>(8 + below(world, 24))
    return False


cdef uint32_t rarity(World* world) noexcept nogil:
    """A tick or the like in so many events; more often where an fdatasync has failed in a round."""
    if not has(world, WITH_SYNC_FAULTS):
        return 24
    return 3 if here(world).table.latch and world.engines.hydrator.round != ROUND_IDLE else 12


cdef bint any_event(World* world, bint requests) noexcept nogil:
    cdef uint32_t choice
    boundary(world)
    if halted(world):
        return False
    world.steps += 1
    if world.budget == 0:
        violate(world, HANG, world.steps, 0, 0, 0)
        return False
    world.budget -= 1
    if one_in(world, rarity(world)) and rare_event(world):
        return not halted(world)
    if here(world).table.latch and one_in(world, 2) and take_some_mail(world):
        # What was sent before that meets the running round.
        return not halted(world)
    if one_in(world, 2) and begin_round(world):
        return not halted(world)
    choice = below(world, world.pace.mail + world.pace.io + world.pace.request)
    requests = requests and world.requests_left > 0
    if stands_still(world) and ((requests and send_request(world)) or take_some_mail(world)):
        return not halted(world)
    if choice >= world.pace.mail + world.pace.io and requests and send_request(world):
        return not halted(world)
    if choice < world.pace.mail and take_some_mail(world):
        return not halted(world)
    if (complete_some(world) or take_some_mail(world) or begin_round(world)
            or (requests and send_some(world))):
        return not halted(world)
    return time_passes(world) and not halted(world)


cdef bint requests_open(const World* world) noexcept nogil:
    cdef int queue, tag
    for queue in range(MAX_QUEUES):
        for tag in range(MAX_DEPTH):
            if world.guests[queue][tag].busy:
                return True
    return False


cdef void serve(World* world) noexcept nogil:
    while world.requests_left > 0 and any_event(world, True):
        pass


cdef void answer_all(World* world) noexcept nogil:
    while requests_open(world) and any_event(world, False):
        pass
    if not halted(world) and requests_open(world):
        violate(world, HANG, 0, 0, 0, 0)


cdef void settle(World* world) noexcept nogil:
    answer_all(world)
    world.quiet = 1
    if has(world, WITH_HYDRATION) and not halted(world):
        machine_hydration(world, True, 2 * MAX_IMAGE_STRIPES)
    while any_event(world, False):
        pass
    if halted(world):
        return
    machine_check_idle(world)
    if (has(world, WITH_HYDRATION) and not world.engines.hydrated
            and not here(world).table.latch and not world.image_changed):
        # Told to go on, without errors, with all the budget: it must have come to its end.
        violate(world, HANG, 2, 0, 0, 0)


cdef void write_all(World* world) noexcept nogil:
    """A cell of every stripe: whatever has failed before, each can be written."""
    cdef GuestRequest* guest = &world.guests[0][0]
    cdef uint16_t i
    if world.trace != NULL:
        trace_number(world, b"a cell of all %llu stripes is written", world.geometry.hot_count)
    for i in range(world.geometry.hot_count):
        if halted(world) or guest.busy:
            return
        memset(guest, 0, sizeof(GuestRequest))
        guest.op = OP_WRITE
        guest.first = <uint16_t>(i * CELLS)
        guest.count = 1
        oracle_sent(world, guest)
        machine_request(world, 0, 0)
        answer_all(world)


cdef void read_all(World* world) noexcept nogil:
    cdef GuestRequest* guest = &world.guests[0][0]
    cdef int _pass
    cdef uint16_t i
    if world.trace != NULL:
        trace_number(world, b"all %llu stripes are read, twice", world.geometry.hot_count)
    for _pass in range(2):
        for i in range(world.geometry.hot_count):
            if halted(world) or guest.busy:
                return
            memset(guest, 0, sizeof(GuestRequest))
            guest.op = OP_READ
            guest.first = <uint16_t>(i * CELLS)
            guest.count = <uint16_t>cells_of(world, i)
            oracle_sent(world, guest)
            machine_request(world, 0, 0)
            answer_all(world)
