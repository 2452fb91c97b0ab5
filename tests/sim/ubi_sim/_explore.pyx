"""Exploring; see _explore.pxd."""

from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t, uint8_t
from libc.string cimport memcpy, memset

from ublk_ubi._lifecycle cimport SCRATCH_BYTES
from ubi_sim._daemon cimport daemon_grow, daemon_killed, daemon_stop, daemon_up
from ubi_sim._disk cimport (
    disk_cache_hash, disk_evict, disk_hash, disk_pending, disk_power_loss, disk_synced,
)
from ubi_sim._events cimport answer_all, read_all, reissue_all, serve, settle, write_all
from ubi_sim._host cimport host_boot
from ubi_sim._mistakes cimport make_mistake
from ubi_sim._model cimport (
    ADOPTED_BYTE, CRASH_MOVE, CRASH_POWER, CRASH_PROCESS, CRASH_RUN_LOST, FINE, HOSTS, NOT_KEPT,
    WITH_ADOPTION, WITH_CHAINS, WITH_GROWTH, WITH_MISTAKES, WITH_MOVES, WITH_OPENING, WITH_REISSUE,
    World, below, halted, has, here, next_random, one_in, violate,
)
from ubi_sim._oracle cimport oracle_power_loss, oracle_process_crash
from ubi_sim._trace cimport trace_number, trace_text, trace_world
from ubi_sim._world cimport make_world

cdef enum:
    MAX_CHAIN = 3
    EXHAUSTIVE = 10                # pending writes of which every subset is tried


# -- states that were seen -----------------------------------------------------------------------

cdef void remember(Seen* seen, uint64_t hash_) noexcept nogil:
    cdef uint64_t at = (hash_ >> 7) & seen.mask
    hash_ |= 1
    while seen.hashes[at] != 0:
        if seen.hashes[at] == hash_:
            return
        at = (at + 1) & seen.mask
    if seen.count * 2 < seen.mask:
        seen.hashes[at] = hash_
        seen.count += 1


cdef uint64_t mixed(uint64_t a, uint64_t b) noexcept nogil:
    cdef uint64_t z = (a ^ (b * <uint64_t>0x9e3779b97f4a7c15)) + <uint64_t>0x632be59bd9b4e019
    z = (z ^ (z >> 30)) * <uint64_t>0xbf58476d1ce4e5b9
    z = (z ^ (z >> 27)) * <uint64_t>0x94d049bb133111eb
    return z ^ (z >> 31)


cdef uint64_t process_state(World* world) noexcept nogil:
    """Medium, cache and the rows of the table that are touched."""
    cdef uint64_t hash_ = disk_cache_hash(world)
    cdef uint16_t i
    for i in range(world.geometry.hot_count):
        if world.geometry.hot[i] < world.geometry.image_stripes:
            hash_ = mixed(hash_, here(world).table.rows[world.geometry.hot[i]])
    return mixed(hash_, here(world).table.latch + here(world).table.there * 256
                 + here(world).temporary.there * 512)


# -- crashes -------------------------------------------------------------------------------------

cdef void lose_power(World* world, uint64_t subset, bint torn) noexcept nogil:
    disk_power_loss(world, subset, torn)
    memset(world.io, 0, sizeof(world.io))
    host_boot(world)
    world.accepted = 0
    oracle_power_loss(world)


cdef void move(World* world) noexcept nogil:
    """Detached with what was in the cache written; what the other host knows of it is older."""
    daemon_killed(world)
    disk_synced(world, world.disk.landed)
    disk_evict(world)
    world.host = <uint8_t>((world.host + 1) % HOSTS)
    world.accepted = 0
    oracle_power_loss(world)


cdef void lose_run(World* world) noexcept nogil:
    daemon_killed(world)
    here(world).wiped = 1
    here(world).table.there = 0
    here(world).temporary.there = 0
    oracle_process_crash(world)


cdef const char* crash_name(uint8_t kind) noexcept nogil:
    if kind == CRASH_POWER:
        return b"CRASH: power is lost"
    if kind == CRASH_MOVE:
        return b"CRASH: the process is killed, the base goes to the other host"
    if kind == CRASH_RUN_LOST:
        return b"CRASH: the process is killed, and /run is wiped"
    return b"CRASH: the process is killed"


