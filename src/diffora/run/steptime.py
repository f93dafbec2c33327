"""``method.time_budget``: which layers may have adapters, and the share of the step time that a selection takes.

Every share is of the time of a step with LoRA on all candidate modules, at the method's rank and with the same head.
`Counted` gets it from operations that are counted on tensors without content, `Timed` from timed steps.
"""

import itertools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from statistics import median, quantiles
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from diffora.backbones.meta import meta_backbone
from diffora.backbones.precision import AUTOCAST
from diffora.core.attach import attach, put, taken
from diffora.core.grid import Grid
from diffora.core.lowrank import set_kernel
from diffora.core.picture import layer_labels
from diffora.core.selection import Selection
from diffora.core.steptime import lowest_layer, operations
from diffora.errors import UserError, first_line
from diffora.loop.data import look_up
from diffora.loop.parts import Parts
from diffora.loop.predict import accelerator_device
from diffora.loop.samplers import LengthGroupedBatchSampler
from diffora.methods.selecting import Selecting
from diffora.run.memory import rows_at_a_time, without_memory
from diffora.run.record import read_record
from diffora.settings.sections import Settings
from diffora.standalone.model import left_as_found
from diffora.tasks.base import Batch, Task
from diffora.training.criterion import criterion_of
from diffora.training.optimisers import make_optimiser

log = logging.getLogger(__name__)

ROUNDS = 5
"""Timed steps of each of the two models that are compared, after one of each that is not timed."""


@dataclass(frozen=True)
class Share:
    """The time of a step as a share of that with LoRA on all candidate modules.

    Attributes:
        share: of counted operations, or the median of the rounds.
        low, high: quartiles of the rounds; None if operations were counted.
        cost, cost_everywhere: operations, or medians of seconds.
    """

    share: float
    cost: float
    cost_everywhere: float
    low: float | None = None
    high: float | None = None


class Meter(Protocol):
    """Finds shares: `Counted` or `Timed`."""

    source: str
    unit: str

    def from_layer(self, lowest: int) -> Share:
        """With LoRA on all candidate modules of one layer and of all layers above it."""

    def of_selection(self, selection: Selection) -> Share:
        """With the adapters of a selection."""


def meter_of(parts: Parts, method: Selecting) -> Meter:
    """The meter that ``method.time_from`` names."""
    return Timed(parts, method) if method.time_from == "measured" else Counted(parts.settings, method, parts.task)


def find_lowest(budget: float, meter: Meter, grid: Grid) -> dict[str, Any]:
    """Find the lowest layer that may have adapters.

    Returns:
        For the record (`diffora.records.Record.step_time`): ``lowest_layer``, and the shares by the layers that were
        tried.

    Raises:
        UserError: adapters on the top layer alone exceed the budget; the message names their share.
    """
    tried: dict[int, Share] = {}

    def share(lowest: int) -> float:
        if lowest not in tried:
            tried[lowest] = meter.from_layer(lowest)
        return tried[lowest].share

    try:
        found = lowest_layer(share, grid.n_layers, budget)
    except ValueError:
        least = tried[grid.n_layers - 1]
        spread = "" if least.low is None else f" (quartiles {least.low:.3f} to {least.high:.3f})"
        raise UserError(
            f"method.time_budget={budget} is too small: LoRA on the top layer alone takes {least.share:.3f}{spread} of "
            f"the step time of LoRA on all modules ({SOURCES[meter.source]}), because every step needs the whole "
            f"forward pass: at least method.time_budget={np.ceil(least.share * 1000) / 1000:g}"
        ) from None
    if found not in tried:  # layer 0, with a budget of 1
        tried[found] = meter.from_layer(found)
    shares = {str(lowest): asdict(tried[lowest]) for lowest in sorted(tried)}
    facts = {"budget": budget, "from": meter.source, "unit": meter.unit, "lowest_layer": found}
    return facts | {"by_lowest_layer": shares}


