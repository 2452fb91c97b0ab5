"""The io_uring side of the data plane; what it keeps is in _ring.pxd."""

from libc.errno cimport EAGAIN, EBUSY, EINTR, EINVAL, EIO, ENOSYS, ENOTTY, EOPNOTSUPP, ETIME
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

from ublk_ubi._abi cimport ubi_ublk_io_cmd
from ublk_ubi._atomic cimport ensure
from ublk_ubi._core cimport (
    ACT_DISCARD_BASE, ACT_READ_BASE, ACT_READ_IMAGE, ACT_SYNC_BASE, ACT_WRITE_BASE, ACT_ZERO_BASE,
    MEM_REQUEST, Action,
)
from ublk_ubi._uring cimport (
    FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, IORING_FSYNC_DATASYNC,
    IORING_OP_READ, IORING_OP_READ_FIXED, IORING_OP_URING_CMD, IORING_OP_WRITE,
    IORING_OP_WRITE_FIXED, IORING_SETUP_COOP_TASKRUN, IORING_SETUP_CQSIZE,
    IORING_SETUP_DEFER_TASKRUN, IORING_SETUP_SINGLE_ISSUER, IORING_SETUP_SUBMIT_ALL,
    IOSQE_CQE_SKIP_SUCCESS, IOSQE_FIXED_FILE, __kernel_timespec, enter, get_sqe, io_uring_params,
    io_uring_prep_fallocate, io_uring_prep_fsync, io_uring_prep_msg_ring, io_uring_prep_read,
    io_uring_prep_rw, io_uring_prep_write, io_uring_queue_exit, io_uring_queue_init_params,
    io_uring_register_buffers_sparse, io_uring_register_files, io_uring_register_files_update,
    io_uring_register_iowq_max_workers, io_uring_register_ring_fd, io_uring_sqe, io_uring_submit,
    io_uring_unregister_files, prep_discard, sq_init, sqe_set_dsync,
)

cdef enum:
    SECTOR = 512
    DIRECT_ALIGNMENT = 4096        # suits every file and device that O_DIRECT works on here
    MAX_RETRIES = 100


cdef int ring_init(Ring* ring, uint32_t entries, Op* ops, uint32_t op_count,
                   const int* files) noexcept nogil:
    """`entries` SQEs, one at least for every operation in flight at once; four CQEs for each."""
    cdef io_uring_params params
    cdef unsigned workers[2]
    cdef int status
    memset(ring, 0, sizeof(Ring))
    memset(ops, 0, op_count * sizeof(Op))
    ring.ops = ops
    ring.op_count = op_count
    memset(&params, 0, sizeof(params))
    params.flags = (IORING_SETUP_CQSIZE | IORING_SETUP_SUBMIT_ALL | IORING_SETUP_COOP_TASKRUN
                    | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN)
    params.cq_entries = 4 * entries
    ring.block = SECTOR
    status = io_uring_queue_init_params(entries, &ring.uring, &params)
    if status < 0:
        return status
    status = io_uring_register_files(&ring.uring, files, FILE_COUNT)
    if status < 0:
        io_uring_queue_exit(&ring.uring)
        return status
    sq_init(&ring.uring)
    # A saving only; the ring works without.
    ring.registered_fd = io_uring_register_ring_fd(&ring.uring) == 1
    # Reads of a stuck image may block as many io-wq workers as there are operations: leave one over
    # for the fdatasync that others wait for.
    workers[0] = op_count + 1
    workers[1] = op_count + 1
    status = io_uring_register_iowq_max_workers(&ring.uring, workers)
    if status < 0:
        io_uring_queue_exit(&ring.uring)
    return status


cdef void ring_exit(Ring* ring) noexcept nogil:
    io_uring_queue_exit(&ring.uring)


cdef void ring_drop_files(Ring* ring) noexcept nogil:
    """Where that fails, for want of memory, they go with the ring."""
    io_uring_unregister_files(&ring.uring)


cdef inline uint64_t tagged(uint8_t kind, uint32_t index) noexcept nogil:
    return (<uint64_t>kind << 56) | index


cdef io_uring_sqe* make_room(Ring* ring) noexcept nogil:
    """Submit a full queue."""
    cdef io_uring_sqe* sqe
    io_uring_submit(&ring.uring)
    sqe = get_sqe(&ring.uring)
    ensure(sqe != NULL, b"a submitted queue has room")
    return sqe


cdef inline io_uring_sqe* next_sqe(Ring* ring) noexcept nogil:
    """A free SQE, all zero: io_uring_prep_… clears what it does not set up to liburing 2.5 only."""
    cdef io_uring_sqe* sqe = get_sqe(&ring.uring)
    if sqe == NULL:
        sqe = make_room(ring)
    memset(sqe, 0, sizeof(io_uring_sqe))
    return sqe


# -- operations ----------------------------------------------------------------------------------

