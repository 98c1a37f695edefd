/*
 * raw-aio-model: what an operation does
 *
 * Follows from the seed, the options and the operations before it alone.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/memalign.h"
#include "qemu/units.h"
#include "raw-aio-model.h"

/* Segments of a request, at most; with a guard before and after each */
#define MAX_SEGMENTS    24
#define GUARD           16

/* Of 10000 operations; the rest are reads. */
static const unsigned kind_weight[OP__MAX] = {
    [OP_WRITE] = 3400, [OP_ZERO] = 700, [OP_DISCARD] = 600, [OP_FLUSH] = 300,
    [OP_TRUNCATE] = 150, [OP_CANCEL] = 500, [OP_VERIFY] = 15, [OP_DRAIN] = 40,
    [OP_MOVE] = 30, [OP_REOPEN] = 20, [OP_READ_ONLY] = 10, [OP_CLOSE] = 4,
    [OP_SHORTEN] = 8, [OP_PAUSE] = 20,
};

/* The same for --tolerate, whose runs are short */
static const unsigned tolerate_weight[OP__MAX] = {
    [OP_WRITE] = 3000, [OP_ZERO] = 1000, [OP_DISCARD] = 600, [OP_FLUSH] = 700,
    [OP_TRUNCATE] = 500, [OP_CANCEL] = 500, [OP_VERIFY] = 50,
    [OP_DRAIN] = 400, [OP_MOVE] = 100, [OP_REOPEN] = 100, [OP_SHORTEN] = 50,
    [OP_PAUSE] = 50,
};

uint64_t model_capacity(void)
{
    return opt.size / 2 * 3;
}

uint64_t op_random(ModelOp *op, uint64_t limit)
{
    op->random += UINT64_C(0x9e3779b97f4a7c15);
    return model_mix64(op->random) % limit;
}

static bool op_one_in(ModelOp *op, unsigned n)
{
    return op_random(op, n) == 0;
}

static bool is_write(ModelKind kind)
{
    return kind == OP_WRITE || kind == OP_ZERO || kind == OP_DISCARD;
}

bool op_is_for_main(ModelKind kind)
{
    return kind >= OP_VERIFY && kind <= OP_PAUSE;
}

static ModelKind choose_kind(ModelOp *op, const ModelPlan *plan)
{
    const unsigned *weight = opt.tolerate ? tolerate_weight : kind_weight;
    unsigned r = op_random(op, 10000);
    ModelKind kind = OP_READ;

    for (ModelKind k = 0; k < OP__MAX; k++) {
        if (r < weight[k]) {
            kind = k;
            break;
        }
        r -= weight[k];
    }
    if (!plan->writable) {
        if (op_one_in(op, 40) || kind == OP_READ_ONLY) {
            return OP_READ_WRITE;
        }
        if (is_write(kind) || kind == OP_TRUNCATE || kind == OP_CLOSE ||
            kind == OP_SHORTEN) {
            return OP_READ;
        }
        /*
         * Also without the series, raw_reopen_commit() forgets O_DIRECT, and
         * the next reopen may keep a descriptor that has it: reads fail.
         */
        if (kind == OP_REOPEN) {
            return OP_DRAIN;
        }
    }
    if (opt.qcow2 && kind == OP_SHORTEN) {
        return OP_READ;
    }
    /*
     * A reopen, or a qcow2 image with another size, needs flushes that succeed,
     * and is a matter of QEMU's other code.
     */
    if (opt.tolerate && ((kind == OP_REOPEN && !opt.callback) ||
                         (kind == OP_TRUNCATE && opt.qcow2))) {
        return OP_FLUSH;
    }
    if (opt.callback) {
        switch (kind) {
        case OP_ZERO:
        case OP_DISCARD:
            return OP_WRITE;
        case OP_TRUNCATE:
            return OP_CANCEL;
        case OP_READ_ONLY:
        case OP_DRAIN:
        case OP_MOVE:
            return OP_REOPEN;
        default:
            break;
        }
    }
    return kind;
}

/*
 * When an unaligned write has to read first what is around it, and that fails,
 * QEMU does not notice and writes there what it finds in memory: block/io.c
 * ignores what bdrv_padding_rmw_read() returns, also without the series.
 */
static bool may_pad(ModelKind kind)
{
    return !opt.tolerate || !opt.direct || kind == OP_READ;
}

