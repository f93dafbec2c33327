"""The optimiser and the schedule of fine-tuning, as ``finetune.optimizer`` and ``finetune.scheduler`` name them."""

import inspect
import io
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from diffora.errors import UserError, first_line
from diffora.settings.sections import FineTune
from diffora.settings.targets import Target, target_of

OPTIMISERS = {"adamw": "torch.optim.AdamW", "sgd": "torch.optim.SGD", "adafactor": "torch.optim.Adafactor"}
SCHEDULES = {
    "linear": f"{__name__}.linear",
    "cosine": "transformers.get_cosine_schedule_with_warmup",
    "constant": "transformers.get_constant_schedule_with_warmup",
}
"""Short names, for values of ``finetune.optimizer`` and ``finetune.scheduler``."""
PARTS_OF_B = ("lora_bt", "lora_B", "lora_embedding_B")
"""What a part of the name of a B is called, in our layers and in PEFT's."""
TRIAL_STEPS = 10**6
"""Steps of the run in which a schedule is tried out."""


def linear(optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int) -> LambdaLR:
    """Linear warm-up, then linear decay to 0. Unlike transformers' schedule, the first step has a rate above 0."""

    def factor(step: int) -> float:
        if step < num_warmup_steps:
            return (step + 1) / num_warmup_steps
        return max(0.0, (num_training_steps - step) / max(1, num_training_steps - num_warmup_steps))

    return LambdaLR(optimizer, factor)


def make_optimiser(parameters: Iterable[tuple[str, nn.Parameter]], settings: FineTune) -> Optimizer:
    """The optimiser of a run.

    Args:
        parameters: names and parameters that are trained.
        settings: the ``finetune`` section.

    Raises:
        UserError: there is no such class, it does not take these arguments, or LoRA+ finds no B.
    """
    target = target_of(settings.optimizer, "finetune.optimizer", _is_optimiser, OPTIMISERS, first=1)
    said, known = f"{target.key}={target.path}", target.parameters
    if not _is_optimiser(target.makes):
        raise UserError(f"{said} is not a torch.optim.Optimizer")
    for name in ("lr", "weight_decay"):
        if name in target.given:
            raise UserError(f"{target.key}.{name}: give it as finetune.{name}")
    if "lr" not in known:
        raise UserError(f"{said} takes no lr, so finetune.lr would have no effect")
    if settings.weight_decay and "weight_decay" not in known:
        raise UserError(f"{said} has no weight decay: finetune.weight_decay={settings.weight_decay:g} must be 0")
    own = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if target.makes is torch.optim.AdamW and not target.given.keys() & {"fused", "foreach", "capturable"}:
        own["fused"] = True  # several times faster, on a CPU too
    own = {name: value for name, value in own.items() if name in known}
    optimiser: Optimizer = target.make(parameter_groups(parameters, settings), **own)
    return optimiser


def parameter_groups(parameters: Iterable[tuple[str, nn.Parameter]], settings: FineTune) -> list[Any]:
    """The parameters; with ``finetune.lora_plus_ratio`` as two groups, of which the second holds every B (LoRA+).

    Raises:
        UserError: LoRA+ finds no B.
    """
    named = list(parameters)
    if settings.lora_plus_ratio is None:
        return [parameter for _, parameter in named]
    of_b = {name: parameter for name, parameter in named if not {*name.split(".")}.isdisjoint(PARTS_OF_B)}
    if not of_b:
        raise UserError(
            f"finetune.lora_plus_ratio={settings.lora_plus_ratio:g}: this method trains no B of a low-rank update, so "
            "LoRA+ has nothing to do; leave it out"
        )
    others = [parameter for name, parameter in named if name not in of_b]
    return [
        {"params": others, "lr": settings.lr},
        {"params": list(of_b.values()), "lr": settings.lora_plus_ratio * settings.lr},
    ]


