"""Stage 1 in short: score the candidates on a few batches, without training anything (`diffora.core.scores`)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffora.core.scores import gradient_norm, square_sums, weight_times_activation
from diffora.errors import UserError
from diffora.training.checkpoint import Stage

Batch = dict[str, Tensor]


class ScoreModule(Stage):
    """One pass over some search-train batches, in evaluation mode. No parameter and no gradient buffer is changed.

    Sums are taken over parts, batches and processes before anything that is not linear, so that the scores do not
    depend on how the rows are divided.

    Args:
        model: the frozen backbone with its new head.
        names: L x N full names of the candidates.
        criterion: ``gradient`` or ``activation``.
        loss_fn: (logits, labels) -> mean loss.
        accumulate: parts that a batch is cut into.
        seed: of the run.

    Attributes:
        scores: L x N, once the stage is over.
    """

    scores: Tensor

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[Sequence[str]],
        criterion: str,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        accumulate: int,
        seed: int,
    ) -> None:
        super().__init__(model, seed)
        self.automatic_optimization = False
        self.shape = len(names), len(names[0])
        self.candidates = [model.get_submodule(name) for row in names for name in row]
        self.weights = [model.get_parameter(f"{name}.weight") for row in names for name in row]
        self.criterion, self.loss_fn, self.accumulate = criterion, loss_fn, accumulate
        self._sums: list[Tensor] = []

    def configure_optimizers(self) -> None:
        """There is nothing to optimise."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.eval()  # dropout would add noise to what is measured once

    def over(self, epochs_done: int, epochs: int) -> bool:
        return epochs_done >= 1

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        rows: Batch = batch["train"][0]
        n = len(rows["labels"])
        size = -(-n // self.accumulate)
        for start in range(0, n, size):
            part = {key: value[start : start + size] for key, value in rows.items()}
            share = min(size, n - start) / n
            self._add(self.gradients(part, share) if self.criterion == "gradient" else self.statistics(part))

    def _add(self, new: list[Tensor]) -> None:
        for total, value in zip(self._sums, new, strict=True) if self._sums else ():
            total += value
        self._sums = self._sums or new

    def gradients(self, batch: Batch, share: float = 1.0) -> list[Tensor]:
        """The gradients of ``share`` times the mean loss with respect to each candidate's weight, L N of them."""
        # float16 gradients would underflow; the scaler that is otherwise there for this belongs to an optimiser.
        scale = 1024.0 if self.trainer.precision == "16-mixed" else 1.0
        for weight in self.weights:
            weight.requires_grad_(True)
        try:
            loss = self.loss_fn(self._logits(batch), batch["labels"])
            grads = torch.autograd.grad(loss * (share * scale), self.weights)
        finally:
            for weight in self.weights:
                weight.requires_grad_(False)
        return [grad / scale for grad in grads] if scale != 1 else list(grads)

    @torch.no_grad()
    def statistics(self, batch: Batch) -> list[Tensor]:
        """The sums of squares of each candidate's input features (in,), and the number of tokens in the end."""
        mask = batch.get("attention_mask")
        found: dict[nn.Module, tuple[Tensor, Tensor]] = {}

        def note(layer: nn.Module, args: tuple[Tensor]) -> None:
            # The first call in a pass is for the tokens: DeBERTa uses Q and K once more, on the table of positions.
            if layer not in found:
                x = args[0]
                found[layer] = square_sums(x, torch.ones(x.shape[:-1], device=x.device) if mask is None else mask)

        hooks = [layer.register_forward_pre_hook(note) for layer in self.candidates]
        try:
            self._logits(batch)
        finally:
            for hook in hooks:
                hook.remove()
        return [found[layer][0] for layer in self.candidates] + [found[self.candidates[0]][1]]

    def _logits(self, batch: Batch) -> Tensor:
        logits: Tensor = self.model(**{k: v for k, v in batch.items() if k not in ("labels", "row")}).logits
        return logits

    def on_train_epoch_end(self) -> None:
        sums, self._sums = self._sums, []
        if self.trainer.world_size > 1:
            for total in sums:
                torch.distributed.all_reduce(total)
        if self.criterion == "gradient":
            # All processes and batches have equally many rows, so the mean is that of all rows.
            n = self.trainer.num_training_batches * self.trainer.world_size
            scores = [gradient_norm(total / n) for total in sums]
        else:
            *squares, tokens = sums
            pairs = zip(self.weights, squares, strict=True)
            scores = [weight_times_activation(weight.detach(), total / tokens) for weight, total in pairs]
        self.scores = torch.stack(scores).view(self.shape).cpu()
        if not self.scores.isfinite().all():
            raise UserError(
                f"method.selector={self.criterion}: a score is not finite"
                + ("" if self.trainer.precision == "32-true" else "; try trainer.precision=32-true")
            )
        super().on_train_epoch_end()

    def memory(self) -> dict[str, Any]:
        return {"scores": self.scores}

    def recall(self, memory: Mapping[str, Any]) -> None:
        self.scores = memory["scores"]
