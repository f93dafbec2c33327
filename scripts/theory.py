"""Measure what the theorems of both papers claim: writes docs/background/theory.md, its pictures and its data.

    python scripts/theory.py                          # everything, about five minutes on one core
    python scripts/theory.py --only regulariser       # repeat one experiment, keep the other results
    python scripts/theory.py --quick --output <folder>    # a test in seconds; its numbers mean nothing

Each experiment is a function of its settings. The settings are stored with its results.
"""

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "scripts")]

import theory_page  # noqa: E402

from diffora.core.orthogonality import numerical_rank, orthogonality  # noqa: E402
from diffora.files import write_text  # noqa: E402
from diffora.theory.approximation import best_error, best_update, network_bound, orthonormal_error  # noqa: E402
from diffora.theory.gram import (  # noqa: E402
    TwoLayerNet,
    active_together,
    convergence_bound,
    generalisation_bound,
    gram,
    least_eigenvalue,
    sampled_least_eigenvalue,
    sampled_patterns,
    tangent_kernel,
)

TOLERANCE = 1e-9  # for least eigenvalues; the matrices are exact to about 1e-11
Result = dict[str, Any]


def seeded(*seed: int) -> torch.Generator:
    """A random generator for one purpose: the first number is the seed, the other numbers are the purpose."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def on_sphere(*shape: int, generator: torch.Generator) -> Tensor:
    """Inputs of norm 1, as in the theorems, uniform in direction."""
    return torch.nn.functional.normalize(normal(*shape, generator=generator), dim=-1)


def signs(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator).double() * 2 - 1


def half(d: int) -> Tensor:
    """Gamma that trains the first half of the coordinates.

    Inputs and w0 have the same distribution under rotation, so another half would give the same results.
    """
    return (torch.arange(d) < d // 2).double()


def rates(x: Tensor, gate: Tensor, w0: Tensor) -> dict[str, float]:
    """Least eigenvalues of the paper's matrices and of the kernel by which a gated network trains."""
    plain, gated = (active_together(x, g, w0) for g in (torch.ones_like(gate), gate))
    return {
        "lambda": least_eigenvalue(gram(x, plain)).item(),
        "lambda_gated": least_eigenvalue(gram(x, gated)).item(),
        "kernel_gated": least_eigenvalue(tangent_kernel(x, gate, gated)).item(),
        "assumption": least_eigenvalue(gated - plain).item(),
    }


# --- Gram matrices ---


def estimates(seed: int, n: int, d: int, samples: Sequence[int], repeats: int) -> Result:
    """Monte-Carlo estimates of lambda_0 and lambda_0^Gamma against the exact ones."""
    generator = seeded(seed, 1)
    x = on_sphere(n, d, generator=generator)
    cases = {
        "w0 = 0, Γ = I": (torch.ones(d).double(), torch.zeros(d).double()),
        "w0 ~ N(0, I), half of Γ": (half(d), normal(d, generator=generator)),
    }
    result: Result = {}
    for name, (gate, w0) in cases.items():
        exact = least_eigenvalue(gram(x, active_together(x, gate, w0))).item()
        found = {}
        for count in samples:
            pairs = [
                sampled_least_eigenvalue(x, sampled_patterns(x, gate, w0, count, generator)) for _ in range(repeats)
            ]
            values, errors = torch.tensor(pairs, dtype=torch.float64).T
            found[str(count)] = {
                "mean": values.mean().item(),
                "spread": values.std().item(),
                "standard_error": errors.mean().item(),
                "covered": int(((values - exact).abs() <= 1.96 * errors).sum()),
            }
        result[name] = {"exact": exact, "estimates": found}
    return result


# --- the assumption of Theorem 2 ---

PRETRAINED = {"zero": 0.0, "normal": 1.0, "large": 3.0, "active": 1.0}
GATES: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "half": lambda draws, d, generator: half(d).expand(draws, d),
    "all but one": lambda draws, d, generator: (torch.arange(d) > 0).double().expand(draws, d),
    "relaxed": lambda draws, d, generator: torch.rand(draws, d, dtype=torch.float64, generator=generator),
}


