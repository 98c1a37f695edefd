# SPDX-License-Identifier: GPL-2.0-or-later
"""What is measured: the rows, the subjects, and the command line of each.

One description of a row makes both the command of raw-aio-bench and that of fio, so that the floor does the same work.
"""

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Row:
    """One workload. The defaults are those of raw-aio-bench, except for the page cache (see Row.page_cache)."""
    name: str
    what: str
    place: str = 'file'         # file, tmpfs, blk; guest and convert are measured by scripts/bench-guest
    write: bool = False
    direct: bool = False
    depth: int = 1
    block: int = 4096
    segments: int = 1
    sequential: bool = False
    once: bool = False          # each block of a new sparse file, until the file is used up
    cold: bool = False          # the page cache is dropped before
    storm: int = 0              # chains of "write a block, flush" beside the reads
    chained: bool = False       # a finished request is sent again from its own completion
    iothreads: int = 1
    qcow2: bool = False
    neighbour: bool = False     # another process writes and syncs on the same file system
    heartbeat: int = 0          # us; 0: the program's default
    figure: str = ''            # a figure that counts more than the time per request: stall, p99 or threads
    floor: bool = True          # fio can do alike

    def page_cache(self):
        if self.cold:
            return 'drop'
        # Writes into holes must not find pages, and those that bypass the cache don't care.
        return 'keep' if self.direct or self.once else 'warm'

    def guest(self):
        return self.place in ('guest', 'convert')


def _rows():
    """By subject matter: the page cache, the device, memory, allocation, trouble, the rest."""
    sparse = dict(write=True, depth=16, block=64 << 10, once=True, heartbeat=200, figure='stall')
    return [
        Row('cached-read-qd1', '4 KiB reads from the page cache, one at a time'),
        Row('cached-read-qd32', '4 KiB reads from the page cache, 32 in flight', depth=32),
        Row('cached-write-qd1', '4 KiB overwrites in the page cache, one at a time', write=True),
        Row('cached-write-qd32', '4 KiB overwrites in the page cache, 32 in flight', write=True, depth=32),
        Row('direct-read-qd1', '4 KiB O_DIRECT reads, one at a time', direct=True),
        Row('direct-read-qd32', '4 KiB O_DIRECT reads, 32 in flight', direct=True, depth=32),
        Row('direct-write-qd32', '4 KiB O_DIRECT overwrites, 32 in flight', direct=True, write=True, depth=32),
        Row('ram-read-qd1', '4 KiB O_DIRECT reads from tmpfs, one at a time', place='tmpfs', direct=True),
        Row('ram-read-qd32', '4 KiB O_DIRECT reads from tmpfs, 32 in flight', place='tmpfs', direct=True, depth=32),
        Row('blk-read-qd1', '4 KiB O_DIRECT reads from a block device, one at a time', place='blk', direct=True),
        Row('blk-read-qd32', '4 KiB O_DIRECT reads from a block device, 32 in flight', place='blk', direct=True,
            depth=32),
        Row('sparse-write', '64 KiB O_DIRECT writes into holes, 16 in flight', direct=True, **sparse),
        Row('sparse-write-cached', '64 KiB cached writes into holes, 16 in flight', **sparse),
        Row('stall', 'sparse-write beside a neighbour that syncs all the time: how late the event loop is', direct=True,
            neighbour=True, **sparse),
        Row('fsync-storm', '4 KiB cached reads, 8 in flight, while two others write and flush: p99 of the reads',
            depth=8, storm=2, heartbeat=200, figure='p99'),
        Row('starve', '4 KiB cached reads, 64 in flight, sent again from their completion: how late the event loop is',
            depth=64, chained=True, heartbeat=200, figure='stall'),
        Row('vectored', '64 KiB O_DIRECT reads into 16 segments, 8 in flight', direct=True, depth=8, block=64 << 10,
            segments=16, floor=False),
        Row('seq-read-1m-cached', '1 MiB reads in order from the page cache, 4 in flight', sequential=True, block=MIB,
            depth=4),
        Row('seq-read-1m-direct', '1 MiB O_DIRECT reads in order, 4 in flight', direct=True, sequential=True, block=MIB,
            depth=4),
        Row('seq-write-1m-cached', '1 MiB overwrites in order in the page cache, 4 in flight', write=True,
            sequential=True, block=MIB, depth=4),
        Row('seq-write-1m-direct', '1 MiB O_DIRECT overwrites in order, 4 in flight', direct=True, write=True,
            sequential=True, block=MIB, depth=4),
        Row('threads-peak', '4 KiB cached reads, 64 in flight: how many threads exist', depth=64, figure='threads'),
        Row('iothreads-4', '4 KiB cached reads, four event loops with a file each, 8 in flight on each', depth=8,
            iothreads=4, floor=False),
        Row('cold-read-qd32', '4 KiB buffered reads after the page cache was dropped, 32 in flight', depth=32,
            cold=True),
        Row('qcow2-write', '64 KiB writes that allocate in a new qcow2 image, cache=none, 16 in flight', write=True,
            direct=True, depth=16, block=64 << 10, once=True, qcow2=True, floor=False),
        Row('guest-fio', 'fio in an emulated guest with virtio-blk and an IOThread: verified reads and writes',
            place='guest', direct=True, floor=False),
        Row('img-convert', 'qemu-img convert of a real image; a request is 1 MiB of its data', place='convert',
            direct=True, floor=False),
    ]


