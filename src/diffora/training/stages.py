"""The two stages of a run, search and fine-tuning, each a Lightning module, its data and a Trainer."""

import itertools
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from torch import Tensor, nn

from diffora import compatibility, config, digests, models
from diffora.core.dam import relax
from diffora.core.grid import Grid, find_grid
from diffora.core.lowrank import LowRankLinear, attach, detach, lowrank_layers
from diffora.core.selection import Selection
from diffora.errors import UserError, out_of_memory
from diffora.files import atomic, write_text
from diffora.methods.base import Adaptation, Method, check_ranks
from diffora.methods.selecting import Selecting
from diffora.results import figures
from diffora.tasks.account import Account
from diffora.tasks.account import lines as account_lines
from diffora.tasks.base import Collate, Split, Task
from diffora.training.attribution import AttributionModule
from diffora.training.checkpoint import (
    Checkpoints,
    DigestCheckpointIO,
    Earlier,
    NonFiniteLoss,
    Stage,
    continuing,
    earlier,
    newest_checkpoint,
    write_search,
)
from diffora.training.data import (
    FineTuneData,
    LengthGroupedBatchSampler,
    SearchData,
    examples_of,
    held_out_split,
    split_hash,
    split_search,
)
from diffora.training.finetune import FineTuneModule, FineTuneSettings
from diffora.training.loggers import Loggers
from diffora.training.progress import ProgressBar
from diffora.training.score import ScoreModule
from diffora.training.search import SearchModule, SearchSettings

log = logging.getLogger(__name__)


def is_main() -> bool:
    """Whether this process is the one that writes: rank 0 of however many there are."""
    return getattr(rank_zero_only, "rank", 0) == 0


@dataclass
class Parts:
    """What both stages of a run work on; ``data`` is what became of the rows of each split (`Account.record`)."""

    cfg: DictConfig
    folder: Path
    task: Task
    model: nn.Module
    arguments: dict[str, Any]
    backbone_parameters: int
    grid: Grid
    train: Split
    validation: dict[str, Split]
    test: dict[str, Split]
    collate: Collate
    collate_eval: Collate
    data_hash: str
    data: dict[str, Any]
    backbone: dict[str, Any] | None
    made_with: dict[str, Any]
    earlier: Earlier = field(default_factory=Earlier)
    first_step_at: float | None = None

    @classmethod
    def load(cls, cfg: DictConfig, folder: Path, task: Task) -> "Parts":
        """Load data and backbone. The head's first weights are drawn from torch's global generator.

        Raises:
            UserError: whatever is wrong with data, model, grid or a given selection; or, on a resume, what changed
                since the run stopped.
        """
        rows = task.load()
        official = next(iter(rows.validation))
        _check_halves(rows.source, len(rows.validation[official]))
        test = {name: task.load_split(name) for name in task.test_splits if cfg.predict}
        processor = task.processor(cfg.model)
        model = models.load_model(cfg.model, task)
        arguments = task.head() | compatibility.match_processor(model, processor)
        task.check(model)
        if cfg.trainer.gradient_checkpointing:
            models.checkpoint_activations(model)
        grid = find_grid(model, cfg.model.layer, cfg.model.candidates, cfg.model.get("roles"))
        models.check_outside_head(model, itertools.chain(*grid.names))
        if isinstance(path := cfg.method.get("selection"), str):
            Selection.load(Path(path)).check_fits(grid, path)

        backbone = digests.backbone(cfg.model.path)
        n_rows = {name: len(split) for name, split in {"train": rows.train, **rows.validation}.items()}
        made_with = digests.made_with(cfg, rows.data_hash, n_rows, backbone)
        before = earlier(folder, made_with) if cfg.resume else Earlier()

        def encoded(splits: dict[str, datasets.Dataset]) -> dict[str, Split]:
            return {name: Split(part, task.encode(part, processor, training=False)) for name, part in splits.items()}

        train = Split(rows.train, task.encode(rows.train, processor, training=True))
        validation, test_splits = encoded(rows.validation), encoded(test)
        _check_halves(rows.source, len(np.unique(examples_of(validation[official].encoded))))
        splits = {"train": train, **validation, **test_splits}
        return cls(
            cfg,
            folder,
            task,
            model,
            arguments=arguments,
            backbone_parameters=models.backbone_parameters(model),
            grid=grid,
            train=train,
            validation=validation,
            test=test_splits,
            collate=task.collate(processor, training=True),
            collate_eval=task.collate(processor, training=False),
            data_hash=rows.data_hash,
            backbone=backbone,
            made_with=made_with,
            earlier=before,
            data={name: task.account(name, split).record() for name, split in splits.items()},
        )


