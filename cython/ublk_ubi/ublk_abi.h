/*
 * The ublk kernel ABI, as of Linux 7.3.
 *
 * Stands here because a distribution's <linux/ublk_cmd.h> may be years older than the kernel that
 * runs. Every name has a prefix of its own, so that both headers may be included in one file:
 *
 *     UBI_U_CMD_x, UBI_U_IO_x   the kernel's UBLK_U_CMD_x, UBLK_U_IO_x
 *     UBI_UBLK_x                the kernel's UBLK_x (UBLKSRV_x where it says so)
 *     struct ubi_ublk_x         the kernel's struct ublk_x or ublksrv_x
 *
 * tests/unit/test_abi.py holds every line of this file against a kernel's own header, and
 * ublk_ubi/abi.py against this file. Source of the facts: include/uapi/linux/ublk_cmd.h,
 * drivers/block/ublk_drv.c.
 */
#ifndef UBLK_UBI_ABI_H
#define UBLK_UBI_ABI_H

#include <stddef.h>
#include <stdint.h>
#include <linux/ioctl.h>

/* ---- limits and positions ---------------------------------------------------------------- */

#define UBI_UBLK_MAX_QUEUE_DEPTH 4096
#define UBI_UBLK_MAX_NR_QUEUES 4096u
#define UBI_UBLK_FEATURES_LEN 8

/* Descriptors are mapped from the first offset (UBLKSRV_CMD_BUF_OFFSET), request data is copied at
 * the second (UBLKSRV_IO_BUF_OFFSET): pread/pwrite at base + (qid << 41) + (tag << 25) + byte. */
#define UBI_UBLK_CMD_BUF_OFFSET 0
#define UBI_UBLK_IO_BUF_OFFSET 0x80000000ull
#define UBI_UBLK_IO_BUF_BITS 25
#define UBI_UBLK_TAG_OFF 25
#define UBI_UBLK_TAG_BITS 16
#define UBI_UBLK_QID_OFF 41
#define UBI_UBLK_QID_BITS 12

#define UBI_SECTOR_SHIFT 9
#define UBI_SECTOR_SIZE (1u << UBI_SECTOR_SHIFT)

/* ---- features: GET_FEATURES, ADD_DEV's request and answer --------------------------------- */

#define UBI_UBLK_F_SUPPORT_ZERO_COPY (1ull << 0)      /* usable since 6.15 */
#define UBI_UBLK_F_URING_CMD_COMP_IN_TASK (1ull << 1)
#define UBI_UBLK_F_NEED_GET_DATA (1ull << 2)
#define UBI_UBLK_F_USER_RECOVERY (1ull << 3)          /* 6.1 */
#define UBI_UBLK_F_USER_RECOVERY_REISSUE (1ull << 4)  /* 6.1 */
#define UBI_UBLK_F_UNPRIVILEGED_DEV (1ull << 5)       /* 6.3 */
#define UBI_UBLK_F_CMD_IOCTL_ENCODE (1ull << 6)       /* 6.4 */
#define UBI_UBLK_F_USER_COPY (1ull << 7)              /* 6.5 */
#define UBI_UBLK_F_ZONED (1ull << 8)                  /* 6.6 */
#define UBI_UBLK_F_USER_RECOVERY_FAIL_IO (1ull << 9)  /* 6.13 */
#define UBI_UBLK_F_UPDATE_SIZE (1ull << 10)           /* 6.16 */
#define UBI_UBLK_F_AUTO_BUF_REG (1ull << 11)          /* 6.16 */
#define UBI_UBLK_F_QUIESCE (1ull << 12)               /* 6.16 */
#define UBI_UBLK_F_PER_IO_DAEMON (1ull << 13)         /* 6.16 */
#define UBI_UBLK_F_BUF_REG_OFF_DAEMON (1ull << 14)    /* 6.17 */
#define UBI_UBLK_F_BATCH_IO (1ull << 15)              /* 7.0 */
#define UBI_UBLK_F_INTEGRITY (1ull << 16)             /* 7.0 */
#define UBI_UBLK_F_SAFE_STOP_DEV (1ull << 17)         /* 7.0 */
#define UBI_UBLK_F_NO_AUTO_PART_SCAN (1ull << 18)     /* 7.0 */
#define UBI_UBLK_F_SHMEM_ZC (1ull << 19)              /* 7.1 */
#define UBI_UBLK_F_IO_DESC_SIZE (1ull << 20)          /* 7.3 */

/* ---- device states: ubi_ublk_ctrl_dev_info.state ------------------------------------------ */

