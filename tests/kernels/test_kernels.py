"""``kernel=fused`` and ``kernel=plain`` give the same outputs and gradients, on every path of a layer."""

import copy
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from diffora.core.attach import attach
from diffora.core.lowrank import KERNELS, LowRankLinear, lowrank_layers, set_kernel
from diffora.errors import UserError
from diffora.kernels import fused
from diffora.run.experiment import run

EXAMPLES, TOKENS, IN, OUT, RANK = 6, 5, 8, 7, 3


def tensor(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 7 * sum(shape)))


class Packed(nn.Linear):
    """A base layer whose weight must not be read. It is a subclass, like quantised layers."""

    def forward(self, x):
        return super().forward(x) * 2


def base_of(kind):
    torch.manual_seed(0)
    base = (
        Conv1D(OUT, IN) if kind == "conv1d" else (Packed if kind == "packed" else nn.Linear)(IN, OUT, kind != "no_bias")
    )
    for parameter in base.parameters():
        nn.init.normal_(parameter)
    return base.double()


def layer(kernel, kind="linear"):
    pair = nn.Parameter(tensor(RANK, IN, seed=1)), nn.Parameter(tensor(RANK, OUT, seed=2))
    return LowRankLinear(base_of(kind), *pair, alpha=6.0, kernel=kernel)


GATES = {"none": None, "scalar": tensor(1)[0], "vector": tensor(RANK), "matrix": tensor(RANK, RANK)}
ROWS = {"all": None, "masked": (torch.tensor([0, 2]), torch.tensor([1]))}
CASES = [
    (gate, rows, split)
    for gate, rows, split in product(GATES, ROWS, (None, 0, 2, EXAMPLES))
    if (gate == "none" or rows == "all") and (split is None or gate in ("none", "scalar"))
]


@pytest.fixture(params=[0.0, float("inf")], ids=["folded", "added"])
def folding(request, monkeypatch):
    monkeypatch.setattr(fused, "FOLD_FROM", request.param)


def results(kernel, kind, gate, rows, split, checkpointed, x_grad=True):
    module = layer(kernel, kind)
    gate = GATES[gate]
    module.gate = None if gate is None else gate.clone().requires_grad_()
    module.rows, module.split = ROWS[rows], split
    x = tensor(EXAMPLES, TOKENS, IN).requires_grad_(x_grad)
    y = checkpoint(module, x, use_reentrant=False) if checkpointed else module(x)
    inputs = [t for t in (x, module.lora_a, module.lora_bt, module.gate) if t is not None and t.requires_grad]
    found = torch.autograd.grad((y**3).sum(), inputs, allow_unused=True)
    return [y, *(torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True))]


