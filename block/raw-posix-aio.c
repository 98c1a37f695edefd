/*
 * Raw file engine: how block/file-posix.c runs its requests
 *
 * A request meets up to three tiers and is served by the first that can do it
 * without stopping the event loop, see raw_aio_begin():
 *
 *   1 inline   the event loop itself with RWF_NOWAIT, for cached files; with
 *              aio=native several reads at a time, where that costs less
 *   2 native   Linux AIO with RWF_NOWAIT, for O_DIRECT files
 *   3 pool     a worker thread, which may block; does anything
 *
 * The pool has the last word.  Whatever another tier did not finish, be it an
 * error or the rest of a short transfer, is given to the pool once, without
 * RWF_NOWAIT, and that answer counts.  So continuation, the end of the file
 * and the policy for errors stand in one place, the blocking functions below.
 * Only what the native tier would have to wait for (EAGAIN) is first submitted
 * again, without the flag, by a worker.
 *
 * docs/architecture.md and docs/errno.md of the series say more.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <sys/utsname.h>
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/coroutine.h"
#include "qemu/defer-call.h"
#include "qemu/error-report.h"
#include "qemu/host-utils.h"
#include "qemu/lockable.h"
#include "qemu/memalign.h"
#include "qemu/rcu.h"
#include "qemu/units.h"
#include "block/aio-wait.h"
#include "block/raw-linux-aio.h"
#include "block/raw-posix-aio.h"
#include "block/raw-aio-compat.h"
#include "block/raw-aio-watch.h"
#include "trace.h"

/*
 * How often an O_DIRECT read whose end of file moves away is begun again.  More
 * than once, as another process may be appending all the time.
 */
#define RAW_AIO_REWINDS 8

/*
 * How much the event loop may transfer itself in one turn: 64 requests of 4 KiB
 * or so, which take 0.1 to 0.2 ms, or twice that if it only begins them: no
 * longer than other handlers and the timers can wait.  The main loop can turn
 * in a vCPU thread under the BQL, where more would be felt by the guest.
 */
#define RAW_AIO_INLINE_TURN     (256 * KiB)
/* What a small request costs, too: most of it is the system call. */
#define RAW_AIO_INLINE_MIN      (4 * KiB)
/*
 * A write may have to allocate a page for each that it copies; a large one goes
 * to the pool.
 */
#define RAW_AIO_INLINE_MAX_WRITE (64 * KiB)
/*
 * A read only copies, 1 MiB in 0.05 to 0.1 ms, and counts for a part of its
 * bytes.  What is left of a turn may remain for the next one, but at least half
 * of it is there then: so the largest must not need more, or small ones now and
 * then would keep it out for ever.
 */
#define RAW_AIO_INLINE_READ_DIV 8
#define RAW_AIO_INLINE_MAX_READ (1 * MiB)
QEMU_BUILD_BUG_ON(RAW_AIO_INLINE_MAX_READ / RAW_AIO_INLINE_READ_DIV >
                  RAW_AIO_INLINE_TURN / 2);

/*
 * A way that mostly fails is tried less often.  A refusal adds 1 to the score
 * of a RawAIOHint and a success halves it; above the first number so many
 * requests go past that way before the next try, from one on and then twice as
 * many each time, up to the second number.  A refusal costs 1 to 3 us, so with
 * these a file that always refuses loses next to nothing, and one that changes
 * is found out soon.
 */
#define RAW_AIO_HINT_PATIENCE   4
#define RAW_AIO_HINT_SKIP_MAX   64

/*
 * After so many reads in a row that were done when io_submit(2) returned, and
 * had no RWF_NOWAIT as the file does not know it, the event loop may read the
 * file itself: it waits for whatever there is to wait for in either case, and
 * for one request the plain call takes half as long.  That's so for tmpfs and
 * the like.
 */
#define RAW_AIO_AT_ONCE         64

/*
 * What the event loop reads itself, it can read with a system call for each
 * request or, if there is a ring, with one for several.  io_submit(2) has to do
 * more for each, but there are fewer calls: where an empty system call takes
 * 1 us, as in some virtual machines, 32 cached reads of 4 KiB take 0.8 us each,
 * and with preadv2(2) 1.9 us; where it takes 0.1 us, preadv2(2) is the faster
 * one.  So both are measured with the real requests, for each file.
 */

/* Fewer reads in a defer_call section are not worth a visit to the ring. */
#define RAW_AIO_BATCH_MIN       4
/* What is larger takes long to copy, which hides what a system call costs. */
#define RAW_AIO_BATCH_MAX_BYTES (64 * KiB)
/*
 * What a read costs (ns) besides if it goes together with others: it is queued,
 * its coroutine waits for a bottom half and is woken.
 */
#define RAW_AIO_BATCH_EXTRA_NS  150
/* So many sections with fewer may come between those that have more. */
#define RAW_AIO_BATCH_PATIENCE  4
/*
 * One of so many sections goes the other way, to see what that costs now; more
 * in the beginning, when nothing is warm yet.
 */
#define RAW_AIO_BATCH_PERIOD    64
/* What takes longer (ns) was interrupted, and says nothing about the cost. */
#define RAW_AIO_COST_MAX_NS     (20 * SCALE_US)

/*
 * Reads that the event loop only begins cost more than those which it does, and
 * how much more depends on how many go together: the disk is told once for all.
 * The next ones are taken for such if most of about so many were.
 */
#define RAW_AIO_MISSES          8

/*
 * What it takes (ns) at most to copy a byte to the page cache, if it needs new
 * pages; and how many bytes are copied from there in 1 ns at least, if 1 MiB
 * takes 0.05 to 0.1 ms.
 */
#define RAW_AIO_WRITE_NS        1
#define RAW_AIO_READ_BYTES      8

/*
 * How long (ms) the event loop submits nothing for a file that made it wait.
 * Twice as long each time it does so again, up to 64 times, which leaves less
 * than 1 % of the time to stalls of half a second.  As long again without a
 * stall takes one step back.
 */
#define RAW_AIO_SLOW_MS         1000
#define RAW_AIO_SLOW_LEVELS     7

/* RawAIODesc.learnt: what a descriptor has been found not to do */
enum {
    RAW_AIO_NO_READ_NOWAIT  = 1 << 0,
    RAW_AIO_NO_WRITE_NOWAIT = 1 << 1,
    RAW_AIO_NO_READ_NATIVE  = 1 << 2,
    RAW_AIO_NO_WRITE_NATIVE = 1 << 3,
    RAW_AIO_NO_FDSYNC       = 1 << 4,   /* IOCB_CMD_FDSYNC */
    RAW_AIO_NO_DSYNC        = 1 << 5,   /* pwritev2(RWF_DSYNC) */
    RAW_AIO_NO_READ_INLINE  = 1 << 6,
    RAW_AIO_NO_WRITE_INLINE = 1 << 7,
    RAW_AIO_NO_READ_IOCBV   = 1 << 8,   /* IOCB_CMD_PREADV */
    RAW_AIO_NO_WRITE_IOCBV  = 1 << 9,   /* IOCB_CMD_PWRITEV */
    RAW_AIO_NO_READ_BATCH   = 1 << 10,  /* cached, through io_submit(2) */
};

/*
 * How a way to serve requests fares.  Atomic, but only a hint: with several
 * AioContexts an update may be lost.
 */
typedef struct RawAIOHint {
    unsigned score;
    unsigned skip;          /* so many requests go past it */
} RawAIOHint;

/*
 * What a read in the event loop costs (ns; 0: unknown), alone and in a batch;
 * and how many sections could choose.  Atomic, but only hints.
 */
typedef struct RawAIOReadCost {
    unsigned single_ns;
    unsigned batch_ns;
    unsigned choices;
} RawAIOReadCost;

/*
 * A descriptor lives until the last request that began on it has ended, even
 * when raw_set_perm() has replaced it meanwhile.
 */
