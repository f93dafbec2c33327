"""How many adapter parameters a selection has, and what fits into a budget.

Counted as in [D]: r (in + out) for a selected module; one shared pair of r_s (in + out) for all unselected modules of
one type and shape; the head is not counted. ``shapes`` is always the L x N grid of pairs (in_features, out_features),
as in `Grid.shapes`; ``shared_rank`` is r_s, or None if unselected modules are frozen and have no adapter.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor

Shapes = Sequence[Sequence[tuple[int, int]]]


def adapter_parameters(shapes: Shapes, selected: Tensor, rank: int, shared_rank: int | None) -> int:
    """Adapter parameters of one selection.

    Args:
        selected: boolean L x N.
        rank: r of the selected modules.

    Two layers of one 8 x 8 module: the first gets a pair of rank 4, the second uses the shared pair of rank 1.

    >>> import torch
    >>> adapter_parameters([[(8, 8)], [(8, 8)]], torch.tensor([[True], [False]]), rank=4, shared_rank=1)
    80
    """
    total = 0
    shared: set[tuple[int, tuple[int, int]]] = set()
    for row, flags in zip(shapes, selected.tolist(), strict=True):
        for column, (shape, flag) in enumerate(zip(row, flags, strict=True)):
            if flag:
                total += rank * sum(shape)
            else:
                shared.add((column, shape))
    if shared_rank is not None:
        total += sum(shared_rank * sum(shape) for _, shape in shared)
    return total


def largest_rank(shapes: Shapes, selected: Tensor, shared_rank: int | None, budget: int) -> int | None:
    """The largest rank of the selected modules whose `adapter_parameters` stay within ``budget``.

    None if nothing is selected; 0 if the budget is too small for rank 1.
    """
    shared = adapter_parameters(shapes, selected, 0, shared_rank)
    of_rank_1 = adapter_parameters(shapes, selected, 1, None)
    return max(0, (budget - shared) // of_rank_1) if of_rank_1 else None


def largest_prefix(shapes: Shapes, scores: Tensor, rank: int, shared_rank: int | None, budget: int) -> int | None:
    """How many of the highest-scoring modules of the grid fit into ``budget``; None if even zero modules exceed it.

    Tries every size from the largest down, because one module more can cost less: a shared pair is not needed once its
    type is selected in every layer.

    Args:
        scores: L x N; equal scores count in row-major order, as in `diffora.core.dam.discretise_globally`.
    """
    order = scores.flatten().argsort(descending=True, stable=True).cpu()
    for m in range(len(order), -1, -1):
        selected = torch.zeros(len(order), dtype=torch.bool).scatter(0, order[:m], True).view(scores.shape)
        if adapter_parameters(shapes, selected, rank, shared_rank) <= budget:
            return m
    return None


def extreme_adapter_parameters(shapes: Shapes, rank: int, shared_rank: int | None) -> tuple[list[int], list[int]]:
    """The least and the most `adapter_parameters` of any selection of m modules, two lists over m = 0 to L N.

    Exact, by dynamic programming over groups of one type and shape: with n of its L modules selected, a group costs
    n pairs of rank r, and the shared pair while n < L. For K modules in each layer read the lists at ``m = K L``: the
    values are exact if all layers have the same shapes, and bounds otherwise.
    """
    least, most = [0], [0]
    for (_, shape), count in _groups(shapes).items():
        cost = [sum(shape) * (rank * n + (shared_rank or 0) * (n < count)) for n in range(count + 1)]
        totals = range(len(least) + count)
        ways = [[(m - n, cost[n]) for n in range(count + 1) if 0 <= m - n < len(least)] for m in totals]
        least, most = (
            [min(least[before] + more for before, more in ways[m]) for m in totals],
            [max(most[before] + more for before, more in ways[m]) for m in totals],
        )
    return least, most


def expected_adapter_parameters(shapes: Shapes, k: int, rank: int, shared_rank: int | None) -> int:
    """Mean of `adapter_parameters` over all selections of K modules a layer, each equally likely, rounded."""
    share = Fraction(k, len(shapes[0]))
    # A shared pair exists unless its type is selected in every layer.
    return _expected(shapes, share, lambda n: share**n, rank, shared_rank)


def expected_globally(shapes: Shapes, m: int, rank: int, shared_rank: int | None) -> int:
    """Mean of `adapter_parameters` over all selections of M modules of the grid, each equally likely, rounded."""
    n_modules = len(shapes) * len(shapes[0])

    def all_selected(n: int) -> Fraction:
        return Fraction(math.comb(n_modules - n, m - n), math.comb(n_modules, m)) if m >= n else Fraction(0)

    return _expected(shapes, Fraction(m, n_modules), all_selected, rank, shared_rank)


def _expected(
    shapes: Shapes, share: Fraction, all_selected: Callable[[int], Fraction], rank: int, shared_rank: int | None
) -> int:
    """Mean count, rounded.

    Args:
        share: probability that a module is selected.
        all_selected: probability that all ``n`` modules of a group are selected.
    """
    total = Fraction(0)
    for (_, shape), n in _groups(shapes).items():
        total += (share * n * rank + (1 - all_selected(n)) * (shared_rank or 0)) * sum(shape)
    return round(total)


def _groups(shapes: Shapes) -> Counter[tuple[int, tuple[int, int]]]:
    """The number of modules of each (column, shape): the modules that would share one pair."""
    return Counter(key for row in shapes for key in enumerate(row))
