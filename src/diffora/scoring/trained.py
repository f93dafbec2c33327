"""The selectors ``search`` and ``attribution``, and what selectors that train adapters share."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor

from diffora.core.attach import Calls, attach, detach
from diffora.core.lowrank import Layers, LowRankLinear
from diffora.core.readout import step_problem
from diffora.errors import UserError
from diffora.loop.data import SearchData
from diffora.loop.fit import fit
from diffora.loop.prefix import CachedPrefix
from diffora.loop.progress import ProgressBar
from diffora.scoring.attribution import AttributionModule
from diffora.scoring.bilevel import SearchModule
from diffora.scoring.context import SearchContext, SearchResult

log = logging.getLogger(__name__)


def bilevel(context: SearchContext) -> SearchResult:
    """The bi-level search ([D] Algorithm 1, lines 1 to 8)."""
    parts, settings = context.parts, context.settings
    _check_steps(context)
    with all_adapted(context) as layers:
        arguments = parts.model, layers, parts.grid.types, parts.task, settings, parts.settings.seed
        module = SearchModule(*arguments, lambda scores: context.choose(scores).mask())
        shown = "search/train_loss", "search/valid_loss", module.spread_metric
        matched = settings.update == "simultaneous"
        fit_rounds(context, "search", module, search_data(context, matched), shown, settings.epochs, context.callbacks)
        gates = module.gates(module.gamma.detach()).cpu()
        weights = searched_weights(context, gates, layers)
    if module.readout.stopped_at is not None:
        log.info(
            f"search: stopped after {module.rounds_done:.3g} of {settings.epochs} rounds: the selection has not "
            f"changed at {settings.patience} further checks (search.patience)"
        )
    return SearchResult(
        scores=module.current_scores().cpu(),
        seconds=module.elapsed,
        trajectory=module.trajectory,
        relaxation=settings.relaxation,
        weights=weights,
        readout=settings.readout,
        rounds=module.rounds_done,
    )


def _check_steps(context: SearchContext) -> None:
    """Raise a UserError if the search has too few steps for its warm-up or its read-out."""
    s = context.settings
    batches = max(1, len(context.split[0]) // s.batch_size)
    total = s.epochs * -(-batches // s.train_steps)
    if problem := step_problem(s.readout, s.head_warmup, total):
        raise UserError(f"search.{problem}")


def attribution(context: SearchContext) -> SearchResult:
    """Train every adapter with gate 1, then divide their effect among the modules by integrated gradients."""
    parts, settings = context.parts, context.settings
    with all_adapted(context) as layers:
        arguments = parts.model, layers, parts.grid.types, parts.task, settings, parts.settings.seed
        module = AttributionModule(*arguments, rounds=settings.epochs, score_batches=context.score_batches)
        shown = "search/train_loss", "search/valid_loss"
        _say_fewer_batches(context)
        fit_rounds(context, "attribution", module, search_data(context), shown, settings.epochs + 1)
        weights = searched_weights(context, torch.ones_like(module.scores), layers)
    return SearchResult(module.scores, module.elapsed, weights=weights)


def _say_fewer_batches(context: SearchContext) -> None:
    """Say if `attribution` scores fewer batches than it was asked for: it scores one in each step of a round."""
    s = context.settings
    train, valid = (max(1, len(rows) // s.batch_size) for rows in context.split)
    if (steps := -(-train // s.train_steps)) < (wanted := min(context.score_batches, valid)):
        log.warning(
            f"attribution: {steps} batches are scored, not {wanted}, because a round has {steps} steps "
            f"(search.train_steps={s.train_steps}, search.valid_fraction={s.valid_fraction:g})"
        )


# --- what selectors that train share ---


@contextmanager
def all_adapted(context: SearchContext) -> Iterator[list[list[LowRankLinear | None]]]:
    """Give every candidate a low-rank adapter, L x N of them; afterwards remove them and restore the head.

    There is None in place of an adapter where a layer has no such module, or none that is scored.
    """
    grid, model = context.parts.grid, context.parts.model
    head = {
        name: {key: value.clone() for key, value in model.get_submodule(name).state_dict().items()}
        for name in context.parts.backbone.head
    }
    scored = context.grid.present
    rank, kernel = context.settings.rank, context.parts.settings.model.kernel
    attached = attach(model, grid.names, scored, rank, None, context.alpha, freeze=False, kernel=kernel)
    try:
        yield attached
    finally:
        detach(model)
        for name, state in head.items():
            model.get_submodule(name).load_state_dict(state)


class _UsedModules(L.Callback):
    """Refuses, when the search ends, modules that the loss never called."""

    def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
        self._calls = Calls(module.model)

    def on_fit_end(self, trainer: L.Trainer, module: Any) -> None:
        if trainer.world_size == 1:  # of several processes, one may see rows that another does not
            self._calls.check()


def search_data(context: SearchContext, matched: bool = False) -> SearchData:
    """The batches of the two parts of the rows, one pass over search-train a round.

    Args:
        matched: whether batches of the two parts are paired by length.

    Raises:
        UserError: a round has fewer batches than ``search.train_steps``.
    """
    parts, split, s = context.parts, context.split, context.settings
    if s.train_steps > (batches := max(1, len(split[0]) // s.batch_size)):
        raise UserError(
            f"search.train_steps={s.train_steps} must be at most {batches}, the batches of a round "
            f"({len(split[0])} rows to train on, search.batch_size={s.batch_size})"
        )
    collate, workers = (parts.data.collate, parts.data.collate_eval), parts.settings.trainer.num_workers
    return SearchData(
        parts.data.train.encoded,
        collate,
        split,
        s.batch_size,
        parts.settings.seed,
        s.train_steps,
        workers,
        matched=matched,
    )


def fit_rounds(
    context: SearchContext,
    name: str,
    module: SearchModule,
    data: L.LightningDataModule,
    shown: tuple[str, ...],
    rounds: int,
    callbacks: Sequence[L.Callback] = (),
    **extra: Any,
) -> None:
    """Train a module of Γ, A, B and head for some rounds.

    Args:
        shown: metrics beside the progress bar.
        extra: more arguments of the Trainer.
    """
    parts, split, grid = context.parts, context.split, context.grid
    n_layers = sum(map(bool, grid.sizes))
    log.info(f"{name}: {n_layers} layers x {grid.n_types} modules on {len(split[0])} + {len(split[1])} rows")
    loggers = [] if context.loggers is None else context.loggers.of_stage("search")
    if parts.settings.trainer.cache_prefix:
        module.prefix = CachedPrefix(parts, "search", {"train": parts.data.train.encoded})
    bar = ProgressBar(name + context.member, "round", shown)
    fit(parts, "search", module, data, [bar, _UsedModules(), *callbacks], loggers, max_epochs=rounds, **extra)
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
            weights[f"{name}.scaling"] = torch.tensor(layer.scaling, dtype=torch.float64)
    return weights
