"""BitFit: only the biases are trained (Ben Zaken et al., 2022)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from diffora.core.grid import Grid
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.methods.base import Adaptation, Method


@dataclass(frozen=True)
class BitFit(Method):
    """Every parameter named ``bias``: those of linear layers and of layer normalisation."""

    name: ClassVar[str] = "bitfit"

    def check(self, model: nn.Module, grid: Grid) -> None:
        if not backbone_biases(model):
            raise UserError("method=bitfit trains biases, and this backbone has none")

    def adapt(self, model: nn.Module, grid: Grid, selection: Selection | None, seed: int) -> Adaptation:
        for bias in backbone_biases(model):
            bias.requires_grad_(True)
        return Adaptation(model)


def backbone_biases(model: nn.Module) -> list[nn.Parameter]:
    """Every bias outside the head. Only the head of ``model`` requires gradients yet."""
    return [p for name, p in model.named_parameters() if name.rpartition(".")[2] == "bias" and not p.requires_grad]
