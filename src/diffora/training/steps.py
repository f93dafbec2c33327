"""Computes how many steps a run has, and checks that its settings suit that number."""

import logging
from typing import Any

from diffora.core.grid import Grid
from diffora.errors import UserError
from diffora.loop.machine import found_devices
from diffora.methods.base import Method, check_ranks
from diffora.scoring.selectors import facts_of
from diffora.settings.sections import Settings

log = logging.getLogger(__name__)


def check_stages(settings: Settings, method: Method, grid: Grid, n_rows: int | None) -> None:
    """Check the settings of both stages against the backbone and the number of training rows.

    Args:
        method: the method of the run.
        grid: the candidate modules of the backbone.
        n_rows: number of training rows; None if they are not loaded (``dry_run=true``).

    Raises:
        UserError: a setting does not suit them.
    """
    if method.scoring is not None and facts_of(method.scoring.selector).trains:
        check_ranks(grid, {"search.rank": settings.search.rank})
    if n_rows is None:
        return
    warmup_steps(settings, n_rows)
    if settings.finetune.batch_size > n_rows:
        log.warning(
            f"finetune.batch_size={settings.finetune.batch_size}: there are {n_rows} rows, so an epoch is one step"
        )
    steps, run = steps_of(settings, n_rows)
    every: Any = settings.finetune.eval_every
    if isinstance(every, int) and every > steps:
        log.warning(f"finetune.eval_every={every} is more than {steps}, {run}: evaluated at the end only")
    mask = getattr(method, "mask", None)
    if mask is not None and mask.rank is not None and mask.start >= steps:
        raise UserError(f"method.mask.start={mask.start} must be less than {steps}, {run}: no step would be masked")
    if (stages := getattr(method, "stages", 1)) > steps:
        raise UserError(f"method.stages={stages} must be at most {steps}, {run}: each takes a step or more")


def warmup_steps(settings: Settings, n_rows: int) -> int:
    """``finetune.warmup_steps``. If the recipe's value is too large for a short run, a tenth of the run's steps.

    Raises:
        UserError: the user gave a value that is larger than the number of steps.
    """
    steps, run = steps_of(settings, n_rows)
    given: int = settings.finetune.warmup_steps
    if given == settings.task.recipe.warmup_steps and given > steps // 2:
        return steps // 10
    if given > steps:
        raise UserError(
            f"finetune.warmup_steps={given} must be at most {steps}, {run}: finetune.lr would never be reached"
        )
    return given


def steps_of(settings: Settings, n_rows: int) -> tuple[int, str]:
    """(optimiser steps of the fine-tuning stage, where this number comes from, for messages)"""
    f = settings.finetune
    if f.max_steps is not None:
        return f.max_steps, "finetune.max_steps"
    made_of = f"{n_rows} rows, finetune.batch_size={f.batch_size}, finetune.epochs={f.epochs}"
    t = settings.trainer
    processes = (t.devices if isinstance(t.devices, int) else found_devices(t.accelerator)) * t.num_nodes
    last = n_rows % (f.batch_size // f.accumulate)
    # A last micro-batch of fewer rows than processes is left out (`LengthGroupedBatchSampler`).
    used = n_rows - last if last < processes else n_rows
    return -(-used // f.batch_size) * f.epochs, f"the steps of this run ({made_of})"
