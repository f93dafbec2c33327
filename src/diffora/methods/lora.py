"""LoRA on every candidate module, all of one rank (Hu et al., 2022)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from diffora.core.grid import Grid
from diffora.core.lowrank import attach
from diffora.core.selection import Selection
from diffora.methods.base import Method


@dataclass(frozen=True)
class LoRA(Method):
    """h = W x + b + alpha/r B A x."""

    name: ClassVar[str] = "lora"
    rank: int
    dropout: float
    alpha: float

    def adapt(self, model: nn.Module, grid: Grid, selection: Selection | None) -> None:
        everything = torch.ones(grid.n_layers, grid.n_types, dtype=torch.bool)
        attach(model, grid.names, everything, self.rank, None, self.alpha, self.dropout)
