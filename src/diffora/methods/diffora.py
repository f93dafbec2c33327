"""DiffoRA: search which modules deserve a LoRA, give it to them, share a small one among the rest ([D] section 4)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from torch import nn

from diffora.core.grid import Grid
from diffora.core.selection import Selection
from diffora.methods.selecting import Selecting


@dataclass(frozen=True)
class DiffoRA(Selecting):
    """Algorithm 1. With ``method.selection=<file>`` stage 1 is left out and the file's selection is used as it is.

    Attributes:
        selector: the search, or another criterion in its place (`diffora.core.scores`).
        score_batches: of how many batches of the search's training rows ``gradient`` and ``activation`` are the mean.
    """

    name: ClassVar[str] = "diffora"
    selector: Literal["search", "gradient", "activation", "random"]
    score_batches: int
    selection: str | None
    warm_start: bool

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.score_batches < 1:
            yield f"method.score_batches={self.score_batches} must be a whole number of at least 1"
        if self.selection is not None and self.budget is not None:
            yield "method.budget does not go with method.selection, which says already what is selected"
        if self.warm_start and self.selector != "search":
            yield f"method.warm_start=true needs method.selector=search: {self.selector} trains no A and B"
        if self.warm_start and self.budget is not None and self.scope == "layer":
            yield "method.warm_start=true does not go with method.budget, which chooses the rank after the search"

    def check(self, model: nn.Module, grid: Grid) -> None:
        if self.selection is None:
            super().check(model, grid)

    def select(self, grid: Grid, seed: int, find: Callable[[str], Selection]) -> Selection:
        if self.selection is not None:
            chosen = Selection.load(Path(self.selection))
            chosen.check_fits(grid, self.selection)
            return chosen
        return self.by_chance(grid, seed) if self.selector == "random" else find(self.selector)
