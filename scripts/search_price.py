"""What a cheaper search costs beside the fine-tuning, and whether it ranks the modules as the full search does.

    python scripts/search_price.py outputs/search_price.json --data <folder> --model <MiniLM>       # resumable; hours
    python scripts/search_price.py outputs/search_price.json --page docs/background/selection.md    # only the table
    python scripts/search_price.py --runs outputs/selection_matters-small/search-digits-seed* --page <page>
    python scripts/search_price.py docs/background/data/search_shortened.json      # the table of --runs without runs

For each task and seed it searches with [D]'s settings (`full`), with `recipe=fast`, and with fewer rounds and rows. A
trajectory also tells what fewer rounds of the full search would have found. The early gradients
(`search.readout=early_gradient`) are read in the full searches.
With `--runs`, it compares the gates within the finished searches of some runs, one for each seed, with their ends.

Costs are CPU seconds of this process, so run it with OMP_NUM_THREADS=1; then other processes hardly change them. The
fine-tuning's cost is that of one epoch of steps, without evaluations, times the recipe's epochs.

The agreement of two searches is Spearman's correlation of their scores within a layer, mean over layers. The noise
level is that of two seeds of the full search. A cheap search is compared with full searches of *other* seeds too,
because with the same seed both see the same rows, head and first A.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from hydra import compose, initialize_config_dir
from pages import put

from diffora.core.readout import CHECKS, EARLY
from diffora.core.selection import Selection
from diffora.files import read_json, write_text
from diffora.loop.data import FineTuneData
from diffora.loop.parts import Parts
from diffora.loop.process import quiet_libraries
from diffora.places import conf_dir
from diffora.run.check import check
from diffora.scoring.context import SearchContext
from diffora.scoring.stage import run_search, search_rows
from diffora.training.optimisers import make_optimiser

SETTINGS: dict[str, list[str]] = {
    "full": ["search.readout=early_gradient"],  # it changes neither the gates nor the cost
    "fast": ["recipe=fast"],
    "short": ["search.epochs=3", "search.max_rows=3200"],
}
CHEAP = {"fast": "recipe=fast", "short": "3 rounds, 3,200 rows at most"}
PREFIXES = (0.5, 1, 2, 3)
"""Rounds of the full search after which its gates are compared, too."""
PATIENCE = (3, 5, 10)


Common = Callable[[str], list[str]]
"""From a task's name to the overrides of all its runs."""


class Clock(L.Callback):
    """CPU seconds of the steps of a search."""

    seconds = 0.0

    def on_train_start(self, *_: Any) -> None:
        self.began = time.process_time()

    def on_train_end(self, *_: Any) -> None:
        self.seconds = time.process_time() - self.began


