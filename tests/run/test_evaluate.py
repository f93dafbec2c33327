"""Evaluating a finished run gives the run's own numbers, and predictions for rows without labels."""

import json
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import REPO
from omegaconf import OmegaConf
from small import small_task

from diffora import trust
from diffora.errors import UserError
from diffora.places import conf_dir
from diffora.run.evaluate import evaluate, read_request
from diffora.run.experiment import run
from diffora.run.trained import override
from diffora.tasks.embedded.paraphrase import splits


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("method", ["diffora", "houlsby", "ia3", "full_ft", "head_only"])
def test_evaluation_gives_the_runs_own_metrics(cfg, quick, tmp_path, method):
    """For each format of trained weights: an adapter that PEFT reads, our own, PEFT's other tuners, a whole model."""
    torch.set_num_threads(1)
    changes = [o for o in quick if not o.startswith("search.") or method == "diffora"]
    changes = [o for o in changes if "dropout" not in o or method == "diffora"]
    done = run(cfg(*changes, f"method={method}", "finetune.lr=3e-3"), tmp_path / "run")
    found = evaluate(read_request([f"run={tmp_path / 'run'}", f"output={tmp_path / 'out'}"]))
    for name in ("accuracy", "f1", "loss"):
        assert found["validation"][name] == pytest.approx(done.metrics[f"validation/{name}"], abs=2e-6)
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written["metrics"] == found and written["rows"] == {"validation": 48}
    predictions = lines(tmp_path / "out" / "validation.jsonl")
    labels = splits(train_rows=1, validation_rows=48, seed=0)["validation"]["label"]
    right = sum(p["class_number"] == label for p, label in zip(predictions, labels, strict=True))
    assert right / 48 == pytest.approx(found["validation"]["accuracy"], abs=1e-6)


@pytest.fixture
def mrpc(cfg, tmp_path):
    """A run on local files in MRPC's columns, with a test split that has no labels."""
    torch.set_num_threads(1)
    rows = splits(train_rows=64, validation_rows=32, seed=0)
    (tmp_path / "data").mkdir()
    for name, part in rows.items():
        table = [dict(zip(part, values, strict=True)) for values in zip(*part.values(), strict=True)]
        for split, keep in ((name, True), *([("test", False)] if name == "validation" else [])):
            kept = [row if keep else {k: v for k, v in row.items() if k != "label"} for row in table]
            (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, kept)) + "\n")
    overrides = ["experiment=quickstart", "task=mrpc", f"task.path={tmp_path / 'data'}", "method=lora"]
    return cfg(*overrides, "task.recipe.epochs=1", "predict=true", "task.max_length=64"), tmp_path


def test_rows_without_labels_get_predictions_and_no_score(mrpc):
    composed, folder = mrpc
    run(composed, folder / "run")
    found = evaluate(read_request([f"run={folder / 'run'}", "split=[test,validation]", f"output={folder / 'out'}"]))
    assert found["test"] == {} and found["validation"].keys() == {"loss", "accuracy", "f1"}
    names = sorted(file.name for file in (folder / "out").iterdir())
    assert "metrics.json" in names and len(names) >= 3
    of_run = {file.name: file.read_bytes() for file in (folder / "run" / "predictions").iterdir()}
    assert of_run  # predict=true wrote the same files at the end of the run
    for name, content in of_run.items():
        assert (folder / "out" / name).read_bytes() == content
    with zipfile.ZipFile(folder / "run" / "predictions" / "GLUE.zip") as archive:
        assert archive.namelist() == ["MRPC.tsv"] and archive.read("MRPC.tsv") == of_run["MRPC.tsv"]


def test_predict_is_refused_before_training_if_there_is_nothing_to_predict(mrpc):
    composed, folder = mrpc
    (folder / "data" / "test.jsonl").unlink()
    with pytest.raises(UserError, match="no file for the split 'test'"):
        run(composed, folder / "run")
    assert not (folder / "run").exists() or not list((folder / "run").iterdir())


