"""Selections in the whole backbone, with and without sharing, at one scale: the runs of experiment=selection_matters.

    python scripts/selection_matters.py outputs/selection_matters-small --column digits
    python scripts/selection_matters.py <folder> --column digits --page docs/background/selection.md    # puts it there
    python scripts/selection_matters.py docs/background/data/selection_matters_digits.json    # the same without runs

An update is s B A with s = alpha / r, so pairs of different ranks have different scales at one alpha. Runs are grouped
by the scale of their own pairs and that of their shared pairs. Differences are paired over seeds, with Student's t;
verdicts are those of `diffora.report.statistics.verdict` with a margin of half a point. "could find" is the smallest
true difference that this many seeds find with a probability of 80 %, if differences vary as they do here.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pages import Run, checked, completed, points, put

from diffora.files import write_text
from diffora.report.statistics import Difference, detectable, holm, paired, spread, verdict

SPLITS = "validation", "held_out"
MARGIN = 0.005
SCALES = (None, 2.0, 4.0)
"""The columns: the task's alpha for all ranks (None), and all pairs at one scale."""
COMPARED = (
    ("search", "random"),
    ("search, alone", "random, alone"),
    ("search", "search, alone"),
    ("random", "random, alone"),
    ("sharing alone", "random, alone"),
    ("LoRA, r = 2", "search, alone"),
    ("LoRA, r = 2", "random, alone"),
)


def scales_of(run: Run) -> tuple[float | None, float | None]:
    """s of the pairs that belong to one module, and s of shared pairs; None if there are none."""
    settings, method = run["settings"], run["settings"]["method"]
    own = method["alpha"] / settings["rank"] if settings.get("rank") else None
    if not method.get("weight_sharing", "shared_rank" in method):
        return own, None
    return own, own if method.get("shared_scale") == "same" else method["alpha"] / method["shared_rank"]


def rows_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """For each row of the experiment: what it is, its scales, and its metrics by seed with the hash of each run.

    Raises:
        SystemExit: the runs do not belong together (`pages.checked`).
    """
    found: dict[str, dict[str, Any]] = {}
    for run in checked(runs):
        own, shared = scales_of(run)
        name = re.sub(r", s = \d+$", "", run["row"])
        row = found.setdefault(run["row"], {"row": run["row"], "name": name, "own": own, "shared": shared, "seeds": {}})
        metrics = {split: run["metrics"][f"{split}/{run['main_metric']}"] for split in SPLITS}
        facts = {"parameters": run["params"]["adapter"], "config_hash": run["config_hash"]}
        row["seeds"][str(run["seed"])] = metrics | facts
    return sorted(found.values(), key=lambda row: (row["name"], row["own"] or 0, row["shared"] or 0))


def at(rows: Sequence[Mapping[str, Any]], name: str, scale: float | None) -> Mapping[str, Any] | None:
    """The row of this name whose pairs all have this scale; with None, the one at the task's alpha."""
    fits = [
        row for row in rows if row["name"] == name and (row["row"] == name if scale is None else scales(row) == {scale})
    ]
    return fits[0] if fits else None


def scales(row: Mapping[str, Any]) -> set[float]:
    return {row["own"], row["shared"]} - {None}


def by_seed(row: Mapping[str, Any], split: str) -> dict[int, float]:
    return {int(seed): values[split] for seed, values in row["seeds"].items()}


def heading(scale: float | None) -> str:
    return "one α" if scale is None else f"s = {scale:g}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: accuracy by scale, then the differences."""
    head = ["", "parameters", *(f"{heading(scale)}{more}" for more in ("", ", held_out") for scale in SCALES)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in dict.fromkeys(row["name"] for row in rows):
        present = [at(rows, name, scale) for scale in SCALES]
        sizes = sorted({s["parameters"] for row in present if row for s in row["seeds"].values()})
        size = f"{sizes[0]:,}" + (f" to {sizes[-1]:,}" if len(sizes) > 1 else "")
        cells = [mean(row, split) for split in SPLITS for row in present]
        if present[0]:  # the scales that one alpha gives
            cells[0] += " (" + ", ".join(f"s = {s:g}" for s in (present[0]["own"], present[0]["shared"]) if s) + ")"
        lines.append(f"| {name} | {size} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *differences(rows)])


def mean(row: Mapping[str, Any] | None, split: str) -> str:
    """Mean and standard deviation in per cent."""
    found = None if row is None else spread(by_seed(row, split).values())
    if found is None:
        return ""
    return f"{100 * found.mean:.2f}" + (f" ± {100 * found.std:.2f}" if found.std is not None else "")


def compared(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, dict[str, Difference]]]:
    """(what, at which scale, the difference on each split), also of one row at two scales. The same runs come once."""
    pairs: dict[tuple[str, str], tuple[str, str, Mapping[str, Any], Mapping[str, Any]]] = {}
    for scale in SCALES:
        for ours, theirs in COMPARED:
            one, other = at(rows, ours, scale), at(rows, theirs, scale)
            if one is not None and other is not None:
                both = " and ".join(f"{s:g}" for s in sorted(scales(one) | scales(other)))
                pairs.setdefault((one["row"], other["row"]), (f"{ours} − {theirs}", f"s = {both}", one, other))
    for name in dict.fromkeys(row["name"] for row in rows):
        one, other = at(rows, name, 4.0), at(rows, name, 2.0)
        if one is not None and other is not None:
            pairs[one["row"], other["row"]] = name, "s = 4 − s = 2", one, other
    found = []
    for what, which, one, other in pairs.values():
        each = {split: paired(by_seed(one, split), by_seed(other, split)) for split in SPLITS}
        known = {split: one for split, one in each.items() if one is not None}
        found += [(what, which, known)] if len(known) == len(SPLITS) else []
    return found


def differences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    head = ["difference, points (95 %)", "scale", "validation", "p, Holm", "could find", "verdict"]
    head += ["held_out", "p, Holm", "verdict"]
    found = compared(rows)
    adjusted = {split: iter(holm([p_of(pairs[split]) for _, _, pairs in found])) for split in SPLITS}
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for what, scale, pairs in found:
        cells = [what, scale]
        for split in SPLITS:
            one = pairs[split]
            cells += [points(one), f"{next(adjusted[split]):.2f}"]
            if split == "validation":
                least = None if one.error is None else detectable(one.error * math.sqrt(one.n), one.n)
                cells.append("" if least is None else f"{100 * least:.1f}")
            cells.append(verdict(one, MARGIN))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def p_of(found: Difference) -> float:
    """The p-value; 1 where all differences are the same, which have none."""
    return 1.0 if found.p is None else found.p


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the runs, or the JSON file that --page wrote from them")
    parser.add_argument("--column", default="digits", help="of the experiment's columns; not for a JSON file")
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    if given.folder.suffix == ".json":
        rows, name = json.loads(given.folder.read_text()), given.folder.stem
    else:
        rows = rows_of([run for run in completed(given.folder) if run["column"] == given.column])
        name = f"selection_matters_{given.column}"
    if not rows:
        sys.exit(f"error: no finished run of {given.column} below {given.folder}")
    print(table(rows))
    if given.page is not None:
        write_text(given.page.parent / "data" / f"{name}.json", json.dumps(rows, indent=1) + "\n")
        put(given.page, name, table(rows))


if __name__ == "__main__":
    main()
