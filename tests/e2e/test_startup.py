"""Which modules a command imports, in a fresh interpreter, and how it sets the garbage collector."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

LARGE = {"torch", "lightning", "transformers", "datasets", "pyarrow", "matplotlib", "torchmetrics", "peft", "wandb"}

COMMAND = """
import contextlib, json, runpy, sys
out, *sys.argv = sys.argv[1:]
sys.path.insert(0, ".")
with contextlib.suppress(SystemExit):
    runpy.run_path(sys.argv[0], run_name="__main__")
with open(out, "w") as file:
    json.dump(sorted(sys.modules), file)
"""


def python(code: str, *arguments: str) -> str:
    """Run a program in a fresh interpreter in the project's folder and return what it prints."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules_of(folder: Path, *command: str) -> set[str]:
    """Full names of the modules that are imported when a command ends."""
    python(COMMAND, str(folder / "modules.json"), *command)
    return set(json.loads((folder / "modules.json").read_text()))


def packages(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


@pytest.mark.parametrize("command", [("train.py", "--help"), ("train.py", "--cfg=job"), ("evaluate.py", "--help")])
def test_a_command_that_does_not_train_imports_no_large_package(command, tmp_path):
    modules = modules_of(tmp_path, *command)
    assert "diffora.cli" in modules
    assert not packages(modules) & LARGE


def test_a_run_on_texts_imports_only_what_it_uses(tmp_path):
    overrides = ["experiment=quickstart", "method=lora", "task.train_rows=64", "task.validation_rows=32"]
    modules = modules_of(tmp_path, "train.py", *overrides, "finetune.epochs=1", f"hydra.run.dir={tmp_path / 'run'}")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "completed"
    others = {"peft", "wandb", "tensorboard", "torchvision", "sklearn", "bitsandbytes"}
    assert not packages(modules) & others
    unused = ("vision", "squad", "causal_lm", "chat", "questions", "images", "embedded.digits", "embedded.dialogue")
    families = {f"diffora.tasks.{name}" for name in unused}
    assert not modules & (families | {"diffora.run.dry_run", "diffora.run.memory", "diffora.methods.peft"})


def test_imported_objects_are_frozen_for_the_collector_once():
    code = """
import gc, sys
from diffora.cli import import_run
assert gc.isenabled() and not gc.get_freeze_count()
import_run()
frozen = gc.get_freeze_count()
assert gc.isenabled() and frozen > 100_000 and "diffora.run.experiment" in sys.modules
kept = [[] for _ in range(1000)]
import_run()
assert gc.get_freeze_count() == frozen
"""
    python(code)


def test_a_disabled_collector_stays_disabled():
    python("import gc; gc.disable()\nfrom diffora.cli import import_run\nimport_run()\nassert not gc.isenabled()")
