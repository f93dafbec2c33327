"""Random selection: modules by chance, the same sharing as DiffoRA ([D] Table 3's control)."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from diffora.core.dam import adapter_parameters, draw_of_same_size
from diffora.core.grid import Grid
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.methods.selecting import Selecting
from diffora.settings.checks import PATH, SEED, Help

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Random(Selecting):
    """DiffoRA with the search replaced by a draw.

    Attributes:
        draw: which draw; by default the run's seed.
        like: a selection file: draw among the selections with as many adapter parameters as this one.
    """

    name: ClassVar[str] = "random"
    draw: Annotated[int, SEED, Help("Which of all draws; by default the run's seed.")]
    like: Annotated[
        Annotated[str, PATH] | None,
        Help("Draw among the selections that have as many adapter parameters as this selection.json."),
    ]

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
        mask = draw_of_same_size(grid.shapes, pattern.mask(), self.scope, rank, self.rank_elsewhere, self.draw)
        if mask is None:
            raise UserError(f"method.like={self.like}: there is no other selection with as many parameters")
        wanted, has = (adapter_parameters(grid.shapes, m, rank, self.rank_elsewhere) for m in (pattern.mask(), mask))
        if has != wanted:
            log.warning(
                f"method.like={self.like} has {wanted:,} adapter parameters, this draw {has:,}: other shared pairs"
            )
        made = {"selector": "random", "k": pattern.k, "rank": pattern.rank, "rho": self.rho, "seed": seed}
        return Selection.from_mask(grid, mask, method=self.name, **made)
