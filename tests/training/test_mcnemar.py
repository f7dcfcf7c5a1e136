"""McNemar's test, its interval and Holm's correction, against published results and calculations by hand."""

import itertools
import math
import random

import numpy as np
import pytest
from scipy.stats import binom

from cnn_jax.training.mcnemar import PairedCounts, holm

CAVO = PairedCounts(both=59, only_first=6, only_second=16, neither=80)
"""Complete responses before and after consolidation therapy (Cavo et al., Blood 120, 2012).

The results below are those in the tests of the R package contingencytables, which accompanies the book "Statistical
Analysis of Contingency Tables" (Fagerland, Lydersen and Laake, 2017).
"""


def test_published_results():
    assert f"{CAVO.p_value:.6f}" == "0.052479"
    assert f"{CAVO.difference:.4f}" == "-0.0621"
    assert [f"{limit:.4f}" for limit in CAVO.interval] == ["-0.1195", "-0.0032"]


def test_the_p_value_by_hand():
    """At most 1 of 8 heads, or at most 1 tail: 2 (1 + 8) / 2**8."""
    assert PairedCounts(1, 1, 7, 12).p_value == pytest.approx(18 / 256)
    assert PairedCounts(1, 7, 1, 12).p_value == pytest.approx(18 / 256)


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (0, 1), (5, 5), (3, 9), (400, 300)])
def test_the_p_value_is_twice_the_smaller_tail(only_first, only_second):
    tail = binom.cdf(min(only_first, only_second), only_first + only_second, 0.5)
    assert PairedCounts(10, only_first, only_second, 4).p_value == pytest.approx(min(1, 2 * tail))


def test_counting():
    first = np.array([1, 1, 1, 0, 0, 0, 0, 1, 0, 0], bool)
    second = np.array([1, 1, 0, 1, 1, 1, 0, 0, 0, 0], bool)
    counts = PairedCounts.of(first, second)
    assert counts == PairedCounts(both=2, only_first=2, only_second=3, neither=3)
    assert len(counts) == 10
    assert counts.accuracies == (0.4, 0.5) == (first.mean(), second.mean())
    assert counts.difference == pytest.approx(-0.1)


def test_swapping_the_networks_changes_signs_only():
    swapped = PairedCounts(59, 16, 6, 80)
    assert swapped.p_value == CAVO.p_value
    assert swapped.interval == pytest.approx((-CAVO.interval[1], -CAVO.interval[0]))


@pytest.mark.parametrize("counts", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 0, 5000), (0, 300, 0, 0), (7, 1, 1, 1)])
def test_the_interval_of_any_counts_contains_the_difference(counts):
    counts = PairedCounts(*counts)
    low, high = counts.interval
    assert -1 <= low <= counts.difference <= high <= 1
    assert low < high


def test_the_interval_covers_the_true_difference_in_95_of_100_samples():
    rng = np.random.default_rng(0)
    samples = rng.multinomial(200, (0.8, 0.08, 0.04, 0.08), size=2000)
    intervals = [PairedCounts(*map(int, sample)).interval for sample in samples]
    assert np.mean([low <= 0.04 <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.015)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # Wikipedia's example
    assert holm([0.5, 0.6]) == [1, 1]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_holm_rejects_what_the_step_down_procedure_rejects():
    """Holm's procedure as published: go through the ordered p-values until one is above alpha / (m - k)."""
    rng = random.Random(0)
    for _, alpha in itertools.product(range(50), (0.01, 0.05, 0.3)):
        p_values = [10 ** rng.uniform(-4, 0) for _ in range(rng.randint(1, 8))]
        rejected = set()
        for k, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
            if p_values[index] > alpha / (len(p_values) - k):
                break
            rejected.add(index)
        assert {index for index, p in enumerate(holm(p_values)) if p <= alpha} == rejected


def test_equal_networks():
    same = PairedCounts(90, 0, 0, 10)
    assert (same.p_value, same.difference) == (1, 0)
    assert same.interval == pytest.approx((-same.interval[1], same.interval[1]))
    assert same.interval[1] == pytest.approx(1.959964 * math.sqrt(2 / 102 / 102))
