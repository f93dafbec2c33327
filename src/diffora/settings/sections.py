"""The settings of a run: one class for each section of its configuration.

Each field has a type, a check and a help text; an optional field also has a default. Tasks and methods declare their
own settings in the same way, in their own files. The values that a run starts from are in ``conf/``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from diffora.settings.checks import (
    BACKBONE,
    CALLBACKS,
    CANDIDATES,
    CLASS_WEIGHTS,
    COUNT,
    EVALUATIONS,
    FRACTION,
    LAYERS,
    NAMED,
    NOT_NEGATIVE,
    POSITIVE,
    RANK,
    RATE,
    SEED,
    SHARE_OF_MODULES,
    STEPS_OR_SHARE,
    TEXTS,
    Check,
    Help,
    whole,
)

INTERNAL = Help("")
"""For a field that is no key of the configuration."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Which cell of an experiment's table a run fills. The sweep writes it for the report; it changes no result."""

    experiment: Annotated[str | None, Help("The table's name.")] = None
    row: Annotated[str | None, Help("The row's name; with `-m`, also chooses rows.")] = None
    column: Annotated[str | None, Help("The column's name; with `-m`, also chooses columns.")] = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The training settings that a paper or a task's author recommends; other settings take their values from here.

    ``recipe=<name>`` replaces some of them.
    """

    rank: Annotated[int | None, RANK, Help("Rank of the adapter of a selected module.", "directions")] = None
    rho: Annotated[float | None, SHARE_OF_MODULES, Help("Share of each layer's modules to select.")] = None
    shared_rank: Annotated[
        int | None, RANK, Help("Rank of the pairs that unselected modules share across layers.", "directions")
    ] = None
    alpha: Annotated[float | None, POSITIVE, Help("Low-rank updates are scaled by alpha / rank.")] = None
    dropout: Annotated[float | None, RATE, Help("Dropout rate on the input of the low-rank path.")] = None
    lr: Annotated[float | None, POSITIVE, Help("Learning rate for adapters and head.")] = None
    full_ft_lr: Annotated[float | None, POSITIVE, Help("Learning rate for `method=full_ft`.")] = None
    batch_size: Annotated[int | None, COUNT, Help("Batch size, over all devices.", "rows")] = None
    epochs: Annotated[int | None, COUNT, Help("Passes over the training rows.", "epochs")] = None
    warmup_steps: Annotated[int | None, whole(0), Help("Steps in which the learning rate rises.", "steps")] = None
    early_stop: Annotated[
        Annotated[int, COUNT] | None, Help("Stop after this many epochs without improvement; null: never.", "epochs")
    ] = None
    search_epochs: Annotated[int | None, COUNT, Help("Rounds of the search.", "rounds")] = None
    sora_lambda: Annotated[float | None, NOT_NEGATIVE, Help("`method.lam` of `method=sora`.")] = None
    of: Annotated[
        dict[str, Any] | None, Help("Settings by task, in recipe files; the settings above refer to them.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """The settings of every task. A task with more of them names a subclass in its ``settings`` attribute."""

    name: Annotated[str, Help("The task's name, in run directories and records.")]
    recipe: Annotated[Recipe, Help("Training settings for this task.")] = field(default_factory=Recipe)
    max_train_rows: Annotated[
        Annotated[int, COUNT] | None,
        Help("Use only this many training rows, the same ones in every run; null: all.", "rows"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class Model:
    """The pretrained backbone."""

    name: Annotated[str, Help("A short name, in run directories and records.")]
    path: Annotated[str, BACKBONE, Help("Hub id or folder of the pretrained model; `embedded`: the package's own.")]
    layer: Annotated[
        str | Annotated[list[str], LAYERS] | None,
        Help("Name of the layers, as in `encoder.layer.*`; a list for several blocks; null: found in the model."),
    ] = None
    candidates: Annotated[
        Annotated[list[str], CANDIDATES] | None,
        Help("The linear modules of a layer that may get an adapter; null: all of them."),
    ] = None
    roles: Annotated[
        dict[str, str] | None,
        Help("Modules by their role (`key`, `value`, `attention_output`, `ffn_output`); null: guessed from names."),
    ] = None
    full_ft_lr: Annotated[float, POSITIVE, Help("Learning rate for `method=full_ft` without one in the recipe.")] = 2e-5
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        Help("Type of the frozen weights; trainable weights are always float32."),
    ] = "float32"
    quantise: Annotated[
        Literal[None, "8bit", "4bit"],
        Help("Quantise the frozen weights of the layers; needs the extra `quantised`."),
    ] = None
    kernel: Annotated[
        Literal["auto", "fused", "plain"],
        Help("Low-rank layers, dropout and bfloat16 attention: fused with less work, `plain` PyTorch, or the faster."),
    ] = "auto"
    trust_remote_code: Annotated[
        bool, Help("Run Python code that comes with the checkpoint. Read that code first.")
    ] = False
    config: Annotated[
        dict[str, Any] | None,
        Help("The transformers configuration, for `dry_run=true` without the hub; null: the checkpoint's own."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Hardware and precision, for Lightning's Trainer."""

    accelerator: Annotated[
        Literal["auto", "cpu", "gpu", "cuda", "mps"], Help("Where to compute; auto: a GPU if there is one.")
    ]
    devices: Annotated[
        int | str,
        Check(lambda v: v == "auto" or whole(1, 10**6).fits(v), "a whole number of at least 1, or auto"),
        Help("How many devices to use; auto: all of them.", "devices"),
    ]
    num_nodes: Annotated[
        int, whole(1, 10**5), Help("How many machines take part; each has `trainer.devices` devices.", "machines")
    ] = 1
    strategy: Annotated[  # others are not tested
        Literal["auto", "ddp", "ddp_find_unused_parameters_true", "fsdp"],
        Help("How several devices share the work; fsdp: they share the frozen weights too."),
    ]
    precision: Annotated[
        Literal["auto", "32-true", "bf16-mixed", "16-mixed"],
        Help(
            "Precision of the computation. auto: bf16-mixed and `model.dtype=bfloat16` where the device computes in "
            "bfloat16 (a CPU with AMX or AVX512-BF16), else 32-true; the run records what it used."
        ),
    ]
    deterministic: Annotated[
        Literal[True, False, "warn"],
        Help("Refuse operations that are not deterministic (true), warn about them, or allow them (false)."),
    ]
    gradient_checkpointing: Annotated[
        bool,
        Help("Compute activations again in the backward pass instead of saving them: less memory, a third more time."),
    ]
    num_workers: Annotated[int, whole(0, 256), Help("Processes that load batches; 0: the main process.")]
    num_proc: Annotated[
        int,
        whole(1, 256),
        Help("Processes that tokenise the rows before training (SQuAD: always one); the result is the same."),
    ] = 1
    compile: Annotated[
        bool,
        Help("Compile the model with `torch.compile` in search and fine-tuning; needs a C++ compiler."),
    ] = False
    cache_prefix: Annotated[
        bool,
        Help(
            "Compute the layers below the lowest trained one once, without their dropout, and read their output from a "
            "file in later epochs."
        ),
    ] = False
    cache_prefix_limit: Annotated[
        float, POSITIVE, Help("Largest size of the files of `trainer.cache_prefix=true`.", "GB")
    ] = 20.0
    callbacks: Annotated[list[Any], CALLBACKS, Help("Your own Lightning callbacks for the fine-tuning stage.")] = field(
        default_factory=list
    )


