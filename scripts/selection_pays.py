"""Does the choice of modules pay, and what does a step cost? The runs of experiment=selection_pays.

    python scripts/selection_pays.py outputs/selection_pays-paper
    python scripts/selection_pays.py <folder> --page docs/background/selection.md       # puts tables and picture there
    python scripts/selection_pays.py docs/background/data/selection_pays.json           # the same tables without runs

Differences are paired over seeds, with Student's t; verdicts are those of `diffora.report.statistics.verdict` with a
margin of half a point. "best of two draws" is not a row of the experiment: for each seed it is the higher one of the
two random selections, on the rows that also choose the epoch.

The step time is a share of that of LoRA on all modules, by counted operations. It depends on the lowest layer with an
adapter. Runs with a time budget have it for some layers; between these it is linear, because all layers cost the same.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pages import Run, checked, fill, points
from selection_matters import by_seed, mean

from diffora.report.statistics import Difference, holm, paired, verdict

MARGIN = 0.005
SPLITS = "validation", "held_out"
ALL, RANDOM, BEST = "all modules", "random", "best of two draws"
DRAWS = "random", "random, draw 100"
QUESTIONS = {
    "search": (ALL, RANDOM, "random, same types", "random, search's time", BEST),
    "search, top third": ("random, top third", "top third", ALL),
}
"""What a selection is compared with, beside "all modules" and "random", which every row is compared with."""

Row = dict[str, Any]


def lowest_layer(run: Run) -> int:
    """Number of the lowest layer with an adapter, from 1."""
    return next(layer for layer, chosen in enumerate(run["selection"]["selected"], 1) if chosen)


def rows_of(runs: Sequence[Run]) -> dict[str, Any]:
    """For each column: shares of step time by lowest layer, and for each row its size, layer and metrics by seed.

    Raises:
        SystemExit: the runs do not belong together (`pages.checked`).
    """
    found: dict[str, Any] = {}
    for run in checked(runs):
        column = found.setdefault(run["column"], {"metric": run["main_metric"], "shares": {}, "rows": {}})
        timed = run.get("step_time", {}).get("by_lowest_layer", {})
        column["shares"] |= {str(int(layer) + 1): of["share"] for layer, of in timed.items()}
        metrics = {split: run["metrics"][f"{split}/{run['main_metric']}"] for split in SPLITS}
        facts = {"parameters": run["params"]["adapter"], "lowest": lowest_layer(run), "config_hash": run["config_hash"]}
        facts["layers"] = sum(map(bool, run["selection"]["selected"]))
        column["rows"].setdefault(run["row"], {})[str(run["seed"])] = metrics | facts
    for column in found.values():
        column["rows"] = {name: {"seeds": seeds} for name, seeds in column["rows"].items()}
    return found


def with_best(rows: Mapping[str, Row]) -> dict[str, Row]:
    """The rows with that of the higher of two random selections of each seed."""
    one, other = (rows.get(name, {"seeds": {}})["seeds"] for name in DRAWS)
    best = {seed: max(one[seed], other[seed], key=lambda values: values["validation"]) for seed in one if seed in other}
    return {**rows, BEST: {"seeds": best}} if best else dict(rows)


def difference(rows: Mapping[str, Row], ours: str, theirs: str, split: str = "validation") -> Difference | None:
    if ours == theirs or ours not in rows or theirs not in rows:
        return None
    return paired(by_seed(rows[ours], split), by_seed(rows[theirs], split))


def main_table(column: Mapping[str, Any]) -> str:
    """Markdown: one line for each row, the best first, with its difference from all modules and from random ones."""
    rows = with_best(column["rows"])
    metric = column["metric"]
    head = ["modules", "parameters", "layers", "lowest layer", "step, counted", "seeds", metric, f"{metric}, held_out"]
    head += ["less all modules (95 %)", "", "less random (95 %)", ""]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    order = sorted(rows, key=lambda name: -sum(by_seed(rows[name], "validation").values()) / len(rows[name]["seeds"]))
    for name in order:
        seeds = rows[name]["seeds"].values()
        cells = [name, *(ranged({one[key] for one in seeds}) for key in ("parameters", "layers", "lowest"))]
        cells += [share_of(column, rows[name]), str(len(seeds)), *(mean(rows[name], split) for split in SPLITS)]
        for other in (ALL, RANDOM):
            one = difference(rows, name, other)
            cells += ["", ""] if one is None else [points(one), verdict(one, MARGIN)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ranged(values: set[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" + (f" to {high:,}" if high > low else "")


def shares(column: Mapping[str, Any], row: Row) -> list[float]:
    """The counted share of step time of each of the row's runs, as far as it is known."""
    if not column["shares"]:
        return []
    known = {1: 1.0} | {
        int(layer): share for layer, share in sorted(column["shares"].items(), key=lambda of: int(of[0]))
    }
    layers, values = list(known), list(known.values())
    return [float(np.interp(one["lowest"], layers, values)) for one in row["seeds"].values()]


