"""The user's model: what is inside its wrappers, which grid and head it has, and how it is left as it was found."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diffora.backbones.backbone import Backbone, pretrained_children
from diffora.core.attach import inside_adapter
from diffora.core.grid import Grid, find_grid
from diffora.core.model import check_values_present, device_of, inside_wrappers
from diffora.errors import UserError

log = logging.getLogger("diffora")

SHARDED = ("DistributedDataParallel", "FullyShardedDataParallel", "DTensor")
"""Classes of modules and parameters that belong to several processes."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside the wrappers of ``torch.compile`` and `nn.DataParallel`.

    Raises:
        UserError: this is no model, it is divided among processes, or it has no weights to compute with.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"model is a {type(model).__name__}: it must be a loaded model, a torch.nn.Module")
    model = inside_wrappers(model, (nn.DataParallel,))
    kinds = {base.__name__ for thing in (model, *model.parameters()) for base in type(thing).__mro__}
    if shared := [name for name in SHARDED if name in kinds]:
        raise UserError(
            f"this model is a {shared[0]}, which several processes train together. Search in one process, with the "
            "model that is not wrapped yet (model.module), and give the result to the others: selection.save(path), "
            "Selection.load(path)"
        )
    check_values_present(model)
    return model


def warn_of_processes() -> None:
    """Warn if several processes run, because each one searches by itself."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        n = torch.distributed.get_world_size()
        if n > 1:
            log.warning(
                f"{n} processes are running, and each one searches by itself. Their selections are the same only if "
                "their weights and batches are. Otherwise, search in one of them, and give the others its file "
                "(selection.save)"
            )


def grid_of(model: nn.Module, layer: str | None, candidates: Sequence[str] | None) -> Grid:
    """The candidates of a model without adapters or wrappers; see `diffora.core.grid.find_grid`.

    Raises:
        UserError: there are adapters, no repeated layers, other problems of the grid, or a candidate in the head.
    """
    if layer is not None and not isinstance(layer, str | list | tuple):
        raise UserError(f"layer={layer!r} must be the name of the layers, with * for the number")
    check_names("candidates", candidates)
    modules = dict(model.named_modules())
    if adapted := [name for name in modules if name and inside_adapter(name, modules)]:
        raise UserError(
            f"this model has adapters already, such as {adapted[0]}: take them out first, with "
            "diffora.detach(model), or with unload() where they are PEFT's, and let the head require gradients again"
        )
    grid = find_grid(model, layer, candidates)
    Backbone.of(model).check_outside_head(grid.modules)
    return grid


def check_names(argument: str, names: Sequence[str] | None) -> None:
    """Refuse one text where a list of names is needed: its letters would be taken as names."""
    if isinstance(names, str):
        raise UserError(f"{argument}={names!r} must be a list of names: {argument}=[{names!r}]")


def check_head(names: Sequence[str] | None, model: nn.Module) -> None:
    """Refuse names that are no modules of the model."""
    check_names("head", names)
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    if unknown := [f"head: {name} is not a module of this model" for name in names or () if name not in modules]:
        raise UserError(unknown)


def head_of(model: nn.Module, grid: Grid, names: Sequence[str] | None) -> list[nn.Parameter]:
    """The parameters that are trained together with A and B.

    - names of modules are given: their parameters,
    - some of the candidates' own parameters are frozen: all parameters that are not frozen, except the candidates',
    - none of them is frozen, in a transformers model: its parts outside the pretrained model, and the parameters that
      belong to no part, such as a temperature,
    - none of them is frozen, in a module of your own around transformers models: the same of each of them, and
      everything outside them,
    - none of them is frozen, in any other model: everything outside the layers of the grid and their siblings; nothing
      if the grid is the whole model (``layer="."``).

    In the last three cases, frozen parameters are left out. There are some in models whose positions are fixed.

    Raises:
        UserError: a name is not a module.
    """
    check_head(names, model)
    parameters = dict(model.named_parameters())
    candidates = {p for name in grid.modules for p in model.get_submodule(name).parameters()}
    trainable = {p for p in parameters.values() if p.requires_grad}
    if names is not None:
        chosen = {p for name in names for p in model.get_submodule(name).parameters()}
    elif not candidates <= trainable:
        chosen = trainable
    elif pretrained_children(model):
        chosen = _own_head(model) & trainable
    elif inside := _transformers_models(model):
        chosen = trainable - set[nn.Parameter]().union(*map(_pretrained, inside))
    else:
        chosen = {p for name, p in parameters.items() if not _in_stack(model, name, grid)} & trainable
    chosen -= candidates
    if names is None and not chosen and grid.layers != ("",) and _may_have_head(model):
        log.warning(
            "nothing outside the layers requires gradients, so that no head is trained with the adapters: if this "
            "model has one, name it (head=[…]), or let it require gradients"
        )
    return [p for p in parameters.values() if p in chosen]


def _may_have_head(model: nn.Module) -> bool:
    """Whether a model may have a head: all but those of transformers that are a pretrained model and nothing else."""
    if pretrained_children(model):
        return bool(_own_head(model))
    return not hasattr(model, "base_model_prefix")


def _own_head(model: nn.Module) -> set[nn.Parameter]:
    """What a transformers model has besides the pretrained one; empty without a head."""
    own = Backbone.of(model).head_parameters()
    return own | set(model.parameters(recurse=False)) if own else own


def _transformers_models(model: nn.Module) -> list[nn.Module]:
    """The outermost models of transformers inside a module that is none itself."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if hasattr(module, "base_model_prefix") and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return [] if "" in found else list(found.values())


