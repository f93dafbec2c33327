"""The registry of selectors, and a user's own function as a selector."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPO
from ddp_score import called, scored
from small import small_deberta, small_task

from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.run.check import check
from diffora.run.experiment import run
from diffora.scoring.selectors import SELECTORS, facts_of, find_selector
from diffora.settings.sections import Search

MINE = """
import torch

def squares(model, grid, batches, loss):
    "Norm of the mean gradient, written without the package."
    weights = [model.get_submodule(name).weight.requires_grad_() for row in grid.names for name in row]
    total = [torch.zeros_like(weight) for weight in weights]
    for batch in batches:
        for sum_, grad in zip(total, torch.autograd.grad(loss(batch), weights)):
            sum_ += grad / len(batches)
    return torch.stack([sum_.norm() for sum_ in total]).view(grid.n_layers, grid.n_types)

def few(model, grid):
    return None

number = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module outside the repository, in a folder on Python's path."""
    (tmp_path / "my_selectors.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "my_selectors"
    sys.modules.pop("my_selectors", None)


def zeros(model, grid, batches, loss):
    return torch.zeros(grid.n_layers, grid.n_types)


def test_the_registry_has_the_selectors_of_the_configuration():
    assert list(SELECTORS) == [
        *("search", "attribution", "one_shot", "gradient", "activation", "plop", "fisher", "kappa", "spectrum")
    ]
    assert [name for name in [*SELECTORS, "a.b"] if facts_of(name).trains] == ["search", "attribution", "one_shot"]
    assert all(find_selector(name) is entry for name, entry in SELECTORS.items())


def test_the_settings_that_a_selector_reads_exist():
    known = {field.name for field in fields(Search)} | {"score_batches"}
    read = {name: facts_of(name).reads for name in [*SELECTORS, "a.b"]}
    assert all(names <= known for names in read.values())
    assert known - set().union(*read.values()) == {"ensemble"}  # which is not the selector's
    assert [name for name in read if not facts_of(name).reads_rows] == ["kappa", "spectrum"]


def test_a_plain_function_can_repeat_a_selector_of_the_package(mine):
    from my_selectors import squares

    found = called(squares).scores
    assert found.dtype == torch.float64 and found.shape == (2, 4)
    torch.testing.assert_close(found, scored("gradient").scores.double(), rtol=1e-4, atol=1e-7)


def test_the_function_gets_the_documented_arguments():
    seen = {}

    def look(model, grid, batches, loss):
        once, again = ([batch["row"].tolist() for batch in batches] for _ in range(2))
        seen.update(once=once, again=again, n=len(batches), training=model.training)
        first = next(iter(batches))
        seen.update(loss=loss(first), expected=small_task().loss(model(**small_task().inputs(first)), first))
        return zeros(model, grid, batches, loss)

    called(look)
    assert seen["once"] == seen["again"] and list(map(len, seen["once"])) == [8, 8] and seen["n"] == 2
    assert not seen["training"] and seen["loss"].requires_grad and torch.equal(seen["loss"], seen["expected"])


def test_the_function_runs_under_autocast():
    types = []

    def look(model, grid, batches, loss):
        model.classifier.register_forward_pre_hook(lambda *_: None).remove()
        types.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return zeros(model, grid, batches, loss)

    called(look)
    called(look, precision="bf16-mixed")
    assert types == [None, torch.bfloat16]


def test_flags_gradients_and_mode_are_reset():
    model = small_deberta()
    flags = [p.requires_grad for p in model.parameters()]

    def careless(model, grid, batches, loss):
        model.requires_grad_(True).train()
        loss(next(iter(batches))).backward()
        return zeros(model, grid, batches, loss)

    module = called(careless, model)
    assert [p.requires_grad for p in model.parameters()] == flags and not module.model.training
    assert all(p.grad is None for p in model.parameters())


def negated(model, grid, batches, loss):
    with torch.no_grad():
        model.get_submodule(grid.names[1][2]).weight.neg_()
    return zeros(model, grid, batches, loss)


def hooked(model, grid, batches, loss):
    model.get_submodule(grid.names[0][1]).register_forward_hook(lambda *_: None)
    return zeros(model, grid, batches, loss)


def replaced(model, grid, batches, loss):
    model.classifier = torch.nn.Sequential(model.classifier)
    return zeros(model, grid, batches, loss)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda *_: [[1.0] * 4] * 2, r"must return a tensor of 2 x 4 finite numbers.*; it returned a list"),
        (lambda *_: torch.zeros(4, 2), r"must return a tensor of 2 x 4 .* returned a tensor of shape \(4, 2\)"),
        (lambda *_: torch.tensor([[1.0, float("nan"), 2.0, float("inf")]] * 2), r"returned 4 that are not finite"),
        (lambda *_: torch.zeros(2, 4, dtype=torch.complex64), r"complex64"),
        (lambda *_: {}["x"], r"fails with KeyError: 'x' \(.*test_selectors\.py, line \d+\)"),
        (negated, r"must leave the model as it was, but it changed .*layer\.1\.attention\.output\.dense\.weight"),
        (hooked, r"but it changed the hooks of .*layer\.0\.attention\.self\.value_proj"),
        (replaced, r"but it changed .*classifier\.0"),
    ],
)
def test_each_mistake_of_a_function_gives_one_clear_message(function, words):
    with pytest.raises(UserError, match=rf"^method\.selector=a\.b .*{words}") as error:
        called(function)
    assert len(error.value.problems) == 1


