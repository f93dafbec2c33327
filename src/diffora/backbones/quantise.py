"""Quantisation of a backbone while it is loaded (``model.quantise``), by bitsandbytes."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from diffora.backbones.meta import meta_backbone
from diffora.backbones.request import ModelRequest
from diffora.core.stacks import find_stacks
from diffora.settings.sections import Model


def quantisation(settings: Model, request: ModelRequest) -> Any:
    """The transformers configuration that quantises all linear modules of the repeated layers, and no others."""
    from transformers import BitsAndBytesConfig

    skipped = _outside_layers(settings, request)
    if settings.quantise == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16 if settings.dtype == "float16" else torch.bfloat16,
        llm_int8_skip_modules=skipped,
    )


def _outside_layers(settings: Model, request: ModelRequest) -> list[str]:
    """Full names of the linear modules outside the repeated layers: heads, output embeddings, poolers."""
    model = meta_backbone(settings, request).model
    layers = tuple(f"{place}." for stack in find_stacks(model) for place in stack.layers)
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith(layers)]


def quantise_problems(settings: Model) -> Iterator[str]:
    """One message if ``model.quantise`` needs a package that is not installed."""
    quantise = settings.quantise
    if quantise and importlib.util.find_spec("bitsandbytes") is None:
        yield f"model.quantise={quantise} needs bitsandbytes: pip install 'diffora[quantised]'"


def follow_autocast(model: nn.Module) -> None:
    """Let quantised layers compute in the dtype of autocast, as `nn.Linear` does.

    bitsandbytes returns the dtype of the input. On a GPU that is float32 after a LayerNorm, while other products of the
    layer are in bfloat16: DeBERTa then fills its mask with a number that bfloat16 does not have, and stops.
    """
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes."):
            module.register_forward_pre_hook(_in_dtype_of_autocast)


def _in_dtype_of_autocast(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    x, *others = inputs
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return x, *others


def keep_weights_unpacked(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on a CPU in the first evaluation: no gradient passes them then."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
