/*
 * Faults below QEMU, for raw-aio-model; for LD_PRELOAD
 *
 * The environment variable RAW_AIO_MODEL_FAULT says what goes wrong.
 *
 * "KIND:N" is what the model has to find: each N-th request of the program that
 * the kind concerns goes wrong, and all say that they went well.
 *
 *   drop    a write that changes nothing
 *   short   a write of its first part, reported as full
 *   tear    a write that leaves out one sector in its middle
 *   stale   a read that returns what was there before the last write
 *   empty   a read that leaves its buffer as it is
 *
 * A flush or FUA that is not obeyed is not among them: without a power cut
 * nobody can tell.
 *
 * "CALL:N:HOW" is what QEMU has to cope with: the N-th call of that name fails,
 * and says so.  "CALL:N+:HOW" is that one and all after it.  The program says
 * from when on calls are counted (raw-aio-model --tolerate does).
 *
 *   EIO, ... the call fails with that errno and does nothing
 *   short    it transfers a part, and says so; io_submit(2) takes half
 *   odd      a read with O_DIRECT that ends within a sector
 *   zero     a write that returns 0
 *   sleep    it succeeds, but not before the main loop has served timers; where
 *            it is the loop itself that calls, 20 ms later
 *   count    nothing
 *
 * The calls of the raw file engine are all made through functions of libc and
 * libaio, so these are replaced; nothing that matters goes through syscall(2).
 * Reads and writes with read(2) and write(2) are those of eventfds: images are
 * not used with them, but for QEMU's own code that preallocates.  "event" is
 * the result of a request of Linux AIO.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <dlfcn.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include "qemu/atomic.h"
#include "qemu/units.h"
#ifdef CONFIG_LINUX_AIO
#include <libaio.h>
#endif
#include "raw-aio-model-faults.h"

#define SECTOR  512

/* The model itself reads the file in larger parts than QEMU does. */
#define LONGEST (2 * MiB)

typedef enum Fault {
    FAULT_NONE,
    FAULT_DROP,
    FAULT_SHORT,
    FAULT_TEAR,
    FAULT_STALE,
    FAULT_EMPTY,
} Fault;

static const char *const fault_name[] = {
    "none", "drop", "short", "tear", "stale", "empty",
};

static Fault fault;
static unsigned every;
static unsigned count;      /* atomic; requests that could go wrong */

/* What a write has replaced, for FAULT_STALE; lock */
static struct {
    pthread_mutex_t lock;
    uint8_t *data;
    off_t offset;
    size_t bytes;
} old = { .lock = PTHREAD_MUTEX_INITIALIZER };

/* The symbols of functions with a 64-bit off_t */
static const char *const symbol[CALL__MAX] = {
    [CALL_PREAD] = "pread64",
    [CALL_PWRITE] = "pwrite64",
    [CALL_PREADV] = "preadv64",
    [CALL_PWRITEV] = "pwritev64",
    [CALL_PREADV2] = "preadv64v2",
    [CALL_PWRITEV2] = "pwritev64v2",
    [CALL_IO_SETUP] = "io_setup",
    [CALL_IO_SUBMIT] = "io_submit",
    [CALL_IO_GETEVENTS] = "io_getevents",
    [CALL_FDATASYNC] = "fdatasync",
    [CALL_FALLOCATE] = "fallocate64",
    [CALL_FTRUNCATE] = "ftruncate64",
    [CALL_EVENTFD] = "eventfd",
    [CALL_READ] = "read",
    [CALL_WRITE] = "write",
    [CALL_PTHREAD_CREATE] = "pthread_create",
};

static const char *const call_name[CALL__MAX] = {
    "pread", "pwrite", "preadv", "pwritev", "preadv2", "pwritev2", "io_setup",
    "io_submit", "io_getevents", "event", "fdatasync", "fallocate", "ftruncate",
    "eventfd", "read", "write", "pthread_create",
};

/*
 * When it is first needed: what other libraries do at their start may come
 * before init().
 */
