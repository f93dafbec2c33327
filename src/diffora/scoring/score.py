"""Selectors ``gradient`` and ``activation``: score the candidates on a few batches, without training."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffora.core.grid import Names, laid_out
from diffora.core.linear import weight_of
from diffora.errors import UserError
from diffora.loop.stage import Stage
from diffora.scoring.criteria import counted_tokens, gradient_norm, square_sums, weight_times_activation
from diffora.tasks.base import Batch, Task, full_precision
from diffora.tasks.batches import parts_of


class ScoreModule(Stage):
    """One pass over some search-train batches, in evaluation mode. No parameter and no gradient buffer changes.

    Everything is summed over micro-batches, batches and processes before a square root is taken, so that the scores do
    not depend on how the rows are divided. The formulas are in `diffora.scoring.criteria`.

    Args:
        model: the frozen backbone with its new head.
        names: L x N full names of the candidates.
        criterion: ``gradient`` or ``activation``.
        task: gives the loss.
        accumulate: micro-batches per batch.
        seed: of the run.

    Attributes:
        scores: L x N on the CPU, after the stage.
    """

    scores: Tensor

    def __init__(
        self,
        model: nn.Module,
        names: Names,
        criterion: str,
        task: Task,
        accumulate: int,
        seed: int,
    ) -> None:
        super().__init__(model, seed)
        self.automatic_optimization = False
        self.names = names
        self.paths = [name for row in names for name in row if name is not None]
        self.candidates = [model.get_submodule(name) for name in self.paths]
        for candidate in self.candidates:
            weight_of(candidate)  # refuses quantised ones at once
        self.weights = [model.get_parameter(f"{name}.weight") for name in self.paths]
        self.criterion, self.task, self.accumulate = criterion, task, accumulate
        self._sums: list[Tensor] = []

    def configure_optimizers(self) -> None:
        """There is nothing to optimise."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.eval()  # dropout would add noise to the scores

    def over(self, epochs_done: int, epochs: int) -> bool:
        return epochs_done >= 1

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        rows: Batch = batch["train"][0]
        for part, share in parts_of(rows, self.accumulate, self.task):
            self._add(self.gradients(part, share) if self.criterion == "gradient" else self.statistics(part))

    def _add(self, new: list[Tensor]) -> None:
        for total, value in zip(self._sums, new, strict=True) if self._sums else ():
            total += value
        self._sums = self._sums or new

    def gradients(self, batch: Batch, share: float = 1.0) -> list[Tensor]:
        """Gradients of ``share`` times the mean loss by each candidate's weight, L N of them."""
        # float16 gradients would underflow, and there is no optimiser whose loss scaler could prevent it.
        scale = 1024.0 if self.trainer.precision == "16-mixed" else 1.0
        for weight in self.weights:
            weight.requires_grad_(True)
        try:
            loss = self.task.loss(self.model(**self.task.inputs(batch)), batch)
            grads = torch.autograd.grad(loss * (share * scale), self.weights)
        finally:
            for weight in self.weights:
                weight.requires_grad_(False)
        return [full_precision(grad) / scale for grad in grads]

    @torch.no_grad()
    def statistics(self, batch: Batch) -> list[Tensor]:
        """For each candidate the sum of squares of its input features, (in,); then for each the number of tokens."""
        names = dict(zip(self.candidates, self.paths, strict=True))
        found: dict[nn.Module, tuple[Tensor, Tensor]] = {}

        def note(layer: nn.Module, args: tuple[Tensor]) -> None:
            # Only the first call in a pass is on tokens: DeBERTa calls Q and K again, on its table of positions.
            if layer not in found:
                found[layer] = square_sums(args[0], counted_tokens(names[layer], args[0], batch))

        hooks = [layer.register_forward_pre_hook(note) for layer in self.candidates]
        try:
            self.model(**self.task.inputs(batch))
        finally:
            for hook in hooks:
                hook.remove()
        return [found[layer][part] for part in (0, 1) for layer in self.candidates]

    def on_train_epoch_end(self) -> None:
        sums, self._sums = self._sums, []
        if self.trainer.world_size > 1:
            for total in sums:
                torch.distributed.all_reduce(total)
        if self.criterion == "gradient":
            # All processes and batches have equally many rows, so this is the mean over all rows.
            n = self.trainer.num_training_batches * self.trainer.world_size
            scores = [gradient_norm(total / n) for total in sums]
        else:
            weights, n = (weight_of(m).detach() for m in self.candidates), len(self.candidates)
            parts = zip(weights, sums[:n], sums[n:], strict=True)
            scores = [weight_times_activation(weight, squares / tokens) for weight, squares, tokens in parts]
        values = torch.stack(scores).cpu()
        self.scores = laid_out(values, self.names)
        if not values.isfinite().all():
            raise UserError(
                f"method.selector={self.criterion}: a score is not finite"
                + ("" if self.trainer.precision == "32-true" else "; try trainer.precision=32-true")
            )
        super().on_train_epoch_end()

    def memory(self) -> dict[str, Any]:
        return {"scores": self.scores}

    def recall(self, memory: Mapping[str, Any]) -> None:
        self.scores = memory["scores"]
