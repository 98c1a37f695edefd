/*
 * Thread pool that runs blocking system calls for an AioContext
 *
 * A request travels in one direction:
 *
 *   incoming   what the home thread submitted in this turn; needs no lock
 *      |       paio_hand_over(): one lock and as many wake-ups as there is
 *      v       work for idle workers
 *  (waiting)   only if the request's lane is full; protected by the lock
 *      |       paio_admit_locked(): there is room in the lane
 *      v
 *    queue     one list for each class, protected by the lock
 *      |       paio_take_locked(): a worker takes the oldest that it may
 *      v
 *   (worker)   func(arg), without the lock
 *      |       paio_push_done(): lock-free; only the first request on an
 *      v       empty list wakes the event loop
 *     done
 *      |       paio_done_bh(): takes the whole list at once
 *      v
 *    ready     in the order of completion, needs no lock
 *      |
 *      v
 *    cb(opaque, ret)
 *
 * "Home thread" is whoever runs the AioContext: its IOThread or, for the main
 * context, whoever holds the BQL (which may be a vCPU thread that submits).
 *
 * Only the home thread creates workers, so that they inherit the affinity of
 * the event loop and not of a vCPU.  They are added when requests have waited
 * for PAIO_GROW_NS with no worker idle, which a timer of the AioContext
 * notices: the next submission may never come while all workers are blocked,
 * for example in a FUSE file system that this process itself serves.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/atomic.h"
#include "qemu/coroutine.h"
#include "qemu/defer-call.h"
#include "qemu/error-report.h"
#include "qemu/lockable.h"
#include "qemu/main-loop.h"
#include "qemu/thread.h"
#include "qemu/timer.h"
#include "qemu/tsan.h"
#include "posix-aio-compat.h"
#include "trace/trace-root.h"

/*
 * How long a request waits in the queue before a worker is added.  A few times
 * a device access or a thread switch, so that a burst that the existing
 * workers can digest creates no threads.
 */
#define PAIO_GROW_NS (500 * SCALE_US)

/*
 * A worker that finds no work looks for more before it sleeps, for up to twice
 * as long as waking it has taken lately, see paio_spin_locked().  That differs
 * by far between machines, and within these bounds it is measured: wake_ns.
 */
#define PAIO_SPIN_MIN_NS (10 * SCALE_US)
#define PAIO_SPIN_MAX_NS (200 * SCALE_US)

/* How many looks at PAIOPool.arrivals between two looks at the clock */
#define PAIO_SPIN_LOOKS 32

/* Where spinning does not pay, it is tried again so often, so many times. */
#define PAIO_SPIN_TRIAL_EVERY   256
#define PAIO_SPIN_TRIALS        8

/* How many workers are woken outside the lock at a time */
#define PAIO_WAKE_BATCH 16

/* How long a surplus worker waits for work, as in util/thread-pool.c. */
#define PAIO_IDLE_MS (10 * 1000)

/* After a failed thread creation, how long the other workers have to do. */
#define PAIO_CREATE_RETRY_NS NANOSECONDS_PER_SECOND

/*
 * A lane gets wider when a request takes longer than this and its work_ns for
 * each of those that run side by side, and narrower again below half of it.
 * Above what a write to the page cache takes, and below what it takes when it
 * waits for a disk or a server.  For reads that are under way it is the disk's
 * pace that counts: above 20,000 a second one worker keeps up with it, and with
 * less it matters little how many are woken, but much that none waits for an
 * older one.
 */
#define PAIO_LANE_SLOW_NS (100 * SCALE_US)

typedef QTAILQ_HEAD(, PAIORequest) PAIORequestList;

/* Protected by PAIOPool.lock */
typedef struct PAIOLane {
    PAIORequestList waiting;
    int running;        /* admitted to the queue, or run by a worker */
    int width;          /* so many may run; at least 1 */
    int64_t moved_ns;   /* when one was last admitted or finished */
} PAIOLane;

typedef struct PAIOWorker {
    PAIOPool *pool;
    pthread_t thread;
    /* Waits for @woken with PAIOPool.lock. */
    QemuCond cond;

    /* Protected by PAIOPool.lock. */
    bool woken;     /* taken off the idle list by someone who has work */
    int64_t woken_ns;   /* when that was */
    bool borrowed;  /* created by a vCPU thread: goes as soon as it can */
    bool retired;   /* does nothing any more but return */
    QLIST_ENTRY(PAIOWorker) idle_next;

    /* In PAIOPool.workers: home thread. */
    QLIST_ENTRY(PAIOWorker) next;
} PAIOWorker;

struct PAIOPool {
    /* Constant until paio_pool_free() */
    AioContext *ctx;
    QEMUBH *flush_bh;   /* scheduled and cancelled by the home thread only */
    QEMUBH *done_bh;
    QEMUBH *manage_bh;
    QEMUBH *linger_bh;  /* scheduled and cancelled by the home thread only */
    int nr_cpus;        /* that this process may use */

    /* Owned by the home thread. */
    PAIORequestList incoming;
    PAIORequestList ready;
    unsigned nr_ready;  /* length of ready */
    unsigned in_flight; /* submitted, callback not called yet */
    QLIST_HEAD(, PAIOWorker) workers;   /* until they are joined */
    QEMUTimer grow_timer;
    int64_t no_create_before_ns;
    int64_t linger_until_ns;
    uint64_t lingers;

