"""The picture of a DAM ([D] Figure 2): `diffora.core.selection.Selection.plot` and the pictures of a run draw it."""

import math
from collections.abc import Sequence
from typing import Any

from diffora.core.certainty import is_decided
from diffora.core.parts import block_of, short_names

Rows = Sequence[Sequence[float | None]]
"""L x N numbers, None where a layer has no such module."""

STARTS = {"softmax": "1/N", "scaled_softmax": "1", "sigmoid": "1/2"}
"""The gate at Γ = 0 in words, by relaxation."""


EVEN = 0.5
"""The confidence of a coin toss, which is drawn white."""


def start_gate(relaxation: str, n_types: int) -> float:
    """The gate of every module of a layer at Γ = 0. It needs no torch, which a report does not import.

    Raises:
        KeyError: there is no such relaxation.
    """
    return {"1/N": 1 / n_types, "1": 1.0, "1/2": 0.5}[STARTS[relaxation]]


def colour_range(values: Rows, neutral: float | Sequence[float] | None) -> tuple[float, float]:
    """(centre, distance): the value that is drawn white, and how far from it a colour is strongest.

    Gates are white at the gate of Γ = 0, so that a colour says whether the search opened or closed a module. Scores
    have no such point: the lowest of them is white.

    Args:
        values: L x N.
        neutral: the gate at Γ = 0 (`start_gate`); one for each layer if they differ, and then differences from these
            are drawn; None for scores.
    """
    least = 1e-9
    if neutral is not None:  # a gate that hardly moved has hardly a colour
        least = 0.01 * (max(neutral) if isinstance(neutral, Sequence) else neutral)
    if isinstance(neutral, Sequence):
        values, neutral = differences(values, neutral), 0.0
    flat = [value for row in values for value in row if value is not None]
    centre = min(flat) if neutral is None else neutral
    return centre, max(max(abs(value - centre) for value in flat), least)


def differences(values: Rows, neutral: Sequence[float]) -> list[list[float | None]]:
    """How far each gate is from the gate at Γ = 0 of its layer."""
    return [[None if v is None else v - start for v in row] for row, start in zip(values, neutral, strict=True)]


def layer_numbers(rows: Sequence[Sequence[object]]) -> list[str]:
    """Numbers of the layers, from 1 in each block; layers of one block have their modules in the same columns.

    Args:
        rows: L x N, None where a layer has no such module.
    """
    blocks = [tuple(entry is None for entry in row) for row in rows]
    return [str(1 + blocks[:i].count(block)) for i, block in enumerate(blocks)]


def layer_labels(rows: Sequence[Sequence[object]], types: Sequence[str]) -> list[str]:
    """``layer 1``, or, in a grid of blocks, ``encoder.block.* layer 1``.

    Args:
        rows: L x N, None where a layer has no such module.
        types: the N module types.
    """
    first = (next((kind for kind, entry in zip(types, row, strict=True) if entry is not None), "") for row in rows)
    return [f"{block_of(kind)} layer {n}".strip() for kind, n in zip(first, layer_numbers(rows), strict=True)]


def shares(scores: Rows, by_layer: bool) -> list[list[float | None]]:
    """Scores divided by the sum of their absolute values in a layer, so that layers can be compared by eye.

    Args:
        scores: L x N.
        by_layer: whether modules compete within a layer. False: all are divided by the mean of these sums, which keeps
            the order over all layers.
    """
    totals = [sum(abs(value) for value in row if value is not None) for row in scores]
    if not by_layer:
        totals = [sum(totals) / len(totals)] * len(totals)
    return [[None if v is None else v / (total or 1.0) for v in row] for row, total in zip(scores, totals, strict=True)]


MOST_NUMBERED = 40
"""Up to this many layers, numbers are written into the cells. More layers get narrow cells without numbers."""


def size_of(n_layers: int, n_types: int) -> tuple[float, float]:
    """Width and height of a figure in inches."""
    return 2.4 + (0.62 if n_layers <= MOST_NUMBERED else 0.25) * n_layers, 1.5 + 0.42 * n_types


def draw_dam(
    axes: Any,
    values: Rows | None,
    mask: Sequence[Sequence[bool]],
    types: Sequence[str],
    neutral: float | Sequence[float] | None,
    label: str,
    numbers: Sequence[str] = (),
    confident: bool = False,
) -> None:
    """Draw one column per layer and one row per module type on matplotlib's axes; selected modules get a frame.

    Args:
        values: L x N gates or scores; None draws the frames only.
        mask: L x N, whether a module is selected.
        types: the N module types.
        neutral: see `colour_range`.
        label: of the colour bar.
        numbers: of the layers; empty for 1 to L.
        confident: whether ``values`` are the confidence of each module. Then colours are strongest at 0 and 1, and the
            frames of modules that are not decided are dashed (`diffora.core.certainty`).
    """
    from matplotlib import colormaps  # matplotlib takes half a second to import
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Rectangle

    if values is not None:
        centre, most = (EVEN, EVEN) if confident else colour_range(values, neutral)
        shown = differences(values, neutral) if isinstance(neutral, Sequence) else values
        label += ", minus 1/N" if isinstance(neutral, Sequence) else ""
        colours: Any = "Reds" if neutral is None else "RdBu_r"
        if confident:  # many modules are at 0 or 1, and frames could not be seen on the darkest colours
            colours = ListedColormap(colormaps["RdBu_r"](range(32, 224)))
        image = axes.imshow(
            [[math.nan if value is None else value for value in column] for column in zip(*shown, strict=True)],
            cmap=colours,
            vmin=centre if neutral is None else centre - most,
            vmax=centre + most,
            aspect="auto",
        )
        axes.figure.colorbar(image, ax=axes, label=label, pad=0.02).outline.set_visible(False)
    for i, row in enumerate(mask):
        for j, flag in enumerate(row):
            if values is not None and len(mask) <= MOST_NUMBERED and (value := shown[i][j]) is not None:
                dark = abs(value - centre) > 0.65 * most
                axes.text(i, j, f"{values[i][j]:.2f}", ha="center", va="center", size=7, color="w" if dark else "k")
            if flag:
                open_ = confident and values is not None and not is_decided(values[i][j] or 0.0)
                line = (0, (2.2, 1.4)) if open_ else "solid"
                axes.add_patch(Rectangle((i - 0.45, j - 0.43), 0.9, 0.86, fill=False, lw=1.8, ls=line, ec="k"))
    axes.set_xlim(-0.5, len(mask) - 0.5)
    axes.set_ylim(len(types) - 0.5, -0.5)
    axes.set_xticks(
        range(len(mask)),
        numbers or [str(i + 1) for i in range(len(mask))],
        size=None if len(mask) <= MOST_NUMBERED else 7,
    )
    axes.set_yticks(range(len(types)), short_names(types), parse_math=False)  # names may come from a file: no formulas
    axes.set_xlabel("layer")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
