/*
 * The first process in the guests of life-test: load on their disks, whose
 * data are verified
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Disks are found by their serial numbers, life0 and life1.  Each is written
 * by several processes, each in a part of its own.  A block consists of copies
 * of one struct, so that a torn, lost or misplaced write shows.  Which version
 * a block has to have is kept in memory, which migration and snapshots have
 * to keep in step with the disk.
 *
 * What it says on the console:
 *   LIFE ops N M          requests done on each disk, twice a second
 *   LIFE gone D           disk D was unplugged
 *   LIFE back D           disk D was plugged in again, its data are right
 *   LIFE grown D BLOCKS   disk D is larger, and the new part is in use
 *   LIFE-OK D BLOCKS CRC  after an "e" on the console: all data are right
 *   LIFE-FAILED ...
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <linux/fs.h>

#define BLOCK 4096
#define MAX_BLOCKS 65536
#define MAX_RUN 16
#define WORKERS 4
#define DISKS 2
#define MAGIC 0x656c69662d6d7673ULL
#define NONE UINT32_MAX

typedef struct Unit {
    uint64_t magic;
    uint64_t tag;
    uint64_t block;
    uint64_t version;
} Unit;

/* Shared by the processes; each block is one worker's alone. */
typedef struct Disk {
    uint64_t ops;
    uint32_t version[MAX_BLOCKS];   /* 0: zeroes */
    uint32_t pending[MAX_BLOCKS];   /* of a write whose end is not known */
} Disk;

typedef struct Shared {
    Disk disk[DISKS];
    bool stop;
    bool failed;
} Shared;

static Shared *shared;
static unsigned seed;
static bool may_vanish;
static uint8_t *buffer;

/* Of the first process only */
static struct {
    char name[16];
    uint32_t blocks;
    pid_t worker[2 * WORKERS];
    unsigned workers;
} disks[DISKS];

static void say(const char *format, ...)
{
    char line[512];
    va_list ap;
    int n = snprintf(line, sizeof(line), "\nLIFE");

    va_start(ap, format);
    n += vsnprintf(line + n, sizeof(line) - n - 1, format, ap);
    va_end(ap);
    line[n++] = '\n';
    /* One call, so that no line of another process comes into its middle */
    if (write(1, line, n) != n) {
        return;
    }
}

static void off(void)
{
    sleep(1);
    reboot(RB_POWER_OFF);
    for (;;) {
        pause();
    }
}

static void fail(const char *format, ...)
{
    char text[400];
    va_list ap;

    va_start(ap, format);
    vsnprintf(text, sizeof(text), format, ap);
    va_end(ap);
    shared->failed = true;
    say("-FAILED %s", text);
    if (getpid() == 1) {
        off();
    }
    _exit(1);
}

static uint64_t random64(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15ULL;

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return z ^ (z >> 31);
}

/* --- blocks --- */

static void fill(uint8_t *at, int disk, uint64_t block, uint32_t version)
{
    Unit unit = { MAGIC, (uint64_t)seed * DISKS + disk, block, version };

    if (!version) {
        memset(at, 0, BLOCK);
        return;
    }
    for (size_t i = 0; i < BLOCK; i += sizeof(unit)) {
        memcpy(at + i, &unit, sizeof(unit));
    }
}

static bool is(const uint8_t *at, int disk, uint64_t block, uint32_t version)
{
    uint8_t want[BLOCK];

    fill(want, disk, block, version);
    return !memcmp(at, want, BLOCK);
}

static void compare(const uint8_t *at, int disk, uint64_t first, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++, at += BLOCK) {
        uint64_t block = first + i;
        uint32_t *version = &shared->disk[disk].version[block];
        uint32_t *pending = &shared->disk[disk].pending[block];

        if (*pending != NONE) {
            if (is(at, disk, block, *pending)) {
                *version = *pending;
            }
            *pending = NONE;
        }
        if (!is(at, disk, block, *version)) {
            uint8_t want[BLOCK];
            unsigned j = 0;
            Unit unit;

            fill(want, disk, block, *version);
            while (want[j] == at[j]) {
                j++;
            }
            memcpy(&unit, at + j / sizeof(unit) * sizeof(unit), sizeof(unit));
            fail("disk %d block %llu byte %u: version %u expected, found %llu "
                 "of block %llu (tag %llx, magic %s)", disk,
                 (unsigned long long)block, j, *version,
                 (unsigned long long)unit.version,
                 (unsigned long long)unit.block, (unsigned long long)unit.tag,
                 unit.magic == MAGIC ? "right" : "wrong");
        }
    }
}

static int open_disk(int disk)
{
    char path[32];

    snprintf(path, sizeof(path), "/dev/%s", disks[disk].name);
    return open(path, O_RDWR | O_DIRECT | O_CLOEXEC);
}

