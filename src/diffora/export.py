"""From a trained model to files that others load: a PEFT adapter, or a whole transformers model."""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from diffora.core.linear import is_conv1d
from diffora.core.lowrank import LowRankLinear
from diffora.core.peers import Peers
from diffora.errors import UserError
from diffora.files import atomic, write_text
from diffora.models import drawn_modules, freeze_backbone, head_modules
from diffora.tasks.base import Task

log = logging.getLogger(__name__)

SHARING = "sharing.json"
ADAPT = "diffora.json"


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
    """Write low-rank updates and head as a LoRA adapter that plain `peft.PeftModel.from_pretrained` loads.

    Every module is named in full and has its own rank and alpha, since names like ``output.dense`` match more than is
    meant. Modules that share a pair get a copy each, so inference is exact; which ones did stands in ``sharing.json``.

    Args:
        model: whose head goes along.
        folder: where ``adapter_config.json`` and ``adapter_model.safetensors`` go.
        origin: for the configuration and the card.
        pairs: the updates; modules whose rank came down to 0 are left out.
        shared: groups of modules that share one pair.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    scales: dict[str, tuple[int, float]] = {}
    everything = list(pairs)
    if not any(len(lora_a) for _, lora_a, _, _ in everything):  # all pruned: PEFT wants at least one module
        name, lora_a, lora_bt, scaling = everything[0]
        everything = [(name, lora_a.new_zeros(1, lora_a.shape[1]), lora_bt.new_zeros(1, lora_bt.shape[1]), scaling)]
    for name, lora_a, lora_bt, scaling in everything:
        if len(lora_a):
            place = f"base_model.model.{name}"
            tensors[f"{place}.lora_A.weight"] = lora_a.detach().cpu().clone()
            tensors[f"{place}.lora_B.weight"] = lora_bt.detach().T.cpu().clone(memory_format=torch.contiguous_format)
            scales[name] = len(lora_a), scaling
    tensors |= {f"base_model.model.{name}": value for name, value in head_tensors(model).items()}
    alone = []
    for name in drawn_modules(model):
        base, inner = model.get_submodule(name), ""
        if name in scales:  # beside its update, where PEFT looks for it
            base, inner = getattr(base, "base", None) or base.base_layer, "base_layer."  # type: ignore[assignment]
        else:
            alone.append(name)
        weights = {key: value.detach().cpu().clone() for key, value in base.state_dict().items()}
        tensors |= {f"base_model.model.{name}.{inner}{key}": value for key, value in weights.items()}
    with atomic(folder / "adapter_model.safetensors") as scratch:
        save_file(tensors, scratch, metadata={"format": "pt"})
    write_text(folder / SHARING, json.dumps([names for names in shared if len(names) > 1], indent=1) + "\n")
    config = adapter_config(scales, head_modules(model) + alone, origin)
    adapted = (part for name in scales for part in model.get_submodule(name).modules())
    config["fan_in_fan_out"] = any(map(is_conv1d, adapted))  # how the backbone keeps weights; A and B are as ever
    write_text(folder / "adapter_config.json", json.dumps(config, indent=1) + "\n")
    write_text(folder / "README.md", card(origin, LOAD_WITH_PEFT))


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
    from safetensors.torch import save_file

    trained = {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}
    for name in drawn_modules(model):
        drawn = model.get_submodule(name).state_dict(prefix=f"{name}.")
        trained |= {key: value.detach().cpu().clone() for key, value in drawn.items()}
    with atomic(folder / "weights.safetensors") as scratch:
        save_file(trained | head_tensors(model), scratch, metadata={"format": "pt"})
    sections = ("method", "rank", "rho", "finetune", "seed", "model")
    content = {key: origin.config[key] for key in sections if key in origin.config}
    selected = origin.record["selection"]
    content["selection"] = selected["file"] if selected else None
    if selected:
        write_text(folder / selected["file"], (folder.parent / selected["file"]).read_text())
    write_text(folder / ADAPT, json.dumps({"base_model": origin.base_model, **content}, indent=1) + "\n")
    write_text(folder / "README.md", card(origin, LOAD_WITH_DIFFORA))


def adapter_config(scales: Mapping[str, tuple[int, float]], heads: list[str], origin: Origin) -> dict[str, Any]:
    """The content of PEFT's ``adapter_config.json`` for updates of (rank, s) by module; PEFT's s is alpha / rank."""
    exact = {f"^{re.escape(name)}": pair for name, pair in scales.items()}
    rank, scaling = next(iter(scales.values()))
    return {
        "peft_type": "LORA",
        "task_type": origin.task.peft_type,
        "base_model_name_or_path": origin.base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": scaling * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(scales),
        "rank_pattern": {pattern: rank for pattern, (rank, _) in exact.items()},
        "alpha_pattern": {pattern: scaling * rank for pattern, (rank, scaling) in exact.items()},
        "modules_to_save": heads or None,
    }


LOAD_WITH_PEFT = """from peft import PeftModel

