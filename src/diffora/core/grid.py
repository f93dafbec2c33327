"""The L x N grid of candidate modules (DiffoRA, section 4.1): L layers with the same N linear modules each."""

import difflib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from diffora.core.attach import inside_adapter
from diffora.core.linear import features, is_linear
from diffora.core.parts import guess_roles
from diffora.core.stacks import (
    MOST,
    Stack,
    all_candidates,
    linear_below,
    main_stack,
    other_matrices,
    other_stacks,
)
from diffora.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Grid:
    """Full module names and weight shapes of the candidates, layer by layer.

    Attributes:
        types: the N module types, as they are called inside a layer (the columns).
        names: L x N full module names.
        shapes: L x N pairs (in_features, out_features).
        layers: L full names of the layers themselves.
        roles: modules of a layer, by the part they play (``attention_output``, ``ffn_output``, ``key``, ``value``).
        left_out: what no grid of this model can hold or this one does not: matrices of the layers that belong to no
            linear layer, and, where the layers were found and not given, other stacks of layers.
    """

    types: tuple[str, ...]
    names: tuple[tuple[str, ...], ...]
    shapes: tuple[tuple[tuple[int, int], ...], ...]
    layers: tuple[str, ...]
    roles: dict[str, str]
    left_out: tuple[str, ...] = ()

    @property
    def n_layers(self) -> int:
        return len(self.names)

    @property
    def n_types(self) -> int:
        return len(self.types)

    def having(self, role: str) -> list[str]:
        """Full names of the modules that play a part, one a layer.

        Raises:
            UserError: neither the model's configuration nor the names of its modules say which they are.
        """
        if role not in self.roles:
            raise UserError(
                f"this method needs to know which module of a layer is its {role}: say so with "
                f"+model.roles.{role}=…, where a layer has {', '.join(self.types)}"
            )
        return [f"{layer}.{self.roles[role]}" for layer in self.layers]


def find_grid(
    model: nn.Module,
    layer: str | None = None,
    candidates: Sequence[str] | None = None,
    roles: Mapping[str, str] | None = None,
) -> Grid:
    """Find the candidate modules of a backbone.

    What is not given is found: as layers the members of the large stack of numbered siblings, as candidates every
    linear module in them, as roles those that the modules' names leave no doubt about. A warning names what is left out
    when the candidates are found.

    Args:
        model: any module that holds the repeated layers.
        layer: where a layer stands, with ``*`` for its number: ``encoder.layer.*``; or with the numbers of some, as in
            ``encoder.layer.[0,3]``. Or ``.``, the model itself: a grid of one row, of candidates by their full names,
            such as the classifier alone.
        candidates: the linear modules inside one layer, e.g. ``attention.self.query``. Each is the whole path
            below the layer, so that ``output.dense`` does not also match ``attention.output.dense``. Layers that have
            none of them are left out.
        roles: linear modules by the part they play in a layer, likewise as paths below it.

    Raises:
        UserError: nothing matches, a candidate is not a linear module, the layers do not have all candidates (a ragged
            grid), or what is meant is not clear; the message lists near misses or choices.
    """
    if layer == ".":
        return _without_layers(model, candidates or ())
    stack = main_stack(model, candidates) if layer is None else _stack_at(model, layer, candidates)
    left_out = [*other_matrices(model, stack), *(other_stacks(model, stack) if layer is None else ())]
    if candidates is None:
        candidates = all_candidates(model, stack)
        if left_out:
            more = f" and {len(left_out) - MOST} more" if len(left_out) > MOST else ""
            log.warning(
                f"left out of the grid, as not linear layers or in another stack: {', '.join(left_out[:MOST])}{more}"
            )
    rows = [
        (place, linear)
        for place, linear in zip(stack.layers, stack.linear, strict=True)
        if any(_has(model, f"{place}.{path}") for path in candidates)
    ]
    problems = list(_problems(model, stack.pattern, rows, candidates))
    for role, path in (roles or {}).items():
        strange = [place for place, linear in rows if path not in linear]
        problems += [f"model.roles.{role}={path}: {place}.{path} is not a linear layer" for place in strange[:1]]
    if problems:
        raise UserError([*problems, _hint(model, stack.pattern, candidates)])
    if problems := list(_shared(rows, candidates)):
        raise UserError(problems)
    modules = dict(model.named_modules(remove_duplicate=False))
    if adapted := [n for place, _ in rows for path in candidates if inside_adapter(n := f"{place}.{path}", modules)]:
        raise UserError(
            f"{adapted[0]} (and {len(adapted) - 1} more) belongs to an adapter that is on this model already: find the "
            "grid first, or take the adapter out with detach(model), or PEFT's unload()"
        )
    everywhere = [path for path in rows[0][1] if all(path in linear for _, linear in rows)]
    return Grid(
        types=tuple(candidates),
        names=tuple(tuple(f"{place}.{path}" for path in candidates) for place, _ in rows),
        shapes=tuple(tuple(features(linear[path]) for path in candidates) for _, linear in rows),
        layers=tuple(place for place, _ in rows),
        roles=guess_roles(everywhere) | dict(roles or {}),
        left_out=tuple(left_out),
    )


