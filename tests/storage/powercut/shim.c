/* Watches what a process does to the files below one folder: LD_PRELOADed by shim.py.
 *
 * It records every operation with its data, in order, into one file that a process and its children
 * share; it can end the process group at the n-th operation, and let chosen operations fail with an
 * errno.  Every function that changes a file or a name is wrapped; that none is missing is checked
 * by whoever reads the record: applied in full, it must give the folder as it is (disk.py).
 *
 *   POWERCUT_ROOT     absolute path of the folder, links resolved
 *   POWERCUT_RECORD   the record, appended to; not recording without it
 *   POWERCUT_CONTROL  struct control, mapped
 *   POWERCUT_TOLD     a file: what is written to it becomes a record of its own kind
 *
 * A write is recorded before a synchronous descriptor writes it and after any other, a flush before
 * it begins and after it ended: so a record never claims more to be durable than what is.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { CREATE = 'C', WRITE = 'W', DURABLE = 'D', SIZE = 'T', FLUSH = 'S', FLUSHED = 'E',
       RENAME = 'R', UNLINK = 'U', LINK = 'L', MKDIR = 'M', MAP = 'P', TOLD = 'A' };

enum { SEEN_MAX = 4096 };

struct record {
    uint32_t bytes, kind, first_path, second_path;
    uint64_t inode, thread;
    int64_t offset;          /* of a write; a file's new size; the mode of a new file */
};

/* Shared with the test, which may change it at any time. */
struct control {
    int64_t operations;      /* counted so far */
    int64_t kill_at;         /* end the process group before this operation; 0: never */
    int64_t kill_after;      /* end it before the operation that follows one of this kind; 0: no */
    int64_t passes;          /* so many of them may pass before */
    int64_t armed;           /* there was one */
    int64_t torn;            /* kill_at: after half of it, if it is a write; else not at all */
    int64_t error;           /* errno of operations that fail; 0: none does */
    int64_t synchronous;     /* only writes through a synchronous descriptor fail */
    int64_t failed;          /* operations that failed so far */
    char kinds[32];          /* kinds that fail */
    char path[256];          /* ... below paths that contain this */
    char seen[SEEN_MAX];     /* kind of the n-th operation, while n is below SEEN_MAX */
    int64_t ready;           /* the lock is made */
    pthread_mutex_t lock;    /* held from a change to its record, by all processes */
};

static const char *root, *told;
static size_t root_bytes;
static int record_fd = -1;
static struct control *control;


__attribute__((constructor)) static void start(void) {
    const char *path = getenv("POWERCUT_ROOT");
    if (root || !path) return;
    root_bytes = strlen(path);
    told = getenv("POWERCUT_TOLD");
    const char *record = getenv("POWERCUT_RECORD");
    if (record) {
        int fd = (int)syscall(SYS_openat, AT_FDCWD, record, O_WRONLY | O_CREAT | O_APPEND, 0600);
        /* A high number: programs take the low ones for granted. */
        record_fd = (int)syscall(SYS_fcntl, fd, F_DUPFD_CLOEXEC, 700);
        syscall(SYS_close, fd);
    }
    const char *shared = getenv("POWERCUT_CONTROL");
    if (shared) {
        int fd = (int)syscall(SYS_openat, AT_FDCWD, shared, O_RDWR | O_CLOEXEC, 0);
        void *map = (void *)syscall(SYS_mmap, NULL, sizeof *control, PROT_READ | PROT_WRITE,
                                    MAP_SHARED, fd, 0);
        syscall(SYS_close, fd);
        if (map != MAP_FAILED) control = map;
        /* The first process is alone: its children start later. */
        if (control && !control->ready) {
            pthread_mutexattr_t kind;
            pthread_mutexattr_init(&kind);
            pthread_mutexattr_setpshared(&kind, PTHREAD_PROCESS_SHARED);
            pthread_mutexattr_setrobust(&kind, PTHREAD_MUTEX_ROBUST);
            pthread_mutex_init(&control->lock, &kind);
            control->ready = 1;
        }
    }
    root = path;
}

