"""Nothing from a file is executed or resolved: cases A1 to A3, A5 to A7 of docs/project/reliability.md, and others."""

import csv
import html.parser
import io
import json
import os
import pickle
import re
import shutil
import sys
from datetime import date
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPO
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hypothesis import given
from hypothesis import strategies as st
from made_runs import made_run
from omegaconf import OmegaConf

from diffora import cli, trust
from diffora.adapters.manifest import write_manifest
from diffora.api import load_adapter
from diffora.backbones.load import load_backbone
from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.methods.base import Method
from diffora.methods.lora import LoRA
from diffora.methods.peft import build
from diffora.places import conf_dir
from diffora.records import read_content, write_record
from diffora.report.page import write
from diffora.report.runs import gather
from diffora.run import figures, terminal
from diffora.run.check import check
from diffora.run.evaluate import evaluate, read_request
from diffora.run.experiment import run
from diffora.run.trained import load_trained
from diffora.settings.read import model_of
from diffora.tasks.base import Task, get_task
from diffora.tasks.glue import GlueTask
from diffora.trust import class_at, literal, settings

SECRET = "hunter2-the-value-of-a-variable"
FILE = Path("config.yaml")


def problems(call, *arguments, **named):
    with pytest.raises(UserError) as caught:
        call(*arguments, **named)
    assert "Traceback" not in str(caught.value)
    return "\n".join(caught.value.problems)


# --- a finished run, made once, and changed copies of it ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run whose adapter/ is in this project's own format (diffora.json), with text like ${…} as its row's name."""
    place = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFORA_CACHE", str(place / "cache"))
        patch.setenv("SECRET", SECRET)
        GlobalHydra.instance().clear()
        overrides = ["experiment=quickstart", "method=houlsby", "task.train_rows=32", "task.validation_rows=16"]
        overrides += ["finetune.epochs=1", "finetune.warmup_steps=0", "logger=[csv]"]
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg = compose("config", [*overrides, "cell.row='${oc.env:SECRET}'"])
        run(cfg, place / "run")
    return place / "run"


