"""One run from configuration to record: data and backbone, selection, adaptation, fine-tuning, results.

Everything flows one way. From the search to the fine-tuning stage crosses the `Selection` and nothing else.
"""

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from diffora import START, config, models
from diffora.core.dam import adapter_parameters, cheapest_and_dearest, expected_adapter_parameters, relax
from diffora.core.grid import find_grid
from diffora.core.lowrank import LowRankLinear, attach, detach, lowrank_layers
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.export import export_adapter, export_model
from diffora.files import atomic, write_text
from diffora.methods.base import Method, Selecting
from diffora.results import figures, terminal
from diffora.results.record import git_commit, peaks, read_record, reset_peaks, versions, write_record
from diffora.tasks.glue import TaskSpec, compute_metrics, get_task
from diffora.tasks.sources import Rows, load_rows
from diffora.tasks.tokenise import Collator, tokenise
from diffora.training.checkpoint import Checkpoints, DigestCheckpointIO, NonFiniteLoss, Stage, newest_checkpoint
from diffora.training.data import FineTuneData, SearchData, held_out_split, split_hash, split_search
from diffora.training.finetune import FineTuneModule, FineTuneSettings
from diffora.training.loggers import Loggers
from diffora.training.progress import ProgressBar
from diffora.training.search import SearchModule, SearchSettings

log = logging.getLogger(__name__)


@dataclass
class Result:
    """What a run returns to whoever calls it as a library."""

    folder: Path
    record: dict[str, Any]
    model: nn.Module
    selection: Selection | None

    @property
    def metrics(self) -> dict[str, float]:
        metrics: dict[str, float] = self.record.get("metrics", {})
        return metrics


