"""One optimisation step of each contender side by side: forward, backward, optimiser step, gradients cleared.

    python -m benchmarks.step [--rounds N] [--only minilm_16x64 …] [--no-memory] [--compile] [--output FILE]

The contenders of a group take turns in one process; each round starts with the next contender. Each figure is a ratio
to another contender in the same round: the median over rounds, with quartiles. Memory is measured in a new process for
each contender; see `benchmarks.common.memory_of`. Contenders:

    floor            gradients pass through the frozen backbone; only the head is trained
    lora             our LoRA, r = 4 on all modules; lora_dropout: with dropout 0.1 on the input of A
    plain            the same with kernel=plain, the formula in PyTorch operations; plain_dropout
    compiled         lora under torch.compile, as with trainer.compile=true; only with --compile
    peft             PEFT's LoRA; peft_dropout; adalora: PEFT's AdaLoRA
    full_ft          every weight is trained
    simultaneous     our bi-level step in one pass over 16 search-valid and 16 search-train rows
    alternating      the same in two passes, as in the paper: a Gamma step on the 16 valid rows, then a weight step on
                     the 16 train rows
    two_peft_steps   two PEFT steps, each on 16 of the same 32 rows; two_floors: the same for the floor
                     (in the groups of the search, floor and peft have all 32 rows in one step)

Writes benchmarks/results/step.json. With ``--only`` or ``--compile``, it writes a file only if ``--output`` names one.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import BILEVEL, CONTENDERS, FINETUNING, Shape, in_own_processes, interleave, memory_of
from benchmarks.report import RESULTS, header, ratio, spread, write


@dataclass(frozen=True)
class Group:
    """Contenders that are compared on one shape."""

    shape: Shape
    contenders: Sequence[str]
    rounds: int


GROUPS = {
    "minilm_16x64": Group(Shape("minilm", 16, 64), FINETUNING, 20),
    "minilm_32x128": Group(Shape("minilm", 32, 128), FINETUNING, 10),
    "minilm_16x64_backbone_dropout": Group(Shape("minilm", 16, 64, dropout=0.1), FINETUNING, 8),
    "minilm_16+16x64_bilevel": Group(Shape("minilm", 32, 64), BILEVEL, 12),
    "deberta_8x64": Group(Shape("deberta_v3_base", 8, 64), FINETUNING, 5),
    "deberta_16x128": Group(Shape("deberta_v3_base", 16, 128), FINETUNING, 5),
}

PAIRS = {
    "finetune/floor": ("lora", "floor"),
    "finetune/peft": ("lora", "peft"),
    "finetune_dropout/peft": ("lora_dropout", "peft_dropout"),
    "finetune_dropout/floor": ("lora_dropout", "floor"),
    "finetune/plain": ("lora", "plain"),
    "finetune_dropout/plain": ("lora_dropout", "plain_dropout"),
    "compiled/lora": ("compiled", "lora"),
    "peft/floor": ("peft", "floor"),
    "peft_dropout/floor": ("peft_dropout", "floor"),
    "adalora/floor": ("adalora", "floor"),
    "full_ft/floor": ("full_ft", "floor"),
    "bilevel/two_peft_steps": ("simultaneous", "two_peft_steps"),
    "bilevel_alternating/two_peft_steps": ("alternating", "two_peft_steps"),
    "bilevel/two_floors": ("simultaneous", "two_floors"),
    "bilevel_alternating/two_floors": ("alternating", "two_floors"),
    "bilevel/peft": ("simultaneous", "peft"),
}
"""Ratios of times by their name; each is reported as ``name@group`` for the groups that have both contenders."""

MEMORY_PAIRS = {
    "memory/peft_memory": ("lora", "peft"),
    "memory_dropout/peft_memory": ("lora_dropout", "peft_dropout"),
    "memory/plain_memory": ("lora", "plain"),
    "memory_dropout/plain_memory": ("lora_dropout", "plain_dropout"),
    "search_memory/peft_memory": ("simultaneous", "peft"),
    "search_memory_alternating/peft_memory": ("alternating", "two_peft_steps"),
    "search_memory/two_peft_steps_memory": ("simultaneous", "two_peft_steps"),
}
"""Ratios of ``step_mb``. Both contenders have the same number of rows in a pass, except in the last pair."""

HEADLINES = {
    "finetune/floor": "minilm_32x128",
    "finetune/peft": "minilm_16x64",
    "finetune_dropout/peft": "minilm_16x64",
    "bilevel/two_peft_steps": "minilm_16+16x64_bilevel",
    "bilevel_alternating/two_peft_steps": "minilm_16+16x64_bilevel",
    "bilevel/peft": "minilm_16+16x64_bilevel",
    "search_memory/peft_memory": "minilm_16+16x64_bilevel",
    "search_memory_alternating/peft_memory": "minilm_16+16x64_bilevel",
    "search_memory/two_peft_steps_memory": "minilm_16+16x64_bilevel",
}
"""The group of each ratio that is also reported without its group's name."""


