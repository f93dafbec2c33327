"""Finds the repeated layers of a backbone, and the linear modules that all of them have.

Messages name the arguments ``layer`` and ``candidates`` of `diffora.core.grid.find_grid`, with a prefix in front where
they are settings of a configuration.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from diffora.core.linear import features, is_linear
from diffora.errors import UserError

ENOUGH = 0.9
"""A stack with this share of the weights in all stacks is taken without asking."""
MOST = 6
"""A message lists at most this many choices."""


@dataclass(frozen=True)
class Stack:
    """Numbered siblings that contain linear modules, such as the members of an `nn.ModuleList`.

    Attributes:
        pattern: the full name of the layers, with ``*`` in place of the number.
        layers: the full names of the layers that have linear modules, in the order of their numbers.
        linear: the linear modules of each of these, by path below it.
    """

    pattern: str
    layers: list[str]
    linear: list[dict[str, nn.Module]]

    @property
    def common(self) -> list[str]:
        """Paths of the linear modules that every layer has, in the first layer's order."""
        return [path for path in self.linear[0] if all(path in paths for paths in self.linear)]

    @property
    def uniform(self) -> bool:
        """Whether the layers have the same linear modules."""
        return all(paths.keys() == self.linear[0].keys() for paths in self.linear)

    @property
    def size(self) -> int:
        """Weights in all linear modules."""
        shapes = [features(module) for paths in self.linear for module in paths.values()]
        return sum(n_in * n_out for n_in, n_out in shapes)

    def holds(self, other: "Stack") -> bool:
        """Whether another stack is inside a layer of this one."""
        return any(other.pattern.startswith(f"{layer}.") for layer in self.layers)


def linear_below(module: nn.Module) -> dict[str, nn.Module]:
    """The linear modules inside a module, by their paths below it, in order of registration."""
    return {name: part for name, part in module.named_modules() if name and is_linear(part)}


def find_stacks(model: nn.Module) -> list[Stack]:
    """Every stack of a model, an enclosing one before those inside it."""
    found: list[Stack] = []
    for parent, module in model.named_modules():
        groups: dict[str, list[tuple[int, str, nn.Module]]] = {}
        for child, part in module.named_children():
            if numbered := re.fullmatch(r"(\D*)(\d+)(\D*)", child):
                groups.setdefault(f"{numbered[1]}*{numbered[3]}", []).append((int(numbered[2]), child, part))
        for stem, members in groups.items():
            members.sort(key=lambda member: member[0])
            inside = {f"{parent}.{child}".lstrip("."): linear_below(part) for _, child, part in members}
            inside = {place: linear for place, linear in inside.items() if linear}
            # A single module with a number in its name, such as dinov2, is not a stack. A list of one layer is.
            if inside and (len(inside) > 1 or stem == "*"):
                found.append(Stack(f"{parent}.{stem}".lstrip("."), list(inside), list(inside.values())))
    return found


def main_stacks(model: nn.Module, candidates: Sequence[str] | None, prefix: str = "") -> list[Stack]:
    """The outermost stack that has nearly all the weights; of a model that generates with both, encoder and decoder.

    Args:
        model: any module.
        candidates: if given, the stack must have all of them; of several stacks, those are taken that have some.
        prefix: see the module.

    Raises:
        UserError: there is none; or several are large (text and images, encoder and decoder of a classifier), and the
            user must choose.
    """
    stacks = find_stacks(model)
    both = _generates_with_two(model)
    if candidates:
        enough = any if both else all
        stacks = [s for s in stacks if enough(any(path in paths for paths in s.linear) for path in candidates)]
    outer = [stack for stack in stacks if not any(other.holds(stack) for other in stacks)]
    if not outer:
        what = f"that have {', '.join(candidates)}" if candidates else "with linear modules"
        others = "" if candidates else _by_name(model, prefix)
        raise UserError(f"this model has no numbered layers {what}: give their place as {prefix}layer{others}")
    total = sum(stack.size for stack in outer)
    largest = max(outer, key=lambda stack: stack.size)
    if both and (large := [stack for stack in outer if stack.size > (1 - ENOUGH) * total]):
        return large
    if largest.size < ENOUGH * total:
        choices = [_layer_choice(stack, stacks, prefix) for stack in outer]
        raise UserError(_with(f"this model has {len(outer)} stacks of layers; choose the one to adapt:", choices))
    return [largest]


