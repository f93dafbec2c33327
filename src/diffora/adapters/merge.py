"""Adds a method's updates to the pretrained weights, so that a plain transformers model is left."""

from typing import Any

import torch
from torch import Tensor, nn

from diffora.adapters.origin import without_wrappers
from diffora.core.attach import forget_adapted
from diffora.core.linear import is_plain
from diffora.core.lowrank import LowRankLinear
from diffora.core.model import check_values_present
from diffora.errors import UserError


def merge_updates(model: nn.Module) -> None:
    """Add every update to its weight and put the plain modules back, in place.

    It works for low-rank layers and for the layers of PEFT that can be merged. The sums are computed in the precision
    of the updates, float32, and rounded to that of the weights.

    Raises:
        UserError: there is nothing to merge; a weight is quantised, computed from others, or not on its device; or the
            model has layers that are no update of a weight, such as bottlenecks, and may be partly merged by then.
    """
    if not merge_all(model):
        raise UserError(f"this {type(model).__name__} has no low-rank layers: there is nothing to merge")


def merge_all(model: nn.Module) -> bool:
    """`merge_updates`, also of a model that has no updates. Returns whether it had any."""
    if hasattr(model, "peft_config") and hasattr(model, "merge_and_unload"):
        raise UserError("this is a PeftModel: its own merge_and_unload() merges it and returns the plain model")
    model = without_wrappers(model)
    own = [(name, layer) for name, layer in _all_modules(model) if isinstance(layer, LowRankLinear)]
    for name, layer in own:  # all of them before the first is merged
        check_values_present(model, [name])
        _check_plain(layer.base, name)
        layer.check_mergeable(name)
    for name, layer in own:
        layer.merge()
        model.set_submodule(name, layer.base)
    forget_adapted(model)
    of_peft = any(hasattr(module, "adapter_layer_names") for module in model.modules())
    if of_peft:
        _merge_peft(model)
    _check_merged(model)
    return bool(own) or of_peft


def _all_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every place of every module. One module may stand in several places."""
    return list(model.named_modules(remove_duplicate=False))


def _check_plain(base: Any, name: str) -> None:
    if not isinstance(weight := getattr(base, "weight", None), Tensor):
        raise UserError(f"{name}, a {type(base).__name__}, has no weight that could take up an update")
    if not is_plain(weight):
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
            check_values_present(model, [name])
            _check_plain(base, name)
            if "weight" in base._parameters:  # PEFT changes it in place, and other modules may share it
                base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
            try:
                layer.merge(safe_merge=True)
            except (ValueError, NotImplementedError, AttributeError) as error:
                raise UserError(f"PEFT cannot merge {name}, a {type(layer).__name__}: {error}") from error
            model.set_submodule(name, layer.get_base_layer())  # another one than before, for tuned norms
        elif isinstance(layer, ModulesToSaveWrapper):
            model.set_submodule(name, layer.modules_to_save[layer.active_adapters[0]])
        elif isinstance(layer, AuxiliaryTrainingWrapper):
            raise UserError(f"{name}, a {type(layer).__name__} of PEFT, cannot be merged")


def _untie(model: nn.Module) -> None:
    """Give each module its own copy of parameters that several modules share: a checkpoint holds one of them only."""
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter in seen:
                module._parameters[key] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            elif parameter is not None:
                seen.add(parameter)


def _check_merged(model: Any) -> None:
    """Refuse a transformers model that has other weights than a new one of its class: a checkpoint would lose them."""
    if not hasattr(model, "base_model_prefix"):
        return
    if getattr(model.config, "tie_word_embeddings", False) and (head := model.get_output_embeddings()) is not None:
        # An update of the output embeddings is none of the input embeddings.
        model.config.tie_word_embeddings = head.weight is model.get_input_embeddings().weight
        if not model.config.tie_word_embeddings:
            _untie(model)
    try:
        with torch.device("meta"):
            plain = type(model)(model.config)
    except TypeError:  # a class of the user's own, which needs more
        return
    if extra := sorted(model.state_dict().keys() - plain.state_dict().keys()):
        raise UserError(
            f"this method adds modules to the model, such as {extra[0].rpartition('.')[0]}, that are no update of a "
            "weight and cannot be merged: use the adapter with diffora.load_adapter"
        )