model = PeftModel.from_pretrained(base, "path/to/this/folder").eval()"""
LOAD_WITH_DIFFORA = """from pathlib import Path
from diffora.export import load_adapter

load_adapter(base, Path("path/to/this/folder"))"""


def card(origin: Origin, how_to_load: str) -> str:
    """Model card with what to type to load the adapter onto ``base``."""
    record, task = origin.record, origin.task
    scores = "\n".join(f"| {key} | {value:.4f} |" for key, value in record["metrics"].items())
    names = origin.arguments.get("id2label")
    arguments = {key: value for key, value in origin.arguments.items() if key not in ("id2label", "label2id")}
    if names is not None:
        arguments = {"num_labels": len(names)} | arguments
    head = "".join(f", {key}={value!r}" for key, value in arguments.items())
    library = "peft" if how_to_load is LOAD_WITH_PEFT else "diffora"
    return f"""---
base_model: {origin.base_model}
library_name: {library}
tags: [{record["method"]}, {record["task"]}]
---
# {record["method"]} adapter for {task.name}

{record["params"]["adapter"]:,} adapter parameters and a head of {record["params"]["head"]:,}, seed {record["seed"]}.

| metric | value |
|---|---|
{scores}

```python
from transformers import {task.model_class}

base = {task.model_class}.from_pretrained("{origin.base_model}"{head}, dtype="float32")
{how_to_load}
```
{task.usage}"""


def export_model(model: nn.Module, folder: Path, origin: Origin) -> None:
    """Write a whole transformers model (full fine-tuning), and the tokenizer or image processor that it was given."""
    model.save_pretrained(folder)  # type: ignore[operator]
    try:
        origin.task.save_processor(OmegaConf.create(origin.config["model"]), folder)
    except UserError as error:  # the training is done and must not be lost with it
        log.warning(f"{folder} has no tokenizer or image processor: {error}")


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Put an exported adapter on a backbone, in place, with the sharing between layers restored.

    Args:
        model: the pretrained backbone with a head, without low-rank layers.
        folder: the ``adapter/`` of a run.

    Raises:
        UserError: missing or unreadable files, or an adapter of another model.
    """
    if (folder / ADAPT).is_file():
        _load_weights(model, folder)
    elif (folder / SHARING).is_file():
        _load_pairs(model, folder)
    elif (folder / "adapter_config.json").is_file():
        _load_with_peft(model, folder)
    else:
        raise UserError(f"{folder} is not an adapter of this project: it has no {ADAPT} and no adapter_config.json")


