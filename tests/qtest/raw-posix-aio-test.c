/*
 * QTest: the raw file engine, seen from guest devices
 *
 * For each combination of aio, cache and image format, a guest device writes
 * and reads patterns with several requests in flight.  What it reads is
 * compared with a model of the disk, and so is the image in the end.  The
 * counters of query-blockstats prove which tier of the engine served.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <linux/aio_abi.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include "libqtest.h"
#include "libqos/ahci.h"
#include "libqos/libqos-pc.h"
#include "libqos/virtio-pci.h"
#include "qemu/bswap.h"
#include "qemu/units.h"
#include "standard-headers/linux/virtio_blk.h"
#include "standard-headers/linux/virtio_config.h"
#include "standard-headers/linux/virtio_pci.h"

#define SECTOR          512
#define IMAGE_MB        16
#define IMAGE_SIZE      (IMAGE_MB * MiB)
#define CLUSTER         (64 * KiB)      /* of qcow2 */
#define MAX_BYTES       (64 * KiB)      /* of a request */
#define MAX_MISALIGN    64              /* bytes that a buffer is shifted by */
#define MAX_REQS        16              /* in flight */
#define MAX_QUEUES      2
#define DATA_BYTES      (MAX_BYTES + 4 * KiB)
#define DESCS_PER_REQ   4
#define QUEUE_SIZE      (MAX_REQS * DESCS_PER_REQ)
#define HANG_US         (120 * G_USEC_PER_SEC)

/*
 * Where the phases of a test work on the disk.  RLIMIT_FSIZE makes the host
 * refuse to write further; in a qcow2 file that position is reached when
 * clusters are allocated for the last area.
 */
#define AREA_PATTERN    0
#define AREA_SMALL      (1 * MiB + 512 * KiB)
#define AREA_MIXED      (2 * MiB)
#define AREA_ZERO       (4 * MiB)
#define AREA_EOF        (7 * MiB + 512 * KiB)
#define NEW_EOF         (8 * MiB + 100)
#define AREA_ERROR      (10 * MiB)
#define LIMIT_RAW       (12 * MiB)
#define LIMIT_QCOW2     (6 * MiB)

typedef struct TestCase {
    const char *device;
    const char *aio;
    const char *cache;
    const char *format;
    const char *disable;    /* QEMU_RAW_AIO_DISABLE, or NULL */
    int iothreads;          /* one queue for each; 0 is the main loop */
} TestCase;

typedef struct Stats {
    uint64_t inline_served;
    uint64_t inline_batched;
    uint64_t native_served;
    uint64_t native_refused;
    uint64_t pool_served;
    uint64_t short_transfers;
    uint64_t ring_size;
    uint64_t discard_nb_ok;
} Stats;

/* An image and what it has to hold; what the devices have in common */
typedef struct Disk {
    const TestCase *tc;
    QOSState *qs;
    QTestState *qts;
    char *path;
    uint8_t *model;         /* IMAGE_SIZE bytes */
    uint64_t seed;          /* changes with each pattern */
} Disk;

typedef struct Req {
    /* Input */
    uint32_t type;          /* VIRTIO_BLK_T_* */
    uint64_t offset;        /* bytes, as the next */
    uint32_t bytes;
    uint32_t misalign;      /* of the buffer in guest memory */
    uint32_t flags;         /* for VIRTIO_BLK_T_WRITE_ZEROES */
    bool fails;             /* must fail */
    bool may_fail;
    const uint8_t *other;   /* what a read may find instead, by sectors */

    /* Output */
    uint8_t status;         /* VIRTIO_BLK_S_* */

    /* Private */
    uint8_t *data;
    uint16_t head;
    bool done;
} Req;

/* In guest memory, for each request */
typedef struct QEMU_PACKED Hdr {
    struct virtio_blk_outhdr out;
    uint8_t status;
    uint8_t pad[15];
} Hdr;

typedef struct VirtioDisk {
    Disk disk;
    QVirtioPCIDevice *pci;
    QVirtQueue *vq[MAX_QUEUES];
    int num_queues;
    uint64_t hdrs;          /* guest address of Hdr[MAX_REQS] */
    uint64_t data;          /* guest address of DATA_BYTES for each request */
} VirtioDisk;

static char *scratch;       /* directory */

/*
 * What the host can do
 */

static bool host_has_o_direct(void)
{
    static int has = -1;

    if (has < 0) {
        g_autofree char *path = g_build_filename(scratch, "o_direct", NULL);
        int fd = open(path, O_RDWR | O_CREAT | O_DIRECT, 0600);

        has = fd >= 0;
        if (has) {
            close(fd);
        }
        unlink(path);
    }
    return has;
}

/* Without kernel AIO, aio=native is served by the pool. */
static bool host_has_kernel_aio(void)
{
    static int has = -1;

    if (has < 0) {
        aio_context_t ctx = 0;

        has = syscall(SYS_io_setup, 128, &ctx) == 0;
        if (has) {
            syscall(SYS_io_destroy, ctx);
        }
    }
    return has;
}

static bool host_has_punch_hole(void)
{
    static int has = -1;

    if (has < 0) {
        g_autofree char *path = g_build_filename(scratch, "hole", NULL);
        int fd = open(path, O_RDWR | O_CREAT, 0600);

        g_assert_cmpint(fd, >=, 0);
        g_assert_cmpint(ftruncate(fd, MiB), ==, 0);
        has = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
                        MiB) == 0;
        close(fd);
        unlink(path);
    }
    return has;
}

static bool qemu_has_native(void)
{
    static int has = -1;

    if (has < 0) {
        g_autofree char *path = g_build_filename(scratch, "native", NULL);
        QTestState *qts = qtest_init("-machine none");
        QDict *rsp;

        /* The file isn't there: an enum value that isn't is found first. */
        rsp = qtest_qmp(qts, "{ 'execute': 'blockdev-add', 'arguments': {"
                        " 'driver': 'file', 'node-name': 'probe',"
                        " 'filename': %s, 'aio': 'native',"
                        " 'cache': { 'direct': true } } }", path);
        g_assert(qdict_haskey(rsp, "error"));
        has = !strstr(qdict_get_str(qdict_get_qdict(rsp, "error"), "desc"),
                      "does not accept value");
        qobject_unref(rsp);
        qtest_quit(qts);
    }
    return has;
}

static bool is_raw(const TestCase *tc)
{
    return g_str_equal(tc->format, "raw");
}

static bool is_direct(const TestCase *tc)
{
    return !g_str_equal(tc->cache, "writeback");
}

static bool is_disabled(const TestCase *tc, const char *what)
{
    return tc->disable && g_str_equal(tc->disable, what);
}

/* Returns: whether the native tier has to serve */
static bool expect_native(const TestCase *tc)
{
    return g_str_equal(tc->aio, "native") && is_direct(tc) &&
        !is_disabled(tc, "native") && host_has_kernel_aio();
}

