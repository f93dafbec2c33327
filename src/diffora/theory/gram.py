"""The theory of [D] section 3 and appendix A: a two-layer ReLU network, its Gram matrices and its two bounds.

The network is ``f(x) = m^(-1/2) sum_r a_r relu((w0 + Gamma w_r)^T x)`` (eq. 3): w0 is pretrained and the same for all
neurons, w_r ~ N(0, I) and a_r = +-1 are drawn, and only w_r is trained. Gamma is diagonal and given as its diagonal,
``gate``: what multiplies a vector of d weights cannot have the L x N shape that the paper states.

Two matrices decide how it trains. `gram` is the paper's, eq. 4; `tangent_kernel` is that of gradient descent on w_r.
They are the same for Gamma = I only, since the derivative by w_r brings Gamma x where eq. 4 has x.

Leading dimensions of x, gate and w0 are a batch of problems.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_NODES, _WEIGHTS = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(64))


def active_together(x: Tensor, gate: Tensor, w0: Tensor) -> Tensor:
    """``[I^{Gamma w}]_ij = P[(w0 + Gamma w)^T x_i >= 0, (w0 + Gamma w)^T x_j >= 0]``, w ~ N(0, I) (eq. 4).

    Exact but for quadrature: the probability of a quadrant under two correlated normal variables is one integral over
    an angle (Plackett's identity). For w0 = 0 the integrand is 1, and what is left is the arc-cosine form
    ``(pi - angle(Gamma x_i, Gamma x_j)) / (2 pi)``. An input that the gate sets to zero has a fixed sign.

    Args:
        x: (..., n, d).
        gate: diagonal of Gamma, (..., d).
        w0: (..., d).

    Returns:
        (..., n, n), positive semi-definite, in float64.
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
    # The angle from both diagonals of the rhombus is exact for nearly parallel inputs, too.
    apart, together = (torch.linalg.vector_norm(w, dim=-1) for w in (u - v, u + v))
    either = (std[..., i] > 0) & (std[..., j] > 0)
    angle = torch.where(either, 2 * torch.atan2(apart, together), math.pi / 2)
    sign = torch.where(angle > math.pi / 2, -1.0, 1.0)  # turning an input over is turning its h over
    acute = torch.minimum(angle, math.pi - angle).clamp(min=1e-10)
    single = torch.special.ndtr(h)
    pairs = single[..., i] * single[..., j] + sign * _beyond_independence(h[..., i], sign * h[..., j], acute)
    result = torch.diag_embed(single)
    result[..., i, j] = pairs
    result[..., j, i] = pairs
    return result


def _beyond_independence(h: Tensor, k: Tensor, angle: Tensor) -> Tensor:
    """``P[U <= h, V <= k] - P[U <= h] P[V <= k]``, U and V standard normal with correlation cos(angle), angle <= pi/2.

    ``1 / (2 pi)`` times the integral of ``exp(-(h^2 + k^2 - 2 h k cos t) / (2 sin^2 t))`` from the angle to pi/2, over
    log t, since the integrand may fall from 1 to 0 at angles of the size of ``h - k``.
    """
    low, high = angle.log().unsqueeze(-1), math.log(math.pi / 2)
    t = torch.exp(low + (high - low) * (_NODES + 1) / 2)
    h, k = h.unsqueeze(-1), k.unsqueeze(-1)
    # h^2 + k^2 - 2 h k cos t without cancellation for small t.
    distance = (h - k).square() + 4 * h * k * (t / 2).sin().square()
    integrand = torch.exp(-distance / (2 * t.sin().square())) * t
    return (integrand @ _WEIGHTS) * (high - low).squeeze(-1) / (4 * math.pi)


def sampled_patterns(x: Tensor, gate: Tensor, w0: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """Which inputs each of ``samples`` drawn neurons is active on, (samples, n) of 0 and 1, for one problem.

    ``P^T P / samples`` is the Monte-Carlo estimate of `active_together`.
    """
    w = torch.randn(samples, x.shape[-1], dtype=x.dtype, generator=generator)
    return ((w0 + w * gate) @ x.T >= 0).to(x.dtype)


def gram(x: Tensor, active: Tensor) -> Tensor:
    """``H_ij = x_i^T x_j [I]_ij`` (eqs. 4, 5) from what `active_together` returns, (..., n, n)."""
    return x @ x.mT * active


def tangent_kernel(x: Tensor, gate: Tensor, active: Tensor) -> Tensor:
    """``(Gamma x_i)^T (Gamma x_j) [I]_ij``: the outputs' kernel under gradient descent on w_r, (..., n, n).

    At infinite width ``d(f - y)/dt = -kernel (f - y)``. With entries of Gamma in [0, 1], ``gram - tangent_kernel`` is
    positive semi-definite, so that this least eigenvalue never exceeds the paper's.
    """
    gated = x * gate.unsqueeze(-2)
    return gram(gated, active)


def least_eigenvalue(matrix: Tensor) -> Tensor:
    """lambda_min of symmetric matrices (..., n, n), shape (...)."""
    values: Tensor = torch.linalg.eigvalsh(matrix)
    return values[..., 0]


def sampled_least_eigenvalue(x: Tensor, patterns: Tensor) -> tuple[float, float]:
    """Monte-Carlo estimate of ``lambda_min(gram)`` and its standard error, from `sampled_patterns`.

    The error is that of ``v^T H v`` with v the estimate's own eigenvector. As v is chosen on the same samples, the
    estimate is too low on average, by an amount that falls with the number of samples.
    """
    samples = len(patterns)
    values, vectors = torch.linalg.eigh(gram(x, patterns.T @ patterns / samples))
    each = (patterns @ (vectors[:, :1] * x)).square().sum(1)  # v^T H_s v of each neuron s; their mean is lambda_min
    return values[0].item(), each.std().item() / math.sqrt(samples)


def convergence_bound(rate: float, times: Tensor) -> Tensor:
    """``exp(-rate t)``: the most that ``||f(t) - y||^2 / ||f(0) - y||^2`` may be by Theorems 1 and 2 (eqs. 7, 8)."""
    return torch.exp(-rate * times)


def generalisation_bound(matrix: Tensor, y: Tensor) -> tuple[float, float]:
    """Theorem 3's two terms without their constants: ``sqrt(y^T H^-1 y / N)`` and ``sqrt(y^T y / (lambda_min N))``.

    Args:
        matrix: H, (N, N).
        y: (N,).

    Raises:
        ValueError: H is not positive definite to working precision.
    """
    n = len(y)
    smallest = least_eigenvalue(matrix).item()
    if smallest <= n * torch.finfo(matrix.dtype).eps * matrix.diagonal().max().item():
        raise ValueError(f"the matrix is singular: its least eigenvalue is {smallest:.3g}")
    fit = torch.dot(y, torch.linalg.solve(matrix, y)).item()
    return math.sqrt(fit / n), math.sqrt(y.square().sum().item() / (smallest * n))


@dataclass
class TwoLayerNet:
    """Eq. 3's network: ``w`` (m, d) is trained, ``a`` (m,), ``gate`` (d,) and ``w0`` (d,) are not."""

    w: Tensor
    a: Tensor
    gate: Tensor
    w0: Tensor

    @classmethod
    def drawn(cls, width: int, gate: Tensor, w0: Tensor, generator: torch.Generator) -> "TwoLayerNet":
        """w_r ~ N(0, I), a_r uniform on {-1, 1}, as the theorems ask."""
        w = torch.randn(width, len(gate), dtype=gate.dtype, generator=generator)
        a = torch.randint(0, 2, (width,), generator=generator).to(gate.dtype) * 2 - 1
        return cls(w, a, gate, w0)

    def __call__(self, x: Tensor) -> Tensor:
        """(n, d) -> (n,)."""
        output: Tensor = self._before(x).relu() @ self.a / math.sqrt(len(self.a))
        return output

    def _before(self, x: Tensor) -> Tensor:
        return x @ (self.w0 + self.w * self.gate).T

    def descend(self, x: Tensor, y: Tensor, lr: float, steps: int) -> Tensor:
        """Gradient descent on eq. 2, in place: ``||f - y||^2`` before each step and at the end, (steps + 1,).

        Step k is time ``k lr`` of the gradient flow that the theorems speak of.
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
