"""The pictures of a table on the report's page."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from diffora.core.parts import short_names
from diffora.core.picture import EVEN, STARTS, colour_range, start_gate
from diffora.report import charts
from diffora.report.agreement import Stability
from diffora.report.charts import LINES, Interval, Line
from diffora.report.comparisons import Comparison, Curve, curves_of
from diffora.report.layout import agreement_table, comparisons_table, cost_table, main_table
from diffora.report.pareto import fronts, time_charts
from diffora.report.results import ResultCell, ResultTable
from diffora.report.selections import agreement, numbers, selections
from diffora.report.statistics import finite, spread

INTERVALS = 30  # most intervals of a forest plot
SEEDS = 10  # most seeds of a setting whose pictures are shown
MOMENTS = 25  # most points of a trajectory


@dataclass(frozen=True)
class Dams:
    """The selections of one setting: how often each module was selected, the selection of each seed, and the search.

    Attributes:
        single: why all seeds have the same selection, ``given`` or ``reused``; empty if they have their own.
        neutral: the gate at Γ = 0, in words: 1/N or 1/2. It has no colour.
        scale: distance of a relaxed DAM's entries from it at which colours are strongest; None if there is no DAM.
        certainty: by seed, how many modules its ensemble decided, in words; empty without ensembles.
    """

    row: str
    column: str
    frequency: Markup
    seeds: list[tuple[int, Markup]]
    trajectory: list[Markup]
    types: list[tuple[int, str]]
    stability: Stability | None
    single: str
    neutral: str
    scale: float | None
    certainty: list[tuple[int, str]]


class View:
    """What the page shows of a table."""

    def __init__(self, table: ResultTable, found: Sequence[Comparison], charted: bool, pictures: int) -> None:
        self.table = table
        self.main = main_table(table)
        self.best = best_cells(table)
        self.measures = cost_table(table)
        self.comparisons = comparisons_table(table, found) if found else None
        self.forests, self.forest_names, self.forest_note = forests(table, found)
        self.n_comparisons = len(found)
        self.curves, self.curves_note = dial_charts(table)
        self.times, self.times_legend, self.times_note = time_charts(table)
        self.fronts = fronts(table)
        self.training, self.legend, self.training_note = training_charts(table) if charted else ([], [], "")
        chosen = [(row, column, cell) for (row, column), cell in table.shown() if cell.first.record.selection]
        drawn = chosen[: max(0, pictures)]
        self.dams = [shown for row, column, cell in drawn if (shown := dams(row, column, cell))]
        self.dams_left_out = len(chosen) - len(drawn)
        alike = [(row, column, cell.selector, agreement(selections(cell))) for row, column, cell in chosen]
        self.agreement = agreement_table(table, alike)


def best_cells(table: ResultTable) -> set[tuple[str, str]]:
    """(row, column title) of the best means in each column whose rows have the same seeds and data."""
    best: set[tuple[str, str]] = set()
    for column in table.columns:
        if not (table.same_seeds(column) and table.same_data(column)):
            continue
        key = column.compared
        sign = 1 if column.maximise else -1
        means = {
            row: sign * s.mean
            for (row, name), cell in table.shown()
            if name == column.name and (s := spread(cell.by_seed(key).values()))
        }
        if len(means) > 1:
            highest = max(means.values())
            best |= {(row, column.title) for row, mean in means.items() if mean == highest}
    return best


def forests(
    table: ResultTable, found: Sequence[Comparison]
) -> tuple[list[tuple[str, Markup]], list[tuple[str, str]], str]:
    """One plot for each column: differences to the baselines of about equal size, or to all if no size is equal.

    Returns:
        (plots with their titles, a key to the rows if their names are too long for the plot, a note)
    """
    plain = [c for c in found if not c.variant]
    fair = [c for c in plain if c.fair]
    rows = list(dict.fromkeys(row for c in fair or plain for row in (c.ours, c.baseline)))
    long = any(len(c.ours) + len(c.baseline) + 3 > charts.LABEL_WIDTH for c in fair or plain)
    names = {row: f"[{table.rows.index(row) + 1}]" if long else row for row in rows}
    plots, cut = [], 0
    for column in dict.fromkeys(c.column for c in plain):
        here = [c for c in fair or plain if c.column == column]
        lines = [
            Interval(
                f"{names[c.ours]} \N{MINUS SIGN} {names[c.baseline]}", c.dev_best.mean, c.dev_best.low, c.dev_best.high
            )
            for c in here
        ]
        cut += max(0, len(lines) - INTERVALS)
        better = "points" if column.factor(column.compared) != 1 else "difference"
        label = f"{better}, right of 0 is better" + ("" if column.maximise else " (less of the metric)")
        if lines:
            plots.append((column.title, charts.forest(lines[:INTERVALS], label)))
    note = "baselines of about equal size (± 10 % of the parameters)" if fair else "no baseline has about equal size"
    key = sorted(((short, row) for row, short in names.items()), key=lambda named: table.rows.index(named[1]))
    return plots, key if long else [], note + (f"; {cut} more not drawn" if cut else "")


def dial_charts(table: ResultTable) -> tuple[list[tuple[str, Markup, list[tuple[int, str]]]], str]:
    """The metric over rho and over the rank, mean and standard deviation over seeds. Returns (charts, a note)."""
    grouped: dict[tuple[str, str], list[Curve]] = defaultdict(list)
    for curve in curves_of(table):
        grouped[curve.column.title, curve.dial].append(curve)
    names = list(dict.fromkeys(curve.name for curves in grouped.values() for curve in curves))
    found, cut = [], sum(max(0, len(curves) - LINES) for curves in grouped.values())
    for (column, dial), curves in grouped.items():
        curves = curves[:LINES]
        lines = []
        for curve in curves:
            points = [(x, s.mean) for x, s in curve.points]
            bars = [s.std or 0.0 for _, s in curve.points]
            lines.append(Line(curve.name, names.index(curve.name), points, bars))
        legend = [(line.colour, line.name) for line in lines]
        found.append((f"{column} over {dial}", charts.line_chart(lines, dial, column, marks=True), legend))
    return found, f"{cut} more lines not drawn" if cut else ""


def training_charts(table: ResultTable) -> tuple[list[tuple[str, Markup]], list[tuple[int, str]], str]:
    """Metric, training loss and generalisation gap by epoch: means over the seeds, up to the shortest run's end."""
    rows = table.rows[:LINES]
    found = []
    used: set[str] = set()
    for column in table.columns:
        histories = {
            row: [run.history for run in cell.runs.values()]
            for row in rows
            if (cell := table.cells.get((row, column.name)))
        }
        metric = next((key for key in column.metrics if key.startswith("validation")), None)
        wanted = [(metric, metric), ("train/loss", "training loss"), ("generalisation_gap", "generalisation gap")]
        for key, label in wanted:
            if key is None:
                continue
            lines = []
            for row, epochs in histories.items():
                if points := _means(epochs, key, column.factor(key)):
                    lines.append(Line(row, rows.index(row), points))
                    used.add(row)
            if lines:
                found.append((f"{column.name}: {label}", charts.line_chart(lines, "epoch", str(label))))
    note = f"the first {LINES} of {len(table.rows)} rows" if len(table.rows) > LINES else ""
    return found, [(rows.index(row), row) for row in rows if row in used], note


