"""The Differential Adaptation Matrix (DAM): from Γ to selected modules.

Where the equations of [D] are:

- [D] eq. 10, the gated update of each module: `diffora.core.lowrank` (`set_gates` puts the relaxed DAM there),
- [D] eq. 11, the relaxation of Γ: `relax`,
- [D] eq. 13, the bi-level problem: `diffora.core.hypergradient`; its training loop ([D] Algorithm 1, lines 1 to 8) is
  `diffora.scoring.bilevel`,
- [D] eq. 14, the discretisation ([D] Algorithm 1, line 10): `discretise`, with K from `modules_per_layer`.

Γ and every matrix made from it are L x N: one row per layer, one column per module type. If a layer lacks a module of
some type (`diffora.core.grid`), Γ is minus infinity there, the gate 0, and a score NaN. All equations are of one layer
each, so N is then the number of modules of that layer.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from fractions import Fraction

import torch
from torch import Tensor

RELAXATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda gamma: torch.softmax(gamma, dim=-1),
    "scaled_softmax": lambda gamma: torch.softmax(gamma, dim=-1) * gamma.isfinite().sum(-1, keepdim=True),
    "sigmoid": torch.sigmoid,
}
"""How Γ becomes gates, by the name that `search.relaxation` gives; see `relax`."""


def relax(gamma: Tensor, relaxation: str = "softmax") -> Tensor:
    """The relaxed DAM: one gate of at least 0 for each module.

    - ``softmax``: [D] eq. 11. The modules of a layer compete: every row sums to 1, so each gate is 1/N at Γ = 0.
    - ``scaled_softmax``: N times the softmax, not in [D]. The modules compete in the same way, and the mean gate of a
      layer is 1, which is the gate of a selected module in fine-tuning. N is the number of modules of the layer.
    - ``sigmoid``: independent gates, 1 / (1 + exp(-γ)), not in [D]. Each gate is 1/2 at Γ = 0. Nothing else is
      scaled: a gate of 1 is the update as fine-tuning applies it, and a row may sum to anything between 0 and N.

    Args:
        gamma: Γ, L x N.
        relaxation: a key of `RELAXATIONS`.

    Returns:
        L x N.

    Raises:
        ValueError: there is no such relaxation.

    >>> relax(torch.zeros(1, 4))
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    >>> relax(torch.zeros(1, 4), "scaled_softmax")
    tensor([[1., 1., 1., 1.]])
    >>> relax(torch.zeros(1, 4), "sigmoid")
    tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    if relaxation not in RELAXATIONS:
        raise ValueError(f"relaxation={relaxation!r} must be one of {', '.join(RELAXATIONS)}")
    return RELAXATIONS[relaxation](gamma)


def initial_gamma(present: Tensor) -> Tensor:
    """Γ before the search: 0 for each module, minus infinity where a layer has no module of that type.

    No step changes the latter: the gradient there is 0.

    Args:
        present: boolean L x N, which layer has a module of which type.
    """
    return torch.zeros(present.shape).masked_fill(~present.cpu(), -torch.inf)


def comparable(gamma_bar: Tensor, sizes: Sequence[int]) -> Tensor:
    """Gates of a relaxed DAM on one scale for layers with different numbers of modules; not in [D].

    With ``softmax``, the mean gate of a layer is 1/N: a module of a small layer would be above one of a large layer for
    no other reason. So each gate is multiplied by its layer's N. Rows that do not sum to 1 (``scaled_softmax``,
    ``sigmoid``, or scores of other selectors) are on one scale already, and stay as they are. So does every matrix
    with equal N.

    Args:
        gamma_bar: L x N; 0 or NaN where a layer has no such module. A layer of NaN only, below the lowest one that may
            have adapters, says nothing about the scale.
        sizes: the number of modules of each layer.
    """
    sums = gamma_bar[~gamma_bar.isnan().all(-1)].nan_to_num(0.0).sum(-1)
    if len(set(sizes)) == 1 or not torch.allclose(sums, torch.ones_like(sums), atol=1e-4):
        return gamma_bar
    return gamma_bar * torch.tensor(sizes, device=gamma_bar.device).unsqueeze(-1)