struct RawAIODesc {
    struct rcu_head rcu;    /* first, as g_free_rcu() wants it */
    int fd;                 /* constant */
    bool direct;            /* O_DIRECT; constant, nobody changes it */
    unsigned write_lane;    /* of cached writes, see PAIORequest; constant */
    unsigned read_lane;     /* of cached reads that have begun; constant */
    int refcnt;             /* atomic */
    unsigned learnt;        /* atomic, bits are only added */
    RawAIOHint inline_read, inline_write;
    RawAIOHint native_read, native_write; /* with RWF_NOWAIT */
    unsigned at_once;       /* see RAW_AIO_AT_ONCE; atomic hint */
    RawAIOReadCost served;  /* of reads that the event loop did */
    RawAIOReadCost begun;   /* ... and of those that it only began */
    unsigned misses;        /* of the last reads or so; atomic hint */
    /*
     * Until when (ms of get_clock(), wraps around) the event loop submits
     * nothing, and how often it had to wait lately; 0: never.  Atomic hints.
     */
    unsigned slow_until;
    unsigned slow_level;
};

typedef struct RawAIOCB RawAIOCB;

/* What an AioContext has for all its files; owned by its home thread */
typedef struct RawAIOContext {
    AioContextHook hook;
    AioContext *ctx;        /* constant */
    PAIOPool *pool;         /* constant */
    QEMUBH *turn_bh;        /* constant */
    size_t inline_left;     /* bytes until the next turn of the event loop */
    RawAIOWatch watch;      /* of the inline tier */
    /* Reads for the inline tier in this defer_call section, with aio=native */
    unsigned section_reads;
    bool section_batch;     /* how they go, if they can */
    unsigned several;       /* one of so many before had RAW_AIO_BATCH_MIN */
    QEMUBH *hits_bh;        /* constant */
    /* Of the callback form: served inline, callback not called yet */
    QSIMPLEQ_HEAD(, RawAIOCB) hits;
    unsigned nr_hits;
#ifdef CONFIG_LINUX_AIO
    RawLaioRing *ring;
    bool ring_tried;        /* for the native tier, which has to warn */
    bool batch_tried;       /* for the inline tier */
    unsigned dispatches;    /* of the ring, when it last renewed inline_left */
#endif
} RawAIOContext;

/* A read, write or flush; belongs to the home thread but for "done". */
typedef struct RawAIORequest {
    RawAIOFile *file;
    RawAIODesc *desc;       /* held until the end */
    RawAIOContext *home;
    int type;               /* QEMU_AIO_* and RAW_AIO_ZONED */
    BdrvRequestFlags flags;
    int64_t offset;         /* bytes */
    QEMUIOVector *qiov;     /* NULL for a flush */

    /*
     * Bytes of qiov that are transferred.  Written by the home thread, except
     * while the request is with the pool: then by the worker.
     */
    size_t done;

    /*
     * The bit of RawAIODesc.learnt that is set if the pool can do what another
     * tier could not; 0 if that says nothing about the file.
     */
    unsigned suspect;
    bool tried_inline;      /* and not, or not wholly, served */
    bool nowait;            /* the native attempt has RWF_NOWAIT */
    bool array;             /* ... and one iocb for each element */
    bool batched;           /* an inline read that is in the ring */
    bool partial;           /* another tier has transferred a part, or all */
    bool begun;             /* a read that the disk is at work for */

    PAIORequest pool;
#ifdef CONFIG_LINUX_AIO
    RawLaioRequest laio;
    /*
     * While a worker submits it, the result may come first: then it waits here
     * until the worker does not touch the request any more.
     */
    bool with_worker;
    bool landed;
    ssize_t landed_res;
#endif

    BlockCompletionFunc *cb;
    void *opaque;
} RawAIORequest;

static void raw_aio_count(RawAIOFile *f, RawAIOStat stat)
{
    stat64_add(&f->stats[stat], 1);
}

static size_t raw_aio_bytes(const RawAIORequest *req)
{
    return req->qiov ? req->qiov->size : 0;
}

static bool raw_aio_is_write(int type)
{
    return type & (QEMU_AIO_WRITE | QEMU_AIO_ZONE_APPEND);
}

/* A flush, or a write that contains one */
static bool raw_aio_makes_stable(const RawAIORequest *req)
{
    return (req->type & QEMU_AIO_FLUSH) ||
           (raw_aio_is_write(req->type) && (req->flags & BDRV_REQ_FUA));
}

/* A write that must not be sent twice, not even a part of it */
static bool raw_aio_once_only(const RawAIORequest *req)
{
    return (req->type & RAW_AIO_ZONED) && raw_aio_is_write(req->type);
}

/*
 * Errors by which a kernel or file system says that it can't do a request that
 * way; old kernels say EINVAL for a flag or opcode they don't know.  They mean
 * other things as well, so a retry in another way has to decide.
 */
static bool raw_aio_means_unsupported(int ret)
{
    return ret == -EINVAL || ret == -EOPNOTSUPP || ret == -ENOSYS;
}

static bool raw_aio_has_preadv(const RawAIOFile *f)
{
#ifdef CONFIG_PREADV
    return !(f->disabled & RAW_AIO_DISABLE_PREADV);
#else
    return false;
#endif
}

/*
 * Descriptors
 */

static unsigned raw_aio_new_lane(void)
{
    static unsigned next;   /* atomic, no ordering needed */

    return qatomic_fetch_inc(&next) % PAIO_LANES + 1;
}

/*
 * Kernels hold the lock of the inode over a write to the page cache, and over
 * the submission of one that allocates, so several workers that do so to one
 * regular file only wait for each other.
 */
static unsigned raw_aio_new_write_lane(int fd)
{
    struct stat st;

    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode)) {
        return 0;
    }
    return raw_aio_new_lane();
}

static RawAIODesc *raw_aio_desc_new(int fd)
{
    RawAIODesc *desc = g_new0(RawAIODesc, 1);
    int flags = fcntl(fd, F_GETFL);

    desc->fd = fd;
    desc->direct = flags != -1 && (flags & O_DIRECT);
    desc->write_lane = raw_aio_new_write_lane(fd);
    desc->read_lane = raw_aio_new_lane();
    desc->refcnt = 1;
    return desc;
}

static RawAIODesc *raw_aio_desc_ref(RawAIOFile *f)
{
    RawAIODesc *desc;

    RCU_READ_LOCK_GUARD();
    do {
        /*
         * Pairs with the xchg in raw_aio_set_fd(), after which the count of
         * the old descriptor may reach 0: then there is a new one to be found.
         */
        desc = qatomic_rcu_read(&f->desc);
    } while (!qatomic_fetch_inc_nonzero(&desc->refcnt));
    return desc;
}

RawAIODesc *raw_aio_get_desc(RawAIOFile *f, int *fd)
{
    RawAIODesc *desc = raw_aio_desc_ref(f);

    *fd = desc->fd;
    return desc;
}

void raw_aio_put_desc(RawAIODesc *desc)
{
    /* Sequentially consistent: the I/O of all holders is before the close. */
    if (qatomic_fetch_dec(&desc->refcnt) == 1) {
        trace_raw_aio_close_desc(desc, desc->fd);
        if (desc->fd >= 0) {
            qemu_close(desc->fd);
        }
        g_free_rcu(desc, rcu);
    }
}

/* Only a hint for later requests, so no order with anything else is needed. */
static bool raw_aio_knows(RawAIODesc *desc, unsigned bits)
{
    return qatomic_read(&desc->learnt) & bits;
}

static void raw_aio_learn(RawAIOFile *f, RawAIODesc *desc, unsigned bits)
{
    if (!raw_aio_knows(desc, bits)) {
        trace_raw_aio_learn(f, desc->fd, bits);
        qatomic_or(&desc->learnt, bits);
    }
}

#if RAW_AIO_HAVE_RWF || defined(CONFIG_LINUX_AIO)
/*
 * Whether to try this way now, after what it answered the last times.  Nothing
 * is lost if it is not tried, so no order with anything else is needed.
 */
static bool raw_aio_hint_ask(RawAIOHint *hint)
{
    unsigned skip = qatomic_read(&hint->skip);

    if (skip) {
        qatomic_set(&hint->skip, skip - 1);
    }
    return !skip;
}

static void raw_aio_hint_answer(RawAIOHint *hint, bool served)
{
    const unsigned top = RAW_AIO_HINT_PATIENCE + 1 +
                         ctz32(RAW_AIO_HINT_SKIP_MAX);
    unsigned score = qatomic_read(&hint->score);

    if (served) {
        if (unlikely(score)) {
            qatomic_set(&hint->score, score / 2);
        }
        return;
    }
    score = MIN(score + 1, top);
    qatomic_set(&hint->score, score);
    if (score > RAW_AIO_HINT_PATIENCE) {
        qatomic_set(&hint->skip, 1U << (score - RAW_AIO_HINT_PATIENCE - 1));
    }
}

