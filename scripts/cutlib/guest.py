# SPDX-License-Identifier: GPL-2.0-or-later
"""Power cuts with a guest that writes records to ext4, and acknowledges each when fsync(2) has returned.

blklogwrites is between the format and our driver. A record is written when the one before has been acknowledged, so from
the first entry of the log that has a later record on, an acknowledged one must be found.
"""

import os
import random
import re
import shutil
import subprocess
import time

from . import logwrites, qcow2
from .host import Combination, check_qcow2

SIZE = 48 << 20
IMAGE = 80 << 20            # of qcow2: room for its metadata
RECORD = 4096
BOOT_LIMIT = 240            # s; emulation on a machine that is busy otherwise takes its time
LIMIT = 120
MARK = re.compile(rb'powercut record (\d{8})\n')
ACKNOWLEDGED = re.compile(rb'^(\d{8})\r?$', re.M)


class Failed(Exception):
    pass


def every_combination():
    return [Combination(fmt, aio, 'none' if aio == 'native' else 'writeback', fua)
            for fua in (True, False) for fmt, aio in (('raw', 'native'), ('qcow2', 'threads'), ('raw', 'threads'),
                                                     ('qcow2', 'native'))]


def quick_combinations():
    return [Combination('raw', 'native', 'none', True), Combination('qcow2', 'threads', 'writeback', False)]


class Recording:
    def __init__(self, folder, combination, log, acknowledged):
        self.folder, self.combination, self.log, self.acknowledged = folder, combination, log, acknowledged


def command(programs, folder, combination, args):
    at = lambda name: os.path.join(folder, name)        # noqa: E731
    direct = 'on' if combination.cache == 'none' else 'off'
    argv = [programs.system, '-machine', 'q35', '-accel', 'tcg,thread=multi,tb-size=256', '-cpu', 'max', '-m', '256',
            '-nodefaults', '-nographic', '-no-reboot', '-serial', 'file:' + at('console'), '-serial', 'file:' + at('acks'),
            '-kernel', args.kernel, '-initrd', args.initrd, '-append', 'console=ttyS0 panic=-1 quiet',
            '-device', 'virtio-rng-pci', '-object', 'iothread,id=io',
            '-blockdev', f'file,node-name=protocol,filename={at("disk")},aio={combination.aio},cache.direct={direct},'
                         'discard=unmap',
            '-blockdev', f'file,node-name=log,filename={at("log")}',
            '-blockdev', 'blklogwrites,node-name=recorder,file=protocol,log=log,log-sector-size=512',
            '-blockdev', f'{combination.format},node-name=format,file=recorder,discard=unmap']
    if combination.fua:
        return argv + ['-device', 'virtio-scsi-pci,id=scsi,iothread=io',
                       '-device', 'scsi-hd,drive=format,bus=scsi.0,dpofua=on,write-cache=on']
    return argv + ['-device', 'virtio-blk-pci,drive=format,iothread=io,write-cache=on']


def read(path):
    try:
        with open(path, 'rb') as f:
            return f.read()
    except FileNotFoundError:
        return b''


