"""Worlds from seeds; see _world.pxd."""

from libc.stdint cimport uint16_t, uint32_t, uint64_t, uint8_t
from libc.string cimport memcpy, memset

from ublk_ubi._core cimport ACT_READ_BASE, ACT_READ_IMAGE, ACT_SYNC_BASE, ACT_WRITE_BASE
from ubi_sim._model cimport (
    ADOPTED_BYTE, ALL_FEATURES, CELLS, CHUNKS, HOT, HOT_CELLS, MAX_DEPTH, META_BYTES, STALE_VALUE,
    STRIPE_BYTES, WITH_ADOPTION, WITH_CHAINS, WITH_COPY_ON_READ, WITH_FAULTS, WITH_HOLES,
    WITH_GROWTH, WITH_HYDRATION, WITH_IMAGE_LOST, WITH_MISTAKES, WITH_MOVES, WITH_OPENING,
    WITH_OVERLAPS, WITH_PARTIAL_IMAGE, WITH_REISSUE, WITH_STALE_BASE, WITH_SYNC_FAULTS, WITH_TAIL,
    WITH_TORN_SLOTS, WITH_TWO_PAGES, WITH_TWO_QUEUES, WITH_UNSAFE, WITH_WRITETHROUGH, WITH_ZEROING,
    Disk, Geometry, World, below, has, one_in,
)
from ubi_sim._oracle cimport oracle_first_value, oracle_init


cdef uint32_t draw(World* world, uint32_t feature, uint32_t bound) noexcept nogil:
    """The feature, one time in `bound`."""
    return feature if one_in(world, bound) else 0


cdef uint32_t draw_features(World* world) noexcept nogil:
    """Independent of the plan: taking one away leaves the rest as it was."""
    cdef uint32_t features = draw(world, WITH_FAULTS, 4)
    features |= draw(world, WITH_SYNC_FAULTS, 4)
    features |= draw(world, WITH_CHAINS, 1)
    features |= draw(world, WITH_MISTAKES, 2)
    features |= draw(world, WITH_MOVES, 3)
    features |= draw(world, WITH_OPENING, 8)
    features |= draw(world, WITH_TORN_SLOTS, 3)
    features |= draw(world, WITH_ZEROING, 3)
    features |= draw(world, WITH_REISSUE, 2)
    features |= draw(world, WITH_STALE_BASE, 3)
    features |= draw(world, WITH_ADOPTION, 6)
    features |= draw(world, WITH_COPY_ON_READ, 2)
    features |= draw(world, WITH_TWO_PAGES, 5)
    features |= draw(world, WITH_TWO_QUEUES, 2)
    features |= draw(world, WITH_PARTIAL_IMAGE, 2)
    features |= draw(world, WITH_TAIL, 2)
    features |= draw(world, WITH_OVERLAPS, 4)
    features |= draw(world, WITH_HOLES, 2)
    features |= draw(world, WITH_WRITETHROUGH, 6)
    features |= draw(world, WITH_UNSAFE, 12)
    features |= draw(world, WITH_HYDRATION, 4)
    features |= draw(world, WITH_IMAGE_LOST, 6)
    if (world.random >> 40) % 3 == 0:
        # Nothing is drawn for it: a seed's world is what it was before disks grew.
        features |= WITH_GROWTH
    if features & WITH_TWO_PAGES:
        # Only few of these stripes are modelled.
        features &= ~<uint32_t>WITH_HYDRATION
    if features & WITH_UNSAFE:
        features &= ~<uint32_t>WITH_WRITETHROUGH
    if features & WITH_ADOPTION:
        features &= ~<uint32_t>WITH_STALE_BASE
    return features


# -- geometry ------------------------------------------------------------------------------------

cdef void make_geometry(World* world, bint small) noexcept nogil:
    """Few stripes, among them the image's last, the first behind it, and page borders."""
    cdef Geometry* g = &world.geometry
    cdef uint32_t few = 1 + below(world, 3 if small else 5)
    cdef uint32_t depth = 2 + below(world, 3)
    cdef uint32_t cut = 1 + below(world, STRIPE_BYTES - 2)
    cdef uint32_t tail = 1 + below(world, 2)
    cdef uint32_t tail_cells = 1 + below(world, CELLS)
    cdef uint32_t i, _i
    g.queues = 2 if has(world, WITH_TWO_QUEUES) else 1
    g.depth = <uint16_t>depth
    g.buffers = <uint16_t>(2 + below(world, 2))
    g.hot_count = 0
    if has(world, WITH_TWO_PAGES):
        # Headers 2040 and 2041 are on different pages.
        g.image_stripes = 2041 + few % 3
        add_hot(g, 0)
        add_hot(g, 2039)
        for i in range(2040, g.image_stripes):
            add_hot(g, i)
    else:
        g.image_stripes = few
        for i in range(few):
            add_hot(g, i)
    g.device_stripes = g.image_stripes
    g.last_cells = CELLS
    if has(world, WITH_TAIL) and not (small and g.hot_count > 2):
        for _i in range(tail):
            if g.hot_count < HOT and not (small and g.hot_count > 2):
                add_hot(g, g.device_stripes)
                g.device_stripes += 1
        g.last_cells = <uint8_t>tail_cells
    g.image_bytes = <uint64_t>g.image_stripes * STRIPE_BYTES
    if has(world, WITH_PARTIAL_IMAGE):
        # Inside its last stripe, maybe inside a sector.
        g.image_bytes -= cut


