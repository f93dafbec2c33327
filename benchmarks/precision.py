"""Whole runs of LoRA on a CPU in bfloat16 beside the same runs in float32.

    python -m benchmarks.precision --data <CoLA> --model <MPNet-base> [--seeds 0 1 2] [--epochs 1] [--output FILE]

``bf16`` is what ``trainer.precision=auto`` chooses where the processor has AMX or AVX512-BF16: frozen weights and
computation in bfloat16, adapters, head and optimiser in float32. Each run is a process of `train.py` with its own empty
caches. The two take turns to go first. Times are ratios with the same seed: the median over seeds, with quartiles.

With other data or another backbone, ``--task`` and ``--name`` say which of conf/task and conf/model they are.
Writes benchmarks/results/precision.json after each run, and prints a table.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.prefix import measure
from benchmarks.report import RESULTS, header, ratio, spread, write
from benchmarks.run import process
from diffora.backbones.precision import bfloat16_unit

ARMS = {
    "float32": ["trainer.precision=32-true"],
    "bf16": ["trainer.precision=bf16-mixed", "model.dtype=bfloat16"],
}


def one_run(overrides: Sequence[str]) -> dict[str, Any]:
    """The facts of one run in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run" / "run.json"
        _, wall, _, _ = process(["train.py", *overrides, f"hydra.run.dir={file.parent}"])
        record = json.loads(file.read_text())
    return {
        "wall_s": round(wall, 2),
        "finetune_s": record["time"]["finetune_s"],
        "step_s": record["time"]["step_s"],
        "peak_rss_mb": record["memory"]["peak_rss_mb"],
        "metric": record["main_metric"],
        "value": record["metrics"][f"validation/{record['main_metric']}"],
    }


def summary(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Times, their ratios to float32, metric and memory of the seeds that both have."""
    n = min(map(len, runs.values()))
    if n == 0:
        return {}
    found = {}
    for name, own in runs.items():
        facts: dict[str, Any] = {"metric": own[0]["metric"], "value": [run["value"] for run in own[:n]]}
        facts["value_mean"] = round(statistics.mean(facts["value"]), 4)
        facts["value_sd"] = round(statistics.stdev(facts["value"]), 4) if n > 1 else None
        facts["peak_rss_mb"] = round(max(run["peak_rss_mb"] for run in own[:n]))
        for key in ("wall_s", "finetune_s"):
            times = {arm: [run[key] for run in some[:n]] for arm, some in runs.items()}
            facts[key] = spread(times[name], 2) | {"to_float32": ratio(times, name, "float32")}
        found[name] = facts
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the task's splits")
    parser.add_argument("--model", type=Path, required=True, help="folder of the backbone")
    parser.add_argument("--task", default="cola", help="its name in conf/task")
    parser.add_argument("--name", default="mpnet_base", help="the backbone's name in conf/model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--more", nargs="*", default=[], help="more overrides for all runs")
    parser.add_argument("--output", type=Path, default=RESULTS / "precision.json")
    given = parser.parse_args()
    unit = bfloat16_unit(torch.device("cpu"))
    if unit is None:
        sys.exit("error: this processor has neither AMX nor AVX512-BF16, so a run in bfloat16 is slower here")
    common = [f"task={given.task}", f"task.path={given.data.resolve()}", f"model={given.name}"]
    common += [f"model.path={given.model.resolve()}", "trainer=cpu", "logger=csv", f"finetune.epochs={given.epochs}"]
    common += given.more
    settings = {
        "task": given.task,
        "backbone": given.name,
        "epochs": given.epochs,
        "seeds": given.seeds,
        "more": given.more,
        "unit": unit,
        "arms": ARMS,
    }
    result: dict[str, Any] = header() | {"settings": settings}

    def keep(runs: dict[str, list[dict[str, Any]]]) -> None:
        write(given.output, result | {"arms": summary(runs), "runs": runs})

    for name, facts in summary(measure(common, ARMS, given.seeds, run=one_run, keep=keep)).items():
        whole, sd = facts["wall_s"], "" if facts["value_sd"] is None else f" ± {facts['value_sd']:.4f}"
        print(
            f"{name:<9}{whole['median']:>8.1f} s, {whole['to_float32']['median']:.3f} of float32, "
            f"{facts['metric']} {facts['value_mean']:.4f}{sd}, at most {facts['peak_rss_mb']} MB"
        )


if __name__ == "__main__":
    main()
