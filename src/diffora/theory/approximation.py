"""How well a rank-R update can do: the error bound of [R] section 3, and what R-LoRA's regulariser does to it.

E = W_target - W_frozen is what an update has to be. The best update of rank R leaves the singular values
sigma_{R+1}, sigma_{R+2}, ... of E (Eckart and Young).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def best_update(e: Tensor, rank: int) -> Tensor:
    """The matrix of at most this rank that is nearest to ``e``, in the spectral and the Frobenius norm."""
    u, s, vh = torch.linalg.svd(e, full_matrices=False)
    nearest: Tensor = u[:, :rank] * s[:rank] @ vh[:rank]
    return nearest


def best_error(e: Tensor, rank: int) -> tuple[float, float]:
    """What the best update of this rank leaves of ``e``: spectral norm, sigma_{R+1} ([R] eq. 9), and Frobenius norm."""
    left = torch.linalg.svdvals(e)[rank:]
    return (left[0].item() if len(left) else 0.0), torch.linalg.vector_norm(left).item()


def orthonormal_error(e: Tensor, rank: int, scaling: float = 1.0) -> float:
    """The least ``||e - s B A||_F`` when ``A A^T = I`` and ``B^T B = I``, where R-LoRA's regulariser (eq. 10) is zero.

    All singular values of such an update are s, so that it cannot fit those of ``e``:
    ``sum_{i <= R} (sigma_i - s)^2 + sum_{i > R} sigma_i^2`` is left (von Neumann's trace inequality).
    """
    values = torch.linalg.svdvals(e).clone()
    values[:rank] -= scaling
    return float(torch.linalg.vector_norm(values))


def network_bound(
    targets: Sequence[Tensor], biases: Sequence[Tensor], errors: Sequence[float], moment: Tensor, printed: bool = False
) -> float:
    """[R] eq. 8: the most that ``E ||f(x) - target(x)||`` need be after adapting a ReLU network.

    ``beta sum_i max_k(||W_k||_F + e_k)^(L - i) e_i``, where beta bounds the mean norm of what any layer reads. For the
    input's the paper has ``sqrt(||E x x^T||_F)``, which does not bound it; ``sqrt(tr E x x^T)`` does.

    Args:
        targets: weights of the target's L layers, first to last.
        biases: its biases.
        errors: e_i of each layer, ``best_error(E_i, sum of the ranks of the layers that stand for it)[0]`` (eq. 9).
        moment: E x x^T.
        printed: beta as the paper has it, to compare with.
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
