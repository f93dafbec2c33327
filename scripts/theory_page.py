"""The tables and pictures of docs/background/theory.md, from data/theory.json beside it: no figure is typed by hand.

`scripts/theory.py` calls it. A table stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``.
"""

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Result = Mapping[str, Any]
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#777777"
W0 = {
    "zero": "w0 = 0",
    "normal": "w0 ~ N(0, I)",
    "large": "w0 ~ N(0, 9 I)",
    "active": "w0 ~ N(0, I), all x_i active",
}
CASES = {
    "plain": "Γ = I, w0 = 0",
    "gated": "half of Γ, w0 ~ N(0, I)",
    "assumption, plain": "inputs with a common direction, Γ = I",
    "assumption, gated": "the same, Γ drops that direction",
}


# --- small statistics ---


def interval(k: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share k / n."""
    if n == 0:
        return 0.0, 1.0
    z = 1.96
    middle, half = (k + z * z / 2) / (n + z * z), z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return max(0.0, middle - half), min(1.0, middle + half)


def share(k: int, n: int) -> str:
    """k / n in per cent, with its interval."""
    if n == 0:
        return "no case"
    low, high = (100 * end for end in interval(k, n))
    return f"{100 * k / n:.1f} ({low:.1f} to {high:.1f})"


def spread(values: Sequence[float], digits: int = 3) -> str:
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def rank_correlation(a: Sequence[float | None], b: Sequence[float | None]) -> float:
    """Spearman's rank correlation. None counts as infinite; equal values share their mean rank."""
    values = [np.array([math.inf if v is None else v for v in given]) for given in (a, b)]
    ranks = [(v[:, None] > v).sum(1) + (v[:, None] == v).sum(1) / 2 for v in values]
    return float(np.corrcoef(*ranks)[0, 1])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def pooled(cells: Sequence[Result], keys: Sequence[str]) -> dict[str, int]:
    return {key: sum(cell[key] for cell in cells) for key in keys}


# --- tables ---


def estimates(found: Result) -> str:
    repeats, rows = found["settings"]["repeats"], []
    for name in [key for key in found if key != "settings"]:
        exact = found[name]["exact"]
        for samples, e in found[name]["estimates"].items():
            bias = f"{e['mean'] - exact:+.5f}"
            row = [name, f"{exact:.5f}", f"{int(samples):,}", f"{e['mean']:.5f}", f"{e['standard_error']:.5f}", bias]
            rows.append([*row, f"{e['covered']} of {repeats}"])
    return table(["", "exact", "samples", "mean estimate", "its standard error", "bias", "within 1.96 errors"], rows)


def groups(found: Result) -> dict[tuple[str, str], list[Result]]:
    cells: dict[tuple[str, str], list[Result]] = {}
    for cell in found["cells"]:
        cells.setdefault((cell["w0"], cell["gate"]), []).append(cell)
    return cells


def assumption(found: Result) -> str:
    sizes = found["settings"]["sizes"]
    rows = []
    for (w0, gate), cells in groups(found).items():
        row = [W0[w0], gate]
        for n in sizes:
            here = pooled([cell for cell in cells if cell["n"] == n], ["holds", "draws"])
            row.append(share(here["holds"], here["draws"]))
        rows.append(row)
    return table(["w0", "Γ", *(f"n = {n}" for n in sizes)], rows)


def consequences(found: Result) -> str:
    facts = ("larger", "kernel_larger", "faster", "too_fast")
    rows = []
    for (w0, gate), cells in groups(found).items():
        c = pooled(cells, ["draws", "holds", *facts, *(f"{fact}_where_it_holds" for fact in facts)])
        fails = c["draws"] - c["holds"]
        row = [W0[w0], gate, f"{fails:,}"]
        row += [share(c[fact] - c[f"{fact}_where_it_holds"], fails) for fact in facts]
        row.append(f"{c['holds']:,}")
        row += [share(c[f"{fact}_where_it_holds"], c["holds"]) for fact in ("faster", "too_fast")]
        rows.append(row)
    head = ["w0", "Γ", "fails in", "λ0^Γ > λ0", "kernel's λ > λ0", "faster", "rate impossible"]
    return table([*head, "holds in", "faster", "rate impossible"], rows)


def convergence(found: Result) -> str:
    rows = []
    seeds = found["settings"]["seeds"]
    for name, case in found["cases"].items():
        r = case["rates"]
        row = [CASES[name], *(f"{r[key]:.3f}" for key in ("lambda", "lambda_gated", "kernel_gated", "assumption"))]
        row += [f"{w['above_bound']} of {seeds}" for w in case["widths"].values()]
        rows.append([*row, f"{case['width_asked']:.0e}"])
    head = ["case", "λ0", "λ0^Γ", "least of the kernel", "least of I^{Γw} − I^w"]
    widths = found["settings"]["widths"]
    return table([*head, *(f"above the bound, m = {m}" for m in widths), "n⁶ / (λ0^Γ)⁴"], rows)


def trained(found: Result) -> str:
    draws, rows = found["settings"]["draws"], []
    for w0 in ("zero", "normal"):
        r = found[w0]
        row = [W0[w0], share(r["larger"], draws), share(r["faster"], draws)]
        row += [share(r["faster_where_larger"], r["larger"]), share(r["above_bound"], draws)]
        rows.append([*row, f"{r['gated_over_plain']:.2g}"])
    head = [f"{draws} draws", "λ0^Γ > λ0", "gated loss lower", "the same where λ0^Γ > λ0"]
    return table([*head, "gated loss above exp(−λ0^Γ t)", "median of gated / plain loss"], rows)


def generalisation(found: Result) -> str:
    points, settings = found["points"], found["settings"]
    rows = []
    for n in settings["sizes"]:
        for gate in ("all", "right half", "wrong half"):
            here = [p for p in points if p["n"] == n and p["gate"] == gate]
            keys = ("test_loss", "train_loss", "paper_fit", "paper_worst", "kernel_fit")
            cells = []
            for key in keys:
                values = [math.inf if p[key] is None else p[key] for p in here]
                middle, low, high = (f"{f(values):.3g}" for f in (statistics.median, min, max))
                cells.append(f"{middle} ({low} to {high})".replace("inf", "singular"))
            rows.append([str(n), gate, *cells])
    head = ["N", "Γ", "test loss", "training loss", "first term, H_Γ", "second term, H_Γ", "first term, kernel"]
    return table(head, rows)


def ranking(found: Result) -> str:
    points, settings = found["points"], found["settings"]
    rows = []
    for n in settings["sizes"]:
        row = [str(n)]
        for key in ("paper_fit", "paper_worst", "kernel_fit", "kernel_worst"):
            values = correlations(points, n, range(settings["seeds"]), key)
            low, high = min(values), max(values)
            row.append(f"{statistics.mean(values):.2f} ({low:.2f} to {high:.2f})")
        rows.append(row)
    return table(["N", "first term, H_Γ", "second term, H_Γ", "first term, kernel", "second term, kernel"], rows)


def correlations(points: Sequence[Result], n: int, seeds: Sequence[int], key: str) -> list[float]:
    """For each seed: correlation of a bound with the test loss, over the Gammas that train half of the coordinates."""
    found = []
    for seed in seeds:
        here = [p for p in points if p["n"] == n and p["seed"] == seed and p["gate"] != "all"]
        found.append(rank_correlation([p[key] for p in here], [p["test_loss"] for p in here]))
    return found


def linear(found: Result) -> str:
    rows = []
    for row in found["rows"]:
        over = [a / b for a, b in zip(row["reached"], row["best"], strict=True) if b > 1e-9]
        cells = [str(row["depth"]), str(row["rank"]), spread(row["best"]), spread(row["reached"])]
        ratio = f"{min(over):.4f} to {max(over):.4f}" if over else ""  # rank D fits E exactly
        rows.append([*cells, ratio, spread(row["sigma"]), spread(row["spectral"])])
    head = ["layers", "R", "best possible / ‖E‖", "reached / ‖E‖", "reached / best", "σ_{LR+1}(E)", "reached, spectral"]
    return table(head, rows)


def deep(found: Result) -> str:
    keys = ("bound", "printed", "constructed", "trained", "trained_without_biases")
    rows = [
        [str(row["depth"]), str(row["rank"]), *(spread(row[key], 2) if key in row else "" for key in keys)]
        for row in found["rows"]
    ]
    head = ["frozen layers", "R", "bound", "eq. 8 as printed", "the proof's adapters", "trained"]
    return table([*head, "trained, biases frozen"], rows)


def printed_bound(found: Result) -> str:
    rows = [
        [str(row["d"]), f"{row['reached']:.3f}", f"{row['printed']:.3f}", f"{row['bound']:.3f}"]
        for row in found["rows"]
    ]
    return table(["D", "reached by training", "eq. 8 as printed", "with tr Σ"], rows)


def regulariser(found: Result) -> str:
    rows = []
    for row in found["rows"]:
        cells = [f"{row['scale']:g}", f"{row['weight']:g}", spread(row["over_best"], 2), spread(row["penalty"], 2)]
        ranks = sorted(set(row["rank"]))
        cells += [" to ".join(str(r) for r in dict.fromkeys([ranks[0], ranks[-1]])), spread(row["stable_rank"], 2)]
        rows.append(
            [
                *cells,
                f"{statistics.mean(row['limit_over_best']):.2f}",
                f"{statistics.mean(row['nothing_over_best']):.2f}",
            ]
        )
    head = ["σ1(E)", "λ", "error / best", "Reg", "rank of ΔW", "stable rank", "error / best at Reg = 0"]
    return table([*head, "of ΔW = 0"], rows)


def machine(content: Result) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in content["versions"].items())
    return f"{versions}; {content['date'][:10]}."


