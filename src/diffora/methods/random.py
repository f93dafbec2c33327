"""Random selection: modules by chance, the same sharing as DiffoRA ([D] Table 3's control)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from diffora.core.dam import adapter_parameters
from diffora.core.grid import Grid
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.methods.selecting import Selecting

DRAWS = 20_000


@dataclass(frozen=True)
class Random(Selecting):
    """DiffoRA with the search replaced by a draw.

    Attributes:
        draw: which draw; by default the run's seed.
        like: a selection file: the first draw, from ``draw`` on, that has as many adapter parameters as this one.
    """

    name: ClassVar[str] = "random"
    draw: int
    like: str | None

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.like is not None and self.budget is not None:
            yield "method.like does not go with method.budget: either says how many parameters there are"

    def select(self, grid: Grid, seed: int, find: Callable[[str], Selection]) -> Selection:
        if self.like is None:
            return self.by_chance(grid, self.draw)
        pattern = Selection.load(Path(self.like))
        pattern.check_fits(grid, self.like)
        rank = self.rank if pattern.rank is None else pattern.rank
        mask = same_size(grid.shapes, pattern.mask(), self.scope, rank, self.rank_elsewhere, self.draw)
        if mask is None:
            raise UserError(
                f"method.like={self.like}: none of {DRAWS} draws has as many parameters as this selection, whose "
                "modules are almost all large or almost all small; method.budget= compares at equal size by the rank"
            )
        made = {"selector": "random", "k": pattern.k, "rank": pattern.rank, "rho": self.rho, "seed": seed}
        return Selection.from_mask(grid, mask, method=self.name, **made)


def same_size(
    shapes: Sequence[Sequence[tuple[int, int]]],
    mask: Tensor,
    scope: str,
    rank: int,
    shared_rank: int | None,
    seed: int,
) -> Tensor | None:
    """A selection by chance of exactly as many adapter parameters as ``mask`` has, or None where none was found.

    Each selection of that size, with as many modules (scope ``layer``: in each layer), is equally likely.

    Args:
        shapes: L x N pairs (in_features, out_features).
        mask: boolean L x N.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = adapter_parameters(shapes, mask, rank, shared_rank)
    for _ in range(DRAWS):
        keys = torch.rand(mask.shape if scope == "layer" else (1, mask.numel()), generator=generator)
        drawn = mask.view(keys.shape).gather(-1, keys.argsort(dim=-1)).view(mask.shape)
        if adapter_parameters(shapes, drawn, rank, shared_rank) == wanted:
            return drawn
    return None
