# SPDX-License-Identifier: GPL-2.0-or-later
"""The report with plots: one file that needs nothing else."""

import html
import os
import re
import subprocess
import tempfile

from . import plots, report, stats
from .report import by_row, main_figure, number, verdict
from .rows import QUICK, REFERENCE, ROWS, SUBJECTS

STYLE = '''
:root { color-scheme: light dark; --ink: #1c2126; --soft: #5b6670; --line: #d9dee3; --paper: #fff; --card: #f6f8f9;
  --better: #cfe8f7; --worse: #fbdcc4; --same: #e9ecef; --bad: #a3261b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa5b0; --line: #333b43; --paper: #14181c;
  --card: #1b2025; --better: #10435f; --worse: #6a3713; --same: #2b3239; --bad: #ff9a8b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1320px; padding: 2.5rem 1.5rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 3rem 0 .4rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem; }
p { max-width: 78ch; margin: .5rem 0; }
.soft, .meta, figcaption small, caption { color: var(--soft); }
.summary { font-size: 1.1rem; margin: 1.2rem 0; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; padding: 0; margin: 1rem 0; list-style: none;
  font-size: .87rem; }
.legend i { display: inline-block; width: .85em; height: .85em; border-radius: 2px; margin-right: .4em;
  vertical-align: -.06em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .81rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .32rem .42rem; text-align: right; vertical-align: top; white-space: nowrap; }
th { font-weight: 600; } tbody th, thead th:first-child, .left th, .left td { text-align: left; }
thead th { border-bottom: 1px solid var(--line); }
thead tr:first-child th { border: 0; padding-bottom: 0; text-align: center; color: var(--soft); font-weight: 500; }
tbody tr { border-bottom: 1px solid var(--line); }
tbody th small, td small { display: block; font-weight: 400; color: var(--soft); font-size: .92em; }
tbody th small { white-space: normal; min-width: 13em; max-width: 24em; line-height: 1.3; }
td.floor { color: var(--soft); }
td .ratio { display: inline-block; border-radius: 3px; padding: 0 .4em; color: var(--ink); background: var(--same); }
td .better { background: var(--better); } td .worse { background: var(--worse); }
.bad { color: var(--bad); font-weight: 600; } .none { color: var(--soft); font-style: italic; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 1rem; margin: .6rem 0; }
figure { margin: 0; padding: .7rem .8rem .4rem; background: var(--card); border-radius: 6px; break-inside: avoid; }
figcaption { font-weight: 600; font-size: .9rem; line-height: 1.3; }
figcaption small { display: block; font-weight: 400; }
figure svg { display: block; width: 100%; height: auto; }
pre { background: var(--card); padding: .8rem 1rem; border-radius: 6px; overflow-x: auto; font-size: .85rem; }
.notes li { max-width: 100ch; margin: .25rem 0; }
.machine th { font-weight: 500; color: var(--soft); width: 12em; } .machine { max-width: 60rem; }
@media print { body { max-width: none; padding: 0; } }
'''


def escape(text):
    return html.escape(str(text))


def rounds(entry):
    return {run['round']: run['us_per_request'] for run in entry['runs'] if run['us_per_request']} if entry else {}


def versus(entries, subject, other):
    """SUBJECT against OTHER, in the runs of one round."""
    if subject not in entries or other not in entries:
        return None
    return stats.ratio(rounds(entries[other]), rounds(entries[subject]))


def direction(ratio):
    """1: faster, -1: slower, 0: the interval holds both, or is of too few runs to say."""
    if len(ratio['pairs']) < 3:
        return 0
    return 1 if ratio['low'] > 1 else -1 if ratio['high'] < 1 else 0


def factor(value):
    return f'{value:.0f}' if value >= 9.95 else f'{value:.1f}' if value >= 1.05 else f'{value:.2f}'


# --- the summary ---

def compare(rows, subject, other):
    """A sentence on one pair of subjects, or ''."""
    found = {row: versus(entries, subject, other) for row, entries in rows.items()}
    found = {row: ratio for row, ratio in found.items() if ratio}
    if not found:
        return ''
    faster = sorted((r for r in found if direction(found[r]) > 0), key=lambda r: -found[r]['median'])
    slower = sorted((r for r in found if direction(found[r]) < 0), key=lambda r: found[r]['median'])
    parts = []
    if faster:
        parts.append(f'faster in {len(faster)} (most in {faster[0]}, {factor(found[faster[0]]["median"])} times)')
    if slower:
        parts.append(f'slower in {len(slower)} (' + ', '.join(f'{r} {factor(found[r]["median"])}' for r in slower[:6])
                     + (', ...' if len(slower) > 6 else '') + ')')
    undecided = len(found) - len(faster) - len(slower)
    if undecided:
        parts.append(f'undecided in {undecided}')
    return f'<b>{subject}</b> beside {other}, {len(found)} row{"s" if len(found) > 1 else ""}: {", ".join(parts)}.'


