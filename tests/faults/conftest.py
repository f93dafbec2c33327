"""What the campaigns share: the seed, undisturbed runs to compare with, and the table of counts at the end."""

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from warm import Command, Limits, Outcome

HANDLED, CHANGED, LOST = "handled", "changed", "lost"
_table: dict[str, Counter[str]] = {}


def seed() -> int:
    """``FAULTS_SEED=<n>`` sets it; it is printed with the table."""
    return int(os.environ.get("FAULTS_SEED", "15"))


def share(count: int, least: int = 1) -> int:
    """``FAULTS_SHARE=0.05`` runs so much of each campaign."""
    return max(least, round(count * float(os.environ.get("FAULTS_SHARE", "1"))))


def chance(*what: object) -> random.Random:
    """Random numbers that depend on the seed and on what they are for, not on the order of tests."""
    return random.Random(f"{seed()} {what}")


class Campaign:
    """The counts of one campaign, and what went wrong in it.

    handled: the same result as undisturbed, or a clear message and nothing lost, or mended with a line that says so.
    changed: another result without a word.
    lost: no result any more, a traceback, a crash, a hang, or code of a foreign file was executed.
    """

    def __init__(self, name: str) -> None:
        self.counts = _table.setdefault(name, Counter())
        self.name, self.wrong = name, []

    def count(self, outcome: str, case: str, words: str = "") -> None:
        self.counts[outcome] += 1
        if outcome != HANDLED:
            self.wrong.append(f"{outcome}: {case}: {words}")
            print(f"[{self.name}] {self.wrong[-1]}", flush=True)

    def close(self) -> None:
        assert not self.wrong, f"{self.name}, FAULTS_SEED={seed()}:\n" + "\n".join(self.wrong)


@pytest.fixture
def campaign() -> Iterator[Callable[[str], Campaign]]:
    """Makes a campaign; the test fails at its end if anything was changed or lost in it."""
    made: list[Campaign] = []

    def make(name: str) -> Campaign:
        made.append(Campaign(name))
        return made[-1]

    yield make
    for one in made:
        one.close()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist
        session.config.workeroutput["faults"] = {name: dict(counts) for name, counts in _table.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for name, counts in getattr(node, "workeroutput", {}).get("faults", {}).items():
        _table.setdefault(name, Counter()).update(counts)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _table:
        return
    terminalreporter.section(f"faults (FAULTS_SEED={seed()})")
    lines = ["| campaign | tried | handled | changed | lost |", "|---|---|---|---|---|"]
    total: Counter[str] = Counter()
    for name, counts in sorted(_table.items()):
        total += counts
        lines.append(_line(name, counts))
    for line in [*lines, _line("all", total)]:
        terminalreporter.write_line(line)


def _line(name: str, counts: Counter[str]) -> str:
    figures = [counts.total(), counts[HANDLED], counts[CHANGED], counts[LOST]]
    return f"| {name} | {' | '.join(map(str, figures))} |"


# --- runs ---

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

Run = Callable[..., Command]


@pytest.fixture(scope="session", autouse=True)
def _quiet_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}.items():
            patch.setenv(name, value)
        patch.setenv("DIFFORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _no_network_no_threads() -> None:
    """Instead of the one for all tests, which gives each test a cache of its own: undisturbed runs are shared."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Starts a command of the project; its output is kept in a folder of the session."""
    scratch = tmp_path_factory.mktemp("output")

    def begin(program: str, *arguments: str, **more: Any) -> Command:
        return Command(program, *arguments, scratch=scratch, **more)

    return begin


@pytest.fixture(scope="session")
def undisturbed(start: Run, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Outcome]]:
    """A complete run with these overrides, made once a session: (its folder, how it ended)."""
    made: dict[tuple[str, ...], tuple[Path, Outcome]] = {}

    def of(*overrides: str) -> tuple[Path, Outcome]:
        if overrides not in made:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            start("train.py", *overrides, f"hydra.run.dir={folder}-first").wait()  # fills the cache
            limits = Limits(below=str(folder.parent))
            outcome = start("train.py", *overrides, f"hydra.run.dir={folder}", limits=limits).wait()
            assert outcome.code == 0, outcome.text
            made[overrides] = folder, outcome
        return made[overrides]

    return of


def difference(ours: Path, theirs: Path) -> str | None:
    """Where the results of two run folders differ, or None: record, selection, trajectory, adapter, files left over."""
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
