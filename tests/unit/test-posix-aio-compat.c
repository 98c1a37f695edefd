/*
 * Tests of the thread pool that runs blocking system calls
 *
 * Each case is a line of the pool's contract.  Nothing here measures time: a
 * loaded host makes a case slower, never fail.  Where the pool itself does, the
 * clock stands still and is turned by hand.  What would be a hang aborts with
 * the name of the case and of what it waits for.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <dlfcn.h>
#include <pthread.h>
#include "block/aio.h"
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/coroutine.h"
#include "qemu/defer-call.h"
#include "qemu/main-loop.h"
#include "qemu/rcu.h"
#include "qemu/thread.h"
#include "qemu/timer.h"
#include "qemu/units.h"
#include "posix-aio-compat.h"
#include "iothread.h"

#define NR_IOTHREADS 4
#define DEFAULT_MAX 64

static AioContext *main_ctx;

/*
 * Watchdog
 */

#define HANG_SECONDS 30

static char watched_path[64];
static bool watching;               /* protects watched_path */
static const char *watched_wait;    /* the latest condition waited for */
static int watched_line;
static int64_t watched_until;

static void *watchdog_thread(void *opaque)
{
    for (;;) {
        if (qatomic_load_acquire(&watching) &&
            g_get_monotonic_time() > qatomic_read(&watched_until)) {
            const char *wait = qatomic_read(&watched_wait);

            fprintf(stderr, "%s hangs; last wait in line %d: %s\n",
                    watched_path, qatomic_read(&watched_line),
                    wait ? wait : "none");
            abort();
        }
        g_usleep(G_USEC_PER_SEC / 4);
    }
    return NULL;
}

static void watchdog_start(const char *prefix, const char *name)
{
    int64_t seconds = g_test_slow() ? 10 * HANG_SECONDS : HANG_SECONDS;

    snprintf(watched_path, sizeof(watched_path), "%s%s", prefix, name);
    qatomic_set(&watched_wait, NULL);
    qatomic_set(&watched_until,
                g_get_monotonic_time() + seconds * G_USEC_PER_SEC);
    qatomic_store_release(&watching, true);
}

static void watchdog_stop(void)
{
    qatomic_set(&watching, false);
}

static void watchdog_note(const char *wait, int line)
{
    qatomic_set(&watched_line, line);
    qatomic_set(&watched_wait, wait);
}

/*
 * Wait in the event loop for what a completion brings.  The loop blocks: if
 * nobody wakes it, that is the bug to be found.
 */
