"""Whole runs of `train.py` in arms that differ in a few settings, with several seeds: what such benchmarks share."""

import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import ratio, spread
from benchmarks.run import process

Runs = Mapping[str, Sequence[Mapping[str, Any]]]


def trained(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(times and memory, run.json) of one run in a new process with its own empty caches."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run" / "run.json"
        _, wall, _, _ = process(["train.py", *overrides, f"hydra.run.dir={file.parent}"])
        record: dict[str, Any] = json.loads(file.read_text())
    facts = {
        "wall_s": round(wall, 2),
        "finetune_s": record["time"]["finetune_s"],
        "step_s": record["time"]["step_s"],
        "peak_rss_mb": record["memory"]["peak_rss_mb"],
    }
    return facts, record


def measure(
    common: Sequence[str],
    overrides: Mapping[str, Sequence[str]],
    seeds: Sequence[int],
    run: Callable[[Sequence[str]], dict[str, Any]],
    keep: Callable[[dict[str, list[dict[str, Any]]]], None] = lambda runs: None,
) -> dict[str, list[dict[str, Any]]]:
    """The runs of each arm, one for each seed.

    Args:
        common: overrides of all runs.
        overrides: those of each arm.
        run: does one run.
        keep: called after each run with all runs so far.
    """
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in overrides}
    names = list(overrides)
    for turn, seed in enumerate(seeds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            runs[name].append(run(["method=lora", *common, *overrides[name], f"seed={seed}"]) | {"seed": seed})
            print(f"  seed {seed}, {name}: {runs[name][-1]['wall_s']:.0f} s", flush=True)
            keep(runs)
    return runs


def complete(runs: Runs) -> dict[str, Sequence[Mapping[str, Any]]]:
    """The runs of the seeds that all arms have; no arm if there is no such seed."""
    seeds = set.intersection(*({run["seed"] for run in own} for own in runs.values()))
    if not seeds:
        return {}
    return {name: sorted((r for r in own if r["seed"] in seeds), key=lambda r: r["seed"]) for name, own in runs.items()}


def times_to(base: str, runs: Runs) -> dict[str, dict[str, Any]]:
    """For each arm: the spread of its times over seeds, each with that of its ratios to the arm ``base``."""
    found: dict[str, dict[str, Any]] = {name: {} for name in runs}
    for key in ("wall_s", "finetune_s"):
        times = {name: [run[key] for run in own] for name, own in runs.items()}
        for name, facts in found.items():
            facts[key] = spread(times[name], 2) | {f"to_{base}": ratio(times, name, base)}
    return found


def metric(values: Sequence[float]) -> dict[str, Any]:
    """A metric over seeds."""
    found: dict[str, Any] = {"mean": round(statistics.mean(values), 4), "values": list(values)}
    if len(values) > 1:
        found["sd"] = round(statistics.stdev(values), 4)
    return found
