"""How long a training step takes."""

import time
from dataclasses import dataclass


@dataclass
class StepClock:
    """Adds up the time from the end of a batch to the end of the next one, loading of batches included.

    The first batch after a start or an evaluation does not count, because loaders and kernels start there.

    Attributes:
        seconds: of all batches that count.
        batches: their number.
    """

    seconds: float = 0.0
    batches: int = 0
    _last: float = 0.0

    def tick(self, starts: bool) -> None:
        """Call it at the end of each batch. ``starts``: whether this is the first batch after a start."""
        now = time.perf_counter()
        if not starts:
            self.seconds += now - self._last
            self.batches += 1
        self._last = now

    @property
    def mean(self) -> float | None:
        """Seconds of a batch; None before a batch counts."""
        return self.seconds / self.batches if self.batches else None
