"""What W&B gets besides the values that the stages log, and loggers that fail."""

import errno
import io
import os
import sys

import pytest
import wandb
import yaml
from conftest import REPO
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from diffora.core.selection import Selection
from diffora.errors import UserError
from diffora.loop import loggers as module
from diffora.loop.loggers import Guarded, Loggers, taking_pictures
from diffora.run.check import check
from diffora.run.figures import dam_heatmap
from diffora.settings import sections

CHOICE = sections.Wandb(project="test", group="g")
RECORD = {"method": "diffora", "task": "mrpc", "model": "tiny", "seed": 3, "metrics": {"validation/accuracy": 0.9},
          "params": {}, "time": {}, "memory": {}}  # fmt: skip
KEY = "0123456789abcdef0123456789abcdef01234567"


def test_selection_and_adapter_are_kept_as_artefacts(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "adapter_config.json").write_text("{}")
    (run / "selection.json").write_text("{}")
    kept = {}
    monkeypatch.setattr(wandb.Run, "log_artifact", lambda self, artifact: kept.update({artifact.type: artifact}))
    loggers = Loggers(sections.Logger(wandb=CHOICE), run, {})
    about = {key: RECORD[key] for key in ("method", "task", "model", "seed")}
    loggers.summary(RECORD)
    name = loggers.wandb.experiment.id
    loggers.finish(failed=False)
    files = {
        kind: (artifact.name.partition(":")[0], list(artifact.manifest.entries)) for kind, artifact in kept.items()
    }
    assert files == {
        "selection": (f"selection-{name}", ["selection.json"]),
        "adapter": (f"adapter-{name}", ["adapter_config.json"]),
    }
    assert kept["adapter"].metadata == about


def test_the_sweep_files_use_existing_keys(cfg):
    files = sorted((REPO / "docs" / "sweeps").glob("*.yaml"))
    assert files
    for file in files:
        sweep = yaml.safe_load(file.read_text())
        assert (REPO / sweep["program"]).is_file() and sweep["command"][-1] == "${args_no_hyphens}"
        overrides = []
        for key, choice in sweep["parameters"].items():
            value = (
                choice["value"] if "value" in choice else choice["values"][0] if "values" in choice else choice["min"]
            )
            overrides.append(f"{key}={value}")
        composed = cfg(*overrides)
        check(composed)
        part, _, metric = sweep["metric"]["name"].partition("/")
        assert part in ("validation", "held_out") and metric


# --- loggers that fail ---


