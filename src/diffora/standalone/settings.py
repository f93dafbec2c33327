"""The numbers of the library's search, and what is wrong with them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from diffora.core.dam import RELAXATIONS
from diffora.core.readout import READOUTS, steps_of


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """The numbers of a search; see `diffora.standalone.search.search`."""

    rounds: int
    rank: int
    alpha: float
    lr: float
    gamma_lr: float
    weight_decay: float
    clip: float | None
    train_steps: int
    relaxation: str
    head_warmup: float | None = None
    readout: str = "gamma"
    patience: int | None = None

    def problems(self) -> Iterator[str]:
        """What is impossible."""
        for name in ("rounds", "rank", "train_steps", "patience"):
            value = getattr(self, name)
            if (type(value) is not int or value < 1) and not (name == "patience" and value is None):
                yield f"{name}={value!r} must be a whole number of at least 1{', or None' * (name == 'patience')}"
        for name in ("alpha", "lr", "gamma_lr", "clip"):
            value = getattr(self, name)
            if not _is_number(value, 0) and not (name == "clip" and value is None):
                yield f"{name}={value!r} must be a finite number above 0{', or None' if name == 'clip' else ''}"
        if self.weight_decay != 0 and not _is_number(self.weight_decay, 0):
            yield f"weight_decay={self.weight_decay!r} must be a finite number of at least 0"
        if self.relaxation not in RELAXATIONS:
            yield f"relaxation={self.relaxation!r} must be one of {', '.join(RELAXATIONS)}"
        if self.readout not in READOUTS:
            yield f"readout={self.readout!r} must be one of {', '.join(READOUTS)}"
        warmup = self.head_warmup
        if warmup is not None and not (_is_number(warmup, 0) and (warmup < 1 or type(warmup) is int)):
            yield f"head_warmup={warmup!r} must be a number of steps, a share of all steps between 0 and 1, or None"

    def step_problems(self, steps: int | None) -> Iterator[str]:
        """What is impossible with this number of steps in a round; None if the loader does not say."""
        share = isinstance(self.head_warmup, float)
        asked = {"head_warmup": share, "readout": self.readout != "gamma", "patience": self.patience is not None}
        if steps is None:
            for name in (name for name, is_asked in asked.items() if is_asked):
                yield f"{name}={getattr(self, name)!r} needs a train_loader that has a length, to count the steps"
        elif self.head_warmup is not None and steps_of(self.head_warmup, self.rounds * steps) >= self.rounds * steps:
            yield f"head_warmup={self.head_warmup} must be below {self.rounds * steps}, the steps of the search"


def _is_number(value: Any, above: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and above < value < math.inf
