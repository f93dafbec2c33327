"""What a stopped run goes on from: the same settings, data and backbone, and then to the very same end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import REPO
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file, save_file

from diffora.errors import UserError
from diffora.files import conf_dir
from diffora.hub import EMBEDDED
from diffora.loop.checkpoint import DigestCheckpointIO, newest_checkpoint
from diffora.loop.stage import Stage
from diffora.run.evaluate import evaluate, read_request
from diffora.run.experiment import Result, run
from diffora.search.attribution import AttributionModule
from diffora.search.bilevel import SearchModule
from diffora.tasks.embedded.paraphrase import splits
from diffora.training.finetune import FineTuneModule

SHORT = ["experiment=quickstart", "finetune.warmup_steps=2", "finetune.batch_size=8", "finetune.dropout=0.1"]
LORA = [*SHORT, "method=lora", "finetune.epochs=2"]


class Stopped(BaseException):
    """In place of a kill."""


def run_of(*overrides: str, folder: Path) -> Result:
    torch.set_num_threads(1)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", list(overrides))
    return run(cfg, folder)


def stop(*overrides: str, folder: Path, module: type[Stage] = FineTuneModule, epoch: int = 1, batch: int = 1) -> None:
    """Run until a batch of an epoch of a stage begins, and no further."""
    step = module.training_step

    def training_step(self, data, batch_idx):
        if self.current_epoch == epoch and batch_idx == batch:
            raise Stopped
        return step(self, data, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "training_step", training_step)
        with pytest.raises(Stopped):
            run_of(*overrides, folder=folder)


def write_rows(folder: Path, sizes: dict[str, int], seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    made = splits(sizes["train"], sizes["validation"], seed)
    for name, part in made.items():
        rows = [dict(zip(part, values, strict=True)) for values in zip(*part.values(), strict=True)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Path]:
    """A folder with data, a backbone, a run that was stopped in its second epoch and one that is complete."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("DIFFORA_CACHE", str(folder / "cache"))
        write_rows(folder / "data", {"train": 40, "validation": 20})
        shutil.copytree(EMBEDDED, folder / "backbone")
        stop(*given(folder), folder=folder / "stopped")
        run_of(*given(folder), folder=folder / "complete")
    return folder


def given(place: Path) -> list[str]:
    where = [f"task.path={place / 'data'}", "task.max_length=32", f"model.path={place / 'backbone'}"]
    return [*LORA, "task=mrpc", *where]


@pytest.fixture
def stopped(place, tmp_path) -> Path:
    """A copy of the stopped run."""
    return Path(shutil.copytree(place / "stopped", tmp_path / "run"))


@contextmanager
def changed(*files: Path) -> Iterator[None]:
    """Bring files back afterwards."""
    before = {file: file.read_bytes() if file.exists() else None for file in files}
    try:
        yield
    finally:
        for file, content in before.items():
            if content is None:
                file.unlink(missing_ok=True)
            else:
                file.write_bytes(content)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refused(*overrides: str, folder: Path, match: str) -> None:
    """The run is refused, and nothing in its folder changes."""
    before = content(folder)
    with pytest.raises(UserError, match=match):
        run_of(*overrides, "resume=true", folder=folder)
    assert content(folder) == before


def same(a: Result, b: Result) -> None:
    for key in ("metrics", "history", "selection", "params", "data_hash", "backbone"):
        assert a.record[key] == b.record[key], key
    ours, theirs = (load_file(each.folder / "adapter/adapter_model.safetensors") for each in (a, b))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


# --- what changed since the stop ---


def test_replaced_data_are_refused(place, stopped):
    """B7"""
    with changed(*(place / "data").iterdir()):
        write_rows(place / "data", {"train": 30, "validation": 24}, seed=1)
        refused(*given(place), folder=stopped, match=r"the data changed: train: 40 -> 30, validation: 20 -> 24 rows")


def test_one_other_label_is_refused(place, stopped):
    file = place / "data" / "validation.jsonl"
    with changed(file):
        first, rest = file.read_text().split("\n", 1)
        row = json.loads(first)
        file.write_text(json.dumps(row | {"label": 1 - row["label"]}) + "\n" + rest)
        refused(*given(place), folder=stopped, match="the data changed: as many rows, with other content")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer_config.json"])
