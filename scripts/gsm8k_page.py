"""The small table of the public benchmark in docs/results/gsm8k.md: right answers and forgetting of each method.

    python scripts/gsm8k_page.py outputs/metamath_gsm8k-small --page docs/results/gsm8k.md
    python scripts/gsm8k_page.py docs/results/data/gsm8k_small.json         # the same table from our figures

With `--page`, it replaces the table and the picture, and writes the figures with the hashes of the runs beside them.
"""

import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pages import Run, checked, fill, points

from diffora.report.statistics import Difference, holm, paired, verdict

NAME = "gsm8k_small"
ALL, RANDOM = "LoRA, all modules", "random"
CHOSEN = [
    *("search", "search, shared pairs", "attribution", "one-shot", "gradient norm"),
    *("fisher", "plop", "spectrum", "kappa", "weight x activation"),
]
"""Compared with a random selection of the search's size, too."""
RIGHT, FORGETTING = "test/exact_match", "forgetting/increase"
MARGIN = 0.005
Row = Mapping[str, Any]


def rows_of(runs: Sequence[Run]) -> dict[str, Row]:
    """For each method: by seed its metrics, its adapter parameters and the hash of the run.

    Raises:
        SystemExit: the runs do not belong together (`pages.checked`), are of several columns, or of another experiment.
    """
    if len(columns := {str(run.get("column")) for run in runs}) > 1:
        sys.exit(f"error: the runs are of {', '.join(sorted(columns))}: give a folder with one of them")
    for run in runs:
        if missing := {key for key in (RIGHT, FORGETTING) if run["metrics"].get(key) is None}:
            sys.exit(f"error: {run.get('row')}, seed {run['seed']} has no {', '.join(sorted(missing))}")
    found: dict[str, dict[str, Any]] = {}
    for run in checked(runs):
        metrics = {key: run["metrics"][key] for key in (RIGHT, FORGETTING)}
        facts = {"parameters": run["params"]["adapter"], "config_hash": run["config_hash"]}
        found.setdefault(run["row"], {})[str(run["seed"])] = metrics | facts
    return {name: dict(sorted(seeds.items())) for name, seeds in found.items()}


def values(row: Row, key: str) -> list[float]:
    return [one[key] for one in row.values()]


def mean(row: Row, key: str) -> float:
    return statistics.mean(values(row, key))


def best_first(rows: Mapping[str, Row]) -> list[str]:
    return sorted(rows, key=lambda name: -mean(rows[name], RIGHT))


def front(rows: Mapping[str, Row]) -> Iterator[str]:
    """The methods of which no other has both more right answers and less forgetting, by their means; the best first."""
    least = float("inf")
    for name in best_first(rows):
        if (forgetting := mean(rows[name], FORGETTING)) < least:
            least = forgetting
            yield name


def difference(rows: Mapping[str, Row], name: str, other: str = ALL) -> Difference | None:
    """The right answers of a method less those of another, paired over the seeds that both have."""
    if name == other or not {name, other} <= rows.keys():
        return None
    return paired(*({int(seed): one[RIGHT] for seed, one in rows[row].items()} for row in (name, other)))


def table(rows: Mapping[str, Row]) -> str:
    """Markdown: one line for each method, the best first."""
    found = {name: difference(rows, name) for name in best_first(rows)}
    adjusted = iter(holm([one.p for one in found.values() if one is not None and one.p is not None]))
    head = ["method", "adapter parameters", "seeds", "right answers, %", "forgetting"]
    head += [f"less {ALL}, points (95 %)", "p, Holm", "verdict, not corrected"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, one in found.items():
        row = rows[name]
        sizes = sorted(set(values(row, "parameters")))
        cells = [name, " to ".join(f"{size:,}" for size in (sizes[0], sizes[-1])[: len(sizes)]), str(len(row))]
        cells += [spread(values(row, RIGHT), 100, 1), spread(values(row, FORGETTING), 1, 2)]
        if one is None:
            cells += ["", "", ""]
        else:
            cells += [points(one), "" if one.p is None else p_text(next(adjusted)), verdict(one, MARGIN)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"Not beaten in both right answers and forgetting: {'; '.join(front(rows))}."]
    chosen = {name: difference(rows, name, RANDOM) for name in CHOSEN}
    if said := "; ".join(f"{name} {points(one)}" for name, one in chosen.items() if one is not None):
        lines += ["", f"Less the random selections, points (95 %, not corrected for their number): {said}."]
    return "\n".join(lines)


def p_text(p: float) -> str:
    return f"{p:.2f}" if p >= 0.005 else "< 0.01"


def spread(found: Sequence[float], factor: float, digits: int) -> str:
    """Mean and standard deviation."""
    text = f"{factor * statistics.mean(found):.{digits}f}"
    return text + (f" ± {factor * statistics.stdev(found):.{digits}f}" if len(found) > 1 else "")


def picture(rows: Mapping[str, Row], file: Path) -> None:
    """Right answers over forgetting, with the spread of seeds, and the front."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axes = figure.subplots()
    edge = list(front(rows))
    for name, row in rows.items():
        x, y = mean(row, FORGETTING), 100 * mean(row, RIGHT)
        right, lost = [100 * value for value in values(row, RIGHT)], values(row, FORGETTING)
        axes.plot([x, x], [min(right), max(right)], color="#dddddd", lw=1, zorder=1)
        axes.plot([min(lost), max(lost)], [y, y], color="#dddddd", lw=1, zorder=1)
        axes.plot(x, y, "o", ms=4, color="#d55e00" if name in edge else "#0072b2", zorder=3)
        axes.annotate(name, (x, y), xytext=(4, 2), textcoords="offset points", size=6.5, zorder=4)
    corners = [(mean(rows[name], FORGETTING), 100 * mean(rows[name], RIGHT)) for name in edge]
    axes.plot(*zip(*corners, strict=True), "--", color="#999999", lw=1, zorder=2)
    axes.set_xscale("log")
    axes.set_xlabel("forgetting: rise of the loss on plain texts (lines: lowest to highest seed)")
    axes.set_ylabel("right answers, %")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)


def main() -> None:
    fill(__doc__, NAME, rows_of, table, picture, "right answers over forgetting")


if __name__ == "__main__":
    main()
