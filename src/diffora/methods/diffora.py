"""DiffoRA: search which modules deserve a LoRA, give it to them, share a small one among the rest ([D] section 4)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from torch import nn

from diffora.core.grid import Grid
from diffora.core.parts import part_of
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.methods.base import check_ranks
from diffora.methods.selecting import Selecting
from diffora.settings.checks import PATH, TEXTS, Check, Help, whole

PARTS = Check(lambda v: TEXTS.fits(v) and bool(v), "a list of module types or their parts")


@dataclass(frozen=True)
class DiffoRA(Selecting):
    """Algorithm 1. With ``method.selection`` stage 1 is left out and that selection is used as it is.

    Attributes:
        selection: a selection file, or a list of what to select in every layer: module types, or the parts they play
            (`diffora.core.parts`).
        selector: the search, or another criterion in its place (`diffora.search.criteria`).
        score_batches: over how many batches of search rows ``attribution``, ``gradient`` and ``activation`` are taken.
    """

    name: ClassVar[str] = "diffora"
    selector: Annotated[
        Literal["search", "attribution", "gradient", "activation", "random"], Help("What scores the modules.")
    ]
    score_batches: Annotated[
        int, whole(1), Help("Batches of search rows for `attribution`, `gradient` and `activation`.", "batches")
    ]
    selection: Annotated[
        Annotated[str, PATH] | Annotated[list[str], PARTS] | None,
        Help("Use this selection instead of a search: a selection.json, or a list of modules for every layer."),
    ]
    warm_start: Annotated[bool, Help("Selected modules keep the A and B of the search.")]

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.selection is not None and self.budget is not None:
            yield "method.budget does not go with method.selection, which says already what is selected"
        if self.warm_start and isinstance(self.selection, list):
            yield "method.warm_start=true needs the file of a search, and a list in method.selection has no A and B"
        if self.warm_start and self.selection is None and self.selector not in ("search", "attribution"):
            yield f"method.warm_start=true needs a selector that trains A and B, which {self.selector} does not"
        if self.warm_start and self.budget is not None and self.scope == "layer":
            yield "method.warm_start=true does not go with method.budget, which chooses the rank after the search"

    def check(self, model: nn.Module, grid: Grid) -> None:
        if self.selection is None:
            super().check(model, grid)
            return
        if isinstance(self.selection, list):
            parts = [part for part in map(part_of, grid.types) if part]
            if unknown := set(self.selection).difference(grid.types, parts):
                raise UserError(
                    f"method.selection names {', '.join(sorted(unknown))}; a layer has {', '.join(grid.types)}"
                    + (f", or, by their parts, {', '.join(dict.fromkeys(parts))}" if parts else "")
                )
        selection = self.given(grid, 0)
        mask, from_file = selection.mask(), selection.rank is not None
        check_ranks(grid, {f"{self.selection}: rank" if from_file else "rank": selection.rank or self.rank}, mask)
        if self.weight_sharing:
            check_ranks(grid, {"method.shared_rank": self.shared_rank}, ~mask)
        elif not mask.any():
            raise UserError(
                f"method.selection={self.selection} selects nothing, and method.weight_sharing=false freezes what is "
                "not selected: there is no adapter to train"
            )

    def select(self, grid: Grid, seed: int, find: Callable[[str], Selection]) -> Selection:
        if self.selection is not None:
            return self.given(grid, seed)
        return self.by_chance(grid, seed) if self.selector == "random" else find(self.selector)

    def given(self, grid: Grid, seed: int) -> Selection:
        """What ``method.selection`` selects.

        Raises:
            UserError: the file cannot be read or is of another model.
        """
        if isinstance(self.selection, str):
            chosen = Selection.load(Path(self.selection))
            chosen.check_fits(grid, self.selection)
            return chosen
        assert self.selection is not None
        row = torch.tensor([name in self.selection or part_of(name) in self.selection for name in grid.types])
        made = {"selector": "given", "k": int(row.sum()), "rho": self.rho, "seed": seed}
        return Selection.from_mask(grid, row.expand(grid.n_layers, -1), method=self.name, **made)