def test_another_backbone_is_refused(place, stopped, name):
    file = place / "backbone" / name
    with changed(file):
        change_backbone(file)
        refused(*given(place), folder=stopped, match=f"the backbone's files changed: {name}")


def change_backbone(file: Path) -> None:
    if file.suffix == ".json":
        file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_act": "relu", "model_max_length": 64}))
    else:
        tensors = load_file(file)
        save_file({name: value * 1.01 for name, value in tensors.items()}, file, metadata={"format": "pt"})


RECORDS = {
    "truncated": lambda text: text[:300],
    "missing": None,
    "a list": lambda text: "[]",
    "an empty object": lambda text: "{}",
    "of another run": lambda text: text.replace('"config_hash": "', '"config_hash": "0'),
}


@pytest.mark.parametrize("how", RECORDS)
def test_other_settings_are_refused_whatever_the_record_is(place, stopped, how):
    """B8"""
    damage(stopped / "run.json", RECORDS[how])
    refused(*given(place), "finetune.lr=1e-4", folder=stopped, match=r"finetune\.lr: 0\.001 -> 0\.0001")


def damage(file: Path, how) -> None:
    if how is None:
        file.unlink()
    else:
        file.write_text(how(file.read_text()))


def test_without_resume_a_folder_with_checkpoints_is_refused_whatever_the_record_is(place, stopped):
    (stopped / "run.json").unlink()
    before = content(stopped)
    with pytest.raises(UserError, match=r"holds a run \(without a readable run.json\) already"):
        run_of(*given(place), folder=stopped)
    run_of(*given(place), "dry_run=true", folder=stopped)
    assert content(stopped) == before


@pytest.mark.parametrize("how", ["truncated", "a list"])
def test_a_damaged_record_alone_stops_nothing(place, stopped, how):
    damage(stopped / "run.json", RECORDS[how])
    (stopped / "config.yaml").write_text("seed: [")
    resumed = run_of(*given(place), "resume=true", folder=stopped)
    complete = json.loads((place / "complete" / "run.json").read_text())
    assert resumed.record["history"] == complete["history"] and resumed.record["metrics"] == complete["metrics"]


def test_a_complete_run_claims_no_results_for_other_files(place, tmp_path):
    folder = Path(shutil.copytree(place / "complete", tmp_path / "run"))
    record = (folder / "run.json").read_bytes()
    assert run_of(*given(place), "resume=true", folder=folder).record["status"] == "completed"
    with changed(*(place / "data").iterdir()):
        write_rows(place / "data", {"train": 30, "validation": 24}, seed=1)
        refused(*given(place), folder=folder, match="complete, but its results are not those of today's files")
    with changed(place / "backbone" / "config.json"):
        change_backbone(place / "backbone" / "config.json")
        refused(*given(place), folder=folder, match=r"the backbone's files changed: config\.json")
    assert (folder / "run.json").read_bytes() == record


def test_a_complete_run_without_its_adapter_goes_on(place, tmp_path):
    folder = Path(shutil.copytree(place / "complete", tmp_path / "run"))
    adapter = content(folder / "adapter")
    shutil.rmtree(folder / "adapter")
    again = run_of(*given(place), "resume=true", folder=folder)
    assert again.record["status"] == "completed"
    name = "adapter_model.safetensors"
    assert content(folder / "adapter")[name] == adapter[name]


