"""The fused layers compute what the plain formula does, and keep and form no more than they need."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, linear
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from diffora.core import fused
from diffora.core.dropout import noise_like
from diffora.core.fused import Member, lowrank_linear
from diffora.core.lowrank import LowRankLinear, add_lowrank, attach, new_pair
from diffora.core.peers import Peers, rehearse

B, S, IN = 6, 3, 8
SIZES = [(4, 2), (10, 2), (4, 5)]  # (out, rank) of three layers that read the same x


def tensor(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + 7 * sum(shape)))


def leaf(*shape, seed=0):
    return tensor(*shape, seed=seed).requires_grad_()


def members(sizes=SIZES, gate=True, base=None):
    made = []
    for i, (out, rank) in enumerate(sizes):
        given = None if base is None else base[i]
        weight, bias = (tensor(out, IN, seed=i), tensor(out, seed=i)) if given is None else (None, None)
        if i == 2:
            bias = None
        pair = leaf(rank, IN, seed=i), leaf(rank, out, seed=10 + i)
        made.append(Member(weight, bias, given, *pair, leaf(1, seed=20 + i)[0] if gate else None, 1.5 + i))
    return made


def leaves(made):
    """Every leaf that is trained; a gate is a view of one."""
    return [t for m in made for t in (m.lora_a, m.lora_bt, m.gate) if t is not None]


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
    x, made = leaf(B, S, IN), members(sizes, gate)
    ours, theirs = lowrank_linear(x, made), plain(x, made)
    torch.testing.assert_close(list(ours), theirs)
    inputs = [x, *leaves(made)]
    torch.testing.assert_close(gradients(ours, inputs), gradients(theirs, inputs))


def test_gradients_against_finite_differences(folding):
    x, made = leaf(2, 2, IN), members()
    inputs = leaves(made)

    def outputs(x, *values):
        it = iter(values)
        return lowrank_linear(x, [m._replace(lora_a=next(it), lora_bt=next(it), gate=next(it)) for m in made])

    values = [v.detach().requires_grad_() for v in inputs]
    assert torch.autograd.gradcheck(outputs, (x, *values))
    assert torch.autograd.gradgradcheck(outputs, (x, *values))


def test_beside_a_base_that_cannot_be_read():
    x = leaf(B, S, IN)
    hidden = tensor(B, S, 4) * x.sum(-1, keepdim=True)
    made = members(SIZES[:1], base=[hidden])
    inputs = [x, *leaves(made)]
    ours = gradients(lowrank_linear(x, made), inputs)
    hidden = tensor(B, S, 4) * x.sum(-1, keepdim=True)
    torch.testing.assert_close(ours, gradients(plain(x, [made[0]._replace(base=hidden)]), inputs))


def test_an_output_that_is_not_used_gets_no_gradient(folding):
    x, made = leaf(B, S, IN), members()
    inputs = [x, *leaves(made)]
    torch.testing.assert_close(gradients(lowrank_linear(x, made)[1:2], inputs), gradients(plain(x, made)[1:2], inputs))


@pytest.mark.parametrize("split", [0, 2, B])
def test_a_split_trains_factors_by_the_first_examples_and_gates_by_the_others(folding, split):
    x, made = leaf(B, S, IN), members()
    inputs = [x, *leaves(made)]
    grad_x, *ours = gradients(lowrank_linear(x, made, split=split), inputs)

    train = [m._replace(gate=m.gate.detach()) for m in made]
    valid = [m._replace(lora_a=m.lora_a.detach(), lora_bt=m.lora_bt.detach()) for m in made]
    joined = [torch.cat(pair) for pair in zip(plain(x[:split], train), plain(x[split:], valid), strict=True)]
    expected_x, *expected = gradients(joined, inputs)
    torch.testing.assert_close(grad_x, expected_x)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(torch.zeros_like(theirs) if mine is None else mine, theirs)


def saved_by(function):
    """What autograd keeps of a computation, one entry for each storage."""
    found = {}

    def pack(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = function()
    return found, outputs


def test_only_what_the_gradients_need_is_kept():
    x, made = leaf(50, 20, IN), members()
    weights = {t.untyped_storage().data_ptr() for m in made for t in m[:6] if t is not None}
    ranks, tokens = sum(rank for _, rank in SIZES), 50 * 20

    def kept(made, split=None):
        found, _ = saved_by(lambda: lowrank_linear(x, made, split=split))
        large = [size for at, size in found.items() if at not in weights and size > 8 * IN * 20]
        return sum(large), x.untyped_storage().data_ptr() in found

    assert kept(made) == (8 * tokens * (IN + ranks), True)
    frozen = [m._replace(lora_a=m.lora_a.detach(), lora_bt=m.lora_bt.detach()) for m in made]
    assert kept(frozen) == (8 * tokens * ranks, False)
    assert kept(made, split=20) == (8 * (20 * 20 * IN + tokens * ranks), False)


def test_no_gradient_of_the_other_level_is_formed(folding):
    """Counted in multiplications."""

    def flops(made):
        x = leaf(B, S, IN)
        outputs = lowrank_linear(x, made)
        with FlopCounterMode(display=False) as counter:
            torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
        return counter.get_total_flops()

    made = members()
    gates = flops([m._replace(lora_a=m.lora_a.detach(), lora_bt=m.lora_bt.detach()) for m in made])
    factors = flops([m._replace(gate=m.gate.detach()) for m in made])
    # The product with x that gives the gradient of A; and the one before it, unless the gradient of x needs it too.
    saved = sum(2 * B * S * rank * (IN + (out if fused.FOLD_FROM == 0 else 0)) for out, rank in SIZES)
    assert factors - gates == saved
    assert flops(made) == factors  # the product for the gradient of B gives the gate's


@pytest.mark.parametrize("kind", ["none", "tanh"])
@pytest.mark.parametrize("split", [None, 2])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_behind_a_gelu_the_search_keeps_nothing_more(kind, split, checkpointed):
    before, made = leaf(B, S, IN), members()
    inputs = [before, *leaves(made)]

    def run(before, more=0):
        return lowrank_linear(gelu(before * 2, approximate=kind) + more, made, split=split)

    # Behind an addition it is a plain copy.
    expected = gradients(run(before, torch.zeros(())), inputs)
    ours = checkpoint(run, before, use_reentrant=False) if checkpointed else run(before)
    torch.testing.assert_close(gradients(ours, inputs), expected)

    x = gelu(before * 2, approximate=kind)
    y = lowrank_linear(x, made, split=split)[0]
    assert y.grad_fn.saved_tensors[0].data_ptr() == x.grad_fn._saved_self.data_ptr()
    y = lowrank_linear(x + 0, made, split=split)[0]
    assert y.grad_fn.saved_tensors[0].shape == x[:split].shape
    without = [m._replace(gate=None) for m in made]
    assert lowrank_linear(x, without)[0].grad_fn.saved_tensors[0].data_ptr() == x.data_ptr()


def test_behind_a_gelu_differentiable_twice():
    before, made = leaf(2, 2, IN), members()
    outputs = lambda before: lowrank_linear(gelu(before), made)  # noqa: E731
    assert torch.autograd.gradgradcheck(outputs, (before,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(dtype):
    torch.manual_seed(0)
    x = torch.ones(400, 64, dtype=dtype)
    made = Member(torch.zeros(64, 64, dtype=dtype), None, None, torch.eye(64), torch.eye(64), None, 1.0)
    (y,) = lowrank_linear(x, [made], dropout=0.25)
    dropped = (y == 0).float()
    assert dropped.mean().item() == pytest.approx(0.25, abs=4 * (0.1875 / x.numel()) ** 0.5)
    assert y.max().item() == pytest.approx(4 / 3, rel=1e-2)
    # Elements are dropped independently: neighbours as often together as chance has it.
    together = (dropped[:, 1:] * dropped[:, :-1]).mean().item()
    assert together == pytest.approx(0.0625, abs=4 * (0.0625 / x.numel()) ** 0.5)


def test_dropout_is_the_same_forward_and_backward():
    x, made = leaf(2, 2, IN), members()

    def outputs(x):
        torch.manual_seed(3)
        return lowrank_linear(x, made, dropout=0.5)

    assert torch.autograd.gradcheck(outputs, (x,))
    assert torch.autograd.gradgradcheck(outputs, (x,))
    torch.manual_seed(3)
    inputs = [x, *leaves(made)]
    y = lowrank_linear(x, made, dropout=0.5)
    torch.manual_seed(3)
    mask = (noise_like(x.detach().reshape(-1, IN)) >= 128).view_as(x) * 2.0
    expected = [
        linear(x, m.weight, m.bias) + m.scaling * (linear(x * mask, m.lora_a) @ (m.gate * m.lora_bt)) for m in made
    ]
    torch.testing.assert_close(list(y), expected)
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
        for m in members()
    ]
    inputs = [x, *leaves(made)]
    results = []
    for function in (lowrank_linear, plain):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = function(x, made)
        assert {y.dtype for y in outputs} == {torch.bfloat16}
        results.append(gradients([y.float() for y in outputs], inputs))
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine - theirs).norm() <= 0.03 * theirs.norm()


def test_half_precision_weights_do_not_swallow_a_small_update():
    """Why nothing is folded there: W + s B A would round to W."""
    weight = torch.full((64, 64), 1.0, dtype=torch.bfloat16)
    x = torch.ones(128, 64, dtype=torch.bfloat16) / 64
    made = Member(weight, None, None, torch.full((1, 64), 1e-3), torch.full((1, 64), 1.0), None, 1.0)
    (y,) = lowrank_linear(x, [made])
    (without,) = lowrank_linear(x, [made._replace(lora_bt=torch.zeros(1, 64))])
    assert (linear(x, weight + (made.lora_bt.T @ made.lora_a).bfloat16()) - without).abs().max() == 0
    assert (lowrank_linear(x.float(), [made._replace(weight=weight.float())])[0] - without).abs().min() > 9e-4
    assert y.shape == without.shape


# --- peers ---


class Attention(nn.Module):
    """Query, key and value read one x, then query and key a table, as DeBERTa's; or key and value another x (cross)."""

    def __init__(self, cross=False):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value = (nn.Linear(IN, IN) for _ in range(3))
        self.out = nn.Linear(IN, IN)
        self.table = nn.Parameter(tensor(1, 5, IN, dtype=torch.float32))
        self.cross = cross

    def forward(self, x):
        other = x.flip(1) if self.cross else x
        q, k, v = self.query(x), self.key(other), self.value(other)
        bias = 0 if self.cross else self.query(self.table).sum() + self.key(self.table).sum()
        return self.out(torch.softmax(q @ k.transpose(1, 2) + bias, -1) @ v)


