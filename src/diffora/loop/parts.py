"""What both stages of a run work on: data, backbone and grid, loaded and checked."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch import nn

from diffora import digests
from diffora.backbones import compatibility, models
from diffora.core.grid import Grid, find_grid
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.loop.resume import Earlier, earlier
from diffora.loop.splits import examples_of
from diffora.settings.sections import Settings
from diffora.tasks.base import Collate, Split, Task


@dataclass
class Parts:
    """What both stages of a run work on; ``data`` is what became of the rows of each split (`Account.record`)."""

    cfg: Settings
    folder: Path
    task: Task
    model: nn.Module
    arguments: dict[str, Any]
    backbone_parameters: int
    grid: Grid
    train: Split
    validation: dict[str, Split]
    test: dict[str, Split]
    collate: Collate
    collate_eval: Collate
    data_hash: str
    data: dict[str, Any]
    backbone: dict[str, Any] | None
    made_with: dict[str, Any]
    earlier: Earlier = field(default_factory=Earlier)
    first_step_at: float | None = None

    @classmethod
    def load(cls, cfg: Settings, folder: Path, task: Task) -> "Parts":
        """Load data and backbone. The head's first weights are drawn from torch's global generator.

        Raises:
            UserError: whatever is wrong with data, model, grid or a given selection; or, on a resume, what changed
                since the run stopped.
        """
        rows = task.load()
        official = next(iter(rows.validation))
        _check_halves(rows.source, len(rows.validation[official]))
        test = {name: task.load_split(name) for name in task.test_splits if cfg.predict}
        processor = task.processor(cfg.model)
        model = models.load_model(cfg.model, task)
        arguments = task.head() | compatibility.match_processor(model, processor)
        task.check(model)
        if cfg.trainer.gradient_checkpointing:
            models.checkpoint_activations(model)
        grid = find_grid(model, cfg.model.layer, cfg.model.candidates, cfg.model.roles, "model.")
        models.check_outside_head(model, itertools.chain(*grid.names))
        if isinstance(path := getattr(cfg.method, "selection", None), str):
            Selection.load(Path(path)).check_fits(grid, path)

        backbone = digests.backbone(cfg.model.path)
        n_rows = {name: len(split) for name, split in {"train": rows.train, **rows.validation}.items()}
        made_with = digests.made_with(cfg.composed, rows.data_hash, n_rows, backbone)
        before = earlier(folder, made_with) if cfg.resume else Earlier()

        def encoded(splits: dict[str, datasets.Dataset]) -> dict[str, Split]:
            return {name: Split(part, task.encode(part, processor, training=False)) for name, part in splits.items()}

        train = Split(rows.train, task.encode(rows.train, processor, training=True))
        validation, test_splits = encoded(rows.validation), encoded(test)
        _check_halves(rows.source, len(np.unique(examples_of(validation[official].encoded))))
        splits = {"train": train, **validation, **test_splits}
        return cls(
            cfg,
            folder,
            task,
            model,
            arguments=arguments,
            backbone_parameters=models.backbone_parameters(model),
            grid=grid,
            train=train,
            validation=validation,
            test=test_splits,
            collate=task.collate(processor, training=True),
            collate_eval=task.collate(processor, training=False),
            data_hash=rows.data_hash,
            backbone=backbone,
            made_with=made_with,
            earlier=before,
            data={name: task.account(name, split).record() for name, split in splits.items()},
        )


def _check_halves(source: str, rows: int) -> None:
    """Refuse a validation split too small for `held_out_split`, before any search."""
    if rows < 2:
        raise UserError(
            f"{source}: a validation split of {rows} usable row{'' if rows == 1 else 's'} is too small: one half of it "
            "chooses the epoch, the other half reports it, so it needs at least 2"
        )
