"""Stops runs at a chosen batch, and compares runs."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file

from diffora.errors import UserError
from diffora.loop.stage import Stage
from diffora.places import conf_dir
from diffora.run.experiment import Result, run
from diffora.tasks.embedded.paraphrase import splits
from diffora.training.finetune import FineTuneModule

SHORT = ["experiment=quickstart", "finetune.warmup_steps=2", "finetune.batch_size=8", "finetune.dropout=0.1"]
LORA = [*SHORT, "method=lora", "finetune.epochs=2"]
SEARCH = [*SHORT, "task.train_rows=48", "task.validation_rows=24", "search.epochs=2", "finetune.epochs=1"]
SEARCH += ["search.batch_size=8"]


class Stopped(BaseException):
    """Raised instead of killing the process. Nothing in a run catches it."""


def run_of(*overrides: str, folder: Path) -> Result:
    """Run with these overrides in this folder, on one thread."""
    torch.set_num_threads(1)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", list(overrides))
    return run(cfg, folder)


def stop(*overrides: str, folder: Path, module: type[Stage] = FineTuneModule, epoch: int = 1, batch: int = 1) -> None:
    """Start a run and stop it when the given batch of the given epoch of a stage begins."""
    step = module.training_step

    def training_step(self: Any, data: Any, batch_idx: int) -> Any:
        if self.current_epoch == epoch and batch_idx == batch:
            raise Stopped
        return step(self, data, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "training_step", training_step)
        with pytest.raises(Stopped):
            run_of(*overrides, folder=folder)


def write_rows(folder: Path, sizes: dict[str, int], seed: int = 0) -> None:
    """Write rows of the paraphrase task as ``train.jsonl`` and ``validation.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    made = splits(sizes["train"], sizes["validation"], seed)
    for name, part in made.items():
        rows = [dict(zip(part, values, strict=True)) for values in zip(*part.values(), strict=True)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def overrides_for(place: Path) -> list[str]:
    """Overrides of a run on the data and the backbone in a folder."""
    where = [f"task.path={place / 'data'}", "task.max_length=32", f"model.path={place / 'backbone'}"]
    return [*LORA, "task=mrpc", *where]


@contextmanager
def restored(*files: Path) -> Iterator[None]:
    """Give these files their old content back afterwards."""
    before = {file: file.read_bytes() if file.exists() else None for file in files}
    try:
        yield
    finally:
        for file, content in before.items():
            if content is None:
                file.unlink(missing_ok=True)
            else:
                file.write_bytes(content)


def copy_of(run_folder: Path, folder: Path) -> Path:
    """A copy of a run that a test may change."""
    return Path(shutil.copytree(run_folder, folder / "run"))


def damage(file: Path, how: Callable[[str], str] | None) -> None:
    """Change the text of a file; None removes the file."""
    if how is None:
        file.unlink()
    else:
        file.write_text(how(file.read_text()))


def contents(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_refused(*overrides: str, folder: Path, match: str) -> None:
    """``resume=true`` is refused with this message, and nothing in the folder changes."""
    before = contents(folder)
    with pytest.raises(UserError, match=match):
        run_of(*overrides, "resume=true", folder=folder)
    assert contents(folder) == before


def assert_equal_runs(a: Result, b: Result) -> None:
    """Two runs have equal records (except times) and bit-equal adapters."""
    for key in ("metrics", "history", "selection", "params", "data_hash", "backbone"):
        assert a.record[key] == b.record[key], key
    ours, theirs = (load_file(each.folder / "adapter/adapter_model.safetensors") for each in (a, b))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
