"""Latencies in buckets whose width grows with the value: eight a power of two, so within 1/8."""

from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    BUCKETS = 512

cdef struct Histogram:
    uint64_t counts[BUCKETS]
    uint64_t maximum               # ns

cdef extern from *:
    int clzll "__builtin_clzll"(unsigned long long value) noexcept nogil


cdef inline uint32_t histogram_bucket(uint64_t value) noexcept nogil:
    """0–7 hold their own value; from there on the leading bit and the three below it count."""
    cdef int high
    if value < 8:
        return <uint32_t>value
    high = 63 - clzll(value)
    return <uint32_t>((high - 2) * 8 + ((value >> (high - 3)) & 7))


cdef inline uint64_t histogram_value(uint32_t bucket) noexcept nogil:
    """The lowest value of a bucket, in ns."""
    if bucket < 8:
        return bucket
    return <uint64_t>(8 + (bucket & 7)) << (bucket // 8 - 1)


cdef inline void histogram_add(Histogram* histogram, uint64_t value) noexcept nogil:
    histogram.counts[histogram_bucket(value)] += 1
    if value > histogram.maximum:
        histogram.maximum = value
