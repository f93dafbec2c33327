"""The base class of the methods that select modules: scope, budgets, and adapters for all modules."""

import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from torch import Tensor, nn

from diffora.core.attach import attach
from diffora.core.choose import choose
from diffora.core.counts import extreme_adapter_parameters, extremes_by_layer
from diffora.core.dam import modules_per_layer
from diffora.core.grid import Grid
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.files import json_digest
from diffora.methods.base import Alpha, Rank, Rate, check_ranks
from diffora.methods.lowrank import Continuing, LowRankAdaptation, Mask, Regulariser
from diffora.settings.checks import RANK, SHARE_OF_MODULES, Check, Help, is_int, number, show

log = logging.getLogger(__name__)


def parse_budget(text: int | str) -> int:
    """A number of parameters from 350000, ``350k`` or ``0.35M``: exact decimal arithmetic, rounded down.

    Raises:
        ValueError: the text is not such a number, or the number is 0.
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


SHARE_OF_TIME = number(
    lambda v: 0 < v <= 1, "a number above 0, at most 1: a share of the time of a step with LoRA on all modules"
)
BUDGET = Check(_is_budget, "a number of parameters above 0, such as 350000, 350k or 0.35M")


def digest_of_selected(key: str, file: object) -> dict[str, str]:
    """For `Method.inputs`: the digest of what a selection file selects. Empty for other values, or without the file."""
    if not isinstance(file, str) or not Path(file).expanduser().is_file():
        return {}
    found = Selection.load(file)
    return {key: json_digest([found.selected, found.rank, found.lowest_layer])}


@dataclass(frozen=True)
class Selecting(Continuing):
    """Selected modules get a LoRA of their own. The others share pairs, or stay frozen.

    Attributes:
        scope: ``layer``: select the K = floor(rho N) best of each layer ([D] eq. 14); ``global``: the floor(rho N L)
            best of all layers together.
        shared_scale: ``own``: shared pairs are scaled by alpha / r_s; ``same``: by alpha / r, as selected modules are.
        budget: most adapter parameters. It chooses the rank (scope ``layer``) or the number of modules (``global``).
        time_budget: the largest share that a training step may take of the time of a step with LoRA on all candidate
            modules. It decides `Grid.lowest_layer` (`diffora.run.steptime`).
        time_from: ``model``: floating-point operations from shapes; ``measured``: timed steps on the training device.
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
    time_budget: Annotated[
        Annotated[float, SHARE_OF_TIME] | None,
        Help(
            "Largest share of the time of a step with LoRA on all modules: only layers from some layer on get "
            "adapters, because the backward pass stops below the lowest one."
        ),
    ] = field(default=None, kw_only=True)
    time_from: Annotated[
        Literal["model", "measured"],
        Help("Where the times of steps come from: counted operations (`model`), or some timed steps (`measured`)."),
    ] = field(default="model", kw_only=True)
    regulariser: Annotated[Regulariser, Help("R-LoRA's penalty on the adapters.")]
    mask: Annotated[Mask, Help("GM-LoRA's masks on the adapters.")]
    shared_scale: Annotated[
        Literal["own", "same"],
        Help("Scale of shared pairs: alpha / shared_rank (`own`), or alpha / rank as selected modules have (`same`)."),
    ] = field(default="own", kw_only=True)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        # With a budget or an adapter the rank is not known yet. If it is smaller than the mask's rank, nothing is
        # masked.
        known = self.adapter is None and (self.budget is None or self.scope != "layer")
        yield from self.mask.problems(self.rank if known else None)
        if self.shared_scale == "same" and not self.weight_sharing:
            yield "method.shared_scale=same needs method.weight_sharing=true: without it there are no shared pairs"
        if self.shared_scale == "same" and self.adapter is not None:
            yield "method.shared_scale=same does not go with method.adapter, which has its own scales"
        if self.adapter is not None and self.budget is not None:
            yield "method.budget does not go with method.adapter, which already says what is adapted"
        if self.adapter is not None and self.time_budget is not None:
            yield "method.time_budget does not go with method.adapter, which already says what is adapted"
        if self.time_budget is None and self.time_from != "model":
            yield f"method.time_from={self.time_from} needs method.time_budget"

    def adapt(self, model: nn.Module, grid: Grid, selection: Selection | None, seed: int) -> LowRankAdaptation:
        """[D] Algorithm 1, line 11: a pair of rank r for each selected module.

        Unselected modules of one type and shape share a pair of rank r_s, or are frozen. Below the selection's lowest
        layer, all are frozen. The paper does not say if shared pairs are scaled by alpha / r_s or alpha / r:
        ``shared_scale`` does.
        """
        assert selection is not None
        if (start := self.start()) is not None:
            start.put_on(model, self.dropout)
            return LowRankAdaptation(model, self.regulariser, self.mask, seed)
        if self.rank_elsewhere is None and not any(selection.selected):
            raise UserError("nothing is selected and method.weight_sharing=false: there is no adapter to train")
        rank = self.rank if selection.rank is None else selection.rank
        numbers = (rank, self.rank_elsewhere, self.alpha, self.dropout)
        attach(model, selection.places(), selection.mask(), *numbers, freeze=False, shared_scale=self.shared_scale)
        return LowRankAdaptation(model, self.regulariser, self.mask, seed)

    @property
    def rank_elsewhere(self) -> int | None:
        """r_s, or None if unselected modules stay frozen ([D] Table 5)."""
        return self.shared_rank if self.weight_sharing else None

    @property
    def limit(self) -> int | None:
        """The budget as a number."""
        return None if self.budget is None else parse_budget(self.budget)

    def size(self, grid: Grid) -> int:
        """The number of selected modules, K L or floor(rho N L). With scope ``global``, a budget overrides it.

        Only layers that may have adapters count. With scope ``global`` as many modules are selected as without a time
        budget, or all that are left.
        """
        if self.scope == "layer":
            return sum(modules_per_layer(self.rho, size) for size in grid.allowed.sizes)
        return min(modules_per_layer(self.rho, grid.n_modules), grid.allowed.n_modules)

    def check(self, model: nn.Module, grid: Grid) -> None:
        """Refuse, before the search, a budget that some selection would exceed, and ranks above a module's width.

        Raises:
            UserError: the budget is too small (the message names the smallest possible one), or there would be nothing
                to train, because no module is selected and the others are frozen.
        """
        if (start := self.start()) is not None:
            start.check(model)
            return
        ranks = {} if self.limit is not None and self.scope == "layer" else {"rank": self.rank}
        check_ranks(grid.allowed, ranks | ({"method.shared_rank": self.shared_rank} if self.weight_sharing else {}))
        size, allowed = self.size(grid), grid.allowed
        if (self.scope == "layer" or self.limit is None) and size in (0, allowed.n_modules):
            within = f" from layer {grid.lowest_layer + 1} on" if grid.lowest_layer else ""
            log.warning(
                f"rho={self.rho} selects {'all' if size else 'none'} of the modules{within}: the selection does not "
                "depend on the scores"
            )
        if self.limit is None:
            if self.rank_elsewhere is None and size == 0:
                raise UserError(
                    f"rho={self.rho} selects none of the {max(grid.sizes)} modules of a layer, and "
                    "method.weight_sharing=false freezes the others: there is no adapter to train"
                )
            return
        if self.scope == "layer":
            counts = [modules_per_layer(self.rho, n) for n in allowed.sizes]
            least = extremes_by_layer(allowed.shapes, counts, 1, self.rank_elsewhere)[1]
            why = f"which the largest selection at rho={self.rho} has at rank 1"
        else:  # with no module or every module selected, the count does not depend on the scores
            fewest, _ = extreme_adapter_parameters(allowed.shapes, self.rank, self.rank_elsewhere)
            least, why = min(fewest[0], fewest[-1]), "with no module selected, or with all of them"
            if self.rank_elsewhere is None:
                least = self.rank * max(sum(shape or ()) for row in allowed.shapes for shape in row)
                why = f"which the largest module has at rank={self.rank}, so that at least one is selected"
        if self.limit < least:
            raise UserError(
                f"method.budget={self.budget} is too small: {least} parameters are the least that would do, {why}"
            )

    def selection_of_start(self, grid: Grid, seed: int) -> Selection | None:
        """The selection of the adapter that training goes on from; None without one."""
        start = self.start()
        return None if start is None else start.selection(grid, method=self.name, rho=self.rho, seed=seed)

    def selection_by(self, grid: Grid, scores: Tensor, selector: str, seed: int) -> Selection:
        """Select by scores (L x N, high is good) with scope, rho and budgets (`diffora.core.choose.choose`).

        Warns (`UserWarning`) of ties at the threshold, and of a budget that allows more than a module's full rank.

        Args:
            selector: where the scores come from. Scores of ``search`` are stored as ``gamma_bar``.
            seed: of the run, or of the draw.
        """
        settings = self.scope, self.rho, self.rank, self.rank_elsewhere, self.limit
        choice = choose(scores, grid.shapes, *settings, grid.lowest_layer)
        if choice.rank_at_width:
            warnings.warn(
                f"method.budget={self.budget} allows more than rank {choice.rank}, the width of a selected module",
                stacklevel=2,
            )
        kept = {"gamma_bar" if selector == "search" else "scores": scores.tolist()}
        made = {"method": self.name, "selector": selector, "rho": self.rho, "seed": seed}
        return Selection.from_mask(grid, choice.mask, k=choice.k, rank=choice.rank, **made, **kept)