#define WAIT_LOOP(ctx_, cond_)                                  \
    do {                                                        \
        watchdog_note(#cond_, __LINE__);                        \
        while (!(cond_)) {                                      \
            aio_poll(ctx_, true);                               \
        }                                                       \
    } while (0)

/* Run the event loop until something is so that doesn't wake it. */
#define WAIT_STATE(ctx_, cond_)                                 \
    do {                                                        \
        watchdog_note(#cond_, __LINE__);                        \
        while (!(cond_)) {                                      \
            aio_poll(ctx_, false);                              \
            g_usleep(100);                                      \
        }                                                       \
    } while (0)

/* Wait for other threads without running the event loop. */
#define WAIT_BLIND(cond_)                                       \
    do {                                                        \
        watchdog_note(#cond_, __LINE__);                        \
        while (!(cond_)) {                                      \
            g_usleep(100);                                      \
        }                                                       \
    } while (0)

/*
 * Interposed thread creation
 */

typedef int PthreadCreate(pthread_t *thread, const pthread_attr_t *attr,
                          void *(*start)(void *), void *arg);

static struct {
    int calls;          /* since create_reset() */
    int strangers;      /* calls made by a thread other than home */
    int successes_left; /* then EAGAIN; negative: no limit */
    unsigned chaos;     /* if not 0: seed of failures at random */
    int delay_us;       /* the new thread starts so much later */
    bool watch;         /* compare with home */
    pthread_t home;
} create = { .successes_left = -1 };

typedef struct LateStart {
    void *(*start)(void *);
    void *arg;
    int delay_us;
} LateStart;

static void *late_start(void *opaque)
{
    LateStart late = *(LateStart *)opaque;

    g_free(opaque);
    g_usleep(late.delay_us);
    return late.start(late.arg);
}

static PthreadCreate *real_pthread_create(void)
{
    /* A sanitizer has to learn about new threads. */
    void *sym = dlsym(RTLD_DEFAULT, "__interceptor_pthread_create");

    if (!sym) {
        sym = dlsym(RTLD_NEXT, "pthread_create");
    }
    g_assert(sym);
    return (PthreadCreate *)sym;
}

static bool create_is_to_fail(int call)
{
    unsigned chaos = qatomic_read(&create.chaos);
    int left = qatomic_read(&create.successes_left);

    if (chaos) {
        unsigned hash = (call + chaos) * 2654435761U;

        return (hash >> 16) % 3 == 0;
    }
    if (left > 0) {
        qatomic_set(&create.successes_left, left - 1);
    }
    return left == 0;
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attr,
                   void *(*start)(void *), void *arg)
{
    PthreadCreate *real = real_pthread_create();
    int call = qatomic_fetch_inc(&create.calls);
    int delay_us = qatomic_read(&create.delay_us);
    int err = EAGAIN;

    if (qatomic_read(&create.watch) &&
        !pthread_equal(pthread_self(), create.home)) {
        qatomic_inc(&create.strangers);
    }
    if (create_is_to_fail(call)) {
        return err;
    }
    if (delay_us) {
        LateStart *late = g_new(LateStart, 1);

        *late = (LateStart) {
            .start = start,
            .arg = arg,
            .delay_us = delay_us,
        };
        err = real(thread, attr, late_start, late);
        if (err) {
            g_free(late);
        }
        return err;
    }
    return real(thread, attr, start, arg);
}

static void create_reset(void)
{
    qatomic_set(&create.successes_left, -1);
    qatomic_set(&create.chaos, 0);
    qatomic_set(&create.delay_us, 0);
    qatomic_set(&create.watch, false);
    qatomic_set(&create.strangers, 0);
    qatomic_set(&create.calls, 0);
}

static void create_fail_after(int n)
{
    qatomic_set(&create.successes_left, n);
}

static void create_watch_home(void)
{
    create.home = pthread_self();
    qatomic_set(&create.watch, true);
}

/*
 * Interposed clock: when it is stopped, it shows the same time to the threads
 * that go by it, until it is turned.
 */

typedef int ClockGettime(clockid_t id, struct timespec *ts);

static int64_t clock_stopped_ns;        /* 0: it goes */
static __thread bool clock_followed;    /* by this thread */
static __thread int64_t clock_ahead_ns; /* of what it shows to others */

static ClockGettime *real_clock_gettime(void)
{
    static void *cached;
    void *sym = qatomic_read(&cached);

    if (!sym) {
        sym = dlsym(RTLD_DEFAULT, "__interceptor_clock_gettime");
        if (!sym) {
            sym = dlsym(RTLD_NEXT, "clock_gettime");
        }
        qatomic_set(&cached, sym);
    }
    return (ClockGettime *)sym;
}

int clock_gettime(clockid_t id, struct timespec *ts)
{
    int64_t ns = qatomic_read(&clock_stopped_ns);

    if (!ns || !clock_followed || id != CLOCK_MONOTONIC) {
        return real_clock_gettime()(id, ts);
    }
    ns += clock_ahead_ns;
    ts->tv_sec = ns / NANOSECONDS_PER_SECOND;
    ts->tv_nsec = ns % NANOSECONDS_PER_SECOND;
    return 0;
}

static void clock_stop(void)
{
    qatomic_set(&clock_stopped_ns, get_clock());
}

static void clock_go(void)
{
    qatomic_set(&clock_stopped_ns, 0);
}

static void clock_turn(int64_t ns)
{
    qatomic_set(&clock_stopped_ns, qatomic_read(&clock_stopped_ns) + ns);
}

/* How many workers the system knows; 0 where that can't be found out */
static int count_workers(void)
{
    int n = 0;
#if defined(CONFIG_LINUX) && defined(CONFIG_PTHREAD_SETNAME_NP_W_TID)
    GDir *dir = g_dir_open("/proc/self/task", 0, NULL);
    const char *tid;

    if (!dir) {
        return 0;
    }
    while ((tid = g_dir_read_name(dir))) {
        g_autofree char *path = g_strdup_printf("/proc/self/task/%s/comm", tid);
        g_autofree char *comm = NULL;

        if (g_file_get_contents(path, &comm, NULL, NULL) &&
            g_str_equal(g_strchomp(comm), "paio-worker")) {
            n++;
        }
    }
    g_dir_close(dir);
#endif
    return n;
}

/*
 * Gate: functions wait in it until it opens or lets some pass
 */

typedef struct Gate {
    QemuMutex lock;
    QemuCond cond;
    bool open;
    int tickets;    /* how many may pass although it is closed */
    int open_at;    /* opens when so many are inside; 0: never */
    int inside;
    int peak;       /* the most that were inside */
    int entered;    /* since the beginning */
} Gate;

static void gate_init(Gate *gate)
{
    *gate = (Gate) { .open = false };
    qemu_mutex_init(&gate->lock);
    qemu_cond_init(&gate->cond);
}

static void gate_destroy(Gate *gate)
{
    g_assert_cmpint(gate->inside, ==, 0);
    qemu_mutex_destroy(&gate->lock);
    qemu_cond_destroy(&gate->cond);
}

static void gate_pass(Gate *gate)
{
    qemu_mutex_lock(&gate->lock);
    gate->entered++;
    gate->inside++;
    gate->peak = MAX(gate->peak, gate->inside);
    if (gate->inside == gate->open_at) {
        gate->open = true;
        qemu_cond_broadcast(&gate->cond);
    }
    while (!gate->open && !gate->tickets) {
        qemu_cond_wait(&gate->cond, &gate->lock);
    }
    if (!gate->open) {
        gate->tickets--;
    }
    gate->inside--;
    qemu_mutex_unlock(&gate->lock);
}

static void gate_open(Gate *gate)
{
    qemu_mutex_lock(&gate->lock);
    gate->open = true;
    qemu_cond_broadcast(&gate->cond);
    qemu_mutex_unlock(&gate->lock);
}

static void gate_let_one(Gate *gate)
{
    qemu_mutex_lock(&gate->lock);
    gate->tickets++;
    qemu_cond_signal(&gate->cond);
    qemu_mutex_unlock(&gate->lock);
}

static int gate_read(Gate *gate, int *field)
{
    int value;

    qemu_mutex_lock(&gate->lock);
    value = *field;
    qemu_mutex_unlock(&gate->lock);
    return value;
}

static int gate_inside(Gate *gate)
{
    return gate_read(gate, &gate->inside);
}

static int gate_peak(Gate *gate)
{
    return gate_read(gate, &gate->peak);
}

static int gate_entered(Gate *gate)
{
    return gate_read(gate, &gate->entered);
}

/*
 * A pool and its requests
 */

/* Used by the pool's home thread only, but for what is said */
typedef struct TestPool {
    AioContext *ctx;
    PAIOPool *pool;     /* constant */
    pthread_t home;
    unsigned in_flight;
    unsigned submitted;
    unsigned completed;
} TestPool;

typedef struct TestReq TestReq;
struct TestReq {
    PAIORequest req;
    TestPool *tp;
    /* In the worker; NULL returns @value */
    int (*func)(TestReq *r);
    /* In the home thread after all checks, which may submit @r again */
    void (*done)(TestReq *r);
    void *data;
    int value;

    /* Written by the worker */
    int calls;
    pthread_t ran_in;
    int started;        /* the how manieth of a Serial */

    /* Written by the home thread */
    int completions;
    int ret;
    unsigned order;     /* the how manieth completion of the pool */
};

/* The home thread is within paio_submit() or paio_cancel(). */
static __thread bool in_pool_call;

static int req_func(void *opaque)
{
    TestReq *r = opaque;

    qatomic_inc(&r->calls);
    r->ran_in = pthread_self();
    clock_followed = !pthread_equal(r->ran_in, r->tp->home);
    return r->func ? r->func(r) : r->value;
}

static void req_cb(void *opaque, int ret)
{
    TestReq *r = opaque;
    TestPool *tp = r->tp;

    g_assert(qemu_get_current_aio_context() == tp->ctx);
    g_assert(pthread_equal(pthread_self(), tp->home));
    g_assert(!in_pool_call);
    g_assert_cmpint(r->completions, ==, 0);
    g_assert_cmpuint(tp->in_flight, >, 0);

    tp->in_flight--;
    r->completions = 1;
    r->ret = ret;
    r->order = ++tp->completed;
    if (r->done) {
        r->done(r);
    }
}

static void req_init(TestReq *r, TestPool *tp)
{
    *r = (TestReq) {
        .tp = tp,
        .req = {
            .func = req_func,
            .arg = r,
            .class = PAIO_NORMAL,
            .cb = req_cb,
            .opaque = r,
        },
    };
}

static void req_submit(TestReq *r)
{
    TestPool *tp = r->tp;
    unsigned completed = tp->completed;

    r->calls = 0;
    r->completions = 0;
    r->ret = -EINPROGRESS;
    tp->in_flight++;
    tp->submitted++;

    g_assert(!in_pool_call);
    in_pool_call = true;
    paio_submit(tp->pool, &r->req);
    in_pool_call = false;

    g_assert_cmpuint(tp->completed, ==, completed);
}

static bool req_cancel(TestReq *r)
{
    TestPool *tp = r->tp;
    unsigned completed = tp->completed;
    bool ret;

    g_assert(!in_pool_call);
    in_pool_call = true;
    ret = paio_cancel(tp->pool, &r->req);
    in_pool_call = false;

    g_assert_cmpuint(tp->completed, ==, completed);
    return ret;
}

/* The request is complete, has run once and returned what it should. */
static void req_check(TestReq *r)
{
    g_assert_cmpint(r->completions, ==, 1);
    g_assert_cmpint(qatomic_read(&r->calls), ==, 1);
    g_assert_cmpint(r->ret, ==, r->value);
}

static void req_check_in_worker(TestReq *r)
{
    req_check(r);
    g_assert(!pthread_equal(r->ran_in, r->tp->home));
}

static void req_check_at_home(TestReq *r)
{
    req_check(r);
    g_assert(pthread_equal(r->ran_in, r->tp->home));
}

static void req_check_cancelled(TestReq *r)
{
    g_assert_cmpint(r->completions, ==, 1);
    g_assert_cmpint(qatomic_read(&r->calls), ==, 0);
    g_assert_cmpint(r->ret, ==, -ECANCELED);
}

static int gate_func(TestReq *r)
{
    gate_pass(r->data);
    return r->value;
}

static TestReq *reqs_new(TestPool *tp, int n)
{
    TestReq *r = g_new0(TestReq, n);

    for (int i = 0; i < n; i++) {
        req_init(&r[i], tp);
        r[i].value = i;
    }
    return r;
}

static TestReq *reqs_new_gated(TestPool *tp, int n, Gate *gate,
                               PAIOClass class)
{
    TestReq *r = reqs_new(tp, n);

    for (int i = 0; i < n; i++) {
        r[i].func = gate_func;
        r[i].data = gate;
        r[i].req.class = class;
    }
    return r;
}

static void reqs_submit(TestReq *r, int n)
{
    for (int i = 0; i < n; i++) {
        req_submit(&r[i]);
    }
}

static void reqs_check(TestReq *r, int n)
{
    for (int i = 0; i < n; i++) {
        req_check(&r[i]);
    }
}

static void pool_set(TestPool *tp, int min, int max)
{
    aio_context_set_thread_pool_params(tp->ctx, min, max, &error_abort);
    paio_pool_update_params(tp->pool);
}

static void pool_init(TestPool *tp, int min, int max)
{
    AioContext *ctx = qemu_get_current_aio_context();

    *tp = (TestPool) {
        .ctx = ctx,
        .pool = paio_pool_new(ctx),
        .home = pthread_self(),
    };
    pool_set(tp, min, max);
}

static PAIOPoolInfo pool_info(TestPool *tp)
{
    PAIOPoolInfo info;

    paio_pool_get_info(tp->pool, &info);
    return info;
}

static void pool_destroy(TestPool *tp)
{
    g_assert_cmpuint(tp->in_flight, ==, 0);
    g_assert_cmpuint(tp->submitted, ==, tp->completed);
    g_assert_cmpint(pool_info(tp).queued, ==, 0);
    paio_pool_free(tp->pool);
    aio_context_set_thread_pool_params(tp->ctx, 0, DEFAULT_MAX, &error_abort);
}

#define pool_wait_all(tp_) WAIT_LOOP((tp_)->ctx, !(tp_)->in_flight)

/* Turn the event loop for a while, so that what must not happen can. */
static void pool_turn_for_ms(TestPool *tp, int ms)
{
    int64_t end = g_get_monotonic_time() + ms * 1000;

    while (g_get_monotonic_time() < end) {
        aio_poll(tp->ctx, false);
        g_usleep(100);
    }
}

/* Have @n idle workers, each of which has run a request. */
static void pool_warm_up(TestPool *tp, int n)
{
    Gate gate;
    TestReq *r;

    gate_init(&gate);
    gate.open_at = n;
    r = reqs_new_gated(tp, n, &gate, PAIO_NORMAL);
    reqs_submit(r, n);
    pool_wait_all(tp);
    WAIT_STATE(tp->ctx, pool_info(tp).idle == n);
    g_assert_cmpint(pool_info(tp).threads, ==, n);
    g_free(r);
    gate_destroy(&gate);
}

/* A pool that has @n idle workers and neither fewer nor more later */
static void pool_init_idle(TestPool *tp, int n)
{
    pool_init(tp, n, n);
    pool_warm_up(tp, n);
}

/* Submit in one hand-over, which is over when this returns. */
static void reqs_hand_over(TestReq *r, int n)
{
    defer_call_begin();
    reqs_submit(r, n);
    defer_call_end();
}

static void reqs_set_lane(TestReq *r, int n, unsigned lane)
{
    for (int i = 0; i < n; i++) {
        r[i].req.lane = lane;
    }
}

static int reqs_called(TestReq *r, int n)
{
    int called = 0;

    for (int i = 0; i < n; i++) {
        called += qatomic_read(&r[i].calls);
    }
    return called;
}

/*
 * Event loop threads
 */

typedef struct CtxCall {
    void (*fn)(void *);
    void *opaque;
    QemuSemaphore done;
} CtxCall;

static void ctx_call_bh(void *opaque)
{
    CtxCall *call = opaque;

    call->fn(call->opaque);
    qemu_sem_post(&call->done);
}

/* Run a function in the home thread of @ctx and wait for its end. */
static void ctx_call(AioContext *ctx, void (*fn)(void *), void *opaque)
{
    CtxCall call = { .fn = fn, .opaque = opaque };

    if (ctx == qemu_get_current_aio_context()) {
        fn(opaque);
        return;
    }
    qemu_sem_init(&call.done, 0);
    aio_bh_schedule_oneshot(ctx, ctx_call_bh, &call);
    qemu_sem_wait(&call.done);
    qemu_sem_destroy(&call.done);
}

/*
 * Submission and completion
 */

static void test_submit_one(void)
{
    static const int values[] = { 42, 0, -EIO, INT_MAX };
    TestPool tp;

    pool_init(&tp, 0, DEFAULT_MAX);
    for (int i = 0; i < ARRAY_SIZE(values); i++) {
        TestReq r;

        req_init(&r, &tp);
        r.value = values[i];
        req_submit(&r);
        g_assert_cmpint(r.completions, ==, 0);
        WAIT_LOOP(tp.ctx, r.completions);
        req_check_in_worker(&r);
    }
    pool_destroy(&tp);
}

static void test_submit_many(void)
{
    const int n = 10000;
    TestPool tp;
    TestReq *r;

    pool_init(&tp, 0, DEFAULT_MAX);
    r = reqs_new(&tp, n);
    for (int i = 0; i < n; i++) {
        r[i].value = i % 7 ? i : -i;
        r[i].req.class = i % 5 ? PAIO_NORMAL : PAIO_SLOW;
    }
    reqs_submit(r, n);
    g_assert_cmpuint(tp.completed, ==, 0);
    pool_wait_all(&tp);
    g_assert_cmpuint(tp.completed, ==, n);

    /* A second completion of one of them would be noticed by req_cb(). */
    pool_turn_for_ms(&tp, 5);
    for (int i = 0; i < n; i++) {
        req_check_in_worker(&r[i]);
    }
    g_free(r);
    pool_destroy(&tp);
}

static int chain_left;

static void chain_done(TestReq *r)
{
    req_check(r);
    if (chain_left) {
        chain_left--;
        req_submit(r);
    }
}

/* As in qemu-system, where glib runs the main context */
static void test_submit_glib(void)
{
    TestPool tp;
    TestReq *r;

    pool_init(&tp, 0, DEFAULT_MAX);
    r = reqs_new(&tp, 8);
    chain_left = 500;
    for (int i = 0; i < 8; i++) {
        r[i].done = chain_done;
        req_submit(&r[i]);
    }
    watchdog_note("glib's main context", __LINE__);
    while (tp.in_flight) {
        g_main_context_iteration(NULL, true);
    }
    g_assert_cmpuint(tp.completed, ==, 508);
    g_free(r);
    pool_destroy(&tp);
}

static void test_order(void)
{
    const int n = 1000;
    TestPool tp;

    pool_init(&tp, 0, 1);
    for (int round = 0; round < 3; round++) {
        TestReq *r = reqs_new(&tp, n);
        unsigned before = tp.completed;

        for (int i = 0; i < n; i++) {
            if (round && g_test_rand_bit()) {
                r[i].req.class = PAIO_SLOW;
            }
        }
        if (round == 2) {
            defer_call_begin();
        }
        reqs_submit(r, n);
        if (round == 2) {
            defer_call_end();
        }
        pool_wait_all(&tp);
        for (int i = 0; i < n; i++) {
            req_check_in_worker(&r[i]);
            g_assert_cmpuint(r[i].order, ==, before + i + 1);
        }
        g_free(r);
    }
    g_assert_cmpint(pool_info(&tp).threads_peak, ==, 1);
    pool_destroy(&tp);
}

/*
 * Nested event loops
 */

static bool nested_ended;

static void nested_wait_next_done(TestReq *r)
{
    WAIT_LOOP(r->tp->ctx, r[1].completions);
    nested_ended = true;
}

/*
 * Have @n requests finished and none delivered.  With one worker that holds
 * when the request after them has begun, which waits in @gate.
 */
static TestReq *nested_prepare(TestPool *tp, int n, Gate *gate)
{
    TestReq *r;

    pool_init(tp, 0, 1);
    pool_warm_up(tp, 1);
    tp->submitted = tp->completed = 0;
    gate_init(gate);
    r = reqs_new(tp, n + 1);
    r[n].func = gate_func;
    r[n].data = gate;
    reqs_submit(r, n + 1);
    WAIT_BLIND(gate_inside(gate) == 1);
    g_assert_cmpuint(tp->completed, ==, 0);
    return r;
}

static void nested_finish(TestPool *tp, TestReq *r, int n, Gate *gate)
{
    g_assert_cmpint(r[n].completions, ==, 0);
    gate_open(gate);
    pool_wait_all(tp);
    for (int i = 0; i <= n; i++) {
        req_check_in_worker(&r[i]);
        g_assert_cmpuint(r[i].order, ==, i + 1);
    }
    g_free(r);
    gate_destroy(gate);
    pool_destroy(tp);
}

static void test_nested_finished(void)
{
    TestPool tp;
    Gate gate;
    TestReq *r = nested_prepare(&tp, 2, &gate);

    nested_ended = false;
    r[0].done = nested_wait_next_done;
    WAIT_LOOP(tp.ctx, nested_ended);
    g_assert_cmpint(r[0].completions, ==, 1);
    g_assert_cmpint(r[1].completions, ==, 1);
    nested_finish(&tp, r, 2, &gate);
}

static int nested_depth;
static int nested_depth_peak;

static void nested_deep_done(TestReq *r)
{
    nested_depth++;
    nested_depth_peak = MAX(nested_depth_peak, nested_depth);
    WAIT_LOOP(r->tp->ctx, r[1].completions);
    nested_depth--;
    nested_ended = !nested_depth;
}

static void test_nested_deep(void)
{
    const int n = 64;
    TestPool tp;
    Gate gate;
    TestReq *r = nested_prepare(&tp, n, &gate);

    nested_ended = false;
    nested_depth_peak = 0;
    for (int i = 0; i < n - 1; i++) {
        r[i].done = nested_deep_done;
    }
    WAIT_LOOP(tp.ctx, nested_ended);
    g_assert_cmpint(nested_depth_peak, ==, n - 1);
    g_assert_cmpuint(tp.completed, ==, n);
    nested_finish(&tp, r, n, &gate);
}

/* Every second callback waits, so that some are left for the outer loop. */
static void test_nested_mixed(void)
{
    const int n = 64;
    TestPool tp;
    Gate gate;
    TestReq *r = nested_prepare(&tp, n, &gate);

    for (int i = 0; i < n - 1; i += 2) {
        r[i].done = nested_wait_next_done;
    }
    WAIT_LOOP(tp.ctx, tp.completed == n);
    nested_finish(&tp, r, n, &gate);
}

static void nested_submit_done(TestReq *r)
{
    int level = GPOINTER_TO_INT(r->data);
    TestReq inner;

    if (level) {
        req_init(&inner, r->tp);
        inner.value = level;
        inner.data = GINT_TO_POINTER(level - 1);
        inner.done = nested_submit_done;
        req_submit(&inner);
        WAIT_LOOP(r->tp->ctx, inner.completions);
        req_check(&inner);
    }
}

/* Callbacks that wait for what they have submitted themselves */
static void test_nested_submit(void)
{
    TestPool tp;
    TestReq r;

    pool_init(&tp, 0, 2);
    req_init(&r, &tp);
    r.data = GINT_TO_POINTER(16);
    r.done = nested_submit_done;
    req_submit(&r);
    pool_wait_all(&tp);
    g_assert_cmpuint(tp.completed, ==, 17);
    pool_destroy(&tp);
}

static void nested_open_done(TestReq *r)
{
    g_assert_cmpint(r[1].completions, ==, 0);
    gate_open(r[1].data);
    WAIT_LOOP(r->tp->ctx, r[1].completions);
    nested_ended = true;
}

/* A callback that waits for a request which is running */
static void test_nested_running(void)
{
    TestPool tp;
    Gate gate;
    TestReq *r = nested_prepare(&tp, 1, &gate);

    nested_ended = false;
    r[0].done = nested_open_done;
    WAIT_LOOP(tp.ctx, nested_ended);
    req_check_in_worker(&r[0]);
    req_check_in_worker(&r[1]);
    g_free(r);
    gate_destroy(&gate);
    pool_destroy(&tp);
}

/*
 * defer_call sections
 */

static void test_defer_batch(void)
{
    const int n = 20;
    TestPool tp;
    TestReq *r;

    pool_init(&tp, 0, 4);
    pool_warm_up(&tp, 2);
    r = reqs_new(&tp, n);

    defer_call_begin();
    defer_call_begin();
    reqs_submit(r, n);
    defer_call_end();
    g_usleep(2000);
    for (int i = 0; i < n; i++) {
        /* Handed over together at the end of the outermost section */
        g_assert_cmpint(qatomic_read(&r[i].calls), ==, 0);
    }
    defer_call_end();

    pool_wait_all(&tp);
    for (int i = 0; i < n; i++) {
        req_check_in_worker(&r[i]);
    }
    g_free(r);
    pool_destroy(&tp);
}

/* What was submitted in the section is waited for in the section. */
static void test_defer_nested_loop(void)
{
    const int n = 3;

    /* With and without a worker that exists already */
    for (int warm = 0; warm < 2; warm++) {
        TestPool tp;
        TestReq *r;

        pool_init(&tp, 0, 4);
        if (warm) {
            pool_warm_up(&tp, 1);
        }
        r = reqs_new(&tp, n);
        defer_call_begin();
        for (int round = 0; round < 3; round++) {
            reqs_submit(r, n);
            pool_wait_all(&tp);
            reqs_check(r, n);
        }
        /* The rest goes when the section ends. */
        reqs_submit(r, n);
        defer_call_end();
        pool_wait_all(&tp);
        reqs_check(r, n);
        g_free(r);
        pool_destroy(&tp);
    }
}

/* The first one of the section is taken back, the others still go. */
static void test_defer_cancel_first(void)
{
    TestPool tp;
    TestReq *r;

    pool_init(&tp, 0, 4);
    r = reqs_new(&tp, 2);
    defer_call_begin();
    req_submit(&r[0]);
    g_assert(req_cancel(&r[0]));
    req_submit(&r[1]);
    WAIT_LOOP(tp.ctx, r[1].completions);
    req_check_in_worker(&r[1]);
    WAIT_LOOP(tp.ctx, r[0].completions);
    req_check_cancelled(&r[0]);
    defer_call_end();
    g_free(r);
    pool_destroy(&tp);
}

/*
 * Bounded dispatch
 */

#define CHAINS 64

static unsigned turn_limit;
static unsigned turn_count;
static bool chains_stop;

static void bounded_done(TestReq *r)
{
    int64_t end = qemu_clock_get_ns(QEMU_CLOCK_REALTIME) + 20 * SCALE_US;

    turn_count++;
    g_assert_cmpuint(turn_count, <=, turn_limit);
    if (chains_stop) {
        return;
    }
    req_submit(r);
    /* Time for the workers to finish what was just submitted */
    while (qemu_clock_get_ns(QEMU_CLOCK_REALTIME) < end) {
        /* nothing */
    }
}

typedef struct Ticker {
    QEMUTimer timer;
    int ticks;
} Ticker;

static void ticker_cb(void *opaque)
{
    Ticker *ticker = opaque;

    ticker->ticks++;
    timer_mod(&ticker->timer,
              qemu_clock_get_ns(QEMU_CLOCK_REALTIME) + SCALE_MS);
}

static void test_bounded_dispatch(void)
{
    TestPool tp;
    TestReq *r;
    Ticker ticker = { .ticks = 0 };
    int turns = 0;

    pool_init(&tp, 0, 8);
    pool_warm_up(&tp, 4);
    r = reqs_new(&tp, CHAINS);
    aio_timer_init(tp.ctx, &ticker.timer, QEMU_CLOCK_REALTIME, SCALE_NS,
                   ticker_cb, &ticker);
    timer_mod(&ticker.timer, 0);

    chains_stop = false;
    for (int i = 0; i < CHAINS; i++) {
        r[i].done = bounded_done;
    }
    reqs_submit(r, CHAINS);

    watchdog_note("ticks of the timer", __LINE__);
    while (ticker.ticks < 50 || tp.completed < 20 * CHAINS) {
        int64_t now = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
        bool due = timer_expire_time_ns(&ticker.timer) <= now;
        int ticks = ticker.ticks;

        turn_count = 0;
        turn_limit = tp.in_flight;
        aio_poll(tp.ctx, turns++ & 1);
        if (due) {
            g_assert_cmpint(ticker.ticks, >, ticks);
        }
        g_assert_cmpuint(tp.in_flight, ==, CHAINS);
    }

    chains_stop = true;
    turn_limit = UINT_MAX;
    pool_wait_all(&tp);
    timer_del(&ticker.timer);
    reqs_check(r, CHAINS);
    g_free(r);
    pool_destroy(&tp);
}

static void bounded_cancel_done(TestReq *r)
{
    turn_count++;
    g_assert_cmpuint(turn_count, <=, turn_limit);
    req_check_cancelled(r);
    if (!chains_stop) {
        req_submit(r);
        g_assert(req_cancel(r));
    }
}

/* Nor does it depend on the workers: what is taken back is done at once. */
static void test_bounded_cancel(void)
{
    TestPool tp;
    TestReq *r;

    pool_init(&tp, 0, 4);
    r = reqs_new(&tp, 8);
    chains_stop = false;
    defer_call_begin();
    for (int i = 0; i < 8; i++) {
        r[i].done = bounded_cancel_done;
        req_submit(&r[i]);
        g_assert(req_cancel(&r[i]));
    }
    defer_call_end();
    for (int turn = 0; turn < 100; turn++) {
        turn_count = 0;
        turn_limit = tp.in_flight;
        aio_poll(tp.ctx, turn & 1);
        g_assert_cmpuint(turn_count, ==, 8);
    }
    chains_stop = true;
    turn_limit = UINT_MAX;
    pool_wait_all(&tp);
    g_free(r);
    pool_destroy(&tp);
}

/*
 * No recursion
 */

static uintptr_t stack_low;
static uintptr_t stack_high;

static void note_stack(void)
{
    uintptr_t frame = (uintptr_t)__builtin_frame_address(0);

    stack_low = MIN(stack_low, frame);
    stack_high = MAX(stack_high, frame);
}

static void recursion_done(TestReq *r)
{
    note_stack();
    chain_done(r);
}

static int recursion_func(TestReq *r)
{
    if (pthread_equal(pthread_self(), r->tp->home)) {
        note_stack();
    }
    return r->value;
}

static void do_test_no_recursion(TestPool *tp, int n)
{
    TestReq r;

    stack_low = UINTPTR_MAX;
    stack_high = 0;
    chain_left = n - 1;
    req_init(&r, tp);
    r.func = recursion_func;
    r.done = recursion_done;
    req_submit(&r);
    pool_wait_all(tp);
    g_assert_cmpuint(tp->completed, ==, n);
    g_assert_cmpuint(stack_high - stack_low, <, 16 * KiB);
}

static void test_no_recursion(void)
{
    TestPool tp;

    pool_init(&tp, 0, DEFAULT_MAX);
    do_test_no_recursion(&tp, 10000);
    pool_destroy(&tp);
}

/*
 * Several contexts
 */

typedef struct Party {
    IOThread *iothread;     /* NULL: the main loop */
    AioContext *ctx;
    TestPool tp;
    TestReq *reqs;
    int chain_left;
    QemuSemaphore end;
} Party;

#define PARTY_DEPTH 16
#define PARTY_TOTAL 1600

static void party_done(TestReq *r)
{
    Party *party = r->data;

    g_assert(r->tp == &party->tp);
    req_check_in_worker(r);
    if (party->chain_left) {
        party->chain_left--;
        r->value++;
        req_submit(r);
    } else if (!party->tp.in_flight) {
        qemu_sem_post(&party->end);
    }
}

static void party_begin(void *opaque)
{
    Party *party = opaque;

    g_assert(qemu_get_current_aio_context() == party->ctx);
    pool_init(&party->tp, 0, 8);
    party->reqs = reqs_new(&party->tp, PARTY_DEPTH);
    party->chain_left = PARTY_TOTAL - PARTY_DEPTH;
    for (int i = 0; i < PARTY_DEPTH; i++) {
        party->reqs[i].data = party;
        party->reqs[i].done = party_done;
        req_submit(&party->reqs[i]);
    }
}

static void party_finish(void *opaque)
{
    Party *party = opaque;

    g_assert_cmpuint(party->tp.completed, ==, PARTY_TOTAL);
    g_free(party->reqs);
    pool_destroy(&party->tp);
}

static void test_contexts(void)
{
    Party parties[NR_IOTHREADS + 1] = { };

    for (int i = 0; i < ARRAY_SIZE(parties); i++) {
        Party *party = &parties[i];

        party->ctx = main_ctx;
        if (i) {
            party->iothread = iothread_new();
            party->ctx = iothread_get_aio_context(party->iothread);
        }
        qemu_sem_init(&party->end, 0);
    }
    for (int i = 1; i < ARRAY_SIZE(parties); i++) {
        aio_bh_schedule_oneshot(parties[i].ctx, party_begin, &parties[i]);
    }
    party_begin(&parties[0]);
    pool_wait_all(&parties[0].tp);

    for (int i = 0; i < ARRAY_SIZE(parties); i++) {
        watchdog_note("end of a context's requests", __LINE__);
        qemu_sem_wait(&parties[i].end);
        ctx_call(parties[i].ctx, party_finish, &parties[i]);
        qemu_sem_destroy(&parties[i].end);
        if (parties[i].iothread) {
            iothread_join(parties[i].iothread);
        }
    }
}

/*
 * Worker threads
 */

static void test_threads_lazy(void)
{
    TestPool tp;
    TestReq r;

    create_reset();
    pool_init(&tp, 0, DEFAULT_MAX);
    pool_turn_for_ms(&tp, 5);
    g_assert_cmpint(create.calls, ==, 0);
    g_assert_cmpint(count_workers(), ==, 0);
    g_assert_cmpint(pool_info(&tp).threads, ==, 0);
    g_assert_cmpint(pool_info(&tp).threads_peak, ==, 0);

    req_init(&r, &tp);
    req_submit(&r);
    pool_wait_all(&tp);
    g_assert_cmpint(create.calls, ==, 1);
    g_assert_cmpint(pool_info(&tp).threads, ==, 1);
    g_assert_cmpint(pool_info(&tp).threads_peak, ==, 1);
#if defined(CONFIG_LINUX) && defined(CONFIG_PTHREAD_SETNAME_NP_W_TID)
    g_assert_cmpint(count_workers(), ==, 1);
#endif
    pool_destroy(&tp);
}

static int signals_func(TestReq *r)
{
    sigset_t set;

    if (pthread_sigmask(SIG_SETMASK, NULL, &set)) {
        return -errno;
    }
    for (int sig = 1; sig < 32; sig++) {
        bool blocked = sigismember(&set, sig);

        switch (sig) {
        case SIGKILL:
        case SIGSTOP:
            break;
        case SIGSEGV:
        case SIGFPE:
        case SIGILL:
            if (blocked) {
                return -sig;
            }
            break;
        default:
            if (!blocked) {
                return sig;
            }
            break;
        }
    }
    return 0;
}

static void test_threads_signals(void)
{
    TestPool tp;
    TestReq r;
    sigset_t unblock, old, before, after;

    /* IOThreads block everything, which is not what is to be tested here. */
    sigemptyset(&unblock);
    sigaddset(&unblock, SIGUSR1);
    sigaddset(&unblock, SIGTERM);
    pthread_sigmask(SIG_UNBLOCK, &unblock, &old);
    pthread_sigmask(SIG_SETMASK, NULL, &before);

    pool_init(&tp, 0, 4);
    req_init(&r, &tp);
    r.func = signals_func;
    req_submit(&r);
    pool_wait_all(&tp);
    req_check_in_worker(&r);

    pthread_sigmask(SIG_SETMASK, NULL, &after);
    for (int sig = 1; sig < 32; sig++) {
        g_assert_cmpint(sigismember(&before, sig), ==,
                        sigismember(&after, sig));
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pool_destroy(&tp);
}

#ifdef CONFIG_LINUX
typedef struct AffinityTest {
    cpu_set_t allowed;
    cpu_set_t one;
    bool refused;
} AffinityTest;

static int affinity_func(TestReq *r)
{
    AffinityTest *t = r->data;
    cpu_set_t mine;

    if (sched_getaffinity(0, sizeof(mine), &mine)) {
        return -errno;
    }
    return CPU_EQUAL(&mine, &t->one) ? 0 : -EXDEV;
}

static void affinity_run(void *opaque)
{
    AffinityTest *t = opaque;
    TestPool tp;
    TestReq *r;

    if (sched_setaffinity(0, sizeof(t->one), &t->one)) {
        t->refused = true;
        return;
    }
    pool_init(&tp, 2, 4);
    r = reqs_new(&tp, 64);
    for (int i = 0; i < 64; i++) {
        r[i].func = affinity_func;
        r[i].data = t;
        r[i].value = 0;
    }
    reqs_submit(r, 64);
    pool_wait_all(&tp);
    for (int i = 0; i < 64; i++) {
        req_check_in_worker(&r[i]);
    }
    g_free(r);
    pool_destroy(&tp);
}
#endif

/* Workers run where the home thread runs, whoever else is where. */
static void test_threads_affinity(void)
{
#ifdef CONFIG_LINUX
    AffinityTest t = { };
    IOThread *iothread;
    int which, cpu;

    if (sched_getaffinity(0, sizeof(t.allowed), &t.allowed) ||
        CPU_COUNT(&t.allowed) < 2) {
        g_test_skip("needs two CPUs");
        return;
    }
    which = g_test_rand_int_range(0, CPU_COUNT(&t.allowed));
    for (cpu = 0; which || !CPU_ISSET(cpu, &t.allowed); cpu++) {
        which -= !!CPU_ISSET(cpu, &t.allowed);
    }
    CPU_SET(cpu, &t.one);

    iothread = iothread_new();
    ctx_call(iothread_get_aio_context(iothread), affinity_run, &t);
    iothread_join(iothread);
    if (t.refused) {
        g_test_skip("the host refuses to set affinity");
    }
#else
    g_test_skip("needs sched_setaffinity()");
#endif
}

#ifdef CONFIG_LINUX
static void *foreign_submit_thread(void *opaque)
{
    TestReq *r = opaque;

    qemu_set_current_aio_context(main_ctx);
    reqs_submit(r, 4);
    return NULL;
}
#endif

/*
 * A vCPU thread that holds the BQL submits and goes on; the main thread runs
 * the loop and creates the worker, with its own affinity.
 */
static void test_threads_vcpu(void)
{
#ifdef CONFIG_LINUX
    TestPool tp;
    TestReq *r;
    QemuThread thread;

    pool_init(&tp, 0, 4);
    r = reqs_new(&tp, 4);
    create_watch_home();
    qemu_thread_create(&thread, "vcpu", foreign_submit_thread, r,
                       QEMU_THREAD_JOINABLE);
    qemu_thread_join(&thread);
    pool_wait_all(&tp);
    for (int i = 0; i < 4; i++) {
        req_check_in_worker(&r[i]);
    }
    g_assert_cmpint(create.strangers, ==, 0);
    WAIT_STATE(tp.ctx, pool_info(&tp).idle == pool_info(&tp).threads);
    g_assert_cmpint(pool_info(&tp).threads, >=, 1);
    g_free(r);
    pool_destroy(&tp);
#else
    g_test_skip("needs thread ids");
#endif
}

#ifdef CONFIG_LINUX
typedef struct ForeignTest {
    TestPool tp;
    void (*fn)(TestPool *tp);
} ForeignTest;

static void *foreign_thread(void *opaque)
{
    ForeignTest *t = opaque;

    rcu_register_thread();
    qemu_set_current_aio_context(main_ctx);
    t->tp.home = pthread_self();
    t->fn(&t->tp);
    rcu_unregister_thread();
    return NULL;
}

/*
 * Like a vCPU thread that holds the BQL and runs a nested loop of the main
 * context; the main thread waits meanwhile.
 */
static void foreign_run(ForeignTest *t, void (*fn)(TestPool *tp))
{
    QemuThread thread;

    t->fn = fn;
    qemu_thread_create(&thread, "foreign", foreign_thread, t,
                       QEMU_THREAD_JOINABLE);
    qemu_thread_join(&thread);
    t->tp.home = pthread_self();
}

static void foreign_many(TestPool *tp)
{
    TestReq *r = reqs_new(tp, 100);

    for (int round = 0; round < 3; round++) {
        reqs_submit(r, 100);
        pool_wait_all(tp);
        for (int i = 0; i < 100; i++) {
            req_check_in_worker(&r[i]);
        }
    }
    g_free(r);
    /* Workers with a vCPU's affinity go when there is nothing to do. */
    WAIT_STATE(tp->ctx, !pool_info(tp).threads);
}

static void foreign_blocked(TestPool *tp)
{
    const int n = 4;
    TestReq *r;
    Gate gate;

    gate_init(&gate);
    gate.open_at = n;
    r = reqs_new_gated(tp, n, &gate, PAIO_NORMAL);
    reqs_submit(r, n);
    pool_wait_all(tp);
    for (int i = 0; i < n; i++) {
        req_check_in_worker(&r[i]);
    }
    g_free(r);
    gate_destroy(&gate);
}

static void foreign_turn(TestPool *tp)
{
    TestReq r;

    req_init(&r, tp);
    req_submit(&r);
    pool_wait_all(tp);
    req_check_in_worker(&r);
    pool_turn_for_ms(tp, 20);
}
#endif

/* Who needs workers in a foreign thread gets them, but they don't stay. */
static void test_threads_foreign(void)
{
#ifdef CONFIG_LINUX
    ForeignTest t;
    TestReq r;

    pool_init(&t.tp, 0, 4);
    foreign_run(&t, foreign_many);

    req_init(&r, &t.tp);
    req_submit(&r);
    pool_wait_all(&t.tp);
    req_check_in_worker(&r);
    WAIT_STATE(t.tp.ctx, pool_info(&t.tp).idle == 1);
    pool_destroy(&t.tp);
#else
    g_test_skip("needs thread ids");
#endif
}

/* The pool grows there as well, with and without a worker that is at home. */
static void test_threads_foreign_growth(void)
{
#ifdef CONFIG_LINUX
    for (int warm = 0; warm < 2; warm++) {
        ForeignTest t;

        pool_init(&t.tp, 0, 4);
        if (warm) {
            pool_warm_up(&t.tp, 1);
        }
        foreign_run(&t, foreign_blocked);
        pool_destroy(&t.tp);
    }
#else
    g_test_skip("needs thread ids");
#endif
}

/*
 * As these workers don't stay, thread-pool-min must not be a reason to create
 * one after the other.  The main thread sees to it later.
 */
static void test_threads_foreign_min(void)
{
#ifdef CONFIG_LINUX
    ForeignTest t;

    create_reset();
    pool_init(&t.tp, 2, 4);
    foreign_run(&t, foreign_turn);
    g_assert_cmpint(create.calls, <=, 10);
    WAIT_LOOP(t.tp.ctx, pool_info(&t.tp).threads == 2);
    WAIT_STATE(t.tp.ctx, pool_info(&t.tp).idle == 2);
    pool_destroy(&t.tp);
#else
    g_test_skip("needs thread ids");
#endif
}

/*
 * Holding up a worker
 */

static int stall_pipe[2];
static bool stalled;

static void stall_handler(int sig)
{
    int old_errno = errno;
    char c;

    qatomic_set(&stalled, true);
    while (read(stall_pipe[0], &c, 1) < 0 && errno == EINTR) {
        /* again */
    }
    errno = old_errno;
}

static struct sigaction stall_old_act;

/* Keep a worker, which doesn't block this signal, from doing anything. */
static void stall_begin(pthread_t thread)
{
    struct sigaction act = { .sa_handler = stall_handler };

    g_assert_cmpint(pipe(stall_pipe), ==, 0);
    sigaction(SIGILL, &act, &stall_old_act);
    qatomic_set(&stalled, false);
    g_assert_cmpint(pthread_kill(thread, SIGILL), ==, 0);
    WAIT_BLIND(qatomic_read(&stalled));
}

static void stall_end(void)
{
    ssize_t len = write(stall_pipe[1], "", 1);

    g_assert_cmpint(len, ==, 1);
}

/* When the worker can't be in the handler any more */
static void stall_cleanup(void)
{
    sigaction(SIGILL, &stall_old_act, NULL);
    close(stall_pipe[0]);
    close(stall_pipe[1]);
}

/*
 * Growth
 */

static void do_test_growth(int n)
{
    TestPool tp;
    TestReq *r;
    Gate gate;

    gate_init(&gate);
    gate.open_at = n;
    pool_init(&tp, 0, n);
    r = reqs_new_gated(&tp, n, &gate, PAIO_NORMAL);
    reqs_submit(r, n);
    pool_wait_all(&tp);
    reqs_check(r, n);
    g_assert_cmpint(gate_peak(&gate), ==, n);
    g_assert_cmpint(pool_info(&tp).threads, ==, n);
    g_assert_cmpint(pool_info(&tp).threads_peak, ==, n);
    g_free(r);
    pool_destroy(&tp);
    gate_destroy(&gate);
}

/* Functions of which only the last lets the others go on, sent in one turn */
static void test_growth_blocked(void)
{
    create_reset();
    create_watch_home();
    do_test_growth(16);
    g_assert_cmpint(create.calls, ==, 16);
    g_assert_cmpint(create.strangers, ==, 0);
    create_reset();
}

/* The same when a new thread doesn't run at once, as on a loaded host */
static void test_growth_slow_start(void)
{
    qatomic_set(&create.delay_us, 3000);
    do_test_growth(6);
    create_reset();
}

static void test_growth_bounded(void)
{
    const int n = 40, max = 4;
    TestPool tp;
    TestReq *r;
    Gate gate;

    gate_init(&gate);
    pool_init(&tp, 0, max);
    r = reqs_new_gated(&tp, n, &gate, PAIO_NORMAL);
    reqs_submit(r, n);
    WAIT_STATE(tp.ctx, gate_inside(&gate) == max);
    pool_turn_for_ms(&tp, 20);
    g_assert_cmpint(gate_inside(&gate), ==, max);
    g_assert_cmpint(pool_info(&tp).queued, ==, n - max);
    gate_open(&gate);
    pool_wait_all(&tp);
    reqs_check(r, n);
    g_assert_cmpint(gate_peak(&gate), ==, max);
    g_assert_cmpint(pool_info(&tp).threads_peak, ==, max);
    g_free(r);
    pool_destroy(&tp);
    gate_destroy(&gate);
}

/*
 * An idle worker is woken for one of two requests but gets no CPU for longer
 * than a request should wait; the second request must not be forgotten.
 */
static void test_growth_late_wake(void)
{
    TestPool tp;
    TestReq first;
    TestReq *r;
    Gate gate;

    gate_init(&gate);
    gate.open_at = 2;
    pool_init(&tp, 0, 2);
    req_init(&first, &tp);
    req_submit(&first);
    pool_wait_all(&tp);
    WAIT_STATE(tp.ctx, pool_info(&tp).idle == 1);
    stall_begin(first.ran_in);

    r = reqs_new_gated(&tp, 2, &gate, PAIO_NORMAL);
    defer_call_begin();
    reqs_submit(r, 2);
    defer_call_end();
    pool_turn_for_ms(&tp, 20);
    stall_end();

    pool_wait_all(&tp);
    reqs_check(r, 2);
    g_free(r);
    pool_destroy(&tp);
    gate_destroy(&gate);
    stall_cleanup();
}

/* Requests that don't block are no reason for more threads. */
static void test_growth_not_by_number(void)
{
    const int batch = 64;
    TestPool tp;
    TestReq *r;

    pool_init(&tp, 0, DEFAULT_MAX);
    r = reqs_new(&tp, batch);
    for (int i = 0; i < 1024 / batch; i++) {
        defer_call_begin();
        reqs_submit(r, batch);
        defer_call_end();
        pool_wait_all(&tp);
        reqs_check(r, batch);
    }
    g_test_message("%d threads at most", pool_info(&tp).threads_peak);
    g_assert_cmpint(pool_info(&tp).threads_peak, <=, 8);
    g_free(r);
    pool_destroy(&tp);
}

/*
 * thread-pool-min and thread-pool-max at run time
 */

static void test_params_min(void)
{
    TestPool tp;

    pool_init(&tp, 0, 8);
    pool_set(&tp, 4, 8);
    WAIT_LOOP(tp.ctx, pool_info(&tp).threads == 4);
    WAIT_STATE(tp.ctx, pool_info(&tp).idle == 4);
    pool_set(&tp, 6, 8);
    WAIT_LOOP(tp.ctx, pool_info(&tp).threads == 6);
    /* Neither is a lower limit a reason to go at once. */
    pool_set(&tp, 0, 8);
    pool_turn_for_ms(&tp, 5);
    g_assert_cmpint(pool_info(&tp).threads, ==, 6);
    g_assert_cmpuint(tp.submitted, ==, 0);
    pool_destroy(&tp);
}

static void pool_init_call(void *opaque)
{
    pool_init(opaque, 0, 8);
}

static void pool_destroy_call(void *opaque)
{
    pool_destroy(opaque);
}

/* Changed by another thread, while the event loop sleeps */
static void test_params_remote(void)
{
    IOThread *iothread = iothread_new();
    AioContext *ctx = iothread_get_aio_context(iothread);
    TestPool tp;

    ctx_call(ctx, pool_init_call, &tp);
    create_reset();
    create.home = tp.home;
    qatomic_set(&create.watch, true);

    pool_set(&tp, 5, 8);
    WAIT_BLIND(pool_info(&tp).idle == 5);
    g_assert_cmpint(create.calls, ==, 5);
    g_assert_cmpint(create.strangers, ==, 0);
    pool_set(&tp, 1, 2);
    WAIT_BLIND(pool_info(&tp).threads == 2);
    create_reset();

    ctx_call(ctx, pool_destroy_call, &tp);
    iothread_join(iothread);
}

static void test_params_max_idle(void)
{
    TestPool tp;
    TestReq *r;

    pool_init(&tp, 0, 8);
    pool_warm_up(&tp, 8);
    pool_set(&tp, 0, 3);
    WAIT_LOOP(tp.ctx, pool_info(&tp).threads == 3);
    WAIT_STATE(tp.ctx, pool_info(&tp).idle == 3);
    pool_set(&tp, 1, 1);
    WAIT_LOOP(tp.ctx, pool_info(&tp).threads == 1);

    r = reqs_new(&tp, 100);
    reqs_submit(r, 100);
    pool_wait_all(&tp);
    reqs_check(r, 100);
    g_assert_cmpint(pool_info(&tp).threads, ==, 1);
    g_free(r);
    pool_destroy(&tp);
}

/* The event loop sleeps when the surplus workers go, which are still joined. */
static void test_params_max_busy(void)
{
    const int n = 20;
    TestPool tp;
    TestReq *busy, *r;
    Gate gate, second;

    gate_init(&gate);
    gate_init(&second);
    pool_init(&tp, 0, 8);
    busy = reqs_new_gated(&tp, 8, &gate, PAIO_NORMAL);
    reqs_submit(busy, 8);
    WAIT_STATE(tp.ctx, gate_inside(&gate) == 8);

    pool_set(&tp, 0, 3);
    r = reqs_new_gated(&tp, n, &second, PAIO_NORMAL);
    reqs_submit(r, n);
    pool_turn_for_ms(&tp, 5);
    g_assert_cmpint(pool_info(&tp).threads, ==, 8);
    g_assert_cmpint(gate_entered(&second), ==, 0);

    gate_open(&gate);
    WAIT_STATE(tp.ctx, pool_info(&tp).threads == 3);
    WAIT_STATE(tp.ctx, gate_inside(&second) == 3);
    pool_turn_for_ms(&tp, 5);
    g_assert_cmpint(gate_peak(&second), ==, 3);

    gate_open(&second);
    pool_wait_all(&tp);
    reqs_check(busy, 8);
    reqs_check(r, n);
    g_assert_cmpint(gate_peak(&second), ==, 3);
    g_free(busy);
    g_free(r);
    pool_destroy(&tp);
    gate_destroy(&gate);
    gate_destroy(&second);
}

static void test_params_max_one(void)
{
    const int n = 20;
    TestPool tp;
    TestReq *r;
    Gate gate;

    gate_init(&gate);
    pool_init(&tp, 1, 1);
    r = reqs_new_gated(&tp, n, &gate, PAIO_NORMAL);
    reqs_submit(r, n);
    for (int i = 0; i < n; i++) {
        gate_let_one(&gate);
        WAIT_LOOP(tp.ctx, r[i].completions);
    }
    reqs_check(r, n);
    g_assert_cmpint(gate_peak(&gate), ==, 1);
    g_assert_cmpint(pool_info(&tp).threads_peak, ==, 1);
    g_free(r);
    pool_destroy(&tp);
    gate_destroy(&gate);
}

/* All workers are blocked, requests wait: a higher limit sets them free. */
static void test_params_max_raise(void)
{
    const int n = 6;
    TestPool tp;
    TestReq *r;
    Gate gate;

    gate_init(&gate);
    gate.open_at = n;
    pool_init(&tp, 0, 2);
    r = reqs_new_gated(&tp, n, &gate, PAIO_NORMAL);
    reqs_submit(r, n);
    WAIT_STATE(tp.ctx, gate_inside(&gate) == 2);
    pool_turn_for_ms(&tp, 5);
    pool_set(&tp, 0, n);
    pool_wait_all(&tp);
    reqs_check(r, n);
    g_free(r);
    pool_destroy(&tp);
    gate_destroy(&gate);
}

/*
 * The worker that is told to go is just the one that a request would wake;
 * somebody else has to serve the request.
 */
static void test_params_max_woken(void)
{
    TestPool tp;
    TestReq last, r;

    pool_init(&tp, 0, 2);
    pool_warm_up(&tp, 2);
    req_init(&last, &tp);
    req_submit(&last);
    pool_wait_all(&tp);
    WAIT_STATE(tp.ctx, pool_info(&tp).idle == 2);

    /* The one that was idle last is woken first. */
    stall_begin(last.ran_in);
    pool_set(&tp, 0, 1);
    req_init(&r, &tp);
    req_submit(&r);
    pool_turn_for_ms(&tp, 3);
    stall_end();
    pool_wait_all(&tp);
    req_check_in_worker(&r);
    WAIT_LOOP(tp.ctx, pool_info(&tp).threads == 1);
    pool_destroy(&tp);
    stall_cleanup();
}

/* Only with -m slow: takes PAIO_IDLE_MS */
static void test_shrink(void)
{
    TestPool tp;
    TestReq r;
    int64_t begin;

    pool_init(&tp, 2, 8);
    begin = g_get_monotonic_time();
    pool_warm_up(&tp, 8);
    WAIT_LOOP(tp.ctx, pool_info(&tp).threads == 2);
    g_assert_cmpint(g_get_monotonic_time() - begin, >=, 9 * G_USEC_PER_SEC);
    WAIT_STATE(tp.ctx, count_workers() <= 2);
    pool_turn_for_ms(&tp, 500);
    g_assert_cmpint(pool_info(&tp).threads, ==, 2);

    req_init(&r, &tp);
    req_submit(&r);
    pool_wait_all(&tp);
    req_check_in_worker(&r);
    pool_destroy(&tp);
}

/*
 * Slow work
 */

static void test_slow_storm(void)
{
    const int n = 24, nr_normal = 200;
    TestPool tp;
    TestReq *slow, *normal;
    Gate gate;

    gate_init(&gate);
    pool_init(&tp, 0, 4);
    slow = reqs_new_gated(&tp, n, &gate, PAIO_SLOW);
    normal = reqs_new(&tp, nr_normal);
    reqs_submit(slow, n / 2);
    reqs_submit(normal, nr_normal / 2);
    reqs_submit(slow + n / 2, n / 2);
    WAIT_LOOP(tp.ctx, tp.completed == nr_normal / 2);
    WAIT_STATE(tp.ctx, gate_inside(&gate) == 3);

    reqs_submit(normal + nr_normal / 2, nr_normal / 2);
    WAIT_LOOP(tp.ctx, tp.completed == nr_normal);
    reqs_check(normal, nr_normal);
    pool_turn_for_ms(&tp, 5);
    g_assert_cmpint(gate_inside(&gate), ==, 3);

    gate_open(&gate);
    pool_wait_all(&tp);
    reqs_check(slow, n);
    g_assert_cmpint(gate_peak(&gate), ==, 3);
    g_free(slow);
    g_free(normal);
    pool_destroy(&tp);
    gate_destroy(&gate);
}

/* max(1, thread-pool-max - 1) for small values */
static void test_slow_few_workers(void)
{
    for (int max = 1; max <= 3; max++) {
        int room = MAX(1, max - 1);
        TestPool tp;
        TestReq *r;
        Gate gate;

        gate_init(&gate);
        pool_init(&tp, max, max);
        r = reqs_new_gated(&tp, 8, &gate, PAIO_SLOW);
        reqs_submit(r, 8);
        WAIT_STATE(tp.ctx, gate_inside(&gate) == room);
        pool_turn_for_ms(&tp, 5);
        g_assert_cmpint(gate_inside(&gate), ==, room);
        for (int i = 0; i < 8; i++) {
            gate_let_one(&gate);
            WAIT_LOOP(tp.ctx, tp.completed == i + 1);
        }
        reqs_check(r, 8);
        g_assert_cmpint(gate_peak(&gate), ==, room);
        g_free(r);
        pool_destroy(&tp);
        gate_destroy(&gate);
    }
}

/*
 * A slow request may not be taken although a worker is idle; with a higher
 * limit it may, and nothing else happens that could wake the worker.  (With
 * thread-pool-min as high as here, not even that it has been idle for long.)
 */
static void test_slow_raise_max(void)
{
    TestPool tp;
    TestReq *r;
    Gate gate;

    gate_init(&gate);
    gate.open_at = 2;
    pool_init(&tp, 2, 2);
    pool_warm_up(&tp, 2);
    r = reqs_new_gated(&tp, 2, &gate, PAIO_SLOW);
    reqs_submit(r, 2);
    WAIT_STATE(tp.ctx, gate_inside(&gate) == 1);
    WAIT_STATE(tp.ctx, pool_info(&tp).idle == 1);
    g_assert_cmpint(pool_info(&tp).queued, ==, 1);

    pool_set(&tp, 2, 3);
    pool_wait_all(&tp);
    reqs_check(r, 2);
    g_free(r);
    pool_destroy(&tp);
    gate_destroy(&gate);
}

static void test_slow_lower_max(void)
{
    const int n = 6;
    TestPool tp;
    TestReq *r;
    Gate gate;

    gate_init(&gate);
    pool_init(&tp, 0, 4);
    r = reqs_new_gated(&tp, n, &gate, PAIO_SLOW);
    reqs_submit(r, n);
    WAIT_STATE(tp.ctx, gate_inside(&gate) == 3);

    /* Now one may run, so the next starts when all three have ended. */
    pool_set(&tp, 0, 2);
    for (int i = 1; i < 3; i++) {
        gate_let_one(&gate);
        WAIT_LOOP(tp.ctx, tp.completed == i);
        pool_turn_for_ms(&tp, 3);
        g_assert_cmpint(gate_entered(&gate), ==, 3);
    }
    gate_let_one(&gate);
    WAIT_LOOP(tp.ctx, tp.completed == 3);
    WAIT_STATE(tp.ctx, gate_entered(&gate) == 4);
    pool_turn_for_ms(&tp, 3);
    g_assert_cmpint(gate_inside(&gate), ==, 1);
    WAIT_STATE(tp.ctx, pool_info(&tp).threads <= 2);

    gate_open(&gate);
    pool_wait_all(&tp);
    reqs_check(r, n);
    g_free(r);
    pool_destroy(&tp);
    gate_destroy(&gate);
}

/*
 * Cancellation
 */

static void test_cancel_incoming(void)
{
    TestPool tp;
    TestReq *r;

    pool_init(&tp, 0, 4);
    r = reqs_new(&tp, 5);
    for (int round = 0; round < 2; round++) {
        /* In the first round there is no worker yet. */
        defer_call_begin();
        reqs_submit(r, 5);
        g_assert(req_cancel(&r[0]));
        g_assert(req_cancel(&r[2]));
        g_assert(req_cancel(&r[4]));
        defer_call_end();
        g_assert_cmpint(r[0].completions, ==, 0);
        pool_wait_all(&tp);
        for (int i = 0; i < 5; i++) {
            if (i & 1) {
                req_check_in_worker(&r[i]);
            } else {
                req_check_cancelled(&r[i]);
            }
        }
    }

    /* All of a section, which leaves nothing to hand over */
    defer_call_begin();
    req_submit(&r[0]);
    g_assert(req_cancel(&r[0]));
    defer_call_end();
    pool_wait_all(&tp);
    req_check_cancelled(&r[0]);

    req_submit(&r[0]);
    pool_wait_all(&tp);
    req_check_in_worker(&r[0]);
    g_free(r);
    pool_destroy(&tp);
}

static void test_cancel_queued(void)
{
    for (int class = 0; class < PAIO_CLASS__MAX; class++) {
        TestPool tp;
        TestReq *r;
        Gate gate;

        gate_init(&gate);
        pool_init(&tp, 0, 1);
        r = reqs_new_gated(&tp, 4, &gate, class);
        reqs_submit(r, 4);
        WAIT_STATE(tp.ctx, gate_inside(&gate) == 1);
        g_assert_cmpint(pool_info(&tp).queued, ==, 3);

        g_assert(req_cancel(&r[1]));
        g_assert(req_cancel(&r[3]));
        g_assert_cmpint(pool_info(&tp).queued, ==, 1);
        /* Completes at once, not when the worker has time */
        WAIT_LOOP(tp.ctx, r[1].completions && r[3].completions);
        g_assert_cmpint(r[0].completions, ==, 0);

        gate_open(&gate);
        pool_wait_all(&tp);
        req_check_in_worker(&r[0]);
        req_check_cancelled(&r[1]);
        req_check_in_worker(&r[2]);
        req_check_cancelled(&r[3]);
        g_free(r);
        pool_destroy(&tp);
        gate_destroy(&gate);
    }
}

/* No worker exists, and when one comes it finds nothing. */
static void test_cancel_before_worker(void)
{
    TestPool tp;
    TestReq r;

    pool_init(&tp, 0, 2);
    req_init(&r, &tp);
    req_submit(&r);
    g_assert(req_cancel(&r));
    pool_wait_all(&tp);
    req_check_cancelled(&r);

    req_submit(&r);
    pool_wait_all(&tp);
    req_check_in_worker(&r);
    pool_destroy(&tp);
}

static void test_cancel_running(void)
{
    TestPool tp;
    TestReq *r;
    Gate gate;

    gate_init(&gate);
    pool_init(&tp, 0, 1);
    r = reqs_new_gated(&tp, 1, &gate, PAIO_NORMAL);
    r->value = 17;
    req_submit(r);
    WAIT_STATE(tp.ctx, gate_inside(&gate) == 1);
    g_assert(!req_cancel(r));
    pool_turn_for_ms(&tp, 3);
    g_assert_cmpint(r->completions, ==, 0);
    gate_open(&gate);
    pool_wait_all(&tp);
    req_check_in_worker(r);
    g_free(r);
    pool_destroy(&tp);
    gate_destroy(&gate);
}

static void cancel_next_done(TestReq *r)
{
    /* It is done as well, only its callback has not been called. */
    g_assert_cmpint(r[1].completions, ==, 0);
    g_assert(!req_cancel(&r[1]));
}

static void test_cancel_done(void)
{
    TestPool tp;
    Gate gate;
    TestReq *r = nested_prepare(&tp, 3, &gate);

    g_assert(!req_cancel(&r[0]));
    r[1].done = cancel_next_done;
    WAIT_LOOP(tp.ctx, tp.completed == 3);
    /* After the completion it is as if nothing had been asked, too. */
    g_assert(!req_cancel(&r[0]));
    nested_finish(&tp, r, 3, &gate);
}

/* A second cancellation changes nothing: still one completion */
static void test_cancel_twice(void)
{
    TestPool tp;
    TestReq *r;
    Gate gate;

    gate_init(&gate);
    pool_init(&tp, 0, 1);
    r = reqs_new_gated(&tp, 2, &gate, PAIO_NORMAL);
    reqs_submit(r, 2);
    WAIT_STATE(tp.ctx, gate_inside(&gate) == 1);
    g_assert(req_cancel(&r[1]));
    req_cancel(&r[1]);
    WAIT_LOOP(tp.ctx, r[1].completions);
    req_cancel(&r[1]);
    pool_turn_for_ms(&tp, 3);
    gate_open(&gate);
    pool_wait_all(&tp);
    req_check_in_worker(&r[0]);
    req_check_cancelled(&r[1]);
    g_assert_cmpuint(tp.completed, ==, 2);
    g_free(r);
    pool_destroy(&tp);
    gate_destroy(&gate);
}

static void cancel_rest_done(TestReq *r)
{
    TestReq *victim = r->data;

    g_assert(req_cancel(victim));
    WAIT_LOOP(r->tp->ctx, victim->completions);
    req_check_cancelled(victim);
    nested_ended = true;
}

/* A callback takes back a queued request and waits for it. */
static void test_cancel_in_callback(void)
{
    TestPool tp;
    Gate gate;
    TestReq *r = nested_prepare(&tp, 2, &gate);
    TestReq victim;

    req_init(&victim, &tp);
    req_submit(&victim);
    nested_ended = false;
    r[0].done = cancel_rest_done;
    r[0].data = &victim;
    WAIT_LOOP(tp.ctx, nested_ended && r[1].completions);
    gate_open(&gate);
    pool_wait_all(&tp);
    reqs_check(r, 3);
    g_free(r);
    gate_destroy(&gate);
    pool_destroy(&tp);
}

/*
 * Threads that can't be created
 */

static void test_create_none(void)
{
    const int n = 100;
    TestPool tp;
    TestReq *r;

    pool_init(&tp, 0, 4);
    create_fail_after(0);
    r = reqs_new(&tp, n);
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < n; i++) {
            r[i].req.class = round && i % 3 ? PAIO_SLOW : PAIO_NORMAL;
        }
        reqs_submit(r, n);
        pool_wait_all(&tp);
        for (int i = 0; i < n; i++) {
            req_check_at_home(&r[i]);
        }
    }
    g_assert_cmpint(pool_info(&tp).run_at_home, ==, 2 * n);
    g_assert_cmpint(pool_info(&tp).create_failed, >, 0);
    g_assert_cmpint(pool_info(&tp).threads, ==, 0);
    g_assert_cmpint(count_workers(), ==, 0);

    /* Also in a section and with some taken back */
    defer_call_begin();
    reqs_submit(r, 4);
    g_assert(req_cancel(&r[1]));
    pool_wait_all(&tp);
    defer_call_end();
    req_check_at_home(&r[0]);
    req_check_cancelled(&r[1]);
    g_free(r);
    pool_destroy(&tp);
}

static void test_create_none_chain(void)
{
    TestPool tp;

    create_fail_after(0);
    pool_init(&tp, 0, 4);
    do_test_no_recursion(&tp, 2000);
    g_assert_cmpint(pool_info(&tp).run_at_home, ==, 2000);
    pool_destroy(&tp);
}

/* Callbacks that wait for the next, as if there were workers */
static void test_create_none_nested(void)
{
    const int n = 16;
    TestPool tp;
    TestReq *r;

    create_fail_after(0);
    pool_init(&tp, 0, 4);
    r = reqs_new(&tp, n);
    nested_ended = false;
    nested_depth_peak = 0;
    for (int i = 0; i < n - 1; i++) {
        r[i].done = nested_deep_done;
    }
    reqs_submit(r, n);
    pool_wait_all(&tp);
    WAIT_LOOP(tp.ctx, nested_ended);
    g_assert_cmpint(nested_depth_peak, ==, n - 1);

    /* And for what they have submitted themselves */
    r[0].done = nested_submit_done;
    r[0].data = GINT_TO_POINTER(8);
    req_submit(&r[0]);
    pool_wait_all(&tp);
    g_assert_cmpint(pool_info(&tp).run_at_home, ==, n + 9);
    g_free(r);
    pool_destroy(&tp);
}

/* The event loop does the work, but isn't starved by it. */
static void test_create_none_bounded(void)
{
    TestPool tp;
    TestReq *r;
    Ticker ticker = { .ticks = 0 };

    create_fail_after(0);
    pool_init(&tp, 0, 4);
    r = reqs_new(&tp, CHAINS);
    aio_timer_init(tp.ctx, &ticker.timer, QEMU_CLOCK_REALTIME, SCALE_NS,
                   ticker_cb, &ticker);
    timer_mod(&ticker.timer, 0);
    chains_stop = false;
    for (int i = 0; i < CHAINS; i++) {
        r[i].done = bounded_done;
    }
    reqs_submit(r, CHAINS);
    watchdog_note("ticks of the timer", __LINE__);
    while (ticker.ticks < 10 || tp.completed < 2 * CHAINS) {
        turn_count = 0;
        turn_limit = tp.in_flight;
        aio_poll(tp.ctx, false);
    }
    chains_stop = true;
    turn_limit = UINT_MAX;
    pool_wait_all(&tp);
    timer_del(&ticker.timer);
    g_assert_cmpint(pool_info(&tp).run_at_home, ==, tp.completed);
    g_free(r);
    pool_destroy(&tp);
}

static void test_create_only_first(void)
{
    const int n = 8;
    TestPool tp;
    TestReq *r;
    Gate gate;

    gate_init(&gate);
    create_fail_after(1);
    pool_init(&tp, 0, 4);
    r = reqs_new_gated(&tp, n, &gate, PAIO_NORMAL);
    reqs_submit(r, n);
    WAIT_STATE(tp.ctx, pool_info(&tp).create_failed > 0);
    gate_open(&gate);
    pool_wait_all(&tp);
    for (int i = 0; i < n; i++) {
        req_check_in_worker(&r[i]);
        g_assert_cmpuint(r[i].order, ==, i + 1);
    }
    g_assert_cmpint(pool_info(&tp).run_at_home, ==, 0);
    g_assert_cmpint(pool_info(&tp).threads_peak, ==, 1);
    g_assert_cmpint(gate_peak(&gate), ==, 1);
    g_free(r);
    pool_destroy(&tp);
    gate_destroy(&gate);
}

/* thread-pool-min can't be had: no storm of attempts, no harm */
static void test_create_min_fails(void)
{
    TestPool tp;
    TestReq *r;

    create_reset();
    create_fail_after(1);
    pool_init(&tp, 4, 4);
    WAIT_STATE(tp.ctx, pool_info(&tp).create_failed > 0);
    pool_turn_for_ms(&tp, 20);
    g_assert_cmpint(create.calls, <, 10);
    g_assert_cmpint(pool_info(&tp).threads, ==, 1);
    r = reqs_new(&tp, 50);
    reqs_submit(r, 50);
    pool_wait_all(&tp);
    for (int i = 0; i < 50; i++) {
        req_check_in_worker(&r[i]);
    }
    g_free(r);
    pool_destroy(&tp);
}

static void test_create_recovers(void)
{
    const int n = 4;
    TestPool tp;
    TestReq *r;
    Gate gate;

    create_fail_after(0);
    pool_init(&tp, 0, n);
    r = reqs_new(&tp, n);
    reqs_submit(r, n);
    pool_wait_all(&tp);
    for (int i = 0; i < n; i++) {
        req_check_at_home(&r[i]);
    }

    create_fail_after(1);
    reqs_submit(r, n);
    pool_wait_all(&tp);
    for (int i = 0; i < n; i++) {
        req_check_in_worker(&r[i]);
    }
    g_assert_cmpint(pool_info(&tp).threads, ==, 1);
    g_free(r);

    /* Blocked, and the attempts to grow fail for a while */
    gate_init(&gate);
    gate.open_at = n;
    r = reqs_new_gated(&tp, n, &gate, PAIO_NORMAL);
    reqs_submit(r, n);
    WAIT_STATE(tp.ctx, gate_inside(&gate) == 1);
    WAIT_STATE(tp.ctx, pool_info(&tp).create_failed > 1);
    create_reset();
    pool_wait_all(&tp);
    for (int i = 0; i < n; i++) {
        req_check_in_worker(&r[i]);
    }
    g_assert_cmpint(pool_info(&tp).run_at_home, ==, n);
    g_assert_cmpint(pool_info(&tp).threads, ==, n);
    g_free(r);
    gate_destroy(&gate);
    pool_destroy(&tp);
}

/* One warning, however many requests and pools */
static void test_create_warning(void)
{
    if (g_test_subprocess()) {
        test_create_none();
        test_create_none();
        return;
    }
#ifdef CONFIG_TSAN
    /* QEMU's fork handlers start a thread. */
    g_test_skip("ThreadSanitizer doesn't allow threads after fork()");
    return;
#endif
    g_test_trap_subprocess(NULL, 0, 0);
    g_test_trap_assert_passed();
    g_test_trap_assert_stderr("*No worker thread*");
    g_test_trap_assert_stderr_unmatched("*No worker*No worker*");
}

/*
 * Tear-down
 */

static int sleep_func(TestReq *r)
{
    int us = GPOINTER_TO_INT(r->data);

    if (us) {
        g_usleep(us);
    }
    return r->value;
}

static void test_free_random(void)
{
    for (int round = 0; round < 200; round++) {
        int n = g_test_rand_int_range(0, 9);
        int pause = g_test_rand_int_range(0, 300);
        TestPool tp;
        TestReq *r;

        pool_init(&tp, g_test_rand_int_range(0, 3), 4);
        r = reqs_new(&tp, n);
        for (int i = 0; i < n; i++) {
            int us = g_test_rand_bit() ? g_test_rand_int_range(0, 100) : 0;

            r[i].func = sleep_func;
            r[i].data = GINT_TO_POINTER(us);
            r[i].req.class = g_test_rand_bit() ? PAIO_SLOW : PAIO_NORMAL;
        }
        reqs_submit(r, n);
        if (n && g_test_rand_bit()) {
            req_cancel(&r[g_test_rand_int_range(0, n)]);
        }
        pool_wait_all(&tp);
        switch (g_test_rand_int_range(0, 4)) {
        case 0:
            /* Workers that are just being created or told to go */
            pool_set(&tp, g_test_rand_int_range(0, 3), 3);
            aio_poll(tp.ctx, false);
            break;
        case 1:
            pool_set(&tp, 0, 1);
            break;
        case 2:
            g_usleep(pause);
            break;
        default:
            break;
        }
        pool_destroy(&tp);
        g_free(r);
    }
}

static void test_free_unused(void)
{
    TestPool tp;

    pool_init(&tp, 0, 4);
    pool_destroy(&tp);
    /* Threads have been asked for, but the event loop has not turned. */
    pool_init(&tp, 4, 4);
    pool_destroy(&tp);
    pool_init(&tp, 4, 4);
    aio_poll(tp.ctx, false);
    pool_destroy(&tp);
}

static void test_free_idle(void)
{
    TestPool tp;

    pool_init(&tp, 0, 8);
    pool_warm_up(&tp, 8);
    pool_destroy(&tp);
    WAIT_BLIND(!count_workers());
}

static void free_elsewhere_run(void *opaque)
{
    TestPool *tp = opaque;
    TestReq *r;

    pool_init(tp, 0, 4);
    r = reqs_new(tp, 16);
    reqs_submit(r, 16);
    pool_wait_all(tp);
    reqs_check(r, 16);
    g_free(r);
}

/* Nobody can submit any more: freed by another thread */
static void test_free_elsewhere(void)
{
    IOThread *iothread = iothread_new();
    AioContext *ctx = iothread_get_aio_context(iothread);

    for (int i = 0; i < 20; i++) {
        TestPool tp;

        ctx_call(ctx, free_elsewhere_run, &tp);
        pool_destroy(&tp);
    }
    iothread_join(iothread);
}

/*
 * Lanes
 *
 * The home thread of most of these cases doesn't turn its loop, as the timer
 * would make a lane wider; nor does the clock of the workers go.
 */

/* Observes that nothing runs beside something else; atomic */
typedef struct Serial {
    int inside;
    int started;
    bool overlap;
} Serial;

static int serial_func(TestReq *r)
{
    Serial *s = r->data;

    if (qatomic_fetch_inc(&s->inside)) {
        qatomic_set(&s->overlap, true);
    }
    r->started = qatomic_fetch_inc(&s->started);
    if (r->value % 16 == 0) {
        g_usleep(50);   /* a chance for others to be wrong */
    }
    qatomic_dec(&s->inside);
    return r->value;
}

/* By its worker's clock, if that is stopped */
static int take_long_func(TestReq *r)
{
    clock_ahead_ns += 10 * SCALE_MS;
    return r->value;
}

/* Two lanes in one hand-over, and more workers than lanes */
static void test_lane_serial(void)
{
    const int n = 400;
    Serial serial[2] = { };
    TestPool tp;
    TestReq *r;

    pool_init_idle(&tp, 4);
    r = reqs_new(&tp, n);
    for (int i = 0; i < n; i++) {
        r[i].func = serial_func;
        r[i].data = &serial[i & 1];
        r[i].req.lane = i & 1 ? PAIO_LANES : 1;
        r[i].req.class = g_test_rand_bit() ? PAIO_SLOW : PAIO_NORMAL;
    }
    clock_stop();
    reqs_hand_over(r, n);
    WAIT_BLIND(qatomic_read(&serial[0].started) == n / 2 &&
               qatomic_read(&serial[1].started) == n / 2);
    clock_go();
    pool_wait_all(&tp);
    for (int i = 0; i < n; i++) {
        req_check_in_worker(&r[i]);
        g_assert_cmpint(r[i].started, ==, i / 2);
    }
    g_assert(!serial[0].overlap);
    g_assert(!serial[1].overlap);
    g_free(r);
    pool_destroy(&tp);
}

/* Other lanes and requests without one don't wait for a lane. */
static void test_lane_beside(void)
{
    const unsigned lanes[] = { 1, 33, PAIO_LANES };

    for (int i = 0; i < ARRAY_SIZE(lanes); i++) {
        TestPool tp;
        TestReq *blocked, *r;
        Gate gate;

        gate_init(&gate);
        pool_init_idle(&tp, 2);
        blocked = reqs_new_gated(&tp, 3, &gate, PAIO_NORMAL);
        reqs_set_lane(blocked, 3, lanes[i]);
        r = reqs_new(&tp, 2 * PAIO_LANES);
        for (int j = 0; j < 2 * PAIO_LANES; j++) {
            unsigned lane = j % (PAIO_LANES + 1);

            r[j].req.lane = lane == lanes[i] ? 0 : lane;
        }
        defer_call_begin();
        reqs_submit(blocked, 3);
        reqs_submit(r, 2 * PAIO_LANES);
        defer_call_end();
        WAIT_BLIND(gate_inside(&gate) == 1);
        WAIT_BLIND(reqs_called(r, 2 * PAIO_LANES) == 2 * PAIO_LANES);
        WAIT_BLIND(pool_info(&tp).idle == 1);
        g_assert_cmpint(gate_entered(&gate), ==, 1);
        g_assert_cmpint(pool_info(&tp).queued, ==, 2);

        gate_open(&gate);
        pool_wait_all(&tp);
        reqs_check(blocked, 3);
        reqs_check(r, 2 * PAIO_LANES);
        g_free(blocked);
        g_free(r);
        pool_destroy(&tp);
        gate_destroy(&gate);
    }
}

/* The first ones of a lane may never return: the others get by. */
static void test_lane_stuck(void)
{
    for (int nr_stuck = 1; nr_stuck <= 3; nr_stuck++) {
        const int n = 20;
        TestPool tp;
        TestReq *r;
        Gate gate;

        gate_init(&gate);
        pool_init(&tp, 0, 8);
        r = reqs_new(&tp, n);
        reqs_set_lane(r, n, 3);
        for (int i = 0; i < nr_stuck; i++) {
            r[i].func = gate_func;
            r[i].data = &gate;
        }
        reqs_submit(r, n);
        WAIT_LOOP(tp.ctx, tp.completed == n - nr_stuck);
        reqs_check(r + nr_stuck, n - nr_stuck);
        g_assert_cmpint(gate_inside(&gate), ==, nr_stuck);

        /* Those which come later as well */
        reqs_submit(r + nr_stuck, n - nr_stuck);
        WAIT_LOOP(tp.ctx, tp.completed == 2 * (n - nr_stuck));
        g_assert_cmpint(gate_inside(&gate), ==, nr_stuck);

        gate_open(&gate);
        pool_wait_all(&tp);
        reqs_check(r, n);
        g_free(r);
        pool_destroy(&tp);
        gate_destroy(&gate);
    }
}

/* Functions of one lane of which only the last lets the others go on */
static void test_lane_all_stuck(void)
{
    const int n = 12;
    TestPool tp;
    TestReq *r;
    Gate gate;

    gate_init(&gate);
    gate.open_at = n;
    pool_init(&tp, 0, n);
    r = reqs_new_gated(&tp, n, &gate, PAIO_NORMAL);
    reqs_set_lane(r, n, 1);
    reqs_hand_over(r, n);
    pool_wait_all(&tp);
    reqs_check(r, n);
    g_free(r);
    pool_destroy(&tp);
    gate_destroy(&gate);
}

/* Requests that take long make a lane wider, quick ones make it narrow. */
static void test_lane_slow(void)
{
    const int nr_long = 3, n = 12;
    TestPool tp;
    TestReq *r;
    Gate wide, narrow;

    gate_init(&wide);
    gate_init(&narrow);
    pool_init_idle(&tp, 6);
    clock_stop();
    for (int round = 0; round < 3; round++) {
        int entered = gate_entered(&narrow);

        wide.open = false;
        r = reqs_new_gated(&tp, n, &wide, PAIO_NORMAL);
        reqs_set_lane(r, n, 9);
        for (int i = 0; i < nr_long; i++) {
            r[i].func = take_long_func;
        }
        reqs_hand_over(r, n);
        WAIT_BLIND(gate_inside(&wide) > 1);
        gate_open(&wide);
        /* What is left of them, also of those that have just passed */
        pool_wait_all(&tp);
        reqs_check(r, n);
        reqs_hand_over(r + nr_long, n - nr_long);
        pool_wait_all(&tp);
        WAIT_BLIND(pool_info(&tp).idle == 6);
        g_free(r);

        narrow.open = false;
        r = reqs_new_gated(&tp, n, &narrow, PAIO_NORMAL);
        reqs_set_lane(r, n, 9);
        reqs_hand_over(r, n);
        WAIT_BLIND(gate_inside(&narrow) == 1);
        g_usleep(2000);
        g_assert_cmpint(gate_entered(&narrow), ==, entered + 1);
        g_assert_cmpint(pool_info(&tp).queued, ==, n - 1);
        g_assert_cmpint(pool_info(&tp).idle, ==, 5);
        gate_open(&narrow);
        WAIT_BLIND(gate_entered(&narrow) == entered + n);
        pool_wait_all(&tp);
        reqs_check(r, n);
        g_free(r);
    }
    clock_go();
    pool_destroy(&tp);
    gate_destroy(&wide);
    gate_destroy(&narrow);
}

static int take_long_serial_func(TestReq *r)
{
    serial_func(r);
    return take_long_func(r);
}

/* What takes long because there is much to do makes no lane wider. */
static void test_lane_work(void)
{
    const int n = 40;
    Serial serial = { };
    TestPool tp;
    TestReq *r;
    Gate wide;

    gate_init(&wide);
    pool_init_idle(&tp, 4);
    clock_stop();
    r = reqs_new(&tp, n);
    reqs_set_lane(r, n, 5);
    for (int i = 0; i < n; i++) {
        r[i].func = take_long_serial_func;
        r[i].data = &serial;
        r[i].req.work_ns = 10 * SCALE_MS;
    }
    reqs_hand_over(r, n);
    WAIT_BLIND(qatomic_read(&serial.started) == n);
    pool_wait_all(&tp);
    reqs_check(r, n);
    g_assert(!serial.overlap);
    g_free(r);

    /* Less would not have been enough. */
    WAIT_BLIND(pool_info(&tp).idle == 4);
    r = reqs_new_gated(&tp, n, &wide, PAIO_NORMAL);
    reqs_set_lane(r, n, 5);
    for (int i = 0; i < 2; i++) {
        r[i].func = take_long_func;
        r[i].req.work_ns = 9 * SCALE_MS;
    }
    reqs_hand_over(r, n);
    WAIT_BLIND(gate_inside(&wide) > 1);
    gate_open(&wide);
    pool_wait_all(&tp);
    reqs_check(r, n);
    g_free(r);
    clock_go();
    pool_destroy(&tp);
    gate_destroy(&wide);
}

/*
 * A worker comes back from a long request: it takes the next one of the lane
 * and wakes an idle worker for the one after it.
 */
static void test_lane_wake(void)
{
    for (int class = 0; class < PAIO_CLASS__MAX; class++) {
        TestPool tp;
        TestReq *r;
        Gate gate;

        gate_init(&gate);
        gate.open_at = 2;
        pool_init_idle(&tp, 3);
        r = reqs_new_gated(&tp, 3, &gate, class);
        r[0].func = take_long_func;
        reqs_set_lane(r, 3, 1);
        clock_stop();
        reqs_hand_over(r, 3);
        WAIT_BLIND(gate_entered(&gate) == 2);
        clock_go();
        pool_wait_all(&tp);
        reqs_check(r, 3);
        g_free(r);
        pool_destroy(&tp);
        gate_destroy(&gate);
    }
}

/* The timer does so as well, without a worker that comes back. */
static void test_lane_wake_by_timer(void)
{
    TestPool tp;
    TestReq *r;
    Gate gate;

    gate_init(&gate);
    gate.open_at = 2;
    pool_init_idle(&tp, 2);
    r = reqs_new_gated(&tp, 2, &gate, PAIO_NORMAL);
    reqs_set_lane(r, 2, 1);
    reqs_hand_over(r, 2);
    pool_wait_all(&tp);
    reqs_check(r, 2);
    g_free(r);
    pool_destroy(&tp);
    gate_destroy(&gate);
}

/* However wide the lane gets, requests of the slow class leave a worker. */
static void test_lane_slow_class(void)
{
    const int n = 8;
    TestPool tp;
    TestReq *slow, *r;
    Gate gate;

    gate_init(&gate);
    pool_init(&tp, 0, 3);
    slow = reqs_new_gated(&tp, n, &gate, PAIO_SLOW);
    reqs_set_lane(slow, n, 2);
    r = reqs_new(&tp, n);
    reqs_set_lane(r, n, 2);
    reqs_submit(slow, n);
    WAIT_STATE(tp.ctx, gate_inside(&gate) == 2);
    reqs_submit(r, n);
    WAIT_LOOP(tp.ctx, tp.completed == n);
    reqs_check(r, n);
    pool_turn_for_ms(&tp, 5);
    g_assert_cmpint(gate_inside(&gate), ==, 2);

    gate_open(&gate);
    pool_wait_all(&tp);
    reqs_check(slow, n);
    g_assert_cmpint(gate_peak(&gate), ==, 2);
    g_free(slow);
    g_free(r);
    pool_destroy(&tp);
    gate_destroy(&gate);
}

static void test_lane_cancel_incoming(void)
{
    TestPool tp;
    TestReq *r;

    pool_init_idle(&tp, 2);
    r = reqs_new(&tp, 5);
    reqs_set_lane(r, 5, 4);
    for (int mask = 0; mask < 32; mask++) {
        defer_call_begin();
        reqs_submit(r, 5);
        for (int i = 0; i < 5; i++) {
            if (mask & 1 << i) {
                g_assert_cmpint(r[i].req.state, ==, PAIO_INCOMING);
                g_assert(req_cancel(&r[i]));
            }
        }
        defer_call_end();
        WAIT_BLIND(reqs_called(r, 5) == 5 - ctpop8(mask));
        pool_wait_all(&tp);
        for (int i = 0; i < 5; i++) {
            if (mask & 1 << i) {
                req_check_cancelled(&r[i]);
            } else {
                req_check_in_worker(&r[i]);
            }
        }
    }
    g_free(r);
    pool_destroy(&tp);
}

/* @victim of four is taken back while the first one runs in a gate. */
static void do_test_lane_cancel_waiting(int victim)
{
    TestPool tp;
    TestReq *r;
    Gate gate;

    gate_init(&gate);
    pool_init_idle(&tp, 2);
    r = reqs_new_gated(&tp, 4, &gate, PAIO_NORMAL);
    reqs_set_lane(r, 4, 1);
    reqs_hand_over(r, 4);
    WAIT_BLIND(gate_inside(&gate) == 1);
    g_assert(!req_cancel(&r[0]));
    g_assert_cmpint(r[victim].req.state, ==, PAIO_WAITING);
    g_assert_cmpint(pool_info(&tp).queued, ==, 3);
    g_assert(req_cancel(&r[victim]));
    g_assert(!req_cancel(&r[victim]));
    g_assert_cmpint(pool_info(&tp).queued, ==, 2);

    /* Completes although the lane doesn't move */
    WAIT_LOOP(tp.ctx, r[victim].completions);
    req_check_cancelled(&r[victim]);
    g_assert_cmpint(r[0].completions, ==, 0);

    gate_open(&gate);
    WAIT_BLIND(reqs_called(r, 4) == 3);
    pool_wait_all(&tp);
    for (int i = 0; i < 4; i++) {
        if (i != victim) {
            req_check_in_worker(&r[i]);
        }
    }
    g_free(r);
    pool_destroy(&tp);
    gate_destroy(&gate);
}

static void test_lane_cancel_waiting(void)
{
    for (int victim = 1; victim < 4; victim++) {
        do_test_lane_cancel_waiting(victim);
    }
}

/* The first one has left its lane for the queue, but no worker is free. */
static void test_lane_cancel_queued(void)
{
    TestPool tp;
    TestReq *blocker, *r;
    Gate gate;

    gate_init(&gate);
    pool_init_idle(&tp, 1);
    blocker = reqs_new_gated(&tp, 1, &gate, PAIO_NORMAL);
    reqs_hand_over(blocker, 1);
    WAIT_BLIND(gate_inside(&gate) == 1);

    r = reqs_new(&tp, 5);
    reqs_set_lane(r, 5, 1);
    reqs_hand_over(r, 5);
    for (int i = 0; i < 3; i++) {
        g_assert_cmpint(r[i].req.state, ==, PAIO_QUEUED);
        g_assert_cmpint(r[i + 1].req.state, ==, PAIO_WAITING);
        g_assert(req_cancel(&r[i]));
        g_assert(!req_cancel(&r[i]));
        /* Takes its place, and is alone there */
        g_assert_cmpint(r[i + 1].req.state, ==, PAIO_QUEUED);
        g_assert_cmpint(r[4].req.state, ==, PAIO_WAITING);
    }
    g_assert_cmpint(pool_info(&tp).queued, ==, 2);
    gate_open(&gate);
    WAIT_BLIND(reqs_called(r, 5) == 2);

    pool_wait_all(&tp);
    req_check_in_worker(blocker);
    for (int i = 0; i < 3; i++) {
        req_check_cancelled(&r[i]);
    }
    req_check_in_worker(&r[3]);
    req_check_in_worker(&r[4]);
    g_free(blocker);
    g_free(r);
    pool_destroy(&tp);
    gate_destroy(&gate);
}

/*
 * The one that was taken back had to wait because of its class, the next one
 * of the lane needn't: somebody has to wake the idle worker.
 */
static void test_lane_cancel_class(void)
{
    TestPool tp;
    TestReq *storm, *r;
    Gate gate;

    gate_init(&gate);
    pool_init_idle(&tp, 2);
    storm = reqs_new_gated(&tp, 1, &gate, PAIO_SLOW);
    reqs_hand_over(storm, 1);
    WAIT_BLIND(gate_inside(&gate) == 1);

    r = reqs_new(&tp, 2);
    reqs_set_lane(r, 2, 1);
    r[0].req.class = PAIO_SLOW;
    reqs_hand_over(r, 2);
    g_assert_cmpint(r[0].req.state, ==, PAIO_QUEUED);
    g_assert_cmpint(r[1].req.state, ==, PAIO_WAITING);
    g_assert(req_cancel(&r[0]));
    WAIT_LOOP(tp.ctx, r[0].completions && r[1].completions);
    req_check_cancelled(&r[0]);
    req_check_in_worker(&r[1]);

    gate_open(&gate);
    pool_wait_all(&tp);
    req_check_in_worker(storm);
    g_free(storm);
    g_free(r);
    pool_destroy(&tp);
    gate_destroy(&gate);
}

/* After whatever was taken back, a lane has room for one, and only for one. */
static void test_lane_cancel_all(void)
{
    const int n = 6;
    TestPool tp;
    TestReq *r;
    Gate gate;

    gate_init(&gate);
    pool_init_idle(&tp, 3);
    r = reqs_new_gated(&tp, n, &gate, PAIO_NORMAL);
    reqs_set_lane(r, n, 1);
    clock_stop();
    for (int round = 0; round < 50; round++) {
        int entered = gate_entered(&gate);
        int cancelled = 0;

        gate.open = false;
        reqs_hand_over(r, n);
        /* In any order, while a worker tries to take the first one */
        for (int i = 0; i < n; i++) {
            int victim = (i * (round % 2 ? 1 : 5) + round) % n;

            cancelled += req_cancel(&r[victim]);
        }
        g_assert_cmpint(cancelled, >=, n - 1);
        gate_open(&gate);
        WAIT_BLIND(gate_entered(&gate) == entered + n - cancelled);
        pool_wait_all(&tp);
        WAIT_BLIND(pool_info(&tp).idle == 3);

        entered = gate_entered(&gate);
        gate.open = false;
        reqs_hand_over(r, n);
        WAIT_BLIND(gate_inside(&gate) == 1);
        g_assert_cmpint(pool_info(&tp).queued, ==, n - 1);
        gate_open(&gate);
        WAIT_BLIND(gate_entered(&gate) == entered + n);
        pool_wait_all(&tp);
        reqs_check(r, n);
    }
    clock_go();
    g_assert_cmpint(gate_peak(&gate), ==, 1);
    g_free(r);
    pool_destroy(&tp);
    gate_destroy(&gate);
}

static void lane_other_context_run(void *opaque)
{
    const int n = 20;
    TestPool tp;
    TestReq *r;

    pool_init_idle(&tp, 1);
    r = reqs_new(&tp, n);
    reqs_set_lane(r, n, 7);
    reqs_hand_over(r, n);
    WAIT_BLIND(reqs_called(r, n) == n);
    pool_wait_all(&tp);
    for (int i = 0; i < n; i++) {
        req_check_in_worker(&r[i]);
        g_assert_cmpuint(r[i].order, ==, 1 + i + 1);
    }
    g_free(r);
    pool_destroy(&tp);
}

/* The same number in another context is another lane. */
static void test_lane_two_contexts(void)
{
    IOThread *iothread = iothread_new();
    TestPool tp;
    TestReq *r;
    Gate gate;

    gate_init(&gate);
    pool_init_idle(&tp, 2);
    r = reqs_new_gated(&tp, 3, &gate, PAIO_NORMAL);
    reqs_set_lane(r, 3, 7);
    reqs_hand_over(r, 3);
    WAIT_BLIND(gate_inside(&gate) == 1);
    ctx_call(iothread_get_aio_context(iothread), lane_other_context_run, NULL);
    g_assert_cmpint(gate_entered(&gate), ==, 1);
    g_assert_cmpint(pool_info(&tp).queued, ==, 2);
    gate_open(&gate);
    pool_wait_all(&tp);
    reqs_check(r, 3);
    g_free(r);
    pool_destroy(&tp);
    gate_destroy(&gate);
    iothread_join(iothread);
}

#ifdef CONFIG_LINUX
static void foreign_lanes(TestPool *tp)
{
    const int n = 100;
    TestReq *r = reqs_new(tp, n);

    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < n; i++) {
            r[i].req.lane = i % (round + 2);
        }
        reqs_submit(r, n);
        pool_wait_all(tp);
        for (int i = 0; i < n; i++) {
            req_check_in_worker(&r[i]);
        }
    }
    g_free(r);
    WAIT_STATE(tp->ctx, !pool_info(tp).threads);
}
#endif

