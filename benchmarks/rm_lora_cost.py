"""What the regulariser and the masks of RM-LoRA cost, and save, in one optimisation step, side by side with LoRA.

    python benchmarks/rm_lora_cost.py [--ranks 4 64] [--rows 16] [--length 64] [--rounds 15] [--threads 1]

The backbone has MiniLM's shape and random weights. All contenders take turns in one process; a figure is the median
over rounds of the ratio to plain LoRA of the same round, with quartiles. ``adapter_flops`` are the adapters' share of
the backward pass, counted by torch (for LoRA: what another adapter of the same rank would add). ``loop`` is R-LoRA
with one product per adapter and factor in place of one per shape.
"""

import argparse
import json
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification

from diffora.core.grid import find_grid
from diffora.core.lowrank import lowrank_layers
from diffora.core.orthogonality import orthogonality
from diffora.methods.gm_lora import GMLoRA
from diffora.methods.lora import LoRA
from diffora.methods.lowrank import Mask, Regulariser
from diffora.methods.r_lora import RLoRA
from diffora.methods.rm_lora import RMLoRA
from diffora.models import freeze_backbone

TYPES = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
TYPES += ["intermediate.dense", "output.dense"]
REGULARISER = Regulariser(1e-3, "squared")
MASK = Mask("half", "step", False, "gradient", 0, False)


class Contender:
    """An adapted model and its step."""

    def __init__(self, method, loop=False):
        torch.manual_seed(0)
        shape = {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
        config = BertConfig(**shape, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        self.model = freeze_backbone(BertForSequenceClassification(config)).train()
        self.loop, self.number = loop, 0
        self.adaptation = method.adapt(self.model, find_grid(self.model, "encoder.layer.*", TYPES), None, 0)
        for _, layer in lowrank_layers(self.model):
            torch.nn.init.normal_(layer.lora_bt, std=0.02)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], fused=True)

    def loss(self, batch):
        loss = self.model(**batch).loss
        if self.loop:
            pairs = [(layer.lora_a, layer.lora_bt) for _, layer in lowrank_layers(self.model)]
            return loss + 1e-3 * sum(orthogonality([m]) for pair in pairs for m in pair)
        penalty = self.adaptation.penalty()
        return loss if penalty is None else loss + penalty

    def step(self, batch):
        begin = time.perf_counter()
        self.adaptation.before_step(self.number, 0)
        self.loss(batch).backward()
        self.optimizer.step()
        self.adaptation.after_step(self.number, 1e-3)
        self.optimizer.zero_grad()
        self.number += 1
        return time.perf_counter() - begin

    def backward_flops(self, batch):
        self.adaptation.before_step(0, 0)
        loss = self.loss(batch)
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        self.model.zero_grad()
        return counter.get_total_flops()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 64])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    batch = {
        "input_ids": torch.randint(5, 30000, (given.rows, given.length)),
        "attention_mask": torch.ones(given.rows, given.length, dtype=torch.long),
        "labels": torch.randint(0, 2, (given.rows,)),
    }
    report = {"rows": given.rows, "length": given.length, "rounds": given.rounds, "torch": torch.__version__}
    for rank in given.ranks:
        common = {"rank": rank, "dropout": 0.0, "alpha": 8.0}
        contenders = {
            "lora": Contender(LoRA(**common)),
            "gm_lora": Contender(GMLoRA(**common, mask=MASK)),
            "r_lora": Contender(RLoRA(**common, regulariser=REGULARISER)),
            "r_lora, loop": Contender(LoRA(**common), loop=True),
            "rm_lora": Contender(RMLoRA(**common, regulariser=REGULARISER, mask=MASK)),
        }
        times = {name: [] for name in contenders}
        for turn in range(given.rounds + 2):
            for name, contender in contenders.items():
                spent = contender.step(batch)
                if turn >= 2:
                    times[name].append(spent)
        lora = contenders["lora"].backward_flops(batch)
        base = Contender(LoRA(**common | {"rank": 2 * rank})).backward_flops(batch) - lora
        floor = lora - base
        for name, contender in contenders.items():
            ratios = sorted(t / lora for t, lora in zip(times[name], times["lora"], strict=True))
            low, middle, high = statistics.quantiles(ratios, n=4)
            flops = contender.backward_flops(batch) - floor
            report[f"rank {rank}, {name}"] = {
                "step_ms": round(1000 * statistics.median(times[name]), 2),
                "step/lora": [round(value, 3) for value in (low, middle, high)],
                "adapter_flops/lora": round(flops / base, 3),
            }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