def test_mistakes_have_messages(tmp_path):
    cases = {
        ("splt=test", "run=x"): "unknown key splt: did you mean split",
        ("run=x", "adapter=y"): "either run=",
        (): "either run=",
        ("run=x", "batch_size=0"): "batch_size=0 must be",
        (f"run={tmp_path}",): "no config.yaml",
        (f"adapter={tmp_path}", "task=mrpc"): "is not an adapter",
        ("run=x", "method=lora"): "unknown key method",
        ("run=x", "finetune.lr=3"): "unknown key finetune.lr: method and settings of training do not matter here",
        ("run=x", "nonsense"): "not of the form name=value",
        ("run=x", "task.max_length=8,16"): "task.max_length=8,16: this program takes one value of task.max_length",
        ("run=x", "~task.max_length"): "~task.max_length: this program cannot remove a setting",
        ("run=x", "trainer.devices=2"): "trainer.devices=2: evaluation takes one device",
    }
    for arguments, message in cases.items():
        with pytest.raises(UserError) as caught:
            read_request(list(arguments))
        assert message in "\n".join(caught.value.problems), arguments


def test_a_nested_setting_whose_value_is_null_can_be_given(cfg):
    composed = cfg("task=dialogue", "model=tiny_llama")
    assert composed.task.generation.answer is None
    assert override(composed, [], {"task.generation.answer": "x"}).task.generation.answer == "x"
    with pytest.raises(UserError, match=r"has no task\.generation\.anser"):
        override(composed, [], {"task.generation.anser": "x"})


def test_command_prints_help_quickly_and_errors_without_traceback():
    helped = subprocess.run([sys.executable, str(REPO / "evaluate.py"), "--help"], capture_output=True, text=True)
    assert helped.returncode == 0 and "run=<run directory>" in helped.stdout
    wrong = subprocess.run([sys.executable, str(REPO / "evaluate.py"), "run=/nowhere"], capture_output=True, text=True)
    told = wrong.stderr.splitlines()  # on a busy machine, a line about waiting threads comes first
    assert wrong.returncode == 1 and told[-1].startswith("error: run=/nowhere") and "Traceback" not in wrong.stderr


def test_the_classes_of_a_whole_model_are_those_in_its_configuration(cfg, quick, tmp_path):
    texts = {"neg": "the king sleeps", "neu": "the baker has bread", "pos": "the queen sings"}

    def written(file, names):
        rows = [f"{texts[name]} {i},{names.get(name, name)}" for i in range(12) for name in texts]
        (tmp_path / file).write_text("\n".join(["text,label", *rows]) + "\n")
        return tmp_path / file

    more = ["task=text", "task.max_length=16", "model=tiny", "method=full_ft", "trainer=cpu", "logger=none"]
    more += ["finetune.epochs=1", "finetune.batch_size=8", "finetune.warmup_steps=0"]
    run(cfg(*more, f"task.path={written('rows.csv', {})}"), tmp_path / "run")
    shutil.copytree(tmp_path / "run" / "model", tmp_path / "copied")
    given = [f"adapter={tmp_path / 'copied'}", "task=text", "task.max_length=16", "model=tiny"]
    given += ["trainer.accelerator=cpu", f"output={tmp_path / 'out'}"]
    with pytest.raises(UserError, match="Pos"):
        evaluate(read_request([*given, f"task.path={written('other.csv', {'pos': 'Pos'})}"]))
    found = evaluate(read_request([*given, f"task.path={tmp_path / 'rows.csv'}"]))
    assert found and not (tmp_path / "copied" / "run.json").exists()


def test_classes_that_differ_in_capitals_only_are_the_same():
    small_task("sst2").expect(["NEGATIVE", "POSITIVE"])
    with pytest.raises(UserError, match="was trained on the classes POSITIVE, NEGATIVE"):
        small_task("sst2").expect(["POSITIVE", "NEGATIVE"])


def test_an_adapter_of_another_kind_of_task_is_refused(cfg, quick, tmp_path):
    """Otherwise its head would keep its random weights and be scored."""
    torch.set_num_threads(1)
    overrides = [o for o in quick if not o.startswith(("search.", "finetune.dropout"))]
    run(cfg(*overrides, "method=lora", "finetune.epochs=1"), tmp_path / "text")
    run(cfg(*overrides, "method=dora", "finetune.epochs=1"), tmp_path / "peft")
    for weights in ("text", "peft"):
        arguments = [f"adapter={tmp_path / weights / 'adapter'}", "model=tiny_llama", "task=dialogue"]
        few = ["task.validation_rows=8", "task.train_rows=8"]
        with pytest.raises(UserError, match="was trained for a Deberta"):
            evaluate(read_request([*arguments, *few, f"output={tmp_path / 'o'}"]))
    lm = ["task=dialogue", "model=tiny_llama", "trainer=cpu", "logger=[csv]", "task.train_rows=40"]
    lm += ["task.validation_rows=8", "method=lora", "finetune.epochs=1", "finetune.warmup_steps=0"]
    run(cfg(*lm), tmp_path / "lm")
    arguments = [f"adapter={tmp_path / 'lm' / 'adapter'}", "model=tiny_llama", "task=paraphrase"]
    with pytest.raises(UserError, match="was trained for a LlamaForCausalLM"):
        evaluate(read_request([*arguments, f"output={tmp_path / 'o'}"]))


