"""Head only: the backbone stays frozen, and only the head is trained. Every other method should be better."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from diffora.core.grid import Grid
from diffora.core.selection import Selection
from diffora.methods.base import Adaptation, Method


@dataclass(frozen=True)
class HeadOnly(Method):
    """Adds no adapter."""

    name: ClassVar[str] = "head_only"

    @property
    def trains_b(self) -> bool:
        return False

    def adapt(self, model: nn.Module, grid: Grid, selection: Selection | None, seed: int) -> Adaptation:
        return Adaptation(model)
