"""The results of a run by class: a file, a picture and a table on the screen."""

import csv
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from diffora.files import write_text
from diffora.run.figures import confusion_matrix, save_png
from diffora.tasks.classes import ClassResults
from diffora.tasks.messages import some

SHOWN = 30
"""The most classes in the table on the screen."""


def write_classes(folder: Path, results: ClassResults | None, prefix: str = "") -> list[Path]:
    """Write ``classes.csv`` and, where a row has one class, ``confusion.png``.

    Args:
        results: None writes nothing.
        prefix: before both names, e.g. of a split.

    Returns:
        The files written.
    """
    if results is None:
        return []
    files = [folder / f"{prefix}classes.csv"]
    write_text(files[0], results.csv())
    if results.confusion is not None:
        files.append(folder / f"{prefix}confusion.png")
        save_png(files[1], confusion_matrix(results))
    return files


def print_classes(file: Path, console: Console, title: str) -> None:
    """Print the table of a ``classes.csv``; of more than `SHOWN` classes, those with the lowest F1."""
    with file.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    shown = rows
    if len(rows) > SHOWN:
        present = [row for row in rows if int(row["support"]) or int(row["predicted"])]
        shown = sorted(present, key=lambda row: (float(row["f1"]), -int(row["support"])))[:SHOWN]
        title += f": the {len(shown)} of {len(rows):,} classes with the lowest F1"
    table = Table(title=escape(title))
    table.add_column("class", max_width=30, overflow="fold")  # on a narrow screen, names give way and numbers do not
    for name in ("precision", "recall", "F1", "rows", "predicted"):
        table.add_column(name, justify="right", no_wrap=True)
    confused = any(row["confused_rows"] for row in shown)
    if confused:
        table.add_column("taken for", max_width=30, overflow="fold")
    for row in shown:
        shares = (f"{float(row[name]):.4f}" for name in ("precision", "recall", "f1"))
        other = f"{row['confused_with']}, {int(row['confused_rows']):,}" if row["confused_rows"] else ""
        cells = (*shares, f"{int(row['support']):,}", f"{int(row['predicted']):,}", *[escape(other)] * confused)
        table.add_row(escape(row["class"]), *cells)
    console.print(table)
    if silent := [row["class"] for row in rows if int(row["support"]) and not int(row["predicted"])]:
        console.print(f"never predicted: {some(silent)}", highlight=False, markup=False)
