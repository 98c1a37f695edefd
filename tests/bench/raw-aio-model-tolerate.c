/*
 * raw-aio-model: what a caller may see of a system call that fails
 *
 * raw-aio-model-faults.so has one call fail, or several, and says which.  Some
 * failures the engine has to heal, so that nobody sees them; each of the others
 * has to reach the caller of the request that it belongs to, once, with its own
 * errno.  docs/errno.md of the series says which are which, and expectation()
 * below says so again.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/main-loop.h"
#include "qemu/timer.h"
#include <dirent.h>
#include <dlfcn.h>
#include "raw-aio-model.h"
#include "raw-aio-model-faults.h"

/* How often (ms) the main loop shows that it serves timers */
#define BEAT_MS         1
/* The loop itself may wait so often, and once more in each second */
#define STALLS          4

typedef enum Expectation {
    HIDDEN,
    SEEN,
    MAYBE,      /* where it depends on what QEMU can do instead */
} Expectation;

/* NULL without --tolerate.  Atomic, or constant, or see ModelFault */
static ModelFault *fault;
static QEMUTimer *timer;
static int64_t armed_ns;

static unsigned seen;           /* atomic; errors that callers got */
static bool ever_cached;        /* atomic; before the call failed */
/* Each flush from now on has to fail.  Atomic, as several loops may ask. */
static bool flush_fails;

static void beat(void *opaque)
{
    qatomic_inc(&fault->beats);
    timer_mod(timer, qemu_clock_get_ms(QEMU_CLOCK_REALTIME) + BEAT_MS);
}

void model_tolerate_init(void)
{
    ModelFaultGet *get = dlsym(RTLD_DEFAULT, MODEL_FAULT_GET);

    fault = get ? get() : NULL;
    if (!fault) {
        model_fail(EXIT_USAGE, "--tolerate: a system call that fails is "
                   "needed, see raw-aio-model-faults.c");
    }
}

void model_tolerate_workers(void)
{
    if (fault) {
        qatomic_set(&fault->new_workers, true);
    }
}

void model_tolerate_arm(bool armed, int ignored_fd)
{
    if (!fault) {
        return;
    }
    if (!timer) {
        /* Not a timer of the main loop: nested loops serve this one, too. */
        timer = aio_timer_new(qemu_get_aio_context(), QEMU_CLOCK_REALTIME,
                              SCALE_MS, beat, NULL);
        timer_mod(timer, 0);
        armed_ns = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    }
    qatomic_set(&fault->ignored_fd, ignored_fd);
    qatomic_set(&fault->armed, armed);
}

bool model_tolerate_happened(void)
{
    /* Acquire: what is known about it is read after it. */
    return fault && fault->how != HOW_SLEEP &&
           qatomic_load_acquire(&fault->happened);
}

bool model_tolerate_sleeps(void)
{
    return fault && qatomic_read(&fault->asleep);
}

unsigned model_tolerate_naps(void)
{
    return fault ? qatomic_read(&fault->slept) : 0;
}

bool model_tolerate_lost(void)
{
    return opt.qcow2 && qatomic_read(&flush_fails);
}

/* errno by which the engine finds out that there must be another way */
static bool means_unsupported(int err)
{
    return err == EINVAL || err == EOPNOTSUPP || err == ENOSYS;
}

static Expectation expectation(void)
{
    int err = fault->err;
    Expectation expect = SEEN;

    if (fault->nowait) {
        return HIDDEN;
    }
    if (fault->how == HOW_ZERO) {
        /* A write makes no progress. */
        err = ENOSPC;
    } else if (fault->how != HOW_ERRNO || err == EINTR) {
        return HIDDEN;
    }
    switch (fault->call) {
    case CALL_PREAD:
    case CALL_PREADV:
        /* The end of the file; memory files, which the loop itself reads */
        if (err == EINVAL || !fault->worker) {
            expect = MAYBE;
        }
        break;
    case CALL_PWRITE:
    case CALL_PWRITEV:
    case CALL_FDATASYNC:
    case CALL_FTRUNCATE:
        break;
    case CALL_PWRITEV2:
    case CALL_EVENT:
        if (means_unsupported(err)) {
            return HIDDEN;
        }
        break;
    case CALL_FALLOCATE:
        if (err == EOPNOTSUPP || err == ENOSYS) {
            return HIDDEN;
        } else if (err == EINVAL) {
            expect = MAYBE;
        }
        break;
    default:
        return HIDDEN;
    }
    /* qcow2 writes tables that belong to several requests, or to none. */
    return opt.qcow2 ? MAYBE : expect;
}