cdef void crash(Explorer* explorer, uint8_t kind, uint64_t subset, bint torn,
                bint reissue) noexcept nogil:
    cdef World* world = explorer.world
    explorer.crashes += 1
    if world.trace != NULL:
        trace_text(world, crash_name(kind))
    if kind == CRASH_POWER:
        lose_power(world, subset, torn)
    elif kind == CRASH_MOVE:
        move(world)
    elif kind == CRASH_RUN_LOST:
        lose_run(world)
    else:
        daemon_killed(world)
        if not reissue:
            oracle_process_crash(world)
    if kind == CRASH_POWER:
        remember(&explorer.media, disk_hash(world))
    else:
        remember(&explorer.processes, process_state(world))


cdef uint8_t next_crash(World* world) noexcept nogil:
    cdef uint32_t choice = below(world, 16)
    if choice < 2 and has(world, WITH_MOVES):
        return CRASH_MOVE
    if choice == 15 and has(world, WITH_MISTAKES):
        return CRASH_RUN_LOST
    return CRASH_POWER if choice & 1 else CRASH_PROCESS


# -- what an operator does after a crash ---------------------------------------------------------

cdef void check_kept(World* world) noexcept nogil:
    """Byte 1 of every header is as bdev_ubi left it."""
    cdef uint8_t kept = ADOPTED_BYTE if has(world, WITH_ADOPTION) else 0
    cdef uint32_t stripe
    cdef uint16_t i
    for i in range(world.geometry.hot_count):
        stripe = world.geometry.hot[i]
        if stripe < world.geometry.image_stripes and (
                world.disk.meta_cache[15 + 2 * stripe] != kept):
            violate(world, NOT_KEPT, stripe, world.disk.meta_cache[15 + 2 * stripe], 0, 0)


cdef void go_on(World* world) noexcept nogil:
    """More requests, then a clean stop, then maybe another opening."""
    world.requests_left += 2 + below(world, 6)
    serve(world)
    if has(world, WITH_GROWTH):
        daemon_grow(world)
    answer_all(world)
    if one_in(world, 2):
        settle(world)
        read_all(world)
        write_all(world)
    if one_in(world, 2) and not halted(world):
        stop_and_open(world)


cdef void stop_and_open(World* world) noexcept nogil:
    """Clean, or (an fdatasync has failed, an error was injected) not; then up again, and look."""
    cdef uint32_t choice = below(world, 4)
    cdef bint closed
    if halted(world):
        return
    closed = daemon_stop(world)
    if halted(world):
        return
    if not closed:
        daemon_killed(world)
    elif choice == 0 and has(world, WITH_MOVES):
        move(world)
    elif choice < 3:
        lose_power(world, 0, True)
    world.quiet = 1
    if daemon_up(world):
        settle(world)
        read_all(world)


cdef void live_again(Explorer* explorer, bint reissue) noexcept nogil:
    """Open, answer what was in flight, look at everything; maybe go on."""
    cdef World* world = explorer.world
    cdef bint go = explorer.fuse > 0 or one_in(world, 4)
    if has(world, WITH_MISTAKES) and one_in(world, 3):
        make_mistake(world, explorer.spare)
    if halted(world) or not daemon_up(world):
        return
    check_kept(world)
    if reissue:
        reissue_all(world)
    if one_in(world, 2):
        settle(world)
    else:
        answer_all(world)
    read_all(world)
    if go and not halted(world):
        go_on(world)


cdef void aftermath(Explorer* explorer, uint8_t kind, uint64_t subset, bint torn) noexcept nogil:
    """A crash and what follows; more crashes cut that short as the fuse says."""
    cdef World* world = explorer.world
    cdef bint reissue
    cdef int chain = 0
    world.steps = 0
    while True:
        reissue = kind == CRASH_PROCESS and has(world, WITH_REISSUE) and next_random(world) & 1
        crash(explorer, kind, subset, torn, reissue)
        world.cut = 0
        world.budget = explorer.plan.budget
        world.requests_left = 0
        explorer.fuse = 0
        if has(world, WITH_CHAINS) and chain < MAX_CHAIN and one_in(world, 2):
            explorer.fuse = 1 + below(world, 60)
        world.quiet = explorer.fuse == 0 or one_in(world, 2)
        world.oracle.fault_clock = 0
        live_again(explorer, reissue)
        if world.violation != FINE or not world.cut:
            return
        kind = next_crash(world)
        torn = True
        chain += 1


