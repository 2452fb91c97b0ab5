"""Writing the trace; see _trace.pxd."""

from libc.stdint cimport int32_t, uint16_t, uint32_t, uint64_t, uint8_t
from libc.stdio cimport snprintf
from libc.string cimport memcpy, strlen

from ublk_ubi._core cimport (
    ACT_DISCARD_BASE, ACT_READ_IMAGE, ACT_SYNC_BASE, ACT_WRITE_BASE, ACT_ZERO_BASE, DATA_OFFSET,
    MEM_PAGE, MEM_REQUEST, MEM_STRIPE, MSG_CLAIM, MSG_DONE, MSG_GRANT, MSG_HYDRATE, MSG_JOIN,
    MSG_WANT, MSG_WRITTEN, OP_DISCARD, OP_FLUSH, OP_READ, OP_WRITE, Action,
)
from ublk_ubi._lifecycle cimport (
    HOST_BEFORE_WRITE, HOST_CREATED, HOST_DROP_TABLE, HOST_FIND_TABLE, HOST_LATCH_TABLE,
    HOST_MAKE_TABLE, HOST_MAP_TABLE, HOST_PUBLISH_TABLE, HOST_ZERO_TAIL,
)
from ubi_sim._model cimport (
    CELLS, CELL_BYTES, MAX_QUEUES, OWNER_HYDRATOR, OWNER_LIFECYCLE, STRIPE_BYTES, GuestRequest,
    Mail, Trace, World,
)

cdef enum:
    LINE = 240


cdef void add_line(World* world, const char* text) noexcept nogil:
    """Past the capacity lines are dropped: the beginning is what matters."""
    cdef Trace* trace = world.trace
    cdef char line[LINE]
    cdef int length = snprintf(line, LINE, b"%6u  %s\n", world.steps, text)
    if length >= LINE:
        length = LINE - 1
    if trace.length[0] + <uint64_t>length > trace.capacity:
        return
    memcpy(trace.text + trace.length[0], line, length)
    trace.length[0] += <uint64_t>length


cdef void trace_text(World* world, const char* text) noexcept nogil:
    add_line(world, text)


cdef void trace_number(World* world, const char* format_, uint64_t number) noexcept nogil:
    """`format_` has one %llu."""
    cdef char line[LINE]
    snprintf(line, LINE, format_, <unsigned long long>number)
    add_line(world, line)


cdef void trace_world(World* world) noexcept nogil:
    cdef char line[LINE]
    snprintf(line, LINE, b"world: image %u stripes (%llu bytes), device %u stripes, %u queues of "
             b"%u, %u buffers, features %#x", world.geometry.image_stripes,
             <unsigned long long>world.geometry.image_bytes, world.geometry.device_stripes,
             world.geometry.queues, world.geometry.depth, world.geometry.buffers, world.features)
    add_line(world, line)


# -- names ---------------------------------------------------------------------------------------

cdef inline const char* either(bint first, const char* a, const char* b) noexcept nogil:
    return a if first else b


cdef const char* op_name(uint8_t op) noexcept nogil:
    if op == OP_READ:
        return b"READ"
    if op == OP_WRITE:
        return b"WRITE"
    if op == OP_FLUSH:
        return b"FLUSH"
    return b"DISCARD" if op == OP_DISCARD else b"WRITE_ZEROES"


cdef const char* message_name(uint8_t message) noexcept nogil:
    if message == MSG_WANT:
        return b"WANT"
    if message == MSG_HYDRATE:
        return b"HYDRATE"
    if message == MSG_CLAIM:
        return b"CLAIM"
    if message == MSG_WRITTEN:
        return b"WRITTEN"
    if message == MSG_JOIN:
        return b"JOIN"
    if message == MSG_GRANT:
        return b"GRANT"
    return b"DONE" if message == MSG_DONE else b"?"


cdef const char* call_name(uint8_t call) noexcept nogil:
    if call == HOST_FIND_TABLE:
        return b"find the table"
    if call == HOST_BEFORE_WRITE:
        return b"take the device id"
    if call == HOST_ZERO_TAIL:
        return b"zero the tail"
    if call == HOST_CREATED:
        return b"fsync the folder"
    if call == HOST_DROP_TABLE:
        return b"drop the table found"
    if call == HOST_MAKE_TABLE:
        return b"make a table under its temporary name"
    if call == HOST_LATCH_TABLE:
        return b"latch the table found"
    if call == HOST_MAP_TABLE:
        return b"take over the table found"
    return b"publish the table" if call == HOST_PUBLISH_TABLE else b"unlink the table"


cdef int put_owner(char* into, int room, uint8_t owner) noexcept nogil:
    if owner < MAX_QUEUES:
        return snprintf(into, room, b"queue %u", owner)
    if owner == OWNER_HYDRATOR:
        return snprintf(into, room, b"hydrator")
    return snprintf(into, room, either(owner == OWNER_LIFECYCLE, b"lifecycle", b"nobody's"))


