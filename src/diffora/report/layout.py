"""Tables of results as tables of text: the papers' layout, costs, comparisons."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diffora.report.agreement import Stability
from diffora.report.comparisons import Comparison
from diffora.report.results import ResultCell, ResultColumn, ResultTable
from diffora.report.statistics import Difference, Spread, spread

PAIRS = 400  # most comparisons that the page lists for a table; the table's -comparisons.csv has all
NONE = "\N{EN DASH}"


class SortableText(str):
    """The text of a cell with the number by which its column is sorted."""

    value: float

    def __new__(cls, text: str, value: float) -> "SortableText":
        sortable = super().__new__(cls, text)
        sortable.value = value
        return sortable


@dataclass(frozen=True)
class TextTable:
    """A table of text.

    Attributes:
        title: heading.
        groups: (name of the group or empty, labels of its columns).
        rows: one text for each column.
        notes: remarks below the table.
    """

    title: str
    groups: list[tuple[str, list[str]]]
    rows: list[list[str]]
    notes: Sequence[str] = ()

    @property
    def head(self) -> list[str]:
        """The column names in one line, with the names of their groups."""
        return [f"{group}: {label}" if group else label for group, labels in self.groups for label in labels]


def main_table(table: ResultTable) -> TextTable:
    """The paper's layout: our dev_best and held_out next to the paper's figure, with size, seeds and time."""
    own = {column.name for column in table.columns} | {"params"}
    elsewhere = list(dict.fromkeys(key for figures in table.paper.values() for key in figures if key not in own))
    sized = any("params" in figures for figures in table.paper.values())
    groups: list[tuple[str, list[str]]] = [("", ["method"]), ("parameters", ["adapter", "head"])]
    groups[1][1].extend(["paper"] if sized else [])
    for column in table.columns:
        labels = [column.label] + (["held_out"] if column.held_out() else [])
        labels += ["paper"] if any(column.name in figures for figures in table.paper.values()) else []
        groups.append((column.title, labels))
    means = elsewhere == ["mean"]  # the paper's mean is over columns that all have runs here
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
        notes.append(
            "Where columns differ in parameters, n or time, there is one value for each column, in the order of the "
            f"columns; {NONE}: no value"
        )
    if means:
        notes.append(
            "mean: over all columns, each with the mean of its metrics; computed by seed, for the seeds of all columns"
        )
    return TextTable(table.title, groups, rows, notes)


def mean_over_columns(table: ResultTable, row: str) -> Spread | None:
    """The row's mean over all columns, by seed; None if a column has no runs or the columns share no seed."""
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
    ("a step, s", "time", "step_s"),
    ("total, s", "time", "total_s"),
    ("peak memory, MB", "memory", "peak_rss_mb"),
    ("peak GPU memory, MB", "memory", "peak_cuda_mb"),
    ("best epoch", "metrics", "best_epoch"),
    ("generalisation gap", "metrics", "generalisation_gap"),
    ("forgetting (loss on plain texts)", "metrics", "forgetting/increase"),
    ("rank of ΔW", "metrics", "update/rank"),
    ("orthogonality loss of ΔW", "metrics", "update/orthogonality_loss"),
    ("stable rank of ΔW", "metrics", "update/stable_rank"),
    ("median σ/σ₁ of ΔW", "metrics", "update/median_sigma"),
)


def cost_table(table: ResultTable) -> TextTable:
    """Time, memory, generalisation gap, and measures of the updates ([R] Table 5)."""
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
                    [
                        row,
                        column.name,
                        _count(cell, "adapter"),
                        _count(cell, "inference"),
                        *shown,
                        SortableText(str(n), n),
                    ]
                )
    labels = ["method", "task", "adapter parameters", "at inference", *(label for label, *_ in used), "runs"]
    return TextTable(f"{table.title}: cost, gap and updates", [("", labels)], rows)


def _measure(cell: ResultCell, column: ResultColumn, part: str, key: str) -> str:
    found = cell.spread(part, key)
    if part == "metrics":
        return plus_minus(found, column.factor(key))
    if key == "search_s" and cell.reused:
        return search_time(cell)
    if found is None or not found.mean:
        return ""
    digits = 0 if found.mean >= 10 else 3  # a step may take milliseconds
    error = f" ± {found.std:.{digits}f}" if found.std is not None else ""
    return SortableText(f"{found.mean:.{digits}f}{error}", found.mean)


def agreement_table(table: ResultTable, found: Sequence[tuple[str, str, str, Stability | None]]) -> TextTable | None:
    """How far the seeds of each setting select the same modules, beside chance; None without such settings.

    Args:
        found: (row, column, selector, agreement), None for a single selection.
    """
    rows = [
        [
            row,
            column,
            selector,
            SortableText(str(alike.n), alike.n),
            f"{alike.jaccard:.2f}",
            f"{alike.chance:.2f}",
            f"{alike.low:.2f} to {alike.high:.2f}",
            probability(alike.p),
        ]
        for row, column, selector, alike in found
        if alike is not None
    ]
    labels = ["method", "task", "selector", "selections", "agreement", "by chance", "95 % of chance", "p"]
    notes = [
        "agreement: modules in common divided by modules in either, the mean over all pairs of seeds",
        "by chance: its expected value for random selections of the same sizes; p: the share of random ones that agree "
        "as well",
        "a search whose gates are equal at the threshold is left out, because the order of the modules decided it",
        "agreement does not show that a selection is good; a selector that needs no data always agrees with itself",
    ]
    return TextTable(f"{table.title}: agreement of the seeds", [("", labels)], rows, notes) if rows else None


