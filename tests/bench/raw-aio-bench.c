/*
 * Benchmark of file I/O through QEMU's public block layer
 *
 * The same source is built with and without the series, so both do the same
 * work: requests by blk_aio_preadv/pwritev/flush from an event loop.  A second
 * loop that only idles tells how late any event loop on this machine is.
 * Prints one JSON object.  scripts/bench runs it.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <math.h>
#include <sys/resource.h>
#include "block/aio.h"
#include "block/block.h"
#include "block/graph-lock.h"
#include "qapi/error.h"
#include "qapi/qapi-visit-block-core.h"
#include "qapi/qobject-output-visitor.h"
#include "qemu/cutils.h"
#include "qemu/defer-call.h"
#include "qemu/main-loop.h"
#include "qemu/memalign.h"
#include "qemu/module.h"
#include "qemu/units.h"
#include "qobject/qdict.h"
#include "qobject/qjson.h"
#include "qobject/qnum.h"
#include "system/block-backend.h"
#include "../unit/iothread.h"
#include "raw-aio-bench-stats.h"

enum {
    EXIT_USAGE = 2,
    EXIT_REFUSED = 3,   /* QEMU does not open the file in this mode */
    EXIT_WRONG_DATA = 4,
};

/* Data have a marker for each of these many bytes. */
#define SECTOR          512
/* One in so many read requests has all its data compared. */
#define VERIFY_EVERY    64
/* So many of the last blocks that were written are read back at the end. */
#define READ_BACK       64
/* Between two segments of a request, so that nothing can join them. */
#define SEGMENT_GAP     4096
/* How often the number of threads is looked at, in ns. */
#define THREADS_EVERY   (5 * SCALE_MS)

typedef enum BenchKind {
    BENCH_READ,
    BENCH_WRITE,
    BENCH_FLUSH,
    BENCH_KIND__MAX,
} BenchKind;

static const char *const kind_name[BENCH_KIND__MAX] = {
    "read", "write", "flush",
};

/* When requests count. Written by the monitor, read by all loops. */
typedef enum BenchPhase {
    PHASE_WARM_UP,
    PHASE_RUN,
    PHASE_STOP,
} BenchPhase;

typedef struct BenchLoop BenchLoop;

/* A request that is sent again and again. Belongs to the loop's thread. */
typedef struct BenchSlot {
    BenchLoop *loop;
    BenchKind kind;
    bool storm;             /* write, flush, write, flush, ...; not measured */
    bool only_flush;        /* sent by --flush-every */
    bool verify;            /* a read whose data are compared */
    uint64_t offset;
    int64_t start;          /* ns */
    uint8_t *buf;
    QEMUIOVector qiov;
    QSIMPLEQ_ENTRY(BenchSlot) next;
} BenchSlot;

/* An event loop with a file. Belongs to its thread once it runs. */
struct BenchLoop {
    IOThread *iothread;     /* NULL: the main loop */
    AioContext *ctx;
    BlockBackend *blk;
    char *node;             /* name of the protocol node */
    uint64_t blocks;        /* of --block-size, in the file */

    BenchSlot *slots;
    unsigned nr_slots;
    unsigned in_flight;
    QEMUBH *resend_bh;
    QSIMPLEQ_HEAD(, BenchSlot) ready;
    BenchSlot flush_slot;
    bool flush_busy;

    uint64_t random;        /* state */
    uint64_t stride;        /* of --once */
    uint64_t started;       /* requests */
    uint64_t writes;
    uint64_t verified;
    uint64_t written[READ_BACK];    /* offsets, a ring */
    uint64_t nr_written;
    uint64_t completed;     /* atomic: measured requests; read by the monitor */

    BenchHist hist[BENCH_KIND__MAX];
    BenchHeart heart;
    QEMUTimer *heart_timer;
};

/* What the process has used until a point in time. */
typedef struct BenchUsage {
    int64_t time;           /* ns */
    int64_t user, system;   /* us */
    int64_t switches;
    uint64_t completed;
} BenchUsage;

/* Options; constant once the loops run. */
static struct {
    char *format, *cache, *aio, *loop, *pattern, *resend, *prepare, *page_cache;
    char *block_size_str, *size_str;
    int64_t poll_max_ns;
    int iothreads, segments, depth, write_percent, flush_every, storm;
    int64_t seed, count, heartbeat_us;
    double seconds, warmup;
    gboolean once;

    uint64_t block_size, size;
    bool sequential, resend_from_completion, main_loop, zero_ok;
} opt = {
    .poll_max_ns = 32768, /* IOTHREAD_POLL_MAX_NS_DEFAULT of iothread.c */
    .iothreads = 1, .segments = 1, .depth = 1, .seed = 1, .count = -1,
    .heartbeat_us = 1000, .seconds = 1, .warmup = -1,
};

static BenchLoop *loops;

/*
 * Atomic.  Relaxed, but for phase: it is set after the times, and read before
 * them, so it is stored with release and loaded with acquire.
 */
static BenchPhase phase;
static int64_t run_from = INT64_MAX;    /* ns */
static int64_t run_to = INT64_MAX;      /* ns */
static unsigned loops_running;
static int64_t done_at;                 /* ns; by the last loop; 0 before */

/* Belong to the monitor while it runs. */
static struct {
    IOThread *iothread;
    BenchHeart heart;
    QEMUTimer *timer;
    int64_t created, threads_at;
    int threads_before, threads_peak;
    bool started, ended;
    BenchUsage begin, end;
} monitor;

