"""The search module on a small DeBERTa: exact gradients, no leakage, and the same results for divided work."""

import json
import math
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from conftest import TYPES, batch_of
from lightning.pytorch.plugins.precision import MixedPrecision
from small import small_task
from torch.utils.data import DataLoader

from diffora.core.attach import attach
from diffora.core.dam import relax
from diffora.core.grid import find_grid
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.run.check import check
from diffora.run.experiment import run
from diffora.scoring.bilevel import SearchModule
from diffora.scoring.trained import searched_weights
from diffora.settings.sections import Search

SETTINGS = {"epochs": 1, "batch_size": 4, "rank": 3, "lr": 1e-2, "clip": None}


@pytest.fixture
def make(deberta):
    def build(dtype=torch.float32, trainer=None, dropout=0.0, shared=False, **changes):
        model = deberta(dtype=dtype, dropout=dropout)
        grid = find_grid(model, "encoder.layer.*", TYPES)
        layers = attach(model, grid.names, torch.ones(2, 6, dtype=torch.bool), 3, None, alpha=6, freeze=False)
        for row in layers:
            for layer in row:  # not zero, or there would be nothing to differentiate
                torch.nn.init.normal_(layer.lora_bt, std=0.2)
        if shared:
            for lower, upper in zip(*layers, strict=True):
                upper.lora_a, upper.lora_bt = lower.lora_a, lower.lora_bt
        model.to(dtype)
        module = SearchModule(model, layers, TYPES, small_task(), Search(**SETTINGS | changes), seed=0)
        module.to(dtype)
        module.trainer = trainer or L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        return module.train()

    return build