def adapted(cross=False, dropout=0.0):
    model = Attention(cross).double().requires_grad_(False)
    names = ["query", "key", "value", "out"]
    attach(model, [names], torch.ones(1, 4, dtype=torch.bool), 2, None, 4.0, dropout)
    for name in names:
        layer = getattr(model, name)
        layer.lora_a.data = tensor(2, IN, seed=1)
        layer.lora_bt.data = tensor(2, IN, seed=2)
    return model


@pytest.mark.parametrize("cross", [False, True])
def test_layers_that_read_the_same_are_computed_together(cross, monkeypatch):
    together, alone = adapted(cross), adapted(cross)
    for module in alone.modules():
        if isinstance(module, LowRankLinear):
            module.peers = None
    seen = []
    real = LowRankLinear._together

    def watched(self, layers, x):
        seen.append(len(layers))
        return real(self, layers, x)

    monkeypatch.setattr(LowRankLinear, "_together", watched)
    x = tensor(B, S, IN)
    for turn in range(3):
        results = []
        for model in (together, alone):
            seen.clear()
            inputs = [x.clone().requires_grad_(), *(p for p in model.parameters() if p.requires_grad)]
            y = model(inputs[0])
            results.append((y, *torch.autograd.grad((y**2).sum(), inputs)))
            if model is together and turn:
                assert sorted(seen) == ([1, 1, 2] if cross else [1, 1, 2, 2])
        torch.testing.assert_close(*results)


