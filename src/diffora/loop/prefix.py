"""``trainer.cache_prefix=true``: the layers below the lowest trained one are computed once for all epochs.

They run without autograd and in evaluation mode, thus without their dropout, and what they give for each row is kept in
a file (`diffora.loop.states`). In every epoch, the model's own forward pass gets it from there (`diffora.core.prefix`).
"""

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn

from diffora.backbones.precision import AUTOCAST, HALF
from diffora.core.model import device_of
from diffora.core.prefix import Prefix, lowest_trained, put_into, stack_members
from diffora.errors import UserError, first_line
from diffora.files import remove_leftovers
from diffora.loop import predict
from diffora.loop.parts import Parts
from diffora.loop.states import (
    States,
    Width,
    batch_of,
    computed,
    facts_of,
    facts_of_rows,
    n_tokens,
    real_length,
    real_tokens,
    tried_rows,
    width_of,
    write_states,
)
from diffora.places import default_cache_dir
from diffora.tasks.cache import cached, file_of

log = logging.getLogger(__name__)

KEY = "trainer.cache_prefix=true"
KIND = "prefix"
"""Name of the folder in the cache."""
SAID = {"search": "search", "finetune": "fine-tune"}
"""The stages as they are called on the screen."""
GB = 10**9
SAME = {True: 0.05, False: 1e-3}
"""The largest relative difference of two computations of the same states, in half precision and otherwise."""

Precision = Callable[[], AbstractContextManager[Any]]
"""Makes a context in which the model computes in the precision of the run."""


