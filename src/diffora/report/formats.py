"""Tables of text as Markdown, LaTeX (booktabs) and CSV, and the numbers behind them as CSV."""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence

from diffora.report.comparisons import Comparison
from diffora.report.layout import MEASURES, SortableText, TextTable
from diffora.report.results import ResultTable
from diffora.report.statistics import Difference, equivalence, verdict

FORMULA = tuple("=+-@\t\r\n\N{FULLWIDTH EQUALS SIGN}\N{FULLWIDTH PLUS SIGN}"
                "\N{FULLWIDTH HYPHEN-MINUS}\N{FULLWIDTH COMMERCIAL AT}")  # fmt: skip
"""A spreadsheet computes texts that begin with one of these."""
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)

LATEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "[": "{[}",  # directly after the end of a row, [ and * would be arguments of it
    "*": "{*}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
    "\N{MINUS SIGN}": "$-$",
    "\N{EN DASH}": "--",
    "\N{GREEK SMALL LETTER RHO}": r"$\rho$",
    "\N{GREEK SMALL LETTER LAMDA}": r"$\lambda$",
    "\N{GREEK CAPITAL LETTER DELTA}": r"$\Delta$",
    "\N{GREEK SMALL LETTER SIGMA}": r"$\sigma$",
    "\N{SUBSCRIPT ONE}": "$_1$",
}


def markdown(table: TextTable) -> str:
    """A Markdown table with its title and notes."""
    lines = [f"### {_md(table.title)}", "", _pipes(map(_md, table.head)), "|" + "---|" * len(table.head)]
    lines += [_pipes(map(_md, row)) for row in table.rows]
    if table.notes:
        lines += ["", *(f"- {_md(note)}" for note in table.notes)]
    return "\n".join(lines) + "\n"


def latex(table: TextTable) -> str:
    """A LaTeX ``table`` environment; it needs the package booktabs."""
    n = len(table.head)
    groups = [rf"\multicolumn{{{len(labels)}}}{{c}}{{{_tex(name)}}}" for name, labels in table.groups]
    lines = [
        r"\begin{table}",
        rf"\caption{{{_tex(table.title)}}}",
        rf"\begin{{tabular}}{{l{'r' * (n - 1)}}}",
        r"\toprule",
        *([" & ".join(groups) + r" \\"] if any(name for name, _ in table.groups) else []),
        " & ".join(_tex(label) for _, labels in table.groups for label in labels) + r" \\",
        r"\midrule",
        *(" & ".join(map(_tex, row)) + r" \\" for row in table.rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def comma_separated(table: TextTable) -> str:
    """CSV with one line of column names."""
    return csv_of([table.head, *table.rows])


def comparisons_csv(found: Iterable[Comparison]) -> str:
    """All comparisons as CSV: differences and intervals, in the units of the table."""
    return _dicts_csv(
        {
            "column": c.column.name,
            "metric": c.column.compared,
            "ours": c.ours,
            "against": c.baseline,
            "against is ours": c.variant,
            **_difference_fields("difference", c.dev_best, c.margin),
            "p, Holm": c.p_holm,
            "margin": c.margin,
            **_difference_fields("held_out", c.held_out, c.margin),
            "parameters, ours/other": c.ratio,
            "about equal size": c.fair,
        }
        for c in found
    )


def _difference_fields(name: str, found: Difference | None, margin: float | None) -> dict[str, object]:
    fields = ("mean", "low", "high", "p", "n", "detectable")
    p = None if found is None or margin is None else equivalence(found, margin)
    return {f"{name} {field}": getattr(found, field, None) for field in fields} | {
        f"{name} p of equivalence": p,
        f"{name} verdict": verdict(found, margin),
    }


def costs_csv(table: ResultTable) -> str:
    """Mean and standard deviation of times, memory, gap and updates as CSV, in the units of the table."""
    lines = []
    for column in table.columns:
        for row in table.rows:
            if (cell := table.cells.get((row, column.name))) is None:
                continue
            line: dict[str, object] = {"method": row, "task": column.name, "runs": len(cell.runs)}
            sizes = [("adapter parameters", "params", "adapter"), ("at inference", "params", "inference")]
            for label, part, key in (*sizes, *MEASURES):
                found = None if key == "search_s" and cell.reused else cell.spread(part, key)
                factor = column.factor(key)
                line[label] = found and found.mean * factor
                line[f"{label}: std"] = None if found is None or found.std is None else found.std * factor
            lines.append(line)
    return _dicts_csv(lines)


def _dicts_csv(lines: Iterable[Mapping[str, object]]) -> str:
    """CSV of at least one line; all lines have the same keys."""
    lines = list(lines)
    return csv_of([list(lines[0]), *(list(line.values()) for line in lines)])


def csv_of(rows: Iterable[Sequence[object]]) -> str:
    """Rows as CSV. Text that a spreadsheet would compute gets an apostrophe in front, so that it is shown."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([_shown(cell) for cell in row] for row in rows)
    return out.getvalue()


def _shown(cell: object) -> object:
    if cell is None or isinstance(cell, bool | int | float | SortableText):
        return cell
    text = str(cell)
    if text.lstrip(" ").startswith(FORMULA) and not NUMBER.fullmatch(text):
        text = f"'{text}"
    return text.replace("\r\n", "\n").replace("\r", "\n")  # some readers end a row at a lone \r


def _pipes(cells: object) -> str:
    return f"| {' | '.join(cells)} |"  # type: ignore[arg-type]


def _md(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|~#])", r"\\\1", " ".join(text.split()))


def _tex(text: str) -> str:
    return "".join(LATEX.get(char, char) for char in " ".join(text.split()))
