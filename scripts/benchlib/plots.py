# SPDX-License-Identifier: GPL-2.0-or-later
"""Small plots, one for each row, as scripts of gnuplot. A subject has the same colour in all of them."""

import math
from dataclasses import dataclass

from .report import number, verdict
from .rows import ROWS

# Okabe and Ito's colours, which the colour-blind can tell apart, and greys for the floors; legible on white and black.
COLOURS = {
    'ours-threads': '#0072b2', 'ours-native': '#009e73', 'ours-pool': '#56b4e9',
    'stock-threads': '#d55e00', 'stock-native': '#e69f00', 'stock-io_uring': '#cc79a7',
    'floor-psync': '#8d959c', 'floor-libaio': '#747c83', 'floor-io_uring': '#9da5ab', 'floor-posixaio': '#b2b9be',
}
GREY = '#8d959c'

# Rows that differ in the depth only
DEPTHS = {
    'cached reads': ('cached-read-qd1', 'cached-read-qd32', 'threads-peak'),
    'cached overwrites': ('cached-write-qd1', 'cached-write-qd32'),
    'O_DIRECT reads': ('direct-read-qd1', 'direct-read-qd32'),
    'O_DIRECT reads from tmpfs': ('ram-read-qd1', 'ram-read-qd32'),
    'O_DIRECT reads from a block device': ('blk-read-qd1', 'blk-read-qd32'),
}


@dataclass
class Panel:
    title: str
    subtitle: str
    script: str
    width: int = 380
    height: int = 230


def rgb(subject):
    return int(COLOURS[subject][1:], 16)


def quoted(text):
    return '"' + text.replace('\\', '\\\\').replace('"', '\\"') + '"'


def label(text, x, y, how=''):
    return f'set label {quoted(text)} at {x},{y} noenhanced {how}\n'


def frame(subjects, margin=92):
    """Subjects from the top down, each with its name; a border on the left only."""
    tics = ', '.join(f'{quoted(s)} {-i}' for i, s in enumerate(subjects))
    return (f'set border 2 lw 0.5\nset ytics ({tics}) nomirror scale 0 noenhanced\n'
            f'set yrange [{-len(subjects) + 0.4}:0.6]\nset xtics nomirror scale 0.3 font ",9"\n'
            'unset key\nset style fill solid 1 noborder\n'
            f'set lmargin at screen {margin / 380:.3f}\nset rmargin at screen 0.965\n'
            f'set tmargin 0.3\nset bmargin 1.6\n'
            f'set grid xtics lc rgb "{GREY}" lw 0.4 dt 3\nset bars 0\n')


def instead(entries, subjects, have, x):
    """What happened to the subjects that have no bar, in its place."""
    text = ''
    for i, subject in enumerate(subjects):
        if subject not in have and subject in entries:
            word = verdict(entries[subject]).replace('-', '')
            text += label(word or 'not measured', x, -i, f'left offset 0.4,0 font ",10" textcolor rgb "{GREY}"')
    return text


def shown(row, entries, subjects):
    """Without the floors that this row can't have."""
    return [s for s in subjects if s in entries and entries[s].get('applies', True)]


def height(subjects):
    return 34 + 18 * len(subjects)


def what(row):
    return ROWS[row].what if row in ROWS else ''


def throughput(rows, subjects):
    panels = []
    for row, entries in rows.items():
        mine = shown(row, entries, subjects)
        bars = {s: {k: 1000 / v for k, v in entries[s]['us_per_request'].items()} for s in mine
                if entries[s]['us_per_request']}
        if not bars:
            continue
        # Room for what stands at the ends of the bars
        end = max(max(b.values()) * (1.5 if verdict(entries[s]) else 1.24) for s, b in bars.items())
        script = frame(mine) + f'set xrange [0:{end:.6g}]\n' + instead(entries, mine, bars, 0)
        script += f'set xtics {step(end):.6g}\n$bars << END\n'
        for i, s in enumerate(mine):
            if s in bars:
                script += f'{-i} {bars[s]["median"]:.6g} {bars[s]["max"]:.6g} {bars[s]["min"]:.6g} {rgb(s)}\n'
        script += 'END\n'
        for i, s in enumerate(mine):
            if s in bars:
                bad = verdict(entries[s])
                text = number(bars[s]['median']) + (f', {bad}' if bad else '')
                script += label(text, f'{max(bars[s].values()):.6g}', -i, 'left offset 0.5,0 font ",9"')
        script += ('plot $bars using 2:1:(0):2:($1-0.36):($1+0.36):5 with boxxyerror lc rgb variable, '
                   '$bars using 2:1:3:4 with xerrorbars pt 0 lw 1.2 lc rgb "black"\n')
        panels.append(Panel(row, what(row), script, height=height(mine)))
    return panels


def step(span):
    """Some four marks on an axis, at round numbers."""
    raw = span / 4
    power = 10 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)


