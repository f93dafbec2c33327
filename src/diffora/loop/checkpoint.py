"""Checkpoints that survive being killed: written atomically, verified by name, small, exact to resume from.

A checkpoint is written at the end of each epoch (a search's epoch is a round). Its name ends in the digest of its
content, ``finetune-0003-1a2b3c4d5e6f.ckpt``, so a damaged file betrays itself. It holds the trainable weights, the
optimisers, the schedule, the random state of each process and what the stage keeps in mind (history, best epoch,
gamma trajectory); the frozen backbone is not in it. The order of batches needs no state: it is a function of seed and
epoch (`diffora.loop.data`). It also says what it was made with: settings, data and backbone
(`diffora.digests.made_with`), and only a run with the same goes on from it (`earlier`).
"""

import hashlib
import json
import logging
import pickle
import random
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn

from diffora import digests
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.files import atomic, file_digest, read_json, write_text

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
            final = path.with_name(f"{path.stem}-{_digest(scratch)}.ckpt")
        path.rename(final)
        for other in path.parent.glob(f"{path.stem}-*.ckpt"):  # of the same epoch: damaged, or from before a resume
            if other != final:
                other.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: Any = True) -> dict[str, Any]:
        return super().load_checkpoint(path, map_location, weights_only=True)  # whatever Lightning asks for


def _digest(file: Path) -> str:
    return file_digest(file)[:12]


def _newest_first(folder: Path, stage: str) -> list[Path]:
    """The checkpoints of a stage, and what was killed before its name was complete."""
    found = []
    for file in folder.glob(f"{stage}-*.ckpt"):
        if match := re.fullmatch(rf"{stage}-(\d+)(-[0-9a-f]+)?\.ckpt", file.name):
            found.append((int(match[1]), file))
    return [file for _, file in sorted(found, reverse=True)]


def _is_whole(file: Path) -> bool:
    try:
        return file.stem.endswith(f"-{_digest(file)}")
    except (OSError, UserError):
        return False


def newest_checkpoint(folder: Path, stage: str) -> tuple[Path, dict[str, Any]] | None:
    """The newest undamaged checkpoint of a stage and its content, or None. Damaged ones are named in the log.

    Raises:
        UserError: it is undamaged, but not one of ours.
    """
    for file in _newest_first(folder, stage):
        if file.stem.count("-") < 2:
            continue  # killed between writing and naming: the same epoch will be written again
        if _is_whole(file):
            with continuing(file):
                return file, torch.load(file, map_location="cpu", weights_only=True)
        log.warning("checkpoint %s is damaged: using the one before it", file)
    return None


def has_work(folder: Path) -> bool:
    """Whether a run directory holds anything that a run would go on from."""
    return any((folder / "checkpoints").glob("*.ckpt")) or (folder / "search.json").is_file()


