"""What the data plane uses of liburing (2.3 or later) and of the system's headers."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "<liburing.h>" nogil:
    struct io_uring_sqe:
        uint8_t opcode
        uint8_t flags
        uint16_t ioprio
        int32_t fd
        uint64_t off
        uint32_t cmd_op            # shares its bytes with off
        uint64_t addr
        uint32_t len
        uint64_t user_data
        uint16_t buf_index
        uint8_t cmd[0]             # byte 48: 16 bytes in a 64-byte SQE

    struct io_uring_cqe:
        uint64_t user_data
        int32_t res
        uint32_t flags

    struct io_uring:
        uint32_t features
        int ring_fd

    struct io_uring_params:
        uint32_t cq_entries
        uint32_t flags
        uint32_t features

    struct __kernel_timespec:
        int64_t tv_sec
        int64_t tv_nsec

    enum:
        IORING_OP_READ
        IORING_OP_READ_FIXED
        IORING_OP_URING_CMD
        IORING_OP_WRITE
        IORING_OP_WRITE_FIXED
        IORING_SETUP_CQSIZE
        IORING_SETUP_SUBMIT_ALL
        IORING_SETUP_COOP_TASKRUN
        IORING_SETUP_SINGLE_ISSUER
        IORING_SETUP_DEFER_TASKRUN
        IORING_FSYNC_DATASYNC
        IOSQE_FIXED_FILE
        IOSQE_CQE_SKIP_SUCCESS

    int io_uring_queue_init_params(unsigned entries, io_uring* ring, io_uring_params* p) noexcept
    void io_uring_queue_exit(io_uring* ring) noexcept
    int io_uring_register_files(io_uring* ring, const int* files, unsigned count) noexcept
    int io_uring_unregister_files(io_uring* ring) noexcept
    int io_uring_register_files_update(io_uring* ring, unsigned offset, const int* files,
                                       unsigned count) noexcept
    int io_uring_register_buffers_sparse(io_uring* ring, unsigned count) noexcept
    int io_uring_register_ring_fd(io_uring* ring) noexcept
    int io_uring_register_iowq_max_workers(io_uring* ring, unsigned* values) noexcept
    int io_uring_submit(io_uring* ring) noexcept
    unsigned io_uring_cq_ready(const io_uring* ring) noexcept
    void io_uring_cq_advance(io_uring* ring, unsigned count) noexcept
    void io_uring_prep_rw(int op, io_uring_sqe* sqe, int fd, const void* addr, unsigned length,
                          uint64_t offset) noexcept
    void io_uring_prep_read(io_uring_sqe* sqe, int fd, void* buffer, unsigned length,
                            uint64_t offset) noexcept
    void io_uring_prep_write(io_uring_sqe* sqe, int fd, const void* buffer, unsigned length,
                             uint64_t offset) noexcept
    void io_uring_prep_fallocate(io_uring_sqe* sqe, int fd, int mode, uint64_t offset,
                                 uint64_t length) noexcept
    void io_uring_prep_fsync(io_uring_sqe* sqe, int fd, unsigned flags) noexcept
    void io_uring_prep_msg_ring(io_uring_sqe* sqe, int fd, unsigned length, uint64_t data,
                                unsigned flags) noexcept

cdef extern from *:
    """
    #include <errno.h>
    #include <linux/capability.h>
    #include <linux/falloc.h>
    #include <string.h>
    #include <sys/ioctl.h>
    #include <sys/mman.h>
    #include <sys/prctl.h>
    #include <sys/syscall.h>
    #include <sys/uio.h>
    #include <time.h>
    #include <unistd.h>
    #ifndef PR_SET_IO_FLUSHER
    #define PR_SET_IO_FLUSHER 57
    #endif
    #ifndef RWF_DSYNC
    #define RWF_DSYNC 2
    #endif
    /* include/uapi/linux/blkdev.h (6.12) */
    #ifndef BLOCK_URING_CMD_DISCARD
    #define BLOCK_URING_CMD_DISCARD _IO(0x12, 0)
    #endif
    /* block/ioctl.c, blkdev_uring_cmd: start in addr, length in addr3 (byte 48). */
    static inline void ubi_prep_discard(struct io_uring_sqe *sqe, int fd, uint64_t start,
                                        uint64_t length)
    {
        io_uring_prep_rw(IORING_OP_URING_CMD, sqe, fd, NULL, 0, 0);
        sqe->cmd_op = BLOCK_URING_CMD_DISCARD;
        sqe->addr = start;
        memcpy(sqe->cmd, &length, sizeof(length));
    }
    static inline void ubi_sqe_set_dsync(struct io_uring_sqe *sqe) { sqe->rw_flags = RWF_DSYNC; }
    /* What each turn of a thread does with its ring (io_uring(7)), which liburing has made, and may
       submit to as well. Its own calls for this take thrice as many instructions. */
    #ifndef IORING_SETUP_NO_SQARRAY
    #define IORING_SETUP_NO_SQARRAY (1U << 16)
    #endif
    /* Row i of the queue is SQE i, for ever. */
    static inline void ubi_sq_init(struct io_uring *ring)
    {
        unsigned i;
        if (!(ring->flags & IORING_SETUP_NO_SQARRAY))
            for (i = 0; i < ring->sq.ring_entries; i++)
                ring->sq.array[i] = i;
    }
    /* A free one, its bytes as the last use left them; NULL: submit first. */
    static inline struct io_uring_sqe *ubi_sqe(struct io_uring *ring)
    {
        struct io_uring_sq *sq = &ring->sq;
        unsigned tail = sq->sqe_tail;
        if (tail - io_uring_smp_load_acquire(sq->khead) >= sq->ring_entries)
            return NULL;
        sq->sqe_tail = tail + 1;
        return &sq->sqes[tail & sq->ring_mask];
    }
    static inline int ubi_enter(struct io_uring *ring, int registered, unsigned wait,
                                const struct __kernel_timespec *ts)
    {
        struct io_uring_sq *sq = &ring->sq;
        struct io_uring_getevents_arg arg = { .ts = (uint64_t)(uintptr_t)ts };
        unsigned flags = IORING_ENTER_GETEVENTS | (ts ? IORING_ENTER_EXT_ARG : 0)
                         | (registered ? IORING_ENTER_REGISTERED_RING : 0);
        long status;
        sq->sqe_head = sq->sqe_tail;
        io_uring_smp_store_release(sq->ktail, sq->sqe_tail);
        status = syscall(__NR_io_uring_enter, registered ? ring->enter_ring_fd : ring->ring_fd,
                         sq->sqe_tail - IO_URING_READ_ONCE(*sq->khead), wait, flags,
                         ts ? &arg : NULL, ts ? sizeof(arg) : 0);
        return status < 0 ? -errno : (int)status;
    }
    static inline struct io_uring_cqe *ubi_cqe(const struct io_uring *ring, unsigned i)
    {
        return &ring->cq.cqes[(*ring->cq.khead + i) & ring->cq.ring_mask];
    }
    static inline void ubi_drop_capabilities(void)
    {
        struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
        struct __user_cap_data_struct none[_LINUX_CAPABILITY_U32S_3] = {{0, 0, 0}};
        syscall(SYS_capset, &header, none);
    }
    static inline uint64_t ubi_now_ns(void)
    {
        struct timespec ts;
        clock_gettime(CLOCK_MONOTONIC, &ts);
        return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
    }
    """
    void sq_init "ubi_sq_init"(io_uring* ring) noexcept nogil      # once, before the first SQE
    io_uring_sqe* get_sqe "ubi_sqe"(io_uring* ring) noexcept nogil
    # Submit all, wait for `wait` CQEs or until `ts` is over; how many were submitted, or -errno.
    int enter "ubi_enter"(io_uring* ring, bint registered, unsigned wait,
                          const __kernel_timespec* ts) noexcept nogil
    io_uring_cqe* cqe_at "ubi_cqe"(const io_uring* ring, unsigned i) noexcept nogil
    void sqe_set_dsync "ubi_sqe_set_dsync"(io_uring_sqe* sqe) noexcept nogil
    void prep_discard "ubi_prep_discard"(io_uring_sqe* sqe, int fd, uint64_t start,
                                         uint64_t length) noexcept nogil
    void drop_capabilities "ubi_drop_capabilities"() noexcept nogil   # of this thread, all
    uint64_t now_ns "ubi_now_ns"() noexcept nogil
    long pread(int fd, void* buffer, size_t length, uint64_t offset) noexcept nogil
    long pwrite(int fd, const void* buffer, size_t length, uint64_t offset) noexcept nogil
    int prctl(int option, unsigned long a, unsigned long b, unsigned long c,
              unsigned long d) noexcept nogil
    enum:
        PR_SET_IO_FLUSHER
        PR_SET_NAME
        FALLOC_FL_KEEP_SIZE
        FALLOC_FL_PUNCH_HOLE
        FALLOC_FL_ZERO_RANGE
