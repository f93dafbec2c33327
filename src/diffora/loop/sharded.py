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

FSDP = "fsdp"
"""The value of ``trainer.strategy``."""


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
        environment, n = self.cluster_environment, self.num_nodes * self.num_processes
        assert environment is not None
        # torchrun may have started fewer processes than there are devices (trainer.devices=auto).
        self._data_parallel_size = environment.world_size() if environment.creates_processes_externally else n
        super().setup_environment()

    def model_to_device(self) -> None:
        """Move the model, and give all processes the values of the first one, as DDP does.

        They may differ by rounding where a method computes its first A and B from weights or data (PiSSA, EVA).
        """
        super().model_to_device()
        assert self.model is not None
        share_first(whole_tensors(self.model))

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
        for name in filter(None, self.layers):  # model.layer='.' names the model itself
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


def whole_tensors(model: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a model that are not divided."""
    from torch.distributed.tensor import DTensor

    return [tensor for tensor in (*model.parameters(), *model.buffers()) if not isinstance(tensor, DTensor)]


@torch.no_grad()
def share_first(tensors: Sequence[Tensor]) -> None:
    """Give all processes the values that the first one has."""
    for tensor in tensors:
        values = tensor.detach().contiguous()
        torch.distributed.broadcast(values, 0)
        tensor.detach().copy_(values)


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes. None counts as 0, and stays if all of them have None."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    present = [float(p.grad is not None) for p in parameters]
    flat = torch.cat([*(grad.flatten() for grad in grads), grads[0].new_tensor(present)])
    torch.distributed.all_reduce(flat)
    *means, counts = flat.split([*(grad.numel() for grad in grads), len(present)])
    unused = [False] * len(present) if all(present) else (counts == 0).tolist()
    world = torch.distributed.get_world_size()
    for parameter, mean, none in zip(parameters, means, unused, strict=True):
        parameter.grad = None if none else (mean / world).view_as(parameter)
