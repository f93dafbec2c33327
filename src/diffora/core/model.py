"""What is inside a model: its wrappers, the places of its modules, and where its values are."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn

from diffora.errors import UserError, first_of


def inside_wrappers(model: nn.Module, wrappers: tuple[type[nn.Module], ...]) -> nn.Module:
    """The module inside the wrappers of ``torch.compile`` and of the given classes, which have it as ``module``."""
    inner: Any = getattr(model, "_orig_mod", model.module if isinstance(model, wrappers) else None)
    return model if inner is None else inside_wrappers(inner, wrappers)


@contextmanager
def without_compiled_parts(model: nn.Module) -> Iterator[None]:
    """A context in which modules inside a model that are compiled alone have their own names and no ``_orig_mod``."""
    modules = model.named_modules(remove_duplicate=False)
    compiled = [(name, part) for name, part in modules if name and hasattr(part, "_orig_mod")]
    try:
        for name, part in reversed(compiled):  # what is inside another compiled part comes first
            model.set_submodule(name, part._orig_mod)
        yield
    finally:
        for name, part in compiled:
            model.set_submodule(name, part)


def check_values_present(model: nn.Module, inside: Iterable[str] = ("",)) -> None:
    """Raise a UserError if a parameter is on the device ``meta``, as accelerate leaves those that it moved away.

    Args:
        inside: full names of the modules that matter; the empty name is the model itself.
    """
    parameters = (
        (f"{place}.{n}".strip("."), p) for place in inside for n, p in model.get_submodule(place).named_parameters()
    )
    if empty := [name for name, parameter in parameters if parameter.is_meta]:
        raise UserError(
            f"{first_of(empty)} has no values on its device: load the weights of the model, and "
            "let no device_map move them to the CPU or a disk"
        )


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter; of the first buffer in a quantised layer that has no parameters."""
    return next(chain(model.parameters(), model.buffers())).device


def places_of(model: nn.Module) -> dict[int, list[str]]:
    """Every full name of each module of a model, by the module's id. A module may be used in several places."""
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
    return places
