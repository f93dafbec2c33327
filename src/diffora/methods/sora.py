"""SoRA: a gate on each direction of a LoRA. A soft threshold sets gates to exactly zero (Ding et al., 2023)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from diffora.core.grid import Grid
from diffora.core.lowrank import lowrank_layers
from diffora.core.selection import Selection
from diffora.methods.lowrank import Everywhere, LowRankAdaptation
from diffora.settings.checks import NOT_NEGATIVE, Help, whole


def soft_threshold(x: Tensor, by: float) -> Tensor:
    """Moves each entry of x towards zero by ``by``, but not past zero: the proximal operator of ``by * |x|``."""
    return torch.sign(x) * torch.relu(x.abs() - by)


@dataclass(frozen=True)
class SoRA(Everywhere):
    """h = W x + b + alpha/r B (g * A x); after each optimiser step g is soft-thresholded.

    ``lam`` is the threshold, as in the released code and in the values that papers give. With ``times_lr`` the
    threshold is ``lam`` times the learning rate, as in the paper's formula. Over ``stages`` equal stages the
    value grows linearly from ``lam_start`` to ``lam`` (the sparsifying schedule).
    """

    name: ClassVar[str] = "sora"
    lam: Annotated[float, NOT_NEGATIVE, Help("λ: each step moves each gate this far towards 0.")]
    times_lr: Annotated[bool, Help("Multiply λ by the learning rate, as in the paper's formula.")]
    lam_start: Annotated[float, NOT_NEGATIVE, Help("λ of the first stage.")]
    stages: Annotated[int, whole(1), Help("Equal stages in which λ grows to `lam`; 1: `lam` from the start.", "stages")]

    def problems(self) -> Iterator[str]:
        if self.lam_start > self.lam:
            yield f"method.lam_start={self.lam_start} must lie between 0 and method.lam={self.lam}"

    def adapt(self, model: nn.Module, grid: Grid, selection: Selection | None, seed: int) -> "SoRAAdaptation":
        self.attach(model, grid)
        for _, layer in lowrank_layers(model):
            layer.gate = nn.Parameter(torch.randn(self.rank, device=layer.lora_a.device))
        return SoRAAdaptation(model, self)

    def threshold(self, step: int, total_steps: int, lr: float) -> float:
        """The threshold of a step, which counts from 0, out of ``total_steps``."""
        stage = min(step * self.stages // max(total_steps, 1), self.stages - 1)
        share = stage / (self.stages - 1) if self.stages > 1 else 1.0
        lam = self.lam_start + (self.lam - self.lam_start) * share
        return lam * lr if self.times_lr else lam


class SoRAAdaptation(LowRankAdaptation):
    """Low-rank layers with trained gates."""

    def __init__(self, model: nn.Module, settings: SoRA) -> None:
        super().__init__(model)
        self.settings, self.total_steps = settings, 0

    def begin(self, total_steps: int) -> None:
        self.total_steps = total_steps

    @torch.no_grad()
    def after_step(self, step: int, lr: float) -> None:
        """Apply the soft threshold to all gates."""
        by = self.settings.threshold(step, self.total_steps, lr)
        for _, layer in lowrank_layers(self.model):
            assert layer.gate is not None
            layer.gate.copy_(soft_threshold(layer.gate, by))
