"""Charts of a metric over what it costs: the time of a step, parameters, memory, time.

A row is on the front of a chart if no other row is as good and cheaper, or better at the same cost.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from diffora.report import charts
from diffora.report.charts import LINES, Line
from diffora.report.results import ResultCell, ResultColumn, ResultTable
from diffora.report.runs import Run
from diffora.report.statistics import Spread, spread

Costs = tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
COSTS: Costs = (
    ("adapter parameters", (("params", "adapter"),)),
    ("peak GPU memory, MB", (("memory", "peak_cuda_mb"),)),
    ("peak memory, MB", (("memory", "peak_rss_mb"),)),
    ("search and fine-tuning, s", (("time", "search_s"), ("time", "finetune_s"))),
)
"""Name of each cost, and the numbers of a record that it adds up."""
FRONT = 6 + charts.COLOURS
"""Colour of the line through the front: grey and dashed."""
ALIKE = 1.25
"""Up to this ratio of the largest to the smallest cost, rows cost the same, and no chart compares them."""
WIDE = 20.0
"""From this ratio of the largest to the smallest cost on, the axis is logarithmic."""


@dataclass(frozen=True)
class Point:
    """A row of a table in one of its columns: what it costs, and its metric."""

    row: str
    cost: float
    metric: Spread


@dataclass(frozen=True)
class Fronts:
    """The charts of a table, and a key to the rows that are on a front.

    Attributes:
        charts: title and chart for each column and cost.
        key: (number in the charts, name of the row).
        colours: (number of the colour, what its points are).
    """

    charts: list[tuple[str, Markup]]
    key: list[tuple[str, str]]
    colours: list[tuple[int, str]]


def time_charts(table: ResultTable) -> tuple[list[tuple[str, Markup]], list[tuple[int, str]], str]:
    """The metric over the mean time of a training step: a point for each row, labelled with its adapter parameters.

    Returns:
        (a chart for each column in which two rows have times, a legend of methods and selectors, a note)
    """
    cut = 0
    found, methods = [], list(dict.fromkeys(kind_of(cell.first) for _, cell in table.shown()))
    for column in table.columns:
        key = column.compared
        lines: list[Line] = []
        for (row, name), cell in table.shown():
            metric, step = spread(cell.by_seed(key, column.factor(key)).values()), cell.spread("time", "step_s")
            if name == column.name and metric and step:
                point, bar = (1000 * step.mean, metric.mean), metric.std or 0.0
                colour = methods.index(kind_of(cell.first))
                lines.append(Line(row, colour, [point], [bar], label=short_number(cell.size or 0)))
        cut += max(0, len(lines) - LINES)
        if len(lines) > 1:
            chart = charts.line_chart(lines[:LINES], "a training step, ms", column.title, marks=True, round_ticks=True)
            found.append((column.title, chart))
    return found, list(enumerate(methods)) if found else [], f"{cut} more settings not drawn" if cut else ""


def kind_of(run: Run) -> str:
    """The method of a run, with its selector if that is not the method's usual one."""
    selector = run.record.selection.get("selector", "search")
    usual = selector in ("search", "random", "given", "none")
    return run.record.method if usual else f"{run.record.method}, {selector}"


def short_number(value: float) -> str:
    """A number of parameters in few characters: 950, 12.3k, 1.32M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


def front(points: Sequence[Point], maximise: bool) -> list[Point]:
    """The points that no other point beats, the cheapest first.

    A point is beaten if another one costs no more and is no worse, and is better in one of the two.
    """
    sign = 1 if maximise else -1

    def beats(a: Point, b: Point) -> bool:
        better, cheaper = sign * a.metric.mean - sign * b.metric.mean, b.cost - a.cost
        return better >= 0 and cheaper >= 0 and (better > 0 or cheaper > 0)

    return sorted((p for p in points if not any(beats(other, p) for other in points)), key=lambda p: p.cost)


def fronts(table: ResultTable) -> Fronts:
    """A chart for each column and each cost in which rows differ; methods and selectors have their colours.

    The metrics are means over the seeds that all rows have. A column without such seeds, or whose runs used different
    data, has no chart.
    """
    kinds = {row: kind_of(cell.first) for (row, _), cell in table.shown()}
    names = list(dict.fromkeys(kinds.values()))
    found, used = [], set()
    for column in filter(table.same_data, table.columns):
        for cost, points in _points(table, column):
            best = front(points, column.maximise)
            used |= {point.row for point in best}
            metric = column.compared + (", %" if column.factor(column.compared) != 1 else "")
            chart = _chart(points, best, cost, metric, [names.index(kinds[p.row]) for p in points], table.rows)
            found.append((f"{column.name}: {metric} over {cost}", chart))
    key = [(_number(table.rows, row), row) for row in table.rows if row in used]
    return Fronts(found, key, list(enumerate(names)) if found else [])


def _points(table: ResultTable, column: ResultColumn) -> Iterator[tuple[str, list[Point]]]:
    """(name of the cost, its points) for each cost in which at least three rows differ, by more than `ALIKE` in all.

    On a CPU, most of the memory is that of the libraries, and the rest depends on the runs before in the same process.
    """
    key = column.compared
    cells = {row: cell for row in table.rows if (cell := table.cells.get((row, column.name)))}
    values = {row: found for row, cell in cells.items() if (found := cell.by_seed(key, column.factor(key)))}
    common = set.intersection(*map(set, values.values())) if values else set()  # means of other seeds have no order
    metrics = {row: spread(found[seed] for seed in common) for row, found in values.items()}
    has_gpu = any(cell.spread("memory", "peak_cuda_mb") for cell in cells.values())
    for name, parts in COSTS:
        if name == "peak memory, MB" and has_gpu:
            continue
        points = [
            Point(row, cost, metric)
            for row, cell in cells.items()
            if (metric := metrics.get(row)) and (cost := _cost(cell, parts)) is not None
        ]
        costs = {point.cost for point in points}
        if len(costs) > 2 and max(costs) > ALIKE * min(costs):
            yield name, points


def _cost(cell: ResultCell, parts: Iterable[tuple[str, str]]) -> float | None:
    """The sum of some means over the seeds; None if it is unknown, also for runs whose search other runs did."""
    values = [cell.spread(*part) for part in parts]
    if any(value is None for value in values) or (cell.reused and ("time", "search_s") in parts):
        return None
    return sum(value.mean for value in values if value) or None


def _chart(
    points: Sequence[Point],
    best: Sequence[Point],
    cost: str,
    metric: str,
    colours: Sequence[int],
    rows: Sequence[str],
) -> Markup:
    lines = [Line("front", FRONT, [(p.cost, p.metric.mean) for p in best])]
    for point, colour in zip(points, colours, strict=True):
        label = _number(rows, point.row) if point in best else ""
        at = [(point.cost, point.metric.mean)]
        lines.append(Line(point.row, colour, at, [point.metric.std or 0.0], label=label))
    costs = [point.cost for point in points]
    log_x = min(costs) > 0 and max(costs) > WIDE * min(costs)
    return charts.line_chart(lines, cost, metric, marks=True, round_ticks=True, log_x=log_x)


def _number(rows: Sequence[str], row: str) -> str:
    return str(rows.index(row) + 1)
