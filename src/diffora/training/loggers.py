"""Where metrics go: csv, TensorBoard and W&B, any of them together."""

import logging
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

from lightning.pytorch.loggers import CSVLogger, Logger

from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.files import write_text
from diffora.results.figures import dam_heatmap

log = logging.getLogger(__name__)


class Loggers:
    """The loggers of one run, shared by its stages.

    Args:
        choices: the ``logger`` section of the configuration.
        folder: the run directory.
        config: the resolved configuration, recorded with W&B.
    """

    def __init__(self, choices: Any, folder: Path, config: dict[str, Any]) -> None:
        self.choices, self.folder = choices or {}, folder
        self.wandb: Any = _wandb_logger(wandb, folder, config) if (wandb := self.choices.get("wandb")) else None

    def of_stage(self, stage: str) -> list[Logger]:
        """Loggers for one stage's Trainer; an attempt that resumes gets a version of its own."""
        found: list[Logger] = []
        if self.choices.get("csv"):
            found.append(CSVLogger(self.folder / "logs", name=stage))
        if self.choices.get("tensorboard"):
            from lightning.pytorch.loggers import TensorBoardLogger

            try:
                found.append(TensorBoardLogger(self.folder / "logs" / "tensorboard", name=stage))
            except ModuleNotFoundError:
                raise UserError("logger=tensorboard needs the package tensorboard: pip install tensorboard") from None
        if self.wandb is not None:
            found.append(self.wandb)
        return found

    def dam(self, selection: Selection, step: int, stage_loggers: list[Any]) -> None:
        """Send the DAM's picture to those loggers that take pictures."""
        pictured = [logger for logger in stage_loggers if not isinstance(logger, CSVLogger)]
        if not pictured:
            return
        png = dam_heatmap(selection, f"relaxed DAM after round {step}")
        import io

        import matplotlib.image

        pixels = matplotlib.image.imread(io.BytesIO(png))
        for logger in pictured:
            if logger is self.wandb:
                import wandb

                logger.experiment.log({"DAM": wandb.Image(pixels, caption=f"round {step}")})
            else:
                logger.experiment.add_image("DAM", pixels[..., :3], step, dataformats="HWC")

    def summary(self, record: dict[str, Any]) -> None:
        """Put a run's results in W&B's summary, where its tables look, and keep selection and adapter as artefacts."""
        if self.wandb is None:
            return
        import wandb

        parts = ("params", "time", "memory")
        values = {f"{part}/{key}": value for part in parts for key, value in record[part].items()}
        run = self.wandb.experiment
        run.summary.update(record["metrics"] | values)
        for kind, files in (("selection", ("selection.json", "trajectory.json")), ("adapter", ("adapter",))):
            there = [self.folder / name for name in files if (self.folder / name).exists()]
            if not there:
                continue
            about = {key: record[key] for key in ("method", "task", "model", "seed")}
            artifact = wandb.Artifact(f"{kind}-{run.id}", type=kind, metadata=about)
            for path in there:
                (artifact.add_dir if path.is_dir() else artifact.add_file)(str(path))
            run.log_artifact(artifact)

    def finish(self, failed: bool) -> None:
        """Close W&B's run inside the job, so that the next job of a sweep gets one of its own."""
        if self.wandb is not None:
            import wandb

            wandb.finish(exit_code=int(failed))


def _wandb_logger(choice: Any, folder: Path, config: dict[str, Any]) -> Any:
    import wandb
    from lightning.pytorch.loggers import WandbLogger
    from lightning.pytorch.utilities import rank_zero_only

    os.environ.setdefault("WANDB_SILENT", "true")
    offline = os.environ.get("WANDB_MODE", "") in ("offline", "dryrun", "disabled") or not _has_key()
    if offline and "WANDB_MODE" not in os.environ:
        log.info(
            "W&B: no API key (WANDB_API_KEY, or `wandb login`), so this run is recorded offline in "
            f"{folder / 'wandb'}; `wandb sync` uploads it later"
        )
    identity = folder / "wandb" / "run_id"  # a resumed run goes on in the same W&B run
    settings = {
        "project": choice["project"],
        "entity": choice["entity"],
        "group": choice["group"],
        "tags": list(choice["tags"]),
        "name": folder.name,
        "config": config,
        "dir": str(folder),
        "id": identity.read_text().strip() if identity.is_file() else uuid4().hex[:8],
        "resume": "allow",
        "job_type": "run",
        "settings": wandb.Settings(console="off", init_timeout=60),
    }
    if getattr(rank_zero_only, "rank", 0) == 0:
        write_text(identity, settings["id"])
        modes = ["offline"] if offline else ["online", "offline"]
        for mode in modes:
            try:
                wandb.init(mode=os.environ.get("WANDB_MODE", mode), **settings)  # type: ignore[arg-type]
                break
            except (wandb.errors.CommError, wandb.errors.AuthenticationError) as error:
                log.info(f"W&B: {str(error).splitlines()[0]}; recording offline, `wandb sync` uploads later")
        wandb.define_metric("search/*", step_metric="trainer/global_step")
    return WandbLogger(save_dir=folder, project=choice["project"])


def _has_key() -> bool:
    """Whether W&B would find a key without asking for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc
    from urllib.parse import urlparse

    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
