"""Names of selected modules in the form that other programs read: PEFT's pattern, and YAML for two trainers."""

import json
import re
from collections.abc import Iterable, Sequence

from torch import nn

from diffora.errors import UserError

PROGRAMS = ("axolotl", "llamafactory")


def longer_names(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Names of other modules that end with one of these names.

    PEFT's list of names would match them too: ``encoder.layers.0.q`` for ``layers.0.q``.
    """
    wanted = set(names)

    def ends(name: str) -> bool:
        return any(name[dot.end() :] in wanted for dot in re.finditer(r"\.", name))

    return [name for name, _ in model.named_modules() if name not in wanted and ends(name)]


def exact_pattern(names: Iterable[str]) -> str:
    """A regular expression that matches these names and no longer ones, for PEFT, which matches whole names."""
    return "|".join(map(re.escape, names))


def yaml_fragment(
    program: str, names: Sequence[str], rank: int, alpha: float, exact: bool, comment: Sequence[str]
) -> str:
    """The entries of axolotl's or LLaMA-Factory's configuration for a LoRA on some modules.

    Args:
        program: ``axolotl`` or ``llamafactory``.
        names: full names of the modules.
        exact: whether longer names must not match.
        comment: lines for the head of the fragment.

    Raises:
        UserError: the program cannot express this.
    """
    problems = []
    if program not in PROGRAMS:
        problems.append(f"there are fragments for {' and '.join(PROGRAMS)}, not for {program!r}")
    if not float(alpha).is_integer():
        problems.append(f"alpha={alpha!r} must be a whole number: {program} reads no other")
    if program == "llamafactory" and exact:
        problems.append(
            "LLaMA-Factory adapts every module whose name ends with a given name, and this model has two stacks where "
            "that is more than the selection: use axolotl, lora_config() or diffora.attach"
        )
    if program == "llamafactory" and (commas := [name for name in names if "," in name]):
        problems.append(f"LLaMA-Factory divides names at commas, and this model has a module {commas[0]!r}")
    if problems:
        raise UserError(problems)
    lines = [f"# {line}" for line in comment]
    if program == "axolotl":
        lines += ["adapter: lora", f"lora_r: {rank}", f"lora_alpha: {int(alpha)}"]
        if exact:
            lines.append(f"lora_target_modules: {json.dumps(exact_pattern(names))}")
        else:
            lines += ["lora_target_modules:", *(f"  - {json.dumps(name)}" for name in names)]
    else:
        lines += ["finetuning_type: lora", f"lora_rank: {rank}", f"lora_alpha: {int(alpha)}", "lora_target: >-"]
        lines.append(",\n".join(f"  {name}" for name in names))
    return "\n".join(lines) + "\n"
