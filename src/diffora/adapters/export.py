"""From a trained model to files that others load: a PEFT adapter, or a whole transformers model."""

import contextlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor, nn

from diffora.adapters.manifest import MANIFEST, read_manifest, write_manifest
from diffora.adapters.pairs import (
    CONFIG,
    EXACT,
    WEIGHTS,
    StoredPairs,
    equal_groups,
    pad_and_fold,
    read_tensors,
    write_tensors,
)
from diffora.backbones.models import check_outside_head, drawn_modules, freeze_backbone, head_modules
from diffora.core.attach import freeze_rest, places_of
from diffora.core.linear import features, is_conv1d, is_linear
from diffora.core.lowrank import LowRankLinear
from diffora.errors import UserError
from diffora.files import atomic_folder, read_json, write_text
from diffora.tasks.base import Task
from diffora.trust import check_peft_adapter, class_at, settings

log = logging.getLogger(__name__)

ADAPT, TRAINED = "diffora.json", "weights.safetensors"
READ = (CONFIG, WEIGHTS, EXACT, ADAPT, TRAINED)
"""Files that `load_adapter` reads, where an adapter has them."""


@dataclass(frozen=True)
class Origin:
    """Where a trained model comes from, for its files.

    Attributes:
        base_model: hub id or folder of the pretrained model, as others should load it.
        task: whose head it is.
        record: of the run.
        config: the run's configuration, as plain containers.
        arguments: what `from_pretrained` must be given for the same model besides its name.
    """

    base_model: str
    task: Task
    record: dict[str, Any]
    config: dict[str, Any]
    arguments: dict[str, Any]


Pairs = Iterable[tuple[str, Tensor, Tensor, float]]
"""(full module name, A (rank, in), B^T (rank, out), s) for each update s B A."""


def export_adapter(
    model: nn.Module, folder: Path, origin: Origin, pairs: Pairs, shared: Sequence[list[str]] = ()
) -> None:
    """Write low-rank updates and head as a LoRA adapter that PEFT and other programs load (`diffora.adapters.pairs`).

    Modules are named in full, since names like ``output.dense`` match more than is meant.

    Args:
        model: whose head goes along.
        folder: where the files go.
        origin: for the configuration and the card.
        pairs: the updates; modules whose rank came down to 0 are left out.
        shared: groups of modules that share one pair.
    """
    everything = list(pairs)
    kept = {name: (a.detach().cpu(), bt.detach().cpu(), scale) for name, a, bt, scale in everything if len(a)}
    if not kept:  # all pruned: PEFT wants at least one module
        name, lora_a, lora_bt, scale = everything[0]
        kept = {name: (torch.zeros(1, lora_a.shape[1]), torch.zeros(1, lora_bt.shape[1]), scale)}
    check_outside_head(model, kept)
    for name, others in _elsewhere(model, kept):
        log.warning(f"{name} stands at {', '.join(others)} too, where PEFT adapts nothing: load with load_adapter")
    groups = equal_groups(kept, shared)
    tensors, exact = pad_and_fold(kept, groups)
    tensors |= {f"base_model.model.{name}": value for name, value in head_tensors(model).items()}
    alone = []
    for name in drawn_modules(model):
        base, inner = model.get_submodule(name), ""
        if name in kept:  # beside its update, where PEFT looks for it
            base, inner = getattr(base, "base", None) or base.base_layer, "base_layer."  # type: ignore[assignment]
        else:
            alone.append(name)
        weights = {key: value.detach().cpu().clone() for key, value in base.state_dict().items()}
        tensors |= {f"base_model.model.{name}.{inner}{key}": value for key, value in weights.items()}
    heads = head_modules(model) + alone
    config = adapter_config(list(kept), max(len(a) for a, _, _ in kept.values()), heads, origin)
    layers = {name: model.get_submodule(name) for name in kept}
    adapted = (part for layer in layers.values() for part in layer.modules())
    config["fan_in_fan_out"] = any(map(is_conv1d, adapted))  # how the backbone keeps weights; A and B are as ever
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
    content = {"modules": modules, "shared": groups, "heads": heads, **made_for(model, origin)}
    write_manifest(folder, [CONFIG, WEIGHTS, *([EXACT] if exact else [])], content)


