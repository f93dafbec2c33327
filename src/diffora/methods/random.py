"""Random selection, with the same sharing as DiffoRA: the control of [D] Table 3."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from torch import Tensor

from diffora.core.counts import above, adapter_parameters
from diffora.core.draws import draw_of_same_size, draw_of_same_types, random_scores
from diffora.core.grid import Grid
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.methods.selecting import Selecting, digest_of_selected
from diffora.settings.checks import PATH, SEED, Help

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Random(Selecting):
    """DiffoRA with a random draw in place of the search.

    Attributes:
        draw: seed of the draw; by default the run's seed.
        like: a selection file; the draw has as many adapter parameters as that selection (`draw_of_same_size`).
        keep: what else a draw like a selection keeps: ``size``, nothing more; ``types``, the number of modules of each
            type, so that only the layers change (`draw_of_same_types`).
    """

    name: ClassVar[str] = "random"
    draw: Annotated[int, SEED, Help("Seed of the draw; by default the run's seed.")]
    like: Annotated[
        Annotated[str, PATH] | None,
        Help("Draw among the selections that have as many adapter parameters as this selection.json."),
    ]
    keep: Annotated[
        Literal["size", "types"],
        Help("With `like`: keep the number of parameters, or also the number of modules of each type."),
    ]

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.like is not None and self.budget is not None:
            yield "method.like does not go with method.budget: both fix the number of parameters"
        if self.like is None and self.keep != "size":
            yield f"method.keep={self.keep} needs method.like, the selection whose types it keeps"
        if self.keep == "types" and self.scope == "layer":
            yield "method.keep=types needs method.scope=global: layers can get different numbers of modules"
        if self.like is not None and self.time_budget is not None:
            yield "method.like does not go with method.time_budget: both say which layers may have adapters"
        if self.like is not None and self.adapter is not None:
            yield "method.like does not go with method.adapter, which has its own selection"

    @property
    def inputs(self) -> dict[str, str]:
        return super().inputs | digest_of_selected("method.like", self.like)

    def choose(self, grid: Grid, scores: Tensor | None, seed: int) -> Selection:
        if (found := self.selection_of_start(grid, seed)) is not None:
            return found
        if self.like is None:
            drawn = random_scores(grid.n_layers, grid.n_types, self.draw)
            return self.selection_by(grid, drawn, "random", self.draw)
        pattern = Selection.load(self.like)
        pattern.check_fits(grid, self.like)
        rank = self.rank if pattern.rank is None else pattern.rank
        shapes = above(grid.shapes, pattern.lowest_layer)
        if self.keep == "types":
            mask = draw_of_same_types(shapes, pattern.mask(), self.draw)
        else:
            mask = draw_of_same_size(shapes, pattern.mask(), self.scope, rank, self.rank_elsewhere, self.draw)
        if mask is None:
            as_many = "as many modules of each type" if self.keep == "types" else "as many parameters"
            raise UserError(f"method.like={self.like}: no other selection has {as_many}")
        wanted, has = (adapter_parameters(shapes, m, rank, self.rank_elsewhere) for m in (pattern.mask(), mask))
        if has != wanted:
            log.warning(
                f"method.like={self.like} has {wanted:,} adapter parameters, this draw {has:,}: other pairs are shared"
            )
        made = {"selector": "random", "k": pattern.k, "rank": pattern.rank, "rho": self.rho, "seed": seed}
        made["lowest_layer"] = pattern.lowest_layer
        return Selection.from_mask(grid, mask, method=self.name, **made)
