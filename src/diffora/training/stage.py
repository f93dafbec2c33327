"""The fine-tuning stage of a run, and the checks of its length."""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import datasets
import numpy as np
from torch import Tensor

from diffora.core.grid import Grid
from diffora.errors import UserError
from diffora.loop.data import FineTuneData, LengthGroupedBatchSampler, examples_of, held_out_split
from diffora.loop.fit import fit
from diffora.loop.loggers import Loggers
from diffora.loop.parts import Parts
from diffora.loop.progress import ProgressBar
from diffora.methods.base import Adaptation, Method, check_ranks
from diffora.settings.sections import Settings
from diffora.tasks.base import Collate, Task
from diffora.training.finetune import FineTuneModule, FineTuneSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FirstBatches:
    """The first training batches of the run, as inputs of the model; the same in every process.

    Made when they are asked for: most methods do not.
    """

    train: datasets.Dataset
    task: Task
    collate: Collate
    batch_size: int
    seed: int
    most: int = 32

    def __len__(self) -> int:
        return min(self.most, len(self._sampler()))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for rows in itertools.islice(self._sampler(), self.most):
            yield self.task.inputs(self.collate(self.train[rows]))

    def _sampler(self) -> LengthGroupedBatchSampler:
        return LengthGroupedBatchSampler(np.asarray(self.train["length"]), self.batch_size, self.seed)


def finetune(parts: Parts, adaptation: Adaptation, params: dict[str, int], loggers: Loggers) -> FineTuneModule:
    """Train what the method left trainable, and evaluate after each epoch."""
    cfg, f = parts.cfg, parts.cfg.finetune
    n_rows = len(parts.data.train.encoded)
    warmup = warmup_steps(cfg, n_rows)
    official = parts.data.official
    module = FineTuneModule(
        adaptation,
        parts.task,
        parts.data.train,
        parts.data.validation,
        held_out_split(examples_of(official.encoded), cfg.seed),
        FineTuneSettings(f.lr, f.weight_decay, warmup, f.early_stop),
        cfg.seed,
    )
    rows = f.batch_size // f.accumulate
    data = FineTuneData(
        parts.data.train.encoded,
        {name: split.encoded for name, split in parts.data.validation.items()},
        (parts.data.collate, parts.data.collate_eval),
        rows,
        2 * rows,
        cfg.seed,
        cfg.trainer.num_workers,
    )
    if warmup < f.warmup_steps:
        log.info(f"fine-tune: {f.warmup_steps} warm-up steps, the recipe's, do not suit this run: taking {warmup}")
    adaptation.prepare(FirstBatches(parts.data.train.encoded, parts.task, parts.data.collate_eval, rows, cfg.seed))
    params |= parts.backbone.count_parameters()  # EVA gives its ranks out anew
    log.info(f"fine-tune: {params['adapter']:,} adapter + {params['head']:,} head parameters, {n_rows} rows")
    progress = ProgressBar("fine-tune", "epoch", ("train/loss", f"validation/{parts.task.main_metric}"))
    extra = {"gradient_clip_val": f.clip, "accumulate_grad_batches": f.accumulate}
    fit(parts, "finetune", module, data, [progress], loggers.of_stage("finetune"), **extra)
    return module


def steps_of(cfg: Settings, n_rows: int) -> tuple[int, str]:
    """(optimiser steps of the fine-tuning stage, what they are, for messages)"""
    f = cfg.finetune
    made_of = f"{n_rows} rows, finetune.batch_size={f.batch_size}, finetune.epochs={f.epochs}"
    return -(-n_rows // f.batch_size) * f.epochs, f"the steps of this run ({made_of})"


def warmup_steps(cfg: Settings, n_rows: int) -> int:
    """``finetune.warmup_steps``; the recipe's is cut to a tenth of a run that was made too short for it.

    Raises:
        UserError: it was given, and the run is shorter.
    """
    steps, run = steps_of(cfg, n_rows)
    given: int = cfg.finetune.warmup_steps
    if given == cfg.task.recipe.warmup_steps and given > steps // 2:
        return steps // 10
    if given > steps:
        raise UserError(
            f"finetune.warmup_steps={given} must be at most {steps}, {run}: finetune.lr would never be reached"
        )
    return given


def check_stages(cfg: Settings, method: Method, grid: Grid, n_rows: int | None) -> None:
    """Refuse settings of the two stages that do not suit the backbone, or the number of training rows.

    Args:
        n_rows: None where the rows are not loaded (``dry_run=true``).

    Raises:
        UserError: before anything is trained.
    """
    if getattr(method, "selection", None) is None and getattr(method, "selector", None) in ("search", "attribution"):
        check_ranks(grid, {"search.rank": cfg.search.rank})
    if n_rows is None:
        return
    warmup_steps(cfg, n_rows)
    if cfg.finetune.batch_size > n_rows:
        log.warning(f"finetune.batch_size={cfg.finetune.batch_size}: there are {n_rows} rows, so an epoch is one step")
    steps, run = steps_of(cfg, n_rows)
    mask = getattr(method, "mask", None)
    if mask is not None and mask.rank is not None and mask.start >= steps:
        raise UserError(f"method.mask.start={mask.start} must be less than {steps}, {run}: no step would be masked")
    if (stages := getattr(method, "stages", 1)) > steps:
        raise UserError(f"method.stages={stages} must be at most {steps}, {run}: each takes a step or more")