    /*
     * Finished requests, newest first.  Pushed by workers with cmpxchg, taken
     * as a whole by the home thread with xchg.
     */
    PAIORequest *done;

    /*
     * Changes when there may be work for a spinning worker, which reads it.
     * Atomic, and only a hint: a worker that misses it looks at the queue with
     * the lock.
     */
    unsigned arrivals;

    QemuMutex lock;

    /* The fields below are protected by lock. */
    PAIORequestList queue[PAIO_CLASS__MAX];
    int nr_queued[PAIO_CLASS__MAX];
    PAIOLane lane[PAIO_LANES];
    int nr_waiting;     /* in all lanes */
    uint64_t seq;
    QLIST_HEAD(, PAIOWorker) idle;
    int nr_workers;     /* created and not retired */
    int nr_idle;        /* in the idle list */
    int nr_waking;      /* on their way to the queue: woken or just created */
    int nr_spinning;    /* 0 or 1: will look at the queue before it sleeps */
    int nr_slow;        /* workers that run a PAIO_SLOW request */
    int min_threads;
    int max_threads;
    int nr_peak;
    bool stopping;
    bool may_spin;      /* the event loop polls: as of the last hand-over */
    int64_t ran_dry_ns; /* when a worker last found no work; 0: none since */
    int64_t gap_ns;     /* mean time from then to the next hand-over */
    int64_t wake_ns;    /* mean time from waking a worker to its running */
    int64_t run_ns;     /* mean time that func() takes */
    unsigned dry;       /* how often a worker found no work */
    uint64_t wake_ups;
    uint64_t spins;
    uint64_t create_failed;
    uint64_t run_at_home;
};

/*
 * Queue and workers.  Everything here is called with pool->lock held.
 */

static int paio_slow_room_locked(PAIOPool *pool)
{
    return MAX(1, pool->max_threads - 1) - pool->nr_slow;
}

/* How many of the queued requests a worker would be allowed to take now */
static int paio_runnable_locked(PAIOPool *pool)
{
    int slow = MIN(pool->nr_queued[PAIO_SLOW], paio_slow_room_locked(pool));

    return pool->nr_queued[PAIO_NORMAL] + MAX(slow, 0);
}

/* The request to be taken next, or NULL if none may be taken */
static PAIORequest *paio_next_locked(PAIOPool *pool)
{
    PAIORequest *normal = QTAILQ_FIRST(&pool->queue[PAIO_NORMAL]);
    PAIORequest *slow = QTAILQ_FIRST(&pool->queue[PAIO_SLOW]);

    if (!slow || paio_slow_room_locked(pool) <= 0) {
        return normal;
    }
    return normal && normal->seq < slow->seq ? normal : slow;
}

static void paio_enqueue_locked(PAIOPool *pool, PAIORequest *req, int64_t now)
{
    req->seq = pool->seq++;
    req->queued_ns = now;
    req->state = PAIO_QUEUED;
    QTAILQ_INSERT_TAIL(&pool->queue[req->class], req, next);
    pool->nr_queued[req->class]++;
}

static void paio_unqueue_locked(PAIOPool *pool, PAIORequest *req)
{
    assert(req->state == PAIO_QUEUED);
    QTAILQ_REMOVE(&pool->queue[req->class], req, next);
    pool->nr_queued[req->class]--;
    req->state = PAIO_TAKEN;
}

static PAIORequest *paio_take_locked(PAIOPool *pool)
{
    PAIORequest *req = paio_next_locked(pool);

    if (req) {
        paio_unqueue_locked(pool, req);
        if (req->class == PAIO_SLOW) {
            pool->nr_slow++;
        }
    }
    return req;
}

/* Take an idle worker, whose condition is then to be signalled. */
static PAIOWorker *paio_rouse_locked(PAIOPool *pool)
{
    /* Last in, first out: the caches are warm, and the others may expire. */
    PAIOWorker *w = QLIST_FIRST(&pool->idle);

    QLIST_REMOVE(w, idle_next);
    pool->nr_idle--;
    pool->nr_waking++;
    pool->wake_ups++;
    w->woken = true;
    w->woken_ns = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    return w;
}

/* How many idle workers there is work for, beyond those that look for it */
static int paio_to_wake_locked(PAIOPool *pool)
{
    return MIN(pool->nr_idle, paio_runnable_locked(pool) - pool->nr_waking -
                              pool->nr_spinning);
}

/*
 * For any thread: with the lock held, a worker can't go and be freed before it
 * is signalled.
 */
static void paio_wake_one_locked(PAIOPool *pool)
{
    qemu_cond_signal(&paio_rouse_locked(pool)->cond);
}

/* Wake as many idle workers as there is work for, and no more. */
static void paio_wake_locked(PAIOPool *pool)
{
    for (int n = paio_to_wake_locked(pool); n > 0; n--) {
        paio_wake_one_locked(pool);
    }
    if (pool->nr_spinning && paio_runnable_locked(pool) > pool->nr_waking) {
        /* Read by paio_watch_arrivals(). */
        qatomic_inc(&pool->arrivals);
    }
}