/* Workers that leave with the lane's next request in the queue */
static void test_lane_foreign(void)
{
#ifdef CONFIG_LINUX
    ForeignTest t;

    pool_init(&t.tp, 0, 4);
    foreign_run(&t, foreign_lanes);
    pool_destroy(&t.tp);
#else
    g_test_skip("needs thread ids");
#endif
}

/* No worker can be created: lanes go on in the event loop. */
static void test_lane_home(void)
{
    const int n = 100;
    unsigned order[4] = { };
    TestPool tp;
    TestReq *r;

    create_fail_after(0);
    pool_init(&tp, 0, 4);
    r = reqs_new(&tp, n);
    for (int i = 0; i < n; i++) {
        r[i].req.lane = i % 4;
        r[i].req.class = g_test_rand_bit() ? PAIO_SLOW : PAIO_NORMAL;
    }
    reqs_hand_over(r, n);
    /* The first one of lane 1 is in the queue, the second one waits. */
    g_assert(req_cancel(&r[1]));
    g_assert(req_cancel(&r[9]));
    pool_wait_all(&tp);
    for (int i = 0; i < n; i++) {
        if (i == 1 || i == 9) {
            req_check_cancelled(&r[i]);
            continue;
        }
        req_check_at_home(&r[i]);
        g_assert_cmpuint(r[i].order, >, order[i % 4]);
        order[i % 4] = r[i].order;
    }
    g_assert_cmpint(pool_info(&tp).run_at_home, ==, n - 2);

    /* As soon as there can be a worker, it serves the lane. */
    create_reset();
    reqs_hand_over(r, n);
    pool_wait_all(&tp);
    for (int i = 0; i < n; i++) {
        req_check_in_worker(&r[i]);
    }
    g_assert_cmpint(pool_info(&tp).run_at_home, ==, n - 2);
    g_free(r);
    pool_destroy(&tp);
}

