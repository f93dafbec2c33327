"""Tables for the performance page, and the names of the contenders in them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NAMES = {
    "floor": "floor",
    "lora": "ours",
    "lora_dropout": "ours, p = 0.1",
    "compiled": "ours, compiled",
    "fused": "ours, kernel=fused",
    "plain": "ours, kernel=plain",
    "plain_dropout": "ours, kernel=plain, p = 0.1",
    "peft": "PEFT LoRA",
    "peft_dropout": "PEFT LoRA, p = 0.1",
    "compiled_peft": "PEFT LoRA, compiled",
    "adalora": "PEFT AdaLoRA",
    "full_ft": "full fine-tuning",
    "diffora": "ours, after the search",
    "simultaneous": "search, simultaneous",
    "alternating": "search, alternating",
    "two_floors": "two floors",
    "two_peft_steps": "two PEFT steps",
    "hf_trainer": "Hugging Face Trainer + PEFT",
    "hf_trainer_grouped": "the same, grouped by length",
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [" | ".join(head), "|".join(["---"] * len(head)), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


def middle(value: Mapping[str, Any] | None, digits: int = 2) -> str:
    """Median and quartiles."""
    if value is None:
        return "not measured"
    if value["rounds"] == 1:
        return f"{value['median']:.{digits}f}"
    return f"{value['median']:.{digits}f} ({value['q1']:.{digits}f}, {value['q3']:.{digits}f})"
