/*
 * Notices that a system call kept its thread waiting
 *
 * RWF_NOWAIT is not a promise: a device may run out of request tags, a file
 * system may be frozen, and guest memory may have to be swapped in.  Nor is it
 * known everywhere.  So the calls that the event loop makes itself are watched.
 *
 * A call that took long has either waited or was preempted, which is nobody's
 * fault.  The thread's voluntary context switches tell which, but to read them
 * is a system call.  So they are read only now and then: a loop that is busy
 * does not sleep in between, and one that did is wrong only if it is preempted
 * for long as well, within the next call.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef BLOCK_RAW_AIO_WATCH_H
#define BLOCK_RAW_AIO_WATCH_H

#include <sys/resource.h>
#include "qemu/timer.h"

/*
 * A call that waits for so long (ns) is a stall: several times what a request
 * costs, and half of the period at which guests notice a late timer.
 */
#define RAW_AIO_STALL_NS (500 * SCALE_US)

/*
 * How old (ns) the number of context switches may be.  To read it takes 0.2 to
 * 0.5 us, so this costs less than 0.5 % of a busy thread.
 */
#define RAW_AIO_WATCH_NS (100 * SCALE_US)

/*
 * Owned by the home thread of an AioContext, which for the main context is
 * whoever holds the BQL.
 */
typedef struct RawAIOWatch {
    pthread_t thread;   /* whose context switches were read */
    int64_t begin_ns;   /* of the call that is watched */
    int64_t took_ns;    /* how long it took */
    int64_t read_ns;    /* when the context switches were read */
    long switches;      /* voluntary ones, or -1 if that can't be told */
} RawAIOWatch;

/* Read the voluntary context switches of this thread so far. */
static inline void raw_aio_watch_read(RawAIOWatch *watch, int64_t now)
{
#ifdef RUSAGE_THREAD
    struct rusage usage;

    watch->switches = getrusage(RUSAGE_THREAD, &usage) < 0 ? -1
                                                           : usage.ru_nvcsw;
#else
    watch->switches = -1;
#endif
    watch->thread = pthread_self();
    watch->read_ns = now;
}

/* Call it just before the system call. */
static inline void raw_aio_watch_begin(RawAIOWatch *watch)
{
    watch->begin_ns = get_clock();
    if (watch->begin_ns - watch->read_ns > RAW_AIO_WATCH_NS ||
        !pthread_equal(watch->thread, pthread_self())) {
        raw_aio_watch_read(watch, watch->begin_ns);
    }
}

/*
 * Call it just after the system call.  errno is kept.
 *
 * Returns: how long it waited, in ns, if that was a stall; else 0
 */
static inline int64_t raw_aio_watch_end(RawAIOWatch *watch)
{
    int64_t now = get_clock();
    int64_t took = now - watch->begin_ns;
    long before = watch->switches;
    int saved_errno;

    watch->took_ns = took;
    if (likely(took < RAW_AIO_STALL_NS)) {
        return 0;
    }
    saved_errno = errno;
    raw_aio_watch_read(watch, now);
    errno = saved_errno;
    return watch->switches > before ? took : 0;
}

#endif /* BLOCK_RAW_AIO_WATCH_H */
