/*
 * Linux native AIO for the raw file engine
 *
 * One ring for each AioContext.  Requests wait in "pending" until a batch is
 * given to io_submit(2); completions are read from memory that the kernel
 * shares with us, without a system call.
 *
 * All rings of a host share fs.aio-max-nr, so a ring starts with one small
 * context of the kernel and gets another, twice as large, each time its queue
 * is deeper than what it has.  A context can't be resized, and nothing is
 * gained by giving one back: a queue that was deep once will be again.
 *
 * Submission and completion never call each other: raw_laio_flush() only
 * submits, and whatever completes, even within io_submit(2), waits for
 * raw_laio_dispatch(), which the event loop calls.  This is what bounds the
 * stack at any queue depth.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/defer-call.h"
#include "qemu/error-report.h"
#include "qemu/event_notifier.h"
#include "block/raw-linux-aio.h"
#include "block/raw-aio-compat.h"
#include "block/raw-aio-watch.h"
#include "trace.h"

/*
 * Requests that the first context holds, and how many contexts there can be,
 * which makes 960.  fs.aio-max-nr is 65536 by default: 200 VMs with 4 disks and
 * an IOThread for each use 51200 of it to begin with.
 */
#define RAW_LAIO_ENTRIES 64
#define RAW_LAIO_CONTEXTS 4

/* How long (ns) not to ask for another context after the kernel refused one */
#define RAW_LAIO_GROW_AGAIN_NS (10 * NANOSECONDS_PER_SECOND)

/*
 * How long (ns) each file is submitted for by itself, after a submission for
 * several files was a stall: the next one will show whose fault it is.
 */
#define RAW_LAIO_ALONE_NS (10 * NANOSECONDS_PER_SECOND)

/* How many requests are given to io_submit(2) at a time, at most */
#define RAW_LAIO_SUBMIT_MAX 64

/*
 * Iocbs that are kept for requests which go as an array.  A request that finds
 * none uses its own for one element after another.
 */
#define RAW_LAIO_SPARE 128
/* How many of these a request may have: so one can't take them all. */
#define RAW_LAIO_PARTS 32

/* Default of aio-max-batch, the same as in block/linux-aio.c. */
#define RAW_LAIO_DEFAULT_BATCH 32

/* How many events are fetched at a time when the ring can't be read. */
#define RAW_LAIO_EVENTS 16

/*
 * The start of the memory that an aio_context_t points to, from fs/aio.c of
 * Linux.  No header has it, but the kernel promises to keep it: magic and
 * incompat_features say whether it did.
 */
#define RAW_LAIO_RING_MAGIC 0xa10a10a1
#define RAW_LAIO_RING_INCOMPAT 0

typedef struct RawLaioShared {
    uint32_t id;
    uint32_t nr;        /* size of events[], constant */
    uint32_t head;      /* next to be read; written by us */
    uint32_t tail;      /* next to be filled; written by the kernel */

    uint32_t magic;
    uint32_t compat_features;
    uint32_t incompat_features;
    uint32_t header_length;

    struct io_event events[];
} RawLaioShared;

/*
 * A context of the kernel.  Owned by the home thread, but for "kernel", which
 * is constant and used by workers too.
 */
typedef struct RawLaioContext {
    io_context_t kernel;
    RawLaioShared *shared;  /* NULL if it can't be read */
    unsigned entries;
    unsigned in_flight;     /* in the kernel, with a worker, or unread */

    /* Stand-in for shared->events[]: unread are [fetched_head, fetched_nr) */
    struct io_event fetched[RAW_LAIO_EVENTS];
    unsigned fetched_head;
    unsigned fetched_nr;
} RawLaioContext;

typedef QTAILQ_HEAD(, RawLaioIocb) RawLaioIocbList;

/* Everything is owned by the home thread of ctx, or constant. */
struct RawLaioRing {
    AioContext *ctx;
    EventNotifier notifier; /* signalled by the kernel for each completion */

