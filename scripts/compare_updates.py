"""Does the search select the same modules with `search.update=simultaneous` as with the paper's alternation?

    python scripts/compare_updates.py --seeds 0 1 2 task=mrpc model=minilm model.path=<folder>
    python scripts/compare_updates.py --seeds 0 1 2 --finetune experiment=quickstart

Searches with both updates for each seed; with --finetune also trains what was selected. Writes every run and the
comparison to <output>/compare_updates.json; called again, it does only what is missing. The agreement of two selections
is their Jaccard index: modules in both over modules in either. Compare the agreement between the updates with that of
two seeds of one update, and with that of two random selections.
"""

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from diffora.cli import command  # noqa: E402
from diffora.core.selection import Selection  # noqa: E402
from diffora.files import write_text  # noqa: E402
from diffora.loop.loggers import Loggers  # noqa: E402
from diffora.loop.parts import Parts  # noqa: E402
from diffora.loop.process import quiet_libraries  # noqa: E402
from diffora.places import conf_dir  # noqa: E402
from diffora.run import experiment  # noqa: E402
from diffora.run.check import check  # noqa: E402
from diffora.run.select import select  # noqa: E402
from diffora.settings.identity import config_hash  # noqa: E402
from diffora.tasks.base import get_task  # noqa: E402

UPDATES = ("alternating", "simultaneous")


def search_only(cfg: DictConfig, folder: Path) -> tuple[Selection, float]:
    """The first stage of a run: (selection, seconds of the search)."""
    settings, task = check(cfg)
    quiet_libraries()
    L.seed_everything(cfg.seed, verbose=False)
    parts = Parts.load(settings, folder, task)
    settings.method.check(parts.model, parts.grid)
    found = select(parts, settings.method, Loggers(settings.logger, folder, settings.composed))
    assert found.selection is not None
    return found.selection, found.seconds


def one_run(cfg: DictConfig, folder: Path, finetune: bool) -> dict[str, Any]:
    """The entries of one run in the comparison."""
    folder.mkdir(parents=True, exist_ok=True)
    if not finetune:
        selection, seconds = search_only(cfg, folder)
        return described(selection) | {"search_s": round(seconds, 3)}
    experiment.run(cfg, folder)
    record = json.loads((folder / "run.json").read_text())
    times = {key: record["time"][key] for key in ("search_s", "finetune_s")}
    main_metric = get_task(cfg.task).main_metric
    metrics = {
        "metric": main_metric,
        **{key: record["metrics"][f"{key}/{main_metric}"] for key in ("validation", "last")},
    }
    return described(Selection.load(folder / "selection.json")) | times | metrics


def described(selection: Selection) -> dict[str, Any]:
    return {"types": selection.types, "selected": selection.selected, "gamma_bar": selection.gamma_bar}


def jaccard(a: list[list[str]], b: list[list[str]]) -> float:
    """Of two selections, each a list of module types for each layer."""
    first, second = ({(i, name) for i, row in enumerate(rows) for name in row} for rows in (a, b))
    return len(first & second) / len(first | second) if first | second else 1.0


def chance(selected: list[list[str]], n_types: int, draws: int = 4000) -> float:
    """Mean Jaccard index of two random selections with as many modules in each layer."""
    rng = np.random.default_rng(0)
    sizes = np.array([len(row) for row in selected])
    masks = rng.random((2, draws, len(sizes), n_types)).argsort(-1) < sizes[:, None]
    both, either = (masks[0] & masks[1]).sum((1, 2)), (masks[0] | masks[1]).sum((1, 2))
    return float((both / either).mean())


def correlation(a: list[list[float]], b: list[list[float]]) -> float:
    """Of two relaxed DAMs, over all entries; each row has the same mean."""
    return float(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1])


def comparison(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Agreement within and between the updates, time and metric of each."""
    of = {update: {run["seed"]: run for run in runs if run["update"] == update} for update in UPDATES}
    seeds = sorted(of[UPDATES[0]].keys() & of[UPDATES[1]].keys())
    pairs = {"between_updates": [(of[UPDATES[0]][seed], of[UPDATES[1]][seed]) for seed in seeds]}
    for update, found in of.items():
        pairs[f"between_seeds_{update}"] = list(itertools.combinations(found.values(), 2))
    result: dict[str, Any] = {"seeds": seeds}
    for name, both in pairs.items():
        if both:
            values = [jaccard(a["selected"], b["selected"]) for a, b in both]
            gammas = [correlation(a["gamma_bar"], b["gamma_bar"]) for a, b in both]
            result[name] = {"jaccard": summary(values), "correlation": summary(gammas)}
    result["chance"] = round(chance(runs[0]["selected"], len(runs[0]["types"])), 4)
    for key in ("search_s", "finetune_s", "validation", "last"):
        if key in runs[0]:
            result[key] = {
                update: summary([run[key] for run in found.values()]) for update, found in of.items() if found
            }
    return result


def summary(values: list[float]) -> dict[str, Any]:
    spread = {"std": round(statistics.stdev(values), 4)} if len(values) > 1 else {}
    return {"mean": round(statistics.mean(values), 4), **spread, "values": [round(value, 4) for value in values]}


def main(given: argparse.Namespace) -> None:
    file = given.output / "compare_updates.json"
    runs: list[dict[str, Any]] = json.loads(file.read_text())["runs"] if file.is_file() else []
    wanted = []
    # Both updates of a seed run one after the other, in alternating order, so a slow phase of the machine affects both.
    for at, seed in enumerate(given.seeds):
        for update in UPDATES[:: 1 if at % 2 == 0 else -1]:
            overrides = ["method=diffora", "logger=[csv]", *given.overrides]
            overrides += [f"seed={seed}", f"search.update={update}", "resume=true"]
            with initialize_config_dir(str(conf_dir()), version_base="1.3"):
                cfg = compose("config", overrides)
            made = {"update": update, "seed": seed, "config": config_hash(cfg), "finetuned": given.finetune}
            run = next((run for run in runs if made.items() <= run.items()), None)
            if run is None:
                folder = given.output / f"{update}-seed{seed}-{made['config']}{'' if given.finetune else '-search'}"
                run = made | one_run(cfg, folder, given.finetune)
                runs.append(run)
            wanted.append(run)
            content = {"overrides": given.overrides, "torch": torch.__version__, "threads": torch.get_num_threads()}
            content |= {"comparison": comparison(wanted), "runs": runs}
            write_text(file, json.dumps(content, indent=1) + "\n")
    for name, value in comparison(wanted).items():
        shown = {key: part["mean"] for key, part in value.items()} if isinstance(value, dict) else value
        print(f"{name}: {shown}")
    print(file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--finetune", action="store_true", help="train what was selected, and compare the metric")
    parser.add_argument("--output", type=Path, default=Path("outputs/compare-updates"))
    parser.add_argument("overrides", nargs="*", help="as for train.py")
    arguments = parser.parse_intermixed_args()
    command(lambda: main(arguments))
