"""What every method is: settings that check themselves, perhaps a selection, and a way to adapt a backbone.

`Method` is what the user sets and never changes; `Adaptation` is what a method does with one model while it is trained.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from torch import Tensor, nn

from diffora.adapters.export import export_weights
from diffora.adapters.origin import Origin
from diffora.core.grid import Grid
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.settings.checks import MOST, POSITIVE, RANK, RATE, Help
from diffora.settings.read import Reading, read_group

Rank = Annotated[int, RANK]
Rate = Annotated[float, RATE]
Alpha = Annotated[float, POSITIVE, Help("Low-rank updates are scaled by alpha / rank.")]

DIALS = {"rank": "rank", "rho": "rho", "dropout": "finetune.dropout"}
"""The settings of a method that stand outside the section ``method``, and their keys."""


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

    Fields named ``rank``, ``rho`` and ``dropout`` are read from the keys in `DIALS`, every other field from
    ``method.<field>``. A field is described as in `diffora.settings.checks`: by its type, a check where the type
    allows too much (as for all numbers), and a help text. A field may be a dataclass itself.
    """

    name: ClassVar[str]
    """The name in ``method=<name>``: an instance has that of the configuration, the class a usual one."""
    required: ClassVar[tuple[str, ...]] = ("adapt",)
    """Methods that every subclass must define."""

    @classmethod
    def from_config(cls, cfg: Any) -> "Method":
        """Build from a composed configuration, or from the sections of one that an adapter's file holds.

        Raises:
            UserError: every unknown, missing, wrongly typed or impossible setting.
        """
        reading = Reading.of(cfg)
        method = cls.read(reading.values, reading.found)
        if method is None or reading.found:
            raise UserError(list(reading.own_mistakes().values()))
        return method

    @classmethod
    def read(cls, values: Mapping[str, Any], found: dict[str, str]) -> "Method | None":
        """Build from a configuration in plain containers; None if that is not possible.

        Args:
            found: the message for each mistake is added here, by its key.
        """
        section = values["method"]
        given = {name: value for name, value in section.items() if name not in ("_target_", "name")}
        for name in DIALS.keys() & given.keys():
            found[f"method.{name}"] = f"method={section['name']} has no setting method.{name}"
            del given[name]
        for name, key in DIALS.items():
            group, _, last = key.rpartition(".")
            node = values.get(group) if group else values
            if isinstance(node, Mapping) and last in node:
                given[name] = node[last]
        method: Method | None = read_group(cls, given, "method.", found, f"method={section['name']}", DIALS)
        if method is None:
            return None
        object.__setattr__(method, "name", section["name"])  # several files in conf/method share a class
        if problems := list(method.problems()):
            found |= {text: text for text in problems}
            return None
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