#define UBI_UBLK_S_DEV_DEAD 0
#define UBI_UBLK_S_DEV_LIVE 1
#define UBI_UBLK_S_DEV_QUIESCED 2
#define UBI_UBLK_S_DEV_FAIL_IO 3

/* ---- structures --------------------------------------------------------------------------- */

/* A control command; lies in the SQE at offset 48 (SQE128 rings only). */
struct ubi_ublk_ctrl_cmd {
	uint32_t dev_id;       /* UINT32_MAX in ADD_DEV: the kernel chooses */
	uint16_t queue_id;     /* UINT16_MAX where no queue is meant */
	uint16_t len;          /* bytes at addr */
	uint64_t addr;
	uint64_t data[1];
	uint16_t dev_path_len; /* unprivileged devices only */
	uint16_t pad;
	uint32_t reserved;
};

struct ubi_ublk_ctrl_dev_info {
	uint16_t nr_hw_queues;
	uint16_t queue_depth;
	uint16_t state;
	uint16_t io_desc_size;     /* 0 before F_IO_DESC_SIZE: then 24 */
	uint32_t max_io_buf_bytes;
	uint32_t dev_id;
	int32_t ublksrv_pid;       /* -1: no server */
	uint32_t pad1;
	uint64_t flags;            /* wanted in, granted out */
	uint64_t ublksrv_flags;    /* ours alone: the driver stores it */
	uint32_t owner_uid;
	uint32_t owner_gid;
	uint64_t reserved1;
	uint64_t reserved2;
};

/* A request, written by the driver before the tag's FETCH or COMMIT completes. */
struct ubi_ublk_io_desc {
	uint32_t op_flags;     /* operation in the low 8 bits, UBI_UBLK_IO_F_x above */
	uint32_t nr_sectors;   /* 512 bytes each; 0 in a FLUSH */
	uint64_t start_sector; /* UINT64_MAX in a FLUSH */
	uint64_t addr;         /* the buffer given at FETCH or COMMIT */
};

/* An I/O command; lies in the SQE at offset 48. */
struct ubi_ublk_io_cmd {
	uint16_t q_id;
	uint16_t tag;
	int32_t result;        /* bytes or -errno of the request that COMMIT ends */
	uint64_t addr;         /* plain copy: the tag's buffer. Otherwise 0 */
};

struct ubi_ublk_param_basic {
	uint32_t attrs;        /* UBI_UBLK_ATTR_x */
	uint8_t logical_bs_shift;
	uint8_t physical_bs_shift;
	uint8_t io_opt_shift;
	uint8_t io_min_shift;
	uint32_t max_sectors;
	uint32_t chunk_sectors;
	uint64_t dev_sectors;
	uint64_t virt_boundary_mask;
};

struct ubi_ublk_param_discard {
	uint32_t discard_alignment;
	uint32_t discard_granularity;      /* not 0 */
	uint32_t max_discard_sectors;
	uint32_t max_write_zeroes_sectors;
	uint16_t max_discard_segments;     /* 1 */
	uint16_t reserved0;
};

struct ubi_ublk_param_devt { /* read only */
	uint32_t char_major;
	uint32_t char_minor;
	uint32_t disk_major;
	uint32_t disk_minor;
};

struct ubi_ublk_param_zoned {
	uint32_t max_open_zones;
	uint32_t max_active_zones;
	uint32_t max_zone_append_sectors;
	uint8_t reserved[20];
};

struct ubi_ublk_param_dma_align {
	uint32_t alignment;    /* a mask: 4095 wants 4 KiB */
	uint8_t pad[4];
};

struct ubi_ublk_param_segment {
	uint64_t seg_boundary_mask;
	uint32_t max_segment_size;
	uint16_t max_segments;
	uint8_t pad[2];
};

struct ubi_ublk_param_integrity {
	uint32_t flags;
	uint16_t max_integrity_segments;
	uint8_t interval_exp;
	uint8_t metadata_size;
	uint8_t pi_offset;
	uint8_t csum_type;
	uint8_t tag_size;
	uint8_t pad[5];
};

struct ubi_ublk_params {
	uint32_t len;          /* in: bytes given or wanted; a shorter kernel takes what it knows */
	uint32_t types;        /* UBI_UBLK_PARAM_TYPE_x */
	struct ubi_ublk_param_basic basic;
	struct ubi_ublk_param_discard discard;
	struct ubi_ublk_param_devt devt;
	struct ubi_ublk_param_zoned zoned;
	struct ubi_ublk_param_dma_align dma;
	struct ubi_ublk_param_segment seg;
	struct ubi_ublk_param_integrity integrity;
};