@dataclass(frozen=True, kw_only=True)
class FineTune:
    """The fine-tuning stage."""

    epochs: Annotated[int, COUNT, Help("Passes over the training rows.", "epochs")]
    batch_size: Annotated[int, COUNT, Help("Rows per optimiser step, over all devices.", "rows")]
    lr: Annotated[float, POSITIVE, Help("Peak learning rate.")]
    warmup_steps: Annotated[int, whole(0), Help("Steps in which the learning rate rises to its peak.", "steps")]
    early_stop: Annotated[
        Annotated[int, COUNT] | None,
        Help("Stop after this many evaluations (by default epochs) without improvement; null: never.", "evaluations"),
    ]
    max_steps: Annotated[
        Annotated[int, COUNT] | None,
        Help("Train for this many optimiser steps instead of `finetune.epochs`; null: by epochs.", "steps"),
    ] = None
    eval_every: Annotated[
        Annotated[float, EVALUATIONS] | None,
        Help(
            "Evaluate, choose the best weights and write a checkpoint after so many steps, or after this fraction of "
            "an epoch; null: after each epoch."
        ),
    ] = None
    optimizer: Annotated[
        Annotated[str | dict[str, Any], NAMED],
        Help(
            "`adamw`, `sgd`, `adafactor`, or a class, as in `{_target_: torch.optim.SGD, momentum: 0.9}`. It gets "
            "`finetune.lr` and `finetune.weight_decay`."
        ),
    ] = "adamw"
    scheduler: Annotated[
        Annotated[str | dict[str, Any], NAMED],
        Help(
            "Schedule of the learning rate: `linear`, `cosine`, `constant` (with warm-up), or a class or function, as "
            "in `{_target_: torch.optim.lr_scheduler.OneCycleLR}`. It is stepped once per optimiser step."
        ),
    ] = "linear"
    weight_decay: Annotated[float, NOT_NEGATIVE, Help("Weight decay of the optimiser.")] = 0.0
    lora_plus_ratio: Annotated[
        Annotated[float, POSITIVE] | None,
        Help("LoRA+: the learning rate of B is this many times that of A and the head; null: the same rate."),
    ] = None
    label_smoothing: Annotated[float, RATE, Help("Label smoothing of the training loss, for tasks with classes.")] = 0.0
    class_weights: Annotated[
        Annotated[str | list[Any] | dict[str, Any], CLASS_WEIGHTS] | None,
        Help(
            "Weights of the classes in the training loss: `balanced` (the same total for each class), a list, or "
            "`{class: weight}` (others 1); null: every row counts the same."
        ),
    ] = None
    clip: Annotated[Annotated[float, POSITIVE] | None, Help("Largest gradient norm; null: not clipped.")] = 1.0
    accumulate: Annotated[
        int, COUNT, Help("Micro-batches per batch: more of them need less memory.", "micro-batches")
    ] = 1
    eval_batch_size: Annotated[
        Annotated[int, COUNT] | None,
        Help("Rows per batch in an evaluation, over all devices; null: twice a training micro-batch.", "rows"),
    ] = None
    dropout: Annotated[
        float | None, RATE, Help("Dropout rate on the input of the low-rank path, for methods that have one.")
    ] = None

    @property
    def evaluation_rows(self) -> int:
        """Rows per batch in an evaluation."""
        return self.eval_batch_size or 2 * (self.batch_size // self.accumulate)


@dataclass(frozen=True, kw_only=True)
class Search:
    """The search for modules, for methods with a selector."""

    epochs: Annotated[int, COUNT, Help("Rounds over the search-train rows.", "rounds")]
    batch_size: Annotated[int, COUNT, Help("Rows per step, of each of the two parts.", "rows")]
    lr: Annotated[float, POSITIVE, Help("Learning rate of A, B and the head.")]
    rank: Annotated[int, RANK, Help("Rank of the candidates' adapters.", "directions")]
    gamma_lr: Annotated[float, POSITIVE, Help("Learning rate of Γ.")] = 0.01
    update: Annotated[
        Literal["alternating", "simultaneous"],
        Help("Update weights and Γ in turn, as in [D], or both from one pass over train and validation rows."),
    ] = "alternating"
    order: Annotated[
        Literal[1, 2], Help("Order of the hypergradient; 2 differentiates through one unrolled weight step.")
    ] = 1
    relaxation: Annotated[
        Literal["softmax", "scaled_softmax", "sigmoid"],
        Help(
            "From Γ to gates: softmax over the modules of a layer ([D] eq. 11), N times it (mean gate 1), or an "
            "independent sigmoid for each."
        ),
    ] = "softmax"
    train_steps: Annotated[int, COUNT, Help("Weight steps per Γ step, T.", "steps")] = 1
    max_rows: Annotated[
        Annotated[int, whole(2, 1_000_000_000)] | None,
        Help("Search on so many training rows, drawn at random; null: on all of them.", "rows"),
    ] = None
    valid_fraction: Annotated[float, FRACTION, Help("Share of these rows for the Γ steps.")] = 0.5
    weight_decay: Annotated[float, NOT_NEGATIVE, Help("Weight decay of the weight steps.")] = 0.0
    clip: Annotated[Annotated[float, POSITIVE] | None, Help("Largest gradient norm; null: not clipped.")] = 1.0
    accumulate: Annotated[
        int,
        COUNT,
        Help("Micro-batches per batch: more need less memory (not for the Γ steps of `order=2`).", "micro-batches"),
    ] = 1
    head_warmup: Annotated[
        Annotated[float, STEPS_OR_SHARE] | None,
        Help(
            "At first, train A, B and the head alone, for so many steps or this share of all steps, and leave Γ as it "
            "is; null: Γ moves from the first step, as in [D]."
        ),
    ] = None
    readout: Annotated[
        Literal["gamma", "early_gradient"],
        Help(
            "What the modules are scored by: the gates at the end, as in [D], or minus the sum of ∂L_valid/∂γ̄ over the "
            "first third of the Γ steps."
        ),
    ] = "gamma"
    patience: Annotated[
        Annotated[int, COUNT] | None,
        Help(
            "Stop once the selection has not changed for this many checks; there are ten in a round. null: all rounds, "
            "as in [D].",
            "checks",
        ),
    ] = None
    masks: Annotated[
        int, whole(10, 100_000), Help("Random selections that `method.selector=one_shot` scores.", "selections")
    ] = 256
    ensemble: Annotated[
        int,
        whole(1, 100),
        Help(
            "Run the selector this many times, each with its own seed, and select by the mean of the standardised "
            "scores; from 2 on, `selection.json` says how sure each module is.",
            "members",
        ),
    ] = 1


@dataclass(frozen=True, kw_only=True)
class Wandb:
    """Weights & Biases."""

    project: Annotated[str, Help("The project.")]
    entity: Annotated[str | None, Help("The user or team; null: the account's own.")] = None
    group: Annotated[str | None, Help("The group of runs; by default, the runs that differ only in their seed.")] = None
    tags: Annotated[list[str], TEXTS, Help("The run's tags.")] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Logger:
    """Where curves are logged. ``logger=[csv,wandb]`` chooses several, ``logger=none`` none.

    Attributes:
        own: loggers by ``_target_``, by the key under which they are in the section. `read_sections` collects them.
    """

    csv: Annotated[bool, Help("Write `logs/<stage>/version_<n>/metrics.csv`.")] = False
    tensorboard: Annotated[bool, Help("Write TensorBoard's files; needs the extra `tensorboard`.")] = False
    wandb: Annotated[Wandb | None, Help("Log to Weights & Biases.")] = None
    own: Annotated[
        dict[str, Any],
        Check(lambda v: isinstance(v, Mapping) and all(map(NAMED.fits, v.values())), "loggers"),
        INTERNAL,
    ] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Debug:
    """Help in finding mistakes; any ``debug=<name>`` also shows full tracebacks."""

    detect_anomaly: Annotated[bool, Help("Let autograd name the operation that made a NaN; slow.")] = False


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A run's settings, as `diffora.run.check.check` reads them once from the composed configuration.

    Attributes:
        method: the `Method`; its ``name`` is the one in ``method=<name>``.
        task: the `TaskSettings` of the task's class.
        composed: the composed configuration in plain containers, as ``config.yaml`` and the loggers record it.
    """

    seed: Annotated[int, SEED, Help("Seed of every random draw; with `-m`, a list of seeds.")]
    rank: Annotated[int | None, RANK, Help("Rank of the method's adapters, for methods that have one.")] = None
    rho: Annotated[
        float | None, SHARE_OF_MODULES, Help("Share of each layer's modules to select, for methods that select.")
    ] = None
    resume: Annotated[bool, Help("Continue the run in `hydra.run.dir`, or the sweep in `hydra.sweep.dir`.")] = False
    predict: Annotated[bool, Help("Write predictions for the test split after training.")] = False
    search_only: Annotated[
        bool, Help("Search and select, write `selection.json` and stop before the fine-tuning (`diffora select`).")
    ] = False
    dry_run: Annotated[
        bool, Help("Show modules, parameter counts and memory without weights or data; with `-m`, list the runs.")
    ] = False
    scale: Annotated[
        Literal["paper", "small"],
        Help("Size of an `experiment=` table: the paper's backbones, data and seeds, or small embedded ones."),
    ] = "paper"
    cell: Annotated[Cell, Help("Which cell of a table the run fills.")] = field(default_factory=Cell)
    model: Annotated[Model, Help("The backbone.")]
    finetune: Annotated[FineTune, Help("The fine-tuning stage.")]
    # None for methods that do not search. The type leaves None out, because code of the search need not test for it.
    search: Annotated[Search, Help("The search stage.")] = None  # type: ignore[assignment]
    trainer: Annotated[Trainer, Help("Hardware and precision.")]
    logger: Annotated[Logger | None, Help("Where curves are logged.")] = None
    debug: Annotated[Debug | None, Help("Help in finding mistakes.")] = None
    method: Any
    task: Any
    composed: dict[str, Any] = field(repr=False)
