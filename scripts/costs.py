"""What the commands of a page cost on one GPU: an estimate from the operations of each model, nothing measured.

    python scripts/costs.py docs/results/reproduce.md             # prints an estimate for each block of commands
    python scripts/costs.py docs/results/reproduce.md --write     # and puts it into the page, after each block

For each run, the adapted model takes a training step on tensors without content (`diffora.run.memory`), and the
floating point operations and kernels of the forward and backward pass are counted. The time of a step is the larger of
two estimates: operations divided by ``--teraflops``, and kernels times ``--microseconds``. The second one is larger for
small batches of short texts, which do not keep a GPU busy. An epoch has one such step for each batch and a forward
pass over the validation rows. A round of the search has steps of LoRA on all modules over the training rows. Startup,
data loading and early stopping are left out. Memory is the estimate of ``dry_run=true`` for the largest batch of the
longest rows, for the run of a block that needs most.
"""

import argparse
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from diffora.backbones.meta import meta_backbone
from diffora.backbones.precision import AUTOCAST
from diffora.core.attach import attach
from diffora.core.draws import random_scores
from diffora.core.grid import find_grid
from diffora.core.lowrank import set_kernel
from diffora.places import conf_dir
from diffora.run import memory
from diffora.run.check import check
from diffora.run.sweep import cells, combinations, parse, table_of, values

TERAFLOPS = 15.0  # a fifth of what a GeForce RTX 3090 (24 GB) has in bfloat16 (71): attention and norms run unfused
MICROSECONDS = 10.0  # time that PyTorch takes to launch a kernel
ROWS = 16  # size of the batch for which operations are counted


@dataclass(frozen=True)
class Size:
    """Rows of a task, and the mean number of tokens of a row. It is 1 for an image: the model sets its tokens.

    Lengths of CoLA, MRPC, WNLI and SQuAD were counted with BERT's tokenizer on their training rows (SQuAD: 5000 of
    them, in windows of at most 384). The other lengths are estimates.
    """

    train: int
    validation: int
    tokens: int


SIZES = {
    "mnli": Size(392_702, 19_647, 39),
    "sst2": Size(67_349, 872, 13),
    "cola": Size(8_551, 1_043, 11),
    "qqp": Size(363_846, 40_430, 30),
    "qnli": Size(104_743, 5_463, 50),
    "rte": Size(2_490, 277, 70),
    "mrpc": Size(3_668, 408, 53),
    "stsb": Size(5_749, 1_500, 31),
    "wnli": Size(635, 71, 37),
    "squad": Size(89_200, 10_800, 175),  # windows: 1.02 for each question
    "squad_v2": Size(132_900, 12_100, 175),
    "cifar100": Size(50_000, 10_000, 1),
    "food101": Size(75_750, 25_250, 1),
}


class Kernels(TorchDispatchMode):
    """Counts operations that compute something. Views and questions such as a tensor's device do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "aten" and not func.is_view
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Step:
    """Operations of a forward and a backward pass for one token (or image), and the kernels of both for a batch."""

    forward: float
    backward: float
    kernels: int


def job_overrides(line: str) -> list[tuple[str, ...]]:
    """The runs that a command starts, each as its overrides. For an experiment: its table at the paper's scale."""
    given = parse([word for word in shlex.split(line) if "=" in word and not word.startswith(("hydra.", "logger="))])
    for experiment in (values(o)[0] for o in given if o.key_or_group == "experiment"):
        content = OmegaConf.load(conf_dir() / "experiment" / f"{experiment}.yaml")
        others = [o for o in given if o.key_or_group != "experiment"]
        jobs = cells(others, table_of(content.hydra.sweeper), experiment, "paper").values()
        # The files of method.like= do not exist yet.
        return [tuple(line for line in job if not line.startswith("method.like=")) for job in jobs]
    return combinations(given)


def adapted(cfg: DictConfig, searching: bool) -> tuple[Any, Any, Any]:
    """(task, adapted model on the meta device, its low-rank layers), for the search or for fine-tuning."""
    settings, task = check(cfg)
    method = settings.method
    model = meta_backbone(settings.model, task.model_request()).model
    grid = find_grid(model, settings.model.layer, settings.model.candidates, settings.model.roles)
    if searching:
        everything = torch.ones(grid.n_layers, grid.n_types, dtype=torch.bool)
        return task, model, attach(model, grid.names, everything, cfg.search.rank, None, cfg.method.alpha, freeze=False)
    scores = random_scores(grid.n_layers, grid.n_types, cfg.seed) if method.scoring else None
    method.adapt(model, grid, method.choose(grid, scores, cfg.seed), cfg.seed)
    set_kernel(model, memory.kernel_of_finetuning(settings))
    return task, model, None


def kind_of(cfg: DictConfig, searching: bool) -> tuple[Any, ...]:
    """Runs with the same key share an estimate. Ranks, adapter sizes, heads and numbers of classes change it little."""
    return cfg.task._target_, cfg.model.name, cfg.trainer.precision, "search" if searching else cfg.method.name


def step_of(cfg: DictConfig, searching: bool) -> Step:
    """Count one step, once for all runs of a kind."""
    key = kind_of(cfg, searching), cfg.task.get("train_head")
    if key not in _counted:
        _counted[key] = _count(cfg, searching)
    return _counted[key]