@pytest.fixture
def arrived(finished, tmp_path, monkeypatch):
    """Makes a copy of the run with changed settings in config.yaml, e.g. ``{"task._target_": …}``."""
    monkeypatch.setenv("SECRET", SECRET)

    def make(changes=None, text=None):
        folder = tmp_path / "run-x"
        shutil.copytree(finished, folder)
        content = yaml.safe_load((folder / "config.yaml").read_text())
        for key, value in (changes or {}).items():
            node, *rest = content, *key.split(".")
            for name in rest[:-1]:
                node = node[name]
            node[rest[-1]] = value
        (folder / "config.yaml").write_text(yaml.safe_dump(content) if text is None else text)
        record = read_content(folder / "run.json")
        write_record(folder, {key: value for key, value in record.items() if key != "digests"})  # an attacker can do so
        return folder

    return make


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """(mark, dotted path) of a module beside the run. Importing it would work and would create the file ``mark``.

    The working directory is on Python's path, as for ``python -m``.
    """
    mark = tmp_path / "mark"
    (tmp_path / "run-x").mkdir()
    code = (
        f"from pathlib import Path\nfrom diffora.tasks.glue import GlueTask\nfrom diffora.methods.lora import LoRA\n"
        f"Path({str(mark)!r}).write_text('imported')\n"
        "class X(GlueTask): pass\nclass M(LoRA): pass\n"
    )
    (tmp_path / "run-x" / "evil.py").write_text(code)
    (tmp_path / "evil.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield mark
    for name in [name for name in sys.modules if name.endswith("evil") or name.startswith("run-x")]:
        del sys.modules[name]


# --- one function for every _target_ ---

FOREIGN = [
    "subprocess.Popen",
    "os.system",
    "builtins.eval",
    "evil.X",
    "run-x.evil.X",
    "outputs.run-x.evil.X",
    ".evil.X",
    "..evil.X",
    "evil..X",
    "evil.X.",
    "evil",
    "",
    None,
    5,
    ["diffora.tasks.glue.GlueTask"],
    {"a": 1},
    "diffora",
    "diffora.evil.X",
    "diffora.tasks.evil.X",
    "diffora.cli.fail",
    "diffora.tasks.base.Task",
    "diffora.tasks.base.torch",
    "diffora.tasks.glue.GlueTask.__init__",
    "diffora.methods.lora.LoRA",
    "diffora.tasks.glue.Path",
    "diffora.tasks.glue/../evil.X",
    "d\u0456ffora.tasks.glue.GlueTask",
    "diffora.tasks.glue.\uff27lueTask",
    "diffora.tasks.glue.GlueTask\n",
    " diffora.tasks.glue.GlueTask",
    "Diffora.tasks.glue.GlueTask",
    "diffora.tasks.glue.GlueTask" + "x" * 10_000,
    "hydra_plugins.diffora_table.TableSweeper",
    "${oc.env:HOME}",
]


@pytest.mark.parametrize("target", FOREIGN, ids=lambda target: ascii(target)[:40])
def test_a_file_may_name_only_classes_of_this_package(evil, target):
    before = set(sys.modules)
    message = problems(class_at, target, Task, "task._target_", FILE)
    assert message.startswith("config.yaml: task._target_=") and len(message) < 600 and message.isprintable()
    assert "task._target_=<module>.<class>" in message  # what to do about it
    assert not evil.exists() and {name for name in set(sys.modules) - before if not name.startswith("diffora")} == set()


def test_a_foreign_module_inside_the_package_is_not_accepted(tmp_path, monkeypatch):
    """A longer package path or an entry in sys.modules does not make a foreign file part of the package."""
    import diffora.tasks

    (tmp_path / "shadow.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'mark')!r}).touch()\n")
    monkeypatch.setattr(diffora.tasks, "__path__", [*diffora.tasks.__path__, str(tmp_path)])
    assert "is not a Task of this project" in problems(class_at, "diffora.tasks.shadow.X", Task, "task._target_", FILE)
    assert not (tmp_path / "mark").exists()


def test_classes_of_this_package_are_accepted_from_files_and_named_when_nearly_right():
    assert class_at("diffora.tasks.glue.GlueTask", Task, "task._target_", FILE) is GlueTask
    assert class_at("diffora.methods.lora.LoRA", Method, "method._target_", FILE) is LoRA
    for file in (FILE, None):
        message = problems(class_at, "diffora.tasks.glu.GlueTask", Task, "task._target_", file)
        assert "did you mean diffora.tasks.glue.GlueTask?" in message


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's own."""
    (tmp_path / "own_code.py").write_text(
        "from diffora.tasks.glue import GlueTask\nfrom diffora.tasks.base import Task\n"
        "from diffora.methods.houlsby import Houlsby\n"
        "class OwnTask(GlueTask): pass\nclass OwnMethod(Houlsby): pass\nclass Empty(Task): pass\n"
    )
    (tmp_path / "own_broken.py").write_text("import module_that_is_not_there\n")
    (tmp_path / "own_raises.py").write_text("raise RuntimeError('out of\\norder')\n")
    (tmp_path / "own_exits.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "own_syntax.py").write_text("def\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


def test_the_user_may_name_any_subclass(own):
    assert class_at("own_code.OwnTask", Task, "task._target_").__name__ == "OwnTask"
    assert class_at("own_code.OwnMethod", Method, "method._target_").__name__ == "OwnMethod"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "my_modle.Task",
            "Python finds no module my_modle. A module of your own must be in the current folder, in the folder of",
        ),
        ("own_code.more.Task", "Python finds no module own_code.more"),
        ("own_code.Nothing", "own_code has no Nothing; it has GlueTask, OwnTask, Empty"),
        ("own_code.OwnMethod", "is not a subclass of diffora.tasks.base.Task"),
        ("subprocess.Popen", "is not a subclass of diffora.tasks.base.Task"),
        ("os.system", "is not a subclass of diffora.tasks.base.Task"),
        ("own_code.Empty", "does not define load, encode, collate, score, which every Task must"),
        ("diffora.tasks.base.Task", "does not define load"),
        ("own_broken.X", "importing own_broken fails with ModuleNotFoundError: No module named 'module_that_is_not"),
        ("own_raises.X", "importing own_raises fails with RuntimeError: out of order"),
        ("own_exits.X", "importing own_exits fails with SystemExit: 3"),
        ("own_syntax.X", "importing own_syntax fails with SyntaxError"),
        ("GlueTask", "must be the dotted path of a Task, as in module.Class"),
        (".own_code.OwnTask", "must be the dotted path"),
        ("own_code..OwnTask", "must be the dotted path"),
        (None, "task._target_=null must be the dotted path"),
    ],
)
def test_an_unusable_target_has_one_message_that_names_the_key(own, target, message):
    found = problems(class_at, target, Task, "task._target_")
    assert found.startswith("task._target_=") and message in found and "\n" not in found


