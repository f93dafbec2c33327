"""DiffoRA: selected modules get a LoRA of their own, the others share small ones ([D] section 4)."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from diffora.core.dam import modules_per_layer, provisional_choice
from diffora.core.draws import random_scores
from diffora.core.grid import Grid
from diffora.core.heuristics import BY_LAYER, HEURISTICS, heuristic_problem, heuristic_scores
from diffora.core.parts import part_of, path_of
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.files import file_digest
from diffora.methods.base import Scoring, check_ranks
from diffora.methods.selecting import Selecting, digest_of_selected
from diffora.scoring.selectors import SELECTORS, facts_of
from diffora.scoring.warm_start import weights_file
from diffora.settings.checks import PATH, TEXTS, Check, Help, whole
from diffora.trust import NAME

PARTS = Check(lambda v: TEXTS.fits(v) and bool(v), "a list of module types or their parts")
CHANCE = "random"
WITHOUT_MODEL = (CHANCE, *HEURISTICS)
"""Not selectors of `diffora.scoring.selectors`: `DiffoRA.choose` computes these scores without model or data."""


def _is_selector(value: Any) -> bool:
    return isinstance(value, str) and (value in (*SELECTORS, *WITHOUT_MODEL) or NAME.fullmatch(value) is not None)


SELECTOR = Check(
    _is_selector,
    f"one of {', '.join((*SELECTORS, *WITHOUT_MODEL))}, or the dotted path of a function of your own, as in "
    "module.function",
)


@dataclass(frozen=True)
class DiffoRA(Selecting):
    """[D] Algorithm 1. With ``method.selection`` there is no search, and that selection is used as it is.

    Attributes:
        selector: where the scores come from: ``search`` ([D]), another of `diffora.scoring.selectors`, ``random``, a
            heuristic (`diffora.core.heuristics`), or the dotted path of the user's own function.
        score_batches: the number of batches of search rows for selectors that read them, except ``search``; at most one
            pass.
        selection: a selection file, or a list of the modules to select in every layer: module types, or parts such as
            ``key`` (`diffora.core.parts`).
        warm_start: selected modules start fine-tuning with the A and B of the search.
    """

    name: ClassVar[str] = "diffora"
    selector: Annotated[str, SELECTOR, Help("What scores the modules.")]
    score_batches: Annotated[
        int, whole(1), Help("Batches of search rows, for selectors that read them and are not `search`.", "batches")
    ] = field(default=16, kw_only=True)
    selection: Annotated[
        Annotated[str, PATH] | Annotated[list[str], PARTS] | None,
        Help("Use this selection instead of a search: a selection.json, or a list of modules for every layer."),
    ]
    warm_start: Annotated[bool, Help("Selected modules keep the A and B of the search.")]

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.selection is not None and self.budget is not None:
            yield "method.budget does not go with method.selection, which already says what is selected"
        if self.selection is not None and self.time_budget is not None:
            yield "method.time_budget does not go with method.selection, which already says what is selected"
        if self.adapter is not None and (self.selection is not None or self.warm_start):
            key = "selection" if self.selection is not None else "warm_start"
            yield f"method.{key} does not go with method.adapter, which has its own selection and weights"
            return
        if self.warm_start and isinstance(self.selection, list):
            yield "method.warm_start=true needs the file of a search, and a list in method.selection has no A and B"
        if self.warm_start and self.selection is None and not facts_of(self.selector).trains:
            yield f"method.warm_start=true needs a selector that trains A and B, which {self.selector} does not"
        if self.selection is None and self.selector in HEURISTICS:
            if self.selector in BY_LAYER and self.scope == "layer":
                yield f"method.selector={self.selector} selects whole layers, so it needs method.scope=global"
            if self.budget is not None and self.scope == "global":
                yield (
                    f"method.selector={self.selector} does not go with method.scope=global and method.budget, which "
                    "chooses the number of modules: the rule gives this number"
                )
        if self.warm_start and self.budget is not None and self.scope == "layer":
            yield "method.warm_start=true does not go with method.budget, which chooses the rank after the search"

    def check(self, model: nn.Module, grid: Grid) -> None:
        if self.selection is None:
            super().check(model, grid)
            if self.selector in HEURISTICS and self.adapter is None:
                self._check_heuristic(grid)
            if self.scoring is not None and self.selector == "one_shot" and self._has_one_selection(grid):
                by_rho = self.budget is None or self.scope == "layer"
                key, value = ("rho", self.rho) if by_rho else ("method.budget", self.budget)
                raise UserError(
                    f"method.selector=one_shot compares random selections, but {key}={value} allows only one: choose a "
                    "value that selects some modules and leaves out others"
                )
            return
        if isinstance(self.selection, list):
            parts = [part for part in map(part_of, grid.types) if part]
            paths = list(dict.fromkeys(map(path_of, grid.types)))
            if unknown := set(self.selection).difference(grid.types, paths, parts):
                raise UserError(
                    f"method.selection names {', '.join(sorted(unknown))}; a layer has {', '.join(paths)}"
                    + (f", or, by their parts, {', '.join(dict.fromkeys(parts))}" if parts else "")
                )
        selection = self.given(grid, 0)
        mask, from_file = selection.mask(), selection.rank is not None
        check_ranks(grid, {f"{self.selection}: rank" if from_file else "rank": selection.rank or self.rank}, mask)
        if self.weight_sharing:
            check_ranks(
                replace(grid, lowest_layer=selection.lowest_layer).allowed,
                {"method.shared_rank": self.shared_rank},
                ~mask,
            )
        elif not mask.any():
            raise UserError(
                f"method.selection={self.selection} selects nothing, and method.weight_sharing=false freezes what is "
                "not selected: there is no adapter to train"
            )

    def _has_one_selection(self, grid: Grid) -> bool:
        """Whether the selection is the same for all scores."""
        scores = random_scores(grid.n_layers, grid.n_types, 0)
        with provisional_choice():
            first, last = (self.selection_by(grid, sign * scores, self.selector, 0).mask() for sign in (1, -1))
        return first.equal(last)

    @property
    def scoring(self) -> Scoring | None:
        if self.selection is not None or self.adapter is not None or self.selector in WITHOUT_MODEL:
            return None
        return Scoring(self.selector, self.alpha, self.score_batches, self.warm_start, self.scope)

    def choose(self, grid: Grid, scores: Tensor | None, seed: int) -> Selection:
        if (found := self.selection_of_start(grid, seed)) is not None:
            return found
        if self.selection is not None:
            return self.given(grid, seed)
        if self.selector == CHANCE:
            scores = random_scores(grid.n_layers, grid.n_types, seed)
        elif self.selector in HEURISTICS:
            scores = heuristic_scores(self.selector, grid)
        assert scores is not None, "`scoring` asks for them"
        return self.selection_by(grid, scores, self.selector, seed)

    def _check_heuristic(self, grid: Grid) -> None:
        """Raise a UserError if rho divides modules that the heuristic does not tell apart."""
        allowed = grid.allowed

        def counts(rho: float) -> list[int]:
            if self.scope == "layer":
                return [modules_per_layer(rho, size) for size in allowed.sizes]
            return [min(modules_per_layer(rho, grid.n_modules), allowed.n_modules)]

        scores = heuristic_scores(self.selector, grid).masked_fill(~allowed.present, float("nan"))
        steps = [step / 100 for step in range(1, 100)] + [step / 1000 for step in range(1, 1000)]
        choices = ((f"rho={rho:g}", counts(rho)) for rho in steps)
        if problem := heuristic_problem(scores, counts(self.rho), choices):
            raise UserError(f"method.selector={self.selector}: rho={self.rho} {problem}")

    @property
    def inputs(self) -> dict[str, str]:
        found = super().inputs | digest_of_selected("method.selection", self.selection)
        if found and self.warm_start and isinstance(self.selection, str):
            file = weights_file(Path(self.selection).expanduser())
            found |= {"method.warm_start": file_digest(file)} if file.is_file() else {}
        return found

    def given(self, grid: Grid, seed: int) -> Selection:
        """The selection that ``method.selection`` names.

        Raises:
            UserError: the file cannot be read, or was made for another model.
        """
        if isinstance(self.selection, str):
            chosen = Selection.load(self.selection)
            chosen.check_fits(grid, self.selection)
            return chosen
        assert self.selection is not None
        row = torch.tensor(
            [bool({name, path_of(name), part_of(name)}.intersection(self.selection)) for name in grid.types]
        )
        mask = row.expand(grid.n_layers, -1) & grid.present
        counts = set(mask.sum(-1).tolist())
        made = {"selector": "given", "k": counts.pop() if len(counts) == 1 else None, "rho": self.rho, "seed": seed}
        return Selection.from_mask(grid, mask, method=self.name, **made)
