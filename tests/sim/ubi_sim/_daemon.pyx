"""Opening, growing, stopping, killing; see _daemon.pxd."""

from libc.errno cimport EIO
from libc.stdint cimport int32_t, uint16_t, uint32_t, uint64_t, uint8_t
from libc.string cimport memset

from ublk_ubi._core cimport (
    ACT_DISCARD_BASE, ACT_HOST, ACT_SYNC_BASE, ACT_WRITE_BASE, ACT_ZERO_BASE, EVENT_DONE,
    EVENT_GROW, EVENT_START, EVENT_STOP, MEM_PAGE, MEM_REQUEST, MEM_STRIPE, Action, Actions, Event,
)
from ublk_ubi._lifecycle cimport (
    PHASE_CLOSED, PHASE_FAILED, PHASE_GROW_LATCH, PHASE_OPEN, REFUSE_DAMAGED, REFUSE_FOREIGN,
    REFUSE_IO, REFUSE_NOTHING, LifecycleOptions, lifecycle_init, lifecycle_step,
)
from ubi_sim._coverage cimport cover_lifecycle
from ubi_sim._disk cimport disk_evict, disk_forget, disk_land, disk_synced
from ubi_sim._events cimport any_event
from ubi_sim._host cimport expected_refusal, host_call, host_options
from ubi_sim._io cimport host_fault, io_attempt, io_land_discard, io_submit
from ubi_sim._machine cimport machine_boot, machine_hydrator_event, machine_start_engines
from ubi_sim._model cimport (
    BUG_CLOSE_EARLY, BUG_NO_FENCE_GUEST, BUG_NO_FENCE_PAGE, BUG_NO_FENCE_STRIPE, CELL_BYTES, HANG,
    MAX_IO, NOT_KEPT, NOT_REFUSED, NOT_STARTED, OWNER_LIFECYCLE, OWNER_NOBODY, REFUSED, WHOLE, Io,
    World, below, boundary, halted, here, next_random, violate,
)
from ubi_sim._oracle cimport oracle_clean_stop, oracle_fault, oracle_power_loss
from ubi_sim._trace cimport trace_host, trace_number, trace_text


# -- the lifecycle engine ------------------------------------------------------------------------

cdef int32_t call_host(World* world, uint8_t call) noexcept nogil:
    """The host's answer; a call that fails has done nothing. A table that is mapped is memory."""
    cdef bint sure = world.engines.lifecycle.phase == PHASE_GROW_LATCH
    cdef int32_t fault = 0 if sure else host_fault(world)
    if world.trace != NULL:
        trace_host(world, call)
    if fault < 0:
        oracle_fault(world)
        return fault
    return host_call(world, call)


cdef void run_lifecycle(World* world, uint8_t kind, uint64_t size=0) noexcept nogil:
    """Step the engine to its end, or until a crash; each action is followed by a boundary."""
    cdef Action action
    cdef Actions actions
    cdef Event event
    cdef int index
    memset(&event, 0, sizeof(event))
    event.kind = kind
    event.offset = size
    actions.items = &action
    actions.capacity = 1
    while True:
        actions.count = 0
        world.steps += 1
        cover_lifecycle(world, &event)
        lifecycle_step(&world.engines.lifecycle, &event, &actions)
        if actions.count == 0:
            cover_lifecycle(world, NULL)
            return
        memset(&event, 0, sizeof(event))
        event.kind = EVENT_DONE
        if action.kind == ACT_HOST:
            event.result = call_host(world, action.message)
        else:
            index = io_submit(world, OWNER_LIFECYCLE, &action)
            boundary(world)
            if halted(world):
                return
            while not io_attempt(world, index, &event.result):
                boundary(world)
                if halted(world):
                    return
            if kind == EVENT_GROW and action.kind == ACT_SYNC_BASE and here(world).table.latch:
                event.result = -EIO
        boundary(world)
        if halted(world):
            return


cdef void daemon_open(World* world, const LifecycleOptions* options) noexcept nogil:
    machine_boot(world)
    lifecycle_init(&world.engines.lifecycle, options, world.engines.pages, world.scratch)
    run_lifecycle(world, EVENT_START)


