"""Checks the runs of a sweep before the first one starts, and says which of them are complete."""

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from diffora.errors import UserError
from diffora.files import json_digest
from diffora.loop.machine import check_machine
from diffora.run.check import check
from diffora.run.directory import finished
from diffora.run.precision import NAME_IT, settled
from diffora.run.unchanged import check_unchanged, data_now, files_now
from diffora.settings.identity import plain


class SweepCheck:
    """The checks of one sweep. What several runs share is checked once.

    Args:
        local: whether the runs are on this machine. If not, devices and files cannot be checked here.
    """

    def __init__(self, local: bool) -> None:
        self.local = local
        self._checked: set[Hashable] = set()
        self._data: dict[str, str | None] = {}  # by the task's settings: the hash that the rows have now

    def is_complete(self, cfg: DictConfig, folder: Path, parts: Sequence[Hashable]) -> bool:
        """Whether a run is complete. Checks its configuration, and the files of a complete run.

        Args:
            cfg: the composed configuration, without Hydra's own section.
            folder: of the run.
            parts: what the configuration was made from. It is not checked again if other runs had all of its parts.

        Raises:
            UserError: the configuration is wrong, or the files of a complete run have changed.
        """
        if not self.local and cfg.trainer.get("precision") == "auto":
            raise UserError(
                "trainer.precision=auto: this launcher may run on another machine, and one sweep should have one "
                f"precision; {NAME_IT}"
            )
        cfg, _ = settled(cfg)
        if not self._checked.issuperset(parts):
            settings, _ = check(cfg)
            if self.local and not settings.dry_run:
                check_machine(settings)
            self._checked.update(parts)
        done = finished(cfg, folder)
        if done is not None and self.local:
            self._check_files(cfg, folder, done)
        return done is not None

    def _check_files(self, cfg: DictConfig, folder: Path, done: dict[str, Any]) -> None:
        """Refuse a complete run whose data, backbone or other files have changed."""
        settings, task = check(cfg)
        rows = json_digest(plain(cfg)["task"])
        if rows not in self._data:
            self._data[rows] = data_now(settings, task)
        check_unchanged(folder, done, files_now(settings, self._data[rows]))