cdef inline void prep_transfer(io_uring_sqe* sqe, const Op* op, int file,
                               bint write) noexcept nogil:
    cdef int opcode
    if op.fixed:
        opcode = IORING_OP_WRITE_FIXED if write else IORING_OP_READ_FIXED
    else:
        opcode = IORING_OP_WRITE if write else IORING_OP_READ
    io_uring_prep_rw(opcode, sqe, file, <void*>(op.address + op.done), op.length - op.done,
                     op.offset + op.done)
    sqe.buf_index = op.index
    if op.dsync:
        sqe_set_dsync(sqe)


cdef void prep_zero(Ring* ring, io_uring_sqe* sqe, Op* op) noexcept nogil:
    """By the best way that the base is not known to lack."""
    cdef uint32_t left = op.length - op.done
    cdef uint64_t offset = op.offset + op.done
    if op.unmap and not ring.base_is_block and not ring.lacks_punch:
        op.method = ZERO_PUNCH
        io_uring_prep_fallocate(sqe, FILE_BASE, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset,
                                left)
    elif not ring.lacks_range:
        op.method = ZERO_RANGE
        io_uring_prep_fallocate(sqe, FILE_BASE, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset,
                                left)
    else:
        op.method = ZERO_WRITE
        io_uring_prep_write(sqe, FILE_BASE, ring.zeros,
                            left if left < ring.zeros_bytes else ring.zeros_bytes, offset)


cdef void submit_op(Ring* ring, uint32_t token) noexcept nogil:
    """The part of an operation that is left."""
    cdef Op* op = &ring.ops[token]
    cdef io_uring_sqe* sqe = next_sqe(ring)
    if op.kind == ACT_READ_IMAGE:
        prep_transfer(sqe, op, FILE_IMAGE, False)
    elif op.kind == ACT_READ_BASE:
        prep_transfer(sqe, op, FILE_BASE, False)
    elif op.kind == ACT_WRITE_BASE:
        prep_transfer(sqe, op, FILE_BASE, True)
    elif op.kind == ACT_ZERO_BASE:
        prep_zero(ring, sqe, op)
    elif op.kind == ACT_DISCARD_BASE:
        if ring.base_is_block:
            prep_discard(sqe, FILE_BASE, op.offset, op.length)
        else:
            io_uring_prep_fallocate(sqe, FILE_BASE, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                                    op.offset, op.length)
    else:
        ensure(op.kind == ACT_SYNC_BASE, b"an operation is I/O on image or base")
        io_uring_prep_fsync(sqe, FILE_SYNC, IORING_FSYNC_DATASYNC)
    sqe.flags |= IOSQE_FIXED_FILE
    sqe.user_data = tagged(CQE_OP, token)


cdef void ring_action(Ring* ring, const Action* action) noexcept nogil:
    """Start an image, base or sync action; its end is told by ring_op_done."""
    cdef Op* op
    cdef const RingMemory* memory = &ring.memory[action.memory]
    ensure(action.token < ring.op_count, b"a token is below the number of operations")
    op = &ring.ops[action.token]
    ensure(op.kind == 0, b"one operation a token is in flight")
    memset(op, 0, sizeof(Op))
    op.kind = action.kind
    op.dsync = action.dsync
    op.unmap = action.unmap
    op.offset = action.offset
    if (action.memory == MEM_REQUEST and ring.registered != NULL
            and ring.registered[action.index]):
        op.fixed = True
        op.index = <uint16_t>action.index
    else:
        op.address = <uint64_t>memory.start + action.index * memory.stride
    op.length = action.length
    op.needed = action.length
    op.filled = action.length
    if action.kind == ACT_READ_IMAGE and action.minimum < action.length:
        # O_DIRECT reads whole blocks, also across the image's end.
        op.needed = action.minimum
        op.length = (action.minimum + DIRECT_ALIGNMENT - 1) & ~<uint32_t>(DIRECT_ALIGNMENT - 1)
        ensure(op.length <= action.length, b"a stripe is a multiple of the alignment")
    submit_op(ring, action.token)


cdef bint again(Ring* ring, Op* op, int32_t res) noexcept nogil:
    """Whether an error is one to be met by another try, or by another way."""
    if (res == -EINTR or res == -EAGAIN) and op.retries < MAX_RETRIES:
        op.retries += 1
        return True
    if res == -EOPNOTSUPP and op.kind == ACT_ZERO_BASE and op.method != ZERO_WRITE:
        if op.method == ZERO_PUNCH:
            ring.lacks_punch = True
        else:
            ring.lacks_range = True
        return True
    return False


cdef inline int32_t failure(const Op* op, int32_t res) noexcept nogil:
    """What the engine is told of an error."""
    if res == -EINTR or res == -EAGAIN:
        return -EIO
    if op.kind == ACT_DISCARD_BASE and (
            res == -EOPNOTSUPP or res == -EINVAL or res == -ENOTTY or res == -ENOSYS):
        return 0
    return res