static void verify(int disk)
{
    int fd = open_disk(disk);
    size_t n;

    if (fd < 0) {
        fail("disk %d: open: %s", disk, strerror(errno));
    }
    for (uint32_t b = 0; b < disks[disk].blocks; b += n) {
        n = disks[disk].blocks - b;
        n = n < MAX_RUN ? n : MAX_RUN;
        if (pread(fd, buffer, n * BLOCK, (off_t)b * BLOCK) != n * BLOCK) {
            fail("disk %d block %u: read: %s", disk, b, strerror(errno));
        }
        compare(buffer, disk, b, n);
    }
    close(fd);
}

/* As zlib's */
static uint32_t crc32_of(const uint32_t *words, size_t n)
{
    uint32_t crc = ~0u;

    for (size_t i = 0; i < n * sizeof(*words); i++) {
        crc ^= ((const uint8_t *)words)[i];
        for (int bit = 0; bit < 8; bit++) {
            crc = (crc >> 1) ^ (crc & 1 ? 0xedb88320u : 0);
        }
    }
    return ~crc;
}

/* --- load --- */

static bool present(int disk)
{
    char path[64];

    snprintf(path, sizeof(path), "/sys/block/%s", disks[disk].name);
    return !access(path, F_OK);
}

static void gone(int disk, const char *what)
{
    int error = errno;

    for (int i = 0; may_vanish && disk && i < 300; i++) {
        if (!present(disk)) {
            _exit(2);
        }
        usleep(100000);
    }
    fail("disk %d: %s: %s", disk, what, strerror(error));
}

static void work(int disk, int id, uint32_t first, uint32_t count)
{
    Disk *d = &shared->disk[disk];
    uint64_t state = seed * 1000ULL + disk * 100 + id;
    /* None that an earlier worker of this disk can have used */
    uint32_t version = id + 2 * WORKERS * d->ops;
    int fd = open_disk(disk);

    if (fd < 0) {
        gone(disk, "open");
    }
    while (!shared->stop) {
        uint64_t r = random64(&state);
        unsigned dice = r % 100;
        unsigned n = 1 + (r >> 8) % MAX_RUN;
        uint32_t b = first + (r >> 16) % (count - n);
        uint64_t range[2] = { (uint64_t)b * BLOCK, n * BLOCK };

        if (dice < 40) {
            if (pread(fd, buffer, n * BLOCK, range[0]) != n * BLOCK) {
                gone(disk, "read");
            }
            compare(buffer, disk, b, n);
        } else {
            uint32_t v = dice < 45 ? 0 : (version += 2 * WORKERS);

            for (unsigned i = 0; i < n; i++) {
                d->pending[b + i] = v;
                fill(buffer + i * BLOCK, disk, b + i, v);
            }
            if (v) {
                if (pwrite(fd, buffer, n * BLOCK, range[0]) != n * BLOCK) {
                    gone(disk, "write");
                }
            } else if (ioctl(fd, BLKZEROOUT, range)) {
                gone(disk, "zero-out");
            }
            for (unsigned i = 0; i < n; i++) {
                d->version[b + i] = v;
                d->pending[b + i] = NONE;
            }
            if (dice > 95 && fdatasync(fd)) {
                gone(disk, "flush");
            }
        }
        __atomic_fetch_add(&d->ops, 1, __ATOMIC_RELAXED);
    }
    close(fd);
    _exit(0);
}

static void start_workers(int disk, uint32_t first, uint32_t end)
{
    uint32_t part = (end - first) / WORKERS;

    for (int i = 0; i < WORKERS; i++) {
        int id = disks[disk].workers;
        pid_t pid = fork();

        if (pid < 0) {
            fail("fork: %s", strerror(errno));
        }
        if (!pid) {
            work(disk, 1 + id, first + i * part, part);
        }
        disks[disk].worker[disks[disk].workers++] = pid;
    }
    disks[disk].blocks = end;
}

/* True if they ended because the disk is gone */
static bool ended(int disk)
{
    bool vanished = false;

    for (unsigned i = 0; i < disks[disk].workers; i++) {
        int status;

        if (waitpid(disks[disk].worker[i], &status, 0) < 0 ||
            !WIFEXITED(status) || WEXITSTATUS(status) % 2) {
            fail("disk %d: a worker failed", disk);
        }
        vanished |= WEXITSTATUS(status) == 2;
    }
    disks[disk].workers = 0;
    return vanished;
}

/* --- the first process --- */

static bool read_line(const char *path, char *line, size_t size)
{
    FILE *f = fopen(path, "re");
    bool ok;

    if (!f) {
        return false;
    }
    ok = fgets(line, size, f);
    if (!ok) {
        line[0] = 0;
    }
    fclose(f);
    line[strcspn(line, "\n")] = 0;
    return ok;
}

