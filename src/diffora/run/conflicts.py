"""Settings that do not go with each other. Each rule is about typed settings only, so nothing is loaded for it.

What does not go with a single method is said by its own `Method.problems`, and what does not fit the model by
`Method.check`.
"""

from collections.abc import Iterator

from diffora.errors import called
from diffora.loop.sharded import FSDP
from diffora.methods.base import Method
from diffora.methods.diffora import DiffoRA
from diffora.methods.selecting import Selecting
from diffora.scoring.selectors import SELECTORS, facts_of
from diffora.settings.checks import show
from diffora.settings.sections import Settings


def conflicts(settings: Settings) -> Iterator[str]:
    """One message for each rule that the settings break."""
    for rule in RULES:
        yield from rule(settings)


def _scale(settings: Settings) -> Iterator[str]:
    """A scale without a table."""
    if settings.scale != "paper" and settings.cell.experiment is None:
        yield f"scale={settings.scale} is for tables, and this run is of none: -m experiment=table1_glue, for example"


def _batches(settings: Settings) -> Iterator[str]:
    """Batches that cannot be cut into micro-batches."""
    for name, stage in (("search", settings.search), ("finetune", settings.finetune)):
        if stage is not None and stage.batch_size % stage.accumulate:
            yield (
                f"{name}.batch_size={stage.batch_size} must be a multiple of {name}.accumulate={stage.accumulate}: "
                "a batch is cut into that many micro-batches"
            )


def _shared_batches(settings: Settings) -> Iterator[str]:
    """`shared_batches` without ``trainer.devices=auto``, which means something else on each machine."""
    if isinstance(devices := settings.trainer.devices, int):
        yield from shared_batches(settings, devices)


