import pytest
import torch
from torch import nn

from diffora.core.bottleneck import ACTIVATIONS, BottleneckLinear


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu", "tanh"])
def test_formula(skip, activation):
    torch.manual_seed(0)
    layer = BottleneckLinear(nn.Linear(6, 5), 3, activation, skip, std=0.5).double()
    nn.init.normal_(layer.down.bias)
    nn.init.normal_(layer.up.bias)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    h = x @ layer.base.weight.T + layer.base.bias
    inner = ACTIVATIONS[activation]()(h @ layer.down.weight.T + layer.down.bias)
    expected = inner @ layer.up.weight.T + layer.up.bias + (h if skip else 0)
    torch.testing.assert_close(layer(x), expected)


def test_starts_near_the_identity_and_every_weight_gets_a_gradient():
    torch.manual_seed(0)
    base = nn.Linear(32, 32)
    layer, x = BottleneckLinear(base, 8), torch.randn(16, 32)
    change = (layer(x) - base(x)).norm() / base(x).norm()
    assert 0 < change < 0.01
    layer(x).square().sum().backward()
    assert base.weight.grad is None
    assert all(p.grad.abs().max() > 0 for p in (*layer.down.parameters(), *layer.up.parameters()))
    assert BottleneckLinear(base, 8, std=0.0)(x).equal(base(x))


def test_size():
    layer = BottleneckLinear(nn.Linear(20, 10), 4)
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 2 * 10 * 4 + 4 + 10


def test_the_first_weights_are_normal_and_cut_at_two_standard_deviations():
    torch.manual_seed(0)
    layer = BottleneckLinear(nn.Linear(100, 100), 50, std=0.05)
    for linear in (layer.down, layer.up):
        assert 0.095 < linear.weight.abs().max() <= 0.1  # 5000 draws: 230 would lie beyond
        assert linear.weight.std().item() == pytest.approx(0.88 * 0.05, rel=0.03)
        assert not linear.bias.any()
