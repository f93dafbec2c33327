"""Replaces the modules of a grid by low-rank layers ([D] Algorithm 1, line 11), and restores them."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from diffora.core.linear import features, is_linear
from diffora.core.lowrank import KERNELS, LowRankLinear, lowrank_layers
from diffora.core.model import device_of, places_of
from diffora.core.norms import FOUND_MEAN
from diffora.errors import UserError, first_of

SHARED_SCALES = ("own", "same")


def new_pair(base: nn.Module, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A new pair (A, B^T) in float32. A is Kaiming-uniform as in LoRA and B is zero, so the update starts at zero."""
    n_in, n_out = features(base)
    device = device_of(base)
    lora_a = nn.Parameter(torch.empty(rank, n_in, device=device, dtype=torch.float32))
    nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
    return lora_a, nn.Parameter(torch.zeros(rank, n_out, device=device, dtype=torch.float32))


def attach(
    model: nn.Module,
    names: Iterable[Iterable[str | None]],
    selected: Tensor,
    rank: int,
    shared_rank: int | None,
    alpha: float,
    dropout: float = 0.0,
    *,
    freeze: bool = True,
    kernel: str = "auto",
    shared_scale: str = "own",
) -> list[list[LowRankLinear | None]]:
    """Replace the modules of a grid by low-rank layers ([D] Algorithm 1, line 11), in place, and freeze the rest.

    Selected modules get a pair (A, B) of their own of the given rank. Unselected modules of one type (column) and shape
    share one pair of ``shared_rank`` across layers ([D] section 4.3). With ``shared_rank=None`` they stay as they are.
    A module that is used in several places of the model is replaced in all of them.

    Args:
        names: L x N full names of the modules, None where a layer has no such module.
        selected: boolean, L x N.
        rank, shared_rank: of the selected and of the other modules.
        alpha: the updates are scaled by alpha / rank.
        shared_scale: ``own``: updates of shared pairs are scaled by alpha / shared_rank; ``same``: by alpha / rank, as
            those of selected modules. [D] does not say which.
        dropout: rate on the input of every A while training.
        freeze: freeze every parameter except those of low-rank layers. The head is frozen too: to train it, call
            ``model.classifier.requires_grad_(True)`` afterwards. False changes ``requires_grad`` of the adapted modules
            only.
        kernel: ``auto``, ``fused`` or ``plain``; see `LowRankLinear`.

    Returns:
        L x N: the new layers, None for a module that was not replaced.

    Raises:
        UserError: a name is not a linear module of the model or is adapted already, ``selected`` is not boolean, a
            rank is larger than a module, or another number is impossible. The model is then unchanged.
    """
    rows = [list(row) for row in names]
    if problems := list(_setting_problems(selected, rank, shared_rank, alpha, dropout, kernel, shared_scale)):
        raise UserError(problems)
    if selected.shape != (shape := (len(rows), len(rows[0]) if rows else 0)) or any(len(r) != shape[1] for r in rows):
        raise UserError(f"selected is {tuple(selected.shape)}; the names of the modules are {[len(r) for r in rows]}")
    modules, places = dict(model.named_modules(remove_duplicate=False)), places_of(model)
    flags: list[list[bool]] = selected.tolist()
    _check_places(rows, flags, rank, shared_rank, modules)
    if freeze:
        freeze_rest(model)
    pairs = _Pairs(rank, shared_rank)

    def adapt(name: str | None, column: int, flag: bool) -> LowRankLinear | None:
        if name is None:
            return None
        base = modules[name]
        if (pair := pairs.of(base, column, flag)) is None:
            return None
        layer = LowRankLinear(base, *pair, alpha=alpha, dropout=dropout, kernel=kernel)
        if shared_scale == "same":
            layer.scaling = alpha / rank
        for place in places[id(base)]:
            model.set_submodule(place, layer)
        return layer

    layers = [
        [adapt(name, column, flag) for column, (name, flag) in enumerate(zip(row, own, strict=True))]
        for row, own in zip(rows, flags, strict=True)
    ]
    note_adapted(model)
    return layers


USED_NESTED = "_diffora_used_nested_tensor"
"""An attribute of encoders that used nested tensors before they had adapters. A copy of the model has it too."""


