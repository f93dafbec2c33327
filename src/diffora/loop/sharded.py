"""``trainer.strategy=fsdp``: the frozen matrices are divided among the processes (FSDP2), what is trained is not.

Each process holds a part of every frozen matrix. FSDP2 collects a layer's matrices before the layer runs and drops them
after it, in the forward and in the backward pass. What is trained (A, B, gates, the head) is less than a hundredth of
the model, so every process holds all of it, as under DDP: penalties, masks, shared pairs, optimisers, checkpoints and
exports see ordinary tensors. The gradients of the trained weights are averaged here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn

from diffora.backbones.backbone import Backbone
from diffora.errors import called
from diffora.settings.sections import Settings

FSDP = "fsdp"
"""The value of ``trainer.strategy``."""
SELECTORS = ("search", "attribution")
"""The selectors that run on a divided model."""


class Sharded(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, for models of which only a small part is trained.

    Checkpoints hold trained weights only, which are whole in every process, so one process writes one small file.

    Args:
        backbone: the model to divide; None to check settings only.
        layers: full names of its layers. FSDP2 collects the weights of one of them at a time.
    """

    def __init__(self, backbone: Backbone | None = None, layers: Sequence[str] = ()) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)
        self.backbone, self.layers = backbone, layers
        self._waits = False  # whether more micro-batches of the same step follow

    # What is trained is whole in every process, so its state is handled as it is without FSDP.
    lightning_restore_optimizer = Strategy.lightning_restore_optimizer
    lightning_module_state_dict = Strategy.lightning_module_state_dict
    optimizer_state = Strategy.optimizer_state
    load_checkpoint = Strategy.load_checkpoint
    load_model_state_dict = Strategy.load_model_state_dict
    load_optimizer_state_dict = Strategy.load_optimizer_state_dict

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def divide(self) -> None:
        """Divide the frozen matrices among the processes. A second call, in a second stage, changes nothing."""
        from torch.distributed.fsdp import FSDPModule, fully_shard  # takes a second

        assert self.backbone is not None
        model: Any = self.backbone.model
        if isinstance(model, FSDPModule):
            return
        # Biases and norms are small, and a method may keep numbers in frozen parameters (AdaLoRA's of PEFT does).
        whole = {parameter for parameter in model.parameters() if parameter.requires_grad or parameter.ndim < 2}
        for name in self.backbone.untrained:  # the export writes these, and only one process exports
            whole |= set(model.get_submodule(name).parameters())
        mesh = self.device_mesh["data_parallel"]
        for name in self.layers:
            fully_shard(model.get_submodule(name), mesh=mesh, ignored_params=whole)
        fully_shard(model, mesh=mesh, ignored_params=whole)
        model._is_fsdp_managed_module = True  # transformers: generate until all processes are done

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def post_backward(self, closure_loss: Tensor) -> None:
        if not self._waits:
            assert self.lightning_module is not None
            average_gradients([p for p in self.lightning_module.parameters() if p.requires_grad])


def problems(settings: Settings) -> Iterator[str]:
    """One message for each setting that does not go with ``trainer.strategy=fsdp``."""
    trainer, method, search = settings.trainer, settings.method, settings.search
    if trainer.strategy != FSDP:
        return
    said = "trainer.strategy=fsdp"
    if trainer.devices == 1 and trainer.num_nodes == 1:
        yield f"{said} needs several devices: trainer.devices=2 or more, or leave it out"
    if method.trains_backbone:
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
    if (generation := getattr(settings.task, "generation", None)) is not None and generation.rows:
        yield (
            f"{said} does not go with task.generation.rows={generation.rows}: a process whose rows are not among them "
            "would not wait for the others; leave it out"
        )
    if search is None or method.scoring is None:
        return
    if method.scoring.selector not in SELECTORS:
        yield (
            f"{said} does not go with method.selector={method.scoring.selector}, which reads whole weights or runs the "
            f"model a different number of times in each process: use {' or '.join(SELECTORS)}, or select on one device "
            "(search_only=true) and give method.selection=<its selection.json>"
        )
    if search.order == 2:
        yield f"{said} does not go with search.order=2, which differentiates twice: use search.order=1"


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes. None counts as 0, and stays if all of them have None."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    there = [float(p.grad is not None) for p in parameters]
    flat = torch.cat([*(grad.flatten() for grad in grads), grads[0].new_tensor(there)])
    torch.distributed.all_reduce(flat)
    *means, counts = flat.split([*(grad.numel() for grad in grads), len(there)])
    unused = [False] * len(there) if all(there) else (counts == 0).tolist()
    world = torch.distributed.get_world_size()
    for parameter, mean, none in zip(parameters, means, unused, strict=True):
        parameter.grad = None if none else (mean / world).view_as(parameter)
