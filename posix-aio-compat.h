/*
 * Thread pool that runs blocking system calls for an AioContext
 *
 * The pool knows nothing of block drivers: it runs int func(void *arg) in a
 * worker thread and delivers the result to the AioContext it belongs to.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef QEMU_POSIX_AIO_COMPAT_H
#define QEMU_POSIX_AIO_COMPAT_H

#include "block/aio.h"
#include "qemu/queue.h"

typedef struct PAIOPool PAIOPool;
typedef struct PAIORequest PAIORequest;

/**
 * PAIOFunc: the work of a request
 * @arg: #PAIORequest.arg
 *
 * Runs in a worker thread, where it may block for any time.  It must not
 * touch state that belongs to an event loop.
 *
 * Returns: 0 or a positive value on success, negative errno on failure
 */
typedef int PAIOFunc(void *arg);

/**
 * PAIOClass: how long a request may hold a worker
 * @PAIO_NORMAL: reads, writes and the like
 * @PAIO_SLOW: flush, discard, write zeroes, truncate, copy.  Requests of this
 *             class never hold more than max(1, thread-pool-max - 1) workers,
 *             so that reads go on during a storm of flushes.
 */
typedef enum PAIOClass {
    PAIO_NORMAL,
    PAIO_SLOW,
    PAIO_CLASS__MAX,
} PAIOClass;

/*
 * Number of lanes.  Requests of one lane run one after another, because the
 * kernel would make them wait for each other in any case, or because the disk
 * is at work for all of them already; and a worker that waits is worse than a
 * request that waits in a list.  If they take long all the same, more of them
 * run side by side.  Many more lanes than a VM has busy disks, of which each
 * has two; two users of one lane only wait for each other now and then.
 */
#define PAIO_LANES 128

/* Where a request is; who may change it is said at each transition. */
typedef enum PAIOState {
    PAIO_IDLE,      /* not submitted, or completed */
    PAIO_INCOMING,  /* in PAIOPool.incoming; only the home thread sees it */
    PAIO_WAITING,   /* in PAIOLane.waiting; protected by PAIOPool.lock */
    PAIO_QUEUED,    /* in PAIOPool.queue; protected by PAIOPool.lock */
    PAIO_TAKEN,     /* a worker has it, or its result is on the way home */
} PAIOState;

/**
 * PAIORequest: one call of a function in a worker
 *
 * Provided by the submitter, who keeps it alive and unmoved until @cb is
 * called; from the entry of @cb on, the pool does not touch it any more.
 */
struct PAIORequest {
    /* Set by the submitter before paio_submit(), constant until @cb. */
    PAIOFunc *func;
    void *arg;
    PAIOClass class;
    unsigned lane;      /* 1 to PAIO_LANES, or 0: beside any other */
    /*
     * With a lane: how long (ns) func() may work, like for copying.  The lane
     * gets wider only for what takes longer, as that waits for something.
     */
    int64_t work_ns;
    /*
     * Called in the pool's AioContext, from its bottom half and never from
     * within paio_submit() or paio_cancel().
     */
    BlockCompletionFunc *cb;
    void *opaque;

    /* Below: owned by the pool. */

    /*
     * Written by the home thread and, from PAIO_WAITING to PAIO_TAKEN, by
     * workers, under PAIOPool.lock.
     */
    PAIOState state;
    /* Written by the worker before the request is pushed to PAIOPool.done. */
    int ret;
    /* Order and time (ns) of hand-over; protected by PAIOPool.lock. */
    uint64_t seq;
    int64_t queued_ns;
    /* In incoming, ready (home thread), waiting or queue (PAIOPool.lock). */
    QTAILQ_ENTRY(PAIORequest) next;
    /* In PAIOPool.done: written by the worker until the push succeeds. */
    PAIORequest *done_next;
};

/**
 * PAIOPoolInfo: a snapshot of a pool, for tests and trace
 * @threads: worker threads that exist now
 * @threads_peak: the most that existed at any time
 * @idle: workers waiting for work
 * @queued: requests no worker has taken yet
 * @wake_ups: how often an idle worker was woken
 * @spins: how often a worker without work looked for more before it slept
 * @lingers: how often the event loop turned instead of sleeping, as the result
 *           was to come soon; home thread only
 * @create_failed: thread creations that failed
 * @run_at_home: requests run by the home thread as no worker could exist
 */
typedef struct PAIOPoolInfo {
    int threads;
    int threads_peak;
    int idle;
    int queued;
    uint64_t wake_ups;
    uint64_t spins;
    uint64_t lingers;
    uint64_t create_failed;
    uint64_t run_at_home;
} PAIOPoolInfo;

/**
 * paio_pool_new: Create the pool of an AioContext.
 * @ctx: where results are delivered; must outlive the pool
 *
 * Creates no thread: the first request does.  Called in @ctx's home thread.
 * thread-pool-min and thread-pool-max are read by paio_pool_update_params(),
 * which the caller calls when the pool can be found by whoever changes them.
 */
PAIOPool *paio_pool_new(AioContext *ctx);

/**
 * paio_pool_free: Wait for the workers to end and free the pool.
 * @pool: a pool without requests in flight
 *
 * May be called in any thread once nothing can submit to @pool any more and the
 * callback of the last request has returned to the event loop.
 */
void paio_pool_free(PAIOPool *pool);

/**
 * paio_pool_update_params: Take over thread-pool-min/max of the AioContext.
 *
 * May be called in any thread while others submit.  Surplus workers go as soon
 * as they have finished what they do; missing ones are created by the home
 * thread.
 */
void paio_pool_update_params(PAIOPool *pool);

/**
 * paio_submit: Have @req run by a worker.
 *
 * Called in the home thread of the pool's AioContext.  Within a defer_call
 * section the requests are handed to the workers together at its end, or by
 * the event loop if that turns first.
 */
void paio_submit(PAIOPool *pool, PAIORequest *req);

/**
 * paio_cancel: Take back a request that no worker has taken yet.
 *
 * Called in the home thread.  On success the request completes soon with
 * -ECANCELED, through its callback and not from within this call.
 *
 * Returns: true if this call took it back; false if it is running, done, or was
 * taken back before, and completes as it would have without this call
 */
bool paio_cancel(PAIOPool *pool, PAIORequest *req);

/**
 * paio_co_submit: Run @func in a worker and wait for it in a coroutine.
 *
 * Called in the home thread of the pool's AioContext.
 *
 * Returns: what @func returned
 */
int coroutine_fn paio_co_submit(PAIOPool *pool, PAIOClass class,
                                PAIOFunc *func, void *arg);

/**
 * paio_pool_get_info: Read the state of a pool.
 *
 * May be called in any thread.
 */
void paio_pool_get_info(PAIOPool *pool, PAIOPoolInfo *info);

#endif /* QEMU_POSIX_AIO_COMPAT_H */
