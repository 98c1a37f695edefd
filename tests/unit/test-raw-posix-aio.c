/*
 * Unit tests for the raw file engine: front and native tier
 *
 * Faults come from the wrappers below, which this executable defines in place
 * of those of libc and libaio.  They act on the descriptors of test files only.
 * Not all of libaio may be replaced: the linker drops a library of which
 * nothing is needed.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <dlfcn.h>
#include <sys/resource.h>
#include <sys/uio.h>
#include <sys/utsname.h>
#include "block/aio.h"
#include "block/aio-wait.h"
#include "block/block.h"
#include "block/raw-posix-aio.h"
#include "block/raw-linux-aio.h"
#include "block/raw-aio-compat.h"
#include "block/raw-aio-watch.h"
#include "qapi/error.h"
#include "qapi/qapi-types-block-core.h"
#include "qemu/atomic.h"
#include "qemu/coroutine.h"
#include "qemu/cutils.h"
#include "qemu/defer-call.h"
#include "qemu/host-utils.h"
#include "qemu/iov.h"
#include "qemu/log.h"
#include "qemu/main-loop.h"
#include "qemu/memalign.h"
#include "qemu/module.h"
#include "qemu/timer.h"
#include "qemu/units.h"
#include "trace/control.h"
#include "iothread.h"

/* A test that takes longer hangs: its name is printed, and the run aborts. */
#define HANG_SECONDS 60

/* Suits O_DIRECT on any file system */
#define BLK 4096
#define FILE_BLKS 64
#define FILE_SIZE (FILE_BLKS * BLK)

/*
 * Interposition
 */

typedef enum Call {
    CALL_PREAD,
    CALL_PWRITE,
    CALL_PREADV,
    CALL_PWRITEV,
    CALL_PREADV2,
    CALL_PWRITEV2,
    CALL_FDATASYNC,
    CALL_IO_SETUP,
    CALL_IO_SUBMIT,     /* in an event loop */
    CALL_WORKER_SUBMIT, /* io_submit(), too */
    CALL_IO_GETEVENTS,
    CALL_REAL__MAX,

    /* For faults only: any of the three reads or writes */
    CALL_ANY_READ = CALL_REAL__MAX,
    CALL_ANY_WRITE,
    /* For gates only: io_submit() in a worker, which the kernel has done */
    CALL_WORKER_SUBMITTED,
    CALL__MAX,
} Call;

/* The names to look for, in this order: off_t has 64 bits. */
static const char *const real_name[CALL_REAL__MAX][2] = {
    [CALL_PREAD]        = { "pread64", "pread" },
    [CALL_PWRITE]       = { "pwrite64", "pwrite" },
    [CALL_PREADV]       = { "preadv64", "preadv" },
    [CALL_PWRITEV]      = { "pwritev64", "pwritev" },
    [CALL_PREADV2]      = { "preadv64v2", "preadv2" },
    [CALL_PWRITEV2]     = { "pwritev64v2", "pwritev2" },
    [CALL_FDATASYNC]    = { "fdatasync" },
    [CALL_IO_SETUP]     = { "io_setup" },
    [CALL_IO_SUBMIT]    = { "io_submit" },
    [CALL_WORKER_SUBMIT] = { "io_submit" },
    [CALL_IO_GETEVENTS] = { "io_getevents" },
};

/*
 * What a call is to do.  Any other value than PASS is a negative errno, or 0
 * for a call that does nothing and returns 0, or how much of it is really
 * done: bytes of a transfer, requests of io_submit().
 */
#define PASS LONG_MIN

#define ALWAYS -1

typedef struct Step {
    long ret;
    int times;  /* or ALWAYS */
} Step;

#ifdef CONFIG_LINUX_AIO
/* Opcodes for IocbRule and iocbs(): of a single element, or of a vector */
#define IOCB_READ 16
#define IOCB_WRITE 17

/* What is to happen to a kernel request */
typedef struct IocbRule {
    bool active;
    int opcode;     /* IO_CMD_*, IOCB_*, or -1 for any */
    int nowait;     /* 1: if it has RWF_NOWAIT, 0: if not, -1: in any case */
    int skip;       /* so many of those that match pass first */
    int times;      /* or ALWAYS */
    long ret;
} IocbRule;
#endif

typedef struct CallLog {
    Call call;
    int fd;
    int flags;
    off_t offset;
} CallLog;

#define ORDER_MAX 16384

static struct {
    pthread_mutex_t lock;
    pthread_cond_t cond;

    /* Protected by lock */
    Step steps[CALL__MAX][8];
    int nr_steps[CALL__MAX];
    unsigned calls[CALL_REAL__MAX];
    CallLog log[64];
    int nr_log;
    unsigned gate;      /* bits: these calls wait, but not an event loop's */
    int gate_fd;        /* on this descriptor, or on any if -1 */
    int at_gate;        /* how many wait there */
    AioContext *gate_ctx; /* whose event loop waits for them */
    uint32_t chaos;     /* seed of random faults, or 0 for none */
    size_t chaos_unit;  /* random short transfers are a multiple of it */
    bool chaos_misses;  /* random faults have RWF_NOWAIT only */
    int64_t submitted;  /* iocbs that the kernel has taken */
    unsigned iocbs[16][2];  /* [opcode][RWF_NOWAIT], offered to io_submit() */
#ifdef CONFIG_LINUX_AIO
    IocbRule refuse;    /* by io_submit(); a positive ret shortens the vector */
    IocbRule forge;     /* the result that the ring shows */
    int forged;         /* how many results */
    io_context_t last_ring;
    unsigned order[ORDER_MAX]; /* blocks, as the kernel was given them */
    int nr_order;
    bool hide_magic;    /* io_setup() returns a ring of unknown layout */
    bool hide_features;
#endif
} hooks = {
    .lock = PTHREAD_MUTEX_INITIALIZER,
    .cond = PTHREAD_COND_INITIALIZER,
};

/*
 * The clock and the count of voluntary context switches, which tell the engine
 * that a call has stalled.  They are what a test says, or else a busy machine
 * would make tests fail: the switches do not change by themselves.
 */
static int64_t clock_ahead_ns;      /* atomic */
static __thread int64_t clock_stopped_ns; /* of this thread; 0: it goes */
static bool real_switches;          /* atomic */
static unsigned switches_asked;     /* atomic */
static __thread long fake_switches;

/* What the next calls of an event loop are to do besides their work */
typedef enum Delay {
    DELAY_NONE,
    DELAY_WAIT,         /* takes 2 ms, as it waits */
    DELAY_BUSY,         /* takes 2 ms without waiting, as if preempted */
    DELAY_REAL_WAIT,
    DELAY_REAL_BUSY,
} Delay;

static struct {
    Delay what;
    int fd;     /* only if it concerns this file; or -1 */
    int times;  /* or ALWAYS */
} delay;        /* main thread */

/* Set before the descriptor is used in any other thread */
typedef enum FDMark {
    FD_STRANGER,
    FD_TEST,        /* what has RWF_NOWAIT may wait all the same */
    FD_REAL,        /* what has it may be refused */
} FDMark;

static uint8_t test_fds[65536];

static FDMark fd_mark(int fd)
{
    return fd >= 0 && fd < ARRAY_SIZE(test_fds) ? qatomic_read(&test_fds[fd])
                                                : FD_STRANGER;
}

static bool is_test_fd(int fd)
{
    return fd_mark(fd) != FD_STRANGER;
}

static void mark_fd(int fd, FDMark mark)
{
    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(fd, <, ARRAY_SIZE(test_fds));
    qatomic_set(&test_fds[fd], mark);
}

static void *real(Call call)
{
    static void *real_func[CALL_REAL__MAX];
    void *func = qatomic_read(&real_func[call]);

    for (int i = 0; !func && i < 2 && real_name[call][i]; i++) {
        func = dlsym(RTLD_NEXT, real_name[call][i]);
    }
    g_assert(func);
    qatomic_set(&real_func[call], func);
    return func;
}

typedef int ClockGettime(clockid_t id, struct timespec *ts);
typedef int Getrusage(__rusage_who_t who, struct rusage *usage);

static void *real_symbol(void **cached, const char *name)
{
    g_autofree char *interceptor = g_strconcat("__interceptor_", name, NULL);
    void *sym = dlsym(RTLD_DEFAULT, interceptor);

    if (!sym) {
        sym = dlsym(RTLD_NEXT, name);
    }
    g_assert(sym);
    qatomic_set(cached, sym);
    return sym;
}

int clock_gettime(clockid_t id, struct timespec *ts)
{
    static void *cached;
    ClockGettime *func = qatomic_read(&cached);
    int ret;

    if (!func) {
        func = real_symbol(&cached, "clock_gettime");
    }
    ret = func(id, ts);
    if (ret == 0 && id == CLOCK_MONOTONIC) {
        int64_t ns = qatomic_read(&clock_ahead_ns) + ts->tv_nsec +
                     ts->tv_sec * NANOSECONDS_PER_SECOND;

        ns = clock_stopped_ns ? clock_stopped_ns : ns;
        ts->tv_sec = ns / NANOSECONDS_PER_SECOND;
        ts->tv_nsec = ns % NANOSECONDS_PER_SECOND;
    }
    return ret;
}

int getrusage(__rusage_who_t who, struct rusage *usage)
{
    static void *cached;
    Getrusage *func = qatomic_read(&cached);
    int ret;

    if (!func) {
        func = real_symbol(&cached, "getrusage");
    }
    ret = func(who, usage);
#ifdef RUSAGE_THREAD
    if (who == RUSAGE_THREAD) {
        qatomic_inc(&switches_asked);
        if (!qatomic_read(&real_switches)) {
            usage->ru_nvcsw = fake_switches;
        }
    }
#endif
    return ret;
}

static void clock_turn(int64_t ns)
{
    qatomic_add(&clock_ahead_ns, ns);
    if (clock_stopped_ns) {
        clock_stopped_ns += ns;
    }
}

/* Only clock_turn() moves it for this thread.  No timer comes by itself. */
static void clock_stop(void)
{
    clock_stopped_ns = get_clock();
}

static void clock_go(void)
{
    clock_stopped_ns = 0;
}

static bool in_worker(void)
{
    return !qemu_get_current_aio_context();
}

/* At the end of a call of an event loop, which was about @fd */
static void delay_call(int fd)
{
    int64_t end;

    if (in_worker() || !delay.times || (delay.fd != -1 && delay.fd != fd)) {
        return;
    }
    if (delay.times != ALWAYS) {
        delay.times--;
    }
    switch (delay.what) {
    case DELAY_NONE:
        break;
    case DELAY_WAIT:
        fake_switches++;
        clock_turn(2 * SCALE_MS);
        break;
    case DELAY_BUSY:
        clock_turn(2 * SCALE_MS);
        break;
    case DELAY_REAL_WAIT:
        g_usleep(2000);
        break;
    case DELAY_REAL_BUSY:
        end = get_clock() + 2 * SCALE_MS;
        while (get_clock() < end) {
            /* nothing */
        }
        break;
    }
}

static void delay_next(Delay what, int fd, int times)
{
    delay.what = what;
    delay.fd = fd;
    delay.times = times;
}

/* What a call of an event loop takes, if its clock is stopped */
static int64_t cost_ns[CALL_REAL__MAX];     /* main thread */

static void spend(Call call)
{
    if (clock_stopped_ns) {
        clock_stopped_ns += cost_ns[call];
    }
}

static void hooks_reset(void)
{
    pthread_mutex_lock(&hooks.lock);
    g_assert_cmpint(hooks.at_gate, ==, 0);
    memset(hooks.nr_steps, 0, sizeof(hooks.nr_steps));
    memset(hooks.calls, 0, sizeof(hooks.calls));
    memset(hooks.iocbs, 0, sizeof(hooks.iocbs));
    hooks.nr_log = 0;
    hooks.gate = 0;
    hooks.chaos = 0;
    hooks.chaos_misses = false;
    hooks.submitted = 0;
#ifdef CONFIG_LINUX_AIO
    hooks.refuse = (IocbRule) { 0 };
    hooks.forge = (IocbRule) { 0 };
    hooks.forged = 0;
    hooks.nr_order = 0;
    hooks.hide_magic = false;
    hooks.hide_features = false;
#endif
    pthread_mutex_unlock(&hooks.lock);
}

/* The next @times calls return @ret, after those that were said before. */
static void fault(Call call, int times, long ret)
{
    pthread_mutex_lock(&hooks.lock);
    g_assert_cmpint(hooks.nr_steps[call], <, ARRAY_SIZE(hooks.steps[call]));
    hooks.steps[call][hooks.nr_steps[call]++] = (Step) { ret, times };
    pthread_mutex_unlock(&hooks.lock);
}

static unsigned calls(Call call)
{
    unsigned n;

    pthread_mutex_lock(&hooks.lock);
    if (call == CALL_ANY_READ) {
        n = hooks.calls[CALL_PREAD] + hooks.calls[CALL_PREADV] +
            hooks.calls[CALL_PREADV2];
    } else if (call == CALL_ANY_WRITE) {
        n = hooks.calls[CALL_PWRITE] + hooks.calls[CALL_PWRITEV] +
            hooks.calls[CALL_PWRITEV2];
    } else {
        n = hooks.calls[call];
    }
    pthread_mutex_unlock(&hooks.lock);
    return n;
}

static long next_step_locked(Call call)
{
    Step *s = hooks.steps[call];
    long ret;

    if (!hooks.nr_steps[call]) {
        return PASS;
    }
    ret = s->ret;
    if (s->times != ALWAYS && --s->times == 0) {
        hooks.nr_steps[call]--;
        memmove(s, s + 1, hooks.nr_steps[call] * sizeof(*s));
    }
    return ret;
}

/* xorshift; 0 .. max - 1 */
static uint32_t chaos_locked(uint32_t max)
{
    hooks.chaos ^= hooks.chaos << 13;
    hooks.chaos ^= hooks.chaos >> 17;
    hooks.chaos ^= hooks.chaos << 5;
    return hooks.chaos % max;
}

/* A fault that a caller who does everything right does not notice */
static long chaos_transfer_locked(size_t bytes, int flags)
{
    size_t units = bytes / hooks.chaos_unit;
    bool nowait = flags & RAW_AIO_RWF_NOWAIT;

    if (hooks.chaos_misses && !nowait) {
        return PASS;
    }
    switch (chaos_locked(8)) {
    case 0:
        return -EINTR;
    case 1:
    case 2:
        return units > 1 ? (1 + chaos_locked(units - 1)) * hooks.chaos_unit
                         : PASS;
    case 3:
        /* With RWF_NOWAIT this ends it, for as long as the descriptor lives. */
        return flags && !hooks.chaos_misses && !chaos_locked(nowait ? 32 : 4)
               ? -EOPNOTSUPP : PASS;
    case 4:
        return nowait ? -EAGAIN : PASS;
    default:
        return PASS;
    }
}

static void gate_locked(Call call, int fd)
{
    if (in_worker() && (hooks.gate & (1u << call)) &&
        (hooks.gate_fd == -1 || hooks.gate_fd == fd)) {
        hooks.at_gate++;
        aio_notify(hooks.gate_ctx); /* for gate_wait() */
        while (hooks.gate & (1u << call)) {
            pthread_cond_wait(&hooks.cond, &hooks.lock);
        }
        hooks.at_gate--;
    }
}

static void enter_call_locked(Call call, int fd, off_t offset, int flags)
{
    hooks.calls[call]++;
    if (hooks.nr_log < ARRAY_SIZE(hooks.log)) {
        hooks.log[hooks.nr_log++] = (CallLog) {
            .call = call,
            .fd = fd,
            .flags = flags,
            .offset = offset,
        };
    }
    gate_locked(call, fd);
}

static ssize_t real_transfer(Call call, int fd, const struct iovec *iov,
                             int niov, off_t offset, int flags)
{
    ssize_t (*do_pread)(int, void *, size_t, off_t);
    ssize_t (*do_pwrite)(int, const void *, size_t, off_t);
    ssize_t (*do_vec)(int, const struct iovec *, int, off_t);
    ssize_t (*do_vec2)(int, const struct iovec *, int, off_t, int);

    switch (call) {
    case CALL_PREAD:
        do_pread = real(call);
        return do_pread(fd, iov->iov_base, iov->iov_len, offset);
    case CALL_PWRITE:
        do_pwrite = real(call);
        return do_pwrite(fd, iov->iov_base, iov->iov_len, offset);
    case CALL_PREADV:
    case CALL_PWRITEV:
        do_vec = real(call);
        return do_vec(fd, iov, niov, offset);
    case CALL_PREADV2:
    case CALL_PWRITEV2:
        do_vec2 = real(call);
        return do_vec2(fd, iov, niov, offset, flags);
    default:
        g_assert_not_reached();
    }
}

static ssize_t transfer(Call call, int fd, const struct iovec *iov, int niov,
                        off_t offset, int flags)
{
    bool is_write = call == CALL_PWRITE || call == CALL_PWRITEV ||
                    call == CALL_PWRITEV2;
    g_autofree struct iovec *cut = NULL;
    long ret;

    if (!is_test_fd(fd)) {
        return real_transfer(call, fd, iov, niov, offset, flags);
    }

    pthread_mutex_lock(&hooks.lock);
    enter_call_locked(call, fd, offset, flags);
    ret = next_step_locked(call);
    if (ret == PASS) {
        ret = next_step_locked(is_write ? CALL_ANY_WRITE : CALL_ANY_READ);
    }
    if (ret == PASS && hooks.chaos) {
        ret = chaos_transfer_locked(iov_size(iov, niov), flags);
    }
    if (fd_mark(fd) != FD_REAL) {
        flags &= ~RAW_AIO_RWF_NOWAIT;
    }
    pthread_mutex_unlock(&hooks.lock);

    delay_call(fd);
    spend(call);
    if (ret == PASS) {
        return real_transfer(call, fd, iov, niov, offset, flags);
    }
    if (ret < 0) {
        errno = -ret;
        return -1;
    }
    if (ret == 0) {
        return 0;
    }
    cut = g_new(struct iovec, niov);
    niov = iov_copy(cut, niov, iov, niov, 0, ret);
    return real_transfer(call, fd, cut, niov, offset, flags);
}

ssize_t pread(int fd, void *buf, size_t bytes, off_t offset)
{
    struct iovec iov = { buf, bytes };

    return transfer(CALL_PREAD, fd, &iov, 1, offset, 0);
}

ssize_t pwrite(int fd, const void *buf, size_t bytes, off_t offset)
{
    struct iovec iov = { (void *)buf, bytes };

    return transfer(CALL_PWRITE, fd, &iov, 1, offset, 0);
}

ssize_t preadv(int fd, const struct iovec *iov, int niov, off_t offset)
{
    return transfer(CALL_PREADV, fd, iov, niov, offset, 0);
}

ssize_t pwritev(int fd, const struct iovec *iov, int niov, off_t offset)
{
    return transfer(CALL_PWRITEV, fd, iov, niov, offset, 0);
}

#if RAW_AIO_HAVE_RWF
ssize_t preadv2(int fd, const struct iovec *iov, int niov, off_t offset,
                int flags)
{
    return transfer(CALL_PREADV2, fd, iov, niov, offset, flags);
}

ssize_t pwritev2(int fd, const struct iovec *iov, int niov, off_t offset,
                 int flags)
{
    return transfer(CALL_PWRITEV2, fd, iov, niov, offset, flags);
}
#endif

int fdatasync(int fd)
{
    int (*do_fdatasync)(int) = real(CALL_FDATASYNC);
    long ret = PASS;

    if (is_test_fd(fd)) {
        pthread_mutex_lock(&hooks.lock);
        enter_call_locked(CALL_FDATASYNC, fd, 0, 0);
        ret = next_step_locked(CALL_FDATASYNC);
        if (ret == PASS && hooks.chaos) {
            /* Disks are slow, and what they do is not the matter here. */
            ret = chaos_locked(4) ? 0 : -EINTR;
        }
        pthread_mutex_unlock(&hooks.lock);
    }

    if (ret == PASS) {
        return do_fdatasync(fd);
    }
    errno = -ret;
    return ret ? -1 : 0;
}

/* What uname() says of the kernel, whatever this one is */
static const char *fake_release = "5.9.0";

int uname(struct utsname *uts)
{
    memset(uts, 0, sizeof(*uts));
    pstrcpy(uts->release, sizeof(uts->release), fake_release);
    return 0;
}

#ifdef CONFIG_LINUX_AIO
/* What io_setup() returns a pointer to, from fs/aio.c of Linux */
typedef struct KernelRing {
    uint32_t id;
    uint32_t nr;
    uint32_t head;
    uint32_t tail;
    uint32_t magic;
    uint32_t compat_features;
    uint32_t incompat_features;
    uint32_t header_length;
    struct io_event events[];
} KernelRing;

static bool iocb_nowait(const struct iocb *iocb)
{
#if RAW_AIO_HAVE_IOCB_FLAGS
    return iocb->aio_rw_flags & RAW_AIO_RWF_NOWAIT;
#else
    return false;
#endif
}

static bool is_opcode(int opcode, int iocb_opcode)
{
    switch (opcode) {
    case -1:
        return true;
    case IOCB_READ:
        return iocb_opcode == IO_CMD_PREAD || iocb_opcode == IO_CMD_PREADV;
    case IOCB_WRITE:
        return iocb_opcode == IO_CMD_PWRITE || iocb_opcode == IO_CMD_PWRITEV;
    default:
        return opcode == iocb_opcode;
    }
}

/* How many were offered to io_submit(); @nowait as in IocbRule */
static unsigned iocbs(int opcode, int nowait)
{
    unsigned n = 0;

    pthread_mutex_lock(&hooks.lock);
    for (int i = 0; i < ARRAY_SIZE(hooks.iocbs); i++) {
        for (int j = 0; j < 2; j++) {
            if (is_opcode(opcode, i) && (nowait == -1 || nowait == j)) {
                n += hooks.iocbs[i][j];
            }
        }
    }
    pthread_mutex_unlock(&hooks.lock);
    return n;
}

static bool iocb_is_vector(const struct iocb *iocb)
{
    return iocb->aio_lio_opcode == IO_CMD_PREADV ||
           iocb->aio_lio_opcode == IO_CMD_PWRITEV;
}

static bool iocb_is_rw(const struct iocb *iocb)
{
    return is_opcode(IOCB_READ, iocb->aio_lio_opcode) ||
           is_opcode(IOCB_WRITE, iocb->aio_lio_opcode);
}

static size_t iocb_bytes(const struct iocb *iocb)
{
    return iocb_is_vector(iocb) ? iov_size(iocb->u.c.buf, iocb->u.c.nbytes)
                                : iocb->u.c.nbytes;
}

static long rule_locked(IocbRule *rule, const struct iocb *iocb)
{
    if (!rule->active || !rule->times ||
        !is_opcode(rule->opcode, iocb->aio_lio_opcode) ||
        (rule->nowait != -1 && rule->nowait != iocb_nowait(iocb))) {
        return PASS;
    }
    if (rule->skip) {
        rule->skip--;
        return PASS;
    }
    if (rule->times != ALWAYS) {
        rule->times--;
    }
    return rule->ret;
}

static long chaos_iocb_locked(const struct iocb *iocb)
{
    size_t units;

    if (!iocb_is_rw(iocb)) {
        return PASS;
    }
    switch (chaos_locked(16)) {
    case 0:
        return iocb_nowait(iocb) ? -EAGAIN : PASS;
    case 1:
        return iocb_nowait(iocb) && !chaos_locked(4) ? -EOPNOTSUPP : PASS;
    case 2:
    case 3:
        units = iocb_bytes(iocb) / hooks.chaos_unit;
        return units > 1 ? (1 + chaos_locked(units - 1)) * hooks.chaos_unit
                         : PASS;
    default:
        return PASS;
    }
}

/* The contexts of the ring of this event loop */
static __thread KernelRing *my_rings[8];
static __thread int nr_my_rings;

/*
 * Wait until the kernel is done with @iocb, and change the result it gave.  If
 * this is a worker, the event loop must not run now, see forge_by_worker().
 */
static void forge_result(KernelRing *ring, struct iocb *iocb, long res)
{
    for (;;) {
        uint32_t tail = qatomic_load_acquire(&ring->tail);

        for (uint32_t i = ring->head; i != tail; i = (i + 1) % ring->nr) {
            if (ring->events[i].obj == iocb) {
                ring->events[i].res = res;
                return;
            }
        }
        g_usleep(20);
    }
}

int io_setup(int nr, io_context_t *ctx)
{
    int (*do_setup)(int, io_context_t *) = real(CALL_IO_SETUP);
    long step;
    int ret;

    pthread_mutex_lock(&hooks.lock);
    enter_call_locked(CALL_IO_SETUP, -1, 0, 0);
    step = next_step_locked(CALL_IO_SETUP);
    pthread_mutex_unlock(&hooks.lock);
    if (step != PASS) {
        return step;
    }

    ret = do_setup(nr, ctx);
    if (ret == 0) {
        g_assert_cmpint(nr_my_rings, <, ARRAY_SIZE(my_rings));
        my_rings[nr_my_rings++] = (KernelRing *)*ctx;
    }
    if (ret == 0 && hooks.hide_magic) {
        ((KernelRing *)*ctx)->magic = 0;
    }
    if (ret == 0 && hooks.hide_features) {
        ((KernelRing *)*ctx)->incompat_features = 1;
    }
    return ret;
}

int io_getevents(io_context_t ctx, long min, long nr, struct io_event *events,
                 struct timespec *timeout)
{
    int (*do_getevents)(io_context_t, long, long, struct io_event *,
                        struct timespec *) = real(CALL_IO_GETEVENTS);

    pthread_mutex_lock(&hooks.lock);
    enter_call_locked(CALL_IO_GETEVENTS, -1, 0, 0);
    pthread_mutex_unlock(&hooks.lock);
    return do_getevents(ctx, min, nr, events, timeout);
}

/*
 * What a worker submits may be dispatched while it is still in here.  Its iocb
 * stays all the same, as the request can't end before the worker is done with
 * it.
 */
int io_submit(io_context_t ctx, long nr, struct iocb **iocbs)
{
    int (*do_submit)(io_context_t, long, struct iocb **) = real(CALL_IO_SUBMIT);
    Call call = in_worker() ? CALL_WORKER_SUBMIT : CALL_IO_SUBMIT;
    g_autofree struct iocb *saved = g_new(struct iocb, nr);
    g_autofree long *result = g_new(long, nr);
    int fd = nr ? iocbs[0]->aio_fildes : -1;
    long step, err = 0, n;
    int ret;

    pthread_mutex_lock(&hooks.lock);
    hooks.last_ring = ctx;
    enter_call_locked(call, fd, 0, 0);
    step = next_step_locked(call);
    if (step == PASS && hooks.chaos) {
        switch (chaos_locked(16)) {
        case 0:
            step = -EAGAIN;
            break;
        case 1:
            step = -EINTR;
            break;
        case 2:
            step = DIV_ROUND_UP(nr, 2);
            break;
        }
    }
    if (step != PASS && step <= 0) {
        pthread_mutex_unlock(&hooks.lock);
        delay_call(fd);
        return step;
    }
    if (step != PASS) {
        nr = MIN(nr, step);
    }

    for (n = 0; n < nr; n++) {
        struct iocb *iocb = iocbs[n];
        IocbRule before = hooks.refuse;
        long ret1 = rule_locked(&hooks.refuse, iocb);

        if (ret1 == PASS && hooks.chaos) {
            ret1 = chaos_iocb_locked(iocb);
        }
        if (ret1 != PASS && ret1 < 0 && n) {
            /* The kernel says why when this is the first of a call. */
            hooks.refuse = before;
            break;
        }
        hooks.iocbs[iocb->aio_lio_opcode][iocb_nowait(iocb)]++;
        saved[n] = *iocb;
        if (ret1 != PASS && ret1 < 0) {
            err = ret1;
            break;
        }
        if (ret1 != PASS && iocb_is_vector(iocb)) {
            struct iovec *cut = g_new(struct iovec, iocb->u.c.nbytes);

            iocb->u.c.nbytes = iov_copy(cut, iocb->u.c.nbytes, iocb->u.c.buf,
                                        iocb->u.c.nbytes, 0, ret1);
            iocb->u.c.buf = cut;
        } else if (ret1 != PASS) {
            iocb->u.c.nbytes = MIN(iocb->u.c.nbytes, ret1);
        }
        result[n] = rule_locked(&hooks.forge, iocb);
#if RAW_AIO_HAVE_IOCB_FLAGS
        if (result[n] != PASS || fd_mark(iocb->aio_fildes) != FD_REAL) {
            /* Not every file system takes it, and some refuse now and then. */
            iocb->aio_rw_flags &= ~RAW_AIO_RWF_NOWAIT;
        }
#endif
        if (hooks.nr_order < ARRAY_SIZE(hooks.order)) {
            hooks.order[hooks.nr_order++] = saved[n].u.c.offset / BLK;
        }
    }
    pthread_mutex_unlock(&hooks.lock);

    ret = n ? do_submit(ctx, n, iocbs) : err;

    for (long i = 0; i < n; i++) {
        if (iocbs[i]->u.c.buf != saved[i].u.c.buf) {
            /* The kernel has copied it. */
            g_free(iocbs[i]->u.c.buf);
        }
        *iocbs[i] = saved[i];
    }
    if (ret > 0) {
        pthread_mutex_lock(&hooks.lock);
        hooks.submitted += ret;
        hooks.nr_order -= MIN(n - ret, hooks.nr_order);
        pthread_mutex_unlock(&hooks.lock);
        for (int i = 0; i < ret; i++) {
            if (result[i] != PASS) {
                forge_result((KernelRing *)ctx, iocbs[i], result[i]);
                pthread_mutex_lock(&hooks.lock);
                hooks.forged++;
                pthread_mutex_unlock(&hooks.lock);
            }
        }
    }
    pthread_mutex_lock(&hooks.lock);
    gate_locked(CALL_WORKER_SUBMITTED, fd);
    pthread_mutex_unlock(&hooks.lock);
    delay_call(fd);
    spend(call);
    return ret;
}

static void refuse_iocb(int opcode, int nowait, int skip, int times, long ret)
{
    pthread_mutex_lock(&hooks.lock);
    hooks.refuse = (IocbRule) { true, opcode, nowait, skip, times, ret };
    pthread_mutex_unlock(&hooks.lock);
}

static void forge_iocb(int opcode, int nowait, int skip, int times, long ret)
{
    pthread_mutex_lock(&hooks.lock);
    hooks.forge = (IocbRule) { true, opcode, nowait, skip, times, ret };
    pthread_mutex_unlock(&hooks.lock);
}

/* Completions in the ring of this event loop that nobody has read */
static unsigned ring_unread(void)
{
    unsigned n = 0;

    for (int i = 0; i < nr_my_rings; i++) {
        KernelRing *ring = my_rings[i];
        uint32_t tail = qatomic_load_acquire(&ring->tail);

        n += (tail + ring->nr - ring->head) % ring->nr;
    }
    return n;
}

static bool native_available(void)
{
    int (*do_setup)(int, io_context_t *) = real(CALL_IO_SETUP);
    static int available = -1;
    io_context_t ctx = NULL;

    if (available == -1) {
        available = do_setup(1, &ctx) == 0;
        if (available) {
            io_destroy(ctx);
        }
    }
    return available;
}
#else /* !CONFIG_LINUX_AIO */
static bool native_available(void)
{
    return false;
}
#endif

static void gate_close(unsigned call_bits, int fd)
{
    pthread_mutex_lock(&hooks.lock);
    hooks.gate = call_bits;
    hooks.gate_fd = fd;
    hooks.gate_ctx = qemu_get_current_aio_context();
    pthread_mutex_unlock(&hooks.lock);
}

static void gate_open(void)
{
    pthread_mutex_lock(&hooks.lock);
    hooks.gate = 0;
    pthread_cond_broadcast(&hooks.cond);
    pthread_mutex_unlock(&hooks.lock);
}

/* How many calls wait at the gate */
static int at_gate(void)
{
    int n;

    pthread_mutex_lock(&hooks.lock);
    n = hooks.at_gate;
    pthread_mutex_unlock(&hooks.lock);
    return n;
}

/* Run the event loop until so many calls wait at the gate. */
static void gate_wait(int n)
{
    while (at_gate() != n) {
        aio_poll(qemu_get_current_aio_context(), true);
    }
}

/*
 * Test files
 */

typedef enum Kind {
    BUFFERED,           /* without the inline tier, which would do it all */
    BUFFERED_NATIVE,    /* aio=native, which does not apply */
    INLINE,             /* all is in the page cache, unless a fault says no */
    INLINE_NATIVE,
    DIRECT,
    NATIVE,             /* without RWF_NOWAIT: the kernel never refuses */
    NOWAIT,             /* the kernel refuses what a test wants it to */
    REAL,               /* as in real life: it may refuse at any time */
    INLINE_REAL,        /* the same for the inline tier */
} Kind;

typedef struct Stats {
    uint64_t native;
    uint64_t refused;
    uint64_t pool;
    uint64_t cut;
    uint64_t in;
    uint64_t in_refused;
    uint64_t by_worker;
    uint64_t slow;
} Stats;

typedef struct TestFile {
    RawAIOFile f;
    Kind kind;
    char *path;
    int check_fd;       /* has no faults */
    bool coroutine;     /* send requests in a coroutine */
    Stats last;
} TestFile;

static bool kind_inline(Kind kind)
{
    return RAW_AIO_HAVE_RWF && (kind == INLINE || kind == INLINE_NATIVE ||
                                kind == INLINE_REAL);
}

static bool kind_direct(Kind kind)
{
    return kind >= DIRECT && kind <= REAL;
}

static bool kind_native(Kind kind)
{
    return kind >= NATIVE && kind <= REAL;
}

/* The byte at @pos of a file which has been written with @seed */
static uint8_t pattern(int64_t pos, int seed)
{
    return pos * 7 + (pos >> 8) * 13 + (pos >> 16) * 3 + seed * 31 + 1;
}

static void fill(uint8_t *buf, int64_t pos, size_t len, int seed)
{
    for (size_t i = 0; i < len; i++) {
        buf[i] = pattern(pos + i, seed);
    }
}

static void check(const uint8_t *buf, int64_t pos, size_t len, int seed)
{
    for (size_t i = 0; i < len; i++) {
        if (buf[i] != pattern(pos + i, seed)) {
            g_error("wrong byte at %" PRId64 ": 0x%02x instead of 0x%02x",
                    pos + (int64_t)i, buf[i], pattern(pos + i, seed));
        }
    }
}

static int reopen(TestFile *t, Kind kind)
{
    int fd = open(t->path, O_RDWR | (kind_direct(kind) ? O_DIRECT : 0));

    if (fd >= 0) {
        mark_fd(fd, kind == REAL || kind == INLINE_REAL ? FD_REAL : FD_TEST);
    }
    return fd;
}

static void disable(TestFile *t, unsigned bits)
{
    t->f.disabled = bits;
    if (!kind_inline(t->kind)) {
        t->f.disabled |= RAW_AIO_DISABLE_INLINE;
    }
    if (t->kind == NATIVE) {
        t->f.disabled |= RAW_AIO_DISABLE_NOWAIT;
    }
}

/* Fill the file with seed 0. */
static void file_fill(TestFile *t, int64_t size)
{
    g_autofree uint8_t *buf = g_malloc(size);

    fill(buf, 0, size, 0);
    g_assert_cmpint(pwrite(t->check_fd, buf, size, 0), ==, size);
    g_assert_cmpint(ftruncate(t->check_fd, size), ==, 0);
    if (t->kind == REAL) {
        /* Else the kernel refuses, as it would have to wait for it. */
        g_assert_cmpint(fdatasync(t->check_fd), ==, 0);
    }
}

/* Returns false if there can't be such a file; the test is skipped then. */
static bool file_open_in(TestFile *t, Kind kind, const char *dir)
{
    int fd;

    *t = (TestFile) { .kind = kind };
    if (kind_native(kind) && !native_available()) {
        g_test_skip("no Linux AIO");
        return false;
    }
    t->path = g_build_filename(dir, "test-raw-aio-XXXXXX", NULL);
    t->check_fd = g_mkstemp(t->path);
    g_assert_cmpint(t->check_fd, >=, 0);
    file_fill(t, FILE_SIZE);

    fd = reopen(t, kind);
    if (fd < 0) {
        g_autofree char *msg = g_strdup_printf("no O_DIRECT in %s: %s", dir,
                                               strerror(errno));
        g_test_skip(msg);
        unlink(t->path);
        close(t->check_fd);
        g_free(t->path);
        return false;
    }
    raw_aio_open(&t->f, fd, kind_native(kind) || kind == BUFFERED_NATIVE ||
                 kind == INLINE_NATIVE, 0);
    disable(t, 0);
    return true;
}

static bool file_open(TestFile *t, Kind kind)
{
    return file_open_in(t, kind, g_get_tmp_dir());
}

static int file_fd(TestFile *t)
{
    int fd;

    raw_aio_put_desc(raw_aio_get_desc(&t->f, &fd));
    return fd;
}

static void settle_timer(void *opaque)
{
    bool *settled = opaque;

    *settled = true;
}

/*
 * Deliver whatever there is.  aio_poll() must wait, if only for a moment:
 * without, it does not look at descriptors.
 */
static void settle(void)
{
    AioContext *ctx = qemu_get_current_aio_context();
    bool settled = false;
    QEMUTimer *timer = aio_timer_new(ctx, QEMU_CLOCK_REALTIME, SCALE_NS,
                                     settle_timer, &settled);

    timer_mod(timer, qemu_clock_get_ns(QEMU_CLOCK_REALTIME) + 50 * SCALE_US);
    while (!settled) {
        aio_poll(ctx, true);
    }
    timer_free(timer);
}

static void file_close(TestFile *t)
{
    int fd = file_fd(t);

    /* Whatever comes now comes once too often, see req_done(). */
    settle();
    raw_aio_close(&t->f);
    g_assert_cmpint(fcntl(fd, F_GETFD), ==, -1);
    mark_fd(fd, FD_STRANGER);
    close(t->check_fd);
    unlink(t->path);
    g_free(t->path);
}

