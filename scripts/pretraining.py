"""What the scripts that pretrain the small text backbones share: their options, the training loop, and saving."""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]


def options(doc: str, name: str, steps: int, batch_size: int, layers: int, hidden: int, intermediate: int) -> Any:
    """Read the command line, and set threads and seed.

    Args:
        doc: the script's docstring; its first line is the help.
        name: of the backbone.
        steps, batch_size, layers, hidden, intermediate: the defaults.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "src/diffora/assets" / name)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--hidden", type=int, default=hidden)
    parser.add_argument("--intermediate", type=int, default=intermediate)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    return args


def pretrain(
    model: Any, tokenizer: Any, batches: Iterator[Any], loss_of: Callable[[Any, Any], Tensor], args: Any
) -> None:
    """Train a model with AdamW, a warm-up and a cosine schedule, and save it with its tokenizer.

    Args:
        batches: endless.
        loss_of: the loss of (model, batch).
        args: from `options`.
    """
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    warmup = max(1, args.steps // 20)

    def factor(step: int) -> float:
        return min((step + 1) / warmup, 0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, step / args.steps))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    start, mean = time.perf_counter(), math.log(len(tokenizer))
    for step, batch in enumerate(islice(batches, args.steps), 1):
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        mean += (loss.item() - mean) * 0.02
        if step % args.log_every == 0 or step == args.steps:
            spent = time.perf_counter() - start
            left = spent / step * (args.steps - step)
            print(f"{step}/{args.steps}  loss {mean:.3f}  {spent:.0f} s spent, {left:.0f} s left", flush=True)
    model.half().save_pretrained(args.output)  # half the size; it is loaded as float32
    (args.output / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(args.output)
    size = sum(f.stat().st_size for f in args.output.iterdir())
    print(f"loss {mean:.3f}, {time.perf_counter() - start:.0f} s, {size / 2**20:.2f} MiB in {args.output}")