    RawLaioContext contexts[RAW_LAIO_CONTEXTS];
    unsigned nr_contexts;
    unsigned entries;       /* of all of them */
    unsigned turn;          /* the context that was read last */
    unsigned nr_reserved;   /* of entries: not finished, submitted by workers */
    int64_t grow_again_ns;  /* not before */

    QEMUBH *flush_bh;       /* for nested event loops, see raw_laio_submit() */
    QEMUBH *done_bh;        /* something is left to dispatch */
    unsigned dispatches;    /* wraps around */

    RawLaioIocbList pending;    /* not yet given to the kernel */
    unsigned nr_pending;
    RawLaioIocbList failed;     /* refused by io_submit(2), or cancelled */
    unsigned nr_failed;
    bool blocked;               /* no room until something completes */

    RawLaioPartList spare;      /* iocbs of "array" that are not in use */
    RawLaioIocb *array;         /* made when first needed */

    RawAIOWatch watch;          /* of io_submit(2) */
    int64_t alone_until_ns;     /* see RAW_LAIO_ALONE_NS */
};

static void raw_laio_queue(RawLaioRing *ring, RawLaioIocb *iocb);
static void raw_laio_flush(void *opaque);

/*
 * Contexts
 */

void raw_laio_warn(Error *err, const char *what)
{
    static bool warned;

    /* Atomic: each AioContext can come here. */
    if (qatomic_xchg(&warned, true)) {
        error_free(err);
    } else {
        warn_reportf_err(err, "%s", what);
    }
}

static void raw_laio_setup_error(int ret, Error **errp)
{
    error_setg_errno(errp, -ret, "Cannot create a Linux AIO context");
    if (ret == -EAGAIN) {
        error_append_hint(errp, "The limit fs.aio-max-nr is used up; "
                          "raise it with sysctl.\n");
    }
}

static int raw_laio_add_context(RawLaioRing *ring)
{
    RawLaioContext *c = &ring->contexts[ring->nr_contexts];
    unsigned entries = RAW_LAIO_ENTRIES << ring->nr_contexts;
    RawLaioShared *shared;
    int ret;

    *c = (RawLaioContext) { .entries = entries };
    ret = io_setup(entries, &c->kernel);
    if (ret < 0) {
        trace_raw_laio_no_context(ring, entries, ret);
        return ret;
    }
    shared = (RawLaioShared *)c->kernel;
    if (shared->magic == RAW_LAIO_RING_MAGIC &&
        shared->incompat_features == RAW_LAIO_RING_INCOMPAT) {
        c->shared = shared;
    }
    ring->nr_contexts++;
    ring->entries += entries;
    trace_raw_laio_new(ring, ring->ctx, entries, c->shared != NULL);
    return 0;
}

static bool raw_laio_grow(RawLaioRing *ring)
{
    int ret;

    if (ring->nr_contexts == RAW_LAIO_CONTEXTS ||
        (ring->grow_again_ns && get_clock() < ring->grow_again_ns)) {
        return false;
    }
    ret = raw_laio_add_context(ring);
    if (ret < 0) {
        Error *err = NULL;

        raw_laio_setup_error(ret, &err);
        raw_laio_warn(err, "the queues of aio=native stay short: ");
        ring->grow_again_ns = get_clock() + RAW_LAIO_GROW_AGAIN_NS;
    }
    return ret == 0;
}

/* A context that has room, or NULL */
static RawLaioContext *raw_laio_room(RawLaioRing *ring)
{
    for (int i = 0; i < ring->nr_contexts; i++) {
        RawLaioContext *c = &ring->contexts[i];

        if (c->in_flight < c->entries) {
            return c;
        }
    }
    return raw_laio_grow(ring) ? &ring->contexts[ring->nr_contexts - 1] : NULL;
}

/* How many iocbs the contexts that there are can take now */
static unsigned raw_laio_free_room(const RawLaioRing *ring)
{
    unsigned n = ring->entries;

    for (int i = 0; i < ring->nr_contexts; i++) {
        n -= ring->contexts[i].in_flight;
    }
    return n;
}

/*
 * Completion
 */

