"""Pictures of a DAM: the heatmap ([D] Figure 2) and the gates over the rounds of the search."""

import io
from collections.abc import Sequence
from pathlib import Path

from diffora.core.dam import neutral_gate
from diffora.core.parts import short_names
from diffora.core.picture import size_of
from diffora.core.selection import Selection
from diffora.files import atomic

Trajectory = Sequence[tuple[float, Sequence[Sequence[float]]]]


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


def save_png(path: Path, png: bytes) -> None:
    """Write a picture atomically."""
    with atomic(path) as scratch:
        scratch.write_bytes(png)


def _png(figure: object) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144)  # type: ignore[attr-defined]
    return buffer.getvalue()
