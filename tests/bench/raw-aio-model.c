/*
 * Model checker of data: random operations on an image, whose content is
 * compared with that of a model in memory
 *
 * The operations and all their parameters follow from the seed and the options
 * alone, whatever the order in which they are done.  They begin in their
 * order: one that has to wait for others holds up those after it.  What does
 * not follow from the seed is how long each takes and so which are in flight at
 * the same time, and the order in which different loops hand them to QEMU.
 *
 * With the block layer's public functions only, so that the same source checks
 * a QEMU without the raw file engine.  Durability can't be seen from here: what
 * a flush or FUA left out is still in the page cache.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "block/block.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/defer-call.h"
#include "qemu/lockable.h"
#include "qemu/main-loop.h"
#include "qemu/memalign.h"
#include "qemu/module.h"
#include "qemu/units.h"
#include "../unit/iothread.h"
#include "raw-aio-model.h"

/* Bytes that are undecided at once, at most */
#define MAX_SPAN        (2 * MiB)
/*
 * The default size.  QEMU's qcow2 aborts when the image grows while zeroes are
 * written to its last cluster and that is not a whole one.
 */
#define QCOW2_CLUSTER   (64 * KiB)
/* Without the end of any operation for so many seconds, one hangs. */
#define HANG_SECONDS    120
#define SHORT_HANG_SECONDS 60   /* with --tolerate, whose runs are short */

typedef struct ModelLoop {
    IOThread *iothread;     /* NULL: the main loop */
    AioContext *ctx;
    QEMUBH *bh;
    QSIMPLEQ_HEAD(, ModelOp) incoming;  /* lock */
    QTAILQ_HEAD(, ModelOp) in_flight;   /* of this loop's thread */
} ModelLoop;

ModelOptions opt = {
    .iothreads = 1, .depth = 16, .seed = -1, .ops = -1, .seconds = -1,
};

static const ModelTarget *target;
static ModelLoop *loops;    /* the last is the main loop */
static int64_t end_time;    /* ns; of --seconds */
static int check_fd = -1;   /* of raw: to read the file beside QEMU */

static struct {
    QemuMutex lock;

    /* Protected by lock */
    ModelData *data;
    uint64_t next_id;
    ModelOp *head;          /* the next one, which may have to wait */
    GQueue settle;          /* ModelCluster */
    unsigned in_flight;
    unsigned again;         /* of these: failed, and were sent again */
    unsigned handed_over;   /* of them, not with the target yet */
    unsigned extending;     /* of them, with .extends */
    ModelOp *main_op;       /* for the main thread; nothing is sent meanwhile */
    bool over;              /* and nothing is in flight */
    uint64_t count[OP__MAX];
    uint64_t cancelled;
    uint64_t cancelled_asleep;  /* of them, while a call slept in a worker */

    ModelPlan plan;
} state;

static uint64_t progress;   /* atomic; ends of operations */

/* Of the main thread */
static bool main_called;
static ModelTiers tiers;
static uint64_t drained_asleep; /* drains while a call slept */

static const char *const kind_name[OP__MAX] = {
    "read", "write", "zero", "discard", "flush", "truncate", "cancel",
    "verify", "drain", "move", "reopen", "read-only", "read-write", "close",
    "shorten", "pause", "read",
};

/* --- failures --- */

/* Two threads may have found something: let the first one speak. */
static void speak(const char *message)
{
    static bool spoken;     /* atomic */

    if (qatomic_xchg(&spoken, true)) {
        pause();
    }
    fprintf(stderr, "raw-aio-model: %s\n", message);
}

void model_fail(int status, const char *fmt, ...)
{
    g_autofree char *message = NULL;
    va_list ap;

    va_start(ap, fmt);
    message = g_strdup_vprintf(fmt, ap);
    va_end(ap);
    speak(message);
    /* From any thread, with requests in flight: nothing is torn down. */
    _exit(status);
}