def train(cfg: DictConfig) -> float | None:
    """The Hydra job: one run in Hydra's run directory. Returns the task's main validation metric."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    given = any(o.startswith("hydra.run.dir=") for o in hydra.overrides.hydra)
    if cfg.resume is True and hydra.mode == RunMode.RUN and not given:
        raise UserError("resume=true needs hydra.run.dir=<the run directory to continue>")
    devices = cfg.trainer.devices
    if hydra.mode == RunMode.MULTIRUN and devices not in (1, "auto") and "LOCAL_RANK" not in os.environ:
        raise UserError(
            f"trainer.devices={devices} in a sweep would start the sweep again in every process; start the processes "
            "yourself, `torchrun --nproc-per-node=N train.py -m …`, or sweep with trainer.devices=1"
        )
    result = run(cfg, Path(hydra.runtime.output_dir))
    spec = get_task(cfg.task.name)
    return result.metrics.get(f"validation/{spec.main_metric}")


def run(cfg: DictConfig, folder: Path) -> Result:
    """One run of a composed configuration, written to ``folder``.

    Raises:
        UserError: whatever the user can mend. Mistakes in configuration, data and files are found before anything is
            written to ``folder``.
    """
    method, spec = check(cfg)
    if cfg.dry_run:
        return dry_run(cfg, method, spec, folder)
    main = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) == 0
    if main and (done := _previous(cfg, folder)) is not None:
        return done
    _quiet_libraries()
    reset_peaks()
    L.seed_everything(cfg.seed, verbose=False)
    rows = load_rows(
        spec,
        cfg.task.get("path"),
        cfg.task.max_train_rows,
        **{key: cfg.task[key] for key in ("train_rows", "validation_rows") if key in cfg.task},
    )
    model = models.load_classifier(cfg.model, spec.num_labels)
    job = Run(cfg, folder, method, spec, rows, model)
    if not main:
        return job.execute()
    _start_record(cfg, folder, job.record)
    with _file_log(folder), job.account():
        return job.execute()


def check(cfg: DictConfig) -> tuple[Method, TaskSpec]:
    """Find every mistake in a configuration before anything is loaded.

    Raises:
        UserError: all of them.
    """
    from hydra.utils import get_class

    found = config.problems(cfg)
    method = None
    try:
        kind: Any = get_class(cfg.method._target_)
        method = kind.from_config(cfg)
    except UserError as error:
        found += error.problems
    try:
        models.resolve(cfg.model.path)
    except UserError as error:
        found += error.problems
    if isinstance(path := cfg.method.get("selection"), str):
        try:
            Selection.load(Path(path))
        except UserError as error:
            found += error.problems
    if found or method is None:
        raise UserError(found)
    return method, get_task(cfg.task.name)


class Run:
    """The parts of one run, and the two stages over them.

    Building it finds what is wrong with model, data and selection; nothing is written before `execute`.
    """

    def __init__(
        self, cfg: DictConfig, folder: Path, method: Method, spec: TaskSpec, rows: Rows, model: nn.Module
    ) -> None:
        self.cfg, self.folder, self.method, self.spec, self.rows, self.model = cfg, folder, method, spec, rows, model
        self.grid = find_grid(model, cfg.model.layer, list(cfg.model.candidates))
        if isinstance(path := cfg.method.get("selection"), str):
            Selection.load(Path(path)).check_fits(self.grid, path)
        tokenizer = models.load_tokenizer(cfg.model)
        self.train = tokenise(rows.train, spec, tokenizer, cfg.task.max_length)
        self.validation = {
            name: tokenise(split, spec, tokenizer, cfg.task.max_length) for name, split in rows.validation.items()
        }
        self.collator = Collator(tokenizer.pad_token_id, pad_to_multiple_of=8 if torch.cuda.is_available() else 1)
        self.checkpoints = folder / "checkpoints"
        self.startup_s: float | None = None
        self.record: dict[str, Any] = {
            "method": cfg.method.name,
            "task": cfg.task.name,
            "model": cfg.model.name,
            "seed": cfg.seed,
            "status": "running",
            "metrics": {},
            "params": {},
            "time": {},
            "memory": {},
            "selection": None,
            "config_hash": config.config_hash(cfg),
            "data_hash": rows.data_hash,
            "git_commit": git_commit(),
            "versions": versions(),
        }

    def execute(self) -> Result:
        """Select, adapt, fine-tune, evaluate, export."""
        self.loggers = Loggers(self.cfg.logger, self.folder, config.plain(self.cfg))
        search_s = 0.0

        def search() -> Selection:
            nonlocal search_s
            found, search_s = self.search()
            return found

        selection = self.method.select(self.grid, self.cfg.seed, search)
        if selection is not None and self.is_main:
            selection.save(self.folder / "selection.json")
            figures.save_png(self.folder / "dam.png", figures.dam_heatmap(selection))
            self.record["selection"] = {"file": "selection.json", "k": selection.k, "selected": selection.selected}

        # The same numbers are drawn here whether the selection was searched just now or comes from a file.
        L.seed_everything(self.cfg.seed, verbose=False)
        self.method.adapt(self.model, self.grid, selection)
        if self.cfg.method.get("warm_start"):
            assert selection is not None
            self._warm_start()
        self.record["params"] = models.count_parameters(self.model)
        module = self.finetune()
        self.record["metrics"] = module.results()
        self.record["history"] = module.history
        module.load_trainable(module.best_state)
        self.record["time"] = {
            "search_s": round(search_s, 3),
            "finetune_s": round(module.elapsed, 3),
            "total_s": round(max(time.time() - START, search_s + module.elapsed), 3),
            "startup_s": None if self.startup_s is None else round(self.startup_s, 3),
        }
        self.record["memory"] = peaks()
        self.record["status"] = "completed"
        if self.is_main:
            self._export()
            write_record(self.folder, self.record)
            self.loggers.summary(
                self.record["metrics"]
                | {f"{part}/{k}": v for part in ("params", "time", "memory") for k, v in self.record[part].items()}
            )
            terminal.print_result(self.record, self.spec, self.folder)
        return Result(self.folder, self.record, self.model, selection)

    # --- stage 1 ---

    def search(self) -> tuple[Selection, float]:
        """Search the DAM and discretise it. The model comes out as it went in. Returns (selection, seconds)."""
        cfg, s = self.cfg, self.cfg.search
        assert isinstance(self.method, Selecting)
        finished = self._finished_search()
        if finished is not None:
            return finished
        split = split_search(len(self.train), cfg.seed, s.valid_fraction, s.fraction)
        head = {name: self.model.get_submodule(name).state_dict() for name in models.head_modules(self.model)}
        head = {name: {key: value.clone() for key, value in state.items()} for name, state in head.items()}
        everything = torch.ones(self.grid.n_layers, self.grid.n_types, dtype=torch.bool)
        attached = attach(self.model, self.grid.names, everything, s.rank, None, self.method.alpha)
        layers = [[layer for layer in row if layer is not None] for row in attached]
        settings = SearchSettings(s.lr, s.gamma_lr, s.order, s.weight_decay, s.clip, s.accumulate)
        module = SearchModule(self.model, layers, self.grid.types, self.loss, settings, cfg.seed)
        data = SearchData(
            self.train, self.collator, split, s.batch_size, cfg.seed, s.train_steps, cfg.trainer.num_workers
        )
        log.info(
            f"search: {self.grid.n_layers} layers x {self.grid.n_types} modules on {len(split[0])} + {len(split[1])} "
            f"training rows, {s.epochs} rounds"
        )
        stage_loggers = self.loggers.of_stage("search") if self.is_main else []
        pictures = DamPictures(
            lambda gamma: self._selection(gamma, split), lambda found, at: self.loggers.dam(found, at, stage_loggers)
        )
        shown = ("search/train_loss", "search/valid_loss", "search/entropy")
        self._fit("search", module, data, s.epochs, stage_loggers, ("round", shown), [pictures])
        module.close_gates()
        selection = self._selection(module.gamma.detach().cpu(), split)
        if self.is_main:
            trajectory = {"types": list(self.grid.types), "rounds": [t for t, _ in module.trajectory]}
            trajectory["gamma_bar"] = [rows for _, rows in module.trajectory]
            write_text(self.folder / "trajectory.json", _json(trajectory))
            picture = figures.gamma_trajectories(module.trajectory, self.grid.types)
            figures.save_png(self.folder / "gamma.png", picture)
            if cfg.method.warm_start:
                self._save_searched(relax(module.gamma.detach()), layers)
            write_text(self.folder / "search.json", _json({"seconds": module.elapsed}))
            selection.save(self.folder / "selection.json")
        detach(self.model)
        for name, state in head.items():
            self.model.get_submodule(name).load_state_dict(state)
        return selection, module.elapsed

    def _selection(self, gamma: Tensor, split: tuple[Any, Any]) -> Selection:
        from diffora.core.dam import discretise

        assert isinstance(self.method, Selecting)
        gamma_bar, k = relax(gamma.cpu()), self.method.k(self.grid)
        return Selection.from_mask(
            self.grid,
            discretise(gamma_bar, k),
            method=self.method.name,
            k=k,
            rho=self.method.rho,
            seed=self.cfg.seed,
            gamma_bar=gamma_bar.tolist(),
            split_hash=split_hash(*split),
            config={
                "task": self.cfg.task.name,
                "model": self.cfg.model.path,
                "search": config.plain(self.cfg)["search"],
                "data_hash": self.rows.data_hash,
            },
        )

    def _finished_search(self) -> tuple[Selection, float] | None:
        """The selection that this run's search ended with before the run was stopped."""
        file, seconds = self.folder / "selection.json", self.folder / "search.json"
        if not (self.cfg.resume and file.is_file() and seconds.is_file()):
            return None
        import json

        log.info(f"search: already finished, using {file}")
        return Selection.load(file), float(json.loads(seconds.read_text())["seconds"])

    def _save_searched(self, gamma_bar: Tensor, layers: list[list[LowRankLinear]]) -> None:
        from safetensors.torch import save_file

        tensors = {}
        for names, row, gates in zip(self.grid.names, layers, gamma_bar.cpu(), strict=True):
            for name, layer, gate in zip(names, row, gates, strict=True):
                tensors[f"{name}.lora_a"] = layer.lora_a.detach().cpu().clone()
                tensors[f"{name}.lora_bt"] = layer.lora_bt.detach().cpu() * gate  # as the search ended, gate folded in
        with atomic(self.folder / "selection.safetensors") as scratch:
            save_file(tensors, scratch)

    def _warm_start(self) -> None:
        """Give the selected modules the A and B that the search ended with."""
        from safetensors.torch import load_file

        given = self.cfg.method.selection
        file = Path(given).with_suffix(".safetensors") if given else self.folder / "selection.safetensors"
        if not file.is_file():
            raise UserError(f"method.warm_start=true needs {file}, which a search with method.warm_start=true leaves")
        tensors, mask = load_file(file), Selection.load(self.folder / "selection.json").mask()
        layers = dict(lowrank_layers(self.model))
        for names, flags in zip(self.grid.names, mask.tolist(), strict=True):
            for name, flag in zip(names, flags, strict=True):
                if flag:
                    for part in ("lora_a", "lora_bt"):
                        value = tensors[f"{name}.{part}"]
                        if value.shape != getattr(layers[name], part).shape:
                            raise UserError(
                                f"method.warm_start=true needs search.rank={len(value)} to be rank={layers[name].rank}"
                            )
                        getattr(layers[name], part).data.copy_(value)

    # --- stage 2 ---

    def finetune(self) -> FineTuneModule:
        """Train what the method left trainable, and evaluate after each epoch."""
        cfg, f = self.cfg, self.cfg.finetune
        official = next(iter(self.validation.values()))
        settings = FineTuneSettings(f.lr, f.weight_decay, self._warmup_steps(), f.early_stop)
        module = FineTuneModule(
            self.model,
            self.loss,
            lambda logits, labels: compute_metrics(self.spec, logits, labels),
            self.spec.main_metric,
            list(self.validation),
            held_out_split(len(official), cfg.seed),
            settings,
            cfg.seed,
        )
        rows_at_once = f.batch_size // f.accumulate
        data = FineTuneData(
            self.train,
            self.validation,
            self.collator,
            rows_at_once,
            2 * rows_at_once,
            cfg.seed,
            cfg.trainer.num_workers,
        )
        params = self.record["params"]
        log.info(
            f"fine-tune: {params['adapter']:,} adapter + {params['head']:,} head parameters on {len(self.train)} rows"
        )
        stage_loggers = self.loggers.of_stage("finetune") if self.is_main else []
        shown = ("train/loss", f"validation/{self.spec.main_metric}")
        extra = {"gradient_clip_val": f.clip, "accumulate_grad_batches": f.accumulate}
        self._fit("finetune", module, data, f.epochs, stage_loggers, ("epoch", shown), [], **extra)
        return module

    def _warmup_steps(self) -> int:
        """The recipe's warm-up, cut to a tenth of the run where the run has been made too short for it."""
        f = self.cfg.finetune
        steps = -(-len(self.train) // f.batch_size) * f.epochs
        given: int = f.warmup_steps
        if given == self.cfg.task.recipe.warmup_steps and given > steps // 2:
            log.info(
                f"fine-tune: the recipe's {given} warm-up steps do not suit a run of {steps} steps: {steps // 10} it is"
            )
            return steps // 10
        return given

    # --- both ---

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy, or mean squared error for regression."""
        if self.spec.is_regression:
            return F.mse_loss(logits.squeeze(-1).float(), labels.float())
        return F.cross_entropy(logits.float(), labels)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) == 0

    def _fit(
        self,
        stage: str,
        module: Stage,
        data: L.LightningDataModule,
        epochs: int,
        loggers: list[Any],
        progress: tuple[str, tuple[str, ...]],
        callbacks: list[L.Callback],
        **extra: Any,
    ) -> None:
        """Fit one stage, from its newest checkpoint where the run resumes."""
        t = self.cfg.trainer
        newest = newest_checkpoint(self.checkpoints, stage) if self.cfg.resume else None
        trainer = L.Trainer(
            accelerator=t.accelerator,
            devices=t.devices,
            strategy=t.strategy,
            precision=t.precision,
            deterministic=t.deterministic,
            max_epochs=epochs,
            logger=loggers or False,
            callbacks=[*callbacks, ProgressBar(stage, *progress), Checkpoints(self.checkpoints, stage)],
            plugins=[DigestCheckpointIO()],
            default_root_dir=self.folder,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            log_every_n_steps=10,
            enable_checkpointing=True,
            enable_progress_bar=False,
            enable_model_summary=False,
            detect_anomaly=bool(self.cfg.get("debug") and self.cfg.debug.detect_anomaly),
            **extra,
        )
        if newest is not None:
            file, content = newest
            log.info(f"{stage}: continuing from {file}")
            if _is_over(module, content, epochs):
                module.setup_names()
                module.load_trainable(content["state_dict"])
                module.recall(content["diffora"]["memory"])
                module.elapsed = content["diffora"]["elapsed"]
                return
        try:
            trainer.fit(module, datamodule=data, ckpt_path=None if newest is None else newest[0], weights_only=True)
        except NonFiniteLoss as error:
            self.record["metrics"] = {}
            good = newest_checkpoint(self.checkpoints, stage)
            kept = f"the last good checkpoint is {good[0]}" if good else "there is no earlier checkpoint"
            lr = self.cfg[stage].lr
            raise UserError(
                f"{stage}: {error}; stopped, {kept}. Try a lower {stage}.lr (it is {lr:g}) or trainer.precision=32-true"
            ) from error
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise UserError(
                f"{stage}: out of memory with {stage}.batch_size={self.cfg[stage].batch_size}. "
                f"{stage}.accumulate=2 halves the memory of a step without changing the batch"
            ) from error
        if self.startup_s is None and module.first_step_at is not None:
            self.startup_s = module.first_step_at - START
        if trainer.interrupted:
            raise KeyboardInterrupt

    def _export(self) -> None:
        path, local = models.resolve(self.cfg.model.path)
        base = str(Path(path).resolve()) if local else path
        if self.method.lowrank:
            export_adapter(self.model, self.folder / "adapter", base, self.spec, self.record)
        else:
            export_model(self.model, self.folder / "model")

    @contextmanager
    def account(self) -> Iterator[None]:
        """Record how a run that does not end well ended, and close the loggers in any case."""
        failed = True
        try:
            yield
            failed = False
        except BaseException as error:
            self.record["status"] = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            self.record["error"] = str(error) or type(error).__name__
            self.record["memory"] = peaks()
            write_record(self.folder, self.record)
            raise
        finally:
            if hasattr(self, "loggers"):
                self.loggers.finish(failed)


class DamPictures(L.Callback):
    """Sends the picture of the DAM to the loggers after each round of the search."""

    def __init__(self, selection: Callable[[Tensor], Selection], send: Callable[[Selection, int], None]) -> None:
        self.selection, self.send = selection, send

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            assert isinstance(pl_module, SearchModule)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                selection = self.selection(pl_module.gamma.detach())
            self.send(selection, trainer.current_epoch + 1)


def dry_run(cfg: DictConfig, method: Method, spec: TaskSpec, folder: Path) -> Result:
    """Build the run on the meta device, without weights or data: modules, parameter counts, ``run.json``."""
    model = models.meta_classifier(cfg.model, spec.num_labels)
    grid = find_grid(model, cfg.model.layer, list(cfg.model.candidates))
    searched = False

    def stand_in() -> Selection:
        nonlocal searched
        searched = True
        assert isinstance(method, Selecting)
        cheapest, _ = cheapest_and_dearest(grid.shapes, method.k(grid))
        return Selection.from_mask(grid, cheapest, method=method.name, k=method.k(grid), rho=method.rho, seed=cfg.seed)

    selection = method.select(grid, cfg.seed, stand_in)
    method.adapt(model, grid, selection)
    params = models.count_parameters(model)
    if searched:
        # The count depends on what the search will choose: the mean over all selections, and the extremes.
        assert isinstance(method, Selecting)
        k, ranks = method.k(grid), (method.rank, method.rank_elsewhere)
        params["adapter"] = expected_adapter_parameters(grid.shapes, k, *ranks)
        params["trainable"] = params["adapter"] + params["head"]
        bounds = cheapest_and_dearest(grid.shapes, k)
        params["adapter_min"], params["adapter_max"] = (adapter_parameters(grid.shapes, m, *ranks) for m in bounds)
        selection = None
    record = {
        "method": cfg.method.name,
        "task": cfg.task.name,
        "model": cfg.model.name,
        "seed": cfg.seed,
        "status": "dry_run",
        "metrics": {},
        "params": params,
        "time": {"total_s": round(time.time() - START, 3)},
        "memory": {},
        "selection": None if selection is None else {"k": selection.k, "selected": selection.selected},
        "config_hash": config.config_hash(cfg),
        "data_hash": None,
        "git_commit": git_commit(),
        "versions": versions(),
    }
    terminal.print_dry_run(record, grid, selection, method)
    write_record(folder, record)
    return Result(folder, record, model, selection)


# --- run directory ---


def _previous(cfg: DictConfig, folder: Path) -> Result | None:
    """Look at what the run directory holds already: nothing, a run to continue, or a finished one (its result)."""
    old = read_record(folder)
    status = None if old is None else old.get("status")
    if status in (None, "dry_run"):
        return None
    assert old is not None
    if not cfg.resume:
        if status == "completed" or any((folder / "checkpoints").glob("*.ckpt")):
            raise UserError(
                f"{folder} holds a run ({status}) already: continue it with resume=true, or choose another hydra.run.dir"
            )
        return None
    if old.get("config_hash") != config.config_hash(cfg):
        before = OmegaConf.load(folder / "config.yaml")
        assert isinstance(before, DictConfig)
        changed = config.differences(config.plain(before), config.plain(cfg))
        raise UserError([f"{folder} was started with another configuration; resume it with the same one", *changed])
    if status != "completed":
        return None
    log.info(f"{folder} is complete already")
    spec = get_task(cfg.task.name)
    terminal.print_result(old, spec, folder)
    return Result(folder, old, nn.Identity(), None)


def _start_record(cfg: DictConfig, folder: Path, record: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    write_record(folder, record)


@contextmanager
def _file_log(folder: Path) -> Iterator[None]:
    handler = logging.FileHandler(folder / "run.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


def _is_over(module: Stage, content: dict[str, Any], epochs: int) -> bool:
    """Whether a checkpoint was written by the last epoch of its stage, counting an early stop."""
    if content["epoch"] + 1 >= epochs:
        return True
    if isinstance(module, FineTuneModule):
        module.recall(content["diffora"]["memory"])
        return module.stalled
    return False


def _json(content: Any) -> str:
    import json

    return json.dumps(content) + "\n"


def _quiet_libraries() -> None:
    """Silence what libraries say of themselves at every start, so that what concerns the user can be seen."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning", "transformers", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
