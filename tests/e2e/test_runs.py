"""Whole runs on a shortened embedded task: what they write, resuming, selectors, budgets and options."""

import json
import subprocess
import sys
import time
from itertools import chain

import pytest
import torch
from processes import kill_when, start, train
from safetensors.torch import load_file

from diffora.core.dam import discretise
from diffora.core.lowrank import lowrank_layers
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.loop.loggers import Loggers
from diffora.run.check import check
from diffora.run.directory import account, content
from diffora.run.experiment import run
from diffora.run.record import read_record

RECORD_KEYS = {
    "method", "task", "model", "seed", "metrics", "params", "time", "memory", "selection", "config_hash", "data_hash",
    "git_commit", "versions", "status", "history",
}  # fmt: skip


@pytest.fixture
def whole(cfg, quick, tmp_path):
    """A run that was never stopped."""
    torch.set_num_threads(1)
    return run(cfg(*quick), tmp_path / "whole")


def test_a_run_writes_its_record_adapter_and_logs(whole):
    folder, record = whole.folder, read_record(whole.folder)
    assert record.keys() >= RECORD_KEYS
    assert record["status"] == "completed"
    assert {"validation/accuracy", "validation/f1", "held_out/accuracy", "last/accuracy"} <= record["metrics"].keys()
    assert record["params"].keys() == {"adapter", "head", "trainable", "backbone", "inference"}
    assert record["params"]["trainable"] == record["params"]["adapter"] + record["params"]["head"]
    assert record["time"].keys() == {"search_s", "finetune_s", "step_s", "total_s", "startup_s"}
    assert 0 < record["time"]["step_s"] < record["time"]["finetune_s"]
    assert record["time"]["search_s"] > 0 and record["memory"]["peak_rss_mb"] > 100
    selection = Selection.load(folder / "selection.json")
    assert [len(row) for row in selection.selected] == [3] * len(selection.modules)
    assert selection.split_hash and selection.gamma_bar
    pictures = ["dam.png", "gamma.png"]
    texts = ["config.yaml", "run.log", "trajectory.json", "adapter/adapter_config.json"]
    for name in [*pictures, *texts, *(f"logs/{stage}/version_0/metrics.csv" for stage in ("search", "finetune"))]:
        assert (folder / name).stat().st_size > 0, name
    assert list(folder.rglob("*.part")) == []
    rounds = (folder / "logs/search/version_0/metrics.csv").read_text()
    assert "search/entropy" in rounds and "gamma_bar/layer00/attention.self.query_proj" in rounds
    assert len(rounds.splitlines()) == 3  # a line for each of the two rounds
    biggest = max(f.stat().st_size for f in (folder / "checkpoints").iterdir())
    assert biggest < 4 * 4 * record["params"]["trainable"] + 200_000  # weights, two moments, best; no backbone


