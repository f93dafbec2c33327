"""What the methods that select modules have in common: scope, budget, and the adapters of what is selected and not."""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import compress
from typing import Annotated, Any, Literal

from torch import Tensor, nn

from diffora.core.dam import (
    discretise,
    discretise_globally,
    extreme_adapter_parameters,
    largest_prefix,
    largest_rank,
    modules_per_layer,
)
from diffora.core.grid import Grid
from diffora.core.lowrank import attach
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.methods.base import Alpha, Method, Rank, Rate, check_ranks
from diffora.methods.lowrank import LowRankAdaptation, Mask, Regulariser
from diffora.search.criteria import random_scores
from diffora.settings.checks import RANK, SHARE_OF_MODULES, Check, Help, is_int, show

log = logging.getLogger(__name__)


def parse_budget(text: int | str) -> int:
    """A number of parameters: 350000, ``350k`` or ``0.35M``, taken as the decimal that was written, rounded down.

    Raises:
        ValueError: it is none, or not above 0.
    """
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]+)?)([kM]?)", str(text).strip())
    budget = int(Decimal(match[1]) * {"": 1, "k": 1_000, "M": 1_000_000}[match[2]]) if match else 0
    if budget < 1:
        raise ValueError(f"method.budget={show(text)} must be {BUDGET.words}")
    return budget


def _is_budget(value: Any) -> bool:
    try:
        return (is_int(value) or isinstance(value, str)) and parse_budget(value) > 0
    except ValueError:
        return False


BUDGET = Check(_is_budget, "a number of parameters above 0, such as 350000, 350k or 0.35M")


