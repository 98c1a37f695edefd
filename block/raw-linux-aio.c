/*
 * Linux native AIO for the raw file engine
 *
 * One ring for each AioContext.  Requests wait in "pending" until a batch is
 * given to io_submit(2); completions are read from the ring that the kernel
 * shares with us, without a system call.
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
#include "qemu/event_notifier.h"
#include "block/raw-linux-aio.h"
#include "block/raw-aio-compat.h"
#include "trace.h"

/*
 * Requests that the kernel holds at a time.  All rings of a host share
 * fs.aio-max-nr (65536 by default), hence few.
 */
#define RAW_LAIO_ENTRIES 128

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

typedef QTAILQ_HEAD(, RawLaioRequest) RawLaioRequestList;

/* Everything is owned by the home thread of ctx, or constant. */
struct RawLaioRing {
    AioContext *ctx;
    io_context_t kernel;
    EventNotifier notifier; /* signalled by the kernel for each completion */
    unsigned entries;
    RawLaioShared *shared;  /* NULL if it can't be read */

    QEMUBH *flush_bh;       /* for nested event loops, see raw_laio_submit() */
    QEMUBH *done_bh;        /* something is left to dispatch */

    RawLaioRequestList pending; /* not yet given to the kernel */
    unsigned nr_pending;
    RawLaioRequestList failed;  /* refused by io_submit(2), or cancelled */
    unsigned nr_failed;
    unsigned in_flight;         /* in the kernel, or in the ring unread */
    bool blocked;               /* no room until something completes */

    /* Stand-in for shared->events[]: unread are [fetched_head, fetched_nr) */
    struct io_event fetched[RAW_LAIO_EVENTS];
    unsigned fetched_head;
    unsigned fetched_nr;
};

/*
 * Completion
 */

/* Number of events that can be read now */
static unsigned raw_laio_nr_events(RawLaioRing *ring)
{
    if (ring->shared) {
        /*
         * Acquire: the events are read after it.  Pairs with the barrier
         * before the store of the tail in the kernel's aio_complete().
         */
        uint32_t tail = qatomic_load_acquire(&ring->shared->tail);
        uint32_t head = ring->shared->head;

        return tail >= head ? tail - head : ring->shared->nr - head + tail;
    }

    if (ring->fetched_head == ring->fetched_nr && ring->in_flight) {
        struct timespec zero = { 0 };
        int ret = io_getevents(ring->kernel, 0, RAW_LAIO_EVENTS, ring->fetched,
                               &zero);

        ring->fetched_head = 0;
        ring->fetched_nr = MAX(ret, 0);
    }
    return ring->fetched_nr - ring->fetched_head;
}

/* Take the oldest event; there must be one. */
static RawLaioRequest *raw_laio_next_event(RawLaioRing *ring, ssize_t *res)
{
    struct io_event *event;
    struct iocb *iocb;

    if (ring->shared) {
        uint32_t head = ring->shared->head;

        event = &ring->shared->events[head];
        iocb = event->obj;
        *res = (long)event->res;
        /*
         * Release: the kernel may overwrite the event only after it was read.
         * Pairs with the load of the head in the kernel's aio_complete().
         */
        qatomic_store_release(&ring->shared->head,
                              (head + 1) % ring->shared->nr);
    } else {
        event = &ring->fetched[ring->fetched_head++];
        iocb = event->obj;
        *res = (long)event->res;
    }
    ring->in_flight--;
    return container_of(iocb, RawLaioRequest, iocb);
}

static unsigned raw_laio_nr_done(RawLaioRing *ring)
{
    return ring->nr_failed + raw_laio_nr_events(ring);
}

static RawLaioRequest *raw_laio_next_done(RawLaioRing *ring, ssize_t *res)
{
    RawLaioRequest *req = QTAILQ_FIRST(&ring->failed);

    if (req) {
        QTAILQ_REMOVE(&ring->failed, req, next);
        ring->nr_failed--;
        *res = req->res;
        return req;
    }
    return raw_laio_next_event(ring, res);
}

