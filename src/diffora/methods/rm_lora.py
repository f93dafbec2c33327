"""RM-LoRA: the regulariser of R-LoRA and the masks of GM-LoRA together ([R] section 4)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from diffora.core.grid import Grid
from diffora.core.selection import Selection
from diffora.methods.lowrank import EverywhereOrAdapter, LowRankAdaptation, Mask, Regulariser


@dataclass(frozen=True)
class RMLoRA(EverywhereOrAdapter):
    """[R] eq. 10 and [R] Algorithm 1. The mask also applies to the gradient of the penalty."""

    name: ClassVar[str] = "rm_lora"
    regulariser: Regulariser
    mask: Mask

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from self.mask.problems(self.known_rank)

    def adapt(self, model: nn.Module, grid: Grid, selection: Selection | None, seed: int) -> LowRankAdaptation:
        self.attach(model, grid)
        return LowRankAdaptation(model, self.regulariser, self.mask, seed)
