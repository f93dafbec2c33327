"""A run may be written to the folder of a run, or to a new folder."""

import pytest

from diffora.errors import UserError
from diffora.run import experiment
from diffora.run.directory import begun, check_place, check_sweep_place
from diffora.run.experiment import run


@pytest.mark.parametrize("name", ["", ".", "src", "/"])
def test_a_folder_with_other_files_is_refused_before_anything_is_written(cfg, tmp_path, monkeypatch, name):
    """C: `hydra.run.dir=''` wrote into the checkout."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "code.py").touch()
    with pytest.raises(UserError, match=r"hydra\.run\.dir=.* is no run directory and not empty"):
        run(cfg("experiment=quickstart", "dry_run=true"), tmp_path / name)
    assert not (tmp_path / name / "run.json").exists() and not (tmp_path / "run.json").exists()


def test_new_folders_runs_and_a_schedulers_files_are_accepted(tmp_path):
    check_place(tmp_path / "new")
    check_place(tmp_path)
    (tmp_path / "slurm-1.out").touch()
    check_place(tmp_path)
    (tmp_path / "anything").touch()
    (tmp_path / ".lock").touch()
    check_place(tmp_path)
    check_place(tmp_path / "new\nline")


@pytest.mark.parametrize("check", [check_place, check_sweep_place])
def test_a_folder_called_tilde_is_not_taken_for_the_home_folder(check, tmp_path):
    place = tmp_path / "work" / "~" / "runs"
    place.mkdir(parents=True)
    with pytest.raises(UserError, match="Hydra does not know ~ as your home folder: write the path in full"):
        check(place)
    assert (tmp_path / "work").is_dir() and not (tmp_path / "work" / "~").exists()


def test_a_sweep_needs_a_folder_of_its_own(tmp_path, monkeypatch):
    """Similar to C: `hydra.sweep.dir=''`."""
    monkeypatch.chdir(tmp_path)
    for folder in ("", ".", "..", "/"):
        with pytest.raises(UserError, match="is the current folder, or above it"):
            check_sweep_place(tmp_path.joinpath(folder))
    sweep = tmp_path / "sweep"
    check_sweep_place(sweep)
    (sweep / "0-lora").mkdir(parents=True)
    check_sweep_place(sweep)  # its first run has not begun
    (sweep / "0-lora" / "code.py").touch()
    with pytest.raises(UserError, match="has no runs and is not empty"):
        check_sweep_place(sweep)
    (sweep / "0-lora" / "run.json").touch()
    check_sweep_place(sweep)


def test_a_folder_with_a_record_or_checkpoints_has_something_to_continue_from(tmp_path):
    assert not begun(tmp_path) and not begun(tmp_path / "nothing")
    (tmp_path / "run.json").write_text("[")
    assert begun(tmp_path)


def test_a_run_that_another_process_wrote_meanwhile_is_kept(cfg, tmp_path, monkeypatch):
    quick = [
        "experiment=quickstart",
        "method=lora",
        "task.train_rows=32",
        "task.validation_rows=16",
        "finetune.epochs=1",
    ]
    load = experiment._load

    def slow(*given):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "run.json").write_text('{"status": "completed"}')
        return load(*given)

    monkeypatch.setattr(experiment, "_load", slow)
    with pytest.raises(UserError, match="another process has written a run there meanwhile"):
        run(cfg(*quick, "finetune.warmup_steps=0"), tmp_path / "run")
    assert (tmp_path / "run" / "run.json").read_text() == '{"status": "completed"}'


def test_batches_that_the_devices_of_this_machine_cannot_share_are_refused_before_anything_is_loaded(
    cfg, tmp_path, monkeypatch
):
    monkeypatch.setattr(experiment, "found_devices", lambda accelerator: 4)
    monkeypatch.setattr(experiment, "check_machine", lambda settings: None)
    monkeypatch.setattr(experiment, "_load", None)
    given = ["experiment=quickstart", "method=lora", "trainer.devices=auto", "finetune.batch_size=32"]
    with pytest.raises(UserError, match=r"finetune\.accumulate=16 must be a multiple of 4, the number of processes"):
        run(cfg(*given, "finetune.accumulate=16"), tmp_path / "run")