/* The last one is complete, while its worker looks after the lane. */
static void test_lane_teardown(void)
{
    for (int round = 0; round < 200; round++) {
        int n = g_test_rand_int_range(1, 12);
        TestPool tp;
        TestReq *r;

        pool_init(&tp, g_test_rand_int_range(0, 3), 4);
        r = reqs_new(&tp, n);
        for (int i = 0; i < n; i++) {
            int us = g_test_rand_bit() ? g_test_rand_int_range(0, 300) : 0;

            r[i].func = sleep_func;
            r[i].data = GINT_TO_POINTER(us);
            r[i].req.lane = g_test_rand_int_range(0, 3);
            r[i].req.class = g_test_rand_bit() ? PAIO_SLOW : PAIO_NORMAL;
        }
        reqs_submit(r, n);
        while (g_test_rand_bit()) {
            req_cancel(&r[g_test_rand_int_range(0, n)]);
        }
        pool_wait_all(&tp);
        if (g_test_rand_bit()) {
            pool_set(&tp, 0, 1);
        }
        pool_destroy(&tp);
        g_free(r);
    }
}

/*
 * Wake-ups
 */

/*
 * Hand over @n requests to @idle workers, each of which is held by the first
 * one that it gets.
 */
static void do_test_wake(int idle, int n)
{
    int busy = MIN(idle, n);
    TestPool tp;
    TestReq *r;
    Gate gate;
    uint64_t wake_ups;

    gate_init(&gate);
    pool_init_idle(&tp, idle);
    r = reqs_new_gated(&tp, n, &gate, PAIO_NORMAL);
    wake_ups = pool_info(&tp).wake_ups;
    reqs_hand_over(r, n);
    g_assert_cmpuint(pool_info(&tp).wake_ups - wake_ups, ==, busy);
    WAIT_BLIND(gate_inside(&gate) == busy);
    pool_turn_for_ms(&tp, 3);
    g_assert_cmpuint(pool_info(&tp).wake_ups - wake_ups, ==, busy);
    g_assert_cmpint(pool_info(&tp).idle, ==, idle - busy);
    g_assert_cmpint(gate_inside(&gate), ==, busy);
    gate_open(&gate);
    pool_wait_all(&tp);
    reqs_check(r, n);
    g_free(r);
    pool_destroy(&tp);
    gate_destroy(&gate);
}

