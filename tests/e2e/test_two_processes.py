"""Two processes give the metrics of one: words, choices, generated text, and going on from an adapter."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

from diffora.hub import EMBEDDED

LONG = ["the farmer", "a teacher was seen", "the gardener in the market", "somebody"]
SHORT = ["method=lora", "logger=csv", "finetune.dropout=0", "finetune.epochs=2", "finetune.batch_size=6"]
OWN = ["model=tiny", "task.max_train_rows=16", "task.validation_fraction=0.3"]  # an even number: no row is left out


def written(file: Path, rows: list[dict]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"task.path={file}"


def words(folder: Path) -> list[str]:
    """Each sentence is read in two windows, so their number is even too."""
    tokens = ["was", "seen"] * 4
    rows = [{"tokens": ["Ann", *tokens, f"x{i}"], "ner_tags": ["B-PER", *["O"] * 9]} for i in range(24)]
    return [*OWN, "task=tokens", written(folder / "w.jsonl", rows), "task.max_length=12", "task.doc_stride=3"]


def choices(folder: Path) -> list[str]:
    rows = [{"context": f"who told x{i}", "choices": LONG[: 2 + i % 3], "label": i % (2 + i % 3)} for i in range(24)]
    return [*OWN, "task=choice", written(folder / "c.jsonl", rows), "task.max_length=32"]


def generated(folder: Path) -> list[str]:
    """A T5 without dropout: each process draws its own, so with dropout the runs would differ."""
    model = shutil.copytree(EMBEDDED.parent / "tiny_t5", folder / "t5")
    config = json.loads((model / "config.json").read_text()) | {"dropout_rate": 0.0}
    (model / "config.json").write_text(json.dumps(config))
    return ["task=rewrite", "model=tiny_t5", f"model.path={model}", "task.train_rows=16", "task.validation_rows=9"]


def trained(folder: Path, *overrides: str) -> dict[str, float]:
    """The metrics of a run of `train.py`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, REPO / "train.py", *SHORT, *overrides, f"hydra.run.dir={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "completed"
    return {name: value for name, value in record["metrics"].items() if name.startswith(("validation/", "train/"))}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [words, choices, generated])
def test_two_processes_give_the_metrics_of_one(tmp_path, kind):
    overrides = kind(tmp_path)
    one, two = (trained(tmp_path / name, *overrides, f"trainer={name}") for name in ("cpu", "ddp_cpu"))
    assert len(one) > 3 and two == pytest.approx(one, rel=1e-4)
    assert kind is not generated or one["validation/rouge1"] > 0


@pytest.mark.slow
def test_two_processes_go_on_from_an_adapter_as_one_does(tmp_path):
    overrides = choices(tmp_path)
    first = trained(tmp_path / "first", *overrides, "trainer=cpu", "finetune.lr=0.01")
    more = [*overrides, f"method.adapter={tmp_path / 'first' / 'adapter'}"]
    one, two = (trained(tmp_path / name, *more, f"trainer={name}") for name in ("cpu", "ddp_cpu"))
    assert two == pytest.approx(one, rel=1e-4) and one["train/loss"] != pytest.approx(first["train/loss"], rel=1e-2)