/* The same in two halves: at most PAIO_WAKE_BATCH are put into @woken... */
static int paio_rouse_some_locked(PAIOPool *pool, PAIOWorker **woken)
{
    int i, n = MIN(paio_to_wake_locked(pool), PAIO_WAKE_BATCH);

    for (i = 0; i < n; i++) {
        woken[i] = paio_rouse_locked(pool);
    }
    return i;
}

/*
 * ...and signalled without the lock, for which a worker that runs at once on
 * this CPU would have to wait.  Home thread only: nobody else frees workers.
 */
static void paio_signal(PAIOWorker **woken, int n)
{
    for (int i = 0; i < n; i++) {
        qemu_cond_signal(&woken[i]->cond);
    }
}

/*
 * Lanes
 */

static PAIOLane *paio_lane(PAIOPool *pool, unsigned lane)
{
    return &pool->lane[lane - 1];
}

/* Queue what the lane has room for. */
static void paio_admit_locked(PAIOPool *pool, PAIOLane *lane, int64_t now)
{
    PAIORequest *req;

    while (lane->running < lane->width &&
           (req = QTAILQ_FIRST(&lane->waiting))) {
        assert(req->state == PAIO_WAITING);
        QTAILQ_REMOVE(&lane->waiting, req, next);
        pool->nr_waiting--;
        lane->running++;
        lane->moved_ns = now;
        paio_enqueue_locked(pool, req, now);
    }
}

static void paio_wait_in_lane_locked(PAIOPool *pool, PAIORequest *req,
                                     int64_t now)
{
    PAIOLane *lane = paio_lane(pool, req->lane);

    req->state = PAIO_WAITING;
    QTAILQ_INSERT_TAIL(&lane->waiting, req, next);
    pool->nr_waiting++;
    paio_admit_locked(pool, lane, now);
}

/* A request of the lane, which began to run at @start, is done. */
static void paio_leave_lane_locked(PAIOPool *pool, PAIOLane *lane,
                                   int64_t slow_ns, int64_t start, int64_t now)
{
    int64_t each = (now - start) / lane->width;

    if (each < slow_ns / 2) {
        lane->width = MAX(1, lane->width - 1);
    } else if (each >= slow_ns && !QTAILQ_EMPTY(&lane->waiting)) {
        lane->width = MIN(lane->width + 1, pool->max_threads);
    }
    lane->running--;
    lane->moved_ns = now;
    paio_admit_locked(pool, lane, now);

    /* The caller looks at the queue next: it is on its way to one of them. */
    pool->nr_waking++;
    paio_wake_locked(pool);
    pool->nr_waking--;
}

/* Whatever runs in a lane may never return: let another one try. */
static void paio_widen_stuck_lanes_locked(PAIOPool *pool, int64_t now)
{
    if (!pool->nr_waiting) {
        return;
    }
    for (int i = 0; i < PAIO_LANES; i++) {
        PAIOLane *lane = &pool->lane[i];

        if (!QTAILQ_EMPTY(&lane->waiting) &&
            now - lane->moved_ns >= PAIO_GROW_NS) {
            /* No limit: those that are admitted may still lack a worker. */
            lane->width++;
            paio_admit_locked(pool, lane, now);
        }
    }
}

/*
 * Spinning
 *
 * A sleeping worker costs the event loop a system call, and the request a wait
 * until the worker runs.  So one worker of a pool goes on looking for work for
 * a while, for no longer than twice what waking it takes, if the recent past
 * says that work will come meanwhile: if the time from a worker's finding
 * nothing to the next hand-over has been shorter on average.  Nobody needs to
 * wake that worker: it counts as one on its way, since it always looks at the
 * queue, with the lock, before it sleeps.
 *
 * Two things can make each other sleep: an event loop that waits long for a
 * worker to wake up stops polling, and is slow itself then.  So spinning is
 * tried again now and then, a few times in a row.
 */

/* Workers of all pools that spin now; atomic, no ordering needed */
static int paio_spinners;

/*
 * No more than half of the CPUs, so that the threads that send requests keep
 * theirs; none on a machine with one.
 */
static bool paio_spinner_get(PAIOPool *pool)
{
    if (qatomic_fetch_inc(&paio_spinners) < pool->nr_cpus / 2) {
        return true;
    }
    qatomic_dec(&paio_spinners);
    return false;
}

/* The pool has run out of work; called by the worker that noticed. */
static void paio_ran_dry_locked(PAIOPool *pool)
{
    pool->ran_dry_ns = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    pool->dry++;
}

/* Exponential; what is above @max counts as that. */
static void paio_average(int64_t *mean, int64_t ns, int64_t max)
{
    *mean += (MIN(ns, max) - *mean) / 8;
}

/* How long a worker may spin */
static int64_t paio_spin_limit_locked(PAIOPool *pool)
{
    return MIN(MAX(2 * pool->wake_ns, PAIO_SPIN_MIN_NS), PAIO_SPIN_MAX_NS);
}

