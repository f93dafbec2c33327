"""Worker of test_score.py, started once per process: scores over gloo, written down by each process."""

import json
import os
import sys
from pathlib import Path

import datasets
import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from diffora.core.grid import find_grid
from diffora.models import freeze_backbone
from diffora.tasks.tokenise import Collator
from diffora.training.data import SearchData, split_search
from diffora.training.score import ScoreModule

TYPES = ("attention.self.query_proj", "attention.self.value_proj", "attention.output.dense", "output.dense")


def small_model(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["c2p", "p2c"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        type_vocab_size=0,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=2,
    )
    model = DebertaV2ForSequenceClassification(config).to(dtype)
    for parameter in model.parameters():  # the default 0.02 leaves attention all but uniform
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.25)
    return freeze_backbone(model)


def rows_of(n: int = 48) -> datasets.Dataset:
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 10, size=n)
    return datasets.Dataset.from_dict(
        {
            "input_ids": [rng.integers(3, 50, size=length).tolist() for length in lengths],
            "labels": rng.integers(0, 2, size=n).tolist(),
            "length": lengths.tolist(),
            "row": list(range(n)),
        }
    )


def scored(criterion: str, model=None, accumulate: int = 1, batches: int = 2, devices: int = 1, **trainer):
    """A ScoreModule after its stage, on 24 of the 48 rows in batches of 8."""
    model = model or small_model()
    names = find_grid(model, "encoder.layer.*", TYPES).names
    module = ScoreModule(model, names, criterion, F.cross_entropy, accumulate, seed=0)
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
    ).fit(module, datamodule=SearchData(rows_of(), Collator(0), split_search(48, seed=0), batch_size=8, seed=0))
    return module


if __name__ == "__main__":
    torch.set_num_threads(1)
    devices = int(os.environ["LOCAL_WORLD_SIZE"])
    found = {c: scored(c, devices=devices, strategy="ddp") for c in ("gradient", "activation")}
    rank = found["gradient"].global_rank
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps({c: m.scores.tolist() for c, m in found.items()}))
    torch.distributed.destroy_process_group()  # gloo's threads may otherwise abort a process that ends