def _means(histories: Sequence[Sequence[Mapping[str, Any]]], key: str, factor: float) -> list[tuple[float, float]]:
    """(epochs done, mean over the runs) for each evaluation. An evaluation may be within an epoch."""
    points = []
    for number, epochs in enumerate(zip(*histories, strict=False), 1):
        values = [value for epoch in epochs if (value := finite(epoch.get(key))) is not None]
        if len(values) == len(histories):
            at = finite(epochs[0].get("epoch"))
            points.append((float(number) if at is None else at, factor * sum(values) / len(values)))
    return points


def dams(row: str, column: str, cell: ResultCell) -> Dams | None:
    """What the seeds of a setting selected; None if their files do not say, or are for different modules."""
    files = selections(cell)
    if not files:
        return None
    first = next(iter(files.values()))
    types, present, relaxation = first.types, first.present, first.relaxation
    labels, starts = short_names(types), [start_gate(relaxation, int(n)) for n in present.sum(-1)]
    neutral = starts[0] if len(set(starts)) == 1 else starts
    stacked = np.array([found.mask for found in files.values()])
    several = {(found.seed, found.mask.tobytes()) for found in files.values()}
    given = cell.first.record.selection.get("selector") == "given"
    single = "given" if given else "reused" if len(several) == 1 < len(files) else ""
    relaxed = [found.gamma_bar for found in files.values() if found.gamma_bar is not None]
    blanks = [[[None if math.isnan(v) else v for v in layer] for layer in values.tolist()] for values in relaxed]
    scale = max((colour_range(values, neutral)[1] for values in blanks), default=None)
    seeds = []
    for seed, found in list(files.items())[: 0 if single else SEEDS]:
        if found.confidence is not None:
            picture = charts.heatmap(found.confidence.tolist(), [], found.mask.tolist(), EVEN, EVEN, cell=15)
        elif found.gamma_bar is None:
            shown = np.where(present, found.mask, np.nan)
            picture = charts.heatmap(shown.tolist(), [], found.mask.tolist(), cell=15)
        else:
            values = found.gamma_bar.tolist()
            picture = charts.heatmap(values, [], found.mask.tolist(), neutral, scale or 1.0, cell=15)
        seeds.append((seed, picture))
    sure = [(seed, found.certainty) for seed, found in files.items() if found.certainty]
    return Dams(
        row,
        column,
        charts.heatmap(np.where(present, stacked.mean(0), np.nan).tolist(), labels),
        seeds,
        trajectory_charts(cell, labels),
        list(enumerate(labels)),
        None if single else agreement(files),
        single,
        STARTS[relaxation],
        None if single else scale,
        sure,
    )


