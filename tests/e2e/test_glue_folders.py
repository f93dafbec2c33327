"""GLUE tasks from local folders, whole runs: MNLI's two validation splits, and predictions of test splits."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from diffora.errors import UserError
from diffora.run.experiment import run
from diffora.run.terminal import print_result
from diffora.tasks.base import get_task

SHORT = [
    "model=tiny", "trainer=cpu", "logger=csv", "method=lora", "task.max_length=16", "finetune.epochs=5",
    "finetune.warmup_steps=2", "finetune.batch_size=16", "finetune.lr=5e-3",
]  # fmt: skip


def write(folder, split, n, labels=True, flip=False):
    """Rows whose premise shows the label: poet, nurse or robber. With ``flip``, all labels are wrong."""
    label = [i % 3 for i in range(n)]
    columns = {
        "premise": [f"a {('poet', 'nurse', 'robber')[k]} was tired" for k in label],
        "hypothesis": ["the poet was tired"] * n,
        "label": [(k + flip) % 3 if labels else -1 for k in label],
        "idx": list(range(n))[::-1],
    }
    folder.mkdir(exist_ok=True)
    pa.parquet.write_table(pa.table(columns), folder / f"{split}.parquet")


@pytest.fixture
def mnli(tmp_path):
    folder = tmp_path / "mnli"
    write(folder, "train", 96)
    write(folder, "validation_matched", 24)
    write(folder, "validation_mismatched", 30, flip=True)
    for split, n in (("test_matched", 9), ("test_mismatched", 12), ("ax", 6)):
        write(folder, split, n, labels=False)
    return folder


def test_mnli_matched_and_mismatched_and_its_three_test_sets(cfg, mnli, tmp_path, capsys):
    composed = cfg("task=mnli", f"task.path={mnli}", "predict=true", *SHORT)
    result = run(composed, tmp_path / "run")
    metrics = result.metrics
    assert metrics["validation/accuracy"] > 0.9  # the matched split chooses the epoch
    assert metrics["validation_mismatched/accuracy"] < 0.1  # whose labels are all wrong
    assert {"held_out/accuracy", "validation/loss", "validation_mismatched/loss"} <= metrics.keys()
    assert not any(key.startswith("validation_matched") for key in metrics)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["metrics"] == metrics and record["main_metric"] == "accuracy"
    print_result(record, get_task(composed.task), tmp_path / "run")
    assert "mismatched" in capsys.readouterr().out
    record["metrics"]["held_out/accuracy"] = None  # as run.json has a number that is not finite
    print_result(record, get_task(composed.task), tmp_path / "run")
    assert "nan" in capsys.readouterr().out
    strange = tmp_path / "lr[red]x"  # rich would read this as a mark
    (tmp_path / "run").rename(strange)
    print_result(record, get_task(composed.task), strange)
    assert str(strange) in capsys.readouterr().out
    strange.rename(tmp_path / "run")

    names = ("entailment", "neutral", "contradiction")
    for file, n in (("MNLI-m.tsv", 9), ("MNLI-mm.tsv", 12), ("AX.tsv", 6)):
        [found] = (tmp_path / "run").rglob(file)
        lines = found.read_text().splitlines()
        assert lines == ["index\tprediction", *(f"{i}\t{names[(n - 1 - i) % 3]}" for i in range(n))]


def test_a_missing_test_split_is_found_before_anything_is_trained(cfg, mnli, tmp_path):
    (mnli / "test_mismatched.parquet").unlink()
    with pytest.raises(UserError, match="no file for the split 'test_mismatched'"):
        run(cfg("task=mnli", f"task.path={mnli}", "predict=true", *SHORT), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (mnli / "ax.parquet").unlink()
    write(mnli, "test_mismatched", 3, labels=False)
    assert get_task(cfg("task=mnli", f"task.path={mnli}").task).test_splits == ("test_matched", "test_mismatched")