static bool can_run(const TestCase *tc)
{
    if (g_str_equal(tc->aio, "native") && !qemu_has_native()) {
        g_test_skip("this build of QEMU has no aio=native");
        return false;
    }
    if (is_direct(tc) && !host_has_o_direct()) {
        g_test_skip("no O_DIRECT in the directory for temporary files");
        return false;
    }
    if (!is_raw(tc) && !have_qemu_img()) {
        g_test_skip("no qemu-img to make a qcow2 image");
        return false;
    }
    if (is_direct(tc) && g_str_equal(tc->aio, "native") &&
        !host_has_kernel_aio()) {
        g_test_message("no kernel AIO on this host: the pool has to serve");
    }
    return true;
}

/*
 * Disk
 */

/* Soft limit on the size of files, inherited by QEMU.  Returns the old one */
static rlim_t set_file_limit(rlim_t bytes)
{
    struct rlimit lim;
    rlim_t old;

    g_assert_cmpint(getrlimit(RLIMIT_FSIZE, &lim), ==, 0);
    old = lim.rlim_cur;
    lim.rlim_cur = bytes;
    g_assert_cmpint(setrlimit(RLIMIT_FSIZE, &lim), ==, 0);
    return old;
}

static void disk_boot(Disk *disk, const TestCase *tc, const char *machine,
                      const char *device)
{
    rlim_t old_limit;

    disk->tc = tc;
    disk->model = g_malloc0(IMAGE_SIZE);
    disk->path = g_build_filename(scratch, "image", NULL);
    if (have_qemu_img()) {
        g_assert_true(mkimg(disk->path, tc->format, IMAGE_MB));
    } else {
        int fd = open(disk->path, O_RDWR | O_CREAT | O_TRUNC, 0600);

        g_assert_cmpint(fd, >=, 0);
        g_assert_cmpint(ftruncate(fd, IMAGE_SIZE), ==, 0);
        close(fd);
    }

    if (tc->disable) {
        g_assert_true(g_setenv("QEMU_RAW_AIO_DISABLE", tc->disable, true));
    }
    old_limit = set_file_limit(is_raw(tc) ? LIMIT_RAW : LIMIT_QCOW2);
    disk->qs = qtest_pc_boot("-machine %s -nodefaults "
                             "-drive if=none,id=drive0,file=%s,format=%s,"
                             "aio=%s,cache=%s,discard=unmap,werror=report,"
                             "auto-read-only=off "
                             "%s", machine, disk->path, tc->format, tc->aio,
                             tc->cache, device);
    set_file_limit(old_limit);
    g_unsetenv("QEMU_RAW_AIO_DISABLE");
    disk->qts = disk->qs->qts;
}

static void disk_compare_raw(Disk *disk)
{
    g_autofree char *image = NULL;
    size_t len;

    g_assert_true(g_file_get_contents(disk->path, &image, &len, NULL));
    g_assert_cmpuint(len, <=, IMAGE_SIZE);
    g_assert_cmpmem(image, len, disk->model, len);
    for (; len < IMAGE_SIZE; len++) {
        g_assert_cmphex(disk->model[len], ==, 0);
    }
}

static void run_qemu_img(const char *args)
{
    g_autofree char *cmd = g_strdup_printf("%s %s", getenv("QTEST_QEMU_IMG"),
                                           args);
    g_autofree char *out = NULL, *err = NULL;
    int status = -1;

    g_assert_true(g_spawn_command_line_sync(cmd, &out, &err, &status, NULL));
    if (status) {
        g_test_message("%s: %s%s", cmd, out, err);
    }
    g_assert_cmpint(status, ==, 0);
}

static void disk_compare_qcow2(Disk *disk)
{
    g_autofree char *model = g_build_filename(scratch, "model", NULL);
    g_autofree char *check = g_strdup_printf("check -q -f qcow2 %s",
                                             disk->path);
    g_autofree char *compare = g_strdup_printf("compare -q -f raw -F qcow2 "
                                               "%s %s", model, disk->path);

    g_assert_true(g_file_set_contents(model, (char *)disk->model, IMAGE_SIZE,
                                      NULL));
    run_qemu_img(check);
    run_qemu_img(compare);
    unlink(model);
}

/* QEMU has ended: compare the image with the model, and clean up. */
static void disk_finish(Disk *disk)
{
    if (is_raw(disk->tc)) {
        disk_compare_raw(disk);
    } else {
        disk_compare_qcow2(disk);
    }
    unlink(disk->path);
    g_free(disk->path);
    g_free(disk->model);
}

/* Returns: bytes that the file system holds for the image */
static uint64_t disk_allocated(Disk *disk)
{
    struct stat st;
    int fd = open(disk->path, O_RDONLY);

    g_assert_cmpint(fd, >=, 0);
    /* Some file systems allocate and free late. */
    g_assert_cmpint(fsync(fd), ==, 0);
    g_assert_cmpint(fstat(fd, &st), ==, 0);
    close(fd);
    return (uint64_t)st.st_blocks * 512;
}

/* A pattern without zero bytes, different for each call and place */
static void disk_pattern(Disk *disk, uint64_t offset, uint8_t *buf,
                         size_t bytes)
{
    uint64_t seed = ++disk->seed << 32;

    for (size_t i = 0; i < bytes; i += sizeof(uint64_t)) {
        uint64_t x = (seed + offset + i) * 0x9e3779b97f4a7c15ull;

        x = (x ^ (x >> 29)) * 0xbf58476d1ce4e5b9ull;
        stq_le_p(buf + i, (x ^ (x >> 32)) | 0x0101010101010101ull);
    }
}

static void disk_check_data(Disk *disk, uint64_t offset, const uint8_t *buf,
                            size_t bytes)
{
    const uint8_t *model = disk->model + offset;

    for (size_t i = 0; i < bytes; i++) {
        if (buf[i] != model[i]) {
            g_test_message("read of 0x%zx bytes at 0x%" PRIx64 ": wrong data "
                           "at byte 0x%zx", bytes, offset, i);
            g_assert_cmphex(buf[i], ==, model[i]);
        }
    }
}

/* The counters of the file driver below drive0 */
static Stats disk_stats(Disk *disk)
{
    QDict *rsp = qtest_qmp(disk->qts, "{ 'execute': 'query-blockstats' }");
    QListEntry *entry;
    QDict *node = NULL, *specific = NULL, *aio;
    Stats stats;

    g_assert(qdict_haskey(rsp, "return"));
    QLIST_FOREACH_ENTRY(qdict_get_qlist(rsp, "return"), entry) {
        QDict *dev = qobject_to(QDict, qlist_entry_obj(entry));

        if (g_strcmp0(qdict_get_try_str(dev, "device"), "drive0") == 0) {
            node = dev;
        }
    }
    for (; node; node = qdict_get_qdict(node, "parent")) {
        specific = qdict_get_qdict(node, "driver-specific");
        if (specific &&
            g_str_equal(qdict_get_str(specific, "driver"), "file")) {
            break;
        }
    }
    g_assert_nonnull(node);
    aio = qdict_get_qdict(specific, "aio");
    g_assert_nonnull(aio);
    stats = (Stats) {
        .inline_served = qdict_get_int(aio, "inline-served"),
        .inline_batched = qdict_get_int(aio, "inline-batched"),
        .native_served = qdict_get_int(aio, "native-served"),
        .native_refused = qdict_get_int(aio, "native-refused"),
        .pool_served = qdict_get_int(aio, "pool-served"),
        .short_transfers = qdict_get_int(aio, "short-transfers"),
        .ring_size = qdict_get_int(aio, "ring-size"),
        .discard_nb_ok = qdict_get_int(specific, "discard-nb-ok"),
    };
    qobject_unref(rsp);
    return stats;
}

