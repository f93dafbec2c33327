"""Loggers for metrics: CSV, TensorBoard, W&B and the user's own, in any combination."""

import logging
import netrc
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from uuid import uuid4

from lightning.pytorch.loggers import CSVLogger, Logger

from diffora.errors import SECRET, UserError, first_line, place, reason, without_secrets
from diffora.files import write_text
from diffora.loop.own import own_loggers
from diffora.loop.process import is_main
from diffora.settings import sections

log = logging.getLogger(__name__)


class Loggers:
    """The loggers of one run, shared by its stages. If a logger fails, a warning is logged and it is not used again.

    Args:
        choices: the ``logger`` section of the configuration.
        folder: the run directory.
        config: the resolved configuration, which W&B and the user's own loggers record.

    Raises:
        UserError: a logger that is asked for is not installed, or the user's own does not accept its arguments.
    """

    def __init__(self, choices: sections.Logger | None, folder: Path, config: dict[str, Any]) -> None:
        self.choices, self.folder = choices or sections.Logger(), folder
        if self.choices.tensorboard and not any(map(find_spec, ("tensorboard", "tensorboardX"))):
            raise UserError("logger=tensorboard needs the package tensorboard: pip install tensorboard")
        self.wandb: Any = None
        wandb = self.choices.wandb
        if wandb and (logger := _wandb_logger(wandb, folder, config)) is not None:
            self.wandb = Guarded("wandb", logger)
        with _no_questions():
            self.own = [Guarded(name, own, whole_run=True) for name, own in own_loggers(self.choices, folder).items()]
            for own in self.own:
                own.log_hyperparams(config)

    def of_stage(self, stage: str) -> list[Logger]:
        """Loggers for the Trainer of one stage. A run that resumes writes to a new version."""
        found: list[Logger] = []
        if self.choices.csv:
            found.append(Guarded("csv", CSVLogger(self.folder / "logs", name=stage)))
        if self.choices.tensorboard:
            from lightning.pytorch.loggers import TensorBoardLogger

            found.append(Guarded("tensorboard", TensorBoardLogger(self.folder / "logs" / "tensorboard", name=stage)))
        if self.wandb is not None:
            found.append(self.wandb)
        return [*found, *self.own]

    def picture(self, name: str, png: bytes, step: int, caption: str, stage_loggers: Sequence["Guarded"]) -> None:
        """Send a picture to loggers of a stage.

        Args:
            name: what the picture is called there.
            png: content of a PNG file.
            step: its position on the loggers' axis.
            caption: shown by W&B.
            stage_loggers: those that show pictures (`taking_pictures`).
        """
        import io

        import matplotlib.image

        pixels = matplotlib.image.imread(io.BytesIO(png))
        for logger in stage_loggers:
            with logger.guard():
                if logger is self.wandb:
                    import wandb

                    logger.inner.experiment.log({name: wandb.Image(pixels, caption=caption)})
                else:
                    logger.inner.experiment.add_image(name, pixels[..., :3], step, dataformats="HWC")

    def summary(self, record: dict[str, Any]) -> None:
        """Write a run's results to W&B's summary, which its tables show; keep selection and adapter as artefacts.

        The user's own loggers get the metrics under ``final/``.
        """
        for own in self.own:
            own.log_metrics({f"final/{name}": value for name, value in record["metrics"].items()})
        if self.wandb is None or not self.wandb.works:
            return
        with self.wandb.guard():
            import wandb

            parts = ("params", "time", "memory")
            values = {f"{part}/{key}": value for part in parts for key, value in record[part].items()}
            run = self.wandb.inner.experiment
            run.summary.update(record["metrics"] | values)
            for kind, files in (("selection", ("selection.json", "trajectory.json")), ("adapter", ("adapter",))):
                present = [self.folder / name for name in files if (self.folder / name).exists()]
                if not present:
                    continue
                about = {key: record[key] for key in ("method", "task", "model", "seed")}
                artifact = wandb.Artifact(f"{kind}-{run.id}", type=kind, metadata=about)
                for path in present:
                    (artifact.add_dir if path.is_dir() else artifact.add_file)(str(path))
                run.log_artifact(artifact)

    def finish(self, failed: bool) -> None:
        """Close the loggers of the whole run before the job ends, so that the next job of a sweep gets its own.

        Args:
            failed: whether the run failed.
        """
        for own in self.own:
            own.close("failed" if failed else "success")
        if self.wandb is not None:
            with self.wandb.guard():
                import wandb

                wandb.finish(exit_code=int(failed))


