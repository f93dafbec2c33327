"""One run from configuration to record, top to bottom: check, load, select, adapt, fine-tune, export, record.

Everything goes one way. Only the `Selection` passes from search to fine-tuning (and, with ``method.warm_start``, the
searched A and B).
"""

import copy
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import DictConfig, OmegaConf
from torch import nn

from diffora import START
from diffora.adapters.origin import Origin
from diffora.core.lowrank import set_kernel
from diffora.core.selection import Selection
from diffora.errors import UserError, called, machine_limits
from diffora.files import check_writable
from diffora.hub import resolve
from diffora.loop.launch import torchrun
from diffora.loop.loggers import Loggers
from diffora.loop.machine import check_machine, found_devices
from diffora.loop.parts import Parts
from diffora.loop.predict import predict
from diffora.loop.prefix import check_prefix
from diffora.loop.process import is_main, quiet_libraries
from diffora.methods.base import Adaptation, Method
from diffora.methods.selecting import Selecting
from diffora.records import write_record
from diffora.run import directory as rundir
from diffora.run import terminal
from diffora.run.check import check
from diffora.run.classes import write_classes
from diffora.run.conflicts import shared_batches
from diffora.run.forgetting import forgetting, text_loss
from diffora.run.precision import settled
from diffora.run.record import (
    file_digests,
    metric_facts,
    missing_files,
    new_record,
    peaks,
    read_record,
    reset_peaks,
    result_files,
)
from diffora.run.select import Selected, select, start_warm
from diffora.run.unchanged import check_unchanged, data_now, files_now
from diffora.settings.sections import Settings
from diffora.tasks.account import lines as account_lines
from diffora.tasks.base import Task, get_task
from diffora.training.criterion import criterion_of
from diffora.training.finetune import FineTuneModule
from diffora.training.stage import finetune
from diffora.training.steps import check_stages
from diffora.trust import literal

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What a run returns if it is called as a library."""

    folder: Path
    record: dict[str, Any]
    model: nn.Module | None
    selection: Selection | None

    @property
    def metrics(self) -> dict[str, float]:
        metrics: dict[str, float] = self.record["metrics"]
        return metrics


def train(cfg: DictConfig) -> float | None:
    """The Hydra job: one run in Hydra's run directory. Returns the task's main validation metric."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    given = any(line.lstrip("+").startswith("hydra.run.dir=") for line in hydra.overrides.hydra)
    if cfg.get("resume") is True and hydra.mode == RunMode.RUN and not given:
        raise UserError("resume=true needs hydra.run.dir=<the run directory to continue>")
    folder = Path(hydra.runtime.output_dir)
    if cfg.get("resume") is True and hydra.mode == RunMode.RUN and not rundir.begun(folder):
        log.warning(f"resume=true: {folder} has nothing to continue, so the run starts anew")
    accelerator, devices = (
        OmegaConf.select(cfg, f"trainer.{key}", throw_on_resolution_failure=False) for key in ("accelerator", "devices")
    )
    several = found_devices(str(accelerator)) > 1 if devices == "auto" else devices not in (None, 1)
    if hydra.mode == RunMode.MULTIRUN and several and "LOCAL_RANK" not in os.environ:
        raise UserError(
            f"trainer.devices={devices} in a sweep would start the sweep again in every process; start the processes "
            f"yourself, `{torchrun()} -m …`, or sweep with trainer.devices=1"
        )
    # A single run counts from the start of the program. Runs of a sweep are compared: all count from their own start.
    result = run(cfg, folder, began=START if hydra.mode == RunMode.RUN else None)
    return result.metrics.get(f"validation/{get_task(cfg.task).main_metric}")


