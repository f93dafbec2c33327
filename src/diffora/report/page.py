"""The files of a report: one HTML page that needs no server and no network, and its tables as text."""

import json
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from diffora import __version__
from diffora.errors import UserError, called
from diffora.files import write_text
from diffora.records import ENDED
from diffora.report.comparisons import MARGIN, Comparison, comparisons_of
from diffora.report.formats import comma_separated, comparisons_csv, costs_csv, csv_of, latex, markdown
from diffora.report.layout import detectable, duration, plus_minus, probability, search_time, signed
from diffora.report.pictures import SEEDS, View
from diffora.report.results import ResultColumn, ResultTable
from diffora.report.runs import Gathered, Run
from diffora.report.statistics import Spread, spread
from diffora.report.tables import FEW, tables_of

CHARTED = 30  # most tables with training curves
PICTURED = 60  # most settings with pictures of their selections
PROBLEMS = 500  # most failed runs and unreadable files in the list


def write(gathered: Gathered, output: Path, folders: Sequence[Path], margin: float = MARGIN) -> list[Path]:
    """Write the report of the runs to a folder. Returns the written files, the page first.

    Args:
        margin: differences below this many points do not matter (`diffora.report.statistics.equivalence`).

    Raises:
        UserError: no run can be read, or the folder has such files that are not an earlier report's.
    """
    if gathered.broken and not gathered.runs:
        path, why = gathered.broken[0]
        raise UserError(f"no run can be read; {path}: {why}")
    check_output(output)
    tables = tables_of(gathered.runs)
    found = {table.name: comparisons_of(table, margin) for table in tables}
    views = views_of(tables, found)
    files = [output / "index.html"]
    for table, view in zip(tables, views, strict=True):
        texts = [text for text in (view.main, view.measures, view.comparisons, view.agreement) if text]
        place = output / "tables" / table.name
        for suffix, form in ((".md", markdown), (".tex", latex)):
            files.append(place.with_name(place.name + suffix))
            write_text(files[-1], "\n".join(map(form, texts)))
        numbers = {"": comma_separated(texts[0]), "-cost": costs_csv(table)}
        numbers |= {"-comparisons": comparisons_csv(found[table.name])} if found[table.name] else {}
        if view.agreement is not None:
            numbers["-agreement"] = comma_separated(view.agreement)
        for kind, text in numbers.items():
            files.append(place.with_name(f"{place.name}{kind}.csv"))
            write_text(files[-1], text)
    files.append(output / "runs.csv")
    write_text(files[-1], runs_csv(gathered.runs))
    outdated = _tables_of_page(files[0]) - set(files)
    write_text(files[0], page(gathered, views, found, folders, margin))
    for file in outdated:
        file.unlink(missing_ok=True)
    return files


def check_output(output: Path) -> None:
    """Refuse a folder with files of somebody else in the places of the report's."""
    page = output / "index.html"
    if not _own_text(page) and (others := [file for file in (page, output / "runs.csv") if file.exists()]):
        raise UserError(f"output={output} has {others[0].name}, which no report wrote: choose another folder")


def _own_text(page: Path) -> str:
    """The text of a page that a report wrote; empty for every other file."""
    text = page.read_text(encoding="utf-8", errors="replace") if page.is_file() else ""
    return text if 'content="diffora' in text else ""


def _tables_of_page(page: Path) -> set[Path]:
    """The table files that belong to an earlier report's page."""
    names = re.findall(r'href="tables/([\w.-]+)\.md"', _own_text(page))
    ends = (".md", ".tex", ".csv", "-cost.csv", "-comparisons.csv", "-agreement.csv")
    return {page.parent / "tables" / f"{name}{end}" for name in names for end in ends}


def views_of(tables: Sequence[ResultTable], found: Mapping[str, Sequence[Comparison]]) -> list[View]:
    """What the page shows of each table; only the first `CHARTED` tables and `PICTURED` settings have all pictures."""
    views: list[View] = []
    for i, table in enumerate(tables):
        pictures = PICTURED - sum(len(view.dams) for view in views)
        views.append(View(table, found[table.name], charted=i < CHARTED, pictures=pictures))
    return views


