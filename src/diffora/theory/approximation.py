"""How well an update of rank R can fit: the error bound of [R] section 3, and the effect of R-LoRA's regulariser on it.

E = W_target - W_frozen is the update that would fit exactly. The best update of rank R leaves the singular values
sigma_{R+1}, sigma_{R+2}, ... of E (theorem of Eckart and Young).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def best_update(e: Tensor, rank: int) -> Tensor:
    """The matrix of at most this rank that is nearest to ``e``, in the spectral norm and in the Frobenius norm.

    Args:
        e: (out, in), or a batch of such matrices.
        rank: at least 0; 0 gives a matrix of zeros.

    Returns:
        A matrix of the shape of ``e``.

    >>> best_update(torch.diag(torch.tensor([3.0, 2.0, 1.0])), rank=2).diagonal()
    tensor([3., 2., 0.])
    """
    u, s, vh = torch.linalg.svd(e, full_matrices=False)
    nearest: Tensor = u[..., :rank] * s[..., None, :rank] @ vh[..., :rank, :]
    return nearest


def best_error(e: Tensor, rank: int) -> tuple[float, float]:
    """The error of `best_update`: its spectral norm, which is sigma_{R+1} ([R] eq. 9), and its Frobenius norm.

    >>> best_error(torch.diag(torch.tensor([5.0, 4.0, 3.0])), rank=1)
    (4.0, 5.0)
    """
    left = torch.linalg.svdvals(e)[rank:]
    return (left[0].item() if len(left) else 0.0), torch.linalg.vector_norm(left).item()


def orthonormal_error(e: Tensor, rank: int, scaling: float = 1.0) -> float:
    """The least ``||e - s B A||_F`` when ``A A^T = I`` and ``B^T B = I``.

    This is where R-LoRA's regulariser ([R] eq. 10) is zero. All singular values of such an update equal the scaling s,
    so it cannot fit the singular values of ``e``. The square of the result is
    ``sum_{i <= R} (sigma_i - s)^2 + sum_{i > R} sigma_i^2`` (von Neumann's trace inequality).

    >>> orthonormal_error(torch.diag(torch.tensor([5.0, 4.0])), rank=2)
    5.0
    """
    values = torch.linalg.svdvals(e).clone()
    values[:rank] -= scaling
    return float(torch.linalg.vector_norm(values))


def network_bound(
    targets: Sequence[Tensor], biases: Sequence[Tensor], errors: Sequence[float], moment: Tensor, printed: bool = False
) -> float:
    """[R] eq. 8: an upper bound of ``E ||f(x) - target(x)||`` for a ReLU network f with the best updates.

    The bound is ``beta sum_i max_k(||W_k||_F + e_k)^(L - i) e_i``. beta bounds the mean norm of every layer's input.
    For the first layer the paper uses ``sqrt(||E x x^T||_F)``, which is no such bound. This function uses
    ``sqrt(tr E x x^T)``, which is one.

    Args:
        targets: weights (out, in) of the target's L layers, first to last.
        biases: the target's biases (out,), in the same order.
        errors: e_i of each layer ([R] eq. 9): ``best_error(E_i, R_i)[0]``, where R_i is the sum of the ranks of the
            layers that replace target layer i.
        moment: E x x^T, (in, in).
        printed: use beta as it is printed in the paper, for a comparison.
    """
    norms: list[float] = [torch.linalg.matrix_norm(w).item() for w in targets]
    offsets: list[float] = [torch.linalg.vector_norm(b).item() for b in biases]
    if printed:
        size = math.sqrt(torch.linalg.matrix_norm(moment).item())
        beta = size
        for i in range(1, len(targets) + 1):
            through = sum(math.prod(norms[j + 1 : i - 1]) * offsets[j] for j in range(i))
            beta = max(beta, size * math.prod(norms[:i]) + through)
    else:
        reads = [math.sqrt(moment.trace().item())]
        for norm, offset in zip(norms[:-1], offsets[:-1], strict=True):
            reads.append(norm * reads[-1] + offset)
        beta = max(reads)
    largest = max(norm + error for norm, error in zip(norms, errors, strict=True))
    return beta * sum(largest ** (len(targets) - 1 - i) * error for i, error in enumerate(errors))
