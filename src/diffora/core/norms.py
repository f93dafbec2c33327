"""The statistics of batch and instance norms, which training mode replaces, also where the norm is frozen."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

FOUND_MEAN = "_diffora_found_mean"
"""An attribute of batch and instance norms: their mean when the model got its adapters. A copy has it too."""


def keep_statistics(model: nn.Module) -> None:
    """Put the batch norms that are not trained into evaluation mode, in place. Call it after ``model.train()``.

    In training mode they would replace the statistics of the pretrained model by those of the batches. Adapters do not
    store these statistics, so a loaded adapter would run with different ones.
    """
    for module in model.modules():
        if isinstance(module, _NormBase) and module.running_mean is not None and not _is_trained(module):
            module.eval()


def moved_statistics(model: nn.Module) -> list[str]:
    """Full names of the batch and instance norms whose statistics are not known to be those before the adapters.

    Training mode replaces them, also of frozen norms. `keep_statistics` prevents it.
    """
    norms = ((n, m) for n, m in model.named_modules() if isinstance(m, _NormBase) and m.running_mean is not None)
    return [name for name, norm in norms if not _has_found_mean(norm)]


def _has_found_mean(norm: nn.Module) -> bool:
    mean: Any = norm.running_mean
    found: Tensor | None = getattr(norm, FOUND_MEAN, None)
    return found is not None and torch.equal(mean.detach().cpu(), found.to(mean.dtype))


def moving_statistics(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of the batch norms that are trained, by full name."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and _is_trained(module):
            found |= {f"{name}.{key}": value for key, value in module.named_buffers(recurse=False)}
    return found


def _is_trained(norm: nn.Module) -> bool:
    """Whether a batch norm has weights and all of them are trained. Without weights, nothing says that it is."""
    weights = list(norm.parameters(recurse=False))
    return bool(weights) and all(p.requires_grad for p in weights)