/*
 * What a call costs if nothing interrupts it: follows down soon, and up slowly.
 * A hint as well.
 */
static void raw_aio_cost(unsigned *cost, int64_t ns)
{
    int old = qatomic_read(cost);

    if (ns <= 0 || ns >= RAW_AIO_COST_MAX_NS) {
        return;
    }
    if (old && old != RAW_AIO_COST_MAX_NS) {
        ns = MAX(old + (ns - old) / (ns < old ? 2 : 16), 1);
    }
    qatomic_set(cost, ns);
}

#if RAW_AIO_HAVE_RWF
/*
 * The event loop has done a read, or has only begun it.
 *
 * Returns: where to note the cost
 */
static RawAIOReadCost *raw_aio_read_was(RawAIODesc *desc, bool served)
{
    unsigned misses = qatomic_read(&desc->misses);

    if (served) {
        if (misses) {
            qatomic_set(&desc->misses, misses - 1);
        }
        return &desc->served;
    }
    if (misses < RAW_AIO_MISSES) {
        qatomic_set(&desc->misses, misses + 1);
    }
    return &desc->begun;
}
#endif

#ifdef CONFIG_LINUX_AIO
/* Not the way to go, as long as nothing better is known of it */
static void raw_aio_batch_bad(RawAIOReadCost *cost)
{
    if (!qatomic_read(&cost->batch_ns)) {
        qatomic_set(&cost->batch_ns, RAW_AIO_COST_MAX_NS);
    }
}

/* A read was done, or begun, within io_submit(2). */
static void raw_aio_batch_cost(RawAIORequest *req, RawAIOReadCost *cost)
{
    if (req->laio.together >= RAW_AIO_BATCH_MIN) {
        raw_aio_cost(&cost->batch_ns, req->laio.cost_ns);
    } else {
        raw_aio_batch_bad(cost);
    }
}
#endif

static unsigned raw_aio_now_ms(void)
{
    return get_clock() / SCALE_MS;
}

/* The event loop had to wait for a call that was not to wait. */
static void raw_aio_stalled(RawAIOFile *f, RawAIODesc *desc, int64_t ns)
{
    unsigned level = MIN(qatomic_read(&desc->slow_level) + 1,
                         RAW_AIO_SLOW_LEVELS);

    trace_raw_aio_stalled(f, desc->fd, ns, RAW_AIO_SLOW_MS << (level - 1));
    raw_aio_count(f, RAW_AIO_SLOW_SUBMISSIONS);
    /* Atomic hints: two AioContexts that do this at once lose nothing. */
    qatomic_set(&desc->slow_until,
                raw_aio_now_ms() + (RAW_AIO_SLOW_MS << (level - 1)));
    qatomic_set(&desc->slow_level, level);
    qatomic_set(&desc->at_once, 0);
}

/* Whether requests for a file must not be submitted by the event loop now */
static bool raw_aio_is_slow(RawAIODesc *desc)
{
    unsigned level = qatomic_read(&desc->slow_level);
    int term, past;

    if (likely(!level)) {
        return false;
    }
    term = RAW_AIO_SLOW_MS << (level - 1);
    past = raw_aio_now_ms() - qatomic_read(&desc->slow_until);
    if (past < 0 && past >= -term) {
        return true;
    }
    /* After weeks without a request the difference has wrapped around. */
    if (past < 0 || past >= term) {
        qatomic_set(&desc->slow_level, level - 1);
        qatomic_set(&desc->slow_until, raw_aio_now_ms());
    }
    return false;
}

#endif

/*
 * AioContexts
 */

static void raw_aio_context_free(AioContextHook *hook)
{
    RawAIOContext *home = container_of(hook, RawAIOContext, hook);

#ifdef CONFIG_LINUX_AIO
    if (home->ring) {
        raw_laio_free(home->ring);
    }
#endif
    paio_pool_free(home->pool);
    qemu_bh_delete(home->turn_bh);
    qemu_bh_delete(home->hits_bh);
    g_free(home);
}

static void raw_aio_context_update(AioContextHook *hook)
{
    RawAIOContext *home = container_of(hook, RawAIOContext, hook);

    paio_pool_update_params(home->pool);
}

/* The event loop has had a turn. */
static void raw_aio_turn_bh(void *opaque)
{
    RawAIOContext *home = opaque;

    home->inline_left = RAW_AIO_INLINE_TURN;
}

static void raw_aio_hits_bh(void *opaque);

static RawAIOContext *raw_aio_context_new(AioContext *ctx)
{
    RawAIOContext *home = g_new0(RawAIOContext, 1);

    home->hook.free = raw_aio_context_free;
    home->hook.update = raw_aio_context_update;
    home->ctx = ctx;
    home->pool = paio_pool_new(ctx);
    home->turn_bh = aio_bh_new(ctx, raw_aio_turn_bh, home);
    home->inline_left = RAW_AIO_INLINE_TURN;
    home->hits_bh = aio_bh_new(ctx, raw_aio_hits_bh, home);
    QSIMPLEQ_INIT(&home->hits);

    qatomic_store_release(&ctx->raw_aio, &home->hook);
    /*
     * Another thread may change thread-pool-min/max right now.  It writes them
     * and then looks for the hook; here the hook was written, and they are read
     * now.  Pairs with the smp_mb() in aio_context_set_thread_pool_params(): at
     * least one of the two sees what the other wrote.
     */
    smp_mb();
    paio_pool_update_params(home->pool);
    return home;
}

static RawAIOContext *raw_aio_context_current(void)
{
    AioContext *ctx = qemu_get_current_aio_context();

    /* Only this thread writes it, so no barrier is needed to read it. */
    if (unlikely(!ctx->raw_aio)) {
        return raw_aio_context_new(ctx);
    }
    return container_of(ctx->raw_aio, RawAIOContext, hook);
}

PAIOPool *raw_aio_current_pool(void)
{
    return raw_aio_context_current()->pool;
}

#ifdef CONFIG_LINUX_AIO
/*
 * Without a ring the native tier has to warn, as @needed says.  Reads that
 * could go together lose nothing but time: for these a trace event is enough.
 */
static RawLaioRing *raw_aio_context_ring(RawAIOContext *home, bool needed)
{
    bool *tried = needed ? &home->ring_tried : &home->batch_tried;

    if (unlikely(!home->ring && !*tried)) {
        Error *local_err = NULL;

        *tried = true;
        home->ring = raw_laio_new(home->ctx, &local_err);
        if (!home->ring) {
            trace_raw_aio_no_ring(home->ctx, error_get_pretty(local_err));
            if (needed) {
                raw_laio_warn(local_err, "aio=native is not available, worker "
                              "threads do the I/O: ");
            } else {
                error_free(local_err);
            }
        }
    }
    return home->ring;
}

static void raw_aio_note_ring(RawAIOFile *f, const RawLaioRing *ring)
{
    if (unlikely(stat64_get(&f->stats[RAW_AIO_RING_SIZE]) <
                 raw_laio_entries(ring))) {
        stat64_max(&f->stats[RAW_AIO_RING_SIZE], raw_laio_entries(ring));
    }
}
#endif

/*
 * Blocking calls: they run in a worker
 */

/* Returns: bytes, or -1 with errno */
static ssize_t raw_aio_transfer(RawAIORequest *req, const struct iovec *iov,
                                int niov, int64_t offset, int rwf)
{
    bool is_write = raw_aio_is_write(req->type);
    int fd = req->desc->fd;

    if (niov == 1 && !rwf) {
        return is_write ? pwrite(fd, iov->iov_base, iov->iov_len, offset)
                        : pread(fd, iov->iov_base, iov->iov_len, offset);
    }
#if RAW_AIO_HAVE_RWF
    if (rwf) {
        return is_write ? pwritev2(fd, iov, niov, offset, rwf)
                        : preadv2(fd, iov, niov, offset, rwf);
    }
#endif
#ifdef CONFIG_PREADV
    return is_write ? pwritev(fd, iov, niov, offset)
                    : preadv(fd, iov, niov, offset);
#else
    g_assert_not_reached();
#endif
}

