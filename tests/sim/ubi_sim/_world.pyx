"""See _world.pxd."""

from libc.errno cimport EIO, ENOSPC
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdio cimport printf
from libc.string cimport memcpy, memset

from ublk_ubi._atomic cimport ensure
from ublk_ubi._core cimport (
    ACT_HOST, ACT_SYNC_BASE, ACT_WRITE_BASE, Action, Actions, EVENT_DONE, EVENT_START, EVENT_STOP,
    EVENT_TICK, Event, OP_FLUSH, OP_READ, OP_WRITE,
)
from ublk_ubi._lifecycle cimport (
    HOST_DROP_TABLE, HOST_FIND_TABLE, HOST_MAKE_TABLE, HOST_MAP_TABLE, HOST_PUBLISH_TABLE,
    HOST_UNLINK_TABLE, HOST_ZERO_TAIL, PHASE_CLOSED, PHASE_FAILED, PHASE_OPEN, REFUSE_LATCHED,
    SCRATCH_BYTES, TABLE_FOUND, TABLE_NONE, LifecycleOptions, lifecycle_init, lifecycle_step,
)
from ubi_sim._disk cimport (
    disk_evict, disk_forget, disk_hash, disk_land, disk_pending, disk_power_loss, disk_synced,
)
from ubi_sim._machine cimport (
    machine_boot, machine_check_idle, machine_complete, machine_hydrator_event, machine_request,
    machine_start_engines, machine_submit, machine_take_mail,
)
from ubi_sim._model cimport (
    BUG_LATCH_FORGOTTEN, BUG_LOST_DOORBELL, BUG_NO_FENCE, BUG_TABLE_FORGOTTEN, CELLS, CELL_BYTES,
    CRASH_POWER, CRASH_PROCESS, FINE, HANG, HOT, HOT_CELLS, MAX_DEPTH, MAX_IO, MAX_LOG, MAX_QUEUES,
    META_BYTES, NOT_REFUSED, NOT_STARTED, OWNER_HYDRATOR, OWNER_LIFECYCLE, OWNER_NOBODY, REFUSED,
    STALE_VALUE, STRIPE_BYTES, Geometry, GuestRequest, Io, Mailbox, Table, World, below,
    next_random, one_in, violate,
)
from ubi_sim._oracle cimport (
    oracle_clean_stop, oracle_init, oracle_may_write, oracle_power_loss, oracle_process_crash,
    oracle_sent,
)


# -- making a world ------------------------------------------------------------------------------

cdef void make_geometry(World* world, bint small) noexcept nogil:
    """Few stripes, among them the image's last, the first behind it, and page borders."""
    cdef Geometry* g = &world.geometry
    cdef uint32_t i, behind
    g.queues = 1 if small else <uint16_t>(1 + below(world, 2))
    g.depth = <uint16_t>(2 + below(world, 3))
    g.buffers = <uint16_t>(2 + below(world, 2))
    g.copy_on_read = next_random(world) & 1
    g.stale_base = next_random(world) & 1
    if not small and one_in(world, 5):
        # Headers 2040 and 2041 are on different pages.
        g.image_stripes = 2041 + below(world, 3)
        g.hot[0] = 0
        g.hot[1] = 2039
        g.hot_count = 2
        for i in range(2040, g.image_stripes):
            g.hot[g.hot_count] = i
            g.hot_count += 1
    else:
        g.image_stripes = 1 + below(world, 3 if small else 5)
        g.hot_count = 0
        for i in range(g.image_stripes):
            g.hot[g.hot_count] = i
            g.hot_count += 1
    behind = below(world, 3 if g.hot_count < HOT - 1 else 2)
    g.device_stripes = g.image_stripes + behind
    for i in range(g.image_stripes, g.device_stripes):
        g.hot[g.hot_count] = i
        g.hot_count += 1
    g.image_bytes = <uint64_t>g.image_stripes * STRIPE_BYTES
    if next_random(world) & 1:
        # Ends inside its last stripe, maybe inside a sector.
        g.image_bytes -= 1 + below(world, STRIPE_BYTES - 2)


