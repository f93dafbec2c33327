"""How many adapter parameters a selection has, and what fits into a budget.

Counted as in [D]: r (in + out) for a selected module; one shared pair of r_s (in + out) for all unselected modules of
one type and shape; the head is not counted. ``shapes`` is always the L x N grid of pairs (in_features, out_features),
as in `Grid.shapes`, None where a layer has no such module; ``shared_rank`` is r_s, or None if unselected modules are
frozen and have no adapter.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Shapes = Sequence[Sequence[tuple[int, int] | None]]


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
            if shape is None:
                continue
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
        scores: L x N, NaN where a layer has no such module; equal scores count in row-major order, as in
            `diffora.core.dam.discretise_globally`.
    """
    known = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf).flatten()
    order = known.argsort(descending=True, stable=True).cpu()
    for m in range(n_modules(shapes), -1, -1):
        selected = torch.zeros(len(order), dtype=torch.bool).scatter(0, order[:m], True).view(scores.shape)
        if adapter_parameters(shapes, selected, rank, shared_rank) <= budget:
            return m
    return None


def above(rows: Sequence[Sequence[T | None]], lowest_layer: int) -> tuple[tuple[T | None, ...], ...]:
    """The same L x N entries (names or shapes), None in all layers below ``lowest_layer``.

    >>> above([["q", "v"], ["q", "v"]], 1)
    ((None, None), ('q', 'v'))
    """
    return tuple(tuple(row) if i >= lowest_layer else (None,) * len(row) for i, row in enumerate(rows))


def extreme_adapter_parameters(shapes: Shapes, rank: int, shared_rank: int | None) -> tuple[list[int], list[int]]:
    """The least and the most `adapter_parameters` of any selection of m modules, two lists over m = 0 to L N.

    Exact, by dynamic programming over groups of one type and shape: with n of its L modules selected, a group costs
    n pairs of rank r, and the shared pair while n < L. For so many modules in each layer: `extremes_by_layer`.
    """
    least, most = [0], [0]
    for (_, shape), layers in _groups(shapes).items():
        count = len(layers)
        cost = [sum(shape) * (rank * n + (shared_rank or 0) * (n < count)) for n in range(count + 1)]
        totals = range(len(least) + count)
        ways = [[(m - n, cost[n]) for n in range(count + 1) if 0 <= m - n < len(least)] for m in totals]
        least, most = (
            [min(least[before] + more for before, more in ways[m]) for m in totals],
            [max(most[before] + more for before, more in ways[m]) for m in totals],
        )
    return least, most


def extremes_by_layer(shapes: Shapes, counts: Sequence[int], rank: int, shared_rank: int | None) -> tuple[int, int]:
    """The least and the most `adapter_parameters` of any selection of so many modules in each layer.

    Exact where layers of different shapes share no pair, and bounds otherwise.

    >>> extremes_by_layer([[(2, 2)], [(9, 9), (9, 9)]], [0, 1], 1, None)
    (18, 18)
    """
    kinds: dict[tuple[object, ...], list[int]] = {}
    for layer, (row, count) in enumerate(zip(shapes, counts, strict=True)):
        kinds.setdefault((count, *row), []).append(layer)
    parts = list(kinds.values())
    kind_of = {layer: i for i, layers in enumerate(parts) for layer in layers}
    if shared_rank and any(len({kind_of[layer] for layer in layers}) > 1 for layers in _groups(shapes).values()):
        parts = [list(range(len(shapes)))]
    least = most = 0
    for layers in parts:
        lists = extreme_adapter_parameters([shapes[layer] for layer in layers], rank, shared_rank)
        m = sum(counts[layer] for layer in layers)
        least, most = least + lists[0][m], most + lists[1][m]
    return least, most


def expected_adapter_parameters(shapes: Shapes, k: int | Sequence[int], rank: int, shared_rank: int | None) -> int:
    """Mean of `adapter_parameters` over all selections of K modules a layer, each equally likely, rounded.

    Args:
        k: modules per layer, or one number for each layer.
    """
    sizes = sizes_of(shapes)
    counts = [k] * len(sizes) if isinstance(k, int) else k
    shares = [Fraction(count, size or 1) for count, size in zip(counts, sizes, strict=True)]
    # A shared pair exists unless its type is selected in every layer.
    return _expected(
        shapes, shares, lambda layers: math.prod((shares[i] for i in layers), start=Fraction(1)), rank, shared_rank
    )


def expected_globally(shapes: Shapes, m: int, rank: int, shared_rank: int | None) -> int:
    """Mean of `adapter_parameters` over all selections of M modules of the grid, each equally likely, rounded."""
    total = n_modules(shapes)

    def all_selected(layers: Sequence[int]) -> Fraction:
        n = len(layers)
        return Fraction(math.comb(total - n, m - n), math.comb(total, m)) if m >= n else Fraction(0)

    return _expected(shapes, [Fraction(m, total)] * len(shapes), all_selected, rank, shared_rank)


def present(rows: Sequence[Sequence[object]]) -> Tensor:
    """Boolean L x N: where a grid has a module. Its entries (shapes or names) are None where it has none."""
    return torch.tensor([[entry is not None for entry in row] for row in rows], dtype=torch.bool)


def n_modules(shapes: Shapes) -> int:
    """The number of modules of a grid."""
    return sum(sizes_of(shapes))


def sizes_of(shapes: Shapes) -> list[int]:
    """The number of modules of each layer."""
    return [sum(shape is not None for shape in row) for row in shapes]


def _expected(
    shapes: Shapes,
    shares: Sequence[Fraction],
    all_selected: Callable[[Sequence[int]], Fraction],
    rank: int,
    shared_rank: int | None,
) -> int:
    """Mean count, rounded.

    Args:
        shares: for each layer, the probability that a module of it is selected.
        all_selected: probability that all modules of a group are selected, by their layers.
    """
    total = Fraction(0)
    for (_, shape), layers in _groups(shapes).items():
        own = sum((shares[i] for i in layers), Fraction(0)) * rank
        total += (own + (1 - all_selected(layers)) * (shared_rank or 0)) * sum(shape)
    return round(total)


def _groups(shapes: Shapes) -> dict[tuple[int, tuple[int, int]], list[int]]:
    """The layers of the modules of each (column, shape). These modules would share one pair."""
    groups: dict[tuple[int, tuple[int, int]], list[int]] = {}
    for layer, row in enumerate(shapes):
        for column, shape in enumerate(row):
            if shape is not None:
                groups.setdefault((column, shape), []).append(layer)
    return groups
