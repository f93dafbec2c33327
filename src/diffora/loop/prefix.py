"""``trainer.cache_prefix=true``: the layers below the lowest trained one are computed once for all epochs.

What these layers give for each row is written to a file beside the token cache (`diffora.tasks.cache`), named by a hash
of everything it depends on, and mapped into memory. Only real tokens are written, so rows can be put together in any
batches. The layers run without autograd and in evaluation mode, thus without their dropout, in every epoch.
"""

import hashlib
import itertools
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffora.backbones.precision import AUTOCAST, HALF
from diffora.core.prefix import Prefix, lowest_trained, put_into, stack_members
from diffora.digests import default_cache_dir
from diffora.errors import UserError
from diffora.loop.data import rows_loader
from diffora.loop.parts import Parts
from diffora.loop.predict import device_of
from diffora.loop.samplers import Drawn
from diffora.tasks.base import Batch, Collate, Task
from diffora.tasks.cache import arrow_writer, cached

log = logging.getLogger(__name__)

FORMAT_VERSION = 1  # raise it when the content of a file changes its meaning
TOKENS = 4096
"""Tokens of a batch while the states are computed. The same in all runs, so that these compute the same numbers."""
GB = 10**9
TRIED = 4
"""Rows on which the model is tried before anything is computed."""
SAME = {True: 0.05, False: 1e-3}
"""The largest relative difference of two computations of the same states, in half precision and otherwise."""
KEY = "trainer.cache_prefix=true"


@dataclass(frozen=True)
class Width:
    """What the states of a token are: their number, their type in the model, and their type in the file."""

    size: int
    dtype: torch.dtype
    stored: torch.dtype
    tokens_per_length: float
    """Tokens of a row for each unit of its column ``length``: 1 for text, the patches of an image."""

    @property
    def bytes(self) -> int:
        """Bytes of a token in the file."""
        return self.size * self.stored.itemsize


