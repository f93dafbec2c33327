"""The pictures and tables of docs/results/performance.md, made from benchmarks/results: no figure is typed by hand.

    python -m benchmarks.plots

A table stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``. If its figures have not been measured, the
page shows the command that measures them.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import gpu_page
from benchmarks.markdown import NAMES, middle, table
from diffora.report.statistics import Difference, paired

REPO = Path(__file__).parents[1]
PAGE = REPO / "docs" / "results" / "performance.md"
IMAGES = REPO / "docs" / "results" / "images"
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
TARGETS = {
    "finetune/floor": ("a fine-tuning step over the floor, MiniLM 32 x 128, p = 0", "peft/floor@minilm_32x128", 1.06),
    "finetune/peft": ("a fine-tuning step over PEFT's, MiniLM 16 x 64, p = 0", None, 0.80),
    "finetune_dropout/peft": ("the same with dropout 0.1 on the input of A", None, 0.55),
    "bilevel/two_peft_steps": ("a bi-level step, simultaneous, 16 + 16 rows, over two PEFT steps of 16", None, None),
    "bilevel_alternating/two_peft_steps": ("the same, alternating as in the paper", None, None),
    "bilevel/peft": ("the same, simultaneous, over one PEFT step of 32 rows", None, None),
    "search_memory/peft_memory": ("memory of the simultaneous step over PEFT's, 32 rows each", None, 0.80),
    "search_memory_alternating/peft_memory": ("memory of the alternating step over PEFT's, 16 rows each", None, None),
    "search_memory/two_peft_steps_memory": ("simultaneous, 32 rows in a pass, over PEFT's with 16", None, None),
    "run/hf_trainer": ("MRPC, MiniLM, one epoch, command to metric, over Trainer + PEFT", None, 0.75),
    "run/hf_trainer_grouped": ("the same, Trainer told to group rows by length, as we do", None, None),
}
"""For each headline ratio: description, ratio of PEFT (None: 1, PEFT is the reference), largest ratio allowed."""


# --- tables ---


def machine(results: Mapping[str, Result | None]) -> str:
    lines = []
    for name, result in results.items():
        if result is None:
            continue
        m, versions = result["machine"], ", ".join(f"{package} {v}" for package, v in result["versions"].items())
        lines.append(
            f"- `{name}.json`: {m['cpu']}, {m['cores']} cores, {m['threads']} threads, {m['ram_gb']:.0f} GB, "
            f"{m['gpu'] or 'no GPU'}; load before the start {m['load_before']}; {versions}; {result['date']}"
        )
    return "\n".join(lines)


def ratios(step: Result) -> str:
    found, rows = step["ratios"], []
    for key, (what, peft, target) in TARGETS.items():
        mine = found.get(key)
        met = "" if mine is None or target is None else "yes" if mine["median"] <= target else "**no**"
        peers = "1" if peft is None else middle(found.get(peft))
        most = "" if target is None else f"{target:.2f}"
        rounds = "" if mine is None else str(mine["rounds"])
        rows.append([f"`{key}`", what, peers, most, middle(mine, 3), met, rounds])
    head = ["ratio", "what", "PEFT", "at most", "ours: median (quartiles)", "met", "rounds"]
    return table(head, rows)


def steps(step: Result) -> str:
    blocks = []
    for group, result in step["shapes"].items():
        rows = [
            [
                NAMES[name],
                middle(values["ms"], 0 if values["ms"]["median"] >= 100 else 1),
                middle(values["over_floor"]),
                f"{values['step_mb']:.0f}" if "step_mb" in values else "",
                f"{values['rss_mb']:.0f}" if "rss_mb" in values else "",
            ]
            for name, values in result["contenders"].items()
        ]
        head = ["contender", "ms: median (quartiles)", f"over {NAMES[result['floor']]}", "step MB", "process MB"]
        blocks.append(f"**{group}**, {step['settings']['rounds'][group]} rounds\n\n{table(head, rows)}")
    return "\n\n".join(blocks)


def other_ratios(step: Result) -> str:
    keys = dict.fromkeys(key.split("@")[0] for key in step["ratios"] if "@" in key)
    groups = [group for group in step["shapes"] if any(f"{key}@{group}" in step["ratios"] for key in keys)]
    rows = []
    for key in keys:
        found = [step["ratios"].get(f"{key}@{group}") for group in groups]
        rows.append([f"`{key}`", *("" if value is None else middle(value) for value in found)])
    return table(["ratio", *groups], rows)


def search(scale: Result) -> str:
    s = scale["search"]
    rows = [
        [
            name,
            str(values["search_rounds"]),
            str(values["epochs"]),
            f"{values['search_steps/finetune_steps']:.3f}",
            f"{values['alternating']:.2f}",
            f"{values['simultaneous']:.2f}",
        ]
        for name, values in s["tasks"].items()
    ]
    costs = [[NAMES[name], middle(v["ms"], 0), f"{v['step_mb']:.0f}"] for name, v in s["steps"].items()]
    head = ["task", "rounds", "epochs", "search steps / fine-tuning steps", "time, alternating", "time, simultaneous"]
    return (
        f"A step at {s['shape']} (a search step has as many rows again for Gamma):\n\n"
        + table(["step", "ms: median (quartiles)", "step MB"], costs)
        + "\n\nTime of the search over time of the fine-tuning:\n\n"
        + table(head, rows)
    )


def exponents(scale: Result) -> str:
    rows = []
    for name, sweep in scale["sweeps"].items():
        for what, unit in (("ms", "time"), ("step_mb", "memory")):
            fits = [sweep["exponents"][contender][what] for contender in sweep["exponents"]]
            rows.append([name, unit, *(f"{fit['exponent']:.2f} ± {fit['standard_error']:.2f}" for fit in fits)])
    contenders = next(iter(scale["sweeps"].values()))["exponents"]
    return table(["against", "of", *(NAMES[name] for name in contenders)], rows)


def startup(run: Result) -> str:
    s = run["startup"]
    rows = [["`python train.py --help`", middle(s["help_s"]), "2"]]
    if "first_step_s" in s:
        rows.append(["command to first step, empty caches", middle(s["first_step_s"]), "8"])
    imports = [[name, f"{seconds:.2f}"] for name, seconds in s["imports_s"].items()]
    return (
        table(["", "seconds: median (quartiles)", "at most"], rows)
        + "\n\nImports of a run by package, each without what it imports of the others (`python -X importtime`, which "
        "itself costs a little):\n\n" + table(["package", "seconds"], imports)
    )


def whole(run: Result) -> str:
    s = run["settings"]
    rows = []
    for name, found in run["runs"].items():
        accuracy, f1 = ([r[metric] for r in found] for metric in ("accuracy", "f1"))
        rows.append(
            [
                "`train.py method=lora`" if name == "diffora" else NAMES[name],
                middle(run["wall_s"][name], 1),
                f"{sum(accuracy) / len(found):.3f}",
                f"{sum(f1) / len(found):.3f}",
                f"{found[0]['trainable']:,}",
                f"{max(r['peak_rss_mb'] for r in found):.0f}",
                str(len(found)),
            ]
        )
    head = [
        "",
        "seconds: median (quartiles)",
        "accuracy, mean",
        "F1, mean",
        "trained parameters",
        "peak MB of the process",
        "runs",
    ]
    names = list(dict.fromkeys(part for parts in run["parts"].values() for part in parts))
    parts = [
        [name, *(f"{found[name]:.1f}" if name in found else "" for found in run["parts"].values())] for name in names
    ]
    sides = ["ours" if name == "diffora" else NAMES[name] for name in run["parts"]]
    return (
        f"{s['data']}, {s['backbone']}, {s['train_rows']} rows, {s['epochs']} epoch, batch {s['batch']}, "
        f"r = {s['rank']}:\n\n{table(head, rows)}\n\nWhere the seconds go (ours: one run with a clock in it; the peer: "
        f"medians):\n\n{table(['part', *sides], parts)}"
    )


# --- pictures ---


def picture_steps(step: Result) -> Figure:
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


def picture_memory(step: Result) -> Figure:
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


def picture_scaling(scale: Result) -> Figure:
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


def picture_run(run: Result) -> Figure:
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


# --- the page ---


def paths(found: Result) -> str:
    runs, metrics = found["runs"], found["summary"]
    first, *others = next(iter(metrics.values()))
    accuracy = next(key for key in metrics if "loss" not in key)

    def by_seed(name: str) -> dict[int, float]:
        return {run["seed"]: 100 * run["metrics"][accuracy] for run in runs if run["path"] == name}

    rows = []
    for name in (first, *others):
        cells = [f"{value[name]['mean']:.4f} ± {value[name]['std']:.4f}" for value in metrics.values()]
        less = paired(by_seed(name), by_seed(first)) if name in others else None
        rows.append([f"`{name}`", *cells, "" if less is None else points(less)])
    seeds = ", ".join(str(seed) for seed in sorted({run["seed"] for run in runs}))
    head = ["path", *metrics, f"{accuracy}, less `{first}`, points (95 %)"]
    return f"Seeds {seeds}, mean ± standard deviation; the difference is paired over seeds:\n\n{table(head, rows)}"


def points(less: Difference) -> str:
    """A difference with its interval; without one, it is the same for all seeds."""
    interval = "" if less.low is None or less.high is None else f" ({less.low:+.1f} to {less.high:+.1f})"
    return f"{less.mean:+.1f}{interval}".replace("-", "−")


def precision(found: Result) -> str:
    s, names = found["settings"], {"float32": "float32", "bf16": "bfloat16"}
    rows = [
        [
            names[arm],
            middle(facts["wall_s"], 0),
            middle(facts["wall_s"]["to_float32"], 3),
            middle(facts["finetune_s"]["to_float32"], 3),
            f"{facts['metric']['mean']:.4f}" + (f" ± {facts['metric']['sd']:.4f}" if "sd" in facts["metric"] else ""),
            str(facts["peak_rss_mb"]),
            str(facts["wall_s"]["rounds"]),
        ]
        for arm, facts in found["arms"].items()
    ]
    metric = found["arms"]["float32"]["metric"]["name"]
    head = ["", "seconds: median (quartiles)", "run / float32", "fine-tuning / float32", metric, "peak MB", "seeds"]
    epochs = f"{s['epochs']} epoch{'s' if s['epochs'] > 1 else ''}"
    return f"{s['task']}, {s['backbone']}, {epochs}, {s['unit']}:\n\n{table(head, rows)}"


def contention(found: Result) -> str:
    names = {"alone": "alone", "passive": "threads wait passively", "spinning": "threads spin (torch's own setting)"}
    rows = [
        [names[side], middle(value, 1), middle(found["ratios"].get(f"{side}/alone"), 2) if side != "alone" else "1"]
        for side, value in found["seconds"].items()
    ]
    rounds = found["seconds"]["alone"]["rounds"]
    head = [f"beside {found['busy']} busy processes", "seconds: median (quartiles)", "over alone"]
    what = f"`train.py {' '.join(found['overrides'])}`, {rounds} round{'s' if rounds > 1 else ''}:"
    return f"{what}\n\n{table(head, rows)}"


SOURCES = ("step", "run", "scale", "paths", "precision", "contention", "gpu")
TABLES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "ratios": ("step", ratios),
    "steps": ("step", steps),
    "other_ratios": ("step", other_ratios),
    "search": ("scale", search),
    "exponents": ("scale", exponents),
    "startup": ("run", startup),
    "run": ("run", whole),
    "paths": ("paths", paths),
    "precision": ("precision", precision),
    "contention": ("contention", contention),
    "gpu": ("gpu", gpu_page.section),
}
PICTURES: dict[str, tuple[str, Callable[[Result], Figure], str]] = {
    "performance_steps": ("step", picture_steps, "a step of each contender over the floor's, by shape"),
    "performance_memory": ("step", picture_memory, "MB that a step of each contender adds, by shape"),
    "performance_scaling": ("scale", picture_scaling, "time and memory against batch, length, rank, layers, modules"),
    "performance_run": ("run", picture_run, "the parts of a whole run, ours and the peer's"),
}
"""The result that each table and picture is made from. Each has its place in the page; see `refresh`."""


def refresh(page: str, results: Mapping[str, Result | None]) -> str:
    """The page with all tables and pictures updated.

    Args:
        page: Markdown with a place for each table and picture.
        results: by the names in `SOURCES`; None for results that have not been measured.

    Raises:
        ValueError: a table or picture has no place in the page, or several.
    """
    content = {"machine": machine(results)}
    for name, (source, make) in TABLES.items():
        result = results[source]
        content[name] = f"*Not measured yet: `python -m benchmarks.{source}`.*" if result is None else make(result)
    for name, (source, _, what) in PICTURES.items():
        content[name] = "" if results[source] is None else f"![{what}](images/{name}.png)"
    for name, text in content.items():
        block = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        text = f"\n{text}\n\n" if text else ""
        page, n = block.subn(lambda match, text=text: f"{match[1]}{text}{match[2]}", page)
        if n != 1:
            raise ValueError(f"the page has {n} places between <!-- begin {name} --> and <!-- end {name} -->, not one")
    return page


def main() -> None:
    from benchmarks.report import read

    results = {name: read(name) for name in SOURCES}
    for name, (source, draw, _) in PICTURES.items():
        if results[source] is not None:
            draw(results[source]).savefig(IMAGES / f"{name}.png", dpi=130)
            print(f"written: {IMAGES / name}.png")
    PAGE.write_text(refresh(PAGE.read_text(), results))
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
