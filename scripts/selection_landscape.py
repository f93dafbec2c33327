"""What selections are worth, and which selector's scores rank them: the runs of experiment=selection_landscape.

    python scripts/selection_landscape.py outputs/selection_landscape-paper
    python scripts/selection_landscape.py <folder> --scores <folder of runs with search_only=true>
    python scripts/selection_landscape.py <folder> --scores <folder> --page docs/background/selection.md
    python scripts/selection_landscape.py <folder of the page>/data/selection_landscape.json   # the same without runs
    python scripts/selection_landscape.py <that file> <folder> --scores <folder>               # and with further runs

A row is a mask (one random selection, the same with all seeds), a column "<task> <setting>". All masks of a column have
equally many parameters. Results of fractions are in points (per cent).

1. Is there anything to find? The variance of the results is divided into that of masks, of seeds and a rest. The
   largest part of the table without gaps is used. A column is closed if the standard deviation of its masks is below
   0.3 points.
2. Which scores rank masks? A mask's score is the sum of its modules' scores (of a search: of log γ̄). Spearman's
   correlation with the masks' worth, the mean over the selector's seeds. p by shuffling which module has which score,
   with the same shuffles for all tasks: in the whole grid (the primary test), within each type, within each layer.
   Means are over the tasks whose column is not closed.

The script works on what has finished, and says how much that is.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from pages import Run, checked, gathered, merged, put, settings_of
from selection_landscape_page import KINDS, picture, text_of

from diffora.files import write_text
from diffora.records import ENDED
from diffora.report.permutation import Permuted, correlation, fisher_z, label_orders, over_tasks, scores_rank_masks
from diffora.report.statistics import components, holm, largest_block, paired

CLOSED = 0.3
"""A column whose masks have a standard deviation below this, in points, is closed."""
FEWEST = 6
"""Fewer masks than this are not ranked."""

APART = "method.draw", "method.like"
"""The settings in which the masks of a column differ."""

Column = Mapping[str, Any]


# --- reading ---


def landscape(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """For each column its facts and its masks: selected modules, results and hashes of runs by seed; high is good.

    `numbered` makes the columns that the rest of the script works on.

    Raises:
        SystemExit: a row has another selection with another seed, so that it is no mask; or the runs do not belong
            together (`pages.checked`).
    """
    columns: dict[str, dict[str, Any]] = {}
    masks = [run for run in runs if (run.get("row") or "").startswith("mask ")]
    for run in checked(masks, apart=APART):
        facts = run["metric_facts"][run["main_metric"]]
        column = columns.setdefault(
            run["column"],
            {
                "task": run["task"],
                "setting": run["column"].removeprefix(run["task"]).strip(),
                "metric": run["main_metric"],
                "maximise": facts["maximise"],
                "points": facts["unit"] == "fraction",
                "data": run.get("data_hash"),
                "settings": {},
                "masks": {},
            },
        )
        column["settings"] |= settings_of(run, APART)
        selected = [sorted(row) for row in run["selection"]["selected"]]
        mask = column["masks"].setdefault(run["row"], {"selected": selected, "values": {}, "runs": {}})
        if mask["selected"] != selected:
            name = f"{run['column']}, {run['row']}, seed {run['seed']}"
            sys.exit(f"error: {name} has another selection than the others")
        value = run["metrics"][f"validation/{run['main_metric']}"]
        factor = (1 if facts["maximise"] else -1) * (100 if column["points"] else 1)
        mask["values"][str(run["seed"])] = factor * value
        mask["runs"][str(run["seed"])] = run.get("config_hash")
    return columns


def numbered(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The same in order, with selected modules as numbers of types, which keeps the file small."""
    found = {}
    for name, column in sorted(columns.items(), key=lambda item: (item[1]["setting"], item[1]["task"])):
        types = sorted({kind for mask in column["masks"].values() for row in mask["selected"] for kind in row})
        masks = {
            row: mask | {"selected": [[types.index(kind) for kind in layer] for layer in mask["selected"]]}
            for row, mask in sorted(column["masks"].items(), key=lambda item: int(item[0].split()[1]))
        }
        found[name] = column | {"masks": masks, "types": types}
    return found


def content_of(runs: Sequence[Run]) -> dict[str, Any]:
    """The columns of some runs, as `named` has them; empty if no run is of a mask."""
    columns = landscape(runs)
    return {"columns": columns} if columns else {}


def named(content: Mapping[str, Any], grows: bool) -> dict[str, Any]:
    """Columns and scores of the JSON file, with selected modules by name again.

    Args:
        grows: whether further runs will be added, whose settings should be those of the file.
    """
    columns = {}
    for name, column in content["columns"].items():
        if grows and "settings" not in column:
            print(f"note: the file has no settings of {name}: those of further runs are not compared", file=sys.stderr)
        masks = {
            row: mask | {"selected": [[column["types"][i] for i in layer] for layer in mask["selected"]]}
            for row, mask in column["masks"].items()
        }
        columns[name] = {key: value for key, value in column.items() if key != "types"} | {"masks": masks}
    return {"columns": columns, "scores": content["scores"]}


