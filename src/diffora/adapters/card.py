"""The model card of an exported adapter: its metrics, and the code that loads it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffora.adapters.origin import Origin, labels_of

LOAD_WITH_PEFT = """from peft import PeftModel

model = PeftModel.from_pretrained(base, "path/to/this/folder").eval()"""
LOAD_WITH_DIFFORA = """from diffora.api import load_adapter

load_adapter(base, "path/to/this/folder")"""

TRAIN_ON = """
## Training on

{0} modules share {1} pairs of A and B. Plain PEFT gives each module a copy of its pair. Predictions are the same, but
the copies drift apart when training goes on. To keep one pair for all of them, load the adapter like this instead,
before the optimiser is made:

```python
from diffora.adapters.pairs import retie

model = PeftModel.from_pretrained(base, "path/to/this/folder", is_trainable=True)
retie(model, "path/to/this/folder")
```

Or load the adapter with `diffora.api.load_adapter(base, "path/to/this/folder")`, which restores ranks, scales and
sharing exactly as they were trained.
"""


def card(origin: Origin, how_to_load: str, groups: Sequence[Sequence[str]] = ()) -> str:
    """The model card, in Markdown.

    Args:
        origin: where the adapter comes from.
        how_to_load: code that puts the adapter on ``base``: `LOAD_WITH_PEFT` or `LOAD_WITH_DIFFORA`.
        groups: modules that share a pair. If there are any, the card says how to continue training.
    """
    record, task = origin.record, origin.task
    scores = "\n".join(f"| {key} | {value:.4f} |" for key, value in record["metrics"].items())
    library = "peft" if how_to_load is LOAD_WITH_PEFT else "diffora"
    # Pages of the hub break on a base model that is a local folder.
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
{_code(origin, how_to_load)}
```
{task.usage}{TRAIN_ON.format(sum(map(len, groups)), len(groups)) if groups else ""}"""


def _code(origin: Origin, how_to_load: str) -> str:
    """Code that makes the base model with the right head, and then loads the adapter."""
    arguments, kind = origin.backbone.arguments, origin.task.model_class
    return base_code(kind, arguments, labels_of(arguments), origin.base_model) + how_to_load


def base_code(kind: str, arguments: Mapping[str, Any], labels: Sequence[str] | None, base_model: str) -> str:
    """Code that makes the base model with the right head.

    Args:
        kind: the transformers class.
        arguments: of ``from_pretrained``, besides the name; class names in them are left out.
        labels: names of the classes.
        base_model: hub id or folder.
    """
    lines = [f"from transformers import {kind}", ""]
    given = {key: repr(value) for key, value in arguments.items() if key not in ("id2label", "label2id")}
    if labels is not None:
        lines.append(f"names = {list(labels)!r}")
        named = {"id2label": "dict(enumerate(names))", "label2id": "{name: i for i, name in enumerate(names)}"}
        given = {key: value for key, value in given.items() if key != "num_labels"} | named
    more = "".join(f", {key}={value}" for key, value in given.items())
    return "\n".join([*lines, f'base = {kind}.from_pretrained("{base_model}"{more}, dtype="float32")', ""])
