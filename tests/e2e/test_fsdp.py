"""Runs whose frozen weights are divided between two processes (FSDP) end as runs of one process do."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fsdp_runs import do
from safetensors.torch import load_file

from diffora.hub import EMBEDDED

pytestmark = pytest.mark.slow
SMALL = ["logger=none", "finetune.dropout=0", "finetune.batch_size=8", "finetune.epochs=2", "finetune.warmup_steps=0"]
TEXT = ["model=tiny", "task=paraphrase", "task.train_rows=27", "task.validation_rows=17"]  # no even numbers
WARM = ["method=diffora", "method.warm_start=true", "rank=2", "search.rank=2", "search.epochs=1", "search.batch_size=8"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("models")
    t5 = shutil.copytree(EMBEDDED.parent / "tiny_t5", folder / "t5")
    config = json.loads((t5 / "config.json").read_text()) | {"dropout_rate": 0.0}  # each process draws its own masks
    (t5 / "config.json").write_text(json.dumps(config))
    written = ["task=rewrite", "model=tiny_t5", f"model.path={t5}", "task.train_rows=16", "task.validation_rows=9"]
    return {
        "lora": ["method=lora", *TEXT],
        "warm": [*WARM, *TEXT],
        "parts": ["method=rm_lora", *TEXT, "finetune.accumulate=2"],
        "half": ["method=lora", *TEXT, "model.dtype=bfloat16", "trainer.gradient_checkpointing=true"],
        "written": ["method=lora", *written],
        # In most batches, one process has no row to generate for.
        "few": ["method=lora", *written, "task.generation.rows=4", "finetune.eval_batch_size=2"],
        "texts": [
            "method=lora",
            "task=sums",
            "model=tiny_sums",
            "task.train_rows=16",
            "task.validation_rows=8",
        ],  # forgetting
        "row": ["method=lora", *TEXT, "model.layer='.'", "model.candidates=[deberta.encoder.layer.0.output.dense]"],
    }


def launch(runs: dict[str, list[str]], place: Path) -> None:
    more = [*SMALL, "trainer=ddp_cpu", "trainer.strategy=fsdp"]
    content = json.dumps({name: [*overrides, *more] for name, overrides in runs.items()})
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*start, str(Path(__file__).with_name("fsdp_runs.py")), content, str(place)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def places(runs, tmp_path_factory) -> tuple[Path, Path]:
    """The folders with the runs of one process, and of two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    do({name: [*overrides, *SMALL, "trainer=cpu"] for name, overrides in runs.items()}, one)
    launch(runs, two)
    return one, two


def metrics_in(folder: Path) -> dict[str, float]:
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "completed"
    return record["metrics"]


@pytest.mark.parametrize("name", ["lora", "warm", "parts", "half", "written", "few", "texts", "row"])
def test_metrics_selection_and_export_are_those_of_one_process(places, name):
    one, two = (place / name for place in places)
    assert metrics_in(two) == pytest.approx(metrics_in(one), rel=2e-3 if name == "half" else 1e-4, abs=1e-5)
    for file in ("adapter_model.safetensors", "exact.safetensors"):
        if not (one / "adapter" / file).is_file():
            continue
        first, second = (load_file(folder / "adapter" / file) for folder in (one, two))
        for key, value in first.items():
            # By norm: where a gradient is almost 0, Adam takes a whole step in a direction that rounding decides. In
            # bfloat16, the rounding of a product depends on the number of rows in a process.
            assert (second[key] - value).norm() <= (0.2 if name == "half" else 1e-3) * value.norm(), key
    if name == "warm":
        assert metrics_in(one)["update/rank"] > 0
        first, second = (json.loads((folder / "selection.json").read_text()) for folder in (one, two))
        assert first["selected"] == second["selected"]


def test_a_resumed_run_ends_as_one_that_never_stopped(runs, places, tmp_path):
    folder = shutil.copytree(places[1] / "lora", tmp_path / "lora")
    newest = max((folder / "checkpoints").glob("finetune-*.ckpt"))
    size = sum(value.numel() for value in torch.load(newest, weights_only=True)["state_dict"].values())
    assert newest.stat().st_size < 40 * size  # trained weights, best weights and two moments: no frozen matrix
    newest.unlink()
    shutil.rmtree(folder / "adapter")
    (folder / "run.json").unlink()
    for _ in range(2):  # the second time, it is complete, and no process waits for the others
        launch({"lora": [*runs["lora"], "resume=true"]}, tmp_path)
    assert metrics_in(folder) == metrics_in(places[1] / "lora")
    first, second = (
        load_file(place / "adapter" / "adapter_model.safetensors") for place in (places[1] / "lora", folder)
    )
    assert all(torch.equal(second[key], value) for key, value in first.items())