class CachedPrefix:
    """The cached prefix of one stage. A context manager: inside, the model's layers can return what is cached.

    Args:
        parts: of the run. ``parts.prefix`` gets facts for the record.
        stage: "search" or "finetune".
        splits: the encoded splits that the stage reads more than once, by name.
    """

    def __init__(self, parts: Parts, stage: str, splits: Mapping[str, datasets.Dataset]) -> None:
        self.parts, self.stage, self.splits = parts, stage, splits
        self.states: dict[str, States] = {}
        self._prefix: Prefix | None = None
        self._installed = ExitStack()

    def __enter__(self) -> "CachedPrefix":
        return self

    def __exit__(self, *error: object) -> None:
        self._installed.close()

    @property
    def noted(self) -> dict[str, Any] | None:
        """The facts about this stage's prefix; None before they are known, and if nothing is cached."""
        return self.parts.prefix.get(self.stage)

    def note(self, facts: dict[str, Any] | None) -> None:
        """Give the facts about this stage's prefix to the record."""
        if facts is not None:
            self.parts.prefix[self.stage] = facts

    def given(self, split: str, batch: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Inside, the layers return the cached states of a batch; they compute them if the split is not cached."""
        if self._prefix is None or split not in self.states:
            return nullcontext()
        states, device = self.states[split], batch["row"].device
        tokens, lengths = states.of(batch["row"].tolist())
        mask = real_tokens(dict(batch), lengths).to(device, non_blocking=True)
        return self._prefix.returning(put_into(mask, tokens.to(device, states.width.dtype, non_blocking=True)))

    def prepare(self, precision: Precision) -> None:
        """Find the frozen layers, and compute and write their output where no file has it. Call it once, in training.

        Raises:
            UserError: the files are too large, or cannot be written.
        """
        began, model = time.monotonic(), self.parts.model
        members = stack_members(model, self.parts.grid.layers)
        lowest = lowest_trained(members)
        training, prefix = model.training, Prefix(members[:lowest])
        # A compiled forward pass could not end behind the prefix.
        eager = torch.compiler.set_stance("force_eager") if self.parts.settings.trainer.compile else nullcontext()
        try:
            model.eval()
            with eager, torch.no_grad(), precision(), torch.random.fork_rng(_random_devices(model)):
                if lowest == 0 or _depends_on_trained(self.parts, prefix):
                    log.warning(f"{SAID[self.stage]}: {KEY} saves nothing: {_trained(model, members[0])}")
                    return
                needed = self._compute(prefix, members)
        finally:
            model.train(training)
        self._prefix = prefix
        self._installed.enter_context(prefix.installed())
        seconds = round(time.monotonic() - began, 3)
        self.note({"layers": lowest, "of": len(members), "bytes": needed, "seconds": seconds})

    def _compute(self, prefix: Prefix, members: list[nn.Module]) -> int:
        """Make or open the files. Returns their size in bytes."""
        parts, n = self.parts, len(prefix.layers)
        width = width_of(parts, prefix)
        common = facts_of(parts, prefix, members[n:], width)
        facts = {name: common | facts_of_rows(parts, encoded) for name, encoded in self.splits.items()}
        present = [file for each in facts.values() if (file := file_of(KIND, each)).exists()]
        needed = check_size(parts, self.splits, width, present)
        which = f"layer 1 of {len(members)} is" if n == 1 else f"layers 1 to {n} of {len(members)} are"
        done = ", by an earlier run" if len(present) == len(facts) else ""
        log.info(f"{SAID[self.stage]}: {which} frozen: computed once, {_size(needed)} in {_folder()}{done}")
        for name, encoded in self.splits.items():

            def write(file: Path, encoded: datasets.Dataset = encoded) -> None:
                write_states(file, parts, prefix, width, encoded)

            states = States(cached(KIND, facts[name], write), width)
            if not _is_now(parts, prefix, encoded, states):
                file = file_of(KIND, facts[name])
                log.warning(f"{file} has other states than the frozen layers give now: writing it again")
                file.unlink(missing_ok=True)  # a run that reads it keeps it
                states = States(cached(KIND, facts[name], write), width)
            self.states[name] = states
        return needed


def cached_splits(parts: Parts) -> dict[str, datasets.Dataset]:
    """The splits that fine-tuning reads in each epoch, by name."""
    splits = {"train": parts.data.train.encoded}
    # A task with an evaluation of its own may run the model on other inputs, as to generate text.
    if parts.task.single_pass:
        splits |= {name: split.encoded for name, split in parts.data.validation.items()}
    return splits


# --- checks before the run ---


def check_prefix(parts: Parts) -> None:
    """Check, before anything is computed, that the prefix of this model can be cached for these rows.

    Raises:
        UserError: the layers are not one stack, or mix rows; a row does not always give the same inputs; the files
            would be too large.
    """
    model, home, training = parts.model, device_of(parts.model), parts.model.training
    device = predict.accelerator_device(parts.settings.trainer.accelerator)
    dtype = AUTOCAST.get(parts.settings.trainer.precision)
    try:
        members = stack_members(model, parts.grid.layers)
        if len(members) < 2:
            raise UserError(f"{type(model).__name__} has one layer only")
        _check_augmentation(parts)
        model.to(device).eval()
        autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
        with torch.no_grad(), torch.random.fork_rng(_random_devices(model)):
            prefix = Prefix(members[:-1])
            with autocast:
                width = width_of(parts, prefix)
            # Without autocast, whose rounding could hide a difference.
            _check_rows_are_apart(parts, prefix, Prefix(members[-1:]), width)
        # Which files the run needs is not known yet. All that are there may be among them.
        check_size(parts, cached_splits(parts), width, list(_folder().glob("*.arrow")))
    except UserError as error:
        raise UserError([f"{KEY}: {problem}" for problem in error.problems]) from error
    finally:
        model.to(home).train(training)


def check_size(parts: Parts, splits: Mapping[str, datasets.Dataset], width: Width, present: Sequence[Path]) -> int:
    """The size of the files of some splits, in bytes.

    Args:
        present: files that need no more space, because they are there already.

    Raises:
        UserError: the size is more than the limit, or what is missing is more than what is free on the disk.
    """
    rows, tokens = sum(map(len, splits.values())), sum(n_tokens(encoded, width) for encoded in splits.values())
    needed, limit, folder = tokens * width.bytes, parts.settings.trainer.cache_prefix_limit, _folder()
    remove_leftovers(folder)  # what a killed run has left takes space
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    what = (
        f"the output of the frozen layers takes {_size(needed)} ({rows:,} rows, {tokens:,} tokens of {width.size} "
        f"numbers in {str(width.stored).removeprefix('torch.')})"
    )
    if needed > limit * GB:
        half = "" if width.stored in HALF else ", trainer.precision=bf16-mixed for half of it"
        raise UserError(
            f"{what}, more than trainer.cache_prefix_limit={limit:g} GB; {folder} has {_size(free)} free. Give a "
            f"higher limit, a smaller task.max_train_rows{half}, or trainer.cache_prefix=false"
        )
    if needed - sum(file.stat().st_size for file in present) > free:
        raise UserError(
            f"{what}, and {folder} has {_size(free)} free: choose another folder with the environment variable "
            "DIFFORA_CACHE"
        )
    return needed


def _folder() -> Path:
    return default_cache_dir() / KIND


def _size(n_bytes: int) -> str:
    return f"{n_bytes / GB:.1f} GB" if n_bytes >= GB else f"{n_bytes / 10**6:.1f} MB"


def _check_augmentation(parts: Parts) -> None:
    """Refuse rows that give other inputs in each epoch, or other ones in training than in evaluation."""
    rows, encoded, task = tried_rows(parts.data.train.encoded), parts.data.train.encoded, parts.task
    expected = task.inputs(parts.data.collate_eval(encoded[rows]))
    with torch.random.fork_rng([]):  # around all epochs, because a collate function may draw from torch's generator
        for epoch in range(4):
            found = task.inputs(parts.data.collate(encoded[rows] | {"draw": (parts.settings.seed, 0, epoch)}))
            if found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found):
                continue
            plain = "task.augment.crop_area=null task.augment.flip=false task.augment.shift=0"
            advice = f"; with {plain} they are the same" if hasattr(parts.settings.task, "augment") else ""
            raise UserError(
                f"task={task.name} gives other inputs for the same row in each epoch, or in training than in "
                f"evaluation, such as varied images{advice}"
            )


def _check_rows_are_apart(parts: Parts, prefix: Prefix, top: Prefix, width: Width) -> None:
    """Refuse a model whose states of a row depend on other rows or on padding, or are used in other places too.

    Args:
        prefix: all layers but the last.
        top: the last layer.
    """
    model, task, encoded = parts.model, parts.task, parts.data.train.encoded
    device, name, rows = device_of(model), type(model).__name__, tried_rows(encoded)
    alone = torch.cat([computed(parts, prefix, width, encoded, [row]) for row in rows])
    most = SAME[alone.dtype in HALF]
    if _difference(computed(parts, prefix, width, encoded, rows), alone) > most:
        raise UserError(
            f"{name} does not keep the rows of a batch apart: what its layers give for a row depends on the other "
            "rows, or on padding"
        )
    batch = batch_of(parts, encoded, rows, device)
    mask = real_tokens(batch, [real_length(encoded, row, width) for row in rows]).to(device)

    def above() -> tuple[Tensor, Tensor]:
        """What is above the prefix: the states of the last layer, and the loss."""
        return computed(parts, top, width, encoded, rows), task.loss(model(**task.inputs(batch)), batch)

    plain = above()
    try:
        with prefix.installed(), prefix.returning(put_into(mask, alone)):
            replaced = above()
    except Exception as error:  # whatever a model does with what its layers did not return
        raise UserError(f"{name} does not run without its lower layers: {first_line(error)}") from error
    if any(_difference(*both) > most for both in zip(replaced, plain, strict=True)):
        raise UserError(f"{name} uses what its lower layers give in other places than the layers above")


def _is_now(parts: Parts, prefix: Prefix, encoded: datasets.Dataset, states: States) -> bool:
    """Whether a few rows of a file have the states that the layers give now.

    The name of a file covers what a model and its inputs usually depend on. This check covers the rest, such as hooks,
    settings of a method's own layers, and code that came with a checkpoint.
    """
    width, rows = states.width, tried_rows(encoded)
    now = computed(parts, prefix, width, encoded, rows).to(width.stored).cpu()
    half = parts.settings.trainer.precision in AUTOCAST or width.stored in HALF
    return _difference(states.of(rows)[0], now) <= SAME[half]


def _difference(value: Tensor, reference: Tensor) -> float:
    """The relative difference of two tensors; infinite if it is not a number."""
    if value.shape != reference.shape:
        return float("inf")
    found = float((value.double() - reference.double()).norm() / reference.double().norm().clamp(min=1e-6))
    return float("inf") if found != found else found


def _random_devices(model: nn.Module) -> list[torch.device]:
    """GPUs whose random state is kept beside that of the CPU."""
    device = device_of(model)
    return [device] if device.type == "cuda" else []


# --- what is trained ---


def _depends_on_trained(parts: Parts, prefix: Prefix) -> bool:
    """Whether the output of the frozen layers depends on trained parameters.

    These may be embeddings, or a module between two layers, such as DeBERTa's convolution.
    """
    encoded = parts.data.train.encoded
    batch = batch_of(parts, encoded, tried_rows(encoded)[:1], device_of(parts.model))
    with torch.enable_grad():
        return prefix.output(lambda: parts.model(**parts.task.inputs(batch))).requires_grad


def _trained(model: nn.Module, first: nn.Module) -> str:
    """What is trained at the lower end, in words."""
    own = {id(p) for p in first.parameters()}
    names = [name for name, p in model.named_parameters() if p.requires_grad and id(p) in own]
    if names:
        return f"the lowest layer is trained ({names[0]}), so no layer below is frozen"
    return "what the frozen layers give depends on trained parameters outside of them, such as embeddings"