def _check_halves(source: str, rows: int) -> None:
    """Refuse a validation split too small for `held_out_split`, before any search."""
    if rows < 2:
        raise UserError(
            f"{source}: a validation split of {rows} usable row{'' if rows == 1 else 's'} is too small: one half of it "
            "chooses the epoch, the other half reports it, so it needs at least 2"
        )


# --- stage 1 ---


def find_selection(parts: Parts, method: Method, selector: str, loggers: Loggers) -> tuple[Selection, float]:
    """Search the DAM, or score the candidates, and select. The model comes out as it went in.

    Args:
        selector: ``search``, ``attribution``, ``gradient`` or ``activation``.

    Returns:
        (selection, seconds).
    """
    cfg, s, folder = parts.cfg, parts.cfg.search, parts.folder
    assert isinstance(method, Selecting)
    file = folder / "selection.json"
    split = split_search(examples_of(parts.train.encoded), cfg.seed, s.valid_fraction, s.fraction)
    parts.data["search"] = _search_account(parts, split).record()
    for line in account_lines({"search": parts.data["search"]}):
        log.warning(line)
    if parts.earlier.search is not None:
        log.info(f"{selector}: finished already, using {file}")
        return parts.earlier.search

    def selection(scores: Tensor) -> Selection:
        provenance = {"task": cfg.task.name, "model": cfg.model.path, "data_hash": parts.data_hash}
        return method.selection_by(
            parts.grid,
            scores,
            selector,
            cfg.seed,
            split_hash=split_hash(*split),
            config=provenance | {"search": config.plain(cfg)["search"]},
        )

    if selector in ("search", "attribution"):
        scores, elapsed = search(parts, selector, method.alpha, split, selection, loggers)
    else:
        scores, elapsed = score(parts, selector, split)
    found = selection(scores)
    if is_main():
        found.save(file)
        write_search(folder, elapsed, parts.made_with)  # last: says that all of it is there
    return found, elapsed


def _search_account(parts: Parts, split: tuple[np.ndarray, np.ndarray]) -> Account:
    """How many of the training examples the search uses."""
    examples = examples_of(parts.train.encoded)
    account = Account(len(np.unique(examples)))
    used = len(np.unique(examples[np.concatenate(split)]))
    account.drop(f"search.fraction={parts.cfg.search.fraction}", account.read - used)
    return account


