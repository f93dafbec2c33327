"""task=tokens and task=choice with every kind of method: the model from disk scores as the one in memory."""

import pytest
import torch
from test_choice import rows as choice_rows
from test_choice import write
from test_tokens import rows as word_rows

from diffora.run.evaluate import evaluate, read_request
from diffora.run.experiment import run

METHODS = [
    "diffora",
    "random",
    "lora",
    "rm_lora",
    "full_ft",
    "adalora",
    "sora",
    "pfeiffer",
    "ia3",
    "bitfit",
    "head_only",
]
QUICK = {("adalora", "tokens"), ("sora", "choice")}


@pytest.mark.parametrize(
    ("method", "task"),
    [
        pytest.param(method, task, marks=() if (method, task) in QUICK else pytest.mark.slow)
        for method in METHODS
        for task in ("tokens", "choice")
    ],
)
def test_the_exported_model_scores_as_the_trained_one(cfg, tmp_path, method, task):
    torch.set_num_threads(1)
    file = write(tmp_path / "rows.jsonl", choice_rows(16) if task == "choice" else word_rows(16))
    short = [
        "model=tiny",
        "trainer=cpu",
        "logger=csv",
        "task.max_length=40",
        "finetune.batch_size=4",
        "finetune.epochs=1",
    ]
    searched = ["search.epochs=1"] if method == "diffora" else []
    composed = cfg(f"method={method}", f"task={task}", f"task.path={file}", *short, *searched, "finetune.lr=0.01")
    found = run(composed, tmp_path / "run")
    assert found.record["status"] == "completed"
    scores = evaluate(read_request([f"run={found.folder}", f"output={tmp_path / 'out'}"]))["validation"]
    expected = {
        key.removeprefix("validation/"): v
        for key, v in found.record["metrics"].items()
        if key.startswith("validation/")
    }
    assert scores == pytest.approx(expected, rel=1e-3, abs=1e-4)
    head = [p.requires_grad for name, p in found.model.named_parameters() if "classifier" in name]
    assert head and all(head)  # every method trains the new head