static void print_replay(void)
{
    const char *switches = getenv("QEMU_RAW_AIO_DISABLE");
    const char *preload = getenv("LD_PRELOAD");
    const char *fault = getenv("RAW_AIO_MODEL_FAULT");

    fprintf(stderr, "replay: %s%s%s%s%s%s%s%s%s%s --seed %" PRId64, switches ?
            "QEMU_RAW_AIO_DISABLE=" : "", switches ?: "", switches ? " " : "",
            fault ? "RAW_AIO_MODEL_FAULT=" : "", fault ?: "", fault ? " " : "",
            preload ? "LD_PRELOAD=" : "", preload ?: "", preload ? " " : "",
            g_get_prgname(), opt.seed);
    if (opt.seconds > 0) {
        fprintf(stderr, " --seconds %g", opt.seconds);
    } else {
        fprintf(stderr, " --ops %" PRId64, opt.ops);
    }
    fprintf(stderr, " --aio %s --cache %s --format %s --iothreads %d --depth %d"
            " --size %" PRIu64 "%s%s %s\n", opt.aio, opt.cache, opt.format,
            opt.iothreads, opt.depth, opt.size,
            opt.callback ? " --callback" : "",
            opt.tolerate ? " --tolerate" : "", opt.file);
}

void model_found(int status, const ModelOp *op, const char *fmt, ...)
{
    g_autofree char *message = NULL, *line = NULL;
    va_list ap;

    va_start(ap, fmt);
    message = g_strdup_vprintf(fmt, ap);
    va_end(ap);
    /* Without the lock, which the caller may hold: it is about to end. */
    op = op ?: state.main_op;
    line = op ? g_strdup_printf("seed %" PRId64 ", operation %" PRIu64
                                " (%s of %" PRIu64 " bytes at %" PRIu64 "): %s",
                                opt.seed, op->id, kind_name[op->kind],
                                op->bytes, op->offset, message)
              : g_strdup_printf("seed %" PRId64 ", at the end: %s", opt.seed,
                                message);
    speak(line);
    print_replay();
    _exit(status);
}

bool model_check_ret(const char *what, int64_t ret)
{
    if (ret < 0 && !model_tolerate_error(NULL, ret)) {
        model_found(EXIT_FAILURE, NULL, "%s: %s", what, strerror(-ret));
    }
    return ret >= 0;
}