class States:
    """The states of the rows of one split, in a file that is mapped into memory.

    Args:
        file: what `write_states` wrote.
        width: of the states.
    """

    def __init__(self, file: datasets.Dataset, width: Width) -> None:
        self.width, self._values = width, file.data.column("states")
        self._place = np.empty(len(file), dtype=np.int64)
        self._place[file.data.column("row").to_numpy()] = np.arange(len(file))

    def of(self, rows: list[int]) -> tuple[Tensor, list[int]]:
        """(the states of all tokens of some rows, one row after the other; the number of tokens of each row)."""
        parts = [self._values[place].as_buffer() for place in self._place[rows].tolist()]
        lengths = [part.size // self.width.bytes for part in parts]
        content = np.concatenate([np.frombuffer(part, dtype=np.uint8) for part in parts])
        return torch.from_numpy(content).view(self.width.stored).view(-1, self.width.size), lengths


def real_tokens(batch: Batch, lengths: list[int]) -> Tensor:
    """Which tokens of a batch are real: boolean (sequences, tokens).

    Args:
        lengths: the number of real tokens of each row, for inputs without an attention mask, padded on the right.
    """
    if (mask := batch.get("attention_mask")) is not None:
        return mask.reshape(-1, mask.shape[-1]).bool()
    width = batch["input_ids"].shape[-1] if "input_ids" in batch else max(lengths)
    return torch.arange(width) < torch.tensor(lengths)[:, None]


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
        self._stack = ExitStack()

    def __enter__(self) -> "CachedPrefix":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def given(self, split: str, batch: Batch) -> AbstractContextManager[None]:
        """Inside, the layers return the cached states of a batch; they compute them if the split is not cached."""
        if self._prefix is None or split not in self.states:
            return nullcontext()
        states = self.states[split]
        tokens, lengths = states.of(batch["row"].tolist())
        device = batch["row"].device
        mask = real_tokens(batch, lengths).to(device, non_blocking=True)
        return self._prefix.returning(put_into(mask, tokens.to(device, states.width.dtype, non_blocking=True)))

    def prepare(self, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        """Find the frozen layers, and compute and write their output where no file has it. Call it once, in training.

        Args:
            autocast: the precision of the run.

        Raises:
            UserError: the files are too large, or the model cannot be used in this way.
        """
        model = self.parts.model
        members = stack_members(model, self.parts.grid.layers)
        lowest = lowest_trained(members)
        if lowest == 0 or _trained_below(self.parts, members[:lowest], autocast):
            log.warning(f"{self.stage}: {KEY} saves nothing: {_trained_there(model, members, lowest)}")
            return
        began, training = time.monotonic(), model.training
        prefix = Prefix(members[:lowest])
        model.eval()
        try:
            with torch.no_grad(), autocast(), torch.random.fork_rng(_devices(model)):
                width = _width(self.parts, prefix)
                needed = check_size(self.parts, self.splits, width)
                told = f"layers 1 to {lowest} of {len(members)} are frozen"
                log.info(f"{self.stage}: {told}; what they give takes {needed / GB:.3g} GB in {_folder()}")
                facts = _facts(self.parts, members, lowest, width)
                for name, encoded in self.splits.items():
                    own = facts | {"rows": _content(encoded), "inputs": _first_inputs(self.parts, encoded)}
                    file = cached("prefix", own, lambda file, e=encoded: write_states(file, self.parts, prefix, width, e))
                    self.states[name] = States(file, width)
        finally:
            model.train(training)
        self._prefix = prefix
        self._stack.enter_context(prefix.installed())
        seconds = round(time.monotonic() - began, 3)
        self.parts.prefix[self.stage] = {"layers": lowest, "of": len(members), "bytes": needed, "seconds": seconds}


# --- before the run ---


def check_prefix(parts: Parts) -> None:
    """Check, before anything is computed, that the prefix of this model can be cached for these rows.

    Raises:
        UserError: the layers are not one stack, or mix rows; a row gives other inputs in each epoch; the files would be
            too large.
    """
    model, home = parts.model, next(parts.model.parameters()).device
    device, training = device_of(parts.settings.trainer.accelerator), model.training
    dtype = AUTOCAST.get(parts.settings.trainer.precision)
    try:
        members = stack_members(model, parts.grid.layers)
        if len(members) < 2:
            raise UserError("it has one layer only")
        _check_augmentation(parts)
        model.to(device).eval()
        with (
            torch.no_grad(),
            torch.random.fork_rng(_devices(model)),
            torch.autocast(device.type, dtype=dtype, enabled=dtype is not None),
        ):
            prefix = Prefix(members[:-1])
            width = _width(parts, prefix)
            _check_rows_are_apart(parts, prefix, width)
        check_size(parts, cached_splits(parts), width)
    except UserError as error:
        raise UserError([f"{KEY} cannot be used: {problem}" for problem in error.problems]) from error
    finally:
        model.to(home).train(training)


def cached_splits(parts: Parts) -> dict[str, datasets.Dataset]:
    """The splits that fine-tuning reads in each epoch, by name."""
    splits = {"train": parts.data.train.encoded}
    # A task that generates text runs the model on other inputs than the rows.
    if type(parts.task).evaluate is Task.evaluate:
        splits |= {name: split.encoded for name, split in parts.data.validation.items()}
    return splits


def check_size(parts: Parts, splits: Mapping[str, datasets.Dataset], width: Width) -> int:
    """The bytes of the files of some splits.

    Raises:
        UserError: they are more than the limit, or than what is free on the disk.
    """
    tokens = sum(n_tokens(encoded, width) for encoded in splits.values())
    rows, needed = sum(map(len, splits.values())), tokens * width.bytes
    limit, folder = parts.settings.trainer.cache_prefix_limit, _folder()
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    what = (
        f"the frozen layers give {needed / GB:.3g} GB for {rows:,} rows ({tokens:,} tokens of {width.size} numbers, "
        f"{str(width.stored).removeprefix('torch.')})"
    )
    if needed > limit * GB:
        half = "" if width.stored in HALF else ", trainer.precision=bf16-mixed for half of it"
        raise UserError(
            f"{what}, more than trainer.cache_prefix_limit={limit:g} GB; {free / GB:.3g} GB are free in {folder}. Try a "
            f"higher limit, a smaller task.max_train_rows{half}, or trainer.cache_prefix=false"
        )
    if needed > free:
        raise UserError(
            f"{what}, and {folder} has {free / GB:.3g} GB free. Choose another folder with the environment variable "
            "DIFFORA_CACHE"
        )
    return needed


def n_tokens(encoded: datasets.Dataset, width: Width) -> int:
    """The number of real tokens in a split."""
    if "input_ids" not in encoded.column_names:
        return round(sum(encoded["length"]) * width.tokens_per_length)
    column = encoded.data.column("input_ids")
    while column.type.num_fields:  # lists of lists, for several sequences in a row
        column = pc.list_flatten(column)
    return len(column)


def _check_augmentation(parts: Parts) -> None:
    """Refuse rows that give other inputs in each epoch."""
    rows = _tried(parts.data.train.encoded)
    found = []
    for epoch in range(4):
        drawn = Drawn(rows, (parts.settings.seed, 0, epoch), 0)
        with torch.random.fork_rng([]):
            batch = parts.data.collate(parts.data.train.encoded[rows] | {"draw": drawn.draw})
        found.append(parts.task.inputs(batch))
    for later in found[1:]:
        if any(not torch.equal(value, later[name]) for name, value in found[0].items()):
            raise UserError(
                f"task={parts.task.name} gives other inputs for the same row in each epoch, such as varied images; "
                "without augmentation (task.augment.crop_area=null task.augment.flip=false task.augment.shift=0) they "
                "are the same"
            )


def _check_rows_are_apart(parts: Parts, prefix: Prefix, width: Width) -> None:
    """Refuse a model in which a row's states, or its loss, depend on the other rows or on padding."""
    model, task, encoded, collate = parts.model, parts.task, parts.data.train.encoded, parts.data.collate_eval
    device, name = next(model.parameters()).device, type(model).__name__
    rows = _tried(encoded)
    together = _batch(encoded, rows, collate, device)
    states = prefix.output(lambda: model(**task.inputs(together)))
    lengths = [_real_length(encoded, row, width) for row in rows]
    mask = real_tokens(together, lengths).to(device)
    if mask.shape != states.shape[:2]:
        raise UserError(f"{name} has hidden states of {tuple(states.shape)} for {tuple(mask.shape)} tokens")
    alone = []
    for row in rows:
        batch = _batch(encoded, [row], collate, device)
        own = real_tokens(batch, [_real_length(encoded, row, width)]).to(device)
        alone.append(prefix.output(lambda batch=batch: model(**task.inputs(batch)))[own])
    tokens, most = torch.cat(alone), SAME[width.dtype in HALF or width.stored in HALF]
    if tokens.shape != states[mask].shape or _difference(tokens, states[mask]) > most:
        raise UserError(
            f"{name} does not keep the rows of a batch apart: what a row gives depends on the other rows, or on padding"
        )
    plain = task.loss(model(**task.inputs(together)), together)
    with prefix.installed(), prefix.returning(put_into(mask, tokens)):
        replaced = task.loss(model(**task.inputs(together)), together)
    if _difference(replaced, plain) > most:
        raise UserError(f"{name} uses what its lower layers give elsewhere too, not only in the layers above")


def _difference(value: Tensor, reference: Tensor) -> float:
    """The relative difference of two tensors; infinite if it is not a number."""
    found = float((value.double() - reference.double()).norm() / reference.double().norm().clamp(min=1e-6))
    return found if found == found else float("inf")


# --- the states ---


def _tried(encoded: datasets.Dataset) -> list[int]:
    """A few rows of different lengths, none of them among the longest."""
    order = np.argsort(encoded.data.column("length").to_numpy(), kind="stable")
    return sorted({int(order[i * len(order) // (TRIED + 1)]) for i in range(TRIED)})


def _batch(encoded: datasets.Dataset, rows: list[int], collate: Collate, device: torch.device) -> Batch:
    return {key: value.to(device) for key, value in collate(encoded[rows]).items()}


def _real_length(encoded: datasets.Dataset, row: int, width: Width) -> int:
    return round(int(encoded.data.column("length")[row].as_py()) * width.tokens_per_length)


def _width(parts: Parts, prefix: Prefix) -> Width:
    """What the states of a token are, seen on a few rows."""
    encoded, device = parts.data.train.encoded, next(parts.model.parameters()).device
    row = _tried(encoded)[-1]
    batch = _batch(encoded, [row], parts.data.collate_eval, device)
    states = prefix.output(lambda: parts.model(**parts.task.inputs(batch)))
    stored = torch.bfloat16 if parts.settings.trainer.precision == "bf16-mixed" else states.dtype
    text = "input_ids" in encoded.column_names
    longest = int(encoded.data.column("length")[row].as_py())
    return Width(states.shape[-1], states.dtype, stored, 1.0 if text else states.shape[:2].numel() / longest)


def write_states(file: Path, parts: Parts, prefix: Prefix, width: Width, encoded: datasets.Dataset) -> None:
    """Compute the states of all rows of a split and write them: columns ``states`` (bytes) and ``row``."""
    device, told = next(parts.model.parameters()).device, time.monotonic()
    groups = list(_groups(encoded, width))
    loader = rows_loader(encoded, groups, parts.data.collate_eval, parts.settings.trainer.num_workers)
    schema = pa.schema({"states": pa.large_binary(), "row": pa.int64()})
    began, done = told, 0
    with arrow_writer(file, schema) as append:
        for batch in tqdm(loader, desc="frozen layers", unit="batch", disable=None):
            rows = batch["row"].tolist()
            lengths = [_real_length(encoded, row, width) for row in rows]
            mask = real_tokens(batch, lengths)
            inputs = parts.task.inputs({key: value.to(device) for key, value in batch.items()})
            states = prefix.output(lambda inputs=inputs: parts.model(**inputs))
            tokens = states[mask.to(device)].to(width.stored).cpu()
            counts = mask.view(len(rows), -1).sum(1).tolist()
            values = [part.contiguous().view(torch.uint8).numpy().tobytes() for part in tokens.split(counts)]
            append({"states": values, "row": rows})
            done += len(rows)
            if time.monotonic() - told > 60:
                told = time.monotonic()
                left = (told - began) / done * (len(encoded) - done)
                log.info(f"frozen layers: {done:,} of {len(encoded):,} rows, about {left:.0f} s left")


def _groups(encoded: datasets.Dataset, width: Width) -> Iterator[list[int]]:
    """Row numbers of batches of at most `TOKENS` tokens, the longest rows first."""
    lengths = encoded.data.column("length").to_numpy()
    order = np.argsort(-lengths, kind="stable").tolist()
    while order:
        n = max(1, int(TOKENS // (lengths[order[0]] * width.tokens_per_length)))
        yield order[:n]
        order = order[n:]


# --- what a file depends on ---


def _folder() -> Path:
    return default_cache_dir() / "prefix"


def _facts(parts: Parts, members: list[nn.Module], lowest: int, width: Width) -> dict[str, Any]:
    """What the states of every split depend on: weights, configuration, precision and versions."""
    import transformers

    model: Any = parts.model
    above = {id(p) for layer in members[lowest:] for p in itertools.chain(layer.parameters(), layer.buffers())}
    weights = hashlib.sha256()
    for name, value in itertools.chain(model.named_parameters(), model.named_buffers()):
        if id(value) in above or value.requires_grad:
            continue
        weights.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        weights.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    config = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
    return {
        "format": FORMAT_VERSION,
        "model": type(model).__name__,
        "config": hashlib.sha256(repr(sorted(config.items(), key=str)).encode()).hexdigest(),
        "weights": weights.hexdigest(),
        "layers": lowest,
        "width": [width.size, str(width.dtype), str(width.stored)],
        "precision": parts.settings.trainer.precision,
        "device": next(model.parameters()).device.type,
        "versions": [torch.__version__, transformers.__version__],
    }


class _Digest:
    """A file to write to that keeps a digest only."""

    closed = False

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()

    def write(self, content: Any) -> int:
        self.sha256.update(content)
        return len(content)

    def flush(self) -> None:
        """There is nothing to flush."""


def _content(encoded: datasets.Dataset) -> str:
    """sha256 of the content of an encoded split."""
    sink = _Digest()
    with pa.ipc.new_stream(pa.PythonFile(sink, "w"), encoded.data.table.schema) as writer:
        writer.write_table(encoded.data.table)
    return sink.sha256.hexdigest()


def _first_inputs(parts: Parts, encoded: datasets.Dataset) -> str:
    """sha256 of what the model reads for a few rows: how rows become inputs, such as the mean colour of images."""
    digest = hashlib.sha256()
    for row in _tried(encoded):
        inputs = parts.task.inputs(_batch(encoded, [row], parts.data.collate_eval, torch.device("cpu")))
        for name in sorted(inputs):
            digest.update(name.encode() + inputs[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- what is trained ---


def _devices(model: nn.Module) -> list[torch.device]:
    device = next(model.parameters()).device
    return [device] if device.type == "cuda" else []


def _trained_below(
    parts: Parts, layers: list[nn.Module], autocast: Callable[[], AbstractContextManager[Any]]
) -> bool:
    """Whether what enters the layers depends on trainable parameters, such as those of embeddings."""
    encoded, device = parts.data.train.encoded, next(parts.model.parameters()).device
    batch = _batch(encoded, _tried(encoded)[:1], parts.data.collate_eval, device)
    with torch.enable_grad(), autocast(), torch.random.fork_rng(_devices(parts.model)):
        return Prefix(layers).output(lambda: parts.model(**parts.task.inputs(batch))).requires_grad


def _trained_there(model: nn.Module, members: list[nn.Module], lowest: int) -> str:
    """What is trained below, in words."""
    if lowest == 0:
        names = [name for name, p in members[0].named_parameters() if p.requires_grad]
        return f"the first of {len(members)} layers has trained parameters ({names[0]}), so nothing below is frozen"
    return f"what enters the first of {len(members)} layers is trained too, such as the embeddings"