/* What was counted since the last call */
static Stats file_stats(TestFile *t)
{
    BlockStatsRawAio *s = raw_aio_query_stats(&t->f);
    Stats now = {
        .native = s->native_served,
        .refused = s->native_refused,
        .pool = s->pool_served,
        .cut = s->short_transfers,
        .in = s->inline_served,
        .in_refused = s->inline_refused,
        .by_worker = s->native_by_worker,
        .slow = s->slow_submissions,
    };
    Stats delta = {
        .native = now.native - t->last.native,
        .refused = now.refused - t->last.refused,
        .pool = now.pool - t->last.pool,
        .cut = now.cut - t->last.cut,
        .in = now.in - t->last.in,
        .in_refused = now.in_refused - t->last.in_refused,
        .by_worker = now.by_worker - t->last.by_worker,
        .slow = now.slow - t->last.slow,
    };

    if (!kind_inline(t->kind)) {
        g_assert_cmpuint(now.in, ==, 0);
        g_assert_cmpuint(now.in_refused, ==, 0);
    }
    qapi_free_BlockStatsRawAio(s);
    t->last = now;
    return delta;
}

/* Native, of these by a worker, refused, pool, short */
#define ASSERT_NATIVE(t, n, w, r, p, c)                 \
    do {                                                \
        Stats delta_ = file_stats(t);                   \
        g_assert_cmpuint(delta_.native, ==, (n));       \
        g_assert_cmpuint(delta_.by_worker, ==, (w));    \
        g_assert_cmpuint(delta_.refused, ==, (r));      \
        g_assert_cmpuint(delta_.pool, ==, (p));         \
        g_assert_cmpuint(delta_.cut, ==, (c));          \
        g_assert_cmpuint(delta_.slow, ==, 0);           \
    } while (0)

#define ASSERT_STATS(t, n, r, p, c) ASSERT_NATIVE(t, n, 0, r, p, c)

#define ASSERT_INLINE(t, i, r, p, c)                    \
    do {                                                \
        Stats delta_ = file_stats(t);                   \
        g_assert_cmpuint(delta_.in, ==, (i));           \
        g_assert_cmpuint(delta_.in_refused, ==, (r));   \
        g_assert_cmpuint(delta_.pool, ==, (p));         \
        g_assert_cmpuint(delta_.cut, ==, (c));          \
        g_assert_cmpuint(delta_.native, ==, 0);         \
        g_assert_cmpuint(delta_.by_worker, ==, 0);      \
        g_assert_cmpuint(delta_.refused, ==, 0);        \
        g_assert_cmpuint(delta_.slow, ==, 0);           \
    } while (0)

/* The file holds what was written, whatever way a test reads it. */
static void check_file(TestFile *t, int64_t offset, size_t len, int seed)
{
    g_autofree uint8_t *buf = g_malloc(len);

    g_assert_cmpint(pread(t->check_fd, buf, len, offset), ==, len);
    check(buf, offset, len, seed);
}

/*
 * Requests
 */

/* In raw_aio_submit() or bdrv_aio_cancel_async() */
static __thread int in_engine;

typedef struct Req Req;
struct Req {
    TestFile *t;
    AioContext *ctx;
    QEMUIOVector qiov;
    uint8_t *mem;
    uint8_t *buf;
    int type;
    int64_t offset;
    BdrvRequestFlags flags;
    BlockAIOCB *acb;
    void (*hook)(Req *r);   /* called in the completion */
    int done;
    int ret;
};

/* @len bytes in @niov parts; in memory that O_DIRECT can't use if @odd */
static void req_init(Req *r, size_t len, int niov, bool odd)
{
    size_t part = len / niov;

    *r = (Req) { .mem = qemu_memalign(BLK, len + BLK) };
    r->buf = r->mem + odd;
    qemu_iovec_init(&r->qiov, niov);
    for (int i = 0; i < niov; i++) {
        qemu_iovec_add(&r->qiov, r->buf + i * part,
                       i == niov - 1 ? len - i * part : part);
    }
    memset(r->buf, 0xaa, len);
}

static void req_destroy(Req *r)
{
    qemu_iovec_destroy(&r->qiov);
    qemu_vfree(r->mem);
}

static void req_done(void *opaque, int ret)
{
    Req *r = opaque;

    g_assert_cmpint(in_engine, ==, 0);
    g_assert(qemu_get_current_aio_context() == r->ctx);
    r->ret = ret;
    r->done++;
    g_assert_cmpint(r->done, ==, 1);
    if (r->hook) {
        r->hook(r);
    }
}

static void coroutine_fn req_co_entry(void *opaque)
{
    Req *r = opaque;
    int ret;

    if (r->type & QEMU_AIO_FLUSH) {
        ret = raw_aio_co_flush(&r->t->f);
    } else {
        ret = raw_aio_co_rw(&r->t->f, r->type, r->offset, &r->qiov, r->flags);
    }
    req_done(r, ret);
}

static void req_start(Req *r, TestFile *t, int type, int64_t offset,
                      BdrvRequestFlags flags)
{
    /* A coroutine need not yield, then. */
    bool at_once = t->coroutine && kind_inline(t->kind);

    r->t = t;
    r->ctx = qemu_get_current_aio_context();
    r->type = type;
    r->offset = offset;
    r->flags = flags;
    r->done = 0;

    in_engine += !at_once;
    if (t->coroutine) {
        qemu_coroutine_enter(qemu_coroutine_create(req_co_entry, r));
    } else {
        r->acb = raw_aio_submit(&t->f, type, offset,
                                type & QEMU_AIO_FLUSH ? NULL : &r->qiov, flags,
                                req_done, r);
    }
    in_engine -= !at_once;
    g_assert(at_once || !r->done);
}

static void req_cancel(Req *r)
{
    in_engine++;
    bdrv_aio_cancel_async(r->acb);
    in_engine--;
}

static int req_wait(Req *r)
{
    while (!r->done) {
        aio_poll(r->ctx, true);
    }
    return r->ret;
}

/* One request, from beginning to end; the data has or gets @seed. */
static int req_rw(Req *r, TestFile *t, int type, int64_t offset,
                  BdrvRequestFlags flags, int seed)
{
    bool is_write = type & (QEMU_AIO_WRITE | QEMU_AIO_ZONE_APPEND);
    size_t len = r->qiov.size;
    int ret;

    if (is_write) {
        fill(r->buf, offset, len, seed);
    }
    req_start(r, t, type, offset, flags);
    ret = req_wait(r);
    if (!ret && !is_write) {
        check(r->buf, offset, len, seed);
    }
    req_destroy(r);
    return ret;
}

static int file_rw(TestFile *t, int type, int64_t offset, size_t len, int niov,
                   BdrvRequestFlags flags, int seed)
{
    Req r;

    req_init(&r, len, niov, type & QEMU_AIO_MISALIGNED);
    return req_rw(&r, t, type, offset, flags, seed);
}

static int file_write(TestFile *t, int64_t offset, size_t len, int niov,
                      BdrvRequestFlags flags, int seed)
{
    return file_rw(t, QEMU_AIO_WRITE, offset, len, niov, flags, seed);
}

static int file_read(TestFile *t, int64_t offset, size_t len, int niov,
                     int seed)
{
    return file_rw(t, QEMU_AIO_READ, offset, len, niov, 0, seed);
}

static int file_flush(TestFile *t)
{
    Req r = { .t = t };

    req_start(&r, t, QEMU_AIO_FLUSH, 0, 0);
    return req_wait(&r);
}

/* Run a function in an IOThread and wait for it. */
typedef struct ThreadCall {
    void (*func)(void *opaque);
    void *opaque;
    QemuSemaphore done;
} ThreadCall;

static void thread_call_bh(void *opaque)
{
    ThreadCall *c = opaque;

    c->func(c->opaque);
    qemu_sem_post(&c->done);
}

static void run_in(IOThread *iothread, void (*func)(void *), void *opaque)
{
    ThreadCall c = { .func = func, .opaque = opaque };

    qemu_sem_init(&c.done, 0);
    aio_bh_schedule_oneshot(iothread_get_aio_context(iothread), thread_call_bh,
                            &c);
    qemu_sem_wait(&c.done);
    qemu_sem_destroy(&c.done);
}

/*
 * Data through each tier
 */

static void test_data_one(TestFile *t, int niov, bool odd, int seed)
{
    int extra = odd ? QEMU_AIO_MISALIGNED : 0;
    bool native = kind_native(t->kind) && !odd;
    bool preadv = !(t->f.disabled & RAW_AIO_DISABLE_PREADV);
    const size_t len = 16 * BLK;
    const int64_t offset = 2 * BLK;
    Stats s;

    hooks_reset();
    g_assert_cmpint(file_rw(t, QEMU_AIO_WRITE | extra, offset, len, niov, 0,
                            seed), ==, 0);
    check_file(t, 0, offset, 0);
    check_file(t, offset, len, seed);
    check_file(t, offset + len, FILE_SIZE - offset - len, 0);
    g_assert_cmpint(file_rw(t, QEMU_AIO_READ | extra, offset, len, niov, 0,
                            seed), ==, 0);

    s = file_stats(t);
    g_assert_cmpuint(s.native + s.pool, ==, 2);
    g_assert_cmpuint(s.cut, ==, 0);
    if (!native) {
        g_assert_cmpuint(s.pool, ==, 2);
        g_assert_cmpuint(s.refused, ==, 0);
        g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 0);
    } else if (t->kind != REAL) {
        g_assert_cmpuint(s.native, ==, 2);
        g_assert_cmpuint(s.refused, ==, 0);
    } else {
        /* The kernel may have refused to wait. */
        g_assert_cmpuint(s.pool + s.by_worker, ==, s.refused);
    }
    if (native) {
        g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 2);
        g_assert_cmpuint(calls(CALL_WORKER_SUBMIT), ==, s.by_worker);
        g_assert_cmpuint(iocbs(niov == 1 ? IO_CMD_PREAD : IO_CMD_PREADV, -1) +
                         iocbs(niov == 1 ? IO_CMD_PWRITE : IO_CMD_PWRITEV, -1),
                         ==, 2 + s.by_worker);
    } else if (niov == 1 || odd) {
        g_assert_cmpuint(calls(CALL_PREAD), ==, 1);
        g_assert_cmpuint(calls(CALL_PWRITE), ==, 1);
    } else if (preadv) {
        g_assert_cmpuint(calls(CALL_PREADV), ==, 1);
        g_assert_cmpuint(calls(CALL_PWRITEV), ==, 1);
    }
    if (!preadv) {
        g_assert_cmpuint(calls(CALL_PREADV), ==, 0);
        g_assert_cmpuint(calls(CALL_PWRITEV), ==, 0);
    }

    /* What was there before */
    g_assert_cmpint(file_rw(t, QEMU_AIO_WRITE | extra, offset, len, niov, 0,
                            0), ==, 0);
    file_stats(t);
}

static void test_data(int kind)
{
    int seed = 1;
    TestFile t;

    if (!file_open(&t, kind)) {
        return;
    }
    for (int i = 0; i < 16; i++) {
        bool odd = i & 4;

        if (odd && !kind_direct(kind)) {
            continue;
        }
        t.coroutine = i & 1;
        disable(&t, i & 8 ? RAW_AIO_DISABLE_PREADV : 0);
        test_data_one(&t, i & 2 ? 16 : 1, odd, seed++);
    }
    file_close(&t);
}

/* A vector may have empty elements, with and without preadv(). */
static void test_data_empty_element(int kind)
{
    TestFile t;

    if (!file_open(&t, kind)) {
        return;
    }
    for (int i = 0; i < 6; i++) {
        uint8_t *buf = qemu_memalign(BLK, 2 * BLK);
        QEMUIOVector qiov;
        Req r = { 0 };

        disable(&t, i & 1 ? RAW_AIO_DISABLE_PREADV : 0);
        /* At the start, in the middle, and at the end */
        qemu_iovec_init(&qiov, 3);
        for (int j = 0, pos = 0; j < 3; j++) {
            size_t len = j == i / 2 ? 0 : BLK;

            qemu_iovec_add(&qiov, buf + pos, len);
            pos += len;
        }
        r.qiov = qiov;
        fill(buf, 0, 2 * BLK, i + 1);
        req_start(&r, &t, QEMU_AIO_WRITE, 0, 0);
        g_assert_cmpint(req_wait(&r), ==, 0);
        check_file(&t, 0, 2 * BLK, i + 1);

        memset(buf, 0xaa, 2 * BLK);
        req_start(&r, &t, QEMU_AIO_READ, 0, 0);
        g_assert_cmpint(req_wait(&r), ==, 0);
        check(buf, 0, 2 * BLK, i + 1);

        qemu_iovec_destroy(&qiov);
        qemu_vfree(buf);
    }
    file_close(&t);
}

/*
 * Short transfers
 */

static void test_short_buffered(int unused)
{
    TestFile t;
    Stats s;

    if (!file_open(&t, BUFFERED)) {
        return;
    }
    for (int cut = 1; cut < 2048; cut++) {
        bool preadv = cut % 3;
        int seed = cut & 1;

        hooks_reset();
        disable(&t, preadv ? 0 : RAW_AIO_DISABLE_PREADV);
        t.coroutine = cut & 2;
        fault(CALL_ANY_WRITE, 1, cut);
        g_assert_cmpint(file_write(&t, 100, 2048, 4, 0, seed), ==, 0);
        check_file(&t, 100, 2048, seed);
        fault(CALL_ANY_READ, 1, cut);
        g_assert_cmpint(file_read(&t, 100, 2048, 4, seed), ==, 0);

        s = file_stats(&t);
        g_assert_cmpuint(s.pool, ==, 2);
        if (preadv) {
            g_assert_cmpuint(s.cut, ==, 2);
            g_assert_cmpuint(calls(CALL_ANY_WRITE), ==, 2);
            g_assert_cmpuint(calls(CALL_ANY_READ), ==, 2);
        } else {
            g_assert_cmpuint(s.cut, ==, cut < 512 ? 2 : 0);
        }
    }

    /* Often in one request, with a single element and with several */
    disable(&t, 0);
    for (int niov = 1; niov <= 4; niov += 3) {
        hooks_reset();
        fault(CALL_ANY_WRITE, 100, 7);
        fault(CALL_ANY_READ, 100, 7);
        g_assert_cmpint(file_write(&t, 100, 2048, niov, 0, 5), ==, 0);
        check_file(&t, 100, 2048, 5);
        g_assert_cmpint(file_read(&t, 100, 2048, niov, 5), ==, 0);
        g_assert_cmpuint(calls(CALL_ANY_WRITE), ==, 101);
        g_assert_cmpuint(calls(CALL_ANY_READ), ==, 101);
        ASSERT_STATS(&t, 0, 0, 2, 200);
    }
    file_close(&t);
}

static void test_short_direct(int unused)
{
    const size_t len = 4 * BLK;
    TestFile t;

    if (!file_open(&t, DIRECT)) {
        return;
    }
    for (int i = 0; i < 12; i++) {
        int extra = i & 1 ? QEMU_AIO_MISALIGNED : 0;
        int niov = i & 2 ? 4 : 1;
        int cut = 1 + i / 4;

        hooks_reset();
        fault(CALL_ANY_WRITE, 1, cut * BLK);
        g_assert_cmpint(file_rw(&t, QEMU_AIO_WRITE | extra, BLK, len, niov, 0,
                                i + 1), ==, 0);
        check_file(&t, BLK, len, i + 1);
        fault(CALL_ANY_READ, 1, cut * BLK);
        g_assert_cmpint(file_rw(&t, QEMU_AIO_READ | extra, BLK, len, niov, 0,
                                i + 1), ==, 0);
        ASSERT_STATS(&t, 0, 0, 2, 2);
    }

    /* FUA, where the rest must be stable as well */
    hooks_reset();
    fault(CALL_PWRITEV2, 2, BLK);
    g_assert_cmpint(file_write(&t, BLK, len, 4, BDRV_REQ_FUA, 20), ==, 0);
    check_file(&t, BLK, len, 20);
    if (calls(CALL_PWRITEV2) == 3) {
        g_assert_cmpuint(calls(CALL_FDATASYNC), ==, 0);
        for (int i = 0; i < 3; i++) {
            g_assert_cmpint(hooks.log[i].flags, ==, RAW_AIO_RWF_DSYNC);
        }
    } else {
        g_assert_cmpuint(calls(CALL_FDATASYNC), ==, 1);
    }
    file_close(&t);
}

#ifdef CONFIG_LINUX_AIO
static void test_short_native(int kind)
{
    const size_t len = 4 * BLK;
    TestFile t;

    if (!file_open(&t, kind)) {
        return;
    }
    for (int niov = 1; niov <= 4; niov += 3) {
        for (int cut = 1; cut < 4; cut++) {
            int seed = niov * 4 + cut;
            Stats s;

            hooks_reset();
            t.coroutine = cut & 1;
            refuse_iocb(IOCB_WRITE, -1, 0, 1, cut * BLK);
            g_assert_cmpint(file_write(&t, BLK, len, niov, 0, seed), ==, 0);
            check_file(&t, BLK, len, seed);
            refuse_iocb(IOCB_READ, -1, 0, 1, cut * BLK);
            g_assert_cmpint(file_read(&t, BLK, len, niov, seed), ==, 0);

            /* The rest is the pool's: nothing is sent to the kernel again. */
            g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 2);
            s = file_stats(&t);
            g_assert_cmpuint(s.pool, ==, 2);
            g_assert_cmpuint(s.native, ==, 0);
            g_assert_cmpuint(s.refused, ==, 0);
            g_assert_cmpuint(s.cut, ==, 2);
            g_assert_cmpuint(calls(CALL_ANY_WRITE), ==, 1);
            g_assert_cmpuint(calls(CALL_ANY_READ), ==, 1);
            for (int i = 0; i < hooks.nr_log; i++) {
                if (hooks.log[i].call < CALL_FDATASYNC) {
                    g_assert_cmpint(hooks.log[i].offset, ==, BLK + cut * BLK);
                }
            }
        }
    }

    /* Short in the kernel and then in the pool, and 0 bytes in the kernel */
    hooks_reset();
    refuse_iocb(IO_CMD_PWRITEV, -1, 0, 1, BLK);
    fault(CALL_ANY_WRITE, 1, BLK);
    g_assert_cmpint(file_write(&t, BLK, len, 2, 0, 50), ==, 0);
    check_file(&t, BLK, len, 50);
    forge_iocb(IO_CMD_PREADV, -1, 0, 1, 0);
    g_assert_cmpint(file_read(&t, BLK, len, 2, 50), ==, 0);
    g_assert_cmpuint(calls(CALL_ANY_READ), ==, 1);

    /* Nothing was learnt from that. */
    hooks_reset();
    g_assert_cmpint(file_write(&t, BLK, len, 2, 0, 51), ==, 0);
    g_assert_cmpint(file_read(&t, BLK, len, 2, 51), ==, 0);
    g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 2);
    file_close(&t);
}
#endif

/*
 * End of file
 */

static void test_eof(int kind)
{
    static const int64_t sizes[] = {
        3 * BLK + 1000, 3 * BLK + 512, 3 * BLK, 1, 0
    };
    static const struct {
        int64_t offset;
        size_t len;
        int niov;
    } reads[] = {
        { 0, 4 * BLK, 1 },
        { 0, 4 * BLK, 4 },
        { 0, 8 * BLK, 8 },
        { 0, BLK, 1 },
        { 2 * BLK, 2 * BLK, 1 },
        { 3 * BLK, BLK, 1 },
        { 3 * BLK, 16 * BLK, 16 },
        { 4 * BLK, BLK, 1 },
        { 40 * BLK, 2 * BLK, 2 },
    };
    TestFile t;

    if (!file_open(&t, kind)) {
        return;
    }
    for (int i = 0; i < ARRAY_SIZE(sizes); i++) {
        file_fill(&t, sizes[i]);
        for (int j = 0; j < 4 * ARRAY_SIZE(reads); j++) {
            int64_t offset = reads[j / 4].offset;
            size_t len = reads[j / 4].len;
            bool odd = j & 1;
            size_t in_file = MIN(MAX(sizes[i] - offset, 0), len);
            Req r;

            if (odd && !kind_direct(kind)) {
                continue;
            }
            disable(&t, j & 2 ? RAW_AIO_DISABLE_PREADV : 0);
            t.coroutine = i & 1;
            req_init(&r, len, reads[j / 4].niov, odd);
            req_start(&r, &t, QEMU_AIO_READ | (odd ? QEMU_AIO_MISALIGNED : 0),
                      offset, 0);
            g_assert_cmpint(req_wait(&r), ==, 0);
            check(r.buf, offset, in_file, 0);
            g_assert(buffer_is_zero(r.buf + in_file, len - in_file));
            req_destroy(&r);
        }
    }
    file_close(&t);
}

/*
 * With O_DIRECT, EINVAL after a short read is the end of the file only at the
 * end of the file.
 */
static void test_eof_einval_inside(int kind)
{
    const size_t len = 4 * BLK;
    TestFile t;

    if (!file_open(&t, kind)) {
        return;
    }
    for (int i = 0; i < 4; i++) {
        int type = QEMU_AIO_READ | (i & 2 ? QEMU_AIO_MISALIGNED : 0);
        int ret;

        /* Once, as the file has grown meanwhile: it is read from the start. */
        hooks_reset();
        fault(CALL_ANY_READ, 1, BLK);
        fault(CALL_ANY_READ, 1, -EINVAL);
        ret = file_rw(&t, type, BLK, len, i & 1 ? 4 : 1, 0, 0);
        g_assert_cmpint(ret, ==, kind_direct(kind) ? 0 : -EINVAL);

        /* Always: it can't.  What is read before is always short. */
        hooks_reset();
        for (int j = 0; j < 3; j++) {
            fault(CALL_ANY_READ, 1, BLK);
            fault(CALL_ANY_READ, 1, -EINVAL);
        }
        fault(CALL_ANY_READ, ALWAYS, -EINVAL);
        g_assert_cmpint(file_rw(&t, type, BLK, len, i & 1 ? 4 : 1, 0, 0), ==,
                        -EINVAL);

        /* With the first call */
        hooks_reset();
        fault(CALL_ANY_READ, ALWAYS, -EINVAL);
        g_assert_cmpint(file_rw(&t, type, BLK, len, i & 1 ? 4 : 1, 0, 0), ==,
                        -EINVAL);
    }
    file_close(&t);
}

#ifdef CONFIG_LINUX_AIO
static void test_eof_einval_inside_native(int unused)
{
    const size_t len = 4 * BLK;
    TestFile t;

    if (!file_open(&t, NATIVE)) {
        return;
    }
    refuse_iocb(IO_CMD_PREADV, -1, 0, 1, BLK);
    fault(CALL_ANY_READ, 1, -EINVAL);
    g_assert_cmpint(file_read(&t, BLK, len, 4, 0), ==, 0);

    refuse_iocb(IO_CMD_PREADV, -1, 0, 1, BLK);
    fault(CALL_ANY_READ, ALWAYS, -EINVAL);
    g_assert_cmpint(file_read(&t, BLK, len, 4, 0), ==, -EINVAL);
    file_close(&t);
}
#endif

/*
 * Errors
 */

static void test_errors(int kind)
{
    static const struct {
        Call call;
        int type;
        int niov;
        BdrvRequestFlags flags;
    } ops[] = {
        { CALL_PREAD, QEMU_AIO_READ, 1 },
        { CALL_PWRITE, QEMU_AIO_WRITE, 1 },
        { CALL_PREADV, QEMU_AIO_READ, 4 },
        { CALL_PWRITEV, QEMU_AIO_WRITE, 4 },
        { CALL_PWRITEV2, QEMU_AIO_WRITE, 4, BDRV_REQ_FUA },
        { CALL_FDATASYNC, QEMU_AIO_FLUSH, 1 },
    };
    static const int errors[] = { EIO, ENOSPC, EDQUOT, EBADF, EAGAIN };
    TestFile t;

    if (!file_open(&t, kind)) {
        return;
    }
    for (int i = 0; i < ARRAY_SIZE(ops) * ARRAY_SIZE(errors); i++) {
        Call call = ops[i / ARRAY_SIZE(errors)].call;
        int type = ops[i / ARRAY_SIZE(errors)].type;
        int niov = ops[i / ARRAY_SIZE(errors)].niov;
        BdrvRequestFlags flags = ops[i / ARRAY_SIZE(errors)].flags;
        int err = errors[i % ARRAY_SIZE(errors)];

        if (call == CALL_PWRITEV2 && (!kind_direct(kind) ||
                                      !RAW_AIO_HAVE_RWF)) {
            continue;
        }
        if (call == CALL_FDATASYNC && !kind_direct(kind)) {
            continue;   /* See test_flush_memory(). */
        }
        t.coroutine = i & 1;

        hooks_reset();
        fault(call, 1, -err);
        fault(CALL_FDATASYNC, ALWAYS, 0);
        if (type == QEMU_AIO_FLUSH) {
            g_assert_cmpint(file_flush(&t), ==, -err);
        } else {
            g_assert_cmpint(file_rw(&t, type, 0, 4 * BLK, niov, flags, 0), ==,
                            -err);
        }
        g_assert_cmpuint(calls(call), ==, 1);
        if (type == QEMU_AIO_FLUSH) {
            g_assert_cmpint(file_flush(&t), ==, 0);
        } else {
            g_assert_cmpint(file_rw(&t, type, 0, 4 * BLK, niov, flags, 0), ==,
                            0);
        }
        g_assert_cmpuint(calls(call), ==, 2);
        ASSERT_STATS(&t, 0, 0, 2, 0);

        hooks_reset();
        fault(call, 3, -EINTR);
        fault(call, 1, call == CALL_FDATASYNC ? 0 : PASS);
        if (type == QEMU_AIO_FLUSH) {
            g_assert_cmpint(file_flush(&t), ==, 0);
        } else {
            g_assert_cmpint(file_rw(&t, type, 0, 4 * BLK, niov, flags, 0), ==,
                            0);
        }
        g_assert_cmpuint(calls(call), ==, 4);
        ASSERT_STATS(&t, 0, 0, 1, 0);
    }

    /* An error after a part was transferred */
    hooks_reset();
    fault(CALL_ANY_WRITE, 1, BLK);
    fault(CALL_ANY_WRITE, 1, -ENOSPC);
    g_assert_cmpint(file_write(&t, 0, 4 * BLK, 4, 0, 0), ==, -ENOSPC);
    g_assert_cmpuint(calls(CALL_ANY_WRITE), ==, 2);
    fault(CALL_ANY_READ, 1, BLK);
    fault(CALL_ANY_READ, 1, -EIO);
    g_assert_cmpint(file_read(&t, 0, 4 * BLK, 4, 0), ==, -EIO);
    g_assert_cmpuint(calls(CALL_ANY_READ), ==, 2);

    /* A write that makes no progress, at once and later */
    hooks_reset();
    fault(CALL_ANY_WRITE, 1, 0);
    g_assert_cmpint(file_write(&t, 0, 4 * BLK, 4, 0, 0), ==, -ENOSPC);
    g_assert_cmpuint(calls(CALL_ANY_WRITE), ==, 1);
    fault(CALL_ANY_WRITE, 1, BLK);
    fault(CALL_ANY_WRITE, 1, 0);
    g_assert_cmpint(file_write(&t, 0, 4 * BLK, 1, 0, 0), ==, -ENOSPC);
    g_assert_cmpuint(calls(CALL_ANY_WRITE), ==, 3);
    g_assert_cmpint(file_write(&t, 0, 4 * BLK, 1, 0, 0), ==, 0);
    file_close(&t);
}

#ifdef CONFIG_LINUX_AIO
/* What the kernel says when it has taken the request */
static void test_errors_native(int unused)
{
    static const int errors[] = {
        EIO, ENOSPC, EDQUOT, ENODATA, EREMOTEIO, EFAULT, EAGAIN
    };
    TestFile t;

    if (!file_open(&t, NATIVE)) {
        return;
    }
    for (int i = 0; i < 2 * ARRAY_SIZE(errors); i++) {
        int type = i & 1 ? QEMU_AIO_WRITE : QEMU_AIO_READ;
        int err = errors[i / 2];

        hooks_reset();
        t.coroutine = i & 2;
        forge_iocb(-1, 0, 0, 1, -err);
        /* No flag was to blame, so the answer is final. */
        g_assert_cmpint(file_rw(&t, type, 0, BLK, 1, 0, 0), ==, -err);
        g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 1);
        g_assert_cmpuint(calls(CALL_ANY_READ), ==, 0);
        g_assert_cmpuint(calls(CALL_ANY_WRITE), ==, 0);
        ASSERT_STATS(&t, 1, 0, 0, 0);

        g_assert_cmpint(file_rw(&t, type, 0, BLK, 1, 0, 0), ==, 0);
        ASSERT_STATS(&t, 1, 0, 0, 0);
    }

    /* A signal is no error. */
    hooks_reset();
    forge_iocb(-1, 0, 0, 1, -EINTR);
    g_assert_cmpint(file_read(&t, 0, BLK, 1, 0), ==, 0);
    ASSERT_STATS(&t, 0, 1, 1, 0);
    g_assert_cmpint(file_read(&t, 0, BLK, 1, 0), ==, 0);
    ASSERT_STATS(&t, 1, 0, 0, 0);

    /* Nothing written: the pool, which is asked for the rest, has the word. */
    hooks_reset();
    forge_iocb(IO_CMD_PWRITE, 0, 0, 1, 0);
    fault(CALL_ANY_WRITE, 1, 0);
    g_assert_cmpint(file_write(&t, 0, BLK, 1, 0, 0), ==, -ENOSPC);
    file_close(&t);
}

#if RAW_AIO_HAVE_IOCB_FLAGS
/*
 * With RWF_NOWAIT, each error is checked without it, in the pool.  For EAGAIN
 * see test_by_worker().
 */
static void test_errors_nowait(int unused)
{
    static const int errors[] = {
        EIO, ENOSPC, ENODATA, EFAULT, EINTR, EINVAL, EOPNOTSUPP, ENOSYS
    };
    TestFile t;

    if (!file_open(&t, NOWAIT)) {
        return;
    }
    for (int i = 0; i < 2 * ARRAY_SIZE(errors); i++) {
        bool is_write = i & 1;
        int type = is_write ? QEMU_AIO_WRITE : QEMU_AIO_READ;
        int opcode = is_write ? IO_CMD_PWRITE : IO_CMD_PREAD;
        int err = errors[i / 2];
        bool learns = err == EIO || err == EINVAL || err == EOPNOTSUPP ||
                      err == ENOSYS;

        /* The pool says the same: that is the answer, and nothing is learnt. */
        raw_aio_set_fd(&t.f, reopen(&t, NOWAIT));
        hooks_reset();
        forge_iocb(opcode, 1, 0, ALWAYS, -err);
        fault(is_write ? CALL_ANY_WRITE : CALL_ANY_READ, 1, -EIO);
        g_assert_cmpint(file_rw(&t, type, 0, BLK, 1, 0, 0), ==, -EIO);
        g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 1);
        g_assert_cmpuint(calls(CALL_ANY_READ) + calls(CALL_ANY_WRITE), ==, 1);
        ASSERT_STATS(&t, 0, 1, 1, 0);

        /* The pool can do it. */
        g_assert_cmpint(file_rw(&t, type, 0, BLK, 1, 0, 0), ==, 0);
        g_assert_cmpuint(iocbs(opcode, 1), ==, 2);
        g_assert_cmpuint(iocbs(opcode, 0), ==, 0);
        ASSERT_STATS(&t, 0, 1, 1, 0);

        g_assert_cmpint(file_rw(&t, type, 0, BLK, 1, 0, 0), ==, 0);
        g_assert_cmpuint(iocbs(opcode, 1), ==, learns ? 2 : 3);
        /* EIO stands for a wait, which is not for the event loop. */
        g_assert_cmpuint(iocbs(opcode, 0), ==,
                         learns && err != EIO ? 1 : 0);
        file_stats(&t);
    }
    file_close(&t);
}
#endif
#endif /* CONFIG_LINUX_AIO */

/*
 * FUA
 */

static void test_fua_buffered(int kind)
{
    TestFile t;

    if (!file_open(&t, kind)) {
        return;
    }
    for (int i = 0; i < 8; i++) {
        int niov = i & 1 ? 4 : 1;

        t.coroutine = i & 2;
        disable(&t, i & 4 ? RAW_AIO_DISABLE_PREADV : 0);
        hooks_reset();
        fault(CALL_FDATASYNC, 1, 0);
        g_assert_cmpint(file_write(&t, 0, 4 * BLK, niov, BDRV_REQ_FUA, i + 1),
                        ==, 0);
        check_file(&t, 0, 4 * BLK, i + 1);

        /* The last of all, and before the completion */
        g_assert_cmpuint(calls(CALL_FDATASYNC), ==, 1);
        g_assert_cmpint(hooks.log[hooks.nr_log - 1].call, ==, CALL_FDATASYNC);
        g_assert_cmpuint(calls(CALL_ANY_WRITE), ==, i & 4 ? niov : 1);
        g_assert_cmpuint(calls(CALL_PWRITEV2), ==, 0);
        g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 0);
    }

    /* Without it there is none, and a failed write needs none. */
    hooks_reset();
    g_assert_cmpint(file_write(&t, 0, BLK, 1, 0, 1), ==, 0);
    g_assert_cmpuint(calls(CALL_FDATASYNC), ==, 0);
    fault(CALL_PWRITE, 1, -EIO);
    g_assert_cmpint(file_write(&t, 0, BLK, 1, BDRV_REQ_FUA, 1), ==, -EIO);
    g_assert_cmpuint(calls(CALL_FDATASYNC), ==, 0);

    /* Nor do reads. */
    g_assert_cmpint(file_rw(&t, QEMU_AIO_READ, 0, BLK, 1, BDRV_REQ_FUA, 1), ==,
                    0);
    g_assert_cmpuint(calls(CALL_FDATASYNC), ==, 0);

    hooks_reset();
    fault(CALL_FDATASYNC, 1, -EIO);
    g_assert_cmpint(file_write(&t, 0, BLK, 1, BDRV_REQ_FUA, 2), ==, -EIO);
    file_close(&t);
}

#if RAW_AIO_HAVE_RWF
static void test_fua_direct(int kind)
{
    static const int unsupported[] = { EOPNOTSUPP, EINVAL, ENOSYS };
    TestFile t;

    if (!file_open(&t, kind)) {
        return;
    }

    /* The flag works, or the kernel of this host does not have it. */
    for (int i = 0; i < 4; i++) {
        int type = QEMU_AIO_WRITE | (i & 2 ? QEMU_AIO_MISALIGNED : 0);

        hooks_reset();
        t.coroutine = i & 1;
        g_assert_cmpint(file_rw(&t, type, 0, 4 * BLK, i & 1 ? 4 : 1,
                                BDRV_REQ_FUA, i + 1), ==, 0);
        check_file(&t, 0, 4 * BLK, i + 1);
        if (calls(CALL_FDATASYNC) == 0) {
            g_assert_cmpuint(calls(CALL_PWRITEV2), ==, 1);
            g_assert_cmpuint(calls(CALL_ANY_WRITE), ==, 1);
            g_assert_cmpint(hooks.log[0].flags, ==, RAW_AIO_RWF_DSYNC);
        }
        g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 0);
        ASSERT_STATS(&t, 0, 0, 1, 0);
    }

    /* It does not, which is learnt by the write without. */
    for (int i = 0; i < ARRAY_SIZE(unsupported); i++) {
        raw_aio_set_fd(&t.f, reopen(&t, kind));
        hooks_reset();
        fault(CALL_PWRITEV2, ALWAYS, -unsupported[i]);
        fault(CALL_FDATASYNC, ALWAYS, 0);

        fault(CALL_PWRITEV, 1, -EIO);
        g_assert_cmpint(file_write(&t, 0, 4 * BLK, 4, BDRV_REQ_FUA, 10), ==,
                        -EIO);
        g_assert_cmpuint(calls(CALL_PWRITEV2), ==, 1);
        g_assert_cmpuint(calls(CALL_FDATASYNC), ==, 0);

        /* That write failed, so the flag is still tried. */
        g_assert_cmpint(file_write(&t, 0, 4 * BLK, 4, BDRV_REQ_FUA, i), ==, 0);
        check_file(&t, 0, 4 * BLK, i);
        g_assert_cmpuint(calls(CALL_PWRITEV2), ==, 2);
        g_assert_cmpuint(calls(CALL_PWRITEV), ==, 2);
        g_assert_cmpuint(calls(CALL_FDATASYNC), ==, 1);
        g_assert_cmpint(hooks.log[hooks.nr_log - 1].call, ==, CALL_FDATASYNC);

        g_assert_cmpint(file_write(&t, 0, 4 * BLK, 4, BDRV_REQ_FUA, i), ==, 0);
        g_assert_cmpuint(calls(CALL_PWRITEV2), ==, 2);
        g_assert_cmpuint(calls(CALL_PWRITEV), ==, 3);
        g_assert_cmpuint(calls(CALL_FDATASYNC), ==, 2);

        fault(CALL_FDATASYNC, 1, -EIO);
        hooks_reset();
        fault(CALL_FDATASYNC, 1, -EIO);
        g_assert_cmpint(file_write(&t, 0, 4 * BLK, 4, BDRV_REQ_FUA, i), ==,
                        -EIO);
        g_assert_cmpuint(calls(CALL_FDATASYNC), ==, 1);
    }

    /* A short write, and then the flag is refused: all of it is made stable. */
    raw_aio_set_fd(&t.f, reopen(&t, kind));
    hooks_reset();
    fault(CALL_PWRITEV2, 1, BLK);
    fault(CALL_PWRITEV2, 1, -EOPNOTSUPP);
    fault(CALL_FDATASYNC, 1, 0);
    g_assert_cmpint(file_write(&t, 0, 4 * BLK, 4, BDRV_REQ_FUA, 30), ==, 0);
    check_file(&t, 0, 4 * BLK, 30);
    g_assert_cmpuint(calls(CALL_FDATASYNC), ==, 1);

    /* An error of the disk is final. */
    raw_aio_set_fd(&t.f, reopen(&t, kind));
    hooks_reset();
    fault(CALL_PWRITEV2, 1, -EIO);
    g_assert_cmpint(file_write(&t, 0, 4 * BLK, 4, BDRV_REQ_FUA, 30), ==, -EIO);
    g_assert_cmpuint(calls(CALL_ANY_WRITE), ==, 1);
    g_assert_cmpuint(calls(CALL_FDATASYNC), ==, 0);

    /* Without pwritev(), and so without pwritev2() */
    hooks_reset();
    disable(&t, RAW_AIO_DISABLE_PREADV);
    fault(CALL_FDATASYNC, ALWAYS, 0);
    g_assert_cmpint(file_write(&t, 0, 4 * BLK, 4, BDRV_REQ_FUA, 31), ==, 0);
    check_file(&t, 0, 4 * BLK, 31);
    g_assert_cmpuint(calls(CALL_PWRITEV2), ==, 0);
    g_assert_cmpuint(calls(CALL_FDATASYNC), ==, 1);
    file_close(&t);
}
#endif