def loaded(overrides: Sequence[str], folder: Path) -> Parts:
    """A run's data and backbone."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        settings, task = check(compose("config", ["method=diffora", "trainer=cpu", "logger=none", *overrides]))
    quiet_libraries()
    L.seed_everything(settings.seed, verbose=False)
    return Parts.load(settings, folder, task)


def searched(overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """Cost and gates over the rounds of one search."""
    parts, clock = loaded(overrides, folder), Clock()
    method = parts.settings.method
    rows = search_rows(parts).split
    choose = partial(method.choose, parts.grid, seed=parts.settings.seed)
    context = SearchContext(parts, rows, method.alpha, method.score_batches, choose, None, [clock])
    found = run_search(context, "search")
    rounds, gates = zip(*found.trajectory, strict=True)
    facts = {"seconds": clock.seconds, "early": found.scores.tolist(), "rounds": rounds, "gates": gates}
    return facts | {"epochs": parts.settings.search.epochs, "k": int(method.rho * parts.grid.n_types)}


def epoch_seconds(overrides: Sequence[str], folder: Path, most: int) -> dict[str, Any]:
    """CPU seconds of an epoch of fine-tuning after a search, from at most ``most`` steps, and the number of epochs."""
    parts = loaded(overrides, folder)
    settings, task, model = parts.settings, parts.task, parts.model
    scores = torch.rand(parts.grid.n_layers, parts.grid.n_types, generator=torch.Generator().manual_seed(0))
    chosen: Selection | None = settings.method.choose(parts.grid, scores, 0)
    settings.method.adapt(model, parts.grid, chosen, 0)
    collate, f = (parts.data.collate, parts.data.collate_eval), settings.finetune
    data = FineTuneData(parts.data.train.encoded, {}, collate, f.batch_size, f.batch_size, settings.seed)
    optimiser = make_optimiser(((n, p) for n, p in model.named_parameters() if p.requires_grad), f)
    steps, done = -(-len(parts.data.train.encoded) // f.batch_size), 0
    model.train()
    began = time.process_time()
    for batch in islice(data.train_dataloader(), most):
        with torch.autocast("cpu", torch.bfloat16, settings.trainer.precision == "bf16-mixed"):
            loss = task.loss(model(**task.inputs(batch)), batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), f.clip or float("inf"))
        optimiser.step()
        optimiser.zero_grad()
        done += 1
    spent = time.process_time() - began
    return {"epoch_seconds": spent / done * steps, "steps": done, "epochs": f.epochs}


def measure(file: Path, tasks: Sequence[str], seeds: Sequence[int], rows: int | None, common: Common) -> None:
    """Do what is missing in the file."""
    done: dict[str, Any] = read_json(file) if file.exists() else {}
    for seed, name in itertools.product(seeds, tasks):
        found = done.setdefault(name, {"rows": rows, "searches": {}})
        if found["rows"] != rows:
            raise SystemExit(f"error: {file} was measured with --rows {found['rows']}")
        if "finetune" not in found:
            found["finetune"] = epoch_seconds(common(name), file.parent / "scratch", 40)
        for setting, overrides in SETTINGS.items():
            key = f"{setting}-{seed}"
            if key not in found["searches"]:
                arguments = [*common(name), f"seed={seed}", *overrides]
                found["searches"][key] = searched(arguments, file.parent / "scratch" / name / key)
                write_text(file, json.dumps(done) + "\n")
                print(f"{name} {key}: {found['searches'][key]['seconds']:.0f} s", flush=True)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks within each row; equal values get their mean rank."""
    below = (values[..., None, :] < values[..., :, None]).sum(-1)
    upto = (values[..., None, :] <= values[..., :, None]).sum(-1)
    return (below + upto - 1) / 2


def spearman(first: Any, second: Any) -> float:
    """Spearman's correlation within a row, mean over rows; 0 for a row without an order."""
    a, b = (ranks(np.array(values, float)) for values in (first, second))
    a, b = (values - values.mean(-1, keepdims=True) for values in (a, b))
    norm = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    return float(np.divide((a * b).sum(-1), norm, out=np.zeros_like(norm), where=norm > 0).mean())


def gates_after(search: Mapping[str, Any], rounds: float) -> Any:
    """The gates at the point of the trajectory that is nearest to this round."""
    return search["gates"][int(np.argmin(np.abs(np.array(search["rounds"]) - rounds)))]


def stop_of(search: Mapping[str, Any], patience: int) -> float:
    """The round in which `search.patience` would have ended a search, by its trajectory."""
    unchanged, before = 0, None
    for check_ in range(1, CHECKS * search["epochs"] + 1):
        gates = np.array(gates_after(search, check_ / CHECKS))
        mask = ranks(gates) >= gates.shape[1] - search["k"]
        unchanged = unchanged + 1 if before is not None and (mask == before).all() else 0
        if unchanged >= patience:
            return check_ / CHECKS
        before = mask
    return float(search["epochs"])


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """Cost and agreement by setting, of one task."""
    by = {name: of_setting(found["searches"], name) for name in SETTINGS}
    whole = found["finetune"]["epoch_seconds"] * found["finetune"]["epochs"]
    price = {name: statistics.mean(s["seconds"] for s in runs.values()) / whole for name, runs in by.items() if runs}
    full = {seed: s["gates"][-1] for seed, s in by["full"].items()}
    rows: dict[str, Any] = {}

    def add(name: str, cost: float, scores: Mapping[str, Any]) -> None:
        same = [spearman(scores[seed], full[seed]) for seed in scores if seed in full]
        other = [spearman(scores[a], full[b]) for a in scores for b in full if a != b]
        rows[name] = {"share": cost, "same_seed": _mean(same), "other_seeds": _mean(other), "seeds": len(scores)}

    add("full search", price["full"], full)
    epochs = next(iter(by["full"].values()))["epochs"]
    for rounds in PREFIXES:
        scores = {seed: gates_after(s, rounds) for seed, s in by["full"].items()}
        add(f"full search, first {rounds:g} of {epochs} rounds", price["full"] * rounds / epochs, scores)
    for patience in PATIENCE:
        stops = {seed: stop_of(s, patience) for seed, s in by["full"].items()}
        cost = price["full"] * statistics.mean(stops.values()) / epochs
        add(f"full search, patience {patience}", cost, {s: gates_after(by["full"][s], at) for s, at in stops.items()})
    add("full search, early gradient", price["full"] / EARLY, {seed: s["early"] for seed, s in by["full"].items()})
    for name, label in CHEAP.items():
        if by[name]:
            add(label, price[name], {seed: s["gates"][-1] for seed, s in by[name].items()})
    return rows