static uint64_t served(const Stats *stats)
{
    return stats->inline_served + stats->native_served + stats->pool_served;
}

/*
 * Check what holds in each phase.
 * @exact: with a raw image, as many requests as the guest sent have reached
 *         the host; else at least as many
 */
static void disk_check_tiers(Disk *disk, const Stats *old, uint64_t reqs,
                             bool exact)
{
    Stats new = disk_stats(disk);
    uint64_t n = served(&new) - served(old);

    g_test_message("%" PRIu64 " sent; inline %" PRIu64 ", native %" PRIu64
                   ", pool %" PRIu64 ", refused by native %" PRIu64, reqs,
                   new.inline_served - old->inline_served,
                   new.native_served - old->native_served,
                   new.pool_served - old->pool_served,
                   new.native_refused - old->native_refused);
    if (exact && is_raw(disk->tc)) {
        g_assert_cmpuint(n, ==, reqs);
    } else {
        g_assert_cmpuint(n, >=, reqs);
    }

    if (is_disabled(disk->tc, "inline")) {
        g_assert_cmpuint(new.inline_served, ==, 0);
    }
    if (!expect_native(disk->tc)) {
        g_assert_cmpuint(new.native_served, ==, 0);
        g_assert_cmpuint(new.native_refused, ==, 0);
        if (!g_str_equal(disk->tc->aio, "native") ||
            is_disabled(disk->tc, "inline") ||
            is_disabled(disk->tc, "native")) {
            g_assert_cmpuint(new.ring_size, ==, 0);
        }
    }
    g_assert_cmpuint(new.inline_batched, <=, new.inline_served);
    if (!new.ring_size) {
        g_assert_cmpuint(new.inline_batched, ==, 0);
    }
}

/*
 * Check the counters of reads of allocated data, for which @old was taken.
 * Returns: false if they have to be repeated.  The device may have been too
 * busy to take even one of them without a wait, but not time and again.
 */
static bool disk_check_reads(Disk *disk, const Stats *old, uint64_t reqs,
                             int attempt)
{
    Stats new = disk_stats(disk);

    disk_check_tiers(disk, old, reqs, true);
    if (!expect_native(disk->tc)) {
        return true;
    }
    g_assert_cmpuint(new.ring_size, >, 0);
    if (new.native_served > old->native_served) {
        return true;
    }
    g_assert_cmpint(attempt, <, 100);
    return false;
}

/*
 * virtio-blk
 */

/* A driver may make a queue smaller; libqos takes long to set up a large one */
static void virtio_limit_queue(VirtioDisk *v, int i)
{
    v->pci->vdev.bus->queue_select(&v->pci->vdev, i);
    qpci_io_writew(v->pci->pdev, v->pci->bar, v->pci->common_cfg_offset +
                   offsetof(struct virtio_pci_common_cfg, queue_size),
                   QUEUE_SIZE);
}

static void virtio_boot(VirtioDisk *v, const TestCase *tc)
{
    QPCIAddress addr = { .devfn = QPCI_DEVFN(4, 0) };
    g_autoptr(GString) device = g_string_new(NULL);
    g_autoptr(GString) props = g_string_new(NULL);
    QGuestAllocator *alloc;
    QVirtioDevice *vdev;
    uint64_t features;

    v->num_queues = MAX(tc->iothreads, 1);
    for (int i = 0; i < tc->iothreads; i++) {
        g_string_append_printf(device, "-object iothread,id=io%d ", i);
    }
    if (tc->iothreads == 1) {
        g_string_append(props, ", \"iothread\": \"io0\"");
    } else if (tc->iothreads == 2) {
        g_string_append(props, ", \"iothread-vq-mapping\": ["
                        " { \"iothread\": \"io0\" },"
                        " { \"iothread\": \"io1\" } ]");
    }
    /* Unmerged, the requests can be counted. */
    g_string_append_printf(device, "-device '{ \"driver\": \"virtio-blk-pci\","
                           " \"drive\": \"drive0\", \"addr\": \"04.0\","
                           " \"request-merging\": false,"
                           " \"num-queues\": %d%s }'",
                           v->num_queues, props->str);
    disk_boot(&v->disk, tc, "pc", device->str);

    alloc = &v->disk.qs->alloc;
    v->pci = virtio_pci_new(v->disk.qs->pcibus, &addr);
    g_assert_nonnull(v->pci);
    vdev = &v->pci->vdev;
    qvirtio_pci_device_enable(v->pci);
    qvirtio_start_device(vdev);
    features = qvirtio_get_features(vdev);
    features &= ~(QVIRTIO_F_BAD_FEATURE | (1ull << VIRTIO_RING_F_INDIRECT_DESC)
                  | (1ull << VIRTIO_RING_F_EVENT_IDX)
                  | (1ull << VIRTIO_BLK_F_SCSI));
    qvirtio_set_features(vdev, features);
    g_assert_true(features & (1ull << VIRTIO_F_VERSION_1));
    g_assert_true(features & (1ull << VIRTIO_BLK_F_FLUSH));
    g_assert_true(features & (1ull << VIRTIO_BLK_F_DISCARD));
    g_assert_true(features & (1ull << VIRTIO_BLK_F_WRITE_ZEROES));
    g_assert_cmpuint(qvirtio_config_readq(vdev, 0), ==, IMAGE_SIZE / SECTOR);
    for (int i = 0; i < v->num_queues; i++) {
        virtio_limit_queue(v, i);
        v->vq[i] = qvirtqueue_setup(vdev, alloc, i);
        g_assert_cmpuint(v->vq[i]->size, ==, QUEUE_SIZE);
    }
    qvirtio_set_driver_ok(vdev);

    v->hdrs = guest_alloc(alloc, MAX_REQS * sizeof(Hdr));
    v->data = guest_alloc(alloc, MAX_REQS * DATA_BYTES);
}

