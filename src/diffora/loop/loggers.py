"""Where metrics go: csv, TensorBoard and W&B, any of them together."""

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

from lightning.pytorch.loggers import CSVLogger, Logger

from diffora.core.selection import Selection
from diffora.errors import UserError, place, reason
from diffora.files import write_text
from diffora.run.figures import dam_heatmap
from diffora.settings import sections

log = logging.getLogger(__name__)


class Loggers:
    """The loggers of one run, shared by its stages. One that fails costs a warning and is left out from then on.

    Args:
        choices: the ``logger`` section of the configuration.
        folder: the run directory.
        config: the resolved configuration, recorded with W&B.

    Raises:
        UserError: a logger that is asked for is not installed.
    """

    def __init__(self, choices: sections.Logger | None, folder: Path, config: dict[str, Any]) -> None:
        self.choices, self.folder = choices or sections.Logger(), folder
        if self.choices.tensorboard and not any(map(find_spec, ("tensorboard", "tensorboardX"))):
            raise UserError("logger=tensorboard needs the package tensorboard: pip install tensorboard")
        self.wandb: Any = None
        wandb = self.choices.wandb
        if wandb and (logger := _wandb_logger(wandb, folder, config)) is not None:
            self.wandb = Guarded("wandb", logger)

    def of_stage(self, stage: str) -> list[Logger]:
        """Loggers for one stage's Trainer; an attempt that resumes gets a version of its own."""
        found: list[Logger] = []
        if self.choices.csv:
            found.append(Guarded("csv", CSVLogger(self.folder / "logs", name=stage)))
        if self.choices.tensorboard:
            from lightning.pytorch.loggers import TensorBoardLogger

            found.append(Guarded("tensorboard", TensorBoardLogger(self.folder / "logs" / "tensorboard", name=stage)))
        if self.wandb is not None:
            found.append(self.wandb)
        return found

    def dam(self, selection: Selection, step: int, stage_loggers: list[Any]) -> None:
        """Send the DAM's picture to those loggers that take pictures."""
        pictured = [logger for logger in stage_loggers if not isinstance(logger.inner, CSVLogger) and logger.works]
        if not pictured:
            return
        png = dam_heatmap(selection, f"relaxed DAM after round {step}")
        import io

        import matplotlib.image

        pixels = matplotlib.image.imread(io.BytesIO(png))
        for logger in pictured:
            with logger.guard():
                if logger is self.wandb:
                    import wandb

                    logger.inner.experiment.log({"DAM": wandb.Image(pixels, caption=f"round {step}")})
                else:
                    logger.inner.experiment.add_image("DAM", pixels[..., :3], step, dataformats="HWC")

    def summary(self, record: dict[str, Any]) -> None:
        """Put a run's results in W&B's summary, where its tables look, and keep selection and adapter as artefacts."""
        if self.wandb is None or not self.wandb.works:
            return
        with self.wandb.guard():
            import wandb

            parts = ("params", "time", "memory")
            values = {f"{part}/{key}": value for part in parts for key, value in record[part].items()}
            run = self.wandb.inner.experiment
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
            with self.wandb.guard():
                import wandb

                wandb.finish(exit_code=int(failed))