def limit_layers(parts: Parts, method: Selecting) -> dict[str, Any]:
    """Set the lowest layer of the grid that may have adapters (`Grid.lowest_layer`). Checks the method for these.

    A run that resumes uses what its earlier attempt found, because timed steps never give quite the same again.

    Returns:
        For the record, as of `find_lowest`.

    Raises:
        UserError: the budget is too small, or no selection fits the layers that it leaves.
    """
    assert method.time_budget is not None
    earlier = (read_record(parts.folder) or {}) if parts.settings.resume else {}
    found = None if earlier.get("status") == "dry_run" else earlier.get("step_time")  # a dry run had other settings
    facts = found or find_lowest(method.time_budget, meter_of(parts, method), parts.grid)
    parts.grid = replace(parts.grid, lowest_layer=facts["lowest_layer"])
    method.check(parts.model, parts.grid)
    log.info(f"time budget: {words(facts, parts.grid)}")
    return dict(facts)


def check_step_time(parts: Parts, method: Selecting, selection: Selection, facts: dict[str, Any]) -> None:
    """Add the share of the selection to the facts of `limit_layers`. Warns if it exceeds the budget."""
    if "selection" in facts:
        return
    found = meter_of(parts, method).of_selection(selection)
    facts["selection"] = asdict(found)
    if found.share > facts["budget"]:
        log.warning(
            f"the selected modules take {found.share:.3f} of the step time of LoRA on all modules "
            f"({SOURCES[facts['from']]}), more than method.time_budget={facts['budget']}: "
            + ("timed steps vary" if facts["from"] == "measured" else f"their rank is {selection.rank or method.rank}")
        )


def words(facts: Mapping[str, Any], grid: Grid) -> str:
    """What a time budget decided, in one line."""
    lowest = facts["lowest_layer"]
    share = (facts.get("selection") or facts["by_lowest_layer"][str(lowest)])["share"]
    label = layer_labels(grid.names, grid.types)[lowest]
    most = "" if "selection" in facts else "at most "
    return (
        f"adapters from {label} on ({grid.n_layers - lowest} of {grid.n_layers} layers): {most}{share:.3f} of the step "
        f"time of LoRA on all modules, by {SOURCES[facts['from']]}"
    )


SOURCES = {"model": "counted operations", "measured": "timed steps"}
"""Where a share comes from, in words."""


# --- counted ---


class Counted:
    """Shares of floating-point operations, counted on a batch of the largest size without computing anything.

    The same in a dry run and in a run, on every machine. Operations on single elements and the optimiser are not
    counted, so the true share is often smaller.
    """

    source, unit = "model", "operations"

    def __init__(self, settings: Settings, method: Selecting, task: Task) -> None:
        self.settings, self.method, self.task = settings, method, task
        self._model, self._grid = self._backbone()
        _everywhere(self._model, self._grid, method)
        set_kernel(self._model, settings.model.kernel)
        self._mode = without_memory(self._model)
        self._places = taken(self._model)
        self._most: int | None = None

    def from_layer(self, lowest: int) -> Share:
        names = {name for row in self._grid.names[lowest:] for name in row}
        if lowest == 0:
            return self._share(None)
        return self._share(
            self._operations(self._model, self._mode, {n: m for n, m in self._places.items() if n in names})
        )

    def of_selection(self, selection: Selection) -> Share:
        model, grid = self._backbone()
        self.method.adapt(model, grid, selection, self.settings.seed)
        set_kernel(model, self.settings.model.kernel)
        mode = without_memory(model)
        return self._share(self._operations(model, mode, taken(model)))

    def _share(self, cost: int | None) -> Share:
        """The share of a number of operations; None: of LoRA on all candidate modules."""
        if self._most is None:
            self._most = self._operations(self._model, self._mode, self._places)
        cost = self._most if cost is None else cost
        return Share(cost / self._most, cost, self._most)

    def _backbone(self) -> tuple[nn.Module, Grid]:
        s = self.settings
        backbone = meta_backbone(s.model, self.task.model_request())
        if s.trainer.gradient_checkpointing:
            backbone.checkpoint_activations()
        grid = backbone.find_grid(s.model.layer, s.model.candidates, s.model.roles)
        return backbone.model.train(), grid

    def _operations(self, model: nn.Module, mode: Any, layers: Mapping[str, nn.Module]) -> int:
        put(model, layers)
        rows = rows_at_a_time(self.settings, self.settings.finetune)
        try:
            with mode:
                batch = self.task.dummy(rows, model)
                return operations(lambda: self.task.loss(model(**self.task.inputs(batch)), batch).backward())
        except UserError:
            raise
        except Exception as error:  # a model may read values, which fake tensors do not have
            raise UserError(
                f"method.time_from=model: the operations of this model cannot be counted ({first_line(error)}); time "
                "steps instead: method.time_from=measured"
            ) from error
        finally:
            taken(model)


