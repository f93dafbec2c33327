"""The Differential Adaptation Matrix: relaxation (eq. 11), discretisation (eq. 14) and what a selection costs."""

import warnings
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction

import torch
from torch import Tensor


def relax(gamma: Tensor) -> Tensor:
    """Eq. 11: softmax over each layer's row. ``gamma`` and the result are L x N; every row sums to 1."""
    return torch.softmax(gamma, dim=-1)


def entropy(gamma_bar: Tensor) -> Tensor:
    """Entropy of each row in nats, shape (L,): log N where the search has told nothing, 0 where it is certain."""
    return -torch.xlogy(gamma_bar, gamma_bar).sum(dim=-1)


def modules_per_layer(rho: float, n_types: int) -> int:
    """K = floor(rho * N), computed exactly from the decimal that was written: 0.29 * 100 is 29.

    Raises:
        ValueError: rho is outside [0, 1].
    """
    if not 0 <= rho <= 1:
        raise ValueError(f"rho={rho} must lie in [0, 1]")
    return int(Fraction(Decimal(str(rho))) * n_types)


def discretise(gamma_bar: Tensor, k: int) -> Tensor:
    """Eq. 14: the K largest entries of each row become True. Exactly K, also when entries tie.

    Of equal entries the lowest column wins, with a warning, since a tie at the threshold means that the search did
    not tell these modules apart.

    Args:
        gamma_bar: L x N.
        k: modules per layer, 0 to N.

    Returns:
        Boolean L x N with exactly ``k`` True entries in each row.
    """
    n_types = gamma_bar.shape[-1]
    if not 0 <= k <= n_types:
        raise ValueError(f"k={k} must lie between 0 and the {n_types} candidates of a layer")
    values, columns = gamma_bar.sort(dim=-1, descending=True, stable=True)
    if 0 < k < n_types:
        tied = (values[:, k - 1] == values[:, k]).nonzero().flatten().tolist()
        if tied:
            warnings.warn(
                f"the search does not separate the top {k} modules in layer(s) {', '.join(map(str, tied))}: "
                "equal entries, taken in column order",
                stacklevel=2,
            )
    selected = torch.zeros_like(gamma_bar, dtype=torch.bool)
    return selected.scatter(-1, columns[:, :k], True)


def random_selection(n_layers: int, n_types: int, k: int, seed: int) -> Tensor:
    """K modules per layer, uniformly at random ([D] Table 3's control). Boolean L x N."""
    generator = torch.Generator().manual_seed(seed)
    return discretise(torch.rand(n_layers, n_types, generator=generator, dtype=torch.float64), k)


def adapter_parameters(
    shapes: Sequence[Sequence[tuple[int, int]]], selected: Tensor, rank: int, shared_rank: int | None
) -> int:
    """Adapter parameters of a selection, counted as in [D]: shared pairs once, the head left out.

    Args:
        shapes: L x N pairs (in_features, out_features).
        selected: boolean L x N.
        rank: r of the selected modules.
        shared_rank: r_s of the pair shared by the unselected modules of one type and shape; None where these are
            frozen.
    """
    total = 0
    shared: set[tuple[int, tuple[int, int]]] = set()
    for row, flags in zip(shapes, selected.tolist(), strict=True):
        for column, (shape, flag) in enumerate(zip(row, flags, strict=True)):
            if flag:
                total += rank * sum(shape)
            else:
                shared.add((column, shape))
    if shared_rank is not None:
        total += sum(shared_rank * sum(shape) for _, shape in shared)
    return total


def cheapest_and_dearest(shapes: Sequence[Sequence[tuple[int, int]]], k: int) -> tuple[Tensor, Tensor]:
    """The selections of K modules a layer with the fewest and with the most selected parameters, L x N each."""
    size = torch.tensor([[float(sum(shape)) for shape in row] for row in shapes])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # equal sizes tie by nature here
        return discretise(-size, k), discretise(size, k)


def expected_adapter_parameters(
    shapes: Sequence[Sequence[tuple[int, int]]], k: int, rank: int, shared_rank: int | None
) -> int:
    """Mean of `adapter_parameters` over all selections of K modules a layer, each equally likely, rounded."""
    share = Fraction(k, len(shapes[0]))
    layers_of: dict[tuple[int, tuple[int, int]], int] = {}
    for row in shapes:
        for key in enumerate(row):
            layers_of[key] = layers_of.get(key, 0) + 1
    own = sum(share * count * rank * sum(shape) for (_, shape), count in layers_of.items())
    if shared_rank is None:
        return round(own)
    # A shared pair exists unless its type is selected in every layer.
    return round(own + sum((1 - share**n) * shared_rank * sum(shape) for (_, shape), n in layers_of.items()))