def late(rows):
    """How late the event loop was at the worst, of the rows about that."""
    worst = {}
    for row, entries in rows.items():
        if row in ROWS and ROWS[row].figure == 'stall':
            for subject in ('ours-threads', 'ours-native', 'stock-threads', 'stock-native'):
                if subject in entries and entries[subject]['stall_us']:
                    value = entries[subject]['stall_us']['p999']
                    if value is not None and value > worst.get(subject, (0, ''))[0]:
                        worst[subject] = value, row
    if not worst:
        return ''
    said = ', '.join(f'{s} {number(v / 1000)} ms ({row})' for s, (v, row) in worst.items())
    return f'The event loop was late by at most, p99.9: {said}.'


def trouble(rows):
    said = []
    for subject in SUBJECTS:
        for word in ('crashed', 'hung', 'failed', 'wrong_data'):
            hit = [row for row, entries in rows.items() if subject in entries and entries[subject].get(word)]
            if hit:
                what = 'gave wrong data' if word == 'wrong_data' else word
                said.append(f'<span class="bad">{subject} {what} in {len(hit)} row{"s" if len(hit) > 1 else ""}</span>')
    return '; '.join(said) + '.' if said else ''


def summary(rows):
    sentences = [compare(rows, 'ours-threads', 'stock-threads'), compare(rows, 'ours-native', 'stock-native'),
                 compare(rows, 'ours-threads', 'stock-io_uring'), late(rows), trouble(rows)]
    return ' '.join(s for s in sentences if s)


# --- tables ---

def header(subjects):
    groups = ''
    for prefix, name in (('ours-', 'ours'), ('stock-', 'stock'), ('floor-', 'floor (fio)')):
        n = sum(s.startswith(prefix) for s in subjects)
        if n:
            groups += f'<th colspan="{n}" scope="colgroup">{name}</th>'
    names = ''.join(f'<th scope="col">{escape(s.partition("-")[2])}</th>' for s in subjects)
    return f'<thead><tr><th></th>{groups}</tr><tr><th scope="col">row</th>{names}</tr></thead>'


def row_name(row):
    what = f'<small>{escape(ROWS[row].what)}</small>' if row in ROWS else ''
    return f'<th scope="row">{escape(row)}{what}</th>'


def word_of(entry):
    """What happened instead, or as well."""
    word = verdict(entry)
    if word in ('', '-'):
        return ''
    title = f' title="{escape(entry["reason"])}"' if entry.get('reason') else ''
    return f'<span class="{"none" if entry["refused"] else "bad"}"{title}>{escape(word)}</span>'


def time_cell(subject, entry):
    if entry is None:
        return '<td></td>'
    time = entry['us_per_request']
    cls = ' class="floor"' if subject.startswith('floor-') else ''
    if not time:
        return f'<td{cls}>{word_of(entry) or "&ndash;"}</td>'
    text = f'<b>{number(time["median"])}</b>' if not cls else number(time['median'])
    ratio = entry.get('ratios', {}).get(REFERENCE)
    if subject == REFERENCE:
        text += f'<small>{number(time["min"])}&ndash;{number(time["max"])}</small>'
    elif ratio and not cls:
        sign, kind = {1: ('&#9650;', 'better'), -1: ('&#9660;', 'worse'), 0: ('&asymp;', '')}[direction(ratio)]
        ends = f'{factor(ratio["low"])}&ndash;{factor(ratio["high"])}' if len(ratio['pairs']) > 1 else ''
        text += f'<small><span class="ratio {kind}">{sign} {factor(ratio["median"])}&times;</span> {ends}</small>'
    word = word_of(entry)
    return f'<td{cls}>{text}{f"<small>{word}</small>" if word else ""}</td>'


def table(rows, subjects, cell, caption=''):
    body = ''.join(f'<tr>{row_name(row)}{"".join(cell(s, entries.get(s)) for s in subjects)}</tr>'
                   for row, entries in rows.items())
    return f'<div class="scroll"><table>{caption}{header(subjects)}<tbody>{body}</tbody></table></div>'


