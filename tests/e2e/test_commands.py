"""`train.py` on the command line: messages, sweeps, loggers, processes and help."""

import json
import time

from conftest import REPO
from processes import train

from diffora.core.selection import Selection
from diffora.run.record import read_record


def test_mistakes_on_the_command_line_give_messages_and_no_folder(tmp_path):
    folder = tmp_path / "run"
    err = train("method=diffroa", "finetune.epoch=3", "rank=0", f"hydra.run.dir={folder}", expect=1)
    assert "method=diffroa is not one of" in err and "did you mean finetune.epochs" in err
    assert "Traceback" not in err
    err = train("rho=7", "finetune.lr=-1", f"hydra.run.dir={folder}", expect=1)
    assert err.count("error: ") == 2 and "Traceback" not in err
    err = train("task=mrpc", "task.path=/no/such/folder", "model=tiny", f"hydra.run.dir={folder}", expect=1)
    assert "/no/such/folder" in err and "Traceback" not in err
    assert not folder.exists()


def test_without_the_hub_the_message_says_what_to_do(tmp_path):
    err = train("method=lora", "task=mrpc", f"hydra.run.dir={tmp_path / 'run'}", expect=1)
    assert "task.path=<folder" in err and "experiment=quickstart" in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_debug_shows_the_traceback(tmp_path):
    err = train("rho=7", "debug=default", f"hydra.run.dir={tmp_path / 'run'}", expect=1)
    assert "Traceback" in err and "rho=7" in err


def test_a_failed_run_does_not_stop_a_sweep(quick, tmp_path):
    other = tmp_path / "other.json"  # only the run itself can find this out
    Selection(method="diffora", types=["a"], modules=[["a"]], selected=[["a"]], rho=1.0, seed=0).save(other)
    err = train("-m", *quick, "search.epochs=1", "finetune.epochs=1", f"method.selection={other},null",
                  f"hydra.sweep.dir={tmp_path / 'sweep'}", expect=1)  # fmt: skip
    assert "1 of 2 runs failed" in err and f"{other} was made for 1 layers" in err and "Traceback" not in err
    statuses = [json.loads(file.read_text())["status"] for file in sorted(tmp_path.glob("sweep/*/run.json"))]
    assert statuses == ["completed"]


def test_a_table_of_the_paper_in_small(tmp_path):
    given = ("experiment=table4_sample_rate", "scale=small", "seed=0", "finetune.epochs=1", "task.max_train_rows=96",
             "cell.column=digits", "cell.row='ρ = 0.2'", f"hydra.sweep.dir={tmp_path}")  # fmt: skip
    assert "takes -m" in train(*given, expect=1)
    assert "runs: 1 in" in train("-m", *given)
    record = read_record(tmp_path / "rho-0.2-digits-seed0")
    assert record["status"] == "completed" and record["selection"]["k"] == 1
    assert (record["experiment"], record["row"], record["column"]) == ("table4_sample_rate", "ρ = 0.2", "digits")


def test_wandb_without_a_key_records_offline_and_says_so(quick, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    out = train(
        *quick,
        "logger=[csv,wandb,tensorboard]",
        "search.epochs=1",
        "finetune.epochs=1",
        f"hydra.run.dir={tmp_path / 'run'}",
        WANDB_API_KEY="",
        NETRC=str(tmp_path / "none"),
    )
    assert "no API key" in out and "offline" in out
    assert list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    assert list((tmp_path / "run/wandb").glob("offline-run-*/files/media/images/DAM*.png"))
    assert list((tmp_path / "run/logs/tensorboard").rglob("events.*"))
    assert read_record(tmp_path / "run")["status"] == "completed"


def test_two_processes_give_one_result(quick, tmp_path):
    out = train(*quick, "trainer=ddp_cpu", f"hydra.run.dir={tmp_path / 'run'}")
    record = read_record(tmp_path / "run")
    assert record["status"] == "completed" and out.count("validation/accuracy") == 1
    assert len(record["history"]) == 3


def test_help_is_quick_and_lists_the_choices():
    began = time.time()
    out = train("--help")
    methods = sorted(file.stem for file in (REPO / "conf" / "method").glob("*.yaml"))
    assert f"method: {', '.join(methods)}" in " ".join(out.split()) and "task: alpaca" in out
    assert time.time() - began < 10  # a guard against importing torch, not a benchmark