# -- boundaries ----------------------------------------------------------------------------------

cdef uint32_t branches_here(Explorer* explorer) noexcept nogil:
    cdef int pending = disk_pending(explorer.world)
    if explorer.plan.small and pending <= EXHAUSTIVE:
        return 2 + (<uint32_t>1 << pending) + explorer.plan.subsets
    return 2 + explorer.plan.subsets


cdef void look_at(Explorer* explorer, uint32_t branch) noexcept nogil:
    """One branch of the present boundary. The world is left in it when it has a violation."""
    cdef World* world = explorer.world
    cdef uint32_t subsets = branches_here(explorer) - 2 - explorer.plan.subsets
    memcpy(explorer.saved, world, sizeof(World))
    cdef uint64_t length = world.trace.length[0] if world.trace != NULL else 0
    explorer.branch = branch
    explorer.inside = 1
    world.random = mixed(world.random, branch + 1)
    world.scratch += SCRATCH_BYTES
    if world.trace != NULL:
        trace_number(world, b"-- boundary %llu --", explorer.boundaries)
    if branch == 0:
        aftermath(explorer, CRASH_PROCESS, 0, False)
    elif branch == 1 and has(world, WITH_MOVES):
        aftermath(explorer, CRASH_MOVE, 0, False)
    elif branch >= 2 and branch - 2 < subsets:
        aftermath(explorer, CRASH_POWER, branch - 2, False)
    else:
        # Of whole writes at times, of parts more often.
        aftermath(explorer, CRASH_POWER, next_random(world), branch % 3 != 0)
    explorer.events += world.steps
    if world.violation != FINE:
        return
    explorer.inside = 0
    explorer.branch = -1
    memcpy(world, explorer.saved, sizeof(World))
    if world.trace != NULL:
        world.trace.length[0] = length


cdef void at_boundary(void* argument) noexcept nogil:
    """The world's hook."""
    cdef Explorer* explorer = <Explorer*>argument
    cdef Plan* plan = &explorer.plan
    cdef uint64_t index
    cdef uint32_t branch
    if explorer.world.accepted:
        # A daemon that dies between a failed fdatasync and its latch: docs/durability.md, the end.
        return
    if explorer.inside:
        if explorer.fuse > 0:
            explorer.fuse -= 1
            explorer.world.cut = explorer.fuse == 0
        return
    index = explorer.boundaries
    if not explorer.exploring or not plan.crash_one_in or halted(explorer.world):
        return
    explorer.boundaries += 1
    if plan.only_boundary >= 0:
        if <int64_t>index != plan.only_boundary:
            return
    elif mixed(explorer.seed, index) % plan.crash_one_in != 0:
        return
    for branch in range(branches_here(explorer)):
        if plan.only_branch >= 0 and <int64_t>branch != plan.only_branch:
            continue
        look_at(explorer, branch)
        if explorer.world.violation != FINE:
            return


# -- a run ---------------------------------------------------------------------------------------

cdef void explore_seed(Explorer* explorer, uint64_t seed) noexcept nogil:
    """Everything that a seed stands for; the first violation is in explorer.world."""
    cdef World* world = explorer.world
    explorer.seed = seed
    explorer.boundaries = 0
    explorer.inside = 0
    explorer.branch = -1
    world.hook = at_boundary
    world.hook_argument = explorer
    make_world(world, &explorer.plan, seed)
    if world.trace != NULL:
        trace_world(world)
    explorer.exploring = has(world, WITH_OPENING)
    if daemon_up(world):
        explorer.exploring = 1
        serve(world)
        if has(world, WITH_GROWTH):
            daemon_grow(world)
        answer_all(world)
        if one_in(world, 2):
            settle(world)
            read_all(world)
            write_all(world)
        explorer.exploring = one_in(world, 2)
        stop_and_open(world)
    explorer.events += world.steps
