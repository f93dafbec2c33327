"""The stage that collects search-train batches and calls a user's function on them (`diffora.scoring.function`)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from diffora.core.grid import Grid
from diffora.loop.stage import Stage
from diffora.scoring.function import Batches, ScoreFunction, call_function
from diffora.tasks.base import Batch, Task


class FunctionModule(Stage):
    """Collects search-train batches in one short epoch, then calls the function on them.

    Args:
        model: the frozen backbone with its new head.
        function: the user's function, see above.
        name: its dotted path, for messages.
        task: gives the loss.
        seed: of the run.

    Attributes:
        scores: L x N on the CPU, once the stage is over.
    """

    compiles = False  # as in `ScoreModule`
    scores: Tensor

    def __init__(self, model: nn.Module, grid: Grid, function: ScoreFunction, name: str, task: Task, seed: int) -> None:
        super().__init__(model, seed)
        self.automatic_optimization = False
        self.grid, self.function, self.name, self.task = grid, function, name, task
        self._batches: list[Batch] = []

    def configure_optimizers(self) -> None:
        """There is nothing to optimise."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.eval()

    def over(self, epochs_done: int, epochs: int) -> bool:
        return epochs_done >= 1

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

    def loss(self, batch: Batch) -> Tensor:
        """The task's loss of the model, a scalar with a graph."""
        return self.task.loss(self.model(**self.task.inputs(batch)), batch)

    def memory(self) -> dict[str, Any]:
        return {"scores": self.scores}

    def recall(self, memory: Mapping[str, Any]) -> None:
        self.scores = memory["scores"]