/*
 * Flush
 */

/* Cached data: after a failed writeback nothing is stable any more. */
static void test_flush_memory(int fua)
{
    TestFile t;

    if (!file_open(&t, BUFFERED)) {
        return;
    }
    fault(CALL_FDATASYNC, 2, 0);
    g_assert_cmpint(file_flush(&t), ==, 0);
    t.coroutine = true;
    g_assert_cmpint(file_flush(&t), ==, 0);
    g_assert_cmpuint(calls(CALL_FDATASYNC), ==, 2);
    ASSERT_STATS(&t, 0, 0, 2, 0);

    hooks_reset();
    fault(CALL_FDATASYNC, 1, -EIO);
    fault(CALL_FDATASYNC, ALWAYS, 0);
    if (fua) {
        g_assert_cmpint(file_write(&t, 0, BLK, 1, BDRV_REQ_FUA, 1), ==, -EIO);
    } else {
        g_assert_cmpint(file_flush(&t), ==, -EIO);
    }
    g_assert_cmpuint(calls(CALL_FDATASYNC), ==, 1);

    for (int i = 0; i < 4; i++) {
        t.coroutine = i & 1;
        g_assert_cmpint(file_flush(&t), ==, -EIO);
        g_assert_cmpint(file_write(&t, 0, BLK, 1, BDRV_REQ_FUA, 1), ==, -EIO);
        g_assert_cmpuint(calls(CALL_FDATASYNC), ==, 1);
        g_assert_cmpint(file_write(&t, 0, BLK, 1, 0, 1), ==, 0);
        g_assert_cmpint(file_read(&t, 0, BLK, 1, 1), ==, 0);
        if (i == 1) {
            raw_aio_set_fd(&t.f, reopen(&t, BUFFERED));
        }
    }
    file_close(&t);
}

/*
 * A flush while another one runs: that one may have begun before the last
 * write, and if it fails, it is the only one that hears of it.
 */
static unsigned syncs_at_end;

static void flush_concurrent_hook(Req *r)
{
    syncs_at_end = MIN(syncs_at_end, calls(CALL_FDATASYNC));
}

static void test_flush_concurrent(int err)
{
    Req r[4] = { 0 };
    PAIOPoolInfo info;
    TestFile t;

    if (!file_open(&t, BUFFERED)) {
        return;
    }
    fault(CALL_FDATASYNC, 1, -err);
    fault(CALL_FDATASYNC, ALWAYS, 0);
    gate_close(1u << CALL_FDATASYNC, -1);
    req_start(&r[0], &t, QEMU_AIO_FLUSH, 0, 0);
    gate_wait(1);

    g_assert_cmpint(file_write(&t, 0, BLK, 1, 0, 1), ==, 0);
    syncs_at_end = UINT_MAX;
    for (int i = 1; i < 3; i++) {
        r[i].hook = flush_concurrent_hook;
        req_start(&r[i], &t, QEMU_AIO_FLUSH, 0, 0);
    }
    req_init(&r[3], BLK, 1, false);
    fill(r[3].buf, BLK, BLK, 1);
    r[3].hook = flush_concurrent_hook;
    req_start(&r[3], &t, QEMU_AIO_WRITE, BLK, BDRV_REQ_FUA);
    do {
        settle();
        paio_pool_get_info(raw_aio_current_pool(), &info);
    } while (info.queued || calls(CALL_PWRITE) < 2);
    g_usleep(2000); /* Most likely they wait for the first now. */
    g_assert(!r[0].done && !r[1].done && !r[2].done && !r[3].done);

    gate_open();
    for (int i = 0; i < 4; i++) {
        g_assert_cmpint(req_wait(&r[i]), ==, -err);
    }
    if (!err) {
        g_assert_cmpuint(syncs_at_end, >=, 2);
    }
    g_assert_cmpuint(calls(CALL_FDATASYNC), <=, 4);
    g_assert_cmpint(file_flush(&t), ==, -err);
    check_file(&t, 0, 2 * BLK, 1);
    file_close(&t);
    req_destroy(&r[3]);
}

/*
 * When the file becomes O_DIRECT, what was lost is still lost, and another tier
 * doing the flush does not change that.
 */
static void test_flush_memory_then_direct(int native)
{
    TestFile t;
    int fd;

    if (!file_open(&t, native ? BUFFERED_NATIVE : BUFFERED)) {
        return;
    }
    fault(CALL_FDATASYNC, 1, -EIO);
    g_assert_cmpint(file_flush(&t), ==, -EIO);

    fd = reopen(&t, DIRECT);
    if (fd < 0) {
        g_test_skip("no O_DIRECT");
    } else {
        raw_aio_set_fd(&t.f, fd);
        g_assert_cmpint(file_flush(&t), ==, -EIO);
        t.coroutine = true;
        g_assert_cmpint(file_flush(&t), ==, -EIO);
    }
    file_close(&t);
}

static void test_flush_direct(int unused)
{
    TestFile t;

    if (!file_open(&t, DIRECT)) {
        return;
    }
    fault(CALL_FDATASYNC, 1, -EIO);
    g_assert_cmpint(file_flush(&t), ==, -EIO);
    g_assert_cmpint(file_flush(&t), ==, 0);
    g_assert_cmpuint(calls(CALL_FDATASYNC), ==, 2);
    g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 0);
    ASSERT_STATS(&t, 0, 0, 2, 0);
    file_close(&t);
}

#ifdef CONFIG_LINUX_AIO
static void test_flush_native(int unused)
{
    static const int unsupported[] = { EINVAL, EOPNOTSUPP, ENOSYS };
    TestFile t;
    Stats s;

    if (!file_open(&t, NOWAIT)) {
        return;
    }

    /* The kernel does it, if it is not one of the very old ones. */
    g_assert_cmpint(file_write(&t, 0, BLK, 1, 0, 1), ==, 0);
    file_stats(&t);
    g_assert_cmpint(file_flush(&t), ==, 0);
    g_assert_cmpuint(iocbs(IO_CMD_FDSYNC, 0), ==, 1);
    g_assert_cmpuint(iocbs(IO_CMD_FDSYNC, 1), ==, 0);
    s = file_stats(&t);
    g_assert_cmpuint(s.native + s.pool, ==, 1);
    g_assert_cmpuint(s.pool, ==, calls(CALL_FDATASYNC));
    g_assert_cmpuint(s.pool, ==, s.refused);

    /* It refuses: the pool does it, and if it can, that is learnt. */
    for (int i = 0; i < ARRAY_SIZE(unsupported); i++) {
        raw_aio_set_fd(&t.f, reopen(&t, NOWAIT));
        hooks_reset();
        refuse_iocb(IO_CMD_FDSYNC, -1, 0, ALWAYS, -unsupported[i]);
        fault(CALL_FDATASYNC, 1, -EIO);
        fault(CALL_FDATASYNC, ALWAYS, 0);
        g_assert_cmpint(file_flush(&t), ==, -EIO);
        g_assert_cmpuint(calls(CALL_FDATASYNC), ==, 1);
        g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 1);
        g_assert_cmpint(file_flush(&t), ==, 0);
        g_assert_cmpuint(calls(CALL_FDATASYNC), ==, 2);
        g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 2);
        g_assert_cmpint(file_flush(&t), ==, 0);
        g_assert_cmpuint(calls(CALL_FDATASYNC), ==, 3);
        g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 2);
        ASSERT_STATS(&t, 0, 2, 3, 0);

        /* Reads and writes are not concerned. */
        g_assert_cmpint(file_read(&t, 0, BLK, 1, 1), ==, 0);
        g_assert_cmpint(file_write(&t, 0, BLK, 1, 0, 1), ==, 0);
        g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 4);
        file_stats(&t);
    }

    /* It has no room: not learnt */
    raw_aio_set_fd(&t.f, reopen(&t, NOWAIT));
    hooks_reset();
    fault(CALL_FDATASYNC, ALWAYS, 0);
    refuse_iocb(IO_CMD_FDSYNC, -1, 0, 1, -EAGAIN);
    g_assert_cmpint(file_flush(&t), ==, 0);
    g_assert_cmpuint(calls(CALL_FDATASYNC), ==, 1);
    g_assert_cmpint(file_flush(&t), ==, 0);
    g_assert_cmpuint(iocbs(IO_CMD_FDSYNC, 0), ==, 2);

    /* An error of the disk is final, since the kernel reports it once. */
    for (int i = 0; i < 2; i++) {
        file_stats(&t);
        hooks_reset();
        t.coroutine = i;
        forge_iocb(IO_CMD_FDSYNC, -1, 0, 1, -EIO);
        g_assert_cmpint(file_flush(&t), ==, -EIO);
        g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 1);
        g_assert_cmpuint(calls(CALL_FDATASYNC), ==, 0);
        ASSERT_STATS(&t, 1, 0, 0, 0);
    }
    file_close(&t);
}

/* A cached file: FDSYNC would not know what test_flush_memory() is about. */
static void test_flush_buffered_native(int unused)
{
    TestFile t;

    if (!file_open(&t, BUFFERED_NATIVE)) {
        return;
    }
    fault(CALL_FDATASYNC, 1, 0);
    g_assert_cmpint(file_flush(&t), ==, 0);
    g_assert_cmpuint(calls(CALL_FDATASYNC), ==, 1);
    g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 0);
    file_close(&t);
}

/*
 * Refused by io_submit()
 */

static void test_refused(int kind)
{
    static const int errors[] = {
        EINVAL, EOPNOTSUPP, ENOSYS, EIO, EAGAIN, ENOMEM, EBADF, EINTR, EPERM
    };
    TestFile t;

    if (!file_open(&t, kind)) {
        return;
    }
    for (int i = 0; i < 4 * ARRAY_SIZE(errors); i++) {
        bool is_write = i & 1;
        int type = is_write ? QEMU_AIO_WRITE : QEMU_AIO_READ;
        Call call = is_write ? CALL_ANY_WRITE : CALL_ANY_READ;
        int opcode = is_write ? IO_CMD_PWRITEV : IO_CMD_PREADV;
        int err = errors[i / 4];

        raw_aio_set_fd(&t.f, reopen(&t, kind));
        hooks_reset();
        t.coroutine = i & 2;
        refuse_iocb(opcode, -1, 0, 1, -err);
        g_assert_cmpint(file_rw(&t, type, 0, 4 * BLK, 4, 0, 0), ==, 0);
        check_file(&t, 0, 4 * BLK, 0);
        g_assert_cmpuint(calls(call), ==, 1);
        g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 1);
        ASSERT_STATS(&t, 0, 1, 1, 0);

        /* And if the pool can't do it either, the caller gets its answer. */
        raw_aio_set_fd(&t.f, reopen(&t, kind));
        hooks_reset();
        refuse_iocb(opcode, -1, 0, 1, -err);
        fault(call, 1, -ENOSPC);
        g_assert_cmpint(file_rw(&t, type, 0, 4 * BLK, 4, 0, 0), ==, -ENOSPC);
        g_assert_cmpuint(calls(call), ==, 1);
        ASSERT_STATS(&t, 0, 1, 1, 0);
    }
    file_close(&t);
}

/* What is learnt of a refusal, and what is not */
static void test_learning(int err)
{
    bool learns = err == EINVAL || err == EOPNOTSUPP || err == ENOSYS;
    TestFile t;

    if (!file_open(&t, NOWAIT)) {
        return;
    }
    if (!RAW_AIO_HAVE_IOCB_FLAGS) {
        g_test_skip("no RWF_NOWAIT in struct iocb");
        file_close(&t);
        return;
    }
    for (int i = 0; i < 2; i++) {
        bool is_write = i & 1;
        int type = is_write ? QEMU_AIO_WRITE : QEMU_AIO_READ;
        int other_type = is_write ? QEMU_AIO_READ : QEMU_AIO_WRITE;
        Call call = is_write ? CALL_ANY_WRITE : CALL_ANY_READ;
        int opcode = is_write ? IO_CMD_PWRITE : IO_CMD_PREAD;
        int other = is_write ? IO_CMD_PREAD : IO_CMD_PWRITE;

        raw_aio_set_fd(&t.f, reopen(&t, NOWAIT));
        hooks_reset();
        refuse_iocb(opcode, 1, 0, ALWAYS, -err);

        /* The pool fails as well: that says nothing about the flag. */
        fault(call, 1, -EIO);
        g_assert_cmpint(file_rw(&t, type, 0, BLK, 1, 0, 0), ==, -EIO);
        g_assert_cmpuint(iocbs(opcode, 1), ==, 1);

        /* So the flag is tried again, and now the pool can do it. */
        g_assert_cmpint(file_rw(&t, type, 0, BLK, 1, 0, 0), ==, 0);
        g_assert_cmpuint(iocbs(opcode, 1), ==, 2);
        g_assert_cmpuint(iocbs(opcode, 0), ==, 0);
        ASSERT_STATS(&t, 0, 2, 2, 0);

        g_assert_cmpint(file_rw(&t, type, 0, BLK, 1, 0, 0), ==, 0);
        if (!learns) {
            g_assert_cmpuint(iocbs(opcode, 1), ==, 3);
            g_assert_cmpuint(iocbs(opcode, 0), ==, 0);
            ASSERT_STATS(&t, 0, 1, 1, 0);
            continue;
        }
        g_assert_cmpuint(iocbs(opcode, 1), ==, 2);
        g_assert_cmpuint(iocbs(opcode, 0), ==, 1);
        ASSERT_STATS(&t, 1, 0, 0, 0);

        /* The other direction has it still. */
        g_assert_cmpint(file_rw(&t, other_type, 0, BLK, 1, 0, 0), ==, 0);
        g_assert_cmpuint(iocbs(other, 1), ==, 1);
        g_assert_cmpuint(iocbs(other, 0), ==, 0);
        file_stats(&t);

        /* Not even without the flag: the pool fails, then it can do it. */
        hooks_reset();
        refuse_iocb(opcode, -1, 0, ALWAYS, -err);
        fault(call, 1, -EIO);
        g_assert_cmpint(file_rw(&t, type, 0, BLK, 1, 0, 0), ==, -EIO);
        g_assert_cmpint(file_rw(&t, type, 0, BLK, 1, 0, 0), ==, 0);
        g_assert_cmpuint(iocbs(opcode, 0), ==, 2);
        ASSERT_STATS(&t, 0, 2, 2, 0);
        g_assert_cmpint(file_rw(&t, type, 0, BLK, 1, 0, 0), ==, 0);
        g_assert_cmpuint(iocbs(opcode, 0), ==, 2);
        g_assert_cmpuint(iocbs(opcode, 1), ==, 0);
        ASSERT_STATS(&t, 0, 0, 1, 0);
        g_assert_cmpint(file_rw(&t, other_type, 0, BLK, 1, 0, 0), ==, 0);
        g_assert_cmpuint(iocbs(other, 0) + iocbs(other, 1), ==, 1);

        /* It is forgotten with the descriptor. */
        raw_aio_set_fd(&t.f, reopen(&t, NOWAIT));
        hooks_reset();
        g_assert_cmpint(file_rw(&t, type, 0, BLK, 1, 0, 0), ==, 0);
        g_assert_cmpuint(iocbs(opcode, 1), ==, 1);
        file_stats(&t);
    }
    file_close(&t);
}

/*
 * The three ways in which io_submit() does not take everything
 */

#define BATCH 8

typedef struct Batch {
    TestFile t;
    Req r[BATCH];
} Batch;

/* One write for each block, all in one defer_call section */
static bool batch_open(Batch *b)
{
    if (!file_open(&b->t, NATIVE)) {
        return false;
    }
    for (int i = 0; i < BATCH; i++) {
        req_init(&b->r[i], BLK, 1, false);
        fill(b->r[i].buf, i * BLK, BLK, 1);
    }
    return true;
}

static void batch_submit(Batch *b)
{
    defer_call_begin();
    for (int i = 0; i < BATCH; i++) {
        req_start(&b->r[i], &b->t, QEMU_AIO_WRITE, i * BLK, 0);
    }
    defer_call_end();
}

static void batch_close(Batch *b)
{
    for (int i = 0; i < BATCH; i++) {
        g_assert_cmpint(req_wait(&b->r[i]), ==, 0);
    }
    check_file(&b->t, 0, BATCH * BLK, 1);
    check_file(&b->t, BATCH * BLK, FILE_SIZE - BATCH * BLK, 0);
    file_close(&b->t);
    for (int i = 0; i < BATCH; i++) {
        req_destroy(&b->r[i]);
    }
}

static void test_submit_some(int unused)
{
    Batch b;

    if (!batch_open(&b)) {
        return;
    }
    fault(CALL_IO_SUBMIT, 1, 3);
    fault(CALL_IO_SUBMIT, 1, 1);
    defer_call_begin();
    batch_submit(&b);
    g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 0);
    defer_call_end();
    g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 3);
    batch_close(&b);
    g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 3);
    g_assert_cmpint(hooks.submitted, ==, BATCH);
}

/* One in the middle is at fault, or there is no room for it. */
static void test_submit_middle(int err)
{
    bool full = err == EAGAIN;
    Batch b;

    if (!batch_open(&b)) {
        return;
    }
    refuse_iocb(IO_CMD_PWRITE, -1, 2, 1, -err);
    batch_submit(&b);
    /* Two are taken, the third is refused, and then the rest is taken. */
    g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, full ? 2 : 3);
    for (int i = 0; i < BATCH; i++) {
        g_assert_cmpint(req_wait(&b.r[i]), ==, 0);
    }
    g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 3);
    g_assert_cmpuint(calls(CALL_ANY_WRITE), ==, !full);
    ASSERT_STATS(&b.t, BATCH - !full, !full, !full, 0);
    batch_close(&b);
}

static void test_submit_error(int err)
{
    Batch b;

    if (!batch_open(&b)) {
        return;
    }
    /* Two are taken.  Then the first of the rest is at fault. */
    fault(CALL_IO_SUBMIT, 1, 2);
    fault(CALL_IO_SUBMIT, 1, -err);
    batch_submit(&b);
    g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 3);
    for (int i = 0; i < BATCH; i++) {
        g_assert_cmpint(req_wait(&b.r[i]), ==, 0);
    }
    g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 3);
    g_assert_cmpuint(calls(CALL_ANY_WRITE), ==, 1);
    g_assert_cmpint(hooks.log[hooks.nr_log - 1].offset, ==, 2 * BLK);
    ASSERT_STATS(&b.t, BATCH - 1, 1, 1, 0);
    batch_close(&b);
}

/* No room, or a signal: nothing is at fault, and a completion makes room. */
static void test_submit_again(int err)
{
    Batch b;

    if (!batch_open(&b)) {
        return;
    }
    fault(CALL_IO_SUBMIT, 1, 2);
    fault(CALL_IO_SUBMIT, 1, -err);
    batch_submit(&b);
    g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 2);
    for (int i = 0; i < BATCH; i++) {
        g_assert_cmpint(req_wait(&b.r[i]), ==, 0);
    }
    g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 3);
    g_assert_cmpint(hooks.submitted, ==, BATCH);
    ASSERT_STATS(&b.t, BATCH, 0, 0, 0);
    batch_close(&b);
}

/* No completion is to come, so there is no use in waiting. */
static void test_submit_again_alone(int err)
{
    Batch b;

    if (!batch_open(&b)) {
        return;
    }
    fault(CALL_IO_SUBMIT, 3, -err);
    batch_submit(&b);
    for (int i = 0; i < BATCH; i++) {
        g_assert_cmpint(req_wait(&b.r[i]), ==, 0);
    }
    g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 4);
    g_assert_cmpuint(calls(CALL_ANY_WRITE), ==, 3);
    ASSERT_STATS(&b.t, BATCH - 3, 3, 3, 0);
    batch_close(&b);
}

/* Never again: one call for each request */
static void test_submit_never(int err)
{
    Batch b;

    if (!batch_open(&b)) {
        return;
    }
    fault(CALL_IO_SUBMIT, 1, 1);
    fault(CALL_IO_SUBMIT, ALWAYS, -err);
    batch_submit(&b);
    for (int i = 0; i < BATCH; i++) {
        g_assert_cmpint(req_wait(&b.r[i]), ==, 0);
    }
    g_assert_cmpuint(calls(CALL_IO_SUBMIT), <=, 2 + BATCH);
    ASSERT_STATS(&b.t, 1, BATCH - 1, BATCH - 1, 0);
    batch_close(&b);
}

/* aio-max-batch, and what is sent by completions is one batch as well */
static Req *resend_first;

static void resend_hook(Req *r)
{
    Req *next = r + BATCH / 2;

    r->hook = NULL;
    req_start(next, r->t, QEMU_AIO_WRITE, (next - resend_first) * BLK, 0);
}

static void test_submit_batch(int unused)
{
    Batch b;

    if (!batch_open(&b)) {
        return;
    }
    b.t.f.aio_max_batch = 3;
    defer_call_begin();
    for (int i = 0; i < BATCH; i++) {
        req_start(&b.r[i], &b.t, QEMU_AIO_WRITE, i * BLK, 0);
        g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, (i + 1) / 3);
    }
    defer_call_end();
    g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 3);
    for (int i = 0; i < BATCH; i++) {
        g_assert_cmpint(req_wait(&b.r[i]), ==, 0);
    }

    /* What the context says, unless the file wants less */
    for (int max = 2; max <= 8; max += 6) {
        b.t.f.aio_max_batch = 4;
        hooks_reset();
        aio_context_set_aio_params(qemu_get_aio_context(), max);
        batch_submit(&b);
        g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, BATCH / MIN(max, 4));
        for (int i = 0; i < BATCH; i++) {
            g_assert_cmpint(req_wait(&b.r[i]), ==, 0);
        }
    }
    aio_context_set_aio_params(qemu_get_aio_context(), 0);

    /* All complete together, and each sends another. */
    b.t.f.aio_max_batch = 0;
    hooks_reset();
    resend_first = b.r;
    defer_call_begin();
    for (int i = 0; i < BATCH; i++) {
        b.r[i].done = 0;
    }
    for (int i = 0; i < BATCH / 2; i++) {
        b.r[i].hook = resend_hook;
        req_start(&b.r[i], &b.t, QEMU_AIO_WRITE, i * BLK, 0);
    }
    defer_call_end();
    while (ring_unread() < BATCH / 2) {
        g_usleep(50);
    }
    for (int i = 0; i < BATCH; i++) {
        g_assert_cmpint(req_wait(&b.r[i]), ==, 0);
    }
    g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 2);
    batch_close(&b);
}
#endif /* CONFIG_LINUX_AIO */

/*
 * Cancellation
 */

static void test_cancel_pool(int kind)
{
    AioContext *ctx = qemu_get_aio_context();
    TestFile t;
    Req r[5];

    if (!file_open(&t, kind)) {
        return;
    }
    for (int i = 0; i < ARRAY_SIZE(r); i++) {
        req_init(&r[i], BLK, 1, false);
        fill(r[i].buf, i * BLK, BLK, 1);
    }
    aio_context_set_thread_pool_params(ctx, 0, 1, &error_abort);
    gate_close(1u << CALL_PWRITE, -1);

    /* The first runs, the others are queued. */
    for (int i = 0; i < 3; i++) {
        req_start(&r[i], &t, QEMU_AIO_WRITE, i * BLK, 0);
    }
    gate_wait(1);
    defer_call_begin();
    for (int i = 3; i < 5; i++) {
        req_start(&r[i], &t, QEMU_AIO_WRITE, i * BLK, 0);
    }
    req_cancel(&r[3]);  /* not even queued yet */
    req_cancel(&r[3]);
    defer_call_end();
    req_cancel(&r[1]);
    req_cancel(&r[1]);
    req_cancel(&r[0]);
    g_assert_cmpint(req_wait(&r[1]), ==, -ECANCELED);
    g_assert_cmpint(req_wait(&r[3]), ==, -ECANCELED);
    g_assert(!r[0].done && !r[2].done && !r[4].done);

    gate_open();
    g_assert_cmpint(req_wait(&r[0]), ==, 0);
    g_assert_cmpint(req_wait(&r[2]), ==, 0);
    g_assert_cmpint(req_wait(&r[4]), ==, 0);
    g_assert_cmpuint(calls(CALL_PWRITE), ==, 3);
    for (int i = 0; i < 5; i++) {
        check_file(&t, i * BLK, BLK, i != 1 && i != 3);
    }
    ASSERT_STATS(&t, 0, 0, 3, 0);

    aio_context_set_thread_pool_params(ctx, 0, 64, &error_abort);
    file_close(&t);
    for (int i = 0; i < ARRAY_SIZE(r); i++) {
        req_destroy(&r[i]);
    }
}

static void gate_open_timer(void *opaque)
{
    Req *r = opaque;

    g_assert(!r->done);
    gate_open();
}

/* The form that waits */
static void test_cancel_pool_sync(int kind)
{
    AioContext *ctx = qemu_get_aio_context();
    TestFile t;
    Req r[2];
    QEMUTimer *timer;

    if (!file_open(&t, kind)) {
        return;
    }
    for (int i = 0; i < ARRAY_SIZE(r); i++) {
        req_init(&r[i], BLK, 1, false);
        fill(r[i].buf, i * BLK, BLK, 1);
    }
    aio_context_set_thread_pool_params(ctx, 0, 1, &error_abort);
    gate_close(1u << CALL_PWRITE, -1);
    for (int i = 0; i < 2; i++) {
        req_start(&r[i], &t, QEMU_AIO_WRITE, i * BLK, 0);
    }
    gate_wait(1);

    bdrv_aio_cancel(r[1].acb);
    g_assert(r[1].done && !r[0].done);
    g_assert_cmpint(r[1].ret, ==, -ECANCELED);

    timer = aio_timer_new(ctx, QEMU_CLOCK_REALTIME, SCALE_MS, gate_open_timer,
                          &r[0]);
    timer_mod(timer, qemu_clock_get_ms(QEMU_CLOCK_REALTIME) + 5);
    bdrv_aio_cancel(r[0].acb);
    g_assert(r[0].done);
    g_assert_cmpint(r[0].ret, ==, 0);
    timer_free(timer);

    aio_context_set_thread_pool_params(ctx, 0, 64, &error_abort);
    check_file(&t, 0, BLK, 1);
    check_file(&t, BLK, BLK, 0);
    file_close(&t);
    for (int i = 0; i < ARRAY_SIZE(r); i++) {
        req_destroy(&r[i]);
    }
}

#ifdef CONFIG_LINUX_AIO
static void test_cancel_native(int sync)
{
    TestFile t;
    Req r[4];

    if (!file_open(&t, NATIVE)) {
        return;
    }
    for (int i = 0; i < ARRAY_SIZE(r); i++) {
        req_init(&r[i], BLK, 1, false);
        fill(r[i].buf, i * BLK, BLK, 1);
    }

    /* Pending */
    defer_call_begin();
    for (int i = 0; i < 4; i++) {
        req_start(&r[i], &t, QEMU_AIO_WRITE, i * BLK, 0);
    }
    if (sync) {
        /* The loop that waits submits the others. */
        bdrv_aio_cancel(r[0].acb);
        g_assert(r[0].done);
    } else {
        for (int i = 0; i < 3; i += 2) {
            req_cancel(&r[i]);
            req_cancel(&r[i]);
        }
    }
    defer_call_end();
    for (int i = 0; i < 4; i++) {
        bool cancelled = i == 0 || (i == 2 && !sync);

        g_assert_cmpint(req_wait(&r[i]), ==, cancelled ? -ECANCELED : 0);
        check_file(&t, i * BLK, BLK, !cancelled);
    }
    g_assert_cmpuint(iocbs(IO_CMD_PWRITE, 0), ==, sync ? 3 : 2);
    ASSERT_STATS(&t, sync ? 3 : 2, 0, 0, 0);

    /* All of them, so that nothing is left to submit; then it goes on */
    hooks_reset();
    defer_call_begin();
    for (int i = 0; i < 4; i++) {
        req_start(&r[i], &t, QEMU_AIO_WRITE, i * BLK, 0);
    }
    for (int i = 0; i < 4; i++) {
        req_cancel(&r[i]);
    }
    defer_call_end();
    for (int i = 0; i < 4; i++) {
        g_assert_cmpint(req_wait(&r[i]), ==, -ECANCELED);
    }
    g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 0);
    g_assert_cmpint(file_write(&t, 0, BLK, 1, 0, 1), ==, 0);

    /* In the kernel */
    hooks_reset();
    for (int i = 0; i < 4; i++) {
        req_start(&r[i], &t, QEMU_AIO_WRITE, i * BLK, 0);
    }
    g_assert_cmpuint(hooks.submitted, ==, 4);
    for (int i = 0; i < 4; i++) {
        if (!sync) {
            req_cancel(&r[i]);
        } else if (!r[i].done) {
            bdrv_aio_cancel(r[i].acb);
            g_assert(r[i].done);
        }
    }
    for (int i = 0; i < 4; i++) {
        g_assert_cmpint(req_wait(&r[i]), ==, 0);
    }
    check_file(&t, 0, 4 * BLK, 1);

    /* Refused, and so on its way from the ring to the pool */
    hooks_reset();
    refuse_iocb(-1, -1, 0, 1, -EINVAL);
    req_start(&r[0], &t, QEMU_AIO_WRITE, 0, 0);
    req_cancel(&r[0]);
    req_wait(&r[0]);
    g_assert(r[0].ret == 0 || r[0].ret == -ECANCELED);
    g_assert_cmpuint(calls(CALL_ANY_WRITE), ==, !r[0].ret);

    file_close(&t);
    for (int i = 0; i < ARRAY_SIZE(r); i++) {
        req_destroy(&r[i]);
    }
}

/*
 * The kernel has written a part, the pool is to write the rest, and can't be
 * asked to forget about it: the request has begun.
 */
static void test_cancel_rest(int queued)
{
    AioContext *ctx = qemu_get_aio_context();
    TestFile t;
    Req blocker, r;

    if (!file_open(&t, NATIVE)) {
        return;
    }
    aio_context_set_thread_pool_params(ctx, 0, 1, &error_abort);
    gate_close((1u << CALL_PREAD) | (1u << CALL_PWRITE), -1);
    if (queued) {
        /* Nobody has time for the rest. */
        req_init(&blocker, BLK, 1, true);
        req_start(&blocker, &t, QEMU_AIO_READ | QEMU_AIO_MISALIGNED, 0, 0);
        gate_wait(1);
    }
    req_init(&r, 2 * BLK, 1, false);
    fill(r.buf, 0, 2 * BLK, 2);
    refuse_iocb(-1, -1, 0, 1, BLK);
    req_start(&r, &t, QEMU_AIO_WRITE, 0, 0);
    if (queued) {
        PAIOPoolInfo info;

        do {
            settle();
            paio_pool_get_info(raw_aio_current_pool(), &info);
        } while (!info.queued);
    } else {
        gate_wait(1);
    }
    req_cancel(&r);
    gate_open();
    g_assert_cmpint(req_wait(&r), ==, 0);
    check_file(&t, 0, 2 * BLK, 2);

    if (queued) {
        g_assert_cmpint(req_wait(&blocker), ==, 0);
        req_destroy(&blocker);
    }
    aio_context_set_thread_pool_params(ctx, 0, 64, &error_abort);
    file_close(&t);
    req_destroy(&r);
}
#endif

/*
 * Whose descriptor
 */

static void test_descriptor(int kind)
{
    int old_fd, new_fd;
    TestFile t;
    Req r[2];

    if (!file_open(&t, kind)) {
        return;
    }
    for (int i = 0; i < 2; i++) {
        req_init(&r[i], BLK, 1, false);
    }
    old_fd = file_fd(&t);
    gate_close(1u << CALL_PREAD, old_fd);
    for (int i = 0; i < 2; i++) {
        req_start(&r[i], &t, QEMU_AIO_READ, i * BLK, 0);
    }
    gate_wait(2);

    new_fd = reopen(&t, kind);
    raw_aio_set_fd(&t.f, new_fd);
    g_assert_cmpint(file_fd(&t), ==, new_fd);
    g_assert_cmpint(fcntl(old_fd, F_GETFD), !=, -1);

    /* New requests go to the new one and don't wait for the old ones. */
    hooks.nr_log = 0;
    g_assert_cmpint(file_read(&t, 0, BLK, 1, 0), ==, 0);
    g_assert_cmpint(file_write(&t, 0, BLK, 1, 0, 0), ==, 0);
    for (int i = 0; i < hooks.nr_log; i++) {
        g_assert_cmpint(hooks.log[i].fd, ==, new_fd);
    }
    g_assert(!r[0].done && !r[1].done);
    g_assert_cmpint(fcntl(old_fd, F_GETFD), !=, -1);

    gate_open();
    for (int i = 0; i < 2; i++) {
        g_assert_cmpint(req_wait(&r[i]), ==, 0);
        check(r[i].buf, i * BLK, BLK, 0);
    }
    /* The last of them has closed it. */
    g_assert_cmpint(fcntl(old_fd, F_GETFD), ==, -1);
    g_assert_cmpint(fcntl(new_fd, F_GETFD), !=, -1);

    /* None for a while */
    raw_aio_set_fd(&t.f, -1);
    g_assert_cmpint(fcntl(new_fd, F_GETFD), ==, -1);
    g_assert_cmpint(file_read(&t, 0, BLK, 1, 0), ==, -EBADF);
    new_fd = reopen(&t, kind);
    raw_aio_set_fd(&t.f, new_fd);
    g_assert_cmpint(file_read(&t, 0, BLK, 1, 0), ==, 0);

    /* Held by someone else, and nothing in flight */
    {
        int held_fd;
        RawAIODesc *desc = raw_aio_get_desc(&t.f, &held_fd);

        g_assert_cmpint(held_fd, ==, new_fd);
        raw_aio_set_fd(&t.f, reopen(&t, kind));
        g_assert_cmpint(fcntl(held_fd, F_GETFD), !=, -1);
        raw_aio_put_desc(desc);
        g_assert_cmpint(fcntl(held_fd, F_GETFD), ==, -1);
    }
    file_close(&t);
    for (int i = 0; i < 2; i++) {
        req_destroy(&r[i]);
    }
}

#ifdef CONFIG_LINUX_AIO
/* Buffered or not is asked of the descriptor, each time there is a new one. */
static void test_descriptor_flags(int unused)
{
    TestFile t;
    int fd, old_fd;
    Req r[2];

    if (!file_open(&t, NATIVE)) {
        return;
    }
    for (int i = 0; i < 3; i++) {
        hooks_reset();
        fault(CALL_FDATASYNC, ALWAYS, 0);
        g_assert_cmpint(file_read(&t, 0, BLK, 1, 0), ==, 0);
        ASSERT_STATS(&t, 1, 0, 0, 0);

        raw_aio_set_fd(&t.f, reopen(&t, BUFFERED));
        g_assert_cmpint(file_read(&t, 0, BLK, 1, 0), ==, 0);
        g_assert_cmpint(file_flush(&t), ==, 0);
        g_assert_cmpint(file_write(&t, 0, BLK, 4, BDRV_REQ_FUA, 0), ==, 0);
        ASSERT_STATS(&t, 0, 0, 3, 0);
        g_assert_cmpuint(calls(CALL_FDATASYNC), ==, 2);
        g_assert_cmpuint(calls(CALL_PWRITEV2), ==, 0);

        /* The flags as they are, not as they were at open() */
        fd = reopen(&t, BUFFERED);
        g_assert_cmpint(fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_DIRECT), ==,
                        0);
        raw_aio_set_fd(&t.f, fd);
    }

    /* Requests that wait in the ring finish on the old descriptor. */
    hooks_reset();
    old_fd = file_fd(&t);
    defer_call_begin();
    for (int i = 0; i < 2; i++) {
        req_init(&r[i], BLK, 1, false);
        req_start(&r[i], &t, QEMU_AIO_READ, i * BLK, 0);
    }
    raw_aio_set_fd(&t.f, reopen(&t, BUFFERED));
    g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 0);
    g_assert_cmpint(fcntl(old_fd, F_GETFD), !=, -1);
    defer_call_end();
    for (int i = 0; i < 2; i++) {
        g_assert_cmpint(req_wait(&r[i]), ==, 0);
        check(r[i].buf, i * BLK, BLK, 0);
        req_destroy(&r[i]);
    }
    ASSERT_STATS(&t, 2, 0, 0, 0);
    g_assert_cmpint(fcntl(old_fd, F_GETFD), ==, -1);

    /*
     * A refused request takes what it learnt to its own descriptor, and its
     * retry goes there as well.
     */
    old_fd = file_fd(&t);
    raw_aio_set_fd(&t.f, reopen(&t, NATIVE));
    old_fd = file_fd(&t);
    hooks_reset();
    refuse_iocb(-1, -1, 0, 1, -EOPNOTSUPP);
    gate_close(1u << CALL_PREAD, old_fd);
    req_init(&r[0], BLK, 1, false);
    req_start(&r[0], &t, QEMU_AIO_READ, 0, 0);
    gate_wait(1);
    raw_aio_set_fd(&t.f, reopen(&t, NATIVE));
    gate_open();
    g_assert_cmpint(req_wait(&r[0]), ==, 0);
    check(r[0].buf, 0, BLK, 0);
    req_destroy(&r[0]);
    g_assert_cmpint(fcntl(old_fd, F_GETFD), ==, -1);
    file_stats(&t);
    g_assert_cmpint(file_read(&t, 0, BLK, 1, 0), ==, 0);
    ASSERT_STATS(&t, 1, 0, 0, 0);
    file_close(&t);
}
#endif

