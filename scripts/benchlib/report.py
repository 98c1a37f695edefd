# SPDX-License-Identifier: GPL-2.0-or-later
"""The table: what is printed at the end, within 140 columns."""

import shutil
import textwrap

from . import stats
from .rows import REFERENCE, ROWS, SUBJECTS

LABEL = 20
WIDE = 14           # a subject on QEMU: its time, its ratio with an interval
NARROW = 9          # a floor


def number(value):
    """Three digits that count."""
    if value is None:
        return '-'
    if value >= 99999.5:
        return f'{value / 1e6:.1f}M' if value >= 999500 else f'{value / 1e3:.0f}k'
    if value >= 99.95:
        return f'{value:.0f}'
    return f'{value:.1f}' if value >= 9.995 else f'{value:.2f}'


def times(value):
    """A ratio, as short as it stays clear: 12x, 1.3x, .85x."""
    if value >= 999.5:
        return number(value) if value >= 99999.5 else f'{value / 1e3:.0f}k'
    return f'{value:.0f}' if value >= 9.95 else f'{value:.1f}' if value >= 0.995 else f'{value:.2f}'.removeprefix('0')


def switches(value):
    """At most three or four characters, since it stands beside the CPU time."""
    return '-' if value is None else times(value)


def verdict(entry):
    """What there is to say of a subject in place of a figure, or ''."""
    if not entry.get('applies', True):
        return '-'
    for what, count in (('WRONG DATA', entry.get('wrong_data')), ('crashed', entry['crashed']), ('hung', entry['hung']),
                        ('failed', entry.get('failed'))):
        if count:
            return what if what == 'WRONG DATA' else f'{what} {count}/{entry.get("attempts") or count}'
    return 'refused' if entry['refused'] else ''


def main_figure(row, entry):
    """The figure that a row is about, where that isn't the time per request: (value, floor or None)."""
    figure = ROWS[row].figure if row in ROWS else ''
    if figure == 'stall' and entry['stall_us']:
        return entry['stall_us']['p999'], entry['stall_us']['floor_p999']
    if figure == 'p99' and entry['latency_us']:
        return entry['latency_us']['p99'], None
    if figure == 'threads':
        return entry['threads_peak'], None
    return None, None


def by_row(document):
    """{row: {subject: entry}}, both in their usual order."""
    found = {}
    for entry in document['results']:
        found.setdefault(entry['row'], {})[entry['subject']] = entry
    return {row: found[row] for row in [*ROWS, *found] if row in found}


class Table:
    def __init__(self, document):
        self.rows = by_row(document)
        present = {entry['subject'] for entry in document['results']}
        self.subjects = [s for s in SUBJECTS if s in present]
        self.lines = []

    def width(self, subject):
        return NARROW if subject.startswith('floor-') else WIDE

    def line(self, label, cells):
        """Right-aligned, since these are numbers; two blanks at least after the label."""
        text = f'{label:<{LABEL}}' + ''.join(' ' + f'{cells.get(s, ""):>{self.width(s) - 1}}' for s in self.subjects)
        self.lines.append(text.rstrip())

    def head(self, title):
        self.lines += ['', title, '']
        groups = {'ours-': 'ours', 'stock-': 'stock', 'floor-': 'floor (fio)'}
        line = ' ' * LABEL
        for prefix, name in groups.items():
            width = sum(self.width(s) for s in self.subjects if s.startswith(prefix))
            if width:
                # A rule over the columns of the group
                line += '  ' + f' {name} '.center(width - 2, '-')
        self.lines.append(line)
        self.line('', {s: s.partition('-')[2] for s in self.subjects})

    def time_cells(self, entries):
        above, below = {}, {}
        for subject, entry in entries.items():
            word, time = verdict(entry), entry['us_per_request']
            above[subject] = number(time['median']) if time else self.short(subject, word) or '-'
            if time and word:
                below[subject] = self.short(subject, word)
            elif subject == REFERENCE and time:
                below[subject] = f'{number(time["min"])}-{number(time["max"])}'
            elif time and not subject.startswith('floor-'):
                ratio = entry.get('ratios', {}).get(REFERENCE)
                if ratio:
                    below[subject] = f'{times(ratio["median"])}x' + (
                        f' {times(ratio["low"])}-{times(ratio["high"])}' if len(ratio['pairs']) > 1 else '')
        return above, below

    def short(self, subject, word):
        return word.split(' ')[0] if self.width(subject) == NARROW else word

    def times(self):
        self.head('us per request (median); below it: how many times faster than stock-threads, with its interval; '
                  'below stock-threads: min-max')
        for row, entries in self.rows.items():
            above, below = self.time_cells(entries)
            self.line(row, above)
            self.line('', below)

    def costs(self):
        self.head('CPU us per request, and context switches per request')
        for row, entries in self.rows.items():
            self.line(row, {s: f'{number(e["cpu_us_per_request"])} {switches(e["switches_per_request"]):>3}'
                            if e['us_per_request'] and e['cpu_us_per_request'] is not None else '-'
                            for s, e in entries.items()})

    def figures(self):
        chosen = [row for row in self.rows if row in ROWS and ROWS[row].figure]
        if not chosen:
            return
        self.head('What these rows are about, beside the time per request')
        for row in chosen:
            entries = self.rows[row]
            found = {s: main_figure(row, e)[0] for s, e in entries.items()}
            figure = ROWS[row].figure
            cells = {s: str(v) if figure == 'threads' else number(v) for s, v in found.items() if v is not None}
            cells |= {s: self.short(s, verdict(e)) for s, e in entries.items() if s not in cells and verdict(e)}
            self.lines.append({'stall': f'{row}: how late the event loop is, us', 'threads': f'{row}: threads at once',
                               'p99': f'{row}: latency of the reads, us'}[figure])
            self.line({'threads': '  at most', 'p99': '  p99'}.get(figure, '  p99.9'), cells)
            if figure == 'stall':
                for label, key in (('  at most', 'max'), ('  idle loop, p99.9', 'floor_p999'),
                                   ('  idle loop, at most', 'floor_max')):
                    self.line(label, {s: number(e['stall_us'][key]) for s, e in entries.items() if e['stall_us']})

    def medians(self, *subjects):
        """{row: the best of their times}, without the rows that one of them refuses."""
        found = {}
        for row, entries in self.rows.items():
            times_of = [entries[s]['us_per_request'] for s in subjects if s in entries and not verdict(entries[s])]
            if times_of and all(times_of):
                found[row] = min(time['median'] for time in times_of)
        return found

    def best(self):
        """{row: the best time of all, floors too}: what the machine can be brought to do."""
        found = {}
        for row, entries in self.rows.items():
            times = [entry['us_per_request'] for entry in entries.values() if not verdict(entry)]
            if any(times):
                found[row] = min(time['median'] for time in times if time)
        return found

    def overall(self):
        """All rows in one figure, against each mode of stock."""
        ours = [s for s in ('ours-threads', 'ours-native') if s in self.subjects]
        stock = [s for s in self.subjects if s.startswith('stock-')]
        if len(self.rows) < 2 or not ours or not stock:
            return
        self.lines += ['', 'All rows: geometric mean of how many times faster than each of stock, where that is not '
                       'refused', '']
        lines = [(s, self.medians(s)) for s in ours]
        if len(ours) > 1:
            lines.append(('the better in each', self.medians(*ours)))
        lines.append(('best of ours, stock, fio', self.best()))
        for label, times in lines:
            cells = {}
            for reference in stock:
                found = stats.overall(times, self.medians(reference))
                if found:
                    cells[reference] = f'{found[0]:.2f}x of {found[1]}'
            self.line(label, cells)

    def text(self):
        self.times()
        self.overall()
        self.figures()
        self.costs()
        return '\n'.join(self.lines)