def page(
    gathered: Gathered,
    views: Sequence[View],
    found: Mapping[str, Sequence[Comparison]],
    folders: Sequence[Path],
    margin: float,
) -> str:
    """The HTML page."""
    tables = [view.table for view in views]
    pictured = sum(len(view.dams) for view in views)
    left_out = sum(view.dams_left_out for view in views)
    remarks = []
    if left_out:
        remarks.append(f"Selections are drawn for {pictured} settings; {left_out} more are not drawn.")
    if len(tables) > CHARTED:
        remarks.append(f"Training curves are drawn for the first {CHARTED} of {len(tables)} tables.")
    only_selected = sum(run.record.status == "selected" for run in gathered.runs)
    if only_selected:
        remarks.append(
            f"Runs that ended with their selection (search_only=true): {only_selected}. They have no results. They are "
            "in the list of runs, and their selections are in their folders: selection.json and dam.png."
        )
    unfinished = [run for run in gathered.runs if run.record.status not in ENDED]
    problems = [(_short(run.folder), run.record.status, run.record.error or "") for run in unfinished]
    problems += [(_short(file), "unreadable", reason) for file, reason in gathered.broken]
    if len(problems) > PROBLEMS:
        remarks.append(f"The first {PROBLEMS} of {len(problems)} failed, unfinished or unreadable runs are listed.")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("report.html.jinja").render(
        version=__version__,
        made=time.strftime("%Y-%m-%d %H:%M"),
        folders=[str(folder) for folder in folders],
        n_completed=len(gathered.runs) - len(unfinished) - only_selected,
        tallies=tallies(tables, found),
        glance=glance(tables, found),
        views=views,
        problems=problems[:PROBLEMS],
        n_problems=len(problems),
        remarks=remarks,
        runs=_script_safe(runs_listed(gathered.runs)),
        few=FEW,
        margin=f"{margin:g}",
        n_seeds=SEEDS,
    )


# --- the first screen ---


def tallies(tables: Sequence[ResultTable], found: Mapping[str, Sequence[Comparison]]) -> list[dict[str, Any]]:
    """How often each of our methods is better than baselines, worse, or neither; for equal and for any sizes."""
    of: dict[str, list[Comparison]] = defaultdict(list)
    for table in tables:
        of[table.our_name] += [c for c in found[table.name] if not c.variant]
    counted: list[dict[str, Any]] = []
    for name, every in of.items():
        if not every:
            continue
        for size, some in (("about equal size", [c for c in every if c.fair]), ("any size", every)):
            verdicts = Counter(c.verdict for c in some)
            held_out = Counter(c.held_out_verdict for c in some)
            kept = [c.dev_best.mean for c in some if c.p_holm is not None and c.p_holm < 0.05]
            counted.append(
                {
                    "name": name,
                    "size": size,
                    "n": len(some),
                    "counts": verdicts,
                    "held_out": held_out,
                    "kept": sum(mean > 0 for mean in kept),
                    "lost": sum(mean < 0 for mean in kept),
                }
            )
    return counted


def glance(tables: Sequence[ResultTable], found: Mapping[str, Sequence[Comparison]]) -> list[dict[str, Any]]:
    """For each column of each table: our best row against the best baseline."""
    lines = []
    for table in tables:
        our_rows = set(table.ours)
        for column in table.columns:
            key = column.compared
            sign = 1 if column.maximise else -1
            means = {
                row: s
                for row in table.rows
                if (cell := table.cells.get((row, column.name))) and (s := spread(cell.by_seed(key).values()))
            }
            if not means:
                continue
            order = sorted(means, key=lambda row: -sign * means[row].mean)
            ours = next((row for row in order if row in our_rows), None)
            others = [row for row in order if row not in our_rows and not (ours and _apart(table, column, ours, row))]
            baseline = next(iter(others), None)
            compared = [c for c in found[table.name] if (c.column, c.ours, c.baseline) == (column, ours, baseline)]
            lines.append(
                {
                    "table": table,
                    "column": column.title,
                    "ours": ours and _named(table, column, ours, means[ours], key),
                    "baseline": baseline and _named(table, column, baseline, means[baseline], key),
                    "chosen": sum(row in means for row in our_rows),
                    "comparison": compared[0] if compared else None,
                    "common": _common_means(table, compared[0]) if compared else "",
                    "p": probability(compared[0].dev_best.p) if compared else "",
                    "difference": signed(compared[0].dev_best) if compared else "",
                    "verdict": compared[0].told(compared[0].verdict) if compared else "",
                    "detectable": detectable(compared[0].dev_best) if compared else "",
                    "held_out": compared[0].told(compared[0].held_out_verdict)
                    if compared and compared[0].held_out
                    else "",
                }
            )
    return lines


def _apart(table: ResultTable, column: ResultColumn, ours: str, other: str) -> bool:
    """Whether two rows have seeds in common, but all of them with other data."""
    a, b = (table.cells[row, column.name] for row in (ours, other))
    common = a.runs.keys() & b.runs.keys()
    return bool(common) and a.seeds_of_other_data(b) == common