/*
 * A read with O_DIRECT that starts at an unaligned offset, as the rest of a
 * short read does, fails with EINVAL.  At the end of the file that is no error.
 */
static bool raw_aio_at_eof(int fd, int64_t offset)
{
    struct stat st;

    if (fstat(fd, &st) < 0) {
        return false;
    }
    /* The size of a device is a multiple of its blocks: reads return 0 there */
    return S_ISREG(st.st_mode) && offset >= st.st_size;
}

/*
 * Transfer the part of @qiov that is after req->done, until it is complete,
 * the file ends, or an error occurs.  Advances req->done.
 *
 * Returns: 0 if complete or, for a read, at the end of the file; or a negative
 * errno
 */
static int raw_aio_transfer_all(RawAIORequest *req, QEMUIOVector *qiov, int rwf)
{
    bool is_write = raw_aio_is_write(req->type);
    int rewound = 0;

    while (req->done < qiov->size) {
        int64_t offset = req->offset + req->done;
        QEMUIOVector rest, *v = qiov;
        const struct iovec *iov;
        size_t asked;
        ssize_t len;
        int niov;

        if (req->done) {
            /* A copy: others may use the same vector (quorum does). */
            qemu_iovec_init_slice(&rest, qiov, req->done,
                                  qiov->size - req->done);
            v = &rest;
        }
        iov = v->iov;
        niov = v->niov;
        asked = v->size;
        if (!raw_aio_has_preadv(req->file)) {
            /* The next element that is not empty; the loop does the others. */
            while (!iov->iov_len) {
                iov++;
            }
            niov = 1;
            asked = iov->iov_len;
        }
        do {
            len = raw_aio_transfer(req, iov, niov, offset, rwf);
        } while (len < 0 && errno == EINTR);
        if (v == &rest) {
            int saved_errno = errno;

            qemu_iovec_destroy(&rest);
            errno = saved_errno;
        }

        if (len < 0) {
            int ret = -errno;

            if (ret == -EINVAL && !is_write && req->desc->direct && req->done) {
                if (raw_aio_at_eof(req->desc->fd, offset)) {
                    return 0;
                }
                if (rewound++ < RAW_AIO_REWINDS) {
                    /* The file has grown meanwhile; start where it suits. */
                    req->done = 0;
                    continue;
                }
            }
            return ret;
        }
        if (len == 0) {
            return is_write ? -ENOSPC : 0;
        }
        req->done += len;
        if (len < asked) {
            trace_raw_aio_short(req->file, req->type, offset, asked, len);
            raw_aio_count(req->file, RAW_AIO_SHORT_TRANSFERS);
            if (raw_aio_once_only(req)) {
                return -EIO;
            }
        }
    }
    return 0;
}

static int raw_aio_fdatasync(RawAIORequest *req)
{
    if (RETRY_ON_EINTR(qemu_fdatasync(req->desc->fd)) < 0) {
        int err = errno;

        trace_file_flush_fdatasync_failed(err);
        return -err;
    }
    return 0;
}

/*
 * Make stable what was written before.
 *
 * The kernel reports a failed writeback of cached data once and may have
 * dropped the data, so a later fdatasync() that succeeds proves nothing: the
 * error is remembered.  Of two calls at the same time only one gets it, and the
 * other could complete before it is remembered; so there is one at a time.
 * Each covers all who were waiting when it began.
 *
 * A file that was only open with O_DIRECT has no cached data to lose.
 */
static int raw_aio_blocking_flush(RawAIORequest *req)
{
    RawAIOFile *f = req->file;
    unsigned ticket;

    if (!qatomic_read(&f->was_cached)) {
        return raw_aio_fdatasync(req);
    }

    /*
     * Whoever reads this ticket below sees that the data was written before.
     * Both are sequentially consistent.
     */
    ticket = qatomic_fetch_inc(&f->sync_wanted) + 1;

    QEMU_LOCK_GUARD(&f->sync_lock);
    /* The difference, as tickets wrap around */
    if (!f->writeback_errno && (int)(ticket - f->sync_covered) > 0) {
        /* Pairs with the increment above, of all whom this call covers. */
        unsigned covers = qatomic_fetch_add(&f->sync_wanted, 0);
        int ret = raw_aio_fdatasync(req);

        if (ret < 0) {
            f->writeback_errno = -ret;
        } else {
            f->sync_covered = covers;
        }
    }
    return -f->writeback_errno;
}

/*
 * Read or write @qiov as req->type and req->flags say.
 */
static int raw_aio_blocking_rw_aligned(RawAIORequest *req, QEMUIOVector *qiov)
{
    bool fua = raw_aio_is_write(req->type) && (req->flags & BDRV_REQ_FUA);
    int ret;

    /*
     * RWF_DSYNC may use the FUA of the device.  Not for files that were cached:
     * it would swallow a writeback error that raw_aio_blocking_flush() has to
     * remember.  Not for writes that can't be tried again without the flag.
     */
    if (RAW_AIO_HAVE_RWF && fua && !req->done &&
        !qatomic_read(&req->file->was_cached) &&
        raw_aio_has_preadv(req->file) && !raw_aio_once_only(req) &&
        !raw_aio_knows(req->desc, RAW_AIO_NO_DSYNC)) {
        ret = raw_aio_transfer_all(req, qiov, RAW_AIO_RWF_DSYNC);
        if (ret == 0 || !raw_aio_means_unsupported(ret)) {
            return ret;
        }
        /* Begin again: fdatasync() makes all of it stable. */
        req->done = 0;
        ret = raw_aio_transfer_all(req, qiov, 0);
        if (ret == 0) {
            raw_aio_learn(req->file, req->desc, RAW_AIO_NO_DSYNC);
        }
    } else {
        ret = raw_aio_transfer_all(req, qiov, 0);
    }

    if (ret == 0 && fua) {
        ret = raw_aio_blocking_flush(req);
    }
    return ret;
}

/*
 * The memory or length of the request does not suit O_DIRECT: go through a
 * buffer that does.  The block layer has seen to the offset and total length.
 */
static int raw_aio_blocking_rw_bounce(RawAIORequest *req)
{
    size_t bytes = req->qiov->size;
    QEMUIOVector bounce;
    void *buf;
    int ret;

    buf = qemu_try_memalign(qemu_real_host_page_size(), bytes);
    if (!buf) {
        return -ENOMEM;
    }
    qemu_iovec_init_buf(&bounce, buf, bytes);
    if (raw_aio_is_write(req->type)) {
        qemu_iovec_to_buf(req->qiov, 0, buf, bytes);
    }
    ret = raw_aio_blocking_rw_aligned(req, &bounce);
    if (!raw_aio_is_write(req->type)) {
        qemu_iovec_from_buf(req->qiov, 0, buf, req->done);
    }
    qemu_vfree(buf);
    return ret;
}

/* PAIOFunc: whatever a read, write or flush still lacks */
static int raw_aio_blocking(void *opaque)
{
    RawAIORequest *req = opaque;
    int ret;

    if (req->type & QEMU_AIO_FLUSH) {
        return raw_aio_blocking_flush(req);
    }

    if ((req->type & QEMU_AIO_MISALIGNED) ||
        (raw_aio_once_only(req) && !raw_aio_has_preadv(req->file))) {
        ret = raw_aio_blocking_rw_bounce(req);
    } else {
        ret = raw_aio_blocking_rw_aligned(req, req->qiov);
    }
    if (ret == 0 && req->done < req->qiov->size) {
        qemu_iovec_memset(req->qiov, req->done, 0,
                          req->qiov->size - req->done);
    }
    return ret;
}

/*
 * The tiers
 */

static void raw_aio_finish(RawAIORequest *req, RawAIOStat tier, int ret)
{
    trace_raw_aio_end(req->file, req, tier, ret);
    if (ret != -ECANCELED) {
        raw_aio_count(req->file, tier);
    }
    raw_aio_put_desc(req->desc);
}

static void raw_aio_end(RawAIORequest *req, RawAIOStat tier, int ret)
{
    raw_aio_finish(req, tier, ret);
    req->cb(req->opaque, ret);
}

