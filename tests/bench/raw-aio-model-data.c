/*
 * What raw-aio-model knows about the content of the image
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "raw-aio-model-data.h"

/* So many writes may be undecided about the same bytes. */
#define CLUSTER_MAX     6

#define IN_FLIGHT       UINT64_MAX

struct ModelWrite {
    ModelChange change;
    uint64_t id;
    uint64_t offset, bytes;
    uint64_t begin, end;    /* times; end is IN_FLIGHT before it has ended */
    ModelEffect effect;     /* once it has ended */
    ModelCluster *cluster;  /* while in flight or undecided */
    int refcnt;
};

/* Writes of which each overlaps another in space, and did so in time */
struct ModelCluster {
    GPtrArray *writes;      /* ModelWrite */
    uint64_t offset, bytes; /* all that they cover */
    unsigned in_flight;
    bool settling;          /* the read that decides is on its way */
};

struct ModelRead {
    uint64_t offset, bytes;
    uint64_t begin;         /* time */
    uint8_t *before;        /* the content at that time */
    GPtrArray *writes;      /* undecided then, or begun since */
    ModelCluster *settles;  /* or NULL */
};

struct ModelData {
    uint64_t salt;
    uint64_t capacity, margin, max_span;
    uint64_t time;
    uint8_t *content;       /* but for what clusters may have changed */
    GPtrArray *clusters;    /* ModelCluster */
    GPtrArray *reads;       /* ModelRead, in flight */
};

static bool overlap(uint64_t a, uint64_t a_bytes, uint64_t b, uint64_t b_bytes)
{
    return a < b + b_bytes && b < a + a_bytes;
}

static void write_unref(gpointer opaque)
{
    ModelWrite *write = opaque;

    if (--write->refcnt == 0) {
        g_free(write);
    }
}

static ModelWrite *write_ref(ModelWrite *write)
{
    write->refcnt++;
    return write;
}

static void cluster_free(gpointer opaque)
{
    ModelCluster *cluster = opaque;

    g_ptr_array_unref(cluster->writes);
    g_free(cluster);
}

static void read_free(gpointer opaque)
{
    ModelRead *read = opaque;

    g_ptr_array_unref(read->writes);
    g_free(read->before);
    g_free(read);
}

ModelData *model_data_new(uint64_t salt, uint64_t capacity, uint64_t margin,
                          uint64_t max_span)
{
    ModelData *data = g_new0(ModelData, 1);

    data->salt = model_mix64(salt);
    data->capacity = capacity;
    data->margin = margin;
    data->max_span = max_span;
    data->content = g_malloc0(capacity);
    data->clusters = g_ptr_array_new_with_free_func(cluster_free);
    data->reads = g_ptr_array_new_with_free_func(read_free);
    return data;
}

void model_data_free(ModelData *data)
{
    g_ptr_array_unref(data->clusters);
    g_ptr_array_unref(data->reads);
    g_free(data->content);
    g_free(data);
}

/* The data of 8 aligned bytes */
static uint64_t pattern_word(const ModelData *data, uint64_t id,
                             uint64_t offset)
{
    return model_mix64(model_mix64(data->salt + id) + offset / 8);
}

void model_data_pattern(const ModelData *data, uint64_t id, uint64_t offset,
                        uint8_t *buf, size_t bytes)
{
    uint64_t base = model_mix64(data->salt + id);

    while (bytes) {
        unsigned skip = offset % 8;
        size_t n = MIN(8 - skip, bytes);
        uint8_t word[8];

        stq_le_p(word, model_mix64(base + offset / 8));
        memcpy(buf, word + skip, n);
        buf += n;
        offset += n;
        bytes -= n;
    }
}

/* --- what may begin --- */

/*
 * Whether nothing else may be at work where it is.  qcow2, with and without the
 * series, frees clusters although requests in flight use them, and gives them
 * to others.
 */
static bool is_alone(const ModelData *data, ModelChange change)
{
    return change == MODEL_RESIZE ||
           (data->margin && (change == MODEL_DISCARD || change == MODEL_ZERO));
}

static uint64_t margin(const ModelData *data, ModelChange change)
{
    return change == MODEL_RESIZE ? data->margin : 0;
}

/* Whether something that is to be alone is in the way */
static bool alone_touches(const ModelData *data, const ModelCluster *cluster,
                          uint64_t offset, uint64_t bytes)
{
    const ModelWrite *first = cluster->writes->pdata[0];

    return is_alone(data, first->change) &&
           offset + bytes + margin(data, first->change) > cluster->offset &&
           offset < cluster->offset + cluster->bytes;
}

