"""Selectors: each gives every candidate module a score. A module with a high score should get a LoRA of its own.

A selector is a function from a `SearchContext` (model, grid, rows, settings) to a `SearchResult` (scores, L x N).
`SELECTORS` holds those of the package, by the name in ``method.selector``:

- ``search``: the bi-level search of [D] (`diffora.scoring.bilevel`); its scores are the relaxed DAM,
- ``attribution``: trains all adapters, then divides their effect on the validation loss
  (`diffora.scoring.attribution`),
- ``gradient``, ``activation``: one pass over some batches, nothing is trained (`diffora.scoring.score`).

(``random`` is not here: it needs neither model nor data, so the method draws the scores itself.)

Your own selector is a plain function. `from_function` turns it into a selector::

    def my_selector(model, grid, batches, loss):  # in my_module.py
        for batch in batches: ...  # search-train batches; loss(batch) is the task's loss, a scalar
        return scores  # a tensor, grid.n_layers x grid.n_types, high is good

    diffora train method.selector=my_module.my_selector

`diffora.scoring.function` describes the arguments, and what the function must not change.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import lightning as L
import numpy as np
import torch
from torch import Tensor

from diffora.core.attach import attach, detach
from diffora.core.lowrank import Layers, LowRankLinear
from diffora.core.readout import CHECKS, steps_of
from diffora.errors import UserError
from diffora.loop.data import SearchData
from diffora.loop.fit import fit
from diffora.loop.loggers import Loggers
from diffora.loop.parts import Parts
from diffora.loop.progress import ProgressBar
from diffora.scoring.attribution import AttributionModule
from diffora.scoring.bilevel import SearchModule, Trajectory
from diffora.scoring.function import ScoreFunction, check_signature
from diffora.scoring.function_stage import FunctionModule
from diffora.scoring.score import ScoreModule
from diffora.settings.sections import Search
from diffora.trust import function_at

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchContext:
    """What a selector works on.

    Attributes:
        parts: backbone, grid, task and training rows; settings of the sections ``search`` and ``trainer``.
        split: (search-train, search-valid) row numbers.
        alpha: the updates of the candidates' adapters are scaled by alpha / rank.
        score_batches: how many batches a selector other than ``search`` takes.
        loggers: where a selector with rounds sends its metrics; None for nowhere.
        callbacks: of Lightning, called in the rounds of ``search`` only.
        choose: from scores, L x N, to the boolean mask of the modules that the method would select.
    """

    parts: Parts
    split: tuple[np.ndarray, np.ndarray]
    alpha: float
    score_batches: int
    loggers: Loggers | None = None
    callbacks: Sequence[L.Callback] = ()
    choose: Callable[[Tensor], Tensor] | None = None

    @property
    def settings(self) -> Search:
        """The section ``search``."""
        assert self.parts.settings.search is not None, "a method with a selector has this section"
        return self.parts.settings.search


@dataclass(frozen=True)
class SearchResult:
    """What a selector found.

    Attributes:
        scores: L x N on the CPU, high is good; for ``search`` the relaxed DAM, or what ``search.readout`` names.
        seconds: of training and scoring, without loading.
        trajectory: (round, relaxed DAM), a few dozen points a round; empty except for ``search``.
        relaxation: how ``search`` relaxed Γ, a key of `diffora.core.dam.RELAXATIONS`; None for other selectors.
        weights: the trained A and B of every candidate, B times its gate, as ``<module>.lora_a`` (rank, in) and
            ``<module>.lora_bt`` (rank, out), on the CPU; empty if the selector trains none.
        readout: what ``search`` read the scores from, as in ``search.readout``; None for other selectors.
        rounds: of ``search``; fewer than ``search.epochs`` if ``search.patience`` ended it. None for other selectors.
    """

    scores: Tensor
    seconds: float
    trajectory: Trajectory = field(default_factory=list)
    relaxation: str | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)
    readout: str | None = None
    rounds: float | None = None


Run = Callable[[SearchContext], SearchResult]


@dataclass(frozen=True)
class Selector:
    """One way to score the candidates.

    Attributes:
        run: computes the scores. The model is the same before and after.
        trains: whether it trains A and B of every candidate, with rank ``search.rank``.
    """

    run: Run
    trains: bool = False


SELECTORS: dict[str, Selector] = {}


def selector(name: str, trains: bool = False) -> Callable[[Run], Run]:
    """Decorator: register a function in `SELECTORS`."""

    def register(run: Run) -> Run:
        SELECTORS[name] = Selector(run, trains)
        return run

    return register


def find_selector(name: str) -> Selector:
    """The selector of a name in `SELECTORS`, or of the dotted path of a function, which is imported.

    Only for a name that the user typed or has in ``conf/``, never for one from a file of somebody else.

    Raises:
        UserError: there is no such function, or it cannot be called as a selector.
    """
    if name in SELECTORS:
        return SELECTORS[name]
    function = function_at(name, "method.selector")
    check_signature(function, f"method.selector={name}")
    return Selector(from_function(function, name))


def trains(name: str) -> bool:
    """Whether a selector trains A and B of every candidate. A user's function does not."""
    return name in SELECTORS and SELECTORS[name].trains