/* As many idle workers are woken as there is work for. */
static void test_wake_as_needed(void)
{
    do_test_wake(8, 1);
    do_test_wake(8, 3);
    do_test_wake(8, 8);
    do_test_wake(8, 40);
}

/* Also if they are so many that they are not signalled all at a time */
static void test_wake_batches(void)
{
    do_test_wake(16, 16);
    do_test_wake(17, 17);
    do_test_wake(24, 24);
    do_test_wake(40, 20);
    do_test_wake(40, 40);
    do_test_wake(40, 100);
}

/*
 * Spinning
 *
 * When the clock is stopped, a worker that spins does so until a request comes
 * or the clock is turned.
 */

#define POLL_NS (200 * SCALE_US)
#define NR_SPINNERS 16

/* More rounds than any mean value needs to adapt */
#define SPIN_ROUNDS 500
/* More than are made in a row only to find out whether it would pay */
#define SPIN_STREAK 32

static void poll_set(AioContext *ctx, int64_t max_ns)
{
    aio_context_set_poll_params(ctx, max_ns, 0, 0, &error_abort);
}

static bool spin_possible(void)
{
    if (g_get_num_processors() < 2) {
        g_test_skip("needs two CPUs");
        return false;
    }
    return true;
}

/*
 * Run a request, with nothing to do for @pause_ns before.  In the end all @n
 * workers are idle, or one of them spins.  Returns: whether one does
 */
