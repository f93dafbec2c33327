"""The runs of a sweep: rows x columns x seeds of an experiment's table, or every combination of values.

`hydra_plugins.diffora_table` starts them. The tables are files in ``conf/experiment/``.
"""

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, product
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from diffora.errors import UserError
from diffora.settings.quotes import quoted

MOST_RUNS = 10_000


@dataclass
class Row:
    """A row of a table: a method and its settings."""

    name: str = ""
    set: list[str] = field(default_factory=list)  # overrides; they win over the column's
    small: list[str] | None = None  # used instead at scale=small
    columns: dict[str, list[str]] = field(default_factory=dict)  # more overrides, by column
    like: str | None = None  # draw selections as large as those of this row, column by column and seed by seed
    paper: dict[str, Any] | None = None  # the paper's figures: params, and one for each column; null: a control


@dataclass
class Column:
    """A column of a table: a task and its backbone."""

    set: list[str] = field(default_factory=list)
    metrics: list[str] | None = None  # the metrics of the paper's figures; null: the main one on validation rows
    percent: bool | None = None  # overrides the table's


@dataclass
class Table:
    """The ``hydra.sweeper`` section of an experiment, with seeds and columns for each scale."""

    _target_: str = "hydra_plugins.diffora_table.TableSweeper"
    title: str | None = None
    percent: bool = False  # the paper's figures are in percent; our metrics are shares
    seeds: dict[str, list[int]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    columns: dict[str, dict[str, Column]] = field(default_factory=dict)


def table_of(node: DictConfig) -> Table:
    """The table in a composed configuration. Each run resolves the interpolations in its overrides."""
    content: Any = OmegaConf.to_container(node, resolve=False)
    rows = [Row(**row) for row in content.pop("rows", [])]
    columns = {
        scale: {name: Column(**column) for name, column in named.items()}
        for scale, named in content.pop("columns", {}).items()
    }
    return Table(**content, rows=rows, columns=columns)


def parse(overrides: Sequence[str], config_loader: Any = None) -> list[Override]:
    """Overrides as Hydra reads them."""
    return OverridesParser.create(config_loader=config_loader).parse_overrides(list(overrides))


def values(override: Override) -> list[str]:
    """The values that an override gives its key, each as it is written."""
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    if not override.is_discrete_sweep():
        raise UserError(f"{override.input_line} is not a list of values: it needs hydra/sweeper=optuna")
    try:
        found = list(islice(override.sweep_string_iterator(), MOST_RUNS + 1))
    except (ValueError, OverflowError) as error:  # range() with a step of 0, or to infinity
        raise UserError(f"{override.input_line}: {error}") from error
    if not found:
        raise UserError(f"{override.input_line} gives no value, so there is nothing to run")
    if len(found) > MOST_RUNS:
        raise UserError(
            f"{override.input_line} gives more than {MOST_RUNS:,} values; a sweep has at most that many runs"
        )
    return found


def combinations(given: Iterable[Override]) -> list[tuple[str, ...]]:
    """The overrides of each run of a plain sweep: every combination of the values given."""
    lines = {o.get_key_element(): [_line(o, value) for value in values(o)] for o in given}
    if (number := math.prod(map(len, lines.values()))) > MOST_RUNS:
        raise UserError(f"this sweep would have {number:,} runs; it must have at most {MOST_RUNS:,}")
    return list(product(*lines.values()))


def cells(
    given: Sequence[Override], table: Table, experiment: str, scale: str, place: Path = Path()
) -> dict[str, tuple[str, ...]]:
    """The overrides of a table's runs, by the names of their folders: for each seed, row and column.

    The user's overrides replace those of the table. ``task=`` replaces all columns: a column of the table with this
    task keeps its settings, another task gets those that all columns have. ``method=`` replaces all rows, ``seed=`` the
    seeds. ``cell.row=`` and ``cell.column=`` choose some of the rows and columns.

    Args:
        place: the folder of the sweep. A row with ``like`` reads its selections from there.

    Raises:
        UserError: a row or column that does not exist, several values for another key, a task without a backbone, a
            recipe in place of a row's own, or a row with ``like`` without the row that it is like.
    """
    by_key = {o.key_or_group: o for o in given}
    rows, columns = list(table.rows), dict(table.columns.get(scale, {}))
    seeds = list(map(str, table.seeds.get(scale, [])))
    if "method" in by_key:
        rows = [Row(name=method, set=[f"method={method}"]) for method in values(by_key.pop("method"))]
    if "task" in by_key:
        tasks = values(by_key.pop("task"))
        columns = {
            name: column for task in tasks for name, column in _of_task(task, columns, "model" in by_key).items()
        }
    if "seed" in by_key:
        seeds = values(by_key.pop("seed"))
    if "cell.row" in by_key:
        rows = _chosen(by_key.pop("cell.row"), {row.name: row for row in rows})
    if "cell.column" in by_key:
        columns = dict(_chosen(by_key.pop("cell.column"), {item[0]: item for item in columns.items()}))
    others = {}
    for key, override in by_key.items():
        value, *more = values(override)
        if more:
            raise UserError(
                f"{override.input_line}: experiment={experiment} already varies rows, columns and seeds; only "
                "method=, task=, seed=, cell.row= and cell.column= may have several values"
            )
        others[key] = _line(override, value)
    if not (rows and columns and seeds):
        raise UserError(f"experiment={experiment} has no runs at scale={scale}")

    found: dict[str, tuple[str, ...]] = {}
    for seed, row, (name, column) in product(seeds, rows, columns.items()):
        of_row = row.small if scale == "small" and row.small is not None else row.set
        lines = {o.key_or_group: o.input_line for o in parse([*column.set, *of_row, *row.columns.get(name, [])])}
        if "recipe" in others and "recipe" in lines:
            raise UserError(f"{others['recipe']}: the row '{row.name}' has {lines['recipe']}, which it would replace")
        if others.get("debug") == "debug=fast":  # whose numbers are smaller
            lines = {key: line for key, line in lines.items() if key not in ("finetune.epochs", "task.max_train_rows")}
        lines |= others
        lines |= {"experiment": f"experiment={experiment}", "seed": f"seed={seed}"}
        lines |= {f"cell.{key}": f"cell.{key}={quoted(text)}" for key, text in (("row", row.name), ("column", name))}
        lines["cell.experiment"] = f"cell.experiment={experiment}"
        folder, pattern = (f"{slug(which)}-{slug(name)}-seed{seed}" for which in (row.name, row.like or ""))
        if row.like is not None:
            file = place / pattern / "selection.json"
            if row.like not in {other.name for other in rows} and not file.is_file():
                raise UserError(
                    f"the row '{row.name}' needs the selections of '{row.like}', and {place} has none for column "
                    f"{name} and seed {seed}: choose that row, too"
                )
            lines["method.like"] = f"method.like={quoted(file)}"
        if folder in found:
            raise UserError(f"experiment={experiment}: two rows or columns have the same folder, {folder}")
        found[folder] = tuple(filter(None, lines.values()))
    return found


def _of_task(task: str, columns: Mapping[str, Column], has_model: bool) -> dict[str, Column]:
    """The columns of a task: those of the table; for another task, one with the settings that all columns have.

    Args:
        has_model: whether the user names a backbone for all columns.

    Raises:
        UserError: another task, for which the columns have several backbones.
    """
    if present := {name: column for name, column in columns.items() if f"task={task}" in column.set}:
        return present
    models = {line for column in columns.values() for line in column.set if line.startswith("model=")}
    if len(models) > 1 and not has_model:
        raise UserError(
            f"task={task} is no column of this table, whose columns have {', '.join(sorted(models))}: add model="
        )
    first = next(iter(columns.values()), Column())
    every = [line for line in first.set if all(line in column.set for column in columns.values())]
    return {task: Column(set=[f"task={task}", *every])}


def _line(override: Override, value: str) -> str:
    if override.is_delete():
        assert override.input_line is not None
        return override.input_line
    return f"{override.get_key_element()}={value}"


def _chosen(override: Override, known: dict[str, Any]) -> list[Any]:
    names = [_plain(value) for value in values(override)]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{override.key_or_group}={', '.join(unknown)} is not one of: {'; '.join(known)}")
    return [known[name] for name in names]


def _plain(value: str) -> str:
    """A value without quotes and escapes."""
    return str(parse([f"key={value}"])[0].value())


def slug(text: str) -> str:
    """A name as part of a folder's name: lower-case letters, digits and dots; anything else becomes a dash."""
    spelt = text.lower().replace("\N{GREEK SMALL LETTER RHO}", "rho")
    ascii_only = unicodedata.normalize("NFKD", spelt).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9._]+", "-", ascii_only).strip("-.")