/* Number of events that can be read now */
static unsigned raw_laio_context_events(RawLaioContext *c)
{
    if (!c->in_flight) {
        return 0;
    }
    if (c->shared) {
        /*
         * Acquire: the events are read after it.  Pairs with the barrier
         * before the store of the tail in the kernel's aio_complete().
         */
        uint32_t tail = qatomic_load_acquire(&c->shared->tail);
        uint32_t head = c->shared->head;

        return tail >= head ? tail - head : c->shared->nr - head + tail;
    }

    if (c->fetched_head == c->fetched_nr) {
        struct timespec zero = { 0 };
        int ret = io_getevents(c->kernel, 0, RAW_LAIO_EVENTS, c->fetched,
                               &zero);

        c->fetched_head = 0;
        c->fetched_nr = MAX(ret, 0);
    }
    return c->fetched_nr - c->fetched_head;
}

static unsigned raw_laio_nr_events(RawLaioRing *ring)
{
    unsigned n = 0;

    for (int i = 0; i < ring->nr_contexts; i++) {
        n += raw_laio_context_events(&ring->contexts[i]);
    }
    return n;
}

/* Take the oldest event of a context, which must have one. */
static RawLaioIocb *raw_laio_context_next(RawLaioContext *c)
{
    struct io_event *event;
    RawLaioIocb *iocb;

    if (c->shared) {
        uint32_t head = c->shared->head;

        event = &c->shared->events[head];
        iocb = container_of(event->obj, RawLaioIocb, iocb);
        iocb->res = (long)event->res;
        /*
         * Release: the kernel may overwrite the event only after it was read.
         * Pairs with the load of the head in the kernel's aio_complete().
         */
        qatomic_store_release(&c->shared->head, (head + 1) % c->shared->nr);
    } else {
        event = &c->fetched[c->fetched_head++];
        iocb = container_of(event->obj, RawLaioIocb, iocb);
        iocb->res = (long)event->res;
    }
    c->in_flight--;
    return iocb;
}

static unsigned raw_laio_nr_done(RawLaioRing *ring)
{
    return ring->nr_failed + raw_laio_nr_events(ring);
}

/*
 * There must be one.  The contexts take turns: the first one is used most, and
 * may have something new each time.
 */
static RawLaioIocb *raw_laio_next_done(RawLaioRing *ring)
{
    RawLaioIocb *iocb = QTAILQ_FIRST(&ring->failed);
    RawLaioContext *c;

    if (iocb) {
        QTAILQ_REMOVE(&ring->failed, iocb, next);
        ring->nr_failed--;
        return iocb;
    }
    do {
        ring->turn = (ring->turn + 1) % ring->nr_contexts;
        c = &ring->contexts[ring->turn];
    } while (!raw_laio_context_events(c));
    iocb = raw_laio_context_next(c);
    if (iocb->reserved) {
        iocb->reserved = false;
        ring->nr_reserved--;
    }
    return iocb;
}

/*
 * Requests that go as an array of iocbs
 */

/* Give iocbs to the next elements of the vector, and queue them. */
static void raw_laio_split(RawLaioRing *ring, RawLaioRequest *req)
{
    RawLaioIocb *part = &req->own;
    int n = 0;

    if (!ring->array) {
        ring->array = g_new0(RawLaioIocb, RAW_LAIO_SPARE);
        for (int i = 0; i < RAW_LAIO_SPARE; i++) {
            QSIMPLEQ_INSERT_TAIL(&ring->spare, &ring->array[i], part);
        }
    }

    QSIMPLEQ_INIT(&req->parts);
    while (req->niov && part && n < RAW_LAIO_PARTS) {
        const struct iovec *iov = req->iov++;

        req->niov--;
        if (!iov->iov_len) {
            continue;
        }
        if (part != &req->own) {
            QSIMPLEQ_REMOVE_HEAD(&ring->spare, part);
            part->req = req;
            part->iocb = req->own.iocb;
        }
        part->iocb.u.c.buf = iov->iov_base;
        part->iocb.u.c.nbytes = iov->iov_len;
        part->iocb.u.c.offset = req->offset;
        req->offset += iov->iov_len;
        QSIMPLEQ_INSERT_TAIL(&req->parts, part, part);
        n++;
        part = QSIMPLEQ_FIRST(&ring->spare);
    }

    req->outstanding = n;
    QSIMPLEQ_FOREACH(part, &req->parts, part) {
        raw_laio_queue(ring, part);
    }
}