static void *real_function(ModelCall call)
{
    static void *functions[CALL__MAX];  /* atomic */
    void *f = qatomic_read(&functions[call]);

    if (!f) {
        f = dlsym(RTLD_NEXT, symbol[call]);
        qatomic_set(&functions[call], f);
    }
    return f;
}

#define REAL(name, call) ((typeof(&name))real_function(call))
#define real_pread      REAL(pread, CALL_PREAD)
#define real_pwrite     REAL(pwrite, CALL_PWRITE)
#define real_preadv     REAL(preadv, CALL_PREADV)
#define real_pwritev    REAL(pwritev, CALL_PWRITEV)
#define real_preadv2    REAL(preadv2, CALL_PREADV2)
#define real_pwritev2   REAL(pwritev2, CALL_PWRITEV2)

static bool fails;          /* "CALL:N:HOW" was asked for; constant */
static ModelFault failure = { .call_name = call_name, .ignored_fd = -1 };

ModelFault *raw_aio_model_fault(void)
{
    return fails ? &failure : NULL;
}

static bool parse_how(const char *how)
{
    static const struct {
        const char *name;
        ModelHow how;
        int err;
    } hows[] = {
        { "count", HOW_COUNT }, { "short", HOW_SHORT }, { "odd", HOW_ODD },
        { "zero", HOW_ZERO }, { "sleep", HOW_SLEEP },
#define ERRNO(name) { #name, HOW_ERRNO, name }
        ERRNO(EAGAIN), ERRNO(EBADF), ERRNO(EINTR), ERRNO(EINVAL), ERRNO(EIO),
        ERRNO(EMFILE), ERRNO(ENOMEM), ERRNO(ENOSPC), ERRNO(ENOSYS),
        ERRNO(EOPNOTSUPP), ERRNO(EPERM), ERRNO(EDQUOT), ERRNO(EFBIG),
#undef ERRNO
    };

    for (unsigned i = 0; i < ARRAY_SIZE(hows); i++) {
        if (!strcmp(how, hows[i].name)) {
            failure.how = hows[i].how;
            failure.err = hows[i].err;
            return true;
        }
    }
    return false;
}

/* What is after the name of a call: ":N:HOW" or ":N+:HOW" */
static bool parse_failure(ModelCall call, const char *s)
{
    int end;

    if (sscanf(s, ":%u%n", &failure.at, &end) != 1) {
        return false;
    }
    failure.call = call;
    failure.onwards = s[end] == '+';
    end += failure.onwards;
    fails = s[end] == ':' && parse_how(s + end + 1) &&
            (failure.at || failure.how == HOW_COUNT);
    return fails;
}

static bool parse(const char *value)
{
    for (unsigned i = 0; i < ARRAY_SIZE(fault_name); i++) {
        size_t len = strlen(fault_name[i]);

        if (!strncmp(value, fault_name[i], len) && value[len] == ':') {
            fault = i;
            every = atoi(value + len + 1);
            return fault && every;
        }
    }
    for (unsigned i = 0; i < CALL__MAX; i++) {
        size_t len = strlen(call_name[i]);

        if (!strncmp(value, call_name[i], len) && value[len] == ':') {
            return parse_failure(i, value + len);
        }
    }
    return false;
}

static void __attribute__((constructor)) init(void)
{
    const char *value = getenv("RAW_AIO_MODEL_FAULT");

    if (!value || !parse(value)) {
        fprintf(stderr, "RAW_AIO_MODEL_FAULT: KIND:N with a kind of drop, "
                "short, tear, stale, empty; or CALL:N:HOW with the name of a "
                "system call and errno, short, odd, zero, sleep or count\n");
        exit(2);
    }
}

static size_t total(const struct iovec *iov, int n)
{
    size_t bytes = 0;

    for (int i = 0; i < n; i++) {
        bytes += iov[i].iov_len;
    }
    return bytes;
}

