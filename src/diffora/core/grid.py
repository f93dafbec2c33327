"""The L x N grid of candidate modules ([D] section 4.1): L layers with the same N linear modules each."""

import difflib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

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
from diffora.core.targets import longer_names
from diffora.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Grid:
    """Full module names and weight shapes of the candidates, layer by layer.

    Attributes:
        types: the N module types, named by their path inside a layer (the columns).
        names: L x N full module names.
        shapes: L x N pairs (in_features, out_features).
        layers: L full names of the layers themselves.
        roles: paths of modules of a layer by their role (``attention_output``, ``ffn_output``, ``key``, ``value``).
        left_out: names of what is not in the grid: matrices of the layers that belong to no linear layer; and other
            stacks of layers, if the layers were found and not given.
        longer_names: of other modules that end with a candidate's name (`diffora.core.targets.longer_names`).
        prefix: see `find_grid`.
    """

    types: tuple[str, ...]
    names: tuple[tuple[str, ...], ...]
    shapes: tuple[tuple[tuple[int, int], ...], ...]
    layers: tuple[str, ...]
    roles: dict[str, str]
    left_out: tuple[str, ...] = ()
    longer_names: tuple[str, ...] = ()
    prefix: str = field(default="", compare=False, repr=False)

    @property
    def n_layers(self) -> int:
        return len(self.names)

    @property
    def n_types(self) -> int:
        return len(self.types)

    def having(self, role: str) -> list[str]:
        """Full names of the modules with a role, one per layer.

        Raises:
            UserError: neither the given roles nor the names of the modules say which modules have this role.
        """
        if role not in self.roles:
            setting = f"+{self.prefix}roles.{role}" if self.prefix else f"roles.{role}"  # + adds a key
            raise UserError(
                f"this method needs to know which module of a layer is its {role}: say so with {setting}=…, "
                f"where a layer has {', '.join(self.types)}"
            )
        return [f"{layer}.{self.roles[role]}" for layer in self.layers]


@dataclass(frozen=True)
class _Layer:
    """A layer of the grid: its full name, and its linear modules by path below it."""

    place: str
    linear: Mapping[str, nn.Module]


def find_grid(
    model: nn.Module,
    layer: str | None = None,
    candidates: Sequence[str] | None = None,
    roles: Mapping[str, str] | None = None,
    prefix: str = "",
) -> Grid:
    """Find the candidate modules of a backbone ([D] section 4.1).

    Arguments that are not given are found in the model. The layers are then the largest stack of numbered siblings, the
    candidates are all their linear modules, and the roles follow from the modules' names. If the candidates are found,
    a warning names what is left out.

    Args:
        model: any module that contains the repeated layers.
        layer: the name of the layers, with ``*`` for the number: ``encoder.layer.*``. Or with the numbers of some
            layers: ``encoder.layer.[0,3]``. Or ``.`` for the model itself: a grid of one row, with candidates by
            their full names, such as the classifier alone.
        candidates: the linear modules inside one layer, for example ``attention.self.query``. Give the whole path below
            the layer: ``output.dense`` does not match ``attention.output.dense``. Layers without any of the candidates
            are left out.
        roles: linear modules by their role in a layer, also as paths below it.
        prefix: written before ``layer``, ``candidates`` and ``roles`` in messages, such as ``model.`` where these are
            settings.

    Raises:
        UserError: nothing matches, a candidate is not a linear module, some layers lack a candidate, or there are
            several possibilities. The message lists similar names or the choices.
    """
    if layer == ".":
        return _one_row(model, candidates or (), prefix)
    stack = main_stack(model, candidates, prefix) if layer is None else _stack_at(model, layer, candidates, prefix)
    left_out = [*other_matrices(model, stack), *(other_stacks(model, stack) if layer is None else ())]
    if candidates is None:
        candidates = all_candidates(model, stack, prefix)
        if left_out:
            more = f" and {len(left_out) - MOST} more" if len(left_out) > MOST else ""
            log.warning(
                f"left out of the grid, as not linear layers or in another stack: {', '.join(left_out[:MOST])}{more}"
            )
    layers = [
        _Layer(place, linear)
        for place, linear in zip(stack.layers, stack.linear, strict=True)
        if any(_has(model, f"{place}.{path}") for path in candidates)
    ]
    _check(model, stack.pattern, layers, candidates, roles or {}, prefix)
    everywhere = [path for path in layers[0].linear if all(path in each.linear for each in layers)]
    return Grid(
        types=tuple(candidates),
        names=tuple(tuple(f"{each.place}.{path}" for path in candidates) for each in layers),
        shapes=tuple(tuple(features(each.linear[path]) for path in candidates) for each in layers),
        layers=tuple(each.place for each in layers),
        roles=guess_roles(everywhere) | dict(roles or {}),
        left_out=tuple(left_out),
        longer_names=tuple(longer_names(model, (f"{e.place}.{path}" for e in layers for path in candidates))),
        prefix=prefix,
    )