/*
 * A part is finished.
 *
 * Returns: whether the request is, too; then its result is in @res
 */
static bool raw_laio_join(RawLaioRing *ring, RawLaioRequest *req, ssize_t *res)
{
    RawLaioIocb *part;
    ssize_t err = 0;
    bool whole = true;

    if (--req->outstanding) {
        return false;
    }

    while ((part = QSIMPLEQ_FIRST(&req->parts))) {
        QSIMPLEQ_REMOVE_HEAD(&req->parts, part);
        /* What comes after a gap does not count. */
        if (whole) {
            whole = part->res == part->iocb.u.c.nbytes;
            err = MIN(part->res, 0);
            req->refused = part->state == RAW_LAIO_FAILED;
            req->done += MAX(part->res, 0);
        }
        part->state = RAW_LAIO_IDLE;
        if (part != &req->own) {
            QSIMPLEQ_INSERT_HEAD(&ring->spare, part, part);
        }
    }
    if (whole && req->niov) {
        raw_laio_split(ring, req);
        if (req->outstanding) {
            /* A callback may run a nested loop that waits for this request. */
            qemu_bh_schedule(ring->flush_bh);
            return false;
        }
        /* The elements that were left are empty. */
    }
    *res = req->done ?: err;
    return true;
}

/*
 * Dispatch
 */

/*
 * Deliver what was done when the dispatch began.
 *
 * A callback may run a nested event loop that waits for another finished
 * request.  These stay in the ring, which is reached through @ring, and
 * done_bh is scheduled before each callback that leaves some there.  The nested
 * loop may also wait for a request that the ring had no room for: flush_bh
 * submits it.  And a callback may submit requests that finish at once, and so
 * on: budget bounds the dispatch, the rest waits for the next turn of the event
 * loop.
 */
static void raw_laio_dispatch(RawLaioRing *ring)
{
    unsigned budget = raw_laio_nr_done(ring);

    ring->dispatches++;
    defer_call_begin(); /* what the callbacks submit makes one batch */

    for (; budget && raw_laio_nr_done(ring); budget--) {
        RawLaioIocb *iocb = raw_laio_next_done(ring);
        RawLaioRequest *req = iocb->req;
        ssize_t res = iocb->res;

        if (raw_laio_nr_done(ring)) {
            qemu_bh_schedule(ring->done_bh);
        }
        if (ring->blocked) {
            /* There is room now.  A nested loop has to be able to use it. */
            ring->blocked = false;
            qemu_bh_schedule(ring->flush_bh);
        }
        trace_raw_laio_complete(ring, req, res);
        if (!req->iov) {
            req->refused = iocb->state == RAW_LAIO_FAILED;
            iocb->state = RAW_LAIO_IDLE;
        } else if (!raw_laio_join(ring, req, &res)) {
            continue;
        }
        req->cb(req->opaque, res);
    }

    if (raw_laio_nr_done(ring)) {
        qemu_bh_schedule(ring->done_bh);
    } else {
        /* Only the home thread schedules it, so nothing gets lost. */
        qemu_bh_cancel(ring->done_bh);
    }

    /* Not deferred: this may be a nested loop within a defer_call section. */
    raw_laio_flush(ring);
    defer_call_end();
}

static void raw_laio_done_bh(void *opaque)
{
    raw_laio_dispatch(opaque);
}

static void raw_laio_notifier_read(EventNotifier *e)
{
    RawLaioRing *ring = container_of(e, RawLaioRing, notifier);

    /*
     * Cleared before the tail is read: what completes later signals anew.
     * The kernel signals after it has advanced the tail.
     */
    event_notifier_test_and_clear(e);
    raw_laio_dispatch(ring);
}