/* Whether a request of this size, to be counted, goes wrong */
static bool chosen(int fd, size_t bytes)
{
    struct stat st;

    if (!fault || bytes < SECTOR || bytes > LONGEST || fstat(fd, &st) < 0 ||
        !S_ISREG(st.st_mode)) {
        return false;
    }
    return (qatomic_fetch_inc(&count) + 1) % every == 0;
}

/* What the file has, zeroes after its end; never freed */
static uint8_t *content(int fd, size_t bytes, off_t offset)
{
    uint8_t *buf = aligned_alloc(4096, ROUND_UP(bytes, 4096));
    ssize_t len;

    memset(buf, 0, bytes);
    len = real_pread(fd, buf, bytes, offset);
    if (len < 0) {
        fprintf(stderr, "raw-aio-model-faults: %s\n", strerror(errno));
        exit(2);
    }
    return buf;
}

/*
 * Returns: what is to be written instead of @iov, or NULL
 */
static uint8_t *spoil_write(int fd, const struct iovec *iov, int n,
                            off_t offset)
{
    size_t bytes = total(iov, n), from = 0, to = bytes, at = 0;
    uint8_t *buf;

    if (fault == FAULT_EMPTY || !chosen(fd, bytes)) {
        return NULL;
    }
    buf = content(fd, bytes, offset);
    if (fault == FAULT_STALE) {
        pthread_mutex_lock(&old.lock);
        old.data = buf;
        old.offset = offset;
        old.bytes = bytes;
        pthread_mutex_unlock(&old.lock);
        return NULL;
    }
    if (fault == FAULT_SHORT) {
        from = bytes / 2;
    } else if (fault == FAULT_TEAR) {
        from = bytes / 2 / SECTOR * SECTOR;
        to = MIN(from + SECTOR, bytes);
    }
    fprintf(stderr, "%s: write of %zu bytes at %lld\n", fault_name[fault],
            bytes, (long long)offset);
    for (int i = 0; i < n; i++) {
        for (size_t j = 0; j < iov[i].iov_len; j++, at++) {
            if (at < from || at >= to) {
                buf[at] = ((uint8_t *)iov[i].iov_base)[j];
            }
        }
    }
    return buf;
}

/*
 * Returns: what is to be read instead, or NULL
 */
static uint8_t *spoil_read(int fd, const struct iovec *iov, int n, off_t offset)
{
    size_t bytes = total(iov, n), at = 0;
    uint8_t *buf = NULL;

    if (fault == FAULT_EMPTY && chosen(fd, bytes)) {
        buf = content(fd, bytes, offset);
        for (int i = 0; i < n; i++) {
            memcpy(buf + at, iov[i].iov_base, iov[i].iov_len);
            at += iov[i].iov_len;
        }
    } else if (fault == FAULT_STALE && bytes <= LONGEST) {
        off_t from, to;

        pthread_mutex_lock(&old.lock);
        from = MAX(offset, old.offset);
        to = MIN(offset + bytes, old.offset + old.bytes);
        if (old.data && from < to) {
            buf = content(fd, bytes, offset);
            memcpy(buf + (from - offset), old.data + (from - old.offset),
                   to - from);
            old.data = NULL;
        }
        pthread_mutex_unlock(&old.lock);
    }
    if (buf) {
        fprintf(stderr, "%s: read of %zu bytes at %lld\n", fault_name[fault],
                bytes, (long long)offset);
    }
    return buf;
}

static bool faked_read(int fd, const struct iovec *iov, int n, off_t offset)
{
    uint8_t *buf = spoil_read(fd, iov, n, offset);
    size_t at = 0;

    for (int i = 0; buf && i < n; i++) {
        memcpy(iov[i].iov_base, buf + at, iov[i].iov_len);
        at += iov[i].iov_len;
    }
    return buf;
}

/*
 * Calls that fail
 */

/* A worker sleeps until the main loop has served so many timers. */
#define NAP_BEATS       20
/* Then it does not serve any. */
#define NAP_LIMIT_MS    30000

