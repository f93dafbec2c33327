"""``trainer.compile=true``: the same values, the same names, and the model as before afterwards."""

import pytest
import torch
from conftest import TYPES, batch_of
from torch import nn
from torch._dynamo.utils import counters
from transformers import BertConfig, BertForSequenceClassification

from diffora.core.attach import Calls, attach
from diffora.core.grid import find_grid
from diffora.core.lowrank import lowrank_layers, set_gates, set_split
from diffora.errors import UserError
from diffora.loop import machine
from diffora.loop.compiled import compiled
from diffora.run.evaluate import evaluate, read_request
from diffora.run.experiment import run


@pytest.mark.slow
def test_a_compiled_model_has_the_same_losses_and_gradients_for_any_width(deberta):
    model = deberta()
    grid = find_grid(model, "encoder.layer.*", TYPES)
    attach(model, grid.names, torch.ones(2, 6, dtype=torch.bool), 2, None, alpha=4, freeze=False)
    with torch.no_grad():
        for _, layer in lowrank_layers(model):
            layer.lora_bt.normal_(std=0.1)
    names = list(model.state_dict())
    model.train()

    def steps():
        for rows, length in zip([4, 8, 5, 3] * 5, range(6, 26), strict=True):
            batch = batch_of(rows, length, seed=length)
            loss = model(**{key: value for key, value in batch.items() if key != "row"}).loss
            trained = [p for p in model.parameters() if p.requires_grad]
            yield loss.detach(), *torch.autograd.grad(loss, trained)

    plain = list(steps())
    counters.clear()
    with compiled(model, True):
        found = list(steps())
        assert list(model.state_dict()) == names
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert 0 < counters["stats"]["unique_graphs"] <= 2  # and not one for each of 20 widths
    assert "forward" not in vars(model)


WIDTHS = range(7, 17)
"""Of batches. None is that of a row of the gates, 6: torch takes sizes that are equal at first to be always equal."""


@pytest.mark.slow
def test_the_steps_of_the_search_are_compiled_a_few_times_only():
    """Gates change in every step, with and without a gradient, and so do widths."""
    config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    model = BertForSequenceClassification(config).train()
    grid = find_grid(model, "encoder.layer.*")
    attach(model, grid.names, torch.ones(2, grid.n_types, dtype=torch.bool), 2, None, 4, freeze=False)
    by_name = dict(lowrank_layers(model))
    layers = [[by_name[name] for name in row] for row in grid.names]
    gamma = torch.zeros(2, grid.n_types, requires_grad=True)
    model.forward = torch.compile(model.forward, dynamic=True, backend="eager")  # traces, and compiles no C++

    def step(rows, width, gates):
        set_gates(layers, None if gates is None else gates.softmax(1))
        model(input_ids=torch.ones(rows, width).long(), labels=torch.ones(rows).long())

    counters.clear()
    for width in WIDTHS:  # search.update=alternating
        step(4, width, gamma)
        step(4, width, gamma.detach())
    assert 0 < counters["stats"]["unique_graphs"] <= 3
    counters.clear()
    for width in WIDTHS:  # search.update=simultaneous; the last batch is smaller
        split = 2 if width < WIDTHS[-1] else 1
        set_split(layers, split)
        step(2 * split, width, gamma)
    assert 0 < counters["stats"]["unique_graphs"] <= 3
    counters.clear()
    set_split(layers, None)
    model.eval()
    with torch.inference_mode():
        for width in WIDTHS:
            step(3, width, None)
    assert 0 < counters["stats"]["unique_graphs"] <= 2


@pytest.mark.slow
def test_one_forward_pass_can_have_two_backward_passes():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    x = torch.randn(5, 4)

    def gradients():
        loss = model(x).pow(3).sum()
        return [g for _ in range(2) for g in torch.autograd.grad(loss, model.parameters(), retain_graph=True)]

    plain = gradients()
    with compiled(model, True, keep_graph=True):
        found = gradients()
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    with compiled(model, True), pytest.raises(RuntimeError, match="donated"):  # what it is for
        gradients()


def test_one_pass_selectors_and_evaluations_of_runs_are_not_compiled(cfg, quick, tmp_path, monkeypatch):
    """Compiling takes longer than they do, and the machine that evaluates may have no compiler."""
    monkeypatch.setattr(machine, "_compile_problems", lambda: iter(()))
    calls = []
    monkeypatch.setattr(torch, "compile", lambda forward, **how: calls.append(how) or forward)
    changes = ["finetune.epochs=1", "search.epochs=1", "method.selector=activation", "trainer.compile=true"]
    result = run(cfg(*quick, *changes), tmp_path / "run")
    assert len(calls) == 1 and result.record["status"] == "completed"  # the fine-tuning
    found = evaluate(read_request([f"run={tmp_path / 'run'}", f"output={tmp_path / 'out'}"]))
    assert len(calls) == 1 and found["validation"]["accuracy"] == result.metrics["validation/accuracy"]


def test_without_the_setting_nothing_happens(deberta):
    model = deberta()
    with compiled(model, False):
        assert "forward" not in vars(model)


def test_an_error_of_the_compiler_is_one_message(deberta, monkeypatch):
    from torch._dynamo.exc import InternalTorchDynamoError

    model = deberta()
    with pytest.raises(UserError, match="fails on Deberta"), compiled(model, True):
        raise InternalTorchDynamoError("not possible\nmany lines")
    assert "forward" not in vars(model)
    with pytest.raises(ValueError, match="of the model"), compiled(model, True):
        raise ValueError("of the model itself")


def test_a_machine_without_a_compiler_is_named(monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    monkeypatch.setattr(machine.sysconfig, "get_paths", lambda: {"include": "/no/such"})
    monkeypatch.setattr(machine.sys, "platform", "linux")
    compiler, headers = machine._compile_problems()
    assert "needs a C++ compiler, and there is none" in compiler and "needs Python's header files" in headers


def test_a_compiled_model_gets_no_hooks_that_would_cut_it_into_many_graphs():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    attach(model, [["0", "1"]], torch.ones(1, 2, dtype=torch.bool), 2, None, 4)
    with compiled(model, True):
        Calls(model).check()
        assert not any(layer._forward_pre_hooks for layer in model)
    calls = Calls(model)
    assert all(layer._forward_pre_hooks for layer in model)
    model(torch.randn(3, 4))
    calls.check()
    assert not any(layer._forward_pre_hooks for layer in model)
