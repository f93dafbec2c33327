"""A stopped and resumed run gives the same result, bit for bit. A finished search is reused only if it is undamaged."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO
from stopped_runs import LORA, SEARCH, assert_equal_runs, assert_refused, copy_of, damage, run_of, stop

from diffora.scoring.attribution import AttributionModule
from diffora.scoring.bilevel import SearchModule


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_resumed_fine_tuning_gives_the_same_result(workers, tmp_path):
    overrides = [
        *LORA,
        "task.train_rows=48",
        "task.validation_rows=24",
        "finetune.epochs=3",
        f"trainer.num_workers={workers}",
    ]
    whole = run_of(*overrides, folder=tmp_path / "whole")
    stop(*overrides, folder=tmp_path / "part", batch=2)
    stop(*overrides, "resume=true", folder=tmp_path / "part", epoch=2)  # and once more
    assert_equal_runs(run_of(*overrides, "resume=true", folder=tmp_path / "part"), whole)


@pytest.mark.parametrize(
    ("module", "more"),
    [
        (SearchModule, ["search.update=alternating"]),
        (SearchModule, ["search.update=simultaneous", "search.train_steps=2"]),
        (AttributionModule, ["method.selector=attribution", "method.score_batches=2"]),
    ],
    ids=["alternating", "simultaneous", "attribution"],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_search_gives_the_same_result(workers, module, more, tmp_path):
    overrides = [*SEARCH, *more, f"trainer.num_workers={workers}"]
    whole = run_of(*overrides, folder=tmp_path / "whole")
    stop(*overrides, folder=tmp_path / "part", module=module)
    resumed = run_of(*overrides, "resume=true", folder=tmp_path / "part")
    assert resumed.selection == whole.selection
    assert_equal_runs(resumed, whole)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_compiled_run_that_was_stopped_twice_gives_the_same_result(tmp_path):
    """In the search, then in the fine-tuning. Compiled dropout draws its masks in its own way."""
    overrides = [*SEARCH, "trainer.compile=true", "finetune.epochs=2"]
    whole = run_of(*overrides, folder=tmp_path / "whole")
    stop(*overrides, folder=tmp_path / "part", module=SearchModule)
    stop(*overrides, "resume=true", folder=tmp_path / "part")
    resumed = run_of(*overrides, "resume=true", folder=tmp_path / "part")
    assert resumed.selection == whole.selection
    assert_equal_runs(resumed, whole)
    assert resumed.metrics != run_of(*overrides, "seed=1", folder=tmp_path / "other").metrics


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["search-0001-*.ckpt", "finetune-0001-*.ckpt"])
def test_a_killed_run_with_workers_gives_the_same_result(pattern, tmp_path):
    """A real kill in the middle of an epoch."""
    overrides = [*SEARCH, "trainer.num_workers=2", "finetune.epochs=3", "task.train_rows=400"]
    whole = run_of(*overrides, folder=tmp_path / "whole")
    command = [sys.executable, str(REPO / "train.py"), *overrides, f"hydra.run.dir={tmp_path / 'part'}"]
    process = subprocess.Popen(command, cwd=REPO, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
    deadline = time.time() + 300
    while not list((tmp_path / "part" / "checkpoints").glob(pattern)):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert_equal_runs(run_of(*overrides, "resume=true", folder=tmp_path / "part"), whole)


# --- a finished search ---


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> Path:
    """A run that was stopped between its search (with searched weights) and the first epoch of fine-tuning."""
    folder = tmp_path_factory.mktemp("searched") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("DIFFORA_CACHE", str(folder.parent / "cache"))
        stop(*SEARCH, "method.warm_start=true", folder=folder, epoch=0)
    return folder


def test_a_search_with_other_settings_is_not_reused(searched, tmp_path):
    folder = copy_of(searched, tmp_path)
    shutil.rmtree(folder / "checkpoints")
    (folder / "run.json").write_text("[]")
    words = r"search\.json was made with(.|\n)*search\.lr: "
    assert_refused(*SEARCH, "method.warm_start=true", "search.lr=1e-5", folder=folder, match=words)


@pytest.mark.parametrize("name", ["selection.json", "selection.safetensors"])
def test_damaged_results_of_a_search_are_not_reused(searched, tmp_path, name):
    folder = copy_of(searched, tmp_path)
    flipped = bytearray((folder / name).read_bytes())
    flipped[-40] ^= 1
    (folder / name).write_bytes(flipped)
    assert_refused(*SEARCH, "method.warm_start=true", folder=folder, match=rf"{name} is not as the search wrote it")
    (folder / name).unlink()  # as the message says
    run_of(*SEARCH, "method.warm_start=true", "resume=true", folder=folder)
    assert (folder / name).read_bytes() == (searched / name).read_bytes()


@pytest.mark.parametrize("how", [lambda t: "", lambda t: "[]", lambda t: t.replace('"seconds": ', '"seconds": 1')])
def test_a_search_is_not_repeated_although_search_json_is_damaged(searched, tmp_path, how):
    folder = copy_of(searched, tmp_path)
    damage(folder / "search.json", how)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(SearchModule, "training_step")
        run_of(*SEARCH, "method.warm_start=true", "resume=true", folder=folder)
    for name in ("selection.json", "search.json"):
        assert (folder / name).read_bytes() == (searched / name).read_bytes()
