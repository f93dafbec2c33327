"""`attach` for a `Selection`."""

from typing import Any

from torch import nn

from diffora.backbones.backbone import Backbone
from diffora.core import attach as core
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.standalone.model import unwrapped


def check_selection(selection: Any) -> None:
    """Raise a UserError for anything but a `Selection`, such as the path of its file."""
    if not isinstance(selection, Selection):
        raise UserError(
            f"selection is a {type(selection).__name__}: it must be what diffora.search or select returns, or "
            "Selection.load(path)"
        )


def attach(
    model: nn.Module,
    selection: Selection,
    rank: int | None = None,
    shared_rank: int | None = None,
    alpha: float = 16.0,
    dropout: float = 0.0,
    *,
    freeze: bool = True,
    shared_scale: str = "own",
) -> nn.Module:
    """Give a model the adapters of a selection, in place ([D] Algorithm 1, line 11), and freeze everything else.

    The head is frozen too: ``model.classifier.requires_grad_(True)`` makes it trainable again.

    Args:
        model: the model that the selection was made for, without adapters.
        selection: which modules get a LoRA of their own.
        rank: r of the selected modules. None: the selection's own rank, which it has if a budget chose it.
        shared_rank: r_s of the pairs that the other modules of one type and shape share across layers; None: the
            others stay frozen. Layers below the selection's ``lowest_layer`` stay frozen in any case.
        alpha: updates are scaled by alpha / rank.
        dropout: rate on the input of A while training.
        freeze: False freezes the adapted modules only.
        shared_scale: ``own``: updates of shared pairs are scaled by alpha / shared_rank, so a shared pair of half the
            rank has twice the scale of a selected one; ``same``: by alpha / rank, one scale for all.

    Returns:
        The same model.

    Raises:
        UserError: the model lacks a module of the selection or has adapters, a selected module is part of the head, or
            a number is impossible. The model is then as before.
    """
    check_selection(selection)
    inner = unwrapped(model)
    places = [name for row in selection.places() for name in row if name is not None]
    # No adapter could be saved otherwise.
    Backbone.of(inner).check_outside_head(selection.names() if shared_rank is None else places)
    core.attach(
        inner,
        selection.places(),
        selection.mask(),
        selection.rank if rank is None else rank,  # type: ignore[arg-type]  # None is refused with a message
        shared_rank,
        alpha,
        dropout,
        freeze=freeze,
        shared_scale=shared_scale,
    )
    return model
