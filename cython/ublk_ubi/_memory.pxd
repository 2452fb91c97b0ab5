"""Zeroed, page-aligned memory that costs nothing until it is touched."""

from libc.stdint cimport uint64_t

cdef extern from *:
    """
    #include <stddef.h>
    #include <sys/mman.h>
    static inline void *ubi_map(size_t length)
    {
        void *p = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        return p == MAP_FAILED ? NULL : p;
    }
    static inline void *ubi_map_shared(int fd, size_t length, int prot, uint64_t offset)
    {
        void *p = mmap(NULL, length, prot, MAP_SHARED, fd, (off_t)offset);
        return p == MAP_FAILED ? NULL : p;
    }
    """
    # NULL when there is none (errno says why).
    void* map_memory "ubi_map"(size_t length) noexcept nogil
    void* map_shared "ubi_map_shared"(int fd, size_t length, int prot,
                                      uint64_t offset) noexcept nogil
    int munmap(void* address, size_t length) noexcept nogil
    int mlock(const void* address, size_t length) noexcept nogil
    enum:
        PROT_READ
        PROT_WRITE
