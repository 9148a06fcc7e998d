/* Loaded before libc (LD_PRELOAD): the k-th of some calls fails, as a full disk or a short machine
 * makes it fail. Simulated: each failure says so in the file of its counts.
 *
 *   FAILING_CALLS   names of calls, with commas between them; "files" are all of files
 *   FAILING_UNDER   of files those below this folder, by the path given or by the descriptor's
 *   FAILING_AT      k, from 1; 0: none fails, they are only counted
 *   FAILING_ERRNO   the error's number
 *   FAILING_ON      1: all that follow fail, too (a disk stays full)
 *   FAILING_COUNT   a file: a line for each call that counted, "call path"
 *   FAILING_PROGRAM this process's name must have it (/proc/self/cmdline); children of others pass
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static _Atomic unsigned long count;
static int counting; /* whether this process is meant */

static int here(void)
{
    const char *program = getenv("FAILING_PROGRAM");
    char words[4096];
    if (!program)
        return 1;
    int file = (int)syscall(SYS_openat, AT_FDCWD, "/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
    ssize_t n = file < 0 ? 0 : syscall(SYS_read, file, words, sizeof words);
    if (file >= 0)
        syscall(SYS_close, file);
    return n > 0 && memmem(words, (size_t)n, program, strlen(program)) != NULL;
}

__attribute__((constructor)) static void begin(void)
{
    counting = getenv("FAILING_COUNT") && here();
}

/* By its path each time: a child between fork and exec has closed its descriptors. */
static void note(const char *line, size_t size)
{
    int error = errno, file = (int)syscall(SYS_openat, AT_FDCWD, getenv("FAILING_COUNT"),
                                           O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (file >= 0) {
        syscall(SYS_write, file, line, size);
        syscall(SYS_close, file);
    }
    errno = error;
}

static int is_meant(const char *call, int of_files)
{
    const char *names = getenv("FAILING_CALLS"), *at = names;
    size_t size = strlen(call);
    for (; of_files && at && (at = strstr(at, "files")); ++at)
        if ((at == names || at[-1] == ',') && (at[5] == ',' || !at[5]))
            return 1;
    for (at = names; at && (at = strstr(at, call)); ++at)
        if ((at == names || at[-1] == ',') && (at[size] == ',' || !at[size]))
            return 1;
    return 0;
}

/* Counts the call; 1 with errno set where it is to fail. */
static int fails(const char *call, const char *path, int of_files)
{
    const char *at = getenv("FAILING_AT"), *error = getenv("FAILING_ERRNO"), *on = getenv("FAILING_ON");
    char line[PATH_MAX + 100];
    if (!counting || !is_meant(call, of_files))
        return 0;
    unsigned long number = ++count, wanted = at ? strtoul(at, NULL, 10) : 0;
    int failing = wanted && (number == wanted || (on && *on == '1' && number > wanted));
    int n = snprintf(line, sizeof line, "%s %s%s\n", call, path ? path : "-",
                     failing ? " SIMULATED FAILURE" : "");
    note(line, (size_t)n);
    if (failing)
        errno = error ? atoi(error) : EIO;
    return failing;
}

static int under(const char *path)
{
    const char *root = getenv("FAILING_UNDER");
    return root && path && !strncmp(path, root, strlen(root));
}

static int fails_at_path(const char *call, const char *path)
{
    return counting && under(path) && fails(call, path, 1);
}

static int fails_at(const char *call, int file)
{
    char link[64], path[PATH_MAX];
    if (!counting)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t n = readlink(link, path, sizeof path - 1);
    path[n > 0 ? n : 0] = 0;
    return under(path) && fails(call, path, 1);
}

/* ------------------------------------------------------------------- files */

#define OPEN(name)                                                                                 \
    API int name(const char *path, int flags, ...)                                                 \
    {                                                                                              \
        va_list list;                                                                              \
        va_start(list, flags);                                                                     \
        mode_t mode = va_arg(list, mode_t);                                                        \
        va_end(list);                                                                              \
        return fails_at_path("open", path) ? -1 : REAL(open64)(path, flags, mode);                 \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                               \
    API int name(int folder, const char *path, int flags, ...)                                     \
    {                                                                                              \
        va_list list;                                                                              \
        va_start(list, flags);                                                                     \
        mode_t mode = va_arg(list, mode_t);                                                        \
        va_end(list);                                                                              \
        return fails_at_path("open", path) ? -1 : REAL(openat64)(folder, path, flags, mode);       \
    }
OPENAT(openat)
OPENAT(openat64)

API ssize_t write(int file, const void *data, size_t size)
{
    return fails_at("write", file) ? -1 : REAL(write)(file, data, size);
}

API int fsync(int file) { return fails_at("fsync", file) ? -1 : REAL(fsync)(file); }
API int fchmod(int file, mode_t mode) { return fails_at("fchmod", file) ? -1 : REAL(fchmod)(file, mode); }
API int ftruncate64(int file, off64_t size)
{
    return fails_at("ftruncate", file) ? -1 : REAL(ftruncate64)(file, size);
}

API int rename(const char *from, const char *to)
{
    return fails_at_path("rename", to) ? -1 : REAL(rename)(from, to);
}

API int renameat(int a, const char *from, int b, const char *to)
{
    return fails_at_path("rename", to) ? -1 : REAL(renameat)(a, from, b, to);
}

API int mkdir(const char *path, mode_t mode)
{
    return fails_at_path("mkdir", path) ? -1 : REAL(mkdir)(path, mode);
}

API int unlink(const char *path) { return fails_at_path("unlink", path) ? -1 : REAL(unlink)(path); }
API int symlink(const char *to, const char *path)
{
    return fails_at_path("symlink", path) ? -1 : REAL(symlink)(to, path);
}

API int flock(int file, int operation)
{
    return fails_at("flock", file) ? -1 : REAL(flock)(file, operation);
}

/* --------------------------------------------------------------- processes */

API pid_t fork(void) { return fails("fork", NULL, 0) ? -1 : REAL(fork)(); }

/* What returns twice cannot be wrapped: a child of fork is as good here. */
API pid_t vfork(void) { return fails("fork", NULL, 0) ? -1 : REAL(fork)(); }

API int execve(const char *path, char *const argv[], char *const env[])
{
    return fails("execve", path, 0) ? -1 : REAL(execve)(path, argv, env);
}

API int pipe2(int pair[2], int flags) { return fails("pipe", NULL, 0) ? -1 : REAL(pipe2)(pair, flags); }
API int pipe(int pair[2]) { return fails("pipe", NULL, 0) ? -1 : REAL(pipe)(pair); }

API int socket(int domain, int type, int protocol)
{
    return fails("socket", NULL, 0) ? -1 : REAL(socket)(domain, type, protocol);
}

API int socketpair(int domain, int type, int protocol, int pair[2])
{
    return fails("socketpair", NULL, 0) ? -1 : REAL(socketpair)(domain, type, protocol, pair);
}

API int bind(int file, const struct sockaddr *at, socklen_t size)
{
    return fails("bind", NULL, 0) ? -1 : REAL(bind)(file, at, size);
}

API int listen(int file, int backlog)
{
    return fails("listen", NULL, 0) ? -1 : REAL(listen)(file, backlog);
}

API int kill(pid_t pid, int number) { return fails("kill", NULL, 0) ? -1 : REAL(kill)(pid, number); }
API int killpg(pid_t pid, int number) { return fails("kill", NULL, 0) ? -1 : REAL(killpg)(pid, number); }

API pid_t waitpid(pid_t pid, int *status, int options)
{
    return fails("waitpid", NULL, 0) ? -1 : REAL(waitpid)(pid, status, options);
}

API int setrlimit64(__rlimit_resource_t what, const struct rlimit64 *limit)
{
    return fails("setrlimit", NULL, 0) ? -1 : REAL(setrlimit64)(what, limit);
}

API int memfd_create(const char *name, unsigned flags)
{
    return fails("memfd_create", name, 0) ? -1 : REAL(memfd_create)(name, flags);
}

API int shm_open(const char *name, int flags, mode_t mode)
{
    return fails("shm_open", name, 0) ? -1 : REAL(shm_open)(name, flags, mode);
}
