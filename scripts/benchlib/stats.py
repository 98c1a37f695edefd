# SPDX-License-Identifier: GPL-2.0-or-later
"""The arithmetic of the benchmark: medians, ratios of interleaved runs, and what is too noisy to conclude from."""

import math
from statistics import geometric_mean, median

# What a median's interval from order statistics should cover. Five runs give 93.75 % with min..max, and that is the
# usual case: asking for 95 % would leave it without an interval.
COVERAGE = 0.93
# (max - min) / median of one subject's runs, beyond which its median says little
NOISY_SPREAD = 0.5
# upper / lower end of a ratio's interval, beyond which one that holds 1 says nothing at all
WIDE_INTERVAL = 1.5


def summary(values):
    """Median, min and max, or None where there is nothing to sum up."""
    values = [v for v in values if v is not None]
    if not values:
        return None
    return {'median': median(values), 'min': min(values), 'max': max(values)}


def middle(values):
    values = [v for v in values if v is not None]
    return median(values) if values else None


def largest(values):
    return max((v for v in values if v is not None), default=None)


def interval(values):
    """A distribution-free interval for the median: (low, high, coverage).

    The true median lies between the k-th smallest and the k-th largest of n independent values, unless fewer than k
    fell on one side of it: coverage is 1 - 2 * P(Binomial(n, 1/2) < k). Takes the largest k that still covers
    enough, and min..max where none does.
    """
    ordered = sorted(values)
    n = len(ordered)
    k, covered = 1, 1 - 2 / 2 ** n
    missed = 1 / 2 ** n
    for more in range(2, n // 2 + 1):
        missed += math.comb(n, more - 1) / 2 ** n
        if 1 - 2 * missed < COVERAGE:
            break
        k, covered = more, 1 - 2 * missed
    return ordered[k - 1], ordered[-k], covered


def coverage(n):
    """What interval() covers with N values, usually."""
    return interval(range(n))[2]


def ratio(reference, subject):
    """How many times faster SUBJECT is than REFERENCE; both map a round to its time.

    Only runs of the same round are compared: what else the machine did then has hit both.
    """
    pairs = [reference[r] / subject[r] for r in sorted(reference) if subject.get(r) and reference[r]]
    if not pairs:
        return None
    low, high, covered = interval(pairs)
    return {'median': median(pairs), 'low': low, 'high': high, 'coverage': covered, 'pairs': pairs}


def spread(times):
    """(max - min) / median, or None of fewer than two runs."""
    if not times or len(times) < 2 or not median(times):
        return None
    return (max(times) - min(times)) / median(times)


def overall(ours, reference):
    """The geometric mean of how many times faster OURS is, and over how many rows; both map a row to its time."""
    ratios = [reference[row] / ours[row] for row in ours if reference.get(row) and ours[row]]
    return (geometric_mean(ratios), len(ratios)) if ratios else None


def inconclusive(found):
    """Whether a ratio's interval holds 1 and is so wide that either side could be well ahead."""
    return bool(found) and found['low'] < 0.95 and found['high'] > 1.05 and found['high'] / found['low'] > WIDE_INTERVAL