def note_adapted(model: nn.Module) -> None:
    """Prepare a model whose modules have just been replaced by low-rank layers, in place.

    Nested tensors are switched off, which are for layers without adapters. The statistics of norms are noted, for
    `moved_statistics`.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor:
            module.use_nested_tensor = False
            setattr(module, USED_NESTED, True)
        elif isinstance(module, _NormBase) and module.running_mean is not None and not module.running_mean.is_meta:
            setattr(module, FOUND_MEAN, module.running_mean.detach().cpu().clone())


class _Pairs:
    """The pairs (A, B^T) of the modules of a grid; see `attach`."""

    def __init__(self, rank: int, shared_rank: int | None) -> None:
        self.rank, self.shared_rank = rank, shared_rank
        self._shared: dict[tuple[int, int, int], tuple[nn.Parameter, nn.Parameter]] = {}

    def of(self, base: nn.Module, column: int, selected: bool) -> tuple[nn.Parameter, nn.Parameter] | None:
        """A new pair for a selected module, else the one of its column and shape; None if nothing is shared."""
        if selected:
            return new_pair(base, self.rank)
        if self.shared_rank is None:
            return None
        key = (column, *features(base))
        if key not in self._shared:
            self._shared[key] = new_pair(base, self.shared_rank)
        return self._shared[key]


def _setting_problems(
    selected: Any, rank: Any, shared_rank: Any, alpha: Any, dropout: Any, kernel: Any, shared_scale: Any
) -> Iterator[str]:
    """Mistakes in the arguments of `attach`, except the names."""
    if not isinstance(selected, Tensor) or selected.dtype != torch.bool:
        kind = selected.dtype if isinstance(selected, Tensor) else type(selected).__name__
        yield f"selected must be a boolean tensor, as diffora.core.dam.discretise makes of weights; it is {kind}"
    for name, value in (("rank", rank), ("shared_rank", shared_rank)):
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not whole and not (name == "shared_rank" and value is None):
            more = ", or None to share nothing" if name == "shared_rank" else ""
            yield f"{name}={value!r} must be a whole number of at least 1{more}"
    if not (isinstance(alpha, int | float) and 0 < alpha < math.inf):
        yield f"alpha={alpha!r} must be a finite number above 0"
    if not (isinstance(dropout, int | float) and 0 <= dropout < 1):
        yield f"dropout={dropout!r} must be a rate in [0, 1)"
    if kernel not in KERNELS:
        yield f"kernel={kernel!r} must be one of {', '.join(KERNELS)}"
    if shared_scale not in SHARED_SCALES:
        yield f"shared_scale={shared_scale!r} must be one of {', '.join(SHARED_SCALES)}"
    elif shared_scale == "same" and shared_rank is None:
        yield "shared_scale='same' needs shared_rank=: without it there are no shared pairs"


def inside_adapter(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a module is part of a low-rank layer of this project or of an adapter layer of PEFT."""
    parts = name.split(".")
    above = (modules.get(".".join(parts[:count])) for count in range(1, len(parts) + 1))
    return any(isinstance(module, LowRankLinear) or hasattr(module, "adapter_layer_names") for module in above)


def _check_places(
    rows: Sequence[Sequence[str | None]],
    flags: Sequence[Sequence[bool]],
    rank: int,
    shared_rank: int | None,
    modules: Mapping[str, nn.Module],
) -> None:
    """Refuse modules that cannot be replaced by a low-rank layer, and ranks that are larger than their modules."""
    problems: list[str] = []
    seen: dict[int, str] = {}
    narrowest: dict[str, tuple[int, int, str]] = {}
    for name, flag in ((n, f) for row, own in zip(rows, flags, strict=True) for n, f in zip(row, own, strict=True)):
        if name is None:
            continue
        module = modules.get(name)
        if module is None:
            problems.append(f"{name} is not a module of this model")
        elif inside_adapter(name, modules):
            problems.append(
                f"{name} has a low-rank layer already: diffora.detach(model) takes it out, or PEFT's unload()"
            )
        elif not is_linear(module):
            problems.append(f"{name} is a {type(module).__name__}, not a linear layer that is called")
        elif id(module) in seen:
            problems.append(f"{name} is the same module as {seen[id(module)]}: name it once, both are adapted together")
        else:
            seen[id(module)] = name
            key, wanted = ("rank", rank) if flag else ("shared_rank", shared_rank or 0)
            if wanted > (width := min(features(module))):
                narrowest[key] = min(narrowest.get(key, (width, wanted, name)), (width, wanted, name))
    problems += [
        f"{key}={wanted} must not be above {width}, the smaller width of {name}: more adds nothing"
        for key, (width, wanted, name) in narrowest.items()
    ]
    if problems:
        raise UserError(problems)


def freeze_rest(model: nn.Module) -> None:
    """Freeze every parameter of a model except A, B and the gates of low-rank layers, in place."""
    adapters = {p for _, layer in lowrank_layers(model) for p in layer.parameters(recurse=False)}
    for parameter in model.parameters():
        if parameter not in adapters:
            parameter.requires_grad_(False)


class Calls:
    """Notes which low-rank layers of a model are used, from now on. A compiled model is not looked at.

    Args:
        model: with low-rank layers.
    """

    def __init__(self, model: nn.Module) -> None:
        # A run compiles `forward` of the model (`diffora.loop.compiled`), which hooks would cut into many graphs.
        compiled = model._compiled_call_impl is not None or "forward" in vars(model)
        layers = [] if compiled else lowrank_layers(model)
        self._hooks = {(name, layer): layer.register_forward_pre_hook(self._note) for name, layer in layers}

    def _note(self, layer: nn.Module, args: Any) -> None:
        for key in [key for key in self._hooks if key[1] is layer]:
            self._hooks.pop(key).remove()

    def check(self) -> None:
        """Raise a UserError if layers have not been used: their gates say nothing about them."""
        if missing := [name for name, layer in self._hooks if not layer.weight_was_read]:
            raise UserError(
                f"the loss does not call {first_of(missing)} for any batch of the search: leave "
                "these modules out of the candidates"
            )


def detach(model: nn.Module) -> None:
    """Replace all low-rank layers by their base layers, without the update, in place.

    ``requires_grad`` stays as it is: what `attach` froze remains frozen.
    """
    for name, layer in [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, LowRankLinear)]:
        layer.unmerge()
        model.set_submodule(name, layer.base)
    forget_adapted(model)


def forget_adapted(model: nn.Module) -> None:
    """Undo `note_adapted`, when a model has no low-rank layers any more."""
    for module in model.modules():
        vars(module).pop(FOUND_MEAN, None)
        if vars(module).pop(USED_NESTED, False):
            setattr(module, "use_nested_tensor", True)  # noqa: B010  # of an encoder


def taken(model: nn.Module) -> dict[str, nn.Module]:
    """Take the low-rank layers out of a model, and put their base layers back. Returns the layers by their place."""
    layers = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, LowRankLinear)}
    for name, layer in layers.items():
        model.set_submodule(name, layer.base)
    return dict(layers)


def put(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put low-rank layers that `taken` returned in their places, all or some of them."""
    for name, layer in layers.items():
        model.set_submodule(name, layer)
