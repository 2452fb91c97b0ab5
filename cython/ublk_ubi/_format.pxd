"""The bytes on the base: bdev_ubi 0.1's metadata, and the extension in its padding.

    0          9   magic "BDEV_UBI\\0"
    9, 11      2   version major 0, minor 1; minor 2 while the disk is open here (all LE)
    13         1   stripe size in KiB, low 8 bits
    14         2×  headers, one a stripe: byte 0 ≠ 0: the base has it; byte 1: kept as found
    4194318        padding; the extension's two slots at SLOT_OFFSET and SLOT_OFFSET + PAGE
    8 MiB          data

Source of the first four rows: bdev_ubi's on-disk format 0.1. docs/on-disk-format.md has it all.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    SLOT_OFFSET = 5 << 20          # bytes; the second slot is a page further
    SLOT_BYTES = 512               # one sector: written whole or not at all
    SLOT_VERSION = 1
    COUNTER_BITS = 62              # of sequence and generation: no writer has ever needed more
    FLAG_OPEN = 1
    KNOWN_INCOMPAT = 0             # feature bits that this version understands
    VERSION_CLOSED = 1             # minor version
    VERSION_OPEN = 2               # bdev_ubi refuses it: it would ignore the table

cdef enum SlotCondition:
    SLOT_ZERO = 0
    SLOT_VALID = 1
    SLOT_DAMAGED = 2
    SLOT_NEWER = 3

cdef packed struct Slot:
    uint8_t magic[8]
    uint32_t version
    uint32_t crc32c                # of the 512 bytes, this field taken as zero
    uint64_t sequence              # the valid slot with the higher one counts
    uint64_t feature_incompat
    uint64_t feature_compat
    uint32_t stripe_bytes
    uint32_t flags
    uint64_t image_bytes
    uint8_t fingerprint[32]
    uint8_t uuid[16]
    uint64_t generation            # openings so far, each with a table of its own
    uint8_t boot_id[16]            # of the host that opened it last
    uint32_t block_bytes           # logical block size of the disk; 0: not recorded
    uint32_t zero
    uint64_t device_bytes          # of the disk, which shows no more of the base; 0: not recorded
    uint8_t rest[368]

cdef uint32_t crc32c(const uint8_t* data, uint32_t length) noexcept nogil
cdef void slot_seal(Slot* slot) noexcept nogil
cdef uint8_t slot_check(const Slot* slot) noexcept nogil
cdef bint all_zero(const uint8_t* data, uint64_t length) noexcept nogil
cdef bint head_has_magic(const uint8_t* page) noexcept nogil
cdef void head_write(uint8_t* page, uint32_t stripe_bytes, uint16_t minor) noexcept nogil
cdef uint16_t head_major(const uint8_t* page) noexcept nogil
cdef uint16_t head_minor(const uint8_t* page) noexcept nogil
