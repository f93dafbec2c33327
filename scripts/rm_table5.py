"""[R] Table 5 in small at R = 0.64 d, with measures that do not depend on the scale of the update.

    python scripts/rm_table5.py <folder of the runs> … --page docs/results/results.md      # puts the table there
    python scripts/rm_table5.py docs/results/data/rm_table5.json                           # the same without runs

The folders have runs of experiment=rm_table5_orthogonality, of any number of epochs. Differences are from LoRA with as
many epochs, paired over seeds, with Student's t.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from pages import Run, checked, fill

from diffora.report.statistics import paired, spread

SIZE = ", R = 0.64 d"
MEASURES = {  # metric: (name, factor, decimals)
    "update/rank": ("rank of ΔW", 1, 0),
    "update/orthogonality_loss": ("orthogonality loss", 1, 2),
    "update/stable_rank": ("stable rank", 1, 2),
    "update/median_sigma": ("median σ/σ₁", 1, 3),
    "validation/accuracy": ("accuracy, %", 100, 2),
    "held_out/accuracy": ("held_out, %", 100, 2),
}
Rows = Sequence[Mapping[str, Any]]


def rows_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """For each method and number of epochs: the measures by seed, with the hash of each run.

    Raises:
        SystemExit: the runs of one number of epochs do not belong together (`pages.checked`).
    """
    found: dict[tuple[int, str], dict[str, Any]] = {}
    of_epochs: dict[int, list[Run]] = defaultdict(list)
    for run in runs:
        if run["row"].endswith(SIZE):
            of_epochs[run["settings"]["finetune"]["epochs"]].append(run)
    for epochs, alike in of_epochs.items():
        for run in checked(alike):
            key = epochs, run["row"].removesuffix(SIZE)
            row = found.setdefault(key, {"epochs": key[0], "method": key[1], "seeds": {}})
            values = {name: run["metrics"][name] for name in MEASURES}
            row["seeds"][str(run["seed"])] = values | {"config_hash": run["config_hash"]}
    order = ["LoRA", "GM-LoRA", "R-LoRA", "RM-LoRA"]
    return sorted(found.values(), key=lambda row: (row["epochs"], order.index(row["method"])))


def by_seed(row: Mapping[str, Any], name: str) -> dict[int, float]:
    return {int(seed): MEASURES[name][1] * values[name] for seed, values in row["seeds"].items()}


def table(rows: Rows) -> str:
    """Markdown: the measures, then their differences from LoRA."""
    lines = _head("R = 40", "seeds")
    for row in rows:
        cells = [f"{row['epochs']} epochs, {row['method']}", str(len(row["seeds"]))]
        for name, (_, _, decimals) in MEASURES.items():
            found = spread(by_seed(row, name).values())
            assert found is not None
            cells.append(f"{found.mean:.{decimals}f}" + (f" ± {found.std:.{decimals}f}" if found.std else ""))
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *_head("less LoRA (95 %)", "seeds")]
    for row in rows:
        lora = next((r for r in rows if (r["epochs"], r["method"]) == (row["epochs"], "LoRA")), None)
        if lora is None or row is lora:
            continue
        both = row["seeds"].keys() & lora["seeds"].keys()
        cells = [f"{row['epochs']} epochs, {row['method']}", str(len(both))]
        for name, (_, _, decimals) in MEASURES.items():
            less = paired(by_seed(row, name), by_seed(lora, name))
            text = "" if less is None else f"{less.mean:+.{decimals}f}"
            if less is not None and less.low is not None:
                text += f" ({less.low:+.{decimals}f} to {less.high:+.{decimals}f})"
            cells.append(text.replace("-", "−"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _head(*first: str) -> list[str]:
    head = [*first, *(name for name, _, _ in MEASURES.values())]
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]


def main() -> None:
    fill(__doc__, "rm_table5", rows_of, table, what="run of R = 0.64 d")


if __name__ == "__main__":
    main()
