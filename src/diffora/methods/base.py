"""What every method is: settings that check themselves, perhaps a selection, and a way to adapt a backbone.

`Method` is what the user sets and never changes; `Adaptation` is what a method does with one model while it is trained.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from diffora.adapters.export import export_weights
from diffora.adapters.origin import Origin
from diffora.core.grid import Grid
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.settings.config import (
    FLAG,
    GROUP,
    MOST,
    NULL,
    NUMBER,
    POSITIVE,
    RANK,
    RATE,
    TEXT,
    TEXTS,
    Check,
    one_of,
    show,
    whole,
)

Rank = Annotated[int, RANK]
Rate = Annotated[float, RATE]
Alpha = Annotated[float, POSITIVE]  # updates are scaled by alpha / rank


class Adaptation:
    """An adapted model in the hands of the method that adapted it. This one leaves training as it is.

    A method whose steps are special subclasses it; the training loop calls the hooks in the order they stand here.

    Args:
        model: the adapted model; what is to be trained requires gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def prepare(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Once, before training: look at training batches (inputs without labels) if the method starts from data."""

    def begin(self, total_steps: int) -> None:
        """Training is about to begin, or to go on, and will take so many optimiser steps in all."""

    def before_step(self, step: int, epoch: int) -> None:
        """Before the first forward pass of an optimiser step; both count from 0."""

    def penalty(self) -> Tensor | None:
        """What to add to the training loss; the evaluation loss never sees it."""
        return None

    def after_backward(self) -> None:
        """The gradients of a backward pass are there, not yet clipped."""

    def after_step(self, step: int, lr: float) -> None:
        """The optimiser took step ``step`` with rate ``lr``; its gradients are still there."""

    def state(self) -> dict[str, Any]:
        """What must be kept in a checkpoint besides weights, as plain containers and tensors."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Undo `state`."""

    def pairs(self) -> Iterator[tuple[str, Tensor, Tensor, float]]:
        """(module, A (rank, in), B^T (rank, out), s) for each low-rank update s B A, for measures; none by default."""
        return iter(())

    def inference_parameters(self) -> int | None:
        """Parameters besides the head that are needed at inference, where these are not all that were trained."""
        return None

    def export(self, folder: Path, origin: Origin) -> None:
        """Write the trained model to the run directory ``folder``; the default writes what was trained, and how."""
        export_weights(folder / "adapter", origin)


@dataclass(frozen=True)
class Method:
    """A fine-tuning method. A subclass is a frozen dataclass: its fields are its settings.

    Fields named ``rank``, ``rho`` and ``dropout`` are read from the top-level dials ``rank``, ``rho`` and from
    ``finetune.dropout``; every other field from ``method.<field>``. A field may be a dataclass itself. Its type says
    what it may be; where that is less than the type allows, as for all numbers, ``Annotated[type, check]`` does, with
    one of the checks of `diffora.settings.config`.
    """

    name: ClassVar[str]
    required: ClassVar[tuple[str, ...]] = ("adapt",)
    """Methods that every subclass must define."""

    @classmethod
    def from_config(cls, cfg: Any) -> "Method":
        """Build from the composed configuration.

        Raises:
            UserError: every unknown, missing, wrongly typed or impossible setting.
        """
        dials = {"rank": ("rank", cfg), "rho": ("rho", cfg), "dropout": ("finetune.dropout", cfg.get("finetune", {}))}
        given: dict[str, tuple[str, Any]] = {
            name: (key, node[name]) for name, (key, node) in dials.items() if name in node
        }
        problems: list[str] = []
        who = f"method={cfg.method.name}"
        for name, value in cfg.method.items():
            if name in dials:
                problems.append(f"{who} has no setting method.{name}")
            elif name not in ("_target_", "name"):
                given[str(name)] = f"method.{name}", value
        missing = {name: key for name, (key, _) in dials.items()}
        values = _read(cls, given, "method.", who, problems, missing)
        if problems:
            raise UserError(problems)
        method = cls(**values)
        if problems := list(method.problems()):
            raise UserError(problems)
        return method

    def problems(self) -> Iterator[str]:
        """One message for each setting that does not go with another; types and bounds are those of the fields."""
        return iter(())

    def check(self, model: nn.Module, grid: Grid) -> None:
        """Raise a UserError for what does not fit a model, before anything is written or trained."""

    def select(self, grid: Grid, seed: int, find: Callable[[str], Selection]) -> Selection | None:
        """The selection that `adapt` is to use, None where there is none.

        ``find("search")`` runs the bi-level search, ``find("attribution")`` trains all candidates and divides what they
        have done among them; ``find("gradient")`` and ``find("activation")`` score the candidates on training data
        (`diffora.search.criteria`).
        """
        return None

    def adapt(self, model: nn.Module, grid: Grid, selection: Selection | None, seed: int) -> Adaptation:
        """Make ``model`` ready for fine-tuning, in place: add what the method adds and set ``requires_grad``.

        The backbone arrives frozen. The head is none of the method's business: the harness trains it for all alike.
        New weights are drawn from torch's global generator; ``seed`` is for what is drawn later.
        """
        raise NotImplementedError


def check_ranks(grid: Grid, ranks: Mapping[str, int], where: Tensor | None = None) -> None:
    """Refuse ranks above what a module's weight can have, the smaller of its two widths.

    Args:
        ranks: by the key they are set with.
        where: boolean L x N, the modules that they are for; None for all.

    Raises:
        UserError: names the key, the module and its widths.
    """
    flags = [[True] * grid.n_types] * grid.n_layers if where is None else where.tolist()
    modules = [
        (min(shape), name, shape)
        for names, shapes, row in zip(grid.names, grid.shapes, flags, strict=True)
        for name, shape, flag in zip(names, shapes, row, strict=True)
        if flag
    ]
    width, name, (n_in, n_out) = min(modules, key=lambda module: module[0], default=(MOST, "", (0, 0)))
    problems = [
        f"{key}={rank} must not be above {width}, the width of {name} ({n_in} x {n_out}): more adds nothing"
        for key, rank in ranks.items()
        if rank > width
    ]
    if problems:
        raise UserError(problems)


def _read(
    kind: Any,
    given: Mapping[str, tuple[str, Any]],
    prefix: str,
    who: str,
    problems: list[str],
    elsewhere: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Values for a dataclass's fields from ``name: (key, value)``; what does not fit is added to ``problems``.

    Args:
        elsewhere: keys of fields that do not stand below ``prefix``.
    """
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    problems += [
        f"{who} has no {'setting ' if key.startswith('method.') else ''}{key}"
        for name, (key, _) in given.items()
        if name not in fields
    ]
    values: dict[str, Any] = {}
    for name, field in fields.items():
        key, value = given.get(name, ((elsewhere or {}).get(name, f"{prefix}{name}"), dataclasses.MISSING))
        if value is dataclasses.MISSING:
            if field.default is dataclasses.MISSING:
                problems.append(f"{key} is missing")
        elif dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping | DictConfig):
                names = ", ".join(inner.name for inner in dataclasses.fields(hints[name]))
                problems.append(f"{key}={show(value)} must be a group of settings: {names}")
                continue
            before = len(problems)
            inner = _read(hints[name], {str(k): (f"{key}.{k}", v) for k, v in value.items()}, f"{key}.", who, problems)
            if len(problems) == before:
                values[name] = hints[name](**inner)
        else:
            values[name] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            checks = list(_checks(hints[name]))
            if not any(check.fits(values[name]) for check in checks):
                problems.append(f"{key}={show(values[name])} must be {' or '.join(check.words for check in checks)}")
    return values


PLAIN = {int: whole(-MOST), float: NUMBER, bool: FLAG, str: TEXT, dict: GROUP, list: TEXTS, types.NoneType: NULL}


def _checks(hint: Any) -> Iterator[Check]:
    """What a field may be, one check for each member of a union. A boolean is no number; a whole number is a float."""
    if typing.get_origin(hint) is Annotated:
        yield hint.__metadata__[0]
    elif typing.get_origin(hint) in (types.UnionType, typing.Union):
        for member in typing.get_args(hint):
            yield from _checks(member)
    elif typing.get_origin(hint) is Literal:
        for choice in typing.get_args(hint):
            yield one_of(choice)._replace(words=repr(choice))
    else:
        yield PLAIN[typing.get_origin(hint) or hint]