/* Work has come: learn whether it would have paid to wait for it. */
static void paio_learn_gap_locked(PAIOPool *pool, int64_t now)
{
    /* Who does not let the event loop poll does not want workers to spin. */
    pool->may_spin = pool->ctx->poll_max_ns > 0;
    if (pool->may_spin && pool->ran_dry_ns) {
        /* One long pause must not outweigh a hundred short ones. */
        paio_average(&pool->gap_ns, now - pool->ran_dry_ns,
                     4 * paio_spin_limit_locked(pool));
    }
    pool->ran_dry_ns = 0;
}

static bool paio_spin_pays_locked(PAIOPool *pool, int64_t limit)
{
    return pool->gap_ns < limit ||
           pool->dry % PAIO_SPIN_TRIAL_EVERY < PAIO_SPIN_TRIALS;
}

static bool paio_surplus_locked(PAIOPool *pool)
{
    return pool->stopping || pool->nr_workers > pool->max_threads;
}

/* Returns: whether pool->arrivals is something else than @seen before @end */
static bool paio_watch_arrivals(PAIOPool *pool, unsigned seen, int64_t end)
{
    do {
        for (int i = 0; i < PAIO_SPIN_LOOKS; i++) {
            /*
             * A hint from paio_hand_over() or paio_wake_locked(): what it
             * means is read under the lock.
             */
            if (qatomic_read(&pool->arrivals) != seen) {
                return true;
            }
            cpu_relax();
        }
        /* Whoever else wants this CPU may be the one who sends the work. */
        sched_yield();
    } while (qemu_clock_get_ns(QEMU_CLOCK_REALTIME) < end);
    return false;
}

/*
 * Look for work without sleeping.  Whoever wanted the worker to work or to go
 * meanwhile has not woken it, as it was not idle.
 *
 * Returns: whether there is work, or it is to go
 */
static bool paio_spin_locked(PAIOPool *pool)
{
    int64_t limit = paio_spin_limit_locked(pool);
    int64_t end = pool->ran_dry_ns + limit;
    bool again, found;

    if (!pool->may_spin || pool->nr_spinning ||
        !paio_spin_pays_locked(pool, limit) || !paio_spinner_get(pool)) {
        return false;
    }
    pool->nr_spinning++;
    pool->spins++;
    do {
        unsigned seen = qatomic_read(&pool->arrivals);

        qemu_mutex_unlock(&pool->lock);
        /* What arrives may be taken by another worker that was done. */
        again = paio_watch_arrivals(pool, seen, end);
        qemu_mutex_lock(&pool->lock);
        found = paio_runnable_locked(pool) > 0 || paio_surplus_locked(pool);
    } while (again && !found);
    pool->nr_spinning--;
    qatomic_dec(&paio_spinners);
    return found;
}

/*
 * Wait for work.  Returns false if the worker is to go since nothing came, and
 * nothing can have been handed to it.
 */
static bool paio_wait_locked(PAIOPool *pool, PAIOWorker *w)
{
    if (w->borrowed) {
        return false;
    }

    QLIST_INSERT_HEAD(&pool->idle, w, idle_next);
    pool->nr_idle++;

    while (!w->woken) {
        if (!qemu_cond_timedwait(&w->cond, &pool->lock, PAIO_IDLE_MS) &&
            !w->woken && pool->nr_workers > pool->min_threads) {
            QLIST_REMOVE(w, idle_next);
            pool->nr_idle--;
            return false;
        }
    }
    w->woken = false;
    pool->nr_waking--;
    paio_average(&pool->wake_ns,
                 qemu_clock_get_ns(QEMU_CLOCK_REALTIME) - w->woken_ns,
                 PAIO_SPIN_MAX_NS);
    return true;
}

/*
 * Lingering
 *
 * What spinning is for workers, this is for the event loop: to sleep and be
 * woken by a worker takes longer than a write to the page cache.  The adaptive
 * polling of the loop does not find out, since how long the loop was blocked,
 * by which it goes, contains the wake-up.  So when all that is in flight should
 * be done before it pays to sleep, the loop goes on turning, with its timers
 * and other handlers, for twice as long as a worker would spin.  Like that,
 * never if the loop is not to poll at all.
 *
 * Twice: measured with O_DIRECT reads of 120 us where to wake up takes 40 to
 * 100 us.  With the limit of a worker the loop often gave up just before the
 * end, having used as much CPU time for nothing.
 */
#define PAIO_LINGER_SPINS 2

/* Pools whose event loop lingers now; atomic, no ordering needed */
static int paio_lingerers;

/* How long the event loop should linger for what was just handed over, or 0 */
static int64_t paio_linger_locked(PAIOPool *pool)
{
    int64_t limit = PAIO_LINGER_SPINS * paio_spin_limit_locked(pool);

    return pool->may_spin && pool->in_flight * pool->run_ns < limit ? limit
                                                                     : 0;
}

static void paio_linger_end(PAIOPool *pool)
{
    if (pool->linger_until_ns) {
        pool->linger_until_ns = 0;
        qatomic_dec(&paio_lingerers);
    }
}

static void paio_linger_begin(PAIOPool *pool, int64_t until)
{
    /* As with paio_spinner_get(): the others are for those who do the work. */
    if (!pool->linger_until_ns &&
        qatomic_fetch_inc(&paio_lingerers) >= pool->nr_cpus / 2) {
        qatomic_dec(&paio_lingerers);
        return;
    }
    pool->linger_until_ns = until;
    pool->lingers++;
    qemu_bh_schedule(pool->linger_bh);
}

