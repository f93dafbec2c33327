"""The L x N grid of candidate modules ([D] section 4.1): L layers with N linear modules each.

Usually all layers are alike. Layers of several kinds, such as those of encoder and decoder, are blocks of one grid.
Every block has columns of its own, so its layers have no module in the columns of other blocks. [D] relaxes and selects
in each layer by itself, so its equations hold with N the number of modules of that layer.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from diffora.core.counts import above, present
from diffora.core.grid_checks import Layer, check_layers, has_module
from diffora.core.linear import features, is_linear
from diffora.core.parts import all_roles, guess_roles
from diffora.core.stacks import (
    MOST,
    Stack,
    all_candidates,
    hint,
    linear_below,
    main_stacks,
    other_matrices,
    other_stacks,
    short_patterns,
)
from diffora.core.targets import longer_names
from diffora.errors import UserError

log = logging.getLogger(__name__)


Names = Sequence[Sequence[str | None]]
"""L x N full names of modules; None where a layer has no module of that type."""


@dataclass(frozen=True)
class Grid:
    """Full module names and weight shapes of the candidates, layer by layer.

    Attributes:
        types: the N module types (the columns), named by their path inside a layer. If there are several blocks, the
            name of the block's layers is written before it, as in ``encoder.block.*.layer.0.SelfAttention.q``.
        names: L x N full module names, None where a layer has no such module.
        shapes: L x N pairs (in_features, out_features), None where a layer has no such module.
        layers: L full names of the layers themselves.
        roles: paths of modules of a layer by their role (``attention_output``, ``ffn_output``, ``key``, ``value``),
            for each block.
        left_out: names of what is not in the grid: matrices of the layers that belong to no linear layer; and other
            stacks of layers, if the layers were found and not given.
        longer_names: of other modules that end with a candidate's name (`diffora.core.targets.longer_names`).
        prefix: see `find_grid`.
        lowest_layer: no layer below this one gets an adapter, not even a shared one (``method.time_budget``).
    """

    types: tuple[str, ...]
    names: tuple[tuple[str | None, ...], ...]
    shapes: tuple[tuple[tuple[int, int] | None, ...], ...]
    layers: tuple[str, ...]
    roles: tuple[dict[str, tuple[str, ...]], ...]
    left_out: tuple[str, ...] = ()
    longer_names: tuple[str, ...] = ()
    prefix: str = field(default="", compare=False, repr=False)
    lowest_layer: int = 0

    @property
    def n_layers(self) -> int:
        return len(self.names)

    @property
    def n_types(self) -> int:
        return len(self.types)

    @property
    def present(self) -> Tensor:
        """Boolean L x N: which layer has a module of which type."""
        return present(self.names)

    @property
    def modules(self) -> list[str]:
        """Full names of all candidates, layer by layer."""
        return [name for row in self.names for name in row if name is not None]

    @property
    def n_modules(self) -> int:
        """The number of candidates: L N, if all layers are alike."""
        return len(self.modules)

    @property
    def sizes(self) -> list[int]:
        """The number of candidates of each layer: N for all, if all layers are alike."""
        return [sum(name is not None for name in row) for row in self.names]

    @property
    def allowed(self) -> "Grid":
        """This grid without the modules of the layers below ``lowest_layer``: the modules that may get adapters."""
        lowest = self.lowest_layer
        return replace(self, names=above(self.names, lowest), shapes=above(self.shapes, lowest))

    def having(self, role: str) -> list[str]:
        """Full names of the modules with a role: one of each layer, or two in a decoder that attends to an encoder.

        Raises:
            UserError: neither the given roles nor the names of the modules say which modules have this role.
        """
        found = []
        for layer, roles, row in zip(self.layers, self.roles, self.names, strict=True):
            if role not in roles:
                setting = f"+{self.prefix}roles.{role}" if self.prefix else f"roles.{role}"  # + adds a key
                types = ", ".join(t for t, name in zip(self.types, row, strict=True) if name is not None)
                raise UserError(
                    f"this method needs to know which module of a layer is its {role}: say so with {setting}=…, "
                    f"where a layer has {types}"
                )
            found += [f"{layer}.{path}" for path in roles[role]]
        return found


def laid_out(values: Tensor, names: Names) -> Tensor:
    """One value for each module as an L x N matrix, NaN where there is no module.

    Args:
        values: one for each module, layer by layer.
        names: of the modules.
    """
    where = present(names).to(values.device)
    if where.all():
        return values.view(where.shape)
    return torch.full(where.shape, float("nan"), dtype=values.dtype, device=values.device).masked_scatter(where, values)


def blanked(rows: Sequence[Sequence[float | None]], names: Names) -> list[list[float | None]]:
    """L x N numbers, with None in place of those where a layer has no such module."""
    return [
        [None if name is None else value for value, name in zip(values, row, strict=True)]
        for values, row in zip(rows, names, strict=True)
    ]


def find_grid(
    model: nn.Module,
    layer: str | Sequence[str] | None = None,
    candidates: Sequence[str] | None = None,
    roles: Mapping[str, str] | None = None,
    prefix: str = "",
) -> Grid:
    """Find the candidate modules of a backbone ([D] section 4.1).

    Arguments that are not given are found in the model. The layers are then the stack of numbered siblings that has at
    least 90 % of the weights of all stacks, or encoder and decoder of a model that generates text with both; otherwise
    an error lists the choices. The candidates are all their linear modules, and the roles follow from the modules'
    names. If the candidates are found, a warning names what is left out.

    Args:
        model: any module that contains the repeated layers.
        layer: the name of the layers, with ``*`` for the number: ``encoder.layer.*``. Or with the numbers of some
            layers: ``encoder.layer.[0,3]``. Or a list of these, one for each block of layers that are alike:
            ``[encoder.block.*, decoder.block.*]``. Or ``.`` for the model itself: a grid of one row, with candidates
            by their full names, such as the classifier alone.
        candidates: the linear modules inside one layer, for example ``attention.self.query``. Give the whole path below
            the layer: ``output.dense`` does not match ``attention.output.dense``. Layers without any of the candidates
            are left out. A block takes those that it has.
        roles: linear modules by their role in a layer, also as paths below it.
        prefix: written before ``layer``, ``candidates`` and ``roles`` in messages, such as ``model.`` where these are
            settings.

    Raises:
        UserError: nothing matches, a candidate is not a linear module, some layers lack a candidate, or there are
            several possibilities. The message lists similar names or the choices.
    """
    if twice := [path for i, path in enumerate(candidates or ()) if path in (candidates or ())[:i]]:
        raise UserError(f"{prefix}candidates names {twice[0]} twice")
    patterns = [layer] if isinstance(layer, str) else layer
    if patterns == ["."]:
        return _one_row(model, candidates or (), prefix)
    if patterns is None:
        stacks = main_stacks(model, candidates, prefix)
    else:
        _check_patterns(patterns, prefix)
        stacks = [_stack_at(model, pattern, candidates, prefix) for pattern in patterns]
    blocks = [_block(model, stack, candidates, roles or {}, prefix, len(stacks) > 1) for stack in stacks]
    _check_blocks(blocks, candidates, roles or {}, prefix)
    left_out = [name for stack in stacks for name in other_matrices(model, stack)]
    left_out += other_stacks(model, stacks) if patterns is None else []
    if candidates is None and left_out:
        more = f" and {len(left_out) - MOST} more" if len(left_out) > MOST else ""
        log.warning(
            f"left out of the grid, as not linear layers or in another stack: {', '.join(left_out[:MOST])}{more}"
        )
    return _joined(model, blocks, short_patterns(stacks), tuple(left_out), prefix)


@dataclass(frozen=True)
class _Block:
    """Layers that are alike, with their candidates by path below a layer, and their roles."""

    layers: list[Layer]
    candidates: tuple[str, ...]
    roles: dict[str, tuple[str, ...]]


def _block(
    model: nn.Module,
    stack: Stack,
    candidates: Sequence[str] | None,
    roles: Mapping[str, str],
    prefix: str,
    one_of_several: bool,
) -> _Block:
    """The block of a stack, after its checks.

    Args:
        one_of_several: whether there are other blocks. Then this one may lack some of the candidates and roles.
    """
    if candidates is None:
        candidates = all_candidates(model, stack, prefix)
    elif one_of_several:
        candidates = [
            path for path in candidates if any(has_module(model, f"{place}.{path}") for place in stack.layers)
        ]
    if one_of_several:
        roles = {role: path for role, path in roles.items() if any(path in linear for linear in stack.linear)}
    layers = [
        Layer(place, linear)
        for place, linear in zip(stack.layers, stack.linear, strict=True)
        if any(has_module(model, f"{place}.{path}") for path in candidates)
    ]
    check_layers(model, stack.pattern, layers, candidates, roles, prefix)
    everywhere = [path for path in layers[0].linear if all(path in each.linear for each in layers)]
    given = {role: (path,) for role, path in (guess_roles(everywhere) | dict(roles)).items()}
    return _Block(layers, tuple(candidates), (all_roles(everywhere) if one_of_several else {}) | given)


def _joined(
    model: nn.Module, blocks: Sequence[_Block], patterns: Sequence[str], left_out: tuple[str, ...], prefix: str
) -> Grid:
    """One grid of some blocks, each with columns of its own. Layers of one stack keep its order."""
    before = 0
    types: list[str] = []
    rows: list[_Row] = []
    n_types = sum(len(block.candidates) for block in blocks)
    for block, pattern in zip(blocks, patterns, strict=True):
        types += block.candidates if len(blocks) == 1 else [f"{pattern}.{path}" for path in block.candidates]
        left, right = (None,) * before, (None,) * (n_types - before - len(block.candidates))
        for each in block.layers:
            names = (*left, *(f"{each.place}.{path}" for path in block.candidates), *right)
            shapes = (*left, *(features(each.linear[path]) for path in block.candidates), *right)
            rows.append(_Row(each.place, names, shapes, block.roles))
        before += len(block.candidates)
    stacks = list(dict.fromkeys(row.stack for row in rows))
    rows.sort(key=lambda row: (stacks.index(row.stack), row.numbers))
    return Grid(
        types=tuple(types),
        names=tuple(row.names for row in rows),
        shapes=tuple(row.shapes for row in rows),
        layers=tuple(row.place for row in rows),
        roles=tuple(row.roles for row in rows),
        left_out=left_out,
        longer_names=tuple(longer_names(model, [name for row in rows for name in row.names if name is not None])),
        prefix=prefix,
    )


@dataclass(frozen=True)
class _Row:
    """One row of a grid, with the place of its layer."""

    place: str
    names: tuple[str | None, ...]
    shapes: tuple[tuple[int, int] | None, ...]
    roles: dict[str, tuple[str, ...]]

    @property
    def numbers(self) -> list[int]:
        """The numbers in the place, outermost first."""
        return [int(part) for part in self.place.split(".") if part.isdigit()]

    @property
    def stack(self) -> str:
        """The place without its numbers."""
        return re.sub(r"(?<![^.])\d+(?![^.])", "*", self.place)


def _check_patterns(patterns: Sequence[str], prefix: str) -> None:
    """Refuse lists of layers that are not one pattern for each block."""
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise UserError(f"{prefix}layer={list(patterns)} must be one name of layers, or a list with one for each block")
    if "." in patterns:
        raise UserError(f"{prefix}layer={list(patterns)}: '.', the model itself, cannot be one of several blocks")
    if twice := [pattern for i, pattern in enumerate(patterns) if pattern in patterns[:i]]:
        raise UserError(f"{prefix}layer={list(patterns)} names {twice[0]} twice")


def _check_blocks(
    blocks: Sequence[_Block], candidates: Sequence[str] | None, roles: Mapping[str, str], prefix: str
) -> None:
    """Refuse blocks that share a layer, and candidates or roles that no block has."""
    if len(blocks) == 1:
        return
    problems, seen = [], set()
    for each in (layer for block in blocks for layer in block.layers):
        if each.place in seen:
            problems.append(f"{prefix}layer: {each.place} is in two of the blocks")
        seen.add(each.place)
    known = {path for block in blocks for path in block.candidates}
    problems += [f"no linear layer of any block is called {path}" for path in candidates or () if path not in known]
    linear = {path for block in blocks for each in block.layers for path in each.linear}
    problems += [f"{prefix}roles.{role}={path}: no block has it" for role, path in roles.items() if path not in linear]
    if problems:
        raise UserError(problems)


def _one_row(model: nn.Module, candidates: Sequence[str], prefix: str) -> Grid:
    """One row of modules by their full names."""
    modules = dict(model.named_modules())
    linear = {name for name, module in modules.items() if is_linear(module)}
    problems = [f"{name} is not a linear layer of this model" for name in candidates if name not in linear]
    if not candidates:
        problems = [f"{prefix}layer='.' needs {prefix}candidates: the full names of the linear layers to choose among"]
    if problems:
        raise UserError([*problems, hint(model, ".", candidates)])
    shapes = tuple(features(modules[name]) for name in candidates)
    return Grid(
        types=tuple(candidates),
        names=(tuple(candidates),),
        shapes=(shapes,),
        layers=("",),
        roles=({},),
        longer_names=tuple(longer_names(model, candidates)),
        prefix=prefix,
    )


def _stack_at(model: nn.Module, layer: str, candidates: Sequence[str] | None, prefix: str) -> Stack:
    """The layers that match a pattern and have one of the candidates, or any linear module if none are given."""
    place = re.fullmatch(r"([^*]*?)(\*|\[\d+(?:,\d+)*\])([^*]*)", layer)
    if place is None:
        raise UserError(
            f"{prefix}layer={layer!r} must have exactly one '*' in place of the layer's number, or the numbers of some "
            "layers, as [0] or [0,3]"
        )
    number = r"\d+" if place[2] == "*" else place[2].strip("[]").replace(",", "|")
    pattern = re.compile(rf"(.*\.)?{re.escape(place[1])}({number}){re.escape(place[3])}")
    matches = []
    for name, module in model.named_modules():
        match = pattern.fullmatch(name)
        linear = linear_below(module) if match else {}
        if match and (linear if candidates is None else any(has_module(module, path) for path in candidates)):
            matches.append((name, linear, int(match[2]), match[1] is None))
    found: dict[int, tuple[str, dict[str, nn.Module]]] = {}
    # A pattern that is the whole name of a stack means that stack, and not also one with a longer name.
    for name, linear, index, _ in [match for match in matches if match[3]] or matches:
        if index in found:
            raise UserError(f"{prefix}layer={layer} matches both {found[index][0]} and {name}: give a longer path")
        found[index] = name, linear
    if not found:
        problems = [f"no linear layer matches {layer}.{path}" for path in candidates or ["…"]]
        if alone := [name for name, module in model.named_modules() if pattern.fullmatch(name) and is_linear(module)]:
            problems.append(
                f"{alone[0]} is a linear layer itself: use {prefix}layer='.', and {prefix}candidates with full names "
                f"({', '.join(alone[:MOST])})"
            )
        raise UserError([*problems, hint(model, layer, candidates or ())])
    places, inside = zip(*(found[index] for index in sorted(found)), strict=True)
    return Stack(layer, list(places), list(inside))
