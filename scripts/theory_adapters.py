"""Experiments on the theorems of [R]: what rank-R adapters can reach, and what the orthogonality penalty does."""

import math
from collections.abc import Callable, Sequence

import torch
from theory_draws import Result, normal, seeded
from torch import Tensor

from diffora.core.orthogonality import numerical_rank, orthogonality
from diffora.theory.approximation import best_error, best_update, network_bound, orthonormal_error


def minimise(loss: Callable[[], Tensor], parameters: Sequence[Tensor], steps: int, lr: float) -> None:
    """Adam with a learning rate that falls linearly to zero."""
    optimiser = torch.optim.Adam(parameters, lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    for _ in range(steps):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
        schedule.step()


def pairs(seeds: int, layers: int, rank: int, d: int, generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    """A ~ N(0, 1/d) and B = 0 for each layer and all seeds."""
    a = [normal(seeds, rank, d, generator=generator) / math.sqrt(d) for _ in range(layers)]
    b = [torch.zeros(seeds, d, rank, dtype=torch.float64) for _ in range(layers)]
    return [m.requires_grad_() for m in a], [m.requires_grad_() for m in b]


def near_identity(*shape: int, generator: torch.Generator) -> Tensor:
    """Weights near the identity, so that they are invertible and their product has a moderate size."""
    d = shape[-1]
    return torch.eye(d).double() + 0.5 * normal(*shape, d, generator=generator) / math.sqrt(d)


def product(weights: Sequence[Tensor]) -> Tensor:
    """The product W_L ... W_1 of the weights of layers, given from first to last."""
    whole = weights[0]
    for weight in weights[1:]:
        whole = weight @ whole
    return whole


def linear(seed: int, seeds: int, d: int, depths: Sequence[int], ranks: Sequence[int], steps: int, lr: float) -> Result:
    """Trained rank-R adapters of a deep linear network compared with ``sigma_{LR+1}, ...`` of E (eq. 9)."""
    rows = []
    for depth in depths:
        generator = seeded(seed, 8, depth)
        frozen = [near_identity(seeds, d, generator=generator) for _ in range(depth)]
        target = near_identity(seeds, d, generator=generator)
        e = target - product(frozen)
        size = torch.linalg.matrix_norm(e)
        for rank in ranks:
            left = linear_left(frozen, target, *pairs(seeds, depth, rank, d, generator), steps, lr)
            best = torch.tensor([best_error(each, depth * rank) for each in e])
            rows.append(
                {
                    "depth": depth,
                    "rank": rank,
                    "reached": (torch.linalg.matrix_norm(left) / size).tolist(),
                    "best": (best[:, 1] / size).tolist(),
                    "spectral": torch.linalg.matrix_norm(left, 2).tolist(),
                    "sigma": best[:, 0].tolist(),
                }
            )
    return {"rows": rows}


def linear_left(
    frozen: list[Tensor], target: Tensor, a: list[Tensor], b: list[Tensor], steps: int, lr: float
) -> Tensor:
    """The target minus the product of the adapted weights, after training."""

    def left() -> Tensor:
        return target - product(adapted(frozen, a, b))

    minimise(lambda: left().square().sum(), [*a, *b], steps, lr)
    return left().detach()


def adapted(weights: list[Tensor], a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    return [w + q @ p for w, p, q in zip(weights, a, b, strict=True)]


def forward(weights: Sequence[Tensor], biases: Sequence[Tensor], x: Tensor) -> Tensor:
    """A ReLU network with an activation after each layer, also after the last one; for all seeds at once."""
    for weight, bias in zip(weights, biases, strict=True):
        x = (x @ weight.mT + bias).relu()
    return x


def deep(
    seed: int, seeds: int, d: int, depths: Sequence[int], ranks: Sequence[int], steps: int, lr: float, rows: int
) -> Result:
    """Trained adapters of a ReLU network compared with eq. 8, for a target of two layers and x ~ N(0, I).

    If the network has four layers, two frozen layers replace each layer of the target.
    """
    found = []
    for depth in depths:
        generator = seeded(seed, 9, depth)
        target = [near_identity(seeds, d, generator=generator) for _ in range(2)]
        target_bias = [0.5 * normal(seeds, 1, d, generator=generator) for _ in range(2)]
        frozen = [near_identity(seeds, d, generator=generator) for _ in range(depth)]
        frozen_bias = [0.5 * normal(seeds, 1, d, generator=generator) for _ in range(depth)]
        per = depth // 2
        e = [target[i] - product(frozen[i * per : (i + 1) * per]) for i in range(2)]
        wanted = target, target_bias
        x_test = normal(seeds, 10 * rows, d, generator=generator)
        for rank in ranks:
            row: Result = {"depth": depth, "rank": rank, "bound": [], "printed": []}
            for s in range(seeds):
                errors = [best_error(each[s], rank * per)[0] for each in e]
                given = [w[s] for w in target], [b[s] for b in target_bias], errors, torch.eye(d).double()
                row["bound"].append(network_bound(*given))
                row["printed"].append(network_bound(*given, printed=True))
            if depth == 2:  # the adapters that the proof constructs
                updates = [torch.stack([best_update(each, rank) for each in layer]) for layer in e]
                built = [w + update for w, update in zip(frozen, updates, strict=True)]
                row["constructed"] = distances((built, target_bias), wanted, x_test).tolist()
            for key in ("trained", "trained_without_biases"):
                a, b = pairs(seeds, depth, rank, d, generator)
                bias = [part.clone().requires_grad_(key == "trained") for part in frozen_bias]
                train_network(frozen, a, b, bias, wanted, rows, steps, lr, generator)
                row[key] = distances((adapted(frozen, a, b), bias), wanted, x_test).tolist()
            found.append(row)
    return {"rows": found}


Network = tuple[list[Tensor], list[Tensor]]  # weights and biases of the layers, first to last


@torch.no_grad()
def distances(network: Network, wanted: Network, x: Tensor) -> Tensor:
    """Mean ``||f(x) - target(x)||`` for each seed."""
    return torch.linalg.vector_norm(forward(*network, x) - forward(*wanted, x), dim=-1).mean(1)


def train_network(
    frozen: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    bias: list[Tensor],
    wanted: Network,
    rows: int,
    steps: int,
    lr: float,
    generator: torch.Generator,
) -> None:
    """Minimise the mean square error over A, B and the biases that require gradients. Each step has new inputs."""

    def loss() -> Tensor:
        x = normal(len(frozen[0]), rows, frozen[0].shape[-1], generator=generator)
        return (forward(adapted(frozen, a, b), bias, x) - forward(*wanted, x)).square().mean(1).sum()

    minimise(loss, [*a, *b, *(part for part in bias if part.requires_grad)], steps, lr)


def printed_bound(seed: int, dims: Sequence[int], rank: int, steps: int, lr: float, rows: int) -> Result:
    """Eq. 8 with beta as it is printed: target relu(x / sqrt(d)), frozen layer relu(-x / sqrt(d)), x ~ N(0, I)."""
    found = []
    for d in dims:
        scale, eye = 1 / math.sqrt(d), torch.eye(d).double()
        given = [scale * eye], [torch.zeros(d)], [best_error(2 * scale * eye, rank)[0]], eye
        reached = mirrored(d, rank, steps, lr, rows, seeded(seed, 10, d))
        found.append(
            {"d": d, "reached": reached, "printed": network_bound(*given, printed=True), "bound": network_bound(*given)}
        )
    return {"rows": found}


def mirrored(d: int, rank: int, steps: int, lr: float, rows: int, generator: torch.Generator) -> float:
    """Mean ``||f(x) - target(x)||`` of the layer in `printed_bound`, after training A, B and the bias to reduce it."""
    a = (torch.randn(rank, d, generator=generator) / math.sqrt(d)).requires_grad_()
    b, bias = torch.zeros(d, rank, requires_grad=True), torch.zeros(d, requires_grad=True)

    def distance(count: int) -> Tensor:
        x = torch.randn(count, d, generator=generator)
        f = (-x / math.sqrt(d) + x @ a.T @ b.T + bias).relu()
        return torch.linalg.vector_norm(f - x.relu() / math.sqrt(d), dim=-1).mean()

    minimise(lambda: distance(rows), [a, b, bias], steps, lr)
    return distance(10 * rows).item()


def regulariser(
    seed: int, seeds: int, d: int, rank: int, scales: Sequence[float], weights: Sequence[float], steps: int, lr: float
) -> Result:
    """R-LoRA's penalty on one linear layer: rank and error of the trained update, for several sizes of E."""
    found = []
    for i, scale in enumerate(scales):
        generator = seeded(seed, 11, i)
        e = normal(seeds, d, d, generator=generator)
        e = e * scale / torch.linalg.matrix_norm(e, 2)[:, None, None]
        best = torch.tensor([best_error(each, rank)[1] for each in e])
        limit = torch.tensor([orthonormal_error(each, rank) for each in e])
        nothing = torch.linalg.matrix_norm(e)
        for weight in weights:
            (a,), (b,) = pairs(seeds, 1, rank, d, seeded(seed, 12, i))
            train_penalised(e, a, b, weight, steps, lr)
            update = (b @ a).detach()
            values = torch.linalg.svdvals(update)[:, :rank]
            found.append(
                {
                    "scale": scale,
                    "weight": weight,
                    "over_best": (torch.linalg.matrix_norm(e - update) / best).tolist(),
                    "limit_over_best": (limit / best).tolist(),
                    "nothing_over_best": (nothing / best).tolist(),
                    "penalty": [orthogonality([p, q.T]).item() for p, q in zip(a, b, strict=True)],
                    "rank": [numerical_rank(v, d, d) for v in values],
                    "stable_rank": (values.square().sum(1) / values[:, 0].square()).tolist(),
                }
            )
    return {"rows": found}


def train_penalised(e: Tensor, a: Tensor, b: Tensor, weight: float, steps: int, lr: float) -> None:
    """Minimise ``||E - B A||_F^2 + weight * Reg`` ([R] eq. 10)."""
    minimise(lambda: (e - b @ a).square().sum() + weight * orthogonality([*a, *b.mT]), [a, b], steps, lr)