def _without_layers(model: nn.Module, candidates: Sequence[str]) -> Grid:
    """One row of modules that are named from the model itself."""
    modules = dict(model.named_modules())
    linear = {name for name, module in modules.items() if is_linear(module)}
    problems = [f"{name} is no linear layer of this model" for name in candidates if name not in linear]
    if problems or not candidates:
        raise UserError([*problems, _hint(model, ".", candidates)])
    shapes = tuple(features(modules[name]) for name in candidates)
    return Grid(types=tuple(candidates), names=(tuple(candidates),), shapes=(shapes,), layers=("",), roles={})


def _stack_at(model: nn.Module, layer: str, candidates: Sequence[str] | None) -> Stack:
    """The layers that a pattern means: of those that match it, the ones with a candidate or any linear module."""
    place = re.fullmatch(r"([^*]*?)(\*|\[\d+(?:,\d+)*\])([^*]*)", layer)
    if place is None:
        raise UserError(
            f"model.layer={layer!r} must have exactly one '*', where the layer's number stands, or the numbers of some "
            "layers in its place, as [0] or [0,3]"
        )
    number = r"\d+" if place[2] == "*" else place[2].strip("[]").replace(",", "|")
    pattern = re.compile(rf"(?:.*\.)?{re.escape(place[1])}({number}){re.escape(place[3])}")
    found: dict[int, tuple[str, dict[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        match = pattern.fullmatch(name)
        linear = linear_below(module) if match else {}
        if not match or not (linear if candidates is None else any(_has(module, path) for path in candidates)):
            continue
        index = int(match[1])
        if index in found:
            raise UserError(f"model.layer={layer} matches both {found[index][0]} and {name}: begin it further up")
        found[index] = name, linear
    if not found:
        problems = [f"no linear layer matches {layer}.{path}" for path in candidates or ["…"]]
        raise UserError([*problems, _hint(model, layer, candidates or ())])
    places, inside = zip(*(found[index] for index in sorted(found)), strict=True)
    return Stack(layer, list(places), list(inside))


def _problems(
    model: nn.Module, layer: str, rows: Sequence[tuple[str, Mapping[str, nn.Module]]], candidates: Sequence[str]
) -> Iterator[str]:
    """Why the layers have not all the candidates as linear modules."""
    if not candidates:
        yield "model.candidates is empty: name at least one linear module of a layer"
    for path in candidates:
        strange = [name for place, linear in rows if path not in linear and _has(model, name := f"{place}.{path}")]
        missing = [i for i, (place, _) in enumerate(rows) if not _has(model, f"{place}.{path}")]
        if strange and is_linear(model.get_submodule(strange[0])):
            where = strange[0]
            yield f"{where} is the same module as another one in its layer: name it once, it is adapted in both places"
        elif strange:
            yield f"{strange[0]} is a {type(model.get_submodule(strange[0])).__name__}, not a linear layer"
        elif len(missing) == len(rows):
            yield f"no linear layer matches {layer}.{path}"
        elif missing:
            names = ", ".join(rows[i][0].rpartition(".")[2] for i in missing)
            yield f"{layer}.{path} is missing in layer(s) {names}"


def _shared(rows: Sequence[tuple[str, Mapping[str, nn.Module]]], candidates: Sequence[str]) -> Iterator[str]:
    """Candidates that are one module in several layers, which can have one update only."""
    for path in candidates:
        first: dict[int, str] = {}
        for place, linear in rows:
            other = first.setdefault(id(linear[path]), place)
            if other != place:
                yield (
                    f"{place}.{path} is the same module as {other}.{path}: leave {path} out of the candidates, or name "
                    "in model.layer one of the layers that share it, as [0] in place of *"
                )
                break


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _hint(model: nn.Module, layer: str, candidates: Sequence[str]) -> str:
    near = _near_misses((name for name, module in model.named_modules() if is_linear(module)), layer, candidates)
    return f"linear layers of this model: {', '.join(near)}" if near else "this model has no linear layers"


def _near_misses(linear: Iterable[str], layer: str, candidates: Sequence[str], most: int = 8) -> list[str]:
    """Linear layers of the model with numbers folded to ``*``, the closest to what was asked for first."""
    there = sorted({re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in linear})
    wanted = [f"{layer}.{candidate}" for candidate in candidates] or [layer]

    def distance(name: str) -> float:
        return -max(difflib.SequenceMatcher(None, name, want).ratio() for want in wanted)

    return sorted(there, key=distance)[:most]
