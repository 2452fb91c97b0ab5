/* Preloaded into the product: counts what its rings do, and ends the process right before an action.
 *
 * All of it happens around io_uring_enter, which the data plane calls through libc: SQEs are looked at
 * before, CQEs after it. The product itself is what is shipped, to the byte.
 *
 * The test and every process that it starts share one page (struct shared), which outlives them.
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <liburing.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* As in mortal.py. */
enum action {
    NONE, BASE_WRITE, STRIPE_READ, STRIPE_WRITE, HEADER_WRITE, SYNC, TABLE_UPDATE, FETCH, COMMIT,
    DOORBELL, ACTIONS
};

struct shared {
    atomic_uint armed;              /* enum action: which one not to do */
    atomic_int countdown;           /* how many of them are left, that one included */
    atomic_uint died;               /* which one was not done */
    atomic_int writes;              /* guests' writes that a queue has taken and not committed */
    atomic_int stripes;             /* stripes that are being read or written for hydration */
    atomic_uint done[ACTIONS];
};

enum { FILE_IMAGE = 0, FILE_BASE = 1, METADATA = 8 << 20, TOKENS = 1 << 15, QUEUES = 16 };
enum { CQE_OP = 1, CQE_UBLK = 2 };      /* as _ring.pxd has the top byte of user_data */
enum { UBLK_FETCH = 0x20, UBLK_COMMIT = 0x21, UBLK_WRITE = 1, QUEUE_STRIDE = 98304 };

struct io_desc { uint32_t op_flags, nr_sectors; uint64_t start_sector, addr; };
struct io_cmd { uint16_t q_id, tag; int32_t result; uint64_t addr; };

static struct shared *shared;
static const struct io_desc *descriptors[QUEUES];
static __thread uint8_t flying[TOKENS];     /* enum action, by token */
static __thread uint8_t writing[TOKENS];    /* by tag */
static __thread int queue = -1;
static __thread struct io_uring *own;       /* the ring of this thread */
static __thread unsigned seen;              /* CQEs of it that have been looked at */
static __thread int is_hydrator = -1;

__attribute__((constructor)) static void begin(void)
{
    const char *path = getenv("TEST_MORTAL");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0)
        return;
    shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (shared == MAP_FAILED)
        abort();
}

/* liburing comes with a module of Python's, and is not in the global scope. */
#define RINGS(function) ({ \
    static __typeof__(&function) found; \
    if (!found) \
        found = (__typeof__(&function))dlsym(dlopen("liburing.so.2", RTLD_NOW), #function); \
    found; })

static long enter(unsigned fd, unsigned submit, unsigned wait, unsigned flags, const void *arg,
                  size_t size)
{
    static __typeof__(&syscall) found;
    if (!found)
        found = (__typeof__(&syscall))dlsym(RTLD_NEXT, "syscall");
    return found(SYS_io_uring_enter, fd, submit, wait, flags, arg, size);
}

static int hydrates(void)
{
    char name[16] = "";
    if (is_hydrator < 0) {
        prctl(PR_GET_NAME, name);
        is_hydrator = strcmp(name, "ubi-hydrator") == 0;
    }
    return is_hydrator;
}

static enum action kind_of(const struct io_uring_sqe *sqe)
{
    const struct io_cmd *command = (const struct io_cmd *)sqe->cmd;
    switch (sqe->opcode) {
    case IORING_OP_URING_CMD:
        queue = command->q_id;
        return (sqe->cmd_op & 0xff) == UBLK_FETCH ? FETCH
            : (sqe->cmd_op & 0xff) == UBLK_COMMIT ? COMMIT : NONE;
    case IORING_OP_READ:
        return hydrates() && (sqe->flags & IOSQE_FIXED_FILE) && sqe->fd == FILE_IMAGE
            ? STRIPE_READ : NONE;
    case IORING_OP_WRITE:
    case IORING_OP_WRITE_FIXED:
    case IORING_OP_FALLOCATE:
        if (!(sqe->flags & IOSQE_FIXED_FILE) || sqe->fd != FILE_BASE)
            return NONE;
        return sqe->off < METADATA ? HEADER_WRITE : hydrates() ? STRIPE_WRITE : BASE_WRITE;
    case IORING_OP_FSYNC:
        return SYNC;
    case IORING_OP_MSG_RING:
        return DOORBELL;
    default:
        return NONE;
    }
}

