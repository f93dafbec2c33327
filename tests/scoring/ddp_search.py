"""Worker of test_search.py, started once per process. It searches over gloo and writes Gamma after every step."""

import json
import os
import sys
from pathlib import Path

import lightning as L
import numpy as np
import torch
from small import rows_of, small_deberta, small_task

from diffora.core.attach import attach
from diffora.core.grid import find_grid
from diffora.loop.data import SearchData
from diffora.loop.splits import split_search
from diffora.scoring.attribution import AttributionModule
from diffora.scoring.bilevel import SearchModule
from diffora.settings.sections import Search
from diffora.tasks.tokenise import Collator

TYPES = ("attention.self.query_proj", "attention.self.value_proj", "output.dense")

COLLATE = Collator(0), Collator(0)  # for training and for evaluation


class Notes(L.Callback):
    def __init__(self) -> None:
        self.gamma: list[list[list[float]]] = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.gamma.append(pl_module.gamma.tolist())


def main(folder: Path, update: str) -> None:
    torch.set_num_threads(1)
    model = small_deberta()
    grid = find_grid(model, "encoder.layer.*", TYPES)
    layers = attach(model, grid.names, torch.ones(2, 3, dtype=torch.bool), 2, None, alpha=4, freeze=False)
    for row in layers:
        for layer in row:
            torch.nn.init.normal_(layer.lora_bt, std=0.3)
    attribution = update == "attribution"
    settings = Search(epochs=2, batch_size=8, rank=2, lr=1e-3, update="alternating" if attribution else update)
    arguments = model, layers, TYPES, small_task(), settings, 0
    module = AttributionModule(*arguments, rounds=1, score_batches=2) if attribution else SearchModule(*arguments)
    split, matched = split_search(np.arange(48), seed=0), update == "simultaneous"
    data = SearchData(rows_of(), COLLATE, split, batch_size=8, seed=0, matched=matched)
    notes = Notes()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        strategy="ddp",
        max_epochs=2,
        logger=False,
        callbacks=[notes],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data)
    weights = [p.detach().double().sum().item() for p in module.weights]
    name = f"{trainer.world_size}-{trainer.global_rank}.json"
    scores = module.scores.tolist() if attribution else None
    (folder / name).write_text(json.dumps({"gamma": notes.gamma, "weights": weights, "scores": scores}))
    torch.distributed.destroy_process_group()  # gloo's threads may otherwise abort a process that ends


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