/* Whether the call that failed can have been one for this operation */
static bool concerns(const ModelOp *op)
{
    uint64_t from, to;

    if (opt.qcow2 || op->kind == OP_TRUNCATE) {
        return true;
    }
    if (fault->call == CALL_FTRUNCATE) {
        return false;
    }
    if (fault->call == CALL_FDATASYNC || fault->fdsync) {
        /* Any write may be FUA, with --cache directsync and writethrough. */
        return op->kind == OP_FLUSH || op->write;
    }
    /* With O_DIRECT QEMU reads and writes the whole block. */
    from = QEMU_ALIGN_DOWN(op->offset, MODEL_BLOCK);
    to = QEMU_ALIGN_UP(op->offset + op->bytes, MODEL_BLOCK);
    return op->kind != OP_FLUSH && from < fault->offset + fault->bytes &&
           fault->offset < to;
}

void model_tolerate_send(ModelOp *op, const ModelPlan *plan)
{
    if (!fault) {
        return;
    }
    if (op->kind == OP_FLUSH) {
        op->doomed = !opt.qcow2 && qatomic_read(&flush_fails);
    }
    if (!plan->direct && !qatomic_read(&fault->happened)) {
        qatomic_set(&ever_cached, true);
    }
}

bool model_tolerate_error(const ModelOp *op, int ret)
{
    int err;

    if (!model_tolerate_happened() || expectation() == HIDDEN) {
        return false;
    }
    err = fault->how == HOW_ZERO ? ENOSPC : fault->err;
    if (ret != -err || (op && !concerns(op))) {
        return false;
    }
    qatomic_inc(&seen);
    if (fault->call == CALL_FDATASYNC && (qatomic_read(&ever_cached) ||
                                          !opt.direct)) {
        qatomic_set(&flush_fails, true);
    } else if (!fault->onwards && !opt.qcow2 && qatomic_read(&seen) > 1) {
        model_found(EXIT_FAILURE, op, "%s was seen again", strerror(err));
    }
    return true;
}

bool model_tolerate_again(ModelOp *op)
{
    /*
     * The image must have the size that the operations after it know, and what
     * writes have left undecided must be decided.
     */
    if (!fault || op->sent_again || op->beyond || op->cancelled ||
        !(op->kind == OP_TRUNCATE || op->kind == OP_SETTLE || op->extends)) {
        return false;
    }
    op->sent_again = true;
    return true;
}

void model_tolerate_new_fd(void)
{
    if (fault) {
        qatomic_inc(&fault->descriptors);
    }
}

static unsigned open_files(void)
{
    DIR *dir = opendir("/proc/self/fd");
    unsigned n = 0;

    while (dir && readdir(dir)) {
        n++;
    }
    if (dir) {
        closedir(dir);
    }
    return n;
}

static void check_sleep(void)
{
    unsigned home = qatomic_read(&fault->slept_at_home);
    unsigned seconds = (qemu_clock_get_ns(QEMU_CLOCK_REALTIME) - armed_ns) /
                       NANOSECONDS_PER_SECOND;

    switch (fault->call) {
    case CALL_PREAD:
    case CALL_PWRITE:
    case CALL_PREADV:
    case CALL_PWRITEV:
    case CALL_FDATASYNC:
    case CALL_FALLOCATE:
    case CALL_FTRUNCATE:
        if (home) {
            model_found(EXIT_FAILURE, NULL, "the event loop itself made %u "
                        "calls that may wait", home);
        }
        break;
    case CALL_PREADV2:
    case CALL_PWRITEV2:
    case CALL_IO_SUBMIT:
        /*
         * Flushes are submitted all the same: a thread of the kernel waits.
         * And what is known of a descriptor goes with it.
         */
        if (home > STALLS + seconds + qatomic_read(&fault->slept_fdsync) +
                   qatomic_read(&fault->descriptors)) {
            model_found(EXIT_FAILURE, NULL, "the event loop itself made %u "
                        "calls that waited, in %u s", home, seconds);
        }
        break;
    default:
        break;
    }
}

void model_tolerate_report(void)
{
    unsigned happened = qatomic_read(&fault->happened);

    printf("calls:");
    for (int i = 0; i < CALL__MAX; i++) {
        printf(" %s %u", fault->call_name[i], qatomic_read(&fault->calls[i]));
    }
    printf("\nfault: happened %u, seen %u, slept %u and %u in event loops, "
           "open files %u\n", happened, seen, fault->slept,
           fault->slept_at_home, open_files());
    if (fault->how == HOW_SLEEP) {
        check_sleep();
    } else if (happened && !seen && expectation() == SEEN) {
        model_found(EXIT_FAILURE, NULL, "%s failed, and nobody was told",
                    fault->call_name[fault->call]);
    }
}
