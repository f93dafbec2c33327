"""From a trained model to files that others load: a PEFT adapter, or a whole transformers model."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffora.core.lowrank import LowRankLinear, lowrank_layers
from diffora.errors import UserError
from diffora.files import atomic, write_text
from diffora.models import head_modules
from diffora.tasks.glue import TaskSpec

SHARING = "sharing.json"


def export_adapter(model: nn.Module, folder: Path, base_model: str, spec: TaskSpec, record: dict[str, Any]) -> None:
    """Write low-rank layers and head as a LoRA adapter that plain `peft.PeftModel.from_pretrained` loads.

    Every module is named in full and has its own rank and alpha, since names like ``output.dense`` match more than is
    meant. Modules that share a pair get a copy each, so inference is exact; which ones did stands in ``sharing.json``.

    Args:
        model: with `LowRankLinear` layers, none of them merged.
        folder: where ``adapter_config.json`` and ``adapter_model.safetensors`` go.
        base_model: hub id or folder of the pretrained model, as PEFT should load it.
        spec: the task, for the card.
        record: of the run, for the card.
    """
    from safetensors.torch import save_file

    layers = dict(lowrank_layers(model))
    heads = head_modules(model)
    tensors: dict[str, torch.Tensor] = {}
    shared: dict[int, list[str]] = {}
    for name, layer in layers.items():
        bt = layer.lora_bt.detach()
        if layer.gate is not None:
            bt = bt * layer.gate.detach().reshape(-1, 1)
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lora_a.detach().cpu().clone()
        tensors[f"base_model.model.{name}.lora_B.weight"] = bt.T.cpu().clone(memory_format=torch.contiguous_format)
        shared.setdefault(id(layer.lora_a), []).append(name)
    for head in heads:
        for name, value in model.get_submodule(head).state_dict().items():
            tensors[f"base_model.model.{head}.{name}"] = value.detach().cpu().clone()
    with atomic(folder / "adapter_model.safetensors") as scratch:
        save_file(tensors, scratch, metadata={"format": "pt"})
    write_text(folder / SHARING, json.dumps([names for names in shared.values() if len(names) > 1], indent=1) + "\n")
    config = adapter_config(layers, heads, base_model)
    write_text(folder / "adapter_config.json", json.dumps(config, indent=1) + "\n")
    write_text(folder / "README.md", _card(base_model, spec, record))


def adapter_config(layers: dict[str, LowRankLinear], heads: list[str], base_model: str) -> dict[str, Any]:
    """The content of PEFT's ``adapter_config.json``."""
    first = next(iter(layers.values()))
    exact = {f"^{re.escape(name)}": layer for name, layer in layers.items()}
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "bias": "none",
        "target_modules": list(layers),
        "rank_pattern": {pattern: layer.rank for pattern, layer in exact.items()},
        "alpha_pattern": {pattern: layer.alpha for pattern, layer in exact.items()},
        "modules_to_save": heads,
    }


def _card(base_model: str, spec: TaskSpec, record: dict[str, Any]) -> str:
    """Model card with what to type to load the adapter."""
    scores = "\n".join(f"| {key} | {value:.4f} |" for key, value in record["metrics"].items())
    return f"""---
base_model: {base_model}
library_name: peft
tags: [{record["method"]}, {record["task"]}, lora]
---
# {record["method"]} adapter for {spec.name}

{record["params"]["adapter"]:,} adapter parameters and a head of {record["params"]["head"]:,}, seed {record["seed"]}.

| metric | value |
|---|---|
{scores}

```python
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

base = AutoModelForSequenceClassification.from_pretrained(
    "{base_model}", num_labels={spec.num_labels}, dtype="float32"
)
model = PeftModel.from_pretrained(base, "path/to/this/folder").eval()
```
"""


def export_model(model: nn.Module, folder: Path) -> None:
    """Write a whole transformers model (full fine-tuning) with `save_pretrained`."""
    model.save_pretrained(folder)  # type: ignore[operator]


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Put an exported adapter on a backbone, in place, with the sharing between layers restored.

    Args:
        model: the pretrained backbone with a head, without low-rank layers.
        folder: what `export_adapter` wrote.

    Raises:
        UserError: missing or unreadable files, or an adapter of another model.
    """
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        groups = json.loads((folder / SHARING).read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
    except Exception as error:
        raise UserError(f"{folder} is not an adapter of this project: {error}") from None
    modules = dict(model.named_modules())
    if missing := [name for name in config["target_modules"] if name not in modules]:
        raise UserError(f"{folder} does not fit this model, which has no {missing[0]} (and {len(missing) - 1} more)")
    first = {name: names[0] for names in groups for name in names}
    pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
    for name in config["target_modules"]:
        place = f"base_model.model.{name}"
        source = first.get(name, name)
        if source not in pairs:
            lora_b = tensors[f"{place}.lora_B.weight"]
            pairs[source] = nn.Parameter(tensors[f"{place}.lora_A.weight"]), nn.Parameter(lora_b.T.contiguous())
        alpha = config["alpha_pattern"][f"^{re.escape(name)}"]
        model.set_submodule(name, LowRankLinear(modules[name], *pairs[source], alpha, config["lora_dropout"]))
    for head in config["modules_to_save"]:
        prefix = f"base_model.model.{head}."
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        model.get_submodule(head).load_state_dict(state)
