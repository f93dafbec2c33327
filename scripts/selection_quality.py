"""The rank of each selector's choice among all possible choices, from the runs of experiment=selection_quality.

    python scripts/selection_quality.py outputs/selection_quality-small
    python scripts/selection_quality.py <folder> --page docs/background/selection.md      # puts table and picture there
    python scripts/selection_quality.py docs/background/data/selection_digits.json        # the same table without runs

The worth of a subset of the modules is the mean over seeds of the main metric of its own runs: those with a list as
`method.selection`. A selector chooses one subset per seed; its percentile is the share of subsets with a lower worth,
and equal ones count half, so a random choice is at 50 on average. Subsets differ in parameters, so the percentile is
also computed among those of equal size. The selector's own fine-tuning runs are not used: every selector is judged by
the worth of the subset that it chose.

The interval of a percentile is Student's t over seeds. It shows how alike the choices are. Whether choices track worth
is tested by shuffling the modules' labels: p is the share of shuffles in which the same choices, with new labels, are
at least as high. For the p at equal size, only modules with equally many parameters change places.
"""

import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pages import Run, checked, completed, put
from scipy.special import fdtrc

from diffora.core.parts import short_names
from diffora.files import write_text
from diffora.report.agreement import stability
from diffora.report.permutation import choices_track_worth
from diffora.report.statistics import paired

Subset = tuple[tuple[str, ...], ...]


def subset_of(run: Run) -> Subset:
    return tuple(tuple(row) for row in run["selection"]["selected"])


def percentile(values: Mapping[Subset, float], chosen: Subset) -> float:
    """Percentile of one subset among all, 0 to 100; equal values, its own included, count half."""
    mine, others = values[chosen], list(values.values())
    return 100 * (sum(v < mine for v in others) + 0.5 * sum(v == mine for v in others)) / len(others)


def landscape(runs: Sequence[Run], metric: str) -> tuple[dict[Subset, dict[int, float]], dict[Subset, int]]:
    """(each subset's metric by seed, with the seeds that all subsets have; each subset's adapter parameters).

    Raises:
        SystemExit: subsets are missing, so selectors that chose them could not be judged; or the subsets' runs do not
            belong together (`checked`).
    """
    found: dict[Subset, dict[int, float]] = defaultdict(dict)
    sizes: dict[Subset, int] = {}
    given = [run for run in runs if run["selection"]["selector"] == "given"]
    for run in checked(given, apart=("method.selection",)):
        found[subset_of(run)][run["seed"]] = run["metrics"][f"validation/{metric}"]
        sizes[subset_of(run)] = run["params"]["adapter"]
    types = {name for subset in found for row in subset for name in row}
    wanted = math.prod(math.comb(len(types), len(row)) for row in next(iter(found)))
    seeds = set[int].intersection(*(set(by_seed) for by_seed in found.values()))
    if len(found) < wanted or not seeds:
        sys.exit(f"error: {len(found)} of {wanted} subsets, {len(seeds)} seeds of all of them: the sweep is not done")
    return {subset: {seed: by_seed[seed] for seed in sorted(seeds)} for subset, by_seed in found.items()}, sizes


def standing(chosen: Mapping[int, Subset], among: Callable[[Subset], Mapping[Subset, float]]) -> dict[str, Any]:
    """Percentile of a selector's choices, one per seed, among other subsets: mean and interval; mean gain over them.

    The interval is cut at the lowest and the highest possible percentile.
    """
    at = {seed: percentile(among(subset), subset) for seed, subset in chosen.items()}
    possible = [percentile(among(s), other) for s in chosen.values() for other in among(s)]
    against = paired(at, dict.fromkeys(at, 50.0))
    assert against is not None
    return {
        "percentile": 50 + against.mean,
        "low": None if against.low is None else max(min(possible), 50 + against.low),
        "high": None if against.high is None else min(max(possible), 50 + against.high),
        "gain": statistics.mean(among(s)[s] - statistics.mean(among(s).values()) for s in chosen.values()),
        "chosen": [[[list(row) for row in chosen[seed]], at[seed]] for seed in sorted(at)],
    }


def flags(subset: Sequence[Sequence[str]], types: Sequence[str]) -> list[bool]:
    """Which modules of the grid a subset has, layer by layer."""
    return [kind in row for row in subset for kind in types]


