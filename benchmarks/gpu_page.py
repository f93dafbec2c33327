"""The section "On a GPU" of the performance page, from benchmarks/results/gpu.json."""

from collections.abc import Mapping
from typing import Any

from benchmarks.markdown import NAMES, middle, table

GOALS = {
    "peft/lora": ("speed over PEFT's", 1.5),
    "peft/compiled": ("speed over PEFT's, ours compiled", 1.5),
    "compiled_peft/compiled": ("speed over PEFT's, both compiled", None),
    "peft_dropout/lora_dropout": ("speed over PEFT's, dropout 0.1 on the input of A", None),
    "lora/floor": ("step over the floor", 1.06),
    "simultaneous/two_floors": ("bi-level step over two floors, simultaneous", 1.06),
    "alternating/two_floors": ("bi-level step over two floors, alternating", 1.06),
    "compiled/floor": ("compiled step over the floor", 1.06),
}
"""Ratios that are shown, with their goals: speeds at least, steps over the floor at most."""
TITLES = {
    "steps_deberta": "DeBERTaV3-base, 32 x 128",
    "steps_llama": "Llama 3.2 1B's shape, 4 x 512",
    "steps_minilm": "MiniLM, 32 x 128",
    "search_minilm": "MiniLM, 32 x 128, search",
    "compiled_deberta": "DeBERTaV3-base, 32 x 128, compiled",
    "compiled_llama": "Llama 3.2 1B's shape, 4 x 512, compiled",
    "compiled_minilm": "MiniLM, 32 x 128, compiled",
    "run_deberta": "DeBERTaV3-base",
    "run_llama": "Llama 3.2 1B's shape",
    "run_minilm": "MiniLM",
    "compiled_run_deberta": "DeBERTaV3-base, compiled",
    "compiled_run_llama": "Llama 3.2 1B's shape, compiled",
    "compiled_run_minilm": "MiniLM, compiled",
    "unsloth_llama": "Llama 3.2 1B's shape with Unsloth",
}


def section(result: Mapping[str, Any]) -> str:
    """All that was measured, and what was left out."""
    parts: Mapping[str, Any] = result["parts"]
    stepped = {name: part for name, part in parts.items() if "contenders" in part}
    blocks = ["**Not a GPU's figures.** This ran on a CPU."] if result["not_a_gpu"] else []
    blocks += [_facts(result), *result.get("notes", []), _checks(result["checks"])]
    if stepped:
        blocks += ["**Beside PEFT and the floor**", _goals(stepped)]
    blocks += [f"**{TITLES[name]}**\n\n{_steps(part)}" for name, part in stepped.items()]
    if runs := {name: part for name, part in parts.items() if "runs" in part}:
        blocks += ["**Whole runs**, command to metric", _runs(runs)]
    if unsloth := parts.get("unsloth_llama"):
        blocks.append(_unsloth(unsloth))
    if result["left_out"]:
        lines = "\n".join(f"- {TITLES[name]}: {why}" for name, why in result["left_out"].items())
        blocks.append(f"Left out:\n\n{lines}")
    return "\n\n".join(blocks)


def _facts(result: Mapping[str, Any]) -> str:
    before, after = result["gpu_before"] or {}, result.get("gpu_after") or {}
    clocks = [side.get("clocks.sm", "unknown") for side in (before, after)]
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items())
    return (
        f"{before.get('name', result['machine']['gpu'])}, driver {before.get('driver_version', 'unknown')}, "
        f"{before.get('memory.total', '')}, power limit {before.get('power.limit', 'unknown')}; clock of the idle GPU "
        f"before and after {clocks[0]}, {clocks[1]}, at most {before.get('clocks.max.sm', 'unknown')}; {versions}; "
        f"{result['date']}; bfloat16 autocast; {result.get('minutes', '?')} minutes."
    )


def _checks(checks: list[Mapping[str, Any]]) -> str:
    measured = [check for check in checks if check["error"] is not None]
    missing = "".join(f" Not checked: {check['what']} ({check['note']})." for check in checks if check["error"] is None)
    if not measured:
        return f"No comparison of losses and gradients was possible.{missing}"
    closest = max(measured, key=lambda check: check["error"] / check["most"])
    return (
        f"Correct before it was timed: {len(measured)} comparisons of losses and gradients. The closest to its limit: "
        f"{closest['what']}: {closest['error']:.2g}, at most {closest['most']:.2g}.{missing}"
    )


def _goals(parts: Mapping[str, Any]) -> str:
    rows = []
    for name, part in parts.items():
        for key, (what, goal) in GOALS.items():
            if (found := part["ratios"].get(key)) is None:
                continue
            is_speed = not key.endswith(("/floor", "/two_floors"))
            reached = goal is None or (found["median"] >= goal if is_speed else found["median"] <= goal)
            wanted = "" if goal is None else f"{'at least' if is_speed else 'at most'} {goal:.2f}"
            met = "" if goal is None else "yes" if reached else "**no**"
            rows.append([TITLES[name], what, wanted, middle(found, 3), met])
    return table(["shape", "ratio", "goal", "median (quartiles)", "met"], rows)


def _steps(part: Mapping[str, Any]) -> str:
    ratios = part["ratios"]
    rows = [
        [
            NAMES[name],
            middle(found["ms"]),
            f"{found['tokens_s']:,}",
            "1" if name == "floor" else middle(ratios.get(f"{name}/floor")),
            f"{found['step_mb']:.0f}",
        ]
        for name, found in part["contenders"].items()
    ]
    return table(
        ["contender", "ms: median (quartiles)", "tokens/s", "over the floor, in the same round", "step MB"], rows
    )


def _runs(parts: Mapping[str, Any]) -> str:
    rows = []
    for name, part in parts.items():
        for side, runs in part["runs"].items():
            label = "`train.py method=lora`" if side == "lora" else NAMES["hf_trainer"]
            wall, training = ([f"{run[key]:.1f}" for run in runs] for key in ("wall_s", "training_s"))
            memory = [run["peak_cuda_mb"] for run in runs if run["peak_cuda_mb"] is not None]
            peak = f"{max(memory):.0f}" if memory else ""
            pairs = zip(part["runs"]["hf_trainer"], part["runs"]["lora"], strict=True)
            ratios = [f"{theirs['training_s'] / mine['training_s']:.2f}" for theirs, mine in pairs]
            speed = "1" if side == "hf_trainer" else ", ".join(ratios)
            rows.append([TITLES[name], label, ", ".join(wall), ", ".join(training), peak, speed])
    head = ["shape", "", "seconds", "of these, training and evaluation", "peak MB of the GPU", "speed of that part"]
    return table(head, rows)


def _unsloth(part: Mapping[str, Any]) -> str:
    rows = [
        [label, f"{part[side]['ms']:.2f}", f"{part[side]['tokens_s']:,}"]
        for side, label in (("unsloth", "Unsloth"), ("lora", "ours"))
    ]
    return (
        f"**{TITLES['unsloth_llama']}**, each side in its own process, so without pairs; Unsloth's time over ours: "
        f"{part['unsloth/lora']:.2f}\n\n{table(['', 'ms: median', 'tokens/s'], rows)}"
    )