def test_own_modules_of_a_config_dir_that_cannot_be_imported_are_named_together(cfg, tmp_path):
    """C: "own module given by --config-dir and not importable"."""
    for group in ("task", "method"):
        (tmp_path / group).mkdir()
        shutil.copy(
            conf_dir() / group / f"{ {'task': 'paraphrase', 'method': 'lora'}[group] }.yaml",
            tmp_path / group / "mine.yaml",
        )
        file = tmp_path / group / "mine.yaml"
        file.write_text(re.sub(r"_target_: \S+", f"_target_: my_{group}s.Mine", file.read_text()))
    where = f"hydra.searchpath=[file://{tmp_path}]"
    composed = cfg("experiment=quickstart", "task=mine", "method=mine", where)
    assert composed.task._target_ == "my_tasks.Mine"
    message = problems(check, composed)
    assert "method._target_=my_methods.Mine: Python finds no module my_methods" in message
    assert "task._target_=my_tasks.Mine: Python finds no module my_tasks" in message
    assert message.count("or beside it, or on PYTHONPATH") == 2


# --- received run folders (A1, A2) ---


def test_a1_a_run_that_names_a_program_does_not_start_it(arrived, tmp_path):
    mark = tmp_path / "started"
    folder = arrived(
        {"task._target_": "subprocess.Popen", "task.args": ["touch", str(mark)], "task.executable": "touch"}
    )
    message = problems(read_request, [f"run={folder}"])
    assert f"{folder / 'config.yaml'}: task._target_=subprocess.Popen is not a Task of this project" in message
    assert not mark.exists()


@pytest.mark.parametrize("target", ["run-x.evil.X", "evil.X"])
def test_a2_a_module_beside_the_run_is_not_imported(evil, arrived, tmp_path, target):
    shutil.rmtree(tmp_path / "run-x")
    folder = arrived({"task._target_": target})
    shutil.copy(tmp_path / "evil.py", folder / "evil.py")
    message = problems(read_request, [f"run={folder}"])
    assert "nothing was imported" in message and not evil.exists()
    assert not [name for name in sys.modules if name.endswith("evil")]


def test_a2_the_same_from_the_command_line(evil, arrived, tmp_path, monkeypatch, capsys):
    shutil.rmtree(tmp_path / "run-x")
    folder = arrived({"task._target_": "run-x.evil.X", "task.name": "\x1b]0;title\x07"})
    monkeypatch.setattr(sys, "argv", ["evaluate.py", f"run={folder}"])
    with pytest.raises(SystemExit) as caught:
        cli.command(lambda: evaluate(read_request(sys.argv[1:])))
    assert caught.value.code == 1 and not evil.exists()
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and "Traceback" not in shown and "\x1b" not in shown


def test_other_targets_in_a_run_are_only_text(evil, arrived, tmp_path):
    """Nothing looks for _target_ where no class is expected."""
    shutil.rmtree(tmp_path / "run-x")
    keys = "method.regulariser", "logger.csv", "finetune", "hydra", "trainer.extra", "task.recipe.x", "model.config"
    folder = arrived({key: {"_target_": "evil.X"} for key in keys})
    read_request([f"run={folder}"])
    assert not evil.exists()


def test_a_class_that_the_user_names_is_accepted(own, arrived, tmp_path):
    folder = arrived({"task._target_": "own_code.OwnTask"})
    assert "own_code.OwnTask is not a Task of this project" in problems(read_request, [f"run={folder}"])
    request = read_request([f"run={folder}", "task._target_=own_code.OwnTask", f"output={tmp_path / 'out'}"])
    assert type(get_task(request.cfg.task)).__name__ == "OwnTask"
    assert "Python finds no module nowhere" in problems(read_request, [f"run={folder}", "task._target_=nowhere.Task"])


def test_remote_code_is_never_allowed_by_a_file(arrived):
    folder = arrived({"model.trust_remote_code": True})
    assert read_request([f"run={folder}"]).cfg.model.trust_remote_code is False
    assert read_request([f"run={folder}", "model.trust_remote_code=true"]).cfg.model.trust_remote_code is True