def sizes_of_modules(sizes: Mapping[Subset, int], types: Sequence[str]) -> list[int]:
    """Parameters of each module's adapter, from those of all subsets."""
    masks, totals = np.array([flags(subset, types) for subset in sizes], dtype=float), np.array(list(sizes.values()))
    found: list[int] = np.linalg.lstsq(masks, totals, rcond=None)[0].round().astype(int).tolist()
    return found


def tested(found: dict[str, Any]) -> dict[str, Any]:
    """The same with the permutation tests of all selectors, and with the F-test of the subsets.

    The F-test is one-way: subsets against the runs of a subset, whose spread includes what their seeds have in common.
    """
    types, layers = found["types"], len(found["worth"][0][0])
    sign = 1 if found["best"] >= found["worst"] else -1
    subsets = np.array([flags(subset, types) for subset, _ in found["worth"]])
    worth = [sign * value for _, value in found["worth"]]
    layer = np.repeat(np.arange(layers), len(types))
    of_module = np.array(found["module_sizes"])
    alike = np.unique(np.stack([layer, of_module]), axis=1, return_inverse=True)[1].ravel()
    for selector in found["selectors"].values():
        chosen = np.array([flags(subset, types) for subset, _ in selector["chosen"]])
        every = choices_track_worth(chosen, subsets, worth, layer)
        equal = choices_track_worth(chosen, subsets, worth, alike, subsets @ of_module)
        for of, test in ((selector, every), (selector["equal_size"], equal)):
            of |= {"p": test.p, "p_worse": test.p_worse, "p_least": test.p_least, "exact": test.exact}
    if found["reliability"] is not None:
        n, seeds = len(worth), found["seeds_of_a_subset"]
        f = 1 / max(1 - found["reliability"], 1e-12)
        found["subsets_f"], found["subsets_p"] = f, float(fdtrc(n - 1, n * (seeds - 1), f))
        found["subsets_sd"] = math.sqrt(max(0.0, found["reliability"]) * statistics.variance(worth))
    return found


def quality(runs: Sequence[Run]) -> dict[str, Any]:
    """For each selector, by row: its percentile among all subsets and among those of equal size; tests; stability.

    Raises:
        SystemExit: the runs do not belong together (`checked`), or subsets are missing.
    """
    metric = checked(runs)[0]["main_metric"]
    sign = 1 if runs[0]["metric_facts"][metric]["maximise"] else -1
    by_seed, sizes = landscape(runs, metric)
    means = {subset: sign * statistics.mean(values.values()) for subset, values in by_seed.items()}
    seeds = len(next(iter(by_seed.values())))
    noise = [statistics.variance(values.values()) / seeds for values in by_seed.values()] if seeds > 1 else []
    rows: dict[str, dict[int, Subset]] = defaultdict(dict)
    for run in runs:
        if run["selection"]["selector"] != "given":
            rows[run["row"]][run["seed"]] = subset_of(run)
    groups: dict[int, dict[Subset, float]] = defaultdict(dict)
    for subset, value in means.items():
        groups[sizes[subset]][subset] = value
    types = sorted({name for subset in means for row in subset for name in row})
    result: dict[str, Any] = {
        "metric": metric,
        "types": types,
        "module_sizes": sizes_of_modules(sizes, types),
        "subsets": len(means),
        "seeds_of_a_subset": seeds,
        "chance": sign * statistics.mean(means.values()),
        "best": sign * max(means.values()),
        "worst": sign * min(means.values()),
        "reliability": 1 - statistics.mean(noise) / statistics.variance(means.values()) if noise else None,
        "sizes": [
            [size, len(group), sign * statistics.mean(group.values()), sign * max(group.values())]
            for size, group in sorted(groups.items())
        ],
        "selectors": {},
        "worth": [[[list(row) for row in subset], sign * value] for subset, value in sorted(means.items())],
    }
    for name, chosen in rows.items():
        masks = np.array([[[t in row for t in types] for row in subset] for subset in chosen.values()])
        alike = stability(masks, by_layer=True) if len(masks) > 1 else None
        overall = standing(chosen, lambda subset: means)
        result["selectors"][name] = {
            "seeds": sorted(chosen),
            **overall,
            "share": overall["gain"] / (max(means.values()) - statistics.mean(means.values())),
            "equal_size": standing(chosen, lambda subset: groups[sizes[subset]]),
            "jaccard": None if alike is None else alike.jaccard,
            "jaccard_chance": None if alike is None else alike.chance,
        }
    return tested(result)


