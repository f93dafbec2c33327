import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from diffora.core.attach import attach, detach, new_pair
from diffora.core.linear import features, is_linear, weight_of
from diffora.core.lowrank import LowRankLinear, add_lowrank, lowrank_layers
from diffora.errors import UserError

X, W, B_, A, BT = (
    torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
    for i, shape in enumerate([(5, 3, 6), (4, 6), (4,), (2, 6), (2, 4)])
)
KINDS = ["linear", "conv1d", "packed"]


class Packed(nn.Linear):
    """A quantised layer like those of common libraries: a subclass whose weight is packed bytes."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        packed = (self.weight.detach() * 256).round().to(torch.int8).reshape(-1, 1)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x):
        weight = self.weight.reshape(self.out_features, self.in_features)
        return linear(x, weight.to(x.dtype) / 256, self.bias.to(x.dtype))


def base_of(kind: str, n_in: int = 6, n_out: int = 4) -> nn.Module:
    torch.manual_seed(0)
    if kind == "packed":
        return Packed(n_in, n_out)
    base = nn.Linear(n_in, n_out) if kind == "linear" else Conv1D(n_out, n_in)
    nn.init.normal_(base.bias)
    return base.double()


def layer(dropout: float = 0.0, kind: str = "linear") -> LowRankLinear:
    pair = nn.Parameter(A.clone()), nn.Parameter(BT.clone())
    return LowRankLinear(base_of(kind), *pair, alpha=6.0, dropout=dropout)


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
    torch.testing.assert_close(add_lowrank(linear(X, W, B_), X, A, BT, 3.0, gate), expected)


@pytest.mark.parametrize("gate_shape", [(), (2,), (2, 2)])
def test_first_and_second_derivatives_against_finite_differences(gate_shape):
    gate = torch.randn(gate_shape, dtype=torch.float64)
    inputs = [t.clone().requires_grad_() for t in (X[:1], A, BT, gate)]

    def function(x, a, bt, g):
        return add_lowrank(linear(x, W, B_), x, a, bt, 3.0, g)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_gate_gradient_is_the_inner_product_of_update_and_output_gradient():
    gate = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(5, 3, 4, dtype=torch.float64)
    add_lowrank(linear(X, W, B_), X, A, BT, 3.0, gate).backward(upstream)
    torch.testing.assert_close(gate.grad, (upstream * (3.0 * X @ A.T @ BT)).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_the_update_can_be_added_to_any_kind_of_linear_layer(kind):
    module = layer(kind=kind)
    assert is_linear(module.base) and features(module.base) == (6, 4)
    expected = module.base(X) + 3.0 * X @ A.T @ BT
    torch.testing.assert_close(module(X), expected)
    assert (expected - module.base(X)).abs().max() > 1 and module.delta().shape == (4, 6)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("gate", GATES)
def test_merge_changes_the_weight_not_the_output_and_unmerge_restores_it(gate, kind):
    module = layer(kind=kind)
    module.gate = gate
    weight, expected = module.base.weight.clone(), module(X)
    module.merge()
    module.merge()  # twice is once
    torch.testing.assert_close(module(X), expected)
    assert (module.base.weight - weight).abs().max() > 0.1
    module.unmerge()
    torch.testing.assert_close(module.base.weight, weight)
    torch.testing.assert_close(module(X), expected)


def test_a_quantised_weight_is_never_read():
    module = layer(kind="packed")
    for touch in (module.merge, lambda: weight_of(module.base)):
        with pytest.raises(UserError, match="the weight of a Packed is quantised"):
            touch()
    assert not module.merged
    scaled = nn.Linear(4, 4)  # float8 weights have a separate scale
    scaled.weight = nn.Parameter(scaled.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UserError, match="quantised"):
        weight_of(scaled)


def test_is_linear():
    attention = nn.MultiheadAttention(4, 2)  # its projection is never called, so an update would have no effect
    others = [attention, attention.out_proj, nn.Conv1d(4, 4, 1), nn.Bilinear(2, 2, 2), nn.Embedding(3, 4), nn.ReLU()]
    assert not any(map(is_linear, others))
    torch.testing.assert_close(weight_of(base_of("conv1d")), base_of("conv1d").weight.T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [None, (torch.tensor([1]), torch.tensor([0]))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_backbones_train_full_precision_adapters(kind, rows, dtype):
    exact, module = layer(kind=kind), layer(kind=kind)
    if kind != "packed":
        module.base.to(dtype)
    for parameter in (module.lora_a, module.lora_bt):
        parameter.data = parameter.data.float()
    exact.rows = module.rows = rows
    upstream = torch.randn(5, 3, 4, dtype=torch.float64)
    exact(X).backward(upstream)
    y = module(X.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact(X), rtol=0.05, atol=0.15)
    y.backward(upstream.to(dtype))
    for name in ("lora_a", "lora_bt"):
        ours, theirs = getattr(module, name).grad, getattr(exact, name).grad
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=0.05, atol=1.0)  # sums of 15 numbers near 10
        assert theirs.abs().max() > 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate", [None, torch.tensor(0.3), torch.tensor([0.3, -2.0]), torch.eye(2)])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_under_autocast_the_update_has_its_precision(kind, gate, stored):
    module = layer(kind=kind).float()
    if kind != "packed":
        module.base.to(stored)
    module.gate = gate
    expected = layer(kind=kind)
    expected.gate = None if gate is None else gate.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(X.float())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected(X), rtol=0.05, atol=0.2)
    y.float().sum().backward()
    assert module.lora_a.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_derivative(kind):
    """First and second derivatives, for a gate whose graph the first backward pass has freed."""
    gate = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def derivatives(run):
        module = layer(dropout=0.5, kind=kind)
        module.gate = gate
        torch.manual_seed(0)
        loss = run(module, X).square().sum()
        first = torch.autograd.grad(loss, [module.lora_a, module.lora_bt], create_graph=True)
        return *first, *torch.autograd.grad(sum(g.square().sum() for g in first), [gate, module.lora_a])

    plain = derivatives(lambda module, x: module(x))
    again = derivatives(lambda module, x: checkpoint(module, x, use_reentrant=False))
    for ours, theirs in zip(again, plain, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert theirs.abs().max() > 0.1


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


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_hook_on_the_base_layer_still_runs(kind):
    module, calls = layer(), []
    expected = module(X)
    handle = getattr(module.base, f"register_{kind}_hook")(lambda *args: calls.append(1))
    y = module(X.clone().requires_grad_())
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    assert len(calls) == 1
    handle.remove()
    module(X).sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_trainable_parameters_of_the_base_layer_get_gradients(name):
    module = layer()
    parameter = getattr(module.base, name).requires_grad_()
    found = torch.autograd.grad(module(X).square().sum(), parameter)
    update = (module(X) - module.base(X)).detach()
    torch.testing.assert_close(found, torch.autograd.grad((module.base(X) + update).square().sum(), parameter))


class Quantised(torch.Tensor):
    """A weight of a special class, as in torchao. Its true values are twice its entries; only `linear` uses them."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is linear:
            x, weight, bias = args
            return linear(x, 2 * weight.as_subclass(torch.Tensor), bias)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("tokens", [1, 50])  # not folded, folded