# --- content of a checkpoint ---


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (lambda c: {"weights": 1}, "it has no epoch, global_step"),
        (lambda c: [1, 2], "it holds a list"),
        (lambda c: {k: v for k, v in c.items() if k != "made_with"}, "it has no made_with"),
        (lambda c: c | {"made_with": {}}, "its made_with cannot be right"),
        (lambda c: {k: v for k, v in c.items() if k != "loops"}, "it has no loops"),
        (lambda c: c | {"diffora": {"rng": c["diffora"]["rng"], "memory": {}}}, "it has no elapsed"),
        (lambda c: c | {"diffora": c["diffora"] | {"memory": {}}}, "it has no 'history'"),
        (lambda c: c | {"diffora": c["diffora"] | {"rng": [{"torch": 1}]}}, "checkpoint"),
        (lambda c: c | {"optimizer_states": [{}]}, "it has no 'param_groups'"),
        (lambda c: c | {"optimizer_states": []}, "it has 0 optimizer_states, this run needs 1"),
        (lambda c: c | {"state_dict": {f"x{k}": v for k, v in c["state_dict"].items()}}, "is trained only in this run"),
        (
            lambda c: c | {"state_dict": {k: v[:1] for k, v in c["state_dict"].items()}},
            "in the checkpoint and .* in this run",
        ),
    ],
)
def test_content_of_the_wrong_kind_gets_one_message(place, stopped, how, words):
    file, before = newest_checkpoint(stopped / "checkpoints", "finetune")
    file.unlink()
    DigestCheckpointIO().save_checkpoint(how(before), stopped / "checkpoints" / "finetune-0001.ckpt")
    with pytest.raises(UserError, match=rf"finetune-0001-.*{words}") as caught:
        run_of(*given(place), "resume=true", folder=stopped)
    assert len(caught.value.problems) == 1


# --- a finished search ---

SEARCH = [*SHORT, "task.train_rows=48", "task.validation_rows=24", "search.epochs=2", "finetune.epochs=1"]
SEARCH += ["search.batch_size=8"]


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> Path:
    """A run that was stopped after its search, with the searched weights, before the first epoch of fine-tuning."""
    folder = tmp_path_factory.mktemp("searched") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("DIFFORA_CACHE", str(folder.parent / "cache"))
        stop(*SEARCH, "method.warm_start=true", folder=folder, epoch=0)
    return folder


def test_a_search_under_other_settings_is_not_taken_over(searched, tmp_path):
    folder = Path(shutil.copytree(searched, tmp_path / "run"))
    shutil.rmtree(folder / "checkpoints")
    (folder / "run.json").write_text("[]")
    words = r"search\.json was made with(.|\n)*search\.lr: "
    refused(*SEARCH, "method.warm_start=true", "search.lr=1e-5", folder=folder, match=words)


@pytest.mark.parametrize("name", ["selection.json", "selection.safetensors"])
def test_what_a_search_left_is_taken_over_as_it_was_left_only(searched, tmp_path, name):
    folder = Path(shutil.copytree(searched, tmp_path / "run"))
    flipped = bytearray((folder / name).read_bytes())
    flipped[-40] ^= 1
    (folder / name).write_bytes(flipped)
    refused(*SEARCH, "method.warm_start=true", folder=folder, match=rf"{name} is not as the search wrote it")
    (folder / name).unlink()  # as the message says
    run_of(*SEARCH, "method.warm_start=true", "resume=true", folder=folder)
    assert (folder / name).read_bytes() == (searched / name).read_bytes()


@pytest.mark.parametrize("how", [lambda t: "", lambda t: "[]", lambda t: t.replace('"seconds": ', '"seconds": 1')])
def test_a_damaged_search_json_costs_nothing(searched, tmp_path, how):
    folder = Path(shutil.copytree(searched, tmp_path / "run"))
    damage(folder / "search.json", how)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(SearchModule, "training_step")
        run_of(*SEARCH, "method.warm_start=true", "resume=true", folder=folder)
    for name in ("selection.json", "search.json"):
        assert (folder / name).read_bytes() == (searched / name).read_bytes()


# --- evaluation ---


def test_evaluation_refuses_another_backbone_unless_it_is_named(place, tmp_path, caplog):
    """B9"""
    folder = Path(shutil.copytree(place / "complete", tmp_path / "run"))
    request = [f"run={folder}", f"output={tmp_path / 'out'}"]
    file = place / "backbone" / "model.safetensors"
    with changed(file):
        change_backbone(file)
        with pytest.raises(UserError, match=r"backbone's files changed: model\.safetensors in .*backbone") as caught:
            evaluate(read_request(request))
        assert len(caught.value.problems) == 1 and not (tmp_path / "out").exists()
        evaluate(read_request([*request, f"model.path={place / 'backbone'}"]))
        assert "is not the backbone that the run was trained on" in caplog.text
    caplog.clear()
    evaluate(read_request([f"run={folder}", f"output={tmp_path / 'same'}"]))
    assert "backbone" not in caplog.text
    (folder / "run.json").write_text("[]")
    evaluate(read_request([f"run={folder}", f"output={tmp_path / 'unknown'}"]))
    assert "may not be the backbone that the run was trained on" in caplog.text


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def other_settings(folder: Path) -> None:
    file = folder / "config.yaml"
    file.write_text(file.read_text().replace("max_length: 32", "max_length: 8"))


