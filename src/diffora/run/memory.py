"""Estimates the memory of a training step by running one on fake tensors, which have shapes but no content.

A counter follows which tensors are alive in the forward and the backward pass. The estimate therefore includes the real
architecture, gradient checkpointing, mixed precision, the logits, and the attention kernels that a CPU would use. Those
do not save the attention matrix, like the ones of GPUs. The estimate does not include the work space of kernels,
fragmentation, and the memory of the libraries themselves.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from diffora.core.lowrank import Layers, set_gates, set_kernel
from diffora.core.split import divided, shared_tables
from diffora.loop.sharded import FSDP
from diffora.settings.sections import Settings
from diffora.tasks.base import Batch, Task

QUANTISED = {"8bit": 1.0, "4bit": 0.516}
"""Bytes per quantised weight. 4bit includes the constants: one byte per 64 weights, and a float32 per 256 of these."""


@dataclass(frozen=True)
class Estimate:
    """Bytes that one process needs at the peak of a training step.

    Attributes:
        weights: of the whole model, with adapters. With ``trainer.strategy=fsdp``, the process's part of the frozen
            matrices, what it collects of them, and all other weights.
        optimiser: AdamW's two moments of the trained parameters.
        activations: everything that a step allocates, gradients and logits included.
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
    """Counts the bytes of the storages that operations allocate, until they are freed.

    Args:
        known: tensors that exist already and do not count.

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
    """Replace the tensors of a model on the meta device by fake ones on the CPU, in place. Ties are kept."""
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


def kernel_of_finetuning(settings: Settings) -> str:
    """``model.kernel``, or what ``auto`` means where the run will be: fake tensors do not say."""
    accelerator = settings.trainer.accelerator
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    return "plain" if settings.model.kernel == "auto" and on_gpu else settings.model.kernel


def of_finetuning(settings: Settings, task: Task, model: nn.Module, places: Sequence[str] = ()) -> Estimate:
    """The estimate for a fine-tuning step.

    Args:
        model: adapted, on the meta device. It cannot be used again.
        places: full names of its layers, for ``trainer.strategy=fsdp``.
    """
    rows = rows_at_a_time(settings, settings.finetune)
    set_kernel(model, kernel_of_finetuning(settings))

    def step(batch: Batch) -> None:
        task.loss(model(**task.inputs(batch)), batch).backward()

    return _measure(settings, task, model, rows, step, places)


def of_search(settings: Settings, task: Task, model: nn.Module, layers: Layers, places: Sequence[str] = ()) -> Estimate:
    """The estimate for a step of the bi-level search.

    Args:
        model: on the meta device, with a low-rank layer at each place of the grid. It cannot be used again.
        layers: these layers, L x N; None where a layer of the model has no such module.
        places: full names of the model's layers, for ``trainer.strategy=fsdp``.
    """
    together = settings.search.update == "simultaneous"
    rows = rows_at_a_time(settings, settings.search)
    if settings.search.order == 2:  # the unrolled step takes the whole batch
        rows = rows_at_a_time(settings, replace(settings.search, accumulate=1))

    def loss_at(batch: Batch, gamma: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
        set_gates(layers, relax(gamma))
        inputs = task.inputs(batch)
        if weights is None:
            return task.loss(model(**inputs), batch)
        return task.loss(torch.func.functional_call(model, weights, kwargs=inputs, tie_weights=True), batch)

    def alternating(batch: Batch, gamma: Tensor, trained: dict[str, Tensor]) -> None:
        if settings.search.order == 1:
            with divided(layers, (), 0, rows):
                first_order(loss_at(batch, gamma), gamma)
        else:
            at = lambda values: loss_at(batch, gamma, dict(zip(trained, values, strict=True)))  # noqa: E731
            with sdpa_kernel(SDPBackend.MATH):
                unrolled(at, at, list(trained.values()), gamma, settings.search.lr)
        torch.autograd.grad(loss_at(batch, gamma.detach()), list(trained.values()), allow_unused=True)

    def joint_losses(batch: Batch) -> list[Tensor]:
        output = model(**task.inputs(batch))  # freed on return, as in the search: not alive in the backward pass
        return [
            task.loss(SimpleNamespace(**_part(output, rows_of)), _part(batch, rows_of))
            for rows_of in (slice(rows), slice(rows, None))
        ]

    def simultaneously(batch: Batch, gamma: Tensor, trained: dict[str, Tensor]) -> None:
        set_gates(layers, relax(gamma))
        n = rows * task.sequences(batch)
        with divided(layers, shared_tables(model), n, 2 * n):
            train, valid = joint_losses(batch)
            pairs = [p for name, p in trained.items() if name.endswith((".lora_a", ".lora_bt"))]
            head = [p for name, p in trained.items() if not name.endswith((".lora_a", ".lora_bt"))]
            simultaneous(train, valid, pairs, head, gamma)

    def step(batch: Batch) -> None:
        trained: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gamma = torch.zeros(len(layers), len(layers[0]), requires_grad=True)  # shapes matter, not values
        (simultaneously if together else alternating)(batch, gamma, trained)

    return _measure(settings, task, model, 2 * rows if together else rows, step, places)


def _part(values: Mapping[str, Any], rows: slice) -> dict[str, Tensor]:
    """Some rows of the tensors of a batch or of a model's output."""
    return {name: value[rows] for name, value in values.items() if isinstance(value, Tensor)}


