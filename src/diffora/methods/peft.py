"""Methods that PEFT implements: any of its tuners for linear modules, described by PEFT's own configuration class.

PEFT is imported inside functions, because the import takes seconds.
"""

import contextlib
import io
import itertools
import json
import logging
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
from diffora.backbones.precision import HALF
from diffora.core.grid import Grid
from diffora.core.linear import is_conv1d
from diffora.core.parts import ROLES, path_of
from diffora.core.selection import Selection
from diffora.core.targets import longer_names
from diffora.errors import UserError, first_line
from diffora.files import write_text
from diffora.methods.base import Adaptation, Method, Rank, Rate, check_ranks
from diffora.methods.peft_config import ALLOWED_CHANGES, build
from diffora.settings.checks import GROUP, TEXTS, Check, Help

log = logging.getLogger(__name__)

ADAPTER = "default"
Pair = tuple[str, Tensor, Tensor, float]

WITHOUT_B = ("IA3Config", "VeraConfig")
"""Tuners that train vectors only; see `Method.trains_b`."""
PLACES = Check(lambda v: TEXTS.fits(v) and bool(v), "a list of roles or module types")


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
            present = dict.fromkeys((*(model.get("roles") or ()), *ROLES, *candidates))
            for place in method.places or ():
                if place not in present:
                    hint = f"no role and no candidate of model={model.get('name')}, which has {', '.join(present)}"
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
        if str(getattr(self.config, "init_lora_weights", "")).startswith(ALLOWED_CHANGES):
            for name, layer in self.plain_layers():
                pair = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
                self.start[name] = pair[0].detach().clone(), pair[1].detach().clone()
            if any(parameter.dtype in HALF for parameter in model.parameters()):
                log.warning(
                    f"{self.config.init_lora_weights} changes the pretrained weights, and half precision rounds the "
                    "changed ones: the exported adapter differs from the trained model by that; use model.dtype=float32"
                )

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
        parts = [part for _, layer in layers for part in (layer.lora_A, layer.lora_B)]
        pairs = {p for part in parts for name, p in part.named_parameters() if not name.endswith("bias")}
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


def _tokens(layer_input: Any, mask: Tensor | None, name: str) -> Tensor:
    """A module's inputs (tokens, in) without padding; empty if the module was not applied to the sequence.

    DeBERTa's query and key projections are applied to the table of relative positions too. Images have no padding.
    """
    states: Tensor = layer_input[0] if isinstance(layer_input, tuple | list) else layer_input
    if mask is None:
        return states.reshape(-1, states.shape[-1])
    return states[mask.bool()] if states.shape[:2] == mask.shape else states.new_empty(0, states.shape[-1])
