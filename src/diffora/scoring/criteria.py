"""Formulas of the selectors other than the search, as pure functions: one number per candidate, high is good."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffora.core.parts import part_of
from diffora.tasks.ignored import IGNORED

DIRECTIONS = 1024
"""How many directions `direction_norm` draws. Its standard error is 2.4 % for a weight of rank 1, otherwise less."""


def gradient_norm(gradient: Tensor) -> Tensor:
    """Frobenius norm of the mean gradient of the loss with respect to a frozen weight; any shape -> scalar."""
    norm: Tensor = torch.linalg.vector_norm(gradient)
    return norm


def mean_square(gradient: Tensor) -> Tensor:
    """Mean square of the entries of a gradient; any shape -> scalar.

    Its mean over rows is the mean of the diagonal of the empirical Fisher matrix. The gradient must be of one row: the
    square of a batch's mean gradient is smaller the larger the batch is.
    """
    mean: Tensor = gradient.square().mean()
    return mean


def square_sums(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The sums over one batch that `weight_times_activation` needs. They can be added over batches and processes.

    Args:
        x: (..., in).
        mask: one entry for each token of ``x``; 0 for padding.

    Returns:
        (sum of squares of each feature, (in,); number of tokens, a scalar), in float32 or float64.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, x.shape[-1])
    counted = mask.reshape(-1) != 0  # not a product with the mask: padding may hold NaN
    return x[counted].square().sum(0), counted.sum().to(x.dtype)


def reads_targets(name: str, model: nn.Module) -> bool:
    """Whether a module reads the targets of an encoder-decoder.

    It does if it is in a decoder that has an encoder beside it. The keys and values of the decoder's cross-attention
    read the sources. In a model without an encoder, such as OPT, the layers may be called decoder too; so they may in
    one that reads images with an encoder elsewhere, such as BLIP-2.
    """
    parts = name.split(".")
    if "decoder" not in parts or part_of(name) in ("cross_key", "cross_value"):
        return False
    above = model.get_submodule(".".join(parts[: parts.index("decoder")]))
    return isinstance(getattr(above, "encoder", None), nn.Module)


def counted_tokens(x: Tensor, batch: Mapping[str, Any], targets: bool = False, config: Any = None) -> Tensor:
    """Which tokens of a module's input count: all but padding, as far as the batch says where padding is.

    Args:
        x: the input (..., in).
        batch: may have an ``attention_mask`` (packed conversations: ``real``), and for an encoder-decoder ``labels`` of
            one entry per target token.
        targets: whether the module reads the targets (`reads_targets`).
        config: the model's transformers configuration, for `as_padded`.

    Returns:
        One entry for each token of ``x``, 0 for one that does not count.
    """
    labels: Tensor | None = batch.get("labels")
    if targets and labels is not None and labels.shape == x.shape[:-1]:
        return labels != IGNORED
    given: Tensor | None = batch.get("attention_mask", batch.get("real"))
    masks = [] if given is None or not given.dim() else [given, as_padded(given, config)]
    for mask in masks:
        # rows of several choices are read as one batch of sequences, and some layers read all tokens as one list
        rows = mask.shape[:-1].numel(), mask.shape[-1]
        turned = x.shape[:-1] == rows[::-1]  # XLNet, and Longformer's attention, read tokens x rows
        if x.shape[:-1] in (mask.shape, rows, (mask.numel(),)) and not (turned and _is_xlnet(config)):
            return mask.reshape(x.shape[:-1])
        if turned:
            return mask.reshape(rows).T
    return torch.ones(x.shape[:-1], device=x.device)


def _is_xlnet(config: Any) -> bool:
    return getattr(config, "model_type", None) == "xlnet"


def as_padded(mask: Tensor, config: Any) -> Tensor:
    """An attention mask (..., tokens), padded as Longformer and the encoder of LED pad their input.

    They pad on the right, to a multiple of ``config.attention_window``. For other models the mask stays as it is.
    """
    window = getattr(config, "attention_window", None)
    if window is None:
        return mask
    return F.pad(mask, (0, -mask.shape[-1] % (window if isinstance(window, int) else max(window))))


def weight_times_activation(weight: Tensor, mean_square: Tensor) -> Tensor:
    """Mean over the entries of |W_ij| * ||x_j||_2: Wanda's criterion (Sun et al., arXiv 2306.11695), averaged.

    Args:
        weight: (out, in).
        mean_square: (in,), mean square of each input feature over the tokens; its root is used as ||x_j||_2.
    """
    return (weight.abs() * mean_square.sqrt()).mean()


def norm_sums(weight: Tensor, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The sums over one batch that the NFN of PLoP needs. They can be added over batches and processes.

    NFN(W) = mean over tokens of ||W z|| / ||z||, divided by `direction_norm` (PLoP, arXiv 2506.20629). The scale of W
    cancels.

    Args:
        weight: (out, in).
        x: (..., in), the inputs z.
        mask: one entry for each token of ``x``; 0 for padding. A token whose input is all zero has no direction, and
            does not count either.

    Returns:
        (sum of ||W z|| / ||z|| over tokens; number of tokens), scalars in float32 or float64.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x = x.to(dtype).reshape(-1, x.shape[-1])
    norms = x.norm(dim=-1)
    counted = (mask.reshape(-1) != 0) & (norms > 0)
    stretched = (x[counted] / norms[counted].unsqueeze(-1)) @ weight.to(dtype).T
    return stretched.norm(dim=-1).sum(), counted.sum().to(dtype)


def direction_norm(weight: Tensor, seed: int) -> Tensor:
    """Mean of ||W u|| over `DIRECTIONS` random directions u of length 1, equally likely everywhere on the sphere.

    Args:
        weight: (out, in).
        seed: of the directions. They are the same for all weights of equal width.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(DIRECTIONS, weight.shape[1], generator=generator, dtype=dtype).to(weight.device)
    directions /= directions.norm(dim=-1, keepdim=True)
    mean: Tensor = (directions @ weight.to(dtype).T).norm(dim=-1).mean()
    return mean