#define UBI_UBLK_PARAM_TYPE_BASIC (1u << 0)
#define UBI_UBLK_PARAM_TYPE_DISCARD (1u << 1)
#define UBI_UBLK_PARAM_TYPE_DEVT (1u << 2)
#define UBI_UBLK_PARAM_TYPE_ZONED (1u << 3)
#define UBI_UBLK_PARAM_TYPE_DMA_ALIGN (1u << 4)
#define UBI_UBLK_PARAM_TYPE_SEGMENT (1u << 5)
#define UBI_UBLK_PARAM_TYPE_INTEGRITY (1u << 6)

#define UBI_UBLK_ATTR_READ_ONLY (1u << 0)
#define UBI_UBLK_ATTR_ROTATIONAL (1u << 1)
#define UBI_UBLK_ATTR_VOLATILE_CACHE (1u << 2)
#define UBI_UBLK_ATTR_FUA (1u << 3)

/* ---- control commands: on /dev/ublk-control ------------------------------------------------ */

#define UBI_U_CMD_GET_QUEUE_AFFINITY _IOR('u', 0x01, struct ubi_ublk_ctrl_cmd)
#define UBI_U_CMD_GET_DEV_INFO _IOR('u', 0x02, struct ubi_ublk_ctrl_cmd)
#define UBI_U_CMD_ADD_DEV _IOWR('u', 0x04, struct ubi_ublk_ctrl_cmd)
#define UBI_U_CMD_DEL_DEV _IOWR('u', 0x05, struct ubi_ublk_ctrl_cmd)
#define UBI_U_CMD_START_DEV _IOWR('u', 0x06, struct ubi_ublk_ctrl_cmd)
#define UBI_U_CMD_STOP_DEV _IOWR('u', 0x07, struct ubi_ublk_ctrl_cmd)
#define UBI_U_CMD_SET_PARAMS _IOWR('u', 0x08, struct ubi_ublk_ctrl_cmd)
#define UBI_U_CMD_GET_PARAMS _IOR('u', 0x09, struct ubi_ublk_ctrl_cmd)
#define UBI_U_CMD_START_USER_RECOVERY _IOWR('u', 0x10, struct ubi_ublk_ctrl_cmd)
#define UBI_U_CMD_END_USER_RECOVERY _IOWR('u', 0x11, struct ubi_ublk_ctrl_cmd)
#define UBI_U_CMD_GET_DEV_INFO2 _IOR('u', 0x12, struct ubi_ublk_ctrl_cmd)
#define UBI_U_CMD_GET_FEATURES _IOR('u', 0x13, struct ubi_ublk_ctrl_cmd)
#define UBI_U_CMD_DEL_DEV_ASYNC _IOR('u', 0x14, struct ubi_ublk_ctrl_cmd)
#define UBI_U_CMD_UPDATE_SIZE _IOWR('u', 0x15, struct ubi_ublk_ctrl_cmd)
#define UBI_U_CMD_QUIESCE_DEV _IOWR('u', 0x16, struct ubi_ublk_ctrl_cmd)
#define UBI_U_CMD_TRY_STOP_DEV _IOWR('u', 0x17, struct ubi_ublk_ctrl_cmd)

/* ---- I/O commands: on /dev/ublkcN ---------------------------------------------------------- */

#define UBI_U_IO_FETCH_REQ _IOWR('u', 0x20, struct ubi_ublk_io_cmd)
#define UBI_U_IO_COMMIT_AND_FETCH_REQ _IOWR('u', 0x21, struct ubi_ublk_io_cmd)
#define UBI_U_IO_NEED_GET_DATA _IOWR('u', 0x22, struct ubi_ublk_io_cmd)
#define UBI_U_IO_REGISTER_IO_BUF _IOWR('u', 0x23, struct ubi_ublk_io_cmd)
#define UBI_U_IO_UNREGISTER_IO_BUF _IOWR('u', 0x24, struct ubi_ublk_io_cmd)

/* What the CQE of a FETCH or COMMIT says; ABORT: no request, and the tag must not be fetched. */
#define UBI_UBLK_IO_RES_OK 0
#define UBI_UBLK_IO_RES_NEED_GET_DATA 1
#define UBI_UBLK_IO_RES_ABORT (-19) /* -ENODEV */

/* ---- requests: ubi_ublk_io_desc.op_flags ---------------------------------------------------- */