static void raw_aio_pool_cb(void *opaque, int ret)
{
    RawAIORequest *req = opaque;

    if (req->suspect && ret == 0) {
        raw_aio_learn(req->file, req->desc, req->suspect);
    }
    raw_aio_end(req, RAW_AIO_POOL_SERVED, ret);
}

static void raw_aio_begin_pool(RawAIORequest *req)
{
    bool stable = raw_aio_makes_stable(req);
    bool cached_write = raw_aio_is_write(req->type) && !stable &&
                        !req->desc->direct;

    trace_raw_aio_begin_pool(req->file, req, req->done);
    req->pool = (PAIORequest) {
        .func = raw_aio_blocking,
        .arg = req,
        .class = stable ? PAIO_SLOW : PAIO_NORMAL,
        .lane = cached_write ? req->desc->write_lane :
                req->begun ? req->desc->read_lane : 0,
        .work_ns = raw_aio_is_write(req->type) ?
                   raw_aio_bytes(req) * RAW_AIO_WRITE_NS :
                   raw_aio_bytes(req) / RAW_AIO_READ_BYTES,
        .cb = raw_aio_pool_cb,
        .opaque = req,
    };
    paio_submit(req->home->pool, &req->pool);
}

#if RAW_AIO_HAVE_RWF
static unsigned raw_aio_no_inline(const RawAIORequest *req)
{
    return raw_aio_is_write(req->type) ? RAW_AIO_NO_WRITE_INLINE
                                       : RAW_AIO_NO_READ_INLINE;
}

/*
 * Whether the event loop may do this request, too, in this turn.
 *
 * Counted for the turn and not for the request: a request that is sent when
 * another has completed may run, and complete, before the coroutine that sent
 * it returns to the event loop, and so on for ever.  From half of it on, the
 * next turn begins anew; a loop that does less needs no bottom half for it.
 */
static bool raw_aio_inline_afford(const RawAIORequest *req)
{
    RawAIOContext *home = req->home;
    size_t bytes = raw_aio_bytes(req);
    size_t cost = MAX(raw_aio_is_write(req->type)
                      ? bytes : bytes / RAW_AIO_INLINE_READ_DIV,
                      RAW_AIO_INLINE_MIN);
    bool half = home->inline_left <= RAW_AIO_INLINE_TURN / 2;

    if (home->inline_left < cost) {
        return false;
    }
    home->inline_left -= cost;
    if (!half && home->inline_left <= RAW_AIO_INLINE_TURN / 2) {
        qemu_bh_schedule(home->turn_bh);
    }
    return true;
}

static bool raw_aio_at_once(const RawAIORequest *req)
{
    return req->file->native && (req->type & QEMU_AIO_READ) &&
           qatomic_read(&req->desc->at_once) == RAW_AIO_AT_ONCE;
}

/*
 * Whether a request is of a kind that can be served inline.
 *
 * Not FUA, since RWF_DSYNC waits; not O_DIRECT, which waits for the device,
 * unless io_submit(2) does so as well.
 * Writes wait for the end of a freeze of the file system, even with RWF_NOWAIT.
 * Where an IOThread has to wait so does its disk, as with any other I/O; but
 * the main loop has a monitor to serve, which may be what is asked to thaw it.
 */
static bool raw_aio_may_inline(const RawAIORequest *req)
{
    size_t bytes = raw_aio_bytes(req);
    size_t max = raw_aio_is_write(req->type) ? RAW_AIO_INLINE_MAX_WRITE
                                             : RAW_AIO_INLINE_MAX_READ;

    if ((req->desc->direct && !raw_aio_at_once(req)) ||
        !bytes || bytes > max ||
        (req->type & (RAW_AIO_ZONED | QEMU_AIO_MISALIGNED)) ||
        raw_aio_makes_stable(req) || req->qiov->niov > IOV_MAX) {
        return false;
    }
    if (raw_aio_is_write(req->type) &&
        req->home->ctx == qemu_get_aio_context()) {
        return false;
    }
    return raw_aio_has_preadv(req->file) &&
           !(req->file->disabled &
             (RAW_AIO_DISABLE_INLINE | RAW_AIO_DISABLE_NOWAIT));
}

/*
 * Whether a read that RWF_NOWAIT refuses with EAGAIN has been sent to the disk
 * all the same: Linux does so since 5.9.  Then a worker can collect one after
 * another, and to begin them here is worth while even if all of them miss.
 */
static bool raw_aio_misses_begin(void)
{
    static gsize answer;    /* 1: no, 2: yes */

    if (g_once_init_enter(&answer)) {
        struct utsname uts;
        int major = 0, minor = 0;

        if (uname(&uts) == 0) {
            sscanf(uts.release, "%d.%d", &major, &minor);
        }
        g_once_init_leave(&answer,
                          major > 5 || (major == 5 && minor >= 9) ? 2 : 1);
    }
    return answer == 2;
}

static RawAIOHint *raw_aio_inline_hint(const RawAIORequest *req)
{
    return raw_aio_is_write(req->type) ? &req->desc->inline_write
                                       : &req->desc->inline_read;
}

/*
 * The event loop has not served a request, or not all of it.  Whatever it was:
 * the pool does the rest without the flag, and decides.
 */
static void raw_aio_inline_missed(RawAIORequest *req, ssize_t res,
                                  unsigned suspect)
{
    RawAIOFile *f = req->file;

    req->tried_inline = true;
    req->begun = (req->type & QEMU_AIO_READ) && !req->desc->direct &&
                 (res >= 0 || res == -EAGAIN) && raw_aio_misses_begin();
    if (!req->begun) {
        raw_aio_hint_answer(raw_aio_inline_hint(req), false);
    }
    if (res < 0) {
        trace_raw_aio_inline_refused(f, req, res);
        if (raw_aio_means_unsupported(res) || res == -EIO) {
            req->suspect = suspect;
        }
    } else {
        trace_raw_aio_short(f, req->type, req->offset, raw_aio_bytes(req), res);
        raw_aio_count(f, RAW_AIO_SHORT_TRANSFERS);
        req->done = res;
        req->partial = res > 0;
    }
    raw_aio_count(f, RAW_AIO_INLINE_REFUSED);
}

#if defined(CONFIG_LINUX_AIO) && RAW_AIO_HAVE_IOCB_FLAGS
/*
 * Results of the ring come when the event loop has had a turn, too.  Not all of
 * them come before turn_bh, and then what is sent from here must not find the
 * last turn's budget.
 */
static void raw_aio_dispatched(RawAIOContext *home)
{
    unsigned dispatches = raw_laio_dispatches(home->ring);

    if (home->dispatches != dispatches) {
        home->dispatches = dispatches;
        home->inline_left = RAW_AIO_INLINE_TURN;
    }
}

static void raw_aio_batch_cb(void *opaque, ssize_t res)
{
    RawAIORequest *req = opaque;
    RawAIODesc *desc = req->desc;

    raw_aio_dispatched(req->home);
    if (unlikely(req->laio.stalled_ns)) {
        raw_aio_stalled(req->file, desc, req->laio.stalled_ns);
    }
    if (res == -ECANCELED) {
        raw_aio_end(req, RAW_AIO_INLINE_SERVED, res);
        return;
    }
    if (res == raw_aio_bytes(req)) {
        raw_aio_hint_answer(&desc->inline_read, true);
        raw_aio_batch_cost(req, raw_aio_read_was(desc, true));
        raw_aio_count(req->file, RAW_AIO_INLINE_BATCHED);
        raw_aio_end(req, RAW_AIO_INLINE_SERVED, 0);
        return;
    }
    raw_aio_inline_missed(req, res, RAW_AIO_NO_READ_BATCH);
    if (req->begun) {
        raw_aio_batch_cost(req, raw_aio_read_was(desc, false));
    } else {
        raw_aio_batch_bad(&desc->served);
        raw_aio_batch_bad(&desc->begun);
    }
    raw_aio_begin_pool(req);
}

static void raw_aio_section_end(void *opaque)
{
    RawAIOContext *home = opaque;

    if (home->section_reads >= RAW_AIO_BATCH_MIN) {
        home->several = RAW_AIO_BATCH_PATIENCE;
    } else if (home->several) {
        home->several--;
    }
    home->section_reads = 0;
}

