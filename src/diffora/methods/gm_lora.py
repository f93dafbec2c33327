"""GM-LoRA: LoRA in which each step trains a random part of the directions ([R] section 4.3, [R] Algorithm 1)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from diffora.core.grid import Grid
from diffora.core.selection import Selection
from diffora.methods.lowrank import EverywhereOrAdapter, LowRankAdaptation, Mask


@dataclass(frozen=True)
class GMLoRA(EverywhereOrAdapter):
    """Only rows R_t of A and columns R_t of B get a gradient. The other entries of the gradient are not computed."""

    name: ClassVar[str] = "gm_lora"
    mask: Mask

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from self.mask.problems(self.known_rank)

    def adapt(self, model: nn.Module, grid: Grid, selection: Selection | None, seed: int) -> LowRankAdaptation:
        self.attach(model, grid)
        return LowRankAdaptation(model, mask=self.mask, seed=seed)
