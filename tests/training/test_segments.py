"""Evaluation and checkpoints within an epoch: a run that resumes there gives the result of one that never stopped."""

import csv
import sys
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from stopped_runs import LORA, assert_equal_runs, run_of, stop

from diffora.loop.data import FineTuneData
from diffora.loop.plan import plan_of
from diffora.training.finetune import FineTuneModule

ROWS = ["task.train_rows=44", "task.validation_rows=16", "finetune.batch_size=8"]  # 6 steps an epoch, the last smaller
HALF = [*LORA, *ROWS, "finetune.epochs=2", "finetune.eval_every=0.5"]


def resumed(overrides, folder, segment, batch=1):
    """(a run that was stopped and resumed, one that never stopped)"""
    whole = run_of(*overrides, folder=folder / "whole")
    stop(*overrides, folder=folder / "part", epoch=segment, batch=batch)
    return run_of(*overrides, "resume=true", folder=folder / "part"), whole


@pytest.mark.parametrize(
    "workers", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow), 2]
)
def test_a_run_resumes_exactly_within_an_epoch(workers, tmp_path):
    ours, whole = resumed([*HALF, f"trainer.num_workers={workers}"], tmp_path, segment=1)
    assert [scores["epoch"] for scores in whole.record["history"]] == [0.5, 1.0, 1.5, 2.0]
    assert_equal_runs(ours, whole)


CASES = {
    "micro-batches": ["finetune.accumulate=2"],
    "steps across epochs": ["finetune.eval_every=4", "finetune.max_steps=10", "finetune.accumulate=2"],
    "adalora": ["method=adalora", "method.every=1"],
    "masks of each epoch": ["method=gm_lora", "method.mask.every=epoch"],
    "masks, sgd, one cycle, LoRA+, micro-batches": [
        "method=gm_lora", "finetune.accumulate=2",
        "finetune.optimizer={_target_: torch.optim.SGD, momentum: 0.9}", "finetune.lora_plus_ratio=4",
        "finetune.scheduler={_target_: torch.optim.lr_scheduler.OneCycleLR, pct_start: 0.5}",
        "finetune.warmup_steps=0",
    ],
    "adafactor, cosine": ["finetune.optimizer=adafactor", "finetune.scheduler=cosine"],
}  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [pytest.param(more, marks=[] if "LoRA+" in name else pytest.mark.slow, id=name) for name, more in CASES.items()],
)
def test_everything_that_has_a_state_resumes_within_an_epoch(more, tmp_path):
    ours, whole = resumed([*HALF, *more], tmp_path, segment=1)
    assert_equal_runs(ours, whole)
    assert whole.record["history"][-1]["epoch"] == (1.6667 if "finetune.max_steps=10" in more else 2)


def test_steps_and_evaluations_have_the_same_count_of_epochs(tmp_path):
    more = ["task.train_rows=200", "finetune.eval_every=0.5", "logger=[csv]"]  # 25 steps an epoch
    run_of(*LORA, *ROWS, *more, "finetune.epochs=2", folder=tmp_path / "run")
    [file] = (tmp_path / "run" / "logs" / "finetune").rglob("metrics.csv")
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    steps = [(int(row["step"]) + 1, float(row["epoch"])) for row in rows if row["train/step_loss"]]
    assert [epoch for _, epoch in steps] == pytest.approx([step / 25 for step, _ in steps]) and len(steps) > 1
    evaluations = [float(row["epoch"]) for row in rows if row["validation/accuracy"]]
    assert evaluations == pytest.approx([0.48, 1.0, 1.48, 2.0])


