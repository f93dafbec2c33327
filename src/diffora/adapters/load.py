"""Puts an exported adapter on a backbone. `diffora.api.load_adapter` is the function for users."""

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffora.adapters.fetch import READ
from diffora.adapters.load_peft import load_with_peft, unfreeze
from diffora.adapters.load_weights import MethodOf, load_weights
from diffora.adapters.manifest import ADAPT, CONFIG, EXACT, MANIFEST, read_manifest
from diffora.adapters.origin import check_heads, check_made_for, other_backbone, take_labels
from diffora.adapters.pairs import LOADED_WHOLE, PREFIX, StoredPairs
from diffora.backbones.backbone import Backbone
from diffora.core.attach import freeze_rest, note_adapted
from diffora.core.linear import features, is_linear
from diffora.core.lowrank import LowRankLinear
from diffora.core.model import check_values_present, device_of, places_of
from diffora.errors import UserError, first_of

log = logging.getLogger(__name__)


def load_onto(backbone: Backbone, folder: Path, method_of: MethodOf, freeze: bool = True) -> None:
    """Put an exported adapter on a backbone, in place (see `diffora.api.load_adapter`).

    Args:
        backbone: the pretrained model, without low-rank layers.
        folder: the adapter's.
        method_of: makes the method that ``diffora.json`` describes.
        freeze: freeze everything else, the head too.

    Raises:
        UserError: missing, damaged or unreadable files, or an adapter of another model.
    """
    manifest: dict[str, Any] | None = None
    with contextlib.suppress(FileNotFoundError):  # plain PEFT writes none
        manifest = read_manifest(folder)
        if stray := [name for name in READ if name not in manifest["files"] and (folder / name).exists()]:
            raise UserError(f"{folder / stray[0]} is not listed in {MANIFEST}: it belongs to another adapter")
        check_made_for(backbone.model, manifest, folder)
    before = {parameter: parameter.requires_grad for parameter in backbone.model.parameters()}
    if (folder / ADAPT).is_file():
        load_weights(backbone, folder, manifest, method_of)
        head = backbone.head_parameters()
        for parameter, flag in before.items():
            of_adapter = parameter.requires_grad and parameter not in head  # as the biases of BitFit
            parameter.requires_grad_(of_adapter or (flag and not freeze))
    elif manifest is not None and "modules" in manifest:
        _load_pairs(backbone, folder, manifest)
        if freeze:
            freeze_rest(backbone.model)
    elif (folder / "sharing.json").is_file():
        raise UserError(
            f"{folder} was written by an earlier version of this project (sharing.json), whose adapters are not read "
            "any more: make the run again, or delete sharing.json to load a plain PEFT adapter, without sharing"
        )
    elif (folder / CONFIG).is_file():
        if manifest is None:
            if (folder / EXACT).exists():
                raise UserError(f"{folder} has {EXACT} and no {MANIFEST}: copy the whole folder from the run")
            log.warning(f"{folder} has no {MANIFEST}: loaded as plain PEFT does, without digests and without sharing")
        load_with_peft(backbone, folder)
        if not freeze:
            unfreeze(backbone.model, before)
        take_labels(backbone.model, manifest or {}, folder)
    else:
        raise UserError(f"{folder} is not an adapter of this project: it has no {ADAPT} and no {CONFIG}")


def warn_of_other_backbone(model: nn.Module, folder: Path) -> None:
    """Warn if a model was loaded from other files than those that an adapter was trained on.

    Says nothing where the manifest does not know the files, or where they are not on this machine.
    """
    with contextlib.suppress(FileNotFoundError):
        for change in other_backbone(model, read_manifest(folder)):
            log.warning(f"this model is not the one that {folder} was trained on: {change}")


def _load_pairs(backbone: Backbone, folder: Path, manifest: Mapping[str, Any]) -> None:
    """Load low-rank pairs, with ranks, scales and sharing as they were trained, and the modules saved whole."""
    pairs = StoredPairs.read(folder, manifest)
    modules = dict(backbone.model.named_modules(remove_duplicate=False))
    check_fit(modules, pairs, folder)
    check_values_present(backbone.model, [*pairs.modules, *pairs.heads])
    check_heads(backbone, [*pairs.heads, *_adapted_and_saved(pairs)], folder)
    take_labels(backbone.model, manifest, folder)
    states = states_of(pairs)
    _check_states(modules, states, pairs, folder)
    for name, state in states.items():
        modules[name].load_state_dict(state)
    place_pairs(backbone.model, modules, pairs)
    before = getattr(backbone.model, LOADED_WHOLE, ())  # of an adapter that was loaded earlier
    setattr(backbone.model, LOADED_WHOLE, tuple(dict.fromkeys((*before, *pairs.heads))))


