"""DiffoRA: search which modules deserve a LoRA, give it to them, share a small one among the rest ([D] section 4)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import nn

from diffora.core.grid import Grid
from diffora.core.parts import part_of
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.methods.selecting import Selecting


@dataclass(frozen=True)
class DiffoRA(Selecting):
    """Algorithm 1. With ``method.selection`` stage 1 is left out and that selection is used as it is.

    Attributes:
        selection: a selection file, or a list of what to select in every layer: module types, or the parts they play
            (`diffora.core.parts`).
        selector: the search, or another criterion in its place (`diffora.core.scores`).
        score_batches: over how many batches of search rows ``attribution``, ``gradient`` and ``activation`` are taken.
    """

    name: ClassVar[str] = "diffora"
    selector: Literal["search", "attribution", "gradient", "activation", "random"]
    score_batches: int
    selection: str | list[str] | None
    warm_start: bool

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.score_batches < 1:
            yield f"method.score_batches={self.score_batches} must be a whole number of at least 1"
        if self.selection is not None and self.budget is not None:
            yield "method.budget does not go with method.selection, which says already what is selected"
        if self.warm_start and self.selector not in ("search", "attribution"):
            yield f"method.warm_start=true needs a selector that trains A and B, which {self.selector} does not"
        if self.warm_start and self.budget is not None and self.scope == "layer":
            yield "method.warm_start=true does not go with method.budget, which chooses the rank after the search"

    def check(self, model: nn.Module, grid: Grid) -> None:
        if self.selection is None:
            super().check(model, grid)
        elif isinstance(self.selection, list):
            parts = [part for part in map(part_of, grid.types) if part]
            if unknown := set(self.selection).difference(grid.types, parts):
                raise UserError(
                    f"method.selection names {', '.join(sorted(unknown))}; a layer has {', '.join(grid.types)}"
                    + (f", or, by their parts, {', '.join(dict.fromkeys(parts))}" if parts else "")
                )

    def select(self, grid: Grid, seed: int, find: Callable[[str], Selection]) -> Selection:
        if isinstance(self.selection, str):
            chosen = Selection.load(Path(self.selection))
            chosen.check_fits(grid, self.selection)
            return chosen
        if self.selection is not None:
            row = torch.tensor([name in self.selection or part_of(name) in self.selection for name in grid.types])
            made = {"selector": "given", "k": int(row.sum()), "rho": self.rho, "seed": seed}
            return Selection.from_mask(grid, row.expand(grid.n_layers, -1), method=self.name, **made)
        return self.by_chance(grid, seed) if self.selector == "random" else find(self.selector)
