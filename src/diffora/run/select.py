"""The selection stage of a run: runs the method's selector, lets the method choose modules, and writes both.

Files in the run directory: ``selection.json`` and its picture ``dam.png``; after a search also ``trajectory.json`` and
``gamma.png`` (the gates over the rounds), with ``method.warm_start`` ``selection.safetensors`` (the searched A and B),
with ``search.ensemble`` ``members.json`` (seed, seconds, scores and modules of each member), and ``search.json``, which
says that the search is finished.
"""

import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from diffora.core.dam import provisional_choice
from diffora.core.ensemble import SAME_SCORES, confidence
from diffora.core.grid import blanked
from diffora.core.selection import Selection
from diffora.files import write_text
from diffora.loop.loggers import Loggers, taking_pictures
from diffora.loop.parts import Parts
from diffora.loop.process import is_main
from diffora.loop.resume import write_search
from diffora.methods.base import Method, Scoring
from diffora.methods.diffora import DiffoRA
from diffora.run import figures
from diffora.run.unread import unread
from diffora.scoring.bilevel import SearchModule
from diffora.scoring.context import Member, SearchContext, SearchResult
from diffora.scoring.selectors import facts_of
from diffora.scoring.stage import run_search, search_rows
from diffora.scoring.warm_start import load_weights, save_weights, warm_start, weights_file
from diffora.tasks.account import lines as account_lines

log = logging.getLogger(__name__)

FILE = "selection.json"


@dataclass(frozen=True)
class Selected:
    """What the selection stage passes to fine-tuning.

    Attributes:
        selection: None for a method that selects nothing.
        seconds: of the search; 0 without one.
        weights: A and B that the search ended with, by name; None if this process did not search.
    """

    selection: Selection | None
    seconds: float = 0.0
    weights: Mapping[str, Tensor] | None = None


def select(parts: Parts, method: Method, loggers: Loggers) -> Selected:
    """The method's selection. Runs a search if the method needs scores. Writes the selection to the run directory."""
    scoring = method.scoring
    for line in unread(parts.settings):
        log.warning(line)
    if scoring is None:
        found = Selected(_chosen(parts, method, None))
        if found.selection is not None and is_main():
            found.selection.save(parts.folder / FILE)
    else:
        found = _searched(parts, method, scoring, loggers)
    if found.selection is not None and is_main():
        figures.save_png(parts.folder / "dam.png", figures.dam_heatmap(found.selection))
    return found


def _searched(parts: Parts, method: Method, scoring: Scoring, loggers: Loggers) -> Selected:
    """The selection from a selector's scores, or from the finished search of an earlier attempt."""
    rows = search_rows(parts)
    parts.data.accounts["search"] = rows.account.record()
    if facts_of(scoring.selector).reads_rows:
        for line in account_lines({"search": parts.data.accounts["search"]}):
            log.warning(line)
    if parts.earlier.search is not None:
        log.info(f"{scoring.selector}: finished already, using {parts.folder / FILE}")
        return Selected(*parts.earlier.search)

    def choose(scores: Tensor) -> Selection:
        made = method.choose(parts.grid, scores, parts.settings.seed)
        assert made is not None, "a method with a selector makes a selection"
        return made

    pictures = [DamPictures(choose, loggers)]
    context = SearchContext(parts, rows.split, scoring.alpha, scoring.score_batches, choose, loggers, pictures)
    result = run_search(context, scoring.selector, scoring.scope)
    chosen = _chosen(parts, method, result.scores)
    assert chosen is not None
    found = replace(chosen.read_from(result.readout), relaxation=result.relaxation, facts=result.facts)
    selection = replace(found, rounds=result.rounds, split_hash=rows.hash, config=_provenance(parts))
    if result.members:
        selection = _with_confidence(parts, method, selection, result)
    if is_main():
        _save(parts, method, result, selection, scoring.keep_weights)
    return Selected(selection, result.seconds, result.weights)