def _elsewhere(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Adapted modules that have other places in the model, which PEFT, going by names, does not see."""
    modules, places = dict(model.named_modules(remove_duplicate=False)), places_of(model)

    def spot(place: str) -> tuple[int, str]:
        parent, _, last = place.rpartition(".")
        return id(modules[parent]), last

    for name in names:
        if others := [place for place in places[id(modules[name])] if spot(place) != spot(name)]:
            yield name, others


def labels_of(arguments: Mapping[str, Any]) -> list[str] | None:
    """The class names in a head's entries of the configuration, in order of their numbers."""
    names = arguments.get("id2label")
    return None if names is None else [str(names[i]) for i in sorted(names)]


def made_for(model: nn.Module, origin: Origin) -> dict[str, Any]:
    """Entries of the manifest that say what a model must be to take the adapter: class, layers, class names."""
    return {"model": type(model).__name__, "layers": _layers(model), "labels": labels_of(origin.arguments)}


def _layers(model: nn.Module) -> int | None:
    found = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    return found if isinstance(found, int) else None


def _check_made_for(model: nn.Module, manifest: Mapping[str, Any], folder: Path) -> None:
    """Refuse a model of another class or depth, on which the adapter might load and mean nothing."""
    name, layers = manifest.get("model"), manifest.get("layers")
    if name is not None and name not in {kind.__name__ for kind in type(model).__mro__}:
        raise UserError(f"{folder} was trained for a {name}, and this model is a {type(model).__name__}")
    if None not in (layers, _layers(model)) and layers != _layers(model):
        raise UserError(f"{folder} was trained on {layers} layers, and this model has {_layers(model)}")


def head_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The head's weights under their full names, on the CPU."""
    return {
        f"{head}.{name}": value.detach().cpu().clone()
        for head in head_modules(model)
        for name, value in model.get_submodule(head).state_dict().items()
    }


def export_weights(model: nn.Module, folder: Path, origin: Origin) -> None:
    """Write what was trained, for methods that no PEFT format holds; `load_adapter` adapts anew and fills in.

    Args:
        model: the trained model.
        folder: where ``diffora.json`` (how to adapt) and ``weights.safetensors`` (what was trained) go.
        origin: whose configuration says how to adapt.
    """
    trained = {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}
    for name in drawn_modules(model):
        drawn = model.get_submodule(name).state_dict(prefix=f"{name}.")
        trained |= {key: value.detach().cpu().clone() for key, value in drawn.items()}
    write_tensors(folder / TRAINED, trained | head_tensors(model))
    sections = ("method", "rank", "rho", "finetune", "seed", "model")
    content = {key: origin.config[key] for key in sections if key in origin.config}
    selected = origin.record["selection"]
    content["selection"] = selected["file"] if selected else None
    if selected:
        write_text(folder / selected["file"], (folder.parent / selected["file"]).read_text())
    write_text(folder / ADAPT, json.dumps({"base_model": origin.base_model, **content}, indent=1) + "\n")
    write_text(folder / "README.md", card(origin, LOAD_WITH_DIFFORA))
    files = [TRAINED, ADAPT, *([content["selection"]] if selected else [])]
    write_manifest(folder, files, made_for(model, origin))


def adapter_config(names: Sequence[str], rank: int, heads: list[str], origin: Origin) -> dict[str, Any]:
    """The content of PEFT's ``adapter_config.json`` for updates of one rank and the scale 1."""
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
        "modules_to_save": heads or None,
    }


LOAD_WITH_PEFT = """from peft import PeftModel

model = PeftModel.from_pretrained(base, "path/to/this/folder").eval()"""
LOAD_WITH_DIFFORA = """from pathlib import Path
from diffora.adapters.export import load_adapter

load_adapter(base, Path("path/to/this/folder"))"""


def card(origin: Origin, how_to_load: str, groups: Sequence[Sequence[str]] = ()) -> str:
    """Model card with what to type to load the adapter onto ``base``, and to train on with modules that share."""
    record, task = origin.record, origin.task
    scores = "\n".join(f"| {key} | {value:.4f} |" for key, value in record["metrics"].items())
    labels, lines = labels_of(origin.arguments), [f"from transformers import {task.model_class}", ""]
    arguments = {key: repr(v) for key, v in origin.arguments.items() if key not in ("id2label", "label2id")}
    if labels is not None:
        lines.append(f"names = {labels!r}")
        named = {"id2label": "dict(enumerate(names))", "label2id": "{name: i for i, name in enumerate(names)}"}
        arguments = {key: value for key, value in arguments.items() if key != "num_labels"} | named
    head = "".join(f", {key}={value}" for key, value in arguments.items())
    lines += [f'base = {task.model_class}.from_pretrained("{origin.base_model}"{head}, dtype="float32")', how_to_load]
    code = "\n".join(lines)
    library = "peft" if how_to_load is LOAD_WITH_PEFT else "diffora"
    # A folder of this machine is no model that the hub knows, and its pages break on one.
    base = "" if Path(origin.base_model).is_absolute() else f"base_model: {origin.base_model}\n"
    return f"""---
{base}library_name: {library}
tags: [{record["method"]}, {record["task"]}]
---
# {record["method"]} adapter for {task.name}

{record["params"]["adapter"]:,} adapter parameters and a head of {record["params"]["head"]:,}, seed {record["seed"]}.

| metric | value |
|---|---|
{scores}

```python
{code}
```
{task.usage}{TRAIN_ON.format(sum(map(len, groups)), len(groups)) if groups else ""}"""


