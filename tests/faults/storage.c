/* Storage that fails on demand: preloaded into a process, it counts the system calls that change files, and at the n-th of them
   ends the process or returns an error. cc -shared -fPIC -o storage.so storage.c -ldl */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

enum { KILL_BEFORE = -1, KILL_HALF = -2, KILL_AFTER = -3 };

static atomic_long count;
static long at;     /* the call that fails, from 1 */
static int kind;    /* one of the above, or an errno */
static int sticky;  /* whether all writing calls after it fail too, as on a full disk */
static int armed;

void storage_arm(long n, int what, int stays) { at = n; kind = what; sticky = stays; atomic_store(&count, 0); armed = 1; }
long storage_disarm(void) { armed = 0; return atomic_load(&count); }

static void end(void) { syscall(SYS_kill, syscall(SYS_getpid), SIGKILL); for (;;) pause(); }

/* 0: go on; 1: fail with errno; 2: do it, then end; 3: do half of it, then end */
static int turn(int grows) {
    if (!armed) return 0;
    long n = atomic_fetch_add(&count, 1) + 1;
    if (n < at || (n > at && !(sticky && grows))) return 0;
    if (kind == KILL_BEFORE) end();
    if (kind == KILL_AFTER) return 2;
    if (kind == KILL_HALF) return 3;
    errno = kind;
    return 1;
}

#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, name)
#define ACT(grows, call) do { int t = turn(grows); if (t == 1) return -1; __typeof__(call) r = call; if (t >= 2) end(); return r; } while (0)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    if (fd <= 2) return real(fd, data, size);
    int t = turn(1);
    if (t == 1) return -1;
    ssize_t r = real(fd, data, t == 3 ? size / 2 : size);
    if (t >= 2) end();
    return r;
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, #name, const char *, int, ...); \
        va_list list; va_start(list, flags); int mode = va_arg(list, int); va_end(list); \
        if (!(flags & (O_CREAT | O_DIRECTORY | O_WRONLY | O_RDWR))) return real(path, flags, mode); \
        ACT(1, real(path, flags, mode)); }
OPEN(open)
OPEN(open64)

int fsync(int fd) { REAL(int, "fsync", int); ACT(0, real(fd)); }
int fdatasync(int fd) { REAL(int, "fdatasync", int); ACT(0, real(fd)); }
int rename(const char *a, const char *b) { REAL(int, "rename", const char *, const char *); ACT(1, real(a, b)); }
int renameat2(int d, const char *a, int e, const char *b, unsigned f) {
    REAL(int, "renameat2", int, const char *, int, const char *, unsigned); ACT(1, real(d, a, e, b, f)); }
int unlink(const char *path) { REAL(int, "unlink", const char *); ACT(0, real(path)); }
int unlinkat(int d, const char *path, int f) { REAL(int, "unlinkat", int, const char *, int); ACT(0, real(d, path, f)); }
int rmdir(const char *path) { REAL(int, "rmdir", const char *); ACT(0, real(path)); }
int mkdir(const char *path, mode_t mode) { REAL(int, "mkdir", const char *, mode_t); ACT(1, real(path, mode)); }
int symlink(const char *a, const char *b) { REAL(int, "symlink", const char *, const char *); ACT(1, real(a, b)); }
