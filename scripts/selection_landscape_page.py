"""The tables and the picture of `selection_landscape.py`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selection_quality import probability

KINDS = ("grid", "type", "layer")
"""Where a module may get its new score from: anywhere, a module of its type, a module of its layer."""
FEW = 10
"""A setting with fewer masks than this gets no table of selectors: only a nearly perfect order could be seen there."""


def first_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown of `anything_to_find`: one line for each column."""
    head = ["setting", "task", "runs", "masks × seeds", "mean", "sd of masks (95 %)", "sd of a run", "F", "p"]
    head += ["detectable sd", "not noise", "verdict"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, of in found.items():
        cells = [of["setting"], of["task"], str(of["runs"])]
        if "f" in of:
            cells += [f"{of['masks']} × {of['seeds']}", f"{of['mean']:.1f}"]
            cells += [f"{of['mask']:.2f} ({of['low']:.2f} to {of['high']:.2f})", f"{of['residual']:.2f}"]
            cells += [f"{of['f']:.2f}", probability(of["p"]).removeprefix("= "), f"{of['detectable']:.2f}"]
            cells += [f"{of['reliability']:.0%}", of["verdict"]]
        else:
            cells += [f"{of['all_masks']} × 1", f"{of['mean']:.1f}", *[""] * 6, "too few runs"]
        assert len(cells) == len(head), name
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def second_table(found: Mapping[str, Any]) -> str:
    """Markdown of one setting of `which_scores`: one line for each selector, the best first."""
    rows = found["selectors"]
    tasks = sorted({task for row in rows.values() for task in row["tasks"]})
    titles = [f"{task}, {found['masks'][task]} masks" + ", closed" * (task in found["closed"]) for task in tasks]
    head = ["selector", "seeds", *titles, "mean (95 % over tasks)", "p", "p, Holm", "p in type", "p in layer"]
    head += ["detectable", "as ensemble", "behind the best (95 %)"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, row in sorted(rows.items(), key=lambda item: -item[1].get("grid", {"value": -2})["value"]):
        seeds = sorted(set(row["seeds"].values()))
        cells = [name, " to ".join(str(n) for n in dict.fromkeys((seeds[0], seeds[-1])))]
        cells += [f"{row['tasks'][task]['value']:+.2f}" if task in row["tasks"] else "" for task in tasks]
        if "grid" not in row:
            why = "closed" if row["tasks"] else "all masks have one score"
            lines.append(f"| {' | '.join([*cells, why, *[''] * 7])} |")
            continue
        cells.append(with_interval(row["grid"]["value"], *row["interval"]))
        p_values = (row["grid"]["p"], row["p_holm"], *(row[kind]["p"] for kind in KINDS[1:]))
        cells += [probability(p).removeprefix("= ") for p in p_values]
        cells.append(f"{row['grid']['detectable']:.2f}")
        cells.append(f"{row['ensemble']:+.2f}" if seeds[-1] > 1 else "")
        behind = row.get("behind")
        cells.append("" if behind is None else with_interval(behind["mean"], behind["low"], behind["high"]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_interval(value: float, low: float | None, high: float | None) -> str:
    return f"{value:+.2f}" + ("" if low is None else f" ({low:+.2f} to {high:+.2f})")


def text_of(found: Mapping[str, Any]) -> str:
    """All tables as Markdown."""
    parts = ["**Is there anything to find?**", first_table(found["anything_to_find"])]
    for setting, pairs in found["tasks_agree"].items():
        listed = [
            f"{a} and {b} {rho:+.2f} (p {probability(one)} if worth is spread over modules, p {probability(other)} "
            "if over layers and types)"
            for a, b, _, rho, one, other in pairs
        ]
        parts.append(f"Worth of the same masks on two tasks, {setting or 'all'}, Spearman: {'; '.join(listed)}.")
    for setting, of in found["which_scores"].items():
        most = max(of["masks"].values())
        few = f"At most {most} masks: too few for a table. The figures are in the JSON file."
        parts.append(f"**Which scores rank selections? {setting}**\n\n{few if most < FEW else second_table(of)}")
    return "\n\n".join(parts)


def picture(found: Mapping[str, Any], file: Path) -> None:
    """A panel for each setting and task: each selector's correlation on the band of its shuffles."""
    from matplotlib.figure import Figure

    settings = {setting: of["selectors"] for setting, of in found["which_scores"].items()}
    tasks = sorted({task for rows in settings.values() for row in rows.values() for task in row["tasks"]})
    most = max(len(rows) for rows in settings.values())
    size = (2.4 + 1.8 * len(tasks), len(settings) * (0.9 + 0.2 * most))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(settings), len(tasks), squeeze=False)
    for line, (setting, rows) in zip(panels, settings.items(), strict=True):
        names = sorted(rows, key=lambda name: -rows[name].get("grid", {"value": -2})["value"])
        measured = [task for task in tasks if any(task in row["tasks"] for row in rows.values())]
        for axes in line[len(measured) :]:
            axes.set_visible(False)
        for axes, task in zip(line, measured, strict=False):
            for y, name in enumerate(names):
                if (of := rows[name]["tasks"].get(task)) is not None:
                    axes.barh(y, of["high"] - of["low"], left=of["low"], height=0.7, color="#d9d9d9")
                    axes.plot(of["value"], y, "o", ms=5, color="#d55e00" if of["p"] < 0.05 else "#555555")
            axes.axvline(0, color="k", lw=0.6)
            axes.set_xlim(-1, 1)
            axes.tick_params("x", labelsize=8)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_yticks(range(len(names)), names if task == measured[0] else [""] * len(names), size=8)
            axes.set_title(f"{task} {setting}".strip(), size=9)
            axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("Spearman with worth (grey: 95 % of shuffles; orange: p < 0.05)", size=9)
    figure.savefig(file, dpi=110)