static bool spin_round(TestPool *tp, int n, int64_t pause_ns)
{
    uint64_t spins = pool_info(tp).spins;
    TestReq *r;
    Gate gate;

    gate_init(&gate);
    r = reqs_new_gated(tp, 1, &gate, PAIO_NORMAL);
    if (pause_ns) {
        clock_turn(pause_ns);
        WAIT_BLIND(pool_info(tp).idle == n);
    }
    clock_followed = true;
    reqs_hand_over(r, 1);
    clock_followed = false;
    /* Only now, so that the worker can't be ahead of the hand-over */
    gate_open(&gate);
    WAIT_LOOP(tp->ctx, r->completions);
    req_check_in_worker(r);
    WAIT_STATE(tp->ctx,
               pool_info(tp).idle + (pool_info(tp).spins > spins) == n);
    g_free(r);
    gate_destroy(&gate);
    spins = pool_info(tp).spins - spins;
    g_assert_cmpuint(spins, <=, 1);
    return spins;
}

/* Requests follow each other closely until it pays to wait for the next. */
static void spin_begin(TestPool *tp, int n)
{
    int rounds = 0, streak = 0;

    while (streak < SPIN_STREAK) {
        streak = spin_round(tp, n, 0) ? streak + 1 : 0;
        g_assert_cmpint(++rounds, <, SPIN_ROUNDS);
    }
}

