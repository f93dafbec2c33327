"""The update rule of each method, compared with an independent float64 computation. No weights are zero."""

import pytest
import torch
from conftest import TYPES, batch_of
from torch import nn

from diffora.backbones.backbone import Backbone
from diffora.core.bottleneck import BottleneckLinear
from diffora.core.grid import find_grid
from diffora.core.lowrank import lowrank_layers
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.methods.bitfit import BitFit
from diffora.methods.flora import FLoRA
from diffora.methods.gm_lora import GMLoRA
from diffora.methods.head_only import HeadOnly
from diffora.methods.houlsby import Houlsby
from diffora.methods.lora import LoRA
from diffora.methods.lowrank import Mask, Regulariser
from diffora.methods.pfeiffer import Pfeiffer
from diffora.methods.r_lora import RLoRA
from diffora.methods.random import Random
from diffora.methods.rm_lora import RMLoRA
from diffora.methods.sora import SoRA, soft_threshold

ROLES = {"attention_output": "attention.output.dense", "ffn_output": "output.dense"}
NO_MASK = {"rank": None, "every": "step", "independent": False, "target": "gradient", "start": 0, "head": False}


def mask(**changes):
    return Mask(**NO_MASK | {"rank": 2} | changes)


def adapted(deberta, method, selection=None, seed=0):
    """(model, adaptation): a small DeBERTa in float64 with adapters whose pairs are not zero."""
    model = deberta(dtype=torch.float64)
    grid = find_grid(model, "encoder.layer.*", TYPES, ROLES)
    torch.manual_seed(1)
    adaptation = method.adapt(model, grid, selection and selection(grid), seed)
    model.double()
    for _, layer in lowrank_layers(model):
        nn.init.normal_(layer.lora_bt, std=0.3)
    return model, adaptation