def test_a_layer_called_otherwise_than_foreseen_computes_by_itself():
    model = adapted()
    x = tensor(B, S, IN)
    for _ in range(2):
        model(x)
    peers = model.query.peers
    expected = [model.key(x + 1), model.value(x + 2)]
    model.query(x)  # the key of x is ready now
    torch.testing.assert_close([model.key(x + 1), model.value(x + 2)], expected)
    x.add_(1)  # the tensor is the same, its content is not
    model.query(x - 1)
    torch.testing.assert_close(model.key(x), expected[0])
    assert peers._ready == {}


def test_a_copy_of_the_model_has_peers_of_its_own():
    model = adapted()
    x = tensor(B, S, IN)
    for _ in range(2):
        model(x)
    model.query(x)
    other = copy.deepcopy(model)
    assert other.query.peers is other.key.peers is not model.query.peers
    for p in other.parameters():
        p.data.mul_(2)
    fresh = adapted()
    for p in fresh.parameters():
        p.data.mul_(2)
    torch.testing.assert_close(other(x), fresh(x))


def test_nothing_is_kept_alive_after_a_pass():
    import weakref

    model = adapted()
    for _ in range(3):
        x = tensor(B, S, IN).requires_grad_()
        y = model(x)
        at = weakref.ref(x)
        del x, y
        assert at() is None


