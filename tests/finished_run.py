"""Short runs from the configuration to the exported adapter, in this process."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from diffora.places import conf_dir
from diffora.run.experiment import Result, run

QUICK = (
    "experiment=quickstart",
    "logger=[csv]",
    "task.train_rows=32",
    "task.validation_rows=16",
    "finetune.epochs=1",
    "finetune.warmup_steps=0",
    "finetune.batch_size=8",
    "finetune.lr=0.01",
)


def run_of(folder: Path, *overrides: str) -> Result:
    """Do one short run in ``folder``: DiffoRA with a search of one round, unless the overrides choose a method."""
    GlobalHydra.instance().clear()
    search = () if any(text.startswith("method=") for text in overrides) else ("search.epochs=1",)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return run(compose("config", [*QUICK, *search, *overrides]), folder)