def _measure(
    settings: Settings,
    task: Task,
    model: nn.Module,
    rows: int,
    step: Callable[[Batch], None],
    places: Sequence[str],
) -> Estimate:
    quantise = settings.model.quantise
    weights, largest = _weight_bytes(model, quantise)
    if settings.trainer.strategy == FSDP:
        weights = divided_bytes(model, places, processes(settings))
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    dtype = AUTOCAST.get(settings.trainer.precision)
    config: Any = model.config
    if getattr(config, "pad_token_id", 0) is None:
        config.pad_token_id = 0  # any token will do: values do not matter here
    model.train()
    with without_memory(model):
        batch = task.dummy(rows, model)
        known = [*model.parameters(), *model.buffers(), *batch.values()]
        with LiveBytes(known) as live, torch.autocast("cpu", dtype, enabled=dtype is not None):
            step(batch)
    shape = tuple(next(iter(task.inputs(batch).values())).shape)
    return Estimate(weights, 2 * trained, live.peak + largest, shape)


def _weight_bytes(model: nn.Module, quantise: str | None) -> tuple[int, int]:
    """(bytes of parameters and buffers, bytes of the largest weight, if weights are dequantised while in use)."""
    tensors = {tensor: tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()]}
    if quantise is None:
        return sum(tensors.values()), 0
    output = model.get_output_embeddings()  # type: ignore[operator]
    layers: list[Any] = [m for m in model.modules() if is_linear(m) and m is not output]
    frozen = [layer.weight for layer in layers if not layer.weight.requires_grad]
    largest = max(tensors[weight] for weight in frozen)
    tensors |= {weight: int(weight.numel() * QUANTISED[quantise]) for weight in frozen}
    return sum(tensors.values()), largest


def divided_bytes(model: nn.Module, places: Sequence[str], n: int) -> int:
    """Bytes of weights that one of ``n`` processes holds at a time with ``trainer.strategy=fsdp``.

    It holds its part of the frozen matrices; those of two layers, because the next layer is collected early; the frozen
    matrices outside the layers, such as embeddings; and everything else.

    Args:
        places: full names of the layers.
    """
    sizes = {tensor: tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()]}
    matrices = {p for p in model.parameters() if p.ndim > 1 and not p.requires_grad}
    whole = sum(sizes[p] for p in matrices)
    of_layers = [
        sum(sizes[p] for p in matrices.intersection(model.get_submodule(place).parameters())) for place in places
    ]
    collected = whole - sum(of_layers) + sum(sorted(of_layers)[-2:])
    return sum(sizes.values()) - whole + min(whole, -(-whole // n) + collected)


def processes(settings: Settings) -> int:
    """The number of processes; with ``trainer.devices=auto`` one for each machine, because it is not known here."""
    devices = settings.trainer.devices if isinstance(settings.trainer.devices, int) else 1
    return devices * settings.trainer.num_nodes


def rows_at_a_time(settings: Settings, stage: Any) -> int:
    """Rows of a micro-batch: those that one process holds in memory at a time."""
    return int(max(1, -(-stage.batch_size // (stage.accumulate * processes(settings)))))
