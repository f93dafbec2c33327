"""A logger for Trackio, for which Lightning has none: ``logger=[csv,trackio]``."""

from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class TrackioLogger(Logger):
    """Logs the metrics of a run with Trackio, on this machine or to a Space.

    Args:
        project: name of the project.
        run_name: name of the run; a run of this name goes on.
        group: name of the group of runs.
        space_id: a Space, as in ``user/name``; None for this machine.
    """

    def __init__(
        self,
        project: str = "diffora",
        run_name: str | None = None,
        group: str | None = None,
        space_id: str | None = None,
    ) -> None:
        super().__init__()
        self.project, self.run_name, self.group, self.space_id = project, run_name, group, space_id
        self._config: dict[str, Any] = {}
        self._run: Any = None

    @property
    def name(self) -> str:
        return self.project

    @property
    def version(self) -> str | None:
        return self.run_name

    @property
    def experiment(self) -> Any:
        """Trackio's run, which starts when it is first asked for."""
        if self._run is None:
            import trackio  # optional

            where = {"space_id": self.space_id} if self.space_id else {}
            self._run = trackio.init(
                project=self.project,
                name=self.run_name,
                group=self.group,
                config=self._config,
                resume="allow",
                **where,
            )
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Keep the settings of the run, which Trackio gets when the run starts."""
        self._config = dict(params)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None