cdef inline bint moves_bytes(const Op* op) noexcept nogil:
    """Whether a result counts bytes."""
    return op.kind <= ACT_WRITE_BASE or op.method == ZERO_WRITE


cdef inline bint moved(Ring* ring, Op* op, int32_t res) noexcept nogil:
    """Whether a short transfer is to be continued. Direct I/O goes on at a block; the few bytes
    before are moved once more."""
    cdef uint32_t before = op.done
    op.done += res
    if op.done >= op.needed:
        return False
    op.done -= op.done % ring.block
    return op.done > before


cdef bint ring_op_done(Ring* ring, uint32_t token, int32_t res, int32_t* result) noexcept nogil:
    """A CQE of an operation has come."""
    cdef Op* op
    ensure(token < ring.op_count, b"a token is below the number of operations")
    op = &ring.ops[token]
    ensure(op.kind != 0, b"a CQE is of an operation in flight")
    if res < 0:
        if again(ring, op, res):
            submit_op(ring, token)
            return False
        result[0] = failure(op, res)
    elif not moves_bytes(op):
        result[0] = 0
    elif moved(ring, op, res):
        submit_op(ring, token)
        return False
    elif op.done < op.needed:
        result[0] = -EIO
    else:
        if op.filled > op.needed:
            memset(<void*>(op.address + op.needed), 0, op.filled - op.needed)
        result[0] = <int32_t>op.filled
    op.kind = 0
    return True


# -- ublk, doorbells -----------------------------------------------------------------------------

cdef void ring_ublk(Ring* ring, uint32_t command, uint16_t queue, uint16_t tag, int32_t result,
                    uint64_t address, uint64_t auto_buffer) noexcept nogil:
    """FETCH, or COMMIT with the result of the tag's request."""
    cdef io_uring_sqe* sqe = next_sqe(ring)
    cdef ubi_ublk_io_cmd* io_cmd = <ubi_ublk_io_cmd*>sqe.cmd
    sqe.opcode = IORING_OP_URING_CMD
    sqe.flags = IOSQE_FIXED_FILE
    sqe.fd = FILE_UBLKC
    sqe.cmd_op = command
    sqe.addr = auto_buffer
    sqe.user_data = tagged(CQE_UBLK, tag)
    io_cmd.q_id = queue
    io_cmd.tag = tag
    io_cmd.result = result
    io_cmd.addr = address


cdef int ring_register_requests(Ring* ring, uint32_t count) noexcept nogil:
    """Zero copy: the kernel puts a request's pages into its slot, and takes them out again."""
    return io_uring_register_buffers_sparse(&ring.uring, count)


cdef void ring_drop_image(Ring* ring) noexcept nogil:
    """Reads that are under way keep the file until they end."""
    cdef int none = -1
    cdef int status = io_uring_register_files_update(&ring.uring, FILE_IMAGE, &none, 1)
    ensure(status == 1, b"a registered file can be taken out")


cdef void ring_doorbell(Ring* ring, int target) noexcept nogil:
    """Wake the thread that waits in the ring `target`. May be lost: its tick comes anyway."""
    cdef io_uring_sqe* sqe = next_sqe(ring)
    io_uring_prep_msg_ring(sqe, target, 0, tagged(CQE_DOORBELL, 0), 0)
    sqe.flags |= IOSQE_CQE_SKIP_SUCCESS
    sqe.user_data = tagged(CQE_DOORBELL_FAILED, 0)


cdef void ring_arm_wake(Ring* ring, int event_fd) noexcept nogil:
    """CQE_WAKE once the control thread writes to `event_fd`."""
    cdef io_uring_sqe* sqe = next_sqe(ring)
    io_uring_prep_read(sqe, event_fd, &ring.wake_value, 8, 0)
    sqe.user_data = tagged(CQE_WAKE, 0)


cdef void ring_enter(Ring* ring, uint64_t timeout_ns) noexcept nogil:
    """One system call: submit all, wait for one, run the completions' task work."""
    cdef __kernel_timespec ts
    cdef int status
    if timeout_ns == 0:
        status = enter(&ring.uring, ring.registered_fd, 0, NULL)
    elif timeout_ns == <uint64_t>-1:
        status = enter(&ring.uring, ring.registered_fd, 1, NULL)
    else:
        ts.tv_sec = timeout_ns // 1000000000
        ts.tv_nsec = timeout_ns % 1000000000
        status = enter(&ring.uring, ring.registered_fd, 1, &ts)
    # EBADR says that CQEs were dropped: nobody can tell any more which requests are in flight.
    ensure(status >= 0 or status == -ETIME or status == -EINTR or status == -EAGAIN
           or status == -EBUSY, b"io_uring_enter works, and drops no completion")
