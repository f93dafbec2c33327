"""What one optimisation step of each method costs beside LoRA's, and what RM-LoRA's masks save.

    python -m benchmarks.method_steps [--ranks 4 64] [--rows 16] [--length 64] [--rounds 15] [--threads 1]

The backbone has MiniLM's shape and random weights. All contenders take turns in one process. Each figure is a ratio to
plain LoRA in the same round: the median over rounds, with quartiles. ``adapter_flops`` are the adapters' operations in
the backward pass, counted by torch (for LoRA: those that another adapter of the same rank would add). ``r_lora, loop``
is R-LoRA with one product for each adapter and factor, instead of one for each shape. All methods are measured at the
first rank, at the other ranks only RM-LoRA's family.
"""

import argparse
import json
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.common import interleave
from benchmarks.report import header, ratio, spread
from diffora.backbones.backbone import Backbone
from diffora.core.grid import find_grid
from diffora.core.lowrank import lowrank_layers
from diffora.core.orthogonality import orthogonality
from diffora.methods.adalora import AdaLoRA
from diffora.methods.bitfit import BitFit
from diffora.methods.flora import FLoRA
from diffora.methods.full_ft import FullFT
from diffora.methods.gm_lora import GMLoRA
from diffora.methods.head_only import HeadOnly
from diffora.methods.houlsby import Houlsby
from diffora.methods.lora import LoRA
from diffora.methods.lowrank import Mask, Regulariser
from diffora.methods.peft import PEFT
from diffora.methods.pfeiffer import Pfeiffer
from diffora.methods.r_lora import RLoRA
from diffora.methods.rm_lora import RMLoRA
from diffora.methods.sora import SoRA

TYPES = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
TYPES += ["intermediate.dense", "output.dense"]
ROLES = {"attention_output": "attention.output.dense", "ffn_output": "output.dense"}


def rm_lora_family(rank):
    common = {"rank": rank, "dropout": 0.0, "alpha": 8.0}
    regulariser = Regulariser(1e-3, "squared")
    mask = Mask("half", "step", False, "gradient", 0, False)
    return {
        "lora": LoRA(**common),
        "gm_lora": GMLoRA(**common, mask=mask),
        "r_lora": RLoRA(**common, regulariser=regulariser),
        "r_lora, loop": LoRA(**common),
        "rm_lora": RMLoRA(**common, regulariser=regulariser, mask=mask),
    }


def others(rank):
    common = {"rank": rank, "dropout": 0.0, "alpha": 8.0}
    lora = {"_target_": "peft.LoraConfig", "r": rank, "lora_alpha": 8, "lora_dropout": 0.0}
    schedule = {"initial": 0.1, "final": 0.3, "every": 10, "beta1": 0.85, "beta2": 0.85, "orthogonality": 0.5}
    bottleneck = {"activation": "gelu", "skip": True, "init_std": 0.01}
    return {
        "flora": FLoRA(**common),
        "sora": SoRA(**common, lam=1e-3, times_lr=False, lam_start=0.0, stages=1),
        "houlsby, b = 8": Houlsby(size=8, **bottleneck),
        "pfeiffer, b = 16": Pfeiffer(size=16, **bottleneck),
        "bitfit": BitFit(),
        "head_only": HeadOnly(),
        "full_ft": FullFT(),
        "adalora, init_rank = rank + 1": AdaLoRA(**common, init_rank=rank + 1, **schedule),
        "PEFT's LoRA": PEFT(config=lora),
        "dora": PEFT(config=lora | {"use_dora": True}),
    }


class Contender:
    """An adapted model and its step."""

    def __init__(self, method, loop=False):
        torch.manual_seed(0)
        shape = {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
        config = BertConfig(**shape, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        self.model = Backbone.of(BertForSequenceClassification(config)).freeze().model.train()
        self.loop, self.number = loop, 0
        self.adaptation = method.adapt(self.model, find_grid(self.model, "encoder.layer.*", TYPES, ROLES), None, 0)
        for _, layer in lowrank_layers(self.model):
            torch.nn.init.normal_(layer.lora_bt, std=0.02)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], fused=True)
        self.adaptation.begin(1000)

    def loss(self, batch):
        loss = self.model(**batch).loss
        if self.loop:
            pairs = [(layer.lora_a, layer.lora_bt) for _, layer in lowrank_layers(self.model)]
            return loss + 1e-3 * sum(orthogonality([m]) for pair in pairs for m in pair)
        penalty = self.adaptation.penalty()
        return loss if penalty is None else loss + penalty

    def step(self, batch):
        self.adaptation.before_step(self.number, 0)
        self.loss(batch).backward()
        self.optimizer.step()
        self.adaptation.after_step(self.number, 1e-3)
        self.optimizer.zero_grad()
        self.number += 1

    def backward_flops(self, batch):
        self.adaptation.before_step(0, 0)
        loss = self.loss(batch)
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        self.optimizer.zero_grad()
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
    report = header() | vars(given)
    for i, rank in enumerate(given.ranks):
        methods = rm_lora_family(rank) | (others(rank) if i == 0 else {})
        contenders = {name: Contender(method, loop="loop" in name) for name, method in methods.items()}
        steps = {name: partial(contender.step, batch) for name, contender in contenders.items()}
        times = interleave(steps, given.rounds, warmup=2)
        lora = contenders["lora"].backward_flops(batch)
        one = Contender(LoRA(2 * rank, 0.0, 8.0)).backward_flops(batch) - lora
        for name, contender in contenders.items():
            report[f"rank {rank}, {name}"] = {
                "step_ms": spread(times[name], 1),
                "step/lora": ratio(times, name, "lora"),
            }
            if name in rm_lora_family(rank):
                flops = contender.backward_flops(batch) - (lora - one)
                report[f"rank {rank}, {name}"]["adapter_flops/lora"] = round(flops / one, 3)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
