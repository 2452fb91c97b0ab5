"""Actions into SQEs, CQEs into events: the only file of the data plane that does I/O.

Invariants
- One operation a token is in flight; its record lives in `ops` until its event is made.
- An event says all or nothing: short transfers are continued here, EINTR and EAGAIN are retried a
  bounded number of times, a transfer that stops moving is EIO.
- A base range that was zeroed reads zeros: never by a discard. A file that may give up the space
  is punched, else it is ZERO_RANGE; what the base cannot do is done by writing zeros.
- A discard that the base cannot do has succeeded.
- What an image read leaves of its buffer behind `minimum` is zeros, never what was there before.
- Image, base, sync and ublkc descriptors are fixed files: the open file description that carries
  the base's lock, and ublkc, are held until the last request of this ring has landed, whatever
  becomes of the process (that is the fence).
"""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from ublk_ubi._core cimport Action
from ublk_ubi._uring cimport io_uring, io_uring_cqe, io_uring_sqe

cdef enum RingFile:
    FILE_IMAGE = 0
    FILE_BASE = 1
    FILE_SYNC = 2                  # the base again: writeback errors are told once a description
    FILE_UBLKC = 3
    FILE_COUNT = 4

# How a base range is zeroed.
cdef enum ZeroMethod:
    ZERO_PUNCH = 1
    ZERO_RANGE = 2
    ZERO_WRITE = 3

# The top byte of user_data says what a CQE is; the rest is a token, a tag or nothing.
cdef enum CqeKind:
    CQE_OP = 1
    CQE_UBLK = 2
    CQE_DOORBELL = 3
    CQE_DOORBELL_FAILED = 4
    CQE_WAKE = 5

cdef struct Op:
    uint64_t address
    uint64_t offset
    uint32_t length                # bytes to transfer
    uint32_t needed                # bytes that must be there
    uint32_t filled                # bytes of the buffer that the event promises
    uint32_t done
    uint8_t kind                   # ActionKind, 0 when free
    uint8_t dsync
    uint8_t retries
    uint8_t fixed                  # `address` counts within registered buffer `index`
    uint8_t unmap
    uint8_t method                 # ZeroMethod
    uint16_t index

cdef struct RingMemory:
    uint8_t* start
    uint64_t stride                # bytes between buffers

cdef struct Ring:
    io_uring uring
    Op* ops                        # [op_count], by token
    uint32_t op_count
    RingMemory memory[5]           # by Memory
    const uint8_t* registered      # by index, 1: a request's pages are in their slot; or NULL
    const uint8_t* zeros           # to be written where a range cannot be zeroed otherwise
    uint32_t zeros_bytes
    uint32_t block                 # bytes: where a short transfer may be continued
    bint registered_fd             # io_uring_enter finds the ring without looking for its file
    bint base_is_block
    bint lacks_punch               # the base has said so
    bint lacks_range
    uint64_t wake_value

# 0 or -errno. `files`: FILE_COUNT descriptors, -1 for none. Called by the thread that submits.
cdef int ring_init(Ring* ring, uint32_t entries, Op* ops, uint32_t op_count,
                   const int* files) noexcept nogil
cdef void ring_exit(Ring* ring) noexcept nogil
# All descriptors go at once, as nothing is in flight: the kernel takes a ring down some time later.
cdef void ring_drop_files(Ring* ring) noexcept nogil
cdef void ring_action(Ring* ring, const Action* action) noexcept nogil
# True, and *result, when the operation has ended; False when it goes on.
cdef bint ring_op_done(Ring* ring, uint32_t token, int32_t res, int32_t* result) noexcept nogil
# `address`: plain copy: the tag's buffer. `auto_buffer`: zero copy: where its pages are registered.
cdef void ring_ublk(Ring* ring, uint32_t command, uint16_t queue, uint16_t tag, int32_t result,
                    uint64_t address, uint64_t auto_buffer) noexcept nogil
# A table of `count` empty slots for requests' pages; 0 or -errno.
cdef int ring_register_requests(Ring* ring, uint32_t count) noexcept nogil
# The image's descriptor goes; a read of it that is submitted later fails with -EBADF.
cdef void ring_drop_image(Ring* ring) noexcept nogil
cdef void ring_doorbell(Ring* ring, int target) noexcept nogil
cdef void ring_arm_wake(Ring* ring, int event_fd) noexcept nogil
# Submit, and wait for a CQE at most `timeout_ns` (0: do not wait, 2^64 − 1: for ever).
cdef void ring_enter(Ring* ring, uint64_t timeout_ns) noexcept nogil


cdef inline uint8_t cqe_kind(uint64_t user_data) noexcept nogil:
    return <uint8_t>(user_data >> 56)


cdef inline uint32_t cqe_index(uint64_t user_data) noexcept nogil:
    return <uint32_t>user_data
