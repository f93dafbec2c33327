"""Houlsby adapters: a bottleneck after the attention and one after the FFN of each layer (Houlsby et al., 2019)."""

from dataclasses import dataclass
from typing import ClassVar

from diffora.methods.bottleneck import Bottleneck


@dataclass(frozen=True)
class Houlsby(Bottleneck):
    """h + W_up act(W_down h) after both output projections."""

    name: ClassVar[str] = "houlsby"
    roles: ClassVar[tuple[str, ...]] = ("attention_output", "ffn_output")
