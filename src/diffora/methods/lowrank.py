"""Shared by all methods that use `LowRankLinear` layers: R-LoRA's regulariser, GM-LoRA's masks, and the export."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from diffora.adapters.export import export_adapter, pairs_in
from diffora.adapters.fetch import adapter_digest, place_problem
from diffora.adapters.origin import Origin
from diffora.adapters.start import Start
from diffora.core.attach import attach
from diffora.core.grid import Grid
from diffora.core.lowrank import LowRankLinear, lowrank_layers
from diffora.core.masking import draw_rows
from diffora.core.orthogonality import orthogonality
from diffora.loop import streams
from diffora.methods.base import Adaptation, Alpha, Method, Rank, Rate, check_ranks
from diffora.settings.checks import NOT_NEGATIVE, PATH, RANK, Help, whole

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Regulariser:
    """R-LoRA ([R] section 4.2): ``weight`` times the distance of every A and B from orthonormality."""

    weight: Annotated[float, NOT_NEGATIVE, Help("Weight λ of the penalty; 0: no penalty.")]
    form: Annotated[
        Literal["squared", "mean_norm"], Help("Form of the penalty: [R] eq. 10 (`squared`), or the released code's.")
    ]


UNMASKED = {"every": "step", "independent": False, "target": "gradient", "start": 0, "head": False}
"""The other settings of `Mask` where nothing is masked: there they have no effect."""


@dataclass(frozen=True)
class Mask:
    """GM-LoRA ([R] section 4.3, [R] Algorithm 1): only some directions of each adapter are trained in a step."""

    rank: Annotated[
        Annotated[int, RANK] | Literal["half"] | None,
        Help("Directions to train in a step: a number, half of the rank, or null for all.", "directions"),
    ]
    every: Annotated[
        Literal["step", "epoch"],
        Help("Draw the directions for each step ([R] Algorithm 1) or each epoch ([R] introduction)."),
    ]
    independent: Annotated[
        bool, Help("Draw the directions of B independently of A's, as the second version of the released code does.")
    ]
    target: Annotated[
        Literal["gradient", "update"],
        Help(
            "What to mask. gradient: masked entries get no gradient, but momentum still moves them (the paper). "
            "update: they do not move."
        ),
    ]
    start: Annotated[int, whole(0), Help("The first masked step; the released code starts with 1.", "steps")]
    head: Annotated[
        bool, Help("Give the head no gradient in masked steps, as the released code does; momentum still moves it.")
    ]

    def problems(self, rank: int | None) -> Iterator[str]:
        """Yields one message for each mistake. ``rank`` is the adapters' rank, None if it is not known yet."""
        if isinstance(self.rank, int) and rank is not None and self.rank > rank:
            yield f"method.mask.rank={self.rank} must not be above rank={rank}, the directions there are"
        if self.rank is None:
            for name, neutral in UNMASKED.items():
                if (value := getattr(self, name)) != neutral:
                    given = f"method.mask.{name}={str(value).lower()}"
                    yield f"{given} needs method.mask.rank, the directions to train: null is all"
        elif self.head and self.start == 0:
            yield "method.mask.head=true with method.mask.start=0 never trains the head; the released code starts at 1"