static void paio_linger_bh(void *opaque)
{
    PAIOPool *pool = opaque;

    if (!pool->in_flight ||
        qemu_clock_get_ns(QEMU_CLOCK_REALTIME) >= pool->linger_until_ns) {
        paio_linger_end(pool);
        return;
    }
    /* Perhaps the worker waits for this CPU. */
    sched_yield();
    qemu_bh_schedule(pool->linger_bh);
}

/*
 * Workers
 */

static void paio_push_done(PAIOPool *pool, PAIORequest *req)
{
    PAIORequest *old = qatomic_read(&pool->done);
    PAIORequest *cur;

    for (;;) {
        req->done_next = old;
        /*
         * Publishes req->ret and whatever func() wrote; pairs with the xchg
         * in paio_collect_done().  From here on @req may be gone.
         */
        cur = qatomic_cmpxchg(&pool->done, old, req);
        if (cur == old) {
            break;
        }
        old = cur;
    }

    /*
     * Not the first: whoever was has scheduled the bottom half, which has not
     * emptied the list yet, so it will see this one as well.
     */
    if (!old) {
        qemu_bh_schedule(pool->done_bh);
    }
}

/* Returns: when it was done */
static int64_t paio_run(PAIOPool *pool, PAIORequest *req)
{
    int64_t end;

    req->ret = req->func(req->arg);
    /* Before the push: whom that wakes may take this CPU. */
    end = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    paio_push_done(pool, req);
    return end;
}

/* The lock is held on entry and exit, but not while the request runs. */
static void paio_run_unlocked(PAIOPool *pool, PAIORequest *req)
{
    /* After paio_run() the request may be gone. */
    PAIOLane *lane = req->lane ? paio_lane(pool, req->lane) : NULL;
    int64_t lane_slow_ns = PAIO_LANE_SLOW_NS + req->work_ns;
    bool slow = req->class == PAIO_SLOW;
    int64_t start, end;

    qemu_mutex_unlock(&pool->lock);
    start = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    end = paio_run(pool, req);
    qemu_mutex_lock(&pool->lock);

    paio_average(&pool->run_ns, end - start, 4 * PAIO_SPIN_MAX_NS);
    if (slow) {
        pool->nr_slow--;
    }
    if (lane) {
        paio_leave_lane_locked(pool, lane, lane_slow_ns, start, end);
    }
}

static void *paio_worker(void *opaque)
{
    PAIOWorker *w = opaque;
    PAIOPool *pool = w->pool;

#if defined(CONFIG_PTHREAD_SETNAME_NP_W_TID)
    pthread_setname_np(pthread_self(), "paio-worker");
#endif
    QEMU_TSAN_ANNOTATE_THREAD_NAME("paio-worker");

    qemu_mutex_lock(&pool->lock);
    pool->nr_waking--;
    while (!paio_surplus_locked(pool)) {
        PAIORequest *req = paio_take_locked(pool);

        if (!req) {
            paio_ran_dry_locked(pool);
            if (!paio_spin_locked(pool) && !paio_wait_locked(pool, w)) {
                break;
            }
            continue;
        }
        paio_run_unlocked(pool, req);
        if (w->borrowed && pool->nr_workers > 1) {
            break;
        }
    }

    pool->nr_workers--;
    w->retired = true;
    /* If this worker was woken for work, someone else has to do it. */
    paio_wake_locked(pool);
    if (!pool->stopping) {
        qemu_bh_schedule(pool->manage_bh);
    }
    qemu_mutex_unlock(&pool->lock);
    return NULL;
}

/*
 * Creation of workers: home thread only
 */

/* Returns: 0 or a positive errno, as pthread_create() does */
static int paio_create_thread(PAIOWorker *w)
{
    sigset_t set, oldset;
    int err;

    /*
     * Not qemu_thread_create(), which ends the process when there can be no
     * more threads.  Signals are for the main thread; those which the thread
     * raises itself can't be blocked.
     */
    sigfillset(&set);
    sigdelset(&set, SIGSEGV);
    sigdelset(&set, SIGFPE);
    sigdelset(&set, SIGILL);
    pthread_sigmask(SIG_SETMASK, &set, &oldset);
    err = pthread_create(&w->thread, NULL, paio_worker, w);
    pthread_sigmask(SIG_SETMASK, &oldset, NULL);
    return err;
}

/*
 * A nested event loop of the main context can run in a vCPU thread, whose
 * affinity is not what a worker should have for long.
 */
static bool paio_in_foreign_thread(PAIOPool *pool)
{
#ifdef CONFIG_LINUX
    return pool->ctx == qemu_get_aio_context() &&
           qemu_get_thread_id() != getpid();
#else
    return false;
#endif
}

static void paio_worker_free(PAIOWorker *w)
{
    qemu_cond_destroy(&w->cond);
    g_free(w);
}

static void paio_join(PAIOWorker *w)
{
    pthread_join(w->thread, NULL);
    QLIST_REMOVE(w, next);
    paio_worker_free(w);
}

