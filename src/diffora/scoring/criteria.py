"""Formulas of the selectors other than the search, as pure functions: one number per candidate, high is good."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffora.core.parts import part_of
from diffora.tasks.ignored import IGNORED


def gradient_norm(gradient: Tensor) -> Tensor:
    """Frobenius norm of the mean gradient of the loss with respect to a frozen weight; any shape -> scalar."""
    norm: Tensor = torch.linalg.vector_norm(gradient)
    return norm


def square_sums(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The sums over one batch that `weight_times_activation` needs. They can be added over batches and processes.

    Args:
        x: (..., in).
        mask: one entry for each token of ``x``; 0 for padding.

    Returns:
        (sum of squares of each feature, (in,); number of tokens, a scalar), in float32 or float64.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, x.shape[-1])
    keep = mask.reshape(-1).to(x.dtype)
    return keep @ x.square(), keep.sum()


def counted_tokens(name: str, x: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Which tokens of a module's input count: all but padding, as far as the batch says where padding is.

    An encoder-decoder has two sequences, of sources and targets. Its decoder reads the targets, but the keys and values
    of its cross-attention read the sources.

    Args:
        name: of the module.
        x: its input (..., in).
        batch: may have an ``attention_mask``, and for an encoder-decoder ``labels`` of one entry per target token.

    Returns:
        One entry for each token of ``x``, 0 for one that does not count.
    """
    mask: Tensor | None
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    reads_sources = part_of(name) in ("cross_key", "cross_value") or "decoder" not in name.split(".")
    if not reads_sources and labels is not None and labels.shape == x.shape[:-1]:
        mask = labels != IGNORED
    if mask is None or mask.shape != x.shape[:-1]:
        return torch.ones(x.shape[:-1], device=x.device)
    return mask


def weight_times_activation(weight: Tensor, mean_square: Tensor) -> Tensor:
    """Mean over the entries of |W_ij| * ||x_j||_2: Wanda's criterion (Sun et al., arXiv 2306.11695), averaged.

    Args:
        weight: (out, in).
        mean_square: (in,), mean square of each input feature over the tokens; its root is used as ||x_j||_2.
    """
    return (weight.abs() * mean_square.sqrt()).mean()


def gate_path(points: int) -> list[tuple[float, float]]:
    """(gate, weight) of the Gauss-Legendre rule on [0, 1], exact for polynomials up to degree 2 points - 1.

    Used to divide the decrease of a loss L among gates by integrated gradients (Sundararajan et al., arXiv 1703.01365):
    with all gates at t, the share of module m is minus the integral of dL/dgate_m over t from 0 to 1. The shares add up
    to L(all gates 0) - L(all gates 1).
    """
    nodes, weights = np.polynomial.legendre.leggauss(points)
    return [((1 + node) / 2, weight / 2) for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True)]