static int below_root(const char *path) {
    if (!root) start();
    return root && !strncmp(path, root, root_bytes) &&
           (path[root_bytes] == '/' || path[root_bytes] == 0);
}

static void path_of(int fd, char out[PATH_MAX]) {
    char name[40];
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(name, out, PATH_MAX - 1);
    out[n < 0 ? 0 : n] = 0;
}

static void absolute(int directory, const char *path, char out[PATH_MAX]) {
    if (path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
        return;
    }
    char base[PATH_MAX];
    if (directory == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) base[0] = 0;
    } else {
        path_of(directory, base);
    }
    if (snprintf(out, PATH_MAX, "%s/%s", base, path) >= PATH_MAX) out[0] = 0;
}

static uint64_t inode_of(int fd) {
    struct stat found;
    return fstat(fd, &found) ? 0 : found.st_ino;
}

static uint64_t inode_at(const char *path) {
    struct stat found;
    return lstat(path, &found) ? 0 : found.st_ino;
}

static void note(int kind, uint64_t inode, int64_t offset, const char *first, const char *second,
                 const struct iovec *parts, int count, size_t bytes) {
    if (record_fd < 0) return;
    int saved = errno;
    size_t a = first ? strlen(first) : 0, b = second ? strlen(second) : 0;
    size_t total = sizeof(struct record) + a + b + bytes;
    char *buffer = malloc(total);
    struct record head = {(uint32_t)total, (uint32_t)kind, (uint32_t)a, (uint32_t)b,
                          inode, (uint64_t)syscall(SYS_gettid), offset};
    memcpy(buffer, &head, sizeof head);
    if (a) memcpy(buffer + sizeof head, first, a);
    if (b) memcpy(buffer + sizeof head + a, second, b);
    char *at = buffer + sizeof head + a + b;
    for (int i = 0; i < count && bytes; i++) {
        size_t n = parts[i].iov_len < bytes ? parts[i].iov_len : bytes;
        memcpy(at, parts[i].iov_base, n);
        at += n;
        bytes -= n;
    }
    /* One append: records of several threads and processes don't mix. */
    if (syscall(SYS_write, record_fd, buffer, total) != (ssize_t)total) abort();
    free(buffer);
    errno = saved;
}

static void note_names(int kind, uint64_t inode, const char *first, const char *second) {
    note(kind, inode, 0, first, second, NULL, 0, 0);
}

/* Nobody is between a change and its record when the process group ends. */
static void enter(void) {
    if (control && record_fd >= 0 && pthread_mutex_lock(&control->lock) == EOWNERDEAD)
        pthread_mutex_consistent(&control->lock);
}

static void leave(void) {
    int saved = errno;
    if (control && record_fd >= 0) pthread_mutex_unlock(&control->lock);
    errno = saved;
}

static void die(void) {
    kill(0, SIGKILL);
    for (;;) pause();
}

/* Before an operation: count it, end here, or make it fail (-1).  1: do half of it and end. */
static int step(int kind, const char *path, int synchronous) {
    if (!control) return 0;
    int64_t n = __atomic_add_fetch(&control->operations, 1, __ATOMIC_SEQ_CST);
    if (n < SEEN_MAX) control->seen[n] = (char)kind;
    if (control->kill_at && n == control->kill_at) {
        if (!control->torn) die();
        if (kind == WRITE) return 1;
    }
    if (control->armed) die();
    control->armed = kind == control->kill_after && control->passes-- == 0;
    if (control->error && memchr(control->kinds, kind, strnlen(control->kinds, 32)) &&
        (synchronous || !control->synchronous) && strstr(path, control->path)) {
        __atomic_add_fetch(&control->failed, 1, __ATOMIC_SEQ_CST);
        errno = (int)control->error;
        return -1;
    }
    return 0;
}