def _chosen(parts: Parts, method: Method, scores: Tensor | None) -> Selection | None:
    """The result of `Method.choose`. Its warnings, such as those of ties, go to the log."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        selection = method.choose(parts.grid, scores, parts.settings.seed)
    for warning in told:
        log.warning(str(warning.message))
    return selection


def _provenance(parts: Parts) -> dict[str, object]:
    settings = parts.settings
    of = {"task": settings.task.name, "model": settings.model.path, "data_hash": parts.data.hash}
    return of | {"search": settings.composed["search"]}


def _with_confidence(parts: Parts, method: Method, selection: Selection, result: SearchResult) -> Selection:
    """The selection of an ensemble: its scores are no gates, and each module has a confidence."""
    seed, names = parts.settings.seed, parts.grid.names
    with provisional_choice():
        standardised = torch.stack([member.standardised for member in result.members])
        found = confidence(standardised, lambda scores: _mask(method.choose(parts.grid, scores, seed)))
    if found is None:
        log.warning(SAME_SCORES.format(n=len(result.members), selector=selection.selector))
    return replace(
        selection,
        gamma_bar=None,
        scores=blanked(result.scores.tolist(), names),
        ensemble=len(result.members),
        confidence=None if found is None else blanked(found.tolist(), names),
    )


def _mask(selection: Selection | None) -> Tensor:
    assert selection is not None
    return selection.mask()


def _members(parts: Parts, method: Method, members: Sequence[Member]) -> dict[str, object]:
    """What each member found, and which modules it would select alone."""
    names, found = parts.grid.names, []
    for member in members:
        chosen = method.choose(parts.grid, member.standardised, parts.settings.seed)
        assert chosen is not None
        scores = {"scores": blanked(member.scores.tolist(), names), "selected": chosen.selected}
        about = {"seed": member.seed, "seconds": round(member.seconds, 3), "split_hash": member.split_hash}
        found.append(about | scores)
    return {"types": list(parts.grid.types), "members": found}


def _save(parts: Parts, method: Method, result: SearchResult, selection: Selection, keep_weights: bool) -> None:
    """Write what the search found. ``search.json`` is last, because it says that all other files exist."""
    folder = parts.folder
    if result.trajectory:
        types = list(parts.grid.types)
        rounds = [at for at, _ in result.trajectory]
        points = [blanked(gates, parts.grid.names) for _, gates in result.trajectory]
        content = {"types": types, "rounds": rounds, "gamma_bar": points}
        write_text(folder / "trajectory.json", json.dumps(content) + "\n")
        relaxation = result.relaxation or "softmax"
        figures.save_png(
            folder / "gamma.png", figures.gamma_trajectories(list(zip(rounds, points, strict=True)), types, relaxation)
        )
    if result.members:
        with provisional_choice():
            write_text(folder / "members.json", json.dumps(_members(parts, method, result.members)) + "\n")
    if keep_weights:
        save_weights(result.weights, weights_file(folder / FILE))
    selection.save(folder / FILE)
    write_search(folder, result.seconds, parts.made_with, parts.prefix)


def start_warm(parts: Parts, method: Method, found: Selected) -> None:
    """With ``method.warm_start``, set A and B of the selected modules to those of their search.

    Raises:
        UserError: the search of this selection left no A and B, or they have another rank.
    """
    if found.selection is None or not isinstance(method, DiffoRA) or not method.warm_start:
        return
    given = method.selection
    assert not isinstance(given, list)  # `DiffoRA.problems` refuses it
    file = weights_file(Path(given) if given else parts.folder / FILE)
    weights = load_weights(file) if found.weights is None else found.weights
    warm_start(parts.model, parts.grid, found.selection, weights, file)


class DamPictures(L.Callback):
    """After each round of the search, sends a picture of the relaxed DAM to the loggers that show pictures.

    Args:
        choose: from scores, L x N, to the selection that the method would make; the picture frames it.
        loggers: of the run.
    """

    def __init__(self, choose: Callable[[Tensor], Selection | None], loggers: Loggers) -> None:
        self.choose, self.loggers = choose, loggers

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        takers = taking_pictures(trainer.loggers)
        if not trainer.is_global_zero or not takers:
            return
        assert isinstance(pl_module, SearchModule)
        with provisional_choice():
            chosen = self.choose(pl_module.current_scores().cpu())
        assert chosen is not None
        chosen = chosen.read_from(pl_module.settings.readout)
        selection, step = replace(chosen, relaxation=pl_module.settings.relaxation), trainer.current_epoch + 1
        png = figures.dam_heatmap(selection, f"relaxed DAM after round {step}")
        self.loggers.picture("DAM", png, step, f"round {step}", takers)