def test_a_weight_that_becomes_quantised_is_not_read(tokens):
    module = layer()
    x = torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True)
    expected = linear(x, 2 * module.base.weight + module.delta(), module.base.bias)
    module.base.weight = nn.Parameter(module.base.weight.detach().as_subclass(Quantised), requires_grad=False)
    y = module(x)
    torch.testing.assert_close(y, expected)
    inputs = [x, module.lora_a]
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), inputs) for out in (y, expected)))


def test_weights_that_are_not_parameters():
    """This is so in replicas of `nn.DataParallel`, and with pruning and parametrisation."""
    module = layer()
    expected = module(X)
    replica, replica.base = module._replicate_for_data_parallel(), module.base._replicate_for_data_parallel()
    for name in ("lora_a", "lora_bt"):
        setattr(replica, name, getattr(module, name).clone())
    for name in ("weight", "bias"):
        setattr(replica.base, name, getattr(module.base, name).clone())
    assert not replica._parameters
    torch.testing.assert_close(replica(X), expected)

    prune.l1_unstructured(module.base, "weight", 0.5)
    parametrize.register_parametrization(module, "lora_a", nn.Tanh())
    expected = linear(X, module.base.weight, module.base.bias) + 3.0 * X @ A.tanh().T @ BT
    torch.testing.assert_close(module(X), expected)
    prune.remove(module.base, "weight")
    parametrize.register_parametrization(module.base, "bias", nn.Tanh())
    expected = linear(X, module.base.weight, module.base.bias) + 3.0 * X @ A.tanh().T @ BT
    torch.testing.assert_close(module(X), expected)