static void virtio_shutdown(VirtioDisk *v)
{
    QGuestAllocator *alloc = &v->disk.qs->alloc;

    guest_free(alloc, v->hdrs);
    guest_free(alloc, v->data);
    for (int i = 0; i < v->num_queues; i++) {
        /* Nothing has completed twice. */
        g_assert_false(qvirtqueue_get_buf(v->disk.qts, v->vq[i], NULL, NULL));
        qvirtqueue_cleanup(v->pci->vdev.bus, v->vq[i], alloc);
    }
    qvirtio_pci_destructor(&v->pci->obj);
    g_free(v->pci);
    qtest_shutdown(v->disk.qs);
    disk_finish(&v->disk);
}

/*
 * What libqos does for one descriptor, request or completion is done here for
 * all that are in flight, since each access to guest memory costs a message.
 */

static int virtio_add_desc(struct vring_desc *desc, int n, uint64_t addr,
                           uint32_t len, uint16_t flags)
{
    g_assert_cmpint(n, <, QUEUE_SIZE);
    desc[n] = (struct vring_desc) {
        .addr = cpu_to_le64(addr),
        .len = cpu_to_le32(len),
        .flags = cpu_to_le16(flags),
        .next = flags & VRING_DESC_F_NEXT ? cpu_to_le16(n + 1) : 0,
    };
    return n + 1;
}

/*
 * Fill in the header and, from desc[n] on, the descriptors of request @i.
 * Returns: the first free descriptor
 */
static int virtio_prepare(VirtioDisk *v, Req *req, int i, Hdr *hdr,
                          struct vring_desc *desc, int n)
{
    QTestState *qts = v->disk.qts;
    uint64_t addr = v->hdrs + i * sizeof(Hdr);
    uint64_t data = v->data + i * DATA_BYTES + req->misalign;
    bool is_read = req->type == VIRTIO_BLK_T_IN;
    uint16_t flags = VRING_DESC_F_NEXT | (is_read ? VRING_DESC_F_WRITE : 0);
    struct virtio_blk_discard_write_zeroes range = {
        .sector = cpu_to_le64(req->offset / SECTOR),
        .num_sectors = cpu_to_le32(req->bytes / SECTOR),
        .flags = cpu_to_le32(req->flags),
    };
    uint32_t part = 0;

    g_assert_cmpuint(req->offset + req->bytes, <=, IMAGE_SIZE);
    g_assert_cmpuint(req->misalign, <=, MAX_MISALIGN);

    *hdr = (Hdr) {
        .out.type = cpu_to_le32(req->type),
        .out.sector = cpu_to_le64(req->offset / SECTOR),
        .status = 0xff,
    };
    req->data = NULL;
    req->done = false;
    req->head = n;
    n = virtio_add_desc(desc, n, addr, sizeof(hdr->out), VRING_DESC_F_NEXT);

    switch (req->type) {
    case VIRTIO_BLK_T_IN:
    case VIRTIO_BLK_T_OUT:
        g_assert_cmpuint(req->bytes, <=, MAX_BYTES);
        req->data = g_malloc(req->bytes);
        if (!is_read) {
            disk_pattern(&v->disk, req->offset, req->data, req->bytes);
            qtest_bufwrite(qts, data, req->data, req->bytes);
        }
        /* Two buffers where it can be done without breaking a page */
        if (req->bytes >= 8 * KiB) {
            part = 4 * KiB;
            n = virtio_add_desc(desc, n, data, part, flags);
        }
        n = virtio_add_desc(desc, n, data + part, req->bytes - part, flags);
        break;
    case VIRTIO_BLK_T_DISCARD:
    case VIRTIO_BLK_T_WRITE_ZEROES:
        qtest_memwrite(qts, data, &range, sizeof(range));
        n = virtio_add_desc(desc, n, data, sizeof(range), flags);
        break;
    case VIRTIO_BLK_T_FLUSH:
        break;
    default:
        g_assert_not_reached();
    }
    return virtio_add_desc(desc, n, addr + offsetof(Hdr, status), 1,
                           VRING_DESC_F_WRITE);
}

/* Make every num_queues-th request available to queue @q, all at once. */
static void virtio_kick(VirtioDisk *v, int q, Req *reqs, int num)
{
    QTestState *qts = v->disk.qts;
    QVirtQueue *vq = v->vq[q];
    uint64_t ring = vq->avail + offsetof(struct vring_avail, ring);
    uint16_t idx = qtest_readw(qts, vq->avail +
                               offsetof(struct vring_avail, idx));
    uint16_t avail[QUEUE_SIZE];
    int i;

    qtest_memread(qts, ring, avail, sizeof(avail));
    for (i = q; i + v->num_queues < num; i += v->num_queues) {
        avail[idx++ % QUEUE_SIZE] = cpu_to_le16(reqs[i].head);
    }
    qtest_memwrite(qts, ring, avail, sizeof(avail));
    qtest_writew(qts, vq->avail + offsetof(struct vring_avail, idx), idx);
    /* This adds the last one. */
    qvirtqueue_kick(qts, &v->pci->vdev, vq, reqs[i].head);
}

/*
 * Take the completions of queue @q.
 * Returns: how many there were
 */
static int virtio_complete(VirtioDisk *v, int q, Req *reqs, int num)
{
    QTestState *qts = v->disk.qts;
    QVirtQueue *vq = v->vq[q];
    uint16_t idx = qtest_readw(qts, vq->used +
                               offsetof(struct vring_used, idx));
    int n = (uint16_t)(idx - vq->last_used_idx);
    struct vring_used_elem used[QUEUE_SIZE];

    if (!n) {
        return 0;
    }
    qtest_memread(qts, vq->used + offsetof(struct vring_used, ring), used,
                  sizeof(used));
    for (; vq->last_used_idx != idx; vq->last_used_idx++) {
        uint32_t id = le32_to_cpu(used[vq->last_used_idx % QUEUE_SIZE].id);
        int i = q;

        while (i < num && reqs[i].head != id) {
            i += v->num_queues;
        }
        g_assert_cmpint(i, <, num);
        g_assert_false(reqs[i].done);
        reqs[i].done = true;
    }
    return n;
}

/* Check the result of request @i and account for it in the model. */
static void virtio_finish(VirtioDisk *v, Req *req, int i)
{
    Disk *disk = &v->disk;
    uint8_t *model = disk->model + req->offset;

    if (req->fails || (req->may_fail && req->status != VIRTIO_BLK_S_OK)) {
        g_assert_cmphex(req->status, ==, VIRTIO_BLK_S_IOERR);
        return;
    }
    g_assert_cmphex(req->status, ==, VIRTIO_BLK_S_OK);

    switch (req->type) {
    case VIRTIO_BLK_T_IN:
        qtest_bufread(disk->qts, v->data + i * DATA_BYTES + req->misalign,
                      req->data, req->bytes);
        for (uint32_t j = 0; req->other && j < req->bytes; j += SECTOR) {
            if (memcmp(req->data + j, req->other + j, SECTOR) == 0) {
                memcpy(model + j, req->other + j, SECTOR);
            }
        }
        disk_check_data(disk, req->offset, req->data, req->bytes);
        break;
    case VIRTIO_BLK_T_OUT:
        memcpy(model, req->data, req->bytes);
        break;
    case VIRTIO_BLK_T_DISCARD:
    case VIRTIO_BLK_T_WRITE_ZEROES:
        memset(model, 0, req->bytes);
        break;
    }
}

