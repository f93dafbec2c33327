"""A selection within a budget of step time, for a user's own model and loss."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diffora.core.attach import attach, put, taken
from diffora.core.counts import present
from diffora.core.dam import comparable, discretise, discretise_globally
from diffora.core.model import device_of
from diffora.core.selection import Selection
from diffora.core.steptime import lowest_layer, operations
from diffora.errors import UserError
from diffora.standalone.attach import check_selection
from diffora.standalone.batches import Loss, checked, model_loss, moved
from diffora.standalone.model import check_head, left_as_found, unwrapped


def within_time(
    model: nn.Module,
    selection: Selection,
    batch: Any,
    time_budget: float,
    *,
    loss: Loss | None = None,
    rank: int = 8,
    head: Sequence[str] = (),
) -> Selection:
    """The best modules of the upper layers only, so that a training step takes a share of the usual time.

    The backward pass stops below the lowest adapter. The lowest layer is chosen with which a step with LoRA on all
    candidates from this layer on takes at most ``time_budget`` of the operations of a step with LoRA on all candidates.
    From these layers, the modules with the highest scores are selected: as many of each layer as before or, if layers
    have different numbers, as many in all as before, as long as there are enough.

    It computes a few steps on the batch, one for each layer that it tries, and changes nothing in the model.

    Args:
        model: the model that the selection was made for, without adapters.
        selection: what `diffora.search` or `diffora.select` returned, with its scores.
        batch: a batch of the size that training uses.
        time_budget: above 0, at most 1.
        loss: ``loss(model, batch)``, a scalar; None: ``model(**batch).loss``.
        rank: of the adapters; it hardly matters.
        head: names of modules that are trained together with the adapters.

    Returns:
        The new selection. ``lowest_layer`` is the lowest layer with adapters, from 0; ``config["time_budget"]`` has the
        budget and ``share``, the largest share that adapters on these layers can take.

    Raises:
        UserError: the budget is impossible (the message names the least share), the selection has no scores, a name in
            ``head`` is no module, or the model is not the one of the selection or has adapters.
    """
    check_selection(selection)
    scores = selection.gamma_bar if selection.scores is None else selection.scores
    if scores is None:
        raise UserError("this selection has no scores to choose by: make it with diffora.search or diffora.select")
    if not isinstance(time_budget, int | float) or isinstance(time_budget, bool) or not 0 < time_budget <= 1:
        raise UserError(f"time_budget={time_budget!r} must be a number above 0, at most 1")
    model = unwrapped(model)
    check_head(head, model)
    with left_as_found(model, 0):
        lowest, share = _lowest(model, selection, batch, time_budget, loss or model_loss, rank, head)
    values = torch.tensor([[float("nan") if v is None else v for v in row] for row in scores], dtype=torch.float64)
    mask = _best(selection, values.masked_fill(~present(selection.modules), float("nan")), lowest)
    chosen = [[t for t, flag in zip(selection.types, row, strict=True) if flag] for row in mask.tolist()]
    config = selection.config | {"time_budget": {"budget": time_budget, "share": share, "from": "model"}}
    # The confidence was that of the choice without this budget.
    return replace(selection, selected=chosen, lowest_layer=lowest, config=config, confidence=None)


def _lowest(
    model: nn.Module, selection: Selection, batch: Any, budget: float, loss: Loss, rank: int, head: Sequence[str]
) -> tuple[int, float]:
    """The lowest layer within the budget, and its share. Leaves gradients and ``requires_grad`` changed."""
    names = selection.modules
    attach(model, names, torch.ones(len(names), len(selection.types), dtype=torch.bool), rank, None, 1.0)
    everywhere, batch = taken(model), moved(batch, device_of(model))
    for parameter in model.parameters():
        parameter.grad = None  # not added to the user's own gradients, which `left_as_found` keeps
    for name in head:
        model.get_submodule(name).requires_grad_(True)
    model.train()

    def cost(lowest: int) -> int:
        kept = {name for row in names[lowest:] for name in row}
        put(model, {name: layer for name, layer in everywhere.items() if name in kept})
        try:
            return operations(lambda: checked(loss(model, batch), "the batch").backward())
        finally:
            taken(model)

    most = cost(0)
    shares = {0: 1.0}

    def share(lowest: int) -> float:
        shares[lowest] = cost(lowest) / most
        return shares[lowest]

    try:
        lowest = lowest_layer(share, len(names), budget)
    except ValueError as error:
        raise UserError(f"time_budget={budget} is too small: {error}") from None
    return lowest, shares[lowest]


def _best(selection: Selection, values: Tensor, lowest: int) -> Tensor:
    """Boolean L x N: the modules with the highest values from a layer on.

    Args:
        values: L x N, NaN where a layer has no such module.
    """
    if selection.k is not None:
        counts = [min(selection.k, size) if i >= lowest else 0 for i, size in enumerate(selection.sizes())]
        return discretise(values, counts)
    values = comparable(values, selection.sizes())
    values[:lowest] = float("nan")
    return discretise_globally(values, min(len(selection.names()), int((~values.isnan()).sum())))
