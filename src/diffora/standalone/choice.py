"""From the scores of a search or a selector to a `Selection`, and the checks of ``k`` and ``scope``."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffora.core.dam import comparable, discretise, discretise_globally, provisional_choice
from diffora.core.ensemble import SAME_SCORES, confidence, log_gates, member_seed, standardised
from diffora.core.grid import Grid, blanked
from diffora.core.selection import STANDALONE, Selection
from diffora.settings.checks import SEED
from diffora.standalone.progress import say

log = logging.getLogger("diffora")

SCOPES = ("layer", "global")


def modules_of(k: int | None, n_types: int) -> int:
    """K, if it is given; otherwise half of the types of a layer, rounded down, and at least 1."""
    return max(1, n_types // 2) if k is None else k


def choice_problems(k: int | None, scope: str, grid: Grid, seed: int) -> Iterator[str]:
    """What is wrong with ``k``, ``scope`` and ``seed``."""
    if k is not None and (type(k) is not int or not 1 <= k <= min(grid.sizes)):
        yield f"k={k!r} must be a whole number from 1 to {min(grid.sizes)}, the candidates of a layer"
    if scope not in SCOPES:
        yield f"scope={scope!r} must be one of {', '.join(SCOPES)}"
    if not SEED.fits(seed):
        yield f"seed={seed!r} must be {SEED.words}"


def selection_of(
    grid: Grid,
    values: Tensor,
    k: int | Sequence[int] | None,
    scope: str,
    selector: str,
    seed: int,
    config: dict[str, Any],
    **rest: Any,
) -> Selection:
    """The selection of the modules with the highest values.

    Args:
        values: L x N scores on the CPU, high is good.
        k: modules per layer, or one number for each layer; None for half of those of each layer. With
            ``scope="global"``, as many in all.
        rest: other fields of `Selection`: ``gamma_bar`` or ``scores``.
    """
    counts = _counts(grid, k)
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


def mask_of(grid: Grid, values: Tensor, k: int | Sequence[int] | None, scope: str) -> Tensor:
    """The mask, L x N, of the modules with the highest values; for the arguments see `selection_of`."""
    values, counts = values.masked_fill(~grid.present, float("nan")), _counts(grid, k)
    if scope == "layer":
        return discretise(values, counts)
    return discretise_globally(comparable(values, grid.sizes), sum(counts))


def _counts(grid: Grid, k: int | Sequence[int] | None) -> list[int]:
    return [modules_of(k, size) for size in grid.sizes] if k is None or isinstance(k, int) else list(k)


# --- ensembles ---


def ensemble_problems(ensemble: int, *loaders: Any) -> Iterator[str]:
    """What is wrong with ``ensemble``, and with loaders that can be read only once."""
    if type(ensemble) is not int or not 1 <= ensemble <= 100:
        yield f"ensemble={ensemble!r} must be a whole number from 1 to 100"
    elif ensemble > 1 and (once := [type(loader).__name__ for loader in loaders if isinstance(loader, Iterator)]):
        yield (
            f"ensemble={ensemble} reads each loader {ensemble} times, and a {once[0]} can be read only once: give a "
            "list or a DataLoader"
        )


def member_seeds(seed: int, ensemble: int, progress: bool) -> Iterator[int]:
    """The seed of each member. Says which member begins."""
    for number in range(ensemble):
        own = member_seed(seed, number)
        if ensemble > 1:
            say(progress, [f"ensemble: member {number + 1} of {ensemble}, seed {own}"])
        yield own


def selection_of_members(
    grid: Grid,
    members: Sequence[Tensor],
    k: int | None,
    scope: str,
    selector: str,
    seed: int,
    config: dict[str, Any],
    relaxation: str | None = None,
) -> Selection:
    """The selection of the modules with the highest mean of the members' standardised scores, with its confidence.

    Args:
        members: L x N scores of each member; gates, if there is a ``relaxation``.
        relaxation: how a search relaxed Γ; None for other scores.
    """
    scores = members if relaxation is None else [log_gates(gates, relaxation, grid.sizes) for gates in members]
    stacked = torch.stack([standardised(each, grid.present, scope) for each in scores])
    mean = stacked.mean(0)
    with provisional_choice():
        found = confidence(stacked, lambda repeat: mask_of(grid, repeat, k, scope))
    if found is None:
        log.warning(SAME_SCORES.format(n=len(members), selector=selector))
    seeds = [member_seed(seed, number) for number in range(len(members))]
    config = config | {"members": seeds}
    selection = selection_of(grid, mean, k, scope, selector, seed, config, scores=mean.tolist(), relaxation=relaxation)
    known = None if found is None else blanked(found.tolist(), grid.names)
    return replace(selection, ensemble=len(members), confidence=known)
