"""Callbacks and loggers that the user names by ``_target_``."""

import sys
from types import SimpleNamespace

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger

from diffora.errors import UserError
from diffora.loop.loggers import Loggers
from diffora.run.check import check
from diffora.run.experiment import run
from diffora.settings import sections

QUICK = ["experiment=quickstart", "method=lora", "task.train_rows=32", "task.validation_rows=16", "finetune.epochs=1"]
SEEN: list = []


class Counts(Callback):
    def __init__(self, every: int = 1) -> None:
        self.every = every

    def on_train_batch_end(self, trainer, module, *rest):
        SEEN.append(("step", self.every))


class Notes(Logger):
    """A logger with the least that Lightning asks for: it has no ``experiment``."""

    name, version = "notes", "0"

    def __init__(self, save_dir: str, fails: bool = False) -> None:
        super().__init__()
        self.folder, self.fails = save_dir, fails

    def log_hyperparams(self, params, *rest):
        SEEN.append(("settings", params["seed"]))

    def log_metrics(self, metrics, step=None):
        if self.fails:
            raise ConnectionError("https://me:a-password@server.org does not answer my-secret-token")
        SEEN.extend(("metric", name) for name in metrics)

    def finalize(self, status):
        SEEN.append(("end", status))


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    SEEN.clear()
    monkeypatch.setitem(sys.modules, "my_own", sys.modules[__name__])


def test_own_callbacks_and_loggers_work_in_a_run(cfg, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MY_TOKEN", "my-secret-token")
    done = run(
        cfg(
            *QUICK,
            "trainer.callbacks=[{_target_: my_own.Counts, every: 3}]",
            "logger=csv",
            "+logger.notes={_target_: my_own.Notes}",
            "+logger.broken={_target_: my_own.Notes, fails: true}",
        ),
        tmp_path / "run",
    )
    assert done.record["status"] == "completed"
    assert SEEN.count(("step", 3)) == 1  # one step of 32 rows
    assert SEEN.count(("end", "success")) == 1 and SEEN[-1] == ("end", "success")  # of the logger that works
    metrics = {name for kind, name in SEEN if kind == "metric"}
    assert {"validation/accuracy", "train/loss", "final/validation/accuracy"} <= metrics
    assert ("settings", 0) in SEEN and list((tmp_path / "run" / "logs").rglob("metrics.csv"))
    [line] = [message for message in caplog.messages if "is not used from here on" in message]
    assert line.startswith("logger=broken fails") and "server.org" in line
    assert "password" not in line and "my-secret-token" not in line


class Breaks(Callback):
    def on_train_epoch_end(self, trainer, module):
        raise RuntimeError("no metric nope; my-secret-token")


def test_an_error_of_an_own_callback_is_named_as_its(cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "my-secret-token")
    with pytest.raises(
        UserError, match=r"^trainer\.callbacks\[1\]=my_own\.Breaks fails with RuntimeError: no metric nope; …"
    ):
        run(cfg(*QUICK, "trainer.callbacks=[{_target_: my_own.Counts},{_target_: my_own.Breaks}]"), tmp_path / "run")


def test_a_failed_run_ends_its_loggers_as_failed(tmp_path):
    loggers = Loggers(sections.Logger(own={"notes": {"_target_": "my_own.Notes"}}), tmp_path, {"seed": 1})
    [guarded] = loggers.of_stage("search")
    guarded.finalize("success")  # the Trainer of a stage does this, and the run goes on
    assert ("end", "success") not in SEEN
    loggers.finish(failed=True)
    assert SEEN == [("settings", 1), ("end", "failed")]
    assert guarded.inner.folder == str(tmp_path)


def test_trackio_gets_the_settings_the_metrics_and_the_end(tmp_path, monkeypatch):
    calls: list = []
    started = SimpleNamespace(
        log=lambda metrics, step=None: calls.append((metrics, step)), finish=lambda: calls.append("end")
    )
    fake = SimpleNamespace(init=lambda **given: calls.append(given) or started)
    monkeypatch.setitem(sys.modules, "trackio", fake)
    choice = {"_target_": "diffora.loop.trackio.TrackioLogger", "project": "p", "space_id": None}
    loggers = Loggers(sections.Logger(own={"trackio": choice}), tmp_path / "run-1", {"seed": 1})
    [guarded] = loggers.of_stage("finetune")
    guarded.log_metrics({"a": 1.0}, 3)
    loggers.summary({"metrics": {"b": 2.0}})
    loggers.finish(failed=False)
    assert calls == [
        {"project": "p", "name": "run-1", "group": None, "config": {"seed": 1}, "resume": "allow"},
        ({"a": 1.0}, 3),
        ({"final/b": 2.0}, None),
        "end",
    ]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.callbacks=[{_target_: my_own.Conts}]", "my_own has no Conts; did you mean my_own.Counts?"),
        ("trainer.callbacks=[{_target_: my_own.Counts, evry: 3}]", "my_own.Counts has no argument evry; did you mean"),
        ("trainer.callbacks=[{_target_: my_own.Notes}]", "is not a subclass of lightning's Callback"),
        ("trainer.callbacks=[{every: 3}]", "must be a list of {_target_: module.Class"),
        ("trainer.callbacks=[{_target_: lightning.pytorch.callbacks.ModelCheckpoint}]", "writes checkpoints"),
        ("trainer.callbacks=[{_target_: lightning.pytorch.callbacks.EMAWeightAveraging}]", "averages weights"),
        ("trainer.callbacks=[{_target_: lightning.pytorch.callbacks.StochasticWeightAveraging, swa_lrs: 1}]", "averag"),
        ("trainer.callbacks=[{_target_: lightning.pytorch.callbacks.TQDMProgressBar}]", "shows progress"),
        ("trainer.callbacks=[{_target_: lightning.pytorch.callbacks.Timer}]", "finetune.max_steps limits it"),
        ("+logger.mine={_target_: my_own.Counts}", "logger.mine=my_own.Counts is not a subclass of lightning's Logger"),
        ("+logger.mine={_target_: no_such.Logger}", "Python finds no module no_such"),
        ("+logger.mine={path: x}", "unknown key logger.mine"),
        ("+logger.mine={_target_: my_own.Notes, save_dir: 'http://me:pass@host'}", "with a user, password or key"),
        ("+logger.mine={_target_: my_own.Notes, save_dir: 'http://a-token@host/x'}", "with a user, password or key"),
        ("+logger.mine={_target_: my_own.Notes, save_dir: 'http://h/?api_key=abc'}", "with a user, password or key"),
    ],
)  # fmt: skip
def test_each_mistake_has_its_message(cfg, override, words):
    with pytest.raises(UserError) as error:
        check(cfg(*QUICK, "logger=csv", override))
    assert len(error.value.problems) == 1 and words in error.value.problems[0]