/* --- opening ----------------------------------------------------------------------------------- */

static int opened(int fd, const char *path, int flags, int existed) {
    if (fd < 0) return fd;
    struct stat found;
    if (!existed && !fstat(fd, &found))
        note(CREATE, found.st_ino, found.st_mode & 07777, path, NULL, NULL, 0, 0);
    else if (flags & O_TRUNC) note(SIZE, inode_of(fd), 0, NULL, NULL, NULL, 0, 0);
    return fd;
}

static int open_any(int directory, const char *path, int flags, mode_t mode) {
    char full[PATH_MAX];
    absolute(directory, path, full);
    int watched = below_root(full) && (flags & (O_CREAT | O_TRUNC));
    int existed = !watched || !access(full, F_OK);
    if (!watched) return (int)syscall(SYS_openat, directory, path, flags, mode);
    enter();
    int fd = -1;
    if ((existed && !(flags & O_TRUNC)) || step(CREATE, full, 0) == 0)
        fd = opened((int)syscall(SYS_openat, directory, path, flags, mode), full, flags, existed);
    leave();
    return fd;
}

#define OPEN_MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | __O_TMPFILE)) { \
        va_list rest; \
        va_start(rest, flags); \
        mode = va_arg(rest, mode_t); \
        va_end(rest); \
    }

int open(const char *path, int flags, ...) {
    OPEN_MODE(flags)
    return open_any(AT_FDCWD, path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    OPEN_MODE(flags)
    return open_any(AT_FDCWD, path, flags | O_LARGEFILE, mode);
}
int openat(int directory, const char *path, int flags, ...) {
    OPEN_MODE(flags)
    return open_any(directory, path, flags, mode);
}
int openat64(int directory, const char *path, int flags, ...) {
    OPEN_MODE(flags)
    return open_any(directory, path, flags | O_LARGEFILE, mode);
}
int creat(const char *path, mode_t mode) {
    return open_any(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode);
}
int creat64(const char *path, mode_t mode) { return creat(path, mode); }

/* --- writing ----------------------------------------------------------------------------------- */

static ssize_t transfer(int fd, const struct iovec *parts, int count, off_t offset) {
    if (offset < 0) return syscall(SYS_writev, fd, parts, count);
    return syscall(SYS_pwritev, fd, parts, count, (long)offset, 0L);
}

static ssize_t write_watched(int fd, const char *path, const struct iovec *parts, int count,
                             size_t bytes, off_t offset) {
    int synchronous = fcntl(fd, F_GETFL) & O_DSYNC;
    int fate = step(WRITE, path, synchronous);
    if (fate < 0) return -1;
    if (fate > 0) {
        struct iovec half = {parts[0].iov_base, (parts[0].iov_len + 1) / 2};
        off_t at = offset < 0 ? lseek(fd, 0, SEEK_CUR) : offset;
        ssize_t n = transfer(fd, &half, 1, offset);
        if (n > 0) note(WRITE, inode_of(fd), at, NULL, NULL, &half, 1, (size_t)n);
        die();
    }
    uint64_t inode = inode_of(fd);
    if (synchronous) {
        off_t at = offset < 0 ? lseek(fd, 0, SEEK_CUR) : offset;
        note(WRITE, inode, at, NULL, NULL, parts, count, bytes);
        ssize_t n = transfer(fd, parts, count, offset);
        if (n == (ssize_t)bytes) note(DURABLE, inode, at, NULL, NULL, parts, count, bytes);
        return n;
    }
    ssize_t n = transfer(fd, parts, count, offset);
    if (n > 0) {
        off_t at = offset < 0 ? lseek(fd, 0, SEEK_CUR) - n : offset;
        note(WRITE, inode, at, NULL, NULL, parts, count, (size_t)n);
    }
    return n;
}

static ssize_t write_any(int fd, const struct iovec *parts, int count, off_t offset) {
    char path[PATH_MAX];
    size_t bytes = 0;
    for (int i = 0; i < count; i++) bytes += parts[i].iov_len;
    path_of(fd, path);
    if (told && !strcmp(path, told)) {
        note(TOLD, 0, 0, NULL, NULL, parts, count, bytes);
        return transfer(fd, parts, count, offset);
    }
    if (!below_root(path) || !bytes) return transfer(fd, parts, count, offset);
    enter();
    ssize_t n = write_watched(fd, path, parts, count, bytes, offset);
    leave();
    return n;
}

ssize_t write(int fd, const void *data, size_t bytes) {
    struct iovec part = {(void *)data, bytes};
    return write_any(fd, &part, 1, -1);
}
ssize_t pwrite(int fd, const void *data, size_t bytes, off_t offset) {
    struct iovec part = {(void *)data, bytes};
    return write_any(fd, &part, 1, offset);
}
ssize_t pwrite64(int fd, const void *data, size_t bytes, off64_t offset) {
    return pwrite(fd, data, bytes, offset);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    return write_any(fd, parts, count, -1);
}
ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset) {
    return write_any(fd, parts, count, offset);
}
ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t offset) {
    return write_any(fd, parts, count, offset);
}

