"""Stage 1 in another way: train a LoRA on every module, then ask what each of them has done for the validation loss."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffora.core.hypergradient import first_order
from diffora.core.split import divided
from diffora.search.bilevel import SearchModule
from diffora.search.criteria import gate_path
from diffora.tasks.base import Batch

POINTS = 4


class AttributionModule(SearchModule):
    """Weight steps on search-train rows for some rounds, and one round more that scores on search-valid rows.

    While A, B and the head are trained every gate is 1, so that nothing competes with B for its scale. Then all gates
    go from 0 to 1 together, nothing being trained, and the fall of the validation loss on the way is divided among the
    modules by integrated gradients (`diffora.search.criteria.gate_path`).

    Args:
        of_search: what `SearchModule` takes.
        rounds: of training.
        score_batches: at most so many search-valid batches are scored.

    Attributes:
        scores: L x N, once the stage is over: how much of the validation loss each module's adapter takes away. They
            add up to what all adapters together take away, but for the error of four points.
    """

    scores: Tensor

    def __init__(self, *of_search: Any, rounds: int, score_batches: int) -> None:
        super().__init__(*of_search)
        nn.init.ones_(self.gamma)
        self.rounds, self.score_batches = rounds, score_batches
        self._sum, self._terms = torch.zeros_like(self.gamma.detach()), 0.0

    def gates(self, gamma: Tensor) -> Tensor:
        """As they are given: there is no relaxation."""
        return gamma

    def over(self, epochs_done: int, epochs: int) -> bool:
        return epochs_done > epochs

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.model.train(self.current_epoch < self.rounds)  # dropout would add noise to what is measured once

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        if self.current_epoch < self.rounds:
            weight_opt = self.optimizers(use_pl_optimizer=False)[1]  # type: ignore[index]
            for train in batch["train"]:
                loss = self.weight_step(weight_opt, train)
                self._update_scale()
        elif batch_idx < self.score_batches:
            loss = self.attribute(batch["valid"])
        else:
            return
        self.watch(loss)
        self._losses.append((loss, loss))

    def attribute(self, valid: Batch) -> Tensor:
        """Add up what the modules do for one batch. Returns its loss close to full gates."""
        scaler, terms = self._scaler(), self.task.weight(valid)
        factor = terms / (1.0 if scaler is None else scaler.get_scale())
        for gate, weight in gate_path(POINTS):
            gates = torch.full_like(self.gamma, gate).requires_grad_()
            with divided(self.layers, (), 0, len(valid["row"])):  # nothing is kept for the gradients of A and B
                loss, (grad,) = self._gradients(valid, partial(_gradient, gates), gates)
            assert grad is not None
            self._sum = self._sum.to(self.device) - weight * factor * grad
        self._terms += terms
        return loss

    def end_round(self) -> None:
        loss = torch.stack([loss for loss, _ in self._losses]).mean()
        loss = self.trainer.strategy.reduce(loss, reduce_op="mean")
        self._losses = []
        scoring = self.current_epoch == self.rounds
        name = "search/valid_loss" if scoring else "search/train_loss"
        self.log_dict({"search/round": float(self.current_epoch + 1), name: loss}, rank_zero_only=True)
        if scoring:
            total = torch.cat([self._sum.flatten(), self._sum.new_tensor([self._terms])])
            if self.trainer.world_size > 1:
                torch.distributed.all_reduce(total)
            self.scores = (total[:-1] / total[-1]).view(self.gamma.shape).cpu()

    def memory(self) -> dict[str, Any]:
        return {"scores": getattr(self, "scores", None)}

    def recall(self, memory: Mapping[str, Any]) -> None:
        if memory["scores"] is not None:
            self.scores = memory["scores"]


def _gradient(gates: Tensor, loss: Tensor) -> list[Tensor]:
    return [first_order(loss, gates)]