def measure(group: Group, rounds: int, memory: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the entry under ``shapes``, ratios by name) for one group."""
    occupied = {}
    if memory:
        found = in_own_processes(memory_of, [(group.shape, name) for name in group.contenders])
        occupied = dict(zip(group.contenders, found, strict=True))
    backbone = group.shape.build()
    batch = group.shape.batch()
    steps = {name: partial(CONTENDERS[name](backbone, group.shape).step, batch) for name in group.contenders}
    times = interleave(steps, rounds, cuda=group.shape.device == "cuda")
    base = "two_floors" if "two_floors" in times else "floor"
    result = {
        "shape": asdict(group.shape),
        "floor": base,
        "contenders": {
            name: {"ms": spread(values, 2), "over_floor": ratio(times, name, base)} | occupied.get(name, {})
            for name, values in times.items()
        },
    }
    return result, ratios(times, occupied)


def ratios(times: Mapping[str, Sequence[float]], occupied: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """The ratios of `PAIRS` and `MEMORY_PAIRS` for which one group has both sides."""
    found = {name: ratio(times, *pair) for name, pair in PAIRS.items() if times.keys() >= set(pair)}
    for name, (top, bottom) in MEMORY_PAIRS.items():
        if occupied.keys() >= {top, bottom}:  # allocations are the same in every step
            found[name] = spread([occupied[top]["step_mb"] / occupied[bottom]["step_mb"]])
    return found


def headlines(found: Mapping[str, Any]) -> dict[str, Any]:
    """All ratios of a result. Headlines come first, without their group's name."""
    chosen = {name: found[f"{name}@{group}"] for name, group in HEADLINES.items() if f"{name}@{group}" in found}
    return chosen | dict(found)


def show(name: str, result: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    print(f"\n{name}\n  {'contender':<16}{'ms':>10}{'quartiles':>20}{'/ floor':>9}{'step MB':>10}")
    for contender, values in result["contenders"].items():
        ms, floor = values["ms"], values["over_floor"]["median"]
        memory = f"{values['step_mb']:>10.1f}" if "step_mb" in values else ""
        print(f"  {contender:<16}{ms['median']:>10.1f}{ms['q1']:>10.1f}{ms['q3']:>10.1f}{floor:>9.3f}{memory}")
    for key, value in found.items():
        print(f"  {key:<40}{value['median']:>7.3f}  ({value['q1']:.3f}, {value['q3']:.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), help="groups, in place of all")
    parser.add_argument("--rounds", type=int, help="for every group, in place of its own number")
    parser.add_argument("--threads", type=int, help="in place of torch's choice, a thread for each core")
    parser.add_argument("--compile", action="store_true", help="in the groups of fine-tuning, also a compiled LoRA")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    result: dict[str, Any] = header() | {"settings": {"rounds": {}, "warmup_rounds": 1}, "shapes": {}, "ratios": {}}
    every: dict[str, Any] = {}
    for name in given.only or GROUPS:
        group = GROUPS[name]
        if given.compile and "lora" in group.contenders:
            group = replace(group, contenders=(*group.contenders, "compiled"))
        rounds = given.rounds or group.rounds
        result["shapes"][name], found = measure(group, rounds, not given.no_memory)
        result["settings"]["rounds"][name] = rounds
        every |= {f"{key}@{name}": value for key, value in found.items()}
        show(name, result["shapes"][name], found)
    result["ratios"] = headlines(every)
    output = given.output or (None if given.only or given.compile else RESULTS / "step.json")
    if output is not None:
        write(output, result)


if __name__ == "__main__":
    main()
