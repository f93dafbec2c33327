"""Selectors that take one pass over some search-train batches and train nothing."""

import logging

import torch

from diffora.loop.data import SearchData
from diffora.loop.fit import fit
from diffora.scoring.context import Run, SearchContext, SearchResult
from diffora.scoring.function import ScoreFunction
from diffora.scoring.function_stage import FunctionModule
from diffora.scoring.score import ScoreModule

log = logging.getLogger(__name__)


def gradient(context: SearchContext) -> SearchResult:
    """Norm of the mean gradient of the loss with respect to each frozen weight."""
    return _criterion(context, "gradient")


def activation(context: SearchContext) -> SearchResult:
    """Mean of |weight| times the norm of its input (Wanda's criterion)."""
    return _criterion(context, "activation")


def from_function(function: ScoreFunction, name: str) -> Run:
    """A plain function ``(model, grid, batches, loss) -> scores`` as a selector.

    With several processes, each one computes on all rows, and the result of the first one is used.
    """

    def run(context: SearchContext) -> SearchResult:
        parts = context.parts
        module = FunctionModule(parts.model, parts.grid, function, name, parts.task, parts.settings.seed)
        return one_pass(context, name, module, whole=True)

    return run


def _criterion(context: SearchContext, name: str) -> SearchResult:
    parts = context.parts
    module = ScoreModule(
        parts.model, parts.grid.names, name, parts.task, context.settings.accumulate, parts.settings.seed
    )
    return one_pass(context, name, module)


def one_pass(
    context: SearchContext, name: str, module: ScoreModule | FunctionModule, whole: bool = False
) -> SearchResult:
    """Score on a few search-train batches. Afterwards, the model's mode and torch's random state are as before.

    Args:
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
        fit(parts, "search", module, data, [], [], max_epochs=1, limit_train_batches=context.score_batches)
    parts.model.train(training)
    return SearchResult(module.scores, module.elapsed)
