/*
 * raw-aio-model: what its files share
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef RAW_AIO_MODEL_H
#define RAW_AIO_MODEL_H

#include "block/aio.h"
#include "block/block-common.h"
#include "qapi/qapi-types-block-core.h"
#include "qemu/iov.h"
#include "qemu/queue.h"
#include "qemu/units.h"
#include "raw-aio-model-data.h"

/* Suits O_DIRECT on any file system */
#define MODEL_BLOCK         4096
/* Bytes of a request, at most */
#define MODEL_MAX_REQUEST   (1 * MiB)

enum {
    EXIT_USAGE = 2,
    EXIT_WRONG_DATA = 4,
};

typedef enum ModelKind {
    OP_READ,
    OP_WRITE,
    OP_ZERO,
    OP_DISCARD,
    OP_FLUSH,
    OP_TRUNCATE,
    OP_CANCEL,          /* another operation */
    /* What the main thread does, and nothing is sent meanwhile */
    OP_VERIFY,          /* flush, and compare everything */
    OP_DRAIN,
    OP_MOVE,            /* to another AioContext */
    OP_REOPEN,          /* in another cache mode */
    OP_READ_ONLY,
    OP_READ_WRITE,
    OP_CLOSE,           /* and open again */
    OP_SHORTEN,         /* the file, behind QEMU's back */
    OP_PAUSE,
    OP_SETTLE,          /* a read that decides, see raw-aio-model-data.h */
    OP__MAX,
} ModelKind;

/* One operation; belongs to the loop that sends it. */
typedef struct ModelOp {
    uint64_t id;            /* its number */
    ModelKind kind;
    uint64_t random;        /* state of its own random numbers */
    int loop;               /* that sends it */

    uint64_t offset, bytes;
    uint64_t size;          /* OP_TRUNCATE: of the image afterwards */
    PreallocMode prealloc;
    BdrvRequestFlags flags;
    bool extends;           /* a write beyond the end of the image */
    bool beyond;            /* has to fail, as it is beyond the end */
    unsigned max_in_flight; /* sent when less than so many others are */
    bool pump_from_bh;      /* what follows is sent by a bottom half */
    bool cancel_at_once;
    bool cancelled;         /* asked for */
    bool sent_again;        /* as it failed, see raw-aio-model-tolerate.c */
    bool doomed;            /* a flush that has to fail */

    uint8_t *buf;
    size_t buf_bytes;
    QEMUIOVector qiov;
    BlockAIOCB *acb;        /* while in flight, if it can be cancelled */
    ModelRead *read;
    ModelWrite *write;
    ModelCluster *settles;

    QTAILQ_ENTRY(ModelOp) in_flight;
    QSIMPLEQ_ENTRY(ModelOp) next;
} ModelOp;

typedef struct ModelRange {
    uint64_t offset, bytes;
} ModelRange;

/*
 * What the operations that have begun will lead to.  The lock of the main file
 * protects it.
 */
typedef struct ModelPlan {
    uint64_t size;              /* of the image */
    ModelRange recent[64];      /* where it may have changed */
    int home;                   /* the loop whose AioContext the image has */
    bool direct, writethrough;  /* cache mode */
    bool writable;
    bool by_reopen;             /* if not writable */

    int nr_loops;               /* constant */
    /* aio=native does not need O_DIRECT, as in stock QEMU; constant */
    bool any_cache;
} ModelPlan;

/* Options; constant once the loops run */
typedef struct ModelOptions {
    char *aio, *cache, *format, *size_str, *expect, *file;
    int64_t seed, ops;
    double seconds;
    int iothreads, depth;
    gboolean callback, tiers, tolerate, verbose;

    uint64_t size;
    bool qcow2;
    bool direct, writethrough;  /* of --cache */
} ModelOptions;

extern ModelOptions opt;

/* Sums over all times the file was open; main thread */
typedef struct ModelTiers {
    bool counted;               /* this QEMU counts them */
    uint64_t native, pool, inlined;
    uint64_t refused, shortened;
} ModelTiers;

/*
 * How the file is used: through the block layer, or the engine alone.  All but
 * send and cancel are called in the main thread.  Those that do not succeed end
 * the process.
 */