TRAIN_ON = """
## Training on

{0} modules share {1} pairs of A and B. Plain PEFT gives each module a copy of its pair: predictions are the same, but
the copies drift apart when training goes on. To keep them one, load the adapter in this way instead, before the
optimiser is made:

```python
from pathlib import Path
from diffora.adapters.pairs import retie

model = PeftModel.from_pretrained(base, "path/to/this/folder", is_trainable=True)
retie(model, Path("path/to/this/folder"))
```

Or load the adapter with `diffora.adapters.export.load_adapter(base, Path("path/to/this/folder"))`, which restores
ranks, scales and sharing exactly as they were trained.
"""


def export_model(model: nn.Module, folder: Path, origin: Origin) -> None:
    """Write a whole transformers model (full fine-tuning), and the tokenizer or image processor that it was given."""
    with atomic_folder(folder) as scratch:
        model.save_pretrained(scratch)  # type: ignore[operator]
        try:
            origin.task.save_processor(OmegaConf.create(origin.config["model"]), scratch)
        except UserError as error:  # the training is done and must not be lost with it
            log.warning(f"{folder} has no tokenizer or image processor: {error}")


def load_adapter(model: nn.Module, folder: Path | str, method: str | None = None, *, freeze: bool = True) -> None:
    """Put an exported adapter on a backbone, in place, with ranks, scales and sharing as they were trained.

    What was trained, but for the head, requires gradients afterwards, so that training can go on. PEFT's own layers are
    loaded for inference.

    Args:
        model: the pretrained backbone with a head, without low-rank layers.
        folder: the ``adapter/`` of a run, or an adapter that PEFT wrote.
        method: dotted path of the `Method` that adapts the model, where it is none of this project: what the folder
            itself says is not imported.
        freeze: freeze everything else. The head too: to train it, call ``model.classifier.requires_grad_(True)``
            afterwards. False leaves it as it is; where the folder has no low-rank pairs, the head is trainable then.

    Raises:
        UserError: missing, damaged or unreadable files, or an adapter of another model.
    """
    folder = Path(folder)
    manifest: dict[str, Any] | None = None
    with contextlib.suppress(FileNotFoundError):  # plain PEFT writes none
        manifest = read_manifest(folder)
        if stray := [name for name in READ if name not in manifest["files"] and (folder / name).exists()]:
            raise UserError(f"{folder / stray[0]} is not listed in {MANIFEST}: it belongs to another adapter")
        _check_made_for(model, manifest, folder)
    if (folder / ADAPT).is_file():
        _load_weights(model, folder, manifest, method)
        for head in head_modules(model) if freeze else ():
            model.get_submodule(head).requires_grad_(False)
    elif manifest is not None and "modules" in manifest:
        _load_pairs(model, folder, manifest)
        if freeze:
            freeze_rest(model)
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
        _load_with_peft(model, folder)
        _take_labels(model, manifest or {}, folder)
    else:
        raise UserError(f"{folder} is not an adapter of this project: it has no {ADAPT} and no {CONFIG}")


