"""The fused node gives the results of the plain formula, and saves and computes only what it needs."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from diffora.core.lowrank import add_lowrank
from diffora.kernels import fused
from diffora.kernels.dropout import noise_like

B, S, IN = 6, 3, 8
SIZES = [(4, 2), (10, 2), (4, 5)]  # (out, rank) of three layers that read the same x


def tensor(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + 7 * sum(shape)))


def leaf(*shape, seed=0):
    return tensor(*shape, seed=seed).requires_grad_()


class Layer(NamedTuple):
    lora_a: Tensor
    lora_bt: Tensor
    gate: Tensor | None
    scaling: float
    weight: Tensor | None
    bias: Tensor | None = None
    base: Tensor | None = None


def layers(sizes=SIZES, gate=True, base=None):
    made = []
    for i, (out, rank) in enumerate(sizes):
        given = None if base is None else base[i]
        weight, bias = (tensor(out, IN, seed=i), tensor(out, seed=i)) if given is None else (None, None)
        if i == 2:
            bias = None
        pair = leaf(rank, IN, seed=i), leaf(rank, out, seed=10 + i)
        made.append(Layer(*pair, leaf(1, seed=20 + i)[0] if gate else None, 1.5 + i, weight, bias, given))
    return made


def leaves(made):
    """Every trained leaf. A gate is a view of one."""
    return [t for m in made for t in (m.lora_a, m.lora_bt, m.gate) if t is not None]


def node(x, made, **settings):
    """The outputs of several layers that read the same x."""
    return [fused.lowrank_linear(x, **m._asdict(), **settings) for m in made]


def plain(x, made):
    outputs = []
    for m in made:
        base = linear(x, m.weight, m.bias) if m.weight is not None else m.base
        outputs.append(add_lowrank(base, x, m.lora_a, m.lora_bt, m.scaling, m.gate))
    return outputs


def gradients(outputs, inputs):
    loss = sum((y * tensor(*y.shape, seed=i)).sum() + (y**2).sum() for i, y in enumerate(outputs))
    return torch.autograd.grad(loss, inputs, allow_unused=True)


@pytest.fixture(params=[0.0, math.inf], ids=["folded", "added"])
def folding(request, monkeypatch):
    monkeypatch.setattr(fused, "FOLD_FROM", request.param)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("sizes", [SIZES[:1], SIZES])
def test_equals_the_plain_formula(folding, sizes, gate):
    x, made = leaf(B, S, IN), layers(sizes, gate)
    ours, theirs = node(x, made), plain(x, made)
    torch.testing.assert_close(ours, theirs)
    inputs = [x, *leaves(made)]
    torch.testing.assert_close(gradients(ours, inputs), gradients(theirs, inputs))


def test_gradients_against_finite_differences(folding):
    x, made = leaf(2, 2, IN), layers()
    inputs = leaves(made)

    def outputs(x, *values):
        it = iter(values)
        return tuple(node(x, [m._replace(lora_a=next(it), lora_bt=next(it), gate=next(it)) for m in made]))

    values = [v.detach().requires_grad_() for v in inputs]
    assert torch.autograd.gradcheck(outputs, (x, *values))
    assert torch.autograd.gradgradcheck(outputs, (x, *values))


@pytest.mark.parametrize("case", ["base", "twice", "tied"])
def test_first_derivatives_are_equal_with_create_graph(folding, case):
    """Also if x, or the output of the base layer, was computed from the same trained tensors."""
    x, (made, other) = leaf(2, 2, IN), layers([(IN, 2), (IN, 2)])
    weight, bias = made.weight, made.bias

    def outputs(x, lora_a, lora_bt, gate):
        member = made._replace(lora_a=lora_a, lora_bt=lora_bt, gate=gate)
        if case == "base":
            return tuple(node(x, [member._replace(weight=None, bias=None, base=linear(x, weight, bias))]))
        if case == "twice":
            (x,) = node(x, [member])
        return tuple(node(x, [member, other._replace(lora_a=lora_a, lora_bt=lora_bt, gate=gate)]))

    inputs = [x, *(t.detach().requires_grad_() for t in leaves([made]))]
    loss = sum((y**2).sum() for y in outputs(*inputs))
    once = torch.autograd.grad(loss, inputs, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs, create_graph=True), once)
    assert torch.autograd.gradgradcheck(outputs, inputs)


def test_with_a_base_layer_that_cannot_be_read():
    x = leaf(B, S, IN)
    hidden = tensor(B, S, 4) * x.sum(-1, keepdim=True)
    made = layers(SIZES[:1], base=[hidden])
    inputs = [x, *leaves(made)]
    ours = gradients(node(x, made), inputs)
    hidden = tensor(B, S, 4) * x.sum(-1, keepdim=True)
    torch.testing.assert_close(ours, gradients(plain(x, [made[0]._replace(base=hidden)]), inputs))


def test_an_output_that_is_not_used_gets_no_gradient(folding):
    x, made = leaf(B, S, IN), layers()
    inputs = [x, *leaves(made)]
    torch.testing.assert_close(gradients(node(x, made)[1:2], inputs), gradients(plain(x, made)[1:2], inputs))


@pytest.mark.parametrize("sizes", [SIZES[:1], SIZES])
def test_outputs_can_be_changed_in_place(folding, sizes):
    """Some backbones add to a query, or scale it."""
    x, made = leaf(B, S, IN), layers(sizes)
    inputs = [x, *leaves(made)]
    results = []
    for function in (node, plain):
        outputs = [y * 1 if function is plain else y for y in function(x, made)]
        outputs[-1].mul_(2).add_(1)
        results.append(gradients(outputs, inputs))
    torch.testing.assert_close(*results)


def test_a_batch_without_rows():
    x, made = leaf(0, S, IN), layers()
    for split in (None, 0):
        found = gradients(node(x, made, split=split), [x, *leaves(made)])
        assert found[0].shape == x.shape and all(g is None or not g.any() for g in found)


@pytest.mark.parametrize("split", [0, 2, B])
def test_a_split_trains_factors_by_the_first_examples_and_gates_by_the_others(folding, split):
    x, made = leaf(B, S, IN), layers()
    inputs = [x, *leaves(made)]
    grad_x, *ours = gradients(node(x, made, split=split), inputs)

    train = [m._replace(gate=m.gate.detach()) for m in made]
    valid = [m._replace(lora_a=m.lora_a.detach(), lora_bt=m.lora_bt.detach()) for m in made]
    joined = [torch.cat(pair) for pair in zip(plain(x[:split], train), plain(x[split:], valid), strict=True)]
    expected_x, *expected = gradients(joined, inputs)
    torch.testing.assert_close(grad_x, expected_x)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(torch.zeros_like(theirs) if mine is None else mine, theirs)


def saved_by(function):
    """The tensors that autograd saves during a computation, one for each storage."""
    found = {}

    def pack(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = function()
    return found, outputs


def test_only_tensors_that_the_gradients_need_are_saved():
    x, made = leaf(50, 20, IN), layers()
    weights = {t.untyped_storage().data_ptr() for m in made for t in m if isinstance(t, Tensor)}
    ranks, tokens = sum(rank for _, rank in SIZES), 50 * 20

    def kept(made, split=None):
        found, _ = saved_by(lambda: node(x, made, split=split))
        large = [size for at, size in found.items() if at not in weights and size > 8 * IN * 20]
        return sum(large), x.untyped_storage().data_ptr() in found

    assert kept(made) == (8 * tokens * (IN + ranks), True)
    frozen = [m._replace(lora_a=m.lora_a.detach(), lora_bt=m.lora_bt.detach()) for m in made]
    assert kept(frozen) == (8 * tokens * ranks, False)
    assert kept(made, split=20) == (8 * (20 * 20 * IN + tokens * ranks), False)
    base = leaf(50, 20, 4)
    found, _ = saved_by(lambda: node(x, [made[0]._replace(weight=None, bias=None, base=base)]))
    assert base.untyped_storage().data_ptr() not in found


def test_gradients_of_the_other_level_are_not_computed(folding):
    """The test counts multiplications."""

    def flops(made):
        x = leaf(B, S, IN)
        outputs = node(x, made)
        with FlopCounterMode(display=False) as counter:
            torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
        return counter.get_total_flops()

    made = layers()
    gates = flops([m._replace(lora_a=m.lora_a.detach(), lora_bt=m.lora_bt.detach()) for m in made])
    factors = flops([m._replace(gate=m.gate.detach()) for m in made])
    # The product with x for the gradient of A, and the product before it, unless the gradient of x needs that too.
    saved = sum(2 * B * S * rank * (IN + (out if fused.FOLD_FROM == 0 else 0)) for out, rank in SIZES)
    assert factors - gates == saved
    assert flops(made) == factors  # the product for the gradient of B also gives the gate's


@pytest.mark.parametrize("kind", ["none", "tanh"])
@pytest.mark.parametrize("split", [None, 2])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_after_a_gelu_the_search_saves_nothing_more(kind, split, checkpointed):
    before, made = leaf(B, S, IN), layers()
    inputs = [before, *leaves(made)]

    def run(before, more=0):
        return node(gelu(before * 2, approximate=kind) + more, made, split=split)

    # After an addition, the layer saves a plain copy.
    expected = gradients(run(before, torch.zeros(())), inputs)
    ours = checkpoint(run, before, use_reentrant=False) if checkpointed else run(before)
    torch.testing.assert_close(gradients(ours, inputs), expected)

    x = gelu(before * 2, approximate=kind)
    y = node(x, made, split=split)[0]
    assert y.grad_fn.saved_tensors[0].data_ptr() == x.grad_fn._saved_self.data_ptr()
    y = node(x + 0, made, split=split)[0]
    assert y.grad_fn.saved_tensors[0].shape == x[:split].shape
    without = [m._replace(gate=None) for m in made]
    assert node(x, without)[0].grad_fn.saved_tensors[0].data_ptr() == x.data_ptr()


def test_a_gelus_output_that_was_changed_in_place_is_used_as_it_is():
    before, made = leaf(B, S, IN), layers()
    x = gelu(before)
    with torch.no_grad():
        x.mul_(2)
    found = gradients(node(x, made), leaves(made))
    torch.testing.assert_close(found, gradients(plain(2 * gelu(before), made), leaves(made)))


def test_after_a_gelu_second_derivatives_are_exact():
    before, made = leaf(2, 2, IN), layers()
    outputs = lambda before: tuple(node(gelu(before), made))  # noqa: E731
    assert torch.autograd.gradgradcheck(outputs, (before,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(dtype):
    torch.manual_seed(0)
    x = torch.ones(400, 64, dtype=dtype)
    made = Layer(torch.eye(64), torch.eye(64), None, 1.0, torch.zeros(64, 64, dtype=dtype))
    (y,) = node(x, [made], dropout=0.25)
    dropped = (y == 0).float()
    assert dropped.mean().item() == pytest.approx(0.25, abs=4 * (0.1875 / x.numel()) ** 0.5)
    assert y.max().item() == pytest.approx(4 / 3, rel=1e-2)
    # Elements are dropped independently: two neighbours together as often as expected by chance.
    together = (dropped[:, 1:] * dropped[:, :-1]).mean().item()
    assert together == pytest.approx(0.0625, abs=4 * (0.0625 / x.numel()) ** 0.5)


def test_dropout_has_the_same_mask_forward_and_backward():
    x, made = leaf(2, 2, IN), layers()

    def outputs(x):
        torch.manual_seed(3)
        return tuple(node(x, made, dropout=0.5))

    assert torch.autograd.gradcheck(outputs, (x,))
    assert torch.autograd.gradgradcheck(outputs, (x,))
    torch.manual_seed(3)
    inputs = [x, *leaves(made)]
    y = node(x, made, dropout=0.5)
    torch.manual_seed(3)
    masks = [(noise_like(x.detach().reshape(-1, IN)) >= 128).view_as(x) * 2.0 for _ in made]  # one for each layer
    expected = [
        linear(x, m.weight, m.bias) + m.scaling * (linear(x * mask, m.lora_a) @ (m.gate * m.lora_bt))
        for m, mask in zip(made, masks, strict=True)
    ]
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(y, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_under_autocast_gradients_are_those_of_the_plain_formula_to_its_precision(weights):
    x = leaf(B, S, IN).detach().to(weights).requires_grad_()
    made = [
        m._replace(
            weight=m.weight.to(weights),
            bias=None if m.bias is None else m.bias.to(weights),
            lora_a=m.lora_a.detach().float().requires_grad_(),
            lora_bt=m.lora_bt.detach().float().requires_grad_(),
            gate=m.gate.detach().float().requires_grad_(),
        )
        for m in layers()
    ]
    inputs = [x, *leaves(made)]
    results = []
    for function in (node, plain):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = function(x, made)
        assert {y.dtype for y in outputs} == {torch.bfloat16}
        results.append(gradients([y.float() for y in outputs], inputs))
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine - theirs).norm() <= 0.03 * theirs.norm()


def test_a_small_update_is_not_lost_with_half_precision_weights():
    """This is why updates are not folded into half-precision weights: W + s B A would round to W."""
    weight = torch.full((64, 64), 1.0, dtype=torch.bfloat16)
    x = torch.ones(128, 64, dtype=torch.bfloat16) / 64
    made = Layer(torch.full((1, 64), 1e-3), torch.full((1, 64), 1.0), None, 1.0, weight)
    (y,) = node(x, [made])
    (without,) = node(x, [made._replace(lora_bt=torch.zeros(1, 64))])
    assert (linear(x, weight + (made.lora_bt.T @ made.lora_a).bfloat16()) - without).abs().max() == 0
    assert (node(x.float(), [made._replace(weight=weight.float())])[0] - without).abs().min() > 9e-4
    assert y.shape == without.shape