def entropy(gamma_bar: Tensor) -> Tensor:
    """Entropy of each row of a relaxed DAM in nats, shape (L,).

    It is log N at Γ = 0 and 0 where one module has the whole row. Rows must sum to 1: it is of ``softmax`` gates, also
    for ``scaled_softmax``, and has no meaning for ``sigmoid``.
    """
    return -torch.xlogy(gamma_bar, gamma_bar).sum(dim=-1)


def modules_per_layer(rho: float, n_types: int) -> int:
    """K = floor(rho * N) of [D] eq. 14, computed from the decimal as written, so that 0.29 * 100 is 29.

    For a global selection, give ``n_types`` = L N: the result is the number of modules in all.

    Raises:
        ValueError: rho is outside [0, 1].

    >>> [modules_per_layer(rho, 6) for rho in (0.2, 0.4, 0.5, 0.7, 0.9)]
    [1, 2, 3, 4, 5]
    """
    if not 0 <= rho <= 1:
        raise ValueError(f"rho={rho} must lie in [0, 1]")
    return int(Fraction(Decimal(str(rho))) * n_types)


@contextmanager
def provisional_choice() -> Iterator[None]:
    """Inside this context, choosing modules warns of nothing: ties and ranks matter in the final selection only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def discretise(gamma_bar: Tensor, k: int | Sequence[int]) -> Tensor:
    """Select the K largest entries of each row ([D] eq. 14). Also used for the scores of other selectors.

    Warns (`UserWarning`) of a tie at the threshold: a selected and an unselected module have equal scores. Of these,
    the module in the lower column is selected.

    Args:
        gamma_bar: L x N, high is good; NaN where a layer has no such module.
        k: modules per layer, 0 to N; or one number for each layer.

    Returns:
        Boolean L x N, exactly ``k`` True entries in each row.

    Raises:
        ValueError: k is not between 0 and the number of modules of a layer.

    >>> discretise(torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]]), 1)
    tensor([[False,  True, False],
            [ True, False, False]])
    """
    sizes = (~gamma_bar.isnan()).sum(-1).tolist()
    wanted = [k] * len(sizes) if isinstance(k, int) else list(k)
    for count, size in zip(wanted, sizes, strict=True):
        if not 0 <= count <= size:
            raise ValueError(f"k={count} must lie between 0 and the {size} candidates of a layer")
    known = gamma_bar.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    values, columns = known.sort(dim=-1, descending=True, stable=True)
    selected = torch.zeros_like(gamma_bar, dtype=torch.bool)
    tied = []
    for row, (count, size) in enumerate(zip(wanted, sizes, strict=True)):
        selected[row, columns[row, :count]] = True
        if 0 < count < size and values[row, count - 1] == values[row, count]:
            tied.append(row)
    if tied:
        warnings.warn(
            f"the scores do not separate the top {', '.join(map(str, sorted({wanted[row] for row in tied})))} modules "
            f"in layer(s) {', '.join(map(str, tied))}: equal scores, taken in column order",
            stacklevel=2,
        )
    return selected


def discretise_globally(scores: Tensor, m: int) -> Tensor:
    """Select the M largest entries of the whole grid; not in [D]. Ties are resolved in row-major order.

    Warns of a tie at the threshold as `discretise` does.

    Args:
        scores: L x N, high is good; NaN where a layer has no such module.
        m: modules in all, 0 to L N.

    Returns:
        Boolean L x N, exactly ``m`` True entries.

    Raises:
        ValueError: m is not between 0 and the number of modules.
    """
    n = int((~scores.isnan()).sum())
    if not 0 <= m <= n:
        raise ValueError(f"m={m} must lie between 0 and the {n} candidates of the grid")
    flat = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf).flatten()
    values, order = flat.sort(descending=True, stable=True)
    if 0 < m < n and values[m - 1] == values[m]:
        warnings.warn(
            f"the scores do not separate the top {m} modules of the grid: equal scores, taken in row-major order",
            stacklevel=2,
        )
    return torch.zeros(len(flat), dtype=torch.bool).scatter(0, order[:m].cpu(), True).view(scores.shape)
