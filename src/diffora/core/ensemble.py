"""Ensembles: several members score the same modules with other seeds, and their standardised scores are averaged.

Not in [D]. `diffora.scoring.stage` runs the members of a run, `diffora.standalone` those of a user's own model.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from diffora.core.dam import comparable

DRAWS = 1000
"""How many repeats of an ensemble `confidence` imagines."""
SAME_SCORES = (
    "the {n} members of the ensemble have the same scores: {selector} does not depend on seed, head or order of rows "
    "here, so that the ensemble cannot say how sure the selection is"
)
SMALLEST_GATE = 1e-12
"""Gates closer to 0 or 1 than this are moved here before a logarithm is taken."""


def member_seed(seed: int, member: int) -> int:
    """The seed of a member; that of the first one (member 0) is ``seed`` itself.

    Ensembles of neighbouring seeds have no member in common, as they would if the seeds of members were counted up.

    >>> [member_seed(7, member) for member in range(3)]
    [7, 3618983171, 3831650445]
    """
    return int(np.random.SeedSequence(seed, spawn_key=(member,)).generate_state(1)[0]) if member else seed


def log_gates(gamma_bar: Tensor, relaxation: str, sizes: Sequence[int]) -> Tensor:
    """Gates on the scale of Γ, on which the search moves them: log odds for ``sigmoid``, otherwise logarithms.

    With ``softmax`` this is Γ, up to a constant for each layer. Γ is averaged, and not the gates, for two reasons. A
    gate says little about the modules below the best one, whose gates are all close to 0; and a gate near 1 hardly
    moves any more, so that a mean of gates would depend on how long the members searched.

    Args:
        gamma_bar: L x N.
        relaxation: a key of `diffora.core.dam.RELAXATIONS`.
        sizes: the number of modules of each layer.
    """
    gates = gamma_bar.double().clamp(min=SMALLEST_GATE)
    if relaxation == "sigmoid":
        gates = gates.clamp(max=1 - SMALLEST_GATE)
        return gates.log() - (1 - gates).log()
    return comparable(gates, sizes).log()


def standardised(scores: Tensor, present: Tensor, scope: str) -> Tensor:
    """Scores minus their mean, divided by their standard deviation, so that members weigh the same.

    Mean and deviation are those of the modules that compete: of a layer (scope ``layer``) or of the whole grid
    (``global``). Equal scores become 0.

    Args:
        scores: L x N.
        present: boolean, L x N, which layer has a module of which type.
        scope: ``layer`` or ``global``.

    Returns:
        L x N in float64, 0 where a layer has no such module.
    """
    shape = scores.shape if scope == "layer" else (1, -1)
    values, known = scores.double().reshape(shape), present.reshape(shape)
    values = values.masked_fill(~known, 0.0)
    n = known.sum(-1, keepdim=True).clamp(min=1)
    centred = (values - values.sum(-1, keepdim=True) / n).masked_fill(~known, 0.0)
    deviation = (centred.square().sum(-1, keepdim=True) / n).sqrt()
    # rounding makes the mean of equal scores differ from them a little
    flat = deviation <= 1e-12 * values.abs().amax(-1, keepdim=True)
    return torch.where(flat, 0.0, centred / deviation.masked_fill(flat, 1.0)).view(scores.shape)


def confidence(members: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor | None:
    """For each module the probability that a repeat of the ensemble, with other seeds, would select it.

    Each of `DRAWS` imagined repeats has the mean scores of this ensemble plus noise, and ``choose`` selects by it. The
    noise is drawn from the members' deviations d_i from their mean: sqrt(2 / (n (n - 1))) Σ g_i d_i, with independent
    g_i ~ N(0, 1). The 2 is there because both this ensemble and its repeat are off the true mean. Dividing by
    sqrt(χ² / (n - 1)) allows for a spread that is estimated from n members only. Of two modules, the better one is so
    selected with the probability that Student's t gives: F_{n-1}(difference / (sd of the differences · sqrt(2 / n))).

    Args:
        members: n x L x N, the standardised scores of the n members.
        choose: from scores to the selection, boolean, both L x N.

    Returns:
        L x N in float64; None if there are fewer than two members or if all are the same, which says nothing.
    """
    n = len(members)
    if n < 2 or bool((members == members[0]).all()):
        return None
    mean = members.mean(0)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(DRAWS, n, generator=generator, dtype=torch.float64)
    spread = torch.randn(DRAWS, n - 1, generator=generator, dtype=torch.float64).square().mean(-1).sqrt()
    weights *= math.sqrt(2 / (n * (n - 1))) / spread.unsqueeze(-1)
    repeats = mean + torch.einsum("dn,nlt->dlt", weights, members - mean)
    # Modules with equal scores in every member are a coin toss, and not a sure choice of the first one.
    repeats += 1e-9 * torch.randn(repeats.shape, generator=generator, dtype=torch.float64)
    return torch.stack([choose(scores) for scores in repeats]).double().mean(0)