def snapshot(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def changed(module, before):
    return {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}


def numeric_gradient(function, tensor, eps=1e-6, entries=None):
    flat = tensor.detach().view(-1)
    result = {}
    for i in entries if entries is not None else range(len(flat)):
        with torch.no_grad():
            keep = flat[i].item()
            flat[i] = keep + eps
            up = function().item()
            flat[i] = keep - eps
            down = function().item()
            flat[i] = keep
        result[i] = (up - down) / (2 * eps)
    return result


def test_gradient_of_gamma_through_the_transformer(make):
    module = make(torch.float64)
    with torch.no_grad():
        module.gamma.normal_()
    valid = batch_of(4)
    _, (grad,) = module.gradients(valid, lambda loss: list(torch.autograd.grad(loss, [module.gamma])), module.gamma)
    numeric = numeric_gradient(lambda: module.batch_loss(valid, module.gamma), module.gamma)
    assert max(abs(v) for v in numeric.values()) > 1e-4
    torch.testing.assert_close(grad.view(-1), torch.tensor(list(numeric.values())).double(), rtol=1e-5, atol=1e-9)


def test_gradients_of_a_b_and_head_through_the_transformer(make):
    module = make(torch.float64)
    train = batch_of(4)
    loss = module.batch_loss(train, module.gamma.detach())
    grads = torch.autograd.grad(loss, module.weights, allow_unused=True)
    checked = 0
    for parameter, grad in zip(module.weights, grads, strict=True):
        if grad is None:
            continue
        entries = range(0, parameter.numel(), max(1, parameter.numel() // 4))
        numeric = numeric_gradient(lambda: module.batch_loss(train, module.gamma.detach()), parameter, entries=entries)
        for i, value in numeric.items():
            assert grad.reshape(-1)[i].item() == pytest.approx(value, rel=1e-4, abs=1e-8)
            checked += 1
    assert checked > 100


@pytest.mark.parametrize("shared", [False, True])
def test_second_order_gradient_against_finite_differences_of_the_stepped_loss(make, shared):
    module = make(torch.float64, order=2, lr=0.5, shared=shared)
    with torch.no_grad():
        module.gamma.normal_()
    train, valid = batch_of(4, seed=1), batch_of(4, seed=2)
    _, (exact,) = module.unrolled_gradient(valid, train)

    def stepped():
        weights = [p.detach().clone() for p in module.weights]
        grads = torch.autograd.grad(module.batch_loss(train, module.gamma.detach()), module.weights, allow_unused=True)
        with torch.no_grad():
            for parameter, grad in zip(module.weights, grads, strict=True):
                if grad is not None:
                    parameter -= 0.5 * grad
            loss = module.batch_loss(valid, module.gamma)
            for parameter, keep in zip(module.weights, weights, strict=True):
                parameter.copy_(keep)
        return loss

    numeric = torch.tensor(list(numeric_gradient(stepped_with_grad(stepped), module.gamma).values())).double()
    torch.testing.assert_close(exact.view(-1), numeric, rtol=1e-4, atol=1e-8)
    _, (first,) = module.gradients(valid, lambda loss: list(torch.autograd.grad(loss, [module.gamma])), module.gamma)
    assert (first - exact).norm() > 0.05 * exact.norm()  # the second-order term is there


def stepped_with_grad(function):
    def call():
        with torch.enable_grad():
            return function()

    return call


@pytest.mark.parametrize("order", [1, 2])
def test_a_gamma_step_changes_only_gamma_and_a_weight_step_all_the_rest(make, order):
    module = make(order=order)
    gamma_opt, weight_opt = module.configure_optimizers()
    before = snapshot(module)
    module.gamma_step(gamma_opt, batch_of(4, seed=2), batch_of(4, seed=1))
    assert changed(module, before) == {"gamma"}
    assert all(p.grad is None for p in module.parameters())
    before = snapshot(module)
    module.weight_step(weight_opt, batch_of(4, seed=1))
    moved = changed(module, before)
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    assert "gamma" not in moved and moved <= trainable
    assert {n for n in trainable if "lora" in n} <= moved and any("classifier" in n for n in moved)
    assert all(p.grad is None for p in module.parameters())


def test_no_step_uses_rows_of_the_other_split(make):
    """A weight step must not depend on validation rows, and a first-order Gamma step not on training rows."""

    def after(valid_seed, train_seed):
        module = make()
        gamma_opt, weight_opt = module.configure_optimizers()
        module.gamma_step(gamma_opt, batch_of(4, seed=valid_seed), batch_of(4, seed=train_seed))
        gamma = module.gamma.detach().clone()
        with torch.no_grad():
            module.gamma.zero_()  # so that the weights can only change through a leak
        module.weight_step(weight_opt, batch_of(4, seed=train_seed))
        return gamma, snapshot(module)

    gamma, weights = after(1, 2)
    other_valid, other_train = after(3, 2), after(1, 4)
    assert not torch.equal(gamma, other_valid[0]) and torch.equal(gamma, other_train[0])
    assert all(torch.equal(weights[n], other_valid[1][n]) for n in weights)
    assert not all(torch.equal(weights[n], other_train[1][n]) for n in weights)


def test_accumulation_changes_only_memory(make):
    whole, parts = make(torch.float64), make(torch.float64, accumulate=3)
    losses = []
    for module in (whole, parts):
        gamma_opt, weight_opt = module.configure_optimizers()
        losses.append(module.gamma_step(gamma_opt, batch_of(7, seed=2), batch_of(7)).item())
        losses.append(module.weight_step(weight_opt, batch_of(7)).item())
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-9)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_clipping_limits_the_weights_gradient_but_not_gammas(make):
    """With plain SGD of rate 1, a step equals the gradient."""
    steps = {}
    for clip in (None, 1e-4):
        module = make(torch.float64, clip=clip)
        before = snapshot(module)
        module.gamma_step(torch.optim.SGD([module.gamma], lr=1.0), batch_of(4, seed=2), batch_of(4))
        gamma = (module.gamma - before["gamma"]).detach()
        before = snapshot(module)
        module.weight_step(torch.optim.SGD(module.weights, lr=1.0), batch_of(4))
        moved = torch.cat([(p - before[n]).flatten() for n, p in module.named_parameters()])
        steps[clip] = gamma, moved.norm().item()
    assert steps[None][1] > 0.05 and steps[1e-4][1] == pytest.approx(1e-4, rel=1e-3)
    assert steps[None][0].norm() > 1e-3
    torch.testing.assert_close(steps[1e-4][0], steps[None][0])


def test_gates_follow_gamma_and_rows_sum_to_one(make):
    module = make()
    with torch.no_grad():
        module.gamma.normal_()
    module.batch_loss(batch_of(2), module.gamma)
    gates = torch.stack([torch.stack([layer.gate for layer in row]) for row in module.layers])
    torch.testing.assert_close(gates, relax(module.gamma))
    module.close_gates()
    assert all(layer.gate is None for row in module.layers for layer in row)


def test_pairs_for_a_warm_start_have_the_update_that_the_gates_left(make):
    module = make(torch.float64)
    names = [[f"{number}.{kind}" for kind in TYPES] for number in range(2)]
    context = SimpleNamespace(parts=SimpleNamespace(grid=SimpleNamespace(names=names)))
    gates = torch.rand(2, 6, dtype=torch.float64) + 0.1
    found = searched_weights(context, gates, module.layers)
    for name, layer, gate in zip(chain(*names), chain(*module.layers), gates.flatten(), strict=True):
        x = torch.randn(4, layer.lora_a.shape[1], dtype=torch.float64)
        layer.gate = gate
        update = (x @ found[f"{name}.lora_a"].T @ found[f"{name}.lora_bt"]) * 6 / 3
        torch.testing.assert_close(update, (layer(x) - layer.base(x)).detach())


def test_gates_of_a_sigmoid_are_independent_and_their_gradient_is_exact(make):
    module = make(torch.float64, relaxation="sigmoid")
    assert module.trajectory == [(0.0, [[0.5] * 6] * 2)]
    with torch.no_grad():
        module.gamma.normal_()
    valid = batch_of(4)
    _, (grad,) = module.gradients(valid, lambda loss: list(torch.autograd.grad(loss, [module.gamma])), module.gamma)
    gates = torch.stack([torch.stack([layer.gate for layer in row]) for row in module.layers])
    torch.testing.assert_close(gates, torch.sigmoid(module.gamma))
    assert (gates.sum(-1) - 1).abs().min() > 0.1
    numeric = numeric_gradient(lambda: module.batch_loss(valid, module.gamma), module.gamma)
    torch.testing.assert_close(grad.view(-1), torch.tensor(list(numeric.values())).double(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("relaxation", "name", "start"),
    [("softmax", "search/entropy", math.log(6)), ("sigmoid", "search/open_gates", 3.0)],
)
def test_the_logged_gate_values_depend_on_the_relaxation(make, relaxation, name, start):
    module = make(relaxation=relaxation, gamma_lr=1e-6)
    batches = [{"valid": batch_of(4, seed=1), "train": [batch_of(4, seed=2)]}]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **quiet)
    trainer.fit(module, DataLoader(batches, batch_size=None))
    assert module.spread_metric == name
    assert trainer.callback_metrics[name].item() == pytest.approx(start, rel=1e-4)
    assert len({"search/entropy", "search/open_gates"} & trainer.callback_metrics.keys()) == 1
    assert module.trajectory[-1][1] == relax(module.gamma.detach(), relaxation).tolist()


def test_a_run_with_a_sigmoid_says_so(cfg, quick, tmp_path):
    small = [*quick, "task.train_rows=64", "finetune.epochs=1", "search.epochs=1", "search.batch_size=8"]
    softmax = run(cfg(*small), tmp_path / "softmax")
    sigmoid = run(cfg(*small, "search.relaxation=sigmoid"), tmp_path / "sigmoid")
    assert (softmax.selection.relaxation, sigmoid.selection.relaxation) == ("softmax", "sigmoid")
    assert softmax.record["config_hash"] != sigmoid.record["config_hash"]
    gates = torch.tensor(Selection.load(tmp_path / "sigmoid/selection.json").gamma_bar)
    assert (gates - 0.5).abs().max() < 0.2 and gates.std() > 1e-4
    assert torch.equal(gates.topk(3).indices.sort().values, sigmoid.selection.mask().nonzero()[:, 1].view(4, 3))
    assert all((tmp_path / "sigmoid" / name).stat().st_size > 0 for name in ("gamma.png", "dam.png"))
    with pytest.raises(UserError, match=r"search\.relaxation='hard' must be one of softmax, scaled_softmax, sigmoid"):
        check(cfg(*small, "search.relaxation=hard"))


def test_bf16_autocast_gives_gradients_in_the_parameters_dtype(make):
    module = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, (grad,) = module.gradients(
            batch_of(8), lambda loss: list(torch.autograd.grad(loss, [module.gamma])), module.gamma
        )
    assert grad.dtype == torch.float32 and torch.isfinite(grad).all()
    _, (exact,) = module.gradients(
        batch_of(8), lambda loss: list(torch.autograd.grad(loss, [module.gamma])), module.gamma
    )
    assert torch.nn.functional.cosine_similarity(grad.flatten(), exact.flatten(), dim=0) > 0.98


def steps_taken(module, batches, plugins):
    """(parameters, norm of their gradient) of each step of a round."""
    found, optimizers = [], module.configure_optimizers()

    def watch(optimizer, *_):
        parameters = optimizer.param_groups[0]["params"]
        found.append((len(parameters), torch.cat([p.grad.flatten() for p in parameters]).norm().item()))

    for optimizer in optimizers:
        optimizer.register_step_pre_hook(watch)
    module.configure_optimizers = lambda: optimizers
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, plugins=plugins, **quiet)
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return found


@pytest.mark.parametrize("update", ["alternating", "simultaneous"])
def test_float16_takes_the_same_steps_as_full_precision(make, update):
    """Three weight steps for each Gamma step, with a loss scale that doubles at each update."""
    batches = [{"valid": batch_of(8, seed=i), "train": [batch_of(8, seed=i + j) for j in (1, 2, 3)]} for i in (0, 10)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1)
    full = steps_taken(make(update=update), batches, [])
    # Asked for float16 on a CPU, Lightning itself would quietly take bfloat16.
    half = steps_taken(make(update=update), batches, [MixedPrecision("16-mixed", "cpu", scaler)])
    assert [n for n, _ in half] == [n for n, _ in full] and len(full) == 2 * (1 + 3)
    assert [norm for _, norm in half] == pytest.approx([norm for _, norm in full], rel=0.1)
    assert scaler.get_scale() == 2.0 ** (8 + 6)


ON_PATH = str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")
WITH_TESTS = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, ON_PATH))}
WORKER = Path(__file__).with_name("ddp_search.py")