static bool raw_laio_notifier_poll(void *opaque)
{
    EventNotifier *e = opaque;
    RawLaioRing *ring = container_of(e, RawLaioRing, notifier);

    return raw_laio_nr_events(ring) > 0;
}

static void raw_laio_notifier_poll_ready(EventNotifier *e)
{
    raw_laio_dispatch(container_of(e, RawLaioRing, notifier));
}

/*
 * Submission
 */

static RawLaioIocb *raw_laio_pop_pending(RawLaioRing *ring)
{
    RawLaioIocb *iocb = QTAILQ_FIRST(&ring->pending);

    QTAILQ_REMOVE(&ring->pending, iocb, next);
    ring->nr_pending--;
    return iocb;
}

/* Complete what the kernel does not have, from the event loop. */
static void raw_laio_fail(RawLaioRing *ring, RawLaioIocb *iocb, int res)
{
    iocb->state = RAW_LAIO_FAILED;
    iocb->res = res;
    QTAILQ_INSERT_TAIL(&ring->failed, iocb, next);
    ring->nr_failed++;
    qemu_bh_schedule(ring->done_bh);
}

/* Returns: what io_submit(2) says about the first pending iocbs */
static int raw_laio_submit_some(RawLaioRing *ring, RawLaioContext *c)
{
    struct iocb *iocbs[RAW_LAIO_SUBMIT_MAX];
    unsigned room = MIN(c->entries - c->in_flight, RAW_LAIO_SUBMIT_MAX);
    RawLaioRequest *first = QTAILQ_FIRST(&ring->pending)->req;
    bool alone = ring->alone_until_ns && get_clock() < ring->alone_until_ns;
    bool mixed = false;
    RawLaioIocb *iocb;
    int64_t stalled_ns;
    int n = 0;
    int ret;

    QTAILQ_FOREACH(iocb, &ring->pending, next) {
        bool other = n && iocb->iocb.aio_fildes != iocbs[0]->aio_fildes;

        if (n == room || (other && alone)) {
            break;
        }
        mixed |= other;
        iocbs[n++] = &iocb->iocb;
    }

    raw_aio_watch_begin(&ring->watch);
    ret = io_submit(c->kernel, n, iocbs);
    stalled_ns = raw_aio_watch_end(&ring->watch);
    if (unlikely(stalled_ns)) {
        trace_raw_laio_stalled(ring, stalled_ns, mixed);
        if (mixed) {
            ring->alone_until_ns = get_clock() + RAW_LAIO_ALONE_NS;
        } else {
            first->stalled_ns = stalled_ns;
        }
    }
    trace_raw_laio_submit(ring, n, ret);
    return ret;
}

/*
 * Give pending requests to the kernel until there are none or it takes no
 * more.  io_submit(2) has three ways to say so:
 *
 * - It takes only some.  The first that it did not take is at fault, but the
 *   error is not returned; it comes when that request is submitted first.
 * - EAGAIN: no room in the context.  Completions make some, so wait for one; if
 *   none is to come, the kernel lacks something else, and waiting is no use.
 * - Any other error is about the first request, which completes with it.
 */
static void raw_laio_flush(void *opaque)
{
    RawLaioRing *ring = opaque;

    qemu_bh_cancel(ring->flush_bh);

    while (ring->nr_pending && !ring->blocked) {
        RawLaioContext *c = raw_laio_room(ring);
        int ret;

        if (!c) {
            ring->blocked = true;
            break;
        }
        ret = raw_laio_submit_some(ring, c);
        if (ret > 0) {
            unsigned cost_ns = MIN(ring->watch.took_ns / ret, UINT_MAX);
            unsigned together = ret;
            bool at_once;

            c->in_flight += ret;
            at_once = raw_laio_context_events(c) == c->in_flight;
            while (ret--) {
                RawLaioIocb *iocb = raw_laio_pop_pending(ring);

                iocb->state = RAW_LAIO_KERNEL;
                iocb->context = c;
                iocb->req->at_once = at_once;
                iocb->req->together = together;
                iocb->req->cost_ns = cost_ns;
                cost_ns = 0;
            }
        } else if ((ret == -EAGAIN || ret == -EINTR || ret == 0) &&
                   c->in_flight) {
            ring->blocked = true;
        } else {
            raw_laio_fail(ring, raw_laio_pop_pending(ring), ret ?: -EAGAIN);
        }
    }

    /*
     * Whatever completed within io_submit(2) needs no wait for the notifier.
     */
    if (raw_laio_nr_events(ring)) {
        qemu_bh_schedule(ring->done_bh);
    }
}