static void paio_join_retired(PAIOPool *pool)
{
    PAIOWorker *w, *tmp;

    QLIST_FOREACH_SAFE(w, &pool->workers, next, tmp) {
        bool retired;

        WITH_QEMU_LOCK_GUARD(&pool->lock) {
            retired = w->retired;
        }
        if (retired) {
            paio_join(w);
        }
    }
}

/* Add a worker.  Returns: 0, or a negative errno if that is impossible now */
static int paio_add_worker(PAIOPool *pool)
{
    PAIOWorker *w = g_new0(PAIOWorker, 1);
    int err;

    w->pool = pool;
    w->borrowed = paio_in_foreign_thread(pool);
    qemu_cond_init(&w->cond);

    /* Counted before it runs, so that nobody wants one more meanwhile. */
    WITH_QEMU_LOCK_GUARD(&pool->lock) {
        pool->nr_workers++;
        pool->nr_waking++;
    }

    err = paio_create_thread(w);
    trace_paio_create_thread(pool, pool->ctx, err);

    WITH_QEMU_LOCK_GUARD(&pool->lock) {
        if (err) {
            pool->nr_workers--;
            pool->nr_waking--;
            pool->create_failed++;
            /* Others may have counted on it. */
            paio_wake_locked(pool);
        } else {
            pool->nr_peak = MAX(pool->nr_peak, pool->nr_workers);
        }
    }
    if (err) {
        pool->no_create_before_ns =
            qemu_clock_get_ns(QEMU_CLOCK_REALTIME) + PAIO_CREATE_RETRY_NS;
        paio_worker_free(w);
        return -err;
    }
    QLIST_INSERT_HEAD(&pool->workers, w, next);
    return 0;
}

/*
 * The last resort: no worker exists and none can be created.  Serve one request
 * in the event loop, which is better than never, and let the loop turn.
 */
static void paio_run_at_home(PAIOPool *pool, int err)
{
    PAIORequest *req;

    warn_report_once("No worker thread can be created for disk I/O (%s): the "
                     "event loop does the work and may stall; raise the limit "
                     "on processes and threads", strerror(-err));

    WITH_QEMU_LOCK_GUARD(&pool->lock) {
        req = paio_take_locked(pool);
        if (req) {
            trace_paio_run_at_home(pool, req);
            pool->run_at_home++;
            paio_run_unlocked(pool, req);
        }
    }
    qemu_bh_schedule(pool->manage_bh);
}

static void paio_arm_timer(PAIOPool *pool, int64_t now)
{
    if (!timer_pending(&pool->grow_timer)) {
        timer_mod(&pool->grow_timer,
                  MAX(now + PAIO_GROW_NS, pool->no_create_before_ns));
    }
}

/* More work than workers on their way to it, though there could be more */
static bool paio_short_of_workers_locked(PAIOPool *pool)
{
    return paio_runnable_locked(pool) > pool->nr_waking + pool->nr_spinning &&
           pool->nr_workers < pool->max_threads;
}

/*
 * See that there are enough workers: thread-pool-min, one as soon as there is
 * work, and one more if a request has waited for PAIO_GROW_NS and no worker is
 * on its way.  As long as that can change without a new request, look again.
 */
static void paio_manage(PAIOPool *pool)
{
    /* Leave to the main loop what it can do later with the right affinity. */
    bool foreign = paio_in_foreign_thread(pool);
    int64_t now = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    bool below_min, lacking, none, waiting;
    bool grown = false;
    int err = 0;

    for (;;) {
        bool grow;

        WITH_QEMU_LOCK_GUARD(&pool->lock) {
            paio_widen_stuck_lanes_locked(pool, now);
            paio_wake_locked(pool);
            none = !pool->nr_workers;
            below_min = pool->nr_workers < pool->min_threads;
            lacking = paio_short_of_workers_locked(pool);
            grow = lacking && !pool->nr_waking && !grown &&
                   now >= pool->no_create_before_ns &&
                   now - paio_next_locked(pool)->queued_ns >= PAIO_GROW_NS;
            waiting = pool->nr_waiting;
        }
        if (err || !((below_min && !foreign) || (lacking && none) || grow)) {
            break;
        }
        err = paio_add_worker(pool);
        grown = true;
    }

    if (err && lacking && none) {
        paio_run_at_home(pool, err);
    } else if (lacking || below_min || waiting) {
        paio_arm_timer(pool, now);
    }
}

static void paio_manage_bh(void *opaque)
{
    PAIOPool *pool = opaque;

    paio_join_retired(pool);
    paio_manage(pool);
}

static void paio_grow_timer_cb(void *opaque)
{
    paio_manage(opaque);
}

/*
 * Submission: home thread only
 */

