"""The adapters in a model that somebody else's trainer trains: of `diffora.attach`, or of PEFT."""

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from diffora.core.lowrank import lowrank_layers
from diffora.errors import UserError
from diffora.methods.base import Adaptation
from diffora.methods.lowrank import LowRankAdaptation, Mask, Regulariser
from diffora.trainers.adalora import TrainedAdaLoRA, tuner_in
from diffora.trainers.extras import Extras

log = logging.getLogger(__name__)


def adaptation_of(model: nn.Module, extras: Extras, seed: int) -> Adaptation:
    """The hooks that a training of this model needs around each step.

    Args:
        model: has adapters of `diffora.attach`, a LoRA of PEFT or an AdaLoRA of PEFT.
        extras: penalty and masks.
        seed: of the masks.

    Raises:
        UserError: the model has no such adapters, or the extras do not fit them.
    """
    if (tuner := tuner_in(model)) is not None:
        if extras.some:
            raise UserError(
                "penalty= and mask_rank= do not go with AdaLoRA: its own penalty is orth_reg_weight= of AdaLoraConfig, "
                "and it chooses directions by their importance"
            )
        return TrainedAdaLoRA(tuner)
    regulariser, mask = extras.parts()
    if any(True for _ in lowrank_layers(model)):
        adaptation = LowRankAdaptation(model, regulariser, mask, seed)
    else:
        adaptation = PeftLoRA(model, regulariser, mask, seed)
    ranks = [layers[0].rank for layers in adaptation.adapters]
    if not ranks:
        raise UserError(
            "this model has no low-rank adapters to train: call diffora.attach or peft.get_peft_model first"
        )
    if isinstance(mask.rank, int) and mask.rank > max(ranks):
        raise UserError(f"mask_rank={mask.rank} must not be above {max(ranks)}, the largest rank of the adapters")
    for layer in (layer for layers in adaptation.adapters for layer in layers):
        layer.rows = None  # of a training that was interrupted
    return adaptation


def check_adapters(model: nn.Module, extras: Extras) -> None:
    """Check before a training what `adaptation_of` checks, and warn if the callback has nothing to do.

    Raises:
        UserError: as `adaptation_of`.
    """
    adaptation_of(model, extras, 0)
    if not (extras.some or shares_pairs(model) or tuner_in(model) is not None):
        log.warning("this callback changes nothing here: give it penalty= or mask_rank=, or leave it out")


class PeftLoRA(LowRankAdaptation):
    """The LoRAs of PEFT in a model, with R-LoRA's penalty and GM-LoRA's masks."""

    def __init__(self, model: nn.Module, regulariser: Regulariser, mask: Mask, seed: int) -> None:
        super().__init__(model, regulariser, mask, seed)
        pairs: list[Any] = list(_peft_pairs(model))  # `PeftPair` has what is used of a `LowRankLinear`
        self.adapters = [[pair] for pair in pairs]


class PeftPair:
    """A and B of a LoRA of PEFT. Rows without a gradient are masked by hooks on the two parameters.

    Attributes:
        lora_a: (rank, in).
        lora_bt: B transposed, (rank, out): a view of PEFT's parameter.
    """

    def __init__(self, lora_a: nn.Parameter, lora_b: nn.Parameter) -> None:
        self._a, self._b = lora_a, lora_b
        self._rows: tuple[Tensor, Tensor] | None = None

    @property
    def rank(self) -> int:
        return self._a.shape[0]

    @property
    def lora_a(self) -> Tensor:
        return self._a

    @property
    def lora_bt(self) -> Tensor:
        return self._b.T

    @property
    def rows(self) -> tuple[Tensor, Tensor] | None:
        """The rows of A and of B^T that get a gradient in this step, or None for all ([R] Algorithm 1)."""
        return self._rows

    @rows.setter
    def rows(self, rows: tuple[Tensor, Tensor] | None) -> None:
        self._rows = rows
        for parameter, dim, live in ((self._a, 0, rows and rows[0]), (self._b, 1, rows and rows[1])):
            if parameter in _HOOKS:
                _HOOKS.pop(parameter).remove()
            if live is not None:
                _HOOKS[parameter] = parameter.register_hook(_only(live, dim))


_HOOKS: Any = WeakTensorKeyDictionary()
"""The hook that masks a parameter's gradient. It is kept here, so that the next training also finds the hook that an
interrupted one left."""


def _only(rows: Tensor, dim: int) -> Any:
    """A hook that keeps some rows (dim 0) or columns (dim 1) of a gradient, and sets the others to 0."""

    def hook(gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient).index_copy_(dim, rows, gradient.index_select(dim, rows))

    return hook


def _peft_pairs(model: nn.Module) -> Iterator[PeftPair]:
    """The trained LoRAs of PEFT in a model. A pair that several modules share comes once.

    Raises:
        UserError: a LoRA is on a module that is not linear.
    """
    seen: set[nn.Parameter] = set()
    modules: Iterable[tuple[str, Any]] = model.named_modules()
    for name, module in modules:
        parts: dict[str, Any] = getattr(module, "lora_A", {})
        for adapter, part in parts.items():
            if not any(p.requires_grad for p in part.parameters()):
                continue
            other: Any = module.lora_B[adapter]
            if getattr(module, "num_experts", 1) > 1:  # row i of A and column i of B are of two experts
                raise UserError(f"{name}: penalty and masks are for LoRAs of one layer, and this is of many experts")
            if any(not isinstance(matrix, nn.Linear) for matrix in (part, other)):
                raise UserError(
                    f"{name}: penalty and masks are for LoRAs of linear layers, not of {type(part).__name__}"
                )
            if part.weight not in seen:
                seen.add(part.weight)
                yield PeftPair(part.weight, other.weight)
        if any(p.requires_grad for p in getattr(module, "lora_embedding_A", {}).values()):
            raise UserError(f"{name}: penalty and masks are for LoRAs of linear layers, and this is an embedding")


def load_shared_once(model: nn.Module) -> None:
    """Accept a state dict that has one copy of a shared pair, in place: its other names do not count as missing.

    `save_pretrained` writes such files. Without this, loading a checkpoint works too, but `Trainer` warns of missing
    weights, and ``strict=True`` refuses it.
    """

    def hook(module: nn.Module, keys: Any) -> None:
        names: dict[int, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        missing = set(keys.missing_keys)
        loaded = {name for same in names.values() if not missing.issuperset(same) for name in same}
        keys.missing_keys[:] = [name for name in keys.missing_keys if name not in loaded]

    model.register_load_state_dict_post_hook(hook)


def shares_pairs(model: nn.Module) -> bool:
    """Whether several low-rank layers of a model share a pair."""
    layers = [layer for _, layer in lowrank_layers(model)]
    return len({layer.lora_a for layer in layers}) < len(layers)
