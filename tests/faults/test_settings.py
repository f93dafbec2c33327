"""Random settings give a run that ends well, or one message that names the key."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from diffora.errors import UserError
from diffora.places import conf_dir
from diffora.run.check import check
from diffora.run.composition import composition_problems
from faults.campaigns import HANDLED, LOST, chance, share

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

# Choices that do not depend on this machine or on packages that are not installed.
BASES = [
    ("method=diffora", "task=paraphrase", "model=tiny"),
    ("method=rm_lora", "task=paraphrase", "model=tiny"),
    ("method=adalora", "task=paraphrase", "model=tiny"),
    ("method=random", "task=digits", "model=tiny_vit"),
    ("method=lora", "task=dialogue", "model=tiny_llama"),
    ("method=full_ft", "task=digits", "model=tiny_vit"),
    ("method=houlsby", "task=paraphrase", "model=tiny"),
    ("method=sora", "task=dialogue", "model=tiny_llama"),
]
SHORT = ["trainer=cpu", "logger=[csv]", "finetune.epochs=1", "finetune.warmup_steps=0", "finetune.early_stop=null"]

# Keys that accept any text, a path, or names of the project: this test cannot tell whether their values are right.
FREE = ("cell.", "logger", "task._target_", "method._target_", "model.name", "task.name", "method.name", "model.path")
FREE += ("task.recipe", "model.roles", "model.config", "method.config", "scale", "resume", "dry_run", "predict")

NUMBERS = ["0", "-1", "1", "2", "3", "0.5", "1.5", "-0.1", "1e-3", "1e308", "1e-320", "nan", "inf", "-inf", ".nan"]
NUMBERS += ["4294967296", "18446744073709551616", "99999999999999999999", "1000000000", "1e400", "0x10", "1_000", "08"]
TEXTS = ["null", "true", "false", "''", "text", "'1'", "[]", "[1]", "{}", "{a: 1}", "é", "'a b'", "'a\\'b'", "auto"]
TEXTS += [
    "'${oc.env:HOME}'",
    "'${seed}'",
    "???",
    "'???'",
    "'a\\nb'",
    "'../..'",
    "[null]",
    "[[[[]]]]",
    "half",
    "32-true",
]

COUNTS = ("epochs", "batch_size", "accumulate", "train_steps", "rank", "shared_rank", "max_length", "train_rows")
COUNTS += ("validation_rows", "devices", "score_batches")


def impossible(key: str, before: Any, now: Any) -> str | None:
    """Why a value cannot be right, independently of the project's checks; None if it may be right.

    It is compared with the value of the key in the project's YAML files.
    """
    if isinstance(now, float) and not math.isfinite(now):
        return "it is not finite"
    if isinstance(now, str) and ("oc.env" in now or now == "???"):
        return "it is not a value"
    name = key.rpartition(".")[2]
    number = isinstance(now, int | float) and not isinstance(now, bool)
    if isinstance(before, bool) and name != "deterministic" and not isinstance(now, bool):
        return "it is no flag"
    if isinstance(before, int | float) and not isinstance(before, bool):
        if now in ("half", "auto", None):
            return None  # some keys have such words, or null
        if not number:
            return "it is no number"
        if now < 0:
            return "it is below 0"
        if isinstance(before, int) and name in COUNTS and (not isinstance(now, int) or now < 1):
            return "it is no count of at least 1"
    if isinstance(before, str) and isinstance(now, dict | list):
        return "it is no text"
    if isinstance(before, dict) and not isinstance(now, dict):
        return "it is no group of settings"
    return None


WRONG = ["+nonsense=1", "~task", "~finetune", "++method.nonsense=1", "finetune=5", "finetune=null"]


@st.composite
def overrides(draw: st.DrawFn) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(the choices, the settings)"""
    base = draw(st.sampled_from(BASES))
    values = leaves(composed(base))
    groups = [key for key, value in values.items() if isinstance(value, dict)]
    keys = st.sampled_from(sorted(values.keys() - groups))
    if draw(st.integers(0, 14)) == 0:
        keys = st.sampled_from(groups)
    chosen = draw(st.lists(keys, min_size=1, max_size=2, unique=True))
    changes = []
    for key in chosen:
        wild = draw(st.booleans()) or not near(values[key])
        changes.append(f"{key}={draw(st.sampled_from(NUMBERS + TEXTS if wild else near(values[key])))}")
    if draw(st.integers(0, 19)) == 0:
        changes.append(draw(st.sampled_from(WRONG)))
    return base, tuple(changes)