cdef void add_hot(Geometry* g, uint32_t stripe) noexcept nogil:
    g.hot[g.hot_count] = stripe
    g.hot_count += 1


cdef void make_pace(World* world) noexcept nogil:
    cdef uint8_t[6] kinds = [0, 0, ACT_READ_IMAGE, ACT_READ_BASE, ACT_WRITE_BASE, ACT_SYNC_BASE]
    cdef uint32_t burst = below(world, 4)
    cdef uint32_t slow_sync = below(world, 4)
    world.pace.request = <uint8_t>(1 + below(world, 8))
    if burst == 0:
        # Every tag is in use, always, and the disk stands still at times.
        world.pace.request = 64
        world.pace.stalls = 1
        world.geometry.depth = MAX_DEPTH
        world.geometry.buffers = 2
    world.pace.mail = <uint8_t>(1 + below(world, 8))
    world.pace.io = <uint8_t>(2 + below(world, 8))
    world.pace.slow = kinds[below(world, 6)]
    if slow_sync and has(world, WITH_SYNC_FAULTS):
        # Queues and hydrator at it at once: whose failure does the other see, and when?
        world.pace.slow = ACT_SYNC_BASE if slow_sync < 3 else ACT_WRITE_BASE
    world.pace.focus = <uint8_t>below(world, world.geometry.hot_count)


# -- the base ------------------------------------------------------------------------------------

cdef void make_adopted(World* world) noexcept nogil:
    """A disk that bdev_ubi has used: every third stripe is hydrated, in a byte of its liking."""
    cdef Disk* disk = &world.disk
    cdef uint32_t i, stripe
    for i in range(HOT_CELLS):
        disk.durable[i] = STALE_VALUE | i
    for i in range(<uint32_t>world.geometry.hot_count * CELLS):
        stripe = world.geometry.hot[i // CELLS]
        if stripe % 3 == 1 or stripe >= world.geometry.image_stripes:
            disk.durable[i] = oracle_first_value(world, i)
    memcpy(disk.meta_durable, b"BDEV_UBI\0\0\0\1\0\x40", 14)
    for stripe in range(world.geometry.image_stripes):
        disk.meta_durable[14 + 2 * stripe] = 7 if stripe % 3 == 1 else 0
        disk.meta_durable[15 + 2 * stripe] = ADOPTED_BYTE


cdef void make_disk(World* world) noexcept nogil:
    cdef Disk* disk = &world.disk
    cdef uint32_t cell
    if has(world, WITH_STALE_BASE):
        for cell in range(<uint32_t>HOT_CELLS):
            disk.durable[cell] = STALE_VALUE | cell
        memset(disk.meta_durable, 0x5a, META_BYTES)
        memset(disk.chunk_durable, 1, CHUNKS)
    elif has(world, WITH_ADOPTION):
        make_adopted(world)
    memcpy(disk.cache, disk.durable, sizeof(disk.cache))
    memcpy(disk.meta_cache, disk.meta_durable, META_BYTES)
    memcpy(disk.chunk_cache, disk.chunk_durable, CHUNKS)


cdef void make_world(World* world, const Plan* plan, uint64_t seed) noexcept nogil:
    """What lies outside of the world (its pointers) is kept."""
    cdef World outside = world[0]
    memset(world, 0, sizeof(World))
    world.scratch = outside.scratch
    world.coverage = outside.coverage
    world.trace = outside.trace
    world.hook = outside.hook
    world.hook_argument = outside.hook_argument
    world.random = seed * <uint64_t>0x9e3779b97f4a7c15 + 1
    world.features = draw_features(world) & ~plan.without & ALL_FEATURES
    world.faults.one_in = 8 + below(world, 24)
    make_geometry(world, plan.small)
    make_pace(world)
    make_disk(world)
    oracle_init(world)
    world.hosts[0].boot = 1
    world.hosts[1].boot = 2
    world.boots = 2
    world.bug = plan.bug
    world.blind = plan.blind
    world.budget = plan.budget
    world.requests_left = plan.requests
    world.skipped = plan.skipped
    world.faults.nth = plan.nth
    world.faults.nth_kind = plan.nth_kind
    world.faults.nth_for_good = plan.nth_for_good
    world.faults.nth_errno = plan.nth_errno
