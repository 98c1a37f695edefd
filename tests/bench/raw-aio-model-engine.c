/*
 * raw-aio-model: the file, used through the callback form of the engine
 *
 * Not part of a build without the raw file engine.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "block/block-io.h"
#include "block/raw-posix-aio.h"
#include "qemu/main-loop.h"
#include "raw-aio-model.h"

static RawAIOFile file;
/* Set by the main thread while no operation is sent */
static bool file_direct;

static int open_fd(bool direct)
{
    int fd = open(opt.file, O_RDWR | O_CLOEXEC | (direct ? O_DIRECT : 0));

    if (fd < 0) {
        model_fail(EXIT_FAILURE, "could not open %s: %s", opt.file,
                   strerror(errno));
    }
    return fd;
}

static void engine_open(bool direct, bool writethrough)
{
    raw_aio_open(&file, open_fd(direct), g_str_equal(opt.aio, "native"), 0);
    file_direct = direct;
}

static void engine_close(ModelTiers *tiers)
{
    BlockStatsRawAio *stats = raw_aio_query_stats(&file);

    tiers->counted = true;
    tiers->inlined += stats->inline_served;
    tiers->native += stats->native_served;
    tiers->pool += stats->pool_served;
    tiers->refused += stats->inline_refused + stats->native_refused;
    tiers->shortened += stats->short_transfers;
    qapi_free_BlockStatsRawAio(stats);
    raw_aio_close(&file);
}

static void engine_send(ModelOp *op)
{
    int type = 0;

    switch (op->kind) {
    case OP_READ:
    case OP_SETTLE:
        type = QEMU_AIO_READ;
        break;
    case OP_WRITE:
        type = QEMU_AIO_WRITE;
        break;
    case OP_FLUSH:
        type = QEMU_AIO_FLUSH;
        break;
    default:
        g_assert_not_reached();
    }
    for (int i = 0; op->bytes && file_direct && i < op->qiov.niov; i++) {
        struct iovec *iov = &op->qiov.iov[i];

        if (((uintptr_t)iov->iov_base | iov->iov_len) % 4096) {
            type |= QEMU_AIO_MISALIGNED;
        }
    }
    op->acb = raw_aio_submit(&file, type, op->offset,
                             op->kind == OP_FLUSH ? NULL : &op->qiov,
                             op->flags, model_op_done, op);
}

static void engine_cancel(ModelOp *op)
{
    op->cancelled = true;
    bdrv_aio_cancel_async(op->acb);
}

/* There is nothing above it that could wait. */
static void engine_drain(void)
{
}

static void engine_move(AioContext *ctx)
{
}

static void engine_reopen(bool direct, bool writethrough)
{
    file_direct = direct;
    raw_aio_set_fd(&file, open_fd(direct));
    model_tolerate_new_fd();
}

static void engine_set_writable(bool writable, bool reopen)
{
}

static void set_ret(void *opaque, int ret)
{
    *(int *)opaque = ret;
}

static bool engine_wait(const char *what, int type, uint64_t offset,
                        QEMUIOVector *qiov)
{
    int ret = INT_MAX;

    raw_aio_submit(&file, type, offset, qiov, 0, set_ret, &ret);
    while (ret == INT_MAX) {
        aio_poll(qemu_get_aio_context(), true);
    }
    return model_check_ret(what, ret);
}

static bool engine_flush(void)
{
    return engine_wait("flush", QEMU_AIO_FLUSH, 0, NULL);
}

static void engine_read(uint64_t offset, uint64_t bytes, void *buf)
{
    QEMUIOVector qiov = QEMU_IOVEC_INIT_BUF(qiov, buf, bytes);

    while (!engine_wait("read", QEMU_AIO_READ, offset, &qiov)) {
        /* A read that failed, as it may, has to succeed when tried again. */
    }
}

static void engine_check(uint64_t size, bool last)
{
}

const ModelTarget model_target_engine = {
    .create = model_create_raw,
    .open = engine_open,
    .close = engine_close,
    .send = engine_send,
    .cancel = engine_cancel,
    .drain = engine_drain,
    .move = engine_move,
    .reopen = engine_reopen,
    .set_writable = engine_set_writable,
    .flush = engine_flush,
    .read = engine_read,
    .check = engine_check,
};