/* A pool of @n idle workers that may spin.  Returns: false if that can't be */
static bool spin_set_up(TestPool *tp, int n)
{
    if (!spin_possible()) {
        return false;
    }
    poll_set(qemu_get_current_aio_context(), POLL_NS);
    pool_init_idle(tp, n);
    clock_stop();
    return true;
}

static void spin_end(TestPool *tp)
{
    clock_go();
    pool_destroy(tp);
    poll_set(tp->ctx, 0);
}

/* Who doesn't let the event loop poll doesn't want workers to do so. */
static void test_spin_none_by_default(void)
{
    TestPool tp;
    TestReq *r;

    pool_init_idle(&tp, 2);
    r = reqs_new(&tp, 2);
    chain_left = 3000;
    for (int i = 0; i < 2; i++) {
        r[i].done = chain_done;
    }
    reqs_submit(r, 2);
    pool_wait_all(&tp);
    WAIT_STATE(tp.ctx, pool_info(&tp).idle == 2);
    clock_stop();
    for (int i = 0; i < SPIN_ROUNDS; i++) {
        g_assert(!spin_round(&tp, 2, 0));
    }
    g_assert_cmpuint(pool_info(&tp).spins, ==, 0);
    g_free(r);
    spin_end(&tp);
}

/* If a worker spins, nobody is woken for a request. */
static void test_spin_pays(void)
{
    TestPool tp;
    uint64_t spins, wake_ups;

    if (!spin_set_up(&tp, 2)) {
        return;
    }
    spin_begin(&tp, 2);
    spins = pool_info(&tp).spins;
    wake_ups = pool_info(&tp).wake_ups;
    for (int i = 0; i < SPIN_ROUNDS; i++) {
        g_assert(spin_round(&tp, 2, 0));
    }
    g_assert_cmpuint(pool_info(&tp).spins, ==, spins + SPIN_ROUNDS);
    g_assert_cmpuint(pool_info(&tp).wake_ups, ==, wake_ups);
    spin_end(&tp);
}

static void test_spin_stops(void)
{
    TestPool tp;
    PAIOPoolInfo before;

    if (!spin_set_up(&tp, 2)) {
        return;
    }
    for (int round = 0; round < 2; round++) {
        spin_begin(&tp, 2);

        /* One long pause doesn't make up for many short ones. */
        for (int i = 0; i < SPIN_ROUNDS; i++) {
            g_assert(spin_round(&tp, 2, 0));
        }
        g_assert(spin_round(&tp, 2, NANOSECONDS_PER_SECOND));

        for (int i = 0; i < SPIN_STREAK; i++) {
            spin_round(&tp, 2, NANOSECONDS_PER_SECOND);
        }
        before = pool_info(&tp);
        for (int i = 0; i < SPIN_ROUNDS; i++) {
            spin_round(&tp, 2, NANOSECONDS_PER_SECOND);
        }
        /* It may be tried again now and then. */
        g_assert_cmpuint(pool_info(&tp).spins, <,
                         before.spins + SPIN_ROUNDS / 8);
        g_assert_cmpuint(pool_info(&tp).wake_ups, ==,
                         before.wake_ups + SPIN_ROUNDS);
    }

    /* Polling is turned off at run time. */
    spin_begin(&tp, 2);
    poll_set(tp.ctx, 0);
    for (int i = 0; i < 10; i++) {
        g_assert(!spin_round(&tp, 2, 0));
    }
    spin_end(&tp);
}

/*
 * One of three workers spins and gets the first of two requests, another one
 * is woken for the second; when both are done, again only one of them spins.
 */
static void test_spin_one(void)
{
    TestPool tp;
    PAIOPoolInfo before;

    if (!spin_set_up(&tp, 3)) {
        return;
    }
    spin_begin(&tp, 3);
    before = pool_info(&tp);
    for (int i = 1; i <= 50; i++) {
        TestReq *r;
        Gate gate;

        gate_init(&gate);
        r = reqs_new_gated(&tp, 2, &gate, PAIO_NORMAL);
        g_assert_cmpint(pool_info(&tp).idle, ==, 2);
        clock_followed = true;
        reqs_hand_over(r, 2);
        clock_followed = false;
        WAIT_BLIND(gate_inside(&gate) == 2);
        g_assert_cmpuint(pool_info(&tp).wake_ups, ==, before.wake_ups + i);
        gate_open(&gate);
        pool_wait_all(&tp);
        WAIT_STATE(tp.ctx, pool_info(&tp).spins == before.spins + i);
        WAIT_STATE(tp.ctx, pool_info(&tp).idle == 2);
        reqs_check(r, 2);
        g_free(r);
        gate_destroy(&gate);
    }
    g_assert_cmpuint(pool_info(&tp).spins, ==, before.spins + 50);
    spin_end(&tp);
}

/* Half of the CPUs may be used to spin, whatever the number of pools. */
static void test_spin_all_pools(void)
{
    int limit = g_get_num_processors() / 2;
    TestPool tp[NR_SPINNERS + 1];

    if (!spin_possible()) {
        return;
    }
    if (limit > NR_SPINNERS) {
        g_test_skip("too many CPUs");
        return;
    }
    poll_set(qemu_get_current_aio_context(), POLL_NS);
    for (int i = 0; i <= limit; i++) {
        pool_init_idle(&tp[i], 1);
    }
    clock_stop();
    for (int i = 0; i < limit; i++) {
        spin_begin(&tp[i], 1);
    }
    for (int i = 0; i < SPIN_ROUNDS; i++) {
        g_assert(!spin_round(&tp[limit], 1, 0));
    }
    for (int i = 0; i < limit; i++) {
        g_assert_cmpint(pool_info(&tp[i]).idle, ==, 0);
    }
    /* All of them give up, which makes room for another. */
    clock_turn(NANOSECONDS_PER_SECOND);
    for (int i = 0; i < limit; i++) {
        WAIT_BLIND(pool_info(&tp[i]).idle == 1);
    }
    spin_begin(&tp[limit], 1);
    clock_go();
    for (int i = 0; i < limit; i++) {
        pool_destroy(&tp[i]);
    }
    spin_end(&tp[limit]);
}

/*
 * Lingering: the event loop turns when what was just handed over will be done
 * soon, and a worker is there that need not wake up.
 */

static int linger_slow_func(TestReq *r)
{
    clock_turn(NANOSECONDS_PER_SECOND);
    return r->value;
}

static void linger_slow_round(TestPool *tp)
{
    uint64_t spins = pool_info(tp).spins;
    TestReq *r = reqs_new(tp, 1);

    r->func = linger_slow_func;
    clock_followed = true;
    reqs_hand_over(r, 1);
    clock_followed = false;
    WAIT_LOOP(tp->ctx, r->completions);
    WAIT_STATE(tp->ctx,
               pool_info(tp).idle + (pool_info(tp).spins > spins) == 1);
    g_free(r);
}

static void test_linger_when(void)
{
    TestPool tp;
    uint64_t before;

    if (!spin_set_up(&tp, 1)) {
        return;
    }
    g_assert_cmpuint(pool_info(&tp).lingers, ==, 0);
    spin_begin(&tp, 1);
    for (int i = 0; i < SPIN_ROUNDS; i++) {
        g_assert(spin_round(&tp, 1, 0));
    }
    before = pool_info(&tp).lingers;
    for (int i = 0; i < SPIN_ROUNDS; i++) {
        g_assert(spin_round(&tp, 1, 0));
    }
    g_assert_cmpuint(pool_info(&tp).lingers, ==, before + SPIN_ROUNDS);

    /* Not for a worker that sleeps */
    spin_round(&tp, 1, NANOSECONDS_PER_SECOND);
    g_assert_cmpuint(pool_info(&tp).lingers, ==, before + SPIN_ROUNDS);

    /* Not when requests take long */
    spin_begin(&tp, 1);
    for (int i = 0; i < SPIN_STREAK; i++) {
        linger_slow_round(&tp);
    }
    before = pool_info(&tp).lingers;
    for (int i = 0; i < SPIN_STREAK; i++) {
        linger_slow_round(&tp);
    }
    g_assert_cmpuint(pool_info(&tp).lingers, ==, before);

    /* Not when the event loop is not to poll */
    spin_begin(&tp, 1);
    for (int i = 0; i < SPIN_ROUNDS; i++) {
        spin_round(&tp, 1, 0);
    }
    poll_set(tp.ctx, 0);
    before = pool_info(&tp).lingers;
    for (int i = 0; i < 10; i++) {
        spin_round(&tp, 1, 0);
    }
    g_assert_cmpuint(pool_info(&tp).lingers, ==, before);
    spin_end(&tp);
}

/* It ends after a while: then the loop may sleep. */
static void test_linger_ends(void)
{
    TestPool tp;
    uint64_t before;
    TestReq *r;
    Gate gate;

    if (!spin_set_up(&tp, 1)) {
        return;
    }
    spin_begin(&tp, 1);
    for (int i = 0; i < SPIN_ROUNDS; i++) {
        g_assert(spin_round(&tp, 1, 0));
    }
    before = pool_info(&tp).lingers;
    gate_init(&gate);
    r = reqs_new_gated(&tp, 1, &gate, PAIO_NORMAL);
    clock_followed = true;
    reqs_hand_over(r, 1);
    g_assert_cmpuint(pool_info(&tp).lingers, ==, before + 1);
    for (int i = 0; i < 100; i++) {
        g_assert(aio_poll(tp.ctx, false));
    }
    clock_turn(POLL_NS);
    while (aio_poll(tp.ctx, false)) {
        /* The watchdog ends one that does not come to its end. */
    }
    clock_followed = false;
    gate_open(&gate);
    WAIT_LOOP(tp.ctx, r->completions);
    g_free(r);
    gate_destroy(&gate);
    spin_end(&tp);
}

/* With the clock that everybody has: only that no request is lost */
static void test_spin_chain(void)
{
    TestPool tp;
    TestReq r;

    if (!spin_possible()) {
        return;
    }
    poll_set(qemu_get_current_aio_context(), POLL_NS);
    pool_init(&tp, 0, 4);
    for (int lane = 0; lane < 2; lane++) {
        req_init(&r, &tp);
        r.req.lane = lane;
        r.done = chain_done;
        chain_left = 10000;
        req_submit(&r);
        pool_wait_all(&tp);
        g_assert_cmpuint(tp.completed, ==, (lane + 1) * 10001);
    }
    g_assert_cmpuint(pool_info(&tp).spins, <=, tp.completed + 4);
    g_assert_cmpuint(pool_info(&tp).wake_ups, <=, tp.completed);
    g_test_message("%u requests, %" PRIu64 " spins, %" PRIu64 " wake-ups",
                   tp.completed, pool_info(&tp).spins, pool_info(&tp).wake_ups);
    spin_end(&tp);
}

/* There are to be fewer workers: the one that spins doesn't go to sleep. */
static void test_spin_surplus(void)
{
    TestPool tp;
    TestReq *r;
    Gate gate;

    if (!spin_set_up(&tp, 2)) {
        return;
    }
    gate_init(&gate);
    spin_begin(&tp, 2);
    /* The one that spins takes this, the other one spins after the next. */
    r = reqs_new_gated(&tp, 1, &gate, PAIO_NORMAL);
    clock_followed = true;
    reqs_hand_over(r, 1);
    clock_followed = false;
    WAIT_BLIND(gate_inside(&gate) == 1);
    while (!spin_round(&tp, 1, 0)) {
        /* again */
    }
    g_assert_cmpint(pool_info(&tp).idle, ==, 0);
    pool_set(&tp, 1, 1);
    clock_turn(NANOSECONDS_PER_SECOND);
    WAIT_STATE(tp.ctx, pool_info(&tp).threads == 1 || pool_info(&tp).idle);
    g_assert_cmpint(pool_info(&tp).idle, ==, 0);
    g_assert_cmpint(gate_inside(&gate), ==, 1);
    gate_open(&gate);
    pool_wait_all(&tp);
    req_check_in_worker(r);
    g_free(r);
    gate_destroy(&gate);
    spin_end(&tp);
}

static void *clock_go_later(void *opaque)
{
    g_usleep(3000);
    clock_go();
    return NULL;
}

/* Freed while a worker spins, which has to end when it has done so. */
static void test_spin_free(void)
{
    if (!spin_possible()) {
        return;
    }
    poll_set(qemu_get_current_aio_context(), POLL_NS);
    for (int n = 1; n <= 3; n++) {
        TestPool tp;
        QemuThread thread;

        pool_init_idle(&tp, n);
        clock_stop();
        spin_begin(&tp, n);
        qemu_thread_create(&thread, "clock", clock_go_later, NULL,
                           QEMU_THREAD_JOINABLE);
        pool_destroy(&tp);
        qemu_thread_join(&thread);
    }
    poll_set(qemu_get_current_aio_context(), 0);
}

/* The same wherever the worker happens to be */
static void test_spin_free_random(void)
{
    if (!spin_possible()) {
        return;
    }
    poll_set(qemu_get_current_aio_context(), POLL_NS);
    for (int round = 0; round < 100; round++) {
        int n = g_test_rand_int_range(1, 3);
        TestPool tp;
        TestReq *r;

        pool_init(&tp, n, n);
        r = reqs_new(&tp, 2);
        chain_left = g_test_rand_int_range(0, 60);
        for (int i = 0; i < n; i++) {
            r[i].done = chain_done;
            r[i].req.lane = g_test_rand_int_range(0, 2);
        }
        reqs_submit(r, n);
        pool_wait_all(&tp);
        if (g_test_rand_bit()) {
            g_usleep(g_test_rand_int_range(0, 100));
        }
        pool_destroy(&tp);
        g_free(r);
    }
    poll_set(qemu_get_current_aio_context(), 0);
}

/*
 * Coroutines
 */

typedef struct CoTest {
    TestPool tp;
    int running;
    int submitted;
    int served;     /* by workers, atomic */
} CoTest;

typedef struct CoArg {
    CoTest *t;
    int value;
} CoArg;

static int co_func(void *opaque)
{
    CoArg *arg = opaque;

    qatomic_inc(&arg->t->served);
    if (arg->value % 10 == 0) {
        g_usleep(20);
    }
    return arg->value;
}

static void coroutine_fn co_entry(void *opaque)
{
    CoTest *t = opaque;

    for (int i = 0; i < 50; i++) {
        CoArg arg = { .t = t, .value = i % 3 ? i : -i };
        PAIOClass class = i % 4 ? PAIO_NORMAL : PAIO_SLOW;
        int ret;

        t->submitted++;
        ret = paio_co_submit(t->tp.pool, class, co_func, &arg);
        g_assert_cmpint(ret, ==, arg.value);
        g_assert(qemu_in_coroutine());
        g_assert(qemu_get_current_aio_context() == t->tp.ctx);
        g_assert(pthread_equal(pthread_self(), t->tp.home));
    }
    t->running--;
}

