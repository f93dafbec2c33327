"""The pictures of docs/background/theory.md, from its data."""

import math
import statistics

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from theory_tables import CASES, W0, Result, groups, interval, pooled

BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#777777"


def panels(columns: int, width: float = 3.3, height: float = 2.7) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    found = list(figure.subplots(1, columns, squeeze=False).flat)
    for axes in found:
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, found


def gram(content: Result) -> Figure:
    """Estimates of lambda with error bars, and the exact value."""
    found = content["estimates"]
    names = [key for key in found if key != "settings"]
    figure, found_axes = panels(len(names))
    for axes, name in zip(found_axes, names, strict=True):
        e = found[name]["estimates"]
        samples = [int(s) for s in e]
        errors = [1.96 * v["standard_error"] for v in e.values()]
        axes.errorbar(samples, [v["mean"] for v in e.values()], errors, fmt="o", ms=4, color=BLUE, capsize=3)
        axes.axhline(found[name]["exact"], color=ORANGE, lw=1, label="exact")
        axes.set_xscale("log")
        axes.set_title(name, size=9)
        axes.set_xlabel("samples of w", size=9)
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    found_axes[0].set_ylabel("least eigenvalue, ±1.96 errors", size=9)
    return figure


def assumption(content: Result) -> Figure:
    """Share of draws in which the assumption holds, against n."""
    found = content["assumption"]
    figure, found_axes = panels(3)
    colours = dict(zip(W0, (GREY, BLUE, GREEN, ORANGE), strict=True))
    sizes = found["settings"]["sizes"]
    gates = list(dict.fromkeys(gate for _, gate in groups(found)))
    for axes, gate in zip(found_axes, gates, strict=True):
        for shift, w0 in enumerate(W0):
            cells = groups(found)[w0, gate]
            k = [pooled([c for c in cells if c["n"] == n], ["holds", "draws"]) for n in sizes]
            y = np.array([100 * here["holds"] / here["draws"] for here in k])
            ends = 100 * np.array([interval(here["holds"], here["draws"]) for here in k])
            x = np.arange(len(sizes)) + 0.12 * (shift - 1.5)
            whiskers = np.maximum(0, [y - ends[:, 0], ends[:, 1] - y])
            axes.errorbar(x, y, whiskers, fmt="o", ms=4, capsize=2, color=colours[w0], label=W0[w0])
        axes.set_xticks(range(len(sizes)), [str(n) for n in sizes])
        axes.set_yscale("symlog", linthresh=0.1)
        axes.set_yticks([0, 0.1, 1, 10, 100], ["0", "0.1", "1", "10", "100"])
        axes.set_ylim(-0.02, 130)
        axes.set_title(f"Γ: {gate}", size=9)
        axes.set_xlabel("inputs n", size=9)
    found_axes[0].set_ylabel("assumption holds, % of draws", size=9)
    handles = found_axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    return figure


def convergence(content: Result) -> Figure:
    """Measured loss for several widths, the theorem's bound, and the slowest decrease that the kernel allows."""
    found = content["convergence"]
    figure, found_axes = panels(len(found["cases"]))
    times = np.array(found["times"])
    shades = [str(shade) for shade in np.linspace(0.75, 0, len(found["settings"]["widths"]))]
    for axes, (name, case) in zip(found_axes, found["cases"].items(), strict=True):
        for (width, curve), shade in zip(case["widths"].items(), shades, strict=True):
            axes.plot(times, curve["median"], color=shade, lw=1.3, label=f"network, m = {width}")
            axes.fill_between(times, curve["least"], curve["most"], color=shade, alpha=0.15, lw=0)
        r = case["rates"]
        axes.plot(times, np.exp(-r["lambda_gated"] * times), color=ORANGE, ls="--", label="exp(−λ0^Γ t), Theorem 2")
        slowest = np.exp(-2 * r["kernel_gated"] * times)
        axes.plot(times, slowest, color=BLUE, ls=":", label="exp(−2 λ t), λ of the kernel")
        axes.set_yscale("log")
        axes.set_ylim(1e-5, 2)
        axes.set_title(CASES[name], size=9)
        axes.set_xlabel("time t", size=9)
    found_axes[0].set_ylabel("‖f(t) − y‖² / ‖f(0) − y‖²", size=9)
    figure.legend(
        *found_axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False, fontsize=8
    )
    return figure


