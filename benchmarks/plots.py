"""Puts the tables and pictures of docs/results/performance.md there, made from benchmarks/results.

    python -m benchmarks.plots

A table stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``. If its figures have not been measured, the
page shows the command that measures them. The sentences around the tables are written by hand.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import gpu_page, pictures
from benchmarks.markdown import NAMES, middle, table
from diffora.report.statistics import Difference, paired

REPO = Path(__file__).parents[1]
PAGE = REPO / "docs" / "results" / "performance.md"
IMAGES = REPO / "docs" / "results" / "images"
Result = Mapping[str, Any]

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
            f"{m['gpu'] or 'no GPU'}; load before the start {m['load_before']}; {versions}; {result['date']}; "
            f"commit {result['commit'][:7]}{' with uncommitted changes' if result['commit'].endswith('+') else ''}"
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
            ]
            for name, values in result["contenders"].items()
        ]
        head = ["contender", "ms: median (quartiles)", f"over {NAMES[result['floor']]}", "step MB"]
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
    whose = "Where the seconds go"
    if "diffora" in run["parts"]:
        whose += f" (ours: one more run, with a clock in it, of {sum(run['parts']['diffora'].values()):.1f} seconds"
        whose += "; the peer: medians)"
    return (
        f"{s['data']}, {s['backbone']}, {s['train_rows']} rows, {s['epochs']} epoch, batch {s['batch']}, "
        f"r = {s['rank']}:\n\n{table(head, rows)}\n\n{whose}:\n\n{table(['part', *sides], parts)}"
    )


def paths(found: Result) -> str:
    runs, metrics = found["runs"], found["summary"]
    first, *others = next(iter(metrics.values()))
    accuracy = next(key for key in metrics if "loss" not in key)

    def by_seed(name: str) -> dict[int, float]:
        return {run["seed"]: 100 * run["metrics"][accuracy] for run in runs if run["path"] == name}

    rows = []
    for name in (first, *others):
        cells = [
            f"{value[name]['mean']:.4f}" + (f" ± {sd:.4f}" if (sd := value[name]["std"]) is not None else "")
            for value in metrics.values()
        ]
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
        [names[side], middle(value, 1), "1" if side == "alone" else middle(found["ratios"].get(f"{side}/alone"))]
        for side, value in found["seconds"].items()
    ]
    rounds = found["seconds"]["passive"]["rounds"]
    head = [f"beside {found['busy']} busy processes", "seconds: median (quartiles)", "over alone"]
    what = f"`train.py {' '.join(found['overrides'])}`, {rounds} round{'s' if rounds > 1 else ''}:"
    return f"{what}\n\n{table(head, rows)}"


# --- the page ---

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
    "performance_steps": ("step", pictures.steps, "a step of each contender over the floor's, by shape"),
    "performance_memory": ("step", pictures.memory, "MB that a step of each contender adds, by shape"),
    "performance_scaling": ("scale", pictures.scaling, "time and memory against batch, length, rank, layers, modules"),
    "performance_run": ("run", pictures.run, "the parts of a whole run, ours and the peer's"),
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
    if (step := results["step"]) is not None and (run := results["run"]) is not None:
        results = {**results, "step": {**step, "ratios": {**step["ratios"], **run["ratios"]}}}
    for name, (source, make) in TABLES.items():
        result = results[source]
        if result is not None and not result.get("arms", True):
            result = None  # interrupted before the first pair of runs
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
