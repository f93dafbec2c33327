"""Makes PEFT's configuration objects from settings, and refuses what does not work in a run.

PEFT is imported inside functions, because the import takes seconds.
"""

import dataclasses
import difflib
import inspect
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from diffora.errors import UserError, first_line
from diffora.settings.checks import POSITIVE, RATE, Check, whole
from diffora.settings.read import value_problem
from diffora.trust import object_in

OURS = {
    "target_modules": "method.places says which modules are adapted",
    "exclude_modules": "method.places says which modules are adapted",
    "target_parameters": "method.places says which modules are adapted",
    "feedforward_modules": "model.roles.ffn_output says which they are",
    "modules_to_save": "the head is trained and saved anyway",
    "layer_replication": "the backbone keeps its layers",
    "fan_in_fan_out": "the backbone's layers say it",
    "task_type": "model and task are known",
    "peft_type": "the class says it",
    "inference_mode": "the adapter is there to be trained",
    "base_model_name_or_path": "model.path says it",
    "megatron_config": "it is for models of Megatron, and has PEFT import a module that it names",
    "megatron_core": "it is for models of Megatron, and has PEFT import a module that it names",
}
REFUSED = {
    "AdaLoraConfig": "its ranks are allotted while it is trained, which method=adalora does",
    "LNTuningConfig": "it trains layer norms, and method.places are linear modules",
    "OSFConfig": "it takes the backbone's weights apart and cannot be kept as an adapter of the model it came from",
    "PolyConfig": "it needs a task id with every input",
    "ShadowConfig": "it is a network beside the model, not at its modules",
    "TrainableTokensConfig": "it trains embeddings, and method.places are linear modules",
}
# Of the initialisations that change W (`diffora.adapters.peft_pairs.CHANGES_BASE`), those that
# `diffora.methods.peft.PEFTAdaptation` and the export account for. The others are in `REFUSED_INIT`.
ALLOWED_CHANGES = ("pissa", "olora")
REFUSED_INIT = {
    "loftq": "it is for quantised backbones",
    "corda": "it needs PEFT's own pass over data beforehand",
    "lora_ga": "it needs PEFT's own pass over data beforehand",
}
BOUNDS = {"r": whole(1, 2**16), "dropout": RATE, "alpha": POSITIVE}
"""Bounds of the arguments of PEFT's classes, by the last word of their names. VeRA draws matrices as wide as ``r``."""


def build(spec: Mapping[str, Any], key: str) -> Any:
    """Make the PEFT object that ``spec`` describes, with the objects nested in it. Only classes of PEFT are called.

    Args:
        spec: ``_target_``, a configuration class of PEFT, and its arguments.
        key: its key in the configuration, for messages.

    Raises:
        UserError: what is wrong with it.
    """
    kind = _find_class(spec.get("_target_"), key)
    who = f"{key}._target_=peft.{kind.__name__}"
    given = {str(name): value for name, value in spec.items() if name != "_target_"}
    if key == "method.config":
        _check_kind(kind, who)
        if taken := [name for name in given if name in OURS]:
            raise UserError([f"{key}.{name} cannot be set: {OURS[name]}" for name in taken])
    known = [field.name for field in dataclasses.fields(kind) if field.init]
    if unknown := [name for name in given if name not in known]:
        near = {name: difflib.get_close_matches(name, known, n=1, cutoff=0.8) for name in unknown}
        words = [f"{name} (did you mean {near[name][0]}?)" if near[name] else name for name in unknown]
        without = " ".join(f"~{key}.{name}" for name in unknown)
        raise UserError(f"{who} has no argument {', '.join(words)}; leave out with {without}")
    if problems := list(_value_problems(kind, given, key)):
        raise UserError(problems)
    arguments = {
        name: build(value, f"{key}.{name}") if isinstance(value, Mapping) and "_target_" in value else value
        for name, value in given.items()
    }
    try:
        return kind(**arguments)
    except Exception as error:
        raise UserError(f"PEFT refuses {key} (peft.{kind.__name__}): {first_line(error)}") from error


