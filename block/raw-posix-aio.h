/*
 * Raw file engine: how block/file-posix.c runs its requests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef BLOCK_RAW_POSIX_AIO_H
#define BLOCK_RAW_POSIX_AIO_H

#include "block/aio.h"
#include "block/block-common.h"
#include "block/raw-aio.h"
#include "qapi/qapi-types-block-core.h"
#include "qemu/iov.h"
#include "qemu/stats64.h"
#include "posix-aio-compat.h"

/*
 * Added to QEMU_AIO_WRITE and QEMU_AIO_ZONE_APPEND: the file is a zoned device.
 * A write is sent once, since a part of it may have moved the write pointer.
 */
#define RAW_AIO_ZONED 0x10000

typedef struct RawAIODesc RawAIODesc;

/* What is counted for each file, see BlockStatsRawAio in the QAPI schema */
typedef enum RawAIOStat {
    RAW_AIO_INLINE_SERVED,
    RAW_AIO_INLINE_BATCHED,     /* also in the number before */
    RAW_AIO_INLINE_REFUSED,
    RAW_AIO_NATIVE_SERVED,
    RAW_AIO_NATIVE_REFUSED,
    RAW_AIO_NATIVE_BY_WORKER,
    RAW_AIO_POOL_SERVED,
    RAW_AIO_SLOW_SUBMISSIONS,
    RAW_AIO_SHORT_TRANSFERS,
    RAW_AIO_RING_SIZE,
    RAW_AIO_STAT__MAX,
} RawAIOStat;

/**
 * RawAIOFile: one open file
 *
 * Requests may be sent from several AioContexts at once, so everything here is
 * constant while the file is open, or atomic.
 */
typedef struct RawAIOFile {
    bool native;            /* aio=native; constant */
    uint64_t aio_max_batch; /* requests, 0 for the default; constant */
    unsigned disabled;      /* RawAIOSwitch bits; constant */

    /*
     * The present descriptor and what has been learnt about it.  Written by
     * the main thread, read under RCU.
     */
    RawAIODesc *desc;

    /*
     * Whether the file was ever open without O_DIRECT; set by the main thread
     * before that descriptor can be used, never reset, atomic.
     */
    bool was_cached;
    /*
     * One fdatasync() of cached data at a time, held by the worker that calls
     * it; see raw_aio_blocking_flush().
     */
    QemuMutex sync_lock;
    /* Newest ticket that a successful fdatasync() covers; sync_lock. */
    unsigned sync_covered;
    /*
     * Positive errno of the first failed writeback of cached data, or 0.  Never
     * reset: nobody knows what the disk holds.  sync_lock.
     */
    int writeback_errno;
    /* Newest ticket of a request that needs an fdatasync(); atomic. */
    unsigned sync_wanted;

    Stat64 stats[RAW_AIO_STAT__MAX];    /* atomic */
} RawAIOFile;

/**
 * raw_aio_open: Start to serve a file.
 * @fd: an open descriptor, which belongs to @f from now on
 * @native: whether aio=native was asked for
 * @aio_max_batch: requests that are submitted together at most, 0: default
 *
 * Called in the main thread.  Never fails: what a file or the kernel can't do
 * is found out with the first real requests.
 */
void raw_aio_open(RawAIOFile *f, int fd, bool native, uint64_t aio_max_batch);

/**
 * raw_aio_set_fd: Replace the descriptor.
 * @fd: an open descriptor of the same file, which belongs to @f from now on;
 *      or -1 to close the old one when there is no new one
 *
 * Called in the main thread; requests may be in flight.  Those that have begun
 * finish on the old descriptor, which is closed after the last of them.  What
 * has been learnt about the old one is forgotten.
 */
void raw_aio_set_fd(RawAIOFile *f, int fd);

/**
 * raw_aio_close: Close the descriptor and stop.
 *
 * Called in the main thread when no request is in flight.
 */
void raw_aio_close(RawAIOFile *f);

/**
 * raw_aio_get_desc: Hold the present descriptor open.
 * @fd: returns its number
 *
 * May be called in any thread.  raw_aio_put_desc() must follow.
 */
RawAIODesc *raw_aio_get_desc(RawAIOFile *f, int *fd);

/**
 * raw_aio_put_desc: Undo raw_aio_get_desc(); may close the descriptor.
 *
 * May be called in any thread.
 */
