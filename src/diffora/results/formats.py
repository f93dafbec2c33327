"""Grids of text as Markdown, LaTeX (booktabs) and CSV."""

import csv
import io
import re

from diffora.results.grids import Grid

LATEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
    "\N{MINUS SIGN}": "$-$",
    "\N{GREEK SMALL LETTER RHO}": r"$\rho$",
    "\N{GREEK SMALL LETTER LAMDA}": r"$\lambda$",
    "\N{GREEK CAPITAL LETTER DELTA}": r"$\Delta$",
}


def markdown(grid: Grid) -> str:
    """A pipe table under its title."""
    lines = [f"### {_md(grid.title)}", "", _pipes(map(_md, grid.head)), "|" + "---|" * len(grid.head)]
    lines += [_pipes(map(_md, row)) for row in grid.rows]
    if grid.notes:
        lines += ["", *(f"- {_md(note)}" for note in grid.notes)]
    return "\n".join(lines) + "\n"


def latex(grid: Grid) -> str:
    """A ``table`` environment that needs the package booktabs."""
    n = len(grid.head)
    groups = [rf"\multicolumn{{{len(labels)}}}{{c}}{{{_tex(name)}}}" for name, labels in grid.groups]
    lines = [
        r"\begin{table}",
        rf"\caption{{{_tex(grid.title)}}}",
        rf"\begin{{tabular}}{{l{'r' * (n - 1)}}}",
        r"\toprule",
        *([" & ".join(groups) + r" \\"] if any(name for name, _ in grid.groups) else []),
        " & ".join(_tex(label) for _, labels in grid.groups for label in labels) + r" \\",
        r"\midrule",
        *(" & ".join(map(_tex, row)) + r" \\" for row in grid.rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def comma_separated(grid: Grid) -> str:
    """With one line of column names."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([grid.head, *grid.rows])
    return out.getvalue()


def _pipes(cells: object) -> str:
    return f"| {' | '.join(cells)} |"  # type: ignore[arg-type]


def _md(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|~#])", r"\\\1", " ".join(text.split()))


def _tex(text: str) -> str:
    return "".join(LATEX.get(char, char) for char in " ".join(text.split()))
