"""Selectors that do not train, as a plain PyTorch pass over a user's own loader."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from torch import Tensor, nn

from diffora.core.draws import random_scores
from diffora.core.grid import Grid
from diffora.core.heuristics import BY_LAYER, HEURISTICS, heuristic_problem, heuristic_scores, usual_sizes
from diffora.core.model import device_of
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.scoring.function import ScoreFunction, call_function, check_signature
from diffora.scoring.measures import FLOAT16_SCALE, MEASURES
from diffora.scoring.spectra import SPECTRA, spectral_scores
from diffora.standalone.batches import Loss, checked, loader_problem, loss_problem, model_loss, moved, rows_of, some
from diffora.standalone.choice import (
    choice_problems,
    ensemble_problems,
    member_seeds,
    modules_of,
    selection_of,
    selection_of_members,
)
from diffora.standalone.model import grid_of, left_as_found, unwrapped
from diffora.standalone.progress import bar

WITHOUT_DATA = (*SPECTRA, "random", *HEURISTICS)
SELECTORS = (*MEASURES, *WITHOUT_DATA)


def select(
    model: nn.Module,
    selector: str | ScoreFunction,
    loader: Iterable[Any] | None = None,
    *,
    loss: Loss | None = None,
    k: int | None = None,
    scope: str = "layer",
    layer: str | None = None,
    candidates: Sequence[str] | None = None,
    n_batches: int = 16,
    seed: int = 0,
    progress: bool = True,
    ensemble: int = 1,
) -> Selection:
    """Select modules by another criterion than the search. Nothing is trained, and the model stays as it is.

    Args:
        model: any module with repeated layers, without adapters. It scores in evaluation mode.
        selector: one of the package, see below; or a function ``(model, grid, batches, loss) -> scores``, where
            ``loss(batch)`` is a scalar (`diffora.scoring.function`).
        loader: batches of training data, for the selectors that need data.
        loss: ``loss(model, batch)``, a scalar; None: ``model(**batch).loss``.
        k, scope, layer, candidates: as in `diffora.standalone.search.search`. Without ``k``, heuristics select the
            modules that they are named after, and ``lower`` and ``upper`` half of the layers.
        n_batches: how many batches of the loader are used, at most.
        seed: of ``random``, of the random directions of ``plop``, and of the order of a shuffled loader.
        progress: show a progress bar, in a terminal or notebook.
        ensemble: score so many times, with other seeds (`diffora.core.ensemble.member_seed`), and select by the mean of
            the standardised scores. The selection then has a ``confidence`` for each module. The scores must depend on
            the seed: give a shuffled loader.

    The selectors of the package (`diffora.scoring.criteria`, `diffora.core.heuristics`):

    - from data: ``gradient``, ``fisher`` (mean square of the gradient of single rows), ``activation`` (mean of |weight|
      times the norm of its input), ``plop`` (types of modules that stretch their inputs least),
    - from the weights alone: ``kappa`` (smallest condition number), ``spectrum`` (highest signal-to-noise ratio among
      the modules of its type),
    - from neither: ``random``, ``qv``, ``attention``, ``ffn``; and with ``scope="global"`` ``lower``, ``upper``,
      ``alternate``.

    Returns:
        The selection; ``scores`` is L x N.

    Raises:
        UserError: an argument is impossible, the model has no repeated layers or has adapters, the loader has no
            batches, a loss is not a finite scalar, or a function does not keep the rules.
    """
    model = unwrapped(model)
    grid = grid_of(model, layer, candidates)
    if problems := list(_problems(selector, loader, loss, k, scope, grid, seed, n_batches, ensemble)):
        raise UserError(problems)
    if callable(selector):
        check_signature(selector, f"selector={name_of(selector)}")
    size: int | list[int] | None = k
    members = []
    for own in member_seeds(seed, ensemble, progress):
        if isinstance(selector, str) and selector in HEURISTICS:
            scores, size = _heuristic(selector, grid, k, scope)
        elif isinstance(selector, str) and selector in WITHOUT_DATA:
            scores = _without_data(model, grid, selector, own, progress)
        else:
            assert loader is not None
            batches = islice(some(loader, "the loader"), n_batches)
            scores = _from_data(model, grid, selector, batches, loss, own, progress)
        if not scores[grid.present].isfinite().all():
            raise UserError(f"selector={name_of(selector)}: a score is not finite; try the model in float32")
        members.append(scores)
    config = {} if selector in WITHOUT_DATA else {"n_batches": n_batches}
    if ensemble > 1:
        return selection_of_members(grid, members, k, scope, name_of(selector), seed, config)
    return selection_of(grid, scores, size, scope, name_of(selector), seed, config, scores=scores.tolist())


def _problems(
    selector: str | ScoreFunction,
    loader: Iterable[Any] | None,
    loss: Loss | None,
    k: int | None,
    scope: str,
    grid: Grid,
    seed: int,
    n_batches: int,
    ensemble: int,
) -> Iterator[str]:
    """One message for each argument of `select` that is impossible."""
    yield from choice_problems(k, scope, grid, seed)
    yield from ensemble_problems(ensemble, loader)
    if selector == "search":
        yield "selector='search' trains adapters: call diffora.search(model, train_loader, valid_loader)"
    elif selector in ("attribution", "one_shot"):
        yield (
            f"selector={selector!r} trains adapters, which needs the training loop of a run: diffora select "
            f"method.selector={selector}; then Selection.load reads its selection.json"
        )
    elif not callable(selector) and selector not in SELECTORS:
        yield f"selector={selector!r} must be {', '.join(SELECTORS)}, or a function"
    elif selector not in WITHOUT_DATA and loader is None:
        yield f"selector={name_of(selector)} needs a loader, of batches of training data"
    elif selector in BY_LAYER and scope == "layer":
        yield f"selector={selector} selects whole layers, so it needs scope='global'"
    if loader is not None:
        yield from loader_problem("loader", loader)
    yield from loss_problem(loss)
    if selector in WITHOUT_DATA and selector != "random" and isinstance(ensemble, int) and ensemble > 1:
        yield f"selector={selector} gives the same scores with every seed, so ensemble={ensemble} has no use"
    if type(n_batches) is not int or n_batches < 1:
        yield f"n_batches={n_batches!r} must be a whole number of at least 1"


def _without_data(model: nn.Module, grid: Grid, selector: str, seed: int, progress: bool) -> Tensor:
    """L x N scores of a selector that needs no batches: random ones, or those of the weights."""
    if selector == "random":
        return random_scores(grid.n_layers, grid.n_types, seed)
    return spectral_scores(model, grid, selector, bar(progress, selector, "module", items=grid.modules))


def _from_data(
    model: nn.Module,
    grid: Grid,
    selector: str | ScoreFunction,
    batches: Iterable[Any],
    loss: Loss | None,
    seed: int,
    progress: bool,
) -> Tensor:
    """L x N scores from batches, in evaluation mode."""
    with left_as_found(model, seed):
        model.eval()
        on_device = [moved(batch, device_of(model)) for batch in batches]
        return _scores(model, grid, selector, on_device, loss or model_loss, seed, progress)


def name_of(selector: str | ScoreFunction) -> str:
    """The name of a selector: of a function, its dotted path."""
    if isinstance(selector, str):
        return selector
    return f"{selector.__module__}.{getattr(selector, '__qualname__', type(selector).__name__)}"


def _scores(
    model: nn.Module,
    grid: Grid,
    selector: str | ScoreFunction,
    batches: list[Any],
    loss: Loss,
    seed: int,
    progress: bool,
) -> Tensor:
    """L x N on the CPU, from batches."""

    def loss_of(batch: Any) -> Tensor:
        return loss(model, batch)

    if not isinstance(selector, str):
        return call_function(selector, model, grid, batches, loss_of, f"selector={name_of(selector)}")
    model.requires_grad_(False)
    measure = MEASURES[selector](model, grid, seed)
    measure.scale = FLOAT16_SCALE  # a power of 2, which changes nothing in other precisions
    sums: list[Tensor] = []
    for number, batch in enumerate(bar(progress, selector, "batch", items=batches), 1):

        def loss_of_part(part: Any, number: int = number) -> Tensor:
            return checked(loss_of(part), f"batch {number}") if measure.differentiates else loss_of(part)

        for part in rows_of(batch, f"batch {number}") if measure.by_row else [batch]:
            new = measure.of(part, loss_of_part)
            sums = [total + value for total, value in zip(sums, new, strict=True)] if sums else new
    return measure.scores(sums)


def _heuristic(selector: str, grid: Grid, k: int | None, scope: str) -> tuple[Tensor, int | list[int]]:
    """(scores, k) of a heuristic. Without ``k``, there is a number for each layer, as the rule says.

    Raises:
        UserError: the names do not show which modules are meant, or ``k`` would divide modules of equal scores.
    """
    scores = heuristic_scores(selector, grid)
    if k is None:
        return scores, usual_sizes(selector, scores)

    def counts(k: int) -> list[int]:
        found = [modules_of(k, size) for size in grid.sizes]
        return found if scope == "layer" else [sum(found)]

    choices = ((f"k={n}", counts(n)) for n in range(1, min(grid.sizes)))
    if problem := heuristic_problem(scores, counts(k), choices):
        raise UserError(f"selector={selector}: k={k} {problem}; without k, the rule gives the number")
    return scores, k
