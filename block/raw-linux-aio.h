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
 * RawLaioRing: native AIO for an AioContext
 *
 * Where nothing else is said, functions are called in the AioContext's home
 * thread.
 */
typedef struct RawLaioRing RawLaioRing;
typedef struct RawLaioRequest RawLaioRequest;

/**
 * RawLaioFunc: completion of a request
 * @opaque: #RawLaioRequest.opaque
 * @res: bytes transferred, or negative errno
 *
 * Called in the ring's AioContext, never from within raw_laio_submit() or
 * raw_laio_cancel().
 */
typedef void RawLaioFunc(void *opaque, ssize_t res);

/* Where an iocb is */
typedef enum RawLaioState {
    RAW_LAIO_IDLE,
    RAW_LAIO_PENDING,   /* in RawLaioRing.pending */
    RAW_LAIO_KERNEL,    /* submitted, or a worker is about to submit it */
    RAW_LAIO_FAILED,    /* in RawLaioRing.failed */
} RawLaioState;

/*
 * What the kernel is given: a request, or one element of its vector.  Owned by
 * the ring, that is by its home thread.
 */
typedef struct RawLaioIocb {
    struct iocb iocb;
    RawLaioRequest *req;
    struct RawLaioContext *context; /* valid in RAW_LAIO_KERNEL */
    RawLaioState state;
    bool reserved;                  /* counts in RawLaioRing.nr_reserved */
    ssize_t res;                    /* valid in RAW_LAIO_FAILED, and after it */
    QTAILQ_ENTRY(RawLaioIocb) next; /* in RawLaioRing.pending or failed */
    QSIMPLEQ_ENTRY(RawLaioIocb) part; /* in RawLaioRequest or RawLaioRing */
} RawLaioIocb;

typedef QSIMPLEQ_HEAD(, RawLaioIocb) RawLaioPartList;

/**
 * RawLaioRequest: one read, write or fdatasync
 *
 * Provided by the submitter, who keeps it and the data it points to alive and
 * unmoved until @cb is called; the ring does not touch it afterwards.
 */
struct RawLaioRequest {
    /* Set by the submitter, constant until @cb. */
    RawLaioFunc *cb;
    void *opaque;

    /*
     * Valid in @cb if that is about an error: the kernel never took it, so
     * nothing has happened.  Of an array: to the element that the error is of.
     */
    bool refused;
    /* Valid in @cb: it was done when io_submit(2) returned. */
    bool at_once;
    /* Valid in @cb: its submission kept the event loop waiting for so long. */
    int64_t stalled_ns;
    /*
     * Valid in @cb: how many were submitted with it, itself included, or 0 if a
     * worker did it; and for the first of them, how long (ns) that took for
     * each.
     */
    unsigned together;
    unsigned cost_ns;

    /* Below: owned by the ring. */

    RawLaioIocb own;            /* the whole request, or one of its parts */

    /* If it goes as an array of iocbs, else iov is NULL */
    const struct iovec *iov;    /* elements that have no iocb yet */
    int niov;
    int64_t offset;             /* of these, in bytes */
    ssize_t done;               /* bytes transferred before the parts */
    RawLaioPartList parts;      /* in the order of the vector */
    unsigned outstanding;       /* of these, not finished */
};

/**
 * raw_laio_new: Create the ring of an AioContext.
 * @ctx: where completions are delivered; must outlive the ring
 * @errp: says why it can't be, and what to do
 *
 * Returns: the ring, or NULL with @errp set
 */
RawLaioRing *raw_laio_new(AioContext *ctx, Error **errp);

/**
 * raw_laio_warn: Say once in a process that Linux AIO falls short.
 * @err: why, and what to do; freed
 * @what: what follows from it, put before @err
 *
 * May be called in any thread.
 */
void raw_laio_warn(Error *err, const char *what);

/**
 * raw_laio_free: Free a ring without requests.
 *
 * May be called in any thread once nothing can submit any more.
 */
void raw_laio_free(RawLaioRing *ring);

/**
 * raw_laio_entries: How many iocbs the kernel takes at a time
 *
 * Grows when more requests are queued.
 */
unsigned raw_laio_entries(const RawLaioRing *ring);

/**
 * raw_laio_dispatches: How often the event loop has looked for results
 *
 * Wraps around.  Constant while callbacks of one dispatch are called, unless
 * they run a nested event loop.
 */
unsigned raw_laio_dispatches(const RawLaioRing *ring);

/**
 * raw_laio_has_room: Whether a request would be submitted at once
 *
 * If not it waits for others to end, or the ring grows.
 */
bool raw_laio_has_room(const RawLaioRing *ring);

/**
 * raw_laio_prep_rw: Describe a read or write.
 * @fd: descriptor, usually with O_DIRECT; without it io_submit(2) does all of
 *      the work
 * @iov: vector, at most IOV_MAX elements, alive until the completion
 * @offset: in bytes
 * @rwf: RAW_AIO_RWF_* flags; only 0 where RAW_AIO_HAVE_IOCB_FLAGS is 0
 * @array: one iocb for each element, for kernels that do not know
 *         IOCB_CMD_PREADV and IOCB_CMD_PWRITEV
 *
 * With @array the elements are transferred side by side.  The result is what
 * the vector would have given: the bytes up to the first element that is not
 * complete, or the error of the first element.  Elements behind that one may
 * have been transferred all the same.
 */
void raw_laio_prep_rw(RawLaioRequest *req, bool is_write, int fd,
                      const struct iovec *iov, int niov, int64_t offset,
                      int rwf, bool array);

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
 * raw_laio_reserve: Make room for a request that a worker is to submit.
 * @req: a prepared request, not an array
 *
 * Returns: false if there is no room, or all that there is may be needed for
 * what is queued or for other files, as nobody knows how long a worker has to
 * wait.  Otherwise raw_laio_submit_reserved() follows, in any thread.
 */
bool raw_laio_reserve(RawLaioRing *ring, RawLaioRequest *req);

/**
 * raw_laio_submit_reserved: Submit a request; may block.
 *
 * May be called in any thread.  The callback may be called, in the home thread,
 * before this returns.
 *
 * Returns: 0, or negative errno: then the kernel did not take it, there is no
 * callback, and raw_laio_unreserve() follows
 */
int raw_laio_submit_reserved(RawLaioRequest *req);

/**
 * raw_laio_unreserve: Give back the room of a request that was not submitted.
 */
void raw_laio_unreserve(RawLaioRing *ring, RawLaioRequest *req);

/**
 * raw_laio_cancel: Take back a request that the kernel does not have yet.
 *
 * Returns: true if it will complete with -ECANCELED, false if it completes as
 * if nothing had been asked
 */
bool raw_laio_cancel(RawLaioRing *ring, RawLaioRequest *req);

#endif /* CONFIG_LINUX_AIO */
#endif /* BLOCK_RAW_LINUX_AIO_H */
