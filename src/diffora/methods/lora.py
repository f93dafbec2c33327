"""LoRA of one rank on every candidate module (Hu et al., 2022)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from diffora.core.grid import Grid
from diffora.core.selection import Selection
from diffora.methods.lowrank import EverywhereOrAdapter, LowRankAdaptation


@dataclass(frozen=True)
class LoRA(EverywhereOrAdapter):
    """h = W x + b + alpha/r B A x."""

    name: ClassVar[str] = "lora"

    def adapt(self, model: nn.Module, grid: Grid, selection: Selection | None, seed: int) -> LowRankAdaptation:
        self.attach(model, grid)
        return LowRankAdaptation(model)
