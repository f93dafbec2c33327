"""``dry_run=true``: the run without weights or data, to see its modules and count its parameters."""

import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from diffora import START, models
from diffora.core.dam import adapter_parameters, cheapest_and_dearest, expected_adapter_parameters
from diffora.core.grid import Grid, find_grid
from diffora.core.selection import Selection
from diffora.methods.base import Method, Selecting
from diffora.results import terminal
from diffora.results.record import new_record, write_record
from diffora.tasks.glue import TaskSpec


def dry_run(cfg: DictConfig, method: Method, spec: TaskSpec, folder: Path) -> dict[str, Any]:
    """Build the adapted model on the meta device, print and write its record.

    The dimensions are those of ``conf/model`` or of the local model folder: the hub is not asked.
    """
    model = models.meta_classifier(cfg.model, spec.num_labels)
    grid = find_grid(model, cfg.model.layer, list(cfg.model.candidates))
    searched: list[Selection] = []

    def stand_in() -> Selection:
        assert isinstance(method, Selecting)
        k = method.k(grid)
        mask, _ = cheapest_and_dearest(grid.shapes, k)
        searched.append(Selection.from_mask(grid, mask, method=method.name, k=k, rho=method.rho, seed=cfg.seed))
        return searched[0]

    selection = method.select(grid, cfg.seed, stand_in)
    method.adapt(model, grid, selection)
    params = models.count_parameters(model)
    if searched:
        assert isinstance(method, Selecting)
        selection = None
        params |= _searched_counts(grid, method)
        params["trainable"] = params["adapter"] + params["head"]
    record = new_record(cfg, data_hash=None)
    record |= {"status": "dry_run", "params": params, "time": {"total_s": round(time.time() - START, 3)}}
    if selection is not None:
        record["selection"] = {"file": None, "k": selection.k, "selected": selection.selected}
    terminal.print_dry_run(record, grid, selection, method)
    write_record(folder, record)
    return record


def _searched_counts(grid: Grid, method: Selecting) -> dict[str, int]:
    """What the search will choose decides the count: its mean over all selections, and the extremes."""
    k, ranks = method.k(grid), (method.rank, method.rank_elsewhere)
    least, most = (adapter_parameters(grid.shapes, mask, *ranks) for mask in cheapest_and_dearest(grid.shapes, k))
    expected = expected_adapter_parameters(grid.shapes, k, *ranks)
    return {"adapter": expected, "adapter_min": least, "adapter_max": most}