static __thread bool is_worker;

/*
 * Count a call.
 *
 * Returns: whether it goes wrong
 */
static bool hit(ModelCall call)
{
    unsigned n;

    if (!qatomic_read(&failure.armed)) {
        return false;
    }
    n = qatomic_fetch_inc(&failure.calls[call]) + 1;
    return call == failure.call && failure.how != HOW_COUNT &&
           (n == failure.at || (n > failure.at && failure.onwards));
}

static void note(off_t offset, size_t bytes, int rwf, bool fdsync)
{
    failure.offset = offset;
    failure.bytes = bytes;
    failure.nowait = rwf & RWF_NOWAIT;
    failure.dsync = rwf & RWF_DSYNC;
    failure.fdsync = fdsync;
    failure.worker = is_worker;
    /* A full barrier: what is above can be read by whoever sees it. */
    qatomic_inc(&failure.happened);
}

static void nap(void)
{
    unsigned until = qatomic_read(&failure.beats) + NAP_BEATS;

    if (!is_worker) {
        qatomic_inc(&failure.slept_at_home);
        usleep(20000);
        return;
    }
    qatomic_inc(&failure.slept);
    qatomic_inc(&failure.asleep);
    for (int ms = 0; (int)(qatomic_read(&failure.beats) - until) < 0; ms++) {
        if (ms == NAP_LIMIT_MS) {
            fprintf(stderr, "raw-aio-model: the main loop serves no timer "
                    "while %s sleeps in a worker\n", call_name[failure.call]);
            _exit(EXIT_FAILURE);
        }
        usleep(1000);
    }
    qatomic_dec(&failure.asleep);
}

/*
 * Returns: true if a call fails with errno, which has no part that could be
 * done
 */
static bool fails_wholly(ModelCall call, off_t offset, size_t bytes)
{
    if (!hit(call)) {
        return false;
    }
    note(offset, bytes, 0, false);
    if (failure.how == HOW_SLEEP) {
        nap();
        return false;
    }
    errno = failure.err;
    return failure.how == HOW_ERRNO;
}

static bool is_counted_file(int fd)
{
    struct stat st;

    return qatomic_read(&failure.armed) &&
           fd != qatomic_read(&failure.ignored_fd) &&
           fstat(fd, &st) == 0 && S_ISREG(st.st_mode);
}

/* How much is transferred of so much; 0 if it can't be less */
static size_t short_of(int fd, size_t bytes)
{
    if (fcntl(fd, F_GETFL) & O_DIRECT) {
        /* Suits all devices */
        return ROUND_DOWN(bytes / 2, 4096);
    }
    return bytes / 2;
}

/* Returns: the first @bytes of a vector, to be freed; and their number */
static struct iovec *cut(const struct iovec *iov, int *n, size_t bytes)
{
    struct iovec *copy = malloc(*n * sizeof(*copy));
    int i;

    for (i = 0; bytes; i++) {
        copy[i] = iov[i];
        copy[i].iov_len = MIN(copy[i].iov_len, bytes);
        bytes -= copy[i].iov_len;
    }
    *n = i;
    return copy;
}

/* What was read after the first @bytes was not. */
static void poison(const struct iovec *iov, int n, size_t bytes)
{
    for (int i = 0; i < n; i++) {
        size_t skip = MIN(bytes, iov[i].iov_len);

        memset((uint8_t *)iov[i].iov_base + skip, 0xa5, iov[i].iov_len - skip);
        bytes -= skip;
    }
}

static ssize_t transfer_less(bool is_write, int fd, const struct iovec *iov,
                             int n, off_t offset, int rwf, size_t bytes)
{
    struct iovec *less = cut(iov, &n, bytes);
    ssize_t ret;
    int saved_errno;

    ret = is_write ? real_pwritev2(fd, less, n, offset, rwf)
                   : real_preadv2(fd, less, n, offset, rwf);
    saved_errno = errno;
    if (failure.how == HOW_ODD && ret > SECTOR) {
        ret -= 100;
        poison(less, n, ret);
    }
    free(less);
    errno = saved_errno;
    return ret;
}

