"""DiffoRA: search which modules deserve a LoRA, give it to them, share a small one among the rest ([D] section 4)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from diffora.core.grid import Grid
from diffora.core.selection import Selection
from diffora.methods.base import Selecting


@dataclass(frozen=True)
class DiffoRA(Selecting):
    """Algorithm 1. With ``method.selection=<file>`` stage 1 is left out and the file's selection is used."""

    name: ClassVar[str] = "diffora"
    selection: str | None
    warm_start: bool

    def select(self, grid: Grid, seed: int, search: Callable[[], Selection]) -> Selection:
        if self.selection is None:
            return search()
        chosen = Selection.load(Path(self.selection))
        chosen.check_fits(grid, self.selection)
        return chosen
