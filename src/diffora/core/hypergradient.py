"""Gradients of the bi-level problem, [D] eq. 13: min over Γ of L_valid(w*(Γ), Γ) with w*(Γ) = argmin over w of L_train.

w stands for every A and B and the head. [D] uses the first order (`first_order`); `unrolled` is the second order, as in
DARTS (arXiv 1806.09055). `simultaneous` computes the first order and the weights' gradient in one backward pass.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Params = Sequence[Tensor]


def first_order(valid_loss: Tensor, gamma: Tensor) -> Tensor:
    """dL_valid/dΓ at fixed weights ([D] eq. 13; [D] Algorithm 1, line 4), L x N. Computes no gradient of a weight."""
    return torch.autograd.grad(valid_loss, gamma)[0]


def simultaneous(
    train_loss: Tensor, valid_loss: Tensor, pairs: Params, head: Params, *upper: Tensor
) -> list[Tensor | None]:
    """Both levels of [D] eq. 13: dL_train/d(A, B, head) and dL_valid/dΓ at one point, from one backward pass.

    Both losses must come from one forward pass under `diffora.core.split.divided`. There A and B have a gradient from
    the training loss only and Γ from the validation loss only, so the sum of both losses can be differentiated. The
    head is not split by rows, so its gradient is taken from the training loss alone; that costs little, because only
    the head's own backward pass is needed for it.

    Args:
        train_loss, valid_loss: scalars. If a batch is missing, give a scalar without a graph.
        pairs: every A and B.
        head: the other weights of the lower level.
        upper: Γ, L x N; and the gates made from it, if their gradient is wanted too.

    Returns:
        One list: the gradients of ``pairs``, then of ``head``, then of ``upper``. None means 0.
    """
    of_head: Sequence[Tensor | None] = [None] * len(head)
    if head and train_loss.requires_grad:
        of_head = torch.autograd.grad(train_loss, head, retain_graph=True, allow_unused=True)
    grads = torch.autograd.grad(train_loss + valid_loss, [*pairs, *upper], allow_unused=True)
    return [*grads[: len(pairs)], *of_head, *grads[len(pairs) :]]


def unrolled(
    train_loss: Callable[[Params], Tensor],
    valid_loss: Callable[[Params], Tensor],
    params: Params,
    gamma: Tensor,
    xi: float,
    mean_train: Callable[[list[Tensor]], list[Tensor]] = list,
    mean_valid: Callable[[list[Tensor]], list[Tensor]] = list,
) -> Tensor:
    """Second-order hypergradient of [D] eq. 13 through one gradient step, w' = w - xi * dL_train/dw, as in DARTS.

    ``dL_valid/dΓ (w') - xi * d2 L_train / dΓ dw * dL_valid/dw'``, exact by double backward; DARTS approximates it by
    finite differences.

    Args:
        train_loss: training loss as a function of the weights; it also depends on ``gamma``.
        valid_loss: validation loss, likewise.
        params: the lower level's weights, leaves that require gradients.
        gamma: Γ, a leaf.
        xi: size of the inner step.
        mean_train, mean_valid: average gradients of the training and the validation loss over processes. Without them
            each process would take an inner step of its own, and the mean would be another hypergradient.

    Returns:
        L x N.
    """
    grads = torch.autograd.grad(train_loss(params), params, create_graph=True, allow_unused=True)
    step = mean_train([grad.detach() for grad in _zeros_for_none(grads, params)])
    stepped = [(param - xi * grad).detach().requires_grad_() for param, grad in zip(params, step, strict=True)]
    found = torch.autograd.grad(valid_loss(stepped), [gamma, *stepped], allow_unused=True)
    direct, *outer = mean_valid(_zeros_for_none(found, [gamma, *stepped]))
    used, factors = zip(*((grad, o) for grad, o in zip(grads, outer, strict=True) if grad is not None), strict=True)
    (mixed,) = mean_train(list(torch.autograd.grad(used, gamma, factors)))
    return direct - xi * mixed


def _zeros_for_none(grads: Sequence[Tensor | None], params: Params) -> list[Tensor]:
    """Gradients with 0 for a parameter that the loss does not reach."""
    return [torch.zeros_like(p) if grad is None else grad for grad, p in zip(grads, params, strict=True)]


def added(sums: Sequence[Tensor | None] | None, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The sum, entry by entry; None counts as 0."""
    if sums is None:
        return grads
    return [b if a is None else a if b is None else a + b for a, b in zip(sums, grads, strict=True)]
