"""A callback for transformers' `Trainer`, and so for TRL's trainers."""

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from diffora.errors import UserError
from diffora.methods.base import Adaptation
from diffora.trainers.adalora import TrainedAdaLoRA
from diffora.trainers.adapted import adaptation_of, check_adapters, load_shared_once, shares_pairs
from diffora.trainers.extras import Extras, add_penalty, changed


class DifforaCallback(TrainerCallback, ExportableState):
    """What a low-rank adapter needs in training beyond its configuration.

    Give it to a trainer: ``Trainer(…, callbacks=[DifforaCallback(…)])``.

    - R-LoRA's penalty and GM-LoRA's masks, together RM-LoRA ([R] section 4), for adapters of `diffora.attach` and for a
      LoRA of PEFT. ``DifforaCallback(penalty=1e-3, mask_rank="half")`` is RM-LoRA as in ``method=rm_lora``.
    - PEFT's calls for AdaLoRA, and the number of steps in its configuration.

    The penalty counts once in each optimiser step, before gradients are clipped. No reported loss contains it. A
    training that resumes from a checkpoint goes on as if it had never stopped.

    Args:
        penalty: λ, the weight of the distance of every A and B from orthonormality; 0 for none.
        penalty_form: ``squared`` ([R] eq. 10), or ``mean_norm`` (the released code).
        mask_rank: the number of directions of each adapter that a step trains, ``half`` of them, or None for all.
        mask_every: draw directions for each ``step`` ([R] Algorithm 1) or each ``epoch``.
        mask_independent: draw the directions of B independently of A's.
        mask_target: ``gradient``: masked entries get no gradient, but momentum still moves them; ``update``: they do
            not move.
        mask_start: the first masked step.
        seed: of the masks; None for the seed of the `TrainingArguments`.

    Raises:
        UserError: an argument is impossible, or, when the `Trainer` is made, the model has no adapters that these
            arguments fit.
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
        self._penalty: Any = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the model, before anything is trained."""
        model = kwargs["model"]
        check_training(args, self.extras.mask_rank is not None)
        check_adapters(model, self.extras)
        if shares_pairs(model):
            if not hasattr(model, "save_pretrained") and args.save_strategy != "no":
                raise UserError(
                    f"Trainer cannot save shared pairs of a {type(model).__name__}, which is no transformers model: "
                    'use save_strategy="no" and diffora.save_adapter after the training, or attach without shared_rank='
                )
            load_shared_once(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        check_training(args, self.extras.mask_rank is not None)
        self._seed = args.seed if self.seed is None else self.seed
        self._adaptation = adaptation_of(kwargs["model"], self.extras, self._seed)
        self._adaptation.begin(state.max_steps)
        if state.global_step:
            self._resume(state, kwargs["optimizer"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the masks, and start the gradients with that of the penalty."""
        assert self._adaptation is not None
        self._adaptation.before_step(state.global_step, int(state.epoch))
        scaler = getattr(kwargs["optimizer"], "scaler", None)
        self._penalty = add_penalty(self._adaptation, kwargs["model"], 1.0 if scaler is None else scaler.get_scale())

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._adaptation is not None
        optimizer = kwargs["optimizer"]
        self._adaptation.after_step(state.global_step, optimizer.param_groups[0]["lr"])
        if isinstance(self._adaptation, TrainedAdaLoRA):
            self._adaptation.keep_averages(optimizer)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the penalty of the last step to what is printed and to ``trainer.state.log_history``."""
        if self._penalty is not None and "loss" in kwargs["logs"]:
            kwargs["logs"]["penalty"] = state.log_history[-1]["penalty"] = round(self._penalty.item(), 6)

    def state(self) -> dict[str, Any]:
        """What a checkpoint's ``trainer_state.json`` holds of this callback."""
        args = {**vars(self.extras), "seed": self._seed}
        return {"args": args, "attributes": {"memory": self._adaptation.state() if self._adaptation else {}}}

    def _resume(self, state: Any, optimizer: Any) -> None:
        """Continue from a checkpoint.

        Raises:
            UserError: it was made without this callback, or with other arguments.
        """
        assert self._adaptation is not None
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved is None:
            raise UserError("this checkpoint was made without DifforaCallback: leave it out, or start a new training")
        if isinstance(saved, list):
            raise UserError("give the Trainer one DifforaCallback, not several")
        if problems := changed(saved["args"], self.state()["args"]):
            raise UserError(problems)
        self._adaptation.load_state(saved["attributes"]["memory"])
        if isinstance(self._adaptation, TrainedAdaLoRA):
            self._adaptation.recall_averages(optimizer)


def check_training(args: Any, masked: bool) -> None:
    """Refuse trainings in which a process does not hold the adapters as whole tensors.

    Raises:
        UserError: FSDP, DeepSpeed and the like, or masks with several GPUs in one process.
    """
    from accelerate.state import AcceleratorState

    kind = AcceleratorState().distributed_type.value
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise UserError(
            f"DifforaCallback needs whole adapters and gradients in every process, which {kind} does not keep: train "
            "with DDP (torchrun) instead"
        )
    if args.n_gpu > 1 and masked:
        raise UserError(
            f"Trainer would divide each batch among {args.n_gpu} GPUs in one process (DataParallel), where mask_rank= "
            "does not work: start with torchrun, or set CUDA_VISIBLE_DEVICES to one GPU"
        )
