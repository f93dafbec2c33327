"""Full fine-tuning: every parameter of the backbone is trained."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from diffora.core.grid import Grid
from diffora.core.selection import Selection
from diffora.methods.base import Method


@dataclass(frozen=True)
class FullFT(Method):
    """No adapter; what is counted as such is the backbone itself."""

    name: ClassVar[str] = "full_ft"
    lowrank: ClassVar[bool] = False

    def adapt(self, model: nn.Module, grid: Grid, selection: Selection | None) -> None:
        model.requires_grad_(True)
