/* Preloaded into the product: ends one of its processes right before a step.
 *
 * A step is a call of libc's that the world notices: a file, a lock, a message, an I/O of the main
 * thread's. Of the control helper's it is a command that has come, and an answer that is to go.
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
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* As in steps.py. */
enum role { NOBODY, COMMAND, DAEMON, HELPER };

struct shared {
    atomic_uint role;               /* whose step */
    atomic_int countdown;           /* how many of them are left, that one included */
    atomic_int died;                /* the process that has ended so */
    char step[64];                  /* … and what it has not done */
};

static struct shared *shared;
static enum role own;

static enum role find_role(void)
{
    char words[4096];
    int fd = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
    ssize_t length = read(fd, words, sizeof(words) - 1);
    close(fd);
    for (ssize_t i = 0; i < length; i++)
        words[i] = words[i] ? words[i] : ' ';
    words[length > 0 ? length : 0] = 0;
    return strstr(words, "control_agent") ? HELPER
        : strstr(words, "ublk_ubi.daemon ") ? DAEMON
        : strstr(words, "-m ublk_ubi ") ? COMMAND : NOBODY;
}

__attribute__((constructor)) static void begin(void)
{
    const char *path = getenv("TEST_STEPS");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0)
        return;
    void *page = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (page == MAP_FAILED)
        abort();
    own = find_role();
    shared = page;
}

static void step(const char *name, const char *path)
{
    if (!shared || own == NOBODY || atomic_load(&shared->role) != own
        || atomic_fetch_sub(&shared->countdown, 1) != 1)
        return;
    atomic_store(&shared->role, NOBODY);
    snprintf(shared->step, sizeof(shared->step), "%s %s", name, path);
    atomic_store(&shared->died, getpid());
    for (;;) {
        syscall(SYS_kill, getpid(), SIGKILL);
        syscall(SYS_exit_group, 128 + SIGKILL); /* a helper that is shut in may send no signal */
    }
}

/* What the product calls is what is next in line: libc's. */
#define REAL(function) ({ \
    static __typeof__(&function) found; \
    if (!found) \
        found = (__typeof__(&function))dlsym(RTLD_NEXT, #function); \
    found; })

#define STEP(type, function, parameters, arguments, path) \
    type function parameters \
    { \
        step(#function, path); \
        return REAL(function) arguments; \
    }

STEP(int, mkdir, (const char *path, mode_t mode), (path, mode), path)
STEP(int, mkdirat, (int fd, const char *path, mode_t mode), (fd, path, mode), path)
STEP(int, rename, (const char *from, const char *to), (from, to), to)
STEP(int, renameat, (int fd, const char *from, int to_fd, const char *to), (fd, from, to_fd, to),
     to)
STEP(int, unlink, (const char *path), (path), path)
STEP(int, unlinkat, (int fd, const char *path, int flags), (fd, path, flags), path)
STEP(int, rmdir, (const char *path), (path), path)
STEP(int, symlinkat, (const char *target, int fd, const char *path), (target, fd, path), path)
STEP(int, link, (const char *from, const char *to), (from, to), to)
STEP(int, linkat, (int fd, const char *from, int to_fd, const char *to, int flags),
     (fd, from, to_fd, to, flags), to)
STEP(int, chmod, (const char *path, mode_t mode), (path, mode), path)
STEP(int, chown, (const char *path, uid_t uid, gid_t gid), (path, uid, gid), path)
STEP(int, flock, (int fd, int operation), (fd, operation), "")
STEP(int, ftruncate64, (int fd, off64_t length), (fd, length), "")
STEP(int, posix_fallocate64, (int fd, off64_t offset, off64_t length), (fd, offset, length), "")
STEP(int, fsync, (int fd), (fd), "")
STEP(ssize_t, pwrite64, (int fd, const void *data, size_t length, off64_t offset),
     (fd, data, length, offset), "")
STEP(ssize_t, send, (int fd, const void *data, size_t length, int flags),
     (fd, data, length, flags), "")
STEP(int, connect, (int fd, const struct sockaddr *to, socklen_t length), (fd, to, length), "")
STEP(int, bind, (int fd, const struct sockaddr *to, socklen_t length), (fd, to, length), "")
STEP(int, listen, (int fd, int backlog), (fd, backlog), "")
STEP(int, memfd_create, (const char *name, unsigned flags), (name, flags), name)

/* A daemon's first helper is a fork of it. */
pid_t fork(void)
{
    pid_t pid = REAL(fork)();
    if (pid == 0 && own == DAEMON)
        own = HELPER;
    return pid;
}

ssize_t write(int fd, const void *data, size_t length)
{
    if (fd != STDERR_FILENO)
        step(__func__, "");
    return REAL(write)(fd, data, length);
}

ssize_t recvmsg(int fd, struct msghdr *message, int flags)
{
    ssize_t got = REAL(recvmsg)(fd, message, flags);
    if (own == HELPER && got > 0)
        step("command", "");
    return got;
}

static int changes(int flags)
{
    return (flags & (O_CREAT | O_WRONLY | O_RDWR)) != 0;
}

int open64(const char *path, int flags, ...)
{
    va_list more;
    va_start(more, flags);
    mode_t mode = va_arg(more, mode_t);
    va_end(more);
    if (changes(flags))
        step("open", path);
    return REAL(open64)(path, flags, mode);
}

int openat64(int fd, const char *path, int flags, ...)
{
    va_list more;
    va_start(more, flags);
    mode_t mode = va_arg(more, mode_t);
    va_end(more);
    if (changes(flags))
        step("openat", path);
    return REAL(openat64)(fd, path, flags, mode);
}

int fcntl64(int fd, int command, ...)
{
    va_list more;
    va_start(more, command);
    void *argument = va_arg(more, void *);
    va_end(more);
    if (command == F_OFD_SETLK)
        step("lock", "");
    return REAL(fcntl64)(fd, command, argument);
}

/* io_uring_enter: the opener's I/O; that of the other threads is the matter of mortal.c. */
long syscall(long number, ...)
{
    long a[6];
    va_list more;
    va_start(more, number);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(more, long);
    va_end(more);
    if (number == SYS_io_uring_enter && gettid() == getpid())
        step("io", "");
    return REAL(syscall)(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