def _pretrained(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of a transformers model but those of its head."""
    return set(model.parameters()) - (_own_head(model) if pretrained_children(model) else set())


def _in_stack(model: nn.Module, name: str, grid: Grid) -> bool:
    """Whether a parameter is in a layer of the grid or in a sibling of one.

    A sibling has a name that differs in numbers only, and modules inside or the class of a layer. So the last module of
    ``nn.Sequential(Block(), Block(), nn.Linear(16, 3))`` is none.
    """
    if grid.layers == ("",):  # the whole model is one row
        return True

    def numberless(path: str) -> list[str]:
        return ["*" if part.isdigit() else part for part in path.split(".")]

    parts = numberless(name)
    for layer in grid.layers:
        depth = layer.count(".") + 1
        if parts[:depth] == numberless(layer):
            place = model.get_submodule(".".join(name.split(".")[:depth]))
            if any(place.children()) or type(place) is type(model.get_submodule(layer)):
                return True
    return False


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed torch's random numbers on the CPU and, if the device is a GPU, on all GPUs."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)


@contextmanager
def left_as_found(model: nn.Module, seed: int, trained: Sequence[nn.Parameter] = ()) -> Iterator[None]:
    """Inside this context, torch's random numbers start from a seed. Afterwards, model and random state are as before.

    Restored are the values of ``trained`` and of all buffers, ``requires_grad`` and ``grad`` of all parameters, and the
    modules' own attributes that are numbers, texts or tensors, such as their mode and what rotary positions have seen.
    Attributes that were not there before are removed. A module that was compiled in place (``model.compile()``) is not
    compiled inside the context.
    """
    compiled = {module: call for module in model.modules() if (call := module._compiled_call_impl) is not None}
    flags = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    states = [_State(module) for module in model.modules()]
    weights = [(p, p.detach().clone()) for p in trained]
    on_gpu = device_of(model).type == "cuda"
    with torch.random.fork_rng(range(torch.cuda.device_count()) if on_gpu else []):
        seed_torch(seed, device_of(model))
        try:
            for module in compiled:
                module._compiled_call_impl = None
            yield
        finally:
            for parameter, (flag, grad) in flags.items():
                parameter.requires_grad_(flag)
                parameter.grad = grad
            with torch.no_grad():
                for parameter, value in weights:
                    parameter.copy_(value)
                for state in states:
                    state.restore()
            for module, call in compiled.items():
                module._compiled_call_impl = call


class _State:
    """The buffers and the plain attributes of a module, to restore them."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.names = module, set(vars(module))
        self.buffers = dict(module._buffers)
        self.training = module.training
        self.attributes = {n: v for n, v in vars(module).items() if isinstance(v, int | float | str | None | Tensor)}
        tensors = [t for t in (*self.buffers.values(), *self.attributes.values()) if isinstance(t, Tensor)]
        self.values = [(tensor, tensor.detach().clone()) for tensor in tensors if _may_change(tensor)]

    def restore(self) -> None:
        for name in set(vars(self.module)) - self.names:
            del vars(self.module)[name]
        vars(self.module).update(self.attributes)
        self.module.training = self.training  # a scripted module keeps it elsewhere
        for name, buffer in self.buffers.items():
            if self.module._buffers[name] is not buffer:
                self.module._buffers[name] = buffer
        for tensor, value in self.values:
            tensor.copy_(value)


def _may_change(tensor: Tensor) -> bool:
    """Whether something may change a tensor in place.

    Nothing does if it has one value for several elements, or was made in inference mode. Sparse and nested tensors are
    not looked at.
    """
    plain = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_inference()
    return plain and 0 not in tensor.stride()
