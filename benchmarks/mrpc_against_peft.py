"""Whole runs side by side: `train.py method=lora rank=2 task=mrpc` and Hugging Face Trainer + PEFT, in turn, per seed.

python benchmarks/mrpc_against_peft.py --data <MRPC folder> --model <model folder> --seeds 0 1 2

Writes benchmarks/results/mrpc_against_peft.json and prints a table. Times are of whole processes.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

REPO = Path(__file__).parents[1]
PYTHON = [sys.executable, "-u"]


def ours(args: argparse.Namespace, seed: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        began = time.time()
        subprocess.run(
            [*PYTHON, "train.py", "method=lora", "rank=2", "task=mrpc", f"task.path={args.data}", "model=minilm",
             f"model.path={args.model}", "logger=csv", "finetune.lr=1e-3", "finetune.batch_size=32",
             f"finetune.epochs={args.epochs}", f"seed={seed}", f"hydra.run.dir={folder}/run"],
            cwd=REPO, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        wall = time.time() - began
        record = json.loads((Path(folder) / "run" / "run.json").read_text())
    history = record["history"]
    return {
        "accuracy": [epoch["validation/accuracy"] for epoch in history],
        "f1": [epoch["validation/f1"] for epoch in history],
        "train_s": record["time"]["finetune_s"],
        "wall_s": round(wall, 2),
    }


def peer(args: argparse.Namespace, seed: int) -> dict:
    began = time.time()
    done = subprocess.run(
        [*PYTHON, "benchmarks/hf_trainer_lora.py", "--data", args.data, "--model", args.model, "--seed", str(seed),
         "--epochs", str(args.epochs)],
        cwd=REPO, check=True, capture_output=True, text=True,
    )  # fmt: skip
    wall = time.time() - began
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT ")) | {"wall_s": round(wall, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    args.data, args.model = str(Path(args.data).resolve()), str(Path(args.model).resolve())
    runs = []
    for seed in args.seeds:
        for name, side in (("diffora", ours), ("hf_peft", peer)):
            runs.append({"side": name, "seed": seed, **side(args, seed)})
            print(runs[-1], flush=True)
    result = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "torch": torch.__version__,
        "epochs": args.epochs,
        "runs": runs,
        "wall_ratio": [a["wall_s"] / b["wall_s"] for a, b in zip(runs[::2], runs[1::2], strict=True)],
    }
    file = REPO / "benchmarks" / "results" / "mrpc_against_peft.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    print("\n| | accuracy, last epoch | F1, last epoch | wall time (s) |\n|---|---|---|---|")
    for name in ("diffora", "hf_peft"):
        mine = [run for run in runs if run["side"] == name]
        cells = [
            f"{statistics.mean(v):.3f} ± {statistics.stdev(v) if len(v) > 1 else 0:.3f}"
            for v in ([r["accuracy"][-1] for r in mine], [r["f1"][-1] for r in mine], [r["wall_s"] for r in mine])
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    ratios = ", ".join(f"{ratio:.2f}" for ratio in result["wall_ratio"])
    print(f"wall time, ours / peer, per seed: {ratios}")


if __name__ == "__main__":
    main()
