"""Methods that PEFT implements: any of its tuners for linear modules, described by PEFT's own configuration class.

PEFT is imported inside functions, because the import takes seconds.
"""

import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import json
import re
import typing
import warnings
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from diffora.adapters.card import LOAD_WITH_PEFT, card
from diffora.adapters.export import export_adapter, head_tensors
from diffora.adapters.manifest import CONFIG, WEIGHTS, write_manifest
from diffora.adapters.origin import Origin, made_for
from diffora.adapters.pairs import write_tensors
from diffora.core.grid import Grid
from diffora.core.linear import is_conv1d
from diffora.core.parts import ROLES, path_of
from diffora.core.selection import Selection
from diffora.core.targets import longer_names
from diffora.errors import UserError, first_line
from diffora.files import write_text
from diffora.methods.base import Adaptation, Method, Rank, Rate, check_ranks
from diffora.settings.checks import GROUP, POSITIVE, RATE, TEXTS, Check, Help, whole
from diffora.settings.read import value_problem
from diffora.trust import object_in

ADAPTER = "default"
Pair = tuple[str, Tensor, Tensor, float]

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
# These initialisations change W; `PEFTAdaptation.pairs` and the export account for it.
MOVES_BASE = ("pissa", "olora")
REFUSED_INIT = {
    "loftq": "it is for quantised backbones",
    "corda": "it needs PEFT's own pass over data beforehand",
    "lora_ga": "it needs PEFT's own pass over data beforehand",
}

WITHOUT_B = ("IA3Config", "VeraConfig")
"""Tuners that train vectors only; see `Method.trains_b`."""
PLACES = Check(lambda v: TEXTS.fits(v) and bool(v), "a list of roles or module types")
BOUNDS = {"r": whole(1, 2**16), "dropout": RATE, "alpha": POSITIVE}
"""Bounds of the arguments of PEFT's classes, by the last word of their names. VeRA draws matrices as wide as ``r``."""


@dataclass(frozen=True)
class PEFT(Method):
    """Puts a tuner of PEFT on the candidate modules.

    Only ``config`` uses ``rank`` and ``dropout``, through interpolations.
    """

    name: ClassVar[str] = "peft"
    config: Annotated[dict[str, Any], GROUP, Help("PEFT's configuration class as `_target_`, and its arguments.")]
    rank: Rank | None = None
    dropout: Rate | None = None
    places: Annotated[
        Annotated[list[str], PLACES] | None,
        Help("The roles (`model.roles`) or module types to adapt; null: every candidate."),
    ] = None

    @classmethod
    def read(cls, values: Mapping[str, Any], found: dict[str, str]) -> Method | None:
        method = super().read(values, found)
        model = values.get("model")
        if not isinstance(method, PEFT) or not isinstance(model, Mapping):
            return method
        candidates = model.get("candidates")
        if isinstance(candidates, list):  # otherwise they are known only when the model is loaded, see `targets`
            there = dict.fromkeys((*(model.get("roles") or ()), *ROLES, *candidates))
            for place in method.places or ():
                if place not in there:
                    hint = f"no role and no candidate of model={model.get('name')}, which has {', '.join(there)}"
                    found[f"method.places.{place}"] = f"method.places: {place} is {hint}"
        return method

    def problems(self) -> Iterator[str]:
        try:
            build(self.config, "method.config")
        except UserError as error:
            yield from error.problems

    @property
    def trains_b(self) -> bool:
        return not str(self.config["_target_"]).endswith(WITHOUT_B)

    def targets(self, grid: Grid) -> list[str]:
        """Full names of the modules to adapt."""
        found: list[str] = []
        for place in grid.types if self.places is None else self.places:
            columns = [i for i, kind in enumerate(grid.types) if place in (kind, path_of(kind))]
            names = [row[column] for column in columns for row in grid.names]
            found += [name for name in names if name is not None] if columns else grid.having(place)
        return list(dict.fromkeys(found))

    def check(self, model: nn.Module, grid: Grid) -> None:
        names, config = set(self.targets(grid)), build(self.config, "method.config")
        if hasattr(config, "feedforward_modules"):
            grid.having("ffn_output")
        if type(config).__name__ == "LoraConfig":  # in other classes, r has other meanings
            where = torch.tensor([[name in names for name in row] for row in grid.names])
            check_ranks(grid, {"method.config.r": config.r}, where)

    def adapt(self, model: nn.Module, grid: Grid, selection: Selection | None, seed: int) -> "PEFTAdaptation":
        config = build(self.config, "method.config")
        # Full names, because PEFT applies a name to all that end with it.
        config.target_modules = set(self.targets(grid))
        if hasattr(config, "feedforward_modules"):
            config.feedforward_modules = config.target_modules & set(grid.having("ffn_output"))
        if next(model.parameters()).is_meta and hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True  # no weights to start from, and the same shapes
        head = {parameter for parameter in model.parameters() if parameter.requires_grad}
        return PEFTAdaptation(model, inject(model, config), head)


