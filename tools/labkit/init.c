/*
 * The first process of the lab's guest: makes the machine that COMMAND sees, runs COMMAND, carries
 * its output to the host, tells its exit status, powers off.
 *
 * It is a static C program because it must hand over arguments and environment byte for byte, start
 * in no time, and need nothing of the machine whose files it stands on.
 *
 * The host says what to do in the file `plan` beside this program: NUL-terminated records of one
 * letter and a value, done in order (labkit/plan.py writes it and lists the letters). Four lines
 * (UML serial lines, each a pipe to the host, made raw here) lead out:
 *
 *   ttyS0  COMMAND's stdout      ttyS2  control: "boot", then "exit N" or "fail TEXT"; from the
 *   ttyS1  COMMAND's stderr             host "size ROWS COLS"
 *   ttyS3  COMMAND's terminal (only when the caller sits at one)
 *
 * "exit N" is sent only after every byte of output has left for the host and the scratch folder is
 * written back: once the host has read it, it may pull the plug.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#define HOST "/run/host" /* the machine's files, before tmpfs hides some of them */
#define STREAM_BUF 65536
#define CONTROL_LINE_MAX 256

struct strings {
	char **at; /* NULL-terminated */
	size_t count;
};

/* Bytes on their way from a pipe that COMMAND writes to a serial line. */
struct stream {
	int from; /* -1: ended */
	int to;
	size_t begin, end;
	char buf[STREAM_BUF];
};

static int control = -1;
static int terminal = -1;
static struct stream out = {.from = -1, .to = -1}, err = {.from = -1, .to = -1};
static struct strings args, env;
static const char *cwd = "/";
static const char *scratch;
static const char *link_target;
static bool on_terminal, stderr_on_terminal;

static void write_all(int fd, const char *data, size_t len)
{
	while (len) {
		ssize_t n = write(fd, data, len);
		if (n < 0 && errno == EAGAIN) {
			poll(&(struct pollfd){.fd = fd, .events = POLLOUT}, 1, -1);
		} else if (n < 0 && errno != EINTR) {
			return; /* the host has gone: nobody is left to tell */
		} else if (n > 0) {
			data += n;
			len -= (size_t)n;
		}
	}
}

/* Waits until the line's last byte is with the host. */
static void drain(int fd)
{
	if (fd >= 0)
		while (tcdrain(fd) < 0 && errno == EINTR)
			;
}

static void tell(const char *format, ...)
{
	char line[CONTROL_LINE_MAX];
	va_list ap;
	va_start(ap, format);
	int n = vsnprintf(line, sizeof line - 1, format, ap);
	va_end(ap);
	size_t len = n < 0 ? 0 : (size_t)n < sizeof line - 1 ? (size_t)n : sizeof line - 2;
	for (size_t i = 0; i < len; i++)
		if (line[i] == '\n')
			line[i] = ' ';
	line[len] = '\n';
	write_all(control, line, len + 1);
	drain(control);
}

static _Noreturn void power_off(void)
{
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}

static _Noreturn void fail(const char *what, const char *which)
{
	if (control >= 0)
		tell("fail cannot %s %s: %s", what, which, strerror(errno));
	else
		fprintf(stderr, "lab init: cannot %s %s: %s\n", what, which, strerror(errno));
	power_off();
}

static void *must_alloc(void *p)
{
	if (!p)
		fail("allocate", "memory");
	return p;
}

static void append(struct strings *list, char *value)
{
	list->at = must_alloc(realloc(list->at, (list->count + 2) * sizeof *list->at));
	list->at[list->count++] = value;
	list->at[list->count] = NULL;
}

/* -- the file system ------------------------------------------------------------------------- */

static void mount_at(const char *type, const char *dir, unsigned long flags, const char *data)
{
	if (mount(type, dir, type, flags, data) < 0)
		fail("mount on", dir);
}

static void make_folders(const char *path)
{
	char *copy = must_alloc(strdup(path));
	for (char *p = copy + 1;; p++) {
		if (*p && *p != '/')
			continue;
		char was = *p;
		*p = '\0';
		if (mkdir(copy, 0755) < 0 && errno != EEXIST && errno != EROFS)
			fail("make the folder", copy);
		*p = was;
		if (!was)
			break;
	}
	free(copy);
}

static void make_parent(const char *path)
{
	char *copy = must_alloc(strdup(path));
	char *slash = strrchr(copy, '/');
	if (slash > copy) {
		*slash = '\0';
		make_folders(copy);
	}
	free(copy);
}

