# SPDX-License-Identifier: GPL-2.0-or-later
"""What the writer on the host writes, and what a disk has to hold after a power cut.

The disk is made of slots. Each write has a number, higher than those before, and each of its sectors tells it. A slot
has one request in flight at most.

From which moment of the log on an acknowledged request must be found: what was sent after the acknowledgement is behind
it in the log. So that is the first entry with a number that was given later. No clock is needed, and at most one
entry is let off.
"""

import bisect
import struct

SECTOR = 512
SLOT = 4096
SECTORS = SLOT // SECTOR
HEAD = struct.Struct('<8sQQQ')
MAGIC = b'powercut'
ZEROES = bytes(SECTOR)
NEVER = 1 << 62


def slot_data(number, slot):
    """4 KiB that tell, in each sector, which write they are of and where they belong."""
    return b''.join(HEAD.pack(MAGIC, number, slot, i) * (SECTOR // HEAD.size) for i in range(SECTORS))


def number_of(sector, slot, index):
    """The number of the write that a sector is of; 0 of zeroes; None if it is not what was ever written there."""
    if sector == ZEROES:
        return 0
    magic, number, where, which = HEAD.unpack_from(sector)
    if (magic, where, which) != (MAGIC, slot, index) or sector != HEAD.pack(magic, number, where, which) * 16:
        return None
    return number


class Op:
    """A request of the writer."""
    __slots__ = ('number', 'slot', 'count', 'kind', 'fua', 'after')

    def __init__(self, number, slot, count, kind, fua):
        self.number = number
        self.slot = slot
        self.count = count      # of slots
        self.kind = kind        # write, zero, trim
        self.fua = fua
        self.after = 0          # the highest number that was acknowledged before it was sent


class History:
    """What was sent, and what was promised when."""

    def __init__(self):
        self.ops = []           # Op
        self.promises = []      # (next number to be given then, Op)

    def promise(self, next_number, ops):
        self.promises += [(next_number, op) for op in ops]


def numbers_in(log):
    """For each entry the highest number of a write in it, and where each number stands first and last."""
    first, last = {}, {}
    for index, entry in enumerate(log.entries):
        if entry.at is None:
            continue
        data = log.data
        for at in range(entry.at, entry.at + entry.length, SLOT if entry.length % SLOT == 0 else SECTOR):
            if data[at:at + 8] == MAGIC:
                number, = struct.unpack_from('<Q', data, at + 8)
                first.setdefault(number, index)
                last[number] = index
    return first, last


class Oracle:
    """Judges disks at rising moments of the log."""

    def __init__(self, history, log, slots, reuses):
        """REUSES: the format gives what it has freed to other slots, as qcow2 does."""
        first, last = numbers_in(log)
        self.reuses = reuses
        self.slots = slots
        # By number, how early anything from there on stands in the log: NEVER if nothing does
        numbers = sorted(first)
        earliest = [0] * len(numbers)
        low = NEVER
        for i in range(len(numbers) - 1, -1, -1):
            low = min(low, first[numbers[i]])
            earliest[i] = low

        def behind(number):
            i = bisect.bisect_left(numbers, number)
            return earliest[i] if i < len(numbers) else len(log.entries)

        self.due = sorted(((behind(number), op.number, op) for number, op in history.promises), key=lambda d: d[:2])
        self.next_due = 0
        self.must = [0] * slots                 # the number that a slot must have at least
        self.zero = [False] * slots             # that was a request to write zeroes
        self.blank = [[] for _ in range(slots)]  # (number, not before this moment) of what leaves zeroes
        for op in history.ops:
            if op.kind != 'write':
                early = last.get(op.after, -1) + 1
                for slot in range(op.slot, op.slot + op.count):
                    self.blank[slot].append((op.number, early))
        self.kept = {}                          # number, slot: its data

    def advance(self, cut):
        while self.next_due < len(self.due) and self.due[self.next_due][0] <= cut:
            op = self.due[self.next_due][2]
            self.next_due += 1
            for slot in range(op.slot, op.slot + op.count):
                if op.number > self.must[slot] and op.kind != 'trim':
                    self.must[slot] = op.number
                    self.zero[slot] = op.kind == 'zero'

    def expected(self, slot):
        number = self.must[slot]
        if not number or self.zero[slot]:
            return bytes(SLOT)
        data = self.kept.get(slot)
        if not data or data[0] != number:
            data = self.kept[slot] = number, slot_data(number, slot)
        return data[1]

    def judge(self, disk, cut):
        """What is wrong with the disk, or ''."""
        self.advance(cut)
        for slot in range(self.slots):
            found = disk[slot * SLOT:(slot + 1) * SLOT]
            if found == self.expected(slot):
                continue
            must = self.must[slot]
            may_be_blank = not must or self.zero[slot] or any(
                number > must and early <= cut for number, early in self.blank[slot])
            for i in range(SECTORS):
                sector = found[i * SECTOR:(i + 1) * SECTOR]
                number = number_of(sector, slot, i)
                if number is None:
                    # qcow2 does not flush between freeing a cluster, or mapping a new one, and data that is written
                    # there. So a slot that was freed, or never stable, may show what others had or have there.
                    if self.reuses and may_be_blank:
                        continue
                    return f'slot {slot}, sector {i}: neither old nor new: {sector[:32].hex()}'
                if number < must and not (number == 0 and may_be_blank):
                    return (f'slot {slot}, sector {i}: write {must} was acknowledged as stable, but here is '
                            f'{f"write {number}" if number else "nothing"}')
        return ''