/*
 * Returns: whether a call that transfers data goes wrong; then @ret is what it
 * returns
 */
static bool transfer_fails(ModelCall call, bool is_write, int fd,
                           const struct iovec *iov, int n, off_t offset,
                           int rwf, ssize_t *ret)
{
    size_t bytes = total(iov, n), less = 0;

    if (!is_counted_file(fd)) {
        return false;
    }
    if (call == failure.call &&
        (failure.how == HOW_SHORT || failure.how == HOW_ODD)) {
        less = short_of(fd, bytes);
        if (!less || (failure.how == HOW_ODD &&
                      !(fcntl(fd, F_GETFL) & O_DIRECT))) {
            return false;
        }
    }
    if (!hit(call)) {
        return false;
    }
    note(offset, bytes, rwf, false);
    switch (failure.how) {
    case HOW_ERRNO:
        errno = failure.err;
        *ret = -1;
        return true;
    case HOW_ZERO:
        *ret = 0;
        return true;
    case HOW_SHORT:
    case HOW_ODD:
        *ret = transfer_less(is_write, fd, iov, n, offset, rwf, less);
        return true;
    default:
        nap();
        return false;
    }
}

ssize_t pread(int fd, void *buf, size_t bytes, off_t offset)
{
    struct iovec iov = { buf, bytes };
    ssize_t ret;

    if (transfer_fails(CALL_PREAD, false, fd, &iov, 1, offset, 0, &ret)) {
        return ret;
    }
    return faked_read(fd, &iov, 1, offset)
           ? bytes : real_pread(fd, buf, bytes, offset);
}

ssize_t preadv(int fd, const struct iovec *iov, int n, off_t offset)
{
    ssize_t ret;

    if (transfer_fails(CALL_PREADV, false, fd, iov, n, offset, 0, &ret)) {
        return ret;
    }
    return faked_read(fd, iov, n, offset)
           ? total(iov, n) : real_preadv(fd, iov, n, offset);
}

ssize_t preadv2(int fd, const struct iovec *iov, int n, off_t offset, int flags)
{
    ssize_t ret;

    if (transfer_fails(CALL_PREADV2, false, fd, iov, n, offset, flags, &ret)) {
        return ret;
    }
    return faked_read(fd, iov, n, offset)
           ? total(iov, n) : real_preadv2(fd, iov, n, offset, flags);
}

ssize_t pwrite(int fd, const void *buf, size_t bytes, off_t offset)
{
    struct iovec iov = { (void *)buf, bytes };
    uint8_t *spoilt;
    ssize_t ret;

    if (transfer_fails(CALL_PWRITE, true, fd, &iov, 1, offset, 0, &ret)) {
        return ret;
    }
    spoilt = spoil_write(fd, &iov, 1, offset);
    return real_pwrite(fd, spoilt ?: buf, bytes, offset);
}

ssize_t pwritev(int fd, const struct iovec *iov, int n, off_t offset)
{
    uint8_t *spoilt;
    ssize_t ret;

    if (transfer_fails(CALL_PWRITEV, true, fd, iov, n, offset, 0, &ret)) {
        return ret;
    }
    spoilt = spoil_write(fd, iov, n, offset);
    return spoilt ? real_pwrite(fd, spoilt, total(iov, n), offset)
                  : real_pwritev(fd, iov, n, offset);
}

ssize_t pwritev2(int fd, const struct iovec *iov, int n, off_t offset,
                 int flags)
{
    uint8_t *spoilt;
    ssize_t ret;

    if (transfer_fails(CALL_PWRITEV2, true, fd, iov, n, offset, flags, &ret)) {
        return ret;
    }
    spoilt = spoil_write(fd, iov, n, offset);
    return spoilt ? real_pwrite(fd, spoilt, total(iov, n), offset)
                  : real_pwritev2(fd, iov, n, offset, flags);
}

