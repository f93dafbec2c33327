import copy

import pytest
import torch
from torch import nn

from diffora.core.lowrank import LowRankLinear, attach, detach, lowrank_layers, lowrank_linear

X, W, B_, A, BT = (
    torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
    for i, shape in enumerate([(5, 3, 6), (4, 6), (4,), (2, 6), (2, 4)])
)


def layer(dropout: float = 0.0) -> LowRankLinear:
    base = nn.Linear(6, 4, dtype=torch.float64)
    return LowRankLinear(base, nn.Parameter(A.clone()), nn.Parameter(BT.clone()), alpha=6.0, dropout=dropout)


GATES = [
    None,
    torch.tensor(0.3, dtype=torch.float64),
    torch.tensor([0.3, -2.0]).double(),
    torch.tensor([[0.3, -2.0], [1.0, 0.5]]).double(),
]


@pytest.mark.parametrize("gate", GATES)
def test_forward_is_equation_10(gate):
    diagonal = torch.eye(2).double() if gate is None else gate if gate.ndim == 2 else torch.diag(gate.expand(2))
    expected = X @ W.T + B_ + X @ (3.0 * BT.T @ diagonal @ A).T
    torch.testing.assert_close(lowrank_linear(X, W, B_, A, BT, 3.0, gate), expected)


@pytest.mark.parametrize("gate_shape", [(), (2,), (2, 2)])
def test_first_and_second_derivatives_against_finite_differences(gate_shape):
    gate = torch.randn(gate_shape, dtype=torch.float64)
    inputs = [t.clone().requires_grad_() for t in (X[:1], A, BT, gate)]

    def function(x, a, bt, g):
        return lowrank_linear(x, W, B_, a, bt, 3.0, g)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_gate_gradient_is_the_inner_product_of_update_and_output_gradient():
    gate = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(5, 3, 4, dtype=torch.float64)
    lowrank_linear(X, W, B_, A, BT, 3.0, gate).backward(upstream)
    torch.testing.assert_close(gate.grad, (upstream * (3.0 * X @ A.T @ BT)).sum())


@pytest.mark.parametrize("gate", GATES)
def test_merge_changes_the_weight_not_the_output_and_unmerge_restores_it(gate):
    module = layer()
    module.gate = gate
    weight, expected = module.base.weight.clone(), module(X)
    module.merge()
    module.merge()  # twice is once
    torch.testing.assert_close(module(X), expected)
    assert (module.base.weight - weight).abs().max() > 0.1
    module.unmerge()
    torch.testing.assert_close(module.base.weight, weight)
    torch.testing.assert_close(module(X), expected)


def test_dropout_acts_in_training_only_and_keeps_the_mean():
    module = layer(dropout=0.5)
    module.eval()
    expected = module(X)
    assert torch.equal(module(X), expected)
    module.train()
    torch.manual_seed(0)
    draws = torch.stack([module(X) for _ in range(4000)])
    assert not torch.equal(draws[0], draws[1])
    assert (draws.mean(0) - expected).abs().max() < 5 * (draws.std(0) / 4000**0.5).max()


def test_only_a_and_b_are_trained():
    module = layer()
    module(X).sum().backward()
    assert module.base.weight.grad is None and module.base.bias.grad is None
    assert module.lora_a.grad is not None and module.lora_bt.grad is not None


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 5\)"):
        LowRankLinear(nn.Linear(6, 4), nn.Parameter(torch.zeros(2, 5)), nn.Parameter(torch.zeros(2, 4)), 1.0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4), "f": nn.Linear(4, 4)}) for _ in range(3))

    def forward(self, x):
        for block in self.layers:
            x = torch.tanh(block["f"](torch.tanh(block["q"](x))))
        return x


NAMES = [[f"layers.{i}.q", f"layers.{i}.f"] for i in range(3)]
MASK = torch.tensor([[True, False], [False, False], [True, True]])


def test_attach_shares_one_pair_per_type_among_the_unselected():
    net = Net()
    layers = attach(net, NAMES, MASK, rank=3, shared_rank=1, alpha=6)
    assert layers[1][0].lora_a is not layers[0][0].lora_a
    assert layers[0][1].lora_a is layers[1][1].lora_a and layers[0][1].lora_bt is layers[1][1].lora_bt
    assert layers[1][0].lora_a is not layers[1][1].lora_a  # same shape, another type
    assert [[m.rank for m in row] for row in layers] == [[3, 1], [1, 1], [3, 3]]
    assert layers[0][0].scaling == 2 and layers[0][1].scaling == 6  # alpha / r and alpha / r_s
    trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert trainable == 3 * (3 * 8) + 2 * (1 * 8)


def test_attach_without_sharing_leaves_the_unselected_alone():
    net = Net()
    layers = attach(net, NAMES, MASK, rank=3, shared_rank=None, alpha=6)
    assert layers[0][1] is None and isinstance(net.get_submodule("layers.0.f"), nn.Linear)
    assert [name for name, _ in lowrank_layers(net)] == ["layers.0.q", "layers.2.q", "layers.2.f"]


def test_fresh_updates_are_zero_and_detach_restores_the_model():
    net = Net()
    before, x = copy.deepcopy(net), torch.randn(2, 4)
    attach(net, NAMES, MASK, rank=3, shared_rank=1, alpha=6)
    torch.testing.assert_close(net(x), before(x))
    for _, module in lowrank_layers(net):
        nn.init.normal_(module.lora_bt)
    assert (net(x) - before(x)).abs().max() > 0.01
    next(lowrank_layers(net))[1].merge()
    detach(net)
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in before.named_parameters()]
    torch.testing.assert_close(net(x), before(x))


def test_gradients_of_a_shared_pair_add_up_over_layers():
    net = Net().double()
    layers = attach(net, NAMES, torch.zeros(3, 2, dtype=torch.bool), rank=1, shared_rank=2, alpha=2)
    for pair in {m.lora_bt for row in layers for m in row}:
        nn.init.normal_(pair)
    net.double()
    shared = layers[0][0].lora_a
    x = torch.randn(2, 4, dtype=torch.float64)

    def function(a):
        for row in layers:
            row[0]._parameters["lora_a"] = a
        return net(x)

    assert torch.autograd.gradcheck(function, shared.detach().clone().requires_grad_())
