"""From runs to tables: one for each experiment, laid out as in its paper; for other runs one for each task and model.

Everything else in the report is computed from these tables: comparisons, curves, tables of text, pictures, the page.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffora.errors import UserError
from diffora.files import read_yaml
from diffora.places import conf_dir
from diffora.records import ENDED
from diffora.report.results import ResultCell, ResultColumn, ResultTable
from diffora.report.runs import Run, differing
from diffora.report.statistics import spread

FEW = 5  # a table with fewer seeds gets a note
ROWS = 60  # most rows of a table of runs that belong to no experiment: the best of them
LISTED = 20  # most items that a note lists


def tables_of(runs: Sequence[Run]) -> list[ResultTable]:
    """Tables of all completed runs, experiments first. Notes count the runs that did not complete."""
    of_experiments: dict[tuple[str, str], list[Run]] = defaultdict(list)
    others: dict[tuple[str, str, str], list[Run]] = defaultdict(list)
    metrics: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)  # of rows of one's own, one task has several
    for run in runs:
        if run.record.main_metric:
            metrics[run.record.task, run.record.model].setdefault(run.record.main_metric)
    for run in runs:
        record = run.record
        if record.experiment is not None and record.row is not None and record.column is not None:
            of_experiments[record.experiment, record.scale or "paper"].append(run)
        else:
            place = record.task, record.model
            others[*place, record.main_metric or next(iter(metrics[place]), "")].append(run)
    found = [
        _experiment(*key, *parts)
        for key in sorted(of_experiments)
        if (parts := _completed_first(of_experiments[key]))[0]
    ]
    for task, model, metric in sorted(others):
        completed, unfinished = _completed_first(others[task, model, metric])
        if completed:
            title = f"{task} with {model}" + (f", {metric}" if len(metrics[task, model]) > 1 else "")
            found.append(_found(task, model, title, completed, unfinished))
    for name, again in _repeats([table.name for table in found]):
        found[again].name = f"{name}-{again}"
    return found


def _completed_first(runs: list[Run]) -> tuple[list[Run], list[Run]]:
    """(completed runs, runs that should have been). A run with ``search_only=true`` is in neither."""
    completed = [run for run in runs if run.record.status == "completed"]
    return completed, [run for run in runs if run.record.status not in ENDED]


def _repeats(names: list[str]) -> list[tuple[str, int]]:
    """(name, index) of each name that occurred before."""
    return [(name, i) for i, name in enumerate(names) if name in names[:i]]


def _experiment(name: str, scale: str, runs: list[Run], unfinished: list[Run]) -> ResultTable:
    """The table of ``conf/experiment/<name>.yaml``; rows and columns that are not in this file come last."""
    notes: list[str] = []
    try:
        spec = specification(name)
        why = "" if spec else f"conf/experiment has no table {name}"
    except UserError as error:
        spec, why = None, str(error)
    if spec is None:
        notes.append(f"{why}: rows and columns are in the order of the runs, without figures of a paper")
        spec = {}
    rows = [row for row in spec.get("rows") or [] if isinstance(row, dict)]
    planned = {str(key): value or {} for key, value in ((spec.get("columns") or {}).get(scale) or {}).items()}
    row_names = list(dict.fromkeys([*(str(row.get("name")) for row in rows), *(_place(run)[0] for run in runs)]))
    column_names = list(dict.fromkeys([*planned, *(_place(run)[1] for run in runs)]))
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
    return with_notes(ResultTable(f"{file_name(name)}-{file_name(scale)}", title, columns, names, cells, paper, notes))


def _place(run: Run) -> tuple[str, str]:
    """(row, column) of a run of an experiment."""
    return str(run.record.row), str(run.record.column)


def _found(task: str, model: str, title: str, runs: list[Run], unfinished: list[Run]) -> ResultTable:
    """The table of runs that belong to no experiment: one row for each setting, the best first."""
    notes: list[str] = []

    def place(run: Run) -> tuple[str, str]:
        return f"{run.record.method}\n{run.setting}", task

    cells = _cells(runs, place, notes)
    column = _column(task, list(cells.values()), False, None)
    sign = 1 if column.maximise else -1

    def rank(cell: ResultCell) -> float:
        found = spread(cell.by_seed(column.metrics[0]).values())
        return sign * found.mean if found else float("-inf")

    best = sorted(cells.values(), key=rank, reverse=True)
    if len(best) > ROWS:
        notes.append(
            f"There are {len(best)} settings; the {ROWS} best are shown, and the list of runs has all. The comparisons "
            "and the counts at the top of the page include the shown settings only, which are the best that were run"
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
    name = f"runs-{file_name(task)}-{file_name(model)}"
    return with_notes(ResultTable(name, title, [column], names, of, {}, notes))


def specification(name: str) -> dict[str, Any] | None:
    """The ``hydra.sweeper`` section of an experiment's file; None if there is no such file or section."""
    file = conf_dir() / "experiment" / f"{name}.yaml"
    if not re.fullmatch(r"[\w.-]+", name) or not file.is_file():
        return None
    content = read_yaml(file)
    hydra = content.get("hydra") if isinstance(content, dict) else None
    section = hydra.get("sweeper") if isinstance(hydra, dict) else None
    return section if isinstance(section, dict) else None