#define UBI_UBLK_IO_OP_READ 0
#define UBI_UBLK_IO_OP_WRITE 1
#define UBI_UBLK_IO_OP_FLUSH 2
#define UBI_UBLK_IO_OP_DISCARD 3
#define UBI_UBLK_IO_OP_WRITE_SAME 4
#define UBI_UBLK_IO_OP_WRITE_ZEROES 5

#define UBI_UBLK_IO_F_FAILFAST_DEV (1u << 8)
#define UBI_UBLK_IO_F_FAILFAST_TRANSPORT (1u << 9)
#define UBI_UBLK_IO_F_FAILFAST_DRIVER (1u << 10)
#define UBI_UBLK_IO_F_META (1u << 11)
#define UBI_UBLK_IO_F_FUA (1u << 13)
#define UBI_UBLK_IO_F_NOUNMAP (1u << 15)
#define UBI_UBLK_IO_F_SWAP (1u << 16)
#define UBI_UBLK_IO_F_NEED_REG_BUF (1u << 17)
#define UBI_UBLK_IO_F_INTEGRITY (1u << 18)
#define UBI_UBLK_IO_F_SHMEM_ZC (1u << 19)

static inline uint8_t ubi_ublk_io_op(const struct ubi_ublk_io_desc *desc)
{
	return (uint8_t)(desc->op_flags & 0xffu);
}

/* ---- positions on /dev/ublkcN --------------------------------------------------------------- */

/* Bytes to map for one queue's descriptors (24-byte descriptors). page_size: a power of two. */
static inline size_t ubi_ublk_desc_map_len(uint32_t depth, size_t page_size)
{
	return (depth * sizeof(struct ubi_ublk_io_desc) + page_size - 1) & ~(page_size - 1);
}

/* Where queue q_id's descriptors are mapped: queues lie as far apart as the deepest would need. */
static inline uint64_t ubi_ublk_desc_map_offset(uint16_t q_id, size_t page_size)
{
	return UBI_UBLK_CMD_BUF_OFFSET +
	       (uint64_t)q_id * ubi_ublk_desc_map_len(UBI_UBLK_MAX_QUEUE_DEPTH, page_size);
}

/* USER_COPY: position of byte `offset` of the request (q_id, tag), for pread and pwrite. */
static inline uint64_t ubi_ublk_user_copy_pos(uint16_t q_id, uint16_t tag, uint32_t offset)
{
	return UBI_UBLK_IO_BUF_OFFSET + ((uint64_t)q_id << UBI_UBLK_QID_OFF) +
	       ((uint64_t)tag << UBI_UBLK_TAG_OFF) + offset;
}

/* ---- AUTO_BUF_REG: sqe->addr of FETCH and COMMIT -------------------------------------------- */

#define UBI_UBLK_AUTO_BUF_REG_FALLBACK (1u << 0)

static inline uint64_t ubi_ublk_auto_buf_reg_addr(uint16_t index, uint8_t flags)
{
	return (uint64_t)index | (uint64_t)flags << 16;
}

/* ---- sizes: the driver checks them through the _IOC_SIZE of each command -------------------- */

_Static_assert(sizeof(struct ubi_ublk_ctrl_cmd) == 32, "ctrl_cmd");
_Static_assert(sizeof(struct ubi_ublk_ctrl_dev_info) == 64, "ctrl_dev_info");
_Static_assert(sizeof(struct ubi_ublk_io_desc) == 24, "io_desc");
_Static_assert(sizeof(struct ubi_ublk_io_cmd) == 16, "io_cmd");
_Static_assert(sizeof(struct ubi_ublk_param_basic) == 32, "param_basic");
_Static_assert(sizeof(struct ubi_ublk_param_discard) == 20, "param_discard");
_Static_assert(sizeof(struct ubi_ublk_param_devt) == 16, "param_devt");
_Static_assert(sizeof(struct ubi_ublk_param_zoned) == 32, "param_zoned");
_Static_assert(sizeof(struct ubi_ublk_param_dma_align) == 8, "param_dma_align");
_Static_assert(sizeof(struct ubi_ublk_param_segment) == 16, "param_segment");
_Static_assert(sizeof(struct ubi_ublk_param_integrity) == 16, "param_integrity");
_Static_assert(sizeof(struct ubi_ublk_params) == 152, "params");
_Static_assert(offsetof(struct ubi_ublk_params, seg) == 120, "params.seg");
_Static_assert(UBI_UBLK_QID_OFF == UBI_UBLK_TAG_OFF + UBI_UBLK_TAG_BITS, "position of q_id");

#endif