int fdatasync(int fd)
{
    return is_counted_file(fd) && fails_wholly(CALL_FDATASYNC, 0, 0)
           ? -1 : REAL(fdatasync, CALL_FDATASYNC)(fd);
}

int fallocate(int fd, int mode, off_t offset, off_t bytes)
{
    return is_counted_file(fd) && fails_wholly(CALL_FALLOCATE, offset, bytes)
           ? -1 : REAL(fallocate, CALL_FALLOCATE)(fd, mode, offset, bytes);
}

int ftruncate(int fd, off_t size)
{
    return is_counted_file(fd) && fails_wholly(CALL_FTRUNCATE, 0, 0)
           ? -1 : REAL(ftruncate, CALL_FTRUNCATE)(fd, size);
}

/* Descriptors that eventfd(2) has returned; atomic */
static bool is_eventfd[4096];

int eventfd(unsigned int value, int flags)
{
    int fd;

    if (fails_wholly(CALL_EVENTFD, 0, 0)) {
        return -1;
    }
    fd = REAL(eventfd, CALL_EVENTFD)(value, flags);
    if (fd >= 0 && fd < ARRAY_SIZE(is_eventfd)) {
        qatomic_set(&is_eventfd[fd], true);
    }
    return fd;
}

static bool is_counted_eventfd(int fd)
{
    return fd >= 0 && fd < ARRAY_SIZE(is_eventfd) &&
           qatomic_read(&is_eventfd[fd]);
}

ssize_t read(int fd, void *buf, size_t bytes)
{
    if (is_counted_eventfd(fd) && fails_wholly(CALL_READ, 0, 0)) {
        return -1;
    }
    return REAL(read, CALL_READ)(fd, buf, bytes);
}

ssize_t write(int fd, const void *buf, size_t bytes)
{
    ssize_t ret;

    if (!is_counted_eventfd(fd) || !fails_wholly(CALL_WRITE, 0, 0)) {
        return REAL(write, CALL_WRITE)(fd, buf, bytes);
    }
    if (failure.err == EAGAIN) {
        /* The counter is at its maximum: so there is something to be read. */
        ret = REAL(write, CALL_WRITE)(fd, buf, bytes);
        if (ret < 0) {
            return ret;
        }
    }
    errno = failure.err;
    return -1;
}

typedef struct Start {
    void *(*func)(void *);
    void *arg;
} Start;

static void *start_worker(void *opaque)
{
    Start start = *(Start *)opaque;

    free(opaque);
    is_worker = true;
    return start.func(start.arg);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attr,
                   void *(*func)(void *), void *arg)
{
    Start *start;
    int ret;

    if (!qatomic_read(&failure.new_workers)) {
        return REAL(pthread_create, CALL_PTHREAD_CREATE)(thread, attr, func,
                                                         arg);
    }
    if (fails_wholly(CALL_PTHREAD_CREATE, 0, 0)) {
        return failure.err;
    }
    start = malloc(sizeof(*start));
    *start = (Start) { func, arg };
    ret = REAL(pthread_create, CALL_PTHREAD_CREATE)(thread, attr, start_worker,
                                                    start);
    if (ret) {
        free(start);
    }
    return ret;
}

#ifdef CONFIG_LINUX_AIO
static void redirect(struct iocb *iocb)
{
    int fd = memfd_create("raw-aio-model-faults", MFD_CLOEXEC);

    if (fd < 0) {
        fprintf(stderr, "raw-aio-model-faults: %s\n", strerror(errno));
        exit(2);
    }
    iocb->aio_fildes = fd;
    /* Of RWF_NOWAIT, which it may not know */
    iocb->aio_rw_flags = 0;
}

/* What is read instead is in another file. */
static void redirect_read(struct iocb *iocb, const uint8_t *buf, size_t bytes)
{
    redirect(iocb);
    if (real_pwrite(iocb->aio_fildes, buf, bytes, iocb->u.c.offset) != bytes) {
        fprintf(stderr, "raw-aio-model-faults: %s\n", strerror(errno));
        exit(2);
    }
}

