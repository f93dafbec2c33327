"""Pictures of a run: the heatmap of a DAM ([D] Figure 2), the gates over the rounds of the search, confused classes."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

from diffora.core.dam import neutral_gate
from diffora.core.parts import short_names
from diffora.core.selection import Selection
from diffora.files import atomic
from diffora.tasks.classes import ClassResults

Trajectory = Sequence[tuple[float, Sequence[Sequence[float]]]]


def dam_heatmap(selection: Selection, title: str = "") -> bytes:
    """PNG of the DAM: one column per layer, one row per module type, selected modules framed.

    Colours show the relaxed DAM. White is the gate at Γ = 0: 1/N for the softmax of [D] eq. 11, 1/2 for the sigmoid.
    Scores of another selector are scaled like a softmax, so that each layer sums to 1. After a global selection, the
    layers sum to 1 on average. A selection without scores shows the frames only.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    layers, types = len(selection.modules), short_names(selection.types)
    figure = Figure(figsize=(2.4 + 0.62 * layers, 1.5 + 0.42 * len(types)), layout="constrained")
    axes = figure.subplots()
    neutral = neutral_gate(selection.relaxation or "softmax", len(types))
    known = selection.gamma_bar or _shares(selection)
    values = known or [[neutral] * len(types)] * layers
    grid = [list(column) for column in zip(*values, strict=True)]
    spread = max(max(abs(v - neutral) for row in grid for v in row), 1e-9)
    image = axes.imshow(grid, cmap="RdBu_r", vmin=neutral - spread, vmax=neutral + spread, aspect="auto")
    for i, row in enumerate(selection.mask().tolist()):
        for j, flag in enumerate(row):
            if known:
                dark = abs(values[i][j] - neutral) > 0.65 * spread
                axes.text(i, j, f"{values[i][j]:.2f}", ha="center", va="center", size=7, color="w" if dark else "k")
            if flag:
                axes.add_patch(Rectangle((i - 0.45, j - 0.43), 0.9, 0.86, fill=False, lw=1.8, ec="k"))
    axes.set_xticks(range(layers), [str(i + 1) for i in range(layers)])
    axes.set_yticks(range(len(types)), types, parse_math=False)  # names may come from a file: no formulas
    axes.set_xlabel("layer")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if known:
        label = r"$\bar\gamma$" if selection.gamma_bar else selection.selector.replace("$", r"\$") + ", normalised"
        bar = figure.colorbar(image, ax=axes, label=label, pad=0.02)
        bar.outline.set_visible(False)
    if not title:
        own = sum(map(len, selection.selected))
        size = f"{own} of {layers * len(types)}" if selection.k is None else f"K = {selection.k}"
        title = f"{selection.method}, selector {selection.selector}, {size}\nframed modules get a LoRA of their own"
    axes.set_title(title, size=10, parse_math=False)
    return _png(figure)


def _shares(selection: Selection) -> list[list[float]] | None:
    """The scores on the scale of a softmax, as `dam_heatmap` shows them; the sums take absolute values."""
    if selection.scores is None:
        return None
    totals = [sum(map(abs, row)) for row in selection.scores]
    if selection.k is None:
        totals = [sum(totals) / len(totals)] * len(totals)
    return [[v / (total or 1.0) for v in row] for row, total in zip(selection.scores, totals, strict=True)]


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
    figure = Figure(figsize=(2.6 * columns + 1.2, 1.9 * rows + 0.7), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for i, axes in enumerate(panels.flat):
        if i >= layers:
            axes.set_visible(False)
            continue
        lines = [
            axes.plot(rounds, [gamma_bar[i][j] for _, gamma_bar in trajectory], lw=1.4, color=f"C{j}")[0]
            for j in range(len(types))
        ]
        axes.axhline(neutral_gate(relaxation, len(types)), color="0.75", lw=0.8, zorder=0)
        axes.set_title(f"layer {i + 1}", size=9)
        axes.tick_params(labelbottom=i + columns >= layers)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(lines, short_names(types), loc="outside right upper", frameon=False, fontsize=8)
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
