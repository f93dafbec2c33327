"""Experiments on the theorems of [D]: Gram matrices, the assumption of Theorem 2, convergence, generalisation."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from theory_draws import Result, normal, seeded
from torch import Tensor

from diffora.theory.gram import (
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