def scores_of(folder: Path, columns: Mapping[str, Column]) -> dict[str, Any]:
    """Scores and hashes of all finished runs below a folder by selector, column and seed, and the types of their grids.

    A selector's name is the row of its run, or else the selector. Its scores count for the column of its run if that is
    a column here, otherwise for all columns of its task. Masks, and runs that were given a selection file, have none.

    Raises:
        SystemExit: two files have scores of one selector, column and seed; the runs of a selector have different
            settings; or a run has other data than its column.
    """
    found: dict[str, Any] = {"scores": {}, "types": {}, "runs": {}}
    origin: dict[tuple[str, str, str], Path] = {}
    settings: dict[tuple[str, str], dict[str, Any]] = {}
    for record in sorted(folder.rglob("run.json")):
        run, file = json.loads(record.read_text()), record.with_name("selection.json")
        given = "method.selection" in run.get("sources", {}) or (run.get("row") or "").startswith("mask ")
        if run["status"] not in ENDED or given or not file.is_file():
            continue
        selection = json.loads(file.read_text())
        values = selection.get("scores")
        if values is None and selection.get("gamma_bar") is not None:
            values = [[None if g is None else math.log(max(g, 1e-30)) for g in row] for row in selection["gamma_bar"]]
        if values is None:
            continue
        name, seed = run.get("row") or selection["selector"], str(run["seed"])
        own = (
            [run["column"]]
            if run.get("column") in columns
            else [c for c in columns if columns[c]["task"] == run["task"]]
        )
        for column in own:
            if (earlier := origin.setdefault((name, column, seed), file)) != file:
                sys.exit(f"error: {earlier} and {file} both have the scores of {name} for {column}, seed {seed}")
            if len({columns[column].get("data"), run.get("data_hash")} - {None}) > 1:
                sys.exit(f"error: the scores of {name}, seed {seed} are of other data than {column}: {file}")
            others = settings.setdefault((name, column), {})
            for key, value in settings_of(run).items():
                if others.setdefault(key, value) != value:
                    sys.exit(f"error: {file} has {key}={value}, other seeds of {name} {key}={others[key]}")
            rounded = [[None if v is None else float(f"{v:.7g}") for v in row] for row in values]
            found["scores"].setdefault(name, {}).setdefault(column, {})[seed] = rounded
            found["runs"].setdefault(name, {}).setdefault(column, {})[seed] = run.get("config_hash")
            found["types"][column] = selection["types"]
    return found


# --- the two questions ---


def worth(column: Column) -> dict[str, float]:
    """Each mask's mean over its seeds, with the seeds on one level: that of the masks that have all seeds."""
    masks = {name: mask["values"] for name, mask in column["masks"].items()}
    seeds = sorted({seed for values in masks.values() for seed in values})
    whole = [values for values in masks.values() if len(values) == len(seeds)]
    if not whole:  # no mask has all seeds: compare those of the seed with the most masks
        most = max(seeds, key=lambda seed: sum(seed in values for values in masks.values()))
        return {name: values[most] for name, values in masks.items() if most in values}
    level = {seed: float(np.mean([values[seed] for values in whole])) for seed in seeds}
    mean = float(np.mean(list(level.values())))
    return {name: mean + float(np.mean([values[s] - level[s] for s in values])) for name, values in masks.items()}


def anything_to_find(column: Column) -> dict[str, Any]:
    """The variance components of a column; without two masks that have two seeds in common, only its counts."""
    values = {name: {int(s): v for s, v in mask["values"].items()} for name, mask in column["masks"].items()}
    results = [v for of in values.values() for v in of.values()]
    found: dict[str, Any] = {"runs": len(results), "all_masks": len(values), "mean": float(np.mean(results))}
    block = largest_block(values)
    if block is None:
        return found
    parts = components(block[2])
    return found | asdict(parts) | {"verdict": openness(parts.mask, parts.high, parts.p)}


def openness(mask: float, high: float, p: float) -> str:
    """Whether there is something to find in a column: its masks' standard deviation, the interval's end, F-test's p."""
    if high == 0:
        return "closed; the masks differ less than noise alone explains, so check the runs"
    if mask < CLOSED:
        return "closed" if high < CLOSED else f"closed; up to {high:.1f} is possible"
    return "open" if p < 0.05 else "open by the estimate only"