def share_of(column: Mapping[str, Any], row: Row) -> str:
    found = shares(column, row)
    return "" if not found else f"{min(found):.2f}" + (f" to {max(found):.2f}" if max(found) > min(found) else "")


def question_table(columns: Mapping[str, Any]) -> str:
    """Markdown: what the search is compared with, for each column."""
    found: list[tuple[str, str, Difference, Difference]] = []
    for name, column in columns.items():
        rows = with_best(column["rows"])
        for ours, others in QUESTIONS.items():
            for theirs in others:
                one, held = (difference(rows, ours, theirs, split) for split in SPLITS)
                if one is not None and held is not None:
                    found.append((f"{ours} − {theirs}", name, one, held))
    adjusted = iter(holm([one.p for _, _, one, _ in found if one.p is not None]))
    head = ["difference, points (95 %)", "task", "n", "validation", "p, Holm", "could find", "verdict"]
    head += ["held_out", "verdict"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for what, name, one, held in found:
        cells = [what, name, str(one.n), points(one), "" if one.p is None else f"{next(adjusted):.2f}"]
        cells += ["" if one.detectable is None else f"{100 * one.detectable:.1f}", verdict(one, MARGIN)]
        lines.append(f"| {' | '.join([*cells, points(held), verdict(held, MARGIN)])} |")
    return "\n".join(lines)


def text_of(columns: Mapping[str, Any]) -> str:
    parts = [f"**{name}**\n\n{main_table(column)}" for name, column in columns.items()]
    return "\n\n".join([*parts, "**What the search is compared with**", question_table(columns)])


def picture(columns: Mapping[str, Any], file: Path) -> None:
    """A panel for each column: the metric over the counted share of step time, with the spread of seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(columns), 4.6), layout="constrained")
    for axes, (name, column) in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns.items(), strict=True):
        points_of = {
            row: (shares(column, of), list(by_seed(of, "validation").values())) for row, of in column["rows"].items()
        }
        known = {row: (float(np.mean(at)), 100 * np.array(values)) for row, (at, values) in points_of.items() if at}
        labels: dict[float, float] = {}  # where the last label of each share stands
        for row, (x, values) in sorted(known.items(), key=lambda item: float(item[1][1].mean())):
            y = float(values.mean())
            axes.plot([x, x], [values.min(), values.max()], color="#bbbbbb", lw=1, zorder=1)
            axes.plot(x, y, "o", ms=4, color="#d55e00" if row == ALL else "#0072b2", zorder=2)
            place = labels[round(x, 1)] = max(y, labels.get(round(x, 1), -math.inf) + 0.11)
            axes.annotate(row, (x, y), xytext=(x + 0.015, place), size=6.5, va="center")
        axes.set_title(name, size=9)
        axes.set_xlabel("share of step time of LoRA on all modules, counted")
        axes.set_ylabel(f"{column['metric']} x 100 (line: lowest to highest seed)")
        axes.margins(x=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)


def main() -> None:
    fill(__doc__, "selection_pays", rows_of, text_of, picture, "the metric over the time of a step")


if __name__ == "__main__":
    main()
