"""Selectors that train nothing: they take one pass over some search-train batches, or look at the weights only."""

import logging

import torch

from diffora.loop.data import SearchData
from diffora.loop.fit import fit
from diffora.scoring.context import Run, SearchContext, SearchResult
from diffora.scoring.function import ScoreFunction
from diffora.scoring.measures import MEASURES
from diffora.scoring.one_pass_stages import FunctionStage, MeasureStage, OnePassStage
from diffora.scoring.spectra import spectral_scores

log = logging.getLogger(__name__)


def from_measure(name: str) -> Run:
    """The selector of a measure in `diffora.scoring.measures.MEASURES`."""

    def run(context: SearchContext) -> SearchResult:
        parts = context.parts
        measure = MEASURES[name](parts.model, parts.grid, parts.settings.seed)
        module = MeasureStage(measure, name, parts.task, context.settings.accumulate, parts.settings.seed)
        return one_pass(context, name, module, context.score_batches)

    return run


def from_spectrum(name: str) -> Run:
    """The selector of a criterion in `diffora.scoring.spectra.SPECTRA`."""
    scored = from_function(lambda model, grid, batches, loss: spectral_scores(model, grid, name), name, n_batches=1)

    def run(context: SearchContext) -> SearchResult:
        if name == "kappa":
            import peft.helpers  # noqa: F401  # it takes seconds, which are no cost of the selector
        return scored(context)

    return run


def from_function(function: ScoreFunction, name: str, n_batches: int | None = None) -> Run:
    """A plain function ``(model, grid, batches, loss) -> scores`` as a selector.

    With several processes, each one computes on all rows, and the result of the first one is used.

    Args:
        n_batches: how many batches it gets at most; None for ``method.score_batches``.
    """

    def run(context: SearchContext) -> SearchResult:
        parts = context.parts
        module = FunctionStage(parts.model, parts.grid, function, name, parts.task, parts.settings.seed)
        return one_pass(context, name, module, n_batches or context.score_batches, whole=True)

    return run


def one_pass(
    context: SearchContext, name: str, module: OnePassStage, n_batches: int, whole: bool = False
) -> SearchResult:
    """Score on a few search-train batches. Afterwards, the model's mode and torch's random state are as before.

    Args:
        n_batches: at most; there are no more than those of one pass.
        whole: whether every process gets all rows of a batch.
    """
    parts, s = context.parts, context.settings
    collate = parts.data.collate_eval, parts.data.collate_eval
    workers = parts.settings.trainer.num_workers
    data = SearchData(
        parts.data.train.encoded,
        collate,
        context.split,
        s.batch_size,
        parts.settings.seed,
        num_workers=workers,
        whole=whole,
    )
    log.info(f"{name}: scoring {parts.grid.n_layers} layers x {parts.grid.n_types} modules")
    training = parts.model.training
    with torch.random.fork_rng():
        fit(parts, "search", module, data, [], [], max_epochs=1, limit_train_batches=n_batches)
    parts.model.train(training)
    return SearchResult(module.scores, module.elapsed)