class PEFTAdaptation(Adaptation):
    """A model with the modules that PEFT added.

    Args:
        model: the adapted model. It is called directly, not through the wrapper.
        peft: PEFT's wrapper of the same model.
        head: the parameters of the head.
    """

    def __init__(self, model: nn.Module, peft: Any, head: Set[nn.Parameter]) -> None:
        super().__init__(model)
        self.peft = peft
        self.head = head
        self.config = peft.peft_config[ADAPTER]
        # A0, B0 by module, where PEFT has replaced W by W - s B0 A0: the update is then s (B A - B0 A0).
        self.start: dict[str, tuple[Tensor, Tensor]] = {}
        if str(getattr(self.config, "init_lora_weights", "")).startswith(MOVES_BASE):
            for name, layer in self.plain_layers():
                pair = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
                self.start[name] = pair[0].detach().clone(), pair[1].detach().clone()

    def prepare(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """For EVA: set A from the singular vectors of each module's inputs, and ranks by the explained variance.

        This runs before training, while the model is on the CPU, so that all processes get identical numbers.
        """
        if getattr(self.config, "init_lora_weights", None) != "eva":
            return
        from peft import initialize_lora_eva_weights

        passes = itertools.count(1)

        def forward(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
            if next(passes) > 1000:  # PEFT itself would repeat the batches without end
                raise UserError(
                    "EVA has not converged in 1000 batches: lower rank, method.config.eva_config.rho or .tau, or raise "
                    "finetune.batch_size"
                )
            model(**inputs)

        try:
            with contextlib.redirect_stdout(io.StringIO()):  # PEFT prints a line for every input without tokens
                initialize_lora_eva_weights(
                    self.peft,
                    batches,
                    forward_fn=forward,
                    prepare_model_inputs_fn=lambda inputs, _: inputs.get("attention_mask"),
                    prepare_layer_inputs_fn=_tokens,
                    gather_distributed_inputs=False,  # every process sees all of the batches
                    show_progress_bar=False,
                )
        except ValueError as error:
            raise UserError(f"EVA: {first_line(error)}") from error

    def plain_layers(self) -> list[tuple[str, Any]]:
        """(name, layer) of PEFT's LoRA layers, if plain LoRA pairs are all that was added; otherwise empty."""
        from peft.tuners.lora import LoraLayer

        layers = [(name, layer) for name, layer in self.model.named_modules() if isinstance(layer, LoraLayer)]
        pairs = {p for _, layer in layers for part in (layer.lora_A, layer.lora_B) for p in part.parameters()}
        trained = {p for p in self.model.parameters() if p.requires_grad} - self.head
        # DoRA and other variants of LoRA are more than s B A. Only PEFT knows how to apply them.
        return layers if trained == pairs and not any(layer.lora_variant for _, layer in layers) else []

    def pairs(self) -> Iterator[Pair]:
        """Yields the updates relative to the pretrained weights. Where PEFT changed these weights, the rank is 2r.

        Empty for DoRA, VeRA, IA³ and others, whose update is not a product of two trained matrices.
        """
        for name, layer in self.plain_layers():
            lora_a, lora_b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            if name in self.start:
                a_0, b_0 = (matrix.to(lora_a.device) for matrix in self.start[name])
                lora_a, lora_b = torch.cat([lora_a, a_0]), torch.cat([lora_b, -b_0], dim=1)
            yield name, lora_a, lora_b.T, layer.scaling[ADAPTER]

    def inference_parameters(self) -> int | None:
        """The parameters of the exported low-rank pairs: twice as many where PEFT changed the pretrained weights."""
        return sum(lora_a.numel() + lora_bt.numel() for _, lora_a, lora_bt, _ in self.pairs()) or None

    def export(self, folder: Path, origin: Origin) -> None:
        if pairs := list(self.pairs()):
            export_adapter(folder / "adapter", origin, pairs)
        else:
            self._export_as_it_is(folder / "adapter", origin)

    def _export_as_it_is(self, folder: Path, origin: Origin) -> None:
        """Write PEFT's own format for the tuner, with the head."""
        from peft import get_peft_model_state_dict

        # False: do not ask the hub whether the vocabulary has grown.
        tensors = get_peft_model_state_dict(self.peft, save_embedding_layers=False)
        tensors |= {f"base_model.model.{name}": value for name, value in head_tensors(origin.backbone).items()}
        content = {key: sorted(v) if isinstance(v, set) else v for key, v in self.config.to_dict().items()}
        content |= {
            "task_type": origin.task.peft_type,
            "base_model_name_or_path": origin.base_model,
            "inference_mode": True,
            "target_modules": sorted(self.peft.base_model.targeted_module_names),
            "modules_to_save": list(origin.backbone.head) or None,
        }
        copies = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
        write_tensors(folder / WEIGHTS, copies)
        write_text(folder / CONFIG, json.dumps(content, indent=1) + "\n")
        write_text(folder / "README.md", card(origin, LOAD_WITH_PEFT))
        write_manifest(folder, [CONFIG, WEIGHTS], made_for(origin.backbone, origin.record.get("backbone")))


def inject(model: nn.Module, config: Any) -> Any:
    """Let PEFT put its modules into ``model``, in place. The head stays unchanged and trainable.

    Returns:
        PEFT's wrapper around ``model``.

    Raises:
        UserError: PEFT cannot do it. The message has its reason.
    """
    from peft import get_peft_model

    kind = type(config).__name__
    if longer := longer_names(model, config.target_modules):
        why = f"PEFT would adapt {longer[0]} too, because its name ends with that of a module to adapt"
        raise UserError(f"{why}: {kind} cannot be used on one of two stacks with such names")
    head = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = any(is_conv1d(model.get_submodule(name)) for name in config.target_modules)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="lora with eva")  # advice on memory
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # for PEFT to fix
            peft: Any = get_peft_model(model, config, ADAPTER)
    except (ValueError, TypeError, AttributeError, AssertionError, NotImplementedError, ImportError) as error:
        if "meta tensor" in str(error):
            raise UserError(f"{kind} is computed from the weights: there is no dry_run of it") from error
        raise UserError(f"PEFT cannot put {kind} on this model: {first_line(error)}") from error
    if {p for p in peft.parameters() if p.requires_grad} - set(model.parameters()):
        raise UserError(f"{kind} keeps trainable weights outside the model's modules, where they would not be trained")
    for parameter in head:
        parameter.requires_grad_(True)
    return peft


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
        there = [n for n, o in vars(peft).items() if n.endswith("Config") and inspect.isclass(o)]
        near = difflib.get_close_matches(name, there, n=3, cutoff=0.5)
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
    if str(given.get("init_lora_weights", "")).startswith(MOVES_BASE):
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


def _tokens(layer_input: Any, mask: Tensor | None, name: str) -> Tensor:
    """A module's inputs (tokens, in) without padding; empty if the module was not applied to the sequence.

    DeBERTa's query and key projections are applied to the table of relative positions too. Images have no padding.
    """
    states: Tensor = layer_input[0] if isinstance(layer_input, tuple | list) else layer_input
    if mask is None:
        return states.reshape(-1, states.shape[-1])
    return states[mask.bool()] if states.shape[:2] == mask.shape else states.new_empty(0, states.shape[-1])