def _cells(
    runs: list[Run], key: Callable[[Run], tuple[str, str]], notes: list[str]
) -> dict[tuple[str, str], ResultCell]:
    """The runs of each cell, one for each seed: of the setting that was run last, the newest run."""
    of: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: (run.written, str(run.folder))):
        of[key(run)].append(run)
    cells, repeated = {}, 0
    for place, runs_here in of.items():
        same = [run for run in runs_here if run.setting == runs_here[-1].setting]
        if len(same) < len(runs_here):
            changed = differing([run.config for run in runs_here]) or ["task.recipe"]
            which = ", ".join(changed[:4])
            left_out = len(runs_here) - len(same)
            notes.append(f"{', '.join(place)}: {left_out} runs with other settings left out (different: {which})")
        cells[place] = ResultCell(dict(sorted({run.seed: run for run in same}.items())))
        repeated += len(same) - len(cells[place].runs)
    if repeated:
        notes.append(f"{repeated} runs were repeated later with the same setting and seed; the later ones count")
    return cells


def _missing(
    unfinished: list[Run], cells: Mapping[tuple[str, str], ResultCell], key: Callable[[Run], tuple[str, str]]
) -> dict[tuple[str, str], str]:
    """How the runs of seeds without a completed run ended, by cell, in words."""
    last: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for run in sorted(unfinished, key=lambda run: run.written):
        place = key(run)
        if place not in cells or run.seed not in cells[place].runs:
            last[place][run.seed] = run.record.status
    return {
        place: ", ".join(
            f"{count} {'more ' * (place in cells)}seed{'s' * (count > 1)} {status}"
            for status, count in Counter(statuses.values()).items()
        )
        for place, statuses in last.items()
    }


def _note(what: str, items: Sequence[str]) -> list[str]:
    """One note that lists the items; none if there are no items."""
    more = f"; and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return [f"{what}: {'; '.join(items[:LISTED])}{more}"] if items else []


def _column(name: str, cells: list[ResultCell], percent: bool, metrics: Any) -> ResultColumn:
    first = max(cells, key=lambda cell: len(cell.runs)).first
    keys = tuple(map(str, metrics)) if isinstance(metrics, list) and metrics else (f"validation/{first.main_metric}",)
    return ResultColumn(name, keys, percent, first.record.metric_facts)


def _labels(cells: list[ResultCell]) -> list[str]:
    """A name for each setting: the method, its rank, and the values in which settings of the method differ."""
    names = [""] * len(cells)
    of: dict[str, list[int]] = defaultdict(list)
    for i, cell in enumerate(cells):
        of[cell.first.record.method].append(i)
    for method, members in of.items():
        configs = [cells[i].first.config for i in members]
        keys = [key for key in differing(configs) if key != "rank"]
        for i, config in zip(members, configs, strict=True):
            parts = [method] + ([f"r = {config['rank']}"] if config.get("rank") else [])
            searches = bool(cells[i].first.record.selection)
            shown = [key for key in keys[:6] if searches or not key.startswith("search.")]
            parts += [f"{key}={_value(config.get(key))}" for key in shown]
            names[i] = ", ".join(parts)
    seen: dict[str, int] = defaultdict(int)
    for i, name in enumerate(names):
        seen[name] += 1
        names[i] = name if seen[name] == 1 else f"{name} #{seen[name]}"
    return names