cdef void make_disk(World* world) noexcept nogil:
    cdef uint32_t cell
    memset(&world.disk, 0, sizeof(world.disk))
    if not world.geometry.stale_base:
        return
    for cell in range(HOT_CELLS):
        world.disk.cache[cell] = world.disk.durable[cell] = STALE_VALUE | cell
    memset(world.disk.meta_cache, 0x5a, META_BYTES)
    memset(world.disk.meta_durable, 0x5a, META_BYTES)
    memset(world.disk.chunk_cache, 1, 8)
    memset(world.disk.chunk_durable, 1, 8)


cdef void make_world(Explorer* explorer, uint64_t seed) noexcept nogil:
    cdef World* world = explorer.world
    memset(world, 0, sizeof(World))
    world.random = seed * <uint64_t>0x9e3779b97f4a7c15 + 1
    world.scratch = explorer.scratch
    world.boot = 1
    world.bug = explorer.plan.bug
    make_geometry(world, explorer.plan.small)
    make_disk(world)
    oracle_init(world)
    world.requests_left = explorer.plan.requests
    world.faults.one_in = explorer.plan.fault_one_in
    world.faults.syncs = explorer.plan.syncs_fail
    world.faults.nth = explorer.plan.nth
    world.faults.nth_kind = explorer.plan.nth_kind
    world.faults.nth_for_good = explorer.plan.nth_for_good
    world.faults.nth_errno = explorer.plan.nth_errno


cdef int32_t fault_for(World* world, const Action* action) noexcept nogil:
    """-errno if this I/O is to fail."""
    if world.quiet:
        return 0
    if action.kind == world.faults.nth_kind:
        world.faults.nth_seen += 1
        if world.faults.nth and (world.faults.nth_seen == world.faults.nth or (
                world.faults.nth_for_good and world.faults.nth_seen > world.faults.nth)):
            return -world.faults.nth_errno
    if world.faults.one_in and one_in(world, world.faults.one_in):
        if action.kind != ACT_SYNC_BASE:
            return -EIO if next_random(world) & 1 else -ENOSPC
        if world.faults.syncs:
            return -EIO
    return 0


# -- opening and closing -------------------------------------------------------------------------