/* Whether it is time to die: the action is the one that is not to be done. */
static int is_last(enum action action)
{
    if (atomic_load(&shared->armed) == action && atomic_fetch_sub(&shared->countdown, 1) == 1)
        return 1;
    atomic_fetch_add(&shared->done[action], 1);
    return 0;
}

static void die(enum action action)
{
    atomic_store(&shared->armed, NONE);
    atomic_store(&shared->died, action);
    for (;;)
        kill(getpid(), SIGKILL);
}

static void note(const struct io_uring_sqe *sqe, enum action action)
{
    const struct io_cmd *command = (const struct io_cmd *)sqe->cmd;
    uint32_t token = (uint32_t)sqe->user_data;
    if (action == COMMIT && writing[command->tag]) {
        writing[command->tag] = 0;
        atomic_fetch_sub(&shared->writes, 1);
    }
    if (sqe->user_data >> 56 == CQE_OP && token < TOKENS) {
        flying[token] = action;
        if (action == STRIPE_READ || action == STRIPE_WRITE)
            atomic_fetch_add(&shared->stripes, 1);
    }
}

/* What is about to be submitted; up to the action before which the process is to end. */
static void look(unsigned fd, unsigned flags)
{
    struct io_uring_sq *sq = &own->sq;
    unsigned first = *sq->khead;
    for (unsigned at = first; at != *sq->ktail; at++) {
        const struct io_uring_sqe *sqe = &sq->sqes[at & sq->ring_mask];
        enum action action = kind_of(sqe);
        if (action != NONE && is_last(action)) {
            *sq->ktail = at;
            enter(fd, at - first, 0, flags & IORING_ENTER_REGISTERED_RING, NULL, 0);
            die(action);
        }
        note(sqe, action);
    }
}

static void take(const struct io_uring_cqe *cqe)
{
    uint32_t index = (uint32_t)cqe->user_data;
    if (index >= TOKENS)
        return;
    if (cqe->user_data >> 56 == CQE_UBLK && cqe->res == 0 && queue >= 0 && queue < QUEUES
        && descriptors[queue] && (descriptors[queue][index].op_flags & 0xff) == UBLK_WRITE) {
        writing[index] = 1;
        atomic_fetch_add(&shared->writes, 1);
    }
    if (cqe->user_data >> 56 == CQE_OP) {
        enum action action = flying[index];
        flying[index] = NONE;
        /* Its stripe is on the base now: what comes next is that the table says so. */
        if (action == STRIPE_WRITE && is_last(TABLE_UPDATE))
            die(TABLE_UPDATE);
        if (action == STRIPE_READ || action == STRIPE_WRITE)
            atomic_fetch_sub(&shared->stripes, 1);
    }
}

int io_uring_queue_init_params(unsigned entries, struct io_uring *ring, struct io_uring_params *p)
{
    own = ring;
    seen = 0;
    return RINGS(io_uring_queue_init_params)(entries, ring, p);
}

long syscall(long number, ...)
{
    long a[6], result;
    va_list more;
    va_start(more, number);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(more, long);
    va_end(more);
    if (number != SYS_io_uring_enter) {
        static __typeof__(&syscall) found;
        if (!found)
            found = (__typeof__(&syscall))dlsym(RTLD_NEXT, "syscall");
        return found(number, a[0], a[1], a[2], a[3], a[4], a[5]);
    }
    if (shared && own)
        look(a[0], a[3]);
    result = enter(a[0], a[1], a[2], a[3], (const void *)a[4], a[5]);
    for (; shared && own && seen != *own->cq.ktail; seen++)
        take(&own->cq.cqes[seen & own->cq.ring_mask]);
    return result;
}

/* Where a queue's descriptors are: they say whether a request is a write. */
void *mmap64(void *address, size_t length, int prot, int flags, int fd, off64_t offset)
{
    void *memory = (void *)syscall(SYS_mmap, address, length, prot, flags, fd, offset);
    struct stat status;
    if (shared && fd >= 0 && prot == PROT_READ && (flags & MAP_SHARED) && memory != MAP_FAILED
        && fstat(fd, &status) == 0 && S_ISCHR(status.st_mode) && offset / QUEUE_STRIDE < QUEUES)
        descriptors[offset / QUEUE_STRIDE] = memory;
    return memory;
}
