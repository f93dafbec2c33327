"""The rank of the search among random selections of its size, from the runs of experiment=selection_draws.

    python scripts/selection_draws.py outputs/selection_draws-small
    python scripts/selection_draws.py <folder> … --page docs/background/selection.md      # puts table and picture there
    python scripts/selection_draws.py docs/background/data/selection_draws.json           # the same table without runs

For each seed the percentile is the share of draws that the search's run beats; equal ones count half. All runs of a
seed have the same settings and number of parameters, so a random selection is at 50 on average. `gain` is the search's
metric minus the draws' mean. Intervals are Student's t over seeds.

Two p-values test the percentile. For "p", any run of a seed may stand for the search, in each seed another one. For "as
one choice", one row (draws of one number) stands for the search in all seeds, because the search chooses alike with all
of them; with twelve draws this p is at least 1/13. There is no F-test of the draws: a draw is made from the search's
selection of its seed, so no selection is repeated with several seeds. In experiment=selection_landscape it is.
"""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pages import Run, checked, fill
from selection_quality import probability

from diffora.report.permutation import Permuted, picks_stand_out, ranks
from diffora.report.statistics import Difference, paired

SPLITS = "validation", "held_out"


def places(runs: Sequence[Run]) -> dict[str, list[dict[str, Any]]]:
    """For each column, by seed: the search's metrics and those of the draws, on the rows of both splits.

    Raises:
        SystemExit: the runs do not belong together (`pages.checked`).
    """
    found: dict[tuple[str, int], dict[str, Any]] = defaultdict(lambda: {"search": None, "draws": []})
    for run in checked(runs):
        values = {split: run["metrics"][f"{split}/{run['main_metric']}"] for split in SPLITS}
        at = found[run["column"], run["seed"]]
        sign = 1 if run["metric_facts"][run["main_metric"]]["maximise"] else -1
        at |= {"metric": run["main_metric"], "sign": sign, "seed": run["seed"]}
        if run["method"] == "diffora":
            at |= {"search": values, "parameters": run["params"]["adapter"]}
        elif run["method"] == "random":
            at["draws"].append({"row": run["row"], "parameters": run["params"]["adapter"], **values})
    columns: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for (column, _), at in sorted(found.items()):
        if at["search"] is not None and at["draws"]:
            columns[column].append(at)
    return columns


def percentile(at: Mapping[str, Any], split: str) -> float:
    """Percentile of the search among the draws of its seed, 0 to 100."""
    mine, others = at["sign"] * at["search"][split], [at["sign"] * draw[split] for draw in at["draws"]]
    return 100 * (sum(v < mine for v in others) + 0.5 * sum(v == mine for v in others)) / len(others)


def over_seeds(seeds: Sequence[Mapping[str, Any]], split: str) -> tuple[Difference, Difference]:
    """(percentile less 50, gain over the mean of the draws), each with its interval."""
    at = {one["seed"]: percentile(one, split) for one in seeds}
    mine = {one["seed"]: one["sign"] * one["search"][split] for one in seeds}
    means = {one["seed"]: one["sign"] * statistics.mean(draw[split] for draw in one["draws"]) for one in seeds}
    place, gain = paired(at, dict.fromkeys(at, 50.0)), paired(mine, means)
    assert place is not None and gain is not None
    return place, gain


def tests(seeds: Sequence[Mapping[str, Any]], split: str) -> tuple[Permuted, Permuted | None]:
    """(test with independent seeds, test of the rows that all seeds have; None for fewer than two rows)."""
    strata = [[one["sign"] * run[split] for run in (one["search"], *one["draws"])] for one in seeds]
    apart = picks_stand_out(strata, [0] * len(strata))
    names = [["search", *(draw["row"] for draw in one["draws"])] for one in seeds]
    common = [name for name in names[0] if all(name in others for others in names)]
    if len(common) < 2:
        return apart, None
    values = [[stratum[of.index(name)] for name in common] for stratum, of in zip(strata, names, strict=True)]
    means = (ranks(np.array(values)) - 1).mean(0) * 100 / (len(common) - 1)
    return apart, Permuted.of(float(means[0]), means, exact=True)


def table(columns: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Markdown: a line for each column and seed, and one for all seeds of a column."""
    head = ["task", "seed", "parameters (draws)", "draws", "their mean ± std", "their best", "search", "percentile"]
    head += ["held_out: mean ± std", "search", "percentile"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for column, seeds in columns.items():
        for one in seeds:
            sizes = sorted({draw["parameters"] for draw in one["draws"]})
            size = f"{one['parameters']:,}"
            if sizes != [one["parameters"]]:
                size += f" ({sizes[0]:,} to {sizes[-1]:,})"
            cells = [column, str(one["seed"]), size, str(len(one["draws"]))]
            for split in SPLITS:
                values = [draw[split] for draw in one["draws"]]
                std = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.3f}{std}")
                if split == "validation":
                    cells.append(f"{one['sign'] * max(one['sign'] * v for v in values):.3f}")
                cells += [f"{one['search'][split]:.3f}", f"{percentile(one, split):.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for column, seeds in columns.items():
        for split in SPLITS:
            place, gain = over_seeds(seeds, split)
            told = f"percentile {50 + place.mean:.0f}"
            if place.low is not None and place.high is not None:
                told += f" ({max(0, 50 + place.low):.0f} to {min(100, 50 + place.high):.0f})"
            told += f", gain {gain.mean:+.4f}"
            if gain.low is not None and gain.high is not None:
                told += f" ({gain.low:+.4f} to {gain.high:+.4f})"
            apart, together = tests(seeds, split)
            told += f"; p {probability(apart.p)}"
            if together is not None and len(seeds) > 1:
                told += f", as one choice p {probability(together.p)}"
            lines.append(f"- {column}, {split} {seeds[0]['metric']}, {len(seeds)} seed{'s' * (len(seeds) > 1)}: {told}")
    return "\n".join(lines)


def picture(columns: Mapping[str, Sequence[Mapping[str, Any]]], file: Path) -> None:
    """A panel for each column: the draws of each seed as dots, the search's run as a diamond."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 + 1.9 * len(columns), 3.2), layout="constrained")
    for axes, (column, seeds) in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns.items(), strict=True):
        at = [(i, draw["validation"]) for i, one in enumerate(seeds) for draw in one["draws"]]
        axes.scatter(*zip(*at, strict=True), s=22, color="#8fb3d9", label="random")
        mine = [one["search"]["validation"] for one in seeds]
        axes.scatter(range(len(seeds)), mine, s=46, marker="D", color="#d55e00", label="search")
        axes.set_xticks(range(len(seeds)), [str(one["seed"]) for one in seeds])
        axes.set_xlim(-0.6, len(seeds) - 0.4)
        axes.set_title(column, size=10)
        axes.set_xlabel("seed")
        axes.set_ylabel(seeds[0]["metric"])
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(file, dpi=110)


def main() -> None:
    fill(__doc__, "selection_draws", places, table, picture, "the search among draws", "search with random draws")


if __name__ == "__main__":
    main()