def _load_weights(model: nn.Module, folder: Path, manifest: Mapping[str, Any] | None, method: str | None) -> None:

    from diffora.core.grid import find_grid
    from diffora.core.selection import Selection
    from diffora.methods.base import Method

    cfg = _how_to_adapt(folder / ADAPT)
    named = (method, None) if method else (cfg.method.get("_target_"), folder / ADAPT)
    kind = class_at(named[0], Method, "method._target_", named[1])
    try:
        settled = kind.from_config(cfg)
    except UserError as error:
        raise UserError([f"{folder / ADAPT}: {problem}" for problem in error.problems]) from None
    if manifest is None:
        raise UserError(
            f"{folder} has no {MANIFEST}: copy the whole folder from the run. Adapters of earlier versions, which had "
            "none, are not read any more: make the run again"
        )
    tensors = read_tensors(folder / TRAINED)
    grid = find_grid(model, cfg.model.layer, cfg.model.candidates, cfg.model.get("roles"), "model.")
    selection = None if cfg.selection is None else Selection.load(folder / cfg.selection)
    freeze_backbone(model)
    with torch.random.fork_rng():
        torch.manual_seed(cfg.seed)  # as the run did: what a method draws and never trains is not in the file
        settled.adapt(model, grid, selection, cfg.seed)
    _fill(model, tensors, folder)
    _take_labels(model, manifest, folder)
    if absent := [name for name, p in model.named_parameters() if p.requires_grad and name not in tensors]:
        raise UserError(f"{folder} does not fit this model: it has no {absent[0]} (and {len(absent) - 1} more)")


def _how_to_adapt(file: Path) -> Any:
    """The settings in ``diffora.json``, which somebody else may have written.

    Raises:
        UserError: everything that cannot be right in it, but for the method's own settings.
    """
    content = read_json(file)
    values = ("rank", "rho", "finetune", "seed", "selection")
    cfg = settings(content, file, ("method", "model"), values)
    problems = []
    if not isinstance(cfg.get("finetune", {}), Mapping | DictConfig):
        problems.append(f"finetune={cfg.finetune!r} must be a group of settings")
    if not isinstance(seed := cfg.get("seed"), int) or not 0 <= seed < 2**63:
        problems.append(f"seed={seed!r} must be a whole number of at least 0")
    name = cfg.get("selection")
    if name is not None and not (isinstance(name, str) and Path(name).name == name):
        problems.append(f"selection={name!r} must be the name of a file beside it, or null")
    if not isinstance(cfg.method.get("name"), str):
        problems.append("method.name must be text")
    for key, fits in (("name", str), ("layer", str | None), ("candidates", ListConfig | None)):
        if key not in cfg.model or not isinstance(cfg.model[key], fits):
            problems.append(f"model.{key}={cfg.model.get(key)!r} must be {'a list' if key == 'candidates' else 'text'}")
    if not isinstance(roles := cfg.model.get("roles"), DictConfig | None):
        problems.append(f"model.roles={roles!r} must be a group of settings")
    texts = [] if problems else [*(cfg.model.candidates or ()), *(roles or {}).values()]
    if strange := [text for text in texts if not isinstance(text, str)]:
        problems.append(f"model.candidates and model.roles must hold names of modules, not {strange[0]!r}")
    if problems:
        raise UserError([f"{file}: {problem}" for problem in problems])
    return cfg