def _one_row(model: nn.Module, candidates: Sequence[str], prefix: str) -> Grid:
    """One row of modules by their full names."""
    modules = dict(model.named_modules())
    linear = {name for name, module in modules.items() if is_linear(module)}
    problems = [f"{name} is not a linear layer of this model" for name in candidates if name not in linear]
    if problems or not candidates:
        raise UserError([*problems, _hint(model, ".", candidates)])
    shapes = tuple(features(modules[name]) for name in candidates)
    return Grid(
        types=tuple(candidates),
        names=(tuple(candidates),),
        shapes=(shapes,),
        layers=("",),
        roles={},
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
        if match and (linear if candidates is None else any(_has(module, path) for path in candidates)):
            matches.append((name, linear, int(match[2]), match[1] is None))
    found: dict[int, tuple[str, dict[str, nn.Module]]] = {}
    # A pattern that is the whole name of a stack means that stack, and not also one with a longer name.
    for name, linear, index, _ in [match for match in matches if match[3]] or matches:
        if index in found:
            raise UserError(f"{prefix}layer={layer} matches both {found[index][0]} and {name}: give a longer path")
        found[index] = name, linear
    if not found:
        problems = [f"no linear layer matches {layer}.{path}" for path in candidates or ["…"]]
        raise UserError([*problems, _hint(model, layer, candidates or ())])
    places, inside = zip(*(found[index] for index in sorted(found)), strict=True)
    return Stack(layer, list(places), list(inside))


def _check(
    model: nn.Module,
    pattern: str,
    layers: Sequence[_Layer],
    candidates: Sequence[str],
    roles: Mapping[str, str],
    prefix: str,
) -> None:
    """Raise a UserError if the layers and candidates do not make a grid of modules that can be adapted."""
    problems = list(_missing(model, pattern, layers, candidates, prefix))
    for role, path in roles.items():
        strange = [each.place for each in layers if path not in each.linear]
        problems += [f"{prefix}roles.{role}={path}: {place}.{path} is not a linear layer" for place in strange[:1]]
    if problems:
        raise UserError([*problems, _hint(model, pattern, candidates)])
    if problems := list(_shared(layers, candidates, prefix)):
        raise UserError(problems)
    modules = dict(model.named_modules(remove_duplicate=False))
    names = (f"{each.place}.{path}" for each in layers for path in candidates)
    if adapted := [name for name in names if inside_adapter(name, modules)]:
        raise UserError(
            f"{adapted[0]} (and {len(adapted) - 1} more) belongs to an adapter that is on this model already: find the "
            "grid first, or remove the adapter with detach(model), or PEFT's unload()"
        )


def _missing(
    model: nn.Module, pattern: str, layers: Sequence[_Layer], candidates: Sequence[str], prefix: str
) -> Iterator[str]:
    """Why some layers do not have all candidates as linear modules."""
    if not candidates:
        yield f"{prefix}candidates is empty: name at least one linear module of a layer"
    for path in candidates:
        strange = [name for e in layers if path not in e.linear and _has(model, name := f"{e.place}.{path}")]
        missing = [each.place for each in layers if not _has(model, f"{each.place}.{path}")]
        if strange and is_linear(model.get_submodule(strange[0])):
            where = strange[0]
            yield f"{where} is the same module as another one in its layer: name it once, it is adapted in both places"
        elif strange:
            yield f"{strange[0]} is a {type(model.get_submodule(strange[0])).__name__}, not a linear layer"
        elif len(missing) == len(layers):
            yield f"no linear layer matches {pattern}.{path}"
        elif missing:
            yield f"{pattern}.{path} is missing in layer(s) {', '.join(p.rpartition('.')[2] for p in missing)}"


def _shared(layers: Sequence[_Layer], candidates: Sequence[str], prefix: str) -> Iterator[str]:
    """Candidates that are one module in several layers, which can have only one update."""
    for path in candidates:
        first: dict[int, str] = {}
        for each in layers:
            other = first.setdefault(id(each.linear[path]), each.place)
            if other != each.place:
                yield (
                    f"{each.place}.{path} is the same module as {other}.{path}: leave {path} out of the candidates, or "
                    f"name in {prefix}layer one of the layers that share it, as [0] in place of *"
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
    """Linear layers of the model, numbers replaced by ``*``, those most similar to what was asked for first."""
    there = sorted({re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in linear})
    wanted = [f"{layer}.{candidate}" for candidate in candidates] or [layer]

    def distance(name: str) -> float:
        return -max(difflib.SequenceMatcher(None, name, want).ratio() for want in wanted)

    return sorted(there, key=distance)[:most]
