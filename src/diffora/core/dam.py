"""The Differential Adaptation Matrix: relaxation (eq. 11), discretisation (eq. 14) and what a selection costs."""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction

import torch
from torch import Tensor

DRAWS = 20_000
"""Of which `draw_of_same_size` takes the first that fits exactly."""


def relax(gamma: Tensor) -> Tensor:
    """Eq. 11: softmax over each layer's row. ``gamma`` and the result are L x N; every row sums to 1."""
    return torch.softmax(gamma, dim=-1)


def entropy(gamma_bar: Tensor) -> Tensor:
    """Entropy of each row in nats, shape (L,): log N where the search has told nothing, 0 where it is certain."""
    return -torch.xlogy(gamma_bar, gamma_bar).sum(dim=-1)


def modules_per_layer(rho: float, n_types: int) -> int:
    """K = floor(rho * N), computed exactly from the decimal that was written: 0.29 * 100 is 29.

    With the L N candidates of the whole grid for N it is the number that ``method.scope=global`` selects.

    Raises:
        ValueError: rho is outside [0, 1].
    """
    if not 0 <= rho <= 1:
        raise ValueError(f"rho={rho} must lie in [0, 1]")
    return int(Fraction(Decimal(str(rho))) * n_types)


def discretise(gamma_bar: Tensor, k: int) -> Tensor:
    """Eq. 14: the K largest entries of each row become True. Exactly K, also when entries tie.

    Of equal entries the lowest column wins, with a warning, since a tie at the threshold means that the search did
    not tell these modules apart.

    Args:
        gamma_bar: L x N.
        k: modules per layer, 0 to N.

    Returns:
        Boolean L x N with exactly ``k`` True entries in each row.
    """
    n_types = gamma_bar.shape[-1]
    if not 0 <= k <= n_types:
        raise ValueError(f"k={k} must lie between 0 and the {n_types} candidates of a layer")
    values, columns = gamma_bar.sort(dim=-1, descending=True, stable=True)
    if 0 < k < n_types:
        tied = (values[:, k - 1] == values[:, k]).nonzero().flatten().tolist()
        if tied:
            warnings.warn(
                f"the search does not separate the top {k} modules in layer(s) {', '.join(map(str, tied))}: "
                "equal entries, taken in column order",
                stacklevel=2,
            )
    selected = torch.zeros_like(gamma_bar, dtype=torch.bool)
    return selected.scatter(-1, columns[:, :k], True)


def discretise_globally(scores: Tensor, m: int) -> Tensor:
    """The M largest entries of the whole grid become True, exactly M; of equal entries the first in row-major order.

    Warns of a tie at the threshold as `discretise` does.

    Args:
        scores: L x N.
        m: modules in all, 0 to L N.

    Returns:
        Boolean L x N with exactly ``m`` True entries.
    """
    n = scores.numel()
    if not 0 <= m <= n:
        raise ValueError(f"m={m} must lie between 0 and the {n} candidates of the grid")
    values, order = scores.flatten().sort(descending=True, stable=True)
    if 0 < m < n and values[m - 1] == values[m]:
        warnings.warn(
            f"the scores do not separate the top {m} modules of the grid: equal entries, taken in row-major order",
            stacklevel=2,
        )
    return torch.zeros(n, dtype=torch.bool).scatter(0, order[:m].cpu(), True).view(scores.shape)


def adapter_parameters(
    shapes: Sequence[Sequence[tuple[int, int]]], selected: Tensor, rank: int, shared_rank: int | None
) -> int:
    """Adapter parameters of a selection, counted as in [D]: shared pairs once, the head left out.

    Args:
        shapes: L x N pairs (in_features, out_features).
        selected: boolean L x N.
        rank: r of the selected modules.
        shared_rank: r_s of the pair shared by the unselected modules of one type and shape; None where these are
            frozen.
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


def draw_of_same_size(
    shapes: Sequence[Sequence[tuple[int, int]]],
    mask: Tensor,
    scope: str,
    rank: int,
    shared_rank: int | None,
    seed: int,
) -> Tensor | None:
    """A selection by chance of as many adapter parameters as ``mask`` has; None where there is none but ``mask``.

    Each selection of exactly that size, with as many modules (scope ``layer``: in each layer), is equally likely. Where
    none is found, as for a type that is selected in all layers and so has no shared pair, modules change places with
    those of their own size only: their adapters are of the same size together, and only shared pairs may differ.

    Args:
        shapes: L x N pairs (in_features, out_features).
        mask: boolean L x N.
        scope: ``layer`` or ``global``.
        rank: r of the selected modules.
        shared_rank: r_s of the pairs that the others share; None where these are frozen.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = mask if scope == "layer" else mask.view(1, -1)

    def shuffled(flags: Tensor) -> Tensor:
        return flags.gather(-1, torch.rand(flags.shape, generator=generator).argsort(dim=-1))

    wanted = adapter_parameters(shapes, mask, rank, shared_rank)
    for _ in range(DRAWS):
        drawn = shuffled(rows).view(mask.shape)
        if adapter_parameters(shapes, drawn, rank, shared_rank) == wanted and not drawn.equal(mask):
            return drawn
    sizes = torch.tensor([[sum(shape) for shape in row] for row in shapes]).view(rows.shape)
    alike = [(row, sizes[row] == size) for row in range(len(rows)) for size in set(sizes[row].tolist())]
    if all(rows[place].all() or not rows[place].any() for place in alike):
        return None
    drawn = mask
    while drawn.equal(mask):
        drawn = rows.clone()
        for place in alike:
            drawn[place] = shuffled(rows[place])
        drawn = drawn.view(mask.shape)
    return drawn


