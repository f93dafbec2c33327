"""Check that `tiny` on the paraphrase task can tell methods apart: validation accuracy, mean ± std over seeds.

    python scripts/check_tiny.py                      # frozen backbone, LoRA on every module, full fine-tuning
    python scripts/check_tiny.py --methods lora       # one of them
    python scripts/check_tiny.py --methods modules    # LoRA on one kind of module at a time: does the position matter?

Every method trains the pooler and the classifier. The loop is plain torch. The result is that of the last epoch.
"""

import argparse
import os
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from diffora.tasks.embedded.paraphrase import splits  # noqa: E402

KINDS = ("query_proj", "key_proj", "value_proj", "attention.output.dense", "intermediate.dense", "output.dense")
HEAD = ("pooler", "classifier")


def kind_of(name: str) -> str | None:
    """The member of KINDS that a module's name stands for; None for other modules."""
    match = re.search(r"encoder\.layer\.\d+\.(attention\.self\.)?(.+)$", name)
    return match[2] if match and match[2] in KINDS else None


def encode(folder: Path, rows: dict[str, list[Any]]) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask (rows, longest row), labels (rows,)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(rows["sentence1"], rows["sentence2"], padding=True, return_tensors="pt")
    return {**tokens, "labels": torch.tensor(rows["label"])}


def batch_of(data: dict[str, torch.Tensor], chosen: torch.Tensor) -> dict[str, torch.Tensor]:
    """The chosen rows, cut to the length of the longest one."""
    longest = int(data["attention_mask"][chosen].sum(1).max())
    return {k: v[chosen] if v.ndim == 1 else v[chosen, :longest] for k, v in data.items()}


def build(folder: Path, method: str, rank: int) -> torch.nn.Module:
    """The model for a method: `frozen`, `full`, `lora`, or one of KINDS (LoRA on these modules only)."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    if method == "full":
        return model
    if method == "frozen":
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.startswith(HEAD)
        return model
    from peft import LoraConfig, get_peft_model

    wanted = KINDS if method == "lora" else (method,)
    targets = [name for name, _ in model.named_modules() if kind_of(name) in wanted]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=list(HEAD))
    return get_peft_model(model, config)


def accuracy(model: torch.nn.Module, data: dict[str, torch.Tensor]) -> float:
    model.eval()
    right = 0
    with torch.no_grad():
        for chosen in torch.arange(len(data["labels"])).split(250):
            batch = batch_of(data, chosen)
            labels = batch.pop("labels")
            right += int((model(**batch).logits.argmax(-1) == labels).sum())
    return right / len(data["labels"])


def train(method: str, seed: int, data: dict[str, dict[str, torch.Tensor]], args: argparse.Namespace) -> dict[str, Any]:
    """One run: last validation accuracy, mean seconds per epoch and number of trainable parameters."""
    torch.manual_seed(seed)
    model = build(args.model, method, args.rank)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    head = [p for n, p in trained if any(part in n.split(".") for part in HEAD)]
    body = [p for n, p in trained if not any(part in n.split(".") for part in HEAD)]
    body_lr = args.full_lr if method == "full" else args.lora_lr
    groups = [{"params": head, "lr": args.head_lr}, {"params": body, "lr": body_lr}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=args.weight_decay, fused=True)
    rows = len(data["train"]["labels"])
    steps = args.epochs * -(-rows // args.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / (0.06 * steps), 1 - s / steps))
    curve, seconds = [], 0.0
    for _ in range(args.epochs):
        model.train()
        start = time.perf_counter()
        for chosen in torch.randperm(rows).split(args.batch_size):
            optimizer.zero_grad()
            model(**batch_of(data["train"], chosen)).loss.backward()
            torch.nn.utils.clip_grad_norm_([p for _, p in trained], 1.0)
            optimizer.step()
            schedule.step()
        seconds += time.perf_counter() - start
        curve.append(accuracy(model, data["validation"]))
    percent = " ".join(f"{100 * a:.1f}" for a in curve)
    print(f"{method} seed {seed}: {percent}  {seconds / args.epochs:.1f} s/epoch", file=sys.stderr, flush=True)
    return {"accuracy": curve[-1], "seconds": seconds / args.epochs, "parameters": sum(p.numel() for _, p in trained)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "src/diffora/assets/tiny")
    methods_help = "frozen, lora, full, modules, or a kind of module"
    parser.add_argument("--methods", nargs="+", default=["frozen", "lora", "full"], help=methods_help)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--head-lr", type=float, default=1e-3)
    parser.add_argument("--lora-lr", type=float, default=3e-3)
    parser.add_argument("--full-lr", type=float, default=5e-4)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--train-rows", type=int, default=4000)
    parser.add_argument("--validation-rows", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    methods = [m for method in args.methods for m in (KINDS if method == "modules" else (method,))]
    data = {name: encode(args.model, rows) for name, rows in splits(args.train_rows, args.validation_rows).items()}
    print("| method | trained parameters | validation accuracy (%) | seconds per epoch |\n|---|---|---|---|")
    for method in methods:
        runs = [train(method, seed, data, args) for seed in args.seeds]
        scores = [100 * run["accuracy"] for run in runs]
        spread = statistics.stdev(scores) if len(scores) > 1 else float("nan")
        seconds = statistics.mean(run["seconds"] for run in runs)
        score = f"{statistics.mean(scores):.1f} ± {spread:.1f}"
        print(f"| {method} | {runs[0]['parameters']:,} | {score} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
