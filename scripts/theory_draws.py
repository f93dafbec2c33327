"""What the experiments of `theory_gates` and `theory_adapters` share: seeds and random matrices."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

Result = dict[str, Any]


def seeded(*seed: int) -> torch.Generator:
    """A random generator for one purpose: the first number is the seed, the other numbers are the purpose."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)