def mean_of_types(values: Tensor) -> Tensor:
    """Every value replaced by the mean of its column; L x N, NaN where a layer has no such module."""
    return values.nanmean(dim=0).expand_as(values).masked_fill(values.isnan(), float("nan"))


def condition_number(weight: Tensor) -> float:
    """sigma_max / (sigma_min + 1e-8) in float32, computed by PEFT (KappaTune, arXiv 2506.16289).

    Args:
        weight: (out, in).
    """
    from peft.helpers import KappaTuneSelector  # takes seconds to import

    # PEFT looks only at nn.Linear. Quantised weights are not given here, and the order of rows and columns is the same.
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    found = KappaTuneSelector(nn.ModuleList([layer]), max_dim_size_to_analyze=max(weight.shape), show_progress=False)
    found.get_best_targets()
    assert found._condition_numbers is not None
    return found._condition_numbers["0"]


def signal_to_noise(weight: Tensor) -> float:
    """SNR of a weight by Spectrum (arXiv 2406.06623).

    Singular values above eps are signal, the others noise: SNR = (sum of signal / sum of noise) / sigma_max, with
    eps = IQR / 1.349 * (1 + sqrt(beta)), the edge of the Marchenko-Pastur law for a noise whose standard deviation is
    estimated from the interquartile range of the singular values; beta is the shorter side over the longer one.

    Args:
        weight: (out, in).

    Returns:
        The SNR; 0 without signal, infinity without noise.
    """
    values = torch.linalg.svdvals(weight.to(torch.promote_types(weight.dtype, torch.float32)))
    low, high = values.quantile(0.25), values.quantile(0.75)
    beta = min(weight.shape) / max(weight.shape)
    signal = values > (high - low) / 1.349 * (1 + math.sqrt(beta))
    if not (signal & (values > 0)).any():
        return 0.0
    return float(values[signal].sum() / values[~signal].sum() / values[0])


def ranked_in_types(values: Tensor, lowest_layer: int = 0) -> Tensor:
    """Scores that take the top share of each module type: rank within the column, as a share of it.

    The score is (modules of the same type with a lower value + v / (1 + v)) / modules of the type, between 0 and 1. So
    modules of different types compare by their rank within their own type, and those of equal rank by their values.

    Args:
        values: L x N of at least 0, infinity allowed; NaN where a layer has no such module.
        lowest_layer: modules of the layers below this one are not counted, because they are not selected.

    Returns:
        L x N, NaN where a layer has no such module. Equal values of one type stay equal.
    """
    others = values[lowest_layer:]
    lower = (others.unsqueeze(0) < values.unsqueeze(1)).sum(dim=1)  # comparisons with NaN are False
    return (lower + 1 - 1 / (1 + values)) / (~others.isnan()).sum(dim=0).clamp(min=1)


def gate_path(points: int) -> list[tuple[float, float]]:
    """(gate, weight) of the Gauss-Legendre rule on [0, 1], exact for polynomials up to degree 2 points - 1.

    Used to divide the decrease of a loss L among gates by integrated gradients (Sundararajan et al., arXiv 1703.01365):
    with all gates at t, the share of module m is minus the integral of dL/dgate_m over t from 0 to 1. The shares add up
    to L(all gates 0) - L(all gates 1).
    """
    nodes, weights = np.polynomial.legendre.leggauss(points)
    return [((1 + node) / 2, weight / 2) for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True)]
