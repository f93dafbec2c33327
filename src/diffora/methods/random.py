"""Random selection: K modules per layer by chance, the same sharing as DiffoRA ([D] Table 3's control)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from diffora.core.dam import random_selection
from diffora.core.grid import Grid
from diffora.core.selection import Selection
from diffora.methods.base import Selecting


@dataclass(frozen=True)
class Random(Selecting):
    """DiffoRA with the search replaced by a draw from the run's seed."""

    name: ClassVar[str] = "random"

    def select(self, grid: Grid, seed: int, search: Callable[[], Selection]) -> Selection:
        mask = random_selection(grid.n_layers, grid.n_types, self.k(grid), seed)
        return Selection.from_mask(grid, mask, method=self.name, k=self.k(grid), rho=self.rho, seed=seed)