static void choose_range(ModelOp *op, const ModelPlan *plan)
{
    static const unsigned aligns[] = {
        1, 512, 512, MODEL_BLOCK, MODEL_BLOCK, MODEL_BLOCK,
    };
    uint64_t align = aligns[op_random(op, ARRAY_SIZE(aligns))];
    uint64_t longest = UINT64_C(1) << op_random(op, 18);
    uint64_t size = plan->size;
    ModelRange recent;

    if ((opt.callback && plan->direct) || !may_pad(op->kind)) {
        align = MODEL_BLOCK;
    }
    if (opt.tolerate) {
        /* Vectors that suit O_DIRECT, and can be cut */
        longest = MAX(longest, 2 * MODEL_BLOCK);
    }
    if (op_one_in(op, 150)) {
        longest = MODEL_MAX_REQUEST;
    } else if (op->kind != OP_READ && op->kind != OP_WRITE &&
               op_one_in(op, 16)) {
        longest = MODEL_MAX_REQUEST;
    }
    op->bytes = ROUND_UP(1 + op_random(op, longest), align);
    if (op_one_in(op, op->kind == OP_READ ? 2 : 8)) {
        /* Where others are at work, or have just been */
        recent = plan->recent[op_random(op, ARRAY_SIZE(plan->recent))];
        op->offset = recent.offset + op_random(op, 3 * align);
        if (op->kind == OP_READ && recent.bytes) {
            op->offset = recent.offset;
            op->bytes = ROUND_UP(recent.bytes, align);
        }
    } else {
        op->offset = op_random(op, size);
    }
    if (op_one_in(op, 50)) {
        op->offset = size - MIN(size, op_random(op, op->bytes + align));
    }
    op->offset = ROUND_DOWN(MIN(op->offset, size - 1), align);

    /* What is beyond the end is part of the test, for some. */
    if (op->offset + op->bytes <= size) {
        return;
    }
    if ((op->kind == OP_READ || op->kind == OP_WRITE) &&
        op->offset + op->bytes <= model_capacity() && op_one_in(op, 2)) {
        if (op_one_in(op, 4) && size + op->bytes <= model_capacity()) {
            op->offset = ROUND_UP(size, align) +
                op_random(op, model_capacity() - size - op->bytes + 1);
            op->offset = MIN(op->offset, model_capacity() - op->bytes);
            op->offset = ROUND_DOWN(op->offset, align);
        }
        op->beyond = opt.qcow2 && op->offset + op->bytes > size;
        op->extends = !op->beyond && op->kind == OP_WRITE &&
                      op->offset + op->bytes > size;
        return;
    }
    if (size - op->offset >= align) {
        op->bytes = ROUND_DOWN(size - op->offset, align);
    } else {
        op->bytes = size - op->offset;
    }
}

static void choose_size(ModelOp *op, const ModelPlan *plan)
{
    uint64_t unit = op_one_in(op, 2) || !may_pad(op->kind) ? MODEL_BLOCK : 512;
    uint64_t least = opt.size / 2;

    op->size = ROUND_DOWN(least + op_random(op, model_capacity() - least),
                          unit);
    if (!op_one_in(op, 4)) {
        uint64_t size = plan->size + op_random(op, 128 * KiB);

        size -= MIN(size - least, op_random(op, 128 * KiB));
        op->size = ROUND_DOWN(MIN(size, model_capacity()), unit);
    }
    if (op->size == plan->size) {
        op->size += op->size > least ? -unit : unit;
    }
    op->offset = MIN(op->size, plan->size);
    op->bytes = model_capacity() - op->offset;
    op->prealloc = PREALLOC_MODE_OFF;
    /*
     * With O_DIRECT a write to the last block makes that whole, and the file
     * longer than the image: to a size between them, QEMU can't preallocate.
     */
    if (op->size >= ROUND_UP(plan->size, MODEL_BLOCK) &&
        op->size > plan->size && !opt.qcow2) {
        static const PreallocMode modes[] = {
            PREALLOC_MODE_OFF, PREALLOC_MODE_OFF, PREALLOC_MODE_FALLOC,
            PREALLOC_MODE_FULL,
        };

        /* QEMU's "full" has no buffer that suits O_DIRECT. */
        op->prealloc = modes[op_random(op, ARRAY_SIZE(modes) - plan->direct)];
    }
    if (op->size > plan->size && (opt.qcow2 || op_one_in(op, 2))) {
        /* Without it qcow2 shows again what an image had when it shrank. */
        op->flags = BDRV_REQ_ZERO_WRITE;
    }
}

ModelOp *op_new(uint64_t id, const ModelPlan *plan)
{
    ModelOp *op = g_new0(ModelOp, 1);
    unsigned r;

    op->id = id;
    op->random = model_mix64(model_mix64(opt.seed) + id);
    op->kind = choose_kind(op, plan);
    op->pump_from_bh = op_one_in(op, 2);
    r = op_random(op, 16);
    op->max_in_flight = r == 0 ? 1 : r < 3 ? 1 + op_random(op, opt.depth)
                                           : opt.depth;
    r = op_random(op, plan->nr_loops);
    op->loop = opt.iothreads > 1 ? r : plan->home;

    switch (op->kind) {
    case OP_READ:
    case OP_WRITE:
    case OP_ZERO:
    case OP_DISCARD:
        choose_range(op, plan);
        break;
    case OP_TRUNCATE:
        choose_size(op, plan);
        break;
    case OP_SHORTEN:
        op->offset = ROUND_DOWN(op_random(op, plan->size), 512);
        op->bytes = model_capacity() - op->offset;
        break;
    default:
        break;
    }
    if ((op->kind == OP_WRITE || op->kind == OP_ZERO) && op_one_in(op, 12)) {
        op->flags |= BDRV_REQ_FUA;
    }
    if (op->kind == OP_ZERO) {
        op->flags |= op_one_in(op, 2) ? BDRV_REQ_MAY_UNMAP : 0;
        op->flags |= op_one_in(op, 8) ? BDRV_REQ_NO_FALLBACK : 0;
    }
    op->cancel_at_once = opt.callback && op_one_in(op, 30);
    return op;
}