def generalisation(content: Result) -> Figure:
    """Test loss against Theorem 3's first term, with the paper's matrix and with the network's kernel."""
    found = content["generalisation"]
    n = found["settings"]["sizes"][-1]
    points = [p for p in found["points"] if p["n"] == n]
    figure, found_axes = panels(3)
    for axes, key, what in zip(
        found_axes,
        ("paper_fit", "paper_worst", "kernel_fit"),
        ("first term, paper's matrix", "second term, paper's matrix", "first term, the kernel"),
        strict=True,
    ):
        for gate, colour in (("random", GREY), ("wrong half", ORANGE), ("right half", GREEN), ("all", BLUE)):
            here = [p for p in points if p["gate"].startswith(gate) and p[key] is not None]
            axes.scatter([p[key] for p in here], [p["test_loss"] for p in here], s=14, color=colour, label=gate)
        axes.set_xlabel(what, size=9)
        axes.set_xscale("log")
        axes.set_yscale("log")
    found_axes[0].set_ylabel(f"test loss, N = {n}", size=9)
    handles = found_axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    return figure


def adapters(content: Result) -> Figure:
    """Error of trained adapters, next to the least possible error (linear) and the bound (ReLU)."""
    figure, found_axes = panels(3)
    rows = content["linear"]["rows"]
    depths = list(dict.fromkeys(row["depth"] for row in rows))
    for depth, colour in zip(depths, (BLUE, GREEN, ORANGE), strict=False):
        here = [row for row in rows if row["depth"] == depth]
        ranks = [row["rank"] for row in here]
        label = f"{depth} layer" + "s" * (depth > 1)
        found_axes[0].plot(ranks, [statistics.mean(row["best"]) for row in here], color=colour, lw=1.2)
        reached = [statistics.mean(row["reached"]) for row in here]
        found_axes[0].plot(ranks, reached, "o", ms=4, color=colour, label=label)
    found_axes[0].set_title("linear: reached (dots), possible (lines)", size=9)
    found_axes[0].set_ylabel("‖what is left of E‖ / ‖E‖", size=9)
    found_axes[0].set_xticks(ranks)
    deep_rows = content["deep"]["rows"]
    looks = {
        "bound": ("bound", ORANGE, "-"),
        "printed": ("as printed", ORANGE, ":"),
        "constructed": ("the proof's adapters", GREEN, "-"),
        "trained_without_biases": ("trained, biases frozen", BLUE, ":"),
        "trained": ("trained", BLUE, "-"),
    }
    for axes, depth in zip(found_axes[1:], dict.fromkeys(row["depth"] for row in deep_rows), strict=True):
        here = [row for row in deep_rows if row["depth"] == depth]
        for key, (label, colour, style) in looks.items():
            if key in here[0]:
                values = [statistics.mean(row[key]) or math.nan for row in here]  # a bound of 0 has no logarithm
                axes.plot(
                    [row["rank"] for row in here], values, style, color=colour, lw=1.3, marker="o", ms=3, label=label
                )
        axes.set_yscale("log")
        axes.set_title(f"ReLU, {depth} frozen layers, target of 2", size=9)
    found_axes[1].set_ylabel("E ‖f(x) − target(x)‖", size=9)
    found_axes[1].legend(frameon=False, fontsize=7)
    found_axes[0].legend(frameon=False, fontsize=8)
    for axes in found_axes:
        axes.set_xlabel("rank R", size=9)
    return figure


def regulariser(content: Result) -> Figure:
    """R-LoRA's penalty: error and stable rank as functions of its weight."""
    rows = content["regulariser"]["rows"]
    figure, found_axes = panels(2)
    for scale, colour in zip(dict.fromkeys(row["scale"] for row in rows), (BLUE, GREEN, ORANGE), strict=False):
        here = [row for row in rows if row["scale"] == scale]
        x = range(len(here))
        for axes, key in zip(found_axes, ("over_best", "stable_rank"), strict=True):
            mean, std = ([f(row[key]) for row in here] for f in (statistics.mean, statistics.stdev))
            axes.errorbar(x, mean, std, color=colour, marker="o", ms=3, lw=1.2, capsize=2, label=f"σ1(E) = {scale:g}")
        found_axes[0].axhline(statistics.mean(here[0]["nothing_over_best"]), color=colour, ls=":", lw=1)
        for axes in found_axes:
            axes.set_xticks(x, [f"{row['weight']:g}" for row in here])
            axes.set_xlabel("weight λ of the penalty", size=9)
    found_axes[0].set_ylabel("error / best of rank R", size=9)
    found_axes[0].set_title("dotted: no update", size=9)
    found_axes[0].legend(frameon=False, fontsize=8)
    found_axes[1].set_ylabel("stable rank of ΔW", size=9)
    return figure
