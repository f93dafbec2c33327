"""Progress on the screen: a bar for each stage with the time left, or a line for each epoch without a terminal."""

import logging
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger(__name__)


class ProgressBar(Checkpoint):
    """Progress of one stage over all its epochs.

    It is a `Checkpoint`, so that Lightning calls it after the module's own hooks.

    Args:
        stage: name of the stage.
        unit: name of an epoch in this stage.
        shown: logged metrics to show beside the bar.
    """

    def __init__(self, stage: str, unit: str, shown: tuple[str, ...]) -> None:
        self.stage, self.unit, self.shown = stage, unit, shown
        self.bar: Progress | None = None
        self._metrics = ""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        self._started, self._first = time.monotonic(), trainer.current_epoch
        console = Console()
        if not console.is_terminal:
            return
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=console,
        )
        total = pl_module.progress()[2]
        done = trainer.current_epoch / (trainer.max_epochs or 1)
        self._task = self.bar.add_task("", total=total, completed=round(total * done), metrics="")
        self._describe(pl_module)
        self.bar.start()

    def _describe(self, module: Any, doing: str = "") -> None:
        if self.bar is not None:
            done, epochs, _ = module.progress()
            text = f"{self.stage}: {self.unit} {done:g}/{epochs:g}{doing}"
            self.bar.update(self._task, description=text, metrics=self._metrics)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._describe(pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._describe(pl_module, ", evaluating")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if self.bar is not None:
            self.bar.advance(self._task)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not (trainer.is_global_zero and pl_module.checkpoint_due):
            return
        values = trainer.callback_metrics
        self._metrics = "  ".join(f"{name.split('/')[-1]} {values[name]:.4f}" for name in self.shown if name in values)
        self._describe(pl_module)
        if self.bar is None:
            spent = time.monotonic() - self._started
            done, total, _ = pl_module.progress()
            ended, segments = trainer.current_epoch + 1, trainer.max_epochs or 1
            left = spent / (ended - self._first) * (segments - ended)
            log.info(f"{self.stage}: {self.unit} {done:g}/{total:g}  {spent:.0f} s, {left:.0f} s left  {self._metrics}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
