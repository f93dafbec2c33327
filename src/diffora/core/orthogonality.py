"""R-LoRA's regulariser ([R] eq. 10), and the measures of an update reported in [R] Table 5."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor


def orthogonality(matrices: Sequence[Tensor], form: str = "squared", trained: Sequence[Tensor] | None = None) -> Tensor:
    """How far the rows of all matrices are from orthonormal, as one number ([R] eq. 10).

    A and B^T both have shape (rank, d), so that ``A A^T - I`` and ``B^T B - I`` are the same function of them. Matrices
    of equal shape are multiplied as one batch.

    Args:
        matrices: every A and B^T, each (rank, d); shapes may differ.
        form: ``squared``: sum of squared Frobenius norms of ``M M^T - I`` ([R] eq. 10); ``mean_norm``: mean of the
            norms themselves (the released code).
        trained: for each matrix, the rows that get a gradient in this step; None for all. The value does not depend on
            it.

    Returns:
        A scalar.

    >>> orthogonality([torch.eye(2, 5)]).item(), orthogonality([2 * torch.eye(2, 5)]).item()
    (0.0, 18.0)
    """
    with torch.autocast(matrices[0].device.type, enabled=False):  # half precision cannot resolve a small excess over 1
        return _orthogonality([m.float() if m.itemsize < 4 else m for m in matrices], form, trained)


def _orthogonality(matrices: Sequence[Tensor], form: str, trained: Sequence[Tensor] | None) -> Tensor:
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for i, matrix in enumerate(matrices):
        by_shape[matrix.shape].append(i)
    total = matrices[0].new_zeros(())
    for (rank, _), members in by_shape.items():
        stack = torch.stack([matrices[i] for i in members])
        if trained is not None:
            live = torch.zeros(len(members), rank, 1, dtype=torch.bool, device=stack.device)
            for place, i in enumerate(members):
                live[place, trained[i]] = True
            stack = torch.where(live, stack, stack.detach())
        eye = torch.eye(rank, dtype=stack.dtype, device=stack.device)
        excess = stack @ stack.mT - eye
        if form == "squared":
            total = total + excess.square().sum()
        else:
            total = total + torch.linalg.vector_norm(excess, dim=(1, 2)).sum() / len(matrices)
    return total


def singular_values(lora_a: Tensor, lora_bt: Tensor, scaling: float) -> Tensor:
    """The min(rank, in, out) largest singular values of ``s B A``, descending. All others are 0.

    Computed in float64 on the CPU: the matrices are small, and some accelerators have no float64.

    Args:
        lora_a: (rank, in).
        lora_bt: (rank, out).
    """
    _, r_a = torch.linalg.qr(lora_a.detach().cpu().double().T)
    _, r_b = torch.linalg.qr(lora_bt.detach().cpu().double().T)
    values: Tensor = torch.linalg.svdvals(r_b @ r_a.T)
    return values * abs(scaling)


def numerical_rank(values: Tensor, out_features: int, in_features: int) -> int:
    """Number of singular values above ``max(out, in) * eps(float32) * largest``: NumPy's rule for float32 matrices."""
    if not len(values):
        return 0
    tolerance = max(out_features, in_features) * torch.finfo(torch.float32).eps * values.max().item()
    return int((values > tolerance).sum())


def orthogonality_loss(values: Tensor, out_features: int) -> float:
    """``||dW dW^T - I||_F^2`` of [R] Table 5, from the singular values of dW; dW dW^T is (out, out).

    It depends on the scale of dW: it is ``out`` at dW = 0, and lowest if the R singular values are 1.
    """
    return float((values.square() - 1).square().sum() + (out_features - len(values)))


def stable_rank(values: Tensor) -> float:
    """``||dW||_F^2 / sigma_1^2`` from the singular values of dW: how many directions the update really has.

    It does not depend on the scale of dW, unlike `orthogonality_loss`. It is R for an update of rank R whose singular
    values are equal, near 1 if one direction dominates, and 0 for a zero update.
    """
    return float(relative(values).square().sum())


def median_sigma(values: Tensor) -> float:
    """The median of ``sigma_i / sigma_1`` over the directions of an adapter; 0 for a zero update.

    It does not depend on the scale of dW. It is 1 if all singular values are equal.
    """
    return float(relative(values).quantile(0.5)) if len(values) else 0.0


def relative(values: Tensor) -> Tensor:
    """``sigma_i / sigma_1``, all 0 for a zero update."""
    largest = values.max() if len(values) else 0
    return values / largest if largest > 0 else torch.zeros_like(values)
