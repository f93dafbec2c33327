"""Callbacks and loggers that the user names by ``_target_``."""

from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from inspect import isclass
from pathlib import Path
from traceback import walk_tb
from typing import Any

from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar, StochasticWeightAveraging, Timer
from lightning.pytorch.callbacks.weight_averaging import WeightAveraging
from lightning.pytorch.loggers import Logger

from diffora.errors import SECRET, WITH_SECRET, UserError
from diffora.settings import sections
from diffora.settings.targets import Target, target_of

NEEDS = {
    "MLFlowLogger": ("mlflow", "mlflow"),
    "CometLogger": ("comet_ml", "comet-ml"),
    "NeptuneLogger": ("neptune", "neptune"),
    "LitLogger": ("litlogger", "litlogger"),
    "TrackioLogger": ("trackio", "trackio"),
    "WandbLogger": ("wandb", "wandb"),
    "TensorBoardLogger": ("tensorboard", "tensorboard"),
}
"""The package that a logger imports only when it is made, and its name for pip."""
UNFIT: dict[type, str] = {
    Checkpoint: "writes checkpoints, which a run does itself: finetune.eval_every says how often, and the best weights "
    "are in adapter/",
    WeightAveraging: "averages weights, but a run keeps those of its best epoch: its metrics would be of other weights",
    StochasticWeightAveraging: "averages weights, but a run keeps those of its best epoch",
    ProgressBar: "shows progress, which a run does itself",
    Timer: "stops a run between evaluations: finetune.max_steps limits it",
}
"""Lightning's callbacks that do not go with a run, and why."""


def own_callbacks(trainer: sections.Trainer) -> list[Callback]:
    """The callbacks in ``trainer.callbacks``.

    Raises:
        UserError: there is no such class, or it does not accept its arguments.
    """
    return [_target(each, f"trainer.callbacks[{i}]", Callback).make() for i, each in enumerate(trainer.callbacks)]


def failed_callback(error: Exception, trainer: sections.Trainer) -> str | None:
    """The callback of ``trainer.callbacks`` in which an error came up, for messages; None if it came from elsewhere."""
    kinds = [_target(each, f"trainer.callbacks[{i}]", Callback) for i, each in enumerate(trainer.callbacks)]
    within = {type(frame.f_locals.get("self")) for frame, _ in walk_tb(error.__traceback__)}
    for i, kind in enumerate(kinds):
        if kind.makes in within:
            return f"trainer.callbacks[{i}]={kind.path}"
    return None


def own_loggers(choices: sections.Logger, folder: Path) -> dict[str, Logger]:
    """The loggers of the section ``logger`` that have a ``_target_``, by their keys.

    Args:
        folder: the run directory. A logger that needs a ``save_dir`` gets it, one with a ``run_name`` its name.

    Raises:
        UserError: there is no such class, or it does not accept its arguments.
    """
    of_run = {"save_dir": str(folder), "run_name": folder.name}
    return {name: _target(each, f"logger.{name}", Logger).fill(of_run).make() for name, each in choices.own.items()}


def problems(trainer: sections.Trainer | None, logger: sections.Logger | None) -> Iterator[str]:
    """Every mistake in the user's own callbacks and loggers. Their modules are imported, but no object is made."""
    named: list[tuple[str, Any, type]]
    named = [(f"trainer.callbacks[{i}]", each, Callback) for i, each in enumerate(trainer.callbacks if trainer else [])]
    named += [(f"logger.{name}", each, Logger) for name, each in (logger.own if logger else {}).items()]
    for key, value, kind in named:
        yield from _secrets(key, value)
        try:
            target = _target(value, key, kind)
        except UserError as error:
            yield from error.problems
            continue
        module, package = NEEDS.get(target.path.rpartition(".")[2], ("", ""))
        if module and find_spec(module) is None:
            yield f"{key}={target.path} needs the package {package}: pip install {package}"
        elif why := next((why for kind, why in UNFIT.items() if issubclass(target.makes, kind)), None):
            yield f"{key}={target.path} {why}"


def _target(value: Mapping[str, Any], key: str, kind: type) -> Target:
    """The class that a setting names.

    Raises:
        UserError: it is no subclass of ``kind``, or has no such arguments.
    """
    fits: Callable[[Any], bool] = lambda found: isclass(found) and issubclass(found, kind) and found is not kind  # noqa: E731
    target = target_of(value, key, fits)
    if not fits(target.makes):
        raise UserError(f"{key}={target.path} is not a subclass of lightning's {kind.__name__}")
    return target


def _secrets(key: str, value: Any) -> Iterator[str]:
    """One message for each secret in the arguments of an object: the run would record it."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            if SECRET.search(str(name)) and item is not None:
                yield (
                    f"{key}.{name}: a secret must not be in a setting, because runs record their settings; set the "
                    "environment variable that the class reads, or log in with its command"
                )
            else:
                yield from _secrets(f"{key}.{name}", item)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _secrets(f"{key}[{i}]", item)
    elif isinstance(value, str) and WITH_SECRET.search(value):
        yield f"{key}: an address with a user, password or key must not be here, because runs record their settings"