@contextmanager
def continuing(file: Path) -> Iterator[None]:
    """Turns what goes wrong with the content of an undamaged checkpoint into one message."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, EOFError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error).strip().splitlines()[:1]
        raise _not_ours(file, reason if isinstance(reason, str) else (reason or [type(error).__name__])[0]) from error
    except pickle.UnpicklingError as error:
        raise _not_ours(file, "it holds other things than weights and numbers") from error


def _not_ours(file: Path, reason: str) -> UserError:
    return UserError(
        f"{file} is not a checkpoint that this run can go on from: {reason}. Remove it, or choose another folder"
    )


PARTS = ("epoch", "global_step", "loops", "state_dict", "optimizer_states", "lr_schedulers", "diffora", "made_with")
OURS = ("rng", "elapsed", "memory")


def _check_content(content: Any) -> None:
    """Raises a ValueError unless a checkpoint has all that a run goes on from."""
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
        "memory": isinstance(ours["memory"], dict),
        "made_with": _says_enough(content["made_with"]),
        "state_dict": isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values()),
    }
    if wrong := [name for name, fine in right.items() if not fine]:
        raise ValueError(f"its {', '.join(wrong)} cannot be right")


def _says_enough(made_with: Any) -> bool:
    kinds = {"settings": dict, "data": str, "rows": dict, "backbone": dict | None}
    return isinstance(made_with, dict) and all(
        name in made_with and isinstance(made_with[name], kind) for name, kind in kinds.items()
    )


@dataclass
class Earlier:
    """What a run directory holds of an earlier attempt, and a run takes over.

    Attributes:
        checkpoints: by stage, the newest undamaged one and its content.
        search: the selection that a finished search or score left, and its seconds.
    """

    checkpoints: dict[str, tuple[Path, dict[str, Any]]] = field(default_factory=dict)
    search: tuple[Selection, float] | None = None


def earlier(folder: Path, made_with: Mapping[str, Any]) -> Earlier:
    """What is left of an earlier attempt in a run directory, made with the same settings, data and backbone.

    Raises:
        UserError: it was made with others, which are named; or it is not ours.
    """
    found = Earlier()
    search, made = _finished_search(folder)
    found.search = search
    origins = {} if made is None else {folder / SEARCH: made}
    for stage in ("finetune",) if search else ("search", "finetune"):
        if (newest := newest_checkpoint(folder / "checkpoints", stage)) is not None:
            with continuing(newest[0]):
                _check_content(newest[1])
            found.checkpoints[stage] = newest
            origins[newest[0]] = newest[1]["made_with"]
    for file, origin in origins.items():
        if changed := digests.changes(origin, made_with):
            raise UserError(
                [
                    f"{file} was made with something else, and to go on takes the same. Undo the change, remove "
                    f"{folder}, or choose another folder with hydra.run.dir= (a sweep: hydra.sweep.dir=):",
                    *changed,
                ]
            )
    return found


SEARCH = "search.json"
"""Written last by a search: its seconds, what it was made with, the digests of the files that it left, and its own."""
LEFT = ("selection.json", "selection.safetensors", "trajectory.json")


def write_search(folder: Path, seconds: float, made_with: Mapping[str, Any]) -> None:
    """Say that a search or score is finished."""
    files = {name: file_digest(folder / name) for name in LEFT if (folder / name).is_file()}
    content = {"seconds": seconds, "files": files, "made_with": made_with}
    write_text(folder / SEARCH, json.dumps(content | {"digest": _content_digest(content)}) + "\n")


def _content_digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _finished_search(folder: Path) -> tuple[tuple[Selection, float] | None, dict[str, Any] | None]:
    """((selection, seconds), what they were made with), or None for each where no search was finished."""
    file = folder / SEARCH
    try:
        content = read_json(file)
    except FileNotFoundError:
        return None, None
    except UserError:
        content = None
    if not isinstance(content, dict) or content.pop("digest", None) != _content_digest(content):
        log.warning("%s is damaged: the search goes on from its checkpoint, or begins again", file)
        return None, None
    seconds, files, made = content["seconds"], content["files"], content["made_with"]
    if not all((folder / name).is_file() for name in ("selection.json", *files)):
        return None, None
    for name, digest in files.items():
        if file_digest(folder / name) != digest:
            if name == "trajectory.json":  # which is for reading only
                log.warning("%s is damaged: it is made anew from the search's last checkpoint", folder / name)
                return None, None
            raise UserError(
                f"{folder / name} is not as the search left it: it is damaged or edited. Remove it, and it is made "
                "anew from the search's last checkpoint; use an edited one in another run: method.selection=<a copy>"
            )
    return (Selection.load(folder / "selection.json"), seconds), made


class Checkpoints(Checkpoint):
    """Writes a checkpoint at the end of each epoch and keeps the newest two that are undamaged.

    A Lightning `Checkpoint`, so that it runs after the module's own hooks.
    """

    def __init__(self, folder: Path, stage: str, made_with: Mapping[str, Any]) -> None:
        self.folder, self.stage, self.made_with = folder, stage, made_with

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.folder / f"{self.stage}-{trainer.current_epoch + 1:04d}.ckpt")
        if trainer.is_global_zero:
            prune(self.folder, self.stage)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["made_with"] = self.made_with


def prune(folder: Path, stage: str) -> None:
    """Remove what is older than the newest undamaged checkpoints; a damaged one takes no good one's place."""
    kept = 0
    for file in _newest_first(folder, stage):
        if kept == KEEP:
            file.unlink(missing_ok=True)
        else:
            kept += _is_whole(file)


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
        self.begun = False
        """Whether all is restored and training has begun."""
        self._rng: list[dict[str, Any]] | None = None
        self._restored: dict[str, int] | None = None
        self._watched: list[Tensor] = []

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
        if self._restored is not None:  # Lightning would pass over those that are missing
            there: dict[str, Any] = {
                "optimizer_states": self.trainer.optimizers,
                "lr_schedulers": self.trainer.lr_scheduler_configs,
            }
            for name, own in there.items():
                if self._restored[name] != len(own):
                    raise ValueError(f"it has {self._restored[name]} {name}, not {len(own)}")

    def on_train_start(self) -> None:
        self.begun = True

    def on_train_epoch_start(self) -> None:
        if self._rng is not None:
            _restore_rng(self._rng[self.global_rank])
            self._rng = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.first_step_at is None:
            self.first_step_at = time.time()

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

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises a ValueError unless a `trainable_state` is one of this very model."""
        parameters = dict(self.named_parameters())
        names = set(self.trainable_names())
        for name in sorted(names ^ state.keys()):
            raise ValueError(f"{name} is trained {'here' if name in names else 'there'} only")
        for name, value in state.items():
            if value.shape != parameters[name].shape:
                raise ValueError(f"{name} is {tuple(value.shape)} there and {tuple(parameters[name].shape)} here")

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
        self._restored = {name: len(checkpoint[name]) for name in ("optimizer_states", "lr_schedulers")}
        self.recall(ours["memory"])
        self.elapsed = ours["elapsed"]
        self._started = time.monotonic() - self.elapsed
        if len(ours["rng"]) == self.trainer.world_size:
            self._rng = ours["rng"]
            now = _rng_state()
            _restore_rng(self._rng[self.global_rank])  # what is wrong with it shows here
            _restore_rng(now)
        else:
            log.warning(
                f"the checkpoint is of {len(ours['rng'])} process(es), this run has {self.trainer.world_size}: dropout "
                "is drawn anew, and the result will not be that of a run that never stopped"
            )


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite in ``epoch`` (from 0)."""

    def __init__(self, epoch: int, what: str = "loss") -> None:
        super().__init__(f"the {what} is not finite in epoch {epoch + 1}")
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
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