@pytest.mark.parametrize("kind", ["linear", "no_bias", "conv1d", "packed"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_outputs_and_gradients_are_equal(folding, kind, case):
    for checkpointed, x_grad in ((False, True), (False, False), (True, True)):
        ours, theirs = (results(kernel, kind, *case, checkpointed, x_grad) for kernel in ("fused", "plain"))
        torch.testing.assert_close(ours, theirs)
    assert all(t.abs().max() > 0.1 for t in theirs[:2])


@pytest.mark.parametrize("kind", ["linear", "conv1d", "packed"])
@pytest.mark.parametrize("gate", GATES)
def test_second_derivatives_are_equal(folding, kind, gate):
    found = []
    for kernel in ("fused", "plain"):
        module = layer(kernel, kind)
        module.gate = None if GATES[gate] is None else GATES[gate].clone().requires_grad_()
        x = tensor(EXAMPLES, TOKENS, IN).requires_grad_()
        inputs = [t for t in (x, module.lora_a, module.lora_bt, module.gate) if t is not None]
        first = torch.autograd.grad((module(x) ** 3).sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum((g**2).sum() for g in first), inputs))
    torch.testing.assert_close(*found)


class Attention(nn.Module):
    """Query, key and value read the same x. Query and key also read a table that all examples share, as in DeBERTa."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value, self.out = (nn.Linear(IN, IN) for _ in range(4))
        self.table = nn.Parameter(torch.randn(1, 5, IN))

    def forward(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)
        bias = self.query(self.table).sum() + self.key(self.table).sum()
        return self.out(torch.softmax(q @ k.transpose(1, 2) + bias, -1) @ v)


def attention(kernel):
    model = Attention().double()
    attach(model, [["query", "key", "value", "out"]], torch.ones(1, 4, dtype=torch.bool), 2, None, 4.0, kernel=kernel)
    for i, (_, each) in enumerate(lowrank_layers(model)):
        each.lora_a.data, each.lora_bt.data = tensor(2, IN, seed=i), tensor(2, IN, seed=9 + i)
    return model


@pytest.mark.parametrize("checkpointed", [False, True])
def test_layers_that_read_the_same_input_train_as_the_plain_ones(checkpointed):
    found = []
    for kernel in ("fused", "plain"):
        model = attention(kernel)
        x = tensor(EXAMPLES, TOKENS, IN).requires_grad_()
        inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
        y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        found.append([y, *torch.autograd.grad((y**2).sum(), inputs)])
    torch.testing.assert_close(*found)


def test_under_dropout_each_layer_draws_its_own_mask():
    torch.manual_seed(0)
    model = attention("fused")
    for name in ("query", "key"):
        each = getattr(model, name)
        each.dropout = 0.5
        each.lora_a.data = torch.eye(2, IN).double()
        each.lora_bt.data = torch.eye(2, IN).double()
    x = torch.ones(EXAMPLES, 50, IN, dtype=torch.float64)
    updates = [(each(x) - each.base(x))[..., :2] for each in (model.query, model.key)]
    assert all(set(u.unique().round().tolist()) == {0.0, 4.0} for u in updates)
    assert 0.4 < (updates[0] == updates[1]).double().mean() < 0.6


@pytest.mark.parametrize("kernel", KERNELS)
def test_dropout_acts_in_training_only(kernel):
    module = layer(kernel)
    module.dropout = 0.5
    x = tensor(EXAMPLES, TOKENS, IN)
    assert not torch.equal(module(x), module(x))
    module.eval()
    torch.testing.assert_close(module(x), module.base(x) + 2 * x @ module.lora_a.T @ module.lora_bt)


def test_the_setting_chooses_the_kernel(monkeypatch):
    calls = []
    real = fused.LowRankNode.apply
    monkeypatch.setattr(fused.LowRankNode, "apply", lambda *args: calls.append(1) or real(*args))
    model = attention("plain")
    x = tensor(EXAMPLES, TOKENS, IN)
    expected = model(x)
    assert not calls
    set_kernel(model, "fused")
    torch.testing.assert_close(model(x), expected)
    assert len(calls) == 6
    assert copy.deepcopy(model).query.kernel == "fused"


@pytest.mark.parametrize(
    ("kernel", "on_gpu", "in_search", "plain"),
    [
        ("auto", False, False, False),
        ("auto", True, False, True),
        ("auto", True, True, False),
        ("fused", True, False, False),
        ("plain", False, True, True),
    ],
)
def test_auto_is_plain_on_a_gpu_in_fine_tuning_only(kernel, on_gpu, in_search, plain, monkeypatch):
    module = layer(kernel)
    monkeypatch.setattr(Tensor, "is_cuda", on_gpu)
    monkeypatch.setattr(module, "_plain", lambda x: "plain")
    monkeypatch.setattr(module, "_fused", lambda x: "fused")
    module.gate = torch.ones(()) if in_search else None
    assert module(tensor(EXAMPLES, TOKENS, IN)) == ("plain" if plain else "fused")


def test_an_unknown_kernel_is_refused():
    model = Attention()
    with pytest.raises(UserError, match="kernel='fast' must be one of auto, fused, plain"):
        attach(model, [["query"]], torch.ones(1, 1, dtype=torch.bool), 2, None, 4, kernel="fast")
    with pytest.raises(UserError, match="kernel='fast' must be one of auto, fused, plain"):
        set_kernel(attention("plain"), "fast")


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_run_uses_the_kernel_of_its_setting(kernel, cfg, quick, tmp_path, monkeypatch):
    """The setting holds for the search, for fine-tuning with masks, and for the backbone's dropout."""
    calls = []
    real = fused.LowRankNode.apply
    monkeypatch.setattr(fused.LowRankNode, "apply", lambda *args: calls.append(1) or real(*args))
    choices = ["search.update=simultaneous", "method.mask.rank=half", "search.epochs=1", "finetune.epochs=1"]
    result = run(cfg(*quick, *choices, f"model.kernel={kernel}"), tmp_path)
    assert result.record["status"] == "completed"
    assert bool(calls) == (kernel != "plain")