def search(
    parts: Parts,
    selector: str,
    alpha: float,
    split: tuple[np.ndarray, np.ndarray],
    selection: Callable[[Tensor], Selection],
    loggers: Loggers,
) -> tuple[Tensor, float]:
    """The bi-level search, or the attribution. ``selection`` turns a relaxed DAM into what the loggers picture.

    Returns:
        (relaxed DAM or attributions, L x N on the CPU; seconds).
    """
    cfg, s, grid, model, folder = parts.cfg, parts.cfg.search, parts.grid, parts.model, parts.folder
    if s.train_steps > (batches := max(1, len(split[0]) // s.batch_size)):
        raise UserError(
            f"search.train_steps={s.train_steps} must be at most {batches}, the batches of a round "
            f"({len(split[0])} rows to train on, search.batch_size={s.batch_size})"
        )
    head = {
        name: {key: value.clone() for key, value in model.get_submodule(name).state_dict().items()}
        for name in models.head_modules(model)
    }
    everything = torch.ones(grid.n_layers, grid.n_types, dtype=torch.bool)
    attached = attach(model, grid.names, everything, s.rank, None, alpha, freeze=False)
    layers = [[layer for layer in row if layer is not None] for row in attached]
    settings = SearchSettings(s.lr, s.gamma_lr, s.order, s.weight_decay, s.clip, s.accumulate, s["update"])
    arguments = model, layers, grid.types, parts.task, settings, cfg.seed
    bilevel = selector == "search"
    module = SearchModule(*arguments)
    if not bilevel:
        module = AttributionModule(*arguments, rounds=s.epochs, score_batches=cfg.method.score_batches)
    data = SearchData(
        parts.train.encoded,
        (parts.collate, parts.collate_eval),
        split,
        s.batch_size,
        cfg.seed,
        s.train_steps,
        cfg.trainer.num_workers,
        matched=bilevel and s["update"] == "simultaneous",
    )
    log.info(f"{selector}: {grid.n_layers} layers x {grid.n_types} modules on {len(split[0])} + {len(split[1])} rows")
    stage_loggers = loggers.of_stage("search")
    callbacks: list[L.Callback] = [
        ProgressBar(selector, "round", ("search/train_loss", "search/valid_loss", "search/entropy"))
    ]
    if bilevel:
        callbacks.append(DamPictures(selection, lambda found, step: loggers.dam(found, step, stage_loggers)))
    fit(parts, "search", module, data, callbacks, stage_loggers, max_epochs=s.epochs + (not bilevel))
    module.close_gates()
    gates = module.gates(module.gamma.detach()).cpu()
    if is_main() and bilevel:
        names = list(grid.types)
        rounds, points = [at for at, _ in module.trajectory], [rows for _, rows in module.trajectory]
        write_text(
            folder / "trajectory.json", json.dumps({"types": names, "rounds": rounds, "gamma_bar": points}) + "\n"
        )
        figures.save_png(folder / "gamma.png", figures.gamma_trajectories(module.trajectory, names))
    if is_main() and cfg.method.get("warm_start"):
        _save_searched(parts, gates, layers)
    detach(model)
    for name, state in head.items():
        model.get_submodule(name).load_state_dict(state)
    return module.scores if isinstance(module, AttributionModule) else gates, module.elapsed


def score(parts: Parts, criterion: str, split: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, float]:
    """Score the candidates on search-train rows.

    Returns:
        (scores, L x N on the CPU; seconds).
    """
    cfg, s = parts.cfg, parts.cfg.search
    module = ScoreModule(parts.model, parts.grid.names, criterion, parts.task, s.accumulate, cfg.seed)
    collate = parts.collate_eval, parts.collate_eval
    data = SearchData(parts.train.encoded, collate, split, s.batch_size, cfg.seed, num_workers=cfg.trainer.num_workers)
    log.info(f"{criterion}: scoring {parts.grid.n_layers} layers x {parts.grid.n_types} modules")
    training = parts.model.training
    with torch.random.fork_rng():
        fit(parts, "search", module, data, [], [], max_epochs=1, limit_train_batches=cfg.method.score_batches)
    parts.model.train(training)
    return module.scores, module.elapsed


def _save_searched(parts: Parts, gates: Tensor, layers: list[list[LowRankLinear]]) -> None:
    """Keep the searched A and B, the gate folded into B, for ``method.warm_start``."""
    from safetensors.torch import save_file

    tensors = {}
    for names, row, gates_of_row in zip(parts.grid.names, layers, gates, strict=True):
        for name, layer, gate in zip(names, row, gates_of_row, strict=True):
            tensors[f"{name}.lora_a"] = layer.lora_a.detach().cpu().clone()
            tensors[f"{name}.lora_bt"] = layer.lora_bt.detach().cpu() * gate
    with atomic(parts.folder / "selection.safetensors") as scratch:
        save_file(tensors, scratch)


def warm_start(parts: Parts, selection: Selection) -> None:
    """Give the selected modules the A and B that the search ended with, in place."""
    from safetensors.torch import load_file

    given = parts.cfg.method.selection
    file = (Path(given) if given else parts.folder / "selection.json").with_suffix(".safetensors")
    if not file.is_file():
        raise UserError(f"method.warm_start=true needs {file}, which a search with method.warm_start=true leaves")
    try:
        tensors = load_file(file)
    except Exception as error:  # safetensors' own has no public base class
        raise UserError(f"method.warm_start=true: {file} is damaged: {error}") from error
    layers = dict(lowrank_layers(parts.model))
    for names, flags in zip(parts.grid.names, selection.mask().tolist(), strict=True):
        for name in itertools.compress(names, flags):
            layer = layers[name]
            for which, own in (("a", layer.lora_a), ("bt", layer.lora_bt)):
                found = tensors.get(f"{name}.lora_{which}")
                if found is None or not found.isfinite().all():
                    raise UserError(f"method.warm_start=true: {file} has no A and B of {name} with finite numbers")
                if found.shape != own.shape:
                    had = f"the search had rank {len(found)} at {name}"
                    raise UserError(f"method.warm_start=true: {had}, rank={layer.rank} does not")
                own.data.copy_(found)


class DamPictures(L.Callback):
    """Sends the picture of the DAM to the loggers after each round of the search."""

    def __init__(self, selection: Callable[[Tensor], Selection], send: Callable[[Selection, int], None]) -> None:
        self.selection, self.send = selection, send

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            assert isinstance(pl_module, SearchModule)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a tie on the way is none of the user's business
                selection = self.selection(relax(pl_module.gamma.detach()).cpu())
            self.send(selection, trainer.current_epoch + 1)


# --- stage 2 ---


@dataclass(frozen=True)
class FirstBatches:
    """The first training batches of the run, as inputs of the model; the same in every process.

    Made when they are asked for: most methods do not.
    """

    train: datasets.Dataset
    task: Task
    collate: Collate
    batch_size: int
    seed: int
    most: int = 32

    def __len__(self) -> int:
        return min(self.most, len(self._sampler()))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for rows in itertools.islice(self._sampler(), self.most):
            yield self.task.inputs(self.collate(self.train[rows]))

    def _sampler(self) -> LengthGroupedBatchSampler:
        return LengthGroupedBatchSampler(np.asarray(self.train["length"]), self.batch_size, self.seed)


def finetune(parts: Parts, adaptation: Adaptation, params: dict[str, int], loggers: Loggers) -> FineTuneModule:
    """Train what the method left trainable, and evaluate after each epoch."""
    cfg, f = parts.cfg, parts.cfg.finetune
    n_rows = len(parts.train.encoded)
    warmup = warmup_steps(cfg, n_rows)
    official = next(iter(parts.validation.values()))
    module = FineTuneModule(
        adaptation,
        parts.task,
        parts.train,
        parts.validation,
        held_out_split(examples_of(official.encoded), cfg.seed),
        FineTuneSettings(f.lr, f.weight_decay, warmup, f.early_stop),
        cfg.seed,
    )
    rows = f.batch_size // f.accumulate
    data = FineTuneData(
        parts.train.encoded,
        {name: split.encoded for name, split in parts.validation.items()},
        (parts.collate, parts.collate_eval),
        rows,
        2 * rows,
        cfg.seed,
        cfg.trainer.num_workers,
    )
    if warmup < f.warmup_steps:
        log.info(f"fine-tune: {f.warmup_steps} warm-up steps, the recipe's, do not suit this run: taking {warmup}")
    adaptation.prepare(FirstBatches(parts.train.encoded, parts.task, parts.collate_eval, rows, cfg.seed))
    params |= models.count_parameters(parts.model)  # EVA gives its ranks out anew
    log.info(f"fine-tune: {params['adapter']:,} adapter + {params['head']:,} head parameters, {n_rows} rows")
    progress = ProgressBar("fine-tune", "epoch", ("train/loss", f"validation/{parts.task.main_metric}"))
    extra = {"gradient_clip_val": f.clip, "accumulate_grad_batches": f.accumulate}
    fit(parts, "finetune", module, data, [progress], loggers.of_stage("finetune"), **extra)
    return module


def steps_of(cfg: DictConfig, n_rows: int) -> tuple[int, str]:
    """(optimiser steps of the fine-tuning stage, what they are, for messages)"""
    f = cfg.finetune
    made_of = f"{n_rows} rows, finetune.batch_size={f.batch_size}, finetune.epochs={f.epochs}"
    return -(-n_rows // f.batch_size) * f.epochs, f"the steps of this run ({made_of})"


def warmup_steps(cfg: DictConfig, n_rows: int) -> int:
    """``finetune.warmup_steps``; the recipe's is cut to a tenth of a run that was made too short for it.

    Raises:
        UserError: it was given, and the run is shorter.
    """
    steps, run = steps_of(cfg, n_rows)
    given: int = cfg.finetune.warmup_steps
    if given == cfg.task.recipe.get("warmup_steps") and given > steps // 2:
        return steps // 10
    if given > steps:
        raise UserError(
            f"finetune.warmup_steps={given} must be at most {steps}, {run}: finetune.lr would never be reached"
        )
    return given


def check_stages(cfg: DictConfig, method: Method, grid: Grid, n_rows: int | None) -> None:
    """Refuse settings of the two stages that do not suit the backbone, or the number of training rows.

    Args:
        n_rows: None where the rows are not loaded (``dry_run=true``).

    Raises:
        UserError: before anything is trained.
    """
    if getattr(method, "selection", None) is None and getattr(method, "selector", None) in ("search", "attribution"):
        check_ranks(grid, {"search.rank": cfg.search.rank})
    if n_rows is None:
        return
    warmup_steps(cfg, n_rows)
    if cfg.finetune.batch_size > n_rows:
        log.warning(f"finetune.batch_size={cfg.finetune.batch_size}: there are {n_rows} rows, so an epoch is one step")
    steps, run = steps_of(cfg, n_rows)
    mask = getattr(method, "mask", None)
    if mask is not None and mask.rank is not None and mask.start >= steps:
        raise UserError(f"method.mask.start={mask.start} must be less than {steps}, {run}: no step would be masked")
    if (stages := getattr(method, "stages", 1)) > steps:
        raise UserError(f"method.stages={stages} must be at most {steps}, {run}: each takes a step or more")


# --- both ---


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
    t, settings = parts.cfg.trainer, parts.cfg[stage]
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
        detect_anomaly="debug" in parts.cfg and parts.cfg.debug.detect_anomaly,
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


def quiet_libraries() -> None:
    """Silence what libraries say of themselves at every start, so that what concerns the user can be seen."""
    import transformers

    for name in ("lightning.pytorch", "lightning.fabric", "lightning", "transformers", "datasets", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not is_main():
        logging.getLogger("diffora").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