/* Never returns. The one line on stderr that a failure has. */
static G_NORETURN G_GNUC_PRINTF(2, 3)
void fail(int status, const char *fmt, ...)
{
    g_autofree char *message = NULL;
    va_list ap;

    va_start(ap, fmt);
    message = g_strdup_vprintf(fmt, ap);
    va_end(ap);
    fprintf(stderr, "raw-aio-bench: %s\n", message);
    /* From any thread, with requests in flight: nothing is torn down. */
    _exit(status);
}

static int64_t now_ns(void)
{
    return qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
}

/* Finaliser of SplitMix64 (Steele, Lea, Flood 2014). */
static uint64_t mix64(uint64_t x)
{
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

/*
 * The data: in each sector a marker made of its offset and the run that wrote
 * it, then the number of that run, then always the same words.  A run may so
 * find what any earlier one has written, and knows its own.
 */

/* Of this run; its preparation has another.  Constant once the loops run. */
static uint64_t run_id;

static uint64_t marker(uint64_t offset, uint64_t id)
{
    return mix64((offset / SECTOR + UINT64_C(0x9e3779b97f4a7c15)) ^ mix64(id));
}

static uint64_t filler(unsigned word)
{
    return mix64(word);
}

static void pattern_init(uint8_t *buf, size_t len)
{
    for (size_t i = 0; i < len; i += sizeof(uint64_t)) {
        stq_he_p(buf + i, filler(i % SECTOR / sizeof(uint64_t)));
    }
}

static void pattern_mark(uint8_t *buf, size_t len, uint64_t offset)
{
    for (size_t i = 0; i < len; i += SECTOR) {
        stq_he_p(buf + i, marker(offset + i, run_id));
        stq_he_p(buf + i + sizeof(uint64_t), run_id);
    }
}

/* @own: only what this run has written will do */
static bool sector_ok(const uint8_t *buf, uint64_t offset, bool own)
{
    uint64_t id = ldq_he_p(buf + sizeof(uint64_t));

    if (!own && opt.zero_ok && buffer_is_zero(buf, SECTOR)) {
        return true;
    }
    if (ldq_he_p(buf) != marker(offset, id) || (own && id != run_id)) {
        return false;
    }
    for (unsigned i = 2; i < SECTOR / sizeof(uint64_t); i++) {
        if (ldq_he_p(buf + i * sizeof(uint64_t)) != filler(i)) {
            return false;
        }
    }
    return true;
}

static void pattern_verify(const uint8_t *buf, size_t len, uint64_t offset,
                           bool own)
{
    for (size_t i = 0; i < len; i += SECTOR) {
        if (!sector_ok(buf + i, offset + i, own)) {
            fail(EXIT_WRONG_DATA, "wrong data at offset %" PRIu64 "%s",
                 offset + i,
                 !own && g_str_equal(opt.prepare, "keep")
                 ? " (was the file made with --prepare write?)" : "");
        }
    }
}

/* --- requests --- */

static uint64_t random_next(BenchLoop *loop)
{
    loop->random += UINT64_C(0x9e3779b97f4a7c15);
    return mix64(loop->random);
}

static uint64_t gcd(uint64_t a, uint64_t b)
{
    return b ? gcd(b, a % b) : a;
}

/* Each block once, in an order that is far from ascending. */
static uint64_t once_stride(uint64_t blocks)
{
    uint64_t stride = MAX(blocks * 0.618, 1);

    while (gcd(stride, blocks) != 1) {
        stride++;
    }
    return stride;
}

static uint64_t next_block(BenchLoop *loop)
{
    uint64_t n = loop->started;

    if (opt.sequential) {
        return n % loop->blocks;
    }
    if (opt.once) {
        return n % loop->blocks * loop->stride % loop->blocks;
    }
    return random_next(loop) % loop->blocks;
}

static bool loop_may_start(const BenchLoop *loop)
{
    if (qatomic_load_acquire(&phase) == PHASE_STOP) {
        return false;
    }
    return !(opt.once && loop->started == loop->blocks) &&
           !(opt.count >= 0 && loop->started == opt.count);
}

static void loop_finish_bh(void *opaque);
static void slot_cb(void *opaque, int ret);

/* A request may be done before the call that sent it returns. */
static bool loop_idle(const BenchLoop *loop)
{
    return loop->in_flight == 0 && QSIMPLEQ_EMPTY(&loop->ready);
}

static void loop_check_idle(BenchLoop *loop)
{
    if (loop_idle(loop)) {
        aio_bh_schedule_oneshot(loop->ctx, loop_finish_bh, loop);
    }
}

static void slot_prepare(BenchSlot *slot)
{
    BenchLoop *loop = slot->loop;

    if (slot->storm) {
        slot->kind = slot->kind == BENCH_WRITE ? BENCH_FLUSH : BENCH_WRITE;
        slot->offset = random_next(loop) % loop->blocks * opt.block_size;
    } else {
        bool write = opt.write_percent == 100 ||
                     random_next(loop) % 100 < opt.write_percent;

        slot->kind = write ? BENCH_WRITE : BENCH_READ;
        slot->offset = next_block(loop) * opt.block_size;
        loop->started++;
    }
    slot->verify = slot->kind == BENCH_READ &&
                   random_next(loop) % VERIFY_EVERY == 0;
    for (int i = 0, at = 0; i < opt.segments; i++) {
        struct iovec *iov = &slot->qiov.iov[i];

        if (slot->kind == BENCH_WRITE) {
            if (opt.zero_ok && opt.write_percent < 100) {
                /* It may have read zeroes from a hole. */
                pattern_init(iov->iov_base, iov->iov_len);
            }
            pattern_mark(iov->iov_base, iov->iov_len, slot->offset + at);
        } else if (slot->verify) {
            /* What the request leaves out must not look right. */
            memset(iov->iov_base, 0xa5, iov->iov_len);
        }
        at += iov->iov_len;
    }
}

static void slot_send(BenchSlot *slot)
{
    BenchLoop *loop = slot->loop;

    loop->in_flight++;
    slot->start = now_ns();
    switch (slot->kind) {
    case BENCH_READ:
        blk_aio_preadv(loop->blk, slot->offset, &slot->qiov, 0, slot_cb, slot);
        break;
    case BENCH_WRITE:
        blk_aio_pwritev(loop->blk, slot->offset, &slot->qiov, 0, slot_cb,
                        slot);
        break;
    case BENCH_FLUSH:
        blk_aio_flush(loop->blk, slot_cb, slot);
        break;
    default:
        g_assert_not_reached();
    }
}

static void slot_verify(BenchSlot *slot)
{
    for (int i = 0, at = 0; i < opt.segments; i++) {
        struct iovec *iov = &slot->qiov.iov[i];

        pattern_verify(iov->iov_base, iov->iov_len, slot->offset + at, false);
        at += iov->iov_len;
    }
    slot->loop->verified++;
}

static void slot_cb(void *opaque, int ret)
{
    BenchSlot *slot = opaque;
    BenchLoop *loop = slot->loop;
    int64_t end = now_ns();
    BenchPhase now = qatomic_load_acquire(&phase);

    if (ret < 0) {
        fail(EXIT_FAILURE, "%s at offset %" PRIu64 ": %s",
             kind_name[slot->kind], slot->offset, strerror(-ret));
    }
    if (slot->verify) {
        slot_verify(slot);
    } else if (slot->kind == BENCH_WRITE) {
        loop->written[loop->nr_written++ % READ_BACK] = slot->offset;
    }
    /* Those that the end has found in flight may be the longest. */
    if (now == PHASE_RUN ||
        (now == PHASE_STOP && slot->start >= qatomic_read(&run_from) &&
         slot->start < qatomic_read(&run_to))) {
        bench_hist_add(&loop->hist[slot->kind], end - slot->start);
    }
    if (now == PHASE_RUN) {
        if (!slot->storm && !slot->only_flush) {
            /* Read by usage_now() in the monitor; only this thread writes. */
            qatomic_set(&loop->completed, loop->completed + 1);
        }
    }

    loop->in_flight--;
    if (slot->only_flush) {
        loop->flush_busy = false;
    } else {
        if (slot->kind == BENCH_WRITE && !slot->storm && opt.flush_every &&
            ++loop->writes % opt.flush_every == 0 && !loop->flush_busy) {
            loop->flush_busy = true;
            slot_send(&loop->flush_slot);
        }
        if (loop_may_start(loop)) {
            if (opt.resend_from_completion) {
                slot_prepare(slot);
                slot_send(slot);
            } else {
                QSIMPLEQ_INSERT_TAIL(&loop->ready, slot, next);
                qemu_bh_schedule(loop->resend_bh);
            }
        }
    }
    loop_check_idle(loop);
}

/*
 * As a device does when the guest has put new requests into its queue: all of
 * them, with batching allowed.
 */
static void loop_resend_bh(void *opaque)
{
    BenchLoop *loop = opaque;
    BenchSlot *slot;
    QSIMPLEQ_HEAD(, BenchSlot) todo = QSIMPLEQ_HEAD_INITIALIZER(todo);

    QSIMPLEQ_CONCAT(&todo, &loop->ready);
    defer_call_begin();
    while ((slot = QSIMPLEQ_FIRST(&todo))) {
        QSIMPLEQ_REMOVE_HEAD(&todo, next);
        if (loop_may_start(loop)) {
            slot_prepare(slot);
            slot_send(slot);
        }
    }
    defer_call_end();
    loop_check_idle(loop);
}

static void loop_heartbeat(void *opaque)
{
    BenchLoop *loop = opaque;
    int64_t from = qatomic_read(&run_from), to = qatomic_read(&run_to);

    timer_mod(loop->heart_timer,
              bench_heart_beat(&loop->heart, now_ns(), from, to));
}

static void loop_start_bh(void *opaque)
{
    BenchLoop *loop = opaque;

    bench_heart_init(&loop->heart, now_ns(), opt.heartbeat_us * SCALE_US);
    loop->heart_timer = aio_timer_new(loop->ctx, QEMU_CLOCK_REALTIME, SCALE_NS,
                                      loop_heartbeat, loop);
    timer_mod(loop->heart_timer, loop->heart.due);
    loop->resend_bh = aio_bh_new(loop->ctx, loop_resend_bh, loop);
    for (unsigned i = 0; i < loop->nr_slots; i++) {
        QSIMPLEQ_INSERT_TAIL(&loop->ready, &loop->slots[i], next);
    }
    loop_resend_bh(loop);
}

/* In the main thread, which waits for it. */
static bool all_done;

static void set_flag_bh(void *opaque)
{
    bool *flag = opaque;

    *flag = true;
}

/* The last request of the loop is done. */
static void loop_finish_bh(void *opaque)
{
    BenchLoop *loop = opaque;

    if (!loop->heart_timer || !loop_idle(loop)) {
        return;
    }
    /* Beats that this loop was too busy to serve. */
    bench_heart_beat(&loop->heart, now_ns(), qatomic_read(&run_from),
                     qatomic_read(&run_to));
    timer_free(loop->heart_timer);
    loop->heart_timer = NULL;
    qemu_bh_delete(loop->resend_bh);
    if (qatomic_fetch_dec(&loops_running) == 1) {
        qatomic_set(&done_at, now_ns());
        aio_bh_schedule_oneshot(qemu_get_aio_context(), set_flag_bh,
                                &all_done);
    }
}

/* --- the monitor: phases, threads, and the heartbeat of an idle loop --- */

static int count_threads(void)
{
    g_autofree char *text = NULL;
    const char *line;

    if (!g_file_get_contents("/proc/self/status", &text, NULL, NULL)) {
        return 0;
    }
    line = strstr(text, "\nThreads:");
    return line ? atoi(line + strlen("\nThreads:")) : 0;
}

static int64_t timeval_us(struct timeval tv)
{
    return tv.tv_sec * INT64_C(1000000) + tv.tv_usec;
}

/* Of the process, but for the thread that calls this. */
static BenchUsage usage_now(void)
{
    struct rusage all, own;
    BenchUsage usage = { .time = now_ns() };

    for (int i = 0; i < opt.iothreads; i++) {
        /* Written by slot_cb() in the loop's thread. */
        usage.completed += qatomic_read(&loops[i].completed);
    }
    getrusage(RUSAGE_SELF, &all);
    getrusage(RUSAGE_THREAD, &own);
    usage.user = timeval_us(all.ru_utime) - timeval_us(own.ru_utime);
    usage.system = timeval_us(all.ru_stime) - timeval_us(own.ru_stime);
    usage.switches = all.ru_nvcsw + all.ru_nivcsw -
                     own.ru_nvcsw - own.ru_nivcsw;
    return usage;
}

static void monitor_set_phase(BenchPhase p)
{
    /* Pairs with qatomic_load_acquire() in loop_may_start() and slot_cb(). */
    qatomic_store_release(&phase, p);
}

static void monitor_begin(void)
{
    monitor.begin = usage_now();
    monitor.started = true;
    qatomic_set(&run_from, monitor.begin.time);
    monitor_set_phase(PHASE_RUN);
}

static void monitor_end(void)
{
    int64_t done = qatomic_read(&done_at);

    monitor.end = usage_now();
    if (done) {
        /* Nothing has run since. */
        monitor.end.time = done;
    }
    monitor.ended = true;
    qatomic_set(&run_to, monitor.end.time);
    monitor_set_phase(PHASE_STOP);
}

static void monitor_beat(void *opaque)
{
    int64_t now = now_ns();
    int64_t due = bench_heart_beat(&monitor.heart, now, qatomic_read(&run_from),
                                   qatomic_read(&run_to));

    if (now >= monitor.threads_at) {
        monitor.threads_peak = MAX(monitor.threads_peak, count_threads());
        monitor.threads_at = now + THREADS_EVERY;
    }
    if (!monitor.started && now >= monitor.created + opt.warmup * 1e9) {
        monitor_begin();
    }
    if (monitor.started && !monitor.ended) {
        if (qatomic_read(&done_at) ||
            (opt.count < 0 && !opt.once &&
             now >= monitor.begin.time + opt.seconds * 1e9)) {
            monitor_end();
        }
    }
    timer_mod(monitor.timer, due);
}

static void monitor_start_bh(void *opaque)
{
    AioContext *ctx = iothread_get_aio_context(monitor.iothread);

    monitor.created = now_ns();
    bench_heart_init(&monitor.heart, monitor.created,
                     opt.heartbeat_us * SCALE_US);
    monitor.timer = aio_timer_new(ctx, QEMU_CLOCK_REALTIME, SCALE_NS,
                                  monitor_beat, NULL);
    if (opt.warmup == 0) {
        monitor_begin();
    }
    timer_mod(monitor.timer, monitor.heart.due);
    for (int i = 0; i < opt.iothreads; i++) {
        aio_bh_schedule_oneshot(loops[i].ctx, loop_start_bh, &loops[i]);
    }
}

static void monitor_stop_bh(void *opaque)
{
    bool *stopped = opaque;

    if (!monitor.ended) {
        monitor_end();
    }
    monitor.threads_peak = MAX(monitor.threads_peak, count_threads());
    timer_free(monitor.timer);
    aio_bh_schedule_oneshot(qemu_get_aio_context(), set_flag_bh, stopped);
}

/* --- files --- */

static char *loop_file(const char *file, int i)
{
    return opt.iothreads == 1 ? g_strdup(file)
                              : g_strdup_printf("%s.%d", file, i);
}

static bool is_block_device(const char *file)
{
    struct stat st;

    return stat(file, &st) == 0 && S_ISBLK(st.st_mode);
}

static void write_pattern(int fd, const char *file)
{
    size_t chunk = 1 * MiB;
    uint8_t *buf = qemu_memalign(4096, chunk);

    pattern_init(buf, chunk);
    for (uint64_t at = 0; at < opt.size; at += chunk) {
        size_t len = MIN(chunk, opt.size - at);

        pattern_mark(buf, len, at);
        if (pwrite(fd, buf, len, at) != len) {
            fail(EXIT_FAILURE, "could not write %s: %s", file,
                 strerror(errno ?: ENOSPC));
        }
    }
    if (fsync(fd) < 0) {
        fail(EXIT_FAILURE, "could not write %s: %s", file, strerror(errno));
    }
    qemu_vfree(buf);
}

static void prepare_file(const char *file)
{
    bool block = is_block_device(file);
    bool write = g_str_equal(opt.prepare, "write");
    int fd, ret = 0;

    if (g_str_equal(opt.prepare, "keep")) {
        return;
    }
    if (block && !write) {
        fail(EXIT_USAGE, "%s is a block device: --prepare write or keep", file);
    }
    if (!g_str_equal(opt.format, "raw")) {
        Error *err = NULL;

        if (!g_str_equal(opt.prepare, "punch")) {
            fail(EXIT_USAGE, "--format %s: --prepare punch or keep",
                 opt.format);
        }
        bdrv_img_create(file, opt.format, NULL, NULL, NULL, opt.size, 0, true,
                        &err);
        if (err) {
            fail(EXIT_FAILURE, "%s", error_get_pretty(err));
        }
        return;
    }
    fd = open(file, O_RDWR | O_CLOEXEC | (block ? 0 : O_CREAT), 0600);
    if (fd < 0) {
        fail(EXIT_FAILURE, "could not open %s: %s", file, strerror(errno));
    }
    if (!block) {
        /* Anew, but in place of the blocks that it has, if all is written. */
        ret = write ? 0 : ftruncate(fd, 0);
        ret = ret ?: ftruncate(fd, opt.size);
    }
    if (ret == 0 && g_str_equal(opt.prepare, "falloc")) {
        ret = posix_fallocate(fd, 0, opt.size);
        errno = ret;
    }
    if (ret) {
        fail(EXIT_FAILURE, "could not prepare %s: %s", file, strerror(errno));
    }
    if (write) {
        write_pattern(fd, file);
    }
    close(fd);
}

static void prepare_page_cache(const char *file)
{
    size_t chunk = 1 * MiB;
    int fd, ret = 0;

    if (g_str_equal(opt.page_cache, "keep")) {
        return;
    }
    fd = open(file, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        fail(EXIT_FAILURE, "could not open %s: %s", file, strerror(errno));
    }
    if (g_str_equal(opt.page_cache, "drop")) {
        /* Only clean pages can be dropped. */
        ret = fsync(fd) < 0 ? errno : posix_fadvise(fd, 0, 0,
                                                    POSIX_FADV_DONTNEED);
    } else {
        g_autofree uint8_t *buf = g_malloc(chunk);
        uint64_t at = 0;
        ssize_t len;

        while ((len = pread(fd, buf, chunk, at)) > 0) {
            at += len;
        }
        ret = len < 0 ? errno : 0;
    }
    if (ret) {
        fail(EXIT_FAILURE, "page cache of %s: %s", file, strerror(ret));
    }
    close(fd);
}

/* --- set-up and tear-down, in the main thread --- */

static void slot_init(BenchLoop *loop, BenchSlot *slot)
{
    size_t len = opt.block_size / opt.segments;
    size_t step = opt.segments > 1 ? len + SEGMENT_GAP : len;

    slot->loop = loop;
    slot->buf = blk_blockalign(loop->blk, step * opt.segments);
    qemu_iovec_init(&slot->qiov, opt.segments);
    for (int i = 0; i < opt.segments; i++) {
        pattern_init(slot->buf + i * step, len);
        qemu_iovec_add(&slot->qiov, slot->buf + i * step, len);
    }
}

static void slot_destroy(BenchSlot *slot)
{
    qemu_iovec_destroy(&slot->qiov);
    qemu_vfree(slot->buf);
}

static BlockBackend *open_file(const char *file, const char *node)
{
    QDict *options = qdict_new();
    int flags = opt.write_percent || opt.storm ? BDRV_O_RDWR : 0;
    bool writethrough;
    Error *err = NULL;
    BlockBackend *blk;

    if (bdrv_parse_cache_mode(opt.cache, &flags, &writethrough) < 0) {
        fail(EXIT_USAGE, "--cache: writeback, writethrough, none, directsync "
             "or unsafe, not '%s'", opt.cache);
    }
    qdict_put_str(options, "driver", opt.format);
    qdict_put_str(options, "file.driver",
                  is_block_device(file) ? "host_device" : "file");
    qdict_put_str(options, "file.filename", file);
    qdict_put_str(options, "file.node-name", node);
    qdict_put_str(options, "file.aio", opt.aio);
    blk = blk_new_open(NULL, NULL, options, flags, &err);
    if (!blk) {
        /* "aio=... was specified, but ..." */
        fail(strstr(error_get_pretty(err), "aio=") ? EXIT_REFUSED
                                                   : EXIT_FAILURE,
             "%s", error_get_pretty(err));
    }
    blk_set_enable_write_cache(blk, !writethrough);
    return blk;
}

static void loop_init(BenchLoop *loop, int i, const char *file)
{
    g_autofree char *own = loop_file(file, i);
    int64_t length;

    loop->node = g_strdup_printf("bench-%d", i);
    loop->blk = open_file(own, loop->node);
    length = blk_getlength(loop->blk);
    if (length < 0) {
        fail(EXIT_FAILURE, "length of %s: %s", own, strerror(-length));
    }
    if (opt.size) {
        length = MIN(length, opt.size);
    }
    loop->blocks = length / opt.block_size;
    if (loop->blocks == 0) {
        fail(EXIT_USAGE, "%s is shorter than --block-size", own);
    }
    loop->random = opt.seed * UINT64_C(1000003) + i;
    loop->stride = once_stride(loop->blocks);
    QSIMPLEQ_INIT(&loop->ready);

    loop->nr_slots = opt.depth + opt.storm;
    loop->slots = g_new0(BenchSlot, loop->nr_slots);
    for (unsigned s = 0; s < loop->nr_slots; s++) {
        slot_init(loop, &loop->slots[s]);
        loop->slots[s].storm = s >= opt.depth;
    }
    loop->flush_slot = (BenchSlot) {
        .loop = loop, .kind = BENCH_FLUSH, .only_flush = true,
    };

    if (opt.main_loop) {
        loop->ctx = qemu_get_aio_context();
    } else {
        loop->iothread = iothread_new();
        loop->ctx = iothread_get_aio_context(loop->iothread);
        aio_context_set_poll_params(loop->ctx, opt.poll_max_ns, 0, 0,
                                    &error_abort);
        blk_set_aio_context(loop->blk, loop->ctx, &error_fatal);
    }
}

/* Written data count when they can be read again. */
static void loop_read_back(BenchLoop *loop)
{
    uint8_t *buf = blk_blockalign(loop->blk, opt.block_size);

    for (int i = 0; i < MIN(loop->nr_written, READ_BACK); i++) {
        uint64_t offset = loop->written[i];
        int ret;

        memset(buf, 0xa5, opt.block_size);
        ret = blk_pread(loop->blk, offset, opt.block_size, buf, 0);
        if (ret < 0) {
            fail(EXIT_FAILURE, "read back at offset %" PRIu64 ": %s", offset,
                 strerror(-ret));
        }
        pattern_verify(buf, opt.block_size, offset, true);
        loop->verified++;
    }
    qemu_vfree(buf);
}

/* What the engine has counted for the file; NULL if it counts nothing. */
static QDict *loop_tiers(BenchLoop *loop)
{
    BlockDriverState *bs = bdrv_find_node(loop->node);
    BlockStatsSpecific *stats = bdrv_get_specific_stats(bs);
    QDict *tiers = NULL;
    QObject *object = NULL;
    Visitor *v;

    if (!stats) {
        return NULL;
    }
    v = qobject_output_visitor_new(&object);
    visit_type_BlockStatsSpecific(v, NULL, &stats, &error_abort);
    visit_complete(v, &object);
    visit_free(v);
    qapi_free_BlockStatsSpecific(stats);
    tiers = qdict_get_qdict(qobject_to(QDict, object), "aio");
    qobject_ref(tiers);
    qobject_unref(object);
    return tiers;
}

static void loop_destroy(BenchLoop *loop)
{
    blk_unref(loop->blk);
    if (loop->iothread) {
        iothread_join(loop->iothread);
    }
    for (unsigned s = 0; s < loop->nr_slots; s++) {
        slot_destroy(&loop->slots[s]);
    }
    g_free(loop->slots);
    g_free(loop->node);
}

static void run(void)
{
    AioContext *monitor_ctx;
    bool stopped = false;

    monitor.iothread = iothread_new();
    monitor_ctx = iothread_get_aio_context(monitor.iothread);
    qatomic_set(&loops_running, opt.iothreads);
    aio_bh_schedule_oneshot(monitor_ctx, monitor_start_bh, NULL);
    while (!all_done) {
        main_loop_wait(false);
    }
    aio_bh_schedule_oneshot(monitor_ctx, monitor_stop_bh, &stopped);
    while (!stopped) {
        main_loop_wait(false);
    }
    iothread_join(monitor.iothread);
}

/* --- the report --- */

static void put_number(QDict *dict, const char *key, double value)
{
    qdict_put(dict, key, qnum_from_double(round(value * 1000) / 1000));
}

static void put_ns(QDict *dict, const char *key, uint64_t ns)
{
    put_number(dict, key, ns / 1000.0);
}

static QDict *latency_dict(const BenchHist *hist)
{
    QDict *dict = qdict_new();

    put_ns(dict, "p50", bench_hist_percentile(hist, 0.5));
    put_ns(dict, "p90", bench_hist_percentile(hist, 0.9));
    put_ns(dict, "p99", bench_hist_percentile(hist, 0.99));
    put_ns(dict, "p999", bench_hist_percentile(hist, 0.999));
    put_ns(dict, "max", hist->max);
    return dict;
}

static QDict *tiers_dict(void)
{
    QDict *sum = NULL;

    for (int i = 0; i < opt.iothreads; i++) {
        QDict *tiers = loop_tiers(&loops[i]);
        const QDictEntry *e;

        if (!tiers || !sum) {
            sum = sum ?: tiers;
            continue;
        }
        for (e = qdict_first(tiers); e; e = qdict_next(tiers, e)) {
            const char *key = qdict_entry_key(e);

            if (qobject_type(qdict_entry_value(e)) == QTYPE_QNUM) {
                qdict_put_int(sum, key, qdict_get_try_int(sum, key, 0) +
                                        qdict_get_int(tiers, key));
            }
        }
        qobject_unref(tiers);
    }
    return sum;
}

static void print_report(void)
{
    BenchUsage *b = &monitor.begin, *e = &monitor.end;
    uint64_t requests = e->completed - b->completed;
    double n = MAX(requests, 1);
    BenchKind kind = opt.write_percent == 100 ? BENCH_WRITE : BENCH_READ;
    QDict *report = qdict_new(), *cpu = qdict_new(), *kinds = qdict_new();
    QDict *stall = qdict_new(), *tiers = tiers_dict();
    BenchHist *hist = g_new0(BenchHist, BENCH_KIND__MAX);
    BenchHist *late = g_new0(BenchHist, 1), *floor = &monitor.heart.late;
    uint64_t verified = 0;
    GString *json;

    for (int i = 0; i < opt.iothreads; i++) {
        for (int k = 0; k < BENCH_KIND__MAX; k++) {
            bench_hist_merge(&hist[k], &loops[i].hist[k]);
        }
        bench_hist_merge(late, &loops[i].heart.late);
        verified += loops[i].verified;
    }

    qdict_put_int(report, "requests", requests);
    put_number(report, "seconds", (e->time - b->time) / 1e9);
    put_number(report, "us_per_request", (e->time - b->time) / 1e3 / n);
    put_number(cpu, "user", (e->user - b->user) / n);
    put_number(cpu, "system", (e->system - b->system) / n);
    put_number(cpu, "total",
               (e->user - b->user + e->system - b->system) / n);
    qdict_put(report, "cpu_us_per_request", cpu);
    put_number(report, "switches_per_request",
               (e->switches - b->switches) / n);
    qdict_put(report, "latency_us", latency_dict(&hist[kind]));
    for (int k = 0; k < BENCH_KIND__MAX; k++) {
        if (hist[k].count) {
            QDict *dict = latency_dict(&hist[k]);

            qdict_put_int(dict, "requests", hist[k].count);
            qdict_put(kinds, kind_name[k], dict);
        }
    }
    qdict_put(report, "latency_by_kind", kinds);
    put_ns(stall, "p99", bench_hist_percentile(late, 0.99));
    put_ns(stall, "p999", bench_hist_percentile(late, 0.999));
    put_ns(stall, "max", late->max);
    put_ns(stall, "floor_p99", bench_hist_percentile(floor, 0.99));
    put_ns(stall, "floor_p999", bench_hist_percentile(floor, 0.999));
    put_ns(stall, "floor_max", floor->max);
    qdict_put(report, "stall_us", stall);
    qdict_put_int(report, "threads_peak",
                  MAX(0, monitor.threads_peak - monitor.threads_before));
    qdict_put_int(report, "verified", verified);
    if (tiers) {
        qdict_put(report, "tiers", tiers);
    } else {
        qdict_put_null(report, "tiers");
    }

    json = qobject_to_json_pretty(QOBJECT(report), true);
    puts(json->str);
    g_string_free(json, true);
    qobject_unref(report);
    g_free(hist);
    g_free(late);
}

/* --- options --- */

static void one_of(const char *name, char **value, const char *first, ...)
{
    g_autoptr(GString) choices = g_string_new(first);
    const char *choice = first;
    va_list ap;

    if (!*value) {
        *value = g_strdup(first);
        return;
    }
    va_start(ap, first);
    do {
        if (g_str_equal(*value, choice)) {
            va_end(ap);
            return;
        }
        choice = va_arg(ap, const char *);
        if (choice) {
            g_string_append_printf(choices, " or %s", choice);
        }
    } while (choice);
    va_end(ap);
    fail(EXIT_USAGE, "--%s: %s, not '%s'", name, choices->str, *value);
}

static uint64_t size_option(const char *name, const char *value,
                            uint64_t otherwise)
{
    uint64_t size = otherwise;

    if (value && qemu_strtosz(value, NULL, &size) < 0) {
        fail(EXIT_USAGE, "--%s: a size such as 4K or 512M, not '%s'", name,
             value);
    }
    return size;
}

static void check_range(const char *name, int64_t value, int64_t min,
                        int64_t max)
{
    if (value < min || value > max) {
        fail(EXIT_USAGE, "--%s: from %" PRId64 " to %" PRId64 ", not %" PRId64,
             name, min, max, value);
    }
}

static char *parse_options(int argc, char **argv)
{
    const GOptionEntry entries[] = {
        { "format", 0, 0, G_OPTION_ARG_STRING, &opt.format,
          "raw (default) or qcow2", "F" },
        { "cache", 0, 0, G_OPTION_ARG_STRING, &opt.cache,
          "writeback (default), writethrough, none, directsync, unsafe", "M" },
        { "aio", 0, 0, G_OPTION_ARG_STRING, &opt.aio,
          "threads (default), native, io_uring", "A" },
        { "loop", 0, 0, G_OPTION_ARG_STRING, &opt.loop,
          "send from an iothread (default) or the main loop", "L" },
        { "poll-max-ns", 0, 0, G_OPTION_ARG_INT64, &opt.poll_max_ns,
          "of the IOThread (default 32768, as in QEMU)", "N" },
        { "iothreads", 0, 0, G_OPTION_ARG_INT, &opt.iothreads,
          "so many loops, each with its own file FILE.0, FILE.1, ...", "N" },
        { "pattern", 0, 0, G_OPTION_ARG_STRING, &opt.pattern,
          "random (default) or sequential", "P" },
        { "seed", 0, 0, G_OPTION_ARG_INT64, &opt.seed,
          "of the random offsets (default 1)", "N" },
        { "block-size", 0, 0, G_OPTION_ARG_STRING, &opt.block_size_str,
          "bytes of a request (default 4K)", "SIZE" },
        { "segments", 0, 0, G_OPTION_ARG_INT, &opt.segments,
          "elements of a request's iovec (default 1)", "N" },
        { "depth", 0, 0, G_OPTION_ARG_INT, &opt.depth,
          "requests in flight in each loop (default 1)", "N" },
        { "write-percent", 0, 0, G_OPTION_ARG_INT, &opt.write_percent,
          "so many of 100 requests write (default 0)", "N" },
        { "flush-every", 0, 0, G_OPTION_ARG_INT, &opt.flush_every,
          "a flush after so many writes (default: none)", "N" },
        { "storm", 0, 0, G_OPTION_ARG_INT, &opt.storm,
          "so many chains of write and flush beside the requests", "N" },
        { "resend", 0, 0, G_OPTION_ARG_STRING, &opt.resend,
          "from the loop (default) or from the completion", "FROM" },
        { "once", 0, 0, G_OPTION_ARG_NONE, &opt.once,
          "each block once, then stop", NULL },
        { "seconds", 0, 0, G_OPTION_ARG_DOUBLE, &opt.seconds,
          "time to measure (default 1)", "S" },
        { "count", 0, 0, G_OPTION_ARG_INT64, &opt.count,
          "so many requests in each loop instead; 0: only prepare", "N" },
        { "warmup", 0, 0, G_OPTION_ARG_DOUBLE, &opt.warmup,
          "time before (default 0.05; 0 with --count or --once)", "S" },
        { "size", 0, 0, G_OPTION_ARG_STRING, &opt.size_str,
          "length of the file (default: as it is)", "SIZE" },
        { "prepare", 0, 0, G_OPTION_ARG_STRING, &opt.prepare,
          "keep (default), write, falloc or punch the file", "P" },
        { "page-cache", 0, 0, G_OPTION_ARG_STRING, &opt.page_cache,
          "keep (default), warm or drop what is cached of it", "P" },
        { "heartbeat-us", 0, 0, G_OPTION_ARG_INT64, &opt.heartbeat_us,
          "period of the heartbeat (default 1000)", "N" },
        { NULL },
    };
    g_autoptr(GOptionContext) context =
        g_option_context_new("FILE - measure file I/O of QEMU's block layer");
    g_autoptr(GError) err = NULL;
    bool fixed;

    g_option_context_add_main_entries(context, entries, NULL);
    if (!g_option_context_parse(context, &argc, &argv, &err)) {
        fail(EXIT_USAGE, "%s; see --help", err->message);
    }
    if (argc != 2) {
        fail(EXIT_USAGE, "one FILE is needed; see --help");
    }

    one_of("format", &opt.format, "raw", "qcow2", NULL);
    one_of("cache", &opt.cache, "writeback", "writethrough", "none",
           "directsync", "unsafe", NULL);
    one_of("aio", &opt.aio, "threads", "native", "io_uring", NULL);
    one_of("loop", &opt.loop, "iothread", "main", NULL);
    one_of("pattern", &opt.pattern, "random", "sequential", NULL);
    one_of("resend", &opt.resend, "loop", "completion", NULL);
    one_of("prepare", &opt.prepare, "keep", "write", "falloc", "punch", NULL);
    one_of("page-cache", &opt.page_cache, "keep", "warm", "drop", NULL);
    opt.sequential = g_str_equal(opt.pattern, "sequential");
    opt.resend_from_completion = g_str_equal(opt.resend, "completion");
    opt.main_loop = g_str_equal(opt.loop, "main");
    opt.zero_ok = g_str_equal(opt.prepare, "punch") ||
                  g_str_equal(opt.prepare, "falloc");
    opt.block_size = size_option("block-size", opt.block_size_str, 4096);
    opt.size = size_option("size", opt.size_str, 0);

    check_range("poll-max-ns", opt.poll_max_ns, 0, NANOSECONDS_PER_SECOND);
    check_range("iothreads", opt.iothreads, 1, opt.main_loop ? 1 : 64);
    check_range("segments", opt.segments, 1, 1024);
    check_range("depth", opt.depth, 1, 65536);
    check_range("write-percent", opt.write_percent, 0, 100);
    check_range("flush-every", opt.flush_every, 0, INT_MAX);
    check_range("storm", opt.storm, 0, 1024);
    check_range("heartbeat-us", opt.heartbeat_us, 10, 1000000);
    check_range("block-size", opt.block_size, SECTOR, 64 * MiB);
    if (opt.block_size % (SECTOR * opt.segments)) {
        fail(EXIT_USAGE, "--block-size is not a multiple of %d bytes in each "
             "segment", SECTOR);
    }
    if (opt.size % MAX(opt.block_size, 4096)) {
        fail(EXIT_USAGE, "--size is not a multiple of --block-size and 4K");
    }
    if (!opt.size && !g_str_equal(opt.prepare, "keep")) {
        fail(EXIT_USAGE, "--prepare %s needs --size", opt.prepare);
    }
    if (!(opt.seconds > 0 && opt.seconds <= 86400)) {
        fail(EXIT_USAGE, "--seconds: more than 0, at most 86400");
    }
    fixed = opt.once || opt.count >= 0;
    if (opt.warmup < 0) {
        opt.warmup = fixed ? 0 : 0.05;
    } else if (opt.warmup > 0 && fixed) {
        fail(EXIT_USAGE, "--warmup is for runs that --seconds ends");
    } else if (!(opt.warmup <= 86400)) {
        fail(EXIT_USAGE, "--warmup: from 0 to 86400");
    }
    return argv[1];
}

int main(int argc, char **argv)
{
    const char *file = parse_options(argc, argv);

    module_call_init(MODULE_INIT_TRACE);
    qemu_init_main_loop(&error_fatal);
    module_call_init(MODULE_INIT_QOM);
    bdrv_init();
    run_id = mix64(getpid() ^ mix64(g_get_real_time()));
    /* Before the first request: that of making an image is one. */
    monitor.threads_before = count_threads() + 1 +
                             (opt.main_loop ? 0 : opt.iothreads);

    for (int i = 0; i < opt.iothreads; i++) {
        g_autofree char *own = loop_file(file, i);

        prepare_file(own);
        prepare_page_cache(own);
    }
    if (opt.count == 0) {
        return 0;
    }
    /* What was only prepared must not pass for what a request has written. */
    run_id++;
    loops = g_new0(BenchLoop, opt.iothreads);
    for (int i = 0; i < opt.iothreads; i++) {
        loop_init(&loops[i], i, file);
    }
    run();
    for (int i = 0; i < opt.iothreads; i++) {
        blk_drain(loops[i].blk);
        if (!opt.main_loop) {
            blk_set_aio_context(loops[i].blk, qemu_get_aio_context(),
                                &error_fatal);
        }
        loop_read_back(&loops[i]);
    }
    print_report();
    for (int i = 0; i < opt.iothreads; i++) {
        loop_destroy(&loops[i]);
    }
    g_free(loops);
    return 0;
}
