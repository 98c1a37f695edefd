/*
 * What raw-aio-model knows about the content of the image
 *
 * Several requests may be in flight on the same bytes.  Then any result that
 * some order of them explains is right: a byte that is read must come from a
 * write that began before the read ended and that no other write, begun after
 * the end of the first and ended before the begin of the read, has replaced.
 * Writes that overlapped in time stay undecided until a read, sent when the
 * last of them is done, says which of them won; from then on that is the
 * content.
 *
 * Nothing here takes a lock: the caller has one.  Times are the order in which
 * the functions below are called.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef RAW_AIO_MODEL_DATA_H
#define RAW_AIO_MODEL_DATA_H

/* What memory holds before a read, and between the parts of a buffer */
#define MODEL_POISON    0xa5

typedef enum ModelChange {
    MODEL_WRITE,        /* the pattern of the operation */
    MODEL_ZERO,
    MODEL_DISCARD,      /* each byte is 0 or what it was */
    MODEL_RESIZE,       /* what is between the two sizes becomes 0 */
} ModelChange;

typedef enum ModelEffect {
    MODEL_DONE,
    MODEL_UNDONE,       /* nothing was changed */
    MODEL_PARTLY,       /* each byte may have been */
} ModelEffect;

typedef struct ModelData ModelData;
typedef struct ModelWrite ModelWrite;
typedef struct ModelRead ModelRead;
typedef struct ModelCluster ModelCluster;

/* Where what was read is not what it should be */
typedef struct ModelMismatch {
    uint64_t offset;
    char *expected;
    char *found;
} ModelMismatch;

/**
 * model_data_new: an image that is all zeroes.
 * @salt: makes the data of this run differ from those of others
 * @capacity: bytes; all offsets are below it
 * @margin: a change of the size is alone in so many bytes before the end too;
 *          not 0 for qcow2, where what may free clusters is alone as well
 * @max_span: undecided writes span at most so many bytes, which are read at
 *            once in the end
 */
ModelData *model_data_new(uint64_t salt, uint64_t capacity, uint64_t margin,
                          uint64_t max_span);
void model_data_free(ModelData *data);

/**
 * model_data_pattern: the bytes that operation @id writes at @offset.
 */
void model_data_pattern(const ModelData *data, uint64_t id, uint64_t offset,
                        uint8_t *buf, size_t bytes);

/**
 * model_data_may_read, model_data_may_write: whether an operation may begin
 * now, or has to wait for the end of others.
 */
bool model_data_may_read(const ModelData *data, uint64_t offset,
                         uint64_t bytes);
bool model_data_may_write(const ModelData *data, ModelChange change,
                          uint64_t offset, uint64_t bytes);

/**
 * model_data_undecided: number of writes that are in flight or undecided.
 */
unsigned model_data_undecided(const ModelData *data);

ModelWrite *model_write_begin(ModelData *data, ModelChange change, uint64_t id,
                              uint64_t offset, uint64_t bytes);

/**
 * model_write_end: the operation is done.
 *
 * Returns: what model_settle_begin() has to be called for, or NULL
 */
ModelCluster *model_write_end(ModelData *data, ModelWrite *write,
                              ModelEffect effect);

/**
 * model_settle_begin: begin the read that decides.
 *
 * No other write may begin there before it has ended.
 */
ModelRead *model_settle_begin(ModelData *data, ModelCluster *cluster,
                              uint64_t *offset, uint64_t *bytes, uint64_t *id);

ModelRead *model_read_begin(ModelData *data, uint64_t offset, uint64_t bytes);

/**
 * model_read_end: the operation is done.
 * @buf: what it has read; NULL if it has failed as it should
 * @last_id: operations up to this one are looked for in a mismatch
 *
 * Returns: false, and @mismatch, if what it has read is wrong
 */
bool model_read_end(ModelData *data, ModelRead *read, const uint8_t *buf,
                    uint64_t last_id, ModelMismatch *mismatch);

/**
 * model_data_clear: bytes become 0 while nothing is in flight.
 */
void model_data_clear(ModelData *data, uint64_t offset, uint64_t bytes);

/**
 * model_data_check: compare while nothing is in flight.
 */
bool model_data_check(const ModelData *data, const uint8_t *buf,
                      uint64_t offset, uint64_t bytes, uint64_t last_id,
                      ModelMismatch *mismatch);

/* Finaliser of SplitMix64 (Steele, Lea, Flood 2014) */
static inline uint64_t model_mix64(uint64_t x)
{
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

#endif /* RAW_AIO_MODEL_DATA_H */
