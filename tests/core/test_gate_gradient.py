"""What a gate's gradient can tell (docs/background/selection.md): two exact examples in float64.

``pytest -s`` prints the numbers.
"""

import pytest
import torch
from torch import nn

from diffora.core.lowrank import LowRankLinear

LOSSES = {(0.5, 0.5): 0.25, (0.8, 0.2): 0.0035, (0.2, 0.8): 0.886}


def gated_scalar(gate: float) -> LowRankLinear:
    """x -> gate * b * x with b = 0: an adapter of rank 1 on a 1 x 1 layer of zeros, with A = 1."""
    base = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(base.weight)
    one, zero = torch.ones(1, 1).double(), torch.zeros(1, 1).double()
    layer = LowRankLinear(base, nn.Parameter(one, requires_grad=False), nn.Parameter(zero), alpha=1)
    layer.gate = torch.tensor(gate).double()
    return layer


@pytest.mark.parametrize("gates", LOSSES)
def test_descent_from_zero_reaches_another_minimiser_with_other_gates(gates):
    """One training row, 1 = f(1, 1); one validation row, 1 = f(1, 0).

    Every w with w1 + w2 = 1 is a minimiser that any gates above 0 can reach. Descent in B from 0 reaches the one of
    least ||B||, which is w = gates^2 / sum(gates^2).
    """
    layers = [gated_scalar(gate) for gate in gates]
    optimiser = torch.optim.SGD([layer.lora_bt for layer in layers], lr=0.5)

    def loss(*inputs: float) -> torch.Tensor:
        outputs = [layer(torch.tensor([[x]]).double()) for layer, x in zip(layers, inputs, strict=True)]
        return (sum(outputs) - 1).square().sum()

    for _ in range(100):
        optimiser.zero_grad()
        loss(1, 1).backward()
        optimiser.step()
    weights = torch.stack([layer.delta().squeeze() for layer in layers]).detach()
    trained, valid = loss(1, 1).item(), loss(1, 0).item()
    print(f"gates {gates}: dW {weights.tolist()}, training loss {trained:.0e}, validation loss {valid:.4f}")
    squares = torch.tensor(gates).double().square()
    torch.testing.assert_close(weights, squares / squares.sum())
    assert trained < 1e-30 and valid == pytest.approx(LOSSES[gates], rel=0.02)


def test_at_the_minimum_validation_pushes_gates_down_by_the_number_of_parameters():
    """Least squares, y = x w + noise, with whitened inputs, two modules of 2 and 6 parameters, w_m = gate_m B_m.

    B minimises the training loss of 40 rows. The loss is half of the mean square on other 40 rows. The mean of
    gate_m dL_valid/dgate_m over draws is tr Cov(w_m) = noise^2 d_m / (n - d - 1), whatever the gates and the true w.
    """
    sizes, n, draws, noise = (2, 6), 40, 20_000, 0.5
    d = sum(sizes)
    generator = torch.Generator().manual_seed(0)
    true = torch.tensor([0.6, -0.3, 0.2, 0.0, 0.3, 0.0, -0.1, 0.1]).double()

    def rows() -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(draws, n, d, generator=generator, dtype=torch.float64)
        return x, x @ true + noise * torch.randn(draws, n, generator=generator, dtype=torch.float64)

    gates = torch.tensor([0.7, 0.3], dtype=torch.float64).expand(draws, 2).clone().requires_grad_(True)
    each = gates.repeat_interleave(torch.tensor(sizes), 1)
    x, y = rows()
    b = torch.linalg.lstsq(x * each.detach()[:, None], y[..., None]).solution.squeeze(-1)
    weights = each.detach() * b
    x, y = rows()
    valid = 0.5 * ((x @ (each * b)[..., None]).squeeze(-1) - y).square().mean(1)
    (gradient,) = torch.autograd.grad(valid.sum(), gates)
    push = gates.detach() * gradient
    mean, error = push.mean(0), push.std(0) / draws**0.5
    expected = noise**2 * torch.tensor(sizes).double() / (n - d - 1)
    covariance = torch.stack([part.var(0).sum() for part in weights.split(sizes, 1)])
    print(f"gate dL/dgate {mean.tolist()} +- {error.tolist()}, tr Cov {covariance.tolist()}, {expected.tolist()}")
    torch.testing.assert_close(covariance, expected, rtol=0.05, atol=0)
    assert ((mean - expected).abs() < 4 * error).all() and (mean > 8 * error).all()
