# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs the subjects of each row in turn, and sums up what they said."""

import errno
import json
import os
import re
import shutil
import signal
import time
from contextlib import ExitStack
from dataclasses import dataclass, field

from . import host, report, stats
from .host import Failed, say, status
from .rows import (MIB, REFERENCE, bench_command, fio_command, fio_counts_cpu, fio_writes, neighbour_command,
                   prepare_command)

# One that hung so often is not run again.
HUNG_IS_ENOUGH = 2
PERCENTILES = ('p50', 'p90', 'p99', 'p999', 'max')
STALLS = ('p99', 'p999', 'max', 'floor_p99', 'floor_p999', 'floor_max')
# How scripts/bench-guest says that QEMU crashed, or hung
GUEST_END = re.compile(r'(ended by signal \d+)|\bhung\b')
# QEMU 10.0 finds out with the first request, and goes on with threads.
FALLBACK = re.compile(r'^.*Unable to use linux (?:io_uring|AIO).*$', re.M | re.I)
# What fio's errors mean when the kernel or the file system lacks something
FIO_REFUSALS = (errno.EPERM, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EACCES)


class Skipped(Exception):
    """This row can't be measured here; the others can."""


@dataclass
class Outcome:
    """All runs of one subject on one row."""
    reason: str = ''
    refused: bool = False
    applies: bool = True
    crashed: int = 0
    hung: int = 0
    failed: int = 0
    wrong: int = 0
    runs: list = field(default_factory=list)

    def finished(self):
        return self.refused or self.hung >= HUNG_IS_ENOUGH or not self.applies

    def attempts(self):
        return len(self.runs) + self.crashed + self.hung + self.failed + self.wrong

    def times(self):
        return {run['round']: run['us_per_request'] for run in self.runs if run['us_per_request'] is not None}


@dataclass
class Plan:
    """What the command line asked for."""
    rows: list
    subjects: list
    runs: int
    seconds: float
    loop: str
    quick: bool
    budget: float               # seconds for all rows
    device: str
    size: int                   # of the shared file
    programs: dict              # (side, name): path; 'fio' and 'guest' have no side


