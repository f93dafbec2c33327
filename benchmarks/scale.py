"""How time and memory of a step grow with batch, length, rank, layers and adapted modules, and what a search costs.

    python -m benchmarks.scale [--rounds N] [--only rank …] [--output FILE]

The backbone has MiniLM's shape. One quantity changes at a time, starting from 16 rows of 64 tokens, r = 4, L = 6,
N = 6. The contenders are the floor, our LoRA, PEFT's LoRA, and a step of our search as in the paper (``alternating``: a
Gamma step and a weight step, each on this number of rows). For each contender, a power law cost = a x^b is fitted to
the logarithms of the medians by least squares. The result has the exponent b with its standard error. N modules are
the first N of Q, K, V, attention output, FFN in, FFN out.

``search`` compares the search with the fine-tuning, with the settings of the paper's recipes and the shape of
DeBERTaV3-base. The numbers of steps come from the configuration; the time of a step is measured here.

Writes benchmarks/results/scale.json. With ``--only``, it writes a file only if ``--output`` names one.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from benchmarks.common import CONTENDERS, Shape, allocated, interleave
from benchmarks.report import REPO, RESULTS, header, ratio, spread, write

BASE = Shape("minilm", 16, 64)
SEARCHES = ("alternating", "simultaneous")
COMPARED = ("floor", "lora", "peft", "alternating")
SWEEPS: dict[str, dict[int, Shape]] = {
    "batch": {n: replace(BASE, rows=n) for n in (4, 8, 16, 32)},
    "length": {n: replace(BASE, length=n) for n in (16, 32, 64, 128)},
    "rank": {n: replace(BASE, rank=n) for n in (1, 4, 16, 64)},
    "layers": {n: replace(BASE, changes={"num_hidden_layers": n}) for n in (3, 6, 12)},
    "modules": {n: replace(BASE, modules=n) for n in (1, 2, 4, 6)},
}
PAPER = Shape("deberta_v3_base", 8, 64)
PAPER_TASKS = ("mnli", "sst2", "cola", "qqp", "qnli", "rte", "mrpc", "stsb", "squad", "squad_v2")
STEPS_COMPARED = ("diffora", "lora", *SEARCHES)


def measure(shape: Shape, names: Sequence[str], rounds: int) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """({contender: {"ms", "step_mb"}}, milliseconds by round) for one shape."""
    backbone, batch = shape.build(), shape.batch()
    both_levels = replace(shape, rows=2 * shape.rows).batch()
    steps = {
        name: partial(CONTENDERS[name](backbone, shape).step, both_levels if name in SEARCHES else batch)
        for name in names
    }
    times = interleave(steps, rounds)
    costs = {
        name: {"ms": spread(times[name], 2), "step_mb": round(allocated(step) / 2**20, 2)}
        for name, step in steps.items()
    }
    return costs, times


def exponent(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """b of y = a x^b with its standard error, by least squares on the logarithms. It needs at least three points."""
    log_x, log_y = np.log(x), np.log(y)
    log_x = log_x - log_x.mean()
    b = float(log_x @ log_y / (log_x @ log_x))
    rest = log_y - log_y.mean() - b * log_x
    error = math.sqrt(float(rest @ rest) / (len(x) - 2) / float(log_x @ log_x))
    return {"exponent": round(b, 3), "standard_error": round(error, 3)}


def sweep(shapes: Mapping[int, Shape], rounds: int) -> dict[str, Any]:
    """Time and memory of each contender at each value, and the exponents of both."""
    points = {value: measure(shape, COMPARED, rounds)[0] for value, shape in shapes.items()}
    fits = {}
    for name in COMPARED:
        ms = [point[name]["ms"]["median"] for point in points.values()]
        memory = [point[name]["step_mb"] for point in points.values()]
        fits[name] = {"ms": exponent(list(points), ms), "step_mb": exponent(list(points), memory)}
    return {"points": points, "exponents": fits}


def search_against_finetuning(shape: Shape, rounds: int) -> dict[str, Any]:
    """Time of the search divided by time of DiffoRA's fine-tuning, for each task.

    The time of a step is measured; the numbers of steps come from the recipes. For n rows and batch size B, a round of
    the search has n (1 - v) / B steps, where v is the part of the rows for Gamma. An
    epoch of fine-tuning has n / B steps. Both have the same B by default, so n and B cancel.
    """
    costs, times = measure(shape, STEPS_COMPARED, rounds)
    search = OmegaConf.load(REPO / "conf" / "method" / "diffora.yaml").search
    step_ratios = {update: ratio(times, update, "diffora") for update in SEARCHES}
    tasks = {}
    for name in PAPER_TASKS:
        task = OmegaConf.load(REPO / "conf" / "task" / f"{name}.yaml")
        steps = task.recipe.search_epochs * (1 - search.valid_fraction) / task.recipe.epochs
        tasks[name] = {
            "search_rounds": task.recipe.search_epochs,
            "epochs": task.recipe.epochs,
            "search_steps/finetune_steps": round(steps, 4),
            **{update: round(steps * value["median"], 3) for update, value in step_ratios.items()},
        }
    settings = {key: search[key] for key in ("max_rows", "valid_fraction", "train_steps")}
    return {
        "shape": f"{shape.model}, {shape.rows} x {shape.length}",
        "settings": settings,
        "steps": costs,
        "step/finetune_step": step_ratios,
        "tasks": tasks,
    }


def show(name: str, result: Mapping[str, Any]) -> None:
    print(f"\n{name}")
    for value, point in result["points"].items():
        cells = (f"{n} {cost['ms']['median']:.0f} ms {cost['step_mb']:.0f} MB" for n, cost in point.items())
        print(f"  {value:>4}  " + "   ".join(cells))
    for n, fit in result["exponents"].items():
        both = (f"{key} {f['exponent']:.2f} ± {f['standard_error']:.2f}" for key, f in fit.items())
        print(f"  exponents of {n:<12}" + "   ".join(both), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", choices=[*SWEEPS, "search"], help="these, in place of all")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    chosen = given.only or [*SWEEPS, "search"]
    result: dict[str, Any] = header() | {"settings": {"rounds": given.rounds, "warmup_rounds": 1}, "sweeps": {}}
    for name in (name for name in SWEEPS if name in chosen):
        result["sweeps"][name] = sweep(SWEEPS[name], given.rounds)
        show(name, result["sweeps"][name])
    if "search" in chosen:
        result["search"] = search_against_finetuning(PAPER, given.rounds)
        print("\nsearch / fine-tuning, time")
        for task, values in result["search"]["tasks"].items():
            print(f"  {task:<12}" + "  ".join(f"{key} {value}" for key, value in values.items()))
    output = given.output or (None if given.only else RESULTS / "scale.json")
    if output is not None:
        write(output, result)


if __name__ == "__main__":
    main()
