"""Permutation tests against scipy, against by-hand enumeration, and on choices whose truth is known."""

import itertools

import numpy as np
import pytest
from scipy import stats

from diffora.report import permutation
from diffora.report.permutation import (
    Permuted,
    choices_track_worth,
    correlation,
    every_order,
    label_orders,
    over_tasks,
    percentiles,
    picks_stand_out,
    ranks,
    scores_rank_masks,
    spearman,
)


def every_subset(n, k):
    return np.array([[i in chosen for i in range(n)] for chosen in itertools.combinations(range(n), k)])


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_ranks_and_spearman_are_those_of_scipy_also_with_ties(rng):
    values, other = rng.integers(0, 5, (4, 12)), rng.normal(size=(4, 12))
    assert np.array_equal(ranks(values), stats.rankdata(values, axis=-1))
    want = [stats.spearmanr(a, b).statistic for a, b in zip(values, other, strict=True)]
    assert spearman(values, other) == pytest.approx(want)
    assert np.isnan(spearman(np.ones(5), np.arange(5)))


def test_the_p_value_of_a_correlation_is_that_of_scipys_permutation_test(rng):
    x = rng.normal(size=6)
    y = x + rng.normal(size=6)

    def statistic(a):
        return stats.spearmanr(a, y).statistic

    want = stats.permutation_test((x,), statistic, permutation_type="pairings", alternative="greater", n_resamples=1e6)
    found = correlation(x, y)
    assert found.exact and found.value == pytest.approx(want.statistic) and found.p == pytest.approx(want.pvalue)
    long = correlation(np.arange(30), np.arange(30))
    assert not long.exact and long.value == pytest.approx(1) and long.p == 1 / (permutation.DRAWS + 1)


def test_choices_are_tested_by_every_order_of_the_modules_labels(rng):
    subsets, worth = every_subset(6, 3), rng.normal(size=20)
    chosen = subsets[[3, 3, 11]]
    at = dict(zip(map(bytes, subsets), stats.rankdata(worth), strict=True))
    score = [sum(at[bytes(np.ascontiguousarray(c[list(o)]))] for c in chosen) for o in itertools.permutations(range(6))]
    found = choices_track_worth(chosen, subsets, worth, [0] * 6)
    assert found.exact
    assert found.p == pytest.approx(np.mean([s >= score[0] - 1e-9 for s in score]))
    assert found.p_worse == pytest.approx(np.mean([s <= score[0] + 1e-9 for s in score]))
    assert found.mean == pytest.approx(50) and found.value == pytest.approx(100 * (score[0] / 3 - 0.5) / 20)


def test_many_seeds_with_one_choice_are_one_choice(rng):
    subsets, worth = every_subset(6, 3), rng.permutation(20)
    second = subsets[np.argsort(worth)[[-2]]]
    one, ten = (choices_track_worth(np.repeat(second, n, 0), subsets, worth, [0] * 6) for n in (1, 10))
    assert one.p == ten.p == pytest.approx(2 / 20)