class Runner:
    def __init__(self, plan, folder, children):
        self.plan = plan
        self.folder = folder
        self.children = children
        self.files = {}
        self.stack = ExitStack()
        self.places = {'file': folder}
        self.block = None
        self.results = {}
        self.notes = []
        # QEMU must see nothing of this user's own settings, but for what a subject is.
        self.env = {k: v for k, v in os.environ.items() if not k.startswith('QEMU_')}

    # --- places ---

    def space_needed(self):
        """Bytes in the folder: the rows run one after the other, but the shared files stay."""
        rows = [row for row in self.plan.rows if row.place == 'file']
        floors = any(s.side == 'floor' for s in self.plan.subjects)
        shared = [row for row in rows if not row.once and row.iothreads == 1]
        need = self.plan.size if shared else 0
        if floors and any(fio_writes(row) for row in shared):
            need += self.plan.size
        if any(row.iothreads > 1 for row in rows):
            need += self.plan.size
        if any(row.once for row in rows):
            need += self.once_size() + 8 * MIB
        if any(row.neighbour for row in rows):
            need += 128 * MIB
        # Two subjects of which one is just being removed, and the guest's disk or the converted image.
        if any(row.guest() for row in self.plan.rows):
            need += 1024 * MIB
        if any(row.place == 'blk' for row in self.plan.rows) and not self.plan.device:
            need += self.plan.size
        return need

    def once_size(self):
        """Rows that end when the file is used up: a smaller one is a shorter run."""
        return self.plan.size // 2 if self.plan.quick else self.plan.size

    def tmpfs(self):
        """A folder on tmpfs with room for the file, and with O_DIRECT."""
        if 'tmpfs' not in self.places:
            folder = os.path.join(self.folder, 'tmpfs')
            os.mkdir(folder)
            size = self.plan.size + 16 * MIB
            if host.available_memory() < size + 256 * MIB:
                raise Skipped(f'not enough free memory for a file of {self.plan.size // MIB} MiB on tmpfs')
            if host.mount_tmpfs(folder, size):
                self.stack.callback(host.unmount, folder)
            else:
                if not os.path.isdir('/dev/shm') or host.free_space('/dev/shm') < size:
                    raise Skipped(f'/dev/shm has less than {size // MIB} MiB free, and a tmpfs of its own needs root')
                folder = host.new_folder('/dev/shm', 'raw-aio-bench.')
                self.stack.callback(shutil.rmtree, folder, ignore_errors=True)
            if not host.has_direct(folder):
                raise Skipped('this kernel has no O_DIRECT on tmpfs (Linux 6.6 has)')
            self.places['tmpfs'] = folder
        return self.places['tmpfs']

    def block_device(self):
        """The device that was named, or zram, or a loop device: (path, size, kind)."""
        if self.block:
            return self.block
        size = self.plan.size
        if self.plan.device:
            length = host.check_device(self.plan.device)
            if length < 64 * MIB:
                raise Skipped('the device has less than 64 MiB')
            self.block = self.plan.device, min(size, length) // MIB * MIB, 'given'
            return self.block
        if not host.is_root():
            raise Skipped('needs root, or a block device of yours (--device)')
        why = ''
        if host.available_memory() > 2 * size + 256 * MIB:
            try:
                made = host.Zram(size, self.folder)
                self.stack.callback(made.close)
                self.block = made.path, size, made.kind
                return self.block
            except OSError as e:
                why = f'no zram ({e.strerror}), '
        try:
            made = host.Loop(os.path.join(self.folder, 'loop'), size)
            self.stack.callback(made.close)
            self.block = made.path, size, made.kind
            return self.block
        except OSError as e:
            raise Skipped(f'{why}no loop device ({e.strerror})') from None

    def program(self, subject_or_side, name='raw-aio-bench'):
        side = getattr(subject_or_side, 'side', subject_or_side)
        return self.plan.programs[side, name]

    def prepare(self, path, size, iothreads=1):
        """Written once; rows that share the file find the same pattern."""
        if path in self.files:
            return path
        say(f'writing {iothreads if iothreads > 1 else "a"} file{"s" if iothreads > 1 else ""} '
            f'of {size // MIB} MiB')
        side = next(s for s in ('stock', 'ours') if (s, 'raw-aio-bench') in self.plan.programs)
        ended = self.children.run(prepare_command(self.program(side), path, size, iothreads), 60 + size / (2 * MIB),
                                  self.env)
        if ended.hung or ended.code:
            raise Failed('could not prepare the files: ' + ('no end' if ended.hung else ended.last_words()))
        self.files[path] = size
        return path

    def set_up(self, row):
        """The row's files: (path for raw-aio-bench, path for fio, size)."""
        plan = self.plan
        floors = row.floor and any(s.side == 'floor' for s in plan.subjects)
        if row.guest():
            return os.path.join(self.folder, row.name), None, plan.size
        if row.place == 'blk':
            path, size, kind = self.block_device()
            if path not in self.files:
                say(f'{"destroying the contents of" if kind == "given" else "made"} {path}'
                    + ('' if kind == 'given' else f' ({kind})'))
            return self.prepare(path, size), path, size
        folder = self.tmpfs() if row.place == 'tmpfs' else self.folder
        if row.once:
            return os.path.join(folder, 'sparse'), os.path.join(folder, 'sparse.fio'), self.once_size()
        if row.iothreads > 1:
            return self.prepare(os.path.join(folder, 'loops'), plan.size // row.iothreads, row.iothreads), None, \
                plan.size // row.iothreads
        path = self.prepare(os.path.join(folder, 'data'), plan.size)
        fio_path = path
        if floors and fio_writes(row):
            # fio would spoil the pattern, which the next run verifies.
            fio_path = self.prepare(os.path.join(folder, 'data.fio'), plan.size)
        if row.direct and row.place == 'file':
            for p in {path, fio_path}:
                host.drop(p)
        return path, fio_path, plan.size

    # --- one run ---

    def expected(self, row, subject):
        """Seconds of one run, as a start for the estimate and the watchdog."""
        seconds = self.plan.seconds
        if row.place == 'guest':
            return 12 + 2 * seconds
        if row.place == 'convert':
            return 4
        if row.once:
            return self.once_size() / (256 * MIB) * (2 if row.neighbour else 1) + 0.3
        return seconds + (0.4 if subject.side == 'floor' else 0.25)

    def limit(self, row, subject):
        expected = self.expected(row, subject)
        if row.guest():
            return 60 + 5 * expected
        return float(os.environ.get('BENCH_LIMIT', 0)) or (5 if self.plan.quick else 10) + 5 * expected

    def run_guest(self, row, subject, path, seconds, limit):
        plan = self.plan
        log = os.path.join(self.folder, 'guest.log')
        guest, qemu_img = plan.programs['guest'], self.program(subject, 'qemu-img')
        if row.place == 'guest':
            argv = [guest, 'run', '--qemu', self.program(subject, 'qemu-system-x86_64'), '--qemu-img', qemu_img,
                    '--image', path, '--size', str(256 * MIB), '--format', 'raw', '--cache', 'none',
                    '--aio', subject.aio, '--seconds', f'{seconds:g}', '--limit', str(int(limit)), '--log', log]
        else:
            argv = [guest, 'convert', '--qemu-img', qemu_img, '--target', path, '--aio', subject.aio, '--cache', 'none',
                    '--limit', str(int(limit))]
        return argv

    def run_once(self, row, subject, paths, number):
        """One run of one subject, noted in its outcome."""
        outcome = self.results[row.name][subject.name]
        path, fio_path, size = paths
        limit = self.limit(row, subject)
        env = dict(self.env)
        if subject.disable:
            env['QEMU_RAW_AIO_DISABLE'] = subject.disable
        if row.guest():
            argv = self.run_guest(row, subject, path, self.plan.seconds, limit)
            limit += 30             # it has a limit itself, and more to say when it comes to it
        elif subject.side == 'floor':
            argv = self.fio(row, subject, fio_path, size)
            path = fio_path
        else:
            argv = bench_command(self.program(subject), row, subject, path, size, self.plan.seconds, self.plan.loop)
        ended = self.children.run(argv, limit, env)
        try:
            self.judge(row, subject, outcome, ended, number, limit)
        finally:
            if row.once or row.guest():
                if os.path.exists(path):
                    os.unlink(path)
            elif row.write or row.storm:
                host.settle(path)

    def fio(self, row, subject, path, size):
        if row.once:
            host.new_sparse(path, size)
        elif row.page_cache() == 'warm':
            host.warm(path)
        return fio_command(self.plan.programs['fio'], row, subject, path, size, self.plan.seconds)

    def judge(self, row, subject, outcome, ended, number, limit):
        if ended.hung:
            outcome.hung += 1
            outcome.reason = f'not done after {limit:.0f} s'
        elif ended.signal:
            outcome.crashed += 1
            outcome.reason = signal.Signals(ended.signal).name
        elif subject.side == 'floor':
            try:
                run = fio_result(ended, row, subject)
            except Refused as e:
                outcome.refused, outcome.reason = True, str(e)
            except ValueError as e:
                outcome.failed += 1
                outcome.reason = str(e)
            else:
                outcome.runs.append({'round': number, **run})
        elif ended.code == 3:
            outcome.refused, outcome.reason = True, ended.last_words()
        elif ended.code == 0 and subject.side == 'stock' and (found := FALLBACK.search(ended.err)):
            # It would be measured in a mode that it was not asked for.
            outcome.refused, outcome.reason = True, host.without_paths(found[0])
        elif ended.code == 4:
            outcome.wrong += 1
            outcome.reason = ended.last_words()
            say(f'WRONG DATA: {row.name}, {subject.name}: {outcome.reason}')
        elif ended.code == 1 and row.guest() and (found := GUEST_END.search(ended.err)):
            # It watches QEMU itself.
            if found[1]:
                outcome.crashed += 1
            else:
                outcome.hung += 1
            outcome.reason = ended.last_words()
        elif ended.code:
            outcome.failed += 1
            outcome.reason = f'exit {ended.code}: {ended.last_words()}'
        else:
            try:
                run = json.loads(ended.out)
                served = bool(run['requests'])
                run.setdefault('us_per_request', None)
            except (ValueError, KeyError, TypeError):
                outcome.failed += 1
                outcome.reason = 'its output is not what it should be'
                return
            if served:
                outcome.runs.append({'round': number, **run})
            else:
                outcome.failed += 1
                outcome.reason = 'no request was done in time'

    # --- a row ---

    def applies(self, row, subject):
        if row.iothreads > 1 and self.plan.loop == 'main':
            return 'one main loop only'
        if subject.side == 'floor' and not row.floor:
            return 'fio has nothing alike'
        return ''

    def start_neighbour(self):
        path = os.path.join(self.folder, 'neighbour')
        with open(os.path.join(self.folder, 'neighbour.log'), 'wb') as log:
            child = self.children.start(neighbour_command(self.plan.programs['fio'], path), self.env, stdout=log,
                                        stderr=log)
        for _ in range(100):
            if os.path.exists(path) and os.stat(path).st_blocks > 0:
                return child
            if child.poll() is not None:
                break
            time.sleep(0.1)
        self.children.stop(child)
        raise Skipped('the neighbour, fio, did not start')

    def run_row(self, row, budget):
        """Rounds of one run of each subject. Stops early, with a note, when there is no time left."""
        results = self.results[row.name] = {s.name: Outcome() for s in self.plan.subjects}
        for subject in self.plan.subjects:
            why = self.applies(row, subject)
            if why:
                results[subject.name].applies = False
                results[subject.name].reason = why
        began = time.monotonic()
        neighbour = None
        try:
            if not all(o.finished() for o in results.values()):
                paths = self.set_up(row)
                if row.neighbour:
                    neighbour = self.start_neighbour()
            for number in range(self.plan.runs):
                # Another first one in each round, and every other round backwards: nobody always has the machine as
                # the same other left it.
                subjects = self.plan.subjects
                turn = number % len(subjects)
                subjects = subjects[turn:] + subjects[:turn]
                for subject in subjects[::-1] if number % 2 else subjects:
                    if not results[subject.name].finished():
                        status(f'{row.name}: run {number + 1} of {self.plan.runs}: {subject.name}')
                        self.run_once(row, subject, paths, number)
                took = time.monotonic() - began
                done = number + 1
                if 3 <= done < self.plan.runs and took * (done + 1) / done > budget:
                    self.notes.append(f'row {row.name}: {done} runs instead of {self.plan.runs}: out of time')
                    break
        except Skipped as e:
            say(f'{row.name} is left out: {e}')
            for outcome in results.values():
                if outcome.applies:
                    outcome.refused, outcome.reason = True, str(e)
        finally:
            if neighbour:
                self.children.stop(neighbour)
                path = os.path.join(self.folder, 'neighbour')
                if os.path.exists(path):
                    os.unlink(path)
        return time.monotonic() - began

    def estimate(self, row):
        subjects = [s for s in self.plan.subjects if not self.applies(row, s)]
        return sum(self.expected(row, s) for s in subjects) * self.plan.runs

    def run(self, after_row):
        """All rows; AFTER_ROW is called when the results of one more are there."""
        rows = self.plan.rows
        left = [self.estimate(row) for row in rows]
        begin = time.monotonic()
        planned = spent = 0
        for i, row in enumerate(rows):
            # What the rows so far took, compared with what was thought
            scale = min(max(spent / planned, 0.2), 5) if planned else 1
            minutes = sum(left[i:]) * scale / 60
            about = f'{minutes:.0f} min' if minutes >= 1.5 else f'{minutes * 60:.0f} s'
            say(f'row {i + 1} of {len(rows)}: {row.name}; about {about} left')
            # Its share of the time that is left, and half as much again: other rows may need less.
            available = self.plan.budget - (time.monotonic() - begin)
            share = available * left[i] / (sum(left[i:]) or 1)
            spent += self.run_row(row, min(1.5 * share, available))
            planned += left[i]
            after_row()

    def close(self):
        self.stack.close()


class Refused(Exception):
    pass


def fio_result(ended, row, subject):
    """fio's report in the terms of raw-aio-bench."""
    start = ended.out.find('{')
    try:
        jobs = json.loads(ended.out[start:])['jobs'] if start >= 0 else None
    except (ValueError, KeyError):
        jobs = None
    if ended.code or not jobs or any(job['error'] for job in jobs):
        lines = [line for line in (ended.err + ended.out[:max(start, 0)]).splitlines() if line.startswith('fio:')]
        why = host.without_paths(lines[-1].removeprefix('fio:').strip()) if lines else f'exit {ended.code}'
        numbers = {job['error'] for job in jobs or []} | {int(n) for n in re.findall(r'err=\s*(\d+)', ended.err)}
        if numbers & set(FIO_REFUSALS) or 'not loadable' in ended.err or 'does not support direct' in ended.err:
            raise Refused(why)
        raise ValueError(f'fio: {why}')
    kind = 'write' if row.write else 'read'
    done = jobs[0][kind]
    requests = done['total_ios']
    if not requests:
        raise ValueError('fio: no requests')
    # Percents of the job's time; a storm's jobs are in the same process with QEMU, so they count here, too.
    cpu = {'user': sum(j['usr_cpu'] * j['job_runtime'] for j in jobs) * 10 / requests,
           'system': sum(j['sys_cpu'] * j['job_runtime'] for j in jobs) * 10 / requests}
    cpu['total'] = cpu['user'] + cpu['system']
    counted = fio_counts_cpu(row, subject)
    latency = done['lat_ns']
    percentile = latency.get('percentile', {})
    return {
        'requests': requests,
        'seconds': done['runtime'] / 1000,
        'us_per_request': 1e6 / done['iops'] if done['iops'] else None,
        'cpu_us_per_request': cpu if counted else None,
        'switches_per_request': sum(j['ctx'] for j in jobs) / requests if counted else None,
        'latency_us': {
            'p50': percentile.get('50.000000', 0) / 1000, 'p90': percentile.get('90.000000', 0) / 1000,
            'p99': percentile.get('99.000000', 0) / 1000, 'p999': percentile.get('99.900000', 0) / 1000,
            'max': latency['max'] / 1000,
        },
    }


# --- summing up ---

def _members(runs, name, keys):
    """One dictionary of many: the median of each member, but the largest "max" of all."""
    found = [run[name] for run in runs if run.get(name)]
    if not found:
        return None
    return {key: (stats.largest if key.endswith('max') else stats.middle)([f.get(key) for f in found]) for key in keys}


def _tiers(runs):
    found = [run['tiers'] for run in runs if run.get('tiers')]
    if not found:
        return None
    return {key: sum(f.get(key, 0) for f in found) if isinstance(value, (int, float)) else value
            for key, value in found[-1].items()}


def _cpu(run):
    cpu = run.get('cpu_us_per_request')
    return cpu if isinstance(cpu, dict) else {'total': cpu}


def summarise(row, subject, outcome, reference):
    """One entry of the JSON's "results"."""
    runs = outcome.runs
    result = {
        'row': row, 'subject': subject,
        'refused': outcome.refused, 'crashed': outcome.crashed, 'hung': outcome.hung,
        'us_per_request': stats.summary([run['us_per_request'] for run in runs]),
        'cpu_us_per_request': stats.middle([_cpu(run).get('total') for run in runs]),
        'switches_per_request': stats.middle([run.get('switches_per_request') for run in runs]),
        'latency_us': _members(runs, 'latency_us', PERCENTILES),
        'stall_us': _members(runs, 'stall_us', STALLS),
        'threads_peak': stats.largest([run.get('threads_peak') for run in runs]),
        'tiers': _tiers(runs),
        'cpu_user_us_per_request': stats.middle([_cpu(run).get('user') for run in runs]),
        'cpu_system_us_per_request': stats.middle([_cpu(run).get('system') for run in runs]),
        'failed': outcome.failed, 'wrong_data': outcome.wrong, 'attempts': outcome.attempts(),
        'applies': outcome.applies,
        'reason': outcome.reason or None,
        'ratios': {},
        'runs': runs,
    }
    if reference is not None and subject != REFERENCE:
        found = stats.ratio(reference.times(), outcome.times())
        if found:
            result['ratios'][REFERENCE] = found
    return result


def results(runner):
    """All entries so far, and what to warn of."""
    entries, notes = [], []
    for row, outcomes in runner.results.items():
        of_row = [summarise(row, s, o, outcomes.get(REFERENCE)) for s, o in outcomes.items()]
        entries += of_row
        notes += noise(row, of_row)
    return entries, notes


def noise(row, entries):
    """Why nobody should conclude from this row, if so."""
    reasons = []
    for entry in entries:
        times = [run['us_per_request'] for run in entry['runs'] if run['us_per_request'] is not None]
        found = stats.spread(times)
        if found is not None and found > stats.NOISY_SPREAD and not entry['subject'].startswith('floor-'):
            reasons.append(f'{entry["subject"]} {report.number(min(times))} to {report.number(max(times))} us')
        elif stats.inconclusive(entry['ratios'].get(REFERENCE)) and not entry['subject'].startswith('floor-'):
            ratio = entry['ratios'][REFERENCE]
            reasons.append(f'{entry["subject"]} {ratio["low"]:.2g} to {ratio["high"]:.2g} times {REFERENCE}')
    return [f'row {row}: too noisy to conclude: {", ".join(reasons)}'] if reasons else []