class Guarded(Logger):
    """A logger whose failures cost one warning: it is not called again, and the run goes on.

    Args:
        kind: its name in the configuration.
        inner: the logger.
    """

    def __init__(self, kind: str, inner: Any) -> None:
        super().__init__()
        self.kind, self.inner, self.works = kind, inner, True

    @contextmanager
    def guard(self) -> Iterator[None]:
        """A block that calls the logger."""
        try:
            yield
        except Exception as error:
            if self.works:
                log.warning(f"logger={self.kind} fails and is left out from here on: {_why(error)}")
            self.works = False

    def _call(self, method: str, *args: Any, **kwargs: Any) -> None:
        if self.works:
            with self.guard():
                getattr(self.inner, method)(*args, **kwargs)

    def _get(self, attribute: str) -> Any:
        if self.works:
            with self.guard():
                return getattr(self.inner, attribute)
        return None

    @property
    def experiment(self) -> Any:
        return self._get("experiment")

    @property
    def name(self) -> str | None:
        return self._get("name")

    @property
    def version(self) -> int | str | None:
        return self._get("version")

    @property
    def save_dir(self) -> str | None:
        return self._get("save_dir")

    @property
    def log_dir(self) -> str | None:
        return self._get("log_dir")

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._call("log_metrics", metrics, step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._call("log_hyperparams", params, *args, **kwargs)

    def log_graph(self, *args: Any, **kwargs: Any) -> None:
        self._call("log_graph", *args, **kwargs)

    def save(self) -> None:
        self._call("save")

    def finalize(self, status: str) -> None:
        self._call("finalize", status)


def _why(error: BaseException) -> str:
    """The reason of a failure in one line, without W&B's key."""
    text = reason(error) if isinstance(error, OSError) else (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, OSError) and (file := place(error)):
        text = f"{file}: {text}"
    for key in filter(None, (_key(), os.environ.get("WANDB_API_KEY"))):
        text = text.replace(key, "…")
    return text


def _wandb_logger(choice: sections.Wandb, folder: Path, config: dict[str, Any]) -> Any:
    """W&B's logger with a run begun, online if there is a key and the server answers; None if it cannot begin."""
    import wandb
    from lightning.pytorch.loggers import WandbLogger
    from lightning.pytorch.utilities import rank_zero_only

    os.environ.setdefault("WANDB_SILENT", "true")
    if getattr(rank_zero_only, "rank", 0) != 0:
        return WandbLogger(save_dir=folder, project=choice.project)
    asked = os.environ.get("WANDB_MODE", "")
    modes = ["online", "offline"]
    if asked in ("offline", "dryrun", "disabled"):
        modes = [asked]
    elif _key() is None:  # W&B would ask for one
        modes = ["offline"]
        log.info(
            f"W&B: no API key (WANDB_API_KEY, or `wandb login`), so this run is recorded offline in "
            f"{folder / 'wandb'}; `wandb sync` uploads it later"
        )
    limits: dict[str, Any] = {"finish_timeout": FINISH_S} if "finish_timeout" in wandb.Settings.model_fields else {}
    try:
        identity = folder / "wandb" / "run_id"  # a resumed run goes on in the same W&B run
        known = identity.read_text(errors="replace").strip() if identity.is_file() else ""
        settings = {
            "project": choice.project,
            "entity": choice.entity,
            "group": choice.group,
            "tags": list(choice.tags),
            "name": folder.name,
            "config": config,
            "dir": str(folder),
            "id": known if re.fullmatch(r"[\w-]{1,64}", known) else _new_id(),
            "resume": "allow",
            "job_type": "run",
            "settings": wandb.Settings(console="off", init_timeout=60, **limits),
        }
    except Exception as error:
        log.warning(f"W&B cannot begin, the run goes on without it: {_why(error)}")
        return None
    for mode in modes:
        try:
            with _no_questions():
                wandb.init(mode=mode, **settings)  # type: ignore[arg-type]
            wandb.define_metric("search/*", step_metric="trainer/global_step")
            write_text(identity, str(settings["id"]))
            return WandbLogger(save_dir=folder, project=choice.project)
        except Exception as error:
            offline = "this run is recorded offline, `wandb sync` uploads it later"
            then = offline if mode == "online" else "the run goes on without it"
            log.warning(f"W&B cannot begin {mode}: {_why(error)}; {then}")
            settings["id"] = _new_id()  # the one that failed counts as in use
    return None


def _new_id() -> str:
    return uuid4().hex[:8]


FINISH_S = 600
"""Seconds that the end of a run waits for W&B's upload; `wandb sync` does what is left."""


@contextmanager
def _no_questions() -> Iterator[None]:
    """Give the block an empty standard input: a library that asks gets no answer, and fails."""
    before = sys.stdin
    with open(os.devnull) as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = before


def _key() -> str | None:
    """The key that W&B would find without asking for one."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    import netrc
    from urllib.parse import urlparse

    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, UnicodeDecodeError, netrc.NetrcParseError):
        return None
    return found[2] if found else None
