"""The optimiser and the schedule of fine-tuning, as ``finetune.optimizer`` and ``finetune.scheduler`` name them."""

import inspect
import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from diffora.errors import UserError
from diffora.settings.checks import strange_value
from diffora.settings.sections import FineTune
from diffora.trust import function_at

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
    key = "finetune.optimizer"
    made_by, given = _named(settings.optimizer, OPTIMISERS, key, _is_optimiser)
    if not _is_optimiser(made_by):
        raise UserError(f"{key}={_path(settings.optimizer, OPTIMISERS)} is not a torch.optim.Optimizer")
    known = _arguments(made_by)
    for name in ("lr", "weight_decay"):
        if name in given:
            raise UserError(f"{key}.{name}: give it as finetune.{name}")
    if "lr" not in known:
        raise UserError(f"{key}={_path(settings.optimizer, OPTIMISERS)} takes no lr, so finetune.lr has no effect")
    given["lr"] = settings.lr
    if "weight_decay" in known:
        given["weight_decay"] = settings.weight_decay
    elif settings.weight_decay:
        raise UserError(f"{key}={_path(settings.optimizer, OPTIMISERS)} has no weight decay: finetune.weight_decay=0")
    if made_by is torch.optim.AdamW and not given.keys() & {"fused", "foreach", "capturable", "differentiable"}:
        given["fused"] = True  # several times faster, on a CPU too
    groups = parameter_groups(parameters, settings)
    optimiser: Optimizer = _called(made_by, (groups,), given, key, settings.optimizer, OPTIMISERS)
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
    key, path = "finetune.scheduler", _path(settings.scheduler, SCHEDULES)
    made_by, given = _named(settings.scheduler, SCHEDULES, key, _is_schedule)
    own = {
        **dict.fromkeys(("num_training_steps", "total_steps", "T_max"), total_steps),
        "num_warmup_steps": settings.warmup_steps,
        "max_lr": [group["lr"] for group in optimiser.param_groups],
    }
    if "num_warmup_steps" in given:
        raise UserError(f"{key}.num_warmup_steps: give it as finetune.warmup_steps")
    for name, parameter in _arguments(made_by).items():
        if name in own and name not in given and parameter.default in (inspect.Parameter.empty, None):
            given[name] = own[name]
    schedule = _called(made_by, (optimiser,), given, key, settings.scheduler, SCHEDULES)
    if isinstance(schedule, ReduceLROnPlateau):
        raise UserError(
            f"{key}={path} waits for a metric, but a schedule is stepped after each optimiser step; use "
            "finetune.early_stop, or another schedule"
        )
    if not isinstance(schedule, LRScheduler):
        raise UserError(f"{key}={path} gives a {type(schedule).__name__}, not a torch.optim.lr_scheduler.LRScheduler")
    return schedule


def has_warmup(settings: FineTune) -> bool:
    """Whether the schedule uses ``finetune.warmup_steps``."""
    made_by, _ = _named(settings.scheduler, SCHEDULES, "finetune.scheduler", _is_schedule)
    return "num_warmup_steps" in _arguments(made_by)


