"""``dry_run=true``: shows a run's modules, parameters and memory without loading weights or data."""

import logging
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffora import START
from diffora.backbones.backbone import Backbone
from diffora.backbones.meta import meta_backbone
from diffora.core.attach import attach
from diffora.core.counts import (
    expected_adapter_parameters,
    expected_globally,
    extreme_adapter_parameters,
    extremes_by_layer,
)
from diffora.core.dam import modules_per_layer
from diffora.core.draws import random_scores
from diffora.core.grid import Grid
from diffora.core.lowrank import set_kernel
from diffora.errors import UserError, first_line
from diffora.loop.resume import has_work
from diffora.methods.base import Method
from diffora.methods.selecting import Selecting
from diffora.records import ENDED, write_record
from diffora.run import memory, terminal
from diffora.run.record import read_record
from diffora.run.steptime import Counted, find_lowest, words
from diffora.scoring.selectors import facts_of
from diffora.settings.sections import Settings
from diffora.tasks.base import Task
from diffora.training.steps import check_stages

log = logging.getLogger(__name__)


def dry_run(settings: Settings, method: Method, task: Task, folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Build the adapted model on the meta device. Complete its record, print it and write it to ``folder``.

    The dimensions come from a local model folder, or else from ``conf/model``. The hub is asked only without both.

    Returns:
        The record.

    Raises:
        UserError: a model, grid or method that does not fit together.
    """
    backbone = _meta_backbone(settings, task)
    model = backbone.model
    grid = backbone.find_grid(settings.model.layer, settings.model.candidates, settings.model.roles)
    step_time: dict[str, Any] = {}
    if isinstance(method, Selecting) and method.time_budget is not None:
        meter = Counted(settings, method, task)
        step_time = find_lowest(method.time_budget, meter, grid)
        grid = replace(grid, lowest_layer=step_time["lowest_layer"])
    method.check(model, grid)
    check_stages(settings, method, grid, None)
    selector = None if method.scoring is None else method.scoring.selector
    stand_in = None if selector is None else random_scores(grid.n_layers, grid.n_types, settings.seed)
    selection = method.choose(grid, stand_in, settings.seed)
    method.adapt(model, grid, selection, settings.seed)
    if step_time and selector is None:
        assert selection is not None
        step_time["selection"] = asdict(meter.of_selection(selection))
    set_kernel(model, settings.model.kernel)
    backbone.check_trainable()
    params = backbone.count_parameters() | {"backbone": backbone.n_parameters}
    if selector is not None:  # nothing is known yet about what the run would choose
        assert isinstance(method, Selecting)
        selection = None
        params |= _unknown_counts(grid, method)
        params["trainable"] = params["adapter"] + params["head"]
    record |= {
        "status": "dry_run",
        "params": params,
        "step_time": step_time,
        "time": {"total_s": round(time.time() - START, 3)},
    }
    if selection is not None:
        record["selection"] = {"file": None, **selection.summary()}
    terminal.print_dry_run(record, grid, selection, method)
    if step_time:
        print(f"time budget: {words(step_time, grid)}")
    searched = grid if selector and facts_of(selector).trains else None
    record["memory"] = {"estimate": _memory(settings, task, backbone, searched, grid.layers)}
    terminal.print_memory(record["memory"]["estimate"])
    if (read_record(folder) or {}).get("status") not in ENDED and not has_work(folder):  # keep the record of a run
        write_record(folder, record)
    return record


def _meta_backbone(settings: Settings, task: Task) -> Backbone:
    try:
        return meta_backbone(settings.model, task.model_request())
    except UserError:
        raise
    except Exception as error:  # transformers has many ways to refuse a shape
        raise UserError(f"model.config is not the shape of a transformers model: {first_line(error)}") from error


def _memory(
    settings: Settings, task: Task, adapted: Backbone, searched: Grid | None, places: Sequence[str]
) -> dict[str, Any]:
    """Estimates of memory by stage, in MB. A stage that cannot be measured is left out, with a warning.

    Args:
        settings: the settings.
        task: the task.
        adapted: the model, adapted for fine-tuning. It cannot be used afterwards.
        searched: the grid of a search, if there is one.
        places: full names of the model's layers.
    """

    def search() -> memory.Estimate:
        assert searched is not None
        model = _checkpointing(settings, _meta_backbone(settings, task))
        everything = torch.ones(searched.n_layers, searched.n_types, dtype=torch.bool)
        rank, alpha, kernel = settings.search.rank, settings.method.alpha, settings.model.kernel
        attached = attach(model, searched.names, everything, rank, None, alpha, freeze=False, kernel=kernel)
        return memory.of_search(settings, task, model, attached, places)

    stages = {"search": search} if searched is not None else {}
    stages["finetune"] = lambda: memory.of_finetuning(settings, task, _checkpointing(settings, adapted), places)
    found = {}
    for name, measure in stages.items():
        try:
            estimate = measure()
        except UserError:
            raise
        except Exception as error:  # a model may read values, which fake tensors do not have
            log.warning(f"the memory of {name} cannot be estimated: {first_line(error)}")
            continue
        parts = {key: getattr(estimate, key) for key in ("weights", "optimiser", "activations", "total")}
        found[name] = {f"{key}_mb": round(size / 2**20, 1) for key, size in parts.items()} | {"batch": estimate.shape}
    return found


def _checkpointing(settings: Settings, backbone: Backbone) -> nn.Module:
    if settings.trainer.gradient_checkpointing:
        backbone.checkpoint_activations()
    return backbone.model


def _unknown_counts(grid: Grid, method: Selecting) -> dict[str, int]:
    """Counts of adapter parameters if the data will choose the modules.

    Returns:
        ``adapter``, the mean over all selections, with ``adapter_min`` and ``adapter_max``. With a budget, ``adapter``
        is the budget, and ``rank_*`` or ``modules_*`` are bounds of what the budget will choose.
    """
    shapes, elsewhere, size = grid.allowed.shapes, method.rank_elsewhere, method.size(grid)
    if method.scope == "global":
        least, most = extreme_adapter_parameters(shapes, method.rank, elsewhere)
        if (limit := method.limit) is not None:
            # How many modules fit in any order, and how many in the best order.
            sure, possible = (max(m for m, count in enumerate(found) if count <= limit) for found in (most, least))
            return {"adapter": limit, "modules_min": sure, "modules_max": possible}
        expected = expected_globally(shapes, size, method.rank, elsewhere)
        return {"adapter": expected, "adapter_min": least[size], "adapter_max": most[size]}
    counts = [modules_per_layer(method.rho, n) for n in grid.allowed.sizes]
    if (limit := method.limit) is not None and size > 0:

        def largest(extreme: int) -> int:
            of_rank = lambda rank: extremes_by_layer(shapes, counts, rank, elsewhere)[extreme]  # noqa: E731
            return bisect_right(range(1, limit + 1), limit, key=of_rank)

        return {"adapter": limit, "rank_min": largest(1), "rank_max": largest(0)}
    expected = expected_adapter_parameters(shapes, counts, method.rank, elsewhere)
    fewest, greatest = extremes_by_layer(shapes, counts, method.rank, elsewhere)
    return {"adapter": expected, "adapter_min": fewest, "adapter_max": greatest}
