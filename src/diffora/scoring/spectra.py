"""The selectors ``kappa`` and ``spectrum``: scores from the singular values of the weights. They need no data."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from diffora.core.grid import Grid, laid_out
from diffora.core.linear import weight_of
from diffora.errors import UserError
from diffora.scoring.criteria import condition_number, ranked_in_types, signal_to_noise

SPECTRA: dict[str, Callable[[Tensor], float]] = {"kappa": condition_number, "spectrum": signal_to_noise}
"""What is computed for each weight, by the name of the selector."""


@torch.no_grad()
def spectral_scores(model: nn.Module, grid: Grid, selector: str, names: Iterable[str] | None = None) -> Tensor:
    """Scores of ``kappa`` or ``spectrum``: L x N in float64 on the CPU, NaN where a layer has no such module.

    Args:
        selector: a key of `SPECTRA`.
        names: ``grid.modules`` inside a progress bar; None: without one.

    Raises:
        UserError: a weight is quantised, or has values that are not finite.
    """
    values = []
    for name in names or grid.modules:
        weight = weight_of(model.get_submodule(name)).detach()
        if not weight.isfinite().all():
            raise UserError(f"selector={selector}: the weight of {name} has values that are not finite")
        values.append(SPECTRA[selector](weight))
    found = laid_out(torch.tensor(values, dtype=torch.float64), grid.names)
    return -found if selector == "kappa" else ranked_in_types(found, grid.lowest_layer)
