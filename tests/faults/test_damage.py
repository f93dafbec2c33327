"""Damaged files: flipped bits, cut ends, zeroed ends, empty files, in every kind of file that the project reads."""

import json
import random as randoms
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from faults.campaigns import CHANGED, HANDLED, LOST, TINY, chance, difference, share
from faults.warm import Command, Outcome

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

ASSETS = Path(__file__).parents[2] / "src" / "diffora" / "assets"


def damage(file: Path, random: randoms.Random) -> str:
    """Damage a file in one of several ways. Returns the way in words."""
    content = bytearray(file.read_bytes())
    way = random.choice(["flip", "flip", "flip", "cut", "zeros", "empty"])
    at = random.randrange(len(content))
    if way == "flip":
        bit = random.randrange(8)
        content[at] ^= 1 << bit
        way = f"bit {bit} of byte {at} of {len(content)} flipped"
    elif way == "cut":
        way = f"cut to {at} of {len(content)} bytes"
        del content[at:]
    elif way == "zeros":
        content[at:] = bytes(len(content) - at)
        way = f"zeros from byte {at} of {len(content)}"
    else:
        content.clear()
    file.write_bytes(content)
    return way


@dataclass(frozen=True)
class Damaged:
    """A campaign over kinds of files.

    Attributes:
        make: writes the undamaged files to a new folder.
        kinds: globs below that folder, by the name of the kind.
        use: reads the folder. Returns how the command ended, and its result; None if it reported a damaged file.
    """

    name: str
    make: Callable[[Path], object]
    kinds: dict[str, str]
    use: Callable[[Path], tuple[Outcome, object]]
    times: int = 4

    def go(self, campaign, tmp_path: Path) -> None:
        counts = {kind: campaign(f"damage, {self.name}: {kind}") for kind in self.kinds}
        sound = tmp_path / "sound"
        self.make(sound)
        outcome, expected = self.use(_copy(sound, tmp_path / "copy"))
        assert outcome.code == 0, outcome.text
        for kind, pattern in self.kinds.items():
            random = chance(self.name, kind)
            for _ in range(share(self.times)):
                folder = _copy(sound, tmp_path / "copy")
                files = sorted(f for f in folder.glob(pattern) if f.is_file() and f.stat().st_size)
                assert files, f"{kind}: there is no {pattern}"
                file = random.choice(files)
                case = f"{file.relative_to(folder)}: {damage(file, random)}"
                outcome, found = self.use(folder)
                if outcome.broken:
                    counts[kind].count(LOST, case, outcome.broken)
                elif outcome.code == 0 and found is not None and found != expected:
                    counts[kind].count(CHANGED, case, f"{found} instead of {expected}"[:500])
                else:
                    counts[kind].count(HANDLED, case)


