"""Loads an adapter as plain PEFT does, with checks that PEFT does not make."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffora.adapters.manifest import CONFIG, WEIGHTS
from diffora.adapters.origin import check_heads
from diffora.adapters.pairs import read_tensors
from diffora.backbones.backbone import Backbone
from diffora.core.model import check_values_present
from diffora.errors import UserError, first_of
from diffora.trust import check_peft_adapter


def unfreeze(model: nn.Module, before: Mapping[nn.Parameter, bool]) -> None:
    """Give parameters their ``requires_grad`` of before back, in place; PEFT's copy of a head gets that of the head."""
    from peft.utils import ModulesToSaveWrapper

    for parameter, flag in before.items():
        parameter.requires_grad_(flag)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for copy in module.modules_to_save.values():
                for own, of_copy in zip(module.original_module.parameters(), copy.parameters(), strict=True):
                    of_copy.requires_grad_(own.requires_grad)
            module.original_module.requires_grad_(False)


def _check_shapes(model: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse whole modules of another size than the model's, such as the head of a model with other classes.

    Raises:
        UserError: names the first one.
    """
    present = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for key, tensor in tensors.items():
        name, saved = key.removeprefix("base_model.model."), tuple(tensor.shape)
        if present.get(name, saved) != saved:
            raise UserError(
                f"{folder} does not fit this model: {name} is {saved} there and {present[name]} here. The first number "
                "of a head is its number of classes"
            )


def load_with_peft(backbone: Backbone, folder: Path) -> None:
    """Let PEFT put its own layers into a model, in place, for inference.

    Raises:
        UserError: PEFT cannot load the adapter, weights are missing or left over, or the adapter lacks the head.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    check_peft_adapter(folder)
    if not hasattr(backbone.model, "hf_device_map"):  # with one, PEFT moves its layers as accelerate does
        check_values_present(backbone.model)
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
        if config.is_prompt_learning:
            raise UserError(f"{folder} is a prompt ({config.peft_type.value}), which is not part of the model")
        if not 0 < getattr(config, "lora_alpha", 1) < math.inf:
            raise UserError(f"{folder / CONFIG}: lora_alpha={config.lora_alpha} must be above 0")
        check_heads(backbone, config.modules_to_save or [], folder)
        tensors = read_tensors(folder / WEIGHTS) if (folder / WEIGHTS).is_file() else None
        _check_shapes(backbone.model, tensors or {}, folder)
        modules = dict(backbone.model.named_modules())
        peft: Any = PeftModel.from_pretrained(backbone.model, str(folder))
        names = get_peft_model_state_dict(peft, save_embedding_layers=False).keys()
    except UserError:
        raise
    except Exception as error:  # PEFT raises errors of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise UserError(f"{folder} does not fit this model: {reason}") from error
    if tensors is None:  # PEFT's older format
        return
    # With bias=all, PEFT names the head's biases a second time, inside its wrapper of the head.
    expected = {name for name in names if ".modules_to_save." not in name and ".original_module." not in name}
    if absent := sorted(expected - tensors.keys()):
        raise UserError(f"{folder / WEIGHTS} does not fit this model: no {first_of(absent)}")
    places = {key: key.removeprefix("base_model.model.").partition(".lora_")[0] for key in tensors if ".lora_" in key}
    strange = [key for key, place in places.items() if place not in modules]
    strange += [key for key in tensors if (".lora_A." in key or ".lora_B." in key) and key not in names]
    if strange:
        raise UserError(f"{folder / WEIGHTS} does not fit this model: no place for {first_of(strange)}")