def _generates_with_two(model: nn.Module) -> bool:
    """Whether a model generates text with an encoder and a decoder, as transformers' models say of themselves."""
    generates: Any = getattr(model, "can_generate", None)
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False) and generates and generates())


def other_stacks(model: nn.Module, taken: Sequence[Stack]) -> list[str]:
    """Patterns of the outermost stacks other than the adapted ones, such as a small second encoder."""
    patterns = {stack.pattern for stack in taken}
    stacks = [other for other in find_stacks(model) if other.pattern not in patterns]
    outer = [other for other in stacks if not any(another.holds(other) for another in (*taken, *stacks))]
    return [other.pattern for other in outer]


def short_patterns(stacks: Sequence[Stack]) -> list[str]:
    """The shortest end of each stack's pattern that no other stack has: ``encoder.block.*``."""
    return [_unique_end(stack, stacks) for stack in stacks]


def other_matrices(model: nn.Module, stack: Stack) -> list[str]:
    """Names of matrices in the layers that belong to no linear module, so that they cannot be candidates.

    An example is `nn.MultiheadAttention`, which passes its weights to a function. Embeddings and convolutions
    are not listed. The layer's number is replaced by ``*``.
    """
    found: dict[str, None] = {}
    for place in stack.layers:
        layer = model.get_submodule(place)
        for name, parameter in layer.named_parameters():
            owner = layer.get_submodule(_above(name))
            if parameter.squeeze().ndim > 1 and not (
                is_linear(owner) or isinstance(owner, nn.Embedding) or _is_conv(layer, name)
            ):
                found[f"{stack.pattern}.{name}"] = None
    return list(found)


def all_candidates(model: nn.Module, stack: Stack, prefix: str = "") -> list[str]:
    """The paths of every linear module of a layer, if the layers are alike and have no other weights to adapt.

    Raises:
        UserError: the layers differ, repeat a part inside them (experts, or blocks of a stage), or keep matrices
            outside linear modules (experts again). The message lists what to give instead.
    """
    lists, weights = _experts(model, stack)
    problems = [f"the layers of {stack.pattern} differ: {found}, not all of them do" for found in _difference(stack)]
    problems += [f"the layers of {stack.pattern} repeat {name} inside them" for name in [*lists][:1]]
    problems += [
        f"the layers of {stack.pattern} have weights outside linear modules: {name}" for name in [*weights][:1]
    ]
    if not problems:
        return stack.common
    choices = _candidate_choices(stack, lists, weights, prefix)
    inner = [other for other in find_stacks(model) if stack.holds(other) and other.uniform]
    choices += [_layer_choice(other, inner, prefix) for other in sorted(inner, key=lambda other: -other.size)]
    raise UserError([*problems, _with("choose what to adapt:", choices)])


def _difference(stack: Stack) -> list[str]:
    """The first linear module that not all layers have, in words; empty if the layers are alike."""
    if stack.uniform:
        return []
    common, layers = stack.common, zip(stack.layers, stack.linear, strict=True)
    return [f"{place} has {path}" for place, paths in layers for path in paths if path not in common][:1]


def _experts(model: nn.Module, stack: Stack) -> tuple[dict[str, int], dict[str, int]]:
    """(lists of alike modules inside the layers, weights with three dimensions), by name, each with its length.

    An expert is a member of a list inside the layer, or a row of a weight with three dimensions.
    """
    lists: dict[str, int] = {}
    weights: dict[str, int] = {}
    for layer in map(model.get_submodule, stack.layers):
        lists |= {s.pattern: len(s.layers) for s in find_stacks(layer) if len(s.layers) > 1 and s.uniform}
        weights |= {
            name: p.shape[0]
            for name, p in layer.named_parameters()
            if p.squeeze().ndim > 2 and not _is_conv(layer, name)
        }
    return lists, weights


