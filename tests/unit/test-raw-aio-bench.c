/*
 * Tests of raw-aio-bench's arithmetic
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "block/aio.h"
#include "qapi/error.h"
#include "qemu/main-loop.h"
#include "qemu/timer.h"
#include "../bench/raw-aio-bench-stats.h"

#define MS INT64_C(1000000)

static int compare(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return x < y ? -1 : x > y;
}

static void assert_near(uint64_t found, uint64_t exact)
{
    g_assert_cmpuint(found, >=, exact);
    g_assert_cmpuint(found, <=, exact + exact / 128 + 1);
}

static void test_hist_empty(void)
{
    g_autofree BenchHist *hist = g_new0(BenchHist, 1);

    g_assert_cmpuint(bench_hist_percentile(hist, 0.5), ==, 0);
    g_assert_cmpuint(bench_hist_percentile(hist, 1), ==, 0);
}

static void test_hist_one(void)
{
    g_autofree BenchHist *hist = g_new0(BenchHist, 1);

    bench_hist_add(hist, 123456789);
    g_assert_cmpuint(bench_hist_percentile(hist, 0.001), ==, 123456789);
    g_assert_cmpuint(bench_hist_percentile(hist, 0.999), ==, 123456789);
    g_assert_cmpuint(bench_hist_percentile(hist, 1), ==, 123456789);
}

static void test_hist_extremes(void)
{
    g_autofree BenchHist *hist = g_new0(BenchHist, 1);

    bench_hist_add(hist, -5);
    bench_hist_add(hist, INT64_MAX);
    g_assert_cmpuint(hist->count, ==, 2);
    g_assert_cmpuint(bench_hist_percentile(hist, 0.5), ==, 0);
    g_assert_cmpuint(bench_hist_percentile(hist, 1), ==, INT64_MAX);
}

/* By nearest rank: 1..100 have 99 as their 99th percentile. */
static void test_hist_rank(void)
{
    g_autofree BenchHist *hist = g_new0(BenchHist, 1);

    for (int i = 1; i <= 100; i++) {
        bench_hist_add(hist, i);
    }
    g_assert_cmpuint(bench_hist_percentile(hist, 0.5), ==, 50);
    g_assert_cmpuint(bench_hist_percentile(hist, 0.9), ==, 90);
    g_assert_cmpuint(bench_hist_percentile(hist, 0.99), ==, 99);
    g_assert_cmpuint(bench_hist_percentile(hist, 0.991), ==, 100);
    g_assert_cmpuint(bench_hist_percentile(hist, 1), ==, 100);
}

/* Beside a sorted list, over many powers of two. */
static void test_hist_sorted(void)
{
    static const double fraction[] = { 0.01, 0.5, 0.9, 0.99, 0.999 };
    g_autofree BenchHist *hist = g_new0(BenchHist, 1);
    g_autofree uint64_t *list = g_new(uint64_t, 10000);

    for (int i = 0; i < 10000; i++) {
        list[i] = (uint64_t)(uint32_t)g_test_rand_int() <<
                  g_test_rand_int_range(0, 20) >>
                  g_test_rand_int_range(0, 31);
        bench_hist_add(hist, list[i]);
    }
    qsort(list, 10000, sizeof(*list), compare);
    for (int i = 0; i < ARRAY_SIZE(fraction); i++) {
        assert_near(bench_hist_percentile(hist, fraction[i]),
                    list[(int)(fraction[i] * 10000) - 1]);
    }
    g_assert_cmpuint(bench_hist_percentile(hist, 1), ==, list[9999]);
}

static void test_hist_merge(void)
{
    g_autofree BenchHist *a = g_new0(BenchHist, 1), *b = g_new0(BenchHist, 1);
    g_autofree BenchHist *both = g_new0(BenchHist, 1);

    for (int i = 0; i < 1000; i++) {
        uint64_t ns = (uint32_t)g_test_rand_int();

        bench_hist_add(i % 3 ? a : b, ns);
        bench_hist_add(both, ns);
    }
    bench_hist_merge(a, b);
    g_assert_cmpmem(a, sizeof(*a), both, sizeof(*both));
}

static void test_heart_punctual(void)
{
    g_autofree BenchHeart *heart = g_new(BenchHeart, 1);

    bench_heart_init(heart, 5 * MS, MS);
    g_assert_cmpint(heart->due, ==, 6 * MS);
    for (int i = 6; i < 106; i++) {
        g_assert_cmpint(bench_heart_beat(heart, i * MS + 100, 0, INT64_MAX),
                        ==, (i + 1) * MS);
    }
    g_assert_cmpuint(heart->late.count, ==, 100);
    g_assert_cmpuint(heart->late.max, ==, 100);
}