def probability(p: float) -> str:
    """``= 0.012`` or ``< 0.001``."""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def table(found: Mapping[str, Any]) -> str:
    """Markdown."""

    def place(of: Mapping[str, Any]) -> str:
        interval = "" if of["low"] is None else f" ({of['low']:.0f} to {of['high']:.0f})"
        return f"{of['percentile']:.0f}{interval}"

    head = ["selector", "seeds", "percentile, mean (95 %)", "p", "gain over chance", "of the possible gain"]
    head += ["percentile at equal size", "p there", "gain there", "seeds agree"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, s in sorted(found["selectors"].items(), key=lambda item: -item[1]["percentile"]):
        alike = "" if s["jaccard"] is None else f"{s['jaccard']:.2f} (chance {s['jaccard_chance']:.2f})"
        equal = s["equal_size"]
        cells = [name, str(len(s["seeds"])), place(s), f"{s['p']:.3f}", f"{s['gain']:+.4f}", f"{s['share']:.0%}"]
        cells += [place(equal), f"{equal['p']:.3f}", f"{equal['gain']:+.4f}", alike]
        lines.append(f"| {' | '.join(cells)} |")
    of_all = (
        f"{found['subsets']} subsets, {found['seeds_of_a_subset']} seeds each, {found['metric']}: "
        f"worst {found['worst']:.3f}, mean {found['chance']:.3f}, best {found['best']:.3f}."
    )
    if found["reliability"] is not None:
        of_all += (
            f" {found['reliability']:.0%} of the variance between their means is not noise of seeds "
            f"(F = {found['subsets_f']:.1f}, p {probability(found['subsets_p'])}); without this noise, their standard "
            f"deviation is {found['subsets_sd']:.4f}."
        )
    by_size = "; ".join(f"{n} with {size:,} parameters, mean {mean:.3f}" for size, n, mean, _ in found["sizes"])
    return f"{of_all}\nBy size: {by_size}.\n\n" + "\n".join(lines)


def picture(found: Mapping[str, Any], file: Path) -> None:
    """The worth of each subset, in order, and how often each selector chose it."""
    from matplotlib.figure import Figure

    worth = sorted(found["worth"], key=lambda item: item[1])
    names = [" | ".join(", ".join(short_names(row)) for row in subset) for subset, _ in worth]
    at = {json.dumps(subset): i for i, (subset, _) in enumerate(worth)}
    selectors = sorted(found["selectors"], key=lambda name: -found["selectors"][name]["percentile"])
    figure = Figure(figsize=(8.6, 0.42 * len(selectors) + 3.6), layout="constrained")
    top, low = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 0.32 * len(selectors)])
    top.bar(range(len(worth)), [value for _, value in worth], color="#8fb3d9")
    values = [value for _, value in worth]
    margin = 0.15 * (max(values) - min(values))
    top.set_ylim(min(values) - margin, max(values) + margin)
    top.axhline(found["chance"], color="k", lw=0.8, ls=":")
    top.set_ylabel(found["metric"])
    for i, name in enumerate(selectors):
        counts: dict[int, int] = defaultdict(int)
        for subset, _ in found["selectors"][name]["chosen"]:
            counts[at[json.dumps(subset)]] += 1
        low.scatter(list(counts), [i] * len(counts), s=[28 * n for n in counts.values()], color="#d55e00", alpha=0.8)
    low.set_yticks(range(len(selectors)), selectors)
    low.set_ylim(len(selectors) - 0.5, -0.5)
    low.set_xticks(range(len(worth)), names, rotation=60, ha="right", size=8)
    low.grid(axis="y", lw=0.4)
    for axes in (top, low):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the runs, or the JSON file that --page wrote from them")
    parser.add_argument("--column", default="paraphrase", help="of the experiment's columns; not for a JSON file")
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    if given.folder.suffix == ".json":
        found, name = tested(json.loads(given.folder.read_text())), given.folder.stem
    else:
        runs = [run for run in completed(given.folder) if run["column"] == given.column]
        if not any(run["selection"]["selector"] == "given" for run in runs):
            sys.exit(f"error: no finished run of a given subset for {given.column} below {given.folder}")
        found, name = quality(runs), f"selection_{given.column}"
    print(table(found))
    if given.page is not None:
        file = given.page.parent / "images" / f"{name}.png"
        picture(found, file)
        write_text(given.page.parent / "data" / f"{name}.json", json.dumps(found, indent=1) + "\n")
        put(
            given.page,
            name,
            f"{table(found)}\n\n![worth of every subset, and what selectors chose](images/{file.name})",
        )


if __name__ == "__main__":
    main()