/* Whether the event loop will rather begin the next reads than do them */
static bool raw_aio_expects_misses(RawAIODesc *desc)
{
    return qatomic_read(&desc->misses) > RAW_AIO_MISSES / 2;
}

/* Whether the reads of a section should go together */
static bool raw_aio_prefers_batch(RawAIODesc *desc)
{
    RawAIOReadCost *cost = raw_aio_expects_misses(desc) ? &desc->begun
                                                        : &desc->served;
    unsigned single = qatomic_read(&cost->single_ns);
    unsigned batch = qatomic_read(&cost->batch_ns);
    unsigned n = qatomic_read(&cost->choices) + 1;
    bool cheaper = batch + RAW_AIO_BATCH_EXTRA_NS < single;

    qatomic_set(&cost->choices, n);
    if (!single || !batch) {
        return single;
    }
    if (n % RAW_AIO_BATCH_PERIOD == 0 ||
        (n < RAW_AIO_BATCH_PERIOD && is_power_of_2(n))) {
        return !cheaper;
    }
    return cheaper;
}

/*
 * Let a read that the event loop may do go to the kernel together with those
 * that are sent with it, if there are several.  How many there will be is not
 * known, but how many there were the last time.
 *
 * Not through a ring that has no room: it may be full of requests that wait for
 * a device.
 *
 * Returns: true if the event loop must not do it now, since it is in the ring
 * (req->batched) or is for the native tier, where it is with O_DIRECT
 */
static bool raw_aio_batch(RawAIORequest *req)
{
    RawAIOFile *f = req->file;
    RawAIODesc *desc = req->desc;
    RawAIOContext *home = req->home;
    RawLaioRing *ring;

    if (!home->section_reads++) {
        home->section_batch = home->several && raw_aio_prefers_batch(desc);
        /* If there is no section, this is the end of it. */
        defer_call(raw_aio_section_end, home);
    }
    if (!home->section_batch ||
        (f->disabled & (RAW_AIO_DISABLE_NATIVE | RAW_AIO_DISABLE_BATCH)) ||
        raw_aio_knows(desc, RAW_AIO_NO_READ_BATCH)) {
        return false;
    }
    if (req->qiov->niov > 1 && ((f->disabled & RAW_AIO_DISABLE_IOCBV) ||
                                raw_aio_knows(desc, RAW_AIO_NO_READ_IOCBV))) {
        return false;
    }
    ring = raw_aio_context_ring(home, false);
    if (!ring || !raw_laio_has_room(ring)) {
        return false;
    }
    if (desc->direct) {
        return true;
    }

    trace_raw_aio_begin_batch(f, req);
    raw_aio_note_ring(f, ring);
    raw_laio_prep_rw(&req->laio, false, desc->fd, req->qiov->iov,
                     req->qiov->niov, req->offset, RAW_AIO_RWF_NOWAIT, false);
    req->laio.cb = raw_aio_batch_cb;
    req->laio.opaque = req;
    req->batched = true;
    raw_laio_submit(ring, &req->laio, f->aio_max_batch);
    return true;
}
#else
static bool raw_aio_batch(RawAIORequest *req)
{
    return false;
}
#endif

/*
 * Transfer at once what needs no wait.  Advances req->done.
 *
 * Returns: whether the request is complete; if not, it may be in the ring, see
 * raw_aio_batch()
 */
static bool raw_aio_try_inline(RawAIORequest *req)
{
    RawAIOFile *f = req->file;
    RawAIODesc *desc = req->desc;
    RawAIOContext *home = req->home;
    size_t bytes = raw_aio_bytes(req);
    int rwf = desc->direct ? 0 : RAW_AIO_RWF_NOWAIT;
    bool may_batch = f->native && (req->type & QEMU_AIO_READ) &&
                     bytes <= RAW_AIO_BATCH_MAX_BYTES;
    int64_t stalled_ns;
    ssize_t len;
    int ret;

    if (!raw_aio_may_inline(req) ||
        raw_aio_knows(desc, raw_aio_no_inline(req))) {
        return false;
    }
    if (!raw_aio_hint_ask(raw_aio_inline_hint(req))) {
        trace_raw_aio_inline_skip(f, req, "mostly in vain");
        return false;
    }
    if (raw_aio_is_slow(desc)) {
        trace_raw_aio_inline_skip(f, req, "made the event loop wait");
        return false;
    }
    if (!raw_aio_inline_afford(req)) {
        trace_raw_aio_inline_skip(f, req, "enough for this turn");
        return false;
    }

    if (may_batch && raw_aio_batch(req)) {
        return false;
    }

    raw_aio_watch_begin(&home->watch);
    len = raw_aio_transfer(req, req->qiov->iov, req->qiov->niov, req->offset,
                           rwf);
    stalled_ns = raw_aio_watch_end(&home->watch);
    ret = len < 0 ? -errno : len;
    if (unlikely(stalled_ns)) {
        raw_aio_stalled(f, desc, stalled_ns);
    }
    if (len == bytes) {
        raw_aio_hint_answer(raw_aio_inline_hint(req), true);
        req->partial = true; /* Nothing can be cancelled any more. */
    } else {
        raw_aio_inline_missed(req, ret, rwf ? raw_aio_no_inline(req) : 0);
    }
    if (may_batch && (len == bytes || req->begun)) {
        raw_aio_cost(&raw_aio_read_was(desc, len == bytes)->single_ns,
                     home->watch.took_ns);
    }
    return len == bytes;
}
#else
static bool raw_aio_try_inline(RawAIORequest *req)
{
    return false;
}
#endif

#ifdef CONFIG_LINUX_AIO
/* The bits of RawAIODesc.learnt that concern a request */

static unsigned raw_aio_no_nowait(const RawAIORequest *req)
{
    return raw_aio_is_write(req->type) ? RAW_AIO_NO_WRITE_NOWAIT
                                       : RAW_AIO_NO_READ_NOWAIT;
}

static unsigned raw_aio_no_native(const RawAIORequest *req)
{
    if (req->type & QEMU_AIO_FLUSH) {
        return RAW_AIO_NO_FDSYNC;
    }
    return raw_aio_is_write(req->type) ? RAW_AIO_NO_WRITE_NATIVE
                                       : RAW_AIO_NO_READ_NATIVE;
}

static unsigned raw_aio_no_iocbv(const RawAIORequest *req)
{
    return raw_aio_is_write(req->type) ? RAW_AIO_NO_WRITE_IOCBV
                                       : RAW_AIO_NO_READ_IOCBV;
}

static RawAIOHint *raw_aio_native_hint(const RawAIORequest *req)
{
    return raw_aio_is_write(req->type) ? &req->desc->native_write
                                       : &req->desc->native_read;
}

static void raw_aio_native_short(RawAIORequest *req, size_t len)
{
    trace_raw_aio_short(req->file, req->type, req->offset, raw_aio_bytes(req),
                        len);
    raw_aio_count(req->file, RAW_AIO_SHORT_TRANSFERS);
    if (raw_aio_once_only(req)) {
        raw_aio_end(req, RAW_AIO_NATIVE_SERVED, len ? -EIO : -ENOSPC);
        return;
    }
    req->done = len;
    req->partial = true;
    raw_aio_begin_pool(req);
}

static bool raw_aio_begin_by_worker(RawAIORequest *req);

static void raw_aio_native_failed(RawAIORequest *req, int ret)
{
    bool retry;

    if (ret == -ECANCELED) {
        retry = false;
    } else if (req->laio.refused) {
        /* Nothing has happened yet, whatever the request was. */
        retry = true;
    } else if (raw_aio_once_only(req)) {
        retry = false;
    } else {
        /*
         * With RWF_NOWAIT any error may be about the wait: kernels have said
         * EIO for it (ext4 before 5.5, btrfs before 5.9).  Without it an error
         * is an error, and a failed fdatasync must not be tried again, since
         * the kernel reports it once.  A signal is none.
         */
        retry = req->nowait || ret == -EINTR || raw_aio_means_unsupported(ret);
    }
    if (!retry) {
        raw_aio_end(req, RAW_AIO_NATIVE_SERVED, ret);
        return;
    }

    trace_raw_aio_native_refused(req->file, req, ret);
    raw_aio_count(req->file, RAW_AIO_NATIVE_REFUSED);
    if (ret == -EAGAIN && req->nowait && !req->laio.refused) {
        /*
         * It would have to wait for a lock or an allocation, but hardly for
         * the device: so a worker only submits it.  A write that allocates
         * holds the lock of the inode until then, not until it is done.
         */
        raw_aio_hint_answer(raw_aio_native_hint(req), false);
        if (raw_aio_begin_by_worker(req)) {
            return;
        }
    } else if (ret == -EINVAL && req->laio.refused && !req->array &&
               req->qiov && req->qiov->niov > 1) {
        /* So io_submit() says that it does not know an opcode. */
        req->suspect = raw_aio_no_iocbv(req);
    } else if (raw_aio_means_unsupported(ret)) {
        req->suspect = req->nowait ? raw_aio_no_nowait(req)
                                   : raw_aio_no_native(req);
    } else if (req->nowait && ret == -EIO) {
        /* Here EIO means a wait, so without the flag the loop would wait. */
        req->suspect = raw_aio_no_native(req);
    }
    raw_aio_begin_pool(req);
}