/* Give what has come in to the workers. */
static void paio_hand_over(void *opaque)
{
    PAIOPool *pool = opaque;
    PAIOWorker *woken[PAIO_WAKE_BATCH];
    int nr_woken;
    bool none, lacking;
    PAIORequest *req;
    int64_t now, linger_ns;
    unsigned n = 0;

    qemu_bh_cancel(pool->flush_bh);
    if (QTAILQ_EMPTY(&pool->incoming)) {
        return;
    }

    now = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    WITH_QEMU_LOCK_GUARD(&pool->lock) {
        while ((req = QTAILQ_FIRST(&pool->incoming))) {
            QTAILQ_REMOVE(&pool->incoming, req, next);
            if (req->lane) {
                paio_wait_in_lane_locked(pool, req, now);
            } else {
                paio_enqueue_locked(pool, req, now);
            }
            n++;
        }
        paio_learn_gap_locked(pool, now);
        nr_woken = paio_rouse_some_locked(pool, woken);
        none = !pool->nr_workers;
        lacking = paio_short_of_workers_locked(pool) || pool->nr_waiting;
        /* Not for a worker that has to wake up first. */
        linger_ns = nr_woken || none ? 0 : paio_linger_locked(pool);
    }
    /* Read by paio_watch_arrivals(), whose caller then wants the lock. */
    qatomic_inc(&pool->arrivals);
    while (nr_woken) {
        paio_signal(woken, nr_woken);
        if (nr_woken < PAIO_WAKE_BATCH) {
            break;
        }
        WITH_QEMU_LOCK_GUARD(&pool->lock) {
            nr_woken = paio_rouse_some_locked(pool, woken);
        }
    }
    trace_paio_hand_over(pool, n);

    if (linger_ns) {
        paio_linger_begin(pool, now + linger_ns);
    }
    if (none) {
        qemu_bh_schedule(pool->manage_bh);
    } else if (lacking) {
        paio_arm_timer(pool, now);
    }
}

void paio_submit(PAIOPool *pool, PAIORequest *req)
{
    assert(pool->ctx == qemu_get_current_aio_context());

    trace_paio_submit(pool, req, req->class);
    req->state = PAIO_INCOMING;
    QTAILQ_INSERT_TAIL(&pool->incoming, req, next);
    pool->in_flight++;

    defer_call(paio_hand_over, pool);
    if (QTAILQ_FIRST(&pool->incoming) == req) {
        /*
         * The first within a defer_call section.  A nested event loop inside
         * it may wait for this very request, so that loop has to be able to
         * hand it over.
         */
        qemu_bh_schedule(pool->flush_bh);
    }
}

/*
 * Completion: home thread only
 */

static void paio_make_ready(PAIOPool *pool, PAIORequest *req)
{
    QTAILQ_INSERT_TAIL(&pool->ready, req, next);
    pool->nr_ready++;
}

/* Move what the workers have finished to pool->ready, oldest first. */
static void paio_collect_done(PAIOPool *pool)
{
    PAIORequest *newest, *oldest = NULL;

    /*
     * Pairs with the cmpxchg in paio_push_done().  The list is empty now, so
     * the next worker to push schedules done_bh.
     */
    newest = qatomic_xchg(&pool->done, NULL);
    while (newest) {
        PAIORequest *next = newest->done_next;

        newest->done_next = oldest;
        oldest = newest;
        newest = next;
    }
    for (; oldest; oldest = oldest->done_next) {
        paio_make_ready(pool, oldest);
    }
}

/*
 * Deliver what was done when the dispatch began.
 *
 * Two things must hold whatever a callback does.  It may run a nested event
 * loop that waits for another finished request: these stay in pool->ready,
 * which is reached through pool, and done_bh is scheduled again before each
 * callback that leaves some there.  And it may submit a new request that
 * finishes at once, and so on: budget bounds the dispatch, the rest waits for
 * the next turn of the event loop, after timers and other handlers.
 */
static void paio_done_bh(void *opaque)
{
    PAIOPool *pool = opaque;
    PAIORequest *req;
    unsigned budget;

    paio_collect_done(pool);
    budget = pool->nr_ready;

    defer_call_begin(); /* what the callbacks submit is handed over together */
    while (budget-- && (req = QTAILQ_FIRST(&pool->ready))) {
        BlockCompletionFunc *cb = req->cb;
        void *cb_opaque = req->opaque;
        int ret = req->ret;

        QTAILQ_REMOVE(&pool->ready, req, next);
        pool->nr_ready--;
        if (!QTAILQ_EMPTY(&pool->ready)) {
            qemu_bh_schedule(pool->done_bh);
        }
        req->state = PAIO_IDLE;
        pool->in_flight--;
        trace_paio_complete(pool, req, ret);
        cb(cb_opaque, ret);
    }
    defer_call_end();

    if (!QTAILQ_EMPTY(&pool->ready)) {
        qemu_bh_schedule(pool->done_bh);
    } else {
        /*
         * Spare the loop the turn that was scheduled above for a nested loop
         * that did not come.  A worker may have scheduled it as well: look
         * after cancelling, which is a full barrier.  It pairs with the push
         * before the schedule in paio_push_done().
         */
        qemu_bh_cancel(pool->done_bh);
        smp_mb__after_rmw();
        if (qatomic_read(&pool->done)) {
            qemu_bh_schedule(pool->done_bh);
        }
    }
}