def near(value: Any) -> list[str]:
    """Values that may be right for a key that has this value."""
    if isinstance(value, bool):
        return [str(not value).lower()]
    if isinstance(value, int | float):
        return [str(value), str(value * 2), str(value + 1), str(value / 2), str(int(value) + 3), "1", "0"]
    return ["null", "1", "2", "0.5", "8", "true"] if value is None else []


def composed(lines: tuple[str, ...] | list[str]) -> Any:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", [*lines])


def leaves(cfg: Any) -> dict[str, Any]:
    """Every key with its value, also groups, except those in `FREE`."""
    found: dict[str, Any] = {}

    def walk(node: dict[str, Any], prefix: str) -> None:
        for name, value in node.items():
            key = f"{prefix}{name}"
            if key.startswith(FREE):
                continue
            found[key] = value
            if isinstance(value, dict):
                walk(value, f"{key}.")

    walk(OmegaConf.to_container(cfg, resolve=True), "")
    return found


def named(key: str, problems: list[str]) -> bool:
    """Whether a message names a key: in full, or its last parts if another key takes its value from it."""
    return any(key in problem or key.rpartition(".")[2] in problem for problem in problems)


def test_every_setting_works_or_is_named_in_a_message(start, campaign, tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    before = {base: leaves(composed(base)) for base in BASES}
    fuzz, ran = campaign("settings: composed and checked"), campaign("settings: started")
    accepted: list[tuple[tuple[str, ...], tuple[str, ...]]] = []

    everything = list(HealthCheck)

    @settings(
        max_examples=share(200), deadline=None, database=None, suppress_health_check=everything, phases=[Phase.generate]
    )
    @seed(int(os.environ.get("FAULTS_SEED", "15")))
    @given(overrides())
    def example(given_: tuple[tuple[str, ...], tuple[str, ...]]) -> None:
        base, changes = given_
        lines = [*base, *SHORT, *changes]
        case = " ".join([*base, *changes])
        keys = [line.partition("=")[0].lstrip("+~") for line in changes]
        try:
            try:
                cfg = composed(lines)
            except Exception as error:  # Hydra's, of many types: the command line then looks for the reasons
                problems = composition_problems(lines) or [f"no message for {type(error).__name__}: {error}"]
                cfg = None
            if cfg is not None:
                problems = []
                try:
                    check(cfg)
                except UserError as error:
                    problems = error.problems
            if not problems:
                assert cfg is not None
                now = leaves(cfg)
                for key in keys:
                    why = impossible(key, before[base].get(key), now.get(key))
                    if why is not None:
                        fuzz.count(LOST, case, f"accepted, but {key}: {why}")
                        return
                accepted.append(given_)
                fuzz.count(HANDLED, case)
                return
        except Exception as error:
            fuzz.count(LOST, case, f"{type(error).__name__}: {str(error)[:300]}")
            return
        if any(named(key, problems) for key in keys):
            fuzz.count(HANDLED, case)
        else:
            fuzz.count(LOST, case, f"the message names no key: {problems}")

    example()
    random = chance("accepted settings")
    for number, (base, changes) in enumerate(random.sample(accepted, min(share(24), len(accepted)))):
        # Long runs are shortened, but the randomly chosen settings stay.
        cuts = [c for c in CUTS if c.partition("=")[0] not in {x.partition("=")[0] for x in changes}]
        cuts = [c for c in cuts if c.partition("=")[0] in before[base]]
        lines = [*base, *SHORT, *cuts, *changes]
        folder = tmp_path / f"run{number}"
        case = " ".join(lines)
        planned = start("train.py", *lines, "dry_run=true", f"hydra.run.dir={folder}-dry").wait(120)
        if planned.broken:
            ran.count(LOST, case, f"dry_run: {planned.broken}")
            continue
        outcome = start("train.py", *lines, f"hydra.run.dir={folder}").wait(60)
        if outcome.code is None:  # a long run is what such settings ask for
            ran.count(HANDLED, case)
        elif outcome.broken:
            ran.count(LOST, case, outcome.broken)
        elif outcome.code == 0 and not _right(folder):
            ran.count(LOST, case, "the record is not that of a run that ended well")
        elif outcome.code and not any(named(c.partition("=")[0], outcome.errors) for c in changes):
            ran.count(LOST, case, f"the message names no key: {outcome.errors}")
        else:
            ran.count(HANDLED, case)


CUTS = ["search.epochs=1", "task.train_rows=32", "task.validation_rows=16", "task.max_train_rows=32"]


def _right(folder: Path) -> bool:
    record = json.loads((folder / "run.json").read_text())
    metrics = record["metrics"].values()
    return record["status"] == "completed" and all(v is not None and math.isfinite(v) for v in metrics)
