"""Pfeiffer adapters: a bottleneck after the FFN of each layer only (Pfeiffer et al., 2021)."""

from dataclasses import dataclass
from typing import ClassVar

from diffora.methods.bottleneck import Bottleneck


@dataclass(frozen=True)
class Pfeiffer(Bottleneck):
    """h + W_up act(W_down h) after the FFN's output projection."""

    name: ClassVar[str] = "pfeiffer"
    roles: ClassVar[tuple[str, ...]] = ("ffn_output",)
