"""Fine-tuning: trains the parameters that the method made trainable. Stage 2 of DiffoRA, the only one of others."""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffora.loop.plan import Plan
from diffora.loop.stage import NonFiniteLoss, Stage
from diffora.methods.base import Adaptation
from diffora.settings.sections import FineTune
from diffora.tasks.base import Outputs, Split, Task
from diffora.tasks.classes import ClassResults
from diffora.training.clock import StepClock
from diffora.training.criterion import Criterion
from diffora.training.optimisers import make_optimiser, make_schedule
from diffora.training.updates import measures

log = logging.getLogger(__name__)

Metrics = dict[str, float]


class FineTuneModule(Stage):
    """Trains with the optimiser and schedule of the settings, and keeps the best weights.

    The loss of a step is the mean over all its terms (`Task.weight`: rows, or tokens that count), however they are
    divided into micro-batches and processes.

    The method's hooks run around each optimiser step. A penalty that a method adds to the loss is trained on, but is
    not part of the reported training loss. The training metric is that of the predictions made while training.

    An epoch of Lightning is a segment of the plan (`diffora.loop.plan`). After each epoch, or as often as
    ``finetune.eval_every`` says, the whole validation split is predicted once and scored three times: as a whole (the
    usual figure in the literature, which also chooses the best weights), and as two seeded halves. So a choice made on
    one half can be reported on the other.

    Args:
        adaptation: the adapted model, and what its method does in a step. Parameters that require gradients are
            trained.
        task: defines loss and metrics; its main metric chooses the best epoch.
        train: the training split.
        validation: evaluation splits by name, in the order of the loaders; the first is the official one.
        halves: (choice, held-out) row numbers of the official split, as encoded.
        settings: the ``finetune`` section, with the warm-up steps of this run.
        seed: the run's seed.
        plan: gives the segments; called once the processes have met.
        criterion: the training loss; None for the task's own.

    Attributes:
        history: the metrics of each evaluation.
        best_state: the trainable weights of the best evaluation.
        best_classes: the results by class of the best evaluation on the official split; None if there are none.
    """

    plan: Plan

    def __init__(
        self,
        adaptation: Adaptation,
        task: Task,
        train: Split,
        validation: Mapping[str, Split],
        halves: tuple[np.ndarray, np.ndarray],
        settings: FineTune,
        seed: int,
        plan: Callable[[], Plan],
        criterion: Criterion | None = None,
    ) -> None:
        super().__init__(adaptation.model, seed)
        self.make_plan, self.criterion = plan, criterion or Criterion(task)
        self.adaptation = adaptation
        self.task, self.train_split, self.validation = task, train, dict(validation)
        self.halves, self.settings = halves, settings
        self.history: list[Metrics] = []
        self.best_state: dict[str, Tensor] = {}
        self.best_classes: ClassResults | None = None
        self._outputs: list[list[Outputs]] = [[] for _ in validation]
        self._losses: list[Tensor] = []  # of each step: sum of the losses of all terms in this process, number of terms
        self._seen: list[Outputs] = []
        self._stepping = StepClock()
        self._finished = False  # whether a checkpoint is of the last step
        self._stop_asked = False  # whether a callback of the user wants to stop
        self._step = -1  # the optimiser step of the last micro-batch
        self._terms = 0.0  # terms of the present micro-batch in this process
        # Terms in all processes: of the step's first micro-batch, and of all its micro-batches so far.
        self._first_terms = self._all_terms = torch.ones(())

    def configure_optimizers(self) -> Any:
        self.plan = self.make_plan()
        self.trainer.fit_loop.max_epochs = len(self.plan)
        optimizer = make_optimiser(((n, p) for n, p in self.named_parameters() if p.requires_grad), self.settings)
        schedule = make_schedule(optimizer, self.settings, self.plan.total)
        self.adaptation.begin(self.plan.total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def epoch_now(self) -> int:
        return self.plan[self.current_epoch].epoch

    @property
    def checkpoint_due(self) -> bool:
        return self.plan[self.current_epoch].evaluates

    def progress(self) -> tuple[float, float, int]:
        plan, parts = self.plan, self.trainer.accumulate_grad_batches
        now = min(self.current_epoch, len(plan) - 1)
        return plan.epochs_after(now), plan.epochs, plan.total * parts

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        # Without an evaluation for several epochs, keep those of one epoch, which are of all rows.
        self._seen = self._seen[-self.plan.steps_per_epoch * self.trainer.accumulate_grad_batches :]
        # Lightning validates after every n-th epoch; an n above the number of the present one turns that off.
        self.trainer.check_val_every_n_epoch = 1 if self.checkpoint_due else self.current_epoch + 2

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Unscale the gradients, and rescale them to the mean over all terms of the step. Then the method's hook."""
        # For an optimiser that unscales by itself (a fused one), Lightning does not do it before clipping.
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)
        if (parts := self.trainer.accumulate_grad_batches) > 1:
            # Lightning divided the loss by the number of micro-batches, and `_loss_weight` by the terms of the first.
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, parts * self._first_terms / _or_one(self._all_terms))
        self.adaptation.after_backward()

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip the norm of the gradients. Lightning's own clipping refuses fused optimisers."""
        if gradient_clip_val is not None:
            torch.nn.utils.clip_grad_norm_([p for p in self.parameters() if p.requires_grad], gradient_clip_val)

    def on_before_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        if self.trainer.training:
            self._terms = self.criterion.weight(batch)  # count while the batch is on the CPU: no wait for the GPU
        return batch

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        step = self.trainer.global_step
        first = step != self._step  # whether this is the step's first micro-batch
        if first:
            self.adaptation.before_step(step, self.epoch_now)
            self._step = step
        with self.given(batch):
            output = self.model(**self.task.inputs(batch))
        loss = self.criterion.loss(output, batch)
        if first or not self._losses:
            self._losses.append(loss.new_zeros(2))
        self._losses[-1] += torch.stack([loss.detach() * self._terms, torch.full_like(loss, self._terms)]).detach()
        if self.task.scores_training:
            outputs = self.task.outputs(output, batch)
            self._seen.append(outputs | {"step": torch.full_like(outputs["row"], step)})
        values: dict[str, Any] = {"train/step_loss": loss.detach()}
        if (penalty := self.adaptation.penalty()) is not None:
            loss = loss + penalty
            values["train/penalty"] = penalty.detach()
        self.watch(loss)
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if (step + 1) % every == 0:  # loggers keep nothing in between
            epoch = (step + 1) / self.plan.steps_per_epoch
            self.log_dict(values | {"lr": self._rate(), "epoch": epoch}, batch_size=1, rank_zero_only=True)
        if self.trainer.accumulate_grad_batches == self.trainer.world_size == 1:
            return loss
        return loss * self._loss_weight(loss.detach(), first)

    def _loss_weight(self, loss: Tensor, first: bool) -> Tensor:
        """Loss weight of this micro-batch: its terms over the mean per process in the step's first micro-batch."""
        world = self.trainer.world_size
        mine = torch.full_like(loss, self._terms)
        terms = mine
        if world > 1:
            terms = mine.clone()
            torch.distributed.all_reduce(terms)
        if first:
            self._first_terms = _or_one(terms)
        self._all_terms = terms if first else self._all_terms + terms
        return mine * world / self._first_terms

    def _rate(self) -> float:
        """The present learning rate."""
        rate: float = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
        return rate

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self.trainer.is_last_batch and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._stepping.tick(starts=batch_idx == 0)
        self._put_off_stop()

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self._put_off_stop()

    def _put_off_stop(self) -> None:
        """Let a callback of the user stop the stage only at an evaluation: the last steps would have none otherwise."""
        if self.trainer.should_stop and not (self.trainer.is_last_batch and self.checkpoint_due):
            self.trainer.should_stop, self._stop_asked = False, True

    @property
    def step_seconds(self) -> float | None:
        """Mean seconds of an optimiser step, without evaluation; None if there was no step to measure."""
        batch = self._stepping.mean
        return None if batch is None else batch * self.settings.accumulate

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        rate = self._rate()
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.adaptation.after_step(self._step, rate)

    def on_validation_epoch_start(self) -> None:
        self._outputs = [[] for _ in self.validation]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        with self.given(batch, list(self.validation)[dataloader_idx]):
            self._outputs[dataloader_idx].append(self.task.evaluate(self.model, batch, final=False))

    def on_validation_epoch_end(self) -> None:
        self.raise_on_fault()
        scores = self._training_scores()
        classes = None
        for i, (name, split) in enumerate(self.validation.items()):
            outputs, self._outputs[i] = _each_row_once(self._gather(self._outputs[i])), []
            scores |= {f"{name}/{key}": value for key, value in self.task.score(outputs, split).items()}
            if i == 0:
                classes = self.task.class_results(outputs)
                for part, rows in zip(("choice", "held_out"), self.halves, strict=True):
                    half = self.task.score({key: value[rows] for key, value in outputs.items()}, split)
                    scores |= {f"{part}/{key}": value for key, value in half.items() if key != "loss"}
                    self._warn_of_unknown(part, scores)
        if not all(math.isfinite(scores.get(f"{name}/loss", 0.0)) for name in self.validation):
            raise NonFiniteLoss(self.epoch_now, "validation loss")
        if (seen_score := scores.get(f"train/{self.task.main_metric}")) is not None:
            # [R] Figures 1 and 2: how much better the model is on its training rows.
            gap = seen_score - scores[f"{self.official}/{self.task.main_metric}"]
            scores["generalisation_gap"] = gap if self.task.maximise else -gap
        scores |= measures(self.adaptation)
        self.history.append(scores)
        if self.best_epoch == len(self.history) - 1:
            self.best_state, self.best_classes = self.trainable_state(), classes
        if self.stalled or self._stop_asked:
            self.trainer.should_stop = True
        self.log_dict(scores, rank_zero_only=True)

    def _warn_of_unknown(self, part: str, scores: Metrics) -> None:
        """Warn, at the first evaluation, if the main metric is known on all validation rows but not on a half."""
        metric = self.task.main_metric
        if (
            self.history
            or math.isnan(scores[f"{self.official}/{metric}"])
            or not math.isnan(scores[f"{part}/{metric}"])
        ):
            return
        means = "the first epoch counts as its best" if part == "choice" else "it will be missing in the results"
        log.warning(
            f"{metric} cannot be computed on the {part} half of the validation rows, so that {means}: evaluate more "
            "rows (generated answers: task.generation.rows)"
        )

    def _training_scores(self) -> Metrics:
        """Epoch, mean training loss and training metrics, over all processes. It clears what was collected."""
        loss = torch.tensor(float("nan"))
        if self._losses:
            sums, terms = self.trainer.strategy.reduce(torch.stack(self._losses), reduce_op="sum").unbind(1)
            loss = (sums / _or_one(terms)).mean()
        scores: Metrics = {"epoch": self.plan.epochs_after(self.current_epoch), "train/loss": loss.item()}
        if self._seen:
            seen = self.task.score(_each_row_once(self._gather(self._seen), last=True), self.train_split)
            scores |= {f"train/{key}": value for key, value in seen.items() if key != "loss"}
        self._losses, self._seen = [], []
        return scores

    def _gather(self, outputs: list[Outputs]) -> Outputs:
        """The outputs for a whole split in row order, from all processes, on the CPU.

        With ``step``, which is left out, the outputs of one row are in the order of their steps.
        """
        mine = {key: torch.cat([part[key] for part in outputs]).cpu() for key in outputs[0]} if outputs else None
        parts: list[Any] = [mine]
        if self.trainer.world_size > 1:
            parts = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, mine)
        parts = list(filter(None, parts))
        whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        row = whole["row"]
        step = whole.pop("step", torch.zeros_like(row))
        order = (row * (step.max() + 1) + step).argsort(stable=True)
        return {key: value[order] for key, value in whole.items()}

    @property
    def official(self) -> str:
        """Name of the official validation split."""
        return next(iter(self.validation))

    @property
    def best_epoch(self) -> int:
        """Index in `history` of the best epoch by the main metric on the official split; the first epoch of a tie."""
        return self._best(self.official)

    @property
    def held_out_epoch(self) -> int:
        """Index in `history` of the best epoch by the choice half."""
        return self._best("choice")

    def _best(self, part: str) -> int:
        sign = 1 if self.task.maximise else -1
        values = [sign * scores[f"{part}/{self.task.main_metric}"] for scores in self.history]
        values = [-math.inf if math.isnan(value) else value for value in values]  # a NaN is not the best
        return max(range(len(values)), key=lambda i: (values[i], -i))

    @property
    def stalled(self) -> bool:
        """Whether none of the last ``early_stop`` evaluations was the best so far."""
        patience = self.settings.early_stop
        return patience is not None and len(self.history) - 1 - self.best_epoch >= patience

    def over(self, epochs_done: int, epochs: int) -> bool:
        return self._finished or self.stalled

    def results(self) -> Metrics:
        """The run's metrics.

        ``<split>/*`` is the best epoch on the whole official split (``dev_best`` in the literature). ``held_out/*`` is
        the held-out half at the epoch that the choice half chose. ``last/*`` is the official split in the last epoch.
        """
        best, held_out, last = self.history[self.best_epoch], self.history[self.held_out_epoch], self.history[-1]
        official = f"{self.official}/"
        metrics = {
            **{key: value for key, value in best.items() if key.split("/")[0] in self.validation},
            "best_epoch": best["epoch"],
            **{key: value for key, value in held_out.items() if key.startswith("held_out/")},
            "held_out/epoch": held_out["epoch"],
            **{f"last/{key.removeprefix(official)}": v for key, v in last.items() if key.startswith(official)},
            **{key: value for key, value in best.items() if key.startswith(("train/", "update/", "generalisation"))},
        }
        return {key: round(value, 6) for key, value in metrics.items()}

    def state(self) -> dict[str, Any]:
        return {
            "history": self.history,
            "best_state": self.best_state,
            "best_classes": self.best_classes and vars(self.best_classes),
            "method": self.adaptation.state(),
            # A callback of the user may have stopped it.
            "finished": self.current_epoch + 1 >= len(self.plan) or self.trainer.should_stop,
            "stepping": [self._stepping.seconds, self._stepping.batches],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.history, self.best_state = list(state["history"]), dict(state["best_state"])
        self.best_classes = state["best_classes"] and ClassResults(**state["best_classes"])
        self._finished = bool(state["finished"])
        self._stepping = StepClock(*state.get("stepping", ()))
        self.check_state(self.best_state)
        self.adaptation.load_state(state["method"])


def _each_row_once(outputs: Outputs, last: bool = False) -> Outputs:
    """One output of each row: the first or the last one. The outputs are in the order of rows.

    In an evaluation, a process repeats rows to keep step with the others (`EvalBatchSampler`). In training, a row comes
    again in each epoch.
    """
    rows = outputs["row"]
    kept = torch.ones_like(rows, dtype=torch.bool)
    kept[slice(None, -1) if last else slice(1, None)] = rows[1:] != rows[:-1]
    return outputs if kept.all() else {key: value[kept] for key, value in outputs.items()}


def _or_one(terms: Tensor) -> Tensor:
    """The number of terms; 1 if no term counts, because the loss is 0 then anyway."""
    return torch.where(terms > 0, terms, 1.0)
