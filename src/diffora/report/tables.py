"""Runs as tables: one for each experiment, in its paper's layout, and one for each task and backbone of all others.

All else of the report is read off these: comparisons and curves, grids of text, pictures, the page.
"""

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffora.errors import UserError
from diffora.files import conf_dir, read_yaml
from diffora.report.runs import Run, differing
from diffora.report.statistics import Spread, spread

FEW = 5  # seeds, with less of which a table says so
ROWS = 60  # of a table of runs that belong to no experiment: the best of them
LISTED = 20  # items of a note
SCORES = ("validation", "held_out", "last", "train", "choice")
NO_SCORES = ("loss", "perplexity")


@dataclass(frozen=True)
class Column:
    """A task with its backbone.

    Attributes:
        name: as the experiment calls it.
        metrics: keys of a record's metrics.
        percent: whether scores are shown in per cent.
        maximise: whether more is better.
    """

    name: str
    metrics: tuple[str, ...]
    percent: bool
    maximise: bool

    @property
    def title(self) -> str:
        """The column's name and what its figures are."""
        short = [key.removeprefix("validation/").removeprefix("update/") for key in self.metrics]
        return f"{self.name}, {'/'.join(short)}"

    @property
    def compared(self) -> str:
        """The metric in which rows are compared: the first score."""
        return next((key for key in self.metrics if key.startswith("validation")), self.metrics[0])

    def factor(self, key: str) -> float:
        """What a metric's values are multiplied with to be shown."""
        part, _, name = (self.compared if key == "generalisation_gap" else key).partition("/")
        score = part.removesuffix("_mismatched") in SCORES and name not in NO_SCORES
        return 100.0 if self.percent and score else 1.0

    def held_out(self) -> tuple[str, ...]:
        """The keys of the same metrics where the epoch was chosen on other rows; none for what is no score."""
        keys = [key for key in self.metrics if key.startswith("validation/")]
        return tuple(key.replace("validation/", "held_out/", 1) for key in keys)


