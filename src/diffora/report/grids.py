"""Tables as grids of text: the papers' layout, what it cost, all comparisons."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diffora.report.comparisons import Comparison, verdict
from diffora.report.statistics import Difference, Spread, spread
from diffora.report.tables import Cell, Column, Table

PAIRS = 400  # comparisons that are listed of a table; its -comparisons.csv has all
NONE = "\N{EN DASH}"


class Figure(str):
    """The text of a cell, with the number that a column is sorted by."""

    value: float

    def __new__(cls, text: str, value: float) -> "Figure":
        figure = super().__new__(cls, text)
        figure.value = value
        return figure


@dataclass(frozen=True)
class Grid:
    """A table of text: columns in groups, some of which are labelled, and rows."""

    title: str
    groups: list[tuple[str, list[str]]]
    rows: list[list[str]]
    notes: Sequence[str] = ()

    @property
    def head(self) -> list[str]:
        """One line of column names."""
        return [f"{group}: {label}" if group else label for group, labels in self.groups for label in labels]


def main_grid(table: Table) -> Grid:
    """The paper's layout: ours as dev_best and held_out, the paper's figure beside it, size, seeds and time."""
    own = {column.name for column in table.columns} | {"params"}
    elsewhere = list(dict.fromkeys(key for figures in table.paper.values() for key in figures if key not in own))
    sized = any("params" in figures for figures in table.paper.values())
    groups: list[tuple[str, list[str]]] = [("", ["method"]), ("parameters", ["adapter", "head"])]
    groups[1][1].extend(["paper"] if sized else [])
    for column in table.columns:
        labels = ["dev_best"] + (["held_out"] if column.held_out() else [])
        labels += ["paper"] if any(column.name in figures for figures in table.paper.values()) else []
        groups.append((column.title, labels))
    means = elsewhere == ["mean"]  # what the paper's mean is of has runs here
    groups += [("mean", ["dev_best", "paper"])] if means else [("paper", elsewhere)] if elsewhere else []
    groups += [("", ["n"]), ("time", ["search", "total"])]
    rows = []
    for row in table.rows:
        cells, figures = table.across(row), table.paper.get(row, {})
        line = [
            row,
            _several(cells, lambda cell: _count(cell, "adapter")),
            _several(cells, lambda c: _count(c, "head")),
        ]
        line += [_printed(figures.get("params", ""))] if sized else []
        for column, (_, labels) in zip(table.columns, groups[2:], strict=False):
            cell = table.cells.get((row, column.name))
            line.append(figures_of(cell, column, column.metrics))
            line += [figures_of(cell, column, column.held_out())] if "held_out" in labels else []
            line += [_printed(figures.get(column.name, ""))] if "paper" in labels else []
        line += [plus_minus(mean_over_columns(table, row), 1.0)] if means else []
        line += [_printed(figures.get(key, "")) for key in elsewhere]
        line.append(_joined([_n(cell, column) for cell, column in zip(cells, table.columns, strict=True)]))
        line.append(_several(cells, search_time))
        line.append(_several(cells, lambda cell: duration(cell.spread("time", "total_s"))))
        rows.append(line)
    notes = list(table.notes)
    if any(" / " in line[i] for line in rows for i in (1, 2, -3, -2, -1)):
        notes.append(f"parameters, n and times that differ are one for each column, in their order; {NONE}: none there")
    if means:
        notes.append(
            "mean: over all columns, of each the mean of its metrics; by seed, of the seeds that all columns have"
        )
    return Grid(table.title, groups, rows, notes)


def mean_over_columns(table: Table, row: str) -> Spread | None:
    """Of what the columns show, by seed; None where the row lacks a column, or the columns have no common seed."""
    values = []
    for column, cell in zip(table.columns, table.across(row), strict=True):
        if cell is None:
            return None
        values += [(cell.by_seed(key, column.factor(key)), 1 / len(column.metrics)) for key in column.metrics]
    seeds = set.intersection(*(set(of) for of, _ in values))
    return spread(math.fsum(share * of[seed] for of, share in values) / len(table.columns) for seed in seeds)


MEASURES = (
    ("search, s", "time", "search_s"),
    ("fine-tuning, s", "time", "finetune_s"),
    ("total, s", "time", "total_s"),
    ("peak memory, MB", "memory", "peak_rss_mb"),
    ("peak GPU memory, MB", "memory", "peak_cuda_mb"),
    ("best epoch", "metrics", "best_epoch"),
    ("generalisation gap", "metrics", "generalisation_gap"),
    ("rank of ΔW", "metrics", "update/rank"),
    ("orthogonality loss of ΔW", "metrics", "update/orthogonality_loss"),
)


def measures_grid(table: Table) -> Grid:
    """What the runs cost and how their updates are: rank and ‖ΔWΔWᵀ − I‖²_F ([R] Table 5), gap, time, memory."""
    used = [
        measure
        for measure in MEASURES
        if any(found.mean for cell in table.cells.values() if (found := cell.spread(*measure[1:])))
    ]
    rows = []
    for column in table.columns:
        for row in table.rows:
            if cell := table.cells.get((row, column.name)):
                shown = [_measure(cell, column, part, key) for _, part, key in used]
                n = len(cell.runs)
                rows.append(
                    [row, column.name, _count(cell, "adapter"), _count(cell, "inference"), *shown, Figure(str(n), n)]
                )
    labels = ["method", "task", "adapter parameters", "at inference", *(label for label, *_ in used), "runs"]
    return Grid(f"{table.title}: cost, gap and updates", [("", labels)], rows)


def _measure(cell: Cell, column: Column, part: str, key: str) -> str:
    found = cell.spread(part, key)
    if part == "metrics":
        return plus_minus(found, column.factor(key))
    if key == "search_s" and cell.reused:
        return search_time(cell)
    if found is None or not found.mean:
        return ""
    return Figure(f"{found.mean:.0f}" + (f" ± {found.std:.0f}" if found.std is not None else ""), found.mean)


def comparisons_grid(table: Table, found: Sequence[Comparison]) -> Grid:
    """The comparisons of a table, the first `PAIRS` of them."""
    rows = []
    for c in found[:PAIRS]:
        dev, out = c.dev_best, c.held_out
        rows.append(
            [
                c.column.title,
                c.ours,
                c.baseline,
                signed(dev),
                probability(dev.p),
                probability(c.p_holm),
                verdict(dev),
                signed(out),
                verdict(out),
                "" if c.ratio is None else Figure(f"{c.ratio:.2f}" + ("" if c.fair else " (unequal)"), c.ratio),
                Figure(str(dev.n), dev.n),
            ]
        )
    labels = ["dev_best: difference (95 %)", "p", "p, Holm", "verdict"]
    groups = [
        ("", ["column", "ours", "against", *labels, "held_out: difference (95 %)", "held_out verdict"]),
        ("", ["parameters, ours/other", "n"]),
    ]
    notes = []
    if len(found) > PAIRS:
        notes.append(
            f"the first {PAIRS} of {len(found):,} comparisons; all are in {table.name}-comparisons.csv, and count on "
            "top of the page and in Holm's correction"
        )
    return Grid(f"{table.title}: {table.our_name} against the others", groups, rows, notes)


def figures_of(cell: Cell | None, column: Column, keys: Sequence[str]) -> str:
    """Mean ± standard deviation of each metric."""
    if cell is None:
        return ""
    return _listed([plus_minus(spread(cell.by_seed(key).values()), column.factor(key)) for key in keys])


def plus_minus(found: Spread | None, factor: float) -> str:
    """Mean and standard deviation, times ``factor``; empty for None."""
    if found is None:
        return ""
    mean, digits = found.mean * factor, _digits(found.mean * factor, factor)
    return Figure(f"{mean:.{digits}f}" + (f" ± {found.std * factor:.{digits}f}" if found.std is not None else ""), mean)


def signed(found: Difference | None) -> str:
    """A difference with its interval."""
    if found is None:
        return ""
    largest = max(abs(value) for value in (found.mean, found.low, found.high) if value is not None)
    digits = 2 if largest >= 0.5 else 4  # points in the hundredths; shares and correlations finer
    interval = f" ({found.low:+.{digits}f} to {found.high:+.{digits}f})" if found.low is not None else ""
    return Figure(f"{found.mean:+.{digits}f}{interval}", found.mean)


def probability(p: float | None) -> str:
    """A p-value with three digits; empty for None."""
    return "" if p is None else Figure("< 0.001" if p < 0.001 else f"{p:.3f}", p)


def search_time(cell: Cell) -> str:
    """How long the search took, or that its result is that of other runs."""
    return "reused" if cell.reused else duration(cell.spread("time", "search_s"))


def duration(found: Spread | None) -> str:
    """A mean time in words."""
    if found is None or not found.mean:
        return ""
    seconds = found.mean
    if seconds < 120:
        return Figure(f"{seconds:.0f} s", seconds)
    return Figure(f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h", seconds)


def _digits(value: float, factor: float) -> int:
    size = abs(value)
    return 2 if factor != 1 else 4 if size < 2 else 3 if size < 10 else 2 if size < 1000 else 0


def _count(cell: Cell, key: str) -> str:
    """A count of parameters."""
    found = cell.spread("params", key)
    return Figure(cell.span(key), found.mean) if found else ""


def _n(cell: Cell | None, column: Column) -> str:
    """How many seeds have a value."""
    if cell is None:
        return ""
    n = len(cell.by_seed(column.compared))
    return Figure(str(n), n)


def _printed(text: str) -> str:
    """A figure of a paper."""
    found = re.match(r"(\d+(?:\.\d+)?)([kM]?)", text)
    return Figure(text, float(found[1]) * {"": 1, "k": 1e3, "M": 1e6}[found[2]]) if found else text


def _several(cells: Sequence[Cell | None], text: Callable[[Cell], str]) -> str:
    """What the columns of a row have."""
    return _joined([text(cell) if cell else "" for cell in cells])


def _joined(texts: Sequence[str]) -> str:
    """One text where all are the same, else each of them, in their order."""
    return texts[0] if len(set(texts)) == 1 else _listed(texts)


def _listed(texts: Sequence[str]) -> str:
    """All of them, sorted by the first number."""
    value = next((text.value for text in texts if isinstance(text, Figure)), None)
    listed = " / ".join(text or NONE for text in texts) if any(texts) else ""
    return listed if value is None else Figure(listed, value)