def cost_cell(subject, entry):
    if entry is None or entry['cpu_us_per_request'] is None:
        return f'<td>{word_of(entry) if entry else ""}</td>'
    switches = entry['switches_per_request']
    return (f'<td{" class=floor" if subject.startswith("floor-") else ""}>{number(entry["cpu_us_per_request"])}'
            f'<small>{"" if switches is None else number(switches)}</small></td>')


def figure_cell(row):
    def cell(subject, entry):
        value, floor = main_figure(row, entry) if entry else (None, None)
        if value is None:
            return f'<td>{word_of(entry) if entry else ""}</td>'
        unit = 1000 if ROWS[row].figure == 'stall' else 1
        below = f'<small>idle {number(floor / unit)}</small>' if floor is not None else ''
        return f'<td>{number(value / unit) if ROWS[row].figure != "threads" else value}{below}</td>'
    return cell


def figure_table(rows, subjects):
    titles = {'stall': 'event loop late, ms: p99.9', 'p99': 'reads, us: p99', 'threads': 'threads at once'}
    body = ''
    for row, entries in rows.items():
        if row in ROWS and ROWS[row].figure:
            cell = figure_cell(row)
            body += (f'<tr><th scope="row">{escape(row)}<small>{titles[ROWS[row].figure]}</small></th>'
                     + ''.join(cell(s, entries.get(s)) for s in subjects) + '</tr>')
    return f'<div class="scroll"><table>{header(subjects)}<tbody>{body}</tbody></table></div>' if body else ''


# --- plots ---

def draw(panels, section):
    """The SVG of each panel, made by one gnuplot."""
    with tempfile.TemporaryDirectory() as folder:
        script = ''.join(f"reset\nset terminal svg size {p.width},{p.height} dynamic font 'sans-serif,11'\n"
                         f"set output '{i}.svg'\n{p.script}\nunset output\n" for i, p in enumerate(panels))
        done = subprocess.run(['gnuplot', '-d', '-'], cwd=folder, input=script, text=True, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, check=False)
        made = []
        for i in range(len(panels)):
            try:
                with open(os.path.join(folder, f'{i}.svg'), encoding='utf-8') as f:
                    made.append(embed(f.read(), f'{section}{i}'))
            except OSError:
                made.append(f'<p class="bad">gnuplot: {escape(done.stderr.strip()[-300:])}</p>')
        return made


def embed(svg, name):
    """gnuplot's picture as a part of a page: names of its own, and the page's colour of text."""
    svg = svg[svg.index('<svg'):]
    svg = re.sub(r'<title>.*?</title>|<desc>.*?</desc>|<!--.*?-->', '', svg, flags=re.S)
    svg = re.sub(r'\bid=([\'"])', rf'id=\1{name}-', svg)
    svg = re.sub(r'(xlink:href=[\'"]|url\()#', rf'\1#{name}-', svg)
    # It writes fill = "black", stroke='black' and the like; text without either is black, too.
    black = r'([\'"])(black|rgb\(\s*0,\s*0,\s*0\)|#000000)\2'
    svg = re.sub(rf'((?:fill|stroke|color)\s*=\s*){black}', r'\1\2currentColor\2', svg)
    return svg.replace('<svg', '<svg role="img" fill="currentColor"', 1)


def plot_section(title, text, panels):
    if not panels:
        return ''
    figures = ''.join(f'<figure><figcaption>{escape(p.title)}<small>{escape(p.subtitle)}</small></figcaption>{svg}'
                      '</figure>' for p, svg in zip(panels, draw(panels, title[0].lower())))
    return f'<h2>{title}</h2><p class="soft">{text}</p><div class="plots">{figures}</div>'


PLOTS = (
    ('Throughput', 'Thousand requests per second; longer is better. The line on each bar goes from the slowest run to '
     'the fastest.', plots.throughput),
    ('Latency against depth', 'Median in us against the number of requests in flight; the thin line goes up to p99. '
     'Both axes are logarithmic.', plots.latency),
    ('CPU per request', 'Microseconds of CPU time; shorter is better. Dark is user, pale is system time.', plots.cpu),
    ('How late the event loop is', 'Milliseconds, logarithmic: a line from p99 to the longest, with a dot at p99.9. '
     'Grey below it: an idle loop at the same time, which shows what the machine alone does.', plots.stalls),
)


# --- the page ---

