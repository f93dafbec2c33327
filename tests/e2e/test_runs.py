"""Whole runs through `train.py`, as a user starts them, on the embedded task cut short."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest
import torch
from conftest import REPO
from safetensors.torch import load_file

from diffora.core.dam import discretise
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.loop.loggers import Loggers
from diffora.run.directory import account
from diffora.run.experiment import check, run
from diffora.run.record import read_record

RECORD_KEYS = {
    "method", "task", "model", "seed", "metrics", "params", "time", "memory", "selection", "config_hash", "data_hash",
    "git_commit", "versions", "status", "history",
}  # fmt: skip


def start(*overrides: str, **more: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | more
    return subprocess.Popen(
        [sys.executable, str(REPO / "train.py"), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPO,
        env=environment,
    )


def command(*overrides: str, expect: int = 0, **more: str) -> str:
    process = start(*overrides, **more)
    out, err = process.communicate(timeout=300)
    assert process.returncode == expect, out + err
    return out if expect == 0 else err


def kill_when(process: subprocess.Popen, folder: Path, pattern: str) -> None:
    """kill -9 as soon as a file appears."""
    deadline = time.time() + 120
    while not list(folder.glob(pattern)):
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.fixture
def whole(cfg, quick, tmp_path):
    """A run that was never stopped."""
    torch.set_num_threads(1)
    return run(cfg(*quick), tmp_path / "whole")


def test_a_run_leaves_what_it_says(whole):
    folder, record = whole.folder, read_record(whole.folder)
    assert record.keys() >= RECORD_KEYS
    assert record["status"] == "completed"
    assert {"validation/accuracy", "validation/f1", "held_out/accuracy", "last/accuracy"} <= record["metrics"].keys()
    assert record["params"].keys() == {"adapter", "head", "trainable", "backbone", "inference"}
    assert record["params"]["trainable"] == record["params"]["adapter"] + record["params"]["head"]
    assert record["time"].keys() == {"search_s", "finetune_s", "total_s", "startup_s"}
    assert record["time"]["search_s"] > 0 and record["memory"]["peak_rss_mb"] > 100
    selection = Selection.load(folder / "selection.json")
    assert [len(row) for row in selection.selected] == [3] * len(selection.modules)
    assert selection.split_hash and selection.gamma_bar
    pictures = ["dam.png", "gamma.png"]
    texts = ["config.yaml", "run.log", "trajectory.json", "adapter/adapter_config.json"]
    for name in [*pictures, *texts, *(f"logs/{stage}/version_0/metrics.csv" for stage in ("search", "finetune"))]:
        assert (folder / name).stat().st_size > 0, name
    assert [f for f in folder.rglob("*.part")] == []
    rounds = (folder / "logs/search/version_0/metrics.csv").read_text()
    assert "search/entropy" in rounds and "gamma_bar/layer00/attention.self.query_proj" in rounds
    assert len(rounds.splitlines()) == 3  # a line for each of the two rounds
    biggest = max(f.stat().st_size for f in (folder / "checkpoints").iterdir())
    assert biggest < 4 * 4 * record["params"]["trainable"] + 200_000  # weights, two moments, best; no backbone


def test_the_adapter_on_disk_is_the_model_in_memory(whole):
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


def test_killed_twice_and_resumed_ends_as_if_never_stopped(whole, quick, tmp_path):
    folder = tmp_path / "killed"
    arguments = [*quick, f"hydra.run.dir={folder}"]
    kill_when(start(*arguments), folder, "checkpoints/search-0001-*.ckpt")
    assert read_record(folder)["status"] == "running"
    kill_when(start(*arguments, "resume=true"), folder, "checkpoints/finetune-0002-*.ckpt")
    newest = sorted((folder / "checkpoints").glob("finetune-*.ckpt"))[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    out = command(*arguments, "resume=true")
    assert "is damaged" in out and newest.name in out
    record = read_record(folder)
    for key in ("metrics", "history", "selection", "params", "data_hash", "config_hash"):
        assert record[key] == whole.record[key], key
    ours, theirs = (load_file(f / "adapter/adapter_model.safetensors") for f in (folder, whole.folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert json.loads((folder / "trajectory.json").read_text()) == json.loads(
        (whole.folder / "trajectory.json").read_text()
    )
    # and once more: nothing is left to do
    before = (folder / "run.json").read_text()
    assert "is complete already" in command(*arguments, "resume=true")
    assert (folder / "run.json").read_text() == before


def test_a_later_run_of_one_process_counts_its_own_time(cfg, quick, tmp_path):
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


@pytest.mark.parametrize("selector", ["attribution", "gradient", "activation", "random"])
def test_every_selector_runs(cfg, short, tmp_path, selector):
    result = run(cfg(*short, f"method.selector={selector}", "method.score_batches=2"), tmp_path / "run")
    selection = Selection.load(tmp_path / "run/selection.json")
    assert (selection.selector, selection.k, selection.rank, selection.gamma_bar) == (selector, 3, None, None)
    scores = torch.tensor(selection.scores)
    assert scores.shape == (4, 6) and torch.equal(discretise(scores, 3), selection.mask())
    assert result.record["selection"]["selector"] == selector and result.record["status"] == "completed"
    assert (result.record["time"]["search_s"] > 0) == (selector != "random")
    assert (tmp_path / "run/dam.png").stat().st_size > 0 and not (tmp_path / "run/gamma.png").exists()
    # what scoring left behind changes nothing
    again = run(cfg(*short, f"method.selection={tmp_path / 'run/selection.json'}"), tmp_path / "again")
    assert again.record["history"] == result.record["history"]


def test_scoring_leaves_model_and_random_state_as_they_were(cfg, short, tmp_path):
    from diffora.training import stages

    config = cfg(*short, "method.selector=gradient", "method.score_batches=2")
    settings, spec = check(config)
    torch.manual_seed(0)
    parts = stages.Parts.load(settings, tmp_path, spec)
    before = {name: value.clone() for name, value in parts.model.state_dict().items()}
    modes, state = [m.training for m in parts.model.modules()], torch.get_rng_state()
    selection, _ = stages.find_selection(parts, settings.method, "gradient", Loggers(settings.logger, tmp_path, {}))
    assert torch.equal(torch.get_rng_state(), state)
    after = parts.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert [m.training for m in parts.model.modules()] == modes
    assert len(set(chain(*selection.scores))) == 24


@pytest.mark.parametrize("lost", [[], ["search.json"]])
@pytest.mark.parametrize("selector", ["activation", "attribution"])
def test_a_scored_run_resumes_with_its_scores(cfg, short, tmp_path, monkeypatch, selector, lost):
    from diffora.run import experiment
    from diffora.search.attribution import AttributionModule
    from diffora.search.score import ScoreModule

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
    for module in (ScoreModule, AttributionModule):
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
    assert tight.record["params"]["adapter"] > 12_000 - 4 * 384  # another module would not have fitted
    assert tight.selection.rank is None


@pytest.mark.parametrize("more", [["method=random"], ["method.selector=search"], ["method.selector=gradient"]])
def test_a_budget_chooses_the_rank_and_a_file_keeps_it(cfg, short, tmp_path, more):
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
        # K = 3 at rank 1: FFN in and out everywhere and a third module
        (["method.scope=layer", "method.weight_sharing=false"], 4 * (256 + 2 * 384)),
        # but where pairs are shared it is dearer to leave each FFN out once, so that none of the shared ones goes
        (["method.scope=layer"], 4 * (256 + 2 * 384) - 2 * (384 - 256) + 2 * (4 * 256 + 2 * 384)),
        (["method.scope=global"], 2 * (4 * 256 + 2 * 384)),  # the shared pairs
        (["method=random"], 7424),
    ],
)
def test_a_budget_that_is_too_small_is_refused_before_the_search(cfg, short, tmp_path, monkeypatch, overrides, least):
    from diffora.search.bilevel import SearchModule

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
def test_options_run_to_the_end(cfg, quick, tmp_path, option):
    more = ["search.train_steps=2", "search.batch_size=16", "finetune.accumulate=2"] if "accumulate" in option else []
    result = run(cfg(*quick, option, *more), tmp_path / "run")
    assert result.record["status"] == "completed"
    if option == "method.weight_sharing=false":
        assert result.record["params"]["adapter"] == sum(
            4 * (256 if "attention" in name else 384) for row in result.selection.selected for name in row
        )


@pytest.mark.parametrize("selector", ["search", "attribution"])
def test_warm_start_begins_where_the_search_ended(cfg, quick, tmp_path, selector):
    overrides = [f"method.selector={selector}", "method.warm_start=true", "finetune.lr=1e-12"]
    result = run(cfg(*quick, *overrides), tmp_path / "run")
    from diffora.core.lowrank import lowrank_layers

    searched = load_file(tmp_path / "run/selection.safetensors")
    mask = dict(zip(chain(*result.selection.modules), result.selection.mask().flatten().tolist(), strict=True))
    for name, layer in lowrank_layers(result.model):
        if mask[name]:
            torch.testing.assert_close(layer.lora_bt.detach(), searched[f"{name}.lora_bt"], rtol=1e-5, atol=1e-7)
            assert layer.lora_bt.abs().max() > 0
        else:
            assert layer.lora_bt.abs().max() < 1e-6


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
        with pytest.raises(UserError, match="another process"), account(cfg(), tmp_path, {"status": "running"}):
            pass
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        process.kill()
    with account(cfg(), tmp_path, {"status": "running"}):
        assert read_record(tmp_path)["status"] == "running"


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(cfg, quick, tmp_path, monkeypatch):
    from diffora.tasks.glue import GlueTask

    calls, loss = [0], GlueTask.loss

    def fails_later(self, output, batch):
        calls[0] += 1
        return loss(self, output, batch) * (float("nan") if calls[0] > 4 else 1)

    monkeypatch.setattr(GlueTask, "loss", fails_later)
    overrides = [o for o in quick if not o.startswith("search.")]
    with pytest.raises(UserError, match=r"not finite in epoch 2; stopped, the last good checkpoint is .*finetune-0001"):
        run(cfg(*overrides, "method=lora"), tmp_path / "run")
    record = read_record(tmp_path / "run")
    assert record["status"] == "failed" and "not finite" in record["error"]


def test_mistakes_on_the_command_line_give_messages_and_leave_nothing(tmp_path):
    folder = tmp_path / "run"
    err = command("method=diffroa", "finetune.epoch=3", "rank=0", f"hydra.run.dir={folder}", expect=1)
    assert "method=diffroa is not one of" in err and "did you mean finetune.epochs" in err
    assert "Traceback" not in err
    err = command("rho=7", "finetune.lr=-1", f"hydra.run.dir={folder}", expect=1)
    assert err.count("error: ") == 2 and "Traceback" not in err
    err = command("task=mrpc", "task.path=/no/such/folder", "model=tiny", f"hydra.run.dir={folder}", expect=1)
    assert "/no/such/folder" in err and "Traceback" not in err
    assert not folder.exists()


def test_without_the_hub_the_message_says_what_to_do(tmp_path):
    err = command("method=lora", "task=mrpc", f"hydra.run.dir={tmp_path / 'run'}", expect=1)
    assert "task.path=<folder" in err and "experiment=quickstart" in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_debug_shows_the_traceback(tmp_path):
    err = command("rho=7", "debug=default", f"hydra.run.dir={tmp_path / 'run'}", expect=1)
    assert "Traceback" in err and "rho=7" in err


def test_dry_run_counts_the_papers_parameters_without_network(tmp_path):
    folder = tmp_path / "run"
    out = command("dry_run=true", "method=lora", "rank=2", f"hydra.run.dir={folder}")
    record = read_record(folder)
    assert record["status"] == "dry_run" and record["params"]["adapter"] == 331_776 and "331,776" in out
    assert sorted(f.name for f in folder.iterdir()) == ["run.json"]


@pytest.mark.parametrize(
    ("overrides", "adapter"),
    [
        (["method=lora", "rank=8", "model=roberta_base"], 1_327_104),
        (["method=full_ft"], 183_831_552),
        (["method=full_ft", "model=roberta_base"], 124_055_040),
        (["method=houlsby", "method.size=16"], 608_640),  # 0.61M
        (["method=houlsby", "method.size=8"], 313_536),  # 0.31M
        (["method=pfeiffer", "method.size=32"], 599_424),  # 0.60M
        (["method=pfeiffer", "method.size=16"], 304_320),  # 0.30M
        (["method=bitfit"], 102_912),  # 0.1M
        (["method=flora", "rank=8", "model=roberta_base"], 1_331_712),  # 1.33M
        (["method=rm_lora", "rank=4"], 663_552),  # with the head of 592,130: 1.26M
        (["method=adalora", "rank=2"], 497_880),
        (["method=head_only"], 0),
        (["method=share_only"], 2 * (4 * 1536 + 2 * 3840)),
        (["method=diffora"], 359_417),
        (["method=diffora", "method.weight_sharing=false"], 331_776),
    ],
)
def test_dry_run_counts(cfg, tmp_path, overrides, adapter):
    record = run(cfg("dry_run=true", *overrides), tmp_path).record
    assert record["params"]["adapter"] == adapter
    if overrides == ["method=diffora"]:
        assert (record["params"]["adapter_min"], record["params"]["adapter_max"]) == (239_616, 454_656)


def test_dry_run_says_what_is_known_of_a_global_selection_and_of_budgets(cfg, tmp_path, capsys):
    def dry(*overrides):
        params = run(cfg("dry_run=true", *overrides), tmp_path).record["params"]
        return params, capsys.readouterr().out

    params, out = dry("method.scope=global")
    assert "36 of 72 modules" in out and "K =" not in out
    # All 24 FFN modules and 12 of the attention, or no FFN module and 36 of the attention, the other 12 of one type.
    assert params["adapter_max"] == 4 * (24 * 3840 + 12 * 1536) + 2 * 4 * 1536
    assert params["adapter_min"] == 4 * 36 * 1536 + 2 * (1536 + 2 * 3840)
    assert params["adapter_min"] < params["adapter"] < params["adapter_max"]
    params, out = dry("method.budget=0.35M")
    assert params["adapter"] == 350_000 and (params["rank_min"], params["rank_max"]) == (3, 5)
    assert "rank 3 to 5 within the budget" in out and "at most" in out
    params, out = dry("method.budget=350k", "method.scope=global", "method.selector=activation")
    assert f"{params['modules_min']} to {params['modules_max']} of 72 modules within the budget" in out
    assert 0 < params["modules_min"] < params["modules_max"] < 72
    params, out = dry("method.budget=350k", "method.selector=random")
    assert 350_000 - 36 * 3840 < params["adapter"] <= 350_000 and "36 of 72 modules selected, rank " in out


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rho=0.1", "method.weight_sharing=false"], "there is no adapter to train"),
        (["method.scope=global", "method.budget=100", "method.weight_sharing=false"], "at least one is selected"),
        (["method.budget=100"], "method.budget=100 is too small: 7424 parameters are the least"),
    ],
)
def test_what_leaves_nothing_to_train_is_refused_before_anything_is_written(cfg, quick, tmp_path, overrides, words):
    for dry in ("true", "false"):
        with pytest.raises(UserError, match=re.escape(words)):
            run(cfg(*quick, *overrides, f"dry_run={dry}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_sweep_survives_a_failed_job(quick, tmp_path):
    other = tmp_path / "other.json"  # what only the run can find out
    Selection(method="diffora", types=["a"], modules=[["a"]], selected=[["a"]], rho=1.0, seed=0).save(other)
    err = command("-m", *quick, "search.epochs=1", "finetune.epochs=1", f"method.selection={other},null",
                  f"hydra.sweep.dir={tmp_path / 'sweep'}", expect=1)  # fmt: skip
    assert "1 of 2 runs failed" in err and f"{other} was made for 1 layers" in err and "Traceback" not in err
    statuses = [json.loads(file.read_text())["status"] for file in sorted(tmp_path.glob("sweep/*/run.json"))]
    assert statuses == ["completed"]


def test_a_table_of_the_paper_in_small(tmp_path):
    given = ("experiment=table4_sample_rate", "scale=small", "seed=0", "finetune.epochs=1", "task.max_train_rows=96",
             "cell.column=digits", "cell.row='ρ = 0.2'", f"hydra.sweep.dir={tmp_path}")  # fmt: skip
    assert "takes -m" in command(*given, expect=1)
    assert "runs: 1 in" in command("-m", *given)
    record = read_record(tmp_path / "rho-0.2-digits-seed0")
    assert record["status"] == "completed" and record["selection"]["k"] == 1
    assert (record["experiment"], record["row"], record["column"]) == ("table4_sample_rate", "ρ = 0.2", "digits")


def test_wandb_without_a_key_records_offline_and_says_so(quick, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    out = command(
        *quick,
        "logger=[csv,wandb,tensorboard]",
        "search.epochs=1",
        "finetune.epochs=1",
        f"hydra.run.dir={tmp_path / 'run'}",
        WANDB_API_KEY="",
        NETRC=str(tmp_path / "none"),
    )
    assert "no API key" in out and "offline" in out
    assert list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    assert list((tmp_path / "run/wandb").glob("offline-run-*/files/media/images/DAM*.png"))
    assert list((tmp_path / "run/logs/tensorboard").rglob("events.*"))
    assert read_record(tmp_path / "run")["status"] == "completed"


def test_two_processes_give_one_result(quick, tmp_path):
    out = command(*quick, "trainer=ddp_cpu", f"hydra.run.dir={tmp_path / 'run'}")
    record = read_record(tmp_path / "run")
    assert record["status"] == "completed" and out.count("validation/accuracy") == 1
    assert len(record["history"]) == 3


def test_help_is_quick_and_lists_the_choices():
    began = time.time()
    out = command("--help")
    methods = sorted(file.stem for file in (REPO / "conf" / "method").glob("*.yaml"))
    assert f"method: {', '.join(methods)}" in " ".join(out.split()) and "task: alpaca" in out
    assert time.time() - began < 10  # a guard against importing torch, not a benchmark
