"""python train.py method=diffora task=mrpc: search, select, fine-tune, evaluate. See `python train.py --help`."""

from diffora.cli import command, job  # isort: skip  # first: a run's time counts from here

import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    """Run one job; a sweep calls this for each of its jobs."""
    return job(cfg)


if __name__ == "__main__":
    command(main)
