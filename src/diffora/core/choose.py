"""From scores to a selection: the best of each layer or of the whole grid, within a budget, or by chance."""

from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor

from diffora.core.counts import Shapes, above, adapter_parameters, largest_prefix, largest_rank, n_modules, sizes_of
from diffora.core.dam import comparable, discretise, discretise_globally, modules_per_layer

DRAWS = 20_000
"""How many draws `draw_of_same_size` tries before it swaps modules of one shape only."""


@dataclass(frozen=True)
class Choice:
    """What `choose` decided.

    Attributes:
        mask: boolean L x N, True for a selected module.
        k: modules of each layer from ``lowest_layer`` on; None if these may have different numbers.
        rank: r of the selected modules if the budget chose it, otherwise None.
        rank_at_width: whether the budget allows more than ``rank``, which is then the smallest width of a selected
            module.
    """

    mask: Tensor
    k: int | None = None
    rank: int | None = None
    rank_at_width: bool = False


def choose(
    scores: Tensor,
    shapes: Shapes,
    scope: str,
    rho: float,
    rank: int,
    shared_rank: int | None,
    budget: int | None = None,
    lowest_layer: int = 0,
) -> Choice:
    """Select modules by their scores.

    ==========  =================================  =====================================================
    scope       without a budget                   with a budget
    ==========  =================================  =====================================================
    ``layer``   the best K = floor(rho N) of each  the same modules; the budget chooses their rank
                layer ([D] eq. 14)
    ``global``  the best floor(rho N L) of all     as many of the best as fit at ``rank``; rho is not used
    ==========  =================================  =====================================================

    N is the number of modules of a layer. If it differs, N L is the number of all modules, and ``global`` compares the
    gates of a softmax times N (`diffora.core.dam.comparable`).

    Layers below ``lowest_layer`` get nothing, not even shared pairs. With scope ``layer`` each other layer gets as many
    modules as without it. With scope ``global`` so does the whole grid, as long as enough modules are left.

    Args:
        scores: L x N, high is good; for the search the relaxed DAM.
        shapes: L x N pairs (in_features, out_features), None where a layer has no such module.
        shared_rank: r_s of the pairs that unselected modules share; None if they are frozen.
        budget: most adapter parameters, counted as in `diffora.core.counts`.
        lowest_layer: from `diffora.core.steptime.lowest_layer`, for a budget of time.

    Raises:
        ValueError: the budget is too small for any selection.
    """
    scores = scores.masked_fill(~_present(shapes).to(scores.device), float("nan"))
    if scope == "global":
        scores = comparable(scores, sizes_of(shapes))
    wanted = modules_per_layer(rho, n_modules(shapes))
    shapes = above(shapes, lowest_layer)
    scores[:lowest_layer] = float("nan")
    if scope == "global":
        size: int | None = min(wanted, n_modules(shapes))
        if budget is not None:
            size = largest_prefix(shapes, scores, rank, shared_rank, budget)
        if size is None:
            raise ValueError(f"a budget of {budget} parameters is too small: the shared pairs alone exceed it")
        return Choice(discretise_globally(scores, size))
    counts = [modules_per_layer(rho, size) for size in sizes_of(shapes)]
    mask = discretise(scores, counts)
    own = counts[lowest_layer:]
    k = own[0] if len(set(own)) == 1 else None
    allowed = None if budget is None else largest_rank(shapes, mask, shared_rank, budget)
    if allowed is None:
        return Choice(mask, k)
    if allowed < 1:
        raise ValueError(f"a budget of {budget} parameters is too small: the selected modules exceed it at rank 1")
    chosen = [shape for row, flags in zip(shapes, mask, strict=True) for shape in compress(row, flags)]
    width = min(min(shape) for shape in chosen if shape is not None)
    return Choice(mask, k, min(allowed, width), rank_at_width=allowed > width)


def _present(shapes: Shapes) -> Tensor:
    return torch.tensor([[shape is not None for shape in row] for row in shapes], dtype=torch.bool)


def random_scores(n_layers: int, n_types: int, seed: int) -> Tensor:
    """L x N scores, uniform in [0, 1), for the random selection of [D] Table 3."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n_layers, n_types, generator=generator, dtype=torch.float64)


def draw_of_same_size(
    shapes: Shapes,
    mask: Tensor,
    scope: str,
    rank: int,
    shared_rank: int | None,
    seed: int,
) -> Tensor | None:
    """A random selection with as many adapter parameters as ``mask``; None if no other selection has as many.

    Each selection of exactly that size with as many modules (scope ``layer``: in each layer) is equally likely. If none
    is found in `DRAWS` draws (as for a type that is selected in all layers and so has no shared pair), selected modules
    only change places with modules of their own shape. The selected modules then have the same size in total, and only
    the number of shared pairs may differ.

    Args:
        shapes: L x N pairs (in_features, out_features), None where a layer has no such module.
        mask: boolean L x N.
        scope: ``layer`` or ``global``.
        rank: r of the selected modules.
        shared_rank: r_s of the pairs that unselected modules share; None if they are frozen.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = mask if scope == "layer" else mask.view(1, -1)
    present = _present(shapes).view(rows.shape)

    def shuffled(flags: Tensor) -> Tensor:
        return flags.gather(-1, torch.rand(flags.shape, generator=generator).argsort(dim=-1))

    def drawn_again() -> Tensor:
        if present.all():
            return shuffled(rows)
        drawn = rows.clone()
        for row, places in enumerate(present):
            drawn[row, places] = shuffled(rows[row, places])
        return drawn

    wanted = adapter_parameters(shapes, mask, rank, shared_rank)
    for _ in range(DRAWS):
        drawn = drawn_again().view(mask.shape)
        if adapter_parameters(shapes, drawn, rank, shared_rank) == wanted and not drawn.equal(mask):
            return drawn
    sizes = torch.tensor([[sum(shape or ()) for shape in row] for row in shapes]).view(rows.shape)
    alike = [(row, sizes[row] == size) for row in range(len(rows)) for size in set(sizes[row].tolist()) - {0}]
    if all(rows[place].all() or not rows[place].any() for place in alike):
        return None
    drawn = mask
    while drawn.equal(mask):
        drawn = rows.clone()
        for place in alike:
            drawn[place] = shuffled(rows[place])
        drawn = drawn.view(mask.shape)
    return drawn


def draw_of_same_types(shapes: Shapes, mask: Tensor, seed: int) -> Tensor | None:
    """A random selection with as many modules of each type as ``mask``, in other layers; None if there is no other.

    It is a control for the choice of layers: a selector that is better than these draws found more than good types.

    Args:
        shapes: L x N pairs (in_features, out_features), None where a layer has no such module.
        mask: boolean L x N.
    """
    generator = torch.Generator().manual_seed(seed)
    present = _present(shapes)
    if all(mask[places, column].all() or not mask[places, column].any() for column, places in enumerate(present.T)):
        return None
    drawn = mask
    while drawn.equal(mask):
        drawn = mask.clone()
        for column, places in enumerate(present.T):
            flags = mask[places, column]
            drawn[places, column] = flags[torch.randperm(len(flags), generator=generator)]
    return drawn
