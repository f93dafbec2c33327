"""Tables as grids of text: the papers' layout, what it cost, all comparisons."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from diffora.results.comparisons import PAIRS, Comparison, verdict
from diffora.results.statistics import Difference, Spread, spread
from diffora.results.tables import Cell, Column, Table


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
    groups += [("paper", elsewhere)] if elsewhere else []
    groups += [("", ["n"]), ("time", ["search", "total"])]
    rows = []
    for row in table.rows:
        cells, figures = table.cells_of(row), table.paper.get(row, {})
        line = [row, _several(cell.span("adapter") for cell in cells), _several(cell.span("head") for cell in cells)]
        line += [figures.get("params", "")] if sized else []
        for column, (_, labels) in zip(table.columns, groups[2:], strict=False):
            cell = table.cells.get((row, column.name))
            line.append(figures_of(cell, column, column.metrics))
            line += [figures_of(cell, column, column.held_out())] if "held_out" in labels else []
            line += [figures.get(column.name, "")] if "paper" in labels else []
        line += [figures.get(key, "") for key in elsewhere]
        line.append(_several(str(n) for n in sorted({len(cell.runs) for cell in cells})))
        line += [_several(duration(cell.spread("time", key)) for cell in cells) for key in ("search_s", "total_s")]
        rows.append(line)
    return Grid(table.title, groups, rows, table.notes)


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
                shown = [_measure(cell.spread(part, key), part) for _, part, key in used]
                rows.append(
                    [row, column.name, cell.span("adapter"), cell.span("inference"), *shown, str(len(cell.runs))]
                )
    labels = ["method", "task", "adapter parameters", "at inference", *(label for label, *_ in used), "n"]
    return Grid(f"{table.title}: cost, gap and updates", [("", labels)], rows)


def _measure(found: Spread | None, part: str) -> str:
    if found is None or part == "metrics" or not found.mean:
        return plus_minus(found, 1.0) if part == "metrics" else ""
    return f"{found.mean:.0f}" + (f" ± {found.std:.0f}" if found.std is not None else "")


def comparisons_grid(table: Table, found: Sequence[Comparison]) -> Grid:
    """Every comparison of a table."""
    rows = []
    for c in found:
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
                "" if c.ratio is None else f"{c.ratio:.2f}" + ("" if c.fair else " (unequal)"),
                str(dev.n),
            ]
        )
    labels = ["dev_best: difference (95 %)", "p", "p, Holm", "verdict"]
    groups = [
        ("", ["column", "ours", "against", *labels, "held_out: difference (95 %)", "held_out verdict"]),
        ("", ["parameters, ours/other", "n"]),
    ]
    notes = [f"only the first {PAIRS} comparisons were made"] if len(found) == PAIRS else []
    return Grid(f"{table.title}: {table.our_name} against the others", groups, rows, notes)


def figures_of(cell: Cell | None, column: Column, keys: Sequence[str]) -> str:
    """Mean ± standard deviation of each metric."""
    if cell is None:
        return ""
    found = [plus_minus(spread(cell.by_seed(key).values()), column.factor(key)) for key in keys]
    return " / ".join(found) if any(found) else ""


def plus_minus(found: Spread | None, factor: float) -> str:
    if found is None:
        return ""
    mean, digits = found.mean * factor, _digits(found.mean * factor, factor)
    return f"{mean:.{digits}f}" + (f" ± {found.std * factor:.{digits}f}" if found.std is not None else "")


def signed(found: Difference | None) -> str:
    """A difference with its interval."""
    if found is None:
        return ""
    digits = 2 if abs(found.mean) >= 0.1 else 4
    interval = f" ({found.low:+.{digits}f} to {found.high:+.{digits}f})" if found.low is not None else ""
    return f"{found.mean:+.{digits}f}{interval}"


def probability(p: float | None) -> str:
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def duration(found: Spread | None) -> str:
    """A mean time in words."""
    if found is None or not found.mean:
        return ""
    seconds = found.mean
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _digits(value: float, factor: float) -> int:
    size = abs(value)
    return 2 if factor != 1 else 4 if size < 2 else 3 if size < 10 else 2 if size < 1000 else 0


def _several(texts: Iterable[str]) -> str:
    """One text where all are the same, else each of them, in the order of the columns."""
    there = [text for text in texts if text]
    return " / ".join(there if len(set(there)) > 1 else there[:1])
