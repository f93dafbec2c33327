"""Resuming and evaluation refuse other settings, data or backbones, and damaged files."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from stopped_runs import assert_refused, contents, copy_of, damage, overrides_for, restored, run_of, stop, write_rows

from diffora.errors import UserError
from diffora.hub import EMBEDDED
from diffora.loop.checkpoint import DigestCheckpointIO, newest_checkpoint
from diffora.run.evaluate import evaluate, read_request


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Path]:
    """A folder with data, a backbone, a run stopped in its second epoch and a complete run."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("DIFFORA_CACHE", str(folder / "cache"))
        write_rows(folder / "data", {"train": 40, "validation": 20})
        shutil.copytree(EMBEDDED, folder / "backbone")
        stop(*overrides_for(folder), folder=folder / "stopped")
        run_of(*overrides_for(folder), folder=folder / "complete")
    return folder


@pytest.fixture
def stopped(place, tmp_path) -> Path:
    """A copy of the stopped run."""
    return copy_of(place / "stopped", tmp_path)


def test_replaced_data_are_refused(place, stopped):
    with restored(*(place / "data").iterdir()):
        write_rows(place / "data", {"train": 30, "validation": 24}, seed=1)
        assert_refused(
            *overrides_for(place), folder=stopped, match=r"the data changed: train: 40 -> 30, validation: 20 -> 24 rows"
        )


def test_one_other_label_is_refused(place, stopped):
    file = place / "data" / "validation.jsonl"
    with restored(file):
        first, rest = file.read_text().split("\n", 1)
        row = json.loads(first)
        file.write_text(json.dumps(row | {"label": 1 - row["label"]}) + "\n" + rest)
        assert_refused(
            *overrides_for(place), folder=stopped, match="the data changed: as many rows, with other content"
        )


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer_config.json"])
def test_another_backbone_is_refused(place, stopped, name):
    file = place / "backbone" / name
    with restored(file):
        change_backbone(file)
        assert_refused(*overrides_for(place), folder=stopped, match=f"the backbone's files changed: {name}")


def change_backbone(file: Path) -> None:
    if file.suffix == ".json":
        file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_act": "relu", "model_max_length": 64}))
    else:
        tensors = load_file(file)
        save_file({name: value * 1.01 for name, value in tensors.items()}, file, metadata={"format": "pt"})


def test_other_versions_since_the_earlier_attempt_are_said(place, stopped, caplog):
    """New versions may compute other numbers from the same settings."""
    file = stopped / "run.json"
    record = json.loads(file.read_text())
    del record["sha256"]  # as a person would who changes it
    file.write_text(json.dumps(record | {"versions": record["versions"] | {"torch": "2.10.0"}}))
    with caplog.at_level("WARNING", "diffora"):
        run_of(*overrides_for(place), "resume=true", folder=stopped)
    (line,) = [line for line in caplog.messages if "other versions" in line]
    assert "torch: '2.10.0' -> " in line and "commit" not in line and line in (stopped / "run.log").read_text()


RECORDS = {
    "truncated": lambda text: text[:300],
    "missing": None,
    "a list": lambda text: "[]",
    "an empty object": lambda text: "{}",
    "of another run": lambda text: text.replace('"config_hash": "', '"config_hash": "0'),
}


@pytest.mark.parametrize("how", RECORDS)
def test_other_settings_are_refused_even_with_a_damaged_record(place, stopped, how):
    damage(stopped / "run.json", RECORDS[how])
    assert_refused(*overrides_for(place), "finetune.lr=1e-4", folder=stopped, match=r"finetune\.lr: 0\.001 -> 0\.0001")


def test_without_resume_a_folder_with_checkpoints_is_refused_even_without_a_record(place, stopped):
    (stopped / "run.json").unlink()
    before = contents(stopped)
    with pytest.raises(UserError, match=r"holds a run \(without a readable run.json\) already"):
        run_of(*overrides_for(place), folder=stopped)
    run_of(*overrides_for(place), "dry_run=true", folder=stopped)
    assert contents(stopped) == before


@pytest.mark.parametrize("how", ["truncated", "a list"])
def test_a_run_resumes_although_its_record_is_damaged(place, stopped, how):
    damage(stopped / "run.json", RECORDS[how])
    (stopped / "config.yaml").write_text("seed: [")
    resumed = run_of(*overrides_for(place), "resume=true", folder=stopped)
    complete = json.loads((place / "complete" / "run.json").read_text())
    assert resumed.record["history"] == complete["history"] and resumed.record["metrics"] == complete["metrics"]


def test_a_complete_run_is_refused_if_data_or_backbone_changed(place, tmp_path):
    folder = copy_of(place / "complete", tmp_path)
    record = (folder / "run.json").read_bytes()
    assert run_of(*overrides_for(place), "resume=true", folder=folder).record["status"] == "completed"
    with restored(*(place / "data").iterdir()):
        write_rows(place / "data", {"train": 30, "validation": 24}, seed=1)
        assert_refused(
            *overrides_for(place), folder=folder, match="complete, but its results are not those of today's files"
        )
    with restored(place / "backbone" / "config.json"):
        change_backbone(place / "backbone" / "config.json")
        assert_refused(*overrides_for(place), folder=folder, match=r"the backbone's files changed: config\.json")
    assert (folder / "run.json").read_bytes() == record


