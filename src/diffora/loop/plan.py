"""The steps of fine-tuning, divided into segments: where an epoch ends, and where the model is evaluated.

Lightning calls a segment an epoch. So what holds for the end of an epoch (evaluation, checkpoint, exact resume) holds
within an epoch too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, lcm
from typing import NamedTuple


class Segment(NamedTuple):
    """Steps of one epoch without an evaluation between them.

    Attributes:
        epoch: the epoch, from 0.
        first, stop: the steps of that epoch, from 0; ``stop`` is not one of them.
        evaluates: whether the model is evaluated, and a checkpoint written, after the segment.
    """

    epoch: int
    first: int
    stop: int
    evaluates: bool


@dataclass(frozen=True)
class Plan(Sequence[Segment]):
    """All segments of the stage. They follow a pattern that repeats, and the last one ends at the last step.

    Attributes:
        steps_per_epoch: optimiser steps per epoch.
        total: optimiser steps of the stage.
        pattern: the segments of a period: the step after each of them, and whether it evaluates.
    """

    steps_per_epoch: int
    total: int
    pattern: tuple[tuple[int, bool], ...]

    def __len__(self) -> int:
        periods, rest = divmod(self.total, self.pattern[-1][0])
        return periods * len(self.pattern) + sum(end < rest for end, _ in self.pattern) + (rest > 0)

    def __getitem__(self, i: int) -> Segment:  # type: ignore[override]
        if not 0 <= i < len(self):
            raise IndexError(i)
        first = 0 if i == 0 else self._end(i - 1)[0]
        end, evaluates = self._end(i)
        epoch = first // self.steps_per_epoch
        start = epoch * self.steps_per_epoch
        return Segment(epoch, first - start, end - start, evaluates or end == self.total)

    def _end(self, i: int) -> tuple[int, bool]:
        periods, place = divmod(i, len(self.pattern))
        end, evaluates = self.pattern[place]
        return min(periods * self.pattern[-1][0] + end, self.total), evaluates

    def epochs_after(self, i: int) -> float:
        """How many epochs are done after segment ``i``: a whole number at the end of an epoch."""
        segment = self[i]
        return round(segment.epoch + segment.stop / self.steps_per_epoch, 4)

    @property
    def epochs(self) -> float:
        """How many epochs the stage has; not a whole number where ``max_steps`` ends within an epoch."""
        return self.epochs_after(len(self) - 1)


def plan_of(steps_per_epoch: int, epochs: int, max_steps: int | None = None, every: float | None = None) -> Plan:
    """The plan of a stage.

    Args:
        steps_per_epoch: optimiser steps per epoch.
        epochs: ignored if ``max_steps`` is given.
        max_steps: optimiser steps of the stage.
        every: evaluate after so many steps (int; counted over the stage), after this fraction of an epoch (float), or
            after each epoch (None). The end of the stage is always evaluated, and with a fraction each epoch's end.
    """
    n, total = steps_per_epoch, epochs * steps_per_epoch if max_steps is None else max_steps
    if every is None:
        pattern = [(n, True)]
    elif isinstance(every, int):
        period = lcm(n, every)
        steps = sorted({*range(n, min(period, total) + n, n), *range(every, min(period, total) + every, every), period})
        pattern = [(step, step % every == 0) for step in steps if step <= period]
    else:
        share = Fraction(str(every))  # as written: 0.1 has no exact binary form
        parts = range(1, n) if share * n <= 1 else (int(share * j * n) for j in range(1, ceil(1 / share)))
        pattern = [(step, True) for step in sorted({*parts, n})]
    return Plan(n, total, tuple(pattern))