# --- timed ---


class Timed:
    """Shares of measured seconds: steps of fine-tuning on the training device, with real batches.

    Two models take turns, on the same batches: the one in question, and LoRA on all candidate modules. A share is the
    median of the ratios. Afterwards, the model and torch's random state are as before.
    """

    source, unit = "measured", "seconds"

    def __init__(self, parts: Parts, method: Selecting) -> None:
        self.parts, self.method = parts, method
        rows = rows_at_a_time(parts.settings, parts.settings.finetune)
        train = parts.data.train.encoded
        sampler = LengthGroupedBatchSampler(np.asarray(train["length"]), rows, parts.settings.seed)
        drawn = list(itertools.islice(sampler, ROUNDS))
        self.batches: list[Batch] = [parts.data.collate(look_up(train, numbers)) for numbers in drawn]
        self.criterion = criterion_of(parts.settings.finetune, parts.task, train)

    def from_layer(self, lowest: int) -> Share:
        log.info(f"time budget: timing {ROUNDS} steps with adapters from layer {lowest + 1} on, and on all layers")
        names = {name for row in self.parts.grid.names[lowest:] for name in row}

        def adapters(model: nn.Module, everywhere: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
            return {name: layer for name, layer in everywhere.items() if name in names}

        return self._compare(adapters)

    def of_selection(self, selection: Selection) -> Share:
        log.info(f"time budget: timing {ROUNDS} steps with the selected modules, and with LoRA on all modules")

        def adapters(model: nn.Module, everywhere: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
            self.method.adapt(model, self.parts.grid, selection, self.parts.settings.seed)
            return taken(model)

        return self._compare(adapters)

    def _compare(self, adapters: Callable[[nn.Module, Mapping[str, nn.Module]], dict[str, nn.Module]]) -> Share:
        parts, model = self.parts, self.parts.model
        device, home = accelerator_device(parts.settings.trainer.accelerator), next(model.parameters()).device
        with left_as_found(model, parts.settings.seed, list(parts.backbone.head_parameters())):
            try:
                model.to(device).train()
                _everywhere(model, parts.grid, self.method)
                everywhere = taken(model)
                both = [_Timer(self, everywhere, device), _Timer(self, adapters(model, everywhere), device)]
                for number in range(ROUNDS + 1):
                    batch = self.batches[number % len(self.batches)]
                    for timer in both if number % 2 else reversed(both):
                        timer.step({key: value.to(device) for key, value in batch.items()})
            finally:
                taken(model)
                model.to(home)
        most, some = (timer.seconds[1:] for timer in both)
        ratios = [a / b for a, b in zip(some, most, strict=True)]
        low, _, high = quantiles(ratios, method="inclusive")
        return Share(median(ratios), median(some), median(most), low, high)


class _Timer:
    """Times whole steps of one adapted model: forward, backward, clipping, optimiser."""

    def __init__(self, timed: Timed, layers: Mapping[str, nn.Module], device: torch.device) -> None:
        self.timed, self.layers, self.device = timed, layers, device
        self.model, self.settings = timed.parts.model, timed.parts.settings
        put(self.model, layers)
        set_kernel(self.model, self.settings.model.kernel)
        self.trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.optimizer = make_optimiser(self.trained, self.settings.finetune)
        taken(self.model)
        self.seconds: list[float] = []

    def step(self, batch: Mapping[str, Tensor]) -> None:
        put(self.model, self.layers)
        dtype = AUTOCAST.get(self.settings.trainer.precision)
        self._wait()
        began = time.perf_counter()
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            output = self.model(**self.timed.parts.task.inputs(batch))
            loss = self.timed.criterion.loss(output, batch)
        loss.backward()
        if self.settings.finetune.clip is not None:
            torch.nn.utils.clip_grad_norm_([p for _, p in self.trained], self.settings.finetune.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._wait()
        self.seconds.append(time.perf_counter() - began)
        taken(self.model)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()


def _everywhere(model: nn.Module, grid: Grid, method: Selecting) -> None:
    """LoRA on all candidate modules, at the method's rank."""
    everything = torch.ones(grid.n_layers, grid.n_types, dtype=torch.bool)
    attach(model, grid.names, everything, method.rank, None, method.alpha, method.dropout, freeze=False)
