"""Selectors that do not train, as a plain PyTorch pass over a user's own loader."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from diffora.core.choose import random_scores
from diffora.core.grid import Grid, laid_out
from diffora.core.linear import weight_of
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.scoring.criteria import counted_tokens, gradient_norm, square_sums, weight_times_activation
from diffora.scoring.function import ScoreFunction, call_function, check_signature
from diffora.standalone.batches import Loss, checked, model_loss, moved, some
from diffora.standalone.choice import choice_problems, selection_of
from diffora.standalone.model import device_of, grid_of, left_as_found, unwrapped
from diffora.standalone.progress import bar


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
) -> Selection:
    """Select modules by another criterion than the search. Nothing is trained, and the model stays as it is.

    Args:
        model: any module with repeated layers, without adapters. It scores in evaluation mode.
        selector: ``gradient``: norm of the mean gradient of the loss by each weight; ``activation``: mean of |weight|
            times the norm of its input (`diffora.scoring.criteria`); ``random``; or a function
            ``(model, grid, batches, loss) -> scores``, where ``loss(batch)`` is a scalar (`diffora.scoring.function`).
        loader: batches of training data; not needed for ``random``.
        loss: ``loss(model, batch)``, a scalar; None: ``model(**batch).loss``.
        k, scope, layer, candidates: as in `diffora.standalone.search.search`.
        n_batches: how many batches of the loader are used, at most.
        seed: of ``random``, and of the order of a shuffled loader.
        progress: show a progress bar, in a terminal or notebook.

    Returns:
        The selection; ``scores`` is L x N.

    Raises:
        UserError: an argument is impossible, the model has no repeated layers or has adapters, the loader has no
            batches, a loss is not a finite scalar, or a function does not keep the rules.
    """
    model = unwrapped(model)
    grid = grid_of(model, layer, candidates)
    problems = list(choice_problems(k, scope, grid, seed))
    if selector == "search":
        problems.append("selector='search' trains adapters: call diffora.search(model, train_loader, valid_loader)")
    elif not callable(selector) and selector not in ("gradient", "activation", "random"):
        problems.append(f"selector={selector!r} must be gradient, activation, random, or a function")
    elif selector != "random" and loader is None:
        problems.append(f"selector={name_of(selector)} needs a loader, of batches of training data")
    if type(n_batches) is not int or n_batches < 1:
        problems.append(f"n_batches={n_batches!r} must be a whole number of at least 1")
    if problems:
        raise UserError(problems)
    if callable(selector):
        check_signature(selector, f"selector={name_of(selector)}")
    if selector == "random":
        scores = random_scores(grid.n_layers, grid.n_types, seed)
    else:
        assert loader is not None
        with left_as_found(model, seed):
            model.eval()
            device = device_of(model)
            batches = [moved(batch, device) for batch in islice(some(loader, "the loader"), n_batches)]
            scores = _scores(model, grid, selector, batches, loss or model_loss, progress)
    if not scores[grid.there].isfinite().all():
        raise UserError(f"selector={name_of(selector)}: a score is not finite; try the model in float32")
    config = {"n_batches": n_batches}
    return selection_of(grid, scores, k, scope, name_of(selector), seed, config, scores=scores.tolist())


def name_of(selector: str | ScoreFunction) -> str:
    """The name of a selector: of a function, its dotted path."""
    if isinstance(selector, str):
        return selector
    return f"{selector.__module__}.{getattr(selector, '__qualname__', type(selector).__name__)}"


def _scores(
    model: nn.Module, grid: Grid, selector: str | ScoreFunction, batches: list[Any], loss: Loss, progress: bool
) -> Tensor:
    """L x N on the CPU."""

    def loss_of(batch: Any) -> Tensor:
        return loss(model, batch)

    if not isinstance(selector, str):
        return call_function(selector, model, grid, batches, loss_of, f"selector={name_of(selector)}")
    modules = [model.get_submodule(name) for name in grid.modules]
    for module in modules:
        weight_of(module)  # refuses quantised ones
    watched = bar(progress, selector, "batch", items=batches)
    scores = (_gradient if selector == "gradient" else _activation)(model, modules, watched, loss_of)
    return laid_out(torch.stack(scores).cpu(), grid.names)


def _gradient(
    model: nn.Module, modules: Sequence[nn.Module], batches: Iterable[Any], loss: Callable[[Any], Tensor]
) -> list[Tensor]:
    """Norms of the gradients of the mean loss of all batches, by the weight of each module."""
    weights: list[Any] = [module.weight for module in modules]
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    sums: list[Tensor] = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]
    for number, batch in enumerate(batches, 1):
        value = checked(loss(batch), f"batch {number}")
        for total, grad in zip(sums, torch.autograd.grad(value, weights, allow_unused=True), strict=True):
            if grad is not None:
                total += grad
    return [gradient_norm(total / number) for total in sums]


@torch.no_grad()
def _activation(
    model: nn.Module, modules: Sequence[nn.Module], batches: Iterable[Any], loss: Callable[[Any], Tensor]
) -> list[Tensor]:
    """Wanda's criterion for each module, from its inputs in all batches. Padding does not count, if a batch says so.

    A batch that is a dict may have an ``attention_mask`` with one entry per token; otherwise all tokens count.
    """
    squares: dict[nn.Module, Tensor] = {}
    tokens: dict[nn.Module, Tensor] = {}
    names = {module: name for name, module in model.named_modules()}
    current: Any = {}
    seen: set[nn.Module] = set()

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # Only the first call in a pass is on tokens: DeBERTa calls Q and K again, on its table of positions.
        if module in seen:
            return
        seen.add(module)
        found = square_sums(args[0], counted_tokens(names[module], args[0], current))
        squares[module] = squares.get(module, 0) + found[0]
        tokens[module] = tokens.get(module, 0) + found[1]

    hooks = [module.register_forward_pre_hook(note) for module in modules]
    try:
        with _called_layers():
            for batch in batches:
                seen.clear()
                current = batch if hasattr(batch, "get") else {}
                loss(batch)
    finally:
        for hook in hooks:
            hook.remove()
    if uncalled := [name for name, module in model.named_modules() if module in set(modules) - squares.keys()]:
        raise UserError(f"selector=activation: the loss does not call {uncalled[0]}: leave it out of candidates=")
    return [weight_times_activation(weight_of(m), squares[m] / tokens[m]) for m in modules]


@contextmanager
def _called_layers() -> Iterator[None]:
    """Inside this context, `nn.TransformerEncoder` calls its layers, and torch's fused kernel for it is not used."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
