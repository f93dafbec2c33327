"""A Markdown table of finished runs: mean and standard deviation over seeds, parameters, time.

    python scripts/table.py outputs/sweep-…/ [more folders] [--task paraphrase]

Runs that differ in nothing but the seed make one line. Every ``run.json`` below the folders is read.
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml


def setting(folder: Path) -> str:
    """What a run's seeds have in common: its configuration without seed and place."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for key in ("seed", "logger", "resume", "dry_run"):
        config.pop(key, None)
    config["method"].get("config", {}).pop("projection_prng_key", None)  # VeRA's seed
    return json.dumps(config, sort_keys=True)


def spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def line(runs: list[dict[str, Any]], metrics: list[str]) -> list[str]:
    def column(part: str, key: str) -> list[float]:
        return [run[part][key] for run in runs if run[part].get(key) is not None]

    def span(key: str) -> str:
        sizes = sorted(set(column("params", key)))
        return f"{sizes[0]:,}" + (f" to {sizes[-1]:,}" if len(sizes) > 1 else "")

    cells = [span("adapter"), span("inference")]
    cells += [spread(column("metrics", f"validation/{metric}"), 3) for metric in metrics]
    cells.append(spread(column("metrics", f"held_out/{metrics[0]}"), 3))
    cells.append(spread(column("metrics", "generalisation_gap"), 3))
    for measure in ("update/rank", "update/orthogonality_loss"):
        values = column("metrics", measure)
        cells.append(f"{statistics.mean(values):.2f}" if values else "")
    search = column("time", "search_s")
    cells.append(spread(search, 0) if any(search) else "")
    cells.append(spread(column("time", "finetune_s"), 0))
    cells.append(str(len(runs)))
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    given = parser.parse_args()
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for file in sorted({file for folder in given.folders for file in folder.rglob("run.json")}):
        run = json.loads(file.read_text())
        if run["status"] == "completed":
            groups[run["task"], setting(file.parent)].append(run | {"folder": file.parent})
    for task in sorted({task for task, _ in groups}):
        here = [runs for (name, _), runs in groups.items() if name == task]
        first = here[0][0]
        scored = [key.removeprefix("validation/") for key in first["metrics"] if key.startswith("validation/")]
        main_metric, sign = first.get("main_metric", "accuracy"), -1 if first.get("maximise", True) else 1
        metrics = [main_metric, *(m for m in scored if m not in (main_metric, "loss"))]
        header = [
            "method",
            "adapter",
            "inference",
            *metrics,
            f"held_out {metrics[0]}",
            "gap",
            "rank of ΔW",
            "orthogonality loss",
        ]
        header += ["search, s", "fine-tuning, s", "seeds"]
        print(f"\n{task}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
        here.sort(key=lambda runs: sign * statistics.mean(run["metrics"][f"validation/{metrics[0]}"] for run in runs))
        for runs in here:
            config = yaml.safe_load((runs[0]["folder"] / "config.yaml").read_text())
            rank = f", r = {config['rank']}" if config.get("rank") else ""
            print(f"| {runs[0]['method']}{rank} | {' | '.join(line(runs, metrics))} |")


if __name__ == "__main__":
    main()
