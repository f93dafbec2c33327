"""The pictures that the report's page shows of a table."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from diffora.core.parts import short_names
from diffora.report import charts
from diffora.report.charts import Interval, Line
from diffora.report.comparisons import Comparison, Curve, curves_of
from diffora.report.grids import comparisons_grid, main_grid, measures_grid
from diffora.report.runs import Run
from diffora.report.statistics import Stability, finite, spread, stability
from diffora.report.tables import Cell, Table

LINES = 2 * charts.COLOURS  # of a chart
INTERVALS = 30  # of a forest plot
SEEDS = 10  # whose pictures are shown
MOMENTS = 25  # of a trajectory


@dataclass(frozen=True)
class Dams:
    """The selections of one setting: how often each module was selected, each seed's, and how the search got there.

    Attributes:
        single: where all seeds have one and the same selection, how they came by it: ``given`` or ``reused``.
        scale: the distance of a relaxed DAM's entries from 1/N at which colours are strongest; None without any.
    """

    row: str
    column: str
    frequency: Markup
    seeds: list[tuple[int, Markup]]
    trajectory: list[Markup]
    types: list[tuple[int, str]]
    stability: Stability | None
    single: str
    scale: float | None


class View:
    """A table as the page shows it."""

    def __init__(self, table: Table, found: Sequence[Comparison], charted: bool, pictures: int) -> None:
        self.table = table
        self.main = main_grid(table)
        self.best = best_cells(table)
        self.measures = measures_grid(table)
        self.comparisons = comparisons_grid(table, found) if found else None
        self.forests, self.forest_names, self.forest_note = forests(table, found)
        self.n_comparisons = len(found)
        self.curves, self.curves_note = dial_charts(table)
        self.training, self.legend, self.training_note = training_charts(table) if charted else ([], [], "")
        chosen = [(row, column, cell) for (row, column), cell in _shown(table) if cell.first["selection"]]
        drawn = chosen[: max(0, pictures)]
        self.dams = [shown for row, column, cell in drawn if (shown := dams(row, column, cell))]
        self.dams_left_out = len(chosen) - len(drawn)


def _shown(table: Table) -> Iterable[tuple[tuple[str, str], Cell]]:
    for column in table.columns:
        for row in table.rows:
            if cell := table.cells.get((row, column.name)):
                yield (row, column.name), cell


def best_cells(table: Table) -> set[tuple[str, str]]:
    """The rows with the best mean, one for each column whose rows have the same seeds."""
    best = set()
    for column in filter(table.same_seeds, table.columns):
        key = column.compared
        sign = 1 if column.maximise else -1
        means = {
            row: sign * s.mean
            for (row, name), cell in _shown(table)
            if name == column.name and (s := spread(cell.by_seed(key).values()))
        }
        if len(means) > 1:
            best.add((max(means, key=means.__getitem__), column.title))
    return best


def forests(table: Table, found: Sequence[Comparison]) -> tuple[list[tuple[str, Markup]], list[tuple[str, str]], str]:
    """Differences to the baselines of about equal size, or to all where there is none such; a plot for each column.

    Returns:
        (plots with their titles, names that were too long with what stands for them, a note)
    """
    plain = [c for c in found if not c.variant]
    fair = [c for c in plain if c.fair]
    rows = list(dict.fromkeys(row for c in fair or plain for row in (c.ours, c.baseline)))
    long = any(len(c.ours) + len(c.baseline) + 3 > charts.NAME for c in fair or plain)
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
        better = "points" if column.factor("validation/x") != 1 else "difference"
        label = f"{better}, right of 0 is better" + ("" if column.maximise else " (less of the metric)")
        if lines:
            plots.append((column.title, charts.forest(lines[:INTERVALS], label)))
    note = "baselines of about equal size (± 10 % of the parameters)" if fair else "no baseline is of about equal size"
    key = sorted(((short, row) for row, short in names.items()), key=lambda named: table.rows.index(named[1]))
    return plots, key if long else [], note + (f"; {cut} more are not drawn" if cut else "")


def dial_charts(table: Table) -> tuple[list[tuple[str, Markup, list[tuple[int, str]]]], str]:
    """The metric against rho and against the rank: mean and standard deviation over seeds. Charts, and a note."""
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
        found.append((f"{column} against {dial}", charts.line_chart(lines, dial, column, marks=True), legend))
    return found, f"{cut} more lines are not drawn" if cut else ""


def training_charts(table: Table) -> tuple[list[tuple[str, Markup]], list[tuple[int, str]], str]:
    """Metric, training loss and generalisation gap by epoch, means over the seeds, as far as all of them went."""
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
    points = []
    for number, epochs in enumerate(zip(*histories, strict=False), 1):
        values = [value for epoch in epochs if (value := finite(epoch.get(key))) is not None]
        if len(values) == len(histories):
            points.append((float(number), factor * sum(values) / len(values)))
    return points


def dams(row: str, column: str, cell: Cell) -> Dams | None:
    """What the seeds of a setting selected; None where their files do not say, or do not go together."""
    files = {seed: found for seed, run in cell.runs.items() if (found := _selection(run, cell)) is not None}
    if len({(found.mask.shape, *found.types) for found in files.values()}) != 1:
        return None
    types = next(iter(files.values())).types
    labels, uniform = short_names(types), 1 / len(types)
    stacked = np.array([found.mask for found in files.values()])
    # What was taken from one search several times agrees with itself and says nothing of other seeds.
    of = {(found.seed, found.mask.tobytes()): found.mask for found in files.values()}
    given = cell.first["selection"].get("selector") == "given"
    single = "given" if given else "reused" if len(of) == 1 < len(files) else ""
    relaxed = [found.gamma_bar for found in files.values() if found.gamma_bar is not None]
    scale = max((float(np.abs(values - uniform).max()) for values in relaxed), default=None)
    seeds = []
    for seed, found in list(files.items())[: 0 if single else SEEDS]:
        if found.gamma_bar is None:
            picture = charts.heatmap(found.mask.astype(float).tolist(), [], found.mask.tolist(), cell=15)
        else:
            values = found.gamma_bar.tolist()
            picture = charts.heatmap(values, [], found.mask.tolist(), uniform, scale or 1.0, cell=15)
        seeds.append((seed, picture))
    by_layer = cell.first["selection"].get("k") is not None
    return Dams(
        row,
        column,
        charts.heatmap(stacked.mean(0).tolist(), labels),
        seeds,
        trajectory_charts(cell, labels),
        list(enumerate(labels)),
        None if single else stability(np.array(list(of.values())), by_layer),
        single,
        None if single else scale,
    )


@dataclass(frozen=True)
class _Selected:
    """A run's selection: of which seed's search or draw it is, boolean L x N, the N types, the relaxed DAM if any."""

    seed: int
    mask: np.ndarray
    types: list[str]
    gamma_bar: np.ndarray | None


def _selection(run: Run, cell: Cell) -> _Selected | None:
    """From the run's file, or from the records of its cell where that is not there; None where neither is right."""
    content = run.read("selection.json")
    try:
        if content is None:
            layers = [layer for other in cell.runs.values() for layer in other["selection"]["selected"]]
            types = run.config.get("model.candidates") or sorted({name for layer in layers for name in layer})
            content = {"selected": run["selection"]["selected"], "types": types}
        types, selected = [str(name) for name in content["types"]], content["selected"]
        mask = np.array([[name in layer for name in types] for layer in selected], dtype=bool)
        gamma_bar = content.get("gamma_bar")
        relaxed = None if gamma_bar is None else _numbers(gamma_bar)
        if mask.ndim != 2 or not mask.size or (relaxed is not None and relaxed.shape != mask.shape):
            return None
        draw, seed = run.config.get("method.draw"), content.get("seed")  # with method.like a file has the run's seed
        of = next((number for number in (draw, seed) if isinstance(number, int)), run.seed)
        return _Selected(of, mask, types, relaxed)
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
        return None