/* A stall of 20 ms in a second is 20 samples of a thousand, the worst 20 ms. */
static void test_heart_stall(void)
{
    g_autofree BenchHeart *heart = g_new(BenchHeart, 1);
    int64_t now, due;

    bench_heart_init(heart, 0, MS);
    for (now = MS; now <= 500 * MS; now += MS) {
        bench_heart_beat(heart, now, 0, INT64_MAX);
    }
    /* The beat of 501 ms and the 20 after it come at 521 ms. */
    due = bench_heart_beat(heart, 521 * MS, 0, INT64_MAX);
    g_assert_cmpint(due, ==, 522 * MS);
    for (now = due; now <= 1000 * MS; now += MS) {
        bench_heart_beat(heart, now, 0, INT64_MAX);
    }
    g_assert_cmpuint(heart->late.count, ==, 1000);
    g_assert_cmpuint(heart->late.max, ==, 20 * MS);
    /* Ten samples are above the 99th percentile: 20, 19, ..., 11 ms. */
    assert_near(bench_hist_percentile(&heart->late, 0.99), 10 * MS);
    assert_near(bench_hist_percentile(&heart->late, 0.999), 19 * MS);
    g_assert_cmpuint(bench_hist_percentile(&heart->late, 0.97), ==, 0);
}

/* Only what was due in the time of the measurement counts. */
static void test_heart_window(void)
{
    g_autofree BenchHeart *heart = g_new(BenchHeart, 1);

    bench_heart_init(heart, 0, MS);
    bench_heart_beat(heart, 100 * MS, 40 * MS, 60 * MS);
    g_assert_cmpuint(heart->late.count, ==, 20);
    g_assert_cmpuint(heart->late.max, ==, 60 * MS);
    g_assert_cmpuint(bench_hist_percentile(&heart->late, 0.001), >=, 41 * MS);
}

typedef struct Beating {
    BenchHeart heart;
    QEMUTimer *timer;
    int beats;
    int64_t blocked;    /* ns */
} Beating;

static void beat(void *opaque)
{
    Beating *b = opaque;

    int64_t now = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);

    timer_mod(b->timer, bench_heart_beat(&b->heart, now, 0, INT64_MAX));
    b->beats++;
}

static void block_bh(void *opaque)
{
    Beating *b = opaque;
    int64_t start = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);

    g_usleep(20 * 1000);
    b->blocked = qemu_clock_get_ns(QEMU_CLOCK_REALTIME) - start;
}

/* A real loop that is blocked for 20 ms shows 20 ms. */
static void test_heart_loop(void)
{
    AioContext *ctx = qemu_get_aio_context();
    g_autofree Beating *b = g_new0(Beating, 1);
    int64_t period = 200 * SCALE_US;

    bench_heart_init(&b->heart, qemu_clock_get_ns(QEMU_CLOCK_REALTIME), period);
    b->timer = aio_timer_new(ctx, QEMU_CLOCK_REALTIME, SCALE_NS, beat, b);
    timer_mod(b->timer, b->heart.due);
    while (b->beats < 20) {
        aio_poll(ctx, true);
    }
    aio_bh_schedule_oneshot(ctx, block_bh, b);
    while (b->beats < 40) {
        aio_poll(ctx, true);
    }
    timer_free(b->timer);

    g_assert_cmpint(b->blocked, >=, 20 * MS);
    /* A beat was due at most one period after the loop was blocked. */
    g_assert_cmpuint(b->heart.late.max, >=, b->blocked - period);
    g_test_message("blocked for %" PRId64 " ns, shown %" PRIu64 " ns",
                   b->blocked, b->heart.late.max);
    /* One sample for each beat that was left out. */
    g_assert_cmpuint(b->heart.late.count, >=, 40 + b->blocked / period - 1);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    qemu_init_main_loop(&error_abort);

    g_test_add_func("/bench/hist/empty", test_hist_empty);
    g_test_add_func("/bench/hist/one", test_hist_one);
    g_test_add_func("/bench/hist/extremes", test_hist_extremes);
    g_test_add_func("/bench/hist/rank", test_hist_rank);
    g_test_add_func("/bench/hist/sorted", test_hist_sorted);
    g_test_add_func("/bench/hist/merge", test_hist_merge);
    g_test_add_func("/bench/heart/punctual", test_heart_punctual);
    g_test_add_func("/bench/heart/stall", test_heart_stall);
    g_test_add_func("/bench/heart/window", test_heart_window);
    g_test_add_func("/bench/heart/loop", test_heart_loop);
    return g_test_run();
}
