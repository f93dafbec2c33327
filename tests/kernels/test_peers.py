"""Layers that read the same input are computed together, and nobody can tell but by the time it takes."""

import copy
import math
import weakref
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffora.core.lowrank import LowRankLinear, attach, set_split
from diffora.kernels import fused
from diffora.kernels.peers import Peers, rehearse

B, S, IN = 6, 3, 8


def tensor(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + 7 * sum(shape)))


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


def without_peers(model):
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            module.peers = None
    return model


@pytest.fixture
def seen(monkeypatch):
    """How many layers were computed together, call by call."""
    found, real = [], LowRankLinear._together

    def watched(self, layers, x, *base):
        found.append(len(layers))
        return real(self, layers, x, *base)

    monkeypatch.setattr(LowRankLinear, "_together", watched)
    return found


@pytest.mark.parametrize("cross", [False, True])
def test_layers_that_read_the_same_are_computed_together(cross, seen):
    together, alone = adapted(cross), without_peers(adapted(cross))
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


@pytest.mark.parametrize("fold_from", [0.0, math.inf])
def test_a_peer_whose_base_gets_a_hook_or_a_gradient_is_not_read(fold_from, monkeypatch):
    monkeypatch.setattr(fused, "FOLD_FROM", fold_from)
    model, alone = adapted(), without_peers(adapted())
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


class Named(str):
    """A layer as `Peers` sees it."""

    training, dropout, split, gate, readable = True, 0.0, None, None, True

    def versions(self):
        return 0, 0


def test_peers_guess_wrong_only_once():
    peers, calls = Peers(), []

    def compute(layers, x):
        calls.append("".join(layers))
        return tuple(x for _ in layers)

    def call(**inputs):
        for name, value in inputs.items():
            assert peers(Named(name), value, compute) is value

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


def test_a_rehearsal_leaves_every_module_in_its_mode():
    model = adapted().train()
    model.key.eval()

    def fail(*args):
        raise MemoryError

    for hook in (None, fail):
        handle = model.register_forward_hook(hook) if hook else None
        with pytest.raises(MemoryError) if hook else nullcontext():
            rehearse(model, tensor(B, S, IN))
        assert handle is None or handle.remove() is None
        assert model.training and model.query.training and not model.key.training


STATES = {
    "gradients": (torch.no_grad, lambda model: None),
    "inference": (torch.inference_mode, lambda model: None),
    "autocast": (partial(torch.autocast, "cpu", torch.bfloat16), lambda model: None),
    "training": (nullcontext, lambda model: model.eval()),
    "split": (nullcontext, lambda model: set_split([[model.key]], 2)),
    "factor": (nullcontext, lambda model: nn.init.ones_(model.key.lora_bt)),
    "gate": (nullcontext, lambda model: setattr(model.key, "gate", torch.tensor(0.5))),
}


@pytest.mark.parametrize("state", STATES)
def test_what_was_computed_in_another_state_is_not_handed_out(state):
    results = []
    before, change = STATES[state]
    for model in (adapted(dropout=0.5 if state == "training" else 0.0), without_peers(adapted())):
        x = tensor(B, S, IN)
        rehearse(model.train(), x)
        with before():
            model.query(x)
        change(model)
        y = model.key(x)
        results.append((y, *torch.autograd.grad(y.sum(), [model.key.lora_a, model.key.lora_bt])))
    torch.testing.assert_close(*results)


def test_an_input_that_does_not_tell_its_changes_is_read_each_time():
    model, alone = adapted(), without_peers(adapted())
    rehearse(model, tensor(B, S, IN))
    with torch.inference_mode():
        x = tensor(B, S, IN) + 1
        model.query(x)
        x.add_(1)
        torch.testing.assert_close(model.key(x), alone.key(x))


def test_nothing_leaves_a_checkpoint(seen):
    """What one of them saved cannot be made again in another."""
    model = adapted()
    x = tensor(B, S, IN).requires_grad_()
    rehearse(model, x)
    inputs = [x, model.query.lora_a, model.key.lora_a]
    plain = lambda layer, x: layer(x)  # noqa: E731
    results = []
    for call in (plain, partial(checkpoint, use_reentrant=False)):
        seen.clear()
        loss = call(model.query, x).square().sum() + call(model.key, x).square().sum()
        assert seen == ([2] if call is plain else [2, 1])
        results.append(torch.autograd.grad(loss, inputs))
    torch.testing.assert_close(*results)
    seen.clear()
    checkpoint(lambda x: model.query(x) + model.key(x), x, use_reentrant=False)
    assert seen == [2]  # within one they are together


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_a_peers_base_that_gets_a_hook_is_called_once(kind):
    model, calls = adapted(), []
    x = tensor(B, S, IN).requires_grad_()
    rehearse(model, x)
    getattr(model.key.base, f"register_{kind}_hook")(lambda *args: calls.append(1))
    (model.query(x) + model.key(x)).sum().backward()
    assert len(calls) == 1