ROWS = {row.name: row for row in _rows()}

# Names that stand for several rows
GROUPS = {
    'seq-read-1m': ('seq-read-1m-cached', 'seq-read-1m-direct'),
    'seq-write-1m': ('seq-write-1m-cached', 'seq-write-1m-direct'),
}

QUICK = ('cached-read-qd1', 'cached-read-qd32', 'cached-write-qd1', 'cached-write-qd32', 'direct-read-qd32',
         'ram-read-qd32', 'sparse-write', 'stall', 'fsync-storm', 'starve')

REFERENCE = 'stock-threads'


@dataclass(frozen=True)
class Subject:
    name: str
    side: str                   # ours, stock or floor
    aio: str = ''               # of QEMU
    engine: str = ''            # of fio
    disable: str = ''           # tiers that are switched off


SUBJECTS = {s.name: s for s in (
    Subject('ours-threads', 'ours', aio='threads'),
    Subject('ours-native', 'ours', aio='native'),
    Subject('ours-pool', 'ours', aio='threads', disable='inline,native'),
    Subject('stock-threads', 'stock', aio='threads'),
    Subject('stock-native', 'stock', aio='native'),
    Subject('stock-io_uring', 'stock', aio='io_uring'),
    Subject('floor-psync', 'floor', engine='psync'),
    Subject('floor-libaio', 'floor', engine='libaio'),
    Subject('floor-io_uring', 'floor', engine='io_uring'),
    Subject('floor-posixaio', 'floor', engine='posixaio'),
)}


def prepare_command(program, path, size, iothreads=1):
    """The whole file, written with the pattern that every later run can verify."""
    return [program, '--prepare', 'write', '--size', str(size), '--iothreads', str(iothreads), '--count', '0', path]


def bench_command(program, row, subject, path, size, seconds, loop):
    argv = [program, '--aio', subject.aio, '--cache', 'none' if row.direct else 'writeback', '--loop', loop,
            '--depth', str(row.depth), '--block-size', str(row.block), '--seconds', f'{seconds:g}',
            '--page-cache', row.page_cache()]
    if row.place == 'blk' or row.once:
        argv += ['--size', str(size)]
    if row.qcow2:
        argv += ['--format', 'qcow2']
    if row.once:
        argv += ['--prepare', 'punch', '--once']
    if row.write:
        argv += ['--write-percent', '100']
    if row.sequential:
        argv += ['--pattern', 'sequential']
    if row.segments > 1:
        argv += ['--segments', str(row.segments)]
    if row.storm:
        argv += ['--storm', str(row.storm)]
    if row.chained:
        argv += ['--resend', 'completion']
    if row.iothreads > 1:
        argv += ['--iothreads', str(row.iothreads)]
    if row.heartbeat:
        argv += ['--heartbeat-us', str(row.heartbeat)]
    return argv + [path]


def fio_command(program, row, subject, path, size, seconds):
    """The same work by fio. It may not lay out files, drop the page cache or start the file over by itself."""
    argv = [program, '--output-format=json', '--lat_percentiles=1', '--clat_percentiles=0',
            '--percentile_list=50:90:99:99.9', '--filename=' + path.replace('\\', '\\\\').replace(':', '\\:'),
            f'--size={size}', f'--bs={row.block}', f'--direct={int(row.direct)}',
            f'--invalidate={int(row.cold)}', '--allow_file_create=0', '--fallocate=none', '--fadvise_hint=0', '--randrepeat=1',
            # Its buffer would stand just beside a page's beginning, and copies into that take up to six times as long.
            '--iomem_align=4096']
    if not row.once:
        argv += ['--time_based', f'--runtime={round(seconds * 1000)}ms', '--norandommap']
    # A synchronous engine has one request in flight, whatever the row has.
    depth = 1 if subject.engine == 'psync' else row.depth
    argv += ['--name=measured', f'--ioengine={subject.engine}', f'--iodepth={depth}',
             '--rw=' + ('' if row.sequential else 'rand') + ('write' if row.write else 'read')]
    if row.storm:
        argv += ['--name=storm', f'--numjobs={row.storm}', '--ioengine=psync', '--rw=randwrite', '--fsync=1']
    return argv


def neighbour_command(program, path):
    """Threads instead of processes, so that all of it ends with the process that was started."""
    return [program, '--name=neighbour', '--filename=' + path.replace('\\', '\\\\').replace(':', '\\:'), '--thread',
            '--ioengine=psync', '--rw=randwrite', '--bs=64k', '--fsync=1', f'--size={128 * MIB}', '--fallocate=none',
            '--time_based', '--runtime=24h', '--norandommap']


def fio_writes(row):
    """Whether fio's run would spoil the pattern of the file."""
    return row.write or row.storm > 0


def fio_counts_cpu(row, subject):
    """fio adds up the CPU time and switches of its own thread only: elsewhere the figures would be too good."""
    if subject.engine == 'posixaio':
        return False
    # Buffered writes go to worker threads of the kernel.
    return not (subject.engine == 'io_uring' and row.write and not row.direct)