def shortened(folders: Sequence[Path]) -> dict[str, Any]:
    """Agreement of the first part of each search with whole searches, from the trajectories of runs of other seeds."""
    searches = [read_json(folder / "trajectory.json") for folder in sorted(folders)]
    rounds, ends = searches[0]["rounds"][-1], [search["gamma_bar"][-1] for search in searches]
    rows = []
    for share in (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0):
        at = [gates_after({"rounds": s["rounds"], "gates": s["gamma_bar"]}, share * rounds) for s in searches]
        same = _mean([spearman(a, b) for a, b in zip(at, ends, strict=True)])
        other = _mean([spearman(at[i], ends[j]) for i, j in itertools.permutations(range(len(at)), 2)])
        rows.append({"rounds": share * rounds, "same_seed": same, "other_seeds": other})
    return {"seeds": len(searches), "rounds": rounds, "rows": rows}


def shortened_table(found: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [f"| rounds of {found['rounds']:g} | Spearman, same seed | Spearman, other seeds |", "|---|---|---|"]
    for row in found["rows"]:
        lines.append(f"| {row['rounds']:g} | {row['same_seed']:.2f} | {row['other_seeds']:.2f} |")
    return "\n".join(lines)


def of_setting(searches: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The searches of a setting by seed."""
    return {key.rpartition("-")[2]: s for key, s in searches.items() if key.rpartition("-")[0] == name}


def _mean(values: Sequence[float]) -> float | None:
    return statistics.mean(values) if values else None


def table(done: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = ["| task | search | seeds | share of the fine-tuning | Spearman, same seed | Spearman, other seeds |"]
    lines.append("|---" * 6 + "|")
    for name, found in done.items():
        if not of_setting(found["searches"], "full"):
            continue
        for setting, row in summary(found).items():
            cells = [name, setting, str(row["seeds"]), f"{row['share']:.3f}"]
            cells += ["" if row[key] is None else f"{row[key]:.2f}" for key in ("same_seed", "other_seeds")]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", help="JSON, made or continued")
    parser.add_argument("--runs", type=Path, nargs="+", help="run directories of one search with several seeds")
    parser.add_argument("--data", type=Path, help="folder with a folder for each task; without it nothing is measured")
    parser.add_argument("--model", type=Path, help="folder of MiniLM")
    parser.add_argument("--tasks", nargs="+", default=["mrpc", "rte"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--rows", type=int, help="use only this many training rows")
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    if (given.file is None) == (given.runs is None):
        parser.error("give a JSON file or --runs")
    if given.runs is not None:
        found = shortened(given.runs)
        print(shortened_table(found))
        if given.page is not None:
            write_text(given.page.parent / "data" / "search_shortened.json", json.dumps(found) + "\n")
            put(given.page, "search_shortened", shortened_table(found))
        return
    if given.file.exists() and "rounds" in (found := read_json(given.file)):  # of --runs
        print(shortened_table(found))
        return
    if given.data is not None:
        shared = ["model=minilm", f"model.path={given.model}", "trainer.precision=bf16-mixed"]
        if given.rows is not None:
            shared.append(f"task.max_train_rows={given.rows}")
        torch.set_num_threads(1)
        measure(
            given.file,
            given.tasks,
            given.seeds,
            given.rows,
            lambda name: [f"task={name}", f"task.path={given.data / name}", *shared],
        )
    done = read_json(given.file)
    print(table(done))
    if given.page is not None:
        write_text(given.page.parent / "data" / "search_price.json", json.dumps(done) + "\n")
        put(given.page, "search_price", table(done))


if __name__ == "__main__":
    main()
