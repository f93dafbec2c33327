"""A small model of the true architecture and rows for it, for tests and for the processes that tests start."""

import datasets
import numpy as np
import torch
from torch import nn
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from diffora.backbones.backbone import Backbone
from diffora.tasks.glue import GlueSettings, GlueTask


def small_deberta(
    seed: int = 0, layers: int = 2, dropout: float = 0.0, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A DeBERTa-v2 classifier with random weights, frozen but for its head."""
    torch.manual_seed(seed)
    config = DebertaV2Config(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=layers,
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
        pooler_dropout=dropout,
        num_labels=2,
    )
    model = DebertaV2ForSequenceClassification(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # the default 0.02 leaves attention all but uniform
            if parameter.ndim == 2:
                parameter.normal_(std=0.25)
    return Backbone.of(model).freeze().model


def rows_of(n: int = 48) -> datasets.Dataset:
    """Tokenised rows of different lengths with random labels."""
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


def small_task(name: str = "mrpc") -> GlueTask:
    """A task without data: head, loss and metrics."""
    return GlueTask(GlueSettings(name=name, max_length=32))
