"""The base class of the two bottleneck adapters, Houlsby's and Pfeiffer's."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from torch import nn

from diffora.core.bottleneck import BottleneckLinear
from diffora.core.grid import Grid
from diffora.core.linear import features
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.methods.base import Adaptation, Method
from diffora.settings.checks import POSITIVE, Help, whole


@dataclass(frozen=True)
class Bottleneck(Method):
    """Adds an adapter after some output projections of each layer, before dropout, residual and LayerNorm.

    An adapter of width b after d outputs has 2 d b + b + d parameters.
    """

    roles: ClassVar[tuple[str, ...]]
    size: Annotated[int, whole(1), Help("Width of the bottleneck.", "units")]
    activation: Annotated[Literal["gelu", "relu", "silu", "tanh"], Help("Activation between the two matrices.")]
    skip: Annotated[bool, Help("Return h + f(h); false: f(h).")]
    init_std: Annotated[  # at 0 neither matrix would ever get a gradient
        float, POSITIVE, Help("Standard deviation of the first weights; near 0 the adapter starts near the identity.")
    ]

    def check(self, model: nn.Module, grid: Grid) -> None:
        for role in self.roles:
            for name in grid.having(role):
                width = features(model.get_submodule(name))[1]
                if self.size > width:
                    raise UserError(f"method.size={self.size} is no bottleneck behind {name}, which is {width} wide")

    @property
    def trains_b(self) -> bool:
        return False

    def adapt(self, model: nn.Module, grid: Grid, selection: Selection | None, seed: int) -> Adaptation:
        for role in self.roles:
            for name in grid.having(role):
                base = model.get_submodule(name)
                model.set_submodule(name, BottleneckLinear(base, self.size, self.activation, self.skip, self.init_std))
        return Adaptation(model)