def step(model, adaptation, optimizer, number=0, epoch=0, batch=0):
    """Take one step like the training loop. Returns the parameters before and after it."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adaptation.before_step(number, epoch)
    inputs = {k: v for k, v in batch_of(4, seed=batch).items() if k != "row"}
    loss = model(**inputs).loss
    penalty = adaptation.penalty()
    (loss if penalty is None else loss + penalty).backward()
    adaptation.after_backward()
    optimizer.step()
    adaptation.after_step(number, optimizer.param_groups[0]["lr"])
    optimizer.zero_grad()
    return before, {name: p.detach().clone() for name, p in model.named_parameters()}


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


# --- what is trained ---


def test_bitfit_trains_every_bias_of_the_backbone_and_nothing_else(deberta):
    model, adaptation = adapted(deberta, BitFit())
    optimizer = torch.optim.SGD(trainable(model), lr=1.0)
    changed = set()
    for i in range(3):
        changed |= moved(*step(model, adaptation, optimizer, i, batch=i))
    backbone = {name for name in changed if name.startswith("deberta.")}
    biases = {name for name, _ in model.named_parameters() if name.startswith("deberta.") and name.endswith(".bias")}
    assert backbone <= biases and len(backbone) > 10
    assert {name for name, p in model.named_parameters() if p.requires_grad and name.startswith("deberta.")} == biases


def test_bitfit_refuses_a_backbone_without_biases():
    with pytest.raises(UserError, match="this backbone has none"):
        BitFit().check(nn.Linear(2, 2, bias=False), None)


def test_head_only_moves_the_head_only(deberta):
    model, adaptation = adapted(deberta, HeadOnly())
    changed = moved(*step(model, adaptation, torch.optim.SGD(trainable(model), lr=0.1)))
    assert changed and all(name.startswith(Backbone.of(model).head) for name in changed)


@pytest.mark.parametrize(("kind", "places"), [(Houlsby, 4), (Pfeiffer, 2)])
def test_bottlenecks_are_in_the_right_places(deberta, kind, places):
    model, adaptation = adapted(deberta, kind(size=3, activation="gelu", skip=True, init_std=0.01))
    present = [name for name, module in model.named_modules() if isinstance(module, BottleneckLinear)]
    assert len(present) == places and all(name.endswith("output.dense") for name in present)
    assert ("deberta.encoder.layer.0.attention.output.dense" in present) == (kind is Houlsby)
    backbone = {name for name, p in model.named_parameters() if p.requires_grad and name.startswith("deberta.")}
    assert backbone == {f"{n}.{part}.{w}" for n in present for part in ("down", "up") for w in ("weight", "bias")}
    changed = moved(*step(model, adaptation, torch.optim.SGD(trainable(model), lr=0.1)))
    assert backbone <= changed and not any(".base." in name for name in changed)


# --- RM-LoRA ---


def test_r_lora_takes_a_step_of_loss_plus_equation_10(deberta):
    method = RLoRA(rank=3, dropout=0.0, alpha=6.0, regulariser=Regulariser(0.05, "squared"))
    model, adaptation = adapted(deberta, method)
    reference, plain = adapted(deberta, LoRA(rank=3, dropout=0.0, alpha=6.0))
    reference.load_state_dict(model.state_dict())
    before, after = step(model, adaptation, torch.optim.SGD(trainable(model), lr=0.1))
    _, without = step(reference, plain, torch.optim.SGD(trainable(reference), lr=0.1))
    for name in (n for n in before if n.endswith(("lora_a", "lora_bt"))):
        m = before[name]
        excess = m @ m.T - torch.eye(3, dtype=torch.float64)
        torch.testing.assert_close(after[name], without[name] - 0.1 * 0.05 * 4 * excess @ m)
        assert (after[name] - without[name]).abs().max() > 1e-4


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("kind", ["gm", "rm"])
def test_masked_steps_are_plain_steps_on_the_drawn_rows(deberta, independent, kind):
    common = {"rank": 4, "dropout": 0.0, "alpha": 6.0}
    regulariser = Regulariser(0.05, "squared")
    chosen = mask(independent=independent)
    if kind == "gm":
        method, plain = GMLoRA(**common, mask=chosen), LoRA(**common)
    else:
        method, plain = RMLoRA(**common, mask=chosen, regulariser=regulariser), RLoRA(**common, regulariser=regulariser)
    model, adaptation = adapted(deberta, method)
    reference, whole = adapted(deberta, plain)
    reference.load_state_dict(model.state_dict())
    before, after = step(model, adaptation, torch.optim.SGD(trainable(model), lr=0.1))
    _, unmasked = step(reference, whole, torch.optim.SGD(trainable(reference), lr=0.1))
    sets = []
    assert all(layer.rows is None for _, layer in lowrank_layers(model))
    adaptation.before_step(0, 0)  # the same draw
    for name, layer in lowrank_layers(model):
        for part, rows in zip(("lora_a", "lora_bt"), layer.rows, strict=True):
            live = torch.zeros(4, 1, dtype=torch.bool)
            live[rows] = True
            key = f"{name}.{part}"
            torch.testing.assert_close(after[key], torch.where(live, unmasked[key], before[key]))
            assert live.sum() == 2 and (after[key] != before[key]).any(1).equal(live[:, 0])
        sets.append([r.tolist() for r in layer.rows])
    assert any(a != b for a, b in sets) == independent
    assert len({str(pair) for pair in sets}) > 1  # each adapter has its own


@pytest.mark.parametrize(("name", "kind"), [("gm_lora", GMLoRA), ("rm_lora", RMLoRA)])
def test_the_masks_are_by_default_those_of_algorithm_1(name, kind, cfg):
    """Half of the directions, the same ones of A and B, drawn anew in each step from the first on."""
    method = kind.from_config(cfg("experiment=quickstart", f"method={name}"))
    assert method.mask == mask(rank="half") and method.mask.every == "step"


@pytest.mark.parametrize(("target", "still"), [("gradient", False), ("update", True)])
def test_momentum_changes_masked_entries_unless_the_update_is_masked(deberta, target, still):
    model, adaptation = adapted(deberta, GMLoRA(rank=4, dropout=0.0, alpha=6.0, mask=mask(target=target)))
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01, weight_decay=0.1)
    for number in range(3):
        before, after = step(model, adaptation, optimizer, number, batch=number)
    quiet = []
    adaptation.before_step(2, 0)  # the same draw
    for name, layer in lowrank_layers(model):
        for part, rows in zip(("lora_a", "lora_bt"), layer.rows, strict=True):
            dead = torch.ones(4, dtype=torch.bool)
            dead[rows] = False
            old, new = before[f"{name}.{part}"], after[f"{name}.{part}"]
            quiet.append(torch.equal(old[dead], new[dead]))
            assert not torch.equal(old[~dead], new[~dead])
    assert all(quiet) if still else not any(quiet)


def test_masks_change_with_the_step_or_the_epoch(deberta):
    def drawn(every, number, epoch, seed=0):
        model, adaptation = adapted(
            deberta, GMLoRA(rank=8, dropout=0.0, alpha=6.0, mask=mask(rank=3, every=every)), seed=seed
        )
        adaptation.before_step(number, epoch)
        return [tuple(layer.rows[0].tolist()) for _, layer in lowrank_layers(model)]

    assert drawn("step", 0, 0) == drawn("step", 0, 1) != drawn("step", 1, 0)
    assert drawn("epoch", 0, 0) == drawn("epoch", 1, 0) != drawn("epoch", 1, 1)
    assert drawn("step", 0, 0, seed=1) != drawn("step", 0, 0)


def test_masking_starts_at_the_given_step_and_evaluation_is_not_masked(deberta):
    model, adaptation = adapted(deberta, GMLoRA(rank=4, dropout=0.0, alpha=6.0, mask=mask(start=1)))
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    before, after = step(model, adaptation, optimizer, 0)
    name, _ = next(iter(lowrank_layers(model)))
    assert (before[f"{name}.lora_a"] != after[f"{name}.lora_a"]).any(1).all()
    before, after = step(model, adaptation, optimizer, 1)
    assert (before[f"{name}.lora_a"] != after[f"{name}.lora_a"]).any(1).sum() == 2
    adaptation.before_step(2, 0)
    ids = batch_of(3)["input_ids"]
    with torch.no_grad():
        evaluated = model(input_ids=ids).logits
        for _, each in lowrank_layers(model):
            each.rows = None
        torch.testing.assert_close(model(input_ids=ids).logits, evaluated)


@pytest.mark.parametrize("head", [False, True])
def test_the_released_code_does_not_train_the_head_in_masked_steps(deberta, head):
    model, adaptation = adapted(deberta, GMLoRA(rank=4, dropout=0.0, alpha=6.0, mask=mask(head=head, start=1)))
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    first, second = (moved(*step(model, adaptation, optimizer, number)) for number in (0, 1))
    assert any(name.startswith("classifier") for name in first)
    assert any(name.startswith("classifier") for name in second) != head


def test_a_shared_pair_is_one_adapter(deberta):
    def selection(grid):
        nothing = torch.zeros(2, 6, dtype=torch.bool)
        return Selection.from_mask(grid, nothing, method="random", selector="random", k=0, rho=0.0, seed=0)

    method = Random(
        rank=4, rho=0.0, dropout=0.0, alpha=6.0, weight_sharing=True, shared_rank=2,
        regulariser=Regulariser(0.5, "squared"), mask=mask(rank="half"), scope="layer", budget=None, draw=0, like=None,
        keep="size",
    )  # fmt: skip
    model, adaptation = adapted(deberta, method, selection)
    assert len(adaptation.adapters) == 6 and all(len(layers) == 2 for layers in adaptation.adapters)
    adaptation.before_step(0, 0)
    for layers in adaptation.adapters:
        assert layers[0].rows is layers[1].rows and len(layers[0].rows[0]) == 1
    pairs = {p for _, layer in lowrank_layers(model) for p in (layer.lora_a, layer.lora_bt)}
    squares = [(m @ m.T - torch.eye(2, dtype=m.dtype)).square().sum() for m in pairs]
    torch.testing.assert_close(adaptation.penalty(), 0.5 * sum(squares))
    changed = moved(*step(model, adaptation, torch.optim.SGD(trainable(model), lr=0.1)))
    assert any("lora_a" in name for name in changed)


# --- SoRA, FLoRA ---


def test_soft_threshold_is_the_proximal_operator():
    """prox(x) is the z that minimises (z - x)^2 / 2 + by |z|; the test searches it on a grid."""
    x = torch.tensor([-2.0, -0.3, -0.1, 0.0, 0.05, 0.4, 3.0], dtype=torch.float64)
    grid = torch.linspace(-4, 4, 80001, dtype=torch.float64)
    objective = (grid - x[:, None]).square() / 2 + 0.3 * grid.abs()
    torch.testing.assert_close(soft_threshold(x, 0.3), grid[objective.argmin(1)], atol=1e-4, rtol=0)
    assert soft_threshold(x, 0.3)[1:5].abs().max() == 0


def sora(**changes):
    settings = {"rank": 4, "dropout": 0.0, "alpha": 6.0, "lam": 0.05, "times_lr": False, "lam_start": 0.0, "stages": 1}
    return SoRA(**settings | changes)


@pytest.mark.parametrize(("times_lr", "by"), [(False, 0.05), (True, 0.1 * 0.05)])
def test_sora_takes_a_gradient_step_and_then_the_threshold(deberta, times_lr, by):
    model, adaptation = adapted(deberta, sora(times_lr=times_lr))
    adaptation.begin(10)
    reference, _ = adapted(deberta, sora())
    reference.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    inputs = {k: v for k, v in batch_of(4).items() if k != "row"}
    reference(**inputs).loss.backward()
    before, after = step(model, adaptation, optimizer)
    for name, layer in lowrank_layers(reference):
        stepped = before[f"{name}.gate"] - 0.1 * layer.gate.grad
        expected = torch.where(stepped > by, stepped - by, torch.where(stepped < -by, stepped + by, 0.0))
        torch.testing.assert_close(after[f"{name}.gate"], expected)
        # the gate's gradient from the whole matrix: dL/dg_k = s b_k^T dL/dW a_k
        plain_grad = (layer.lora_bt.detach() @ _weight_grad(reference, name, inputs) * layer.lora_a).sum(1)
        torch.testing.assert_close(layer.gate.grad, layer.scaling * plain_grad.detach())


def _weight_grad(model, name, inputs):
    """dL/dW of one module, (out, in)."""
    weight = model.get_submodule(name).base.weight.requires_grad_()
    (grad,) = torch.autograd.grad(model(**inputs).loss, weight)
    weight.requires_grad_(False)
    return grad


def test_gates_start_as_in_the_released_code_from_a_normal_distribution(deberta):
    model, _ = adapted(deberta, sora(rank=16))
    gates = torch.cat([layer.gate.detach() for _, layer in lowrank_layers(model)])  # 12 modules
    assert abs(gates.mean().item()) < 0.25 and gates.std().item() == pytest.approx(1.0, abs=0.2)


def test_sparsity_grows_in_stages():
    method = sora(lam=0.4, lam_start=0.1, stages=4)
    assert [round(method.threshold(s, 8, 1.0), 3) for s in range(8)] == [0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4]
    assert sora(lam=0.4).threshold(0, 8, 1.0) == 0.4
    assert sora(lam=0.4, times_lr=True).threshold(0, 8, 0.01) == pytest.approx(0.004)


def test_directions_with_closed_gates_do_not_count_at_inference(deberta):
    model, adaptation = adapted(deberta, sora(lam=0.3))
    layers = [layer for _, layer in lowrank_layers(model)]
    with torch.no_grad():
        for i, layer in enumerate(layers):
            layer.gate.copy_(torch.tensor([0.1 if k < i % 5 else 1.0 for k in range(4)]))
    adaptation.after_step(0, 1.0)
    open_ = [4 - i % 5 for i in range(12)]
    sizes = [sum(layer.base.weight.shape) for layer in layers]
    assert adaptation.inference_parameters() == sum(n * size for n, size in zip(open_, sizes, strict=True))
    for (_, lora_a, lora_bt, scaling), layer, n in zip(adaptation.pairs(), layers, open_, strict=True):
        assert lora_a.shape[0] == lora_bt.shape[0] == n
        torch.testing.assert_close(scaling * lora_bt.T @ lora_a, layer.delta())


def test_both_factors_of_flora_start_uniform_as_a_of_lora_does(deberta):
    model = deberta()
    FLoRA(rank=3, dropout=0.0, alpha=6.0).adapt(model, find_grid(model, "encoder.layer.*", TYPES, ROLES), None, 0)
    for _, layer in lowrank_layers(model):
        for matrix in (layer.lora_a, layer.lora_bt):
            bound = matrix.shape[1] ** -0.5
            assert 0.7 * bound < matrix.abs().max() <= bound


def test_flora_starts_at_the_backbone_and_its_core_gets_the_exact_gradient(deberta):
    model, adaptation = adapted(deberta, FLoRA(rank=3, dropout=0.0, alpha=6.0))
    plain = deberta(dtype=torch.float64)
    inputs = {k: v for k, v in batch_of(4).items() if k != "row"}
    torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits)
    model(**inputs).loss.backward()
    for name, layer in lowrank_layers(model):
        weight = _weight_grad(model, name, inputs)
        expected = layer.scaling * layer.lora_bt @ weight @ layer.lora_a.T  # dL/dG = s B^T dL/dW A^T
        torch.testing.assert_close(layer.gate.grad, expected.detach())
        assert layer.gate.grad.abs().max() > 0 and layer.lora_a.grad.abs().max() == 0  # the core is 0 at the start
    optimizer = torch.optim.SGD(trainable(model), lr=0.5)
    optimizer.zero_grad()
    for number in range(2):
        before, after = step(model, adaptation, optimizer, number)
    assert {n.rpartition(".")[2] for n in moved(before, after) if "lora" in n or "gate" in n} == {
        "lora_a",
        "lora_bt",
        "gate",
    }
    for pair, (_, layer) in zip(adaptation.pairs(), lowrank_layers(model), strict=True):
        assert pair[1].shape[0] == 3
        whole = layer.scaling * layer.lora_bt.T @ layer.gate @ layer.lora_a
        torch.testing.assert_close(pair[3] * pair[2].T @ pair[1], whole)
        torch.testing.assert_close(layer.delta(), whole)