def machine_table(document):
    machine = document['machine']
    names = {'cpu_model': 'processor', 'cpus': 'CPUs', 'memory_mib': 'memory, MiB', 'kernel': 'kernel',
             'system_call_us': 'an empty system call takes, us',
             'file_system': 'file system', 'mount_options': 'mount options', 'device': 'device',
             'block_device': 'rows blk-*', 'qemu': 'QEMU', 'fio': 'fio', 'commit': 'commit', 'date': 'date',
             'loop': 'requests are sent from', 'load_before': 'load before'}
    values = dict(machine)
    values['cpus'] = f'{machine["cpus"]}{" (virtual machine)" if machine.get("virtual") else ""}'
    values['qemu'] = '; '.join(f'{side}: {v}' for side, v in (machine.get('qemu') or {}).items() if v)
    values['loop'] = {'main': 'the main loop', 'iothread': 'an IOThread'}.get(machine.get('loop'))
    if machine.get('commit') and machine.get('commit_modified'):
        values['commit'] += ' and changes that were not committed'
    values['load_before'] = ', '.join(str(v) for v in machine.get('load_before') or [])
    rows = ''.join(f'<tr><th scope="row">{name}</th><td style="white-space:normal">{escape(values[key])}</td></tr>'
                   for key, name in names.items() if values.get(key))
    return f'<div class="scroll"><table class="machine left"><tbody>{rows}</tbody></table></div>'


def reproduce(document):
    options = document.get('options', {})
    command = ['scripts/bench']
    rows = options.get('rows')
    if options.get('quick'):
        command.append('--quick')
    if rows and set(rows) != set(QUICK if options.get('quick') else ROWS):
        command += ['--rows', ','.join(rows)]
    if options.get('subjects') and set(options['subjects']) != set(SUBJECTS):
        command += ['--subjects', ','.join(options['subjects'])]
    if options.get('runs', 5) != 5:
        command += ['--runs', str(options['runs'])]
    if options.get('seconds') not in (None, 0.4 if options.get('quick') else 1):
        command += ['--seconds', f'{options["seconds"]:g}']
    if document['machine'].get('loop') == 'main':
        command.append('--main-loop')
    if document['machine'].get('block_device') == 'given':
        command += ['--device', 'BLK']
    command += ['--json', 'report.json', '--html', 'report.html']
    checkout = f'git checkout {document["machine"]["commit"]}\n' if document['machine'].get('commit') else ''
    return f'<pre>{escape(checkout + " ".join(command))}</pre>'


def page(document):
    rows = by_row(document)
    subjects = report.Table(document).subjects
    legend = ''.join(f'<li><i style="background:{plots.COLOURS[s]}"></i>{s}</li>' for s in subjects)
    remarks = ''.join(f'<li>{escape(r)}</li>' for r in report.remarks(document))
    unfinished = '' if document.get('complete', True) else \
        '<p class="bad">This run was interrupted: rows are missing.</p>'
    body = f'''<h1>QEMU {escape(document["base"])} with raw-posix-aio, beside the same QEMU without it</h1>
<p class="meta">{escape((document["machine"].get("date") or "")[:10])} &middot;
{escape(report.machine_lines(document))}</p>
{unfinished}<p class="summary">{summary(rows)}</p>
<ul class="legend">{legend}</ul>
<h2>Time per request</h2>
<p class="soft">Median in us (k: thousand, M: million); smaller is better. Below it how many times faster than
stock-threads (<span class="ratio">&#9650;</span> faster, <span class="ratio">&#9660;</span> slower, &asymp; undecided),
and the interval. Below stock-threads: the fastest and the slowest run. {escape(report.legend(document))}</p>
{table(rows, subjects, time_cell)}
{''.join(plot_section(title, text, make(rows, subjects)) for title, text, make in PLOTS)}
<h2>What some rows are about</h2>
{figure_table(rows, subjects)}
<h2>CPU and context switches per request</h2>
<p class="soft">CPU time in us; below it the context switches. fio counts its own thread only: where others
work for it, there is no figure.</p>
{table(rows, subjects, cost_cell)}
<h2>Refused, crashed, hung, noisy</h2>
<ul class="notes">{remarks or "<li>nothing</li>"}</ul>
<h2>The machine</h2>
{machine_table(document)}
<h2>Again</h2>
{reproduce(document)}
'''
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width, initial-scale=1"><title>raw-posix-aio beside stock QEMU '
            f'{escape(document["base"])}</title><style>{STYLE}</style></head><body>\n{body}</body></html>\n')
