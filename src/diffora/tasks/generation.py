"""Text that a model generates in an evaluation, for tasks that score it."""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")
"""What generation takes from the checkpoint's own settings, besides its end tokens."""


@torch.no_grad()
def generate(
    model: Any,
    inputs: Mapping[str, Tensor],
    most: int,
    pad: int,
    ends: Sequence[int | None] = (),
    num_beams: int = 1,
    use_cache: bool = True,
) -> Tensor:
    """Token ids that a model generates by greedy or beam search, [n, most], without the prompt or the start token.

    Args:
        inputs: input_ids and attention_mask, [n, length]. The prompts of a decoder are padded on the left.
        most: the most tokens to generate. Shorter texts are padded.
        pad: the padding token.
        ends: tokens that end a text, besides the checkpoint's own end tokens.
        use_cache: whether to keep keys and values; without them, each token costs a pass over all tokens before it.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    own_ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    # The checkpoint's other settings (least lengths, penalties) suit the data that it was made for, not these.
    config = GenerationConfig(
        **{name: getattr(own, name, None) for name in TOKENS},
        eos_token_id=sorted({token for token in (*own_ends, *ends) if token is not None}) or None,
        pad_token_id=pad,
        # Marian's padding token would be the likeliest one.
        suppress_tokens=[pad] if model.config.is_encoder_decoder and pad not in own_ends else None,
        max_new_tokens=most,
        num_beams=num_beams,
        do_sample=False,
        use_cache=use_cache,
    )
    try:
        model.generation_config = config  # as an argument of `generate`, it would be filled from the other one
        # A compiled model (``trainer.compile``) would be compiled again and again while the cache grows.
        with torch.compiler.set_stance("force_eager"):
            found = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    finally:
        model.generation_config = own
    start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    text: Tensor = found[:, start : start + most]
    return F.pad(text, (0, most - text.shape[1]), value=pad)


def before_end(text: Sequence[int], ends: Sequence[int | None]) -> list[int]:
    """The tokens of a generated text before the first of its end tokens, which need not be special ones."""
    return list(takewhile(lambda token: token not in ends, text))


def with_others(model: Any, chosen: Tensor) -> Tensor:
    """The rows of a batch to generate for: those that are chosen, or the first one if all processes have to generate.

    With ``trainer.strategy=fsdp`` all processes run the model together. One that has no chosen row in its batch must
    generate too, because the others would wait for it. What it generates is not used.

    Args:
        chosen: boolean [n].
    """
    if getattr(model, "_is_fsdp_managed_module", False) and not chosen.any():
        return torch.arange(len(chosen), device=chosen.device) == 0
    return chosen


def evenly(rows: int, most: int | None) -> np.ndarray:
    """At most ``most`` of the numbers 0 to ``rows`` - 1, evenly spaced; None for all."""
    if most is None or most >= rows:
        return np.arange(rows)
    return np.linspace(0, rows - 1, most).round().astype(int)
