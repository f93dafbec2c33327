"""The theory of [D] section 3 and appendix A: a two-layer ReLU network, its Gram matrices and its two bounds.

The network is ``f(x) = m^(-1/2) sum_r a_r relu((w0 + Gamma w_r)^T x)`` ([D] eq. 3). w0 is pretrained and the same for
all neurons. w_r ~ N(0, I) and a_r = +-1 are random, and only w_r is trained. Gamma is diagonal; functions take its
diagonal as ``gate``. (The paper says that Gamma has the shape L x N, but Gamma multiplies a vector of d weights.)

Two matrices describe how the network trains. `gram` is the paper's ([D] eq. 4). `tangent_kernel` is the kernel of
gradient descent on w_r. They are equal only for Gamma = I: the derivative by w_r contains Gamma x, and [D] eq. 4 has x.

Shapes: n inputs of d features. Leading dimensions of x, gate and w0 are a batch of problems.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_NODES, _WEIGHTS = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(64))


def active_together(x: Tensor, gate: Tensor, w0: Tensor) -> Tensor:
    """``[I^{Gamma w}]_ij = P[(w0 + Gamma w)^T x_i >= 0, (w0 + Gamma w)^T x_j >= 0]``, w ~ N(0, I).

    Part of [D] eq. 4: the probability that a random neuron is active on both inputs. It is exact except for quadrature:
    the probability of a quadrant under two correlated normal variables is one integral over an angle (Plackett's
    identity). For w0 = 0 the result is the arc-cosine form ``(pi - angle(Gamma x_i, Gamma x_j)) / (2 pi)``. An input
    that the gate sets to zero has a fixed sign.

    Args:
        x: (..., n, d).
        gate: diagonal of Gamma, (..., d).
        w0: (..., d).

    Returns:
        (..., n, n), positive semi-definite, in float64.

    Two orthogonal inputs without pretrained weights: each is active with probability 1/2, both with 1/4.

    >>> active_together(torch.eye(2), gate=torch.ones(2), w0=torch.zeros(2))
    tensor([[0.5000, 0.2500],
            [0.2500, 0.5000]], dtype=torch.float64)
    """
    x, gate, w0 = x.double(), gate.double(), w0.double()
    gated = x * gate.unsqueeze(-2)
    std = torch.linalg.vector_norm(gated, dim=-1)
    mean = (x @ w0.unsqueeze(-1)).squeeze(-1)
    certain = torch.where(mean >= 0, math.inf, -math.inf)
    # Beyond 38 standard deviations a normal probability is 0 or 1 in float64.
    h = torch.where(std > 0, mean / std, certain).clamp(-38, 38)
    unit = torch.where(std.unsqueeze(-1) > 0, gated / std.unsqueeze(-1), 0)

    n = x.shape[-2]
    i, j = torch.triu_indices(n, n, 1)
    u, v = unit[..., i, :], unit[..., j, :]
    # The angle from both diagonals of the rhombus is also exact for nearly parallel inputs.
    apart, together = (torch.linalg.vector_norm(w, dim=-1) for w in (u - v, u + v))
    either = (std[..., i] > 0) & (std[..., j] > 0)
    angle = torch.where(either, 2 * torch.atan2(apart, together), math.pi / 2)
    sign = torch.where(angle > math.pi / 2, -1.0, 1.0)  # negating an input negates its h
    acute = torch.minimum(angle, math.pi - angle).clamp(min=1e-10)
    single = torch.special.ndtr(h)
    pairs = single[..., i] * single[..., j] + sign * _beyond_independence(h[..., i], sign * h[..., j], acute)
    result = torch.diag_embed(single)
    result[..., i, j] = pairs
    result[..., j, i] = pairs
    return result


def _beyond_independence(h: Tensor, k: Tensor, angle: Tensor) -> Tensor:
    """``P[U <= h, V <= k] - P[U <= h] P[V <= k]``, U and V standard normal with correlation cos(angle), angle <= pi/2.

    It is ``1 / (2 pi)`` times the integral of ``exp(-(h^2 + k^2 - 2 h k cos t) / (2 sin^2 t))`` from the angle to pi/2.
    The variable of integration is log t, because the integrand may fall from 1 to 0 at angles of the size of ``h - k``.
    """
    low, high = angle.log().unsqueeze(-1), math.log(math.pi / 2)
    t = torch.exp(low + (high - low) * (_NODES + 1) / 2)
    h, k = h.unsqueeze(-1), k.unsqueeze(-1)
    # h^2 + k^2 - 2 h k cos t without cancellation for small t.
    distance = (h - k).square() + 4 * h * k * (t / 2).sin().square()
    integrand = torch.exp(-distance / (2 * t.sin().square())) * t
    return (integrand @ _WEIGHTS) * (high - low).squeeze(-1) / (4 * math.pi)


def sampled_patterns(x: Tensor, gate: Tensor, w0: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """Which inputs each of ``samples`` random neurons is active on, for one problem (no batch).

    Use it where `active_together` is too expensive: ``P^T P / samples`` is the Monte-Carlo estimate of it.

    Returns:
        P, (samples, n) of 0 and 1, with the dtype of x.
    """
    w = torch.randn(samples, x.shape[-1], dtype=x.dtype, generator=generator)
    return ((w0 + w * gate) @ x.T >= 0).to(x.dtype)


def gram(x: Tensor, active: Tensor) -> Tensor:
    """The paper's matrix ``H_ij = x_i^T x_j [I]_ij`` ([D] eqs. 4, 5), (..., n, n).

    Args:
        x: (..., n, d).
        active: [I] from `active_together`, or its estimate from `sampled_patterns`; (..., n, n).
    """
    return x @ x.mT * active


def tangent_kernel(x: Tensor, gate: Tensor, active: Tensor) -> Tensor:
    """The kernel ``(Gamma x_i)^T (Gamma x_j) [I]_ij`` of gradient descent on w_r, (..., n, n).

    At infinite width ``d(f - y)/dt = -kernel (f - y)``. For entries of Gamma in [0, 1], ``gram - tangent_kernel`` is
    positive semi-definite, so the least eigenvalue of the kernel is at most that of `gram`.

    >>> x, gate = torch.eye(2), torch.tensor([1.0, 0.5])
    >>> active = active_together(x, gate, torch.zeros(2))
    >>> gram(x, active).diagonal(), tangent_kernel(x, gate, active).diagonal()
    (tensor([0.5000, 0.5000], dtype=torch.float64), tensor([0.5000, 0.1250], dtype=torch.float64))
    """
    gated = x * gate.unsqueeze(-2)
    return gram(gated, active)


def least_eigenvalue(matrix: Tensor) -> Tensor:
    """The least eigenvalue of symmetric matrices (..., n, n), of shape (...)."""
    values: Tensor = torch.linalg.eigvalsh(matrix)
    return values[..., 0]


def sampled_least_eigenvalue(x: Tensor, patterns: Tensor) -> tuple[float, float]:
    """Monte-Carlo estimate of ``lambda_min(gram)`` and its standard error, from `sampled_patterns`.

    The error is that of ``v^T H v``, where v is the eigenvector of the estimate. v comes from the same samples, so the
    estimate is too low on average. This bias falls with the number of samples.
    """
    samples = len(patterns)
    values, vectors = torch.linalg.eigh(gram(x, patterns.T @ patterns / samples))
    each = (patterns @ (vectors[:, :1] * x)).square().sum(1)  # v^T H_s v of each neuron s; their mean is lambda_min
    return values[0].item(), each.std().item() / math.sqrt(samples)


def convergence_bound(rate: float, times: Tensor) -> Tensor:
    """``exp(-rate t)``: the upper bound of ``||f(t) - y||^2 / ||f(0) - y||^2`` in [D] Theorems 1 and 2 ([D] eqs. 7, 8).

    Args:
        rate: the least eigenvalue of the matrix.
        times: any shape; the result has the same.
    """
    return torch.exp(-rate * times)


def generalisation_bound(matrix: Tensor, y: Tensor) -> tuple[float, float]:
    """The two terms of [D] Theorem 3 without constants: ``sqrt(y^T H^-1 y / N)`` and ``sqrt(y^T y / (lambda_min N))``.

    Args:
        matrix: H, (N, N).
        y: (N,).

    Raises:
        ValueError: H is not positive definite to working precision.

    >>> generalisation_bound(torch.diag(torch.tensor([0.5, 0.25])), torch.tensor([1.0, 0.0]))
    (1.0, 1.4142135623730951)
    """
    n = len(y)
    smallest = least_eigenvalue(matrix).item()
    if smallest <= n * torch.finfo(matrix.dtype).eps * matrix.diagonal().max().item():
        raise ValueError(f"the matrix is singular: its least eigenvalue is {smallest:.3g}")
    fit = torch.dot(y, torch.linalg.solve(matrix, y)).item()
    return math.sqrt(fit / n), math.sqrt(y.square().sum().item() / (smallest * n))


@dataclass
class TwoLayerNet:
    """The network of [D] eq. 3: ``w`` (m, d) is trained; ``a`` (m,), ``gate`` (d,) and ``w0`` (d,) are not."""

    w: Tensor
    a: Tensor
    gate: Tensor
    w0: Tensor

    @classmethod
    def drawn(cls, width: int, gate: Tensor, w0: Tensor, generator: torch.Generator) -> "TwoLayerNet":
        """A random network as the theorems of [D] require: w_r ~ N(0, I), and a_r is -1 or 1 with equal probability."""
        w = torch.randn(width, len(gate), dtype=gate.dtype, generator=generator)
        a = torch.randint(0, 2, (width,), generator=generator).to(gate.dtype) * 2 - 1
        return cls(w, a, gate, w0)

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs (n,) for inputs (n, d)."""
        output: Tensor = self._before(x).relu() @ self.a / math.sqrt(len(self.a))
        return output

    def _before(self, x: Tensor) -> Tensor:
        return x @ (self.w0 + self.w * self.gate).T

    def descend(self, x: Tensor, y: Tensor, lr: float, steps: int) -> Tensor:
        """Gradient descent on the loss of [D] eq. 2; changes ``w`` in place.

        Args:
            x: inputs, (n, d).
            y: targets, (n,).
            lr: step size. Step k corresponds to time ``k lr`` of the gradient flow in the theorems.
            steps: number of steps.

        Returns:
            ``||f - y||^2`` before each step and at the end, (steps + 1,).
        """
        losses = torch.empty(steps + 1, dtype=x.dtype)
        scaled = self.a / math.sqrt(len(self.a))
        gated = x * self.gate
        for step in range(steps):
            before = self._before(x)
            residual = before.relu() @ scaled - y
            losses[step] = residual.square().sum()
            slope = (before > 0).to(x.dtype) * residual[:, None] * scaled
            self.w -= lr * slope.T @ gated
        losses[steps] = (self(x) - y).square().sum()
        return losses