typedef struct Submission {
    const struct iovec *iov;
    int n;
    bool is_write, is_vector;
    struct iovec one;
    size_t bytes;               /* 0: not a read or write */
} Submission;

static void look_at(const struct iocb *iocb, Submission *s)
{
    *s = (Submission) {
        .is_write = iocb->aio_lio_opcode == IO_CMD_PWRITE ||
                    iocb->aio_lio_opcode == IO_CMD_PWRITEV,
        .is_vector = iocb->aio_lio_opcode == IO_CMD_PREADV ||
                     iocb->aio_lio_opcode == IO_CMD_PWRITEV,
        .one = { iocb->u.c.buf, iocb->u.c.nbytes },
    };
    s->iov = s->is_vector ? iocb->u.c.buf : &s->one;
    s->n = s->is_vector ? iocb->u.c.nbytes : 1;
    if (iocb->aio_lio_opcode != IO_CMD_FDSYNC) {
        s->bytes = total(s->iov, s->n);
    }
}

static void spoil_iocb(struct iocb *iocb)
{
    Submission s;
    uint8_t *buf;

    look_at(iocb, &s);
    if (!s.bytes) {
        return;
    }
    if (!s.is_write) {
        buf = spoil_read(iocb->aio_fildes, s.iov, s.n, iocb->u.c.offset);
        if (buf) {
            redirect_read(iocb, buf, s.bytes);
        }
        return;
    }
    buf = spoil_write(iocb->aio_fildes, s.iov, s.n, iocb->u.c.offset);
    if (buf) {
        iocb->aio_lio_opcode = IO_CMD_PWRITE;
        iocb->u.c.nbytes = s.bytes;
        iocb->u.c.buf = buf;
        /* Refused, it would be done anew, without the fault. */
        iocb->aio_rw_flags &= ~RWF_NOWAIT;
    }
}

/*
 * An iocb that fails goes to another file, so that nothing is done, and its
 * result is replaced when it is fetched.  QEMU reads results from memory that
 * it shares with the kernel; if that does not look as it should, it uses
 * io_getevents(2), which can be caught.
 */
static struct {
    pthread_mutex_t lock;
    struct iocb *iocb[1024];
    unsigned n;
} failing = { .lock = PTHREAD_MUTEX_INITIALIZER };

static void failing_add(struct iocb *iocb)
{
    pthread_mutex_lock(&failing.lock);
    if (failing.n == ARRAY_SIZE(failing.iocb)) {
        fprintf(stderr, "raw-aio-model-faults: too many requests\n");
        exit(2);
    }
    failing.iocb[failing.n++] = iocb;
    pthread_mutex_unlock(&failing.lock);
}

static bool failing_remove(struct iocb *iocb)
{
    bool found = false;

    pthread_mutex_lock(&failing.lock);
    for (unsigned i = 0; i < failing.n && !found; i++) {
        if (failing.iocb[i] == iocb) {
            failing.iocb[i] = failing.iocb[--failing.n];
            found = true;
        }
    }
    pthread_mutex_unlock(&failing.lock);
    return found;
}

/*
 * Have an iocb fail, or do less.
 *
 * Returns: memory to be freed when it was submitted, or NULL
 */
static void *fail_iocb(struct iocb *iocb)
{
    size_t less = 0;
    Submission s;

    look_at(iocb, &s);
    if (failure.call == CALL_EVENT && failure.how == HOW_SHORT) {
        less = s.bytes ? short_of(iocb->aio_fildes, s.bytes) : 0;
        if (!less) {
            return NULL;
        }
    }
    if (!hit(CALL_EVENT)) {
        return NULL;
    }
    note(iocb->u.c.offset, s.bytes, iocb->aio_rw_flags,
         iocb->aio_lio_opcode == IO_CMD_FDSYNC);
    if (failure.how == HOW_ERRNO) {
        failing_add(iocb);
        redirect(iocb);
    } else if (s.is_vector && less) {
        struct iovec *iov = cut(s.iov, &s.n, less);

        iocb->u.c.buf = iov;
        iocb->u.c.nbytes = s.n;
        return iov;
    } else if (less) {
        iocb->u.c.nbytes = less;
    }
    return NULL;
}