def problems(settings: FineTune, recipe_warmup: int | None) -> Iterator[str]:
    """Every mistake in the optimiser and the schedule. Both are tried on two small parameters.

    Args:
        settings: the ``finetune`` section.
        recipe_warmup: the recipe's warm-up steps. A schedule without warm-up leaves these out without an error.
    """
    for key, value in (("finetune.optimizer", settings.optimizer), ("finetune.scheduler", settings.scheduler)):
        if isinstance(value, Mapping) and (strange := strange_value(key, dict(value))):
            yield strange
            return
    trusted = settings.optimizer in OPTIMISERS if isinstance(settings.optimizer, str) else False
    usual = settings.scheduler in SCHEDULES if isinstance(settings.scheduler, str) else False
    if trusted and usual and not settings.weight_decay:
        return
    small = [("a", nn.Parameter(torch.zeros(2, 3))), ("b", nn.Parameter(torch.zeros(3)))]
    plain = replace(settings, lora_plus_ratio=None)
    try:
        optimiser = _tried(make_optimiser, small, plain)
    except UserError as error:
        yield from error.problems
        optimiser = torch.optim.SGD([parameter for _, parameter in small], lr=settings.lr)
    else:
        yield from _trial("finetune.optimizer", optimiser, [parameter for _, parameter in small])
    try:
        schedule = _tried(make_schedule, optimiser, plain, TRIAL_STEPS)
        yield from _trial("finetune.scheduler", schedule, [])
        if not has_warmup(settings) and settings.warmup_steps not in (0, recipe_warmup):
            yield (
                f"finetune.warmup_steps={settings.warmup_steps}: finetune.scheduler="
                f"{_path(settings.scheduler, SCHEDULES)} has no warm-up steps"
            )
    except UserError as error:
        yield from error.problems


def _tried(make: Callable[..., Any], *arguments: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*arguments)


def _trial(key: str, made: Any, parameters: list[nn.Parameter]) -> Iterator[str]:
    """Take a step, and put the state into a checkpoint as a run does. Yields what goes wrong."""
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made.step()
    except Exception as error:  # whatever a user's own class does
        yield f"{key}: {type(made).__name__} cannot take a step here: {_first_line(error)}"
        return
    file = io.BytesIO()
    try:
        torch.save(made.state_dict(), file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception as error:
        yield f"{key}: the state of {type(made).__name__} cannot be put into a checkpoint: {_first_line(error)}"


def _named(value: Any, short: Mapping[str, str], key: str, fits: Callable[[Any], bool]) -> tuple[Any, dict[str, Any]]:
    """(what the value names, its arguments)"""
    path = _path(value, short)
    given = {} if isinstance(value, str) else {name: each for name, each in value.items() if name != "_target_"}
    if "." not in path:
        near = get_close_matches(path, short, n=1)
        raise UserError(
            f"{key}={path} must be one of {', '.join(short)}, or the dotted path of a class"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    found = function_at(path, key, "class", fits)
    known = _arguments(found)
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values()):
        return found, given
    for name in given:
        if name not in known or name in list(known)[:1]:
            near = get_close_matches(name, list(known)[1:], n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near else f"; it has {', '.join(list(known)[1:])}"
            raise UserError(f"{key}={path} has no argument {name}{hint}")
    return found, given


def _path(value: Any, short: Mapping[str, str]) -> str:
    path: str = value if isinstance(value, str) else value["_target_"]
    return short.get(path, path)


def _arguments(made_by: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(made_by).parameters
    except (TypeError, ValueError):  # of a built-in
        return {}


def _called(made_by: Any, first: tuple[Any, ...], given: Any, key: str, value: Any, short: Mapping[str, str]) -> Any:
    needed = [
        name
        for name, parameter in list(_arguments(made_by).items())[len(first) :]
        if parameter.default is inspect.Parameter.empty
        and parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        and name not in given
    ]
    if needed:
        raise UserError(f"{key}={_path(value, short)} needs {', '.join(needed)}, as in {{_target_: …, {needed[0]}: …}}")
    try:
        return made_by(*first, **given)
    except Exception as error:  # whatever the class does with its arguments
        shown = {name: each for name, each in given.items() if not isinstance(each, Tensor)}
        raise UserError(f"{key}={_path(value, short)} does not accept {shown}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _is_optimiser(found: Any) -> bool:
    return inspect.isclass(found) and issubclass(found, Optimizer) and found is not Optimizer


def _is_schedule(found: Any) -> bool:
    if inspect.isclass(found):
        return issubclass(found, LRScheduler) and found is not LRScheduler
    return inspect.isfunction(found) and found.__name__.startswith("get_") and found.__name__.count("schedule") > 0