def _adapted_and_saved(pairs: StoredPairs) -> list[str]:
    """Fresh modules that a low-rank pair adapts. They are saved next to the pair."""
    return [name for name in pairs.modules if any(k.startswith(f"{PREFIX}{name}.base_layer.") for k in pairs.tensors)]


def states_of(pairs: StoredPairs) -> dict[str, dict[str, Tensor]]:
    """The weights of each module that is saved whole, by full name."""
    prefixes = {name: f"{PREFIX}{name}." for name in pairs.heads}
    prefixes |= {name: f"{PREFIX}{name}.base_layer." for name in _adapted_and_saved(pairs)}
    return {
        name: {key.removeprefix(prefix): value for key, value in pairs.tensors.items() if key.startswith(prefix)}
        for name, prefix in prefixes.items()
    }


def check_fit(modules: Mapping[str, nn.Module], pairs: StoredPairs, folder: Path) -> None:
    """Refuse pairs for modules that the model lacks, or that are not linear or have other widths."""
    if missing := [name for name in [*pairs.modules, *pairs.heads] if name not in modules]:
        raise UserError(f"{folder} does not fit this model, which has no {first_of(missing)}")
    problems = []
    for name in pairs.modules:
        base, (lora_a, folded) = modules[name], pairs.stored(name)
        if not is_linear(base):
            hint = " and has low-rank layers already" if isinstance(base, LowRankLinear) else ""
            problems.append(f"{name} is a {type(base).__name__}{hint}")
        elif (found := (lora_a.shape[1], folded.shape[1])) != features(base):
            problems.append(f"{name} maps {features(base)[0]} to {features(base)[1]} features, A and B {found}")
    if problems:
        raise UserError([f"{folder} does not fit this model: {problem}" for problem in problems])


def _check_states(
    modules: Mapping[str, nn.Module], states: Mapping[str, Mapping[str, Tensor]], pairs: StoredPairs, folder: Path
) -> None:
    """Refuse whole modules whose tensors have other names or shapes than the model's."""
    problems: list[str] = []
    for name, state in states.items():
        needed = {key: tuple(value.shape) for key, value in modules[name].state_dict().items()}
        given = {key: tuple(value.shape) for key, value in state.items()}
        problems += [
            f"{name}.{key} is {given.get(key, 'missing')} in the file and {needed.get(key, 'missing')} in the model"
            for key in sorted(needed.keys() | given.keys())
            if needed.get(key) != given.get(key) and not (name in pairs.modules and key.startswith("lora_"))
        ]
        own = modules[name].state_dict()
        problems += [
            f"{name}.{key} is {value.dtype} in the file and {own[key].dtype} in the model"
            for key, value in state.items()
            if key in own and value.is_floating_point() != own[key].is_floating_point()
        ]
    if problems:
        raise UserError([f"{folder} does not fit this model: {problem}" for problem in problems])


def place_pairs(model: nn.Module, modules: Mapping[str, nn.Module], pairs: StoredPairs) -> None:
    """Replace the adapted modules by low-rank layers. Modules of a group get the same parameters."""
    places = places_of(model)
    first = {name: group[0] for group in pairs.groups for name in group}
    parameters: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
    for name, (rank, scale, dropout) in pairs.modules.items():
        base: Any = modules[name]
        source = first.get(name, name)
        if source not in parameters:
            lora_a, lora_bt = pairs.pair(source)
            device = device_of(base)
            parameters[source] = nn.Parameter(lora_a.to(device)), nn.Parameter(lora_bt.to(device))
        layer = LowRankLinear(base, *parameters[source], alpha=scale * rank, dropout=dropout)
        layer.scaling = scale  # scale * rank / rank may differ from it in the last bit
        for place in places[id(base)]:
            model.set_submodule(place, layer)
    note_adapted(model)
