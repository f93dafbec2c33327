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
    """Trains every parameter named ``bias``, in linear layers and in layer normalisation."""

    name: ClassVar[str] = "bitfit"
    trains_pretrained: ClassVar[bool] = True

    def check(self, model: nn.Module, grid: Grid) -> None:
        if not backbone_biases(model):
            raise UserError("method=bitfit trains biases, and this backbone has none")

    @property
    def trains_b(self) -> bool:
        return False

    def adapt(self, model: nn.Module, grid: Grid, selection: Selection | None, seed: int) -> Adaptation:
        for bias in backbone_biases(model):
            bias.requires_grad_(True)
        return Adaptation(model)


def backbone_biases(model: nn.Module) -> list[nn.Parameter]:
    """Every bias outside the head, of a model in which only the head requires gradients."""
    return [p for name, p in model.named_parameters() if name.rpartition(".")[2] == "bias" and not p.requires_grad]
