"""Why layers and candidates do not make a grid of modules that can be adapted."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from diffora.core.attach import inside_adapter
from diffora.core.linear import is_linear
from diffora.core.stacks import hint
from diffora.errors import UserError, first_of


@dataclass(frozen=True)
class Layer:
    """A layer of the grid: its full name, and its linear modules by path below it."""

    place: str
    linear: Mapping[str, nn.Module]


def check_layers(
    model: nn.Module,
    pattern: str,
    layers: Sequence[Layer],
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
        raise UserError([*problems, hint(model, pattern, candidates)])
    if problems := list(_shared(layers, candidates, prefix)):
        raise UserError(problems)
    modules = dict(model.named_modules(remove_duplicate=False))
    names = (f"{each.place}.{path}" for each in layers for path in candidates)
    if adapted := [name for name in names if inside_adapter(name, modules)]:
        raise UserError(
            f"{first_of(adapted)} belongs to an adapter that is on this model already: find the "
            "grid first, or remove the adapter with diffora.detach(model), or PEFT's unload()"
        )


def _missing(
    model: nn.Module, pattern: str, layers: Sequence[Layer], candidates: Sequence[str], prefix: str
) -> Iterator[str]:
    """Why some layers do not have all candidates as linear modules."""
    if not candidates:
        yield f"{prefix}candidates is empty: name at least one linear module of a layer"
    for path in candidates:
        strange = [name for e in layers if path not in e.linear and has_module(model, name := f"{e.place}.{path}")]
        missing = [each.place for each in layers if not has_module(model, f"{each.place}.{path}")]
        if strange and is_linear(model.get_submodule(strange[0])):
            where = strange[0]
            yield f"{where} is the same module as another one in its layer: name it once, it is adapted in both places"
        elif strange:
            yield f"{strange[0]} is a {type(model.get_submodule(strange[0])).__name__}, not a linear layer"
        elif len(missing) == len(layers):
            yield f"no linear layer matches {pattern}.{path}"
        elif missing:
            yield f"{pattern}.{path} is missing in layer(s) {', '.join(p.rpartition('.')[2] for p in missing)}"


def _shared(layers: Sequence[Layer], candidates: Sequence[str], prefix: str) -> Iterator[str]:
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


def has_module(model: nn.Module, name: str) -> bool:
    """Whether a model has a module of this full name."""
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True