def label_groups(kind: str, layers: int, types: int) -> np.ndarray:
    """The label of each module, layer by layer: modules of one label change places."""
    layer, of_type = np.divmod(np.arange(layers * types), types)
    return {"grid": np.zeros_like(layer), "type": of_type, "layer": layer}[kind]


class Ranking:
    """Spearman's correlation of one selector's scores with the worth in one column, for shuffled labels too."""

    def __init__(self, column: Column, types: Sequence[str], by_seed: Mapping[str, Any], draws: int) -> None:
        value_of = worth(column)
        chosen = [column["masks"][name]["selected"] for name in value_of]
        places = [column["types"].index(kind) if kind in column["types"] else -1 for kind in types]
        masks = np.array([[place in row for row in rows for place in places] for rows in chosen])
        layers = len(chosen[0])
        seeds = [np.array(by_seed[seed], dtype=float).ravel() for seed in sorted(by_seed)]
        if any(len(scores) != layers * len(types) for scores in seeds):
            sys.exit(f"error: scores of {len(seeds[0])} modules do not fit masks of {layers} layers of {len(types)}")
        present = ~np.isnan(seeds[0])
        self.shuffled: dict[str, np.ndarray] = {}
        values = np.array(list(value_of.values()))

        def ranked(orders: np.ndarray) -> np.ndarray:
            each = [scores_rank_masks(masks[:, present], scores[present], values, orders) for scores in seeds]
            together: np.ndarray = np.tanh(fisher_z(np.array(each)).mean(0))
            return together

        same = np.arange(int(present.sum()))[None]
        self.value = float(ranked(same)[0])
        mean = np.mean([standardised(scores[present]) for scores in seeds], axis=0)
        self.ensemble = float(scores_rank_masks(masks[:, present], mean, values, same)[0])
        for kind in KINDS:  # the orders depend on the grid only, so all tasks of one grid have the same
            groups = label_groups(kind, layers, len(types))[present]
            self.shuffled[kind] = ranked(label_orders(groups, draws))


def standardised(scores: np.ndarray) -> np.ndarray:
    """Scores with mean 0 and standard deviation 1; zeros if all are equal."""
    centred = scores - scores.mean()
    return centred / (centred.std() or 1.0)


def which_scores(columns: Mapping[str, Column], scores: Mapping[str, Any], draws: int) -> dict[str, Any]:
    """For each setting: its closed tasks, and for each selector the correlation of each task and over the others."""
    found: dict[str, Any] = {}
    for setting in dict.fromkeys(column["setting"] for column in columns.values()):
        here = {name: c for name, c in columns.items() if c["setting"] == setting and len(worth(c)) >= FEWEST}
        closed = [c["task"] for c in here.values() if anything_to_find(c).get("verdict", "").startswith("closed")]
        rows: dict[str, Any] = {}
        for selector, by_column in scores["scores"].items():
            ranked = {
                column["task"]: Ranking(column, scores["types"][name], by_column[name], draws)
                for name, column in here.items()
                if name in by_column
            }
            if not ranked:
                continue
            able = {task: ranking for task, ranking in ranked.items() if not math.isnan(ranking.value)}
            rows[selector] = {
                "seeds": {here[name]["task"]: len(by_column[name]) for name in here if name in by_column},
                "tasks": {
                    task: asdict(Permuted.of(ranking.value, np.nan_to_num(ranking.shuffled["grid"])))
                    for task, ranking in able.items()
                },
            }
            if still := [ranking for task, ranking in able.items() if task not in closed]:
                rows[selector] |= pooled(still)
        if rows:
            adjusted = holm([row["grid"]["p"] for row in rows.values() if "grid" in row])
            for row, p in zip((row for row in rows.values() if "grid" in row), adjusted, strict=True):
                row["p_holm"] = p
            masks = {c["task"]: len(worth(c)) for c in here.values()}
            found[setting] = {"masks": masks, "closed": closed, "selectors": behind_the_best(rows, closed)}
    return found


def pooled(rankings: Sequence[Ranking]) -> dict[str, Any]:
    """The mean correlation over tasks with its interval (tasks are the units) and its tests by each kind of shuffle."""
    values = [ranking.value for ranking in rankings]
    result: dict[str, Any] = {}
    for kind in KINDS:
        test = over_tasks(values, [ranking.shuffled[kind] for ranking in rankings])
        result[kind] = asdict(test) | {"detectable": test.detectable}
    z = dict(enumerate(fisher_z(values).tolist()))
    interval = paired(z, dict.fromkeys(z, 0.0))
    ends = (interval.low, interval.high) if interval is not None else (None, None)
    result["interval"] = [None if end is None else math.tanh(end) for end in ends]
    result["ensemble"] = math.tanh(float(fisher_z([ranking.ensemble for ranking in rankings]).mean()))
    return result