# --- pictures ---


def panels(columns: int, width: float = 3.3, height: float = 2.7) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    found = list(figure.subplots(1, columns, squeeze=False).flat)
    for axes in found:
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, found


def picture_gram(content: Result) -> Figure:
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


def picture_assumption(content: Result) -> Figure:
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


def picture_convergence(content: Result) -> Figure:
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


def picture_generalisation(content: Result) -> Figure:
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


def picture_adapters(content: Result) -> Figure:
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


def picture_regulariser(content: Result) -> Figure:
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


# --- the page ---

TABLES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "estimates": ("estimates", estimates),
    "assumption": ("assumption", assumption),
    "consequences": ("assumption", consequences),
    "convergence": ("convergence", convergence),
    "trained": ("trained", trained),
    "generalisation": ("generalisation", generalisation),
    "ranking": ("generalisation", ranking),
    "linear": ("linear", linear),
    "deep": ("deep", deep),
    "printed_bound": ("printed_bound", printed_bound),
    "regulariser": ("regulariser", regulariser),
}
PICTURES: dict[str, Callable[[Result], Figure]] = {
    "theory_gram": picture_gram,
    "theory_assumption": picture_assumption,
    "theory_convergence": picture_convergence,
    "theory_generalisation": picture_generalisation,
    "theory_adapters": picture_adapters,
    "theory_regulariser": picture_regulariser,
}


def refresh(page: str, content: Result) -> str:
    """The page with all tables updated.

    Raises:
        ValueError: a table has no place in the page, or several.
    """
    texts = {name: make(content[source]) for name, (source, make) in TABLES.items()} | {"machine": machine(content)}
    for name, text in texts.items():
        escaped = text.replace("\\", r"\\")
        block = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        page, n = block.subn(rf"\g<1>\n{escaped}\n\n\g<2>", page)
        if n != 1:
            raise ValueError(f"the page has {n} places between <!-- begin {name} --> and <!-- end {name} -->, not one")
    return page


def write(content: Result, page: Path, folder: Path) -> None:
    """Write the tables to a copy of ``page`` in ``folder`` (or to the page itself), pictures to ``folder/images``."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        draw(content).savefig(folder / "images" / f"{name}.png", dpi=110)
    (folder / page.name).write_text(refresh(page.read_text(), content))
