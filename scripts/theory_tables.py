"""The tables of docs/background/theory.md, in Markdown, from its data."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Result = Mapping[str, Any]
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
