"""Gradients of the bi-level problem (eq. 13): min over Gamma of L_valid(w*(Gamma), Gamma), w* = argmin_w L_train."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Params = Sequence[Tensor]


def first_order(valid_loss: Tensor, gamma: Tensor) -> Tensor:
    """d L_valid / d Gamma at fixed weights (Algorithm 1, line 4). No gradient of a weight is computed or touched."""
    return torch.autograd.grad(valid_loss, gamma)[0]


def simultaneous(
    train_loss: Tensor, valid_loss: Tensor, pairs: Params, head: Params, gamma: Tensor
) -> list[Tensor | None]:
    """dL_train/d(A, B, head) and dL_valid/dGamma at the same point, from one backward pass over the whole graph.

    The losses come from one forward pass under `diffora.core.split.divided`: by A and B only the first one has a
    gradient, by Gamma only the second one, so that their sum can be differentiated. The head knows no such division;
    its gradient is taken from the first loss alone, which costs little, since it stands behind everything else.

    Args:
        train_loss, valid_loss: scalars; one without a graph stands for a half that is not there.
        pairs: every A and B.
        head: the other weights of the lower level.
        gamma: the upper level's variable.

    Returns:
        The gradients by ``pairs``, ``head`` and ``gamma``, in a row; None for 0.
    """
    of_head: Sequence[Tensor | None] = [None] * len(head)
    if head and train_loss.requires_grad:
        of_head = torch.autograd.grad(train_loss, head, retain_graph=True, allow_unused=True)
    *of_pairs, of_gamma = torch.autograd.grad(train_loss + valid_loss, [*pairs, gamma], allow_unused=True)
    return [*of_pairs, *of_head, of_gamma]


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
