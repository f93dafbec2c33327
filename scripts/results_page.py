"""The head of docs/results/results.md, from docs/results/data/claims.json: the papers' claims and what was measured.

    python scripts/results_page.py          # fills in the derived figures of claims.json, writes table and picture

A measurement in claims.json has one of these inputs; the script adds what follows from it.

- ``differences``, ours less theirs, each from one of: two ``rows`` of another JSON ``file``, with values by seed
  (paired; by their names or, where the file is a list, by their facts; ``task`` is the part of the file that has
  them), ``values`` (by seed [ours, theirs]; paired), ``means`` ([mean, standard deviation, n] of ours and of theirs;
  unpaired), ``stated`` ([mean, low, high, n] as on the page; paired).
- ``percentile`` and ``draws``: a selector of selection_quality, a column of selection_draws, in their JSON files.
- ``exact``: a result in words.

Differences are in points, if there is no ``unit``, and above 0 where ours is better. The verdict is that of
`diffora.report.statistics.verdict`, with the margin of the file for points. ``quotes`` are on the page behind the link.
"""

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import selection_draws
from pages import put

from diffora.files import write_text
from diffora.report.statistics import LEVEL, Difference, holm, paired, verdict

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results" / "results.md"
DATA = PAGE.parent / "data" / "claims.json"
Found = Mapping[str, Any]
COLOURS = {"better": "#009e73", "worse": "#d55e00", "equivalent": "#0072b2", "undecided": "#777777"}


# --- figures ---


def unpaired(ours: tuple[float, float, int], theirs: tuple[float, float, int]) -> Difference:
    """Difference of two means with Student's t at the degrees of freedom of the smaller sample.

    It is used where only means and standard deviations were kept. The interval is at least as wide as Welch's.
    """
    (mean, std, n), (other, other_std, other_n) = ours, theirs
    return interval(mean - other, math.sqrt(std**2 / n + other_std**2 / other_n), min(n, other_n))


def interval(mean: float, error: float, n: int) -> Difference:
    from scipy.special import stdtr, stdtrit

    half = error * float(stdtrit(n - 1, (1 + LEVEL) / 2))
    return Difference(mean, mean - half, mean + half, float(2 * stdtr(n - 1, -abs(mean) / error)), n)


def by_seed(given: Found, wanted: Any, factor: float) -> dict[int, float]:
    """A metric by seed of one row of a JSON file."""
    row, metric = row_of(given, wanted), given.get("metric", "value")
    return {int(seed): factor * values[metric] for seed, values in row.items()}


def row_of(given: Found, wanted: Any) -> Mapping[str, Found]:
    """The runs of one row of a JSON file by seed: of the row with this name, or with these facts in a list of rows."""
    content = json.loads((ROOT / given["file"]).read_text())
    if isinstance(content, list):
        [row] = [row for row in content if wanted.items() <= row.items()]
    else:
        rows = content[given["task"]]["rows"] if "task" in given else content
        row = rows[wanted]
    found: Mapping[str, Found] = row.get("seeds", row)
    return found


def difference(given: Found, factor: float) -> Difference:
    """Of ours from theirs, from whatever was kept of the runs."""
    if "means" in given:
        return unpaired(*given["means"])
    if "stated" in given:
        mean, low, high, n = given["stated"]
        error = Difference(mean, low, high, None, n).error
        assert error is not None
        return Difference(mean, low, high, interval(mean, error, n).p, n)
    if "rows" in given:
        ours, theirs = (by_seed(given, row, factor) for row in given["rows"])
    else:
        ours, theirs = ({int(seed): pair[i] for seed, pair in given["values"].items()} for i in (0, 1))
    found = paired(ours, theirs)
    assert found is not None
    return found


def with_difference(given: Found, found: Difference, margin: float | None) -> dict[str, Any]:
    def short(value: float | None, digits: int = 3) -> float | None:
        return None if value is None else round(value, digits)

    facts: dict[str, Any] = {
        "mean": short(found.mean),
        "low": short(found.low),
        "high": short(found.high),
        "n": found.n,
    }
    facts |= {"p": short(found.p, 5), "detectable": short(found.detectable), "verdict": verdict(found, margin)}
    return {**given, **facts}


def with_percentile(given: Found) -> dict[str, Any]:
    """Percentiles of one selector: better than chance if p < 0.05 over all choices and among those of equal size.

    With few choices, some tests cannot have p < 0.05 (`Permuted.p_least`); the verdict is then "no test".
    """
    selector = json.loads((ROOT / given["file"]).read_text())["selectors"][given["selector"]]
    equal = selector["equal_size"]
    facts = {"percentile": selector["percentile"], "p": round(selector["p"], 5), "n": len(selector["seeds"])}
    facts |= {"percentile_equal_size": equal["percentile"], "p_equal_size": round(equal["p"], 5)}
    facts |= {"p_least": round(selector["p_least"], 5), "p_least_equal_size": round(equal["p_least"], 5)}
    tests = [verdict_of(selector["p"], selector["p_least"]), verdict_of(equal["p"], equal["p_least"])]
    return {**given, **facts, "verdict": next((word for word in ("no test", "not shown") if word in tests), "better")}


