"""The settings of torch and Lightning during a stage."""

import pytest
import torch

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
