"""R-LoRA: LoRA, and a penalty that keeps the rows of A and the columns of B orthonormal ([R] section 4.2)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from diffora.core.grid import Grid
from diffora.core.selection import Selection
from diffora.methods.lowrank import EverywhereOrAdapter, LowRankAdaptation, Regulariser


@dataclass(frozen=True)
class RLoRA(EverywhereOrAdapter):
    """Loss + lambda Reg, with Reg = sum over adapters of ||A A^T - I||^2_F + ||B^T B - I||^2_F ([R] eq. 10)."""

    name: ClassVar[str] = "r_lora"
    regulariser: Regulariser

    def adapt(self, model: nn.Module, grid: Grid, selection: Selection | None, seed: int) -> LowRankAdaptation:
        self.attach(model, grid)
        return LowRankAdaptation(model, self.regulariser)
