"""FLoRA: a small core between the two factors, dW = A G B (Si et al., 2024); here in LoRA's letters, s B G A."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from diffora.core.grid import Grid
from diffora.core.lowrank import lowrank_layers
from diffora.core.selection import Selection
from diffora.methods.lowrank import Everywhere, LowRankAdaptation


@dataclass(frozen=True)
class FLoRA(Everywhere):
    """h = W x + b + alpha/r B G A x with a trained r x r core G.

    G starts at zero, so that the update does; A and B start Kaiming-uniform. With B or A at zero as well, neither
    would get a gradient.
    """

    name: ClassVar[str] = "flora"

    def adapt(self, model: nn.Module, grid: Grid, selection: Selection | None, seed: int) -> LowRankAdaptation:
        self.attach(model, grid)
        for _, layer in lowrank_layers(model):
            layer.gate = nn.Parameter(torch.zeros(self.rank, self.rank, device=layer.lora_a.device))
            nn.init.kaiming_uniform_(layer.lora_bt, a=5**0.5)
        return LowRankAdaptation(model)