class Guarded(Logger):
    """A logger that cannot fail the run. Its first failure is logged as a warning, and it is not called again.

    Args:
        kind: its name in the configuration.
        inner: the logger itself.
        whole_run: it serves both stages: the Trainer of a stage does not end it, but `close` does.
    """

    def __init__(self, kind: str, inner: Any, whole_run: bool = False) -> None:
        super().__init__()
        self.kind, self.inner, self.whole_run, self.works = kind, inner, whole_run, True

    @contextmanager
    def guard(self) -> Iterator[None]:
        """A context for code that calls the logger."""
        try:
            yield
        except Exception as error:
            if self.works:
                log.warning(f"logger={self.kind} fails and is not used from here on: {why(error)}")
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
        return self._get("experiment") if hasattr(type(self.inner), "experiment") else None  # a logger may have none

    @property
    def name(self) -> str | None:
        value: str | None = self._get("name")
        return value

    @property
    def version(self) -> int | str | None:
        value: int | str | None = self._get("version")
        return value

    @property
    def save_dir(self) -> str | None:
        value: str | None = self._get("save_dir")
        return value

    @property
    def log_dir(self) -> str | None:
        value: str | None = self._get("log_dir")
        return value

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._call("log_metrics", metrics, step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._call("log_hyperparams", params, *args, **kwargs)

    def log_graph(self, *args: Any, **kwargs: Any) -> None:
        self._call("log_graph", *args, **kwargs)

    def save(self) -> None:
        self._call("save")

    def finalize(self, status: str) -> None:
        if not self.whole_run:
            self._call("finalize", status)

    def close(self, status: str) -> None:
        """Finalize a logger of the whole run."""
        self._call("finalize", status)


def taking_pictures(stage_loggers: Iterable[Any]) -> list[Guarded]:
    """The loggers of a stage that show pictures and have not failed: TensorBoard's and W&B's."""
    guarded = (logger for logger in stage_loggers if isinstance(logger, Guarded))
    return [logger for logger in guarded if logger.works and not logger.whole_run and logger.kind != "csv"]


def why(error: BaseException) -> str:
    """The reason for a failure in one line, without keys and passwords of the environment."""
    text = reason(error) if isinstance(error, OSError) else first_line(error)
    if isinstance(error, OSError) and (file := place(error)):
        text = f"{file}: {text}"
    secrets = [value for name, value in os.environ.items() if SECRET.search(name) and len(value) >= 8]
    for secret in filter(None, (_key(), os.environ.get("WANDB_API_KEY"), *secrets)):
        text = text.replace(secret, "…")
    return without_secrets(text)


def _wandb_logger(choice: sections.Wandb, folder: Path, config: dict[str, Any]) -> Any:
    """W&B's logger with a started run, online if there is a key and the server answers; None if it cannot start."""
    import wandb  # optional
    from lightning.pytorch.loggers import WandbLogger

    os.environ.setdefault("WANDB_SILENT", "true")
    if not is_main():
        return WandbLogger(save_dir=folder, project=choice.project)
    try:
        identity = folder / "wandb" / "run_id"  # a resumed run continues the same W&B run
        settings = _run_settings(choice, folder, config, identity)
    except Exception as error:
        log.warning(f"W&B cannot start, the run continues without it: {why(error)}")
        return None
    for mode in _wandb_modes(folder):
        try:
            with _no_questions():
                wandb.init(mode=mode, **settings)
            wandb.define_metric("search/*", step_metric="trainer/global_step")
            write_text(identity, str(settings["id"]))
            return WandbLogger(save_dir=folder, project=choice.project)
        except Exception as error:
            offline = "this run is recorded offline, `wandb sync` uploads it later"
            then = offline if mode == "online" else "the run continues without it"
            log.warning(f"W&B cannot start {mode}: {why(error)}; {then}")
            settings["id"] = _new_id()  # W&B counts the failed id as used
    return None


def _wandb_modes(folder: Path) -> list[Any]:
    """The modes in which to try to start W&B's run."""
    asked = os.environ.get("WANDB_MODE", "")
    if asked in ("offline", "dryrun", "disabled"):
        return [asked]
    if _key() is not None:
        return ["online", "offline"]
    log.info(  # online, W&B would ask for a key
        f"W&B: no API key (WANDB_API_KEY, or `wandb login`), so this run is recorded offline in "
        f"{folder / 'wandb'}; `wandb sync` uploads it later"
    )
    return ["offline"]


def _run_settings(choice: sections.Wandb, folder: Path, config: dict[str, Any], identity: Path) -> dict[str, Any]:
    """Arguments of `wandb.init`.

    Args:
        identity: the file that holds the id of the W&B run, if the run resumes.
    """
    import wandb  # optional

    limits: dict[str, Any] = {"finish_timeout": FINISH_S} if "finish_timeout" in wandb.Settings.model_fields else {}
    known = identity.read_text(errors="replace").strip() if identity.is_file() else ""
    return {
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


def _new_id() -> str:
    return uuid4().hex[:8]


FINISH_S = 600
"""Seconds to wait at the end of a run for W&B's upload; `wandb sync` uploads the rest later."""


@contextmanager
def _no_questions() -> Iterator[None]:
    """Replace standard input by an empty one, so that a library that asks a question fails instead of waiting."""
    before = sys.stdin
    with open(os.devnull) as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = before


def _key() -> str | None:
    """The key that W&B finds without asking; None if there is none."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, UnicodeDecodeError, netrc.NetrcParseError):
        return None
    return found[2] if found else None
