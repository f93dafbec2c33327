"""Makes run folders like those of `train.py` without running anything, for tests of code that reads them."""

import json
import random
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from diffora.run.setting import setting_facts
from diffora.trust import literal

TYPES = ("attention.self.query", "attention.self.key", "attention.self.value", "output.dense")
LAYERS = 3
FACTS = {
    "accuracy": {"unit": "fraction", "maximise": True},
    "f1": {"unit": "fraction", "maximise": True},
    "perplexity": {"unit": "perplexity", "maximise": False},
    "loss": {"unit": "loss", "maximise": False},
    "generalisation_gap": {"unit": "fraction", "maximise": False},
    "update/rank": {"unit": "rank", "maximise": True},
    "update/orthogonality_loss": {"unit": "", "maximise": False},
}


def made_run(
    folder: Path,
    method: str = "lora",
    seed: int = 0,
    score: float = 0.8,
    cell: tuple[str, str, str] | None = None,
    scale: str = "small",
    task: str = "paraphrase",
    settings: dict[str, Any] | None = None,
    adapter: int = 1000,
    **changes: Any,
) -> Path:
    """Write one run's ``run.json``, ``config.yaml`` and, for a selecting method, its selection and trajectory.

    Args:
        score: validation/accuracy; held_out is 0.01 less.
        cell: experiment, row and column.
        settings: merged into the configuration, from which the record's setting is made as in a run.
        changes: fields of the record that replace those made here.
    """
    chance = random.Random(f"{method} {seed} {score}")
    folder.mkdir(parents=True)
    history = [
        {
            "epoch": float(epoch),
            "train/loss": 1 / epoch,
            "train/accuracy": score - 0.2 / epoch,
            "validation/accuracy": score - 0.1 / epoch,
            "generalisation_gap": -0.1 / epoch,
        }
        for epoch in (1, 2, 3)
    ]
    record: dict[str, Any] = {
        "method": method,
        "task": task,
        "model": "tiny",
        "seed": seed,
        **dict(zip(("experiment", "row", "column"), cell or (None, None, None), strict=True)),
        "scale": scale if cell else None,
        "status": "completed",
        "main_metric": "accuracy",
        "metric_facts": FACTS,
        "metrics": {
            "validation/accuracy": score,
            "validation/f1": score / 2,
            "held_out/accuracy": score - 0.01,
            "held_out/f1": score / 3,
            "best_epoch": 3.0,
            "generalisation_gap": 0.02,
            "update/rank": 3.5,
            "update/orthogonality_loss": 70.25,
        },
        "params": {
            "adapter": adapter,
            "head": 130,
            "trainable": adapter + 130,
            "backbone": 10**6,
            "inference": adapter,
        },
        "time": {"search_s": 20.0 if method == "diffora" else 0.0, "finetune_s": 60.0, "total_s": 90.0},
        "memory": {"peak_rss_mb": 900.0, "peak_cuda_mb": None},
        "selection": None,
        "config_hash": f"{method}{seed}",
        "data_hash": "d",
        "history": history,
    }
    if method in ("diffora", "random"):
        selected = [sorted(chance.sample(TYPES, 2)) for _ in range(LAYERS)]
        gamma_bar = [[0.3 if name in row else 0.2 for name in TYPES] for row in selected]
        selector = "search" if method == "diffora" else "random"
        record["selection"] = {"selector": selector, "k": 2, "rank": None, "selected": selected}
        selection = {**record["selection"], "types": TYPES, "seed": seed}
        selection["gamma_bar"] = gamma_bar if method == "diffora" else None
        (folder / "selection.json").write_text(json.dumps(selection))
        if method == "diffora":
            start = [[0.25] * len(TYPES)] * LAYERS
            trajectory = {"types": TYPES, "rounds": [0.0, 1.0], "gamma_bar": [start, gamma_bar]}
            (folder / "trajectory.json").write_text(json.dumps(trajectory))
    cfg = OmegaConf.create(
        {
            "seed": seed,
            "resume": False,
            "method": {"name": literal(method)} | ({"draw": "${seed}"} if method == "random" else {}),
            "task": {"name": literal(task)},
            "model": {"path": "tiny"},
            "trainer": {},
        }
    )
    cfg = OmegaConf.merge(cfg, settings or {})
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    content = record | setting_facts(cfg, changes.get("data_hash", record["data_hash"])) | changes
    (folder / "run.json").write_text(json.dumps(content))
    return folder


def change_record(folder: Path, **changes: Any) -> None:
    """Replace fields in the ``run.json`` of a folder."""
    content = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(content | changes))
