"""A callback for Lightning's `Trainer` and a user's own module."""

import os
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from diffora.errors import UserError
from diffora.methods.base import Adaptation
from diffora.trainers.adalora import TrainedAdaLoRA
from diffora.trainers.adapted import adaptation_of, check_adapters
from diffora.trainers.extras import Extras, add_penalty, changed

WHOLE = ("SingleDeviceStrategy", "DDPStrategy")
"""Strategies of Lightning with whole parameters and gradients in every process."""


class DifforaLightningCallback(Callback):
    """`DifforaCallback` for Lightning: ``Trainer(…, callbacks=[DifforaLightningCallback(…)])``.

    The `LightningModule` is the user's own, with one optimiser and automatic optimisation. The penalty is logged as
    ``penalty``.

    Args:
        seed: of the masks; None for the seed of ``seed_everything``, or 0.

    The other arguments are those of `diffora.DifforaCallback`.

    Raises:
        UserError: an argument is impossible, or, when training starts, the model has no adapters that these arguments
            fit, or the trainer's strategy shards parameters.
    """

    def __init__(
        self,
        penalty: float = 0.0,
        mask_rank: int | str | None = None,
        *,
        penalty_form: str = "squared",
        mask_every: str = "step",
        mask_independent: bool = False,
        mask_target: str = "gradient",
        mask_start: int = 0,
        seed: int | None = None,
    ) -> None:
        self.extras = Extras(penalty, mask_rank, penalty_form, mask_every, mask_independent, mask_target, mask_start)
        self.seed = self._seed = seed
        self._adaptation: Adaptation | None = None
        self._saved: Mapping[str, Any] | None = None
        self._step = -1  # the optimiser step of the last micro-batch
        self._open = False  # whether a step has begun and not ended

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check module, strategy and adapters, before anything is trained."""
        if stage != "fit":
            return
        strategy = type(trainer.strategy)
        if not any(kind.__name__ in WHOLE for kind in strategy.__mro__) or "deepspeed" in strategy.__module__:
            raise UserError(
                f"this callback needs whole adapters and gradients in every process, which {strategy.__name__} does "
                'not keep: use Trainer(strategy="ddp")'
            )
        if not pl_module.automatic_optimization:
            raise UserError(
                f"{type(pl_module).__name__} has automatic_optimization=False, and then only the module itself knows "
                "when a step begins: use automatic optimisation"
            )
        self._seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed
        check_adapters(pl_module, self.extras)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._seed is not None
        self._adaptation = adaptation_of(pl_module, self.extras, self._seed)
        self._adaptation.begin(int(trainer.estimated_stepping_batches))
        self._step, self._open = -1, False
        if trainer.global_step:
            self._resume(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Draw the masks before the first micro-batch of a step."""
        assert self._adaptation is not None
        if trainer.global_step != self._step:
            self._step, self._open = trainer.global_step, True
            self._adaptation.before_step(self._step, trainer.current_epoch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Add the gradient of the penalty. Lightning clips gradients afterwards."""
        assert self._adaptation is not None
        scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        # Lightning has unscaled the gradients of float16 by now, except for a fused optimiser.
        scaled = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
        penalty = add_penalty(self._adaptation, pl_module, scaler.get_scale() if scaled else 1.0)
        if penalty is not None:
            pl_module.log("penalty", penalty, rank_zero_only=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimiser step; its gradients are still there."""
        assert self._adaptation is not None
        if trainer.global_step == self._step or not self._open:
            return
        optimizer = trainer.optimizers[0]
        self._open = False
        self._adaptation.after_step(self._step, optimizer.param_groups[0]["lr"])
        if isinstance(self._adaptation, TrainedAdaLoRA):
            self._adaptation.keep_averages(optimizer)

    def state_dict(self) -> dict[str, Any]:
        memory = self._adaptation.state() if self._adaptation else {}
        return {"args": {**vars(self.extras), "seed": self._seed}, "memory": memory}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict  # the adapters are known when training starts

    def _resume(self, trainer: Trainer) -> None:
        """Continue from a checkpoint.

        Raises:
            UserError: it was made without this callback, or with other arguments.
        """
        assert self._adaptation is not None
        if self._saved is None:
            raise UserError("this checkpoint was made without this callback: leave it out, or start a new training")
        if problems := changed(self._saved["args"], self.state_dict()["args"]):
            raise UserError(problems)
        self._adaptation.load_state(self._saved["memory"])
        if isinstance(self._adaptation, TrainedAdaLoRA):
            self._adaptation.recall_averages(trainer.optimizers[0])
