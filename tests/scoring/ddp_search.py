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
from diffora.core.dam import discretise
from diffora.core.grid import find_grid
from diffora.core.selection import Selection
from diffora.loop.data import SearchData, eval_loader
from diffora.loop.splits import split_search
from diffora.scoring.attribution import AttributionModule
from diffora.scoring.bilevel import SearchModule
from diffora.scoring.one_shot import Draws, OneShotData, OneShotModule, scored_rows
from diffora.settings.sections import Search
from diffora.tasks.tokenise import Collator

TYPES = ("attention.self.query_proj", "attention.self.value_proj", "output.dense")

COLLATE = Collator(0), Collator(0)  # for training and for evaluation


class Notes(L.Callback):
    def __init__(self) -> None:
        self.gamma: list[list[list[float]]] = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.gamma.append(pl_module.gamma.tolist())


def choose(grid, scores):
    return Selection.from_mask(grid, discretise(scores, 1), method="test", rho=0.5, seed=0)


def main(folder: Path, update: str) -> None:
    torch.set_num_threads(1)
    model = small_deberta()
    grid = find_grid(model, "encoder.layer.*", TYPES)
    layers = attach(model, grid.names, torch.ones(2, 3, dtype=torch.bool), 2, None, alpha=4, freeze=False)
    for row in layers:
        for layer in row:
            torch.nn.init.normal_(layer.lora_bt, std=0.3)
    attribution, one_shot = update == "attribution", update == "one_shot"
    name = "alternating" if attribution or one_shot else update
    settings = Search(epochs=2, batch_size=8, rank=2, lr=1e-3, update=name, masks=10)
    arguments = model, layers, TYPES, small_task(), settings, 0
    split, matched = split_search(np.arange(48), seed=0), update == "simultaneous"
    data = SearchData(rows_of(), COLLATE, split, batch_size=8, seed=0, matched=matched)
    if attribution:
        module = AttributionModule(*arguments, rounds=1, score_batches=2)
    elif one_shot:
        draws = Draws(lambda scores: choose(grid, scores), (2, 3), 2, 2, seed=0)
        valid = scored_rows(split[1], 19, seed=0)  # two processes cannot share them evenly
        rows = lambda: eval_loader(rows_of(), COLLATE[1], 8, valid)  # noqa: E731
        module = OneShotModule(*arguments, draws=draws, rounds=1, rows=rows)
        data = OneShotData(data, 1, settings.masks)
    else:
        module = SearchModule(*arguments)
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
        reload_dataloaders_every_n_epochs=int(one_shot),
    )
    trainer.fit(module, datamodule=data)
    weights = [p.detach().double().sum().item() for p in module.weights]
    name = f"{trainer.world_size}-{trainer.global_rank}.json"
    scores = module.scores.tolist() if attribution else module.losses if one_shot else None
    (folder / name).write_text(json.dumps({"gamma": notes.gamma, "weights": weights, "scores": scores}))
    torch.distributed.destroy_process_group()  # gloo's threads may otherwise abort a process that ends


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