def trajectory_charts(cell: ResultCell, types: Sequence[str]) -> list[Markup]:
    """The relaxed DAM over the rounds of the search: one chart for each layer; faint lines: seeds, strong: means."""
    paths = []
    for run in cell.runs.values():
        content = run.read("trajectory.json")
        try:
            rounds, values = numbers(content["rounds"]), numbers(content["gamma_bar"])
        except (TypeError, KeyError, ValueError, OverflowError):
            continue
        if values.ndim == 3 and rounds.ndim == 1 and len(rounds) == len(values) > 1 and values.shape[2] == len(types):
            paths.append((rounds, values))
    # With search.patience, seeds stop at different points: draw all of them up to the first stop.
    shortest = min((len(rounds) for rounds, _ in paths), default=1)
    at = np.unique(np.linspace(0, shortest - 1, MOMENTS).round().astype(int))
    paths = [(rounds[at], values[at]) for rounds, values in paths]
    if not paths or any(path[1].shape != paths[0][1].shape for path in paths):
        return []
    rounds, mean = paths[0][0].tolist(), np.mean([values for _, values in paths], axis=0)
    found = []
    for layer in range(mean.shape[1]):
        lines = []
        for j, name in enumerate(types):
            if np.isnan(mean[:, layer, j]).any():  # this layer has no such module
                continue
            if len(paths) > 1:
                lines += [Line(name, j, list(zip(at.tolist(), v[:, layer, j].tolist(), strict=True)), faint=True)
                          for at, v in paths[:SEEDS]]  # fmt: skip
            lines.append(Line(name, j, list(zip(rounds, mean[:, layer, j].tolist(), strict=True))))
        found.append(
            charts.line_chart(
                lines,
                f"layer {layer + 1}: round",
                "\N{GREEK SMALL LETTER GAMMA}\N{COMBINING MACRON}",
                width=250,
                height=170,
            )
        )
    return found
