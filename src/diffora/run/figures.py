"""Pictures of a DAM: the heatmap ([D] Figure 2) and the gates over the rounds of the search."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffora.core.dam import neutral_gate
from diffora.core.parts import block_of, short_names
from diffora.core.selection import Selection
from diffora.files import atomic

Trajectory = Sequence[tuple[float, Sequence[Sequence[float | None]]]]
"""(round, relaxed DAM); None where a layer has no such module."""


def dam_heatmap(selection: Selection, title: str = "") -> bytes:
    """PNG of the DAM: one column per layer, one row per module type, selected modules framed.

    Colours show the relaxed DAM. White is the gate at Γ = 0: 1/N for the softmax of [D] eq. 11, 1/2 for the sigmoid.
    Scores of another selector are scaled like a softmax, so that each layer sums to 1. After a global selection, the
    layers sum to 1 on average. A selection without scores shows the frames only.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    layers, types = len(selection.modules), short_names(selection.types)
    sizes = [sum(name is not None for name in row) for row in selection.modules]
    figure = Figure(figsize=(2.4 + 0.62 * layers, 1.5 + 0.42 * len(types)), layout="constrained")
    axes = figure.subplots()
    neutral = [neutral_gate(selection.relaxation or "softmax", size) for size in sizes]
    known = selection.gamma_bar or _shares(selection)
    values = known or [[n if name else None for name in row] for n, row in zip(neutral, selection.modules, strict=True)]
    beyond = [[None if v is None else v - n for v in row] for row, n in zip(values, neutral, strict=True)]
    spread = max(max(abs(v) for row in beyond for v in row if v is not None), 1e-9)
    # One scale of values if all layers have the same gate at Γ = 0, otherwise one of differences from it.
    middle = neutral[0] if len(set(sizes)) == 1 else 0.0
    grid = [[math.nan if v is None else middle + v for v in column] for column in zip(*beyond, strict=True)]
    image = axes.imshow(grid, cmap="RdBu_r", vmin=middle - spread, vmax=middle + spread, aspect="auto")
    for i, row in enumerate(selection.mask().tolist()):
        for j, flag in enumerate(row):
            value, difference = values[i][j], beyond[i][j]
            if known and value is not None and difference is not None:
                dark = abs(difference) > 0.65 * spread
                axes.text(i, j, f"{value:.2f}", ha="center", va="center", size=7, color="w" if dark else "k")
            if flag:
                axes.add_patch(Rectangle((i - 0.45, j - 0.43), 0.9, 0.86, fill=False, lw=1.8, ec="k"))
    axes.set_xticks(range(layers), _numbers(selection.modules))
    axes.set_yticks(range(len(types)), types, parse_math=False)  # names may come from a file: no formulas
    axes.set_xlabel("layer")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if known:
        label = r"$\bar\gamma$" if selection.gamma_bar else selection.selector.replace("$", r"\$") + ", normalised"
        label += "" if len(set(sizes)) == 1 else ", beyond its layer's mean"
        bar = figure.colorbar(image, ax=axes, label=label, pad=0.02)
        bar.outline.set_visible(False)
    if not title:
        own = sum(map(len, selection.selected))
        size = f"{own} of {sum(sizes)}" if selection.k is None else f"K = {selection.k}"
        title = f"{selection.method}, selector {selection.selector}, {size}\nframed modules get a LoRA of their own"
    axes.set_title(title, size=10, parse_math=False)
    return _png(figure)


def _numbers(rows: Sequence[Sequence[object]]) -> list[str]:
    """Numbers of the layers, from 1 in each block; layers of one block have their modules in the same columns.

    Args:
        rows: L x N, None where a layer has no such module.
    """
    blocks = [tuple(entry is None for entry in row) for row in rows]
    return [str(1 + blocks[:i].count(block)) for i, block in enumerate(blocks)]


def _shares(selection: Selection) -> list[list[float | None]] | None:
    """The scores on the scale of a softmax, as `dam_heatmap` shows them; the sums take absolute values."""
    if selection.scores is None:
        return None
    totals = [sum(abs(v) for v in row if v is not None) for row in selection.scores]
    if selection.k is None and all(None not in row for row in selection.modules):
        totals = [sum(totals) / len(totals)] * len(totals)
    return [
        [None if v is None else v / (total or 1.0) for v in row]
        for row, total in zip(selection.scores, totals, strict=True)
    ]


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
    numbers = _numbers(trajectory[0][1])
    for i, axes in enumerate(panels.flat):
        if i >= layers:
            axes.set_visible(False)
            continue
        there = [j for j in range(len(types)) if trajectory[0][1][i][j] is not None]
        for j in there:
            values: Any = [gamma_bar[i][j] for _, gamma_bar in trajectory]
            lines[j] = axes.plot(rounds, values, lw=1.4, color=f"C{j % 10}", ls="-" if j < 10 else "--")[0]
        axes.axhline(neutral_gate(relaxation, len(there)), color="0.75", lw=0.8, zorder=0)
        block = block_of(types[there[0]])
        axes.set_title(f"{block} layer {numbers[i]}".strip(), size=9)
        axes.tick_params(labelbottom=i + columns >= layers)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        [lines[j] for j in range(len(types))], short_names(types), loc="outside right upper", frameon=False, fontsize=8
    )
    figure.supxlabel("round of the search", size=9)
    figure.supylabel(r"$\bar\gamma$", size=10)
    return _png(figure)


def save_png(path: Path, png: bytes) -> None:
    """Write a picture atomically."""
    with atomic(path) as scratch:
        scratch.write_bytes(png)


def _png(figure: object) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144)  # type: ignore[attr-defined]
    return buffer.getvalue()