def run(cfg: DictConfig, folder: Path, began: float | None = None) -> Result:
    """Do one run of a composed configuration, and write it to ``folder``.

    Args:
        cfg: the composed configuration.
        folder: the run directory.
        began: when the run started, in seconds since 1970; its times count from there. None: now.

    Raises:
        UserError: the user can correct the cause. Mistakes in configuration, data and files are found before anything
            is written to ``folder``.
    """
    began = time.time() if began is None else began
    cfg, precision = settled(_named(cfg))  # from here on only for what is written and compared
    settings, task = check(cfg)
    if is_main():
        rundir.check_place(folder)
    if settings.dry_run:
        return _dry_run(cfg, settings, task, folder, precision)
    quiet_libraries()
    check_machine(settings)
    if settings.trainer.devices == "auto":
        uneven = list(shared_batches(settings, found_devices(settings.trainer.accelerator)))
        if uneven:
            raise UserError(uneven)
    before = rundir.content(folder)
    # If the run is complete, every process has to know it: the others would wait for the main one.
    if (is_main() or settings.resume) and (done := rundir.finished(cfg, folder)) is not None:
        return _show_again(done, settings, task, folder)
    if is_main():
        check_writable(folder)
    reset_peaks()
    L.seed_everything(settings.seed, verbose=False)
    parts, step_time = _load(settings, folder, task)
    record = new_record(cfg, parts.data.hash, (parts.identity or {}).get("digest")) | metric_facts(task)
    record |= {
        "backbone": parts.identity,
        "inputs": settings.method.inputs,
        "data": parts.data.accounts,
        "step_time": step_time,
        "precision": precision,
        "prefix": parts.prefix,
    }
    if names := parts.backbone.arguments.get("id2label"):
        record["classes"] = list(names.values())
    # Such a change can make other numbers of the same settings, as a new kernel or another padding does.
    changed = rundir.changed_versions(folder, record) if parts.earlier.exists else []
    with rundir.account(cfg, folder, record, before):
        if changed:
            log.warning(
                f"{folder}: an earlier attempt had other versions ({', '.join(changed)}): the result may not be that "
                "of a run that never stopped"
            )
        if precision:
            log.info(f"precision: {precision}")
        if is_main():
            for line in account_lines(parts.data.accounts):
                log.warning(line)
        return execute(parts, settings.method, record, began)


def _dry_run(cfg: DictConfig, settings: Settings, task: Task, folder: Path, precision: str | None) -> Result:
    """The result of ``dry_run=true``: a record without metrics."""
    from diffora.run.dry_run import dry_run

    with machine_limits():
        if precision:
            log.info(f"precision: {precision}")
        record = new_record(cfg, None) | {"precision": precision}
        return Result(folder, dry_run(settings, settings.method, task, folder, record), None, None)


def _show_again(done: dict[str, Any], settings: Settings, task: Task, folder: Path) -> Result:
    """The result of a run that is complete already, as it was shown at its end.

    Raises:
        UserError: the data, the backbone or other files have changed since.
    """
    if is_main():
        check_unchanged(folder, done, files_now(settings, data_now(settings, task)))
        if done["status"] == "selected":
            terminal.print_selection(done, folder)
        else:
            terminal.print_result(done, task, folder)
    return Result(folder, done, None, None)


def _load(settings: Settings, folder: Path, task: Task) -> tuple[Parts, dict[str, Any]]:
    """(data and model of a run, the step time that a budget allows). Everything that can be wrong is checked here.

    Raises:
        UserError: data, model and settings do not fit together, or memory ran out.
    """
    method = settings.method
    with machine_limits("try a smaller model, model.dtype=bfloat16 or fewer rows (task.max_train_rows=)"):
        parts = Parts.load(settings, folder, task)
        step_time: dict[str, Any] = {}
        if isinstance(method, Selecting) and method.time_budget is not None:
            from diffora.run.steptime import limit_layers  # imports what other runs do not need

            step_time = limit_layers(parts, method)  # checks the method for the layers that are left
        else:
            method.check(parts.model, parts.grid)
        if settings.trainer.cache_prefix:
            check_prefix(parts)
            if settings.resume:  # a search that is finished already
                parts.prefix |= parts.earlier.prefix | ((read_record(folder) or {}).get("prefix") or {})
    check_stages(settings, method, parts.grid, len(parts.data.train.encoded))
    criterion_of(settings.finetune, task, parts.data.train.encoded)  # raises if it does not suit the task
    return parts, step_time


def _named(cfg: DictConfig) -> DictConfig:
    """The configuration, with the names of its cell as plain text: ``${…}`` in them is not resolved."""
    cfg = copy.deepcopy(cfg)
    if isinstance(cell := cfg.get("cell"), DictConfig):
        names = OmegaConf.to_container(cell, resolve=False)
        assert isinstance(names, dict)
        cfg.cell = {key: literal(name) if isinstance(name, str) else name for key, name in names.items()}
    return cfg


