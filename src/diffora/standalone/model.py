"""The user's model: which grid and head it has, and how it is left as it was found."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from diffora.backbones.backbone import Backbone
from diffora.backbones.precision import HALF
from diffora.core.attach import inside_adapter
from diffora.core.grid import Grid, find_grid
from diffora.errors import UserError


def grid_of(model: nn.Module, layer: str | None, candidates: Sequence[str] | None) -> Grid:
    """The candidates of a model without adapters; see `diffora.core.grid.find_grid`.

    Raises:
        UserError: there are adapters, no repeated layers, or other problems of the grid.
    """
    modules = dict(model.named_modules())
    if adapted := [name for name in modules if name and inside_adapter(name, modules)]:
        raise UserError(
            f"this model has adapters already, such as {adapted[0]}: take them out first, with "
            "diffora.core.attach.detach(model), or with unload() where they are PEFT's"
        )
    return find_grid(model, layer, candidates)


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter."""
    return next(model.parameters()).device


def head_of(model: nn.Module, grid: Grid, names: Sequence[str] | None) -> list[nn.Parameter]:
    """The parameters that are trained together with A and B.

    - names of modules are given: their parameters,
    - some parameters are frozen: those that are not, besides the candidates' own,
    - nothing is frozen, in a transformers model: its parts outside the pretrained model,
    - nothing is frozen, in any other model: everything outside the layers of the grid.

    Raises:
        UserError: a name is not a module, or one of the parameters is in half precision.
    """
    parameters = dict(model.named_parameters())
    if names is not None:
        modules = dict(model.named_modules())
        if unknown := [f"head: {name} is not a module of this model" for name in names if name not in modules]:
            raise UserError(unknown)
        chosen = {p for name in names for p in modules[name].parameters()}
    elif not all(p.requires_grad for p in parameters.values()):
        chosen = {p for p in parameters.values() if p.requires_grad}
    elif hasattr(model, "config"):
        chosen = Backbone.of(model).head_parameters()
    else:
        layers = tuple(f"{layer}." for layer in grid.layers if layer)
        chosen = {p for name, p in parameters.items() if not name.startswith(layers)}
    chosen -= {p for name in grid.modules for p in model.get_submodule(name).parameters()}
    for name, parameter in parameters.items():
        if parameter in chosen and parameter.dtype in HALF:
            raise UserError(
                f"the search would train {name} in {parameter.dtype}, where small steps are rounded away: load the "
                "model in float32, or give head=[] to train no head"
            )
    return [p for p in parameters.values() if p in chosen]


@contextmanager
def left_as_found(model: nn.Module, seed: int, trained: Sequence[nn.Parameter] = ()) -> Iterator[None]:
    """Inside this context, torch's random numbers start from a seed. Afterwards, model and random state are as before.

    Restored are the values of ``trained`` and of all buffers, ``requires_grad`` and ``grad`` of all parameters, and the
    mode of all modules.
    """
    modes = {module: module.training for module in model.modules()}
    flags = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    weights = [(p, p.detach().clone()) for p in trained]
    buffers = [(m, name, b, b.clone()) for m in modes for name, b in m._buffers.items() if b is not None]
    on_gpu = device_of(model).type == "cuda"
    with torch.random.fork_rng(range(torch.cuda.device_count()) if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            torch.cuda.manual_seed_all(seed)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in weights:
                    parameter.copy_(value)
                for module, name, buffer, value in buffers:
                    module._buffers[name] = buffer.copy_(value)
            for parameter, (flag, grad) in flags.items():
                parameter.requires_grad_(flag)
                parameter.grad = grad
            for module, mode in modes.items():
                module.training = mode
