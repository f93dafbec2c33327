"""What every method is: settings that check themselves, perhaps a selection, and a way to adapt a backbone."""

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from diffora.core.dam import modules_per_layer
from diffora.core.grid import Grid
from diffora.core.selection import Selection
from diffora.errors import UserError


@dataclass(frozen=True)
class Method:
    """A fine-tuning method. A subclass is a frozen dataclass: its fields are its settings.

    Fields named ``rank``, ``rho`` and ``dropout`` are read from the top-level dials ``rank``, ``rho`` and from
    ``finetune.dropout``; every other field from ``method.<field>``.
    """

    name: ClassVar[str]
    lowrank: ClassVar[bool] = True
    """Whether the result is a set of low-rank updates, which an adapter file can hold."""

    @classmethod
    def from_config(cls, cfg: Any) -> "Method":
        """Build from the composed configuration.

        Raises:
            UserError: every unknown, missing, wrongly typed or impossible setting.
        """
        places = {"rank": ("rank", cfg), "rho": ("rho", cfg), "dropout": ("finetune.dropout", cfg.get("finetune", {}))}
        fields = {field.name for field in dataclasses.fields(cls)}
        problems = [
            f"method={cls.name} has no setting method.{key}"
            for key in cfg.method
            if key not in fields | {"_target_", "name"} or key in places
        ]
        problems += [
            f"method={cls.name} has no {key}"
            for name, (key, node) in places.items()
            if name in node and name not in fields
        ]
        values, hints = {}, typing.get_type_hints(cls)
        for field in fields:
            key, node = places.get(field, (f"method.{field}", cfg.method))
            if field not in node:
                problems.append(f"{key} is missing")
            elif problem := _type_problem(key, node[field], hints[field]):
                problems.append(problem)
            else:
                values[field] = node[field]
        if not problems:
            method = cls(**values)
            problems = list(method.problems())
        if problems:
            raise UserError(problems)
        return method

    def problems(self) -> Iterator[str]:
        """One message for each impossible setting."""
        if (rank := getattr(self, "rank", 1)) < 1:
            yield f"rank={rank} must be a whole number of at least 1"
        if not 0 <= (rho := getattr(self, "rho", 0.5)) <= 1:
            yield f"rho={rho} must lie in [0, 1]: it is the share of each layer's modules to select"
        if not 0 <= (dropout := getattr(self, "dropout", 0)) < 1:
            yield f"finetune.dropout={dropout} must lie in [0, 1): it is a rate"
        if (alpha := getattr(self, "alpha", 1)) <= 0:
            yield f"method.alpha={alpha} must be positive: updates are scaled by alpha / rank"
        if (shared_rank := getattr(self, "shared_rank", 1)) < 1:
            yield f"method.shared_rank={shared_rank} must be a whole number of at least 1"

    def select(self, grid: Grid, seed: int, search: Callable[[], Selection]) -> Selection | None:
        """The selection that `adapt` is to use; ``search`` runs the bi-level search. None where there is none."""
        return None

    def adapt(self, model: nn.Module, grid: Grid, selection: Selection | None) -> None:
        """Make ``model`` ready for fine-tuning, in place: add what the method adds and set ``requires_grad``.

        The backbone arrives frozen. The head is none of the method's business: the harness trains it for all alike.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Selecting(Method):
    """Common to the methods that select K modules a layer and share or freeze the rest."""

    rank: int
    rho: float
    dropout: float
    alpha: float
    weight_sharing: bool
    shared_rank: int

    def adapt(self, model: nn.Module, grid: Grid, selection: Selection | None) -> None:
        """Algorithm 1, line 11: own pairs of rank r where selected, shared ones of rank r_s elsewhere (or frozen)."""
        from diffora.core.lowrank import attach

        assert selection is not None
        attach(model, grid.names, selection.mask(), self.rank, self.rank_elsewhere, self.alpha, self.dropout)

    @property
    def rank_elsewhere(self) -> int | None:
        """r_s, or None where unselected modules stay frozen ([D] Table 5)."""
        return self.shared_rank if self.weight_sharing else None

    def k(self, grid: Grid) -> int:
        """K = floor(rho N)."""
        return modules_per_layer(self.rho, grid.n_types)


def _type_problem(key: str, value: Any, hint: Any) -> str | None:
    """Why a value does not fit a field's type, or None. Booleans are no numbers; whole numbers are floats too."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, bool):
        fits = bool in allowed
    elif isinstance(value, int):
        fits = int in allowed or float in allowed
    elif value is None:
        fits = types.NoneType in allowed
    else:
        fits = isinstance(value, tuple(a for a in allowed if isinstance(a, type)))
    if fits:
        return None
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}
    return f"{key}={value!r} must be {' or '.join(words.get(a, str(a)) for a in allowed)}"
