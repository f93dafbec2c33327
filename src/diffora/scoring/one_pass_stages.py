"""The stages of the selectors that train nothing: they take one short pass over some search-train batches."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffora.core.grid import Grid
from diffora.loop.stage import Stage
from diffora.scoring.function import Batches, ScoreFunction, call_function
from diffora.scoring.measures import FLOAT16_SCALE, Measure
from diffora.tasks.base import Batch, Task
from diffora.tasks.batches import parts_of


class OnePassStage(Stage):
    """One pass in evaluation mode. A subclass reads the batches, and sets the scores when the pass is over.

    Args:
        model: the frozen backbone with its new head.
        name: of the selector, for messages.
        task: gives the loss.
        seed: of the run.

    Attributes:
        scores: L x N on the CPU, after the stage.
    """

    compiles = False  # compiling takes longer than the few batches
    scores: Tensor

    def __init__(self, model: nn.Module, name: str, task: Task, seed: int) -> None:
        super().__init__(model, seed)
        self.automatic_optimization = False
        self.name, self.task = name, task

    def configure_optimizers(self) -> None:
        """There is nothing to optimise."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.eval()  # dropout would add noise to the scores

    def over(self, epochs_done: int, epochs: int) -> bool:
        return epochs_done >= 1

    def loss(self, batch: Batch) -> Tensor:
        """The task's mean loss of a batch, a scalar with a graph."""
        return self.task.loss(self.model(**self.task.inputs(batch)), batch)

    def state(self) -> dict[str, Any]:
        return {"scores": self.scores}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.scores = state["scores"]


class MeasureStage(OnePassStage):
    """Adds up a measure of `diffora.scoring.measures` over the batches. No parameter and no gradient buffer changes.

    Args:
        measure: of the frozen backbone with its new head.
        accumulate: micro-batches per batch.
    """

    def __init__(self, measure: Measure, name: str, task: Task, accumulate: int, seed: int) -> None:
        super().__init__(measure.model, name, task, seed)
        self.measure, self.accumulate = measure, accumulate
        self._sums: list[Tensor] = []

    def on_fit_start(self) -> None:
        super().on_fit_start()
        # There is no optimiser whose loss scaler could keep float16 gradients from underflowing.
        self.measure.scale = FLOAT16_SCALE if self.trainer.precision == "16-mixed" else 1.0

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        rows: Batch = batch["train"][0]
        n_parts = len(rows["row"]) if self.measure.by_row else self.accumulate
        of_batch = self._share(rows)
        for part, share in parts_of(rows, n_parts, self.task):
            new = self.measure.of(part, self.loss, of_batch * share)
            if self.measure.differentiates and self.task.weight(part) == 0:  # nothing in it counts for the loss
                new = [torch.zeros_like(value) for value in new]
            self._add(new)

    def _share(self, rows: Batch) -> float:
        """The share of this process's rows in the mean loss of the batch that all processes have together."""
        if self.trainer.world_size == 1:
            return 1.0
        own = torch.tensor(self.task.weight(rows), dtype=torch.float32, device=self.device)
        whole = own.clone()
        torch.distributed.all_reduce(whole)
        return (own / whole.clamp(min=1e-9)).item()

    def _add(self, new: list[Tensor]) -> None:
        for total, value in zip(self._sums, new, strict=True) if self._sums else ():
            total += value
        self._sums = self._sums or new

    def on_train_epoch_end(self) -> None:
        sums, self._sums = self._sums, []
        if self.trainer.world_size > 1:
            for total in sums:
                torch.distributed.all_reduce(total)
        self.scores = self.measure.scores(sums)
        super().on_train_epoch_end()


class FunctionStage(OnePassStage):
    """Collects the batches, then calls a user's function on them (`diffora.scoring.function`).

    Args:
        grid: of the model.
        function: the user's.
        name: its dotted path, for messages.
    """

    def __init__(self, model: nn.Module, grid: Grid, function: ScoreFunction, name: str, task: Task, seed: int) -> None:
        super().__init__(model, name, task, seed)
        self.grid, self.function = grid, function
        self._batches: list[Batch] = []

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._batches.append({key: value.cpu() for key, value in batch["train"][0].items()})

    def on_train_epoch_end(self) -> None:
        # All processes compute the same, except for random draws in the function. So all take the first one's result.
        with self.trainer.precision_plugin.forward_context():
            batches = Batches(self._batches, self.device)
            found = call_function(
                self.function, self.model, self.grid, batches, self.loss, f"method.selector={self.name}"
            )
        self.scores = self.trainer.strategy.broadcast(found)
        self._batches = []
        super().on_train_epoch_end()
