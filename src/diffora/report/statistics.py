"""Statistics of repeated runs: mean and spread, differences paired over seeds and their verdicts, variance components,
agreement of selections. Permutation tests are in `diffora.report.permutation`.
"""

import math
import sys
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar

import numpy as np

LEVEL = 0.95
Mask = TypeVar("Mask", bound=Hashable)
POWER = 0.80
"""The probability with which a smallest detectable difference is found."""


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

    @property
    def error(self) -> float | None:
        """The standard error of the mean, from the interval; None without one."""
        if self.low is None or self.high is None:
            return None
        from scipy.special import stdtrit  # importing scipy.stats takes a second

        return (self.high - self.low) / 2 / float(stdtrit(self.n - 1, (1 + LEVEL) / 2))

    @property
    def detectable(self) -> float | None:
        """The smallest true difference that so many pairs with this spread find with 80 %; None without an interval."""
        error = self.error
        return None if error is None else detectable(error * math.sqrt(self.n), self.n)


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


def equivalence(found: Difference, margin: float) -> float | None:
    """p-value of "the true difference is smaller than the margin in both directions".

    It is the larger one of two one-sided t-tests (TOST: Schuirmann 1987). None without an interval.

    Args:
        margin: largest difference that does not matter, above 0, in the unit of the difference.
    """
    if not margin > 0:
        raise ValueError(f"margin={margin}: the margin of an equivalence test is above 0")
    if (error := found.error) is None:
        return None
    from scipy.special import stdtr

    return float(stdtr(found.n - 1, (abs(found.mean) - margin) / error))


def verdict(found: Difference | None, margin: float | None = None) -> str:
    """What a difference shows, at the 5 % level.

    ==============  ==================================================================================
    ``better``      the 95 % interval is above 0
    ``worse``       the 95 % interval is below 0
    ``equivalent``  neither, and the difference is shown to be smaller than the margin (`equivalence`)
    ``undecided``   none of these: the interval has 0 and differences that matter in it
    ``no test``     there is no interval
    ==============  ==================================================================================

    Args:
        margin: as in `equivalence`; None: do not test for equivalence.
    """
    if found is None or found.low is None or found.high is None:
        return "no test"
    if found.low > 0 or found.high < 0:
        return "better" if found.low > 0 else "worse"
    p = None if margin is None else equivalence(found, margin)
    return "equivalent" if p is not None and p < 1 - LEVEL else "undecided"


def detectable(std: float, n: int) -> float | None:
    """The smallest true difference that a paired t-test at 5 % finds with a probability of 80 %.

    Args:
        std: standard deviation of the differences.
        n: number of pairs; None is returned for fewer than two.
    """
    if n < 2:
        return None
    from scipy.special import nctdtrinc, stdtrit

    # The chance of a significant result on the wrong side is left out; it is below 1e-4.
    noncentral = nctdtrinc(n - 1, 1 - POWER, stdtrit(n - 1, (1 + LEVEL) / 2))
    return float(noncentral) * std / math.sqrt(n)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of several comparisons with Holm's adjustment, in the same order."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


@dataclass(frozen=True)
class Components:
    """Variance components of a complete table of masks x seeds (two-way random effects, one run in each cell).

    Attributes:
        mask: standard deviation of what masks are worth; 0 if its estimate is negative.
        low, high: 95 % interval of ``mask`` (Williams 1962). Both are 0 if masks differ so little that noise alone
            would give less in 2.5 % of tables only.
        seed: standard deviation of what all masks of a seed have in common; 0 if its estimate is negative.
        residual: standard deviation of the rest, which is the noise of a single run.
        f, p: F-test of "all masks are worth the same".
        detectable: the smallest ``mask`` that the F-test at 5 % finds with a probability of 80 %.
        reliability: share of the variance of masks' means that is not noise, 1 - 1 / f; 0 if that is negative.
        masks, seeds: size of the table.
    """

    mask: float
    low: float
    high: float
    seed: float
    residual: float
    f: float
    p: float
    detectable: float
    reliability: float
    masks: int
    seeds: int


def components(values: np.ndarray) -> Components:
    """The variance components of a table without gaps.

    Args:
        values: masks x seeds; `largest_block` makes such a table.

    Raises:
        ValueError: a value is missing, or there are fewer than two masks or seeds.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 2 or min(values.shape) < 2 or not np.isfinite(values).all():
        raise ValueError(f"variance components need a table of at least 2 x 2 without gaps, not {values.shape}")
    a, b = values.shape
    of_mask, of_seed, mean = values.mean(1), values.mean(0), values.mean()
    square_mask = b * of_mask.var(ddof=1)
    square_seed = a * of_seed.var(ddof=1)
    free_mask, free_rest = a - 1, (a - 1) * (b - 1)
    rest = values - of_mask[:, None] - of_seed[None, :] + mean
    square_rest = max(float((rest**2).sum()) / free_rest, 1e-12 * float((values**2).mean()), sys.float_info.min)
    from scipy.special import chdtri, fdtrc, fdtri

    f, tail = float(square_mask) / square_rest, (1 - LEVEL) / 2

    def bound(quantile_f: float, quantile_chi: float) -> float:
        return math.sqrt(max(0.0, free_mask * square_mask * (1 - quantile_f / f) / (b * quantile_chi))) if f else 0.0

    low = bound(float(fdtri(free_mask, free_rest, 1 - tail)), float(chdtri(free_mask, tail)))
    high = bound(float(fdtri(free_mask, free_rest, tail)), float(chdtri(free_mask, 1 - tail)))
    critical, likely = (float(fdtri(free_mask, free_rest, share)) for share in (LEVEL, 1 - POWER))
    return Components(
        mask=math.sqrt(max(0.0, float(square_mask) - square_rest) / b),
        low=low,
        high=high,
        seed=math.sqrt(max(0.0, float(square_seed) - square_rest) / a),
        residual=math.sqrt(square_rest),
        f=f,
        p=float(fdtrc(free_mask, free_rest, f)),
        detectable=math.sqrt(square_rest * (critical / likely - 1) / b),
        reliability=max(0.0, 1 - 1 / f) if f else 0.0,
        masks=a,
        seeds=b,
    )


def largest_block(
    by_mask: Mapping[Mask, Mapping[int, float]],
) -> tuple[list[Mask], list[int], np.ndarray] | None:
    """The part of an incomplete table of masks x seeds that has no gaps and the most values.

    Returns:
        Its masks, its seeds and its values (masks x seeds); None if no two masks have two seeds in common.
    """
    seeds = sorted({seed for values in by_mask.values() for seed in values})
    best: tuple[list[Mask], list[int]] | None = None
    for size in range(2, len(seeds) + 1):
        for part in combinations(seeds, size):
            masks = [mask for mask, values in by_mask.items() if values.keys() >= set(part)]
            if len(masks) > 1 and (best is None or len(masks) * size > len(best[0]) * len(best[1])):
                best = masks, list(part)
    if best is None:
        return None
    return *best, np.array([[by_mask[mask][seed] for seed in best[1]] for mask in best[0]])


LARGEST = sys.float_info.max**0.25
"""Largest usable number of a record: squares and sums of squares of larger numbers would overflow."""


def finite(value: object) -> float | None:
    """A number of a record as a float; None for anything else, because a file from others may hold anything."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST:
        return float(value)
    return None
