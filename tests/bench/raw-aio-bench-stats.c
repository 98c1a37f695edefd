/*
 * Arithmetic of raw-aio-bench: percentiles, and how late an event loop is
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <math.h>
#include "qemu/host-utils.h"
#include "raw-aio-bench-stats.h"

#define SUB (UINT64_C(1) << BENCH_HIST_BITS)

/* Durations below SUB have a bucket each. */
static unsigned bucket_of(uint64_t ns)
{
    unsigned octave;

    if (ns < SUB) {
        return ns;
    }
    octave = 63 - clz64(ns) - BENCH_HIST_BITS;
    return ((octave + 1) << BENCH_HIST_BITS) + (ns >> octave) - SUB;
}

/* The largest duration that falls into the bucket. */
static uint64_t bucket_end(unsigned bucket)
{
    unsigned octave = bucket >> BENCH_HIST_BITS;

    if (octave == 0) {
        return bucket;
    }
    octave--;
    return (((bucket & (SUB - 1)) + SUB) << octave) +
           ((UINT64_C(1) << octave) - 1);
}

void bench_hist_add(BenchHist *hist, int64_t ns)
{
    uint64_t value = MAX(ns, 0);

    hist->count++;
    hist->max = MAX(hist->max, value);
    hist->bucket[bucket_of(value)]++;
}

void bench_hist_merge(BenchHist *hist, const BenchHist *from)
{
    hist->count += from->count;
    hist->max = MAX(hist->max, from->max);
    for (unsigned i = 0; i < BENCH_HIST_BUCKETS; i++) {
        hist->bucket[i] += from->bucket[i];
    }
}

uint64_t bench_hist_percentile(const BenchHist *hist, double fraction)
{
    uint64_t rank = ceil(fraction * hist->count);
    uint64_t seen = 0;

    for (unsigned i = 0; i < BENCH_HIST_BUCKETS; i++) {
        seen += hist->bucket[i];
        if (seen >= MAX(rank, 1)) {
            return MIN(bucket_end(i), hist->max);
        }
    }
    return hist->max;
}

void bench_heart_init(BenchHeart *heart, int64_t now, int64_t period)
{
    assert(period > 0);
    *heart = (BenchHeart) {
        .period = period,
        .due = now + period,
    };
}

int64_t bench_heart_beat(BenchHeart *heart, int64_t now, int64_t from,
                         int64_t to)
{
    while (heart->due <= now) {
        if (heart->due >= from && heart->due < to) {
            bench_hist_add(&heart->late, now - heart->due);
        }
        heart->due += heart->period;
    }
    return heart->due;
}