/*
 * Run requests that don't overlap, all of them in flight together, and check
 * that each completes once and as it should.
 * @drain: stop and continue the VM while they are in flight
 */
static void virtio_run_drain(VirtioDisk *v, Req *reqs, int num, bool drain)
{
    QTestState *qts = v->disk.qts;
    struct vring_desc desc[MAX_QUEUES][QUEUE_SIZE];
    int num_desc[MAX_QUEUES] = {};
    Hdr hdrs[MAX_REQS];
    gint64 start;
    gulong pause = 50;
    int left = num;

    g_assert_cmpint(num, <=, MAX_REQS);
    qtest_memset(qts, v->data, 0xa5, num * DATA_BYTES);
    for (int i = 0; i < num; i++) {
        int q = i % v->num_queues;

        num_desc[q] = virtio_prepare(v, &reqs[i], i, &hdrs[i], desc[q],
                                     num_desc[q]);
    }
    qtest_memwrite(qts, v->hdrs, hdrs, num * sizeof(hdrs[0]));
    for (int q = 0; q < MIN(v->num_queues, num); q++) {
        qtest_memwrite(qts, v->vq[q]->desc, desc[q],
                       num_desc[q] * sizeof(desc[q][0]));
        virtio_kick(v, q, reqs, num);
    }
    if (drain) {
        qtest_qmp_assert_success(qts, "{ 'execute': 'stop' }");
        qtest_qmp_assert_success(qts, "{ 'execute': 'cont' }");
    }

    start = g_get_monotonic_time();
    while (left) {
        int n = 0;

        for (int q = 0; q < v->num_queues; q++) {
            n += virtio_complete(v, q, reqs, num);
        }
        left -= n;
        if (!n) {
            g_assert_cmpint(g_get_monotonic_time() - start, <, HANG_US);
            /* Each look keeps QEMU from its work. */
            g_usleep(pause);
            pause = MIN(2 * pause, 2000);
        }
    }
    for (int q = 0; q < v->num_queues; q++) {
        g_assert_cmpint(virtio_complete(v, q, reqs, num), ==, 0);
    }

    qtest_memread(qts, v->hdrs, hdrs, num * sizeof(hdrs[0]));
    for (int i = 0; i < num; i++) {
        reqs[i].status = hdrs[i].status;
        virtio_finish(v, &reqs[i], i);
    }
    for (int i = 0; i < num; i++) {
        if (reqs[i].status != VIRTIO_BLK_S_OK &&
            reqs[i].type == VIRTIO_BLK_T_OUT) {
            /* Each sector has to hold old or new data.  Find out which. */
            Req probe = {
                .type = VIRTIO_BLK_T_IN, .offset = reqs[i].offset,
                .bytes = reqs[i].bytes, .other = reqs[i].data,
            };

            virtio_run_drain(v, &probe, 1, false);
        }
        g_free(reqs[i].data);
    }
}

static void virtio_run(VirtioDisk *v, Req *reqs, int num)
{
    virtio_run_drain(v, reqs, num, false);
}

/* Requests of one kind, one behind the other, as many as fit at once */
static void virtio_run_range(VirtioDisk *v, uint32_t type, uint64_t offset,
                             uint64_t bytes, uint32_t each)
{
    Req reqs[MAX_REQS];
    int n = 0;

    for (uint64_t end = offset + bytes; offset < end; offset += each) {
        reqs[n++] = (Req) { .type = type, .offset = offset, .bytes = each };
        if (n == MAX_REQS || offset + each == end) {
            virtio_run(v, reqs, n);
            n = 0;
        }
    }
}

static void virtio_run_one(VirtioDisk *v, uint32_t type, uint64_t offset,
                           uint32_t bytes)
{
    Req req = { .type = type, .offset = offset, .bytes = bytes };

    virtio_run(v, &req, 1);
}

/* Writes and reads of several sizes, which suit O_DIRECT as they are */
static void virtio_test_patterns(VirtioDisk *v)
{
    static const uint32_t sizes[] = { 4 * KiB, 8 * KiB, 32 * KiB, 64 * KiB };
    Disk *disk = &v->disk;
    bool done = false;

    for (int round = 0; round < ARRAY_SIZE(sizes); round++) {
        Req reqs[MAX_REQS];
        Stats old = disk_stats(disk), new;

        /* The first round fills holes, the others overwrite most. */
        for (int i = 0; i < MAX_REQS; i++) {
            reqs[i] = (Req) {
                .type = VIRTIO_BLK_T_OUT,
                .offset = AREA_PATTERN + i * CLUSTER,
                .bytes = sizes[ARRAY_SIZE(sizes) - 1 - round],
            };
        }
        virtio_run(v, reqs, MAX_REQS);
        /* With cache=directsync, the engine makes them stable by itself. */
        disk_check_tiers(disk, &old, MAX_REQS, true);
        new = disk_stats(disk);
        if (round == 0 && expect_native(disk->tc) &&
            g_str_equal(disk->tc->cache, "none")) {
            /* Tried, though the file system may have had to wait */
            g_assert_cmpuint(new.native_served + new.native_refused, >,
                             old.native_served + old.native_refused);
        }
    }

    for (int attempt = 0; !done; attempt++) {
        Stats old = disk_stats(disk);

        for (int round = 0; round < ARRAY_SIZE(sizes); round++) {
            Req reqs[MAX_REQS];

            for (int i = 0; i < MAX_REQS; i++) {
                reqs[i] = (Req) {
                    .type = VIRTIO_BLK_T_IN,
                    .offset = AREA_PATTERN + i * CLUSTER,
                    .bytes = sizes[round],
                };
            }
            virtio_run(v, reqs, MAX_REQS);
        }
        done = disk_check_reads(disk, &old, ARRAY_SIZE(sizes) * MAX_REQS,
                                attempt);
    }
}

/* Sectors and buffers that do not suit O_DIRECT */
static void virtio_test_misaligned(VirtioDisk *v)
{
    Req reqs[MAX_REQS];
    Stats old = disk_stats(&v->disk);

    for (int type = VIRTIO_BLK_T_OUT; type >= VIRTIO_BLK_T_IN; type--) {
        for (int i = 0; i < MAX_REQS; i++) {
            reqs[i] = (Req) {
                .type = type,
                .offset = AREA_SMALL + i * 8 * KiB + i % 4 * SECTOR,
                .bytes = (1 + i % 8) * SECTOR,
                .misalign = i % 2 ? 1 << (i % 6) : 0,
            };
        }
        virtio_run(v, reqs, MAX_REQS);
    }
    disk_check_tiers(&v->disk, &old, 2 * MAX_REQS, false);

    /* Everything around is as it was. */
    virtio_run_range(v, VIRTIO_BLK_T_IN, AREA_SMALL, MAX_REQS * 8 * KiB,
                     MAX_BYTES);
}

