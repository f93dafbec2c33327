"""Settings that were changed, but that nothing reads beside the others. A run names them before the selection."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from diffora.methods.diffora import DiffoRA
from diffora.methods.lowrank import Regulariser
from diffora.methods.selecting import Selecting
from diffora.scoring.selectors import facts_of
from diffora.settings.sections import Search, Settings


def unread(settings: Settings) -> Iterator[str]:
    """One line for each such setting. Changed means: not what it is without a word of the user."""
    yield from _beside_others(settings)
    scoring = settings.method.scoring
    if scoring is None:
        yield from _without_selector(settings)
        return
    read = facts_of(scoring.selector).reads | {"ensemble"}
    for key, value in _changed(settings):
        if key.partition(".")[2] not in read:
            yield f"{key}={value} has no effect: method.selector={scoring.selector} does not read it"


def _without_selector(settings: Settings) -> Iterator[str]:
    """Settings of the search, and of what is selected, where no selector runs."""
    for key, value in _changed(settings):
        yield f"{key}={value} has no effect: no selector runs"
    method = settings.method
    if isinstance(method, DiffoRA) and (method.selection is not None or method.adapter is not None):
        usual = {"rho": settings.task.recipe.rho, "selector": "search", "scope": "layer"}
        given = "method.adapter" if method.selection is None else "method.selection"
        for name, default in usual.items():
            if (value := getattr(method, name)) != default:
                yield f"{'' if name == 'rho' else 'method.'}{name}={value} has no effect: {given} says what is selected"


def _beside_others(settings: Settings) -> Iterator[str]:
    """Settings of the adapters that another setting makes useless."""
    method = settings.method
    regulariser = getattr(method, "regulariser", None)
    if isinstance(regulariser, Regulariser) and regulariser.weight == 0 and regulariser.form != "squared":
        yield f"method.regulariser.form={regulariser.form} has no effect: method.regulariser.weight=0 is no penalty"
    alone = isinstance(method, Selecting) and not method.weight_sharing
    if alone and method.shared_rank != settings.task.recipe.shared_rank:
        yield f"method.shared_rank={method.shared_rank} has no effect: method.weight_sharing=false shares nothing"


def _changed(settings: Settings) -> Iterator[tuple[str, Any]]:
    """The changed settings of the search, and ``method.score_batches``: (key, value)."""
    if settings.search is not None:  # a method without a search has none
        tuning = settings.finetune
        usual = {field.name: field.default for field in fields(Search)}
        usual |= {"epochs": settings.task.recipe.search_epochs, "lr": tuning.lr, "rank": settings.rank}
        usual |= {"batch_size": tuning.batch_size, "accumulate": tuning.accumulate}
        for name, default in usual.items():
            if (value := getattr(settings.search, name)) != default:
                yield f"search.{name}", value
    method = settings.method
    if isinstance(method, DiffoRA) and method.score_batches != DiffoRA.score_batches:  # the class has the default
        yield "method.score_batches", method.score_batches
