"""The model card of an adapter or a merged model on the Hugging Face hub."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffora.adapters.card import LOAD_WITH_DIFFORA, LOAD_WITH_PEFT, TRAIN_ON, base_code

FOLDER = "path/to/this/folder"
"""What stands for the adapter's place in the code of the other cards."""
SETTINGS = ("lr", "epochs", "batch_size", "dropout", "weight_decay", "warmup_steps")
"""Settings of the fine-tuning that the card shows, where the run has them."""


@dataclass(frozen=True)
class Published:
    """What the card of a published run says.

    Attributes:
        name: hub id of the new repository.
        record: of the run (``run.json``).
        base_model: hub id of the base model; None if it was a local folder.
        kind: transformers class of the model.
        manifest: of the adapter; None for a whole model.
        pictures: names of picture files beside the card.
        layers: labels of the layers of the selection (`diffora.core.picture.layer_labels`); empty if its file is gone.
    """

    name: str
    record: Mapping[str, Any]
    base_model: str | None
    kind: str
    manifest: Mapping[str, Any] | None
    pictures: Sequence[str]
    layers: Sequence[str]


def published_card(of: Published) -> str:
    """The card, in Markdown with the metadata that the hub reads."""
    record, whole = of.record, of.manifest is None
    what = "A model" if whole else "An adapter"
    parts = [
        "\n".join(_metadata(of)),
        f"# {of.name.partition('/')[2]}\n",
        f"{what} for {record['task']}, trained with the method `{record['method']}` of diffora on "
        f"{of.base_model or record['model']}: {record['params']['adapter']:,} adapter parameters and a head of "
        f"{record['params']['head']:,}, seed {record['seed']}.\n",
        _table(("metric", "value"), _metrics(record)),
        *_selection(of),
        "## How to load it\n",
        *_loading(of),
        "## How it was trained\n",
        _table(("setting", "value"), _settings(record, of.manifest or {})),
    ]
    return "\n".join(parts)


def _metadata(of: Published) -> list[str]:
    """The front matter. A base model that is no hub id would break the page, so it is left out."""
    whole = of.manifest is None
    library = "transformers" if whole else "peft" if _is_peft(of) else "diffora"
    lines = ["---", f"library_name: {library}"]
    if of.base_model is not None:
        lines += [f"base_model: {of.base_model}", f"base_model_relation: {'finetune' if whole else 'adapter'}"]
    tags = ["diffora", of.record["method"], of.record["task"], *(["lora"] if "modules" in (of.manifest or ()) else [])]
    return [*lines, "tags:", *(f"- {tag}" for tag in dict.fromkeys(tags)), "---"]


def _is_peft(of: Published) -> bool:
    return of.manifest is not None and "adapter_config.json" in of.manifest["files"]


def _selection(of: Published) -> list[str]:
    """Which modules were selected, layer by layer, and the pictures."""
    selection, parts = of.record.get("selection") or {}, []
    if rows := selection.get("selected"):
        parts = ["## Selected modules\n", f"Chosen by `{selection.get('selector')}`.\n"]
        chosen = [", ".join(row) or "none" for row in rows]
        layers = of.layers or [f"layer {number}" for number in range(1, len(rows) + 1)]
        parts.append(_table(("layer", "modules"), list(zip(layers, chosen, strict=True))))
    return parts + [f"![{name.partition('.')[0]}]({name})\n" for name in of.pictures]


def _loading(of: Published) -> list[str]:
    """Code that loads it, with each library that can."""
    if of.manifest is None:
        code = f'from transformers import {of.kind}\n\nmodel = {of.kind}.from_pretrained("{of.name}")'
        return [_python(code)]
    base = of.base_model or "path/to/the/base/model"
    start = base_code(of.kind, of.manifest.get("arguments") or {}, of.manifest.get("labels"), base)
    shared = of.manifest.get("shared") or []
    diffora = LOAD_WITH_DIFFORA.replace(FOLDER, of.name)
    if _is_peft(of):
        found = [_python(start + LOAD_WITH_PEFT.replace(FOLDER, of.name)), "Or with diffora, on the same base model:\n"]
        found.append(_python(diffora))
    else:
        found = [_python(start + diffora)]
    if shared:
        found.append(
            TRAIN_ON.format(sum(map(len, shared)), len(shared)).replace(FOLDER, of.name).replace("## ", "### ").lstrip()
        )
    return found


def _settings(record: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The settings of the training. The scale of shared pairs is the one in the file."""
    settings = record.get("settings") or {}
    method, finetune = settings.get("method") or {}, settings.get("finetune") or {}
    rows = [("rank", settings.get("rank")), ("alpha", method.get("alpha")), ("rho", settings.get("rho"))]
    if shared := manifest.get("shared"):
        first = manifest["modules"][shared[0][0]]
        rows += [("shared rank", first["rank"]), ("scale of shared pairs", f"{first['scale']:g}")]
    rows += [(key, finetune.get(key)) for key in SETTINGS]
    rows += [(f"version of {name}", version) for name, version in (record.get("versions") or {}).items()]
    return [(key, value) for key, value in rows if isinstance(value, int | float | str)]


def _metrics(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The metrics of evaluation splits."""
    left_out = ("train/", "last/", "update/")
    return [(k, _number(v)) for k, v in record["metrics"].items() if "/" in k and not k.startswith(left_out)]


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "not a number"


def _python(code: str) -> str:
    return f"```python\n{code}\n```\n"


def _table(head: tuple[str, str], rows: Sequence[tuple[Any, Any]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]
    return "\n".join(lines) + "\n"