DAMAGES = {
    "adapter/adapter_model.safetensors": lambda folder: flip(folder / "adapter/adapter_model.safetensors"),
    "adapter/manifest.json": lambda folder: (folder / "adapter/manifest.json").unlink(),
    "config.yaml": other_settings,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_settings_and_weights_that_are_not_the_runs_are_refused(place, tmp_path, name):
    folder = Path(shutil.copytree(place / "complete", tmp_path / "run"))
    DAMAGES[name](folder)
    with pytest.raises(UserError, match=f"{name} is not as the run left it"):
        evaluate(read_request([f"run={folder}", f"output={tmp_path / 'out'}"]))
    if (folder / name).exists():
        refused(*given(place), folder=folder, match=f"{name} is not as the run left it")
        (folder / name).unlink()  # as the message says
    run_of(*given(place), "resume=true", folder=folder)
    evaluate(read_request([f"run={folder}", f"output={tmp_path / 'out'}"]))


def test_the_adapter_of_another_run_is_refused(place, tmp_path):
    """It is whole, and fits the model."""
    folder = Path(shutil.copytree(place / "complete", tmp_path / "run"))
    run_of(*given(place), "seed=5", folder=tmp_path / "other")
    shutil.rmtree(folder / "adapter")
    shutil.copytree(tmp_path / "other" / "adapter", folder / "adapter")
    with pytest.raises(UserError, match=r"adapter/adapter_model\.safetensors.* not as the run left it"):
        evaluate(read_request([f"run={folder}", f"output={tmp_path / 'out'}"]))


# --- the same end, with any number of workers ---


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_fine_tuning_ends_as_if_never_stopped(workers, tmp_path):
    """B10"""
    overrides = [
        *LORA,
        "task.train_rows=48",
        "task.validation_rows=24",
        "finetune.epochs=3",
        f"trainer.num_workers={workers}",
    ]
    whole = run_of(*overrides, folder=tmp_path / "whole")
    stop(*overrides, folder=tmp_path / "part", batch=2)
    stop(*overrides, "resume=true", folder=tmp_path / "part", epoch=2)  # and once more
    same(run_of(*overrides, "resume=true", folder=tmp_path / "part"), whole)


@pytest.mark.parametrize(
    ("module", "more"),
    [
        (SearchModule, ["search.update=alternating"]),
        (SearchModule, ["search.update=simultaneous", "search.train_steps=2"]),
        (AttributionModule, ["method.selector=attribution", "method.score_batches=2"]),
    ],
    ids=["alternating", "simultaneous", "attribution"],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_search_ends_as_if_never_stopped(workers, module, more, tmp_path):
    overrides = [*SEARCH, *more, f"trainer.num_workers={workers}"]
    whole = run_of(*overrides, folder=tmp_path / "whole")
    stop(*overrides, folder=tmp_path / "part", module=module)
    resumed = run_of(*overrides, "resume=true", folder=tmp_path / "part")
    assert resumed.selection == whole.selection
    same(resumed, whole)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["search-0001-*.ckpt", "finetune-0001-*.ckpt"])
def test_killed_with_workers_and_resumed(pattern, tmp_path):
    """B10, with a true kill in the middle of an epoch."""
    overrides = [*SEARCH, "trainer.num_workers=2", "finetune.epochs=3", "task.train_rows=400"]
    whole = run_of(*overrides, folder=tmp_path / "whole")
    command = [sys.executable, str(REPO / "train.py"), *overrides, f"hydra.run.dir={tmp_path / 'part'}"]
    process = subprocess.Popen(command, cwd=REPO, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
    deadline = time.time() + 300
    while not list((tmp_path / "part" / "checkpoints").glob(pattern)):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    same(run_of(*overrides, "resume=true", folder=tmp_path / "part"), whole)
