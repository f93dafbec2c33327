"""Fits one stage of a run with a Lightning Trainer."""

import logging
import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from diffora.errors import UserError, out_of_memory
from diffora.loop.checkpoint import Checkpoints, DigestCheckpointIO, continuing, newest_checkpoint
from diffora.loop.compiled import compiled
from diffora.loop.loggers import why
from diffora.loop.own import failed_callback
from diffora.loop.parts import Parts
from diffora.loop.sharded import FSDP, Sharded
from diffora.loop.stage import NonFiniteLoss, Stage

log = logging.getLogger(__name__)


def fit(
    parts: Parts,
    stage: str,
    module: Stage,
    data: L.LightningDataModule,
    callbacks: Sequence[L.Callback],
    loggers: Sequence[Any],
    **extra: Any,
) -> None:
    """Fit one stage. If the run resumes, continue from the stage's newest checkpoint.

    Args:
        parts: of the run, for settings, folder and earlier attempt. ``parts.first_step_at`` is set, and
            the stage's checkpoint is taken out of ``parts.earlier``.
        stage: "search" or "finetune"; also the name of the section of settings.
        module: the model and its steps.
        extra: more arguments of the Trainer.

    Raises:
        UserError: the loss was not finite, memory ran out, or the checkpoint does not fit.
    """
    section = getattr(parts.settings, stage)
    checkpoints = parts.folder / "checkpoints"
    newest = parts.earlier.checkpoints.pop(stage, None)
    if newest is not None:
        log.info(f"{stage}: continuing from {newest[0]}")
        with continuing(newest[0]):
            module.check_state(newest[1]["state_dict"])
            if module.restore_if_over(newest[1], section.epochs):
                return
    callbacks = [*callbacks, Checkpoints(checkpoints, stage, parts.made_with)]
    trainer = _trainer(parts, callbacks, loggers, **({"max_epochs": section.epochs} | extra))
    if trainer.world_size > 1:
        _stop_together(trainer)
    resume_from = None if newest is None else newest[0]
    try:
        both_levels = getattr(section, "update", None) == "simultaneous"  # two backward passes through one forward pass
        with (
            compiled(module.model, parts.settings.trainer.compile and module.compiles, keep_graph=both_levels),
            module.prefix or nullcontext(),
        ):
            trainer.fit(module, datamodule=data, ckpt_path=resume_from, weights_only=True)
    except NonFiniteLoss as error:
        raise _not_finite(error, stage, section, parts.settings.trainer.precision, checkpoints) from error
    except SystemExit as error:  # Lightning turns ctrl-C into this
        raise KeyboardInterrupt from error
    except Exception as error:
        if (shortage := out_of_memory(error)) is not None:
            raise _out_of_memory(shortage, stage, section, trainer.world_size) from error
        if not isinstance(error, UserError) and (name := failed_callback(error, parts.settings.trainer)) is not None:
            what = f"{type(error).__name__}: {why(error)}"
            raise UserError(f"{name} fails with {what}; debug=default shows where") from error
        if trainer.world_size > 1 and OTHER_PROCESS.search(str(error)):
            raise UserError("another process of this run failed; its message is above") from error
        if resume_from is None or module.begun:
            raise
        with continuing(resume_from):  # an error before training begins is about the checkpoint
            raise
    if parts.first_step_at is None:
        parts.first_step_at = module.first_step_at


OTHER_PROCESS = re.compile("Connection (closed|reset) by peer|NCCL (error|communicator was aborted)")
"""In the message of an error that comes up in a process because another one ended."""


def _stop_together(trainer: L.Trainer) -> None:
    """On SIGTERM, only note the signal, in all processes. They stop together, when a batch begins.

    The handler of Lightning sends to the other processes at once. If the signal comes while they exchange something
    else, all of them wait for ever.
    """
    connector: Any = trainer._signal_connector

    def note(number: int, frame: Any) -> None:
        if not connector.received_sigterm and (launcher := trainer.strategy.launcher) is not None:
            launcher.kill(number)
        connector.received_sigterm = True

    connector._sigterm_notifier_fn = note


def _trainer(parts: Parts, callbacks: list[L.Callback], loggers: Sequence[Any], **more: Any) -> L.Trainer:
    t = parts.settings.trainer
    # With deterministic algorithms, torch also fills all new memory, to reveal reads of memory that was never written.
    # This costs a twentieth of a step, so it is done only for deterministic=true, not for deterministic=warn.
    torch.utils.deterministic.fill_uninitialized_memory = t.deterministic is True  # type: ignore[attr-defined]
    return L.Trainer(
        accelerator=t.accelerator,
        devices=t.devices,
        num_nodes=t.num_nodes,
        strategy=Sharded(parts.backbone, parts.grid.layers) if t.strategy == FSDP else t.strategy,
        inference_mode=t.strategy != FSDP,  # FSDP2 keeps the tensors that it collects weights in for the next step
        precision=t.precision,  # type: ignore[arg-type]  # `settled` has replaced auto
        deterministic=t.deterministic,
        logger=loggers or False,
        callbacks=callbacks,
        plugins=[DigestCheckpointIO(), *slurm()],
        default_root_dir=parts.folder,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        enable_progress_bar=False,
        enable_model_summary=False,
        detect_anomaly=parts.settings.debug is not None and parts.settings.debug.detect_anomaly,
        **more,
    )


def slurm() -> list[SLURMEnvironment]:
    """The environment of a process that srun started, without Lightning's requeueing; empty elsewhere.

    When SLURM sends SIGUSR1, Lightning would write a checkpoint of its own into the run directory, whose name no later
    run finds, and later runs would stop because of it.
    """
    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():  # torchrun goes first, also inside SLURM
        return []
    return [SLURMEnvironment(auto_requeue=False)]


def _not_finite(error: NonFiniteLoss, stage: str, section: Any, precision: str, checkpoints: Path) -> UserError:
    good = newest_checkpoint(checkpoints, stage)
    kept = f"the last checkpoint with a finite loss is {good[0]}" if good else "there is no earlier checkpoint"
    return UserError(
        f"{stage}: {error}; stopped, {kept}. Try a lower {stage}.lr (it is {section.lr:g})"
        + (f", a lower {stage}.weight_decay (it is {section.weight_decay:g})" if section.weight_decay > 1 else "")
        + (" or trainer.precision=32-true" if precision != "32-true" else "")
    )


def _out_of_memory(shortage: str, stage: str, section: Any, processes: int) -> UserError:
    advice = ""
    if shortage.startswith("out of memory"):
        batch, parts = section.batch_size, section.accumulate
        advice = f" at {stage}.batch_size={batch}"
        more = next((n for n in range(parts + 1, batch + 1) if batch % n == batch // n % processes == 0), None)
        if getattr(section, "order", 1) == 2:  # its Γ step takes the whole batch, and goes with no checkpointing
            advice += f"; try a smaller {stage}.batch_size, or {stage}.order=1"
        elif more is not None:
            advice += f"; {stage}.accumulate={more} takes {batch // more} rows at a time and keeps the batch"
        else:
            advice += f"; try a smaller {stage}.batch_size, or trainer.gradient_checkpointing=true"
    return UserError(f"{stage}: {shortage}{advice}")