bool paio_cancel(PAIOPool *pool, PAIORequest *req)
{
    int64_t now = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);

    assert(pool->ctx == qemu_get_current_aio_context());

    WITH_QEMU_LOCK_GUARD(&pool->lock) {
        switch (req->state) {
        case PAIO_INCOMING:
            QTAILQ_REMOVE(&pool->incoming, req, next);
            req->state = PAIO_TAKEN;
            break;
        case PAIO_WAITING:
            QTAILQ_REMOVE(&paio_lane(pool, req->lane)->waiting, req, next);
            pool->nr_waiting--;
            req->state = PAIO_TAKEN;
            break;
        case PAIO_QUEUED:
            paio_unqueue_locked(pool, req);
            if (req->lane) {
                PAIOLane *lane = paio_lane(pool, req->lane);

                lane->running--;
                paio_admit_locked(pool, lane, now);
                paio_wake_locked(pool);
            }
            break;
        default:
            return false;
        }
    }
    trace_paio_cancel(pool, req);
    req->ret = -ECANCELED;
    paio_make_ready(pool, req);
    qemu_bh_schedule(pool->done_bh);
    return true;
}

typedef struct PAIOCo {
    Coroutine *co;
    int ret;
} PAIOCo;

static void paio_co_cb(void *opaque, int ret)
{
    PAIOCo *pco = opaque;

    pco->ret = ret;
    aio_co_wake(pco->co);
}

int coroutine_fn paio_co_submit(PAIOPool *pool, PAIOClass class,
                                PAIOFunc *func, void *arg)
{
    PAIOCo pco = { .co = qemu_coroutine_self() };
    PAIORequest req = {
        .func = func,
        .arg = arg,
        .class = class,
        .cb = paio_co_cb,
        .opaque = &pco,
    };

    paio_submit(pool, &req);
    qemu_coroutine_yield();
    return pco.ret;
}

/*
 * Life cycle
 */

void paio_pool_update_params(PAIOPool *pool)
{
    bool manage;

    WITH_QEMU_LOCK_GUARD(&pool->lock) {
        pool->min_threads = qatomic_read(&pool->ctx->thread_pool_min);
        pool->max_threads = qatomic_read(&pool->ctx->thread_pool_max);
        paio_wake_locked(pool);

        /* Those which are busy look for themselves when they are done. */
        for (int n = pool->nr_workers - pool->max_threads;
             n > 0 && pool->nr_idle; n--) {
            paio_wake_one_locked(pool);
        }
        manage = pool->nr_workers < pool->min_threads ||
                 paio_runnable_locked(pool) > 0;
    }
    if (manage) {
        qemu_bh_schedule(pool->manage_bh);
    }
}

void paio_pool_get_info(PAIOPool *pool, PAIOPoolInfo *info)
{
    QEMU_LOCK_GUARD(&pool->lock);

    *info = (PAIOPoolInfo) {
        .threads = pool->nr_workers,
        .threads_peak = pool->nr_peak,
        .idle = pool->nr_idle,
        .queued = pool->nr_queued[PAIO_NORMAL] + pool->nr_queued[PAIO_SLOW] +
                  pool->nr_waiting,
        .wake_ups = pool->wake_ups,
        .spins = pool->spins,
        .lingers = pool->lingers,
        .create_failed = pool->create_failed,
        .run_at_home = pool->run_at_home,
    };
}

PAIOPool *paio_pool_new(AioContext *ctx)
{
    PAIOPool *pool = g_new0(PAIOPool, 1);

    pool->ctx = ctx;
    pool->flush_bh = aio_bh_new(ctx, paio_hand_over, pool);
    pool->done_bh = aio_bh_new(ctx, paio_done_bh, pool);
    pool->manage_bh = aio_bh_new(ctx, paio_manage_bh, pool);
    pool->linger_bh = aio_bh_new(ctx, paio_linger_bh, pool);
    aio_timer_init(ctx, &pool->grow_timer, QEMU_CLOCK_REALTIME, SCALE_NS,
                   paio_grow_timer_cb, pool);
    QTAILQ_INIT(&pool->incoming);
    QTAILQ_INIT(&pool->ready);

    qemu_mutex_init(&pool->lock);
    for (int i = 0; i < PAIO_CLASS__MAX; i++) {
        QTAILQ_INIT(&pool->queue[i]);
    }
    for (int i = 0; i < PAIO_LANES; i++) {
        QTAILQ_INIT(&pool->lane[i].waiting);
        pool->lane[i].width = 1;
    }
    QLIST_INIT(&pool->idle);
    QLIST_INIT(&pool->workers);
    pool->max_threads = 1;
    pool->nr_cpus = g_get_num_processors();
    /* To be proved otherwise */
    pool->gap_ns = 4 * PAIO_SPIN_MAX_NS;
    pool->run_ns = 4 * PAIO_SPIN_MAX_NS;
    return pool;
}

void paio_pool_free(PAIOPool *pool)
{
    assert(!pool->in_flight);

    timer_del(&pool->grow_timer);
    paio_linger_end(pool);
    WITH_QEMU_LOCK_GUARD(&pool->lock) {
        pool->stopping = true;
        while (pool->nr_idle) {
            paio_wake_one_locked(pool);
        }
    }
    while (!QLIST_EMPTY(&pool->workers)) {
        paio_join(QLIST_FIRST(&pool->workers));
    }

    qemu_bh_delete(pool->flush_bh);
    qemu_bh_delete(pool->done_bh);
    qemu_bh_delete(pool->manage_bh);
    qemu_bh_delete(pool->linger_bh);
    qemu_mutex_destroy(&pool->lock);
    g_free(pool);
}