def record(programs, folder, combination, args, seconds):
    """Boot it, let it write for so many SECONDS, and kill it."""
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    disk, start = os.path.join(folder, 'disk'), os.path.join(folder, 'start')
    if combination.format == 'qcow2':
        subprocess.run([programs.img, 'create', '-q', '-f', 'qcow2', disk, str(SIZE)], check=True, timeout=LIMIT)
    for path, size in ((disk, IMAGE if combination.format == 'qcow2' else SIZE), (os.path.join(folder, 'log'), 0)):
        with open(path, 'ab') as f:
            f.truncate(size)
    shutil.copyfile(disk, start)
    console, acks = os.path.join(folder, 'console'), os.path.join(folder, 'acks')
    with open(os.path.join(folder, 'qemu.log'), 'wb') as said:
        guest = subprocess.Popen(command(programs, folder, combination, args), stdin=subprocess.DEVNULL, stdout=said,
                                 stderr=said)
    begin = time.monotonic()
    first = None
    try:
        while first is None or time.monotonic() < first + seconds:
            time.sleep(0.1)
            if first is None and ACKNOWLEDGED.search(read(acks)):
                first = time.monotonic()
            why = ''
            if guest.poll() is not None:
                found = re.search(rb'GUEST FAILED: (.*?)\r?\n', read(console))
                why = found[1].decode(errors='replace') if found else 'QEMU ended'
            elif first is None and time.monotonic() > begin + BOOT_LIMIT:
                why = f'no record after {BOOT_LIMIT} s'
            if why:
                keep = os.path.join(os.path.dirname(os.path.dirname(folder)), 'power-cut-failed')
                shutil.rmtree(keep, ignore_errors=True)
                shutil.copytree(folder, keep)
                raise Failed(f'{combination}: {why}; console and log of QEMU: {keep}')
    finally:
        guest.kill()
        guest.wait()
    if combination.fua and b'queue/fua: 1' not in read(console):
        raise Failed(f'{combination}: the guest saw no disk with FUA')
    acknowledged = max(int(number) for number in ACKNOWLEDGED.findall(read(acks)))
    return Recording(folder, combination, logwrites.Log(os.path.join(folder, 'log')), acknowledged)


def due(log):
    """For each moment at which more must be found: (moment, number of records)."""
    found, highest = [], 0
    for index, entry in enumerate(log.entries):
        if entry.at is None:
            continue
        for mark in MARK.finditer(log.data[entry.at:entry.at + entry.length]):
            number = int(mark[1])
            if number > highest:
                highest = number
                # What came before this record had been acknowledged when it was written.
                found.append((index, number - 1))
    return found


def judge_records(path, records):
    """Recover the file system in PATH, and look for the RECORDS. Returns what is wrong, or ''."""
    done = subprocess.run(['e2fsck', '-f', '-p', path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LIMIT,
                          check=False)
    if done.returncode not in (0, 1):
        lines = done.stdout.decode(errors='replace').strip().splitlines()
        return f'e2fsck -fp: exit {done.returncode}: {"; ".join(lines[:3])}'
    out = path + '.log'
    if os.path.exists(out):
        os.unlink(out)
    subprocess.run(['debugfs', '-R', f'dump /log {out}', path], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                   timeout=LIMIT, check=False)
    data = read(out)
    for number in range(1, records + 1):
        line = b'powercut record %08d\n' % number
        if data[(number - 1) * RECORD:number * RECORD] != (line * (RECORD // len(line) + 1))[:RECORD]:
            return f'record {number} of {records} that were acknowledged is missing'
    return ''


def judge(programs, recording, cuts, seed, progress, **ignore):
    path, plain = os.path.join(recording.folder, 'cut'), os.path.join(recording.folder, 'plain')
    shutil.copyfile(os.path.join(recording.folder, 'start'), path)
    log = recording.log
    moments = due(log)
    if len(moments) < 2:
        raise Failed(f'{recording.combination}: the log has no records')
    disk = logwrites.Disk(path, log, **ignore)
    rand = random.Random(seed)
    failures = []
    # Before the first record there may be no file system yet.
    for i, cut in enumerate(sorted(rand.randint(moments[0][0], len(log.entries)) for _ in range(cuts))):
        records = max(number for moment, number in moments if moment <= cut)
        mode = logwrites.MODES[i % len(logwrites.MODES)]
        disk.cut(cut, mode, rand)
        found = ''
        content = disk.image
        if recording.combination.format == 'qcow2':
            try:
                content = qcow2.content(disk.image)
            except qcow2.Broken as e:
                found = str(e)
            found = found or check_qcow2(programs, path)
        if not found:
            with open(plain, 'wb') as f:
                f.write(content)
            found = judge_records(plain, min(records, recording.acknowledged))
        if found:
            failures.append((cut, mode, found))
        progress()
    disk.close()
    return failures
