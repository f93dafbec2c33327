"""``trainer.compile=true``: the same values, the same names, and the model as before afterwards."""

import functools
import json

import pytest
import torch
from conftest import TYPES, batch_of
from stopped_runs import run_of, stop
from torch._dynamo.utils import counters

from diffora.core.attach import attach
from diffora.core.grid import find_grid
from diffora.core.lowrank import lowrank_layers
from diffora.errors import UserError
from diffora.loop import machine
from diffora.loop.compiled import compiled


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


@pytest.fixture
def quick_compiler(monkeypatch):
    """The graphs of `torch.compile`, forward and backward, run by torch's own operations: no C++ is compiled."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


SEARCH = [
    "experiment=quickstart", "logger=csv", "task.train_rows=48", "task.validation_rows=24", "search.epochs=2",
    "search.batch_size=8", "finetune.epochs=1", "finetune.batch_size=8", "finetune.warmup_steps=0",
    "finetune.dropout=0.0",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("update", ["alternating", "simultaneous"])
def test_search_training_and_evaluation_give_the_results_of_an_uncompiled_run(update, tmp_path, quick_compiler):
    torch.set_num_threads(1)
    overrides = [*SEARCH, f"search.update={update}"]
    plain = run_of(*overrides, folder=tmp_path / "plain").record
    counters.clear()
    found = run_of(*overrides, "trainer.compile=true", folder=tmp_path / "compiled").record
    graphs = counters["stats"]["unique_graphs"]
    scores = [
        torch.tensor(json.loads((tmp_path / name / "selection.json").read_text())["gamma_bar"])
        for name in ("plain", "compiled")
    ]
    torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-5)
    assert scores[0].std() > 1e-3
    for name, value in plain["metrics"].items():
        assert found["metrics"][name] == pytest.approx(value, rel=1e-2, abs=1e-3), name
    # The steps of Γ, of the weights and of the fine-tuning, and evaluations; last batches are smaller.
    assert 0 < graphs <= 12


@pytest.mark.slow
def test_a_compiled_run_resumes_exactly(tmp_path, quick_compiler):
    overrides = [*SEARCH[:4], *SEARCH[6:], "method=lora", "trainer.compile=true", "finetune.epochs=2"]
    stop(*overrides, folder=tmp_path / "stopped")
    again = run_of(*overrides, "resume=true", folder=tmp_path / "stopped")
    whole = run_of(*overrides, folder=tmp_path / "whole")
    assert again.record["metrics"] == whole.record["metrics"]
    ours, theirs = (dict(result.model.named_parameters()) for result in (again, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


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