def test_masks_cannot_be_combined_with_a_gate():
    module = layer()
    module.gate, module.rows = torch.tensor(0.3), (torch.tensor([1]), torch.tensor([0]))
    with pytest.raises(AssertionError, match="masks"):
        module(X)


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


def test_attach_without_sharing_does_not_change_unselected_modules():
    net = Net()
    layers = attach(net, NAMES, MASK, rank=3, shared_rank=None, alpha=6)
    assert layers[0][1] is None and isinstance(net.get_submodule("layers.0.f"), nn.Linear)
    assert [name for name, _ in lowrank_layers(net)] == ["layers.0.q", "layers.2.q", "layers.2.f"]


def test_attach_freezes_the_rest_but_not_earlier_adapters():
    """B16: all weights of a new model stayed trainable."""
    net, other = Net(), Net()
    both = nn.ModuleDict({"net": net, "other": other, "head": nn.Linear(4, 2)})
    first = attach(both, [[f"net.{name}" for name in row] for row in NAMES], MASK, 3, None, 6)
    first[0][0].gate = nn.Parameter(torch.ones(3))
    first[2][1].lora_a.requires_grad_(False)  # as LoRA-FA does
    attach(both, [["other.layers.0.q"]], torch.ones(1, 1, dtype=torch.bool), 3, None, 6)
    trained = {name for name, p in both.named_parameters() if p.requires_grad}
    places = ["net.layers.0.q", "net.layers.2.q", "net.layers.2.f", "other.layers.0.q"]
    expected = {f"{place}.{name}" for place in places for name in ("lora_a", "lora_bt")}
    assert trained == expected - {"net.layers.2.f.lora_a"} | {"net.layers.0.q.gate"}
    detach(both)
    assert not any(p.requires_grad for p in both.parameters())


def test_attach_with_freeze_false_does_not_freeze_the_rest():
    net = Net()
    attach(net, NAMES, MASK, 3, None, 6, freeze=False)
    trained = {name for name, p in net.named_parameters() if p.requires_grad and "lora" not in name}
    assert trained == {f"layers.{i}.{n}.{p}" for i, n in ((0, "f"), (1, "q"), (1, "f")) for p in ("weight", "bias")}


def test_a_module_in_two_places_is_adapted_and_detached_in_both():
    net = Net()
    net.layers[1]["q"] = net.layers[0]["q"]
    x, before = torch.randn(2, 4), [name for name, _ in net.named_parameters(remove_duplicate=False)]
    plain = net(x)
    (layers,) = attach(net, [["layers.0.q"]], torch.ones(1, 1, dtype=torch.bool), 2, None, 4)
    assert net.layers[1]["q"] is net.layers[0]["q"] is layers[0]
    nn.init.normal_(layers[0].lora_bt)
    adapted = net(x)
    layers[0].merge()
    torch.testing.assert_close(net(x), adapted)
    detach(net)
    torch.testing.assert_close(net(x), plain)
    assert [name for name, _ in net.named_parameters(remove_duplicate=False)] == before


@pytest.mark.parametrize(
    ("names", "problems"),
    [
        (["layers.0.q", "layers.9.q", "nope"], ["layers.9.q is not a module", "nope is not a module"]),
        (["layers.0.q", "layers.0"], ["layers.0 is a ModuleDict, not a linear layer"]),
        (["layers.0.q", "layers.2.q"], ["layers.2.q is the same module as layers.0.q"]),
        (["layers.0.q", "layers.1.f"], ["layers.1.f has a low-rank layer already"]),
        (["layers.0.q", "layers.1.f.base"], ["layers.1.f.base has a low-rank layer already"]),
    ],
)
def test_modules_that_cannot_be_adapted_are_named_and_the_model_is_unchanged(names, problems):
    net = Net()
    net.layers[2]["q"] = net.layers[0]["q"]
    attach(net, [["layers.1.f"]], torch.ones(1, 1, dtype=torch.bool), 2, None, 4, freeze=False)
    before = [(name, type(module)) for name, module in net.named_modules()]
    with pytest.raises(UserError) as error:
        attach(net, [names], torch.ones(1, len(names), dtype=torch.bool), 2, None, 4)
    assert all(any(problem in line for line in error.value.problems) for problem in problems)
    assert len(error.value.problems) == len(problems)
    assert [(name, type(module)) for name, module in net.named_modules()] == before
    assert net.layers[0]["f"].weight.requires_grad


