"""Measures of low-rank updates, for the history of a run."""

from collections import defaultdict

from diffora.core.orthogonality import (
    median_sigma,
    numerical_rank,
    orthogonality_loss,
    singular_values,
    stable_rank,
)
from diffora.methods.base import Adaptation


def measures(adaptation: Adaptation) -> dict[str, float]:
    """Means over modules of measures of the update dW ([R] Table 5).

    These are the numerical rank, ||dW dW^T - I||_F^2, and two that do not depend on the scale of dW: stable rank and
    median of sigma_i / sigma_1.

    Returns:
        Empty if the method has no low-rank updates.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for _, lora_a, lora_bt, scaling in adaptation.pairs():
        values = singular_values(lora_a, lora_bt, scaling)
        found["update/rank"].append(numerical_rank(values, lora_bt.shape[1], lora_a.shape[1]))
        found["update/orthogonality_loss"].append(orthogonality_loss(values, lora_bt.shape[1]))
        found["update/stable_rank"].append(stable_rank(values))
        found["update/median_sigma"].append(median_sigma(values))
    return {name: sum(each) / len(each) for name, each in found.items()}