def _common_means(table: ResultTable, c: Comparison) -> str:
    """Both means over the seeds of a comparison, as text; empty if neither row has other seeds."""
    key = c.column.compared
    a, b = (table.cells[row, c.column.name] for row in (c.ours, c.baseline))
    values = [cell.by_seed(key) for cell in (a, b)]
    common = (values[0].keys() & values[1].keys()) - a.seeds_of_other_data(b)
    if values[0].keys() == values[1].keys() == common:
        return ""
    means = [spread(of[seed] for seed in common) for of in values]
    return " and ".join(plus_minus(mean, c.column.factor(key)) for mean in means)


def _named(table: ResultTable, column: ResultColumn, row: str, mean: Spread, key: str) -> dict[str, str]:
    cell = table.cells[row, column.name]
    return {
        "row": row,
        "mean": plus_minus(mean, column.factor(key)),
        "n": str(mean.n),
        "parameters": cell.span("adapter"),
        "search": search_time(cell),
        "total": duration(cell.spread("time", "total_s")),
    }


# --- all runs ---


def runs_listed(runs: Sequence[Run]) -> dict[str, Any]:
    """All runs as columns and rows, for the page's script."""
    rows = []
    for run in runs:
        record = run.record
        part = record.experiment or ""
        setting = f"{record.row}, {record.column}" if part else record.method
        if not part:
            dials = {"r": run.config.get("rank"), "rho": run.config.get("rho")} if len(runs) <= 5000 else {}
            setting += "".join(f", {name} = {value}" for name, value in dials.items() if value is not None)
        rows.append(
            {
                "table": part + (" (small)" if record.scale == "small" else ""),
                "setting": setting,
                "task": record.task,
                "model": record.model,
                "seed": run.seed,
                "status": record.status,
                "dev_best": _rounded(run.metric(f"validation/{run.main_metric}")),
                "held_out": _rounded(run.metric(f"held_out/{run.main_metric}")),
                "adapter": run.value("params", "adapter"),
                "search, s": _rounded(run.value("time", "search_s"), 1),
                "total, s": _rounded(run.value("time", "total_s"), 1),
                "folder": _short(run.folder),
            }
        )
    return {"columns": list(rows[0]) if rows else [], "rows": [list(row.values()) for row in rows]}


def runs_csv(runs: Sequence[Run]) -> str:
    """CSV of all runs with all their numbers, for further calculations."""
    parts = ("metrics", "params", "time", "memory")
    names = {part: sorted({key for run in runs for key in getattr(run.record, part)}) for part in parts}
    own = (
        "experiment",
        "scale",
        "row",
        "column",
        "method",
        "task",
        "model",
        "seed",
        "status",
        "config_hash",
        "data_hash",
    )
    numbers = [(part, key) for part in parts for key in names[part]]
    head = [*own, *(key if part == "metrics" else f"{part}/{key}" for part, key in numbers), "folder"]
    rows = (
        [
            *(getattr(run.record, key) for key in own),
            *(getattr(run.record, part).get(key) for part, key in numbers),
            _short(run.folder),
        ]
        for run in runs
    )
    return csv_of([head, *rows])


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else round(value, digits)


def _short(path: Path) -> str:
    """A path, relative to the current folder if it is below it."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _script_safe(content: object) -> Markup:
    """The content as JSON that cannot end a script element, for any names in it."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def request(arguments: Sequence[str]) -> tuple[list[Path], Path, float]:
    """(folders of runs, folder of the report, margin in points) from the arguments of ``report``.

    Raises:
        UserError: names every argument that is wrong.
    """
    folders, output, margin, problems = [], Path("outputs/report"), MARGIN, []
    for argument in arguments:
        key, given, value = argument.partition("=")
        if not argument.strip():
            problems.append("an argument is empty: give the folder of a run or sweep")
        elif not given or Path(argument).is_dir():
            folders.append(Path(argument).expanduser())
        elif key == "output" and value:
            output = Path(value).expanduser()
        elif key == "margin":
            try:
                margin = float(value)
            except ValueError:
                margin = 0.0
            if not 0 < margin < 100:
                problems.append(f"margin={value} must be a number of points between 0 and 100, such as {MARGIN}")
        else:
            problems.append(
                f"{argument}: a report takes folders of runs, output=<folder> and margin=<points>, nothing else"
            )
    if not folders and not problems:
        problems.append(f"no folder of runs given: {called('report')} outputs output=<folder>")
    if output.exists() and not output.is_dir():
        problems.append(f"output={output} is not a folder")
    if problems:
        raise UserError(problems)
    return folders, output, margin
