"""Do all ways to compute a run give the same results? One task in each way, over several seeds.

    python -m benchmarks.paths [--seeds 0 1 2] -- task=mrpc task.path=<folder> model=minilm model.path=<folder>

The paths: ``default`` is what runs in float32 use. ``plain`` is ``model.kernel=plain``, the formula in plain
operations, with torch's own dropout. ``added`` is the fused layer that never folds the update into the weight.
``folded`` is the fused layer that folds it wherever it can. ``cached`` has the frozen layers computed once and without
dropout, so give a ``model.layer`` without the lowest ones. ``bfloat16`` and ``compiled`` are the settings of these
names. The tests compare gradients to the last digits. This benchmark compares whole runs, which differ in rounding and
dropout masks. Results are in benchmarks/results/paths.json; a second call computes only what is missing there. Runs
with other settings, or on another processor, need an ``--output`` of their own.
"""

import argparse
import json
import math
import statistics
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest import mock

from hydra import compose, initialize_config_dir

from benchmarks.report import RESULTS, header, machine
from diffora.files import write_text
from diffora.kernels import fused
from diffora.places import conf_dir
from diffora.run import experiment

PATHS: dict[str, list[str]] = {
    "default": [],
    "plain": ["model.kernel=plain"],
    "added": [],
    "folded": [],
    "cached": ["trainer.cache_prefix=true"],
    "bfloat16": ["trainer.precision=bf16-mixed", "model.dtype=bfloat16"],
    "compiled": ["trainer.compile=true"],
}
"""The settings of each path. ``added`` and ``folded`` are no settings; see `path`."""
METHOD = ["method=lora", "logger=[csv]", "rank=4", "finetune.epochs=3", "trainer=cpu", "trainer.precision=32-true"]


def path(name: str) -> AbstractContextManager[object]:
    """A context in which the layers use a path that is no setting of the run."""
    if name in ("added", "folded"):
        return mock.patch.object(fused, "FOLD_FROM", math.inf if name == "added" else 0.0)
    return nullcontext()


def run(name: str, seed: int, overrides: list[str]) -> dict[str, object]:
    """Metrics and time of one run."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", [*METHOD, f"seed={seed}", *overrides, *PATHS[name]])
    with path(name), tempfile.TemporaryDirectory() as folder:
        record = experiment.run(cfg, Path(folder) / "run").record
    metrics = {key: value for key, value in record["metrics"].items() if key.startswith("validation/")}
    return {"path": name, "seed": seed, "finetune_s": record["time"]["finetune_s"], "metrics": metrics}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--paths", choices=PATHS, nargs="+", default=list(PATHS))
    parser.add_argument("--output", type=Path, default=RESULTS / "paths.json")
    parser.add_argument("overrides", nargs="*", help="as of train.py")
    given = parser.parse_args()
    # Paths on this machine are not written, and calls that differ only in them count as the same.
    settings = [*METHOD, *(o for o in given.overrides if ".path=" not in o)]
    result = json.loads(given.output.read_text()) if given.output.is_file() else {}
    if result and (result["settings"], result["machine"]["cpu"]) != (settings, machine()["cpu"]):
        kept = f"{' '.join(result['settings'])} on {result['machine']['cpu']}"
        parser.error(f"{given.output} has runs with {kept}; name another file with --output")
    runs = result.get("runs", [])
    for seed in given.seeds:
        for name in given.paths:
            if any(r["path"] == name and r["seed"] == seed for r in runs):
                continue
            runs.append(run(name, seed, given.overrides))
            print(json.dumps(runs[-1]), flush=True)
            summary = {}
            for key in runs[0]["metrics"]:
                values = {n: [r["metrics"][key] for r in runs if r["path"] == n] for n in PATHS}
                summary[key] = {
                    n: {"mean": round(statistics.mean(v), 4), "std": round(statistics.stdev(v), 4) if v[1:] else None}
                    for n, v in values.items()
                    if v
                }
            report = header() | {"settings": settings, "summary": summary, "runs": runs}
            write_text(given.output, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