static void test_coroutine(void)
{
    CoTest t = { };

    pool_init(&t.tp, 0, 4);
    for (int i = 0; i < 20; i++) {
        t.running++;
        qemu_coroutine_enter(qemu_coroutine_create(co_entry, &t));
    }
    WAIT_LOOP(t.tp.ctx, !t.running);
    g_assert_cmpint(t.submitted, ==, 20 * 50);
    g_assert_cmpint(qatomic_read(&t.served), ==, t.submitted);
    pool_destroy(&t.tp);
}

/*
 * Stress
 */

#define STRESS_SLOTS 32
#define STRESS_CONTEXTS 4

typedef struct Stress Stress;

typedef struct StressSlot {
    TestReq r;
    Stress *s;
    bool busy;
    bool cancelled;
} StressSlot;

/* Used by the home thread only */
struct Stress {
    IOThread *iothread;
    AioContext *ctx;
    TestPool tp;
    GRand *rand;
    StressSlot slots[STRESS_SLOTS];
    bool polling;
    bool stop;
    int nested;
    unsigned cancels;
    unsigned runs;
    unsigned nests;
};

static bool stress_dice(Stress *s, int sides)
{
    return g_rand_int_range(s->rand, 0, sides) == 0;
}

/* Half of the requests in one of a few lanes */
static unsigned stress_lane(Stress *s)
{
    return stress_dice(s, 2) ? 0 : g_rand_int_range(s->rand, 1, 4);
}

static void stress_done(TestReq *r);

static void stress_submit(Stress *s, StressSlot *slot)
{
    int us = stress_dice(s, 2) ? 0 : g_rand_int_range(s->rand, 0, 200);

    g_assert(!slot->busy);
    slot->busy = true;
    slot->cancelled = false;
    req_init(&slot->r, &s->tp);
    slot->r.value = g_rand_int_range(s->rand, 0, INT_MAX);
    slot->r.func = sleep_func;
    slot->r.data = GINT_TO_POINTER(us);
    slot->r.done = stress_done;
    slot->r.req.class = stress_dice(s, 4) ? PAIO_SLOW : PAIO_NORMAL;
    slot->r.req.lane = stress_lane(s);
    req_submit(&slot->r);
}

static void stress_cancel(Stress *s)
{
    StressSlot *slot = &s->slots[g_rand_int_range(s->rand, 0, STRESS_SLOTS)];

    if (slot->busy && !slot->cancelled) {
        slot->cancelled = req_cancel(&slot->r);
    }
}

static void stress_nest(Stress *s)
{
    bool section = stress_dice(s, 2);
    TestReq r;

    s->nested++;
    s->nests++;
    req_init(&r, &s->tp);
    r.value = s->nests;
    r.req.lane = stress_lane(s);
    if (section) {
        defer_call_begin();
    }
    req_submit(&r);
    WAIT_LOOP(s->ctx, r.completions);
    if (section) {
        defer_call_end();
    }
    req_check(&r);
    s->runs++;
    s->nested--;
}

static void stress_done(TestReq *r)
{
    StressSlot *slot = container_of(r, StressSlot, r);
    Stress *s = slot->s;

    g_assert(slot->busy);
    slot->busy = false;
    if (slot->cancelled) {
        req_check_cancelled(r);
        s->cancels++;
    } else {
        req_check(r);
        s->runs++;
    }

    if (stress_dice(s, 8)) {
        stress_cancel(s);
    }
    if (s->nested < 3 && stress_dice(s, 32)) {
        stress_nest(s);
    }
    if (s->nested < 3 && stress_dice(s, 32)) {
        s->nested++;
        aio_poll(s->ctx, false);
        s->nested--;
    }

    /* Let the number in flight go up and down, but not to 0. */
    if (!s->stop && !slot->busy &&
        (!s->tp.in_flight || !stress_dice(s, 6))) {
        stress_submit(s, slot);
    }
    if (!s->stop && stress_dice(s, 6)) {
        StressSlot *other =
            &s->slots[g_rand_int_range(s->rand, 0, STRESS_SLOTS)];

        if (!other->busy) {
            stress_submit(s, other);
        }
    }
}

static void stress_begin(void *opaque)
{
    Stress *s = opaque;

    if (s->polling) {
        poll_set(s->ctx, POLL_NS);
    }
    pool_init(&s->tp, 0, 8);
    for (int i = 0; i < STRESS_SLOTS; i++) {
        s->slots[i].s = s;
        stress_submit(s, &s->slots[i]);
    }
}

static void stress_stop(void *opaque)
{
    Stress *s = opaque;

    s->stop = true;
    pool_wait_all(&s->tp);
}

static void stress_finish(void *opaque)
{
    Stress *s = opaque;

    g_assert_cmpint(s->nested, ==, 0);
    g_assert_cmpuint(s->tp.submitted, ==, s->tp.completed);
    g_assert_cmpuint(s->tp.completed, ==, s->cancels + s->runs);
    pool_destroy(&s->tp);
    poll_set(s->ctx, 0);
}

typedef struct StressParams {
    QEMUTimer timer;
    Stress *s;
    unsigned changes;
} StressParams;

/* The limits of any of the pools change, always from the main thread. */
static void stress_params_cb(void *opaque)
{
    StressParams *p = opaque;
    int min = g_test_rand_bit() ? 0 : g_test_rand_int_range(0, 5);
    int max = g_test_rand_int_range(MAX(min, 1), 9);

    pool_set(&p->s[g_test_rand_int_range(0, STRESS_CONTEXTS)].tp, min, max);
    p->changes++;
    timer_mod(&p->timer, qemu_clock_get_ns(QEMU_CLOCK_REALTIME) +
              g_test_rand_int_range(100, 3000) * SCALE_US);
}

static void do_test_stress(int ms, bool chaos)
{
    Stress *s = g_new0(Stress, STRESS_CONTEXTS);
    StressParams params = { .s = s };
    int64_t end;

    for (int i = 0; i < STRESS_CONTEXTS; i++) {
        s[i].rand = g_rand_new_with_seed(g_test_rand_int());
        s[i].ctx = main_ctx;
        if (i) {
            s[i].iothread = iothread_new();
            s[i].ctx = iothread_get_aio_context(s[i].iothread);
        }
        s[i].polling = i & 1;
    }
    for (int i = 0; i < STRESS_CONTEXTS; i++) {
        ctx_call(s[i].ctx, stress_begin, &s[i]);
    }
    if (chaos) {
        /* Only now, as the IOThreads have to exist */
        qatomic_set(&create.chaos, g_test_rand_int() | 1);
    }
    aio_timer_init(main_ctx, &params.timer, QEMU_CLOCK_REALTIME, SCALE_NS,
                   stress_params_cb, &params);
    timer_mod(&params.timer, 0);

    end = g_get_monotonic_time() + ms * 1000;
    watchdog_note("end of the stress in the main loop", __LINE__);
    while (g_get_monotonic_time() < end) {
        aio_poll(main_ctx, true);
    }
    timer_del(&params.timer);

    for (int i = 0; i < STRESS_CONTEXTS; i++) {
        ctx_call(s[i].ctx, stress_stop, &s[i]);
        g_test_message("%u submitted, %u completed, %u cancelled, %u nested, "
                       "%" PRIu64 " run at home, %d threads at most, "
                       "%" PRIu64 " wake-ups, %" PRIu64 " spins",
                       s[i].tp.submitted, s[i].tp.completed, s[i].cancels,
                       s[i].nests, pool_info(&s[i].tp).run_at_home,
                       pool_info(&s[i].tp).threads_peak,
                       pool_info(&s[i].tp).wake_ups,
                       pool_info(&s[i].tp).spins);
    }
    g_test_message("limits changed %u times", params.changes);
    for (int i = 0; i < STRESS_CONTEXTS; i++) {
        ctx_call(s[i].ctx, stress_finish, &s[i]);
        if (s[i].iothread) {
            iothread_join(s[i].iothread);
        }
        g_rand_free(s[i].rand);
    }
    g_free(s);
}

static void test_stress(void)
{
    do_test_stress(g_test_slow() ? 30000 : 1500, false);
}

static void test_stress_create(void)
{
    do_test_stress(g_test_slow() ? 10000 : 500, true);
}

/*
 * The cases
 */

typedef enum Where {
    IN_MAIN_LOOP = 1,
    IN_IOTHREAD = 2,
    IN_BOTH = IN_MAIN_LOOP | IN_IOTHREAD,
    ONLY_SLOW = 4,
} Where;

typedef struct Case {
    const char *name;
    void (*fn)(void);
    int where;
} Case;

static const Case cases[] = {
    { "submit/one", test_submit_one, IN_BOTH },
    { "submit/many", test_submit_many, IN_BOTH },
    { "submit/glib", test_submit_glib, IN_MAIN_LOOP },
    { "submit/order", test_order, IN_BOTH },
    { "nested/finished", test_nested_finished, IN_BOTH },
    { "nested/deep", test_nested_deep, IN_BOTH },
    { "nested/mixed", test_nested_mixed, IN_BOTH },
    { "nested/submit", test_nested_submit, IN_BOTH },
    { "nested/running", test_nested_running, IN_BOTH },
    { "defer/batch", test_defer_batch, IN_MAIN_LOOP },
    { "defer/nested-loop", test_defer_nested_loop, IN_BOTH },
    { "defer/cancel-first", test_defer_cancel_first, IN_MAIN_LOOP },
    { "dispatch/bounded", test_bounded_dispatch, IN_BOTH },
    { "dispatch/bounded-cancel", test_bounded_cancel, IN_MAIN_LOOP },
    { "dispatch/no-recursion", test_no_recursion, IN_BOTH },
    { "contexts", test_contexts, IN_MAIN_LOOP },
    { "threads/lazy", test_threads_lazy, IN_MAIN_LOOP },
    { "threads/signals", test_threads_signals, IN_BOTH },
    { "threads/affinity", test_threads_affinity, IN_MAIN_LOOP },
    { "threads/vcpu", test_threads_vcpu, IN_MAIN_LOOP },
    { "threads/foreign", test_threads_foreign, IN_MAIN_LOOP },
    { "threads/foreign-growth", test_threads_foreign_growth, IN_MAIN_LOOP },
    { "threads/foreign-min", test_threads_foreign_min, IN_MAIN_LOOP },
    { "growth/blocked", test_growth_blocked, IN_BOTH },
    { "growth/slow-start", test_growth_slow_start, IN_MAIN_LOOP },
    { "growth/late-wake", test_growth_late_wake, IN_MAIN_LOOP },
    { "growth/bounded", test_growth_bounded, IN_MAIN_LOOP },
    { "growth/not-by-number", test_growth_not_by_number, IN_BOTH },
    { "params/min", test_params_min, IN_BOTH },
    { "params/remote", test_params_remote, IN_MAIN_LOOP },
    { "params/max-idle", test_params_max_idle, IN_BOTH },
    { "params/max-busy", test_params_max_busy, IN_MAIN_LOOP },
    { "params/max-one", test_params_max_one, IN_MAIN_LOOP },
    { "params/max-woken", test_params_max_woken, IN_MAIN_LOOP },
    { "params/max-raise", test_params_max_raise, IN_BOTH },
    { "shrink", test_shrink, IN_MAIN_LOOP | ONLY_SLOW },
    { "slow/storm", test_slow_storm, IN_BOTH },
    { "slow/few-workers", test_slow_few_workers, IN_MAIN_LOOP },
    { "slow/raise-max", test_slow_raise_max, IN_MAIN_LOOP },
    { "slow/lower-max", test_slow_lower_max, IN_MAIN_LOOP },
    { "cancel/incoming", test_cancel_incoming, IN_BOTH },
    { "cancel/queued", test_cancel_queued, IN_BOTH },
    { "cancel/before-worker", test_cancel_before_worker, IN_MAIN_LOOP },
    { "cancel/running", test_cancel_running, IN_BOTH },
    { "cancel/done", test_cancel_done, IN_BOTH },
    { "cancel/twice", test_cancel_twice, IN_MAIN_LOOP },
    { "cancel/in-callback", test_cancel_in_callback, IN_BOTH },
    { "create/none", test_create_none, IN_BOTH },
    { "create/none-chain", test_create_none_chain, IN_MAIN_LOOP },
    { "create/none-nested", test_create_none_nested, IN_MAIN_LOOP },
    { "create/none-bounded", test_create_none_bounded, IN_MAIN_LOOP },
    { "create/only-first", test_create_only_first, IN_BOTH },
    { "create/min-fails", test_create_min_fails, IN_MAIN_LOOP },
    { "create/recovers", test_create_recovers, IN_MAIN_LOOP },
    { "create/warning", test_create_warning, IN_MAIN_LOOP },
    { "free/random", test_free_random, IN_BOTH },
    { "free/unused", test_free_unused, IN_BOTH },
    { "free/idle", test_free_idle, IN_BOTH },
    { "free/elsewhere", test_free_elsewhere, IN_MAIN_LOOP },
    { "lane/serial", test_lane_serial, IN_BOTH },
    { "lane/beside", test_lane_beside, IN_BOTH },
    { "lane/stuck", test_lane_stuck, IN_BOTH },
    { "lane/all-stuck", test_lane_all_stuck, IN_BOTH },
    { "lane/slow", test_lane_slow, IN_BOTH },
    { "lane/work", test_lane_work, IN_BOTH },
    { "lane/wake", test_lane_wake, IN_BOTH },
    { "lane/wake-by-timer", test_lane_wake_by_timer, IN_BOTH },
    { "lane/slow-class", test_lane_slow_class, IN_BOTH },
    { "lane/cancel-incoming", test_lane_cancel_incoming, IN_BOTH },
    { "lane/cancel-waiting", test_lane_cancel_waiting, IN_BOTH },
    { "lane/cancel-queued", test_lane_cancel_queued, IN_BOTH },
    { "lane/cancel-class", test_lane_cancel_class, IN_BOTH },
    { "lane/cancel-all", test_lane_cancel_all, IN_BOTH },
    { "lane/two-contexts", test_lane_two_contexts, IN_MAIN_LOOP },
    { "lane/foreign", test_lane_foreign, IN_MAIN_LOOP },
    { "lane/home", test_lane_home, IN_BOTH },
    { "lane/teardown", test_lane_teardown, IN_BOTH },
    { "wake/as-needed", test_wake_as_needed, IN_BOTH },
    { "wake/batches", test_wake_batches, IN_BOTH },
    { "spin/none-by-default", test_spin_none_by_default, IN_BOTH },
    { "spin/pays", test_spin_pays, IN_BOTH },
    { "spin/stops", test_spin_stops, IN_BOTH },
    { "spin/one", test_spin_one, IN_BOTH },
    { "spin/all-pools", test_spin_all_pools, IN_BOTH },
    { "spin/chain", test_spin_chain, IN_BOTH },
    { "linger/when", test_linger_when, IN_BOTH },
    { "linger/ends", test_linger_ends, IN_BOTH },
    { "spin/surplus", test_spin_surplus, IN_BOTH },
    { "spin/free", test_spin_free, IN_BOTH },
    { "spin/free-random", test_spin_free_random, IN_BOTH },
    { "coroutine", test_coroutine, IN_BOTH },
    { "stress/plain", test_stress, IN_MAIN_LOOP },
    { "stress/create", test_stress_create, IN_MAIN_LOOP },
};

#define PREFIX_MAIN_LOOP "/paio/"
#define PREFIX_IOTHREAD "/paio/iothread/"

static void case_begin(const char *prefix, const Case *c)
{
    watchdog_start(prefix, c->name);
    create_reset();
}

static void case_end(void)
{
    create_reset();
    clock_go();
    /* A thread that was joined may be listed for a moment. */
    WAIT_BLIND(!count_workers());
    watchdog_stop();
}

static void run_in_main_loop(const void *opaque)
{
    const Case *c = opaque;

    case_begin(PREFIX_MAIN_LOOP, c);
    c->fn();
    case_end();
}

static void call_case(void *opaque)
{
    const Case *c = opaque;

    c->fn();
}

static void run_in_iothread(const void *opaque)
{
    const Case *c = opaque;
    IOThread *iothread = iothread_new();

    case_begin(PREFIX_IOTHREAD, c);
    ctx_call(iothread_get_aio_context(iothread), call_case, (void *)c);
    case_end();
    iothread_join(iothread);
}

int main(int argc, char **argv)
{
    QemuThread watchdog;

    qemu_init_main_loop(&error_abort);
    main_ctx = qemu_get_aio_context();
    qemu_thread_create(&watchdog, "watchdog", watchdog_thread, NULL,
                       QEMU_THREAD_DETACHED);

    g_test_init(&argc, &argv, NULL);
    for (int i = 0; i < ARRAY_SIZE(cases); i++) {
        const Case *c = &cases[i];

        if ((c->where & ONLY_SLOW) && !g_test_slow()) {
            continue;
        }
        if (c->where & IN_MAIN_LOOP) {
            g_autofree char *path =
                g_strconcat(PREFIX_MAIN_LOOP, c->name, NULL);

            g_test_add_data_func(path, c, run_in_main_loop);
        }
        if (c->where & IN_IOTHREAD) {
            g_autofree char *path =
                g_strconcat(PREFIX_IOTHREAD, c->name, NULL);

            g_test_add_data_func(path, c, run_in_iothread);
        }
    }
    return g_test_run();
}
