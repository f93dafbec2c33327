"""What the benchmarks share: shapes, contenders, rounds, and memory.

A contender is an adapted model with an optimiser and a `step`. All contenders of a group have the same backbone
weights, head, A and B, batch, and fused AdamW. They share the tensors of the frozen weights.
"""

import copy
import math
import multiprocessing
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import peft
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks.report import REPO
from diffora.backbones.backbone import Backbone
from diffora.core.attach import attach
from diffora.core.grid import Grid, find_grid
from diffora.core.lowrank import set_kernel
from diffora.kernels.dropout import use_cheap_dropout
from diffora.methods.lora import LoRA
from diffora.scoring.bilevel import SearchModule
from diffora.settings.sections import Search as SearchSettings
from diffora.tasks.base import get_task

ALPHA, LR = 16.0, 1e-4
Batch = dict[str, Tensor]


# --- shapes ---


@dataclass(frozen=True)
class Shape:
    """A backbone of ``conf/model`` with random weights, and a batch for it.

    Attributes:
        model: name of the YAML file. Its ``config`` gives the true shape.
        rows, length: size of the batch, which has no padding.
        rank: rank of every adapter.
        dropout: dropout of the backbone itself.
        device: cpu or cuda. On cuda, steps run under bfloat16 autocast.
        bf16: on the CPU too.
        changes: entries that replace those of the YAML's transformers configuration.
        modules: adapt the first ``modules`` candidates of each layer; None for all.
    """

    model: str
    rows: int
    length: int
    rank: int = 4
    dropout: float = 0.0
    device: str = "cpu"
    bf16: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)
    modules: int | None = None

    @property
    def yaml(self) -> Any:
        return OmegaConf.load(REPO / "conf" / "model" / f"{self.model}.yaml")

    @property
    def entries(self) -> dict[str, Any]:
        """The entries of the transformers configuration."""
        entries: Any = OmegaConf.to_container(self.yaml.config)
        return entries | dict(self.changes)

    def build(self) -> nn.Module:
        """The backbone, frozen but for its head; a language model's head is frozen too."""
        entries = self.entries
        dropout = {f"{name}_probs_dropout_prob" if name == "attention" else f"{name}_dropout_prob": self.dropout
                   for name in ("attention", "hidden")}  # fmt: skip
        causal = entries["model_type"] == "llama"
        config = AutoConfig.for_model(**entries | ({} if causal else dropout))
        config.use_cache = False
        kind = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
        torch.manual_seed(0)
        with torch.device(self.device):
            model = kind.from_config(config, dtype=getattr(torch, self.yaml.get("dtype", "float32")))
        return Backbone.of(model, trains_head=not causal).freeze().model.train()

    def grid(self, model: nn.Module) -> Grid:
        found = find_grid(model, self.yaml.layer, self.yaml.candidates)
        if self.modules is None:
            return found
        return find_grid(model, self.yaml.layer, list(found.types[: self.modules]))

    def names(self, model: nn.Module) -> list[str]:
        """Full names of the adapted modules."""
        return [name for row in self.grid(model).names for name in row]

    def batch(self, seed: int = 0) -> Batch:
        """Random tokens and labels; a language model's labels are its tokens."""
        random = torch.Generator().manual_seed(seed)
        ids = torch.randint(5, self.entries["vocab_size"] - 5, (self.rows, self.length), generator=random)
        causal = self.entries["model_type"] == "llama"
        batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": ids if causal else torch.randint(0, 2, (self.rows,), generator=random),
            "row": torch.arange(self.rows),
        }
        return {key: value.to(self.device) for key, value in batch.items()}

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bf16 or self.device == "cuda")


# --- contenders ---


class Contender:
    """One optimisation step of a model: forward, backward, optimiser step, gradients cleared.

    Args:
        model: parameters that require gradients are trained.
        shape: the backbone's shape, with the device.
        parts: number of batches that the rows are cut into. Each gets a step of its own.
        after_step: called with the number of the step, before its gradients are cleared.
    """

    def __init__(
        self, model: nn.Module, shape: Shape, parts: int = 1, after_step: Callable[[int], object] = lambda number: None
    ) -> None:
        self.model, self.shape, self.parts, self.after_step = model, shape, parts, after_step
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True) if trained else None
        self.number = 0

    def loss(self, batch: Batch) -> Tensor:
        with self.shape.autocast():
            loss: Tensor = self.model(**{key: value for key, value in batch.items() if key != "row"}).loss
        return loss

    def step(self, batch: Batch) -> None:
        for part in cut(batch, self.parts):
            self.loss(part).backward()
            if self.optimizer is not None:
                self.optimizer.step()
                self.after_step(self.number)
                self.optimizer.zero_grad()
            self.number += 1


