"""Whole runs of LoRA on a CPU in bfloat16 beside the same runs in float32.

    python -m benchmarks.precision --data <CoLA> --model <MPNet-base> [--seeds 0 1 2] [--epochs 1] [--output FILE]

``bf16`` is what ``trainer.precision=auto`` chooses where the processor has AMX or AVX512-BF16: frozen weights and
computation in bfloat16, adapters, head and optimiser in float32. Each run is a process of `train.py` with its own empty
caches. The two take turns to go first. Times are ratios with the same seed: the median over seeds, with quartiles.

With other data or another backbone, ``--task`` and ``--name`` say which of conf/task and conf/model they are.
Writes benchmarks/results/precision.json after each run, and prints a table. With another task, backbone or setting, it
writes a file only if ``--output`` names one.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.arms import Runs, complete, measure, metric, times_to, trained
from benchmarks.report import RESULTS, header, write
from diffora.backbones.precision import bfloat16_unit

TASK, NAME, EPOCHS = "cola", "mpnet_base", 1
ARMS = {
    "float32": ["trainer.precision=32-true"],
    "bf16": ["trainer.precision=bf16-mixed", "model.dtype=bfloat16"],
}


def one_run(overrides: Sequence[str]) -> dict[str, Any]:
    """The facts of one run in a new process."""
    facts, record = trained(overrides)
    name = record["main_metric"]
    return facts | {"metric": name, "value": record["metrics"][f"validation/{name}"]}


def summary(runs: Runs) -> dict[str, dict[str, Any]]:
    """Times, their ratios to float32, metric and memory of the seeds that both have."""
    runs = complete(runs)
    found = times_to("float32", runs)
    for name, facts in found.items():
        facts["metric"] = {"name": runs[name][0]["metric"]} | metric([run["value"] for run in runs[name]])
        facts["peak_rss_mb"] = round(max(run["peak_rss_mb"] for run in runs[name]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the task's splits")
    parser.add_argument("--model", type=Path, required=True, help="folder of the backbone")
    parser.add_argument("--task", default=TASK, help="its name in conf/task")
    parser.add_argument("--name", default=NAME, help="the backbone's name in conf/model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--more", nargs="*", default=[], help="more overrides for all runs")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    usual = (given.task, given.name, given.epochs, given.more) == (TASK, NAME, EPOCHS, [])
    output = given.output or (RESULTS / "precision.json" if usual else None)
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
        "more": given.more,
        "unit": unit,
        "arms": ARMS,
    }
    result: dict[str, Any] = header() | {"settings": settings}

    def keep(runs: dict[str, list[dict[str, Any]]]) -> None:
        if output is not None:
            write(output, result | {"arms": summary(runs), "runs": runs})

    for name, facts in summary(measure(common, ARMS, given.seeds, one_run, keep)).items():
        whole, values = facts["wall_s"], facts["metric"]
        sd = f" ± {values['sd']:.4f}" if "sd" in values else ""
        print(
            f"{name:<9}{whole['median']:>8.1f} s, {whole['to_float32']['median']:.3f} of float32, "
            f"{values['name']} {values['mean']:.4f}{sd}, at most {facts['peak_rss_mb']} MB"
        )


if __name__ == "__main__":
    main()
