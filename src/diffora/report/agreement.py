"""How far the selections of several seeds agree, compared with random selections of the same sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import comb

import numpy as np

from diffora.report.statistics import LEVEL


@dataclass(frozen=True)
class Stability:
    """Agreement of n selections: the mean Jaccard index (modules in common / modules in either) over all pairs.

    Attributes:
        jaccard: the mean index; 1 if all selections are the same.
        chance: its exact expected value for random selections of the same sizes.
        low, high: the central 95 % for such selections.
        p: the share of sets of random selections that agree at least as well; the selections themselves count as one.
        n: number of selections.
    """

    jaccard: float
    chance: float
    low: float
    high: float
    p: float
    n: int


def stability(
    masks: np.ndarray, by_layer: bool, present: np.ndarray | None = None, draws: int = 1000
) -> Stability | None:
    """How far selections agree; None if there is only one.

    Args:
        masks: boolean, selections x L x N. They may have different sizes.
        present: boolean, L x N, which layer has a module of which type; None: every layer has all.
        by_layer: whether random selections keep the size of each layer, or only the size of the whole selection.
        draws: number of random sets of selections, for the interval and p.
    """
    n = len(masks)
    if n < 2:
        return None
    present = np.ones(masks.shape[1:], dtype=bool) if present is None else present
    flat, known = (masks, present) if by_layer else (masks.reshape(n, 1, -1), present.reshape(1, -1))
    keys = np.random.default_rng(0).random((draws, *flat.shape))
    order = (keys + ~known).argsort(-1).argsort(-1)  # ranks of the random numbers, those of missing modules last
    sizes = flat.sum(-1, keepdims=True)
    by_chance = _mean_jaccard((order < sizes).reshape(draws, n, -1))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(by_chance, [tail, 1 - tail])
    found = float(_mean_jaccard(masks.reshape(1, n, -1))[0])
    p = (1 + int((by_chance >= found - 1e-6).sum())) / (1 + draws)
    available = tuple(map(int, known.sum(-1)))
    of_pairs = [
        _chance(available, *sorted((tuple(map(int, a)), tuple(map(int, b)))))
        for a, b in combinations(sizes.squeeze(-1), 2)
    ]
    return Stability(found, float(np.mean(of_pairs)), float(low), float(high), p, n)


@lru_cache(maxsize=4096)
def _chance(available: Sequence[int], first: Sequence[int], second: Sequence[int]) -> float:
    """The exact expected Jaccard index of two random selections.

    The number of modules in common is hypergeometric in each group (a layer, or the whole grid), and the groups are
    independent.

    Args:
        available: number of modules of each group.
        first, second: how many of them each of the two selections has.
    """
    common = np.ones(1)  # probabilities of 0, 1, ... modules in common, so far
    for total, a, b in zip(available, first, second, strict=True):
        here = [comb(a, i) * comb(total - a, b - i) / comb(total, b) for i in range(min(a, b) + 1)]
        common = np.convolve(common, here)
    both, size = np.arange(len(common)), sum(first) + sum(second)
    return float(common @ (both / (size - both))) if size else 1.0


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
