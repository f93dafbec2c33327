"""The base classes of all methods.

`Method` holds the settings of a method, checks them and adapts a backbone; it never changes. `Adaptation` holds one
adapted model, with hooks that the training loop calls.
"""

from collections.abc import Iterable, Iterator, Mapping
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
"""The fields of a method that are not read from the section ``method``, and their keys."""


class Adaptation:
    """An adapted model, with hooks for training. The hooks of this base class do nothing.

    A method that needs more in training returns a subclass. `prepare` is called once, and `begin` when training starts
    or resumes. On a resume `load_state` is called too, before or after `begin`: neither may need the other. In each
    step follow `before_step`, `penalty`, `after_backward` and `after_step`; `pairs` at each evaluation, `state` at each
    checkpoint; `inference_parameters` and `export` at the end.

    Args:
        model: the adapted model. Parameters that require gradients are trained.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def prepare(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Called once before training, with some training batches (inputs without labels), to initialise from data."""

    def begin(self, total_steps: int) -> None:
        """Called when training starts or resumes. ``total_steps`` counts the optimiser steps of the stage."""

    def before_step(self, step: int, epoch: int) -> None:
        """Called before the first forward pass of an optimiser step. ``step`` and ``epoch`` count from 0."""

    def penalty(self) -> Tensor | None:
        """A term to add to the training loss, or None. It is not part of the evaluation loss."""
        return None

    def after_backward(self) -> None:
        """Called once a step when its gradients are complete, averaged over processes, and not yet clipped."""

    def after_step(self, step: int, lr: float) -> None:
        """Called after optimiser step ``step`` with learning rate ``lr``, before the gradients are cleared."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold besides the weights, as plain containers and tensors."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""

    def pairs(self) -> Iterator[tuple[str, Tensor, Tensor, float]]:
        """Yields (module name, A (rank, in), B^T (rank, out), s) for each low-rank update s B A; none by default.

        They are measured after each epoch: rank and orthogonality.
        """
        return iter(())

    def inference_parameters(self) -> int | None:
        """The number of parameters needed at inference, without the head. None: all that were trained."""
        return None

    def export(self, folder: Path, origin: Origin) -> None:
        """Write the trained model to the run directory ``folder``.

        The default writes the trained weights and the settings to adapt a model with.
        """
        export_weights(folder / "adapter", origin)


@dataclass(frozen=True)
class Scoring:
    """The scores that a method needs before it can choose modules.

    Attributes:
        selector: a name in `diffora.scoring.selectors.SELECTORS`, or the dotted path of a function.
        alpha: while a selector trains A and B, updates are scaled by alpha / rank.
        score_batches: how many batches a selector other than ``search`` takes.
        keep_weights: write the trained A and B to the run directory.
        scope: which modules compete, those of a ``layer`` or of the whole grid (``global``); an ensemble standardises
            scores among these.
    """

    selector: str
    alpha: float
    score_batches: int
    keep_weights: bool
    scope: str = "layer"


@dataclass(frozen=True)
class Method:
    """A fine-tuning method. A subclass is a frozen dataclass: its fields are its settings.

    Fields named ``rank``, ``rho`` and ``dropout`` are read from the keys in `DIALS`, every other field from
    ``method.<field>``. A field is declared as in `diffora.settings.checks`: a type, a help text, and a check where the
    type allows too much (as for all numbers). A field may be a dataclass itself.
    """

    name: ClassVar[str]
    """The name in ``method=<name>``. An instance has the name in the configuration, a class its usual name."""
    required: ClassVar[tuple[str, ...]] = ("adapt",)
    """Methods that every subclass must define."""
    trains_pretrained: ClassVar[bool] = False
    """Whether it trains any weight of the backbone itself; ``trainer.precision=auto`` then leaves all in float32."""
    trains_all_pretrained: ClassVar[bool] = False
    """Whether it trains all weights of the backbone, so that no frozen ones are left."""

    @classmethod
    def from_config(cls, cfg: Any) -> "Method":
        """Build from a composed configuration, or from those of its sections that an adapter's file holds.

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
        """Yields one message for each setting that does not go with another. Types and bounds are checked elsewhere."""
        return iter(())

    def check(self, model: nn.Module, grid: Grid) -> None:
        """Raise a UserError if the settings do not fit a model. Called before anything is written or trained."""

    @property
    def inputs(self) -> dict[str, str]:
        """Digests of files that the result depends on besides data and backbone, by the key of their setting."""
        return {}

    @property
    def trains_b(self) -> bool:
        """Whether the method may train a B of a low-rank update, as LoRA+ needs."""
        return True

    @property
    def scoring(self) -> Scoring | None:
        """The scores that `choose` needs; None if it needs none."""
        return None

    def choose(self, grid: Grid, scores: Tensor | None, seed: int) -> Selection | None:
        """The selection that `adapt` uses; None for a method that selects nothing.

        Args:
            scores: L x N, high is good, as `scoring` asks for them. None if the method needs no scores.
            seed: of the run.
        """
        return None

    def adapt(self, model: nn.Module, grid: Grid, selection: Selection | None, seed: int) -> Adaptation:
        """Make ``model`` ready for fine-tuning, in place: add what the method adds and set ``requires_grad``.

        The backbone is frozen already. Leave the head alone: every run trains it, in the same way for all methods. Draw
        new weights from torch's global generator; ``seed`` is for random draws during training.
        """
        raise NotImplementedError


def check_ranks(grid: Grid, ranks: Mapping[str, int], where: Tensor | None = None) -> None:
    """Refuse a rank that is larger than a module's weight can have: the smaller of its two widths.

    Args:
        ranks: each by the key of its setting.
        where: boolean L x N, the modules to check; None for all.

    Raises:
        UserError: names the key, the module and its widths.
    """
    flags = [[True] * grid.n_types] * grid.n_layers if where is None else where.tolist()
    modules = [
        (min(shape), name, shape)
        for names, shapes, row in zip(grid.names, grid.shapes, flags, strict=True)
        for name, shape, flag in zip(names, shapes, row, strict=True)
        if flag and name is not None and shape is not None
    ]
    width, name, (n_in, n_out) = min(modules, key=lambda module: module[0], default=(MOST, "", (0, 0)))
    problems = [
        f"{key}={rank} must not be above {width}, the width of {name} ({n_in} x {n_out}): more adds nothing"
        for key, rank in ranks.items()
        if rank > width
    ]
    if problems:
        raise UserError(problems)