# --- received adapters (A3) ---


def backbone(finished):
    cfg = settings(yaml.safe_load((finished / "config.yaml").read_text()), FILE, ["task", "model"])
    torch.manual_seed(0)
    return load_backbone(model_of(cfg.model), get_task(cfg.task).model_request())


def sign(folder):
    """Update the digests, as an attacker can do after changing a file."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in ("sha256", "model", "layers"):  # without the last two, any model is accepted
        manifest.pop(entry, None)
    write_manifest(folder, manifest.pop("files"), manifest)


@pytest.fixture
def adapter(finished, tmp_path):
    """A copy of the adapter with changed settings in diffora.json."""

    def make(change):
        shutil.copytree(finished / "adapter", tmp_path / "adapter")
        content = json.loads((finished / "adapter" / "diffora.json").read_text())
        change(content)
        (tmp_path / "adapter" / "diffora.json").write_text(json.dumps(content))
        sign(tmp_path / "adapter")
        return tmp_path / "adapter"

    return make


@pytest.mark.parametrize("target", ["subprocess.Popen", "evil.M", "run-x.evil.M", "diffora.tasks.glue.GlueTask", None])
def test_a3_an_adapter_names_only_methods_of_this_project(evil, finished, adapter, target):
    folder = adapter(lambda content: content["method"].update(_target_=target))
    message = problems(load_adapter, torch.nn.Linear(1, 1), folder)
    assert f"{folder / 'diffora.json'}: method._target_=" in message and "is not a Method of this project" in message
    assert not evil.exists()


def test_a3_a_method_that_the_user_names_is_accepted(own, finished, adapter, tmp_path, monkeypatch):
    folder = adapter(lambda content: content["method"].update(_target_="own_code.OwnMethod"))
    with pytest.raises(UserError, match="is not a Method of this project"):
        load_adapter(backbone(finished), folder)
    load_adapter(backbone(finished), finished / "adapter", method="own_code.OwnMethod")
    request = read_request([f"run={finished}", "method._target_=own_code.OwnMethod", f"output={tmp_path / 'out'}"])
    assert request.method == "own_code.OwnMethod"
    monkeypatch.setattr(sys.modules["own_code"].OwnMethod, "adapt", lambda *arguments: pytest.fail("was used"))
    with pytest.raises(pytest.fail.Exception, match="was used"):
        load_trained(request.cfg, request.weights, request.method)


def change(path, value):
    def apply(content):
        node, *rest = content, *path.split(".")
        for name in rest[:-1]:
            node = node[name]
        node[rest[-1]] = value

    return apply


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("method", 5, "method=5 must be a group of settings"),
        ("method", None, "method=null must be a group"),
        ("method.name", [1], "method.name must be text"),
        ("method.bottleneck", {"_target_": "evil.X"}, "has no setting method.bottleneck"),
        ("model", "x", "model='x' must be a group"),
        ("model.layer", 3, "model.layer=3 must be text"),
        ("model.candidates", "abc", "model.candidates='abc' must be a list"),
        ("model.candidates", [1], "must hold names of modules"),
        ("model.roles", [1], "model.roles=[1] must be a group"),
        ("finetune", 5, "finetune=5 must be a group"),
        ("seed", "0", "seed='0' must be a whole number"),
        ("seed", -1, "seed=-1 must be a whole number"),
        ("seed", 2**64, "must be a whole number"),
        ("selection", "../../selection.json", "must be the name of a file beside it"),
        ("selection", "/etc/passwd", "must be the name of a file beside it"),
        ("selection", 5, "must be the name of a file beside it"),
        ("model.name", "???", "model.name='???' must be text"),
    ],
)
def test_a_damaged_diffora_json_has_one_message_that_names_file_and_key(finished, adapter, path, value, message):
    folder = adapter(change(path, value))
    found = problems(load_adapter, torch.nn.Linear(1, 1), folder)
    assert found.startswith(f"{folder / 'diffora.json'}: ") and message in found


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"_target_": "os.system", "command": "true"}, "must be a configuration class of PEFT"),
        ({"_target_": "peft.LoraConfig", "eva_config": {"_target_": "subprocess.Popen"}}, "class of PEFT"),
        ({"_target_": "peft.evil.X"}, "does not exist in PEFT"),
        ({"_target_": "peft.import_utils.importlib"}, "does not exist in PEFT"),
        ({"_target_": "peft.config.json.JSONDecoder"}, "does not exist in PEFT"),
        ({"_target_": "peft..LoraConfig"}, "must be a configuration class of PEFT"),
        ({"_target_": "peft.LoraConfig", "megatron_config": {}, "megatron_core": "evil"}, "PEFT import a module"),
        ({"_target_": "peft.XLoraConfig"}, "cannot be used here"),
        ({"_target_": "peft.ShadowConfig"}, "cannot be used here"),
    ],
)
def test_settings_of_a_peft_adapter_name_only_classes_of_peft(evil, spec, message):
    """These settings come from diffora.json too."""
    assert message in problems(build, spec, "method.config")
    assert not evil.exists()


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.system, (f"touch {self.mark}",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"peft_type": "LORA", "r": 1, "target_modules": ["x"]}, "adapter_model.bin is a pickle, which can run code"),
        ({"peft_type": "LORA", "megatron_config": {"a": 1}, "megatron_core": "evil"}, "name a module to import"),
        ({"peft_type": "LORA", "megatron_core": "run-x.evil"}, "name a module to import"),
        ({"peft_type": "XLORA", "adapters": {"a": "someone/else"}}, "peft_type=XLORA is not loaded"),
        ({"peft_type": "SHADOW", "shadow_model": "someone/else"}, "peft_type=SHADOW is not loaded"),
        ({"auto_mapping": {"parent_library": "evil", "base_model_class": "X"}}, "it must have peft_type"),
        ([], "it must have peft_type"),
        ({"peft_type": ["LORA"]}, "it must have peft_type"),
    ],
)
def test_adapters_of_peft_import_and_unpickle_nothing(evil, tmp_path, content, message):
    folder = tmp_path / "peft"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(content))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert message in problems(load_adapter, torch.nn.Linear(1, 1), folder)
    assert not evil.exists() and not (tmp_path / "exploded").exists()


# --- nothing is resolved (A5) ---


def test_a5_names_keep_text_that_looks_like_an_interpolation(finished):
    """``cell.row='${oc.env:SECRET}'`` in the user's own run."""
    record = json.loads((finished / "run.json").read_text())
    assert record["row"] == "${oc.env:SECRET}" and record["status"] == "completed"
    assert yaml.safe_load((finished / "config.yaml").read_text())["cell"]["row"] == "${oc.env:SECRET}"
    assert not [file for file in finished.rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()]


