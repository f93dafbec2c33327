"""From scores to a selection: the best of each layer or of the whole grid, within a budget."""

from dataclasses import dataclass
from itertools import compress

from torch import Tensor

from diffora.core.counts import Shapes, above, largest_prefix, largest_rank, n_modules, present, sizes_of
from diffora.core.dam import comparable, discretise, discretise_globally, modules_per_layer


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

    Layers below ``lowest_layer`` get no adapter, not even a shared pair. With scope ``layer``, the other layers keep
    their K. With scope ``global``, floor(rho N L) is counted over the whole grid, and capped at the modules left.

    Args:
        scores: L x N, high is good; for the search the relaxed DAM.
        shapes: L x N pairs (in_features, out_features), None where a layer has no such module.
        shared_rank: r_s of the pairs that unselected modules share; None if they are frozen.
        budget: most adapter parameters, counted as in `diffora.core.counts`.
        lowest_layer: from `diffora.core.steptime.lowest_layer`, for a budget of time.

    Raises:
        ValueError: the budget is too small for any selection.
    """
    scores = scores.masked_fill(~present(shapes).to(scores.device), float("nan"))
    scores[:lowest_layer] = float("nan")
    if scope == "global":
        scores = comparable(scores, sizes_of(shapes))
    wanted = modules_per_layer(rho, n_modules(shapes))
    shapes = above(shapes, lowest_layer)
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