/*
 * raw_aio_co_run()
 */

typedef struct Run {
    TestFile *t;
    int fd;
    int seen_fd;
    int ret;
    bool done;
    QemuSemaphore started;
    QemuSemaphore go_on;
} Run;

static int run_func(void *opaque)
{
    Run *run = opaque;

    run->seen_fd = run->fd;
    qemu_sem_post(&run->started);
    qemu_sem_wait(&run->go_on);
    /* Still open, though nobody else uses it any more */
    if (run->t && fcntl(run->seen_fd, F_GETFD) == -1) {
        return -EBADF;
    }
    return 42;
}

static void coroutine_fn run_entry(void *opaque)
{
    Run *run = opaque;

    run->ret = raw_aio_co_run(run->t ? &run->t->f : NULL, PAIO_SLOW, &run->fd,
                              run_func, run);
    run->done = true;
}

static void test_run(int with_file)
{
    AioContext *ctx = qemu_get_aio_context();
    Run run = { .fd = -2 };
    TestFile t;

    if (!file_open(&t, BUFFERED)) {
        return;
    }
    qemu_sem_init(&run.started, 0);
    qemu_sem_init(&run.go_on, 0);
    run.t = with_file ? &t : NULL;
    qemu_coroutine_enter(qemu_coroutine_create(run_entry, &run));
    while (qemu_sem_timedwait(&run.started, 1)) {
        aio_poll(ctx, false);
    }
    if (with_file) {
        g_assert_cmpint(run.seen_fd, ==, file_fd(&t));
        raw_aio_set_fd(&t.f, reopen(&t, BUFFERED));
        g_assert_cmpint(run.seen_fd, !=, file_fd(&t));
    } else {
        g_assert_cmpint(run.fd, ==, -2);
    }
    g_assert(!run.done);
    qemu_sem_post(&run.go_on);
    while (!run.done) {
        aio_poll(ctx, true);
    }
    g_assert_cmpint(run.ret, ==, 42);
    if (with_file) {
        g_assert_cmpint(fcntl(run.seen_fd, F_GETFD), ==, -1);
        ASSERT_STATS(&t, 0, 0, 1, 0);
    }
    file_close(&t);
    qemu_sem_destroy(&run.started);
    qemu_sem_destroy(&run.go_on);
}

/*
 * Nested event loops
 */

#define NESTED 20

typedef struct Nested {
    TestFile t;
    Req r[NESTED];
    int depth;
    int max_depth;
} Nested;

static Nested *nested;

/* Each completion waits for the next request, and for the one before. */
static void nested_hook(Req *r)
{
    nested->max_depth = MAX(nested->max_depth, ++nested->depth);
    for (int i = 1; i >= -1; i -= 2) {
        Req *other = r + i;

        if (other >= nested->r && other < nested->r + NESTED) {
            while (!other->done) {
                aio_poll(r->ctx, true);
            }
        }
    }
    nested->depth--;
}

/* Until all of them are done, without running the event loop */
static void wait_all_done(TestFile *t, int64_t submitted_before)
{
#ifdef CONFIG_LINUX_AIO
    if (kind_native(t->kind)) {
        /* With RWF_NOWAIT, some may not have been taken. */
        while (ring_unread() < hooks.submitted - submitted_before) {
            g_usleep(50);
        }
        return;
    }
#endif
    for (;;) {
        PAIOPoolInfo info;

        paio_pool_get_info(raw_aio_current_pool(), &info);
        if (info.threads && info.idle == info.threads && !info.queued) {
            return;
        }
        g_usleep(50);
    }
}

static void nested_run(Kind kind, bool wait, bool cancel)
{
    bool inl = kind_inline(kind);
    Nested n = { 0 };
    int64_t before;

    if (!file_open(&n.t, kind)) {
        return;
    }
    nested = &n;
    /* So that there is a worker, which takes an event loop to create */
    disable(&n.t, RAW_AIO_DISABLE_NATIVE | RAW_AIO_DISABLE_INLINE);
    g_assert_cmpint(file_read(&n.t, 0, BLK, 1, 0), ==, 0);
    disable(&n.t, 0);
    before = hooks.submitted;
    if (inl) {
        hooks_reset();
    }
    if (inl && wait) {
        /* Some of them are served at once, others by the pool. */
        for (int i = 0; i < 4; i++) {
            fault(CALL_PREADV2, 2, PASS);
            fault(CALL_PREADV2, 3, -EAGAIN);
        }
    }

    defer_call_begin();
    for (int i = 0; i < NESTED; i++) {
        req_init(&n.r[i], BLK, 1, false);
        n.r[i].hook = nested_hook;
        req_start(&n.r[i], &n.t, QEMU_AIO_READ, i * BLK, 0);
    }
    if (cancel) {
        for (int i = 0; i < NESTED; i++) {
            req_cancel(&n.r[i]);
        }
    }
    defer_call_end();
    if (wait && !cancel) {
        wait_all_done(&n.t, before);
    }
    for (int i = 0; i < NESTED; i++) {
        int ret = req_wait(&n.r[i]);

        if (inl && wait && cancel) {
            g_assert(ret == 0 || ret == -ECANCELED);
        } else {
            g_assert_cmpint(ret, ==, cancel && !inl ? -ECANCELED : 0);
        }
        if (!ret) {
            check(n.r[i].buf, i * BLK, BLK, 0);
        }
    }
    g_assert_cmpint(n.depth, ==, 0);
    if (cancel || (wait && kind == NATIVE) || (inl && !wait)) {
        /* They were there when the first was called, so it waited for all. */
        g_assert_cmpint(n.max_depth, >, 1);
    }
    file_close(&n.t);
    for (int i = 0; i < NESTED; i++) {
        req_destroy(&n.r[i]);
    }
}

static void test_nested_in(void *opaque)
{
    Kind kind = *(int *)opaque;

    for (int i = 0; i < 4; i++) {
        nested_run(kind, i & 1, i & 2);
    }
}

static void test_nested(int kind)
{
    AioContext *ctx = qemu_get_aio_context();
    IOThread *iothread;

    test_nested_in(&kind);

    /* The same with polling, where handlers are not entered twice */
    aio_context_set_poll_params(ctx, 200 * SCALE_US, 0, 0, &error_abort);
    for (int i = 0; i < 3; i++) {
        test_nested_in(&kind);
    }
    aio_context_set_poll_params(ctx, 0, 0, 0, &error_abort);

    iothread = iothread_new();
    run_in(iothread, test_nested_in, &kind);
    aio_context_set_poll_params(iothread_get_aio_context(iothread),
                                200 * SCALE_US, 0, 0, &error_abort);
    for (int i = 0; i < 3; i++) {
        run_in(iothread, test_nested_in, &kind);
    }
    iothread_join(iothread);
}

/* A loop within a defer_call section waits for what was submitted in it. */
static void test_nested_section(int kind)
{
    TestFile t;
    Req r[3];

    if (!file_open(&t, kind)) {
        return;
    }
    for (int i = 0; i < 3; i++) {
        req_init(&r[i], BLK, 1, false);
    }
    for (int n = 1; n <= 3; n++) {
        defer_call_begin();
        for (int i = 0; i < n; i++) {
            req_start(&r[i], &t, QEMU_AIO_READ, i * BLK, 0);
        }
        for (int i = 0; i < n; i++) {
            g_assert_cmpint(req_wait(&r[i]), ==, 0);
        }
        /* And again, in the same section, two levels deep */
        defer_call_begin();
        req_start(&r[0], &t, QEMU_AIO_READ, 0, 0);
        g_assert_cmpint(req_wait(&r[0]), ==, 0);
        defer_call_end();
        g_assert_cmpint(file_flush(&t), ==, 0);
        defer_call_end();
    }
    file_close(&t);
    for (int i = 0; i < 3; i++) {
        req_destroy(&r[i]);
    }
}

#ifdef CONFIG_LINUX_AIO
/*
 * The ring has no room, so the last request waits for a completion.  When that
 * comes, its callback waits for this very request, or for a new one.
 */
typedef struct Blocked {
    TestFile t;
    Req *r;
    int nr;
    int done;
    bool send;
} Blocked;

static Blocked *blocked;

static void blocked_hook(Req *r)
{
    Req *last = &blocked->r[blocked->nr];

    if (++blocked->done < blocked->nr) {
        return;
    }
    if (blocked->send) {
        req_start(last + 1, r->t, QEMU_AIO_READ, 0, 0);
        g_assert_cmpint(req_wait(last + 1), ==, 0);
    }
    g_assert_cmpint(req_wait(last), ==, 0);
}

/* Needs a ring of its own. */
static void test_nested_blocked(int arg)
{
    bool full = arg & 1;
    Blocked b = { .send = arg & 2 };

    if (!file_open(&b.t, NATIVE)) {
        return;
    }
    blocked = &b;
    /* Creates the ring, which can't grow */
    fault(CALL_IO_SETUP, 1, PASS);
    fault(CALL_IO_SETUP, ALWAYS, -ENOMEM);
    g_assert_cmpint(file_read(&b.t, 0, BLK, 1, 0), ==, 0);
    b.nr = full ? stat64_get(&b.t.f.stats[RAW_AIO_RING_SIZE]) : 1;
    g_assert_cmpint(b.nr, ==, full ? 64 : 1);
    b.r = g_new0(Req, b.nr + 2);
    for (int i = 0; i < b.nr + 2; i++) {
        req_init(&b.r[i], BLK, 1, false);
        b.r[i].t = &b.t;
    }

    hooks_reset();
    fault(CALL_IO_SETUP, ALWAYS, -ENOMEM);
    for (int i = 0; i <= b.nr; i++) {
        if (i == b.nr && !full) {
            fault(CALL_IO_SUBMIT, 1, -EAGAIN);
        }
        b.r[i].hook = i < b.nr ? blocked_hook : NULL;
        req_start(&b.r[i], &b.t, QEMU_AIO_READ, i % FILE_BLKS * BLK, 0);
    }
    g_assert_cmpint(hooks.submitted, ==, b.nr);
    while (ring_unread() < b.nr) {
        g_usleep(50);
    }
    g_assert_cmpint(req_wait(&b.r[b.nr]), ==, 0);
    for (int i = 0; i < b.nr; i++) {
        g_assert_cmpint(req_wait(&b.r[i]), ==, 0);
    }

    file_close(&b.t);
    for (int i = 0; i < b.nr + 2; i++) {
        req_destroy(&b.r[i]);
    }
    g_free(b.r);
}
#endif

/*
 * Depth, and the stack
 */

#define DEPTH 10000

typedef struct Deep {
    TestFile t;
    QEMUIOVector qiov;
    int to_send;
    int sent;
    int done;
    uint64_t max_in_kernel;
    uintptr_t stack_low;
    uintptr_t stack_high;
} Deep;

static void deep_send(Deep *d);

static void deep_cb(void *opaque, int ret)
{
    Deep *d = opaque;
    uintptr_t stack = (uintptr_t)__builtin_frame_address(0);

    g_assert_cmpint(in_engine, ==, 0);
    g_assert_cmpint(ret, ==, 0);
    d->done++;
    d->stack_low = MIN(d->stack_low, stack);
    d->stack_high = MAX(d->stack_high, stack);
    if (d->to_send) {
        deep_send(d);
    }
}

static void deep_send(Deep *d)
{
    d->to_send--;
    in_engine++;
    raw_aio_submit(&d->t.f, QEMU_AIO_READ, (d->sent++ % FILE_BLKS) * BLK,
                   &d->qiov, 0, deep_cb, d);
    in_engine--;
    if (kind_native(d->t.kind)) {
        /* Each completion that came is one that the kernel has no more. */
        pthread_mutex_lock(&hooks.lock);
        d->max_in_kernel = MAX(d->max_in_kernel, hooks.submitted - d->done);
        pthread_mutex_unlock(&hooks.lock);
    }
}

/* Added to the kind */
#define DEEP_VECTOR 0x100   /* several elements */
#define DEEP_ARRAY 0x200    /* and an iocb for each */
#define DEEP_WORKER 0x400   /* mostly submitted by workers */

static void deep_run(int arg, int at_once)
{
    Kind kind = arg & 0xff;
    g_autofree uint8_t *mem = g_malloc(2 * BLK);
    Deep d = {
        .to_send = DEPTH,
        .stack_low = UINTPTR_MAX,
    };
    BlockStatsRawAio *s;

    if (!file_open(&d.t, kind)) {
        return;
    }
    file_fill(&d.t, FILE_SIZE + 4 * BLK);
    /* All of them read into the same memory. */
    qemu_iovec_init(&d.qiov, 4);
    for (int i = 0; i < (arg & (DEEP_VECTOR | DEEP_ARRAY) ? 4 : 1); i++) {
        qemu_iovec_add(&d.qiov, (void *)ROUND_UP((uintptr_t)mem, BLK), BLK);
    }
    disable(&d.t, arg & DEEP_ARRAY ? RAW_AIO_DISABLE_IOCBV : 0);
#ifdef CONFIG_LINUX_AIO
    if (arg & DEEP_WORKER) {
        forge_iocb(-1, 1, 0, ALWAYS, -EAGAIN);
    }
#endif

    defer_call_begin();
    for (int i = 0; i < at_once; i++) {
        deep_send(&d);
    }
    defer_call_end();
    while (d.done < DEPTH) {
        aio_poll(qemu_get_aio_context(), true);
    }
    g_assert_cmpint(d.to_send, ==, 0);
    g_assert_cmpuint(d.stack_high - d.stack_low, <, 16 * KiB);

    s = raw_aio_query_stats(&d.t.f);
    if (arg & DEEP_WORKER) {
        /* Where the ring has no room for it, the pool reads. */
        g_assert_cmpuint(s->native_served + s->pool_served, ==, DEPTH);
        g_assert_cmpuint(s->native_by_worker, ==, s->native_served);
        g_assert_cmpuint(s->native_served, >, 0);
        g_assert_cmpuint(hooks.submitted, ==,
                         s->native_by_worker + s->native_refused);
    } else if (kind == NATIVE) {
        int each = arg & DEEP_ARRAY ? 4 : 1;

        g_assert_cmpuint(s->native_served, ==, DEPTH);
        g_assert_cmpuint(hooks.submitted, ==, DEPTH * each);
        g_assert_cmpuint(calls(CALL_IO_SUBMIT), <=, DEPTH * each);
        g_assert_cmpuint(s->ring_size, >, 0);
        if (each == 1) {
            g_assert_cmpuint(d.max_in_kernel, <=, s->ring_size);
        }
    } else if (kind_inline(kind)) {
        g_assert_cmpuint(s->inline_served, >, 0);
        g_assert_cmpuint(s->inline_served + s->pool_served, ==, DEPTH);
        if (kind == INLINE) {
            g_assert_cmpuint(s->ring_size, ==, 0);
        }
    } else {
        g_assert_cmpuint(s->pool_served, ==, DEPTH);
        g_assert_cmpuint(s->ring_size, ==, 0);
    }
    qapi_free_BlockStatsRawAio(s);
    file_close(&d.t);
    g_assert_cmpint(d.done, ==, DEPTH);
    qemu_iovec_destroy(&d.qiov);
}

static void test_depth(int arg)
{
    deep_run(arg, DEPTH);
}

static void test_chain(int arg)
{
    deep_run(arg, 200);
}

/*
 * The event loop is not starved
 */

#define CHAINS 16

typedef struct Chains {
    TestFile t;
    Req r[CHAINS];
    int in_turn;        /* completions in this turn of the event loop */
    int total;
    int ticks;
    bool stop;
    QEMUTimer *timer;
} Chains;

static Chains *chains;

static void chains_hook(Req *r)
{
    g_assert_cmpint(r->ret, ==, 0);
    chains->in_turn++;
    chains->total++;
    if (!chains->stop) {
        req_start(r, r->t, QEMU_AIO_READ, r->offset, 0);
    }
}

static void chains_tick(void *opaque)
{
    chains->ticks++;
    timer_mod(chains->timer, qemu_clock_get_ms(QEMU_CLOCK_REALTIME) + 1);
}

static void test_bounded(int kind)
{
    AioContext *ctx = qemu_get_aio_context();
    Chains c = { 0 };
    bool shm = false;

    /* Where a request is done before io_submit() returns */
    if (access("/dev/shm", W_OK) == 0) {
        g_autofree char *path = g_strdup("/dev/shm/test-raw-aio-XXXXXX");
        int fd = g_mkstemp(path);
        int direct_fd = fd < 0 ? -1 : open(path, O_RDWR | O_DIRECT);

        shm = direct_fd >= 0;
        if (shm) {
            close(direct_fd);
        }
        if (fd >= 0) {
            close(fd);
            unlink(path);
        }
    }
    if (!file_open_in(&c.t, kind, shm ? "/dev/shm" : g_get_tmp_dir())) {
        return;
    }
    chains = &c;
    /* What a completion sends is submitted at once, and may be done at once. */
    c.t.f.aio_max_batch = 1;
    c.timer = aio_timer_new(ctx, QEMU_CLOCK_REALTIME, SCALE_MS, chains_tick,
                            NULL);
    for (int i = 0; i < CHAINS; i++) {
        req_init(&c.r[i], BLK, 1, false);
        c.r[i].hook = chains_hook;
        req_start(&c.r[i], &c.t, QEMU_AIO_READ, i * BLK, 0);
    }
    chains_tick(NULL);
    while (c.ticks < 50 || c.total < 10 * CHAINS) {
        c.in_turn = 0;
        aio_poll(ctx, true);
        /* One dispatch for each of: the notifier, its bottom half, the pool */
        g_assert_cmpint(c.in_turn, <=, 3 * CHAINS);
    }
    c.stop = true;
    for (int i = 0; i < CHAINS; i++) {
        req_wait(&c.r[i]);
        check(c.r[i].buf, i * BLK, BLK, 0);
    }
    timer_free(c.timer);
    file_close(&c.t);
    for (int i = 0; i < CHAINS; i++) {
        req_destroy(&c.r[i]);
    }
}

#if RAW_AIO_HAVE_RWF
/*
 * The inline tier.  What has RWF_NOWAIT is done as if it had not, see
 * hooks.real_nowait: so each miss is one that the test wants.
 */

/* What the event loop does itself: of one request, and in one turn */
#define INLINE_MAX_WRITE (64 * KiB)
#define INLINE_MAX_READ (1 * MiB)
#define INLINE_TURN (256 * KiB)
/* How many of BLK bytes that makes */
#define INLINE_BLKS (INLINE_TURN / BLK)

/* Both directions, and what they are made of */
static const struct Dir {
    int type;
    Call nowait;    /* inline */
    Call one;       /* in the pool: one element */
    Call vec;       /* and several */
    Call any;
    size_t max;     /* bytes inline, in one request */
} dirs[] = {
    { QEMU_AIO_READ, CALL_PREADV2, CALL_PREAD, CALL_PREADV, CALL_ANY_READ,
      INLINE_MAX_READ },
    { QEMU_AIO_WRITE, CALL_PWRITEV2, CALL_PWRITE, CALL_PWRITEV,
      CALL_ANY_WRITE, INLINE_MAX_WRITE },
};

/* Writes wait for a freeze to end, which may take the main loop. */
static bool may_inline(const struct Dir *dir)
{
    return dir->type == QEMU_AIO_READ ||
           qemu_get_current_aio_context() != qemu_get_aio_context();
}

static unsigned inline_calls(void)
{
    return calls(CALL_PREADV2) + calls(CALL_PWRITEV2);
}

/* A request with elements of these sizes */
static void req_init_parts(Req *r, const size_t *parts, int n)
{
    size_t len = 0;

    for (int i = 0; i < n; i++) {
        len += parts[i];
    }
    *r = (Req) { .mem = qemu_memalign(BLK, len + BLK) };
    r->buf = r->mem + 1;
    memset(r->buf, 0xaa, len);
    qemu_iovec_init(&r->qiov, n);
    len = 0;
    for (int i = 0; i < n; i++) {
        qemu_iovec_add(&r->qiov, r->buf + len, parts[i]);
        len += parts[i];
    }
}

/* Nothing is known about the file; whatever the loop may do, it may do now. */
static void inline_renew(TestFile *t)
{
    settle();
    raw_aio_set_fd(&t->f, reopen(t, t->kind));
    hooks_reset();
}

static void test_inline_hit(int kind)
{
    TestFile t;
    int seed = 0;

    if (!file_open(&t, kind)) {
        return;
    }
    for (int i = 0; i < 16; i++) {
        const struct Dir *dir = &dirs[!(i & 1)];
        int niov = i & 2 ? 4 : 1;
        size_t len = i & 8 ? INLINE_MAX_WRITE : 1000;

        if (!may_inline(dir)) {
            continue;
        }
        settle();
        hooks_reset();
        t.coroutine = i & 4;
        seed = dir->type == QEMU_AIO_WRITE ? i : seed;
        g_assert_cmpint(file_rw(&t, dir->type, 100, len, niov, 0, seed), ==,
                        0);
        check_file(&t, 0, 100, 0);
        check_file(&t, 100, len, seed);
        g_assert_cmpuint(calls(dir->nowait), ==, 1);
        g_assert_cmpint(hooks.nr_log, ==, 1);
        g_assert_cmpint(hooks.log[0].flags, ==, RAW_AIO_RWF_NOWAIT);
        g_assert_cmpint(hooks.log[0].offset, ==, 100);
        ASSERT_INLINE(&t, 1, 0, 0, 0);
    }
    check_file(&t, 100 + INLINE_MAX_WRITE, FILE_SIZE - 100 - INLINE_MAX_WRITE,
               0);

    /* A coroutine does not yield; a callback comes from the event loop. */
    for (int i = 0; i < 2; i++) {
        Req r;

        t.coroutine = i;
        req_init(&r, BLK, 1, true);
        req_start(&r, &t, QEMU_AIO_READ, 0, 0);
        g_assert_cmpint(r.done, ==, i);
        ASSERT_INLINE(&t, 1, 0, 0, 0);
        g_assert_cmpint(req_wait(&r), ==, 0);
        settle();
        g_assert_cmpint(r.done, ==, 1);
        ASSERT_INLINE(&t, 0, 0, 0, 0);
        req_destroy(&r);
    }
    file_close(&t);
}

/* What this kernel says about the first block of this file */
static int inline_probe(TestFile *t, const struct Dir *dir)
{
    g_autofree uint8_t *buf = g_malloc(BLK);
    struct iovec iov = { buf, BLK };
    ssize_t len;

    fill(buf, 0, BLK, 0);
    len = real_transfer(dir->nowait, file_fd(t), &iov, 1, 0,
                        RAW_AIO_RWF_NOWAIT);
    return len < 0 ? -errno : len == BLK ? 0 : -EAGAIN;
}

/* As in real life: the kernel may refuse at any time. */
static void test_inline_real(int unused)
{
    uint64_t served[2] = { 0 };
    int able[2];
    TestFile t;

    if (!file_open(&t, INLINE_REAL)) {
        return;
    }
    for (int i = 0; i < 2; i++) {
        able[i] = inline_probe(&t, &dirs[i]);
    }
    for (int i = 0; i < 4 * FILE_BLKS; i++) {
        const struct Dir *dir = &dirs[!(i & 1)];
        Stats s;

        hooks_reset();
        t.coroutine = i & 2;
        g_assert_cmpint(file_rw(&t, dir->type, i / 4 * BLK, BLK,
                                i & 4 ? 4 : 1, 0, i | 1), ==, 0);
        check_file(&t, i / 4 * BLK, BLK, i | 1);
        s = file_stats(&t);
        g_assert_cmpuint(s.in + s.pool, ==, 1);
        g_assert_cmpuint(s.in + s.in_refused, ==, calls(dir->nowait));
        g_assert_cmpuint(s.pool, <=, calls(dir->one) + calls(dir->vec));
        if (s.in) {
            g_assert_cmpint(hooks.nr_log, ==, 1);
        }
        if (!may_inline(dir)) {
            g_assert_cmpuint(calls(dir->nowait), ==, 0);
        }
        served[!(i & 1)] += s.in;
    }
    g_test_message("probe: %d, %d; served inline: %" PRIu64 " reads, %" PRIu64
                   " writes", able[0], able[1], served[0], served[1]);
    for (int i = 0; i < 2; i++) {
        if (!able[i] && may_inline(&dirs[i])) {
            g_assert_cmpuint(served[i], >, 0);
        }
    }
    if (able[0]) {
        g_autofree char *msg = g_strdup_printf("no RWF_NOWAIT in %s: %s",
                                               g_get_tmp_dir(),
                                               strerror(-able[0]));
        g_test_skip(msg);
    }
    file_close(&t);
}

/* Whatever it is: the pool does it without the flag, and that is the answer. */
static void test_inline_errors(int unused)
{
    static const int errors[] = {
        EAGAIN, EINVAL, EOPNOTSUPP, ENOSYS, EIO, EINTR, ENOMEM, EFAULT, ENOSPC
    };
    const size_t len = 4000;
    TestFile t;

    if (!file_open(&t, INLINE)) {
        return;
    }
    for (int i = 0; i < 8 * ARRAY_SIZE(errors); i++) {
        const struct Dir *dir = &dirs[i & 1], *other = &dirs[!(i & 1)];
        int niov = i & 2 ? 4 : 1;
        Call pool = niov == 1 ? dir->one : dir->vec;
        int err = errors[i / 8];
        bool learns = err == EINVAL || err == EOPNOTSUPP || err == ENOSYS ||
                      err == EIO;
        int seed = i & 1 ? i : 0;

        if (!may_inline(dir)) {
            continue;
        }
        t.coroutine = i & 4;
        inline_renew(&t);
        fault(dir->nowait, ALWAYS, -err);

        /* The pool can't do it either: that says nothing about the flag. */
        fault(pool, 1, -EDQUOT);
        g_assert_cmpint(file_rw(&t, dir->type, 100, len, niov, 0, seed), ==,
                        -EDQUOT);
        check_file(&t, 0, 2 * BLK, 0);
        g_assert_cmpuint(calls(dir->nowait), ==, 1);
        g_assert_cmpuint(calls(pool), ==, 1);
        ASSERT_INLINE(&t, 0, 1, 1, 0);

        /* So the flag is tried again, and now the pool can do it. */
        g_assert_cmpint(file_rw(&t, dir->type, 100, len, niov, 0, seed), ==,
                        0);
        check_file(&t, 100, len, seed);
        g_assert_cmpuint(calls(dir->nowait), ==, 2);
        g_assert_cmpuint(calls(pool), ==, 2);
        g_assert_cmpint(hooks.nr_log, ==, 4);
        for (int j = 0; j < 4; j++) {
            g_assert_cmpint(hooks.log[j].call, ==, j & 1 ? pool : dir->nowait);
            g_assert_cmpint(hooks.log[j].flags, ==,
                            j & 1 ? 0 : RAW_AIO_RWF_NOWAIT);
            g_assert_cmpint(hooks.log[j].offset, ==, 100);
        }
        ASSERT_INLINE(&t, 0, 1, 1, 0);

        g_assert_cmpint(file_rw(&t, dir->type, 100, len, niov, 0, 0), ==, 0);
        check_file(&t, 0, 2 * BLK, 0);
        g_assert_cmpuint(calls(dir->nowait), ==, learns ? 2 : 3);
        g_assert_cmpuint(calls(pool), ==, 3);
        ASSERT_INLINE(&t, 0, !learns, 1, 0);

        /* The other direction has it still. */
        g_assert_cmpint(file_rw(&t, other->type, 100, len, niov, 0, 0), ==, 0);
        g_assert_cmpuint(calls(other->nowait), ==, may_inline(other));
        g_assert_cmpuint(calls(other->any), ==, 1);
        ASSERT_INLINE(&t, may_inline(other), 0, !may_inline(other), 0);

        /* It is forgotten with the descriptor. */
        inline_renew(&t);
        g_assert_cmpint(file_rw(&t, dir->type, 100, len, niov, 0, 0), ==, 0);
        g_assert_cmpuint(calls(dir->nowait), ==, 1);
        ASSERT_INLINE(&t, 1, 0, 0, 0);
    }
    file_close(&t);
}

/* The rest is the pool's. */
static void test_inline_short(int unused)
{
    static const size_t parts[] = { 1, 513, 0, 2047, 5000, 0, 631 };
    static const size_t cuts[] = { 0, 1, 511, 514, 515, 4096, 7562, 8191 };
    const size_t len = 8192;
    const int64_t offset = 100;
    TestFile t;

    if (!file_open(&t, INLINE)) {
        return;
    }
    for (int i = 0; i < 16 * ARRAY_SIZE(cuts); i++) {
        const struct Dir *dir = &dirs[i & 1];
        size_t cut = cuts[i / 16];
        bool twice = (i & 2) && len - cut > 1;
        int seed = i & 1 ? i : 0;
        Req r;

        if (!may_inline(dir)) {
            continue;
        }
        t.coroutine = i & 4;
        inline_renew(&t);
        if (i & 8) {
            req_init_parts(&r, parts, ARRAY_SIZE(parts));
        } else {
            req_init_parts(&r, &len, 1);
        }
        g_assert_cmpuint(r.qiov.size, ==, len);

        fault(dir->nowait, 1, cut);
        if (twice) {
            fault(dir->any, 1, 1);
        }
        g_assert_cmpint(req_rw(&r, &t, dir->type, offset, 0, seed), ==, 0);
        check_file(&t, 0, offset, 0);
        check_file(&t, offset, len, seed);
        check_file(&t, offset + len, BLK, 0);

        g_assert_cmpint(hooks.nr_log, ==, twice ? 3 : 2);
        g_assert_cmpint(hooks.log[0].call, ==, dir->nowait);
        g_assert_cmpint(hooks.log[0].offset, ==, offset);
        for (int j = 1; j < hooks.nr_log; j++) {
            g_assert_cmpint(hooks.log[j].flags, ==, 0);
            g_assert_cmpint(hooks.log[j].offset, ==, offset + cut + j - 1);
        }
        ASSERT_INLINE(&t, 0, 1, 1, 1 + twice);

        /* Nothing was learnt from that. */
        hooks_reset();
        g_assert_cmpint(file_rw(&t, dir->type, offset, len, 1, 0, seed), ==,
                        0);
        ASSERT_INLINE(&t, 1, 0, 0, 0);
        g_assert_cmpint(file_write(&t, offset, len, 1, 0, 0), ==, 0);
        file_stats(&t);
    }

    /* No room for the rest: the error comes once, and the next is new. */
    for (int i = 0; i < 8 && may_inline(&dirs[1]); i++) {
        t.coroutine = i & 1;
        inline_renew(&t);
        fault(CALL_PWRITEV2, 1, i & 2 ? 1000 : 0);
        fault(CALL_ANY_WRITE, 1, i & 4 ? -ENOSPC : 0);
        g_assert_cmpint(file_write(&t, 0, BLK, 1, 0, 1), ==, -ENOSPC);
        check_file(&t, 0, 1000, i & 2 ? 1 : 0);
        check_file(&t, 1000, BLK, 0);
        g_assert_cmpuint(calls(CALL_PWRITE), ==, 1);
        ASSERT_INLINE(&t, 0, 1, 1, 1);
        g_assert_cmpint(file_write(&t, 0, BLK, 1, 0, 0), ==, 0);
        ASSERT_INLINE(&t, 1, 0, 0, 0);
        check_file(&t, 0, BLK, 0);
    }
    file_close(&t);
}

/* At the end of the file the pool has the word as well. */
static void test_inline_eof(int unused)
{
    static const size_t parts[] = { 1, 0, 4095, 5000, 7 };
    const int64_t size = 3 * BLK + 1000;
    const int64_t offsets[] = { 2 * BLK, size - 1, size, size + 1, 40 * BLK };
    const size_t len = 9103;
    TestFile t;

    if (!file_open(&t, INLINE)) {
        return;
    }
    file_fill(&t, size);
    for (int i = 0; i < 20; i++) {
        int64_t offset = offsets[i / 4];
        size_t in_file = MAX(size - offset, 0);
        Req r;

        t.coroutine = i & 1;
        inline_renew(&t);
        if (i & 2) {
            req_init_parts(&r, parts, ARRAY_SIZE(parts));
        } else {
            req_init_parts(&r, &len, 1);
        }
        req_start(&r, &t, QEMU_AIO_READ, offset, 0);
        g_assert_cmpint(req_wait(&r), ==, 0);
        check(r.buf, offset, in_file, 0);
        g_assert(buffer_is_zero(r.buf + in_file, len - in_file));
        g_assert_cmpint(hooks.nr_log, ==, 2);
        g_assert_cmpint(hooks.log[1].offset, ==, offset + in_file);
        ASSERT_INLINE(&t, 0, 1, 1, 1);
        req_destroy(&r);
    }

    /* Up to the end it is a hit, and a write may move the end. */
    inline_renew(&t);
    g_assert_cmpint(file_read(&t, size - 1000, 1000, 1, 0), ==, 0);
    g_assert_cmpint(file_write(&t, size - 10, 1000, 1, 0, 0), ==, 0);
    g_assert_cmpint(file_read(&t, size - 1000, 1990, 1, 0), ==, 0);
    ASSERT_INLINE(&t, 2 + may_inline(&dirs[1]), 0, !may_inline(&dirs[1]), 0);
    file_close(&t);
}

/* A request that is not for the event loop, whatever the page cache holds */
static void inline_never(TestFile *t, int type, size_t len, int niov,
                         BdrvRequestFlags flags)
{
    for (int i = 0; i < 2; i++) {
        t->coroutine = i;
        settle();
        hooks_reset();
        fault(CALL_FDATASYNC, ALWAYS, 0);
        if (type & QEMU_AIO_FLUSH) {
            g_assert_cmpint(file_flush(t), ==, 0);
        } else {
            g_assert_cmpint(file_rw(t, type, 0, len, niov, flags, 0), ==, 0);
        }
        g_assert_cmpuint(inline_calls(), ==, 0);
        ASSERT_INLINE(t, 0, 0, 1, 0);
    }
}

static void test_inline_never(int unused)
{
    static const unsigned bits[] = {
        RAW_AIO_DISABLE_INLINE, RAW_AIO_DISABLE_NOWAIT, RAW_AIO_DISABLE_PREADV
    };
    TestFile t;
    int fd;

    if (!file_open(&t, INLINE)) {
        return;
    }
    file_fill(&t, 2 * INLINE_MAX_READ);
    inline_never(&t, QEMU_AIO_FLUSH, 0, 0, 0);
    inline_never(&t, QEMU_AIO_WRITE, BLK, 1, BDRV_REQ_FUA);
    inline_never(&t, QEMU_AIO_WRITE, BLK, 4, BDRV_REQ_FUA);
    inline_never(&t, QEMU_AIO_ZONE_APPEND | RAW_AIO_ZONED, BLK, 4, 0);
    for (int i = 0; i < 2; i++) {
        int type = dirs[i].type;
        size_t max = dirs[i].max;

        inline_never(&t, type, max + 1, 1, 0);
        inline_never(&t, type, max + 1, 4, 0);
        inline_never(&t, type, 2 * max, 4, 0);
        inline_never(&t, type | RAW_AIO_ZONED, BLK, 4, 0);
        inline_never(&t, type | QEMU_AIO_MISALIGNED, BLK, 1, 0);
        for (int j = 0; j < ARRAY_SIZE(bits); j++) {
            disable(&t, bits[j]);
            inline_never(&t, type, BLK, 1, 0);
        }

        /* These don't matter. */
        disable(&t, RAW_AIO_DISABLE_NATIVE);
        g_assert_cmpint(file_rw(&t, type, 0, BLK, 1, 0, 0), ==, 0);
        disable(&t, 0);
        ASSERT_INLINE(&t, may_inline(&dirs[i]), 0, !may_inline(&dirs[i]), 0);
        if (!may_inline(&dirs[i])) {
            inline_never(&t, type, 1, 1, 0);
            inline_never(&t, type, BLK, 4, 0);
        }
    }
    g_assert_cmpint(file_rw(&t, QEMU_AIO_READ, 0, BLK, 1, BDRV_REQ_FUA, 0), ==,
                    0);
    ASSERT_INLINE(&t, 1, 0, 0, 0);

    /* Nothing to transfer: no call at all */
    for (int i = 0; i < 8; i++) {
        static const size_t empty[] = { 0, 0 };
        Req r;

        t.coroutine = i & 1;
        hooks_reset();
        req_init_parts(&r, empty, i / 4 * 2);
        g_assert_cmpint(req_rw(&r, &t, dirs[i / 2 & 1].type, BLK, 0, 0), ==,
                        0);
        g_assert_cmpint(hooks.nr_log, ==, 0);
        ASSERT_INLINE(&t, 0, 0, 1, 0);
    }

    /* O_DIRECT, and back */
    fd = reopen(&t, DIRECT);
    if (fd >= 0) {
        raw_aio_set_fd(&t.f, fd);
        inline_never(&t, QEMU_AIO_READ, BLK, 1, 0);
        inline_never(&t, QEMU_AIO_WRITE, BLK, 1, 0);
        inline_never(&t, QEMU_AIO_READ | QEMU_AIO_MISALIGNED, BLK, 1, 0);
        raw_aio_set_fd(&t.f, reopen(&t, INLINE));
    }
    hooks_reset();
    g_assert_cmpint(file_read(&t, 0, BLK, 1, 0), ==, 0);
    ASSERT_INLINE(&t, 1, 0, 0, 0);
    file_close(&t);

    if (fd >= 0 && native_available() && file_open(&t, NOWAIT)) {
        t.f.disabled = 0;
        hooks_reset();
        g_assert_cmpint(file_read(&t, 0, BLK, 1, 0), ==, 0);
        g_assert_cmpint(file_write(&t, 0, BLK, 1, 0, 0), ==, 0);
        g_assert_cmpuint(inline_calls(), ==, 0);
        file_stats(&t);
        file_close(&t);
    }
}

