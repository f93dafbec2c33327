"""The worker of test_fsdp.py: does some runs one after another, in the processes that torchrun started."""

import json
import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from diffora.places import conf_dir
from diffora.run.experiment import run


def do(runs: dict[str, list[str]], place: Path) -> None:
    """Do runs, given by name and overrides, in folders of their names."""
    torch.set_num_threads(1)
    for name, overrides in runs.items():
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg = compose("config", overrides)
        run(cfg, place / name)


if __name__ == "__main__":
    do(json.loads(sys.argv[1]), Path(sys.argv[2]))
    if torch.distributed.is_initialized():  # not for a run that is complete
        torch.distributed.destroy_process_group()  # gloo's threads may otherwise abort a process that ends
