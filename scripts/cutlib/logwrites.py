# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads what QEMU's blklogwrites driver has recorded, and makes the disk that a power cut would leave.

The log is that of Linux' dm-log-writes: a superblock, then entries of one sector each, most of them followed by their
data. QEMU adds an entry when the request that it stands for is done, and completes the request after that. So an entry
precedes those of all requests that were sent after its own request had completed.
"""

import mmap
import os
import struct

MAGIC = 0x6a736677736872
SUPER = struct.Struct('<QQQI')
ENTRY = struct.Struct('<QQQQ')
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8
SECTOR = 512

MODES = ('none', 'random', 'all')


class Broken(Exception):
    """The log is not what it should be."""


class Entry:
    __slots__ = ('offset', 'length', 'flags', 'at')

    def __init__(self, offset, length, flags, at):
        self.offset = offset        # in the image, bytes
        self.length = length        # bytes; 0 for a flush alone
        self.flags = flags
        self.at = at                # of the data in the log, or None


class Log:
    def __init__(self, path):
        with open(path, 'rb') as f:
            self.data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        magic, version, count, sector = SUPER.unpack_from(self.data)
        if (magic, version, sector) != (MAGIC, 1, SECTOR):
            raise Broken(f'{path} is no log of blklogwrites with sectors of {SECTOR} bytes')
        self.entries = []
        at = SECTOR
        for _ in range(count):
            start, sectors, flags, _ = ENTRY.unpack_from(self.data, at)
            at += SECTOR
            data = None if flags & DISCARD or not sectors else at
            self.entries.append(Entry(start * SECTOR, sectors * SECTOR, flags, data))
            if data is not None:
                at += sectors * SECTOR
        if at > len(self.data):
            raise Broken(f'{path} is cut short')

    def content(self, entry):
        """What the entry leaves on the disk; a discard leaves zeroes."""
        if entry.at is None:
            return bytes(entry.length)
        return self.data[entry.at:entry.at + entry.length]


class Disk:
    """The image file at a moment of the log. Moments must be asked for in rising order."""

    def __init__(self, path, log, ignore_flush=False, ignore_fua=False):
        self.log = log
        self.ignore_flush = ignore_flush
        self.ignore_fua = ignore_fua
        self.fd = os.open(path, os.O_RDWR)
        self.image = mmap.mmap(self.fd, 0)
        self.stable = 0             # so many entries are in the image for good
        self.undo = []

    def write(self, offset, data, keep_old):
        end = offset + len(data)
        if end > len(self.image):
            raise Broken(f'the log has a write at {offset}, behind the end of the image')
        if keep_old:
            self.undo.append((offset, self.image[offset:end]))
        self.image[offset:end] = data

    def last_flush(self, cut):
        """How many entries are stable at that moment: those before the last flush."""
        if self.ignore_flush:
            return 0
        found = cut
        while found > self.stable and not self.log.entries[found - 1].flags & FLUSH:
            found -= 1
        return found

    def cut(self, cut, mode, rand):
        """As it is when the power fails after CUT entries, and of what is not stable so much was written."""
        self.restore()
        flushed = self.last_flush(cut)
        for entry in self.log.entries[self.stable:flushed]:
            if entry.length:
                self.write(entry.offset, self.log.content(entry), False)
        self.stable = flushed
        for entry in self.log.entries[flushed:cut]:
            if not entry.length:
                continue
            data = self.log.content(entry)
            if mode == 'all' or (entry.flags & FUA and not self.ignore_fua):
                self.write(entry.offset, data, True)
            elif mode == 'random' and rand.random() < 0.5:
                if rand.random() < 0.5:
                    self.write(entry.offset, data, True)
                    continue
                # Torn: any of its sectors
                for at in range(0, len(data), SECTOR):
                    if rand.random() < 0.5:
                        self.write(entry.offset + at, data[at:at + SECTOR], True)

    def restore(self):
        """Back to what is stable."""
        while self.undo:
            offset, old = self.undo.pop()
            self.image[offset:offset + len(old)] = old

    def close(self):
        self.restore()
        self.image.close()
        os.close(self.fd)