def test_unknown_choices_are_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="task=nope is not one of"):
        read_request([f"adapter={tmp_path}", "task=nope", "model=tiny"])


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder of the user: ``conf/task/mine.yaml`` and, beside ``conf``, the module of its class."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(trust, "_folders", [])
    (tmp_path / "own" / "conf" / "task").mkdir(parents=True)
    (tmp_path / "own" / "my_evaluated_task.py").write_text(
        "from diffora.tasks.text import TextTask\n\n\nclass Mine(TextTask):\n    pass\n"
    )
    text = (conf_dir() / "task" / "text.yaml").read_text()
    mine = text.replace("diffora.tasks.text.TextTask", "my_evaluated_task.Mine").replace("path: null", "path: mine.csv")
    (tmp_path / "own" / "conf" / "task" / "mine.yaml").write_text(mine)
    yield tmp_path / "own" / "conf"
    sys.modules.pop("my_evaluated_task", None)


def test_choices_and_classes_of_the_users_own_are_found_from_another_folder(cfg, own, tmp_path):
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(OmegaConf.to_yaml(cfg("task=text", "task.path=a.csv")))
    words = [f"run={tmp_path / 'run'}", f"output={tmp_path / 'out'}"]
    with pytest.raises(UserError, match="Python finds no module my_evaluated_task"):
        read_request([*words, "task._target_=my_evaluated_task.Mine"])
    with pytest.raises(UserError, match=r"task=mine is not one of: .*text, tokens"):
        read_request([*words, "task=mine"])
    for option in (["--config-dir", str(own)], [f"--config-dir={own}"], ["-cd", str(own)]):
        request = read_request([*option, *words, "task=mine"])
        assert request.cfg.task._target_ == "my_evaluated_task.Mine" and request.cfg.task.path == "mine.csv"
        assert read_request([*words, *option, "task._target_=my_evaluated_task.Mine"]).cfg.task.path == "a.csv"
    with pytest.raises(UserError, match="--config-dir needs a folder"):
        read_request([*words, "--config-dir"])
    with pytest.raises(UserError, match=r"--config-dir=.*nowhere is not a folder"):
        read_request([*words, "--config-dir=nowhere"])


def test_a_run_folder_alone_names_no_class_of_the_user(cfg, own, tmp_path):
    """--config-dir says where classes are; which of them is imported is still said on the command line."""
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    composed = cfg("task=text", "task.path=a.csv", "task._target_=my_evaluated_task.Mine")
    (tmp_path / "run" / "config.yaml").write_text(OmegaConf.to_yaml(composed))
    with pytest.raises(UserError, match="A file may not name other code"):
        read_request([f"run={tmp_path / 'run'}", f"--config-dir={own}"])
    assert "my_evaluated_task" not in sys.modules


def test_an_adapter_that_names_no_classes_gets_a_warning_and_other_numbers_of_classes_a_reason(cfg, tmp_path, caplog):
    torch.set_num_threads(1)
    for name, classes in (("three", ("good", "bad", "fine")), ("two", ("good", "bad"))):
        rows = [f"this is {classes[i % len(classes)]} {i},{classes[i % len(classes)]}" for i in range(36)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    of_text = ["model=tiny", "trainer=cpu", "task.max_length=16"]
    more = ["method=lora", "task=text", f"task.path={tmp_path / 'three.csv'}", "logger=[]", "finetune.epochs=1"]
    run(cfg(*of_text, *more), tmp_path / "run")
    adapter = shutil.copytree(tmp_path / "run" / "adapter", tmp_path / "plain")
    (adapter / "manifest.json").unlink()  # as PEFT writes it
    asked = [f"adapter={adapter}", "task=text", *of_text]
    evaluate(read_request([*asked, f"task.path={tmp_path / 'three.csv'}"]))
    assert "does not name its classes: they count as bad, fine, good, in this order" in caplog.text
    with pytest.raises(UserError, match=r"classifier\.(weight|bias) is \(3.*there and \(2.* here"):
        evaluate(read_request([*asked, f"task.path={tmp_path / 'two.csv'}"]))