def verdict_of(p: float, least: float) -> str:
    """``better``, ``not shown``, or ``no test`` if the lowest possible p would not be below 0.05."""
    level = round(1 - LEVEL, 10)  # 1 - 0.95 is a little more than 0.05
    return "better" if p < level else "no test" if least >= level else "not shown"


def with_draws(given: Found) -> dict[str, Any]:
    """Better than chance if p < 0.05 with the choices of all seeds taken as one; `verdict_of` for the words."""
    seeds = json.loads((ROOT / given["file"]).read_text())[given["column"]]
    _, gain = selection_draws.over_seeds(seeds, "validation")
    _, together = selection_draws.tests(seeds, "validation")
    assert gain.low is not None and gain.high is not None and together is not None
    facts = {"mean": round(100 * gain.mean, 3), "low": round(100 * gain.low, 3), "high": round(100 * gain.high, 3)}
    facts |= {"n": gain.n, "p_one_choice": round(together.p, 5), "p_least": round(together.p_least, 5)}
    return {**given, **facts, "verdict": verdict_of(together.p, together.p_least)}


def filled(content: Found) -> dict[str, Any]:
    """The content of claims.json with all derived figures."""
    claims = []
    for claim in content["claims"]:
        measured = []
        for one in claim["measured"]:
            margin, factor = (None, 1) if "unit" in one else (content["margin"], 100)
            if "differences" in one:
                found = [with_difference(d, difference(d, factor), margin) for d in one["differences"]]
                one = one | {"differences": found}
            elif "percentile" in one:
                one = one | {"percentile": with_percentile(one["percentile"])}
            elif "draws" in one:
                one = one | {"draws": with_draws(one["draws"])}
            measured.append(one)
        claims.append(claim | {"measured": measured})
    return {**content, "claims": claims}


# --- table ---


def ranged(found: Found, digits: int = 1) -> str:
    """Mean and interval."""
    text = f"{found['mean']:+.{digits}f}"
    if found["low"] is not None:
        text += f" ({found['low']:.{digits}f} to {found['high']:.{digits}f})"
    return text.replace("-", "−")


def least(p: float) -> str:
    return f"lowest possible {p:.3f}"


def measured_cells(one: Found) -> tuple[str, str, list[str]]:
    """n, the figures and the verdicts of one measurement."""
    if "exact" in one:
        return str(len(one["seeds"]) or ""), one["exact"]["found"], [one["exact"]["verdict"]]
    if "percentile" in one:
        p = one["percentile"]
        figures = f"percentile {p['percentile']:.0f}, p = {p['p']:.3f} ({least(p['p_least'])}); at equal size "
        figures += f"{p['percentile_equal_size']:.0f}, p = {p['p_equal_size']:.3f} "
        figures += f"({least(p['p_least_equal_size'])})"
        return str(p["n"]), figures, [p["verdict"]]
    if "draws" in one:
        d = one["draws"]
        p = f"as one choice p = {d['p_one_choice']:.3f} ({least(d['p_least'])})"
        return str(d["n"]), f"{ranged(d)}; {p}", [d["verdict"]]
    found = one["differences"]
    figures = "; ".join(f"{d['of']}: {ranged(d, one.get('digits', 1))}".removeprefix(": ") for d in found)
    return " to ".join(str(n) for n in sorted({d["n"] for d in found})), figures, [d["verdict"] for d in found]