@selector("search", trains=True)
def bilevel(context: SearchContext) -> SearchResult:
    """The bi-level search ([D] Algorithm 1, lines 1 to 8)."""
    parts, settings = context.parts, context.settings
    _check_warmup(context)
    with all_adapted(context) as layers:
        arguments = parts.model, layers, parts.grid.types, parts.task, settings, parts.settings.seed
        module = SearchModule(*arguments, context.choose)
        shown = "search/train_loss", "search/valid_loss", module.certainty
        matched = settings.update == "simultaneous"
        _fit_rounds(context, "search", module, shown, settings.epochs, context.callbacks, matched)
        gates = module.gates(module.gamma.detach()).cpu()
        weights = searched_weights(context, gates, layers)
    if module.readout.stopped_at is not None:
        log.info(
            f"search: stopped after {module.rounds_done:.3g} of {settings.epochs} rounds: the selection has not changed "
            f"for {settings.patience} checks (search.patience), of which a round has {CHECKS}"
        )
    return SearchResult(
        module.scores().cpu(),
        module.elapsed,
        module.trajectory,
        settings.relaxation,
        weights,
        settings.readout,
        module.rounds_done,
    )


def _check_warmup(context: SearchContext) -> None:
    """Raise a UserError if ``search.head_warmup`` leaves no step to Γ."""
    s = context.settings
    batches = max(1, len(context.split[0]) // s.batch_size)
    total = s.epochs * -(-batches // s.train_steps)
    if steps_of(s.head_warmup, total) >= total:
        raise UserError(
            f"search.head_warmup={s.head_warmup} must be below {total}, the steps of the search: Γ would never move"
        )


@selector("attribution", trains=True)
def attribution(context: SearchContext) -> SearchResult:
    """Train every adapter with gate 1, then divide their effect among the modules by integrated gradients."""
    parts, settings = context.parts, context.settings
    with all_adapted(context) as layers:
        arguments = parts.model, layers, parts.grid.types, parts.task, settings, parts.settings.seed
        module = AttributionModule(*arguments, rounds=settings.epochs, score_batches=context.score_batches)
        shown = "search/train_loss", "search/valid_loss"
        _fit_rounds(context, "attribution", module, shown, settings.epochs + 1)
        weights = searched_weights(context, torch.ones_like(module.scores), layers)
    return SearchResult(module.scores, module.elapsed, weights=weights)


@selector("gradient")
def gradient(context: SearchContext) -> SearchResult:
    """Norm of the mean gradient of the loss with respect to each frozen weight."""
    return _criterion(context, "gradient")


@selector("activation")
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
        return _one_pass(context, name, module, whole=True)

    return run


# --- what several selectors share ---


@contextmanager
def all_adapted(context: SearchContext) -> Iterator[list[list[LowRankLinear | None]]]:
    """Give every candidate a low-rank adapter, L x N of them; afterwards remove them and restore the head.

    There is None in place of an adapter where a layer has no such module.
    """
    grid, model = context.parts.grid, context.parts.model
    head = {
        name: {key: value.clone() for key, value in model.get_submodule(name).state_dict().items()}
        for name in context.parts.backbone.head
    }
    everything = torch.ones(grid.n_layers, grid.n_types, dtype=torch.bool)
    rank, kernel = context.settings.rank, context.parts.settings.model.kernel
    attached = attach(model, grid.names, everything, rank, None, context.alpha, freeze=False, kernel=kernel)
    try:
        yield attached
    finally:
        detach(model)
        for name, state in head.items():
            model.get_submodule(name).load_state_dict(state)


def _fit_rounds(
    context: SearchContext,
    name: str,
    module: SearchModule,
    shown: tuple[str, ...],
    rounds: int,
    callbacks: Sequence[L.Callback] = (),
    matched: bool = False,
) -> None:
    """Train a module of Γ, A, B and head for some rounds.

    Args:
        shown: metrics beside the progress bar.
        matched: whether batches of the two parts are paired by length.
    """
    parts, split = context.parts, context.split
    s, grid = context.settings, parts.grid
    if s.train_steps > (batches := max(1, len(split[0]) // s.batch_size)):
        raise UserError(
            f"search.train_steps={s.train_steps} must be at most {batches}, the batches of a round "
            f"({len(split[0])} rows to train on, search.batch_size={s.batch_size})"
        )
    collate, workers = (parts.data.collate, parts.data.collate_eval), parts.settings.trainer.num_workers
    data = SearchData(
        parts.data.train.encoded,
        collate,
        split,
        s.batch_size,
        parts.settings.seed,
        s.train_steps,
        workers,
        matched=matched,
    )
    log.info(f"{name}: {grid.n_layers} layers x {grid.n_types} modules on {len(split[0])} + {len(split[1])} rows")
    loggers = [] if context.loggers is None else context.loggers.of_stage("search")
    bar = ProgressBar(name, "round", shown)
    fit(parts, "search", module, data, [bar, *callbacks], loggers, max_epochs=rounds)
    module.close_gates()


def searched_weights(context: SearchContext, gates: Tensor, layers: Layers) -> dict[str, Tensor]:
    """`SearchResult.weights`. The gate goes into B, because fine-tuning has no gates."""
    weights = {}
    for names, row, gates_of_row in zip(context.parts.grid.names, layers, gates, strict=True):
        for name, layer, gate in zip(names, row, gates_of_row, strict=True):
            if layer is None:
                continue
            weights[f"{name}.lora_a"] = layer.lora_a.detach().cpu().clone()
            weights[f"{name}.lora_bt"] = layer.lora_bt.detach().cpu() * gate
    return weights


def _criterion(context: SearchContext, name: str) -> SearchResult:
    parts = context.parts
    module = ScoreModule(
        parts.model, parts.grid.names, name, parts.task, context.settings.accumulate, parts.settings.seed
    )
    return _one_pass(context, name, module)


def _one_pass(
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
