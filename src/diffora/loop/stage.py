"""The Lightning module that search and fine-tuning are based on."""

import logging
import random
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from diffora.core.norms import keep_statistics, moving_statistics
from diffora.loop.prefix import CachedPrefix
from diffora.loop.sharded import Sharded

log = logging.getLogger(__name__)

WATCHED = 25
"""Steps after which losses are checked on a GPU; on a CPU they are checked after each step."""


class NonFiniteLoss(RuntimeError):
    """A loss became NaN or infinite.

    Args:
        epoch: the epoch, from 0.
        what: which loss.
    """

    def __init__(self, epoch: int, what: str = "loss") -> None:
        super().__init__(f"the {what} is not finite in epoch {epoch + 1}")
        self.epoch = epoch


class Stage(L.LightningModule):
    """Base class of search and fine-tuning: a backbone, and checkpoints that hold only the trainable weights.

    A subclass defines the steps, and `state` and `load_state` for what its checkpoints hold besides weights.

    Args:
        model: the adapted backbone.
        seed: the run's seed.

    Attributes:
        compiles: whether ``trainer.compile=true`` compiles the model in this stage.
        elapsed: seconds of training up to the last epoch, including earlier attempts.
        first_step_at: time of the first step, as `time.time` gives it; None before.
        begun: whether everything is restored and training has started.
        prefix: the cached output of the frozen layers (``trainer.cache_prefix=true``); None without it.
    """

    compiles: ClassVar[bool] = True
    prefix: CachedPrefix | None = None

    def __init__(self, model: nn.Module, seed: int) -> None:
        super().__init__()
        self.model = model
        self.seed = seed
        self.elapsed = 0.0
        self.first_step_at: float | None = None
        self.begun = False
        self._rng: list[dict[str, Any]] | None = None
        self._restored: dict[str, int] | None = None
        self._watched: list[Tensor] = []

    # --- what a subclass defines ---

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds besides weights, as plain containers."""
        raise NotImplementedError

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        raise NotImplementedError

    def over(self, epochs_done: int, epochs: int) -> bool:
        """Whether the stage is finished after so many epochs."""
        return epochs_done >= epochs

    @property
    def checkpoint_due(self) -> bool:
        """Whether to write a checkpoint at the end of the present epoch of Lightning."""
        return True

    @property
    def epoch_now(self) -> int:
        """The present epoch, from 0. Lightning's own may be a part of it."""
        return self.current_epoch

    def progress(self) -> tuple[float, float, int]:
        """For the progress bar: epochs done after the present one of Lightning, all epochs, and all batches."""
        epochs = self.trainer.max_epochs or 1
        return self.current_epoch + 1, epochs, epochs * int(self.trainer.num_training_batches)

    def given(self, batch: Mapping[str, Tensor], split: str = "train") -> AbstractContextManager[None]:
        """Inside, the model may take the output of its frozen layers for these rows from the cache."""
        return nullcontext() if self.prefix is None else self.prefix.given(split, batch)

    # --- trainable weights ---

    @property
    def strict_loading(self) -> bool:
        return False

    @strict_loading.setter
    def strict_loading(self, value: bool) -> None:
        raise AttributeError("checkpoints hold trainable weights only")

    def trainable_names(self) -> list[str]:
        """Names of the tensors that training changes now: parameters, and the statistics of trained batch norms."""
        trained = [name for name, parameter in self.named_parameters() if parameter.requires_grad]
        return [*trained, *moving_statistics(self)]

    def configure_model(self) -> None:
        """With ``trainer.strategy=fsdp``, divide the frozen weights among the processes."""
        if isinstance(strategy := self.trainer.strategy, Sharded):
            strategy.divide()

    def setup(self, stage: str) -> None:
        self.setup_names()

    def setup_names(self) -> None:
        """Remember which parameters are saved. A step may toggle ``requires_grad`` later without changing this."""
        self._names = self.trainable_names()

    def trainable_state(self) -> dict[str, Tensor]:
        """What training changes, by name, on the CPU: weights, and the statistics of trained batch norms."""
        tensors = self._tensors()
        return {name: tensors[name].detach().cpu().clone() for name in self._names}

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Raise a ValueError if the names or shapes of a `trainable_state` do not fit this model."""
        tensors = self._tensors()
        names = set(self.trainable_names())
        for name in sorted(names ^ state.keys()):
            raise ValueError(f"{name} is trained only {'in this run' if name in names else 'in the checkpoint'}")
        for name, value in state.items():
            if value.shape != tensors[name].shape:
                raise ValueError(
                    f"{name} is {tuple(value.shape)} in the checkpoint and {tuple(tensors[name].shape)} in this run"
                )

    def load_trainable(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `trainable_state` returned."""
        tensors = self._tensors()
        with torch.no_grad():
            for name, value in state.items():
                tensors[name].copy_(value)

    # --- checkpoints ---

    def restore_if_over(self, checkpoint: Mapping[str, Any], epochs: int) -> bool:
        """Restore the state of a checkpoint if the stage was finished there.

        Args:
            checkpoint: the content of a checkpoint.
            epochs: the stage's number of epochs.

        Returns:
            Whether the stage was finished.
        """
        self.load_state(checkpoint["diffora"]["state"])
        if not self.over(checkpoint["epoch"] + 1, epochs):
            return False
        self.setup_names()
        self.load_trainable(checkpoint["state_dict"])
        self.elapsed = checkpoint["diffora"]["elapsed"]
        if self.prefix is not None:
            self.prefix.note(checkpoint["diffora"].get("prefix"))
        return True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.trainable_state()
        states: list[Any] = [rng_state()]
        if self.trainer.world_size > 1:
            states = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(states, rng_state())
        checkpoint["diffora"] = {"rng": states, "elapsed": self.elapsed, "state": self.state()}
        if self.prefix is not None:
            checkpoint["diffora"]["prefix"] = self.prefix.noted

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        ours = checkpoint["diffora"]
        self._restored = {name: len(checkpoint[name]) for name in ("optimizer_states", "lr_schedulers")}
        self.load_state(ours["state"])
        self.elapsed = ours["elapsed"]
        self._started = time.monotonic() - self.elapsed
        if len(ours["rng"]) == self.trainer.world_size:
            self._rng = ours["rng"]
            now = rng_state()
            restore_rng(self._rng[self.global_rank])  # raises here if the state is not valid
            restore_rng(now)
        else:
            log.warning(
                f"the checkpoint is of {len(ours['rng'])} process(es), this run has {self.trainer.world_size}: dropout "
                "masks will differ, and the result will not be that of a run that never stopped"
            )

    def train(self, mode: bool = True) -> "Stage":
        """As in torch, but the statistics of frozen batch norms stay as they are."""
        super().train(mode)
        keep_statistics(self)
        return self

    # --- hooks of Lightning ---

    def on_fit_start(self) -> None:
        # Each process needs its own dropout masks. Lightning does not change train and eval modes, and a model from
        # `from_pretrained` is in eval mode.
        torch.manual_seed(self.seed * 1009 + self.global_rank)
        self.train()
        self._started = time.monotonic() - self.elapsed
        if self._restored is not None:  # Lightning ignores optimisers and schedules that a checkpoint lacks
            present: dict[str, Any] = {
                "optimizer_states": self.trainer.optimizers,
                "lr_schedulers": self.trainer.lr_scheduler_configs,
            }
            for name, own in present.items():
                if self._restored[name] != len(own):
                    raise ValueError(f"it has {self._restored[name]} {name}, this run needs {len(own)}")

    def on_train_start(self) -> None:
        self.begun = True
        if self.prefix is not None:
            self.prefix.prepare(self.trainer.precision_plugin.forward_context)

    def on_train_epoch_start(self) -> None:
        if self._rng is not None:
            restore_rng(self._rng[self.global_rank])
            self._rng = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.first_step_at is None:
            self.first_step_at = time.time()

    def watch(self, loss: Tensor) -> None:
        """Keep a loss for `raise_on_fault`. It checks several at once, so that steps do not wait for the GPU."""
        self._watched.append(loss.detach())

    def raise_on_fault(self) -> None:
        """Raise `NonFiniteLoss` if any loss since the last call is not finite, before a checkpoint is written."""
        losses, self._watched = self._watched, []
        if losses and not bool(torch.stack(losses).isfinite().all()):
            raise NonFiniteLoss(self.epoch_now)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.device.type == "cpu" or len(self._watched) >= WATCHED:
            self.raise_on_fault()

    def on_train_epoch_end(self) -> None:
        self.raise_on_fault()
        self.elapsed = time.monotonic() - self._started


def rng_state() -> dict[str, Any]:
    """The global random states of torch, numpy, Python, CUDA and MPS, in types that ``weights_only=True`` can load."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "python": list(random.getstate()),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Set the global random states to what `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
