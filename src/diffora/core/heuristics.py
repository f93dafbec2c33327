"""Selections by rule, from the names of the modules alone: the heuristics that a selector must beat.

=============  =========================================================================
``qv``         query and value of every layer, as in the paper of LoRA (arXiv 2106.09685)
``attention``  query, key, value and output of every attention
``ffn``        all modules of every feed-forward block
``lower``      whole layers, from the first one up
``upper``      whole layers, from the last one down
``alternate``  every other layer, counted from the last one
=============  =========================================================================

They are scores like all others (`heuristic_scores`), so scope and rho say how many modules are selected. A heuristic
has few distinct scores: ``qv`` gives query and value one score and all other modules another. A number of modules that
divides a group of equal scores is refused (`heuristic_problem`), so that no tie decides.
"""

import logging
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from diffora.core.grid import Grid
from diffora.core.parts import part_of, path_of
from diffora.errors import UserError

log = logging.getLogger(__name__)

KINDS: dict[str, tuple[str, ...]] = {
    "qv": ("query", "value"),
    "attention": ("query", "key", "value", "query_key_value", "attention_output"),
    "ffn": ("ffn_gate", "ffn_up", "ffn_gate_up", "ffn_input", "ffn_output"),
}
"""The parts (`diffora.core.parts`) that each heuristic by kind selects."""
BY_LAYER = ("lower", "upper", "alternate")
HEURISTICS = (*KINDS, *BY_LAYER)


def heuristic_scores(name: str, grid: Grid) -> Tensor:
    """Scores of a heuristic: L x N in float64, high is good, NaN where a layer has no such module.

    Encoder and decoder of one grid each have a lower and an upper part of their own.

    Args:
        name: one of `HEURISTICS`.

    Raises:
        UserError: the names of the modules of some layer do not show which ones are meant.
    """
    values = _by_kind(name, grid) if name in KINDS else _by_layer(name, grid)
    return values.masked_fill(~grid.present, float("nan"))


def usual_sizes(name: str, scores: Tensor) -> list[int]:
    """How many modules of each layer a heuristic selects if no number is given.

    They are the modules that it is named after; for ``lower`` and ``upper`` half of the layers, rounded up.

    Args:
        scores: from `heuristic_scores`.
    """
    chosen = scores > -0.5 if name in ("lower", "upper") else scores == 1
    return [int(n) for n in chosen.sum(-1)]


def heuristic_problem(scores: Tensor, counts: Sequence[int], choices: Iterable[tuple[str, Sequence[int]]]) -> str:
    """Why a heuristic cannot select so many modules; empty if it can.

    Args:
        scores: from `heuristic_scores`.
        counts: how many modules are selected, for each layer, or one number for the whole grid.
        choices: (what to set, such as ``rho=0.5``; the counts that this gives). Those that would do are listed.
    """
    if not _divides_equals(scores, counts):
        return ""
    fitting: dict[tuple[int, ...], str] = {}
    for text, other in choices:
        if any(other) and not _divides_equals(scores, other):
            fitting.setdefault(tuple(other), text)
    number = ", ".join(map(str, dict.fromkeys(counts)))
    where = "in all" if len(counts) == 1 else "of each layer"
    possible = f"; possible: {', '.join(list(fitting.values())[:8])}" if fitting else ""
    return f"would select {number} modules {where}, which divides modules that the rule does not tell apart{possible}"


def _divides_equals(scores: Tensor, counts: Sequence[int]) -> bool:
    """Whether a selected and an unselected module have the same score."""
    rows = scores.view(1, -1) if len(counts) == 1 else scores
    for row, count in zip(rows, counts, strict=True):
        ordered = sorted(row[~row.isnan()].tolist(), reverse=True)
        if 0 < count < len(ordered) and ordered[count - 1] == ordered[count]:
            return True
    return False


def _by_kind(name: str, grid: Grid) -> Tensor:
    """1 for the modules that are meant, 0 for the others."""
    parts = [(part_of(kind) or "").removeprefix("cross_") for kind in grid.types]
    chosen = torch.tensor([part in KINDS[name] for part in parts])
    for row, layer in zip(grid.present, grid.layers, strict=True):
        present = [part for part, has, fits in zip(parts, row, chosen, strict=True) if has and fits]
        needed = KINDS[name] if name == "qv" else [] if present else [name]
        missing = [part for part in needed if part not in present]
        if missing:
            has = [path_of(kind) for kind, flag in zip(grid.types, row, strict=True) if flag]
            raise UserError(
                f"selector={name}: the names of the modules of {layer or 'the model'} do not show its "
                f"{' and '.join(missing)}; it has {', '.join(has)}"
            )
    if unknown := [path_of(kind) for kind, part in zip(grid.types, parts, strict=True) if not part]:
        log.warning(f"selector={name}: not selected, as their names do not show what they are: {', '.join(unknown)}")
    return chosen.to(torch.float64).expand(grid.n_layers, -1)


def _by_layer(name: str, grid: Grid) -> Tensor:
    """The same score for all modules of a layer, by its place among the layers of its block."""
    blocks: dict[tuple[bool, ...], list[int]] = {}
    for layer, row in enumerate(grid.present.tolist()):
        blocks.setdefault(tuple(row), []).append(layer)
    values = torch.zeros(grid.n_layers, dtype=torch.float64)
    for layers in blocks.values():
        n = len(layers)
        for i, layer in enumerate(layers):
            values[layer] = {"lower": -i / n, "upper": -(n - 1 - i) / n, "alternate": (n - i) % 2}[name]
    return values.unsqueeze(-1).expand(-1, grid.n_types)
