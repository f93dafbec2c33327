"""`DifforaCallback` in two processes (DDP on CPUs)."""

import os
import subprocess
import sys

import pytest
import torch
from data import MAKERS, trained, trainer

from diffora.trainers.trainer import DifforaCallback


def train(made, folder, rows):
    """Train with batches of ``rows`` rows in each process, and save the weights of the first process."""
    model = MAKERS[made]().double()
    run = trainer(
        model,
        folder,
        [DifforaCallback(0.05, "half")],
        per_device_train_batch_size=rows,
        save_strategy="no",
        seed=3,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
    )
    run.train()
    torch.save(trained(model), folder / f"weights_{run.args.process_index}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("made", MAKERS)
def test_two_processes_train_as_one_with_the_same_rows(made, tmp_path):
    train(made, tmp_path, 4)
    alone = torch.load(tmp_path / "weights_0.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", __file__, made, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"weights_{i}.pt") for i in range(2))
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name], value, rtol=1e-8, atol=1e-10), name


if __name__ == "__main__":
    from pathlib import Path

    train(sys.argv[1], Path(sys.argv[2]), 2)