static uint32_t blocks_of(const char *name)
{
    char path[64], line[32];
    unsigned sectors = 0;

    snprintf(path, sizeof(path), "/sys/block/%.15s/size", name);
    if (read_line(path, line, sizeof(line))) {
        sscanf(line, "%u", &sectors);
    }
    return sectors / (BLOCK / 512);
}

static bool find(int disk)
{
    char name[16], path[64], line[32], want[16];

    snprintf(want, sizeof(want), "life%d", disk);
    for (char c = 'a'; c <= 'h'; c++) {
        snprintf(name, sizeof(name), "vd%c", c);
        snprintf(path, sizeof(path), "/sys/block/%s/serial", name);
        if (read_line(path, line, sizeof(line)) && !strcmp(line, want)) {
            snprintf(path, sizeof(path), "/dev/%s", name);
            strcpy(disks[disk].name, name);
            return blocks_of(name) && !access(path, F_OK);
        }
    }
    return false;
}

static void load_modules(void)
{
    FILE *order = fopen("/modules/order", "re");
    char name[64], path[96];

    while (order && fgets(name, sizeof(name), order)) {
        int fd;

        name[strcspn(name, "\n")] = 0;
        snprintf(path, sizeof(path), "/modules/%s", name);
        fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || syscall(SYS_finit_module, fd, "", 0)) {
            fail("%s: %s", path, strerror(errno));
        }
        close(fd);
    }
}

static void look_after(int disk)
{
    uint32_t blocks;

    if (disks[disk].workers) {
        siginfo_t info = { 0 };

        if (waitid(P_PID, disks[disk].worker[0], &info,
                   WEXITED | WNOHANG | WNOWAIT) < 0) {
            fail("waitid: %s", strerror(errno));
        }
        if (info.si_pid) {
            if (!ended(disk)) {
                fail("disk %d: its workers ended", disk);
            }
            say(" gone %d", disk);
            return;
        }
        blocks = blocks_of(disks[disk].name);
        if (blocks > disks[disk].blocks && blocks <= MAX_BLOCKS &&
            disks[disk].workers == WORKERS) {
            start_workers(disk, disks[disk].blocks, blocks);
            say(" grown %d %u", disk, blocks);
        }
    } else if (disks[disk].blocks && find(disk)) {
        verify(disk);
        start_workers(disk, 0, disks[disk].blocks);
        say(" back %d", disk);
    }
}

static void end(void)
{
    shared->stop = true;
    for (int disk = 0; disk < DISKS; disk++) {
        if (disks[disk].workers) {
            ended(disk);
            verify(disk);
            say("-OK %d %u %08x", disk, disks[disk].blocks,
                crc32_of(shared->disk[disk].version, disks[disk].blocks));
        }
    }
    say(" end");
    off();
}

int main(void)
{
    char line[1024] = "", *at;
    unsigned wanted;

    shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE,
                  MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    buffer = mmap(NULL, MAX_RUN * BLOCK, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED || buffer == MAP_FAILED) {
        return 1;
    }
    for (int disk = 0; disk < DISKS; disk++) {
        memset(shared->disk[disk].pending, 0xff,
               sizeof(shared->disk[disk].pending));
    }
    mkdir("/proc", 0755);
    mkdir("/sys", 0755);
    mkdir("/dev", 0755);
    if (mount("proc", "/proc", "proc", 0, NULL) ||
        mount("sysfs", "/sys", "sysfs", 0, NULL) ||
        mount("devtmpfs", "/dev", "devtmpfs", 0, NULL)) {
        fail("mount: %s", strerror(errno));
    }
    load_modules();
    read_line("/proc/cmdline", line, sizeof(line));
    at = strstr(line, "life.seed=");
    if (!at || sscanf(at, "life.seed=%u life.disks=%u", &seed, &wanted) != 2) {
        fail("no life.seed= and life.disks= on the command line");
    }
    may_vanish = strstr(line, "life.unplug");
    for (unsigned disk = 0; disk < wanted && disk < DISKS; disk++) {
        for (int tries = 0; !find(disk); tries++) {
            if (tries == 300) {
                fail("there is no disk life%u", disk);
            }
            usleep(100000);
        }
        start_workers(disk, 0, blocks_of(disks[disk].name));
    }
    for (;;) {
        struct pollfd input = { .fd = 0, .events = POLLIN };
        char c;

        usleep(500000);
        say(" ops %llu %llu", (unsigned long long)shared->disk[0].ops,
            (unsigned long long)shared->disk[1].ops);
        if (shared->failed) {
            off();
        }
        if (poll(&input, 1, 0) > 0 && read(0, &c, 1) == 1 && c == 'e') {
            end();
        }
        for (int disk = 0; disk < DISKS; disk++) {
            look_after(disk);
        }
    }
}