def cpu(rows, subjects):
    panels = []
    for row, entries in rows.items():
        mine = shown(row, entries, subjects)
        bars = {s: (entries[s].get('cpu_user_us_per_request'), entries[s]['cpu_us_per_request']) for s in mine
                if entries[s]['cpu_us_per_request'] is not None}
        if not bars or not max(total for _, total in bars.values()):
            continue
        top = max(total for _, total in bars.values()) * 1.2
        script = frame(mine) + f'set xrange [0:{top:.6g}]\nset xtics {step(top):.6g}\n'
        missing = [s for s in mine if s not in bars]
        script += ''.join(label(verdict(entries[s]).replace('-', '') or 'not counted', 0, -mine.index(s),
                                f'left offset 0.4,0 font ",10" textcolor rgb "{GREY}"') for s in missing)
        script += '$bars << END\n'
        for i, s in enumerate(mine):
            if s in bars:
                user, total = bars[s]
                script += f'{-i} {user or 0:.6g} {total:.6g} {rgb(s)}\n'
        script += 'END\n'
        for i, s in enumerate(mine):
            if s in bars:
                script += label(number(bars[s][1]), f'{bars[s][1]:.6g}', -i, 'left offset 0.5,0 font ",9"')
        script += ('plot $bars using 3:1:(0):3:($1-0.36):($1+0.36):4 with boxxyerror '
                   'fs transparent solid 0.45 noborder lc rgb variable, '
                   '$bars using 2:1:(0):2:($1-0.36):($1+0.36):4 with boxxyerror lc rgb variable\n')
        panels.append(Panel(row, what(row), script, height=height(mine)))
    return panels


def latency(rows, subjects):
    panels = []
    for title, names in DEPTHS.items():
        names = [n for n in names if n in rows]
        if len(names) < 2:
            continue
        script, plot, n = '', [], 0
        depths = [ROWS[name].depth for name in names]
        low, high = math.inf, 0
        for s in subjects:
            points = []
            for name in names:
                found = rows[name].get(s, {}).get('latency_us')
                # psync has one request in flight whatever the row has.
                if found and found['p50'] and found['p99'] and (s != 'floor-psync' or ROWS[name].depth == 1):
                    points.append((ROWS[name].depth, found['p50'], found['p99']))
            if not points:
                continue
            # Side by side, or the thin lines hide each other.
            shift = 1.035 ** (list(subjects).index(s) - len(subjects) / 2)
            lines = ''.join(f'{d * shift:.5g} {p50:.6g} {p99:.6g}\n' for d, p50, p99 in points)
            script += f'$s{n} << END\n{lines}END\n'
            floor = s.startswith('floor-')
            plot += [f'$s{n} using 1:2:2:3 with yerrorbars pt 0 lw 0.7 lc rgb "{COLOURS[s]}"',
                     f'$s{n} using 1:2 with linespoints lw {1.2 if floor else 2} dt {2 if floor else 1} '
                     f'pt {6 if floor else 7} ps 0.45 lc rgb "{COLOURS[s]}"']
            low = min(low, *(p[1] for p in points))
            high = max(high, *(p[2] for p in points))
            n += 1
        if not plot:
            continue
        tics = ', '.join(str(d) for d in depths)
        script = ('set border 3 lw 0.5\nunset key\nset logscale xy\nset bars 0\n'
                  f'set xtics ({tics}) nomirror scale 0.3 font ",9"\nset ytics nomirror scale 0.3 font ",9"\n'
                  f'set xrange [{depths[0] * 0.75}:{depths[-1] * 1.35}]\n'
                  f'set yrange [{low * 0.7:.5g}:{high * 1.3:.5g}]\n'
                  f'set format y "%g"\nset grid ytics lc rgb "{GREY}" lw 0.4 dt 3\n'
                  'set lmargin 7\nset rmargin 1\nset tmargin 0.5\nset bmargin 1.6\n') + script
        script += 'plot ' + ', '.join(plot) + '\n'
        panels.append(Panel(title, 'us against requests in flight', script, height=300))
    return panels


def stalls(rows, subjects):
    """On one scale for all rows, so that they can be compared."""
    have = {row: {s: e['stall_us'] for s, e in entries.items() if e['stall_us'] and e['stall_us']['p99'] is not None}
            for row, entries in rows.items()}
    values = [v for of_row in have.values() for found in of_row.values() for v in found.values() if v]
    if not values:
        return []
    low = math.floor(math.log10(max(min(values), 1) / 1000))
    high = math.ceil(math.log10(max(*values, 2) / 1000))
    panels = []
    for row, entries in rows.items():
        mine = [s for s in shown(row, entries, subjects) if not s.startswith('floor-')]
        if not have[row]:
            continue
        script = frame(mine) + (f'set logscale x\nset xrange [1e{low}:1e{high}]\n'
                                'set format x "%g"\n') + instead(entries, mine, have[row], f'1e{low}')
        script += '$late << END\n'
        for i, s in enumerate(mine):
            if s in have[row]:
                ms = {k: max(v or 0, 1) / 1000 for k, v in have[row][s].items()}
                script += (f'{-i} {ms["p99"]:.6g} {ms["p999"]:.6g} {ms["max"]:.6g} '
                           f'{ms["floor_p99"]:.6g} {ms["floor_p999"]:.6g} {ms["floor_max"]:.6g} {rgb(s)}\n')
        script += ('END\nplot $late using 6:($1-0.27):5:7 with xerrorbars pt 7 ps 0.3 lw 1.2 lc rgb "' + GREY + '", '
                   '$late using 3:($1+0.1):2:4:8 with xerrorbars pt 7 ps 0.55 lw 2.2 lc rgb variable\n')
        panels.append(Panel(row, what(row), script, height=height(mine) + 10))
    return panels
