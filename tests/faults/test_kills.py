"""Runs that are killed (SIGKILL) and resumed end as if never stopped."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.campaigns import CHANGED, HANDLED, LOST, TINY, chance, difference, share
from faults.warm import Command, Limits

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

MOST = 6  # kills of one run


def finish(begin: Callable[..., Command], **more: object) -> str | None:
    """Resume until the end; returns what went wrong."""
    outcome = begin("resume=true", **more).wait(300)
    return outcome.broken or (outcome.text if outcome.code else None)


def judge(ours: Path, theirs: Path, wrong: str | None) -> tuple[str, str]:
    if wrong is not None:
        return LOST, wrong
    what = difference(ours, theirs)
    return (HANDLED, "") if what is None else (CHANGED, what)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("way", ["at a change of a file", "at a time"])
def test_a_killed_run_ends_as_if_never_stopped(start, undisturbed, campaign, tmp_path, workers, way):
    overrides = (*TINY, f"trainer.num_workers={workers}")
    whole, first = undisturbed(*overrides)
    kills = campaign(f"kills of a run {way}, {workers} workers")
    random = chance("kills", workers, way)
    left, number = share(24), 0
    while left > 0:
        number += 1
        folder = tmp_path / f"run{number}"
        # Most runs are killed once or twice. The second kill may come at any point of the rest, including the export.
        points = [random.random() for _ in range(min(left, random.choice([1, 1, 2, 3]), MOST))]
        left -= len(points)
        for at, point in enumerate(points):
            arguments = [*overrides, f"hydra.run.dir={folder}", *(["resume=true"] if at else [])]
            if way == "at a time":
                start("train.py", *arguments).kill_after(point * first.seconds)
            else:
                limits = Limits(kill_at=1 + int(point * first.changes), below=str(tmp_path))
                start("train.py", *arguments, limits=limits).wait()
        wrong = finish(lambda *more, f=folder, **m: start("train.py", *overrides, f"hydra.run.dir={f}", *more, **m))
        outcome, words = judge(folder, whole, wrong)
        for _ in points:
            kills.count(outcome, f"run {number}, killed at {', '.join(f'{p:.2f}' for p in points)}", words)
        shutil.rmtree(folder, ignore_errors=True)


PATTERNS = [
    "checkpoints/search-0001-*.ckpt",
    "checkpoints/search-0002-*.ckpt",
    "selection.json",
    "search.json",
    "checkpoints/finetune-0001-*.ckpt",
    "adapter/*.safetensors",
    "adapter/adapter_config.json",
    "adapter/README.md",
    "**/.*.part",
]


@pytest.mark.parametrize("fresh", [False, True], ids=["forked", "started"])
def test_killed_when_a_file_appears(start, undisturbed, campaign, tmp_path, fresh):
    whole, _ = undisturbed(*TINY)
    kills = campaign("kills when a file appears" + (", true starts" if fresh else ""))
    patterns = PATTERNS if not fresh else chance("started").sample(PATTERNS, 2)
    for number, pattern in enumerate(patterns[: share(len(patterns))]):
        folder = tmp_path / f"run{number}"
        arguments = (*TINY, f"hydra.run.dir={folder}")
        start("train.py", *arguments, fresh=fresh).kill_when(lambda f=folder, p=pattern: any(f.glob(p)))
        wrong = finish(lambda *more, a=arguments, **m: start("train.py", *a, *more, **m), fresh=fresh)
        kills.count(*(lambda o, w: (o, pattern, w))(*judge(folder, whole, wrong)))


def test_a_killed_report_is_made_again(start, undisturbed, campaign, tmp_path):
    whole, _ = undisturbed(*TINY)
    output = tmp_path / "report"
    arguments = (str(whole.parent), f"output={output}")
    first = start("report.py", *arguments, limits=Limits(below=str(output.parent))).wait()
    assert first.code == 0, first.text
    expected = {f.name: f.stat().st_size for f in output.iterdir()}
    kills, random = campaign("kills of a report"), chance("report")
    for number in range(share(8)):
        shutil.rmtree(output)
        point = random.randint(1, first.changes)
        start("report.py", *arguments, limits=Limits(kill_at=point, below=str(output.parent))).wait()
        again = start("report.py", *arguments).wait()
        found = {f.name: f.stat().st_size for f in output.iterdir()}
        same = found.keys() == expected.keys() and all(found[n] == expected[n] for n in expected if n != "index.html")
        outcome = LOST if again.broken or again.code else HANDLED if same else CHANGED
        kills.count(outcome, f"report {number}, killed at change {point}", again.broken or f"{found} for {expected}")


def test_a_killed_sweep_ends_as_if_never_stopped(start, undisturbed, campaign, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="hydra-joblib-launcher is not installed")
    kills, random = campaign("kills of a joblib sweep"), chance("sweep")
    whole = {seed: undisturbed(*TINY, f"seed={seed}")[0] for seed in (0, 1)}
    arguments = ("-m", *TINY, "seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    for number in range(share(4)):
        place = tmp_path / f"sweep{number}"
        own = (*arguments, f"hydra.sweep.dir={place}")
        # The launcher's workers import everything themselves, so time is counted from the first folder.
        process = start("train.py", *own, fresh=True)  # joblib's workers hang in a fork
        process.kill_when(_after(place, random.uniform(0, 5)), timeout=300)
        wrong = finish(lambda *more, o=own, **m: start("train.py", *o, *more, **m), fresh=True)
        for seed, theirs in whole.items():
            if wrong is None and not list(place.glob(f"*-seed{seed}/run.json")):
                wrong = f"no run of seed {seed}"
            ours = next(iter(place.glob(f"*-seed{seed}")), place)
            kills.count(*(lambda o, w, s=seed: (o, f"sweep {number}, seed {s}", w))(*judge(ours, theirs, wrong)))


def _after(place: Path, seconds: float) -> Callable[[], bool]:
    seen: list[float] = []

    def due() -> bool:
        if not seen and list(place.glob("*/config.yaml")):
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() - seen[0] > seconds

    return due