bool model_data_may_read(const ModelData *data, uint64_t offset, uint64_t bytes)
{
    for (guint i = 0; i < data->clusters->len; i++) {
        const ModelCluster *c = data->clusters->pdata[i];

        if (c->in_flight && alone_touches(data, c, offset, bytes)) {
            return false;
        }
    }
    return true;
}

static bool may_be_alone(const ModelData *data, uint64_t from, uint64_t bytes)
{
    for (guint i = 0; i < data->clusters->len; i++) {
        const ModelCluster *c = data->clusters->pdata[i];

        if (overlap(c->offset, c->bytes, from, bytes) ||
            alone_touches(data, c, from, bytes)) {
            return false;
        }
    }
    for (guint i = 0; i < data->reads->len; i++) {
        const ModelRead *r = data->reads->pdata[i];

        if (overlap(r->offset, r->bytes, from, bytes)) {
            return false;
        }
    }
    return true;
}

bool model_data_may_write(const ModelData *data, ModelChange change,
                          uint64_t offset, uint64_t bytes)
{
    uint64_t from = offset, to = offset + bytes;
    unsigned members = 1;

    if (is_alone(data, change)) {
        from -= MIN(from, margin(data, change));
        return may_be_alone(data, from, to - from);
    }
    for (guint i = 0; i < data->clusters->len; i++) {
        const ModelCluster *c = data->clusters->pdata[i];

        if (alone_touches(data, c, offset, bytes)) {
            return false;
        }
        if (!overlap(c->offset, c->bytes, offset, bytes)) {
            continue;
        }
        if (c->settling || !c->in_flight) {
            return false;
        }
        members += c->writes->len;
        from = MIN(from, c->offset);
        to = MAX(to, c->offset + c->bytes);
    }
    /* Alone it may be longer: it is not read at once then. */
    return members == 1 || (members <= CLUSTER_MAX &&
                            to - from <= data->max_span);
}

unsigned model_data_undecided(const ModelData *data)
{
    unsigned n = 0;

    for (guint i = 0; i < data->clusters->len; i++) {
        n += ((ModelCluster *)data->clusters->pdata[i])->writes->len;
    }
    return n;
}

/* --- writes --- */

static void cluster_add(ModelCluster *cluster, ModelWrite *write)
{
    uint64_t end = MAX(cluster->offset + cluster->bytes,
                       write->offset + write->bytes);

    if (!cluster->writes->len) {
        cluster->offset = write->offset;
    }
    cluster->offset = MIN(cluster->offset, write->offset);
    cluster->bytes = end - cluster->offset;
    cluster->in_flight += write->end == IN_FLIGHT;
    write->cluster = cluster;
    g_ptr_array_add(cluster->writes, write_ref(write));
}

ModelWrite *model_write_begin(ModelData *data, ModelChange change, uint64_t id,
                              uint64_t offset, uint64_t bytes)
{
    ModelWrite *write = g_new(ModelWrite, 1);
    ModelCluster *cluster = g_new0(ModelCluster, 1);

    *write = (ModelWrite) {
        .change = change, .id = id, .offset = offset, .bytes = bytes,
        .begin = ++data->time, .end = IN_FLIGHT,
    };
    cluster->writes = g_ptr_array_new_with_free_func(write_unref);
    cluster_add(cluster, write);
    for (guint i = 0; i < data->clusters->len; ) {
        ModelCluster *old = data->clusters->pdata[i];

        if (!overlap(old->offset, old->bytes, offset, bytes)) {
            i++;
            continue;
        }
        for (guint w = 0; w < old->writes->len; w++) {
            cluster_add(cluster, old->writes->pdata[w]);
        }
        g_ptr_array_remove_index_fast(data->clusters, i);
    }
    g_ptr_array_add(data->clusters, cluster);

    for (guint i = 0; i < data->reads->len; i++) {
        ModelRead *r = data->reads->pdata[i];

        if (overlap(r->offset, r->bytes, offset, bytes)) {
            g_ptr_array_add(r->writes, write_ref(write));
        }
    }
    return write;
}

/* Each byte may be what it was. */
static bool may_be_partial(const ModelWrite *write)
{
    return write->effect == MODEL_PARTLY ||
           (write->effect == MODEL_DONE && write->change == MODEL_DISCARD);
}

static bool replaces(const ModelWrite *write)
{
    return write->effect == MODEL_DONE && write->change != MODEL_DISCARD;
}

static void apply(ModelData *data, const ModelWrite *write)
{
    if (write->change == MODEL_WRITE) {
        model_data_pattern(data, write->id, write->offset,
                           data->content + write->offset, write->bytes);
    } else {
        memset(data->content + write->offset, 0, write->bytes);
    }
}