def summary(content: Found) -> str:
    """Markdown: a row for each claim, with the range of its differences and the number of each verdict."""
    head = ["claim of the paper", "the paper's figure", "measured here", "seeds", "verdict"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for claim in content["claims"]:
        cells = [measured_cells(one) for one in claim["measured"]]
        verdicts = Counter(word for _, _, words in cells for word in words)
        all_of_them = ", ".join(f"{word} {n}" if len(verdicts) > 1 else word for word, n in verdicts.most_common())
        seeds = sorted({int(n) for one, _, _ in cells for n in one.split(" to ") if n})
        said = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else "".join(map(str, seeds))
        name = f"{claim['claim']} ({claim['paper']})"
        lines.append(f"| {name} | {claim['says']} | {in_short(claim)} | {said} | **{all_of_them}** |")
    return "\n".join(lines)


def in_short(claim: Found) -> str:
    """The differences of a claim in points: how many, their range and median; or the first finding in words."""
    measured = [one for one in claim["measured"] if "unit" not in one]
    means = [d["mean"] for one in measured for d in (*one.get("differences", ()), one.get("draws")) if d]
    if not means:
        first = claim["measured"][0]
        unit = f"{first['unit']}: " if "differences" in first else ""
        return unit + measured_cells(first)[1]
    middle = statistics.median(means)
    found = f"{len(means)} differences from {min(means):+.1f} to {max(means):+.1f} points, median {middle:+.1f}"
    return found.replace("-", "−")


def table(content: Found) -> str:
    """Markdown: a bold row for each claim, then a row for each measurement."""
    head = ["claim of the paper, and what was measured", "n", "difference, points (95 %)", "verdict", "where"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for claim in content["claims"]:
        lines.append(f"| **{claim['claim']}** ({claim['paper']}) | | paper: {claim['says']} | | |")
        for one in claim["measured"]:
            n, figures, words = measured_cells(one)
            file = "below" if not one["where"] else Path(one["where"]).stem
            kept = "°" if one["record"] == "kept" else ""
            link = f"[{file}]({one['where']}{one['section']}){kept}"
            one_word = words[0] if len(set(words)) == 1 else "; ".join(words)
            lines.append(f"| {one['on']} | {n} | {figures} | {one_word} | {link} |")
    return "\n".join(lines)


def counted(content: Found) -> str:
    """One paragraph: how many intervals exclude 0, and what the comparisons could have shown."""
    measured = [one for claim in content["claims"] for one in claim["measured"] if "unit" not in one]
    every = [(f"{one['on'].split(' (')[0]}, {d['of']}", d) for one in measured for d in tested(one)]
    apart = sum(d["low"] > 0 or d["high"] < 0 for _, d in every)
    adjusted = holm([d["p"] for _, d in every])
    remain = [name for (name, _), p in zip(every, adjusted, strict=True) if p < 1 - LEVEL]
    could = [d["detectable"] for _, d in every]
    named = f"{len(remain)} would be significant: {'; '.join(remain)}" if remain else "none would be significant"
    named += f" (smallest p {min(adjusted):.2f})"
    return (
        f"{len(every)} differences are in points. The interval of {apart} does not include 0. After Holm's correction "
        f"for all, {named}. With a probability of 80 % these comparisons find a difference of {min(could):.1f} points "
        f"at best, and of {statistics.median(could):.1f} in the median."
    )


def tested(one: Found) -> list[Found]:
    """The differences of a measurement that have an interval."""
    return [d for d in one.get("differences", ()) if d["low"] is not None]


# --- picture ---


def rows(content: Found) -> Iterator[tuple[str, Found | None]]:
    """(label, difference) for the picture; a claim's title has no difference."""
    for claim in content["claims"]:
        found = []
        for one in claim["measured"]:
            if "unit" not in one:
                on = one["on"].split(" (")[0]
                found += [(f"{on}: {d['of']}".removesuffix(": "), d) for d in tested(one)]
                found += [(f"{on} (p = {d['p_one_choice']:.2f})", d) for d in [one.get("draws")] if d]
        if found:
            yield f"{claim['claim']} ({claim['paper']})", None
            yield from found


def picture(content: Found, file: Path, limit: float = 8.0) -> None:
    """Every difference in points with its interval, and the band in which a difference does not matter."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    lines = list(rows(content))
    figure = Figure(figsize=(10, 0.21 * len(lines) + 0.9), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(-content["margin"], content["margin"], color="#0072b2", alpha=0.15, lw=0)
    axes.axvline(0, color="k", lw=0.8)
    for y, (label, found) in enumerate(lines):
        bold = "bold" if found is None else "normal"
        axes.text(-limit * 1.02, y, label, ha="right", va="center", size=8, weight=bold)
        if found is None:
            continue
        colour = COLOURS.get(found["verdict"], COLOURS["undecided"])
        low, high = max(found["low"], -limit), min(found["high"], limit)
        axes.plot([low, high], [y, y], color=colour, lw=1.6)
        if abs(found["mean"]) <= limit:
            axes.plot(found["mean"], y, "o", color=colour, ms=4)
        for end in (found["low"], found["high"]):
            if abs(end) > limit:  # the interval goes on
                axes.plot(math.copysign(0.98 * limit, end), y, "<" if end < 0 else ">", color=colour, ms=5)
        axes.text(limit * 1.03, y, ranged(found), ha="left", va="center", size=8, color=colour)
    axes.set_xlim(-limit, limit)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_yticks([])
    axes.grid(axis="x", lw=0.3)
    axes.set_xlabel("difference in points; right of 0 is as the paper claims")
    axes.spines[["top", "right", "left"]].set_visible(False)
    names = {"undecided": "undecided, not shown or no test"}
    legend = [Line2D([], [], color=c, marker="o", ms=4, label=names.get(name, name)) for name, c in COLOURS.items()]
    axes.legend(handles=legend, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False, fontsize=8)
    figure.savefig(file, dpi=110)


def text(content: Found) -> str:
    picture_line = "![differences of all claims with their intervals](images/claims.png)"
    return f"{summary(content)}\n\n{counted(content)}\n\n{picture_line}"


def main() -> None:
    content = filled(json.loads(DATA.read_text()))
    write_text(DATA, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    picture(content, PAGE.parent / "images" / "claims.png")
    put(PAGE, "claims", text(content))
    put(PAGE, "measurements", table(content))


if __name__ == "__main__":
    main()