@pytest.mark.parametrize("shape", [(2, 2), (3, 1), (6,)])
def test_a_selection_of_another_grid_is_refused(shape):
    with pytest.raises(UserError, match="selected is "):
        attach(Net(), NAMES, torch.ones(shape, dtype=torch.bool), 2, None, 4)


def test_a_new_a_is_uniform_up_to_one_over_the_root_of_its_inputs_as_in_lora():
    torch.manual_seed(0)
    lora_a, lora_bt = new_pair(nn.Linear(400, 30), 8)
    bound = 1 / 400**0.5
    assert 0.99 * bound < lora_a.abs().max() <= bound and not lora_bt.any()
    assert lora_a.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)


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


def test_low_rank_layers_keep_the_mode_of_the_replaced_layer():
    """A model from `from_pretrained` is in eval mode. With dropout on the adapters, its predictions would be random."""
    for training in (False, True):
        model = nn.Sequential(nn.Linear(4, 4)).train(training)
        attach(model, [["0"]], torch.ones(1, 1, dtype=torch.bool), 2, None, 4, dropout=0.5)
        assert model[0].training is training
        nn.init.normal_(model[0].lora_bt)
        x = torch.ones(8, 4)
        assert torch.equal(model(x), model(x)) is not training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selected": torch.rand(1, 1)}, "selected must be a boolean tensor.*discretise"),
        ({"selected": [[True]]}, "it is list"),
        ({"rank": 0}, "rank=0 must be"),
        ({"rank": True}, "rank=True must be"),
        ({"shared_rank": 2.5}, "shared_rank=2.5 must be"),
        ({"alpha": float("nan")}, "alpha=nan must be"),
        ({"alpha": 0}, "alpha=0 must be"),
        ({"dropout": 1.0}, "dropout=1.0 must be"),
        ({"rank": 4}, "rank=4 must not be above 3, the smaller width of 0: more adds nothing"),
        ({"selected": torch.zeros(1, 1, dtype=torch.bool), "shared_rank": 4}, "shared_rank=4 must not be above 3"),
    ],
)
def test_attach_refuses_impossible_ranks_and_scales(changes, message):
    model = nn.Sequential(nn.Linear(4, 3))
    settings = {"selected": torch.ones(1, 1, dtype=torch.bool), "rank": 2, "shared_rank": None, "alpha": 4} | changes
    with pytest.raises(UserError, match=message):
        attach(model, [["0"]], **settings)
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


def test_a_merged_layer_is_not_saved():
    model = nn.Sequential(nn.Linear(4, 4))
    attach(model, [["0"]], torch.ones(1, 1, dtype=torch.bool), 2, None, 4)
    model[0].merge()
    with pytest.raises(UserError, match="added once more after loading; call unmerge"):
        model.state_dict()
    model[0].unmerge()
    assert "0.lora_a" in model.state_dict()


def test_a_merged_layer_loads_no_state():
    """Its base weight would be replaced by one without the update, and it would still count as merged."""
    layer = LowRankLinear(nn.Linear(4, 3), nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(2, 3)), alpha=2)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.merge()
    with pytest.raises(UserError, match=r"call unmerge\(\) first"):
        layer.load_state_dict(state)
    layer.unmerge()
    layer.load_state_dict(state)


def test_a_layer_says_its_widths_as_a_linear_layer_does():
    layer = LowRankLinear(nn.Linear(4, 3), nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(2, 3)), alpha=2)
    assert (layer.in_features, layer.out_features) == (4, 3)


def test_gradients_of_single_examples_by_torch_func_are_those_of_a_loop():
    low = layer()
    x = torch.randn(3, 6).double()
    values = {name: p for name, p in low.named_parameters() if p.requires_grad}

    def loss(values, row):
        return torch.func.functional_call(low, values, (row[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, x)
    for i, row in enumerate(x):
        wanted = torch.autograd.grad(low(row[None]).square().sum(), list(values.values()))
        for each, one in zip(found.values(), wanted, strict=True):
            torch.testing.assert_close(each[i], one)


def test_a_batch_without_tokens_gives_gradients_of_zero():
    low = layer()
    low(torch.zeros(0, 6).double()).sum().backward()
    assert not low.lora_a.grad.any() and not low.lora_bt.grad.any()
