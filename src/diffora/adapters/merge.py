"""Adds a method's updates to the pretrained weights, so that a plain transformers model is left."""

from typing import Any

import torch
from torch import nn

from diffora.core.attach import forget_adapted
from diffora.core.linear import is_plain
from diffora.core.lowrank import LowRankLinear
from diffora.errors import UserError


def merge_updates(model: nn.Module) -> None:
    """Add every update to its weight and put the plain modules back, in place.

    It works for low-rank layers and for the layers of PEFT that can be merged. The sums are computed in the precision
    of the updates, float32, and rounded to that of the weights.

    Raises:
        UserError: a weight is quantised or computed from others; or the model has layers that are no update of a
            weight, such as bottlenecks, and may be partly merged by then.
    """
    own = [(name, layer) for name, layer in _all_modules(model) if isinstance(layer, LowRankLinear)]
    for name, layer in own:  # all of them before the first is merged
        _check_plain(layer.base, name)
        layer.check_mergeable(name)
    for name, layer in own:
        layer.merge()
        model.set_submodule(name, layer.base)
    forget_adapted(model)
    if any(hasattr(module, "adapter_layer_names") for module in model.modules()):
        _merge_peft(model)
    _check_merged(model)


def _all_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every place of every module. One module may stand in several places."""
    return list(model.named_modules(remove_duplicate=False))


def _check_plain(base: Any, name: str) -> None:
    if not is_plain(base.weight):
        raise UserError(
            f"{name} is quantised, and its weight cannot take up an update: serve the base model with the adapter, or "
            "merge into the weights before quantisation with model.quantise=null, which changes the outputs a little"
        )


def _merge_peft(model: nn.Module) -> None:
    """Merge the layers that PEFT put into a model."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    for name, layer in _all_modules(model):
        if isinstance(layer, BaseTunerLayer):
            base: Any = layer.get_base_layer()
            _check_plain(base, name)
            try:
                layer.merge(safe_merge=True)
            except (ValueError, NotImplementedError, AttributeError) as error:
                raise UserError(f"PEFT cannot merge {name}, a {type(layer).__name__}: {error}") from error
            model.set_submodule(name, base)
        elif isinstance(layer, ModulesToSaveWrapper):
            model.set_submodule(name, layer.modules_to_save[layer.active_adapters[0]])
        elif isinstance(layer, AuxiliaryTrainingWrapper):
            raise UserError(f"{name}, a {type(layer).__name__} of PEFT, cannot be merged")


def _check_merged(model: Any) -> None:
    """Refuse a transformers model that has other weights than a new one of its class: a checkpoint would lose them."""
    if not hasattr(model, "base_model_prefix"):
        return
    if getattr(model.config, "tie_word_embeddings", False) and (head := model.get_output_embeddings()) is not None:
        # An update of the output embeddings is none of the input embeddings.
        model.config.tie_word_embeddings = head.weight is model.get_input_embeddings().weight
    with torch.device("meta"):
        plain = type(model)(model.config)
    if extra := sorted(model.state_dict().keys() - plain.state_dict().keys()):
        raise UserError(
            f"this method adds modules to the model, such as {extra[0].rpartition('.')[0]}, that are no update of a "
            "weight and cannot be merged: use the adapter with diffora.load_adapter"
        )