class Search:
    """One bi-level step, with the code of the search itself.

    The first half of the rows is search-valid, the second half is search-train.

    Args:
        joint: whether one pass serves both levels (``search.update=simultaneous``), or each level has its own.
    """

    def __init__(self, model: nn.Module, grid: Grid, shape: Shape, joint: bool) -> None:
        everything = torch.ones(grid.n_layers, grid.n_types, dtype=torch.bool)
        layers: Any = attach(model, grid.names, everything, shape.rank, None, ALPHA, freeze=False)
        fill(model)
        settings = SearchSettings(epochs=1, batch_size=shape.rows, rank=shape.rank, lr=LR, clip=None)
        task = get_task(OmegaConf.load(REPO / "conf" / "task" / "mrpc.yaml"))
        self.module = SearchModule(model, layers, grid.types, task, settings, seed=0).to(shape.device)
        # A step needs nothing else from a Trainer.
        self.module.trainer = SimpleNamespace(world_size=1, precision_plugin=None)  # type: ignore[assignment]
        self.optimizers = self.module.configure_optimizers()
        self.shape, self.joint = shape, joint

    def step(self, batch: Batch) -> None:
        gamma_opt, weight_opt = self.optimizers
        valid, train = cut(batch, 2)
        with self.shape.autocast():
            if self.joint:
                self.module.joint_step(gamma_opt, weight_opt, valid, train)
            else:
                self.module.gamma_step(gamma_opt, valid, train)
                self.module.weight_step(weight_opt, train)


def cut(batch: Batch, parts: int) -> Iterator[Batch]:
    """The rows of a batch in equal parts, in order."""
    size = len(batch["row"]) // parts
    return ({key: value[i * size : (i + 1) * size] for key, value in batch.items()} for i in range(parts))


def own(model: nn.Module) -> nn.Module:
    """A copy with its own head that shares the frozen weights."""
    shared = {id(t): t for t in [*model.parameters(), *model.buffers()] if not t.requires_grad}
    return copy.deepcopy(model, shared)


def floor(model: nn.Module, shape: Shape, parts: int = 1) -> Contender:
    """No adapter: gradients pass through the frozen backbone, and only the head is trained.

    The inputs of the layers are made to require a gradient. They are the embeddings and, in DeBERTa, the table of
    relative positions: adapters on queries and keys also send gradients through it.
    """
    model = own(model)
    backbone: Any = getattr(model, model.base_model_prefix)
    sources = [getattr(backbone, "embeddings", None) or model.get_input_embeddings()]
    if getattr(model.config, "relative_attention", False):
        sources.append(backbone.encoder.LayerNorm)
    for module in sources:
        module.register_forward_hook(lambda module, args, output: output.requires_grad_())
    return Contender(model, shape, parts)


def lora(model: nn.Module, shape: Shape, dropout: float = 0.0, kernel: str = "auto") -> Contender:
    """Our LoRA, adapted as by `method=lora`. As ``model.kernel``, ``kernel`` also chooses the backbone's dropout."""
    model = own(model)
    if kernel != "plain":
        use_cheap_dropout(model)
    adaptation = LoRA(rank=shape.rank, dropout=dropout, alpha=ALPHA).adapt(model, shape.grid(model), None, 0)
    set_kernel(model, kernel)
    fill(model)
    return Contender(adaptation.model.to(shape.device), shape)


def compiled(contender: Contender) -> Contender:
    """With its forward pass compiled, as with ``trainer.compile=true``."""
    contender.model.forward = torch.compile(contender.model.forward, dynamic=True)
    return contender


def peft_lora(model: nn.Module, shape: Shape, dropout: float = 0.0, parts: int = 1) -> Contender:
    """PEFT's LoRA on the same modules, and the same head."""
    model = own(model)
    config = peft.LoraConfig(r=shape.rank, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=shape.names(model))
    return Contender(_with_peft(model, config), shape, parts)


def peft_adalora(model: nn.Module, shape: Shape) -> Contender:
    """PEFT's AdaLoRA. It updates its importance scores after each step and prunes after every tenth."""
    model = own(model)
    config = peft.AdaLoraConfig(
        init_r=shape.rank + shape.rank // 2 + 1, target_r=shape.rank, lora_alpha=ALPHA, lora_dropout=0.0,
        tinit=1, tfinal=1000, deltaT=10, total_step=10_000, target_modules=shape.names(model),
    )  # fmt: skip
    wrapped: Any = _with_peft(model, config)
    return Contender(wrapped, shape, after_step=wrapped.base_model.update_and_allocate)


