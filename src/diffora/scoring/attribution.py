"""Selector ``attribution``: train a LoRA on every module, then divide their effect on the validation loss among them.

Not in [D]; the division is by integrated gradients (Sundararajan et al., arXiv 1703.01365).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffora.core.hypergradient import first_order
from diffora.core.norms import keep_statistics
from diffora.core.split import divided
from diffora.scoring.bilevel import SearchModule
from diffora.scoring.criteria import gate_path
from diffora.scoring.measures import FLOAT16_SCALE
from diffora.tasks.base import Batch

POINTS = 4
"""Of the Gauss-Legendre rule: each batch is scored with the gates at these four points."""


class AttributionModule(SearchModule):
    """Trains on search-train rows for some rounds. One more round scores on search-valid rows, without training.

    While A, B and the head are trained, every gate is 1: a gate below 1 would only rescale B. In the last round all
    gates go from 0 to 1 together, and the decrease of the validation loss on this path is divided among the modules
    by integrated gradients (`diffora.scoring.criteria.gate_path`).

    Args:
        of_search: the arguments of `SearchModule`.
        rounds: of training.
        score_batches: how many search-valid batches are scored, at most.

    Attributes:
        scores: L x N on the CPU, after the stage: by how much each module's adapter lowers the validation loss. Their
            sum is what all adapters together lower it by, up to the error of the quadrature.
    """

    scores: Tensor

    def __init__(self, *of_search: Any, rounds: int, score_batches: int) -> None:
        super().__init__(*of_search)
        nn.init.ones_(self.gamma)
        self.rounds, self.score_batches = rounds, score_batches
        self._sum, self._terms = torch.zeros_like(self.gamma.detach()), 0.0

    def gates(self, gamma: Tensor) -> Tensor:
        """``gamma`` without a relaxation, because these gates are set and not learnt."""
        return gamma

    def over(self, epochs_done: int, epochs: int) -> bool:
        return epochs_done > epochs

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.model.train(self.current_epoch < self.rounds)  # dropout would add noise to the scores
        keep_statistics(self.model)

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
        """Add one batch to the sums. Returns its loss at the last point, where the gates are almost 1."""
        terms = self.task.weight(valid)
        factor = terms / self._fixed_scale()
        for gate, weight in gate_path(POINTS):
            gates = torch.full_like(self.gamma, gate).requires_grad_()
            # As in a Γ step: do not save activations that only A and B need.
            with divided(self.layers, (), 0, len(valid["row"])):
                loss, (grad,) = self.gradients(valid, partial(_gradient, gates), gates)
            assert grad is not None
            self._sum = self._sum.to(self.device) - weight * factor * grad
        self._terms += terms
        return loss

    def _fixed_scale(self) -> float:
        """What the loss is multiplied by while modules are scored, so that float16 gradients do not underflow.

        No step follows that could be skipped, so the scaler, which tries out how much is too much, is not used.
        """
        return 1.0 if self._scaler() is None else FLOAT16_SCALE

    def _scaled(self, loss: Tensor) -> Tensor:
        return super()._scaled(loss) if self.model.training else loss * self._fixed_scale()

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

    def state(self) -> dict[str, Any]:
        return {"scores": getattr(self, "scores", None)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        if state["scores"] is not None:
            self.scores = state["scores"]


def _gradient(gates: Tensor, loss: Tensor) -> list[Tensor]:
    return [first_order(loss, gates)]