def make_schedule(optimiser: Optimizer, settings: FineTune, total_steps: int) -> LRScheduler:
    """The schedule of a run. Arguments that it needs and that the user does not give are those of the run.

    These are ``num_training_steps``, ``total_steps`` and ``T_max`` (the steps of the run), ``num_warmup_steps``, and
    ``max_lr`` (``finetune.lr``, with LoRA+ for each group).

    Raises:
        UserError: there is no such schedule, or it does not take these arguments.
    """
    target = _schedule_target(settings)
    if "num_warmup_steps" in target.given:
        raise UserError(f"{target.key}.num_warmup_steps: give it as finetune.warmup_steps")
    own = {
        **dict.fromkeys(("num_training_steps", "total_steps", "T_max"), total_steps),
        "num_warmup_steps": settings.warmup_steps,
        "max_lr": [group["lr"] for group in optimiser.param_groups],
    }
    schedule = target.fill(own).make(optimiser)
    if isinstance(schedule, ReduceLROnPlateau):
        raise UserError(
            f"{target.key}={target.path} waits for a metric, but a schedule is stepped after each optimiser step; use "
            "finetune.early_stop, or another schedule"
        )
    if not isinstance(schedule, LRScheduler):
        kind = type(schedule).__name__
        raise UserError(f"{target.key}={target.path} gives a {kind}, not a torch.optim.lr_scheduler.LRScheduler")
    return schedule


def _schedule_target(settings: FineTune) -> Target:
    return target_of(settings.scheduler, "finetune.scheduler", _is_schedule, SCHEDULES, first=1)


def has_warmup(settings: FineTune) -> bool:
    """Whether the schedule uses ``finetune.warmup_steps``."""
    return "num_warmup_steps" in _schedule_target(settings).parameters


def problems(settings: FineTune, recipe_warmup: int | None) -> Iterator[str]:
    """Every mistake in the optimiser and the schedule. Both are tried on two small parameters.

    Args:
        settings: the ``finetune`` section.
        recipe_warmup: the recipe's warm-up steps. A schedule without warm-up leaves these out without an error.
    """
    names = (settings.optimizer, OPTIMISERS), (settings.scheduler, SCHEDULES)
    if not settings.weight_decay and all(isinstance(value, str) and value in short for value, short in names):
        return  # the first step of an optimiser takes a second of imports
    small = [("a", nn.Parameter(torch.zeros(2, 3))), ("b", nn.Parameter(torch.zeros(3)))]
    plain = replace(settings, lora_plus_ratio=None)  # the small parameters have no B
    optimiser: Optimizer = torch.optim.SGD([parameter for _, parameter in small], lr=settings.lr)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            optimiser = make_optimiser(small, plain)
            for _, parameter in small:
                parameter.grad = torch.ones_like(parameter)
            _try_out("finetune.optimizer", optimiser)
        except UserError as error:
            yield from error.problems
        try:
            _try_out("finetune.scheduler", make_schedule(optimiser, plain, TRIAL_STEPS))
            if not has_warmup(settings) and settings.warmup_steps not in (0, recipe_warmup):
                yield f"finetune.warmup_steps={settings.warmup_steps}: finetune.scheduler has no warm-up steps"
        except UserError as error:
            yield from error.problems


def _try_out(key: str, made: Any) -> None:
    """Take a step, and put the state into a checkpoint and back as a run does.

    Raises:
        UserError: something goes wrong.
    """
    file, doing = io.BytesIO(), "cannot take a step here"
    try:
        made.step()
        doing = "has a state that cannot be put into a checkpoint"
        torch.save(made.state_dict(), file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception as error:  # whatever a user's own class does
        raise UserError(f"{key}: {type(made).__name__} {doing}: {first_line(error)}") from error


def _is_optimiser(found: Any) -> bool:
    return inspect.isclass(found) and issubclass(found, Optimizer) and found is not Optimizer


def _is_schedule(found: Any) -> bool:
    if inspect.isclass(found):
        return issubclass(found, LRScheduler) and found is not LRScheduler
    return inspect.isfunction(found) and found.__name__.startswith("get_") and "schedule" in found.__name__