static void raw_aio_native_done(RawAIORequest *req, ssize_t res)
{
    if (unlikely(req->laio.stalled_ns)) {
        raw_aio_stalled(req->file, req->desc, req->laio.stalled_ns);
    }
    if (res < 0) {
        raw_aio_native_failed(req, res);
        return;
    }
    if (req->nowait) {
        raw_aio_hint_answer(raw_aio_native_hint(req), true);
    } else if (req->type & QEMU_AIO_READ) {
        unsigned n = qatomic_read(&req->desc->at_once);

        if (req->laio.at_once) {
            raw_aio_batch_cost(req, &req->desc->served);
        }
        qatomic_set(&req->desc->at_once, !req->laio.at_once ? 0 :
                                         MIN(n + 1, RAW_AIO_AT_ONCE));
    }
    if (res < raw_aio_bytes(req)) {
        raw_aio_native_short(req, res);
    } else {
        raw_aio_end(req, RAW_AIO_NATIVE_SERVED, 0);
    }
}

static void raw_aio_native_cb(void *opaque, ssize_t res)
{
    RawAIORequest *req = opaque;

    if (req->with_worker) {
        req->landed = true;
        req->landed_res = res;
        return;
    }
    raw_aio_native_done(req, res);
}

/* PAIOFunc */
static int raw_aio_submit_in_worker(void *opaque)
{
    RawAIORequest *req = opaque;

    return raw_laio_submit_reserved(&req->laio);
}

static void raw_aio_submitted_cb(void *opaque, int ret)
{
    RawAIORequest *req = opaque;

    req->with_worker = false;
    if (ret == 0) {
        raw_aio_count(req->file, RAW_AIO_NATIVE_BY_WORKER);
        if (req->landed) {
            raw_aio_native_done(req, req->landed_res);
        }
        return;
    }
    raw_laio_unreserve(req->home->ring, &req->laio);
    if (ret == -ECANCELED) {
        raw_aio_end(req, RAW_AIO_NATIVE_SERVED, ret);
        return;
    }
    /* Too little room in the kernel, or whatever: a worker can always do it. */
    if (ret == -EINVAL && req->qiov->niov > 1) {
        req->suspect = raw_aio_no_iocbv(req);
    }
    trace_raw_aio_native_refused(req->file, req, ret);
    raw_aio_count(req->file, RAW_AIO_NATIVE_REFUSED);
    raw_aio_begin_pool(req);
}

/*
 * Have a worker submit the request without RWF_NOWAIT.
 *
 * Returns: false if the ring can't take it
 */
static bool raw_aio_begin_by_worker(RawAIORequest *req)
{
    QEMUIOVector *qiov = req->qiov;

    req->nowait = false;
    if (req->array) {
        return false;
    }
    raw_laio_prep_rw(&req->laio, raw_aio_is_write(req->type), req->desc->fd,
                     qiov->iov, qiov->niov, req->offset, 0, false);
    if (!raw_laio_reserve(req->home->ring, &req->laio)) {
        return false;
    }
    trace_raw_aio_begin_by_worker(req->file, req);
    req->laio.cb = raw_aio_native_cb;
    req->laio.opaque = req;
    req->with_worker = true;
    req->pool = (PAIORequest) {
        .func = raw_aio_submit_in_worker,
        .arg = req,
        .class = PAIO_NORMAL,
        .lane = raw_aio_is_write(req->type) ? req->desc->write_lane : 0,
        .cb = raw_aio_submitted_cb,
        .opaque = req,
    };
    paio_submit(req->home->pool, &req->pool);
    return true;
}

/*
 * Submit to the native tier if it may be able to serve the request.
 *
 * Not FUA: an error of the write and one of making it stable could not be told
 * apart, and the second must not be hidden by a retry.
 */
static bool raw_aio_begin_native(RawAIORequest *req)
{
    RawAIOFile *f = req->file;
    RawAIODesc *desc = req->desc;
    bool is_flush = req->type & QEMU_AIO_FLUSH;
    RawLaioRing *ring;

    if (!f->native || !desc->direct || (req->type & QEMU_AIO_MISALIGNED) ||
        (f->disabled & RAW_AIO_DISABLE_NATIVE) ||
        raw_aio_knows(desc, raw_aio_no_native(req))) {
        return false;
    }
    /* A flush that may have to remember an error is for a worker as well. */
    if (is_flush ? qatomic_read(&f->was_cached) : raw_aio_makes_stable(req)) {
        return false;
    }
    ring = raw_aio_context_ring(req->home, true);
    if (!ring) {
        raw_aio_count(f, RAW_AIO_NATIVE_REFUSED);
        return false;
    }
    raw_aio_note_ring(f, ring);

    req->nowait = RAW_AIO_HAVE_IOCB_FLAGS && !is_flush &&
                  !raw_aio_once_only(req) &&
                  !(f->disabled & RAW_AIO_DISABLE_NOWAIT) &&
                  !raw_aio_knows(desc, raw_aio_no_nowait(req));
    req->array = !is_flush && req->qiov->niov > 1 &&
                 ((f->disabled & RAW_AIO_DISABLE_IOCBV) ||
                  raw_aio_knows(desc, raw_aio_no_iocbv(req)));
    if (req->array && raw_aio_once_only(req)) {
        return false;
    }
    if (!is_flush &&
        (raw_aio_is_slow(desc) ||
         (req->nowait && !raw_aio_hint_ask(raw_aio_native_hint(req))))) {
        return raw_aio_begin_by_worker(req);
    }

    trace_raw_aio_begin_native(f, req, req->nowait);
    if (is_flush) {
        raw_laio_prep_fdsync(&req->laio, desc->fd);
    } else {
        raw_laio_prep_rw(&req->laio, raw_aio_is_write(req->type), desc->fd,
                         req->qiov->iov, req->qiov->niov, req->offset,
                         req->nowait ? RAW_AIO_RWF_NOWAIT : 0, req->array);
    }
    req->laio.cb = raw_aio_native_cb;
    req->laio.opaque = req;
    raw_laio_submit(ring, &req->laio, f->aio_max_batch);
    return true;
}
#else
static bool raw_aio_begin_native(RawAIORequest *req)
{
    return false;
}
#endif

/*
 * Send a request on its way.  req->cb is called later from the event loop,
 * never from here: that is what keeps a chain of requests, each sent from the
 * completion of the one before, from growing the stack.
 *
 * Returns: true if the request is complete already, with success; then req->cb
 * is not called
 */
static bool raw_aio_begin(RawAIORequest *req)
{
    req->home = raw_aio_context_current();
    req->desc = raw_aio_desc_ref(req->file);
    trace_raw_aio_begin(req->file, req, req->type, req->offset,
                        raw_aio_bytes(req));

    /* 1. inline */
    if (raw_aio_try_inline(req)) {
        raw_aio_finish(req, RAW_AIO_INLINE_SERVED, 0);
        return true;
    }
    if (req->batched) {
        return false;
    }

    /* 2. native */
    if (!req->tried_inline && raw_aio_begin_native(req)) {
        return false;
    }

    /* 3. pool */
    raw_aio_begin_pool(req);
    return false;
}

/*
 * The coroutine form: the request lives on the stack of the coroutine
 */

typedef struct RawAIOCo {
    Coroutine *co;
    int ret;
} RawAIOCo;

