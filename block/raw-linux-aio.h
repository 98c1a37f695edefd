/*
 * Linux native AIO for the raw file engine
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef BLOCK_RAW_LINUX_AIO_H
#define BLOCK_RAW_LINUX_AIO_H

#include "block/aio.h"
#include "qemu/queue.h"

#ifdef CONFIG_LINUX_AIO
#include <libaio.h>

/**
 * RawLaioRing: the native AIO context of an AioContext
 *
 * Everything but raw_laio_free() is called in the AioContext's home thread.
 */
typedef struct RawLaioRing RawLaioRing;

/**
 * RawLaioFunc: completion of a request
 * @opaque: #RawLaioRequest.opaque
 * @res: bytes transferred, or negative errno
 *
 * Called in the ring's AioContext, never from within raw_laio_submit() or
 * raw_laio_cancel().
 */
typedef void RawLaioFunc(void *opaque, ssize_t res);

typedef enum RawLaioState {
    RAW_LAIO_IDLE,
    RAW_LAIO_PENDING,   /* in RawLaioRing.pending */
    RAW_LAIO_KERNEL,    /* submitted */
    RAW_LAIO_FAILED,    /* in RawLaioRing.failed */
} RawLaioState;

/**
 * RawLaioRequest: one kernel request
 *
 * Provided by the submitter, who keeps it and the data it points to alive and
 * unmoved until @cb is called; the ring does not touch it afterwards.
 */
typedef struct RawLaioRequest {
    /* Set by the submitter, constant until @cb. */
    RawLaioFunc *cb;
    void *opaque;

    /* Valid in @cb: the kernel never took it, so nothing has happened. */
    bool refused;

    /* Owned by the ring, that is by its home thread. */
    struct iocb iocb;
    RawLaioState state;
    ssize_t res;        /* valid in RAW_LAIO_FAILED */
    QTAILQ_ENTRY(RawLaioRequest) next;
} RawLaioRequest;

/**
 * raw_laio_new: Create the ring of an AioContext.
 * @ctx: where completions are delivered; must outlive the ring
 * @errp: says why it can't be, and what to do
 *
 * Returns: the ring, or NULL with @errp set
 */
RawLaioRing *raw_laio_new(AioContext *ctx, Error **errp);

/**
 * raw_laio_free: Free a ring without requests.
 *
 * May be called in any thread once nothing can submit any more.
 */
void raw_laio_free(RawLaioRing *ring);

/**
 * raw_laio_entries: How many requests the kernel takes at a time
 */
unsigned raw_laio_entries(const RawLaioRing *ring);

/**
 * raw_laio_prep_rw: Describe a read or write.
 * @fd: descriptor, usually with O_DIRECT
 * @iov: vector, at most IOV_MAX elements, alive until the completion
 * @offset: in bytes
 * @rwf: RAW_AIO_RWF_* flags; only 0 where RAW_AIO_HAVE_IOCB_FLAGS is 0
 */
void raw_laio_prep_rw(RawLaioRequest *req, bool is_write, int fd,
                      const struct iovec *iov, int niov, int64_t offset,
                      int rwf);

/**
 * raw_laio_prep_fdsync: Describe an fdatasync.
 */
void raw_laio_prep_fdsync(RawLaioRequest *req, int fd);

/**
 * raw_laio_submit: Queue a prepared request.
 * @dev_max_batch: aio-max-batch of the file, 0 for the default
 *
 * Within a defer_call section requests are given to the kernel together, up to
 * the smallest batch size that is configured.  Any number may be queued: what
 * the ring does not hold waits in order.
 */
void raw_laio_submit(RawLaioRing *ring, RawLaioRequest *req,
                     uint64_t dev_max_batch);

/**
 * raw_laio_cancel: Take back a request that the kernel does not have yet.
 *
 * Returns: true if it will complete with -ECANCELED, false if it completes as
 * if nothing had been asked
 */
bool raw_laio_cancel(RawLaioRing *ring, RawLaioRequest *req);

#endif /* CONFIG_LINUX_AIO */
#endif /* BLOCK_RAW_LINUX_AIO_H */
