"""Share-only: all layers share one small pair per module type. This is DiffoRA with K = 0."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from diffora.core.attach import attach
from diffora.core.grid import Grid
from diffora.core.selection import Selection
from diffora.methods.base import Alpha, Method, Rate, check_ranks
from diffora.methods.lowrank import LowRankAdaptation
from diffora.settings.checks import RANK, Help


@dataclass(frozen=True)
class ShareOnly(Method):
    """Weight sharing alone ([D] section 4.3). Its only rank is ``method.shared_rank``."""

    name: ClassVar[str] = "share_only"
    dropout: Rate
    alpha: Alpha
    shared_rank: Annotated[int, RANK, Help("Rank of the pairs that modules share across layers.", "directions")]

    def check(self, model: nn.Module, grid: Grid) -> None:
        check_ranks(grid, {"method.shared_rank": self.shared_rank})

    def choose(self, grid: Grid, scores: Tensor | None, seed: int) -> Selection:
        nothing = torch.zeros(grid.n_layers, grid.n_types, dtype=torch.bool)
        return Selection.from_mask(grid, nothing, method=self.name, selector="none", k=0, rho=0.0, seed=seed)

    def adapt(self, model: nn.Module, grid: Grid, selection: Selection | None, seed: int) -> LowRankAdaptation:
        assert selection is not None
        rank = self.shared_rank
        attach(model, grid.names, selection.mask(), rank, rank, self.alpha, self.dropout, freeze=False)
        return LowRankAdaptation(model)
