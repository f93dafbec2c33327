"""Training in bfloat16 on a CPU takes the same memory however many widths the batches have."""

import json
import subprocess
import sys

import pytest
import torch

from diffora.backbones.precision import bfloat16_unit

CPU = torch.device("cpu")

# How much resident memory 54 widths add, rounded or not, once every multiple of 8 has been there. In a process of its
# own, where the caches of oneDNN and torch are empty.
CODE = """
import json, sys
import numpy as np, torch
from transformers import BertConfig, BertForSequenceClassification
from diffora.backbones.attention import use_bfloat16_attention
from diffora.backbones.precision import width_multiple
from diffora.core.attach import attach
from diffora.core.grid import find_grid
from diffora.tasks.tokenise import Collator

def resident_mb():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

multiple = width_multiple("bf16-mixed", torch.device("cpu"), 512) if sys.argv[1] == "rounded" else 1
collate = Collator(0, pad_to_multiple_of=multiple)
model = BertForSequenceClassification(BertConfig(
    hidden_size=256, num_hidden_layers=1, num_attention_heads=4, intermediate_size=1024, vocab_size=200,
)).to(torch.bfloat16).requires_grad_(False)
model.classifier.float().requires_grad_(True)
use_bfloat16_attention(model)
grid = find_grid(model, "encoder.layer.*")
attach(model, grid.names, torch.ones(1, grid.n_types, dtype=torch.bool), 4, None, 8, freeze=False)
model.train()

def step(width):
    rows = {"input_ids": [np.arange(width) % 190 + 5] * 4, "labels": [0, 1, 0, 1]}
    batch = {k: v for k, v in collate(rows).items() if k in ("input_ids", "attention_mask", "labels")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**batch).loss.backward()

for width in [*range(128, 0, -8)] * 2:
    step(width)
before = resident_mb()
for width in range(21, 128, 2):
    step(width)
print(json.dumps(resident_mb() - before))
"""


def growth(widths):
    done = subprocess.run([sys.executable, "-c", CODE, widths], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or bfloat16_unit(CPU) is None, reason="no bfloat16 in this processor")
def test_memory_does_not_grow_with_the_number_of_widths():
    rounded, free = growth("rounded"), growth("free")
    assert rounded < 30, free  # MB
    assert free > 100  # what rounding is for