@pytest.mark.parametrize(("name", "package"), [("mlflow", "mlflow"), ("comet", "comet-ml"), ("trackio", "trackio")])
def test_a_logger_names_the_package_that_it_needs(cfg, name, package, monkeypatch):
    from diffora.loop import own

    monkeypatch.setattr(own, "find_spec", lambda module: None)
    with pytest.raises(UserError, match=f"needs the package {package}: pip install {package}"):
        check(cfg(*QUICK, f"logger=[csv,{name}]"))


@pytest.mark.parametrize(
    "name", ["api_key", "token", "COMET_API_KEY", "client_secret", "secret_key", "AWS_SECRET_ACCESS_KEY", "passphrase"]
)
def test_a_secret_is_refused_and_not_repeated(cfg, name):
    with pytest.raises(UserError) as error:
        check(cfg(*QUICK, "logger=csv", f"+logger.notes={{_target_: my_own.Notes, more: {{{name}: abcdefgh}}}}"))
    [problem, *_] = [text for text in error.value.problems if "secret must not be" in text]
    assert name in problem and "abcdefgh" not in str(error.value)


def test_one_word_turns_all_loggers_or_wandb_off(cfg):
    assert check(cfg(*QUICK, "logger=none"))[0].logger == sections.Logger()
    assert check(cfg(*QUICK, "logger=csv"))[0].logger == sections.Logger(csv=True)


def test_nothing_in_the_settings_of_a_file_is_imported(tmp_path, monkeypatch):
    """A run's config.yaml may come from somebody else: `section_problems` reads it for evaluate.py."""
    from omegaconf import OmegaConf

    from diffora.run.check import section_problems

    (tmp_path / "imported_by_a_file.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    evil = {"_target_": "imported_by_a_file.X"}
    content = {
        "trainer": {"callbacks": [evil]}, "logger": {"mine": evil}, "finetune": {"optimizer": evil, "scheduler": evil}
    }  # fmt: skip
    section_problems(OmegaConf.create(content), ["trainer", "logger", "finetune"])
    assert "imported_by_a_file" not in sys.modules