static void raw_laio_queue(RawLaioRing *ring, RawLaioIocb *iocb)
{
    io_set_eventfd(&iocb->iocb, event_notifier_get_fd(&ring->notifier));
    iocb->state = RAW_LAIO_PENDING;
    QTAILQ_INSERT_TAIL(&ring->pending, iocb, next);
    ring->nr_pending++;
}

unsigned raw_laio_entries(const RawLaioRing *ring)
{
    return ring->entries;
}

unsigned raw_laio_dispatches(const RawLaioRing *ring)
{
    return ring->dispatches;
}

bool raw_laio_has_room(const RawLaioRing *ring)
{
    return !ring->blocked && raw_laio_free_room(ring) > ring->nr_pending;
}

void raw_laio_prep_rw(RawLaioRequest *req, bool is_write, int fd,
                      const struct iovec *iov, int niov, int64_t offset,
                      int rwf, bool array)
{
    struct iocb *iocb = &req->own.iocb;

    req->iov = NULL;
    if (array && niov != 1) {
        req->iov = iov;
        req->niov = niov;
        req->offset = offset;
        req->done = 0;
        niov = 1; /* raw_laio_split() says which */
    }
    if (niov == 1) {
        if (is_write) {
            io_prep_pwrite(iocb, fd, iov->iov_base, iov->iov_len, offset);
        } else {
            io_prep_pread(iocb, fd, iov->iov_base, iov->iov_len, offset);
        }
    } else if (is_write) {
        io_prep_pwritev(iocb, fd, iov, niov, offset);
    } else {
        io_prep_preadv(iocb, fd, iov, niov, offset);
    }
#if RAW_AIO_HAVE_IOCB_FLAGS
    iocb->aio_rw_flags = rwf;
#else
    assert(!rwf);
#endif
}

void raw_laio_prep_fdsync(RawLaioRequest *req, int fd)
{
    req->iov = NULL;
    io_prep_fdsync(&req->own.iocb, fd);
}

static unsigned raw_laio_max_batch(RawLaioRing *ring, uint64_t dev_max_batch)
{
    uint64_t max = ring->ctx->aio_max_batch ?: RAW_LAIO_DEFAULT_BATCH;

    /* A file that wants short latency can lower what its context allows. */
    max = MIN_NON_ZERO(max, dev_max_batch);
    return MIN(max, ring->entries);
}

void raw_laio_submit(RawLaioRing *ring, RawLaioRequest *req,
                     uint64_t dev_max_batch)
{
    bool first = !ring->nr_pending;

    req->own.req = req;
    req->stalled_ns = 0;
    if (req->iov) {
        raw_laio_split(ring, req);
        if (!req->outstanding) {
            req->iov = NULL; /* All elements are empty. */
        }
    }
    if (!req->iov) {
        raw_laio_queue(ring, &req->own);
    }

    if (ring->blocked) {
        return; /* raw_laio_dispatch() goes on */
    }
    if (ring->nr_pending >= raw_laio_max_batch(ring, dev_max_batch)) {
        raw_laio_flush(ring);
        return;
    }
    defer_call(raw_laio_flush, ring);
    if (first && ring->nr_pending && !ring->blocked) {
        /*
         * This is within a defer_call section.  A nested event loop inside it
         * may wait for this very request, so that loop has to be able to
         * submit it.
         */
        qemu_bh_schedule(ring->flush_bh);
    }
}