static void raw_laio_flush(void *opaque);

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

    defer_call_begin(); /* what the callbacks submit makes one batch */

    for (; budget && raw_laio_nr_done(ring); budget--) {
        ssize_t res;
        RawLaioRequest *req = raw_laio_next_done(ring, &res);

        if (raw_laio_nr_done(ring)) {
            qemu_bh_schedule(ring->done_bh);
        }
        if (ring->blocked) {
            /* There is room now.  A nested loop has to be able to use it. */
            ring->blocked = false;
            qemu_bh_schedule(ring->flush_bh);
        }
        trace_raw_laio_complete(ring, req, res);
        req->state = RAW_LAIO_IDLE;
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

static RawLaioRequest *raw_laio_pop_pending(RawLaioRing *ring)
{
    RawLaioRequest *req = QTAILQ_FIRST(&ring->pending);

    QTAILQ_REMOVE(&ring->pending, req, next);
    ring->nr_pending--;
    return req;
}

/* Complete a request that the kernel does not have, from the event loop. */
static void raw_laio_fail(RawLaioRing *ring, RawLaioRequest *req, int res)
{
    req->state = RAW_LAIO_FAILED;
    req->refused = true;
    req->res = res;
    QTAILQ_INSERT_TAIL(&ring->failed, req, next);
    ring->nr_failed++;
    qemu_bh_schedule(ring->done_bh);
}

/*
 * Give pending requests to the kernel until there are none or it takes no
 * more.  io_submit(2) has three ways to say so:
 *
 * - It takes only some.  The first that it did not take is at fault, but the
 *   error is not returned; it comes when that request is submitted first.
 * - EAGAIN: no room in the ring.  Completions make some, so wait for one; if
 *   none is to come, the kernel lacks something else, and waiting is no use.
 * - Any other error is about the first request, which completes with it.
 */
static void raw_laio_flush(void *opaque)
{
    RawLaioRing *ring = opaque;

    qemu_bh_cancel(ring->flush_bh);

    while (ring->nr_pending && !ring->blocked) {
        struct iocb *iocbs[RAW_LAIO_ENTRIES];
        unsigned room = ring->entries - ring->in_flight;
        RawLaioRequest *req;
        int n = 0;
        int ret;

        QTAILQ_FOREACH(req, &ring->pending, next) {
            if (n == room) {
                break;
            }
            iocbs[n++] = &req->iocb;
        }
        if (!n) {
            ring->blocked = true;
            break;
        }

        ret = io_submit(ring->kernel, n, iocbs);
        trace_raw_laio_submit(ring, n, ret);

        if (ret > 0) {
            ring->in_flight += ret;
            while (ret--) {
                raw_laio_pop_pending(ring)->state = RAW_LAIO_KERNEL;
            }
        } else if ((ret == -EAGAIN || ret == -EINTR || ret == 0) &&
                   ring->in_flight) {
            ring->blocked = true;
        } else {
            raw_laio_fail(ring, raw_laio_pop_pending(ring), ret ?: -EAGAIN);
        }
    }

    /*
     * Whatever completed within io_submit(2) needs no wait for the notifier.
     */
    if (ring->in_flight && raw_laio_nr_events(ring)) {
        qemu_bh_schedule(ring->done_bh);
    }
}

unsigned raw_laio_entries(const RawLaioRing *ring)
{
    return ring->entries;
}

void raw_laio_prep_rw(RawLaioRequest *req, bool is_write, int fd,
                      const struct iovec *iov, int niov, int64_t offset,
                      int rwf)
{
#if RAW_AIO_HAVE_IOCB_FLAGS
    if (is_write) {
        io_prep_pwritev2(&req->iocb, fd, iov, niov, offset, rwf);
    } else {
        io_prep_preadv2(&req->iocb, fd, iov, niov, offset, rwf);
    }
#else
    assert(!rwf);
    if (is_write) {
        io_prep_pwritev(&req->iocb, fd, iov, niov, offset);
    } else {
        io_prep_preadv(&req->iocb, fd, iov, niov, offset);
    }
#endif
}

void raw_laio_prep_fdsync(RawLaioRequest *req, int fd)
{
    io_prep_fdsync(&req->iocb, fd);
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
    io_set_eventfd(&req->iocb, event_notifier_get_fd(&ring->notifier));
    req->state = RAW_LAIO_PENDING;
    req->refused = false;
    QTAILQ_INSERT_TAIL(&ring->pending, req, next);
    ring->nr_pending++;

    if (ring->blocked) {
        return; /* raw_laio_dispatch() goes on */
    }
    if (ring->nr_pending >= raw_laio_max_batch(ring, dev_max_batch)) {
        raw_laio_flush(ring);
        return;
    }
    defer_call(raw_laio_flush, ring);
    if (ring->nr_pending == 1 && !ring->blocked) {
        /*
         * The first within a defer_call section.  A nested event loop inside
         * it may wait for this very request, so that loop has to be able to
         * submit it.
         */
        qemu_bh_schedule(ring->flush_bh);
    }
}

bool raw_laio_cancel(RawLaioRing *ring, RawLaioRequest *req)
{
    if (req->state != RAW_LAIO_PENDING) {
        return false;
    }
    QTAILQ_REMOVE(&ring->pending, req, next);
    ring->nr_pending--;
    raw_laio_fail(ring, req, -ECANCELED);
    return true;
}

/*
 * Life cycle
 */

RawLaioRing *raw_laio_new(AioContext *ctx, Error **errp)
{
    g_autofree RawLaioRing *ring = g_new0(RawLaioRing, 1);
    RawLaioShared *shared;
    int ret;

    ret = event_notifier_init(&ring->notifier, false);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Cannot create an event notifier");
        return NULL;
    }

    ret = io_setup(RAW_LAIO_ENTRIES, &ring->kernel);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Cannot create a Linux AIO context");
        if (ret == -EAGAIN) {
            error_append_hint(errp, "The limit fs.aio-max-nr is used up; "
                              "raise it with sysctl.\n");
        }
        event_notifier_cleanup(&ring->notifier);
        return NULL;
    }

    ring->ctx = ctx;
    ring->entries = RAW_LAIO_ENTRIES;
    shared = (RawLaioShared *)ring->kernel;
    if (shared->magic == RAW_LAIO_RING_MAGIC &&
        shared->incompat_features == RAW_LAIO_RING_INCOMPAT) {
        ring->shared = shared;
    }
    QTAILQ_INIT(&ring->pending);
    QTAILQ_INIT(&ring->failed);
    ring->flush_bh = aio_bh_new(ctx, raw_laio_flush, ring);
    ring->done_bh = aio_bh_new(ctx, raw_laio_done_bh, ring);
    aio_set_event_notifier(ctx, &ring->notifier, raw_laio_notifier_read,
                           raw_laio_notifier_poll,
                           raw_laio_notifier_poll_ready);
    trace_raw_laio_new(ring, ctx, ring->entries, ring->shared != NULL);
    return g_steal_pointer(&ring);
}

void raw_laio_free(RawLaioRing *ring)
{
    assert(!ring->nr_pending && !ring->nr_failed && !ring->in_flight);

    aio_set_event_notifier(ring->ctx, &ring->notifier, NULL, NULL, NULL);
    qemu_bh_delete(ring->flush_bh);
    qemu_bh_delete(ring->done_bh);
    io_destroy(ring->kernel);
    event_notifier_cleanup(&ring->notifier);
    g_free(ring);
}