def test_a_complete_run_without_its_adapter_runs_again(place, tmp_path):
    folder = copy_of(place / "complete", tmp_path)
    adapter = contents(folder / "adapter")
    shutil.rmtree(folder / "adapter")
    again = run_of(*overrides_for(place), "resume=true", folder=folder)
    assert again.record["status"] == "completed"
    name = "adapter_model.safetensors"
    assert contents(folder / "adapter")[name] == adapter[name]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (lambda c: {"weights": 1}, "it has no epoch, global_step"),
        (lambda c: [1, 2], "it holds a list"),
        (lambda c: {k: v for k, v in c.items() if k != "made_with"}, "it has no made_with"),
        (lambda c: c | {"made_with": {}}, "its made_with cannot be right"),
        (lambda c: {k: v for k, v in c.items() if k != "loops"}, "it has no loops"),
        (lambda c: c | {"diffora": {"rng": c["diffora"]["rng"], "state": {}}}, "it has no elapsed"),
        (lambda c: c | {"diffora": c["diffora"] | {"state": {}}}, "it has no 'history'"),
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
def test_a_checkpoint_with_wrong_content_gives_one_message(place, stopped, how, words):
    file, before = newest_checkpoint(stopped / "checkpoints", "finetune")
    file.unlink()
    DigestCheckpointIO().save_checkpoint(how(before), stopped / "checkpoints" / "finetune-0001.ckpt")
    with pytest.raises(UserError, match=rf"finetune-0001-.*{words}") as caught:
        run_of(*overrides_for(place), "resume=true", folder=stopped)
    assert len(caught.value.problems) == 1


# --- evaluation ---


def test_evaluation_refuses_another_backbone_unless_it_is_named(place, tmp_path, caplog):
    folder = copy_of(place / "complete", tmp_path)
    request = [f"run={folder}", f"output={tmp_path / 'out'}"]
    file = place / "backbone" / "model.safetensors"
    with restored(file):
        change_backbone(file)
        with pytest.raises(UserError, match=r"backbone's files changed: model\.safetensors in .*backbone") as caught:
            evaluate(read_request(request))
        assert len(caught.value.problems) == 1 and not (tmp_path / "out").exists()
        evaluate(read_request([*request, f"model.path={place / 'backbone'}"]))
        assert "is not the backbone that the run was trained on" in caplog.text
    caplog.clear()
    evaluate(read_request([f"run={folder}", f"output={tmp_path / 'same'}"]))
    assert "backbone" not in caplog.text
    (folder / "run.json").unlink()  # the adapter knows its backbone too
    evaluate(read_request([f"run={folder}", f"output={tmp_path / 'without record'}"]))
    assert "backbone" not in caplog.text
    with restored(file):
        change_backbone(file)
        with pytest.raises(UserError, match=r"backbone's files changed: model\.safetensors in .*backbone"):
            evaluate(read_request([f"run={folder}", f"output={tmp_path / 'other'}"]))


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
def test_evaluation_refuses_changed_settings_and_weights(place, tmp_path, name):
    folder = copy_of(place / "complete", tmp_path)
    DAMAGES[name](folder)
    with pytest.raises(UserError, match=f"{name} is not as the run left it"):
        evaluate(read_request([f"run={folder}", f"output={tmp_path / 'out'}"]))
    if (folder / name).exists():
        assert_refused(*overrides_for(place), folder=folder, match=f"{name} is not as the run left it")
        (folder / name).unlink()  # as the message says
    run_of(*overrides_for(place), "resume=true", folder=folder)
    evaluate(read_request([f"run={folder}", f"output={tmp_path / 'out'}"]))


def test_evaluation_refuses_a_damaged_record_and_says_that_it_is_missing(place, tmp_path, caplog):
    folder = copy_of(place / "complete", tmp_path)
    (folder / "run.json").unlink()
    evaluate(read_request([f"run={folder}", f"output={tmp_path / 'out'}"]))
    assert f"{folder} has no run.json: nothing shows whether its settings are as they were" in caplog.text
    (folder / "run.json").write_text("[]")
    with pytest.raises(UserError, match=r"run\.json"):
        evaluate(read_request([f"run={folder}", f"output={tmp_path / 'other'}"]))


def test_evaluation_refuses_the_adapter_of_another_run(place, tmp_path):
    """The other adapter is complete and fits the model."""
    folder = copy_of(place / "complete", tmp_path)
    run_of(*overrides_for(place), "seed=5", folder=tmp_path / "other")
    shutil.rmtree(folder / "adapter")
    shutil.copytree(tmp_path / "other" / "adapter", folder / "adapter")
    with pytest.raises(UserError, match=r"adapter/adapter_model\.safetensors.* not as the run left it"):
        evaluate(read_request([f"run={folder}", f"output={tmp_path / 'out'}"]))