def _fill(module: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    """Load some of a module's tensors."""
    try:
        strange = module.load_state_dict(tensors, strict=False).unexpected_keys
    except RuntimeError as error:  # shapes
        raise UserError(f"{folder} does not fit this model: {str(error).splitlines()[-1].strip()}") from None
    if strange:
        raise UserError(f"{folder} does not fit this model, which has no {strange[0]} (and {len(strange) - 1} more)")


def _load_pairs(model: nn.Module, folder: Path, manifest: Mapping[str, Any]) -> None:
    pairs = StoredPairs.read(folder, manifest)
    modules, places = dict(model.named_modules(remove_duplicate=False)), places_of(model)
    if missing := [name for name in [*pairs.modules, *pairs.heads] if name not in modules]:
        raise UserError(f"{folder} does not fit this model, which has no {missing[0]} (and {len(missing) - 1} more)")
    problems, whole = [], []
    for name in pairs.modules:
        base, (lora_a, folded) = modules[name], pairs.padded(name)
        if not is_linear(base):
            hint = " and has low-rank layers already" if isinstance(base, LowRankLinear) else ""
            problems.append(f"{name} is a {type(base).__name__}{hint}")
        elif (found := (lora_a.shape[1], folded.shape[1])) != features(base):
            problems.append(f"{name} maps {features(base)[0]} to {features(base)[1]} features, A and B {found}")
        whole += [name] if any(key.startswith(f"base_model.model.{name}.base_layer.") for key in pairs.tensors) else []
    if problems:
        raise UserError([f"{folder} does not fit this model: {problem}" for problem in problems])
    _check_heads(model, [*pairs.heads, *whole], folder)
    _take_labels(model, manifest, folder)
    states = {}
    for name in [*pairs.heads, *whole]:
        prefix = f"base_model.model.{name}." + ("base_layer." if name in whole else "")
        state = {key.removeprefix(prefix): value for key, value in pairs.tensors.items() if key.startswith(prefix)}
        needed = {key: tuple(value.shape) for key, value in modules[name].state_dict().items()}
        given = {key: tuple(value.shape) for key, value in state.items()}
        problems += [
            f"{name}.{key} is {given.get(key, 'missing')} in the file and {needed.get(key, 'missing')} in the model"
            for key in sorted(needed.keys() | given.keys())
            if needed.get(key) != given.get(key) and not (name in pairs.modules and key.startswith("lora_"))
        ]
        states[name] = state
    if problems:
        raise UserError([f"{folder} does not fit this model: {problem}" for problem in problems])
    for name, state in states.items():
        modules[name].load_state_dict(state)
    first = {name: group[0] for group in pairs.groups for name in group}
    parameters: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
    for name, (rank, scale, dropout) in pairs.modules.items():
        source = first.get(name, name)
        if source not in parameters:
            lora_a, lora_bt = pairs.pair(source)
            device = modules[name].weight.device
            parameters[source] = nn.Parameter(lora_a.to(device)), nn.Parameter(lora_bt.to(device))
        layer = LowRankLinear(modules[name], *parameters[source], alpha=scale * rank, dropout=dropout)
        layer.scaling = scale  # to the bit
        for place in places[id(modules[name])]:
            model.set_submodule(place, layer)


def _take_labels(model: nn.Module, manifest: Mapping[str, Any], folder: Path) -> None:
    """Name the model's classes as the adapter's, unless it has names of its own.

    Raises:
        UserError: it has other names, or the same in another order.
    """
    labels, config = manifest.get("labels"), getattr(model, "config", None)
    names = getattr(config, "id2label", None)
    if not labels or not names:
        return
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise UserError(f"{folder / MANIFEST}: labels={labels!r} must be a list of class names")
    theirs = [str(names[i]) for i in sorted(names)]
    if theirs == [f"LABEL_{i}" for i in range(len(labels))]:
        config.id2label = dict(enumerate(labels))  # type: ignore[union-attr]
        config.label2id = {name: i for i, name in enumerate(labels)}  # type: ignore[union-attr]
    elif theirs != labels:
        raise UserError(
            f"{folder} was trained on the classes {', '.join(labels[:10])} ({len(labels)}), in this order; "
            f"the model's are {', '.join(theirs[:10])} ({len(theirs)}): give it the adapter's id2label and label2id"
        )


def _load_with_peft(model: nn.Module, folder: Path) -> None:
    """What PEFT injects into a model; its own errors are of many kinds."""
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    check_peft_adapter(folder)
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
        if config.is_prompt_learning:
            raise UserError(f"{folder} is a prompt ({config.peft_type.value}), which is not part of the model")
        if getattr(config, "lora_alpha", 1) <= 0:
            raise UserError(f"{folder / CONFIG}: lora_alpha={config.lora_alpha} must be above 0")
        _check_heads(model, config.modules_to_save or [], folder)
        there = dict(model.named_modules())
        peft = PeftModel.from_pretrained(model, str(folder))
        expected = get_peft_model_state_dict(peft, save_embedding_layers=False).keys()
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise UserError(f"{folder} does not fit this model: {reason}") from error
    if not (folder / WEIGHTS).is_file():  # PEFT's older format
        return
    tensors = read_tensors(folder / WEIGHTS)
    if absent := sorted(expected - tensors.keys()):
        raise UserError(f"{folder / WEIGHTS} does not fit this model: no {absent[0]} (and {len(absent) - 1} more)")
    places = {key: key.removeprefix("base_model.model.").partition(".lora_")[0] for key in tensors if ".lora_" in key}
    if strange := [key for key, place in places.items() if place not in there]:
        raise UserError(
            f"{folder / WEIGHTS} does not fit this model: no place for {strange[0]} (and {len(strange) - 1} more)"
        )


def _check_heads(model: nn.Module, saved: Sequence[str], folder: Path) -> None:
    """Refuse an adapter without the model's head, which would stay as it was drawn."""
    absent = [head for head in head_modules(model) if not any(f".{head}".endswith(f".{name}") for name in saved)]
    if absent:
        raise UserError(
            f"{folder} has no {absent[0]}, the head of a {type(model).__name__}: "
            "it was trained for another kind of task"
        )