static void virtio_test_flush(VirtioDisk *v)
{
    Disk *disk = &v->disk;
    Stats old = disk_stats(disk);

    virtio_run_one(v, VIRTIO_BLK_T_OUT, AREA_PATTERN, 4 * KiB);
    virtio_run_one(v, VIRTIO_BLK_T_FLUSH, 0, 0);
    disk_check_tiers(disk, &old, 2, true);
}

/* One of each kind and more, in flight together; then drained as well */
static void virtio_test_mixed(VirtioDisk *v)
{
    const uint64_t base = AREA_MIXED;

    virtio_run_range(v, VIRTIO_BLK_T_OUT, base, 8 * CLUSTER, CLUSTER);
    for (int i = 0; i < 4; i++) {
        Req reqs[] = {
            { VIRTIO_BLK_T_OUT, base, 16 * KiB },
            { VIRTIO_BLK_T_IN, base + CLUSTER, CLUSTER },
            { VIRTIO_BLK_T_FLUSH },
            { VIRTIO_BLK_T_WRITE_ZEROES, base + 2 * CLUSTER, CLUSTER },
            { VIRTIO_BLK_T_OUT, base + 32 * KiB, 32 * KiB },
            { VIRTIO_BLK_T_IN, base + 3 * CLUSTER, 8 * KiB, 16 },
            { VIRTIO_BLK_T_OUT, base + 4 * CLUSTER, SECTOR },
            { VIRTIO_BLK_T_IN, base + 5 * CLUSTER, 4 * KiB },
            { VIRTIO_BLK_T_FLUSH },
            { VIRTIO_BLK_T_WRITE_ZEROES, base + 6 * CLUSTER + SECTOR,
              4 * KiB, 0, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP },
            { VIRTIO_BLK_T_OUT, base + 7 * CLUSTER, CLUSTER },
            { VIRTIO_BLK_T_IN, base + 5 * CLUSTER + 8 * KiB, 4 * KiB },
            { VIRTIO_BLK_T_OUT, base + 8 * CLUSTER, CLUSTER },
        };

        virtio_run_drain(v, reqs, ARRAY_SIZE(reqs), i % 2);
        virtio_run_range(v, VIRTIO_BLK_T_IN, base, 9 * CLUSTER, CLUSTER);
    }
}

/* Returns: for how many requests @req made the pool work */
static uint64_t virtio_run_in_pool(VirtioDisk *v, Req req)
{
    Stats old = disk_stats(&v->disk), new;

    virtio_run(v, &req, 1);
    new = disk_stats(&v->disk);
    return new.pool_served - old.pool_served;
}

static void virtio_test_zeroes(VirtioDisk *v, uint32_t flags)
{
    const uint64_t base = AREA_ZERO;
    Req small = {
        .type = VIRTIO_BLK_T_WRITE_ZEROES, .flags = flags,
        .offset = base + 6 * CLUSTER + 3 * SECTOR, .bytes = 5 * SECTOR,
    };
    uint64_t n;

    virtio_run_range(v, VIRTIO_BLK_T_OUT, base, 8 * CLUSTER, CLUSTER);
    n = virtio_run_in_pool(v, (Req) {
        .type = VIRTIO_BLK_T_WRITE_ZEROES, .flags = flags,
        .offset = base + CLUSTER, .bytes = 4 * CLUSTER,
    });
    if (is_raw(v->disk.tc)) {
        g_assert_cmpuint(n, >, 0);
    }
    virtio_run(v, &small, 1);
    virtio_run_range(v, VIRTIO_BLK_T_IN, base, 8 * CLUSTER, CLUSTER);
}

static void virtio_test_discard(VirtioDisk *v)
{
    const uint64_t base = AREA_ZERO;
    Disk *disk = &v->disk;
    uint64_t allocated, n;
    Stats old, new;

    if (!host_has_punch_hole()) {
        g_test_message("no discard: the file system can't punch holes");
        return;
    }

    virtio_run_range(v, VIRTIO_BLK_T_OUT, base, 8 * CLUSTER, CLUSTER);
    virtio_run_one(v, VIRTIO_BLK_T_FLUSH, 0, 0);
    allocated = disk_allocated(disk);
    old = disk_stats(disk);
    n = virtio_run_in_pool(v, (Req) {
        .type = VIRTIO_BLK_T_DISCARD,
        .offset = base + CLUSTER, .bytes = 4 * CLUSTER,
    });
    virtio_run_one(v, VIRTIO_BLK_T_FLUSH, 0, 0);
    new = disk_stats(disk);
    g_assert_cmpuint(n, >, 0);
    g_assert_cmpuint(new.discard_nb_ok, >, old.discard_nb_ok);
    g_assert_cmpuint(disk_allocated(disk), <, allocated);
    virtio_run_range(v, VIRTIO_BLK_T_IN, base, 8 * CLUSTER, CLUSTER);
}

/*
 * The host refuses a write: the guest sees that error, once, for that request
 * and no other.
 */
static void virtio_test_error_raw(VirtioDisk *v)
{
    Disk *disk = &v->disk;
    Req reqs[MAX_REQS];
    Stats old, new;

    for (int round = 0; round < 2; round++) {
        /* Above the limit; overwrites of good data around it */
        for (int i = 0; i < MAX_REQS; i++) {
            reqs[i] = (Req) {
                .type = VIRTIO_BLK_T_OUT,
                .offset = AREA_ERROR + i * CLUSTER, .bytes = 16 * KiB,
            };
        }
        reqs[5].offset = LIMIT_RAW + round * CLUSTER;
        reqs[5].fails = true;
        virtio_run(v, reqs, MAX_REQS);

        /* Across it: first a part of the write succeeds. */
        old = disk_stats(disk);
        reqs[0] = (Req) {
            .type = VIRTIO_BLK_T_OUT, .fails = true,
            .offset = LIMIT_RAW - CLUSTER / 2, .bytes = CLUSTER,
        };
        virtio_run(v, reqs, 1);
        new = disk_stats(disk);
        g_assert_cmpuint(new.short_transfers, >, old.short_transfers);
    }

    virtio_run_one(v, VIRTIO_BLK_T_OUT, LIMIT_RAW - CLUSTER, CLUSTER);
    virtio_run_one(v, VIRTIO_BLK_T_FLUSH, 0, 0);
    virtio_run_range(v, VIRTIO_BLK_T_IN, AREA_ERROR, MiB, CLUSTER);
    virtio_run_range(v, VIRTIO_BLK_T_IN, LIMIT_RAW - 4 * CLUSTER, 8 * CLUSTER,
                     CLUSTER);
}