def behind_the_best(rows: dict[str, Any], closed: Sequence[str]) -> dict[str, Any]:
    """The rows with the mean difference of each selector's correlations from the best one's, paired over open tasks."""
    able = {name: row for name, row in rows.items() if "grid" in row}
    best = max(able, key=lambda name: able[name]["grid"]["value"], default=None)
    tasks = sorted({task for row in able.values() for task in row["tasks"]} - set(closed))
    by_task = {
        name: {i: row["tasks"][task]["value"] for i, task in enumerate(tasks) if task in row["tasks"]}
        for name, row in able.items()
    }
    for name, row in able.items():
        if best is not None and name != best:
            difference = paired(by_task[best], by_task[name])
            row["behind"] = None if difference is None else asdict(difference)
    return rows


def tasks_agree(columns: Mapping[str, Column]) -> dict[str, list[list[Any]]]:
    """For each setting and pair of tasks: the correlation of the worth of the masks that both have, with its p.

    Masks share modules, so they are not independent. p is one-sided: how often masks that are worth the sum of random
    worths, drawn for each task by itself, agree as well. It is given for worths of modules, and for worths of a layer
    plus a type.
    """
    found: dict[str, list[list[Any]]] = defaultdict(list)
    for first, second in combinations(columns.values(), 2):
        if (first["setting"], first["types"]) != (second["setting"], second["types"]):
            continue
        a, b = worth(first), worth(second)
        same = [m for m in a if m in b and first["masks"][m]["selected"] == second["masks"][m]["selected"]]
        if len(same) >= FEWEST:
            value = correlation([a[m] for m in same], [b[m] for m in same]).value
            if not math.isnan(value):
                chosen = [first["masks"][m]["selected"] for m in same]
                taken = np.array([[[kind in row for kind in range(len(first["types"]))] for row in m] for m in chosen])
                p = [float(np.mean(chance_agreement(taken, by) >= value - 1e-12)) for by in ("modules", "parts")]
                found[first["setting"]].append([first["task"], second["task"], len(same), value, *p])
    return dict(found)


def chance_agreement(taken: np.ndarray, by: str, draws: int = 20_000) -> np.ndarray:
    """Spearman's correlations of the worth of masks on two tasks that have nothing in common.

    Args:
        taken: boolean, masks x layers x types.
        by: ``modules``: each module has a worth of its own; ``parts``: the sum of its layer's and its type's.
    """
    rng = np.random.default_rng(0)
    n, layers, types = taken.shape
    ranks = []
    for _ in range(2):
        if by == "modules":
            worths = rng.normal(size=(draws, layers, types))
        else:
            worths = rng.normal(size=(draws, layers, 1)) + rng.normal(size=(draws, 1, types))
        values = np.einsum("mlt,dlt->dm", taken, worths)
        ranks.append(values.argsort(1).argsort(1) - (n - 1) / 2)
    return (ranks[0] * ranks[1]).sum(1) / (ranks[0] ** 2).sum(1)


def analysed(columns: Mapping[str, Column], scores: Mapping[str, Any], draws: int) -> dict[str, Any]:
    """Everything that is shown, and what it was computed from."""
    found = {
        name: {"setting": column["setting"], "task": column["task"], **anything_to_find(column)}
        for name, column in columns.items()
    }
    ranked = which_scores(columns, scores, draws)
    return {
        "anything_to_find": found,
        "tasks_agree": tasks_agree(columns),
        "which_scores": ranked,
        "draws": draws,
        "columns": columns,
        "scores": scores,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="of the runs, or the JSON file of --page, or both")
    parser.add_argument("--scores", type=Path, help="folder of runs of selectors, such as those with search_only=true")
    parser.add_argument("--draws", type=int, default=5000, help="shuffles of the labels (5000)")
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    of_file = partial(named, grows=len(given.folders) > 1)
    content = gathered(given.folders, content_of, 'run of a row "mask …"', of_file)
    columns = numbered(content["columns"])
    scores: dict[str, Any] = content.get("scores", {"scores": {}, "types": {}})
    if given.scores is not None:
        new = scores_of(given.scores, columns)
        if not new["scores"]:
            sys.exit(f"error: no selection.json with scores for {', '.join(columns)} below {given.scores}")
        scores = merged(scores, new)
    found = analysed(columns, scores, given.draws)
    print(text_of(found))
    if given.page is not None:
        text, name = text_of(found), "selection_landscape"
        if any(row["tasks"] for of in found["which_scores"].values() for row in of["selectors"].values()):
            picture(found, given.page.parent / "images" / f"{name}.png")
            text += f"\n\n![correlation of each selector with worth](images/{name}.png)"
        write_text(given.page.parent / "data" / f"{name}.json", json.dumps(found) + "\n")
        put(given.page, name, text)


if __name__ == "__main__":
    main()