/* Copies in the kernel would escape the record: their callers fall back to write(). */
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t n, unsigned flags) {
    (void)in, (void)from, (void)out, (void)to, (void)n, (void)flags;
    errno = ENOSYS;
    return -1;
}
int fallocate(int fd, int mode, off_t offset, off_t bytes) {
    (void)fd, (void)mode, (void)offset, (void)bytes;
    errno = EOPNOTSUPP;
    return -1;
}
int fallocate64(int fd, int mode, off64_t offset, off64_t bytes) {
    return fallocate(fd, mode, offset, bytes);
}

int ftruncate(int fd, off_t bytes) {
    char path[PATH_MAX];
    path_of(fd, path);
    if (!below_root(path)) return (int)syscall(SYS_ftruncate, fd, bytes);
    enter();
    int done = step(SIZE, path, 0) < 0 ? -1 : (int)syscall(SYS_ftruncate, fd, bytes);
    if (!done) note(SIZE, inode_of(fd), bytes, NULL, NULL, NULL, 0, 0);
    leave();
    return done;
}
int ftruncate64(int fd, off64_t bytes) { return ftruncate(fd, bytes); }

int truncate(const char *path, off_t bytes) {
    char full[PATH_MAX];
    absolute(AT_FDCWD, path, full);
    if (!below_root(full)) return (int)syscall(SYS_truncate, path, bytes);
    enter();
    int done = step(SIZE, full, 0) < 0 ? -1 : (int)syscall(SYS_truncate, path, bytes);
    if (!done) note(SIZE, inode_at(full), bytes, NULL, NULL, NULL, 0, 0);
    leave();
    return done;
}
int truncate64(const char *path, off64_t bytes) { return truncate(path, bytes); }

void *mmap(void *address, size_t bytes, int protection, int flags, int fd, off_t offset) {
    if (fd >= 0 && (protection & PROT_WRITE) && (flags & MAP_SHARED)) {
        char path[PATH_MAX];
        path_of(fd, path);
        if (below_root(path)) note_names(MAP, inode_of(fd), path, NULL);
    }
    return (void *)syscall(SYS_mmap, address, bytes, protection, flags, fd, offset);
}
void *mmap64(void *address, size_t bytes, int protection, int flags, int fd, off64_t offset) {
    return mmap(address, bytes, protection, flags, fd, offset);
}

/* --- flushing ---------------------------------------------------------------------------------- */

