# SPDX-License-Identifier: GPL-2.0-or-later
"""Power cuts without a guest: a program writes over NBD to a qemu-storage-daemon, whose image is on a FUSE export of
another one, which records.

    writer --NBD--> daemon under test: raw|qcow2, our engine --FUSE--> recording daemon: blklogwrites, file

So the recorder is below the engine, and a flush is in the log only if fdatasync(2) or RWF_DSYNC came through.
"""

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import time

from . import logwrites, nbd, qcow2
from .records import SLOT, History, Op, Oracle, slot_data

SLOTS = 2048                # 8 MiB
IMAGE = 24 << 20            # room for the metadata of qcow2 and for clusters that are not reused
DEPTH = 8
LIMIT = 60                  # s for what should take a moment


class Failed(Exception):
    pass


class Combination:
    def __init__(self, fmt, aio, cache, fua):
        self.format, self.aio, self.cache, self.fua = fmt, aio, cache, fua

    def __str__(self):
        return f'{self.format}-{self.aio}-{self.cache}-{"fua" if self.fua else "flush"}'


def every_combination():
    return [Combination(fmt, aio, cache, fua) for fmt in ('raw', 'qcow2') for aio in ('threads', 'native')
            for cache in ('none', 'writeback') for fua in (False, True)]


class Daemon:
    """A qemu-storage-daemon with a monitor."""

    def __init__(self, program, folder, name, args):
        self.log = os.path.join(folder, f'{name}.log')
        at = os.path.join(folder, f'{name}.qmp')
        with open(self.log, 'wb') as log:
            self.process = subprocess.Popen(
                [program, '--chardev', f'socket,id=qmp,path={at},server=on,wait=off', '--monitor', 'chardev=qmp', *args],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            self.connect(at)
        except BaseException:
            self.kill()
            raise

    def connect(self, at):
        end = time.monotonic() + LIMIT
        while True:
            if self.process.poll() is not None:
                raise Failed(f'the storage daemon ended: {self.said()}')
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                self.socket = socket.socket(socket.AF_UNIX)
                self.socket.settimeout(LIMIT)
                self.socket.connect(at)
                break
            if time.monotonic() > end:
                raise Failed('the storage daemon does not start')
            time.sleep(0.02)
        self.lines = self.socket.makefile('r')
        self.lines.readline()
        self.command('qmp_capabilities')

    def said(self):
        with open(self.log, encoding='utf-8', errors='replace') as f:
            return f.read().strip().replace('\n', '; ')[-500:]

    def command(self, name, **arguments):
        self.socket.sendall(json.dumps({'execute': name, 'arguments': arguments}).encode())
        while True:
            try:
                line = self.lines.readline()
            except TimeoutError:
                raise Failed(f'{name} is not answered') from None
            if not line:
                raise Failed(f'the storage daemon ended: {self.said()}')
            answer = json.loads(line)
            if 'error' in answer:
                raise Failed(f'{name}: {answer["error"]["desc"]}')
            if 'return' in answer:
                return answer['return']

    def quit(self):
        self.command('quit')
        try:
            self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            raise Failed('the storage daemon does not end') from None

    def kill(self):
        self.process.kill()
        self.process.wait()


def tiers(daemon):
    """Which tier has served how many requests of the image."""
    for entry in daemon.command('query-blockstats', **{'query-nodes': True}):
        if entry.get('node-name') == 'protocol':
            aio = entry.get('driver-specific', {}).get('aio')
            if aio:
                return {name: aio[f'{name}-served'] for name in ('inline', 'native', 'pool')}
    return {}


class Writer:
    """Sends random requests, and keeps what was acknowledged."""

    def __init__(self, at, combination, rand, no_flush):
        self.client = nbd.Client(at, 'disk', LIMIT)
        self.rand = rand
        self.fua = combination.fua
        # With FUA writes alone, what makes them stable is nothing else.
        self.no_flush = no_flush
        self.history = History()
        self.number = 0
        self.acknowledged = 0       # the highest number
        self.in_flight = {}         # by handle: Op, or for a flush the list of those that it covers
        self.busy = set()           # slots
        self.completed = []         # not yet stable

    def send_flush(self):
        handle = self.next_number()
        self.in_flight[handle] = self.completed
        self.completed = []
        self.client.send(handle, nbd.FLUSH)

    def next_number(self):
        self.number += 1
        return self.number

    def send(self):
        what = self.rand.random()
        if what < 0.04 and not self.no_flush:
            self.send_flush()
            return
        kind = 'trim' if what > 0.97 else 'zero' if what > 0.93 else 'write'
        count = self.rand.choice((1, 1, 1, 2, 4, 8))
        while True:
            slot = self.rand.randrange(SLOTS - count + 1)
            slots = range(slot, slot + count)
            if not self.busy.intersection(slots):
                break
        self.busy.update(slots)
        fua = self.fua and kind != 'trim' and self.rand.random() < 0.3
        op = Op(self.next_number(), slot, count, kind, fua)
        op.after = self.acknowledged
        self.history.ops.append(op)
        self.in_flight[op.number] = op
        flags = nbd.FUA if fua else 0
        if kind == 'write':
            data = b''.join(slot_data(op.number, s) for s in slots)
            self.client.send(op.number, nbd.WRITE, slot * SLOT, data=data, flags=flags)
        else:
            self.client.send(op.number, nbd.ZEROES if kind == 'zero' else nbd.TRIM, slot * SLOT, count * SLOT, flags=flags)

    def receive(self):
        op = self.in_flight.pop(self.client.reply())
        if isinstance(op, list):
            self.history.promise(self.number + 1, op)
            return
        self.busy.difference_update(range(op.slot, op.slot + op.count))
        if op.kind == 'write':
            self.acknowledged = max(self.acknowledged, op.number)
        if op.fua:
            self.history.promise(self.number + 1, [op])
        elif not self.no_flush:
            self.completed.append(op)

    def run(self, requests):
        for _ in range(requests):
            while len(self.in_flight) >= DEPTH:
                self.receive()
            self.send()
        while self.in_flight:
            self.receive()
        self.client.close()
        return self.history


class Recording:
    def __init__(self, combination, log, start, history, counters):
        self.combination, self.log, self.start, self.history, self.counters = combination, log, start, history, counters


def node(driver, name, **options):
    return ['--blockdev', json.dumps({'driver': driver, 'node-name': name, **options})]


def record(programs, folder, combination, requests, seed, fua_only=False, unsafe=False):
    """Let the writer write. Returns the Recording."""
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    disk, start, log, mount, at = (os.path.join(folder, name) for name in ('disk', 'start', 'log', 'mount', 'nbd'))
    if combination.format == 'qcow2':
        # Small clusters: more metadata that has to be in order
        subprocess.run([programs.img, 'create', '-q', '-f', 'qcow2', '-o', 'cluster_size=4k', disk, str(SLOTS * SLOT)],
                       check=True, timeout=LIMIT)
    for path, size in ((disk, IMAGE if combination.format == 'qcow2' else SLOTS * SLOT), (log, 0), (mount, 0)):
        with open(path, 'ab') as f:
            f.truncate(size)
    shutil.copyfile(disk, start)
    with contextlib.ExitStack() as stack:
        recorder = Daemon(programs.daemon, folder, 'recorder', [
            *node('file', 'disk', filename=disk), *node('file', 'log', filename=log),
            *node('blklogwrites', 'recorder', **{'file': 'disk', 'log': 'log', 'log-sector-size': 512}),
            '--export', json.dumps({'type': 'fuse', 'id': 'fuse', 'node-name': 'recorder', 'mountpoint': mount,
                                    'writable': True})])
        stack.callback(recorder.kill)
        daemon = Daemon(programs.daemon, folder, 'tested', [
            *node('file', 'protocol', filename=mount, aio=combination.aio, locking='off', discard='unmap',
                  cache={'direct': combination.cache == 'none', 'no-flush': unsafe}),
            *node(combination.format, 'format', file='protocol', discard='unmap',
                  cache={'direct': combination.cache == 'none', 'no-flush': unsafe}),
            '--nbd-server', f'addr.type=unix,addr.path={at}',
            '--export', json.dumps({'type': 'nbd', 'id': 'nbd', 'node-name': 'format', 'name': 'disk', 'writable': True})])
        stack.callback(daemon.kill)
        try:
            writer = Writer(at, combination, random.Random(seed), fua_only)
            history = writer.run(requests)
        except nbd.Failed as e:
            raise Failed(f'{combination}: {e}; {daemon.said()}') from None
        counters = tiers(daemon)
        # Its own flush at the end must not hide what was left out before: what counts is what was recorded by now.
        daemon.quit()
        recorder.command('block-export-del', id='fuse')
        recorder.quit()
    return Recording(combination, logwrites.Log(log), start, history, counters)


def check_qcow2(programs, path):
    done = subprocess.run([programs.img, 'check', '-q', '-f', 'qcow2', path], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=LIMIT, check=False)
    # Clusters that are leaked (3) cost space, nothing else.
    if done.returncode not in (0, 3):
        said = done.stdout.decode(errors='replace').strip().splitlines()
        return f'qemu-img check: exit {done.returncode}: {said[0] if said else ""}'
    return ''


def judge(programs, recording, cuts, seed, progress, **ignore):
    """Replay to CUTS moments. Returns the failures: (moment, mode, what)."""
    folder = os.path.dirname(recording.start)
    path = os.path.join(folder, 'cut')
    shutil.copyfile(recording.start, path)
    log = recording.log
    oracle = Oracle(recording.history, log, SLOTS, recording.combination.format == 'qcow2')
    disk = logwrites.Disk(path, log, **ignore)
    rand = random.Random(seed)
    failures = []
    for i, cut in enumerate(sorted(rand.randint(0, len(log.entries)) for _ in range(cuts))):
        mode = logwrites.MODES[i % len(logwrites.MODES)]
        disk.cut(cut, mode, rand)
        found = ''
        if recording.combination.format == 'qcow2':
            try:
                content = qcow2.content(disk.image)
            except qcow2.Broken as e:
                content, found = None, str(e)
            found = found or check_qcow2(programs, path)
        else:
            content = disk.image
        found = found or oracle.judge(content, cut)
        if found:
            failures.append((cut, mode, found))
        progress()
    disk.close()
    return failures