def largest_rank(
    shapes: Sequence[Sequence[tuple[int, int]]], selected: Tensor, shared_rank: int | None, budget: int
) -> int | None:
    """The largest rank of the selected modules whose `adapter_parameters` stay within ``budget``.

    None where nothing is selected, so that nothing has a rank; 0 where the budget does not reach for rank 1.
    """
    shared = adapter_parameters(shapes, selected, 0, shared_rank)
    of_rank_1 = adapter_parameters(shapes, selected, 1, None)
    return max(0, (budget - shared) // of_rank_1) if of_rank_1 else None


def largest_prefix(
    shapes: Sequence[Sequence[tuple[int, int]]], scores: Tensor, rank: int, shared_rank: int | None, budget: int
) -> int | None:
    """How many of the highest-scoring modules of the grid can be selected within ``budget``; None: not even none.

    Every size is looked at: a shared pair goes once its type is selected everywhere, so the count may fall.

    Args:
        scores: L x N; equal ones count in row-major order, as in `discretise_globally`.
    """
    order = scores.flatten().argsort(descending=True, stable=True).cpu()
    for m in range(len(order), -1, -1):
        selected = torch.zeros(len(order), dtype=torch.bool).scatter(0, order[:m], True).view(scores.shape)
        if adapter_parameters(shapes, selected, rank, shared_rank) <= budget:
            return m
    return None


def extreme_adapter_parameters(
    shapes: Sequence[Sequence[tuple[int, int]]], rank: int, shared_rank: int | None
) -> tuple[list[int], list[int]]:
    """The least and the most `adapter_parameters` of any selection of m modules of the grid, for m = 0 to L N.

    Exact, by dynamic programming over groups of one type and shape: with n of its L modules selected, a group costs
    n own pairs, and the shared one while n < L. For K modules in each layer take ``m = K L``: exact where the layers
    are alike (columns may then be filled in any numbers that sum to K L), and otherwise still bounds.
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


def expected_adapter_parameters(
    shapes: Sequence[Sequence[tuple[int, int]]], k: int, rank: int, shared_rank: int | None
) -> int:
    """Mean of `adapter_parameters` over all selections of K modules a layer, each equally likely, rounded."""
    share = Fraction(k, len(shapes[0]))
    # A shared pair exists unless its type is selected in every layer.
    return _expected(shapes, share, lambda n: share**n, rank, shared_rank)


def expected_globally(shapes: Sequence[Sequence[tuple[int, int]]], m: int, rank: int, shared_rank: int | None) -> int:
    """Mean of `adapter_parameters` over all selections of M modules of the grid, each equally likely, rounded."""
    n_modules = len(shapes) * len(shapes[0])

    def all_selected(n: int) -> Fraction:
        return Fraction(math.comb(n_modules - n, m - n), math.comb(n_modules, m)) if m >= n else Fraction(0)

    return _expected(shapes, Fraction(m, n_modules), all_selected, rank, shared_rank)


def _expected(
    shapes: Sequence[Sequence[tuple[int, int]]],
    share: Fraction,
    all_selected: Callable[[int], Fraction],
    rank: int,
    shared_rank: int | None,
) -> int:
    """From the chance that a module is selected, and that the ``n`` modules of a group all are."""
    total = Fraction(0)
    for (_, shape), n in _groups(shapes).items():
        total += (share * n * rank + (1 - all_selected(n)) * (shared_rank or 0)) * sum(shape)
    return round(total)


def _groups(shapes: Sequence[Sequence[tuple[int, int]]]) -> Counter[tuple[int, tuple[int, int]]]:
    """How many modules there are of each (type, shape): those that would share one pair."""
    return Counter(key for row in shapes for key in enumerate(row))