typedef struct ModelTarget {
    void (*create)(void);
    void (*open)(bool direct, bool writethrough);
    void (*close)(ModelTiers *tiers);
    /* model_op_done() is called in the same AioContext, later. */
    void (*send)(ModelOp *op);
    void (*cancel)(ModelOp *op);

    void (*drain)(void);
    void (*move)(AioContext *ctx);
    void (*reopen)(bool direct, bool writethrough);
    void (*set_writable)(bool writable, bool reopen);
    /* Returns: false if it failed, as it may, see --tolerate */
    bool (*flush)(void);
    void (*read)(uint64_t offset, uint64_t bytes, void *buf);
    /* Consistent by itself; @last: as it will remain */
    void (*check)(uint64_t size, bool last);
} ModelTarget;

extern const ModelTarget model_target_blk;
extern const ModelTarget model_target_engine;

/* A BlockCompletionFunc */
void model_op_done(void *opaque, int ret);

void model_create_raw(void);
/*
 * Negative is the end, if the failure is not tolerated.
 *
 * Returns: whether it succeeded
 */
bool model_check_ret(const char *what, int64_t ret);

/**
 * model_capacity: no byte of the image is beyond it.
 */
uint64_t model_capacity(void);

/**
 * op_new: what operation @id is, if it is the next one.
 */
ModelOp *op_new(uint64_t id, const ModelPlan *plan);

/**
 * op_foresee: it begins: what those after it have to know.
 */
void op_foresee(ModelOp *op, ModelPlan *plan);

/**
 * op_random: one of the numbers that belong to the operation.
 *
 * Returns: from 0 to @limit - 1
 */
uint64_t op_random(ModelOp *op, uint64_t limit);

bool op_is_for_main(ModelKind kind);

void op_make_buffer(ModelOp *op);
void op_fill_buffer(ModelOp *op, const ModelData *data);
void op_check_guards(const ModelOp *op);

/* --- --tolerate: one system call fails --- */

/**
 * model_tolerate_init: find the library that makes it fail.
 */
void model_tolerate_init(void);

/**
 * model_tolerate_workers: threads that begin from now on are workers.
 */
void model_tolerate_workers(void);

/**
 * model_tolerate_arm: from now on, or no longer, it may fail.
 * @ignored_fd: descriptor of calls that are not counted
 *
 * Main thread, nothing in flight.
 */
void model_tolerate_arm(bool armed, int ignored_fd);

/**
 * model_tolerate_send: an operation is sent to the target.
 */
void model_tolerate_send(ModelOp *op, const ModelPlan *plan);

/**
 * model_tolerate_error: whether this error is that of the call that failed.
 * @op: NULL if it is not one of the operations
 *
 * It counts as the one that the caller has to see.
 */
bool model_tolerate_error(const ModelOp *op, int ret);

/**
 * model_tolerate_again: whether an operation that failed is to be sent again,
 * as its success decides about others.
 */
bool model_tolerate_again(ModelOp *op);

/**
 * model_tolerate_lost: whether the image may have lost data, as its caller was
 * told by each flush.
 */
bool model_tolerate_lost(void);

/**
 * model_tolerate_happened: whether the call has failed.
 */
bool model_tolerate_happened(void);

/**
 * model_tolerate_sleeps: whether a call sleeps in a worker now.
 */
bool model_tolerate_sleeps(void);

/**
 * model_tolerate_naps: how many calls have slept in workers, or do so now.
 */
unsigned model_tolerate_naps(void);

/**
 * model_tolerate_new_fd: the image got a new descriptor, of which the engine
 * has yet to learn.
 */
void model_tolerate_new_fd(void);

/**
 * model_tolerate_report: say what happened, and check that it was seen.
 */
void model_tolerate_report(void);

/* Never returns.  The line on stderr that a failure has */
G_NORETURN G_GNUC_PRINTF(2, 3)
void model_fail(int status, const char *fmt, ...);

/* The same, for a failure of what is tested: how to replay it is added. */
G_NORETURN G_GNUC_PRINTF(3, 4)
void model_found(int status, const ModelOp *op, const char *fmt, ...);

#endif /* RAW_AIO_MODEL_H */