bool raw_laio_cancel(RawLaioRing *ring, RawLaioRequest *req)
{
    RawLaioIocb *part;

    if (req->iov) {
        if (req->done || !req->outstanding) {
            return false;
        }
        QSIMPLEQ_FOREACH(part, &req->parts, part) {
            if (part->state != RAW_LAIO_PENDING) {
                return false;
            }
        }
        QSIMPLEQ_FOREACH(part, &req->parts, part) {
            QTAILQ_REMOVE(&ring->pending, part, next);
            ring->nr_pending--;
            raw_laio_fail(ring, part, -ECANCELED);
        }
        return true;
    }

    if (req->own.state != RAW_LAIO_PENDING) {
        return false;
    }
    QTAILQ_REMOVE(&ring->pending, &req->own, next);
    ring->nr_pending--;
    raw_laio_fail(ring, &req->own, -ECANCELED);
    return true;
}

/*
 * Submission by a worker
 */

bool raw_laio_reserve(RawLaioRing *ring, RawLaioRequest *req)
{
    RawLaioContext *c;

    assert(!req->iov);
    if ((ring->nr_reserved >= ring->entries / 2 ||
         raw_laio_free_room(ring) <= ring->nr_pending) &&
        !raw_laio_grow(ring)) {
        return false;
    }
    c = raw_laio_room(ring);
    if (!c) {
        return false;
    }
    c->in_flight++;
    ring->nr_reserved++;
    req->own.reserved = true;
    io_set_eventfd(&req->own.iocb, event_notifier_get_fd(&ring->notifier));
    req->own.req = req;
    req->own.context = c;
    req->own.state = RAW_LAIO_KERNEL;
    req->at_once = false;
    req->stalled_ns = 0;
    req->together = 0;
    req->cost_ns = 0;
    return true;
}

int raw_laio_submit_reserved(RawLaioRequest *req)
{
    struct iocb *iocb = &req->own.iocb;
    int ret;

    do {
        /* After success req->own belongs to the home thread again. */
        ret = io_submit(req->own.context->kernel, 1, &iocb);
    } while (ret == -EINTR);
    return ret == 1 ? 0 : ret ?: -EAGAIN;
}

void raw_laio_unreserve(RawLaioRing *ring, RawLaioRequest *req)
{
    req->own.context->in_flight--;
    ring->nr_reserved--;
    req->own.reserved = false;
    req->own.state = RAW_LAIO_IDLE;
    if (ring->blocked) {
        ring->blocked = false;
        qemu_bh_schedule(ring->flush_bh);
    }
}

/*
 * Life cycle
 */

RawLaioRing *raw_laio_new(AioContext *ctx, Error **errp)
{
    g_autofree RawLaioRing *ring = g_new0(RawLaioRing, 1);
    int ret;

    ret = event_notifier_init(&ring->notifier, false);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Cannot create an event notifier");
        return NULL;
    }

    ring->ctx = ctx;
    ret = raw_laio_add_context(ring);
    if (ret < 0) {
        raw_laio_setup_error(ret, errp);
        event_notifier_cleanup(&ring->notifier);
        return NULL;
    }

    QTAILQ_INIT(&ring->pending);
    QTAILQ_INIT(&ring->failed);
    QSIMPLEQ_INIT(&ring->spare);
    ring->flush_bh = aio_bh_new(ctx, raw_laio_flush, ring);
    ring->done_bh = aio_bh_new(ctx, raw_laio_done_bh, ring);
    aio_set_event_notifier(ctx, &ring->notifier, raw_laio_notifier_read,
                           raw_laio_notifier_poll,
                           raw_laio_notifier_poll_ready);
    return g_steal_pointer(&ring);
}

void raw_laio_free(RawLaioRing *ring)
{
    assert(!ring->nr_pending && !ring->nr_failed);

    aio_set_event_notifier(ring->ctx, &ring->notifier, NULL, NULL, NULL);
    qemu_bh_delete(ring->flush_bh);
    qemu_bh_delete(ring->done_bh);
    for (int i = 0; i < ring->nr_contexts; i++) {
        assert(!ring->contexts[i].in_flight);
        io_destroy(ring->contexts[i].kernel);
    }
    event_notifier_cleanup(&ring->notifier);
    g_free(ring->array);
    g_free(ring);
}
