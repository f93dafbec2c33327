"""Checkpoints that survive being killed: written atomically, verified by name, small, exact to resume from.

A checkpoint is written at the end of each epoch (a search's epoch is a round). Its name ends in the digest of its
content, ``finetune-0003-1a2b3c4d5e6f.ckpt``, so a damaged file betrays itself. It holds the trainable weights, the
optimisers, the schedule, the random state of each process and what the stage keeps in mind (history, best epoch,
gamma trajectory); the frozen backbone is not in it. The order of batches needs no state: it is a function of seed and
epoch (`diffora.training.data`).
"""

import hashlib
import logging
import random
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn

from diffora.core.peers import rehearse
from diffora.files import atomic

log = logging.getLogger(__name__)

KEEP = 2
WATCHED = 25
"""After so many steps at the latest a loss that is not finite stops the run, on a CPU at once."""


class DigestCheckpointIO(TorchCheckpointIO):
    """Lightning's file format, put in place atomically under a name that carries its digest."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        with atomic(path) as scratch:
            torch.save(checkpoint, scratch)
            digest = _digest(scratch)
        path.rename(path.with_name(f"{path.stem}-{digest}.ckpt"))


def newest_checkpoint(folder: Path, stage: str) -> tuple[Path, dict[str, Any]] | None:
    """The newest undamaged checkpoint of a stage and its content, or None. Damaged ones are named in the log."""
    files = sorted(folder.glob(f"{stage}-*.ckpt"), reverse=True)
    for file in files:
        match = re.fullmatch(rf"{stage}-\d+-([0-9a-f]+)\.ckpt", file.name)
        if match is None:
            continue  # killed between writing and naming: the same epoch will be written again
        if _digest(file) == match[1]:
            return file, torch.load(file, map_location="cpu", weights_only=True)
        log.warning("checkpoint %s is damaged: using the one before it", file)
    return None


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:12]


class Checkpoints(Checkpoint):
    """Writes a checkpoint at the end of each epoch and keeps the newest two.

    A Lightning `Checkpoint`, so that it runs after the module's own hooks.
    """

    def __init__(self, folder: Path, stage: str) -> None:
        self.folder, self.stage = folder, stage

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.folder / f"{self.stage}-{trainer.current_epoch + 1:04d}.ckpt")
        if trainer.is_global_zero:
            for old in sorted(self.folder.glob(f"{self.stage}-*.ckpt"))[:-KEEP]:
                old.unlink()


class Stage(L.LightningModule):
    """What search and fine-tuning have in common: a wrapped backbone, and checkpoints of trainable weights only.

    Args:
        model: the adapted backbone.
        seed: of the run.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        super().__init__()
        self.model = model
        self.seed = seed
        self.elapsed = 0.0
        self.first_step_at: float | None = None
        self._rng: list[dict[str, Any]] | None = None
        self._watched: list[Tensor] = []
        self._rehearsed = False

    @property
    def strict_loading(self) -> bool:
        return False

    @strict_loading.setter
    def strict_loading(self, value: bool) -> None:
        raise AttributeError("checkpoints hold trainable weights only")

    def trainable_names(self) -> list[str]:
        """Fixed at the start of the stage: a step that toggles ``requires_grad`` does not change what is saved."""
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    def setup(self, stage: str) -> None:
        self.setup_names()

    def memory(self) -> dict[str, Any]:
        """What the stage keeps in mind besides weights, as plain containers."""
        raise NotImplementedError

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Undo `memory`."""
        raise NotImplementedError

    def setup_names(self) -> None:
        """Fix which parameters are trainable, at the start of the stage."""
        self._names = self.trainable_names()

    def over(self, epochs_done: int, epochs: int) -> bool:
        """Whether the stage has nothing left to do after so many epochs."""
        return epochs_done >= epochs

    def restore_if_over(self, checkpoint: Mapping[str, Any], epochs: int) -> bool:
        """Take a checkpoint's state over if its stage was at its end; says whether it was."""
        self.recall(checkpoint["diffora"]["memory"])
        if not self.over(checkpoint["epoch"] + 1, epochs):
            return False
        self.setup_names()
        self.load_trainable(checkpoint["state_dict"])
        self.elapsed = checkpoint["diffora"]["elapsed"]
        return True

    def on_fit_start(self) -> None:
        # Each process has its own dropout masks. Lightning leaves train/eval modes as they are, and a model from
        # `from_pretrained` is in eval mode.
        torch.manual_seed(self.seed * 1009 + self.global_rank)
        self.train()
        self._started = time.monotonic() - self.elapsed

    def on_train_epoch_start(self) -> None:
        if self._rng is not None:
            _restore_rng(self._rng[self.global_rank])
            self._rng = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.first_step_at is None:
            self.first_step_at = time.time()

    def rehearse(self, inputs: Mapping[str, Any]) -> None:
        """Once in a process, before its first step: a run that is resumed then computes as one that never stopped."""
        if not self._rehearsed:
            rehearse(self.model, **inputs)
            self._rehearsed = True

    def watch(self, loss: Tensor) -> None:
        """Keep a loss for `raise_on_fault`, which looks later, so that a GPU need not be waited for."""
        self._watched.append(loss.detach())

    def raise_on_fault(self) -> None:
        """Stop the run if any loss since the last call was not finite; no checkpoint of it is written."""
        losses, self._watched = self._watched, []
        if losses and not bool(torch.stack(losses).isfinite().all()):
            raise NonFiniteLoss(self.current_epoch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.device.type == "cpu" or len(self._watched) >= WATCHED:
            self.raise_on_fault()

    def on_train_epoch_end(self) -> None:
        self.raise_on_fault()
        self.elapsed = time.monotonic() - self._started

    def trainable_state(self) -> dict[str, Tensor]:
        """The trainable weights by name, on the CPU."""
        parameters = dict(self.named_parameters())
        return {name: parameters[name].detach().cpu().clone() for name in self._names}

    def load_trainable(self, state: Mapping[str, Tensor]) -> None:
        """Undo `trainable_state`."""
        parameters = dict(self.named_parameters())
        with torch.no_grad():
            for name, value in state.items():
                parameters[name].copy_(value)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.trainable_state()
        states: list[Any] = [_rng_state()]
        if self.trainer.world_size > 1:
            states = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(states, _rng_state())
        checkpoint["diffora"] = {"rng": states, "elapsed": self.elapsed, "memory": self.memory()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        ours = checkpoint["diffora"]
        self.recall(ours["memory"])
        self.elapsed = ours["elapsed"]
        self._started = time.monotonic() - self.elapsed
        if len(ours["rng"]) == self.trainer.world_size:
            self._rng = ours["rng"]


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite in ``epoch`` (from 0)."""

    def __init__(self, epoch: int) -> None:
        super().__init__(f"the loss is not finite in epoch {epoch + 1}")
        self.epoch = epoch


def _rng_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "python": list(random.getstate()),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
