"""Atomic access to what threads and processes share, and assertions that name what broke."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cdef extern from *:
    """
    #ifndef UBI_ATOMIC_H
    #define UBI_ATOMIC_H
    #include <stdio.h>
    #include <stdlib.h>
    #define ubi_load(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define ubi_peek(p) __atomic_load_n((p), __ATOMIC_RELAXED)
    #define ubi_store(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    #define ubi_add(p, v) __atomic_add_fetch((p), (v), __ATOMIC_SEQ_CST)
    #define ubi_exchange(p, v) __atomic_exchange_n((p), (v), __ATOMIC_SEQ_CST)
    #define ubi_fence() __atomic_thread_fence(__ATOMIC_SEQ_CST)
    /* Sets *p to v if it is 0: the first writer wins. */
    static inline void ubi_set_once(uint32_t *p, uint32_t v)
    {
        uint32_t zero = 0;
        __atomic_compare_exchange_n(p, &zero, v, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    }
    #define ubi_ensure(ok, what) do { \\
        if (__builtin_expect(!(ok), 0)) { \\
            fprintf(stderr, "ublk-ubi: broken invariant: %s (%s:%d)\\n", \\
                    (what), __func__, __LINE__); \\
            abort(); \\
        } } while (0)
    #endif
    """
    uint8_t load_u8 "ubi_load"(const uint8_t* p) noexcept nogil
    uint32_t load_u32 "ubi_load"(const uint32_t* p) noexcept nogil
    int64_t load_i64 "ubi_load"(const int64_t* p) noexcept nogil
    uint64_t load_u64 "ubi_load"(const uint64_t* p) noexcept nogil
    uint32_t peek_u32 "ubi_peek"(const uint32_t* p) noexcept nogil
    void store_u8 "ubi_store"(uint8_t* p, uint8_t value) noexcept nogil
    void store_u32 "ubi_store"(uint32_t* p, uint32_t value) noexcept nogil
    void store_u64 "ubi_store"(uint64_t* p, uint64_t value) noexcept nogil
    int64_t add_i64 "ubi_add"(int64_t* p, int64_t value) noexcept nogil
    uint32_t exchange_u32 "ubi_exchange"(uint32_t* p, uint32_t value) noexcept nogil
    void set_once_u32 "ubi_set_once"(uint32_t* p, uint32_t value) noexcept nogil
    void full_fence "ubi_fence"() noexcept nogil
    # Ends the process, naming the invariant: to go on could lose a tenant's data.
    void ensure "ubi_ensure"(bint ok, const char* what) noexcept nogil