def merged(documents):
    """One of several of the same machine: where they have the same row, that of the last."""
    first = documents[0]
    for later in documents[1:]:
        for key in ('kernel', 'cpu_model', 'cpus', 'memory_mib', 'file_system', 'device'):
            if later['machine'].get(key) != first['machine'].get(key):
                raise ValueError(f'not of one machine: {key}')
        rows = list(by_row(later))
        results = [e for e in first['results'] if e['row'] not in rows] + later['results']
        order = list(by_row(first)) + rows
        about = tuple(f'row {row}:' for row in rows)
        first = {**first, 'machine': {**later['machine'], **first['machine']},
                 'results': sorted(results, key=lambda e: order.index(e['row'])),
                 'notes': [n for n in first.get('notes', []) if not n.startswith(about)] +
                 [n for n in later.get('notes', []) if n.startswith(about)] +
                 [f'measured on their own, later ({later["machine"].get("date")}): {", ".join(rows)}']}
    return first


def remarks(document):
    """Refusals, crashes and so on with their reasons, then what to beware of."""
    found = {}
    for entry in document['results']:
        word = verdict(entry)
        if word not in ('', '-'):
            key = entry['subject'], word.split(' ')[0], entry.get('reason') or 'no reason given'
            found.setdefault(key, []).append(entry['row'])
    # One that nobody here could run is said once.
    joined = {}
    for (subject, word, reason), rows in found.items():
        joined.setdefault((tuple(rows), word, reason), []).append(subject)
    lines = [f'{", ".join(subjects)} {word}: {reason} ({", ".join(rows)})'
             for (rows, word, reason), subjects in joined.items()]
    return lines + [f'note: {note}' for note in document.get('notes', [])]


def legend(document):
    runs = document.get('options', {}).get('runs', 5)
    interval = 'one run gives no interval' if runs < 2 else (
        f'its interval is {"min-max" if runs < 8 else "between two"} of these ratios and holds the true median in '
        f'{stats.coverage(runs) * 100:.0f} of 100 cases')
    return (f'{runs} run{"s" if runs > 1 else ""} of each, in turn. '
            f'A ratio is the median of those of each round; {interval}. '
            'ours-pool is ours-threads with the inline tier off. A floor is fio on the same file or one alike; psync '
            'has one request in flight whatever the row has. No floor has its CPU time where threads that fio does not '
            'count do the work.')


def machine_lines(document):
    machine = document['machine']
    parts = [f'{machine["cpus"]} CPUs' + (' (virtual)' if machine.get('virtual') else ''), machine.get('cpu_model'),
             f'{machine["memory_mib"]} MiB' if machine.get('memory_mib') else None, f'Linux {machine["kernel"]}',
             f'an empty system call takes {machine["system_call_us"]} us' if machine.get('system_call_us') else None,
             ' on '.join(p for p in (machine.get('file_system'), machine.get('device')) if p) or None]
    return ', '.join(p for p in parts if p)


def text(document):
    width = min(140, max(80, shutil.get_terminal_size((140, 24)).columns))
    lines = ['']
    for paragraph in [f'Base {document["base"]}; {machine_lines(document)}', legend(document), *remarks(document)]:
        lines += textwrap.wrap(paragraph, width, subsequent_indent='  ', break_long_words=False, break_on_hyphens=False)
    return '\n'.join(lines) + '\n' + Table(document).text()