def fails(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("method", ["log_metrics", "log_hyperparams", "log_graph", "save", "finalize"])
def test_a_logger_that_fails_gives_one_warning_and_is_not_called_again(tmp_path, monkeypatch, caplog, method):
    """C: a full disk in the csv logger"""
    inner = CSVLogger(tmp_path, name="finetune")
    guarded = Guarded("csv", inner)
    monkeypatch.setattr(inner, method, fails)
    for _ in range(3):
        getattr(guarded, method)(
            *{"log_metrics": ({"a": 1.0}, 1), "finalize": ("success",)}.get(method, ({},) if "log" in method else ())
        )
    assert caplog.messages == ["logger=csv fails and is not used from here on: the disk is full"]
    assert guarded.experiment is None and guarded.name is None and guarded.version is None


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_a_logger_that_works_behaves_as_before(tmp_path, kind):
    inner = kind(tmp_path, name="finetune")
    guarded = Guarded("x", inner)
    assert (guarded.name, guarded.version, guarded.log_dir) == (inner.name, inner.version, inner.log_dir)
    assert guarded.save_dir == inner.save_dir and guarded.experiment is inner.experiment
    guarded.log_metrics({"a": 1.0}, 0)
    guarded.finalize("success")
    assert list((tmp_path / "finetune").rglob("*.*"))


def test_a_run_continues_without_loggers_that_fail(cfg, tmp_path, monkeypatch, caplog):
    from diffora.run.experiment import run

    monkeypatch.setattr(CSVLogger, "save", fails)
    monkeypatch.setattr(TensorBoardLogger, "log_metrics", fails)
    overrides = ["experiment=quickstart", "method=lora", "task.train_rows=64", "task.validation_rows=32"]
    done = run(cfg(*overrides, "finetune.epochs=1", "logger=[csv,tensorboard]"), tmp_path / "run")
    assert done.record["status"] == "completed"
    warned = sorted(line.split()[0] for line in caplog.messages if "is not used from here on" in line)
    assert warned == ["logger=csv", "logger=tensorboard"]


def test_a_picture_that_cannot_be_sent_gives_a_warning(tmp_path, monkeypatch, caplog):
    png = dam_heatmap(Selection("diffora", ["a"], [["m"]], [["a"]], 0.5, 0, gamma_bar=[[0.5]]))
    stage_loggers = Loggers(sections.Logger(csv=True, tensorboard=True), tmp_path, {}).of_stage("search")
    monkeypatch.setattr(type(stage_loggers[1].experiment), "add_image", fails)
    for step in range(2):
        takers = taking_pictures(stage_loggers)
        assert [taker.kind for taker in takers] == ["tensorboard"] * (step == 0)
        Loggers(None, tmp_path, {}).picture("DAM", png, step, "a round", takers)
    assert len(caplog.messages) == 1 and "logger=tensorboard fails" in caplog.text


def test_a_logger_that_is_not_installed_is_named_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        Loggers(sections.Logger(tensorboard=True), tmp_path, {})


@pytest.fixture
def wandb_begun(tmp_path, monkeypatch):
    """Starts W&B's logger like a run, with errors that `wandb.init` raises; notes the arguments that it gets."""
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    asked, begun = [], []

    def begin(*errors, real=True):
        failing, init = list(errors), wandb.init

        def try_to_begin(mode, **settings):
            asked.append((mode, settings["id"], sys.stdin.read()))
            if failing:
                raise failing.pop(0)
            return init(mode=mode, **settings) if real else None

        monkeypatch.setattr(wandb, "init", try_to_begin)
        monkeypatch.setattr(wandb, "define_metric", lambda *_, **__: None)
        begun.append(Loggers(sections.Logger(wandb=CHOICE), tmp_path / "run", {"a": 1}))
        return begun[-1]

    begin.asked = asked
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    (tmp_path / "run").mkdir()
    yield begin
    for loggers in begun:
        loggers.finish(failed=False)


def test_without_a_key_wandb_records_offline_in_any_mode_and_does_not_ask_for_one(wandb_begun, monkeypatch, caplog):
    """C: WANDB_MODE=online without a key"""
    monkeypatch.setenv("WANDB_MODE", "online")
    caplog.set_level("INFO")
    assert wandb_begun(real=False).wandb is not None
    assert [(mode, answer) for mode, _, answer in wandb_begun.asked] == [("offline", "")]
    assert "no API key" in caplog.text


@pytest.mark.parametrize("of_netrc", [False, True])
def test_if_the_server_refuses_the_run_is_recorded_offline_and_the_key_stays_secret(
    wandb_begun, tmp_path, monkeypatch, caplog, of_netrc
):
    monkeypatch.delenv("WANDB_MODE")
    if of_netrc:
        (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    else:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    loggers = wandb_begun(wandb.errors.AuthenticationError(f"user is not logged in with {KEY}\nmore"))
    loggers.wandb.log_metrics({"a": 1.0}, 1)
    loggers.finish(failed=False)
    (first, first_id, _), (second, second_id, _) = wandb_begun.asked
    assert (first, second) == ("online", "offline") and first_id != second_id
    assert "not logged in" in caplog.text and "recorded offline" in caplog.text and KEY not in caplog.text
    assert (tmp_path / "run/wandb/run_id").read_text() == second_id
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert any(file.suffix == ".wandb" for file in files)
    assert not any(KEY.encode() in file.read_bytes() for file in files)


@pytest.mark.parametrize(
    "error", [PermissionError(errno.EACCES, "Permission denied", "/staging"), ValueError("x"), TypeError("y")]
)
def test_a_run_continues_without_wandb_if_wandb_cannot_start(wandb_begun, caplog, error):
    loggers = wandb_begun(error, error)
    assert loggers.wandb is None and loggers.of_stage("finetune") == []
    loggers.summary(RECORD)
    loggers.finish(failed=False)
    assert "the run continues without it" in caplog.text


def test_without_a_writable_staging_folder_only_the_artefacts_are_lost(wandb_begun, tmp_path, monkeypatch, caplog):
    """C: W&B's staging folder not writable (a finished run ended as failed)"""
    (tmp_path / "file").touch()
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "file" / "data"))
    (tmp_path / "run" / "selection.json").write_text("{}")
    loggers = wandb_begun()
    loggers.summary(RECORD)
    loggers.finish(failed=False)
    assert caplog.text.count("logger=wandb fails") == 1 and "staging" in caplog.text
    assert list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))


def test_a_resumed_run_continues_its_wandb_run_unless_the_note_is_damaged(wandb_begun, tmp_path):
    note = tmp_path / "run/wandb/run_id"
    note.parent.mkdir()
    for content, kept in ((b"1a2b3c4d\n", True), (b"\xff\xfe/../x", False)):
        note.write_bytes(content)
        wandb_begun(real=False)
        assert (wandb_begun.asked[-1][1] == "1a2b3c4d") == kept
