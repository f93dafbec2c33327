"""Pictures of a run: the heatmap of a DAM ([D] Figure 2), the gates over the rounds of the search, confused classes."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffora.core.parts import short_names
from diffora.core.picture import layer_labels, size_of, start_gate
from diffora.core.selection import Selection
from diffora.files import atomic
from diffora.tasks.classes import ClassResults

Trajectory = Sequence[tuple[float, Sequence[Sequence[float | None]]]]
"""(round, relaxed DAM); None where a layer has no such module."""


def dam_heatmap(selection: Selection, title: str | None = None) -> bytes:
    """PNG of the DAM, as `Selection.plot` draws it."""
    from matplotlib.figure import Figure

    size = size_of(len(selection.modules), len(selection.types))
    figure = Figure(figsize=size, layout="constrained")
    selection.plot(figure.subplots(), title)
    return _png(figure)


def gamma_trajectories(trajectory: Trajectory, types: Sequence[str], relaxation: str = "softmax") -> bytes:
    """PNG of every entry of the relaxed DAM over the rounds of the search, one panel per layer.

    Args:
        relaxation: of the search. A grey line shows its gate at Γ = 0.
    """
    from matplotlib.figure import Figure

    rounds = [at for at, _ in trajectory]
    layers = len(trajectory[0][1])
    columns = min(layers, 4)
    rows = -(-layers // columns)
    height = max(1.9 * rows + 0.7, 0.2 * len(types) + 0.4)
    figure = Figure(figsize=(2.6 * columns + 1.2, height), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    lines: dict[int, Any] = {}
    labels = layer_labels(trajectory[0][1], types)
    for i, axes in enumerate(panels.flat):
        if i >= layers:
            axes.set_visible(False)
            continue
        present = [j for j in range(len(types)) if trajectory[0][1][i][j] is not None]
        for j in present:
            values: Any = [gamma_bar[i][j] for _, gamma_bar in trajectory]
            lines[j] = axes.plot(rounds, values, lw=1.4, color=f"C{j % 10}", ls="-" if j < 10 else "--")[0]
        axes.axhline(start_gate(relaxation, len(present)), color="0.75", lw=0.8, zorder=0)
        axes.set_title(labels[i], size=9)
        axes.tick_params(labelbottom=i + columns >= layers)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        [lines[j] for j in range(len(types))], short_names(types), loc="outside right upper", frameon=False, fontsize=8
    )
    figure.supxlabel("round of the search", size=9)
    figure.supylabel(r"$\bar\gamma$", size=10)
    return _png(figure)


MOST_CLASSES = 50
"""The most classes in the picture of confused classes."""
LONGEST_NAME = 24
"""Longer names of classes are cut in the picture, in characters."""


def confusion_matrix(results: ClassResults) -> bytes:
    """PNG of the confusion matrix: a row for each class, a column for each predicted class, the numbers of rows.

    Colours show the share of the class's rows. Of more than `MOST_CLASSES` classes, it shows those with most errors.
    """
    from matplotlib.figure import Figure

    counts = results.confusion
    assert counts is not None
    errors = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
    chosen = errors.argsort(descending=True, stable=True)[:MOST_CLASSES].sort().values
    n, names = len(chosen), [_cut(results.names[i]) for i in chosen.tolist()]
    shares = (counts / counts.sum(1, keepdim=True).clamp(min=1))[chosen][:, chosen].tolist()
    numbers = counts[chosen][:, chosen].tolist()
    cell = 0.62 if n <= 12 else 0.4 if n <= 30 else 0.28
    margin = 1.6 + 0.075 * max(map(len, names))
    figure = Figure(figsize=(max(3.4, margin + cell * n), max(2.6, margin + cell * n)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    size = 9 if n <= 12 else 7 if n <= 30 else 6
    for i, row in enumerate(numbers):
        for j, number in enumerate(row):
            if number:
                colour = "w" if shares[i][j] > 0.6 else "k"
                axes.text(j, i, f"{number}", ha="center", va="center", size=size, color=colour)
    # names come from a file: no formulas
    axes.set_xticks(range(n), names, rotation=45, ha="right", rotation_mode="anchor", size=size, parse_math=False)
    axes.set_yticks(range(n), names, size=size, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("class")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    right, total = int(counts.diagonal().sum()), int(counts.sum())
    title = f"{right:,} of {total:,} rows right"
    if n < len(results.names):
        title += f"\nthe {n} of {len(results.names):,} classes with most errors"
    axes.set_title(title, size=10)
    return _png(figure)


def _cut(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def save_png(path: Path, png: bytes) -> None:
    """Write a picture atomically."""
    with atomic(path) as scratch:
        scratch.write_bytes(png)


def _png(figure: object) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # class names may be in any script
        figure.savefig(buffer, format="png", dpi=144)  # type: ignore[attr-defined]
    return buffer.getvalue()
