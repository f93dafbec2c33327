"""Checkpoints that survive a killed process: written atomically, verified by name, small, and exact to resume from.

A checkpoint is written at the end of each epoch of Lightning: in a search a round, in fine-tuning what lies between two
evaluations. Its name ends with the digest of its content, ``finetune-0003-1a2b3c4d5e6f.ckpt``, so damage is detected.
It holds the trainable weights, the optimisers, the schedule, the random state of each process and the stage's state
(history, best weights, trajectory of Γ). It does not hold the frozen backbone. The order of batches needs no state,
because it depends only on seed and epoch (`diffora.loop.samplers`). A checkpoint also records what it was made with:
settings, data and backbone (`diffora.digests.made_with`). Only a run with the same settings, data and backbone can
continue from it (`diffora.loop.resume`).
"""

import logging
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from diffora.errors import UserError
from diffora.files import atomic, file_digest

log = logging.getLogger(__name__)

KEEP = 2
"""Undamaged checkpoints to keep of each stage."""
PARTS = ("epoch", "global_step", "loops", "state_dict", "optimizer_states", "lr_schedulers", "diffora", "made_with")
"""Keys that a checkpoint must have."""
OURS = ("rng", "elapsed", "state")
"""Keys that its part ``diffora`` must have, which `diffora.loop.stage.Stage` writes."""


class DigestCheckpointIO(TorchCheckpointIO):
    """Lightning's file format, written atomically under a name that ends with the digest of the content."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        with atomic(path) as scratch:
            torch.save(checkpoint, scratch)
            final = path.with_name(f"{path.stem}-{_digest(scratch)}.ckpt")
        path.rename(final)
        for other in path.parent.glob(f"{path.stem}-*.ckpt"):  # the same epoch: damaged, or written before a resume
            if other != final:
                other.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: Any = True) -> dict[str, Any]:
        return super().load_checkpoint(path, map_location, weights_only=True)  # even if Lightning passes False


def _digest(file: Path) -> str:
    return file_digest(file)[:12]


def _newest_first(folder: Path, stage: str) -> list[Path]:
    """The checkpoints of a stage, the newest first. Files without a digest in their name are included."""
    found = []
    for file in folder.glob(f"{stage}-*.ckpt"):
        if match := re.fullmatch(rf"{stage}-(\d+)(-[0-9a-f]+)?\.ckpt", file.name):
            found.append((int(match[1]), file))
    return [file for _, file in sorted(found, reverse=True)]


def _is_whole(file: Path) -> bool:
    """Whether a file's content has the digest in its name."""
    try:
        return file.stem.endswith(f"-{_digest(file)}")
    except (OSError, UserError):
        return False


def newest_checkpoint(folder: Path, stage: str) -> tuple[Path, dict[str, Any]] | None:
    """The newest undamaged checkpoint of a stage and its content, or None. The log names damaged ones.

    Raises:
        UserError: the file is undamaged, but cannot be loaded.
    """
    for file in _newest_first(folder, stage):
        if file.stem.count("-") < 2:
            continue  # the process was killed before renaming it; the epoch will be written again
        if _is_whole(file):
            with continuing(file):
                return file, torch.load(file, map_location="cpu", weights_only=True)
        log.warning("checkpoint %s is damaged: using the one before it", file)
    return None


@contextmanager
def continuing(file: Path) -> Iterator[None]:
    """Turn every error about the content of an undamaged checkpoint into a UserError with one message."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, EOFError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error).strip().splitlines()[:1]
        raise _not_ours(file, reason if isinstance(reason, str) else (reason or [type(error).__name__])[0]) from error
    except pickle.UnpicklingError as error:
        raise _not_ours(file, "it holds other things than weights and numbers") from error


def _not_ours(file: Path, reason: str) -> UserError:
    return UserError(
        f"{file} is not a checkpoint that this run can continue from: {reason}. Remove it, or choose another folder"
    )


def check_content(content: Any) -> None:
    """Raise a ValueError if a checkpoint lacks anything that a run needs to continue."""
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}")
    if missing := [name for name in PARTS if name not in content]:
        raise ValueError(f"it has no {', '.join(missing)}")
    ours, state = content["diffora"], content["state_dict"]
    if not isinstance(ours, dict) or (missing := [name for name in OURS if name not in ours]):
        raise ValueError(f"it has no {', '.join(missing or OURS)}")
    right = {
        "epoch": type(content["epoch"]) is int and content["epoch"] >= 0,
        "elapsed": isinstance(ours["elapsed"], int | float),
        "rng": isinstance(ours["rng"], list) and bool(ours["rng"]),
        "state": isinstance(ours["state"], dict),
        "made_with": _is_complete(content["made_with"]),
        "state_dict": isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values()),
    }
    if wrong := [name for name, fine in right.items() if not fine]:
        raise ValueError(f"its {', '.join(wrong)} cannot be right")


def _is_complete(made_with: Any) -> bool:
    """Whether a record has all parts of `diffora.digests.made_with`, except ``inputs``, which it may lack."""
    kinds = {"settings": dict, "data": str, "rows": dict, "backbone": dict | None}
    return isinstance(made_with, dict) and all(
        name in made_with and isinstance(made_with[name], kind) for name, kind in kinds.items()
    )


class Checkpoints(Checkpoint):
    """Writes a checkpoint at the end of each epoch of Lightning, if it is due, and keeps the newest two undamaged ones.

    It is a Lightning `Checkpoint`, so that it runs after the module's own hooks.

    Args:
        folder: where checkpoints go.
        stage: name of the stage.
        made_with: from `diffora.digests.made_with`.
    """

    def __init__(self, folder: Path, stage: str, made_with: Mapping[str, Any]) -> None:
        self.folder, self.stage, self.made_with = folder, stage, made_with

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not pl_module.checkpoint_due:
            return
        trainer.save_checkpoint(self.folder / f"{self.stage}-{trainer.current_epoch + 1:04d}.ckpt")
        if trainer.is_global_zero:
            prune(self.folder, self.stage)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["made_with"] = self.made_with


def prune(folder: Path, stage: str) -> None:
    """Remove all files older than the newest `KEEP` undamaged checkpoints. Damaged ones do not count."""
    kept = 0
    for file in _newest_first(folder, stage):
        if kept == KEEP:
            file.unlink(missing_ok=True)
        else:
            kept += _is_whole(file)