/* So much in one turn of the event loop; of several files together */
static void inline_budget_in(void *opaque)
{
    static const struct {
        size_t len;
        int fit[2];     /* reads, writes */
    } sizes[] = {
        { INLINE_MAX_WRITE, { 32, 4 } },
        { 10 * BLK, { INLINE_TURN / (10 * BLK / 8), INLINE_BLKS / 10 } },
        { 5000, { INLINE_BLKS, INLINE_TURN / 5000 } },
        { BLK, { INLINE_BLKS, INLINE_BLKS } },
        { 1, { INLINE_BLKS, INLINE_BLKS } },    /* not for nothing */
    };
    TestFile *t = opaque;

    for (int i = 0; i < 4 * ARRAY_SIZE(sizes); i++) {
        const struct Dir *dir = &dirs[i & 1];
        size_t len = sizes[i / 4].len;
        int fit = sizes[i / 4].fit[i & 1], nr = fit + 5;
        g_autofree Req *r = g_new(Req, nr);
        unsigned served[2] = { 0 };

        hooks_reset();
        for (int j = 0; j < nr; j++) {
            TestFile *file = &t[j & 1];

            file->coroutine = i & 2;
            req_init(&r[j], len, 1, false);
            if (i & 1) {
                fill(r[j].buf, j * 50, len, 0);
            }
            req_start(&r[j], file, dir->type, j * 50, 0);
            g_assert_cmpuint(calls(dir->nowait), ==, MIN(j + 1, fit));
            g_assert_cmpint(r[j].done, ==, file->coroutine && j < fit);
            served[j & 1] += j < fit;
        }
        for (int j = 0; j < nr; j++) {
            g_assert_cmpint(req_wait(&r[j]), ==, 0);
            check(r[j].buf, j * 50, len, 0);
            req_destroy(&r[j]);
        }
        g_assert_cmpuint(calls(dir->nowait), ==, fit);
        for (int j = 0; j < 2; j++) {
            ASSERT_INLINE(&t[j], served[j], 0, (nr + !j) / 2 - served[j], 0);
        }
        /* The next turn, and all is as before. */
        settle();
    }
}

static void test_inline_budget(int unused)
{
    TestFile t[2];

    for (int i = 0; i < 2; i++) {
        if (!file_open(&t[i], INLINE)) {
            return;
        }
    }
    /* Each AioContext has its own. */
    for (int i = 0; i < 2; i++) {
        IOThread *iothread = iothread_new();

        run_in(iothread, inline_budget_in, t);
        iothread_join(iothread);
    }
    for (int i = 0; i < 2; i++) {
        check_file(&t[i], 0, FILE_SIZE, 0);
        file_close(&t[i]);
    }
}

/*
 * Large reads: the event loop does as much in one turn as it does of small
 * ones, by the time that it takes.
 */
static void test_inline_large(int coroutine)
{
    static const struct {
        size_t len;
        int fit;
    } sizes[] = {
        { INLINE_MAX_READ, 2 },
        { INLINE_MAX_READ / 2 + BLK, 3 },
        { INLINE_MAX_READ / 4, 8 },
        { INLINE_MAX_READ / 8 - 1, 16 },
    };
    const int64_t offset = 100;
    TestFile t;

    if (!file_open(&t, INLINE)) {
        return;
    }
    file_fill(&t, INLINE_MAX_READ + 2 * offset);
    t.coroutine = coroutine;
    for (int i = 0; i < 2 * ARRAY_SIZE(sizes); i++) {
        int fit = sizes[i / 2].fit, nr = fit + 2;
        g_autofree Req *r = g_new(Req, nr);

        /* It needs half of a turn, so the next one begins anew. */
        g_assert_cmpint(file_read(&t, offset, INLINE_MAX_READ, 1, 0), ==, 0);
        settle();
        file_stats(&t);
        hooks_reset();
        for (int j = 0; j < nr; j++) {
            req_init(&r[j], sizes[i / 2].len, i & 1 ? 4 : 1, false);
            req_start(&r[j], &t, QEMU_AIO_READ, offset, 0);
            g_assert_cmpuint(calls(CALL_PREADV2), ==, MIN(j + 1, fit));
        }
        for (int j = 0; j < nr; j++) {
            g_assert_cmpint(req_wait(&r[j]), ==, 0);
            check(r[j].buf, offset, sizes[i / 2].len, 0);
            req_destroy(&r[j]);
        }
        ASSERT_INLINE(&t, fit, 0, nr - fit, 0);
    }

    /* What the page cache does not have of it is the pool's. */
    settle();
    hooks_reset();
    fault(CALL_PREADV2, 1, 3 * BLK);
    g_assert_cmpint(file_read(&t, offset, INLINE_MAX_READ, 1, 0), ==, 0);
    g_assert_cmpint(hooks.log[1].offset, ==, offset + 3 * BLK);
    ASSERT_INLINE(&t, 0, 1, 1, 1);

    /* What small ones leave of a turn is always enough. */
    for (int i = 0; i < 2 * INLINE_BLKS; i++) {
        settle();
        file_stats(&t);
        g_assert_cmpint(file_read(&t, 0, 1, 1, 0), ==, 0);
        settle();
        g_assert_cmpint(file_read(&t, offset, INLINE_MAX_READ, 1, 0), ==, 0);
        ASSERT_INLINE(&t, 2, 0, 0, 0);
    }
    file_close(&t);
}

/* In the callback form, what was served inline completes in order. */

#define ORDER_REQUESTS 8

static int order_done;

static void order_cb(void *opaque, int ret)
{
    g_assert_cmpint(ret, ==, 0);
    g_assert_cmpint(order_done, ==, GPOINTER_TO_INT(opaque));
    order_done++;
    if (GPOINTER_TO_INT(opaque) == 1) {
        /* A nested loop gets the next ones. */
        while (order_done < ORDER_REQUESTS / 2) {
            aio_poll(qemu_get_aio_context(), true);
        }
    }
}

static void test_inline_order(int unused)
{
    g_autofree uint8_t *buf = g_malloc(BLK);
    QEMUIOVector qiov;
    TestFile t;

    if (!file_open(&t, INLINE)) {
        return;
    }
    qemu_iovec_init_buf(&qiov, buf, BLK);
    order_done = 0;
    for (int i = 0; i < ORDER_REQUESTS; i++) {
        raw_aio_submit(&t.f, QEMU_AIO_READ, i * BLK, &qiov, 0, order_cb,
                       GINT_TO_POINTER(i));
    }
    g_assert_cmpint(order_done, ==, 0);
    g_assert_cmpuint(file_stats(&t).in, ==, ORDER_REQUESTS);
    while (order_done < ORDER_REQUESTS) {
        aio_poll(qemu_get_aio_context(), true);
    }
    file_close(&t);
}

/*
 * Chains of hits, each sent when the one before has completed: the event loop
 * gets its turns.
 */

typedef enum Chain {
    CHAIN_CALLBACK,     /* several, in the callback form */
    CHAIN_LOOP,         /* in one coroutine */
    CHAIN_CREATE,       /* each in a coroutine that the one before creates */
    CHAIN_TOKEN,        /* in coroutines that wake each other, see below */
} Chain;

/* Added to the above: the main loop as in QEMU, instead of aio_poll() */
#define CHAIN_MAIN_LOOP 0x100

#define TURNS_REQUESTS 5000
/*
 * Between two runs of a bottom half the one that counts the turns can run
 * twice, once after the first of them and once before the second.
 */
#define TURNS_MAX (3 * INLINE_BLKS)
#define TURNS_TOKEN 4

typedef struct Turns {
    TestFile t;
    QEMUIOVector qiov;
    QEMUBH *bh;
    QEMUTimer *timer;
    uint64_t at_bh;     /* how many were served inline when it ran */
    uint64_t at_timer;
    int to_send;
    int done;
    int depth;          /* of coroutines */
    Coroutine *token[TURNS_TOKEN];
    int running;
} Turns;

static Turns *turns;

static uint64_t turns_served(void)
{
    return stat64_get(&turns->t.f.stats[RAW_AIO_INLINE_SERVED]);
}

static void turns_bh(void *opaque)
{
    turns->at_bh = turns_served();
    qemu_bh_schedule(turns->bh);
}

static void turns_timer(void *opaque)
{
    turns->at_timer = turns_served();
    timer_mod(turns->timer, qemu_clock_get_ns(QEMU_CLOCK_REALTIME) + 1);
}

static void turns_done(int ret)
{
    g_assert_cmpint(ret, ==, 0);
    g_assert_cmpint(in_engine, ==, 0);
    turns->done++;
    g_assert_cmpuint(turns_served() - turns->at_bh, <=, TURNS_MAX);
    g_assert_cmpuint(turns_served() - turns->at_timer, <=, TURNS_MAX);
}

static int64_t turns_offset(void)
{
    return --turns->to_send % FILE_BLKS * BLK;
}

static void turns_submit(void);

static void turns_cb(void *opaque, int ret)
{
    turns_done(ret);
    if (turns->to_send) {
        turns_submit();
    }
}

static void turns_submit(void)
{
    in_engine++;
    raw_aio_submit(&turns->t.f, QEMU_AIO_READ, turns_offset(), &turns->qiov, 0,
                   turns_cb, NULL);
    in_engine--;
}

static void coroutine_fn turns_co_read(void)
{
    turns_done(raw_aio_co_rw(&turns->t.f, QEMU_AIO_READ, turns_offset(),
                             &turns->qiov, 0));
}

static void coroutine_fn turns_loop_entry(void *opaque)
{
    while (turns->to_send) {
        turns_co_read();
    }
}

static void coroutine_fn turns_create_entry(void *opaque)
{
    turns_co_read();
    if (turns->to_send) {
        /* Returns when the other has to wait. */
        turns->depth++;
        g_assert_cmpint(turns->depth, <=, INLINE_BLKS + 1);
        qemu_coroutine_enter(qemu_coroutine_create(turns_create_entry, NULL));
        turns->depth--;
    }
}

/*
 * One that is woken by a coroutine runs when that yields, which need not return
 * to the event loop: qemu_aio_coroutine_enter() goes on with those that were
 * woken as long as there are any.
 */
static void coroutine_fn turns_token_entry(void *opaque)
{
    int i = turns->running++;

    turns->token[i] = qemu_coroutine_self();
    do {
        qemu_coroutine_yield();
        if (turns->to_send) {
            turns_co_read();
        } else {
            turns->token[i] = NULL;
            turns->running--;
        }
        if (turns->running) {
            aio_co_wake(turns->token[(i + 1) % TURNS_TOKEN]);
        }
    } while (turns->token[i]);
}

static void test_inline_turns(int arg)
{
    AioContext *ctx = qemu_get_aio_context();
    g_autofree uint8_t *buf = g_malloc(BLK);
    Turns n = { .to_send = TURNS_REQUESTS };
    Stats s;

    if (!file_open(&n.t, INLINE)) {
        return;
    }
    turns = &n;
    qemu_iovec_init_buf(&n.qiov, buf, BLK);
    n.bh = aio_bh_new(ctx, turns_bh, NULL);
    turns_bh(NULL);
    n.timer = aio_timer_new(ctx, QEMU_CLOCK_REALTIME, SCALE_NS, turns_timer,
                            NULL);
    turns_timer(NULL);

    switch (arg & ~CHAIN_MAIN_LOOP) {
    case CHAIN_CALLBACK:
        for (int i = 0; i < CHAINS; i++) {
            turns_submit();
        }
        break;
    case CHAIN_LOOP:
        qemu_coroutine_enter(qemu_coroutine_create(turns_loop_entry, NULL));
        break;
    case CHAIN_CREATE:
        qemu_coroutine_enter(qemu_coroutine_create(turns_create_entry, NULL));
        break;
    case CHAIN_TOKEN:
        for (int i = 0; i < TURNS_TOKEN; i++) {
            qemu_coroutine_enter(qemu_coroutine_create(turns_token_entry,
                                                       NULL));
        }
        aio_co_wake(n.token[0]);
        break;
    }
    while (n.done < TURNS_REQUESTS || n.running) {
        if (arg & CHAIN_MAIN_LOOP) {
            main_loop_wait(false);
        } else {
            aio_poll(ctx, true);
        }
    }
    g_assert_cmpint(n.depth, ==, 0);
    g_assert_cmpint(n.done, ==, TURNS_REQUESTS);

    /* After each turn it goes on inline. */
    s = file_stats(&n.t);
    g_assert_cmpuint(s.in + s.pool, ==, TURNS_REQUESTS);
    g_assert_cmpuint(s.in_refused, ==, 0);
    g_assert_cmpuint(s.pool, <=, TURNS_REQUESTS / 16);
    qemu_bh_delete(n.bh);
    timer_free(n.timer);
    file_close(&n.t);
}

/*
 * Which of the requests that are sent one after another are tried if all of
 * these fail: the first is 1
 */
static const int hint_tries[] = {
    1, 2, 3, 4, 5, 7, 10, 15, 24, 41, 74, 139, 204, 269, 334
};

/* How many of the first @n */
static int hint_tries_of(int n)
{
    int tries = 0;

    while (tries < ARRAY_SIZE(hint_tries) && hint_tries[tries] <= n) {
        tries++;
    }
    return tries;
}

/*
 * A file that makes the event loop try in vain is asked less often.  What is
 * not in the page cache is that for writes, but reads of it have begun.
 */
static void test_inline_adapt(int dir_index)
{
    const struct Dir *dir = &dirs[dir_index], *other = &dirs[!dir_index];
    bool has_other = may_inline(other);
    int err = dir_index ? -EAGAIN : -ENOMEM;
    TestFile t;

    if (!may_inline(dir)) {
        return;
    }
    if (!file_open(&t, INLINE)) {
        return;
    }

    /* Half of them are in vain, or two of three: always */
    for (int misses = 1; misses <= 2; misses++) {
        inline_renew(&t);
        for (int i = 0; i < 60; i++) {
            hooks_reset();
            t.coroutine = i & 1;
            fault(dir->nowait, misses, err);
            for (int j = 0; j <= misses; j++) {
                g_assert_cmpint(file_rw(&t, dir->type, j * BLK, BLK, 1, 0, 0),
                                ==, 0);
            }
            ASSERT_INLINE(&t, 1, misses, misses, 0);
        }
    }

    for (int round = 0; round < 2; round++) {
        t.coroutine = round;

        inline_renew(&t);
        fault(dir->nowait, ALWAYS, err);
        for (int i = 1; i <= 270; i++) {
            g_assert_cmpint(file_rw(&t, dir->type, 0, BLK, 1, 0, 0), ==, 0);
            g_assert_cmpuint(calls(dir->nowait), ==, hint_tries_of(i));
        }
        ASSERT_INLINE(&t, 0, hint_tries_of(270), 270, 0);

        /* The other direction is another matter. */
        for (int i = 0; i < 10; i++) {
            g_assert_cmpint(file_rw(&t, other->type, 0, BLK, 1, 0, 0), ==, 0);
            settle();
        }
        ASSERT_INLINE(&t, has_other ? 10 : 0, 0, has_other ? 0 : 10, 0);

        /* It warms up, which is found at the next attempt, the 334th. */
        hooks_reset();
        for (int i = 271; i <= 334; i++) {
            g_assert_cmpuint(calls(dir->nowait), ==, 0);
            g_assert_cmpint(file_rw(&t, dir->type, 0, BLK, 1, 0, 0), ==, 0);
        }
        ASSERT_INLINE(&t, 1, 0, 63, 0);
        for (int i = 0; i < 100; i++) {
            g_assert_cmpint(file_rw(&t, dir->type, 0, BLK, 1, 0, 0), ==, 0);
            settle();
        }
        ASSERT_INLINE(&t, 100, 0, 0, 0);

        /* Now it is as new. */
        hooks_reset();
        fault(dir->nowait, 4, err);
        for (int i = 0; i < 5; i++) {
            g_assert_cmpint(file_rw(&t, dir->type, 0, BLK, 1, 0, 0), ==, 0);
        }
        ASSERT_INLINE(&t, 1, 4, 4, 0);
    }

    /* Another descriptor is asked at once. */
    hooks_reset();
    fault(dir->nowait, ALWAYS, err);
    for (int i = 0; i < 200; i++) {
        g_assert_cmpint(file_rw(&t, dir->type, 0, BLK, 1, 0, 0), ==, 0);
    }
    inline_renew(&t);
    file_stats(&t);
    g_assert_cmpint(file_rw(&t, dir->type, 0, BLK, 1, 0, 0), ==, 0);
    ASSERT_INLINE(&t, 1, 0, 0, 0);
    file_close(&t);
}

/* Let the pool have so many workers. */
static void grow_pool(TestFile *t, int n)
{
    g_autofree Req *r = g_new(Req, n);

    gate_close(1u << CALL_PREAD | 1u << CALL_PREADV, file_fd(t));
    for (int i = 0; i < n; i++) {
        req_init(&r[i], INLINE_MAX_READ + 1, 1, false);
        req_start(&r[i], t, QEMU_AIO_READ, 0, 0);
    }
    gate_wait(n);
    gate_open();
    for (int i = 0; i < n; i++) {
        g_assert_cmpint(req_wait(&r[i]), ==, 0);
        req_destroy(&r[i]);
    }
    file_stats(t);
    hooks_reset();
}

/* Until the workers have forgotten what they did */
static void wait_for_idle_pool(void)
{
    PAIOPoolInfo info;

    do {
        g_usleep(100);
        paio_pool_get_info(raw_aio_current_pool(), &info);
    } while (info.idle < info.threads);
}

/*
 * Reads that are not in the page cache: the event loop begins all of them, and
 * one worker collects them in order.  If that takes long there are more.
 */
#define BEGUN 6
#define BEGUN_WORKERS 3

static void begun_send(TestFile *t, Req *r)
{
    fault(CALL_PREADV2, BEGUN, -EAGAIN);
    gate_close(1u << CALL_PREAD, file_fd(t));
    defer_call_begin();
    for (int i = 0; i < BEGUN; i++) {
        req_init(&r[i], BLK, 1, false);
        req_start(&r[i], t, QEMU_AIO_READ, i * BLK, 0);
    }
    defer_call_end();
}

static void begun_end(TestFile *t, Req *r)
{
    gate_open();
    for (int i = 0; i < BEGUN; i++) {
        g_assert_cmpint(req_wait(&r[i]), ==, 0);
        check(r[i].buf, i * BLK, BLK, 0);
        req_destroy(&r[i]);
    }
    ASSERT_INLINE(t, 0, BEGUN, BEGUN, 0);
    hooks_reset();
}

static void test_inline_begun(int kind)
{
    int failed = 0;
    Req r[BEGUN];
    TestFile t;

    if (!file_open(&t, kind)) {
        return;
    }
    disable(&t, RAW_AIO_DISABLE_BATCH);
    grow_pool(&t, BEGUN_WORKERS);
    fault(CALL_PREADV2, ALWAYS, -EAGAIN);
    for (int i = 0; i < 300; i++) {
        g_assert_cmpint(file_read(&t, i % FILE_BLKS * BLK, BLK, 1, 0), ==, 0);
    }
    ASSERT_INLINE(&t, 0, 300, 300, 0);
    hooks_reset();
    wait_for_idle_pool();

    /* As long as the event loop does not look, they are one behind another. */
    begun_send(&t, r);
    while (!at_gate()) {
        g_usleep(100);
    }
    g_usleep(5000);
    g_assert_cmpint(at_gate(), ==, 1);
    g_assert_cmpint(hooks.log[BEGUN].offset, ==, 0);
    begun_end(&t, r);

    /* One that takes long does not hold up the others for ever. */
    begun_send(&t, r);
    gate_wait(BEGUN);
    begun_end(&t, r);

    /* An error is the request's own. */
    fault(CALL_PREAD, 1, -EIO);
    begun_send(&t, r);
    gate_open();
    for (int i = 0; i < BEGUN; i++) {
        int ret = req_wait(&r[i]);

        g_assert(ret == 0 || ret == -EIO);
        failed += ret == -EIO;
        req_destroy(&r[i]);
    }
    g_assert_cmpint(failed, ==, 1);
    hooks_reset();
    g_assert_cmpint(file_read(&t, 0, BLK, 1, 0), ==, 0);
    ASSERT_INLINE(&t, 1, BEGUN, BEGUN, 0);
    file_close(&t);
}

/* Before Linux 5.9 they do not begin: each may have to wait for all of it. */
static void test_inline_not_begun(int unused)
{
    Req r[BEGUN];
    TestFile t;

    if (g_test_subprocess()) {
        fake_release = "5.8.18-1-amd64";
        if (!file_open(&t, INLINE)) {
            return;
        }
        grow_pool(&t, BEGUN_WORKERS);
        begun_send(&t, r);
        while (at_gate() < BEGUN_WORKERS) {
            g_usleep(100);
        }
        gate_open();
        for (int i = 0; i < BEGUN; i++) {
            g_assert_cmpint(req_wait(&r[i]), ==, 0);
            req_destroy(&r[i]);
        }
        ASSERT_INLINE(&t, 0, 5, 6, 0);
        inline_renew(&t);
        fault(CALL_PREADV2, ALWAYS, -EAGAIN);
        for (int i = 1; i <= 270; i++) {
            g_assert_cmpint(file_read(&t, 0, BLK, 1, 0), ==, 0);
        }
        ASSERT_INLINE(&t, 0, hint_tries_of(270), 270, 0);
        file_close(&t);
        return;
    }
    g_test_trap_subprocess(NULL, 0, 0);
    g_test_trap_assert_passed();
}

#ifdef CONFIG_TRACE_LOG
/* Why a request was not even tried */
static void test_inline_trace(int refuse)
{
    TestFile t;

    if (g_test_subprocess()) {
        if (!file_open(&t, INLINE)) {
            return;
        }
        t.coroutine = true;
        module_call_init(MODULE_INIT_TRACE);
        trace_enable_events("raw_aio_inline_*");
        qemu_set_log(LOG_TRACE, &error_abort);
        if (refuse) {
            fault(CALL_PREADV2, 5, -ENOMEM);
            for (int i = 0; i < 6; i++) {
                g_assert_cmpint(file_read(&t, 0, BLK, 1, 0), ==, 0);
            }
            ASSERT_INLINE(&t, 0, 5, 6, 0);
        } else {
            for (int i = 0; i < INLINE_BLKS + 1; i++) {
                g_assert_cmpint(file_read(&t, 0, BLK, 1, 0), ==, 0);
            }
            ASSERT_INLINE(&t, INLINE_BLKS, 0, 1, 0);
        }
        qemu_set_log(0, &error_abort);
        file_close(&t);
        return;
    }
    g_test_trap_subprocess(NULL, 0, 0);
    g_test_trap_assert_passed();
    if (refuse) {
        g_test_trap_assert_stderr("*raw_aio_inline_refused*ret -12*"
                                  "raw_aio_inline_skip*mostly in vain*");
        g_test_trap_assert_stderr_unmatched("*enough for this turn*");
    } else {
        g_test_trap_assert_stderr("*raw_aio_inline_skip*enough for this "
                                  "turn*");
        g_test_trap_assert_stderr_unmatched("*mostly in vain*");
    }
    g_test_trap_assert_stderr_unmatched("*inline_skip*inline_skip*");
}
#endif

/* What was served inline can't be cancelled, but its callback is to come. */
static void test_inline_cancel(int unused)
{
    int seed = 0;
    TestFile t;
    Req r[3];

    if (!file_open(&t, INLINE)) {
        return;
    }
    for (int i = 0; i < 4; i++) {
        const struct Dir *dir = &dirs[i & 1];
        bool main_loop = qemu_get_current_aio_context() ==
                         qemu_get_aio_context();
        bool sync = (i & 2) && main_loop; /* AIO_WAIT_WHILE() wants that. */

        if (!may_inline(dir)) {
            continue;
        }
        inline_renew(&t);
        for (int j = 0; j < ARRAY_SIZE(r); j++) {
            req_init(&r[j], BLK, 1, false);
            if (i & 1) {
                fill(r[j].buf, j * BLK, BLK, i + 1);
            }
            req_start(&r[j], &t, dir->type, j * BLK, 0);
        }
        if (sync) {
            bdrv_aio_cancel(r[1].acb);
            g_assert(r[1].done);
            g_assert_cmpint(r[1].ret, ==, 0);
        } else {
            req_cancel(&r[1]);
            req_cancel(&r[1]);
            g_assert(!r[1].done);
        }
        for (int j = 0; j < ARRAY_SIZE(r); j++) {
            g_assert_cmpint(req_wait(&r[j]), ==, 0);
        }
        settle();
        for (int j = 0; j < ARRAY_SIZE(r); j++) {
            g_assert_cmpint(r[j].done, ==, 1);
            check(r[j].buf, j * BLK, BLK, i & 1 ? i + 1 : seed);
            req_destroy(&r[j]);
        }
        ASSERT_INLINE(&t, 3, 0, 0, 0);
        seed = i & 1 ? i + 1 : seed;
    }
    file_close(&t);
}

/*
 * With the pool: what was refused can be cancelled as long as it is queued,
 * the rest of what has begun can't.
 */
static void test_inline_cancel_rest(int queued)
{
    AioContext *ctx = qemu_get_current_aio_context();
    bool main_loop = ctx == qemu_get_aio_context();
    TestFile t;

    if (!file_open(&t, INLINE)) {
        return;
    }
    aio_context_set_thread_pool_params(ctx, 0, 1, &error_abort);
    for (int i = 0; i < 8; i++) {
        const struct Dir *dir = &dirs[i & 1];
        bool begun = i & 2;
        /* Else it would wait. */
        bool sync = (i & 4) && queued && !begun && main_loop;
        int ret = queued && !begun ? -ECANCELED : 0;
        int seed = i & 1 ? i : 0;
        Req blocker, r;

        if (!may_inline(dir)) {
            continue;
        }
        inline_renew(&t);
        gate_close((1u << CALL_PREAD) | (1u << CALL_PWRITE), -1);
        if (queued) {
            /* Nobody has time for the rest. */
            req_init(&blocker, BLK, 1, true);
            req_start(&blocker, &t, QEMU_AIO_READ | QEMU_AIO_MISALIGNED,
                      10 * BLK, 0);
            gate_wait(1);
        }
        req_init(&r, BLK, 1, false);
        if (i & 1) {
            fill(r.buf, 0, BLK, seed);
        }
        fault(dir->nowait, 1, begun ? 1000 : -EAGAIN);
        req_start(&r, &t, dir->type, 0, 0);
        if (queued) {
            PAIOPoolInfo info;

            do {
                settle();
                paio_pool_get_info(raw_aio_current_pool(), &info);
            } while (!info.queued);
        } else {
            gate_wait(1);
        }
        if (sync) {
            bdrv_aio_cancel(r.acb);
            g_assert(r.done);
        } else {
            req_cancel(&r);
            req_cancel(&r);
        }
        if (!ret) {
            settle();
            g_assert(!r.done);
            gate_open();
        }
        g_assert_cmpint(req_wait(&r), ==, ret);
        gate_open();
        if (queued) {
            g_assert_cmpint(req_wait(&blocker), ==, 0);
            check(blocker.buf, 10 * BLK, BLK, 0);
            req_destroy(&blocker);
        }
        settle();
        check_file(&t, 0, BLK, ret ? 0 : seed);
        if (!ret) {
            check(r.buf, 0, BLK, seed);
        }
        req_destroy(&r);
        ASSERT_INLINE(&t, 0, 1, queued + !ret, begun);
        g_assert_cmpint(file_write(&t, 0, BLK, 1, 0, 0), ==, 0);
        file_stats(&t);
    }
    aio_context_set_thread_pool_params(ctx, 0, 64, &error_abort);
    file_close(&t);
}

/* What is learnt goes to the descriptor that was asked, as the retry does. */
static void test_inline_descriptor(int unused)
{
    TestFile t;

    if (!file_open(&t, INLINE)) {
        return;
    }
    for (int i = 0; i < 2; i++) {
        const struct Dir *dir = &dirs[i];
        int old_fd, new_fd;
        Req r[2];

        if (!may_inline(dir)) {
            continue;
        }
        inline_renew(&t);
        old_fd = file_fd(&t);
        fault(dir->nowait, 1, -EOPNOTSUPP);
        gate_close(1u << dir->one, old_fd);
        for (int j = 0; j < 2; j++) {
            req_init(&r[j], BLK, 1, false);
            if (i == 1) {
                fill(r[j].buf, j * BLK, BLK, i);
            }
        }
        req_start(&r[0], &t, dir->type, 0, 0);
        gate_wait(1);
        /* One that has its data, and whose callback is still to come */
        req_start(&r[1], &t, dir->type, BLK, 0);

        new_fd = reopen(&t, INLINE);
        raw_aio_set_fd(&t.f, new_fd);
        g_assert_cmpint(fcntl(old_fd, F_GETFD), !=, -1);
        gate_open();
        for (int j = 0; j < 2; j++) {
            g_assert_cmpint(req_wait(&r[j]), ==, 0);
            check(r[j].buf, j * BLK, BLK, i);
            req_destroy(&r[j]);
        }
        check_file(&t, 0, 2 * BLK, i);
        g_assert_cmpint(fcntl(old_fd, F_GETFD), ==, -1);
        for (int j = 0; j < hooks.nr_log; j++) {
            g_assert_cmpint(hooks.log[j].fd, ==, old_fd);
        }
        ASSERT_INLINE(&t, 1, 1, 1, 0);

        hooks_reset();
        g_assert_cmpint(file_rw(&t, dir->type, 0, BLK, 1, 0, i), ==, 0);
        g_assert_cmpint(hooks.log[0].fd, ==, new_fd);
        ASSERT_INLINE(&t, 1, 0, 0, 0);
    }

    /* None for a while */
    for (int i = 0; i < 4; i++) {
        const struct Dir *dir = &dirs[i / 2];
        bool inl = may_inline(dir);
        int seed = inl && i < 2 && may_inline(&dirs[1]) ? 1 : 0;

        t.coroutine = i & 1;
        raw_aio_set_fd(&t.f, -1);
        g_assert_cmpint(file_rw(&t, dir->type, 0, BLK, 1, 0, 1), ==, -EBADF);
        ASSERT_INLINE(&t, 0, inl, 1, 0);
        raw_aio_set_fd(&t.f, reopen(&t, INLINE));
        g_assert_cmpint(file_rw(&t, dir->type, 0, BLK, 1, 0, seed), ==, 0);
        ASSERT_INLINE(&t, inl, 0, !inl, 0);
    }
    file_close(&t);
}

/* The callback of a hit waits for another request. */
static Req *inline_wait_for;

static void inline_wait_hook(Req *r)
{
    Req *next = inline_wait_for;

    inline_wait_for = NULL;
    if (!next->ctx) {
        req_start(next, r->t, QEMU_AIO_READ, BLK, 0);
    }
    g_assert_cmpint(req_wait(next), ==, 0);
}

static void inline_nested_in(void *opaque)
{
    TestFile *t = opaque;

    /* The other is sent before, after, or in the callback; and is a miss. */
    for (int i = 0; i < 12; i++) {
        int when = i % 3;
        bool cancel = i & 1;
        Req r[2];

        if (cancel && qemu_get_current_aio_context() !=
                      qemu_get_aio_context()) {
            continue; /* AIO_WAIT_WHILE() is for the main loop. */
        }
        settle();
        hooks_reset();
        for (int j = 0; j < 2; j++) {
            req_init(&r[j], BLK, 1, false);
        }
        r[0].hook = inline_wait_hook;
        inline_wait_for = &r[1];
        if (i >= 6) {
            fault(CALL_PREADV2, 1, when == 0 ? -EAGAIN : PASS);
            fault(CALL_PREADV2, 1, when == 0 ? PASS : -EAGAIN);
        }
        if (when == 0) {
            req_start(&r[1], t, QEMU_AIO_READ, BLK, 0);
        }
        req_start(&r[0], t, QEMU_AIO_READ, 0, 0);
        if (when == 1) {
            req_start(&r[1], t, QEMU_AIO_READ, BLK, 0);
        }
        if (cancel) {
            /* This waits in a loop, too. */
            bdrv_aio_cancel(r[0].acb);
            g_assert(r[0].done);
        }
        g_assert_cmpint(req_wait(&r[0]), ==, 0);
        g_assert_cmpint(r[1].done, ==, 1);
        for (int j = 0; j < 2; j++) {
            check(r[j].buf, j * BLK, BLK, 0);
            req_destroy(&r[j]);
        }
        g_assert(!inline_wait_for);
        ASSERT_INLINE(t, i < 6 ? 2 : 1, i >= 6, i >= 6, 0);
    }
}

static void test_inline_nested(int unused)
{
    IOThread *iothread;
    TestFile t;

    if (!file_open(&t, INLINE)) {
        return;
    }
    inline_nested_in(&t);
    iothread = iothread_new();
    run_in(iothread, inline_nested_in, &t);
    iothread_join(iothread);
    file_close(&t);
}
#endif /* RAW_AIO_HAVE_RWF */

#ifdef CONFIG_LINUX_AIO
#if RAW_AIO_HAVE_IOCB_FLAGS
/*
 * What the kernel refuses with EAGAIN is submitted again by a worker, without
 * RWF_NOWAIT.
 */

/* Nothing is known about the file. */
static void native_renew(TestFile *t)
{
    raw_aio_set_fd(&t->f, reopen(t, t->kind));
    hooks_reset();
    file_stats(t);
}

/* The kernel refuses to make it wait, and a worker is at the gate @call. */
static void begin_by_worker(Req *r, TestFile *t, int type, Call call)
{
    forge_iocb(-1, 1, 0, 1, -EAGAIN);
    gate_close(1u << call, -1);
    req_start(r, t, type, 0, 0);
    gate_wait(1);
}

/* Let that worker submit it; the kernel's answer is @res. */
static void forge_by_worker(long res)
{
    int before, now;

    pthread_mutex_lock(&hooks.lock);
    before = hooks.forged;
    pthread_mutex_unlock(&hooks.lock);
    forge_iocb(-1, 0, 0, 1, res);
    gate_open();
    do {
        g_usleep(50);
        pthread_mutex_lock(&hooks.lock);
        now = hooks.forged;
        pthread_mutex_unlock(&hooks.lock);
    } while (now == before);
}

static void by_worker_init(Req *r, int i, int seed)
{
    req_init(r, 4 * BLK, i & 2 ? 4 : 1, false);
    if (i & 1) {
        fill(r->buf, 0, 4 * BLK, seed);
    }
}

static void test_by_worker(int unused)
{
    static const int errors[] = {
        EIO, ENOSPC, ENODATA, EFAULT, EAGAIN, EINTR, EINVAL, EOPNOTSUPP, ENOSYS
    };
    TestFile t;

    if (!file_open(&t, NOWAIT)) {
        return;
    }
    for (int i = 0; i < 8 * ARRAY_SIZE(errors); i++) {
        int type = i & 1 ? QEMU_AIO_WRITE : QEMU_AIO_READ;
        int opcode = i & 1 ? (i & 2 ? IO_CMD_PWRITEV : IO_CMD_PWRITE)
                           : (i & 2 ? IO_CMD_PREADV : IO_CMD_PREAD);
        int err = errors[i / 8];
        bool learns = err == EINVAL || err == EOPNOTSUPP || err == ENOSYS;
        bool final = !learns && err != EINTR;
        int niov = i & 2 ? 4 : 1;
        Req r;

        /* Its answer is the answer, and nothing is learnt. */
        t.coroutine = i & 4;
        native_renew(&t);
        forge_iocb(-1, 1, 0, 1, -EAGAIN);
        g_assert_cmpint(file_rw(&t, type, 0, 4 * BLK, niov, 0, 0), ==, 0);
        check_file(&t, 0, 4 * BLK, 0);
        g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 1);
        g_assert_cmpuint(calls(CALL_WORKER_SUBMIT), ==, 1);
        g_assert_cmpuint(iocbs(opcode, 1), ==, 1);
        g_assert_cmpuint(iocbs(opcode, 0), ==, 1);
        g_assert_cmpuint(iocbs(-1, -1), ==, 2);
        ASSERT_NATIVE(&t, 1, 1, 1, 0, 0);
        g_assert_cmpint(file_rw(&t, type, 0, 4 * BLK, niov, 0, 0), ==, 0);
        g_assert_cmpuint(iocbs(opcode, 1), ==, 2);
        ASSERT_NATIVE(&t, 1, 0, 0, 0, 0);

        /* So is an error, but for those that mean "can't do", and a signal. */
        native_renew(&t);
        by_worker_init(&r, i, 0);
        begin_by_worker(&r, &t, type, CALL_WORKER_SUBMIT);
        forge_by_worker(-err);
        g_assert_cmpint(req_wait(&r), ==, final ? -err : 0);
        req_destroy(&r);
        g_assert_cmpuint(calls(CALL_WORKER_SUBMIT), ==, 1);
        g_assert_cmpuint(calls(CALL_ANY_READ) + calls(CALL_ANY_WRITE), ==,
                         !final);
        ASSERT_NATIVE(&t, final, 1, 1 + !final, !final, 0);
        g_assert_cmpint(file_rw(&t, type, 0, 4 * BLK, niov, 0, 0), ==, 0);
        ASSERT_NATIVE(&t, !learns, 0, 0, learns, 0);
        g_assert(!(t.f.writeback_errno));
    }

    /* A short one is the pool's. */
    for (int i = 0; i < 8; i++) {
        int type = i & 1 ? QEMU_AIO_WRITE : QEMU_AIO_READ;
        Req r;

        t.coroutine = i & 4;
        native_renew(&t);
        by_worker_init(&r, i, 0);
        begin_by_worker(&r, &t, type, CALL_WORKER_SUBMIT);
        refuse_iocb(-1, 0, 0, 1, BLK);
        gate_open();
        g_assert_cmpint(req_wait(&r), ==, 0);
        check(r.buf, 0, 4 * BLK, 0);
        check_file(&t, 0, 4 * BLK, 0);
        req_destroy(&r);
        g_assert_cmpuint(calls(CALL_ANY_READ) + calls(CALL_ANY_WRITE), ==, 1);
        g_assert_cmpint(hooks.log[hooks.nr_log - 1].offset, ==, BLK);
        ASSERT_NATIVE(&t, 0, 1, 1, 1, 1);
    }
    file_close(&t);
}