@dataclass(frozen=True)
class Selecting(Method):
    """Common to the methods that select modules and share or freeze the rest.

    Attributes:
        scope: select the K = floor(rho N) best of each ``layer`` (eq. 14), or the floor(rho N L) best of all.
        budget: most adapter parameters. With scope ``layer`` it chooses the rank, with ``global`` how many modules.
    """

    rank: Rank
    rho: Annotated[float, SHARE_OF_MODULES]
    dropout: Rate
    alpha: Alpha
    weight_sharing: Annotated[bool, Help("Give unselected modules small shared pairs; false: they stay frozen.")]
    shared_rank: Annotated[int, RANK, Help("Rank of the pairs that unselected modules share.", "directions")]
    scope: Annotated[
        Literal["layer", "global"],
        Help("Select the best K = floor(ρ N) modules of each layer, or the best floor(ρ N L) of the whole model."),
    ]
    budget: Annotated[
        Annotated[int | str, BUDGET] | None,
        Help("Most adapter parameters: chooses the rank (`scope=layer`) or the number of modules (`scope=global`)."),
    ]
    regulariser: Annotated[Regulariser, Help("R-LoRA's penalty on the adapters.")]
    mask: Annotated[Mask, Help("GM-LoRA's masks on the adapters.")]

    def problems(self) -> Iterator[str]:
        # A budget chooses the rank; adapters of fewer directions than the mask has are trained whole.
        yield from self.mask.problems(None if self.budget is not None and self.scope == "layer" else self.rank)

    def adapt(self, model: nn.Module, grid: Grid, selection: Selection | None, seed: int) -> LowRankAdaptation:
        """Algorithm 1, line 11: own pairs of rank r where selected, shared ones of rank r_s elsewhere (or frozen)."""
        assert selection is not None
        if self.rank_elsewhere is None and not any(selection.selected):
            raise UserError("nothing is selected and method.weight_sharing=false: there is no adapter to train")
        rank = self.rank if selection.rank is None else selection.rank
        elsewhere = self.rank_elsewhere
        attach(model, grid.names, selection.mask(), rank, elsewhere, self.alpha, self.dropout, freeze=False)
        return LowRankAdaptation(model, self.regulariser, self.mask, seed)

    @property
    def rank_elsewhere(self) -> int | None:
        """r_s, or None where unselected modules stay frozen ([D] Table 5)."""
        return self.shared_rank if self.weight_sharing else None

    @property
    def limit(self) -> int | None:
        """The budget as a number."""
        return None if self.budget is None else parse_budget(self.budget)

    def size(self, grid: Grid) -> int:
        """How many modules of the grid are selected where no budget decides it: K L, or floor(rho N L)."""
        if self.scope == "layer":
            return modules_per_layer(self.rho, grid.n_types) * grid.n_layers
        return modules_per_layer(self.rho, grid.n_types * grid.n_layers)

    def check(self, model: nn.Module, grid: Grid) -> None:
        """Refuse, before anything is searched, a budget that some outcome of the search could not keep to.

        Raises:
            UserError: names the budget and the least that would do; or no module can be selected, and none shares.
        """
        ranks = {} if self.limit is not None and self.scope == "layer" else {"rank": self.rank}
        check_ranks(grid, ranks | ({"method.shared_rank": self.shared_rank} if self.weight_sharing else {}))
        if (self.scope == "layer" or self.limit is None) and self.size(grid) in (0, grid.n_layers * grid.n_types):
            log.warning(
                f"rho={self.rho} selects {'all' if self.size(grid) else 'none'} of the modules: whatever the "
                "scores are, the selection is the same"
            )
        if self.limit is None:
            if self.rank_elsewhere is None and self.size(grid) == 0:
                raise UserError(
                    f"rho={self.rho} selects none of the {grid.n_types} modules of a layer, and "
                    "method.weight_sharing=false freezes the others: there is no adapter to train"
                )
            return
        if self.scope == "layer":
            least = extreme_adapter_parameters(grid.shapes, 1, self.rank_elsewhere)[1][self.size(grid)]
            why = f"those of the dearest selection at rho={self.rho} and rank 1"
        else:  # the first and the last size are the same whatever the scores are
            counts, _ = extreme_adapter_parameters(grid.shapes, self.rank, self.rank_elsewhere)
            least, why = min(counts[0], counts[-1]), "those of no module selected, or of every one"
            if self.rank_elsewhere is None:
                least = self.rank * max(sum(shape) for row in grid.shapes for shape in row)
                why = f"those of the dearest module at rank={self.rank}, so that at least one is selected"
        if self.limit < least:
            raise UserError(
                f"method.budget={self.budget} is too small: {least} parameters are the least that would do, {why}"
            )

    def choose(self, grid: Grid, scores: Tensor) -> tuple[Tensor, int | None, int | None]:
        """Turn scores into a selection, by scope and budget.

        Args:
            scores: L x N, high is good; for the search the relaxed DAM.

        Returns:
            (boolean L x N, K or None where it differs between layers, rank or None where the budget does not choose it)
        """
        if self.scope == "global":
            size: int | None = self.size(grid)
            if self.limit is not None:
                size = largest_prefix(grid.shapes, scores, self.rank, self.rank_elsewhere, self.limit)
            assert size is not None, "`check` comes first"
            return discretise_globally(scores, size), None, None
        k = modules_per_layer(self.rho, grid.n_types)
        mask = discretise(scores, k)
        rank = None if self.limit is None else largest_rank(grid.shapes, mask, self.rank_elsewhere, self.limit)
        widths = [min(shape) for row, flags in zip(grid.shapes, mask, strict=True) for shape in compress(row, flags)]
        if rank is not None and rank > min(widths):
            rank = min(widths)
            log.warning(f"method.budget={self.budget} allows more than rank {rank}, the width of a selected module")
        return mask, k, rank

    def selection_by(self, grid: Grid, scores: Tensor, selector: str, seed: int, **provenance: Any) -> Selection:
        """`choose`, with its reasons. ``provenance`` are further fields of the `Selection`."""
        mask, k, rank = self.choose(grid, scores)
        kept = {"gamma_bar" if selector == "search" else "scores": scores.tolist()}
        made = {"method": self.name, "selector": selector, "k": k, "rank": rank, "rho": self.rho, "seed": seed}
        return Selection.from_mask(grid, mask, **made, **kept, **provenance)

    def by_chance(self, grid: Grid, seed: int) -> Selection:
        """The selection of selector ``random``, which needs neither model nor data."""
        return self.selection_by(grid, random_scores(grid.n_layers, grid.n_types, seed), "random", seed)
