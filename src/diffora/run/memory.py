"""How much memory a training step takes, found by taking one without memory.

The model runs forward and backward on fake tensors, which have shapes and no content, while a counter follows what
is alive. So the estimate has the true architecture in it, gradient checkpointing, mixed precision, the logits and the
attention of the kernels that a CPU would use (which, like those of GPUs, do not keep the attention matrix). What
it does not know: kernels' work space, fragmentation, and what the libraries themselves occupy.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffora.backbones.precision import AUTOCAST
from diffora.core.dam import relax
from diffora.core.hypergradient import first_order, simultaneous, unrolled
from diffora.core.linear import is_linear
from diffora.core.lowrank import LowRankLinear, set_gates
from diffora.core.split import divided, shared_tables
from diffora.kernels.peers import rehearse
from diffora.settings.sections import Settings
from diffora.tasks.base import Batch, Task

QUANTISED = {"8bit": 1.0, "4bit": 0.516}
"""Bytes of a quantised weight, in 4 bits with its share of the constants: a byte for 64, a float32 for 256 of these."""


@dataclass(frozen=True)
class Estimate:
    """Bytes that one process needs at the peak of a training step.

    Attributes:
        weights: of the whole model, with adapters.
        optimiser: AdamW's two moments of what is trained.
        activations: with gradients, logits and all else that a step makes.
        shape: of the batch, rows first.
    """

    weights: int
    optimiser: int
    activations: int
    shape: tuple[int, ...]

    @property
    def total(self) -> int:
        return self.weights + self.optimiser + self.activations


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operations make, from their making to their end.

    Args:
        known: tensors that were there before and do not count.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = list(known)
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in self._known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._sizes:
                    self._sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._ended, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def _ended(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def without_memory(model: nn.Module) -> FakeTensorMode:
    """Turn a model on the meta device into one of fake tensors on the CPU, in place; shared parameters stay shared."""
    mode = FakeTensorMode()
    made: dict[Tensor, Tensor] = {}
    with mode:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and tensor not in made:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                        given = isinstance(tensor, nn.Parameter)
                        made[tensor] = nn.Parameter(fake, tensor.requires_grad) if given else fake
                    tensors[name] = None if tensor is None else made[tensor]  # type: ignore[assignment]
    return mode


def of_finetuning(cfg: Settings, task: Task, model: nn.Module) -> Estimate:
    """Of a fine-tuning step of an adapted model on the meta device, which is used up."""
    rows = _rows(cfg, cfg.finetune)

    def step(batch: Batch) -> None:
        task.loss(model(**task.inputs(batch)), batch).backward()

    return _measure(cfg, task, model, rows, step)


def of_search(cfg: Settings, task: Task, model: nn.Module, layers: Sequence[Sequence[LowRankLinear]]) -> Estimate:
    """Of a step of the bi-level search.

    Args:
        model: on the meta device, with a low-rank layer at each place of the grid; it is used up.
        layers: those layers, L x N.
    """
    together = cfg.search.update == "simultaneous"
    rows = _rows(cfg, cfg.search)

    def loss_at(batch: Batch, gamma: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
        set_gates(layers, relax(gamma))
        inputs = task.inputs(batch)
        if weights is None:
            return task.loss(model(**inputs), batch)
        return task.loss(torch.func.functional_call(model, weights, kwargs=inputs, tie_weights=True), batch)

    def alternating(batch: Batch, gamma: Tensor, trained: dict[str, Tensor]) -> None:
        if cfg.search.order == 1:
            with divided(layers, (), 0, rows):
                first_order(loss_at(batch, gamma), gamma)
        else:
            at = lambda values: loss_at(batch, gamma, dict(zip(trained, values, strict=True)))  # noqa: E731
            with sdpa_kernel(SDPBackend.MATH):
                unrolled(at, at, list(trained.values()), gamma, cfg.search.lr)
        torch.autograd.grad(loss_at(batch, gamma.detach()), list(trained.values()), allow_unused=True)

    def simultaneously(batch: Batch, gamma: Tensor, trained: dict[str, Tensor]) -> None:
        set_gates(layers, relax(gamma))
        with divided(layers, shared_tables(model), rows, 2 * rows):
            output = model(**task.inputs(batch))
            train, valid = (
                task.loss(SimpleNamespace(**_cut(output, part)), _cut(batch, part))
                for part in (slice(rows), slice(rows, None))
            )
            pairs = [p for name, p in trained.items() if name.endswith((".lora_a", ".lora_bt"))]
            head = [p for name, p in trained.items() if not name.endswith((".lora_a", ".lora_bt"))]
            simultaneous(train, valid, pairs, head, gamma)

    def step(batch: Batch) -> None:
        trained: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gamma = torch.zeros(len(layers), len(layers[0]), requires_grad=True)
        (simultaneously if together else alternating)(batch, gamma, trained)

    return _measure(cfg, task, model, 2 * rows if together else rows, step)


def _cut(values: Mapping[str, Any], rows: slice) -> dict[str, Tensor]:
    """Some rows of the tensors in a batch or a model's output."""
    return {name: value[rows] for name, value in values.items() if isinstance(value, Tensor)}


def _measure(cfg: Settings, task: Task, model: nn.Module, rows: int, step: Callable[[Batch], None]) -> Estimate:
    quantise = cfg.model.quantise
    weights, largest = _weight_bytes(model, quantise)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    dtype = AUTOCAST.get(cfg.trainer.precision)
    config: Any = model.config
    if getattr(config, "pad_token_id", 0) is None:
        config.pad_token_id = 0  # its tokenizer's, whichever that is
    model.train()
    with without_memory(model):
        batch = task.dummy(rows, model)
        rehearse(model, **task.inputs(batch))  # as a stage does
        known = [*model.parameters(), *model.buffers(), *batch.values()]
        with LiveBytes(known) as live, torch.autocast("cpu", dtype, enabled=dtype is not None):
            step(batch)
    shape = tuple(next(iter(task.inputs(batch).values())).shape)
    return Estimate(weights, 2 * trained, live.peak + largest, shape)


def _weight_bytes(model: nn.Module, quantise: str | None) -> tuple[int, int]:
    """(bytes of parameters and buffers, the largest weight that is expanded while it is used)."""
    tensors = {tensor: tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()]}
    if quantise is None:
        return sum(tensors.values()), 0
    output = model.get_output_embeddings()  # type: ignore[operator]
    layers: list[Any] = [m for m in model.modules() if is_linear(m) and m is not output]
    frozen = [layer.weight for layer in layers if not layer.weight.requires_grad]
    largest = max(tensors[weight] for weight in frozen)
    tensors |= {weight: int(weight.numel() * QUANTISED[quantise]) for weight in frozen}
    return sum(tensors.values()), largest


def _rows(cfg: Settings, stage: Any) -> int:
    """Rows that one process has in its memory at a time."""
    devices = cfg.trainer.devices if isinstance(cfg.trainer.devices, int) else 1
    return max(1, -(-stage.batch_size // (stage.accumulate * devices)))