def _load_weights(model: nn.Module, folder: Path) -> None:
    from hydra.utils import get_class
    from safetensors.torch import load_file

    from diffora.core.grid import find_grid
    from diffora.core.selection import Selection

    try:
        cfg: Any = OmegaConf.create(json.loads((folder / ADAPT).read_text()))
        tensors = load_file(folder / "weights.safetensors")
    except Exception as error:
        raise UserError(f"{folder} is not an adapter of this project: {error}") from None
    kind: Any = get_class(cfg.method._target_)
    grid = find_grid(model, cfg.model.layer, cfg.model.candidates, cfg.model.get("roles"))
    selection = None if cfg.selection is None else Selection.load(folder / cfg.selection)
    freeze_backbone(model)
    with torch.random.fork_rng():
        torch.manual_seed(cfg.seed)  # as the run did: what a method draws and never trains is not in the file
        kind.from_config(cfg).adapt(model, grid, selection, cfg.seed)
    _fill(model, tensors, folder)
    if absent := [name for name, p in model.named_parameters() if p.requires_grad and name not in tensors]:
        raise UserError(f"{folder} does not fit this model: it has no {absent[0]} (and {len(absent) - 1} more)")


def _fill(module: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    """Load some of a module's tensors."""
    try:
        strange = module.load_state_dict(tensors, strict=False).unexpected_keys
    except RuntimeError as error:  # shapes
        raise UserError(f"{folder} does not fit this model: {str(error).splitlines()[-1].strip()}") from None
    if strange:
        raise UserError(f"{folder} does not fit this model, which has no {strange[0]} (and {len(strange) - 1} more)")


def _load_pairs(model: nn.Module, folder: Path) -> None:
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        groups = json.loads((folder / SHARING).read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
    except Exception as error:
        raise UserError(f"{folder} is not an adapter of this project: {error}") from None
    modules = dict(model.named_modules())
    heads = config["modules_to_save"] or []
    if missing := [name for name in [*config["target_modules"], *heads] if name not in modules]:
        raise UserError(f"{folder} does not fit this model, which has no {missing[0]} (and {len(missing) - 1} more)")
    whole = [name for name in config["target_modules"] if f"base_model.model.{name}.base_layer.weight" in tensors]
    _check_heads(model, [*heads, *whole], folder)
    first = {name: names[0] for names in groups for name in names}
    pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
    peers = Peers()
    for name in config["target_modules"]:
        place = f"base_model.model.{name}"
        source = first.get(name, name)
        if source not in pairs:
            lora_b = tensors[f"{place}.lora_B.weight"]
            pairs[source] = nn.Parameter(tensors[f"{place}.lora_A.weight"]), nn.Parameter(lora_b.T.contiguous())
        base = f"{place}.base_layer."
        _fill(modules[name], {k.removeprefix(base): v for k, v in tensors.items() if k.startswith(base)}, folder)
        alpha = config["alpha_pattern"][f"^{re.escape(name)}"]
        layer = LowRankLinear(modules[name], *pairs[source], alpha, config["lora_dropout"])
        layer.peers = peers
        model.set_submodule(name, layer)
    for head in heads:
        prefix = f"base_model.model.{head}."
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        _fill(model.get_submodule(head), state, folder)


def _load_with_peft(model: nn.Module, folder: Path) -> None:
    """What PEFT injects into a model; its own errors are of many kinds."""
    from peft import PeftConfig, PeftModel

    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
        if config.is_prompt_learning:
            raise UserError(f"{folder} is a prompt ({config.peft_type.value}), which is not part of the model")
        _check_heads(model, config.modules_to_save or [], folder)
        PeftModel.from_pretrained(model, str(folder))
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise UserError(f"{folder} does not fit this model: {reason}") from error


def _check_heads(model: nn.Module, saved: Sequence[str], folder: Path) -> None:
    """Refuse an adapter without the model's head, which would stay as it was drawn."""
    absent = [head for head in head_modules(model) if not any(f".{head}".endswith(f".{name}") for name in saved)]
    if absent:
        raise UserError(
            f"{folder} has no {absent[0]}, the head of a {type(model).__name__}: "
            "it was trained for another kind of task"
        )