def test_peft_loads_the_adapter_and_gives_the_same_outputs(whole):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    base = json.loads((whole.folder / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    loaded = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, dtype=torch.float32),
        whole.folder / "adapter",
    ).eval()
    ids = torch.randint(5, 100, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = whole.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(loaded(input_ids=ids).logits, ours, rtol=1e-4, atol=1e-5)
    tensors = load_file(whole.folder / "adapter/adapter_model.safetensors")
    assert all(t.abs().max() > 0 for name, t in tensors.items() if "lora_B" in name)


def test_a_run_killed_twice_gives_the_same_result(whole, quick, tmp_path):
    folder = tmp_path / "killed"
    arguments = [*quick, f"hydra.run.dir={folder}"]
    kill_when(start(*arguments), folder, "checkpoints/search-0001-*.ckpt")
    assert read_record(folder)["status"] == "running"
    kill_when(start(*arguments, "resume=true"), folder, "checkpoints/finetune-0002-*.ckpt")
    newest = sorted((folder / "checkpoints").glob("finetune-*.ckpt"))[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    out = train(*arguments, "resume=true")
    assert "is damaged" in out and newest.name in out
    record = read_record(folder)
    for key in ("metrics", "history", "selection", "params", "data_hash", "config_hash"):
        assert record[key] == whole.record[key], key
    ours, theirs = (load_file(f / "adapter/adapter_model.safetensors") for f in (folder, whole.folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert json.loads((folder / "trajectory.json").read_text()) == json.loads(
        (whole.folder / "trajectory.json").read_text()
    )
    # a second resume has nothing to do
    before = (folder / "run.json").read_text()
    assert "is complete already" in train(*arguments, "resume=true")
    assert (folder / "run.json").read_text() == before


def test_a_second_run_in_one_process_counts_only_its_own_time(cfg, quick, tmp_path):
    began = time.time()
    spent = run(cfg(*quick), tmp_path / "run").record["time"]
    assert 0 < spent["startup_s"] < spent["total_s"] <= time.time() - began


def test_a_selection_from_a_file_gives_the_same_result_as_its_search(whole, cfg, quick, tmp_path):
    file = whole.folder / "selection.json"
    again = run(cfg(*quick, f"method.selection={file}"), tmp_path / "again")
    assert again.record["time"]["search_s"] == 0
    assert again.record["history"] == whole.record["history"]


@pytest.mark.parametrize("method", ["random", "share_only", "lora", "full_ft"])
def test_every_other_method_runs(cfg, quick, tmp_path, method):
    overrides = [o for o in quick if not o.startswith(("search.", "finetune.dropout"))]
    result = run(cfg(*overrides, f"method={method}"), tmp_path / "run")
    params = result.record["params"]
    assert result.record["status"] == "completed" and result.record["time"]["search_s"] == 0
    if method == "full_ft":
        assert params["adapter"] == params["backbone"] and (tmp_path / "run/model/model.safetensors").is_file()
        assert result.record["selection"] is None
    else:
        assert 0 < params["adapter"] < params["backbone"] / 10
        assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()
    if method == "random":
        assert [len(row) for row in result.record["selection"]["selected"]] == [3] * 4


@pytest.fixture
def short(quick):
    """An even shorter run."""
    return [*quick, "task.train_rows=64", "search.epochs=1", "finetune.epochs=1", "search.batch_size=8"]


@pytest.mark.parametrize("selector", ["attribution", "one_shot", "gradient", "activation", "random"])
def test_every_selector_runs(cfg, short, tmp_path, selector):
    less = ["method.score_batches=2", "search.masks=10"]
    result = run(cfg(*short, f"method.selector={selector}", *less), tmp_path / "run")
    selection = Selection.load(tmp_path / "run/selection.json")
    assert (selection.selector, selection.k, selection.rank, selection.gamma_bar) == (selector, 3, None, None)
    scores = torch.tensor(selection.scores)
    assert scores.shape == (4, 6) and torch.equal(discretise(scores, 3), selection.mask())
    assert result.record["selection"]["selector"] == selector and result.record["status"] == "completed"
    assert (result.record["time"]["search_s"] > 0) == (selector != "random")
    assert (tmp_path / "run/dam.png").stat().st_size > 0 and not (tmp_path / "run/gamma.png").exists()
    # scoring has no side effect on fine-tuning
    again = run(cfg(*short, f"method.selection={tmp_path / 'run/selection.json'}"), tmp_path / "again")
    assert again.record["history"] == result.record["history"]


def test_scoring_leaves_model_and_random_state_as_they_were(cfg, short, tmp_path):
    from diffora.loop.parts import Parts
    from diffora.run.select import select

    config = cfg(*short, "method.selector=gradient", "method.score_batches=2")
    settings, spec = check(config)
    torch.manual_seed(0)
    parts = Parts.load(settings, tmp_path, spec)
    before = {name: value.clone() for name, value in parts.model.state_dict().items()}
    modes, state = [m.training for m in parts.model.modules()], torch.get_rng_state()
    selection = select(parts, settings.method, Loggers(settings.logger, tmp_path, {})).selection
    assert torch.equal(torch.get_rng_state(), state)
    after = parts.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert [m.training for m in parts.model.modules()] == modes
    assert len(set(chain(*selection.scores))) == 24


@pytest.mark.parametrize("lost", [[], ["search.json"]])
@pytest.mark.parametrize("selector", ["activation", "attribution"])
def test_a_scored_run_resumes_with_its_scores(cfg, short, tmp_path, monkeypatch, selector, lost):
    from diffora.run import experiment
    from diffora.scoring.attribution import AttributionModule
    from diffora.scoring.one_pass_stages import MeasureStage

    def stopped(*_):
        raise KeyboardInterrupt

    overrides = [*short, f"method.selector={selector}", "method.score_batches=2"]
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "finetune", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(cfg(*overrides), tmp_path / "run")
    first = Selection.load(tmp_path / "run/selection.json")
    for name in lost:  # killed before the selection was finished, but after its checkpoint
        (tmp_path / "run" / name).unlink()
    for module in (MeasureStage, AttributionModule):
        monkeypatch.setattr(module, "training_step", stopped)
    result = run(cfg(*overrides, "resume=true"), tmp_path / "run")
    assert result.record["status"] == "completed" and result.record["time"]["search_s"] > 0
    assert result.selection == first


@pytest.mark.parametrize("more", [["method=random"], ["method.selector=search"], ["method.selector=activation"]])
def test_global_scope_with_and_without_a_budget(cfg, short, tmp_path, more):
    if more == ["method=random"]:
        short = [o for o in short if not o.startswith("search.")]
    free = run(cfg(*short, *more, "method.scope=global", "rho=0.4"), tmp_path / "free")
    assert free.selection.mask().sum() == 9 and free.selection.k is None  # floor(0.4 * 24)
    tight = run(cfg(*short, *more, "method.scope=global", "method.budget=12k"), tmp_path / "tight")
    assert 0 < tight.record["params"]["adapter"] <= 12_000
    assert tight.record["params"]["adapter"] > 12_000 - 4 * 384  # one more module would exceed the budget
    assert tight.selection.rank is None


@pytest.mark.parametrize("more", [["method=random"], ["method.selector=search"], ["method.selector=gradient"]])
def test_a_budget_sets_the_rank_and_the_selection_file_keeps_it(cfg, short, tmp_path, more):
    if more == ["method=random"]:
        short = [o for o in short if not o.startswith("search.")]
    result = run(cfg(*short, *more, "method.budget=0.03M"), tmp_path / "run")
    selection, params = result.selection, result.record["params"]
    assert selection.k == 3 and selection.rank not in (None, 4)
    of_rank_1 = sum(256 if "attention" in name else 384 for row in selection.selected for name in row)
    assert 30_000 - of_rank_1 < params["adapter"] <= 30_000
    if more == ["method.selector=gradient"]:
        again = run(cfg(*short, f"method.selection={tmp_path / 'run/selection.json'}"), tmp_path / "again")
        assert again.record["params"] == params and again.record["history"] == result.record["history"]


@pytest.mark.parametrize(
    ("overrides", "least"),
    [
        # K = 3 at rank 1: the estimate is for FFN in, FFN out and one attention module in each layer
        (["method.scope=layer", "method.weight_sharing=false"], 4 * (256 + 2 * 384)),
        # with shared pairs, selections without each FFN module once have more: then no shared pair can be dropped
        (["method.scope=layer"], 4 * (256 + 2 * 384) - 2 * (384 - 256) + 2 * (4 * 256 + 2 * 384)),
        (["method.scope=global"], 2 * (4 * 256 + 2 * 384)),  # the shared pairs
        (["method=random"], 7424),
    ],
)
def test_a_budget_that_is_too_small_is_refused_before_the_search(cfg, short, tmp_path, monkeypatch, overrides, least):
    from diffora.scoring.bilevel import SearchModule

    if "method=random" in overrides:
        short = [o for o in short if not o.startswith("search.")]
    monkeypatch.delattr(SearchModule, "training_step")
    words = rf"method\.budget={least - 1} is too small: {least} parameters are the least"
    with pytest.raises(UserError, match=words):
        run(cfg(*short, *overrides, f"method.budget={least - 1}"), tmp_path / "run")
    with pytest.raises(UserError, match=words):
        run(cfg(*short, *overrides, f"method.budget={least - 1}", "dry_run=true"), tmp_path / "dry")
    record = run(cfg(*short, *overrides, f"method.budget={least}", "dry_run=true"), tmp_path / "dry").record
    assert record["status"] == "dry_run"


@pytest.mark.parametrize(
    "option", ["trainer.precision=bf16-mixed", "search.order=2", "search.accumulate=2", "method.weight_sharing=false"]
)
def test_a_run_with_this_option_completes(cfg, quick, tmp_path, option):
    more = ["search.train_steps=2", "search.batch_size=16", "finetune.accumulate=2"] if "accumulate" in option else []
    result = run(cfg(*quick, option, *more), tmp_path / "run")
    assert result.record["status"] == "completed"
    if option == "method.weight_sharing=false":
        assert result.record["params"]["adapter"] == sum(
            4 * (256 if "attention" in name else 384) for row in result.selection.selected for name in row
        )


@pytest.mark.parametrize("selector", ["search", "attribution"])
def test_warm_start_begins_with_the_searched_weights(cfg, quick, tmp_path, selector):
    overrides = [f"method.selector={selector}", "method.warm_start=true", "finetune.lr=1e-12"]
    result = run(cfg(*quick, *overrides), tmp_path / "run")
    searched = load_file(tmp_path / "run/selection.safetensors")
    mask = dict(zip(chain(*result.selection.modules), result.selection.mask().flatten().tolist(), strict=True))
    for name, layer in lowrank_layers(result.model):
        if mask[name]:
            torch.testing.assert_close(layer.lora_bt.detach(), searched[f"{name}.lora_bt"], rtol=1e-5, atol=1e-7)
            assert layer.lora_bt.abs().max() > 0
        else:
            assert layer.lora_bt.abs().max() < 1e-6


def test_a_warm_start_with_another_alpha_begins_with_the_searched_update(cfg, quick, tmp_path):
    def updates(folder, *more):
        result = run(cfg(*quick, "method.warm_start=true", "finetune.lr=1e-12", *more), tmp_path / folder)
        layers, names = dict(lowrank_layers(result.model)), result.selection.names()
        return {name: layers[name].delta().detach() for name in names}, {layers[name].scaling for name in names}

    found, scale = updates("first", "method.alpha=8")
    again, other = updates("second", "method.alpha=32", f"method.selection={tmp_path / 'first/selection.json'}")
    assert other == {4 * s for s in scale}
    for name, update in found.items():
        torch.testing.assert_close(again[name], update, rtol=1e-4, atol=1e-8)
        assert update.abs().max() > 0


def test_another_configuration_does_not_resume(whole, cfg, quick):
    with pytest.raises(UserError, match=r"finetune\.lr: "):
        run(cfg(*quick, "resume=true", "finetune.lr=1e-4"), whole.folder)
    with pytest.raises(UserError, match="holds a run"):
        run(cfg(*quick), whole.folder)


def test_two_processes_do_not_write_to_one_run(cfg, tmp_path):
    other = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", other, tmp_path / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "1\n"
        with (
            pytest.raises(UserError, match="another process"),
            account(cfg(), tmp_path, {"status": "running"}, content(tmp_path)),
        ):
            pass
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        process.kill()
    with account(cfg(), tmp_path, {"status": "running"}, content(tmp_path)):
        assert read_record(tmp_path)["status"] == "running"


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(cfg, quick, tmp_path, monkeypatch):
    from diffora.tasks.glue import GlueTask

    calls, loss = [0], GlueTask.loss

    def fails_later(self, output, batch):
        calls[0] += 1
        return loss(self, output, batch) * (float("nan") if calls[0] > 4 else 1)

    monkeypatch.setattr(GlueTask, "loss", fails_later)
    overrides = [o for o in quick if not o.startswith("search.")]
    with pytest.raises(
        UserError, match=r"in epoch 2; stopped, the last checkpoint with a finite loss is .*finetune-0001"
    ):
        run(cfg(*overrides, "method=lora"), tmp_path / "run")
    record = read_record(tmp_path / "run")
    assert record["status"] == "failed" and "not finite" in record["error"]
