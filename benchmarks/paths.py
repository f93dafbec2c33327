"""Does a run come out the same with each of the low-rank layer's paths? A task with a path on and off, over seeds.

    python -m benchmarks.paths [--seeds 0 1 2] -- task=mrpc task.path=<folder> model=minilm model.path=<folder>

Paths: ``plain``, the formula in plain operations and torch's own dropout; ``added`` and ``folded``, the fused layer
with the update always beside, or where it can be inside, the weight; ``alone``, each layer by itself; ``default``,
what runs use. Gradients are compared to the last bits by the tests; this is about whole runs, whose roundings and
dropout masks differ. Writes benchmarks/results/paths.json; called again, it does only what is missing there.
"""

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from hydra import compose, initialize_config_dir

from benchmarks.common import RESULTS, header
from diffora.backbones import load
from diffora.core.lowrank import LowRankLinear
from diffora.files import conf_dir, write_text
from diffora.kernels import fused
from diffora.run import experiment

PATHS = ("default", "plain", "added", "folded", "alone")
METHOD = ["method=lora", "logger=[csv]", "rank=4", "finetune.epochs=1"]


_no_peers = property(lambda layer: None, lambda layer, peers: None)


@contextmanager
def path(name: str) -> Iterator[None]:
    """With the layers on a path."""
    patches = {
        "default": [],
        "plain": [
            mock.patch.object(LowRankLinear, "forward", LowRankLinear._plain),
            mock.patch.object(load, "use_cheap_dropout"),
        ],
        "added": [mock.patch.object(fused, "FOLD_FROM", math.inf)],
        "folded": [mock.patch.object(fused, "FOLD_FROM", 0.0)],
        "alone": [mock.patch.object(LowRankLinear, "peers", _no_peers, create=True)],
    }[name]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def run(name: str, seed: int, overrides: list[str]) -> dict[str, object]:
    """Metrics and time of one run."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", [*METHOD, f"seed={seed}", *overrides])
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
    # Places are left out of what is written, and of what makes two calls the same.
    settings = [*METHOD, *(o for o in given.overrides if ".path=" not in o)]
    result = json.loads(given.output.read_text()) if given.output.is_file() else {}
    runs = result.get("runs", []) if result.get("settings") == settings else []
    for seed in given.seeds:
        for name in given.paths:
            if not any(r["path"] == name and r["seed"] == seed for r in runs):
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