# -- opening -------------------------------------------------------------------------------------

cdef bint start_hydrator(World* world) noexcept nogil:
    """Engines on what was found, until the device is live. False: halted, or it failed."""
    machine_start_engines(world)
    machine_hydrator_event(world, EVENT_START)
    while not world.engines.live:
        if halted(world) or not any_event(world, False):
            break
    if halted(world):
        return False
    if not world.engines.live:
        violate(world, NOT_STARTED, 0, 0, 0, 0)
    return not halted(world) and world.engines.start_result >= 0


cdef void operator_accepts(World* world) noexcept nogil:
    """What he is told may be lost is lost: as after a power loss. Dropped pages are evicted."""
    disk_evict(world)
    oracle_power_loss(world)


cdef bint try_open(World* world, bint format_, bint force_stale) noexcept nogil:
    """One attempt: True if the device is live. Else: why, in lifecycle.refusal or start_result."""
    cdef LifecycleOptions options
    host_options(world, &options)
    options.format = options.format or format_
    options.force_stale = force_stale
    if world.trace != NULL:
        trace_number(world, b"a daemon opens the base on host %llu", world.host)
    daemon_open(world, &options)
    if halted(world) or world.engines.lifecycle.phase != PHASE_OPEN:
        return False
    return start_hydrator(world)


cdef bint failed_for_error(World* world, uint64_t began) noexcept nogil:
    """An opening came to nothing: because an error was injected into it? Then errors stop."""
    if world.engines.lifecycle.phase == PHASE_FAILED and (
            world.engines.lifecycle.refusal > REFUSE_IO):
        return False
    if world.oracle.fault_clock < began and not world.image_changed:
        violate(world, REFUSED, world.engines.lifecycle.refusal, world.engines.lifecycle.phase,
                <uint8_t>-world.engines.start_result, 0)
        return False
    if world.trace != NULL:
        trace_text(world, b"opening failed for an injected error; errors stop, and again")
    daemon_killed(world)
    world.quiet = 1
    return True


cdef void check_refusal(World* world, uint8_t expected, uint64_t landed) noexcept nogil:
    """The right one, and nothing was written."""
    if world.engines.lifecycle.refusal != expected:
        violate(world, REFUSED, world.engines.lifecycle.refusal, expected, 0, 0)
    elif world.disk.landed != landed:
        violate(world, NOT_KEPT, expected, 0, 0, 0)


cdef bint up_without_quiet(World* world) noexcept nogil:
    """Attempts until it is live. A refusal that is right is forced the next time."""
    cdef uint8_t expected, forced = REFUSE_NOTHING
    cdef uint64_t landed, began
    cdef bint live
    cdef int _attempt
    for _attempt in range(4):
        if world.accepted:
            operator_accepts(world)
            world.accepted = 0
        expected = expected_refusal(world)
        landed = world.disk.landed
        world.oracle.clock += 1
        began = world.oracle.clock
        live = try_open(world, forced == REFUSE_FOREIGN,
                        forced != REFUSE_NOTHING and forced != REFUSE_FOREIGN)
        if halted(world):
            return False
        if live:
            if expected != forced:
                violate(world, NOT_REFUSED, expected, forced, 0, 0)
            return not halted(world)
        if failed_for_error(world, began) or halted(world):
            # What has failed may ask for a refusal of its own.
            forced = REFUSE_NOTHING
            continue
        check_refusal(world, expected, landed)
        if halted(world):
            return False
        if world.trace != NULL:
            trace_number(world, b"refused (%llu) as it must be", expected)
        if expected == REFUSE_DAMAGED:
            # A disk of bdev_ubi's whose adoption was torn is left to its owner.
            world.over = 1
            return False
        if expected != REFUSE_FOREIGN:
            operator_accepts(world)
        forced = expected
    violate(world, REFUSED, world.engines.lifecycle.refusal, forced, 200, 0)
    return False


cdef bint daemon_up(World* world) noexcept nogil:
    cdef uint8_t quiet = world.quiet
    if not up_without_quiet(world):
        return False
    world.quiet = quiet
    here(world).wiped = 0
    world.served = 1
    return True


# -- growing -------------------------------------------------------------------------------------

