"""Runs with real data and a real pretrained encoder. They take minutes: `make test-slow` runs them."""

import pytest

from diffora.run.experiment import run

pytestmark = pytest.mark.slow


def overrides(real_data, minilm, task):
    return [
        f"task={task}", f"task.path={real_data / task}", "model=minilm", f"model.path={minilm}", "logger=csv",
        "trainer=cpu", "finetune.batch_size=32", "finetune.lr=1e-3",
    ]  # fmt: skip


def test_lora_learns_mrpc(cfg, real_data, minilm, tmp_path):
    result = run(
        cfg(*overrides(real_data, minilm, "mrpc"), "method=lora", "rank=2", "finetune.epochs=2"), tmp_path / "r"
    )
    assert result.metrics["validation/accuracy"] > 0.74  # always answering yes gives 0.684


def test_diffora_searches_and_learns_cola(cfg, real_data, minilm, tmp_path):
    more = ["method=diffora", "search.epochs=1", "finetune.epochs=1", "task.max_train_rows=3000"]
    result = run(cfg(*overrides(real_data, minilm, "cola"), *more), tmp_path / "r")
    assert result.metrics["validation/matthews"] > 0.1
    gamma_bar = [value for row in result.selection.gamma_bar for value in row]
    assert max(gamma_bar) - min(gamma_bar) > 0.01  # the search moved


@pytest.mark.parametrize("task", ["mrpc", "cola", "wnli"])
def test_every_real_task_runs(cfg, real_data, minilm, tmp_path, task):
    more = ["method=diffora", "search.epochs=1", "finetune.epochs=1", "task.max_train_rows=64"]
    assert run(cfg(*overrides(real_data, minilm, task), *more), tmp_path / "r").record["status"] == "completed"