ModelCluster *model_write_end(ModelData *data, ModelWrite *write,
                              ModelEffect effect)
{
    ModelCluster *cluster = write->cluster;

    write->end = ++data->time;
    write->effect = effect;
    if (--cluster->in_flight) {
        return NULL;
    }
    if (cluster->writes->len > 1 || may_be_partial(write)) {
        return cluster;
    }
    if (effect == MODEL_DONE) {
        apply(data, write);
    }
    g_ptr_array_remove_fast(data->clusters, cluster);
    return NULL;
}

/* --- reads --- */

static ModelRead *read_new(ModelData *data, uint64_t offset, uint64_t bytes)
{
    ModelRead *read = g_new0(ModelRead, 1);

    read->offset = offset;
    read->bytes = bytes;
    read->begin = ++data->time;
    read->before = g_memdup2(data->content + offset, bytes);
    read->writes = g_ptr_array_new_with_free_func(write_unref);
    for (guint i = 0; i < data->clusters->len; i++) {
        const ModelCluster *c = data->clusters->pdata[i];

        for (guint w = 0; w < c->writes->len; w++) {
            ModelWrite *write = c->writes->pdata[w];

            if (overlap(write->offset, write->bytes, offset, bytes)) {
                g_ptr_array_add(read->writes, write_ref(write));
            }
        }
    }
    g_ptr_array_add(data->reads, read);
    return read;
}

ModelRead *model_read_begin(ModelData *data, uint64_t offset, uint64_t bytes)
{
    return read_new(data, offset, bytes);
}

ModelRead *model_settle_begin(ModelData *data, ModelCluster *cluster,
                              uint64_t *offset, uint64_t *bytes, uint64_t *id)
{
    ModelRead *read = read_new(data, cluster->offset, cluster->bytes);

    cluster->settling = true;
    read->settles = cluster;
    *offset = cluster->offset;
    *bytes = cluster->bytes;
    *id = 0;
    for (guint i = 0; i < cluster->writes->len; i++) {
        *id = MAX(*id, ((ModelWrite *)cluster->writes->pdata[i])->id);
    }
    return read;
}

/* What belongs elsewhere; only of the last operations, as it takes long */
static void describe_stray(const ModelData *data, uint64_t value,
                           uint64_t offset, uint64_t last_id, GString *s)
{
    for (uint64_t id = last_id - MIN(last_id, 4096); id <= last_id; id++) {
        for (uint64_t at = offset % 512; at < data->capacity; at += 512) {
            if (pattern_word(data, id, at) == value) {
                g_string_append_printf(s, " (of operation %" PRIu64 ", for "
                                       "offset %" PRIu64 ")", id, at);
                return;
            }
        }
    }
}

/* The word around a wrong byte in words, and whose it is */
static char *describe(const ModelData *data, const uint8_t *word,
                      uint64_t offset, uint64_t last_id)
{
    g_autoptr(GString) s = g_string_new("");
    uint64_t value = ldq_le_p(word);
    bool poison = true;

    for (int i = 0; i < 8; i++) {
        g_string_append_printf(s, "%02x", word[i]);
        poison = poison && word[i] == MODEL_POISON;
    }
    if (!value) {
        g_string_append(s, " (zeroes)");
    } else if (poison) {
        g_string_append(s, " (buffer not filled)");
    } else {
        for (uint64_t id = 0; id <= last_id; id++) {
            if (pattern_word(data, id, offset) == value) {
                g_string_append_printf(s, " (of operation %" PRIu64 ")", id);
                return g_strdup(s->str);
            }
        }
        describe_stray(data, value, offset, last_id, s);
    }
    return g_strdup(s->str);
}

/* The 8 aligned bytes around @at, without what is outside of the buffer */
static void word_around(uint8_t *word, const uint8_t *buf, uint64_t offset,
                        uint64_t bytes, uint64_t at)
{
    uint64_t from = at & ~7ull;

    for (int i = 0; i < 8; i++) {
        uint64_t pos = from + i;

        word[i] = pos >= offset && pos < offset + bytes ? buf[pos - offset] : 0;
    }
}

static char *describe_at(const ModelData *data, const uint8_t *buf,
                         uint64_t offset, uint64_t bytes, uint64_t at,
                         uint64_t last_id)
{
    uint8_t word[8];

    word_around(word, buf, offset, bytes, at);
    return describe(data, word, at, last_id);
}

static bool equal_but(const ModelData *data, const uint8_t *expected,
                      const uint8_t *buf, uint64_t offset, uint64_t bytes,
                      uint64_t last_id, ModelMismatch *m)
{
    uint64_t i = 0;

    if (!memcmp(expected, buf, bytes)) {
        return true;
    }
    while (expected[i] == buf[i]) {
        i++;
    }
    i += offset;
    m->offset = i;
    m->expected = describe_at(data, expected, offset, bytes, i, last_id);
    m->found = describe_at(data, buf, offset, bytes, i, last_id);
    return false;
}

