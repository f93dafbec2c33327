"""Fine-tuning of a small decoder on rows with different numbers of tokens that count, whole or divided.

It is also the worker of test_finetune.py, started once per process, which writes the gradients of each step over gloo.
"""

import os
import sys
from pathlib import Path

import lightning as L
import numpy as np
import torch
from omegaconf import OmegaConf
from small import rows_of
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from diffora.backbones.backbone import Backbone
from diffora.core.attach import attach
from diffora.core.grid import find_grid
from diffora.core.lowrank import lowrank_layers
from diffora.loop.plan import plan_of
from diffora.loop.sharded import Sharded, average_gradients
from diffora.methods.lowrank import LowRankAdaptation, Regulariser
from diffora.settings.sections import FineTune
from diffora.tasks.base import Split
from diffora.tasks.causal_lm import CausalLMTask
from diffora.tasks.ignored import IGNORED
from diffora.training.finetune import FineTuneModule

STEPS, ROWS, LENGTH = 3, 4, 9


def decoder() -> torch.nn.Module:
    """A decoder in float64, with adapters whose parameters are all nonzero."""
    torch.manual_seed(0)
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, use_cache=False, **shape, **dropout))  # Llama's norms are float32
    model.requires_grad_(False)
    grid = find_grid(model)
    attach(model, grid.names, torch.ones(grid.n_layers, grid.n_types, dtype=torch.bool), 2, None, alpha=4, freeze=False)
    for _, layer in lowrank_layers(model):
        torch.nn.init.normal_(layer.lora_bt, std=0.3)
    return model.double()


def batch(seed: int) -> dict[str, Tensor]:
    """Four rows, in which 8, 1, 5 and 0 tokens count."""
    ids = torch.randint(1, 40, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    for row, counted in enumerate((8, 1, 5, 0)):
        labels[row, : LENGTH - counted] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "row": torch.arange(ROWS)}


def some(whole: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {key: value[rows] for key, value in whole.items()}


def gradients(
    batches: list[dict[str, Tensor]], criterion=None, fsdp: bool = False, other: bool = False, **trainer
) -> Tensor:
    """(steps, trained parameters): the gradients that the optimiser gets, including those of a penalty.

    With ``other``, the weights that every process holds are others at first, as after a method that rounds differently.
    """
    task = CausalLMTask(OmegaConf.create({"name": "lm", "score": "loss"}))
    model = decoder()
    if other:
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad or p.ndim < 2):
                parameter.add_(0.1)
    if fsdp:
        trainer |= {
            "strategy": Sharded(Backbone.of(model), ["transformer.h.0", "transformer.h.1"]),
            "inference_mode": False,
        }
    adaptation = LowRankAdaptation(model, Regulariser(weight=0.01, form="squared"))
    split = Split(rows_of(ROWS), rows_of(ROWS))
    settings = FineTune(epochs=1, batch_size=4, lr=1e-3, warmup_steps=0, early_stop=None)
    halves = np.arange(2), np.arange(2, ROWS)
    steps = -(-len(batches) // trainer.get("accumulate_grad_batches", 1))
    plan = lambda: plan_of(steps, 1)  # noqa: E731
    module = FineTuneModule(adaptation, task, split, {"validation": split}, halves, settings, 0, plan, criterion)
    seen: list[Tensor] = []
    module.configure_gradient_clipping = lambda *_, **__: seen.append(
        torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).clone()
    )
    L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **trainer,
    ).fit(module, DataLoader(batches, batch_size=None), DataLoader([batch(99)], batch_size=None))
    if fsdp:
        check_shares(model)
    return torch.stack(seen)


def check_shares(model: torch.nn.Module) -> None:
    """Each process has half of every frozen matrix, and all of the rest."""
    shares = {n: p.to_local().numel() / p.numel() for n, p in model.named_parameters() if hasattr(p, "to_local")}
    # The embeddings belong to no layer: they stay together after a forward pass until the next backward pass.
    matrices = {n for n, p in model.named_parameters() if ".h." in n and p.ndim == 2 and not p.requires_grad}
    assert shares.keys() == matrices and set(shares.values()) == {0.5}, shares


def check_averages(rank: int) -> None:
    """The mean over processes. A parameter may have a gradient in all of them, in one, or in none."""
    parameters = [
        torch.nn.Parameter(torch.zeros(2, 3)),
        torch.nn.Parameter(torch.zeros(2)),
        torch.nn.Parameter(torch.zeros(1)),
    ]
    parameters[0].grad = torch.full((2, 3), 1.0 + rank)
    parameters[1].grad = None if rank else torch.tensor([4.0, 6.0])
    average_gradients(parameters)
    assert torch.equal(parameters[0].grad, torch.full((2, 3), 1.5))
    assert torch.equal(parameters[1].grad, torch.tensor([2.0, 3.0])) and parameters[2].grad is None


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank, world = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    for parts in (1, 2):
        batches = [some(batch(i), slice(rank, None, world)) for i in range(STEPS)]
        if parts > 1:
            batches = [some(whole, rows) for whole in batches for rows in (slice(1), slice(1, None))]
        # FSDP: a machine may have more devices than processes were started (trainer.devices=auto).
        for kind in ({"strategy": "ddp", "devices": world}, {"fsdp": True, "devices": world + parts - 1}):
            found = gradients(batches, accumulate_grad_batches=parts, other=rank > 0, **kind)
            torch.save(found, folder / f"{next(iter(kind))}-{parts}-{rank}.pt")
    check_averages(rank)
    torch.distributed.destroy_process_group()  # gloo's threads may otherwise abort a process that ends


if __name__ == "__main__":
    main(Path(sys.argv[1]))
