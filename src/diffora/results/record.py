"""``run.json``: what a run was, found and cost, written atomically."""

import contextlib
import json
import math
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from diffora.config import config_hash
from diffora.files import write_text

NAME = "run.json"
PACKAGES = ("diffora", "torch", "lightning", "transformers", "datasets", "torchmetrics", "hydra-core", "numpy")


def new_record(cfg: DictConfig, data_hash: str | None) -> dict[str, Any]:
    """The record of a run that has just begun."""
    return {
        "method": cfg.method.name,
        "task": cfg.task.name,
        "model": cfg.model.name,
        "seed": cfg.seed,
        "experiment": cfg.cell.experiment,
        "row": cfg.cell.row,
        "column": cfg.cell.column,
        "scale": cfg.scale if cfg.cell.experiment else None,
        "status": "running",
        "metrics": {},
        "params": {},
        "time": {},
        "memory": {},
        "selection": None,
        "config_hash": config_hash(cfg),
        "data_hash": data_hash,
        "git_commit": git_commit(),
        "versions": versions(),
    }


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write ``run.json``. Numbers that JSON does not know (NaN, infinity) become null."""
    write_text(folder / NAME, json.dumps(_clean(record), indent=1) + "\n")


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record in a run directory, or None."""
    try:
        content: dict[str, Any] = json.loads((folder / NAME).read_text())
        return content
    except (OSError, json.JSONDecodeError):
        return None


def git_commit() -> str | None:
    """Commit of the source tree, with ``+`` where it has been changed since; None outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=here, stderr=subprocess.DEVNULL, text=True)
        dirty = subprocess.check_output(
            ["git", "status", "--porcelain", "-uno"], cwd=here, stderr=subprocess.DEVNULL, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + ("+" if dirty.strip() else "")


def versions() -> dict[str, str]:
    """Of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def reset_peaks() -> None:
    """Start counting peak memory anew: several runs of a sweep share one process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peaks() -> dict[str, float | None]:
    """Peak resident and CUDA memory in MB since `reset_peaks` (where the system allows a reset: Linux)."""
    import resource

    import torch

    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if platform.system() == "Darwin" else 2**10)
    with contextlib.suppress(OSError, StopIteration):
        status = Path("/proc/self/status").read_text()
        rss = next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    cuda = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
    return {"peak_rss_mb": round(rss, 1), "peak_cuda_mb": None if cuda is None else round(cuda, 1)}


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