def _candidate_choices(stack: Stack, lists: Mapping[str, int], weights: Mapping[str, int], prefix: str) -> list[str]:
    """One choice for each set of modules that occur in the same layers, the one with the most weights first.

    Modules that are repeated inside a layer are left out. So are gates with one output, which leave no room for a rank
    above 1, and routers, which choose among experts: an update there would change which experts run, not what they
    compute.
    """
    repeated = [re.compile(re.escape(name).replace(r"\*", r"\d+") + r"\..*") for name in lists]
    routers = {(_above(_above(name)), count) for name, count in (*lists.items(), *weights.items())}
    groups: dict[tuple[int, ...], dict[str, int]] = {}
    for path in dict.fromkeys(path for paths in stack.linear for path in paths):
        where = tuple(i for i, paths in enumerate(stack.linear) if path in paths)
        n_in, n_out = features(stack.linear[where[0]][path])
        if (
            n_out > 1
            and (_above(path), n_out) not in routers
            and not any(pattern.fullmatch(path) for pattern in repeated)
        ):
            groups.setdefault(where, {})[path] = n_in * n_out * len(where)
    ordered = sorted(groups.items(), key=lambda item: -sum(item[1].values()))
    return [f"'{prefix}candidates=[{','.join(paths)}]' ({len(where)} layers)" for where, paths in ordered]


def _with(words: str, choices: Sequence[str]) -> str:
    return "\n  ".join([words, *choices[:MOST]])


def _above(name: str) -> str:
    return name.rpartition(".")[0]


def _is_conv(module: nn.Module, parameter: str) -> bool:
    return isinstance(module.get_submodule(_above(parameter)), nn.modules.conv._ConvNd)


def _unique_end(stack: Stack, among: Sequence[Stack]) -> str:
    """The shortest end of a stack's name that is unique, so that it fits models with any head."""
    names = stack.pattern.split(".")
    ends = [".".join(names[start:]) for start in range(len(names) - 2, -1, -1) if not names[start].isdigit()]
    others = [f".{other.pattern}" for other in among if other is not stack]
    return next((end for end in ends if not any(other.endswith(f".{end}") for other in others)), stack.pattern)


def _layer_choice(stack: Stack, among: Sequence[Stack], prefix: str) -> str:
    """The choice of a stack, in words."""
    size = f"{len(stack.layers)} layers with {len(stack.common)} linear modules"
    return f"'{prefix}layer={_unique_end(stack, among)}' ({size})"


def _by_name(model: nn.Module, prefix: str) -> str:
    """For a message: how to give linear layers that are in no layer by their names; empty if there is none."""
    names = [name for name, module in model.named_modules() if name and is_linear(module)]
    more = ",…" if len(names) > MOST else ""
    given = f"{prefix}candidates=[{','.join(names[:MOST])}{more}]"
    return f"; or choose among its linear layers, with {prefix}layer='.' and {given}" if names else ""


def hint(model: nn.Module, layer: str, candidates: Sequence[str]) -> str:
    """For a message: the linear layers of a model whose names are most similar to those that were asked for."""
    near = _near_misses((name for name, module in model.named_modules() if is_linear(module)), layer, candidates)
    return f"linear layers of this model: {', '.join(near)}" if near else "this model has no linear layers"


def _near_misses(linear: Iterable[str], layer: str, candidates: Sequence[str]) -> list[str]:
    """At most eight linear layers, numbers replaced by ``*``; those most similar to what was asked for come first."""
    present = sorted({re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in linear})
    wanted = [f"{layer}.{candidate}" for candidate in candidates] or [layer]

    def distance(name: str) -> float:
        return -max(difflib.SequenceMatcher(None, name, want).ratio() for want in wanted)

    return sorted(present, key=distance)[:8]