def _value(value: Any) -> str:
    """A setting as it is written on the command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


NOT_COMPARED = "runs on different data are not compared, and no mean is bold"


def with_notes(table: ResultTable) -> ResultTable:
    """The table with notes on the ways in which its runs cannot be compared."""
    for column in table.columns:
        cells = {row: cell for row in table.rows if (cell := table.cells.get((row, column.name)))}
        data = {run.record.data_hash for cell in cells.values() for run in cell.runs.values()} - {None}
        if len(data) > 1:
            versions = f"{column.name}: the runs used {len(data)} different versions of the data"
            table.notes.append(versions if table.same_data(column) else f"{versions}; {NOT_COMPARED}")
        counts = {row: (len(cell.by_seed(column.compared)), len(cell.runs)) for row, cell in cells.items()}
        lacking = [f"{row} ({runs - n} of {runs} runs)" for row, (n, runs) in counts.items() if n < runs]
        table.notes += _note(f"{column.name}: no finite {column.compared.partition('/')[2]}", lacking)
        sizes = sorted({n for n, _ in counts.values() if n})
        if sizes and sizes[0] < FEW:
            least = f"only {sizes[0]} seed{'s' if sizes[0] > 1 else ''}"
            table.notes.append(f"{column.name}: some rows have {least}, so intervals are wide or cannot be computed")
        if sizes and not table.same_seeds(column):
            table.notes.append(
                f"{column.name}: the rows have different seeds, so do not rank their means; none is bold. Differences "
                "use the seeds that both rows have"
            )
    table.notes += _other_settings(table)
    table.notes += _versions(table)
    models = sorted({run.record.model for cell in table.cells.values() for run in cell.runs.values()})
    if table.paper:
        table.notes.append(
            f'Columns named "paper": as printed, on the paper\'s backbone and data. All others: our runs with '
            f"{', '.join(models)}"
        )
    if any("/" in figures.get("params", "") for figures in table.paper.values()):
        table.notes.append(
            'Two numbers of parameters in the column "paper": trained / at inference, in [R] Table 1 with the head. '
            "Ours: trained parameters without the head; the number at inference is in the table of costs"
        )
    return table


def _other_settings(table: ResultTable) -> list[str]:
    """A note that names the settings outside the methods in which the rows of a column differ."""
    columns: dict[str, list[str]] = defaultdict(list)
    for column in table.columns:
        cells = [cell for row in table.rows if (cell := table.cells.get((row, column.name)))]
        outside = [
            {key: value for key, value in cell.first.config.items() if key.partition(".")[0] in OUTSIDE}
            for cell in cells
        ]
        if changed := differing(outside):
            columns[", ".join(changed[:8]) + (", …" if len(changed) > 8 else "")].append(column.name)
    return _note(
        "rows differ in more than their method", [f"{', '.join(names)}: {keys}" for keys, names in columns.items()]
    )


OUTSIDE = ("finetune", "task", "model", "trainer")
"""The sections of settings that are not the method's own."""


def _versions(table: ResultTable) -> list[str]:
    """A note on runs of several versions of the program or its libraries."""
    found: dict[str, set[str]] = defaultdict(set)
    for cell in table.cells.values():
        for run in cell.runs.values():
            for name, version in run.record.versions.items():
                found[name].add(str(version))
            if run.record.git_commit:
                found["commit"].add(run.record.git_commit[:8])
    return _note(
        "the runs are of several versions",
        [f"{name} {', '.join(sorted(versions))}" for name, versions in found.items() if len(versions) > 1],
    )


def file_name(text: str) -> str:
    """A text as part of a file's name: at most 80 letters, digits, dots and underscores, with dashes for the rest."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", text)[:80].strip("-.") or "x"