def _with_peft(model: nn.Module, config: Any) -> nn.Module:
    head = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wrapped = peft.get_peft_model(model, config)
    for parameter in head:
        parameter.requires_grad_(True)
    fill(model)
    return wrapped.train()


def full_ft(model: nn.Module, shape: Shape) -> Contender:
    """Every weight is trained. This is the only contender with its own copy of the backbone."""
    return Contender(copy.deepcopy(model).requires_grad_(True), shape)


def diffora(model: nn.Module, shape: Shape) -> Contender:
    """DiffoRA's fine-tuning: half of each layer's modules have their own pair, the others share pairs of rank 2."""
    model = own(model)
    grid = shape.grid(model)
    selected = torch.tensor([[column < grid.n_types // 2 for column in range(grid.n_types)]] * grid.n_layers)
    attach(model, grid.names, selected, shape.rank, 2, ALPHA, freeze=False)
    fill(model)
    return Contender(model.to(shape.device), shape)


def search(model: nn.Module, shape: Shape, joint: bool) -> Search:
    """The bi-level step; see `Search`."""
    model = own(model)
    use_cheap_dropout(model)
    return Search(model, shape.grid(model), shape, joint)


CONTENDERS: dict[str, Callable[[nn.Module, Shape], Any]] = {
    "floor": floor,
    "lora": lora,
    "lora_dropout": lambda model, shape: lora(model, shape, dropout=0.1),
    "fused": lambda model, shape: lora(model, shape, kernel="fused"),
    "plain": lambda model, shape: lora(model, shape, kernel="plain"),
    "plain_dropout": lambda model, shape: lora(model, shape, dropout=0.1, kernel="plain"),
    "compiled": lambda model, shape: compiled(lora(model, shape)),
    "peft": peft_lora,
    "compiled_peft": lambda model, shape: compiled(peft_lora(model, shape)),
    "peft_dropout": lambda model, shape: peft_lora(model, shape, dropout=0.1),
    "adalora": peft_adalora,
    "full_ft": full_ft,
    "diffora": diffora,
    "simultaneous": lambda model, shape: search(model, shape, joint=True),
    "alternating": lambda model, shape: search(model, shape, joint=False),
    "two_floors": lambda model, shape: floor(model, shape, parts=2),
    "two_peft_steps": lambda model, shape: peft_lora(model, shape, parts=2),
}
FINETUNING = ("floor", "lora", "lora_dropout", "plain", "plain_dropout", "peft", "peft_dropout", "adalora", "full_ft")
BILEVEL = ("simultaneous", "alternating", "two_floors", "two_peft_steps", "floor", "peft")


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Draw A and B of every adapter with a seed from its module's name, so all contenders have the same. B is not 0."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_bt"):
            lora_a, lora_bt = module.lora_a, module.lora_bt
        elif isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            factors = [getattr(factor, "weight", factor) for factor in (module.lora_A.default, module.lora_B.default)]
            lora_a, lora_bt = factors[0], factors[1].T
            if hasattr(module, "lora_E"):
                module.lora_E.default.fill_(1.0)
        else:
            continue
        random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        lora_a.copy_(torch.randn(lora_a.shape, generator=random) / math.sqrt(lora_a.shape[1]))
        lora_bt.copy_(0.02 * torch.randn(lora_bt.shape, generator=random))


# --- measuring ---


def interleave(
    steps: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1, cuda: bool = False
) -> dict[str, list[float]]:
    """Milliseconds of each step in each round. Each round starts with the next step in the list."""
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
            steps[name]()
            if cuda:
                torch.cuda.synchronize()
            if turn >= warmup:
                times[name].append(1000 * (time.perf_counter() - began))
    return times


def allocated(step: Callable[[], object], cuda: bool = False) -> int:
    """Bytes that a step allocates at its peak, besides those that were allocated before it."""
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events: Any = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    now = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def memory_of(shape: Shape, name: str) -> dict[str, float]:
    """Memory of one of `CONTENDERS`. Call it in a new process.

    Returns:
        ``step_mb``: `allocated` of the second step: activations, gradients and work space. Adam's moments already
        exist by then, so they are not included. One MB is 2^20 bytes.
    """
    contender, batch = CONTENDERS[name](shape.build(), shape), shape.batch()
    contender.step(replace(shape, rows=4, length=8).batch())
    step = allocated(lambda: contender.step(batch), cuda=shape.device == "cuda")
    return {"step_mb": round(step / 2**20, 2)}


def in_own_processes(function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]]) -> list[Any]:
    """``function(*job)`` for each job, one after the other, each in a new process with all modules imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    results = []
    for job in jobs:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            results.append(pool.submit(function, *job).result())
    return results
