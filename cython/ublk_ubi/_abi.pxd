# The ublk kernel ABI for the data plane: what it needs of ublk_abi.h, and nothing that runs.
#
# 64-bit and above-INT_MAX constants are declared as const values, the others as enums, which
# Cython may use as case labels and array lengths.

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t


# ---- the request ring: structures and opcodes on /dev/ublkcN --------------------------------
cdef extern from "ublk_abi.h" nogil:
    # Mapped read-only from ublkc, one a tag; valid from the CQE of FETCH/COMMIT to the next COMMIT.
    struct ubi_ublk_io_desc:
        uint32_t op_flags       # op: low 8 bits (ubi_ublk_io_op); UBI_UBLK_IO_F_x: the others
        uint32_t nr_sectors     # 512 B each; 0 in a FLUSH
        uint64_t start_sector   # UINT64_MAX in a FLUSH
        uint64_t addr

    # Written into sqe->cmd (offset 48 of the SQE).
    struct ubi_ublk_io_cmd:
        uint16_t q_id
        uint16_t tag
        int32_t result          # COMMIT: exactly nr_sectors << 9, or -errno
        uint64_t addr           # plain copy: the tag's buffer; otherwise 0

    const uint32_t UBI_U_IO_FETCH_REQ               # sqe->cmd_op
    const uint32_t UBI_U_IO_COMMIT_AND_FETCH_REQ
    const uint32_t UBI_U_IO_NEED_GET_DATA
    const uint32_t UBI_U_IO_REGISTER_IO_BUF
    const uint32_t UBI_U_IO_UNREGISTER_IO_BUF

    enum:
        UBI_UBLK_IO_RES_OK                          # cqe->res: a request is there
        UBI_UBLK_IO_RES_NEED_GET_DATA
        UBI_UBLK_IO_RES_ABORT                       # cqe->res: stopping; do not fetch again


# ---- requests: what the descriptor says ------------------------------------------------------
cdef extern from "ublk_abi.h" nogil:
    uint8_t ubi_ublk_io_op(const ubi_ublk_io_desc *desc) noexcept

    enum:
        UBI_UBLK_IO_OP_READ
        UBI_UBLK_IO_OP_WRITE
        UBI_UBLK_IO_OP_FLUSH
        UBI_UBLK_IO_OP_DISCARD
        UBI_UBLK_IO_OP_WRITE_SAME
        UBI_UBLK_IO_OP_WRITE_ZEROES

    enum:
        UBI_UBLK_IO_F_FUA
        UBI_UBLK_IO_F_NOUNMAP
        UBI_UBLK_IO_F_NEED_REG_BUF                  # AUTO_BUF_REG fell back: use USER_COPY

    enum:
        UBI_SECTOR_SHIFT
        UBI_SECTOR_SIZE


# ---- positions on /dev/ublkcN ----------------------------------------------------------------
cdef extern from "ublk_abi.h" nogil:
    enum:
        UBI_UBLK_MAX_QUEUE_DEPTH
        UBI_UBLK_MAX_NR_QUEUES

    # mmap(PROT_READ) of a queue's descriptors; page_size in bytes, a power of two.
    size_t ubi_ublk_desc_map_len(uint32_t depth, size_t page_size) noexcept
    uint64_t ubi_ublk_desc_map_offset(uint16_t q_id, size_t page_size) noexcept

    # USER_COPY: pread takes a WRITE's data from here, pwrite fills a READ's.
    const uint64_t UBI_UBLK_IO_BUF_OFFSET
    enum:
        UBI_UBLK_TAG_OFF
        UBI_UBLK_QID_OFF
    uint64_t ubi_ublk_user_copy_pos(uint16_t q_id, uint16_t tag, uint32_t offset) noexcept


# ---- AUTO_BUF_REG: sqe->addr of FETCH and COMMIT ---------------------------------------------
cdef extern from "ublk_abi.h" nogil:
    enum:
        UBI_UBLK_AUTO_BUF_REG_FALLBACK
    uint64_t ubi_ublk_auto_buf_reg_addr(uint16_t index, uint8_t flags) noexcept


# ---- granted features: ADD_DEV's answer ------------------------------------------------------
cdef extern from "ublk_abi.h" nogil:
    const uint64_t UBI_UBLK_F_SUPPORT_ZERO_COPY
    const uint64_t UBI_UBLK_F_USER_RECOVERY
    const uint64_t UBI_UBLK_F_USER_RECOVERY_REISSUE
    const uint64_t UBI_UBLK_F_USER_COPY
    const uint64_t UBI_UBLK_F_UPDATE_SIZE
    const uint64_t UBI_UBLK_F_AUTO_BUF_REG
    const uint64_t UBI_UBLK_F_QUIESCE
    const uint64_t UBI_UBLK_F_PER_IO_DAEMON
    const uint64_t UBI_UBLK_F_BUF_REG_OFF_DAEMON