@dataclass
class Cell:
    """The runs of one row in one column, by seed."""

    runs: dict[int, Run]
    _numbers: dict[tuple[str, str], dict[int, float]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def first(self) -> Run:
        return self.runs[min(self.runs)]

    def by_seed(self, key: str, factor: float = 1.0) -> dict[int, float]:
        """A metric of each run that has it."""
        return {seed: factor * value for seed, value in self._values("metrics", key).items()}

    def spread(self, part: str, key: str) -> Spread | None:
        """Of any number of the records."""
        return spread(self._values(part, key).values())

    def _values(self, part: str, key: str) -> dict[int, float]:
        if (part, key) not in self._numbers:  # asked for again with every row that this one is compared with
            found = {seed: run.value(part, key) for seed, run in sorted(self.runs.items())}
            self._numbers[part, key] = {seed: value for seed, value in found.items() if value is not None}
        return self._numbers[part, key]

    @functools.cached_property
    def size(self) -> float | None:
        """Adapter parameters, the mean over the seeds."""
        found = self.spread("params", "adapter")
        return found.mean if found else None

    def span(self, key: str) -> str:
        """A count of parameters, from the least to the most."""
        values = sorted({int(v) for run in self.runs.values() if (v := run.value("params", key)) is not None})
        return " to ".join(f"{v:,}" for v in dict.fromkeys((values[0], values[-1]))) if values else ""

    @property
    def searched(self) -> bool:
        """Whether this is DiffoRA itself: modules selected by its search."""
        selector = self.first["selection"].get("selector", "search") if self.first["method"] == "diffora" else None
        return bool(selector == "search")

    @property
    def reused(self) -> bool:
        """Whether the modules were searched or scored, but in other runs than these."""
        taken = isinstance(self.first.config.get("method.selection"), str)
        return taken and self.first["selection"].get("selector") not in ("random", "given")


@dataclass
class Table:
    """Rows (methods and settings) by columns (tasks).

    Attributes:
        name: of its files.
        title: what it is.
        columns: in order.
        rows: their names, in order.
        cells: by (row, column name), where there are runs.
        paper: the paper's figures by row, as text: ``params`` and columns of its own.
        notes: what a reader has to know, doubtful runs first.
    """

    name: str
    title: str
    columns: list[Column]
    rows: list[str]
    cells: dict[tuple[str, str], Cell]
    paper: dict[str, dict[str, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def cells_of(self, row: str) -> list[Cell]:
        return [cell for cell in self.across(row) if cell is not None]

    def across(self, row: str) -> list[Cell | None]:
        """One for each column."""
        return [self.cells.get((row, column.name)) for column in self.columns]

    def same_seeds(self, column: Column) -> bool:
        """Whether the rows of a column have values of the same seeds, so that their means can be ranked."""
        here = [cell.by_seed(column.compared) for (_, name), cell in self.cells.items() if name == column.name]
        return len({frozenset(values) for values in here if values}) == 1

    @property
    def ours(self) -> list[str]:
        """The rows whose method a paper argues for: DiffoRA's, or RM-LoRA's where there are none."""
        of = {row: cells[0] for row in self.rows if (cells := self.cells_of(row))}
        found = [row for row, cell in of.items() if cell.searched]
        return found or [row for row, cell in of.items() if cell.first["method"] == "rm_lora"]

    @property
    def our_name(self) -> str:
        """What the method of `ours` is called."""
        return "DiffoRA" if any(cell.searched for row in self.ours for cell in self.cells_of(row)) else "RM-LoRA"


# --- from runs to tables ---


def tables_of(runs: Sequence[Run]) -> list[Table]:
    """Tables of all completed runs, experiments first. Of the other runs it is noted how many there are."""
    of_experiments: dict[tuple[str, str], list[Run]] = defaultdict(list)
    others: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        if all(isinstance(run[key], str) for key in ("experiment", "row", "column")):
            of_experiments[run["experiment"], str(run["scale"] or "paper")].append(run)
        else:
            others[run["task"], run["model"]].append(run)
    found = [_experiment(*key, *parts) for key in sorted(of_experiments) if (parts := _parted(of_experiments[key]))[0]]
    found += [_found(*key, *parts) for key in sorted(others) if (parts := _parted(others[key]))[0]]
    for name, again in _repeats([table.name for table in found]):
        found[again].name = f"{name}-{again}"
    return found


def _parted(runs: list[Run]) -> tuple[list[Run], list[Run]]:
    """The completed runs, and the others."""
    return [r for r in runs if r["status"] == "completed"], [r for r in runs if r["status"] != "completed"]


def _repeats(names: list[str]) -> list[tuple[str, int]]:
    """Names that occurred before, and where they do again."""
    return [(name, i) for i, name in enumerate(names) if name in names[:i]]


def _experiment(name: str, scale: str, runs: list[Run], unfinished: list[Run]) -> Table:
    """The table of ``conf/experiment/<name>.yaml``; runs of rows and columns that it has not come last."""
    notes: list[str] = []
    try:
        spec = specification(name)
        why = "" if spec else f"conf/experiment has no table {name}"
    except UserError as error:
        spec, why = None, str(error)
    if spec is None:
        notes.append(f"{why}: rows and columns as they were found, no figures of a paper")
        spec = {}
    rows = [row for row in spec.get("rows") or [] if isinstance(row, dict)]
    planned = {str(key): value or {} for key, value in ((spec.get("columns") or {}).get(scale) or {}).items()}
    row_names = list(dict.fromkeys([*(str(row.get("name")) for row in rows), *(run["row"] for run in runs)]))
    column_names = list(dict.fromkeys([*planned, *(run["column"] for run in runs)]))
    cells = _cells(runs, _place, notes)
    missing = _missing(unfinished, cells, _place)
    notes += _note("not completed", [f"{', '.join(place)}: {what}" for place, what in missing.items()])
    present = [name for name in row_names if any((name, column) in cells for column in column_names)]
    columns = []
    for column in column_names:
        here = [cell for (_, of), cell in cells.items() if of == column]
        plan = planned.get(column, {})
        percent = plan.get("percent") if plan.get("percent") is not None else spec.get("percent", False)
        if here:
            columns.append(_column(column, here, bool(percent), plan.get("metrics")))
    paper = {
        str(row["name"]): {str(key): str(value) for key, value in row["paper"].items()}
        for row in rows
        if isinstance(row.get("paper"), dict)
    }
    begun = {row for row, _ in missing}
    if absent := [name for name in row_names if name not in present and name not in begun]:
        notes.append(f"no runs yet: {'; '.join(absent)}")
    title = str(spec.get("title") or name) + (f" ({scale} scale)" if scale != "paper" else "")
    names = row_names if paper else present
    return _remarked(Table(f"{slug(name)}-{slug(scale)}", title, columns, names, cells, paper, notes))


def _place(run: Run) -> tuple[str, str]:
    """Row and column of a run of an experiment."""
    return run["row"], run["column"]


def _found(task: str, model: str, runs: list[Run], unfinished: list[Run]) -> Table:
    """The table of runs that belong to no experiment: a row for each setting, the best first."""
    notes: list[str] = []

    def place(run: Run) -> tuple[str, str]:
        return f"{run['method']}\n{run.setting}", task

    cells = _cells(runs, place, notes)
    column = _column(task, list(cells.values()), False, None)
    sign = 1 if column.maximise else -1

    def rank(cell: Cell) -> float:
        found = spread(cell.by_seed(column.metrics[0]).values())
        return sign * found.mean if found else float("-inf")

    best = sorted(cells.values(), key=rank, reverse=True)
    if len(best) > ROWS:
        notes.append(
            f"{len(best)} settings, of which the {ROWS} best are shown; all are in the list of runs. The comparisons, "
            "and the counts on top of the page, are of these alone: of the best that was run"
        )
    best = best[:ROWS]
    names = _labels(best)
    of = {(name, task): cell for name, cell in zip(names, best, strict=True)}
    missing = _missing(unfinished, cells, place)
    named = {id(cell): name for name, cell in zip(names, best, strict=True)}
    shown = {named[id(cell)]: missing[of] for of, cell in cells.items() if of in missing and id(cell) in named}
    notes += _note("not completed", [f"{name}: {what}" for name, what in shown.items()])
    if alone := missing.keys() - cells.keys():
        notes.append(f"{len(alone)} more settings have no completed run")
    return _remarked(Table(f"runs-{slug(task)}-{slug(model)}", f"{task} with {model}", [column], names, of, {}, notes))


def specification(name: str) -> dict[str, Any] | None:
    """The ``hydra.sweeper`` section of an experiment's file, or None where there is none."""
    file = conf_dir() / "experiment" / f"{name}.yaml"
    if not re.fullmatch(r"[\w.-]+", name) or not file.is_file():
        return None
    content = read_yaml(file)
    hydra = content.get("hydra") if isinstance(content, dict) else None
    section = hydra.get("sweeper") if isinstance(hydra, dict) else None
    return section if isinstance(section, dict) else None


def _cells(runs: list[Run], key: Callable[[Run], tuple[str, str]], notes: list[str]) -> dict[tuple[str, str], Cell]:
    """One run for each seed: the newest, of the setting that was run last."""
    of: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: (run.written, str(run.folder))):
        of[key(run)].append(run)
    cells, repeated = {}, 0
    for place, there in of.items():
        same = [run for run in there if run.setting == there[-1].setting]
        if len(same) < len(there):
            changed = differing([run.config for run in there]) or ["task.recipe"]
            which = ", ".join(changed[:4])
            notes.append(f"{', '.join(place)}: {len(there) - len(same)} runs of other settings ({which}) left out")
        cells[place] = Cell(dict(sorted({run.seed: run for run in same}.items())))
        repeated += len(same) - len(cells[place].runs)
    if repeated:
        notes.append(f"{repeated} runs were made again later with the same setting and seed; the later ones count")
    return cells


def _missing(
    unfinished: list[Run], cells: Mapping[tuple[str, str], Cell], key: Callable[[Run], tuple[str, str]]
) -> dict[tuple[str, str], str]:
    """What became of the seeds that have no completed run, by cell, in words."""
    last: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for run in sorted(unfinished, key=lambda run: run.written):
        place = key(run)
        if place not in cells or run.seed not in cells[place].runs:
            last[place][run.seed] = run["status"]
    return {
        place: ", ".join(
            f"{count} {'more ' * (place in cells)}seed{'s' * (count > 1)} {status}"
            for status, count in Counter(statuses.values()).items()
        )
        for place, statuses in last.items()
    }


def _note(what: str, items: Sequence[str]) -> list[str]:
    """One note for all items, or none."""
    more = f"; and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return [f"{what}: {'; '.join(items[:LISTED])}{more}"] if items else []


def _column(name: str, cells: list[Cell], percent: bool, metrics: Any) -> Column:
    first = max(cells, key=lambda cell: len(cell.runs)).first
    keys = tuple(map(str, metrics)) if isinstance(metrics, list) and metrics else (f"validation/{first.main_metric}",)
    return Column(name, keys, percent, first["maximise"] is not False)


def _labels(cells: list[Cell]) -> list[str]:
    """A name for each setting: the method, its rank, and what it differs in from the others of the method."""
    names = [""] * len(cells)
    of: dict[str, list[int]] = defaultdict(list)
    for i, cell in enumerate(cells):
        of[cell.first["method"]].append(i)
    for method, members in of.items():
        configs = [cells[i].first.config for i in members]
        keys = [key for key in differing(configs) if key != "rank"]
        for i, config in zip(members, configs, strict=True):
            parts = [method] + ([f"r = {config['rank']}"] if config.get("rank") else [])
            searches = bool(cells[i].first["selection"])
            parts += [f"{key}={config.get(key)}" for key in keys[:6] if searches or not key.startswith("search.")]
            names[i] = ", ".join(parts)
    seen: dict[str, int] = defaultdict(int)
    for i, name in enumerate(names):
        seen[name] += 1
        names[i] = name if seen[name] == 1 else f"{name} #{seen[name]}"
    return names


def _remarked(table: Table) -> Table:
    """The table with notes on what its runs do not have in common."""
    for column in table.columns:
        cells = {row: cell for row in table.rows if (cell := table.cells.get((row, column.name)))}
        data = {run["data_hash"] for cell in cells.values() for run in cell.runs.values()} - {None}
        if len(data) > 1:
            table.notes.append(f"{column.name}: the runs are on {len(data)} different versions of the data")
        counts = {row: (len(cell.by_seed(column.compared)), len(cell.runs)) for row, cell in cells.items()}
        lacking = [f"{row} ({runs - n} of {runs} runs)" for row, (n, runs) in counts.items() if n < runs]
        table.notes += _note(f"{column.name}: no finite {column.compared.partition('/')[2]}", lacking)
        sizes = sorted({n for n, _ in counts.values() if n})
        if sizes and sizes[0] < FEW:
            least = f"{sizes[0]} seed{'s' if sizes[0] > 1 else ''}"
            table.notes.append(f"{column.name}: some rows have {least} only: intervals are wide, or there are none")
        if sizes and not table.same_seeds(column):
            table.notes.append(
                f"{column.name}: the rows have different seeds: their means are not to be ranked, and none is bold; "
                "differences are over common seeds"
            )
    models = sorted({run["model"] for cell in table.cells.values() for run in cell.runs.values()})
    if table.paper:
        table.notes.append(
            f"paper: as printed, on the paper's backbone and data; all else: {', '.join(models)}, our runs"
        )
    if any("/" in figures.get("params", "") for figures in table.paper.values()):
        table.notes.append(
            "parameters, paper: trained/at inference, in [R] Table 1 with the head; our adapter is what is trained, "
            "without the head, and what it needs at inference is beside its cost"
        )
    return table


def slug(text: str) -> str:
    """A name as part of a file's."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", text)[:80].strip("-.") or "x"