void op_foresee(ModelOp *op, ModelPlan *plan)
{
    switch (op->kind) {
    case OP_WRITE:
        if (op->extends) {
            plan->size = ROUND_UP(MAX(plan->size, op->offset + op->bytes), 512);
        }
        /* fall through */
    case OP_ZERO:
    case OP_DISCARD:
        plan->recent[op->id % ARRAY_SIZE(plan->recent)] = (ModelRange) {
            op->offset, op->bytes,
        };
        break;
    case OP_TRUNCATE:
        plan->size = op->size;
        break;
    case OP_MOVE:
        plan->home = op_random(op, plan->nr_loops);
        break;
    case OP_REOPEN:
    case OP_CLOSE:
        if (plan->any_cache || !g_str_equal(opt.aio, "native")) {
            plan->direct = op_random(op, 4) ? opt.direct : !opt.direct;
        }
        plan->writethrough = op_random(op, 4) ? opt.writethrough
                                              : !opt.writethrough;
        if (op->kind == OP_CLOSE) {
            plan->home = plan->nr_loops - 1;
        }
        break;
    case OP_READ_ONLY:
        plan->writable = false;
        plan->by_reopen = op_random(op, 2);
        break;
    case OP_READ_WRITE:
        plan->writable = true;
        break;
    default:
        break;
    }
}

/* --- buffers --- */

/*
 * Segments that suit O_DIRECT, or of any length at any address.  Before and
 * after each is something that must not change.
 */
void op_make_buffer(ModelOp *op)
{
    bool aligned = op->bytes % MODEL_BLOCK == 0 && !op_one_in(op, 3);
    uint64_t unit = aligned ? MODEL_BLOCK : 1, units = op->bytes / unit;
    int n = op_one_in(op, 2) ? 1 : 1 + op_random(op, MAX_SEGMENTS);
    uint64_t cut[MAX_SEGMENTS + 1];
    size_t gap = aligned ? MODEL_BLOCK : GUARD, at;

    op->buf_bytes = op->bytes + (n + 2) * (gap + 512);
    op->buf = qemu_memalign(MODEL_BLOCK, op->buf_bytes);
    memset(op->buf, MODEL_POISON, op->buf_bytes);
    qemu_iovec_init(&op->qiov, n);

    for (int i = 1; i < n; i++) {
        cut[i] = op_random(op, units + 1) * unit;
    }
    cut[0] = 0;
    cut[n] = op->bytes;
    for (int i = 2; i < n; i++) {
        for (int j = i; j > 1 && cut[j - 1] > cut[j]; j--) {
            uint64_t swap = cut[j];

            cut[j] = cut[j - 1];
            cut[j - 1] = swap;
        }
    }
    at = gap;
    for (int i = 0; i < n; i++) {
        if (cut[i] == cut[i + 1] && !opt.callback) {
            /* QEMU's block layer aborts when it pads such a request. */
            continue;
        }
        if (!aligned && op_one_in(op, 2)) {
            at += op_random(op, 512);
        }
        qemu_iovec_add(&op->qiov, op->buf + at, cut[i + 1] - cut[i]);
        at += cut[i + 1] - cut[i] + gap;
    }
    assert(at <= op->buf_bytes);
}

void op_fill_buffer(ModelOp *op, const ModelData *data)
{
    uint64_t offset = op->offset;

    for (int i = 0; i < op->qiov.niov; i++) {
        struct iovec *iov = &op->qiov.iov[i];

        model_data_pattern(data, op->id, offset, iov->iov_base,
                           iov->iov_len);
        offset += iov->iov_len;
    }
}

void op_check_guards(const ModelOp *op)
{
    uint8_t guard[GUARD];

    memset(guard, MODEL_POISON, GUARD);
    for (int i = 0; i < op->qiov.niov; i++) {
        uint8_t *base = op->qiov.iov[i].iov_base;

        if (memcmp(base - GUARD, guard, GUARD) ||
            memcmp(base + op->qiov.iov[i].iov_len, guard, GUARD)) {
            model_found(EXIT_WRONG_DATA, op, "memory beside segment %d of %d "
                        "was changed", i, op->qiov.niov);
        }
    }
}
