"""Full fine-tuning: every parameter of the backbone is trained."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import nn

from diffora.adapters.export import export_model
from diffora.adapters.origin import Origin
from diffora.core.grid import Grid
from diffora.core.selection import Selection
from diffora.methods.base import Adaptation, Method


@dataclass(frozen=True)
class FullFT(Method):
    """Adds no adapter. The backbone's own parameters are counted as adapter parameters."""

    name: ClassVar[str] = "full_ft"
    trains_pretrained: ClassVar[bool] = True
    trains_all_pretrained: ClassVar[bool] = True

    @property
    def trains_b(self) -> bool:
        return False

    def adapt(self, model: nn.Module, grid: Grid, selection: Selection | None, seed: int) -> Adaptation:
        model.requires_grad_(True)
        return WholeModel(model)


class WholeModel(Adaptation):
    """Exports the whole model, because all of it was trained."""

    def export(self, folder: Path, origin: Origin) -> None:
        export_model(folder / "model", origin)
