"""Worker of test_score.py, started once per process. It computes scores over gloo and writes them to a file."""

import json
import os
import sys
from pathlib import Path

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from small import rows_of, small_deberta, small_task

from diffora.core.grid import find_grid
from diffora.loop.data import SearchData
from diffora.loop.splits import split_search
from diffora.scoring.measures import MEASURES
from diffora.scoring.one_pass_stages import FunctionStage, MeasureStage
from diffora.tasks.tokenise import Collator

TYPES = ("attention.self.query_proj", "attention.self.value_proj", "attention.output.dense", "output.dense")

COLLATE = Collator(0), Collator(0)  # for training and for evaluation


def uneven_task():
    """A task whose rows of the second class count nine times, as longer texts do where the loss averages tokens."""

    def counts(batch):
        return 1.0 + 8 * batch["labels"]

    def loss(output, batch):
        losses = F.cross_entropy(output.logits, batch["labels"], reduction="none")
        return (losses * counts(batch)).sum() / counts(batch).sum()

    task = small_task()
    task.weight, task.loss = lambda batch: float(counts(batch).sum()), loss
    return task


def scored(
    criterion: str,
    model=None,
    accumulate: int = 1,
    batches: int = 2,
    devices: int = 1,
    types=TYPES,
    task=None,
    **trainer,
):
    """A MeasureStage after its stage, on 24 of the 48 rows in batches of 8."""
    model = model or small_deberta()
    measure = MEASURES[criterion](model, find_grid(model, candidates=types), seed=0)
    module = MeasureStage(measure, criterion, task or small_task(), accumulate, seed=0)
    return fitted(module, batches, devices, **trainer)


def called(function, model=None, devices: int = 1, **trainer):
    """A FunctionStage after its stage, on two batches of 8 of the same rows."""
    model = model or small_deberta()
    module = FunctionStage(model, find_grid(model, candidates=TYPES), function, "a.b", small_task(), seed=0)
    return fitted(module, 2, devices, whole=True, **trainer)


def fitted(module, batches: int, devices: int, whole: bool = False, **trainer):
    split = split_search(np.arange(48), seed=0)
    L.Trainer(
        accelerator="cpu",
        devices=devices,
        max_epochs=1,
        limit_train_batches=batches,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **trainer,
    ).fit(module, datamodule=SearchData(rows_of(), COLLATE, split, batch_size=8, seed=0, whole=whole))
    return module


def rows_and_noise(model, grid, batches, loss):
    """How many rows the function sees, plus noise below 1/2 that differs between processes."""
    n_rows = sum(len(batch["row"]) for batch in batches)
    return n_rows + torch.rand(grid.n_layers, grid.n_types) / 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    devices = int(os.environ["LOCAL_WORLD_SIZE"])
    found = {c: scored(c, devices=devices, strategy="ddp") for c in MEASURES}
    found["function"] = called(rows_and_noise, devices=devices, strategy="ddp")
    found["uneven"] = scored("gradient", task=uneven_task(), devices=devices, strategy="ddp")
    rank = found["gradient"].global_rank
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps({c: m.scores.tolist() for c, m in found.items()}))
    torch.distributed.destroy_process_group()  # gloo's threads may otherwise abort a process that ends