void raw_aio_put_desc(RawAIODesc *desc);

/**
 * raw_aio_co_rw: Read or write.
 * @type: QEMU_AIO_READ, QEMU_AIO_WRITE or QEMU_AIO_ZONE_APPEND, with
 *        QEMU_AIO_MISALIGNED if an O_DIRECT file needs a bounce buffer, and
 *        RAW_AIO_ZONED
 * @offset: in bytes
 * @qiov: the buffers; its size is the length of the request in bytes
 * @flags: BDRV_REQ_FUA: the data is stable when the write completes
 *
 * Called in a coroutine of the AioContext in which the request is to complete.
 * A read past the end of the file returns zeroes.
 *
 * Returns: 0, or negative errno; -ENOSPC if a write makes no progress
 */
int coroutine_fn raw_aio_co_rw(RawAIOFile *f, int type, int64_t offset,
                               QEMUIOVector *qiov, BdrvRequestFlags flags);

/**
 * raw_aio_co_flush: Make stable what completed before.
 *
 * Called in a coroutine of the AioContext in which the request is to complete.
 *
 * Returns: 0, or negative errno.  After a failed writeback of cached data each
 * further call fails with its error.
 */
int coroutine_fn raw_aio_co_flush(RawAIOFile *f);

/**
 * raw_aio_co_run: Run any blocking function in a worker.
 * @f: the file, or NULL if there is none
 * @class: PAIO_SLOW for what may take long
 * @fd: where @func finds the descriptor, which is set before @func runs and
 *      stays open until it returns; not used if @f is NULL
 *
 * Called in a coroutine of the AioContext in which the request is to complete.
 *
 * Returns: what @func returned
 */
int coroutine_fn raw_aio_co_run(RawAIOFile *f, PAIOClass class, int *fd,
                                PAIOFunc *func, void *arg);

/**
 * raw_aio_submit: Read, write or flush with a callback.
 * @type: as for raw_aio_co_rw(), or QEMU_AIO_FLUSH
 * @qiov: as for raw_aio_co_rw(); alive until @cb; NULL for a flush
 * @cb: called once, in the AioContext this is called in, never from within
 *      this call or bdrv_aio_cancel_async()
 *
 * Called in the home thread of an AioContext.  For use inside the engine and
 * its tests: such requests are not tracked by the block layer and not drained.
 *
 * Returns: a handle for bdrv_aio_cancel_async(), valid until @cb returns, to be
 * used in the same AioContext.  A request that no tier has begun completes with
 * -ECANCELED, any other as if nothing had been asked.
 */
BlockAIOCB *raw_aio_submit(RawAIOFile *f, int type, int64_t offset,
                           QEMUIOVector *qiov, BdrvRequestFlags flags,
                           BlockCompletionFunc *cb, void *opaque);

/**
 * raw_aio_query_stats: Read the counters of a file.
 *
 * May be called in any thread.  The caller frees the result with
 * qapi_free_BlockStatsRawAio().
 */
BlockStatsRawAio *raw_aio_query_stats(RawAIOFile *f);

/**
 * raw_aio_current_pool: The pool of the current AioContext, for tests
 */
PAIOPool *raw_aio_current_pool(void);

/*
 * Switches for tests and benchmarks, which take away what a host may lack.
 * Set with the environment variable QEMU_RAW_AIO_DISABLE, a list of the names
 * below separated by commas, which is read when a file is opened.
 */
typedef enum RawAIOSwitch {
    RAW_AIO_DISABLE_INLINE = 1 << 0,    /* "inline": the inline tier */
    RAW_AIO_DISABLE_NATIVE = 1 << 1,    /* "native": the native tier */
    RAW_AIO_DISABLE_NOWAIT = 1 << 2,    /* "nowait": RWF_NOWAIT */
    RAW_AIO_DISABLE_PREADV = 1 << 3,    /* "preadv": preadv and pwritev */
    RAW_AIO_DISABLE_IOCBV = 1 << 4,     /* "iocbv": IOCB_CMD_PREADV, PWRITEV */
    RAW_AIO_DISABLE_BATCH = 1 << 5,     /* "batch": cached reads in the ring */
} RawAIOSwitch;

#endif /* BLOCK_RAW_POSIX_AIO_H */