def test_a5_evaluation_does_not_resolve_text_of_a_runs_files(arrived, tmp_path, capsys):
    text = "${oc.env:SECRET} \\${oc.env:SECRET}"
    folder = arrived({"task.note": text, "model.name": text})
    found = evaluate(read_request([f"run={folder}", f"output={tmp_path / 'out'}"]))
    assert found["validation"]["accuracy"] >= 0
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written["task"]["note"] == text
    everything = capsys.readouterr()
    assert SECRET not in everything.out + everything.err + (tmp_path / "out" / "metrics.json").read_text()


def test_names_on_the_screen_are_not_markup(tmp_path, capsys):
    account = {"task": {"name": "[/red] [link=javascript:x]y"}, "seconds": 1.0, "rows": {"[/a]": 1}}
    terminal.print_evaluation({**account, "metrics": {"[/a]": {"f1": 0.5}}}, [tmp_path / "[/b]"])
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("[/red]", "[link=javascript:", "[/a]", "[/b]"))


@pytest.mark.parametrize(
    "key", ["task._target_", "task.path", "model.path", "model.dtype", "task.max_length", "trainer.precision"]
)
def test_a5_messages_show_the_text_and_not_the_value(arrived, tmp_path, key):
    folder = arrived({key: "${oc.env:SECRET}"})
    message = problems(lambda: evaluate(read_request([f"run={folder}", f"output={tmp_path / 'out'}"])))
    assert SECRET not in message and "${oc.env:SECRET}" in message


@given(st.text(alphabet="$\\{}:.ab'\" \n", max_size=12))
def test_text_of_a_file_is_never_resolved(text):
    if text != "???":
        cfg = settings({"a": {"b": text, "c": [text, {"d": text}]}}, FILE, ["a"])
        assert cfg.a.b == cfg.a.c[0] == cfg.a.c[1].d == text
        assert OmegaConf.create({"x": literal(text)}).x == text