def _numbers(content: Any) -> np.ndarray:
    """Lists of numbers as an array. Raises a ValueError unless all can be drawn: finite, and no larger than 1e100."""
    values = np.array(content, dtype=float)
    if not (np.abs(values) <= 1e100).all():
        raise ValueError("not all are finite")
    return values


def trajectory_charts(cell: Cell, types: Sequence[str]) -> list[Markup]:
    """The relaxed DAM over the rounds of the search: a chart for each layer, the seeds faint and their mean."""
    paths = []
    for run in cell.runs.values():
        content = run.read("trajectory.json")
        try:
            rounds, values = _numbers(content["rounds"]), _numbers(content["gamma_bar"])
        except (TypeError, KeyError, ValueError, OverflowError):
            continue
        if values.ndim == 3 and rounds.ndim == 1 and len(rounds) == len(values) > 1 and values.shape[2] == len(types):
            at = np.unique(np.linspace(0, len(rounds) - 1, MOMENTS).round().astype(int))
            paths.append((rounds[at], values[at]))
    if not paths or any(path[1].shape != paths[0][1].shape for path in paths):
        return []
    rounds, mean = paths[0][0].tolist(), np.mean([values for _, values in paths], axis=0)
    found = []
    for layer in range(mean.shape[1]):
        lines = []
        for j, name in enumerate(types):
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
