"""The table of docs/results/mpnet.md: the rows of experiment=mpnet_glue, for each task, as far as they have run.

    python scripts/mpnet_glue.py <folder of the runs> --page docs/results/mpnet.md      # puts the table there
    python scripts/mpnet_glue.py docs/results/data/mpnet_glue.json <folder> --page …    # adds further runs to it
    python scripts/mpnet_glue.py docs/results/data/mpnet_glue.json                      # the same without runs

Differences from LoRA of rank 2 with the same α, and of DiffoRA from random selections, are paired over seeds, with
Student's t. The papers' figures are those of the experiment's file: [D] Table 8, of RoBERTa-base.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pages import Run, checked, fill, points, settings_of

from diffora.report.statistics import paired, spread, verdict

EXPERIMENT = Path(__file__).resolve().parents[1] / "conf" / "experiment" / "mpnet_glue.yaml"
LORA = "LoRA, r = 2, s = 8"
MARGIN = 0.005
Seeds = Mapping[str, Mapping[str, Any]]
Table = Mapping[str, Any]


@cache
def experiment() -> tuple[dict[str, Any], list[str]]:
    """The rows of the experiment with the papers' figures by task, and its tasks."""
    sweeper: Any = OmegaConf.to_container(OmegaConf.load(EXPERIMENT).hydra.sweeper)
    return {row["name"]: row["paper"] or {} for row in sweeper["rows"]}, list(sweeper["columns"]["paper"])


def tables_of(runs: Sequence[Run]) -> dict[str, Table]:
    """For each task: metric, digest of the data, and rows with their settings and, by seed, what was measured.

    Raises:
        SystemExit: the runs do not belong together (`pages.checked`), or are not of this experiment at its full scale.
    """
    names, tasks = experiment()
    found: dict[str, Any] = {}
    for run in checked(runs):
        if run["row"] not in names or run["column"] not in tasks:
            name = f"{run['column']}, {run['row']}"
            sys.exit(f"error: {name} is no run of experiment=mpnet_glue scale=paper, with {', '.join(tasks)}")
        facts = {"metric": run["main_metric"], "data": run["data_hash"], "rows": {}}
        rows = found.setdefault(run["column"], facts)["rows"]
        row = rows.setdefault(run["row"], {"settings": settings_of(run), "seeds": {}})
        row["seeds"][str(run["seed"])] = {
            "value": run["metrics"][f"validation/{run['main_metric']}"],
            "parameters": run["params"]["adapter"],
            "hours": round(run["time"]["total_s"] / 3600, 2),
            "epochs": len(run["history"]),
            "config_hash": run["config_hash"],
            "commit": run["git_commit"],
        }
    return found


def by_seed(seeds: Seeds) -> dict[int, float]:
    return {int(seed): values["value"] for seed, values in seeds.items()}


def text_of(tables: Mapping[str, Table]) -> str:
    """Markdown: for each task a table with a line for each row of the experiment."""
    names, tasks = experiment()
    lines: list[str] = []
    for task in (task for task in tasks if task in tables):
        seeds_of = {name: row["seeds"] for name, row in tables[task]["rows"].items()}
        head = ["", "adapter parameters", "seeds", f"{tables[task]['metric']} × 100", f"less {LORA} (95 %)", "verdict"]
        head.append("hours of a core")
        head.append("[D] Table 8, RoBERTa-base")
        lines += [f"**{task}**", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for name in names:
            lora = {} if name == LORA else seeds_of.get(LORA, {})
            cells = [name, *_measured(seeds_of.get(name, {}), lora), str(names[name].get(task, ""))]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", _chosen_or_drawn(seeds_of), ""]
    return "\n".join(lines).strip()


def _measured(seeds: Seeds, lora: Seeds) -> list[str]:
    """The cells of a row between its name and the paper's figure."""
    found = spread(by_seed(seeds).values())
    if found is None:
        return ["", "0", "not run", "", "", ""]
    sizes = sorted({values["parameters"] for values in seeds.values()})
    size = " to ".join(f"{n:,}" for n in dict.fromkeys((sizes[0], sizes[-1])))
    value = f"{100 * found.mean:.2f}" + (f" ± {100 * found.std:.2f}" if found.std is not None else "")
    difference = paired(by_seed(seeds), by_seed(lora))
    tested = difference is not None and difference.p is not None
    cells = [size, str(found.n), value, "" if difference is None else points(difference)]
    cells.append(verdict(difference, MARGIN) if tested and difference is not None else "")
    hours = spread(values["hours"] for values in seeds.values())
    return [*cells, "" if hours is None else f"{hours.mean:.1f}"]


def _chosen_or_drawn(seeds_of: Mapping[str, Seeds]) -> str:
    """DiffoRA's selection beside random ones of the same number of modules, in one line."""
    difference = paired(*(by_seed(seeds_of.get(name, {})) for name in ("DiffoRA", "random")))
    if difference is None:
        return "DiffoRA less random: not run."
    tested = f" (95 %), {verdict(difference, MARGIN)}" if difference.p is not None else ""
    n = f"{difference.n} seed{'s' if difference.n > 1 else ''}"
    return f"DiffoRA less random, paired over {n}: {points(difference)}{tested}."


def main() -> None:
    fill(__doc__, "mpnet_glue", tables_of, text_of, grows=True)


if __name__ == "__main__":
    main()