void model_create_raw(void)
{
    int fd = open(opt.file, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

    if (fd < 0 || ftruncate(fd, opt.size) < 0) {
        model_fail(EXIT_FAILURE, "could not make %s: %s", opt.file,
                   strerror(errno));
    }
    close(fd);
}

static void *watch(void *opaque)
{
    int limit = opt.tolerate ? SHORT_HANG_SECONDS : HANG_SECONDS;
    uint64_t last = 0;

    for (int idle = 0; idle < limit; idle++) {
        uint64_t now = qatomic_read(&progress);

        if (now != last) {
            last = now;
            idle = 0;
        }
        g_usleep(G_USEC_PER_SEC);
    }
    model_found(EXIT_FAILURE, NULL, "no operation ended for %d s (%" PRIu64
                " have ended, %u are in flight, %u of them not sent)",
                limit, last, state.in_flight, state.handed_over);
}

static void G_NORETURN wrong_data(const ModelOp *op, const char *where,
                                  const ModelMismatch *m)
{
    model_found(EXIT_WRONG_DATA, op, "%soffset %" PRIu64 ": expected %s, "
                "found %s", where, m->offset, m->expected, m->found);
}

/* --- sending --- */

static bool idle_locked(void)
{
    return !state.in_flight && !model_data_undecided(state.data);
}

static bool may_begin_main_locked(const ModelOp *op)
{
    switch (op->kind) {
    case OP_VERIFY:
    case OP_CLOSE:
    case OP_SHORTEN:
        return idle_locked();
    case OP_REOPEN:
        /* The page cache and O_DIRECT at once are not coherent. */
        return opt.callback ? idle_locked() : !state.handed_over;
    case OP_READ_ONLY:
    case OP_READ_WRITE:
        /*
         * Reads may go on while the descriptor is replaced, but not with
         * O_DIRECT: raw_check_perm(), also without the series, probes the
         * alignment anew, and resets that of the node meanwhile.
         */
        return state.plan.direct ? idle_locked()
                            : !state.handed_over &&
                              !model_data_undecided(state.data);
    default:
        return !state.handed_over;
    }
}

static bool may_begin_locked(const ModelOp *op)
{
    if (op_is_for_main(op->kind)) {
        return may_begin_main_locked(op);
    }
    if (state.in_flight >= op->max_in_flight) {
        return false;
    }
    if (op->beyond) {
        /* With the end where it is */
        return model_data_may_read(state.data, op->offset, op->bytes);
    }
    switch (op->kind) {
    case OP_READ:
        return model_data_may_read(state.data, op->offset, op->bytes);
    case OP_WRITE:
        /* QEMU's length of a node is not made for two at once. */
        return !(op->extends && state.extending) &&
               model_data_may_write(state.data, MODEL_WRITE, op->offset,
                                    op->bytes);
    case OP_ZERO:
    case OP_DISCARD:
        return model_data_may_write(state.data, op->kind == OP_ZERO ?
                                    MODEL_ZERO : MODEL_DISCARD, op->offset,
                                    op->bytes);
    case OP_TRUNCATE:
        return model_data_may_write(state.data, MODEL_RESIZE, op->offset,
                                    op->bytes);
    default:
        return true;
    }
}

static void say(const ModelOp *op, const char *what, int ret)
{
    if (opt.verbose) {
        fprintf(stderr, "%s %" PRIu64 " %s %" PRIu64 "+%" PRIu64 " size %"
                PRIu64 " flags 0x%x loop %d segments %d ret %d\n", what,
                op->id, kind_name[op->kind], op->offset, op->bytes,
                op->kind == OP_TRUNCATE ? op->size : state.plan.size, op->flags,
                op->loop, op->buf ? op->qiov.niov : 0, ret);
    }
}

static void main_op_bh(void *opaque)
{
    main_called = true;
}

static void call_main(void)
{
    aio_bh_schedule_oneshot(qemu_get_aio_context(), main_op_bh, NULL);
}

static ModelOp *next_settle_locked(ModelLoop *self)
{
    ModelOp *op = g_new0(ModelOp, 1);

    op->kind = OP_SETTLE;
    op->loop = self - loops;
    op->settles = g_queue_pop_head(&state.settle);
    op->read = model_settle_begin(state.data, op->settles, &op->offset,
                                  &op->bytes, &op->id);
    say(op, "settle", 0);
    op->random = model_mix64(op->id);
    return op;
}

static bool past_end_locked(void)
{
    return opt.seconds > 0 ? qemu_clock_get_ns(QEMU_CLOCK_REALTIME) >= end_time
                           : state.next_id == opt.ops;
}

/* The next operation if it may begin now, which it then does for the model */
static ModelOp *next_op_locked(ModelLoop *self)
{
    ModelOp *op = state.head;

    if (state.main_op || state.over) {
        return NULL;
    }
    if (!g_queue_is_empty(&state.settle)) {
        op = next_settle_locked(self);
        state.in_flight++;
        state.handed_over++;
        return op;
    }
    if (!op) {
        if (past_end_locked()) {
            if (idle_locked()) {
                state.over = true;
                call_main();
            }
            return NULL;
        }
        op = state.head = op_new(state.next_id++, &state.plan);
    }
    if (!may_begin_locked(op)) {
        return NULL;
    }
    state.head = NULL;
    op_foresee(op, &state.plan);
    state.count[op->kind]++;
    say(op, "begin", 0);
    if (op_is_for_main(op->kind)) {
        state.main_op = op;
        call_main();
        return NULL;
    }
    state.in_flight++;
    state.handed_over++;
    state.extending += op->extends;
    if (op->beyond) {
        op->read = model_read_begin(state.data, op->offset, op->bytes);
        return op;
    }
    switch (op->kind) {
    case OP_READ:
        op->read = model_read_begin(state.data, op->offset, op->bytes);
        break;
    case OP_WRITE:
        op->write = model_write_begin(state.data, MODEL_WRITE, op->id,
                                      op->offset, op->bytes);
        break;
    case OP_ZERO:
    case OP_DISCARD:
        op->write = model_write_begin(state.data, op->kind == OP_ZERO ?
                                      MODEL_ZERO : MODEL_DISCARD, op->id,
                                      op->offset, op->bytes);
        break;
    case OP_TRUNCATE:
        op->write = model_write_begin(state.data, MODEL_RESIZE, op->id,
                                      op->offset, op->bytes);
        break;
    default:
        break;
    }
    return op;
}

static void pump(ModelLoop *self);

static void cancel_one(ModelOp *op)
{
    ModelOp *other;
    unsigned n = 0;

    QTAILQ_FOREACH(other, &loops[op->loop].in_flight, in_flight) {
        n++;
    }
    if (n) {
        n = op_random(op, n);
        QTAILQ_FOREACH(other, &loops[op->loop].in_flight, in_flight) {
            if (n-- == 0) {
                break;
            }
        }
        /* What settles has to read. */
        if (other->kind != OP_SETTLE) {
            target->cancel(other);
        }
    }
    WITH_QEMU_LOCK_GUARD(&state.lock) {
        state.in_flight--;
        state.handed_over--;
    }
    g_free(op);
}

/* In the thread of its loop, without the lock */
static void op_send(ModelOp *op)
{
    bool cancel = op->cancel_at_once && op->kind != OP_TRUNCATE;

    if (op->kind == OP_CANCEL) {
        cancel_one(op);
        return;
    }
    if (op->kind == OP_READ || op->kind == OP_WRITE || op->kind == OP_SETTLE) {
        op_make_buffer(op);
    }
    if (op->kind == OP_WRITE) {
        op_fill_buffer(op, state.data);
    }
    QTAILQ_INSERT_TAIL(&loops[op->loop].in_flight, op, in_flight);
    model_tolerate_send(op, &state.plan);
    target->send(op);
    if (cancel) {
        target->cancel(op);
    }
    WITH_QEMU_LOCK_GUARD(&state.lock) {
        state.handed_over--;
    }
}

/* Begin what may begin: as a device does that finds requests in its queue */
static void pump(ModelLoop *self)
{
    ModelOp *op;

    defer_call_begin();
    qemu_mutex_lock(&state.lock);
    while ((op = next_op_locked(self))) {
        if (&loops[op->loop] != self) {
            QSIMPLEQ_INSERT_TAIL(&loops[op->loop].incoming, op, next);
            qemu_bh_schedule(loops[op->loop].bh);
            continue;
        }
        qemu_mutex_unlock(&state.lock);
        op_send(op);
        qemu_mutex_lock(&state.lock);
    }
    qemu_mutex_unlock(&state.lock);
    defer_call_end();
}

static void loop_bh(void *opaque)
{
    ModelLoop *self = opaque;
    ModelOp *op;
    QSIMPLEQ_HEAD(, ModelOp) todo = QSIMPLEQ_HEAD_INITIALIZER(todo);

    WITH_QEMU_LOCK_GUARD(&state.lock) {
        QSIMPLEQ_CONCAT(&todo, &self->incoming);
    }
    defer_call_begin();
    while ((op = QSIMPLEQ_FIRST(&todo))) {
        QSIMPLEQ_REMOVE_HEAD(&todo, next);
        op_send(op);
    }
    defer_call_end();
    pump(self);
}

/* --- ends --- */

static bool ret_ok(const ModelOp *op, int ret)
{
    if (op->beyond) {
        return ret == -EIO;
    }
    if (ret < 0 && model_tolerate_error(op, ret)) {
        return true;
    }
    if (ret == -ECANCELED) {
        return op->cancelled;
    }
    if (ret == -ENOTSUP) {
        return op->flags & BDRV_REQ_NO_FALLBACK;
    }
    return ret >= 0 && !op->doomed;
}

static void op_end_locked(ModelOp *op, int ret, const uint8_t *data)
{
    ModelCluster *cluster;
    ModelMismatch m;

    if (op->read && !model_read_end(state.data, op->read, ret < 0 ? NULL : data,
                                    state.next_id, &m)) {
        wrong_data(op, "", &m);
    }
    if (op->write) {
        cluster = model_write_end(state.data, op->write,
                                  ret >= 0 ? MODEL_DONE :
                                  ret == -ECANCELED ? MODEL_UNDONE :
                                  MODEL_PARTLY);
        if (cluster) {
            g_queue_push_tail(&state.settle, cluster);
        }
    }
    state.cancelled += ret == -ECANCELED;
    state.cancelled_asleep += ret == -ECANCELED && model_tolerate_sleeps();
    state.extending -= op->extends;
    state.again -= op->sent_again;
    state.in_flight--;
}

void model_op_done(void *opaque, int ret)
{
    ModelOp *op = opaque;
    ModelLoop *loop = &loops[op->loop];
    g_autofree uint8_t *linear = NULL;
    const uint8_t *data = op->buf;
    bool from_bh = op->pump_from_bh;

    if (qemu_get_current_aio_context() != loop->ctx) {
        model_found(EXIT_FAILURE, op, "completed in another AioContext");
    }
    if (!ret_ok(op, ret)) {
        say(op, "wrong", ret);
        model_found(EXIT_FAILURE, op, "%s",
                    ret < 0 ? strerror(-ret) : "succeeded, and should not");
    }
    if (ret < 0 && model_tolerate_again(op)) {
        say(op, "again", ret);
        WITH_QEMU_LOCK_GUARD(&state.lock) {
            state.again++;
        }
        target->send(op);
        return;
    }
    QTAILQ_REMOVE(&loop->in_flight, op, in_flight);
    if (op->buf) {
        op_check_guards(op);
        if (op->qiov.niov == 1) {
            data = op->qiov.iov[0].iov_base;
        } else if (op->read) {
            data = linear = g_malloc(op->bytes);
            qemu_iovec_to_buf(&op->qiov, 0, linear, op->bytes);
        }
    }
    WITH_QEMU_LOCK_GUARD(&state.lock) {
        say(op, "end", ret);
        op_end_locked(op, ret, data);
    }
    qatomic_inc(&progress);
    if (op->buf) {
        qemu_iovec_destroy(&op->qiov);
        qemu_vfree(op->buf);
    }
    g_free(op);
    if (from_bh) {
        qemu_bh_schedule(loop->bh);
    } else {
        pump(loop);
    }
}

/* --- what the main thread does --- */

/*
 * So that reads have to wait for the disk, and O_DIRECT writes do not meet
 * cached pages, for which RWF_NOWAIT fails.  Only what is on disk can go.
 */
static void drop_cache(void)
{
    if (check_fd < 0) {
        return;
    }
#ifdef CONFIG_SYNC_FILE_RANGE
    sync_file_range(check_fd, 0, 0, SYNC_FILE_RANGE_WAIT_BEFORE |
                    SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
#endif
    posix_fadvise(check_fd, 0, 0, POSIX_FADV_DONTNEED);
}

/* The file itself must say the same as QEMU. */
static void verify_file(uint8_t *buf)
{
    uint64_t done = 0;
    ModelMismatch m;

    if (check_fd < 0) {
        return;
    }
    memset(buf, 0, model_capacity());
    while (done < model_capacity()) {
        ssize_t n = pread(check_fd, buf + done, model_capacity() - done, done);

        if (n < 0) {
            model_fail(EXIT_FAILURE, "could not read %s: %s", opt.file,
                       strerror(errno));
        }
        if (n == 0) {
            break;
        }
        done += n;
    }
    if (!model_data_check(state.data, buf, 0, model_capacity(), state.next_id,
                          &m)) {
        wrong_data(NULL, "in the file itself, ", &m);
    }
    drop_cache();
}

static void verify(bool last)
{
    uint8_t *buf = qemu_memalign(MODEL_BLOCK, model_capacity());
    uint64_t step;
    ModelMismatch m;
    bool flushed = true;

    if (state.plan.writable) {
        flushed = target->flush();
    }
    verify_file(buf);
    if (flushed) {
        target->check(state.plan.size, last);
    }
    for (uint64_t at = 0; at < state.plan.size; at += step) {
        step = MIN(MODEL_MAX_REQUEST, state.plan.size - at);
        memset(buf, MODEL_POISON, step);
        target->read(at, step, buf);
        if (!model_data_check(state.data, buf, at, step, state.next_id, &m)) {
            wrong_data(NULL, last ? "" : "verifying everything, ", &m);
        }
    }
    qemu_vfree(buf);
}

/* Where QEMU asks for the length of the file, it is to be that of the image. */
static void lengthen_file(void)
{
    struct stat st;

    if (check_fd >= 0 &&
        (fstat(check_fd, &st) < 0 || (st.st_size < state.plan.size &&
                                      ftruncate(check_fd,
                                                state.plan.size) < 0))) {
        model_fail(EXIT_FAILURE, "could not lengthen %s: %s", opt.file,
                   strerror(errno));
    }
}

static void shorten_file(const ModelOp *op)
{
    struct stat st;

    if (fstat(check_fd, &st) < 0 ||
        (st.st_size > op->offset && ftruncate(check_fd, op->offset) < 0)) {
        model_fail(EXIT_FAILURE, "could not shorten %s: %s", opt.file,
                   strerror(errno));
    }
    model_data_clear(state.data, op->offset, op->bytes);
}

static void reopen_closed(void)
{
    target->close(&tiers);
    target->open(state.plan.direct, state.plan.writethrough);
}

static void drain(void)
{
    bool asleep = model_tolerate_sleeps();
    unsigned naps = model_tolerate_naps();

    target->drain();
    QEMU_LOCK_GUARD(&state.lock);
    /*
     * Those of IOThreads end for QEMU just before they do so here.  What fails
     * during the drain and is sent again waits for its end.
     */
    if (state.in_flight > state.again && !opt.iothreads && !opt.callback) {
        model_found(EXIT_FAILURE, NULL, "%u requests are in flight after a "
                    "drain", state.in_flight);
    }
    drained_asleep += asleep || model_tolerate_naps() != naps;
}

/*
 * While it is there nothing else begins, so that what is in "state" stays as
 * it is, but for the counts of what is in flight.
 */
static void run_main_op(void)
{
    ModelOp *op = state.main_op;

    switch (op->kind) {
    case OP_VERIFY:
        verify(false);
        break;
    case OP_DRAIN:
        drain();
        break;
    case OP_MOVE:
        target->move(loops[state.plan.home].ctx);
        break;
    case OP_REOPEN:
        lengthen_file();
        target->reopen(state.plan.direct, state.plan.writethrough);
        break;
    case OP_READ_ONLY:
    case OP_READ_WRITE:
        lengthen_file();
        target->set_writable(state.plan.writable, state.plan.by_reopen);
        break;
    case OP_CLOSE:
        lengthen_file();
        reopen_closed();
        break;
    case OP_SHORTEN:
        shorten_file(op);
        break;
    case OP_PAUSE:
        drop_cache();
        /* Long enough for all threads to fall asleep */
        g_usleep(op_random(op, 3000));
        break;
    default:
        g_assert_not_reached();
    }
    qatomic_inc(&progress);
    WITH_QEMU_LOCK_GUARD(&state.lock) {
        state.main_op = NULL;
    }
    g_free(op);
    pump(&loops[state.plan.nr_loops - 1]);
}

static void run(void)
{
    QemuThread watcher;

    qemu_thread_create(&watcher, "watch", watch, NULL, QEMU_THREAD_DETACHED);
    model_tolerate_arm(true, check_fd);
    pump(&loops[state.plan.nr_loops - 1]);
    while (true) {
        bool over, main_op;

        main_loop_wait(false);
        if (!main_called) {
            continue;
        }
        main_called = false;
        WITH_QEMU_LOCK_GUARD(&state.lock) {
            over = state.over;
            main_op = state.main_op != NULL;
        }
        if (main_op) {
            run_main_op();
        } else if (over) {
            return;
        }
    }
}

static void finish(void)
{
    lengthen_file();
    if (!state.plan.writable) {
        state.plan.writable = true;
        target->set_writable(true, state.plan.by_reopen);
    }
    verify(true);
    model_tolerate_arm(false, -1);
    if (!model_tolerate_lost()) {
        reopen_closed();
        verify(true);
    }
    target->close(&tiers);
}

/* --- the report --- */

static bool tier_served(const char *name)
{
    if (g_str_equal(name, "native")) {
        return tiers.native;
    }
    if (g_str_equal(name, "pool")) {
        return tiers.pool;
    }
    return tiers.inlined;
}

static void report(void)
{
    g_auto(GStrv) wanted = g_strsplit(opt.expect ?: "", ",", -1);
    uint64_t total = 0;

    printf("ok: ");
    for (ModelKind k = 0; k < OP_SETTLE; k++) {
        printf("%" PRIu64 " %s, ", state.count[k], kind_name[k]);
        total += state.count[k];
    }
    printf("%" PRIu64 " cancelled; %" PRIu64 " operations\n", state.cancelled,
           total);
    if (opt.tiers && tiers.counted) {
        printf("tiers: inline %" PRIu64 ", native %" PRIu64 ", pool %" PRIu64
               ", refused %" PRIu64 ", short transfers %" PRIu64 "\n",
               tiers.inlined, tiers.native, tiers.pool, tiers.refused,
               tiers.shortened);
    } else if (opt.tiers) {
        printf("tiers: this QEMU does not count them\n");
    }
    if (opt.tolerate) {
        printf("while a call slept: %" PRIu64 " cancelled, %" PRIu64
               " drained\n", state.cancelled_asleep, drained_asleep);
        model_tolerate_report();
    }
    for (char **name = wanted; *name; name++) {
        if (!tier_served(*name)) {
            model_found(EXIT_FAILURE, NULL, "the tier %s has served nothing",
                        *name);
        }
    }
}

/* --- options --- */

static void check_choice(const char *name, char **value, const char *choices)
{
    g_auto(GStrv) list = g_strsplit(choices, " ", -1);

    *value = *value ?: g_strdup(list[0]);
    if (!g_strv_contains((const char *const *)list, *value)) {
        g_autofree char *text = g_strjoinv(", ", list);

        model_fail(EXIT_USAGE, "--%s: one of %s, not '%s'", name, text, *value);
    }
}

static void check_range(const char *name, int64_t value, int64_t min,
                        int64_t max)
{
    if (value < min || value > max) {
        model_fail(EXIT_USAGE, "--%s: from %" PRId64 " to %" PRId64 ", not %"
                   PRId64, name, min, max, value);
    }
}

static void parse_options(int argc, char **argv)
{
    const GOptionEntry entries[] = {
        { "seed", 0, 0, G_OPTION_ARG_INT64, &opt.seed,
          "of all that is random (default: by the clock)", "N" },
        { "ops", 0, 0, G_OPTION_ARG_INT64, &opt.ops,
          "operations (default 10000)", "N" },
        { "seconds", 0, 0, G_OPTION_ARG_DOUBLE, &opt.seconds,
          "go on for so long instead", "S" },
        { "aio", 0, 0, G_OPTION_ARG_STRING, &opt.aio,
          "threads (default) or native", "A" },
        { "cache", 0, 0, G_OPTION_ARG_STRING, &opt.cache,
          "writeback (default), none, directsync, writethrough: most of the "
          "time, as it is changed as well", "M" },
        { "format", 0, 0, G_OPTION_ARG_STRING, &opt.format,
          "raw (default) or qcow2", "F" },
        { "iothreads", 0, 0, G_OPTION_ARG_INT, &opt.iothreads,
          "0: the main loop sends all; 1 (default): an IOThread or the main "
          "loop, in turns; more: all of them and the main loop at once", "N" },
        { "depth", 0, 0, G_OPTION_ARG_INT, &opt.depth,
          "requests in flight at most (default 16)", "N" },
        { "size", 0, 0, G_OPTION_ARG_STRING, &opt.size_str,
          "of the image at first (default 8M)", "SIZE" },
        { "callback", 0, 0, G_OPTION_ARG_NONE, &opt.callback,
          "the engine alone, with cancellation", NULL },
        { "tiers", 0, 0, G_OPTION_ARG_NONE, &opt.tiers,
          "say how many requests each tier has served", NULL },
        { "expect", 0, 0, G_OPTION_ARG_STRING, &opt.expect,
          "fail if one of these served nothing: inline, native, pool; "
          "separated by commas", "TIERS" },
        { "tolerate", 0, 0, G_OPTION_ARG_NONE, &opt.tolerate,
          "with raw-aio-model-faults.so, which has a system call fail: its "
          "error may come back, where it has to, and once", NULL },
        { "verbose", 0, 0, G_OPTION_ARG_NONE, &opt.verbose,
          "say when each operation begins and ends", NULL },
        { NULL },
    };
    g_autoptr(GOptionContext) context =
        g_option_context_new("FILE - compare the data of random operations "
                             "with a model");
    g_autoptr(GError) err = NULL;
    g_auto(GStrv) wanted = NULL;
    struct stat st;

    g_set_prgname(argv[0]);
    g_option_context_add_main_entries(context, entries, NULL);
    if (!g_option_context_parse(context, &argc, &argv, &err)) {
        model_fail(EXIT_USAGE, "%s; see --help", err->message);
    }
    if (argc != 2) {
        model_fail(EXIT_USAGE, "one FILE is needed, which is overwritten; see "
                   "--help");
    }
    opt.file = argv[1];
    check_choice("aio", &opt.aio, "threads native");
    check_choice("cache", &opt.cache, "writeback none directsync writethrough");
    check_choice("format", &opt.format, "raw qcow2");
    opt.qcow2 = g_str_equal(opt.format, "qcow2");
    opt.direct = g_str_equal(opt.cache, "none") ||
                 g_str_equal(opt.cache, "directsync");
    opt.writethrough = g_str_equal(opt.cache, "directsync") ||
                       g_str_equal(opt.cache, "writethrough");
    opt.size = 8 * MiB;
    if (opt.size_str && qemu_strtosz(opt.size_str, NULL, &opt.size) < 0) {
        model_fail(EXIT_USAGE, "--size: a size such as 8M, not '%s'",
                   opt.size_str);
    }
    if (opt.size < 4 * MiB || opt.size > 1 * GiB ||
        opt.size % (2 * MODEL_BLOCK)) {
        model_fail(EXIT_USAGE, "--size: from 4M to 1G, a multiple of 8K");
    }
    check_range("iothreads", opt.iothreads, 0, 64);
    check_range("depth", opt.depth, 1, 4096);
    if (opt.ops != -1) {
        check_range("ops", opt.ops, 1, INT64_MAX);
    }
    if (opt.seconds != -1 && !(opt.seconds > 0 && opt.seconds <= 31536000)) {
        model_fail(EXIT_USAGE, "--seconds: more than 0, at most a year");
    }
    if (opt.ops != -1 && opt.seconds != -1) {
        model_fail(EXIT_USAGE, "--ops or --seconds, not both");
    }
    opt.ops = opt.ops == -1 ? 10000 : opt.ops;
    if (opt.seed == -1) {
        opt.seed = model_mix64(g_get_real_time() ^ getpid()) % 1000000000;
    }
    if (opt.callback && opt.qcow2) {
        model_fail(EXIT_USAGE, "--callback is for raw");
    }
    wanted = g_strsplit(opt.expect ?: "", ",", -1);
    for (char **name = wanted; *name; name++) {
        check_choice("expect", name, "inline native pool");
    }
    if (opt.tolerate) {
        model_tolerate_init();
    }
    target = &model_target_blk;
    if (opt.callback) {
#ifdef MODEL_HAVE_ENGINE
        target = &model_target_engine;
#else
        model_fail(EXIT_USAGE, "--callback: the raw file engine is not there");
#endif
    }
    if (lstat(opt.file, &st) == 0 && !S_ISREG(st.st_mode)) {
        model_fail(EXIT_USAGE, "%s is not a regular file", opt.file);
    }
}

static void init_loops(void)
{
    state.plan.nr_loops = opt.iothreads + 1;
    loops = g_new0(ModelLoop, state.plan.nr_loops);
    for (int i = 0; i < state.plan.nr_loops; i++) {
        ModelLoop *loop = &loops[i];

        if (i < opt.iothreads) {
            loop->iothread = iothread_new();
            loop->ctx = iothread_get_aio_context(loop->iothread);
        } else {
            loop->ctx = qemu_get_aio_context();
        }
        loop->bh = aio_bh_new(loop->ctx, loop_bh, loop);
        QSIMPLEQ_INIT(&loop->incoming);
        QTAILQ_INIT(&loop->in_flight);
    }
}

static void free_loops(void)
{
    for (int i = 0; i < state.plan.nr_loops; i++) {
        qemu_bh_delete(loops[i].bh);
        if (loops[i].iothread) {
            iothread_join(loops[i].iothread);
        }
    }
    g_free(loops);
}

int main(int argc, char **argv)
{
    parse_options(argc, argv);
    printf("seed: %" PRId64 "\n", opt.seed);
    fflush(stdout);

    module_call_init(MODULE_INIT_TRACE);
    qemu_init_main_loop(&error_fatal);
    module_call_init(MODULE_INIT_QOM);
    bdrv_init();
    qemu_mutex_init(&state.lock);
    g_queue_init(&state.settle);
    init_loops();
    model_tolerate_workers();
    state.data = model_data_new(opt.seed, model_capacity(),
                                opt.qcow2 ? QCOW2_CLUSTER : 0, MAX_SPAN);
    state.plan.size = opt.size;
    state.plan.direct = opt.direct;
    state.plan.writethrough = opt.writethrough;
    state.plan.writable = true;
    state.plan.home = state.plan.nr_loops - 1;
    end_time = qemu_clock_get_ns(QEMU_CLOCK_REALTIME) + opt.seconds * 1e9;

    target->create();
    if (!opt.qcow2) {
        check_fd = open(opt.file, O_RDWR | O_CLOEXEC);
        if (check_fd < 0) {
            model_fail(EXIT_FAILURE, "could not open %s: %s", opt.file,
                       strerror(errno));
        }
    }
    target->open(opt.direct, opt.writethrough);
    /* The close says whether this QEMU counts tiers. */
    reopen_closed();
    state.plan.any_cache = tiers.counted || !g_str_equal(opt.aio, "native");
    run();
    finish();
    free_loops();
    report();
    model_data_free(state.data);
    return 0;
}
