"""Fits one stage of a run with a Lightning Trainer, from its newest checkpoint where the run resumes."""

import logging
from typing import Any

import lightning as L
import torch

from diffora.errors import UserError, out_of_memory
from diffora.loop.checkpoint import Checkpoints, DigestCheckpointIO, NonFiniteLoss, Stage, continuing, newest_checkpoint
from diffora.loop.parts import Parts

log = logging.getLogger(__name__)


def fit(
    parts: Parts,
    stage: str,
    module: Stage,
    data: L.LightningDataModule,
    callbacks: list[L.Callback],
    loggers: list[Any],
    **extra: Any,
) -> None:
    """Fit one stage, from its newest checkpoint where the run resumes.

    Raises:
        UserError: the loss was not finite, or memory ran out.
    """
    t, settings = parts.cfg.trainer, getattr(parts.cfg, stage)
    folder = parts.folder / "checkpoints"
    newest = parts.earlier.checkpoints.pop(stage, None)
    if newest is not None:
        log.info(f"{stage}: continuing from {newest[0]}")
        with continuing(newest[0]):
            module.check_state(newest[1]["state_dict"])
            if module.restore_if_over(newest[1], settings.epochs):
                return
    # Under trainer.deterministic torch also fills all memory that it hands out, to show who reads it before it is
    # written: a twentieth of a step. Where the user only wants to be warned, that is not asked for.
    torch.utils.deterministic.fill_uninitialized_memory = t.deterministic is True  # type: ignore[attr-defined]
    trainer = L.Trainer(
        accelerator=t.accelerator,
        devices=t.devices,
        strategy=t.strategy,
        precision=t.precision,
        deterministic=t.deterministic,
        logger=loggers or False,
        callbacks=[*callbacks, Checkpoints(folder, stage, parts.made_with)],
        plugins=[DigestCheckpointIO()],
        default_root_dir=parts.folder,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        enable_progress_bar=False,
        enable_model_summary=False,
        detect_anomaly=parts.cfg.debug is not None and parts.cfg.debug.detect_anomaly,
        **({"max_epochs": settings.epochs} | extra),
    )
    try:
        trainer.fit(module, datamodule=data, ckpt_path=None if newest is None else newest[0], weights_only=True)
    except NonFiniteLoss as error:
        good = newest_checkpoint(folder, stage)
        kept = f"the last good checkpoint is {good[0]}" if good else "there is no earlier checkpoint"
        raise UserError(
            f"{stage}: {error}; stopped, {kept}. Try a lower {stage}.lr (it is {settings.lr:g})"
            + (" or trainer.precision=32-true" if t.precision != "32-true" else "")
        ) from error
    except SystemExit as error:  # what Lightning makes of ctrl-C
        raise KeyboardInterrupt from error
    except Exception as error:
        if (shortage := out_of_memory(error)) is None:
            if newest is None or module.begun:
                raise
            with continuing(newest[0]):
                raise
        advice = ""
        if shortage.startswith("out of memory"):
            advice = (
                f" at {stage}.batch_size={settings.batch_size}; {stage}.accumulate={2 * settings.accumulate} halves "
                "the memory of a step and keeps the batch"
            )
        raise UserError(f"{stage}: {shortage}{advice}") from error
    if parts.first_step_at is None:
        parts.first_step_at = module.first_step_at