def assumption(seed: int, draws: int, dims: Sequence[int], sizes: Sequence[int], until: float) -> Result:
    """How often ``I^{Gamma w} - I^w`` is positive semi-definite, and what is true in these and in the other cases."""
    cells = []
    for i, d in enumerate(dims):
        for j, n in enumerate(sizes):
            for k, pretrained in enumerate(PRETRAINED):
                for m, gate in enumerate(GATES):
                    generator = seeded(seed, 2, i, j, k, m)
                    counts: Counter[str] = Counter()
                    for some in [25] * (draws // 25) + [draws % 25] * (draws % 25 > 0):  # 25 fit into the CPU cache
                        counts.update(assumption_counts(generator, some, d, n, pretrained, gate, until))
                    cells.append({"d": d, "n": n, "w0": pretrained, "gate": gate, "draws": draws, **counts})
    return {"cells": cells}


def assumption_counts(
    generator: torch.Generator, draws: int, d: int, n: int, pretrained: str, gate: str, until: float
) -> dict[str, int]:
    x = on_sphere(draws, n, d, generator=generator)
    w0 = PRETRAINED[pretrained] * normal(draws, d, generator=generator)
    if pretrained == "active":  # the neuron fires on every input
        before = (x @ w0.unsqueeze(-1)).squeeze(-1)
        x = x * torch.where(before >= 0, 1.0, -1.0).unsqueeze(-1)
    gates = GATES[gate](draws, d, generator)
    y = signs(draws, n, generator=generator)

    plain, gated = active_together(x, torch.ones_like(gates), w0), active_together(x, gates, w0)
    h, h_gated, kernel = gram(x, plain), gram(x, gated), tangent_kernel(x, gates, gated)
    holds = least_eigenvalue(gated - plain) >= -TOLERANCE
    rate, rate_gated, rate_kernel = (least_eigenvalue(matrix) for matrix in (h, h_gated, kernel))
    facts = {
        "larger": rate_gated > rate + TOLERANCE,  # Theorem 2's claim about the matrices; two zeros do not count
        "kernel_larger": rate_kernel > rate + TOLERANCE,
        "faster": flow_loss(kernel, y, until) < flow_loss(h, y, until),
        "too_fast": 2 * rate_kernel < rate_gated - TOLERANCE,  # Theorem 2's rate is faster than the kernel allows
    }
    counts = {"holds": int(holds.sum())}
    for name, fact in facts.items():
        counts[name] = int(fact.sum())
        counts[f"{name}_where_it_holds"] = int((fact & holds).sum())
    return counts


def flow_loss(kernel: Tensor, y: Tensor, t: float) -> Tensor:
    """``||exp(-kernel t) y||^2``: the loss at time t at infinite width, if the output starts at 0."""
    values, vectors = torch.linalg.eigh(kernel)
    parts = (vectors.mT @ y.unsqueeze(-1)).squeeze(-1)
    return (parts * torch.exp(-values * t)).square().sum(-1)


# --- Theorems 1 and 2 ---


def shared_direction(n: int, share: float, pretrained: float) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, Gamma and w0 that satisfy Theorem 2's assumption for any n.

    Each input has a coordinate of its own. All inputs also have one common coordinate, with a ``share`` of the squared
    norm. w0 points along the common coordinate, and Gamma does not train it.
    """
    x = torch.cat([math.sqrt(1 - share) * torch.eye(n), torch.full((n, 1), math.sqrt(share))], 1).double()
    gate = torch.ones(n + 1).double()
    gate[-1] = 0
    w0 = torch.zeros(n + 1).double()
    w0[-1] = pretrained
    return x, gate, w0


def convergence(seed: int, seeds: int, n: int, d: int, widths: Sequence[int], steps: int, lr: float) -> Result:
    """Measured loss of finite networks against ``exp(-lambda t)``, several draws of each network."""
    generator = seeded(seed, 3)
    x, w0 = on_sphere(n, d, generator=generator), normal(d, generator=generator)
    y = signs(n, generator=generator)
    xs, gate_s, w0_s = shared_direction(n, share=0.9, pretrained=0.2)
    cases = {
        "plain": (x, torch.ones(d).double(), torch.zeros(d).double()),
        "gated": (x, half(d), w0),
        "assumption, plain": (xs, torch.ones(n + 1).double(), w0_s),
        "assumption, gated": (xs, gate_s, w0_s),
    }
    times = torch.arange(steps + 1, dtype=torch.float64) * lr
    shown = sorted({round(i) for i in torch.linspace(0, steps, 61).tolist()})
    result: Result = {"times": times[shown].tolist(), "cases": {}}
    for name, (inputs, gate, pretrained) in cases.items():
        found = rates(inputs, gate, pretrained)
        bound = convergence_bound(found["lambda_gated"], times)
        case: Result = {"rates": found, "width_asked": n**6 / found["lambda_gated"] ** 4, "widths": {}}
        for width in widths:
            curves = []
            for i in range(seeds):
                net = TwoLayerNet.drawn(width, gate, pretrained, seeded(seed, 3, i))
                losses = net.descend(inputs, y, lr, steps)
                curves.append(losses / losses[0])
            stack = torch.stack(curves)
            case["widths"][str(width)] = {
                "median": stack.median(0).values[shown].tolist(),
                "least": stack.amin(0)[shown].tolist(),
                "most": stack.amax(0)[shown].tolist(),
                "above_bound": int((stack > bound * (1 + 1e-9)).any(1).sum()),
            }
        result["cases"][name] = case
    return result


def trained(seed: int, draws: int, n: int, d: int, width: int, steps: int, lr: float) -> Result:
    """Do gated networks train faster than plain ones, in general and where lambda_0^Gamma is larger than lambda_0?

    Each draw has new inputs, labels, w0 and network. Gamma trains half of the coordinates. The gated and the plain
    network of a draw start with the same weights.
    """
    result: Result = {}
    for i, pretrained in enumerate(("zero", "normal")):
        runs = []
        for draw in range(draws):
            generator = seeded(seed, 4, i, draw)
            x, w0 = on_sphere(n, d, generator=generator), PRETRAINED[pretrained] * normal(d, generator=generator)
            y = signs(n, generator=generator)
            run = rates(x, half(d), w0)
            for name, gate in (("plain", torch.ones(d).double()), ("gated", half(d))):
                losses = TwoLayerNet.drawn(width, gate, w0, seeded(seed, 5, draw)).descend(x, y, lr, steps)
                run[name] = (losses[-1] / losses[0]).item()
            runs.append(run)
        larger = [run for run in runs if run["lambda_gated"] > run["lambda"]]
        until = steps * lr
        result[pretrained] = {
            "larger": len(larger),
            "faster": sum(run["gated"] < run["plain"] for run in runs),
            "faster_where_larger": sum(run["gated"] < run["plain"] for run in larger),
            "above_bound": sum(run["gated"] > math.exp(-run["lambda_gated"] * until) for run in runs),
            "gated_over_plain": statistics.median(run["gated"] / run["plain"] for run in runs),
        }
    return result


# --- Theorem 3 ---


def generalisation(
    seed: int, seeds: int, d: int, sizes: Sequence[int], gates: int, width: int, steps: int, lr: float, tests: int
) -> Result:
    """Theorem 3's terms compared with the test loss of trained networks, for several Gamma on the same task.

    The target depends on the first half of the coordinates only. It is a linear part plus a rectified part, with mean
    square 1. The Gammas train all coordinates, this half, the other half, and random halves.
    """
    points = []
    for s in range(seeds):
        generator = seeded(seed, 6, s)
        w0 = normal(d, generator=generator)
        reads = half(d) * normal(2, d, generator=generator)
        x_test = on_sphere(tests, d, generator=generator)
        reads = reads / teacher(x_test, reads).square().mean().sqrt()
        y_test = teacher(x_test, reads)
        some = {"all": torch.ones(d).double(), "right half": half(d), "wrong half": 1 - half(d)}
        for i in range(gates):
            mask = torch.zeros(d).double()
            mask[torch.randperm(d, generator=generator)[: d // 2]] = 1
            some[f"random {i}"] = mask
        for size in sizes:
            x = on_sphere(size, d, generator=generator)
            y = teacher(x, reads)
            for name, gate in some.items():
                active = active_together(x, gate, w0)
                net = TwoLayerNet.drawn(width, gate.float(), w0.float(), seeded(seed, 7, s))
                losses = net.descend(x.float(), y.float(), lr, steps)
                loss = (net(x_test.float()) - y_test).square().mean().item() / 2
                point = {"seed": s, "n": size, "gate": name, "test_loss": loss}
                point["train_loss"] = losses[-1].item() / (2 * size)
                for key, matrix in (("paper", gram(x, active)), ("kernel", tangent_kernel(x, gate, active))):
                    try:
                        fit, worst = generalisation_bound(matrix, y)
                    except ValueError:  # singular to working precision
                        fit, worst = math.inf, math.inf
                    point |= {f"{key}_fit": fit, f"{key}_worst": worst}
                points.append(point)
    return {"points": points}


def teacher(x: Tensor, reads: Tensor) -> Tensor:
    """The target: a linear part plus a rectified one."""
    return x @ reads[0] + (x @ reads[1]).relu()


# --- rank-R adapters ---


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


# --- all of them ---

FULL: dict[str, tuple[Callable[..., Result], dict[str, Any]]] = {
    "estimates": (estimates, {"seed": 0, "n": 10, "d": 5, "samples": [100, 1000, 10_000, 100_000], "repeats": 40}),
    "assumption": (
        assumption,
        {"seed": 0, "draws": 1000, "dims": [4, 16, 64], "sizes": [2, 3, 4, 8, 16], "until": 10.0},
    ),
    "convergence": (
        convergence,
        {"seed": 0, "seeds": 5, "n": 10, "d": 20, "widths": [64, 512, 4096], "steps": 600, "lr": 0.1},
    ),
    "trained": (trained, {"seed": 0, "draws": 100, "n": 4, "d": 16, "width": 1024, "steps": 200, "lr": 0.1}),
    "generalisation": (
        generalisation,
        {
            "seed": 0,
            "seeds": 5,
            "d": 8,
            "sizes": [20, 40, 80, 160],
            "gates": 9,
            "width": 1024,
            "steps": 500,
            "lr": 0.05,
            "tests": 2000,
        },
    ),
    "linear": (
        linear,
        {"seed": 0, "seeds": 5, "d": 16, "depths": [1, 2, 4], "ranks": [1, 2, 3, 4], "steps": 3000, "lr": 0.02},
    ),
    "deep": (
        deep,
        {
            "seed": 0,
            "seeds": 5,
            "d": 16,
            "depths": [2, 4],
            "ranks": [1, 2, 4, 6, 8, 12],
            "steps": 2000,
            "lr": 0.01,
            "rows": 128,
        },
    ),
    "printed_bound": (
        printed_bound,
        {"seed": 0, "dims": [16, 64, 256, 1024], "rank": 1, "steps": 500, "lr": 0.01, "rows": 128},
    ),
    "regulariser": (
        regulariser,
        {
            "seed": 0,
            "seeds": 5,
            "d": 32,
            "rank": 4,
            "scales": [0.3, 1.0, 3.0],
            "weights": [0.0, 0.01, 0.1, 1.0, 10.0],
            "steps": 2000,
            "lr": 0.02,
        },
    ),
}
QUICK: dict[str, dict[str, Any]] = {
    "estimates": {"samples": [100, 1000], "repeats": 4},
    "assumption": {"draws": 20, "dims": [4], "sizes": [2, 4]},
    "convergence": {"seeds": 2, "n": 4, "d": 6, "widths": [16, 64], "steps": 60},
    "trained": {"draws": 6, "width": 64, "steps": 20},
    "generalisation": {"seeds": 1, "sizes": [10, 20], "gates": 2, "width": 64, "steps": 20, "tests": 100},
    "linear": {"seeds": 2, "d": 6, "depths": [1, 2], "ranks": [1, 2], "steps": 50},
    "deep": {"seeds": 2, "d": 6, "ranks": [1, 2], "steps": 20, "rows": 16},
    "printed_bound": {"dims": [16, 64], "steps": 20, "rows": 16},
    "regulariser": {"seeds": 2, "d": 8, "rank": 2, "weights": [0.0, 1.0], "steps": 50},
}


def rounded(value: Any) -> Any:
    """The values with five significant digits. A number that JSON cannot write is None."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value


def main(given: argparse.Namespace) -> None:
    data = given.output / "data" / "theory.json"
    content: Result = json.loads(data.read_text()) if given.only else {}
    for name in given.only or FULL:
        experiment, settings = FULL[name]
        settings = settings | (QUICK[name] if given.quick else {})
        start = time.process_time()
        content[name] = rounded({"settings": settings, **experiment(**settings)})
        print(f"{name}: {time.process_time() - start:.0f} s of one core", flush=True)
    packages = ("torch", "numpy", "diffora")
    content["versions"] = {"python": platform.python_version()} | {package: version(package) for package in packages}
    content["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    data.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(part)}" for name, part in content.items())
    write_text(data, f"{{\n{lines}\n}}\n")
    theory_page.write(content, ROOT / "docs" / "background" / "theory.md", given.output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FULL, metavar="EXPERIMENT", help="measure only these")
    parser.add_argument("--quick", action="store_true", help="small shapes, in seconds")
    place = ROOT / "docs" / "background"
    parser.add_argument("--output", type=Path, default=place, help="for data/, images/ and theory.md")
    arguments = parser.parse_args()
    if arguments.quick and arguments.output.resolve() == place:
        parser.error("--quick needs another --output, so that it does not replace measured results")
    main(arguments)
