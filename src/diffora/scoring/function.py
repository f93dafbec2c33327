"""A plain function as a selector: calls it, and checks its result and that the model is unchanged.

The function is called once as ``function(model, grid, batches, loss)``:

- ``model``: the frozen backbone with its new head, in evaluation mode, on the run's device. To differentiate with
  respect to a candidate's weight, set its ``requires_grad``; it is reset afterwards.
- ``grid``: the candidates, a `diffora.core.grid.Grid`: ``grid.names`` are L x N module names for
  ``model.get_submodule``, ``grid.shapes`` L x N pairs (in, out).
- ``batches``: search-train batches, dicts of tensors on the model's device, ``method.score_batches`` of them at most.
  May be iterated over several times; ``len(batches)`` works.
- ``loss``: ``loss(batch)`` is the task's loss of the model, a scalar with a graph.

It returns a tensor of L x N finite numbers, high is good. It runs under the autocast of ``trainer.precision``. Weights,
buffers and hooks of the model must be as before when it returns.
"""

import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffora.core.grid import Grid
from diffora.errors import UserError, out_of_memory

Batch = Mapping[str, Tensor]
ScoreFunction = Callable[[nn.Module, Grid, Any, Callable[[Any], Tensor]], Tensor]
"""``(model, grid, batches, loss) -> scores``; see above."""


def check_signature(function: ScoreFunction, name: str) -> None:
    """Raise a UserError unless a function can be called with four arguments in a row.

    Args:
        name: says in messages which function it is, as ``method.selector=a.b``.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # Python cannot tell for some callables written in C
        return
    try:
        signature.bind(None, None, None, None)
    except TypeError:
        raise UserError(f"{name} must be a function of (model, grid, batches, loss); it takes {signature}") from None


class Batches:
    """Batches that can be iterated over several times. They wait on the CPU, so that they need no memory of a GPU."""

    def __init__(self, batches: Sequence[Batch], device: torch.device) -> None:
        self._batches, self._device = batches, device

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return ({key: value.to(self._device) for key, value in batch.items()} for batch in self._batches)


def call_function(
    function: ScoreFunction,
    model: nn.Module,
    grid: Grid,
    batches: Any,
    loss: Callable[[Any], Tensor],
    name: str,
) -> Tensor:
    """The scores of a function, L x N, as float64 on the CPU.

    Args:
        model: in evaluation mode.
        name: says in messages which function it is, as ``method.selector=a.b``.

    Raises:
        UserError: the function fails, changes the model, or does not return L x N finite numbers.
    """
    before, flags = _state(model), {p: p.requires_grad for p in model.parameters()}
    try:
        found = function(model, grid, batches, loss)
    except Exception as error:
        if isinstance(error, UserError) or out_of_memory(error) is not None:
            raise
        raise UserError(f"{name} fails with {_in_words(error)}") from error
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
        model.eval()
    after = _state(model)
    if changed := sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key)):
        raise UserError(
            f"{name} must leave the model as it was, but it changed "
            f"{', '.join(changed[:3])}{' …' if len(changed) > 3 else ''}: undo that before returning, or use a copy"
        )
    return _checked(found, grid, name)


def _checked(found: Any, grid: Grid, name: str) -> Tensor:
    """The scores as float64 on the CPU; a UserError if they are not L x N finite numbers.

    What they are where a layer has no such module does not matter. It becomes NaN.
    """
    shape = grid.n_layers, grid.n_types
    what = f"a {type(found).__name__}"
    if isinstance(found, Tensor):
        if tuple(found.shape) == shape and not found.is_complex():
            scores = found.detach().to("cpu", torch.float64)
            wrong = ~scores.isfinite() & grid.present
            if not wrong.any():
                return scores.masked_fill(~grid.present, float("nan"))
            what = f"{int(wrong.sum())} that are not finite"
        else:
            what = f"a tensor of shape {tuple(found.shape)} and type {found.dtype}"
    raise UserError(
        f"{name} must return a tensor of {shape[0]} x {shape[1]} finite numbers, one for each layer and module type; "
        f"it returned {what}"
    )


def _state(model: nn.Module) -> dict[str, str]:
    """A fingerprint of every weight and buffer, and the number of forward hooks of every module."""
    state = {name: _fingerprint(value) for name, value in model.state_dict().items() if value.numel()}
    hooks = {
        f"the hooks of {name or 'the model'}": str(len(module._forward_hooks) + len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }
    return state | hooks


def _fingerprint(value: Tensor) -> str:
    """Hash and sum. The hash alone misses an even number of changed signs; the sum alone misses a permutation."""
    if value.device.type == "mps":  # which cannot hash
        value = value.cpu()
    if value.is_complex():  # torch cannot hash it, nor numbers of one byte
        value = torch.view_as_real(value.resolve_conj())
    elif value.is_floating_point() and value.itemsize == 1:
        value = value.reshape(-1).contiguous().view(torch.uint8)
    return f"{torch.hash_tensor(value).item()} {value.sum(dtype=torch.float32).item()}"


def _in_words(error: BaseException) -> str:
    """Type, message and place of an exception in one line."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words} ({frame.filename}, line {frame.lineno})"
