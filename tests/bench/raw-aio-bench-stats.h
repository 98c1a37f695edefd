/*
 * Arithmetic of raw-aio-bench: percentiles, and how late an event loop is
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef RAW_AIO_BENCH_STATS_H
#define RAW_AIO_BENCH_STATS_H

/*
 * Each power of two is divided into so many buckets of equal width, hence a
 * percentile is at most 1/128 above the true value.
 */
#define BENCH_HIST_BITS     7
#define BENCH_HIST_BUCKETS  ((64 - BENCH_HIST_BITS + 1) << BENCH_HIST_BITS)

/**
 * BenchHist: distribution of durations in ns.
 *
 * Belongs to one thread at a time.  All zero is an empty one.
 */
typedef struct BenchHist {
    uint64_t count;
    uint64_t max;
    uint64_t bucket[BENCH_HIST_BUCKETS];
} BenchHist;

/**
 * bench_hist_add: count one duration.
 * @ns: a negative one counts as 0
 */
void bench_hist_add(BenchHist *hist, int64_t ns);

/**
 * bench_hist_merge: count in @hist what has been counted in @from.
 */
void bench_hist_merge(BenchHist *hist, const BenchHist *from);

/**
 * bench_hist_percentile: a percentile by nearest rank.
 * @fraction: above 0, at most 1; 0.99 is the 99th percentile
 *
 * Returns: a duration in ns that at least @fraction of all durations do not
 * exceed, at most 1/128 more than the smallest such; the exact maximum for 1;
 * 0 if there are none.
 */
uint64_t bench_hist_percentile(const BenchHist *hist, double fraction);

/**
 * BenchHeart: says how late an event loop serves a periodic timer.
 *
 * Beats are due at fixed times, and each is recorded with its lateness, also
 * those that a stalled loop left out.  So a stall of 20 ms with a period of
 * 1 ms gives 20 samples from 20 ms downwards, and percentiles say for how much
 * of the time the loop was how late.  With a timer that is set anew from the
 * time of its last call, the same stall would be one sample among thousands.
 *
 * Belongs to the thread that runs the event loop.
 */
typedef struct BenchHeart {
    int64_t period;     /* ns */
    int64_t due;        /* ns; of the next beat */
    BenchHist late;     /* ns */
} BenchHeart;

/**
 * bench_heart_init: begin to beat.
 * @now: ns; the first beat is due one period later
 * @period: ns, above 0
 */
void bench_heart_init(BenchHeart *heart, int64_t now, int64_t period);

/**
 * bench_heart_beat: record all beats that were due until now.
 * @now: ns
 * @from: ns; only beats due then or later are recorded...
 * @to: ns; ...and before this
 *
 * Returns: when the next beat is due, in ns
 */
int64_t bench_heart_beat(BenchHeart *heart, int64_t now, int64_t from,
                         int64_t to);

#endif /* RAW_AIO_BENCH_STATS_H */
