"""The L x N grid of candidate modules (DiffoRA, section 4.1): L layers with the same N linear modules each."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from diffora.errors import UserError


@dataclass(frozen=True)
class Grid:
    """Full module names and weight shapes of the candidates, layer by layer.

    Attributes:
        types: the N module types, as they are called inside a layer (the columns).
        names: L x N full module names.
        shapes: L x N pairs (in_features, out_features).
        layers: L full names of the layers themselves.
        roles: modules of a layer, by the part they play (``attention_output``, ``ffn_output``, ``key``, ``value``).
    """

    types: tuple[str, ...]
    names: tuple[tuple[str, ...], ...]
    shapes: tuple[tuple[tuple[int, int], ...], ...]
    layers: tuple[str, ...]
    roles: dict[str, str]

    @property
    def n_layers(self) -> int:
        return len(self.names)

    @property
    def n_types(self) -> int:
        return len(self.types)

    def having(self, role: str) -> list[str]:
        """Full names of the modules that play a part, one a layer.

        Raises:
            UserError: the model's configuration does not say which they are.
        """
        if role not in self.roles:
            raise UserError(
                f"this method needs to know which module of a layer is its {role}: say so in model.roles.{role}"
            )
        return [f"{layer}.{self.roles[role]}" for layer in self.layers]


def find_grid(model: nn.Module, layer: str, candidates: Sequence[str], roles: Mapping[str, str] | None = None) -> Grid:
    """Find the candidate modules of a transformer by pattern.

    Args:
        model: any module that holds the repeated layers.
        layer: where a layer stands, with ``*`` for its number: ``encoder.layer.*``.
        candidates: the linear modules inside one layer, e.g. ``attention.self.query``. Each is the whole path
            below the layer, so that ``output.dense`` does not also match ``attention.output.dense``.
        roles: linear modules by the part they play in a layer, likewise as paths below it.

    Raises:
        UserError: nothing matches, a candidate is not a linear layer, or the layers do not have all candidates
            (a ragged grid); the message lists near misses.
    """
    if layer.count("*") != 1:
        raise UserError(f"model.layer={layer!r} must have exactly one '*', where the layer's number stands")
    prefix = rf"(?:.*\.)?{re.escape(layer)}".replace(r"\*", r"(\d+)")
    modules = dict(model.named_modules())
    linear = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}

    columns: list[dict[int, str]] = []
    problems: list[str] = []
    for candidate in candidates:
        pattern = re.compile(rf"{prefix}\.{re.escape(candidate)}")
        column: dict[int, str] = {}
        for name, module in modules.items():
            if match := pattern.fullmatch(name):
                if not isinstance(module, nn.Linear):
                    problems.append(f"{name} is a {type(module).__name__}, not a linear layer")
                    break
                index = int(match[1])
                if index in column:
                    problems.append(f"{layer}.{candidate} matches both {column[index]} and {name}")
                    break
                column[index] = name
        columns.append(column)

    layers = sorted(set().union(*columns)) if columns else []
    for candidate, column in zip(candidates, columns, strict=True):
        missing = [index for index in layers if index not in column]
        if not column:
            problems.append(f"no linear layer matches {layer}.{candidate}")
        elif missing:
            problems.append(f"{layer}.{candidate} is missing in layer(s) {', '.join(map(str, missing))}")
    if not candidates:
        problems.append("model.candidates is empty: name at least one linear module of a layer")
    names = tuple(tuple(column.get(index, "") for column in columns) for index in layers)
    places = tuple(row[0].removesuffix(f".{candidates[0]}") for row in names) if candidates else ()
    for role, path in (roles or {}).items():
        strange = [place for place in places if f"{place}.{path}" not in linear]
        problems += [f"model.roles.{role}={path}: {place}.{path} is not a linear layer" for place in strange[:1]]
    if problems:
        near = _near_misses(linear, layer, candidates)
        hint = f"linear layers of this model: {', '.join(near)}" if near else "this model has no linear layers"
        raise UserError([*problems, hint])
    return Grid(
        types=tuple(candidates),
        names=names,
        shapes=tuple(
            tuple((linear[column[index]].in_features, linear[column[index]].out_features) for column in columns)
            for index in layers
        ),
        layers=places,
        roles=dict(roles or {}),
    )


def _near_misses(linear: Iterable[str], layer: str, candidates: Sequence[str], most: int = 8) -> list[str]:
    """Linear layers of the model with numbers folded to ``*``, the closest to what was asked for first."""
    there = sorted({re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in linear})
    wanted = [f"{layer}.{candidate}" for candidate in candidates] or [layer]

    def distance(name: str) -> float:
        return -max(difflib.SequenceMatcher(None, name, want).ratio() for want in wanted)

    return sorted(there, key=distance)[:most]