static void mount_tmpfs(const char *value) /* MODE,DIR */
{
	const char *comma = strchr(value, ',');
	char data[32];
	snprintf(data, sizeof data, "mode=%.*s", (int)(comma - value), value);
	mount_at("tmpfs", comma + 1, MS_NOSUID | MS_NODEV, data);
}

/* Shows the host's `path` again, read-only, where a tmpfs has come to lie over it. */
static void show_again(const char *path)
{
	char *source = NULL;
	struct stat st;
	if (asprintf(&source, HOST "%s", path) < 0)
		fail("allocate", "memory");
	if (stat(source, &st) < 0)
		fail("look at", path);
	if (S_ISDIR(st.st_mode)) {
		make_folders(path);
	} else {
		make_parent(path);
		int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
		if (fd >= 0)
			close(fd);
	}
	if (mount(source, path, NULL, MS_BIND, NULL) < 0)
		fail("show", path);
	free(source);
}

static void mount_scratch(char *path)
{
	scratch = path;
	make_folders(path);
	mount_at("hostfs", path, 0, path);
}

/*
 * For a user who is not root: files of the host's root are not the guest's root's, so that a setuid
 * program of theirs would make root someone else.
 */
static void forbid_setuid(void)
{
	static const char *dirs[] = {"/", HOST};
	for (size_t i = 0; i < 2; i++)
		if (mount(NULL, dirs[i], NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID, NULL) < 0)
			fail("forbid setuid on", dirs[i]);
}

static void make_link(const char *target, const char *path)
{
	make_parent(path);
	if (symlink(target, path) < 0 && errno != EEXIST)
		fail("make the link", path);
}

static void write_setting(const char *path, const char *value)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd >= 0) {
		write_all(fd, value, strlen(value));
		close(fd);
	}
}

