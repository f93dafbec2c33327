"""Collects the facts for a run's record, ``run.json``. `diffora.records` describes the fields."""

import contextlib
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from diffora.adapters.manifest import digest_of
from diffora.errors import UserError, called, reason
from diffora.records import NAME, MetricFacts, check, read_content
from diffora.run.setting import setting_facts
from diffora.settings.identity import config_hash

if TYPE_CHECKING:  # it imports torch, which is slow and which some commands do not need
    from diffora.tasks.base import Task

WEIGHTS = ("adapter", "model")
"""A run directory has one of these folders, with the trained weights."""
PACKAGES = ("diffora", "torch", "lightning", "transformers", "datasets", "torchmetrics", "hydra-core", "numpy")


def new_record(cfg: DictConfig, data_hash: str | None, backbone: str | None = None) -> dict[str, Any]:
    """The content of ``run.json`` at the start of a run. `diffora.run.experiment` adds the rest.

    Args:
        cfg: the composed configuration with its interpolations, which show what follows the seed.
        data_hash: of the training and validation rows; None if they are not loaded.
        backbone: digest of the backbone's files; None if it is not known.
    """
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
        **setting_facts(cfg, data_hash, backbone),
        "config_hash": config_hash(cfg),
        "data_hash": data_hash,
        "git_commit": git_commit(),
        "versions": versions(),
    }


def metric_facts(task: "Task") -> dict[str, Any]:
    """The record's fields ``main_metric`` and ``metric_facts``, see `diffora.records.Record`."""
    higher, lower = partial(MetricFacts, maximise=True), partial(MetricFacts, maximise=False)
    facts = {name: MetricFacts(task.unit_of(name), task.higher_is_better(name)) for name in task.metrics}
    facts |= {
        "loss": lower("loss"),
        "epoch": lower("epochs"),
        "best_epoch": lower("epochs"),
        "generalisation_gap": lower(task.unit_of(task.main_metric)),
        "forgetting/before": lower("loss"),
        "forgetting/after": lower("loss"),
        "forgetting/increase": lower("loss"),
        "update/rank": higher("rank"),
        "update/orthogonality_loss": lower(""),
        "update/stable_rank": higher("rank"),
        "update/median_sigma": higher(""),
    }
    return {"main_metric": task.main_metric, "metric_facts": {name: asdict(value) for name, value in facts.items()}}


def read_record(folder: Path) -> dict[str, Any] | None:
    """The content of a run directory's ``run.json``; None if there is none or if it is broken (see `why_broken`)."""
    try:
        return _checked(folder / NAME)
    except (OSError, UserError):
        return None


def why_broken(folder: Path) -> str | None:
    """Why a folder's ``run.json`` cannot be used, with its path; None if it can be used or does not exist."""
    file = folder / NAME
    try:
        _checked(file)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{file}: {reason(error)}"
    except UserError as error:
        message = str(error)
        return message if str(folder) in message else f"{file} is {message}"
    return None


def _checked(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = read_content(file)
    check(content)
    return content


def result_files(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """The files of a run's result, relative to its folder: settings, selection, weights."""
    weights = [file for name in WEIGHTS for file in sorted((folder / name).glob("*")) if file.name != "README.md"]
    chosen = ["selection.json"] if record.get("selection") else []
    return ["config.yaml", *chosen, *(file.relative_to(folder).as_posix() for file in weights)]


def missing_files(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """Which files of the result are missing or empty; the record lists them."""
    return [name for name in record.get("files") or ["config.yaml"] if not _has_content(folder / name)]


def file_digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The sha256 of some files of a run, by name."""
    return {name: digest_of(folder / name) for name in names}


def check_as_left(folder: Path, record: Mapping[str, Any]) -> None:
    """Refuse settings or weights that changed after the run wrote them. A record without digests passes.

    Raises:
        UserError: names the files.
    """
    digests: Mapping[str, str] = record.get("digests") or {}
    changed = [name for name in digests if name != "selection.json" and _digest(folder / name) != digests[name]]
    if changed:
        raise UserError(
            f"{folder}: {', '.join(changed)} {'is' if len(changed) == 1 else 'are'} not as the run left it: damaged, "
            "edited, or from another run. Restore it, or remove it and repeat the run's own command with resume=true, "
            f"which makes it again from the last checkpoint. For `{called('evaluate')}`, give other settings on the "
            "command line"
        )


def _digest(file: Path) -> str | None:
    """None if the file cannot be read."""
    try:
        return digest_of(file)
    except (OSError, UserError):
        return None


def _has_content(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0


def git_commit() -> str | None:
    """Commit of the source tree, with ``+`` if files changed since; None outside a checkout of this project."""
    here = Path(__file__).parent
    try:  # an installed package may lie inside somebody's repository, which does not track it
        subprocess.run(["git", "ls-files", "--error-unmatch", __file__], cwd=here, capture_output=True, check=True)
        commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=here, stderr=subprocess.DEVNULL, text=True)
        dirty = subprocess.check_output(
            ["git", "status", "--porcelain", "-uno"], cwd=here, stderr=subprocess.DEVNULL, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + ("+" if dirty.strip() else "")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def reset_peaks() -> None:
    """Start a new measurement of peak memory, because several runs of a sweep share one process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peaks() -> dict[str, float | None]:
    """Peak resident and CUDA memory in MB since `reset_peaks`; only Linux allows the reset of resident memory."""
    import resource

    import torch

    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if platform.system() == "Darwin" else 2**10)
    with contextlib.suppress(OSError, StopIteration):
        status = Path("/proc/self/status").read_text()
        rss = next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    cuda = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
    return {"peak_rss_mb": round(rss, 1), "peak_cuda_mb": None if cuda is None else round(cuda, 1)}
