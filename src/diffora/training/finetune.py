"""Stage 2 of DiffoRA, and the whole of every other method: fine-tune what the method left trainable."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffora.core.orthogonality import numerical_rank, orthogonality_loss, singular_values
from diffora.methods.base import Adaptation
from diffora.training.checkpoint import Stage

Metrics = dict[str, float]


@dataclass(frozen=True)
class FineTuneSettings:
    """The ``finetune`` section of the configuration, as far as the module needs it."""

    lr: float
    weight_decay: float
    warmup_steps: int
    early_stop: int | None


class FineTuneModule(Stage):
    """Trains with AdamW, linear warm-up and linear decay to 0; keeps the best epoch.

    The method's hooks run around each optimiser step. What a method adds to the loss is trained on, but neither
    reported as training loss nor evaluated. The training metric is that of the predictions made while training.

    After each epoch the whole validation split is predicted once and scored three times: all of it (the literature's
    figure, which also chooses the best epoch), and its two seeded halves, so that a choice made on one half can be
    reported on the other.

    Args:
        adaptation: the adapted model and what its method does in a step; what requires gradients is trained.
        loss_fn: (logits, labels) -> mean loss.
        metric_fn: (logits, labels) -> metrics by name.
        main_metric: the metric that chooses the best epoch, the higher the better.
        splits: names of the validation splits, in the order of the loaders; the first is the official one.
        halves: (choice, held-out) row numbers of the official validation split.
        settings: learning rate and the like.
        seed: of the run.
    """

    def __init__(
        self,
        adaptation: Adaptation,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        metric_fn: Callable[[Tensor, Tensor], Metrics],
        main_metric: str,
        splits: Sequence[str],
        halves: tuple[np.ndarray, np.ndarray],
        settings: FineTuneSettings,
        seed: int,
    ) -> None:
        super().__init__(adaptation.model, seed)
        self.adaptation = adaptation
        self.loss_fn, self.metric_fn, self.main_metric = loss_fn, metric_fn, main_metric
        self.splits, self.halves, self.settings = list(splits), halves, settings
        self.history: list[Metrics] = []
        self.best_state: dict[str, Tensor] = {}
        self._outputs: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in splits]
        self._losses: list[Tensor] = []
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self._begun = -1

    def configure_optimizers(self) -> Any:
        s = self.settings
        trainable = [p for p in self.parameters() if p.requires_grad]
        # The fused step would unscale float16 gradients itself, after they have been clipped.
        fused = self.trainer.precision != "16-mixed"
        optimizer = torch.optim.AdamW(trainable, lr=s.lr, weight_decay=s.weight_decay, fused=fused)
        total = int(self.trainer.estimated_stepping_batches)
        self.adaptation.begin(total)

        def factor(step: int) -> float:
            if step < s.warmup_steps:
                return (step + 1) / s.warmup_steps
            return max(0.0, (total - step) / max(1, total - s.warmup_steps))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip the norm. Lightning itself refuses this for any fused optimiser under bf16, where nothing is scaled."""
        if gradient_clip_val is not None:
            torch.nn.utils.clip_grad_norm_([p for p in self.parameters() if p.requires_grad], gradient_clip_val)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        step = self.trainer.global_step
        if step != self._begun:  # the first part of the batch, where it is cut into several
            self.adaptation.before_step(step, self.current_epoch)
            self._begun = step
        logits = self._logits(batch)
        loss = self.loss_fn(logits, batch["labels"])
        self._losses.append(loss.detach())
        self._seen.append((batch["row"], logits.detach().float(), batch["labels"]))
        values: dict[str, Any] = {"train/step_loss": loss.detach(), "lr": self._rate()}
        if (penalty := self.adaptation.penalty()) is not None:
            loss = loss + penalty
            values["train/penalty"] = penalty.detach()
        self.watch(loss)
        self.log_dict(values, batch_size=1, rank_zero_only=True)
        return loss

    def _rate(self) -> float:
        rate: float = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
        return rate

    def on_after_backward(self) -> None:
        self.adaptation.after_backward()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        rate = self._rate()
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.adaptation.after_step(self._begun, rate)

    def _logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.model(**{key: value for key, value in batch.items() if key not in ("labels", "row")}).logits

    def on_validation_epoch_start(self) -> None:
        self._outputs = [[] for _ in self.splits]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._outputs[dataloader_idx].append((batch["row"], self._logits(batch).float(), batch["labels"]))

    def on_validation_epoch_end(self) -> None:
        self.raise_on_fault()
        train_loss = torch.stack(self._losses).mean() if self._losses else torch.tensor(float("nan"))
        train_loss = self.trainer.strategy.reduce(train_loss, reduce_op="mean")
        scores: Metrics = {"epoch": float(self.current_epoch + 1), "train/loss": train_loss.item()}
        if self._seen:
            seen = self.metric_fn(*self._gather(self._seen))
            scores |= {f"train/{key}": value for key, value in seen.items()}
        self._losses, self._seen = [], []
        for i, name in enumerate(self.splits):
            logits, labels = self._gather(self._outputs[i])
            self._outputs[i] = []
            scores[f"{name}/loss"] = self.loss_fn(logits, labels).item()
            scores |= {f"{name}/{key}": value for key, value in self.metric_fn(logits, labels).items()}
            if i == 0:
                for part, rows in zip(("choice", "held_out"), self.halves, strict=True):
                    half = self.metric_fn(logits[rows], labels[rows])
                    scores |= {f"{part}/{key}": value for key, value in half.items()}
        if f"train/{self.main_metric}" in scores:
            # [R] Figures 1, 2: how much better the model is on what it was trained on.
            official = scores[f"{self.splits[0]}/{self.main_metric}"]
            scores["generalisation_gap"] = scores[f"train/{self.main_metric}"] - official
        scores |= measures(self.adaptation)
        self.history.append(scores)
        if self.best_epoch == len(self.history) - 1:
            self.best_state = self.trainable_state()
        if self.stalled:
            self.trainer.should_stop = True
        self.log_dict(scores, rank_zero_only=True)

    def _gather(self, outputs: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Logits and labels of a whole split in row order, from all processes, on the CPU."""
        mine = tuple(torch.cat(column).cpu() for column in zip(*outputs, strict=True)) if outputs else None
        parts: list[Any] = [mine]
        if self.trainer.world_size > 1:
            parts = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, mine)
        rows, logits, labels = (torch.cat(column) for column in zip(*filter(None, parts), strict=True))
        order = rows.argsort()
        return logits[order], labels[order]

    @property
    def best_epoch(self) -> int:
        """Index into `history` of the best epoch by the main metric on the official split; the first of equals."""
        return _argmax([scores[f"{self.splits[0]}/{self.main_metric}"] for scores in self.history])

    @property
    def held_out_epoch(self) -> int:
        """Index of the best epoch by the choice half alone."""
        return _argmax([scores[f"choice/{self.main_metric}"] for scores in self.history])

    @property
    def stalled(self) -> bool:
        """Whether ``early_stop`` epochs have passed without a new best."""
        patience = self.settings.early_stop
        return patience is not None and len(self.history) - 1 - self.best_epoch >= patience

    def over(self, epochs_done: int, epochs: int) -> bool:
        return super().over(epochs_done, epochs) or self.stalled

    def results(self) -> Metrics:
        """The run's metrics.

        ``<split>/*`` is the best epoch on the whole official split (``dev_best`` in the literature), ``held_out/*`` the
        held-out half at the epoch that the choice half chose, ``last/*`` the official split after the last epoch.
        """
        best, held_out, last = self.history[self.best_epoch], self.history[self.held_out_epoch], self.history[-1]
        official = f"{self.splits[0]}/"
        metrics = {
            **{key: value for key, value in best.items() if key.split("/")[0] in self.splits},
            "best_epoch": best["epoch"],
            **{key: value for key, value in held_out.items() if key.startswith("held_out/")},
            "held_out/epoch": held_out["epoch"],
            **{f"last/{key.removeprefix(official)}": v for key, v in last.items() if key.startswith(official)},
            **{key: value for key, value in best.items() if key.startswith(("train/", "update/", "generalisation"))},
        }
        return {key: round(value, 6) for key, value in metrics.items()}

    def memory(self) -> dict[str, Any]:
        return {"history": self.history, "best_state": self.best_state, "method": self.adaptation.state()}

    def recall(self, memory: Mapping[str, Any]) -> None:
        self.history, self.best_state = list(memory["history"]), dict(memory["best_state"])
        self.adaptation.load_state(memory["method"])


def measures(adaptation: Adaptation) -> Metrics:
    """Mean over modules of the numerical rank of the update dW and of ||dW dW^T - I||_F^2 ([R] Table 5)."""
    ranks, losses = [], []
    for _, lora_a, lora_bt, scaling in adaptation.pairs():
        values = singular_values(lora_a, lora_bt, scaling)
        ranks.append(numerical_rank(values, lora_bt.shape[1], lora_a.shape[1]))
        losses.append(orthogonality_loss(values, lora_bt.shape[1]))
    if not ranks:
        return {}
    return {"update/rank": sum(ranks) / len(ranks), "update/orthogonality_loss": sum(losses) / len(losses)}


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda i: (values[i], -i))
