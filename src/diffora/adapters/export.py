"""Writes a trained model to files: a LoRA adapter, only the trained weights, or the whole model."""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from diffora.adapters.card import LOAD_WITH_DIFFORA, LOAD_WITH_PEFT, card
from diffora.adapters.manifest import ADAPT, TRAINED, write_manifest
from diffora.adapters.origin import Origin, made_for
from diffora.adapters.pairs import CONFIG, EXACT, WEIGHTS, Kept, equal_groups, pad_and_fold, write_tensors
from diffora.backbones.backbone import Backbone
from diffora.backbones.processors import load_processor
from diffora.core.attach import places_of
from diffora.core.linear import is_conv1d
from diffora.core.lowrank import LowRankLinear
from diffora.errors import UserError
from diffora.files import atomic_folder, write_text

log = logging.getLogger(__name__)

Pairs = Iterable[tuple[str, Tensor, Tensor, float]]
"""(full module name, A (rank, in), B^T (rank, out), s) for each update s B A."""


# --- low-rank pairs ---


def export_adapter(folder: Path, origin: Origin, pairs: Pairs, shared: Sequence[list[str]] = ()) -> None:
    """Write low-rank updates and head as a LoRA adapter that PEFT and other programs load (`diffora.adapters.pairs`).

    Modules are written with their full names: PEFT applies a name like ``output.dense`` to all that end with it.

    Args:
        folder: where the files go.
        origin: the adapted model with its head, and the facts for the configuration and the card.
        pairs: the updates. Modules of rank 0 are left out.
        shared: groups of modules that share one pair.
    """
    everything = list(pairs)
    kept = {name: (a.detach().cpu(), bt.detach().cpu(), scale) for name, a, bt, scale in everything if len(a)}
    if not kept:  # all pruned: PEFT wants at least one module
        name, lora_a, lora_bt, scale = everything[0]
        kept = {name: (torch.zeros(1, lora_a.shape[1]), torch.zeros(1, lora_bt.shape[1]), scale)}
    backbone, model = origin.backbone, origin.backbone.model
    backbone.check_outside_head(kept)
    for name, others in _other_places(model, kept):
        log.warning(
            f"{name} stands at {', '.join(others)} too, where PEFT adapts nothing: load with diffora.api.load_adapter"
        )
    groups = equal_groups(kept, shared)
    tensors, exact = pad_and_fold(kept, groups)
    tensors |= {f"base_model.model.{name}": value for name, value in head_tensors(backbone).items()}
    tensors |= _untrained_tensors(backbone, kept)
    heads = [*backbone.head, *(name for name in backbone.untrained if name not in kept)]
    config = adapter_config(list(kept), max(len(a) for a, _, _ in kept.values()), heads, origin)
    layers = {name: model.get_submodule(name) for name in kept}
    # How the backbone stores its weights. A and B are always stored in the same way.
    config["fan_in_fan_out"] = any(is_conv1d(part) for layer in layers.values() for part in layer.modules())
    modules = {}
    for name, (lora_a, _, scale) in kept.items():
        layer = layers[name]
        dropout = layer.dropout if isinstance(layer, LowRankLinear) else 0.0
        modules[name] = {"rank": len(lora_a), "scale": scale, "dropout": dropout}
    write_tensors(folder / WEIGHTS, tensors)
    if exact:
        write_tensors(folder / EXACT, exact)
    write_text(folder / CONFIG, json.dumps(config, indent=1) + "\n")
    write_text(folder / "README.md", card(origin, LOAD_WITH_PEFT, groups))
    content = {"modules": modules, "shared": groups, "heads": heads, **made_for(origin)}
    write_manifest(folder, [CONFIG, WEIGHTS, *([EXACT] if exact else [])], content)