cdef void daemon_grow(World* world) noexcept nogil:
    """Who is told that it has, is told the truth; who is not, may find it grown or not."""
    cdef uint64_t began
    if halted(world) or here(world).table.latch:
        return
    if world.trace != NULL:
        trace_text(world, b"the disk grows")
    world.oracle.clock += 1
    began = world.oracle.clock
    world.grown_at_most += CELL_BYTES
    run_lifecycle(world, EVENT_GROW, world.grown_at_most)
    if halted(world):
        return
    world.accepted = 0
    if world.engines.lifecycle.errno_ == 0:
        world.grown = world.grown_at_most
    elif world.oracle.fault_clock < began and not here(world).table.latch:
        violate(world, REFUSED, world.engines.lifecycle.phase, 400, 0, 0)


# -- stopping ------------------------------------------------------------------------------------

cdef bint commit(World* world) noexcept nogil:
    """The hydrator's part of a stop. False: halted, or it could not."""
    cdef uint64_t began
    world.oracle.clock += 1
    began = world.oracle.clock
    machine_hydrator_event(world, EVENT_STOP)
    while not world.engines.stopped:
        if halted(world) or not any_event(world, False):
            break
    if halted(world):
        return False
    if not world.engines.stopped:
        violate(world, HANG, 1, 0, 0, 0)
        return False
    if world.engines.stop_result >= 0:
        return True
    if world.oracle.fault_clock < began and not here(world).table.latch:
        violate(world, NOT_STARTED, 1, <uint8_t>-world.engines.stop_result, 0, 0)
    return False


cdef bint close_base(World* world) noexcept nogil:
    cdef uint64_t began
    world.oracle.clock += 1
    began = world.oracle.clock
    run_lifecycle(world, EVENT_STOP)
    if halted(world):
        return False
    if world.engines.lifecycle.phase == PHASE_CLOSED:
        return True
    if world.oracle.fault_clock < began:
        violate(world, REFUSED, world.engines.lifecycle.phase, 300, 0, 0)
    return False


cdef bint daemon_stop(World* world) noexcept nogil:
    cdef bint closed
    if world.trace != NULL:
        trace_text(world, b"the daemon is told to stop")
    if world.bug == BUG_CLOSE_EARLY:
        closed = close_base(world) and commit(world)
    else:
        closed = commit(world) and close_base(world)
    if closed:
        oracle_clean_stop(world)
    return closed


# -- the end of a process ------------------------------------------------------------------------

cdef bint fenced(const World* world, const Io* io) noexcept nogil:
    """The next daemon waits for this write."""
    if io.action.memory == MEM_STRIPE:
        return world.bug != BUG_NO_FENCE_STRIPE
    if io.action.memory == MEM_REQUEST:
        return world.bug != BUG_NO_FENCE_GUEST
    return io.action.memory != MEM_PAGE or world.bug != BUG_NO_FENCE_PAGE


cdef void end_in_flight(World* world, Io* io) noexcept nogil:
    """A killed daemon's write lands as a whole, in part, or never; its fdatasync helps, or not."""
    cdef uint32_t choice = below(world, 5)
    cdef uint16_t mask = <uint16_t>next_random(world)
    if io.action.kind == ACT_SYNC_BASE and choice & 1:
        disk_synced(world, io.sync_order)
    if io.action.kind == ACT_DISCARD_BASE and not io.landed and choice & 1:
        io_land_discard(world, &io.action)
    if (io.action.kind == ACT_WRITE_BASE or io.action.kind == ACT_ZERO_BASE) and not io.landed:
        if not fenced(world, io):
            io.owner = OWNER_NOBODY
            return
        if choice == 0:
            disk_forget(world, io.log)
        else:
            disk_land(world, io.log, mask if choice == 1 else WHOLE)
    io.busy = 0


cdef void daemon_killed(World* world) noexcept nogil:
    cdef int start = <int>below(world, MAX_IO)
    cdef int i
    cdef Io* io
    for i in range(MAX_IO):
        io = &world.io[(start + i) % MAX_IO]
        if io.busy and io.owner != OWNER_NOBODY:
            end_in_flight(world, io)
