"""Verdicts, equivalence, power and variance components, against scipy's functions and simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from diffora.report.statistics import Difference, components, detectable, equivalence, largest_block, paired, verdict


@pytest.fixture
def rng():
    return np.random.default_rng(1)


def difference(values):
    return paired(dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.0))


def test_equivalence_is_the_larger_of_two_one_sided_tests(rng):
    for margin, mean in itertools.product((0.2, 0.5, 2.0), (0.1, -0.6)):
        values = rng.normal(mean, 0.5, 8)
        above = stats.ttest_1samp(values, -margin, alternative="greater").pvalue
        below = stats.ttest_1samp(values, margin, alternative="less").pvalue
        assert equivalence(difference(values), margin) == pytest.approx(max(above, below))
    assert difference(values).error == pytest.approx(stats.sem(values))


def test_verdicts():
    narrow, wide = [0.1, -0.1, 0.05, -0.05, 0.0], [3.0, -3.0, 1.0, -1.0, 0.5]
    assert verdict(difference(narrow), 0.5) == "equivalent" and verdict(difference(narrow)) == "undecided"
    assert verdict(difference(wide), 0.5) == "undecided"
    assert verdict(difference([1.0, 1.1, 0.9]), 5.0) == "better"  # a clear difference, although within the margin
    assert verdict(difference([-1.0, -1.1, -0.9]), 0.5) == "worse"
    assert verdict(difference([1.0]), 0.5) == "no test" and verdict(None, 0.5) == "no test"
    assert verdict(Difference(0.0, -0.1, 0.1, 1.0, 5), 0.11) == "equivalent"
    assert verdict(Difference(0.0, -0.2, 0.2, 1.0, 5), 0.11) == "undecided"
    with pytest.raises(ValueError, match="margin=0"):
        equivalence(Difference(0.0, -0.2, 0.2, 1.0, 5), 0)


@pytest.mark.parametrize("margin", [0.3, 0.8])
def test_a_difference_as_large_as_the_margin_is_called_equivalent_in_at_most_5_percent(rng, margin):
    samples = margin + rng.normal(size=(2000, 10)) * 0.4
    error = samples.std(1, ddof=1) / math.sqrt(10)
    half = stats.t.ppf(0.975, 9) * error
    found = [
        equivalence(Difference(m, m - h, m + h, None, 10), margin) < 0.05
        for m, h in zip(samples.mean(1), half, strict=True)
    ]
    assert 0.03 < np.mean(found) < 0.065


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_the_detectable_difference_is_found_with_80_percent_probability(rng, n):
    samples = detectable(1.7, n) + 1.7 * rng.normal(size=(20_000, n))
    assert np.mean(stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.012)


def test_how_many_seeds_half_a_point_needs():
    assert detectable(1.3, 53) == pytest.approx(0.5, abs=0.015) and detectable(1.0, 1) is None


def landscape(rng, mask, seed, residual, masks=8, seeds=4):
    return (
        rng.normal(0, mask, (masks, 1)) + rng.normal(0, seed, (1, seeds)) + rng.normal(0, residual, (masks, seeds)) + 80
    )


def test_variance_components_are_those_of_the_two_way_table(rng):
    values = landscape(rng, 1.0, 2.0, 0.5)
    found = components(values)
    a, b = values.shape
    grand = values.mean()
    between = b * ((values.mean(1) - grand) ** 2).sum() / (a - 1)
    columns = a * ((values.mean(0) - grand) ** 2).sum() / (b - 1)
    rest = ((values - grand) ** 2).sum() - between * (a - 1) - columns * (b - 1)
    rest /= (a - 1) * (b - 1)
    assert found.f == pytest.approx(between / rest)
    assert found.p == pytest.approx(stats.f.sf(between / rest, a - 1, (a - 1) * (b - 1)))
    assert found.residual == pytest.approx(math.sqrt(rest))
    assert found.mask == pytest.approx(math.sqrt((between - rest) / b))
    assert found.seed == pytest.approx(math.sqrt((columns - rest) / a))
    for bound, share in ((found.low, 0.975), (found.high, 0.025)):
        quantiles = stats.f.ppf(share, a - 1, (a - 1) * (b - 1)), stats.chi2.ppf(share, a - 1)
        assert bound == pytest.approx(math.sqrt((a - 1) * (between - quantiles[0] * rest) / (b * quantiles[1])))
    assert found.low < found.mask < found.high and found.reliability == pytest.approx(1 - rest / between)
    # seeds shift all masks alike, and do not matter
    assert components(values + 100 * rng.normal(size=(1, b))).f == pytest.approx(found.f)


@pytest.mark.parametrize("mask", [0.0, 0.3, 1.0])
def test_intervals_cover_the_true_standard_deviation_and_f_keeps_its_level(rng, mask):
    found = [components(landscape(rng, mask, 1.0, 0.7)) for _ in range(600)]
    assert np.mean([c.low <= mask <= max(c.high, 0.0) for c in found]) > 0.93
    if mask == 0:
        assert np.mean([c.p < 0.05 for c in found]) == pytest.approx(0.05, abs=0.025)


def test_the_detectable_mask_deviation_is_found_with_80_percent_probability(rng):
    first = components(landscape(rng, 0.0, 1.0, 0.7))
    true = first.detectable * 0.7 / first.residual  # at the true residual
    found = [components(landscape(rng, true, 1.0, 0.7)).p < 0.05 for _ in range(1000)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.035)


def test_tables_with_gaps_are_refused():
    values = np.ones((3, 2))
    values[1, 1] = np.nan
    for wrong in (values, np.ones((1, 3)), np.ones((3, 1)), np.ones(4)):
        with pytest.raises(ValueError, match="without gaps"):
            components(wrong)


def test_runs_that_are_all_the_same_have_no_variance():
    found = components(np.full((4, 3), 0.8))
    assert (found.mask, found.low, found.high, found.p, found.reliability) == (0, 0, 0, 1, 0)
    assert components(np.array([[1.0, 1.0], [2.0, 2.0]])).p < 1e-3


def test_the_largest_block_has_the_most_values_without_gaps():
    by_mask = {"a": {0: 1.0, 1: 2.0, 2: 3.0}, "b": {0: 4.0, 1: 5.0}, "c": {0: 6.0, 1: 7.0}, "d": {2: 8.0}}
    masks, seeds, values = largest_block(by_mask)
    assert (masks, seeds, values.tolist()) == (["a", "b", "c"], [0, 1], [[1, 2], [4, 5], [6, 7]])
    assert largest_block({"a": {0: 1.0}, "b": {0: 2.0}}) is None and largest_block({}) is None
    more_seeds = {"a": dict.fromkeys(range(5), 1.0), "b": dict.fromkeys(range(5), 2.0), "c": {0: 3.0, 1: 4.0}}
    masks, seeds, _ = largest_block(more_seeds)  # 2 masks x 5 seeds are more than 3 x 2
    assert (masks, seeds) == (["a", "b"], [0, 1, 2, 3, 4])