_counted: dict[Any, Step] = {}


def _count(cfg: DictConfig, searching: bool) -> Step:
    task, model, _ = adapted(cfg, searching)
    model.train()
    dtype = AUTOCAST.get(cfg.trainer.precision)
    with memory.without_memory(model), torch.autocast("cpu", dtype, enabled=dtype is not None):
        batch = task.dummy(ROWS, model)
        tokens = 1
        if "input_ids" in batch:
            tokens = 175 if "squad" in cfg.task.name else 64
            batch = {name: v[:, :tokens] if v.ndim == 2 else v for name, v in batch.items()}

        def loss() -> torch.Tensor:
            return task.loss(model(**task.inputs(batch)), batch)

        with Kernels() as kernels:
            loss().backward()
        with sdpa_kernel(SDPBackend.MATH):  # in other kernels, some products are not counted
            with FlopCounterMode(display=False) as forward:
                value = loss()
            with FlopCounterMode(display=False) as backward:
                value.backward()
    count = ROWS * tokens
    return Step(forward.get_total_flops() / count, backward.get_total_flops() / count, kernels.count)


def hours(cfg: DictConfig, given: argparse.Namespace) -> tuple[float, float]:
    """(search, fine-tuning) of one run."""
    size = SIZES[cfg.task.name]

    def passes(step: Step, batch: int, epochs: int) -> float:
        def seconds(rows: int, flops: float, kernels: int) -> float:
            work = rows * size.tokens * flops / (given.teraflops * 1e12)
            return max(work, -(-rows // batch) * kernels * given.microseconds / 1e6)

        training = seconds(size.train, step.forward + step.backward, step.kernels)
        return epochs * training

    step = step_of(cfg, searching=False)
    f = cfg.finetune
    finetune = passes(step, f.batch_size // f.accumulate, f.epochs)
    finetune += f.epochs * size.validation * size.tokens * step.forward / (given.teraflops * 1e12)
    search = 0.0
    if searches(cfg):
        s = cfg.search
        search = passes(step_of(cfg, searching=True), s.batch_size // s.accumulate, s.epochs)
    return search / 3600, finetune / 3600


def searches(cfg: DictConfig) -> bool:
    return cfg.method.get("selector") == "search" and not cfg.method.get("selection")


def gigabytes(cfg: DictConfig) -> float:
    """Peak memory of a run as ``dry_run=true`` estimates it, computed once for each kind of run and batch size."""
    f = cfg.finetune
    key = kind_of(cfg, False), f.batch_size // f.accumulate, cfg.task.get("max_length"), cfg.task.get("train_head")
    if key not in _peaks:
        _peaks[key] = _gigabytes(cfg)
    return _peaks[key]


_peaks: dict[Any, float] = {}


def _gigabytes(cfg: DictConfig) -> float:
    settings, _ = check(cfg)
    task, model, _ = adapted(cfg, searching=False)
    peak = memory.of_finetuning(settings, task, model).total
    if searches(cfg):
        task, model, layers = adapted(cfg, searching=True)
        peak = max(peak, memory.of_search(settings, task, model, layers).total)
    return peak / 1e9


def estimate(lines: list[str], given: argparse.Namespace) -> str:
    """One sentence for a block of commands."""
    runs: dict[str, int] = {}
    configurations: dict[str, DictConfig] = {}
    for line in lines:
        for job in job_overrides(line):
            setting = sorted(override for override in job if not override.startswith(("seed=", "cell.")))
            key = json.dumps(setting)
            runs[key] = runs.get(key, 0) + 1
            if key not in configurations:
                configurations[key] = compose("config", setting)
    search = finetune = 0.0
    largest: dict[str, tuple[int, DictConfig]] = {}
    for key, cfg in configurations.items():
        of_search, of_finetuning = hours(cfg, given)
        search, finetune = search + runs[key] * of_search, finetune + runs[key] * of_finetuning
        rows = cfg.finetune.batch_size // cfg.finetune.accumulate * cfg.task.get("max_length", 1)
        if rows > largest.get(cfg.method.name, (0, cfg))[0]:
            largest[cfg.method.name] = rows, cfg
    peak = max(gigabytes(cfg) for _, cfg in largest.values())
    searching = f", {search:.1f} of them searches" if search else ""
    total = sum(runs.values())
    return (
        f"Estimate: {total} run{'s' if total > 1 else ''}, {search + finetune:.1f} GPU hours{searching}; "
        f"at most {peak:.1f} GB."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--teraflops", type=float, default=TERAFLOPS, help="that the GPU reaches, of 10^12 a second")
    parser.add_argument("--microseconds", type=float, default=MICROSECONDS, help="to launch a kernel")
    given = parser.parse_args()
    page = given.page.read_text()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):

        def replace(block: re.Match[str]) -> str:
            lines = re.findall(r"python train\.py (.*?)(?:\s+#.*)?$", block[1], re.MULTILINE)
            if not lines:
                return block[0]
            sentence = estimate(lines, given)
            print(block[1].strip(), "\n ", sentence, flush=True)
            return f"```bash\n{block[1]}```\n\n{sentence}\n"

        page = re.sub(r"```bash\n([^`]*)```\n\nEstimate:[^\n]*\n", replace, page)
    if given.write:
        given.page.write_text(page)


if __name__ == "__main__":
    main()
