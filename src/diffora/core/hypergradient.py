"""Gradients of the bi-level problem (eq. 13): min over Gamma of L_valid(w*(Gamma), Gamma), w* = argmin_w L_train."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Params = Sequence[Tensor]


def first_order(valid_loss: Tensor, gamma: Tensor) -> Tensor:
    """d L_valid / d Gamma at fixed weights (Algorithm 1, line 4). No gradient of a weight is computed or touched."""
    return torch.autograd.grad(valid_loss, gamma)[0]


def unrolled(
    train_loss: Callable[[Params], Tensor],
    valid_loss: Callable[[Params], Tensor],
    params: Params,
    gamma: Tensor,
    xi: float,
) -> Tensor:
    """Hypergradient through one inner gradient step, w' = w - xi * dL_train/dw, as DARTS unrolls it.

    Exact (double backward), where DARTS takes finite differences:
    ``dL_valid/dGamma (w') - xi * d2 L_train / dGamma dw * dL_valid/dw'``.

    Args:
        train_loss: loss of the lower level as a function of the weights (and, inside, of gamma).
        valid_loss: loss of the upper level likewise.
        params: the lower level's weights, leaves that require gradients.
        gamma: the upper level's variable, a leaf.
        xi: the inner step size.
    """
    grads = torch.autograd.grad(train_loss(params), params, create_graph=True)
    stepped = [param - xi * grad for param, grad in zip(params, grads, strict=True)]
    return torch.autograd.grad(valid_loss(stepped), gamma)[0]