def test_within_a_group_only_its_members_change_places(rng):
    subsets, worth = every_subset(4, 2), [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    size = np.array([1, 1, 1, 2])
    found = choices_track_worth(subsets[[5]], subsets, worth, size, subsets @ size)  # the best of the three with d
    assert found.p == pytest.approx(1 / 3) and found.value == pytest.approx(100 * 2.5 / 3)
    orders, exact = every_order([7, 3, 7, 3])
    assert exact and sorted(map(tuple, orders)) == [(0, 1, 2, 3), (0, 3, 2, 1), (2, 1, 0, 3), (2, 3, 0, 1)]


def test_p_is_uniform_for_a_selector_that_knows_nothing_and_always_chooses_alike(rng):
    """The t-interval over these ten seeds would exclude 50 nearly always."""
    subsets = every_subset(6, 3)
    p = [
        choices_track_worth(subsets[[i] * 9 + [j]], subsets, rng.normal(size=20), [0] * 6).p
        for i, j in rng.integers(0, 20, (200, 2))
    ]
    assert 0.01 <= np.mean(np.array(p) <= 0.05) <= 0.09 and 0.4 < np.mean(p) < 0.6


def test_a_choice_outside_the_subsets_is_refused():
    subsets = every_subset(4, 2)
    with pytest.raises(ValueError, match="not among the subsets"):
        choices_track_worth([[True, True, True, False]], subsets, range(6), [0] * 4)
    with pytest.raises(ValueError, match="not among the subsets"):
        choices_track_worth(subsets[:1], subsets[:3], range(3), [0] * 4)
    with pytest.raises(ValueError, match="63 modules"):
        choices_track_worth(np.ones((1, 63)), np.ones((1, 63)), [1.0], [0] * 63)


def test_shuffles_are_used_where_there_are_too_many_orders(monkeypatch, rng):
    subsets, worth = every_subset(6, 3), rng.normal(size=20)
    exact = choices_track_worth(subsets[:2], subsets, worth, [0] * 6)
    monkeypatch.setattr(permutation, "ALL", 10)
    sampled = choices_track_worth(subsets[:2], subsets, worth, [0] * 6)
    assert exact.exact and not sampled.exact and sampled.p == pytest.approx(exact.p, abs=0.02)


def test_percentiles_have_mean_fifty_and_split_ties():
    assert percentiles([1, 1, 1, 2, 3, 3]).mean() == pytest.approx(50)
    assert list(percentiles([1, 2, 5, 4], [0, 0, 1, 1])) == [25, 75, 75, 25]


def test_picks_are_compared_with_every_other_pick_of_their_strata(monkeypatch):
    strata, picked = [[3.0, 1.0, 2.0], [5.0, 5.0, 4.0]], [0, 0]
    found = picks_stand_out(strata, picked)
    sums = [a + b for a in (100, 0, 50) for b in (75, 75, 0)]
    assert found.exact and found.value == pytest.approx(87.5) and found.p == pytest.approx(2 / 9)
    assert found.mean == pytest.approx(np.mean(sums) / 2)
    monkeypatch.setattr(permutation, "ALL", 1)
    assert picks_stand_out(strata, picked).p == pytest.approx(2 / 9, abs=0.02)


def test_additive_scores_are_ranked_with_new_labels(rng):
    masks, scores, worth = rng.integers(0, 2, (12, 5)), rng.normal(size=5), rng.normal(size=12)
    orders = label_orders([0] * 5, draws=6)
    want = [stats.spearmanr(masks @ scores[order], worth).statistic for order in orders]
    assert scores_rank_masks(masks, scores, worth, orders) == pytest.approx(want)


def test_equal_scores_tie_whatever_the_rounding_of_their_sums(rng):
    masks = np.array([[i in c for i in range(8)] for c in itertools.combinations(range(8), 4)])
    orders = label_orders([0] * 8, draws=50)
    found = scores_rank_masks(masks, np.full(8, 0.1), rng.normal(size=len(masks)), orders)
    assert np.isnan(found).all()  # all masks have four modules and so the same score
    two = np.array([[1, 1, 0], [0, 0, 1]])
    assert 0.1 + 0.2 != 0.3 and np.isnan(scores_rank_masks(two, np.array([0.1, 0.2, 0.3]), [0, 1], np.arange(3)[None]))


def test_modules_change_places_within_their_group_only():
    groups = [2, 0, 2, 0, 0]
    orders = label_orders(groups, draws=300)
    assert (np.array(groups)[orders] == groups).all() and (np.sort(orders) == np.arange(5)).all()
    assert len(np.unique(orders, axis=0)) == 12


def test_one_coincidence_on_several_tasks_counts_once(rng):
    """All tasks have the same worths and scores, so five tasks know as much as one."""
    masks, scores, worth = rng.random((30, 10)) < 0.5, rng.normal(size=10), rng.normal(size=30)
    orders = label_orders([0] * 10, draws=400)
    value = float(scores_rank_masks(masks, scores, worth, np.arange(10)[None])[0])
    shuffled = scores_rank_masks(masks, scores, worth, orders)
    one, five = over_tasks([value], [shuffled]), over_tasks([value] * 5, [shuffled] * 5)
    assert (five.p, five.value) == pytest.approx((one.p, one.value)) and one.value == pytest.approx(value)
    shuffles = [np.array([0.1, 0.9]), np.array([0.8, -0.2])]
    found, means = over_tasks([0.3, 0.5], shuffles), np.tanh(np.arctanh(shuffles).mean(0))
    assert found.value == pytest.approx(np.tanh(np.arctanh([0.3, 0.5]).mean()))
    assert found.mean == pytest.approx(means.mean())


def test_p_counts_the_observed_order_where_not_all_orders_were_tried():
    found = Permuted.of(3.0, np.array([0.0, 1.0, 2.0]))
    assert found.p == pytest.approx(1 / 4) and found.p_worse == 1 and not found.exact
    assert Permuted.of(2.0, np.array([0.0, 1.0, 2.0]), exact=True).p == pytest.approx(1 / 3)


def test_the_lowest_possible_p_is_that_of_the_highest_shuffle():
    assert Permuted.of(0.0, np.array([0.0, 1.0, 2.0, 2.0]), exact=True).p_least == pytest.approx(2 / 4)
    assert Permuted.of(0.0, np.array([0.0, 1.0, 2.0, 2.0])).p_least == pytest.approx(1 / 5)


def test_a_detectable_value_is_as_far_from_the_shuffles_as_80_percent_power_needs():
    """Shuffles of mean 1 and standard deviation 1: a true value of this size is above their 95 % point in 80 %."""
    found = Permuted(0.0, 1.0, -0.96, 2.96, 0.5, 0.5, 0.1, False).detectable
    assert stats.norm.sf(1 + stats.norm.ppf(0.95), loc=found) == pytest.approx(0.8, abs=1e-3)


def test_a_value_that_is_not_a_number_has_no_p():
    found = correlation(np.ones(5), np.arange(5))  # no order, no correlation
    assert np.isnan([found.value, found.p, found.p_worse]).all()
