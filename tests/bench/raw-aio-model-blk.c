/*
 * raw-aio-model: the file, used through the block layer
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "block/block.h"
#include "block/graph-lock.h"
#include "qapi/error.h"
#include "qemu/coroutine.h"
#include "qemu/main-loop.h"
#include "qobject/qdict.h"
#include "qapi/qapi-visit-block-core.h"
#include "qapi/qobject-output-visitor.h"
#include "system/block-backend.h"
#include "raw-aio-model.h"

#define NODE "model-file"

static BlockBackend *blk;

static void check_error(const char *what, Error *err)
{
    if (err) {
        model_found(EXIT_FAILURE, NULL, "%s: %s", what, error_get_pretty(err));
    }
}

static void blk_target_create(void)
{
    Error *err = NULL;

    if (!opt.qcow2) {
        model_create_raw();
        return;
    }
    bdrv_img_create(opt.file, opt.format, NULL, NULL, NULL, opt.size, 0, true,
                    &err);
    if (err) {
        model_fail(EXIT_FAILURE, "%s", error_get_pretty(err));
    }
}

static void blk_target_open(bool direct, bool writethrough)
{
    QDict *options = qdict_new();
    Error *err = NULL;

    qdict_put_str(options, "driver", opt.format);
    qdict_put_str(options, "file.driver", "file");
    qdict_put_str(options, "file.filename", opt.file);
    qdict_put_str(options, "file.node-name", NODE);
    qdict_put_str(options, "file.aio", opt.aio);
    blk = blk_new_open(NULL, NULL, options,
                       BDRV_O_RDWR | BDRV_O_RESIZE | BDRV_O_UNMAP |
                       BDRV_O_AUTO_RDONLY | (direct ? BDRV_O_NOCACHE : 0),
                       &err);
    if (!blk) {
        model_fail(EXIT_FAILURE, "%s", error_get_pretty(err));
    }
    blk_set_enable_write_cache(blk, !writethrough);
    blk_set_allow_write_beyond_eof(blk, !opt.qcow2);
}

static uint64_t counter(const QDict *aio, const char *name)
{
    return qdict_get_try_int(aio, name, 0);
}

static void add_tiers(ModelTiers *tiers)
{
    BlockStatsSpecific *stats = bdrv_get_specific_stats(bdrv_find_node(NODE));
    QObject *object = NULL;
    const QDict *aio;
    Visitor *v;

    if (!stats) {
        return;
    }
    v = qobject_output_visitor_new(&object);
    visit_type_BlockStatsSpecific(v, NULL, &stats, &error_abort);
    visit_complete(v, &object);
    visit_free(v);
    qapi_free_BlockStatsSpecific(stats);
    aio = qdict_get_qdict(qobject_to(QDict, object), "aio");
    if (aio) {
        tiers->counted = true;
        tiers->inlined += counter(aio, "inline-served");
        tiers->native += counter(aio, "native-served");
        tiers->pool += counter(aio, "pool-served");
        tiers->refused += counter(aio, "native-refused") +
                          counter(aio, "inline-refused");
        tiers->shortened += counter(aio, "short-transfers");
    }
    qobject_unref(object);
}

static void blk_target_move(AioContext *ctx)
{
    Error *err = NULL;

    blk_set_aio_context(blk, ctx, &err);
    check_error("move to another AioContext", err);
}

static void blk_target_close(ModelTiers *tiers)
{
    blk_drain(blk);
    blk_target_move(qemu_get_aio_context());
    add_tiers(tiers);
    blk_unref(blk);
    blk = NULL;
}

/* There is no blk_aio_truncate. */
static void coroutine_fn truncate_entry(void *opaque)
{
    ModelOp *op = opaque;
    int ret = blk_co_truncate(blk, op->size, true, op->prealloc, op->flags,
                              NULL);

    blk_dec_in_flight(blk);
    model_op_done(op, ret);
}