def _copy(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


@pytest.fixture
def half_done(start, undisturbed, tmp_path) -> Callable[..., Callable[[Path], object]]:
    """Makes a run that was killed at the end of its first epoch of fine-tuning."""

    def make(*overrides: str) -> Callable[[Path], object]:
        def write(folder: Path) -> None:
            run: Command = start("train.py", *overrides, f"hydra.run.dir={folder}")
            run.kill_when(lambda: any(folder.glob("checkpoints/finetune-0001-*.ckpt")))
            assert json.loads((folder / "run.json").read_text())["status"] == "running"

        return write

    return make


def test_a_run_that_resumes(start, undisturbed, half_done, campaign, tmp_path):
    whole, _ = undisturbed(*TINY)

    def resume(folder: Path) -> tuple[Outcome, object]:
        arguments = (*TINY, f"hydra.run.dir={folder}", "resume=true")
        outcome = start("train.py", *arguments).wait()
        return outcome, difference(folder, whole) if outcome.code == 0 else None

    kinds = {
        "run.json": "run.json",
        "config.yaml": "config.yaml",
        "selection.json": "selection.json",
        "search.json": "search.json",
        "trajectory.json": "trajectory.json",
        "checkpoints": "checkpoints/*.ckpt",
    }
    Damaged("resume", half_done(*TINY), kinds, resume).go(campaign, tmp_path)


def metrics_of(folder: Path) -> object:
    files = sorted(folder.glob("evaluation-*/metrics.json"))
    return json.loads(files[-1].read_text())["metrics"] if files else None


@pytest.mark.parametrize("method", ["diffora", "bitfit", "full_ft"])
def test_a_run_that_is_evaluated(start, undisturbed, campaign, tmp_path, method):
    own = [o for o in TINY if method == "diffora" or not o.startswith(("search.", "finetune.dropout"))]
    whole, _ = undisturbed(*own, *([] if method == "diffora" else [f"method={method}"]))

    def evaluate(folder: Path) -> tuple[Outcome, object]:
        outcome = start("evaluate.py", f"run={folder}").wait()
        return outcome, metrics_of(folder)

    kinds = {"export": "*/*.safetensors", "settings of the export": "[am][do]*/*.json"}
    if method == "diffora":
        kinds |= {"run.json": "run.json", "config.yaml": "config.yaml"}
    copy = Damaged(f"evaluate {method}", lambda folder: shutil.copytree(whole, folder), kinds, evaluate)
    copy.go(campaign, tmp_path)


def test_a_selection_that_is_used_again(start, undisturbed, campaign, tmp_path):
    whole, _ = undisturbed(*TINY)

    def make(folder: Path) -> None:
        folder.mkdir()
        shutil.copy(whole / "selection.json", folder)

    def use(folder: Path) -> tuple[Outcome, object]:
        # Users may write a selection by hand, so any valid one is used. It must be the one that the file says.
        out = folder / "run"
        outcome = start("train.py", *TINY, f"method.selection={folder}/selection.json", f"hydra.run.dir={out}").wait()
        if outcome.code:
            return outcome, None
        said = json.loads((folder / "selection.json").read_text())["selected"]
        return outcome, json.loads((out / "run.json").read_text())["selection"]["selected"] == said

    Damaged("selection", make, {"selection.json": "selection.json"}, use, 6).go(campaign, tmp_path)


@pytest.mark.parametrize(
    ("task", "model", "kind"), [("paraphrase", "tiny", "token cache"), ("digits", "tiny_vit", "image cache")]
)
def test_a_cache(start, campaign, tmp_path, task, model, kind):
    overrides = [*TINY, "method=lora", f"task={task}", f"model={model}", "finetune.epochs=1"]
    overrides = [o for o in overrides if not o.startswith(("search.", "finetune.dropout"))]
    if task == "digits":
        overrides = [o for o in overrides if not o.startswith(("task.train_rows", "task.validation_rows"))]
        overrides.append("task.max_train_rows=64")

    def use(folder: Path) -> tuple[Outcome, object]:
        out = folder / "run"
        outcome = start("train.py", *overrides, f"hydra.run.dir={out}", env={"DIFFORA_CACHE": str(folder)}).wait()
        return outcome, json.loads((out / "run.json").read_text())["history"] if outcome.code == 0 else None

    def make(folder: Path) -> None:
        outcome, _ = use(folder)
        assert outcome.code == 0, outcome.text
        shutil.rmtree(folder / "run")

    Damaged("second run", make, {kind: "**/*.arrow"}, use, 8).go(campaign, tmp_path)


def test_a_backbone_behind_a_run(start, campaign, tmp_path):
    """The backbone of a finished run is changed. Evaluation and resuming must notice."""

    def make(folder: Path) -> None:
        shutil.copytree(ASSETS / "tiny", folder / "backbone")
        command = [*TINY, "method=lora", f"model.path={folder}/backbone", f"hydra.run.dir={folder}/run"]
        command = [o for o in command if not o.startswith(("search.", "finetune.dropout"))]
        outcome = start("train.py", *command).wait()
        assert outcome.code == 0, outcome.text

    def use(folder: Path) -> tuple[Outcome, object]:
        outcome = start("evaluate.py", f"run={folder}/run", f"model.path={folder}/backbone").wait()
        # The command line names the backbone, so a changed one is used, with a warning.
        warned = "is not the backbone that the run was trained on" in outcome.text
        return outcome, None if warned else metrics_of(folder / "run")

    kinds = {
        "backbone weights": "backbone/model.safetensors",
        "backbone config": "backbone/config.json",
        "tokenizer": "backbone/tokenizer.json",
        "tokenizer config": "backbone/tokenizer_config.json",
    }
    Damaged("evaluate", make, kinds, use).go(campaign, tmp_path)


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_data_of_a_run_that_resumes(start, campaign, tmp_path, ending):
    import datasets
    from omegaconf import OmegaConf

    from diffora.tasks.base import get_task

    def overrides(folder: Path) -> list[str]:
        own = [o for o in TINY if not o.startswith(("search.", "finetune.dropout", "task."))]
        return [*own, "method=lora", "task=mrpc", "task.max_length=64", "finetune.epochs=3", f"task.path={folder}/data"]

    def make(folder: Path) -> None:
        spec = {"_target_": "diffora.tasks.glue.GlueTask", "name": "paraphrase", "train_rows": 64}
        rows = get_task(
            OmegaConf.create(spec | {"validation_rows": 32, "max_train_rows": None, "max_length": 64})
        ).load()
        for name, part in {"train": rows.train, "validation": next(iter(rows.validation.values()))}.items():
            (folder / "data").mkdir(parents=True, exist_ok=True)
            part = part.cast_column("label", datasets.Value("int64"))
            save = part.to_parquet if ending == "parquet" else part.to_json
            save(str(folder / "data" / f"{name}.{ending}"))
        run = start("train.py", *overrides(folder), f"hydra.run.dir={folder}/run")
        run.kill_when(lambda: any(folder.glob("run/checkpoints/finetune-0001-*.ckpt")))

    def use(folder: Path) -> tuple[Outcome, object]:
        where = folder.with_name("copy")
        arguments = (*overrides(where), f"hydra.run.dir={where}/run", "resume=true")
        outcome = start("train.py", *arguments).wait()
        return outcome, json.loads((where / "run/run.json").read_text())["metrics"] if outcome.code == 0 else None

    def make_in_place(folder: Path) -> None:  # the data's path is a setting: resume copies in the same folder
        make(tmp_path / "copy")
        shutil.copytree(tmp_path / "copy", folder)

    Damaged(f"resume, {ending}", make_in_place, {"training data": f"data/train.{ending}"}, use).go(campaign, tmp_path)


def test_damaged_files_that_a_report_reads(start, undisturbed, campaign, tmp_path):
    whole, _ = undisturbed(*TINY)

    def make(folder: Path) -> None:
        shutil.copytree(whole, folder / "runs" / "one")
        shutil.copytree(whole, folder / "runs" / "two")

    def use(folder: Path) -> tuple[Outcome, object]:
        outcome = start("report.py", f"{folder}/runs", f"output={folder}/report").wait()
        tables = {f.name: f.read_text() for f in sorted((folder / "report").glob("*.csv"))}
        said = any(word in outcome.text for word in ("unreadable", "damaged", "cannot be read", "changed"))
        return outcome, None if said else tables

    kinds = {"run.json": "runs/one/run.json", "config.yaml": "runs/one/config.yaml"}
    kinds |= {"selection.json": "runs/one/selection.json", "trajectory.json": "runs/one/trajectory.json"}
    Damaged("report", make, kinds, use, 6).go(campaign, tmp_path)
