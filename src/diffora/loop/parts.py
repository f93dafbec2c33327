"""The data, backbone and grid of a run, loaded and checked. Both stages use them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch import nn

from diffora import digests
from diffora.backbones.attention import use_bfloat16_attention
from diffora.backbones.backbone import Backbone
from diffora.backbones.compatibility import longest_input
from diffora.backbones.load import load_backbone
from diffora.backbones.precision import width_multiple
from diffora.core.grid import Grid
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.loop.predict import accelerator_device
from diffora.loop.resume import Earlier, earlier
from diffora.loop.splits import count_shared, examples_of
from diffora.settings.sections import Settings
from diffora.tasks.account import Account, note_shared
from diffora.tasks.base import Collate, Rows, Split, Task
from diffora.tasks.encoding import processes


@dataclass(frozen=True)
class Data:
    """The rows of a run, encoded for its backbone.

    Attributes:
        train: the training split.
        validation: labelled evaluation splits by name, the official one first.
        test: splits to predict, by name (``predict=true``).
        collate: makes a batch of training rows, with augmentation if the task has it.
        collate_eval: makes a batch of rows of any split, without augmentation.
        hash: sha256 of training and validation rows.
        accounts: which rows of each split were used or dropped, and why (`Account.record`). The search adds its own.
    """

    train: Split
    validation: dict[str, Split]
    test: dict[str, Split]
    collate: Collate
    collate_eval: Collate
    hash: str
    accounts: dict[str, Any]

    @classmethod
    def encode(cls, task: Task, processor: Any, rows: Rows, test: Mapping[str, datasets.Dataset]) -> "Data":
        """Encode all splits, and count the rows that are used, dropped or changed.

        Args:
            task: the task.
            processor: what `Task.processor` returned.
            rows: training and validation rows.
            test: rows of the splits to predict, by name.
        """

        def evaluated(part: datasets.Dataset) -> Split:
            return Split(part, task.encode(part, processor, training=False))

        train = Split(rows.train, task.encode(rows.train, processor, training=True))
        validation = {name: evaluated(part) for name, part in rows.validation.items()}
        tested = {name: evaluated(part) for name, part in test.items()}
        for name, split in tested.items():
            if task.labelled(split):
                shared = count_shared(split, train, (task.row_keys(split.rows), task.row_keys(train.rows)))
                note_shared(task.accounts.setdefault(name, Account(len(split.rows))), *shared)
        splits = {"train": train, **validation, **tested}
        return cls(
            train,
            validation,
            tested,
            collate=task.collate(processor, training=True),
            collate_eval=task.collate(processor, training=False),
            hash=rows.data_hash,
            accounts={name: task.account(name, split).record() for name, split in splits.items()},
        )

    @property
    def official(self) -> Split:
        """The validation split that chooses models."""
        return next(iter(self.validation.values()))


@dataclass
class Parts:
    """The loaded parts of a run, for both stages.

    Attributes:
        settings: the typed settings of the run.
        folder: the run directory.
        task: the task.
        backbone: the model with its head. A method adapts it in place.
        grid: the candidate modules, L x N.
        data: the encoded rows.
        identity: digests of the backbone's files (`digests.backbone`); None if they are not on this machine.
        made_with: settings, data and backbone, to compare with those of another attempt (`digests.made_with`).
        earlier: what an earlier attempt left in this folder, if the run resumes.
        first_step_at: when training on the first batch began, in seconds since 1970.
        prefix: facts about the cached prefix of each stage, for the record.
    """

    settings: Settings
    folder: Path
    task: Task
    backbone: Backbone
    grid: Grid
    data: Data
    identity: dict[str, Any] | None
    made_with: dict[str, Any]
    earlier: Earlier = field(default_factory=Earlier)
    first_step_at: float | None = None
    prefix: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        """The network of the backbone."""
        return self.backbone.model

    @classmethod
    def load(cls, settings: Settings, folder: Path, task: Task) -> "Parts":
        """Load data and backbone. The head's first weights are drawn from torch's global generator.

        Raises:
            UserError: data, model, grid or a given selection are wrong. On a resume: they changed since the run
                stopped.
        """
        task.num_proc = processes(settings.trainer.num_proc)
        rows = task.load()
        _check_halves(rows.source, len(next(iter(rows.validation.values()))))
        test = {name: task.load_split(name) for name in task.test_splits if settings.predict}
        processor = task.processor(settings.model)
        backbone = load_backbone(settings.model, task.model_request(), processor)
        task.check(backbone.model)
        device = accelerator_device(settings.trainer.accelerator)
        task.width_multiple = width_multiple(settings.trainer.precision, device, longest_input(backbone.model))
        if settings.trainer.precision == "bf16-mixed" and device.type == "cpu" and settings.model.kernel != "plain":
            use_bfloat16_attention(backbone.model)
        if settings.trainer.gradient_checkpointing:
            backbone.checkpoint_activations()
        grid = _grid(settings, backbone)

        identity = digests.backbone(settings.model.path)
        n_rows = {name: len(split) for name, split in {"train": rows.train, **rows.validation}.items()}
        inputs = settings.method.inputs
        made_with = digests.made_with(settings.composed, rows.data_hash, n_rows, identity, inputs)
        before = earlier(folder, made_with) if settings.resume else Earlier()

        data = Data.encode(task, processor, rows, test)
        _check_halves(rows.source, len(np.unique(examples_of(data.official.encoded))))
        return cls(settings, folder, task, backbone, grid, data, identity, made_with, before)


def _grid(settings: Settings, backbone: Backbone) -> Grid:
    """The candidate modules of a backbone, after a check that ``method.selection`` fits them."""
    grid = backbone.find_grid(settings.model.layer, settings.model.candidates, settings.model.roles)
    if isinstance(path := getattr(settings.method, "selection", None), str):
        Selection.load(Path(path)).check_fits(grid, path)
    return grid


def _check_halves(source: str, rows: int) -> None:
    """Refuse a validation split that is too small for `held_out_split`, before any search."""
    if rows < 2:
        raise UserError(
            f"{source}: a validation split of {rows} usable row{'' if rows == 1 else 's'} is too small: one half of it "
            "chooses the epoch, the other half reports it, so it needs at least 2. Add rows, or give a validation file"
        )