static void blk_target_send(ModelOp *op)
{
    switch (op->kind) {
    case OP_READ:
    case OP_SETTLE:
        op->acb = blk_aio_preadv(blk, op->offset, &op->qiov, 0,
                                 model_op_done, op);
        break;
    case OP_WRITE:
        op->acb = blk_aio_pwritev(blk, op->offset, &op->qiov, op->flags,
                                  model_op_done, op);
        break;
    case OP_ZERO:
        op->acb = blk_aio_pwrite_zeroes(blk, op->offset, op->bytes, op->flags,
                                        model_op_done, op);
        break;
    case OP_DISCARD:
        op->acb = blk_aio_pdiscard(blk, op->offset, op->bytes, model_op_done,
                                   op);
        break;
    case OP_FLUSH:
        op->acb = blk_aio_flush(blk, model_op_done, op);
        break;
    case OP_TRUNCATE:
        blk_inc_in_flight(blk);
        qemu_coroutine_enter(qemu_coroutine_create(truncate_entry, op));
        break;
    default:
        g_assert_not_reached();
    }
}

/* Asks for nothing today, but must do no harm. */
static void blk_target_cancel(ModelOp *op)
{
    if (op->acb) {
        blk_aio_cancel_async(op->acb);
    }
}

static void blk_target_drain(void)
{
    blk_drain(blk);
}

static void blk_target_reopen(bool direct, bool writethrough)
{
    QDict *options = qdict_new();
    Error *err = NULL;

    qdict_put_bool(options, BDRV_OPT_CACHE_DIRECT, direct);
    bdrv_reopen(blk_bs(blk), options, true, &err);
    check_error("reopen", err);
    blk_set_enable_write_cache(blk, !writethrough);
}

/*
 * With @reopen as -blockdev's read-only would be changed; without, by giving
 * back the permission, after which auto-read-only gets another descriptor.
 */
static void blk_target_set_writable(bool writable, bool reopen)
{
    Error *err = NULL;

    if (!writable) {
        blk_set_perm(blk, BLK_PERM_CONSISTENT_READ, BLK_PERM_ALL, &err);
        check_error("give back the permission to write", err);
    }
    if (reopen) {
        bdrv_reopen_set_read_only(blk_bs(blk), !writable, &err);
        check_error("reopen read-only or read-write", err);
    }
    if (writable) {
        blk_set_perm(blk, BLK_PERM_CONSISTENT_READ | BLK_PERM_WRITE |
                     BLK_PERM_RESIZE, BLK_PERM_ALL, &err);
        check_error("get the permission to write", err);
    }
}

static bool blk_target_flush(void)
{
    return model_check_ret("flush", blk_flush(blk));
}

static void blk_target_read(uint64_t offset, uint64_t bytes, void *buf)
{
    while (!model_check_ret("read", blk_pread(blk, offset, bytes, buf, 0))) {
        /* A read that failed, as it may, has to succeed when tried again. */
    }
}

static void blk_target_check(uint64_t size, bool last)
{
    int64_t length = blk_getlength(blk);

    model_check_ret("length", length);
    /* A write that QEMU has padded for O_DIRECT may have made raw longer. */
    if (length < size || length > (opt.qcow2 ? size : ROUND_UP(size, 4096))) {
        model_found(EXIT_WRONG_DATA, NULL, "the image has %" PRId64 " bytes "
                    "instead of %" PRIu64, length, size);
    }
    if (opt.qcow2) {
        BdrvCheckResult result = {};

        while (!model_check_ret("check", bdrv_check(blk_bs(blk), &result, 0)) ||
               (result.check_errors && model_tolerate_error(NULL, -EIO))) {
            memset(&result, 0, sizeof(result));
        }
        /* qcow2 may leave clusters behind when it can't write its tables. */
        if (result.corruptions || result.check_errors ||
            (last && result.leaks && !model_tolerate_happened())) {
            model_found(EXIT_WRONG_DATA, NULL, "the check of the image found "
                        "%d corruptions, %d errors, %d leaks",
                        result.corruptions, result.check_errors, result.leaks);
        }
    }
}

const ModelTarget model_target_blk = {
    .create = blk_target_create,
    .open = blk_target_open,
    .close = blk_target_close,
    .send = blk_target_send,
    .cancel = blk_target_cancel,
    .drain = blk_target_drain,
    .move = blk_target_move,
    .reopen = blk_target_reopen,
    .set_writable = blk_target_set_writable,
    .flush = blk_target_flush,
    .read = blk_target_read,
    .check = blk_target_check,
};
