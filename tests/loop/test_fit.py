"""The settings of torch and Lightning during a stage."""

import pytest
import torch

from diffora.loop.fit import slurm
from diffora.run.experiment import run

SHORT = ("experiment=quickstart", "method=lora", "task.train_rows=64", "task.validation_rows=32", "finetune.epochs=1")


@pytest.mark.parametrize(("deterministic", "filled"), [("warn", False), ("true", True)])
def test_new_memory_is_filled_only_in_deterministic_mode(cfg, tmp_path, deterministic, filled, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", not filled)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        run(cfg(*SHORT, f"trainer.deterministic={deterministic}"), tmp_path / "run")
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.utils.deterministic.fill_uninitialized_memory is filled
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def test_slurms_signal_leaves_no_checkpoint_of_lightnings_own(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    assert slurm() == []
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    [environment] = slurm()
    assert not environment.auto_requeue
    for name in ("TORCHELASTIC_RUN_ID", "GROUP_RANK", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
    assert slurm() == []
