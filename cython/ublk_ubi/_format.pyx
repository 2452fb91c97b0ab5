"""Reading and writing the bytes that _format.pxd describes. Pure; little-endian hosts only."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from ublk_ubi._atomic cimport ensure

cdef extern from *:
    """
    _Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the format is little-endian");
    """


cdef uint32_t crc32c(const uint8_t* data, uint32_t length) noexcept nogil:
    """CRC-32C (Castagnoli; RFC 3720 appendix B.4), bit by bit: it runs twice an opening."""
    cdef uint32_t crc = 0xffffffff
    cdef uint32_t i, _bit
    for i in range(length):
        crc ^= data[i]
        for _bit in range(8):
            crc = (crc >> 1) ^ (<uint32_t>0x82f63b78 & (0 - (crc & 1)))
    return ~crc


cdef uint32_t slot_crc(const Slot* slot) noexcept nogil:
    cdef Slot copy
    memcpy(&copy, slot, sizeof(Slot))
    copy.crc32c = 0
    return crc32c(<const uint8_t*>&copy, SLOT_BYTES)


cdef void slot_seal(Slot* slot) noexcept nogil:
    """Magic, version and checksum over what is there."""
    ensure(sizeof(Slot) == SLOT_BYTES, b"a slot is one sector")
    memcpy(slot.magic, b"UBLKUBIX", 8)
    slot.version = SLOT_VERSION
    slot.crc32c = slot_crc(slot)


cdef uint8_t slot_check(const Slot* slot) noexcept nogil:
    """A SlotCondition."""
    if all_zero(<const uint8_t*>slot, SLOT_BYTES):
        return SLOT_ZERO
    if memcmp(slot.magic, b"UBLKUBIX", 8) != 0 or slot.crc32c != slot_crc(slot):
        return SLOT_DAMAGED
    if slot.version != SLOT_VERSION or slot.feature_incompat & ~<uint64_t>KNOWN_INCOMPAT:
        return SLOT_NEWER
    return SLOT_VALID


cdef bint all_zero(const uint8_t* data, uint64_t length) noexcept nogil:
    """`length` ≥ 1. Every byte equals its neighbour, and the first is zero."""
    return data[0] == 0 and memcmp(data, data + 1, length - 1) == 0


cdef bint head_has_magic(const uint8_t* page) noexcept nogil:
    return memcmp(page, b"BDEV_UBI\0", 9) == 0


cdef void head_write(uint8_t* page, uint32_t stripe_bytes, uint16_t minor) noexcept nogil:
    """The first 14 bytes of page 0; the headers behind them are left alone."""
    memcpy(page, b"BDEV_UBI\0", 9)
    memset(page + 9, 0, 4)
    page[11] = <uint8_t>minor
    page[13] = <uint8_t>((stripe_bytes >> 10) & 0xff)


cdef uint16_t head_major(const uint8_t* page) noexcept nogil:
    return page[9] | (<uint16_t>page[10] << 8)


cdef uint16_t head_minor(const uint8_t* page) noexcept nogil:
    return page[11] | (<uint16_t>page[12] << 8)