def adapter_config(names: Sequence[str], rank: int, heads: Sequence[str], origin: Origin) -> dict[str, Any]:
    """The content of PEFT's ``adapter_config.json`` for updates of one rank and the scale 1.

    Args:
        names: full names of the adapted modules.
        rank: of every update.
        heads: full names of the modules that are saved whole.
        origin: base model and task.
    """
    return {
        "peft_type": "LORA",
        "task_type": origin.task.peft_type,
        "base_model_name_or_path": origin.base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "target_modules": list(names),
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": list(heads) or None,
    }


def head_tensors(backbone: Backbone) -> dict[str, Tensor]:
    """The head's weights and buffers by full name, copied to the CPU."""
    return {
        f"{head}.{name}": value.detach().cpu().clone()
        for head in backbone.head
        for name, value in backbone.model.get_submodule(head).state_dict().items()
    }


def _untrained_tensors(backbone: Backbone, kept: Kept) -> dict[str, Tensor]:
    """The weights of fresh modules that were not trained, under PEFT's names: no checkpoint has them.

    The weights of an adapted module are next to its update, where PEFT looks for them.
    """
    tensors: dict[str, Tensor] = {}
    for name in backbone.untrained:
        base: Any = backbone.model.get_submodule(name)
        inner = ""
        if name in kept:
            base, inner = getattr(base, "base", None) or base.base_layer, "base_layer."
        weights = {key: value.detach().cpu().clone() for key, value in base.state_dict().items()}
        tensors |= {f"base_model.model.{name}.{inner}{key}": value for key, value in weights.items()}
    return tensors


def _other_places(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Adapted modules that have other places in the model. PEFT goes by names, so it does not find these."""
    modules, places = dict(model.named_modules(remove_duplicate=False)), places_of(model)

    def spot(place: str) -> tuple[int, str]:
        parent, _, last = place.rpartition(".")
        return id(modules[parent]), last

    for name in names:
        if others := [place for place in places[id(modules[name])] if spot(place) != spot(name)]:
            yield name, others


# --- other formats ---


def export_weights(folder: Path, origin: Origin) -> None:
    """Write the trained weights, for methods that PEFT has no format for.

    ``diffora.json`` says how to adapt the model, and ``weights.safetensors`` has the trained weights. Loading adapts
    the model again and fills these in.

    Args:
        folder: where the files go. A selection file is copied from the folder above.
        origin: the trained model, and the configuration that says how to adapt.
    """
    backbone = origin.backbone
    trained = {name: p.detach().cpu().clone() for name, p in backbone.model.named_parameters() if p.requires_grad}
    for name in backbone.untrained:
        fresh = backbone.model.get_submodule(name).state_dict(prefix=f"{name}.")
        trained |= {key: value.detach().cpu().clone() for key, value in fresh.items()}
    write_tensors(folder / TRAINED, trained | head_tensors(backbone))
    sections = ("method", "rank", "rho", "finetune", "seed", "model")
    content = {key: origin.config[key] for key in sections if key in origin.config}
    selected = origin.record["selection"]
    content["selection"] = selected["file"] if selected else None
    if selected:
        write_text(folder / selected["file"], (folder.parent / selected["file"]).read_text())
    write_text(folder / ADAPT, json.dumps({"base_model": origin.base_model, **content}, indent=1) + "\n")
    write_text(folder / "README.md", card(origin, LOAD_WITH_DIFFORA))
    files = [TRAINED, ADAPT, *([content["selection"]] if selected else [])]
    write_manifest(folder, files, made_for(origin))


def export_model(folder: Path, origin: Origin) -> None:
    """Write a whole transformers model (full fine-tuning), with its tokenizer or image processor."""
    model: Any = origin.backbone.model
    with atomic_folder(folder) as scratch:
        model.save_pretrained(scratch)
        try:
            # Load it again: the one in memory keeps settings of its last call, such as the truncation.
            settings = OmegaConf.create(origin.config["model"])
            load_processor(settings, origin.task.processor_kind).save_pretrained(scratch)
        except UserError as error:  # the training is done and must not be lost
            log.warning(f"{folder} has no tokenizer or image processor: {error}")
