"""Random scores, and random selections that are as large as a given one."""

import torch
from torch import Tensor

from diffora.core.counts import Shapes, adapter_parameters, present

DRAWS = 20_000
"""How many draws `draw_of_same_size` tries before it swaps modules of one shape only."""


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
    where = present(shapes).view(rows.shape)

    def shuffled(flags: Tensor) -> Tensor:
        return flags.gather(-1, torch.rand(flags.shape, generator=generator).argsort(dim=-1))

    def drawn_again() -> Tensor:
        if where.all():
            return shuffled(rows)
        drawn = rows.clone()
        for row, places in enumerate(where):
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
    where = present(shapes)
    if all(mask[places, column].all() or not mask[places, column].any() for column, places in enumerate(where.T)):
        return None
    drawn = mask
    while drawn.equal(mask):
        drawn = mask.clone()
        for column, places in enumerate(where.T):
            flags = mask[places, column]
            drawn[places, column] = flags[torch.randperm(len(flags), generator=generator)]
    return drawn