def shared_batches(settings: Settings, devices: int) -> Iterator[str]:
    """Batches that the processes cannot share evenly, with so many devices on a machine."""
    trainer, f, search = settings.trainer, settings.finetune, settings.search
    processes = devices * trainer.num_nodes
    parts = f"finetune.batch_size={f.batch_size}" + (
        f" / finetune.accumulate={f.accumulate}" if f.accumulate > 1 else ""
    )
    sizes = {parts: f.batch_size // f.accumulate}
    if search is not None and settings.method.scoring is not None:
        sizes[f"search.batch_size={search.batch_size}"] = search.batch_size
    for said, rows in sizes.items():
        if rows % processes:
            yield f"{said} must be a multiple of {processes}, the number of processes, which share each batch"


def _training(settings: Settings) -> Iterator[str]:
    """What does not go with the way of training and its precision."""
    method, search, trainer = settings.method, settings.search, settings.trainer
    if (ratio := settings.finetune.lora_plus_ratio) is not None and not method.trains_b:
        yield (
            f"finetune.lora_plus_ratio={ratio:g}: method={method.name} trains no B of a low-rank update, so LoRA+ has "
            "nothing to do; leave it out"
        )
    if settings.model.dtype == "float16" and trainer.precision == "bf16-mixed":
        yield "model.dtype=float16 does not go with trainer.precision=bf16-mixed: use model.dtype=bfloat16 or float32"
    keeps = method.scoring is not None and method.scoring.keep_weights
    if search is not None and keeps and search.rank != settings.rank:
        yield (
            f"method.warm_start=true needs search.rank={search.rank} to be rank={settings.rank}: selected modules keep "
            "the A and B of the search"
        )


def _second_order(settings: Settings) -> Iterator[str]:
    """What does not go with ``search.order=2``."""
    search, trainer = settings.search, settings.trainer
    if search is None or search.order != 2:
        return
    if trainer.precision == "16-mixed":
        yield "search.order=2 does not go with trainer.precision=16-mixed: use bf16-mixed or 32-true"
    if search.update == "simultaneous":
        yield (
            "search.order=2 does not go with search.update=simultaneous: it differentiates through a weight step that "
            "comes before the Γ step; use search.update=alternating"
        )
    if search.readout == "early_gradient":
        yield (
            "search.order=2 does not go with search.readout=early_gradient, which is a sum of first-order gradients: "
            "use search.order=1"
        )
    if trainer.compile:
        yield "search.order=2 differentiates twice, which does not go with trainer.compile=true"
    if trainer.gradient_checkpointing:
        yield "search.order=2 differentiates twice, which does not go with trainer.gradient_checkpointing=true"


def _search_only(settings: Settings) -> Iterator[str]:
    """The settings that do not go with ``search_only=true``."""
    method = settings.method
    if not settings.search_only:
        return
    if type(method).choose is Method.choose:
        yield f"search_only=true: method={method.name} selects no modules; method=diffora does"
    if isinstance(method, DiffoRA) and method.selection is not None:
        given = show(method.selection)
        yield f"search_only=true does not go with method.selection={given}, which says what is selected"
    if settings.predict:
        yield "search_only=true does not go with predict=true, which needs a fine-tuned model"


def _ensemble(settings: Settings) -> Iterator[str]:
    """What does not go with ``search.ensemble``."""
    n, scoring = 1 if settings.search is None else settings.search.ensemble, settings.method.scoring
    if n > 1 and scoring is not None and scoring.keep_weights:
        yield (
            f"method.warm_start=true does not go with search.ensemble={n}: each member trains its own A and B, and "
            "none of them made the selection"
        )
    if n > 1 and scoring is not None and not facts_of(scoring.selector).reads_rows:
        yield f"search.ensemble={n}: method.selector={scoring.selector} reads weights only, so every member is the same"


def _quantised(settings: Settings) -> Iterator[str]:
    """What does not go with ``model.quantise``, whose weights can be neither read nor trained."""
    quantise, method, scoring = settings.model.quantise, settings.method, settings.method.scoring
    if quantise is None:
        return
    if method.trains_pretrained:
        yield (
            f"model.quantise={quantise} freezes the pretrained weights, and method={method.name} trains them: "
            "use a method that adds an adapter, or leave model.quantise out"
        )
    if scoring is not None and scoring.selector in SELECTORS and not facts_of(scoring.selector).trains:
        able = [name for name, selector in SELECTORS.items() if selector.trains]
        yield (
            f"model.quantise={quantise} does not go with method.selector={scoring.selector}, which reads the "
            f"pretrained weights or their gradients: use {', '.join(able)}, or select without model.quantise "
            "(search_only=true) and give method.selection=<its selection.json>"
        )
    if settings.trainer.compile:
        yield "trainer.compile=true does not go with model.quantise: the frozen layers are compiled already"


def _timing(settings: Settings) -> Iterator[str]:
    """The settings that do not go with ``method.time_from=measured``."""
    method = settings.method
    if not isinstance(method, Selecting) or method.time_from != "measured":
        return
    t = settings.trainer
    several = t.strategy != "auto" if t.devices == "auto" else t.devices != 1
    if several or t.num_nodes > 1:  # each process would find other layers
        yield (
            f"method.time_from=measured times steps on one device, and trainer.devices={t.devices} "
            f"trainer.num_nodes={t.num_nodes}: use method.time_from=model"
        )
    if settings.trainer.compile:
        yield (
            "method.time_from=measured does not go with trainer.compile=true, because each model would be compiled "
            "first: use method.time_from=model"
        )


def _prefix(settings: Settings) -> Iterator[str]:
    """The settings that do not go with ``trainer.cache_prefix=true``."""
    t = settings.trainer
    if t.cache_prefix and (t.devices != 1 or t.num_nodes != 1 or t.strategy == FSDP):
        nodes = "" if t.num_nodes == 1 else f" trainer.num_nodes={t.num_nodes}"
        yield (
            f"trainer.cache_prefix=true does not go with trainer.devices={t.devices}{nodes} "
            f"trainer.strategy={t.strategy}: one process computes the frozen layers; use trainer.devices=1"
            f"{nodes and ' trainer.num_nodes=1'} trainer.strategy=auto"
        )


def _fsdp(settings: Settings) -> Iterator[str]:
    """What does not go with ``trainer.strategy=fsdp``."""
    trainer, method, search = settings.trainer, settings.method, settings.search
    if trainer.strategy != FSDP:
        return
    said = "trainer.strategy=fsdp"
    if trainer.devices == 1 and trainer.num_nodes == 1:
        yield f"{said} needs several devices: trainer.devices=2 or more, or leave it out"
    if method.trains_all_pretrained:
        yield (
            f"{said} divides frozen weights, and method={method.name} trains all of them: use trainer.strategy=ddp, or "
            "a method that adds an adapter"
        )
    if settings.model.quantise is not None:
        yield (
            f"{said} does not go with model.quantise={settings.model.quantise}, whose weights cannot be divided: use "
            "trainer.strategy=ddp with it, where each device has all of the quantised weights"
        )
    if trainer.compile:
        yield f"{said} does not go with trainer.compile=true: leave one of them out"
    if trainer.precision == "16-mixed":
        yield f"{said} does not go with trainer.precision=16-mixed: use bf16-mixed or 32-true"
    if settings.predict:
        yield (
            f"{said} does not go with predict=true: predict afterwards on one device, "
            f"`{called('evaluate')} run=<the run directory> split=test`"
        )
    if path := getattr(getattr(settings.task, "forgetting", None), "path", None):
        yield (
            f"{said} does not go with task.forgetting.path={path}, because the loss on these texts is measured before "
            "the model is divided, on one device: leave it out (task.forgetting.path=null)"
        )
    if search is None or method.scoring is None:
        return
    if not facts_of(method.scoring.selector).shards:
        able = [name for name, selector in SELECTORS.items() if selector.shards]
        yield (
            f"{said} does not go with method.selector={method.scoring.selector}, which reads whole weights or runs the "
            f"model a different number of times in each process: use {' or '.join(able)}, or select on "
            "one device (search_only=true) and give method.selection=<its selection.json>"
        )
    if search.order == 2:
        yield f"{said} does not go with search.order=2, which differentiates twice: use search.order=1"


RULES = (
    _scale,
    _batches,
    _training,
    _second_order,
    _search_only,
    _ensemble,
    _timing,
    _prefix,
    _quantised,
    _shared_batches,
    _fsdp,
)