def comparisons_table(table: ResultTable, found: Sequence[Comparison]) -> TextTable:
    """The first `PAIRS` comparisons of a table."""
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
                c.told(c.verdict),
                detectable(dev),
                signed(out),
                c.told(c.held_out_verdict),
                "" if c.ratio is None else SortableText(f"{c.ratio:.2f}" + ("" if c.fair else " (unequal)"), c.ratio),
                SortableText(str(dev.n), dev.n),
            ]
        )
    compared = " or ".join(dict.fromkeys(c.column.label for c in found))
    labels = [f"{compared}: difference (95 %)", "p", "p, Holm", "verdict", "detectable"]
    groups = [
        ("", ["column", "ours", "against", *labels, "held_out: difference (95 %)", "held_out verdict"]),
        ("", ["parameters, ours/other", "n"]),
    ]
    notes = []
    if len(found) > PAIRS:
        notes.append(
            f"The first {PAIRS} of {len(found):,} comparisons are listed; {table.name}-comparisons.csv has all. "
            "Holm's correction and the counts at the top of the page include all"
        )
    notes.append(
        "detectable: the smallest true difference that these seeds, with this spread, find with a probability of 80 %"
    )
    return TextTable(f"{table.title}: {table.our_name} against the others", groups, rows, notes)


def figures_of(cell: ResultCell | None, column: ResultColumn, keys: Sequence[str]) -> str:
    """Mean ± standard deviation of each metric, as one text."""
    if cell is None:
        return ""
    return _listed([plus_minus(spread(cell.by_seed(key).values()), column.factor(key)) for key in keys])


def plus_minus(found: Spread | None, factor: float) -> str:
    """Mean and standard deviation, times ``factor``; empty for None."""
    if found is None:
        return ""
    mean, digits = found.mean * factor, _digits(found.mean * factor, factor)
    return SortableText(
        f"{mean:.{digits}f}" + (f" ± {found.std * factor:.{digits}f}" if found.std is not None else ""), mean
    )


def signed(found: Difference | None) -> str:
    """A difference with its interval, as text."""
    if found is None:
        return ""
    largest = max(abs(value) for value in (found.mean, found.low, found.high) if value is not None)
    # Differences in points need two digits, those of fractions and correlations four.
    digits = 2 if largest >= 0.5 else 4
    interval = f" ({found.low:+.{digits}f} to {found.high:+.{digits}f})" if found.low is not None else ""
    return SortableText(f"{found.mean:+.{digits}f}{interval}", found.mean)


def detectable(found: Difference) -> str:
    """The smallest difference that could have been found, as text; empty without an interval."""
    value = found.detectable
    return "" if value is None else SortableText(f"{value:.{2 if value >= 0.5 else 4}f}", value)


def probability(p: float | None) -> str:
    """A p-value with three digits; empty for None."""
    return "" if p is None else SortableText("< 0.001" if p < 0.001 else f"{p:.3f}", p)


def search_time(cell: ResultCell) -> str:
    """How long the search took, or ``reused`` if other runs did it."""
    return "reused" if cell.reused else duration(cell.spread("time", "search_s"))


def duration(found: Spread | None) -> str:
    """A mean time as text, in s, min or h."""
    if found is None or not found.mean:
        return ""
    seconds = found.mean
    if seconds < 120:
        return SortableText(f"{seconds:.0f} s", seconds)
    return SortableText(f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h", seconds)


def _digits(value: float, factor: float) -> int:
    size = abs(value)
    return 2 if factor != 1 else 4 if size < 2 else 3 if size < 10 else 2 if size < 1000 else 0


def _count(cell: ResultCell, key: str) -> str:
    """A number of parameters as text."""
    found = cell.spread("params", key)
    return SortableText(cell.span(key), found.mean) if found else ""


def _n(cell: ResultCell | None, column: ResultColumn) -> str:
    """How many seeds have a value for the compared metric, as text."""
    if cell is None:
        return ""
    n = len(cell.by_seed(column.compared))
    return SortableText(str(n), n)


def _printed(text: str) -> str:
    """A figure of a paper, sorted by its first number."""
    found = re.match(r"(\d+(?:\.\d+)?)([kM]?)", text)
    return SortableText(text, float(found[1]) * {"": 1, "k": 1e3, "M": 1e6}[found[2]]) if found else text


def _several(cells: Sequence[ResultCell | None], text: Callable[[ResultCell], str]) -> str:
    """The texts of a row's columns, joined."""
    return _joined([text(cell) if cell else "" for cell in cells])


def _joined(texts: Sequence[str]) -> str:
    """One text if all are the same, otherwise all of them in their order."""
    return texts[0] if len(set(texts)) == 1 else _listed(texts)


def _listed(texts: Sequence[str]) -> str:
    """All texts in one, sorted by the first number."""
    value = next((text.value for text in texts if isinstance(text, SortableText)), None)
    listed = " / ".join(text or NONE for text in texts) if any(texts) else ""
    return listed if value is None else SortableText(listed, value)