def _find_class(path: Any, key: str) -> Any:
    """The configuration class at a dotted path inside PEFT."""
    import peft

    name = str(path).rpartition(".")[2]
    if not re.fullmatch(r"peft(\.\w+)+", str(path)):
        raise UserError(f"{key}._target_={path} must be a configuration class of PEFT, such as peft.LoraConfig")
    found = object_in("peft", path)
    if found is None:
        present = [n for n, o in vars(peft).items() if n.endswith("Config") and inspect.isclass(o)]
        near = difflib.get_close_matches(name, present, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(f'peft.{n}' for n in near)}?" if near else ""
        raise UserError(f"{key}._target_={path} does not exist in PEFT{hint}")
    if not inspect.isclass(found) or not dataclasses.is_dataclass(found):
        raise UserError(f"{key}._target_={path} is not a configuration class of PEFT")
    return found


def _check_kind(kind: Any, who: str) -> None:
    """Refuse a tuner that does not work on single modules of a model that is called directly."""
    from peft import PeftConfig, PromptLearningConfig

    if not issubclass(kind, PeftConfig) or kind is PeftConfig:
        raise UserError(f"{who} is not the configuration of a tuner")
    if issubclass(kind, PromptLearningConfig):
        raise UserError(f"{who} learns a prompt: it does not stand at modules, so there is nowhere to put it")
    if kind.__name__ in REFUSED:
        raise UserError(f"{who} cannot be used here: {REFUSED[kind.__name__]}")
    names = {field.name for field in dataclasses.fields(kind)}
    if not {"target_modules", "modules_to_save"} <= names or "adapter_layers" in names:
        raise UserError(f"{who} cannot be used here: it does not stand at single modules")


def _value_problems(kind: Any, given: Mapping[str, Any], key: str) -> Iterator[str]:
    """Yields the mistakes in the values that PEFT would find late or not at all."""
    try:
        hints = typing.get_type_hints(kind)
    except (NameError, TypeError):
        hints = {}
    for name, value in given.items():
        if problem := value_problem(f"{key}.{name}", value, _hint(name, hints.get(name))):
            yield problem
        elif name == "init_lora_weights" and isinstance(value, str) and value in REFUSED_INIT:
            yield f"{key}.{name}={value} cannot be used here: {REFUSED_INIT[value]}"
    if str(given.get("init_lora_weights", "")).startswith(ALLOWED_CHANGES):
        also = [n for n in ("use_dora", "lora_bias", "trainable_token_indices") if given.get(n)]
        also += ["bias"] if given.get("bias", "none") != "none" else []
        if also:
            yield f"{key}.init_lora_weights={given['init_lora_weights']} does not go with {key}.{also[0]}"


def _hint(name: str, hint: Any) -> Any:
    """PEFT's type hint of an argument, with our bounds. Where the hint is not reliable, any value fits."""
    bound = BOUNDS.get(name.rpartition("_")[2])
    if bound is not None and hint in (int, float):
        return Annotated[hint, bound]
    if hint in (int, float, bool):
        return hint
    parts = (hint,) if typing.get_origin(hint) is typing.Literal else typing.get_args(hint)
    literals = [part for part in parts if typing.get_origin(part) is typing.Literal]
    choices = [choice for part in literals for choice in typing.get_args(part) if isinstance(choice, str)]
    if choices and str not in parts:
        # PEFT writes pissa_niter_[number of iters] for pissa_niter_4.
        starts = tuple(choice.partition("[")[0] for choice in choices if "[" in choice)
        fits = lambda v: not isinstance(v, str) or v in choices or v.startswith(starts or ("\0",))  # noqa: E731
        return Annotated[Any, Check(fits, f"one of {', '.join(choices)}")]
    return Any
