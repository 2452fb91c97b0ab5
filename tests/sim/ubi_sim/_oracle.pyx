"""The oracle; see _oracle.pxd."""

from libc.errno cimport EIO, EOPNOTSUPP
from libc.stdint cimport int32_t, uint32_t, uint64_t, uint8_t
from libc.string cimport memmove, memset

from ublk_ubi._atomic cimport ensure
from ublk_ubi._core cimport OP_DISCARD, OP_FLUSH, OP_READ, OP_WRITE, OP_WRITE_ZEROES
from ubi_sim._model cimport (
    ADOPTED_VALUE, CELLS, CELL_BYTES, HOT_CELLS, LATCH_BROKEN, MAX_CANDIDATES, MAX_DEPTH,
    MAX_HISTORY, MAX_OVERLAP, MAX_QUEUES, SPACE_KEPT, WITH_ADOPTION, WITH_OVERLAPS, WITH_UNSAFE,
    WITH_WRITETHROUGH, WRONG_DATA, WRONG_ERROR, CellHistory, GuestRequest, Oracle, Version, World,
    cell_count, has, image_value, violate,
)


cdef uint32_t written_value(uint32_t serial, uint32_t cell) noexcept nogil:
    return serial * CELLS + cell % CELLS


cdef uint32_t oracle_first_value(World* world, uint32_t cell) noexcept nogil:
    cdef uint32_t stripe = world.geometry.hot[cell // CELLS]
    cdef uint64_t offset = <uint64_t>stripe * (CELLS * CELL_BYTES) + cell % CELLS * CELL_BYTES
    if has(world, WITH_ADOPTION) and (stripe % 3 == 1 or stripe >= world.geometry.image_stripes):
        return ADOPTED_VALUE | cell
    return image_value(world, cell) if offset < world.geometry.image_bytes else 0


cdef void oracle_init(World* world) noexcept nogil:
    cdef Oracle* oracle = &world.oracle
    cdef Version* version
    cdef uint32_t cell
    memset(oracle, 0, sizeof(Oracle))
    for cell in range(<uint32_t>HOT_CELLS):
        oracle.cells[cell].count = 1
        oracle.cells[cell].versions[0].count = 1
    for cell in range(cell_count(world)):
        version = &oracle.cells[cell].versions[0]
        version.candidates[0] = oracle_first_value(world, cell)


# -- a cell's past -------------------------------------------------------------------------------

cdef inline Version* current(CellHistory* history) noexcept nogil:
    return &history.versions[history.count - 1]


cdef bint holds(const uint32_t* values, uint8_t count, uint32_t value) noexcept nogil:
    cdef uint8_t i
    for i in range(count):
        if values[i] == value:
            return True
    return False


cdef void add_value(uint32_t* values, uint8_t* count, uint32_t value) noexcept nogil:
    """Add a value once. Past the bound nothing is checked any more that could be wrong: abort."""
    if holds(values, count[0], value):
        return
    ensure(count[0] < MAX_CANDIDATES, b"a cell has few values that it may hold")
    values[count[0]] = value
    count[0] += 1


cdef void add_values(Version* into, const Version* other) noexcept nogil:
    cdef uint8_t i
    for i in range(other.count):
        add_value(into.candidates, &into.count, other.candidates[i])


cdef void merge_oldest(CellHistory* history) noexcept nogil:
    """Two oldest versions become one: both may come back after a power loss, either way."""
    add_values(&history.versions[1], &history.versions[0])
    memmove(&history.versions[0], &history.versions[1], (history.count - 1) * sizeof(Version))
    history.count -= 1


cdef Version* push(CellHistory* history, uint64_t clock) noexcept nogil:
    cdef Version* version
    if history.count == MAX_HISTORY:
        merge_oldest(history)
    history.count += 1
    version = current(history)
    memset(version, 0, sizeof(Version))
    version.completed = clock
    return version


cdef Version* push_written(CellHistory* history, uint64_t clock, uint32_t value) noexcept nogil:
    """A write has ended: it is there, or one that overlapped it."""
    cdef Version* version = push(history, clock)
    cdef uint8_t i
    add_value(version.candidates, &version.count, value)
    for i in range(history.writing):
        add_value(version.candidates, &version.count, history.in_flight[i])
    for i in range(history.ended):
        add_value(version.candidates, &version.count, history.recent[i])
    return version


cdef void push_unsure(CellHistory* history, uint64_t clock, uint32_t value) noexcept nogil:
    """It is there, or what was before."""
    cdef Version before = current(history)[0]
    add_values(push_written(history, clock, value), &before)


cdef void begin_write(CellHistory* history, uint32_t value) noexcept nogil:
    ensure(history.writing < MAX_OVERLAP, b"few writes to a cell are in flight")
    history.in_flight[history.writing] = value
    history.writing += 1


cdef void leave_flight(CellHistory* history, uint32_t value) noexcept nogil:
    cdef uint8_t i
    history.writing -= 1
    for i in range(history.writing):
        if history.in_flight[i] == value:
            history.in_flight[i] = history.in_flight[history.writing]
            return


cdef void note_ended(CellHistory* history, uint32_t value) noexcept nogil:
    """As long as others are in flight, it may still turn out to be the last."""
    if history.writing == 0:
        history.ended = 0
    else:
        ensure(history.ended < MAX_OVERLAP, b"a row of overlapping writes is short")
        history.recent[history.ended] = value
        history.ended += 1


cdef void drop_before(CellHistory* history, uint64_t clock) noexcept nogil:
    """What was current at `clock` is durable: nothing older comes back."""
    cdef int keep = 0
    cdef int i
    for i in range(history.count):
        if history.versions[i].completed < clock:
            keep = i
    if keep > 0:
        memmove(&history.versions[0], &history.versions[keep],
                (history.count - keep) * sizeof(Version))
        history.count -= <uint8_t>keep


# -- sending -------------------------------------------------------------------------------------

cdef inline bint is_write(uint8_t op) noexcept nogil:
    return op == OP_WRITE or op == OP_DISCARD or op == OP_WRITE_ZEROES


cdef bint is_durable(World* world, const GuestRequest* guest) noexcept nogil:
    """Once it has completed well, it is there after a power loss."""
    if has(world, WITH_UNSAFE):
        return False
    if guest.op == OP_FLUSH:
        return True
    return ((guest.op == OP_WRITE or guest.op == OP_WRITE_ZEROES)
            and (guest.fua or has(world, WITH_WRITETHROUGH)))


cdef bint oracle_may_write(World* world, uint32_t first, uint32_t count) noexcept nogil:
    cdef const CellHistory* history
    cdef uint32_t cell
    for cell in range(first, first + count):
        history = &world.oracle.cells[cell]
        if history.writing and not has(world, WITH_OVERLAPS):
            return False
        if history.writing + history.ended >= MAX_OVERLAP:
            return False
    return True


cdef bint reads(const GuestRequest* guest, uint32_t cell) noexcept nogil:
    """It is a read of this cell, in flight."""
    return (guest.busy and guest.op == OP_READ and guest.first <= cell
            and cell < <uint32_t>(guest.first + guest.count))


cdef void allow_in_reads(World* world, uint32_t cell, uint32_t value) noexcept nogil:
    """A write of `value` to `cell` is in flight: every read of it in flight may show it."""
    cdef GuestRequest* guest
    cdef int queue, tag
    cdef uint32_t i
    for queue in range(MAX_QUEUES):
        for tag in range(MAX_DEPTH):
            guest = &world.guests[queue][tag]
            if reads(guest, cell):
                i = cell - guest.first
                add_value(guest.legal[i], &guest.legal_count[i], value)


cdef void start_read(World* world, GuestRequest* guest) noexcept nogil:
    cdef CellHistory* history
    cdef Version* version
    cdef uint32_t i
    cdef uint8_t k
    memset(guest.legal_count, 0, CELLS)
    for i in range(guest.count):
        history = &world.oracle.cells[guest.first + i]
        version = current(history)
        for k in range(version.count):
            add_value(guest.legal[i], &guest.legal_count[i], version.candidates[k])
        for k in range(history.writing):
            add_value(guest.legal[i], &guest.legal_count[i], history.in_flight[k])


cdef inline uint32_t value_of(const GuestRequest* guest, uint32_t cell) noexcept nogil:
    """What a write puts there, or a DISCARD may."""
    return written_value(guest.serial, cell) if guest.op == OP_WRITE else 0


cdef void oracle_sent(World* world, GuestRequest* guest) noexcept nogil:
    cdef Oracle* oracle = &world.oracle
    cdef uint32_t cell
    oracle.clock += 1
    guest.sent = oracle.clock
    guest.busy = 1
    if guest.op == OP_READ:
        start_read(world, guest)
    elif is_write(guest.op):
        oracle.serial += 1
        guest.serial = oracle.serial
        for cell in range(guest.first, <uint32_t>(guest.first + guest.count)):
            begin_write(&oracle.cells[cell], value_of(guest, cell))
            allow_in_reads(world, cell, value_of(guest, cell))


# -- completion ----------------------------------------------------------------------------------

cdef bint comes_back(World* world, uint32_t cell, uint32_t value) noexcept nogil:
    """After a failed fdatasync dropped pages may leave the cache: what is below shows again."""
    cdef CellHistory* history = &world.oracle.cells[cell]
    cdef uint8_t i
    if value == world.disk.durable[cell]:
        return True
    for i in range(history.count):
        if holds(history.versions[i].candidates, history.versions[i].count, value):
            return True
    return False


cdef void settle_value(World* world, uint32_t cell, uint32_t value) noexcept nogil:
    """A read has shown what the cell holds: those in flight, too, can show nothing else."""
    cdef CellHistory* history = &world.oracle.cells[cell]
    cdef Version* version = current(history)
    cdef GuestRequest* guest
    cdef int queue, tag
    cdef uint32_t i
    version.count = 1
    version.candidates[0] = value
    for queue in range(MAX_QUEUES):
        for tag in range(MAX_DEPTH):
            guest = &world.guests[queue][tag]
            if reads(guest, cell) and guest.sent > version.completed:
                i = cell - guest.first
                guest.legal_count[i] = 1
                guest.legal[i][0] = value


cdef void end_read(World* world, GuestRequest* guest, const uint32_t* data) noexcept nogil:
    """Legal? What it showed is what the cell holds, if nobody writes it and no page was lost."""
    cdef CellHistory* history
    cdef Version* version
    cdef uint32_t i
    for i in range(guest.count):
        history = &world.oracle.cells[guest.first + i]
        version = current(history)
        if not holds(guest.legal[i], guest.legal_count[i], data[i]):
            if world.oracle.sync_failed and comes_back(world, guest.first + i, data[i]):
                continue
            violate(world, WRONG_DATA, guest.first + i, data[i],
                    guest.legal[i][0], guest.legal_count[i])
        elif (version.count > 1 and not history.writing and version.completed < guest.sent
                and holds(version.candidates, version.count, data[i])
                and not world.oracle.sync_failed):
            settle_value(world, guest.first + i, data[i])


cdef void end_write(World* world, GuestRequest* guest, int32_t result) noexcept nogil:
    cdef Oracle* oracle = &world.oracle
    cdef CellHistory* history
    cdef Version overlapped
    cdef uint32_t cell, value
    oracle.clock += 1
    for cell in range(guest.first, <uint32_t>(guest.first + guest.count)):
        history = &oracle.cells[cell]
        value = value_of(guest, cell)
        leave_flight(history, value)
        if result != -EOPNOTSUPP or guest.op == OP_WRITE:
            if result < 0 or guest.op == OP_DISCARD:
                push_unsure(history, oracle.clock, value)
            else:
                push_written(history, oracle.clock, value)
            if result >= 0 and is_durable(world, guest):
                drop_before(history, oracle.clock + 1)
                if current(history).count > 1:
                    # Durable is this write; one that overlapped it, and is read now, may not be.
                    overlapped = current(history)[0]
                    push(history, oracle.clock)[0] = overlapped
        note_ended(history, value)


cdef bint needs_image(const GuestRequest* guest) noexcept nogil:
    """It reads, or writes a part of, what the base had not when it came."""
    if guest.op == OP_FLUSH or guest.op == OP_DISCARD or guest.on_base:
        return False
    return guest.op == OP_READ or guest.count < CELLS


cdef void check_result(World* world, const GuestRequest* guest, int32_t result) noexcept nogil:
    cdef Oracle* oracle = &world.oracle
    cdef bint durable = guest.op == OP_FLUSH or is_durable(world, guest)
    if result >= 0:
        if oracle.sync_failed and durable and guest.sent > oracle.sync_failed:
            violate(world, LATCH_BROKEN, guest.op, guest.first, guest.count, 0)
        if guest.op == OP_DISCARD and guest.on_base & ~guest.discarded:
            violate(world, SPACE_KEPT, guest.first, guest.count, <uint32_t>guest.discarded,
                    <uint32_t>(guest.discarded >> 32))
        return
    if world.image_changed and result == -EIO and needs_image(guest):
        return
    if result == -EOPNOTSUPP and (guest.op == OP_DISCARD or guest.op == OP_WRITE_ZEROES):
        return
    if guest.sent > oracle.fault_clock and not (oracle.sync_failed and durable):
        violate(world, WRONG_ERROR, guest.op, <uint32_t>-result, guest.first, guest.count)


cdef void oracle_completed(World* world, GuestRequest* guest, int32_t result,
                           const uint32_t* data) noexcept nogil:
    cdef uint32_t cell
    ensure(guest.busy, b"a request completes once")
    guest.busy = 0
    check_result(world, guest, result)
    if is_write(guest.op):
        end_write(world, guest, result)
    elif result < 0:
        return
    elif guest.op == OP_READ:
        end_read(world, guest, data)
    elif is_durable(world, guest):
        for cell in range(cell_count(world)):
            drop_before(&world.oracle.cells[cell], guest.sent)


# -- crashes -------------------------------------------------------------------------------------

cdef void oracle_process_crash(World* world) noexcept nogil:
    cdef Oracle* oracle = &world.oracle
    cdef CellHistory* history
    cdef uint32_t cell
    oracle.clock += 1
    for cell in range(cell_count(world)):
        history = &oracle.cells[cell]
        if history.writing:
            push_unsure(history, oracle.clock, history.in_flight[0])
        history.writing = 0
        history.ended = 0
    memset(world.guests, 0, sizeof(world.guests))


cdef void oracle_power_loss(World* world) noexcept nogil:
    cdef CellHistory* history
    cdef uint32_t cell
    oracle_process_crash(world)
    for cell in range(cell_count(world)):
        history = &world.oracle.cells[cell]
        while history.count > 1:
            merge_oldest(history)
    # What is read from now on is on the medium, or was dropped for good.
    world.oracle.sync_failed = 0


cdef void oracle_fault(World* world) noexcept nogil:
    world.oracle.fault_clock = world.oracle.clock


cdef void oracle_sync_failed(World* world) noexcept nogil:
    if not world.oracle.sync_failed:
        world.oracle.sync_failed = world.oracle.clock


cdef void oracle_clean_stop(World* world) noexcept nogil:
    cdef uint32_t cell
    world.oracle.clock += 1
    for cell in range(cell_count(world)):
        drop_before(&world.oracle.cells[cell], world.oracle.clock)