static void virtio_test_error_qcow2(VirtioDisk *v)
{
    uint64_t offset = AREA_ERROR;
    int failed = 0, good = 0;

    while (!failed) {
        Req reqs[MAX_REQS];

        for (int i = 0; i < MAX_REQS; i++, offset += CLUSTER) {
            reqs[i] = (Req) {
                .type = VIRTIO_BLK_T_OUT, .may_fail = true,
                .offset = offset, .bytes = CLUSTER,
            };
        }
        virtio_run(v, reqs, MAX_REQS);
        for (int i = 0; i < MAX_REQS; i++) {
            if (reqs[i].status == VIRTIO_BLK_S_OK) {
                good++;
            } else {
                failed++;
            }
        }
    }
    g_assert_cmpint(good, >, 0);

    virtio_run_range(v, VIRTIO_BLK_T_OUT, AREA_PATTERN, MiB, CLUSTER);
    virtio_run_one(v, VIRTIO_BLK_T_FLUSH, 0, 0);
    virtio_run_range(v, VIRTIO_BLK_T_IN, AREA_ERROR, MiB, CLUSTER);
    virtio_run_range(v, VIRTIO_BLK_T_IN, offset - MiB, MiB, CLUSTER);
}

/* Someone shortens the file: there are zeroes where it was. */
static void virtio_test_eof(VirtioDisk *v)
{
    Disk *disk = &v->disk;

    virtio_run_range(v, VIRTIO_BLK_T_OUT, AREA_EOF, MiB, CLUSTER);
    virtio_run_one(v, VIRTIO_BLK_T_FLUSH, 0, 0);
    g_assert_cmpint(truncate(disk->path, NEW_EOF), ==, 0);
    memset(disk->model + NEW_EOF, 0, IMAGE_SIZE - NEW_EOF);

    for (int i = 0; i < 2; i++) {
        const uint64_t end = QEMU_ALIGN_DOWN(NEW_EOF, CLUSTER);
        Req reqs[] = {
            { VIRTIO_BLK_T_IN, AREA_EOF, CLUSTER },             /* before */
            { VIRTIO_BLK_T_IN, end - CLUSTER, 4 * KiB },        /* before */
            { VIRTIO_BLK_T_IN, end - 32 * KiB, CLUSTER },       /* across */
            { VIRTIO_BLK_T_IN, end, 4 * KiB },                  /* across */
            { VIRTIO_BLK_T_IN, end, SECTOR },                   /* across */
            { VIRTIO_BLK_T_IN, end - SECTOR, 4 * SECTOR, 16 },  /* across */
            { VIRTIO_BLK_T_IN, end + SECTOR, SECTOR },          /* beyond */
            { VIRTIO_BLK_T_IN, end + 4 * KiB, 4 * KiB },        /* beyond */
            { VIRTIO_BLK_T_IN, end + CLUSTER, CLUSTER },        /* beyond */
            { VIRTIO_BLK_T_IN, end + MiB, 4 * KiB },            /* beyond */
            { VIRTIO_BLK_T_IN, end + 2 * MiB, SECTOR, 16 },     /* beyond */
            { VIRTIO_BLK_T_IN, IMAGE_SIZE - SECTOR, SECTOR },   /* the last */
        };
        Stats old = disk_stats(disk);

        virtio_run(v, reqs, ARRAY_SIZE(reqs));
        disk_check_tiers(disk, &old, ARRAY_SIZE(reqs), true);
    }

    /* A write beyond makes it longer again. */
    virtio_run_one(v, VIRTIO_BLK_T_OUT, AREA_ERROR, CLUSTER);
    virtio_run_range(v, VIRTIO_BLK_T_IN, NEW_EOF - 100 - 4 * CLUSTER,
                     8 * CLUSTER, CLUSTER);
    virtio_run_range(v, VIRTIO_BLK_T_IN, AREA_ERROR - 4 * CLUSTER,
                     8 * CLUSTER, CLUSTER);
}

static void test_virtio(const void *opaque)
{
    const TestCase *tc = opaque;
    VirtioDisk v = {};

    if (!can_run(tc)) {
        return;
    }
    virtio_boot(&v, tc);
    virtio_test_patterns(&v);
    virtio_test_misaligned(&v);
    virtio_test_flush(&v);
    virtio_test_mixed(&v);
    virtio_test_zeroes(&v, 0);
    virtio_test_zeroes(&v, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP);
    virtio_test_discard(&v);
    if (is_raw(tc)) {
        virtio_test_error_raw(&v);
        virtio_test_eof(&v);
    } else {
        virtio_test_error_qcow2(&v);
    }
    virtio_shutdown(&v);
}

/*
 * AHCI: a smaller set
 */

#define AHCI_REQS       8
#define AHCI_BYTES      (32 * KiB)

typedef struct AHCIDisk {
    Disk disk;
    AHCIQState *ahci;
    uint8_t port;
} AHCIDisk;

static void ahci_disk_boot(AHCIDisk *a, const TestCase *tc)
{
    AHCIQState *ahci = g_new0(AHCIQState, 1);
    uint16_t id[256];

    disk_boot(&a->disk, tc, "q35", "-device ide-hd,drive=drive0,bus=ide.0");
    a->ahci = ahci;
    ahci->parent = a->disk.qs;
    ahci->dev = get_ahci_device(a->disk.qts, &ahci->fingerprint);
    ahci_pci_enable(ahci);
    ahci_hba_enable(ahci);
    a->port = ahci_port_select(ahci);
    ahci_port_clear(ahci, a->port);
    ahci_io(ahci, a->port, CMD_IDENTIFY, id, sizeof(id), 0);
}

static void ahci_disk_shutdown(AHCIDisk *a)
{
    ahci_clean_mem(a->ahci);
    free_ahci_device(a->ahci->dev);
    g_free(a->ahci);
    qtest_shutdown(a->disk.qs);
    disk_finish(&a->disk);
}

/* AHCI_REQS queued commands, in flight together */
static void ahci_run_ncq(AHCIDisk *a, uint8_t op, uint64_t offset)
{
    Disk *disk = &a->disk;
    bool is_write = op == WRITE_FPDMA_QUEUED;
    AHCICommand *cmds[AHCI_REQS];
    uint64_t addr[AHCI_REQS];
    g_autofree uint8_t *buf = g_malloc(AHCI_BYTES);

    for (int i = 0; i < AHCI_REQS; i++) {
        addr[i] = ahci_alloc(a->ahci, AHCI_BYTES);
        if (is_write) {
            uint8_t *model = disk->model + offset + i * CLUSTER;

            disk_pattern(disk, offset + i * CLUSTER, model, AHCI_BYTES);
            qtest_bufwrite(disk->qts, addr[i], model, AHCI_BYTES);
        } else {
            qtest_memset(disk->qts, addr[i], 0xa5, AHCI_BYTES);
        }
        cmds[i] = ahci_command_create(op);
        ahci_command_adjust(cmds[i], (offset + i * CLUSTER) / SECTOR, addr[i],
                            AHCI_BYTES, 4 * KiB);
        ahci_command_commit(a->ahci, cmds[i], a->port);
    }
    for (int i = 0; i < AHCI_REQS; i++) {
        ahci_command_issue_async(a->ahci, cmds[i]);
    }
    for (int i = 0; i < AHCI_REQS; i++) {
        ahci_command_wait(a->ahci, cmds[i]);
        ahci_port_check_error(a->ahci, cmds[i]);
    }
    for (int i = 0; i < AHCI_REQS; i++) {
        ahci_port_check_nonbusy(a->ahci, cmds[i]);
    }
    /* They share the interrupt. */
    ahci_port_check_interrupts(a->ahci, cmds[0]);

    for (int i = 0; i < AHCI_REQS; i++) {
        if (!is_write) {
            qtest_bufread(disk->qts, addr[i], buf, AHCI_BYTES);
            disk_check_data(disk, offset + i * CLUSTER, buf, AHCI_BYTES);
        }
        ahci_command_free(cmds[i]);
        ahci_free(a->ahci, addr[i]);
    }
}