# --- foreign YAML (A6) ---

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE_YAML = {
    "aliases": (LAUGHS, "YAML aliases"),
    "nested aliases in a section": ("task:\n  " + LAUGHS.replace("\n", "\n  "), "YAML aliases"),
    "deep lists": ("task: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    "deep groups": ("\n".join(" " * i + "a:" for i in range(300)), "nested too deeply"),
    "object": ("task: !!python/object/apply:os.system ['touch mark']\n", "not YAML"),
    "name": ("task: !!python/name:os.system\n", "not YAML"),
    "tag": ("task: !evil {a: 1}\n", "not YAML"),
    "large": ("# " + "x" * 2**20 + "\n", "too large"),
    "not text": ("task: \x00\n", "not YAML"),
}


@pytest.mark.parametrize("kind", HOSTILE_YAML)
def test_a6_hostile_yaml_in_a_run_has_one_message(arrived, tmp_path, monkeypatch, kind):
    text, message = HOSTILE_YAML[kind]
    monkeypatch.chdir(tmp_path)
    folder = arrived(text=text)
    found = problems(read_request, [f"run={folder}"])
    assert str(folder / "config.yaml") in found and message in found and len(found) < 500
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("kind", [kind for kind in HOSTILE_YAML if kind != "not text"])
def test_a6_a_report_does_not_read_hostile_yaml(tmp_path, monkeypatch, kind):
    """It takes all settings that it needs from run.json."""
    monkeypatch.chdir(tmp_path)
    made_run(tmp_path / "good")
    (made_run(tmp_path / "bad", seed=1) / "config.yaml").write_text(HOSTILE_YAML[kind][0])
    gathered = gather([tmp_path])
    assert sorted(run.seed for run in gathered.runs) == [0, 1] and not gathered.broken
    assert len({run.setting for run in gathered.runs}) == 1
    write(gathered, tmp_path / "out", [tmp_path])
    assert not (tmp_path / "mark").exists()


def test_a6_json_that_is_hostile_stops_neither_report_nor_loading(finished, adapter, tmp_path):
    deep = "[" * 100_000
    for seed, name in enumerate(("run.json", "selection.json", "trajectory.json")):
        (made_run(tmp_path / "runs" / name, "diffora", seed=seed) / name).write_text(deep)
    made_run(tmp_path / "runs" / "good", "diffora", seed=3)
    gathered = gather([tmp_path / "runs"])
    assert [file.parent.name for file, _ in gathered.broken] == ["run.json"]
    write(gathered, tmp_path / "out", [tmp_path])
    folder = adapter(lambda content: None)
    for text, message in ((deep, "nested too deeply"), (LAUGHS, "is not JSON"), ("[]", "groups of settings")):
        (folder / "diffora.json").write_text(text)
        if text == "[]":
            sign(folder)
        assert message in problems(load_adapter, torch.nn.Linear(1, 1), folder)


def test_pipes_in_a_folder_do_not_hang_a_report(tmp_path):
    folder = made_run(tmp_path / "bad")
    made_run(tmp_path / "good", seed=1)
    for name in ("run.json", "config.yaml"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    gathered = gather([tmp_path])
    assert [run.seed for run in gathered.runs] == [1]
    assert [reason for _, reason in gathered.broken] == ["is not a regular file"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": 5}, "task=5 must be a group of settings"),
        ({"task": []}, "task=[] must be a group"),
        ({"task": [{"_target_": "os.system"}]}, "must be a group"),
        ({"model": None}, "model=null must be a group"),
        ({"trainer": "cpu"}, "trainer='cpu' must be a group"),
        ({"task.name": [1]}, "task.name=[1] must be text"),
        ({"task.name": {"a": 1}}, "must be text"),
        ({"task.name": None}, "task.name=null must be text"),
        ({"task.recipe": 5}, "task.recipe=5 must be a group"),
        ({"task.recipe": None}, "task.recipe"),
        ({"task.recipe": {"of": 5}}, "task.recipe.of"),
        ({"task.max_length": {"a": 1}}, "must be a whole number of at least 4"),
        ({"task.max_length": "long"}, "task.max_length='long' must be a whole number"),
        ({"model.path": ["x"]}, "model.path"),
        ({"model.path": None}, "model.path"),
        ({"model.dtype": "save"}, "model.dtype='save' must be one of"),
        ({"model.roles": 5}, "model.roles=5 must be a group"),
        ({"model.layer": "???"}, "model.layer='???' must be text"),
        ({"task.path": date(2026, 1, 1)}, "task.path=datetime.date"),
        ({"task.max_length": b"x"}, "task.max_length=b'x' must be"),
        ({"trainer.num_workers": "many"}, "trainer.num_workers"),
    ],
    ids=str,
)
def test_settings_of_the_wrong_kind_have_one_message(arrived, changes, message):
    folder = arrived(changes)
    assert message in problems(read_request, [f"run={folder}"])


@pytest.mark.parametrize("text", ["", "5", "[]", "text", "task: {}\n"])
def test_a_run_without_its_sections_is_refused(arrived, text):
    message = problems(read_request, [f"run={arrived(text=text)}"])
    assert "config.yaml" in message and "model" in message


@pytest.mark.parametrize("key", ["task.max_length", "trainer.precision"])
def test_a_run_that_lacks_a_setting_has_one_message(arrived, key):
    folder = arrived()
    content = yaml.safe_load((folder / "config.yaml").read_text())
    section, name = key.split(".")
    del content[section][name]
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    assert problems(read_request, [f"run={folder}"]) == f"{key} is missing"


# --- names in the report (A7) ---

NAMES = ['=HYPERLINK("http://x","y")', "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\uff1d1+1", " =1", "a\r=1+1"]


@pytest.fixture
def report(tmp_path):
    """The report of runs with dangerous names everywhere, in a table of an experiment and in one of other runs."""
    for i, name in enumerate(NAMES):
        for seed in range(2):
            made_run(tmp_path / f"a{i}{seed}", "diffora", seed=seed, cell=("x", name, NAMES[-i - 1]), data_hash=name)
            metrics = {"validation/accuracy": -0.25 - seed, name: -1.5, "text": name, "=1": 1.0}
            made_run(
                tmp_path / f"b{i}{seed}", "lora", seed=seed, model=name, task=name, metrics=metrics, status="completed"
            )
        made_run(tmp_path / f"c{i}", name, seed=i, main_metric=name)
    write(gather([tmp_path]), tmp_path / "out", [tmp_path])
    return tmp_path / "out"


def test_a7_no_cell_of_a_csv_is_a_formula(report):
    texts = [file.read_bytes().decode() for file in report.rglob("*.csv")]
    cells = [cell for text in texts for row in csv.reader(io.StringIO(text, newline="")) for cell in row]
    dangerous = [cell for cell in cells if cell.strip(" ").startswith(("=", "+", "-", "@", "\t", "\r", "\uff1d"))]
    assert dangerous and all(re.fullmatch(r"[-+]?\d+(\.\d+)?( ± [\d.]+)?", cell) for cell in dangerous)
    for name in NAMES[:8]:
        assert f"'{name.replace(chr(13), chr(10))}" in cells
    assert "\r" not in "".join(texts)


def test_a7_numbers_stay_numbers(report):
    rows = list(csv.DictReader(io.StringIO((report / "runs.csv").read_text(), newline="")))
    values = {float(row["validation/accuracy"]) for row in rows if row["validation/accuracy"]}
    assert {-0.25, -1.25} <= values
    assert {float(row["'+1+1"]) for row in rows if row["'+1+1"]} == {-1.5}
    assert all(float(row["seed"]) >= 0 for row in rows)


class Links(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("href", "src", "action", "xlink:href")]
        assert not [name for name, _ in attributes if name.startswith("on")]


def test_names_in_the_page_are_text_and_never_links(tmp_path):
    bad = ["javascript:alert(1)", '"><img src=x onerror=alert(1)>', "<a href=javascript:alert(1)>x</a>", "{{ 7 * 7 }}"]
    bad += ["[x](javascript:alert(1))", "</script><script>alert(1)</script>", "$\\input{/etc/passwd}$", "[2cm]", "*"]
    for i, name in enumerate(bad):
        for seed in range(2):
            folder = made_run(tmp_path / f"a{i}{seed}", "diffora", seed=seed, cell=(name, name, bad[-i - 1]))
            (folder / "selection.json").write_text(
                (folder / "selection.json").read_text().replace("output.dense", "<b onclick=x>")
            )
            made_run(tmp_path / f"b{i}{seed}", name, seed=seed, model=name, task=name, main_metric=name)
        made_run(tmp_path / f"c{i}", seed=i, status=name, error=name)
    page, *files = write(gather([tmp_path]), tmp_path / "out", [tmp_path])
    parser = Links()
    parser.feed(page.read_text())
    assert parser.links and all(
        re.fullmatch(r"data:,|#[\w.-]+|tables/[\w.-]+|runs\.csv", link) for link in parser.links
    )
    assert parser.tags.count("script") == 2 and not {"img", "b", "iframe"} & set(parser.tags)
    assert "49" not in re.findall(r"\{\{ 7 \* 7 \}\}|>49<", page.read_text())
    for file in files:
        text = file.read_text()
        if file.suffix == ".tex":
            assert r"\input" not in text and not re.search(r"\\\\\n\s*[\[*]", text)
        if file.suffix == ".md":
            assert not re.search(r"(?<!\\)\]\(|(?<!\\)<", text)


def test_names_of_a_selection_are_not_formulas_in_its_picture():
    bad = r"$\frac{"
    selection = Selection(
        method=bad, selector=bad, types=[bad, "$$"], modules=[["a", "b"]], selected=[[bad]], rho=0.5, seed=0,
        scores=[[1.0, 2.0]],
    )  # fmt: skip
    assert figures.dam_heatmap(selection).startswith(b"\x89PNG")


# --- the rule itself ---


def test_a_class_that_the_user_names_is_found_in_the_current_folder_and_beside_the_configurations(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(trust, "_folders", [])
    text = "from diffora.tasks.glue import GlueTask\nclass Mine(GlueTask):\n    pass\n"
    for folder in ("here", "project", "project/conf"):
        (tmp_path / folder).mkdir(exist_ok=True)
    for file in ("here/own_here.py", "here/json.py", "project/own_beside.py", "project/conf/own_inside.py"):
        (tmp_path / file).write_text(text)
    monkeypatch.chdir(tmp_path / "here")
    assert trust.class_at("own_here.Mine", Task, "task._target_").__module__ == "own_here"
    with pytest.raises(UserError, match="in the folder of --config-dir or beside it, or on PYTHONPATH"):
        trust.class_at("own_beside.Mine", Task, "task._target_")
    trust.look_in([tmp_path / "project/conf"])
    for name in ("own_beside", "own_inside"):
        assert trust.class_at(f"{name}.Mine", Task, "task._target_").__module__ == name
    with pytest.raises(UserError, match="json has no Mine"):  # an installed module is never replaced
        trust.class_at("json.Mine", Task, "task._target_")


def test_a_file_cannot_name_a_class_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_hostile.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="nothing was imported"):
        trust.class_at("own_hostile.Mine", Task, "task._target_", tmp_path / "config.yaml")
    assert "own_hostile" not in sys.modules and str(tmp_path) not in sys.path


def test_only_one_module_imports_by_name():
    """No other module imports by a given name, unpickles, or reads files with OmegaConf or PyYAML."""
    pattern = (
        r"import_module|__import__|get_(class|object|method)|hydra\.utils|pickle\.(?:load|Unpickler\b)|OmegaConf\.load"
    )
    pattern += r"|yaml\.(load|unsafe|full)|weights_only=False|\bexec\(|(?<![.\w])eval\("
    # Two files import the modules of a fixed table: __init__ when a name of the library is first used, __main__ for the
    # program that the user asks for.
    fixed = {"__init__.py": {"import_module"}, "__main__.py": {"import_module"}}
    allowed = fixed | {"trust.py": {"import_module"}, "files.py": {"yaml.load"}}
    package = REPO / "src" / "diffora"
    for file in package.rglob("*.py"):
        code = re.sub(r'""".*?"""|#[^\n]*|"[^"\n]*"', "", file.read_text(), flags=re.DOTALL)
        found = {match[0] for match in re.finditer(pattern, code)} - allowed.get(str(file.relative_to(package)), set())
        assert not found, (file, found)
    loads = [m for file in (REPO / "src").rglob("*.py") for m in re.findall(r"torch\.load\([^)]*\)", file.read_text())]
    assert loads and all("weights_only=True" in load for load in loads)
