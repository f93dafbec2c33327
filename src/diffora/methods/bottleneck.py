"""What the two adapters with a bottleneck, Houlsby's and Pfeiffer's, have in common."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from diffora.core.bottleneck import BottleneckLinear
from diffora.core.grid import Grid
from diffora.core.selection import Selection
from diffora.methods.base import Adaptation, Method


@dataclass(frozen=True)
class Bottleneck(Method):
    """Adapters behind some of each layer's output projections, before dropout, residual and LayerNorm.

    Attributes:
        size: width b; an adapter behind d outputs has 2 d b + b + d parameters.
        activation: between the two matrices.
        skip: h + f(h) rather than f(h).
        init_std: of the initial weights, near 0 for a start near the identity.
    """

    roles: ClassVar[tuple[str, ...]]
    size: int
    activation: Literal["gelu", "relu", "silu", "tanh"]
    skip: bool
    init_std: float

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.size < 1:
            yield f"method.size={self.size} must be a whole number of at least 1: it is the width of the bottleneck"
        if self.init_std < 0:
            yield f"method.init_std={self.init_std} must be at least 0"
        if self.init_std == 0 and not self.skip:
            yield "method.init_std=0 with method.skip=false would begin with outputs of zero: give a positive init_std"

    def check(self, model: nn.Module, grid: Grid) -> None:
        for role in self.roles:
            grid.having(role)

    def adapt(self, model: nn.Module, grid: Grid, selection: Selection | None, seed: int) -> Adaptation:
        for role in self.roles:
            for name in grid.having(role):
                base = model.get_submodule(name)
                model.set_submodule(name, BottleneckLinear(base, self.size, self.activation, self.skip, self.init_std))
        return Adaptation(model)
