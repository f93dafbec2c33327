"""Formulas of the selectors other than the search, as pure functions: one number per candidate, high is good."""

import numpy as np
import torch
from torch import Tensor


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
