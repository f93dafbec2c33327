"""FLoRA: a small core between the two factors (Si et al., 2024). The paper writes dW = A G B; here it is s B G A."""

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

    G starts at zero, so the update is zero at the start. A and B start Kaiming-uniform: if A or B were zero too, none
    of the three would get a gradient.
    """

    name: ClassVar[str] = "flora"

    def adapt(self, model: nn.Module, grid: Grid, selection: Selection | None, seed: int) -> LowRankAdaptation:
        self.attach(model, grid)
        for _, layer in lowrank_layers(model):
            layer.gate = nn.Parameter(torch.zeros(self.rank, self.rank, device=layer.lora_a.device))
            nn.init.kaiming_uniform_(layer.lora_bt, a=5**0.5)
        return LowRankAdaptation(model)