/* io_submit() of the worker fails. */
static void test_by_worker_refused(int err)
{
    TestFile t;

    if (!file_open(&t, NOWAIT)) {
        return;
    }
    /* More often than the ring has room: it is given back. */
    for (int i = 0; i < 100; i++) {
        bool is_write = i & 1;
        int type = is_write ? QEMU_AIO_WRITE : QEMU_AIO_READ;
        Call call = is_write ? CALL_ANY_WRITE : CALL_ANY_READ;

        t.coroutine = i & 4;
        native_renew(&t);
        forge_iocb(-1, 1, 0, 1, -EAGAIN);
        fault(CALL_WORKER_SUBMIT, err == EINTR ? 3 : 1, -err);
        if (err != EINTR && i & 8) {
            fault(call, 1, -EDQUOT);
        }
        g_assert_cmpint(file_rw(&t, type, 0, 4 * BLK, i & 2 ? 4 : 1, 0, 0), ==,
                        err != EINTR && i & 8 ? -EDQUOT : 0);
        g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 1);
        if (err == EINTR) {
            g_assert_cmpuint(calls(CALL_WORKER_SUBMIT), ==, 4);
            g_assert_cmpuint(calls(call), ==, 0);
            ASSERT_NATIVE(&t, 1, 1, 1, 0, 0);
        } else {
            g_assert_cmpuint(calls(CALL_WORKER_SUBMIT), ==, 1);
            g_assert_cmpuint(calls(call), ==, 1);
            ASSERT_NATIVE(&t, 0, 0, 2, 1, 0);
        }
        /* Nothing is learnt. */
        g_assert_cmpint(file_rw(&t, type, 0, BLK, 1, 0, 0), ==, 0);
        g_assert_cmpuint(iocbs(-1, 1), ==, 2);
        ASSERT_NATIVE(&t, 1, 0, 0, 0, 0);
    }
    check_file(&t, 0, FILE_SIZE, 0);
    g_assert_cmpuint(stat64_get(&t.f.stats[RAW_AIO_RING_SIZE]), ==, 64);
    file_close(&t);
}

/* The result is there before the worker is done, and after. */
static void test_by_worker_order(int unused)
{
    TestFile t;

    if (!file_open(&t, NOWAIT)) {
        return;
    }
    for (int i = 0; i < 32; i++) {
        int type = i & 1 ? QEMU_AIO_WRITE : QEMU_AIO_READ;
        bool worker_first = i & 8, fail = i & 16;
        int fd;
        Req r;

        t.coroutine = i & 4;
        native_renew(&t);
        by_worker_init(&r, i, 0);
        begin_by_worker(&r, &t, type, worker_first || fail
                                      ? CALL_WORKER_SUBMIT
                                      : CALL_WORKER_SUBMITTED);
        if (worker_first && fail) {
            forge_by_worker(-EDQUOT);
        } else if (fail) {
            gate_close(1u << CALL_WORKER_SUBMITTED, -1);
            pthread_mutex_lock(&hooks.lock);
            pthread_cond_broadcast(&hooks.cond);
            hooks.forge = (IocbRule) { true, -1, 0, 0, 1, -EDQUOT };
            while (hooks.forged < 2) {
                pthread_mutex_unlock(&hooks.lock);
                g_usleep(50);
                pthread_mutex_lock(&hooks.lock);
            }
            pthread_mutex_unlock(&hooks.lock);
        }
        fd = file_fd(&t);
        if (worker_first) {
            PAIOPoolInfo info;

            gate_open();
            do {
                g_usleep(50);
                paio_pool_get_info(raw_aio_current_pool(), &info);
            } while (info.queued || info.idle < info.threads ||
                     ring_unread() < 1);
        } else {
            while (ring_unread()) {
                g_usleep(50);
                settle();
            }
            settle();
            g_assert(!r.done);
            if (!t.coroutine) {
                req_cancel(&r);
                settle();
                g_assert(!r.done);
            }
            raw_aio_set_fd(&t.f, reopen(&t, NOWAIT));
            g_assert_cmpint(fcntl(fd, F_GETFD), !=, -1);
            gate_open();
        }
        g_assert_cmpint(req_wait(&r), ==, fail ? -EDQUOT : 0);
        if (!worker_first) {
            g_assert_cmpint(fcntl(fd, F_GETFD), ==, -1);
        }
        check_file(&t, 0, 4 * BLK, 0);
        req_destroy(&r);
        ASSERT_NATIVE(&t, 1, 1, 1, 0, 0);
    }
    file_close(&t);
}

static void test_by_worker_cancel(int unused)
{
    AioContext *ctx = qemu_get_current_aio_context();
    PAIOPoolInfo info;
    Req blocker, r;
    TestFile t;

    if (!file_open(&t, NOWAIT)) {
        return;
    }
    aio_context_set_thread_pool_params(ctx, 0, 1, &error_abort);

    /* Queued.  More often than the ring has room: it is given back. */
    for (int i = 0; i < 100; i++) {
        native_renew(&t);
        gate_close(1u << CALL_PREAD, -1);
        req_init(&blocker, BLK, 1, true);
        req_start(&blocker, &t, QEMU_AIO_READ | QEMU_AIO_MISALIGNED, 0, 0);
        gate_wait(1);
        by_worker_init(&r, i | 1, 1);
        forge_iocb(-1, 1, 0, 1, -EAGAIN);
        /* Without the pattern, as the refusal is only pretended */
        fill(r.buf, 0, 4 * BLK, 0);
        req_start(&r, &t, QEMU_AIO_WRITE, 0, 0);
        do {
            settle();
            paio_pool_get_info(raw_aio_current_pool(), &info);
        } while (!info.queued);
        req_cancel(&r);
        req_cancel(&r);
        g_assert_cmpint(req_wait(&r), ==, -ECANCELED);
        g_assert(!blocker.done);
        gate_open();
        g_assert_cmpint(req_wait(&blocker), ==, 0);
        settle();
        g_assert_cmpuint(calls(CALL_WORKER_SUBMIT), ==, 0);
        g_assert_cmpuint(calls(CALL_ANY_WRITE), ==, 0);
        ASSERT_NATIVE(&t, 0, 0, 1, 1, 0);
        req_destroy(&r);
        req_destroy(&blocker);
    }
    g_assert_cmpint(file_write(&t, 0, BLK, 1, 0, 0), ==, 0);
    g_assert_cmpuint(stat64_get(&t.f.stats[RAW_AIO_RING_SIZE]), ==, 64);

    /* Running */
    for (int i = 0; i < 8; i++) {
        int type = i & 1 ? QEMU_AIO_WRITE : QEMU_AIO_READ;

        native_renew(&t);
        by_worker_init(&r, i, i);
        begin_by_worker(&r, &t, type, i & 4 ? CALL_WORKER_SUBMIT
                                            : CALL_WORKER_SUBMITTED);
        req_cancel(&r);
        settle();
        g_assert(!r.done);
        gate_open();
        g_assert_cmpint(req_wait(&r), ==, 0);
        if (i & 1) {
            check_file(&t, 0, 4 * BLK, i);
        }
        req_destroy(&r);
        ASSERT_NATIVE(&t, 1, 1, 1, 0, 0);
    }
    aio_context_set_thread_pool_params(ctx, 0, 64, &error_abort);
    file_close(&t);
}

/* All room in the ring is taken, by requests that workers are to submit. */
static void test_by_worker_full(int unused)
{
    AioContext *ctx = qemu_get_current_aio_context();
    Req r[65];
    TestFile t;

    if (!file_open(&t, NOWAIT)) {
        return;
    }
    aio_context_set_thread_pool_params(ctx, 0, 80, &error_abort);
    fault(CALL_IO_SETUP, 1, PASS);
    fault(CALL_IO_SETUP, ALWAYS, -ENOMEM);
    forge_iocb(-1, 1, 0, ALWAYS, -EAGAIN);
    gate_close(1u << CALL_WORKER_SUBMIT, -1);
    for (int i = 0; i < 65; i++) {
        req_init(&r[i], BLK, 1, false);
    }
    for (int i = 0; i < 64; i++) {
        req_start(&r[i], &t, QEMU_AIO_READ, i * BLK, 0);
    }
    while (stat64_get(&t.f.stats[RAW_AIO_NATIVE_REFUSED]) < 64) {
        settle();
    }
    /* They may have half of the ring. */
    gate_wait(32);
    while (stat64_get(&t.f.stats[RAW_AIO_POOL_SERVED]) < 32) {
        settle();
    }
    req_start(&r[64], &t, QEMU_AIO_READ, 0, 0);
    g_assert_cmpint(req_wait(&r[64]), ==, 0);
    g_assert_cmpuint(calls(CALL_ANY_READ), ==, 33);
    ASSERT_NATIVE(&t, 0, 0, 64, 33, 0);
    gate_open();
    for (int i = 0; i < 65; i++) {
        g_assert_cmpint(req_wait(&r[i]), ==, 0);
        check(r[i].buf, i % 64 * BLK, BLK, 0);
        req_destroy(&r[i]);
    }
    ASSERT_NATIVE(&t, 32, 32, 0, 0, 0);
    aio_context_set_thread_pool_params(ctx, 0, 64, &error_abort);
    file_close(&t);
}

/* A callback waits for a request that a worker is about to submit, or has. */
static Req *by_worker_other;

static void by_worker_hook(Req *r)
{
    gate_open();
    g_assert_cmpint(req_wait(by_worker_other), ==, 0);
}

static void test_by_worker_nested(int unused)
{
    Req r[2];
    TestFile t;

    if (!file_open(&t, NOWAIT)) {
        return;
    }
    for (int i = 0; i < 8; i++) {
        native_renew(&t);
        for (int j = 0; j < 2; j++) {
            req_init(&r[j], BLK, 1, false);
        }
        begin_by_worker(&r[1], &t, QEMU_AIO_READ,
                        i & 1 ? CALL_WORKER_SUBMIT : CALL_WORKER_SUBMITTED);
        if (!(i & 1) && i & 4) {
            while (ring_unread()) {
                settle();
            }
        }
        by_worker_other = &r[1];
        r[0].hook = by_worker_hook;
        req_start(&r[0], &t, QEMU_AIO_READ, BLK, 0);
        g_assert_cmpint(req_wait(&r[0]), ==, 0);
        g_assert_cmpint(r[1].done, ==, 1);
        for (int j = 0; j < 2; j++) {
            check(r[j].buf, !j * BLK, BLK, 0);
            req_destroy(&r[j]);
        }
        ASSERT_NATIVE(&t, 2, 1, 1, 0, 0);
    }
    file_close(&t);
}

/* Where most are refused, the flag is tried less often. */
static void test_by_worker_hint(int unused)
{
    TestFile t;

    if (!file_open(&t, NOWAIT)) {
        return;
    }
    for (int i = 0; i < 2; i++) {
        int type = i ? QEMU_AIO_WRITE : QEMU_AIO_READ;
        int other = i ? QEMU_AIO_READ : QEMU_AIO_WRITE;

        native_renew(&t);
        forge_iocb(-1, 1, 0, ALWAYS, -EAGAIN);
        for (int j = 1; j <= 270; j++) {
            t.coroutine = j & 1;
            g_assert_cmpint(file_rw(&t, type, 0, BLK, 1, 0, 0), ==, 0);
            g_assert_cmpuint(iocbs(-1, 1), ==, hint_tries_of(j));
        }
        g_assert_cmpuint(calls(CALL_WORKER_SUBMIT), ==, 270);
        g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, hint_tries_of(270));
        ASSERT_NATIVE(&t, 270, 270, hint_tries_of(270), 0, 0);

        hooks_reset();
        g_assert_cmpint(file_rw(&t, other, 0, BLK, 1, 0, 0), ==, 0);
        ASSERT_NATIVE(&t, 1, 0, 0, 0, 0);
        for (int j = 271; j <= 334; j++) {
            g_assert_cmpint(file_rw(&t, type, 0, BLK, 1, 0, 0), ==, 0);
        }
        ASSERT_NATIVE(&t, 64, 63, 0, 0, 0);
        for (int j = 0; j < 10; j++) {
            g_assert_cmpint(file_rw(&t, type, 0, BLK, 1, 0, 0), ==, 0);
        }
        ASSERT_NATIVE(&t, 10, 0, 0, 0, 0);

        /* Half of them: always tried */
        native_renew(&t);
        for (int j = 0; j < 100; j++) {
            forge_iocb(-1, 1, 0, !(j & 1), -EAGAIN);
            g_assert_cmpint(file_rw(&t, type, 0, BLK, 1, 0, 0), ==, 0);
        }
        ASSERT_NATIVE(&t, 100, 50, 50, 0, 0);
    }
    file_close(&t);
}
#endif /* RAW_AIO_HAVE_IOCB_FLAGS */

/*
 * Requests that go as an array of iocbs.  First the ring alone.
 */

typedef struct ArrayReq {
    RawLaioRequest req;
    ssize_t res;
    int done;
    struct iovec iov[96];
    int niov;
    uint8_t *buf;
    size_t size;
    int nr_full;    /* elements that are not empty */
} ArrayReq;

static void array_cb(void *opaque, ssize_t res)
{
    ArrayReq *a = opaque;

    g_assert_cmpint(in_engine, ==, 0);
    a->res = res;
    g_assert_cmpint(a->done++, ==, 0);
}

static void array_wait(ArrayReq *a)
{
    while (!a->done) {
        aio_poll(qemu_get_current_aio_context(), true);
    }
    /* Whatever comes now comes once too often, see array_cb(). */
}

/* @sizes in blocks */
static void array_init(ArrayReq *a, const int *sizes, int n)
{
    size_t pos = 0;

    *a = (ArrayReq) { .niov = n };
    for (int i = 0; i < n; i++) {
        a->size += sizes[i] * BLK;
        a->nr_full += sizes[i] > 0;
    }
    a->buf = qemu_memalign(BLK, a->size + BLK);
    memset(a->buf, 0xaa, a->size);
    for (int i = 0; i < n; i++) {
        a->iov[i] = (struct iovec) { a->buf + pos, sizes[i] * BLK };
        pos += a->iov[i].iov_len;
    }
}

static void array_submit(RawLaioRing *ring, ArrayReq *a, bool is_write, int fd,
                         int64_t offset, bool array)
{
    a->done = 0;
    raw_laio_prep_rw(&a->req, is_write, fd, a->iov, a->niov, offset, 0, array);
    a->req.cb = array_cb;
    a->req.opaque = a;
    in_engine++;
    raw_laio_submit(ring, &a->req, 0);
    in_engine--;
}

static ssize_t array_run(RawLaioRing *ring, ArrayReq *a, bool is_write, int fd,
                         int64_t offset, bool array)
{
    array_submit(ring, a, is_write, fd, offset, array);
    array_wait(a);
    return a->res;
}

#define ARRAY_BLKS 200

static bool array_open(TestFile *t, RawLaioRing **ring)
{
    if (!file_open(t, NATIVE)) {
        return false;
    }
    file_fill(t, ARRAY_BLKS * BLK);
    *ring = raw_laio_new(qemu_get_current_aio_context(), &error_abort);
    return true;
}

static void array_close(TestFile *t, RawLaioRing *ring)
{
    settle();
    raw_laio_free(ring);
    file_close(t);
}

/* Something happens to one element, at each place. */
static void test_array_places(int is_write)
{
    static const int lens[] = { 2, 3, 31, 32, 33, 34, 64, 65, 80 };
    RawLaioRing *ring;
    TestFile t;
    int fd;

    if (!array_open(&t, &ring)) {
        return;
    }
    fd = file_fd(&t);
    for (int l = 0; l < 2 * ARRAY_SIZE(lens); l++) {
        int n = lens[l / 2];
        bool empties = l & 1;
        int sizes[80];
        ArrayReq a;

        for (int i = 0; i < n; i++) {
            /* The last two are never empty, so there is one at least. */
            sizes[i] = empties && i % 3 == 0 && i < n - 2 ? 0 : 2;
        }
        array_init(&a, sizes, n);
        for (int i = 0; i < a.nr_full; i++) {
            /* Elements behind the fault that are sent with it */
            int sent = MIN(ROUND_UP(i + 1, 32), a.nr_full);

            for (int what = 0; what < 6; what++) {
                ssize_t prefix = i * 2 * BLK, res;
                int nr_iocbs = sent;

                hooks_reset();
                if (is_write) {
                    fill(a.buf, 0, a.size, 0);
                }
                switch (what) {
                case 0: /* no fault */
                    res = a.size;
                    nr_iocbs = a.nr_full;
                    break;
                case 1: /* short */
                    forge_iocb(-1, -1, i, 1, BLK);
                    res = prefix + BLK;
                    break;
                case 2: /* nothing */
                    forge_iocb(-1, -1, i, 1, 0);
                    res = prefix;
                    break;
                case 3: /* an error */
                    forge_iocb(-1, -1, i, 1, -EIO);
                    res = prefix ?: -EIO;
                    break;
                case 4: /* refused */
                    refuse_iocb(-1, -1, i, 1, -ENOSYS);
                    res = prefix ?: -ENOSYS;
                    break;
                case 5: /* two of them: the first counts */
                    forge_iocb(-1, -1, i, 2, -ENOSPC);
                    refuse_iocb(-1, -1, i + 1, 1, -EBADF);
                    res = prefix ?: -ENOSPC;
                    break;
                }
                g_assert_cmpint(array_run(ring, &a, is_write, fd, 0, true), ==,
                                res);
                g_assert_cmpuint(iocbs(is_write ? IO_CMD_PWRITE : IO_CMD_PREAD,
                                       0), ==, nr_iocbs);
                g_assert_cmpuint(iocbs(-1, -1), ==, nr_iocbs);
                if (res < 0) {
                    g_assert_cmpint(a.req.refused, ==, what == 4);
                }
                if (!is_write) {
                    check(a.buf, 0, MAX(res, 0), 0);
                }
                if (what == 0 && i) {
                    what = 6; /* once is enough */
                    break;
                }
            }
            if (n > 40 && i > 3 && i < n - 4 && (i < 28 || i > 36)) {
                i += 4; /* Most of them are alike. */
            }
        }
        qemu_vfree(a.buf);
    }
    array_close(&t, ring);
}

/* The same as a vector would give, whatever the file is like */
static void test_array_random(int unused)
{
    g_autoptr(GRand) rand = g_rand_new_with_seed(g_test_rand_int());
    RawLaioRing *ring;
    TestFile t;
    int fd;

    if (!array_open(&t, &ring)) {
        return;
    }
    fd = file_fd(&t);
    for (int i = 0; i < 300; i++) {
        bool is_write = g_rand_boolean(rand);
        int n = g_rand_int_range(rand, 0, 81);
        int64_t offset = g_rand_int_range(rand, 0, ARRAY_BLKS) * BLK;
        int64_t size = g_rand_int_range(rand, 0, ARRAY_BLKS * BLK);
        ArrayReq a[2];
        int sizes[80];
        ssize_t res[2];

        for (int j = 0; j < n; j++) {
            sizes[j] = i % 10 ? g_rand_int_range(rand, 0, 4) : 0;
        }
        for (int j = 0; j < 2; j++) {
            g_autofree uint8_t *left = NULL;
            gsize len;

            /* Reads to its end and behind it, writes that make it longer */
            hooks_reset();
            file_fill(&t, size);
            array_init(&a[j], sizes, n);
            if (is_write) {
                fill(a[j].buf, offset, a[j].size, i + 1);
            }
            res[j] = array_run(ring, &a[j], is_write, fd, offset, j);
            if (!is_write && res[j] > 0) {
                check(a[j].buf, offset, res[j], 0);
            }
            if (is_write) {
                g_assert_cmpint(res[j], ==, a[j].size);
                g_assert(g_file_get_contents(t.path, (char **)&left, &len,
                                             NULL));
                g_assert_cmpint(len, ==, a[j].size
                                ? MAX(size, offset + a[j].size) : size);
                check(left + offset, offset, a[j].size, i + 1);
                check(left, 0, MIN(size, offset), 0);
            }
            if (j && n != 1 && a[j].nr_full) {
                g_assert_cmpuint(iocbs(is_write ? IO_CMD_PWRITE : IO_CMD_PREAD,
                                       0), ==, iocbs(-1, -1));
            }
            qemu_vfree(a[j].buf);
        }
        g_assert_cmpint(res[0], ==, res[1]);
    }
    array_close(&t, ring);
}

/* More requests than spare iocbs, and more iocbs than the ring has room for */
static void test_array_many(int unused)
{
    enum { NR = 600 };
    g_autofree ArrayReq *a = g_new(ArrayReq, NR);
    int sizes[80];
    RawLaioRing *ring;
    TestFile t;
    int fd;

    if (!array_open(&t, &ring)) {
        return;
    }
    fd = file_fd(&t);
    for (int i = 0; i < 80; i++) {
        sizes[i] = i % 7 != 1;
    }
    for (int round = 0; round < 4; round++) {
        bool is_write = round & 1;
        int nr = round & 2 ? NR : 50;

        if (round == 2) {
            /* As long as it may, and no longer */
            g_assert_cmpint(raw_laio_entries(ring), <=, 960);
        }
        for (int i = 0; i < nr; i++) {
            array_init(&a[i], sizes, i % 9 == 0 ? 80 : i % 5);
            if (is_write) {
                fill(a[i].buf, i % 100 * BLK, a[i].size, 0);
            }
        }
        hooks_reset();
        defer_call_begin();
        for (int i = 0; i < nr; i++) {
            array_submit(ring, &a[i], is_write, fd, i % 100 * BLK, true);
        }
        defer_call_end();
        for (int i = 0; i < nr; i++) {
            array_wait(&a[i]);
            g_assert_cmpint(a[i].res, ==, a[i].size);
            if (!is_write) {
                check(a[i].buf, i % 100 * BLK, a[i].size, 0);
            }
            qemu_vfree(a[i].buf);
        }
    }
    check_file(&t, 0, ARRAY_BLKS * BLK, 0);
    array_close(&t, ring);
}

static bool array_cancel(RawLaioRing *ring, ArrayReq *a)
{
    bool ret;

    in_engine++;
    ret = raw_laio_cancel(ring, &a->req);
    in_engine--;
    return ret;
}

static void test_array_cancel(int unused)
{
    int sizes[80];
    RawLaioRing *ring;
    ArrayReq a[2];
    TestFile t;
    int fd;

    if (!array_open(&t, &ring)) {
        return;
    }
    fd = file_fd(&t);
    for (int i = 0; i < 80; i++) {
        sizes[i] = 1;
    }

    /* All of it is pending. */
    for (int n = 0; n <= 80; n += n < 4 ? 1 : 19) {
        /* Two, one of which stays */
        for (int i = 0; i < 2; i++) {
            array_init(&a[i], sizes, n);
        }
        hooks_reset();
        aio_context_set_aio_params(qemu_get_current_aio_context(), 100);
        defer_call_begin();
        for (int i = 0; i < 2; i++) {
            array_submit(ring, &a[i], false, fd, 0, true);
        }
        if (hooks.submitted == 0) {
            g_assert(array_cancel(ring, &a[0]));
            g_assert(!array_cancel(ring, &a[0]));
            defer_call_end();
            array_wait(&a[0]);
            g_assert_cmpint(a[0].res, ==, -ECANCELED);
            array_wait(&a[1]);
            g_assert_cmpint(a[1].res, ==, a[1].size);
            g_assert_cmpuint(iocbs(-1, -1), ==, n ?: 1);
        } else {
            g_assert_cmpint(n, >, 16);
            defer_call_end();
            array_wait(&a[0]);
            array_wait(&a[1]);
        }
        aio_context_set_aio_params(qemu_get_current_aio_context(), 0);
        qemu_vfree(a[0].buf);
        qemu_vfree(a[1].buf);
    }

    /* The kernel has some. */
    for (int n = 2; n <= 40; n += 19) {
        array_init(&a[0], sizes, n);
        hooks_reset();
        fault(CALL_IO_SUBMIT, 1, 1);
        fault(CALL_IO_SUBMIT, 1, -EAGAIN);
        array_submit(ring, &a[0], false, fd, 0, true);
        g_assert_cmpint(hooks.submitted, ==, 1);
        g_assert(!array_cancel(ring, &a[0]));
        array_wait(&a[0]);
        g_assert_cmpint(a[0].res, ==, a[0].size);
        check(a[0].buf, 0, a[0].size, 0);
        qemu_vfree(a[0].buf);
    }

    /* The first 32 are done, the others have not begun. */
    array_init(&a[0], sizes, 80);
    hooks_reset();
    array_submit(ring, &a[0], false, fd, 0, true);
    g_assert_cmpint(hooks.submitted, ==, 32);
    defer_call_begin();
    while (hooks.submitted == 32 && !a[0].req.done) {
        aio_poll(qemu_get_current_aio_context(), true);
    }
    g_assert(!array_cancel(ring, &a[0]));
    defer_call_end();
    array_wait(&a[0]);
    g_assert_cmpint(a[0].res, ==, a[0].size);
    qemu_vfree(a[0].buf);

    /* A finished one */
    g_assert(!array_cancel(ring, &a[0]));
    array_close(&t, ring);
}

/* Through the engine: when they are used, and what is made of the results */
static void test_array_engine(int kind)
{
    TestFile t;

    if (!file_open(&t, kind)) {
        return;
    }
    for (int i = 0; i < 8; i++) {
        bool is_write = i & 1;
        int type = is_write ? QEMU_AIO_WRITE : QEMU_AIO_READ;
        int one = is_write ? IO_CMD_PWRITE : IO_CMD_PREAD;
        int other = is_write ? IO_CMD_PREADV : IO_CMD_PWRITEV;
        int other_type = is_write ? QEMU_AIO_READ : QEMU_AIO_WRITE;
        Call call = is_write ? CALL_ANY_WRITE : CALL_ANY_READ;
        int vec = is_write ? IO_CMD_PWRITEV : IO_CMD_PREADV;

        /* A vector is refused, and the pool can't do it either. */
        t.coroutine = i & 2;
        raw_aio_set_fd(&t.f, reopen(&t, kind));
        disable(&t, 0);
        file_stats(&t);
        hooks_reset();
        refuse_iocb(vec, -1, 0, ALWAYS, -EINVAL);
        fault(call, 1, -EDQUOT);
        g_assert_cmpint(file_rw(&t, type, 0, 4 * BLK, 4, 0, 0), ==, -EDQUOT);
        ASSERT_STATS(&t, 0, 1, 1, 0);

        /* It can: from now on there are arrays. */
        g_assert_cmpint(file_rw(&t, type, 0, 4 * BLK, 4, 0, 0), ==, 0);
        g_assert_cmpuint(iocbs(vec, -1), ==, 2);
        g_assert_cmpuint(iocbs(one, -1), ==, 0);
        ASSERT_STATS(&t, 0, 1, 1, 0);
        g_assert_cmpint(file_rw(&t, type, 0, 4 * BLK, 4, 0, 0), ==, 0);
        g_assert_cmpuint(iocbs(vec, -1), ==, 2);
        g_assert_cmpuint(iocbs(one, kind == NOWAIT), ==, 4);
        g_assert_cmpuint(iocbs(-1, -1), ==, 6);
        ASSERT_STATS(&t, 1, 0, 0, 0);

        /* The other direction has its vectors. */
        g_assert_cmpint(file_rw(&t, other_type, 0, 4 * BLK, 4, 0, 0), ==, 0);
        g_assert_cmpuint(iocbs(other, -1), ==, 1);
        ASSERT_STATS(&t, 1, 0, 0, 0);

        /* It is forgotten with the descriptor. */
        raw_aio_set_fd(&t.f, reopen(&t, kind));
        hooks_reset();
        g_assert_cmpint(file_rw(&t, type, 0, 4 * BLK, 4, 0, 0), ==, 0);
        g_assert_cmpuint(iocbs(vec, -1), ==, 1);
        g_assert_cmpuint(iocbs(-1, -1), ==, 1);
        ASSERT_STATS(&t, 1, 0, 0, 0);

        /* A single element does not make them. */
        hooks_reset();
        refuse_iocb(one, -1, 0, 1, -EINVAL);
        g_assert_cmpint(file_rw(&t, type, 0, 4 * BLK, 1, 0, 0), ==, 0);
        ASSERT_STATS(&t, 0, 1, 1, 0);
        g_assert_cmpuint(iocbs(one, -1), ==, 1);
        if (kind == NOWAIT) {
            g_assert_cmpint(file_rw(&t, type, 0, 4 * BLK, 4, 0, 0), ==, 0);
            g_assert_cmpuint(iocbs(vec, 0), ==, 1);
            g_assert_cmpuint(iocbs(-1, -1), ==, 2);
            ASSERT_STATS(&t, 1, 0, 0, 0);
        }

        /* Errors, at the first element and later */
        disable(&t, RAW_AIO_DISABLE_IOCBV);
        for (int j = 0; j < 4; j++) {
            raw_aio_set_fd(&t.f, reopen(&t, kind));
            hooks_reset();
            forge_iocb(one, -1, j, 1, -EIO);
            g_assert_cmpint(file_rw(&t, type, 0, 4 * BLK, 4, 0, 0), ==,
                            j || kind == NOWAIT ? 0 : -EIO);
            g_assert_cmpuint(iocbs(one, kind == NOWAIT), ==, 4);
            g_assert_cmpuint(calls(call), ==, j || kind == NOWAIT);
            if (calls(call)) {
                g_assert_cmpint(hooks.log[hooks.nr_log - 1].offset, ==,
                                j * BLK);
            }
            if (j) {
                ASSERT_STATS(&t, 0, 0, 1, 1);
            } else if (kind == NOWAIT) {
                ASSERT_STATS(&t, 0, 1, 1, 0);
            } else {
                ASSERT_STATS(&t, 1, 0, 0, 0);
            }

            /* EAGAIN of an element: not by a worker */
            raw_aio_set_fd(&t.f, reopen(&t, kind));
            hooks_reset();
            forge_iocb(one, -1, j, 1, -EAGAIN);
            g_assert_cmpint(file_rw(&t, type, 0, 4 * BLK, 4, 0, 0), ==,
                            j || kind == NOWAIT ? 0 : -EAGAIN);
            g_assert_cmpuint(calls(CALL_WORKER_SUBMIT), ==, 0);
            file_stats(&t);

            /* Refused by io_submit(): nothing has happened to this one */
            raw_aio_set_fd(&t.f, reopen(&t, kind));
            hooks_reset();
            refuse_iocb(one, -1, j, 1, j ? -EIO : -EAGAIN);
            g_assert_cmpint(file_rw(&t, type, 0, 4 * BLK, 4, 0, 0), ==, 0);
            g_assert_cmpuint(calls(call), ==, 1);
            if (j) {
                ASSERT_STATS(&t, 0, 0, 1, 1);
            } else {
                ASSERT_STATS(&t, 0, 1, 1, 0);
            }
        }

        /* Nothing but empty elements */
        {
            static const size_t empty[] = { 0, 0, 0 };
            Req r;

            raw_aio_set_fd(&t.f, reopen(&t, kind));
            hooks_reset();
            req_init_parts(&r, empty, 3);
            g_assert_cmpint(req_rw(&r, &t, type, BLK, 0, 0), ==, 0);
            file_stats(&t);
        }

        /* A zoned write is sent once or not at all. */
        hooks_reset();
        g_assert_cmpint(file_rw(&t, QEMU_AIO_WRITE | RAW_AIO_ZONED, 0, 4 * BLK,
                                4, 0, 0), ==, 0);
        g_assert_cmpuint(iocbs(-1, -1), ==, 0);
        ASSERT_STATS(&t, 0, 0, 1, 0);
        g_assert_cmpint(file_rw(&t, QEMU_AIO_WRITE | RAW_AIO_ZONED, 0, 4 * BLK,
                                1, 0, 0), ==, 0);
        g_assert_cmpuint(iocbs(IO_CMD_PWRITE, 0), ==, 1);
        ASSERT_STATS(&t, 1, 0, 0, 0);
        g_assert_cmpint(file_rw(&t, QEMU_AIO_READ | RAW_AIO_ZONED, 0, 4 * BLK,
                                4, 0, 0), ==, 0);
        g_assert_cmpuint(iocbs(IO_CMD_PREAD, kind == NOWAIT), ==, 4);
        ASSERT_STATS(&t, 1, 0, 0, 0);
    }
    file_close(&t);
}

/*
 * Growth.  Each needs a ring of its own.
 */

typedef struct Queue {
    TestFile t;
    Req *r;
    int nr;
} Queue;

/* So many reads at once; the loop has no turn until all are queued. */
static void queue_run(TestFile *t, int nr)
{
    g_autofree Req *r = g_new(Req, nr);
    g_autofree uint8_t *mem = g_malloc(2 * BLK);

    hooks.nr_order = 0;
    for (int i = 0; i < nr; i++) {
        r[i] = (Req) { 0 };
        qemu_iovec_init(&r[i].qiov, 1);
        /* All of them read into the same memory. */
        qemu_iovec_add(&r[i].qiov, (void *)ROUND_UP((uintptr_t)mem, BLK), BLK);
    }
    defer_call_begin();
    for (int i = 0; i < nr; i++) {
        req_start(&r[i], t, QEMU_AIO_READ, i % FILE_BLKS * BLK, 0);
    }
    defer_call_end();
    for (int i = 0; i < nr; i++) {
        g_assert_cmpint(req_wait(&r[i]), ==, 0);
        qemu_iovec_destroy(&r[i].qiov);
    }
}

static unsigned ring_size(TestFile *t)
{
    /* It is noted when the next request begins. */
    g_assert_cmpint(file_read(t, 0, BLK, 1, 0), ==, 0);
    return stat64_get(&t->f.stats[RAW_AIO_RING_SIZE]);
}

static void grow_run(TestFile *t, int nr, int size)
{
    file_stats(t);
    queue_run(t, nr);
    ASSERT_STATS(t, nr, 0, 0, 0);
    g_assert_cmpint(hooks.nr_order, ==, nr);
    for (int i = 0; i < nr; i++) {
        g_assert_cmpint(hooks.order[i], ==, i % FILE_BLKS);
    }
    g_assert_cmpuint(ring_size(t), ==, size);
}

static void test_grow(int hide)
{
    TestFile t;

    if (!file_open(&t, NATIVE)) {
        return;
    }
    hooks.hide_magic = hide;
    grow_run(&t, 1, 64);
    grow_run(&t, 64, 64);
    g_assert_cmpuint(calls(CALL_IO_SETUP), ==, 1);
    grow_run(&t, 65, 192);
    g_assert_cmpuint(calls(CALL_IO_SETUP), ==, 2);
    grow_run(&t, 192, 192);
    grow_run(&t, 193, 448);
    grow_run(&t, 448, 448);
    g_assert_cmpuint(calls(CALL_IO_SETUP), ==, 3);
    grow_run(&t, 449, 960);
    g_assert_cmpuint(calls(CALL_IO_SETUP), ==, 4);
    grow_run(&t, 10000, 960);
    g_assert_cmpuint(calls(CALL_IO_SETUP), ==, 4);
    g_assert_cmpint(nr_my_rings, ==, 4);
    g_assert_cmpuint(!!calls(CALL_IO_GETEVENTS), ==, hide);
    file_close(&t);
}

static void test_grow_at_once(int unused)
{
    TestFile t;

    if (!file_open(&t, NATIVE)) {
        return;
    }
    grow_run(&t, 10000, 960);
    file_close(&t);
}

static void test_grow_refused_in(int err)
{
    TestFile t;

    if (!file_open(&t, NATIVE)) {
        return;
    }
    fault(CALL_IO_SETUP, 1, PASS);
    fault(CALL_IO_SETUP, ALWAYS, -err);
    clock_stop();
    grow_run(&t, 200, 64);
    g_assert_cmpuint(calls(CALL_IO_SETUP), ==, 2);
    grow_run(&t, 200, 64);
    g_assert_cmpuint(calls(CALL_IO_SETUP), ==, 2);

    /* After 10 s it is tried again, and after 10 more. */
    clock_turn(9 * NANOSECONDS_PER_SECOND);
    grow_run(&t, 100, 64);
    g_assert_cmpuint(calls(CALL_IO_SETUP), ==, 2);
    clock_turn(NANOSECONDS_PER_SECOND);
    grow_run(&t, 100, 64);
    g_assert_cmpuint(calls(CALL_IO_SETUP), ==, 3);
    hooks_reset();
    grow_run(&t, 100, 64);
    clock_turn(10 * NANOSECONDS_PER_SECOND);
    grow_run(&t, 100, 192);
    g_assert_cmpuint(calls(CALL_IO_SETUP), ==, 1);
    clock_go();
    file_close(&t);
}

static void test_grow_refused(int err)
{
    TestFile t;

    if (g_test_subprocess()) {
        test_grow_refused_in(err);
        return;
    }
    if (!file_open(&t, NATIVE)) {
        return;
    }
    file_close(&t);
    g_test_trap_subprocess(NULL, 0, 0);
    g_test_trap_assert_passed();
    g_test_trap_assert_stderr(err == EAGAIN
                              ? "*warning*stay short*fs.aio-max-nr*sysctl*"
                              : "*warning*stay short*");
    g_test_trap_assert_stderr_unmatched("*warning*warning*");
}

/* EAGAIN, which the context that is asked may or may not have a reason for */
static void test_grow_submit(int unused)
{
    TestFile t;

    if (!file_open(&t, NATIVE)) {
        return;
    }

    /* Nothing is in flight in the second: no use to wait */
    fault(CALL_IO_SUBMIT, 2, PASS);
    fault(CALL_IO_SUBMIT, 1, -EAGAIN);
    queue_run(&t, 65);
    g_assert_cmpuint(calls(CALL_IO_SETUP), ==, 2);
    g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 3);
    ASSERT_STATS(&t, 64, 1, 1, 0);

    /* Something is: wait for it */
    hooks_reset();
    fault(CALL_IO_SUBMIT, 2, PASS);
    fault(CALL_IO_SUBMIT, 1, 1);
    fault(CALL_IO_SUBMIT, 1, -EAGAIN);
    queue_run(&t, 66);
    g_assert_cmpuint(calls(CALL_IO_SETUP), ==, 0);
    g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 5);
    ASSERT_STATS(&t, 66, 0, 0, 0);
    file_close(&t);
}
#endif /* CONFIG_LINUX_AIO */