def test_a_finished_stage_is_not_trained_again(tmp_path):
    overrides = [*HALF, "finetune.max_steps=5"]
    whole = run_of(*overrides, folder=tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr("diffora.training.finetune.FineTuneModule.training_step")
        assert_equal_runs(run_of(*overrides, "resume=true", folder=tmp_path / "run"), whole)


def test_a_stage_that_a_callback_ended_is_not_trained_again(tmp_path):
    stops = "{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: validation/loss, min_delta: 9, patience: 1}"
    overrides = [*HALF, f"trainer.callbacks=[{stops}]"]
    whole = run_of(*overrides, folder=tmp_path / "run")
    assert len(whole.record["history"]) == 2  # of 4
    (tmp_path / "run" / "run.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr("diffora.training.finetune.FineTuneModule.training_step")
        assert_equal_runs(run_of(*overrides, "resume=true", folder=tmp_path / "run"), whole)


class Stops(Callback):
    """Asks to stop within an epoch, and again at the end of the first one."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step == 1

    def on_train_epoch_end(self, trainer, module):
        trainer.should_stop = True


@pytest.mark.parametrize(("every", "epochs"), [("0.5", 0.5), ("null", 1.0), ("9", 1.5)])
def test_a_callback_stops_a_run_at_the_next_evaluation(every, epochs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "my_own", sys.modules[__name__])
    more = ["finetune.epochs=3", f"finetune.eval_every={every}", "trainer.callbacks=[{_target_: my_own.Stops}]"]
    history = run_of(*LORA, *ROWS, *more, folder=tmp_path / "run").record["history"]
    assert [scores["epoch"] for scores in history] == [epochs]


def test_training_metrics_take_the_newest_output_of_a_row_whatever_process_has_it(monkeypatch):
    row, step = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([3, 2, 0, 1, 5])
    whole = {"row": row, "step": step, "value": 10 * row + step}
    parts = [{key: value[:3] for key, value in whole.items()}, {key: value[3:] for key, value in whole.items()}]
    scored = []
    module = SimpleNamespace(
        _losses=[], _seen=[{key: value[:0] for key, value in whole.items()}], current_epoch=0, train_split=None,
        plan=SimpleNamespace(epochs_after=lambda epoch: 1.0), trainer=SimpleNamespace(world_size=2),
        _gather=lambda outputs: FineTuneModule._gather(module, outputs),
        task=SimpleNamespace(score=lambda outputs, split: scored.append(outputs) or {}),
    )  # fmt: skip
    exchange = lambda found, mine: found.__setitem__(slice(None), parts)  # noqa: E731
    monkeypatch.setattr(torch.distributed, "all_gather_object", exchange)
    FineTuneModule._training_scores(module)
    assert scored[0]["row"].tolist() == [0, 1, 2] and scored[0]["value"].tolist() == [3, 15, 20]
    assert "step" not in scored[0]


MASKED = [*LORA, *ROWS, "method=gm_lora", "method.mask.every=epoch"]


def test_segments_change_no_step(tmp_path):
    """With the same steps, the weights are the same, however often the model is evaluated in between.

    The masks are drawn for each epoch, not for each segment.
    """
    found = [
        run_of(*MASKED, *more, folder=tmp_path / str(i)).record["history"][-1]
        for i, more in enumerate(([], ["finetune.max_steps=12", "finetune.eval_every=5"]))
    ]
    parts = ("validation/loss", "validation/accuracy", "update/orthogonality_loss", "epoch")
    assert len({tuple(scores[part] for part in parts) for scores in found}) == 1


def test_early_stop_counts_evaluations(tmp_path):
    record = run_of(*HALF, "finetune.early_stop=1", "finetune.lr=1e-12", folder=tmp_path / "run").record
    assert [scores["epoch"] for scores in record["history"]] == [0.5, 1.0]


def test_the_batches_of_all_segments_are_those_of_the_epochs():
    import datasets

    rows = datasets.Dataset.from_dict({"row": list(range(22)), "length": [i % 5 + 1 for i in range(22)]})
    collate = (lambda found: torch.tensor(found["row"]),) * 2

    def batches(plan, segments):
        loader = FineTuneData(rows, {}, collate, 4, 4, 0, accumulate=2, plan_for=plan).train_dataloader()
        found = []
        for segment in range(segments):
            loader.sampler.set_epoch(segment)
            assert len(list(loader)) == len(loader)
            found += [batch.tolist() for batch in loader]
        return found

    whole = batches(lambda n: plan_of(n, 3), 3)
    assert batches(lambda n: plan_of(n, 3, every=0.34), 9) == whole
    assert batches(lambda n: plan_of(n, 1, max_steps=8, every=2), 5) == whole[:16]