static int flush_any(int fd, long call) {
    char path[PATH_MAX];
    path_of(fd, path);
    if (!below_root(path)) return (int)syscall(call, fd);
    enter();
    int fate = step(FLUSH, path, 1);
    leave();
    if (fate < 0) return -1;
    uint64_t inode = inode_of(fd);
    note_names(FLUSH, inode, NULL, NULL);
    int done = (int)syscall(call, fd);
    if (!done) note_names(FLUSHED, inode, NULL, NULL);
    return done;
}
int fsync(int fd) { return flush_any(fd, SYS_fsync); }
int fdatasync(int fd) { return flush_any(fd, SYS_fdatasync); }

/* --- names ------------------------------------------------------------------------------------- */

static int rename_any(int from, const char *old, int to, const char *new, unsigned flags) {
    char first[PATH_MAX], second[PATH_MAX];
    absolute(from, old, first);
    absolute(to, new, second);
    if (!below_root(first) && !below_root(second))
        return (int)syscall(SYS_renameat2, from, old, to, new, flags);
    enter();
    int done = step(RENAME, second, 0) < 0 ? -1 : (int)syscall(SYS_renameat2, from, old, to, new, flags);
    if (!done) note_names(RENAME, inode_at(second), first, second);
    leave();
    return done;
}
int rename(const char *old, const char *new) {
    return rename_any(AT_FDCWD, old, AT_FDCWD, new, 0);
}
int renameat(int from, const char *old, int to, const char *new) {
    return rename_any(from, old, to, new, 0);
}
int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
    return rename_any(from, old, to, new, flags);
}

static int unlink_any(int directory, const char *path, int flags) {
    char full[PATH_MAX];
    absolute(directory, path, full);
    if (!below_root(full)) return (int)syscall(SYS_unlinkat, directory, path, flags);
    enter();
    int done = step(UNLINK, full, 0) < 0 ? -1 : (int)syscall(SYS_unlinkat, directory, path, flags);
    if (!done) note_names(UNLINK, 0, full, NULL);
    leave();
    return done;
}
int unlink(const char *path) { return unlink_any(AT_FDCWD, path, 0); }
int unlinkat(int directory, const char *path, int flags) {
    return unlink_any(directory, path, flags);
}
int rmdir(const char *path) { return unlink_any(AT_FDCWD, path, AT_REMOVEDIR); }

int remove(const char *path) {
    int done = unlink(path);
    return done && errno == EISDIR ? rmdir(path) : done;
}

static int link_any(int from, const char *old, int to, const char *new, int flags) {
    char first[PATH_MAX], second[PATH_MAX];
    absolute(from, old, first);
    absolute(to, new, second);
    if (!below_root(second)) return (int)syscall(SYS_linkat, from, old, to, new, flags);
    enter();
    int done = step(LINK, second, 0) < 0 ? -1 : (int)syscall(SYS_linkat, from, old, to, new, flags);
    if (!done) note_names(LINK, inode_at(second), first, second);
    leave();
    return done;
}
int link(const char *old, const char *new) {
    return link_any(AT_FDCWD, old, AT_FDCWD, new, 0);
}
int linkat(int from, const char *old, int to, const char *new, int flags) {
    return link_any(from, old, to, new, flags);
}

static int mkdir_any(int directory, const char *path, mode_t mode) {
    char full[PATH_MAX];
    absolute(directory, path, full);
    if (!below_root(full)) return (int)syscall(SYS_mkdirat, directory, path, mode);
    if (!access(full, F_OK)) {  /* no operation: it fails */
        errno = EEXIST;
        return -1;
    }
    enter();
    int done = step(MKDIR, full, 0) < 0 ? -1 : (int)syscall(SYS_mkdirat, directory, path, mode);
    if (!done) note_names(MKDIR, inode_at(full), full, NULL);
    leave();
    return done;
}
int mkdir(const char *path, mode_t mode) { return mkdir_any(AT_FDCWD, path, mode); }
int mkdirat(int directory, const char *path, mode_t mode) {
    return mkdir_any(directory, path, mode);
}
