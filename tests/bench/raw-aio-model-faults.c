/*
 * Faults that raw-aio-model has to find; for LD_PRELOAD
 *
 * The environment variable RAW_AIO_MODEL_FAULT is "KIND:N": each N-th request
 * of the program that the kind concerns goes wrong, and all say that they went
 * well.
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
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <dlfcn.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include "qemu/atomic.h"
#include "qemu/units.h"
#ifdef CONFIG_LINUX_AIO
#include <libaio.h>
#endif

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

static ssize_t (*real_pread)(int, void *, size_t, off_t);
static ssize_t (*real_pwrite)(int, const void *, size_t, off_t);
static ssize_t (*real_preadv)(int, const struct iovec *, int, off_t);
static ssize_t (*real_pwritev)(int, const struct iovec *, int, off_t);
static ssize_t (*real_preadv2)(int, const struct iovec *, int, off_t, int);
static ssize_t (*real_pwritev2)(int, const struct iovec *, int, off_t, int);

static void __attribute__((constructor)) init(void)
{
    const char *value = getenv("RAW_AIO_MODEL_FAULT");

    /* off_t has 64 bits */
    real_pread = dlsym(RTLD_NEXT, "pread64");
    real_pwrite = dlsym(RTLD_NEXT, "pwrite64");
    real_preadv = dlsym(RTLD_NEXT, "preadv64");
    real_pwritev = dlsym(RTLD_NEXT, "pwritev64");
    real_preadv2 = dlsym(RTLD_NEXT, "preadv64v2");
    real_pwritev2 = dlsym(RTLD_NEXT, "pwritev64v2");

    for (unsigned i = 0; value && i < ARRAY_SIZE(fault_name); i++) {
        size_t len = strlen(fault_name[i]);

        if (!strncmp(value, fault_name[i], len) && value[len] == ':') {
            fault = i;
            every = atoi(value + len + 1);
        }
    }
    if (!fault || !every) {
        fprintf(stderr, "RAW_AIO_MODEL_FAULT: KIND:N with a kind of drop, "
                "short, tear, stale, empty\n");
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

    if (bytes < SECTOR || bytes > LONGEST || fstat(fd, &st) < 0 ||
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

ssize_t pread(int fd, void *buf, size_t bytes, off_t offset)
{
    struct iovec iov = { buf, bytes };

    return faked_read(fd, &iov, 1, offset)
           ? bytes : real_pread(fd, buf, bytes, offset);
}

ssize_t preadv(int fd, const struct iovec *iov, int n, off_t offset)
{
    return faked_read(fd, iov, n, offset)
           ? total(iov, n) : real_preadv(fd, iov, n, offset);
}

ssize_t preadv2(int fd, const struct iovec *iov, int n, off_t offset, int flags)
{
    return faked_read(fd, iov, n, offset)
           ? total(iov, n) : real_preadv2(fd, iov, n, offset, flags);
}

ssize_t pwrite(int fd, const void *buf, size_t bytes, off_t offset)
{
    struct iovec iov = { (void *)buf, bytes };
    uint8_t *spoilt = spoil_write(fd, &iov, 1, offset);

    return real_pwrite(fd, spoilt ?: buf, bytes, offset);
}

ssize_t pwritev(int fd, const struct iovec *iov, int n, off_t offset)
{
    uint8_t *spoilt = spoil_write(fd, iov, n, offset);

    return spoilt ? real_pwrite(fd, spoilt, total(iov, n), offset)
                  : real_pwritev(fd, iov, n, offset);
}

ssize_t pwritev2(int fd, const struct iovec *iov, int n, off_t offset,
                 int flags)
{
    uint8_t *spoilt = spoil_write(fd, iov, n, offset);

    return spoilt ? real_pwrite(fd, spoilt, total(iov, n), offset)
                  : real_pwritev2(fd, iov, n, offset, flags);
}

#ifdef CONFIG_LINUX_AIO
/* What is read instead is in another file. */
static void redirect_read(struct iocb *iocb, const uint8_t *buf, size_t bytes)
{
    int fd = memfd_create("raw-aio-model-faults", MFD_CLOEXEC);

    if (fd < 0 || real_pwrite(fd, buf, bytes, iocb->u.c.offset) != bytes) {
        fprintf(stderr, "raw-aio-model-faults: %s\n", strerror(errno));
        exit(2);
    }
    iocb->aio_fildes = fd;
    /* Of RWF_NOWAIT, which it may not know */
    iocb->aio_rw_flags = 0;
}

static void spoil_iocb(struct iocb *iocb)
{
    bool vector = iocb->aio_lio_opcode == IO_CMD_PREADV ||
                  iocb->aio_lio_opcode == IO_CMD_PWRITEV;
    struct iovec one = { iocb->u.c.buf, iocb->u.c.nbytes };
    const struct iovec *iov = vector ? iocb->u.c.buf : &one;
    int n = vector ? iocb->u.c.nbytes : 1, fd = iocb->aio_fildes;
    uint8_t *buf;

    switch (iocb->aio_lio_opcode) {
    case IO_CMD_PREAD:
    case IO_CMD_PREADV:
        buf = spoil_read(fd, iov, n, iocb->u.c.offset);
        if (buf) {
            redirect_read(iocb, buf, total(iov, n));
        }
        break;
    case IO_CMD_PWRITE:
    case IO_CMD_PWRITEV:
        buf = spoil_write(fd, iov, n, iocb->u.c.offset);
        if (buf) {
            iocb->aio_lio_opcode = IO_CMD_PWRITE;
            iocb->u.c.nbytes = total(iov, n);
            iocb->u.c.buf = buf;
        }
        break;
    default:
        break;
    }
}

int io_submit(io_context_t ring, long n, struct iocb **iocbs)
{
    static int (*real_io_submit)(io_context_t, long, struct iocb **);

    if (!qatomic_read(&real_io_submit)) {
        qatomic_set(&real_io_submit, dlsym(RTLD_NEXT, "io_submit"));
    }
    for (long i = 0; i < n; i++) {
        spoil_iocb(iocbs[i]);
    }
    return real_io_submit(ring, n, iocbs);
}
#endif