static void raw_aio_co_cb(void *opaque, int ret)
{
    RawAIOCo *rco = opaque;

    rco->ret = ret;
    aio_co_wake(rco->co);
}

static int coroutine_fn raw_aio_co_request(RawAIORequest *req)
{
    RawAIOCo rco = { .co = qemu_coroutine_self() };

    req->cb = raw_aio_co_cb;
    req->opaque = &rco;
    if (raw_aio_begin(req)) {
        return 0;
    }
    qemu_coroutine_yield();
    return rco.ret;
}

int coroutine_fn raw_aio_co_rw(RawAIOFile *f, int type, int64_t offset,
                               QEMUIOVector *qiov, BdrvRequestFlags flags)
{
    RawAIORequest req = {
        .file = f,
        .type = type,
        .flags = flags,
        .offset = offset,
        .qiov = qiov,
    };

    return raw_aio_co_request(&req);
}

int coroutine_fn raw_aio_co_flush(RawAIOFile *f)
{
    RawAIORequest req = { .file = f, .type = QEMU_AIO_FLUSH };

    return raw_aio_co_request(&req);
}

int coroutine_fn raw_aio_co_run(RawAIOFile *f, PAIOClass class, int *fd,
                                PAIOFunc *func, void *arg)
{
    PAIOPool *pool = raw_aio_current_pool();
    RawAIODesc *desc;
    int ret;

    if (!f) {
        return paio_co_submit(pool, class, func, arg);
    }
    desc = raw_aio_get_desc(f, fd);
    ret = paio_co_submit(pool, class, func, arg);
    raw_aio_count(f, RAW_AIO_POOL_SERVED);
    raw_aio_put_desc(desc);
    return ret;
}

/*
 * The callback form
 */

struct RawAIOCB {
    BlockAIOCB common;
    RawAIORequest req;
    QSIMPLEQ_ENTRY(RawAIOCB) next;  /* in RawAIOContext.hits */
};

static void raw_aio_cancel_async(BlockAIOCB *common)
{
    RawAIORequest *req = &container_of(common, RawAIOCB, common)->req;

    if (req->partial) {
        return; /* A part has been written.  "done" may be a worker's now. */
    }
#ifdef CONFIG_LINUX_AIO
    if (req->home->ring && raw_laio_cancel(req->home->ring, &req->laio)) {
        return;
    }
#endif
    paio_cancel(req->home->pool, &req->pool);
}

static const AIOCBInfo raw_aio_aiocb_info = {
    .aiocb_size = sizeof(RawAIOCB),
    .cancel_async = raw_aio_cancel_async,
};

static void raw_aio_acb_cb(void *opaque, int ret)
{
    RawAIOCB *acb = opaque;

    acb->common.cb(acb->common.opaque, ret);
    qemu_aio_unref(acb);
    /* bdrv_aio_cancel() may be waiting for the reference. */
    aio_wait_kick();
}

/*
 * Deliver, in order, what was served inline before the bottom half ran.  As in
 * paio_done_bh(), a callback may run a nested loop that waits for the next one,
 * and what it sends is for the next turn.
 */
static void raw_aio_hits_bh(void *opaque)
{
    RawAIOContext *home = opaque;
    unsigned budget = home->nr_hits;
    RawAIOCB *acb;

    while (budget-- && (acb = QSIMPLEQ_FIRST(&home->hits))) {
        QSIMPLEQ_REMOVE_HEAD(&home->hits, next);
        home->nr_hits--;
        if (home->nr_hits) {
            qemu_bh_schedule(home->hits_bh);
        }
        raw_aio_acb_cb(acb, 0);
    }
}

BlockAIOCB *raw_aio_submit(RawAIOFile *f, int type, int64_t offset,
                           QEMUIOVector *qiov, BdrvRequestFlags flags,
                           BlockCompletionFunc *cb, void *opaque)
{
    RawAIOCB *acb = qemu_aio_get(&raw_aio_aiocb_info, NULL, cb, opaque);

    acb->req = (RawAIORequest) {
        .file = f,
        .type = type,
        .flags = flags,
        .offset = offset,
        .qiov = qiov,
        .cb = raw_aio_acb_cb,
        .opaque = acb,
    };
    if (raw_aio_begin(&acb->req)) {
        RawAIOContext *home = acb->req.home;

        QSIMPLEQ_INSERT_TAIL(&home->hits, acb, next);
        home->nr_hits++;
        qemu_bh_schedule(home->hits_bh);
    }
    return &acb->common;
}

/*
 * Files
 */

static unsigned raw_aio_parse_switches(const char *list)
{
    static const struct {
        const char *name;
        RawAIOSwitch bit;
    } names[] = {
        { "inline", RAW_AIO_DISABLE_INLINE },
        { "native", RAW_AIO_DISABLE_NATIVE },
        { "nowait", RAW_AIO_DISABLE_NOWAIT },
        { "preadv", RAW_AIO_DISABLE_PREADV },
        { "iocbv", RAW_AIO_DISABLE_IOCBV },
        { "batch", RAW_AIO_DISABLE_BATCH },
    };
    g_auto(GStrv) words = g_strsplit(list, ",", -1);
    unsigned disabled = 0;

    for (char **word = words; *word; word++) {
        unsigned bit = 0;

        for (int i = 0; i < ARRAY_SIZE(names); i++) {
            if (!strcmp(*word, names[i].name)) {
                bit = names[i].bit;
            }
        }
        if (!bit && **word) {
            warn_report_once("QEMU_RAW_AIO_DISABLE: '%s' is not one of inline, "
                             "native, nowait, preadv, iocbv, batch", *word);
        }
        disabled |= bit;
    }
    return disabled;
}

void raw_aio_open(RawAIOFile *f, int fd, bool native, uint64_t aio_max_batch)
{
    const char *switches = getenv("QEMU_RAW_AIO_DISABLE");

    *f = (RawAIOFile) {
        .native = native,
        .aio_max_batch = aio_max_batch,
        .disabled = switches ? raw_aio_parse_switches(switches) : 0,
        .desc = raw_aio_desc_new(fd),
    };
    f->was_cached = !f->desc->direct;
    qemu_mutex_init(&f->sync_lock);
    trace_raw_aio_open(f, fd, f->desc->direct, native);
}

void raw_aio_set_fd(RawAIOFile *f, int fd)
{
    RawAIODesc *desc = raw_aio_desc_new(fd);

    trace_raw_aio_open(f, fd, desc->direct, f->native);
    if (fd >= 0 && !desc->direct) {
        /* Before requests can see the descriptor: the xchg is a barrier. */
        qatomic_set(&f->was_cached, true);
    }
    /* Pairs with the read in raw_aio_desc_ref(). */
    desc = qatomic_xchg(&f->desc, desc);
    raw_aio_put_desc(desc);
}

void raw_aio_close(RawAIOFile *f)
{
    assert(qatomic_read(&f->desc->refcnt) == 1);
    raw_aio_put_desc(f->desc);
    f->desc = NULL;
    qemu_mutex_destroy(&f->sync_lock);
}

BlockStatsRawAio *raw_aio_query_stats(RawAIOFile *f)
{
    BlockStatsRawAio *stats = g_new(BlockStatsRawAio, 1);

    *stats = (BlockStatsRawAio) {
        .inline_served = stat64_get(&f->stats[RAW_AIO_INLINE_SERVED]),
        .inline_batched = stat64_get(&f->stats[RAW_AIO_INLINE_BATCHED]),
        .inline_refused = stat64_get(&f->stats[RAW_AIO_INLINE_REFUSED]),
        .native_served = stat64_get(&f->stats[RAW_AIO_NATIVE_SERVED]),
        .native_refused = stat64_get(&f->stats[RAW_AIO_NATIVE_REFUSED]),
        .native_by_worker = stat64_get(&f->stats[RAW_AIO_NATIVE_BY_WORKER]),
        .pool_served = stat64_get(&f->stats[RAW_AIO_POOL_SERVED]),
        .slow_submissions = stat64_get(&f->stats[RAW_AIO_SLOW_SUBMISSIONS]),
        .short_transfers = stat64_get(&f->stats[RAW_AIO_SHORT_TRANSFERS]),
        .ring_size = stat64_get(&f->stats[RAW_AIO_RING_SIZE]),
    };
    return stats;
}
