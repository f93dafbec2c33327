"""Permutation tests of selectors: do their choices, or their scores, track what selections are worth?

A selector that knows nothing about the worth would do as well with its labels shuffled. So the labels are shuffled, and
the p-value is the share of shuffles that do at least as well. An interval over seeds cannot test this: the seeds of a
selector make similar choices, so it shows how alike the choices are.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 20_000
"""Number of random shuffles where there are too many to try all of them."""
ALL = 200_000
"""All shuffles are tried if there are at most this many."""
NEAR = 1e-9
"""Statistics that differ by less count as equal."""


@dataclass(frozen=True)
class Permuted:
    """A statistic next to its values for shuffled labels.

    Attributes:
        value: the statistic; high is good.
        mean: its mean over shuffles.
        low, high: the central 95 % of the shuffles.
        p: one-sided p-value of "better than chance": the share of shuffles with at least this value. NaN if the value
            is NaN.
        p_worse: the same for "worse than chance".
        p_least: the lowest p-value that these shuffles allow. If it is not small, the test can show nothing.
        exact: whether all shuffles were tried. Otherwise the observed order counts as one more, so p is above 0.
    """

    value: float
    mean: float
    low: float
    high: float
    p: float
    p_worse: float
    p_least: float
    exact: bool

    @property
    def detectable(self) -> float:
        """The value that this test at 5 % finds with a probability of about 80 %.

        It takes the shuffles as normal, and a selector's value as spread around its true one as shuffles are.
        """
        return self.mean + (1.645 + 0.842) * (self.high - self.low) / (2 * 1.96)

    @classmethod
    def of(cls, value: float, shuffled: np.ndarray, exact: bool = False) -> "Permuted":
        """The test of a value against those of the shuffles."""
        shuffled = np.asarray(shuffled, dtype=float)
        if math.isnan(value):  # no shuffle is at least NaN, so the shares would be near 0
            nan = math.nan
            return cls(nan, nan, nan, nan, nan, nan, nan, exact)
        more = 0 if exact else 1
        above, below = ((shuffled >= value - NEAR).sum() + more, (shuffled <= value + NEAR).sum() + more)
        low, high = np.quantile(shuffled, [0.025, 0.975])
        n = shuffled.size + more
        ends = float(shuffled.mean()), float(low), float(high)
        least = (int((shuffled >= shuffled.max() - NEAR).sum()) if exact else 1) / n
        return cls(value, *ends, float(above / n), float(below / n), least, exact)


def percentiles(worth: Sequence[float], groups: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
    """The percentage of subsets of its group that a subset is better than; equal ones, itself included, count half.

    Args:
        worth: of each subset; high is good.
        groups: the group of each subset, such as its size; None: all are one group.
    """
    values, labels = np.asarray(worth, dtype=float), np.zeros(len(worth)) if groups is None else np.asarray(groups)
    found = np.empty(len(values))
    for label in np.unique(labels):
        here = labels == label
        found[here] = 100 * (ranks(values[here]) - 0.5) / here.sum()
    return found


def choices_track_worth(
    chosen: np.ndarray,
    subsets: np.ndarray,
    worth: Sequence[float],
    labels: Sequence[int] | np.ndarray,
    groups: Sequence[int] | np.ndarray | None = None,
    seed: int = 0,
) -> Permuted:
    """Mean percentile of a selector's choices among all subsets, tested by shuffling the modules' labels.

    The choices of all seeds get the same new labels, so many seeds with one choice count as one choice. Subsets that
    share modules stay related, so their worths are not treated as if they were independent.

    Args:
        chosen: boolean, seeds x modules.
        subsets: boolean, subsets x modules: everything that can be chosen.
        worth: of each subset; high is good.
        labels: modules of one label change places. Modules of one layer, or those of one layer and size.
        groups: the group of each subset, such as its size; the percentiles are then those within the group.
        seed: of the random shuffles, which are used where there are more than `ALL`.

    Raises:
        ValueError: there are more than 62 modules, or a choice with new labels is not among the subsets.
    """
    chosen, subsets = np.atleast_2d(np.asarray(chosen, dtype=bool)), np.asarray(subsets, dtype=bool)
    n_modules = subsets.shape[1]
    if n_modules > 62:
        raise ValueError(f"{n_modules} modules: the subsets of at most 62 modules are supported")
    bits = 2 ** np.arange(n_modules, dtype=np.int64)
    keys = subsets @ bits
    order = keys.argsort()
    sorted_keys, at = keys[order], percentiles(worth, groups)[order]

    def place(masks: np.ndarray) -> np.ndarray:
        wanted = masks @ bits
        found = np.searchsorted(sorted_keys, wanted).clip(max=len(keys) - 1)
        if not (sorted_keys[found] == wanted).all():
            raise ValueError("a choice, or a choice with new labels, is not among the subsets")
        placed: np.ndarray = at[found]
        return placed

    orders, exact = every_order(labels, seed)
    different, counts = np.unique(chosen, axis=0, return_counts=True)
    shuffled = sum(n * place(mask[orders]) for mask, n in zip(different, counts, strict=True)) / len(chosen)
    return Permuted.of(float(place(chosen).mean()), np.asarray(shuffled), exact)


def picks_stand_out(strata: Sequence[Sequence[float]], picked: Sequence[int], seed: int = 0) -> Permuted:
    """Mean percentile of one picked run of each stratum, tested by picking any run of each stratum instead.

    Use it for runs of several seeds, where one run of each seed belongs to a selector and the others are random. The
    test takes picks of different strata as independent. If a selector picks alike with all seeds, that is one
    coincidence rather than several, and the p-value is too small.

    Args:
        strata: values of the runs of each stratum; high is good.
        picked: index of the picked run in each stratum.
        seed: of random picks, which are used where there are more than `ALL`.
    """
    places = [100 * (ranks(np.asarray(values)) - 1) / (len(values) - 1) for values in strata]
    value = float(np.mean([place[i] for place, i in zip(places, picked, strict=True)]))
    if exact := math.prod(map(len, strata)) <= ALL:
        sums = np.zeros(1)
        for place in places:
            sums = np.add.outer(sums, place).ravel()
    else:
        generator = np.random.default_rng(seed)
        sums = np.sum([generator.choice(place, DRAWS) for place in places], axis=0)
    return Permuted.of(value, sums / len(strata), exact)


def every_order(labels: Sequence[int] | np.ndarray, seed: int = 0) -> tuple[np.ndarray, bool]:
    """(orders x modules, whether these are all orders) of modules that change places within their label."""
    array = np.asarray(labels)
    members = [np.flatnonzero(array == label) for label in np.unique(array)]
    if math.prod(math.factorial(len(group)) for group in members) > ALL:
        return label_orders(labels, seed=seed), False
    parts = itertools.product(*(itertools.permutations(group) for group in members))
    flat = np.array([list(itertools.chain(*part)) for part in parts])
    orders = np.empty_like(flat)
    orders[:, np.concatenate(members)] = flat
    return orders, True


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, from 1; equal values have the mean of their ranks."""
    values = np.asarray(values, dtype=float)
    order = values.argsort(-1, kind="stable")
    ordered = np.take_along_axis(values, order, -1)
    n = values.shape[-1]
    starts = np.ones(values.shape, dtype=bool)
    starts[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    ends = np.ones(values.shape, dtype=bool)
    ends[..., :-1] = starts[..., 1:]
    places = np.arange(n)
    first = np.maximum.accumulate(np.where(starts, places, 0), -1)
    last = np.minimum.accumulate(np.where(ends, places, n - 1)[..., ::-1], -1)[..., ::-1]
    found = np.empty(values.shape)
    np.put_along_axis(found, order, (first + last) / 2 + 1, -1)
    return found


def spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation along the last axis (other axes are broadcast); NaN if one side is constant."""
    a, b = (ranks(side) - (np.shape(side)[-1] + 1) / 2 for side in (first, second))
    size = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    found: np.ndarray = np.divide((a * b).sum(-1), size, out=np.full(size.shape, np.nan), where=size > 0)
    return found


def correlation(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Permuted:
    """Spearman's correlation of two lists, tested by shuffling one of them; NaN if one is constant."""
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    orders, exact = every_order([0] * len(a), seed)
    return Permuted.of(float(spearman(a, b)), spearman(a[orders], b), exact)


def label_orders(groups: Sequence[int] | np.ndarray, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Random orders of modules, draws x modules, in which a module changes places within its group only.

    Args:
        groups: the group of each module; the same number for all of them shuffles the whole grid.
    """
    groups = np.asarray(groups)
    generator = np.random.default_rng(seed)
    orders = np.empty((draws, len(groups)), dtype=np.int64)
    for label in np.unique(groups):
        here = np.flatnonzero(groups == label)
        orders[:, here] = here[generator.random((draws, len(here))).argsort(-1)]
    return orders


def scores_rank_masks(masks: np.ndarray, scores: np.ndarray, worth: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """Spearman's correlation of masks' additive scores with their worth, for each order of the modules' labels.

    Args:
        masks: masks x modules, 1 for a selected module.
        scores: of the modules; a mask's additive score is the sum over its modules.
        worth: of the masks; high is good.
        orders: orders x modules; `label_orders`, or one row with 0, 1, … for the scores as they are.

    Returns:
        One correlation for each order; NaN where all masks have the same score.
    """
    sums = np.asarray(scores, dtype=float)[orders] @ np.asarray(masks, dtype=float).T
    largest = np.abs(sums).max(initial=0.0)
    # Sums of the same scores in another order differ by rounding, and must count as equal.
    return spearman(np.round(sums / (largest or 1.0), 10), worth)


def over_tasks(values: Sequence[float], shuffled: Sequence[np.ndarray]) -> Permuted:
    """Correlations of several tasks as one: their mean by Fisher's z, back as a correlation, and its test.

    Use the same orders of labels for all tasks if their grids are the same. A selector may prefer the same modules on
    every task, and the same modules may be worth more on every task; shuffles of each task alone would count that one
    coincidence once for each task.

    Args:
        values: one correlation for each task.
        shuffled: for each task the correlations of the shuffles, all of the same number. NaN counts as 0.
    """
    together = np.tanh(fisher_z(np.nan_to_num(np.array(shuffled))).mean(0))
    return Permuted.of(float(np.tanh(fisher_z(values).mean())), together)


def fisher_z(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Fisher's z of correlations: the scale on which they are averaged. 1 and -1 become large, but finite."""
    z: np.ndarray = np.arctanh(np.clip(np.asarray(values, dtype=float), -0.999999, 0.999999))
    return z