def test_out_of_memory_is_not_reported_as_a_mistake_of_the_function():
    def hungry(*_):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        called(hungry)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("magic", "must be one of search, .* one_shot, gradient, .* random, qv, .* alternate, or the dotted path"),
        ("my_selectors.square", r"my_selectors has no square; did you mean my_selectors\.squares\?"),
        ("my_selectors.nothing_like_it", "its functions: squares, few"),
        ("my_selectors.number", "is a int, not a function"),
        ("my_selectors.few", r"must be a function of \(model, grid, batches, loss\); it takes \(model, grid\)"),
        ("no_such_module.f", "Python finds no module no_such_module"),
    ],
)
def test_an_impossible_selector_is_refused_before_anything_is_loaded(cfg, mine, target, words):
    with pytest.raises(UserError, match=rf"method\.selector='?{target}.*{words}"):
        check(cfg("experiment=quickstart", f"method.selector={target}"))


def test_warm_start_is_refused_with_a_selector_that_trains_nothing(cfg, mine):
    with pytest.raises(UserError, match=r"needs a selector that trains A and B, which my_selectors\.squares does not"):
        check(cfg("experiment=quickstart", "method.selector=my_selectors.squares", "method.warm_start=true"))


def test_a_run_selects_by_a_function_and_resumes(cfg, quick, mine, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    small = [*quick, "task.train_rows=64", "finetune.epochs=1", "search.batch_size=8", "method.score_batches=2"]
    small.append("method.selector=my_selectors.squares")
    whole = run(cfg(*small), tmp_path / "whole")
    selection = Selection.load(tmp_path / "whole/selection.json")
    assert (selection.selector, selection.k, selection.gamma_bar) == ("my_selectors.squares", 3, None)
    assert selection.relaxation is None and selection.split_hash and selection == whole.selection
    theirs = run(cfg(*small, "method.selector=gradient"), tmp_path / "gradient").selection
    torch.testing.assert_close(torch.tensor(selection.scores), torch.tensor(theirs.scores), rtol=1e-3, atol=1e-8)
    assert selection.selected == theirs.selected
    with monkeypatch.context() as patch:
        patch.setattr("diffora.run.experiment.finetune", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(cfg(*small), tmp_path / "stopped")
    monkeypatch.setattr("my_selectors.squares", lambda model, grid, batches, loss: stopped())
    again = run(cfg(*small, "resume=true"), tmp_path / "stopped")
    assert again.selection == selection and again.record["history"] == whole.record["history"]


def test_evaluation_does_not_import_the_selector_named_in_a_file(quick, cfg, tmp_path, monkeypatch):
    """A run's config.yaml may have any text as its selector. Evaluation ignores it."""
    from diffora.run.evaluate import evaluate, read_request

    small = [*quick, "task.train_rows=32", "task.validation_rows=16", "finetune.epochs=1", "method.selector=random"]
    small.append("finetune.warmup_steps=0")
    run(cfg(*small), tmp_path / "run")
    mark = tmp_path / "mark"
    (tmp_path / "evil_selector.py").write_text(f"open({str(mark)!r}, 'w')\ndef f(model, grid, batches, loss): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    content = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    content["method"]["selector"] = "evil_selector.f"
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(content))
    record = json.loads((tmp_path / "run/run.json").read_text())
    for key in ("sha256", "digests"):
        record.pop(key, None)
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    assert evaluate(read_request([f"run={tmp_path / 'run'}", f"output={tmp_path / 'out'}"]))
    assert not mark.exists() and "evil_selector" not in sys.modules


def test_the_command_line_finds_a_function_in_the_users_own_folder(tmp_path):
    """The module is found through PYTHONPATH; a file in --config-dir names it."""
    (tmp_path / "my_selectors.py").write_text(MINE)
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - quickstart\n  - _self_\nmethod: {selector: my_selectors.squares}\n"
    )
    sizes = ["task.train_rows=32", "task.validation_rows=16", "finetune.epochs=1", "method.score_batches=1"]
    sizes += ["finetune.warmup_steps=0", "search.batch_size=8", "logger=[csv]", f"hydra.run.dir={tmp_path / 'run'}"]
    path = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, REPO / "train.py", "--config-dir", tmp_path / "conf", "experiment=mine", *sizes],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert Selection.load(tmp_path / "run/selection.json").selector == "my_selectors.squares"
    assert Path(tmp_path / "run/adapter").is_dir()