cdef void put_action(char* into, int room, const Action* action) noexcept nogil:
    """What an I/O does: direction, place, memory."""
    cdef const char* verb = either(action.kind == ACT_WRITE_BASE, b"write", b"read")
    if action.kind == ACT_ZERO_BASE or action.kind == ACT_DISCARD_BASE:
        verb = either(action.kind == ACT_ZERO_BASE, b"zero", b"discard")
    cdef uint64_t offset = action.offset
    cdef char memory[32]
    if action.kind == ACT_SYNC_BASE:
        snprintf(into, room, b"fdatasync")
        return
    if action.memory == MEM_REQUEST:
        snprintf(memory, 32, b"tag %u", action.index)
    elif action.memory == MEM_STRIPE:
        snprintf(memory, 32, b"buffer %u", action.index)
    else:
        snprintf(memory, 32, either(action.memory == MEM_PAGE, b"page %u", b"scratch %u"),
                 action.index)
    if action.kind != ACT_READ_IMAGE and offset < DATA_OFFSET:
        snprintf(into, room, b"%s metadata at %#llx, %u bytes, %s", verb,
                 <unsigned long long>offset, action.length, memory)
        return
    if action.kind != ACT_READ_IMAGE:
        offset -= DATA_OFFSET
    snprintf(into, room, b"%s %s stripe %llu cells %llu..%llu, %s%s", verb,
             either(action.kind == ACT_READ_IMAGE, b"image", b"base"),
             <unsigned long long>(offset // STRIPE_BYTES),
             <unsigned long long>(offset % STRIPE_BYTES // CELL_BYTES),
             <unsigned long long>((offset % STRIPE_BYTES + action.length - 1) // CELL_BYTES),
             memory, either(action.dsync, b" dsync", b""))


# -- lines ---------------------------------------------------------------------------------------

cdef void trace_request(World* world, uint16_t queue, uint16_t tag) noexcept nogil:
    cdef char line[LINE]
    cdef const GuestRequest* guest = &world.guests[queue][tag]
    cdef uint32_t stripe = world.geometry.hot[guest.first // CELLS]
    if guest.op == OP_FLUSH:
        snprintf(line, LINE, b"guest -> queue %u tag %u: FLUSH", queue, tag)
    else:
        snprintf(line, LINE, b"guest -> queue %u tag %u: %s%s stripe %u cells %u..%u (serial %u)",
                 queue, tag, op_name(guest.op), either(guest.fua, b" FUA", b""),
                 stripe, guest.first % CELLS, guest.first % CELLS + guest.count - 1, guest.serial)
    add_line(world, line)


cdef void trace_end(World* world, uint16_t queue, uint16_t tag, int32_t result) noexcept nogil:
    cdef char line[LINE]
    snprintf(line, LINE, b"queue %u -> guest tag %u: %s ends, %d", queue, tag,
             op_name(world.guests[queue][tag].op), result)
    add_line(world, line)


cdef void trace_io(World* world, uint8_t owner, const Action* action) noexcept nogil:
    cdef char line[LINE]
    cdef int length = put_owner(line, LINE, owner)
    length += snprintf(line + length, LINE - length, b": ")
    put_action(line + length, LINE - length, action)
    add_line(world, line)


cdef void trace_io_end(World* world, uint8_t owner, const Action* action, int32_t result,
                       const char* how) noexcept nogil:
    cdef char line[LINE]
    cdef int length = put_owner(line, LINE, owner)
    length += snprintf(line + length, LINE - length, b": %s: ", how)
    put_action(line + length, LINE - length, action)
    length += <int>strlen(line + length)
    snprintf(line + length, LINE - length, b": %d", result)
    add_line(world, line)


cdef void trace_sent(World* world, uint8_t owner, const Action* action,
                     bint lost) noexcept nogil:
    cdef char line[LINE]
    cdef const char* how = either(lost, b" (its doorbell is lost)", b"")
    if owner == OWNER_HYDRATOR:
        snprintf(line, LINE, b"hydrator -> queue %u: %s tag %u stripe %u, %d%s", action.queue,
                 message_name(action.message), action.tag, action.stripe, action.result, how)
    else:
        snprintf(line, LINE, b"queue %u -> hydrator: %s tag %u stripe %u, %d%s", owner,
                 message_name(action.message), action.tag, action.stripe, action.result, how)
    add_line(world, line)


cdef void trace_taken(World* world, uint16_t queue, bint up, const Mail* mail) noexcept nogil:
    cdef char line[LINE]
    snprintf(line, LINE, either(up, b"hydrator takes queue %u's %s tag %u stripe %u, %d",
                                b"queue %u takes %s tag %u stripe %u, %d"),
             queue, message_name(mail.kind), mail.tag, mail.stripe, mail.result)
    add_line(world, line)


cdef void trace_host(World* world, uint8_t call) noexcept nogil:
    cdef char line[LINE]
    snprintf(line, LINE, b"lifecycle: %s", call_name(call))
    add_line(world, line)


cdef void trace_violation(World* world, const char* name) noexcept nogil:
    cdef char line[LINE]
    snprintf(line, LINE, b"VIOLATION: %s (%#x, %#x, %#x, %#x)", name, world.detail[0],
             world.detail[1], world.detail[2], world.detail[3])
    add_line(world, line)