static bool covers(const ModelWrite *write, uint64_t offset)
{
    return offset >= write->offset && offset < write->offset + write->bytes;
}

/* @x: a write, or NULL for what was there before all of them */
static bool replaced(const ModelRead *read, const ModelWrite *x,
                     uint64_t offset)
{
    for (guint i = 0; i < read->writes->len; i++) {
        const ModelWrite *w = read->writes->pdata[i];

        if (w != x && replaces(w) &&
            covers(w, offset) && w->end < read->begin &&
            w->begin > (x ? x->end : 0)) {
            return true;
        }
    }
    return false;
}

static int compare_u64(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return x < y ? -1 : x > y;
}

/* Which bytes @x explains in a part of the read that is all covered or not */
static void explain(const ModelData *data, const ModelRead *read,
                    const ModelWrite *x, const uint8_t *buf, uint64_t from,
                    uint64_t to, uint8_t *ok, uint8_t *want)
{
    if (replaced(read, x, from)) {
        return;
    }
    if (!x) {
        memcpy(want, read->before + (from - read->offset), to - from);
    } else if (x->change == MODEL_WRITE) {
        model_data_pattern(data, x->id, from, want, to - from);
    } else {
        memset(want, 0, to - from);
    }
    for (uint64_t i = 0; i < to - from; i++) {
        ok[i] |= want[i] == buf[from - read->offset + i];
    }
}

/* Each byte must come from one of several writes. */
static bool explained(const ModelData *data, const ModelRead *read,
                      const uint8_t *buf, uint64_t last_id, ModelMismatch *m)
{
    guint n = read->writes->len;
    g_autofree uint64_t *cut = g_new(uint64_t, 2 * n + 2);
    g_autofree uint8_t *ok = g_malloc(read->bytes);
    g_autofree uint8_t *want = g_malloc(read->bytes);
    uint64_t end = read->offset + read->bytes;

    cut[0] = read->offset;
    cut[1] = end;
    for (guint i = 0; i < n; i++) {
        const ModelWrite *w = read->writes->pdata[i];

        cut[2 * i + 2] = MAX(w->offset, read->offset);
        cut[2 * i + 3] = MIN(w->offset + w->bytes, end);
    }
    qsort(cut, 2 * n + 2, sizeof(cut[0]), compare_u64);

    for (guint c = 0; c + 1 < 2 * n + 2; c++) {
        uint64_t from = cut[c], to = cut[c + 1];

        if (from == to) {
            continue;
        }
        memset(ok, 0, to - from);
        memset(want, 0, to - from);
        for (guint i = 0; i < n; i++) {
            const ModelWrite *w = read->writes->pdata[i];

            if (w->effect != MODEL_UNDONE && covers(w, from)) {
                explain(data, read, w, buf, from, to, ok, want);
            }
        }
        explain(data, read, NULL, buf, from, to, ok, want);
        for (uint64_t i = 0; i < to - from; i++) {
            g_autofree char *one = NULL;

            if (ok[i]) {
                continue;
            }
            m->offset = from + i;
            m->found = describe_at(data, buf, read->offset, read->bytes,
                                   from + i, last_id);
            one = describe_at(data, want, from, to - from, from + i, last_id);
            m->expected = g_strdup_printf("%s, or what one of %u operations at "
                                          "the same time wrote", one, n);
            return false;
        }
    }
    return true;
}

bool model_read_end(ModelData *data, ModelRead *read, const uint8_t *buf,
                    uint64_t last_id, ModelMismatch *m)
{
    ModelCluster *cluster = read->settles;
    bool good = true;

    data->time++;
    if (buf && !read->writes->len) {
        good = equal_but(data, read->before, buf, read->offset, read->bytes,
                         last_id, m);
    } else if (buf) {
        good = explained(data, read, buf, last_id, m);
    }
    if (cluster) {
        memcpy(data->content + read->offset, buf, read->bytes);
        g_ptr_array_remove_fast(data->clusters, cluster);
    }
    g_ptr_array_remove_fast(data->reads, read);
    return good;
}

/* --- while nothing is in flight --- */

void model_data_clear(ModelData *data, uint64_t offset, uint64_t bytes)
{
    memset(data->content + offset, 0, bytes);
}

bool model_data_check(const ModelData *data, const uint8_t *buf,
                      uint64_t offset, uint64_t bytes, uint64_t last_id,
                      ModelMismatch *m)
{
    assert(offset + bytes <= data->capacity);
    return equal_but(data, data->content + offset, buf, offset, bytes, last_id,
                     m);
}