/*
 * Calls that make the event loop wait
 */

/* What was known of the context switches is too old. */
static void watch_age(void)
{
    clock_turn(11 * NANOSECONDS_PER_SECOND);
}

/* One request.  Returns whether the event loop has submitted it. */
static bool watch_request(TestFile *t)
{
    unsigned before = calls(CALL_IO_SUBMIT) + calls(CALL_PREADV2);

    g_assert_cmpint(file_read(t, 0, BLK, 1, 0), ==, 0);
    return calls(CALL_IO_SUBMIT) + calls(CALL_PREADV2) > before;
}

static void watch_assert_slow(TestFile *t, uint64_t total)
{
    g_assert_cmpuint(stat64_get(&t->f.stats[RAW_AIO_SLOW_SUBMISSIONS]), ==,
                     total);
}

static void test_watch(int kind)
{
    bool inl = kind_inline(kind);
    unsigned asked;
    TestFile t;
    Stats s;

    if (!file_open(&t, kind)) {
        return;
    }
    clock_stop();
    watch_age();

    /* As long as the clock stands still one look is enough. */
    asked = qatomic_read(&switches_asked);
    for (int i = 0; i < 10; i++) {
        g_assert(watch_request(&t));
    }
    g_assert_cmpuint(qatomic_read(&switches_asked), ==, asked + 1);

    /* These take long, but do not wait. */
    delay_next(DELAY_BUSY, -1, 5);
    for (int i = 0; i < 5; i++) {
        g_assert(watch_request(&t));
    }
    g_assert_cmpuint(qatomic_read(&switches_asked), ==, asked + 6);
    watch_assert_slow(&t, 0);

    /* And this one does. */
    delay_next(DELAY_WAIT, -1, 1);
    g_assert(watch_request(&t));
    watch_assert_slow(&t, 1);

    /* For a time the loop submits nothing, but reads are served. */
    file_stats(&t);
    for (int i = 0; i < 10; i++) {
        g_assert(!watch_request(&t));
    }
    s = file_stats(&t);
    g_assert_cmpuint(s.native, ==, inl ? 0 : 10);
    g_assert_cmpuint(s.by_worker, ==, inl ? 0 : 10);
    g_assert_cmpuint(s.pool, ==, inl ? 10 : 0);
    g_assert_cmpuint(s.in + s.in_refused + s.refused, ==, 0);

    /* Another descriptor is another matter. */
    raw_aio_set_fd(&t.f, reopen(&t, kind));
    g_assert(watch_request(&t));
    clock_go();
    file_close(&t);
}

/* With the real clock, and what the kernel counts */
/* The main context can be run by a vCPU thread, whose switches are others. */
static void *watch_other_thread(void *opaque)
{
    raw_aio_watch_begin(opaque);
    g_assert_cmpint(raw_aio_watch_end(opaque), ==, 0);
    return NULL;
}

static void test_watch_thread(int unused)
{
    RawAIOWatch watch = { 0 };
    QemuThread thread;
    unsigned asked;

    clock_stop();
    watch_age();
    raw_aio_watch_begin(&watch);
    asked = qatomic_read(&switches_asked);
    raw_aio_watch_begin(&watch);
    g_assert_cmpuint(qatomic_read(&switches_asked), ==, asked);

    qemu_thread_create(&thread, "watch", watch_other_thread, &watch,
                       QEMU_THREAD_JOINABLE);
    qemu_thread_join(&thread);
    g_assert_cmpuint(qatomic_read(&switches_asked), ==, asked + 1);
    raw_aio_watch_begin(&watch);
    g_assert_cmpuint(qatomic_read(&switches_asked), ==, asked + 2);
    clock_go();
}

static void test_watch_real(int kind)
{
    uint64_t slow, tries = 0;
    TestFile t;

    if (!file_open(&t, kind)) {
        return;
    }
    qatomic_set(&real_switches, true);
    delay_next(DELAY_REAL_BUSY, -1, ALWAYS);
    g_assert(watch_request(&t));
    do {
        /* A busy machine may make it wait all the same, now and then. */
        raw_aio_set_fd(&t.f, reopen(&t, kind));
        slow = stat64_get(&t.f.stats[RAW_AIO_SLOW_SUBMISSIONS]);
        g_assert(watch_request(&t));
        g_assert_cmpint(tries++, <, 100);
    } while (stat64_get(&t.f.stats[RAW_AIO_SLOW_SUBMISSIONS]) != slow);

    delay_next(DELAY_REAL_WAIT, -1, 1);
    raw_aio_set_fd(&t.f, reopen(&t, kind));
    g_assert(watch_request(&t));
    watch_assert_slow(&t, slow + 1);
    g_assert(!watch_request(&t));
    qatomic_set(&real_switches, false);
    file_close(&t);
}

/* Twice as long each time */
static void test_watch_again(int kind)
{
    unsigned slow = 0;
    TestFile t;

    if (!file_open(&t, kind)) {
        return;
    }
    clock_stop();
    watch_age();
    for (int i = 0; i < 10; i++) {
        int64_t ms = 1000 << MIN(i, 6);

        delay_next(DELAY_WAIT, -1, ALWAYS);
        g_assert(watch_request(&t));
        watch_assert_slow(&t, ++slow);
        g_assert(!watch_request(&t));
        clock_turn((ms - 500) * SCALE_MS);
        g_assert(!watch_request(&t));
        delay_next(DELAY_NONE, -1, 0);
        clock_turn(500 * SCALE_MS);
        /* Now it is tried again, at once as the clock does not go back. */
    }

    /* As long again without: one step back, to 32 s */
    g_assert(watch_request(&t));
    clock_turn(64 * NANOSECONDS_PER_SECOND);
    g_assert(watch_request(&t));
    delay_next(DELAY_WAIT, -1, 1);
    g_assert(watch_request(&t));
    watch_assert_slow(&t, ++slow);
    clock_turn(63 * NANOSECONDS_PER_SECOND);
    g_assert(!watch_request(&t));
    clock_turn(1 * NANOSECONDS_PER_SECOND);
    g_assert(watch_request(&t));
    clock_go();
    file_close(&t);
}

#ifdef CONFIG_LINUX_AIO
static void watch_batch(TestFile *t, unsigned submissions)
{
    Req r[9];

    hooks_reset();
    defer_call_begin();
    for (int i = 0; i < 9; i++) {
        req_init(&r[i], BLK, 1, false);
        req_start(&r[i], &t[i / 3], QEMU_AIO_READ, i * BLK, 0);
    }
    defer_call_end();
    g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, submissions);
    for (int i = 0; i < 9; i++) {
        g_assert_cmpint(req_wait(&r[i]), ==, 0);
        check(r[i].buf, i * BLK, BLK, 0);
        req_destroy(&r[i]);
    }
}

/* Three files in one batch: only one of them is to blame. */
static void test_watch_two(int unused)
{
    TestFile t[3];

    for (int i = 0; i < 3; i++) {
        if (!file_open(&t[i], NATIVE)) {
            return;
        }
    }
    clock_stop();
    watch_batch(t, 1);
    for (int guilty = 0; guilty < 3; guilty++) {
        watch_age();
        for (int i = 0; i < 3; i++) {
            raw_aio_set_fd(&t[i].f, reopen(&t[i], NATIVE));
        }
        /* Which one it was can't be told, */
        delay_next(DELAY_WAIT, -1, 1);
        watch_batch(t, 1);
        for (int i = 0; i < 3; i++) {
            g_assert_cmpuint(file_stats(&t[i]).slow, ==, 0);
        }
        /* so the next time they do not go together. */
        delay_next(DELAY_WAIT, file_fd(&t[guilty]), 1);
        watch_batch(t, 3);
        for (int i = 0; i < 3; i++) {
            Stats s = file_stats(&t[i]);

            g_assert_cmpuint(s.slow, ==, i == guilty);
            g_assert_cmpuint(s.native, ==, 3);
            g_assert_cmpint(watch_request(&t[i]), ==, i != guilty);
        }
    }
    watch_age();
    watch_batch(t, 1);
    clock_go();
    for (int i = 0; i < 3; i++) {
        file_close(&t[i]);
    }
}
#endif

#if defined(CONFIG_LINUX_AIO) && RAW_AIO_HAVE_IOCB_FLAGS
/*
 * Reads of the inline tier that go together
 */

/* So many in a defer_call section are several. */
#define BATCH_MIN 4
/* So many small sections may come in between. */
#define BATCH_PATIENCE 4
/* Larger reads don't go together. */
#define BATCH_MAX_BYTES (64 * KiB)
/* One of so many sections tries the other way, and more of the first ones. */
#define BATCH_PERIOD 64
/* How many reads a section has here */
#define BATCH 8

static bool together_open(TestFile *t)
{
    if (!native_available()) {
        g_test_skip("no Linux AIO");
        return false;
    }
    if (!file_open(t, INLINE_NATIVE)) {
        return false;
    }
    /* The event loop forgets what the last test did. */
    for (int i = 0; i < BATCH_PATIENCE; i++) {
        g_assert_cmpint(file_read(t, 0, BLK, 1, 0), ==, 0);
    }
    raw_aio_set_fd(&t->f, reopen(t, INLINE_NATIVE));
    file_stats(t);
    hooks_reset();
    clock_stop();
    return true;
}

static void together_close(TestFile *t)
{
    memset(cost_ns, 0, sizeof(cost_ns));
    clock_go();
    file_close(t);
}

/* What a read takes (ns) alone, and in a batch of BATCH */
static void together_costs(int64_t single, int64_t together)
{
    cost_ns[CALL_PREADV2] = single;
    cost_ns[CALL_IO_SUBMIT] = together * BATCH;
}

static unsigned batched(TestFile *t)
{
    return stat64_get(&t->f.stats[RAW_AIO_INLINE_BATCHED]);
}

static void together_start(Req *r, TestFile *t, int n)
{
    for (int i = 0; i < n; i++) {
        req_init(&r[i], BLK, i % 3 ? 1 : 2, true);
        req_start(&r[i], t, QEMU_AIO_READ, i * BLK, 0);
    }
}

static void together_end(Req *r, int n)
{
    for (int i = 0; i < n; i++) {
        g_assert_cmpint(req_wait(&r[i]), ==, 0);
        check(r[i].buf, i * BLK, BLK, 0);
        req_destroy(&r[i]);
    }
}

/* A section with so many reads.  Returns: how many of them went together */
static unsigned together_section(TestFile *t, int n)
{
    unsigned before = batched(t);
    Req r[32];

    defer_call_begin();
    together_start(r, t, n);
    defer_call_end();
    together_end(r, n);
    /* Coroutines need not have waited: the event loop has its turn. */
    while (aio_poll(qemu_get_current_aio_context(), false)) {
        /* nothing */
    }
    return batched(t) - before;
}

/* A file of which it is known that a batch costs less */
static bool together_open_known(TestFile *t)
{
    if (!together_open(t)) {
        return false;
    }
    together_costs(2000, 500);
    /* For almost as many again, nothing else is tried. */
    for (int i = 0; i <= BATCH_PERIOD; i++) {
        together_section(t, BATCH);
    }
    g_assert_cmpuint(together_section(t, BATCH), ==, BATCH);
    file_stats(t);
    hooks_reset();
    return true;
}

static bool together_tries(unsigned n)
{
    return n % BATCH_PERIOD == 0 || (n < BATCH_PERIOD && is_power_of_2(n));
}

static void test_together_choice(int coroutine)
{
    unsigned n = 0, changed;
    TestFile t;

    if (!together_open(&t)) {
        return;
    }
    t.coroutine = coroutine;
    together_costs(2000, 1000);
    hooks_reset();
    /* Nothing is known about sections, then nothing about batches. */
    g_assert_cmpuint(together_section(&t, BATCH), ==, 0);
    g_assert_cmpuint(calls(CALL_PREADV2), ==, BATCH);
    g_assert_cmpuint(together_section(&t, BATCH), ==, BATCH);
    n++;
    g_assert_cmpuint(calls(CALL_PREADV2), ==, BATCH);
    g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 1);
    g_assert_cmpuint(iocbs(IOCB_READ, 1), ==, BATCH);
    g_assert_cmpuint(iocbs(IOCB_READ, 0), ==, 0);
    ASSERT_INLINE(&t, 2 * BATCH, 0, 0, 0);

    /* It costs less, with what is around it. */
    while (n < 2 * BATCH_PERIOD) {
        unsigned got = together_section(&t, BATCH);

        g_assert_cmpuint(got, ==, together_tries(++n) ? 0 : BATCH);
    }

    /* It does no more.  That may be chance, so it is not believed at once. */
    together_costs(2000, 3000);
    for (changed = 0; together_section(&t, BATCH); changed++) {
        n++;
    }
    n++;
    g_assert_cmpuint(changed, >, 4);
    g_assert_cmpuint(changed, <, 16);
    while (n < 4 * BATCH_PERIOD) {
        unsigned got = together_section(&t, BATCH);

        g_assert_cmpuint(got, ==, together_tries(++n) ? BATCH : 0);
    }

    /* And it does again, which the next attempt shows. */
    together_costs(2000, 500);
    while (n < 5 * BATCH_PERIOD) {
        unsigned got = together_section(&t, BATCH);

        g_assert_cmpuint(got, ==, together_tries(++n) ? BATCH : 0);
    }
    g_assert_cmpuint(together_section(&t, BATCH), ==, BATCH);

    /* What is around it costs as well, so it must be less by some. */
    together_costs(600, 500);
    for (changed = 0; changed < 3 * BATCH_PERIOD; changed++) {
        together_section(&t, BATCH);
    }
    g_assert_cmpuint(together_section(&t, BATCH), ==, 0);

    /* Another descriptor is another matter. */
    together_costs(2000, 500);
    raw_aio_set_fd(&t.f, reopen(&t, t.kind));
    g_assert_cmpuint(together_section(&t, BATCH), <=, BATCH - 1);
    g_assert_cmpuint(together_section(&t, BATCH), ==, BATCH);

    /* The switches */
    disable(&t, RAW_AIO_DISABLE_BATCH);
    g_assert_cmpuint(together_section(&t, BATCH), ==, 0);
    disable(&t, RAW_AIO_DISABLE_NATIVE);
    g_assert_cmpuint(together_section(&t, BATCH), ==, 0);
    disable(&t, RAW_AIO_DISABLE_IOCBV);
    g_assert_cmpuint(together_section(&t, BATCH), ==, 5);
    file_stats(&t);
    together_close(&t);
}

/* An interrupt makes one call long, which says nothing. */
static void test_together_outlier(int unused)
{
    TestFile t;

    if (!together_open_known(&t)) {
        return;
    }
    for (int i = 0; i < 20; i++) {
        together_costs(2000, 30000);
        together_section(&t, BATCH);
        together_costs(2000, 500);
        g_assert_cmpuint(together_section(&t, BATCH), ==, BATCH);
    }
    together_close(&t);
}

static void test_together_few(int unused)
{
    TestFile t;

    if (!together_open(&t)) {
        return;
    }
    together_costs(2000, 500);
    for (int i = 0; i < 20; i++) {
        g_assert_cmpuint(together_section(&t, BATCH_MIN - 1), ==, 0);
        g_assert_cmpint(file_read(&t, 0, BLK, 1, 0), ==, 0);
    }
    g_assert_cmpuint(together_section(&t, BATCH_MIN), ==, 0);
    for (int i = 0; i < BATCH_PERIOD; i++) {
        together_section(&t, BATCH_MIN);
    }
    g_assert_cmpuint(together_section(&t, BATCH_MIN), ==, BATCH_MIN);

    /* Those that come in between go with them, but not for long. */
    for (int i = 0; i < BATCH_PATIENCE; i++) {
        g_assert_cmpuint(together_section(&t, 2), ==, 2);
    }
    g_assert_cmpuint(together_section(&t, 2), ==, 0);

    /* Without a section there is only one at a time. */
    g_assert_cmpuint(together_section(&t, BATCH), ==, 0);
    for (int i = 0; i < BATCH_PATIENCE; i++) {
        g_assert_cmpint(file_read(&t, 0, BLK, 1, 0), ==, 0);
    }
    g_assert_cmpuint(together_section(&t, BATCH), ==, 0);

    /* Not writes, and not what is too large for the event loop */
    file_fill(&t, INLINE_MAX_READ + BLK);
    file_stats(&t);
    hooks_reset();
    defer_call_begin();
    for (int i = 0; i < BATCH; i++) {
        g_assert_cmpint(file_write(&t, i * BLK, BLK, 1, 0, 0), ==, 0);
    }
    g_assert_cmpint(file_read(&t, 0, INLINE_MAX_READ + 1, 1, 0), ==, 0);
    defer_call_end();
    g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 0);
    file_stats(&t);

    /* Nor what takes long to copy, which says nothing about the others. */
    for (int i = 0; i < 20; i++) {
        file_stats(&t);
        hooks_reset();
        together_costs(100, 500);
        defer_call_begin();
        for (int j = 0; j < BATCH; j++) {
            g_assert_cmpint(file_read(&t, 0, BATCH_MAX_BYTES + 1, 1, 0), ==, 0);
        }
        defer_call_end();
        g_assert_cmpuint(calls(CALL_PREADV2), ==, BATCH);
        g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 0);
        ASSERT_INLINE(&t, BATCH, 0, 0, 0);
        together_costs(2000, 500);
        together_section(&t, BATCH);
        g_assert_cmpuint(together_section(&t, BATCH), ==, BATCH);
    }
    file_stats(&t);
    together_close(&t);
}

/*
 * What a batch does not serve is the pool's, once; what that shows about the
 * file is learnt.
 */
static void test_together_misses(int by_kernel)
{
    static const struct {
        long ret;
        bool learns;
    } cases[] = {
        { -EAGAIN, false }, { -EINTR, false }, { -ENOMEM, false },
        { -EPERM, false }, { -EIO, true }, { -EINVAL, true },
        { -EOPNOTSUPP, true }, { -ENOSYS, true },
    };

    for (int i = 0; i < ARRAY_SIZE(cases); i++) {
        long err = cases[i].ret;
        bool waits = by_kernel && (err == -EAGAIN || err == -EINTR);
        bool learns = cases[i].learns;
        TestFile t;

        /* First, in the middle, last */
        for (int place = 0; place < 3; place++) {
            int at = place * (BATCH - 1) / 2;
            Req r[BATCH];

            if (!together_open_known(&t)) {
                return;
            }
            /* With EAGAIN it is sent again when those before it are done. */
            if (by_kernel) {
                refuse_iocb(IOCB_READ, 1, at, 1, err);
            } else {
                forge_iocb(IOCB_READ, 1, at, 1, err);
            }
            g_assert_cmpuint(together_section(&t, BATCH), ==,
                             waits && at ? BATCH : BATCH - 1);
            g_assert_cmpuint(calls(CALL_PREAD) + calls(CALL_PREADV), ==,
                             !(waits && at));
            ASSERT_INLINE(&t, waits && at ? BATCH : BATCH - 1,
                          !(waits && at), !(waits && at), 0);
            hooks_reset();
            g_assert_cmpuint(together_section(&t, BATCH), ==,
                             learns ? 0 : BATCH);
            ASSERT_INLINE(&t, BATCH, 0, 0, 0);
            g_assert_cmpuint(calls(CALL_PREADV2), ==, learns ? BATCH : 0);

            /* The pool has the last word. */
            if (!learns && !by_kernel) {
                hooks_reset();
                forge_iocb(IOCB_READ, 1, at, 1, err);
                fault(CALL_ANY_READ, 1, -ENXIO);
                defer_call_begin();
                together_start(r, &t, BATCH);
                defer_call_end();
                for (int j = 0; j < BATCH; j++) {
                    g_assert_cmpint(req_wait(&r[j]), ==,
                                    j == at ? -ENXIO : 0);
                    req_destroy(&r[j]);
                }
                ASSERT_INLINE(&t, BATCH - 1, 1, 1, 0);
            }
            together_close(&t);
        }
    }
}

static void test_together_short(int unused)
{
    TestFile t;

    for (int at = 0; at < BATCH; at++) {
        size_t len = at ? at * 500 : 0;

        if (!together_open_known(&t)) {
            return;
        }
        forge_iocb(IOCB_READ, 1, at, 1, len);
        g_assert_cmpuint(together_section(&t, BATCH), ==, BATCH - 1);
        ASSERT_INLINE(&t, BATCH - 1, 1, 1, 1);
        g_assert_cmpint(hooks.log[hooks.nr_log - 1].offset, ==,
                        at * BLK + len);
        together_close(&t);
    }
}

/* The first batch is refused: no reason to try that each time. */
static void test_together_refused(int unused)
{
    TestFile t;

    if (!together_open(&t)) {
        return;
    }
    together_costs(2000, 500);
    g_assert_cmpuint(together_section(&t, BATCH), ==, 0);
    forge_iocb(IOCB_READ, 1, 5, 2, -ENOMEM);
    g_assert_cmpuint(together_section(&t, BATCH), ==, BATCH - 2);
    file_stats(&t);
    hooks_reset();
    g_assert_cmpuint(together_section(&t, BATCH), ==, 0);
    g_assert_cmpuint(together_section(&t, BATCH), ==, BATCH);

    raw_aio_set_fd(&t.f, reopen(&t, t.kind));
    g_assert_cmpuint(together_section(&t, BATCH), <, BATCH);
    forge_iocb(IOCB_READ, 1, 0, BATCH, -ENOMEM);
    g_assert_cmpuint(together_section(&t, BATCH), ==, 0);
    hooks_reset();
    while (calls(CALL_PREADV2) < BATCH) {
        /* First the score of the hint has to come down. */
        g_assert_cmpuint(together_section(&t, BATCH), ==, 0);
    }
    file_stats(&t);
    together_close(&t);
}

/* A section of reads that only begin.  Returns: how many of them together */
static unsigned together_begin(TestFile *t)
{
    unsigned before = iocbs(IOCB_READ, 1);

    g_assert_cmpuint(together_section(t, BATCH), ==, 0);
    return iocbs(IOCB_READ, 1) - before;
}

/*
 * To begin reads costs something else than to do them, so there are two
 * choices, and each has its own tries.
 */
static void test_together_begun(int unused)
{
    unsigned n = 1, begun = 0, before;
    TestFile t;

    if (!together_open_known(&t)) {
        return;
    }
    /* It is known that those which are served should go together. */
    together_costs(9000, 12000);
    fault(CALL_PREADV2, ALWAYS, -EAGAIN);
    forge_iocb(IOCB_READ, 1, 0, ALWAYS, -EAGAIN);
    g_assert_cmpuint(together_begin(&t), ==, BATCH);
    before = calls(CALL_PREADV2);
    /* The next ones are expected to be like that one. */
    g_assert_cmpuint(together_begin(&t), ==, 0);
    g_assert_cmpuint(calls(CALL_PREADV2) - before, ==, BATCH);
    begun += 2 * BATCH;
    while (n < 2 * BATCH_PERIOD) {
        unsigned got = together_begin(&t);

        g_assert_cmpuint(got, ==, together_tries(++n) ? BATCH : 0);
        begun += BATCH;
    }
    /* They do not make anyone ask less often. */
    ASSERT_INLINE(&t, 0, begun, begun, 0);

    together_costs(9000, 3000);
    while (n % BATCH_PERIOD < BATCH_PERIOD - 1) {
        together_begin(&t);
        n++;
    }
    for (int i = 0; i < 8; i++) {
        /* Its tries show that it costs less now. */
        together_begin(&t);
    }
    g_assert_cmpuint(together_begin(&t), ==, BATCH);
    file_stats(&t);

    /* When they are served again, what is known of that counts again. */
    hooks_reset();
    together_costs(2000, 500);
    g_assert_cmpuint(together_section(&t, BATCH), ==, BATCH);
    g_assert_cmpuint(together_section(&t, BATCH), ==, BATCH);
    ASSERT_INLINE(&t, 2 * BATCH, 0, 0, 0);
    together_close(&t);
}

static void test_together_cancel(int unused)
{
    Req r[BATCH];
    TestFile t;

    if (!together_open_known(&t)) {
        return;
    }
    defer_call_begin();
    together_start(r, &t, BATCH);
    req_cancel(&r[2]);
    defer_call_end();
    req_cancel(&r[5]);
    for (int i = 0; i < BATCH; i++) {
        g_assert_cmpint(req_wait(&r[i]), ==, i == 2 ? -ECANCELED : 0);
        if (i != 2) {
            check(r[i].buf, i * BLK, BLK, 0);
        }
        req_destroy(&r[i]);
    }
    ASSERT_INLINE(&t, BATCH - 1, 0, 0, 0);
    together_close(&t);
}

static Req next_reads[INLINE_BLKS];

static void together_next(Req *r)
{
    Req *next = &next_reads[r->offset / BLK];

    req_init(next, BLK, 1, true);
    req_start(next, r->t, QEMU_AIO_READ, r->offset, 0);
}

/*
 * They take all that the event loop may do in a turn, and what is sent when
 * they complete is of the next one.
 */
static void test_together_turn(int unused)
{
    Req r[INLINE_BLKS];
    TestFile t;

    if (!together_open_known(&t)) {
        return;
    }
    defer_call_begin();
    together_start(r, &t, INLINE_BLKS);
    for (int i = 0; i < INLINE_BLKS; i++) {
        r[i].hook = together_next;
    }
    defer_call_end();
    together_end(r, INLINE_BLKS);
    together_end(next_reads, INLINE_BLKS);
    ASSERT_INLINE(&t, 2 * INLINE_BLKS, 0, 0, 0);
    together_close(&t);
}

/* A nested event loop waits for them before the section ends. */
static void test_together_nested(int unused)
{
    Req r[BATCH];
    TestFile t;

    if (!together_open_known(&t)) {
        return;
    }
    defer_call_begin();
    together_start(r, &t, BATCH);
    together_end(r, BATCH);
    defer_call_end();
    ASSERT_INLINE(&t, BATCH, 0, 0, 0);
    together_close(&t);
}

/* What waits for a disk must not keep what is in memory waiting. */
static void test_together_full(int unused)
{
    Req r[BATCH], slow[64];
    TestFile t, disk;

    if (!together_open_known(&t)) {
        return;
    }
    if (!file_open(&disk, NATIVE)) {
        together_close(&t);
        return;
    }
    defer_call_begin();
    for (int i = 0; i < ARRAY_SIZE(slow); i++) {
        req_init(&slow[i], BLK, 1, false);
        req_start(&slow[i], &disk, QEMU_AIO_READ, i % FILE_BLKS * BLK, 0);
    }
    together_start(r, &t, BATCH);
    defer_call_end();
    g_assert_cmpuint(calls(CALL_PREADV2), ==, BATCH);
    for (int i = 0; i < ARRAY_SIZE(slow); i++) {
        g_assert_cmpint(req_wait(&slow[i]), ==, 0);
        check(slow[i].buf, i % FILE_BLKS * BLK, BLK, 0);
        req_destroy(&slow[i]);
    }
    together_end(r, BATCH);
    ASSERT_INLINE(&t, BATCH, 0, 0, 0);
    file_stats(&disk);
    clock_go();
    file_close(&disk);
    clock_stop();
    together_close(&t);
}

static void test_together_stalls(int unused)
{
    TestFile t;

    if (!together_open_known(&t)) {
        return;
    }
    delay_next(DELAY_WAIT, file_fd(&t), 1);
    g_assert_cmpuint(together_section(&t, BATCH), ==, BATCH);
    watch_assert_slow(&t, 1);
    file_stats(&t);
    /* A worker does it for a time. */
    g_assert_cmpuint(together_section(&t, BATCH), ==, 0);
    ASSERT_INLINE(&t, 0, 0, BATCH, 0);
    together_close(&t);
}

/* In an event loop without a ring: nothing is lost, and nothing said. */
static void test_together_no_ring(int unused)
{
    TestFile t;

    if (!g_test_subprocess()) {
        g_test_trap_subprocess(NULL, 0, 0);
        g_test_trap_assert_passed();
        g_test_trap_assert_stderr_unmatched("*warning*");
        return;
    }
    if (!together_open(&t)) {
        return;
    }
    together_costs(2000, 500);
    hooks_reset();
    fault(CALL_IO_SETUP, ALWAYS, -EAGAIN);
    for (int i = 0; i < 10; i++) {
        g_assert_cmpuint(together_section(&t, BATCH), ==, 0);
    }
    g_assert_cmpuint(calls(CALL_IO_SETUP), ==, 1);
    ASSERT_INLINE(&t, 10 * BATCH, 0, 0, 0);
    together_close(&t);
}
#endif /* CONFIG_LINUX_AIO && RAW_AIO_HAVE_IOCB_FLAGS */

#ifdef CONFIG_LINUX_AIO
/*
 * No ring
 */

static void no_ring_io(void *opaque)
{
    TestFile *t = opaque;

    for (int i = 0; i < 3; i++) {
        g_assert_cmpint(file_write(t, 0, BLK, 1, 0, i), ==, 0);
        g_assert_cmpint(file_read(t, 0, BLK, 1, i), ==, 0);
        g_assert_cmpint(file_flush(t), ==, 0);
    }
}

static void test_no_ring(int err)
{
    IOThread *iothread;
    TestFile t;

    if (g_test_subprocess()) {
        fault(CALL_IO_SETUP, ALWAYS, -err);
        fault(CALL_FDATASYNC, ALWAYS, 0);
        if (!file_open(&t, NOWAIT)) {
            return;
        }
        no_ring_io(&t);
        /* Each context asks once; each request that had to do without counts */
        g_assert_cmpuint(calls(CALL_IO_SETUP), ==, 1);
        ASSERT_STATS(&t, 0, 9, 9, 0);
        iothread = iothread_new();
        run_in(iothread, no_ring_io, &t);
        iothread_join(iothread);
        g_assert_cmpuint(calls(CALL_IO_SETUP), ==, 2);
        ASSERT_STATS(&t, 0, 9, 9, 0);
        file_close(&t);

        /* Another file */
        if (file_open(&t, NOWAIT)) {
            no_ring_io(&t);
            file_close(&t);
        }
        return;
    }

    /* Whether there can be such a file at all */
    if (!file_open(&t, NOWAIT)) {
        return;
    }
    file_close(&t);

    g_test_trap_subprocess(NULL, 0, 0);
    g_test_trap_assert_passed();
    g_test_trap_assert_stderr("*warning: aio=native is not available*");
    g_test_trap_assert_stderr_unmatched("*warning*warning*");
    if (err == EAGAIN) {
        g_test_trap_assert_stderr("*fs.aio-max-nr*");
    } else {
        g_test_trap_assert_stderr_unmatched("*fs.aio-max-nr*");
    }
}

/* A ring that can't be read is asked with io_getevents(). */
static void unknown_ring_in(void *opaque)
{
    TestFile *t = opaque;

    for (int i = 0; i < 3; i++) {
        unsigned before = calls(CALL_IO_GETEVENTS);

        g_assert_cmpint(file_write(t, 0, BLK, 1, 0, i), ==, 0);
        g_assert_cmpint(file_read(t, 0, BLK, 1, i), ==, 0);
        g_assert_cmpint(file_flush(t), ==, 0);
        g_assert_cmpuint(calls(CALL_IO_GETEVENTS), >, before);
        ASSERT_STATS(t, 3, 0, 0, 0);
    }

    /* More than are fetched at a time, and nested loops */
    nested_run(NATIVE, false, false);
    nested_run(NATIVE, false, true);
}

static void test_unknown_ring(int features)
{
    IOThread *iothread;
    TestFile t;

    if (!file_open(&t, NATIVE)) {
        return;
    }
    hooks.hide_magic = !features;
    hooks.hide_features = features;
    iothread = iothread_new();
    run_in(iothread, unknown_ring_in, &t);
    iothread_join(iothread);
    file_close(&t);
}

/* An AioContext takes its ring and its workers with it. */
static int count_fds(void)
{
    int n = 0;

    for (int fd = 0; fd < 1024; fd++) {
        n += fcntl(fd, F_GETFD) != -1;
    }
    return n;
}

static void test_ring_freed(int unused)
{
    int (*do_submit)(io_context_t, long, struct iocb **) = real(CALL_IO_SUBMIT);
    int fds;
    TestFile t;

    if (!file_open(&t, NOWAIT)) {
        return;
    }
    fault(CALL_FDATASYNC, ALWAYS, 0);
    fds = count_fds();
    for (int i = 0; i < 20; i++) {
        IOThread *iothread = iothread_new();

        run_in(iothread, no_ring_io, &t);
        g_assert_cmpint(do_submit(hooks.last_ring, 0, NULL), ==, 0);
        iothread_join(iothread);
        /* The kernel does not know it any more. */
        g_assert_cmpint(do_submit(hooks.last_ring, 0, NULL), ==, -EINVAL);
    }
    g_assert_cmpuint(calls(CALL_IO_SETUP), ==, 20);
    g_assert_cmpint(count_fds(), ==, fds);
    file_close(&t);
}

/* A ring that is known needs no system call. */
static void test_known_ring(int unused)
{
    TestFile t;

    if (!file_open(&t, NATIVE)) {
        return;
    }
    g_assert_cmpint(file_read(&t, 0, BLK, 1, 0), ==, 0);
    g_assert_cmpuint(calls(CALL_IO_GETEVENTS), ==, 0);
    file_close(&t);
}

/*
 * Zoned devices: a write is sent once
 */

static void test_zoned_native(int type)
{
    const size_t len = 4 * BLK;
    TestFile t;

    if (!file_open(&t, NOWAIT)) {
        return;
    }
    type |= RAW_AIO_ZONED;

    for (int i = 0; i < 2; i++) {
        t.coroutine = i;
        hooks_reset();
        g_assert_cmpint(file_rw(&t, type, 0, len, 4, 0, 1), ==, 0);
        check_file(&t, 0, len, 1);
        g_assert_cmpuint(iocbs(IO_CMD_PWRITEV, 0), ==, 1);
        g_assert_cmpuint(iocbs(IO_CMD_PWRITEV, 1), ==, 0);
        ASSERT_STATS(&t, 1, 0, 0, 0);

        /* Short */
        hooks_reset();
        refuse_iocb(IO_CMD_PWRITEV, -1, 0, 1, BLK);
        g_assert_cmpint(file_rw(&t, type, 0, len, 4, 0, 2), ==, -EIO);
        g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 1);
        g_assert_cmpuint(calls(CALL_ANY_WRITE), ==, 0);
        check_file(&t, BLK, len - BLK, 1);
        ASSERT_STATS(&t, 1, 0, 0, 1);
    }
    t.coroutine = false;

    /* No progress */
    hooks_reset();
    forge_iocb(IO_CMD_PWRITEV, -1, 0, 1, 0);
    g_assert_cmpint(file_rw(&t, type, 0, len, 4, 0, 1), <, 0);
    g_assert_cmpuint(calls(CALL_ANY_WRITE), ==, 0);

    /* Errors after io_submit() */
    for (int i = 0; i < 5; i++) {
        static const int errors[] = {
            EIO, EINVAL, EOPNOTSUPP, EAGAIN, ENOSPC
        };

        hooks_reset();
        forge_iocb(IO_CMD_PWRITEV, -1, 0, 1, -errors[i]);
        g_assert_cmpint(file_rw(&t, type, 0, len, 4, 0, 1), ==, -errors[i]);
        g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 1);
        g_assert_cmpuint(calls(CALL_ANY_WRITE), ==, 0);
    }

    /* Refused by io_submit(): nothing has moved, so the pool may try. */
    for (int i = 0; i < 3; i++) {
        static const int errors[] = { EIO, EINVAL, EAGAIN };

        raw_aio_set_fd(&t.f, reopen(&t, NOWAIT));
        hooks_reset();
        refuse_iocb(IO_CMD_PWRITEV, -1, 0, 1, -errors[i]);
        g_assert_cmpint(file_rw(&t, type, 0, len, 4, 0, 3 + i), ==, 0);
        check_file(&t, 0, len, 3 + i);
        g_assert_cmpuint(calls(CALL_ANY_WRITE), ==, 1);
    }

    /* Reads are as ever: with the flag, if there is one, and continued. */
    raw_aio_set_fd(&t.f, reopen(&t, NOWAIT));
    hooks_reset();
    refuse_iocb(IO_CMD_PREADV, -1, 0, 1, BLK);
    g_assert_cmpint(file_rw(&t, QEMU_AIO_READ | RAW_AIO_ZONED, 0, len, 4, 0,
                            5), ==, 0);
    g_assert_cmpuint(iocbs(IO_CMD_PREADV, RAW_AIO_HAVE_IOCB_FLAGS), ==,
                     1);
    g_assert_cmpuint(calls(CALL_ANY_READ), ==, 1);
    file_close(&t);
}
#endif /* CONFIG_LINUX_AIO */