static void ahci_run_read(AHCIDisk *a, uint64_t offset, uint32_t bytes)
{
    g_autofree uint8_t *buf = g_malloc(bytes);

    ahci_io(a->ahci, a->port, CMD_READ_DMA_EXT, buf, bytes, offset / SECTOR);
    disk_check_data(&a->disk, offset, buf, bytes);
}

static void ahci_run_write(AHCIDisk *a, uint64_t offset, uint32_t bytes)
{
    uint8_t *model = a->disk.model + offset;

    disk_pattern(&a->disk, offset, model, bytes);
    ahci_io(a->ahci, a->port, CMD_WRITE_DMA_EXT, model, bytes,
            offset / SECTOR);
}

static void test_ahci(const void *opaque)
{
    const TestCase *tc = opaque;
    AHCIDisk a = {};
    Disk *disk = &a.disk;
    bool done = false;
    Stats old;

    if (!can_run(tc)) {
        return;
    }
    ahci_disk_boot(&a, tc);

    old = disk_stats(disk);
    ahci_run_ncq(&a, WRITE_FPDMA_QUEUED, AREA_PATTERN);
    ahci_run_ncq(&a, WRITE_FPDMA_QUEUED, AREA_PATTERN);
    disk_check_tiers(disk, &old, 2 * AHCI_REQS, true);

    for (int attempt = 0; !done; attempt++) {
        old = disk_stats(disk);
        ahci_run_ncq(&a, READ_FPDMA_QUEUED, AREA_PATTERN);
        done = disk_check_reads(disk, &old, AHCI_REQS, attempt);
    }

    old = disk_stats(disk);
    ahci_run_write(&a, AREA_SMALL + SECTOR, 3 * SECTOR);
    ahci_run_write(&a, AREA_MIXED, MAX_BYTES);
    ahci_io(a.ahci, a.port, CMD_FLUSH_CACHE, NULL, 0, 0);
    disk_check_tiers(disk, &old, 3, false);
    ahci_run_read(&a, AREA_SMALL, 8 * KiB);
    ahci_run_read(&a, AREA_MIXED, 2 * MAX_BYTES);

    if (is_raw(tc)) {
        ahci_run_write(&a, NEW_EOF - 100 - MAX_BYTES, 2 * MAX_BYTES);
        ahci_io(a.ahci, a.port, CMD_FLUSH_CACHE, NULL, 0, 0);
        g_assert_cmpint(truncate(disk->path, NEW_EOF), ==, 0);
        memset(disk->model + NEW_EOF, 0, IMAGE_SIZE - NEW_EOF);
        old = disk_stats(disk);
        ahci_run_read(&a, NEW_EOF - 100 - MAX_BYTES, 2 * MAX_BYTES);
        ahci_run_read(&a, NEW_EOF - 100 + MAX_BYTES, MAX_BYTES);
        disk_check_tiers(disk, &old, 2, true);
    }
    ahci_disk_shutdown(&a);
}

static void add_test(const TestCase *tc)
{
    g_autofree char *disable = tc->disable ?
        g_strdup_printf("/without-%s", tc->disable) : g_strdup("");
    g_autofree char *path = NULL;
    bool ahci = g_str_equal(tc->device, "ahci");

    if (!qtest_has_machine(ahci ? "q35" : "pc") ||
        !qtest_has_device(ahci ? "ich9-ahci" : "virtio-blk-pci")) {
        return;
    }
    path = g_strdup_printf("raw-posix-aio/%s/%s/%s/%s%s", tc->device, tc->aio,
                           tc->cache, tc->format, disable);
    qtest_add_data_func_full(path, g_memdup2(tc, sizeof(*tc)),
                             ahci ? test_ahci : test_virtio, g_free);
}

int main(int argc, char **argv)
{
    static const char *const devices[] = { "virtio-blk", "ahci" };
    static const char *const aios[] = { "threads", "native" };
    static const char *const caches[] = { "writeback", "none", "directsync" };
    static const char *const formats[] = { "raw", "qcow2" };
    static const TestCase more[] = {
        { "virtio-blk-iothread", "threads", "writeback", "raw", NULL, 1 },
        { "virtio-blk-iothread", "native", "none", "raw", NULL, 1 },
        { "virtio-blk-iothread", "native", "none", "qcow2", NULL, 1 },
        { "virtio-blk-iothreads", "threads", "writeback", "raw", NULL, 2 },
        { "virtio-blk-iothreads", "native", "none", "raw", NULL, 2 },
        { "virtio-blk", "native", "none", "raw", "native" },
        { "virtio-blk", "native", "none", "raw", "nowait" },
        { "virtio-blk", "native", "none", "raw", "preadv" },
        { "virtio-blk", "native", "writeback", "raw", "inline" },
        { "virtio-blk", "threads", "writeback", "raw", "preadv" },
        { "ahci", "native", "none", "raw", "native" },
    };
    int ret;

    g_test_init(&argc, &argv, NULL);
    g_unsetenv("QEMU_RAW_AIO_DISABLE");
    scratch = g_dir_make_tmp("raw-posix-aio-test-XXXXXX", NULL);
    g_assert_nonnull(scratch);
    /* QEMU inherits this: a file that is too large is an error like others. */
    signal(SIGXFSZ, SIG_IGN);

    for (int d = 0; d < ARRAY_SIZE(devices); d++) {
        for (int a = 0; a < ARRAY_SIZE(aios); a++) {
            for (int c = 0; c < ARRAY_SIZE(caches); c++) {
                for (int f = 0; f < ARRAY_SIZE(formats); f++) {
                    TestCase tc = {
                        .device = devices[d], .aio = aios[a],
                        .cache = caches[c], .format = formats[f],
                    };

                    add_test(&tc);
                }
            }
        }
    }
    for (int i = 0; i < ARRAY_SIZE(more); i++) {
        add_test(&more[i]);
    }

    ret = g_test_run();
    rmdir(scratch);
    g_free(scratch);
    return ret;
}
