"""The selections that the runs of a setting made, from their files, and how far they agree."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffora.core.certainty import certainty
from diffora.core.picture import start_gate
from diffora.report.agreement import Stability, stability
from diffora.report.results import ResultCell
from diffora.report.runs import Run


@dataclass(frozen=True)
class Selected:
    """A run's selection.

    Attributes:
        seed: of the search or the draw that made it.
        mask: boolean, L x N.
        types: the N module types.
        gamma_bar: the relaxed DAM, L x N, NaN where a layer has no such module; None if there is none.
        relaxation: how the search relaxed Γ.
        present: boolean, L x N, which layer has a module of which type.
        scope: of the method, ``layer`` or ``global``; None for a method without one.
        lowest_layer: of a time budget; 0 without one.
        confidence: L x N of an ensemble, NaN where a layer has no such module; None without one.
        certainty: how many modules are decided, in words; empty without a confidence.
        given: whether it is a list in the settings.
    """

    seed: int
    mask: np.ndarray
    types: list[str]
    gamma_bar: np.ndarray | None
    relaxation: str
    present: np.ndarray
    scope: object
    lowest_layer: int = 0
    confidence: np.ndarray | None = None
    certainty: str = ""
    given: bool = False

    @property
    def tied(self) -> bool:
        """Whether some of several modules with equal gates were selected, so that the order of the modules decided."""
        if self.gamma_bar is None:
            return False
        parts = [(self.gamma_bar, self.mask, self.present)]
        if self.scope != "global":
            parts = list(zip(*parts[0], strict=True))
        pairs = [(gates[mask & present], gates[~mask & present]) for gates, mask, present in parts]
        return any(bool(chosen.size and left.size and chosen.min() == left.max()) for chosen, left in pairs)


def selections(cell: ResultCell) -> dict[int, Selected]:
    """The selection of each seed; empty if the files do not say, or are for different modules."""
    files = {seed: found for seed, run in cell.runs.items() if (found := _read(run)) is not None}
    kinds = {(found.mask.shape, found.relaxation, *found.types) for found in files.values()}
    return files if len(kinds) == 1 else {}


def _read(run: Run) -> Selected | None:
    """The selection in the run's file, or without the file the one in its record; None if neither can be used."""
    content = run.read("selection.json")
    try:
        return _selected(run, _from_record(run) if content is None else content)
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError):  # the files may be damaged, or anybody's
        return None


def _from_record(run: Run) -> dict[str, Any]:
    """What the record says: the names of the selected modules of each layer. The settings name the types.

    Without them, the types that were never selected would be missing, and chance would be another.
    """
    return {"selected": run.record.selection["selected"], "types": run.config["model.candidates"]}


def _selected(run: Run, content: Mapping[str, Any]) -> Selected:
    """The content of a selection file as arrays.

    Raises:
        ValueError, TypeError, KeyError and others: the content does not fit together.
    """
    types = [str(name) for name in content["types"]]
    if not {name for layer in content["selected"] for name in layer} <= set(types):
        raise ValueError("a module is of none of the types")
    mask = np.array([[name in layer for name in types] for layer in content["selected"]], dtype=bool)
    modules = content.get("modules") or [types] * len(mask)
    present = np.array([[name is not None for name in layer] for layer in modules], dtype=bool)
    if mask.ndim != 2 or not mask.size or present.shape != mask.shape or not present.any(-1).all():
        raise ValueError("no L x N grid with a module in each layer")
    relaxation = content.get("relaxation") or "softmax"
    start_gate(relaxation, 1)  # a KeyError if there is no such relaxation
    gamma_bar, confidence = content.get("gamma_bar"), content.get("confidence")
    lowest, words = int(content.get("lowest_layer") or 0), ""
    if gamma_bar is not None:
        gamma_bar = _of_modules(gamma_bar, present)
    if confidence is not None:
        words = certainty(confidence[lowest:], int(content["ensemble"]))
        confidence = _of_modules(confidence, present)
        if not ((confidence >= 0) & (confidence <= 1))[present].all():
            raise ValueError("a probability outside 0 to 1")
    # With method.like, the file has the run's seed, and only the settings have the number of the draw.
    seeds = run.config.get("method.draw"), content.get("seed")
    return Selected(
        seed=next((number for number in seeds if isinstance(number, int)), run.seed),
        mask=mask,
        types=types,
        gamma_bar=gamma_bar,
        relaxation=relaxation,
        present=present,
        scope=run.config.get("method.scope"),
        lowest_layer=lowest,
        confidence=confidence,
        certainty=words,
        given=run.record.selection.get("selector") == "given",
    )


def _of_modules(content: Any, present: np.ndarray) -> np.ndarray:
    """One number for each module of the grid, L x N, NaN where there is none; a ValueError if the content is not so."""
    values = numbers(content)
    if values.shape != present.shape or (np.isnan(values) != ~present).any():
        raise ValueError("not one number for each module")
    return values


def numbers(content: Any) -> np.ndarray:
    """Lists of numbers as an array, NaN for null; a ValueError unless all can be drawn: at most 1e100 in size."""
    values = np.array(content, dtype=float)
    null = np.array([value is None for value in np.array(content, dtype=object).flat], dtype=bool).reshape(values.shape)
    if not ((np.abs(values) <= 1e100) | null).all():
        raise ValueError("not all are finite")
    return values


def agreement(files: Mapping[int, Selected]) -> Stability | None:
    """How far the selections of the seeds agree; None if they are fewer than two, or a list in the settings.

    Selections that a tie decided do not count: they agree because the modules have one order.

    Random selections keep the size of each layer if all selections have the same sizes, unless they are global ones.
    They have no modules below the lowest layer of a time budget.
    """
    files = {seed: found for seed, found in files.items() if not found.tied}
    if not files or any(found.given for found in files.values()):
        return None
    # Several runs may use the selection of one search. It agrees with itself, so it must count once.
    masks = np.array(list({(found.seed, found.mask.tobytes()): found.mask for found in files.values()}.values()))
    first = next(iter(files.values()))
    counts, lowest = masks.sum(-1), min(found.lowest_layer for found in files.values())
    by_layer = first.scope != "global" and bool((counts == counts[0]).all())
    return stability(masks, by_layer, first.present & (np.arange(len(first.present)) >= lowest)[:, None])