static void test_zoned_pool(int type)
{
    const size_t len = 4 * BLK;
    TestFile t;

    if (!file_open(&t, DIRECT)) {
        return;
    }
    type |= RAW_AIO_ZONED;

    /* One call, also when there is no pwritev(), a bounce buffer, or FUA */
    for (int i = 0; i < 32; i++) {
        int type1 = type | (i & 1 ? QEMU_AIO_MISALIGNED : 0);
        int niov = i & 2 ? 4 : 1;
        BdrvRequestFlags flags = i & 8 ? BDRV_REQ_FUA : 0;

        t.coroutine = i & 16;
        disable(&t, i & 4 ? RAW_AIO_DISABLE_PREADV : 0);
        hooks_reset();
        fault(CALL_FDATASYNC, ALWAYS, 0);
        g_assert_cmpint(file_rw(&t, type1, 0, len, niov, flags, 1), ==, 0);
        check_file(&t, 0, len, 1);
        g_assert_cmpuint(calls(CALL_ANY_WRITE), ==, 1);
        g_assert_cmpuint(calls(CALL_FDATASYNC), ==, flags ? 1 : 0);
        ASSERT_STATS(&t, 0, 0, 1, 0);

        hooks_reset();
        fault(CALL_ANY_WRITE, 1, BLK);
        g_assert_cmpint(file_rw(&t, type1, 0, len, niov, flags, 2), ==, -EIO);
        g_assert_cmpuint(calls(CALL_ANY_WRITE), ==, 1);
        check_file(&t, 0, BLK, 2);
        check_file(&t, BLK, len - BLK, 1);
        ASSERT_STATS(&t, 0, 0, 1, 1);

        for (int j = 0; j < 3; j++) {
            static const int errors[] = { EIO, EINVAL, EOPNOTSUPP };

            hooks_reset();
            fault(CALL_ANY_WRITE, 1, -errors[j]);
            g_assert_cmpint(file_rw(&t, type1, 0, len, niov, flags, 1), ==,
                            -errors[j]);
            g_assert_cmpuint(calls(CALL_ANY_WRITE), ==, 1);
        }
        hooks_reset();
        fault(CALL_ANY_WRITE, 1, 0);
        g_assert_cmpint(file_rw(&t, type1, 0, len, niov, flags, 1), <, 0);
        g_assert_cmpuint(calls(CALL_ANY_WRITE), ==, 1);
        file_stats(&t);
    }

    disable(&t, 0);
    hooks_reset();
    g_assert_cmpint(file_write(&t, 0, len, 4, 0, 7), ==, 0);
    fault(CALL_ANY_READ, 2, BLK);
    g_assert_cmpint(file_rw(&t, QEMU_AIO_READ | RAW_AIO_ZONED, 0, len, 4, 0,
                            7), ==, 0);
    g_assert_cmpuint(calls(CALL_ANY_READ), ==, 3);
    file_close(&t);
}

/*
 * QEMU_RAW_AIO_DISABLE
 */

static unsigned parse_switches(const char *list)
{
    unsigned disabled;
    RawAIOFile f;

    g_setenv("QEMU_RAW_AIO_DISABLE", list, true);
    raw_aio_open(&f, open("/dev/null", O_RDWR), false, 0);
    g_unsetenv("QEMU_RAW_AIO_DISABLE");
    disabled = f.disabled;
    raw_aio_close(&f);
    return disabled;
}

static void test_switches(int unused)
{
    if (g_test_subprocess()) {
        g_assert_cmphex(parse_switches("native,nosuchtier,nowait"), ==,
                        RAW_AIO_DISABLE_NATIVE | RAW_AIO_DISABLE_NOWAIT);
        return;
    }

    g_assert_cmphex(parse_switches(""), ==, 0);
    g_assert_cmphex(parse_switches("inline"), ==, RAW_AIO_DISABLE_INLINE);
    g_assert_cmphex(parse_switches("native"), ==, RAW_AIO_DISABLE_NATIVE);
    g_assert_cmphex(parse_switches("nowait"), ==, RAW_AIO_DISABLE_NOWAIT);
    g_assert_cmphex(parse_switches("preadv"), ==, RAW_AIO_DISABLE_PREADV);
    g_assert_cmphex(parse_switches("preadv,inline,nowait,native"), ==,
                    RAW_AIO_DISABLE_INLINE | RAW_AIO_DISABLE_NATIVE |
                    RAW_AIO_DISABLE_NOWAIT | RAW_AIO_DISABLE_PREADV);
    g_assert_cmphex(parse_switches(",native,"), ==, RAW_AIO_DISABLE_NATIVE);
    g_assert_cmphex(parse_switches("iocbv"), ==, RAW_AIO_DISABLE_IOCBV);
    g_assert_cmphex(parse_switches("batch"), ==, RAW_AIO_DISABLE_BATCH);

    g_test_trap_subprocess(NULL, 0, 0);
    g_test_trap_assert_passed();
    g_test_trap_assert_stderr("*warning*'nosuchtier'*native*");
    g_test_trap_assert_stderr_unmatched("*warning*warning*");
}

#ifdef CONFIG_LINUX_AIO
static void test_switch_native(int unused)
{
    TestFile t;

    if (!file_open(&t, NOWAIT)) {
        return;
    }
    disable(&t, RAW_AIO_DISABLE_NATIVE);
    g_assert_cmpint(file_read(&t, 0, BLK, 1, 0), ==, 0);
    g_assert_cmpint(file_flush(&t), ==, 0);
    g_assert_cmpuint(calls(CALL_IO_SUBMIT), ==, 0);
    ASSERT_STATS(&t, 0, 0, 2, 0);

    disable(&t, RAW_AIO_DISABLE_NOWAIT);
    g_assert_cmpint(file_read(&t, 0, BLK, 1, 0), ==, 0);
    g_assert_cmpint(file_write(&t, 0, BLK, 1, 0, 0), ==, 0);
    g_assert_cmpuint(iocbs(IOCB_READ, 1), ==, 0);
    g_assert_cmpuint(iocbs(IOCB_WRITE, 1), ==, 0);
    ASSERT_STATS(&t, 2, 0, 0, 0);
    file_close(&t);
}
#endif

/*
 * Load: each slot has a part of the file for itself, of which it knows what is
 * in it, and one random request in flight.
 */

#define SLOT_SIZE (4 * BLK)
#define SLOTS (FILE_SIZE / SLOT_SIZE)

typedef struct Load Load;

typedef struct Slot {
    Load *load;
    AioContext *ctx;
    GRand *rand;
    int64_t base;
    uint8_t model[SLOT_SIZE];
    uint8_t *mem;
    uint8_t *data;      /* of the present request, in one piece */
    QEMUIOVector qiov;
    int type;
    BdrvRequestFlags flags;
    size_t start;
    size_t len;
    bool in_flight;
    bool cancelled;
    int to_do;          /* requests */
    uint64_t sent;
    uint64_t nr_cancelled;
} Slot;

struct Load {
    TestFile t;
    bool faults;
    bool misses;        /* faults, but only of the inline tier */
    bool read_only;
    bool coroutine;     /* each slot is one */
    bool stop;          /* atomic */
    int running;        /* slots; main thread */
    Slot slots[SLOTS];
};

static void slot_finished_bh(void *opaque)
{
    Load *load = opaque;

    load->running--;
}

static void slot_verify(Slot *s, int ret)
{
    if (s->cancelled && ret == -ECANCELED) {
        s->nr_cancelled++;
        return;
    }
    g_assert_cmpint(ret, ==, 0);
    if (s->type & QEMU_AIO_READ) {
        qemu_iovec_to_buf(&s->qiov, 0, s->data, s->len);
        g_assert(!memcmp(s->data, s->model + s->start, s->len));
    } else if (s->type & QEMU_AIO_WRITE) {
        memcpy(s->model + s->start, s->data, s->len);
    }
}

/* Make up a request.  Returns false when there are to be no more. */
static bool slot_prepare(Slot *s)
{
    Load *load = s->load;
    bool direct = kind_direct(load->t.kind);
    int unit = direct ? BLK : 1;
    int what = load->read_only ? 0 : g_rand_int_range(s->rand, 0, 16);
    bool odd = direct && g_rand_int_range(s->rand, 0, 4) == 0;
    int niov = g_rand_int_range(s->rand, 1, 5);
    size_t pos = 0;

    if (!s->to_do || qatomic_read(&load->stop)) {
        aio_bh_schedule_oneshot(qemu_get_aio_context(), slot_finished_bh,
                                load);
        return false;
    }
    s->to_do--;
    s->sent++;
    s->start = g_rand_int_range(s->rand, 0, SLOT_SIZE / unit) * unit;
    s->len = g_rand_int_range(s->rand, 1, (SLOT_SIZE - s->start) / unit + 1) *
             unit;
    s->type = what == 15 ? QEMU_AIO_FLUSH
            : what >= 7 ? QEMU_AIO_WRITE : QEMU_AIO_READ;
    s->flags = s->type == QEMU_AIO_WRITE && load->faults && what == 14
             ? BDRV_REQ_FUA : 0;

    /* Parts of any size in memory that does not suit, or in one that does */
    qemu_iovec_init(&s->qiov, niov);
    for (int i = 0; i < niov && pos < s->len; i++) {
        int part_unit = odd ? 1 : unit;
        size_t left = (s->len - pos) / part_unit;
        size_t part = i == niov - 1
                    ? left : g_rand_int_range(s->rand, 1, left + 1);

        qemu_iovec_add(&s->qiov, s->mem + odd + pos, part * part_unit);
        pos += part * part_unit;
    }
    if (s->type & QEMU_AIO_WRITE) {
        uint32_t seed = g_rand_int(s->rand);

        for (size_t i = 0; i < s->len; i++) {
            s->data[i] = seed + i * 13;
        }
        qemu_iovec_from_buf(&s->qiov, 0, s->data, s->len);
    } else {
        memset(s->mem, 0xaa, SLOT_SIZE + BLK);
    }
    if (odd) {
        s->type |= QEMU_AIO_MISALIGNED;
    }
    s->in_flight = true;
    return true;
}

static void slot_done(Slot *s, int ret)
{
    g_assert_cmpint(in_engine, ==, 0);
    g_assert(qemu_get_current_aio_context() == s->ctx);
    g_assert(s->in_flight);
    s->in_flight = false;
    slot_verify(s, ret);
    qemu_iovec_destroy(&s->qiov);
}

static void slot_next(Slot *s);

static void slot_cb(void *opaque, int ret)
{
    Slot *s = opaque;

    slot_done(s, ret);
    slot_next(s);
}

static void slot_next(Slot *s)
{
    Load *load = s->load;
    BlockAIOCB *acb;

    if (!slot_prepare(s)) {
        return;
    }
    in_engine++;
    acb = raw_aio_submit(&load->t.f, s->type, s->base + s->start,
                         s->type & QEMU_AIO_FLUSH ? NULL : &s->qiov, s->flags,
                         slot_cb, s);
    s->cancelled = load->faults && g_rand_int_range(s->rand, 0, 16) == 0;
    if (s->cancelled) {
        bdrv_aio_cancel_async(acb);
    }
    in_engine--;
}

static void coroutine_fn slot_co_entry(void *opaque)
{
    Slot *s = opaque;
    RawAIOFile *f = &s->load->t.f;

    while (slot_prepare(s)) {
        int ret;

        if (s->type & QEMU_AIO_FLUSH) {
            ret = raw_aio_co_flush(f);
        } else {
            ret = raw_aio_co_rw(f, s->type, s->base + s->start, &s->qiov,
                                s->flags);
        }
        slot_done(s, ret);
    }
}

static void slot_start_bh(void *opaque)
{
    Slot *s = opaque;

    if (s->load->coroutine) {
        qemu_coroutine_enter(qemu_coroutine_create(slot_co_entry, s));
    } else {
        slot_next(s);
    }
}

static bool load_start(Load *load, Kind kind, IOThread **iothreads,
                       int nr_iothreads, bool use_main, int requests)
{
    int nr_ctx = nr_iothreads + use_main;

    if (!file_open(&load->t, kind)) {
        return false;
    }
    load->running = SLOTS;
    for (int i = 0; i < SLOTS; i++) {
        Slot *s = &load->slots[i];
        int ctx = i % nr_ctx;

        s->load = load;
        s->ctx = ctx < nr_iothreads ? iothread_get_aio_context(iothreads[ctx])
                                    : qemu_get_aio_context();
        s->rand = g_rand_new_with_seed(g_test_rand_int());
        s->base = i * SLOT_SIZE;
        fill(s->model, s->base, SLOT_SIZE, 0);
        s->mem = qemu_memalign(BLK, SLOT_SIZE + BLK);
        s->data = g_malloc(SLOT_SIZE);
        s->to_do = requests;
    }
    if (load->faults || load->misses) {
        hooks.chaos_unit = kind_direct(kind) ? BLK : 1;
        hooks.chaos_misses = !load->faults;
        hooks.chaos = g_test_rand_int() | 1;
    }
    for (int i = 0; i < SLOTS; i++) {
        aio_bh_schedule_oneshot(load->slots[i].ctx, slot_start_bh,
                                &load->slots[i]);
    }
    return true;
}

static void load_end(Load *load)
{
    uint64_t sent = 0, cancelled = 0;
    Stats s;

    while (load->running) {
        aio_poll(qemu_get_aio_context(), true);
    }
    hooks_reset();
    for (int i = 0; i < SLOTS; i++) {
        Slot *slot = &load->slots[i];
        g_autofree uint8_t *buf = g_malloc(SLOT_SIZE);

        g_assert(!slot->in_flight);
        g_assert_cmpint(pread(load->t.check_fd, buf, SLOT_SIZE, slot->base),
                        ==, SLOT_SIZE);
        g_assert(!memcmp(buf, slot->model, SLOT_SIZE));
        sent += slot->sent;
        cancelled += slot->nr_cancelled;
        g_rand_free(slot->rand);
        g_free(slot->data);
        qemu_vfree(slot->mem);
    }

    s = file_stats(&load->t);
    g_assert_cmpuint(s.in + s.native + s.pool, ==, sent - cancelled);
    if (kind_inline(load->t.kind)) {
        g_assert_cmpuint(s.in, >, 0);
        g_assert_cmpuint(s.in_refused, >, 0);
    }
    g_test_message("%" PRIu64 " requests: %" PRIu64 " inline, %" PRIu64
                   " native, %" PRIu64 " pool, %" PRIu64 " refused, %" PRIu64
                   " short, %" PRIu64 " cancelled", sent, s.in, s.native,
                   s.pool, s.refused + s.in_refused, s.cut, cancelled);
    file_close(&load->t);
}

/* The callback form, unless this is added to the kind */
#define IN_COROUTINE 0x100

/* One file, used in the main loop and in three IOThreads at once */
static void test_contexts(int arg)
{
    Kind kind = arg & ~IN_COROUTINE;
    g_autofree Load *load = g_new0(Load, 1);
    IOThread *iothreads[3];

    load->coroutine = arg & IN_COROUTINE;
    load->misses = kind_inline(kind);
    for (int i = 0; i < 3; i++) {
        iothreads[i] = iothread_new();
    }
    fault(CALL_FDATASYNC, ALWAYS, 0);
    if (load_start(load, kind, iothreads, 3, true, 150)) {
        load_end(load);
    }
    for (int i = 0; i < 3; i++) {
        iothread_join(iothreads[i]);
    }
}

/* The descriptor changes all the time while two IOThreads read. */
static void test_descriptor_stress(int arg)
{
    Kind kind = arg & ~IN_COROUTINE;
    g_autofree Load *load = g_new0(Load, 1);
    IOThread *iothreads[2];

    for (int i = 0; i < 2; i++) {
        iothreads[i] = iothread_new();
    }
    load->coroutine = arg & IN_COROUTINE;
    load->misses = kind_inline(kind);
    load->read_only = true;
    if (load_start(load, kind, iothreads, 2, false, INT_MAX)) {
        for (int i = 0; i < 1000; i++) {
            Kind other = kind_direct(kind) && i % 3 ? kind : BUFFERED;

            raw_aio_set_fd(&load->t.f, reopen(&load->t, other));
            if (i % 50 == 0) {
                g_usleep(1000);
            }
        }
        qatomic_set(&load->stop, true);
        load_end(load);
    }
    for (int i = 0; i < 2; i++) {
        iothread_join(iothreads[i]);
    }
}

static void fuzz_set_fd_timer(void *opaque)
{
    Load *load = opaque;

    /* The same kind, but nothing is known about it. */
    raw_aio_set_fd(&load->t.f, reopen(&load->t, load->t.kind));
}

static void fuzz_run(int arg, IOThread **iothreads, int nr_iothreads, int ms)
{
    g_autofree Load *load = g_new0(Load, 1);
    int64_t end = g_get_monotonic_time() + ms * 1000;
    QEMUTimer *timer;

    load->coroutine = arg & IN_COROUTINE;
    load->faults = true;
    if (!load_start(load, arg & ~IN_COROUTINE, iothreads, nr_iothreads,
                    nr_iothreads == 0, INT_MAX)) {
        return;
    }
    timer = aio_timer_new(qemu_get_aio_context(), QEMU_CLOCK_REALTIME, SCALE_MS,
                          fuzz_set_fd_timer, load);
    while (g_get_monotonic_time() < end) {
        if (!timer_pending(timer)) {
            timer_mod(timer, qemu_clock_get_ms(QEMU_CLOCK_REALTIME) + 5);
        }
        aio_poll(qemu_get_aio_context(), true);
    }
    timer_free(timer);
    qatomic_set(&load->stop, true);
    load_end(load);
}

static void test_fuzz(int arg)
{
    IOThread *iothreads[3];

    fuzz_run(arg, NULL, 0, 300);
    for (int i = 0; i < 3; i++) {
        iothreads[i] = iothread_new();
    }
    hooks_reset();
    fuzz_run(arg, iothreads, 3, 300);
    for (int i = 0; i < 3; i++) {
        iothread_join(iothreads[i]);
    }
}

static const struct TestCase {
    const char *path;
    void (*func)(int arg);
    int arg;
    bool iothread;      /* in a new one, while the main loop stands still */
} tests[] = {
    { "/raw-aio/data/buffered", test_data, BUFFERED },
    { "/raw-aio/data/buffered-native", test_data, BUFFERED_NATIVE },
    { "/raw-aio/data/direct", test_data, DIRECT },
    { "/raw-aio/data/native", test_data, NATIVE },
    { "/raw-aio/data/nowait", test_data, NOWAIT },
    { "/raw-aio/data/real", test_data, REAL },
    { "/raw-aio/data/empty-element/buffered", test_data_empty_element,
      BUFFERED },
    { "/raw-aio/data/empty-element/native", test_data_empty_element, NATIVE },
    { "/raw-aio/data/empty-element/inline", test_data_empty_element, INLINE },
    { "/raw-aio/short/buffered", test_short_buffered },
    { "/raw-aio/short/direct", test_short_direct },
#ifdef CONFIG_LINUX_AIO
    { "/raw-aio/short/native", test_short_native, NATIVE },
    { "/raw-aio/short/nowait", test_short_native, NOWAIT },
#endif
    { "/raw-aio/eof/buffered", test_eof, BUFFERED },
    { "/raw-aio/eof/inline", test_eof, INLINE },
    { "/raw-aio/eof/direct", test_eof, DIRECT },
    { "/raw-aio/eof/native", test_eof, NATIVE },
    { "/raw-aio/eof/nowait", test_eof, NOWAIT },
    { "/raw-aio/eof/real", test_eof, REAL },
    { "/raw-aio/eof/einval-inside/buffered", test_eof_einval_inside, BUFFERED },
    { "/raw-aio/eof/einval-inside/direct", test_eof_einval_inside, DIRECT },
#ifdef CONFIG_LINUX_AIO
    { "/raw-aio/eof/einval-inside/native", test_eof_einval_inside_native },
#endif
    { "/raw-aio/errors/buffered", test_errors, BUFFERED },
    { "/raw-aio/errors/direct", test_errors, DIRECT },
#ifdef CONFIG_LINUX_AIO
    { "/raw-aio/errors/native", test_errors_native },
#if RAW_AIO_HAVE_IOCB_FLAGS
    { "/raw-aio/errors/nowait", test_errors_nowait },
#endif
#endif
    { "/raw-aio/fua/buffered", test_fua_buffered, BUFFERED },
    { "/raw-aio/fua/buffered-native", test_fua_buffered, BUFFERED_NATIVE },
    { "/raw-aio/fua/inline", test_fua_buffered, INLINE },
#if RAW_AIO_HAVE_RWF
    { "/raw-aio/fua/direct", test_fua_direct, DIRECT },
    { "/raw-aio/fua/native", test_fua_direct, NATIVE },
#endif
    { "/raw-aio/flush/memory", test_flush_memory, false },
    { "/raw-aio/flush/memory-fua", test_flush_memory, true },
    { "/raw-aio/flush/concurrent/ok", test_flush_concurrent, 0 },
    { "/raw-aio/flush/concurrent/eio", test_flush_concurrent, EIO },
    { "/raw-aio/flush/memory-then-direct/threads",
      test_flush_memory_then_direct, false },
    { "/raw-aio/flush/memory-then-direct/native",
      test_flush_memory_then_direct, true },
    { "/raw-aio/flush/direct", test_flush_direct },
#ifdef CONFIG_LINUX_AIO
    { "/raw-aio/flush/native", test_flush_native },
    { "/raw-aio/flush/buffered-native", test_flush_buffered_native },
    { "/raw-aio/refused/native", test_refused, NATIVE },
    { "/raw-aio/refused/nowait", test_refused, NOWAIT },
    { "/raw-aio/learning/einval", test_learning, EINVAL },
    { "/raw-aio/learning/eopnotsupp", test_learning, EOPNOTSUPP },
    { "/raw-aio/learning/enosys", test_learning, ENOSYS },
    { "/raw-aio/learning/eagain", test_learning, EAGAIN },
    { "/raw-aio/learning/enomem", test_learning, ENOMEM },
    { "/raw-aio/submit/some", test_submit_some },
    { "/raw-aio/submit/middle/einval", test_submit_middle, EINVAL },
    { "/raw-aio/submit/middle/eagain", test_submit_middle, EAGAIN },
    { "/raw-aio/submit/error/einval", test_submit_error, EINVAL },
    { "/raw-aio/submit/error/ebadf", test_submit_error, EBADF },
    { "/raw-aio/submit/error/enomem", test_submit_error, ENOMEM },
    { "/raw-aio/submit/again/eagain", test_submit_again, EAGAIN },
    { "/raw-aio/submit/again/eintr", test_submit_again, EINTR },
    { "/raw-aio/submit/again-alone/eagain", test_submit_again_alone, EAGAIN },
    { "/raw-aio/submit/again-alone/eintr", test_submit_again_alone, EINTR },
    { "/raw-aio/submit/never/eagain", test_submit_never, EAGAIN },
    { "/raw-aio/submit/never/zero", test_submit_never, 0 },
    { "/raw-aio/submit/batch", test_submit_batch },
#endif
    { "/raw-aio/cancel/pool", test_cancel_pool, BUFFERED },
    { "/raw-aio/cancel/pool-sync", test_cancel_pool_sync, BUFFERED },
#ifdef CONFIG_LINUX_AIO
    { "/raw-aio/cancel/native", test_cancel_native, false },
    { "/raw-aio/cancel/native-sync", test_cancel_native, true },
    { "/raw-aio/cancel/rest/running", test_cancel_rest, false },
    { "/raw-aio/cancel/rest/queued", test_cancel_rest, true },
#endif
    { "/raw-aio/descriptor/buffered", test_descriptor, BUFFERED },
    { "/raw-aio/descriptor/direct", test_descriptor, DIRECT },
#ifdef CONFIG_LINUX_AIO
    { "/raw-aio/descriptor/flags", test_descriptor_flags },
#endif
    { "/raw-aio/descriptor/stress/buffered", test_descriptor_stress, BUFFERED },
#if RAW_AIO_HAVE_RWF
    { "/raw-aio/descriptor/stress/inline", test_descriptor_stress, INLINE },
    { "/raw-aio/descriptor/stress/inline-native", test_descriptor_stress,
      INLINE_NATIVE },
    { "/raw-aio/descriptor/stress/inline-coroutine", test_descriptor_stress,
      INLINE | IN_COROUTINE },
#endif
    { "/raw-aio/descriptor/stress/direct", test_descriptor_stress, DIRECT },
    { "/raw-aio/descriptor/stress/real", test_descriptor_stress, REAL },
    { "/raw-aio/run/no-file", test_run, false },
    { "/raw-aio/run/file", test_run, true },
    { "/raw-aio/nested/buffered", test_nested, BUFFERED },
    { "/raw-aio/nested/inline", test_nested, INLINE },
    { "/raw-aio/nested/inline-native", test_nested, INLINE_NATIVE },
    { "/raw-aio/nested/native", test_nested, NATIVE },
    { "/raw-aio/nested/nowait", test_nested, NOWAIT },
    { "/raw-aio/nested/real", test_nested, REAL },
    { "/raw-aio/nested/section/buffered", test_nested_section, BUFFERED },
    { "/raw-aio/nested/section/inline", test_nested_section, INLINE },
    { "/raw-aio/nested/section/inline-native", test_nested_section,
      INLINE_NATIVE },
    { "/raw-aio/nested/section/native", test_nested_section, NATIVE },
#ifdef CONFIG_LINUX_AIO
    { "/raw-aio/nested/blocked/eagain-wait", test_nested_blocked, 0, true },
    { "/raw-aio/nested/blocked/full-wait", test_nested_blocked, 1, true },
    { "/raw-aio/nested/blocked/eagain-send", test_nested_blocked, 2, true },
    { "/raw-aio/nested/blocked/full-send", test_nested_blocked, 3, true },
#endif
    { "/raw-aio/depth/buffered", test_depth, BUFFERED },
    { "/raw-aio/depth/inline", test_depth, INLINE },
    { "/raw-aio/depth/inline-native", test_depth, INLINE_NATIVE },
    { "/raw-aio/depth/native", test_depth, NATIVE },
    { "/raw-aio/chain/buffered", test_chain, BUFFERED },
    { "/raw-aio/chain/inline", test_chain, INLINE },
    { "/raw-aio/chain/inline-native", test_chain, INLINE_NATIVE },
    { "/raw-aio/chain/native", test_chain, NATIVE },
#ifdef CONFIG_LINUX_AIO
    { "/raw-aio/depth/vector", test_depth, NATIVE | DEEP_VECTOR },
    { "/raw-aio/depth/array", test_depth, NATIVE | DEEP_ARRAY },
    { "/raw-aio/chain/vector", test_chain, NATIVE | DEEP_VECTOR },
    { "/raw-aio/chain/array", test_chain, NATIVE | DEEP_ARRAY },
#if RAW_AIO_HAVE_IOCB_FLAGS
    { "/raw-aio/depth/by-worker", test_depth, NOWAIT | DEEP_WORKER },
    { "/raw-aio/chain/by-worker", test_chain, NOWAIT | DEEP_WORKER },
#endif
#endif
    { "/raw-aio/bounded/buffered", test_bounded, BUFFERED },
    { "/raw-aio/bounded/inline", test_bounded, INLINE },
    { "/raw-aio/bounded/inline-native", test_bounded, INLINE_NATIVE },
    { "/raw-aio/bounded/native", test_bounded, NATIVE },
    { "/raw-aio/bounded/real", test_bounded, REAL },
#if RAW_AIO_HAVE_RWF
    { "/raw-aio/inline/hit/threads", test_inline_hit, INLINE },
    { "/raw-aio/inline/hit/threads-iothread", test_inline_hit, INLINE, true },
    { "/raw-aio/inline/hit/native", test_inline_hit, INLINE_NATIVE },
    { "/raw-aio/inline/hit/native-iothread", test_inline_hit, INLINE_NATIVE,
      true },
    { "/raw-aio/inline/hit/real", test_inline_real },
    { "/raw-aio/inline/hit/real-iothread", test_inline_real, 0, true },
    { "/raw-aio/inline/errors/main", test_inline_errors },
    { "/raw-aio/inline/errors/iothread", test_inline_errors, 0, true },
    { "/raw-aio/inline/short/main", test_inline_short },
    { "/raw-aio/inline/short/iothread", test_inline_short, 0, true },
    { "/raw-aio/inline/eof/main", test_inline_eof },
    { "/raw-aio/inline/eof/iothread", test_inline_eof, 0, true },
    { "/raw-aio/inline/never/main", test_inline_never },
    { "/raw-aio/inline/never/iothread", test_inline_never, 0, true },
    { "/raw-aio/inline/budget", test_inline_budget },
    { "/raw-aio/inline/large/callback", test_inline_large, false },
    { "/raw-aio/inline/large/coroutine", test_inline_large, true },
    { "/raw-aio/inline/order", test_inline_order },
    { "/raw-aio/inline/turns/callback", test_inline_turns, CHAIN_CALLBACK },
    { "/raw-aio/inline/turns/loop", test_inline_turns, CHAIN_LOOP },
    { "/raw-aio/inline/turns/create", test_inline_turns, CHAIN_CREATE },
    { "/raw-aio/inline/turns/token", test_inline_turns, CHAIN_TOKEN },
    { "/raw-aio/inline/turns/main-loop/callback", test_inline_turns,
      CHAIN_MAIN_LOOP | CHAIN_CALLBACK },
    { "/raw-aio/inline/turns/main-loop/loop", test_inline_turns,
      CHAIN_MAIN_LOOP | CHAIN_LOOP },
    { "/raw-aio/inline/turns/main-loop/create", test_inline_turns,
      CHAIN_MAIN_LOOP | CHAIN_CREATE },
    { "/raw-aio/inline/turns/main-loop/token", test_inline_turns,
      CHAIN_MAIN_LOOP | CHAIN_TOKEN },
    { "/raw-aio/inline/adapt/read/main", test_inline_adapt, 0 },
    { "/raw-aio/inline/adapt/read/iothread", test_inline_adapt, 0, true },
    { "/raw-aio/inline/adapt/write", test_inline_adapt, 1, true },
    { "/raw-aio/inline/begun/threads", test_inline_begun, INLINE },
    { "/raw-aio/inline/begun/threads-iothread", test_inline_begun, INLINE,
      true },
    { "/raw-aio/inline/begun/native", test_inline_begun, INLINE_NATIVE },
    { "/raw-aio/inline/begun/old-kernel", test_inline_not_begun },
    { "/raw-aio/inline/cancel/hit/main", test_inline_cancel },
    { "/raw-aio/inline/cancel/hit/iothread", test_inline_cancel, 0, true },
    { "/raw-aio/inline/cancel/running/main", test_inline_cancel_rest, false },
    { "/raw-aio/inline/cancel/running/iothread", test_inline_cancel_rest,
      false, true },
    { "/raw-aio/inline/cancel/queued/main", test_inline_cancel_rest, true },
    { "/raw-aio/inline/cancel/queued/iothread", test_inline_cancel_rest, true,
      true },
    { "/raw-aio/inline/descriptor/main", test_inline_descriptor },
    { "/raw-aio/inline/descriptor/iothread", test_inline_descriptor, 0, true },
    { "/raw-aio/inline/nested", test_inline_nested },
#ifdef CONFIG_TRACE_LOG
    { "/raw-aio/inline/trace/vain", test_inline_trace, true },
    { "/raw-aio/inline/trace/turn", test_inline_trace, false },
#endif
    { "/raw-aio/watch/inline/main", test_watch, INLINE },
    { "/raw-aio/watch/inline/iothread", test_watch, INLINE, true },
    { "/raw-aio/watch/thread", test_watch_thread },
    { "/raw-aio/watch/real/inline", test_watch_real, INLINE },
    { "/raw-aio/watch/again/inline", test_watch_again, INLINE },
#endif
#ifdef CONFIG_LINUX_AIO
#if RAW_AIO_HAVE_IOCB_FLAGS
    { "/raw-aio/together/choice/callback", test_together_choice, false },
    { "/raw-aio/together/choice/coroutine", test_together_choice, true, true },
    { "/raw-aio/together/outlier", test_together_outlier },
    { "/raw-aio/together/few", test_together_few },
    { "/raw-aio/together/misses/result", test_together_misses, false },
    { "/raw-aio/together/misses/submit", test_together_misses, true },
    { "/raw-aio/together/short", test_together_short },
    { "/raw-aio/together/refused", test_together_refused },
    { "/raw-aio/together/begun", test_together_begun },
    { "/raw-aio/together/cancel", test_together_cancel },
    { "/raw-aio/together/nested/main", test_together_nested },
    { "/raw-aio/together/nested/iothread", test_together_nested, 0, true },
    { "/raw-aio/together/full", test_together_full, 0, true },
    { "/raw-aio/together/turn", test_together_turn, 0, true },
    { "/raw-aio/together/stalls", test_together_stalls },
    { "/raw-aio/together/no-ring", test_together_no_ring },
    { "/raw-aio/by-worker/answers", test_by_worker },
    { "/raw-aio/by-worker/answers-iothread", test_by_worker, 0, true },
    { "/raw-aio/by-worker/refused/eagain", test_by_worker_refused, EAGAIN,
      true },
    { "/raw-aio/by-worker/refused/eintr", test_by_worker_refused, EINTR, true },
    { "/raw-aio/by-worker/refused/eio", test_by_worker_refused, EIO, true },
    { "/raw-aio/by-worker/refused/enosys", test_by_worker_refused, ENOSYS,
      true },
    { "/raw-aio/by-worker/refused/zero", test_by_worker_refused, 0, true },
    { "/raw-aio/by-worker/order", test_by_worker_order },
    { "/raw-aio/by-worker/order-iothread", test_by_worker_order, 0, true },
    { "/raw-aio/by-worker/cancel", test_by_worker_cancel, 0, true },
    { "/raw-aio/by-worker/full", test_by_worker_full, 0, true },
    { "/raw-aio/by-worker/nested", test_by_worker_nested },
    { "/raw-aio/by-worker/nested-iothread", test_by_worker_nested, 0, true },
    { "/raw-aio/by-worker/hint", test_by_worker_hint },
#endif
    { "/raw-aio/array/places/read", test_array_places, false, true },
    { "/raw-aio/array/places/write", test_array_places, true, true },
    { "/raw-aio/array/random", test_array_random, 0, true },
    { "/raw-aio/array/many", test_array_many, 0, true },
    { "/raw-aio/array/cancel", test_array_cancel, 0, true },
    { "/raw-aio/array/engine/native", test_array_engine, NATIVE },
#if RAW_AIO_HAVE_IOCB_FLAGS
    { "/raw-aio/array/engine/nowait", test_array_engine, NOWAIT },
#endif
    { "/raw-aio/grow/known", test_grow, false, true },
    { "/raw-aio/grow/unknown", test_grow, true, true },
    { "/raw-aio/grow/at-once", test_grow_at_once, 0, true },
    { "/raw-aio/grow/refused/eagain", test_grow_refused, EAGAIN },
    { "/raw-aio/grow/refused/enomem", test_grow_refused, ENOMEM },
    { "/raw-aio/grow/submit", test_grow_submit, 0, true },
    { "/raw-aio/watch/native", test_watch, NATIVE },
    { "/raw-aio/watch/nowait", test_watch, NOWAIT },
    { "/raw-aio/watch/real/native", test_watch_real, NATIVE },
    { "/raw-aio/watch/again/native", test_watch_again, NATIVE },
    { "/raw-aio/watch/two", test_watch_two },
    { "/raw-aio/ring/none/eagain", test_no_ring, EAGAIN },
    { "/raw-aio/ring/none/enosys", test_no_ring, ENOSYS },
    { "/raw-aio/ring/none/eperm", test_no_ring, EPERM },
    { "/raw-aio/ring/unknown/magic", test_unknown_ring, false },
    { "/raw-aio/ring/unknown/features", test_unknown_ring, true },
    { "/raw-aio/ring/known", test_known_ring },
    { "/raw-aio/ring/freed", test_ring_freed },
    { "/raw-aio/zoned/native/write", test_zoned_native, QEMU_AIO_WRITE },
    { "/raw-aio/zoned/native/append", test_zoned_native, QEMU_AIO_ZONE_APPEND },
#endif
    { "/raw-aio/zoned/pool/write", test_zoned_pool, QEMU_AIO_WRITE },
    { "/raw-aio/zoned/pool/append", test_zoned_pool, QEMU_AIO_ZONE_APPEND },
    { "/raw-aio/switches/parse", test_switches },
#ifdef CONFIG_LINUX_AIO
    { "/raw-aio/switches/native", test_switch_native },
#endif
    { "/raw-aio/contexts/buffered", test_contexts, BUFFERED },
    { "/raw-aio/contexts/buffered-coroutine", test_contexts,
      BUFFERED | IN_COROUTINE },
#if RAW_AIO_HAVE_RWF
    { "/raw-aio/contexts/inline", test_contexts, INLINE },
    { "/raw-aio/contexts/inline-coroutine", test_contexts,
      INLINE | IN_COROUTINE },
#endif
    { "/raw-aio/contexts/direct", test_contexts, DIRECT },
    { "/raw-aio/contexts/real", test_contexts, REAL },
    { "/raw-aio/fuzz/buffered", test_fuzz, BUFFERED },
#if RAW_AIO_HAVE_RWF
    { "/raw-aio/fuzz/inline", test_fuzz, INLINE },
    { "/raw-aio/fuzz/inline-native", test_fuzz, INLINE_NATIVE },
    { "/raw-aio/fuzz/inline-coroutine", test_fuzz, INLINE | IN_COROUTINE },
#endif
    { "/raw-aio/fuzz/direct", test_fuzz, DIRECT },
    { "/raw-aio/fuzz/nowait", test_fuzz, NOWAIT },
    { "/raw-aio/fuzz/real", test_fuzz, REAL },
};

static const char *current_test;

static void run_test_in(void *opaque)
{
    const struct TestCase *test = opaque;

    test->func(test->arg);
}

static void run_test(gconstpointer opaque)
{
    const struct TestCase *test = opaque;

    current_test = test->path;
    hooks_reset();
    delay_next(DELAY_NONE, -1, 0);
    alarm(HANG_SECONDS);
    if (test->iothread) {
        IOThread *iothread = iothread_new();

        run_in(iothread, run_test_in, (void *)test);
        iothread_join(iothread);
    } else {
        test->func(test->arg);
    }
    alarm(0);
    hooks_reset();
}

static void hang_handler(int sig)
{
    static const char msg[] = ": hangs\n";

    if (write(STDERR_FILENO, current_test, strlen(current_test)) < 0 ||
        write(STDERR_FILENO, msg, strlen(msg)) < 0) {
        /* There is nobody to tell. */
    }
    abort();
}

int main(int argc, char **argv)
{
    struct sigaction act = { .sa_handler = hang_handler };
    sigset_t set;

    qemu_init_main_loop(&error_abort);

    /* QEMU's main loop wants to read it from a signalfd. */
    sigaction(SIGALRM, &act, NULL);
    sigemptyset(&set);
    sigaddset(&set, SIGALRM);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    g_unsetenv("QEMU_RAW_AIO_DISABLE");

    g_test_init(&argc, &argv, NULL);
    for (int i = 0; i < ARRAY_SIZE(tests); i++) {
        g_test_add_data_func(tests[i].path, &tests[i], run_test);
    }
    return g_test_run();
}