def test_under_checkpointing_and_without_gradients_the_same():
    model = adapted()
    x = tensor(B, S, IN).requires_grad_()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for _ in range(2):
        y = model(x)
        expected = torch.autograd.grad((y**2).sum(), [x, *parameters])
        again = checkpoint(model, x, use_reentrant=False)
        torch.testing.assert_close(torch.autograd.grad((again**2).sum(), [x, *parameters]), expected)
        with torch.no_grad():
            torch.testing.assert_close(model(x), y)
        with torch.inference_mode():
            torch.testing.assert_close(model(x).clone(), y)


def test_peers_share_a_mask():
    model = adapted(dropout=0.5).train()
    x = tensor(B, S, IN)
    for _ in range(2):
        model(x)
    for layer in (model.query, model.key):
        layer.lora_a.data = torch.eye(2, IN, dtype=torch.float64)
    updates = [layer(x) - layer.base(x) for layer in (model.query, model.key)]
    torch.testing.assert_close(*updates)


def test_a_hook_on_the_base_layer_still_runs():
    base = nn.Linear(IN, IN)
    layer = LowRankLinear(base, *new_pair(base, 2), alpha=2.0)
    seen = []
    handle = base.register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(2, IN)
    with_hook = layer(x)
    assert len(seen) == 1
    handle.remove()
    torch.testing.assert_close(layer(x), with_hook)
    assert len(seen) == 1


def test_a_peer_whose_base_gets_a_hook_or_a_gradient_is_not_read(folding):
    model, alone = adapted(), adapted()
    for module in alone.modules():
        if isinstance(module, LowRankLinear):
            module.peers = None
    x = tensor(B, S, IN).requires_grad_()
    rehearse(model, x)
    model.key.base.register_forward_hook(lambda module, args, output: output * 2)
    alone.key.base.register_forward_hook(lambda module, args, output: output * 2)
    with torch.no_grad():
        torch.testing.assert_close(model(x), alone(x))
    results = []
    for each in (model, alone):
        weight = each.query.base.weight.requires_grad_()
        inputs = [x, weight, *(p for p in each.parameters() if p.requires_grad and p is not weight)]
        results.append(torch.autograd.grad((each(x) ** 2).sum(), inputs))
    torch.testing.assert_close(*results)


def test_peers_guess_wrong_only_once():
    peers, calls = Peers(), []

    def compute(layers, x):
        calls.append("".join(layers))
        return tuple(x for _ in layers)

    def call(**inputs):
        for name, value in inputs.items():
            assert peers(name, value, compute) is value

    x, table, late = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    call(q=x, k=x, v=x)
    assert calls == ["q", "k", "v"]
    calls.clear()
    call(q=table, k=table)  # wrong: the value is made for nothing
    for fresh in (torch.zeros(1), torch.zeros(1)):
        call(q=fresh, k=fresh, v=fresh)
        call(q=table, k=table)
    assert calls == ["qkv", "qk", "v", "qk", "qk", "v", "qk"]
    calls.clear()
    call(q=x, k=late)
    call(q=x, k=x)
    assert calls == ["qk", "k", "q", "k"]


def test_inside_a_checkpoint_nothing_is_learned():
    model = adapted()
    x = tensor(B, S, IN).requires_grad_()
    expected = torch.autograd.grad(model.query.base(x).sum(), x)[0].shape
    for _ in range(2):  # not seen before, and seen in the second pass of the first
        assert torch.autograd.grad(checkpoint(model, x, use_reentrant=False).sum(), x)[0].shape == expected
    assert all(len(run) == 1 for run in model.query.peers._runs.values())
    rehearse(model, x)
    checkpoint(model, x, use_reentrant=False).sum().backward()
    assert max(len(run) for run in model.query.peers._runs.values()) == 2


def test_a_rehearsal_settles_what_is_computed_together():
    """So that all steps after it round alike, which resuming to the bit depends on."""
    model = adapted(dropout=0.5).train()
    rehearse(model, tensor(B, S, IN))
    assert model.training and model.query.training
    together = [run for run in model.query.peers._runs.values() if len(run) > 1]
    assert together == [[model.query, model.key]]
    state = torch.get_rng_state()
    rehearse(model, tensor(B, S, IN))
    assert torch.equal(torch.get_rng_state(), state)
    model(tensor(B + 1, S, IN))
    assert together == [run for run in model.query.peers._runs.values() if len(run) > 1]