def run_worker(processes: int, folder: Path, update: str) -> list[dict]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*launch, str(WORKER), str(folder), update], capture_output=True, text=True, timeout=300, env=WITH_TESTS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"{processes}-{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.parametrize("update", ["alternating", pytest.param("simultaneous", marks=pytest.mark.slow)])
def test_two_processes_agree_exactly_and_with_one_process_on_the_joint_batch(tmp_path, update):
    one, (first, second) = run_worker(1, tmp_path, update)[0], run_worker(2, tmp_path, update)
    assert len(one["gamma"]) == len(first["gamma"]) >= 6
    assert first["gamma"] == second["gamma"]  # after every step, to the last bit
    assert first["weights"] == second["weights"]
    joint, divided = torch.tensor(one["gamma"]), torch.tensor(first["gamma"])
    assert joint[-1].abs().max() > 1e-3
    torch.testing.assert_close(divided, joint, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("selector", ["attribution", "one_shot"])
def test_two_processes_score_as_one_does(tmp_path, selector):
    one, (first, second) = run_worker(1, tmp_path, selector)[0], run_worker(2, tmp_path, selector)
    assert first["scores"] == second["scores"] and first["weights"] == second["weights"]
    joint, divided = torch.tensor(one["scores"]), torch.tensor(first["scores"])
    assert joint.abs().max() > 1e-3
    torch.testing.assert_close(divided, joint, rtol=1e-3, atol=1e-5)


def test_processes_are_weighted_by_the_terms_of_their_losses(make, monkeypatch):
    """Batches of a language model with equal numbers of rows have different numbers of tokens."""
    module = make()
    batches = [batch_of(2), batch_of(5)]
    parameters = [module.gamma, module.weights[0]]
    grads = [[torch.full_like(p, value) for p in parameters] for value in (1.0, 8.0)]
    grads[0][1] = None
    sent = []

    def two_processes(flat):
        sent.append(flat.clone())
        if len(sent) == 2:
            flat += sent[0]

    monkeypatch.setattr(type(module.trainer), "world_size", 2, raising=False)
    monkeypatch.setattr(torch.distributed, "all_reduce", two_processes)
    module.averaged(parameters, grads[0], batches[0])
    of_gamma, of_weight = module.averaged(parameters, grads[1], batches[1])
    torch.testing.assert_close(of_gamma, torch.full_like(module.gamma, (2 * 1 + 5 * 8) / 7))
    torch.testing.assert_close(of_weight, torch.full_like(module.weights[0], 5 * 8 / 7))
