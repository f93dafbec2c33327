"""What the campaigns share: random numbers from one seed, counts, and the comparison of two runs."""

import json
import os
import random
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

HANDLED, CHANGED, LOST = "handled", "changed", "lost"
table: dict[str, Counter[str]] = {}


def seed() -> int:
    """``FAULTS_SEED=<n>`` sets it; it is printed with the table."""
    return int(os.environ.get("FAULTS_SEED", "15"))


def share(count: int, least: int = 1) -> int:
    """The number of cases to run: ``FAULTS_SHARE=0.05`` runs this share of each campaign."""
    return max(least, round(count * float(os.environ.get("FAULTS_SHARE", "1"))))


def chance(*what: object) -> random.Random:
    """Random numbers that depend on the seed and on what they are for, not on the order of tests."""
    return random.Random(f"{seed()} {what}")


class Campaign:
    """The counts of one campaign, and what went wrong in it.

    handled: the result is that of the undisturbed run; or there is a clear message and nothing is lost; or the damage
        is repaired and a line says so.
    changed: the result is different, without a message.
    lost: the result is lost, there is a traceback, crash or hang, or code of a foreign file was executed.
    """

    def __init__(self, name: str) -> None:
        self.counts = table.setdefault(name, Counter())
        self.name, self.wrong = name, []

    def count(self, outcome: str, case: str, words: str = "") -> None:
        self.counts[outcome] += 1
        if outcome != HANDLED:
            self.wrong.append(f"{outcome}: {case}: {words}")
            print(f"[{self.name}] {self.wrong[-1]}", flush=True)

    def close(self) -> None:
        assert not self.wrong, f"{self.name}, FAULTS_SEED={seed()}:\n" + "\n".join(self.wrong)


def lines_of_table() -> list[str]:
    """The counts of all campaigns as a table in Markdown."""
    total: Counter[str] = Counter()
    found = ["| campaign | tried | handled | changed | lost |", "|---|---|---|---|---|"]
    for name, counts in sorted(table.items()):
        total += counts
        found.append(_line(name, counts))
    return [*found, _line("all", total)]


def _line(name: str, counts: Counter[str]) -> str:
    figures = [counts.total(), counts[HANDLED], counts[CHANGED], counts[LOST]]
    return f"| {name} | {' | '.join(map(str, figures))} |"


TINY = (
    "experiment=quickstart",
    "task.train_rows=64",
    "task.validation_rows=32",
    "search.epochs=2",
    "search.batch_size=16",
    "finetune.epochs=2",
    "finetune.batch_size=16",
    "finetune.warmup_steps=1",
    "finetune.dropout=0.1",
)


def difference(ours: Path, theirs: Path) -> str | None:
    """The first difference of two run folders in record, selection, trajectory, adapter or leftover files, or None."""
    records = [json.loads((folder / "run.json").read_text()) for folder in (ours, theirs)]
    for key in ("status", "metrics", "history", "selection", "params", "data_hash", "config_hash"):
        if records[0].get(key) != records[1].get(key):
            return f"run.json, {key}"
    for name in ("selection.json", "trajectory.json"):
        if (theirs / name).exists() and (ours / name).read_text() != (theirs / name).read_text():
            return name
    files = [
        sorted(str(f.relative_to(folder)) for part in ("adapter", "model") for f in (folder / part).rglob("*"))
        for folder in (ours, theirs)
    ]
    if files[0] != files[1]:
        return f"files of the export: {files[0]} instead of {files[1]}"
    for name in (n for n in files[1] if n.endswith(".safetensors")):
        tensors, others = load_file(ours / name), load_file(theirs / name)
        if tensors.keys() != others.keys() or not all(torch.equal(tensors[n], others[n]) for n in others):
            return name
    if left := [str(f.relative_to(ours)) for f in ours.rglob("*.part")]:
        return f"left over: {', '.join(left)}"
    return None
