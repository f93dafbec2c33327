"""What a callback adds to a training: its settings, their checks, and the gradient of the penalty."""

import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffora.errors import UserError
from diffora.methods.base import Adaptation
from diffora.methods.lowrank import UNMASKED, Mask, Regulariser
from diffora.settings.read import value_problem

PLACES = {
    "penalty": (Regulariser, "weight"),
    "penalty_form": (Regulariser, "form"),
    "mask_rank": (Mask, "rank"),
    "mask_every": (Mask, "every"),
    "mask_independent": (Mask, "independent"),
    "mask_target": (Mask, "target"),
    "mask_start": (Mask, "start"),
}
"""The settings of `diffora.methods.lowrank` that the arguments of a callback set."""


@dataclass(frozen=True)
class Extras:
    """The arguments of a callback; `diffora.trainers.trainer.DifforaCallback` explains them."""

    penalty: float = 0.0
    mask_rank: int | str | None = None
    penalty_form: str = "squared"
    mask_every: str = "step"
    mask_independent: bool = False
    mask_target: str = "gradient"
    mask_start: int = 0

    def __post_init__(self) -> None:
        problems = []
        for name, (kind, field) in PLACES.items():
            hint = typing.get_type_hints(kind, include_extras=True)[field]
            problem = value_problem(name, getattr(self, name), hint)
            if problem:  # the words are those of YAML
                problems.append(problem.replace("null", "None").replace("true or false", "True or False"))
        if self.mask_rank is None:
            values = {f"mask_{name}": neutral for name, neutral in UNMASKED.items()}
            changed = [(name, value) for name, value in asdict(self).items() if value != values.get(name, value)]
            problems += [
                f"{name}={value} needs mask_rank, the directions to train: None is all" for name, value in changed
            ]
        if problems:
            raise UserError(problems)

    @property
    def some(self) -> bool:
        """Whether there is a penalty or a mask."""
        return self.penalty > 0 or self.mask_rank is not None

    def parts(self) -> tuple[Regulariser, Mask]:
        """The settings as the methods of this package take them."""
        values: dict[Any, dict[str, Any]] = {Regulariser: {}, Mask: {"head": False}}
        for name, value in asdict(self).items():
            kind, field = PLACES[name]
            values[kind][field] = value
        return Regulariser(**values[Regulariser]), Mask(**values[Mask])


def add_penalty(adaptation: Adaptation, model: nn.Module, scale: float = 1.0) -> Tensor | None:
    """Add the gradient of an adaptation's penalty to the gradients of a model's parameters, and return the penalty.

    So the penalty counts once in an optimiser step, whatever the loss is and however it is divided into micro-batches,
    and no reported loss contains it. Every process of a distributed training adds the same gradient.

    Args:
        adaptation: has the penalty.
        model: its parameters that require gradients are trained.
        scale: what the gradients are multiplied with at this moment (float16).
    """
    with torch.enable_grad():
        penalty = adaptation.penalty()
    if penalty is None:
        return None
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(penalty * scale, trained, allow_unused=True)
    for parameter, gradient in zip(trained, gradients, strict=True):
        if gradient is not None:
            gradient = gradient.contiguous()  # that of B of PEFT comes transposed
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
    return penalty.detach()


def changed(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One message for each argument that differs from the one that a checkpoint was made with."""
    return [
        f"{key}={now.get(key)!r} was {value!r} when this checkpoint was made: give the same, or start a new training"
        for key, value in saved.items()
        if now.get(key) != value
    ]
