"""From the scores of a search or a selector to a `Selection`, and the checks of ``k`` and ``scope``."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from diffora.core.dam import comparable, discretise, discretise_globally
from diffora.core.grid import Grid
from diffora.core.selection import STANDALONE, Selection

SCOPES = ("layer", "global")


def modules_of(k: int | None, n_types: int) -> int:
    """K, if it is given; otherwise half of the types of a layer, rounded down, and at least 1."""
    return max(1, n_types // 2) if k is None else k


def choice_problems(k: int | None, scope: str, grid: Grid) -> Iterator[str]:
    """What is wrong with ``k`` and ``scope``."""
    if k is not None and (type(k) is not int or not 1 <= k <= min(grid.sizes)):
        yield f"k={k!r} must be a whole number from 1 to {min(grid.sizes)}, the candidates of a layer"
    if scope not in SCOPES:
        yield f"scope={scope!r} must be one of {', '.join(SCOPES)}"


def mask_of(grid: Grid, values: Tensor, k: int | None, scope: str) -> Tensor:
    """The mask, L x N, of the modules with the highest values; for the arguments see `selection_of`."""
    counts = [modules_of(k, size) for size in grid.sizes]
    values = values.masked_fill(~grid.there, float("nan"))
    if scope == "layer":
        return discretise(values, counts)
    return discretise_globally(comparable(values, grid.sizes), sum(counts))


def selection_of(
    grid: Grid, values: Tensor, k: int | None, scope: str, selector: str, seed: int, config: dict[str, Any], **rest: Any
) -> Selection:
    """The selection of the modules with the highest values.

    Args:
        values: L x N scores on the CPU, high is good.
        k: modules per layer; None for half of those of each layer. With ``scope="global"``, as many in all.
        rest: other fields of `Selection`: ``gamma_bar`` or ``scores``.
    """
    counts = [modules_of(k, size) for size in grid.sizes]
    return Selection.from_mask(
        grid,
        mask_of(grid, values, k, scope),
        method=STANDALONE,
        selector=selector,
        rho=sum(counts) / grid.n_modules,
        seed=seed,
        k=counts[0] if scope == "layer" and len(set(counts)) == 1 else None,
        config={"scope": scope, "left_out": list(grid.left_out)} | config,
        **rest,
    )
