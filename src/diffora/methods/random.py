"""Random selection: modules by chance, the same sharing as DiffoRA ([D] Table 3's control)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from diffora.core.grid import Grid
from diffora.core.selection import Selection
from diffora.methods.selecting import Selecting


@dataclass(frozen=True)
class Random(Selecting):
    """DiffoRA with the search replaced by a draw from the run's seed."""

    name: ClassVar[str] = "random"

    def select(self, grid: Grid, seed: int, find: Callable[[str], Selection]) -> Selection:
        return self.by_chance(grid, seed)
