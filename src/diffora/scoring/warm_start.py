"""``method.warm_start``: saves the A and B at the end of a search, and loads them into the adapters."""

import itertools
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from diffora.core.grid import Grid
from diffora.core.lowrank import lowrank_layers
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.files import atomic


def weights_file(selection: Path) -> Path:
    """The file with the A and B of the search that made a selection file. It is next to that file."""
    return selection.with_suffix(".safetensors")


def save_weights(weights: Mapping[str, Tensor], file: Path) -> None:
    """Write `diffora.scoring.context.SearchResult.weights`."""
    from safetensors.torch import save_file

    with atomic(file) as scratch:
        save_file(dict(weights), scratch)


def load_weights(file: Path) -> dict[str, Tensor]:
    """Read what `save_weights` wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    from safetensors.torch import load_file

    if not file.is_file():
        raise UserError(f"method.warm_start=true needs {file}, which a search with method.warm_start=true leaves")
    try:
        return load_file(file)
    except Exception as error:  # safetensors' own errors have no public base class
        raise UserError(f"method.warm_start=true: {file} is damaged: {error}") from error


def warm_start(model: nn.Module, grid: Grid, selection: Selection, weights: Mapping[str, Tensor], origin: Path) -> None:
    """Set A and B of the selected modules to those at the end of the search, in place.

    B takes up a difference of scale, so that the model starts with the searched update.

    Args:
        model: with the adapters of ``selection``.
        weights: A, B and scale by name, as in `diffora.scoring.context.SearchResult.weights`.
        origin: where they come from, for messages.

    Raises:
        UserError: ``weights`` lack A, B or the scale of a selected module, or these have another shape or are not
            finite.
    """
    layers = dict(lowrank_layers(model))
    for names, flags in zip(grid.names, selection.mask().tolist(), strict=True):
        for name in filter(None, itertools.compress(names, flags)):
            layer = layers[name]
            for which, own in (("a", layer.lora_a), ("bt", layer.lora_bt)):
                found = weights.get(f"{name}.lora_{which}")
                if found is None or not found.isfinite().all():
                    raise UserError(f"method.warm_start=true: {origin} has no A and B of {name} with finite numbers")
                if found.shape != own.shape:
                    had = f"the search had rank {len(found)} at {name}"
                    raise UserError(f"method.warm_start=true: {had}, rank={layer.rank} does not")
                own.data.copy_(found)
            if (scaling := weights.get(f"{name}.scaling")) is None:
                raise UserError(f"method.warm_start=true: {origin} has no scale of {name}: make the search again")
            layer.lora_bt.data *= scaling.item() / layer.scaling
