"""Statistics of repeated runs: mean and spread, differences paired over seeds, agreement of selections."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (None for a single value) of n values."""

    mean: float
    std: float | None
    n: int


def spread(values: Iterable[float]) -> Spread | None:
    """Mean and standard deviation of values; None without values."""
    values = list(values)
    n = len(values)
    if not n:
        return None
    mean = math.fsum(values) / n
    return Spread(mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else None, n)


@dataclass(frozen=True)
class Difference:
    """A mean difference over n pairs with its 95 % interval and p-value by Student's t (paired test, two-sided).

    Interval and p are None for a single pair and if all differences are the same, because t needs their spread.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    n: int


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Mean of ours minus theirs over the seeds that both have; None if they share no seed."""
    seeds = sorted(ours.keys() & theirs.keys())
    found = spread(ours[seed] - theirs[seed] for seed in seeds)
    if found is None:
        return None
    mean, n = found.mean, found.n
    if found.std is None or found.std < 1e-9:
        return Difference(mean, None, None, None, n)
    from scipy.special import stdtr, stdtrit  # Student's t; importing scipy.stats takes a second

    error = found.std / math.sqrt(n)
    half = error * float(stdtrit(n - 1, (1 + LEVEL) / 2))
    return Difference(mean, mean - half, mean + half, float(2 * stdtr(n - 1, -abs(mean) / error)), n)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of several comparisons with Holm's adjustment, in the same order."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


@dataclass(frozen=True)
class Stability:
    """Mean Jaccard index over all pairs of n selections; for chance, its mean and central 95 %."""

    jaccard: float
    chance: float
    low: float
    high: float
    n: int


def stability(
    masks: np.ndarray, by_layer: bool, there: np.ndarray | None = None, draws: int = 1000
) -> Stability | None:
    """How far selections agree, compared with random selections of the same sizes.

    Args:
        masks: boolean, selections x L x N.
        there: boolean, L x N, which layer has a module of which type; None: every layer has all.
        by_layer: whether random selections keep the size of each layer, or only the size of the whole selection.
        draws: number of random sets of selections.
    """
    n = len(masks)
    if n < 2:
        return None
    flat = masks if by_layer else masks.reshape(n, 1, -1)
    keys = np.random.default_rng(0).random((draws, *flat.shape))
    order = keys.argsort(-1)
    if there is not None and not there.all():  # ranks of the random numbers, those of missing modules last
        order = (keys + ~there.reshape(flat.shape[1:])).argsort(-1).argsort(-1)
    drawn = order < flat.sum(-1, keepdims=True)
    by_chance = _mean_jaccard(drawn.reshape(draws, n, -1))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(by_chance, [tail, 1 - tail])
    found = _mean_jaccard(masks.reshape(1, n, -1))
    return Stability(float(found[0]), float(by_chance.mean()), float(low), float(high), n)


def _mean_jaccard(masks: np.ndarray) -> np.ndarray:
    """Mean Jaccard index over all pairs of selections, shape (draws,) from (draws, selections, modules).

    Two empty selections agree: their index is 1.
    """
    flags = masks.astype(np.float32)
    both = flags @ flags.transpose(0, 2, 1)
    sizes = flags.sum(-1)
    either = sizes[:, :, None] + sizes[:, None, :] - both
    index = np.divide(both, either, out=np.ones_like(both), where=either > 0)
    first, second = np.triu_indices(masks.shape[1], 1)
    mean: np.ndarray = index[:, first, second].mean(-1)
    return mean


LARGEST = sys.float_info.max**0.25
"""Largest usable number of a record: squares and sums of squares of larger numbers would overflow."""


def finite(value: object) -> float | None:
    """A number of a record as a float; None for anything else, because a file from others may hold anything."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST:
        return float(value)
    return None
