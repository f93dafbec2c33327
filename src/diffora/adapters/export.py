"""Writes a trained model to files: a LoRA adapter, only the trained weights, or the whole model."""

import inspect
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffora.adapters.card import LOAD_WITH_DIFFORA, LOAD_WITH_PEFT, card
from diffora.adapters.manifest import ADAPT, SELECTION, TRAINED, write_manifest
from diffora.adapters.origin import Origin, identity_of, made_for, named_classes, without_wrappers
from diffora.adapters.pairs import (
    COMPACT,
    LOADED_WHOLE,
    PREFIX,
    UNIFORM,
    Kept,
    equal_groups,
    write_pairs,
    write_tensors,
)
from diffora.backbones.backbone import Backbone, pretrained_children
from diffora.backbones.processors import load_processor
from diffora.core.linear import is_conv1d
from diffora.core.lowrank import LowRankLinear, lowrank_layers
from diffora.core.model import places_of, without_compiled_parts
from diffora.core.norms import moved_statistics
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.files import atomic_folder, write_text
from diffora.settings.read import model_of
from diffora.standalone.model import check_head

log = logging.getLogger(__name__)

Pairs = Iterable[tuple[str, Tensor, Tensor, float]]
"""(full module name, A (rank, in), B^T (rank, out), s) for each update s B A."""


# --- low-rank pairs ---


def export_adapter(folder: Path, origin: Origin, pairs: Pairs, shared: Sequence[list[str]] = ()) -> None:
    """Write a run's low-rank updates and head as a LoRA adapter that PEFT and other programs load.

    Args:
        folder: where the files go. A selection file is copied from the folder above.
        origin: the adapted model with its head, and the facts for the configuration and the card.
        pairs: the updates. Modules of rank 0 are left out.
        shared: groups of modules that share one pair.
    """
    if selected := origin.record.get("selection"):
        write_text(folder / SELECTION, (folder.parent / selected["file"]).read_text())
    identity = origin.record.get("backbone")
    groups = save_pairs(
        folder, origin.backbone, pairs, shared, origin.base_model, origin.task.peft_type, identity=identity
    )
    write_text(folder / "README.md", card(origin, LOAD_WITH_PEFT, groups))


def save_adapter(
    model: nn.Module | Backbone, folder: Path | str, *, head: Sequence[str] = (), form: str = UNIFORM
) -> None:
    """Write the low-rank layers and the head of a model as an adapter, for PEFT, for servers and for `load_adapter`.

    Use it for a model that `diffora.attach` adapted and that you trained yourself.

    Args:
        model: with low-rank layers. The head is what transformers adds to the pretrained model, as in `load_adapter`.
            Other modules with trainable parameters are saved too, and those that `load_adapter` filled, and batch norms
            whose statistics changed in training. Inside `torch.compile`, `nn.DataParallel` and
            `DistributedDataParallel`, the module itself is saved.
        folder: where the files go.
        head: full names of more modules to save, such as a head that is frozen again.
        form: ``uniform``: all modules get one rank and one scale, which every program reads. ``compact``: the exact
            ranks, for PEFT and this package only.

    Raises:
        UserError: ``form`` is none of these, a name is not a module, the model has no low-rank layers or is divided
            among processes, it trains parameters that no module to save holds, or the folder has the selection of
            another adapter.
    """
    if form not in (UNIFORM, COMPACT):
        raise UserError(f"form={form!r} must be {UNIFORM} or {COMPACT}")
    if not isinstance(model, Backbone):
        model = without_wrappers(model)
        with without_compiled_parts(model):
            _save_model(Path(folder), Backbone.of(model, arguments=named_classes(model)), head, form)
    else:
        _save_model(Path(folder), model, head, form)


def _save_model(folder: Path, backbone: Backbone, head: Sequence[str], form: str) -> None:
    """`save_adapter` of a model without wrappers."""
    backbone = _with_trained(backbone, head)
    pairs, shared = pairs_in(backbone.model)
    if not pairs:
        raise UserError(f"this {type(backbone.model).__name__} has no low-rank layers: call diffora.attach first")
    if divided := [name for name, p in backbone.model.named_parameters() if type(p).__name__ == "DTensor"]:
        raise UserError(
            f"{divided[0]} is divided among processes (FSDP): gather the weights with "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict (full_state_dict=True), load them into a "
            "model with the same adapters that is not divided, and save that"
        )
    _check_selection(folder, pairs, shared)
    base = getattr(getattr(backbone.model, "config", None), "name_or_path", None) or None
    save_pairs(folder, backbone, pairs, shared, base, task_type(backbone.model), form, identity_of(backbone.model))


