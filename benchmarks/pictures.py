"""The pictures of docs/results/performance.md, made from the results of the benchmarks."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from benchmarks.markdown import NAMES

Result = Mapping[str, Any]

COLOURS = {
    "floor": "#999999",
    "lora": "#0072b2",
    "lora_dropout": "#56b4e9",
    "plain": "#7570b3",
    "plain_dropout": "#b3b0d9",
    "peft": "#d55e00",
    "peft_dropout": "#e69f00",
    "adalora": "#cc79a7",
    "full_ft": "#444444",
    "alternating": "#009e73",
    "simultaneous": "#00c08b",
    "two_floors": "#bbbbbb",
    "two_peft_steps": "#b34700",
}


def steps(step: Result) -> Figure:
    """Step time of each contender divided by the floor's in the same round, one panel per group, with quartiles."""
    groups = {name: group for name, group in step["shapes"].items() if group["floor"] == "floor"}
    panels, figure = _panels(groups, columns=3)
    for axes, group in panels:
        found = {name: c["over_floor"] for name, c in group["contenders"].items() if name != "floor"}
        for i, (name, value) in enumerate(found.items()):
            whiskers = [[value["median"] - value["q1"]], [value["q3"] - value["median"]]]
            axes.barh(i, value["median"], color=COLOURS[name], xerr=whiskers, error_kw={"lw": 0.8})
        axes.axvline(1, color="0.3", lw=0.8, ls="--")
        axes.set_yticks(range(len(found)), [NAMES[name] for name in found])
    figure.supxlabel("step over the floor's (dashed), median and quartiles", size=9)
    return figure


def memory(step: Result) -> Figure:
    """Memory that a step of each contender adds, one panel per group."""
    measured = {name: g for name, g in step["shapes"].items() if "step_mb" in next(iter(g["contenders"].values()))}
    panels, figure = _panels(measured, columns=3)
    for axes, group in panels:
        names = list(group["contenders"])
        values = [group["contenders"][name]["step_mb"] for name in names]
        axes.barh(range(len(names)), values, color=[COLOURS[name] for name in names])
        axes.set_yticks(range(len(names)), [NAMES[name] for name in names])
    figure.supxlabel("MB that a step adds at its peak", size=9)
    return figure


def _panels(groups: Mapping[str, Result], columns: int) -> tuple[list[tuple[Any, Result]], Figure]:
    """An empty panel with a title for each group. Horizontal bars fill it from the top."""
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(3.6 * min(columns, len(groups)), 1.9 * rows + 0.4), layout="constrained")
    found = figure.subplots(rows, min(columns, len(groups)), squeeze=False)
    for axes in found.flat[len(groups) :]:
        axes.set_visible(False)
    for axes, name in zip(found.flat, groups, strict=False):
        axes.set_title(name, size=8)
        axes.invert_yaxis()
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return list(zip(found.flat, groups.values(), strict=False)), figure


def scaling(scale: Result) -> Figure:
    """Time and memory against each quantity that is varied, on logarithmic axes."""
    sweeps = scale["sweeps"]
    figure = Figure(figsize=(2.3 * len(sweeps) + 1.2, 4.6), layout="constrained")
    panels = figure.subplots(2, len(sweeps), squeeze=False, sharey="row", sharex="col")
    for column, (name, sweep) in enumerate(sweeps.items()):
        x = [int(value) for value in sweep["points"]]
        for row, label in enumerate(("ms a step", "MB a step adds")):
            axes = panels[row, column]
            for contender in sweep["exponents"]:
                costs = [point[contender] for point in sweep["points"].values()]
                y = [cost["ms"]["median"] if row == 0 else cost["step_mb"] for cost in costs]
                line = axes.plot(x, y, "o-", ms=3, lw=1.3, color=COLOURS[contender], label=NAMES[contender])[0]
                if row == 0:
                    low, high = ([cost["ms"][q] for cost in costs] for q in ("q1", "q3"))
                    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, lw=0)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.set_xticks(x, [str(value) for value in x])
            axes.minorticks_off()
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axes.set_ylabel(label, size=9)
        panels[1, column].set_xlabel(name, size=9)
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=8
    )
    return figure


def run(run: Result) -> Figure:
    """The parts of a whole run, one bar for each side."""
    names = list(dict.fromkeys(part for parts in run["parts"].values() for part in parts))
    figure = Figure(figsize=(8.6, 1.9), layout="constrained")
    axes = figure.subplots()
    for i, (_, parts) in enumerate(run["parts"].items()):
        left = 0.0
        for name, seconds in parts.items():
            axes.barh(i, seconds, left=left, color=f"C{names.index(name)}", label=name)
            left += max(0.0, seconds)
    found = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    axes.set_yticks(range(len(run["parts"])), ["ours" if n == "diffora" else NAMES[n] for n in run["parts"]], size=8)
    axes.invert_yaxis()
    axes.set_xlabel("seconds", size=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(found.values(), found.keys(), loc="outside upper center", ncols=5, frameon=False, fontsize=8)
    return figure