cdef void host_call(World* world, uint8_t call) noexcept nogil:
    """As ublk_ubi.table.TableHost does it."""
    cdef uint32_t cell
    if call == HOST_FIND_TABLE:
        world.engines.lifecycle.found_state = TABLE_NONE
        world.engines.lifecycle.temporary_state = TABLE_NONE
        if world.table.there and world.bug != BUG_TABLE_FORGOTTEN:
            world.engines.lifecycle.found_state = TABLE_FOUND
            world.engines.lifecycle.found = world.table.identity
            world.engines.lifecycle.found.latch = world.table.latch
            if world.bug == BUG_LATCH_FORGOTTEN:
                world.engines.lifecycle.found.latch = world.table.latch = 0
        if world.temporary.there:
            world.engines.lifecycle.temporary_state = TABLE_FOUND
            world.engines.lifecycle.temporary = world.temporary.identity
    elif call == HOST_DROP_TABLE or call == HOST_UNLINK_TABLE:
        world.table.there = 0
        world.temporary.there = 0
    elif call == HOST_MAKE_TABLE:
        memset(&world.temporary, 0, sizeof(Table))
        world.temporary.there = 1
        world.temporary.identity = world.engines.lifecycle.identity
        world.engines.lifecycle.table = world.temporary.rows
    elif call == HOST_MAP_TABLE:
        world.engines.lifecycle.table = world.table.rows
    elif call == HOST_PUBLISH_TABLE:
        world.table = world.temporary
        world.temporary.there = 0
        world.engines.lifecycle.table = world.table.rows
    elif call == HOST_ZERO_TAIL:
        for cell in range(HOT_CELLS):
            if world.geometry.hot[cell // CELLS] >= world.geometry.image_stripes:
                world.disk.cache[cell] = world.disk.durable[cell] = 0


cdef void run_lifecycle(Explorer* explorer, uint8_t kind, bint crash) noexcept nogil:
    """Step the lifecycle engine to its end; `crash`: every action is a boundary."""
    cdef World* world = explorer.world
    cdef Action action
    cdef Actions actions
    cdef Event event
    cdef int index
    memset(&event, 0, sizeof(event))
    event.kind = kind
    actions.items = &action
    actions.capacity = 1
    while True:
        actions.count = 0
        world.steps += 1
        lifecycle_step(&world.engines.lifecycle, &event, &actions)
        if actions.count == 0:
            return
        memset(&event, 0, sizeof(event))
        event.kind = EVENT_DONE
        if action.kind == ACT_HOST:
            host_call(world, action.message)
        else:
            index = machine_submit(world, OWNER_LIFECYCLE, &action)
            if crash:
                boundary(explorer)
            if world.violation != FINE:
                return
            event.result = machine_complete(world, index, fault_for(world, &action))
        if crash:
            boundary(explorer)
        if world.violation != FINE:
            return


cdef void lifecycle_options(World* world, bint format_, bint force_stale,
                            LifecycleOptions* options) noexcept nogil:
    memset(options, 0, sizeof(LifecycleOptions))
    options.base_bytes = (8 << 20) + <uint64_t>world.geometry.device_stripes * STRIPE_BYTES
    options.image_bytes = world.geometry.image_bytes
    options.device = 1
    options.inode = 2
    memset(options.fingerprint, 0xf1, 32)
    memset(options.new_uuid, 0x11, 16)
    memset(options.boot_id, <int>world.boot, 16)
    options.stripe_bytes = 0
    options.default_stripe_bytes = STRIPE_BYTES
    options.format = format_
    options.force_stale = force_stale


cdef bint open_base(Explorer* explorer, bint format_, bint crash) noexcept nogil:
    """Boot a daemon on what is there and bring it up. False when it may not, or must not, come up."""
    cdef World* world = explorer.world
    cdef LifecycleOptions options
    cdef Event event
    cdef bint failed_before = world.oracle.sync_failed
    machine_boot(world)
    world.reopened += 1
    lifecycle_options(world, format_, False, &options)
    lifecycle_init(&world.engines.lifecycle, &options, world.engines.pages, world.scratch)
    run_lifecycle(explorer, EVENT_START, crash)
    if world.violation != FINE:
        return False
    if world.engines.lifecycle.phase == PHASE_OPEN and failed_before:
        violate(world, NOT_REFUSED, world.engines.lifecycle.found.latch, 0, 0, 0)
    if (world.engines.lifecycle.phase == PHASE_FAILED and failed_before
            and world.engines.lifecycle.refusal == REFUSE_LATCHED):
        # The operator accepts it: as after a power loss, the cache apart.
        disk_evict(world)
        oracle_power_loss(world)
        machine_boot(world)
        lifecycle_options(world, False, True, &options)
        lifecycle_init(&world.engines.lifecycle, &options, world.engines.pages, world.scratch)
        run_lifecycle(explorer, EVENT_START, False)
    if world.engines.lifecycle.phase != PHASE_OPEN:
        # With an I/O error it may refuse; without it may not.
        if not world.oracle.fault_seen:
            violate(world, REFUSED, world.engines.lifecycle.refusal,
                    world.engines.lifecycle.errno_, 0, 0)
        return False
    machine_start_engines(world)
    memset(&event, 0, sizeof(event))
    event.kind = EVENT_START
    machine_hydrator_event(world, &event)
    while not world.engines.started and world.violation == FINE:
        if crash:
            boundary(explorer)
        if world.violation != FINE or not any_event(explorer, False):
            break
    if not world.engines.started or world.engines.stop_result < 0:
        if not world.oracle.fault_seen:
            violate(world, NOT_STARTED, world.engines.started, <uint32_t>-world.engines.stop_result,
                    0, 0)
        return False
    return True


# -- events --------------------------------------------------------------------------------------

cdef bint send_request(World* world) noexcept nogil:
    """A request on a free tag, aimed at few cells; False when there is no tag or no legal one."""
    cdef uint16_t queue = <uint16_t>below(world, world.geometry.queues)
    cdef uint16_t tag = <uint16_t>below(world, world.geometry.depth)
    cdef GuestRequest* guest = &world.guests[queue][tag]
    cdef uint32_t choice = below(world, 16)
    cdef uint32_t stripe
    if guest.busy:
        return False
    memset(guest, 0, sizeof(GuestRequest))
    stripe = below(world, world.geometry.hot_count)
    if choice < 3:
        guest.op = OP_FLUSH
        oracle_sent(world, guest)
        machine_request(world, queue, tag)
        return True
    guest.op = OP_READ if choice < 7 else OP_WRITE
    guest.fua = guest.op == OP_WRITE and one_in(world, 4)
    if one_in(world, 3):
        guest.first = <uint16_t>(stripe * CELLS)
        guest.count = CELLS
    else:
        # Borders of stripes more often than not.
        guest.count = <uint16_t>(1 + below(world, 3))
        guest.first = <uint16_t>(stripe * CELLS + (
            below(world, CELLS - guest.count + 1) if one_in(world, 2)
            else (0 if one_in(world, 2) else CELLS - guest.count)))
    if guest.op == OP_WRITE and not oracle_may_write(world, guest.first, guest.count):
        return False
    oracle_sent(world, guest)
    machine_request(world, queue, tag)
    return True


cdef bint complete_some(World* world) noexcept nogil:
    """End a random I/O in flight."""
    cdef int chosen = -1
    cdef int i, seen = 0
    for i in range(MAX_IO):
        if world.io[i].busy:
            seen += 1
            if one_in(world, seen):
                chosen = i
    if chosen < 0:
        return False
    if world.io[chosen].owner == OWNER_NOBODY:
        machine_complete(world, chosen, 0)
    else:
        machine_complete(world, chosen, fault_for(world, &world.io[chosen].action))
    return True


cdef bint take_some_mail(World* world) noexcept nogil:
    cdef int start = <int>below(world, 4)
    cdef int i
    for i in range(4):
        if machine_take_mail(world, (start + i) & 3):
            return True
    return False


cdef void tick(World* world) noexcept nogil:
    """The hydrator's second passes; whoever waits looks into its mailbox."""
    cdef Event event
    cdef int queue
    memset(&event, 0, sizeof(event))
    event.kind = EVENT_TICK
    machine_hydrator_event(world, &event)
    if world.bug == BUG_LOST_DOORBELL:
        return
    for queue in range(MAX_QUEUES):
        world.to_hydrator[queue].rung = world.to_hydrator[queue].head != world.to_hydrator[queue].tail
        world.to_queue[queue].rung = world.to_queue[queue].head != world.to_queue[queue].tail


cdef bint any_event(Explorer* explorer, bint requests) noexcept nogil:
    """One thing happens; False if nothing could any more."""
    cdef World* world = explorer.world
    cdef uint32_t choice = below(world, 16)
    cdef int attempt
    world.steps += 1
    explorer.events += 1
    if world.steps > explorer.plan.steps:
        violate(world, HANG, world.steps, 0, 0, 0)
        return False
    if requests and world.requests_left > 0 and choice < 5:
        if send_request(world):
            world.requests_left -= 1
            return True
    if choice < 9 and take_some_mail(world):
        return True
    if choice == 15 and one_in(world, 3):
        tick(world)
        return True
    if choice == 14 and world.oracle.sync_failed and one_in(world, 4):
        disk_evict(world)
        return True
    if complete_some(world) or take_some_mail(world):
        return True
    if requests and world.requests_left > 0:
        for attempt in range(16):
            if send_request(world):
                world.requests_left -= 1
                return True
    # Only time is left to pass: mail whose doorbell was lost, the tick's commit.
    for attempt in range(2):
        tick(world)
        if complete_some(world) or take_some_mail(world):
            return True
    return False


cdef bint requests_open(World* world) noexcept nogil:
    cdef int queue, tag
    for queue in range(MAX_QUEUES):
        for tag in range(MAX_DEPTH):
            if world.guests[queue][tag].busy:
                return True
    return False


cdef void settle(Explorer* explorer, bint crash) noexcept nogil:
    """No more requests: everything that was sent is answered, and nothing is left of it."""
    cdef World* world = explorer.world
    while world.violation == FINE:
        if crash:
            boundary(explorer)
        if world.violation != FINE or not any_event(explorer, False):
            break
    if world.violation == FINE and requests_open(world):
        violate(world, HANG, 0, 0, 0, 0)
    if world.violation == FINE:
        machine_check_idle(world)


cdef void read_all(Explorer* explorer) noexcept nogil:
    """Every hot stripe, through the engine; twice, as the first pass may hydrate it."""
    cdef World* world = explorer.world
    cdef GuestRequest* guest
    cdef int pass_
    cdef uint16_t i
    for pass_ in range(2):
        for i in range(world.geometry.hot_count):
            if world.violation != FINE or world.guests[0][0].busy:
                return
            guest = &world.guests[0][0]
            memset(guest, 0, sizeof(GuestRequest))
            guest.op = OP_READ
            guest.first = <uint16_t>(i * CELLS)
            guest.count = CELLS
            oracle_sent(world, guest)
            machine_request(world, 0, 0)
            settle(explorer, False)


cdef bint stop(Explorer* explorer, bint crash) noexcept nogil:
    """A clean stop: commit, close. True if the base is closed."""
    cdef World* world = explorer.world
    cdef Event event
    memset(&event, 0, sizeof(event))
    event.kind = EVENT_STOP
    machine_hydrator_event(world, &event)
    while not world.engines.stopped and world.violation == FINE:
        if crash:
            boundary(explorer)
        if world.violation != FINE or not any_event(explorer, False):
            break
    if world.violation == FINE and not world.engines.stopped:
        violate(world, HANG, 1, 0, 0, 0)
    if world.violation != FINE or world.engines.stop_result < 0:
        return False
    run_lifecycle(explorer, EVENT_STOP, crash)
    if world.violation != FINE:
        return False
    if world.engines.lifecycle.phase != PHASE_CLOSED:
        if not world.oracle.fault_seen:
            violate(world, REFUSED, 100, 0, 0, 0)
        return False
    oracle_clean_stop(world)
    return True


# -- crashes -------------------------------------------------------------------------------------

cdef void remember(Explorer* explorer) noexcept nogil:
    """Count a durable state once."""
    cdef uint64_t hash_ = disk_hash(explorer.world) | 1
    cdef uint64_t at = (hash_ >> 7) & explorer.seen_mask
    while explorer.seen[at] != 0:
        if explorer.seen[at] == hash_:
            return
        at = (at + 1) & explorer.seen_mask
    if explorer.seen_count * 2 < explorer.seen_mask:
        explorer.seen[at] = hash_
        explorer.seen_count += 1


cdef void kill_process(World* world, bint reissue) noexcept nogil:
    """The daemon is gone. Its writes land, or not, before a new one opens the base (the fence)."""
    cdef Io* io
    cdef int i
    for i in range(MAX_IO):
        io = &world.io[i]
        if not io.busy or io.owner == OWNER_NOBODY:
            continue
        if io.action.kind == ACT_SYNC_BASE and one_in(world, 2):
            disk_synced(world, io.sync_order)
        if io.action.kind != ACT_WRITE_BASE:
            io.busy = 0
        elif world.bug == BUG_NO_FENCE:
            io.owner = OWNER_NOBODY
        else:
            if one_in(world, 3):
                disk_forget(world, io.log)
            else:
                disk_land(world, io.log, 0xff)
            io.busy = 0
    if not reissue:
        oracle_process_crash(world)


cdef void lose_power(World* world, uint64_t subset, bint torn) noexcept nogil:
    disk_power_loss(world, subset, torn)
    memset(world.io, 0, sizeof(world.io))
    world.table.there = 0
    world.temporary.there = 0
    world.boot += 1
    oracle_power_loss(world)


cdef void reissue_all(World* world) noexcept nogil:
    """The kernel sends what was in flight again: same tags, same sectors, maybe for the second time."""
    cdef uint16_t queue, tag
    for queue in range(MAX_QUEUES):
        for tag in range(MAX_DEPTH):
            if world.guests[queue][tag].busy:
                machine_request(world, queue, tag)


cdef void crash_and_look(Explorer* explorer, uint8_t crash, uint64_t subset, bint torn) noexcept nogil:
    """Crash here, open, look; maybe go on and crash again."""
    cdef World* world = explorer.world
    cdef bint reissue = crash == CRASH_PROCESS and one_in(world, 2)
    cdef uint32_t more, i
    explorer.crashes += 1
    if crash == CRASH_PROCESS:
        kill_process(world, reissue)
    else:
        lose_power(world, subset, torn)
    remember(explorer)
    world.quiet = 1
    world.oracle.fault_seen = 0
    world.scratch = explorer.scratch + explorer.nesting * SCRATCH_BYTES
    if not open_base(explorer, world.geometry.stale_base and not formatted(world), False):
        return
    if reissue:
        reissue_all(world)
        settle(explorer, False)
    read_all(explorer)
    if explorer.plan.chain_one_in and one_in(world, explorer.plan.chain_one_in) and (
            world.violation == FINE and explorer.nesting < MAX_NESTING):
        world.requests_left = 6
        world.steps = 0
        more = 4 + below(world, 24)
        for i in range(more):
            if world.violation != FINE or not any_event(explorer, True):
                break
        explorer.nesting += 1
        crash_and_look(explorer, CRASH_POWER if one_in(world, 2) else CRASH_PROCESS, 0, True)
        explorer.nesting -= 1
    elif world.violation == FINE and one_in(world, 4):
        if stop(explorer, False):
            lose_power(world, 0, True)
            world.oracle.fault_seen = 0
            if open_base(explorer, False, False):
                read_all(explorer)


cdef bint formatted(World* world) noexcept nogil:
    """Creation got as far as its magic: what an operator would add without --format."""
    cdef uint8_t* page = world.disk.meta_cache
    return page[0] == 66 and page[8] == 0 and page[5] == 85


cdef void boundary(Explorer* explorer) noexcept nogil:
    """A point where a crash may come: try it, and be back as if nothing had happened."""
    cdef World* world = explorer.world
    cdef uint64_t random = world.random
    cdef uint64_t subset, subsets
    cdef uint32_t i
    if explorer.nesting > 0 or world.violation != FINE or not explorer.plan.crash_one_in:
        return
    explorer.boundaries += 1
    if not one_in(world, explorer.plan.crash_one_in):
        world.random = random
        return
    subsets = explorer.plan.subsets
    if explorer.plan.small and disk_pending(world) <= 10:
        subsets = (<uint64_t>1 << disk_pending(world)) + 1
    for i in range(<uint32_t>(subsets + 1)):
        memcpy(&explorer.saved[0], world, sizeof(World))
        explorer.nesting = 1
        world.random = random ^ (<uint64_t>0xabcdef * (i + 1))
        if i == 0:
            crash_and_look(explorer, CRASH_PROCESS, 0, False)
        elif explorer.plan.small and i < subsets:
            crash_and_look(explorer, CRASH_POWER, i - 1, False)
        else:
            crash_and_look(explorer, CRASH_POWER, 0, True)
        explorer.nesting = 0
        if world.violation != FINE:
            return
        memcpy(world, &explorer.saved[0], sizeof(World))
    world.random = random


# -- a run ---------------------------------------------------------------------------------------

cdef void run_seed(Explorer* explorer, uint64_t seed) noexcept nogil:
    """Everything that a seed stands for; the first violation is in explorer.world."""
    cdef World* world = explorer.world
    explorer.nesting = 0
    make_world(explorer, seed)
    if not open_base(explorer, world.geometry.stale_base, explorer.plan.crash_opening):
        explorer.nth_seen = world.faults.nth_seen
        return
    while world.requests_left > 0 and world.violation == FINE:
        boundary(explorer)
        if world.violation != FINE or not any_event(explorer, True):
            break
    # From here on the world is kind: everything must come to an end.
    settle(explorer, True)
    if world.violation != FINE:
        return
    world.quiet = 1
    world.oracle.fault_seen |= world.faults.one_in != 0 or world.faults.nth != 0
    if world.violation == FINE:
        read_all(explorer)
    explorer.nth_seen = world.faults.nth_seen
    if world.violation != FINE:
        return
    if stop(explorer, True):
        lose_power(world, 0, True)
        world.oracle.fault_seen = 0
        if open_base(explorer, False, False):
            read_all(explorer)
            settle(explorer, False)
    elif world.violation == FINE:
        # It could not commit: a killed daemon's base, and nothing that completed is lost.
        kill_process(world, False)
        world.oracle.fault_seen = 0
        if open_base(explorer, False, False):
            read_all(explorer)