def _check_selection(folder: Path, pairs: Pairs, shared: Sequence[Sequence[str]]) -> None:
    """Refuse a folder with the selection of another adapter. The manifest would list it as that of this one."""
    file = folder / SELECTION
    if not file.is_file():
        return
    ranks = {name: len(lora_a) for name, lora_a, _, _ in pairs}
    selected = set(Selection.load(file).names())
    together = {name for group in shared if len(group) > 1 for name in group}
    others = ranks.keys() - selected - together  # may have a shared pair for themselves alone, of another rank
    alike = {ranks[name] for name in others} & {ranks[name] for name in selected & ranks.keys()}
    if not selected <= ranks.keys() - together or alike:
        raise UserError(f"{file} selects other modules than this adapter has: remove it, or choose another folder")


def _with_trained(backbone: Backbone, head: Sequence[str]) -> Backbone:
    """A backbone whose head includes the given modules and all with trainable parameters, except low-rank layers."""
    model, layers = backbone.model, dict(lowrank_layers(backbone.model))
    modules = dict(model.named_modules(remove_duplicate=False))
    check_head(head, model)
    named = [name for name in (*head, *getattr(model, LOADED_WHOLE, ())) if name not in backbone.head]
    done = {p for layer in layers.values() for p in layer.parameters(recurse=False)} | backbone.head_parameters()
    done |= {p for name in named for p in modules[name].parameters()}
    # Tied parameters stand in several modules. PEFT replaces each by its own copy, so it needs all of them.
    parameters = model.named_parameters(remove_duplicate=False)
    holders = [name.rpartition(".")[0] for name, p in parameters if p.requires_grad and p not in done]
    whole = dict.fromkeys([*named, *holders, *moved_statistics(model)])
    inside = [name for name in whole if any(name.startswith(f"{other}.") for other in (*backbone.head, *whole))]
    more = tuple(name for name in whole if name not in inside)  # PEFT cannot load a module that is saved twice
    places = [f"{layer}." for layer in layers]
    if bad := [
        name
        for name in more
        if not name or any(place.startswith(f"{name}.") or name.startswith(place) for place in places)
    ]:
        raise UserError(
            f"{bad[0] or type(model).__name__} has trainable parameters beside its low-rank layers, which no adapter "
            "holds: freeze them before training, or save the whole model with torch.save(model.state_dict(), …)"
        )
    if not (backbone.head or more or pretrained_children(model)):
        log.warning(
            f"only the low-rank layers of this {type(model).__name__} are saved, because nothing else requires "
            "gradients: if you trained a head, name it (head=[…])"
        )
    return replace(backbone, head=(*backbone.head, *more)) if more else backbone


TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
"""PEFT's names of tasks, by the end of a transformers class."""


def task_type(model: Any) -> str | None:
    """PEFT's name of a model's task; None if PEFT's class for it would call the model in another way."""
    name = type(model).__name__
    found = next((task for end, task in TASK_TYPES.items() if name.endswith(end)), None)
    if found == "SEQ_2_SEQ_LM":  # the class is for texts, and speech and images end in the same way
        texts = "input_ids" in inspect.signature(model.forward).parameters
        config = getattr(model, "config", None)
        return found if texts and getattr(config, "is_encoder_decoder", False) else None
    return found