int io_setup(int entries, io_context_t *ring)
{
    int ret;

    if (fails_wholly(CALL_IO_SETUP, 0, 0)) {
        return -failure.err;
    }
    ret = REAL(io_setup, CALL_IO_SETUP)(entries, ring);
    if (ret == 0 && fails &&
        (failure.call == CALL_IO_GETEVENTS ||
         (failure.call == CALL_EVENT && failure.how == HOW_ERRNO))) {
        /* The magic number, see struct aio_ring of Linux */
        ((uint32_t *)*ring)[4] = 0;
    }
    return ret;
}

int io_getevents(io_context_t ring, long min, long max, struct io_event *events,
                 struct timespec *timeout)
{
    int n;

    if (fails_wholly(CALL_IO_GETEVENTS, 0, 0)) {
        return -failure.err;
    }
    n = REAL(io_getevents, CALL_IO_GETEVENTS)(ring, min, max, events, timeout);
    for (int i = 0; i < n; i++) {
        if (failing_remove(events[i].obj)) {
            events[i].res = -(long)failure.err;
        }
    }
    return n;
}

static bool has_fdsync(long n, struct iocb **iocbs)
{
    while (n--) {
        if (iocbs[n]->aio_lio_opcode == IO_CMD_FDSYNC) {
            return true;
        }
    }
    return false;
}

/* Returns: whether it fails; then @n is what it returns, or what it takes */
static bool submit_fails(long *n, struct iocb **iocbs)
{
    if (failure.call == CALL_IO_SUBMIT && failure.how == HOW_SHORT && *n < 2) {
        return false;
    }
    if (!hit(CALL_IO_SUBMIT)) {
        return false;
    }
    note(0, 0, 0, false);
    switch (failure.how) {
    case HOW_ERRNO:
        *n = -failure.err;
        return true;
    case HOW_SHORT:
        *n /= 2;
        return false;
    default:
        if (has_fdsync(*n, iocbs)) {
            qatomic_inc(&failure.slept_fdsync);
        }
        nap();
        return false;
    }
}

/* Submit what fail_iocb() may change, and change it back. */
static int submit(io_context_t ring, long n, struct iocb **iocbs)
{
    struct iocb *before = calloc(n, sizeof(*before));
    void **memory = calloc(n, sizeof(*memory));
    int *fds = calloc(n, sizeof(*fds));
    int ret;

    for (long i = 0; i < n; i++) {
        before[i] = *iocbs[i];
        memory[i] = fail_iocb(iocbs[i]);
        fds[i] = iocbs[i]->aio_fildes;
    }
    ret = REAL(io_submit, CALL_IO_SUBMIT)(ring, n, iocbs);
    for (long i = 0; i < n; i++) {
        bool taken = i < ret;

        free(memory[i]);
        if (fds[i] != before[i].aio_fildes) {
            close(fds[i]);
            if (!taken) {
                failing_remove(iocbs[i]);
            }
        }
        /*
         * QEMU compares the result with what it asked for.  An iocb of a worker
         * may have ended already and be in use again.
         */
        if (!taken || !is_worker) {
            *iocbs[i] = before[i];
        }
    }
    free(before);
    free(memory);
    free(fds);
    return ret;
}

int io_submit(io_context_t ring, long n, struct iocb **iocbs)
{
    if (fails) {
        return submit_fails(&n, iocbs) ? n : submit(ring, n, iocbs);
    }
    for (long i = 0; i < n; i++) {
        spoil_iocb(iocbs[i]);
    }
    return REAL(io_submit, CALL_IO_SUBMIT)(ring, n, iocbs);
}
#endif
