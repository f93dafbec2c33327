"""The fine-tuning stage of a run."""

import logging
from dataclasses import replace

from diffora.loop.data import FineTuneData
from diffora.loop.fit import fit
from diffora.loop.loggers import Loggers
from diffora.loop.own import own_callbacks
from diffora.loop.parts import Parts
from diffora.loop.plan import plan_of
from diffora.loop.prefix import CachedPrefix, cached_splits
from diffora.loop.progress import ProgressBar
from diffora.loop.splits import alike_of, examples_of, held_out_split
from diffora.methods.base import Adaptation
from diffora.training.criterion import criterion_of
from diffora.training.finetune import FineTuneModule
from diffora.training.first_batches import FirstBatches
from diffora.training.optimisers import has_warmup
from diffora.training.steps import warmup_steps

log = logging.getLogger(__name__)


def finetune(parts: Parts, adaptation: Adaptation, params: dict[str, int], loggers: Loggers) -> FineTuneModule:
    """Train the parameters that the method made trainable, and evaluate after each epoch or `FineTune.eval_every`.

    Args:
        parts: data, backbone and settings of the run.
        adaptation: the adapted model.
        params: numbers of parameters by kind; updated, because a method may change its ranks when it sees data.
        loggers: of the run.

    Returns:
        The trained module. It holds the metrics of all epochs and the weights of the best one.
    """
    settings, f = parts.settings, parts.settings.finetune
    n_rows = len(parts.data.train.encoded)
    rows_per_batch = f.batch_size // f.accumulate
    data = FineTuneData(
        parts.data.train.encoded,
        {name: split.encoded for name, split in parts.data.validation.items()},
        (parts.data.collate, parts.data.collate_eval),
        batch_size=rows_per_batch,
        eval_batch_size=f.evaluation_rows,
        seed=settings.seed,
        num_workers=settings.trainer.num_workers,
        accumulate=f.accumulate,
        plan_for=lambda steps_per_epoch: plan_of(steps_per_epoch, f.epochs, f.max_steps, f.eval_every),
    )
    module = _module(parts, adaptation, data, warmup_steps(settings, n_rows))
    if settings.trainer.cache_prefix:
        module.prefix = CachedPrefix(parts, "finetune", cached_splits(parts))
    adaptation.prepare(
        FirstBatches(parts.data.train.encoded, parts.task, parts.data.collate_eval, rows_per_batch, settings.seed)
    )
    if f.early_stop is not None and f.eval_every is not None:
        log.info(
            f"fine-tune: stops after {f.early_stop} evaluations without improvement, and evaluates by "
            f"finetune.eval_every={f.eval_every:g}"
        )
    params |= parts.backbone.count_parameters()  # EVA may have changed the ranks, so count again
    log.info(f"fine-tune: {params['adapter']:,} adapter + {params['head']:,} head parameters, {n_rows} rows")
    fit(
        parts,
        "finetune",
        module,
        data,
        [
            *own_callbacks(settings.trainer),
            ProgressBar("fine-tune", "epoch", ("train/loss", f"validation/{parts.task.main_metric}")),
        ],
        loggers.of_stage("finetune"),
        gradient_clip_val=f.clip,
        accumulate_grad_batches=f.accumulate,
        reload_dataloaders_every_n_epochs=1,  # a loader has the length of its segment
    )
    return module


def _module(parts: Parts, adaptation: Adaptation, loaders: FineTuneData, warmup: int) -> FineTuneModule:
    f = parts.settings.finetune
    if f.warmup_steps and not has_warmup(f):
        log.info(f"fine-tune: the schedule has no warm-up: the recipe's {f.warmup_steps} steps of it are left out")
    elif warmup < f.warmup_steps:
        log.info(
            f"fine-tune: the recipe's {f.warmup_steps} warm-up steps are too many for this run: using {warmup} instead"
        )
    data = parts.data
    criterion = criterion_of(f, parts.task, data.train.encoded)
    if criterion.weights is not None:
        weights = zip(parts.task.head()["id2label"].values(), criterion.weights.tolist(), strict=True)
        log.info("fine-tune: class weights " + ", ".join(f"{name} {weight:.4g}" for name, weight in weights))
    alike = alike_of(data.official, parts.task.row_keys(data.official.rows))
    return FineTuneModule(
        adaptation,
        parts.task,
        data.train,
        data.validation,
        held_out_split(examples_of(data.official.encoded), parts.settings.seed, alike),
        replace(f, warmup_steps=warmup),
        parts.settings.seed,
        lambda: loaders.plan,
        criterion,
    )