def pairs_in(model: nn.Module) -> tuple[list[tuple[str, Tensor, Tensor, float]], list[list[str]]]:
    """The low-rank updates of a model as `Pairs`, with gates multiplied in, and the groups that share a pair."""
    layers = dict(lowrank_layers(model))
    groups: dict[int, list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault(id(layer.lora_a), []).append(name)
    return [(name, *layer.plain_pair(), layer.scaling) for name, layer in layers.items()], list(groups.values())


def save_pairs(
    folder: Path,
    backbone: Backbone,
    pairs: Pairs,
    shared: Sequence[Sequence[str]] = (),
    base_model: str | None = None,
    task_type: str | None = None,
    form: str = UNIFORM,
    identity: Mapping[str, Any] | None = None,
) -> list[list[str]]:
    """Write low-rank updates and head as a LoRA adapter (`diffora.adapters.pairs`).

    Modules are written with their full names: PEFT applies a name like ``output.dense`` to all that end with it.

    Args:
        folder: where the files go.
        backbone: the adapted model, with the names of its head.
        pairs: the updates. Modules of rank 0 are left out.
        shared: groups of modules that share one pair.
        base_model: hub id or folder of the pretrained model.
        task_type: PEFT's name of the task.
        form: ``uniform`` or ``compact``.
        identity: digests of the pretrained model's files (`diffora.digests.backbone`).

    Returns:
        The groups of modules that share a pair in the file.
    """
    everything = list(pairs)
    kept = {name: (a.detach().cpu(), bt.detach().cpu(), scale) for name, a, bt, scale in everything if len(a)}
    if not kept:  # all pruned: PEFT wants at least one module
        name, lora_a, lora_bt, scale = everything[0]
        kept = {name: (torch.zeros(1, lora_a.shape[1]), torch.zeros(1, lora_bt.shape[1]), scale)}
    model = backbone.model
    backbone.check_outside_head(kept)
    heads = [*backbone.head, *(name for name in backbone.untrained if name not in kept)]
    for warning in _lost_in_peft(model, kept, heads):
        log.warning(warning)
    groups = equal_groups(kept, shared)
    whole = {f"{PREFIX}{name}": value for name, value in head_tensors(backbone).items()}
    whole |= _untrained_tensors(backbone, kept)
    layers = {name: model.get_submodule(name) for name in kept}
    config = adapter_config(list(kept), heads, base_model, task_type)
    # How the backbone stores its weights. A and B are always stored in the same way.
    config["fan_in_fan_out"] = any(is_conv1d(part) for layer in layers.values() for part in layer.modules())
    dropout = {name: layer.dropout if isinstance(layer, LowRankLinear) else 0.0 for name, layer in layers.items()}
    facts = {"heads": heads, **made_for(backbone, identity)}
    write_pairs(folder, kept, groups, dropout, whole, config, facts, form)
    return groups


def adapter_config(
    names: Sequence[str], heads: Sequence[str], base_model: str | None, task_type: str | None
) -> dict[str, Any]:
    """The content of PEFT's ``adapter_config.json``, without ranks and scales.

    Args:
        names: full names of the adapted modules.
        heads: full names of the modules that are saved whole.
        base_model: hub id or folder of the pretrained model.
        task_type: PEFT's name of the task.
    """
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "target_modules": list(names),
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
        tensors |= {f"{PREFIX}{name}.{inner}{key}": value for key, value in weights.items()}
    return tensors


def _lost_in_peft(model: nn.Module, names: Iterable[str], heads: Sequence[str]) -> Iterator[str]:
    """Warnings about what PEFT reads in another way than `diffora.load_adapter`.

    Args:
        names: full names of the adapted modules.
        heads: full names of the modules that are saved whole.
    """
    advice = "load with diffora.load_adapter"
    for name, others in _other_places(model, names):
        yield f"{name} stands at {', '.join(others)} too, where PEFT adapts nothing: {advice}"
    layers = {name: layer for name, layer in lowrank_layers(model) if layer.weight_was_read}
    if read := [name for name in names if name in layers]:
        yield f"this model reads the weight of {read[0]} instead of calling it, and PEFT then adds no update: {advice}"
    elif fast := [name for name in names if isinstance(_parent(model, name), nn.TransformerEncoderLayer)]:
        yield (
            f"torch's fast path for nn.TransformerEncoderLayer reads the weight of {fast[0]} in eval mode, and PEFT "
            f"then adds no update: {advice}, or call torch.backends.mha.set_fastpath_enabled(False)"
        )
    inside = tuple(f"{name}." for name in (*heads, *(f"{name}.base" for name, _ in lowrank_layers(model))))
    for head in heads:
        outside = [name for name, _ in model.named_modules() if not f"{name}.".startswith(inside)]
        if alike := [name for name in outside if name.endswith(head)]:
            yield f"PEFT goes by the ends of names, and takes {alike[0]} for {head}, which is saved whole: {advice}"


def _parent(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


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
    write_manifest(folder, files, made_for(backbone, origin.record.get("backbone")))


def save_model(model: Any, folder: Path) -> None:
    """Write a transformers model, for generation with a cache, which is off in training only."""
    caches = getattr(model.config, "use_cache", None)
    if caches is not None:
        model.config.use_cache = True
    try:
        model.save_pretrained(folder)
    finally:
        if caches is not None:
            model.config.use_cache = caches


def export_model(folder: Path, origin: Origin) -> None:
    """Write a whole transformers model (full fine-tuning), with its tokenizer or image processor."""
    with atomic_folder(folder) as scratch:
        save_model(origin.backbone.model, scratch)
        try:
            # Load it again: the one in memory keeps settings of its last call, such as the truncation.
            load_processor(model_of(origin.config["model"]), origin.task.processor_kind).save_pretrained(scratch)
        except UserError as error:  # the training is done and must not be lost
            log.warning(f"{folder} has no tokenizer or image processor: {error}")