class LowRankAdaptation(Adaptation):
    """Low-rank layers, with or without a regulariser and masks.

    Layers that share a pair are one adapter: its penalty counts once, and its directions are drawn once.
    """

    def __init__(
        self, model: nn.Module, regulariser: Regulariser | None = None, mask: Mask | None = None, seed: int = 0
    ) -> None:
        super().__init__(model)
        self.regulariser = regulariser if regulariser is not None and regulariser.weight > 0 else None
        self.mask = mask if mask is not None and mask.rank is not None else None
        self.seed = seed
        self.adapters: list[list[LowRankLinear]] = _by_pair(model)
        added = {p for layers in self.adapters for layer in layers for p in layer.parameters()}
        self.head = [p for p in model.parameters() if p.requires_grad and p not in added]
        self._before: list[tuple[Tensor, Tensor]] = []
        if self.mask is not None and isinstance(self.mask.rank, int):
            small = sum(layers[0].rank <= self.mask.rank for layers in self.adapters)
            if small:
                log.warning(
                    f"method.mask.rank={self.mask.rank} masks nothing in {small} of {len(self.adapters)} adapters: "
                    "their rank is not above it"
                )

    def before_step(self, step: int, epoch: int) -> None:
        """Draw the directions that this step trains ([R] Algorithm 1, lines 5 to 12)."""
        if self.mask is None or step < self.mask.start:
            return
        by_step = self.mask.every == "step"
        where = (self.seed, streams.MASK_STEP, step) if by_step else (self.seed, streams.MASK_EPOCH, epoch)
        assert self.mask.rank is not None
        ranks = [layers[0].rank for layers in self.adapters]
        drawn = draw_rows(ranks, self.mask.rank, self.mask.independent, *where)
        for layers, (rows_a, rows_b) in zip(self.adapters, drawn, strict=True):
            device = layers[0].lora_a.device
            rows = rows_a.to(device, non_blocking=True), rows_b.to(device, non_blocking=True)
            for layer in layers:
                layer.rows = rows
        if self.mask.target == "update":
            self._before = [(g[0].lora_a.detach().clone(), g[0].lora_bt.detach().clone()) for g in self.adapters]

    def penalty(self) -> Tensor | None:
        """[R] eq. 10 times its weight. Masked rows get no gradient from it."""
        if self.regulariser is None:
            return None
        first = [layers[0] for layers in self.adapters]
        matrices = [m for layer in first for m in (layer.lora_a, layer.lora_bt)]
        rows = [r for layer in first for r in layer.rows or ()]
        return self.regulariser.weight * orthogonality(matrices, self.regulariser.form, rows or None)

    def after_backward(self) -> None:
        if self.mask is not None and self.mask.head and self.adapters[0][0].rows is not None:
            for parameter in self.head:
                if parameter.grad is not None:
                    parameter.grad.zero_()

    @torch.no_grad()
    def after_step(self, step: int, lr: float) -> None:
        """Remove the masks. With ``mask.target=update``, undo what momentum has changed in masked entries."""
        for layers, before in zip(self.adapters, self._before, strict=False):
            assert layers[0].rows is not None
            for matrix, old, live in zip((layers[0].lora_a, layers[0].lora_bt), before, layers[0].rows, strict=True):
                old[live] = matrix[live]
                matrix.copy_(old)
        self._before = []
        for layer in (layer for layers in self.adapters for layer in layers):
            layer.rows = None

    def pairs(self) -> Iterator[tuple[str, Tensor, Tensor, float]]:
        for name, layer in lowrank_layers(self.model):
            yield name, *layer.plain_pair(), layer.scaling

    def inference_parameters(self) -> int:
        """The parameters of A and B with gates or cores multiplied in. Directions with a closed gate do not count."""
        return sum(matrix.numel() for layers in self.adapters for matrix in layers[0].plain_pair())

    def export(self, folder: Path, origin: Origin) -> None:
        export_adapter(folder / "adapter", origin, *pairs_in(self.model))


def _by_pair(model: nn.Module) -> list[list[LowRankLinear]]:
    """The low-rank layers of a model, grouped by the pair that they use."""
    groups: dict[int, list[LowRankLinear]] = {}
    for _, layer in lowrank_layers(model):
        groups.setdefault(id(layer.lora_a), []).append(layer)
    return list(groups.values())


@dataclass(frozen=True)
class Continuing(Method):
    """Base class of the methods that can go on from an adapter.

    Attributes:
        adapter: the adapter to go on from. Its modules, ranks, scales and shared pairs replace those of the method.
    """

    adapter: Annotated[
        Annotated[str, PATH] | None,
        Help("Go on from this adapter, a folder or a hub id: its modules, ranks, scales and ties, and its head."),
    ] = field(default=None, kw_only=True)

    def problems(self) -> Iterator[str]:
        if self.adapter is not None and (problem := place_problem(self.adapter)):
            yield f"method.adapter: {problem}"

    @property
    def inputs(self) -> dict[str, str]:
        return {} if self.adapter is None else {"method.adapter": adapter_digest(self.adapter)}

    def start(self) -> Start | None:
        """The adapter to go on from, read anew; None without one."""
        return None if self.adapter is None else Start.read(self.adapter)


@dataclass(frozen=True)
class Everywhere(Method):
    """Base class of the methods that put a low-rank update of one rank on every candidate module."""

    rank: Rank
    dropout: Rate
    alpha: Alpha

    def check(self, model: nn.Module, grid: Grid) -> None:
        check_ranks(grid, {"rank": self.rank})

    def attach(self, model: nn.Module, grid: Grid) -> None:
        everything = torch.ones(grid.n_layers, grid.n_types, dtype=torch.bool)
        attach(model, grid.names, everything, self.rank, None, self.alpha, self.dropout, freeze=False)


@dataclass(frozen=True)
class EverywhereOrAdapter(Everywhere, Continuing):
    """Base class of the methods on every candidate module that can go on from an adapter instead."""

    @property
    def known_rank(self) -> int | None:
        """The rank of all modules; None if an adapter says it."""
        return self.rank if self.adapter is None else None

    def check(self, model: nn.Module, grid: Grid) -> None:
        if (start := self.start()) is not None:
            start.check(model)
        else:
            super().check(model, grid)

    def attach(self, model: nn.Module, grid: Grid) -> None:
        """Put low-rank layers on all candidates, or those of the adapter on its modules."""
        if (start := self.start()) is not None:
            start.put_on(model, self.dropout)
        else:
            super().attach(model, grid)