/* What every machine has; labkit/plan.py adds what depends on this one. */
static void mount_kernel_filesystems(void)
{
	mount_at("proc", "/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	mount_at("sysfs", "/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	mount_at("debugfs", "/sys/kernel/debug", 0, NULL);
	/* Faults are dear here: a program's pages come a MiB at a time. */
	write_setting("/sys/kernel/debug/fault_around_bytes", "1048576");
	mount_at("configfs", "/sys/kernel/config", 0, NULL);
	mount_at("cgroup2", "/sys/fs/cgroup", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	mkdir("/dev/pts", 0755);
	mount_at("devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, "gid=5,mode=620,ptmxmode=666");
	mkdir("/dev/shm", 01777);
	mount_at("tmpfs", "/dev/shm", MS_NOSUID | MS_NODEV, "mode=1777");
	mkdir("/dev/mqueue", 01777);
	mount("mqueue", "/dev/mqueue", "mqueue", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	static const char *links[][2] = {{"/proc/self/fd", "/dev/fd"},
					 {"/proc/self/fd/0", "/dev/stdin"},
					 {"/proc/self/fd/1", "/dev/stdout"},
					 {"/proc/self/fd/2", "/dev/stderr"}};
	for (size_t i = 0; i < sizeof links / sizeof *links; i++)
		(void)!symlink(links[i][0], links[i][1]);
}

static void open_host(void)
{
	mount_at("tmpfs", "/run", MS_NOSUID | MS_NODEV, "mode=755");
	if (mkdir(HOST, 0700) < 0 || mount("/", HOST, NULL, MS_BIND, NULL) < 0)
		fail("keep sight of", "the host's files");
}

static void close_host(void)
{
	if (umount2(HOST, MNT_DETACH) < 0 || rmdir(HOST) < 0)
		fail("let go of", "the host's files");
}

/* -- the rest of the machine ------------------------------------------------------------------ */

static int open_line(const char *path)
{
	int fd = open(path, O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
	if (fd < 0)
		fail("open", path);
	struct termios t;
	if (tcgetattr(fd, &t) < 0)
		fail("ask the settings of", path);
	cfmakeraw(&t);
	t.c_cflag |= CLOCAL;
	if (tcsetattr(fd, TCSANOW, &t) < 0)
		fail("make raw", path);
	return fd;
}

static void set_limit(int which, rlim_t soft, rlim_t hard)
{
	setrlimit((__rlimit_resource_t)which, &(struct rlimit){soft, hard});
}

static void set_up_system(void)
{
	sethostname("lab", 3);
	set_limit(RLIMIT_CORE, 0, 0);
	set_limit(RLIMIT_NOFILE, 1024, 1 << 20);
	set_limit(RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
	write_setting("/proc/sys/kernel/panic_on_oops", "1");
	write_setting("/proc/sys/kernel/core_pattern", "");
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	struct ifreq lo = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
	if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &lo) < 0)
		fail("bring up", "lo");
	close(fd);
}

static void set_size(const char *rows_cols)
{
	unsigned rows, cols;
	if (terminal < 0 || sscanf(rows_cols, "%u %u", &rows, &cols) != 2)
		return;
	struct winsize size = {.ws_row = (unsigned short)rows, .ws_col = (unsigned short)cols};
	ioctl(terminal, TIOCSWINSZ, &size);
}

/* -- the plan ---------------------------------------------------------------------------------- */

static char *read_plan(const char *program, size_t *len)
{
	char *path = must_alloc(malloc(strlen(program) + sizeof "plan"));
	strcpy(path, program);
	strcpy(strrchr(path, '/') + 1, "plan");
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	struct stat st;
	if (fd < 0 || fstat(fd, &st) < 0)
		fail("read", path);
	char *data = must_alloc(malloc((size_t)st.st_size + 1));
	size_t got = 0;
	while (got < (size_t)st.st_size) {
		ssize_t n = read(fd, data + got, (size_t)st.st_size - got);
		if (n <= 0)
			fail("read", path);
		got += (size_t)n;
	}
	data[got] = '\0';
	close(fd);
	free(path);
	*len = got;
	return data;
}

static void do_record(char letter, char *value)
{
	switch (letter) {
	case 'N': forbid_setuid(); break;
	case 'T': mount_tmpfs(value); break;
	case 'D': make_folders(value); break;
	case 'B': show_again(value); break;
	case 'S': mount_scratch(value); break;
	case 'K': link_target = value; break;
	case 'L': make_link(link_target, value); break;
	case 'C': cwd = value; break;
	case 'E': append(&env, value); break;
	case 'A': append(&args, value); break;
	case 'I':
		on_terminal = true;
		terminal = open_line("/dev/ttyS3");
		set_size(value);
		break;
	case 'J': stderr_on_terminal = true; break;
	default: errno = EINVAL; fail("follow", "the plan");
	}
}

static void do_plan(char *plan, size_t len)
{
	for (char *record = plan; record < plan + len; record += strlen(record) + 1)
		do_record(*record, record + 1);
	if (!args.count) {
		errno = EINVAL;
		fail("follow", "the plan");
	}
}

/* -- COMMAND ----------------------------------------------------------------------------------- */

static void cook_terminal(void)
{
	struct termios t;
	if (tcgetattr(terminal, &t) < 0)
		return;
	t.c_iflag |= ICRNL | IXON | IUTF8;
	t.c_oflag |= OPOST | ONLCR;
	t.c_lflag |= ISIG | ICANON | IEXTEN | ECHO | ECHOE | ECHOK | ECHOCTL | ECHOKE;
	tcsetattr(terminal, TCSANOW, &t);
}

static _Noreturn void become_command(int out_fd, int err_fd)
{
	sigset_t none;
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	for (int sig = 1; sig < NSIG; sig++)
		signal(sig, SIG_DFL);
	setsid();
	int in_fd;
	if (on_terminal) {
		in_fd = open("/dev/ttyS3", O_RDWR);
		ioctl(in_fd, TIOCSCTTY, 0);
	} else {
		in_fd = open("/dev/null", O_RDONLY);
	}
	dup2(in_fd, 0);
	dup2(on_terminal ? in_fd : out_fd, 1);
	dup2(stderr_on_terminal ? in_fd : err_fd, 2);
	close_range(3, ~0U, 0);
	umask(022);
	if (chdir(cwd) < 0) {
		dprintf(2, "lab: cannot enter the current directory %s: %s\n", cwd, strerror(errno));
		_exit(126);
	}
	environ = env.at;
	execvp(args.at[0], args.at);
	dprintf(2, "lab: cannot run %s: %s\n", args.at[0], strerror(errno));
	_exit(errno == ENOENT ? 127 : 126);
}

static pid_t start_command(void)
{
	int out_pipe[2], err_pipe[2];
	if (pipe2(out_pipe, O_CLOEXEC) < 0 || pipe2(err_pipe, O_CLOEXEC) < 0)
		fail("make", "a pipe");
	if (on_terminal)
		cook_terminal();
	pid_t pid = fork();
	if (pid < 0)
		fail("start", args.at[0]);
	if (pid == 0)
		become_command(out_pipe[1], err_pipe[1]);
	close(out_pipe[1]);
	close(err_pipe[1]);
	out.from = out_pipe[0];
	err.from = err_pipe[0];
	fcntl(out.from, F_SETFL, O_NONBLOCK);
	fcntl(err.from, F_SETFL, O_NONBLOCK);
	return pid;
}

/* Moves what can be moved without waiting. Returns false when there was nothing to take in. */
static bool pump(struct stream *s)
{
	bool took = false;
	if (s->begin == s->end && s->from >= 0) {
		ssize_t n = read(s->from, s->buf, sizeof s->buf);
		if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) {
			close(s->from);
			s->from = -1;
		} else if (n > 0) {
			s->begin = 0;
			s->end = (size_t)n;
			took = true;
		}
	}
	if (s->begin < s->end) {
		ssize_t n = write(s->to, s->buf + s->begin, s->end - s->begin);
		if (n > 0)
			s->begin += (size_t)n;
		else if (n < 0 && errno != EAGAIN && errno != EINTR)
			s->begin = s->end;
	}
	return took;
}

/* Takes out all that COMMAND has written; a daemon that it left behind holds nothing up. */
static void pump_out(struct stream *s)
{
	do {
		write_all(s->to, s->buf + s->begin, s->end - s->begin);
		s->begin = s->end;
	} while (pump(s));
	drain(s->to);
}

static struct pollfd poll_of(const struct stream *s)
{
	if (s->begin < s->end)
		return (struct pollfd){.fd = s->to, .events = POLLOUT};
	return (struct pollfd){.fd = s->from, .events = POLLIN};
}

static void read_control(void)
{
	static char line[CONTROL_LINE_MAX];
	static size_t len;
	char c;
	while (read(control, &c, 1) == 1) {
		if (c != '\n') {
			if (len < sizeof line - 1)
				line[len++] = c;
			continue;
		}
		line[len] = '\0';
		len = 0;
		if (!strncmp(line, "size ", 5))
			set_size(line + 5);
	}
}

/* Buries the dead; true when COMMAND is among them. */
static bool reap(pid_t command, int *status)
{
	bool ended = false;
	int s;
	pid_t pid;
	while ((pid = waitpid(-1, &s, WNOHANG)) > 0)
		if (pid == command) {
			*status = s;
			ended = true;
		}
	return ended;
}

static void on_child(int sig)
{
	(void)sig;
}

static int serve(pid_t command, const sigset_t *waiting)
{
	int status = 0;
	while (!reap(command, &status)) {
		struct pollfd fds[] = {poll_of(&out), poll_of(&err),
				       {.fd = control, .events = POLLIN}};
		if (ppoll(fds, 3, NULL, waiting) < 0)
			continue;
		if (fds[0].revents)
			pump(&out);
		if (fds[1].revents)
			pump(&err);
		if (fds[2].revents)
			read_control();
	}
	return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

static void write_back_scratch(void)
{
	int fd = open(scratch, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd >= 0) {
		syncfs(fd); /* not sync(): it would wait for a device that COMMAND left wedged */
		close(fd);
	}
}

int main(int argc, char **argv)
{
	if (argc < 1 || getpid() != 1) {
		fprintf(stderr, "lab init: this is the first process of the lab's guest\n");
		return 2;
	}
	mount_at("devtmpfs", "/dev", MS_NOSUID, "mode=755");
	control = open_line("/dev/ttyS2");
	tell("boot");
	out.to = open_line("/dev/ttyS0");
	err.to = open_line("/dev/ttyS1");
	sigset_t child, waiting;
	sigemptyset(&child);
	sigaddset(&child, SIGCHLD);
	sigprocmask(SIG_BLOCK, &child, &waiting);
	sigaction(SIGCHLD, &(struct sigaction){.sa_handler = on_child}, NULL);

	size_t len;
	char *plan = read_plan(argv[0], &len);
	mount_kernel_filesystems();
	open_host();
	set_up_system();
	do_plan(plan, len);
	close_host();

	int status = serve(start_command(), &waiting);
	pump_out(&out);
	pump_out(&err);
	drain(terminal);
	write_back_scratch();
	tell("exit %d", status);
	power_off();
}