def execute(parts: Parts, method: Method, record: dict[str, Any], began: float) -> Result:
    """Select, adapt, fine-tune, export and predict. Completes ``record``."""
    settings, folder = parts.settings, parts.folder
    loggers = Loggers(settings.logger, folder, settings.composed)
    failed = True
    try:
        found = select(parts, method, loggers)
        if parts.prefix and is_main():
            write_record(folder, record)  # a run that goes on after a kill reads the search's part there
        if found.selection is not None:
            record["selection"] = {"file": "selection.json", **found.selection.summary()}
            if record["step_time"]:
                from diffora.run.steptime import check_step_time

                assert isinstance(method, Selecting)
                check_step_time(parts, method, found.selection, record["step_time"])
        if settings.search_only:
            result = stop_at(found, parts, record, loggers, began)
            failed = False
            return result
        before = text_loss(parts)
        adaptation = adapt(parts, method, found)
        record["params"] = parts.backbone.count_parameters() | {"backbone": parts.backbone.n_parameters}
        module = finetune(parts, adaptation, record["params"], loggers)
        module.load_trainable(module.best_state)
        needed = adaptation.inference_parameters()
        record["params"]["inference"] = record["params"]["adapter"] if needed is None else needed
        record |= {
            "metrics": module.results() | forgetting(parts, before),
            "history": module.history,
            "memory": peaks(),
        }
        if is_main():
            path, local = resolve(settings.model.path)
            base = str(Path(path).resolve()) if local else path
            adaptation.export(folder, Origin(base, parts.task, record, settings.composed, parts.backbone))
        record["time"] = times(parts, found.seconds, module, began)
        if is_main():
            write_classes(folder, module.best_classes)
            complete(parts, record, "completed")
        record["status"] = "completed"  # a failure after this line does not make it a failed run
        failed = False
        if is_main():
            loggers.summary(record)
            terminal.print_result(record, parts.task, folder)
        return Result(folder, record, parts.model, found.selection)
    finally:
        loggers.finish(failed)


def stop_at(found: Selected, parts: Parts, record: dict[str, Any], loggers: Loggers, began: float) -> Result:
    """End a run with ``search_only=true`` at its selection. Completes ``record``."""
    total = max(time.time() - began, found.seconds)
    record["time"] = {"search_s": round(found.seconds, 3), "total_s": round(total, 3)}
    record["memory"] = peaks()
    if is_main():
        complete(parts, record, "selected")
    record["status"] = "selected"
    if is_main():
        loggers.summary(record)
        terminal.print_selection(record, parts.folder)
    return Result(parts.folder, record, parts.model, found.selection)


def adapt(parts: Parts, method: Method, found: Selected) -> Adaptation:
    """Let the method adapt the backbone. With ``method.warm_start``, the adapters start from the searched A and B."""
    # The random numbers that follow must be the same, whether the selection was just searched or comes from a file.
    L.seed_everything(parts.settings.seed, verbose=False)
    adaptation = method.adapt(parts.model, parts.grid, found.selection, parts.settings.seed)
    set_kernel(parts.model, parts.settings.model.kernel)
    parts.backbone.check_trainable()
    start_warm(parts, method, found)
    return adaptation


def times(parts: Parts, search_s: float, module: FineTuneModule, began: float) -> dict[str, float | None]:
    """The record's ``time``, in seconds: of each stage, a training step, the whole run, and until the first step."""
    total = max(time.time() - began, search_s + module.elapsed)  # a resumed run counts its earlier attempts' stages
    return {
        "search_s": round(search_s, 3),
        "finetune_s": round(module.elapsed, 3),
        "step_s": None if module.step_seconds is None else round(module.step_seconds, 6),
        "total_s": round(total, 3),
        "startup_s": None if parts.first_step_at is None else round(parts.first_step_at - began, 3),
    }


def complete(parts: Parts, record: dict[str, Any], status: str) -> None:
    """Write predictions, and the record with its status and the list and the digests of the run's files.

    Raises:
        UserError: something removed files of the run while it was going on.
    """
    folder = parts.folder
    before = result_files(folder, record)  # what is there now must still be there after the predictions
    files, scores = write_predictions(parts)
    record["metrics"] |= scores
    record["files"] = [*before, *files]
    if lost := missing_files(folder, record):
        raise UserError(f"{folder}: {', '.join(lost)} is gone; something removed it while the run went on")
    record["digests"] = file_digests(folder, result_files(folder, record))
    write_record(folder, record | {"status": status})


def write_predictions(parts: Parts) -> tuple[list[str], dict[str, float]]:
    """Predict the test splits (``predict=true``) and write the predictions to ``predictions/``.

    Returns:
        (the files, relative to the run directory; the metrics of splits that have labels and were not validated on)
    """
    written: list[Path] = []
    scores: dict[str, float] = {}
    for name, split in parts.data.test.items():
        rows = parts.settings.finetune.evaluation_rows
        try:
            outputs = predict(parts.model, parts.task, split, parts.data.collate_eval, rows, parts.settings.trainer)
            files = list(parts.task.write_predictions(parts.folder / "predictions", name, outputs, split))
        except UserError as error:  # the training is done and must not be lost with it
            log.error(f"no predictions for {name}: {error}; {called('evaluate')} run={parts.folder} split={name}")
            continue
        for file in files:
            log.info(f"predictions for {name}: {file}")
        written += files
        if name not in parts.data.validation and parts.task.labelled(split):
            found = parts.task.score(outputs, split)
            scores |= {f"{name}/{key}": round(value, 6) for key, value in found.items()}
    return [file.relative_to(parts.folder).as_posix() for file in written], scores
